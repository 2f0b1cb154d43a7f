//! Sessions with an engine that answers slowly, wrongly or not at all: what the provider and the discovery report then.

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use testbed::{FakeEngine, Mood};
use tokio::sync::Notify;

use crate::{
    discovery::{Discoveries, Endpoints, Query, Watches, docker::PREFIX},
    docker::{Address, Engine, follow::Follower, lookup::Lookup},
    provider::{Listing, Provider},
    proxy::testing::in_own_network,
    source::{Answers, Known, ResyncRequests},
};

/// Longer than all waits in these tests.
const SOON: Duration = Duration::from_secs(60);

/// The provider and the discovery of one engine.
struct Followed {
    consumers: Answers<Listing>,
    watches: Watches,
    lookup: Lookup,
    resync: ResyncRequests,
}

impl Followed {
    fn of(engine: &FakeEngine) -> Self {
        let (lookup, bell) = (Lookup::default(), Arc::<Notify>::default());
        let resync = ResyncRequests::new(10 * SOON);
        let prefixes = vec!["BACKEND_".to_owned(), PREFIX.to_owned()];
        let follower = Follower::new("provider", of(engine), prefixes, lookup.clone());
        let mut discoveries = discoveries(engine);
        discoveries.share(&follower);
        let provider = Provider::Docker { follower, prefix: "BACKEND_".to_owned() };
        let consumers = provider.start(&resync, bell.clone());
        let watches = Watches::new(discoveries, resync.clone(), bell);
        Self { consumers, watches, lookup, resync }
    }

    /// The state of a service, which is followed from now on.
    fn service(&mut self, name: &str) -> Answers<Endpoints> {
        let query = query(name);
        self.watches.ask(&query);
        let answers = self.watches.answers().into_iter();
        answers.filter(|(one, _)| *one == query).map(|(_, answers)| answers).next().unwrap()
    }
}

/// The engine as embassy reaches it.
fn of(engine: &FakeEngine) -> Engine {
    Engine { address: Address::Unix(engine.socket()), certificates: None }
}

fn discoveries(engine: &FakeEngine) -> Discoveries {
    let settings = crate::discovery::Options {
        healthy_only: true,
        docker: of(engine),
        consul: Default::default(),
        etcd: Default::default(),
    };
    Discoveries::parse(&["docker://".to_owned()], &settings).unwrap()
}

fn query(service: &str) -> Query {
    let service = crate::model::ServiceName::new(service).unwrap();
    Query { via: "docker".into(), service, tags: Default::default(), dc: None, port: None }
}

fn followed(engine: &FakeEngine) -> Answers<Listing> {
    Followed::of(engine).consumers
}

async fn until<T: Clone>(answers: &mut Answers<T>, holds: impl Fn(&Known<T>) -> bool) -> Known<T> {
    let known = tokio::time::timeout(SOON, answers.wait_for(holds)).await;
    known.expect("it to come").expect("the source to live").clone()
}

async fn eventually(holds: impl Fn() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(SOON, waiting).await.expect("it to come");
}

/// Whether a consumer is known with exactly this address.
fn has(known: &Known<Listing>, name: &str, address: Option<&str>) -> bool {
    let sources: Vec<IpAddr> = address.iter().map(|text| text.parse().unwrap()).collect();
    let consumers = known.value.iter().flat_map(|listing| &listing.consumers);
    consumers.into_iter().any(|consumer| &*consumer.name == name && consumer.sources == sources)
}

/// The endpoints of a service, if known.
fn list(known: &Known<Endpoints>) -> Option<Vec<String>> {
    let list = &known.value.as_ref()?.living().list;
    Some(list.iter().map(ToString::to_string).collect())
}

fn at(known: &Known<Endpoints>, endpoint: &str) -> bool {
    list(known).is_some_and(|list| list == [endpoint])
}

fn path(id: &str) -> String {
    format!("/containers/{id}/json")
}

#[tokio::test]
async fn many_containers_that_run_at_the_start_are_all_known_at_once() {
    let engine = FakeEngine::start();
    for n in 0..300 {
        engine.has(&format!("c{n}"), &format!("172.17.{}.{}", n / 200, n % 200 + 2));
    }
    let mut answers = followed(&engine);
    let known = until(&mut answers, |known| known.value.is_some()).await;
    let listing = known.value.unwrap();
    assert_eq!((listing.consumers.len(), listing.known.len()), (300, 300));
    assert!(listing.contested.is_empty());
}

