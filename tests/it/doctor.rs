//! `embassy doctor` on hosts with real problems.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::{Host, embassy_program};

use crate::{
    READY, WAIT,
    capture::{IPTABLES, rules},
    support::{ETCD, counts, says, sum, web, without_programs},
};

/// The problems, as `check: what`. The last arguments of `command` are embassy's.
fn found(mut command: Command) -> Result<Vec<String>> {
    let output = command.arg("--json").output().context("run embassy doctor")?;
    let text = String::from_utf8(output.stdout)?;
    let findings: Vec<Value> =
        serde_json::from_str(&text).with_context(|| format!("{text}{:?}", output.stderr))?;
    let of = |level| findings.iter().filter(move |finding| finding["level"] == level);
    for finding in &findings {
        let mended = finding["fix"].as_str().is_some_and(|fix| !fix.is_empty());
        ensure!(mended == (finding["level"] != "ok"), "{finding}");
    }
    let code = if of("fail").count() == 0 { 0 } else { 1 };
    ensure!(output.status.code() == Some(code), "{:?}: {text}", output.status);
    let told = |finding: &Value| {
        let text = |name| finding[name].as_str().unwrap_or_default().to_owned();
        format!("{} {}: {}", text("level"), text("check"), text("what"))
    };
    Ok(of("fail").chain(of("warn")).map(told).collect())
}

fn doctor(host: &Host, flags: &[&str]) -> Result<Vec<String>> {
    found(host.embassy_command([&["doctor", "--dnat", ETCD], flags].concat())?)
}

/// Checks that this is the only problem.
fn one(found: &[String], beginning: &str) -> Result<()> {
    ensure!(found.len() == 1 && found[0].starts_with(beginning), "{beginning:?} in {found:#?}");
    Ok(())
}

#[test]
fn a_host_that_is_well_and_what_is_broken_of_it() -> Result<()> {
    let host = Host::start()?;
    host.etcd()?;
    let before = rules(&host)?;
    assert_eq!(doctor(&host, &[])?, [""; 0]);
    assert_eq!(rules(&host)?, before);
    let text = host.run(
        embassy_program()?.to_str().context("a path of text")?,
        ["doctor", "--dnat", ETCD, &format!("-docker={}", host.docker_url())],
    )?;
    assert!(text.contains("engine 20.10") && text.contains("All is well."), "{text}");

    let embassy = host.embassy(["--dnat", ETCD, IPTABLES])?;
    embassy.wait_ready(READY)?;
    assert_eq!(doctor(&host, &[])?, [""; 0]);
    host.run("iptables", "-t nat -I PREROUTING -p udp -j ACCEPT".split(' '))?;
    host.run("nft", ["add table ip early"])?;
    let chain = "add chain ip early pre { type nat hook prerouting priority -150 ; }";
    host.run("nft", [chain])?;
    // embassy first moves its rules before the new chain.
    testbed::eventually(WAIT, "the chain to be all that is found", || {
        one(&doctor(&host, &[])?, "warn rules: nft's chain ip early pre")
    })?;
    host.run("nft", ["delete table ip early"])?;

    embassy.kill()?;
    one(&doctor(&host, &[])?, "fail rules: rules of a killed embassy are left in iptables")?;
    assert!(host.embassy_command(["cleanup"])?.status()?.success());
    assert_eq!(doctor(&host, &[])?, [""; 0]);

    one(&doctor(&host, &["-discovery=consul://127.0.0.1:8500"])?, "fail discovery: consul")?;
    one(
        &doctor(&host, &["-docker=tcp://127.0.0.1:1"])?,
        "fail docker: a ping of tcp://127.0.0.1:1",
    )?;
    one(&doctor(&host, &["-p=2379"])?, "fail port: etcd (process ")?;
    host.run("iptables", ["-P", "INPUT", "DROP"])?;
    host.run("iptables", "-A INPUT -i lo -j ACCEPT".split(' '))?;
    one(&doctor(&host, &[])?, "fail input: chain INPUT of iptables has the policy DROP")?;
    host.run("iptables", ["-P", "INPUT", "ACCEPT"])?;
    host.run("iptables", ["-F", "INPUT"])?;
    one(&doctor(&host, &["--proxy-ip=172.17.0.9"])?, "fail vip: 172.17.0.9 belongs to network")?;
    let program = embassy_program()?;
    let words = ["doctor", "--dnat", ETCD, &format!("-docker={}", host.docker_url())];
    let mut command = without_programs(&host)?;
    command.args(words).arg(IPTABLES);
    one(&found(command)?, "fail firewall: embassy cannot write rules: cannot run ")?;
    let mut command = host.command("setpriv");
    let capabilities = ["--inh-caps=-net_admin", "--bounding-set=-net_admin"];
    command.args(capabilities).arg(&program).args(words);
    let all = found(command)?;
    assert!(all.iter().any(|finding| finding.starts_with("fail capability")), "{all:#?}");
    let mut command = host.command("sh");
    command.args(["-c", "ulimit -n 1000; exec \"$0\" \"$@\""]).arg(&program).args(words);
    one(&found(command)?, "warn descriptors: 1000 descriptors allow 244 connections")?;

    // Part of docker0's network is routed elsewhere, and the filter is strict.
    host.run("sysctl", ["-w", "net.ipv4.conf.docker0.rp_filter=1"])?;
    assert_eq!(doctor(&host, &[])?, [""; 0]);
    host.run("ip", "route add 172.17.4.0/24 dev eth0".split(' '))?;
    one(&doctor(&host, &[])?, "warn rp_filter: part of network bridge is routed to eth0")?;
    host.run("ip", "route del 172.17.4.0/24 dev eth0".split(' '))?;

    host.network("shut", ["--internal"])?;
    assert_eq!(doctor(&host, &[])?, [""; 0]);
    one(&doctor(&host, &["--proxy-ip=172.17.0.1"])?, "fail vip: network shut is internal")
}

