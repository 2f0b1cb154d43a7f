//! The facts at one moment, from which the states are decided.

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::{Arc, OnceLock},
    time::Duration,
};

use ipnet::IpNet;

use super::source::SourceReading;
use crate::{
    capture::{Drops, OwnRules, Standing, rules::Hook},
    config::{CaptureMode, CaptureScope},
    consumer::{Consumer, Reach, Surroundings},
    discovery::Query,
    limits::FEW,
    model::{ConsumerId, Millis, Vip},
    path::{Path, Paths},
    provider::Listing,
    readiness::Part,
    table::{Route, Table},
    wiring::Arrival,
};

/// All facts, and the time.
#[derive(Debug, Clone)]
pub struct Situation {
    pub table: Arc<Table>,
    /// The path of each route.
    pub paths: Paths,
    /// The consumers and their bindings.
    pub listing: Arc<Listing>,
    pub provider: SourceReading,
    pub queries: HashMap<Query, SourceReading>,
    pub capture: CaptureReading,
    /// The parts that are not ready, and the time since embassy waits for them.
    pub pending: Vec<(Part, Duration)>,
    pub load: Load,
    /// The current time, by the clock that endpoints' states use.
    pub now: Millis,
    /// embassy's own port.
    pub own_port: u16,
    /// `--hold`
    pub hold: Duration,
    /// Those of the VIPs and of the consumers' gateways that are addresses of this network namespace.
    pub here: BTreeSet<IpAddr>,
    /// Consumers whose connections may not arrive in this network namespace. Computed on first use.
    pub astray: OnceLock<HashMap<ConsumerId, Reach>>,
}

/// The capture mode, and the state of the rules.
#[derive(Debug, Clone)]
pub struct CaptureReading {
    pub mode: CaptureMode,
    pub scope: CaptureScope,
    pub standing: Standing,
    /// With `--redirect`: embassy's own addresses, which are captured like VIPs.
    pub own: Vec<IpAddr>,
    /// Without `--dnat` and `--redirect`: the user's own rules, as far as they are known.
    pub own_rules: OwnRules,
    /// The number of captured connections that have arrived since the start.
    pub captured: u64,
}

/// Open connections, and their limits.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    pub live: usize,
    pub limit: usize,
    pub limit_of_consumer: Option<usize>,
    pub memory_short: bool,
}

impl Load {
    /// Whether new connections are refused because memory is nearly used up.
    pub fn is_short_of_memory(self) -> bool {
        self.memory_short && self.live >= FEW
    }

    pub fn is_full(self) -> bool {
        self.live >= self.limit
    }
}

impl Situation {
    /// Whether the connections of a consumer arrive in this network namespace.
    pub(super) fn reach(&self, consumer: &ConsumerId) -> Reach {
        let astray = self.astray.get_or_init(|| {
            let all = self.listing.consumers.iter();
            let all = all.map(|consumer| (consumer.id.clone(), self.best_reach(consumer)));
            all.filter(|(_, reach)| *reach != Reach::Arrives).collect()
        });
        astray.get(consumer).copied().unwrap_or(Reach::Arrives)
    }

    fn best_reach(&self, consumer: &Consumer) -> Reach {
        // Without any address, this is not the problem.
        if self.addresses().next().is_none() {
            return Reach::Arrives;
        }
        let spoken = self.addresses().filter(|address| speaks(consumer, address, &self.table));
        let reaches = spoken.map(|address| consumer.reach(address, self.surroundings()));
        let mut best = None;
        for reach in reaches {
            if reach == Reach::Arrives {
                return reach;
            }
            best = Some(best.map_or(reach, |best: Reach| best.min(reach)));
        }
        match best.unwrap_or(Reach::Unknown) {
            reach if self.captures() => reach,
            // The user's own rules may capture other addresses.
            _ if self.has_captured() => Reach::Arrives,
            _ => Reach::Unknown,
        }
    }

