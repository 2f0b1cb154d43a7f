use std::{collections::BTreeSet, sync::Mutex};

use super::*;
use crate::{
    capture::{
        fake::{self, Fake, State},
        nft::tests::{enter_a_namespace_of_its_own, nft},
        rules,
    },
    config::FirewallChoice,
    consumer::{Binding, Consumer},
    descriptor::{Balance, Descriptor},
    discovery::Query,
    model::{ConsumerId, ContainerId, Tags},
    readiness::{Part, Readiness},
    table::Inputs,
};

/// The next table, with containers (ID and address) that each ask for services on these ports.
fn next(before: &Table, consumers: &[(&str, &str, &[u16])]) -> Arc<Table> {
    let binding = |port: &u16| Binding {
        origin: "BACKEND_X".into(),
        descriptor: format!("service;{port}").parse::<Descriptor>().unwrap(),
    };
    let consumer = |(id, address, ports): &(&str, &str, &[u16])| {
        Arc::new(Consumer {
            id: ConsumerId::Container { id: ContainerId::new(id), started_at: "now".into() },
            name: (*id).into(),
            namespace: (*id).into(),
            sources: vec![address.parse().unwrap()],
            arrivals: Vec::new(),
            gateways: vec!["172.17.0.1".parse().unwrap()],
            bindings: ports.iter().map(binding).collect(),
            ends: Vec::new(),
        })
    };
    let consumers: Vec<_> = consumers.iter().map(consumer).collect();
    let inputs = Inputs {
        bounds: &crate::discovery::Bounds::default(),
        consumers: &consumers.iter().collect::<Vec<_>>(),
        contested: &BTreeSet::new(),
        known: &Arc::default(),
        confirmed: 0,
        networks: &BTreeSet::new(),
        wiring: &Default::default(),
        endpoints: &Default::default(),
        vips: &[],
        gateways_are_vips: true,
        balance: Balance::RoundRobin,
        now: Instant::now(),
    };
    let query = |binding: &Binding| {
        Ok(Query {
            via: "consul".into(),
            dc: None,
            port: None,
            service: binding.descriptor.service.clone(),
            tags: Tags::default(),
        })
    };
    Arc::new(before.next(&inputs, query).unwrap())
}

/// A reconciler, and a record of what its firewall was given.
fn reconciler() -> (Reconciler, Arc<Mutex<State>>) {
    let fake = Fake::default();
    let state = fake.state.clone();
    (reconciler_of(Backend::Fake(fake)), state)
}

fn reconciler_of(backend: Backend) -> Reconciler {
    let ready = Readiness::default().wait_for(Part::Capture);
    Reconciler::new(backend, fake::settings(), Arc::default(), Some(ready), Events::default())
}

/// The keys that are captured.
fn keys(state: &State) -> BTreeSet<crate::table::RouteKey> {
    state.declared.iter().map(|one| one.key).collect()
}

/// How often all rules and how often changes were written. Checks that the captured keys are those of the table.
fn written(state: &Mutex<State>, table: &Table) -> (usize, usize) {
    let state = state.lock().unwrap();
    let routes: BTreeSet<_> = table.routes().map(|route| route.key).collect();
    assert_eq!(keys(&state), routes);
    (state.loads, state.changes)
}

#[tokio::test]
async fn only_what_changes_is_written() {
    let (mut reconciler, state) = reconciler();
    let first = next(&Table::default(), &[("a", "172.17.0.2", &[80, 81])]);
    reconciler.follow(&first).await.unwrap();
    assert_eq!(written(&state, &first), (1, 0));
    let second = next(&first, &[("a", "172.17.0.2", &[80]), ("b", "172.17.0.3", &[80])]);
    reconciler.follow(&second).await.unwrap();
    assert_eq!(written(&state, &second), (1, 1));
    // Another container has the address and port: the rule stays the same.
    let third = next(&second, &[("c", "172.17.0.2", &[80]), ("b", "172.17.0.3", &[80])]);
    reconciler.follow(&third).await.unwrap();
    assert_eq!(written(&state, &third), (1, 1));
    // The reconciler misses one table.
    let missed = next(&third, &[("b", "172.17.0.3", &[81])]);
    let fifth = next(&missed, &[("c", "172.17.0.2", &[80, 82]), ("d", "172.17.0.9", &[1])]);
    reconciler.follow(&fifth).await.unwrap();
    assert_eq!(written(&state, &fifth), (1, 2));
    assert!(reconciler.counts.standing().in_place);
}

