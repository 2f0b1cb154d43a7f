//! A host's firewall cannot show or do something: embassy works with the rest of it.

use std::{path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use testbed::{Embassy, Host, embassy_program};

use crate::{
    READY, WAIT,
    capture::IPTABLES,
    support::{
        ETCD, counts, ends, metric, offer_at, reaches, restored, says, web, with_mounts,
        with_programs,
    },
};

/// embassy with the programs of a directory instead of the usual ones.
fn embassy_with_programs(host: &Host, programs: &Path, args: &[&str]) -> Result<Embassy> {
    let mut command = with_programs(host, programs.display())?;
    command.args(args);
    host.embassy_from(command)
}

/// The lines of a family's `nat` table that name one of our chains: its rules, the chain itself, and each jump to it.
fn ours(host: &Host, family: &str) -> Result<Vec<String>> {
    let table = host.run("nft", ["-s", "list", "table", family, "nat"])?;
    Ok(table.lines().filter(|line| line.contains("EMBASSY")).map(str::to_owned).collect())
}

/// Makes `iptables-save -t nat` show nothing: it prints a comment and exits with 0.
fn hide_the_table(host: &Host) -> Result<()> {
    let masquerade = ["-t", "nat", "-A", "POSTROUTING", "-s", "10.0.0.0/8", "-j", "MASQUERADE"];
    host.run("iptables", masquerade)?;
    host.run("nft", ["add rule ip nat POSTROUTING ct state new counter"])?;
    let saved = host.run("iptables-save", ["-t", "nat"])?;
    ensure!(saved.contains("is incompatible") && !saved.contains("-A "), "{saved}");
    Ok(())
}

#[test]
fn a_table_that_iptables_cannot_show_gets_each_rule_once_and_loses_each_at_the_end() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let embassy = host.embassy(["--dnat", ETCD, IPTABLES])?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    hide_the_table(&host)?;
    // More of our rules are written meanwhile, and removed rules are restored, once each.
    let second = host.client("second").env("BACKEND_WEB", "/services/web;81").start()?;
    reaches(&second, "172.17.0.1:81", "web")?;
    reaches(&app, "172.17.0.1:80", "web")?;
    assert_eq!(restored(&embassy)?, 0);
    host.run("nft", ["flush chain ip nat PREROUTING"])?;
    counts(&embassy, "embassy_capture_restored_total{change=\"incomplete\"}", 1)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    host.run("nft", ["insert rule ip nat PREROUTING tcp dport 1 accept"])?;
    counts(&embassy, "embassy_capture_restored_total{change=\"displaced\"}", 1)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    let is_jump = |line: &&String| line.contains("jump EMBASSY");
    let jumps = ours(&host, "ip")?.iter().filter(is_jump).count();
    assert_eq!((jumps, restored(&embassy)?), (1, 2));
    assert_eq!(metric(&embassy, "embassy_capture_failures_total")?, 0);

    embassy.terminate()?;
    assert!(embassy.wait(WAIT)?.success());
    assert_eq!(ours(&host, "ip")?, [""; 0]);
    let others = host.run("nft", ["-s", "list", "table", "ip", "nat"])?;
    ensure!(others.contains("ct state new counter"), "{others}");
    ensure!(others.contains("masquerade") && others.contains("tcp dport 1 accept"), "{others}");
    ends(&app, "172.17.0.1:80", "refused")?;

    // A killed embassy leaves its rules: the next one takes them over, and `cleanup` removes them.
    for _ in 0..2 {
        let embassy = host.embassy(["--dnat", ETCD, IPTABLES])?;
        embassy.wait_ready(READY)?;
        reaches(&app, "172.17.0.1:80", "web")?;
        assert_eq!(ours(&host, "ip")?.iter().filter(is_jump).count(), 1);
        embassy.kill()?;
    }
    let comment = ["-m", "comment", "--comment", "embassy_redirection"];
    let ancestors = ["-t", "nat", "-A", "PREROUTING", "-p", "tcp", "-d", "172.17.42.1"];
    host.run("iptables", [&ancestors[..], &comment, &["-j", "REDIRECT"]].concat())?;
    let said = host.run(&embassy_program()?.display().to_string(), ["cleanup"])?;
    ensure!(said.contains("removed our rules of iptables"), "{said}");
    assert_eq!(ours(&host, "ip")?, [""; 0]);
    assert_eq!(host.run("nft", ["-s", "list", "table", "ip", "nat"])?, others);
    Ok(())
}

#[test]
fn the_older_iptables_is_read_by_its_own_listing() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let programs = host.dir().join("legacy");
    std::fs::create_dir(&programs)?;
    for (v6, program) in ["", "6"].iter().flat_map(|v6| ["", "-save", "-restore"].map(|p| (v6, p)))
    {
        let legacy = format!("/usr/sbin/ip{v6}tables-legacy{program}");
        std::os::unix::fs::symlink(legacy, programs.join(format!("ip{v6}tables{program}")))?;
    }
    let before = host.run("iptables-legacy-save", ["-t", "nat"])?;
    let embassy = embassy_with_programs(&host, &programs, &["--dnat", ETCD, IPTABLES])?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    let other = ["-t", "nat", "-I", "PREROUTING", "-p", "udp", "-j", "ACCEPT"];
    host.run("iptables-legacy", other)?;
    counts(&embassy, "embassy_capture_restored_total{change=\"displaced\"}", 1)?;
    host.run("iptables-legacy", ["-t", "nat", "-F", "EMBASSY"])?;
    counts(&embassy, "embassy_capture_restored_total{change=\"incomplete\"}", 1)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    let saved = host.run("iptables-legacy-save", ["-t", "nat"])?;
    assert_eq!(saved.matches("-j EMBASSY").count(), 1, "{saved}");
    embassy.terminate()?;
    assert!(embassy.wait(WAIT)?.success());
    let saved = host.run("iptables-legacy-save", ["-t", "nat"])?;
    let rules = |saved: &str| {
        let rules = saved.lines().filter(|line| !line.starts_with('#'));
        rules.map(|line| line.split('[').next().unwrap_or_default().to_owned()).collect::<Vec<_>>()
    };
    let mut expected = rules(&before);
    let at = expected.iter().position(|line| line == "COMMIT").context("a table")?;
    expected.insert(at, "-A PREROUTING -p udp -j ACCEPT".to_owned());
    assert_eq!(rules(&saved), expected);
    Ok(())
}

