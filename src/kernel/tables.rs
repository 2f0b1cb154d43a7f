//! What embassy has written into the kernel's maps, and how a change is written: a program never meets half of one.
//!
//! Everything that a program follows is written before the word that leads to it, and is given to another only after a grace period.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    io::{self, Read},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::Arc,
    time::{Duration, Instant},
};

use aya::maps::MapError;
use rustix::{
    thread::{MembarrierCommand, membarrier},
    time::{ClockId, clock_gettime},
};
use tracing::debug;

use super::{
    cgroup::{Cgroup, Hierarchy},
    diag::Open,
    ends::end_here,
    layout::{self, Counted, Gone, Key, Place, Usage},
    places::Places,
    programs::{Programs, Sizes, Unavailable},
    turns,
};
use crate::{
    balance::EndpointState,
    descriptor::Balance,
    discovery::Query,
    model::{Millis, Port, Protocol, Vip},
    table::{Route, RouteKey, RouteNumber, Upstream},
};

/// How long a trial may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Depths of control groups that the programs look at: `LEVELS` of connect.c.
const LEVELS: usize = 4;

/// There is no place, or the kernel took no more.
#[derive(Debug, thiserror::Error)]
pub(super) enum WriteError {
    #[error("there is no place left")]
    Full,
    #[error(transparent)]
    Map(#[from] MapError),
}

#[derive(Debug)]
pub(super) struct Tables {
    pub(super) programs: Programs,
    routes: Places,
    services: Places,
    sets: Places,
    endpoints: Places,
    by_query: HashMap<Arc<Query>, Service>,
    /// By the address of its state, which is held.
    pub(super) by_state: HashMap<usize, Written>,
    installed: HashMap<RouteKey, Installed>,
    /// Which route an entry counts for.
    keys: HashMap<Key, RouteKey>,
    /// Routes and endpoints that are not used any more, with connections that are open.
    pub(super) old_routes: Vec<Counting<Arc<Route>>>,
    pub(super) old_endpoints: Vec<Written>,
    /// Whose the places are, of those that are gone too.
    pub(super) route_of: HashMap<Place, Arc<Route>>,
    pub(super) endpoint_of: HashMap<Place, Arc<EndpointState>>,
    levels: BTreeSet<u32>,
    /// Whether a place was given back since this was looked at last.
    pub(super) has_room: bool,
    /// Whether the kernel ends connections on request.
    pub(super) can_reset: bool,
}

/// What is counted, and how much of it was read.
#[derive(Debug)]
pub(super) struct Counting<T> {
    pub(super) place: Place,
    pub(super) of: T,
    pub(super) read: Counted,
}

/// A route that has entries.
#[derive(Debug)]
struct Installed {
    number: RouteNumber,
    balance: Balance,
    query: Arc<Query>,
    way: Way,
    entries: Vec<Entry>,
}

/// Whose connections are meant, and where they are dialled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Way {
    pub(super) cgroup: Cgroup,
    pub(super) vips: Vec<Vip>,
    /// While an endpoint of the service is in doubt, they are left to the proxy.
    pub(super) is_cautious: bool,
}

impl Way {
    /// Whether the entries of the VIPs that both have can stay: flows of UDP end with theirs.
    fn differs_only_in_vips(&self, other: &Self) -> bool {
        self.cgroup == other.cgroup && self.is_cautious == other.is_cautious
    }
}

/// What sends connections to one VIP. Its place in the table of routes says by which key it is found, so each VIP has one.
#[derive(Debug)]
struct Entry {
    key: Key,
    counting: Counting<Arc<Route>>,
}

#[derive(Debug)]
struct Service {
    place: Place,
    set: Place,
    /// By the addresses of their states.
    order: Vec<usize>,
    base: u64,
    /// `None` before the first set.
    upstream: Option<Arc<Upstream>>,
    routes: usize,
    /// Those of them that are cautious.
    cautious: usize,
    /// What the programs were told: whether an endpoint is in doubt.
    is_doubted: bool,
}

