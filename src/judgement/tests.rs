use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use proptest::prelude::*;

use super::*;
use crate::{
    capture::{Drops, OwnRules, Standing, input::Barrier, rules},
    config::{CaptureMode, CaptureScope},
    consumer::{Binding, Consumer},
    control::InUse,
    descriptor::{Balance, PathChoice},
    discovery::{Endpoints, Query},
    memory::Use,
    model::{ConsumerId, ContainerId, Endpoint, Millis, ServiceName, Vip},
    path::{PathReason, Paths},
    provider::{Listing, Problem},
    readiness::Part,
    source::Known,
    table::{Inputs, Route, Table},
};

const NOW: Millis = Millis(100_000);

fn query() -> Query {
    Query {
        via: "consul".into(),
        service: ServiceName::new("web").unwrap(),
        tags: Default::default(),
        dc: None,
        port: None,
    }
}

fn app() -> Consumer {
    let binding = |text: &str| Binding {
        origin: format!("BACKEND_{text}").into(),
        descriptor: text.parse().unwrap(),
    };
    Consumer {
        id: ConsumerId::Container { id: ContainerId::new("0123456789"), started_at: "t0".into() },
        name: "app".into(),
        namespace: "app".into(),
        sources: vec!["172.17.0.2".parse().unwrap()],
        arrivals: Vec::new(),
        gateways: vec!["172.17.0.1".parse().unwrap()],
        bindings: vec![binding("web;80")],
        ends: vec![],
    }
}

/// The state of an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Is {
    Active,
    Ejected,
    /// This host has no route to it.
    OutOfReach,
    Probing,
    /// It timed out as the only endpoint, and stays in use.
    Silent,
    Unhealthy,
    Drained,
    /// Its address is the dialled address itself.
    Dialled,
    /// Its ejection is over, and it failed recently.
    JustFailed,
}

/// One consumer with a binding for one service.
#[derive(Debug, Clone)]
pub(crate) struct Setting {
    pub(crate) mode: CaptureMode,
    pub(crate) in_place: bool,
    rules_error: bool,
    vips: bool,
    barrier: bool,
    drops: Drops,
    behind: bool,
    /// A registry has the dialled address and port.
    shadowed: bool,
    consumer: Consumer,
    /// `None`: no answer.
    endpoints: Option<Vec<Is>>,
    source_fails: bool,
    held: bool,
    /// No source has answered, and data saved by an earlier run is in use.
    kept: bool,
    provider_fails: bool,
    pub(crate) pending: Vec<Part>,
    live: usize,
    limit: usize,
    limit_of_consumer: Option<usize>,
    memory_short: bool,
    problem: bool,
    skipped: bool,
    /// Whether the VIP is an address of this network namespace.
    pub(crate) vip_is_here: bool,
    /// Whether there is a second VIP, which no host in the consumer's network has.
    dead_vip: bool,
    /// Whether the user set the VIPs.
    named: bool,
    /// With `--redirect`: whether embassy has an address in the consumer's network.
    own: bool,
    has_captured: bool,
    own_rules: OwnRules,
    /// Whether the routes take the kernel path.
    by_kernel: bool,
}

/// A setting without problems.
pub(crate) fn well() -> Setting {
    Setting {
        mode: CaptureMode::Dnat,
        in_place: true,
        rules_error: false,
        vips: true,
        barrier: false,
        drops: Drops::NotCounted,
        behind: false,
        shadowed: false,
        consumer: app(),
        endpoints: Some(vec![Is::Active]),
        source_fails: false,
        held: false,
        kept: false,
        provider_fails: false,
        pending: vec![],
        live: 0,
        limit: 1000,
        limit_of_consumer: None,
        memory_short: false,
        problem: false,
        skipped: false,
        vip_is_here: true,
        dead_vip: false,
        named: true,
        own: false,
        has_captured: true,
        own_rules: OwnRules::Unread,
        by_kernel: false,
    }
}

/// Rules of the user for these ports that lead to embassy's port. They were read when `captured` connections had arrived.
fn own_rules(ports: &[u16], captured: u64) -> OwnRules {
    let rule = |port: &u16| {
        format!("-A PREROUTING -p tcp -m tcp --dport {port} -j REDIRECT --to-ports 9999\n")
    };
    let text: String = ports.iter().map(rule).collect();
    match OwnRules::among(crate::capture::leads::in_iptables(&text, "nat", "iptables"), 9999) {
        OwnRules::Read { leads, transparent, .. } => {
            OwnRules::Read { leads, transparent, captured }
        }
        unread => unread,
    }
}

/// A rule for port 80, and before it one of TPROXY for this port.
fn with_tproxy(port: u16) -> OwnRules {
    let in_iptables = crate::capture::leads::in_iptables;
    let rule = "-A PREROUTING -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 9999\n";
    let tproxy = format!("-A PREROUTING -p tcp -m tcp --dport {port} -j TPROXY --on-port 9999\n");
    let mut leads = in_iptables(rule, "nat", "iptables");
    leads.extend(in_iptables(&tproxy, "mangle", "iptables"));
    OwnRules::among(leads, 9999)
}

fn address(n: usize, is: Is) -> Endpoint {
    match is {
        Is::Dialled => Endpoint("172.17.0.1:80".parse().unwrap()),
        _ => Endpoint(format!("10.0.0.1:{}", n + 1000).parse().unwrap()),
    }
}

impl Setting {
    pub(crate) fn of(change: impl FnOnce(&mut Self)) -> Self {
        let mut setting = well();
        change(&mut setting);
        setting
    }

