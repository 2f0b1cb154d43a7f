//! Derives the services that an engine's containers offer. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::{metadata::Metadata, reach::Standpoint};
use crate::{
    descriptor,
    discovery::{Endpoints, Query, Rejected, Rejections, missing},
    docker::{
        container::{Container, ContainerPort, Inventory, Network, NoNetwork},
        per_container::{PerContainer, Subject},
    },
    model::{Endpoint, Port, Stay},
};

/// Maximum number of services of one container, each on one port. An image may declare a hundred thousand, and expose every
/// port.
pub(super) const MOST: usize = 1000;

/// Everything that an engine's containers offer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Offers {
    /// Sorted by the service's name.
    services: BTreeMap<String, Vec<Arc<Offer>>>,
    /// The names of the containers that declare more than [`MOST`].
    beyond: Vec<Arc<str>>,
}

/// What each container offered before.
pub(crate) type Made = PerContainer<EngineHost, Offered>;

/// What one container offers.
#[derive(Debug, Default)]
pub(crate) struct Offered {
    /// The first ones by port.
    offers: Vec<Arc<Offer>>,
    /// It declares more than [`MOST`].
    beyond: bool,
}

/// The location of the containers, as seen from embassy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum EngineHost {
    /// On this host: their own addresses can be reached on some of their networks.
    Here(Standpoint),
    /// On the host with this address: only published ports can be reached.
    There(IpAddr),
}

/// One service on one port of one container.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Offer {
    service: String,
    /// Shared: most containers have the same tags on all ports.
    tags: Arc<[String]>,
    healthy: bool,
    /// It is paused or was asked to stop, and is used only if there is no other. A connection to it waits or is refused.
    last_resort: bool,
    /// For messages.
    container: Arc<str>,
    port: Option<Port>,
    /// The address at which it can be reached, or why it cannot.
    endpoint: Result<Endpoint, String>,
    /// The runs that the address depends on, if it is on this host.
    stay: Stay,
}

impl fmt::Display for Offer {
    /// The container, and the port.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            Some(port) => write!(f, "container {}:{port}", self.container),
            None => write!(f, "container {}", self.container),
        }
    }
}

impl Offers {
    /// The services that the containers of `inventory` offer. `is_here`: they are reached at their own addresses.
    pub(crate) fn of(inventory: &Inventory, is_here: bool, made: &mut Made) -> Self {
        let place = match inventory.host.filter(|_| !is_here) {
            None => EngineHost::Here(Standpoint::of(inventory)),
            Some(host) => EngineHost::There(host),
        };
        let made = made.update(inventory, place.clone(), |Subject { container, owner, .. }| {
            offers(container, owner.map(Arc::as_ref), &place)
        });
        let mut all = Self::default();
        for (container, offered) in made {
            if offered.beyond {
                all.beyond.push(container.name.clone());
            }
            for offer in offered.offers.iter().filter(|offer| !offer.stay.is_over()) {
                match all.services.get_mut(&offer.service) {
                    Some(offers) => offers.push(offer.clone()),
                    None => drop(all.services.insert(offer.service.clone(), vec![offer.clone()])),
                }
            }
        }
        all
    }

    /// The numbers of offers, of containers with more than the limit, and of lists of tags in memory.
    #[cfg(test)]
    pub(super) fn counts(&self) -> (usize, usize, usize) {
        let all = || self.services.values().flatten();
        let lists: BTreeSet<_> = all().map(|offer| offer.tags.as_ptr()).collect();
        (all().count(), self.beyond.len(), lists.len())
    }

