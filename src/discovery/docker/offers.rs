//! From inspected containers to the services they offer, read as registrator reads them. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use bollard::models::{ContainerInspectResponse, HealthStatusEnum, PortBinding};

use crate::{
    discovery::{Endpoints, Query, Rejected},
    model::{ContainerId, Endpoint, Port, RunEnd, Stay},
};

/// Every running container of an engine, by ID.
pub(super) type Containers = BTreeMap<ContainerId, Container>;

/// What an inspection says of a running container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Container {
    name: String,
    /// Its first process, as the engine numbers it; 0 where it does not say.
    pub(super) pid: i32,
    /// `State.StartedAt`
    started_at: String,
    /// The end of this run, where its process can be seen.
    pub(super) end: RunEnd,
    /// Comes when it is no more where it was, by the engine's word.
    pub(super) left: RunEnd,
    /// The variables and then the labels named `SERVICE_*`, without that prefix, in lower case.
    metadata: Vec<(String, String)>,
    exposed: BTreeSet<ContainerPort>,
    published: BTreeMap<ContainerPort, Vec<SocketAddr>>,
    network: Network,
    /// Its HEALTHCHECK passes, or it has none.
    healthy: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Network {
    /// Its address on the first network, by name, that gave it one.
    Own(Option<IpAddr>),
    Host,
    /// That of another container: its ID or name.
    Container(String),
}

/// Where the containers are, as seen from here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// On this host: their own addresses can be reached.
    Here,
    /// On a host with this address: only published ports can be reached.
    There(IpAddr),
}

/// One service on one port of one container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Offer {
    service: String,
    tags: Vec<String>,
    healthy: bool,
    /// For people.
    container: String,
    /// Where it can be reached, or why it cannot.
    endpoint: Result<Endpoint, String>,
    /// What that hangs on, where it is on this host.
    stay: Stay,
}

#[cfg(test)]
impl Offer {
    /// The end of its container's run.
    pub(super) fn run(&self) -> RunEnd {
        self.stay.runs[0].1.clone()
    }
}

/// A port inside a container. TCP is the only protocol that is proxied, but registrator counts the others as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct ContainerPort {
    number: Port,
    tcp: bool,
}

/// The full answer to `query`.
pub(super) fn select(offers: &[Offer], query: &Query, healthy_only: bool) -> Endpoints {
    let mut rejected = Vec::new();
    let wanted = offers.iter().filter(|offer| {
        offer.service == query.service.as_str()
            && query.tags.all_in(&offer.tags)
            && (offer.healthy || !healthy_only)
            && !offer.stay.is_over()
    });
    let (mut list, mut stays) = (Vec::new(), BTreeMap::new());
    for offer in wanted {
        match &offer.endpoint {
            Ok(endpoint) => {
                list.push(*endpoint);
                if offer.stay != Stay::default() {
                    stays.insert(*endpoint, offer.stay.clone());
                }
            }
            Err(reason) => rejected.push(Rejected {
                what: format!("container {}", offer.container),
                reason: reason.clone(),
            }),
        }
    }
    Endpoints { stays, ..Endpoints::new(list, rejected) }
}

/// Every service that the containers offer.
pub(super) fn offers(containers: &Containers, place: Place) -> Vec<Offer> {
    containers.iter().flat_map(|(id, container)| container.offers(id, containers, place)).collect()
}

