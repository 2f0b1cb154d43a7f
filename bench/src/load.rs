//! The client: plain threads, one for each parallel connection.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::group::Group;
use crate::serve::{ANSWER, ANSWER_AND_CLOSE, BULK, MESSAGE};

/// The kind of load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Connects, sends one request, and reads to the end, again and again.
    Connect,
    /// Sends requests on persistent connections, each immediately after the previous answer.
    Request,
    /// Sends requests at a fixed rate over all connections. A request's time counts from when it was due, even if earlier
    /// answers were late.
    Paced,
    /// Reads as fast as possible.
    Bulk,
    /// Opens all connections, sends one request on each, and holds them for the time.
    Idle,
}

impl Kind {
    const ALL: [(Kind, &'static str); 5] = [
        (Kind::Connect, "connect"),
        (Kind::Request, "request"),
        (Kind::Paced, "paced"),
        (Kind::Bulk, "bulk"),
        (Kind::Idle, "idle"),
    ];

    pub(crate) fn name(self) -> &'static str {
        Self::ALL.iter().find(|(kind, _)| *kind == self).map_or("", |(_, name)| name)
    }
}

/// The results within the measured time.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Done {
    /// The measured time in seconds.
    pub(crate) time: f64,
    /// The number of connections, or of requests.
    pub(crate) units: u64,
    pub(crate) bytes: u64,
    pub(crate) failures: u64,
    /// Duration of a unit in microseconds, median and 99th percentile.
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    /// CPU time in seconds that each of the groups in [`COUNTED`] used meanwhile.
    pub(crate) cpu: Vec<f64>,
}

/// The variable with the control groups whose CPU time is counted, separated by commas. The client reads them exactly at
/// the start and end of the measured time: if all processors are busy, another process would be notified late.
pub(crate) const COUNTED: &str = "COUNTED_GROUPS";

fn counted() -> Result<Vec<f64>> {
    let names = std::env::var(COUNTED).unwrap_or_default();
    let groups = names.split(',').filter(|name| !name.is_empty());
    groups.map(|name| Ok(Group::named(name).cpu()?.as_secs_f64())).collect()
}

/// Printed at the start of the measured time.
pub(crate) const BEGIN: &str = "begin";

/// Time until everything has started, and caches are warm.
const WARM_UP: Duration = Duration::from_millis(400);
/// Timeout of a request.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug, Clone)]
struct Plan {
    kind: Kind,
    targets: Vec<SocketAddr>,
    connections: usize,
    time: Duration,
    /// Requests per second, over all connections.
    rate: f64,
    /// Whether the time ends with the standard input.
    until_told: bool,
}

/// The last word of a plan that ends with the standard input. The time is then only a maximum.
pub(crate) const UNTIL_TOLD: &str = "until-told";

/// Prints [`BEGIN`], then [`Done`] as JSON.
pub(crate) fn run(words: &[&str]) -> Result<()> {
    let plan = Plan::parse(words)?;
    let (measuring, ended) = (AtomicBool::new(false), AtomicBool::new(false));
    if plan.kind == Kind::Idle {
        return hold(&plan);
    }
    let (time, parts, cpu) = thread::scope(|scope| {
        let start = |n| {
            scope.spawn({
                let (plan, measuring, ended) = (&plan, &measuring, &ended);
                move || client(plan, n, measuring, ended)
            })
        };
        let clients: Vec<_> = (0..plan.connections).map(start).collect();
        thread::sleep(WARM_UP);
        println!("{BEGIN}");
        measuring.store(true, Relaxed);
        let (begin, before) = (Instant::now(), counted());
        plan.sleep();
        ended.store(true, Relaxed);
        let (time, after) = (begin.elapsed(), counted());
        let parts: Vec<_> =
            clients.into_iter().map(|c| c.join().expect("a client does not panic")).collect();
        (time, parts, (before, after))
    });
    let cpu = cpu.1?.iter().zip(cpu.0?).map(|(after, before)| after - before).collect();
    let mut took: Vec<u64> = parts.iter().flat_map(|part| part.took.iter().copied()).collect();
    took.sort_unstable();
    let done = Done {
        time: time.as_secs_f64(),
        units: took.len() as u64,
        bytes: parts.iter().map(|part| part.bytes).sum(),
        failures: parts.iter().map(|part| part.failures).sum(),
        p50: quantile(&took, 0.5),
        p99: quantile(&took, 0.99),
        cpu,
    };
    println!("{}", serde_json::to_string(&done)?);
    Ok(())
}

impl Plan {
    fn parse(words: &[&str]) -> Result<Self> {
        let (words, until_told) = match *words {
            [ref words @ .., UNTIL_TOLD] => (words, true),
            _ => (words, false),
        };
        let (kind, targets, connections, time, rate) = match *words {
            [kind, targets, connections, time] => (kind, targets, connections, time, "0"),
            [kind, targets, connections, time, rate] => (kind, targets, connections, time, rate),
            _ => bail!("load takes KIND TARGETS CONNECTIONS SECONDS [RATE] [{UNTIL_TOLD}]"),
        };
        let (kind, _) =
            Kind::ALL.into_iter().find(|(_, name)| *name == kind).context("no such kind")?;
        let targets = targets.split(',').map(|t| Ok(t.parse()?)).collect::<Result<Vec<_>>>()?;
        let plan = Self {
            kind,
            targets,
            connections: connections.parse()?,
            time: Duration::from_secs_f64(time.parse()?),
            rate: rate.parse()?,
            until_told,
        };
        ensure!(kind != Kind::Paced || plan.rate > 0.0, "paced needs a rate");
        Ok(plan)
    }

