//! The one source that follows an engine; bindings and services are derived from it.

use std::{pin::pin, sync::Arc, time::Duration};

use futures_util::{FutureExt, StreamExt, stream::FuturesUnordered};
use tokio::{
    sync::Notify,
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};
use tracing::warn;

use super::{
    Address, Engine,
    client::{Client, PING},
    container::Inventory,
    containers::Containers,
    obstacle,
    process::Processes,
    read,
};
use crate::source::{Publisher, Resync, ResyncRequests, Shared, Source, SourceError, follow};

/// Follows an engine for all its readers: the first one starts it, and the last one ends it. It sends only GET requests
/// and changes nothing. Clones share it.
#[derive(Debug, Clone)]
pub struct Follower {
    /// Its name in the log.
    name: Arc<str>,
    engine: Arc<Engine>,
    /// Prefixes of the variables and labels that readers need.
    prefixes: Arc<[String]>,
    lookup: Lookup,
    inventory: Shared<Inventory>,
}

impl Follower {
    pub fn new(name: &str, engine: Engine, prefixes: Vec<String>, lookup: Lookup) -> Self {
        Self {
            name: name.into(),
            engine: engine.into(),
            prefixes: prefixes.into(),
            lookup,
            inventory: Shared::default(),
        }
    }

    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Publishes for ever what `answer` makes of what the engine has, and passes failures on. The `bell` of the first who
    /// asks is rung when a container's process ends, whether the engine can be reached or not.
    pub async fn derive<U: PartialEq>(
        &self,
        resync: &ResyncRequests,
        bell: Arc<Notify>,
        publish: &Publisher<U>,
        answer: impl FnMut(&Inventory) -> U,
    ) {
        let (follower, resync) = (self.clone(), resync.subscribe());
        let start = |publish| async move {
            let source = EngineSource {
                engine: follower.engine,
                prefixes: follower.prefixes,
                lookup: follower.lookup,
                bell,
                containers: Containers::default(),
                processes: Processes::default(),
                said: false,
            };
            follow(&follower.name, source, publish, resync).await;
        };
        self.inventory.derive(start, publish, answer).await;
    }
}

/// Asks a follower to look for unknown containers, after a connection from an unknown address. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Lookup(Arc<Notify>);

impl Lookup {
    /// Minimum interval between two looks, so that repeated connections from unknown addresses do not load the engine.
    const PAUSE: Duration = Duration::from_millis(50);

    /// Requests a look. Several requests before it are one.
    pub fn ask(&self) {
        self.0.notify_one();
    }

    /// Waits for a request, at least until `next_look`.
    async fn asked(&self, next_look: Instant) {
        sleep_until(next_look).await;
        self.0.notified().await;
    }
}

/// The source behind a [`Follower`]. What it knows outlives a session: an engine that cannot say how one container is does
/// not make us forget it.
struct EngineSource {
    engine: Arc<Engine>,
    prefixes: Arc<[String]>,
    lookup: Lookup,
    bell: Arc<Notify>,
    containers: Containers,
    processes: Processes,
    /// Whether the log message that processes are not visible was written.
    said: bool,
}

impl Source for EngineSource {
    type Item = Inventory;

