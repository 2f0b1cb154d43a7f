//! The services that containers offer, from inspections as engines answer them.

use std::{net::IpAddr, sync::Arc};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{offers::Made, *};
use crate::{
    docker::{
        container::{Bridge, Container, OtherNetwork, samples},
        read,
    },
    model::ContainerId,
};

/// An engine on this host.
const HERE: Option<IpAddr> = None;

/// An engine on another host.
fn there() -> Option<IpAddr> {
    Some("192.168.13.90".parse().unwrap())
}

/// The relevant parts of an inspection, as engine 20.10 answers.
fn inspection(name: &str) -> Value {
    json!({
        "Id": name,
        "Name": format!("/{name}"),
        "State": {"Status": "running", "Running": true, "Paused": false, "Restarting": false},
        "HostConfig": {"NetworkMode": "default"},
        "Config": {"ExposedPorts": {"80/tcp": {}}, "Env": ["SERVICE_NAME=web"], "Labels": {}},
        "NetworkSettings": {
            "IPAddress": "172.17.0.2",
            "Ports": {"80/tcp": null},
            "Networks": {"bridge": {"IPAddress": "172.17.0.2", "GlobalIPv6Address": ""}}
        }
    })
}

/// An inspection with some parts replaced.
fn changed<const N: usize>(name: &str, changes: [(&str, Value); N]) -> Value {
    let mut value = inspection(name);
    for (pointer, change) in changes {
        *value.pointer_mut(pointer).unwrap() = change;
    }
    value
}

/// A container from an inspection. The IDs of its networks are their names.
fn container(mut inspection: Value) -> Option<Container> {
    let networks = inspection.pointer_mut("/NetworkSettings/Networks");
    for (name, end) in networks.and_then(Value::as_object_mut).into_iter().flatten() {
        end["NetworkID"] = json!(name);
    }
    let id = ContainerId::new(inspection["Id"].as_str().unwrap());
    read::container(&id, serde_json::from_value(inspection).unwrap(), &[PREFIX.to_owned()])
}

fn all(inspections: impl IntoIterator<Item = Value>) -> Inventory {
    samples::inventory(inspections.into_iter().filter_map(container))
}

fn offers(containers: &Inventory, host: Option<IpAddr>) -> Offers {
    let containers = Inventory { host, ..containers.clone() };
    Offers::of(&containers, host.is_none(), &mut Made::default())
}

fn query(text: &str) -> Query {
    let descriptor: crate::descriptor::Descriptor = format!("{text};1").parse().unwrap();
    let (service, tags) = (descriptor.service, descriptor.tags);
    Query { via: "docker".into(), service, tags, dc: None, port: None }
}

fn texts(answer: &Endpoints) -> Vec<String> {
    let rejected = answer.rejected.iter().map(|entry| format!("{}: {}", entry.what, entry.reason));
    answer.list.iter().map(ToString::to_string).chain(rejected).collect()
}

/// The answer to a query such as `web[prod]`: the endpoints, followed by the rejected entries.
fn answer(
    containers: &Inventory,
    host: Option<IpAddr>,
    asked: &str,
    healthy_only: bool,
) -> Vec<String> {
    texts(&offers(containers, host).select(&query(asked), healthy_only))
}

fn here(inspection: Value, query: &str) -> Vec<String> {
    answer(&all([inspection]), HERE, query, true)
}

