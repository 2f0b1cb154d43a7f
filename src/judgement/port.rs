//! Explains one port of a consumer.

use std::{cmp::Reverse, collections::BTreeSet, sync::Arc};

use super::{
    binding::BindingFate,
    cause::{Because, Cause, HeldFor, List, Near, NotDeclaredMeans, Seconds, Used},
    overview::{NAMED, bounded},
    route::endpoint,
    situation::Situation,
    source::SourceReading,
    states::{EndpointHealth, Subject, Verdict},
};
use crate::{
    capture::rules::Hook,
    consumer::{Consumer, Reach},
    counts::numbered,
    discovery::missing,
    model::{Protocol, port_of},
    provider::Problem,
    table::{Route, Upstream},
};

impl Situation {
    /// The causes for these consumers' connections to a port, according to its `routes`, the worst first. Without a
    /// problem: where the connections go. `wanted` is the text by which the user asked for the consumers.
    pub fn of_port(
        &self,
        wanted: &str,
        port: u16,
        consumers: &[&Consumer],
        routes: &[&Route],
    ) -> Vec<Cause> {
        let mut causes = self.of_everybody();
        match routes {
            [] => causes.extend(self.without_route(wanted, port, consumers)),
            routes => causes.extend(self.of_routes(consumers, routes)),
        }
        let well = Verdict::worst(causes.iter().map(Cause::verdict)) == Verdict::Ok;
        // The sort is stable, so that a consequence stays before its details.
        causes.sort_by_key(|cause| {
            let goes = matches!(cause, Cause::GoesTo { .. });
            (Reverse(cause.verdict()), if well { !goes } else { goes })
        });
        causes
    }

