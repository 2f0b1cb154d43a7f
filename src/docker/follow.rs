//! The one source that follows an engine. Bindings and services are derived from it.

use std::{
    collections::{BTreeSet, HashMap},
    convert::Infallible,
    future::pending,
    mem,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{FutureExt, StreamExt, stream::FuturesUnordered};
use tokio::{
    sync::Notify,
    time::{MissedTickBehavior, interval, sleep_until},
};
use tracing::{debug, warn};

use super::{
    Address, Engine,
    client::{Client, PING},
    container::{Container, Interfaces, Inventory, Network},
    containers::Containers,
    links::{LinkChange, Links},
    lookup::Lookup,
    obstacle::{self, Obstacle},
    process::{self, Processes},
    read::{self, Notice},
};
use crate::{
    model::{ContainerId, Process},
    source::{Publisher, Resync, ResyncRequests, Shared, Source, SourceError, follow},
};

/// Follows an engine for all its readers: the first reader starts it, the end of the last one stops it. It sends only GET
/// requests and changes nothing. Clones share it.
#[derive(Debug, Clone)]
pub struct Follower {
    /// The engine's name in the log.
    name: Arc<str>,
    engine: Arc<Engine>,
    /// Prefixes of the variable and label names that readers need.
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

    /// Publishes what `answer` makes of each inventory, and passes failures on. Never returns. The first caller's `bell` is
    /// rung when a container's process ends, even if the engine cannot be reached.
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
                namespaces: HashMap::new(),
                knows_networks: false,
                said: false,
                links: Links::default(),
                has_lost_one: true,
                has_come: false,
            };
            follow(&follower.name, source, publish, resync).await;
        };
        self.inventory.derive(start, publish, answer).await;
    }
}

/// How long the first answer waits for the networks: without them the gateways to which consumers connect are not known.
const PATIENCE: Duration = Duration::from_secs(2);
/// Pause after the networks could not be listed.
const NETWORKS_PAUSE: Duration = Duration::from_secs(30);

/// The source behind a [`Follower`]. Its knowledge outlives a session: if the engine cannot inspect a container, the
/// container's last state is kept.
struct EngineSource {
    engine: Arc<Engine>,
    prefixes: Arc<[String]>,
    lookup: Lookup,
    bell: Arc<Notify>,
    containers: Containers,
    processes: Processes,
    /// The network namespace of each container whose process was seen: the process, and the kernel's number of the
    /// namespace.
    namespaces: HashMap<ContainerId, (Process, i32)>,
    /// Whether the networks were listed, or listing them failed.
    knows_networks: bool,
    /// Whether it was logged that processes are not visible.
    said: bool,
    /// Also read between sessions: an address may move while the engine is away.
    links: Links,
    /// Whether an interface was deleted since the last doubt: its address may be free for another container.
    has_lost_one: bool,
    /// Whether a container may have got an address, which was not checked yet.
    has_come: bool,
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
        lookup.give_up_doubts();
        if !self.links.are_watched() {
            // Earlier changes were not received.
            self.links = Links::open();
            self.has_lost_one = true;
            lookup.moved();
        }
        // The stream opens when it is first read. An engine replays only a few of the events since `since`. So the stream
        // is read beside the listing, however long that takes.
        let connected = self.beside(Client::connect(&engine)).await;
        let (client, since) = connected.map_err(|error| match obstacle::of(&engine) {
            Some(Obstacle { what, fix }) => {
                SourceError::new(format_args!("{engine}: {what}")).fixed_by(fix)
            }
            None => error,
        })?;
        let host = self.beside(client.host()).await?;
        self.containers.host(host);
        // While the engine was away, it could not be asked about this.
        self.doubt();
        self.stand();
        let mut events = pin!(client.events(&since, &read::ACTIONS));
        let mut heard = events.next().now_or_never();
        self.containers.begin();
        self.containers.list_networks();