/// Checks that the log, the status and readiness report the missing part.
fn works_without(embassy: &Embassy, loss: &str) -> Result<()> {
    embassy.wait_ready(READY)?;
    let message =
        "the firewall does not support an optional part of the rules; capturing without it";
    says(embassy, &[message, loss])?;
    assert_eq!(embassy.log().matches(message).count(), 1);
    assert_eq!(metric(embassy, "embassy_capture_failures_total")?, 0);
    let status = embassy.admin("/v1/status")?.ok()?;
    ensure!(status.contains("firewall_lacks") && status.contains(loss), "{status}");
    Ok(())
}

#[test]
fn without_the_socket_match_all_but_strangers_are_captured_by_iptables() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    // All matches of iptables, except this one.
    let matches = host.dir().join("matches");
    std::fs::create_dir(&matches)?;
    let found =
        Command::new("sh").args(["-c", "dirname /usr/lib/*/xtables/libxt_socket.so"]).output()?;
    let libraries = String::from_utf8(found.stdout)?.trim().to_owned();
    for file in std::fs::read_dir(&libraries)? {
        let file = file?;
        if file.file_name() != "libxt_socket.so" {
            std::fs::copy(file.path(), matches.join(file.file_name()))?;
        }
    }
    // Programs that embassy starts do not get its environment, such as XTABLES_LIBDIR.
    let mounts = format!("mount --bind {} {libraries}", matches.display());
    let mut command = with_mounts(&host, &mounts)?;
    command.args(["--dnat", ETCD, IPTABLES, "--guard=off"]);
    let embassy = host.embassy_from(command)?;
    works_without(&embassy, "--hold is not in effect")?;
    reaches(&app, "172.17.0.1:80", "web")?;
    let second = host.client("second").env("BACKEND_WEB", "/services/web;81").start()?;
    reaches(&second, "172.17.0.1:81", "web")?;
    embassy.terminate()?;
    assert!(embassy.wait(WAIT)?.success());
    assert_eq!(ours(&host, "ip")?, [""; 0]);
    Ok(())
}

#[test]
fn without_nat_for_ipv6_the_consumers_ipv4_is_captured_by_iptables() -> Result<()> {
    let host = Host::light()?;
    let web = web(&host, "web")?;
    host.run("ip", ["addr", "add", "fd00:77::1/64", "dev", "docker0", "nodad"])?;
    let programs = host.dir().join("programs");
    std::fs::create_dir(&programs)?;
    let refuse = "#!/bin/sh\necho \"can't initialize ip6tables table\" >&2\nexit 3\n";
    for program in ["ip6tables-save", "ip6tables-restore"] {
        let program = programs.join(program);
        std::fs::write(&program, refuse)?;
        host.run("chmod", ["+x", &program.display().to_string()])?;
    }
    let args = [
        "--redirect",
        "-provider=static",
        "-services=/services/web;80",
        "-interface=docker0",
        "--proxy-ip=172.17.0.1,fd00:77::1",
        ETCD,
        IPTABLES,
        "--guard=off",
    ];
    let embassy = embassy_with_programs(&host, &programs, &args)?;
    works_without(&embassy, "IPv6 is not captured")?;
    let curl = |vip: &str| {
        let url = format!("http://{vip}/");
        host.run("curl", ["--silent", "--fail", "--globoff", "-m", "10", &url])
    };
    testbed::eventually(WAIT, "an answer", || {
        let answer = curl("172.17.0.1")?;
        ensure!(answer.trim() == web.name(), "{answer}");
        Ok(())
    })?;
    assert!(curl("[fd00:77::1]").is_err());
    embassy.terminate()?;
    assert!(embassy.wait(WAIT)?.success());
    assert_eq!(ours(&host, "ip")?, [""; 0]);
    Ok(())
}

#[test]
fn an_endpoint_that_the_host_translates_is_reached_with_notrack() -> Result<()> {
    let host = Host::light()?;
    let web = host.web("web").start()?;
    // A port that the engine publishes: packets to this address of the host are forwarded to the container by connection
    // tracking.
    host.run("ip", ["addr", "add", "172.17.0.200/16", "dev", "docker0"])?;
    let to = format!("{}:80", web.ip()?);
    let publish =
        ["-t", "nat", "-A", "OUTPUT", "-d", "172.17.0.200", "-p", "tcp", "--dport", "8080"];
    host.run("iptables", [&publish[..], &["-j", "DNAT", "--to-destination", &to]].concat())?;
    offer_at(&host, "web", "172.17.0.200:8080")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    // An address of docker0 is a VIP, which an endpoint may only have if it is listed.
    let listed = "--endpoints=172.17.0.200";
    let embassy = host.embassy(["--dnat", "--firewall=nft", "--notrack", ETCD, listed])?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    let answers = app.get("172.17.0.1:80").times(20).run()?;
    assert_eq!(answers.from("web"), 20, "{answers:?}");
    Ok(())
}
