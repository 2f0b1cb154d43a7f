//! Tests that a table built step by step equals the table built at once, and that its changes are the differences.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::model::ContainerId;

/// The inputs of a table, as numbers.
#[derive(Debug, Clone, Default)]
struct World {
    consumers: Vec<Asker>,
    /// The answered endpoints of each service.
    answers: BTreeMap<u8, BTreeSet<u8>>,
    contested: BTreeSet<u8>,
    vips: BTreeSet<u8>,
}

#[derive(Debug, Clone, PartialEq)]
struct Asker {
    name: u8,
    run: u8,
    namespace: u8,
    sources: BTreeSet<u8>,
    /// Port and service.
    bindings: Vec<(u8, u8)>,
    local: bool,
}

fn small() -> std::ops::Range<u8> {
    0..5
}

fn asker() -> impl Strategy<Value = Asker> {
    let bindings = prop::collection::vec((small(), small()), 0..4);
    let sources = prop::collection::btree_set(small(), 0..3);
    (small(), 0..2_u8, small(), sources, bindings, prop::bool::weighted(0.1)).prop_map(
        |(name, run, namespace, sources, mut bindings, local)| {
            bindings.sort();
            bindings.dedup_by_key(|(port, _)| *port);
            Asker { name, run, namespace, sources, bindings, local }
        },
    )
}

fn world() -> impl Strategy<Value = World> {
    let answers =
        prop::collection::btree_map(small(), prop::collection::btree_set(small(), 0..4), 0..5);
    let consumers = prop::collection::vec(asker(), 0..6);
    let few = || prop::collection::btree_set(small(), 0..2);
    (consumers, answers, few(), few()).prop_map(|(mut consumers, answers, contested, vips)| {
        // A container has one name, and one run at a time.
        consumers.sort_by_key(|one| one.name);
        consumers.dedup_by_key(|one| one.name);
        World { consumers, answers, contested, vips }
    })
}

fn address(n: u8) -> IpAddr {
    IpAddr::from([172, 17, 0, n])
}

fn query(binding: &Binding) -> Result<Query, CannotAsk> {
    let service = binding.descriptor.service.clone();
    if service.as_str() == "s4" {
        return Err(CannotAsk::Unknown { via: "x".into(), configured: "consul".into() });
    }
    Ok(Query { via: "consul".into(), service, tags: Default::default(), dc: None, port: None })
}

impl Asker {
    fn consumer(&self) -> Consumer {
        let binding = |(port, service): &(u8, u8)| Binding {
            origin: format!("BACKEND_{port}").into(),
            // The same numbers of both protocols.
            descriptor: format!(
                "s{service};{}/{}",
                1 + port / 2,
                ["tcp", "udp"][usize::from(port % 2)]
            )
            .parse()
            .unwrap(),
        };
        Consumer {
            id: if self.local {
                ConsumerId::Local
            } else {
                ConsumerId::Container {
                    id: ContainerId::new(&self.name.to_string()),
                    started_at: self.run.to_string().into(),
                }
            },
            name: self.name.to_string().into(),
            namespace: self.namespace.to_string().into(),
            sources: self.sources.iter().map(|n| address(*n)).collect(),
            arrivals: Vec::new(),
            gateways: vec![address(100 + self.namespace)],
            bindings: self.bindings.iter().map(binding).collect(),
            ends: vec![],
        }
    }
}

/// Creates the inputs of tables. A value that stays the same from one world to the next is shared or equal, as with real
/// sources.
#[derive(Default)]
struct Sources {
    consumers: HashMap<String, Arc<Consumer>>,
    answers: CowMap<Query, Arc<Endpoints>>,
}

impl Sources {
    fn table(&mut self, world: &World, before: &Table, share: bool) -> Option<Table> {
        if !share {
            *self = Self::default();
        }
        let consumers: Vec<_> = world
            .consumers
            .iter()
            .map(|asker| {
                let made = self.consumers.entry(format!("{asker:?}"));
                made.or_insert_with(|| Arc::new(asker.consumer())).clone()
            })
            .collect();
        let answered: BTreeMap<_, _> = world
            .answers
            .iter()
            .map(|(service, list)| {
                let descriptor = format!("s{service};1").parse().unwrap();
                let service = query(&Binding { origin: "".into(), descriptor });
                let list = list.iter().map(|n| Endpoint((address(200 + n), 1).into()));
                (service, Endpoints::new(list, vec![]))
            })
            .filter_map(|(query, answer)| Some((query.ok()?, answer)))
            .collect();
        let gone: Vec<_> =
            self.answers.keys().filter(|query| !answered.contains_key(query)).cloned().collect();
        gone.iter().for_each(|query| drop(self.answers.remove(query)));
        for (query, answer) in answered {
            if self.answers.get(&query).is_none_or(|before| **before != answer) {
                self.answers.insert(query, Arc::new(answer));
            }
        }
        let inputs = Inputs {
            bounds: &crate::discovery::Bounds::default(),
            consumers: &consumers.iter().collect::<Vec<_>>(),
            known: &Arc::new([address(50)].into()),
            contested: &world.contested.iter().map(|n| address(*n)).collect(),
            confirmed: 0,
            networks: &BTreeSet::new(),
            wiring: &Default::default(),
            endpoints: &self.answers,
            vips: &world.vips.iter().map(|n| Vip(address(*n))).collect::<Vec<_>>(),
            gateways_are_vips: true,
            balance: Balance::RoundRobin,
            now: Instant::now(),
        };
        before.next(&inputs, query)
    }
}