#[tokio::test]
async fn an_address_that_went_to_another_between_two_sessions_is_withdrawn_by_the_list() {
    let engine = FakeEngine::start();
    engine.has("one", "172.17.0.2");
    engine.has("two", "172.17.0.3");
    let mut answers = followed(&engine);
    until(&mut answers, |known| has(known, "one", Some("172.17.0.2"))).await;
    // There are no events, and inspections fail.
    engine.has("one", "172.17.0.3");
    engine.has("two", "172.17.0.2");
    for id in ["one", "two"] {
        engine.answers(&path(id), Mood::Hangs);
    }
    engine.loses();
    let known = until(&mut answers, |known| has(known, "one", None)).await;
    assert!(has(&known, "two", None), "{known:?}");
    for id in ["one", "two"] {
        engine.answers(&path(id), None);
        engine.tells("start", id);
    }
    until(&mut answers, |known| has(known, "one", Some("172.17.0.3"))).await;
    until(&mut answers, |known| has(known, "two", Some("172.17.0.2"))).await;
}

#[tokio::test]
async fn who_could_not_be_inspected_is_looked_at_again_without_an_event() {
    let engine = FakeEngine::start();
    engine.has("one", "172.17.0.2");
    engine.has("two", "172.17.0.3");
    engine.answers(&path("one"), Mood::Fails);
    let mut answers = followed(&engine);
    let known = until(&mut answers, |known| has(known, "two", Some("172.17.0.3"))).await;
    assert_eq!(known.value.unwrap().consumers.len(), 1);
    engine.answers(&path("one"), None);
    let known = until(&mut answers, |known| has(known, "one", Some("172.17.0.2"))).await;
    assert_eq!(known.failures, 0);
}

#[tokio::test]
async fn who_starts_does_not_wait_for_a_long_list() {
    let engine = FakeEngine::start();
    let ids: Vec<_> = (0..40).map(|n| format!("c{n}")).collect();
    for (n, id) in ids.iter().enumerate() {
        engine.has(id, &format!("172.17.0.{}", n + 2));
    }
    let mut answers = followed(&engine);
    until(&mut answers, |known| known.value.is_some()).await;
    for id in &ids {
        engine.answers(&path(id), Mood::Hangs);
    }
    engine.loses();
    until(&mut answers, |known| known.failures == 1 && known.error.is_none()).await;
    engine.has("new", "172.17.1.2");
    engine.tells("start", "new");
    let known = until(&mut answers, |known| has(known, "new", Some("172.17.1.2"))).await;
    assert!(has(&known, "c39", Some("172.17.0.41")), "the others stay as they were known");
    let again = ids.iter().filter(|id| engine.asked(&path(id)) == 2).count();
    assert!(again < ids.len(), "{again} were asked for before it");
}

#[tokio::test]
async fn an_answer_that_stalls_ends_the_session_long_before_the_next_one_is_due() {
    let engine = FakeEngine::start();
    engine.answers("/containers/json", Mood::Stalls);
    let mut answers = followed(&engine);
    let known = until(&mut answers, |known| known.error.is_some()).await;
    assert!(known.error.unwrap().contains("no answer within 10 s"));
    engine.answers("/containers/json", None);
    until(&mut answers, |known| known.value.is_some()).await;
}

#[tokio::test]
async fn one_engine_is_followed_once_whatever_is_made_of_it_and_as_long_as_anything_is() {
    let engine = FakeEngine::start();
    for n in 0..20 {
        engine.has(&format!("c{n}"), &format!("172.17.0.{}", n + 2));
    }
    let mut followed = Followed::of(&engine);
    until(&mut followed.consumers, |known| known.value.is_some()).await;
    for n in 0..20 {
        let mut service = followed.service(&format!("c{n}"));
        until(&mut service, |known| at(known, &format!("172.17.0.{}:80", n + 2))).await;
        engine.has(&format!("c{n}"), &format!("172.17.1.{}", n + 2));
        engine.tells("start", &format!("c{n}"));
        until(&mut service, |known| at(known, &format!("172.17.1.{}:80", n + 2))).await;
        let address = format!("172.17.1.{}", n + 2);
        until(&mut followed.consumers, |known| has(known, &format!("c{n}"), Some(&address))).await;
    }
    for once in ["/events", "/containers/json", "/networks"] {
        assert_eq!(engine.asked(once), 1, "{once}");
    }
    for n in 0..20 {
        assert_eq!(engine.asked(&path(&format!("c{n}"))), 2, "at the start, and for the event");
    }
    assert_eq!(engine.streams(), 1);
}

