//! The state of an engine: its running containers and its bridge networks. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;

use crate::{
    model::{ContainerId, Port, RunEnd},
    wiring::{Interface, Mac, Plug},
};

/// A network's ID. [`SHOWN`] is none that an engine gives.
pub type NetworkId = Arc<str>;

/// In place of a network's ID: the addresses that a container's process shows, and that its engine does not tell. Another program
/// gave them, as CNI, pipework and a DHCP client do, or the engine itself, so that a container of a swarm reaches its host.
pub(crate) const SHOWN: &str = "";

/// Everything that runs on an engine at one time. What did not change is the same `Arc` as in the one before, and those
/// that are made of the same are equal.
#[derive(Debug, Clone, Default)]
pub struct Inventory {
    /// By ID.
    pub containers: Vec<Arc<Container>>,
    /// The networks that the `bridge` driver made.
    pub bridges: Arc<Bridges>,
    /// The other networks.
    pub others: Arc<OtherNetworks>,
    /// The interfaces of our own network namespace.
    pub here: Arc<Interfaces>,
    /// The ports of all bridges of our own network namespace.
    pub ports: Arc<BridgePorts>,
    /// The address of the engine's host, if the engine is reached over TCP.
    pub host: Option<IpAddr>,
    /// Number of runs whose process has ended since the start. Such a container stays until the engine reports its end too.
    pub ended: u64,
    /// Of the times that a container came and may have got another's address, so many are cleared up: everything here is newer.
    pub confirmed: u64,
}

pub type Bridges = BTreeMap<NetworkId, Bridge>;
pub type OtherNetworks = BTreeMap<NetworkId, OtherNetwork>;
/// The bridge of each port; of those that rules can name.
pub type BridgePorts = BTreeMap<u32, Interface>;
/// Their addresses, by name; no loopback and no link-local ones.
pub type Interfaces = BTreeMap<Arc<str>, Vec<IpAddr>>;

/// A network that is no bridge of the engine's host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OtherNetwork {
    pub driver: Arc<str>,
    pub ranges: Vec<IpNet>,
    /// The host's interface that it is made of, if it is one of `macvlan` or `ipvlan`.
    pub parent: Arc<str>,
}

/// A network whose gateway is on the engine's host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bridge {
    pub ranges: Vec<IpNet>,
    /// The gateway's interface.
    pub interface: Arc<str>,
    /// Its containers do not reach each other.
    pub is_apart: bool,
}

/// A running container, as its inspection showed it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    pub id: ContainerId,
    pub name: Arc<str>,
    /// `State.StartedAt`
    pub started_at: Arc<str>,
    /// Its first process, as the engine numbers it; 0 if it does not say.
    pub pid: i32,
    /// The end of this run, if its process is visible. A run keeps it as long as it is known.
    pub run: RunEnd,
    /// Ends when the container, by the engine's word, cannot be reached any more as it could: it has gone, is
    /// between two runs, or has another address.
    pub left: RunEnd,
    pub network: Network,
    /// This host's ends of its network namespace's cables; none if its process cannot be seen. Sorted.
    pub plugs: Vec<Plug>,
    /// `NAME=value`; only those that a follower needs.
    pub variables: Vec<String>,
    pub labels: BTreeMap<String, String>,
    /// Further ones that are not read, because there are too many.
    pub unread: usize,
    pub exposed: BTreeSet<ContainerPort>,
    pub published: BTreeMap<ContainerPort, Vec<SocketAddr>>,
    /// The signal that asks it to stop.
    pub stop_signal: i32,
    /// That signal was sent to this run.
    pub is_stopping: bool,
    /// The kernel accepts connections, and no process answers them until it goes on.
    pub is_paused: bool,
    /// It is between two runs.
    pub is_restarting: bool,
    /// Its HEALTHCHECK passes, or it has none.
    pub is_healthy: bool,
}

/// Where a container's addresses come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// Its own namespace, attached to these networks.
    Own(BTreeMap<NetworkId, Attachment>),
    /// The namespace of another container, by ID or name: `net=container:X`.
    Of(String),
    /// The host's: `net=host`.
    Host,
}

/// A container's end of a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// The network's name.
    pub name: Arc<str>,
    /// IPv4 first.
    pub addresses: Vec<IpAddr>,
    pub gateways: Vec<IpAddr>,
    pub mac: Option<Mac>,
}

/// A port inside a container. TCP is the only protocol that is proxied, but registrator counts the others as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ContainerPort {
    pub number: Port,
    pub tcp: bool,
}

