//! An address changes owners, again and again: no connection reaches a service that the former owner declared.
//!
//! The figures are printed. `REUSES=2100 cargo test --test it identity -- --nocapture` is a long run of about 15 minutes:
//! nextest would end it after three.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use testbed::{Answers, Container, Embassy, Host, embassy_program, testbed_program};

use crate::{
    READY, WAIT,
    support::{ETCD, counts, metric, reaches, says, web},
};

const VIP: &str = "172.17.0.1:80";
/// The number of addresses that change owners in parallel.
const LANES: usize = 4;
/// The number of a container's requests, from its start on.
const REQUESTS: usize = 20;

/// How often an address changes owners in total.
fn reuses() -> Result<usize> {
    let wanted = std::env::var("REUSES").ok();
    wanted.map_or(Ok(40), |text| text.parse().context("REUSES takes a number"))
}

#[test]
fn an_address_that_changes_hands_never_reaches_its_former_owners_service() -> Result<()> {
    change_hands(|host| host.embassy(FLAGS))
}

/// The same where the kernel path is taken as soon as all is proved. From the second network Docker drops what goes to the endpoints, so
/// these connections go through the proxy.
#[test]
fn nor_does_it_on_the_kernel_path() -> Result<()> {
    change_hands(|host| host.embassy(FLAGS.into_iter().chain(["--path=auto"])))
}

/// As in a container without `--pid=host`: only the engine's events report ends.
#[test]
fn nor_does_it_where_the_containers_processes_cannot_be_seen() -> Result<()> {
    change_hands(blind)
}