#[tokio::test]
async fn a_discovery_alone_follows_its_engine_and_with_its_last_query_that_ends() {
    let engine = FakeEngine::start();
    engine.has("one", "172.17.0.2");
    let bell = Arc::<Notify>::default();
    let resync = ResyncRequests::new(10 * SOON);
    let mut watches = Watches::new(discoveries(&engine), resync.clone(), bell.clone());
    ["one", "two"].iter().for_each(|name| watches.ask(&query(name)));
    for (_, mut answers) in watches.answers() {
        until(&mut answers, |known| known.value.is_some()).await;
    }
    assert_eq!((engine.asked("/events"), engine.streams()), (1, 1));
    drop(watches);
    eventually(|| engine.streams() == 0).await;
}

#[tokio::test]
async fn what_is_read_again_changes_nothing_where_nothing_changed() {
    let engine = FakeEngine::start();
    for n in 0..50 {
        engine.has(&format!("c{n}"), &format!("172.17.0.{}", n + 2));
    }
    let mut followed = Followed::of(&engine);
    let mut service = followed.service("c7");
    let consumers = until(&mut followed.consumers, |known| known.value.is_some()).await;
    let endpoints = until(&mut service, |known| at(known, "172.17.0.9:80")).await;
    for again in 2..4 {
        followed.resync.request();
        eventually(|| (0..50).all(|n| engine.asked(&path(&format!("c{n}"))) == again)).await;
        assert_eq!(engine.asked("/containers/json"), again);
        assert_eq!(engine.asked("/networks"), again);
    }
    // The new container is seen, so all earlier requests were answered.
    engine.has("new", "172.17.1.2");
    engine.tells("start", "new");
    let now = until(&mut followed.consumers, |known| has(known, "new", Some("172.17.1.2"))).await;
    assert_eq!((now.changes, now.failures), (consumers.changes + 1, 0));
    let new = |consumer: &&Arc<crate::consumer::Consumer>| &*consumer.name != "new";
    let (before, now) = (consumers.value.unwrap(), now.value.unwrap());
    let pairs = before.consumers.iter().zip(now.consumers.iter().filter(new));
    assert!(pairs.into_iter().all(|(one, now)| Arc::ptr_eq(one, now)));
    assert_eq!(service.borrow().changes, endpoints.changes);
    assert_eq!(engine.asked("/events"), 1, "no new session");
}

#[tokio::test]
async fn what_no_event_told_of_is_found_when_it_is_read_again() {
    let engine = FakeEngine::start();
    engine.has("one", "172.17.0.2");
    engine.has("gone", "172.17.0.3");
    let mut followed = Followed::of(&engine);
    let mut service = followed.service("two");
    until(&mut followed.consumers, |known| has(known, "gone", Some("172.17.0.3"))).await;
    engine.has("two", "172.17.0.4");
    engine.has_not("gone");
    followed.resync.request();
    until(&mut service, |known| at(known, "172.17.0.4:80")).await;
    let known = until(&mut followed.consumers, |known| !has(known, "gone", Some("172.17.0.3")));
    assert_eq!(known.await.failures, 0);
}

#[tokio::test]
async fn one_who_starts_while_a_list_is_on_its_way_stays() {
    let engine = FakeEngine::start();
    engine.has("one", "172.17.0.2");
    let mut followed = Followed::of(&engine);
    let known = until(&mut followed.consumers, |known| known.value.is_some()).await;
    engine.answers("/containers/json", Mood::Waits);
    followed.resync.request();
    eventually(|| engine.asked("/containers/json") == 2).await;
    engine.has("two", "172.17.0.3");
    engine.tells("start", "two");
    until(&mut followed.consumers, |known| has(known, "two", Some("172.17.0.3"))).await;
    // The list that arrives now is from before.
    engine.answers("/containers/json", None);
    eventually(|| engine.asked(&path("two")) == 2).await;
    engine.has("three", "172.17.0.4");
    engine.tells("start", "three");
    let now = until(&mut followed.consumers, |known| has(known, "three", Some("172.17.0.4"))).await;
    assert!(has(&now, "two", Some("172.17.0.3")));
    assert_eq!(now.changes, known.changes + 2, "it was there all the time");
}

