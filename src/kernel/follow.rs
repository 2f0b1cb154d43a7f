//! Follows tables, and what the kernel counted and met: what is written is the rest of what `path` decides.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    sync::{mpsc::UnboundedSender, watch},
    time::timeout,
};
use tracing::{debug, info, warn};

use super::{
    Settings,
    again::Again,
    cgroup::{Cgroup, Hierarchy},
    ends::{self, Ending},
    inside,
    layout::{Counted, End, EndedConnection, Gone, Live, Place, Usage, mark},
    programs::{Sizes, Unavailable},
    proofs::{Proofs, Tried},
    tables::{Counting, Tables, Way, WriteError, Written, is_of_another_address, nanoseconds},
};
use crate::{
    balance::{CheckResult, EndpointState},
    counts::ConnectionCounts,
    descriptor::{Check, Descriptor, EndpointDrain, PathChoice},
    discovery::Query,
    events::Event,
    log::CONNECTION,
    memory,
    model::{ConsumerId, Endpoint, Protocol, Vip},
    outcome::Outcome,
    path::{Candidate, Facts, PathReason, Paths, asks, caution, decide, nearness},
    proxy::{Lack, connect_unseen, probe, unseen_socket, wanted},
    table::{Changes, Route, RouteKey, Table, Upstream},
};

/// What embassy's own connects to endpoints found out.
#[derive(Debug)]
pub(super) enum Answer {
    /// From this host.
    Probed {
        /// The address of the endpoint's state, which may be another's by now.
        state: usize,
        place: Place,
        result: io::Result<()>,
    },
    /// From a consumer's own network.
    Tried { consumer: ConsumerId, endpoint: Endpoint, how: Tried },
}

#[derive(Debug)]
pub(super) struct Core {
    settings: Settings,
    kernel: Kernel,
    hierarchy: Option<Hierarchy>,
    /// Whether the kernel takes UDP. `None`: no route asked for it yet.
    udp: Option<bool>,
    table: Arc<Table>,
    /// Routes of each consumer that do not ask for the proxy path.
    routes: HashMap<ConsumerId, BTreeSet<RouteKey>>,
    /// The same routes, by what they ask for.
    by_query: HashMap<Arc<Query>, BTreeSet<RouteKey>>,
    identities: HashMap<ConsumerId, Cgroup>,
    /// Consumers whose control group was not found, with routes that need it.
    unidentified: HashMap<ConsumerId, Miss>,
    /// Routes for which there was no room, and when to try again.
    full: HashSet<RouteKey>,
    room: Option<Again>,
    /// Whether the log has it that there was no room.
    was_full: bool,
    /// What can be reached from the consumers of cautious routes.
    proofs: Proofs,
    /// Whether the log has it that embassy cannot connect from consumers' networks.
    is_barred: bool,
    /// Whether a consumer's network can be entered, to reset connections there.
    entered: HashMap<ConsumerId, bool>,
    /// Connections that are to be reset.
    endings: Vec<Ending>,
    /// Routes that lose their connections to an endpoint whose check fails, and those endpoints.
    failing: HashMap<RouteKey, HashSet<Endpoint>>,
    paths: Paths,
    /// Whether `paths` differs from what was published.
    is_news: bool,
    sender: watch::Sender<Paths>,
    answers: UnboundedSender<Answer>,
    /// Turns when they were looked at last.
    turns: Vec<u64>,
    lost: u64,
}

/// When a control group that was not found is looked for again: where it usually is soon, and everywhere seldom.
#[derive(Debug)]
struct Miss {
    looked: Instant,
    everywhere: Again,
}

/// What became of the programs: nothing is loaded before a route needs it.
#[derive(Debug)]
enum Kernel {
    NotAsked,
    Ready(Box<Tables>),
    Unavailable,
}

/// How often a control group that was not found is looked for at the usual places.
const AGAIN: Duration = Duration::from_secs(1);
/// How long after connections were reset it is done once more, at the next look: a table may come sooner.
const AGAIN_AFTER: Duration = Duration::from_millis(50);
/// How long a probe of an endpoint may take.
const PROBE: Duration = Duration::from_secs(2);

impl Core {
    pub(super) fn new(
        settings: Settings,
        sender: watch::Sender<Paths>,
        answers: UnboundedSender<Answer>,
    ) -> Self {
        Self {
            paths: Paths::new(settings.default),
            is_news: false,
            sender,
            settings,
            kernel: Kernel::NotAsked,
            hierarchy: None,
            udp: None,
            table: Arc::default(),
            routes: HashMap::new(),
            by_query: HashMap::new(),
            identities: HashMap::new(),
            unidentified: HashMap::new(),
            full: HashSet::new(),
            room: None,
            was_full: false,
            proofs: Proofs::default(),
            is_barred: false,
            entered: HashMap::new(),
            endings: Vec::new(),
            failing: HashMap::new(),
            answers,
            turns: Vec::new(),
            lost: 0,
        }
    }

