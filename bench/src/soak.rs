//! embassy alone, at full rate for minutes: its memory must not grow.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::{
    contender::Contender,
    run::{CONNECT, REQUEST, setting},
    site::{Client, Lasts, Site},
};

/// Growth between the first minute and the end that is tolerated, in bytes.
const SLACK: u64 = 2 * 1024 * 1024;

pub(crate) fn run() -> Result<()> {
    let time = Duration::from_secs_f64(setting("MINUTES", 10.0)? * 60.0);
    let site = Site::open(&[Contender::Embassy])?;
    let started = Contender::Embassy.start(&site)?;
    let group = started.group().context("embassy has a group")?;
    let begin = Instant::now();
    let connect = site.start(Client::First, CONNECT, &started, Lasts::For(time))?.begun()?;
    let request = site.start(Client::Second, REQUEST, &started, Lasts::For(time))?.begun()?;
    let (warm, step) = (time / 10, time / 20);
    let mut warmed = None;
    while begin.elapsed() < time {
        std::thread::sleep(step.min(time.saturating_sub(begin.elapsed())));
        let resident = group.resident()?;
        println!("{:4.0} s: {} KiB", begin.elapsed().as_secs_f64(), resident / 1024);
        if begin.elapsed() >= warm {
            warmed.get_or_insert(resident);
        }
    }
    let end = group.resident()?;
    let (connections, requests) = (connect.wait()?, request.wait()?);
    println!(
        "{} connections, {} requests, {} failures",
        connections.units,
        requests.units,
        connections.failures + requests.failures
    );
    let warmed = warmed.context("the time is too short")?;
    ensure!(end <= warmed + SLACK, "it grew from {} KiB to {} KiB", warmed / 1024, end / 1024);
    println!(
        "no growth: {} KiB after a tenth of the time, {} KiB at the end",
        warmed / 1024,
        end / 1024
    );
    Ok(())
}
