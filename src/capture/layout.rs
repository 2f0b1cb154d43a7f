//! Our nf_tables table: its sets, its chains and what they hold, as a description that is written to the kernel as messages
//! and shown to people in the language of the `nft` program. Pure.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;

use super::rules::{Hook, MARK, Places, RuleChanges, Rules, Shape};
use crate::{config::CaptureScope, table::RouteKey};

/// An address family. It begins an expression, and ends the names of its sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    pub(super) const ALL: [Self; 2] = [Self::V4, Self::V6];

    fn of(address: &IpAddr) -> Self {
        if address.is_ipv6() { Self::V6 } else { Self::V4 }
    }

    pub(super) fn nft(self) -> &'static str {
        match self {
            Self::V4 => "ip",
            Self::V6 => "ip6",
        }
    }

    fn number(self) -> u8 {
        match self {
            Self::V4 => 4,
            Self::V6 => 6,
        }
    }
}

/// What a set is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Members {
    Vips,
    Own,
    Declared,
    Spared,
    Known,
    Networks,
    Near,
}

/// What the elements of a set are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Key {
    Address,
    AddressPort,
    Range,
}

/// One of our sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Set {
    pub(super) members: Members,
    pub(super) family: Family,
}

impl Set {
    pub(super) fn key(self) -> Key {
        match self.members {
            Members::Vips | Members::Own | Members::Known => Key::Address,
            Members::Declared | Members::Spared => Key::AddressPort,
            Members::Networks | Members::Near => Key::Range,
        }
    }
}

impl fmt::Display for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.members {
            Members::Vips => "vips",
            Members::Own => "own",
            Members::Declared => "declared",
            Members::Spared => "spared",
            Members::Known => "known",
            Members::Networks => "networks",
            Members::Near => "near",
        };
        write!(f, "{name}{}", self.family.number())
    }
}

/// An element of a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Element {
    Address(IpAddr),
    AddressPort(IpAddr, u16),
    /// The first address and the last.
    Range(IpAddr, IpAddr),
}

impl Element {
    /// What a route is captured by: the one place that knows what a rule matches of a connection.
    fn of_route(key: &RouteKey) -> Self {
        Self::AddressPort(key.source, key.port.get())
    }

    fn family(&self) -> Family {
        match self {
            Self::Address(address) | Self::AddressPort(address, _) | Self::Range(address, _) => {
                Family::of(address)
            }
        }
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => write!(f, "{address}"),
            Self::AddressPort(address, port) => write!(f, "{address} . {port}"),
            Self::Range(first, last) => {
                let net = IpNet::new(*first, 0).ok().and_then(|any| {
                    let lengths = 0..=any.max_prefix_len();
                    lengths
                        .filter_map(|length| IpNet::new(*first, length).ok())
                        .find(|net| net.network() == *first && net.broadcast() == *last)
                });
                match net {
                    Some(net) if first == last => write!(f, "{}", net.addr()),
                    Some(net) => write!(f, "{net}"),
                    None => write!(f, "{first}-{last}"),
                }
            }
        }
    }
}

/// A part of a rule: what it matches or does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Term {
    /// The address is in the set.
    Address(Side, Set),
    AddressNot(Side, Set),
    /// The address and the TCP port that is dialled are.
    AddressPort(Side, Set),
    Tcp,
    Dport(u16),
    /// The first packet of a connection.
    Syn,
    /// The connection was captured, or translated by another program.
    Translated,
    MetaMark(u32),
    SocketMark(u32),
    /// The packet goes out by (or came in by) another interface than loopback.
    NotLoopback(Direction),
    /// A socket of this host listens or is connected there: on all addresses (`true`), or on this one.
    Socket(bool),
    Counter,
    Accept,
    Return,
    Jump(&'static str),
    Redirect(u16),
    Notrack,
}

/// Which of a packet's interfaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    In,
    Out,
}

/// Which of a packet's addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Source,
    Destination,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "saddr",
            Self::Destination => "daddr",
        })
    }
}

/// Where in a packet's way the kernel calls a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Base {
    pub(super) kind: BaseKind,
    pub(super) hook: Hook,
    pub(super) priority: i32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BaseKind {
    Nat,
    Filter,
}

impl BaseKind {
    pub(super) fn nft(self) -> &'static str {
        match self {
            Self::Nat => "nat",
            Self::Filter => "filter",
        }
    }
}

/// One of our chains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chain {
    pub(super) name: &'static str,
    /// `None`: others jump to it.
    pub(super) base: Option<Base>,
    pub(super) rules: Vec<Vec<Term>>,
}

/// Two chains for captured connections that arrive on this host: before and after all other chains of that hook.
pub(super) const ARRIVING: &str = "arriving";
pub(super) const ARRIVED: &str = "arrived";

/// Before connection tracking, which is at -200.
const RAW: i32 = -300;
/// Before and after all other chains.
const FIRST: i32 = -2_000_000_000;
const LAST: i32 = 2_000_000_000;

