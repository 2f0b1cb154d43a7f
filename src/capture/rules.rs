//! The rules, independent of the firewall backend. Pure.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;

use crate::{
    config::{CaptureScope, Guard},
    model::{ConsumerId, Port, Protocol},
    table::{Changes, Route, RouteKey, Table},
    wiring::{Arrival, Interface, Wiring},
};

/// The name of all our objects in the firewall.
pub const NAME: &str = "embassy";

/// Our chains in iptables, to which PREROUTING and OUTPUT jump.
pub(super) const CHAINS: [&str; 2] = ["EMBASSY", "EMBASSY_OUTPUT"];

/// The nf_tables table that counts and refuses connections if iptables captures.
pub(super) const COUNTS: &str = "embassy_counts";

/// Name prefix of the table that keeps live connections translated while they drain.
pub(super) const DRAINING: &str = "embassy_draining_";

/// The mark of our own connections to endpoints (man 7 socket, SO_MARK), so that `--redirect` does not capture them.
/// Its value spells "em"; the lower half is left to others, such as Kubernetes, which masquerades packets with 0x4000.
pub const MARK: u32 = 0x656d_0000;

/// The settings of the rules. The rest comes from the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleSettings {
    /// Also captures the host's own connections to a VIP, and connections that arrive for `own`.
    pub redirect: bool,
    pub scope: CaptureScope,
    /// How addresses are bound to bridge ports.
    pub guard: Guard,
    /// Our listener's port.
    pub port: u16,
    /// With `redirect`: our own addresses, to which linked containers connect.
    pub own: Vec<IpAddr>,
    /// With `redirect`: the registries and engines to which embassy connects.
    pub servers: Vec<SocketAddr>,
    /// Whether unknown containers are captured too.
    pub hold: bool,
    /// Whether connections to endpoints on this host's own networks bypass connection tracking.
    pub notrack: bool,
    /// The optional parts that this host's firewall does not support.
    pub lacks: Optional,
}

impl RuleSettings {
    /// Whether unknown containers need their own rules. With the scope `all`, all containers are captured anyway.
    pub fn captures_unknown(&self) -> bool {
        self.hold && self.scope == CaptureScope::Declared && !self.lacks.has(RulePart::Hold)
    }

    /// Whether addresses are bound to bridge ports.
    pub fn guards(&self) -> bool {
        self.guard != Guard::Off && !self.lacks.has(RulePart::Guard)
    }

    pub fn leaves_untracked(&self) -> bool {
        self.notrack && !self.lacks.has(RulePart::Notrack)
    }
}

/// An optional part of the rules: without it, the rest still captures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RulePart {
    /// Captures unknown containers, for `--hold`.
    Hold,
    Notrack,
    Ipv6,
    /// Counts captured connections that other programs' rules drop.
    Count,
    /// Binds containers' addresses to the ports of their bridges.
    Guard,
    /// Refuses connections to our port that were not captured.
    Refusal,
}

impl RulePart {
    /// In order of importance, the least important first: that one is left out if it is unclear which of two is not
    /// supported.
    pub const ALL: [Self; 6] =
        [Self::Count, Self::Refusal, Self::Notrack, Self::Guard, Self::Hold, Self::Ipv6];

    /// The consequence for users if this part is missing.
    pub fn loss(self) -> &'static str {
        match self {
            Self::Hold => {
                "--hold is not in effect: the first connection of a container that is not known yet is not captured"
            }
            Self::Notrack => "--notrack is not in effect: connections to endpoints are tracked",
            Self::Ipv6 => "IPv6 is not captured",
            Self::Count => "dropped connections are not counted",
            Self::Guard => {
                "--guard is not in effect: a container that forges its source address is served as the other container on the same bridge"
            }
            Self::Refusal => {
                "connections to embassy's own port are accepted and reset, instead of refused by the kernel"
            }
        }
    }

    pub fn fix(self) -> &'static str {
        match self {
            Self::Hold => {
                "give the kernel nft_socket of Linux 5.10 or later (with iptables: xt_socket) and restart embassy, or set --hold=0"
            }
            Self::Notrack => {
                "give the kernel nft_socket and nft_ct and restart embassy, or do without --notrack"
            }
            Self::Ipv6 => {
                "give the kernel NAT for IPv6 (with iptables: ip6table_nat) and restart embassy, or use IPv4 alone"
            }
            Self::Count => "give the kernel nft_ct and nft_counter and restart embassy",
            Self::Guard => {
                "use --firewall=nft on a kernel with nf_tables for bridges and restart embassy, take NET_RAW and NET_ADMIN from containers that you do not trust, or set --guard=off"
            }
            Self::Refusal => "give the kernel nft_ct and nft_reject_inet and restart embassy",
        }
    }
}

/// A set of optional parts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Optional(u8);

