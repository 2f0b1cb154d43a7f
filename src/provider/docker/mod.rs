//! The docker provider: a container's environment and labels say what it asks for.

use std::{collections::HashMap, fmt, pin::pin, time::Duration};

use bollard::{
    Docker,
    errors::Error,
    models::{ContainerSummary, EventMessage, EventMessageTypeEnum, Network},
    query_parameters::{EventsOptions, ListContainersOptions},
};
use futures_util::{Stream, StreamExt, stream::FuturesUnordered};
use ipnet::IpNet;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tracing::warn;

use self::{
    containers::{Containers, Found, NetworkId, Ticket},
    process::Processes,
};
use super::{Listing, Lookup};
use crate::{
    docker::Engine,
    model::ContainerId,
    source::{Publisher, Source, SourceError},
};

mod containers;
mod inspect;
#[cfg(test)]
mod interleavings;
mod process;

pub use process::resume;

/// Follows the containers of an engine. It asks, and never changes anything: GET calls only.
#[derive(Debug)]
pub struct DockerProvider {
    engine: Engine,
    /// `-prefix`: what the names of the variables start with.
    prefix: String,
    lookup: Lookup,
    /// It outlives a session: an engine that cannot say how one container is does not make us forget it.
    containers: Containers,
    processes: Processes,
}

/// How often a quiet engine is asked whether it still lives.
const PING: Duration = Duration::from_secs(5);
/// Inspections under way at once, while many containers are listed.
const INSPECTIONS: usize = 8;

impl DockerProvider {
    pub fn new(engine: Engine, prefix: String, lookup: Lookup) -> Self {
        let (containers, processes) = (Containers::default(), Processes::default());
        Self { engine, prefix, lookup, containers, processes }
    }
}

impl Source for DockerProvider {
    type Item = Listing;

    async fn session(&mut self, publish: &Publisher<Listing>) -> Result<(), SourceError> {
        let Self { engine, prefix, lookup, containers, processes } = self;
        let client = Client::connect(engine, prefix).await?;
        // The stream opens when it is first read. An engine replays a few of the events since this moment, and no more:
        // so it is read beside the listing, however long that takes.
        let since = client.time().await?;
        let mut events = pin!(client.events(since));
        let mut meanwhile = Vec::new();
        let mut first = pin!(async { tokio::try_join!(client.bridges(), client.list()) });
        let (bridges, running) = loop {
            tokio::select! {
                biased; // the subscription goes out first
                event = events.next() => meanwhile.push(client.event(event)?),
                answer = &mut first => break answer?,
            }
        };
        containers.bridges(bridges);
        let mut tickets = containers.relist(running);
        tickets.extend(meanwhile.iter().filter_map(|event| apply(containers, event)));

        // No answer is waited for elsewhere than in the loop: an event is applied when it comes.
        let (mut inspections, mut networks) = (FuturesUnordered::new(), FuturesUnordered::new());
        let (mut looks, mut pings) = (FuturesUnordered::new(), FuturesUnordered::new());
        let mut new_network = meanwhile.iter().any(is_new_network);
        let ended = processes.ended();
        let mut next_look = Instant::now();
        let mut ping = interval(PING);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if containers.is_complete() {
                publish.publish(containers.listing());
            }
            while inspections.len() < INSPECTIONS
                && let Some(ticket) = tickets.pop_front()
            {
                inspections.push(client.inspect(ticket));
            }
            // One at a time, so that the last answer is the newest.
            if new_network && networks.is_empty() {
                new_network = false;
                networks.push(client.bridges());
            }
            tokio::select! {
                event = events.next() => {
                    let event = client.event(event)?;
                    new_network |= is_new_network(&event);
                    tickets.extend(apply(containers, &event));
                }
                // Its address is not its any more: that is published before the engine's word comes.
                () = ended.notified() => {}
                () = lookup.asked(next_look), if looks.is_empty() => looks.push(client.list()),
                _ = ping.tick(), if pings.is_empty() => pings.push(client.ping()),
                Some(answer) = inspections.next() => {
                    let (ticket, found) = answer?;
                    let id = ticket.id.clone();
                    if let Some(run) = containers.inspected(ticket, found) {
                        processes.watch(&id, run.pid, &run.end, publish.bell());
                    }
                }
                Some(bridges) = networks.next() => containers.bridges(bridges?),
                Some(running) = looks.next() => {
                    next_look = Instant::now() + Lookup::PAUSE;
                    tickets.extend(containers.unknown(running?));
                }
                Some(alive) = pings.next() => alive?,
            }
        }
    }
}

