//! The end of a connection on one side is passed on to the other side.

use std::{
    fs,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use socket2::{SockRef, TcpKeepalive};
use testbed::{Embassy, Process};

use super::{OpenConnections, Path, ended, line, metric, vip, wait_ended};
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
    // On a busy machine the first reset may have arrived before the connection was seen as open. It counts as a failed
    // attempt.
    testbed::eventually(WAIT, "two connections to have ended", || {
        let reset = ended(&path.embassy, "endpoint_reset")?;
        let unreachable = ended(&path.embassy, "endpoints_unreachable")?;
        ensure!(reset >= 1 && reset + unreachable == 2, "{reset} reset, {unreachable} not reached");
        Ok(())
    })
}

#[test]
fn a_reset_of_the_consumer_is_a_reset_to_the_endpoint() -> Result<()> {
    let path = Path::new(&[(1001, "sink"), (1002, "hang")])?;
    path.peer("reset", 1001, ["--bytes", "1000"])?;
    logged(&path, "reset by peer")?;
    wait_ended(&path.embassy, "consumer_reset", 1)?;
    // The endpoint does not read: the sent bytes fill all buffers on the way, and the reset is noticed nevertheless.
    let sent = path.peer("reset", 1002, ["--bytes", "1000000000"])?;
    ensure!(sent["sent"].as_u64().is_some_and(|sent| sent > 100_000), "{sent}");
    wait_ended(&path.embassy, "consumer_reset", 2)
}

/// Connection tracking removes the entry of a half-closed connection, and its address translation, after 60 s of silence
/// (see `KEEPALIVE` in the proxy's listener). This test takes as long.
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
    let held = OpenConnections::open(&path.app, "held", &vip(1001), 1)?;
    held.greetings()?;
    let (app, endpoint) = (path.app.ip()?.to_string(), format!("{}:1001", path.endpoints.ip()?));
    // The endpoint's side gets keepalive after the connection has lasted for some time.
    testbed::eventually(WAIT, "keepalive on both sides", || {
        let sockets = path.host.run("ss", ["-H", "-t", "-n", "-o", "state", "established"])?;
        for peer in [&app, &endpoint] {
            let of_peer = sockets.lines().find(|line| {
                line.split_whitespace().nth(3).is_some_and(|remote| remote.contains(peer))
            });
            ensure!(
                of_peer.is_some_and(|line| line.contains("timer:(keepalive,")),
                "{peer}: {sockets}"
            );
        }
        Ok(())
    })
}

/// Nothing passes between embassy and one peer any more, and nothing is sent that would show it. The test makes the
/// keepalive of embassy's own sockets faster: it tests what happens to a connection when keepalive fails.
#[test]
fn a_silent_peer_is_found_by_keepalive_and_the_other_side_is_told() -> Result<()> {
    let roles = [1001, 1002, 1004].map(|port| (port, "greet"));
    let path = Path::new(&[&roles[..], &[(1003, "sink --delay-ms 600000")]].concat())?;
    let open = |name: &str, port| -> Result<OpenConnections> {
        let held = OpenConnections::open(&path.app, name, &vip(port), 1)?;
        held.greetings()?;
        Ok(held)
    };
    let of_consumer = open("of-consumer", 1001)?;
    let of_endpoint = open("of-endpoint", 1002)?;
    let of_nobody = open("of-nobody", 1004)?;
    // A half-closed connection keeps its task. The others do not.
    let send = ["testbed", "peer", "send", &vip(1003), "--bytes", "10"];
    let half_closed = path.app.spawn("half-closed", send)?;
    testbed::eventually(WAIT, "the idle connections to be parked", || {
        let (parked, sockets) = (parked(&path.embassy)?, sockets(&path)?.len());
        ensure!((parked, sockets) == (6, 8), "{parked} sockets of {sockets}");
        Ok(())
    })?;

    let (app, endpoints) = (path.app.ip()?, path.endpoints.ip()?);
    for words in [
        "add table inet silent",
        "add chain inet silent in { type filter hook input priority 0; }",
        "add chain inet silent out { type filter hook output priority 0; }",
        &format!(
            "add rule inet silent in ip saddr {app} meta l4proto tcp ct original proto-dst 1001 drop"
        ),
        &format!(
            "add rule inet silent out ip daddr {app} meta l4proto tcp ct original proto-dst 1001 drop"
        ),
        &format!("add rule inet silent in ip saddr {endpoints} tcp sport {{ 1002, 1003 }} drop"),
        &format!("add rule inet silent out ip daddr {endpoints} tcp dport {{ 1002, 1003 }} drop"),
    ] {
        path.host.run("nft", [words])?;
    }
    let second = Duration::from_secs(1);
    let soon = TcpKeepalive::new().with_time(second).with_interval(second).with_retries(4);
    let start = Instant::now();
    for socket in sockets(&path)? {
        ensure!(SockRef::from(&socket).keepalive()?, "keepalive is on");
        SockRef::from(&socket).set_tcp_keepalive(&soon)?;
        // With this option the kernel uses the elapsed time, and not the number of probes.
        SockRef::from(&socket).set_tcp_user_timeout(Some(4 * second))?;
    }
    wait_ended(&path.embassy, "consumer_reset", 1)?;
    wait_ended(&path.embassy, "endpoint_reset", 2)?;
    println!(
        "silent peers were found after {:?}, by four questions a second apart",
        start.elapsed()
    );

    testbed::eventually(WAIT, "the consumer's reset", || {
        let ended = of_endpoint.ended()?;
        ensure!(ended.len() == 1 && ended[0].0 == "reset", "{ended:?}");
        Ok(())
    })?;
    ensure!(!half_closed.wait(WAIT)?.success(), "{}", half_closed.log());
    // The endpoint learned of the consumer's end: it has no socket of that connection left.
    let mut left = path.endpoints.command("ss")?;
    left.args(["-H", "-t", "-n", "state", "connected", "sport", "=", ":1001"]);
    assert_eq!(testbed::output(&mut left)?, "");
    // A peer that answers stays, however often it was probed.
    assert_eq!(of_nobody.ended()?, []);
    assert_eq!(metric(&path.embassy, "embassy_connections_active")?, 1);
    // It was reset, but cannot receive that.
    assert_eq!(of_consumer.ended()?, []);
    Ok(())
}

