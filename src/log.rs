//! The log: to stderr, never blocking whoever writes to it.

use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{EnvFilter, filter::LevelFilter};

use crate::config::LogFormat;

/// Lines that may wait for a slow stderr; beyond, new ones are dropped.
const QUEUE: usize = 16 * 1024;

/// Starts the log. What is still queued is written when the guard is dropped.
///
/// `filter` is `RUST_LOG`, and wins over `verbosity`: 0 says what a person wants to hear, 1 and up what was done and why,
/// 4 and up everything of ours, 7 and up the libraries too. A filter that cannot be read is the error.
pub fn start(
    format: LogFormat,
    verbosity: u8,
    filter: Option<&str>,
) -> Result<WorkerGuard, tracing_subscriber::filter::ParseError> {
    let ours = match verbosity {
        0 => "warn,embassy=info,connection=info",
        1..=3 => "warn,embassy=debug,connection=info",
        4..=6 => "warn,embassy=trace,connection=info",
        7..=9 => "debug,embassy=trace",
        _ => "trace",
    };
    let filter = EnvFilter::builder()
        .with_default_directive(LevelFilter::WARN.into())
        .parse(filter.unwrap_or(ours))?;
    let (writer, guard) = NonBlockingBuilder::default()
        .buffered_lines_limit(QUEUE)
        .lossy(true)
        .finish(std::io::stderr());
    let log =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).with_ansi(false);
    match format {
        LogFormat::Text => log.with_target(false).init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
    Ok(guard)
}
