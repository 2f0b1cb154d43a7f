//! A new embassy takes over from the running one: no connection ends, and one of the two serves whatever happens to the
//! other one.
//!
//! `TAKEOVERS=20 IDLE=9000 cargo test --release --test it every_connection_lives -- --nocapture` prints the figures.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use embassy::takeover::{
    Channel, knock,
    message::{Hello, Message, VERSION},
};
use testbed::{Answers, Embassy, Host, Process, Traffic};

use super::{OpenConnections, Path, ended, line, metric, service, vip};
use crate::{
    READY, WAIT,
    support::{ETCD, counts, reaches, restored, says, sum},
};

/// The folder for the state of an embassy, which the test can access.
struct State(tempfile::TempDir);

impl State {
    fn new() -> Result<Self> {
        Ok(Self(tempfile::tempdir()?))
    }

    fn flag(&self) -> String {
        format!("--state-dir={}", self.0.path().display())
    }

    /// The socket at which the running embassy accepts a takeover.
    fn socket(&self) -> Result<PathBuf> {
        let all = fs::read_dir(self.0.path())?.map(|entry| Ok(entry?.path()));
        let all: Vec<_> = all.collect::<Result<_>>()?;
        let is_it = |path: &&PathBuf| path.to_string_lossy().contains("/takeover-9999-");
        all.iter().find(is_it).cloned().with_context(|| format!("only {all:?} are there"))
    }
}

/// Idle connections, one in constant use, and new ones all the time.
struct Load {
    idle: OpenConnections,
    idle_count: usize,
    /// Each with the one server that may answer.
    traffic: Vec<(String, Traffic)>,
}

const ROLES: [(u16, &str); 5] = [
    (80, "http --name web"),
    (81, "http --name mail"),
    (82, "http --name cart"),
    (1001, "greet --name joe"),
    (1002, "duplex --seed 7 --bytes 60000000"),
];

impl Load {
    fn start(path: &Path, name: &str, idle_count: usize) -> Result<Self> {
        Self::of(path, name, idle_count, &ROLES)
    }

    /// With new connections to the web servers among these alone.
    fn of(path: &Path, name: &str, idle_count: usize, roles: &[(u16, &str)]) -> Result<Self> {
        let (target, count) = (vip(1001), idle_count.to_string());
        let words = ["testbed", "peer", "hold", &target, "-n", &count, "-c", "8"];
        let idle = OpenConnections(path.app.spawn(&format!("idle-{name}"), words)?);
        // Thousands of connections take longer than one wait.
        let greetings = (0..10).find_map(|_| idle.greetings().ok()).context("no greetings")?;
        assert_eq!(greetings, serde_json::json!({ "hello from joe": idle_count }));
        let live = path.app.live(&format!("live-{name}"), vip(80))?;
        let mut traffic = vec![("web".to_owned(), live)];
        for (port, role) in roles {
            if let Some(server) = role.strip_prefix("http --name ") {
                let flood = path.app.traffic(&format!("flood-{server}-{name}"), vip(*port))?;
                traffic.push((server.to_owned(), flood));
            }
        }
        Ok(Self { idle, idle_count, traffic })
    }

    /// Nothing has failed or ended, and each was answered by the service that it dialled.
    fn ends_unharmed(self, what: &str) -> Result<()> {
        for (server, traffic) in self.traffic {
            let answers = traffic.stop()?;
            let Answers { slowest, .. } = answers;
            println!("{what}: {server} {} answered, slowest {slowest:?}", answers.answered());
            let right = answers.from(&server);
            ensure!(answers.failed() == 0 && right > 0, "{what}: {server} {answers:?}");
            ensure!(right == answers.answered(), "{what}: others than {server}: {answers:?}");
        }
        assert_eq!(self.idle.ended()?, [], "{what}: of {}", self.idle_count);
        Ok(())
    }
}

fn successor(host: &Host, flags: &[&str]) -> Result<Embassy> {
    host.embassy(["--dnat", ETCD, "--takeover"].iter().chain(flags))
}

