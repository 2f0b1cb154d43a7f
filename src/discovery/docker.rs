//! `docker://`: the containers of an engine are the registry.
//!
//! Read as [registrator](https://gliderlabs.github.io/registrator/latest/user/services/) reads them, from the
//! environment and the labels of a running container (a label wins):
//!
//! | name | meaning |
//! |---|---|
//! | `SERVICE_NAME` | the service on its one exposed port; with several ports, `<name>-<port>` on each |
//! | `SERVICE_<port>_NAME` | the service on that port of the container, exposed or not |
//! | `SERVICE_TAGS`, `SERVICE_<port>_TAGS` | tags, comma separated; `\,` is a comma |
//! | `SERVICE_IGNORE`, `SERVICE_<port>_IGNORE` | with any value: not a service |
//!
//! Unlike with registrator, a container without a name of these is not a service: its image's name makes it none.
//!
//! Where the endpoint is, depends on the engine. The containers of an engine on this host (the consumers' own, or one
//! behind a Unix socket) are reached at their address on the first of their networks by name, and need to publish
//! nothing; those on the host's network at 127.0.0.1. The containers of any other engine are reached at the host of
//! its URI, on the ports they publish. `--network=container:<other>` is followed.
//!
//! A paused container is no endpoint; with `-filter` neither is one whose HEALTHCHECK does not pass (yet).

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    pin::pin,
    sync::Arc,
    time::Duration,
};

use bollard::models::{EventMessage, EventMessageTypeEnum};
use futures_util::{FutureExt, StreamExt, stream::FuturesUnordered};
use tokio::{
    sync::Notify,
    time::{MissedTickBehavior, interval, timeout},
};

use self::offers::{Container, Containers, Offer, Place, offers, select};
use crate::{
    discovery::{Endpoints, Query},
    docker::{
        Address, Engine,
        client::{Client, Inspected, Listed, PING},
        process::Processes,
    },
    model::ContainerId,
    source::{Publisher, Resync, ResyncRequests, Shared, Source, SourceError},
};

mod offers;

#[cfg(test)]
mod sessions;
#[cfg(test)]
mod tests;

/// The services of one engine's containers. However many queries there are, the engine is asked once.
#[derive(Debug, Clone)]
pub struct Docker {
    pub(super) engine: Engine,
    healthy_only: bool,
    /// The engine is the one whose containers are the consumers.
    own: bool,
    offers: Shared<Vec<Offer>>,
}

impl Docker {
    /// `own`: the engine is the one whose containers are the consumers, so that their addresses can be reached.
    pub fn new(engine: Engine, healthy_only: bool, own: bool) -> Self {
        Self { engine, healthy_only, own, offers: Shared::default() }
    }

    /// Whether its containers are on this host, at their own addresses.
    pub fn is_here(&self) -> bool {
        self.own || matches!(self.engine.address, Address::Unix(_))
    }

    /// Follows what `query` asks for, for ever.
    pub async fn watch(self, query: Query, publish: Publisher<Endpoints>, resync: &ResyncRequests) {
        let name = format!("docker discovery {}", self.engine);
        let services = || Services::new(self.engine.clone(), self.own, publish.bell());
        let answer = |offers: &Vec<Offer>| select(offers, &query, self.healthy_only);
        self.offers.derive(&name, services, resync, &publish, answer).await;
    }
}

/// The source of what all containers offer.
struct Services {
    engine: Engine,
    own: bool,
    /// Rung when a container ends, whether the engine can be reached or not.
    bell: Arc<Notify>,
    /// They outlive a session: an engine that cannot say how one container is does not make us forget it.
    containers: Containers,
    processes: Processes,
    looks: Looks,
    /// Those of the last list that were not looked at yet, and whether there were none at any time.
    unseen: BTreeSet<ContainerId>,
    complete: bool,
}

/// What may change what a container offers.
const ACTIONS: [&str; 9] = [
    "start",
    "die",
    "destroy",
    "pause",
    "unpause",
    "rename",
    "health_status",
    "connect",
    "disconnect",
];

impl Source for Services {
    type Item = Vec<Offer>;

    async fn session(
        &mut self,
        publish: &Publisher<Vec<Offer>>,
        resync: &mut Resync,
    ) -> Result<(), SourceError> {
        tokio::select! {
            end = self.session_until_failure(publish) => end,
            () = resync.due() => Ok(()),
        }
    }
}