#[test]
fn names() {
    let one = json!({"80/tcp": {}});
    let two = json!({"80/tcp": {}, "443/tcp": {}});
    let with_udp = json!({"80/tcp": {}, "53/udp": {}});
    let none = json!({});
    let at = |port| vec![format!("172.17.0.2:{port}")];
    for (ports, env, query, expected) in [
        (&one, vec!["SERVICE_NAME=web"], "web", at(80)),
        (&one, vec!["SERVICE_80_NAME=web"], "web", at(80)),
        (&one, vec!["SERVICE_NAME=a", "SERVICE_80_NAME=web"], "web", at(80)),
        (&one, vec!["SERVICE_80_NAME=web", "SERVICE_NAME=a"], "a", vec![]),
        (&one, vec!["SERVICE_name=web"], "web", at(80)),
        (&one, vec!["SERVICE_NAME="], "web", vec![]),
        (&one, vec![], "image", vec![]),
        (&one, vec!["SERVICE_NAME=web", "SERVICE_80_NAME="], "web", vec![]),
        (&two, vec!["SERVICE_NAME=web"], "web", vec![]),
        (&two, vec!["SERVICE_NAME=web"], "web-80", at(80)),
        (&two, vec!["SERVICE_NAME=web"], "web-443", at(443)),
        (&two, vec!["SERVICE_NAME=web", "SERVICE_443_NAME=tls"], "web-80", at(80)),
        (&two, vec!["SERVICE_NAME=web", "SERVICE_443_NAME=tls"], "tls", at(443)),
        (&two, vec!["SERVICE_80_NAME=web", "SERVICE_443_NAME=web"], "web", {
            vec!["172.17.0.2:80".to_owned(), "172.17.0.2:443".to_owned()]
        }),
        (&with_udp, vec!["SERVICE_NAME=web"], "web-80", at(80)),
        (&with_udp, vec!["SERVICE_NAME=web"], "web-53", vec![]),
        (&one, vec!["SERVICE_8080_NAME=admin", "SERVICE_NAME=web"], "admin", at(8080)),
        (&one, vec!["SERVICE_8080_NAME=admin", "SERVICE_NAME=web"], "web", at(80)),
        (&none, vec!["SERVICE_8080_NAME=admin"], "admin", at(8080)),
        (&none, vec!["SERVICE_0_NAME=a", "SERVICE_99999_NAME=a"], "a", vec![]),
        (&none, vec!["SERVICE_NAME=web"], "web", {
            let reason =
                "SERVICE_NAME, but no TCP port: expected an exposed one, or SERVICE_<port>_NAME";
            vec![format!("container c1: {reason}")]
        }),
        (&one, vec!["SERVICE_NAME=web", "SERVICE_IGNORE=1"], "web", vec![]),
        (&none, vec!["SERVICE_NAME=web", "SERVICE_IGNORE=1"], "web", vec![]),
        (&one, vec!["SERVICE_NAME=web", "SERVICE_IGNORE="], "web", at(80)),
        (&two, vec!["SERVICE_NAME=web", "SERVICE_80_IGNORE=true"], "web-80", vec![]),
        (&two, vec!["SERVICE_NAME=web", "SERVICE_80_IGNORE=true"], "web-443", at(443)),
        (&one, vec!["XSERVICE_NAME=web", "SERVICE_NAME"], "web", vec![]),
        (&one, vec!["SERVICE_80_NAME=alpha,beta"], "alpha", at(80)),
        (&one, vec!["SERVICE_80_NAME=alpha, beta,"], "beta", at(80)),
        (&two, vec!["SERVICE_NAME=alpha,beta"], "beta-443", at(443)),
        (&one, vec!["SERVICE_NAME='web'\r"], "web", at(80)),
        (&one, vec!["SERVICE_NAME=web", "SERVICE_80_NAME=''"], "web", vec![]),
    ] {
        let inspection = changed(
            "c1",
            [
                ("/Config/ExposedPorts", ports.clone()),
                ("/Config/Env", json!(env)),
                ("/NetworkSettings/Ports", json!({})),
            ],
        );
        assert_eq!(here(inspection, query), expected, "{ports} {env:?} {query}");
    }
}

#[test]
fn labels_win_over_variables_and_a_ports_own_over_both() {
    for (env, labels, name) in [
        (vec!["SERVICE_NAME=variable"], json!({"SERVICE_NAME": "label"}), "label"),
        (vec!["SERVICE_80_NAME=variable"], json!({"SERVICE_NAME": "label"}), "variable"),
        (vec!["SERVICE_80_NAME=variable"], json!({"SERVICE_80_NAME": "label"}), "label"),
    ] {
        let inspection =
            changed("c1", [("/Config/Env", json!(env)), ("/Config/Labels", labels.clone())]);
        assert_eq!(here(inspection, name), ["172.17.0.2:80"], "{env:?} {labels}");
    }
}

