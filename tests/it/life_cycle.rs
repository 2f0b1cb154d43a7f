//! From the start to the end: what is waited for, what is logged, and in which order things stop.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use testbed::{Embassy, Host};

use crate::{
    READY, WAIT,
    capture::{IPTABLES, NFT},
    commands::run,
    support::{
        ETCD, SBIN, counts, ends, metric, offer, reaches, restored, says, web, with_programs,
        without_programs,
    },
};

/// Waits until `/readyz` names exactly these parts as not ready.
fn waits_for(embassy: &Embassy, parts: &[&str]) -> Result<()> {
    testbed::eventually(READY, &format!("/readyz to name {parts:?}"), || {
        let answer = embassy.admin("/readyz")?;
        let body: Value = serde_json::from_str(&answer.body).context(answer.body)?;
        let ready = parts.is_empty();
        ensure!(answer.status == if ready { 200 } else { 503 }, "status {}", answer.status);
        ensure!(body["ready"] == ready && body["waiting_for"] == json!(parts), "{body}");
        Ok(())
    })
}

#[test]
fn it_starts_while_everything_is_down_and_is_ready_when_all_is_up() -> Result<()> {
    let host = Host::start()?;
    let app = host
        .client("app")
        .arg("--restart=always")
        .env("BACKEND_CONSUL", "web;80")
        .env("BACKEND_ETCD", "/services/web;81;via=etcd")
        .start()?;
    host.docker_daemon().stop()?;
    let embassy = host.embassy(["--dnat", "-discovery=consul://127.0.0.1:8500", ETCD])?;
    waits_for(&embassy, &["capture", "discovery", "listing"])?;
    assert_eq!(embassy.admin("/healthz")?.ok()?, "ok\n");
    says(&embassy, &["source has not answered yet", "docker"])?;

    host.docker_daemon().start()?;
    // It does what is possible: there is no endpoint yet.
    waits_for(&embassy, &["discovery"])?;
    let awaited: Value = serde_json::from_str(&embassy.admin("/readyz")?.body)?;
    assert_eq!(awaited["sources"], json!(["consul web", "etcd /services/web"]));
    let answers = app.get("172.17.0.1:80").run()?;
    assert_eq!(answers.failures.get("read: reset"), Some(&1), "{answers:?}");

    let web = host.web("web").start()?;
    host.consul()?.service("web", "web").address(web.ip()?).port(80).register()?;
    reaches(&app, "172.17.0.1:80", "web")?;
    waits_for(&embassy, &["discovery"])?;

    // A server that accepts connections and never answers. A frozen etcd might have answered before.
    let silent = host.spawn("silent", {
        let mut command = host.command(testbed::testbed_program()?);
        command.args(["peer", "hang", "--port", "2379"]);
        command
    })?;
    reaches(&app, "172.17.0.1:80", "web")?;
    waits_for(&embassy, &["discovery"])?;
    silent.kill()?;
    offer(&host, "web", web.ip()?)?;
    waits_for(&embassy, &[])?;
    reaches(&app, "172.17.0.1:81", "web")?;

    // Once ready, embassy stays ready when sources fail later.
    host.etcd_daemon().kill()?;
    host.consul_daemon().kill()?;
    counts(&embassy, r#"embassy_source_failures_total{source="consul web"}"#, 1)?;
    waits_for(&embassy, &[])?;
    reaches(&app, "172.17.0.1:80", "web")
}

#[test]
fn one_silent_discovery_does_not_hold_up_the_other() -> Result<()> {
    let host = Host::light()?;
    let web = host.web("web").start()?;
    host.consul()?.service("web", "web").address(web.ip()?).port(80).register()?;
    host.etcd()?;
    host.etcd_daemon().pause()?;
    let app = host.client("app").env("BACKEND_CONSUL", "web;80");
    let app = app.env("BACKEND_ETCD", "/services/web;81;via=etcd").start()?;
    let embassy = host.embassy(["--dnat", "-discovery=consul://127.0.0.1:8500", ETCD])?;
    reaches(&app, "172.17.0.1:80", "web")?;
    waits_for(&embassy, &["discovery"])
}

#[test]
fn it_stops_in_order() -> Result<()> {
    let host = Host::light()?;
    // Five seconds of data, once the connection's buffers are full.
    let slow =
        host.server("slow", ["source", "--bytes", "5000000", "--rate", "1000000"]).start()?;
    offer(&host, "slow", slow.ip()?)?;
    let hang = host.server("hang", ["hang"]).start()?;
    offer(&host, "hang", hang.ip()?)?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_SLOW", "/services/slow;80");
    let app = app.env("BACKEND_HANG", "/services/hang;81").env("BACKEND_WEB", "/services/web;82");
    let app = app.start()?;
    let start = |drain: &str| {
        let embassy = host.embassy(["--dnat", ETCD, drain])?;
        embassy.wait_ready(READY)?;
        reaches(&app, "172.17.0.1:82", "web")?;
        anyhow::Ok(embassy)
    };
    let dial = |embassy: &Embassy, name: &str, target: &str| {
        let before = metric(embassy, "embassy_connections_active")?;
        let held = app.spawn(name, ["testbed", "peer", "recv", target])?;
        counts(embassy, "embassy_connections_active", before + 1)?;
        anyhow::Ok(held)
    };
    let no_rules = || {
        testbed::eventually(WAIT, "the rules to go", || {
            let rules = host.run("iptables-save", [""; 0])?;
            ensure!(!rules.contains("EMBASSY"), "{rules}");
            Ok(())
        })
    };

    // An open connection gets its time, and all its bytes. Then nothing is left.
    let embassy = start("--drain=60s")?;
    let held = dial(&embassy, "slow", "172.17.0.1:80")?;
    embassy.terminate()?;
    assert!(held.wait(WAIT)?.success());
    assert!(held.log().contains("5000000"), "{}", held.log());
    assert_eq!(embassy.wait(WAIT)?.code(), Some(0));
    no_rules()?;
    ends(&app, "172.17.0.1:80", "refused")?;
    ends(&app, "172.17.0.1:9999", "refused")?;

    // A connection that does not end is reset after the drain time.
    let embassy = start("--drain=1s")?;
    let held = dial(&embassy, "hang-1", "172.17.0.1:81")?;
    embassy.terminate()?;
    assert_eq!(embassy.wait(WAIT)?.code(), Some(0));
    assert!(!held.wait(WAIT)?.success(), "a reset is an error, not an end");

    // It is reset at once after a second signal.
    let embassy = start("--drain=1h")?;
    let held = dial(&embassy, "hang-2", "172.17.0.1:81")?;
    embassy.terminate()?;
    says(&embassy, &["waiting for connections to end", "drain_s=3600.0"])?;
    // Who asks meanwhile is refused, and goes elsewhere; who dials is served.
    assert!(embassy.admin("/readyz").is_err());
    reaches(&app, "172.17.0.1:82", "web")?;
    let (text, code) = run(&host, &["wait", "/services/web", "--timeout=0"])?;
    ensure!(code == Some(1) && text.contains("127.0.0.1:9990"), "{code:?}: {text}");
    assert_eq!((embassy.exited()?, held.exited()?), (None, None));
    embassy.terminate()?;
    assert_eq!(embassy.wait(WAIT)?.code(), Some(0));
    assert!(!held.wait(WAIT)?.success());
    no_rules()
}

#[test]
fn until_the_drain_is_over_new_connections_are_served_and_none_is_refused() -> Result<()> {
    let host = Host::light()?;
    let hang = host.server("hang", ["hang"]).start()?;
    offer(&host, "hang", hang.ip()?)?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_HANG", "/services/hang;81");
    let app =
        app.env("BACKEND_NFT", "/services/nft;82").env("BACKEND_IPTABLES", "/services/iptables;83");
    let app = app.env("BACKEND_WEB", "/services/web;80").start()?;
    for (firewall, name, port) in [(NFT, "nft", 82), (IPTABLES, "iptables", 83)] {
        let pool = host.server(name, ["hang"]).start()?;
        offer(&host, name, pool.ip()?)?;
        let embassy =
            host.embassy(["--dnat", ETCD, firewall, "--drain=1h", "--connection-log=all"])?;
        embassy.wait_ready(READY)?;
        reaches(&app, "172.17.0.1:80", "web")?;
        // As in a connection pool: it never ends by itself.
        let target = format!("172.17.0.1:{port}");
        let pooled = app.spawn("pooled", ["testbed", "peer", "recv", &target])?;
        counts(&embassy, "embassy_connections_active", 1)?;
        embassy.terminate()?;
        says(&embassy, &["waiting for connections to end", "live=1"])?;
        let answers = app.get("172.17.0.1:80").times(30).run()?;
        ensure!(answers.from("web") == 30 && answers.failed() == 0, "{answers:?}");
        // A container that starts meanwhile is served too.
        let late = host.client("late").env("BACKEND_WEB", "/services/web;80").start()?;
        reaches(&late, "172.17.0.1:80", "web")?;
        assert_eq!(embassy.exited()?, None);
        // Younger connections do not delay the end.
        let young =
            app.spawn(&format!("young-{name}"), ["testbed", "peer", "recv", "172.17.0.1:81"])?;
        testbed::eventually(WAIT, "the younger one to be open", || {
            let open = hang.exec(["sh", "-c", "cat /proc/net/tcp /proc/net/tcp6"])?;
            ensure!(
                open.lines().any(|line| line.contains(":0050 ") && line.contains(" 01 ")),
                "{open}"
            );
            Ok(())
        })?;
        assert_eq!(pooled.exited()?, None);
        pool.kill()?;
        assert_eq!(embassy.wait(WAIT)?.code(), Some(0));
        says(&embassy, &["destination=172.17.0.1:81", "outcome=\"shutdown\""])?;
        if firewall == NFT {
            assert!(!young.wait(WAIT)?.success(), "it was reset");
        }
        nothing_is_left(&host)?;
        late.remove()?;
    }
    Ok(())
}

/// Checks that no rule of embassy is left.
fn nothing_is_left(host: &Host) -> Result<()> {
    for (program, args) in [("iptables-save", vec![]), ("nft", vec!["list", "ruleset"])] {
        let rules = host.run(program, args)?.to_lowercase();
        ensure!(!rules.contains("embassy"), "{rules}");
    }
    Ok(())
}

#[test]
fn no_signal_that_can_be_caught_leaves_rules_behind() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    // Rules that do not disappear with the process.
    let start = || {
        let embassy = host.embassy(["--dnat", ETCD, IPTABLES])?;
        embassy.wait_ready(READY)?;
        reaches(&app, "172.17.0.1:80", "web")?;
        anyhow::Ok(embassy)
    };
    let send = |embassy: &Embassy, signal: i32| {
        testbed::output(
            Command::new("kill").args([format!("-{signal}"), embassy.pid().to_string()]),
        )
    };
    let embassy = start()?;
    // USR1, USR2, PIPE, ALRM, STKFLT, XFSZ, VTALRM, PROF, IO, and some of the real-time signals (man 7 signal).
    for signal in [10, 12, 13, 14, 16, 25, 26, 27, 29, 34, 35, 50, 64] {
        send(&embassy, signal)?;
    }
    // They have arrived when this one has.
    embassy.signal(testbed::Signal::HUP)?;
    says(&embassy, &["resync requested via SIGHUP"])?;
    assert_eq!((embassy.exited()?, restored(&embassy)?), (None, 0));
    reaches(&app, "172.17.0.1:80", "web")?;
    embassy.terminate()?;
    assert_eq!(embassy.wait(WAIT)?.code(), Some(0), "{}", embassy.log());
    nothing_is_left(&host)?;
    // INT, QUIT, XCPU, PWR.
    for signal in [2, 3, 24, 30] {
        let embassy = start()?;
        send(&embassy, signal)?;
        assert_eq!(embassy.wait(WAIT)?.code(), Some(0), "{signal}: {}", embassy.log());
        nothing_is_left(&host)?;
    }
    Ok(())
}