/// An endpoint in the kernel's tables.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) counting: Counting<Arc<EndpointState>>,
    /// A query that asks for it, for messages.
    pub(super) query: Arc<Query>,
    /// Services that have it.
    services: usize,
    /// Whether it is a service's only one.
    pub(super) is_only: bool,
    /// What the kernel was told last: whether it is used, and the connections to it that are not this place's.
    pub(super) mark: (Usage, u32),
    /// Connections that were open when they were counted last: this part of the state's number is this place's.
    pub(super) active: u32,
    /// The failure that was seen last; 0: none.
    pub(super) failed_at: u64,
    /// Whether a connection waits for the answer to its SYN.
    pub(super) waits: bool,
    /// Whether that answer is late.
    pub(super) is_late: bool,
    /// Whether a cautious route needs it proved.
    pub(super) needs_proof: bool,
    pub(super) is_probed: bool,
    pub(super) probe_after: Option<Instant>,
}

/// Waits until every program has ended that runs now. False if that cannot be had (a kernel with `nohz_full`).
fn grace() -> bool {
    // Programs at control groups run inside an RCU read side, and this waits for all of them.
    membarrier(MembarrierCommand::Global).is_ok()
}

/// The clock of the programs.
pub(super) fn nanoseconds() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

impl Tables {
    /// Loads and attaches the programs, and tries them.
    pub(super) fn load(sizes: Sizes, hierarchy: &Hierarchy) -> Result<Self, Unavailable> {
        let mut tables = Self {
            programs: Programs::load(sizes, hierarchy)?,
            routes: Places::new(sizes.routes),
            services: Places::new(sizes.services),
            sets: Places::new(sizes.services * 2),
            endpoints: Places::new(sizes.endpoints),
            by_query: HashMap::new(),
            by_state: HashMap::new(),
            installed: HashMap::new(),
            keys: HashMap::new(),
            old_routes: Vec::new(),
            old_endpoints: Vec::new(),
            route_of: HashMap::new(),
            endpoint_of: HashMap::new(),
            levels: BTreeSet::new(),
            has_room: false,
            can_reset: false,
        };
        tables.test(hierarchy)?;
        Ok(tables)
    }

    /// Loads, attaches and tries the programs for UDP.
    pub(super) fn load_udp(&mut self, hierarchy: &Hierarchy) -> Result<(), Unavailable> {
        self.programs.load_udp(hierarchy)?;
        let tested = self.test_udp(hierarchy);
        if tested.is_err() {
            self.programs.detach_udp();
        }
        tested
    }

    /// Sends a datagram to a VIP that exists for this alone, and has it answered.
    fn test_udp(&mut self, hierarchy: &Hierarchy) -> Result<(), Unavailable> {
        let socket = || {
            let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
            socket.set_read_timeout(Some(PATIENCE))?;
            Ok(socket)
        };
        let failed = |error: io::Error| Unavailable::Test(error.to_string());
        let server = socket().map_err(failed)?;
        let endpoint = server.local_addr().map_err(failed)?;
        self.try_out(hierarchy, Protocol::Udp, endpoint, |_, vip| {
            let (client, mut text) = (socket()?, [0; 16]);
            client.send_to(b"to", vip)?;
            let (_, from) = server.recv_from(&mut text)?;
            if from != client.local_addr()? {
                return Err(io::Error::other("another datagram arrived"));
            }
            server.send_to(b"from", from)?;
            let (_, from) = client.recv_from(&mut text)?;
            client.connect(vip)?;
            match from == vip && client.peer_addr()? == vip {
                true => Ok(()),
                false => Err(io::Error::other("an answer does not show the VIP")),
            }
        })
    }

    /// Connects to a VIP that exists for this alone. That the programs are attached does not show that they are at the root of all
    /// control groups, nor that they do what they should.
    fn test(&mut self, hierarchy: &Hierarchy) -> Result<(), Unavailable> {
        let failed = |error: io::Error| Unavailable::Test(error.to_string());
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(failed)?;
        let endpoint = listener.local_addr().map_err(failed)?;
        self.try_out(hierarchy, Protocol::Tcp, endpoint, |tables, vip| {
            let stream = TcpStream::connect_timeout(&vip, PATIENCE)?;
            let (local, peer) = (stream.local_addr()?, stream.peer_addr()?);
            listener.set_nonblocking(true)?;
            let (_kept, accepted) = listener.accept()?;
            tables.can_reset = tables.resets(&stream, endpoint);
            match (accepted == local, peer == vip) {
                (true, true) => Ok(()),
                (true, false) => Err(io::Error::other("getpeername does not show the VIP")),
                (false, _) => Err(io::Error::other("another connection arrived")),
            }
        })
    }

