//! Finds the address at which embassy can reach a container of this host. Pure.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use crate::docker::container::{
    Attachment, Bridges, Container, Interfaces, Inventory, Network, NetworkId, OtherNetworks,
    bridge_of,
};

/// The network in which embassy runs, and the networks around it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Standpoint {
    /// The networks of the container in which embassy runs, with their gateways. `None` on the host.
    inside: Option<BTreeMap<NetworkId, Vec<IpAddr>>>,
    bridges: Arc<Bridges>,
    others: Arc<OtherNetworks>,
    here: Arc<Interfaces>,
}

const NO_ADDRESS: &str = "no address: it is on no network";

/// Whether a network can be reached. The best comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum NetworkRank {
    /// A bridge of this host, or a network to which embassy's own container is attached too.
    Surely,
    /// A network with an unknown driver.
    Perhaps,
    Never,
}

impl Standpoint {
    pub(super) fn of(inventory: &Inventory) -> Self {
        Self {
            inside: inside(inventory),
            bridges: inventory.bridges.clone(),
            others: inventory.others.clone(),
            here: inventory.here.clone(),
        }
    }

    /// The address of a container with its own network, or with the host's. The error says why there is none.
    pub(super) fn address_of(&self, container: &Container) -> Result<IpAddr, String> {
        if container.network == Network::Host {
            return self.host();
        }
        let ends = container.attachments().filter(|(_, end)| !end.addresses.is_empty());
        let mut ends: Vec<_> =
            ends.map(|(id, end)| (self.reach(id, end), &end.name, end)).collect();
        ends.sort_by_key(|(reach, name, _)| (*reach, *name));
        match ends.first() {
            None => Err(NO_ADDRESS.to_owned()),
            Some((NetworkRank::Never, ..)) => {
                let names: Vec<_> = ends.iter().map(|(_, name, _)| &***name).collect();
                Err(self.no_way(&names.join(", ")))
            }
            Some((_, _, end)) => {
                end.addresses.first().copied().ok_or_else(|| NO_ADDRESS.to_owned())
            }
        }
    }

    /// The address at which services on the host's own network can be reached.
    fn host(&self) -> Result<IpAddr, String> {
        let Some(inside) = &self.inside else { return Ok(Ipv4Addr::LOCALHOST.into()) };
        // A bridge's gateway is the host. The gateway of another network is a router.
        let bridges = inside.iter().filter(|(id, gateways)| self.is_bridge(id, gateways));
        let gateways = bridges.flat_map(|(_, gateways)| gateways.iter().copied());
        let first = gateways.min_by_key(|gateway| (gateway.is_ipv6(), *gateway));
        first.ok_or_else(|| {
            "it is on the host's network, and embassy's own container is on no bridge network with a gateway".to_owned()
        })
    }

    fn is_bridge(&self, id: &NetworkId, gateways: &[IpAddr]) -> bool {
        let end = Attachment {
            name: id.clone(),
            addresses: vec![],
            gateways: gateways.to_vec(),
            mac: None,
        };
        bridge_of(&self.bridges, id, &end).is_some()
    }

    fn reach(&self, id: &NetworkId, end: &Attachment) -> NetworkRank {
        if let Some(inside) = &self.inside {
            // Engines isolate their networks from each other.
            return if inside.contains_key(id) { NetworkRank::Surely } else { NetworkRank::Never };
        }
        if bridge_of(&self.bridges, id, end).is_some() {
            return NetworkRank::Surely;
        }
        let Some(network) = self.others.get(id) else { return NetworkRank::Perhaps };
        match &*network.driver {
            "overlay" | "none" => NetworkRank::Never,
            // The kernel isolates a parent interface from its macvlans and ipvlans. If the host has another interface in
            // the network, it reaches them via that.
            "macvlan" | "ipvlan" => {
                let mut others = self.here.iter().filter(|(name, _)| **name != network.parent);
                let is_in = |address: &IpAddr| network.ranges.iter().any(|r| r.contains(address));
                match others.any(|(_, addresses)| addresses.iter().any(is_in)) {
                    true => NetworkRank::Perhaps,
                    false => NetworkRank::Never,
                }
            }
            _ => NetworkRank::Perhaps,
        }
    }

    fn no_way(&self, names: &str) -> String {
        match self.inside {
            Some(_) => format!(
                "not reachable from embassy's own container: connect that to one of its networks ({names})"
            ),
            None => format!(
                "not reachable from this host on its networks ({names}): connect it to a bridge network too"
            ),
        }
    }
}

/// The networks of the container that has our addresses, if there is one.
fn inside(inventory: &Inventory) -> Option<BTreeMap<NetworkId, Vec<IpAddr>>> {
    let here = &inventory.here;
    // The usual case, which needs no search in all containers.
    if inventory.bridges.values().any(|bridge| here.contains_key(&bridge.interface)) {
        return None;
    }
    let is_ours = |address: IpAddr| here.values().flatten().any(|own| *own == address);
    let alive = inventory.containers.iter().filter(|one| !one.run.has_ended());
    let ours = alive.into_iter().find(|one| one.addresses().any(is_ours))?;
    Some(ours.attachments().map(|(id, end)| (id.clone(), end.gateways.clone())).collect())
}
