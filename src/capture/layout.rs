//! Our nf_tables tables as a description: their sets, their chains and the content of both. It is written to the kernel as
//! messages, and shown to people in the language of the `nft` program. Pure.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;

use super::rules::{Declared, ExtraAddresses, Hook, MARK, RuleChanges, Rules, Shape};
use crate::{
    config::{CaptureScope, Guard},
    wiring::{Arrival, Interface, Mac, Wiring},
};

/// One of our tables: `inet embassy`, or `bridge embassy` for the guard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Home {
    Inet,
    Bridge,
}

impl Home {
    pub(super) const ALL: [Self; 2] = [Self::Inet, Self::Bridge];

    pub(super) fn nft(self) -> &'static str {
        match self {
            Self::Inet => "inet",
            Self::Bridge => "bridge",
        }
    }
}

/// The tables that rules of this shape have.
pub(super) fn homes(shape: &Shape) -> &'static [Home] {
    if shape.guard == Guard::Off { &[Home::Inet] } else { &Home::ALL }
}

/// An address family. Its text is the start of an nft expression, and its number the suffix of the names of its sets.
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

/// The purpose of a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SetUse {
    Vips,
    Own,
    /// VIPs and own addresses that are on none of the engine's bridges.
    Outer,
    /// VIPs of which every TCP port is captured, by whichever interface connections arrive.
    Everywhere,
    /// The interfaces of the engine's bridges.
    Bridges,
    /// Routes: captured on one interface; on every interface; on every interface except the bridges; if this host sends it.
    Declared,
    Anywhere,
    Outside,
    Sent,
    Spared,
    Known,
    Networks,
    /// The same networks with their interfaces.
    Segments,
    Near,
    /// For the guard: the captured addresses; the addresses that containers own; the bridge ports on which these addresses
    /// may arrive.
    Targets,
    Owned,
    Ports,
    /// The ports of the engine's bridges; those whose Ethernet address is known; and these Ethernet addresses.
    Guarded,
    Sealed,
    Macs,
    /// Noted by the kernel: which port used which address, and which port sent a frame that no container sends.
    Forgers,
    Offenders,
}

/// The type of a set's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ElementKey {
    Address,
    AddressPort,
    Range,
    Interface,
    InterfaceAddressPort,
    InterfaceRange,
    Index,
    IndexAddress,
    IndexMac,
}

/// One of our sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Set {
    pub(super) members: SetUse,
    /// `None`: the elements contain no addresses.
    pub(super) family: Option<Family>,
}

impl Set {
    pub(super) fn of(members: SetUse, family: Family) -> Self {
        Self { members, family: Some(family) }
    }

    pub(super) fn without_family(members: SetUse) -> Self {
        Self { members, family: None }
    }

    pub(super) fn key(self) -> ElementKey {
        match self.members {
            SetUse::Vips
            | SetUse::Own
            | SetUse::Outer
            | SetUse::Everywhere
            | SetUse::Known
            | SetUse::Targets
            | SetUse::Owned => ElementKey::Address,
            SetUse::Anywhere | SetUse::Outside | SetUse::Sent | SetUse::Spared => {
                ElementKey::AddressPort
            }
            SetUse::Declared => ElementKey::InterfaceAddressPort,
            SetUse::Networks | SetUse::Near => ElementKey::Range,
            SetUse::Segments => ElementKey::InterfaceRange,
            SetUse::Bridges => ElementKey::Interface,
            SetUse::Guarded | SetUse::Sealed | SetUse::Offenders => ElementKey::Index,
            SetUse::Ports | SetUse::Forgers => ElementKey::IndexAddress,
            SetUse::Macs => ElementKey::IndexMac,
        }
    }

    pub(super) fn home(self) -> Home {
        match self.members {
            SetUse::Targets
            | SetUse::Owned
            | SetUse::Ports
            | SetUse::Guarded
            | SetUse::Sealed
            | SetUse::Macs
            | SetUse::Forgers
            | SetUse::Offenders => Home::Bridge,
            _ => Home::Inet,
        }
    }

    /// Whether the guard drops what this set contains, unless [`Set::lets_pass`] allows it.
    pub(super) fn binds(self) -> bool {
        matches!(self.members, SetUse::Owned | SetUse::Sealed)
    }