impl Container {
    /// `None` where it does not run, or is paused: its kernel would accept connections that nobody answers.
    pub(super) fn new(inspected: ContainerInspectResponse) -> Option<Self> {
        let state = inspected.state?;
        let is = |flag: Option<bool>| flag == Some(true);
        if !is(state.running) || is(state.paused) || is(state.restarting) {
            return None;
        }
        let config = inspected.config.unwrap_or_default();
        let settings = inspected.network_settings.unwrap_or_default();
        let ports = settings.ports.unwrap_or_default();
        let exposed = config.exposed_ports.iter().flatten().chain(ports.keys());
        let mode = inspected.host_config.and_then(|host| host.network_mode).unwrap_or_default();
        let networks: BTreeMap<_, _> = settings.networks.unwrap_or_default().into_iter().collect();
        let first_address = networks.values().find_map(|network| {
            [&network.ip_address, &network.global_ipv6_address]
                .into_iter()
                .find_map(|address| address.as_deref()?.parse().ok())
        });
        Some(Self {
            name: inspected.name.unwrap_or_default().trim_start_matches('/').to_owned(),
            pid: state.pid.and_then(|pid| pid.try_into().ok()).unwrap_or_default(),
            started_at: state.started_at.unwrap_or_default(),
            end: RunEnd::default(),
            left: RunEnd::default(),
            exposed: exposed.filter_map(|port| ContainerPort::parse(port)).collect(),
            published: ports
                .iter()
                .filter_map(|(port, bindings)| {
                    let bindings: Vec<_> =
                        bindings.iter().flatten().filter_map(bound_address).collect();
                    Some((ContainerPort::parse(port)?, bindings))
                })
                .filter(|(_, bindings)| !bindings.is_empty())
                .collect(),
            network: match mode.strip_prefix("container:") {
                Some(other) => Network::Container(other.to_owned()),
                None if mode == "host" => Network::Host,
                None => Network::Own(first_address),
            },
            healthy: match state.health.and_then(|health| health.status) {
                Some(HealthStatusEnum::STARTING | HealthStatusEnum::UNHEALTHY) => false,
                Some(
                    HealthStatusEnum::HEALTHY | HealthStatusEnum::NONE | HealthStatusEnum::EMPTY,
                )
                | None => true,
            },
            metadata: metadata(
                config.env.unwrap_or_default(),
                config.labels.unwrap_or_default().into_iter().collect(),
            ),
        })
    }

    /// Takes over what others hang on, as far as it is the same run, and at the same address.
    pub(super) fn follows(&mut self, before: &Self) {
        if self.started_at == before.started_at {
            self.end = before.end.clone();
            if self.network == before.network {
                self.left = before.left.clone();
                return;
            }
        }
        before.left.mark_ended();
    }

    /// Whether it has none but these addresses, as far as it has one of its own.
    pub(super) fn is_at(&self, addresses: &BTreeSet<IpAddr>) -> bool {
        !matches!(&self.network, Network::Own(Some(own)) if !addresses.contains(own))
    }

    fn offers(&self, id: &ContainerId, all: &Containers, place: Place) -> Vec<Offer> {
        let found = self.network_owner(id, all);
        let stay = match (place, found) {
            (Place::Here, Ok((owner_id, owner))) => {
                let mut stay = Stay {
                    runs: vec![(id.clone(), self.end.clone())],
                    left: vec![self.left.clone()],
                };
                if owner_id != id {
                    stay.runs.push((owner_id.clone(), owner.end.clone()));
                    stay.left.push(owner.left.clone());
                }
                stay
            }
            _ => Stay::default(),
        };
        let owner = found.map(|(_, owner)| owner);
        let on_host = owner.is_ok_and(|owner| owner.network == Network::Host);
        let mut visible: BTreeSet<ContainerPort> = match (place, owner) {
            (Place::There(_), Ok(owner)) if !on_host => owner.published.keys().copied().collect(),
            _ => self.exposed.clone(),
        };
        // As registrator does it: with several ports, a name that is not a port's own gets the port behind it.
        let several = visible.len() > 1;
        let plain_name = self.metadata(None, "name");
        visible.retain(|port| port.tcp);
        let offer = |service: String, port: Option<Port>, endpoint| Offer {
            service,
            tags: self.metadata(port, "tags").map(split_tags).unwrap_or_default(),
            healthy: self.healthy,
            container: match port {
                Some(port) => format!("{}:{port}", self.name),
                None => self.name.clone(),
            },
            endpoint,
            stay: stay.clone(),
        };

        let mut offers = Vec::new();
        let ports: BTreeSet<_> =
            visible.iter().map(|port| port.number).chain(self.named_ports()).collect();
        for port in ports {
            if self.metadata(Some(port), "ignore").is_some() {
                continue;
            }
            let service = match self.own_metadata(port, "name") {
                Some("") => continue,
                Some(own) => own.to_owned(),
                None => match plain_name {
                    Some(name) if several => format!("{name}-{port}"),
                    Some(name) => name.to_owned(),
                    None => continue,
                },
            };
            let endpoint = owner.and_then(|owner| owner.endpoint(port, place));
            offers.push(offer(service, Some(port), endpoint.map_err(str::to_owned)));
        }
        let ignored = self.metadata(None, "ignore").is_some();
        if let (true, false, Some(name)) = (visible.is_empty(), ignored, plain_name) {
            let reason = match (owner, place) {
                (Err(reason), _) => reason,
                (Ok(_), Place::There(_)) if !on_host => "SERVICE_NAME, but no published TCP port",
                _ => {
                    "SERVICE_NAME, but no TCP port: expected an exposed one, or SERVICE_<port>_NAME"
                }
            };
            offers.push(offer(name.to_owned(), None, Err(reason.to_owned())));
        }
        offers
    }