#[test]
fn a_hangup_has_every_source_read_again_and_disturbs_nothing() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let embassy = host.embassy(["--dnat", ETCD, "--resync=3600"])?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    let answers = |source: &str| {
        metric(&embassy, &format!("embassy_source_answers_total{{source=\"{source}\"}}"))
    };
    let sources = ["provider", "etcd /services/web"];
    let before = sources.map(|source| answers(source).unwrap_or_default());
    let traffic = app.traffic("hangup", "172.17.0.1:80")?;
    embassy.signal(testbed::Signal::HUP)?;
    says(&embassy, &["resync requested via SIGHUP"])?;
    for (source, before) in sources.into_iter().zip(before) {
        testbed::eventually(WAIT, &format!("{source} to be read again"), || {
            let now = answers(source)?;
            ensure!(now > before, "{now} answers");
            Ok(())
        })?;
        let failures = format!("embassy_source_failures_total{{source=\"{source}\"}}");
        assert_eq!(metric(&embassy, &failures)?, 0);
    }
    let answers = traffic.stop()?;
    ensure!(answers.failed() == 0 && answers.answered() > 0, "{answers:?}");
    assert_eq!((restored(&embassy)?, embassy.exited()?), (0, None));
    Ok(())
}

#[test]
fn a_stop_during_the_start_leaves_nothing() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    for moment in ["embassy starts", "proxy listens", "admin API listens", "initial routing table"]
    {
        // With a separate log.
        let embassy = host.spawn(moment, host.embassy_command(["--dnat", ETCD])?)?;
        testbed::eventually(WAIT, &format!("{moment:?} in the log"), || {
            let log = embassy.log();
            ensure!(log.contains(moment), "{log}");
            Ok(())
        })?;
        embassy.signal(testbed::Signal::TERM)?;
        assert_eq!(embassy.wait(WAIT)?.code(), Some(0), "{moment}: {}", embassy.log());
        nothing_is_left(&host).context(moment)?;
    }
    Ok(())
}