    pub(super) fn lets_pass(self) -> bool {
        matches!(self.members, SetUse::Ports | SetUse::Macs)
    }

    /// Whether the kernel adds the elements, from packets.
    pub(super) fn is_noted(self) -> bool {
        matches!(self.members, SetUse::Forgers | SetUse::Offenders)
    }
}

impl fmt::Display for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.members {
            SetUse::Vips | SetUse::Targets => "vips",
            SetUse::Own => "own",
            SetUse::Outer => "outer",
            SetUse::Everywhere => "everywhere",
            SetUse::Bridges => "bridges",
            SetUse::Declared => "declared",
            SetUse::Anywhere => "anywhere",
            SetUse::Outside => "outside",
            SetUse::Sent => "sent",
            SetUse::Spared => "spared",
            SetUse::Known => "known",
            SetUse::Networks => "networks",
            SetUse::Segments => "segments",
            SetUse::Near => "near",
            SetUse::Owned => "owned",
            SetUse::Ports => "ports",
            SetUse::Guarded => "guarded",
            SetUse::Sealed => "sealed",
            SetUse::Macs => "macs",
            SetUse::Forgers => "forgers",
            SetUse::Offenders => "offenders",
        };
        f.write_str(name)?;
        self.family.map_or(Ok(()), |family| write!(f, "{}", family.number()))
    }
}

/// An element of a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Element {
    Address(IpAddr),
    AddressPort(IpAddr, u16),
    /// The first and the last address.
    Range(IpAddr, IpAddr),
    Interface(Interface),
    InterfaceAddressPort(Interface, IpAddr, u16),
    InterfaceRange(Interface, IpAddr, IpAddr),
    /// The number of an interface.
    Index(u32),
    IndexAddress(u32, IpAddr),
    IndexMac(u32, Mac),
}

impl Element {
    /// The element of a route in this set. `None`: the route is not in it. This function alone decides what a rule matches.
    fn of_route(Declared { key, arrival }: &Declared, members: SetUse) -> Option<Self> {
        let (source, port) = (key.source, key.port.get());
        match (members, arrival) {
            (SetUse::Declared, Arrival::By(interface)) => {
                Some(Self::InterfaceAddressPort(*interface, source, port))
            }
            // Connections from this host have no interface on which they arrived.
            (SetUse::Anywhere, Arrival::Anywhere)
            | (SetUse::Outside, Arrival::Outside)
            | (SetUse::Sent, _) => Some(Self::AddressPort(source, port)),
            _ => None,
        }
    }

    /// `None`: the element contains no address.
    fn family(&self) -> Option<Family> {
        match self {
            Self::Address(address)
            | Self::AddressPort(address, _)
            | Self::Range(address, _)
            | Self::InterfaceAddressPort(_, address, _)
            | Self::InterfaceRange(_, address, _)
            | Self::IndexAddress(_, address) => Some(Family::of(address)),
            Self::Interface(_) | Self::Index(_) | Self::IndexMac(..) => None,
        }
    }
}

/// A range in the form of the `nft` program.
fn range(f: &mut fmt::Formatter<'_>, first: &IpAddr, last: &IpAddr) -> fmt::Result {
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

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => write!(f, "{address}"),
            Self::AddressPort(address, port) => write!(f, "{address} . {port}"),
            Self::Range(first, last) => range(f, first, last),
            Self::Interface(name) => write!(f, "\"{name}\""),
            Self::InterfaceAddressPort(name, address, port) => {
                write!(f, "\"{name}\" . {address} . {port}")
            }
            Self::InterfaceRange(name, first, last) => {
                write!(f, "\"{name}\" . ")?;
                range(f, first, last)
            }
            Self::Index(index) => write!(f, "{index}"),
            Self::IndexAddress(index, address) => write!(f, "{index} . {address}"),
            Self::IndexMac(index, mac) => write!(f, "{index} . {mac}"),
        }
    }
}