#[tokio::test]
async fn a_dial_finds_one_whom_no_event_told_of() {
    let engine = FakeEngine::start();
    let mut followed = Followed::of(&engine);
    until(&mut followed.consumers, |known| known.value.is_some()).await;
    engine.has("one", "172.17.0.2");
    followed.lookup.ask("172.17.0.2".parse().unwrap());
    until(&mut followed.consumers, |known| has(known, "one", Some("172.17.0.2"))).await;
    assert_eq!(engine.asked(&path("one")), 1);
}

#[tokio::test]
async fn who_cannot_be_inspected_stays_as_it_was_known_over_sessions() {
    let engine = FakeEngine::start();
    engine.has("one", "172.17.0.2");
    engine.has("two", "172.17.0.3");
    let mut followed = Followed::of(&engine);
    let mut services = ["one", "two", "three"].map(|name| followed.service(name));
    until(&mut services[0], |known| at(known, "172.17.0.2:80")).await;
    for (id, mood) in [("one", Mood::Fails), ("two", Mood::Garbage)] {
        engine.answers(&path(id), mood);
    }
    engine.has("three", "172.17.0.4");
    engine.loses();
    let known = until(&mut services[2], |known| at(known, "172.17.0.4:80")).await;
    assert_eq!(known.failures, 1, "that of the stream");
    let [one, two, _] = services;
    assert!(at(&one.borrow(), "172.17.0.2:80") && at(&two.borrow(), "172.17.0.3:80"));
}

#[tokio::test]
async fn an_inspection_that_hangs_costs_its_own_container_alone() {
    let engine = FakeEngine::start();
    engine.has("one", "172.17.0.2");
    engine.has("two", "172.17.0.3");
    let mut followed = Followed::of(&engine);
    let [mut one, mut two] = ["one", "two"].map(|name| followed.service(name));
    until(&mut one, |known| at(known, "172.17.0.2:80")).await;
    engine.answers(&path("one"), Mood::Hangs);
    engine.tells("rename", "one");
    engine.has("two", "172.17.0.4");
    engine.tells("start", "two");
    until(&mut two, |known| at(known, "172.17.0.4:80")).await;
    assert_eq!(engine.asked(&path("one")), 2);
    // What happens during the inspection is looked at after its timeout.
    engine.answers(&path("one"), Mood::Stalls);
    engine.tells("rename", "one");
    eventually(|| engine.asked(&path("one")) == 3).await;
    engine.has("two", "172.17.0.3");
    engine.tells("start", "two");
    until(&mut two, |known| at(known, "172.17.0.3:80")).await;
    let known = one.borrow().clone();
    assert!(at(&known, "172.17.0.2:80"));
    assert_eq!((known.failures, known.error), (0, None));
}

#[tokio::test]
async fn an_endpoint_that_went_to_another_between_two_sessions_is_withdrawn_by_the_list() {
    let engine = FakeEngine::start();
    engine.has("one", "172.17.0.2");
    let mut followed = Followed::of(&engine);
    let [mut one, mut two] = ["one", "two"].map(|name| followed.service(name));
    let before = until(&mut one, |known| at(known, "172.17.0.2:80")).await;
    engine.has("one", "172.17.0.3");
    engine.has("two", "172.17.0.2");
    engine.answers(&path("one"), Mood::Hangs);
    engine.loses();
    until(&mut two, |known| at(known, "172.17.0.2:80")).await;
    until(&mut one, |known| known.value.as_ref().is_some_and(|value| value.list.is_empty())).await;
    assert_eq!(list(&before).unwrap(), [""; 0], "the answer of before, that somebody still has");
}

