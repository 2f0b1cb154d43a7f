//! The limits for connections and descriptors are reached.

use std::time::Duration;

use anyhow::{Result, ensure};
use testbed::{Container, Embassy};

use super::{OpenConnections, Path, ended, line, metric, vip, wait_ended};
use crate::{
    WAIT,
    support::{says, spins_not},
};

#[test]
fn one_connection_more_than_allowed_is_reset() -> Result<()> {
    let flags = ["--max-connections=20", "--max-connections-per-consumer=20"];
    let path = Path::with(&flags, &[(1001, "greet --name joe")])?;
    let held = OpenConnections::open(&path.app, "held", &vip(1001), 20)?;
    assert_eq!(held.greetings()?, serde_json::json!({ "hello from joe": 20 }));
    assert_eq!(path.app.probe(vip(1001))?.outcome, "reset");
    assert_eq!(ended(&path.embassy, "too_many_connections")?, 1);
    assert_eq!(metric(&path.embassy, "embassy_connections_active")?, 20);
    assert_eq!(held.ended()?, []);
    Ok(())
}

#[test]
fn without_descriptors_accepting_slows_down_and_recovers() -> Result<()> {
    const BYTES: &str = "20000000";
    let live = format!("duplex --bytes {BYTES} --seed 1");
    let path = Path::new(&[(1001, "greet --name joe"), (1002, &live)])?;
    let target = vip(1002);
    // It starts before the shortage and ends after it.
    let words = ["duplex", &target, "--bytes", BYTES, "--seed", "1", "--rate", "4000000"];
    let live = path.app.spawn("live", ["testbed", "peer"].into_iter().chain(words))?;
    let holder = path.host.client("holder").env("BACKEND_G", "/services/1001;1001").start()?;
    testbed::eventually(WAIT, "the holder's route", || {
        ensure!(holder.probe(vip(1001))?.outcome == "data");
        Ok(())
    })?;
    let held = OpenConnections::open(&holder, "held", &vip(1001), 50)?;
    assert_eq!(held.greetings()?, serde_json::json!({ "hello from joe": 50 }));

    // Two more connections use up all descriptors.
    let limit = open_descriptors(&path.embassy)? + 5;
    set_limit(&path.embassy, limit)?;
    let waiting = OpenConnections::open(&path.app, "waiting", &vip(1001), 20)?;
    testbed::eventually(WAIT, "the shortage", || {
        ensure!(path.embassy.log().contains("cannot accept"));
        Ok(())
    })?;
    spins_not(&path.embassy)?;

    // Connections that end make room for those that wait. No descriptor became free otherwise.
    assert_eq!(held.ended()?, []);
    holder.kill()?;
    let greetings = waiting.greetings()?;
    let greeted = greetings["hello from joe"].as_u64().unwrap_or_default();
    assert!(greeted >= 10, "{greetings}");
    wait_answer(&path.app)?;
    let status = live.wait(Duration::from_secs(60))?;
    ensure!(status.success(), "{status}: {}", live.log());
    let said: serde_json::Value = serde_json::from_str(&live.log())?;
    assert_eq!(said["answer"], line(&said["sent"]));
    assert_eq!(said["received"], said["sent"]);
    wait_ended(&path.embassy, "endpoint_reset", 0)
}

/// Every consumer's connection to an endpoint has embassy's address, and its own source port.
#[test]
fn source_ports_that_run_out_are_said_with_what_helps() -> Result<()> {
    let path = Path::new(&[(1001, "greet --name joe")])?;
    path.host.run("sh", ["-c", "echo 40000 40009 >/proc/sys/net/ipv4/ip_local_port_range"])?;
    // The last one gets no port.
    let _held = OpenConnections::open(&path.app, "held", &vip(1001), 11)?.greetings()?;
    says(&path.embassy, &["this host cannot open a connection", "ip_local_port_range"])?;
    ensure!(ended(&path.embassy, "local_error")? > 0);
    assert_eq!(metric(&path.embassy, "embassy_connections_active")?, 10);
    Ok(())
}

fn wait_answer(app: &Container) -> Result<()> {
    testbed::eventually(WAIT, "a greeting after the shortage", || {
        let outcome = app.probe(vip(1001))?.outcome;
        ensure!(outcome == "data", "{outcome}");
        Ok(())
    })
}

fn open_descriptors(embassy: &Embassy) -> Result<usize> {
    Ok(std::fs::read_dir(format!("/proc/{}/fd", embassy.pid()))?.count())
}

/// Sets the soft limit of a running process.
fn set_limit(embassy: &Embassy, descriptors: usize) -> Result<()> {
    let mut prlimit = std::process::Command::new("prlimit");
    prlimit.arg(format!("--pid={}", embassy.pid())).arg(format!("--nofile={descriptors}:"));
    testbed::output(&mut prlimit).map(drop)
}