#[test]
fn all_tags_must_be_carried() {
    for (env, query, found) in [
        (vec!["SERVICE_TAGS=prod,v1"], "web", true),
        (vec!["SERVICE_TAGS=prod,v1"], "web[prod]", true),
        (vec!["SERVICE_TAGS=prod,v1"], "web[v1,prod]", true),
        (vec!["SERVICE_TAGS=prod,v1"], "web[v1,x]", false),
        (vec!["SERVICE_TAGS=,prod,,"], "web[prod]", true),
        (vec![r"SERVICE_TAGS=a\b"], r"web[a\b]", true),
        (vec!["SERVICE_TAGS=prod", "SERVICE_80_TAGS=v1"], "web[v1]", true),
        (vec!["SERVICE_TAGS=prod", "SERVICE_80_TAGS=v1"], "web[prod]", false),
        (vec![], "web[prod]", false),
    ] {
        let env = [env, vec!["SERVICE_NAME=web"]].concat();
        let inspection = changed("c1", [("/Config/Env", json!(env))]);
        assert_eq!(!here(inspection, query).is_empty(), found, "{env:?} {query}");
    }
}

#[test]
fn only_what_runs_and_is_healthy() {
    let state = |running, paused, restarting| json!({"Running": running, "Paused": paused, "Restarting": restarting});
    let found = |state: Value, healthy_only| {
        let containers = all([changed("c1", [("/State", state)])]);
        !answer(&containers, HERE, "web", healthy_only).is_empty()
    };
    assert!(found(state(true, false, false), true));
    assert!(!found(state(false, false, false), false));
    assert!(found(state(true, true, false), true), "there is no other");
    assert!(!found(state(true, false, true), false));
    for (health, healthy) in
        [("healthy", true), ("none", true), ("", true), ("starting", false), ("unhealthy", false)]
    {
        let state = json!({"Running": true, "Health": {"Status": health}});
        assert_eq!(found(state.clone(), true), healthy, "{health}");
        assert!(found(state, false), "{health}");
    }
}

#[test]
fn on_this_host_the_first_network_by_name_counts() {
    let networks = |networks| changed("c1", [("/NetworkSettings/Networks", networks)]);
    for (given, expected) in [
        (json!({"b": {"IPAddress": "10.0.0.1"}, "a": {"IPAddress": "10.0.0.2"}}), "10.0.0.2:80"),
        (json!({"b": {"IPAddress": "10.0.0.1"}, "a": {"IPAddress": ""}}), "10.0.0.1:80"),
        (json!({"a": {"IPAddress": "10.0.0.1", "GlobalIPv6Address": "fd00::1"}}), "10.0.0.1:80"),
        (json!({"a": {"IPAddress": "", "GlobalIPv6Address": "fd00::1"}}), "[fd00::1]:80"),
        (json!({}), "container c1:80: no address: it is on no network"),
        (json!({"a": {"IPAddress": "x"}}), "container c1:80: no address: it is on no network"),
    ] {
        assert_eq!(here(networks(given.clone()), "web"), [expected], "{given}");
    }
    let on_host = changed(
        "c1",
        [
            ("/HostConfig/NetworkMode", json!("host")),
            ("/NetworkSettings/Networks", json!({"host": {"IPAddress": ""}})),
        ],
    );
    assert_eq!(here(on_host, "web"), ["127.0.0.1:80"]);
}

