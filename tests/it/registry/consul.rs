//! Consul.

use std::fs;

use embassy::{
    discovery::{ConsulSettings, Discoveries, Endpoints, Options},
    source::Known,
};
use serde_json::json;

use super::{Followed, list, servers::Consul, settings};

#[tokio::test]
async fn registrations_and_checks_are_followed() {
    let consul = Consul::start().await;
    let web = Followed::new(&format!("consul://{}", consul.address()), "web;80");
    web.sees(&[]).await;
    consul.register("one", "10.0.0.1", 80, &["prod"]).await;
    web.sees(&["10.0.0.1:80"]).await;
    // A service without an address has its node's address.
    consul.register("two", "", 81, &[]).await;
    web.sees(&["10.0.0.1:80", "127.0.0.1:81"]).await;
    consul.put("/v1/agent/check/fail/one", json!(null)).await;
    web.sees(&["127.0.0.1:81"]).await;
    consul.put("/v1/agent/check/pass/one", json!(null)).await;
    web.sees(&["10.0.0.1:80", "127.0.0.1:81"]).await;
    consul.put("/v1/agent/service/maintenance/two?enable=true&reason=test", json!(null)).await;
    web.sees(&["10.0.0.1:80"]).await;
    consul.put("/v1/agent/service/maintenance/two?enable=false", json!(null)).await;
    web.sees(&["10.0.0.1:80", "127.0.0.1:81"]).await;
    consul.register("one", "10.0.0.7", 80, &["prod"]).await;
    web.sees(&["10.0.0.7:80", "127.0.0.1:81"]).await;
    consul.put("/v1/agent/service/deregister/two", json!(null)).await;
    web.sees(&["10.0.0.7:80"]).await;
}

/// By default the server allows 200 connections per address.
#[tokio::test]
async fn more_services_than_there_may_be_connections_are_followed() {
    const SERVICES: usize = 250;
    let consul = Consul::start().await;
    let uri = format!("consul://{}", consul.address());
    let discoveries = Discoveries::parse(&[uri], &settings()).unwrap();
    let register = async |n: usize, address: &str| {
        let service = json!({ "Name": format!("s{n}"), "Address": address, "Port": 80 });
        consul.put("/v1/agent/service/register", service).await;
    };
    let all: Vec<_> =
        (0..SERVICES).map(|n| Followed::of(&discoveries, &format!("s{n};80"))).collect();
    for followed in &all {
        followed.sees(&[]).await;
    }
    for n in [0, SERVICES - 1] {
        register(n, "10.0.0.1").await;
        all[n].sees(&["10.0.0.1:80"]).await;
    }
    // Connections are left for others, and none of these failed.
    let failures: u64 = all.iter().map(|followed| followed.known().failures).sum();
    assert_eq!(failures, 0);
    let open = fs::read_to_string("/proc/self/net/tcp").unwrap();
    let port: u16 = consul.address().rsplit_once(':').unwrap().1.parse().unwrap();
    let remote = format!("0100007F:{port:04X}");
    let open = open.lines().filter_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        (fields.get(2) == Some(&remote.as_str()) && fields.get(3) == Some(&"01")).then_some(())
    });
    let open = open.count();
    assert!(open <= 110, "{open} connections");
}

#[tokio::test]
async fn without_the_filter_failing_instances_are_taken_too() {
    let consul = Consul::start().await;
    consul.register("one", "10.0.0.1", 80, &[]).await;
    consul.register("two", "10.0.0.2", 80, &[]).await;
    consul.put("/v1/agent/check/fail/two", json!(null)).await;
    let uri = format!("consul://{}", consul.address());
    let all = Options { healthy_only: false, ..settings() };
    Followed::new(&uri, "web;80").sees(&["10.0.0.1:80"]).await;
    Followed::with(&uri, &all, "web;80").sees(&["10.0.0.1:80", "10.0.0.2:80"]).await;
}

#[tokio::test]
async fn every_tag_of_the_descriptor_and_of_the_uri_is_asked_for() {
    let consul = Consul::start().await;
    consul.register("one", "10.0.0.1", 80, &["prod", "eu", "blue"]).await;
    consul.register("two", "10.0.0.2", 80, &["prod", "eu"]).await;
    consul.register("three", "10.0.0.3", 80, &["prod", "blue"]).await;
    let uri = format!("consul://{}", consul.address());
    Followed::new(&uri, "web[prod,eu];80").sees(&["10.0.0.1:80", "10.0.0.2:80"]).await;
    Followed::new(&format!("{uri}?tag=blue"), "web[eu];80").sees(&["10.0.0.1:80"]).await;
}

#[tokio::test]
async fn wrong_instances_stand_beside_the_good_ones() {
    let consul = Consul::start().await;
    consul.register("one", "10.0.0.1", 80, &[]).await;
    consul.register("named", "db.example", 80, &[]).await;
    consul.register("portless", "10.0.0.2", 0, &[]).await;
    let web = Followed::new(&format!("consul://{}", consul.address()), "web;80");
    let known = web.sees(&["10.0.0.1:80"]).await;
    let rejected = &known.value.unwrap().rejected;
    let rejected: Vec<_> = rejected.iter().map(|r| format!("{}: {}", r.what, r.reason)).collect();
    assert_eq!(
        rejected,
        [
            "named on it: address \"db.example\": expected an IP address",
            "portless on it: port \"0\": expected 1 to 65535",
        ]
    );
}