    /// Where a port of a container that has its own network, or the host's, can be reached.
    fn endpoint(&self, port: Port, place: Place) -> Result<Endpoint, &'static str> {
        let at = |address| Ok(Endpoint(SocketAddr::new(address, port.get())));
        match (&self.network, place) {
            (Network::Own(Some(address)), Place::Here) => at(*address),
            (Network::Own(None), Place::Here) => Err("no address: it is on no network"),
            (Network::Host, Place::Here) => at(Ipv4Addr::LOCALHOST.into()),
            (Network::Host, Place::There(host)) => at(host),
            (Network::Own(_), Place::There(host)) => self
                .published
                .get(&ContainerPort { number: port, tcp: true })
                .ok_or("the port is not published")?
                .iter()
                .find_map(|bound| reachable(*bound, host))
                .map(Endpoint)
                .ok_or("the port is published only where it cannot be reached from here"),
            // `network_owner` does not return one of these.
            (Network::Container(_), _) => Err("it has no network of its own"),
        }
    }

    /// The container whose network this one uses: itself, or at the end of `--network=container:` references.
    fn network_owner<'a>(
        &'a self,
        id: &'a ContainerId,
        all: &'a Containers,
    ) -> Result<(&'a ContainerId, &'a Self), &'static str> {
        let mut owner = (id, self);
        for _ in 0..=all.len() {
            let Network::Container(other) = &owner.1.network else { return Ok(owner) };
            owner = all
                .get_key_value(&ContainerId::new(other))
                .or_else(|| all.iter().find(|(_, container)| container.name == *other))
                .ok_or("the container whose network it uses does not run")?;
        }
        Err("it uses its own network through another container")
    }

    /// `SERVICE_<port>_<key>`
    fn own_metadata(&self, port: Port, key: &str) -> Option<&str> {
        self.last(&format!("{port}_{key}"))
    }

    /// `SERVICE_<port>_<key>`, else `SERVICE_<key>`; none where it is empty.
    fn metadata(&self, port: Option<Port>, key: &str) -> Option<&str> {
        port.and_then(|port| self.own_metadata(port, key))
            .or_else(|| self.last(key))
            .filter(|value| !value.is_empty())
    }

    /// Labels come after variables, and win.
    fn last(&self, key: &str) -> Option<&str> {
        let found = self.metadata.iter().rev().find(|(name, _)| name == key);
        found.map(|(_, value)| value.as_str())
    }

    /// Those with a `SERVICE_<port>_NAME`.
    fn named_ports(&self) -> impl Iterator<Item = Port> {
        self.metadata.iter().filter_map(|(key, _)| key.strip_suffix("_name")?.parse().ok())
    }
}

impl ContainerPort {
    /// `80/tcp`
    fn parse(text: &str) -> Option<Self> {
        let (number, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        Some(Self { number: number.parse().ok()?, tcp: protocol == "tcp" })
    }
}

fn metadata(env: Vec<String>, labels: BTreeMap<String, String>) -> Vec<(String, String)> {
    let env = env.iter().filter_map(|variable| variable.split_once('='));
    let labels = labels.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    env.chain(labels)
        .filter_map(|(name, value)| {
            let key = name.strip_prefix("SERVICE_")?.to_ascii_lowercase();
            Some((key, value.to_owned()))
        })
        .collect()
}

/// Commas separate; one behind a backslash belongs to the tag.
fn split_tags(list: &str) -> Vec<String> {
    let mut tags = vec![String::new()];
    let mut rest = list.chars().peekable();
    while let Some(c) = rest.next() {
        match (c, tags.last_mut()) {
            (',', _) => tags.push(String::new()),
            ('\\', Some(tag)) if rest.peek() == Some(&',') => tag.extend(rest.next()),
            (c, Some(tag)) => tag.push(c),
            (_, None) => {}
        }
    }
    tags.retain(|tag| !tag.is_empty());
    tags
}

/// An engine without IPv6 leaves the address empty: every IPv4 address.
fn bound_address(binding: &PortBinding) -> Option<SocketAddr> {
    let port = binding.host_port.as_deref()?.parse::<Port>().ok()?;
    let address = match binding.host_ip.as_deref() {
        None | Some("") => Ipv4Addr::UNSPECIFIED.into(),
        Some(address) => address.parse().ok()?,
    };
    Some(SocketAddr::new(address, port.get()))
}

/// How a port that is bound to `bound` on the host is reached from elsewhere.
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
