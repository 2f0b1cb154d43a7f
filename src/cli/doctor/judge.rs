//! What follows from the facts. Pure.

use std::net::IpAddr;

use super::{
    super::table::bytes,
    Finding, Level,
    collect::{HostFacts, Listener, Network},
};
use crate::{
    admin::api::{Subject, Verdict},
    capture::{input::Barrier, place::Place},
    config::CaptureMode,
    judgement::{self, CONNECTIONS_FEW},
    limits,
    memory::{NEAR, Use},
};

/// Everything that was looked at, in the order in which one depends on the other.
pub(super) fn findings(facts: &HostFacts) -> Vec<Finding> {
    let mut all = vec![embassy(facts)];
    all.extend(engine(facts));
    all.extend(discoveries(facts));
    all.push(port(facts));
    if facts.capture == CaptureMode::None {
        all.push(ok("firewall", "neither --dnat nor --redirect is given: your own rules capture"));
    } else {
        all.push(capabilities(facts));
        all.push(firewall(facts));
    }
    all.extend(rules(facts));
    all.extend(input(facts));
    all.extend(facts.networks.iter().map(|network| vip(network, facts)));
    all.extend(facts.networks.iter().filter_map(rp_filter));
    all.extend(conntrack(facts));
    all.push(descriptors(facts));
    all.extend(memory(facts));
    all.extend(told(facts));
    all
}

fn ok(check: &'static str, what: impl Into<String>) -> Finding {
    Finding { check, level: Level::Ok, what: what.into(), fix: None }
}

fn warn(check: &'static str, what: impl Into<String>, fix: impl Into<String>) -> Finding {
    Finding { check, level: Level::Warn, what: what.into(), fix: Some(fix.into()) }
}

fn fail(check: &'static str, what: impl Into<String>, fix: impl Into<String>) -> Finding {
    Finding { check, level: Level::Fail, what: what.into(), fix: Some(fix.into()) }
}

fn embassy(facts: &HostFacts) -> Finding {
    match facts.running[..] {
        [] if facts.capturing => {
            ok("embassy", "one captures here; its process cannot be seen from here")
        }
        [] => ok("embassy", "none runs here now"),
        [pid] => ok("embassy", format!("runs, process {pid}")),
        [..] => warn(
            "embassy",
            format!("{} run in one network namespace", facts.running.len()),
            "keep one, unless each has its own port and only one captures",
        ),
    }
}

fn engine(facts: &HostFacts) -> Option<Finding> {
    let check = "docker";
    Some(match facts.engine.as_ref()? {
        Ok(engine) => ok(
            check,
            format!("engine {}, API {}, at {}", engine.version, engine.api, engine.address),
        ),
        Err(error) => fail(
            check,
            error.as_str(),
            "start the engine, mount its socket into embassy's container, or name it with -docker or DOCKER_HOST",
        ),
    })
}

fn discoveries(facts: &HostFacts) -> impl Iterator<Item = Finding> {
    facts.discoveries.iter().map(|(name, answer)| match answer {
        Ok(()) => ok("discovery", format!("{name} answers")),
        Err(error) => fail(
            "discovery",
            format!("{name}: {error}"),
            "start it, or correct -discovery and what it needs (token, certificates)",
        ),
    })
}

fn port(facts: &HostFacts) -> Finding {
    let (check, port) = ("port", facts.port);
    match &facts.listener {
        Listener::Nobody => ok(check, format!("{port} is free")),
        Listener::Proxy(pid) => ok(check, format!("embassy listens on {port}, process {pid}")),
        Listener::Hidden if facts.capturing => ok(
            check,
            format!(
                "a program that cannot be seen from here listens on {port}: embassy, as it captures"
            ),
        ),
        Listener::Hidden => taken(port, "a program that cannot be seen from here"),
        Listener::Other(who) => taken(port, who),
    }
}

fn taken(port: u16, who: &str) -> Finding {
    fail(
        "port",
        format!("{who} listens on {port}: embassy cannot"),
        "end it, or give embassy another port with --port",
    )
}

/// CAP_NET_ADMIN (include/uapi/linux/capability.h).
const NET_ADMIN: u64 = 1 << 12;

fn capabilities(facts: &HostFacts) -> Finding {
    match facts.capabilities & NET_ADMIN {
        0 => fail(
            "capability",
            "without NET_ADMIN no rules can be written",
            "run as root, or with docker's --cap-add NET_ADMIN",
        ),
        _ => ok("capability", "NET_ADMIN is there"),
    }
}

fn firewall(facts: &HostFacts) -> Finding {
    match &facts.firewall {
        Ok(firewall) => ok("firewall", format!("{firewall} writes the rules")),
        Err(error) => fail(
            "firewall",
            format!("no rules can be written: {error}"),
            "install nftables or iptables where embassy runs",
        ),
    }
}

