//! Connections that are held until their container is known.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testbed::{Container, Embassy, FakeEngine, Host, Mood};

use crate::{
    READY, WAIT,
    support::{ETCD, counts, metric, reaches, says, web},
};

const VIP: &str = "172.17.0.1:80";
/// Longer than all timeouts of these tests.
const HOLD: &str = "--hold=10m";

/// A host with an engine that can be made to answer slowly.
fn host() -> Result<(Host, Embassy)> {
    let host = Host::light()?;
    web(&host, "web")?;
    let embassy = host.embassy(["--dnat", ETCD, HOLD])?;
    embassy.wait_ready(READY)?;
    Ok((host, embassy))
}

fn engine(host: &Host) -> Result<&FakeEngine> {
    host.fake_engine().context("a light host")
}

/// Gives a container another address than the engine did.
fn moves(container: &Container, address: &str) -> Result<()> {
    let add = format!("address add {address}/16 dev eth0");
    for change in ["address flush dev eth0", &add, "route add default via 172.17.0.1"] {
        testbed::output(container.command("ip")?.args(change.split(' ')))?;
    }
    Ok(())
}

fn refused(embassy: &Embassy, outcome: &str) -> Result<u64> {
    metric(embassy, &format!("embassy_connections_total{{outcome=\"{outcome}\"}}"))
}

#[test]
fn the_container_that_gets_an_address_is_not_served_what_another_dialled_from_it() -> Result<()> {
    let (host, embassy) = host()?;
    let thief = host.client("thief").start()?;
    // The engine assigns the lowest free address next.
    let next = format!("172.17.0.{}", thief.ip()?.octets()[3] + 1);
    moves(&thief, &next)?;
    engine(&host)?.answers("/containers/json", Mood::Hangs);
    let stolen =
        thief.spawn("stolen", ["testbed", "peer", "get", VIP, "--timeout-ms", "600000"])?;
    counts(&embassy, "embassy_connections_held", 1)?;
    assert_eq!(stolen.exited()?, None, "it waits");

    // Its address goes to another container, which declared that service.
    testbed::output(thief.command("ip")?.args(["link", "set", "eth0", "down"]))?;
    let owner = host.client("owner").env("BACKEND_WEB", "/services/web;80").start()?;
    assert_eq!(owner.ip()?.to_string(), next);
    engine(&host)?.answers("/containers/json", None);
    counts(&embassy, "embassy_connections_total{outcome=\"unknown_consumer\"}", 1)?;
    reaches(&owner, VIP, "web")?;
    let started = "embassy_connections_started_total";
    let own = metric(&embassy, started)?;
    reaches(&owner, VIP, "web")?;
    assert_eq!(metric(&embassy, started)?, own + 1);
    assert_eq!(metric(&embassy, "embassy_connections_held")?, 0);
    Ok(())
}

#[test]
fn a_container_that_dials_before_it_is_known_is_served_what_it_dialled() -> Result<()> {
    let (host, embassy) = host()?;
    for n in 0..5 {
        let name = format!("first-{n}");
        let first = host.container(&name).env("BACKEND_WEB", "/services/web;80");
        let get = format!("testbed peer get {VIP} -n 20 -c 20 --timeout-ms 60000; sleep 1000");
        let first = first.cmd(["sh", "-c", &get]).start()?;
        testbed::eventually(WAIT, "the answers", || {
            let log = first.log()?;
            let line = log.lines().next().filter(|_| log.contains('\n')).context("none yet")?;
            let answers = testbed::Answers::read(line)?;
            ensure!((answers.from("web"), answers.failed()) == (20, 0), "{answers:?}");
            Ok(())
        })?;
    }
    assert_eq!(refused(&embassy, "unknown_consumer")?, 0);
    Ok(())
}

#[test]
fn a_stranger_waits_only_for_the_engines_word() -> Result<()> {
    let (host, embassy) = host()?;
    let stranger = host.client("stranger").start()?;
    moves(&stranger, "172.17.200.1")?;
    // The hold is longer than the probe's timeout, so the reset follows from the engine's answer.
    let probe = ["probe", VIP, "--timeout-ms", "60000", "--wait-ms", "60000"];
    assert_eq!(stranger.peer(probe)?["outcome"], "reset");
    assert_eq!(refused(&embassy, "unknown_consumer")?, 1);

    // However often it connects, the engine gets few requests, and other containers' first connections are served.
    let lists = || anyhow::Ok(engine(&host)?.asked("/containers/json"));
    let (before, start) = (lists()?, std::time::Instant::now());
    let flood = stranger.get(VIP).times(3_000).at_once(300).timeout(Duration::from_secs(60));
    let flood = flood.run()?;
    assert_eq!((flood.answered(), flood.failed()), (0, 3_000), "{flood:?}");
    ensure!(!flood.failures.contains_key("read: timeout"), "{flood:?}");
    let asked = lists()? - before;
    ensure!(asked as u64 <= start.elapsed().as_secs() + 2, "{asked} in {:?}", start.elapsed());
    let refused = refused(&embassy, "unknown_consumer")? - 1 + refused(&embassy, "too_many_held")?;
    assert_eq!(refused, 3_000);
    Ok(())
}

#[test]
fn of_those_that_wait_one_source_leaves_places_to_others() -> Result<()> {
    let (host, embassy) = host()?;
    let (many, other) = (host.client("many").start()?, host.client("other").start()?);
    moves(&many, "172.17.200.1")?;
    moves(&other, "172.17.200.2")?;
    engine(&host)?.answers("/containers/json", Mood::Hangs);
    let _many = many.spawn("many", ["testbed", "peer", "hold", VIP, "-n", "400", "-c", "400"])?;
    counts(&embassy, "embassy_connections_total{outcome=\"too_many_held\"}", 400 - 144)?;
    assert_eq!(metric(&embassy, "embassy_connections_held")?, 144);
    let _other = other.spawn("other", ["testbed", "peer", "hold", VIP, "-n", "1"])?;
    counts(&embassy, "embassy_connections_held", 145)?;
    assert_eq!(refused(&embassy, "too_many_held")?, 400 - 144);
    says(&embassy, &["embassy captures connections"])
}