    /// Whether anything is written that has to be looked after.
    pub(super) fn is_loaded(&self) -> bool {
        matches!(self.kernel, Kernel::Ready(_))
    }

    /// Takes a table over: what differs from the one before is written.
    pub(super) fn take(&mut self, table: Arc<Table>) {
        let before = std::mem::replace(&mut self.table, table.clone());
        let between;
        let changes = if before.version + 1 == table.version {
            table.changes()
        } else {
            between = Changes::between(&before, &table);
            &between
        };
        // Taken away first: another consumer's entries must not be there for longer than the table has them.
        for route in &changes.removed {
            self.remove(route);
        }
        for upstream in &changes.upstreams {
            self.drain(&before, upstream);
        }
        // A route that continues has the same binding; so of those that ask for the proxy path nothing has to be remembered.
        let default = self.settings.default;
        let asks = |route: &&Arc<Route>| asks(&route.binding.descriptor, default);
        let mut orphans = BTreeSet::new();
        for route in &changes.removed {
            let same_port = |key: &&RouteKey| key.port == route.key.port;
            let left = self.routes.get(&route.consumer);
            orphans.extend(left.into_iter().flatten().filter(same_port).copied());
        }
        for route in changes.added.iter().chain(&changes.updated).filter(asks) {
            self.routes.entry(route.consumer.clone()).or_default().insert(route.key);
            self.by_query.entry(route.query.clone()).or_default().insert(route.key);
            self.set(route);
        }
        // Other endpoints may be of another kind, so the path is decided again.
        let answered = changes.upstreams.iter().filter_map(|one| self.by_query.get(&one.query));
        let answered = answered.flatten().filter_map(|key| table.route(key));
        // Another address of the same container takes over what the removed one had.
        let orphans = orphans.iter().filter_map(|key| table.route(key));
        let all = changes.places.then(|| table.routes()).into_iter().flatten().filter(asks);
        let others: Vec<_> = answered.chain(orphans).chain(all).cloned().collect();
        for route in &others {
            self.set(route);
        }
        // An endpoint that is not used any more may be another's when it comes back.
        for route in changes.removed.iter().chain(&others) {
            self.forget_unused(&route.consumer);
        }
        self.publish();
    }

    /// Connections to endpoints that a service does not have any more are to be reset, if their bindings say so. Those to an endpoint
    /// that is back are not.
    fn drain(&mut self, before: &Table, upstream: &Upstream) {
        let had = before.upstream(&upstream.query).map_or(&[][..], |one| one.rotation.endpoints());
        let has = upstream.rotation.endpoints();
        let less = |all: &[Arc<EndpointState>], without: &[Arc<EndpointState>]| {
            let is_without = |one: &Endpoint| without.iter().all(|state| state.endpoint != *one);
            all.iter().map(|state| state.endpoint).filter(is_without).collect::<Vec<_>>()
        };
        let (gone, back) = (less(had, has), less(has, had));
        let Some(keys) = self.by_query.get(&upstream.query) else { return };
        let is_back = |one: &Endpoint| back.contains(one);
        self.endings
            .retain(|one| !one.endpoint.as_ref().is_some_and(is_back) || !keys.contains(&one.key));
        let mut new = Vec::new();
        for route in keys.iter().filter_map(|key| self.table.route(key)) {
            let after = match route.binding.descriptor.drain {
                EndpointDrain::Keep => continue,
                EndpointDrain::Kill => Duration::ZERO,
                EndpointDrain::After(time) => time,
            };
            let at = Instant::now() + after;
            new.extend(gone.iter().filter_map(|endpoint| self.ending(route, Some(*endpoint), at)));
        }
        self.endings.extend(new);
    }

    /// Connections to endpoints whose check fails are to be reset, if their bindings say so.
    fn drain_failing(&mut self) {
        let mut failing = std::mem::take(&mut self.failing);
        for (key, known) in &mut failing {
            let Some(route) = self.table.route(key) else { continue };
            let states = self.table.endpoints_of(route).iter();
            let failing = states.filter(|state| state.check() == CheckResult::Fails);
            let now: HashSet<Endpoint> = failing.map(|state| state.endpoint).collect();
            let new = now.difference(known);
            let new = new.filter_map(|one| self.ending(route, Some(*one), Instant::now()));
            let new: Vec<_> = new.collect();
            self.endings.extend(new);
            *known = now;
        }
        self.failing = failing;
    }

    /// The end of a route's connections. `None`: it has none that embassy can end.
    fn ending(&self, route: &Route, endpoint: Option<Endpoint>, at: Instant) -> Option<Ending> {
        let Kernel::Ready(tables) = &self.kernel else { return None };
        if !tables.can_reset || route.key.protocol == Protocol::Udp {
            return None;
        }
        let run = route.ends.first().filter(|run| !run.has_ended())?.clone();
        let of_consumer = self.routes.get(&route.consumer).into_iter().flatten().copied();
        let others = of_consumer.filter(|other| is_of_another_address(other, &route.key));
        let others: Vec<RouteKey> = others.collect();
        let places = tables.places_of(route, &others);
        (!places.is_empty()).then(|| Ending {
            route: route.number,
            key: route.key,
            run,
            endpoint,
            places,
            others: others.iter().map(|other| other.source).collect(),
            at,
            is_repeated: false,
        })
    }

