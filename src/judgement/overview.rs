//! The overview: whether embassy is ready, and all problems.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
    time::Duration,
};

use super::{
    cause::{Because, Cause, InParentheses, List, Meanwhile, Used},
    host::HostUse,
    route::endpoint,
    situation::Situation,
    source::SourceReading,
    states::{EndpointHealth, RouteState, SourceState, Subject, Verdict},
};
use crate::{
    capture::{Drops, OwnRules, Standing, input::Barrier, rules},
    consumer::Reach,
    counts::numbered,
    model::{ConsumerId, Protocol, port_of},
    readiness::Part,
    table::Route,
};

/// Maximum number of entries of a list that are named. Further ones are only counted.
pub(super) const NAMED: usize = 20;

/// A part that is not ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Awaited {
    pub part: Part,
    /// Time since embassy started to wait. `None`: since the rules were lost.
    pub since: Option<Duration>,
    /// The first [`NAMED`] sources that have not answered.
    pub sources: Vec<String>,
}

/// All problems, and the numbers of entries by state.
#[derive(Debug, Clone, Default)]
pub struct Overview {
    /// The worst first.
    pub causes: Vec<Cause>,
    pub routes: BTreeMap<RouteState, usize>,
    pub endpoints: BTreeMap<EndpointHealth, usize>,
    pub sources: BTreeMap<SourceState, usize>,
    /// The number of bindings without all of their routes, including descriptors that do not parse.
    pub problems: usize,
}

impl Overview {
    pub fn verdict(&self) -> Verdict {
        Verdict::worst(self.causes.iter().map(Cause::verdict))
    }

    /// The verdict of each subject.
    pub fn verdicts(&self) -> BTreeMap<Subject, Verdict> {
        let mut verdicts: BTreeMap<_, _> =
            Subject::ALL.iter().map(|subject| (*subject, Verdict::Ok)).collect();
        for cause in &self.causes {
            let verdict = verdicts.entry(cause.about()).or_insert(Verdict::Ok);
            *verdict = cause.verdict().max(*verdict);
        }
        verdicts
    }
}

impl Situation {
    /// The parts that are not ready. embassy is ready if there are none.
    pub fn awaited(&self) -> Vec<Awaited> {
        let sources = |part| match part {
            Part::Listing => vec![self.provider.name.clone()],
            Part::Discovery => self.unanswered(),
            Part::Capture => Vec::new(),
        };
        let pending = self.pending.iter().map(|(part, since)| Awaited {
            part: *part,
            since: Some(*since),
            sources: sources(*part),
        });
        let mut awaited: Vec<_> = pending.collect();
        // The rules were in place and are not now, or no connection can arrive. A shutdown removes the rules on purpose.
        let rules = match self.captures() {
            true => {
                let drops_all = self.all_are_dropped() && self.needs_rules();
                self.capture.standing.in_place && !drops_all
            }
            false => !self.no_own_rule(),
        };
        let lost = !rules || self.captures_nobody();
        if lost && !awaited.iter().any(|awaited| awaited.part == Part::Capture) {
            awaited.insert(0, Awaited { part: Part::Capture, since: None, sources: Vec::new() });
        }
        awaited
    }

    /// The causes of [`Self::awaited`], among others of the process and the capture.
    pub fn why_not_ready(&self) -> Vec<Cause> {
        self.of_process().into_iter().chain(self.of_capture()).collect()
    }

    /// Whether there are routes, and no connection for any of them can arrive.
    fn captures_nobody(&self) -> bool {
        // No rule captures UDP: whether it is served is no part of being ready.
        let mut routes = self.tcp_routes().peekable();
        routes.peek().is_some() && routes.all(|route| self.is_captured(route) == Some(false))
    }

    /// The bindings of UDP that the kernel path does not take: each once.
    fn without_path(&self) -> Vec<Cause> {
        let mut seen = BTreeSet::new();
        let udp = self.table.routes().filter(|route| route.key.protocol == Protocol::Udp);
        let causes = udp.filter_map(|route| {
            let cause = self.not_captured(route)?;
            seen.insert((&route.consumer, route.key.port)).then_some(cause)
        });
        causes.collect()
    }

    fn tcp_routes(&self) -> impl Iterator<Item = &Arc<Route>> {
        self.table.routes().filter(|route| route.key.protocol == Protocol::Tcp)
    }

