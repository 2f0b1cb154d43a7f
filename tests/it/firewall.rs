//! Other programs change the firewall: flushes, reloads, restarts, rules before ours, and rules that would drop captured
//! connections.

use std::time::Instant;

use anyhow::{Result, ensure};
use embassy::admin::api;
use testbed::{Container, Embassy, Host};

use crate::{
    READY, WAIT,
    capture::{IPTABLES, NFT, NFT_SHARED, ours, rules, strangers_rules},
    support::{
        ETCD, SBIN, counts, ends, metric, offer, reaches, restored, says, web, with_programs,
    },
};

/// A command that changes the firewall, and embassy's word for the change.
type Blow<'a> = (&'a [&'a str], &'a str);

#[test]
fn others_cannot_take_the_rules_of_a_running_embassy() -> Result<()> {
    let host = Host::start()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    host.run("sh", ["-ec", "(echo flush ruleset; nft list ruleset) > /run/before"])?;
    let embassy = host.embassy(["--dnat", ETCD, NFT])?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    let written = ours(&host, NFT)?;
    for (words, is_refused) in [
        ("nft flush ruleset", false),
        ("nft -f /run/before", false),
        ("iptables -t nat -F", false),
        ("nft delete table inet embassy", true),
        ("nft flush chain inet embassy declared", true),
        ("nft insert rule inet embassy prerouting accept", true),
    ] {
        let done = host.run("sh", ["-ec", words]);
        assert_eq!(done.is_err(), is_refused, "{words}: {done:?}");
        if let Err(error) = done {
            ensure!(format!("{error:#}").contains("Operation not permitted"), "{error:#}");
        }
        assert_eq!(ours(&host, NFT)?, written, "{words}");
        let answers = app.get("172.17.0.1:80").times(5).run()?;
        assert_eq!(answers.from("web"), 5, "{words}: {answers:?}");
    }
    // embassy keeps changing its own rules.
    let second = host.client("second").env("BACKEND_WEB", "/services/web;81").start()?;
    reaches(&second, "172.17.0.1:81", "web")?;
    second.remove()?;
    testbed::eventually(WAIT, "the rules to be as before", || {
        let now = ours(&host, NFT)?;
        ensure!(now == written, "{now}");
        Ok(())
    })?;
    assert_eq!((restored(&embassy)?, metric(&embassy, "embassy_capture_failures_total")?), (0, 0));
    Ok(())
}

#[test]
fn an_idle_embassy_starts_no_program_by_nft() -> Result<()> {
    idle(NFT)
}

#[test]
fn an_idle_embassy_starts_no_program_by_nft_without_an_owner() -> Result<()> {
    idle(NFT_SHARED)
}

#[test]
fn an_idle_embassy_starts_no_program_by_iptables() -> Result<()> {
    idle(IPTABLES)
}

/// embassy, idle among rules of other programs.
fn idle(firewall: &str) -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    // Wrappers for every program that embassy may start. They log each start.
    let told = "mkdir -p /run/bin; for name in nft iptables-save ip6tables-save iptables-restore \
                ip6tables-restore; do printf '#!/bin/sh\necho %s \"$*\" >> /run/started\nexec %s \"$@\"\n' \
                $name SBIN/$name > /run/bin/$name; chmod +x /run/bin/$name; done";
    host.run("sh", ["-ec", &told.replace("SBIN", SBIN)])?;
    let mut command = with_programs(&host, "/run/bin")?;
    command.args(["--dnat", ETCD, firewall]);
    let embassy = host.embassy_from(command)?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    let started = || anyhow::Ok(host.run("cat", ["/run/started"])?.lines().count());
    // Until two looks in a row show no start, because the rules were read since the start.
    let mut before = 0;
    let idle = std::time::Duration::from_secs(12);
    testbed::eventually(WAIT * 3, "nothing to be started", || {
        let now = started()?;
        let is_same = std::mem::replace(&mut before, now) == now;
        std::thread::sleep(idle);
        ensure!(is_same && started()? == now, "{now} programs");
        Ok(())
    })?;
    // Changes by other programs are read.
    host.run("nft", ["add table inet another"])?;
    testbed::eventually(WAIT, "a program to be started", || {
        ensure!(started()? > before, "{before}");
        Ok(())
    })?;
    assert_eq!(restored(&embassy)?, 0);
    // The elements of other programs' sets are never read: there may be hundreds of thousands.
    let started = host.run("cat", ["/run/started"])?;
    let of_nft = |line: &&str| line.starts_with("nft ");
    ensure!(started.lines().any(|line| of_nft(&line)), "{started}");
    ensure!(
        started.lines().filter(of_nft).all(|line| line == "nft -s -t list ruleset"),
        "{started}"
    );
    ensure!(!started.contains("-save -t"), "iptables reads the elements of all sets: {started}");
    Ok(())
}

