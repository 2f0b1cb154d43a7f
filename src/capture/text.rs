//! Our nf_tables tables in the language of the `nft` program, for people. Pure.

use std::fmt::{self, Write};

use super::{
    layout::{
        Base, Chain, ElementKey, Family, Home, InterfaceSide, NOTED, NOTED_FOR, SenderField, Set,
        SetUse, Term, chains, elements, homes, sets,
    },
    rules::{NAME, Rules},
};

/// The tables as text. `owned`: they belong to our process. The text says so in a comment: a table that belonged to the
/// `nft` program would be removed when the program ends.
pub(super) fn of(rules: &Rules, owned: bool) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = render(rules, owned, &mut out);
    out
}

fn render(rules: &Rules, owned: bool, out: &mut String) -> fmt::Result {
    if owned {
        writeln!(out, "# flags owner: it belongs to embassy's process, and goes with it")?;
    }
    homes(&rules.shape).iter().try_for_each(|home| table(rules, *home, out))
}

fn table(rules: &Rules, home: Home, out: &mut String) -> fmt::Result {
    writeln!(out, "table {} {NAME} {{", home.nft())?;
    for set in sets(&rules.shape).filter(|set| set.home() == home) {
        let address = match set.family {
            Some(Family::V6) => "ipv6_addr",
            Some(Family::V4) | None => "ipv4_addr",
        };
        writeln!(out, "\tset {set} {{")?;
        match set.key() {
            ElementKey::Address => writeln!(out, "\t\ttype {address}")?,
            ElementKey::AddressPort => writeln!(out, "\t\ttype {address} . inet_service")?,
            ElementKey::Range => writeln!(out, "\t\ttype {address}\n\t\tflags interval")?,
            ElementKey::Interface => writeln!(out, "\t\ttype ifname")?,
            ElementKey::InterfaceAddressPort => {
                writeln!(out, "\t\ttype ifname . {address} . inet_service")?;
            }
            ElementKey::InterfaceRange => {
                writeln!(out, "\t\ttype ifname . {address}\n\t\tflags interval")?;
            }
            ElementKey::Index => writeln!(out, "\t\ttype iface_index")?,
            ElementKey::IndexAddress => writeln!(out, "\t\ttype iface_index . {address}")?,
            ElementKey::IndexMac => writeln!(out, "\t\ttype iface_index . ether_addr")?,
        }
        if set.is_noted() {
            let hours = NOTED_FOR / 3_600_000;
            writeln!(out, "\t\tsize {NOTED}\n\t\tflags dynamic,timeout\n\t\ttimeout {hours}h")?;
        }
        let elements = elements(set, rules);
        if !elements.is_empty() {
            let elements: Vec<_> = elements.iter().map(ToString::to_string).collect();
            writeln!(out, "\t\telements = {{ {} }}", elements.join(", "))?;
        }
        writeln!(out, "\t}}")?;
    }
    let chains = chains(&rules.shape);
    for Chain { name, base, rules, .. } in chains.iter().filter(|chain| chain.home == home) {
        writeln!(out, "\tchain {name} {{")?;
        if let Some(Base { kind, hook, priority }) = base {
            let (kind, hook) = (kind.nft(), hook.nft());
            writeln!(out, "\t\ttype {kind} hook {hook} priority {priority}; policy accept;")?;
        }
        for rule in rules {
            let terms: Vec<_> = rule.iter().map(ToString::to_string).collect();
            writeln!(out, "\t\t{}", terms.join(" "))?;
        }
        writeln!(out, "\t}}")?;
    }
    writeln!(out, "}}")
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(side, family, members) => {
                write!(f, "{} {side} @{}", family.nft(), Set::of(*members, *family))
            }
            Self::AddressNot(side, family, members) => {
                write!(f, "{} {side} != @{}", family.nft(), Set::of(*members, *family))
            }
            Self::AddressPort(side, family, members) => {
                write!(f, "{} {side} . tcp dport @{}", family.nft(), Set::of(*members, *family))
            }
            Self::InterfaceAddressPort(family, members) => {
                let set = Set::of(*members, *family);
                write!(f, "iifname . {} saddr . tcp dport @{set}", family.nft())
            }
            Self::InterfaceAddress(family, members) => {
                write!(f, "iifname . {} saddr @{}", family.nft(), Set::of(*members, *family))
            }
            Self::InterfaceNot(members) => {
                write!(f, "iifname != @{}", Set::without_family(*members))
            }
            Self::Interface(members) => write!(f, "iifname @{}", Set::without_family(*members)),
            Self::Carries(0x8100) => f.write_str("meta protocol 8021q"),
            Self::Carries(0x88a8) => f.write_str("meta protocol 8021ad"),
            Self::Carries(what) => write!(f, "meta protocol {what:#06x}"),
            Self::Port(members) => write!(f, "iif @{}", Set::without_family(*members)),
            Self::PortNot(claim, members) => {
                write!(f, "iif . {claim} != @{}", claim.set(*members))
            }
            Self::Claimed(claim, members) => write!(f, "{claim} @{}", claim.set(*members)),
            Self::Icmp6 => f.write_str("meta l4proto ipv6-icmp"),
            Self::Advertisement => f.write_str("icmpv6 type nd-neighbor-advert"),
            Self::NoteSource(family) => {
                let set = Set::of(SetUse::Forgers, *family);
                write!(f, "update @{set} {{ iif . {} saddr }}", family.nft())
            }
            Self::NotePort => {
                write!(f, "update @{} {{ iif }}", Set::without_family(SetUse::Offenders))
            }
            Self::Drop => f.write_str("drop"),
            Self::Reject => f.write_str("reject with tcp reset"),
            Self::NotTranslated => f.write_str("ct status ! dnat"),
            Self::Tcp => f.write_str("meta l4proto tcp"),
            Self::Dport(port) => write!(f, "tcp dport {port}"),
            Self::Syn => f.write_str("tcp flags & (syn | ack) == syn"),
            Self::Translated => f.write_str("ct status dnat"),
            Self::MetaMark(mark) => write!(f, "meta mark {mark:#010x}"),
            Self::NotLoopback(InterfaceSide::In) => f.write_str("iif != \"lo\""),
            Self::NotLoopback(InterfaceSide::Out) => f.write_str("oif != \"lo\""),
            Self::SocketMark(mark) => write!(f, "socket mark {mark:#010x}"),
            Self::Socket(everywhere) => write!(f, "socket wildcard {}", u8::from(*everywhere)),
            Self::Counter => f.write_str("counter"),
            Self::Accept => f.write_str("accept"),
            Self::Return => f.write_str("return"),
            Self::Jump(chain) => write!(f, "jump {chain}"),
            Self::Redirect(port) => write!(f, "redirect to :{port}"),
            Self::Notrack => f.write_str("notrack"),
        }
    }
}

impl fmt::Display for SenderField {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Source(family) => write!(f, "{} saddr", family.nft()),
            Self::Arp => f.write_str("arp saddr ip"),
            Self::Target => f.write_str("@th,64,128"),
            Self::Mac => f.write_str("ether saddr"),
        }
    }
}
