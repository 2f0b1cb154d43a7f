//! `embassy explain`: where connections go, and why.

use std::fmt::Write;

use anyhow::Result;

use super::{
    Answer,
    client::ApiTarget,
    findings, ps,
    table::{age, printable},
};
use crate::{
    admin::api::{self, PathReason, Verdict},
    model::{Port, Protocol},
};

/// Explain why a consumer's connections to a port go where they go; exit 1 if the next one would be refused
#[derive(Debug, clap::Args)]
pub(super) struct Explain {
    #[command(flatten)]
    asked: ApiTarget,

    /// Consumer: container name, ID prefix, or one of its IP addresses
    #[arg(value_name = "CONTAINER")]
    consumer: String,

    /// Port that the consumer connects to
    #[arg(value_name = "PORT")]
    port: Port,
}

impl Explain {
    pub(super) async fn run(self) -> Result<Answer> {
        let client = self.asked.client()?;
        let port = self.port.to_string();
        let query = [("consumer", self.consumer.as_str()), ("port", port.as_str())];
        let explain: api::Explain = client.get("/v1/explain", &query).await?;
        let goes = explain.verdict != Verdict::Broken;
        if self.asked.json {
            Answer::json(&explain, goes)
        } else {
            Ok(Answer::new(text(&explain), goes))
        }
    }
}

fn text(explain: &api::Explain) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write(&mut out, explain);
    out
}

fn write(out: &mut String, explain: &api::Explain) -> std::fmt::Result {
    let mut all = explain.findings.iter();
    if let Some(first) = all.next() {
        writeln!(out, "{}: {}", findings::word(explain.verdict), printable(&first.text))?;
        findings::write_fix(out, first)?;
    }
    findings::write(out, all)?;
    writeln!(out)?;
    for consumer in &explain.consumers {
        let id = printable(consumer.id.get(..12).unwrap_or(&consumer.id));
        let at = match consumer.addresses.join(" ") {
            none if none.is_empty() => "without an address".to_owned(),
            addresses => format!("at {}", printable(&addresses)),
        };
        let ports: Vec<_> = consumer.ports.iter().map(ToString::to_string).collect();
        let ports = if ports.is_empty() { "none".to_owned() } else { ports.join(" ") };
        let name = printable(&consumer.name);
        writeln!(out, "consumer   {name} ({id}) {at}; ports with a route: {ports}")?;
        for arrival in &consumer.arrivals {
            writeln!(out, "arrives    {}", printable(arrival))?;
        }
    }
    for binding in &explain.bindings {
        writeln!(out, "declared   {}", printable(&of_binding(binding)))?;
    }
    let captured = match explain.captured {
        Some(true) => "yes",
        Some(false) => "no",
        None => "as your own rules decide",
    };
    writeln!(out, "captured   {captured}")?;
    if !explain.dial.is_empty() {
        writeln!(out, "dials      {}", printable(&explain.dial.join(" or ")))?;
    }
    for route in explain.routes.iter().filter(|one| one.path_reason != PathReason::NotAsked) {
        let (path, why) = (route.path, route.path_reason.line());
        let at = match route.protocol {
            Protocol::Tcp => String::new(),
            Protocol::Udp => "UDP ".to_owned(),
        };
        writeln!(out, "path       {path}, {at}from {}: {why}", printable(&route.address))?;
    }
    for route in &explain.routes {
        if let Some(error) = &route.figures.last_error {
            let said = format!("{} ({} ago)", error.text, age(error.age_seconds));
            writeln!(out, "last error {}", printable(&said))?;
        }
    }
    for service in &explain.services {
        write_service(out, service)?;
    }
    Ok(())
}

fn write_service(out: &mut String, service: &api::ExplainService) -> std::fmt::Result {
    if let Some(source) = &service.source {
        writeln!(out, "source     {}", printable(&of_source(source)))?;
    }
    if let Some(next) = &service.next {
        writeln!(out, "next       {}", printable(next))?;
    }
    if !service.endpoints.is_empty() {
        write!(out, "\n{}", ps::endpoints(&service.endpoints))?;
    }
    Ok(())
}

/// A binding's origin, its query, and its state. An invalid descriptor has no query.
fn of_binding(binding: &api::Binding) -> String {
    let query = binding.query.as_ref().map(|query| query.name.as_str());
    let asked = query.or(binding.service.as_deref()).unwrap_or_default();
    let over = match binding.protocol {
        Some(Protocol::Udp) => "over UDP",
        Some(Protocol::Tcp) | None => "",
    };
    let words = [binding.origin.as_str(), asked, over];
    let words: Vec<_> = words.into_iter().filter(|word| !word.is_empty()).collect();
    let declared = if words.is_empty() { "nothing".to_owned() } else { words.join(" ") };
    let why = binding.reasons.iter().map(|reason| format!("; {reason}"));
    format!("{declared}: {}{}", binding.state, why.collect::<String>())
}