#[tokio::test]
async fn what_cannot_be_changed_is_written_whole_and_what_cannot_be_written_is_tried_again() {
    let (mut reconciler, state) = reconciler();
    let first = next(&Table::default(), &[("a", "172.17.0.2", &[80])]);
    let done = reconciler.follow(&first).await;
    reconciler.note(done);
    let second = next(&first, &[("a", "172.17.0.2", &[80, 81])]);
    state.lock().unwrap().failures = 1;
    let done = reconciler.follow(&second).await;
    reconciler.note(done);
    assert_eq!(written(&state, &second), (2, 0));
    assert_eq!(reconciler.counts.failed.load(Relaxed), 0);

    let third = next(&second, &[]);
    // A test of which part is refused was done a moment ago.
    reconciler.reduced = Some(Instant::now());
    state.lock().unwrap().failures = 3;
    let done = reconciler.follow(&third).await;
    reconciler.note(done);
    let standing = reconciler.counts.standing();
    assert_eq!((standing.in_place, standing.error.is_some()), (false, true));
    let done = reconciler.check(&third).await;
    reconciler.note(done);
    assert_eq!(reconciler.counts.failed.load(Relaxed), 2);
    let done = reconciler.check(&third).await;
    reconciler.note(done);
    assert_eq!(written(&state, &third), (3, 0));
    let standing = reconciler.counts.standing();
    assert_eq!((standing.in_place, standing.error), (true, None));
}

/// The optional parts that were left out, as reported.
fn fallen(reconciler: &Reconciler) -> Vec<rules::RulePart> {
    reconciler.counts.standing().lacks.iter().map(|(part, _)| *part).collect()
}

#[tokio::test]
async fn an_optional_part_that_is_refused_falls_away_and_comes_back() {
    let (mut reconciler, state) = reconciler();
    reconciler.settings.hold = true;
    state.lock().unwrap().lacks = Optional::default().with(rules::RulePart::Ipv6);
    let first = next(&Table::default(), &[("a", "172.17.0.2", &[80]), ("a6", "fd00::2", &[80])]);
    reconciler.check(&first).await.unwrap();
    assert_eq!(
        (written(&state, &first), fallen(&reconciler)),
        ((1, 0), vec![rules::RulePart::Ipv6])
    );
    assert!(reconciler.counts.standing().in_place && reconciler.ready.is_none());
    assert!(reconciler.settings.captures_unknown(), "the others stay");
    // The part is accepted again. At first no other program has changed anything, then one has.
    state.lock().unwrap().lacks = Optional::default();
    let second = next(&first, &[("a", "172.17.0.2", &[80, 81])]);
    reconciler.follow(&second).await.unwrap();
    assert_eq!(
        (written(&state, &second), fallen(&reconciler)),
        ((1, 1), vec![rules::RulePart::Ipv6])
    );
    let others_change = |reconciler: &mut Reconciler| {
        let Backend::Fake(fake) = &mut reconciler.backend else { unreachable!() };
        fake.others = true;
        reconciler.reduced = Instant::now().checked_sub(COME_BACK);
    };
    others_change(&mut reconciler);
    reconciler.check(&second).await.unwrap();
    assert_eq!((written(&state, &second), fallen(&reconciler)), ((2, 1), vec![]));
    assert_eq!(reconciler.settings.lacks, Optional::default());
    // As long as it is refused, nothing else changes.
    state.lock().unwrap().lacks =
        Optional::default().with(rules::RulePart::Hold).with(rules::RulePart::Ipv6);
    reconciler.applied = None;
    reconciler.check(&second).await.unwrap();
    assert_eq!(fallen(&reconciler), [rules::RulePart::Hold, rules::RulePart::Ipv6]);
    others_change(&mut reconciler);
    reconciler.check(&second).await.unwrap();
    assert_eq!(
        (written(&state, &second), fallen(&reconciler)),
        ((4, 1), vec![rules::RulePart::Hold, rules::RulePart::Ipv6])
    );
    assert_eq!(reconciler.counts.failed.load(Relaxed), 0);
}