    pub(crate) fn situation(&self) -> Situation {
        let all = self.endpoints.iter().flatten().enumerate();
        let endpoints = Endpoints::new(all.clone().map(|(n, is)| address(n, *is)), vec![]);
        let answers = self.endpoints.is_some().then(|| (query(), Arc::new(endpoints.clone())));
        let consumer = Arc::new(self.consumer.clone());
        let vip = |text: &str| Vip(text.parse().unwrap());
        let vips = [(self.vips, vip("172.17.0.1")), (self.dead_vip, vip("172.17.42.1"))];
        let vips: Vec<_> = vips.into_iter().filter(|(is, _)| *is).map(|(_, vip)| vip).collect();
        let inputs = Inputs {
            bounds: &crate::discovery::Bounds::default(),
            consumers: &[&consumer],
            known: &Arc::default(),
            contested: &BTreeSet::new(),
            confirmed: 0,
            networks: &BTreeSet::new(),
            wiring: &Default::default(),
            endpoints: &answers.into_iter().collect(),
            vips: &vips,
            gateways_are_vips: !self.named,
            balance: Balance::RoundRobin,
            now: Instant::now(),
        };
        let table = Table::default().next(&inputs, |_| Ok(query())).unwrap();
        for (n, is) in all {
            let states = table.endpoints().map(|(_, state)| state);
            for state in states.filter(|state| state.endpoint == address(n, *is)) {
                match is {
                    Is::Active | Is::Dialled => {}
                    Is::Ejected => drop(state.failed(NOW, NOW)),
                    Is::OutOfReach => drop(state.set_aside(Millis(NOW.0 + 1))),
                    Is::Probing => drop(state.failed(Millis(0), Millis(0))),
                    Is::Silent => drop(state.timed_out_alone()),
                    Is::JustFailed => {
                        let then = Millis(NOW.0 - 2_000);
                        state.failed(then, then);
                    }
                    Is::Unhealthy => {
                        state.checked(false);
                        state.checked(false);
                    }
                    Is::Drained => state.drain(true),
                }
            }
        }
        for route in table.routes() {
            route.live_of_consumer.store(self.live, std::sync::atomic::Ordering::Relaxed);
        }
        let now = Instant::now();
        let known = Known {
            value: self.endpoints.as_ref().filter(|_| !self.kept).map(|_| Arc::new(endpoints)),
            confirmed: self.endpoints.as_ref().filter(|_| !self.kept).map(|_| now),
            error: self.source_fails.then(|| "refused".into()),
            ..Known::default()
        };
        let in_use = match self.kept {
            true => InUse::Kept { confirmed: now },
            false => InUse::Held { until: now + Duration::from_secs(24) },
        };
        let in_use = ((self.held || self.kept) && self.endpoints.is_some()).then_some(&in_use);
        let skipped: Vec<_> = self.skipped.then(|| "key: no port".to_owned()).into_iter().collect();
        let of_query = SourceReading::of(query().to_string(), &known, in_use, skipped, now);
        let problem = Problem {
            consumer: "other".into(),
            origin: "BACKEND_X".into(),
            port: None,
            reason: String::new(),
            overruled: false,
        };
        let listing = Listing {
            consumers: vec![consumer],
            problems: self.problem.then_some(problem).into_iter().collect(),
            networks: ["172.17.0.0/16".parse().unwrap()].into(),
            ..Listing::default()
        };
        let listed = Known {
            value: Some(Arc::new(listing.clone())),
            confirmed: Some(now),
            error: self.provider_fails.then(|| "no socket".into()),
            ..Known::default()
        };
        let barrier = || Barrier {
            chain: "chain INPUT".into(),
            remedy: "iptables -I INPUT -j ACCEPT".into(),
        };
        let mut paths = Paths::new(PathChoice::Proxy);
        for route in table.routes().filter(|_| self.by_kernel) {
            paths.set(route.key, PathReason::Possible);
        }
        Situation {
            table: Arc::new(table),
            paths,
            listing: Arc::new(listing),
            provider: SourceReading::of("provider".into(), &listed, None, vec![], now),
            queries: HashMap::from([(query(), of_query)]),
            own_port: 9999,
            hold: Duration::from_millis(1500),
            here: [(self.vip_is_here, "172.17.0.1"), (self.own, "172.17.0.9")]
                .into_iter()
                .filter(|(is_here, _)| *is_here)
                .map(|(_, address)| address.parse().unwrap())
                .collect(),
            capture: CaptureReading {
                mode: self.mode,
                scope: CaptureScope::Declared,
                standing: Standing {
                    in_place: self.in_place,
                    error: (self.rules_error && !self.in_place).then(|| "no nft".into()),
                    barriers: self.barrier.then(barrier).into_iter().collect(),
                    drops: self.drops,
                    behind: self.behind.then(barrier),
                    shadowed: self
                        .shadowed
                        .then(|| "172.17.0.1:80".parse().unwrap())
                        .into_iter()
                        .collect(),
                    ..Standing::default()
                },
                own: self.own.then(|| "172.17.0.9".parse().unwrap()).into_iter().collect(),
                own_rules: self.own_rules.clone(),
                captured: self.has_captured.into(),
            },
            pending: self.pending.iter().map(|part| (*part, Duration::from_secs(1))).collect(),
            load: Load {
                live: self.live,
                limit: self.limit,
                limit_of_consumer: self.limit_of_consumer,
                memory_short: self.memory_short,
            },
            now: NOW,
            astray: Default::default(),
        }
    }
}

/// Puts the consumer on no network of this host.
fn cut_off(setting: &mut Setting) {
    setting.consumer.gateways.clear();
    setting.consumer.sources = vec!["192.168.1.5".parse().unwrap()];
}

fn routes(situation: &Situation) -> Vec<&Route> {
    situation.table.routes().map(|route| &**route).collect()
}

/// This host's own consumer declares the port of a registry on a VIP. `other_vip`: there is another VIP.
fn local_shadow(setting: &mut Setting, other_vip: bool) -> (CaptureMode, bool) {
    setting.consumer.id = ConsumerId::Local;
    setting.dead_vip = other_vip;
    (CaptureMode::Redirect, true)
}

/// Neither `--dnat` nor `--redirect`, and these rules.
fn with_own_rules(has_captured: bool, rules: OwnRules) -> impl FnOnce(&mut Setting) {
    move |s| {
        (s.mode, s.has_captured, s.own_rules) = (CaptureMode::None, has_captured, rules);
    }
}

/// The causes for a port of the consumer.
fn explained(situation: &Situation, port: u16) -> Vec<Cause> {
    let consumers: Vec<_> = situation.listing.consumers.iter().map(|one| &**one).collect();
    let of_port = routes(situation).into_iter().filter(|route| route.key.port.get() == port);
    situation.of_port("app", port, &consumers, &of_port.collect::<Vec<_>>())
}

fn words(causes: &[Cause]) -> Vec<&'static str> {
    causes.iter().map(|cause| cause.finding().cause).collect()
}

type Change = Box<dyn FnOnce(&mut Setting)>;