/// The engine, for one session.
struct Client<'a> {
    docker: Docker,
    engine: &'a Engine,
    prefix: &'a str,
}

impl<'a> Client<'a> {
    async fn connect(engine: &'a Engine, prefix: &'a str) -> Result<Self, SourceError> {
        let docker = engine.connect().await;
        let docker = docker.map_err(|error| {
            SourceError::caused(format_args!("the version of {engine}"), &error)
        })?;
        Ok(Self { docker, engine, prefix })
    }

    /// The engine's own clock, as [`Client::events`] takes it.
    async fn time(&self) -> Result<String, SourceError> {
        let info = self.docker.info().await.map_err(|e| self.failed("the time", &e))?;
        let text = info.system_time.unwrap_or_default();
        let wrong = || self.error("the time", format_args!("{text:?}: expected RFC 3339"));
        since(&text).ok_or_else(wrong)
    }

    fn events(&self, since: String) -> impl Stream<Item = Result<EventMessage, Error>> + use<> {
        let words = |words: &[&str]| words.iter().map(ToString::to_string).collect();
        let actions = ["start", "rename", "die", "destroy", "create", "connect", "disconnect"];
        let filters = HashMap::from([
            ("type".to_owned(), words(&["container", "network"])),
            ("event".to_owned(), words(&actions)),
        ]);
        let since = Some(since);
        self.docker.events(Some(EventsOptions { since, until: None, filters: Some(filters) }))
    }

    fn event(
        &self,
        next: Option<Result<EventMessage, Error>>,
    ) -> Result<EventMessage, SourceError> {
        let event = next.ok_or_else(|| self.error("the events", "ended"))?;
        event.map_err(|e| self.failed("the events", &e))
    }

    async fn bridges(&self) -> Result<HashMap<NetworkId, Vec<IpNet>>, SourceError> {
        let networks = self.docker.list_networks(None).await;
        let networks = networks.map_err(|e| self.failed("the networks", &e))?;
        Ok(bridges(networks))
    }

    /// The running containers.
    async fn list(&self) -> Result<Vec<ContainerId>, SourceError> {
        let running = self.docker.list_containers(None::<ListContainersOptions>).await;
        let running = running.map_err(|e| self.failed("the containers", &e))?;
        Ok(ids(&running))
    }

    async fn inspect(&self, ticket: Ticket) -> Result<(Ticket, Found), SourceError> {
        let found = match self.docker.inspect_container(ticket.id.as_str(), None).await {
            Ok(answer) => inspect::found(&answer, self.prefix),
            Err(Error::DockerResponseServerError { status_code: 404, .. }) => Found::NotRunning,
            // An engine can be stuck with one container, and serve all others.
            Err(
                error @ (Error::DockerResponseServerError { .. }
                | Error::JsonDataError { .. }
                | Error::RequestTimeoutError),
            ) => {
                warn!(id = %ticket.id, %error, "the engine cannot say how this container is");
                Found::Unknown
            }
            Err(error) => return Err(self.failed(&format!("container {}", ticket.id), &error)),
        };
        Ok((ticket, found))
    }

    async fn ping(&self) -> Result<(), SourceError> {
        let answer = timeout(PING, self.docker.ping()).await;
        let answer = answer.map_err(|_| self.error("a ping", "no answer"))?;
        answer.map(drop).map_err(|e| self.failed("a ping", &e))
    }

    fn failed(&self, what: &str, error: &Error) -> SourceError {
        SourceError::caused(format_args!("{what} of {}", self.engine), error)
    }

    fn error(&self, what: &str, reason: impl fmt::Display) -> SourceError {
        SourceError::new(format_args!("{what} of {}: {reason}", self.engine))
    }
}

/// The address ranges of bridge networks.
fn bridges(networks: Vec<Network>) -> HashMap<NetworkId, Vec<IpNet>> {
    let bridges = networks.into_iter().filter(|n| n.driver.as_deref() == Some("bridge"));
    let with_ranges = bridges.filter_map(|network| {
        let ranges = network.ipam.and_then(|ipam| ipam.config).unwrap_or_default();
        let ranges = ranges.iter().filter_map(|range| range.subnet.as_deref()?.parse().ok());
        Some((network.id?.into(), ranges.collect()))
    });
    with_ranges.collect()
}

fn ids(containers: &[ContainerSummary]) -> Vec<ContainerId> {
    containers.iter().filter_map(|c| Some(ContainerId::new(c.id.as_deref()?))).collect()
}