/// A part of a rule: what it matches or does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Term {
    /// The address is in the set of this family; and the opposite.
    Address(Side, Family, SetUse),
    AddressNot(Side, Family, SetUse),
    /// The address together with the TCP destination port is in the set.
    AddressPort(Side, Family, SetUse),
    /// The arrival interface, the source address and the TCP destination port are in the set.
    InterfaceAddressPort(Family, SetUse),
    /// The arrival interface and the source address are in the set.
    InterfaceAddress(Family, SetUse),
    /// The arrival interface is not in the set; and the opposite.
    InterfaceNot(SetUse),
    Interface(SetUse),
    /// Bridges: the frame has this EtherType.
    Carries(u16),
    /// The port on which the frame arrived is in the set.
    Port(SetUse),
    /// The arrival port together with the sender's address in this field is not in the set.
    PortNot(SenderField, SetUse),
    /// The sender's address in this field is in the set.
    Claimed(SenderField, SetUse),
    /// Any ICMPv6; a neighbour advertisement (RFC 4861, 4.4).
    Icmp6,
    Advertisement,
    /// Note the arrival port with the source address; note the port alone.
    NoteSource(Family),
    NotePort,
    Drop,
    /// Answer the connection by a reset.
    Reject,
    Tcp,
    Dport(u16),
    /// The first packet of a connection.
    Syn,
    /// The connection was captured, or translated by another program.
    Translated,
    NotTranslated,
    MetaMark(u32),
    SocketMark(u32),
    /// The packet leaves by (or arrived on) another interface than loopback.
    NotLoopback(InterfaceSide),
    /// A socket of this host listens or is connected there: on all addresses (`true`), or on this address.
    Socket(bool),
    Counter,
    Accept,
    Return,
    Jump(&'static str),
    Redirect(u16),
    Notrack,
}

/// The field of a frame with the sender's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SenderField {
    /// The source address of IP.
    Source(Family),
    /// The sender of an ARP message.
    Arp,
    /// The target of a neighbour advertisement.
    Target,
    /// The Ethernet source address.
    Mac,
}

impl SenderField {
    /// The set of this purpose for this field.
    pub(super) fn set(self, members: SetUse) -> Set {
        match self {
            Self::Source(family) => Set::of(members, family),
            Self::Arp => Set::of(members, Family::V4),
            Self::Target => Set::of(members, Family::V6),
            Self::Mac => Set::without_family(members),
        }
    }
}

/// EtherTypes of frames with a VLAN tag (include/uapi/linux/if_ether.h).
pub(super) const VLAN: [u16; 2] = [0x8100, 0x88a8];

/// The input or the output interface of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum InterfaceSide {
    In,
    Out,
}

/// The source or the destination address of a packet.
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

/// The hook and the priority at which the kernel calls a chain.
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
    pub(super) home: Home,
    pub(super) name: &'static str,
    /// `None`: the kernel does not call the chain, other chains jump to it.
    pub(super) base: Option<Base>,
    pub(super) rules: Vec<Vec<Term>>,
}

/// Two chains that count captured connections that arrive on this host: before and after all other chains of the hook.
pub(super) const ARRIVING: &str = "arriving";
pub(super) const ARRIVED: &str = "arrived";
/// The chain that refuses connections to our port that were not captured.
pub(super) const DIRECT: &str = "direct";
/// The guard's chains that drop, each with a counter.
pub(super) const DROPPING: [&str; 3] = ["spoofed4", "spoofed6", "offending"];
/// The maximum number of noted ports and addresses, and the lifetime of a note in ms.
pub(super) const NOTED: u32 = 1024;
pub(super) const NOTED_FOR: u64 = 3_600_000;

/// Before connection tracking, which is at -200.
const RAW: i32 = -300;
/// Before and after all other chains.
const FIRST: i32 = -2_000_000_000;
const LAST: i32 = 2_000_000_000;

/// All our sets.
pub(super) fn sets(shape: &Shape) -> impl Iterator<Item = Set> + use<> {
    let Shape { redirect, unknown, notrack, scope, guard, .. } = *shape;
    let guards = guard != Guard::Off;
    let families = families(shape);
    let wanted = [
        (SetUse::Vips, true),
        (SetUse::Own, redirect),
        (SetUse::Outer, true),
        (SetUse::Everywhere, scope == CaptureScope::All),
        (SetUse::Declared, true),
        (SetUse::Anywhere, true),
        (SetUse::Outside, true),
        (SetUse::Sent, redirect),
        (SetUse::Spared, redirect),
        (SetUse::Known, unknown),
        (SetUse::Networks, unknown),
        (SetUse::Segments, unknown),
        (SetUse::Near, notrack),
        (SetUse::Targets, guards),
        (SetUse::Owned, guards),
        (SetUse::Ports, guards),
        (SetUse::Forgers, guards),
    ];
    let without_family = [
        (SetUse::Bridges, true),
        (SetUse::Guarded, guards),
        (SetUse::Offenders, guards),
        (SetUse::Sealed, guard == Guard::Full),
        (SetUse::Macs, guard == Guard::Full),
    ];
    let without_family = without_family.into_iter().filter(|(_, wanted)| *wanted);
    wanted
        .into_iter()
        .filter(|(_, wanted)| *wanted)
        .flat_map(move |(members, _)| families.iter().map(move |&family| Set::of(members, family)))
        .chain(without_family.map(|(members, _)| Set::without_family(members)))
}

