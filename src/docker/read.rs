//! An engine's answers and events, read by the fields that engines from 20.10 to 29 all fill. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
};

use bollard::models::{
    ContainerInspectResponse, ContainerSummary, EndpointSettings, EventMessage,
    EventMessageTypeEnum, HealthStatusEnum, Network as NetworkAnswer, PortBinding,
};

use super::container::{Attachment, Bridge, Bridges, Container, ContainerPort, Network, NetworkId};
use crate::model::{ContainerId, Port, RunEnd};

/// The filter of the event stream: containers and networks.
pub(super) const ACTIONS: [&str; 10] = [
    "start",
    "rename",
    "pause",
    "unpause",
    "health_status",
    "die",
    "destroy",
    "create",
    "connect",
    "disconnect",
];

/// What an event says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Notice {
    /// A container changed: an inspection shows how.
    Changed(ContainerId),
    /// A run ended.
    Ended(ContainerId),
    /// A container was removed.
    Destroyed(ContainerId),
    /// A container left a network, of which this is the ID or the name.
    Left(ContainerId, Arc<str>),
    /// There is a network more or less.
    Networks,
}

/// The events that matter here.
pub(super) fn notice(event: &EventMessage) -> Option<Notice> {
    let actor = event.actor.as_ref()?;
    let subject = actor.id.as_deref()?;
    // The container and the network: podman has them the other way round, and the network by its name.
    let attached = || {
        let attribute = |name| Some(actor.attributes.as_ref()?.get(name)?.as_str());
        match attribute("container") {
            Some(container) => Some((ContainerId::new(container), subject)),
            None => Some((ContainerId::new(subject), attribute("network")?)),
        }
    };
    match (event.typ?, event.action.as_deref()?) {
        (EventMessageTypeEnum::CONTAINER, "die") => Some(Notice::Ended(ContainerId::new(subject))),
        (EventMessageTypeEnum::CONTAINER, "destroy") => {
            Some(Notice::Destroyed(ContainerId::new(subject)))
        }
        // `health_status: healthy`
        (EventMessageTypeEnum::CONTAINER, action)
            if action.starts_with("health_status")
                || matches!(action, "start" | "rename" | "pause" | "unpause") =>
        {
            Some(Notice::Changed(ContainerId::new(subject)))
        }
        (EventMessageTypeEnum::NETWORK, "create" | "destroy") => Some(Notice::Networks),
        (EventMessageTypeEnum::NETWORK, "connect") => Some(Notice::Changed(attached()?.0)),
        (EventMessageTypeEnum::NETWORK, "disconnect") => {
            let (container, network) = attached()?;
            Some(Notice::Left(container, network.into()))
        }
        _ => None,
    }
}

/// A running container, as a list has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Listed {
    pub(super) id: ContainerId,
    /// All its addresses; `None` if the list does not say.
    pub(super) addresses: Option<BTreeSet<IpAddr>>,
}

/// What an inspection found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    Running(Box<Container>),
    NotRunning,
    /// The inspection failed.
    Unknown,
}

/// What a list says of the containers in it.
pub(super) fn listed(containers: Vec<ContainerSummary>) -> Vec<Listed> {
    let listed = containers.into_iter().filter_map(|container| {
        let networks = container.network_settings.and_then(|settings| settings.networks);
        let addresses = networks.map(|networks| networks.values().flat_map(addresses).collect());
        Some(Listed { id: ContainerId::new(container.id.as_deref()?), addresses })
    });
    listed.collect()
}

/// The addresses of a container's end of a network. An engine leaves one that does not exist empty.
fn addresses(end: &EndpointSettings) -> impl Iterator<Item = IpAddr> {
    let both = [&end.ip_address, &end.global_ipv6_address];
    both.into_iter().filter_map(|text| text.as_deref()?.parse().ok())
}

/// What an inspection found. Of a container's variables and labels those are kept whose
/// names begin with one of `prefixes`: the others may be large, and secret.
pub(super) fn found(
    id: &ContainerId,
    answer: ContainerInspectResponse,
    prefixes: &[String],
) -> Found {
    container(id, answer, prefixes).map_or(Found::NotRunning, |one| Found::Running(one.into()))
}

