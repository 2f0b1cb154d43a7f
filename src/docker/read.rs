//! Converts an engine's answers and events to the types used here. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
};

use serde::de::Error;

use super::{
    answers::{self, Event, Inspection, NetworkEnd, PortBinding, StopSignal, Summary},
    container::{
        Attachment, Bridge, Bridges, Container, ContainerPort, Network, NetworkId, OtherNetwork,
        OtherNetworks,
    },
};
use crate::{
    json,
    model::{ContainerId, Port, RunEnd},
    text::shortened,
};

/// The filter of the event stream: actions of containers and networks. Podman says `died` and `remove`.
pub(super) const ACTIONS: [&str; 13] = [
    "start",
    "rename",
    "pause",
    "unpause",
    "health_status",
    "kill",
    "die",
    "died",
    "destroy",
    "remove",
    "create",
    "connect",
    "disconnect",
];

/// The meaning of an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Notice {
    /// A container changed. An inspection shows how.
    Changed(ContainerId),
    /// A signal was sent to a container. If it is the container's stop signal, the container is to end.
    Signalled(ContainerId, i32),
    /// A run ended.
    Ended(ContainerId),
    /// A container was removed.
    Destroyed(ContainerId),
    /// A container left this network, given by ID or name.
    Left(ContainerId, Arc<str>),
    /// A network was created or removed.
    Networks,
}

/// The meaning of an event. `None` if it does not matter here.
pub(super) fn notice(event: &Event) -> Option<Notice> {
    let actor = event.actor.as_ref()?;
    let subject = actor.id.as_deref()?;
    let attributes = actor.attributes.as_ref();
    // The container and the network. Podman has them in the opposite places and gives the network's name; podman up to 4
    // gives no network.
    let attached = || {
        let all = attributes?;
        Some(match all.container.as_deref() {
            Some(container) => (ContainerId::new(container), Some(subject)),
            None => (ContainerId::new(subject), all.network.as_deref()),
        })
    };
    match (event.kind.as_deref()?, event.action.as_deref()?) {
        ("container", "kill") => {
            let signal = attributes?.signal.as_deref().and_then(signal)?;
            Some(Notice::Signalled(ContainerId::new(subject), signal))
        }
        ("container", "die" | "died") => Some(Notice::Ended(ContainerId::new(subject))),
        ("container", "destroy" | "remove") => Some(Notice::Destroyed(ContainerId::new(subject))),
        // `health_status: healthy`
        ("container", action)
            if action.starts_with("health_status")
                || matches!(action, "start" | "rename" | "pause" | "unpause") =>
        {
            Some(Notice::Changed(ContainerId::new(subject)))
        }
        ("network", "create" | "destroy" | "remove") => Some(Notice::Networks),
        ("network", "connect") => Some(Notice::Changed(attached()?.0)),
        ("network", "disconnect") => Some(match attached()? {
            (container, Some(network)) => Notice::Left(container, network.into()),
            (container, None) => Notice::Changed(container),
        }),
        _ => None,
    }
}

/// Whether a container was made, which does not run yet.
pub(super) fn is_of_a_new_container(event: &Event) -> bool {
    (event.kind.as_deref(), event.action.as_deref()) == (Some("container"), Some("create"))
}

/// The number of a signal, from its name (`SIGTERM`, `TERM`) or its number. Knows only the names of signals that are used
/// to stop containers.
fn signal(text: &str) -> Option<i32> {
    let text = text.trim();
    if let Ok(number) = text.parse() {
        return Some(number);
    }
    let name = text.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    let known = [
        ("HUP", 1),
        ("INT", 2),
        ("QUIT", 3),
        ("ABRT", 6),
        ("KILL", 9),
        ("USR1", 10),
        ("USR2", 12),
        ("TERM", 15),
        ("WINCH", 28),
        ("PWR", 30),
    ];
    if let Some((_, number)) = known.iter().find(|(known, _)| *known == name) {
        return Some(*number);
    }
    // The first real-time signal that a C library leaves to programs. systemd stops on SIGRTMIN+3.
    const FIRST: i32 = 34;
    let after = name.strip_prefix("RTMIN")?;
    if after.is_empty() { Some(FIRST) } else { FIRST.checked_add(after.parse().ok()?) }
}

