//! An upgrade as a supervisor does it: systemd tells embassy to reload, hears from it, and stops and starts it.
//! What a takeover itself keeps is in `data_path::takeover`.

use std::{os::unix::net::UnixDatagram, process::Command};

use anyhow::{Context, Result, ensure};
use testbed::{Container, Embassy, Host, Signal};

use crate::{
    READY, WAIT,
    capture::IPTABLES,
    life_cycle::{hanging, with_hanging},
    support::{ETCD, counts, metric, offer, offer_at, reaches, restored, says, web},
};

/// Where a supervisor listens, and what it has heard.
struct Supervisor {
    socket: UnixDatagram,
    path: String,
    heard: Vec<String>,
}

impl Supervisor {
    fn new(host: &Host) -> Result<Self> {
        let path = host.dir().join("notify");
        let socket = UnixDatagram::bind(&path)?;
        socket.set_read_timeout(Some(WAIT))?;
        Ok(Self { socket, path: path.display().to_string(), heard: Vec::new() })
    }

    /// The next message, whatever says only that it lives or is ready.
    fn hears(&mut self) -> Result<String> {
        loop {
            let mut bytes = [0; 4096];
            let length = self.socket.recv(&mut bytes);
            let length = length.with_context(|| format!("nothing after {:?}", self.heard))?;
            let text = String::from_utf8(bytes[..length].to_vec())?;
            self.heard.push(text.clone());
            if text != "WATCHDOG=1" && !text.starts_with("STATUS=") {
                return Ok(text);
            }
        }
    }

    fn times(&self, text: &str) -> usize {
        self.heard.iter().filter(|one| *one == text).count()
    }
}

/// A host with a service and a consumer, and a flag for a state that outlives a process.
fn host() -> Result<(Host, Container, String)> {
    let host = Host::light()?;
    web(&host, "web")?;
    let pool = host.server("pool", ["hang"]).start()?;
    offer(&host, "pool", pool.ip()?)?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80");
    let app = app.env("BACKEND_POOL", "/services/pool;81").start()?;
    let state = host.dir().join("state");
    std::fs::create_dir_all(&state)?;
    Ok((host, app, format!("--state-dir={}", state.display())))
}

/// embassy with a supervisor.
fn supervised(host: &Host, supervisor: &Supervisor, flags: &[&str]) -> Result<Command> {
    let mut command = host.embassy_command(["--dnat", ETCD].iter().chain(flags))?;
    command.env("NOTIFY_SOCKET", &supervisor.path).env("WATCHDOG_USEC", "900000");
    Ok(command)
}

#[test]
fn the_supervisor_hears_of_the_start_the_upgrades_and_the_end() -> Result<()> {
    let (host, app, state) = host()?;
    let mut supervisor = Supervisor::new(&host)?;
    let first = host.embassy_from(supervised(&host, &supervisor, &[&state])?)?;
    assert_eq!(supervisor.hears()?, "READY=1");
    assert_eq!(first.admin("/readyz")?.status, 200, "it is told once embassy is ready");
    reaches(&app, "172.17.0.1:80", "web")?;
    let (live, flood) =
        (app.live("live", "172.17.0.1:80")?, app.traffic("flood", "172.17.0.1:80")?);
    // By its number in the host: the old one's, then that of the one which it has started.
    let mut main = host.run("pgrep", ["-x", "embassy"])?;
    for n in 1..=2 {
        host.run("kill", ["-USR2", &main])?;
        while !supervisor.hears()?.starts_with("RELOADING=1\nMONOTONIC_USEC=") {}
        // Both say which process is the main one: whatever the supervisor sees first, it does not take the old one's end for the end.
        let (mut said, mut of_old) = (String::new(), String::new());
        while !said.contains("\nREADY=1") {
            said = supervisor.hears()?;
            ensure!(!said.contains("could not"), "{said}");
            if said.starts_with("MAINPID=") && !said.contains('\n') {
                of_old = said.clone();
            }
        }
        let new = said
            .strip_prefix("MAINPID=")
            .and_then(|rest| rest.strip_suffix("\nREADY=1\nSTATUS=has taken over"));
        let new = new.with_context(|| said.clone())?.to_owned();
        ensure!(new != main, "{said}");
        ensure!(of_old.is_empty() || of_old == format!("MAINPID={new}"), "{of_old}, and {said}");
        testbed::eventually(WAIT, "the old one to end", || {
            let left = host.run("pgrep", ["-x", "embassy"])?;
            ensure!(left == new, "{left}");
            Ok(())
        })?;
        main = new;
        counts(&first, "embassy_takeovers_total", n)?;
    }
    assert!(first.wait(WAIT)?.success());
    for traffic in [live, flood] {
        let answers = traffic.stop()?;
        ensure!(answers.failed() == 0 && answers.from("web") > 0, "{answers:?}");
    }
    host.run("kill", ["-TERM", &main])?;
    while supervisor.hears()? != "STOPPING=1\nSTATUS=waiting for open connections to end" {}
    ensure!(supervisor.times("WATCHDOG=1") > 0, "{:?}", supervisor.heard);
    ensure!(supervisor.times("STATUS=ready") > 0, "{:?}", supervisor.heard);
    let stops = supervisor.heard.iter().filter(|one| one.starts_with("STOPPING=1")).count();
    assert_eq!(stops, 1, "one that has handed over does not stop the unit: {:?}", supervisor.heard);
    Ok(())
}

