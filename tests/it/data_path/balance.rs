//! Which endpoint gets a connection, and what happens to endpoints that do not answer.

use std::{thread, time::Duration};

use anyhow::{Result, ensure};
use embassy::balance::EndpointState;
use testbed::{Container, Host};

use super::{ETCD, OpenConnections, listens, vip};
use crate::{READY, WAIT};

#[test]
fn two_consumers_use_one_port_for_two_services_and_none_crosses() -> Result<()> {
    let host = Host::light()?;
    let etcd = host.etcd()?;
    let mut apps = Vec::new();
    for name in ["red", "blue"] {
        for n in 1..=2 {
            let web = host.server(&format!("{name}-{n}"), ["http", "--name", name]).start()?;
            etcd.v3().put(&format!("/services/{name}/{n}"), &format!("{}:80", web.ip()?))?;
        }
        let app = host.client(&format!("app-{name}"));
        apps.push((name, app.env("BACKEND_WEB", &format!("/services/{name};8080")).start()?));
    }
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;

    thread::scope(|scope| {
        let start = |(name, app): &(&'static str, Container)| {
            let (name, app) = (*name, app.clone());
            scope.spawn(move || Ok((name, app.get(vip(8080)).times(1_000).at_once(8).run()?)))
        };
        let running: Vec<_> = apps.iter().map(start).collect();
        for thread in running {
            let result: Result<_> = thread.join().expect("a client does not panic");
            let (name, answers) = result?;
            assert_eq!((answers.from(name), answers.failed()), (1_000, 0), "{name}: {answers:?}");
        }
        Ok(())
    })
}

#[test]
fn leastconn_counts_the_connections_of_all_consumers() -> Result<()> {
    let host = Host::light()?;
    let etcd = host.etcd()?;
    let greeter = |name: &'static str| {
        let greeter = host.server(name, ["greet", "--name", name]).start()?;
        Ok::<_, anyhow::Error>(format!("{}:80", greeter.ip()?))
    };
    let (old, new) = (greeter("old")?, greeter("new")?);
    etcd.v3().put("/services/greet/old", &old)?;
    let app = |name| host.client(name).env("BACKEND_G", "/services/greet;80;lb=leastconn").start();
    let (one, other) = (app("one")?, app("other")?);
    listens(&one, &old)?;
    listens(&one, &new)?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;

    let held = OpenConnections::open(&one, "held", &vip(80), 10)?;
    assert_eq!(held.greetings()?, serde_json::json!({ "hello from old": 10 }));
    etcd.v3().put("/services/greet/new", &new)?;
    // A connection made here ends at once, and no longer counts.
    testbed::eventually(WAIT, "an answer of the new endpoint", || {
        let said = other.peer(["send", &vip(80), "--bytes", "0"])?;
        ensure!(said["answer"] == "hello from new\n", "{said}");
        Ok(())
    })?;
    // No event reports the end of its slow start.
    thread::sleep(Duration::from_millis(EndpointState::SLOW_START));
    // This consumer has no connection to either endpoint. The other consumer has ten to the old one.
    let more = OpenConnections::open(&other, "more", &vip(80), 10)?;
    assert_eq!(more.greetings()?, serde_json::json!({ "hello from new": 10 }));
    let even = OpenConnections::open(&other, "even", &vip(80), 10)?;
    assert_eq!(even.greetings()?, serde_json::json!({ "hello from new": 5, "hello from old": 5 }));
    Ok(())
}

#[test]
fn no_request_fails_while_one_endpoint_of_three_does() -> Result<()> {
    let host = Host::light()?;
    let etcd = host.etcd()?;
    for name in ["web-1", "web-2"] {
        let web = host.web(name).start()?;
        for service in ["refusing", "silent", "unreachable"] {
            etcd.v3().put(&format!("/services/{service}/{name}"), &format!("{}:80", web.ip()?))?;
        }
    }
    let closed = host.client("closed").start()?;
    let silent = host.web("silent").start()?;
    for rule in [
        "add table inet silent",
        "add chain inet silent in { type filter hook input priority 0; policy drop; }",
    ] {
        testbed::output(silent.command("nft")?.arg(rule))?;
    }
    etcd.v3().put("/services/refusing/bad", &format!("{}:80", closed.ip()?))?;
    etcd.v3().put("/services/silent/bad", &format!("{}:80", silent.ip()?))?;
    etcd.v3().put("/services/unreachable/bad", "172.17.255.254:80")?;
    let services = [("refusing", 81), ("silent", 82), ("unreachable", 83)];
    let app = services.iter().fold(host.client("app"), |app, (service, port)| {
        app.env(&format!("BACKEND_{port}"), &format!("/services/{service};{port}"))
    });
    let app = app.start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;

    for (service, port) in services {
        let answers = app.get(vip(port)).times(1_000).at_once(8).run()?;
        assert_eq!((answers.answered(), answers.failed()), (1_000, 0), "{service}: {answers:?}");
        // The two working endpoints share the turns of the third.
        for name in ["web-1", "web-2"] {
            assert!(answers.from(name) >= 400, "{service}: {answers:?}");
        }
    }
    Ok(())
}
