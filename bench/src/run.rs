//! The rounds. In each, every contender does every kind of work, one after the other, so that other work of the machine
//! affects all of them equally.

use std::{collections::BTreeMap, env, str::FromStr, time::Duration};

use anyhow::{Context, Result, anyhow, bail};

use crate::{
    contender::Contender,
    load::{Done, Kind},
    report::{Report, Setting},
    site::{Client, Lasts, Load, Measured, Running, Site, Started},
};

/// A measured value, which is a row of the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Figure {
    Connections,
    CpuPerConnection,
    WholePerConnection,
    Requests,
    CpuPerRequest,
    WholePerRequest,
    Bulk,
    CpuPerGigabyte,
    WholePerGigabyte,
    P50,
    P99,
    P99Paced,
    P99BesideBulk,
    BulkBeside,
    P99BesideFlood,
    FloodBeside,
    ResidentAtStart,
    ResidentPerIdle,
    KernelPerIdle,
    Binary,
    Failures,
}

/// All values of each figure of each contender, one per round.
pub(crate) type Samples = BTreeMap<(Figure, Contender), Vec<f64>>;

/// Number of idle connections while memory is measured.
pub(crate) const IDLE: usize = 5_000;
/// How long they idle before the measurement: memory that is released after a while is released by then.
const IDLE_TIME: Duration = Duration::from_secs(4);

pub(crate) const CONNECT: Load = Load { kind: Kind::Connect, connections: 16, rate: 0.0 };
pub(crate) const REQUEST: Load = Load { kind: Kind::Request, connections: 32, rate: 0.0 };
const BULK: Load = Load { kind: Kind::Bulk, connections: 4, rate: 0.0 };
const ONE: Load = Load { kind: Kind::Request, connections: 1, rate: 0.0 };
/// A small load, to measure how neighbours affect it.
pub(crate) const SMALL: Load = Load { kind: Kind::Paced, connections: 8, rate: 1_000.0 };
const FLOOD: Load = Load { kind: Kind::Connect, connections: 64, rate: 0.0 };
/// The fraction of HAProxy's own maximum at which latency under load is measured.
const PACE: f64 = 0.7;

/// A setting from the environment.
pub(crate) fn setting<T: FromStr>(name: &str, default: T) -> Result<T> {
    match env::var(name) {
        Err(_) => Ok(default),
        Ok(text) => text.parse().map_err(|_| anyhow!("{name} is {text:?}, no such number")),
    }
}

pub(crate) fn run() -> Result<()> {
    let rounds: usize = setting("ROUNDS", 5)?;
    let time = Duration::from_secs_f64(setting("SECONDS", 2.0)?);
    let mut missing = Vec::new();
    let mut contenders = Vec::new();
    for contender in Contender::ALL {
        if contender.is_proxy() && contender.program().is_none() {
            println!("{} is left out: it is not here", contender.name());
            missing.push(contender);
        } else {
            contenders.push(contender);
        }
    }
    let mut samples = Samples::new();
    memory(&contenders, rounds, &mut samples)?;
    let rate = speed(&contenders, rounds, time, &mut samples)?;
    let setting = Setting { rounds, time, rate, missing };
    Report::new(&setting, &contenders, &samples)?.write()
}

