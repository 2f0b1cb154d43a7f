mod data_path;
mod main_job;
mod registry;

use std::time::Duration;

/// Until embassy is ready: a start with every source up.
const READY: Duration = Duration::from_secs(30);
/// Until something that should happen at once has happened, on a machine that is busy.
const WAIT: Duration = Duration::from_secs(20);