    /// The queries that keep embassy from being ready: their discovery has not answered or was not asked yet.
    fn unanswered(&self) -> Vec<String> {
        let answering: BTreeSet<_> = self
            .queries
            .iter()
            .filter(|(_, known)| matches!(known.used, Used::Answer(_)))
            .map(|(query, _)| &query.via)
            .collect();
        let awaited = self.queries.iter().filter(|(query, known)| {
            !matches!(known.used, Used::Answer(_))
                && (known.state == SourceState::Waiting || !answering.contains(&query.via))
        });
        let mut names: Vec<_> = awaited.map(|(_, known)| known.name.clone()).collect();
        names.sort();
        names.truncate(NAMED);
        names
    }

    /// The causes of the process: it waits for first answers. Missing rules are causes of the capture.
    pub(super) fn of_process(&self) -> Vec<Cause> {
        let meanwhile = match self.table.version {
            0 => Meanwhile::DoesNot,
            _ => Meanwhile::Serves,
        };
        let cause = |awaited: Awaited| match awaited.part {
            // It is not known yet what to ask.
            Part::Discovery if awaited.sources.is_empty() && self.awaits(Part::Listing) => None,
            Part::Listing => Some(Cause::ProviderAwaited { meanwhile }),
            Part::Discovery => {
                Some(Cause::DiscoveryAwaited { sources: InParentheses(awaited.sources), meanwhile })
            }
            Part::Capture => None,
        };
        let mut awaited = self.awaited();
        // The queries follow from the listing.
        awaited.sort_by_key(|awaited| awaited.part != Part::Listing);
        awaited.into_iter().filter_map(cause).collect()
    }

    fn awaits(&self, part: Part) -> bool {
        self.pending.iter().any(|(pending, _)| *pending == part)
    }

    pub(super) fn barriers(&self) -> impl Iterator<Item = Cause> {
        let Standing { barriers, drops, behind, .. } = &self.capture.standing;
        // Routes on the kernel path do not pass a firewall's input.
        let all = if self.needs_rules() { Verdict::Broken } else { Verdict::Degraded };
        let cause = move |Barrier { chain, remedy }: Barrier| match drops {
            Drops::NotCounted => Cause::Barrier { chain, remedy },
            Drops::Some => Cause::DropsSome { chain, remedy },
            Drops::All => Cause::DropsAll { chain, remedy, verdict: all },
        };
        let behind = behind.iter().cloned();
        let behind = behind.map(|Barrier { chain, remedy }| Cause::Behind { chain, remedy });
        barriers.iter().cloned().map(cause).chain(behind)
    }

    /// All findings.
    pub fn overview(&self, host: &HostUse) -> Overview {
        let mut overview = Overview::default();
        let mut causes = self.of_process();
        causes.extend(self.of_capture());
        let sources = self.sources(&mut overview);
        causes.extend(bounded(Subject::Sources, sources));
        // All other bindings have no problem in the table, and there may be many of them.
        let refused: HashSet<_> =
            self.table.unrouted().map(|unrouted| &unrouted.consumer).collect();
        let bindings =
            self.used_bindings(|one| one.sources.is_empty() || refused.contains(&one.id));
        let bindings: Vec<_> =
            bindings.iter().filter(|binding| binding.state().verdict() > Verdict::Ok).collect();
        let beyond = self.listing.beyond.iter().map(|one| one.consumer.bindings.len());
        overview.problems = bindings.len() + beyond.sum::<usize>();
        causes.extend(bounded(Subject::Bindings, self.beyond()));
        causes
            .extend(bounded(Subject::Bindings, bindings.iter().flat_map(|b| b.causes()).collect()));
        causes.extend(self.routes(&mut overview));
        causes.extend(bounded(Subject::Routes, self.without_path()));
        causes.extend(self.endpoints(&mut overview));
        let refused =
            self.table.upstreams().flat_map(|upstream| Cause::refused(&upstream.query, upstream));
        causes.extend(bounded(Subject::Endpoints, refused.collect()));
        causes.extend(self.load());
        causes.extend(host.causes());
        causes.sort_by_key(|cause| std::cmp::Reverse(cause.verdict()));
        Overview { causes, ..overview }
    }

    /// The limits that were reached. A consumer's connections are counted over all its routes.
    fn load(&self) -> Vec<Cause> {
        let mut consumers = BTreeSet::new();
        let routes = self.table.routes().filter(|route| consumers.insert(&route.consumer));
        bounded(Subject::Connections, self.limits(routes.map(|route| &**route)).collect())
    }

