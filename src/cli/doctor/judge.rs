//! Judges the facts. Pure.

use std::net::{IpAddr, SocketAddr};

use super::{
    super::table::bytes,
    Diagnosis, Level,
    collect::{AdminFacts, ApiAnswer, EngineFacts, HostFacts, Network, SilentDiscovery},
    dial::{Dial, Dials, Failed, NotTried},
};
use crate::{
    admin::api::{Subject, Verdict},
    capture::{
        Firewall,
        input::Barrier,
        leads::{By, Lead},
        place::RulesPlace,
        rules::RulePart,
    },
    config::CaptureMode,
    counts::numbered,
    judgement::{self, CONNECTIONS_FEW},
    limits,
    listening::PortHolder,
    memory::{NEAR, Use},
    remedy,
    report::PROVIDER,
    tls::Weakness,
};

/// The results of all checks; later checks depend on earlier ones.
pub(super) fn findings(facts: &HostFacts, dials: &Dials) -> Vec<Diagnosis> {
    let mut all = vec![embassy(facts)];
    all.extend(engine(facts));
    all.extend(discoveries(facts));
    all.extend(weaknesses(facts));
    all.push(port(facts));
    all.extend(facts.admin.as_ref().map(|admin| api(admin, facts)));
    if facts.capture == CaptureMode::None {
        all.push(own_rules(facts));
    } else {
        all.push(capabilities(facts));
        all.extend(firewall(facts));
        all.extend(kernel_path(facts));
    }
    all.extend(rules(facts));
    all.extend(leftovers(facts));
    all.extend(input(facts));
    all.extend(dials.tried.iter().map(|dial| arrival(dial, facts.port)));
    all.extend(dials.not_tried.iter().map(not_tried));
    all.extend(facts.networks.iter().map(|network| vip(network, facts)));
    all.extend(dead_vips(facts));
    all.extend(facts.networks.iter().filter_map(rp_filter));
    all.extend(conntrack(facts));
    all.push(descriptors(facts));
    all.extend(memory(facts));
    all.extend(told(facts));
    all
}

fn ok(check: &'static str, what: impl Into<String>) -> Diagnosis {
    Diagnosis { check, level: Level::Ok, what: what.into(), fix: None }
}

fn warn(check: &'static str, what: impl Into<String>, fix: impl Into<String>) -> Diagnosis {
    Diagnosis { check, level: Level::Warn, what: what.into(), fix: Some(fix.into()) }
}

fn fail(check: &'static str, what: impl Into<String>, fix: impl Into<String>) -> Diagnosis {
    Diagnosis { check, level: Level::Fail, what: what.into(), fix: Some(fix.into()) }
}

fn embassy(facts: &HostFacts) -> Diagnosis {
    if let Some(pid) = facts.stopped.first() {
        return fail(
            "embassy",
            format!("process {pid} is stopped (SIGSTOP): it serves nobody"),
            format!("continue it: kill -CONT {pid}"),
        );
    }
    match facts.running[..] {
        [] if facts.capturing => {
            ok("embassy", "an embassy captures here; its process is not visible from here")
        }
        [] => ok("embassy", "no embassy runs here"),
        [pid] => ok("embassy", format!("runs, process {pid}")),
        [..] => warn(
            "embassy",
            format!("{} embassies run in one network namespace", facts.running.len()),
            "stop all but one, unless each has its own port and only one captures",
        ),
    }
}

fn engine(facts: &HostFacts) -> Option<Diagnosis> {
    let check = "docker";
    Some(match facts.engine.as_ref()? {
        Ok(EngineFacts { address, version, api }) => ok(
            check,
            match version.is_empty() {
                false => format!("engine {version}, API {api}, at {address}"),
                true => format!("an engine answers at {address}; it does not say its version"),
            },
        ),
        Err(error) => fail(
            check,
            error.as_str(),
            facts.engine_fix.as_deref().unwrap_or_else(|| remedy::of(PROVIDER, error)),
        ),
    })
}

fn discoveries(facts: &HostFacts) -> impl Iterator<Item = Diagnosis> {
    facts.discoveries.iter().map(|(name, answer)| match answer {
        Ok(()) => ok("discovery", format!("{name} answers")),
        Err(SilentDiscovery { error, .. }) if let Some((server, rule)) = led_back(facts, name) => fail(
            "discovery",
            format!(
                "{name}: {error}. A rule leads embassy's own connections to {server} back to embassy: {rule}"
            ),
            "exclude embassy's user from this rule (iptables: -m owner ! --uid-owner <user>), or give the registry an address that it does not match",
        ),
        Err(SilentDiscovery { error, fix }) => {
            fail("discovery", format!("{name}: {error}"), fix.as_str())
        }
    })
}

fn kernel_path(facts: &HostFacts) -> Option<Diagnosis> {
    Some(match facts.kernel_path.as_ref()? {
        Ok(()) => {
            ok("kernel path", "the kernel loads its programs, and they redirect a connection")
        }
        Err(error) => warn(
            "kernel path",
            format!(
                "not available: connections go through the proxy, and bindings of UDP are not served: {error}"
            ),
            "give embassy the right or file that the error names, and start it again; or start it with --path=proxy, which does not need it",
        ),
    })
}

/// A server of a discovery to which embassy's own connections are captured, and the rule that does it.
fn led_back<'a>(facts: &'a HostFacts, name: &str) -> Option<(SocketAddr, &'a str)> {
    let servers = facts.servers.iter().filter(|(of, _)| **of == *name).map(|(_, server)| *server);
    let leads = || {
        let leads = facts.leads.iter().flatten();
        leads.filter(|lead| lead.may_lead_to(facts.port, &facts.local))
    };
    servers
        .into_iter()
        .find_map(|server| Some((server, &*leads().find(|lead| lead.takes_own(server))?.rule)))
}

