//! Which connections are logged, independent of the log level.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::{Embassy, Host};

use crate::{
    READY, WAIT,
    support::{ETCD, counts, metric, reaches, web},
};

/// The log lines of connections so far.
fn lines(embassy: &Embassy) -> Vec<Value> {
    let log = embassy.log();
    let all = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    all.filter(|line| line["target"] == "connection").collect()
}

#[test]
fn errors_are_those_that_somebody_should_look_at_whatever_the_level() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80");
    let app = app.env("BACKEND_NONE", "/services/none;81").start()?;
    let flags = ["--dnat", ETCD, "--connection-log=errors", "--log-format=json", "--drain=0"];
    let mut command = host.embassy_command(flags)?;
    command.env("RUST_LOG", "warn");
    let embassy = host.embassy_from(command)?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    let _held = app.spawn("held", ["testbed", "peer", "hold", "172.17.0.1:80"])?;
    counts(&embassy, "embassy_connections_active", 1)?;
    let _ = app.get("172.17.0.1:81").run()?;
    let line = testbed::eventually(WAIT, "a line of the refusal", || {
        lines(&embassy).into_iter().next().context("none yet")
    })?;
    assert_eq!((&line["outcome"], &line["consumer"]), (&"no_endpoint".into(), &"app".into()));
    // A connection that embassy ends is not an error.
    embassy.terminate()?;
    assert!(embassy.wait(WAIT)?.success());
    let outcomes: Vec<_> = lines(&embassy).iter().map(|line| line["outcome"].clone()).collect();
    assert_eq!(outcomes, ["no_endpoint"]);
    assert!(!embassy.log().contains("new route"), "the level is no other than was asked for");
    Ok(())
}

#[test]
fn a_fraction_is_about_as_many_and_the_level_at_run_time_changes_nothing() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    std::fs::write(host.dir().join("token"), "secret\n")?;
    let token = format!("--admin-token-file={}", host.dir().join("token").display());
    let flags = ["--dnat", ETCD, "--connection-log=0.5", "--log-format=json", &token];
    let embassy = host.embassy(flags)?;
    embassy.wait_ready(READY)?;
    let curl = ["--silent", "--fail", "-X", "PUT", "--data", r#"{"level":"error"}"#];
    let bearer = ["--header", "Authorization: Bearer secret"];
    let url = ["http://127.0.0.1:9990/v1/log-level"];
    host.run("curl", [&curl[..], &bearer, &url].concat())?;
    let answers = app.get("172.17.0.1:80").times(400).at_once(4).run()?;
    ensure!(answers.from("web") == 400, "{answers:?}");
    counts(&embassy, r#"embassy_connections_total{outcome="closed"}"#, 400)?;
    embassy.terminate()?;
    assert!(embassy.wait(WAIT)?.success());
    let logged = lines(&embassy).len();
    assert!((100..300).contains(&logged), "{logged} of 400");
    Ok(())
}

#[test]
fn a_flood_of_connections_does_not_cost_the_line_that_says_what_is_wrong() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    // Opened for reading and writing, the pipe exists without a reader. It holds 64 KiB, and nothing reads it yet.
    let script = "mkfifo /run/stalled; exec \"$0\" \"$@\" 2<>/run/stalled";
    let mut stalled = host.command("sh");
    stalled.args(["-c", script]).arg(testbed::embassy_program()?);
    stalled.args(["--dnat", ETCD, "--connection-log=all"]);
    stalled.env("DOCKER_HOST", host.docker_url());
    let embassy = host.embassy_from(stalled)?;
    embassy.wait_ready(READY)?;
    testbed::eventually(WAIT * 3, "lines to be dropped", || {
        let answers = app.get("172.17.0.1:80").times(2_000).at_once(8).run()?;
        assert_eq!(answers.from("web"), 2_000, "{answers:?}");
        ensure!(metric(&embassy, "embassy_log_lines_dropped_total")? > 0, "none yet");
        Ok(())
    })?;
    host.etcd_daemon().kill()?;
    counts(&embassy, r#"embassy_source_failures_total{source="etcd /services/web"}"#, 1)?;
    let lost = "source does not answer; its last data stays in use";
    let read = host.run("timeout", ["60", "grep", "-m1", lost, "/run/stalled"])?;
    ensure!(read.contains("etcd /services/web"), "{read}");
    Ok(())
}