/// No container has connected, so the running embassy has counted nothing: doctor starts a connection in the container's
/// own network.
#[test]
fn connections_that_do_not_arrive_are_found_on_a_quiet_host() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    let said = host.embassy_command(["doctor", "--dnat", ETCD])?.output()?;
    let said = String::from_utf8(said.stdout)?;
    ensure!(said.contains("a connection of app to 172.17.0.1:80 arrives"), "{said}");
    // A bridge's own rules, which no listing of INPUT shows.
    for rule in [
        "add table bridge strict",
        "add chain bridge strict in { type filter hook input priority 0; }",
        &format!("add rule bridge strict in ip saddr {} ip protocol tcp drop", app.ip()?),
    ] {
        host.run("nft", [rule])?;
    }
    one(&doctor(&host, &[])?, "fail dial: a connection of app to 172.17.0.1:80 gets no answer")?;
    host.run("nft", ["delete", "table", "bridge", "strict"])?;
    assert_eq!(doctor(&host, &[])?, [""; 0]);
    // No application has noticed it.
    assert_eq!(sum(&embassy, "embassy_connections_total")?, 0);
    Ok(())
}

#[test]
fn an_embassy_whose_rules_are_gone_is_found() -> Result<()> {
    let host = Host::light()?;
    host.etcd()?;
    // It runs but does not capture.
    let embassy = host.embassy([ETCD])?;
    says(&embassy, &["no rule leads to embassy's port"])?;
    let all = doctor(&host, &[])?;
    let [rules, flags] = &all[..] else { panic!("{all:#?}") };
    assert!(rules.starts_with("fail capture: Neither --dnat nor --redirect is set"), "{rules}");
    assert!(flags.contains("Different: --dnat or --redirect."), "{flags}");
    embassy.terminate()?;
    assert!(embassy.wait(WAIT)?.success());
    Ok(())
}

