//! The rules, independent of the backend. Pure.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;

use crate::{
    config::CaptureScope,
    model::{Port, Protocol},
    table::{Changes, Route, RouteKey, Table},
};

/// The name of all our objects in the firewall.
pub const NAME: &str = "embassy";

/// The prefix of the name of a table that keeps live connections translated while they drain.
pub(super) const DRAINING: &str = "embassy_draining_";

/// The mark of our own connections to endpoints (man 7 socket, SO_MARK), so that `--redirect` does not capture them.
/// Its value spells "em"; the lower half is left to others, such as Kubernetes, which masquerades packets with 0x4000.
pub const MARK: u32 = 0x656d_0000;

/// The settings of the rules, besides the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleSettings {
    /// Also capture the host's own connections to a VIP, and connections that arrive for `own`.
    pub redirect: bool,
    pub scope: CaptureScope,
    /// Our listener's port.
    pub port: u16,
    /// With `redirect`: our own addresses, to which linked containers connect.
    pub own: Vec<IpAddr>,
    /// With `redirect`: the registries and engines to which embassy connects.
    pub servers: Vec<SocketAddr>,
    /// Whether unknown containers are captured too.
    pub hold: bool,
    /// Whether connections to endpoints on this host's own networks go untracked.
    pub notrack: bool,
    /// The optional parts that this host's firewall cannot do.
    pub lacks: Optional,
}

impl RuleSettings {
    /// Whether unknown containers need rules of their own: with the scope `all`, all containers are captured anyway.
    pub fn captures_unknown(&self) -> bool {
        self.hold && self.scope == CaptureScope::Declared && !self.lacks.has(Part::Hold)
    }

    pub fn leaves_untracked(&self) -> bool {
        self.notrack && !self.lacks.has(Part::Notrack)
    }
}

/// A part of the rules without which the rest still captures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The capture of unknown containers, for `--hold`.
    Hold,
    Notrack,
    Ipv6,
    /// The count of captured connections that others' rules drop.
    Count,
}

impl Part {
    /// What goes first is missed least, where it is not clear which of two is lacking.
    pub const ALL: [Self; 4] = [Self::Count, Self::Notrack, Self::Hold, Self::Ipv6];

    /// What users lose without it.
    pub fn loss(self) -> &'static str {
        match self {
            Self::Hold => {
                "--hold is not in effect: the first connection of a container that is not known yet is not captured"
            }
            Self::Notrack => "--notrack is not in effect: connections to endpoints are tracked",
            Self::Ipv6 => "IPv6 is not captured",
            Self::Count => "dropped connections are not counted",
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
        }
    }
}

/// Some optional parts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Optional(u8);

impl Optional {
    pub fn has(self, part: Part) -> bool {
        self.0 & Self::bit(part) != 0
    }

    pub fn with(self, part: Part) -> Self {
        Self(self.0 | Self::bit(part))
    }

    pub fn without(self, others: Self) -> Self {
        Self(self.0 & !others.0)
    }

    pub fn parts(self) -> impl Iterator<Item = Part> {
        Part::ALL.into_iter().filter(move |part| self.has(*part))
    }

    /// Every choice of parts except none of them, the smallest first.
    pub fn choices() -> Vec<Self> {
        let mut all: Vec<_> = (1..1 << Part::ALL.len()).map(Self).collect();
        all.sort_by_key(|choice| choice.0.count_ones());
        all
    }

    fn bit(part: Part) -> u8 {
        match part {
            Part::Count => 1,
            Part::Notrack => 2,
            Part::Hold => 4,
            Part::Ipv6 => 8,
        }
    }
}

/// The set of chains. Only the priority can change.
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
    /// The priority of our chains, with nft: before all others that translate.
    pub priority: i32,
}

/// Before Docker's own chains at -100 (dstnat): a container that publishes a port must not win it from a route.
pub const PRIORITY: i32 = -110;

impl Shape {
    pub fn of(settings: &RuleSettings) -> Self {
        Self {
            redirect: settings.redirect,
            scope: settings.scope,
            port: settings.port,
            unknown: settings.captures_unknown(),
            notrack: settings.leaves_untracked(),
            v6: !settings.lacks.has(Part::Ipv6),
            counted: !settings.lacks.has(Part::Count),
            priority: PRIORITY,
        }
    }

    pub fn has(self, part: Part) -> bool {
        self != self.without(Optional::default().with(part))
    }

    pub fn without(mut self, lacks: Optional) -> Self {
        self.unknown &= !lacks.has(Part::Hold);
        self.notrack &= !lacks.has(Part::Notrack);
        self.v6 &= !lacks.has(Part::Ipv6);
        self.counted &= !lacks.has(Part::Count);
        self
    }
}

/// Addresses that are captured besides the declared ports, and exempt addresses: a few that seldom change.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Places {
    pub vips: BTreeSet<IpAddr>,
    /// Addresses that are captured on declared ports only, with any scope: the host's own services listen there too.
    pub own: BTreeSet<IpAddr>,
    /// Servers on a VIP to which embassy connects: connections from this host to them are not captured, even if a binding
    /// declares the port. Otherwise embassy's own request to a registry would wait for the registry's answer.
    pub spared: BTreeSet<SocketAddr>,
    /// The networks in which an unknown container may have its address.
    pub networks: BTreeSet<IpNet>,
    /// Networks to whose members our own connections are not tracked. These are bridges of this host: packets to them have the
    /// bridge's own address and are not translated. Packets to other destinations may need translation, and so connection
    /// tracking.
    pub untracked: BTreeSet<IpNet>,
}