/// Why the network of a container with `net=container:X` cannot be known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoNetwork {
    #[error("net=container:{0}: that container does not run")]
    Gone(String),
    #[error("net=container:{0}: it restarted since, and has another network now")]
    Restarted(String),
    #[error("net=container: circular reference")]
    Circle,
}

/// The bridge network that a container's end is on, if it is on one. Podman up to 5.3 puts the network's name where its ID
/// should be; the gateway shows which one it is then.
pub(crate) fn bridge_of<'a>(
    bridges: &'a Bridges,
    network: &NetworkId,
    end: &Attachment,
) -> Option<(&'a NetworkId, &'a Bridge)> {
    bridges.get_key_value(network).or_else(|| {
        let is_in = |range: &IpNet| end.gateways.iter().any(|gateway| range.contains(gateway));
        bridges.iter().find(|(_, bridge)| bridge.ranges.iter().any(is_in))
    })
}

impl Inventory {
    /// The container whose network namespace this one lives in: itself, or at the end of `net=container:` references.
    pub fn namespace<'a>(
        &'a self,
        container: &'a Arc<Container>,
    ) -> Result<&'a Arc<Container>, NoNetwork> {
        let mut owner = container;
        // A namespace made of itself cannot be had from an engine; a bound costs nothing.
        for _ in 0..=self.containers.len() {
            let Network::Of(target) = &owner.network else { return Ok(owner) };
            let found = self.find(target).ok_or_else(|| NoNetwork::Gone(target.clone()))?;
            if found.is_later_than(owner) {
                return Err(NoNetwork::Restarted(target.clone()));
            }
            owner = found;
        }
        Err(NoNetwork::Circle)
    }

    /// By ID or name.
    fn find(&self, target: &str) -> Option<&Arc<Container>> {
        match self.containers.binary_search_by(|container| container.id.as_str().cmp(target)) {
            Ok(at) => self.containers.get(at),
            Err(_) => self.containers.iter().find(|container| *container.name == *target),
        }
    }
}

impl PartialEq for Inventory {
    fn eq(&self, other: &Self) -> bool {
        let both = self.containers.iter().zip(&other.containers);
        (self.host, self.ended, self.confirmed) == (other.host, other.ended, other.confirmed)
            && Arc::ptr_eq(&self.bridges, &other.bridges)
            && Arc::ptr_eq(&self.others, &other.others)
            && Arc::ptr_eq(&self.here, &other.here)
            && Arc::ptr_eq(&self.ports, &other.ports)
            && self.containers.len() == other.containers.len()
            && both.into_iter().all(|(one, other)| Arc::ptr_eq(one, other))
    }
}

impl Container {
    /// Every address on a network of its own.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.attachments().flat_map(|(_, attachment)| &attachment.addresses).copied()
    }

    /// Those addresses that the engine gave it.
    pub(super) fn given(&self) -> impl Iterator<Item = IpAddr> {
        let given = self.attachments().filter(|(network, _)| ***network != *SHOWN);
        given.flat_map(|(_, attachment)| &attachment.addresses).copied()
    }

    /// Whether it has a network namespace of its own, and the engine gave it no address there.
    pub(super) fn is_unaddressed(&self) -> bool {
        matches!(self.network, Network::Own(_)) && self.given().next().is_none()
    }

    /// The same container, where its process shows it.
    pub(super) fn at(&self, shown: Option<Attachment>) -> Self {
        let mut container = self.clone();
        if let Network::Own(attachments) = &mut container.network {
            match shown {
                None => drop(attachments.remove(SHOWN)),
                Some(shown) => drop(attachments.insert(SHOWN.into(), shown)),
            }
        }
        container
    }

    /// Where its process shows it.
    pub(super) fn shown(&self) -> Option<&Attachment> {
        self.attachments().find(|(network, _)| ***network == *SHOWN).map(|(_, shown)| shown)
    }

    /// The networks that its own namespace is attached to.
    pub fn attachments(&self) -> impl Iterator<Item = (&NetworkId, &Attachment)> {
        let own = match &self.network {
            Network::Own(attachments) => Some(attachments),
            Network::Of(_) | Network::Host => None,
        };
        own.into_iter().flatten()
    }

    /// Whether it can be reached wherever it could be in another state of the same container.
    pub(super) fn is_reached_as(&self, before: &Self) -> bool {
        let kind = std::mem::discriminant(&self.network) == std::mem::discriminant(&before.network);
        kind && self.started_at == before.started_at
            && before.addresses().all(|address| self.addresses().any(|now| now == address))
            && self.is_restarting == before.is_restarting
    }

    /// Whether this run started after another. The kernel's word on their processes goes before the wall clock's.
    fn is_later_than(&self, other: &Self) -> bool {
        match (self.run.process(), other.run.process()) {
            (Some(this), Some(other)) => this.started > other.started,
            _ => later(&self.started_at, &other.started_at),
        }
    }
}