impl Services {
    async fn session_until_failure(
        &mut self,
        publish: &Publisher<Vec<Offer>>,
    ) -> Result<(), SourceError> {
        let place = self.place().await?;
        let engine = self.engine.clone();
        let client = Client::connect(&engine).await?;
        // As the provider does it: the subscription goes out first, and is read beside the listing.
        let since = client.time().await?;
        let mut events = pin!(client.events(since, &ACTIONS));
        let mut meanwhile = Vec::new();
        let mut list = pin!(client.list());
        let running = loop {
            tokio::select! {
                biased;
                event = events.next() => meanwhile.push(client.event(event)?),
                listed = &mut list => break listed?,
            }
        };
        self.relist(running);
        meanwhile.into_iter().for_each(|event| self.heard(event));

        let (mut answers, mut pings) = (FuturesUnordered::new(), FuturesUnordered::new());
        let ended = self.processes.ended();
        let mut ping = interval(PING);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.complete |= self.unseen.is_empty();
            if self.complete {
                publish.publish(offers(&self.containers, place));
            }
            while let Some(id) = self.looks.next() {
                let client = &client;
                answers.push(async move { (client.inspect(id.as_str()).await, id) });
            }
            tokio::select! {
                event = events.next() => {
                    // What else has arrived costs one inspection per container, not per event.
                    let mut next = Some(event);
                    while let Some(event) = next {
                        self.heard(client.event(event)?);
                        next = events.next().now_or_never();
                    }
                }
                // It is no endpoint any more, whatever the engine says and when.
                () = ended.notified() => {}
                Some((answer, id)) = answers.next() => self.looked_at(id, answer?, place),
                _ = ping.tick(), if pings.is_empty() => {
                    pings.push(client.ping());
                    self.looks.try_again();
                    self.watch(place);
                }
                Some(alive) = pings.next() => alive?,
            }
        }
    }
}

impl Services {
    /// What the look-up of a name may take.
    const LOOKUP: Duration = Duration::from_secs(10);

    fn new(engine: Engine, own: bool, bell: Arc<Notify>) -> Self {
        Self {
            engine,
            own,
            bell,
            containers: Containers::new(),
            processes: Processes::default(),
            looks: Looks::default(),
            unseen: BTreeSet::new(),
            complete: false,
        }
    }

    /// The containers that run. Each is as it was known until it was looked at, if it is where it was.
    fn relist(&mut self, list: Vec<Listed>) {
        let listed: BTreeMap<_, _> = list.into_iter().map(|one| (one.id, one.addresses)).collect();
        self.containers.retain(|id, container| {
            let is_at = |addresses: &Option<_>| match addresses {
                Some(addresses) => container.is_at(addresses),
                None => true,
            };
            let stays = listed.get(id).is_some_and(is_at);
            if !stays {
                container.left.mark_ended();
            }
            stays
        });
        self.unseen = listed.keys().cloned().collect();
        self.looks = Looks { listed: listed.into_keys().collect(), ..Looks::default() };
    }

    fn heard(&mut self, event: EventMessage) {
        let (ended, left) = (is_end(&event), has_left(&event));
        let Some(id) = subject(event) else { return };
        // From now on it is no endpoint, however long it takes to look at it; where it left one of its networks, it comes
        // back with the addresses that it has still.
        if (ended || left)
            && let Some(container) = self.containers.remove(&id)
        {
            container.left.mark_ended();
        }
        if ended {
            self.unseen.remove(&id);
        }
        self.looks.ask(id);
    }

    fn looked_at(&mut self, id: ContainerId, answer: Inspected, place: Place) {
        if !self.looks.have(&id) {
            return;
        }
        self.unseen.remove(&id);
        let found = match answer {
            Inspected::Found(answer) => Container::new(*answer),
            Inspected::Gone => None,
            Inspected::Unknown => {
                self.looks.failed.insert(id);
                return;
            }
        };
        let before = self.containers.remove(&id);
        match (found, before) {
            (Some(mut container), before) => {
                if let Some(before) = before {
                    container.follows(&before);
                }
                self.watch_one(&id, &container, place);
                self.containers.insert(id, container);
            }
            (None, Some(before)) => before.left.mark_ended(),
            (None, None) => {}
        }
    }

    /// Those whose process is not watched yet.
    fn watch(&mut self, place: Place) {
        let containers = std::mem::take(&mut self.containers);
        for (id, container) in &containers {
            self.watch_one(id, container, place);
        }
        self.containers = containers;
    }

    fn watch_one(&mut self, id: &ContainerId, container: &Container, place: Place) {
        // Elsewhere, the number is of a process there.
        if place == Place::Here && container.pid > 0 {
            self.processes.watch(id, container.pid, &container.end, self.bell.clone());
        }
    }