    /// One route for each service, balancing algorithm and protocol.
    pub fn one_of_each_service<'a>(routes: &[&'a Route]) -> Vec<&'a Route> {
        let mut chosen: Vec<&Route> = Vec::new();
        for route in routes {
            let of = |route: &Route| (route.query.clone(), route.balance, route.key.protocol);
            let same = |other: &&Route| of(other) == of(route);
            if !chosen.iter().any(same) {
                chosen.push(route);
            }
        }
        chosen
    }

    /// The causes that affect all connections.
    fn of_everybody(&self) -> Vec<Cause> {
        let mut causes = Vec::new();
        if self.table.version == 0 {
            causes.extend(self.of_process());
        }
        if self.provider.is_lost() {
            causes.extend(self.provider.causes());
        }
        causes
    }

    fn of_routes(&self, consumers: &[&Consumer], routes: &[&Route]) -> Vec<Cause> {
        let mut causes = Vec::new();
        let (tcp, udp): (Vec<&Route>, Vec<_>) =
            routes.iter().partition(|route| route.key.protocol == Protocol::Tcp);
        // Several routes may have the same cause.
        for of_protocol in [&tcp, &udp] {
            let all = of_protocol.iter().filter_map(|route| self.not_captured(route));
            causes.extend(all.max_by_key(Cause::verdict));
        }
        if !tcp.is_empty() {
            causes.extend(self.of_captured(consumers, &tcp));
        }
        for route in Self::one_of_each_service(routes) {
            causes.extend(self.of_service(route));
        }
        causes.extend(self.overruled(consumers, routes));
        causes
    }

    /// The causes for what rules capture.
    fn of_captured(&self, consumers: &[&Consumer], routes: &[&Route]) -> Vec<Cause> {
        let mut causes = Vec::new();
        let mut told = Vec::new();
        let of_each = routes.iter().filter(|route| {
            let first = !told.contains(&&route.consumer);
            told.push(&route.consumer);
            first
        });
        causes.extend(self.limits(of_each.copied()));
        causes.extend(routes.iter().find_map(|route| self.shadow(route)));
        causes.extend(self.nothing_captured());
        causes.extend(routes.iter().find_map(|route| self.own_rule(route)));
        let by_rules: Vec<_> = routes.iter().filter(|route| !self.is_by_kernel(route)).collect();
        let is_one = |one: &Consumer| by_rules.iter().any(|route| route.consumer == one.id);
        for consumer in
            consumers.iter().filter(|one| is_one(one) && self.reach(&one.id) == Reach::Unknown)
        {
            let vips = List(self.addresses().collect());
            let fix = match self.is_apart() {
                Some(true) => {
                    "let it connect to embassy's container instead: by --link, or by its name on a network that both are on"
                }
                Some(false) | None => {
                    "connect it to a bridge network too: docker network connect bridge <container>"
                }
            };
            causes.push(Cause::CutOff { consumer: consumer.name.clone(), vips, fix });
        }
        if !by_rules.is_empty() {
            causes.extend(self.barriers());
        }
        causes
    }

    /// The declarations of these consumers that lost the port of these routes to other bindings.
    fn overruled(&self, consumers: &[&Consumer], routes: &[&Route]) -> Vec<Cause> {
        let Some(port) = routes.first().map(|route| route.key.port) else { return Vec::new() };
        let is_one = |name: &Arc<str>| consumers.iter().any(|consumer| consumer.name == *name);
        let problems = self.listing.problems.iter();
        let lost =
            problems.filter(|problem| problem.port == Some(port) && is_one(&problem.consumer));
        let cause = |problem: &Problem| Cause::Overruled {
            binding: format!("{} {}", problem.consumer, problem.origin),
            reason: problem.reason.as_str().into(),
        };
        lost.map(cause).collect()
    }

    /// The user's own rule that matches the connections of a route.
    fn own_rule(&self, route: &Route) -> Option<Cause> {
        let rules = Some(&self.capture.own_rules).filter(|_| !self.captures())?;
        let lead = rules.lead_of(route.key.port.get(), Hook::of(&route.consumer))?;
        Some(Cause::OwnRule { rule: lead.rule.clone() })
    }

    /// The causes of a route's service.
    fn of_service(&self, route: &Route) -> Vec<Cause> {
        let Some(upstream) = self.table.upstream(&route.query) else { return Vec::new() };
        let health = self.route(route);
        let service = route.written_query().to_string();
        let next = self.next_pick(route);
        let mut causes = Vec::new();
        // What is wrong with endpoints of the other family alone is said as the reason of the path.
        let lacks_family = health.foreign > 0 && health.drained + health.circular == 0;
        if health.active + health.probing + health.ejected == 0 && !lacks_family {
            causes.push(match () {
                () if !upstream.answered => {
                    let reading = self.queries.get(&upstream.query);
                    let error = Because(reading.and_then(|reading| reading.error.clone()));
                    let fix = reading.map(|reading| reading.fix.clone());
                    let fix = fix.filter(|fix| !fix.is_empty()).unwrap_or_else(|| {
                        "wait up to 10 s: then it has answered, or its error is known and shown here"
                            .to_owned()
                    });
                    Cause::NotAnswered { service, error, meanwhile: HeldFor(self.hold), fix }
                }
                () if health.circular > 0 => Cause::AllCircular { service },
                () if !upstream.refused.is_empty() && upstream.rotation.endpoints().is_empty() => {
                    Cause::AllRefused { service }
                }
                () if health.drained > 0 => Cause::AllDrained { service },
                () => {
                    let reading = self.queries.get(&upstream.query);
                    let why = Because(reading.and_then(|reading| reading.problem.clone()));
                    Cause::NoEndpoint { service, why }
                }
            });
        } else if let Some(endpoint) = next {
            let consumer = route.consumer_name.clone();
            let port = port_of(route.key.port, route.key.protocol);
            causes.extend(match health.hopeful() {
                0 => Some(Cause::AllEjected { service, next: endpoint }),
                // A connection that is refused or not captured reaches no endpoint.
                _ if health.state.verdict() == Verdict::Broken => None,
                _ => Some(Cause::GoesTo { consumer, port, service, endpoint }),
            });
        }
        if let Some(reading) = self.queries.get(&upstream.query) {
            let named =
                SourceReading { name: route.written_query().to_string(), ..reading.clone() };
            causes.extend(named.causes());
        }
        causes.extend(bounded(Subject::Endpoints, self.of_endpoints(route, upstream)));
        causes.extend(Cause::refused(&route.written_query(), upstream).take(NAMED));
        causes
    }

    fn of_endpoints(&self, route: &Route, upstream: &Arc<Upstream>) -> Vec<Cause> {
        let of_one = |state: &Arc<crate::balance::EndpointState>| {
            let one = state.endpoint;
            let error = || Because(state.counts.last_error.get().map(|(_, text)| (&*text).into()));
            Some(match endpoint(state, self.now) {
                EndpointHealth::Drained => Cause::Drained { endpoint: one },
                _ if self.is_circular(route, &one) => Cause::Circular { endpoint: one },
                EndpointHealth::Active => return None,
                EndpointHealth::Ejected if state.is_aside(self.now) => {
                    Cause::CannotReach { endpoint: one, error: error() }
                }
                EndpointHealth::Ejected => Cause::Ejected {
                    endpoint: one,
                    left: Seconds(state.ejected_for(self.now).unwrap_or_default()),
                    failures: numbered(state.failures(), "failure", "failures"),
                    ejections: numbered(state.ejections(), "time", "times"),
                    error: error(),
                },
                EndpointHealth::Probing => Cause::Probing { endpoint: one, error: error() },
                EndpointHealth::Unhealthy => Cause::Unhealthy { endpoint: one },
            })
        };
        upstream.rotation.endpoints().iter().filter_map(of_one).collect()
    }

    /// The consumers with similar names.
    fn near(&self, wanted: &str) -> Vec<Arc<str>> {
        let alive = self.listing.consumers.iter().filter(|one| !one.has_ended());
        let names: BTreeSet<_> = alive
            .map(|one| &*one.name)
            .chain(self.listing.invalid.iter().map(|one| &*one.name))
            .collect();
        missing::near(wanted, names.into_iter()).into_iter().map(Arc::from).collect()
    }

    /// Why a port has no route.
    fn without_route(&self, wanted: &str, port: u16, consumers: &[&Consumer]) -> Vec<Cause> {
        if consumers.is_empty() {
            let is_known =
                wanted.parse().is_ok_and(|address| self.listing.known.contains(&address));
            let invalid = self.listing.invalid.iter().filter(|one| one.is_called(wanted));
            let names: Vec<_> = invalid.map(|one| &*one.name).chain([wanted]).collect();
            let skipped =
                self.listing.problems.iter().filter(|problem| names.contains(&&*problem.consumer));
            let mut causes: Vec<_> = skipped
                .flat_map(|p| BindingFate::Invalid(p).causes().collect::<Vec<_>>())
                .collect();
            // Skipped descriptors, if there are any, are the cause. Without a listing nothing is known about consumers.
            if causes.is_empty() && self.provider.used != Used::Nothing {
                causes.push(match is_known {
                    true => Cause::DeclaresNothing { address: wanted.to_owned() },
                    false => {
                        let near = Near(self.near(wanted));
                        Cause::NoConsumer { wanted: wanted.to_owned(), near }
                    }
                });
            }
            return causes;
        }
        let is_one = |consumer: &Consumer| consumers.iter().any(|one| one.id == consumer.id);
        let bindings = self.bindings(is_one);
        let named = |name: &Arc<str>| consumers.iter().any(|consumer| consumer.name == *name);
        let of_port = bindings.iter().filter(|binding| {
            named(binding.consumer()) && binding.port().is_none_or(|of| of == port)
        });
        // An invalid descriptor may be the one that was meant to declare the port. If there are several, this is unclear,
        // so they are only details.
        let mut causes: Vec<_> =
            of_port.flat_map(|binding| binding.causes().collect::<Vec<_>>()).collect();
        let place = if causes.len() > 1 { 0 } else { causes.len() };
        if !bindings.iter().any(|one| named(one.consumer()) && one.port() == Some(port)) {
            let ports = |consumer: &&Consumer| {
                consumer.bindings.iter().map(|b| b.descriptor.port.get()).collect::<Vec<_>>()
            };
            let mut declared: Vec<_> = consumers.iter().flat_map(ports).collect();
            declared.sort_unstable();
            declared.dedup();
            causes.insert(
                place,
                Cause::NotDeclared {
                    consumers: List(
                        consumers.iter().map(|consumer| consumer.name.clone()).collect(),
                    ),
                    port,
                    declared: List(declared),
                    follows: NotDeclaredMeans(
                        consumers.first().and_then(|first| self.captured(&first.id, port, false)),
                    ),
                },
            );
        }
        causes
    }
}