fn weaknesses(facts: &HostFacts) -> impl Iterator<Item = Diagnosis> {
    facts.weaknesses.iter().map(|Weakness { what, fix }| warn("protection", what.as_str(), *fix))
}

fn port(facts: &HostFacts) -> Diagnosis {
    let (check, port) = ("port", facts.port);
    match &facts.listener {
        PortHolder::Nobody => ok(check, format!("{port} is free")),
        PortHolder::Process(holder) if facts.running.contains(&holder.pid) => {
            ok(check, format!("embassy listens on {port}, process {}", holder.pid))
        }
        PortHolder::Hidden if facts.capturing => ok(
            check,
            format!(
                "a program that is not visible from here listens on {port}: embassy, because it captures here"
            ),
        ),
        PortHolder::Hidden => taken(facts, "a program that is not visible from here"),
        PortHolder::Process(holder) => taken(facts, &holder.to_string()),
    }
}

/// Whether the admin API answers, or could be started.
fn api(admin: &AdminFacts, facts: &HostFacts) -> Diagnosis {
    let (check, AdminFacts { at, answer, listener, error }) = ("admin", admin);
    let runs = facts.capturing || !facts.running.is_empty();
    match (answer, listener) {
        (ApiAnswer::Answers, _) => ok(check, format!("embassy answers at {at}")),
        (ApiAnswer::Silent(silent), PortHolder::Process(holder))
            if !facts.running.contains(&holder.pid) =>
        {
            fail(check, format!("{}: embassy cannot use this address", silent.what), OTHER_ADDRESS)
        }
        (ApiAnswer::Silent(silent), _) => fail(check, silent.what.as_str(), silent.fix.as_str()),
        (ApiAnswer::Fails(_), _) if let Some(error) = error => fail(
            check,
            format!("embassy cannot listen at {at} (--admin): {error}"),
            "correct --admin (EMBASSY_ADMIN), or leave it out",
        ),
        (ApiAnswer::Fails(_), PortHolder::Nobody) if runs => warn(
            check,
            format!(
                "an embassy runs here, and none answers at {at}: what it has found is not known"
            ),
            "give doctor the --admin of that embassy; if that is off, start it with an address",
        ),
        (ApiAnswer::Fails(_), PortHolder::Nobody) => ok(check, format!("{at} is free")),
        (ApiAnswer::Fails(error), PortHolder::Process(holder))
            if facts.running.contains(&holder.pid) =>
        {
            fail(
                check,
                error.as_str(),
                "use the embassy command of the same version as the process",
            )
        }
        (ApiAnswer::Fails(_), PortHolder::Process(holder)) => fail(
            check,
            format!("{holder} listens at {at}, and is no embassy: embassy cannot use this address"),
            OTHER_ADDRESS,
        ),
        (ApiAnswer::Fails(error), PortHolder::Hidden) => fail(
            check,
            format!(
                "a program that is not visible from here listens at {at}, and does not answer as an embassy: {error}"
            ),
            OTHER_ADDRESS,
        ),
    }
}

const OTHER_ADDRESS: &str = "stop it, or give embassy another address with --admin";

/// Connections that were to be begun in a container's network, and were not.
fn not_tried(NotTried { why, fix }: &NotTried) -> Diagnosis {
    let what = format!("no connection from a container was tried: {why}");
    Diagnosis { check: "dial", level: Level::Skipped, what, fix: Some((*fix).to_owned()) }
}

fn taken(facts: &HostFacts, who: &str) -> Diagnosis {
    let port = facts.port;
    let mut leads = facts.leads.iter().flatten();
    let led = match leads.find(|lead| lead.may_lead_to(port, &facts.local)) {
        Some(lead) => format!(", and gets the connections that a rule leads there: {}", lead.rule),
        None => String::new(),
    };
    fail(
        "port",
        format!("{who} listens on {port}{led}: embassy cannot use this port"),
        "stop it, or give embassy another port with --port",
    )
}

/// CAP_NET_ADMIN (include/uapi/linux/capability.h).
const NET_ADMIN: u64 = 1 << 12;

fn capabilities(facts: &HostFacts) -> Diagnosis {
    match facts.capabilities & NET_ADMIN {
        0 => fail(
            "capability",
            "NET_ADMIN is missing: embassy cannot write rules",
            "run as root, or with docker's --cap-add NET_ADMIN",
        ),
        _ => ok("capability", "NET_ADMIN is available"),
    }
}

fn firewall(facts: &HostFacts) -> Vec<Diagnosis> {
    let check = "firewall";
    match &facts.firewall {
        Ok(firewall) if facts.lacks.is_empty() => {
            vec![ok(check, format!("{firewall} writes the rules"))]
        }
        Ok(firewall) => {
            let lacks = |(part, reason): &(RulePart, String)| {
                let what = format!(
                    "{firewall} writes the rules; it cannot do one part ({reason}): {}",
                    part.loss()
                );
                warn(check, what, part.fix())
            };
            facts.lacks.iter().map(lacks).collect()
        }
        Err(error) => vec![fail(
            check,
            format!("embassy cannot write rules: {error}"),
            "install nftables or iptables where embassy runs",
        )],
    }
}

/// The causes of an embassy that was started without `--dnat` and `--redirect`.
const OF_OWN_RULES: [&str; 5] =
    ["no_own_rule", "passed_by", "tproxy", "some_passed_by", "nothing_captured"];