#[test]
fn elsewhere_the_published_ports_count() {
    for (ports, expected) in [
        (json!({"80/tcp": [{"HostIp": "0.0.0.0", "HostPort": "49153"}]}), "192.168.13.90:49153"),
        (json!({"80/tcp": [{"HostIp": "", "HostPort": "49153"}]}), "192.168.13.90:49153"),
        (
            json!({"80/tcp": [{"HostIp": "::", "HostPort": "1"}, {"HostIp": "0.0.0.0", "HostPort": "2"}]}),
            "192.168.13.90:2",
        ),
        (json!({"80/tcp": [{"HostIp": "10.9.0.1", "HostPort": "80"}]}), "10.9.0.1:80"),
        (
            json!({"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": "80"}]}),
            "container c1:80: the port is published only at an address that is not reachable from here",
        ),
        (json!({"80/tcp": null}), "container c1: SERVICE_NAME, but no published TCP port"),
        // A port that is not published does not count: the name stays without a port.
        (
            json!({"80/tcp": [{"HostIp": "0.0.0.0", "HostPort": "49153"}], "443/tcp": null}),
            "192.168.13.90:49153",
        ),
    ] {
        let containers = all([changed("c1", [("/NetworkSettings/Ports", ports.clone())])]);
        assert_eq!(answer(&containers, there(), "web", true), [expected], "{ports}");
    }
    let named = changed("c1", [("/Config/Env", json!(["SERVICE_80_NAME=web"]))]);
    assert_eq!(
        answer(&all([named]), there(), "web", true),
        ["container c1:80: the port is not published"]
    );
    let on_host = changed("c1", [("/HostConfig/NetworkMode", json!("host"))]);
    assert_eq!(answer(&all([on_host]), there(), "web", true), ["192.168.13.90:80"]);
}

#[test]
fn the_network_of_another_container_is_followed() {
    let uses = |name, other: &str| {
        changed(
            name,
            [
                ("/HostConfig/NetworkMode", json!(format!("container:{other}"))),
                ("/NetworkSettings", json!({"Ports": {}, "Networks": {}})),
                ("/Config/Env", json!([format!("SERVICE_NAME={name}")])),
            ],
        )
    };
    let pod = changed(
        "pod",
        [(
            "/NetworkSettings/Ports",
            json!({"80/tcp": [{"HostIp": "0.0.0.0", "HostPort": "8080"}]}),
        )],
    );
    let containers = all([pod, uses("one", "pod"), uses("two", "one"), uses("lost", "gone")]);
    let reason = "net=container:gone: that container does not run";
    for (service, near, far) in [
        ("one", "172.17.0.2:80", "192.168.13.90:8080"),
        ("two", "172.17.0.2:80", "192.168.13.90:8080"),
        ("lost", &format!("container lost:80: {reason}"), &format!("container lost:80: {reason}")),
    ] {
        assert_eq!(answer(&containers, HERE, service, true), [near]);
        assert_eq!(answer(&containers, there(), service, true), [far]);
    }
    let circle = all([uses("one", "two"), uses("two", "one")]);
    assert_eq!(
        answer(&circle, HERE, "one", true),
        ["container one:80: net=container: circular reference"]
    );
}

/// The relevant parts of an answer of API 1.52, written from its published description: no `IPAddress` beside `Networks`,
/// and the network mode is `bridge`.
#[test]
fn an_engine_of_version_29() {
    let inspection = json!({
        "Id": "c1",
        "Name": "/c1",
        "State": {"Status": "running", "Running": true, "Health": {"Status": "healthy"}},
        "HostConfig": {"NetworkMode": "bridge"},
        "Config": {
            "ExposedPorts": {"80/tcp": {}},
            "Env": ["PATH=/bin"],
            "Labels": {"SERVICE_NAME": "web", "SERVICE_TAGS": "a\\,b,c"}
        },
        "NetworkSettings": {
            "SandboxID": "5b",
            "SandboxKey": "/var/run/docker/netns/5b",
            "Ports": {"80/tcp": [{"HostIp": "0.0.0.0", "HostPort": "8080"}]},
            "Networks": {"bridge": {
                "MacAddress": "02:42:ac:11:00:02", "IPAddress": "172.17.0.2", "IPPrefixLen": 16,
                "GlobalIPv6Address": "", "GwPriority": 0, "DNSNames": null
            }}
        }
    });
    let containers = all([inspection]);
    assert_eq!(answer(&containers, HERE, "web[c]", true), ["172.17.0.2:80"]);
    assert_eq!(answer(&containers, there(), "web", true), ["192.168.13.90:8080"]);
}