#[test]
fn rules_that_vanish_from_nft_are_back() -> Result<()> {
    let reload = "nft -f /run/before";
    vanish(
        NFT_SHARED,
        &[
            (&["nft", "flush", "ruleset"], "vanished"),
            (&["sh", "-ec", reload], "vanished"),
            (&["nft", "delete", "table", "inet", "embassy"], "vanished"),
            (&["nft", "flush", "chain", "inet", "embassy", "declared"], "incomplete"),
            (&["nft", "insert", "rule", "inet", "embassy", "prerouting", "accept"], "added"),
        ],
    )
}

#[test]
fn rules_that_vanish_from_iptables_are_back() -> Result<()> {
    // As firewalld and iptables-persistent reload: they replace the whole table at once, without rules that they do not
    // know.
    let reload = "iptables-restore < /run/before";
    let above = ["iptables", "-t", "nat", "-I", "PREROUTING", "-p", "tcp", "-j", "ACCEPT"];
    vanish(
        IPTABLES,
        &[
            (&["iptables", "-t", "nat", "-F"], "vanished"),
            (&["sh", "-ec", reload], "vanished"),
            (&["nft", "flush", "ruleset"], "vanished"),
            (&["iptables", "-t", "nat", "-F", "EMBASSY"], "incomplete"),
            (&["iptables", "-t", "nat", "-D", "PREROUTING", "-j", "EMBASSY"], "incomplete"),
            (&above, "displaced"),
            (&["iptables", "-t", "nat", "-A", "PREROUTING", "-j", "EMBASSY"], "added"),
        ],
    )
}

/// A program that redirects connections to port 80, before all chains at priority -100 or slightly earlier.
const ABOVE: &str = "add table ip above
    add chain ip above pre { type nat hook prerouting priority -150; }
    add rule ip above pre tcp dport 80 redirect to :1";

fn insert_above(host: &Host) -> Result<()> {
    ABOVE.lines().try_for_each(|line| host.run("nft", [line.trim()]).map(drop))
}

#[test]
fn with_nft_our_rules_go_before_a_program_that_comes_before_them() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let embassy = host.embassy(["--dnat", ETCD, NFT])?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    insert_above(&host)?;
    let start = Instant::now();
    counts(&embassy, "embassy_capture_restored_total{change=\"displaced\"}", 1)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    eprintln!(
        "nft: captured again {:?} after another program's rules came before ours",
        start.elapsed()
    );
    says(&embassy, &["come before ours; moving ours before them", "ip above pre, priority -150"])?;
    // The other rules are untouched, and nothing more is to do.
    let rules = host.run("nft", ["list", "table", "ip", "above"])?;
    ensure!(rules.contains("redirect to :1"), "{rules}");
    host.run("nft", ["delete table ip above"])?;
    reaches(&app, "172.17.0.1:80", "web")?;
    assert_eq!((restored(&embassy)?, metric(&embassy, "embassy_capture_barriers")?), (1, 0));
    // An embassy that starts after them moves before them immediately.
    insert_above(&host)?;
    embassy.kill()?;
    let next = host.embassy(["--dnat", ETCD, NFT])?;
    next.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    assert_eq!(restored(&next)?, 0);
    Ok(())
}