    fn of_capture(&self) -> Vec<Cause> {
        if !self.captures() {
            return self.of_own_rules();
        }
        let standing = &self.capture.standing;
        let mut causes = Vec::new();
        match &standing.error {
            Some(error) if !standing.in_place => {
                causes.push(Cause::RulesFail { error: error.as_str().into() });
            }
            // Before the first table there are no rules to write.
            _ if self.table.version == 0 => {}
            _ if !standing.in_place => causes.push(Cause::RulesMissing {}),
            _ => {}
        }
        let has_routes = self.table.routes().len() > 0;
        if has_routes && !self.table.routes().any(|route| self.captures_for(&route.consumer)) {
            causes.push(Cause::NoVip {});
        }
        let lacks = standing.lacks.iter().filter(|(part, _)| *part != rules::RulePart::Count);
        causes.extend(lacks.map(|(part, reason)| {
            let (loss, reason, fix) = (part.loss(), reason.clone(), part.fix());
            match part {
                // With iptables there is no guard, and consumers are served as before. The proxy resets connections that
                // the kernel does not refuse.
                rules::RulePart::Guard | rules::RulePart::Refusal => {
                    Cause::GuardLacks { loss, reason, fix }
                }
                _ => Cause::Lacking { loss, reason, fix },
            }
        }));
        let is_astray = |route: &Arc<Route>| {
            !self.is_by_kernel(route) && self.reach(&route.consumer) == Reach::Elsewhere
        };
        if self.table.routes().any(is_astray) {
            causes.push(self.elsewhere());
        } else if self.table.has_named_vips() {
            let dead: Vec<_> = self.addresses().filter(|address| self.is_dead(*address)).collect();
            causes.extend((!dead.is_empty()).then_some(Cause::DeadVip { addresses: List(dead) }));
        }
        let nobody = self.captures_nobody();
        if !standing.shadowed.is_empty() {
            let shadows = self.table.routes().filter_map(|route| self.shadow(route));
            // Other ports of the consumer may be captured.
            let verdict = if nobody { Verdict::Broken } else { Verdict::Degraded };
            causes.extend(shadows.max_by_key(Cause::verdict).map(|cause| match cause {
                Cause::Shadowed { servers, .. } => Cause::Shadowed { servers, verdict },
                cause => cause,
            }));
        }
        causes.extend(self.barriers());
        // For example this host's own connections without --redirect.
        let is_told = causes.iter().any(|cause| cause.verdict() == Verdict::Broken);
        if nobody && !is_told && standing.in_place {
            causes.extend(self.tcp_routes().find_map(|route| self.not_captured(route)));
        }
        let wiring = self.table.wiring();
        if standing.guards
            && let Some((address, consumer)) = wiring.first_unbound()
        {
            causes.push(Cause::Unguarded {
                addresses: numbered(wiring.unbound.len(), "address", "addresses"),
                address: *address,
                consumer: consumer.clone(),
                fix: match self.is_apart() {
                    Some(true) => {
                        "take NET_RAW and NET_ADMIN from containers that you do not trust: in a container of its own embassy sees no bridge ports, and cannot guard addresses"
                    }
                    Some(false) | None => {
                        "in a container, run embassy with --pid=host and --net=host; take NET_RAW and NET_ADMIN from containers that you do not trust"
                    }
                },
            });
        }
        causes
    }

    /// The causes without `--dnat` and `--redirect`.
    fn of_own_rules(&self) -> Vec<Cause> {
        let consumer = self.tcp_routes().next().map(|route| &route.consumer);
        if self.no_own_rule() {
            let of = consumer.cloned().unwrap_or(ConsumerId::Local);
            return vec![self.passed_by(self.passed_by_ports().into_iter().collect(), &of)];
        }
        let Some(consumer) = consumer else { return Vec::new() };
        let ports = self.passed_by_ports();
        if ports.is_empty() {
            return self.nothing_captured().into_iter().collect();
        }
        let named: Vec<_> = ports.into_iter().take(NAMED).collect();
        vec![match self.captures_nobody() {
            true => self.passed_by(named, consumer),
            false => match self.passed_by(named.clone(), consumer) {
                cause @ Cause::Transparent { .. } => cause,
                _ => Cause::SomePassedBy { ports: List(named), port: self.own_port },
            },
        }]
    }

    /// The ports of routes that none of the user's own rules matches.
    pub fn passed_by_ports(&self) -> BTreeSet<u16> {
        if self.captures() {
            return BTreeSet::new();
        }
        let passes =
            |route: &&Arc<Route>| self.own_rules_pass_by(&route.consumer, route.key.port.get());
        self.tcp_routes().filter(passes).map(|route| route.key.port.get()).collect()
    }

