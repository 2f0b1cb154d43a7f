//! The docker provider: the bindings in containers' variables and labels. Pure.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    mem,
    net::IpAddr,
    sync::Arc,
};

use super::{Invalid, Listing, NETWORK, Problem, bindings::bindings};
use crate::{
    consumer::{Binding, Consumer},
    cow_map::CowMap,
    docker::{
        container::{
            Attachment, Bridge, BridgePorts, Bridges, Container, Inventory, Network, NetworkId,
            OtherNetworks, SHOWN, bridge_of,
        },
        per_container::{PerContainer, Subject},
        read::{LARGEST_DECLARED, MOST_DECLARED},
    },
    identity::follow,
    model::{ConsumerId, ContainerId},
    wiring::{Arrival, Interface, Owner, Plug, Wiring},
};

/// Derives listings from inventories. An unchanged consumer is the same `Arc` as in the previous listing.
#[derive(Debug)]
pub(crate) struct Listings {
    prefix: String,
    asking: PerContainer<Common, Asking>,
    /// For each container: whether it has an address on which another container could have a stronger claim.
    unsure: PerContainer<Arc<Bridges>, bool>,
    addresses: AddressClaims,
    /// The ports of all bridges, the engine's bridges, and the ports of the latter. Kept as long as the inputs are the
    /// same.
    ports: (Arc<BridgePorts>, BTreeSet<Interface>, Arc<BTreeSet<u32>>),
    wiring: Arc<Wiring>,
}

/// Which containers have which addresses, and what follows from it. The cost depends on the changes.
#[derive(Debug, Default)]
struct AddressClaims {
    /// The addresses of the running containers, sorted by container.
    cables: Vec<Arc<OwnAddresses>>,
    of_address: HashMap<IpAddr, Vec<Arc<OwnAddresses>>>,
    known: Arc<BTreeSet<IpAddr>>,
    contested: BTreeSet<IpAddr>,
    owners: CowMap<IpAddr, Arc<Owner>>,
    unbound: CowMap<IpAddr, Arc<str>>,
}

/// A container's own addresses, and how they are connected to this host.
#[derive(Debug, PartialEq, Eq)]
struct OwnAddresses {
    name: Arc<str>,
    /// Sorted, without duplicates.
    all: Vec<(IpAddr, Cable)>,
}

/// The inputs that are common to the bindings of all containers.
#[derive(Debug, Clone, PartialEq)]
struct Common {
    bridges: Arc<Bridges>,
    others: Arc<OtherNetworks>,
    outclaimed: Outclaimed,
    /// The interfaces of bridge networks in our own network namespace, if known.
    interfaces: BTreeMap<NetworkId, Interface>,
}

const NET_HOST: &str = "net=host: cannot be told from other host processes by its address; run embassy with \
    -provider=static for the host itself";

const NO_ADDRESS: &str = "no address: Docker gave it none (--network none), and embassy sees none in its network (in a container, \
    run embassy with --pid=host)";

const ON_OVERLAY: &str = "no address by which it reaches this host: it is on an overlay network, and embassy sees no other address in \
    its network (in a container, run embassy with --pid=host)";

/// How certain it is that connections from an address come from a container. Of two claims on an address, the more certain
/// one wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Certainty {
    /// Its process shows the address. Any program may have set it.
    Shown,
    /// The engine assigned it on a network whose gateway is not on this host, such as macvlan or overlay.
    Elsewhere,
    /// The engine assigned it on a bridge of this host.
    OnBridge,
}

/// Addresses of containers on which another container has a stronger claim.
type Outclaimed = BTreeSet<(ContainerId, IpAddr)>;

/// The bindings of a container.
#[derive(Debug)]
struct Asking {
    /// Of a consumer, they are its own.
    without_consumer: Vec<Binding>,
    problems: Vec<Problem>,
    /// `None` if it has no bindings, or its network is unknown.
    consumer: Option<Arc<Consumer>>,
    no_network: Option<Problem>,
    /// The same value as before, as long as it is equal.
    cables: Arc<OwnAddresses>,
}

/// How an address of a container is connected to this host.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Cable {
    /// On a bridge, on ports that belong to this container only.
    Bound(Arc<Owner>),
    /// On a bridge, on unknown ports.
    Unbound,
    Other,
}

impl Listings {
    pub(crate) fn new(prefix: String) -> Self {
        Self {
            prefix,
            asking: PerContainer::default(),
            unsure: PerContainer::default(),
            addresses: AddressClaims::default(),
            ports: Default::default(),
            wiring: Arc::default(),
        }
    }

