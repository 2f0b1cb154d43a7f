//! Faults of the host: the connection tracking table is full, the clock jumps.

use std::{
    fs,
    net::Ipv4Addr,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use testbed::{Container, Embassy, Host, embassy_program};

use super::{VIP, meets, unharmed};
use crate::{
    READY, WAIT,
    support::{ETCD, counts, metric, offer, reaches, says, spins_not, web},
};

/// Drops the first packet of each new connection to these addresses, as the kernel does while its table is full; known
/// connections pass. Simulates a table with room for some entries.
fn tracking_is_nearly_full(host: &Host, to: &[String]) -> Result<()> {
    // Before address translation, directly after connection tracking.
    let chain = "{ type filter hook prerouting priority -150; }";
    let own = "{ type filter hook output priority -150; }";
    host.run(
        "nft",
        [&format!("add table ip full; add chain ip full in {chain}; add chain ip full out {own}")],
    )?;
    host.run("nft", ["flush table ip full"])?;
    for address in to {
        for chain in ["in", "out"] {
            let rule = format!(
                "add rule ip full {chain} ip daddr {address} meta l4proto tcp ct state new drop"
            );
            host.run("nft", [rule])?;
        }
    }
    Ok(())
}

/// An address of the benchmark range (RFC 2544), whose entries fill the table.
const FILLER: &str = "198.19.0.1";

/// Fills the table up to its limit with entries that the kernel does not evict. The limit is machine-wide, but each network
/// namespace counts its own entries.
fn fill_tracking(host: &Host) -> Result<()> {
    // The kernel would evict these for a new connection.
    for state in ["TIME_WAIT", "CLOSE", "FIN_WAIT", "CLOSE_WAIT", "LAST_ACK"] {
        // Fails if there are none.
        let _ = host.run("conntrack", ["-D", "-p", "tcp", "--state", state]);
    }
    let limit: u32 =
        fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_max")?.trim().parse()?;
    let entries: String = (0..limit)
        .map(|n| {
            let source = Ipv4Addr::from(0xc612_0000 + (n & 0xffff));
            let port = 1 + (n >> 16);
            format!("-I -t 600 -u ASSURED,SEEN_REPLY -s {source} -d {FILLER} -p udp --sport {port} --dport 9\n")
        })
        .collect();
    let file = host.dir().join("entries");
    fs::write(&file, entries)?;
    let filled = host.command("conntrack").arg("-R").arg(&file).output()?;
    let said = String::from_utf8_lossy(&filled.stderr);
    // Other entries use some of the table, so not all of these fit.
    ensure!(said.contains("not enough memory"), "{said}");
    let entries = host.run("cat", ["/proc/sys/net/netfilter/nf_conntrack_count"])?;
    ensure!(entries.trim().parse() == Ok(limit), "{entries} of {limit}");
    Ok(())
}

#[test]
fn while_connection_tracking_is_full_what_is_open_goes_on_and_the_rest_comes_after() -> Result<()> {
    const OPEN: u64 = 20;
    let host = Host::light()?;
    let (one, two) = (web(&host, "web-1")?, web(&host, "web-2")?);
    for web in [&one, &two] {
        offer(&host, "web", web.ip()?)?;
    }
    let echo = host.server("echo", ["echo"]).start()?;
    offer(&host, "echo", echo.ip()?)?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80");
    let app = app.env("BACKEND_ECHO", "/services/echo;81").start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    meets(&app, "web-1")?;
    // Half of the bytes are sent before the table is full, half after.
    let words = ["echoes", "172.17.0.1:81", "-n", "20", "--bytes", "100000", "--delay-ms", "12000"];
    let open = app.spawn("open", ["testbed", "peer"].into_iter().chain(words))?;
    counts(&embassy, "embassy_connections_active", OPEN)?;
    let entries = metric(&embassy, "embassy_conntrack_entries")?;
    ensure!(
        (2 * OPEN..metric(&embassy, "embassy_conntrack_limit")?).contains(&entries),
        "{entries}"
    );

    // The table has room for some: this is like one silent endpoint of two.
    let (one, two) = (one.ip()?.to_string(), two.ip()?.to_string());
    tracking_is_nearly_full(&host, std::slice::from_ref(&one))?;
    let answers = app.get(VIP).times(100).at_once(4).run()?;
    unharmed("no new connection to one endpoint of two", &answers, None)?;
    // No connection to any endpoint.
    tracking_is_nearly_full(&host, &[one, two])?;
    ends_reset(&app)?;
    counts(&embassy, "embassy_connections_total{outcome=\"endpoints_unreachable\"}", 1)?;
    host.run("nft", ["delete table ip full"])?;
    // No new connection at all: the consumer's kernel retries until there is room.
    fill_tracking(&host)?;
    let probe = app.peer(["probe", VIP, "--timeout-ms", "500"])?;
    ensure!(probe["outcome"] == "timeout", "{probe}");
    let doctor = host.command(embassy_program()?).arg("doctor").output()?;
    let found = String::from_utf8_lossy(&doctor.stdout);
    let full = found.lines().find(|line| line.contains("conntrack")).unwrap_or_default();
    ensure!(full.starts_with("FAIL") && full.contains("new connections are dropped"), "{found}");
    let waits = ["testbed", "peer", "get", VIP, "--timeout-ms", "60000"];
    let waits = app.spawn("waits", waits)?;
    thread::sleep(Duration::from_secs(1));
    let start = Instant::now();
    host.run("conntrack", ["-D", "-p", "udp", "-d", FILLER])?;
    ensure!(waits.wait(3 * WAIT)?.success(), "{}", waits.log());
    ensure!(waits.log().contains("\"failures\":{}"), "{}", waits.log());
    println!("a connection that was dropped was served {:?} after there was room", start.elapsed());

    let status = open.wait(3 * WAIT)?;
    let log = open.log();
    let said: serde_json::Value = serde_json::from_str(log.lines().last().unwrap_or_default())?;
    ensure!(status.success() && said["whole"] == OPEN && said["failures"] == json!({}), "{log}");
    println!("open all the time: {said}");
    assert_eq!(metric(&embassy, "embassy_connections_total{outcome=\"endpoint_reset\"}")?, 0);
    let answers = app.get(VIP).times(100).run()?;
    unharmed("room again", &answers, None)
}

fn ends_reset(app: &Container) -> Result<()> {
    let probe = app.peer(["probe", VIP, "--timeout-ms", "10000", "--wait-ms", "10000"])?;
    ensure!(probe["outcome"] == "reset", "{probe}");
    Ok(())
}

/// A file that sets the wall clock of an embassy. The machine's own clock is unchanged.
struct Clock(PathBuf);

impl Clock {
    fn start(host: &Host, args: &[&str]) -> Result<(Self, Embassy)> {
        let clock = Self(host.dir().join("clock"));
        clock.jump("+0")?;
        let library = fs::read_dir("/usr/lib")?
            .filter_map(|entry| Some(entry.ok()?.path().join("faketime/libfaketimeMT.so.1")))
            .find(|path| path.is_file())
            .context("no libfaketimeMT.so.1: install the package faketime")?;
        let mut command = host.embassy_command(args)?;
        command.env("LD_PRELOAD", library).env("FAKETIME_TIMESTAMP_FILE", &clock.0);
        command.env("FAKETIME_NO_CACHE", "1").env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        Ok((clock, host.embassy_from(command)?))
    }

    fn jump(&self, by: &str) -> Result<()> {
        let next = self.0.with_extension("next");
        fs::write(&next, by)?;
        Ok(fs::rename(&next, &self.0)?)
    }
}

#[test]
fn a_clock_that_jumps_by_a_day_moves_the_times_in_the_log_and_nothing_else() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let lost = web(&host, "lost")?;
    let client = |name: &str| host.client(name).env("BACKEND_WEB", "/services/web;80");
    let app = client("app").env("BACKEND_LOST", "/services/lost;81").start()?;
    let (clock, embassy) =
        Clock::start(&host, &["--dnat", "--empty-hold=1h", "--resync=3600", ETCD])?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:81", "lost")?;
    // A valid empty answer: its last endpoint stays for an hour.
    host.etcd()?.v3().delete(&format!("/services/lost/{}:80", lost.ip()?))?;
    says(&embassy, &["the last ones stay in use for --empty-hold"])?;
    let traffic = app.traffic("jumps", VIP)?;
    for (n, jump) in ["+1d", "-1d", "+400d", "+0"].into_iter().enumerate() {
        clock.jump(jump)?;
        let day = host.run(
            "date",
            ["--utc", "--date", &format!("{} days", jump.trim_end_matches('d')), "+%F"],
        )?;
        // New containers are found, and logged with the time of the changed clock.
        let late = client(&format!("late-{n}")).start()?;
        reaches(&late, VIP, "web")?;
        says(&embassy, &[day.trim(), "new route", &format!("consumer=late-{n}")])?;
        reaches(&app, "172.17.0.1:81", "lost")?;
        for source in ["provider", "etcd /services/web"] {
            let age = format!("embassy_source_age_seconds{{source=\"{source}\"}}");
            let metrics = embassy.admin("/metrics")?.ok()?;
            let age = metrics.lines().find_map(|line| line.strip_prefix(&age)?.trim().parse().ok());
            ensure!(age.is_some_and(|age: f64| (0.0..600.0).contains(&age)), "{source}: {age:?}");
        }
    }
    unharmed("the clock jumps by days", &traffic.stop()?, None)?;
    spins_not(&embassy)?;
    ensure!(metric(&embassy, "embassy_capture_restored_total{change=\"vanished\"}")? == 0);
    Ok(())
}
