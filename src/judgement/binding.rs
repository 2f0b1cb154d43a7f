//! Bindings and their states.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use super::{
    cause::Cause,
    situation::Situation,
    states::{BindingState, Reason},
};
use crate::{
    consumer::{Binding, Consumer},
    model::{ConsumerId, Port, Protocol},
    provider::{Beyond, Limit, NETWORK, Problem},
    table::{Route, RouteKey, Unrouted},
};

/// Why a binding lacks some or all of its routes: at least one reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reasons(Vec<Reason>);

impl Reasons {
    /// `None` if there are no reasons.
    fn of(reasons: Vec<Reason>) -> Option<Self> {
        (!reasons.is_empty()).then_some(Self(reasons))
    }

    pub fn iter(&self) -> impl Iterator<Item = &Reason> {
        self.0.iter()
    }
}

/// The outcome of a binding.
#[derive(Debug, Clone)]
pub enum BindingFate<'a> {
    Declared {
        consumer: &'a Consumer,
        binding: &'a Binding,
        /// Sorted by address.
        routes: Vec<&'a Route>,
        /// Why it lacks some or all of its routes.
        refused: Option<Reasons>,
    },
    Invalid(&'a Problem),
}

impl<'a> BindingFate<'a> {
    pub fn state(&self) -> BindingState {
        match self {
            Self::Declared { refused: None, .. } => BindingState::Routed,
            Self::Declared { routes, .. } if !routes.is_empty() => BindingState::Partly,
            Self::Declared { .. } => BindingState::Unrouted,
            Self::Invalid(problem) if problem.overruled => BindingState::Overruled,
            Self::Invalid(_) => BindingState::Invalid,
        }
    }

    pub fn reasons(&self) -> Vec<Reason> {
        match self {
            Self::Declared { refused, .. } => {
                refused.iter().flat_map(Reasons::iter).cloned().collect()
            }
            Self::Invalid(problem) => vec![problem.reason.as_str().into()],
        }
    }

    pub fn consumer(&self) -> &'a Arc<str> {
        match self {
            Self::Declared { consumer, .. } => &consumer.name,
            Self::Invalid(problem) => &problem.consumer,
        }
    }

    pub fn origin(&self) -> &'a Arc<str> {
        match self {
            Self::Declared { binding, .. } => &binding.origin,
            Self::Invalid(problem) => &problem.origin,
        }
    }

    /// `None`: the descriptor does not parse.
    pub fn protocol(&self) -> Option<Protocol> {
        match self {
            Self::Declared { binding, .. } => Some(binding.descriptor.protocol),
            Self::Invalid(_) => None,
        }
    }

    pub fn port(&self) -> Option<u16> {
        match self {
            Self::Declared { binding, .. } => Some(binding.descriptor.port.get()),
            Self::Invalid(problem) => problem.port.map(Port::get),
        }
    }

    /// One cause for each reason why it lacks routes.
    pub fn causes(&self) -> impl Iterator<Item = Cause> + use<'_, 'a> {
        let state = self.state();
        let binding = format!("{} {}", self.consumer(), self.origin()).trim_end().to_owned();
        self.reasons().into_iter().map(move |reason| {
            let binding = binding.clone();
            let fix = reason.fix().unwrap_or("run embassy doctor where embassy runs");
            match state {
                BindingState::Invalid if **self.origin() == *NETWORK => {
                    Cause::Unidentified { consumer: self.consumer().clone(), reason }
                }
                BindingState::Invalid => Cause::Invalid { binding, reason },
                BindingState::Overruled => Cause::Overruled { binding, reason },
                BindingState::Partly => Cause::Partly { binding, reason, fix },
                BindingState::Routed | BindingState::Unrouted => {
                    Cause::Unrouted { binding, reason, fix }
                }
            }
        })
    }
}