    /// Waits for the measured time.
    fn sleep(&self) {
        if !self.until_told {
            return thread::sleep(self.time);
        }
        let (told, hears) = mpsc::channel();
        thread::spawn(move || {
            let _ = io::copy(&mut io::stdin(), &mut io::sink());
            let _ = told.send(());
        });
        let _ = hears.recv_timeout(self.time);
    }

    /// The targets in turn.
    fn target(&self, n: usize) -> SocketAddr {
        self.targets[n % self.targets.len()]
    }
}

/// The results of one client within the measured time.
#[derive(Debug, Default)]
struct Part {
    /// Duration of each unit in nanoseconds.
    took: Vec<u64>,
    bytes: u64,
    failures: u64,
}

fn client(plan: &Plan, n: usize, measuring: &AtomicBool, ended: &AtomicBool) -> Part {
    let mut part = Part::default();
    let mut kept: Option<TcpStream> = None;
    let mut buffer = vec![0; if plan.kind == Kind::Bulk { 256 * 1024 } else { MESSAGE }];
    let pace =
        (plan.rate > 0.0).then(|| Duration::from_secs_f64(plan.connections as f64 / plan.rate));
    // The clients' requests are due one after the other, not all at once.
    let mut due =
        Instant::now() + pace.unwrap_or_default().mul_f64(n as f64 / plan.connections as f64);
    let mut round = n;
    while !ended.load(Relaxed) {
        if let Some(pace) = pace {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            due += pace;
        }
        let start = match pace {
            Some(pace) => due - pace,
            None => Instant::now(),
        };
        let result = match plan.kind {
            Kind::Connect => once(plan.target(round)),
            Kind::Bulk => read_some(&mut kept, plan.target(n), &mut buffer),
            Kind::Request | Kind::Paced | Kind::Idle => ask(&mut kept, plan.target(n), &mut buffer),
        };
        round += 1;
        if measuring.load(Relaxed) && !ended.load(Relaxed) {
            match result {
                Ok(bytes) => {
                    part.bytes += bytes;
                    if plan.kind != Kind::Bulk {
                        part.took
                            .push(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX));
                    }
                }
                Err(_) => part.failures += 1,
            }
        }
    }
    part
}

fn open(target: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&target, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// One connection with one request. The endpoint ends it.
fn once(target: SocketAddr) -> std::io::Result<u64> {
    let mut stream = open(target)?;
    let mut buffer = [ANSWER_AND_CLOSE; MESSAGE];
    stream.write_all(&buffer)?;
    stream.read_exact(&mut buffer)?;
    match stream.read(&mut buffer)? {
        0 => Ok(MESSAGE as u64),
        _ => Err(ErrorKind::InvalidData.into()),
    }
}

/// One request on a persistent connection.
fn ask(
    kept: &mut Option<TcpStream>,
    target: SocketAddr,
    buffer: &mut [u8],
) -> std::io::Result<u64> {
    let mut stream = match kept.take() {
        Some(stream) => stream,
        None => open(target)?,
    };
    buffer.fill(ANSWER);
    stream.write_all(buffer)?;
    stream.read_exact(buffer)?;
    *kept = Some(stream);
    Ok(MESSAGE as u64)
}

fn read_some(
    kept: &mut Option<TcpStream>,
    target: SocketAddr,
    buffer: &mut [u8],
) -> std::io::Result<u64> {
    let mut stream = match kept.take() {
        Some(stream) => stream,
        None => {
            let mut stream = open(target)?;
            stream.write_all(&[BULK; MESSAGE])?;
            stream
        }
    };
    let bytes = stream.read(buffer)?;
    if bytes == 0 {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    *kept = Some(stream);
    Ok(bytes as u64)
}

/// Opens the connections one after the other, and holds them for the time.
fn hold(plan: &Plan) -> Result<()> {
    let mut held = Vec::with_capacity(plan.connections);
    let mut failures = 0;
    for n in 0..plan.connections {
        let mut kept = None;
        match ask(&mut kept, plan.target(n), &mut [0; MESSAGE]) {
            Ok(_) => held.extend(kept),
            Err(_) => failures += 1,
        }
    }
    println!("{BEGIN}");
    thread::sleep(plan.time);
    let done = Done {
        units: held.len() as u64,
        failures,
        time: plan.time.as_secs_f64(),
        ..Done::default()
    };
    println!("{}", serde_json::to_string(&done)?);
    Ok(())
}

/// A quantile in microseconds, of sorted nanoseconds.
fn quantile(sorted: &[u64], part: f64) -> f64 {
    let at = (sorted.len() as f64 * part) as usize;
    sorted.get(at.min(sorted.len().saturating_sub(1))).map_or(0.0, |&ns| ns as f64 / 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_the_sorted_times() {
        let sorted: Vec<u64> = (1..=100).map(|n| n * 1000).collect();
        assert_eq!(quantile(&sorted, 0.5), 51.0);
        assert_eq!(quantile(&sorted, 0.99), 100.0);
        assert_eq!(quantile(&[], 0.5), 0.0);
    }

    #[test]
    fn a_plan_is_read_as_it_is_written() {
        let plan = Plan::parse(&["paced", "10.0.0.1:1,10.0.0.2:2", "32", "2.5", "1000"]).unwrap();
        assert_eq!((plan.kind, plan.connections, plan.rate), (Kind::Paced, 32, 1000.0));
        assert_eq!((plan.target(3).port(), plan.until_told), (2, false));
        let told = Plan::parse(&["bulk", "10.0.0.1:1", "1", "1", UNTIL_TOLD]).unwrap();
        assert_eq!((told.rate, told.until_told), (0.0, true));
        assert!(Plan::parse(&["paced", "10.0.0.1:1", "1", "1"]).is_err());
        assert!(Plan::parse(&["fast", "10.0.0.1:1", "1", "1"]).is_err());
    }
}
