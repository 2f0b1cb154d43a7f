//! Connections, and their routes and endpoints.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use testbed::Host;

use super::{ETCD, OpenConnections, Path, listens, metric, vip, wait_ended};
use crate::{
    READY, WAIT,
    support::{counts, reaches, web},
};

const RED: &str = "/services/red;80";

#[test]
fn a_consumer_that_stops_takes_its_connections_and_its_route_along() -> Result<()> {
    let path = Path::new(&[(1001, "greet --name joe")])?;
    let held = OpenConnections::open(&path.app, "held", &vip(1001), 10)?;
    held.greetings()?;
    assert_eq!(metric(&path.embassy, "embassy_connections_active")?, 10);
    path.app.kill()?;
    for series in ["embassy_connections_active", "embassy_routes"] {
        wait_metric(&path, series, 0)?;
    }
    Ok(())
}

/// As pause containers of Nomad and Kubernetes: another program than the engine assigned the address.
#[test]
fn a_container_to_which_the_engine_gave_no_address_is_served_at_the_one_that_it_has() -> Result<()>
{
    let host = Host::light()?;
    web(&host, "red")?;
    let asking = |name: &str| host.client(name).network("none").env("BACKEND_RED", RED).start();
    let early = asking("early")?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    reaches(&early, vip(80), "red")?;
    let late = asking("late")?;
    reaches(&late, vip(80), "red")?;
    let skipped = r#"embassy_skipped_total{what="binding"}"#;
    ensure!(metric(&embassy, skipped)? == 0, "they are served");
    // A container that cannot be served is reported and counted.
    late.exec(["ip", "addr", "flush", "dev", "eth0"])?;
    // An engine inside a container has its own docker0, which is not this host's.
    late.exec(["ip", "addr", "add", "172.17.0.1/32", "dev", "eth0"])?;
    counts(&embassy, skipped, 1)?;
    let host_is = embassy.admin("/v1/explain?consumer=172.17.0.1&port=80")?.body;
    ensure!(!host_is.contains("goes_to"), "{host_is}");
    let explained = embassy.admin("/v1/explain?consumer=late&port=80")?.ok()?;
    ensure!(explained.contains("no address"), "{explained}");
    reaches(&early, vip(80), "red")
}

/// The consumer can send neither an end nor a reset.
#[test]
fn the_connections_of_a_consumer_that_loses_its_address_are_reset() -> Result<()> {
    let path = Path::on(Host::start()?, &[], &[(1001, "greet --name joe")])?;
    let held = OpenConnections::open(&path.app, "held", &vip(1001), 10)?;
    held.greetings()?;
    path.app.disconnect("bridge")?;
    wait_ended(&path.embassy, "route_gone", 10)?;
    wait_metric(&path, "embassy_connections_active", 0)?;
    testbed::eventually(WAIT, "resets at the endpoint", || {
        let log = path.endpoints.log()?;
        // Of the proxy, not of the one that waited for the server.
        let from_proxy = |line: &&str| line.contains("172.17.0.1]:") && line.contains("reset by");
        let resets = log.lines().filter(from_proxy).count();
        ensure!(resets == 10, "{resets} in {log}");
        Ok(())
    })
}

#[test]
fn the_binding_says_what_becomes_of_the_connections_of_a_removed_endpoint() -> Result<()> {
    let host = Host::light()?;
    let etcd = host.etcd()?;
    let bindings = [(81, "drain=keep"), (82, "drain=kill"), (83, "drain=2")];
    let mut app = host.client("app");
    for (port, drain) in bindings {
        app = app.env(&format!("BACKEND_{port}"), &format!("/services/greet;{port};{drain}"));
    }
    let app = app.start()?;
    for name in ["stays", "goes"] {
        let greeter = host.server(name, ["greet", "--name", name]).start()?;
        etcd.v3().put(&format!("/services/greet/{name}"), &format!("{}:80", greeter.ip()?))?;
        listens(&app, &format!("{}:80", greeter.ip()?))?;
    }
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    let mut held = Vec::new();
    for (port, _) in bindings {
        let two = OpenConnections::open(&app, &port.to_string(), &vip(port), 2)?;
        let greetings = serde_json::json!({ "hello from stays": 1, "hello from goes": 1 });
        assert_eq!(two.greetings()?, greetings);
        held.push(two);
    }

    let start = Instant::now();
    etcd.v3().delete("/services/greet/goes")?;
    let reset = || ("reset".to_owned(), "hello from goes".to_owned());
    for (n, what) in [(1, "drain=kill"), (2, "drain=2")] {
        testbed::eventually(WAIT, what, || {
            let ended = held[n].ended()?;
            ensure!(ended == [reset()], "{ended:?}");
            Ok(())
        })?;
    }
    assert!(start.elapsed() >= Duration::from_secs(2), "{:?}", start.elapsed());
    wait_ended(&embassy, "endpoint_gone", 2)?;
    assert_eq!(held[0].ended()?, []);
    assert_eq!(metric(&embassy, "embassy_connections_active")?, 4);
    Ok(())
}

#[test]
fn consumers_and_endpoints_may_speak_ipv6() -> Result<()> {
    let host = Host::builder().ipv6(true).start()?;
    let etcd = host.etcd()?;
    let (four, six) = (host.web("four").start()?, host.web("six").start()?);
    etcd.v3().put("/services/web/four", &format!("{}:80", four.ip()?))?;
    etcd.v3().put("/services/web/six", &format!("[{}]:80", six.ip6()?))?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    for vip in ["[fd00:d0c::1]:80", "172.17.0.1:80"] {
        let answers = app.get(vip).times(10).run()?;
        assert_eq!((answers.from("four"), answers.from("six")), (5, 5), "{vip}: {answers:?}");
    }
    Ok(())
}

fn wait_metric(path: &Path, series: &str, value: u64) -> Result<()> {
    testbed::eventually(WAIT, &format!("{series} to be {value}"), || {
        let now = metric(&path.embassy, series)?;
        ensure!(now == value, "{now}");
        Ok(())
    })
}