    async fn session(
        &mut self,
        publish: &Publisher<Inventory>,
        resync: &mut Resync,
    ) -> Result<(), SourceError> {
        let (engine, prefixes, lookup) =
            (self.engine.clone(), self.prefixes.clone(), self.lookup.clone());
        let client =
            Client::connect(&engine).await.map_err(|error| match obstacle::of(&engine) {
                Some(obstacle) => SourceError::new(format_args!("{engine}: {obstacle}")),
                None => error,
            })?;
        // The stream opens when it is first read. An engine replays a few of the events since this moment, and no more:
        // so it is read beside the listing, however long that takes.
        let since = client.time().await?;
        let mut events = pin!(client.events(since, &read::ACTIONS));
        let mut heard = events.next().now_or_never();
        self.containers.begin();

        // No answer is waited for elsewhere than in the loop: an event is applied when it comes.
        let (mut overviews, mut networks) = (FuturesUnordered::new(), FuturesUnordered::new());
        let (mut inspections, mut looks) = (FuturesUnordered::new(), FuturesUnordered::new());
        let mut pings = FuturesUnordered::new();
        overviews.push(client.overview());
        let mut is_published = false;
        let ended = self.processes.ended();
        let mut next_look = Instant::now();
        let mut ping = interval(PING);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            // What has arrived together costs one inspection of each container, not of each event.
            while let Some(event) = heard.take() {
                if let Some(notice) = read::notice(&client.event(event)?) {
                    self.containers.hear(notice);
                }
                heard = events.next().now_or_never();
            }
            if self.containers.is_complete() {
                if self.containers.take_change() || !is_published {
                    publish.publish(self.containers.inventory());
                }
                is_published = true;
            }
            while let Some(ticket) = self.containers.next() {
                inspections.push(client.inspect(ticket, &prefixes));
            }
            // One at a time, so that the last answer is the newest.
            let none_is_asked_for = networks.is_empty() && overviews.is_empty();
            if none_is_asked_for && self.containers.take_networks_change() {
                networks.push(client.bridges());
            }
            tokio::select! {
                event = events.next() => heard = Some(event),
                // Its address is not its any more: that is published before the engine's word comes.
                () = ended.notified() => self.containers.run_has_ended(),
                () = resync.due(), if overviews.is_empty() && networks.is_empty() => {
                    self.containers.list_again();
                    overviews.push(client.overview());
                }
                () = lookup.asked(next_look), if looks.is_empty() => looks.push(client.list()),
                _ = ping.tick(), if pings.is_empty() => {
                    pings.push(client.ping());
                    self.containers.retry();
                    self.watch();
                }
                Some(answer) = inspections.next() => {
                    let (ticket, found) = answer?;
                    if let Some(new) = self.containers.inspected(ticket, found) {
                        self.processes.watch(&new.id, new.pid, &new.run, self.bell.clone());
                    }
                }
                Some(bridges) = networks.next() => self.containers.bridges(bridges?),
                Some(overview) = overviews.next() => {
                    let (bridges, list, host) = overview?;
                    self.containers.bridges(bridges);
                    self.containers.host(host);
                    self.containers.relist(list);
                }
                Some(running) = looks.next() => {
                    next_look = Instant::now() + Lookup::PAUSE;
                    self.containers.look_for(running?.into_iter().map(|one| one.id));
                }
                Some(alive) = pings.next() => {
                    alive?;
                    if is_published {
                        publish.confirm();
                    }
                }
            }
        }
    }
}

impl EngineSource {
    /// Watches the processes that could not be watched so far.
    fn watch(&mut self) {
        for one in self.containers.unwatched() {
            self.processes.watch(&one.id, one.pid, &one.run, self.bell.clone());
        }
        let unseen = !self.processes.are_seen() && self.containers.unwatched().next().is_some();
        if unseen && !self.said && matches!(self.engine.address, Address::Unix(_)) {
            self.said = true;
            warn!(
                "cannot see the processes of containers; relying on Docker events, and using no saved containers (in a container, run embassy with --pid=host)"
            );
        }
    }
}

/// Reads each line of `input` as the inspection of a container, as an event, as a list and as a moment.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(input: &[u8], mut derive: impl FnMut(Inventory)) {
    use crate::model::ContainerId;

    let (mut containers, prefixes) = (Containers::default(), [String::new()]);
    for line in input.split(|byte| *byte == b'\n') {
        if let Ok(event) = serde_json::from_slice(line)
            && let Some(notice) = read::notice(&event)
        {
            containers.hear(notice);
        }
        if let Ok(list) = serde_json::from_slice::<Vec<bollard::models::ContainerSummary>>(line) {
            containers.relist(read::listed(list));
        }
        if let Ok(networks) = serde_json::from_slice(line) {
            containers.bridges(read::bridges(networks));
        }
        if let Ok(answer) =
            serde_json::from_slice::<bollard::models::ContainerInspectResponse>(line)
        {
            let id = answer.id.as_deref().map(ContainerId::new);
            containers.look_for(id);
            while let Some(ticket) = containers.next() {
                let found = read::found(&ticket.id, answer.clone(), &prefixes);
                containers.inspected(ticket, found);
            }
        }
        if let Ok(info) = serde_json::from_slice::<bollard::models::SystemInfo>(line) {
            super::client::since(&info.system_time.unwrap_or_default());
        }
        derive(containers.inventory());
    }
}