#[test]
fn with_iptables_a_program_that_comes_before_our_rules_is_told() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let embassy = host.embassy(["--dnat", ETCD, IPTABLES])?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    insert_above(&host)?;
    counts(&embassy, "embassy_capture_barriers", 1)?;
    let what = "nft's chain ip above pre, priority -150, comes before our rules";
    says(&embassy, &["another program may take connections before our rules do", what])?;
    ensure!(embassy.admin("/v1/status")?.ok()?.contains("ip above pre"), "the status says it too");
    host.run("nft", ["delete table ip above"])?;
    reaches(&app, "172.17.0.1:80", "web")?;
    says(&embassy, &["no other program's rules come before ours any more", "ip above pre"])
}

fn vanish(firewall: &str, blows: &[Blow<'_>]) -> Result<()> {
    let host = Host::start()?;
    web(&host, "web")?;
    let mut app = host.client("app").env("BACKEND_WEB", "/services/web;80");
    // So many that the kernel's order is not the order in which they were written.
    for port in 1000..1200 {
        app = app.env(&format!("BACKEND_{port}"), &format!("/services/web;{port}"));
    }
    let app = app.start()?;
    let save = match firewall {
        NFT_SHARED => "(echo flush ruleset; nft list ruleset) > /run/before",
        _ => "iptables-save -t nat > /run/before",
    };
    host.run("sh", ["-ec", save])?;
    let embassy = host.embassy(["--dnat", ETCD, firewall])?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    let written = ours(&host, firewall)?;
    let strangers = |host: &Host| anyhow::Ok(without_ours(&rules(host)?));
    for (n, (blow, change)) in (1..).zip(blows) {
        let start = Instant::now();
        host.run(blow[0], &blow[1..])?;
        let others = strangers(&host)?;
        testbed::eventually(WAIT, &format!("the rules after {blow:?}"), || {
            let now = ours(&host, firewall)?;
            ensure!(now == written, "{now}");
            Ok(())
        })?;
        reaches(&app, "172.17.0.1:80", "web")?;
        eprintln!("{firewall}: captured again {:?} after {blow:?}", start.elapsed());
        assert_eq!(strangers(&host)?, others, "{blow:?}");
        let series = format!("embassy_capture_restored_total{{change=\"{change}\"}}");
        let before = blows[..n - 1].iter().filter(|(_, other)| other == change).count();
        counts(&embassy, &series, before as u64 + 1)?;
        says(&embassy, &["another program changed our rules", &format!("change={change:?}")])?;
    }
    says(&embassy, &["another program changed our rules", "missing=\"all of them\""])?;
    // Changes that do not affect our rules are ignored.
    host.run("iptables", ["-F"])?;
    // Rules are restored only then: untouched rules stay untouched.
    assert_eq!(restored(&embassy)?, blows.len() as u64);
    Ok(())
}

#[test]
fn a_restart_of_the_engine_leaves_all_rules_right_by_nft() -> Result<()> {
    restart(NFT)
}

#[test]
fn a_restart_of_the_engine_leaves_all_rules_right_by_iptables() -> Result<()> {
    restart(IPTABLES)
}

/// dockerd creates its chains again when it starts, and inserts its jump at any position.
fn restart(firewall: &str) -> Result<()> {
    let host = Host::builder().docker_args(["--live-restore"]).start()?;
    strangers_rules(&host)?;
    web(&host, "web")?;
    host.web("published").arg("--publish=8080:80").start()?;
    let bystander = host.client("bystander").start()?;
    let app = host
        .client("app")
        .env("BACKEND_WEB", "/services/web;80")
        .env("BACKEND_WEB_TOO", "/services/web;8080")
        .start()?;
    host.docker_daemon().restart()?;
    // What a restart does to all other rules, without embassy.
    let before = rules(&host)?;
    let embassy = host.embassy(["--dnat", ETCD, firewall])?;
    embassy.wait_ready(READY)?;
    for _ in 0..2 {
        host.docker_daemon().restart()?;
        reaches(&app, "172.17.0.1:80", "web")?;
        reaches(&app, "172.17.0.1:8080", "web")?;
        reaches(&bystander, "172.17.0.1:8080", "published")?;
    }
    embassy.terminate()?;
    assert!(embassy.wait(WAIT)?.success());
    assert_eq!(sorted(&rules(&host)?), sorted(&before));
    Ok(())
}

#[test]
fn a_firewall_that_drops_what_we_capture_is_told_by_nft() -> Result<()> {
    let close = "nft add table inet strict
        nft add chain inet strict in '{ type filter hook input priority filter; policy drop; }'
        nft add rule inet strict in iif lo accept
        nft add rule inet strict in ct state established,related accept";
    dropped(NFT, close, "chain inet strict in of nft has the policy drop")
}

#[test]
fn a_firewall_that_drops_what_we_capture_is_told_by_iptables() -> Result<()> {
    let close = "iptables -A INPUT -i lo -j ACCEPT
        iptables -A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
        iptables -P INPUT DROP";
    dropped(IPTABLES, close, "chain INPUT of iptables has the policy DROP")
}

#[test]
fn a_chain_that_input_leads_to_and_that_drops_is_told_by_nft() -> Result<()> {
    dropped(NFT, HOST_FIREWALL, "chain host-fw-refuse of iptables ends with")
}

#[test]
fn a_chain_that_input_leads_to_and_that_drops_is_told_by_iptables() -> Result<()> {
    dropped(IPTABLES, HOST_FIREWALL, "chain host-fw-refuse of iptables ends with")
}

/// As on NixOS: INPUT has neither a policy nor a last rule that drops.
const HOST_FIREWALL: &str = "iptables -N host-fw
        iptables -N host-fw-refuse
        iptables -A host-fw-refuse -m comment --comment refused -j DROP
        iptables -A host-fw -i lo -j ACCEPT
        iptables -A host-fw -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
        iptables -A host-fw -p tcp --dport 22 -j ACCEPT
        iptables -A host-fw -j host-fw-refuse
        iptables -A INPUT -j host-fw";

#[test]
fn a_firewall_that_seems_closed_and_lets_connections_in_is_told_until_they_pass() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    // The rule that lets the containers in matches their address, which embassy does not evaluate.
    for rule in [
        "add table inet strict",
        "add chain inet strict in { type filter hook input priority 0; policy drop; }",
        "add rule inet strict in iif lo accept",
        "add rule inet strict in ct state established,related accept",
        "add rule inet strict in ip saddr 172.17.0.0/16 accept",
    ] {
        host.run("nft", [rule])?;
    }
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    let what = "chain inet strict in of nft has the policy drop";
    says(&embassy, &["captured connections may be dropped on this host", what])?;
    testbed::eventually(WAIT * 2, "the end of it to be told", || {
        ensure!(app.get("172.17.0.1:80").run()?.from("web") == 1, "not reached");
        ensure!(metric(&embassy, "embassy_capture_barriers")? == 0, "still told");
        Ok(())
    })?;
    says(&embassy, &["chain no longer drops captured connections", what])
}