/// Our rules, and those that an embassy has left.
fn rules(facts: &HostFacts) -> Vec<Finding> {
    let check = "rules";
    let there = facts.places.iter().filter(|(_, place)| *place != Place::Absent);
    let mut all: Vec<_> = there
        .map(|(firewall, place)| match place {
            _ if facts.running.is_empty() && !facts.capturing => fail(
                check,
                format!("an embassy that was killed has left rules of {firewall}: what they capture is refused"),
                "embassy cleanup, or start embassy",
            ),
            Place::Behind(who) => warn(
                check,
                format!("before ours, of {firewall}, comes {who}: what that translates never reaches us"),
                "give that a later place, or see that it leaves the VIPs alone",
            ),
            Place::First | Place::Absent => {
                ok(check, format!("ours, of {firewall}, come before everybody's"))
            }
        })
        .collect();
    for (firewall, place) in &facts.places_of_output {
        if let Place::Behind(who) = place {
            all.push(warn(
                check,
                format!("before ours, of {firewall}, for what this host sends, comes {who}: what that translates never reaches us"),
                "give that a later place, or see that it leaves the VIPs alone",
            ));
        }
    }
    if all.is_empty() && !facts.running.is_empty() && facts.capture != CaptureMode::None {
        all.push(fail(
            check,
            "an embassy runs, and none of its rules are there",
            "see its log: it says why, or that it runs without --dnat and --redirect",
        ));
    }
    all
}

/// Whether another firewall drops what is captured, which arrives on this host.
fn input(facts: &HostFacts) -> Vec<Finding> {
    let check = "input";
    match &facts.barriers {
        Ok(barriers) if barriers.is_empty() => {
            vec![ok(check, "nothing drops what is captured")]
        }
        Ok(barriers) => {
            let stops = |barrier: &Barrier| {
                let what = format!("{}: it drops what is captured", barrier.chain);
                fail(check, what, barrier.remedy.as_str())
            };
            barriers.iter().map(stops).collect()
        }
        Err(error) => vec![warn(
            check,
            format!("whether a firewall drops what is captured cannot be seen: {error}"),
            "run doctor as root, with nft and iptables installed",
        )],
    }
}

/// Whether what the containers of a network dial can arrive.
fn vip(network: &Network, facts: &HostFacts) -> Finding {
    let Network { name, internal, ranges, own, .. } = network;
    let check = "vip";
    let is_local = |vip: &&IpAddr| facts.local.contains(*vip);
    let Some(vips) = &facts.vips else {
        return match own {
            Some((vip, _)) => ok(check, format!("network {name} dials {vip}")),
            None => fail(
                check,
                format!(
                    "this host has no address in network {name}: its containers have no VIP of their own"
                ),
                "create it anew with a gateway, or let its containers use another network as well",
            ),
        };
    };
    let own = vips.iter().find(|vip| ranges.iter().any(|range| range.contains(*vip)));
    match (own, vips.first()) {
        (Some(vip), _) if is_local(&vip) => ok(check, format!("network {name} dials {vip}")),
        (Some(vip), _) => fail(
            check,
            format!(
                "{vip} belongs to network {name} and to no interface of this host: nobody answers for it there"
            ),
            "name the network's gateway with --proxy-ip, or leave the flag out",
        ),
        (None, _) if *internal => fail(
            check,
            format!(
                "network {name} is internal, and no VIP is in it: its containers have no way to any"
            ),
            "add its gateway to --proxy-ip, or leave the flag out",
        ),
        (None, Some(vip)) => ok(check, format!("network {name} reaches {vip} by its gateway")),
        (None, None) => fail(check, "there is no VIP", "name one with --proxy-ip"),
    }
}

/// A strict filter drops what arrives where it would not be answered.
fn rp_filter(network: &Network) -> Option<Finding> {
    let check = "rp_filter";
    let (_, interface) = network.own.as_ref()?;
    let other = network.way_back.as_deref().filter(|_| network.rp_filter == 1)?;
    Some(warn(
        check,
        format!(
            "some of network {} is routed to {other}, and rp_filter of {interface} is strict: what those containers send is dropped",
            network.name
        ),
        format!(
            "remove that route, or: sysctl net.ipv4.conf.all.rp_filter=2 net.ipv4.conf.{interface}.rp_filter=2"
        ),
    ))
}

