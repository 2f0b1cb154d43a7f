//! An upgrade in Docker: a second container with the same state directory takes over from the first one, which the engine starts again.

use std::{fs, time::Instant};

use anyhow::{Context, Result, ensure};
use testbed::{Answers, Container, Host};

use crate::{
    READY, WAIT,
    least_privilege::{bare, host, image},
    support::{ETCD, offer, reaches},
};

fn start(host: &Host, name: &str) -> Result<Container> {
    let embassy = bare(host, name)?.args([
        "--cap-add=NET_ADMIN",
        "--restart=always",
        "--volume=state:/var/lib/embassy",
    ]);
    embassy.cmd(["--dnat", "--takeover", ETCD, "--firewall=nft"]).start()
}

/// Waits until the container's log has this so many times at least.
fn says(container: &Container, what: &str, times: usize) -> Result<()> {
    testbed::eventually(
        READY,
        &format!("{} to say {what:?} {times} times", container.name()),
        || {
            let log = container.log()?;
            ensure!(log.matches(what).count() >= times, "{log}");
            Ok(())
        },
    )
}

const TAKES_OVER: &str = "took over from the running embassy";
const WAITS: &str = "another embassy has taken over from this container; waiting until it ends";
const READY_NOW: &str = "embassy is ready";

fn takeovers(host: &Host) -> Result<String> {
    let metrics = host.http("GET", "http://127.0.0.1:9990/metrics", "")?.ok()?;
    let line = metrics.lines().find_map(|line| line.strip_prefix("embassy_takeovers_total "));
    Ok(line.context("no such metric")?.to_owned())
}

#[test]
fn a_second_container_takes_over_once_and_the_first_one_stands_by() -> Result<()> {
    let (host, app) = host()?;
    image(&host)?;
    let first = start(&host, "first")?;
    reaches(&app, "172.17.0.1:80", "web").with_context(|| first.log().unwrap_or_default())?;
    says(&first, READY_NOW, 1)?;
    let (live, flood) =
        (app.live("live", "172.17.0.1:80")?, app.traffic("flood", "172.17.0.1:80")?);
    let second = start(&host, "second")?;
    says(&second, TAKES_OVER, 1)?;
    // The engine starts the first one again. It does not take over in turn, however often that is.
    says(&first, WAITS, 1)?;
    host.docker(["restart", "first"])?;
    says(&first, WAITS, 2)?;
    ensure!(!first.log()?.contains(TAKES_OVER), "{}", first.log()?);
    assert_eq!(
        (takeovers(&host)?.as_str(), second.inspect("{{.RestartCount}}")?.as_str()),
        ("1", "0")
    );
    for (name, traffic) in [("live", live), ("flood", flood)] {
        let answers = traffic.stop()?;
        ensure!(answers.failed() == 0 && answers.from("web") > 0, "{name}: {answers:?}");
    }
    // Restarted, the second one is still the later one, whatever the first one has done meanwhile.
    host.docker(["restart", "second"])?;
    says(&second, READY_NOW, 2)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    ensure!(!first.log()?.contains(TAKES_OVER), "{}", first.log()?);
    // Without it, the first one serves.
    let before = first.log()?.matches(READY_NOW).count();
    second.remove()?;
    says(&first, READY_NOW, before + 1)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    // And is taken over from again.
    let third = start(&host, "third")?;
    says(&third, TAKES_OVER, 1)?;
    reaches(&app, "172.17.0.1:80", "web")
}

/// How long new connections are refused while the engine stops embassy and starts it again, with a connection that never ends.
#[test]
#[ignore = "prints figures"]
fn figures_of_a_restart() -> Result<()> {
    let (host, app) = host()?;
    image(&host)?;
    let pool = host.server("pool", ["hang"]).start()?;
    offer(&host, "pool", pool.ip()?)?;
    let pooling = host.client("pooling").env("BACKEND_POOL", "/services/pool;81").start()?;
    let _embassy = start(&host, "embassy")?;
    reaches(&app, "172.17.0.1:80", "web")?;
    let _pooled = pooling.spawn("pooled", ["testbed", "peer", "recv", "172.17.0.1:81"])?;
    testbed::eventually(WAIT, "the pooled connection", || {
        let metrics = host.http("GET", "http://127.0.0.1:9990/metrics", "")?.ok()?;
        ensure!(metrics.contains("embassy_connections_active 1\n"));
        Ok(())
    })?;
    let end = host.dir().join("dials.end");
    let mut dials = app.command(testbed::testbed_program()?)?;
    // A hundred a second: each one that is refused is 10 ms.
    dials.args(["peer", "get", "172.17.0.1:80", "-c", "1", "--pause-ms", "10"]);
    dials.arg("--until").arg(&end);
    let dials = host.spawn("dials", dials)?;
    let begun = Instant::now();
    host.docker(["restart", "--time=20", "embassy"])?;
    println!("docker restart took {:?}", begun.elapsed());
    reaches(&app, "172.17.0.1:80", "web")?;
    fs::write(&end, "")?;
    dials.wait(WAIT)?;
    let answers = Answers::read(&dials.log())?;
    println!("{} answered, {} failed: {answers:?}", answers.answered(), answers.failed());
    ensure!(answers.from("web") == answers.answered(), "{answers:?}");
    Ok(())
}