/// What an inspection says of a container; `None` if it does not run.
pub(crate) fn container(
    id: &ContainerId,
    answer: ContainerInspectResponse,
    prefixes: &[String],
) -> Option<Container> {
    let network = network(&answer);
    let state = answer.state.filter(|state| state.running == Some(true))?;
    let config = answer.config.unwrap_or_default();
    let ports = answer.network_settings.and_then(|settings| settings.ports).unwrap_or_default();
    let exposed = config.exposed_ports.iter().flatten().chain(ports.keys());
    let is_read = |name: &str| prefixes.iter().any(|prefix| name.starts_with(prefix));
    let published = ports.iter().filter_map(|(port, bindings)| {
        let bound: Vec<_> = bindings.iter().flatten().filter_map(bound_address).collect();
        Some((ContainerPort::parse(port)?, bound)).filter(|(_, bound)| !bound.is_empty())
    });
    Some(Container {
        id: id.clone(),
        name: answer.name.as_deref().unwrap_or_default().trim_start_matches('/').into(),
        started_at: state.started_at.as_deref().unwrap_or_default().into(),
        pid: state.pid.and_then(|pid| pid.try_into().ok()).unwrap_or_default(),
        run: RunEnd::default(),
        left: RunEnd::default(),
        network,
        exposed: exposed.filter_map(|port| ContainerPort::parse(port)).collect(),
        published: published.collect(),
        variables: config.env.into_iter().flatten().filter(|text| is_read(text)).collect(),
        labels: config.labels.into_iter().flatten().filter(|(name, _)| is_read(name)).collect(),
        is_halted: state.paused == Some(true) || state.restarting == Some(true),
        is_healthy: !matches!(
            state.health.and_then(|health| health.status),
            Some(HealthStatusEnum::STARTING | HealthStatusEnum::UNHEALTHY)
        ),
    })
}

fn network(answer: &ContainerInspectResponse) -> Network {
    let mode = answer.host_config.as_ref().and_then(|config| config.network_mode.as_deref());
    match mode.unwrap_or_default() {
        "host" => Network::Host,
        mode => match mode.strip_prefix("container:") {
            Some(target) => Network::Of(target.to_owned()),
            None => Network::Own(attachments(answer)),
        },
    }
}

fn attachments(answer: &ContainerInspectResponse) -> BTreeMap<NetworkId, Attachment> {
    let networks = answer.network_settings.as_ref().and_then(|settings| settings.networks.as_ref());
    let attached = networks.into_iter().flatten().filter_map(|(name, end)| {
        let id = end.network_id.as_deref().filter(|id| !id.is_empty())?;
        Some((id.into(), attachment(name, end)))
    });
    attached.collect()
}

fn attachment(name: &str, end: &EndpointSettings) -> Attachment {
    let gateways = [&end.gateway, &end.ipv6_gateway];
    let gateways = gateways.into_iter().filter_map(|text| text.as_deref()?.parse().ok());
    Attachment {
        name: name.into(),
        addresses: addresses(end).collect(),
        gateways: gateways.collect(),
    }
}

