//! `embassy wait`: waits until a service can be used, for health checks and start order.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::Result;
use serde::Serialize;
use tokio::time::timeout;

use super::{
    Answer,
    client::{Asked, Client},
    table::printable,
};
use crate::{
    admin::api::{self, Subject, Verdict},
    config,
};

/// Wait until these services have routes with endpoints; exit 1 on timeout
///
/// A service is ready when it has a route with an endpoint that is not known to fail, and embassy's rules are in place. An endpoint to
/// which nobody has connected yet counts, unless the binding says check=tcp. With rules of your own, one of them has to take the connections, as far as embassy can read them.
#[derive(Debug, clap::Args)]
pub(super) struct Wait {
    #[command(flatten)]
    asked: Asked,

    /// Timeout, for example 500ms, 10s, 2m; 0: check once
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = config::duration)]
    timeout: Duration,

    /// Check only routes of this consumer: name or ID prefix
    #[arg(long, value_name = "CONSUMER")]
    consumer: Option<String>,

    /// Services, as in the descriptor; with tags, only bindings that ask for exactly these tags
    #[arg(value_name = "SERVICE", required = true)]
    services: Vec<String>,
}

/// Poll interval.
const PAUSE: Duration = Duration::from_millis(200);
/// Timeout of one poll.
const LOOK: Duration = Duration::from_secs(1);

#[derive(Debug, Serialize)]
struct Waited {
    ready: bool,
    seconds: f64,
    /// Why it is not ready.
    reason: Option<String>,
}

impl Wait {
    pub(super) async fn run(self) -> Result<Answer> {
        let client = self.asked.client()?;
        let start = Instant::now();
        let reason = loop {
            // A stopped embassy, or a host that drops packets, must not extend the wait.
            let left = self.timeout.saturating_sub(start.elapsed());
            let left = if self.timeout.is_zero() { LOOK } else { left };
            let reason = match timeout(left, self.missing(&client)).await {
                Ok(Ok(None)) => break None,
                Ok(Ok(Some(reason))) => reason,
                // It may start later.
                Ok(Err(error)) => format!("{error:#}"),
                Err(_) => "embassy does not answer in time".to_owned(),
            };
            if start.elapsed() + PAUSE > self.timeout {
                break Some(reason);
            }
            tokio::time::sleep(PAUSE).await;
        };
        let ready = reason.is_none();
        if self.asked.json {
            let seconds = start.elapsed().as_secs_f64();
            return Answer::json(&Waited { ready, seconds, reason }, ready);
        }
        let text = match reason {
            None => format!("{}: ready\n", printable(&self.services.join(", "))),
            Some(reason) => format!("not ready: {reason}\n"),
        };
        Ok(Answer::new(text, ready))
    }

    /// The reason why it is not ready. `None`: it is ready.
    async fn missing(&self, client: &Client) -> Result<Option<String>> {
        let status: api::Status = client.get("/v1/status", &[]).await?;
        // Problems that affect all connections.
        let everybodys = status.findings.iter().find(|finding| {
            finding.verdict == Verdict::Broken
                && matches!(finding.about, Subject::Process | Subject::Capture)
        });
        if let Some(finding) = everybodys {
            return Ok(Some(printable(&finding.text)));
        }
        for service in &self.services {
            let consumer = self.consumer.as_deref().map(|consumer| ("consumer", consumer));
            let (name, tags) = with_tags(service);
            let query: Vec<_> = [("service", name)].into_iter().chain(consumer).collect();
            let mut routes: Vec<api::Route> = client.all("/v1/routes", &query).await?;
            let tags_of = |route: &api::Route| route.query.tags.iter().cloned().collect();
            routes.retain(|route| tags.as_ref().is_none_or(|tags| *tags == tags_of(route)));
            if !routes.iter().any(|route| route.verdict != Verdict::Broken) {
                return Ok(Some(match routes.first() {
                    None => self.no_route(client, service).await?,
                    Some(route) => why(client, route).await?,
                }));
            }
        }
        Ok(None)
    }

