//! The interface, and the bridge port, on which connections from an address arrive at this host. Pure.

use std::{collections::BTreeSet, fmt, net::IpAddr, sync::Arc};

use ipnet::IpNet;

use crate::cow_map::CowMap;

/// The name of an interface of this network namespace, 1 to 15 bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Interface([u8; Self::BYTES]);

impl Interface {
    /// Length with the zeros at the end (IFNAMSIZ).
    pub const BYTES: usize = 16;

    /// `None` if a rule cannot name it: it is empty, too long, or has characters that firewall programs interpret.
    pub fn new(name: &str) -> Option<Self> {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.@".contains(&byte);
        if name.is_empty() || name.len() >= Self::BYTES || !name.bytes().all(is_plain) {
            return None;
        }
        let mut bytes = [0; Self::BYTES];
        bytes.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from);
        Some(Self(bytes))
    }

    /// The bytes as the kernel compares them.
    pub fn bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }
}

impl fmt::Display for Interface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = self.0.iter().position(|byte| *byte == 0).unwrap_or(Self::BYTES);
        // The bytes were made from text.
        f.write_str(str::from_utf8(self.0.get(..end).unwrap_or_default()).unwrap_or_default())
    }
}

impl fmt::Debug for Interface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The interfaces on which connections from an address are accepted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Arrival {
    /// Any interface: it is not known on which one they arrive.
    #[default]
    Anywhere,
    /// Only this interface.
    By(Interface),
    /// Any interface except the engine's bridges, and only to addresses that are not on these bridges: the network is of
    /// another kind, such as macvlan.
    Outside,
}

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for Mac {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or(())?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| ())?;
        }
        if parts.next().is_some() { Err(()) } else { Ok(Self(bytes)) }
    }
}

/// This host's end of a container's veth pair: the other end is in the container's network namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Plug {
    /// The kernel's interface number. Never reused while the host runs.
    pub index: u32,
    /// The interface on which its packets arrive: its bridge, or itself if it is in no bridge. `None` if a rule cannot name
    /// it.
    pub interface: Option<Interface>,
    /// It is a port of a bridge.
    pub is_port: bool,
}

/// The container that owns an address, and the bridge ports that lead to this container only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    pub name: Arc<str>,
    /// Interface numbers. Sorted, never empty.
    pub ports: Vec<u32>,
    /// The Ethernet address of this address, if the engine reports it.
    pub mac: Option<Mac>,
}

/// How the engine's networks are connected to this host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wiring {
    /// The interfaces of the engine's bridge networks, as far as they are known.
    pub interfaces: BTreeSet<Interface>,
    /// The ranges of these networks, each with the interface by which its containers' connections arrive.
    pub segments: BTreeSet<(Interface, IpNet)>,
    /// Those of which the interface is not known.
    pub loose: BTreeSet<IpNet>,
    /// Those whose containers do not reach each other.
    pub apart: BTreeSet<IpNet>,
    /// This host's own addresses on those interfaces.
    pub gateways: BTreeSet<IpAddr>,
    /// The ports of those bridges.
    pub ports: Arc<BTreeSet<u32>>,
    /// The addresses of which it is known by which ports they may come in.
    pub owners: CowMap<IpAddr, Arc<Owner>>,
    /// Addresses on those bridges whose ports are not known, with their containers.
    pub unbound: CowMap<IpAddr, Arc<str>>,
}

impl Wiring {
    /// The owners that only `before` has, and those that only `now` has. A changed owner is in both.
    pub fn other_owners(before: &Self, now: &Self) -> (Self, Self) {
        let differing = now.owners.differing_keys(&before.owners, Arc::eq);
        let only = |these: &Self| {
            let owners = differing
                .iter()
                .filter_map(|&address| Some((*address, these.owners.get(address)?.clone())));
            Self { owners: owners.collect(), ..Self::default() }
        };
        (only(before), only(now))
    }

    /// The first address without known ports, and its container.
    pub fn first_unbound(&self) -> Option<(&IpAddr, &Arc<str>)> {
        self.unbound.iter().min_by_key(|(address, _)| **address)
    }

    /// The part that concerns these ports: the owners on them, and all ports.
    pub fn on_ports(&self, ports: &BTreeSet<u32>) -> Self {
        let is_on = |(_, owner): &(&IpAddr, &Arc<Owner>)| {
            owner.ports.iter().any(|port| ports.contains(port))
        };
        let owners = self.owners.iter().filter(|_| !ports.is_empty()).filter(is_on);
        let owners = owners.map(|(address, owner)| (*address, owner.clone())).collect();
        Self { owners, ports: self.ports.clone(), ..Self::default() }
    }

    /// The container that a port leads to.
    pub fn container_at(&self, port: u32) -> Option<&Arc<str>> {
        let owner = self.owners.values().find(|owner| owner.ports.contains(&port));
        owner.map(|owner| &owner.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_a_program_would_misread_is_none() {
        for name in ["docker0", "br-0123456789ab", "eth0.10", "veth1@if2"] {
            assert_eq!(Interface::new(name).unwrap().to_string(), name);
        }
        for name in ["", "a name", "br+", "br*", "\"", "a\n", "0123456789abcdef", "größe"] {
            assert_eq!(Interface::new(name), None, "{name}");
        }
    }

    #[test]
    fn an_ethernet_address_is_read() {
        assert_eq!("02:42:ac:11:00:0f".parse(), Ok(Mac([2, 0x42, 0xac, 0x11, 0, 15])));
        for text in ["", "02:42:ac:11:00", "02:42:ac:11:00:0f:01", "2:42:ac:11:0:f", "02-42"] {
            assert_eq!(text.parse::<Mac>(), Err(()), "{text}");
        }
    }
}