    /// Whether the endpoint is back whose connections were to be reset.
    fn is_back(&self, ending: &Ending) -> bool {
        let route = self.table.route(&ending.key).filter(|one| one.number == ending.route);
        let states = route.map_or(&[][..], |route| self.table.endpoints_of(route));
        let mut same = states.iter().filter(|one| Some(one.endpoint) == ending.endpoint);
        same.any(|state| state.check() != CheckResult::Fails)
    }

    /// Resets what is due of the connections that are to be reset: as much as the time of one look allows, and once more at the next.
    fn reset_due(&mut self) {
        let start = Instant::now();
        let mut due = ends::take_due(&mut self.endings, start);
        due.retain(|ending| !self.is_back(ending));
        let Kernel::Ready(tables) = &mut self.kernel else { return };
        while !ends::is_over(start)
            && let Some((run, endings)) = ends::take_run(&mut due)
        {
            let Some(route) = endings.first().map(|one| one.key) else { continue };
            match ends::end(&run, &mut tables.programs, &endings) {
                // A container that has ended has no connections either.
                None => continue,
                Some(Ok(connections)) => debug!(%route, connections, "connections reset"),
                Some(Err(error)) => {
                    warn!(%route, %error, "cannot reset connections of the kernel path; they stay open")
                }
            }
            let again = endings.into_iter().filter(|one| !one.is_repeated);
            let at = start + AGAIN_AFTER;
            self.endings.extend(again.map(|one| Ending { is_repeated: true, at, ..one }));
        }
        self.endings.splice(..0, due);
    }

    /// Whether embassy can reset connections in the network of a route's consumer.
    fn can_reset(&mut self, route: &Route) -> bool {
        if !self.is_ready() || !matches!(&self.kernel, Kernel::Ready(tables) if tables.can_reset) {
            return false;
        }
        if let Some(can) = self.entered.get(&route.consumer) {
            return *can;
        }
        let can = route.ends.first().is_some_and(|run| inside::within(run, || ()).is_some());
        self.entered.insert(route.consumer.clone(), can);
        can
    }

    fn forget_unused(&mut self, consumer: &ConsumerId) {
        if !self.proofs.has(consumer) {
            return;
        }
        let keys = self.routes.get(consumer).into_iter().flatten();
        let routes = keys.filter_map(|key| self.table.route(key));
        let used: HashSet<Endpoint> = routes
            .flat_map(|route| self.table.endpoints_of(route))
            .map(|state| state.endpoint)
            .collect();
        self.proofs.keep(consumer, |endpoint| used.contains(&endpoint));
    }

    /// Shows which paths the routes take, if any takes another one.
    fn publish(&mut self) {
        if std::mem::take(&mut self.is_news) {
            self.sender.send_replace(self.paths.clone());
        }
    }

    fn remove(&mut self, route: &Route) {
        self.is_news |= self.paths.forget(&route.key);
        self.full.remove(&route.key);
        self.failing.remove(&route.key);
        self.endings.retain(|one| one.route != route.number);
        self.endings.extend(self.ending(route, None, Instant::now()));
        if let Kernel::Ready(tables) = &mut self.kernel {
            tables.uninstall(&route.key);
        }
        if let Some(routes) = self.routes.get_mut(&route.consumer) {
            routes.remove(&route.key);
            if routes.is_empty() {
                self.routes.remove(&route.consumer);
                self.identities.remove(&route.consumer);
                self.unidentified.remove(&route.consumer);
                self.proofs.forget(&route.consumer);
                self.entered.remove(&route.consumer);
            }
        }
        if let Some(routes) = self.by_query.get_mut(&route.query) {
            routes.remove(&route.key);
            if routes.is_empty() {
                self.by_query.remove(&route.query);
            }
        }
    }

    fn set(&mut self, route: &Arc<Route>) {
        let reason = self.decide(route);
        let is_news = self.paths.set(route.key, reason);
        self.is_news |= is_news;
        // Another path may be taken later, and these connections stay.
        let Descriptor { drain, check, .. } = &route.binding.descriptor;
        if reason.has_entries() && (drain, check) == (&EndpointDrain::Kill, &Some(Check::Tcp)) {
            self.failing.entry(route.key).or_default();
        }
        self.full.remove(&route.key);
        match reason {
            PathReason::Full => {
                self.full.insert(route.key);
                if !std::mem::replace(&mut self.was_full, true) {
                    warn!(
                        "the kernel's tables are full; further routes go through the proxy until a restart makes room"
                    );
                }
            }
            PathReason::NoIdentity => {}
            _ if reason.has_entries() => {}
            _ => {
                if let Kernel::Ready(tables) = &mut self.kernel {
                    tables.uninstall(&route.key);
                }
            }
        }
        if is_news {
            let (consumer, port) = (&route.consumer_name, route.key.port);
            debug!(%consumer, %port, path = %self.paths.path(&route.key), reason = reason.line(), "path of a route");
            if route.key.protocol == Protocol::Udp && reason != PathReason::Possible {
                warn!(%consumer, %port, address = %route.key.source, reason = reason.line(), "UDP binding is not served: it takes the kernel path only");
            }
        }
    }

