//! Waiting for something to become true.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

const INTERVAL: Duration = Duration::from_millis(25);

/// Calls `attempt` until it returns `Ok`, and returns its value. After `deadline` it returns an error that says what was
/// awaited and why the last attempt failed.
///
/// ```
/// # use std::time::Duration;
/// # fn main() -> anyhow::Result<()> {
/// let mut count = 0;
/// testbed::eventually(Duration::from_secs(5), "the third attempt", || {
///     count += 1;
///     anyhow::ensure!(count == 3, "this is attempt {count}");
///     Ok(())
/// })
/// # }
/// ```
pub fn eventually<T>(
    deadline: Duration,
    what: &str,
    mut attempt: impl FnMut() -> Result<T>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(error) if start.elapsed() >= deadline => {
                return Err(error).with_context(|| format!("waited {deadline:?} for {what}"));
            }
            Err(_) => std::thread::sleep(INTERVAL),
        }
    }
}