    /// The listing for an inventory.
    pub(crate) fn of(&mut self, inventory: &Inventory) -> Listing {
        let bridges = inventory.bridges.values();
        let names = bridges.clone().map(|bridge| bridge.interface.clone());
        let mut listing = Listing {
            networks: bridges.flat_map(|bridge| &bridge.ranges).copied().collect(),
            bridges: names.filter(|name| !name.is_empty()).collect(),
            confirmed: inventory.confirmed,
            ..Listing::default()
        };
        let common = Common {
            bridges: inventory.bridges.clone(),
            others: inventory.others.clone(),
            outclaimed: if self.may_be_outclaimed(inventory) {
                outclaimed(inventory)
            } else {
                Outclaimed::new()
            },
            interfaces: interfaces(inventory),
        };
        let mut wiring = segments(inventory, &common.interfaces);
        wiring.ports = self.ports(inventory, &wiring.interfaces);
        let (prefix, mut cables) = (&self.prefix, Vec::new());
        let asking = self
            .asking
            .update(inventory, common.clone(), |subject| Asking::of(subject, prefix, &common));
        for (container, asking) in asking {
            // The kernel reports an end before the engine does, and the address may already be reused.
            if container.run.has_ended() {
                continue;
            }
            cables.push(&asking.cables);
            if !asking.problems.is_empty() && asking.bindings().is_empty() {
                let (name, id) = (container.name.clone(), container.id.clone());
                let addresses = container.addresses().collect();
                listing.invalid.push(Invalid { name, id, addresses });
            }
            listing.consumers.extend(asking.consumer.clone());
            listing.problems.extend(asking.problems.iter().chain(&asking.no_network).cloned());
        }
        self.addresses.follow(&cables);
        listing.contested = self.addresses.contested.clone();
        listing.known = self.addresses.known.clone();
        wiring.owners = self.addresses.owners.clone();
        wiring.unbound = self.addresses.unbound.clone();
        if *self.wiring != wiring {
            self.wiring = wiring.into();
        }
        listing.wiring = self.wiring.clone();
        listing.gateways = gateways(inventory, &listing.known);
        listing.problems.sort();
        listing
    }

    /// Whether any container may have a stronger claim on an address than another. Usually all are on bridges, and none
    /// has.
    fn may_be_outclaimed(&mut self, inventory: &Inventory) -> bool {
        let bridges = &inventory.bridges;
        let is_unsure = |(network, end): (&NetworkId, &Attachment)| {
            claim(bridges, network, end) < Certainty::OnBridge
        };
        let of = |subject: Subject<'_, bool>| subject.container.attachments().any(is_unsure);
        let mut all = self.unsure.update(inventory, bridges.clone(), of);
        all.any(|(container, is_unsure)| *is_unsure && !container.run.has_ended())
    }

    /// The ports of the engine's bridges.
    fn ports(
        &mut self,
        inventory: &Inventory,
        bridges: &BTreeSet<Interface>,
    ) -> Arc<BTreeSet<u32>> {
        let (all, of, ports) = &mut self.ports;
        if !Arc::ptr_eq(all, &inventory.ports) || of != bridges {
            let of_engine = inventory.ports.iter().filter(|(_, bridge)| bridges.contains(bridge));
            *ports = Arc::new(of_engine.map(|(port, _)| *port).collect());
            (*all, *of) = (inventory.ports.clone(), bridges.clone());
        }
        ports.clone()
    }
}

impl AddressClaims {
    /// Updates the claims for the running containers.
    fn follow(&mut self, now: &[&Arc<OwnAddresses>]) {
        let (gone, new) = follow(&mut self.cables, now);
        if gone.is_empty() && new.is_empty() {
            return;
        }
        for gone in &gone {
            for (address, _) in &gone.all {
                if let Some(claims) = self.of_address.get_mut(address) {
                    claims.retain(|one| !Arc::ptr_eq(one, gone));
                }
            }
        }
        for new in &new {
            for (address, _) in &new.all {
                self.of_address.entry(*address).or_default().push(new.clone());
            }
        }
        for (address, _) in gone.iter().chain(&new).flat_map(|cables| &cables.all) {
            self.settle(*address);
        }
    }

    /// Updates what follows from the claims on an address.
    fn settle(&mut self, address: IpAddr) {
        let claims = self.of_address.get(&address).map_or(&[][..], Vec::as_slice);
        // A connection from a contested address waits until its owner is known. Until then the guard blocks nobody.
        let (only, is_contested) = match claims {
            [] => (None, false),
            [only] => (Some(only), false),
            _ => (None, true),
        };
        if only.is_some() != self.known.contains(&address) {
            let known = Arc::make_mut(&mut self.known);
            let _ = if only.is_some() { known.insert(address) } else { known.remove(&address) };
        }
        self.owners.remove(&address);
        self.unbound.remove(&address);
        match only.map(|only| (only, only.cable(&address))) {
            Some((_, Some(Cable::Bound(owner)))) => {
                self.owners.insert(address, owner.clone());
            }
            Some((only, Some(Cable::Unbound))) => {
                self.unbound.insert(address, only.name.clone());
            }
            Some((_, Some(Cable::Other) | None)) | None => {}
        }
        match is_contested {
            true => self.contested.insert(address),
            false => self.contested.remove(&address),
        };
        if claims.is_empty() {
            self.of_address.remove(&address);
        }
    }
}

impl OwnAddresses {
    fn cable(&self, address: &IpAddr) -> Option<&Cable> {
        let at = self.all.binary_search_by_key(address, |(address, _)| *address).ok()?;
        self.all.get(at).map(|(_, cable)| cable)
    }
}

/// This host's addresses in its bridge networks, which no container has. The interfaces' names are not needed: podman does
/// not report them.
fn gateways(inventory: &Inventory, known: &BTreeSet<IpAddr>) -> BTreeSet<IpAddr> {
    let ranges = || inventory.bridges.values().flat_map(|bridge| &bridge.ranges);
    let own = inventory.here.values().flatten().copied();
    own.filter(|own| ranges().any(|range| range.contains(own)) && !known.contains(own)).collect()
}