/// The possible problems: the word of the cause, the state of the route, and the change that leads to it.
fn cases() -> Vec<(&'static str, RouteState, Change)> {
    use RouteState::{Degraded, Ejected, NoEndpoint, NotCaptured, Ok, Refused, Waiting};
    let endpoints = |list: &'static [Is]| move |s: &mut Setting| s.endpoints = Some(list.to_vec());
    vec![
        ("goes_to", Ok, Box::new(|_| {})),
        ("goes_to", Ok, Box::new(endpoints(&[Is::Active, Is::Drained]))),
        ("goes_to", Ok, Box::new(|s| s.mode = CaptureMode::None)),
        ("goes_to", Ok, Box::new(|s| s.skipped = true)),
        ("ejected", Degraded, Box::new(endpoints(&[Is::Active, Is::Ejected]))),
        ("probing", Degraded, Box::new(endpoints(&[Is::Probing]))),
        ("probing", Degraded, Box::new(endpoints(&[Is::Silent]))),
        ("unhealthy", Degraded, Box::new(endpoints(&[Is::Active, Is::Unhealthy]))),
        ("cannot_reach", Degraded, Box::new(endpoints(&[Is::Active, Is::OutOfReach]))),
        ("source_down", Degraded, Box::new(|s| s.source_fails = true)),
        ("source_down", Degraded, Box::new(|s| s.provider_fails = true)),
        ("held", Degraded, Box::new(|s| s.held = true)),
        ("barrier", Degraded, Box::new(|s| s.barrier = true)),
        ("drops_some", Degraded, Box::new(|s| (s.barrier, s.drops) = (true, Drops::Some))),
        ("drops_all", NotCaptured, Box::new(|s| (s.barrier, s.drops) = (true, Drops::All))),
        ("behind", Degraded, Box::new(|s| s.behind = true)),
        ("shadowed", NotCaptured, Box::new(|s| (s.mode, s.shadowed) = local_shadow(s, false))),
        ("shadowed", Degraded, Box::new(|s| (s.mode, s.shadowed) = local_shadow(s, true))),
        ("cut_off", Degraded, Box::new(cut_off)),
        // embassy in a container without --net=host, or with a former address of docker0.
        ("elsewhere", NotCaptured, Box::new(|s| s.vip_is_here = false)),
        // The same with --redirect: the consumer connects to embassy's own address.
        (
            "goes_to",
            Ok,
            Box::new(|s| {
                (s.mode, s.vip_is_here, s.own) = (CaptureMode::Redirect, false, true);
            }),
        ),
        (
            "nothing_captured",
            Degraded,
            Box::new(|s| (s.mode, s.has_captured) = (CaptureMode::None, false)),
        ),
        (
            "nothing_captured",
            Degraded,
            Box::new(|s| {
                (s.mode, s.has_captured) = (CaptureMode::None, false);
                s.own_rules = OwnRules::Unreadable("no right".into());
            }),
        ),
        ("no_own_rule", NotCaptured, Box::new(with_own_rules(false, own_rules(&[], 0)))),
        // The rules were removed.
        ("no_own_rule", NotCaptured, Box::new(with_own_rules(true, own_rules(&[], 1)))),
        ("passed_by", NotCaptured, Box::new(with_own_rules(false, own_rules(&[81], 0)))),
        ("passed_by", NotCaptured, Box::new(with_own_rules(true, own_rules(&[81], 0)))),
        ("goes_to", Ok, Box::new(with_own_rules(false, own_rules(&[81, 80], 0)))),
        ("tproxy", NotCaptured, Box::new(with_own_rules(true, with_tproxy(80)))),
        ("goes_to", Ok, Box::new(with_own_rules(true, with_tproxy(81)))),
        // On the kernel path no rule and no firewall's input is passed, and no address of this host is needed.
        ("goes_to", Ok, Box::new(|s| (s.by_kernel, s.barrier, s.drops) = (true, true, Drops::All))),
        ("goes_to", Ok, Box::new(|s| (s.by_kernel, s.in_place) = (true, false))),
        ("goes_to", Ok, Box::new(|s| (s.by_kernel, s.vip_is_here) = (true, false))),
        // A connection arrives by a rule that cannot be seen.
        ("goes_to", Ok, Box::new(with_own_rules(true, own_rules(&[], 0)))),
        // Rules of one's own may capture any address.
        ("goes_to", Ok, Box::new(|s| (s.mode, s.vip_is_here) = (CaptureMode::None, false))),
        ("goes_to", Ok, Box::new(|s| (s.mode, s.vips) = (CaptureMode::None, false))),
        (
            "circular",
            Degraded,
            Box::new(|s| {
                s.mode = CaptureMode::None;
                s.endpoints = Some(vec![Is::Active, Is::Dialled]);
            }),
        ),
        (
            "all_circular",
            NoEndpoint,
            Box::new(|s| {
                s.mode = CaptureMode::None;
                s.endpoints = Some(vec![Is::Dialled]);
            }),
        ),
        ("all_ejected", Ejected, Box::new(endpoints(&[Is::Ejected, Is::Unhealthy]))),
        ("all_ejected", Ejected, Box::new(endpoints(&[Is::Ejected, Is::Drained]))),
        ("all_ejected", Ejected, Box::new(endpoints(&[Is::OutOfReach]))),
        ("all_ejected", Ejected, Box::new(endpoints(&[Is::JustFailed]))),
        ("all_ejected", Ejected, Box::new(endpoints(&[Is::JustFailed, Is::Ejected]))),
        ("probing", Degraded, Box::new(endpoints(&[Is::JustFailed, Is::Active]))),
        ("probing", Degraded, Box::new(endpoints(&[Is::JustFailed, Is::Probing]))),
        ("no_endpoint", NoEndpoint, Box::new(endpoints(&[]))),
        ("all_drained", NoEndpoint, Box::new(endpoints(&[Is::Drained]))),
        ("waiting", Waiting, Box::new(|s| s.endpoints = None)),
        ("rules_missing", NotCaptured, Box::new(|s| s.in_place = false)),
        ("rules_fail", NotCaptured, Box::new(|s| (s.in_place, s.rules_error) = (false, true))),
        ("no_vip", NotCaptured, Box::new(|s| s.vips = false)),
        ("needs_redirect", NotCaptured, Box::new(|s| s.consumer.id = ConsumerId::Local)),
        ("too_many_connections", Refused, Box::new(|s| s.limit = 0)),
        (
            "too_many_of_consumer",
            Refused,
            Box::new(|s| (s.live, s.limit_of_consumer) = (1, Some(1))),
        ),
        ("memory_short", Refused, Box::new(|s| (s.live, s.memory_short) = (64, true))),
        ("source_down", Degraded, Box::new(|s| (s.source_fails, s.kept) = (true, true))),
    ]
}

#[test]
fn each_thing_that_is_wrong_has_its_state_and_its_cause() {
    let mut states = BTreeSet::new();
    for (cause, state, change) in cases() {
        let setting = Setting::of(change);
        let situation = setting.situation();
        let route = routes(&situation)[0];
        assert_eq!(situation.route(route).state, state, "{cause}: {setting:?}");
        let first = explained(&situation, 80)[0].finding();
        assert_eq!(first.cause, cause, "{setting:?}");
        states.insert(state);
    }
    assert_eq!(states.len(), RouteState::ALL.len(), "every state is met");
}

/// The list of endpoints and the findings about them use the same words.
#[test]
fn an_endpoint_is_as_bad_in_the_list_as_in_the_findings() {
    for is in [Is::Ejected, Is::OutOfReach, Is::Probing, Is::Unhealthy, Is::Drained] {
        let situation = Setting::of(|s| s.endpoints = Some(vec![Is::Active, is])).situation();
        let of_endpoints = explained(&situation, 80);
        let mut of_endpoints = of_endpoints.iter().filter(|one| one.about() == Subject::Endpoints);
        let told = of_endpoints.next().unwrap().verdict();
        let listed = situation.table.endpoints().map(|(_, state)| endpoint(state, situation.now));
        let listed = Verdict::worst(listed.map(EndpointHealth::verdict));
        assert_eq!(told, listed, "{is:?}");
        assert!(of_endpoints.next().is_none());
        let overview = situation.overview(&HostUse::default());
        assert_eq!(overview.verdicts()[&Subject::Endpoints], listed, "{is:?}");
    }
}