#[test]
fn a_disk_that_hangs_does_not_hold_up_the_end() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let embassy = host.embassy(["--dnat", ETCD, "--state-dir=/run/state"])?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    // From now on each fsync takes a minute.
    let pid = embassy.pid().to_string();
    // Not inside the host, whose processes have other IDs there.
    let mut slow = Command::new("strace");
    slow.args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=fsync"]);
    slow.args(["-e", "inject=fsync:delay_enter=60000000", "-p", &pid]);
    let slow = host.spawn("slow disk", slow)?;
    testbed::eventually(WAIT, "the disk to be slow", || {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        ensure!(!status.contains("TracerPid:\t0\n"), "nobody traces it");
        Ok(())
    })?;
    offer(&host, "web", [10, 0, 0, 9])?;
    says(&embassy, &["endpoints", "10.0.0.9:80"])?;
    embassy.terminate()?;
    says(&embassy, &["the state file may be out of date"])?;
    says(&embassy, &["embassy has stopped"])?;
    // A traced process ends only when its tracer lets it.
    drop(slow);
    assert_eq!(embassy.wait(WAIT)?.code(), Some(0));
    Ok(())
}

/// A host whose `iptables-save` hangs while /run/hang is there, and then makes /run/hangs; and a container.
pub(crate) fn hanging() -> Result<(Host, testbed::Container)> {
    let host = Host::light()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let save = "mkdir -p /run/bin; printf '#!/bin/sh\nwhile test -e /run/hang; do touch /run/hangs; sleep 0.1; done\nexec %s \"$@\"\n' \
               SBIN/iptables-save > /run/bin/iptables-save; chmod +x /run/bin/iptables-save";
    host.run("sh", ["-ec", &save.replace("SBIN", SBIN)])?;
    Ok((host, app))
}