/// Checks that the new one serves, and that the old one has ended without an error.
fn replaces(new: &Embassy, old: &Embassy) -> Result<()> {
    new.wait_ready(READY)?;
    let status = old.wait(WAIT)?;
    ensure!(status.success(), "the old one ended with {status}");
    Ok(())
}

/// The pause of the connections in the last takeover, in ms, as logged by the new process.
fn pause(log: &str) -> Option<u64> {
    let line = log.lines().rfind(|line| line.contains("took over from the running embassy"))?;
    let (_, rest) = line.split_once("pause_ms=")?;
    rest.split([' ', '.']).next()?.parse().ok()
}

#[test]
fn every_connection_lives_through_takeovers() -> Result<()> {
    let number = |name: &str, default: usize| -> Result<usize> {
        std::env::var(name).map_or(Ok(default), |text| Ok(text.parse()?))
    };
    let (takeovers, idle) = (number("TAKEOVERS", 3)?, number("IDLE", 1_000)?);
    let state = State::new()?;
    let state_flag = state.flag();
    let flags = [state_flag.as_str(), "--max-connections-per-consumer=9600"];
    let bytes = (takeovers * 12_000_000).to_string();
    let duplex = format!("duplex --seed 7 --bytes {bytes}");
    let roles =
        ROLES.map(|(port, role)| if port == 1002 { (port, &*duplex) } else { (port, role) });
    let path = Path::with(&flags, &roles)?;
    let Path { app, host, embassy, .. } = &path;
    let load = Load::start(&path, "load", idle)?;
    // One request per second on each of many connections.
    let end = host.dir().join("beats.end");
    let target = vip(80);
    let mut beats = app.command(testbed::testbed_program()?)?;
    beats.args(["peer", "get", &target, "-c", "200", "--keep-alive", "--pause-ms", "1000"]);
    beats.arg("--until").arg(&end);
    let beats = host.spawn("beats", beats)?;
    let target = vip(1002);
    let bulk: Vec<Process> = (0..4)
        .map(|n| {
            let words = ["testbed", "peer", "duplex", &target, "--seed", "7", "--rate", "3000000"];
            app.spawn(&format!("bulk-{n}"), words.into_iter().chain(["--bytes", &bytes]))
        })
        .collect::<Result<_>>()?;
    counts(embassy, "embassy_connections_active", idle as u64 + 204)?;
    let before = sum(embassy, "embassy_route_connections_started_total")?;

    let mut running: Option<Embassy> = None;
    let mut pauses = Vec::new();
    for n in 1..=takeovers {
        let new = successor(host, &flags)?;
        replaces(&new, running.as_ref().unwrap_or(embassy))?;
        assert_eq!(metric(&new, "embassy_takeovers_total")?, n as u64);
        assert_eq!(restored(&new)?, 0, "the rules stayed");
        pauses.extend(pause(&new.log()));
        running = Some(new);
    }
    let now = running.context("no takeover")?;
    println!("{takeovers} takeovers of {idle} idle connections: pauses of {pauses:?} ms");
    let after = sum(&now, "embassy_route_connections_started_total")?;
    ensure!(after >= before, "{after} connections of routes, and {before} before");
    counts(&now, "embassy_connections_active", idle as u64 + 200)?;
    for (n, process) in bulk.iter().enumerate() {
        let status = process.wait(Duration::from_secs(600))?;
        ensure!(status.success(), "bulk {n}: {}", process.log());
        let said: serde_json::Value = serde_json::from_str(&process.log())?;
        assert_eq!(said["sent"]["bytes"].to_string(), bytes);
        // Both sides send the same.
        assert_eq!(said["received"], said["sent"], "bulk {n}");
        assert_eq!(said["answer"], line(&said["sent"]), "bulk {n}");
    }
    fs::write(&end, "")?;
    beats.wait(WAIT)?;
    let answers = Answers::read(&beats.log())?;
    ensure!(answers.failed() == 0 && answers.from("web") > 200, "{answers:?}");
    load.ends_unharmed("takeovers")?;
    for outcome in ["route_gone", "shutdown", "local_reset", "consumer_reset", "endpoint_reset"] {
        assert_eq!(ended(&now, outcome)?, 0, "{outcome}");
    }
    Ok(())
}