/// The kernel of embassy's host has acknowledged what the consumer sent. Only embassy can notice that the endpoint has not.
#[test]
fn an_endpoint_that_acknowledges_nothing_is_given_up() -> Result<()> {
    let path = Path::with(&["--user-timeout=5s"], &[(1001, "greet"), (1002, "greet")])?;
    let go = path.host.dir().join("go");
    // It sends something once the endpoint is silent, and waits for the answer.
    let script = format!(
        "exec 3<>/dev/tcp/172.17.0.1/1001; head -n1 <&3; while ! [ -e {} ]; do sleep 0.1; done
        echo question >&3; cat <&3; echo \"cat: $?\"",
        go.display()
    );
    let asking = path.app.spawn("asking", ["bash", "-c", &script])?;
    let idle = OpenConnections::open(&path.app, "idle", &vip(1002), 1)?;
    idle.greetings()?;
    testbed::eventually(WAIT, "the greeting", || {
        ensure!(asking.log().contains("hello"), "{}", asking.log());
        Ok(())
    })?;
    testbed::eventually(WAIT, "the timeouts, which are set once a connection has lasted", || {
        let timeout = |socket| SockRef::from(socket).tcp_user_timeout();
        let timeouts: Result<Vec<_>, _> = sockets(&path)?.iter().map(timeout).collect();
        let mut timeouts: Vec<_> = timeouts?.into_iter().flatten().map(|t| t.as_secs()).collect();
        timeouts.sort_unstable();
        // A consumer may pause for longer than an endpoint.
        ensure!(timeouts == [5, 5, 120, 120], "{timeouts:?}");
        Ok(())
    })?;
    let endpoints = path.endpoints.ip()?;
    for words in [
        "add table inet silent",
        "add chain inet silent in { type filter hook input priority 0; }",
        "add chain inet silent out { type filter hook output priority 0; }",
        &format!("add rule inet silent in ip saddr {endpoints} tcp sport 1001 drop"),
        &format!("add rule inet silent out ip daddr {endpoints} tcp dport 1001 drop"),
    ] {
        path.host.run("nft", [words])?;
    }
    std::fs::write(go, "")?;
    testbed::eventually(WAIT, "the consumer to be told", || {
        ensure!(asking.log().contains("cat: 1"), "{}", asking.log());
        Ok(())
    })?;
    wait_ended(&path.embassy, "endpoint_reset", 1)?;
    // A connection that is silent because nothing is to be sent stays open.
    assert_eq!(idle.ended()?, []);
    Ok(())
}

/// embassy's own sockets to the two containers.
fn sockets(path: &Path) -> Result<Vec<OwnedFd>> {
    let pid = path.embassy.pid();
    let embassy = i32::try_from(pid).ok().and_then(Pid::from_raw).context("a process")?;
    let embassy = pidfd_open(embassy, PidfdFlags::empty())?;
    let peers = [path.app.ip()?.into(), path.endpoints.ip()?.into()];
    let mut sockets = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let number = entry?.file_name().to_string_lossy().parse()?;
        // It may be gone, or not be a socket.
        let Ok(socket) = pidfd_getfd(&embassy, number, PidfdGetfdFlags::empty()) else { continue };
        let peer = SockRef::from(&socket).peer_addr().ok().and_then(|peer| peer.as_socket());
        if peer.is_some_and(|peer| peers.contains(&peer.ip().to_canonical())) {
            sockets.push(socket);
        }
    }
    Ok(sockets)
}

/// Number of sockets that wait without a task in epoll sets: they are watched for EPOLLIN and EPOLLRDHUP (and always
/// EPOLLERR and EPOLLHUP), level-triggered.
fn parked(embassy: &Embassy) -> Result<usize> {
    let mut parked = 0;
    for entry in fs::read_dir(format!("/proc/{}/fdinfo", embassy.pid()))? {
        // A descriptor may be closed meanwhile.
        let info = fs::read_to_string(entry?.path()).unwrap_or_default();
        let watched = info.lines().filter(|line| line.starts_with("tfd:"));
        parked += watched.filter(|line| line.contains("events:     2019 ")).count();
    }
    Ok(parked)
}

/// Waits until a server has printed this.
fn logged(path: &Path, text: &str) -> Result<()> {
    testbed::eventually(WAIT, &format!("{text:?} in the servers' log"), || {
        let log = path.endpoints.log()?;
        ensure!(log.contains(text), "{log}");
        Ok(())
    })
}
