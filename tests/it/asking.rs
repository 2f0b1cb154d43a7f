//! The commands that ask a running embassy.

use std::{
    io::{Read, Write},
    process::{Child, Stdio},
    sync::mpsc,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::{Host, embassy_program};

use crate::{
    READY, WAIT,
    commands::{json, run},
    support::{ETCD, ends, offer, offer_at, reaches, says, sum, web},
};

/// The lines that a command prints, split into words, and its exit code.
fn rows(host: &Host, words: &[&str]) -> Result<(Vec<Vec<String>>, Option<i32>)> {
    let (text, code) = run(host, words)?;
    let row = |line: &str| line.split_whitespace().map(str::to_owned).collect();
    Ok((text.lines().map(row).collect(), code))
}

#[test]
fn routes_are_listed_explained_and_waited_for() -> Result<()> {
    let host = Host::light()?;
    let (text, code) = run(&host, &["status"])?;
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("no embassy answers") && text.contains("127.0.0.1:9990"), "{text}");
    assert_eq!(run(&host, &["wait", "/services/web", "--timeout=0"])?.1, Some(1));

    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80");
    let app = app.env("BACKEND_LATE", "/services/late;81").env("BACKEND_WRONG", "x");
    let app = app.start()?;
    let holder = host.client("holder").env("BACKEND_HANG", "/services/hang;82").start()?;
    let hang = host.server("hang", ["hang"]).start()?;
    offer(&host, "hang", hang.ip()?)?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    let (text, code) = run(&host, &["wait", "/services/web", "/services/hang"])?;
    assert_eq!((text.as_str(), code), ("/services/web, /services/hang: ready\n", Some(0)));
    let (text, code) = run(&host, &["wait", "/services/nobody", "--timeout=0"])?;
    assert_eq!(
        (text.as_str(), code),
        (
            "not ready: no container asks for /services/nobody; containers ask for /services/hang, /services/late, /services/web\n",
            Some(1)
        )
    );

    // The state and the problems.
    let (text, code) = run(&host, &["status"])?;
    assert_eq!(code, Some(0), "{text}");
    for part in
        ["ready, BROKEN: embassy", "dnat by nft, in place", "1 without endpoint", "BACKEND_WRONG"]
    {
        assert!(text.contains(part), "{part:?} in {text}");
    }
    assert_eq!(json(&host, &["status"])?["ready"], true);

    // One command leads from the symptom to the cause.
    for (consumer, port, code, beginning) in [
        ("app", "80", 0, "ok: The next connection of app to port 80 goes to "),
        ("app", "81", 1, "BROKEN: etcd /services/late has no endpoint"),
        ("app", "83", 1, "BROKEN: app BACKEND_WRONG was skipped: "),
        ("holder", "83", 1, "BROKEN: Port 83 is not declared by holder (declared: "),
        ("nobody", "80", 1, "BROKEN: No running container with a binding"),
    ] {
        let (text, status) = run(&host, &["explain", consumer, port])?;
        assert!(text.starts_with(beginning), "{text}");
        assert_eq!(status, Some(code), "{text}");
    }
    let explained = json(&host, &["explain", &app.ip()?.to_string(), "80"])?;
    assert_eq!(explained["verdict"], "ok", "{explained:#}");
    let (text, code) = run(&host, &["explain", "app", "0"])?;
    assert_eq!(
        (text.as_str(), code),
        ("embassy: <PORT> \"0\": expected a port from 1 to 65535\n", Some(2))
    );

    // The consumers with most connections.
    reaches(&app, "172.17.0.1:80", "web")?;
    let mut held = Vec::new();
    for n in 0..3 {
        held.push(holder.spawn(&n.to_string(), ["testbed", "peer", "recv", "172.17.0.1:82"])?);
    }
    testbed::eventually(WAIT, "three connections to be listed", || {
        let (rows, _) = rows(&host, &["ps", "--sort=active"])?;
        let first = rows.get(1).context("no rows")?;
        ensure!(first[0] == "holder" && first[7] == "3", "{rows:?}");
        Ok(())
    })?;
    let (only, _) = rows(&host, &["ps", "--service=/services/late"])?;
    assert_eq!((only.len(), only[1][5].as_str()), (2, "no_endpoint"), "{only:?}");
    assert_eq!(json(&host, &["ps", "hold"])?.as_array().map(Vec::len), Some(1));

    // An endpoint that gets no connections, and why. The other endpoint was there first, and may be next.
    offer_at(&host, "web", "192.168.13.77:80")?;
    testbed::eventually(WAIT, "the dead endpoint to be skipped", || {
        reaches(&app, "172.17.0.1:80", "web")?;
        let (rows, _) = rows(&host, &["ps", "--endpoints", "--service=/services/web"])?;
        let dead = rows.iter().find(|row| row.contains(&"192.168.13.77:80".to_owned()));
        ensure!(dead.is_some_and(|row| row[3] == "ejected"), "{rows:?}");
        Ok(())
    })?;
    let (text, code) = run(&host, &["explain", "app", "80"])?;
    assert!(text.contains("192.168.13.77:80 is skipped for "), "{text}");
    assert_eq!(code, Some(0), "{text}");

    // A state that no list has, a service that does not exist, and a part of a name.
    let late = "/services/late";
    for (words, code, part) in [
        (&["ps", "--state=typo"][..], 2, "--state \"typo\": expected one of ok, degraded, "),
        (&["ps", "--endpoints", "--state=ok"], 2, "expected one of active, ejected, "),
        (
            &["ps", "--endpoints", "--consumer=app"],
            2,
            "--consumer: cannot be combined with --endpoints",
        ),
        (&["ps", "nobody"], 0, "no entry matches\n"),
        (
            &["ps", "--service=lat"],
            0,
            "no service is named \"lat\"; these have it in their name:\n",
        ),
        (&["ps", "--service=lat"], 0, late),
        (
            &["ps", "--service=redis"],
            0,
            "the services are /services/hang, /services/late, /services/web\n",
        ),
        (&["ps", "--service=redis", "--json"], 0, "[]\n"),
        (&["wait", "/services/web[]", "--timeout=0"], 1, "no container asks for /services/web[]"),
    ] {
        let (text, status) = run(&host, words)?;
        assert!(status == Some(code) && text.contains(part), "{words:?}: {status:?} {text}");
    }
    let (rows, _) = rows(&host, &["ps", "--endpoints", "--service=/services/web"])?;
    let column = rows[0].iter().position(|name| name == "EJECTIONS").context("no column")?;
    // The column comes after the service, which is two words, and before a state, which is two words if it is ejected.
    let dead = rows.iter().find(|row| row.contains(&"192.168.13.77:80".to_owned()));
    let dead = dead.context("no such endpoint")?;
    assert!(
        dead[column + 1..=column + 3].iter().any(|n| n.parse::<u64>().is_ok_and(|n| n > 0)),
        "{rows:?}"
    );

    // An endpoint appears during the wait.
    ends(&app, "172.17.0.1:81", "reset")?;
    let mut wait = host.embassy_command(["wait", "/services/late", "--consumer=app"])?.spawn()?;
    offer(&host, "late", hang.ip()?)?;
    assert!(wait.wait()?.success());

    // A stopped embassy does not delay a command beyond its timeout.
    embassy.signal(rustix::process::Signal::STOP)?;
    let (text, code) = run(&host, &["wait", "/services/web", "--timeout=1s"])?;
    assert!(text.starts_with("not ready: embassy (process "), "{text}");
    assert!(text.contains("does not answer within 1 s, because it is stopped"), "{text}");
    assert_eq!(code, Some(1));
    Ok(())
}