/// The rule that embassy proposes is enough, and opens nothing else.
fn dropped(firewall: &str, close: &str, said: &str) -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let _own = host.spawn("own", {
        let mut command = host.command(testbed::testbed_program()?);
        command.args(["peer", "http", "--name", "own", "--port", "7000"]);
        command
    })?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let embassy = host.embassy(["--dnat", ETCD, firewall])?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    assert_eq!(metric(&embassy, "embassy_capture_barriers")?, 0);

    host.run("sh", ["-ec", close])?;
    counts(&embassy, "embassy_capture_barriers", 1)?;
    let closed = |target: &str, expected: &str| {
        let outcome = app.peer(["probe", target, "--wait-ms", "1"])?["outcome"].clone();
        ensure!(outcome == *expected, "{target}: {outcome}");
        anyhow::Ok(())
    };
    says(&embassy, &["captured connections may be dropped on this host", said])?;
    let status = || -> Result<api::Status> {
        Ok(serde_json::from_str(&embassy.admin("/v1/status")?.ok()?)?)
    };
    let first = |status: &api::Status| status.findings.first().map(|one| one.cause.clone());
    assert_eq!(first(&status()?).as_deref(), Some("barrier"), "nothing has come yet");
    closed("172.17.0.1:80", "timeout")?;
    testbed::eventually(WAIT * 2, "it to be proved", || {
        let status = status()?;
        ensure!(first(&status).as_deref() == Some("drops_all") && !status.ready, "{status:#?}");
        ensure!(status.routes_broken > 0, "{status:#?}");
        Ok(())
    })?;
    says(&embassy, &["captured connections are dropped on this host", said])?;
    says(&embassy, &["embassy is not ready", "drops all captured connections"])?;

    let log = embassy.log();
    let remedy = log.lines().find_map(|line| line.split_once("remedy=\"")?.1.split_once('"'));
    let (remedy, _) = remedy.expect("it was said with the warning");
    host.run("sh", ["-ec", remedy])?;
    reaches(&app, "172.17.0.1:80", "web")?;
    closed("172.17.0.1:7000", "timeout")?;
    // Our own rule refuses this connection, before theirs.
    closed("172.17.0.1:9999", "refused")?;
    says(&embassy, &["chain no longer drops captured connections", said])?;
    assert_eq!(metric(&embassy, "embassy_capture_barriers")?, 0);
    embassy.wait_ready(WAIT)
}