/// Runs one contender with one kind of work, for a profiler.
pub(crate) fn one(name: &str, kind: &str) -> Result<()> {
    let contender = Contender::ALL.into_iter().find(|c| c.name().eq_ignore_ascii_case(name));
    let contender = contender.with_context(|| format!("{name:?} is no contender"))?;
    let (load, neighbour) = match kind {
        "connect" => (CONNECT, None),
        "request" => (REQUEST, None),
        "bulk" => (BULK, None),
        "single" => (ONE, None),
        "paced" => (Load { rate: setting("RATE", 30_000.0)?, ..REQUEST_PACED }, None),
        "idle" => {
            (Load { kind: Kind::Idle, connections: setting("CONNECTIONS", IDLE)?, rate: 0.0 }, None)
        }
        "beside-bulk" => (SMALL, Some(BESIDE[0])),
        "beside-flood" => (SMALL, Some(BESIDE[1])),
        _ => bail!("{kind:?} is no kind of work"),
    };
    let site = Site::open(&[contender])?;
    let started = contender.start(&site)?;
    if let Some(process) = &started.process {
        println!("process {}", process.pid());
    }
    let time = Duration::from_secs_f64(setting("SECONDS", 2.0)?);
    for _ in 0..setting("ROUNDS", 1)? {
        let (measured, disturbed) = beside(&site, &started, load, neighbour, time)?;
        let (units, what) = match load.kind {
            Kind::Bulk => (measured.done.bytes as f64 / 1e9, "GB"),
            kind => (measured.done.units as f64, kind.name()),
        };
        println!(
            "{:.1} {what}/s; us per {what}: {:.2} of its own, {:.2} of the whole work; p50 {:.0} us, p99 {:.0} us; \
             {} done, {} failed",
            units / measured.done.time,
            micros(measured.own) / units,
            micros(measured.whole) / units,
            measured.done.p50,
            measured.done.p99,
            measured.done.units,
            measured.done.failures,
        );
        if let Some(by) = disturbed {
            println!(
                "beside {:.1} Gbit/s and {:.0} connections/s",
                gigabits(&by),
                units_per_second(&by)
            );
        }
    }
    Ok(())
}

/// The neighbours of a small load: the client and its load. It is another consumer: within one control group the kernel
/// would divide the group's share, and the faster the bulk, the longer the small requests of the same client would wait.
const BESIDE: [(Client, Load); 2] = [(Client::Second, BULK), (Client::Second, FLOOD)];

/// Measures a load next to a neighbour that is active the whole time. Returns the neighbour's results too.
fn beside(
    site: &Site,
    started: &Started,
    load: Load,
    neighbour: Option<(Client, Load)>,
    time: Duration,
) -> Result<(Measured, Option<Done>)> {
    for _ in 0..ATTEMPTS {
        let measured = site.start(Client::First, load, started, Lasts::For(time))?;
        // Started second, while the first one warms up: if all processors are busy with bulk, it can take a minute until
        // another process starts.
        let neighbour = neighbour
            .map(|(client, load)| site.start(client, load, started, Lasts::UntilTold(LONGEST)))
            .transpose()?;
        let measured = measured.measure()?;
        let disturbed = neighbour.map(Running::tell).transpose()?;
        if disturbed.as_ref().is_none_or(|by| by.time < LONGEST.as_secs_f64()) {
            return Ok((measured, disturbed));
        }
        println!("once more: the neighbour had ended before the measured load did");
    }
    bail!("{ATTEMPTS} times the neighbour had ended before the measured load did")
}

/// Maximum time of a neighbour, which is normally ended before.
const LONGEST: Duration = Duration::from_secs(20);
const ATTEMPTS: usize = 5;

fn gigabits(done: &Done) -> f64 {
    done.bytes as f64 * 8.0 / 1e9 / done.time
}

fn units_per_second(done: &Done) -> f64 {
    done.units as f64 / done.time
}

/// Measures the memory of each after its start, and for idle connections. On a separate host, with new processes.
fn memory(contenders: &[Contender], rounds: usize, samples: &mut Samples) -> Result<()> {
    let site = Site::open(contenders)?;
    for round in 1..=rounds {
        for &contender in contenders.iter().filter(|c| c.is_proxy()) {
            println!("memory, round {round} of {rounds}: {}", contender.name());
            let started = contender.start(&site)?;
            let group = started.group().context("a proxy has a group")?;
            let (resident, kernel) = (group.resident()?, group.kernel()?);
            let idle = Load { kind: Kind::Idle, connections: IDLE, rate: 0.0 };
            let running =
                site.start(Client::First, idle, &started, Lasts::For(IDLE_TIME))?.begun()?;
            std::thread::sleep(IDLE_TIME - Duration::from_millis(500));
            let per =
                |now: u64, before: u64| now.saturating_sub(before) as f64 / IDLE as f64 / 1024.0;
            let of_user = per(group.resident()?, resident);
            let of_kernel = per(group.kernel()?, kernel);
            let done = running.wait()?;
            let program = contender.program().context("it was there")?;
            for (figure, value) in [
                (Figure::ResidentAtStart, resident as f64 / 1024.0 / 1024.0),
                (Figure::ResidentPerIdle, of_user),
                (Figure::KernelPerIdle, of_kernel),
                (Figure::Binary, program.metadata()?.len() as f64 / 1024.0 / 1024.0),
                (Figure::Failures, done.failures as f64),
            ] {
                samples.entry((figure, contender)).or_default().push(value);
            }
            if let Some(process) = &started.process {
                process.kill()?;
            }
        }
    }
    Ok(())
}