    /// Has a VIP lead to an endpoint while `attempt` runs.
    fn try_out(
        &mut self,
        hierarchy: &Hierarchy,
        protocol: Protocol,
        endpoint: SocketAddr,
        attempt: impl FnOnce(&mut Self, SocketAddr) -> io::Result<()>,
    ) -> Result<(), Unavailable> {
        let failed = |error: &dyn std::fmt::Display| Unavailable::Test(error.to_string());
        let root = hierarchy.root_id().ok_or(Unavailable::NoHierarchy)?;
        // Every level is in use, by programs that were tried already: what is loaded later does the same.
        let level = self.levels.len() as u32;
        if level as usize >= LEVELS {
            return Ok(());
        }
        // Nobody else dials it meanwhile: every process is below the root.
        let vip = Ipv4Addr::new(127, 91, fastrand::u8(..), fastrand::u8(1..255));
        let port = Port::new(fastrand::u16(1..)).ok_or_else(|| failed(&"no port"))?;
        let key = Key { cgroup: root, vip: vip.into(), port, protocol };
        self.lay_trial(&key, endpoint, level)
            .map_err(|error| Unavailable::Maps(error.to_string()))?;
        let end = attempt(self, (vip, port.get()).into());
        let removed = self
            .programs
            .routes
            .remove(&key.bytes())
            .and_then(|()| self.programs.levels.set(level, 0, 0));
        end.map_err(|error| failed(&error))?;
        removed.map_err(|error| Unavailable::Maps(error.to_string()))
    }

    /// Whether the kernel ends a connection that was redirected to an endpoint: not if it was built without CONFIG_INET_DIAG_DESTROY.
    fn resets(&mut self, mut stream: &TcpStream, endpoint: SocketAddr) -> bool {
        let why = |open: &Open| (open.peer.endpoint.0 == endpoint).then_some(Gone::Route);
        let ended = end_here(&mut self.programs, why);
        debug!(?ended, "tried to end a connection");
        // Without a wait: it has ended by now, or it never will.
        let read = stream.set_nonblocking(true).and_then(|()| stream.read(&mut [0]));
        let is_aborted = |error: &io::Error| error.kind() == io::ErrorKind::ConnectionAborted;
        matches!(ended, Ok(1)) && read.as_ref().is_err_and(is_aborted)
    }

    /// The places for which connections of a route may count: those that it has and had, and, as one entry serves all addresses of a
    /// container, those of the `others`, its routes of the same port from other addresses.
    pub(super) fn places_of(&self, route: &Route, others: &[RouteKey]) -> HashSet<Place> {
        let of_others = others.iter().filter_map(|key| self.installed.get(key));
        let of_others = of_others.filter(|one| one.query == route.query);
        let own = self.installed.get(&route.key).filter(|one| one.number == route.number);
        let now = own.into_iter().chain(of_others).flat_map(|one| &one.entries);
        let is_before = |one: &&Counting<Arc<Route>>| {
            one.of.number == route.number
                || is_of_another_address(&one.of.key, &route.key)
                    && one.of.consumer == route.consumer
                    && one.of.query == route.query
        };
        let before = self.old_routes.iter().filter(is_before);
        now.map(|entry| entry.counting.place).chain(before.map(|one| one.place)).collect()
    }

    /// The places of the trial stay its own: nothing of it is found by anybody else.
    fn lay_trial(&mut self, key: &Key, to: SocketAddr, level: u32) -> Result<(), WriteError> {
        let now = Instant::now();
        let endpoint = self.endpoints.take(now, grace).ok_or(WriteError::Full)?;
        let bytes = layout::endpoint(&crate::model::Endpoint(to), endpoint.generation, 0);
        self.programs.endpoints.set(endpoint.index, bytes, 0)?;
        let service = self.services.take(now, grace).ok_or(WriteError::Full)?;
        let set = self.sets.take(now, grace).ok_or(WriteError::Full)?;
        let bytes = layout::set(service.index, set.generation, 0, &[endpoint.index], 0);
        self.programs.sets.set(set.index, bytes, 0)?;
        self.programs.services.set(service.index, layout::current(set), 0)?;
        let route = self.routes.take(now, grace).ok_or(WriteError::Full)?;
        let bytes = layout::route(key, service.index, route.generation, false, false);
        self.programs.route_table.set(route.index, bytes, 0)?;
        // The root's depth is 0.
        self.programs.levels.set(level, 1, 0)?;
        self.programs.routes.insert(key.bytes(), route.index, 0)?;
        Ok(())
    }