#[test]
fn a_program_that_crashes_hides_only_its_own_rules() -> Result<()> {
    let host = Host::start()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    // As an nft of another version does with some sets.
    let crash = "mkdir -p /run/bin; printf '#!/bin/sh\nkill -SEGV $$\n' > /run/bin/nft; chmod +x /run/bin/nft";
    host.run("sh", ["-ec", crash])?;
    let mut command = with_programs(&host, "/run/bin")?;
    command.args(["--dnat", ETCD]);
    let embassy = host.embassy_from(command)?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    host.run("iptables", ["-A", "INPUT", "-i", "lo", "-j", "ACCEPT"])?;
    host.run("iptables", ["-P", "INPUT", "DROP"])?;
    says(
        &embassy,
        &["captured connections may be dropped", "INPUT of iptables has the policy DROP"],
    )?;
    assert_eq!(metric(&embassy, "embassy_capture_failures_total")?, 0);
    Ok(())
}

#[test]
fn a_rule_that_drops_what_we_capture_is_noticed_by_what_does_not_arrive_by_nft() -> Result<()> {
    lost(NFT)
}

#[test]
fn a_rule_that_drops_what_we_capture_is_noticed_by_what_does_not_arrive_by_iptables() -> Result<()>
{
    lost(IPTABLES)
}

fn lost(firewall: &str) -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let embassy = host.embassy(["--dnat", ETCD, firewall])?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    // Neither the end of a chain nor a policy drops: the counters show that connections are lost, and this is the only rule
    // that drops any.
    for rule in [
        "add table inet strict",
        "add chain inet strict in { type filter hook input priority 0; policy accept; }",
        "add rule inet strict in iifname docker0 tcp dport 1024-65535 drop",
        "add rule inet strict in accept",
    ] {
        host.run("nft", [rule])?;
    }
    // The first connection that is lost is enough.
    let probe = app.peer(["probe", "172.17.0.1:80", "--wait-ms", "1"])?;
    ensure!(probe["outcome"] == "timeout", "{probe}");
    counts(&embassy, "embassy_capture_barriers", 1)?;
    let what = "chain inet strict in of nft has the rule";
    says(&embassy, &["captured connections are dropped on this host", what])?;
    assert!(!embassy.log().contains("may be dropped"), "it is known");
    // embassy can only guess which rule it is.
    assert_eq!(embassy.admin("/readyz")?.status, 200);
    host.run("nft", ["delete table inet strict"])?;
    testbed::eventually(WAIT * 2, "the end of it to be told", || {
        ensure!(app.get("172.17.0.1:80").run()?.from("web") == 1, "not reached");
        ensure!(metric(&embassy, "embassy_capture_barriers")? == 0, "still told");
        Ok(())
    })?;
    says(&embassy, &["chain no longer drops captured connections", what])
}