/// Whether one of the engine's moments is later than another. They are RFC 3339 in UTC with trailing zeros cut off, so
/// text order is time order once the `Z` is gone.
fn later(a: &str, b: &str) -> bool {
    a.trim_end_matches('Z') > b.trim_end_matches('Z')
}

/// Containers for tests.
#[cfg(test)]
pub(crate) mod samples {
    use super::*;

    pub(crate) fn id(name: &str) -> ContainerId {
        ContainerId::new(name)
    }

    /// It asks for `a` on port 80.
    pub(crate) fn container(name: &str, network: Network) -> Container {
        Container {
            id: id(name),
            name: name.into(),
            started_at: "2026-01-01T00:00:00.5Z".into(),
            pid: 0,
            run: RunEnd::default(),
            left: RunEnd::default(),
            network,
            plugs: Vec::new(),
            variables: vec!["BACKEND_A=a;80".to_owned()],
            labels: BTreeMap::new(),
            unread: 0,
            exposed: BTreeSet::new(),
            published: BTreeMap::new(),
            stop_signal: 15,
            is_stopping: false,
            is_paused: false,
            is_restarting: false,
            is_healthy: true,
        }
    }

    pub(crate) fn bridge(address: &str) -> Network {
        on(&[("bridge", address, "172.17.0.1")])
    }

    /// Each with its ID, which is its name, an address and a gateway.
    pub(crate) fn on(networks: &[(&str, &str, &str)]) -> Network {
        let attachment = |name: &str, address: &str, gateway: &str| Attachment {
            name: name.into(),
            addresses: vec![address.parse().unwrap()],
            gateways: vec![gateway.parse().unwrap()],
            mac: None,
        };
        let attached = networks.iter().map(|(id, a, g)| ((*id).into(), attachment(id, a, g)));
        Network::Own(attached.collect())
    }

    pub(crate) fn inventory(containers: impl IntoIterator<Item = Container>) -> Inventory {
        let mut containers: Vec<_> = containers.into_iter().map(Arc::new).collect();
        containers.sort_by(|a, b| a.id.cmp(&b.id));
        Inventory { containers, ..Inventory::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::{samples::*, *};
    use crate::model::Process;

    #[test]
    fn which_run_is_later_is_the_kernels_word_where_it_is_seen() {
        let at = |name: &str, moment: &str, ticks: Option<u64>, network| {
            let run = Container { started_at: moment.into(), ..container(name, network) };
            if let Some(started) = ticks {
                run.run.is_that_of(Process { pid: 7, started });
            }
            run
        };
        let (early, late) = ("2026-01-01T00:00:00Z", "2026-01-01T00:00:01Z");
        let is_served = |owner, sharer| {
            let sharer = at("b", early, sharer, Network::Of("a".into()));
            let all = inventory([at("a", late, owner, bridge("172.17.0.2")), sharer]);
            all.namespace(&all.containers[1]).is_ok()
        };
        // The clock was set back between the two.
        assert!(is_served(Some(10), Some(20)));
        assert!(!is_served(Some(20), Some(10)));
        assert!(!is_served(Some(10), None));
    }

    #[test]
    fn a_network_is_followed_to_its_owner() {
        let of = |name: &str, other: &str| container(name, Network::Of(other.into()));
        let late = container("late", bridge("172.17.0.3"));
        let all = inventory([
            Container { name: "first".into(), ..container("a", bridge("172.17.0.2")) },
            of("b", "a"),
            of("c", "b"),
            of("d", "first"),
            of("lost", "gone"),
            Container { started_at: "2026-01-01T00:00:00.51Z".into(), ..late },
            of("left", "late"),
            of("one", "two"),
            of("two", "one"),
        ]);
        let owner = |name: &str| {
            let container = all.containers.iter().find(|one| one.id == id(name)).unwrap();
            all.namespace(container).map(|owner| owner.id.as_str())
        };
        assert_eq!(["a", "b", "c", "d"].map(owner), [const { Ok("a") }; 4]);
        assert_eq!(owner("lost"), Err(NoNetwork::Gone("gone".into())));
        assert_eq!(owner("left"), Err(NoNetwork::Restarted("late".into())));
        assert_eq!(owner("one"), Err(NoNetwork::Circle));
    }
}