#[test]
fn an_upgrade_that_fails_is_told_and_disturbs_nothing() -> Result<()> {
    let (host, app, state) = host()?;
    let mut supervisor = Supervisor::new(&host)?;
    let mut command = supervised(&host, &supervisor, &[&state])?;
    // Only a process that takes over gets there.
    command.env("EMBASSY_TAKEOVER_DIES", "handles taken");
    let embassy = host.embassy_from(command)?;
    assert_eq!(supervisor.hears()?, "READY=1");
    reaches(&app, "172.17.0.1:80", "web")?;
    let flood = app.traffic("flood", "172.17.0.1:80")?;
    for _ in 0..2 {
        embassy.signal(Signal::USR2)?;
        ensure!(supervisor.hears()?.starts_with("RELOADING=1\n"));
        let failed = supervisor.hears()?;
        ensure!(
            failed.starts_with("READY=1\nSTATUS=the new process could not take over"),
            "{failed}"
        );
        says(&embassy, &["the new process has not taken over"])?;
    }
    let answers = flood.stop()?;
    ensure!(answers.failed() == 0 && answers.from("web") > 0, "{answers:?}");
    assert_eq!((embassy.exited()?, restored(&embassy)?), (None, 0));
    embassy.terminate()?;
    assert!(embassy.wait(WAIT)?.success());
    // Without one that could be told, the process that it knows would end.
    let embassy = host.embassy(["--dnat", ETCD, &state])?;
    embassy.wait_ready(READY)?;
    embassy.signal(Signal::USR2)?;
    says(&embassy, &["no new process is started", "NOTIFY_SOCKET is not set"])?;
    reaches(&app, "172.17.0.1:80", "web")
}

#[test]
fn a_source_that_is_down_does_not_let_the_supervisor_wait_for_ever() -> Result<()> {
    let (host, app, state) = host()?;
    let mut supervisor = Supervisor::new(&host)?;
    host.fake_engine().context("a light host")?.answers("", testbed::Mood::Hangs);
    let embassy = host.embassy_from(supervised(&host, &supervisor, &[&state])?)?;
    assert_eq!(supervisor.hears()?, "READY=1");
    assert_eq!(embassy.admin("/readyz")?.status, 503);
    let not_ready = "STATUS=not ready: \"embassy status\" says what is missing";
    host.fake_engine().context("a light host")?.answers("", None);
    reaches(&app, "172.17.0.1:80", "web")?;
    embassy.wait_ready(READY)?;
    embassy.terminate()?;
    while !supervisor.hears()?.starts_with("STOPPING=1") {}
    let all: Vec<_> = supervisor.heard.iter().filter(|one| one.starts_with("STATUS=")).collect();
    assert_eq!(all, [not_ready, "STATUS=ready"]);
    Ok(())
}

