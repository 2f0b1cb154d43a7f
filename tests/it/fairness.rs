//! How much one consumer can affect others. Prints figures and asserts nothing, because the figures depend on the machine.
//!
//! `cargo test --test it fairness:: -- --ignored --nocapture --test-threads 1`

use std::{fs, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::{Container, Embassy, Host};

use crate::{
    READY,
    support::{ETCD, counts, metric, offer, reaches, web},
};

const WEB: &str = "172.17.0.1:80";
const OTHER: &str = "172.17.0.1:81";

/// A host with a neighbour and a greedy consumer, which connects to the server `other` at [`OTHER`].
struct Place {
    neighbour: Container,
    greedy: Container,
    embassy: Embassy,
    host: Host,
}

impl Place {
    fn new<const N: usize>(flags: &[&str], other: [&str; N]) -> Result<Self> {
        let host = Host::light()?;
        web(&host, "web")?;
        let other = host.server("other", other).start()?;
        offer(&host, "other", other.ip()?)?;
        let neighbour = host.client("neighbour").env("BACKEND_WEB", "/services/web;80").start()?;
        let greedy = host.client("greedy").env("BACKEND_WEB", "/services/web;80");
        let greedy = greedy.env("BACKEND_OTHER", "/services/other;81").start()?;
        let embassy = host.embassy([&["--dnat", ETCD], flags].concat())?;
        embassy.wait_ready(READY)?;
        reaches(&neighbour, WEB, "web")?;
        Ok(Self { neighbour, greedy, embassy, host })
    }

    /// The duration of the neighbour's requests in ms, each on its own connection: median, 99th percentile and maximum; and
    /// the number of failures.
    fn neighbours(&self) -> Result<String> {
        const REQUESTS: usize = 400;
        let words = format!(
            "i=0; while [ $i -lt {REQUESTS} ]; do testbed peer get {WEB} --timeout-ms 5000; i=$((i+1)); done"
        );
        let said = self.neighbour.exec(["sh", "-c", &words])?;
        let (mut times, mut failed) = (Vec::new(), 0);
        for line in said.lines() {
            let answers: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
            match answers["failures"].as_object().is_some_and(|failures| failures.is_empty()) {
                true => times.push(answers["slowest_ms"].as_f64().context("no time")?),
                false => failed += 1,
            }
        }
        times.sort_by(f64::total_cmp);
        let at = |part: usize| {
            let time = times.get((times.len() * part / 100).min(times.len().saturating_sub(1)));
            time.copied().unwrap_or_default()
        };
        Ok(format!("{} ms, {} ms, {} ms; {failed} failed", at(50), at(99), at(100)))
    }
}

#[test]
#[ignore = "prints figures"]
fn a_neighbour_beside_one_who_floods() -> Result<()> {
    println!("requests of a neighbour: half take less than, 99 of 100, the slowest");
    for flags in [&[][..], &["--max-connections-per-consumer=1000000"]] {
        let place = Place::new(flags, ["greet"])?;
        println!("{flags:?} alone: {}", place.neighbours()?);
        let words = ["testbed", "peer", "get", WEB, "-n", "100000000", "-c", "200"];
        let flood = place.greedy.spawn("requests", words)?;
        counts(&place.embassy, "embassy_connections_started_total", 5_000)?;
        println!("{flags:?} beside 200 who ask all the time: {}", place.neighbours()?);
        flood.kill()?;
        let words = ["testbed", "peer", "hold", OTHER, "-n", "12000", "-c", "100"];
        let flood = place.greedy.spawn("connections", words)?;
        println!("{flags:?} while 12,000 connections are opened: {}", place.neighbours()?);
        let start = std::time::Instant::now();
        while !flood.log().contains("greetings") && start.elapsed() < Duration::from_secs(90) {
            thread::sleep(Duration::from_millis(200));
        }
        let open = metric(&place.embassy, "embassy_connections_active")?;
        println!("{flags:?} beside {open} open connections: {}", place.neighbours()?);
        for outcome in ["too_many_of_consumer", "too_many_connections"] {
            let name = format!("embassy_connections_total{{outcome=\"{outcome}\"}}");
            println!("{flags:?} {outcome}: {}", metric(&place.embassy, &name)?);
        }
    }
    Ok(())
}

#[test]
#[ignore = "prints figures"]
fn memory_of_slow_readers() -> Result<()> {
    for count in [100, 400] {
        let place = Place::new(&[], ["source", "--bytes", "100000000000", "--seed", "1"])?;
        let before = (resident(&place.embassy)?, tcp_pages(&place.host)?);
        let read = format!("for i in $(seq {count}); do testbed peer recv {OTHER} --rate 1 & done");
        let words = format!("{read}; sleep 1000");
        let readers = place.greedy.spawn("readers", ["sh", "-c", &words])?;
        counts(&place.embassy, "embassy_connections_active", count)?;
        // Until buffers are full.
        let mut last = 0;
        for n in 0..60 {
            thread::sleep(Duration::from_secs(1));
            let now = sockets(&place.host)?.iter().sum();
            if n > 15 && now <= last + last / 50 {
                break;
            }
            last = now;
        }
        ensure!(readers.exited()?.is_none());
        let [received, to_send, other] = sockets(&place.host)?;
        println!(
            "{count} readers of a byte a second: embassy's sockets hold {} MB received, {} MB to send, {} MB else; embassy {} MB more, TCP of the whole machine {} MB more",
            received >> 20,
            to_send >> 20,
            other >> 20,
            (resident(&place.embassy)?.saturating_sub(before.0)) >> 20,
            (tcp_pages(&place.host)?.saturating_sub(before.1)) >> 8,
        );
        println!("the neighbour: {}", place.neighbours()?);
    }
    Ok(())
}

/// `EMBASSY_BIN` selects another embassy.
#[test]
#[ignore = "prints figures"]
fn first_acts() -> Result<()> {
    let place = Place::new(&["--hold=60s"], ["greet"])?;
    let mut times = Vec::new();
    for n in 0..60 {
        let first = place.host.container(&format!("first-{n}"));
        let first = first.env("BACKEND_WEB", "/services/web;80");
        let get = format!("testbed peer get {WEB} --timeout-ms 60000; sleep 1000");
        let first = first.cmd(["sh", "-c", &get]).start()?;
        let answers = testbed::eventually(Duration::from_secs(60), "the answer", || {
            let log = first.log()?;
            let line = log.lines().next().filter(|_| log.contains('\n')).context("none yet")?;
            Ok(serde_json::from_str::<Value>(line)?)
        })?;
        ensure!(answers["failures"].as_object().is_some_and(|none| none.is_empty()), "{answers}");
        times.push(answers["slowest_ms"].as_u64().context("no time")?);
        first.remove()?;
    }
    times.sort_unstable();
    println!("a container's first request: {} ms, {} ms, {} ms", times[30], times[58], times[59]);
    Ok(())
}

fn resident(embassy: &Embassy) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", embassy.pid()))?;
    let value = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    Ok(value.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}

/// TCP memory of all namespaces, in pages.
fn tcp_pages(host: &Host) -> Result<u64> {
    let text = host.run("cat", ["/proc/net/sockstat"])?;
    let tcp = text.lines().find_map(|line| line.strip_prefix("TCP: ")).context("TCP")?;
    Ok(tcp.rsplit(' ').next().unwrap_or_default().parse()?)
}

/// Bytes in the sockets of the host's own namespace, which are embassy's: received and not read, waiting to be sent, and
/// reserved.
fn sockets(host: &Host) -> Result<[u64; 3]> {
    let text = host.run("ss", ["--tcp", "--memory", "--numeric"])?;
    let mut sums = [0; 3];
    for memory in text.lines().filter_map(|line| line.split_once("skmem:(")) {
        for field in memory.1.trim_end_matches(')').split(',') {
            let at = field.find(|c: char| c.is_ascii_digit()).unwrap_or(0);
            let (name, value) = field.split_at(at);
            let index = ["r", "w", "f"].iter().position(|wanted| *wanted == name);
            if let Some(sum) = index.and_then(|index| sums.get_mut(index)) {
                *sum += value.parse::<u64>()?;
            }
        }
    }
    Ok(sums)
}