        // Answers are awaited only in the loop: events are applied when they arrive, and slow answers delay nothing that
        // does not depend on them.
        let (mut lists, mut networks) = (FuturesUnordered::new(), FuturesUnordered::new());
        let (mut inspections, mut looks) = (FuturesUnordered::new(), FuturesUnordered::new());
        let mut pings = FuturesUnordered::new();
        lists.push(client.list());
        let mut is_published = false;
        let ended = self.processes.ended();
        self.namespaces.clear();
        self.containers.ports(self.links.ports());
        self.plug(None);
        let mut cables = PendingChanges::default();
        let mut next_look = Instant::now();
        // A look is over when the containers that it listed are inspected.
        let mut is_looking = false;
        let mut next_networks = Instant::now();
        let patience = Instant::now() + PATIENCE;
        let mut ping = interval(PING);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            // Events that arrived together cause one inspection per container, not one per event.
            while let Some(event) = heard.take() {
                let event = event.unwrap_or_else(|| Err(SourceError::new("the events ended")))?;
                // Podman before 5.4 tells of no new network: the first container on it is made before its interface is.
                if client.is_podman() && read::is_of_a_new_container(&event) {
                    self.containers.list_networks();
                }
                if let Some(notice) = read::notice(&event) {
                    if matches!(notice, Notice::Changed(_)) {
                        lookup.forget();
                    }
                    self.containers.hear(notice);
                }
                heard = events.next().now_or_never();
            }
            if self.containers.is_flooded() {
                return Err(SourceError::new(
                    "too many events before the first list of containers",
                ));
            }
            let waits_for_networks = !self.knows_networks && Instant::now() < patience;
            if self.containers.is_complete() && !waits_for_networks {
                if self.containers.take_change() || !is_published {
                    publish.publish(self.containers.inventory());
                }
                is_published = true;
            }
            while let Some(ticket) = self.containers.next() {
                inspections.push(client.inspect(ticket, &prefixes));
            }
            if is_looking && self.containers.knows_all() {
                // An engine lists a container only a moment after its first process has started. Docker reports it earlier,
                // and delays the answer to its inspection until then. Podman does not.
                let is_certain = !client.is_podman();
                let is_known = |address: &_| self.containers.has_address(address);
                next_look = lookup.is_over(is_certain, is_known);
                is_looking = false;
            }
            // One request at a time, so that the last answer is the newest.
            if networks.is_empty()
                && Instant::now() >= next_networks
                && self.containers.take_networks_change()
            {
                networks.push(client.networks());
            }
            tokio::select! {
                event = events.next() => heard = Some(event),
                // The container has lost its address. This is published before the engine reports it.
                () = ended.notified() => self.containers.run_has_ended(),
                () = resync.due(), if lists.is_empty() => {
                    self.containers.list_again();
                    self.containers.list_networks();
                    lists.push(client.list());
                }
                () = lookup.asked(next_look), if looks.is_empty() => {
                    next_look = lookup.begins();
                    self.containers.begin_look();
                    let (client, doubts) = (&client, lookup.doubts());
                    looks.push(async move { (client.list().await, doubts) });
                }
                () = sleep_until(patience.into()), if waits_for_networks => {}
                change = self.links.changed() => {
                    self.note(&change);
                    self.doubt();
                    if change.addresses {
                        self.stand();
                        self.containers.list_networks();
                    }
                    cables.add(change);
                }
                () = cables.settled() => {
                    let PendingChanges { bridges, namespaces, .. } = mem::take(&mut cables);
                    if bridges {
                        self.containers.ports(self.links.ports());
                    }
                    if !namespaces.is_empty() {
                        self.plug(Some(&namespaces));
                    }
                }
                _ = ping.tick(), if pings.is_empty() => {
                    pings.push(client.ping());
                    self.containers.retry();
                    self.watch();
                    self.plug(None);
                    self.show(self.containers.hidden().cloned().collect());
                }
                Some(answer) = inspections.next() => {
                    let (ticket, found) = answer?;
                    let id = ticket.id.clone();
                    let new = self.containers.inspected(ticket, found).cloned();
                    // A container that was started without a network may have been connected to one since.
                    let one = self.containers.running(&id).filter(|one| !one.run.has_shown_network());
                    if let Some(one) = one {
                        watch(&mut self.processes, one, &self.bell);
                    }
                    if let Some(new) = new {
                        self.plug_one(&new);
                        // Its own namespace, or that of the container whose network it joins.
                        let target = match &new.network {
                            Network::Of(target) => target.clone(),
                            _ => id.as_str().to_owned(),
                        };
                        let target = self.containers.named(&target).cloned();
                        self.show(target.into_iter().collect());
                    }
                }
                Some(answer) = networks.next() => {
                    self.knows_networks = true;
                    match answer {
                        Ok(answer) => {
                            let (bridges, others) = read::networks(answer);
                            self.containers.networks(bridges, others);
                            self.stand();
                            self.show(self.containers.hidden().cloned().collect());
                        }
                        Err(error) => {
                            warn!(%error, "cannot list the networks of the engine; keeping the last known ones");
                            next_networks = Instant::now() + NETWORKS_PAUSE;
                            self.containers.list_networks();
                        }
                    }
                }
                Some(list) = lists.next() => self.containers.relist(list?),
                Some((running, doubts)) = looks.next() => {
                    is_looking = true;
                    self.containers.look_at(running?, doubts);
                    // Events that were sent before the list are older than it.
                    heard = events.next().now_or_never();
                    self.show(self.containers.hidden().cloned().collect());
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

    async fn between(&mut self) -> Infallible {
        self.beside(pending()).await
    }
}

/// Changes of veth pairs that are not published yet. The start of a container causes several, and each publication takes a
/// pass over all containers.
#[derive(Debug, Default)]
struct PendingChanges {
    bridges: bool,
    namespaces: BTreeSet<i32>,
    first: Option<Instant>,
}

impl PendingChanges {
    /// How long to wait for further changes after the first one.
    const PAUSE: Duration = Duration::from_millis(20);

    fn add(&mut self, change: LinkChange) {
        if change.bridges || !change.namespaces.is_empty() {
            self.bridges |= change.bridges;
            self.namespaces.extend(change.namespaces);
            self.first.get_or_insert_with(Instant::now);
        }
    }

    /// Waits until the changes are due. Never returns if there are none.
    async fn settled(&self) {
        match self.first {
            Some(first) => sleep_until((first + Self::PAUSE).into()).await,
            None => pending().await,
        }
    }
}

impl EngineSource {
    /// Awaits `answer`, and reads changes of interfaces meanwhile.
    async fn beside<T>(&mut self, answer: impl Future<Output = T>) -> T {
        let mut answer = pin!(answer);
        loop {
            tokio::select! {
                answer = &mut answer => return answer,
                change = self.links.changed() => self.note(&change),
            }
        }
    }

    /// Notes that an address may have moved to another container.
    fn note(&mut self, change: &LinkChange) {
        if change.gone {
            self.lookup.moved();
        }
        self.has_lost_one |= change.deleted;
        self.has_come |= change.came;
    }

    /// Asks the engine who has which address, if an address may have moved without an event. Not needed if the containers'
    /// processes show their addresses.
    fn doubt(&mut self) {
        let has_come = mem::take(&mut self.has_come);
        if has_come && self.has_lost_one && self.containers.are_any_unshown() {
            self.has_lost_one = false;
            self.lookup.doubt();
        }
    }

    /// Looks up the addresses of those of these containers that may have some that the engine does not report.
    fn show(&mut self, containers: Vec<Arc<Container>>) {
        let hidden: Vec<_> =
            containers.into_iter().filter(|one| self.containers.is_hidden(one)).collect();
        if hidden.is_empty() {
            return;
        }
        let (here, ours) = (self.containers.interfaces(), process::ours());
        for one in hidden {
            let shown = process::shown(&one.id, one.pid, &here, &ours);
            // A process that ends, or has just ended, shows no address. This must not be taken as having none.
            let is_watched = one.run.process().is_some();
            let ends = || {
                let seen = process::look(&one.run, process::has_network);
                !seen.unwrap_or_default()
            };
            if shown.is_none() && is_watched && ends() {
                continue;
            }
            if shown.is_some() {
                one.run.shows_network();
            }
            self.containers.shown(&one.id, shown);
        }
    }

    /// Finds this host's ends of the veth pairs of these network namespaces, and of containers for which they are unknown.
    fn plug(&mut self, touched: Option<&BTreeSet<i32>>) {
        let all: Vec<_> = self.containers.with_cables().cloned().collect();
        self.namespaces.retain(|id, _| all.binary_search_by(|one| one.id.cmp(id)).is_ok());
        let is_touched = |one: &&Arc<Container>| match self.namespaces.get(&one.id) {
            Some((process, namespace)) => {
                one.run.process() != Some(*process)
                    || touched.is_some_and(|touched| touched.contains(namespace))
            }
            None => true,
        };
        let of_interest: Vec<_> = all.iter().filter(is_touched).cloned().collect();
        for one in of_interest {
            self.plug_one(&one);
        }
    }

    /// Finds this host's ends of a container's veth pairs.
    fn plug_one(&mut self, one: &Container) {
        let Some(process) = one.run.process() else { return };
        let known = self.namespaces.get(&one.id).filter(|(of, _)| *of == process);
        let namespace = match known {
            Some((_, namespace)) => Some(*namespace),
            None => process::look(&one.run, |pid| self.links.namespace_of(pid)).flatten(),
        };
        if let Some(namespace) = namespace {
            self.namespaces.insert(one.id.clone(), (process, namespace));
            self.containers.plugged(&one.id, self.links.plugs(namespace));
        }
    }

    /// Reads the interfaces of embassy's own network namespace.
    fn stand(&mut self) {
        match if_addrs::get_if_addrs() {
            Ok(all) => {
                let mut here = Interfaces::new();
                for one in all.iter().filter(|one| !one.is_loopback()) {
                    let addresses = here.entry(one.name.as_str().into()).or_default();
                    addresses.extend((!one.is_link_local()).then(|| one.ip()));
                }
                self.containers.here(here);
            }
            Err(error) => debug!(%error, "cannot list the interfaces"),
        }
    }

    /// Tries again to watch the processes that could not be watched so far.
    fn watch(&mut self) {
        for one in self.containers.unwatched() {
            watch(&mut self.processes, one, &self.bell);
        }
        let unseen = !self.processes.are_seen() && self.containers.unwatched().next().is_some();
        if unseen && !self.said && matches!(self.engine.address, Address::Unix(_)) {
            self.said = true;
            warn!(
                "cannot see the processes of containers; relying on Docker events, using no saved containers, and guarding no addresses (in a container, run embassy with --pid=host)"
            );
        }
    }
}

/// Watches a container's process, and notes whether the kernel shows its network.
fn watch(processes: &mut Processes, one: &Container, bell: &Arc<Notify>) {
    processes.watch(&one.id, one.pid, &one.run, bell.clone());
    if process::look(&one.run, |pid| process::shows(pid, one.given())) == Some(true) {
        one.run.shows_network();
    }
}

/// Reads each line of `input` as an inspection, as an event, as a list and as a time.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(input: &[u8], mut derive: impl FnMut(Inventory)) {
    use super::answers;

    let (mut containers, prefixes) = (Containers::default(), [String::new()]);
    for line in input.split(|byte| *byte == b'\n') {
        if let Ok(event) = serde_json::from_slice(line)
            && let Some(notice) = read::notice(&event)
        {
            containers.hear(notice);
        }
        if let Ok(list) = read::list(line) {
            containers.relist(list);
        }
        if let Ok(networks) = serde_json::from_slice(line) {
            let (bridges, others) = read::networks(networks);
            containers.networks(bridges, others);
        }
        if let Ok(answer) = serde_json::from_slice::<answers::Inspection>(line) {
            let id = answer.id.as_deref().map(ContainerId::new);
            let listed = id.map(|id| read::Listed { id, addresses: None });
            containers.begin_look();
            containers.look_at(listed.into_iter().collect(), 0);
            while let Some(ticket) = containers.next() {
                let found = read::found(&ticket.id, answer.clone(), &prefixes);
                containers.inspected(ticket, found);
            }
        }
        super::client::since(&String::from_utf8_lossy(line));
        derive(containers.inventory());
    }
}