    /// Which path a route takes; if it is the kernel's, it does from now on.
    fn decide(&mut self, route: &Arc<Route>) -> PathReason {
        let states = self.table.endpoints_of(route);
        let endpoints: Vec<Endpoint> = states.iter().map(|state| state.endpoint).collect();
        let is_ipv4 = route.key.source.to_canonical().is_ipv4();
        let drains = self.choice(route) != PathChoice::Proxy
            && route.binding.descriptor.drain != EndpointDrain::Keep;
        let can_reset = drains && self.can_reset(route);
        let facts = Facts {
            default: self.settings.default,
            is_available: !matches!(self.kernel, Kernel::Unavailable),
            can_reset,
            is_container: route.consumer != ConsumerId::Local,
            is_limited: self.settings.is_limited,
            is_ipv4,
            endpoints: &endpoints,
        };
        match decide(&route.binding.descriptor, facts) {
            PathReason::Possible => {}
            reason => return reason,
        }
        let is_tcp = route.key.protocol == Protocol::Tcp;
        if !self.is_ready() || !is_tcp && !self.has_udp() {
            return PathReason::Unavailable;
        }
        let is_cautious = is_tcp && self.choice(route) == PathChoice::Auto;
        let granted = match is_cautious {
            true => self.weigh(route),
            false => PathReason::Possible,
        };
        if !granted.has_entries() {
            return granted;
        }
        let is_of_family = |vip: &&Vip| vip.0.to_canonical().is_ipv4() == is_ipv4;
        let vips: Vec<Vip> = self.table.vips().iter().filter(is_of_family).copied().collect();
        let identity = self.identity(route);
        let Some(upstream) = self.table.upstream(&route.query).cloned() else {
            return PathReason::Unavailable;
        };
        let Kernel::Ready(tables) = &mut self.kernel else { return PathReason::Unavailable };
        let reason = match identity {
            _ if vips.is_empty() => PathReason::NoVip,
            None => PathReason::NoIdentity,
            Some(cgroup) => {
                let way = Way { cgroup, vips, is_cautious };
                match tables.install(route, &upstream, way, self.settings.figures.now()) {
                    Ok(()) => return granted,
                    Err(error) => {
                        let (consumer, port) = (&route.consumer_name, route.key.port);
                        match error {
                            WriteError::Full => {
                                debug!(%consumer, %port, "the kernel's tables are full")
                            }
                            WriteError::Map(error) => {
                                warn!(%consumer, %port, %error, "cannot write a route into the kernel's tables; its connections go through the proxy");
                            }
                        }
                        PathReason::Full
                    }
                }
            }
        };
        tables.uninstall(&route.key);
        reason
    }

    fn choice(&self, route: &Route) -> PathChoice {
        route.binding.descriptor.path.unwrap_or(self.settings.default)
    }

    /// What speaks against the kernel path for a cautious route.
    fn weigh(&mut self, route: &Route) -> PathReason {
        let (table, Kernel::Ready(tables)) = (self.table.clone(), &self.kernel) else {
            return PathReason::Unavailable;
        };
        let Some(consumer) = table.owner(route) else { return PathReason::Unavailable };
        let candidates = table.endpoints_of(route).iter().map(|state| {
            let near = nearness(state.endpoint, consumer, table.networks(), &table.wiring().apart);
            let reach = self.proofs.reach(&route.consumer, state.endpoint, near);
            // Nobody gets to a drained one.
            let is_proved = state.is_drained() || state.is_proved() && !tables.has_failed(state);
            Candidate { is_proved, reach }
        });
        caution(&candidates.collect::<Vec<_>>())
    }

    /// Connects to endpoints from consumers' networks, as far as that is due. Nothing is sent, and the endpoints' applications see nothing
    /// of it.
    fn try_reach(&mut self) {
        let now = Instant::now();
        let mut turned: Vec<ConsumerId> = self.proofs.due(now);
        while let Some((consumer, endpoints)) = self.proofs.take_queued() {
            let keys = self.routes.get(&consumer).into_iter().flatten();
            let route = keys.filter_map(|key| self.table.route(key)).next();
            let run = route.and_then(|route| route.ends.first());
            let socket = |endpoint: &Endpoint| unseen_socket(*endpoint, None);
            let work = || endpoints.iter().map(socket).collect::<Vec<_>>();
            let Some(sockets) = run.and_then(|run| inside::within(run, work)) else {
                for endpoint in endpoints {
                    self.proofs.ended(&consumer, endpoint, Tried::Barred, now);
                }
                if !std::mem::replace(&mut self.is_barred, true) {
                    info!(
                        "cannot connect from a container's network to prove the kernel path; its networks decide"
                    );
                }
                turned.push(consumer);
                continue;
            };
            for (endpoint, socket) in endpoints.into_iter().zip(sockets) {
                let (consumer, answers) = (consumer.clone(), self.answers.clone());
                tokio::spawn(async move {
                    let connect = async { connect_unseen(socket?, endpoint).await };
                    let how = match timeout(PROBE, connect).await {
                        Ok(Ok(())) => Tried::Reached,
                        Ok(Err(_)) | Err(_) => Tried::Failed,
                    };
                    let _ = answers.send(Answer::Tried { consumer, endpoint, how });
                });
            }
        }
        turned.iter().for_each(|consumer| self.set_all_of(consumer));
    }