    /// Whether connections to an address arrive from no consumer, and fail to arrive from at least one consumer in its
    /// network.
    pub(super) fn is_dead(&self, address: IpAddr) -> bool {
        let speaking =
            || self.listing.consumers.iter().filter(|one| speaks(one, &address, &self.table));
        let reach = |consumer: &Arc<Consumer>| consumer.reach(address, self.surroundings());
        // The first two conditions nearly always decide.
        !self.here.contains(&address)
            && !speaking().any(|one| reach(one) == Reach::Arrives)
            && speaking().any(|one| reach(one) == Reach::Elsewhere)
    }

    fn surroundings(&self) -> Surroundings<'_> {
        Surroundings { here: &self.here, networks: &self.listing.networks }
    }

    /// The addresses on which connections are captured: the VIPs, and with `--redirect` embassy's own.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        let vips = self.table.vips();
        let own = self.capture.own.iter().copied().filter(|own| !vips.contains(&Vip(*own)));
        vips.iter().map(|vip| vip.0).chain(own)
    }

    /// The servers of registries and engines for which connections of this host's own consumer to a port are not captured;
    /// and whether there is no other VIP.
    pub(super) fn shadowed(&self, consumer: &ConsumerId, port: u16) -> (Vec<SocketAddr>, bool) {
        if *consumer != ConsumerId::Local {
            return (Vec::new(), false);
        }
        let vips = || self.table.vips().iter().map(|vip| SocketAddr::new(vip.0, port));
        let shadowed: Vec<_> =
            vips().filter(|vip| self.capture.standing.shadowed.contains(vip)).collect();
        let all = !shadowed.is_empty() && shadowed.len() == vips().count();
        (shadowed, all)
    }

    /// Whether it is known that another firewall drops all captured connections.
    pub(super) fn all_are_dropped(&self) -> bool {
        self.captures() && self.capture.standing.drops == Drops::All
    }

    /// Whether no rule takes part in a route's connections: the kernel leads them from the consumer to the endpoint.
    pub(super) fn is_by_kernel(&self, route: &Route) -> bool {
        self.paths.path(&route.key) == Path::Kernel
    }

    /// Whether any route, also one that comes later, needs the rules.
    pub(super) fn needs_rules(&self) -> bool {
        let mut routes = self.table.routes().peekable();
        routes.peek().is_none() || routes.any(|route| self.paths.path(&route.key) == Path::Proxy)
    }

    /// Whether embassy runs in a network namespace of its own, beside its consumers': none of the gateways of their networks is here.
    /// `None`: no consumer's network has a gateway.
    pub(super) fn is_apart(&self) -> Option<bool> {
        let consumers = self.listing.consumers.iter();
        let mut gateways = consumers.flat_map(|consumer| &consumer.gateways).peekable();
        gateways.peek()?;
        Some(!gateways.any(|gateway| self.here.contains(gateway)))
    }

    /// Whether embassy itself captures.
    pub fn captures(&self) -> bool {
        self.capture.mode != CaptureMode::None
    }

    /// Whether any address is captured for a consumer. For this host's own connections only VIPs count.
    pub(super) fn captures_for(&self, consumer: &ConsumerId) -> bool {
        match consumer {
            ConsumerId::Local => self.table.vips().iter().next().is_some(),
            ConsumerId::Container { .. } => self.addresses().next().is_some(),
        }
    }

    /// Whether any captured connection has arrived.
    pub(super) fn has_captured(&self) -> bool {
        self.capture.captured > 0
    }

    /// Whether it is unknown if anything captures: without `--dnat` and `--redirect`, and without the right to read the
    /// rules, only an arriving connection shows that the user's own rules lead to embassy.
    pub(super) fn may_capture_nothing(&self) -> bool {
        let is_unknown = !matches!(self.capture.own_rules, OwnRules::Read { .. });
        !self.captures() && is_unknown && !self.has_captured()
    }

    /// Whether no rule of the user leads to embassy, as far as rules can be read. A connection that arrives after they were
    /// read proves that one does.
    pub(super) fn no_own_rule(&self) -> bool {
        let OwnRules::Read { captured, .. } = &self.capture.own_rules else { return false };
        !self.captures()
            && self.capture.own_rules.lead_nowhere()
            && self.capture.captured <= *captured
    }

    /// Whether it is known that the user's own rules do not match a consumer's connections to a port.
    pub(super) fn own_rules_pass_by(&self, consumer: &ConsumerId, port: u16) -> bool {
        let rules = &self.capture.own_rules;
        match self.captures() {
            true => false,
            false if rules.lead_nowhere() => self.no_own_rule(),
            false => rules.pass_by(port, Hook::of(consumer)),
        }
    }

    /// The addresses to which a consumer can connect, those in its own networks first.
    pub fn dials(&self, consumer: &Consumer) -> Vec<IpAddr> {
        let is_local = consumer.id == ConsumerId::Local;
        let reached = self.addresses().filter(|address| {
            // The host's own connections are captured on VIPs only.
            speaks(consumer, address, &self.table)
                && consumer.reach(*address, self.surroundings()) == Reach::Arrives
                && !(is_local && self.capture.own.contains(address))
        });
        let is_near = |address: &IpAddr| consumer.is_near(*address, &self.listing.networks);
        let (near, others): (Vec<_>, Vec<_>) = reached.partition(is_near);
        [near, others].concat()
    }

    /// The same, for one port: with the user's own rules, those that a rule takes, as far as that can be read.
    pub fn dials_at(&self, consumer: &Consumer, port: u16) -> Vec<IpAddr> {
        let vips = self.dials(consumer);
        let rules = Some(&self.capture.own_rules).filter(|_| !self.captures());
        let Some(taken) =
            rules.and_then(|rules| rules.destinations_of(port, Hook::of(&consumer.id)))
        else {
            return vips;
        };
        let (within, _): (Vec<_>, Vec<_>) =
            vips.into_iter().partition(|vip| taken.iter().any(|net| net.contains(vip)));
        match within.is_empty() {
            false => within,
            // Any destination counts. A network is no address that could be named.
            true => {
                let single = taken.iter().filter(|net| net.prefix_len() == net.max_prefix_len());
                single.map(IpNet::addr).collect()
            }
        }
    }

    /// Whether the connections or datagrams of this route go where the route says. `None`: the user's own rules decide.
    pub fn is_captured(&self, route: &Route) -> Option<bool> {
        match self.paths.path(&route.key) {
            Path::Kernel => Some(true),
            Path::None => Some(false),
            Path::Proxy => self.captured(&route.consumer, route.key.port.get(), true),
        }
    }

    /// Whether a connection of `consumer` to this port of a VIP is captured. `declared`: whether the port is declared.
    /// `None`: the user's own rules decide.
    pub fn captured(&self, consumer: &ConsumerId, port: u16, declared: bool) -> Option<bool> {
        if !self.captures() {
            return self.own_rules_pass_by(consumer, port).then_some(false);
        }
        let from_here = *consumer == ConsumerId::Local;
        let reaches_a_hook = !from_here || self.capture.mode == CaptureMode::Redirect;
        let scope = declared || (self.capture.scope == CaptureScope::All && !from_here);
        let stands = self.capture.standing.in_place && self.captures_for(consumer);
        let arrives = self.reach(consumer) != Reach::Elsewhere;
        let is_spared = declared && self.shadowed(consumer, port).1;
        let is_dropped = self.all_are_dropped() || is_spared;
        Some(stands && arrives && scope && reaches_a_hook && !is_dropped)
    }
}

/// Whether the consumer has an address of the same family whose connections to `address` are captured. On the address of a
/// bridge, only addresses of bridge networks are.
fn speaks(consumer: &Consumer, address: &IpAddr, table: &Table) -> bool {
    let is_bridges = table.wiring().gateways.contains(address);
    consumer.sources.iter().any(|own| {
        own.is_ipv4() == address.is_ipv4()
            && !(is_bridges && consumer.arrival(own) == Arrival::Outside)
    })
}