/// The interface of each bridge network in our own network namespace: the one with its name, or the one with an address in
/// it. A network without an interface here belongs to another namespace, or embassy runs in one of its containers.
fn interfaces(inventory: &Inventory) -> BTreeMap<NetworkId, Interface> {
    let is_containers = |address: &IpAddr| {
        inventory.containers.iter().any(|one| one.addresses().any(|of_it| of_it == *address))
    };
    let of = |bridge: &Bridge| {
        let is_in = |own: &&IpAddr| bridge.ranges.iter().any(|range| range.contains(*own));
        let here = inventory.here.iter();
        let inside = here.filter_map(|(name, own)| Some((name, own.iter().find(is_in)?)));
        let inside: Vec<_> = inside.collect();
        if inside.iter().any(|(name, _)| **name == bridge.interface) {
            return Interface::new(&bridge.interface);
        }
        match inside[..] {
            [(only, own)] if !is_containers(own) => Interface::new(only),
            // The bridge may have no address.
            [] if inventory.here.contains_key(&bridge.interface) => {
                Interface::new(&bridge.interface)
            }
            _ => None,
        }
    };
    let bridges = inventory.bridges.iter();
    bridges.filter_map(|(network, bridge)| Some((network.clone(), of(bridge)?))).collect()
}

/// The wiring without containers and ports.
fn segments(inventory: &Inventory, interfaces: &BTreeMap<NetworkId, Interface>) -> Wiring {
    let mut wiring = Wiring::default();
    for (network, bridge) in &*inventory.bridges {
        if bridge.is_apart {
            wiring.apart.extend(bridge.ranges.iter().copied());
        }
        match interfaces.get(network) {
            Some(interface) => {
                wiring.segments.extend(bridge.ranges.iter().map(|range| (*interface, *range)));
                wiring.interfaces.insert(*interface);
            }
            None => wiring.loose.extend(bridge.ranges.iter().copied()),
        }
    }
    for (name, addresses) in &*inventory.here {
        if Interface::new(name).is_some_and(|name| wiring.interfaces.contains(&name)) {
            wiring.gateways.extend(addresses.iter().copied());
        }
    }
    wiring
}

impl Common {
    /// The interfaces on which connections from an address on a network arrive at this host.
    fn arrival(&self, owner: &Container, network: &NetworkId, end: &Attachment) -> Arrival {
        // For networks of other programs, the kernel shows this host's ends of their veth pairs.
        let shown = || {
            let mut all: Vec<_> = owner.plugs.iter().map(|plug| plug.interface).collect();
            all.dedup();
            match all[..] {
                [Some(only)] => Arrival::By(only),
                _ => Arrival::Anywhere,
            }
        };
        if **network == *SHOWN {
            return shown();
        }
        if let Some((id, _)) = bridge_of(&self.bridges, network, end) {
            let Some(interface) = self.interfaces.get(id) else { return Arrival::Anywhere };
            // If its veth pair was moved to another bridge, by hand or just now, the interface is in doubt.
            let is_there = owner.plugs.is_empty()
                || owner.plugs.iter().any(|plug| plug.interface == Some(*interface));
            return if is_there { Arrival::By(*interface) } else { Arrival::Anywhere };
        }
        match self.others.get(network) {
            Some(other) if OF_OTHER_HOSTS.contains(&&*other.driver) => Arrival::Outside,
            Some(_) => shown(),
            None => Arrival::Anywhere,
        }
    }

    /// A container's addresses, and how they are connected.
    fn cables(&self, owner: &Container) -> Vec<(IpAddr, Arrival, Cable)> {
        let addresses = addresses(owner, &self.outclaimed);
        let mut cables: Vec<(IpAddr, Arrival, Cable)> = Vec::new();
        for (network, end) in owner.attachments() {
            let arrival = self.arrival(owner, network, end);
            let cable = match arrival {
                Arrival::By(interface) => {
                    let here = owner.plugs.iter().filter(|plug| plug.interface == Some(interface));
                    let (ports, routed): (Vec<&Plug>, Vec<_>) = here.partition(|plug| plug.is_port);
                    match ports.is_empty() {
                        false => Cable::Bound(Arc::new(Owner {
                            name: owner.name.clone(),
                            ports: ports.iter().map(|plug| plug.index).collect(),
                            mac: end.mac,
                        })),
                        true if routed.is_empty() => Cable::Unbound,
                        true => Cable::Other,
                    }
                }
                Arrival::Anywhere if bridge_of(&self.bridges, network, end).is_some() => {
                    Cable::Unbound
                }
                Arrival::Anywhere | Arrival::Outside => Cable::Other,
            };
            let its = end.addresses.iter().filter(|address| addresses.contains(address));
            cables.extend(its.map(|address| (*address, arrival, cable.clone())));
        }
        cables.sort_by_key(|(address, ..)| *address);
        // If two networks contain the same address, its connections may arrive on either.
        cables.dedup_by(|(other, ..), (address, arrival, cable)| {
            let same = other == address;
            if same {
                (*arrival, *cable) = (Arrival::Anywhere, Cable::Other);
            }
            same
        });
        cables
    }
}