/// The address families that are captured.
fn families(shape: &Shape) -> &'static [Family] {
    if shape.v6 { &Family::ALL } else { &[Family::V4] }
}

/// The elements of a set, sorted.
pub(super) fn elements(set: Set, rules: &Rules) -> Vec<Element> {
    match set.home() {
        Home::Bridge if set.members != SetUse::Targets => of_wiring(set, &rules.wiring),
        _ => match set.members {
            SetUse::Declared | SetUse::Anywhere | SetUse::Outside | SetUse::Sent => {
                let declared = rules.declared.iter();
                let mut all = of_family(
                    set.family,
                    declared.filter_map(|one| Element::of_route(one, set.members)),
                );
                all.sort();
                all
            }
            SetUse::Known => {
                of_family(set.family, rules.known.iter().copied().map(Element::Address))
            }
            _ => in_places(set, &rules.places),
        },
    }
}

fn of_family(family: Option<Family>, all: impl Iterator<Item = Element>) -> Vec<Element> {
    all.filter(|element| element.family() == family).collect()
}

/// The elements of one of the guard's sets, sorted.
fn of_wiring(set: Set, wiring: &Wiring) -> Vec<Element> {
    let owners = || wiring.owners.iter();
    // Two addresses of a container are usually on the same port, with the same Ethernet address.
    let sealed = || {
        let macs = owners().filter_map(|(_, owner)| Some((owner.mac?, owner)));
        macs.flat_map(|(mac, owner)| owner.ports.iter().map(move |port| (*port, mac)))
    };
    let mut all: Vec<_> = match set.members {
        SetUse::Owned => {
            of_family(set.family, owners().map(|(address, _)| Element::Address(*address)))
        }
        SetUse::Ports => {
            let ports = owners().flat_map(|(address, owner)| {
                owner.ports.iter().map(|port| Element::IndexAddress(*port, *address))
            });
            of_family(set.family, ports)
        }
        SetUse::Guarded => wiring.ports.iter().copied().map(Element::Index).collect(),
        SetUse::Sealed => sealed().map(|(port, _)| Element::Index(port)).collect(),
        SetUse::Macs => sealed().map(|(port, mac)| Element::IndexMac(port, mac)).collect(),
        _ => Vec::new(),
    };
    all.sort();
    all.dedup();
    all
}

fn in_places(set: Set, places: &ExtraAddresses) -> Vec<Element> {
    let addresses = |all: &std::collections::BTreeSet<IpAddr>| {
        of_family(set.family, all.iter().copied().map(Element::Address))
    };
    match set.members {
        SetUse::Vips => addresses(&places.vips),
        SetUse::Own => addresses(&places.own),
        SetUse::Targets => {
            let all: std::collections::BTreeSet<_> =
                places.vips.union(&places.own).copied().collect();
            addresses(&all)
        }
        SetUse::Outer => addresses(&places.outer),
        SetUse::Everywhere => addresses(&places.everywhere),
        SetUse::Bridges => places.bridges.iter().copied().map(Element::Interface).collect(),
        SetUse::Segments => segments(set.family, &places.segments),
        SetUse::Spared => {
            let spared = places.spared.iter();
            let spared = spared.map(|server| Element::AddressPort(server.ip(), server.port()));
            of_family(set.family, spared)
        }
        SetUse::Networks => ranges(set.family, places.networks.iter()),
        SetUse::Near => ranges(set.family, places.untracked.iter()),
        _ => Vec::new(),
    }
}

