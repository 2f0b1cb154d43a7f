//! A consumer and its bindings.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use ipnet::IpNet;

use crate::{
    descriptor::Descriptor,
    model::{ConsumerId, RunEnd},
    wiring::Arrival,
};

/// A consumer: its addresses and its bindings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Consumer {
    pub id: ConsumerId,
    /// The container's name, for messages.
    pub name: Arc<str>,
    /// The network namespace in which it lives: the container that created it, or `local`. Consumers that share one share
    /// its addresses.
    pub namespace: Arc<str>,
    /// All its source addresses. Sorted, without duplicates.
    pub sources: Vec<IpAddr>,
    /// The interfaces on which connections from these addresses are accepted. For an address that is missing here: all
    /// interfaces. Sorted by address.
    pub arrivals: Vec<(IpAddr, Arrival)>,
    /// The gateways of its bridge networks: VIPs, unless the user set some.
    pub gateways: Vec<IpAddr>,
    pub bindings: Vec<Binding>,
    /// The end of its run, and of the run that owns its network namespace.
    pub ends: Vec<RunEnd>,
}

impl Consumer {
    /// The interfaces on which connections from one of its addresses are accepted.
    pub fn arrival(&self, source: &IpAddr) -> Arrival {
        let found = self.arrivals.binary_search_by(|(address, _)| address.cmp(source));
        found.ok().and_then(|at| self.arrivals.get(at)).map(|(_, by)| *by).unwrap_or_default()
    }

    /// Whether it, or its network, is known to be gone, even if the listing still has it.
    pub fn has_ended(&self) -> bool {
        self.ends.iter().any(RunEnd::has_ended)
    }

    /// Whether the other is equal, and has the same ends.
    pub fn is_same_as(&self, other: &Self) -> bool {
        // Equal consumers have the same number of ends.
        self == other && self.ends.iter().zip(&other.ends).all(|(one, other)| one.is(other))
    }
}

/// Whether a consumer's connections to an address arrive in embassy's network namespace. The best comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reach {
    Arrives,
    /// Depends on routes of other hosts.
    Unknown,
    /// Another network namespace has the address, or none has.
    Elsewhere,
}

/// embassy's network namespace and the engine's networks.
#[derive(Debug, Clone, Copy)]
pub struct Surroundings<'a> {
    /// Those of the VIPs and of the consumers' gateways that are addresses of this network namespace.
    pub here: &'a BTreeSet<IpAddr>,
    /// The engine's bridge networks.
    pub networks: &'a BTreeSet<IpNet>,
}

impl Consumer {
    /// Whether connections to `address` arrive in embassy's network namespace.
    pub fn reach(&self, address: IpAddr, around: Surroundings<'_>) -> Reach {
        if self.id == ConsumerId::Local {
            return Reach::Arrives;
        }
        let is_here = around.here.contains(&address);
        let is_near = self.is_near(address, around.networks);
        // Connections to addresses outside of its networks go to its gateway, which captures them for any address.
        let via_gateway = || self.gateways.iter().any(|gateway| around.here.contains(gateway));
        let is_known = || around.networks.iter().any(|network| network.contains(&address));
        match (is_here, is_near) {
            (true, true) => Reach::Arrives,
            (false, true) => Reach::Elsewhere,
            (_, false) if via_gateway() => Reach::Arrives,
            (false, false) if is_known() => Reach::Elsewhere,
            (_, false) => Reach::Unknown,
        }
    }

    /// Whether an address is in one of its networks, so that it is reached without a gateway.
    pub fn is_near(&self, address: IpAddr, networks: &BTreeSet<IpNet>) -> bool {
        let shared = |network: &IpNet| {
            network.contains(&address) && self.sources.iter().any(|own| network.contains(own))
        };
        self.gateways.contains(&address) || networks.iter().any(shared)
    }
}

/// A binding: a consumer declares a service on a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// The variable or label that declared it, for messages.
    pub origin: Arc<str>,
    pub descriptor: Descriptor,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ContainerId;

    fn consumer(sources: &[&str], gateways: &[&str]) -> Consumer {
        let addresses = |all: &[&str]| all.iter().map(|text| text.parse().unwrap()).collect();
        Consumer {
            id: ConsumerId::Container { id: ContainerId::new("a"), started_at: "t".into() },
            name: "a".into(),
            namespace: "a".into(),
            sources: addresses(sources),
            arrivals: Vec::new(),
            gateways: addresses(gateways),
            bindings: Vec::new(),
            ends: Vec::new(),
        }
    }

    #[test]
    fn a_connection_arrives_only_where_the_address_or_the_gateway_is() {
        use Reach::{Arrives, Elsewhere, Unknown};
        let networks: BTreeSet<IpNet> =
            ["172.17.0.0/16", "172.18.0.0/16", "fd00::/64"].map(|net| net.parse().unwrap()).into();
        let app = consumer(&["172.17.0.2"], &["172.17.0.1"]);
        let six = consumer(&["fd00::2"], &["fd00::1"]);
        let shut = consumer(&["172.18.0.2"], &[]);
        let away = consumer(&["192.168.1.5"], &[]);
        let host: &[&str] = &["172.17.0.1", "172.18.0.1", "fd00::1"];
        for (who, address, here, expected) in [
            // embassy runs on the host.
            (&app, "172.17.0.1", host, Arrives),
            (&app, "172.18.0.1", host, Arrives),
            (&app, "10.9.9.9", host, Arrives),
            (&six, "fd00::1", host, Arrives),
            // A former address of docker0, which no host in the network has.
            (&app, "172.17.42.1", host, Elsewhere),
            // A network without a gateway reaches only its own addresses.
            (&shut, "172.18.0.1", host, Arrives),
            (&shut, "172.17.0.1", host, Unknown),
            (&away, "172.17.0.1", host, Unknown),
            // embassy runs in its own container: the gateways are the host's.
            (&app, "172.17.0.1", &["172.17.0.9"], Elsewhere),
            (&app, "172.18.0.1", &["172.17.0.9"], Elsewhere),
            (&app, "172.17.0.9", &["172.17.0.9"], Arrives),
            (&app, "10.9.9.9", &["172.17.0.9"], Unknown),
            // A bridge without the gateway's address.
            (&app, "172.17.0.1", &[], Elsewhere),
            (&six, "fd00::1", &[], Elsewhere),
        ] {
            let here = here.iter().map(|text| text.parse().unwrap()).collect();
            let around = Surroundings { here: &here, networks: &networks };
            let found = who.reach(address.parse().unwrap(), around);
            assert_eq!(found, expected, "{:?} to {address}, here {here:?}", who.sources);
        }
        let local = Consumer { id: ConsumerId::Local, ..app };
        let around = Surroundings { here: &BTreeSet::new(), networks: &networks };
        assert_eq!(local.reach("172.17.42.1".parse().unwrap(), around), Arrives);
    }
}