pub(crate) fn with_hanging(host: &Host, flags: &[&str]) -> Result<Embassy> {
    let mut command = with_programs(host, "/run/bin")?;
    command.args(["--dnat", ETCD, IPTABLES]).args(flags);
    host.embassy_from(command)
}

#[test]
fn a_firewall_that_hangs_holds_up_neither_the_end_nor_a_second_signal() -> Result<()> {
    let (host, app) = hanging()?;
    for signals in 1..=2 {
        let embassy = with_hanging(&host, &["--drain=1s"])?;
        embassy.wait_ready(READY)?;
        reaches(&app, "172.17.0.1:80", "web")?;
        host.run("touch", ["/run/hang"])?;
        embassy.terminate()?;
        says(&embassy, &["embassy is shutting down"])?;
        if signals == 2 {
            embassy.terminate()?;
        }
        assert_eq!(embassy.wait(WAIT)?.code(), Some(0));
        says(&embassy, &["gave up waiting: rules may be left"])?;
        host.run("rm", ["/run/hang"])?;
    }
    Ok(())
}

/// Another program holds the lock for a moment, just when a drain's time is over.
#[test]
fn a_drain_leaves_the_removal_of_the_rules_its_time() -> Result<()> {
    let (host, app) = hanging()?;
    let pool = host.server("pool", ["hang"]).start()?;
    offer(&host, "pool", pool.ip()?)?;
    let pooled = host.client("pooled").env("BACKEND_POOL", "/services/pool;81").start()?;
    let embassy = with_hanging(&host, &["--drain=5s"])?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    let _open = pooled.spawn("open", ["testbed", "peer", "recv", "172.17.0.1:81"])?;
    counts(&embassy, "embassy_connections_active", 1)?;
    host.run("touch", ["/run/hang"])?;
    embassy.terminate()?;
    testbed::eventually(WAIT, "the removal to wait", || {
        host.run("test", ["-e", "/run/hangs"]).map(drop)
    })?;
    // This does not wait for something: the other program holds the lock this long.
    std::thread::sleep(std::time::Duration::from_secs(2));
    host.run("rm", ["/run/hang"])?;
    assert_eq!(embassy.wait(WAIT)?.code(), Some(0));
    ensure!(!embassy.log().contains("rules may be left"), "{}", embassy.log());
    nothing_is_left(&host)
}

