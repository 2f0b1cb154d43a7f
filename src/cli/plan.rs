//! `embassy plan`: the rules and routes that a start with these flags would install. Changes nothing.

use std::{
    collections::BTreeSet,
    fmt::Write,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use serde::Serialize;
use tokio::{sync::watch, time::timeout};

use super::{Answer, table::Columns, table::printable};
use crate::{
    app,
    capture::{
        self, OwnRules, Script, conntrack,
        rules::{Hook, RuleSettings},
    },
    config::{Args, CaptureMode, Config, UsageError},
    control::{AwaitedParts, SourceStates},
    discovery::{Endpoints, Query},
    events::Events,
    model::Protocol,
    provider::{Beyond, Lookup},
    readiness::{Part, Readiness},
    source::{Known, ResyncRequests},
    table::{Route, Table},
};

/// Print the rules and routes that a start with these flags would install; changes nothing
#[derive(Debug, clap::Args)]
pub(super) struct Plan {
    /// Print JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    flags: Args,
}

/// Timeout for the sources.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a start with these flags would install.
#[derive(Debug, Serialize)]
struct Shown {
    /// `dnat`, `redirect`, or `none`: no rules.
    capture: &'static str,
    /// `nft` or `iptables`, if rules would be installed.
    firewall: Option<String>,
    /// The addresses that are captured: the VIPs, and with `--redirect` embassy's own.
    vips: Vec<String>,
    /// Without `--dnat` and `--redirect`: rules of the user's own that lead to embassy's port; null if they cannot be read.
    own_rules: Option<Vec<String>>,
    /// The ports of routes that none of these rules matches.
    passed_by: BTreeSet<u16>,
    routes: Vec<Planned>,
    /// The bindings without a route.
    skipped: Vec<Skipped>,
    /// Connection tracking settings that would be written.
    settings: Vec<Setting>,
    /// The rules, as input of the firewall's programs. With nft, embassy starts no program.
    scripts: Vec<Script>,
}

#[derive(Debug, Serialize)]
struct Planned {
    consumer: String,
    consumer_id: String,
    source: String,
    port: u16,
    protocol: &'static str,
    origin: String,
    service: String,
    endpoints: Vec<String>,
    /// Why the discovery does not answer.
    error: Option<String>,
}

#[derive(Debug, Serialize)]
struct Skipped {
    consumer: String,
    origin: String,
    reason: String,
}

#[derive(Debug, Serialize)]
struct Setting {
    path: &'static str,
    value: u32,
}

impl Plan {
    pub(super) fn config(
        &self,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Config, UsageError> {
        Config::of(self.flags.clone(), env)
    }

    pub(super) async fn run(self: Box<Self>, config: Config) -> Result<Answer> {
        let rules = app::rules(&config).await?;
        let (table, sources) = learned(&config, &rules).await?;
        let (firewall, scripts) = match config.capture {
            CaptureMode::None => (None, Vec::new()),
            CaptureMode::Dnat | CaptureMode::Redirect => {
                let plan = capture::plan(config.firewall, &rules, &table).await;
                let (firewall, scripts) = plan.context("no firewall is available")?;
                (Some(firewall.to_string()), scripts)
            }
        };
        let own_rules = match config.capture {
            CaptureMode::None => OwnRules::read(rules.port).await,
            CaptureMode::Dnat | CaptureMode::Redirect => OwnRules::Unread,
        };
        let passes = |route: &&Arc<Route>| {
            own_rules.pass_by(route.key.port.get(), Hook::of(&route.consumer))
        };
        let tcp = table.routes().filter(|route| route.key.protocol == Protocol::Tcp);
        let passed_by = tcp.filter(passes).map(|route| route.key.port.get()).collect();
        let settings = conntrack::asked(&config.conntrack);
        let shown = Shown {
            capture: match config.capture {
                CaptureMode::None => "none",
                CaptureMode::Dnat => "dnat",
                CaptureMode::Redirect => "redirect",
            },
            firewall,
            vips: {
                let vips = table.vips().iter().map(|vip| vip.0);
                let own = rules.own.iter().copied();
                let all: BTreeSet<_> = vips.chain(own).collect();
                all.iter().map(ToString::to_string).collect()
            },
            own_rules: match config.capture {
                CaptureMode::None => match &own_rules {
                    OwnRules::Read { leads, .. } => {
                        Some(leads.iter().map(|lead| lead.rule.clone()).collect())
                    }
                    OwnRules::Unread | OwnRules::Unreadable(_) => None,
                },
                CaptureMode::Dnat | CaptureMode::Redirect => Some(Vec::new()),
            },
            passed_by,
            routes: routes(&table, &sources),
            skipped: skipped(&table, &sources),
            settings: settings.map(|(path, value)| Setting { path, value }).collect(),
            scripts,
        };
        if self.json { Answer::json(&shown, true) } else { Ok(Answer::yes(shown.text())) }
    }
}

/// The first table with the answers of all sources. An error if the provider does not answer.
async fn learned(config: &Config, rules: &RuleSettings) -> Result<(Arc<Table>, SourceStates)> {
    let readiness = Readiness::default();
    let waiting = AwaitedParts {
        listing: readiness.wait_for(Part::Listing),
        answers: readiness.wait_for(Part::Discovery),
    };
    let (lookup, resync) = (Lookup::default(), ResyncRequests::new(config.resync));
    let (refused, events) = (Arc::default(), Events::default());
    let control = app::learn(config, rules, &lookup, &resync, refused, events, waiting)?;
    let (mut tables, sources) = (control.tables(), control.sources());
    let task = tokio::spawn(control.run());
    let end = Instant::now() + PATIENCE;
    // Sources that do not answer in time are reported as such.
    let _ = timeout(PATIENCE, tables.wait_for(|table| table.version > 0)).await;
    let left = end.saturating_duration_since(Instant::now());
    let _ = timeout(left, answered(&mut tables, &sources)).await;
    task.abort();
    let sources = sources.borrow().clone();
    let provider = sources.provider.borrow().clone();
    if provider.value.is_none() {
        let error = provider.error.unwrap_or_else(|| "no answer".into());
        return Err(anyhow!("the bindings are not known: {error}"));
    }
    let table = tables.borrow().clone();
    Ok((table, sources))
}

/// Waits until every query has its answer or its error, and the table knows the answers.
async fn answered(
    tables: &mut watch::Receiver<Arc<Table>>,
    sources: &watch::Receiver<SourceStates>,
) {
    let queries = sources.borrow().queries.clone();
    for (_, answers) in &*queries {
        let said = |known: &Known<Endpoints>| known.value.is_some() || known.error.is_some();
        let _ = answers.clone().wait_for(said).await;
    }
    let answers = |query: &Query| {
        queries.iter().any(|(asked, known)| asked == query && known.borrow().value.is_some())
    };
    let knows = |table: &Arc<Table>| {
        table.upstreams().all(|upstream| upstream.answered || !answers(&upstream.query))
    };
    let _ = tables.wait_for(knows).await;
}

fn routes(table: &Table, sources: &SourceStates) -> Vec<Planned> {
    let mut routes: Vec<_> = table.routes().collect();
    routes.sort_by(|a, b| (&a.consumer_name, a.key).cmp(&(&b.consumer_name, b.key)));
    let error = |query: &Query| {
        let (_, answers) = sources.queries.iter().find(|(asked, _)| asked == query)?;
        answers.borrow().error.as_deref().map(str::to_owned)
    };
    let planned = |route: &&Arc<Route>| Planned {
        consumer: route.consumer_name.to_string(),
        consumer_id: route.consumer.full().to_owned(),
        source: route.key.source.to_string(),
        port: route.key.port.get(),
        protocol: route.key.protocol.as_str(),
        origin: route.binding.origin.to_string(),
        service: route.written_query().to_string(),
        endpoints: {
            let states = table.endpoints_of(route).iter();
            states.map(|state| state.endpoint.to_string()).collect()
        },
        error: error(&route.query),
    };
    routes.iter().map(planned).collect()
}

fn skipped(table: &Table, sources: &SourceStates) -> Vec<Skipped> {
    let listing = sources.provider.borrow().value.clone().unwrap_or_default();
    let problems = listing.problems.iter().map(|problem| Skipped {
        consumer: problem.consumer.to_string(),
        origin: problem.origin.to_string(),
        reason: problem.reason.clone(),
    });
    let unrouted = table.unrouted().map(|unrouted| Skipped {
        consumer: unrouted.consumer_name.to_string(),
        origin: unrouted.origin.to_string(),
        reason: unrouted.reason.to_string(),
    });
    let beyond = sources.listing.iter().flat_map(|listing| &listing.beyond);
    let beyond = beyond.map(|Beyond { limit, most, consumer }| Skipped {
        consumer: consumer.name.to_string(),
        origin: limit.flag().to_owned(),
        reason: format!("{} bindings are beyond {most}", consumer.bindings.len()),
    });
    problems.chain(unrouted).chain(beyond).collect()
}

impl Shown {
    fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        match self.vips.as_slice() {
            [] if self.firewall.is_none() => {}
            [] => writeln!(out, "VIPs: none; set one with --proxy-ip")?,
            vips => writeln!(out, "VIPs: {}", vips.join(" "))?,
        }
        let mut routes = Columns::new(&["CONSUMER", "ADDRESS", "PORT>", "SERVICE", "ENDPOINTS"]);
        for route in &self.routes {
            let endpoints = match (&route.error, route.endpoints.as_slice()) {
                (Some(error), []) => format!("no answer: {error}"),
                (None, []) => "none".to_owned(),
                (_, endpoints) => endpoints.join(" "),
            };
            let service = route.service.clone();
            let port = match route.protocol {
                "udp" => format!("{}/udp", route.port),
                _ => route.port.to_string(),
            };
            routes.row([route.consumer.clone(), route.source.clone(), port, service, endpoints]);
        }
        match routes.is_empty() {
            true => writeln!(out, "\nNo routes: no container has a binding.")?,
            false => write!(out, "\nRoutes\n{routes}")?,
        }
        if !self.skipped.is_empty() {
            writeln!(out, "\nSkipped")?;
        }
        for Skipped { consumer, origin, reason } in &self.skipped {
            writeln!(out, "{}", printable(&format!("{consumer} {origin}: {reason}")))?;
        }
        for Setting { path, value } in &self.settings {
            writeln!(out, "\nWrites {value} to {path}")?;
        }
        if self.firewall.is_none() {
            writeln!(out, "\nNo rules: neither --dnat nor --redirect is set.")?;
            match self.own_rules.as_deref() {
                None => writeln!(
                    out,
                    "It cannot be known whether your own rules lead to embassy's port: they cannot be read."
                )?,
                Some([]) => {
                    writeln!(out, "No rule leads to embassy's port: nothing would be captured.")?
                }
                Some(rules) => {
                    writeln!(out, "Your own rules that lead to embassy's port:")?;
                    rules.iter().try_for_each(|rule| writeln!(out, "{}", printable(rule)))?;
                    for port in &self.passed_by {
                        writeln!(out, "None of them takes connections to port {port}.")?;
                    }
                }
            }
        }
        for Script { command, text } in &self.scripts {
            write!(out, "\nRules, as `{command}` takes them\n{text}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;
    use crate::{model::ServiceName, source::Publisher};

    #[tokio::test(start_paused = true)]
    async fn a_late_answer_is_waited_for_and_nothing_after_it() {
        let bell = Arc::<tokio::sync::Notify>::default();
        let ((publish, answers), (_nobody, provider)) =
            (Publisher::new(bell.clone()), Publisher::new(bell));
        let query = Query {
            via: "consul".into(),
            service: ServiceName::new("web").unwrap(),
            tags: Default::default(),
            dc: None,
            port: None,
        };
        let queries = [(query, answers)].into();
        let (in_use, listing) = Default::default();
        let (_sources, sources) =
            watch::channel(SourceStates { provider, queries, in_use, listing });
        let (_tables, mut tables) = watch::channel(Arc::<Table>::default());
        let waiting = tokio::spawn(async move { answered(&mut tables, &sources).await });
        sleep(Duration::from_secs(3)).await;
        assert!(!waiting.is_finished());
        publish.publish(Endpoints::default());
        timeout(Duration::from_secs(1), waiting).await.expect("no more is waited for").unwrap();
    }
}
