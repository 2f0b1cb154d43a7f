//! How a connection ends on one side is how it ends on the other.

use std::time::Duration;

use anyhow::{Result, ensure};
use testbed::Process;

use super::{Path, ended, line, vip, wait_ended};
use crate::WAIT;

#[test]
fn the_server_may_speak_first() -> Result<()> {
    let path = Path::new(&[(1001, "greet --name joe")])?;
    let said = path.peer("send", 1001, ["--bytes", "0"])?;
    assert_eq!(said["answer"], "hello from joe\n");
    wait_ended(&path.embassy, "closed", 1)
}

#[test]
fn either_direction_may_end_first() -> Result<()> {
    let path = Path::new(&[(1001, "sink --delay-ms 500"), (1002, "first-to-close")])?;
    let said = path.peer("send", 1001, ["--bytes", "100000", "--seed", "1"])?;
    assert_eq!(said["answer"], line(&said["sent"]));

    let late = ["--bytes", "100000", "--seed", "2", "--delay-ms", "500"];
    let said = path.peer("send", 1002, late)?;
    assert_eq!(said["answer"], "bye\n");
    logged(&path, &line(&said["sent"]))?;
    wait_ended(&path.embassy, "closed", 2)
}

#[test]
fn a_reset_of_the_endpoint_is_a_reset_to_the_consumer() -> Result<()> {
    let path = Path::new(&[(1001, "reset"), (1002, "reset --after 1000000")])?;
    assert_eq!(path.app.probe(vip(1001))?.outcome, "reset");
    let bulk = path.peer("send", 1002, ["--bytes", "100000000"]).unwrap_err().to_string();
    ensure!(bulk.contains("reset by peer") || bulk.contains("Broken pipe"), "{bulk}");
    wait_ended(&path.embassy, "endpoint_reset", 2)
}

#[test]
fn a_reset_of_the_consumer_is_a_reset_to_the_endpoint() -> Result<()> {
    let path = Path::new(&[(1001, "sink"), (1002, "hang")])?;
    path.peer("reset", 1001, ["--bytes", "1000"])?;
    logged(&path, "reset by peer")?;
    wait_ended(&path.embassy, "consumer_reset", 1)?;
    // Nobody reads there: what was sent fills the buffers on the way, and still the reset is noticed.
    let sent = path.peer("reset", 1002, ["--bytes", "1000000000"])?;
    ensure!(sent["sent"].as_u64().is_some_and(|sent| sent > 100_000), "{sent}");
    wait_ended(&path.embassy, "consumer_reset", 2)
}

/// The connection tracking entry of a half-closed connection, and the translation of its addresses with it, is dropped
/// after 60 s of silence; see `KEEPALIVE` in the proxy's listener. This takes as long.
#[test]
fn a_half_closed_connection_outlives_the_patience_of_connection_tracking() -> Result<()> {
    let path = Path::new(&[(1001, "sink --delay-ms 75000"), (1002, "first-to-close")])?;
    let spawn = |name, port, delay| -> Result<Process> {
        let target = vip(port);
        let send = ["testbed", "peer", "send", &target, "--bytes", "1000", "--delay-ms", delay];
        path.app.spawn(name, send)
    };
    let (late_answer, late_question) =
        (spawn("late-answer", 1001, "0")?, spawn("late-question", 1002, "75000")?);
    let patience = Duration::from_secs(75) + WAIT;
    for process in [&late_answer, &late_question] {
        let status = process.wait(patience)?;
        ensure!(status.success(), "{status}: {}", process.log());
    }
    let said: serde_json::Value = serde_json::from_str(&late_answer.log())?;
    assert_eq!(said["answer"], line(&said["sent"]));
    let said: serde_json::Value = serde_json::from_str(&late_question.log())?;
    logged(&path, &line(&said["sent"]))?;
    assert_eq!(ended(&path.embassy, "closed")?, 2);
    Ok(())
}

#[test]
fn keepalive_asks_a_silent_peer_on_either_side() -> Result<()> {
    let path = Path::new(&[(1001, "greet")])?;
    let held = super::Held::open(&path.app, "held", &vip(1001), 1)?;
    held.greetings()?;
    let (app, endpoint) = (path.app.ip()?.to_string(), format!("{}:1001", path.endpoints.ip()?));
    let sockets = path.host.run("ss", ["-H", "-t", "-n", "-o", "state", "established"])?;
    for peer in [app, endpoint] {
        let of_peer = sockets.lines().find(|line| {
            line.split_whitespace().nth(3).is_some_and(|remote| remote.contains(&peer))
        });
        ensure!(
            of_peer.is_some_and(|line| line.contains("timer:(keepalive,")),
            "{peer}: {sockets}"
        );
    }
    Ok(())
}

/// Waits until a server printed this.
fn logged(path: &Path, text: &str) -> Result<()> {
    testbed::eventually(WAIT, &format!("{text:?} in the servers' log"), || {
        let log = path.endpoints.log()?;
        ensure!(log.contains(text), "{log}");
        Ok(())
    })
}