/// The ranges of each interface. The ranges of one interface neither overlap nor touch.
fn segments(
    family: Option<Family>,
    all: &std::collections::BTreeSet<(Interface, IpNet)>,
) -> Vec<Element> {
    let of_one = |part: &[&(Interface, IpNet)]| {
        let interface = part.first().map(|(interface, _)| *interface);
        let ranges = ranges(family, part.iter().map(|(_, net)| net));
        let ranges = ranges.into_iter().filter_map(move |range| match range {
            Element::Range(first, last) => Some(Element::InterfaceRange(interface?, first, last)),
            _ => None,
        });
        ranges.collect::<Vec<_>>()
    };
    // The elements are sorted by interface.
    let all: Vec<_> = all.iter().collect();
    all.chunk_by(|(one, _), (other, _)| one == other).flat_map(of_one).collect()
}

/// Ranges that neither overlap nor touch: the kernel's sets of ranges accept no others.
fn ranges<'a>(family: Option<Family>, nets: impl Iterator<Item = &'a IpNet>) -> Vec<Element> {
    let nets = nets.filter(|net| Some(Family::of(&net.addr())) == family);
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

/// The changes of a set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Edit {
    pub(super) set: Set,
    pub(super) removed: Vec<Element>,
    pub(super) added: Vec<Element>,
}

/// The elements that only `before` has, and those that only `now` has. Both are sorted.
fn differences(before: &[Element], now: &[Element]) -> (Vec<Element>, Vec<Element>) {
    let only = |these: &[Element], others: &[Element]| {
        these.iter().filter(|one| others.binary_search(one).is_err()).copied().collect()
    };
    (only(before, now), only(now, before))
}

/// The edits of each set that `changes` affect.
pub(super) fn edits(changes: &RuleChanges, shape: &Shape) -> Vec<Edit> {
    // Usually one of thousands of addresses changes its port: only the differences are compared.
    let owners = changes.wiring.as_ref().map(|(before, now)| Wiring::other_owners(before, now));
    // Another address may still be on the same port.
    let on_ports = changes.wiring.as_ref().zip(owners.as_ref());
    let on_ports = on_ports.map(|((before, now), (gone, new))| {
        let owners = gone.owners.values().chain(new.owners.values());
        let ports = owners.flat_map(|owner| &owner.ports).copied().collect();
        (before.on_ports(&ports), now.on_ports(&ports))
    });
    let edit = |set: Set| {
        let (removed, added) = match set.members {
            SetUse::Declared | SetUse::Anywhere | SetUse::Outside | SetUse::Sent => {
                let keys = |all: &[Declared]| {
                    let elements = all.iter().filter_map(|one| Element::of_route(one, set.members));
                    let mut all = of_family(set.family, elements);
                    all.sort();
                    all
                };
                // If only the arrival interface changed, the element for sent connections stays the same.
                differences(&keys(&changes.declared_removed), &keys(&changes.declared_added))
            }
            SetUse::Known => {
                let addresses = |all: &[IpAddr]| {
                    of_family(set.family, all.iter().copied().map(Element::Address))
                };
                (addresses(&changes.known_removed), addresses(&changes.known_added))
            }
            SetUse::Owned | SetUse::Ports => {
                owners.as_ref().map_or_else(Default::default, |(before, now)| {
                    differences(&of_wiring(set, before), &of_wiring(set, now))
                })
            }
            _ if set.home() == Home::Bridge && set.members != SetUse::Targets => {
                on_ports.as_ref().map_or_else(Default::default, |(before, now)| {
                    differences(&of_wiring(set, before), &of_wiring(set, now))
                })
            }
            _ => {
                let both = changes.places.as_deref();
                both.map_or_else(Default::default, |(before, now)| {
                    differences(&in_places(set, before), &in_places(set, now))
                })
            }
        };
        Edit { set, removed, added }
    };
    let touched = |edit: &Edit| !edit.removed.is_empty() || !edit.added.is_empty();
    sets(shape).map(edit).filter(touched).collect()
}

