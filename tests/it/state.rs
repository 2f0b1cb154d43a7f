//! The saved table: a start while everything is down serves containers that still run, and no others.

use std::process::Command;

use anyhow::{Result, ensure};
use testbed::{Container, Embassy, Host};

use crate::{
    READY, WAIT,
    support::{counts, metric, reaches, says},
};

const CONSUL: &str = "-discovery=consul://127.0.0.1:8500";
const FILE: &str = "/var/lib/embassy/table-9999";
const VIP: &str = "172.17.0.1:80";

/// Waits until the saved table contains all these words.
fn keeps(host: &Host, words: &[&str]) -> Result<()> {
    testbed::eventually(WAIT, &format!("the kept table to have {words:?}"), || {
        let text = host.run("cat", [FILE])?;
        ensure!(words.iter().all(|word| text.contains(word)), "{text}");
        Ok(())
    })
}

/// A request that does not use the engine.
fn curl(app: &Container) -> Result<Command> {
    let mut curl = app.command("curl")?;
    curl.args(["--silent", "--fail", "--max-time", "5", "http://172.17.0.1/"]);
    Ok(curl)
}

fn register(host: &Host, web: &Container) -> Result<()> {
    host.consul()?.service("web", "web").address(web.ip()?).port(80).register()
}

fn waits_for(embassy: &Embassy, parts: &str) -> Result<()> {
    let answer = embassy.admin("/readyz")?;
    ensure!(answer.status == 503 && answer.body.contains(parts), "{answer:?}");
    Ok(())
}

#[test]
fn who_still_runs_is_served_after_a_start_while_everything_is_down() -> Result<()> {
    let host = Host::builder().docker_args(["--live-restore"]).start()?;
    let web = host.web("web").start()?;
    register(&host, &web)?;
    let net = host.network("net", ["--subnet=10.82.0.0/24"])?;
    let app = |name: &str| host.client(name).env("BACKEND_WEB", "web;80");
    let (stays, ends) = (app("stays").start()?, app("ends").start()?);
    let (moves, sides) =
        (app("moves").start()?, app("sides").network("container:stays").env("BACKEND_B", "web;81"));
    let sides = sides.start()?;
    let embassy = host.embassy(["--dnat", CONSUL])?;
    embassy.wait_ready(READY)?;
    for each in [&stays, &ends, &moves] {
        reaches(each, VIP, "web")?;
    }
    let endpoint = format!("{}:80", web.ip()?);
    keeps(&host, &[stays.id(), ends.id(), moves.id(), sides.id(), &endpoint])?;
    embassy.kill()?;

    // One changes its address while embassy is not running, and one ends while the engine is not running either.
    moves.connect(net.name())?;
    moves.disconnect("bridge")?;
    let (ended, mut curl) = (ends.pid()?, curl(&stays)?);
    host.docker_daemon().kill()?;
    host.consul_daemon().kill()?;
    host.run("kill", ["-KILL", &ended.to_string()])?;

    let embassy = host.embassy(["--dnat", CONSUL])?;
    testbed::eventually(WAIT, "an answer", || {
        let said = testbed::output(&mut curl)?;
        ensure!(said == "web", "{said:?}");
        Ok(())
    })?;
    says(
        &embassy,
        &["using the saved table until the sources answer", "consumers=2", "services=1"],
    )?;
    says(
        &embassy,
        &[
            "dropped from the saved table: no longer the same container run",
            "consumer=ends",
            "process",
        ],
    )?;
    says(
        &embassy,
        &[
            "dropped from the saved table: no longer the same container run",
            "consumer=moves",
            "other addresses",
        ],
    )?;
    // One route of `stays`, and one of the container that shares its address.
    ensure!(metric(&embassy, "embassy_routes")? == 2, "{}", embassy.log());
    waits_for(&embassy, "listing")?;
    waits_for(&embassy, "discovery")?;
    // The API reports the data in use.
    let explain = embassy.admin("/v1/explain?consumer=sides&port=80")?.json()?;
    ensure!(explain["verdict"] == "degraded", "{explain:#}");
    ensure!(explain["consumers"][0]["id"] == sides.id(), "{explain:#}");
    ensure!(explain["services"][0]["next"] == endpoint, "{explain:#}");
    ensure!(explain["findings"].to_string().contains("provider does not answer"), "{explain:#}");
    let ended = embassy.admin("/v1/explain?consumer=ends&port=80")?.json()?;
    ensure!(ended["verdict"] == "broken", "{ended:#}");
    let bindings = embassy.admin("/v1/bindings?state=routed")?.json()?;
    let of: Vec<_> =
        bindings["items"].as_array().into_iter().flatten().map(|b| &b["consumer"]).collect();
    // One name and one port. The reason is given for the other one.
    ensure!(of == ["sides", "sides"], "{bindings:#}");

    // Everything comes back, and served containers are still served.
    host.docker_daemon().start()?;
    let traffic = stays.traffic("traffic", VIP)?;
    host.consul_daemon().start()?;
    register(&host, &web)?;
    embassy.wait_ready(READY)?;
    reaches(&moves, "10.82.0.1:80", "web")?;
    let answers = traffic.stop()?;
    assert_eq!((answers.failed(), answers.from("web")), (0, answers.answered()), "{answers:?}");
    Ok(())
}