#[test]
fn one_who_has_gone_is_no_endpoint_whatever_answer_it_stands_in() {
    for gone in
        [(|container: &Container| container.run.mark_ended()) as fn(&Container), |container| {
            container.left.mark_ended()
        }]
    {
        let sharer = changed("two", [("/HostConfig/NetworkMode", json!("container:one"))]);
        let containers = all([inspection("one"), sharer]);
        let mut made = Made::default();
        let before = Offers::of(&containers, true, &mut made);
        let answer = Arc::new(before.select(&query("web"), true));
        assert_eq!(texts(&answer), ["172.17.0.2:80"]);
        gone(&containers.containers[0]);
        assert_eq!(texts(&answer.living()), [""; 0]);
        assert_eq!(texts(&before.select(&query("web"), true)), [""; 0]);
        assert_ne!(Offers::of(&containers, true, &mut made), before);
    }
}

#[test]
fn a_container_that_changes_leaves_the_offers_of_others_as_they_are() {
    let named =
        |name: &str| changed(name, [("/Config/Env", json!([format!("SERVICE_NAME={name}")]))]);
    let mut containers = all([named("one"), named("two")]);
    let mut made = Made::default();
    let answer = |containers: &Inventory, made: &mut Made| {
        let offers = Offers::of(containers, true, made);
        ["one", "two"].map(|name| offers.select(&query(name), true))
    };
    let before = answer(&containers, &mut made);
    let halted = Container { is_restarting: true, ..containers.containers[1].as_ref().clone() };
    containers.containers[1] = halted.into();
    let now = answer(&containers, &mut made);
    assert_eq!(now[0], before[0], "it hangs on the same");
    assert_eq!((before[1].list.len(), now[1].list.len()), (1, 0));
}

/// A container on these networks. Each is given by its ID, which is its name, and the container's address.
fn on(networks: &[(&str, &str)]) -> Value {
    let ends = networks.iter().map(|(name, address)| {
        let gateway = format!("{}.1", address.rsplit_once('.').unwrap().0);
        ((*name).to_owned(), json!({"IPAddress": address, "Gateway": gateway}))
    });
    changed("c1", [("/NetworkSettings/Networks", Value::Object(ends.collect()))])
}

/// The answer if embassy has these interfaces, and the engine has a bridge `br`, a macvlan on eth0 and an overlay.
fn from(interfaces: &[(&str, &str)], inspections: Vec<Value>) -> Vec<String> {
    let bridge = |interface: &str, range: &str| Bridge {
        ranges: vec![range.parse().unwrap()],
        interface: interface.into(),
        is_apart: false,
    };
    let other = |driver: &str, range: &str| OtherNetwork {
        driver: driver.into(),
        ranges: vec![range.parse().unwrap()],
        parent: "eth0".into(),
    };
    let here = interfaces
        .iter()
        .map(|(name, address)| ((*name).into(), vec![address.parse::<IpAddr>().unwrap()]));
    let inventory = Inventory {
        bridges: Arc::new(
            [
                ("br".into(), bridge("br0", "10.1.0.0/24")),
                ("br2".into(), bridge("br02", "10.4.0.0/24")),
            ]
            .into(),
        ),
        others: Arc::new(
            [
                ("a-lan".into(), other("macvlan", "10.2.0.0/24")),
                ("a-swarm".into(), other("overlay", "10.3.0.0/24")),
                ("a-plugin".into(), other("weave", "10.5.0.0/24")),
            ]
            .into(),
        ),
        here: Arc::new(here.collect()),
        ..all(inspections)
    };
    answer(&inventory, HERE, "web", true)
}