impl Situation {
    /// The bindings of the consumers that `wanted` selects, including those beyond a limit, and the descriptors that do not
    /// parse. Sorted by consumer and origin.
    pub fn bindings(&self, wanted: impl Fn(&Consumer) -> bool) -> Vec<BindingFate<'_>> {
        let mut all = self.used_bindings(&wanted);
        for Beyond { limit, most, consumer } in &self.listing.beyond {
            if consumer.has_ended() || !wanted(consumer) {
                continue;
            }
            let reason: Reason = format!("it is beyond {} ({most})", limit.flag()).as_str().into();
            let reason = reason.fixed_by(match limit {
                Limit::Bindings => "remove bindings, or raise --max-bindings-per-consumer",
                Limit::Services => "remove bindings, or raise --max-services",
            });
            all.extend(consumer.bindings.iter().map(|binding| BindingFate::Declared {
                consumer,
                binding,
                routes: Vec::new(),
                refused: Some(Reasons(vec![reason.clone()])),
            }));
        }
        sort(&mut all);
        all
    }

    /// The bindings that are not used because of a limit: one cause for each consumer, or one for a limit that all
    /// consumers share.
    pub(super) fn beyond(&self) -> Vec<Cause> {
        let of = |limit| {
            let all = self.listing.beyond.iter();
            all.filter(move |one| one.limit == limit && !one.consumer.has_ended())
        };
        let mut causes: Vec<_> = of(Limit::Bindings)
            .map(|Beyond { most, consumer, .. }| Cause::TooManyBindings {
                consumer: consumer.name.clone(),
                bindings: consumer.bindings.len(),
                most: *most,
            })
            .collect();
        let bindings = of(Limit::Services).map(|one| one.consumer.bindings.len()).sum();
        let most = of(Limit::Services).map(|one| one.most).next();
        causes.extend(most.map(|most| Cause::TooManyServices { bindings, most }));
        causes
    }

    /// Like `bindings`, without those beyond a limit.
    pub(super) fn used_bindings(&self, wanted: impl Fn(&Consumer) -> bool) -> Vec<BindingFate<'_>> {
        let mut refused: HashMap<(&ConsumerId, &str, Port, Protocol), Vec<Reason>> = HashMap::new();
        for unrouted in self.table.unrouted() {
            let Unrouted { consumer, origin, port, protocol, .. } = unrouted;
            let reasons = refused.entry((consumer, origin, *port, *protocol)).or_default();
            let reason: Reason = unrouted.reason.to_string().as_str().into();
            reasons.push(reason.fixed_by(unrouted.reason.fix()));
        }
        let alive = self.listing.consumers.iter().filter(|consumer| !consumer.has_ended());
        let mut all = Vec::new();
        for consumer in alive.filter(|consumer| wanted(consumer)) {
            for binding in &consumer.bindings {
                let origin = &*binding.origin;
                let routes = self.routes_of(consumer, binding);
                let (port, protocol) = (binding.descriptor.port, binding.descriptor.protocol);
                let key = (&consumer.id, origin, port, protocol);
                let refused = refused.get(&key).cloned().unwrap_or_default();
                let refused = Reasons::of(refused).or_else(|| {
                    routes.is_empty().then(|| Reasons(vec![no_route(&consumer.sources)]))
                });
                all.push(BindingFate::Declared { consumer, binding, routes, refused });
            }
        }
        all.extend(self.listing.problems.iter().map(BindingFate::Invalid));
        sort(&mut all);
        all
    }
}

fn sort(all: &mut [BindingFate<'_>]) {
    all.sort_by(|a, b| {
        let key = |one: &BindingFate<'_>| (one.port(), one.protocol());
        (a.consumer(), a.origin(), key(a)).cmp(&(b.consumer(), b.origin(), key(b)))
    });
}

impl Situation {
    /// The routes of a binding, sorted by address.
    fn routes_of(&self, consumer: &Consumer, binding: &Binding) -> Vec<&Route> {
        let (port, protocol) = (binding.descriptor.port, binding.descriptor.protocol);
        // A connection from the host to a VIP may have the VIP as its source address.
        let vips = self.table.vips().iter().map(|vip| vip.0);
        let vips = vips.filter(|_| consumer.id == ConsumerId::Local);
        let addresses: BTreeSet<_> = consumer.sources.iter().copied().chain(vips).collect();
        let route = |source| self.table.route(&RouteKey { source, port, protocol });
        let routes = addresses.into_iter().filter_map(route).map(Arc::as_ref);
        let is_its = |route: &&Route| {
            route.consumer == consumer.id && route.binding.origin == binding.origin
        };
        routes.filter(is_its).collect()
    }
}

/// Why a binding without a stated reason has no route.
fn no_route(addresses: &[IpAddr]) -> Reason {
    match addresses {
        [] => Reason::from("the container has no address, as with --network none").fixed_by(
            "connect the container to a bridge network: docker network connect bridge <container>",
        ),
        _ => Reason::from("it is not in the table yet").fixed_by("ask again in a second"),
    }
}