#[test]
fn the_embassy_that_runs_is_judged_and_one_that_cannot_be_seen_is_not_missed() -> Result<()> {
    let host = Host::light()?;
    host.etcd()?;
    let mut limited = host.command("sh");
    limited.args(["-c", "ulimit -n 1000; exec \"$0\" \"$@\""]).arg(embassy_program()?);
    limited.args(["--dnat", ETCD]).env("DOCKER_HOST", host.docker_url());
    let embassy = host.embassy_from(limited)?;
    embassy.wait_ready(READY)?;
    one(&doctor(&host, &[])?, "warn descriptors: 1000 descriptors allow 244 connections")?;
    // As from another container: the rules are not reported as leftovers, and the port as embassy's.
    let mut hidden = host.command("unshare");
    hidden.args(["--pid", "--fork", "--mount-proc"]).arg(embassy_program()?);
    hidden.args(["doctor", "--dnat", ETCD, &format!("-docker={}", host.docker_url())]);
    assert_eq!(found(hidden)?, [""; 0]);
    embassy.kill()?;
    // The kernel has removed its rules.
    assert_eq!(doctor(&host, &[])?, [""; 0]);

    // The host's own connections may meet other rules first, too.
    let embassy = host.embassy(["--redirect", ETCD, IPTABLES])?;
    embassy.wait_ready(READY)?;
    let redirect = || found(host.embassy_command(["doctor", "--redirect", ETCD])?);
    assert_eq!(redirect()?, [""; 0]);
    host.run("nft", ["add table ip early"])?;
    host.run("nft", ["add chain ip early out { type nat hook output priority -150 ; }"])?;
    one(&redirect()?, "warn rules: nft's")
}

/// As by SIGSTOP, or a host that is out of memory: the kernel takes connections for it.
#[test]
fn an_embassy_that_gives_no_answer_is_a_failure_and_its_process_is_named() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let _app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    assert_eq!(doctor(&host, &[])?, [""; 0]);
    embassy.signal(rustix::process::Signal::STOP)?;
    let asked = ["status", "ps", "explain app 80", "wait /services/web --timeout=8s"];
    let asked = asked.map(|words| {
        let mut command = host.embassy_command(words.split(' '))?;
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        anyhow::Ok((words, command.spawn()?))
    });
    let all = doctor(&host, &[])?;
    let expected = [
        ("fail embassy: process ", "is stopped"),
        (
            "fail admin: embassy (process ",
            "listens at 127.0.0.1:9990 and does not answer within 5 s",
        ),
    ];
    for (begins, says) in expected {
        let is_said = |one: &String| one.starts_with(begins) && one.contains(says);
        ensure!(all.iter().any(is_said), "{begins:?} {says:?} in {all:#?}");
    }
    for asked in asked {
        let (words, child) = asked?;
        let output = child.wait_with_output()?;
        let text = String::from_utf8([output.stdout, output.stderr].concat())?;
        let said = ["embassy (process ", "does not answer within ", "stopped", "kill -CONT "];
        ensure!(said.iter().all(|part| text.contains(part)), "{words}: {text}");
        ensure!(output.status.code() == Some(1), "{words}: {text}");
    }
    let text = host.embassy_command(["doctor", "--dnat", ETCD])?.output()?.stdout;
    let text = String::from_utf8(text)?;
    ensure!(text.contains("skip  dial") && !text.contains("All is well"), "{text}");
    embassy.signal(rustix::process::Signal::CONT)?;
    assert_eq!(doctor(&host, &[])?, [""; 0]);
    embassy.kill()?;

    // Another program has the address of the API, or nobody can have it.
    let _other = host.spawn("other", {
        let mut command = host.command(testbed::testbed_program()?);
        command.args(["peer", "http", "--name", "other", "--port", "9990"]);
        command
    })?;
    testbed::eventually(WAIT, "the other program to be found", || {
        one(&doctor(&host, &[])?, "fail admin: testbed (process ")
    })?;
    one(
        &doctor(&host, &["--admin=192.0.2.7:9990"])?,
        "fail admin: embassy cannot listen at 192.0.2.7:9990 (--admin): no interface",
    )?;
    one(
        &doctor(&host, &["--admin=unix:///no/such/folder"])?,
        "fail admin: embassy cannot listen at unix:///no/such/folder (--admin): there is no folder",
    )
}

