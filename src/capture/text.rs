//! Our nf_tables table in the language of the `nft` program, for people. Pure.

use std::fmt::{self, Write};

use super::{
    layout::{Base, Chain, Direction, Family, Key, Term, chains, elements, sets},
    rules::{NAME, Rules},
};

/// The table. `owned`: it belongs to our process. That is a comment here: a table that belonged to the program would go with it.
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
    writeln!(out, "table inet {NAME} {{")?;
    for set in sets(&rules.shape) {
        let address = match set.family {
            Family::V4 => "ipv4_addr",
            Family::V6 => "ipv6_addr",
        };
        writeln!(out, "\tset {set} {{")?;
        match set.key() {
            Key::Address => writeln!(out, "\t\ttype {address}")?,
            Key::AddressPort => writeln!(out, "\t\ttype {address} . inet_service")?,
            Key::Range => writeln!(out, "\t\ttype {address}\n\t\tflags interval")?,
        }
        let elements = elements(set, rules);
        if !elements.is_empty() {
            let elements: Vec<_> = elements.iter().map(ToString::to_string).collect();
            writeln!(out, "\t\telements = {{ {} }}", elements.join(", "))?;
        }
        writeln!(out, "\t}}")?;
    }
    for Chain { name, base, rules } in chains(&rules.shape) {
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
            Self::Address(side, set) => write!(f, "{} {side} @{set}", set.family.nft()),
            Self::AddressNot(side, set) => write!(f, "{} {side} != @{set}", set.family.nft()),
            Self::AddressPort(side, set) => {
                write!(f, "{} {side} . tcp dport @{set}", set.family.nft())
            }
            Self::Tcp => f.write_str("meta l4proto tcp"),
            Self::Dport(port) => write!(f, "tcp dport {port}"),
            Self::Syn => f.write_str("tcp flags & (syn | ack) == syn"),
            Self::Translated => f.write_str("ct status dnat"),
            Self::MetaMark(mark) => write!(f, "meta mark {mark:#010x}"),
            Self::NotLoopback(Direction::In) => f.write_str("iif != \"lo\""),
            Self::NotLoopback(Direction::Out) => f.write_str("oif != \"lo\""),
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