#[tokio::test]
async fn who_has_ended_by_the_engines_word_or_the_kernels_is_no_endpoint() {
    let engine = FakeEngine::start();
    engine.has("one", "172.17.0.2");
    let mut followed = Followed::of(&engine);
    let [mut one, mut two] = ["one", "two"].map(|name| followed.service(name));
    // An end reported by the kernel needs no session.
    let known = until(&mut one, |known| at(known, "172.17.0.2:80")).await;
    known.value.iter().flat_map(|value| value.stays.values()).next().unwrap().runs[0]
        .1
        .mark_ended();
    assert_eq!(list(&known).unwrap(), [""; 0]);

    engine.has("two", "172.17.0.3");
    engine.tells("start", "two");
    let known = until(&mut two, |known| at(known, "172.17.0.3:80")).await;
    engine.answers(&path("two"), Mood::Hangs);
    engine.tells("die", "two");
    until(&mut two, |known| known.value.as_ref().is_some_and(|value| value.list.is_empty())).await;
    assert_eq!(list(&known).unwrap(), [""; 0], "the answer of before");
}

#[tokio::test]
async fn a_proxy_that_refuses_what_is_not_needed_hinders_nothing() {
    let engine = FakeEngine::start();
    engine.has("one", "172.17.0.2");
    for refused in ["/info", "/version", "/images/json", "/swarm"] {
        engine.answers(refused, Mood::Forbids);
    }
    let mut followed = Followed::of(&engine);
    let known = until(&mut followed.consumers, |known| has(known, "one", Some("172.17.0.2"))).await;
    assert_eq!((known.failures, known.error), (0, None));
    engine.has("two", "172.17.0.3");
    engine.tells("start", "two");
    until(&mut followed.consumers, |known| has(known, "two", Some("172.17.0.3"))).await;
    let needed = ["/_ping", "/events", "/containers/json", "/networks"];
    let asked = engine.requests().into_iter();
    let other: Vec<_> = asked
        .filter(|path| !needed.iter().any(|needed| path.ends_with(needed)))
        .filter(|path| !path.contains("/containers/"))
        .collect();
    assert_eq!(other, [""; 0], "it asks for what the documents name");
}

#[tokio::test]
async fn a_page_instead_of_an_answer_is_one_line_and_says_what_is_needed() {
    let engine = FakeEngine::start();
    engine.answers("/containers/json", Mood::Forbids);
    let mut answers = followed(&engine);
    let known = until(&mut answers, |known| known.error.is_some()).await;
    let error = known.error.unwrap();
    assert!(error.contains("403 Forbidden") && error.contains("/networks"), "{error}");
    assert!(!error.contains('\n'), "{error}");
}

#[tokio::test]
async fn networks_that_are_slow_or_refused_hold_nothing_up() {
    for mood in [Mood::Waits, Mood::Forbids] {
        let engine = FakeEngine::start();
        engine.has("one", "172.17.0.2");
        engine.answers("/networks", mood);
        let mut answers = followed(&engine);
        let known = until(&mut answers, |known| has(known, "one", Some("172.17.0.2"))).await;
        assert!(known.value.unwrap().networks.is_empty());
        engine.has("two", "172.17.0.3");
        engine.tells("start", "two");
        let known = until(&mut answers, |known| has(known, "two", Some("172.17.0.3"))).await;
        assert_eq!((known.failures, known.error), (0, None));
        assert_eq!(engine.asked("/networks"), 1, "one at a time");
        engine.answers("/networks", None);
        if mood == Mood::Waits {
            let comes = |known: &Known<Listing>| {
                known.value.as_ref().is_some_and(|listing| !listing.networks.is_empty())
            };
            assert_eq!(until(&mut answers, comes).await.failures, 0);
        }
    }
}

#[tokio::test]
async fn who_was_removed_is_gone_in_whatever_words_the_engine_says_so() {
    let engine = FakeEngine::start();
    engine.has("one", "172.17.0.2");
    engine.has("two", "172.17.0.3");
    let mut answers = followed(&engine);
    until(&mut answers, |known| has(known, "two", Some("172.17.0.3"))).await;
    engine.answers(&path("one"), Mood::HasNone);
    // No event reported its end.
    engine.tells("rename", "one");
    let known = until(&mut answers, |known| {
        known.value.as_ref().is_some_and(|listing| listing.consumers.len() == 1)
    });
    let known = known.await;
    assert!(has(&known, "two", Some("172.17.0.3")) && known.failures == 0);
}

