//! The docker provider: a container's environment and labels say what it asks for.

use std::{
    collections::{HashMap, VecDeque},
    pin::pin,
};

use bollard::models::{EventMessage, EventMessageTypeEnum, Network};
use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::warn;

use self::containers::{Bridge, Containers, Found, NetworkId, Ticket};
use super::{Listing, Lookup};
use crate::{
    docker::{
        Address, Engine,
        client::{self, Inspected, PING},
        process::Processes,
    },
    model::ContainerId,
    source::{Publisher, Resync, Source, SourceError},
};

mod containers;
mod inspect;
#[cfg(test)]
mod interleavings;
mod resume;
#[cfg(test)]
mod sessions;

pub use resume::{resume, resume_stay};

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
    /// Whether it was said that no process can be seen.
    said: bool,
}

/// Inspections under way at once, of containers that were listed; and of all, with those that an event or a dial asks for:
/// they do not wait for a long list.
const INSPECTIONS: usize = 8;
const INSPECTIONS_AT_ALL: usize = 16;
/// What is told of containers and networks.
const ACTIONS: [&str; 7] = ["start", "rename", "die", "destroy", "create", "connect", "disconnect"];

impl DockerProvider {
    pub fn new(engine: Engine, prefix: String, lookup: Lookup) -> Self {
        let (containers, processes) = (Containers::default(), Processes::default());
        Self { engine, prefix, lookup, containers, processes, said: false }
    }
}

impl Source for DockerProvider {
    type Item = Listing;

    async fn session(
        &mut self,
        publish: &Publisher<Listing>,
        resync: &mut Resync,
    ) -> Result<(), SourceError> {
        tokio::select! {
            end = self.session_until_failure(publish) => end,
            () = resync.due() => Ok(()),
        }
    }
}

impl DockerProvider {
    async fn session_until_failure(
        &mut self,
        publish: &Publisher<Listing>,
    ) -> Result<(), SourceError> {
        let Self { engine, prefix, lookup, containers, processes, said } = self;
        let client = Client::connect(engine, prefix).await?;
        // The stream opens when it is first read. An engine replays a few of the events since this moment, and no more:
        // so it is read beside the listing, however long that takes.
        let since = client.engine.time().await?;
        let mut events = pin!(client.engine.events(since, &ACTIONS));
        let mut meanwhile = Vec::new();
        let mut first = pin!(async { tokio::try_join!(client.bridges(), client.engine.list()) });
        let (bridges, running) = loop {
            tokio::select! {
                biased; // the subscription goes out first
                event = events.next() => meanwhile.push(client.engine.event(event)?),
                answer = &mut first => break answer?,
            }
        };
        containers.bridges(bridges);
        let mut listed = containers.relist(running);
        let mut urgent: VecDeque<_> =
            meanwhile.iter().filter_map(|event| apply(containers, event)).collect();

        // No answer is waited for elsewhere than in the loop: an event is applied when it comes.
        let (mut inspections, mut networks) = (FuturesUnordered::new(), FuturesUnordered::new());
        let (mut looks, mut pings) = (FuturesUnordered::new(), FuturesUnordered::new());
        let mut networks_changed = meanwhile.iter().any(changes_networks);
        let ended = processes.ended();
        let mut failed = Vec::new();
        let mut next_look = Instant::now();
        let mut ping = interval(PING);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if containers.is_complete() {
                publish.publish(containers.listing());
            }
            while inspections.len() < INSPECTIONS_AT_ALL
                && let Some(ticket) = urgent.pop_front()
            {
                inspections.push(client.inspect(ticket));
            }
            while inspections.len() < INSPECTIONS
                && let Some(ticket) = listed.pop_front()
            {
                inspections.push(client.inspect(ticket));
            }
            // One at a time, so that the last answer is the newest.
            if networks_changed && networks.is_empty() {
                networks_changed = false;
                networks.push(client.bridges());
            }
            tokio::select! {
                event = events.next() => {
                    let event = client.engine.event(event)?;
                    networks_changed |= changes_networks(&event);
                    urgent.extend(apply(containers, &event));
                }
                // Its address is not its any more: that is published before the engine's word comes.
                () = ended.notified() => {}
                () = lookup.asked(next_look), if looks.is_empty() => looks.push(client.engine.list()),
                _ = ping.tick(), if pings.is_empty() => {
                    pings.push(client.engine.ping());
                    listed.extend(containers.again(failed.drain(..)));
                    for (id, run) in containers.unwatched() {
                        processes.watch(id, run.pid, &run.end, publish.bell());
                    }
                    let unseen = !processes.are_seen() && containers.unwatched().next().is_some();
                    if unseen && !*said && matches!(engine.address, Address::Unix(_)) {
                        *said = true;
                        warn!("the containers' processes cannot be seen from here: their ends are known by Docker's events alone, and no container is taken over from the last run; in a container, run embassy with --pid=host");
                    }
                }
                Some(answer) = inspections.next() => {
                    let (ticket, found) = answer?;
                    let id = ticket.id.clone();
                    if found == Found::Unknown {
                        failed.push(id.clone());
                    }
                    if let Some(run) = containers.inspected(ticket, found) {
                        processes.watch(&id, run.pid, &run.end, publish.bell());
                    }
                }
                Some(bridges) = networks.next() => containers.bridges(bridges?),
                Some(running) = looks.next() => {
                    next_look = Instant::now() + Lookup::PAUSE;
                    urgent.extend(containers.unknown(running?.into_iter().map(|one| one.id)));
                }
                Some(alive) = pings.next() => alive?,
            }
        }
    }
}

