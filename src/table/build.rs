//! Builds the next table. The cost depends on the changes: unchanged consumers and answers are skipped, with everything
//! derived from them.

use std::{
    borrow::Cow,
    collections::{BTreeSet, HashSet},
    net::IpAddr,
    sync::Arc,
};

use super::{
    BuiltFrom, Changes, EndpointInUse, Inputs, Route, RouteKey, RouteNumber, ServiceKey, Table,
    Unrouted, UnroutedKey, UnroutedReason, Upstream, UpstreamInUse,
};
use crate::{
    balance::{EndpointState, Rotation},
    consumer::{Binding, Consumer},
    discovery::{CannotAsk, Endpoints, NotAllowed, Query},
    identity::gone_and_new,
    model::{ConsumerId, Endpoint, Protocol, Vip},
};

/// The table after `prev`. `None` if nothing differs.
pub(super) fn next(
    prev: &Table,
    inputs: &Inputs<'_>,
    query: impl Fn(&Binding) -> Result<Query, CannotAsk>,
) -> Option<Table> {
    let mut next = Table {
        version: prev.version + 1,
        confirmed: inputs.confirmed,
        routes: prev.routes.clone(),
        known: prev.known.clone(),
        networks: inputs.networks.clone(),
        wiring: inputs.wiring.clone(),
        vips: prev.vips.clone(),
        unrouted: prev.unrouted.clone(),
        upstreams: prev.upstreams.clone(),
        states: prev.states.clone(),
        live: prev.live.clone(),
        changes: Changes::default(),
        takes_over: prev.takes_over,
        numbers: prev.numbers,
        built_from: prev.built_from.clone(),
    };
    let people = People::changed(&prev.built_from, inputs);
    next.take_in(inputs, &people);
    let mut builder = Builder {
        prev,
        inputs,
        query,
        next,
        touched: BTreeSet::new(),
        answered: Vec::new(),
        left: Vec::new(),
        without: Vec::new(),
    };
    builder.answers();
    builder.consumers(&people);
    builder.let_go();
    builder.finish()
}

/// Added and removed consumers.
struct People {
    gone: Vec<Arc<Consumer>>,
    new: Vec<Arc<Consumer>>,
}

impl People {
    fn changed(before: &BuiltFrom, inputs: &Inputs<'_>) -> Self {
        let now = inputs.consumers;
        if before.gateways_are_vips != inputs.gateways_are_vips || before.balance != inputs.balance
        {
            let new = now.iter().map(|&consumer| consumer.clone()).collect();
            return Self { gone: before.consumers.to_vec(), new };
        }
        let (mut gone, mut new) = gone_and_new(&before.consumers, now);
        if before.vips != inputs.vips {
            // The VIPs are source addresses of the local consumer, so it has changed.
            let local = now.iter().filter(|consumer| consumer.id == ConsumerId::Local);
            let staying = local.filter(|local| !new.iter().any(|new| Arc::ptr_eq(new, local)));
            let staying: Vec<_> = staying.map(|&local| local.clone()).collect();
            gone.extend(staying.iter().cloned());
            new.extend(staying);
        }
        Self { gone, new }
    }
}

impl Table {
    /// Takes over the known containers and their addresses.
    fn take_in(&mut self, inputs: &Inputs<'_>, people: &People) {
        let from = &mut self.built_from;
        let others = !people.gone.is_empty() || !people.new.is_empty();
        if others || from.vips != inputs.vips {
            self.vips = inputs.vips.iter().copied().collect();
            if inputs.gateways_are_vips {
                let gateways = inputs.consumers.iter().flat_map(|consumer| &consumer.gateways);
                self.vips.extend(gateways.copied().map(Vip));
            }
        }
        if others
            || from.vips != inputs.vips
            || from.known != *inputs.known
            || from.contested != *inputs.contested
        {
            let sources = inputs.consumers.iter().flat_map(|one| sources(one, inputs.vips));
            // The owner of a contested address will become known. A connection from it may wait for that.
            let is_unknown = |source: &IpAddr| {
                !inputs.known.contains(source) && !inputs.contested.contains(source)
            };
            let unknown: Vec<_> = sources.filter(is_unknown).collect();
            let known = if unknown.is_empty() {
                inputs.known.clone()
            } else {
                Arc::new(inputs.known.iter().copied().chain(unknown).collect())
            };
            if self.known != known {
                self.known = known;
            }
        }
    }
}

struct Builder<'a, Q> {
    prev: &'a Table,
    inputs: &'a Inputs<'a>,
    query: Q,
    next: Table,
    /// Keys whose routes may have changed.
    touched: BTreeSet<RouteKey>,
    /// Queries whose upstreams are new or changed. No query is in it twice.
    answered: Vec<Arc<Query>>,
    /// Upstreams that lost one route, and endpoints that these services no longer have. They are removed last, because
    /// another route or upstream may use them again meanwhile.
    left: Vec<Arc<Query>>,
    without: Vec<(ServiceKey, Endpoint)>,
}

