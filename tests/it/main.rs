mod registry;
mod main_job;
mod support;
mod capture;
mod consumers;
mod life_cycle;
mod modes;

use std::time::Duration;

/// Until embassy is ready: a start with every source up.
const READY: Duration = Duration::from_secs(30);
/// Until something that should happen at once has happened, on a machine that is busy.
const WAIT: Duration = Duration::from_secs(20);