/// Whether anything captures without `--dnat` and `--redirect`.
fn own_rules(facts: &HostFacts) -> Diagnosis {
    let (check, port) = ("firewall", facts.port);
    match &facts.leads {
        _ if facts.capturing => {
            ok(check, "the embassy that runs here captures by rules of its own")
        }
        Ok(leads) => match leads_to(leads, facts) {
            Some(lead) if lead.by == By::Tproxy => fail(
                check,
                format!(
                    "a TPROXY rule leads to port {port}; embassy does not understand TPROXY, so the kernel drops these connections: {}",
                    lead.rule
                ),
                "write it as -j REDIRECT in the table nat, or remove it and start embassy with --dnat",
            ),
            Some(lead) => ok(check, format!("your own rule leads to port {port}: {}", lead.rule)),
            None => fail(
                check,
                format!(
                    "neither --dnat nor --redirect is set, and no rule leads to port {port}: nothing is captured"
                ),
                match facts.networks.iter().find_map(|network| inside(network, facts)) {
                    Some(_) => IN_A_CONTAINER,
                    None => {
                        "start embassy with --dnat (in a container of its own: --redirect), or add a rule"
                    }
                },
            ),
        },
        Err(error) => warn(
            check,
            format!(
                "neither --dnat nor --redirect is set, and it cannot be known whether a rule leads to port {port}: {error}"
            ),
            "run doctor as root, with iptables-legacy installed if the error names it",
        ),
    }
}

/// The rule that leads to embassy's port: one of TPROXY comes before all that translate, if it has no condition that is not read.
fn leads_to<'a>(leads: &'a [Lead], facts: &HostFacts) -> Option<&'a Lead> {
    let ours = || leads.iter().filter(|lead| lead.may_lead_to(facts.port, &facts.local));
    let transparent = || ours().filter(|lead| lead.by == By::Tproxy && !lead.more);
    let first = transparent().find(|lead| lead.destination.is_none() && lead.hook.is_some());
    first.or_else(|| ours().find(|lead| lead.by != By::Tproxy)).or_else(|| transparent().next())
}

/// Whether a rule leads to this host.
fn is_here(lead: &Lead, facts: &HostFacts) -> bool {
    lead.address.is_none_or(|address| facts.local.contains(&address))
}

/// Rules of other programs, for example added by users of the original embassy, that interfere or lead to a port without a
/// program.
fn leftovers(facts: &HostFacts) -> Vec<Diagnosis> {
    let check = "leftover";
    let captures = facts.capture != CaptureMode::None;
    let leads = facts.leads.iter().flatten().filter(|lead| is_here(lead, facts));
    let finding = |lead: &Lead| {
        let Lead { rule, removal, .. } = lead;
        let port = lead.port()?;
        let what = match (port == facts.port, facts.listening.contains(&port)) {
            (true, _) if captures => {
                format!(
                    "embassy did not write this rule to its port, which captures undeclared ports too: {rule}"
                )
            }
            (false, false) => {
                format!(
                    "a rule leads to port {port}, on which no program listens: connections that it captures are refused: {rule}"
                )
            }
            _ => return None,
        };
        Some(warn(check, what, format!("if nothing else needs it: {removal}")))
    };
    leads.filter_map(finding).collect()
}

/// The rules of a killed embassy. They redirect containers' connections to its port, on which another program may listen
/// now.
fn left(firewall: Firewall, facts: &HostFacts) -> Diagnosis {
    let port = facts.port;
    let (consequence, fix) = match &facts.listener {
        PortHolder::Process(holder) if !facts.running.contains(&holder.pid) => (
            format!(
                "{holder} listens on port {port} and gets the connections that they capture, with the passwords in them"
            ),
            format!(
                "run embassy cleanup at once, and find out why this program listens on port {port}"
            ),
        ),
        PortHolder::Hidden => (
            format!(
                "a program that is not visible from here listens on port {port} and gets the connections that they capture, with the passwords in them"
            ),
            format!(
                "run embassy cleanup at once, and find the program with ss -ltnp 'sport = :{port}' on the host"
            ),
        ),
        PortHolder::Nobody | PortHolder::Process(_) => (
            "the connections that they capture are refused".to_owned(),
            "run embassy cleanup, or start embassy".to_owned(),
        ),
    };
    fail("rules", format!("rules of a killed embassy are left in {firewall}: {consequence}"), fix)
}

/// The rules of a running embassy, or those that a killed one left.
fn rules(facts: &HostFacts) -> Vec<Diagnosis> {
    let check = "rules";
    let there = facts.places.iter().filter(|(_, place)| *place != RulesPlace::Absent);
    let mut all: Vec<_> = there
        .map(|(firewall, place)| match place {
            _ if facts.running.is_empty() && !facts.capturing => left(*firewall, facts),
            RulesPlace::Behind(who) => warn(
                check,
                format!("{who} comes before our rules in {firewall}: connections that it translates do not reach embassy"),
                "move it behind our rules, or make sure that it does not match the VIPs",
            ),
            RulesPlace::First | RulesPlace::Absent => {
                ok(check, format!("our rules in {firewall} come first"))
            }
        })
        .collect();
    for (firewall, place) in &facts.places_of_output {
        if let RulesPlace::Behind(who) = place {
            all.push(warn(
                check,
                format!("{who} comes before our rules in {firewall} for the host's own connections: connections that it translates do not reach embassy"),
                "move it behind our rules, or make sure that it does not match the VIPs",
            ));
        }
    }
    // An embassy without a table reports itself what it waits for.
    let is_not_yet = facts
        .told
        .iter()
        .any(|told| told.about == Subject::Process && told.verdict == Verdict::Broken);
    // An embassy without the flag that writes rules has none.
    let writes_none = facts.told.iter().any(|told| OF_OWN_RULES.contains(&&*told.cause));
    if all.is_empty()
        && !facts.running.is_empty()
        && facts.capture != CaptureMode::None
        && !is_not_yet
        && !writes_none
    {
        all.push(fail(
            check,
            "an embassy runs, but its rules are missing",
            "run embassy status, which shows why they cannot be written; if it was started without --dnat and --redirect, add the flag",
        ));
    }
    all
}

