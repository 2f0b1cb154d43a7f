//! A connection without a route is reset at once, counted by reason, and leaves nothing behind.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use testbed::{Container, Embassy, Host};

use super::{ETCD, ended, vip, wait_ended};
use crate::{READY, WAIT};

/// Not a VIP, but another program's rule redirects it to our port.
const FOREIGN: &str = "10.9.9.9:80";

#[test]
fn what_means_no_route_is_reset_and_counted_and_leaks_nothing() -> Result<()> {
    let host = Host::light()?;
    let etcd = host.etcd()?;
    let web = host.web("web").start()?;
    let closed = host.client("closed").start()?;
    etcd.v3().put("/services/web/one", &format!("{}:80", web.ip()?))?;
    etcd.v3().put("/services/down/one", &format!("{}:80", closed.ip()?))?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80");
    let app = app.env("BACKEND_NONE", "/services/none;81").env("BACKEND_DOWN", "/services/down;82");
    let (app, stranger) = (app.start()?, host.client("stranger").start()?);
    for rule in [
        "add table ip foreign",
        "add chain ip foreign pre { type nat hook prerouting priority -150; }",
        "add rule ip foreign pre ip daddr 10.9.9.9 tcp dport 80 redirect to :9999",
    ] {
        host.run("nft", [rule])?;
    }
    // An address that Docker did not assign.
    for change in ["address flush dev eth0", "address add 172.17.200.1/16 dev eth0"] {
        testbed::output(stranger.command("ip")?.args(change.split(' ')))?;
    }
    let embassy = host.embassy(["--dnat", "--capture=all", "--hold=0", ETCD])?;
    embassy.wait_ready(READY)?;
    assert_eq!(app.get(vip(80)).run()?.from("web"), 1);

    let refusals: [(&str, &Container, String, &str); 5] = [
        ("no_route", &app, vip(4444), "reset"),
        ("no_endpoint", &app, vip(81), "reset"),
        ("endpoints_unreachable", &app, vip(82), "reset"),
        ("unknown_consumer", &stranger, vip(80), "reset"),
        ("not_a_vip", &app, FOREIGN.to_owned(), "reset"),
    ];
    for (reason, from, target, expected) in &refusals {
        let before = ended(&embassy, reason)?;
        let probe = from.probe(target)?;
        assert_eq!(probe.outcome, *expected, "{reason}: {target}");
        assert_eq!(ended(&embassy, reason)?, before + 1, "{reason}");
    }

    // A connection that was not captured does not reach embassy.
    let direct = app.probe(format!("{}:9999", testbed::HOST_ADDRESS))?;
    assert_eq!(direct.outcome, "refused");
    assert_eq!(ended(&embassy, "direct_dial")?, 0);

    // What each worker opens once, at its first such connections, is not a leak.
    for (_, from, target, _) in &refusals {
        from.get(target).times(100).at_once(8).run()?;
    }
    // On a busy machine one more socket was open after a round, now and then, and which one is not known. A leak by connections shows
    // in every round.
    let mut rounds = 1..=3;
    loop {
        let round = rounds.next().context("a round")?;
        let before = descriptors(&embassy)?;
        for (reason, from, target, _) in &refusals {
            let answers = from.get(target).times(500).at_once(8).run()?;
            assert_eq!((answers.answered(), answers.failed()), (0, 500), "{reason}: {answers:?}");
            assert!(!answers.failures.contains_key("read: timeout"), "{reason}: {answers:?}");
            assert_eq!(ended(&embassy, reason)?, 101 + 500 * round, "{reason}");
        }
        let leaked = || {
            let now = descriptors(&embassy)?;
            let count = |kinds: &Descriptors| kinds.values().sum::<usize>();
            ensure!(count(&now) <= count(&before), "before: {before:?}, after: {now:?}");
            Ok(())
        };
        match testbed::eventually(WAIT, "as few descriptors as before", leaked) {
            Ok(()) => break,
            Err(error) if rounds.is_empty() => return Err(error),
            Err(_) => {}
        }
    }
    assert_eq!(app.get(vip(80)).run()?.from("web"), 1);
    Ok(())
}

#[test]
fn on_a_port_that_was_not_declared_the_host_itself_answers() -> Result<()> {
    let host = Host::light()?;
    host.etcd()?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let stranger = host.client("stranger").start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    assert_eq!(app.probe(vip(4444))?.outcome, "refused");
    assert_eq!(stranger.probe(vip(80))?.outcome, "refused");
    assert_eq!(app.probe(vip(80))?.outcome, "reset");
    assert_eq!(ended(&embassy, "no_endpoint")?, 1);
    Ok(())
}

/// How many descriptors there are of each kind, such as `socket` or the path of a file.
type Descriptors = BTreeMap<String, usize>;

fn descriptors(embassy: &Embassy) -> Result<Descriptors> {
    let mut kinds = Descriptors::new();
    for entry in std::fs::read_dir(format!("/proc/{}/fd", embassy.pid()))? {
        // A descriptor that was closed meanwhile has no target.
        let Ok(target) = std::fs::read_link(entry?.path()) else { continue };
        let target = target.to_string_lossy().into_owned();
        let kind = match target.split_once(":[") {
            Some((kind @ ("socket" | "pipe"), _)) => kind.to_owned(),
            _ => target,
        };
        *kinds.entry(kind).or_default() += 1;
    }
    Ok(kinds)
}

#[test]
fn an_endpoint_that_leads_back_to_us_is_not_dialled() -> Result<()> {
    const VIP: &str = "172.17.0.1";
    let host = Host::light()?;
    let file = host.dir().join("services.toml");
    let services = format!("[[service]]\nname = \"web\"\nendpoints = [\"{VIP}:80\"]\n");
    std::fs::write(&file, services)?;
    // A user's own rule, which captures embassy's connections too.
    let rule = ["-t", "nat", "-I", "OUTPUT", "-p", "tcp", "-d", VIP, "-j", "REDIRECT"];
    host.run("iptables", [&rule[..], &["--to-ports", "9999"]].concat())?;
    let discovery = format!("-discovery=file://{}", file.display());
    let proxy_ip = format!("--proxy-ip={VIP}");
    let embassy = host.embassy(["-provider=static", "-services=web;80", &proxy_ip, &discovery])?;
    embassy.wait_ready(READY)?;
    host.run("curl", ["-s", "-m", "10", &format!("http://{VIP}/")]).unwrap_err();
    wait_ended(&embassy, "circular", 1)?;
    assert_eq!(ended(&embassy, "closed")? + ended(&embassy, "endpoint_reset")?, 0);
    Ok(())
}