impl Optional {
    pub fn has(self, part: RulePart) -> bool {
        self.0 & Self::bit(part) != 0
    }

    pub fn with(self, part: RulePart) -> Self {
        Self(self.0 | Self::bit(part))
    }

    pub fn without(self, others: Self) -> Self {
        Self(self.0 & !others.0)
    }

    pub fn parts(self) -> impl Iterator<Item = RulePart> {
        RulePart::ALL.into_iter().filter(move |part| self.has(*part))
    }

    /// Every non-empty set of parts, the smallest sets first.
    pub fn choices() -> Vec<Self> {
        let mut all: Vec<_> = (1..1 << RulePart::ALL.len()).map(Self).collect();
        all.sort_by_key(|choice| choice.0.count_ones());
        all
    }

    fn bit(part: RulePart) -> u8 {
        match part {
            RulePart::Count => 1,
            RulePart::Notrack => 2,
            RulePart::Hold => 4,
            RulePart::Ipv6 => 8,
            RulePart::Guard => 16,
            RulePart::Refusal => 32,
        }
    }
}

/// What determines the set of chains. Only the priority can change during a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub redirect: bool,
    pub scope: CaptureScope,
    pub port: u16,
    /// Whether unknown containers are captured on every port of a VIP on which no program of this host listens.
    pub unknown: bool,
    pub notrack: bool,
    pub v6: bool,
    /// Whether captured connections are counted on their way to our listener.
    pub counted: bool,
    /// How addresses are bound to bridge ports.
    pub guard: Guard,
    /// Whether connections to our listener that were not captured are refused.
    pub refusing: bool,
    /// The priority of our chains, with nft: before all others that translate.
    pub priority: i32,
}

/// Priority of our chains. They come before Docker's chains at -100 (dstnat), so that a route wins against a published
/// port.
pub const PRIORITY: i32 = -110;

impl Shape {
    pub fn of(settings: &RuleSettings) -> Self {
        Self {
            redirect: settings.redirect,
            scope: settings.scope,
            port: settings.port,
            unknown: settings.captures_unknown(),
            notrack: settings.leaves_untracked(),
            v6: !settings.lacks.has(RulePart::Ipv6),
            counted: !settings.lacks.has(RulePart::Count),
            guard: if settings.lacks.has(RulePart::Guard) { Guard::Off } else { settings.guard },
            refusing: !settings.lacks.has(RulePart::Refusal),
            priority: PRIORITY,
        }
    }

    pub fn has(self, part: RulePart) -> bool {
        self != self.without(Optional::default().with(part))
    }

    pub fn without(mut self, lacks: Optional) -> Self {
        self.unknown &= !lacks.has(RulePart::Hold);
        self.notrack &= !lacks.has(RulePart::Notrack);
        self.v6 &= !lacks.has(RulePart::Ipv6);
        self.counted &= !lacks.has(RulePart::Count);
        self.refusing &= !lacks.has(RulePart::Refusal);
        if lacks.has(RulePart::Guard) {
            self.guard = Guard::Off;
        }
        self
    }
}

/// Addresses that are captured besides the declared ports, and exempt addresses. There are few, and they seldom change.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExtraAddresses {
    pub vips: BTreeSet<IpAddr>,
    /// Addresses that are captured on declared ports only, with any scope: the host's own services listen there too.
    pub own: BTreeSet<IpAddr>,
    /// VIPs and own addresses that are on none of the engine's bridges. Only there, connections from its other networks are
    /// captured.
    pub outer: BTreeSet<IpAddr>,
    /// With the scope `all`: the VIPs that are captured on every interface. Empty if the interfaces of the engine's bridges
    /// are known.
    pub everywhere: BTreeSet<IpAddr>,
    /// The interfaces of the engine's bridges.
    pub bridges: BTreeSet<Interface>,
    /// Servers on a VIP to which embassy connects: connections from this host to them are not captured, even if a binding
    /// declares the port. Otherwise embassy's own request to a registry would wait for the registry's answer.
    pub spared: BTreeSet<SocketAddr>,
    /// The networks of unknown containers whose interface is not known.
    pub networks: BTreeSet<IpNet>,
    /// The networks of unknown containers, each with the interface on which their connections arrive.
    pub segments: BTreeSet<(Interface, IpNet)>,
    /// Networks to whose members our own connections are not tracked. These are bridges of this host: packets to them have
    /// the bridge's own address and are not translated. Packets to other destinations may need translation, which needs
    /// connection tracking.
    pub untracked: BTreeSet<IpNet>,
}