/// All our chains, the jump targets first.
pub(super) fn chains(shape: &Shape) -> Vec<Chain> {
    use SetUse::{Anywhere, Bridges, Declared, Everywhere, Known, Near, Networks, Outer, Outside};
    use SetUse::{Own, Segments, Sent, Spared, Vips};
    use Side::{Destination, Source};
    let redirect = Term::Redirect(shape.port);
    let nat = |hook| Base { kind: BaseKind::Nat, hook, priority: shape.priority };
    let families = families(shape);
    let each = |rule: &dyn Fn(Family) -> Vec<Term>| families.iter().copied().map(rule).collect();
    let chain = |name, base, rules| Chain { home: Home::Inet, name, base, rules };

    let mut chains = Vec::new();
    if shape.unknown {
        // Services of this host stay reachable for unknown containers, which may turn out to be no consumers.
        let rules = [
            vec![Term::Socket(false), Term::Accept],
            vec![Term::Socket(true), Term::Accept],
            vec![redirect],
        ];
        let rules = rules.map(|rule| [vec![Term::Tcp], rule].concat()).to_vec();
        chains.push(chain("unknown", None, rules));
    }
    let mut rules = Vec::new();
    for &family in families {
        rules.push(vec![Term::InterfaceAddressPort(family, Declared), redirect]);
        rules.push(vec![Term::AddressPort(Source, family, Anywhere), redirect]);
        rules.push(vec![
            Term::Address(Destination, family, Outer),
            Term::InterfaceNot(Bridges),
            Term::AddressPort(Source, family, Outside),
            redirect,
        ]);
    }
    chains.push(chain("declared", None, rules));

    let mut rules = Vec::new();
    for &family in families {
        let vip = Term::Address(Destination, family, Vips);
        rules.push(vec![vip, Term::Jump("declared")]);
        if shape.redirect {
            rules.push(vec![Term::Address(Destination, family, Own), Term::Jump("declared")]);
        }
        if shape.scope == CaptureScope::All {
            rules.push(vec![vip, Term::Interface(Bridges), Term::Tcp, redirect]);
            let everywhere = Term::Address(Destination, family, Everywhere);
            rules.push(vec![everywhere, Term::Tcp, redirect]);
        }
        if shape.unknown {
            // A known address matches only on its own interface. On other interfaces it is not treated as unknown.
            let stranger = Term::AddressNot(Source, family, Known);
            let segment = Term::InterfaceAddress(family, Segments);
            rules.push(vec![vip, segment, stranger, Term::Jump("unknown")]);
            let network = Term::Address(Source, family, Networks);
            rules.push(vec![vip, network, stranger, Term::Jump("unknown")]);
        }
    }
    chains.push(chain("prerouting", Some(nat(Hook::Prerouting)), rules));

    if shape.redirect {
        let mut rules = vec![vec![Term::MetaMark(MARK), Term::Return]];
        let spared: Vec<_> =
            each(&|family| vec![Term::AddressPort(Destination, family, Spared), Term::Return]);
        rules.extend(spared);
        let sent: Vec<_> = each(&|family| {
            let vip = Term::Address(Destination, family, Vips);
            vec![vip, Term::AddressPort(Source, family, Sent), redirect]
        });
        rules.extend(sent);
        chains.push(chain("output", Some(nat(Hook::Output)), rules));
    }
    if shape.notrack {
        // Our own connections bypass connection tracking. Answers are recognised by their socket: other programs on this
        // host may have connections to the same endpoints, even translated ones. A connection to an address of this host
        // stays tracked: the engine may translate it, as it does to reach a published port.
        for (name, hook, side, away, mark) in [
            (
                "untracked_out",
                Hook::Output,
                Destination,
                Term::NotLoopback(InterfaceSide::Out),
                Term::MetaMark(MARK),
            ),
            (
                "untracked_in",
                Hook::Prerouting,
                Source,
                Term::NotLoopback(InterfaceSide::In),
                Term::SocketMark(MARK),
            ),
        ] {
            let rules = each(&|family| {
                let near = Term::Address(side, family, Near);
                vec![near, Term::Tcp, away, mark, Term::Notrack]
            });
            let base = Base { kind: BaseKind::Filter, hook, priority: RAW };
            chains.push(chain(name, Some(base), rules));
        }
    }
    if shape.counted {
        chains.extend(counting(shape.port));
    }
    if shape.refusing {
        chains.push(refusing(shape.port));
    }
    chains.extend(guard(shape));
    chains
}

/// Refuses connections to our listener that were not captured, from anywhere. The proxy itself refuses those without
/// connection tracking.
pub(super) fn refusing(port: u16) -> Chain {
    let base = Base { kind: BaseKind::Filter, hook: Hook::Input, priority: FIRST };
    let rule = vec![Term::Dport(port), Term::NotTranslated, Term::Counter, Term::Reject];
    Chain { home: Home::Inet, name: DIRECT, base: Some(base), rules: vec![rule] }
}