    /// How the containers are reached from here.
    async fn place(&self) -> Result<Place, SourceError> {
        let host = match &self.engine.address {
            Address::Tcp(host) if !self.own => host,
            Address::Tcp(_) | Address::Unix(_) => return Ok(Place::Here),
        };
        let name = host.rsplit_once(':').map_or(host.as_str(), |(name, _port)| name);
        if let Ok(address) = name.trim_matches(['[', ']']).parse::<IpAddr>() {
            return Ok(Place::There(address));
        }
        let found: Vec<_> =
            self.ask("look up the host", tokio::net::lookup_host((name, 0))).await?.collect();
        // IPv4 where there is a choice: what is published at all is published there.
        let address = found.iter().find(|found| found.is_ipv4()).or(found.first());
        let address = address.ok_or_else(|| self.error("look up the host", "it has no address"))?;
        Ok(Place::There(address.ip()))
    }

    async fn ask<T, E: std::error::Error + 'static>(
        &self,
        what: &str,
        request: impl Future<Output = Result<T, E>>,
    ) -> Result<T, SourceError> {
        match timeout(Self::LOOKUP, request).await {
            Ok(answer) => answer.map_err(|error| {
                SourceError::caused(format_args!("{what} of {}", self.engine), &error)
            }),
            Err(_) => {
                let seconds = Self::LOOKUP.as_secs();
                Err(self.error(what, format_args!("no answer within {seconds} s")))
            }
        }
    }

    fn error(&self, what: &str, reason: impl fmt::Display) -> SourceError {
        SourceError::new(format_args!("{what} of {}: {reason}", self.engine))
    }
}

/// Which containers are to be looked at: each by one request at a time, those first that something happened to.
#[derive(Debug, Default)]
struct Looks {
    listed: BTreeSet<ContainerId>,
    urgent: BTreeSet<ContainerId>,
    /// Those that are being looked at, and whether something happened to them meanwhile.
    under_way: BTreeMap<ContainerId, bool>,
    /// Those of which the engine could not say how they are.
    failed: BTreeSet<ContainerId>,
}

impl Looks {
    /// At a time, while many containers are listed, and at all.
    const LISTED: usize = 8;
    const AT_ALL: usize = 16;

    fn ask(&mut self, id: ContainerId) {
        match self.under_way.get_mut(&id) {
            Some(again) => *again = true,
            None => {
                self.listed.remove(&id);
                self.urgent.insert(id);
            }
        }
    }

    /// One that is to be looked at now.
    fn next(&mut self) -> Option<ContainerId> {
        let urgent = self.under_way.len() < Self::AT_ALL;
        let listed = self.under_way.len() < Self::LISTED;
        let id = urgent.then(|| self.urgent.pop_first()).flatten();
        let id = id.or_else(|| listed.then(|| self.listed.pop_first()).flatten())?;
        self.under_way.insert(id.clone(), false);
        Some(id)
    }

    fn try_again(&mut self) {
        let failed = std::mem::take(&mut self.failed);
        self.listed.extend(failed.into_iter().filter(|id| !self.under_way.contains_key(id)));
    }

    /// One was looked at. Whether what was seen is as it is, as far as is known.
    fn have(&mut self, id: &ContainerId) -> bool {
        let again = self.under_way.remove(id).unwrap_or_default();
        if again {
            self.urgent.insert(id.clone());
        }
        !again
    }
}

/// Whether the event tells of a container's end.
fn is_end(event: &EventMessage) -> bool {
    event.typ == Some(EventMessageTypeEnum::CONTAINER)
        && matches!(event.action.as_deref(), Some("die" | "destroy"))
}

/// Whether a container has left a network: the address that it had there may be another's.
fn has_left(event: &EventMessage) -> bool {
    event.typ == Some(EventMessageTypeEnum::NETWORK)
        && event.action.as_deref() == Some("disconnect")
}

/// The ID of the container that an event is about.
fn subject(event: EventMessage) -> Option<ContainerId> {
    let actor = event.actor?;
    let id = match event.typ? {
        EventMessageTypeEnum::CONTAINER => actor.id,
        EventMessageTypeEnum::NETWORK => actor.attributes?.remove("container"),
        _ => None,
    };
    id.map(|id| ContainerId::new(&id))
}

/// Reads each line of `input` as an event, and as the inspection of a container.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(input: &[u8]) {
    let mut containers = Containers::default();
    for (n, line) in input.split(|byte| *byte == b'\n').enumerate() {
        if let Ok(event) = serde_json::from_slice::<EventMessage>(line) {
            is_end(&event);
            subject(event);
        }
        if let Some(container) = serde_json::from_slice(line).ok().and_then(Container::new) {
            containers.insert(ContainerId::new(&n.to_string()), container);
        }
    }
    let addresses = ["10.0.0.1", "fd00::1"].map(|text| text.parse().map(Place::There));
    for place in addresses.into_iter().flatten().chain([Place::Here]) {
        offers(&containers, place);
    }
}