impl ExtraAddresses {
    pub fn of(table: &Table, settings: &RuleSettings) -> Self {
        let vips: BTreeSet<_> = table.vips().iter().map(|vip| vip.0).collect();
        let wiring = table.wiring();
        let own: BTreeSet<_> =
            settings.own.iter().copied().filter(|own| !vips.contains(own)).collect();
        let all = settings.scope == CaptureScope::All && wiring.interfaces.is_empty();
        let wired =
            |network: &&IpNet| wiring.segments.iter().any(|(_, segment)| segment == *network);
        let unknown = settings.captures_unknown();
        Self {
            spared: settings
                .servers
                .iter()
                .copied()
                .filter(|server| settings.redirect && vips.contains(&server.ip()))
                .collect(),
            outer: vips.union(&own).filter(|at| !wiring.gateways.contains(at)).copied().collect(),
            everywhere: if all { vips.clone() } else { BTreeSet::new() },
            bridges: wiring.interfaces.clone(),
            own,
            vips,
            // Some engines do not say how a network is connected. Then only the addresses are checked.
            networks: match unknown {
                true => table.networks().iter().filter(|net| !wired(net)).copied().collect(),
                false => BTreeSet::new(),
            },
            segments: if unknown { wiring.segments.clone() } else { BTreeSet::new() },
            untracked: match settings.leaves_untracked() {
                true => table.networks().clone(),
                false => BTreeSet::new(),
            },
        }
    }

    /// The exempt servers whose port a consumer on this host declared. This consumer reaches the server instead of the
    /// service.
    pub fn shadowed(&self, table: &Table) -> impl Iterator<Item = SocketAddr> {
        // A connection from a host to its own address has this address as its source.
        let declares = |server: &SocketAddr| {
            Port::new(server.port())
                .is_some_and(|port| table.route(&RouteKey::tcp(server.ip(), port)).is_some())
        };
        self.spared.iter().copied().filter(declares)
    }
}

/// All rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    pub shape: Shape,
    pub places: ExtraAddresses,
    /// The consumers' addresses and ports that are captured.
    pub declared: BTreeSet<Declared>,
    /// Addresses of known containers. These are captured on declared ports only.
    pub known: BTreeSet<IpAddr>,
    /// The bridge ports to which addresses are bound, for the guard.
    pub wiring: Arc<Wiring>,
}

/// How a route is matched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Declared {
    pub key: RouteKey,
    pub arrival: Arrival,
}

impl Declared {
    fn of(route: &Arc<Route>) -> Option<Self> {
        match route.key.protocol {
            Protocol::Tcp => Some(Self { key: route.key, arrival: route.arrival }),
            // Only the kernel path has it; no rule leads it to the proxy.
            Protocol::Udp => None,
        }
    }
}

impl Rules {
    pub fn of(table: &Table, settings: &RuleSettings) -> Self {
        Self {
            shape: Shape::of(settings),
            places: ExtraAddresses::of(table, settings),
            declared: table.routes().filter_map(Declared::of).collect(),
            wiring: match settings.guards() {
                true => table.wiring().clone(),
                false => Arc::default(),
            },
            known: if settings.captures_unknown() {
                table.known().clone()
            } else {
                BTreeSet::new()
            },
        }
    }
}

/// The differences from the previous rules.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RuleChanges {
    pub declared_added: Vec<Declared>,
    pub declared_removed: Vec<Declared>,
    pub known_added: Vec<IpAddr>,
    pub known_removed: Vec<IpAddr>,
    /// The values before and now, if they differ.
    pub places: Option<Box<(ExtraAddresses, ExtraAddresses)>>,
    /// The bindings of addresses to bridge ports before and now, if they differ.
    pub wiring: Option<(Arc<Wiring>, Arc<Wiring>)>,
}

impl RuleChanges {
    /// The differences between the rules of two tables, from the changes between the tables.
    pub fn of(changes: &Changes, settings: &RuleSettings) -> Self {
        let moved = || changes.moved.iter();
        let keys = |routes: &mut dyn Iterator<Item = &Arc<Route>>| {
            let mut keys: Vec<_> = routes.filter_map(Declared::of).collect();
            keys.sort();
            keys
        };
        let added = keys(&mut changes.added.iter().chain(moved().map(|(_, now)| now)));
        let removed = keys(&mut changes.removed.iter().chain(moved().map(|(before, _)| before)));
        // If an address and port changed owner, the rule stays the same. Both lists are sorted.
        let is_not_in = |others: &[Declared], key: &Declared| others.binary_search(key).is_err();
        let mut found = Self {
            declared_added: added.iter().filter(|key| is_not_in(&removed, key)).copied().collect(),
            declared_removed: removed
                .iter()
                .filter(|key| is_not_in(&added, key))
                .copied()
                .collect(),
            ..Self::default()
        };
        if settings.guards() {
            found.wiring.clone_from(&changes.wiring);
        }
        if settings.captures_unknown() {
            found.known_added.clone_from(&changes.known_added);
            found.known_removed.clone_from(&changes.known_removed);
        }
        found
    }