#[test]
fn a_firewall_that_hangs_does_not_hold_up_a_stop_during_the_start() -> Result<()> {
    let (host, _app) = hanging()?;
    host.run("touch", ["/run/hang"])?;
    let embassy = with_hanging(&host, &[])?;
    // Leftovers of an earlier embassy are removed before anything else.
    says(&embassy, &["embassy starts"])?;
    embassy.terminate()?;
    says(&embassy, &["embassy was stopped during its start"])?;
    assert_eq!(embassy.wait(WAIT)?.code(), Some(0));
    host.run("rm", ["/run/hang"])?;
    nothing_is_left(&host)
}

#[test]
fn it_ends_with_a_clear_line_where_it_cannot_start() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let mut no_iptables = without_programs(&host)?;
    no_iptables.args(["--dnat", "--firewall=iptables", "--admin=off", "-p=9998"]);
    let (said, status) = outcome(&host, no_iptables)?;
    assert!(status == Some(1) && said.contains("cannot run iptables-save"), "{said}");
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let first = host.embassy(["--dnat", ETCD])?;
    first.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "web")?;

    let command = |words: &[&str]| host.embassy_command(words);
    let with = |words: &[&str], name: &str, value: &str| {
        let mut command = host.embassy_command(words)?;
        command.env(name, value);
        anyhow::Ok(command)
    };
    let fixed = ["-provider=static", "-services=web;80", "--admin=off", "-p=9998"];
    let cases = [
        (command(&["--admin=off"])?, 1, "cannot listen on port 9999 (--port): embassy (process "),
        (
            command(&["--dnat", "--admin=off"])?,
            1,
            "another embassy captures in this network namespace",
        ),
        (
            command(&["--dnat", "-p=9998", "--admin=off"])?,
            1,
            "another embassy captures in this network namespace",
        ),
        (command(&["-p=9998"])?, 1, "cannot listen at 127.0.0.1:9990 (--admin): embassy (process "),
        (
            command(&["--admin=unix:///no/such/folder", "-p=9998"])?,
            1,
            "unix:///no/such/folder (--admin)",
        ),
        (command(&[&fixed[..], &["-interface=nosuch0"]].concat())?, 1, "-interface \"nosuch0\""),
        (command(&["--no-such-flag"])?, 2, "--no-such-flag"),
        (command(&["-port=99999"])?, 2, "--port \"99999\": expected a port"),
        (command(&["-discovery=marathon://127.0.0.1:8080"])?, 2, "marathon"),
        (
            with(&["--dnat"], "IPTABLES_TRACK_TIMEOUT", "soon")?,
            2,
            "IPTABLES_TRACK_TIMEOUT \"soon\"",
        ),
        (with(&["--dnat"], "IPTABLES_TRACK_HASHSIZE", "-1")?, 2, "IPTABLES_TRACK_HASHSIZE \"-1\""),
        (
            with(&["--dnat"], "IPTABLES_TRACK_MAX_CONNECTIONS", "0")?,
            2,
            "IPTABLES_TRACK_MAX_CONNECTIONS \"0\"",
        ),
        (command(&["--version"])?, 0, "embassy "),
    ];
    for (command, code, line) in cases {
        let (said, status) = outcome(&host, command)?;
        assert_eq!(status, Some(code), "{said}");
        assert!(said.contains(line), "{line:?} in {said}");
        if code == 2 {
            assert_eq!(said.lines().count(), 1, "{said}");
        }
    }

    // None of them affected the running embassy.
    assert_eq!(restored(&first)?, 0);
    reaches(&app, "172.17.0.1:80", "web")?;
    // A missing interface is not an error if its address is not needed. Neither is a host without Consul.
    let other = host.embassy(["-interface=nosuch0", "-p=9998", "--admin=off"])?;
    says(&other, &["proxy listens", "9998"])?;
    assert_eq!(other.exited()?, None);
    Ok(())
}