    /// Decides again for all routes of a consumer.
    fn set_all_of(&mut self, consumer: &ConsumerId) {
        let keys = self.routes.get(consumer).cloned().unwrap_or_default();
        let table = self.table.clone();
        keys.iter().filter_map(|key| table.route(key)).for_each(|route| self.set(route));
    }

    /// Whether the programs are there; the first who asks has them loaded.
    fn is_ready(&mut self) -> bool {
        if let Kernel::NotAsked = self.kernel {
            let start = Instant::now();
            self.kernel = match self.load() {
                Ok(tables) => {
                    let ms = start.elapsed().as_millis() as u64;
                    info!(ms, "the kernel path is ready");
                    // Of the programs as they are written only the kernel's copy is needed from now on.
                    memory::give_back();
                    Kernel::Ready(Box::new(tables))
                }
                Err(error) => {
                    warn!(%error, "the kernel path is not available; all connections go through the proxy");
                    Kernel::Unavailable
                }
            };
        }
        self.is_loaded()
    }

    /// Whether the programs for UDP are there; the first who asks has them loaded.
    fn has_udp(&mut self) -> bool {
        let (Kernel::Ready(tables), Some(hierarchy)) = (&mut self.kernel, &self.hierarchy) else {
            return false;
        };
        *self.udp.get_or_insert_with(|| match tables.load_udp(hierarchy) {
            Ok(()) => true,
            Err(error) => {
                warn!(%error, "the kernel path takes no UDP; bindings of UDP are not served");
                false
            }
        })
    }

    fn load(&mut self) -> Result<Tables, Unavailable> {
        let hierarchy = Hierarchy::find().ok_or(Unavailable::NoHierarchy)?;
        let table = &self.table;
        let asking =
            table.routes().filter(|route| asks(&route.binding.descriptor, self.settings.default));
        let entries = asking.count() * table.vips().len();
        let sizes = Sizes::fitting(entries, self.settings.max_services, table.endpoints().len());
        let tables = Tables::load(sizes, &hierarchy)?;
        self.hierarchy = Some(hierarchy);
        Ok(tables)
    }

    fn identity(&mut self, route: &Route) -> Option<Cgroup> {
        if let Some(cgroup) = self.identities.get(&route.consumer) {
            return Some(*cgroup);
        }
        let id = match &route.consumer {
            ConsumerId::Container { id, .. } => id,
            ConsumerId::Local => return None,
        };
        let now = Instant::now();
        let everywhere = match self.unidentified.get_mut(&route.consumer) {
            // Another route of it has just asked.
            Some(miss) if now < miss.looked + AGAIN => return None,
            Some(miss) => {
                miss.looked = now;
                miss.everywhere.is_due(now)
            }
            None => true,
        };
        // Its own run's end comes first; the other is that of the container whose network it uses.
        let (id, run) = (id.as_str(), route.ends.first());
        let Some(cgroup) = self.hierarchy.as_ref()?.of_container(id, run, everywhere) else {
            let miss = || Miss { looked: now, everywhere: Again::new(now) };
            self.unidentified.entry(route.consumer.clone()).or_insert_with(miss);
            return None;
        };
        self.unidentified.remove(&route.consumer);
        self.identities.insert(route.consumer.clone(), cgroup);
        Some(cgroup)
    }

    /// Looks for the control groups that were not found. What is found is taken over for all routes of its consumer.
    fn look_for_identities(&mut self) {
        let now = Instant::now();
        let due = self.unidentified.iter().filter(|(_, miss)| now >= miss.looked + AGAIN);
        let due: Vec<_> = due.map(|(consumer, _)| consumer.clone()).collect();
        for consumer in due {
            let keys = self.routes.get(&consumer).cloned().unwrap_or_default();
            let table = self.table.clone();
            let routes: Vec<_> = keys.iter().filter_map(|key| table.route(key)).collect();
            if routes.first().is_some_and(|route| self.identity(route).is_some()) {
                routes.into_iter().for_each(|route| self.set(route));
            }
        }
    }