/// A source's state, and since when. Events that have not happened are not mentioned.
fn of_source(source: &api::Source) -> String {
    let api::Source { name, state, .. } = source;
    let changed = source.changed_seconds.map(|ago| format!(", changed {} ago", age(ago)));
    match (source.kept_seconds, source.age_seconds) {
        (Some(ago), _) => format!(
            "{name} is {state}; its data was saved by an earlier run, confirmed {} ago",
            age(ago)
        ),
        (None, Some(ago)) => {
            format!("{name} is {state}; confirmed {} ago{}", age(ago), changed.unwrap_or_default())
        }
        (None, None) => format!("{name} is {state}; there is no answer yet"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(verdict: Verdict, text: &str) -> api::Finding {
        api::Finding {
            about: api::Subject::Bindings,
            verdict,
            cause: "not_declared".into(),
            text: text.into(),
            fix: Some("do something".into()),
        }
    }

    fn source(kept: Option<f64>, age: Option<f64>, changed: Option<f64>) -> api::Source {
        api::Source {
            name: "consul web".into(),
            kind: "consul".into(),
            state: if age.is_some() { api::SourceState::Up } else { api::SourceState::Down },
            verdict: Verdict::Ok,
            age_seconds: age,
            held_for_seconds: None,
            kept_seconds: kept,
            changed_seconds: changed,
            answers: 0,
            changes: 0,
            failures: 0,
            error: None,
            items: 0,
            skipped: vec![],
        }
    }

    #[test]
    fn a_source_is_said_to_have_done_what_it_has() {
        for (source, expected) in [
            (
                source(None, Some(3.0), Some(600.0)),
                "consul web is up; confirmed 3 s ago, changed 10 min ago",
            ),
            (source(None, Some(3.0), None), "consul web is up; confirmed 3 s ago"),
            (source(None, None, None), "consul web is down; there is no answer yet"),
            (
                source(Some(4.0), None, None),
                "consul web is down; its data was saved by an earlier run, confirmed 4 s ago",
            ),
        ] {
            assert_eq!(of_source(&source), expected);
            assert_eq!(crate::text::odd(&of_source(&source)), None);
        }
    }

    #[test]
    fn a_binding_is_shown_by_what_is_known_of_it() {
        let binding = |origin: &str, service: Option<&str>, reasons: &[&str]| api::Binding {
            consumer: "app".into(),
            consumer_id: "1".into(),
            origin: origin.into(),
            state: api::BindingState::Unrouted,
            verdict: Verdict::Broken,
            reasons: reasons.iter().map(ToString::to_string).collect(),
            port: Some(80),
            protocol: None,
            service: service.map(str::to_owned),
            query: None,
            addresses: vec![],
        };
        for (binding, expected) in [
            (
                binding("BACKEND_A", Some("web[b,a]"), &["no address"]),
                "BACKEND_A web[b,a]: unrouted; no address",
            ),
            (binding("BACKEND_A", None, &["no port"]), "BACKEND_A: unrouted; no port"),
            (binding("", None, &["it has no ID"]), "nothing: unrouted; it has no ID"),
        ] {
            assert_eq!(of_binding(&binding), expected);
            assert_eq!(crate::text::odd(&of_binding(&binding)), None);
        }
    }

    #[test]
    fn the_verdict_and_its_cause_come_first() {
        let explain = api::Explain {
            consumer: "app".into(),
            port: 81,
            verdict: Verdict::Broken,
            findings: vec![
                finding(Verdict::Broken, "Port 81 is not declared."),
                finding(Verdict::Ok, "And another thing."),
            ],
            consumers: vec![api::ExplainConsumer {
                name: "app".into(),
                id: "0123456789abcdef".into(),
                addresses: vec!["172.17.0.2".into()],
                arrivals: vec!["172.17.0.2 by docker0, port veth1".into()],
                ports: vec![80],
            }],
            bindings: vec![],
            routes: vec![],
            captured: Some(false),
            dial: vec!["172.17.0.1:81".into()],
            services: vec![],
        };
        let expected = "\
BROKEN: Port 81 is not declared.
            fix: do something
  ok        And another thing.

consumer   app (0123456789ab) at 172.17.0.2; ports with a route: 80
arrives    172.17.0.2 by docker0, port veth1
captured   no
dials      172.17.0.1:81
";
        assert_eq!(text(&explain), expected);
    }
}