    /// Has what is counted of all entries read, of those of routes that are gone too.
    pub(super) fn count_routes(&mut self, read: impl Fn(&mut Counting<Arc<Route>>, &Programs)) {
        let entries = self.installed.values_mut().flat_map(|installed| &mut installed.entries);
        let all = entries.map(|entry| &mut entry.counting).chain(&mut self.old_routes);
        all.for_each(|counting| read(counting, &self.programs));
    }

    /// Whose turn it is, of each service.
    pub(super) fn turns(&self) -> Vec<u64> {
        let places = self.by_query.values().map(|service| service.place.index);
        places.map(|index| self.programs.turns.get(&index, 0).unwrap_or_default()).collect()
    }

    /// Tells the programs of each service with cautious routes whether one of its endpoints is in doubt. Returns what they ask for whose
    /// path is another one now. `is_busy`: whether the programs may have found a doubt themselves.
    pub(super) fn weigh(
        &mut self,
        is_busy: bool,
        is_trusted: impl Fn(&Written) -> bool,
    ) -> Vec<Arc<Query>> {
        let mut turned = Vec::new();
        for (query, service) in &mut self.by_query {
            if service.cautious == 0 {
                continue;
            }
            let mut are_trusted = true;
            for one in &service.order {
                if let Some(written) = self.by_state.get_mut(one) {
                    written.needs_proof = true;
                    are_trusted &= is_trusted(written);
                }
            }
            let (doubts, index) = (&mut self.programs.doubts, service.place.index);
            let is_news = are_trusted == service.is_doubted;
            // What the programs found is over if all endpoints are proved since.
            let is_stale =
                || are_trusted && is_busy && doubts.get(&index, 0).is_ok_and(|doubt| doubt != 0);
            if (is_news || is_stale()) && doubts.set(index, u64::from(!are_trusted), 0).is_ok() {
                service.is_doubted = !are_trusted;
                if is_news {
                    turned.push(query.clone());
                }
            }
        }
        turned
    }

    /// Whether a connect to an endpoint failed, or is late, and it was not proved since.
    pub(super) fn has_failed(&self, state: &Arc<EndpointState>) -> bool {
        let written = self.by_state.get(&address(state));
        written.is_some_and(|written| written.failed_at != 0 || written.is_late)
    }

    /// Whether anything was installed that is not.
    pub(super) fn has_old(&self) -> bool {
        !self.old_routes.is_empty() || !self.old_endpoints.is_empty()
    }

    /// Sends a route's connections to its endpoints from now on.
    pub(super) fn install(
        &mut self,
        route: &Arc<Route>,
        upstream: &Arc<Upstream>,
        way: Way,
        now: Millis,
    ) -> Result<(), WriteError> {
        let query = &upstream.query;
        if let Some(installed) = self.installed.get_mut(&route.key)
            && installed.number == route.number
            && installed.balance == route.balance
            && installed.query == *query
            && installed.way.differs_only_in_vips(&way)
        {
            let keeps = |entry: &mut Entry| way.vips.iter().any(|vip| vip.0 == entry.key.vip);
            for Entry { key, counting } in installed.entries.extract_if(.., |one| !keeps(one)) {
                self.keys.remove(&key);
                let _ = self.programs.routes.remove(&key.bytes());
                self.old_routes.push(counting);
            }
            installed.way = way.clone();
            for Entry { counting, .. } in &mut installed.entries {
                counting.of = route.clone();
                self.route_of.insert(counting.place, route.clone());
            }
            self.update(upstream, now)?;
            let Some(service) = self.by_query.get(query).map(|service| service.place.index) else {
                return Ok(());
            };
            // Those of new VIPs; and another address of the same container may have had some of these keys until now.
            return self.enter_free(route, &way, service);
        }
        self.use_level(way.cgroup.level)?;
        // Joined first: endpoints of both services keep their places, and so the counts of their connections.
        let service = self.join(upstream, way.is_cautious, now)?;
        self.uninstall(&route.key);
        let installed = Installed {
            number: route.number,
            balance: route.balance,
            query: query.clone(),
            way: way.clone(),
            entries: Vec::new(),
        };
        self.installed.insert(route.key, installed);
        let done = self.enter_free(route, &way, service);
        if done.is_err() {
            self.uninstall(&route.key);
        }
        done
    }