    /// The complete answer to `query`.
    pub(crate) fn select(&self, query: &Query, healthy_only: bool) -> Endpoints {
        let mut rejected = Rejections::default();
        let named = self.services.get(query.service.as_str()).into_iter().flatten();
        let named: Vec<_> = named.filter(|offer| !offer.stay.is_over()).collect();
        let tagged: Vec<_> =
            named.iter().copied().filter(|offer| query.tags.all_in(&offer.tags)).collect();
        let is_fit = |offer: &&Arc<Offer>| offer.healthy || !healthy_only;
        let (wanted, unhealthy): (Vec<_>, Vec<_>) = tagged.iter().copied().partition(is_fit);
        let is_first_choice = |offer: &&Arc<Offer>| !offer.last_resort && offer.endpoint.is_ok();
        let there_are_better = wanted.iter().any(is_first_choice);
        let (mut list, mut stays) = (Vec::new(), BTreeMap::new());
        let mut unfit: BTreeSet<_> = unhealthy
            .into_iter()
            .filter_map(|offer| offer.endpoint.as_ref().ok())
            .copied()
            .collect();
        for offer in &wanted {
            match &offer.endpoint {
                Ok(endpoint) if offer.last_resort && there_are_better => {
                    unfit.insert(*endpoint);
                }
                Ok(endpoint) => {
                    list.push(*endpoint);
                    if offer.stay != Stay::default() {
                        stays.insert(*endpoint, offer.stay.clone());
                    }
                }
                Err(reason) => {
                    rejected.push(Rejected { what: offer.to_string(), reason: reason.clone() })
                }
            }
        }
        // A declaration that was not read may be for this service.
        let may_lack = |container: &&Arc<str>| {
            named.is_empty() || named.iter().any(|offer| offer.container == **container)
        };
        let lacking = self.beyond.iter().filter(may_lack);
        let lacking = Rejections::of(lacking.map(|container| Rejected {
            what: format!("container {container}"),
            reason: format!(
                "it declares more than {MOST} services, each on one port: the rest are not read"
            ),
        }));
        let problem = list.is_empty().then(|| {
            let (name, tags) = (query.service.as_str(), &query.tags);
            match (named.is_empty(), tagged.len(), wanted.is_empty()) {
                (true, ..) => missing::no_such_service(
                    "no running container offers this service",
                    name,
                    self.services.keys(),
                ),
                (_, 0, _) => {
                    let carried = named.iter().map(|offer| &*offer.tags);
                    missing::no_such_tags(missing::CONTAINER, tags, carried)
                }
                (_, count, true) => missing::none_healthy(missing::CONTAINER, count, "HEALTHCHECK"),
                (.., false) => {
                    missing::all_skipped(missing::CONTAINER, &rejected).unwrap_or_default()
                }
            }
        });
        let problem = problem.map(Into::into);
        lacking.iter().for_each(|one| rejected.push(one.clone()));
        let endpoints = Endpoints::new(list, rejected);
        unfit.retain(|one| endpoints.list.binary_search(one).is_err());
        Endpoints { stays, problem, unfit, ..endpoints }
    }
}