/// The drivers of networks that are not bridges of this host: their containers are on the network of a parent interface, or
/// on a network that spans several hosts.
const OF_OTHER_HOSTS: [&str; 3] = ["macvlan", "ipvlan", "overlay"];

/// A container's addresses on which no other container has a stronger claim.
fn addresses(container: &Container, outclaimed: &Outclaimed) -> BTreeSet<IpAddr> {
    let is_its = |address: &IpAddr| {
        outclaimed.is_empty() || !outclaimed.contains(&(container.id.clone(), *address))
    };
    container.addresses().filter(is_its).collect()
}

fn outclaimed(inventory: &Inventory) -> Outclaimed {
    let alive = || inventory.containers.iter().filter(|one| !one.run.has_ended());
    let claims = |one: &Container| {
        let mut claims = BTreeMap::new();
        for (network, end) in one.attachments() {
            let claim = claim(&inventory.bridges, network, end);
            for address in &end.addresses {
                let surest: &mut Certainty = claims.entry(*address).or_insert(claim);
                *surest = claim.max(*surest);
            }
        }
        claims
    };
    let is_unsure = |(network, end): (&NetworkId, &Attachment)| {
        claim(&inventory.bridges, network, end) < Certainty::OnBridge
    };
    let mut surest: HashMap<IpAddr, Certainty> = HashMap::new();
    for one in alive().filter(|one| one.attachments().any(is_unsure)) {
        surest.extend(claims(one));
    }
    for (address, claim) in alive().flat_map(|one| claims(one)) {
        if let Some(surest) = surest.get_mut(&address) {
            *surest = claim.max(*surest);
        }
    }
    let mut outclaimed = Outclaimed::new();
    for one in alive() {
        let weaker = claims(one).into_iter();
        let weaker = weaker.filter(|(at, claim)| surest.get(at).is_some_and(|best| best > claim));
        outclaimed.extend(weaker.map(|(at, _)| (one.id.clone(), at)));
    }
    outclaimed
}

fn claim(bridges: &Bridges, network: &NetworkId, end: &Attachment) -> Certainty {
    match bridge_of(bridges, network, end) {
        _ if **network == *SHOWN => Certainty::Shown,
        Some(_) => Certainty::OnBridge,
        None => Certainty::Elsewhere,
    }
}

impl Asking {
    fn bindings(&self) -> &[Binding] {
        match &self.consumer {
            Some(consumer) => &consumer.bindings,
            None => &self.without_consumer,
        }
    }

    fn of(subject: Subject<'_, Self>, prefix: &str, common: &Common) -> Self {
        let Subject { container, owner, before } = subject;
        let (bindings, problems) = match before {
            Some((was, asking)) if Arc::ptr_eq(was, container) => {
                (asking.bindings().to_vec(), asking.problems.clone())
            }
            _ => declared(container, prefix),
        };
        let own = common.cables(container);
        let own = own.into_iter().map(|(address, _, cable)| (address, cable));
        let cables = OwnAddresses { name: container.name.clone(), all: own.collect() };
        let before_cables = before.map(|(_, asking)| &asking.cables);
        let same = before_cables.filter(|before| ***before == cables);
        let cables = same.cloned().unwrap_or_else(|| cables.into());
        let mut asking =
            Self { without_consumer: bindings, problems, consumer: None, no_network: None, cables };
        if asking.without_consumer.is_empty() {
            return asking;
        }
        let reason = match owner {
            Ok(owner) if owner.network == Network::Host => NET_HOST.to_owned(),
            Ok(owner) => {
                let bindings = mem::take(&mut asking.without_consumer);
                let consumer = consumer(container, owner, common, bindings);
                let has_address = !consumer.sources.is_empty();
                let before = before.and_then(|(_, asking)| asking.consumer.as_ref());
                let same = before.filter(|before| before.is_same_as(&consumer));
                asking.consumer = Some(same.cloned().unwrap_or_else(|| consumer.into()));
                let is_overlay = |(network, _): (&NetworkId, &Attachment)| {
                    common.others.get(network).is_some_and(|other| &*other.driver == "overlay")
                };
                match has_address {
                    false => NO_ADDRESS.to_owned(),
                    true if owner.attachments().all(is_overlay) => ON_OVERLAY.to_owned(),
                    true => return asking,
                }
            }
            Err(reason) => reason.to_string(),
        };
        let (consumer, origin) = (container.name.clone(), NETWORK.into());
        asking.no_network =
            Some(Problem { consumer, origin, port: None, reason, overruled: false });
        asking
    }
}

/// The bindings that a container declares, and the problems in them.
fn declared(container: &Container, prefix: &str) -> (Vec<Binding>, Vec<Problem>) {
    let variables = container.variables.iter().map(String::as_str);
    let labels = container.labels.iter().map(|(name, text)| (name.as_str(), text.as_str()));
    let (bindings, mut problems) = bindings(&container.name, prefix, variables, labels);
    if container.unread > 0 {
        let (consumer, origin) = (container.name.clone(), "environment and labels".into());
        let reason = format!(
            "{} of them are not read: expected at most {MOST_DECLARED} variables and {MOST_DECLARED} labels, of {} KiB together",
            container.unread,
            LARGEST_DECLARED >> 10
        );
        problems.push(Problem { consumer, origin, port: None, reason, overruled: false });
    }
    (bindings, problems)
}