/// Either process is killed at each step. The connections that a frozen process has not handed over yet are lost with it.
/// After that nothing is lost.
#[test]
fn a_process_that_is_killed_in_the_middle_leaves_one_that_serves() -> Result<()> {
    let state = State::new()?;
    let flag = state.flag();
    let path = Path::with(&[&flag], &ROLES)?;
    let host = &path.host;
    let dies = |flags: &[&str], at: &str| -> Result<Embassy> {
        let mut command = host.embassy_command(["--dnat", ETCD].iter().chain(flags))?;
        command.env("EMBASSY_TAKEOVER_DIES", at);
        host.embassy_from(command)
    };
    let steps = [
        "greeted",
        "learned",
        "freeze sent",
        "handles taken",
        "connections taken",
        "before commit",
    ];
    for step in steps {
        let load = Load::start(&path, &step.replace(' ', "-"), 20)?;
        let new = dies(&["--takeover", &flag], step)?;
        let status = new.wait(READY)?;
        ensure!(!status.success(), "the new one ended with {status} at {step:?}");
        reaches(&path.app, vip(80), "web")?;
        ensure!(path.embassy.exited()?.is_none(), "the old one ended at {step:?}");
        assert_eq!(metric(&path.embassy, "embassy_takeovers_total")?, 0);
        assert_eq!(restored(&path.embassy)?, 0, "{step}: the rules stayed");
        load.ends_unharmed(step)?;
    }
    path.embassy.kill()?;
    for (step, is_whole) in [
        ("frozen", false),
        ("listeners sent", false),
        ("handles sent", false),
        ("figures sent", false),
        ("connections sent", true),
        ("end sent", true),
    ] {
        let old = dies(&[&flag], step)?;
        old.wait_ready(READY)?;
        reaches(&path.app, vip(80), "web")?;
        let load = Load::start(&path, &step.replace(' ', "-"), 20)?;
        let new = successor(host, &[&flag])?;
        let status = old.wait(READY)?;
        ensure!(!status.success(), "the old one ended with {status} at {step:?}");
        new.wait_ready(READY)?;
        reaches(&path.app, vip(80), "web")?;
        if is_whole {
            load.ends_unharmed(step)?;
        }
        new.kill()?;
    }
    Ok(())
}

/// Speaks with the running embassy like a new one, up to some step. Records what it receives.
struct Peer {
    channel: Channel,
    received: Vec<Message>,
    descriptors: Vec<std::os::fd::OwnedFd>,
}

impl Peer {
    async fn greet(state: &State, version: u32) -> Result<Self> {
        let hello = Hello { version, program: "another".into(), ..Hello::default() };
        let (channel, ..) = knock(&state.socket()?, hello).await?.context("nobody is there")?;
        Ok(Self { channel, received: Vec::new(), descriptors: Vec::new() })
    }

    /// Receives this many messages, or all of them.
    async fn receive(&mut self, most: usize) -> Result<()> {
        self.channel.send(&Message::Freeze, &[], &[]).await?;
        while self.received.len() < most {
            let (message, _, descriptors) =
                self.channel.receive().await?.context("an early end")?;
            self.descriptors.extend(descriptors);
            if let Message::Connections { list } = &message {
                let taken = Message::Taken { taken: vec![true; list.len()] };
                self.channel.send(&taken, &[], &[]).await?;
            }
            self.received.push(message.clone());
            if message == Message::End {
                break;
            }
        }
        Ok(())
    }
}

fn run<T>(test: impl Future<Output = T>) -> Result<T> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(test))
}