/// All our sets.
pub(super) fn sets(shape: &Shape) -> impl Iterator<Item = Set> + use<> {
    let Shape { redirect, unknown, notrack, .. } = *shape;
    let families = families(shape);
    let wanted = [
        (Members::Vips, true),
        (Members::Own, redirect),
        (Members::Declared, true),
        (Members::Spared, redirect),
        (Members::Known, unknown),
        (Members::Networks, unknown),
        (Members::Near, notrack),
    ];
    wanted
        .into_iter()
        .filter(|(_, wanted)| *wanted)
        .flat_map(move |(members, _)| families.iter().map(move |&family| Set { members, family }))
}

/// The families that are captured.
fn families(shape: &Shape) -> &'static [Family] {
    if shape.v6 { &Family::ALL } else { &[Family::V4] }
}

/// What a set of these rules holds. Sorted.
pub(super) fn elements(set: Set, rules: &Rules) -> Vec<Element> {
    match set.members {
        Members::Declared => of_family(set.family, rules.declared.iter().map(Element::of_route)),
        Members::Known => of_family(set.family, rules.known.iter().copied().map(Element::Address)),
        _ => in_places(set, &rules.places),
    }
}

fn of_family(family: Family, all: impl Iterator<Item = Element>) -> Vec<Element> {
    all.filter(|element| element.family() == family).collect()
}

fn in_places(set: Set, places: &Places) -> Vec<Element> {
    let addresses = |all: &std::collections::BTreeSet<IpAddr>| {
        of_family(set.family, all.iter().copied().map(Element::Address))
    };
    match set.members {
        Members::Vips => addresses(&places.vips),
        Members::Own => addresses(&places.own),
        Members::Spared => {
            let spared = places.spared.iter();
            let spared = spared.map(|server| Element::AddressPort(server.ip(), server.port()));
            of_family(set.family, spared)
        }
        Members::Networks => ranges(set.family, places.networks.iter()),
        Members::Near => ranges(set.family, places.untracked.iter()),
        Members::Declared | Members::Known => Vec::new(),
    }
}

/// Ranges that neither overlap nor touch: the kernel's sets of ranges hold no others.
fn ranges<'a>(family: Family, nets: impl Iterator<Item = &'a IpNet>) -> Vec<Element> {
    let nets = nets.filter(|net| Family::of(&net.addr()) == family);
    let mut bounds: Vec<_> = nets.map(|net| (net.network(), net.broadcast())).collect();
    bounds.sort();
    let mut merged: Vec<(IpAddr, IpAddr)> = Vec::new();
    for (first, last) in bounds {
        match merged.last_mut() {
            Some((_, end)) if first <= *end || after(*end) == Some(first) => *end = last.max(*end),
            _ => merged.push((first, last)),
        }
    }
    merged.into_iter().map(|(first, last)| Element::Range(first, last)).collect()
}

/// The next address; `None` after the last of its family.
pub(super) fn after(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(v4) => v4.to_bits().checked_add(1).map(Ipv4Addr::from_bits).map(IpAddr::V4),
        IpAddr::V6(v6) => v6.to_bits().checked_add(1).map(Ipv6Addr::from_bits).map(IpAddr::V6),
    }
}

/// What changes in a set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Edit {
    pub(super) set: Set,
    pub(super) removed: Vec<Element>,
    pub(super) added: Vec<Element>,
}

/// What `changes` change in each set that they touch.
pub(super) fn edits(changes: &RuleChanges, shape: &Shape) -> Vec<Edit> {
    let edit = |set: Set| {
        let (removed, added) = match (set.members, &changes.places) {
            (Members::Declared, _) => {
                let keys =
                    |all: &[RouteKey]| of_family(set.family, all.iter().map(Element::of_route));
                (keys(&changes.declared_removed), keys(&changes.declared_added))
            }
            (Members::Known, _) => {
                let addresses = |all: &[IpAddr]| {
                    of_family(set.family, all.iter().copied().map(Element::Address))
                };
                (addresses(&changes.known_removed), addresses(&changes.known_added))
            }
            (_, Some(places)) => {
                let (before, now) = (in_places(set, &places.0), in_places(set, &places.1));
                let only = |these: &[Element], others: &[Element]| {
                    these.iter().filter(|e| !others.contains(e)).copied().collect::<Vec<_>>()
                };
                (only(&before, &now), only(&now, &before))
            }
            (_, None) => (Vec::new(), Vec::new()),
        };
        Edit { set, removed, added }
    };
    let touched = |edit: &Edit| !edit.removed.is_empty() || !edit.added.is_empty();
    sets(shape).map(edit).filter(touched).collect()
}