impl<Q: Fn(&Binding) -> Result<Query, CannotAsk>> Builder<'_, Q> {
    /// Updates the upstreams whose endpoints changed.
    fn answers(&mut self) {
        let (now, before) = (self.inputs.endpoints, &self.prev.built_from.endpoints);
        // Changed VIPs may exclude other endpoints.
        let in_use: Vec<_> = if self.next.vips == self.prev.vips {
            let differing = now.differing_keys(before, Arc::ptr_eq).into_iter();
            differing.filter_map(|query| self.next.upstreams.get(query)).cloned().collect()
        } else {
            self.next.upstreams.values().cloned().collect()
        };
        for UpstreamInUse { upstream: before, routes } in in_use {
            let query = before.query.clone();
            let upstream = self.upstream(&query, Some(&before));
            if !Arc::ptr_eq(&upstream, &before) {
                self.next.upstreams.insert(query.clone(), UpstreamInUse { upstream, routes });
                self.answered.push(query);
            }
        }
        self.next.built_from.endpoints = self.inputs.endpoints.clone();
    }

    fn consumers(&mut self, people: &People) {
        let Self { prev, inputs, .. } = *self;
        let mut affected = BTreeSet::new();
        for gone in &people.gone {
            for source in sources(gone, &prev.built_from.vips) {
                self.change_claims(source, |claims| claims.retain(|one| !Arc::ptr_eq(one, gone)));
                affected.insert(source);
            }
            self.forget_unrouted(&gone.id, |_| true);
        }
        for new in &people.new {
            for source in sources(new, inputs.vips) {
                self.change_claims(source, |claims| claims.push(new.clone()));
                affected.insert(source);
            }
            for binding in &new.bindings {
                if let Err(error) = (self.query)(binding) {
                    self.unrouted(new, binding, None, error.into());
                }
            }
        }
        let contested = prev.built_from.contested.symmetric_difference(inputs.contested);
        affected.extend(contested);
        for source in affected {
            self.address(source);
        }
        let staying: HashSet<_> = people.new.iter().map(|consumer| &consumer.id).collect();
        for gone in people.gone.iter().filter(|gone| !staying.contains(&gone.id)) {
            self.next.live.remove(&gone.id);
        }
        let from = &mut self.next.built_from;
        if !people.gone.is_empty() || !people.new.is_empty() {
            from.consumers = inputs.consumers.iter().map(|&consumer| consumer.clone()).collect();
        }
        if from.contested != *inputs.contested {
            from.contested.clone_from(inputs.contested);
        }
        from.known = inputs.known.clone();
        from.vips = inputs.vips.to_vec();
        (from.gateways_are_vips, from.balance) = (inputs.gateways_are_vips, inputs.balance);
    }

    fn change_claims(&mut self, source: IpAddr, change: impl FnOnce(&mut Vec<Arc<Consumer>>)) {
        let claims = &mut self.next.built_from.claims;
        let mut claimants = claims.get(&source).cloned().unwrap_or_default();
        change(&mut claimants);
        if claimants.is_empty() {
            claims.remove(&source);
        } else {
            // The order decides who wins a port within a network namespace. It must be the same for the same containers.
            claimants.sort_by(|a, b| (&a.name, &a.id).cmp(&(&b.name, &b.id)));
            claims.insert(source, claimants);
        }
    }

    /// Updates the routes of an address, from the consumers that claim it.
    fn address(&mut self, source: IpAddr) {
        let claims = |table: &Table| table.built_from.claims.get(&source).cloned();
        let before = claims(self.prev).unwrap_or_default();
        let now = claims(&self.next).unwrap_or_default();
        // An address has one owner at a time. If several network namespaces claim it, all but one have lost it, and it is
        // not known yet which.
        let namespaces: BTreeSet<_> = now.iter().map(|consumer| &consumer.namespace).collect();
        let contested = namespaces.len() > 1 || self.inputs.contested.contains(&source);
        let mut left: BTreeSet<_> =
            before.iter().flat_map(|one| one.bindings.iter().map(|b| key(source, b))).collect();
        for consumer in &now {
            self.forget_unrouted(&consumer.id, |key| key.is_some_and(|key| key.source == source));
        }
        let mut taken: HashSet<RouteKey> = HashSet::new();
        for (consumer, binding) in
            now.iter().flat_map(|consumer| consumer.bindings.iter().map(move |b| (consumer, b)))
        {
            let Ok(query) = (self.query)(binding) else { continue };
            let key = key(source, binding);
            if contested {
                let reason = UnroutedReason::Contested { key };
                self.unrouted(consumer, binding, Some(key), reason);
            } else if taken.insert(key) {
                left.remove(&key);
                self.route(key, consumer, binding, query);
            } else if let Some(winner) = self.next.routes.get(&key) {
                // Another consumer has the same address, because both share a network namespace.
                let winner = winner.consumer_name.clone();
                let reason = UnroutedReason::Taken { key, winner };
                self.unrouted(consumer, binding, Some(key), reason);
            }
        }
        for key in left {
            if let Some(route) = self.next.routes.remove(&key) {
                self.left.push(route.query.clone());
                self.touched.insert(key);
            }
        }
    }

    /// Sets a route. An unchanged route is kept.
    fn route(&mut self, key: RouteKey, consumer: &Arc<Consumer>, binding: &Binding, query: Query) {
        let before = self.next.routes.get(&key).cloned();
        let query = match &before {
            Some(before) if *before.query == query => before.query.clone(),
            before => {
                self.left.extend(before.as_ref().map(|before| before.query.clone()));
                self.lead(query)
            }
        };
        let before =
            before.filter(|before| before.consumer == consumer.id && before.binding == *binding);
        let balance = binding.descriptor.balance.unwrap_or(self.inputs.balance);
        let arrival = consumer.arrival(&key.source);
        let same = |before: &Arc<Route>| {
            before.consumer_name == consumer.name
                && before.balance == balance
                && before.arrival == arrival
        };
        if before.as_ref().is_some_and(same) {
            return;
        }
        let number = before.as_ref().map(|before| before.number).unwrap_or_else(|| {
            self.next.numbers += 1;
            RouteNumber(self.next.numbers)
        });
        let live_of_consumer = match self.next.live.get(&consumer.id) {
            Some(live) => live.clone(),
            None => {
                let live = Arc::default();
                self.next.live.insert(consumer.id.clone(), Arc::clone(&live));
                live
            }
        };
        let route = Route {
            key,
            arrival,
            number,
            consumer: consumer.id.clone(),
            consumer_name: consumer.name.clone(),
            binding: binding.clone(),
            balance,
            query,
            counts: before.as_ref().map(|before| before.counts.clone()).unwrap_or_default(),
            live_of_consumer,
            born: match &before {
                Some(before) => before.born,
                None => {
                    let is_first = self.prev.version == 0 && !self.prev.takes_over;
                    (!is_first).then_some(self.inputs.now)
                }
            },
            ends: consumer.ends.clone(),
        };
        self.next.routes.insert(key, Arc::new(route));
        self.touched.insert(key);
    }

    /// Adds a route to the upstream of a query. Returns the query that the upstream has.
    fn lead(&mut self, query: Query) -> Arc<Query> {
        if let Some(in_use) = self.next.upstreams.get_mut(&query) {
            in_use.routes += 1;
            return in_use.upstream.query.clone();
        }
        let query = Arc::new(query);
        let in_use = UpstreamInUse { upstream: self.upstream(&query, None), routes: 1 };
        self.next.upstreams.insert(query.clone(), in_use);
        self.answered.push(query.clone());
        query
    }

    /// The upstream of a query. It is kept if its endpoints did not change.
    fn upstream(&mut self, query: &Arc<Query>, before: Option<&Arc<Upstream>>) -> Arc<Upstream> {
        let answer = self.inputs.endpoints.get(query).cloned();
        let endpoints = answer.as_deref().map_or(&[][..], |answer: &Endpoints| &answer.list);
        let (endpoints, refused) = self.sorted_out(query, endpoints);
        let answered = answer.is_some();
        if let Some(before) = before
            && before.answered == answered
            && before.refused == refused
            && same_endpoints(&before.rotation, &endpoints)
        {
            return before.clone();
        }
        let states: Vec<_> = endpoints.iter().map(|&one| self.state(query, one)).collect();
        let rotation = match before {
            Some(before) => {
                let service = service_of(query);
                let had = before.rotation.endpoints().iter();
                self.without.extend(had.map(|state| (service.clone(), state.endpoint)));
                before.rotation.succeed(states)
            }
            None => Rotation::new(states),
        };
        Arc::new(Upstream { query: query.clone(), rotation, answered, refused })
    }

    /// The endpoints to use, and those that must not be used.
    fn sorted_out<'e>(
        &self,
        query: &Query,
        endpoints: &'e [Endpoint],
    ) -> (Cow<'e, [Endpoint]>, Vec<(Endpoint, NotAllowed)>) {
        let refusal = |one| self.inputs.bounds.refusal(&query.via, one, &self.next.vips);
        if endpoints.iter().all(|&one| refusal(one).is_none()) {
            return (endpoints.into(), Vec::new());
        }
        let (mut used, mut refused) = (Vec::new(), Vec::new());
        for &one in endpoints {
            match refusal(one) {
                None => used.push(one),
                Some(reason) => refused.push((one, reason)),
            }
        }
        (used.into(), refused)
    }

    /// The state of an endpoint, for one more upstream.
    fn state(&mut self, query: &Query, endpoint: Endpoint) -> Arc<EndpointState> {
        let key = (service_of(query), endpoint);
        if let Some(shared) = self.next.states.get_mut(&key) {
            shared.upstreams += 1;
            return shared.state.clone();
        }
        let state = Arc::new(EndpointState::new(endpoint));
        self.next.states.insert(key, EndpointInUse { state: state.clone(), upstreams: 1 });
        state
    }

    fn unrouted(
        &mut self,
        consumer: &Consumer,
        binding: &Binding,
        key: Option<RouteKey>,
        reason: UnroutedReason,
    ) {
        let unrouted = Unrouted {
            consumer: consumer.id.clone(),
            consumer_name: consumer.name.clone(),
            origin: binding.origin.clone(),
            port: binding.descriptor.port,
            protocol: binding.descriptor.protocol,
            reason,
        };
        let port = (binding.descriptor.port.get(), binding.descriptor.protocol);
        let key = (consumer.id.clone(), binding.origin.clone(), port, key);
        Arc::make_mut(&mut self.next.unrouted).insert(key, unrouted);
    }

    /// Removes the recorded reasons of a consumer's bindings, for the routes that `meant` selects.
    fn forget_unrouted(&mut self, consumer: &ConsumerId, meant: impl Fn(Option<RouteKey>) -> bool) {
        let first: UnroutedKey = (consumer.clone(), "".into(), (0, Protocol::Tcp), None);
        let of_consumer = self.next.unrouted.range(first..);
        let of_consumer = of_consumer.take_while(|((id, ..), _)| id == consumer);
        let said: Vec<_> =
            of_consumer.map(|(key, _)| key).filter(|(.., key)| meant(*key)).cloned().collect();
        if !said.is_empty() {
            let unrouted = Arc::make_mut(&mut self.next.unrouted);
            said.iter().for_each(|key| drop(unrouted.remove(key)));
        }
    }

    /// Removes upstreams without a route and endpoints without an upstream.
    fn let_go(&mut self) {
        for query in std::mem::take(&mut self.left) {
            let Some(in_use) = self.next.upstreams.get_mut(&query) else { continue };
            in_use.routes -= 1;
            if in_use.routes == 0
                && let Some(UpstreamInUse { upstream, .. }) = self.next.upstreams.remove(&query)
            {
                let service = service_of(&query);
                let had = upstream.rotation.endpoints().iter();
                self.without.extend(had.map(|state| (service.clone(), state.endpoint)));
            }
        }
        for key in std::mem::take(&mut self.without) {
            let Some(shared) = self.next.states.get_mut(&key) else { continue };
            shared.upstreams -= 1;
            if shared.upstreams == 0 {
                self.next.states.remove(&key);
            }
        }
    }

    fn finish(mut self) -> Option<Table> {
        let mut changes = Changes::default();
        for key in &self.touched {
            changes.of_route(self.prev.routes.get(key), self.next.routes.get(key));
        }
        for query in &self.answered {
            changes.of_upstream(self.prev, &self.next, query);
        }
        changes.of_places(self.prev, &self.next);
        let is_first = self.prev.version == 0;
        let is_confirmed_anew = self.prev.confirmed != self.next.confirmed;
        if !is_first
            && !is_confirmed_anew
            && changes.is_empty()
            && self.prev.unrouted == self.next.unrouted
        {
            return None;
        }
        self.next.changes = changes;
        Some(self.next)
    }
}

fn key(source: IpAddr, binding: &Binding) -> RouteKey {
    let descriptor = &binding.descriptor;
    RouteKey { source, port: descriptor.port, protocol: descriptor.protocol }
}

pub(super) fn service_of(query: &Query) -> ServiceKey {
    (query.via.clone(), query.dc.clone(), query.service.clone())
}

/// The source addresses of a consumer. A connection from a host to one of its own addresses has this address as its source,
/// so the VIPs count for the local consumer as well.
fn sources<'a>(consumer: &'a Consumer, vips: &'a [Vip]) -> impl Iterator<Item = IpAddr> + 'a {
    let own = if consumer.id == ConsumerId::Local { vips } else { &[] };
    let known = |vip: &&Vip| !consumer.sources.contains(&vip.0);
    consumer.sources.iter().copied().chain(own.iter().filter(known).map(|vip| vip.0))
}

/// Whether a rotation has exactly these endpoints. The list of an answer is sorted and has no duplicates.
fn same_endpoints(rotation: &Rotation, endpoints: &[Endpoint]) -> bool {
    let before = rotation.endpoints();
    before.len() == endpoints.len()
        && before.iter().all(|state| endpoints.binary_search(&state.endpoint).is_ok())
}