/// Everything that a table contains, except state that is carried on from earlier tables.
fn says(table: &Table) -> impl PartialEq + std::fmt::Debug + use<> {
    let endpoints = |upstream: &Upstream| {
        let states = upstream.rotation.endpoints().iter();
        let endpoints: BTreeSet<_> = states.map(|state| state.endpoint).collect();
        (upstream.query.clone(), upstream.answered, endpoints)
    };
    let routes: BTreeMap<_, _> = table
        .routes()
        .map(|route| {
            let owner = (route.consumer.clone(), route.consumer_name.clone());
            (
                route.key,
                (owner, route.binding.clone(), endpoints(table.upstream(&route.query).unwrap())),
            )
        })
        .collect();
    let upstreams: BTreeSet<_> = table.upstreams().map(|upstream| endpoints(upstream)).collect();
    let states: BTreeSet<_> =
        table.endpoints().map(|(service, state)| (service.clone(), state.endpoint)).collect();
    let unrouted: Vec<_> = table.unrouted().cloned().collect();
    (routes, upstreams, states, unrouted, table.vips().clone(), table.known().clone())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn step_by_step_is_as_at_once(worlds in prop::collection::vec((world(), prop::bool::weighted(0.8)), 1..8)) {
        let mut sources = Sources::default();
        let mut table = Table::default();
        for (world, share) in worlds {
            let before = says(&table);
            let next = sources.table(&world, &table, share);
            let fresh = Sources::default().table(&world, &Table::default(), false).unwrap();
            let Some(next) = next else {
                prop_assert_eq!(&before, &says(&fresh), "it was not published");
                continue;
            };
            prop_assert_eq!(says(&next), says(&fresh));
            prop_assert!(table.version == 0 || before != says(&fresh), "nothing differs");
            // Each route has its upstream, each upstream the right number of routes, and each endpoint one state.
            for (query, in_use) in next.upstreams.iter() {
                prop_assert!(Arc::ptr_eq(query, &in_use.upstream.query));
                let routes = next.routes().filter(|route| Arc::ptr_eq(&route.query, query));
                prop_assert_eq!(routes.count(), in_use.routes);
            }
            for route in next.routes() {
                prop_assert!(next.owner(route).is_some());
                let service = build::service_of(&route.query);
                for state in next.endpoints_of(route) {
                    let shared = next.states.get(&(service.clone(), state.endpoint)).unwrap();
                    prop_assert!(Arc::ptr_eq(&shared.state, state));
                }
            }
            // State that is carried on is the same.
            for route in next.routes() {
                let Some(old) = table.route(&route.key) else { continue };
                let goes_on = old.consumer == route.consumer && old.binding == route.binding;
                prop_assert_eq!(goes_on, old.number == route.number);
                prop_assert_eq!(goes_on, Arc::ptr_eq(&old.counts, &route.counts));
                let is_same = goes_on && old.consumer_name == route.consumer_name;
                prop_assert_eq!(is_same, Arc::ptr_eq(old, route), "whatever its endpoints");
            }
            for (key, shared) in table.states.iter() {
                if let Some(now) = next.states.get(key) {
                    prop_assert!(Arc::ptr_eq(&shared.state, &now.state));
                }
            }
            let keys = |routes: &[Arc<Route>]| routes.iter().map(|r| (r.key, r.number)).collect::<Vec<_>>();
            let (told, whole) = (next.changes(), Changes::between(&table, &next));
            prop_assert_eq!(keys(&told.added), keys(&whole.added));
            prop_assert_eq!(keys(&told.removed), keys(&whole.removed));
            prop_assert_eq!(keys(&told.updated), keys(&whole.updated));
            let upstreams = |changes: &Changes| {
                let all = changes.upstreams.iter().map(Arc::as_ptr);
                (changes.upstreams.len(), all.collect::<BTreeSet<_>>())
            };
            prop_assert_eq!(upstreams(told), upstreams(&whole));
            prop_assert_eq!(&told.known_added, &whole.known_added);
            prop_assert_eq!(&told.known_removed, &whole.known_removed);
            prop_assert_eq!(told.places, whole.places);
            table = next;
        }
    }
}
