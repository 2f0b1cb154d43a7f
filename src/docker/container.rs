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

/// A network's ID. [`SHOWN`] is never the ID of a real network.
pub type NetworkId = Arc<str>;

/// Used in place of a network's ID for addresses that a container's process shows and its engine does not report. Another
/// program set them, such as CNI, pipework or a DHCP client, or the engine did, so that a swarm's container can reach its
/// host.
pub(crate) const SHOWN: &str = "";

/// Everything that runs on an engine at one time. Unchanged parts are the same `Arc` as in the previous inventory, and
/// equal inputs give equal inventories.
#[derive(Debug, Clone, Default)]
pub struct Inventory {
    /// Sorted by ID.
    pub containers: Vec<Arc<Container>>,
    /// The networks of the `bridge` driver.
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
    /// The number of resolved doubts: times when a container appeared that may have got another one's address. Everything
    /// here is newer.
    pub confirmed: u64,
}

pub type Bridges = BTreeMap<NetworkId, Bridge>;
pub type OtherNetworks = BTreeMap<NetworkId, OtherNetwork>;
/// The bridge of each port. Only bridges that rules can name.
pub type BridgePorts = BTreeMap<u32, Interface>;
/// The addresses of interfaces, by the interface's name, without loopback and link-local addresses.
pub type Interfaces = BTreeMap<Arc<str>, Vec<IpAddr>>;

/// A network that is not a bridge of the engine's host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OtherNetwork {
    pub driver: Arc<str>,
    pub ranges: Vec<IpNet>,
    /// For `macvlan` and `ipvlan`: the host's interface under it.
    pub parent: Arc<str>,
}

/// A network whose gateway is an address of the engine's host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bridge {
    pub ranges: Vec<IpNet>,
    /// The interface with the gateway's address.
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
    /// The process ID of its first process, in the engine's PID namespace. 0 if the engine does not report it.
    pub pid: i32,
    /// The end of this run, if its process is visible. The same value as long as the run is known.
    pub run: RunEnd,
    /// Ends when the engine reports that the container can no longer be reached as before: it is gone, is between two runs,
    /// or has another address.
    pub left: RunEnd,
    pub network: Network,
    /// This host's ends of the veth pairs of its network namespace. Empty if its process is not visible. Sorted.
    pub plugs: Vec<Plug>,
    /// `NAME=value`, only those that a reader of this follower needs.
    pub variables: Vec<String>,
    pub labels: BTreeMap<String, String>,
    /// The number of further variables and labels that are not read because there are too many.
    pub unread: usize,
    pub exposed: BTreeSet<ContainerPort>,
    pub published: BTreeMap<ContainerPort, Vec<SocketAddr>>,
    /// The number of the signal that asks it to stop.
    pub stop_signal: i32,
    /// This signal was sent to the current run.
    pub is_stopping: bool,
    /// While it is paused, the kernel accepts connections, but no process answers them.
    pub is_paused: bool,
    /// It is between two runs.
    pub is_restarting: bool,
    /// Its HEALTHCHECK passes, or it has no HEALTHCHECK.
    pub is_healthy: bool,
}

/// The network namespace of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// Its own namespace, attached to these networks.
    Own(BTreeMap<NetworkId, Attachment>),
    /// The namespace of another container, by that one's ID or name: `net=container:X`.
    Of(String),
    /// The host's namespace: `net=host`.
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

/// A port inside a container. Only TCP is proxied, but registrator counts other protocols as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ContainerPort {
    pub number: Port,
    pub tcp: bool,
}

/// Why the network of a container with `net=container:X` is unknown.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoNetwork {
    #[error("net=container:{0}: that container does not run")]
    Gone(String),
    #[error("net=container:{0}: it restarted since, and has another network now")]
    Restarted(String),
    #[error("net=container: circular reference")]
    Circle,
}

/// The bridge network of a container's end, if there is one. Podman up to 5.3 reports the network's name instead of its ID.
/// Then the gateway identifies the network.
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
    /// The container that owns this one's network namespace: itself, or the end of a chain of `net=container:` references.
    pub fn namespace<'a>(
        &'a self,
        container: &'a Arc<Container>,
    ) -> Result<&'a Arc<Container>, NoNetwork> {
        let mut owner = container;
        // An engine does not create loops of references, but a bound costs nothing.
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

    /// The container with this ID or name.
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
    /// All addresses on its own networks.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.attachments().flat_map(|(_, attachment)| &attachment.addresses).copied()
    }

    /// The addresses that the engine gave it.
    pub(super) fn given(&self) -> impl Iterator<Item = IpAddr> {
        let given = self.attachments().filter(|(network, _)| ***network != *SHOWN);
        given.flat_map(|(_, attachment)| &attachment.addresses).copied()
    }

    /// Whether it has its own network namespace, and the engine gave it no address there.
    pub(super) fn is_unaddressed(&self) -> bool {
        matches!(self.network, Network::Own(_)) && self.given().next().is_none()
    }

    /// The same container with `shown` as the attachment that its process shows.
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

    /// The attachment that its process shows, if any.
    pub(super) fn shown(&self) -> Option<&Attachment> {
        self.attachments().find(|(network, _)| ***network == *SHOWN).map(|(_, shown)| shown)
    }

    /// The networks to which its own namespace is attached.
    pub fn attachments(&self) -> impl Iterator<Item = (&NetworkId, &Attachment)> {
        let own = match &self.network {
            Network::Own(attachments) => Some(attachments),
            Network::Of(_) | Network::Host => None,
        };
        own.into_iter().flatten()
    }

    /// Whether it can be reached at all addresses at which it could be reached in an earlier state.
    pub(super) fn is_reached_as(&self, before: &Self) -> bool {
        let kind = std::mem::discriminant(&self.network) == std::mem::discriminant(&before.network);
        kind && self.started_at == before.started_at
            && before.addresses().all(|address| self.addresses().any(|now| now == address))
            && self.is_restarting == before.is_restarting
    }

    /// Whether this run started after another. The kernel's start times are preferred over the wall clock's.
    fn is_later_than(&self, other: &Self) -> bool {
        match (self.run.process(), other.run.process()) {
            (Some(this), Some(other)) => this.started > other.started,
            _ => later(&self.started_at, &other.started_at),
        }
    }
}

/// Whether one of the engine's times is later than another. They are RFC 3339 in UTC without trailing zeros. So the text
/// order is the time order once the `Z` is removed.
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

    /// A container with the binding of `a` to port 80.
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

    /// Networks whose ID equals their name, each with an address and a gateway.
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
        // The clock was set back between the two starts.
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