    /// Whether it is unknown if any rule captures, as a cause.
    pub(super) fn nothing_captured(&self) -> Option<Cause> {
        let reason = match &self.capture.own_rules {
            OwnRules::Unreadable(reason) => Because(Some((&**reason).into())),
            OwnRules::Unread | OwnRules::Read { .. } => Because(None),
        };
        let port = self.own_port;
        self.may_capture_nothing().then_some(Cause::NothingCaptured { port, reason })
    }

    fn sources(&self, overview: &mut Overview) -> Vec<Cause> {
        let mut queries: Vec<_> = self.queries.values().collect();
        queries.sort_by_key(|query| &query.name);
        for source in queries.iter().copied().chain([&self.provider]) {
            *overview.sources.entry(source.state).or_default() += 1;
        }
        // Entries that the provider skipped are reported as bindings.
        let provider = SourceReading { skipped: Vec::new(), ..self.provider.clone() };
        let of_queries = queries.into_iter().flat_map(SourceReading::causes);
        provider.causes().into_iter().chain(of_queries).collect()
    }

    fn routes(&self, overview: &mut Overview) -> Vec<Cause> {
        // Each with the number of its routes: a consumer has one route per address.
        let mut named: BTreeMap<RouteState, Vec<(&Route, usize)>> = BTreeMap::new();
        for route in self.table.routes() {
            let state = self.route(route).state;
            *overview.routes.entry(state).or_default() += 1;
            let some = named.entry(state).or_default();
            if state.verdict() == Verdict::Ok {
                continue;
            }
            let is_full = some.len() >= FEW_NAMED;
            let same = some.iter_mut().find(|(other, _)| {
                let of = |route: &Route| (route.key.port, route.key.protocol);
                of(other) == of(route) && other.consumer == route.consumer
            });
            match same {
                Some((_, count)) => *count += 1,
                None if is_full => {}
                None => some.push((route, 1)),
            }
        }
        let name = |(route, count): &(&Route, usize)| {
            let port = port_of(route.key.port, route.key.protocol);
            let query = route.written_query();
            let at = match count {
                1 => String::new(),
                count => format!(" at {count} addresses"),
            };
            format!("{} port {port} ({query}){at}", route.consumer_name)
        };
        let causes = overview.routes.iter().filter(|(state, _)| state.verdict() > Verdict::Ok);
        causes
            .map(|(state, count)| Cause::ManyRoutes {
                state: *state,
                are: numbered(*count, "route is", "routes are"),
                some: {
                    let some = named.remove(state).unwrap_or_default();
                    let rest = *count - some.iter().map(|(_, count)| count).sum::<usize>();
                    some_of(some.iter().map(name).collect(), rest)
                },
            })
            .collect()
    }

    fn endpoints(&self, overview: &mut Overview) -> Option<Cause> {
        let mut some = Vec::new();
        for ((_, _, service), state) in self.table.endpoints() {
            let health = endpoint(state, self.now);
            *overview.endpoints.entry(health).or_default() += 1;
            let failed = health.verdict() > Verdict::Ok && health != EndpointHealth::Drained;
            if failed && some.len() < FEW_NAMED {
                some.push(format!("{} of {service} ({health})", state.endpoint));
            }
        }
        let failed = [EndpointHealth::Ejected, EndpointHealth::Probing, EndpointHealth::Unhealthy];
        let count: usize = failed.iter().filter_map(|health| overview.endpoints.get(health)).sum();
        (count > 0).then(|| Cause::ManyEndpoints {
            are: numbered(count, "endpoint is", "endpoints are"),
            some: {
                let rest = count - some.len();
                some_of(some, rest)
            },
        })
    }
}

/// Maximum number of routes or endpoints named of each kind.
const FEW_NAMED: usize = 5;

/// The named entries, and the number of further ones.
fn some_of(some: Vec<String>, rest: usize) -> String {
    match rest {
        0 => some.join(", "),
        more => format!("{} and {more} more", some.join(", ")),
    }
}

/// The first causes, and the number of further ones.
pub(super) fn bounded(subject: Subject, mut causes: Vec<Cause>) -> Vec<Cause> {
    causes.sort_by_key(|cause| std::cmp::Reverse(cause.verdict()));
    if causes.len() > NAMED {
        let rest = causes.split_off(NAMED);
        let verdict = Verdict::worst(rest.iter().map(Cause::verdict));
        causes.push(Cause::More { subject, verdict, count: rest.len() });
    }
    causes
}
