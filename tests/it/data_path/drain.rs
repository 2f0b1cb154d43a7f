//! embassy ends while a thousand connections are busy.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Path, vip};
use crate::{
    WAIT,
    support::{counts, says},
};

const LIVE: u64 = 1_000;

#[test]
fn a_thousand_live_connections_end_whole_within_the_drain() -> Result<()> {
    let path = Path::with(&["--drain=60s"], &[(1001, "echo")])?;
    let (target, count) = (vip(1001), LIVE.to_string());
    let words = ["echoes", &target, "-n", &count, "--bytes", "20000", "--delay-ms", "5000"];
    let live = path.app.spawn("live", ["testbed", "peer"].into_iter().chain(words))?;
    counts(&path.embassy, "embassy_connections_active", LIVE)?;
    testbed::eventually(WAIT, "all to have sent their first half", || {
        ensure!(live.log().contains("connected"), "{}", live.log());
        Ok(())
    })?;
    path.embassy.terminate()?;
    says(&path.embassy, &["waiting for connections to end", &format!("live={LIVE}")])?;
    // All that end in time end completely, and then embassy does not wait any more.
    let patience = Duration::from_secs(60);
    ensure!(live.wait(patience)?.success(), "{}", live.log());
    let log = live.log();
    let said: Value = serde_json::from_str(log.lines().last().context("it says how it was")?)?;
    assert_eq!(said, json!({ "whole": LIVE, "failures": {} }));
    assert_eq!(path.embassy.wait(WAIT)?.code(), Some(0));
    ensure!(!path.embassy.log().contains("drain time is over; resetting the open connections"));
    Ok(())
}