/// A running container in a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Listed {
    pub(super) id: ContainerId,
    /// All its addresses. `None` if the list does not contain them.
    pub(super) addresses: Option<BTreeSet<IpAddr>>,
}

/// What an inspection found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum InspectionResult {
    Running(Box<Container>),
    NotRunning,
    /// The inspection failed.
    Unknown,
}

/// Maximum number of containers of one engine.
const MOST_LISTED: usize = 65_536;

/// The containers of a list (`GET /containers/json`). The list has all their labels, which are not kept.
pub(super) fn list(json: &[u8]) -> Result<Vec<Listed>, serde_json::Error> {
    let mut all = Vec::new();
    json::each(json, |container| {
        all.extend(listed(serde_json::from_str(container.get())?));
        match all.len() > MOST_LISTED {
            true => {
                Err(serde_json::Error::custom(format_args!("more than {MOST_LISTED} containers")))
            }
            false => Ok(()),
        }
    })?;
    Ok(all)
}

/// The states of containers that do not run. Podman's list includes such containers.
const NOT_RUNNING: [&str; 7] =
    ["configured", "created", "dead", "exited", "initialized", "removing", "stopped"];

fn listed(container: Summary) -> Option<Listed> {
    if container.state.is_some_and(|state| NOT_RUNNING.contains(&&*state)) {
        return None;
    }
    let networks = container.network_settings.and_then(|settings| settings.networks);
    let addresses = networks.map(|networks| networks.values().flat_map(addresses).collect());
    Some(Listed { id: ContainerId::new(container.id.as_deref()?), addresses })
}

/// The addresses of a container's end of a network.
fn addresses(end: &NetworkEnd) -> impl Iterator<Item = IpAddr> {
    let both = [&end.ip_address, &end.global_ipv6_address];
    both.into_iter().filter_map(|text| text.as_deref()?.parse().ok())
}

/// SIGTERM, the default stop signal of a container.
const TERM: i32 = 15;

/// The result of an inspection. Only variables and labels whose names begin with one of `prefixes` are kept: the others may
/// be large, and secret.
pub(super) fn found(id: &ContainerId, answer: Inspection, prefixes: &[String]) -> InspectionResult {
    container(id, answer, prefixes)
        .map_or(InspectionResult::NotRunning, |one| InspectionResult::Running(one.into()))
}

/// The container of an inspection. `None` if it does not run.
pub(crate) fn container(
    id: &ContainerId,
    answer: Inspection,
    prefixes: &[String],
) -> Option<Container> {
    let network = network(&answer);
    let state =
        answer.state.filter(|state| state.running == Some(true) || is_being_stopped(state))?;
    let is_stopping = is_being_stopped(&state);
    let config = answer.config.unwrap_or_default();
    let ports = answer.network_settings.and_then(|settings| settings.ports).unwrap_or_default();
    let exposed = config.exposed_ports.iter().flat_map(|ports| ports.keys()).chain(ports.keys());
    let exposed = first_ports(exposed.filter_map(|port| ContainerPort::parse(port)).collect());
    let is_read = |name: &str| prefixes.iter().any(|prefix| name.starts_with(prefix));
    let declared =
        declared(config.env.into_iter().flatten(), config.labels.into_iter().flatten(), is_read);
    let published = ports.iter().filter_map(|(port, bindings)| {
        let bound = bindings.iter().flat_map(|bindings| bindings.iter());
        let bound: Vec<_> = bound.filter_map(bound_address).collect();
        Some((ContainerPort::parse(port)?, bound)).filter(|(_, bound)| !bound.is_empty())
    });
    Some(Container {
        id: id.clone(),
        name: {
            let name = answer.name.as_deref().unwrap_or_default().trim_start_matches('/');
            shortened(name, LONGEST_NAME).into()
        },
        started_at: shortened(state.started_at.as_deref().unwrap_or_default(), LONGEST_NAME).into(),
        pid: state.pid.and_then(|pid| pid.try_into().ok()).unwrap_or_default(),
        run: RunEnd::default(),
        left: RunEnd::default(),
        network,
        plugs: Vec::new(),
        exposed,
        published: published.collect(),
        variables: declared.variables,
        labels: declared.labels,
        unread: declared.unread,
        stop_signal: match config.stop_signal {
            Some(StopSignal::Number(number)) => number.try_into().ok(),
            Some(StopSignal::Text(text)) => signal(&text),
            None => None,
        }
        .unwrap_or(TERM),
        is_stopping,
        is_paused: state.paused == Some(true),
        is_restarting: state.restarting == Some(true),
        is_healthy: !matches!(
            state.health.and_then(|health| health.status).as_deref(),
            Some("starting" | "unhealthy")
        ),
    })
}