#[test]
fn whoever_asks_and_does_not_commit_changes_nothing() -> Result<()> {
    let state = State::new()?;
    let flag = state.flag();
    let path = Path::with(&[&flag], &ROLES)?;
    let load = Load::start(&path, "load", 300)?;
    run(async {
        let mut whole = Peer::greet(&state, VERSION).await?;
        whole.receive(usize::MAX).await?;
        let count = whole.received.len();
        ensure!(count > 8 && whole.received.last() == Some(&Message::End), "{:?}", whole.received);
        drop(whole);
        for most in 0..count {
            let mut peer = Peer::greet(&state, VERSION).await?;
            peer.receive(most).await?;
            drop(peer);
        }
        // One that sends a forbidden message, and one that stops sending.
        let mut peer = Peer::greet(&state, VERSION).await?;
        peer.receive(usize::MAX).await?;
        peer.channel.send(&Message::End, &[], &[]).await?;
        ensure!(!matches!(peer.channel.receive().await, Ok(Some(_))));
        let mut silent = Peer::greet(&state, VERSION).await?;
        silent.receive(usize::MAX).await?;
        let start = Instant::now();
        ensure!(!matches!(silent.channel.receive().await, Ok(Some(_))));
        println!("one that says nothing was waited for {:?}", start.elapsed());
        ensure!(silent.channel.send(&Message::Commit, &[], &[]).await.is_err(), "it came too late");
        anyhow::Ok(())
    })?
    .with_context(|| path.embassy.log())?;
    reaches(&path.app, vip(80), "web")?;
    assert_eq!(restored(&path.embassy)?, 0, "the rules stayed");
    load.ends_unharmed("askers")?;
    // It can still be taken over.
    let new = successor(&path.host, &[&flag])?;
    replaces(&new, &path.embassy)
}

/// It gets what is the same in all versions, and the old process drains its connections.
#[test]
fn a_process_of_another_version_gets_the_listeners_and_the_rest_is_drained() -> Result<()> {
    let state = State::new()?;
    let flag = state.flag();
    let path = Path::with(&[&flag, "--drain=1h"], &ROLES)?;
    let idle = OpenConnections::open(&path.app, "idle", &vip(1001), 5)?;
    assert_eq!(idle.greetings()?["hello from joe"], 5);
    let live = path.app.live("live", vip(80))?;
    counts(&path.embassy, "embassy_connections_active", 6)?;
    // It keeps the listeners and the rules.
    let _peer = run(async {
        let mut peer = Peer::greet(&state, VERSION + 1).await?;
        peer.receive(usize::MAX).await?;
        let handles = peer.received.iter().filter(|one| matches!(one, Message::Handle(_))).count();
        ensure!(handles >= 5 && handles + 1 == peer.received.len(), "{:?}", peer.received);
        peer.channel.send(&Message::Commit, &[], &[]).await?;
        ensure!(!matches!(peer.channel.receive().await, Ok(Some(_))));
        anyhow::Ok(peer)
    })?
    .with_context(|| path.embassy.log())?;
    // The old process serves no new connections. It serves the old ones until the drain is over or a signal arrives.
    assert_eq!(live.stop()?.failed(), 0);
    assert_eq!(idle.ended()?, []);
    path.embassy.terminate()?;
    assert!(path.embassy.wait(WAIT)?.success());
    testbed::eventually(WAIT, "the connections to end with it", || {
        ensure!(idle.ended()?.len() == 5);
        Ok(())
    })
}