    /// Writes the entries of a route that no other route has.
    fn enter_free(
        &mut self,
        route: &Arc<Route>,
        way: &Way,
        service: u32,
    ) -> Result<(), WriteError> {
        let keys = free_keys(&self.keys, way.cgroup, route.key, &way.vips);
        keys.into_iter().try_for_each(|key| self.enter(route, key, service, way.is_cautious))
    }

    fn enter(
        &mut self,
        route: &Arc<Route>,
        key: Key,
        service: u32,
        is_cautious: bool,
    ) -> Result<(), WriteError> {
        let place = self.routes.take(Instant::now(), grace).ok_or(WriteError::Full)?;
        let counting = Counting { place, of: route.clone(), read: Counted::default() };
        let Some(installed) = self.installed.get_mut(&route.key) else { return Ok(()) };
        installed.entries.push(Entry { key, counting });
        self.route_of.insert(place, route.clone());
        self.keys.insert(key, route.key);
        let least = route.balance == Balance::LeastConnections;
        let bytes = layout::route(&key, service, place.generation, least, is_cautious);
        self.programs.route_table.set(place.index, bytes, 0)?;
        self.programs.route_counts.set(place.index, layout::NO_COUNTS, 0)?;
        self.programs.routes.insert(key.bytes(), place.index, 0)?;
        Ok(())
    }

    /// Leaves a route's connections to the proxy from now on. Returns whether it had entries.
    pub(super) fn uninstall(&mut self, key: &RouteKey) -> bool {
        let Some(installed) = self.installed.remove(key) else { return false };
        for Entry { key, counting } in installed.entries {
            self.keys.remove(&key);
            // It is not there if it could not be written.
            let _ = self.programs.routes.remove(&key.bytes());
            self.old_routes.push(counting);
        }
        self.leave(&installed.query, installed.way.is_cautious);
        true
    }

    /// The place of an upstream's service, which one route more has.
    fn join(
        &mut self,
        upstream: &Arc<Upstream>,
        is_cautious: bool,
        time: Millis,
    ) -> Result<u32, WriteError> {
        if !self.by_query.contains_key(&upstream.query) {
            let place = self.services.take(Instant::now(), grace).ok_or(WriteError::Full)?;
            // In doubt, until it is known that it is not.
            if let Err(error) = self.programs.doubts.set(place.index, 1, 0) {
                self.services.give_back(place, Instant::now());
                return Err(error.into());
            }
            let service = Service {
                place,
                set: Place { index: 0, generation: 0 },
                order: Vec::new(),
                base: 0,
                upstream: None,
                routes: 0,
                cautious: 0,
                is_doubted: true,
            };
            self.by_query.insert(upstream.query.clone(), service);
        }
        let Some(service) = self.by_query.get_mut(&upstream.query) else {
            return Err(WriteError::Full);
        };
        service.routes += 1;
        service.cautious += usize::from(is_cautious);
        let index = service.place.index;
        let done = self.update(upstream, time);
        if done.is_err() {
            self.leave(&upstream.query, is_cautious);
        }
        done.map(|()| index)
    }

    /// Takes over a service's endpoints, in one step.
    fn update(&mut self, upstream: &Arc<Upstream>, time: Millis) -> Result<(), WriteError> {
        let Some(service) = self.by_query.get(&upstream.query) else { return Ok(()) };
        if service.upstream.as_ref().is_some_and(|before| Arc::ptr_eq(before, upstream)) {
            return Ok(());
        }
        let (place, base) = (service.place, service.base);
        let states = upstream.rotation.endpoints();
        let now: Vec<usize> = states.iter().map(address).collect();
        let before = service.order.clone();
        let new: Vec<_> = states.iter().filter(|state| !before.contains(&address(state))).collect();
        let mut written = Vec::new();
        let done = new.iter().try_for_each(|state| {
            self.write_endpoint(state, &upstream.query, time)?;
            written.push(address(state));
            Ok(())
        });
        // Read last: what is drawn until the set is in use goes by the old order, of which the new one is the rest.
        let laid = done.and_then(|()| {
            let turn = self.programs.turns.get(&place.index, 0)?;
            let order = turns::succeed(&before, base, turn, &now);
            let stay = order.iter().filter(|one| before.contains(one)).count() as u32;
            let set = self.write_set(place.index, turn, &order, stay)?;
            Ok((set, turn, order))
        });
        let (set, turn, order) = match laid {
            Ok(laid) => laid,
            Err(error) => {
                // The set that is in use stays as it is.
                written.into_iter().for_each(|one| self.let_go(one));
                return Err(error);
            }
        };
        if let Some(service) = self.by_query.get_mut(&upstream.query) {
            let old = std::mem::replace(&mut service.set, set);
            if old.generation != 0 {
                self.sets.give_back(old, Instant::now());
            }
            (service.order, service.base) = (order, turn);
            service.upstream = Some(upstream.clone());
        }
        for gone in before.iter().filter(|one| !now.contains(one)) {
            self.let_go(*gone);
        }
        let is_only = now.len() == 1;
        for one in now {
            if let Some(written) = self.by_state.get_mut(&one) {
                written.is_only = is_only;
            }
        }
        Ok(())
    }

