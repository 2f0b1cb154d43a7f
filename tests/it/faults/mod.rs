//! Sources and endpoints fail during requests, and no request fails. The figures are printed: `cargo nextest run -E
//! 'test(faults)' --no-capture`. `FAULT_SECONDS=60` sets how long each fault of a source lasts.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use testbed::{Answers, Container};

use crate::WAIT;

mod cluster;
mod docker;
mod endpoints;
mod host;
mod long;
mod registry;

const VIP: &str = "172.17.0.1:80";

/// Waits for the duration of a fault.
fn last() -> Result<()> {
    let wanted = std::env::var("FAULT_SECONDS").ok();
    let seconds =
        wanted.map_or(Ok(2), |text| text.parse().context("FAULT_SECONDS takes a number"))?;
    thread::sleep(Duration::from_secs(seconds));
    Ok(())
}

/// Prints the results of the requests during a fault. None may have failed.
fn unharmed(fault: &str, answers: &Answers, recovery: Option<Duration>) -> Result<()> {
    let Answers { slowest, slow, .. } = answers;
    let (sent, failed) = (answers.answered() + answers.failed(), answers.failed());
    let recovery = recovery.map_or(String::new(), |time| format!(", news used after {time:.1?}"));
    println!(
        "{fault}: sent {sent}, failed {failed}, slowest {slowest:?}, over 500ms {slow}{recovery}"
    );
    ensure!(failed == 0 && sent > 0, "{fault}: {answers:?}");
    Ok(())
}

/// Waits until `name` answers some of the requests. Returns how long that took.
fn meets(app: &Container, name: &str) -> Result<Duration> {
    let start = Instant::now();
    testbed::eventually(2 * WAIT, &format!("an answer of {name}"), || {
        let answers = app.get(VIP).times(6).run()?;
        ensure!(answers.from(name) > 0, "{answers:?}");
        Ok(())
    })?;
    Ok(start.elapsed())
}

/// Waits until `name` answers no request any more. Returns how long that took.
fn meets_no_more(app: &Container, name: &str) -> Result<Duration> {
    let start = Instant::now();
    testbed::eventually(2 * WAIT, &format!("no answer of {name}"), || {
        let answers = app.get(VIP).times(12).run()?;
        ensure!(answers.from(name) == 0 && answers.failed() == 0, "{answers:?}");
        Ok(())
    })?;
    Ok(start.elapsed())
}