/// A thread of the data path stands still. All others go on, the one that tells the supervisor among them.
#[test]
fn one_thread_that_stands_still_is_not_said_to_live() -> Result<()> {
    let (host, app, state) = host()?;
    let mut supervisor = Supervisor::new(&host)?;
    let embassy = host.embassy_from(supervised(&host, &supervisor, &[&state])?)?;
    assert_eq!(supervisor.hears()?, "READY=1");
    reaches(&app, "172.17.0.1:80", "web")?;
    let tasks = format!("/proc/{}/task", embassy.pid());
    let mut workers = std::fs::read_dir(&tasks)?.map(|task| Ok(task?.path()));
    let worker = workers.find_map(|task: Result<std::path::PathBuf>| {
        let task = task.ok()?;
        let name = std::fs::read_to_string(task.join("comm")).ok()?;
        (name.trim() == "worker-0").then(|| task.file_name()?.to_str().map(str::to_owned))?
    });
    // From now on each wait of its takes a minute.
    let mut still = Command::new("strace");
    still.args(["-qq", "-o", "/dev/null", "-e", "trace=epoll_wait,epoll_pwait"]);
    still.args(["-e", "inject=epoll_wait,epoll_pwait:delay_enter=60000000"]);
    still.args(["-p", &worker.context("no worker")?]);
    let still = host.spawn("still", still)?;
    testbed::eventually(WAIT, "silence", || {
        supervisor.socket.set_read_timeout(Some(std::time::Duration::from_secs(2)))?;
        let heard = supervisor.socket.recv(&mut [0; 4096]);
        ensure!(heard.is_err(), "it is said to live");
        Ok(())
    })?;
    assert_eq!(embassy.admin("/healthz")?.status, 200, "the thread that tells goes on");
    drop(still);
    supervisor.socket.set_read_timeout(Some(WAIT))?;
    let mut bytes = [0; 4096];
    let length = supervisor.socket.recv(&mut bytes).context("it lives again")?;
    assert_eq!(&bytes[..length], b"WATCHDOG=1");
    Ok(())
}

#[test]
fn one_that_drains_gives_its_admin_address_back_and_can_be_taken_over() -> Result<()> {
    let (host, app, state) = host()?;
    let old = host.embassy(["--dnat", ETCD, &state, "--drain=1h"])?;
    old.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    let pooled = app.live("pooled", "172.17.0.1:80")?;
    let idle = app.spawn("idle", ["testbed", "peer", "recv", "172.17.0.1:81"])?;
    counts(&old, "embassy_connections_active", 2)?;
    let flood = app.traffic("flood", "172.17.0.1:80")?;
    old.terminate()?;
    says(&old, &["waiting for connections to end"])?;
    testbed::eventually(WAIT, "the address to be free", || {
        ensure!(old.admin("/readyz").is_err());
        Ok(())
    })?;
    // Another one, which does something else, has the address at once.
    let other = host.embassy(["-p=9998", "--state-dir=off"])?;
    testbed::eventually(WAIT, "another one to listen there", || other.admin("/healthz")?.ok())?;
    other.kill()?;
    assert_eq!(old.exited()?, None);
    let new = host.embassy(["--dnat", ETCD, &state, "--takeover"])?;
    // Until it has taken over, the old one may answer for it.
    assert!(old.wait(READY)?.success());
    new.wait_ready(READY)?;
    assert_eq!(metric(&new, "embassy_takeovers_total")?, 1);
    for (name, traffic) in [("pooled", pooled), ("flood", flood)] {
        let answers = traffic.stop()?;
        ensure!(answers.failed() == 0 && answers.from("web") > 0, "{name}: {answers:?}");
    }
    assert_eq!((idle.exited()?, restored(&new)?), (None, 0));
    Ok(())
}

/// The programs of the firewall hang, or the kernel refuses: the new one cannot start, and the old one goes on.
#[test]
fn a_firewall_that_is_broken_meanwhile_costs_no_connection() -> Result<()> {
    let (host, app) = hanging()?;
    let folder = host.dir().join("state");
    std::fs::create_dir_all(&folder)?;
    let state = format!("--state-dir={}", folder.display());
    let old = with_hanging(&host, &[&state])?;
    old.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    let (live, flood) =
        (app.live("live", "172.17.0.1:80")?, app.traffic("flood", "172.17.0.1:80")?);
    host.run("touch", ["/run/hang"])?;
    let new = with_hanging(&host, &[&state, "--takeover"])?;
    assert_eq!(new.wait(2 * READY)?.code(), Some(1));
    ensure!(new.log().contains("no firewall is available"), "{}", new.log());
    host.run("rm", ["/run/hang"])?;
    // One without the right to write rules.
    let mut powerless = host.command("setpriv");
    powerless.args(["--bounding-set=-net_admin", "--inh-caps=-net_admin"]);
    powerless.arg(testbed::embassy_program()?).env("DOCKER_HOST", host.docker_url());
    powerless.args(["--dnat", ETCD, IPTABLES, &state, "--takeover"]);
    let new = host.embassy_from(powerless)?;
    assert_eq!(new.wait(2 * READY)?.code(), Some(1));
    assert_eq!(old.exited()?, None);
    // Then it works.
    let new = with_hanging(&host, &[&state, "--takeover"])?;
    // Until it has taken over, the old one may answer for it.
    assert!(old.wait(READY)?.success());
    new.wait_ready(READY)?;
    assert_eq!(metric(&new, "embassy_takeovers_total")?, 1);
    for (name, traffic) in [("live", live), ("flood", flood)] {
        let answers = traffic.stop()?;
        ensure!(answers.failed() == 0 && answers.from("web") > 0, "{name}: {answers:?}");
    }
    Ok(())
}