/// `owner` is the container that owns this one's network.
fn consumer(
    container: &Container,
    owner: &Container,
    common: &Common,
    bindings: Vec<Binding>,
) -> Consumer {
    // A gateway that a process shows is an address of this host.
    let on_bridges = owner.attachments().filter(|(network, end)| {
        ***network == *SHOWN || bridge_of(&common.bridges, network, end).is_some()
    });
    let mut gateways: Vec<_> = on_bridges.flat_map(|(_, end)| &end.gateways).copied().collect();
    gateways.sort();
    gateways.dedup();
    let (id, started_at) = (container.id.clone(), container.started_at.clone());
    Consumer {
        id: ConsumerId::Container { id, started_at },
        name: container.name.clone(),
        namespace: owner.id.as_str().into(),
        sources: addresses(owner, &common.outclaimed).into_iter().collect(),
        arrivals: {
            let cables = common.cables(owner).into_iter();
            let arrivals = cables.map(|(address, arrival, _)| (address, arrival));
            arrivals.filter(|(_, arrival)| *arrival != Arrival::Anywhere).collect()
        },
        gateways,
        bindings,
        ends: vec![container.run.clone(), owner.run.clone()],
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::docker::container::{
        OtherNetwork,
        samples::{self, *},
    };

    fn listing(containers: impl IntoIterator<Item = Container>) -> Listing {
        Listings::new("BACKEND_".to_owned()).of(&inventory(containers))
    }

    fn sources(listing: &Listing) -> Vec<(&str, Vec<String>)> {
        let of = |consumer: &'_ Arc<Consumer>| {
            consumer.sources.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        listing.consumers.iter().map(|consumer| (&*consumer.name, of(consumer))).collect()
    }

    #[test]
    fn every_address_on_every_network_is_a_source_and_the_gateways_of_bridges_are_vips() {
        let network = on(&[
            ("bridge", "172.17.0.2", "172.17.0.1"),
            ("macvlan", "192.168.1.5", "192.168.1.1"),
            ("bridge6", "fd00::2", "fd00::1"),
        ]);
        let ranges = vec!["172.17.0.0/16".parse().unwrap()];
        let bridges = [
            ("bridge".into(), Bridge { ranges, interface: "docker0".into(), is_apart: false }),
            ("bridge6".into(), Bridge::default()),
        ];
        let all =
            Inventory { bridges: Arc::new(bridges.into()), ..inventory([container("a", network)]) };
        let mut listings = Listings::new("BACKEND_".to_owned());
        let listing = listings.of(&all);
        let addresses = ["172.17.0.2", "192.168.1.5", "fd00::2"].map(String::from);
        assert_eq!(sources(&listing), [("a", addresses.to_vec())]);
        let gateways = |listing: &Listing| {
            let gateways = &listing.consumers[0].gateways;
            gateways.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(gateways(&listing), ["172.17.0.1", "fd00::1"]);
        assert_eq!(listing.networks, ["172.17.0.0/16".parse().unwrap()].into());
        assert_eq!(listing.bridges, ["docker0".into()].into());
        // The networks change, but the container does not.
        let listing = listings.of(&Inventory { bridges: Arc::default(), ..all });
        assert_eq!(gateways(&listing), [""; 0]);
    }

    #[test]
    fn an_address_that_two_containers_claim_is_contested_whatever_they_ask_for() {
        let other = Container { variables: vec![], ..container("b", bridge("172.17.0.2")) };
        let listing = listing([container("a", bridge("172.17.0.2")), other]);
        assert_eq!(listing.contested, ["172.17.0.2".parse().unwrap()].into());
        assert!(listing.known.is_empty(), "who dials from it may wait until that is cleared up");
        assert_eq!(listing.consumers.len(), 1);
    }

    #[test]
    fn this_hosts_addresses_in_bridge_networks_are_gateways_whatever_their_interface_is_called() {
        let bridge = |interface: &str, range: &str| Bridge {
            ranges: vec![range.parse().unwrap()],
            interface: interface.into(),
            is_apart: false,
        };
        let here = [
            ("podman1", "10.89.0.1"),
            ("docker0", "172.17.0.1"),
            ("elsewhere", "10.1.0.1"),
            // embassy runs in a container.
            ("eth0", "172.17.0.2"),
        ];
        let here = here.map(|(name, at)| (name.into(), vec![at.parse().unwrap()]));
        let bridges = [
            ("a".into(), bridge("br-0123456789ab", "10.89.0.0/24")),
            ("b".into(), bridge("docker0", "172.17.0.0/16")),
        ];
        let all = Inventory {
            bridges: Arc::new(bridges.into()),
            here: Arc::new(here.into()),
            ..inventory([container("embassy", samples::bridge("172.17.0.2"))])
        };
        let listing = Listings::new(String::new()).of(&all);
        let expected = ["10.89.0.1", "172.17.0.1"].map(|address| address.parse().unwrap());
        assert_eq!(listing.gateways, expected.into());
    }

    #[test]
    fn an_address_counts_where_its_network_and_its_cable_are() {
        let docker0 = Interface::new("docker0").unwrap();
        let bridge = |interface: &str, range: &str| Bridge {
            ranges: vec![range.parse().unwrap()],
            interface: interface.into(),
            is_apart: false,
        };
        let bridges = [
            ("bridge".into(), bridge("docker0", "172.17.0.0/16")),
            // Podman does not report the bridge's name. The other network's bridge is in another namespace.
            ("podman".into(), bridge("", "10.88.0.0/16")),
            ("away".into(), bridge("br-away", "10.99.0.0/16")),
        ];
        let of_driver = |driver: &str| OtherNetwork { driver: driver.into(), ..Default::default() };
        let others = [("mac".into(), of_driver("macvlan")), ("weave".into(), of_driver("weave"))];
        let here = [("docker0", "172.17.0.1"), ("podman0", "10.88.0.1"), ("eth0", "192.168.1.90")];
        let here = here.map(|(name, at)| (name.into(), vec![at.parse().unwrap()]));
        let plug = |index: u32, name: &str, is_port| Plug {
            index,
            interface: Interface::new(name),
            is_port,
        };
        let at = |name: &str, network: &str, address: &str, plugs: Vec<Plug>| Container {
            plugs,
            ..container(name, on(&[(network, address, "0.0.0.1")]))
        };
        let all = [
            at(
                "bound",
                "bridge",
                "172.17.0.2",
                vec![plug(7, "docker0", true), plug(8, "br-x", true)],
            ),
            at("unseen", "bridge", "172.17.0.3", vec![]),
            at("moved", "bridge", "172.17.0.4", vec![plug(9, "br-x", true)]),
            at("podman", "podman", "10.88.0.2", vec![plug(10, "podman0", true)]),
            at("away", "away", "10.99.0.2", vec![]),
            at("mac", "mac", "192.168.1.5", vec![]),
            at("routed", "weave", "10.32.0.2", vec![plug(11, "vethwe", false)]),
            at("unknown", "nobody knows it", "10.33.0.2", vec![]),
            at("one", "bridge", "172.17.0.9", vec![plug(12, "docker0", true)]),
            at("two", "bridge", "172.17.0.9", vec![plug(13, "docker0", true)]),
        ];
        let ports = [7, 12, 13, 20].map(|port| (port, docker0));
        let inventory = Inventory {
            bridges: Arc::new(bridges.into()),
            others: Arc::new(others.into()),
            here: Arc::new(here.into()),
            ports: Arc::new(
                ports.into_iter().chain([(30, Interface::new("virbr0").unwrap())]).collect(),
            ),
            ..inventory(all)
        };
        let listing = Listings::new("BACKEND_".to_owned()).of(&inventory);
        let by = |name: &str| Arrival::By(Interface::new(name).unwrap());
        for (name, expected) in [
            ("bound", by("docker0")),
            ("unseen", by("docker0")),
            ("moved", Arrival::Anywhere),
            ("podman", by("podman0")),
            ("away", Arrival::Anywhere),
            ("mac", Arrival::Outside),
            ("routed", by("vethwe")),
            ("unknown", Arrival::Anywhere),
        ] {
            let consumer = listing.consumers.iter().find(|one| *one.name == *name).unwrap();
            assert_eq!(consumer.arrival(&consumer.sources[0]), expected, "{name}");
        }
        let Wiring { segments, loose, gateways, ports, owners, unbound, .. } = &*listing.wiring;
        let texts =
            |all: &BTreeSet<IpAddr>| all.iter().map(ToString::to_string).collect::<Vec<_>>();
        let named: Vec<_> = segments.iter().map(|(by, net)| format!("{by} {net}")).collect();
        assert_eq!(named, ["docker0 172.17.0.0/16", "podman0 10.88.0.0/16"]);
        assert_eq!(loose.iter().map(ToString::to_string).collect::<Vec<_>>(), ["10.99.0.0/16"]);
        assert_eq!(texts(gateways), ["10.88.0.1", "172.17.0.1"]);
        assert_eq!(**ports, [7, 12, 13, 20].into(), "those of other bridges are others'");
        // The contested address has no owner until this is resolved.
        let mut owned: Vec<_> =
            owners.iter().map(|(at, owner)| (at.to_string(), &owner.ports[..])).collect();
        owned.sort();
        let expected = [("10.88.0.2".to_owned(), &[10][..]), ("172.17.0.2".to_owned(), &[7])];
        assert_eq!(owned, expected);
        let unbound: BTreeSet<_> = unbound.values().map(|name| &**name).collect();
        assert_eq!(unbound, ["away", "unseen", "moved"].into());
        // embassy runs in a container of the network: its interface is not the bridge.
        let here = [("eth0".into(), vec!["172.17.0.2".parse().unwrap()])];
        let inside = Inventory { here: Arc::new(here.into()), ..inventory };
        let listing = Listings::new("BACKEND_".to_owned()).of(&inside);
        assert!(listing.wiring.interfaces.is_empty() && listing.wiring.owners.is_empty());
        let first = &listing.consumers[0];
        assert_eq!(first.arrival(&first.sources[0]), Arrival::Anywhere);
    }

    /// A swarm's container reaches this host from an address that no inspection reports, but its process shows.
    #[test]
    fn a_container_on_an_overlay_alone_is_reported_until_it_shows_how_it_gets_here() {
        let overlay = OtherNetwork { driver: "overlay".into(), ..OtherNetwork::default() };
        let others = Arc::new([("swarm".into(), overlay)].into());
        let of = |network: Network| {
            let all = inventory([container("app", network)]);
            Listings::new("BACKEND_".to_owned())
                .of(&Inventory { others: Arc::clone(&others), ..all })
        };
        let in_swarm = ("swarm", "10.0.1.2", "10.0.1.1");
        let listing = of(on(&[in_swarm]));
        let reasons: Vec<_> = listing.problems.iter().map(|problem| &*problem.reason).collect();
        assert_eq!(reasons, [ON_OVERLAY]);
        let listing = of(on(&[in_swarm, (SHOWN, "172.18.0.3", "172.18.0.1")]));
        assert_eq!(listing.problems, []);
        let consumer = &listing.consumers[0];
        let texts = |all: &[IpAddr]| all.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(texts(&consumer.sources), ["10.0.1.2", "172.18.0.3"]);
        assert_eq!(texts(&consumer.gateways), ["172.18.0.1"]);
    }

    /// The same address on a bridge, on a network of several hosts, and set by a program in a container.
    #[test]
    fn of_two_claims_on_an_address_the_surer_one_counts() {
        let overlay = on(&[("overlay", "172.17.0.2", "172.17.0.1")]);
        let shown = on(&[(SHOWN, "172.17.0.2", "172.17.0.1")]);
        let bridges = Arc::new([("bridge".into(), Bridge::default())].into());
        let of = |networks: &[&Network]| {
            let names = ["a", "b", "c"].into_iter();
            let all = names.zip(networks).map(|(name, one)| container(name, (*one).clone()));
            let all = Inventory { bridges: Arc::clone(&bridges), ..inventory(all) };
            (Listings::new("BACKEND_".to_owned()).of(&all), all)
        };
        let at = |listing: &Listing| {
            let mut owners = sources(listing).into_iter().filter(|(_, at)| !at.is_empty());
            (owners.next().map(|(name, _)| name.to_owned()), owners.next().is_some())
        };
        let bridge = bridge("172.17.0.2");
        let (listing, all) = of(&[&shown, &overlay, &bridge]);
        assert_eq!(at(&listing), (Some("c".to_owned()), false));
        assert!(listing.contested.is_empty() && listing.known.len() == 1);
        let said: Vec<_> = listing.problems.iter().map(|p| &*p.consumer).collect();
        assert_eq!(said, ["a", "b"], "those without an address are told of");
        assert!(listing.problems.iter().all(|p| p.reason == NO_ADDRESS));
        let (listing, _) = of(&[&shown, &overlay]);
        assert_eq!(at(&listing), (Some("b".to_owned()), false));
        for same in [&shown, &overlay, &bridge] {
            assert_eq!(of(&[same, same]).0.contested.len(), 1);
        }
        // The claim ends with the run that had the strongest claim.
        all.containers[2].run.mark_ended();
        let listing = Listings::new("BACKEND_".to_owned()).of(&all);
        assert_eq!(at(&listing), (Some("b".to_owned()), false));
    }

    #[test]
    fn the_end_of_a_run_ends_all_who_live_in_its_network() {
        let all = inventory([
            container("a", bridge("172.17.0.2")),
            container("b", Network::Of("a".into())),
        ]);
        let mut listings = Listings::new("BACKEND_".to_owned());
        let before = listings.of(&all);
        let address = vec!["172.17.0.2".to_owned()];
        assert_eq!(sources(&before), [("a", address.clone()), ("b", address)]);
        assert!(before.consumers.iter().all(|consumer| &*consumer.namespace == "a"));
        assert!(!before.consumers.iter().any(|consumer| consumer.has_ended()));
        all.containers[0].run.mark_ended();
        assert!(before.consumers.iter().all(|consumer| consumer.has_ended()));
        let now = listings.of(&all);
        let ended: Vec<_> = now.consumers.iter().map(|consumer| consumer.has_ended()).collect();
        assert_eq!(ended, [true], "of the one who shared its network");
        assert!(now.known.is_empty());
    }

    #[test]
    fn a_consumer_that_did_not_change_is_the_same() {
        let (a, b) = (container("a", bridge("172.17.0.2")), container("b", bridge("172.17.0.3")));
        let c = container("c", Network::Of("a".into()));
        let mut listings = Listings::new("BACKEND_".to_owned());
        let all = inventory([a.clone(), b, c]);
        let before = listings.of(&all).consumers;
        let mut same = |change: &dyn Fn(&mut Inventory)| {
            let mut now = all.clone();
            change(&mut now);
            let now = listings.of(&now).consumers;
            before.iter().zip(now).map(|(one, now)| Arc::ptr_eq(one, &now)).collect::<Vec<_>>()
        };
        assert_eq!(same(&|_| ()), [true; 3]);
        let ill = Container { is_healthy: false, ..a.clone() };
        assert_eq!(same(&|now| now.containers[0] = ill.clone().into()), [true; 3]);
        let moved = Container { network: bridge("172.17.0.9"), ..a.clone() };
        assert_eq!(same(&|now| now.containers[0] = moved.clone().into()), [false, true, false]);
        // Another run, which is otherwise the same.
        let again = Container { run: Default::default(), ..a };
        assert_eq!(same(&|now| now.containers[0] = again.clone().into()), [false, true, false]);
    }

    #[test]
    fn a_container_without_a_valid_binding_is_found_by_its_id_and_address() {
        let wrong = Container {
            variables: vec!["BACKEND_A=nonsense".to_owned()],
            ..container("0123456789ab", bridge("172.17.0.2"))
        };
        let silent = Container { variables: vec![], ..container("b", bridge("172.17.0.3")) };
        let listing = listing([wrong, silent, container("c", bridge("172.17.0.4"))]);
        let [invalid] = &listing.invalid[..] else { panic!("{listing:?}") };
        assert!(invalid.is_called("0123") && invalid.is_called("172.17.0.2"));
        assert!(!invalid.is_called("012") && !invalid.is_called("172.17.0.3"));
        assert_eq!(listing.consumers.len(), 1);
    }

    /// A container on a bridge, on a network of several hosts, or as its process shows it. `None`: no container.
    fn some_container() -> impl Strategy<Value = Option<(u8, u8, u8, bool)>> {
        prop::option::weighted(0.8, (0..4_u8, 0..4_u8, 0..4_u8, prop::bool::weighted(0.2)))
    }

    proptest! {
        #[test]
        fn a_listing_that_follows_is_the_one_that_is_made_at_once(
            worlds in prop::collection::vec(
                (prop::collection::vec(some_container(), 4), any::<bool>()), 1..8,
            ),
        ) {
            let made = |name: usize, (net, address, other, has_ended): (u8, u8, u8, bool)| {
                let net = ["bridge", "overlay", SHOWN, "loose"][usize::from(net)];
                let (first, second) = (format!("172.17.0.{address}"), format!("172.17.0.{other}"));
                let network = on(&[(net, &first, "172.17.0.1"), ("away", &second, "172.17.0.1")]);
                let port = u32::from(address);
                let interface = Interface::new("docker0");
                let plugs = vec![Plug { index: port, interface, is_port: true }];
                let plugs = if other % 2 == 0 { plugs } else { Vec::new() };
                let one = Container { plugs, ..container(&name.to_string(), network) };
                if has_ended {
                    one.run.mark_ended();
                }
                Arc::new(one)
            };
            let mut listings = Listings::new("BACKEND_".to_owned());
            let mut same: HashMap<_, Arc<Container>> = HashMap::new();
            for (world, is_here) in worlds {
                let ranges = vec!["172.17.0.0/16".parse().unwrap()];
                let bridge = |interface: &str| Bridge { ranges: ranges.clone(), interface: interface.into(), is_apart: false };
                let bridges = [("bridge".into(), bridge("docker0")), ("loose".into(), bridge("br-loose"))];
                let here = [("docker0".into(), vec!["172.17.0.1".parse().unwrap()])];
                let containers = world.into_iter().enumerate().filter_map(|(name, one)| {
                    let one = (name, one?);
                    Some(same.entry(one).or_insert_with(|| made(one.0, one.1)).clone())
                });
                let inventory = Inventory {
                    containers: containers.collect(),
                    bridges: Arc::new(bridges.into()),
                    here: Arc::new(here.into_iter().filter(|_| is_here).collect()),
                    ports: Arc::new([(7, Interface::new("docker0").unwrap())].into()),
                    ..Inventory::default()
                };
                let at_once = Listings::new("BACKEND_".to_owned()).of(&inventory);
                let follows = listings.of(&inventory);
                prop_assert_eq!(&follows, &at_once);
                // The listing that is derived at once is correct: an address belongs to its only claimant.
                let mut claims: BTreeMap<IpAddr, BTreeSet<&str>> = BTreeMap::new();
                let common = outclaimed(&inventory);
                for one in inventory.containers.iter().filter(|one| !one.run.has_ended()) {
                    for address in addresses(one, &common) {
                        claims.entry(address).or_default().insert(one.id.as_str());
                    }
                }
                let with = |is: fn(usize) -> bool| {
                    let some = claims.iter().filter(|(_, who)| is(who.len()));
                    some.map(|(address, _)| *address).collect::<BTreeSet<_>>()
                };
                prop_assert_eq!(&*follows.known, &with(|count| count == 1));
                prop_assert_eq!(&follows.contested, &with(|count| count > 1));
                for (address, owner) in follows.wiring.owners.iter() {
                    prop_assert!(follows.known.contains(address));
                    let container = &inventory.containers.iter().find(|one| one.name == owner.name).unwrap();
                    prop_assert!(container.addresses().any(|one| one == *address));
                }
            }
        }
    }

    #[test]
    fn what_has_no_address_of_its_own_is_reported() {
        let listing = listing([
            container("host", Network::Host),
            container("orphan", Network::Of("gone".into())),
            container("self", Network::Of("self".into())),
            container("sharer", Network::Of("host".into())),
        ]);
        assert!(listing.consumers.is_empty());
        let reasons: Vec<_> =
            listing.problems.iter().map(|p| (&*p.consumer, &p.reason[..22])).collect();
        assert_eq!(
            reasons,
            [
                ("host", "net=host: cannot be to"),
                ("orphan", "net=container:gone: th"),
                ("self", "net=container: circula"),
                ("sharer", "net=host: cannot be to"),
            ]
        );
    }
}