/// Whether podman has sent a container its stop signal, and the container has not ended. Podman then reports it as not
/// running.
fn is_being_stopped(state: &answers::State) -> bool {
    let is_alive = state.pid.is_some_and(|pid| pid > 0);
    let word = state.status.as_deref();
    state.running == Some(false) && is_alive && matches!(word, Some("stopping" | "running"))
}

/// Maximum length of a name, an ID or a time, in bytes. Engines use far shorter ones.
const LONGEST_NAME: usize = 300;

/// The variables and labels of a container that are kept.
#[derive(Default)]
struct EnvAndLabels {
    variables: Vec<String>,
    labels: BTreeMap<String, String>,
    unread: usize,
}

/// Limits for one container: the number of kept variables, and of kept labels, and the bytes of both together. An image may
/// have a hundred thousand, or long ones.
pub(crate) const MOST_DECLARED: usize = 1024;
pub(crate) const LARGEST_DECLARED: usize = 256 << 10;

/// The wanted variables and labels. If there are too many, the first ones by name, variables before labels.
fn declared(
    variables: impl Iterator<Item = String>,
    labels: impl Iterator<Item = (String, String)>,
    is_read: impl Fn(&str) -> bool,
) -> EnvAndLabels {
    let mut variables: Vec<_> = variables.filter(|text| is_read(text)).collect();
    let mut labels: Vec<_> = labels.filter(|(name, _)| is_read(name)).collect();
    let all = variables.len() + labels.len();
    let mut room = LARGEST_DECLARED;
    let mut fits = |bytes: usize| {
        let fits = bytes <= room;
        room -= if fits { bytes } else { 0 };
        fits
    };
    // Their order matters, unless there are too many.
    if variables.len() > MOST_DECLARED {
        variables.sort_unstable();
        variables.truncate(MOST_DECLARED);
    }
    variables.retain(|text| fits(text.len()));
    labels.sort_unstable();
    labels.truncate(MOST_DECLARED);
    labels.retain(|(name, value)| fits(name.len() + value.len()));
    let unread = all - variables.len() - labels.len();
    EnvAndLabels { variables, labels: labels.into_iter().collect(), unread }
}

/// Maximum number of a container's exposed ports that are kept, for each protocol. An image may expose all ports.
pub(crate) const MOST_EXPOSED: usize = 4096;

/// The first ports of each protocol, so that many UDP ports do not displace a TCP port.
fn first_ports(all: BTreeSet<ContainerPort>) -> BTreeSet<ContainerPort> {
    if all.len() <= MOST_EXPOSED {
        return all;
    }
    let of = |tcp| all.iter().filter(move |port| port.tcp == tcp).take(MOST_EXPOSED);
    of(true).chain(of(false)).copied().collect()
}

fn network(answer: &Inspection) -> Network {
    let mode = answer.host_config.as_ref().and_then(|config| config.network_mode.as_deref());
    match mode.unwrap_or_default() {
        "host" => Network::Host,
        mode => match mode.strip_prefix("container:") {
            Some(target) => Network::Of(target.to_owned()),
            None => Network::Own(attachments(answer)),
        },
    }
}