/// All our chains, the jump targets first.
pub(super) fn chains(shape: &Shape) -> Vec<Chain> {
    use Side::{Destination, Source};
    let of = |members| move |family| Set { members, family };
    let (vips, declared) = (of(Members::Vips), of(Members::Declared));
    let redirect = Term::Redirect(shape.port);
    let nat = |hook| Base { kind: BaseKind::Nat, hook, priority: shape.priority };
    let families = families(shape);
    let each = |rule: &dyn Fn(Family) -> Vec<Term>| families.iter().copied().map(rule).collect();

    let mut chains = Vec::new();
    if shape.unknown {
        // What listens on this host stays reachable for those who may turn out to be no consumers.
        let rules = [
            vec![Term::Socket(false), Term::Accept],
            vec![Term::Socket(true), Term::Accept],
            vec![redirect],
        ];
        let rules = rules.map(|rule| [vec![Term::Tcp], rule].concat()).to_vec();
        chains.push(Chain { name: "unknown", base: None, rules });
    }
    let rules: Vec<_> = each(&|family| {
        let declared = Term::AddressPort(Source, declared(family));
        vec![Term::Address(Destination, vips(family)), declared, redirect]
    });
    chains.push(Chain { name: "declared", base: None, rules });

    let mut rules = vec![vec![Term::Jump("declared")]];
    for &family in families {
        if shape.redirect {
            let own = Term::Address(Destination, of(Members::Own)(family));
            rules.push(vec![own, Term::AddressPort(Source, declared(family)), redirect]);
        }
        let vip = Term::Address(Destination, vips(family));
        if shape.scope == CaptureScope::All {
            rules.push(vec![vip, Term::Tcp, redirect]);
        }
        if shape.unknown {
            let near = Term::Address(Source, of(Members::Networks)(family));
            let stranger = Term::AddressNot(Source, of(Members::Known)(family));
            rules.push(vec![vip, near, stranger, Term::Jump("unknown")]);
        }
    }
    chains.push(Chain { name: "prerouting", base: Some(nat(Hook::Prerouting)), rules });

    if shape.redirect {
        let mut rules = vec![vec![Term::MetaMark(MARK), Term::Return]];
        let spared: Vec<_> = each(&|family| {
            let spared = Term::AddressPort(Destination, of(Members::Spared)(family));
            vec![spared, Term::Return]
        });
        rules.extend(spared);
        rules.push(vec![Term::Jump("declared")]);
        chains.push(Chain { name: "output", base: Some(nat(Hook::Output)), rules });
    }
    if shape.notrack {
        // Our own connections pass connection tracking by. What comes back is known by the socket that it belongs to: others
        // on this host may have connections to the same endpoints, translated ones even. A connection to an address of this
        // host itself stays tracked: the engine may translate it, as it does to reach a published port.
        for (name, hook, side, away, mark) in [
            (
                "untracked_out",
                Hook::Output,
                Destination,
                Term::NotLoopback(Direction::Out),
                Term::MetaMark(MARK),
            ),
            (
                "untracked_in",
                Hook::Prerouting,
                Source,
                Term::NotLoopback(Direction::In),
                Term::SocketMark(MARK),
            ),
        ] {
            let rules = each(&|family| {
                let near = Term::Address(side, of(Members::Near)(family));
                vec![near, Term::Tcp, away, mark, Term::Notrack]
            });
            let base = Base { kind: BaseKind::Filter, hook, priority: RAW };
            chains.push(Chain { name, base: Some(base), rules });
        }
    }
    if shape.counted {
        chains.extend(counting(shape.port));
    }
    chains
}

/// The chains that count captured connections before and after all chains of others.
pub(super) fn counting(port: u16) -> [Chain; 2] {
    [(ARRIVING, FIRST), (ARRIVED, LAST)].map(|(name, priority)| watch(name, priority, port))
}

/// Counts captured connections on their way to our listener. If the first of two such chains counts more than the last,
/// a rule between them drops. The rule matches the connection state, which also keeps connection tracking on.
pub(super) fn watch(name: &'static str, priority: i32, port: u16) -> Chain {
    let base = Base { kind: BaseKind::Filter, hook: Hook::Input, priority };
    let rule = vec![Term::Dport(port), Term::Translated, Term::Syn, Term::Counter];
    Chain { name, base: Some(base), rules: vec![rule] }
}

/// What keeps live connections translated once nothing is captured any more: chains without a rule that translates. Without
/// any, the kernel would switch translation off, and connection tracking with it.
pub(super) fn remains(shape: &Shape) -> Vec<Chain> {
    let hooks = [Some(Hook::Prerouting), shape.redirect.then_some(Hook::Output)];
    let nat = |hook: Hook| {
        let base = Base { kind: BaseKind::Nat, hook, priority: shape.priority };
        Chain { name: hook.nft(), base: Some(base), rules: Vec::new() }
    };
    let nat = hooks.into_iter().flatten().map(nat);
    nat.chain(shape.counted.then(|| watch(ARRIVING, FIRST, shape.port))).collect()
}