#[tokio::test]
async fn a_network_that_is_left_is_understood_as_podman_tells_it() {
    let engine = FakeEngine::start();
    engine.has("one", "172.17.0.2");
    engine.has("two", "172.17.0.3");
    let mut answers = followed(&engine);
    until(&mut answers, |known| has(known, "two", Some("172.17.0.3"))).await;
    engine.answers(&path("one"), Mood::Hangs);
    engine.tells_of(serde_json::json!({
        "Type": "network",
        "Action": "disconnect",
        "Actor": {"ID": "one", "Attributes": {"name": "one", "network": "bridge"}}
    }));
    let known = until(&mut answers, |known| has(known, "one", None)).await;
    assert!(has(&known, "two", Some("172.17.0.3")));
    engine.tells_of(serde_json::json!({
        "Type": "container", "Action": "died", "Actor": {"ID": "two", "Attributes": {}}
    }));
    until(&mut answers, |known| !has(known, "two", Some("172.17.0.3"))).await;
}

/// Podman reports a stop signal neither by an event nor by a filter of its list, and says that such a container does not
/// run.
#[tokio::test]
async fn a_container_that_podman_stops_stays_until_it_has_ended() {
    let engine = FakeEngine::start();
    engine.is_podman();
    let with = |status: &str, running: bool, pid: u32| {
        serde_json::json!({
            "Id": "one",
            "Name": "/one",
            "State": {
                "Status": status, "Running": running, "StartedAt": "2026-01-01T00:00:00Z", "Pid": pid
            },
            "HostConfig": {"NetworkMode": "bridge"},
            "Config": {"Env": ["BACKEND_WEB=web;80"]},
            "NetworkSettings": {"Networks": {"podman": {
                "NetworkID": "podman", "IPAddress": "172.17.0.2", "Gateway": "172.17.0.1"
            }}}
        })
    };
    engine.insert("one", with("running", true, std::process::id()));
    engine.insert("made", with("created", false, 0));
    let mut followed = Followed::of(&engine);
    until(&mut followed.consumers, |known| has(known, "one", Some("172.17.0.2"))).await;
    engine.insert("one", with("stopping", false, std::process::id()));
    engine.has("two", "172.17.0.3");
    followed.lookup.doubt();
    let known = until(&mut followed.consumers, |known| has(known, "two", Some("172.17.0.3")));
    assert!(has(&known.await, "one", Some("172.17.0.2")), "it lives");
    engine.insert("one", with("exited", false, 0));
    followed.lookup.doubt();
    until(&mut followed.consumers, |known| !has(known, "one", Some("172.17.0.2"))).await;
    assert_eq!(engine.asked("/containers/made/json"), 0);
}

/// Podman's list of networks in Docker's form waits for containers that are about to start.
#[tokio::test]
async fn podman_is_asked_for_networks_in_its_own_form_and_else_in_dockers() {
    for (mood, range) in [(None, "10.91.0.0/16"), (Some(Mood::Forbids), "172.17.0.0/16")] {
        let engine = FakeEngine::start();
        engine.is_podman();
        engine.answers("/libpod/networks/json", mood);
        engine.has_network(
            "own",
            serde_json::json!({
                "name": "own", "id": "own", "driver": "bridge", "network_interface": "podman7",
                "subnets": [{"subnet": "10.91.0.0/16", "gateway": "10.91.0.1"}]
            }),
        );
        let mut answers = followed(&engine);
        let known = until(&mut answers, |known| {
            known.value.as_ref().is_some_and(|listing| !listing.networks.is_empty())
        });
        let listing = known.await.value.unwrap();
        let networks = &listing.networks;
        assert!(networks.iter().any(|network| network.to_string() == range), "{networks:?}");
    }
}

/// podman before 5.4 tells of no new network. A container's first act may be to dial its gateway.
#[tokio::test]
async fn podmans_networks_are_listed_again_when_a_container_is_made() {
    let is_listed = |known: &Known<Listing>, range: &str| {
        let networks = known.value.iter().flat_map(|listing| &listing.networks);
        networks.into_iter().any(|network| network.to_string() == range)
    };
    let engine = FakeEngine::start();
    engine.is_podman();
    let network = |name: &str, n: u8| {
        let network = serde_json::json!({
            "name": name, "id": name, "driver": "bridge", "network_interface": format!("podman{n}"),
            "subnets": [{"subnet": format!("10.{n}.0.0/16"), "gateway": format!("10.{n}.0.1")}]
        });
        engine.has_network(name, network);
    };
    network("own", 91);
    let mut answers = followed(&engine);
    until(&mut answers, |known| is_listed(known, "10.91.0.0/16")).await;
    network("new", 92);
    engine.tells("create", "one");
    until(&mut answers, |known| is_listed(known, "10.92.0.0/16")).await;
    assert_eq!(engine.asked(&path("one")), 0, "it does not run yet");
}