#[tokio::test]
async fn what_was_known_outlives_the_server_and_what_comes_after_is_followed() {
    let mut consul = Consul::start().await;
    consul.register("one", "10.0.0.1", 80, &[]).await;
    let web = Followed::new(&format!("consul://{}", consul.address()), "web;80");
    web.sees(&["10.0.0.1:80"]).await;
    consul.stop();
    let known = web.fails(&consul.address()).await;
    assert_eq!(list(&known), Some(vec!["10.0.0.1:80".to_owned()]));
    // It loses everything at a restart, and its index starts again.
    consul.run();
    consul.ready().await;
    web.sees(&[]).await;
    consul.register("two", "10.0.0.2", 80, &[]).await;
    web.sees(&["10.0.0.2:80"]).await;
}

#[tokio::test]
async fn a_datacentre_that_is_not_there_is_an_error_and_no_empty_answer() {
    let consul = Consul::start().await;
    consul.register("one", "10.0.0.1", 80, &[]).await;
    let uri = format!("consul://{}", consul.address());
    let error = "No path to datacenter";
    let known = Followed::new(&uri, "web;80;dc=mars").fails(error).await;
    assert_eq!(list(&known), None);
    let mars = format!("{uri}?dc=mars");
    assert_eq!(list(&Followed::new(&mars, "web;80").fails(error).await), None);
    // The descriptor's datacentre wins over the URI's.
    Followed::new(&mars, "web;80;dc=dc1").sees(&["10.0.0.1:80"]).await;
}

#[tokio::test]
async fn a_token_is_shown_and_a_token_file_is_read_anew() {
    const TOKEN: &str = "6ac6b1c2-5b3f-4b0a-9d41-0c5a1d9d0c1e";
    let config = json!({ "acl": {
        "enabled": true, "default_policy": "deny", "tokens": { "master": TOKEN, "agent": TOKEN },
    } });
    let consul = Consul::with(&config.to_string(), Some(TOKEN)).await;
    consul.register("one", "10.0.0.1", 80, &[]).await;
    let uri = format!("consul://{}", consul.address());
    let with = |token: &str| Options {
        consul: ConsulSettings {
            token: Some(token.to_owned().into()),
            ..ConsulSettings::default()
        },
        ..settings()
    };
    Followed::with(&uri, &with(TOKEN), "web;80").sees(&["10.0.0.1:80"]).await;
    let wrong = "00000000-0000-0000-0000-00000000beef";
    let refused = Followed::with(&uri, &with(wrong), "web;80").fails("ACL not found").await;
    assert_eq!(list(&refused), None);
    assert!(!format!("{refused:?}").contains(wrong), "a token is a secret");

    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    let web = Followed::new(&format!("{uri}?token-file={}", file.display()), "web;80");
    web.fails("No such file").await;
    fs::write(&file, "\n").unwrap();
    web.fails("is empty").await;
    fs::write(&file, wrong).unwrap();
    web.fails("ACL not found").await;
    fs::write(&file, format!("{TOKEN}\n")).unwrap();
    web.sees(&["10.0.0.1:80"]).await;
}

/// A node check that has a warning on all nodes, for example about disk space, does not empty any list.
#[tokio::test]
async fn instances_in_warning_are_used_while_none_passes() {
    let consul = Consul::start().await;
    consul.register("one", "10.0.0.1", 80, &[]).await;
    consul.register("two", "10.0.0.2", 80, &[]).await;
    let web = Followed::new(&format!("consul://{}", consul.address()), "web;80");
    let problem = |known: &Known<Endpoints>| {
        known.value.as_ref().and_then(|value| value.problem.as_deref().map(str::to_owned))
    };
    assert_eq!(problem(&web.sees(&["10.0.0.1:80", "10.0.0.2:80"]).await), None);
    consul.put("/v1/agent/check/warn/one", json!(null)).await;
    // A passing instance is preferred.
    assert_eq!(problem(&web.sees(&["10.0.0.2:80"]).await), None);
    consul.put("/v1/agent/check/fail/two", json!(null)).await;
    let known = web.sees(&["10.0.0.1:80"]).await;
    assert_eq!(
        problem(&known).unwrap(),
        r#"0 of 2 registered instances pass their checks ("one" is warning, "two" is critical); 1 in warning used instead"#
    );
    consul.put("/v1/agent/check/fail/one", json!(null)).await;
    let known = web.sees(&[]).await;
    assert!(problem(&known).unwrap().starts_with("0 of 2 registered instances pass"));
    consul.put("/v1/agent/check/pass/two", json!(null)).await;
    assert_eq!(problem(&web.sees(&["10.0.0.2:80"]).await), None);
}