/// A moment in the form in which the events' `since` takes it.
fn since(rfc3339: &str) -> Option<String> {
    let time = OffsetDateTime::parse(rfc3339, &Rfc3339).ok()?;
    Some(format!("{}.{:09}", time.unix_timestamp(), time.nanosecond()))
}

fn is_new_network(event: &EventMessage) -> bool {
    event.typ == Some(EventMessageTypeEnum::NETWORK) && event.action.as_deref() == Some("create")
}

/// Applies an event. The container to inspect, where the event does not say everything.
fn apply(containers: &mut Containers, event: &EventMessage) -> Option<Ticket> {
    let actor = event.actor.as_ref()?;
    let subject = actor.id.as_deref()?;
    let attribute = |name: &str| actor.attributes.as_ref()?.get(name).map(String::as_str);
    match (event.typ?, event.action.as_deref()?) {
        // An end is always told before the start that follows it, so what is known here at a start is of this very run.
        (EventMessageTypeEnum::CONTAINER, "start" | "rename") => {
            Some(containers.inspect(ContainerId::new(subject)))
        }
        (EventMessageTypeEnum::CONTAINER, "die") => {
            Some(containers.ended(ContainerId::new(subject)))
        }
        (EventMessageTypeEnum::CONTAINER, "destroy") => {
            containers.destroyed(&ContainerId::new(subject));
            None
        }
        (EventMessageTypeEnum::NETWORK, "connect") => {
            Some(containers.inspect(ContainerId::new(attribute("container")?)))
        }
        (EventMessageTypeEnum::NETWORK, "disconnect") => {
            Some(containers.disconnected(ContainerId::new(attribute("container")?), subject))
        }
        _ => None,
    }
}

/// Reads each line of `input` as the inspection of a container, as an event, as a list and as a moment.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(input: &[u8]) {
    let mut containers = Containers::default();
    for line in input.split(|byte| *byte == b'\n') {
        let mut tickets = Vec::new();
        if let Ok(event) = serde_json::from_slice::<EventMessage>(line) {
            is_new_network(&event);
            tickets.extend(apply(&mut containers, &event));
        }
        if let Ok(list) = serde_json::from_slice::<Vec<ContainerSummary>>(line) {
            tickets.extend(containers.relist(ids(&list)));
        }
        if let Ok(networks) = serde_json::from_slice::<Vec<Network>>(line) {
            containers.bridges(bridges(networks));
        }
        if let Ok(answer) = serde_json::from_slice(line) {
            let found = inspect::found(&answer, "BACKEND_");
            let id = answer.id.as_deref().map(ContainerId::new);
            tickets.extend(id.map(|id| containers.inspect(id)));
            for ticket in tickets {
                containers.inspected(ticket, found.clone());
            }
        }
        if let Ok(info) = serde_json::from_slice::<bollard::models::SystemInfo>(line) {
            since(&info.system_time.unwrap_or_default());
        }
        containers.listing();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engines_time_is_said_in_seconds_whatever_its_zone() {
        let utc = since("2026-01-02T03:04:05.000000678Z");
        assert_eq!(utc.as_deref(), Some("1767323045.000000678"));
        assert_eq!(since("2026-01-02T05:04:05.000000678+02:00"), utc);
        assert_eq!(since("yesterday"), None);
    }

    /// What follows from each event, in a word.
    fn effects(file: &str) -> Vec<&'static str> {
        let mut file: serde_json::Value = serde_json::from_str(file).unwrap();
        let events: Vec<EventMessage> = serde_json::from_value(file["events"].take()).unwrap();
        let mut containers = Containers::default();
        let effect = |event: &EventMessage| match apply(&mut containers, event) {
            Some(ticket) if ticket.id.to_string() == "e3219c8d7aa9" => "inspect",
            Some(_) => "inspect another",
            None => "",
        };
        events.iter().map(effect).collect()
    }

    #[test]
    fn events_of_engines_from_20_10_to_29_have_the_same_effect() {
        let old = effects(include_str!("fixtures/events-20.10.json"));
        assert_eq!(old, effects(include_str!("fixtures/events-29.json")));
        // Two networks and the start; a network left, told twice; a kill, and the end; the last network left; destroyed.
        let expected = ["inspect"; 5].into_iter().chain(["", "inspect", "inspect", ""]);
        assert_eq!(old, expected.collect::<Vec<_>>());
    }
}