/// No event reported that a container lost its address, and the next container has it already.
#[tokio::test]
async fn an_address_that_a_newer_container_claims_is_nobodys_until_both_were_inspected() {
    let engine = FakeEngine::start();
    engine.has("one", "172.17.0.2");
    let mut answers = followed(&engine);
    until(&mut answers, |known| has(known, "one", Some("172.17.0.2"))).await;
    engine.has("one", "172.17.0.9");
    engine.has("two", "172.17.0.2");
    engine.answers(&path("one"), Mood::Waits);
    engine.tells("start", "two");
    let contested = ["172.17.0.2".parse().unwrap()];
    let known = until(&mut answers, |known| {
        known.value.as_ref().is_some_and(|listing| listing.contested.iter().eq(&contested))
    });
    let listing = known.await.value.unwrap();
    assert!(!listing.known.contains(&contested[0]), "who dials from it is waited for");
    // Without a list, and without an event.
    engine.answers(&path("one"), None);
    let known = until(&mut answers, |known| {
        has(known, "one", Some("172.17.0.9")) && has(known, "two", Some("172.17.0.2"))
    });
    assert!(known.await.value.unwrap().contested.is_empty());
    assert_eq!((engine.asked("/containers/json"), engine.asked(&path("one"))), (1, 2));
}

#[tokio::test]
async fn a_dial_finds_that_a_known_container_has_another_address() {
    let engine = FakeEngine::start();
    engine.has("one", "172.17.0.2");
    engine.has("two", "172.17.0.3");
    let mut followed = Followed::of(&engine);
    until(&mut followed.consumers, |known| has(known, "two", Some("172.17.0.3"))).await;
    engine.has("one", "172.17.0.9");
    followed.lookup.ask("172.17.0.9".parse().unwrap());
    until(&mut followed.consumers, |known| has(known, "one", Some("172.17.0.9"))).await;
    assert_eq!(engine.asked(&path("two")), 1, "who is where it was known to be is not asked for");
}

#[tokio::test]
async fn what_is_in_doubt_and_not_confirmed_by_a_list_is_nobodys_before_anybody_is_inspected() {
    let engine = FakeEngine::start();
    for (id, address) in [("one", "172.17.0.2"), ("two", "172.17.0.3"), ("gone", "172.17.0.4")] {
        engine.has(id, address);
    }
    let mut followed = Followed::of(&engine);
    until(&mut followed.consumers, |known| has(known, "gone", Some("172.17.0.4"))).await;
    assert!(!followed.lookup.is_in_doubt(followed.lookup.doubts(), 0));
    engine.has("one", "172.17.0.9");
    engine.has_not("gone");
    for id in ["one", "gone"] {
        engine.answers(&path(id), Mood::Hangs);
    }
    followed.lookup.doubt();
    assert!(followed.lookup.is_in_doubt(1, 0) && !followed.lookup.is_in_doubt(1, 1));
    let known = until(&mut followed.consumers, |known| {
        known.value.as_ref().is_some_and(|listing| listing.confirmed == 1)
    });
    let known = known.await;
    assert!(has(&known, "one", None) && has(&known, "gone", None), "{known:?}");
    assert!(has(&known, "two", Some("172.17.0.3")));
    assert_eq!(engine.asked(&path("two")), 1, "it is where it was known to be");
}

/// What was known stays in use, as while an engine is down.
#[tokio::test]
async fn an_engine_that_does_not_answer_leaves_nobody_in_doubt() {
    let engine = FakeEngine::start();
    engine.has("one", "172.17.0.2");
    let mut followed = Followed::of(&engine);
    until(&mut followed.consumers, |known| has(known, "one", Some("172.17.0.2"))).await;
    engine.answers("/containers/json", Mood::Stalls);
    followed.lookup.doubt();
    eventually(|| engine.asked("/containers/json") == 2).await;
    assert!(followed.lookup.is_in_doubt(1, 0), "while it is asked");
    eventually(|| !followed.lookup.is_in_doubt(1, 0)).await;
    assert!(has(&followed.consumers.borrow(), "one", Some("172.17.0.2")));
}