    /// Tries the routes again for which there was no room, if any was given back.
    fn try_full(&mut self) {
        let Kernel::Ready(tables) = &mut self.kernel else { return };
        if self.full.is_empty() {
            (tables.has_room, self.room) = (false, None);
            return;
        }
        let now = Instant::now();
        let again = self.room.get_or_insert_with(|| Again::new(now));
        if !tables.has_room || !again.is_due(now) {
            return;
        }
        tables.has_room = false;
        let before = self.full.len();
        for key in self.full.clone() {
            if let Some(route) = self.table.route(&key).cloned() {
                self.set(&route);
            }
        }
        if self.full.len() < before {
            self.room = None;
        }
    }

    /// Looks after what is written: reads what the kernel recorded, shares failures with the proxy, tells the kernel of the proxy's.
    pub(super) fn look(&mut self) {
        self.look_for_identities();
        self.try_full();
        self.look_at_kernel();
        self.drain_failing();
        self.reset_due();
        self.try_reach();
        self.publish();
    }

    fn look_at_kernel(&mut self) {
        let Kernel::Ready(tables) = &mut self.kernel else { return };
        let Records { any, failed } = read_records(tables, &self.settings);
        let turns = tables.turns();
        // Nothing was opened nor ended since: then nothing has to be read, except where an answer is waited for.
        let is_busy = any || turns != self.turns;
        self.turns = turns;
        let now = Instant::now();
        let mut probed = Vec::new();
        let Tables { programs, by_state, .. } = &mut **tables;
        for (address, written) in by_state {
            let is_read = is_busy || written.failed_at != 0 || written.waits;
            if is_read {
                read_endpoint(written, programs);
            }
            if should_probe(written, now, &self.settings) {
                written.is_probed = true;
                probed.push((*address, written.counting.place, written.counting.of.endpoint));
            }
            tell(written, programs, &self.settings);
        }
        let turned = tables.weigh(is_busy, |written| {
            let state = &written.counting.of;
            let is_proved = state.is_proved() && written.failed_at == 0 && !written.is_late;
            is_proved || state.is_drained()
        });
        if tables.has_old() {
            read_routes(tables.old_routes.iter_mut(), &tables.programs, &self.settings);
            for written in &mut tables.old_endpoints {
                read_endpoint(written, &tables.programs);
            }
            let (routes, endpoints) = tables.clear_up();
            for mut counting in routes {
                read_route(&mut counting, &tables.programs, &self.settings);
            }
            for mut written in endpoints {
                read_endpoint(&mut written, &tables.programs);
                written.counting.of.has_beside(written.active, 0);
            }
        }
        let lost = tables.programs.notes().get(super::layout::RECORDS_LOST).copied().unwrap_or(0);
        if lost != self.lost {
            warn!(
                records = lost - self.lost,
                "connections of the kernel path ended too fast to log each; the connection log lacks some, the counts are complete"
            );
            self.lost = lost;
        }
        for (state, place, endpoint) in probed {
            let (mark, answers) = (self.settings.mark, self.answers.clone());
            tokio::spawn(async move {
                let result = timeout(PROBE, probe(endpoint, mark)).await.unwrap_or_else(|_| {
                    Err(io::Error::new(io::ErrorKind::TimedOut, "no answer in 2 s"))
                });
                // Nobody waits for it at the end.
                let _ = answers.send(Answer::Probed { state, place, result });
            });
        }
        // A failure of the consumer's own takes back that it reaches the endpoint.
        let failed = failed.into_iter().filter(|(c, e)| self.proofs.doubt(c, *e, now));
        let doubted: BTreeSet<ConsumerId> = failed.map(|(consumer, _)| consumer).collect();
        doubted.iter().for_each(|consumer| self.set_all_of(consumer));
        let keys = turned.iter().filter_map(|query| self.by_query.get(query)).flatten();
        let turned: Vec<_> = keys.filter_map(|key| self.table.route(key)).cloned().collect();
        turned.iter().for_each(|route| self.set(route));
    }

    /// A connect of embassy's own has ended.
    pub(super) fn answered(&mut self, answer: Answer) {
        match answer {
            Answer::Probed { state, place, result } => self.probed(state, place, result),
            Answer::Tried { consumer, endpoint, how } => {
                if self.proofs.ended(&consumer, endpoint, how, Instant::now()) {
                    self.set_all_of(&consumer);
                }
                self.try_reach();
                self.publish();
            }
        }
    }

    fn probed(&mut self, state: usize, place: Place, result: io::Result<()>) {
        let Kernel::Ready(tables) = &mut self.kernel else { return };
        let Tables { programs, by_state, .. } = &mut **tables;
        let Some(written) = by_state.get_mut(&state) else { return };
        // Freed meanwhile, and another endpoint is there now: the result is not its own.
        if written.counting.place != place {
            return;
        }
        written.is_probed = false;
        let (endpoint, mark) = (written.counting.of.endpoint, self.settings.mark);
        match result {
            Ok(()) => {
                let (state, query) = (&written.counting.of, &written.query);
                if state.proved() {
                    info!(%endpoint, service = %query, "endpoint is back");
                    self.settings
                        .events
                        .report(|| Event::EndpointBack { query: query.clone(), endpoint });
                }
                forgive(written, programs);
            }
            Err(error) => {
                written.probe_after = Some(Instant::now() + AGAIN);
                // What this host lacks says nothing about the endpoint.
                if Lack::of(&error, endpoint, mark).is_none() {
                    failed(written, &error.to_string(), &self.settings);
                }
            }
        }
        tell(written, programs, &self.settings);
    }