/// An embassy that cannot see the containers' processes.
fn blind(host: &Host) -> Result<Embassy> {
    let mut command = host.command("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]);
    command.arg(embassy_program()?).args(FLAGS).env("DOCKER_HOST", host.docker_url());
    let embassy = host.embassy_from(command)?;
    host.client("somebody").start()?;
    says(&embassy, &["cannot see the processes of containers", "--pid=host"])?;
    Ok(embassy)
}

/// The engine reports neither the end of the first container nor the start of the second, and no process is visible.
/// Changes of this host's interfaces are the only sign.
#[test]
fn nor_does_it_where_events_are_lost_and_processes_cannot_be_seen() -> Result<()> {
    let host = Host::light()?;
    for name in ["red", "blue"] {
        web(&host, name)?;
    }
    let embassy = blind(&host)?;
    embassy.wait_ready(READY)?;
    for n in 0..5 {
        let first = host.client(&format!("first-{n}")).env("BACKEND_X", "/services/red;80");
        let first = first.start()?;
        reaches(&first, VIP, "red")?;
        host.loses_events(true)?;
        let address = first.ip()?;
        first.kill()?;
        let second = host.client(&format!("second-{n}")).env("BACKEND_X", "/services/blue;80");
        // The engine is slow to list the containers.
        host.delays_lists(true)?;
        let second = second.start()?;
        ensure!(second.ip()? == address, "the address was given again");
        let answers = thread::scope(|scope| {
            let dial = scope.spawn(|| second.get(VIP).run());
            testbed::eventually(WAIT, "the connection to be held", || {
                ensure!(!dial.is_finished(), "it was answered");
                let all = embassy.admin("/v1/connections")?.ok()?;
                ensure!(all.contains("\"held\""), "{all}");
                Ok(())
            })?;
            host.delays_lists(false)?;
            dial.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        ensure!(answers.from("blue") == 1, "run {n}: {answers:?}");
        // The container is known now, and stays served.
        reaches(&second, VIP, "blue")?;
        host.loses_events(false)?;
        second.remove()?;
    }
    Ok(())
}

/// Inspecting a container may take a while on a busy machine, and no connection must be refused because of that.
const FLAGS: [&str; 3] = ["--dnat", "--hold=20s", ETCD];

fn change_hands(start: impl FnOnce(&Host) -> Result<Embassy>) -> Result<()> {
    let (host, began) = (Host::start()?, Instant::now());
    for name in ["red", "blue"] {
        web(&host, name)?;
    }
    host.network("net", ["--subnet=10.82.0.0/24"])?;
    let out = host.dir().join("out");
    fs::create_dir(&out)?;
    let embassy = start(&host)?;
    embassy.wait_ready(READY)?;
    let each = reuses()?.div_ceil(LANES);
    thread::scope(|scope| {
        let lane = |n| Lane { host: &host, out: &out, n };
        let lanes: Vec<_> = (0..LANES).map(|n| scope.spawn(move || lane(n).run(each))).collect();
        let join = |lane: thread::ScopedJoinHandle<'_, Result<()>>| {
            lane.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        lanes.into_iter().try_for_each(join)
    })?;

    let (mut right, mut crossed, mut failed) = (0, 0, BTreeMap::new());
    for role in ["red", "blue"] {
        for n in 0..LANES {
            for line in said(&out, role, n)?.lines() {
                let answers = Answers::read(line)?;
                right += answers.from(role);
                crossed += answers.answered() - answers.from(role);
                for (reason, count) in answers.failures {
                    *failed.entry(reason).or_insert(0) += count;
                }
            }
        }
    }
    let took = began.elapsed();
    println!(
        "{} reuses in {took:?}: {right} right, {crossed} crossed, failed {failed:?}",
        LANES * each
    );
    assert_eq!((crossed, &failed), (0, &BTreeMap::new()), "{}", embassy.log());
    assert_eq!(right, LANES * each * REQUESTS);
    Ok(())
}

/// One address, and two containers that use it in turn.
struct Lane<'a> {
    host: &'a Host,
    out: &'a Path,
    n: usize,
}

impl Lane<'_> {
    fn run(&self, times: usize) -> Result<()> {
        let roles = ["red", "blue"];
        let mut containers: [Option<Container>; 2] = [None, None];
        for turn in 0..times {
            let at = turn % 2;
            match &containers[at] {
                Some(container) => self.engine(container, "start")?,
                None => containers[at] = Some(self.first(roles[at])?),
            }
            let runs = turn / 2 + 1;
            testbed::eventually(3 * WAIT, "the answers to a run", || {
                let said = said(self.out, roles[at], self.n)?;
                ensure!(said.lines().count() == runs, "{said:?}");
                Ok(())
            })?;
            // Sometimes the former owner is removed only here, while the next one is served.
            if turn % 5 == 4
                && let Some(former) = containers[1 - at].take()
            {
                former.remove()?;
            }
            if let Some(container) = &containers[at] {
                self.engine(container, "kill")?;
            }
        }
        Ok(())
    }

    /// Like `docker start` and `docker kill`, without starting a program for each: these calls are most of a long run.
    fn engine(&self, container: &Container, what: &str) -> Result<()> {
        let url = self.host.docker_url();
        let mut stream = UnixStream::connect(url.trim_start_matches("unix://"))?;
        stream.set_read_timeout(Some(3 * WAIT))?;
        let path = format!("/containers/{}/{what}", container.id());
        write!(stream, "POST {path} HTTP/1.0\r\nHost: docker\r\nContent-Length: 0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(answer.starts_with("HTTP/1.0 204 "), "{path}: {answer:?}");
        Ok(())
    }

    /// It connects from its start on, before it can have been inspected.
    fn first(&self, role: &str) -> Result<Container> {
        let words = format!(
            "testbed peer get {VIP} -n {REQUESTS} --timeout-ms 30000 >> /out/{role}-{}; exec testbed peer idle",
            self.n
        );
        let container = self.host.container(&format!("{role}-{}", self.n)).network("net");
        let container = container.arg(format!("--ip=10.82.0.{}", 10 + self.n));
        let container = container.arg(format!("--volume={}:/out", self.out.display()));
        let container = container.env("BACKEND_IT", &format!("/services/{role};80"));
        container.cmd(["sh", "-c", &words]).start()
    }
}

/// What the containers of one role and address wrote, complete lines only.
fn said(out: &Path, role: &str, n: usize) -> Result<String> {
    let mut text = fs::read_to_string(out.join(format!("{role}-{n}"))).unwrap_or_default();
    text.truncate(text.rfind('\n').map_or(0, |end| end + 1));
    Ok(text)
}

/// An engine that is restarted without `--live-restore`, which is the default, starts its containers again in any order.
/// Their addresses change owners while the engine cannot be asked.
#[test]
fn a_restart_of_the_engine_that_deals_the_addresses_anew_crosses_nobody() -> Result<()> {
    const SERVICES: usize = 4;
    let host = Host::start()?;
    let out = host.dir().join("out");
    fs::create_dir(&out)?;
    let embassy = host.embassy(["--dnat", "-discovery=docker://"])?;
    embassy.wait_ready(READY)?;
    let mut webs = Vec::new();
    for n in 0..SERVICES {
        let name = format!("web-{n}");
        let web = host.web(&name).arg("--restart=always").label("SERVICE_80_NAME", &name);
        webs.push(web.start()?);
        let words =
            format!("while :; do testbed peer get {VIP} -n 20 --timeout-ms 3000 >> /out/{n}; done");
        let app = host.client(&format!("app-{n}")).env("BACKEND_IT", &format!("{name};80"));
        let app =
            app.args(["--restart=always".to_owned(), format!("--volume={}:/out", out.display())]);
        app.cmd(["sh", "-c", &words]).start()?;
    }
    // For each container: how many answers came from its own service, and how many from another.
    let answers = || -> Result<Vec<(usize, usize)>> {
        let of_one = |n: usize| {
            let text = fs::read_to_string(out.join(n.to_string())).unwrap_or_default();
            let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
            // A killed container may leave half a line.
            let answers = whole.lines().filter_map(|line| Answers::read(line).ok());
            let (mut right, mut crossed) = (0, 0);
            for answers in answers {
                let own = answers.from(&format!("web-{n}"));
                right += own;
                crossed += answers.answered() - own;
            }
            (right, crossed)
        };
        Ok((0..SERVICES).map(of_one).collect())
    };
    let all_go_on = || {
        let before = answers()?;
        testbed::eventually(3 * WAIT, "everybody to be served", || {
            let now = answers()?;
            let further = now.iter().zip(&before).all(|(now, before)| now.0 > before.0);
            ensure!(further, "{before:?}, and then {now:?}");
            Ok(())
        })
    };
    let addresses = || webs.iter().map(Container::ip).collect::<Result<Vec<_>>>();
    all_go_on()?;
    let mut deals = vec![addresses()?];
    for _ in 0..5 {
        host.docker_daemon().restart()?;
        all_go_on()?;
        deals.push(addresses()?);
    }
    let counted = answers()?;
    println!("answers, right and crossed: {counted:?}; {} deals", deals.len());
    ensure!(counted.iter().all(|(_, crossed)| *crossed == 0), "{counted:?}\n{}", embassy.log());
    deals.dedup();
    ensure!(deals.len() > 1, "the addresses were always the same: {deals:?}");
    Ok(())
}

/// The client is not in the container, and does not end with it.
#[test]
fn the_connections_of_a_consumer_end_with_it() -> Result<()> {
    let host = Host::start()?;
    let greeter = host.server("greeter", ["greet"]).start()?;
    host.etcd()?.v3().put("/services/greet/one", &format!("{}:80", greeter.ip()?))?;
    let app = host.client("app").env("BACKEND_GREET", "/services/greet;80").start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    counts(&embassy, "embassy_routes", 1)?;
    let mut hold = app.command(testbed_program()?)?;
    hold.args(["peer", "hold", VIP, "-n", "20"]);
    let _held = host.spawn("held", hold)?;
    counts(&embassy, "embassy_connections_active", 20)?;

    let pid = app.pid()?.to_string();
    let start = Instant::now();
    host.run("kill", ["-KILL", &pid])?;
    let ended = loop {
        if metric(&embassy, "embassy_connections_active")? == 0 {
            break start.elapsed();
        }
        ensure!(start.elapsed() < WAIT, "{}", embassy.log());
        thread::sleep(Duration::from_millis(5));
    };
    println!("20 connections of a container ended {ended:?} after its first process was killed");
    assert_eq!(metric(&embassy, "embassy_connections_total{outcome=\"route_gone\"}")?, 20);
    assert_eq!(metric(&embassy, "embassy_routes")?, 0);
    Ok(())
}
