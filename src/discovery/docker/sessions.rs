//! Sessions with an engine that answers slowly, wrongly or not at all.

use std::{sync::Arc, time::Duration};

use super::{Offer, Services, select};
use crate::{
    discovery::Query,
    docker::fake::{Fake, Mood},
    model::ServiceName,
    source::{Answers, Known, Publisher, ResyncRequests, follow},
};

/// Longer than everything that is waited for on the way.
const SOON: Duration = Duration::from_secs(60);

fn followed(engine: &Fake) -> Answers<Vec<Offer>> {
    let (publish, answers) = Publisher::new(Arc::default());
    let services = Services::new(engine.engine(), true, Arc::default());
    tokio::spawn(async move {
        follow("docker", services, publish, ResyncRequests::new(10 * SOON).subscribe()).await
    });
    answers
}

async fn until(
    answers: &mut Answers<Vec<Offer>>,
    holds: impl Fn(&Known<Vec<Offer>>) -> bool,
) -> Known<Vec<Offer>> {
    let known = tokio::time::timeout(SOON, answers.wait_for(holds)).await;
    known.expect("it to come").expect("the source to live").clone()
}

/// The endpoints of a service, where anything is known.
fn endpoints(known: &Known<Vec<Offer>>, service: &str) -> Option<Vec<String>> {
    let query = Query {
        via: "docker".into(),
        service: ServiceName::new(service).unwrap(),
        tags: Default::default(),
        dc: None,
        port: None,
    };
    let list = select(known.value.as_ref()?, &query, true).list;
    Some(list.iter().map(ToString::to_string).collect())
}

fn at(known: &Known<Vec<Offer>>, service: &str, endpoint: &str) -> bool {
    endpoints(known, service).is_some_and(|list| list == [endpoint])
}

fn path(id: &str) -> String {
    format!("/containers/{id}/json")
}

#[tokio::test]
async fn many_containers_that_run_at_the_start_are_all_known_at_once() {
    let engine = Fake::start();
    for n in 0..100 {
        engine.has(&format!("c{n}"), &format!("172.17.0.{}", n + 2));
    }
    let mut answers = followed(&engine);
    let known = until(&mut answers, |known| known.value.is_some()).await;
    assert_eq!(known.value.unwrap().len(), 100);
}

#[tokio::test]
async fn who_cannot_be_inspected_stays_as_it_was_known_over_sessions() {
    let engine = Fake::start();
    engine.has("one", "172.17.0.2");
    engine.has("two", "172.17.0.3");
    let mut answers = followed(&engine);
    until(&mut answers, |known| at(known, "one", "172.17.0.2:80")).await;
    for (id, mood) in [("one", Mood::Fails), ("two", Mood::Garbage)] {
        engine.answers(&path(id), mood);
    }
    engine.has("three", "172.17.0.4");
    engine.loses();
    let known = until(&mut answers, |known| at(known, "three", "172.17.0.4:80")).await;
    assert!(at(&known, "one", "172.17.0.2:80") && at(&known, "two", "172.17.0.3:80"), "{known:?}");
    assert_eq!(known.failures, 1, "that of the stream");
}

#[tokio::test]
async fn who_could_not_be_inspected_is_looked_at_again_without_an_event() {
    let engine = Fake::start();
    engine.has("one", "172.17.0.2");
    engine.answers(&path("one"), Mood::Garbage);
    let mut answers = followed(&engine);
    until(&mut answers, |known| known.value.is_some()).await;
    engine.answers(&path("one"), None);
    let known = until(&mut answers, |known| at(known, "one", "172.17.0.2:80")).await;
    assert_eq!(known.failures, 0);
}

#[tokio::test]
async fn an_inspection_that_hangs_costs_its_own_container_alone() {
    let engine = Fake::start();
    engine.has("one", "172.17.0.2");
    engine.has("two", "172.17.0.3");
    let mut answers = followed(&engine);
    until(&mut answers, |known| at(known, "one", "172.17.0.2:80")).await;
    engine.answers(&path("one"), Mood::Hangs);
    engine.tells("rename", "one");
    engine.has("two", "172.17.0.4");
    engine.tells("start", "two");
    until(&mut answers, |known| at(known, "two", "172.17.0.4:80")).await;
    assert_eq!(engine.asked(&path("one")), 2);
    // What happens meanwhile is looked at once that is given up.
    engine.answers(&path("one"), Mood::Stalls);
    engine.tells("rename", "one");
    let asked_again = async {
        while engine.asked(&path("one")) < 3 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(SOON, asked_again).await.unwrap();
    engine.has("two", "172.17.0.3");
    engine.tells("start", "two");
    let known = until(&mut answers, |known| at(known, "two", "172.17.0.3:80")).await;
    assert!(at(&known, "one", "172.17.0.2:80"));
    assert_eq!((known.failures, known.error), (0, None));
}

#[tokio::test]
async fn an_address_that_went_to_another_between_two_sessions_is_withdrawn_by_the_list() {
    let engine = Fake::start();
    engine.has("one", "172.17.0.2");
    let mut answers = followed(&engine);
    let known = until(&mut answers, |known| at(known, "one", "172.17.0.2:80")).await;
    let before: Vec<_> = known.value.iter().flat_map(|offers| offers.iter()).cloned().collect();
    engine.has("one", "172.17.0.3");
    engine.has("two", "172.17.0.2");
    engine.answers(&path("one"), Mood::Hangs);
    engine.loses();
    let known = until(&mut answers, |known| at(known, "two", "172.17.0.2:80")).await;
    assert_eq!(endpoints(&known, "one").unwrap(), [""; 0]);
    // Whoever still has the answer of before knows it too.
    let late = Known { value: Some(Arc::new(before)), ..Known::default() };
    assert_eq!(endpoints(&late, "one").unwrap(), [""; 0]);
}

#[tokio::test]
async fn who_has_ended_by_the_engines_word_or_the_kernels_is_no_endpoint() {
    let engine = Fake::start();
    engine.has("one", "172.17.0.2");
    let mut answers = followed(&engine);
    let known = until(&mut answers, |known| at(known, "one", "172.17.0.2:80")).await;
    // The kernel's word needs no session.
    let offers = known.value.clone().unwrap();
    offers[0].run().mark_ended();
    assert_eq!(endpoints(&known, "one").unwrap(), [""; 0]);

    engine.has("two", "172.17.0.3");
    engine.tells("start", "two");
    let known = until(&mut answers, |known| at(known, "two", "172.17.0.3:80")).await;
    engine.answers(&path("two"), Mood::Hangs);
    engine.tells("die", "two");
    until(&mut answers, |known| endpoints(known, "two").unwrap().is_empty()).await;
    assert_eq!(endpoints(&known, "two").unwrap(), [""; 0], "the answer of before");
}