/// The engine, for one session.
struct Client<'a> {
    engine: client::Client<'a>,
    prefix: &'a str,
}

impl<'a> Client<'a> {
    async fn connect(engine: &'a Engine, prefix: &'a str) -> Result<Self, SourceError> {
        Ok(Self { engine: client::Client::connect(engine).await?, prefix })
    }

    async fn bridges(&self) -> Result<HashMap<NetworkId, Bridge>, SourceError> {
        let networks = self.engine.docker.list_networks(None);
        Ok(bridges(self.engine.ask("the networks", networks).await?))
    }

    async fn inspect(&self, ticket: Ticket) -> Result<(Ticket, Found), SourceError> {
        let found = match self.engine.inspect(ticket.id.as_str()).await? {
            Inspected::Found(answer) => inspect::found(&answer, self.prefix),
            Inspected::Gone => Found::NotRunning,
            Inspected::Unknown => Found::Unknown,
        };
        Ok((ticket, found))
    }
}

/// The networks whose gateways are on the engine's host.
fn bridges(networks: Vec<Network>) -> HashMap<NetworkId, Bridge> {
    let bridges = networks.into_iter().filter(|n| n.driver.as_deref() == Some("bridge"));
    let described = bridges.filter_map(|network| {
        let ranges = network.ipam.and_then(|ipam| ipam.config).unwrap_or_default();
        let ranges = ranges.iter().filter_map(|range| range.subnet.as_deref()?.parse().ok());
        let id = network.id?;
        let named = network.options.and_then(|mut o| o.remove("com.docker.network.bridge.name"));
        // Named so by the engine's own driver, where nobody chose another name.
        let interface = named.or_else(|| Some(format!("br-{}", id.get(..12)?))).unwrap_or_default();
        Some((id.into(), Bridge { ranges: ranges.collect(), interface: interface.into() }))
    });
    described.collect()
}

fn changes_networks(event: &EventMessage) -> bool {
    event.typ == Some(EventMessageTypeEnum::NETWORK)
        && matches!(event.action.as_deref(), Some("create" | "destroy"))
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
            changes_networks(&event);
            tickets.extend(apply(&mut containers, &event));
        }
        if let Ok(list) = serde_json::from_slice::<Vec<bollard::models::ContainerSummary>>(line) {
            tickets.extend(containers.relist(client::listed(list)));
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
            client::since(&info.system_time.unwrap_or_default());
        }
        containers.listing();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