/// Two builds that do not understand one another, whichever of them is the older one.
#[test]
fn a_build_with_another_protocol_gets_the_listeners_and_the_rest_is_drained() -> Result<()> {
    let state = State::new()?;
    let flag = state.flag();
    let path = Path::with(&[&flag, "--drain=1h", "--connection-log=errors"], &ROLES)?;
    let mut old: Option<Embassy> = None;
    for (n, version) in [(1, Some(VERSION + 1)), (2, None)] {
        let before = old.as_ref().unwrap_or(&path.embassy);
        // One service: if a consumer uses one port of its own for several, the kernel gives a connection another one, by which it is not
        // recognised as the owner's where the new process does not know how old the route is.
        let load = Load::of(&path, &n.to_string(), 20, &ROLES[..1])?;
        let mut command =
            path.host.embassy_command(["--dnat", ETCD, "--takeover", "--drain=1h", &flag])?;
        command.arg("--connection-log=errors");
        if let Some(version) = version {
            command.env("EMBASSY_TAKEOVER_VERSION", version.to_string());
        }
        let new = path.host.embassy_from(command)?;
        testbed::eventually(READY, "the takeover", || {
            let log = new.log();
            let taken = log.matches("took over from the running embassy").count();
            ensure!(taken == n && log.matches("connections=0").count() >= n, "{log}");
            Ok(())
        })?;
        new.wait_ready(READY)?;
        assert_eq!(restored(&new)?, 0, "the rules stayed");
        reaches(&path.app, vip(80), "web")?;
        assert_eq!(metric(&new, "embassy_connections_active")? / 20, 0, "they are the old one's");
        // The old one serves what it has until that ends.
        assert_eq!(before.exited()?, None);
        load.ends_unharmed("another protocol")?;
        path.host.run("pkill", ["-f", "peer hold"])?;
        assert!(before.wait(WAIT)?.success(), "nothing is left there");
        old = Some(new);
    }
    Ok(())
}

#[test]
fn a_takeover_needs_neither_engine_nor_registry() -> Result<()> {
    let state = State::new()?;
    let flag = state.flag();
    let path = Path::with(&[&flag], &ROLES)?;
    let load = Load::start(&path, "load", 50)?;
    let table = state.0.path().join("table-9999");
    testbed::eventually(WAIT, "the saved table", || {
        ensure!(fs::read_to_string(&table)?.contains(&service(1002)));
        Ok(())
    })?;
    let engine = path.host.fake_engine().context("a light host")?;
    engine.answers("", testbed::Mood::Fails);
    engine.loses();
    path.host.etcd_daemon().kill()?;
    let new = successor(&path.host, &[&flag])?;
    let status = path.embassy.wait(2 * READY)?;
    ensure!(status.success(), "the old one ended with {status}");
    reaches(&path.app, vip(80), "web")?;
    assert_eq!(metric(&new, "embassy_takeovers_total")?, 1);
    load.ends_unharmed("everything down")
}

#[test]
fn rules_of_iptables_are_taken_over_too() -> Result<()> {
    let state = State::new()?;
    let flag = state.flag();
    let flags = [flag.as_str(), "--firewall=iptables"];
    let path = Path::with(&flags, &ROLES)?;
    let load = Load::start(&path, "load", 20)?;
    let mut running: Option<Embassy> = None;
    for _ in 0..2 {
        let new = successor(&path.host, &flags)?;
        replaces(&new, running.as_ref().unwrap_or(&path.embassy))?;
        running = Some(new);
    }
    let now = running.context("no takeover")?;
    assert_eq!(metric(&now, "embassy_takeovers_total")?, 2);
    assert_eq!(restored(&now)?, 0, "nobody else has written them");
    load.ends_unharmed("iptables")?;
    // Another firewall backend needs a normal start.
    let other = successor(&path.host, &[&flag, "--firewall=nft"])?;
    assert_eq!(other.wait(READY)?.code(), Some(1));
    says(&now, &["the running embassy writes its rules by iptables, and this one by nft"])?;
    reaches(&path.app, vip(80), "web")
}

/// Two take over at the same time: in the end one of them serves, and the other has ended or has taken over from it.
#[test]
fn of_two_that_take_over_at_once_one_serves() -> Result<()> {
    let state = State::new()?;
    let flag = state.flag();
    let path = Path::with(&[&flag], &ROLES)?;
    let load = Load::start(&path, "load", 20)?;
    let both = [successor(&path.host, &[&flag])?, successor(&path.host, &[&flag])?];
    assert!(path.embassy.wait(READY)?.success());
    testbed::eventually(READY, "one to end", || {
        let ended = [both[0].exited()?, both[1].exited()?];
        ensure!(ended.iter().flatten().count() == 1, "{ended:?}");
        Ok(())
    })?;
    reaches(&path.app, vip(80), "web")?;
    load.ends_unharmed("two at once")
}