#[test]
fn a_network_that_leads_there_is_chosen() {
    let host = [("eth0", "10.2.0.9"), ("br0", "10.1.0.1")];
    let everywhere = [
        ("a-lan", "10.2.0.2"),
        ("a-swarm", "10.3.0.2"),
        ("a-plugin", "10.5.0.2"),
        ("br", "10.1.0.2"),
    ];
    assert_eq!(from(&host, vec![on(&everywhere)]), ["10.1.0.2:80"]);
    assert_eq!(from(&host, vec![on(&everywhere[..3])]), ["10.5.0.2:80"], "it may lead there");
    let [lan] = &from(&host, vec![on(&everywhere[..2])])[..] else { panic!("one reason") };
    assert!(lan.contains("not reachable from this host on its networks (a-lan, a-swarm)"), "{lan}");
    // If the host has an interface of its own in the same network, it reaches a macvlan.
    let with_shim = [host[0], host[1], ("shim", "10.2.0.200")];
    assert_eq!(from(&with_shim, vec![on(&everywhere[..1])]), ["10.2.0.2:80"]);
}

#[test]
fn from_inside_a_container_its_own_networks_lead_on() {
    let own = |mut inspection: Value| {
        inspection["Id"] = json!("embassy");
        inspection["Config"]["Env"] = json!([]);
        inspection
    };
    let inside = [("eth0", "10.1.0.7")];
    let ours = || own(on(&[("br", "10.1.0.7")]));
    assert_eq!(
        from(&inside, vec![ours(), on(&[("br", "10.1.0.2"), ("br2", "10.4.0.2")])]),
        ["10.1.0.2:80"]
    );
    let [other] = &from(&inside, vec![ours(), on(&[("br2", "10.4.0.2")])])[..] else {
        panic!("one reason")
    };
    assert!(other.contains("embassy's own container") && other.contains("(br2)"), "{other}");
    // Services on the host are not at embassy's own loopback address.
    let on_host = || changed("c1", [("/HostConfig/NetworkMode", json!("host"))]);
    assert_eq!(from(&inside, vec![ours(), on_host()]), ["10.1.0.1:80"]);
    let lan = own(on(&[("a-lan", "10.2.0.7")]));
    let [no_way] = &from(&[("eth0", "10.2.0.7")], vec![lan, on_host()])[..] else {
        panic!("one reason")
    };
    assert!(no_way.contains("on no bridge network"), "{no_way}");
    assert_eq!(from(&[("br0", "10.1.0.1")], vec![on_host()]), ["127.0.0.1:80"]);
}

#[test]
fn who_is_paused_or_stopping_is_used_only_if_there_is_no_other() {
    let named = |name: &str, address: &str| {
        changed(name, [("/NetworkSettings/Networks", json!({"bridge": {"IPAddress": address}}))])
    };
    let mut containers = all([named("one", "172.17.0.2"), named("two", "172.17.0.3")]);
    let both = ["172.17.0.2:80", "172.17.0.3:80"];
    assert_eq!(answer(&containers, HERE, "web", true), both);
    for change in
        [|one: &mut Container| one.is_paused = true, |one: &mut Container| one.is_stopping = true]
    {
        let well = containers.containers.clone();
        change(Arc::make_mut(&mut containers.containers[0]));
        assert_eq!(answer(&containers, HERE, "web", true), both[1..]);
        change(Arc::make_mut(&mut containers.containers[1]));
        assert_eq!(answer(&containers, HERE, "web", true), both, "there is no better one");
        containers.containers = well;
    }
}

