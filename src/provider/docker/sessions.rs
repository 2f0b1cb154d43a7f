//! Sessions with an engine that answers slowly, wrongly or not at all.

use std::{net::IpAddr, sync::Arc, time::Duration};

use super::DockerProvider;
use crate::{
    docker::fake::{Fake, Mood},
    provider::{Listing, Lookup},
    source::{Answers, Known, Publisher, ResyncRequests, follow},
};

/// Longer than everything that is waited for on the way.
const SOON: Duration = Duration::from_secs(60);

fn followed(engine: &Fake) -> Answers<Listing> {
    let (publish, answers) = Publisher::new(Arc::default());
    let provider = DockerProvider::new(engine.engine(), "BACKEND_".to_owned(), Lookup::default());
    tokio::spawn(async move {
        follow("provider", provider, publish, ResyncRequests::new(10 * SOON).subscribe()).await
    });
    answers
}

async fn until(
    answers: &mut Answers<Listing>,
    holds: impl Fn(&Known<Listing>) -> bool,
) -> Known<Listing> {
    let known = tokio::time::timeout(SOON, answers.wait_for(holds)).await;
    known.expect("it to come").expect("the source to live").clone()
}

/// Who is known, and whether at this address.
fn has(known: &Known<Listing>, name: &str, address: Option<&str>) -> bool {
    let sources: Vec<IpAddr> = address.iter().map(|text| text.parse().unwrap()).collect();
    let consumers = known.value.iter().flat_map(|listing| &listing.consumers);
    consumers.into_iter().any(|consumer| &*consumer.name == name && consumer.sources == sources)
}

fn path(id: &str) -> String {
    format!("/containers/{id}/json")
}

#[tokio::test]
async fn many_containers_that_run_at_the_start_are_all_known_at_once() {
    let engine = Fake::start();
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
    let engine = Fake::start();
    engine.has("one", "172.17.0.2");
    engine.has("two", "172.17.0.3");
    let mut answers = followed(&engine);
    until(&mut answers, |known| has(known, "one", Some("172.17.0.2"))).await;
    // Nobody tells, and nobody can be asked how they are.
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
    let engine = Fake::start();
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
    let engine = Fake::start();
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
    let engine = Fake::start();
    engine.answers("/containers/json", Mood::Stalls);
    let mut answers = followed(&engine);
    let known = until(&mut answers, |known| known.error.is_some()).await;
    assert!(known.error.unwrap().contains("no answer within 10 s"));
    engine.answers("/containers/json", None);
    until(&mut answers, |known| known.value.is_some()).await;
}