/// The causes by which an embassy reports what it counts on this host's input.
const OF_INPUT: [&str; 3] = ["barrier", "drops_some", "drops_all"];

/// Whether another firewall drops captured connections, which arrive on this host.
fn input(facts: &HostFacts) -> Vec<Diagnosis> {
    let check = "input";
    match &facts.barriers {
        None if facts.told.iter().any(|finding| OF_INPUT.contains(&&*finding.cause)) => Vec::new(),
        None => vec![ok(check, "the running embassy saw no firewall drop captured connections")],
        Some(Ok(barriers)) if barriers.is_empty() => {
            vec![ok(check, "no firewall drops captured connections")]
        }
        Some(Ok(barriers)) => {
            let stops = |barrier: &Barrier| {
                let what = format!("{}: it drops captured connections", barrier.chain);
                fail(check, what, barrier.remedy.as_str())
            };
            barriers.iter().map(stops).collect()
        }
        Some(Err(error)) => vec![warn(
            check,
            format!("cannot check whether a firewall drops captured connections: {error}"),
            "run doctor as root, with nft and iptables installed",
        )],
    }
}

/// Whether a connection that was started in a container's network arrived.
fn arrival(dial: &Dial, port: u16) -> Diagnosis {
    let (check, Dial { consumer, to, result }) = ("dial", dial);
    match result {
        Ok(()) => ok(check, format!("a connection of {consumer} to {to} arrives")),
        Err(Failed::Refused) => fail(
            check,
            format!(
                "a connection of {consumer} to {to} is refused: no rule captures it, or a firewall rejects it"
            ),
            "run embassy explain for it; if that says that all is well, let TCP from the interface of this network pass where a firewall rejects it",
        ),
        Err(Failed::Silence) => fail(
            check,
            format!(
                "a connection of {consumer} to {to} gets no answer: a firewall drops it on the way, or drops the answers"
            ),
            format!(
                "let TCP to port {port} of this host pass from the interface of this network (its chains INPUT and PREROUTING)"
            ),
        ),
        Err(Failed::Other(error)) => fail(
            check,
            format!("{consumer} cannot connect to {to}: {error}"),
            "correct the routes inside the container (ip route): the VIP has to lead to the gateway of its network",
        ),
    }
}

/// The address by which embassy is a neighbour of a network's containers, and not their host.
fn inside(network: &Network, facts: &HostFacts) -> Option<IpAddr> {
    let is_in = |address: &&IpAddr| network.ranges.iter().any(|range| range.contains(*address));
    match &network.own {
        Some(_) => None,
        None => facts.local.iter().find(is_in).copied(),
    }
}

/// What to do where neither the host's network nor the flag for a container is given.
const IN_A_CONTAINER: &str = "start embassy with --redirect: it runs in a container of its own, and consumers then connect to its address; or start it with --net=host and --dnat";

/// Whether connections of a network's containers to the VIP can arrive.
fn vip(network: &Network, facts: &HostFacts) -> Diagnosis {
    let Network { name, internal, ranges, own, .. } = network;
    let check = "vip";
    let is_local = |vip: &&IpAddr| facts.local.contains(*vip);
    let Some(vips) = &facts.vips else {
        return match own {
            Some((vip, _)) => ok(check, format!("containers of network {name} connect to {vip}")),
            None if let Some(address) = inside(network, facts) => fail(
                check,
                format!(
                    "embassy is a container on network {name}, with the address {address}: connections to the network's gateway do not arrive here"
                ),
                IN_A_CONTAINER,
            ),
            None => fail(
                check,
                format!(
                    "this host has no address in network {name}: its containers have no VIP in it"
                ),
                "if embassy runs in a container, start it with --net=host; else create the network again with a gateway, or connect its containers to another network too",
            ),
        };
    };
    // With --redirect, embassy's own address is captured like a VIP.
    let redirects = own.as_ref().filter(|_| facts.capture == CaptureMode::Redirect);
    let own = vips.iter().find(|vip| ranges.iter().any(|range| range.contains(*vip)));
    match (own, vips.first()) {
        (Some(vip), _) if is_local(&vip) => {
            ok(check, format!("containers of network {name} connect to {vip}"))
        }
        (_, _) if let Some((own, _)) = redirects => {
            ok(check, format!("containers of network {name} connect to {own}"))
        }
        (Some(vip), _) => fail(
            check,
            format!(
                "{vip} belongs to network {name} but to no interface of this host: nothing answers for it there"
            ),
            "set --proxy-ip to the network's gateway, or leave the flag out",
        ),
        (None, _) if *internal => fail(
            check,
            format!(
                "network {name} is internal and contains no VIP: its containers cannot reach any VIP"
            ),
            "add its gateway to --proxy-ip, or leave the flag out",
        ),
        (None, Some(vip)) => ok(check, format!("network {name} reaches {vip} via its gateway")),
        (None, None) => fail(check, "there is no VIP", "set one with --proxy-ip"),
    }
}