/// Podman's containers continue, and others start, while its service is stopped.
#[test]
fn an_interface_that_goes_while_the_engine_is_away_is_noticed() {
    in_own_network(
        "docker::sessions::an_interface_that_goes_while_the_engine_is_away_is_noticed",
        || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async {
                let engine = FakeEngine::start();
                engine.has("one", "172.17.0.2");
                let mut followed = Followed::of(&engine);
                let has_one = |known: &Known<_>| has(known, "one", Some("172.17.0.2"));
                until(&mut followed.consumers, has_one).await;
                drop(engine);
                until(&mut followed.consumers, |known| known.error.is_some()).await;
                let before = followed.lookup.moves();
                let ip = "ip link add here type veth peer name there; ip link del here";
                let status = std::process::Command::new("sh").args(["-euc", ip]).status();
                assert!(status.unwrap().success());
                eventually(|| followed.lookup.moves() > before).await;
                assert!(has_one(&followed.consumers.borrow()));
            });
        },
    );
}

#[tokio::test]
async fn one_who_moves_while_a_look_is_on_its_way_keeps_the_newer_address() {
    let engine = FakeEngine::start();
    engine.has("one", "172.17.0.2");
    let mut followed = Followed::of(&engine);
    until(&mut followed.consumers, |known| has(known, "one", Some("172.17.0.2"))).await;
    engine.answers("/containers/json", Mood::Waits);
    followed.lookup.doubt();
    eventually(|| engine.asked("/containers/json") == 2).await;
    engine.has("one", "172.17.0.9");
    engine.tells("start", "one");
    let now = until(&mut followed.consumers, |known| has(known, "one", Some("172.17.0.9"))).await;
    // The list that arrives now is from before.
    engine.answers("/containers/json", None);
    let confirmed = |known: &Known<Listing>| known.value.as_ref().unwrap().confirmed == 1;
    let known = until(&mut followed.consumers, confirmed).await;
    assert!(has(&known, "one", Some("172.17.0.9")));
    assert_eq!(known.changes, now.changes + 1, "it was there all the time");
}

#[tokio::test]
async fn strangers_cost_the_engine_no_more_than_a_list_a_second_and_are_told_that_nobody_is_there()
{
    let engine = FakeEngine::start();
    engine.has("one", "172.17.0.2");
    let mut followed = Followed::of(&engine);
    until(&mut followed.consumers, |known| has(known, "one", Some("172.17.0.2"))).await;
    let start = Instant::now();
    let mut asked = 0;
    while start.elapsed() < Duration::from_secs(3) {
        asked += 1;
        let (address, dialled) = (IpAddr::from([172, 17, 1, asked]), Instant::now());
        followed.lookup.ask(address);
        eventually(|| followed.lookup.is_nobodys(&address, dialled)).await;
    }
    let lists = engine.asked("/containers/json") - 1;
    let most = start.elapsed().as_secs() + 1;
    assert!(lists <= usize::try_from(most).unwrap(), "{lists} lists in {:?}", start.elapsed());
    assert!(!followed.lookup.was_nobodys(&"172.17.0.2".parse().unwrap()));
}

/// Docker reports that a container is connected to a network, starts it, and reports its start.
#[tokio::test]
async fn one_that_starts_is_not_taken_for_nobody() {
    let engine = FakeEngine::start();
    engine.has("one", "172.17.0.2");
    let mut followed = Followed::of(&engine);
    until(&mut followed.consumers, |known| has(known, "one", Some("172.17.0.2"))).await;
    engine.answers(&path("two"), Mood::Starts);
    engine.connects("two");
    eventually(|| engine.asked(&path("two")) == 1).await;
    let (address, dialled) = ("172.17.0.3".parse().unwrap(), Instant::now());
    followed.lookup.ask(address);
    eventually(|| engine.asked("/containers/json") == 2).await;
    // This does not wait for something: a wrong result would appear within this time.
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!followed.lookup.is_nobodys(&address, dialled));
    engine.has("two", "172.17.0.3");
    engine.answers(&path("two"), None);
    until(&mut followed.consumers, |known| has(known, "two", Some("172.17.0.3"))).await;
    assert!(!followed.lookup.is_nobodys(&address, dialled));
}
