//! The static provider: the bindings come from the command line, and the consumer is this host or network namespace.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use crate::{
    descriptor::Descriptor,
    model::{Binding, Consumer, ConsumerId},
};

/// Why the static provider cannot say who its consumer is.
#[derive(Debug, thiserror::Error)]
pub enum InterfaceError {
    #[error("cannot list the interfaces: {0}")]
    List(#[from] io::Error),
    #[error("-interface {name:?} has no address: expected one of {present}")]
    Missing { name: String, present: String },
}

/// The local consumer of `services`. Its connections come from the addresses of `interface`, or from loopback.
pub fn consumer(interface: &str, services: &[Descriptor]) -> Result<Consumer, InterfaceError> {
    let mut sources = addresses(interface)?;
    sources.extend([IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)]);
    sources.sort();
    sources.dedup();
    let bindings = services
        .iter()
        .map(|descriptor| Binding { origin: "-services".into(), descriptor: descriptor.clone() });
    Ok(Consumer {
        id: ConsumerId::Local,
        name: "local".into(),
        namespace: "local".into(),
        sources,
        gateways: Vec::new(),
        bindings: bindings.collect(),
        ends: Vec::new(),
    })
}

/// The addresses of an interface that other hosts can name: no link-local IPv6, which means nothing without its link.
pub fn addresses(interface: &str) -> Result<Vec<IpAddr>, InterfaceError> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_always_counts_and_a_missing_interface_is_named() {
        let consumer = consumer("lo", &["redis;6379".parse().unwrap()]).unwrap();
        assert!(consumer.sources.contains(&IpAddr::from(Ipv4Addr::LOCALHOST)));
        assert!(consumer.sources.contains(&IpAddr::from(Ipv6Addr::LOCALHOST)));
        let error = super::consumer("nosuch0", &[]).unwrap_err().to_string();
        assert!(
            error.starts_with("-interface \"nosuch0\" has no address: expected one of "),
            "{error}"
        );
    }
}