/// Drops frames on bridge ports if the sender uses an address of another container.
///
/// All packets are matched, not only those that open a connection: the TCP flags may be in a later fragment.
fn guard(shape: &Shape) -> Vec<Chain> {
    use SetUse::{Guarded, Macs, Owned, Ports, Sealed, Targets};
    use Side::{Destination, Source};
    if shape.guard == Guard::Off {
        return Vec::new();
    }
    let chain = |name, base, rules| Chain { home: Home::Bridge, name, base, rules };
    let drop = vec![Term::Counter, Term::Drop];
    let [spoofed4, spoofed6, offending] = DROPPING;
    let spoofed = |family| match family {
        Family::V4 => spoofed4,
        Family::V6 => spoofed6,
    };
    let families = families(shape);
    // Adding the note may fail if there are too many. The drop must not fail.
    let note = |family| vec![vec![Term::NoteSource(family)], drop.clone()];
    let mut chains: Vec<_> =
        families.iter().map(|&family| chain(spoofed(family), None, note(family))).collect();
    chains.push(chain(offending, None, vec![vec![Term::NotePort], drop.clone()]));
    let offends = Term::Jump(offending);
    // Behind two VLAN tags the kernel finds a packet that these rules do not see. The kernel removes one tag before.
    let mut rules: Vec<_> =
        VLAN.map(|tag| vec![Term::Carries(tag), Term::Port(Guarded), offends]).to_vec();
    for &family in families {
        rules.push(vec![
            Term::Address(Destination, family, Targets),
            Term::Address(Source, family, Owned),
            Term::PortNot(SenderField::Source(family), Ports),
            Term::Jump(spoofed(family)),
        ]);
    }
    if shape.guard == Guard::Full {
        let both = |claim| [Term::Claimed(claim, Owned), Term::PortNot(claim, Ports), offends];
        rules.push(both(SenderField::Arp).to_vec());
        if shape.v6 {
            // Neighbour solicitations name the sender as well.
            rules.push([&[Term::Icmp6][..], &both(SenderField::Source(Family::V6))].concat());
            rules.push([&[Term::Advertisement][..], &both(SenderField::Target)].concat());
        }
        rules.push(vec![Term::Port(Sealed), Term::PortNot(SenderField::Mac, Macs), offends]);
    }
    let base = Base { kind: BaseKind::Filter, hook: Hook::Prerouting, priority: RAW };
    chains.push(chain("prerouting", Some(base), rules));
    chains
}

/// The chains that count captured connections before and after all chains of others.
pub(super) fn counting(port: u16) -> [Chain; 2] {
    [(ARRIVING, FIRST), (ARRIVED, LAST)].map(|(name, priority)| watch(name, priority, port))
}

/// Counts captured connections on their way to our listener. If the first of these two chains counts more than the last
/// one, a rule between them drops connections. The rule matches the connection state, which also keeps connection tracking
/// on.
pub(super) fn watch(name: &'static str, priority: i32, port: u16) -> Chain {
    let base = Base { kind: BaseKind::Filter, hook: Hook::Input, priority };
    let rule = vec![Term::Dport(port), Term::Translated, Term::Syn, Term::Counter];
    Chain { home: Home::Inet, name, base: Some(base), rules: vec![rule] }
}

/// Chains that keep live connections translated after the capture has ended. None of their rules translates. Without any
/// such chain, the kernel would switch off translation, and connection tracking with it.
pub(super) fn remains(shape: &Shape) -> Vec<Chain> {
    let hooks = [Some(Hook::Prerouting), shape.redirect.then_some(Hook::Output)];
    let nat = |hook: Hook| {
        let base = Base { kind: BaseKind::Nat, hook, priority: shape.priority };
        Chain { home: Home::Inet, name: hook.nft(), base: Some(base), rules: Vec::new() }
    };
    let nat = hooks.into_iter().flatten().map(nat);
    let watch = shape.counted.then(|| watch(ARRIVING, FIRST, shape.port));
    nat.chain(watch).chain(shape.refusing.then(|| refusing(shape.port))).collect()
}