/// Sentences are correct for one and for many, have no empty part, and no meaningless time.
#[test]
fn no_sentence_is_odd_whatever_is_wrong() {
    let host = HostUse {
        conntrack: Some(Use { used: 950, limit: 1000 }),
        descriptors: Some(Use { used: 9_500, limit: 10_000 }),
        memory: Some(Use { used: 95 << 20, limit: 100 << 20 }),
    };
    let more: [Change; 7] = [
        Box::new(|s| s.pending = vec![Part::Discovery, Part::Listing]),
        Box::new(|s| (s.endpoints, s.pending) = (None, vec![Part::Discovery])),
        Box::new(|s| (s.problem, s.skipped) = (true, true)),
        Box::new(|s| s.consumer.sources.clear()),
        Box::new(|s| s.pending = vec![Part::Capture]),
        Box::new(|s| (s.held, s.source_fails) = (true, true)),
        Box::new(|s| (s.limit, s.live, s.limit_of_consumer) = (1, 1, Some(1))),
    ];
    let (mut words, mut said) = (BTreeSet::new(), 0);
    for change in cases().into_iter().map(|(_, _, change)| change).chain(more) {
        let setting = Setting::of(change);
        let mut situation = setting.situation();
        // A hold that has ended, and a source without any data.
        for query in situation.queries.values_mut() {
            query.held = query.held.map(|_| Duration::ZERO);
        }
        let overview = situation.overview(&host).causes;
        let of_ports = [80, 81].into_iter().flat_map(|port| explained(&situation, port));
        for cause in overview.into_iter().chain(of_ports).chain(situation.why_not_ready()) {
            let Finding { text, fix, cause, .. } = cause.finding();
            for sentence in [Some(text), fix].into_iter().flatten() {
                assert_eq!(crate::text::odd(&sentence), None, "{setting:?}");
                said += 1;
            }
            words.insert(cause);
        }
    }
    assert!(words.len() > 30 && said > 200, "{said} sentences of {words:?}");
}

/// Each fix says what to do, not only where to look for it.
#[test]
fn no_remedy_is_vague_whatever_is_wrong() {
    let dynamic = |fix: &str| fix.starts_with('{') && fix.ends_with('}');
    for (cause, fix) in Cause::FIXES.iter().filter(|(_, fix)| !fix.is_empty() && !dynamic(fix)) {
        assert_eq!(crate::text::vague(fix), None, "{cause}");
    }
    for part in [
        rules::RulePart::Hold,
        rules::RulePart::Notrack,
        rules::RulePart::Ipv6,
        rules::RulePart::Count,
        rules::RulePart::Guard,
        rules::RulePart::Refusal,
    ] {
        assert_eq!(crate::text::vague(part.fix()), None, "{part:?}");
    }
    use crate::{discovery::CannotAsk, table::UnroutedReason};
    let via: Arc<str> = "x".into();
    let key = routes(&well().situation())[0].key;
    for reason in [
        CannotAsk::Unknown { via: via.clone(), configured: "y".into() }.into(),
        CannotAsk::Datacentre { dc: via.clone(), via: via.clone() }.into(),
        CannotAsk::Tags { tags: Default::default(), via: via.clone() }.into(),
        CannotAsk::OwnPort(key.port).into(),
        UnroutedReason::Taken { key, winner: via },
        UnroutedReason::Contested { key },
    ] {
        assert_eq!(crate::text::vague(reason.fix()), None, "{reason}");
    }
    assert!(crate::text::vague("correct what the reason names").is_some());
    assert!(crate::text::vague("maybe the network").is_some() && crate::text::vague("").is_some());
}

#[test]
fn what_is_held_before_it_is_reset_is_called_so() {
    let text = |hold: u64| {
        let mut situation = Setting::of(|s| s.endpoints = None).situation();
        situation.hold = Duration::from_millis(hold);
        explained(&situation, 80)[0].finding().text
    };
    let held = "connections wait for its answer for up to 1.5 s (--hold), and are reset then.";
    assert_eq!(text(1500), format!("consul web has not answered yet: {held}"));
    // The first line contains the error too, because `embassy wait` shows only this line.
    let fails = Setting::of(|s| (s.endpoints, s.source_fails) = (None, true)).situation();
    let first = explained(&fails, 80)[0].finding();
    assert!(first.text.starts_with("consul web has not answered yet (refused): "), "{first:?}");
    assert_eq!(text(0), "consul web has not answered yet: connections are reset.");
}

#[test]
fn nothing_is_wrong_where_nothing_is() {
    let situation = well().situation();
    let overview = situation.overview(&HostUse::default());
    assert_eq!((overview.verdict(), words(&overview.causes)), (Verdict::Ok, vec![]));
    assert_eq!(situation.awaited(), []);
    assert!(overview.verdicts().values().all(|verdict| *verdict == Verdict::Ok));
}