impl ContainerPort {
    /// `80/tcp`
    fn parse(text: &str) -> Option<Self> {
        let (number, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        Some(Self { number: number.parse().ok()?, tcp: protocol == "tcp" })
    }
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

/// The networks whose gateways are on the engine's host.
pub(super) fn bridges(networks: Vec<NetworkAnswer>) -> Bridges {
    let bridges = networks.into_iter().filter(|n| n.driver.as_deref() == Some("bridge"));
    let described = bridges.filter_map(|network| {
        let ranges = network.ipam.and_then(|ipam| ipam.config).unwrap_or_default();
        let ranges = ranges.iter().filter_map(|range| range.subnet.as_deref()?.parse().ok());
        let id = network.id?;
        let named = network.options.and_then(|mut o| o.remove("com.docker.network.bridge.name"));
        // The default name by the engine's driver.
        let interface = named.or_else(|| Some(format!("br-{}", id.get(..12)?))).unwrap_or_default();
        Some((id.into(), Bridge { ranges: ranges.collect(), interface: interface.into() }))
    });
    described.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An engine's answer, from a file that also names its origin.
    fn answer(file: &str) -> ContainerInspectResponse {
        let mut file: serde_json::Value = serde_json::from_str(file).unwrap();
        serde_json::from_value(file["answer"].take()).unwrap()
    }

    fn read(answer: ContainerInspectResponse) -> Option<Container> {
        let id = ContainerId::new(answer.id.as_deref().unwrap_or_default());
        container(&id, answer, &["BACKEND_".to_owned(), "embassy.".to_owned()])
    }

    fn running(file: &str) -> Container {
        read(answer(file)).unwrap()
    }

    #[test]
    fn engines_from_20_10_to_29_say_the_same() {
        let old = running(include_str!("fixtures/inspect-20.10.json"));
        assert_eq!(old, running(include_str!("fixtures/inspect-29.json")));

        assert_eq!((&*old.name, &*old.started_at), ("app", "2026-11-22T19:03:57.425590444Z"));
        assert_eq!(old.variables, ["BACKEND_WEB=/services/web;80"]);
        assert_eq!(old.labels, [("embassy.backend.redis".into(), "redis;6379".into())].into());
        assert!(!old.is_halted && old.is_healthy);
        let texts = |list: &[IpAddr]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
        let mut ends: Vec<_> =
            old.attachments().map(|(_, a)| (texts(&a.addresses), texts(&a.gateways))).collect();
        ends.sort();
        let back = (
            ["10.9.0.2", "fd00:aaaa::2"].map(String::from),
            ["10.9.0.1", "fd00:aaaa::1"].map(String::from),
        );
        let bridge = (["172.17.0.3".to_owned()], ["172.17.0.1".to_owned()]);
        let expected = [(back.0.to_vec(), back.1.to_vec()), (bridge.0.to_vec(), bridge.1.to_vec())];
        assert_eq!(ends, expected);
        assert_eq!(old.address(), Some("10.9.0.2".parse().unwrap()), "on the first by name");
    }

    #[test]
    fn a_network_of_anothers_is_known_by_its_mode() {
        let shared = running(include_str!("fixtures/inspect-20.10-shared.json"));
        let owner = answer(include_str!("fixtures/inspect-20.10.json")).id.unwrap();
        assert_eq!(shared.network, Network::Of(owner));
        let host = running(include_str!("fixtures/inspect-20.10-host.json"));
        assert_eq!(host.network, Network::Host);
    }

    #[test]
    fn what_does_not_run_is_not_there() {
        let mut answer = answer(include_str!("fixtures/inspect-20.10.json"));
        answer.state.as_mut().unwrap().running = Some(false);
        assert_eq!(read(answer), None);
        assert_eq!(read(ContainerInspectResponse::default()), None);
    }

    /// What follows from each event, in a word.
    fn effects(file: &str) -> Vec<&'static str> {
        let mut file: serde_json::Value = serde_json::from_str(file).unwrap();
        let events: Vec<EventMessage> = serde_json::from_value(file["events"].take()).unwrap();
        let is_it = |id: ContainerId| id.to_string() == "e3219c8d7aa9";
        let effect = |event: &EventMessage| match notice(event) {
            Some(Notice::Changed(id)) if is_it(id.clone()) => "changed",
            Some(Notice::Ended(id)) if is_it(id.clone()) => "ended",
            Some(Notice::Left(id, _)) if is_it(id.clone()) => "left",
            Some(Notice::Destroyed(id)) if is_it(id.clone()) => "destroyed",
            Some(_) => "another",
            None => "",
        };
        events.iter().map(effect).collect()
    }

    #[test]
    fn events_of_engines_from_20_10_to_29_have_the_same_effect() {
        let old = effects(include_str!("fixtures/events-20.10.json"));
        assert_eq!(old, effects(include_str!("fixtures/events-29.json")));
        // Two networks and the start; a network left, told twice; a kill, and the end; the last network left; destroyed.
        let expected = "changed changed changed left left  ended left destroyed";
        assert_eq!(old, expected.split(' ').collect::<Vec<_>>());
    }

    #[test]
    fn what_an_event_says_of_a_container() {
        for (event, says) in [
            (
                r#"{"Type": "container", "Action": "health_status: healthy", "Actor": {"ID": "c1"}}"#,
                Some(Notice::Changed(ContainerId::new("c1"))),
            ),
            (r#"{"Type": "container", "Action": "exec_start: x", "Actor": {"ID": "c1"}}"#, None),
            (r#"{"Type": "network", "Action": "connect", "Actor": {"ID": "n1"}}"#, None),
            // podman
            (
                r#"{"Type": "network", "Action": "connect", "Actor": {"ID": "c1", "Attributes": {"network": "n"}}}"#,
                Some(Notice::Changed(ContainerId::new("c1"))),
            ),
            (
                r#"{"Type": "network", "Action": "disconnect", "Actor": {"ID": "c1", "Attributes": {"network": "n"}}}"#,
                Some(Notice::Left(ContainerId::new("c1"), "n".into())),
            ),
            (
                r#"{"Type": "network", "Action": "create", "Actor": {"ID": "n1"}}"#,
                Some(Notice::Networks),
            ),
            (r#"{"Type": "image", "Action": "tag", "Actor": {"ID": "i1"}}"#, None),
            (r#"{"status": "start", "id": "c1"}"#, None),
        ] {
            assert_eq!(notice(&serde_json::from_str(event).unwrap()), says, "{event}");
        }
    }
}