    /// Writes a set where no program looks, and then leads the service to it.
    fn write_set(
        &mut self,
        service: u32,
        base: u64,
        order: &[usize],
        stay: u32,
    ) -> Result<Place, WriteError> {
        let set = self.sets.take(Instant::now(), grace).ok_or(WriteError::Full)?;
        let places = order.iter().filter_map(|one| self.by_state.get(one));
        let places: Vec<_> = places.map(|one| one.counting.place.index).collect();
        let bytes = layout::set(service, set.generation, base, &places, stay);
        let done = self.programs.sets.set(set.index, bytes, 0);
        match done.and_then(|()| self.programs.services.set(service, layout::current(set), 0)) {
            Ok(()) => Ok(set),
            Err(error) => {
                self.sets.give_back(set, Instant::now());
                Err(error.into())
            }
        }
    }

    fn write_endpoint(
        &mut self,
        state: &Arc<EndpointState>,
        query: &Arc<Query>,
        time: Millis,
    ) -> Result<(), WriteError> {
        if let Some(written) = self.by_state.get_mut(&address(state)) {
            written.services += 1;
            return Ok(());
        }
        let place = self.endpoints.take(Instant::now(), grace).ok_or(WriteError::Full)?;
        // Its slow start goes on where the proxy's, or that of its place before, was.
        let age = state.seen_for(time).saturating_mul(1_000_000);
        let since = nanoseconds().saturating_sub(age).max(1);
        let bytes = layout::endpoint(&state.endpoint, place.generation, since);
        self.programs.endpoints.set(place.index, bytes, 0)?;
        self.programs.lives.set(place.index, [0; 32], 0)?;
        self.programs.failures.set(place.index, 0, 0)?;
        self.programs.endpoint_counts.set(place.index, layout::NO_COUNTS, 0)?;
        // Out, until it is known that it is not.
        self.programs.marks.set(place.index, layout::mark(Usage::Out, 0), 0)?;
        let written = Written {
            counting: Counting { place, of: state.clone(), read: Counted::default() },
            query: query.clone(),
            services: 1,
            is_only: false,
            mark: (Usage::Out, 0),
            active: 0,
            failed_at: 0,
            waits: false,
            is_late: false,
            needs_proof: false,
            is_probed: false,
            probe_after: None,
        };
        self.endpoint_of.insert(place, state.clone());
        self.by_state.insert(address(state), written);
        Ok(())
    }

    /// One service less has an endpoint.
    fn let_go(&mut self, state: usize) {
        let Some(written) = self.by_state.get_mut(&state) else { return };
        written.services -= 1;
        if written.services == 0
            && let Some(written) = self.by_state.remove(&state)
        {
            self.old_endpoints.push(written);
        }
    }

    /// One route less has a service.
    fn leave(&mut self, query: &Query, is_cautious: bool) {
        let Some(service) = self.by_query.get_mut(query) else { return };
        service.routes -= 1;
        service.cautious -= usize::from(is_cautious);
        if service.routes > 0 {
            return;
        }
        if let Some(service) = self.by_query.remove(query) {
            // No set has the generation 0. If it cannot be written, nothing leads here all the same.
            let _ = self.programs.services.set(service.place.index, 0, 0);
            self.has_room = true;
            self.services.give_back(service.place, Instant::now());
            if service.set.generation != 0 {
                self.sets.give_back(service.set, Instant::now());
            }
            service.order.into_iter().for_each(|one| self.let_go(one));
        }
    }