/// Nobody has connected to it, so embassy knows nothing bad of it.
#[test]
fn a_service_is_waited_for_until_an_endpoint_accepts_connections() -> Result<()> {
    let host = Host::light()?;
    let web = web(&host, "web")?;
    offer_at(&host, "dead", &format!("{}:81", web.ip()?))?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80");
    let _app = app.env("BACKEND_DEAD", "/services/dead;81").start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    let (text, code) = run(&host, &["wait", "/services/web", "--timeout=0"])?;
    assert_eq!((text.as_str(), code), ("/services/web: ready\n", Some(0)));
    let dead = ["wait", "/services/web", "/services/dead", "--timeout=0"];
    let (text, code) = run(&host, &dead)?;
    let said =
        "not ready: no endpoint of etcd /services/dead accepts connections (1 endpoint tried; ";
    assert!(text.starts_with(said) && text.contains("refused"), "{text}");
    assert_eq!(code, Some(1));
    let (text, code) = run(&host, &[&dead[..], &["--no-probe"]].concat())?;
    assert_eq!((text.as_str(), code), ("/services/web, /services/dead: ready\n", Some(0)));
    // The application has seen none of it.
    assert_eq!(sum(&embassy, "embassy_connections_total")?, 0);
    // It comes to life.
    let mut wait = host.embassy_command(["wait", "/services/dead"])?.spawn()?;
    let _late = host.spawn("late", {
        let mut command = host.command("nsenter");
        command.args(["-t", &web.pid()?.to_string(), "-n"]).arg(testbed::testbed_program()?);
        command.args(["peer", "http", "--name", "late", "--port", "81"]);
        command
    })?;
    assert!(wait.wait()?.success());
    Ok(())
}

#[test]
fn an_embassy_behind_a_socket_is_asked_there() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let _app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let at = "--admin=unix:///run/embassy.sock";
    let embassy = host.embassy(["--dnat", ETCD, at])?;
    let (text, code) = run(&host, &["wait", "/services/web", at])?;
    assert_eq!(code, Some(0), "{text}\n{}", embassy.log());
    assert_eq!(json(&host, &["ps", at])?[0]["consumer"], "app");
    assert_eq!(run(&host, &["ps"])?.1, Some(1));
    Ok(())
}