fn conntrack(facts: &HostFacts) -> Option<Finding> {
    let check = "conntrack";
    let use_of = facts.conntrack.filter(|conntrack| conntrack.limit > 0)?;
    let part = format!("{} of {} entries are in use", use_of.used, use_of.limit);
    let fix =
        "raise net.netfilter.nf_conntrack_max, or set IPTABLES_TRACK_MAX_CONNECTIONS for embassy";
    Some(match judgement::conntrack(use_of) {
        Verdict::Broken => fail(check, format!("{part}: new connections are dropped"), fix),
        Verdict::Degraded => warn(check, part, fix),
        Verdict::Ok => ok(check, part),
    })
}

fn descriptors(facts: &HostFacts) -> Finding {
    let check = "descriptors";
    let Some(limit) = facts.descriptors else {
        return ok(check, "without a limit");
    };
    let connections = limits::by_descriptors(limit);
    let what = format!("{limit} allow for {connections} connections at a time");
    match connections {
        ..CONNECTIONS_FEW => warn(
            check,
            what,
            "raise the limit: ulimit -Hn, LimitNOFILE= of systemd, --ulimit nofile= of docker",
        ),
        _ => ok(check, what),
    }
}

fn memory(facts: &HostFacts) -> Option<Finding> {
    let check = "memory";
    let Use { used, limit } = facts.memory?;
    // Where it runs, what it has is in use by its connections too.
    let connections = limits::by_memory(limit / 100 * NEAR);
    let part = format!("{} of {} are in use", bytes(used), bytes(limit));
    let fix = "raise the limit of the control group: --memory of docker, MemoryMax= of systemd";
    Some(match judgement::memory(Use { used, limit }) {
        Verdict::Broken => fail(check, format!("{part}: new connections are refused"), fix),
        _ if connections < CONNECTIONS_FEW => warn(
            check,
            format!("{part}: there is room for {connections} connections at the most"),
            fix,
        ),
        _ => ok(check, part),
    })
}

/// What a running embassy finds wrong, unless it was seen here as well.
fn told(facts: &HostFacts) -> impl Iterator<Item = Finding> {
    let others = facts.told.iter().filter(|finding| finding.about != Subject::Host);
    others.map(|finding| {
        let level = match finding.verdict {
            Verdict::Ok => Level::Ok,
            Verdict::Degraded => Level::Warn,
            Verdict::Broken => Level::Fail,
        };
        let (what, fix) = (finding.text.clone(), finding.fix.clone());
        Finding { check: finding.about.as_str(), level, what, fix }
    })
}

#[cfg(test)]
mod tests {
    use super::{super::collect::EngineFacts, *};
    use crate::capture::Firewall;

    fn network() -> Network {
        Network {
            name: "bridge".into(),
            internal: false,
            ranges: vec!["172.17.0.0/16".parse().unwrap()],
            own: Some(("172.17.0.1".parse().unwrap(), "docker0".into())),
            rp_filter: 0,
            way_back: None,
        }
    }

    /// A host on which an embassy runs, and all is well.
    fn well() -> HostFacts {
        HostFacts {
            capture: CaptureMode::Dnat,
            engine: Some(Ok(EngineFacts {
                address: "unix:///var/run/docker.sock".into(),
                version: "20.10".into(),
                api: "1.41".into(),
            })),
            discoveries: vec![("consul".into(), Ok(()))],
            firewall: Ok(Firewall::Nft),
            places: vec![(Firewall::Nft, Place::First), (Firewall::Iptables, Place::Absent)],
            barriers: Ok(Vec::new()),
            places_of_output: Vec::new(),
            running: vec![7],
            capturing: true,
            port: 9999,
            listener: Listener::Proxy(7),
            local: ["172.17.0.1".parse().unwrap()].into(),
            vips: None,
            networks: vec![network()],
            conntrack: Some(Use { used: 100, limit: 1000 }),
            descriptors: Some(20_000),
            memory: Some(Use { used: 20 << 20, limit: 512 << 20 }),
            capabilities: u64::MAX,
            told: Vec::new(),
        }
    }

    /// What is not well, when this is changed.
    fn found(change: impl FnOnce(&mut HostFacts)) -> Vec<(&'static str, Level)> {
        let mut facts = well();
        change(&mut facts);
        let findings = findings(&facts).into_iter().filter(|f| f.level != Level::Ok);
        let told = findings.inspect(|finding| {
            assert!(finding.fix.as_ref().is_some_and(|fix| !fix.is_empty()), "{finding:?}");
        });
        told.map(|finding| (finding.check, finding.level)).collect()
    }