impl Places {
    pub fn of(table: &Table, settings: &RuleSettings) -> Self {
        let vips: BTreeSet<_> = table.vips().iter().map(|vip| vip.0).collect();
        let networks = |wanted| if wanted { table.networks().clone() } else { BTreeSet::new() };
        Self {
            spared: settings
                .servers
                .iter()
                .copied()
                .filter(|server| settings.redirect && vips.contains(&server.ip()))
                .collect(),
            own: settings.own.iter().copied().filter(|own| !vips.contains(own)).collect(),
            vips,
            networks: networks(settings.captures_unknown()),
            untracked: networks(settings.leaves_untracked()),
        }
    }

    /// The exempt servers whose port a consumer on this host declared: it reaches them instead of the service.
    pub fn shadowed(&self, table: &Table) -> impl Iterator<Item = SocketAddr> {
        // A host's connection to its own address has this address as its source.
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
    pub places: Places,
    /// Which consumer is captured on which port.
    pub declared: BTreeSet<RouteKey>,
    /// Addresses of known containers, which are captured on declared ports only.
    pub known: BTreeSet<IpAddr>,
}

impl Rules {
    pub fn of(table: &Table, settings: &RuleSettings) -> Self {
        Self {
            shape: Shape::of(settings),
            places: Places::of(table, settings),
            declared: table.routes().map(|route| route.key).filter(is_captured).collect(),
            known: if settings.captures_unknown() {
                table.known().clone()
            } else {
                BTreeSet::new()
            },
        }
    }
}

/// Whether a route needs a rule.
fn is_captured(key: &RouteKey) -> bool {
    match key.protocol {
        Protocol::Tcp => true,
    }
}

/// The differences to the previous rules.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RuleChanges {
    pub declared_added: Vec<RouteKey>,
    pub declared_removed: Vec<RouteKey>,
    pub known_added: Vec<IpAddr>,
    pub known_removed: Vec<IpAddr>,
    /// The values before and now, if they differ.
    pub places: Option<Box<(Places, Places)>>,
}

impl RuleChanges {
    /// From the rules of one table to those of another, by what changed between the two.
    pub fn of(changes: &Changes, settings: &RuleSettings) -> Self {
        let keys = |routes: &[Arc<Route>]| {
            routes.iter().map(|route| route.key).filter(is_captured).collect::<Vec<_>>()
        };
        let (added, removed) = (keys(&changes.added), keys(&changes.removed));
        // If an address and port changed their owner, the rule stays the same. Both lists are sorted.
        let is_not_in = |others: &[RouteKey], key: &RouteKey| others.binary_search(key).is_err();
        let mut found = Self {
            declared_added: added.iter().filter(|key| is_not_in(&removed, key)).copied().collect(),
            declared_removed: removed
                .iter()
                .filter(|key| is_not_in(&added, key))
                .copied()
                .collect(),
            ..Self::default()
        };
        if settings.captures_unknown() {
            found.known_added.clone_from(&changes.known_added);
            found.known_removed.clone_from(&changes.known_removed);
        }
        found
    }

    /// The same, with other places.
    pub fn with_places(mut self, before: &Places, now: &Places) -> Self {
        self.places = (before != now).then(|| Box::new((before.clone(), now.clone())));
        self
    }

    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Where in a packet's way the kernel calls chains.
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
    /// nft's word for it, and the name of our chain that translates there.
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

    /// The same if unknown containers are captured too.
    pub(in crate::capture) fn with_unknown(mut rules: Rules) -> Rules {
        rules.shape.unknown = true;
        rules.places.networks =
            ["172.17.0.0/16", "fd00::/64"].map(|text| text.parse().unwrap()).into();
        rules.known = ["172.17.0.2", "fd00::2"].map(|text| text.parse().unwrap()).into();
        rules
    }

    /// The same if our own connections to near endpoints are not tracked.
    pub(in crate::capture) fn with_untracked(mut rules: Rules) -> Rules {
        rules.shape.notrack = true;
        rules.places.untracked = ["172.17.0.0/16".parse().unwrap()].into();
        rules
    }

    /// Two consumers, both families, a VIP of each.
    pub(in crate::capture) fn example(redirect: bool, scope: CaptureScope) -> Rules {
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let declared =
            [("172.17.0.2", 6379), ("172.17.0.2", 80), ("172.18.0.5", 6379), ("fd00::2", 80)];
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
                priority: PRIORITY,
            },
            places: Places {
                vips: ["172.17.0.1", "fd00::1"].map(address).into(),
                own: own.into_iter().collect(),
                spared: spared.into_iter().collect(),
                ..Places::default()
            },
            declared: declared
                .map(|(source, port)| RouteKey::tcp(address(source), Port::new(port).unwrap()))
                .into(),
            known: BTreeSet::new(),
        }
    }
}