#[test]
fn a_consumer_dials_what_it_reaches() {
    let dials = |change: fn(&mut Setting)| {
        let situation = Setting::of(change).situation();
        let dials = situation.dials(&situation.listing.consumers[0]);
        dials.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(dials(|_| {}), ["172.17.0.1"]);
    let redirect = |s: &mut Setting| (s.mode, s.own) = (CaptureMode::Redirect, true);
    assert_eq!(dials(redirect), ["172.17.0.1", "172.17.0.9"]);
    // In its own container: the gateway is the host's address.
    let inside = |s: &mut Setting| {
        (s.mode, s.own, s.vip_is_here) = (CaptureMode::Redirect, true, false);
    };
    assert_eq!(dials(inside), ["172.17.0.9"]);
    assert_eq!(dials(|s| s.vip_is_here = false), [""; 0]);
    assert_eq!(dials(cut_off), [""; 0]);
    let local = |s: &mut Setting| {
        (s.mode, s.own, s.vip_is_here) = (CaptureMode::Redirect, true, false);
        s.consumer.id = ConsumerId::Local;
    };
    assert_eq!(dials(local), ["172.17.0.1"]);
}

/// Without a rule that leads to embassy, it is not ready, whether there is a consumer or not. With a rule for some ports,
/// it is.
#[test]
fn rules_of_ones_own_that_lead_nowhere_are_seen_everywhere() {
    let of = |rules: OwnRules, two: bool| {
        let situation = Setting::of(|s| {
            with_own_rules(true, rules)(s);
            let descriptor = "web;81".parse().unwrap();
            let other = Binding { origin: "BACKEND_Z".into(), descriptor };
            s.consumer.bindings.extend(two.then_some(other));
        })
        .situation();
        let overview = situation.overview(&HostUse::default());
        let capture = overview.verdicts()[&Subject::Capture];
        let waits = !situation.awaited().is_empty();
        (words(&overview.causes)[0], capture, waits)
    };
    assert_eq!(of(own_rules(&[], 1), false), ("no_own_rule", Verdict::Broken, true));
    assert_eq!(of(own_rules(&[82], 1), true), ("passed_by", Verdict::Broken, true));
    let only_tproxy = match with_tproxy(80) {
        OwnRules::Read { transparent, captured, .. } => {
            OwnRules::Read { leads: Arc::default(), transparent, captured: captured + 1 }
        }
        unread => unread,
    };
    assert_eq!(of(only_tproxy, false), ("tproxy", Verdict::Broken, true));
    let some = of(own_rules(&[80], 1), true);
    assert_eq!((some.1, some.2), (Verdict::Degraded, false));
    let situation = Setting::of(with_own_rules(false, own_rules(&[80], 0))).situation();
    let overview = situation.overview(&HostUse::default());
    assert_eq!((overview.verdict(), situation.awaited()), (Verdict::Ok, vec![]));
    // The rule is shown.
    let explained = explained(&situation, 80);
    let rule = explained.iter().find(|cause| cause.finding().cause == "own_rule").unwrap();
    assert!(rule.finding().text.contains("--dport 80 -j REDIRECT"), "{rule:?}");
    let mut nobody = Setting::of(with_own_rules(false, own_rules(&[], 0))).situation();
    (nobody.table, nobody.listing) = Default::default();
    assert_eq!(nobody.awaited().len(), 1);
}

/// What drops all captured connections is no failure of routes that the kernel leads past it. Those that it does not are broken.
#[test]
fn a_firewall_that_drops_what_is_captured_breaks_only_routes_through_the_proxy() {
    let of = |by_kernel: bool| {
        let setting = Setting::of(|s| {
            (s.by_kernel, s.barrier, s.drops) = (by_kernel, true, Drops::All);
        });
        let situation = setting.situation();
        let overview = situation.overview(&HostUse::default());
        let waits = !situation.awaited().is_empty();
        let captured = situation.is_captured(routes(&situation)[0]);
        (words(&overview.causes)[0], overview.verdict(), waits, captured)
    };
    assert_eq!(of(true), ("drops_all", Verdict::Degraded, false, Some(true)));
    assert_eq!(of(false), ("drops_all", Verdict::Broken, true, Some(false)));
    let mut mixed = Setting::of(|s| {
        (s.by_kernel, s.barrier, s.drops) = (true, true, Drops::All);
        let descriptor = "web;81".parse().unwrap();
        s.consumer.bindings.push(Binding { origin: "BACKEND_Z".into(), descriptor });
    })
    .situation();
    let key = routes(&mixed).iter().find(|route| route.key.port.get() == 81).unwrap().key;
    mixed.paths.set(key, PathReason::NotAsked);
    let states: BTreeSet<_> =
        routes(&mixed).iter().map(|one| (one.key.port.get(), mixed.route(one).state)).collect();
    assert_eq!(states, [(80, RouteState::Ok), (81, RouteState::NotCaptured)].into());
    assert_eq!(mixed.overview(&HostUse::default()).verdict(), Verdict::Broken);
}

/// The flag that was forgotten, where it is known where embassy runs.
#[test]
fn without_a_flag_that_captures_the_one_is_named_that_fits() {
    let fix = |gateway_is_here: bool, gateways: bool| {
        let situation = Setting::of(|s| {
            with_own_rules(false, own_rules(&[], 0))(s);
            s.vip_is_here = gateway_is_here;
            if !gateways {
                s.consumer.gateways.clear();
            }
        })
        .situation();
        explained(&situation, 80)[0].finding().fix.unwrap()
    };
    assert!(
        fix(true, true).starts_with("start embassy with --dnat, or add"),
        "{}",
        fix(true, true)
    );
    let apart = fix(false, true);
    assert!(apart.starts_with("start embassy with --redirect (it runs in a container"), "{apart}");
    assert!(apart.ends_with("-I PREROUTING -p tcp -j REDIRECT --to-ports 9999"), "{apart}");
    let unknown = fix(true, false);
    assert!(unknown.contains("--dnat (in a container of its own: --redirect)"), "{unknown}");
}

/// Connections are not captured, and the reason is reported: the host's own connections without `--redirect`, and a
/// registry's port.
#[test]
fn an_embassy_that_captures_nobody_is_not_ready_whatever_the_reason() {
    let of = |change: &dyn Fn(&mut Setting)| {
        let situation = Setting::of(change).situation();
        let overview = situation.overview(&HostUse::default());
        let waits: Vec<_> = situation.awaited().iter().map(|awaited| awaited.part).collect();
        (words(&overview.causes)[0], overview.verdicts()[&Subject::Capture], waits)
    };
    let broken = |cause| (cause, Verdict::Broken, vec![Part::Capture]);
    assert_eq!(of(&|s| s.consumer.id = ConsumerId::Local), broken("needs_redirect"));
    assert_eq!(of(&|s| (s.mode, s.shadowed) = local_shadow(s, false)), broken("shadowed"));
    // Another port is captured.
    let (first, capture, waits) = of(&|s| {
        (s.mode, s.shadowed) = local_shadow(s, false);
        let descriptor = "web;81".parse().unwrap();
        s.consumer.bindings.push(Binding { origin: "BACKEND_Z".into(), descriptor });
    });
    assert_eq!((first, capture, waits), ("routes", Verdict::Degraded, vec![]));
}

/// The port has a route, and another variable declared it too but lost.
#[test]
fn who_lost_a_port_is_told_where_the_port_is_asked_for() {
    let mut situation = well().situation();
    let (port, consumer) = (situation.listing.consumers[0].bindings[0].descriptor.port, app());
    let lost = |port| Problem {
        consumer: consumer.name.clone(),
        origin: "BACKEND_Z".into(),
        port,
        reason: format!("port 1: {} already declares it", "BACKEND_A"),
        overruled: port.is_some(),
    };
    let mut causes = |problems: Vec<Problem>, asked: u16| {
        Arc::make_mut(&mut situation.listing).problems = problems;
        let consumers: Vec<_> = situation.listing.consumers.iter().map(|one| &**one).collect();
        let routes: Vec<_> =
            situation.table.routes().filter(|r| r.key.port.get() == asked).collect();
        let routes: Vec<_> = routes.iter().map(|route| &***route).collect();
        words(&situation.of_port("app", asked, &consumers, &routes))
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
    };
    assert_eq!(causes(vec![lost(Some(port))], port.get())[0], "overruled");
    assert!(
        !causes(vec![lost(crate::model::Port::new(9))], port.get())
            .contains(&"overruled".to_owned())
    );
    // If no binding declares the port, one invalid descriptor may be the cause. With several, it is unclear which.
    assert_eq!(causes(vec![lost(None)], 7)[0], "invalid");
    assert_eq!(causes(vec![lost(None), lost(None)], 7)[0], "not_declared");
    // The problem of another container is not a cause.
    for of in [None, crate::model::Port::new(7)] {
        let others = Problem { consumer: "another".into(), overruled: false, ..lost(of) };
        assert_eq!(causes(vec![others], 7), ["not_declared"]);
    }
}

/// Of a host's own connections, those to VIPs are captured. Those to embassy's own addresses are not.
#[test]
fn the_local_consumer_needs_a_vip_though_embassy_has_addresses() {
    let of = |vips, local: bool| {
        let change = |s: &mut Setting| {
            (s.mode, s.own, s.vips) = (CaptureMode::Redirect, true, vips);
            if local {
                s.consumer.id = ConsumerId::Local;
            }
        };
        let mut setting = well();
        change(&mut setting);
        words(&setting.situation().overview(&HostUse::default()).causes)
    };
    assert_eq!(of(false, true)[0], "no_vip");
    assert_eq!(of(true, true), [""; 0]);
    assert_eq!(of(false, false), [""; 0]);
}

#[test]
fn a_vip_that_nobody_has_is_found_though_another_one_works() {
    let situation = Setting::of(|s| s.dead_vip = true).situation();
    let overview = situation.overview(&HostUse::default());
    assert_eq!(words(&overview.causes), ["dead_vip"]);
    let finding = overview.causes[0].finding();
    assert!(finding.text.contains("172.17.42.1") && !finding.text.contains("172.17.0.1"));
    assert_eq!(situation.awaited(), [], "the other one works");
    // If no VIP works, both are reported.
    let none = Setting::of(|s| (s.dead_vip, s.vip_is_here) = (true, false)).situation();
    let causes = words(&none.overview(&HostUse::default()).causes);
    assert!(causes.contains(&"elsewhere") && !causes.contains(&"dead_vip"), "{causes:?}");
    // VIPs that the user did not set need no correction: the gateways of a linked container are the host's addresses, not
    // embassy's.
    let unnamed = Setting::of(|s| (s.dead_vip, s.named) = (true, false)).situation();
    assert_eq!(words(&unnamed.overview(&HostUse::default()).causes), [""; 0]);
    // From another network the VIP is reached via the gateway, whichever host has it.
    let away = Setting::of(|s| {
        s.dead_vip = true;
        s.consumer.sources = vec!["172.18.0.2".parse().unwrap()];
    });
    assert_eq!(words(&away.situation().overview(&HostUse::default()).causes), [""; 0]);
}

#[test]
fn bindings_of_one_origin_have_their_own_reasons() {
    let mut situation = well().situation();
    let mut consumer = app();
    let mut binding = |text: &str| {
        let (origin, descriptor) = ("-services".into(), text.parse().unwrap());
        consumer.bindings.push(Binding { origin, descriptor });
    };
    ["a;1;via=x", "b;2;via=x", "web;81"].into_iter().for_each(&mut binding);
    let (consumer, vip) = (Arc::new(consumer), Vip("172.17.0.1".parse().unwrap()));
    let inputs = Inputs {
        bounds: &crate::discovery::Bounds::default(),
        consumers: &[&consumer],
        known: &Arc::default(),
        contested: &BTreeSet::new(),
        confirmed: 0,
        networks: &BTreeSet::new(),
        wiring: &Default::default(),
        endpoints: &Default::default(),
        vips: &[vip],
        gateways_are_vips: false,
        balance: Balance::RoundRobin,
        now: Instant::now(),
    };
    let ask = |binding: &Binding| match &binding.descriptor.via {
        Some(via) => Err(crate::discovery::CannotAsk::Unknown {
            via: via.clone(),
            configured: binding.descriptor.service.to_string(),
        }),
        None => Ok(query()),
    };
    situation.table = Arc::new(Table::default().next(&inputs, ask).unwrap());
    situation.listing = Arc::new(Listing { consumers: vec![consumer], ..Listing::default() });
    let all = situation.bindings(|_| true);
    let of = |port| all.iter().find(|binding| binding.port() == Some(port)).unwrap();
    assert_eq!(of(81).state(), BindingState::Routed, "{:?}", of(81).reasons());
    for (port, service) in [(1, "a"), (2, "b")] {
        let reasons: Vec<_> = of(port).reasons().iter().map(ToString::to_string).collect();
        assert_eq!(of(port).state(), BindingState::Unrouted);
        assert!(reasons.len() == 1 && reasons[0].ends_with(&format!(": {service}")), "{reasons:?}");
    }
}

/// Then they need not be read for it.
#[test]
fn readiness_depends_on_queries_only_while_their_first_answers_are_awaited() {
    let judged = |situation: &Situation| {
        let causes = words(&situation.why_not_ready());
        (situation.awaited(), causes, situation.passed_by_ports())
    };
    let mut not_ready = 0;
    for (_, _, change) in cases() {
        let mut situation = Setting::of(change).situation();
        if situation.pending.iter().any(|(part, _)| *part == Part::Discovery) {
            continue;
        }
        let before = judged(&situation);
        not_ready += usize::from(!before.0.is_empty());
        situation.queries.clear();
        assert_eq!(judged(&situation), before);
    }
    assert!(not_ready > 5, "{not_ready}");
}

#[test]
fn what_only_follows_from_a_provider_that_is_awaited_is_not_said() {
    let mut situation = Setting::of(|s| {
        (s.endpoints, s.in_place) = (None, false);
        s.pending = vec![Part::Capture, Part::Discovery, Part::Listing];
    })
    .situation();
    (situation.table, situation.listing) = Default::default();
    situation.queries.clear();
    situation.provider = SourceReading::of::<()>(
        "provider".into(),
        &Known { error: Some("no socket".into()), ..Known::default() },
        None,
        vec![],
        Instant::now(),
    );
    let causes = words(&situation.overview(&HostUse::default()).causes);
    assert_eq!(causes, ["provider_awaited", "source_down"]);
    let causes = words(&situation.of_port("app", 80, &[], &[]));
    assert_eq!(causes, ["provider_awaited", "source_down"], "nothing is known of app");
}

#[test]
fn a_port_without_a_route_says_why() {
    let of = |setting: Setting, port| words(&explained(&setting.situation(), port));
    assert_eq!(of(well(), 81), ["not_declared"]);
    let unaddressed = Setting::of(|s| s.consumer.sources.clear());
    let causes = explained(&unaddressed.situation(), 80);
    let finding = causes[0].finding();
    assert_eq!((finding.cause, finding.verdict), ("unrouted", Verdict::Broken));
    assert!(finding.text.contains("--network none"), "{finding:?}");

    let near = well().situation().of_port("ap", 80, &[], &[])[0].finding().text;
    assert!(near.contains("address \"ap\"; near: app."), "{near}");

    let situation = Setting::of(|s| s.problem = true).situation();
    let said = |wanted: &str| situation.of_port(wanted, 80, &[], &[])[0].finding();
    assert_eq!(said("nobody").cause, "no_consumer");
    let invalid = said("other");
    assert_eq!(invalid.text, "other BACKEND_X was skipped: no reason was given.");
}

#[test]
fn a_binding_that_has_not_all_of_its_routes_has_a_reason() {
    let state = |setting: Setting| {
        let situation = setting.situation();
        let all = situation.bindings(|_| true);
        assert!(all.iter().all(|b| b.reasons().is_empty() == (b.state() == BindingState::Routed)));
        all.iter().map(BindingFate::state).collect::<Vec<_>>()
    };
    assert_eq!(state(well()), [BindingState::Routed]);
    assert_eq!(
        state(Setting::of(|s| s.problem = true)),
        [BindingState::Routed, BindingState::Invalid]
    );
    assert_eq!(state(Setting::of(|s| s.consumer.sources.clear())), [BindingState::Unrouted]);
}

#[test]
fn a_source_is_as_bad_as_what_is_used_of_it() {
    let now = Instant::now();
    let fails = Known::<()> { error: Some("".into()), ..Known::default() };
    let kept = InUse::Kept { confirmed: now };
    let of = |known: &Known<()>, in_use| {
        SourceReading::of("consul web".into(), known, in_use, vec![], now + Duration::from_secs(4))
    };
    assert_eq!(of(&Known::default(), None).verdict(), Verdict::Broken);
    assert_eq!(of(&fails, None).verdict(), Verdict::Broken);
    assert_eq!(
        of(&fails, None).causes()[0].finding().text,
        "consul web does not answer (no reason was given); embassy has no data from it."
    );
    let of_an_earlier_run = of(&fails, Some(&kept));
    assert_eq!(of_an_earlier_run.verdict(), Verdict::Degraded);
    assert_eq!(
        of_an_earlier_run.causes()[0].finding().text,
        "consul web does not answer (no reason was given); data saved by an earlier run, confirmed 4 s ago, is in use."
    );
    let known = Known { value: Some(Arc::new(())), confirmed: Some(now), ..Known::default() };
    assert_eq!(of(&known, None).verdict(), Verdict::Ok);
    let held = InUse::Held { until: now + Duration::from_secs(28) };
    assert_eq!(
        of(&known, Some(&held)).causes()[0].finding().text,
        "consul web reports no endpoints, or lost most of them at once; the last ones stay in use for 24 s more."
    );
}

#[test]
fn embassy_is_ready_while_nothing_is_awaited_and_its_rules_stand() {
    let parts = |setting: Setting| {
        let awaited = setting.situation().awaited();
        awaited.into_iter().map(|awaited| (awaited.part, awaited.sources)).collect::<Vec<_>>()
    };
    assert_eq!(parts(Setting::of(|s| s.in_place = false)), [(Part::Capture, vec![])]);
    // Told once, however it is known.
    let both = Setting::of(|s| (s.in_place, s.pending) = (false, vec![Part::Capture]));
    assert_eq!(parts(both), [(Part::Capture, vec![])]);
    assert_eq!(parts(Setting::of(|s| (s.mode, s.in_place) = (CaptureMode::None, false))), []);
    let awaited = Setting::of(|s| {
        s.endpoints = None;
        s.pending = vec![Part::Discovery, Part::Listing];
    });
    assert_eq!(
        parts(awaited),
        [
            (Part::Discovery, vec!["consul web".to_owned()]),
            (Part::Listing, vec!["provider".to_owned()])
        ]
    );
    // A source that fails later is not a reason.
    assert_eq!(parts(Setting::of(|s| s.source_fails = true)), []);
}

#[test]
fn this_host_is_judged_by_how_much_of_its_limits_is_in_use() {
    let verdict = |use_of: HostUse| {
        let overview = well().situation().overview(&use_of);
        (overview.verdict(), words(&overview.causes))
    };
    let of = |used, limit| Some(Use { used, limit });
    let conntrack = |used| HostUse { conntrack: of(used, 1000), ..HostUse::default() };
    assert_eq!(verdict(conntrack(749)), (Verdict::Ok, vec![]));
    assert_eq!(verdict(conntrack(750)), (Verdict::Degraded, vec!["conntrack"]));
    assert_eq!(verdict(conntrack(950)), (Verdict::Broken, vec!["conntrack"]));
    let none = HostUse { conntrack: of(0, 0), ..HostUse::default() };
    assert_eq!(verdict(none), (Verdict::Ok, vec![]));
    let descriptors = HostUse { descriptors: of(9_500, 10_000), ..HostUse::default() };
    assert_eq!(verdict(descriptors), (Verdict::Degraded, vec!["descriptors"]));
    let memory = HostUse { memory: of(95 << 20, 100 << 20), ..HostUse::default() };
    assert_eq!(verdict(memory), (Verdict::Broken, vec!["memory"]));
}

#[test]
fn a_part_that_the_firewall_cannot_do_is_said_if_somebody_misses_it() {
    let of = |lacks: &[rules::RulePart]| {
        let mut situation = well().situation();
        let lacks = lacks.iter().map(|part| (*part, "no module".to_owned()));
        situation.capture.standing.lacks = lacks.collect();
        let overview = situation.overview(&HostUse::default());
        (overview.verdict(), words(&overview.causes))
    };
    assert_eq!(of(&[rules::RulePart::Count]), (Verdict::Ok, vec![]));
    let all = of(&[rules::RulePart::Hold, rules::RulePart::Count, rules::RulePart::Ipv6]);
    assert_eq!(all, (Verdict::Degraded, vec!["firewall_lacks", "firewall_lacks"]));
}

#[test]
fn what_is_wrong_many_times_is_counted() {
    let setting = Setting::of(|s| {
        let many = (1..=30).map(|port| Binding {
            origin: format!("BACKEND_{port}").into(),
            descriptor: format!("web;{port}").parse().unwrap(),
        });
        s.consumer.bindings = many.collect();
        s.consumer.sources.clear();
    });
    let overview = setting.situation().overview(&HostUse::default());
    let texts: Vec<_> = overview.causes.iter().map(|cause| cause.finding().text).collect();
    assert_eq!((overview.problems, texts.len()), (30, 21), "{texts:#?}");
    assert_eq!(texts[20], "And 10 more.");
}

fn any_setting() -> impl Strategy<Value = Setting> {
    let is = prop_oneof![
        Just(Is::Active),
        Just(Is::Ejected),
        Just(Is::OutOfReach),
        Just(Is::Probing),
        Just(Is::Silent),
        Just(Is::Unhealthy),
        Just(Is::Drained),
        Just(Is::Dialled),
        Just(Is::JustFailed),
    ];
    let mode =
        prop_oneof![Just(CaptureMode::None), Just(CaptureMode::Dnat), Just(CaptureMode::Redirect)];
    let own_rules = prop_oneof![
        Just(OwnRules::Unread),
        Just(OwnRules::Unreadable("no right".into())),
        Just(own_rules(&[], 0)),
        Just(own_rules(&[], 1)),
        Just(own_rules(&[80], 1)),
        Just(own_rules(&[81], 1)),
        Just(with_tproxy(80)),
        Just(with_tproxy(81)),
    ];
    let drops = prop_oneof![Just(Drops::NotCounted), Just(Drops::Some), Just(Drops::All)];
    let capture = (mode, any::<[bool; 5]>(), any::<[bool; 6]>(), own_rules, drops);
    let sources = (proptest::option::of(prop::collection::vec(is, 0..4)), any::<[bool; 5]>());
    let load =
        (0..70usize, 0..70usize, proptest::option::of(0..70usize), any::<(bool, bool, bool)>());
    (capture, sources, load).prop_map(|(capture, sources, load)| {
        let (mode, [in_place, rules_error, vips, barrier, behind], places, own_rules, drops) =
            capture;
        let [local, gateways, near, vip_is_here, own, has_captured] = places;
        let (endpoints, [source_fails, held, provider_fails, problem, skipped]) = sources;
        let (live, limit, limit_of_consumer, (memory_short, awaits, by_kernel)) = load;
        let mut consumer = app();
        if local {
            consumer.id = ConsumerId::Local;
        }
        if !gateways {
            consumer.gateways.clear();
        }
        if !near {
            consumer.sources = vec!["192.168.1.5".parse().unwrap()];
        }
        Setting {
            mode,
            // With the user's own rules, embassy has no rules that could be in place or blocked.
            in_place: in_place && mode != CaptureMode::None,
            rules_error: rules_error && mode != CaptureMode::None,
            vips,
            barrier: barrier && mode != CaptureMode::None,
            drops: if barrier && mode != CaptureMode::None { drops } else { Drops::NotCounted },
            behind: behind && mode != CaptureMode::None,
            shadowed: behind && mode == CaptureMode::Redirect,
            consumer,
            endpoints,
            source_fails,
            held,
            kept: false,
            provider_fails,
            pending: awaits.then_some(Part::Discovery).into_iter().collect(),
            live,
            limit,
            limit_of_consumer,
            memory_short,
            problem,
            skipped,
            vip_is_here,
            dead_vip: false,
            named: true,
            own: own && mode == CaptureMode::Redirect,
            has_captured,
            own_rules,
            by_kernel: by_kernel && mode != CaptureMode::None && !local,
        }
    })
}

proptest! {
    /// The lists, the explanation, the overview and readiness agree with each other.
    #[test]
    fn everybody_is_told_the_same(setting in any_setting()) {
        let situation = setting.situation();
        let route = routes(&situation)[0];
        let listed = situation.route(route).state.verdict();
        let causes = explained(&situation, 80);
        let explained = Verdict::worst(causes.iter().map(Cause::verdict));
        prop_assert_eq!(explained, listed, "{:?}: {:?}", situation.route(route), causes);
        prop_assert_eq!(causes[0].verdict(), explained, "the cause comes first");

        let overview = situation.overview(&HostUse::default());
        prop_assert!(overview.verdict() >= listed, "{overview:?}");
        prop_assert_eq!(overview.verdicts()[&Subject::Routes], listed);
        let all: Verdict = overview.verdicts().into_values().max().unwrap();
        prop_assert_eq!(all, overview.verdict());
        // If embassy is not ready, there is a finding.
        prop_assert!(situation.awaited().is_empty() || overview.verdict() > Verdict::Ok);

        // A finding with a problem has a fix.
        for cause in causes.iter().chain(&overview.causes) {
            let finding = cause.finding();
            prop_assert_eq!(finding.verdict, cause.verdict());
            prop_assert!(!finding.text.trim().is_empty() && !finding.cause.is_empty());
            let fix = finding.fix.is_some_and(|fix| !fix.is_empty());
            prop_assert!(fix || finding.verdict == Verdict::Ok, "{cause:?}");
        }
    }
}

/// Of UDP: no rule captures it, and only the kernel path serves it.
#[test]
fn a_binding_of_udp_is_served_by_the_kernel_path_or_says_why_not() {
    use crate::path::{Path, PathReason, Paths};
    let binding =
        Binding { origin: "BACKEND_DNS".into(), descriptor: "web;53/udp".parse().unwrap() };
    let setting = Setting::of(|s| s.consumer.bindings = vec![binding.clone()]);
    let state = |situation: &Situation| situation.route(routes(situation)[0]).state;
    // What is wrong with the rules does not concern it.
    let mut situation = Setting { in_place: false, barrier: true, ..setting.clone() }.situation();
    let key = routes(&situation)[0].key;
    situation.paths.set(key, PathReason::Possible);
    assert_eq!(state(&situation), RouteState::Ok);
    let mut situation = setting.situation();
    assert_eq!(state(&situation), RouteState::NotCaptured, "nobody has decided yet");
    for reason in PathReason::ALL {
        situation.paths.set(key, *reason);
        let is_served = reason.path() == Path::Kernel;
        let expected = if is_served { RouteState::Ok } else { RouteState::NotCaptured };
        assert_eq!(state(&situation), expected, "{reason}");
        let causes = explained(&situation, 53);
        let said = causes.iter().find(|cause| matches!(cause, Cause::NoPath { .. }));
        assert_eq!(said.is_none(), is_served, "{reason}");
        let overview = situation.overview(&HostUse::default());
        let said = overview.causes.iter().any(|cause| matches!(cause, Cause::NoPath { .. }));
        assert_eq!(!said, is_served, "{reason}");
        assert!(situation.awaited().is_empty(), "embassy is ready without it");
    }
    let said = explained(&situation, 53)[0].finding();
    assert_eq!((said.cause, said.verdict), ("no_path", Verdict::Broken));
    assert!(
        said.text.starts_with("Port 53/udp of app is not served from 172.17.0.2: "),
        "{}",
        said.text
    );
    situation.paths = Paths::without_capture();
    let said = explained(&situation, 53)[0].finding();
    assert_eq!(said.fix.as_deref(), Some("start embassy with --dnat or --redirect"));

    // Of two families one may be without an endpoint: that is no failure.
    let mut both = setting.clone();
    both.consumer.sources.push("fd00::2".parse().unwrap());
    let mut situation = both.situation();
    let mut keys: Vec<_> = routes(&situation).iter().map(|route| route.key).collect();
    keys.sort();
    situation.paths.set(keys[0], PathReason::Possible);
    situation.paths.set(keys[1], PathReason::Family);
    let states = keys.iter().map(|key| situation.route(situation.table.route(key).unwrap()).state);
    assert_eq!(states.collect::<Vec<_>>(), [RouteState::Ok, RouteState::Degraded]);
    let next = keys.iter().map(|key| {
        let route = situation.table.route(key).unwrap();
        (situation.next_pick(route).is_some(), situation.route(route).active)
    });
    assert_eq!(next.collect::<Vec<_>>(), [(true, 1), (false, 0)], "none of its family");
    situation.paths.set(keys[0], PathReason::Unavailable);
    let state = situation.route(situation.table.route(&keys[1]).unwrap()).state;
    assert_eq!(state, RouteState::NotCaptured);
}

/// The same port of TCP and of UDP are two bindings.
#[test]
fn a_port_of_both_protocols_has_two_routes_and_only_that_of_tcp_is_captured() {
    use crate::path::PathReason;
    let binding = |text: &str| Binding {
        origin: format!("BACKEND_{text}").into(),
        descriptor: text.parse().unwrap(),
    };
    let bindings = vec![binding("web;53"), binding("web;53/udp")];
    let mut situation = Setting::of(|s| s.consumer.bindings = bindings.clone()).situation();
    assert_eq!(situation.table.routes().len(), 2);
    let states = |situation: &Situation| -> Vec<_> {
        let mut all = routes(situation);
        all.sort_by_key(|route| route.key);
        all.into_iter().map(|route| situation.route(route).state).collect()
    };
    assert_eq!(states(&situation), [RouteState::Ok, RouteState::NotCaptured]);
    let fates = situation.bindings(|_| true);
    assert!(fates.iter().all(|fate| fate.state() == BindingState::Routed), "{fates:?}");
    let mut keys: Vec<_> = routes(&situation).iter().map(|route| route.key).collect();
    keys.sort();
    situation.paths.set(keys[1], PathReason::Possible);
    assert_eq!(states(&situation), [RouteState::Ok, RouteState::Ok]);
    let without_rules = Setting { in_place: false, ..well() };
    let without_rules =
        Setting { consumer: Consumer { bindings, ..app() }, ..without_rules }.situation();
    assert_eq!(states(&without_rules), [RouteState::NotCaptured, RouteState::NotCaptured]);
}