/// The services that a container offers. `owner` is the container that owns its network.
fn offers(
    container: &Container,
    owner: Result<&Container, &NoNetwork>,
    place: &EngineHost,
) -> Offered {
    let mut offered = Offered::default();
    let metadata = Metadata::of(container);
    if container.is_restarting || metadata.is_empty() {
        return offered;
    }
    let stay = match (place, owner) {
        (EngineHost::Here(_), Ok(owner)) => stay(container, owner),
        _ => Stay::default(),
    };
    let on_host = owner.is_ok_and(|owner| owner.network == Network::Host);
    let mut visible: BTreeSet<ContainerPort> = match (place, owner) {
        (EngineHost::There(_), Ok(owner)) if !on_host => owner.published.keys().copied().collect(),
        _ => container.exposed.clone(),
    };
    // As with registrator: with several ports, a name that is not for one port gets the port as a suffix.
    let several = visible.len() > 1;
    let plain_name = metadata.get(None, "name");
    visible.retain(|port| port.tcp);
    let tags = metadata.tags();
    let mut offer = |service: String, port: Option<Port>, tags: &Arc<[String]>, endpoint| {
        offered.beyond = offered.offers.len() >= MOST;
        if !offered.beyond {
            offered.offers.push(Arc::new(Offer {
                service,
                tags: tags.clone(),
                healthy: container.is_healthy,
                last_resort: container.is_paused || container.is_stopping,
                container: container.name.clone(),
                port,
                endpoint,
                stay: stay.clone(),
            }));
        }
        !offered.beyond
    };

    let ports: BTreeSet<_> =
        visible.iter().map(|port| port.number).chain(metadata.named_ports()).collect();
    for port in ports {
        if metadata.get(Some(port), "ignore").is_some() {
            continue;
        }
        let (name, own) = match (metadata.own(port, "name"), plain_name) {
            (Some(own), _) => (own, true),
            (None, Some(name)) => (name, false),
            (None, None) => continue,
        };
        let endpoint = match owner {
            Ok(owner) => endpoint(owner, port, place),
            Err(reason) => Err(reason.to_string()),
        };
        let tags = metadata.own_tags(port).unwrap_or_else(|| tags.clone());
        for name in names(name) {
            let service = if several && !own { format!("{name}-{port}") } else { name.to_owned() };
            if !offer(service, Some(port), &tags, endpoint.clone()) {
                return offered;
            }
        }
    }
    let ignored = metadata.get(None, "ignore").is_some();
    if let (true, false, Some(name)) = (visible.is_empty(), ignored, plain_name) {
        let reason = match (owner, place) {
            (Err(reason), _) => reason.to_string(),
            (Ok(_), EngineHost::There(_)) if !on_host => {
                "SERVICE_NAME, but no published TCP port".to_owned()
            }
            _ => "SERVICE_NAME, but no TCP port: expected an exposed one, or SERVICE_<port>_NAME"
                .to_owned(),
        };
        for name in names(name) {
            if !offer(name.to_owned(), None, &tags, Err(reason.clone())) {
                break;
            }
        }
    }
    offered
}

/// The names in a comma-separated list. Empty names are skipped, and so are names that are too long for a descriptor.
fn names(list: &str) -> impl Iterator<Item = &str> {
    let names = list.split(',').map(str::trim);
    names.filter(|name| !name.is_empty() && name.len() <= descriptor::LONGEST)
}

/// The runs on which an endpoint of a container on this host depends.
fn stay(container: &Container, owner: &Container) -> Stay {
    let mut stay = Stay {
        runs: vec![(container.id.clone(), container.run.clone())],
        left: vec![container.left.clone()],
    };
    if owner.id != container.id {
        stay.runs.push((owner.id.clone(), owner.run.clone()));
        stay.left.push(owner.left.clone());
    }
    stay
}

/// The address at which a port in the network of `owner` can be reached.
fn endpoint(owner: &Container, port: Port, place: &EngineHost) -> Result<Endpoint, String> {
    let at = |address| Endpoint(SocketAddr::new(address, port.get()));
    let host = match place {
        EngineHost::Here(standpoint) => return standpoint.address_of(owner).map(at),
        EngineHost::There(host) => *host,
    };
    if owner.network == Network::Host {
        return Ok(at(host));
    }
    let bound = owner.published.get(&ContainerPort { number: port, tcp: true });
    let mut bound = bound.ok_or("the port is not published")?.iter();
    let reached = bound.find_map(|bound| reachable(*bound, host)).map(Endpoint);
    let elsewhere = "the port is published only at an address that is not reachable from here";
    reached.ok_or_else(|| elsewhere.to_owned())
}

/// The address at which other hosts reach a port that is bound to `bound` on the host.
fn reachable(bound: SocketAddr, host: IpAddr) -> Option<SocketAddr> {
    let address = bound.ip();
    if address.is_unspecified() {
        (address.is_ipv4() == host.is_ipv4()).then(|| SocketAddr::new(host, bound.port()))
    } else if address.is_loopback() {
        (address == host).then_some(bound)
    } else {
        Some(bound)
    }
}