/// What an embassy logs until it ends by itself, and its exit code.
fn outcome(host: &Host, command: Command) -> Result<(String, Option<i32>)> {
    let log = |embassy: &Embassy| embassy.log();
    let before = std::fs::read(host.dir().join("embassy.log")).map_or(0, |log| log.len());
    let embassy = host.embassy_from(command)?;
    let status = embassy.wait(WAIT)?;
    Ok((log(&embassy).split_off(before), status.code()))
}

#[test]
fn the_admin_api_can_be_elsewhere_or_nowhere() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let embassy = host.embassy(["--dnat", ETCD, "--admin=off"])?;
    reaches(&app, "172.17.0.1:80", "web")?;
    assert!(embassy.admin("/healthz").is_err());
    embassy.terminate()?;
    embassy.wait(WAIT)?;

    // Twice: a socket file outlives the process that created it.
    for _ in 0..2 {
        let embassy = host.embassy(["--dnat", ETCD, "--admin=unix:///run/embassy.sock"])?;
        testbed::eventually(READY, "an answer by the socket", || {
            let curl = ["--silent", "--fail", "--unix-socket", "/run/embassy.sock"];
            host.run("curl", [&curl[..], &["http://embassy/readyz"]].concat())
        })?;
        embassy.kill()?;
    }
    Ok(())
}