/// VIPs of --proxy-ip that no host answers for, in networks that have another VIP.
fn dead_vips(facts: &HostFacts) -> impl Iterator<Item = Diagnosis> {
    let vips = facts.vips.iter().flatten();
    let dead = vips.filter(|vip| !facts.local.contains(*vip)).filter_map(|vip| {
        let of = facts.networks.iter().find(|network| {
            let contains = |vip: &IpAddr| network.ranges.iter().any(|range| range.contains(vip));
            let others = facts.vips.iter().flatten().filter(|other| facts.local.contains(*other));
            contains(vip) && others.clone().any(contains)
        });
        of.map(|network| (vip, &network.name))
    });
    dead.map(|(vip, network)| {
        warn(
            "vip",
            format!(
                "{vip} belongs to network {network} but to no interface of this host: connections of its containers to it do not arrive"
            ),
            "leave it out of --proxy-ip (PROXY_IP)",
        )
    })
}

/// A strict filter drops packets that arrive on another interface than the one to which answers are routed.
fn rp_filter(network: &Network) -> Option<Diagnosis> {
    let check = "rp_filter";
    let (_, interface) = network.own.as_ref()?;
    let other = network.way_back.as_deref().filter(|_| network.rp_filter == 1)?;
    Some(warn(
        check,
        format!(
            "part of network {} is routed to {other}, and rp_filter of {interface} is strict: the kernel drops packets of those containers",
            network.name
        ),
        format!(
            "remove that route, or: sysctl net.ipv4.conf.all.rp_filter=2 net.ipv4.conf.{interface}.rp_filter=2"
        ),
    ))
}