    /// Adds all that the kernel counted to the counts that the metrics and the API show.
    pub(super) fn count(&mut self) {
        let Kernel::Ready(tables) = &mut self.kernel else { return };
        let Tables { programs, by_state, old_endpoints, .. } = &mut **tables;
        for written in by_state.values_mut().chain(old_endpoints) {
            read_endpoint(written, programs);
        }
        tables.count_routes(|counting, programs| read_route(counting, programs, &self.settings));
        self.settings.udp.set(&tables.programs.udp_notes());
    }
}

/// Reads what the kernel counted of routes.
fn read_routes<'a>(
    routes: impl Iterator<Item = &'a mut Counting<Arc<Route>>>,
    programs: &super::programs::Programs,
    settings: &Settings,
) {
    routes.for_each(|counting| read_route(counting, programs, settings));
}

fn read_route(
    counting: &mut Counting<Arc<Route>>,
    programs: &super::programs::Programs,
    settings: &Settings,
) {
    let Ok(bytes) = programs.route_counts.get(&counting.place.index, 0) else { return };
    let now = Counted::read(&bytes);
    let more = now.since(&counting.read);
    if more == Counted::default() {
        return;
    }
    counting.read = now;
    let counts = &counting.of.counts;
    let all = settings.figures.beside();
    for counts in [&**counts, all] {
        counts.started.fetch_add(more.started, std::sync::atomic::Ordering::Relaxed);
        counts.bytes(more.bytes_up, more.bytes_down);
        counts.datagrams(more.datagrams_up, more.datagrams_down);
        counts.connect.add(&more.connect);
    }
    // A connect of TCP failed at an endpoint; a call of UDP only if there is none.
    let (failed, error) = match counting.of.key.protocol {
        Protocol::Tcp => (Outcome::EndpointsUnreachable, "a connect to an endpoint failed"),
        Protocol::Udp => (Outcome::NoEndpoint, "there was no endpoint to use"),
    };
    if more.failed > 0 {
        counts.last_error.set(settings.figures.now(), error);
    }
    for (outcome, times) in outcomes(&more, failed) {
        counts.ended.add(outcome, times);
        settings.figures.ended_beside(outcome, times);
    }
}

/// How connections ended, in the words of the log and the metrics.
fn outcomes(counted: &Counted, failed: Outcome) -> [(Outcome, u64); 6] {
    [
        (Outcome::RouteGone, counted.route_gone),
        (Outcome::EndpointGone, counted.endpoint_gone),
        (Outcome::Closed, counted.closed),
        (Outcome::Reset, counted.reset),
        (Outcome::ResetAfterClose, counted.reset_after_close),
        (failed, counted.failed),
    ]
}

/// Reads what the kernel counted of an endpoint, and whether a connect to it failed. Consumers' failures alone eject nothing: a consumer can
/// make its own connects fail. embassy's probe decides.
fn read_endpoint(written: &mut Written, programs: &super::programs::Programs) {
    let index = written.counting.place.index;
    let state = written.counting.of.clone();
    if let Ok(bytes) = programs.lives.get(&index, 0) {
        let live = Live::read(&bytes);
        let active = u32::try_from(live.active).unwrap_or(u32::MAX);
        state.has_beside(written.active, active);
        written.active = active;
        written.waits = live.waiting > 0;
        written.is_late = live.is_late(nanoseconds());
    }
    if let Ok(bytes) = programs.endpoint_counts.get(&index, 0) {
        let now = Counted::read(&bytes);
        let more = now.since(&written.counting.read);
        written.counting.read = now;
        add(&state.counts, &more);
        written.failed_at = programs.failures.get(&index, 0).unwrap_or_default();
        state.failed_again(more.failed);
    }
}

/// Of an endpoint only connections that opened are counted.
fn add(counts: &ConnectionCounts, more: &Counted) {
    counts.started.fetch_add(more.opened, std::sync::atomic::Ordering::Relaxed);
    counts.bytes(more.bytes_up, more.bytes_down);
    counts.datagrams(more.datagrams_up, more.datagrams_down);
    counts.connect.add(&more.connect);
    let failed = Outcome::EndpointsUnreachable;
    outcomes(more, failed).iter().filter(|(outcome, _)| !outcome.is_refusal()).for_each(
        |(outcome, times)| {
            counts.ended.add(*outcome, *times);
        },
    );
}