#[test]
fn live_connections_outlive_the_rules_where_nobody_else_translates() -> Result<()> {
    for firewall in [NFT, NFT_SHARED] {
        // The engine writes no rules of its own, so ours are the only ones that translate.
        let host = Host::builder().docker_args(["--iptables=false"]).start()?;
        let echo = host.server("echo", ["echo"]).start()?;
        offer(&host, "echo", echo.ip()?)?;
        let app = host.client("app").env("BACKEND_ECHO", "/services/echo;80").start()?;
        let before = rules(&host)?;
        let embassy = host.embassy(["--dnat", ETCD, firewall, "--drain=1h"])?;
        embassy.wait_ready(READY)?;
        let words = [
            "testbed",
            "peer",
            "echoes",
            "172.17.0.1:80",
            "-n",
            "5",
            "--bytes",
            "20000",
            "--delay-ms",
            "5000",
        ];
        let live = app.spawn("live", words)?;
        counts(&embassy, "embassy_connections_active", 5)?;
        testbed::eventually(WAIT, "all to have sent their first half", || {
            ensure!(live.log().contains("connected"), "{}", live.log());
            Ok(())
        })?;
        embassy.terminate()?;
        ends(&app, "172.17.0.1:80", "refused")?;
        ensure!(!rules(&host)?.contains("redirect"), "{}", rules(&host)?);
        ensure!(live.wait(WAIT)?.success(), "{}", live.log());
        ensure!(live.log().contains("\"whole\":5"), "{}", live.log());
        assert!(embassy.wait(WAIT)?.success());
        assert_eq!(rules(&host)?, before);
    }
    Ok(())
}

#[test]
fn of_two_embassies_one_captures() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let first = host.embassy(["--dnat", ETCD, "--drain=1h"])?;
    first.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    let held = hold(&app, &first)?;
    let second = host.embassy(["--dnat", ETCD, "-p=9998", "--admin=off"])?;
    assert_eq!(second.wait(WAIT)?.code(), Some(1));
    says(&second, &["another embassy captures in this network namespace"])?;
    assert_eq!(restored(&first)?, 0);

    // An embassy that waits for its last connections serves until they have ended. Then the next one may capture.
    first.terminate()?;
    let second = host.embassy(["--dnat", ETCD, "-p=9998", "--admin=off"])?;
    assert_eq!(second.wait(WAIT)?.code(), Some(1));
    reaches(&app, "172.17.0.1:80", "web")?;
    assert_eq!((first.exited()?, held.exited()?), (None, None));
    held.kill()?;
    assert!(first.wait(WAIT)?.success());
    let next = host.embassy(["--dnat", ETCD, "--admin=off"])?;
    reaches(&app, "172.17.0.1:80", "web")?;
    // A killed embassy does not block the next one either.
    next.kill()?;
    let _last = host.embassy(["--dnat", ETCD, "--admin=off"])?;
    reaches(&app, "172.17.0.1:80", "web")
}

#[test]
fn another_embassy_is_found_although_it_shares_nothing_but_the_network() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let apart = |flags: &[&str]| {
        let mut command = host.command("unshare");
        command.args(["--mount", "--"]);
        command.args(["setpriv", "--reuid=65534", "--clear-groups"]);
        command.args(["--inh-caps=-all,+net_admin", "--ambient-caps=-all,+net_admin", "--"]);
        command.arg(testbed::embassy_program()?).args(["--dnat", ETCD, "--state-dir=off"]);
        command.args(flags).env("DOCKER_HOST", host.docker_url());
        anyhow::Ok(command)
    };
    // As another user it cannot use the engine's socket, but it is the embassy that captures.
    let first = host.embassy_from(apart(&["-p=9998", "--admin=off", "--firewall=iptables"])?)?;
    says(&first, &["proxy listens", "9998"])?;
    let second = host.embassy(["--dnat", ETCD])?;
    assert_eq!(second.wait(WAIT)?.code(), Some(1));
    says(&second, &["another embassy captures in this network namespace"])?;
    first.kill()?;
    let first = host.embassy(["--dnat", ETCD])?;
    first.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    let second = host.embassy_from(apart(&["-p=9998", "--admin=off"])?)?;
    assert_eq!(second.wait(WAIT)?.code(), Some(1), "{}", second.log());
    assert_eq!((first.exited()?, restored(&first)?), (None, 0));
    reaches(&app, "172.17.0.1:80", "web")
}