#[test]
fn the_live_screen_comes_and_gives_the_terminal_back() -> Result<()> {
    let host = Host::light()?;
    let web = web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    let seen = json(&host, &["top", "--interval=100ms"])?;
    assert_eq!(seen["routes"][0]["consumer"], "app", "{seen:#}");
    assert_eq!(seen["routes"][0]["started_per_second"], 0.0, "{seen:#}");
    let (text, code) = run(&host, &["top"])?;
    assert!(code == Some(1) && text.contains("top needs a terminal"), "{text}");

    // Ended by its key, and by a signal.
    for by_key in [true, false] {
        let mut terminal = Terminal::start(&host)?;
        let pid = terminal.shows("pid ")?;
        let pid: String = pid
            .rsplit("pid ")
            .next()
            .unwrap_or("")
            .chars()
            .take_while(char::is_ascii_digit)
            .collect();
        terminal.shows("/services/web")?;
        if by_key {
            // The other list, which is read when it is to be shown.
            terminal.keys.write_all(b"e")?;
            terminal.shows(&format!("{}:80", web.ip()?))?;
            terminal.keys.write_all(b"q")?;
        } else {
            host.run("kill", [pid])?;
        }
        // The alternate screen was entered and left.
        let all = terminal.shows("\u{1b}[?1049l")?;
        assert!(all.contains("\u{1b}[?1049h"), "{all:?}");
        assert!(terminal.child.wait()?.success());
    }
    Ok(())
}

/// `embassy top` in its own terminal.
struct Terminal {
    child: Child,
    keys: std::process::ChildStdin,
    screen: mpsc::Receiver<Vec<u8>>,
    seen: Vec<u8>,
}

impl Terminal {
    fn start(host: &Host) -> Result<Self> {
        let program = embassy_program()?;
        let shell = format!("stty rows 30 cols 120; echo pid $$; exec {} top", program.display());
        let mut command = host.command("script");
        command.args(["-qefc", &shell, "/dev/null"]).env("TERM", "xterm");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("run script")?;
        let keys = child.stdin.take().context("no keys")?;
        let mut out = child.stdout.take().context("no screen")?;
        let (drawn, screen) = mpsc::channel();
        std::thread::spawn(move || {
            let mut some = [0; 4096];
            while let Ok(n @ 1..) = out.read(&mut some) {
                if drawn.send(some[..n].to_vec()).is_err() {
                    return;
                }
            }
        });
        Ok(Self { child, keys, screen, seen: Vec::new() })
    }

    /// Waits until the whole output so far contains `part`. Returns the output.
    fn shows(&mut self, part: &str) -> Result<String> {
        loop {
            let text = String::from_utf8_lossy(&self.seen).into_owned();
            if text.contains(part) {
                return Ok(text);
            }
            let more = self.screen.recv_timeout(Duration::from_secs(20));
            self.seen.extend(more.with_context(|| format!("{part:?} in {text:?}"))?);
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It has already ended if the test succeeded.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The JSON output of commands is that of the API.
#[test]
fn json_is_the_apis_own() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let _app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    let api: Value = embassy.admin("/v1/routes")?.json()?;
    let printed = json(&host, &["ps"])?;
    let fields = |value: &Value| -> Vec<String> {
        value.as_object().into_iter().flat_map(|object| object.keys().cloned()).collect()
    };
    assert_eq!(fields(&printed[0]), fields(&api["items"][0]));
    Ok(())
}

#[test]
fn a_container_whose_bindings_are_all_wrong_is_told_why_however_it_is_called() -> Result<()> {
    let host = Host::light()?;
    host.etcd()?;
    let app = host.client("app").env("BACKEND_A", "nonsense").env("BACKEND_OFF", "").start()?;
    let other = host.client("other").start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    says(&embassy, &["binding skipped", "BACKEND_A"])?;
    ensure!(!embassy.log().contains("BACKEND_OFF"), "{}", embassy.log());
    let address = app.ip()?.to_string();
    for wanted in ["app", app.id().get(..12).context("an ID")?, &address] {
        let (text, code) = run(&host, &["explain", wanted, "80"])?;
        let (first, _) = text.split_once('\n').context("a line")?;
        ensure!(first.starts_with("BROKEN: ") && first.contains("BACKEND_A"), "{wanted}: {text}");
        ensure!(code == Some(1) && !text.contains("without bindings"), "{wanted}: {text}");
    }
    // A container without bindings is reported differently.
    let (text, _) = run(&host, &["explain", &other.ip()?.to_string(), "80"])?;
    ensure!(text.contains("is a container without bindings"), "{text}");
    Ok(())
}
