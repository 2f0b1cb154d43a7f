//! The servers and clients in containers, without a proxy between them.

use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use serde_json::Value;
use testbed::{Container, Host};

/// A server of each role on a port of its own in one container, and a client in another.
struct Pair {
    app: Container,
    address: String,
    server: Container,
    _servers: Vec<testbed::Process>,
}

impl Pair {
    fn of(host: &Host, roles: &[(&str, &str)]) -> Result<Self> {
        let server = host.client("server").start()?;
        let app = host.client("app").start()?;
        let address = server.ip()?.to_string();
        let mut servers = Vec::new();
        for (port, role) in roles {
            let words =
                ["testbed", "peer"].into_iter().chain(role.split(' ')).chain(["--port", port]);
            servers.push(server.spawn(port, words)?);
            testbed::eventually(Duration::from_secs(10), role, || {
                let probe = app.peer(["probe", &format!("{address}:{port}"), "--wait-ms", "1"])?;
                anyhow::ensure!(probe["outcome"] != "refused", "{role} does not listen yet");
                Ok(())
            })?;
        }
        Ok(Self { app, address, server, _servers: servers })
    }

    fn at(&self, port: u16) -> String {
        format!("{}:{port}", self.address)
    }
}

#[test]
fn transfers_are_whole_in_both_directions() -> Result<()> {
    let host = Host::start()?;
    let pair = Pair::of(
        &host,
        &[
            ("1001", "sink"),
            ("1002", "source --bytes 3000001 --seed 5"),
            ("1003", "duplex --bytes 3000001 --seed 6"),
        ],
    )?;
    let line =
        |sum: &Value| format!("{} {}\n", sum["bytes"], sum["sha256"].as_str().unwrap_or_default());

    let sent = pair.app.peer(["send", &pair.at(1001), "--bytes", "3000001", "--seed", "5"])?;
    assert_eq!(sent["answer"], line(&sent["sent"]));
    let received = pair.app.peer(["recv", &pair.at(1002)])?;
    assert_eq!(received["received"], sent["sent"]);
    let both = pair.app.peer([
        "duplex",
        &pair.at(1003),
        "--bytes",
        "3000001",
        "--seed",
        "5",
        "--rate",
        "10000000",
    ])?;
    assert_eq!(both["sent"], sent["sent"]);
    assert_eq!(both["answer"], line(&both["sent"]));
    assert_eq!(both["received"]["bytes"], 3_000_001);
    assert_ne!(both["received"], both["sent"]);
    Ok(())
}

#[test]
fn either_side_may_speak_or_close_first() -> Result<()> {
    let host = Host::start()?;
    let pair = Pair::of(
        &host,
        &[("1001", "greet --name joe"), ("1002", "first-to-close"), ("1003", "echo")],
    )?;

    let greeted = pair.app.peer(["send", &pair.at(1001), "--bytes", "0"])?;
    assert_eq!(greeted["answer"], "hello from joe\n");
    let closed = pair.app.peer(["send", &pair.at(1002), "--bytes", "100000", "--seed", "3"])?;
    assert_eq!(closed["answer"], "bye\n");
    let log = || pair._servers[1].log();
    let expected = format!("100000 {}\n", closed["sent"]["sha256"].as_str().unwrap_or_default());
    testbed::eventually(
        Duration::from_secs(10),
        "what the server read after it had closed",
        || {
            anyhow::ensure!(log().contains(&expected), "it printed {:?}", log());
            Ok(())
        },
    )?;
    assert_eq!(
        pair.app.exec(["sh", "-c", &format!("echo hi | nc {} 1003", pair.server.ip()?)])?,
        "hi"
    );
    Ok(())
}

#[test]
fn a_probe_tells_how_a_connection_ends() -> Result<()> {
    let host = Host::start()?;
    let pair = Pair::of(&host, &[("1001", "reset"), ("1002", "hang"), ("1003", "greet")])?;

    let outcome = |port| Ok::<_, anyhow::Error>(pair.app.probe(pair.at(port))?.outcome);
    assert_eq!(outcome(1000)?, "refused");
    assert_eq!(outcome(1001)?, "reset");
    assert_eq!(outcome(1002)?, "open");
    assert_eq!(outcome(1003)?, "data");
    let reset = pair.app.get(pair.at(1001)).times(3).run()?;
    assert_eq!((reset.answered(), reset.failed()), (0, 3), "{reset:?}");
    let hanging = pair.app.get(pair.at(1002)).timeout(Duration::from_millis(200)).run()?;
    assert_eq!(hanging.failures.get("read: timeout"), Some(&1), "{hanging:?}");
    Ok(())
}

#[test]
fn a_web_server_keeps_connections_and_has_bodies_of_any_size() -> Result<()> {
    let host = Host::start()?;
    let web = host.web("web").label("a", "b").env("SERVICE_NAME", "web").start()?;
    let app = host.client("app").start()?;
    let address = web.ip()?;

    let answers = app.get(address).times(100).at_once(5).keep_alive().run()?;
    assert_eq!((answers.from("web"), answers.failed()), (100, 0), "{answers:?}");
    let big = app.get(format!("http://{address}/bytes/100000")).run()?;
    assert_eq!(big.from("100000 bytes"), 1, "{big:?}");
    assert_eq!(app.exec(["curl", "-s", &format!("http://{address}/")])?, "web");
    assert_eq!(web.inspect("{{.Config.Labels.a}}")?, "b");
    assert!(web.exec(["env"])?.contains("SERVICE_NAME=web"));
    let routes = testbed::output(web.command("ip")?.args(["route"]))?;
    assert!(routes.contains("default via 172.17.0.1"), "{routes}");
    Ok(())
}

#[test]
fn an_image_holds_other_programs() -> Result<()> {
    let host = Host::start()?;
    let programs = ["/usr/sbin/ip", "/usr/sbin/iptables", "/usr/sbin/nft"];
    let extensions = testbed::output(Command::new("sh").args(["-c", "echo /usr/lib/*/xtables"]))?;
    host.image_with("tools", &programs, &["/etc/debian_version", &extensions])?;

    let shown = host.docker(["run", "--rm", "tools", "-brief", "address", "show", "lo"])?;
    assert!(shown.contains("127.0.0.1/8"), "{shown}");
    let script = "cat /etc/debian_version
        iptables -t nat -A OUTPUT -p tcp --dport 80 -j REDIRECT --to-ports 8080
        nft list ruleset";
    let run = ["run", "--rm", "--cap-add=NET_ADMIN", "--entrypoint=sh", "tools", "-ec", script];
    let shown = host.docker(run)?;
    assert!(shown.starts_with(&std::fs::read_to_string("/etc/debian_version")?), "{shown}");
    assert!(shown.contains("tcp dport 80"), "{shown}");
    Ok(())
}