    /// Has the programs look at control groups of this depth, for processes below those of their containers. If there are too many
    /// depths, only processes in the containers' own control groups are found; those of others go through the proxy.
    fn use_level(&mut self, level: u32) -> Result<(), WriteError> {
        if self.levels.len() < LEVELS && self.levels.insert(level) {
            self.programs.levels.set(self.levels.len() as u32 - 1, level + 1, 0)?;
        }
        Ok(())
    }

    /// Gives the places back of routes and endpoints that are gone and had no connection when they were read last. They are returned: what
    /// was counted at the end has to be read once more.
    pub(super) fn clear_up(&mut self) -> (Vec<Counting<Arc<Route>>>, Vec<Written>) {
        let now = Instant::now();
        let routes: Vec<_> = self.old_routes.extract_if(.., |one| one.read.active() == 0).collect();
        for one in &routes {
            self.route_of.remove(&one.place);
            self.routes.give_back(one.place, now);
        }
        let endpoints: Vec<_> = self.old_endpoints.extract_if(.., |one| one.active == 0).collect();
        for one in &endpoints {
            self.endpoint_of.remove(&one.counting.place);
            self.endpoints.give_back(one.counting.place, now);
        }
        self.has_room |= !routes.is_empty() || !endpoints.is_empty();
        (routes, endpoints)
    }
}

/// The keys of a route that no route has. Another address of the same container may have them; its route counts then.
fn free_keys(
    taken: &HashMap<Key, RouteKey>,
    cgroup: Cgroup,
    RouteKey { port, protocol, .. }: RouteKey,
    vips: &[Vip],
) -> Vec<Key> {
    let keys = vips.iter().map(|vip| Key { cgroup: cgroup.id, vip: vip.0, port, protocol });
    keys.filter(|key| !taken.contains_key(key)).collect()
}

/// Whether both are of the same port, from different addresses.
pub(super) fn is_of_another_address(one: &RouteKey, other: &RouteKey) -> bool {
    (one.port, one.protocol) == (other.port, other.protocol) && one.source != other.source
}

/// By what a state is found: it is held as long as it is in use.
fn address(state: &Arc<EndpointState>) -> usize {
    Arc::as_ptr(state).addr()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_stay_if_only_the_vips_change() {
        let vips = |all: &[u8]| all.iter().map(|n| Vip([172, 17, 0, *n].into())).collect();
        let way = |id, all: &[u8], is_cautious| Way {
            cgroup: Cgroup { id, level: 2 },
            vips: vips(all),
            is_cautious,
        };
        assert!(way(7, &[1, 2], false).differs_only_in_vips(&way(7, &[2, 3], false)));
        assert!(!way(7, &[1], false).differs_only_in_vips(&way(8, &[1], false)));
        assert!(!way(7, &[1], false).differs_only_in_vips(&way(7, &[1], true)));
    }

    #[test]
    fn a_route_takes_the_keys_that_another_address_of_its_container_gave_up() {
        let (cgroup, port) = (Cgroup { id: 7, level: 2 }, Port::new(80).unwrap());
        let vips = [1, 2].map(|n| Vip([172, 17, 0, n].into()));
        let protocol = Protocol::Tcp;
        let key = |n: u8| Key { cgroup: 7, vip: [172, 17, 0, n].into(), port, protocol };
        let first = RouteKey::tcp([10, 0, 0, 1].into(), port);
        let mut taken: HashMap<_, _> = [(key(1), first), (key(2), first)].into();
        assert_eq!(free_keys(&taken, cgroup, first, &vips), []);
        taken.remove(&key(2));
        assert_eq!(free_keys(&taken, cgroup, first, &vips), [key(2)]);
        taken.clear();
        assert_eq!(free_keys(&taken, cgroup, first, &vips), [key(1), key(2)]);
        let other = Cgroup { id: 8, level: 2 };
        taken.insert(key(1), first);
        assert_eq!(free_keys(&taken, other, first, &vips).len(), 2, "another container's");
        let udp = RouteKey { protocol: Protocol::Udp, ..first };
        assert_eq!(free_keys(&taken, cgroup, udp, &vips).len(), 2, "another protocol's");
    }
}