    /// The same with changed places.
    pub fn with_places(mut self, before: &ExtraAddresses, now: &ExtraAddresses) -> Self {
        self.places = (before != now).then(|| Box::new((before.clone(), now.clone())));
        self
    }

    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The points at which the kernel calls chains for a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// Arriving packets.
    Prerouting,
    /// Packets that arrive for this host.
    Input,
    /// Packets that this host sends.
    Output,
}

impl Hook {
    /// The hook at which this consumer's connections can be captured.
    pub fn of(consumer: &ConsumerId) -> Self {
        match consumer {
            ConsumerId::Local => Self::Output,
            ConsumerId::Container { .. } => Self::Prerouting,
        }
    }

    /// nft's name of the hook, also the name of our chain that translates there.
    pub(super) fn nft(self) -> &'static str {
        match self {
            Self::Prerouting => "prerouting",
            Self::Input => "input",
            Self::Output => "output",
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::wiring::{Mac, Owner};

    /// The same rules, but unknown containers are captured too.
    pub(in crate::capture) fn with_unknown(mut rules: Rules) -> Rules {
        rules.shape.unknown = true;
        rules.places.networks =
            ["172.17.0.0/16", "fd00::/64"].map(|text| text.parse().unwrap()).into();
        rules.places.segments = [("br-x", "172.18.0.0/16"), ("br-x", "fd00:18::/64")]
            .map(|(name, net)| (interface(name), net.parse().unwrap()))
            .into();
        rules.known = ["172.17.0.2", "fd00::2"].map(|text| text.parse().unwrap()).into();
        rules
    }

    /// The same rules, but our own connections to near endpoints are not tracked.
    pub(in crate::capture) fn with_untracked(mut rules: Rules) -> Rules {
        rules.shape.notrack = true;
        rules.places.untracked = ["172.17.0.0/16".parse().unwrap()].into();
        rules
    }

    pub(in crate::capture) fn interface(name: &str) -> Interface {
        Interface::new(name).unwrap()
    }

    pub(in crate::capture) fn declared(source: &str, port: u16, arrival: Arrival) -> Declared {
        let key = RouteKey::tcp(source.parse().unwrap(), Port::new(port).unwrap());
        Declared { key, arrival }
    }

    /// The same rules, but addresses are bound to bridge ports.
    pub(in crate::capture) fn with_guard(mut rules: Rules, guard: Guard) -> Rules {
        rules.shape.guard = guard;
        let owner = |name: &str, ports: &[u32], mac: Option<[u8; 6]>| {
            Arc::new(Owner { name: name.into(), ports: ports.to_vec(), mac: mac.map(Mac) })
        };
        let owners = [
            ("172.17.0.2", owner("a", &[1007], Some([2, 0x42, 0xac, 17, 0, 2]))),
            ("fd00::2", owner("a", &[1007], Some([2, 0x42, 0xac, 17, 0, 2]))),
            ("172.18.0.5", owner("b", &[1008, 1009], None)),
        ];
        rules.wiring = Arc::new(Wiring {
            ports: Arc::new([1007, 1008, 1009, 1010].into()),
            owners: owners
                .map(|(address, owner)| (address.parse().unwrap(), owner))
                .into_iter()
                .collect(),
            ..Wiring::default()
        });
        rules
    }

    /// Three consumers, both families, one VIP each.
    pub(in crate::capture) fn example(redirect: bool, scope: CaptureScope) -> Rules {
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let docker0 = Arrival::By(interface("docker0"));
        let all = [
            ("172.17.0.2", 6379, docker0),
            ("172.17.0.2", 80, docker0),
            ("172.18.0.5", 6379, Arrival::Anywhere),
            ("192.168.1.5", 80, Arrival::Outside),
            ("fd00::2", 80, docker0),
        ];
        let own = redirect.then(|| address("10.1.2.3"));
        let spared = redirect.then(|| "172.17.0.1:8500".parse().unwrap());
        Rules {
            shape: Shape {
                redirect,
                scope,
                port: 9999,
                unknown: false,
                notrack: false,
                v6: true,
                counted: true,
                guard: Guard::Off,
                refusing: true,
                priority: PRIORITY,
            },
            places: ExtraAddresses {
                vips: ["172.17.0.1", "fd00::1"].map(address).into(),
                outer: own.into_iter().chain([address("192.168.1.90")]).collect(),
                own: own.into_iter().collect(),
                bridges: [interface("docker0"), interface("br-x")].into(),
                spared: spared.into_iter().collect(),
                ..ExtraAddresses::default()
            },
            declared: all.map(|(source, port, by)| declared(source, port, by)).into(),
            known: BTreeSet::new(),
            wiring: Arc::default(),
        }
    }
}
