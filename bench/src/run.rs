//! The rounds: in each, every contender does every kind of work, one after the other, so that whatever else the machine
//! does hits all of them alike.

use std::{collections::BTreeMap, env, str::FromStr, time::Duration};

use anyhow::{Context, Result, anyhow, bail};

use crate::{
    contender::Contender,
    load::Kind,
    report::{Report, Setting},
    site::{Client, Load, Measured, Running, Site, Started},
};

/// What is measured, as a row of the report.
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
    P99BesideFlood,
    ResidentAtStart,
    ResidentPerIdle,
    KernelPerIdle,
    Binary,
    Failures,
}

/// All values of a figure of a contender, one for each round.
pub(crate) type Samples = BTreeMap<(Figure, Contender), Vec<f64>>;

/// Connections that idle while memory is measured.
pub(crate) const IDLE: usize = 5_000;
/// How long they idle before that: what is given back after a while is given back by then.
const IDLE_TIME: Duration = Duration::from_secs(4);

pub(crate) const CONNECT: Load = Load { kind: Kind::Connect, connections: 16, rate: 0.0 };
pub(crate) const REQUEST: Load = Load { kind: Kind::Request, connections: 32, rate: 0.0 };
const BULK: Load = Load { kind: Kind::Bulk, connections: 4, rate: 0.0 };
const ONE: Load = Load { kind: Kind::Request, connections: 1, rate: 0.0 };
/// A small load, of which it is asked what its neighbours do to it.
pub(crate) const SMALL: Load = Load { kind: Kind::Paced, connections: 8, rate: 1_000.0 };
const FLOOD: Load = Load { kind: Kind::Connect, connections: 64, rate: 0.0 };
/// The part of HAProxy's own maximum at which latency under load is measured.
const PACE: f64 = 0.7;

/// A value of the environment.
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

/// One contender, one kind of work, for a profiler to look at.
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
    if let Some((process, _)) = &started.process {
        println!("process {}", process.pid());
    }
    let time = Duration::from_secs_f64(setting("SECONDS", 2.0)?);
    for _ in 0..setting("ROUNDS", 1)? {
        let measured = beside(&site, &started, load, neighbour, time)?;
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
    }
    Ok(())
}

/// Who disturbs a small load: which client, with what.
const BESIDE: [(Client, Load); 2] = [(Client::First, BULK), (Client::Second, FLOOD)];

/// Measures a load, beside a neighbour that lasts longer.
fn beside(
    site: &Site,
    started: &Started,
    load: Load,
    neighbour: Option<(Client, Load)>,
    time: Duration,
) -> Result<Measured> {
    let longer = time + Duration::from_secs(1);
    let neighbour = neighbour
        .map(|(client, load)| site.start(client, load, &started.targets, longer))
        .transpose()?;
    let measured = site.measure(started.group(), load, &started.targets, time)?;
    neighbour.map(Running::wait).transpose()?;
    Ok(measured)
}

/// What each holds when it has just started, and for connections that idle. On a host of its own, with fresh processes.
fn memory(contenders: &[Contender], rounds: usize, samples: &mut Samples) -> Result<()> {
    let site = Site::open(contenders)?;
    for round in 1..=rounds {
        for &contender in contenders.iter().filter(|c| c.is_proxy()) {
            println!("memory, round {round} of {rounds}: {}", contender.name());
            let started = contender.start(&site)?;
            let group = started.group().context("a proxy has a group")?;
            let (resident, kernel) = (group.resident()?, group.kernel()?);
            let idle = Load { kind: Kind::Idle, connections: IDLE, rate: 0.0 };
            let running = site.start(Client::First, idle, &started.targets, IDLE_TIME)?;
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
            if let Some((process, _)) = &started.process {
                process.kill()?;
            }
        }
    }
    Ok(())
}

/// Everything else. Returns the rate of the paced load.
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
    let most = site.measure(pacemaker.group(), REQUEST, &pacemaker.targets, time)?.done;
    let rate = (most.units as f64 / most.time * PACE).round();
    println!("the paced load is {rate} requests a second");
    for round in 1..=rounds {
        for n in 0..started.len() {
            // Another one begins each round.
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
        let measured = beside(site, started, load, neighbour, time)?;
        failures += measured.done.failures;
        Ok::<_, anyhow::Error>(measured)
    };

    let connect = measure(CONNECT, None)?;
    add(Figure::Connections, per_second(connect.done.units, &connect));
    add(Figure::CpuPerConnection, micros(connect.own) / connect.done.units as f64);
    add(Figure::WholePerConnection, micros(connect.whole) / connect.done.units as f64);

    let request = measure(REQUEST, None)?;
    add(Figure::Requests, per_second(request.done.units, &request));
    add(Figure::CpuPerRequest, micros(request.own) / request.done.units as f64);
    add(Figure::WholePerRequest, micros(request.whole) / request.done.units as f64);

    let bulk = measure(BULK, None)?;
    let gigabytes = bulk.done.bytes as f64 / 1e9;
    add(Figure::Bulk, gigabytes * 8.0 / bulk.done.time);
    add(Figure::CpuPerGigabyte, bulk.own.as_secs_f64() * 1000.0 / gigabytes);
    add(Figure::WholePerGigabyte, bulk.whole.as_secs_f64() * 1000.0 / gigabytes);

    let one = measure(ONE, None)?.done;
    add(Figure::P50, one.p50);
    add(Figure::P99, one.p99);
    add(Figure::P99Paced, measure(Load { rate, ..REQUEST_PACED }, None)?.done.p99);

    for (figure, neighbour) in
        [Figure::P99BesideBulk, Figure::P99BesideFlood].into_iter().zip(BESIDE)
    {
        add(figure, measure(SMALL, Some(neighbour))?.done.p99);
    }
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