#[test]
fn rules_of_a_killed_embassy_go_although_another_program_has_its_port() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let is_left = || Ok::<_, anyhow::Error>(rules(&host)?.to_lowercase().contains("embassy"));
    for firewall in [IPTABLES, NFT_SHARED] {
        let embassy = host.embassy(["--dnat", ETCD, firewall])?;
        embassy.wait_ready(READY)?;
        reaches(&app, "172.17.0.1:80", "web")?;
        embassy.kill()?;
        let thief = host.spawn("thief", {
            let mut command = host.command(testbed::testbed_program()?);
            command.args(["peer", "http", "--name", "thief", "--port", "9999"]);
            command
        })?;
        // This must not last.
        reaches(&app, "172.17.0.1:80", "thief")?;
        let doctor = host.embassy_command(["doctor", "--dnat", ETCD])?.output()?;
        let doctor = String::from_utf8_lossy(&doctor.stdout).into_owned();
        let left = doctor.lines().find(|line| line.starts_with("FAIL  rules"));
        ensure!(left.is_some_and(|line| line.contains("testbed (process ")), "{doctor}");

        for (flags, line) in [
            (&[firewall][..], "cannot listen on port 9999 (--port)"),
            (&[firewall, "-p=9998", "--admin=127.0.0.1:9999"], "(--admin)"),
        ] {
            if !is_left()? {
                let embassy = host.embassy(["--dnat", ETCD, firewall, "-p=9997"])?;
                embassy.wait_ready(READY)?;
                embassy.kill()?;
            }
            let embassy = host.embassy([&["--dnat", ETCD], flags].concat())?;
            assert_eq!(embassy.wait(WAIT)?.code(), Some(1));
            says(&embassy, &[line])?;
            ensure!(!is_left()?, "{flags:?}: {}", rules(&host)?);
            ends(&app, "172.17.0.1:80", "refused")?;
        }
        thief.kill()?;
    }
    Ok(())
}

/// A connection that stays open.
fn hold(app: &Container, embassy: &Embassy) -> Result<testbed::Process> {
    let held = app.spawn("held", ["testbed", "peer", "hold", "172.17.0.1:80", "-n", "1"])?;
    counts(embassy, "embassy_connections_active", 1)?;
    Ok(held)
}

/// All rules except ours, in their order.
fn without_ours(rules: &str) -> String {
    // The line that ends one of our blocks, while inside it.
    let mut ours = None;
    let kept = rules.lines().filter(|line| {
        if line.starts_with("table inet embassy ") || line.starts_with("table bridge embassy ") {
            ours = Some("}");
        } else if line.starts_with("\tchain EMBASSY {") {
            // As nft shows what iptables wrote.
            ours = Some("\t}");
        }
        let skip = ours.is_some() || line.contains("EMBASSY ") || line.ends_with("EMBASSY");
        if ours.is_some_and(|end| *line == end) {
            ours = None;
        }
        // A base chain without rules is ignored, because listing creates some.
        !skip && (line.starts_with("-A ") || line.starts_with("\t\t") && !line.contains("\ttype "))
    });
    kept.collect::<Vec<_>>().join("\n")
}

/// dockerd sometimes writes its rules in another order.
fn sorted(rules: &str) -> Vec<&str> {
    let mut lines: Vec<_> = rules.lines().collect();
    lines.sort();
    lines
}