#[test]
fn containers_that_were_endpoints_are_used_after_such_a_start_as_far_as_they_run() -> Result<()> {
    let host = Host::builder().docker_args(["--live-restore"]).start()?;
    let web = |name: &str| host.web(name).label("SERVICE_80_NAME", "web").start();
    let (stays, ends) = (web("stays")?, web("ends")?);
    let app = host.client("app").env("BACKEND_WEB", "web;80").start()?;
    let run = || host.embassy(["--dnat", "-discovery=docker://"]);
    let embassy = run()?;
    embassy.wait_ready(READY)?;
    for name in ["stays", "ends"] {
        reaches(&app, VIP, name)?;
    }
    let endpoint = |of: &Container| Ok::<_, anyhow::Error>(format!("{}:80", of.ip()?));
    keeps(&host, &[app.id(), &endpoint(&stays)?, &endpoint(&ends)?])?;
    embassy.kill()?;
    let (gone, ended, mut curl) = (endpoint(&ends)?, ends.pid()?, curl(&app)?);
    let last = stays.pid()?;
    host.docker_daemon().kill()?;
    host.run("kill", ["-KILL", &ended.to_string()])?;

    let embassy = run()?;
    says(
        &embassy,
        &["using the saved table until the sources answer", "consumers=1", "services=1"],
    )?;
    says(
        &embassy,
        &["dropped from the saved table: no longer the same container run", "docker web", &gone],
    )?;
    testbed::eventually(WAIT, "an answer", || testbed::output(&mut curl).map(drop))?;
    for _ in 0..6 {
        ensure!(testbed::output(&mut curl)? == "stays", "{}", embassy.log());
    }
    // A container that ends now is no longer an endpoint, although nothing can be asked.
    host.run("kill", ["-KILL", &last.to_string()])?;
    testbed::eventually(WAIT, "no endpoint", || {
        let endpoints = embassy.admin("/v1/endpoints")?.ok()?;
        ensure!(!endpoints.contains(":80"), "{endpoints}");
        Ok(())
    })
}

#[test]
fn what_is_damaged_or_of_another_machine_is_set_aside() -> Result<()> {
    let host = Host::light()?;
    host.run("sh", ["-c", "echo one > /etc/machine-id"])?;
    let web = host.web("web").start()?;
    register(&host, &web)?;
    let app = host.client("app").env("BACKEND_WEB", "web;80").start()?;
    let run = || host.embassy(["--dnat", CONSUL]);
    let embassy = run()?;
    embassy.wait_ready(READY)?;
    keeps(&host, &[app.id()])?;
    // The last changes are written at an orderly end.
    app.remove()?;
    counts(&embassy, "embassy_table_version", 2)?;
    embassy.terminate()?;
    embassy.wait(WAIT)?;
    let kept = host.run("cat", [FILE])?;
    ensure!(!kept.contains(app.id()) && kept.contains("embassy state 1 "), "{kept}");

    for (change, reason) in [
        ("echo two > /etc/machine-id", "another machine"),
        ("echo garbage > /var/lib/embassy/table-9999", "not a state file"),
        ("truncate -s -1 /var/lib/embassy/table-9999", "checksum"),
        ("sed -i 's/^embassy state 1/embassy state 2/' /var/lib/embassy/table-9999", "format"),
    ] {
        host.run("sh", ["-c", change])?;
        let embassy = run()?;
        says(&embassy, &["saved table set aside", reason])?;
        host.run("test", ["-s", &format!("{FILE}.aside")])?;
        embassy.wait_ready(READY)?;
        keeps(&host, &["\"machine\":\"two\""])?;
        embassy.kill()?;
    }
    Ok(())
}

#[test]
fn a_disk_that_is_full_or_read_only_is_reported_and_nothing_else_suffers() -> Result<()> {
    let host = Host::light()?;
    let web = host.web("web").start()?;
    register(&host, &web)?;
    let app = host.client("app").env("BACKEND_WEB", "web;80").start()?;
    host.run("mkdir", ["/run/state"])?;
    host.run("mount", ["-t", "tmpfs", "-o", "size=16k", "none", "/run/state"])?;
    host.run("fallocate", ["--length", "16k", "/run/state/ballast"])?;
    let embassy = host.embassy(["--dnat", CONSUL, "--state-dir=/run/state"])?;
    embassy.wait_ready(READY)?;
    says(&embassy, &["cannot write the state file", "No space left"])?;
    counts(&embassy, "embassy_state_failures_total", 1)?;
    reaches(&app, VIP, "web")?;
    host.run("rm", ["/run/state/ballast"])?;
    says(&embassy, &["the state file can be written again"])?;
    let kept = host.run("cat", ["/run/state/table-9999"])?;
    ensure!(kept.contains(app.id()), "{kept}");
    embassy.kill()?;

    let embassy = host.embassy(["--dnat", CONSUL, "--state-dir=/proc/no"])?;
    embassy.wait_ready(READY)?;
    says(&embassy, &["cannot write the state file", "/proc/no"])?;
    reaches(&app, VIP, "web")?;
    embassy.kill()?;
    let embassy = host.embassy(["--dnat", CONSUL, "--state-dir=off"])?;
    embassy.wait_ready(READY)?;
    ensure!(metric(&embassy, "embassy_state_failures_total")? == 0);
    reaches(&app, VIP, "web")
}