#[tokio::test]
async fn a_failure_that_passes_takes_no_part_away() {
    let (mut reconciler, state) = reconciler();
    state.lock().unwrap().failures = 1;
    let table = next(&Table::default(), &[("a", "172.17.0.2", &[80])]);
    reconciler.check(&table).await.unwrap();
    assert_eq!((written(&state, &table), fallen(&reconciler)), ((1, 0), vec![]));
    assert_eq!(reconciler.settings.lacks, Optional::default());
}

#[test]
fn what_takes_long_to_read_is_read_seldom() {
    assert_eq!(rest(Duration::from_millis(5)), READ);
    assert_eq!(rest(Duration::from_secs(10)), Duration::from_secs(1000));
}

#[tokio::test]
async fn damage_is_looked_for_only_after_others_changed_something() {
    let (mut reconciler, state) = reconciler();
    let table = next(&Table::default(), &[("a", "172.17.0.2", &[80])]);
    reconciler.follow(&table).await.unwrap();
    state.lock().unwrap().damage = Some((Change::Vanished, "all of them".to_owned()));
    reconciler.check(&table).await.unwrap();
    assert_eq!(written(&state, &table), (1, 0));
    let Backend::Fake(fake) = &mut reconciler.backend else { unreachable!() };
    fake.others = true;
    reconciler.check(&table).await.unwrap();
    assert_eq!(written(&state, &table), (2, 0));
    assert_eq!(reconciler.counts.restored(Change::Vanished), 1);
    let restored = reconciler.counts.standing().restored;
    assert_eq!(restored.map(|(_, missing)| missing).as_deref(), Some("all of them"));
    // What was restored is not checked again.
    reconciler.check(&table).await.unwrap();
    assert_eq!(written(&state, &table), (2, 0));
}

#[tokio::test]
async fn a_program_that_hangs_holds_up_no_rules_and_no_end() {
    let (mut reconciler, state) = reconciler();
    reconciler.surroundings.reading.spawn(std::future::pending());
    let (tables, receiver) = watch::channel(Arc::default());
    let (stop, stopped) = oneshot::channel();
    let running = tokio::spawn(reconciler.run(receiver, stopped));
    let mut table = Arc::default();
    for ports in [&[80][..], &[80, 81], &[81]] {
        table = next(&table, &[("a", "172.17.0.2", ports)]);
        tables.send_replace(table.clone());
        while keys(&state.lock().unwrap()) != table.routes().map(|route| route.key).collect() {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    }
    stop.send(()).unwrap();
    running.await.unwrap();
}

#[tokio::test]
async fn what_vanished_is_told_though_a_change_is_the_first_to_meet_it() {
    enter_a_namespace_of_its_own();
    for (choice, vanish) in [
        (FirewallChoice::NftShared, "delete table inet embassy"),
        (FirewallChoice::Iptables, "flush ruleset"),
    ] {
        let backend = Backend::open(choice, &fake::settings()).await.unwrap();
        let mut reconciler = reconciler_of(backend);
        let first = next(&Table::default(), &[("a", "172.17.0.2", &[80])]);
        reconciler.follow(&first).await.unwrap();
        nft(vanish).unwrap();
        let second = next(&first, &[("a", "172.17.0.2", &[80, 81])]);
        reconciler.follow(&second).await.unwrap();
        let restored = Change::ALL.iter().map(|change| reconciler.counts.restored(*change));
        assert_eq!(restored.sum::<u64>(), 1, "{choice:?}");
        assert!(reconciler.counts.standing().in_place);
        reconciler.check(&second).await.unwrap();
        reconciler.backend.remove().await.unwrap();
    }
}