/// An endpoint failed: all routes skip it for a while, those on the proxy path too. The only one stays in use there.
fn failed(written: &Written, error: &str, settings: &Settings) {
    let state: &EndpointState = &written.counting.of;
    let (endpoint, service, now) = (state.endpoint, &written.query, settings.figures.now());
    if written.is_only {
        if state.timed_out_alone() {
            warn!(%endpoint, %service, "the only endpoint does not answer; it stays in use");
        }
        return;
    }
    let Some(time) = state.failed(now, now) else { return };
    let seconds = time.as_secs_f64();
    if state.failures() == 1 {
        info!(%endpoint, %service, error, seconds, "endpoint ejected");
    } else {
        debug!(%endpoint, %service, error, seconds, "endpoint ejected again");
    }
    settings.events.report(|| Event::EndpointEjected {
        query: service.clone(),
        endpoint,
        error: error.to_owned(),
        time,
    });
}

/// Whether the last that is known of an endpoint is a failure, on either path. A consumer's connect would find out whether that is
/// over, and is not tried again; so embassy finds out.
fn is_doubted(written: &Written) -> bool {
    let state = &written.counting.of;
    written.failed_at != 0 || state.failures() != 0 || state.is_silent()
}

fn should_probe(written: &Written, now: Instant, settings: &Settings) -> bool {
    let state = &written.counting.of;
    let lacks_proof = written.needs_proof && !state.is_proved() && !state.is_drained();
    (is_doubted(written) || lacks_proof)
        && !written.is_probed
        && !written.counting.of.is_ejected(settings.figures.now())
        && written.probe_after.is_none_or(|after| now >= after)
}

/// Has the kernel use an endpoint again.
fn forgive(written: &mut Written, programs: &mut super::programs::Programs) {
    if programs.failures.set(written.counting.place.index, 0, 0).is_ok() {
        (written.failed_at, written.probe_after) = (0, None);
    }
}

/// Tells the kernel whether an endpoint is to be used, and how busy it is otherwise: by the proxy, and by connections that were opened
/// when it had another place.
fn tell(written: &mut Written, programs: &mut super::programs::Programs, settings: &Settings) {
    let state = &written.counting.of;
    let usage = if state.is_drained() {
        Usage::Drained
    } else if state.is_ejected(settings.figures.now()) || is_doubted(written) {
        Usage::Out
    } else {
        Usage::Used
    };
    let now = (usage, state.active().saturating_sub(written.active));
    if written.mark != now
        && programs.marks.set(written.counting.place.index, mark(now.0, now.1), 0).is_ok()
    {
        written.mark = now;
    }
}

/// What the kernel recorded.
struct Records {
    any: bool,
    /// Connects that failed or wait in vain.
    failed: Vec<(ConsumerId, Endpoint)>,
}

/// Reads the connections that have ended, and logs them.
fn read_records(tables: &mut Tables, settings: &Settings) -> Records {
    let mut read = Records { any: false, failed: Vec::new() };
    while let Some(bytes) = tables.programs.records.next() {
        read.any = true;
        let Some(record) = EndedConnection::read(&bytes) else { continue };
        drop(bytes);
        let route = tables.route_of.get(&record.route);
        let endpoint = tables.endpoint_of.get(&record.endpoint);
        if matches!(record.end, End::Failed | End::Unanswered)
            && let (Some(route), Some(state)) = (route, endpoint)
        {
            read.failed.push((route.consumer.clone(), state.endpoint));
        }
        let outcome = match record.end {
            End::Closed => Outcome::Closed,
            End::Reset => Outcome::Reset,
            End::ResetAfterClose => Outcome::ResetAfterClose,
            End::Failed => Outcome::EndpointsUnreachable,
            End::Unanswered => continue,
            End::Gone(Gone::Route) => Outcome::RouteGone,
            End::Gone(Gone::Endpoint) => Outcome::EndpointGone,
        };
        if !wanted(settings.log, outcome) {
            continue;
        }
        let Some(route) = route else { continue };
        let endpoint = tables.endpoint_of.get(&record.endpoint);
        if route.key.protocol == Protocol::Udp {
            info!(
                target: CONNECTION,
                consumer = %route.consumer_name,
                consumer_id = %route.consumer,
                service = %route.query.service,
                endpoint = endpoint.map(|state| state.endpoint.to_string()),
                source = %SocketAddr::new(route.key.source, record.local.port()),
                destination = %canonical(record.vip),
                datagrams_up = record.bytes_up,
                datagrams_down = record.bytes_down,
                total_ms = milliseconds(record.lasted),
                path = "kernel",
                protocol = "udp",
                outcome = outcome.as_str(),
                "connection"
            );
            continue;
        }
        info!(
            target: CONNECTION,
            consumer = %route.consumer_name,
            consumer_id = %route.consumer,
            service = %route.query.service,
            endpoint = endpoint.map(|state| state.endpoint.to_string()),
            source = %canonical(record.local),
            destination = %canonical(record.vip),
            bytes_up = record.bytes_up,
            bytes_down = record.bytes_down,
            connect_ms = record.connect.map(milliseconds),
            total_ms = milliseconds(record.lasted),
            tries = 1,
            retries = 0,
            path = "kernel",
            outcome = outcome.as_str(),
            "connection"
        );
    }
    read
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn milliseconds(nanoseconds: u64) -> f64 {
    (nanoseconds / 1_000) as f64 / 1e3
}