#[test]
fn without_flags_it_goes_by_those_of_the_embassy_that_runs() -> Result<()> {
    let host = Host::light()?;
    host.etcd()?;
    let mut command = host.embassy_command(["--dnat", "-p=9998", "--admin=127.0.0.1:9991"])?;
    command.env("DISCOVERY", "etcd://127.0.0.1:2379");
    let embassy = host.embassy_from(command)?;
    says(&embassy, &["embassy captures connections"])?;
    let findings = |words: &[&str]| {
        let mut command = host.embassy_command(words)?;
        let output = command.env_remove("DOCKER_HOST").arg("--json").output()?;
        serde_json::from_slice::<Vec<Value>>(&output.stdout).context("findings")
    };
    let of = |findings: &[Value], check: &str| {
        let of = findings.iter().filter(|finding| finding["check"] == check);
        of.map(|finding| finding["what"].as_str().unwrap_or_default().to_owned())
            .collect::<Vec<_>>()
    };
    let all = findings(&["doctor"])?;
    let [flags] = &of(&all, "flags")[..] else { panic!("{all:#?}") };
    ensure!(flags.starts_with("checked with the flags and variables of process "), "{flags}");
    ensure!(flags.ends_with(": --dnat -p=9998 --admin=127.0.0.1:9991"), "{flags}");
    ensure!(of(&all, "discovery") == ["etcd answers"], "{all:#?}");
    ensure!(of(&all, "port")[0].starts_with("embassy listens on 9998"), "{all:#?}");
    ensure!(of(&all, "docker").iter().all(|what| what.contains(&host.docker_url())), "{all:#?}");
    // Its own flags are used, and those that differ are listed.
    let url = format!("-docker={}", host.docker_url());
    let words = ["doctor", "--dnat", "-discovery=etcd://127.0.0.1:2379", &url];
    let own = findings(&[&words[..], &["-p=9997"]].concat())?;
    ensure!(of(&own, "port") == ["9997 is free"], "{own:#?}");
    let [flags] = &of(&own, "flags")[..] else { panic!("{own:#?}") };
    ensure!(flags.contains("Different: --port, --admin. "), "{flags}");
    ensure!(flags.ends_with(" has --dnat -p=9998 --admin=127.0.0.1:9991"), "{flags}");
    let same = findings(&[&words[..], &["-p=9998", "--admin=127.0.0.1:9991"]].concat())?;
    ensure!(of(&same, "flags").is_empty(), "{same:#?}");
    Ok(())
}

#[test]
fn the_option_of_docker_run_that_was_forgotten_is_named() -> Result<()> {
    let host = Host::light()?;
    let url = host.docker_url();
    let socket = url.strip_prefix("unix://").context("a socket")?;
    let within = ["--inh-caps=-net_admin", "--bounding-set=-net_admin"];
    let program = embassy_program()?;
    let start = |capabilities: &[&str], flags: &[&str]| {
        let mut command = host.command("setpriv");
        command.args(capabilities).arg(&program).arg(format!("-docker={url}")).args(flags);
        command.arg("-state-dir=off");
        host.embassy_from(command)
    };
    let embassy = start(&within, &["--dnat", ETCD])?;
    assert_eq!(embassy.wait(WAIT)?.code(), Some(1));
    says(&embassy, &["embassy lacks the capability NET_ADMIN", "--cap-add NET_ADMIN"])?;

    // Another user can find the socket, but not use it.
    for folder in std::path::Path::new(socket).ancestors().skip(1) {
        let folder = folder.to_str().context("a path of text")?;
        if folder.starts_with(host.dir().to_str().context("a path of text")?) {
            host.run("chmod", ["a+x", folder])?;
        }
    }
    host.run("chown", ["0:4242", socket])?;
    host.run("chmod", ["660", socket])?;
    let user = ["--reuid=65534", "--regid=65534", "--clear-groups"];
    let embassy = start(&user, &[ETCD])?;
    says(&embassy, &["source has not answered yet", "belongs to group 4242", "--group-add 4242"])?;
    ensure!(!embassy.log().contains("hyper"), "{}", embassy.log());
    let mut command = host.command("setpriv");
    command.args(user).arg(&program).args(["doctor", ETCD]).arg(format!("-docker={url}"));
    let output = command.output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(said.contains("fix: start its container with --group-add 4242"), "{said}");
    ensure!(!said.contains("mount its socket"), "{said}");
    embassy.kill()?;
    let embassy = start(&["--reuid=65534", "--regid=65534", "--groups=4242"], &[ETCD])?;
    counts(&embassy, "embassy_source_answers_total{source=\"provider\"}", 1)
}