    /// Why there is no route to a service: its binding has none, or no binding asks for it.
    async fn no_route(&self, client: &Client, service: &str) -> Result<String> {
        let consumer = self.consumer.as_deref().map(|consumer| ("consumer", consumer));
        let query: Vec<_> = [("state", "problem")].into_iter().chain(consumer).collect();
        let bindings: Vec<api::Binding> = client.all("/v1/bindings", &query).await?;
        let is_it = |binding: &&api::Binding| {
            binding.service.as_deref().is_some_and(|other| is_asked(service, other))
        };
        let asks = bindings.iter().find(is_it);
        Ok(match asks {
            Some(api::Binding { consumer, origin, reasons, .. }) => {
                let reasons = reasons.join("; ");
                printable(&format!("{consumer} {origin} has no route: {reasons}"))
            }
            None => nobody_asks(client, service, self.consumer.as_deref()).await?,
        })
    }
}

/// Why a route's connections are refused.
async fn why(client: &Client, route: &api::Route) -> Result<String> {
    let port = route.port.to_string();
    let asked = [("consumer", route.address.as_str()), ("port", port.as_str())];
    let explain: api::Explain = client.get("/v1/explain", &asked).await?;
    let text = explain.findings.first().map_or("", |first| &first.text);
    Ok(printable(&format!("{} is {}: {text}", route.query.name, route.state)))
}

/// No container asks for it: names the services that containers ask for, because the name may be misspelt.
async fn nobody_asks(client: &Client, service: &str, consumer: Option<&str>) -> Result<String> {
    if let Some(consumer) = consumer
        && let Some(unknown) = client.unknown(consumer).await?
    {
        return Ok(unknown);
    }
    let of = consumer.map(|consumer| ("consumer", consumer));
    let asked: Vec<_> = [("limit", "100")].into_iter().chain(of).collect();
    let some: api::Page<api::Route> = client.get("/v1/routes", &asked).await?;
    let query = |route: &api::Route| match route.query.tags.join(",") {
        tags if tags.is_empty() => printable(&route.query.service),
        tags => printable(&format!("{}[{tags}]", route.query.service)),
    };
    let names: BTreeSet<_> = some.items.iter().map(query).collect();
    let names = names.into_iter().take(NAMED).collect::<Vec<_>>().join(", ");
    let service = printable(service);
    Ok(match (consumer.map(printable), names.is_empty()) {
        (Some(consumer), true) => format!("{consumer} does not ask for {service}"),
        (Some(consumer), false) => {
            format!("{consumer} does not ask for {service}; it asks for {names}")
        }
        (None, true) => format!("no container asks for {service}"),
        (None, false) => format!("no container asks for {service}; containers ask for {names}"),
    })
}

/// Maximum number of services named if no container asks for the requested one.
const NAMED: usize = 10;

/// `service[tag,tag]`, as in descriptors. Without tags any tags match.
fn with_tags(service: &str) -> (&str, Option<BTreeSet<String>>) {
    match service.strip_suffix(']').and_then(|service| service.split_once('[')) {
        Some((name, tags)) => (name, Some(tags.split(',').map(str::to_owned).collect())),
        None => (service, None),
    }
}

/// Whether a binding that asks for `service` is one of those that are waited for as `wanted`.
fn is_asked(wanted: &str, service: &str) -> bool {
    let (name, tags) = with_tags(wanted);
    let (other, carried) = with_tags(service);
    name == other && tags.is_none_or(|tags| tags == carried.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_may_be_waited_for_with_its_tags() {
        let tags = |list: &[&str]| Some(list.iter().map(ToString::to_string).collect());
        assert_eq!(with_tags("redis"), ("redis", None));
        assert_eq!(with_tags("redis[b,a]"), ("redis", tags(&["a", "b"])));
        assert_eq!(with_tags("[]"), ("", tags(&[""])));
        assert_eq!(with_tags("redis]"), ("redis]", None));
        assert!(is_asked("redis[b,a]", "redis[a,b]") && is_asked("redis", "redis[a]"));
        assert!(!is_asked("redis[a]", "redis") && !is_asked("redis[a]", "redis[a,b]"));
        assert!(!is_asked("redis", "redis2"));
    }
}