    #[test]
    fn all_is_well_with_and_without_an_embassy() {
        assert_eq!(found(|_| {}), []);
        let none = found(|facts| {
            facts.running.clear();
            facts.capturing = false;
            facts.listener = Listener::Nobody;
            facts.places = vec![(Firewall::Nft, Place::Absent)];
        });
        assert_eq!(none, []);
        // One that runs where its process cannot be seen, as in a container of its own.
        let hidden = found(|facts| {
            facts.running.clear();
            facts.listener = Listener::Hidden;
        });
        assert_eq!(hidden, []);
        // Somebody who brings their own rules needs neither the right nor the program to write some.
        let own = found(|facts| {
            facts.capture = CaptureMode::None;
            facts.capabilities = 0;
            facts.firewall = Err("no nft".into());
            facts.places.clear();
        });
        assert_eq!(own, []);
    }

    #[test]
    fn each_thing_that_is_broken_is_found_and_nothing_else() {
        use Level::{Fail, Warn};
        let vips = |list: &[&str]| Some(list.iter().map(|vip| vip.parse().unwrap()).collect());
        type Change = Box<dyn FnOnce(&mut HostFacts)>;
        let cases: [(&str, Level, Change); 24] = [
            ("embassy", Warn, Box::new(|f| f.running.push(8))),
            ("docker", Fail, Box::new(|f| f.engine = Some(Err("no such file".into())))),
            (
                "discovery",
                Fail,
                Box::new(|f| f.discoveries.push(("etcd".into(), Err("down".into())))),
            ),
            ("port", Fail, Box::new(|f| f.listener = Listener::Other("nginx".into()))),
            ("capability", Fail, Box::new(|f| f.capabilities = !NET_ADMIN)),
            ("firewall", Fail, Box::new(|f| f.firewall = Err("cannot run nft".into()))),
            ("rules", Fail, Box::new(|f| f.places.clear())),
            (
                "rules",
                Fail,
                Box::new(|f| {
                    f.running.clear();
                    f.capturing = false;
                }),
            ),
            (
                "port",
                Fail,
                Box::new(|f| {
                    f.running.clear();
                    f.places.clear();
                    f.capturing = false;
                    f.listener = Listener::Hidden;
                }),
            ),
            (
                "rules",
                Warn,
                Box::new(|f| f.places_of_output = vec![(Firewall::Nft, Place::Behind("a".into()))]),
            ),
            ("rules", Warn, Box::new(|f| f.places[0].1 = Place::Behind("another".into()))),
            (
                "input",
                Fail,
                Box::new(|f| {
                    let chain = "chain INPUT has the policy DROP".into();
                    f.barriers = Ok(vec![Barrier { chain, remedy: "open it".into() }]);
                }),
            ),
            ("input", Warn, Box::new(|f| f.barriers = Err("no rights".into()))),
            ("vip", Fail, Box::new(|f| f.networks[0].own = None)),
            ("vip", Fail, Box::new(move |f| f.vips = vips(&["172.17.0.9"]))),
            (
                "vip",
                Fail,
                Box::new(move |f| {
                    f.vips = vips(&["10.0.0.1"]);
                    f.networks[0].internal = true;
                }),
            ),
            ("vip", Fail, Box::new(|f| f.vips = Some(Vec::new()))),
            (
                "rp_filter",
                Warn,
                Box::new(|f| {
                    f.networks[0].rp_filter = 1;
                    f.networks[0].way_back = Some("vpn0".into());
                }),
            ),
            ("conntrack", Warn, Box::new(|f| f.conntrack = Some(Use { used: 800, limit: 1000 }))),
            ("conntrack", Fail, Box::new(|f| f.conntrack = Some(Use { used: 990, limit: 1000 }))),
            ("descriptors", Warn, Box::new(|f| f.descriptors = Some(1024))),
            ("memory", Warn, Box::new(|f| f.memory = Some(Use { used: 8 << 20, limit: 16 << 20 }))),
            (
                "memory",
                Fail,
                Box::new(|f| f.memory = Some(Use { used: 500 << 20, limit: 512 << 20 })),
            ),
            ("rules", Fail, Box::new(|f| f.places[0].1 = Place::Absent)),
        ];
        for (check, level, change) in cases {
            assert_eq!(found(change), [(check, level)]);
        }
    }

    #[test]
    fn what_does_no_harm_is_no_finding() {
        // A loose filter, or none, lets a second way back be.
        for filter in [0, 2] {
            let other = found(|facts| {
                facts.networks[0].rp_filter = filter;
                facts.networks[0].way_back = Some("vpn0".into());
            });
            assert_eq!(other, []);
        }
        // A VIP elsewhere is reached by way of the gateway.
        assert_eq!(found(|f| f.vips = Some(vec!["10.0.0.1".parse().unwrap()])), []);
        assert_eq!(found(|f| f.conntrack = None), []);
        assert_eq!(found(|f| f.descriptors = None), []);
        assert_eq!(found(|f| f.memory = None), []);
    }
}
