//! The static provider: bindings come from the command line, and the consumer is this host or network namespace.

#![expect(clippy::disallowed_methods, reason = "reads files of the kernel, which need no disk")]

use std::{
    cell::LazyCell,
    collections::BTreeSet,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    sync::Arc,
};

use super::{Listing, Problem};
use crate::{
    consumer::{Binding, Consumer},
    descriptor::Descriptor,
    model::ConsumerId,
};

/// The name of the static provider's consumer.
pub const LOCAL: &str = "local";

/// Why the static provider cannot determine its consumer's addresses.
#[derive(Debug, thiserror::Error)]
pub enum InterfaceError {
    #[error("cannot list the interfaces: {0}")]
    List(#[from] io::Error),
    #[error("-interface {name:?} has no address: expected one of {present}")]
    Missing { name: String, present: String },
}

/// The local consumer of `services`, and the problems in them. Its connections come from the addresses of `interface`, or
/// from loopback.
pub fn listing(interface: &str, services: &[Descriptor]) -> Result<Listing, InterfaceError> {
    let mut sources = addresses(interface)?;
    sources.extend([IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)]);
    sources.sort();
    sources.dedup();
    let (origin, name): (Arc<str>, Arc<str>) = ("-services".into(), LOCAL.into());
    let mut bindings: Vec<Binding> = Vec::new();
    let mut problems = Vec::new();
    for descriptor in services {
        let has_port = |first: &&Binding| {
            let of = |one: &Descriptor| (one.port, one.protocol);
            of(&first.descriptor) == of(descriptor)
        };
        match bindings.iter().find(has_port) {
            None => {
                bindings.push(Binding { origin: origin.clone(), descriptor: descriptor.clone() })
            }
            Some(first) => problems.push(Problem {
                consumer: name.clone(),
                origin: origin.clone(),
                port: Some(descriptor.port),
                reason: format!(
                    "{:?}: \"{}\" already has the port",
                    descriptor.to_string(),
                    first.descriptor
                ),
                overruled: true,
            }),
        }
    }
    let consumer = Consumer {
        id: ConsumerId::Local,
        name,
        namespace: "local".into(),
        sources,
        arrivals: Vec::new(),
        gateways: Vec::new(),
        bindings,
        ends: Vec::new(),
    };
    Ok(Listing { consumers: vec![Arc::new(consumer)], problems, ..Listing::default() })
}

/// The addresses of an interface that other hosts can use: no link-local IPv6, which is valid only on its link.
fn addresses(interface: &str) -> Result<Vec<IpAddr>, InterfaceError> {
    let all = if_addrs::get_if_addrs()?;
    let found: Vec<_> =
        all.iter().filter(|i| i.name == interface && !i.is_link_local()).map(|i| i.ip()).collect();
    if found.is_empty() {
        let mut names: Vec<_> = all.iter().map(|i| i.name.as_str()).collect();
        names.sort();
        names.dedup();
        return Err(InterfaceError::Missing {
            name: interface.to_owned(),
            present: names.join(", "),
        });
    }
    Ok(found)
}

/// The addresses of an interface. None if it does not exist.
pub fn addresses_of(interface: &str) -> io::Result<Vec<IpAddr>> {
    let all = if_addrs::get_if_addrs()?;
    let found = all.iter().filter(|i| !i.is_link_local() && i.name == interface);
    Ok(found.map(|i| i.ip()).collect())
}

/// All addresses of this network namespace that other hosts can use.
pub fn own_addresses() -> Result<Vec<IpAddr>, InterfaceError> {
    let all = if_addrs::get_if_addrs()?;
    let found = all.iter().filter(|i| !i.is_loopback() && !i.is_link_local());
    Ok(found.map(|i| i.ip()).collect())
}

/// Those of `addresses` that this network namespace has. An address that cannot be checked counts as present.
///
/// Checks by binding a socket, which costs the same however many interfaces there are.
pub fn here(addresses: impl IntoIterator<Item = IpAddr>) -> BTreeSet<IpAddr> {
    let listed = LazyCell::new(|| fs::read_to_string("/proc/net/if_inet6").unwrap_or_default());
    let is_here = |address: &IpAddr| match (UdpSocket::bind((*address, 0)), address) {
        (Ok(_), _) => true,
        (Err(error), _) if error.kind() != io::ErrorKind::AddrNotAvailable => true,
        (Err(_), IpAddr::V4(_)) => false,
        // During duplicate detection, in its first seconds, no socket can be bound to the address.
        (Err(_), IpAddr::V6(address)) => listed.contains(&format!("{:032x}", u128::from(*address))),
    };
    addresses.into_iter().collect::<BTreeSet<_>>().into_iter().filter(is_here).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_no_interface_has_is_not_here() {
        let addresses = ["127.0.0.1", "127.0.0.1", "192.0.2.1"].map(|text| text.parse().unwrap());
        // A host may allow to bind to any address. Then nothing can be checked.
        let any = std::fs::read_to_string("/proc/sys/net/ipv4/ip_nonlocal_bind").unwrap();
        let expected = if any.trim() == "0" { &addresses[..1] } else { &addresses[1..] };
        assert_eq!(here(addresses), expected.iter().copied().collect());
        let six = ["2001:db8::1"].map(|text| text.parse().unwrap());
        let any = std::fs::read_to_string("/proc/sys/net/ipv6/ip_nonlocal_bind");
        assert!(any.is_ok_and(|any| any.trim() != "0") || here(six).is_empty());
    }

    #[test]
    fn loopback_always_counts_and_a_missing_interface_is_named() {
        let consumer = listing("lo", &["redis;6379".parse().unwrap()]).unwrap().consumers.remove(0);
        assert!(consumer.sources.contains(&IpAddr::from(Ipv4Addr::LOCALHOST)));
        assert!(consumer.sources.contains(&IpAddr::from(Ipv6Addr::LOCALHOST)));
        let error = listing("nosuch0", &[]).unwrap_err().to_string();
        assert!(
            error.starts_with("-interface \"nosuch0\" has no address: expected one of "),
            "{error}"
        );
    }

    #[test]
    fn of_two_services_on_one_port_the_first_wins_and_the_other_is_reported_once() {
        let services = ["a;80", "b;80", "c;81", "d;80/udp"].map(|text| text.parse().unwrap());
        let listing = listing("lo", &services).unwrap();
        let bound = listing.consumers[0].bindings.iter().map(|b| b.descriptor.to_string());
        assert_eq!(bound.collect::<Vec<_>>(), ["a;80", "c;81", "d;80/udp"]);
        let said: Vec<_> = listing.problems.iter().map(|p| p.reason.as_str()).collect();
        assert_eq!(said, ["\"b;80\": \"a;80\" already has the port"]);
    }
}