fn attachments(answer: &Inspection) -> BTreeMap<NetworkId, Attachment> {
    let networks = answer.network_settings.as_ref().and_then(|settings| settings.networks.as_ref());
    let attached = networks.into_iter().flat_map(|all| all.iter()).filter_map(|(name, end)| {
        let id = end.network_id.as_deref().filter(|id| !id.is_empty())?;
        Some((shortened(id, LONGEST_NAME).into(), attachment(name, end)))
    });
    attached.collect()
}

fn attachment(name: &str, end: &NetworkEnd) -> Attachment {
    let gateways = [&end.gateway, &end.ipv6_gateway];
    let gateways = gateways.into_iter().filter_map(|text| text.as_deref()?.parse().ok());
    Attachment {
        name: shortened(name, LONGEST_NAME).into(),
        addresses: addresses(end).collect(),
        gateways: gateways.collect(),
        mac: end.mac_address.as_deref().and_then(|text| text.parse().ok()),
    }
}

impl ContainerPort {
    /// `80/tcp`
    fn parse(text: &str) -> Option<Self> {
        let (number, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        Some(Self { number: number.parse().ok()?, tcp: protocol == "tcp" })
    }
}

/// The address of a published port. An engine without IPv6 leaves it empty, which means every IPv4 address.
fn bound_address(binding: &PortBinding) -> Option<SocketAddr> {
    let port = binding.host_port.as_deref()?.parse::<Port>().ok()?;
    let address = match binding.host_ip.as_deref() {
        None | Some("") => Ipv4Addr::UNSPECIFIED.into(),
        Some(address) => address.parse().ok()?,
    };
    Some(SocketAddr::new(address, port.get()))
}

/// Separates the networks whose gateways are on the engine's host from the others.
pub(super) fn networks(networks: Vec<answers::Network>) -> (Bridges, OtherNetworks) {
    let (mut bridges, mut others) = (Bridges::new(), OtherNetworks::new());
    for network in networks {
        let ranges = network.ranges();
        let Some(id) = network.id else { continue };
        let mut options = network.options.unwrap_or_default();
        let driver = network.driver.unwrap_or_default();
        if driver == "bridge" {
            let named = options.remove(answers::BRIDGE_NAME);
            // The default name that the engine's driver uses.
            let interface = named.or_else(|| Some(format!("br-{}", id.get(..12)?)));
            let interface = interface.unwrap_or_default().into();
            let is_apart = options.get(answers::TOGETHER).is_some_and(|word| word == "false");
            bridges.insert(id.into(), Bridge { ranges, interface, is_apart });
        } else {
            let parent = options.remove(answers::PARENT).unwrap_or_default().into();
            let other = OtherNetwork { driver: driver.into(), ranges, parent };
            // Podman up to 5.3 reports the name of a container's network instead of its ID.
            others.extend(network.name.map(|name| (name.into(), other.clone())));
            others.insert(id.into(), other);
        }
    }
    (bridges, others)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An engine's answer, from a file that also names its source.
    fn answer(file: &str) -> Inspection {
        let mut file: serde_json::Value = serde_json::from_str(file).unwrap();
        serde_json::from_value(file["answer"].take()).unwrap()
    }

    fn read(answer: Inspection) -> Option<Container> {
        let id = ContainerId::new(answer.id.as_deref().unwrap_or_default());
        container(&id, answer, &["BACKEND_".to_owned(), "embassy.".to_owned()])
    }

    fn running(file: &str) -> Container {
        read(answer(file)).unwrap()
    }

    #[test]
    fn of_all_ports_the_first_of_each_protocol_are_kept() {
        let mut one = answer(include_str!("fixtures/inspect-29.json"));
        let udp = (1..=u16::MAX).map(|port| (format!("{port}/udp"), serde_json::json!({})));
        let tcp = (60_000..=u16::MAX).map(|port| (format!("{port}/tcp"), serde_json::json!({})));
        let ports = serde_json::Value::Object(udp.chain(tcp).collect());
        one.config.as_mut().unwrap().exposed_ports = serde_json::from_value(ports).ok();
        let kept = read(one).unwrap().exposed;
        let of = |tcp| kept.iter().filter(move |port| port.tcp == tcp);
        assert_eq!([of(true).count(), of(false).count()], [MOST_EXPOSED; 2]);
        assert!(of(true).any(|port| port.number.get() == 60_000), "UDP does not take its place");
    }

    #[test]
    fn engines_from_20_10_to_29_say_the_same() {
        let old = running(include_str!("fixtures/inspect-20.10.json"));
        assert_eq!(old, running(include_str!("fixtures/inspect-29.json")));

        assert_eq!((&*old.name, &*old.started_at), ("app", "2026-11-22T19:03:57.425590444Z"));
        assert_eq!(old.variables, ["BACKEND_WEB=/services/web;80"]);
        assert_eq!(old.labels, [("embassy.backend.redis".into(), "redis;6379".into())].into());
        assert!(!old.is_paused && !old.is_restarting && old.is_healthy);
        assert_eq!(old.stop_signal, 15);
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
    }

    /// An image with 20,000 labels, which anybody may build.
    #[test]
    fn of_endless_labels_the_same_first_ones_are_read_and_the_rest_is_counted() {
        let with = |config: serde_json::Value| {
            let answer =
                serde_json::json!({"Id": "c1", "State": {"Running": true}, "Config": config});
            let read = serde_json::from_value::<Inspection>(answer).map(read);
            read.map(|container| container.unwrap())
        };
        let label = |n: usize| (format!("embassy.backend.{n:05}"), format!("web;{}", n + 1));
        let labels: std::collections::HashMap<_, _> = (0..20_000).map(label).collect();
        let env: Vec<_> = (0..2000).map(|n| format!("BACKEND_{n:04}=web;80")).collect();
        let container = with(serde_json::json!({"Labels": labels, "Env": env})).unwrap();
        assert_eq!((container.labels.len(), container.variables.len()), (1024, 1024));
        assert_eq!(container.labels.keys().next_back().unwrap(), "embassy.backend.01023");
        assert_eq!(container.variables.last().unwrap(), "BACKEND_1023=web;80");
        assert_eq!(container.unread, 22_000 - 2048);
        // Limited not by the number but by the size.
        let long = |n: usize| (format!("embassy.backend.{n:05}"), "x".repeat(100 << 10));
        let labels: std::collections::HashMap<_, _> = (0..10).map(long).collect();
        let container = with(serde_json::json!({"Labels": labels})).unwrap();
        assert_eq!((container.labels.len(), container.unread), (2, 8));
        // Labels that are not read do not count.
        let labels: std::collections::HashMap<_, _> =
            (0..20_000).map(|n| (format!("other.{n}"), "x")).collect();
        let container = with(serde_json::json!({"Labels": labels})).unwrap();
        assert_eq!((container.labels.len(), container.unread), (0, 0));
        let labels: std::collections::HashMap<_, _> =
            (0..200_000).map(|n| (n.to_string(), "")).collect();
        let error = with(serde_json::json!({"Labels": labels})).unwrap_err();
        assert_eq!(error.to_string(), "an object of more than 131072 fields");
    }

    #[test]
    fn a_list_is_read_without_what_is_not_needed_of_it() {
        let one = |n: usize| format!(r#"{{"Id":"c{n}","Labels":{{"a":"{}"}}}}"#, "x".repeat(1000));
        let text = format!("[{}]", (0..100).map(one).collect::<Vec<_>>().join(","));
        assert_eq!(list(text.as_bytes()).unwrap().len(), 100);
        assert_eq!(list(format!("[{}{{}}]", "{},".repeat(1_000_000)).as_bytes()).unwrap(), []);
        let text = format!("[{}]", vec![r#"{"Id":"c"}"#; 70_000].join(","));
        let error = list(text.as_bytes()).unwrap_err().to_string();
        assert!(error.starts_with("more than 65536 containers"), "{error}");
        assert!(list(b"[{\"Id\": 1}]").is_err());
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
        let state = answer.state.as_mut().unwrap();
        (state.running, state.pid) = (Some(false), Some(0));
        assert_eq!(read(answer), None);
        assert_eq!(read(Inspection::default()), None);
    }

    /// As podman 4.3, 5.4 and 5.8 answer for a container that was sent its stop signal, one that is about to start, and one
    /// that ended.
    #[test]
    fn a_container_runs_until_it_has_ended_whatever_podman_says() {
        let with = |state: serde_json::Value| {
            let answer = serde_json::json!({"Id": "c1", "State": state});
            let container = read(serde_json::from_value(answer).unwrap());
            container.map(|container| container.is_stopping)
        };
        let state = |status: &str, running: bool, pid: i64| {
            with(serde_json::json!({"Status": status, "Running": running, "Pid": pid}))
        };
        assert_eq!(state("running", true, 126), Some(false));
        assert_eq!(state("paused", true, 126), Some(false));
        for stopping in ["running", "stopping"] {
            assert_eq!(state(stopping, false, 126), Some(true));
            assert_eq!(state(stopping, false, 0), None);
        }
        assert_eq!((state("created", false, 189), state("exited", false, 0)), (None, None));

        let list = |state: &str| list(format!(r#"[{{"Id":"c1","State":"{state}"}}]"#).as_bytes());
        for (word, runs) in
            [("running", 1), ("paused", 1), ("stopping", 1), ("created", 0), ("exited", 0)]
        {
            assert_eq!(list(word).unwrap().len(), runs, "{word}");
        }
    }

    #[test]
    fn podmans_own_list_of_networks_says_what_dockers_says() {
        let listed = serde_json::json!([
            {"name": "podman", "id": "2f25", "driver": "bridge", "network_interface": "podman0",
             "subnets": [{"subnet": "10.88.0.0/16", "gateway": "10.88.0.1"}], "internal": false},
            {"name": "lan", "id": "77aa", "driver": "macvlan", "network_interface": "eth1",
             "subnets": [{"subnet": "192.168.1.0/24"}]},
            {"driver": "bridge"}
        ]);
        let listed: Vec<answers::PodmanNetwork> = serde_json::from_value(listed).unwrap();
        let listed: Vec<_> = listed.into_iter().map(answers::Network::from).collect();
        assert_eq!(listed[0].gateways(), ["10.88.0.1".parse::<IpAddr>().unwrap()]);
        let (bridges, others) = networks(listed);
        let bridge = Bridge {
            ranges: vec!["10.88.0.0/16".parse().unwrap()],
            interface: "podman0".into(),
            is_apart: false,
        };
        assert_eq!(bridges, [("2f25".into(), bridge)].into());
        assert_eq!((&*others["lan"].driver, &*others["lan"].parent), ("macvlan", "eth1"));
    }

    /// The meaning of each event, as a word.
    fn effects(file: &str) -> Vec<&'static str> {
        let mut file: serde_json::Value = serde_json::from_str(file).unwrap();
        let events: Vec<Event> = serde_json::from_value(file["events"].take()).unwrap();
        let is_it = |id: ContainerId| id.to_string() == "e3219c8d7aa9";
        let effect = |event: &Event| match notice(event) {
            Some(Notice::Changed(id)) if is_it(id.clone()) => "changed",
            Some(Notice::Ended(id)) if is_it(id.clone()) => "ended",
            Some(Notice::Left(id, _)) if is_it(id.clone()) => "left",
            Some(Notice::Destroyed(id)) if is_it(id.clone()) => "destroyed",
            Some(Notice::Signalled(id, 9)) if is_it(id.clone()) => "killed",
            Some(_) => "another",
            None => "",
        };
        events.iter().map(effect).collect()
    }

    #[test]
    fn events_of_engines_from_20_10_to_29_have_the_same_effect() {
        let old = effects(include_str!("fixtures/events-20.10.json"));
        assert_eq!(old, effects(include_str!("fixtures/events-29.json")));
        // Two networks and the start; a network left, reported twice; a kill, and the end; the last network left;
        // destroyed.
        let expected = "changed changed changed left left killed ended left destroyed";
        assert_eq!(old, expected.split(' ').collect::<Vec<_>>());
    }

    #[test]
    fn a_signal_has_a_name_or_a_number() {
        for (text, number) in [
            ("SIGTERM", Some(15)),
            ("term", Some(15)),
            ("3", Some(3)),
            ("SIGRTMIN+3", Some(37)),
            ("RTMIN", Some(34)),
            ("", None),
            ("SIGNOTHING", None),
            ("RTMIN+2147483647", None),
        ] {
            assert_eq!(signal(text), number, "{text:?}");
        }
        let with = |stop: &str| {
            let mut file: serde_json::Value =
                serde_json::from_str(include_str!("fixtures/inspect-20.10.json")).unwrap();
            file["answer"]["Config"]["StopSignal"] = serde_json::from_str(stop).unwrap();
            read(serde_json::from_value(file["answer"].take()).unwrap()).unwrap().stop_signal
        };
        let all = [r#""SIGQUIT""#, "3", r#""""#, r#""SIGNOTHING""#, "null"].map(with);
        assert_eq!(all, [3, 3, 15, 15, 15]);
    }

    /// As podman up to 5.3 answers: with a network's name instead of its ID.
    #[test]
    fn a_network_is_found_by_its_gateway_where_its_id_is_none() {
        let listed = serde_json::json!([
            {"Id": "2f25", "Name": "bridge", "Driver": "bridge", "IPAM": {"Config": [{"Subnet": "10.88.0.0/16"}]}},
            {"Id": "77aa", "Name": "lan", "Driver": "macvlan", "Options": {"parent": "eth1"},
             "IPAM": {"Config": [{"Subnet": "192.168.1.0/24"}]}},
            {"Driver": "bridge"}
        ]);
        let (bridges, others) = networks(serde_json::from_value(listed).unwrap());
        let ids = |map: &BTreeMap<NetworkId, _>| map.keys().cloned().collect::<Vec<_>>();
        assert_eq!(ids(&bridges), ["2f25".into()]);
        for name in ["77aa", "lan"] {
            assert_eq!((&*others[name].driver, &*others[name].parent), ("macvlan", "eth1"));
        }
        let end = |gateway: &str| Attachment {
            name: "podman".into(),
            addresses: vec![],
            gateways: vec![gateway.parse().unwrap()],
            mac: None,
        };
        let found = |id: &str, gateway| {
            super::super::container::bridge_of(&bridges, &id.into(), &end(gateway)).is_some()
        };
        assert!(found("podman", "10.88.0.1") && found("2f25", "192.168.1.1"));
        assert!(!found("lan", "192.168.1.1"));
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
            // podman 4 does not name the network
            (
                r#"{"Type": "network", "Action": "connect", "Actor": {"ID": "c1", "Attributes": {"name": "app"}}}"#,
                Some(Notice::Changed(ContainerId::new("c1"))),
            ),
            (
                r#"{"Type": "network", "Action": "disconnect", "Actor": {"ID": "c1", "Attributes": {"name": "app"}}}"#,
                Some(Notice::Changed(ContainerId::new("c1"))),
            ),
            (
                r#"{"Type": "network", "Action": "disconnect", "Actor": {"ID": "c1", "Attributes": {"network": "n"}}}"#,
                Some(Notice::Left(ContainerId::new("c1"), "n".into())),
            ),
            (
                r#"{"Type": "container", "Action": "died", "Actor": {"ID": "c1"}}"#,
                Some(Notice::Ended(ContainerId::new("c1"))),
            ),
            (
                r#"{"Type": "container", "Action": "remove", "Actor": {"ID": "c1"}}"#,
                Some(Notice::Destroyed(ContainerId::new("c1"))),
            ),
            (
                r#"{"Type": "network", "Action": "remove", "Actor": {"ID": "n1"}}"#,
                Some(Notice::Networks),
            ),
            (
                r#"{"Type": "container", "Action": "kill", "Actor": {"ID": "c1", "Attributes": {"signal": "15"}}}"#,
                Some(Notice::Signalled(ContainerId::new("c1"), 15)),
            ),
            (r#"{"Type": "container", "Action": "kill", "Actor": {"ID": "c1"}}"#, None),
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