#[test]
fn a_query_without_endpoints_says_why() {
    let with = |name: &str, variables: Value, port: &str| {
        changed(name, [("/Config/Env", variables), ("/Config/ExposedPorts", json!({port: {}}))])
    };
    let mut ill = with("c4", json!(["SERVICE_NAME=ill"]), "80/tcp");
    ill["State"]["Health"] = json!({"Status": "unhealthy"});
    let containers = all([
        with("c1", json!(["SERVICE_NAME=frontend_http", "SERVICE_TAGS=prod"]), "80/tcp"),
        with("c2", json!(["SERVICE_NAME=frontend_http", "SERVICE_TAGS=prod"]), "80/tcp"),
        changed(
            "c3",
            [
                ("/Config/Env", json!(["SERVICE_NAME=udp"])),
                ("/Config/ExposedPorts", json!({"80/udp": {}})),
                ("/NetworkSettings/Ports", json!({"80/udp": null})),
            ],
        ),
        ill,
    ]);
    let problem = |text: &str| {
        let found = offers(&containers, HERE).select(&query(text), true);
        assert_eq!(found.list.is_empty(), found.problem.is_some(), "{text}");
        found.problem.as_deref().unwrap_or_default().to_owned()
    };
    for (text, expected) in [
        ("frontend_http", ""),
        ("frontend_http[prod]", ""),
        ("frontend_http[canary]", "0 of 2 containers carry [canary]; they carry [prod]"),
        ("frontend-http", "no running container offers this service; near: frontend_http"),
        ("redis", "no running container offers this service"),
        ("ill", "its one container does not pass its HEALTHCHECK"),
        (
            "udp",
            "its one container was skipped (container c3: SERVICE_NAME, but no TCP port: expected an exposed one, or SERVICE_<port>_NAME)",
        ),
    ] {
        assert_eq!(problem(text), expected, "{text}");
    }
}

#[test]
fn a_container_offers_so_many_services_and_says_that_there_are_more() {
    let ports: serde_json::Map<_, _> =
        (1..=u16::MAX).map(|port| (format!("{port}/tcp"), json!({}))).collect();
    let tag = "x".repeat(50_000);
    let names: Vec<_> = (0..20_000).map(|i| format!("n{i}")).collect();
    let long = "l".repeat(50_000);
    let of = |id, name: &str, ports: &Value| {
        let env = [format!("SERVICE_NAME={name}"), format!("SERVICE_TAGS={tag},prod")];
        changed(id, [("/Config/Env", json!(env)), ("/Config/ExposedPorts", ports.clone())])
    };
    let (one, all_ports) = (json!({"80/tcp": {}}), Value::Object(ports));
    let few: Vec<_> = (0..offers::MOST).map(|i| format!("m{i}")).collect();
    let containers = all([
        of("c1", &format!("{long},{}", names.join(",")), &all_ports),
        of("c2", &names.join(","), &one),
        of("c3", "web", &all_ports),
        of("c4", &few.join(","), &one),
    ]);
    let found = offers(&containers, HERE);
    let counts = found.counts();
    assert_eq!(counts, (4 * offers::MOST, 3, 4), "offers, containers with more, lists of tags");
    let beyond = |name: &str| {
        let reason = "it declares more than 1000 services, each on one port: the rest are not read";
        format!("container {name}: {reason}")
    };
    let texts = |query: &str| texts(&found.select(&self::query(query), true));
    let at = |port| format!("172.17.0.2:{port}");
    assert_eq!(texts("web-1000[prod]"), [at(1000), beyond("c3")]);
    assert_eq!(texts("n999[prod]"), [at(80), beyond("c2")]);
    assert_eq!(texts("m999"), [at(80)], "nothing is missing");
    assert_eq!(texts("web-1001"), ["c1", "c2", "c3"].map(beyond), "perhaps one of these");
}

proptest! {
    #[test]
    fn no_container_panics(
        env: Vec<String>,
        key in "SERVICE_([0-9]{0,6}_)?(NAME|TAGS|IGNORE)",
        value: String,
        ports in proptest::collection::hash_map("[0-9]{0,6}(/(tcp|udp|.*))?", "[0-9]{0,6}", 0..4),
        address: String,
        mode in "(host|none|container:c1|container:.*|.*)",
    ) {
        let env = [env, vec![format!("{key}={value}")]].concat();
        let bindings: serde_json::Map<_, _> = ports
            .into_iter()
            .map(|(port, bound)| (port, json!([{"HostIp": address, "HostPort": bound}])))
            .collect();
        let containers = all([changed("c1", [
            ("/Config/Env", json!(env)),
            ("/HostConfig/NetworkMode", json!(mode)),
            ("/NetworkSettings/Ports", Value::Object(bindings)),
            ("/NetworkSettings/Networks", json!({"n": {"IPAddress": address}})),
        ])]);
        offers(&containers, HERE);
        offers(&containers, there());
    }
}