/// Sources that say nothing at all, instead of refusing.
#[test]
fn sources_that_hang_meanwhile_cost_no_connection() -> Result<()> {
    let (host, app, state) = host()?;
    let consul = host.consul()?;
    let server = host.web("other").start()?;
    consul.service("other", "other").address(server.ip()?).port(80).register()?;
    offer_at(&host, "more", &format!("{}:80", server.ip()?))?;
    let second = host.client("second").env("BACKEND_OTHER", "other;80;via=consul").start()?;
    let flags = [&*state, "-discovery=consul://127.0.0.1:8500", "--connection-log=errors"];
    let start = |more: &[&str]| -> Result<Embassy> {
        host.embassy(["--dnat", ETCD].iter().chain(&flags).chain(more))
    };
    let old = start(&[])?;
    old.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    reaches(&second, "172.17.0.1:80", "other")?;
    let table = host.dir().join("state/table-9999");
    testbed::eventually(WAIT, "the saved table", || {
        let text = std::fs::read_to_string(&table)?;
        ensure!(text.contains("other") && text.contains("/services/web"), "{text}");
        Ok(())
    })?;
    let traffic = [
        ("web", app.live("live", "172.17.0.1:80")?),
        ("web", app.traffic("flood", "172.17.0.1:80")?),
        ("other", second.traffic("others", "172.17.0.1:80")?),
    ];
    host.fake_engine().context("a light host")?.answers("", testbed::Mood::Hangs);
    host.etcd_daemon().pause()?;
    host.consul_daemon().pause()?;
    let new = start(&["--takeover"])?;
    let status = old.wait(3 * READY)?;
    ensure!(status.success(), "the old one ended with {status}");
    assert_eq!(metric(&new, "embassy_takeovers_total")?, 1);
    for (name, traffic) in traffic {
        let answers = traffic.stop()?;
        ensure!(answers.failed() == 0 && answers.from(name) == answers.answered(), "{answers:?}");
        ensure!(answers.answered() > 0, "{name}: {answers:?}");
    }
    host.etcd_daemon().resume()?;
    host.consul_daemon().resume()
}

/// The programs of the new one are attached before those of the old one go, and the rules capture all the while.
#[test]
fn no_dial_on_the_kernel_path_fails_while_its_programs_are_replaced() -> Result<()> {
    let (host, app, state) = host()?;
    let flags = ["--dnat", ETCD, "--path=kernel", &state];
    let takes_it = |embassy: &Embassy| {
        testbed::eventually(WAIT, "the kernel path", || {
            let routes = embassy.admin("/v1/routes?consumer=app")?.json()?;
            let routes = routes["items"].as_array().context("no list")?.clone();
            let route = routes.iter().find(|route| route["port"] == 80).context("no route")?;
            ensure!(route["path"] == "kernel", "{route}");
            Ok(())
        })
    };
    let mut running = host.embassy(flags)?;
    running.wait_ready(READY)?;
    takes_it(&running)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    let (live, flood) =
        (app.live("live", "172.17.0.1:80")?, app.traffic("flood", "172.17.0.1:80")?);
    for _ in 0..3 {
        let new = host.embassy(flags.iter().chain(&["--takeover"]))?;
        assert!(running.wait(READY)?.success());
        new.wait_ready(READY)?;
        takes_it(&new)?;
        running = new;
    }
    assert_eq!(metric(&running, "embassy_takeovers_total")?, 3);
    for (name, traffic) in [("live", live), ("flood", flood)] {
        let answers = traffic.stop()?;
        ensure!(answers.failed() == 0 && answers.from("web") > 0, "{name}: {answers:?}");
    }
    Ok(())
}