/// Measures everything else. Returns the rate of the paced load.
fn speed(
    contenders: &[Contender],
    rounds: usize,
    time: Duration,
    samples: &mut Samples,
) -> Result<f64> {
    let site = Site::open(contenders)?;
    let started = contenders.iter().map(|c| c.start(&site)).collect::<Result<Vec<_>>>()?;
    let pacemaker = started.iter().find(|s| s.contender == Contender::Haproxy).or(started.last());
    let pacemaker = pacemaker.context("nobody is there to be measured")?;
    let most = site.start(Client::First, REQUEST, pacemaker, Lasts::For(time))?.measure()?.done;
    let rate = (most.units as f64 / most.time * PACE).round();
    println!("the paced load is {rate} requests a second");
    for round in 1..=rounds {
        for n in 0..started.len() {
            // Another one comes first in each round.
            let started = &started[(n + round) % started.len()];
            println!("speed, round {round} of {rounds}: {}", started.contender.name());
            one_round(&site, started, rate, time, samples)
                .with_context(|| format!("measuring {}", started.contender.name()))?;
        }
    }
    Ok(rate)
}

fn one_round(
    site: &Site,
    started: &Started,
    rate: f64,
    time: Duration,
    samples: &mut Samples,
) -> Result<()> {
    let contender = started.contender;
    let mut failures = 0;
    let mut add = |figure, value| samples.entry((figure, contender)).or_default().push(value);
    let mut measure = |load, neighbour| {
        let (measured, disturbed) = beside(site, started, load, neighbour, time)?;
        failures += measured.done.failures;
        Ok::<_, anyhow::Error>((measured, disturbed))
    };

    let (connect, _) = measure(CONNECT, None)?;
    add(Figure::Connections, per_second(connect.done.units, &connect));
    add(Figure::CpuPerConnection, micros(connect.own) / connect.done.units as f64);
    add(Figure::WholePerConnection, micros(connect.whole) / connect.done.units as f64);

    let (request, _) = measure(REQUEST, None)?;
    add(Figure::Requests, per_second(request.done.units, &request));
    add(Figure::CpuPerRequest, micros(request.own) / request.done.units as f64);
    add(Figure::WholePerRequest, micros(request.whole) / request.done.units as f64);

    let (bulk, _) = measure(BULK, None)?;
    let gigabytes = bulk.done.bytes as f64 / 1e9;
    add(Figure::Bulk, gigabits(&bulk.done));
    add(Figure::CpuPerGigabyte, bulk.own.as_secs_f64() * 1000.0 / gigabytes);
    add(Figure::WholePerGigabyte, bulk.whole.as_secs_f64() * 1000.0 / gigabytes);

    let one = measure(ONE, None)?.0.done;
    add(Figure::P50, one.p50);
    add(Figure::P99, one.p99);
    add(Figure::P99Paced, measure(Load { rate, ..REQUEST_PACED }, None)?.0.done.p99);

    // The neighbour's speed is a figure too: a neighbour that is slowed down disturbs less.
    let [bulk, flood] = BESIDE;
    let (small, disturbed) = measure(SMALL, Some(bulk))?;
    add(Figure::P99BesideBulk, small.done.p99);
    add(Figure::BulkBeside, disturbed.as_ref().map_or(0.0, gigabits));
    let (small, disturbed) = measure(SMALL, Some(flood))?;
    add(Figure::P99BesideFlood, small.done.p99);
    add(Figure::FloodBeside, disturbed.as_ref().map_or(0.0, units_per_second));
    add(Figure::Failures, failures as f64);
    Ok(())
}

const REQUEST_PACED: Load = Load { kind: Kind::Paced, ..REQUEST };

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn per_second(units: u64, measured: &Measured) -> f64 {
    units as f64 / measured.done.time
}