fn conntrack(facts: &HostFacts) -> Option<Diagnosis> {
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

fn descriptors(facts: &HostFacts) -> Diagnosis {
    let check = "descriptors";
    let Some(limit) = facts.descriptors else {
        return ok(check, "no limit");
    };
    let connections = limits::by_descriptors(limit);
    let allowed = numbered(connections, "connection", "connections");
    let what = format!("{limit} descriptors allow {allowed} at a time");
    match connections {
        ..CONNECTIONS_FEW => warn(
            check,
            what,
            "raise the limit: ulimit -Hn, LimitNOFILE= of systemd, --ulimit nofile= of docker",
        ),
        _ => ok(check, what),
    }
}

fn memory(facts: &HostFacts) -> Option<Diagnosis> {
    let check = "memory";
    let Use { used, limit } = facts.memory?;
    // For a running embassy, the used memory includes that of its connections.
    let connections = limits::by_memory(limit / 100 * NEAR);
    let part = format!("{} of {} are in use", bytes(used), bytes(limit));
    let fix = "raise the limit of the control group: --memory of docker, MemoryMax= of systemd";
    Some(match judgement::memory(Use { used, limit }) {
        Verdict::Broken => fail(check, format!("{part}: new connections are refused"), fix),
        _ if connections < CONNECTIONS_FEW => warn(
            check,
            format!(
                "{part}: this leaves room for at most {}",
                numbered(connections, "connection", "connections")
            ),
            fix,
        ),
        _ => ok(check, part),
    })
}

/// The findings of a running embassy, except those that were checked here: about the host, and about chains before our
/// rules.
fn told(facts: &HostFacts) -> impl Iterator<Item = Diagnosis> {
    let is_behind = |text: &str| {
        facts
            .places
            .iter()
            .chain(&facts.places_of_output)
            .any(|(_, place)| matches!(place, RulesPlace::Behind(who) if text.contains(who)))
    };
    let others = facts.told.iter().filter(move |finding| match &*finding.cause {
        "behind" => !is_behind(&finding.text),
        // The discovery was queried here too.
        "source_down" => !facts.discoveries.iter().any(|(name, answer)| {
            answer.is_err() && finding.text.split(' ').next() == Some(&**name)
        }),
        // Reported from the rules, which were read here too.
        "no_own_rule" | "tproxy" | "nothing_captured" => facts.capture != CaptureMode::None,
        _ => finding.about != Subject::Host,
    });
    others.map(|finding| {
        let level = match finding.verdict {
            Verdict::Ok if finding.fix.is_none() => Level::Ok,
            Verdict::Ok | Verdict::Degraded => Level::Warn,
            Verdict::Broken => Level::Fail,
        };
        let (what, fix) = (finding.text.clone(), finding.fix.clone());
        Diagnosis { check: finding.about.as_str(), level, what, fix }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        admin::api,
        capture::{Firewall, leads::Ports, rules::Hook},
        cli::client::Silent,
        listening::Holder,
    };

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

    /// A host with a running embassy and no problems.
    fn well() -> HostFacts {
        HostFacts {
            capture: CaptureMode::Dnat,
            engine: Some(Ok(EngineFacts {
                address: "unix:///var/run/docker.sock".into(),
                version: "20.10".into(),
                api: "1.41".into(),
            })),
            engine_fix: None,
            discoveries: vec![("consul".into(), Ok(()))],
            servers: vec![("consul".into(), "172.17.0.1:8500".parse().unwrap())],
            firewall: Ok(Firewall::Nft),
            places: vec![
                (Firewall::Nft, RulesPlace::First),
                (Firewall::Iptables, RulesPlace::Absent),
            ],
            barriers: Some(Ok(Vec::new())),
            lacks: Vec::new(),
            places_of_output: Vec::new(),
            running: vec![7],
            capturing: true,
            leads: Ok(Vec::new()),
            listening: [9999].into(),
            port: 9999,
            listener: PortHolder::Process(holder("embassy", 7)),
            stopped: Vec::new(),
            admin: Some(AdminFacts {
                at: "127.0.0.1:9990".to_owned(),
                answer: ApiAnswer::Answers,
                listener: PortHolder::Process(holder("embassy", 7)),
                error: None,
            }),
            local: ["172.17.0.1".parse().unwrap()].into(),
            vips: None,
            networks: vec![network()],
            conntrack: Some(Use { used: 100, limit: 1000 }),
            descriptors: Some(20_000),
            memory: Some(Use { used: 20 << 20, limit: 512 << 20 }),
            capabilities: u64::MAX,
            kernel_path: None,
            weaknesses: Vec::new(),
            told: Vec::new(),
        }
    }

    fn holder(name: &str, pid: u32) -> Holder {
        Holder { pid, name: name.to_owned(), is_stopped: false }
    }

    /// A rule of another program.
    fn lead(port: u16) -> Lead {
        let rule = "iptables -t nat -A PREROUTING".to_owned();
        Lead {
            rule,
            removal: "iptables -t nat -D PREROUTING".to_owned(),
            by: By::Redirect,
            address: None,
            to: Ports::one(port),
            from: Ports::all(),
            destination: None,
            hook: Some(Hook::Prerouting),
            more: false,
            spares: false,
        }
    }

    /// Neither --dnat nor --redirect, and these rules.
    fn own_rules_without(leads: Result<Vec<Lead>, String>) -> impl FnOnce(&mut HostFacts) {
        move |facts| {
            facts.capture = CaptureMode::None;
            facts.capturing = false;
            facts.places.clear();
            facts.leads = leads;
            // Another program's rule may lead to another program.
            facts.listening.insert(3233);
        }
    }

    /// The problems after this change.
    fn found(change: impl FnOnce(&mut HostFacts)) -> Vec<(&'static str, Level)> {
        let mut facts = well();
        change(&mut facts);
        let findings =
            findings(&facts, &Dials::default()).into_iter().filter(|f| f.level != Level::Ok);
        let told = findings.inspect(|finding| {
            let fix = finding.fix.as_deref().unwrap_or_default();
            let is_command = finding.check == "input" || finding.check == "capture";
            assert!(is_command || crate::text::vague(fix).is_none(), "{finding:?}");
            assert_eq!(crate::text::odd(&finding.what), None);
        });
        told.map(|finding| (finding.check, finding.level)).collect()
    }

    #[test]
    fn all_is_well_with_and_without_an_embassy() {
        assert_eq!(found(|_| {}), []);
        let none = found(|facts| {
            facts.running.clear();
            facts.capturing = false;
            facts.listener = PortHolder::Nobody;
            facts.places = vec![(Firewall::Nft, RulesPlace::Absent)];
            facts.admin = admin(ApiAnswer::Fails("refused".to_owned()), PortHolder::Nobody);
        });
        assert_eq!(none, []);
        // An embassy whose process is not visible, for example in another container.
        let hidden = found(|facts| {
            facts.running.clear();
            facts.listener = PortHolder::Hidden;
        });
        assert_eq!(hidden, []);
        // With the user's own rules, neither the capability nor the program is needed.
        let own = found(|facts| {
            facts.capture = CaptureMode::None;
            facts.capturing = false;
            facts.leads = Ok(vec![lead(9999)]);
            facts.capabilities = 0;
            facts.firewall = Err("no nft".into());
            facts.places.clear();
        });
        assert_eq!(own, []);
    }

    fn admin(answer: ApiAnswer, listener: PortHolder) -> Option<AdminFacts> {
        Some(AdminFacts { at: "127.0.0.1:9990".to_owned(), answer, listener, error: None })
    }

    #[test]
    fn an_embassy_that_gives_no_answer_is_a_failure_and_what_was_not_tried_is_said() {
        let silent = || {
            let (what, fix) =
                ("embassy gives no answer".to_owned(), "continue it: kill -CONT 7".to_owned());
            ApiAnswer::Silent(Silent { what, fix })
        };
        let fails = || ApiAnswer::Fails("connection refused".to_owned());
        let embassy = || PortHolder::Process(holder("embassy", 7));
        let nginx = || PortHolder::Process(holder("nginx", 8));
        for (answer, listener, runs, expected) in [
            (silent(), embassy(), true, Some(Level::Fail)),
            (silent(), PortHolder::Hidden, true, Some(Level::Fail)),
            (silent(), nginx(), false, Some(Level::Fail)),
            (fails(), nginx(), false, Some(Level::Fail)),
            (fails(), embassy(), true, Some(Level::Fail)),
            (fails(), PortHolder::Hidden, true, Some(Level::Fail)),
            (fails(), PortHolder::Nobody, true, Some(Level::Warn)),
            (fails(), PortHolder::Nobody, false, None),
        ] {
            let case = format!("{answer:?} {listener:?} {runs}");
            let found = found(|facts| {
                facts.admin = admin(answer, listener);
                if !runs {
                    facts.running.clear();
                    facts.capturing = false;
                    facts.listener = PortHolder::Nobody;
                    facts.places = vec![(Firewall::Nft, RulesPlace::Absent)];
                }
            });
            let expected: Vec<_> = expected.map(|level| ("admin", level)).into_iter().collect();
            assert_eq!(found, expected, "{case}");
        }
        let none = found(|facts| {
            facts.admin = admin(fails(), PortHolder::Nobody);
            facts.admin.as_mut().unwrap().error = Some("there is no folder /x".to_owned());
        });
        assert_eq!(none, [("admin", Level::Fail)]);
        assert_eq!(found(|facts| facts.stopped = vec![7]), [("embassy", Level::Fail)]);

        let not_tried =
            Some(NotTried { why: "it does not answer".to_owned(), fix: "run doctor as root" });
        let dials = Dials { tried: Vec::new(), not_tried };
        let findings = findings(&well(), &dials);
        let dial = findings.iter().find(|one| one.check == "dial").unwrap();
        assert_eq!((dial.level, dial.fix.as_deref()), (Level::Skipped, Some("run doctor as root")));
        let text = super::super::text(&findings);
        assert!(text.contains("skip  dial") && !text.contains("All is well"), "{text}");
    }

    /// The text of one check's findings.
    fn said(check: &str, change: impl FnOnce(&mut HostFacts)) -> String {
        let mut facts = well();
        change(&mut facts);
        let of_check = findings(&facts, &Dials::default())
            .into_iter()
            .filter(|finding| finding.check == check);
        of_check.map(|finding| finding.what).collect::<Vec<_>>().join("; ")
    }

    #[test]
    fn who_gets_the_connections_that_the_rules_of_a_killed_embassy_capture_is_named() {
        let killed = |listener: PortHolder| {
            move |facts: &mut HostFacts| {
                facts.running.clear();
                facts.capturing = false;
                facts.listener = listener;
            }
        };
        let (hidden, nginx) = (PortHolder::Hidden, PortHolder::Process(holder("nginx", 8)));
        for (listener, who) in [(nginx, "nginx (process 8)"), (hidden, "not visible from here")] {
            let rules = said("rules", killed(listener.clone()));
            assert!(rules.contains(who) && rules.contains("passwords"), "{rules}");
            assert!(!rules.contains("refused"), "{rules}");
            assert_eq!(
                found(killed(listener)),
                [("port", Level::Fail), ("rules", Level::Fail)],
                "both are said"
            );
        }
        let nobody = said("rules", killed(PortHolder::Nobody));
        assert!(nobody.contains("refused") && !nobody.contains("passwords"), "{nobody}");
        // A rule that embassy did not write has the same effect.
        let port = said("port", |facts| {
            facts.listener = PortHolder::Process(holder("nginx", 8));
            facts.leads = Ok(vec![lead(9999)]);
        });
        assert!(port.contains("nginx (process 8)") && port.contains(&lead(9999).rule), "{port}");
    }

    #[test]
    fn each_thing_that_is_broken_is_found_and_nothing_else() {
        use Level::{Fail, Warn};
        let vips = |list: &[&str]| Some(list.iter().map(|vip| vip.parse().unwrap()).collect());
        type Change = Box<dyn FnOnce(&mut HostFacts)>;
        let cases: [(&str, Level, Change); 36] = [
            ("leftover", Warn, Box::new(|f| f.leads = Ok(vec![lead(9999)]))),
            ("leftover", Warn, Box::new(|f| f.leads = Ok(vec![lead(3232)]))),
            (
                "leftover",
                Warn,
                Box::new(|f| {
                    f.leads = Ok(vec![Lead { address: f.local.first().copied(), ..lead(3232) }]);
                }),
            ),
            ("firewall", Fail, Box::new(own_rules_without(Ok(vec![lead(3233)])))),
            ("firewall", Fail, Box::new(own_rules_without(Ok(Vec::new())))),
            (
                "firewall",
                Fail,
                Box::new(own_rules_without(Ok(vec![
                    lead(9999),
                    Lead { by: By::Tproxy, ..lead(9999) },
                ]))),
            ),
            ("firewall", Warn, Box::new(own_rules_without(Err("no rights".to_owned())))),
            ("embassy", Warn, Box::new(|f| f.running.push(8))),
            ("docker", Fail, Box::new(|f| f.engine = Some(Err("no such file".into())))),
            (
                "discovery",
                Fail,
                Box::new(|f| {
                    f.discoveries
                        .push(("etcd".into(), Err(SilentDiscovery::of("etcd", "down", None))));
                }),
            ),
            (
                "protection",
                Warn,
                Box::new(|f| {
                    f.weaknesses = vec![Weakness { what: "a token".into(), fix: "use TLS there" }]
                }),
            ),
            (
                "kernel path",
                Warn,
                Box::new(|f| f.kernel_path = Some(Err("bpf(2) is not permitted".into()))),
            ),
            ("port", Fail, Box::new(|f| f.listener = PortHolder::Process(holder("nginx", 8)))),
            ("capability", Fail, Box::new(|f| f.capabilities = !NET_ADMIN)),
            ("firewall", Fail, Box::new(|f| f.firewall = Err("cannot run nft".into()))),
            ("rules", Fail, Box::new(|f| f.places.clear())),
            (
                "rules",
                Fail,
                Box::new(|f| {
                    f.running.clear();
                    f.capturing = false;
                    f.listener = PortHolder::Nobody;
                }),
            ),
            (
                "port",
                Fail,
                Box::new(|f| {
                    f.running.clear();
                    f.places.clear();
                    f.capturing = false;
                    f.listener = PortHolder::Hidden;
                }),
            ),
            (
                "rules",
                Warn,
                Box::new(|f| {
                    f.places_of_output = vec![(Firewall::Nft, RulesPlace::Behind("a".into()))]
                }),
            ),
            ("rules", Warn, Box::new(|f| f.places[0].1 = RulesPlace::Behind("another".into()))),
            (
                "input",
                Fail,
                Box::new(|f| {
                    let chain = "chain INPUT has the policy DROP".into();
                    f.barriers = Some(Ok(vec![Barrier { chain, remedy: "open it".into() }]));
                }),
            ),
            ("input", Warn, Box::new(|f| f.barriers = Some(Err("no rights".into())))),
            ("firewall", Warn, Box::new(|f| f.lacks = vec![(RulePart::Hold, "no module".into())])),
            // As in a container on this network, and as on another one.
            ("vip", Fail, Box::new(|f| f.networks[0].own = None)),
            (
                "vip",
                Fail,
                Box::new(|f| {
                    f.networks[0].own = None;
                    f.local.clear();
                }),
            ),
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
            ("vip", Warn, Box::new(move |f| f.vips = vips(&["172.17.0.1", "172.17.42.1"]))),
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
            ("rules", Fail, Box::new(|f| f.places[0].1 = RulesPlace::Absent)),
        ];
        for (check, level, change) in cases {
            assert_eq!(found(change), [(check, level)]);
        }
    }

    /// The registry is on a VIP, and one of the user's rules matches the host's own connections to it.
    #[test]
    fn a_registry_to_which_embassys_own_connections_are_captured_is_found_with_the_rule() {
        let output = |rule: &str| Lead {
            rule: rule.to_owned(),
            hook: Some(Hook::Output),
            destination: Some("172.17.0.1/32".parse().unwrap()),
            ..lead(9999)
        };
        let captured = |rule: &'static str| {
            move |facts: &mut HostFacts| {
                facts.capture = CaptureMode::None;
                facts.capturing = false;
                facts.places.clear();
                facts.leads = Ok(vec![output(rule)]);
                facts.discoveries[0].1 =
                    Err(SilentDiscovery::of("consul", "connection reset", None));
            }
        };
        let text = said("discovery", captured("iptables -t nat -A OUTPUT -j REDIRECT"));
        assert!(text.contains("back to embassy: iptables -t nat -A OUTPUT"), "{text}");
        assert!(text.contains("172.17.0.1:8500"), "{text}");
        let spared = said("discovery", |facts| {
            captured("-m owner ! --uid-owner 7 -j REDIRECT")(facts);
            facts.leads.iter_mut().flatten().for_each(|lead| lead.spares = true);
        });
        assert!(!spared.contains("back to embassy"), "{spared}");
        assert_eq!(found(captured("iptables -t nat -A OUTPUT")), [("discovery", Level::Fail)]);
    }

    #[test]
    fn a_running_embassy_says_itself_what_drops_its_connections() {
        assert_eq!(found(|facts| facts.barriers = None), []);
        let told = |facts: &mut HostFacts| {
            facts.barriers = None;
            facts.told = vec![api::Finding {
                about: Subject::Capture,
                verdict: Verdict::Degraded,
                cause: "barrier".into(),
                text: "A firewall may drop captured connections.".into(),
                fix: Some("open it".into()),
            }];
        };
        // Reported once, and without a contradiction.
        assert_eq!(found(told), [("capture", Level::Warn)]);
        // A chain before our rules is found here too.
        let behind = |facts: &mut HostFacts| {
            told(facts);
            let chain = "nft's chain ip a b, priority -150";
            facts.places[0].1 = RulesPlace::Behind(chain.into());
            facts.told[0].cause = "behind".into();
            facts.told[0].text = format!("{chain}, comes before our rules.");
        };
        assert_eq!(found(behind), [("rules", Level::Warn)]);
        let mut facts = well();
        told(&mut facts);
        assert!(findings(&facts, &Dials::default()).iter().all(|finding| finding.check != "input"));
    }

    #[test]
    fn rules_that_cannot_be_there_yet_are_not_missed() {
        let waits = |facts: &mut HostFacts| {
            facts.places[0].1 = RulesPlace::Absent;
            facts.told = vec![api::Finding {
                about: Subject::Process,
                verdict: Verdict::Broken,
                cause: "provider_awaited".into(),
                text: "The provider has not answered yet.".into(),
                fix: Some("run embassy doctor where embassy runs".into()),
            }];
        };
        assert_eq!(found(waits), [("process", Level::Fail)]);
    }

    #[test]
    fn what_does_no_harm_is_no_finding() {
        // With a loose filter, or none, answers may use another interface.
        for filter in [0, 2] {
            let other = found(|facts| {
                facts.networks[0].rp_filter = filter;
                facts.networks[0].way_back = Some("vpn0".into());
            });
            assert_eq!(other, []);
        }
        // A rule that leads to another host, or to a port on which a program listens.
        let away = Lead { address: Some("10.0.0.5".parse().unwrap()), ..lead(3232) };
        assert_eq!(found(|f| f.leads = Ok(vec![away])), []);
        let served = found(|f| {
            f.listening.insert(3232);
            f.leads = Ok(vec![lead(3232)]);
        });
        assert_eq!(served, []);
        // With --redirect, containers connect to embassy's own address.
        let linked = found(|f| {
            f.capture = CaptureMode::Redirect;
            f.networks[0].own = Some(("172.17.0.5".parse().unwrap(), "eth0".into()));
            f.vips = Some(vec!["172.17.42.1".parse().unwrap()]);
        });
        assert_eq!(linked, []);
        // A VIP outside the network is reached via the gateway.
        assert_eq!(found(|f| f.vips = Some(vec!["10.0.0.1".parse().unwrap()])), []);
        assert_eq!(found(|f| f.conntrack = None), []);
        assert_eq!(found(|f| f.descriptors = None), []);
        assert_eq!(found(|f| f.memory = None), []);
    }
}
