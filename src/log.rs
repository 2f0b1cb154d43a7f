//! The log: lines to stderr, which never block the threads that log.

use std::sync::{Mutex, OnceLock, PoisonError};

use tracing::Metadata;
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{
    EnvFilter, Registry,
    filter::LevelFilter,
    fmt::{self, MakeWriter},
    layer::SubscriberExt,
    reload,
    util::SubscriberInitExt,
};

use self::fold::{Fold, Folded};
use crate::config::LogFormat;

mod fold;

/// Length of each queue for a slow stderr. Further lines are dropped.
const QUEUE: usize = 16 * 1024;

/// The running log. Queued lines are written when it is dropped.
#[derive(Debug)]
pub struct Log {
    // Before the writers, because fields are dropped in this order.
    _fold: Fold,
    _writers: [WorkerGuard; 2],
}

/// Starts the log of this process. Must be called once.
///
/// `filter` is `RUST_LOG`, and overrides `verbosity`: 0 logs what an operator needs, 1 and up what was done and why, 4 and
/// up everything from embassy, 7 and up the libraries too. A filter that does not parse is an error.
pub fn start(format: LogFormat, verbosity: u8, filter: Option<&str>) -> Result<Log, LevelError> {
    let text = filter.map_or_else(|| verbosity.to_string(), str::to_owned);
    let parsed = match filter {
        Some(text) if !is_meant(text) => return Err(LevelError::Filter(text.to_owned())),
        Some(text) => parse(text).map_err(|_| LevelError::Filter(text.to_owned()))?,
        None => parse(directives(verbosity))?,
    };
    let (filter, handle) = reload::Layer::new(parsed);
    // A second log in one process would be a bug, and `init` below panics on it.
    let _ = LEVEL.set(Level { handle, text: Mutex::new(text) });
    let (rest, rest_written) = queue();
    let (connections, connections_written) = queue();
    let _ = DROPPED.set([rest.error_counter(), connections.error_counter()]);
    let writer = Writers { rest, connections };
    let fold = Fold::default();
    let folded = Folded::of(&fold, format);
    let layer = fmt::layer().with_writer(writer).with_ansi(false);
    let log = tracing_subscriber::registry().with(filter);
    match format {
        LogFormat::Text => {
            log.with(layer.with_target(false).map_event_format(|lines| folded.then(lines))).init();
        }
        LogFormat::Json => {
            let layer = layer.json().flatten_event(true);
            log.with(layer.map_event_format(|lines| folded.then(lines))).init();
        }
    }
    fold.tell();
    Ok(Log { _fold: fold, _writers: [rest_written, connections_written] })
}

/// Why the level was not changed.
#[derive(Debug, thiserror::Error)]
pub enum LevelError {
    #[error("{0:?}: expected a number from 0 to 10, or the syntax of RUST_LOG")]
    Unreadable(String),
    #[error(
        "{0:?}: expected a level such as info, or targets with levels such as warn,embassy=debug"
    )]
    Filter(String),
    #[error("this process writes no log")]
    NoLog,
}

/// Changes the level: a verbosity from 0 to 10 as for `-v`, or the syntax of `RUST_LOG`.
pub fn set_level(text: &str) -> Result<(), LevelError> {
    let level = LEVEL.get().ok_or(LevelError::NoLog)?;
    let filter = match text.parse::<u8>() {
        Ok(verbosity @ 0..=10) => parse(directives(verbosity))?,
        Ok(_) => return Err(LevelError::Unreadable(text.to_owned())),
        Err(_) if !is_meant(text) => return Err(LevelError::Unreadable(text.to_owned())),
        Err(_) => parse(text)?,
    };
    level.handle.reload(filter).map_err(|_| LevelError::NoLog)?;
    text.clone_into(&mut level.text.lock().unwrap_or_else(PoisonError::into_inner));
    Ok(())
}

/// The current level, in the syntax of [`set_level`]. `None` if this process writes no log.
pub fn level() -> Option<String> {
    LEVEL.get().map(|level| level.text.lock().unwrap_or_else(PoisonError::into_inner).clone())
}

/// Number of lines dropped since the start because the reader of stderr is too slow.
pub fn dropped() -> u64 {
    DROPPED.get().map_or(0, |all| all.iter().map(|queue| queue.dropped_lines() as u64).sum())
}

static DROPPED: OnceLock<[ErrorCounter; 2]> = OnceLock::new();

/// There is only one log per process, as `tracing` requires.
static LEVEL: OnceLock<Level> = OnceLock::new();

struct Level {
    handle: reload::Handle<EnvFilter, Registry>,
    text: Mutex<String>,
}

fn directives(verbosity: u8) -> &'static str {
    match verbosity {
        0 => "warn,embassy=info",
        1..=3 => "warn,embassy=debug",
        4..=6 => "warn,embassy=trace",
        7..=9 => "debug,embassy=trace",
        _ => "trace",
    }
}

/// Whether every directive names a level, or at least a module that logs. `RUST_LOG` takes a single word for a module's
/// name: a misspelt level would silently disable all messages.
fn is_meant(directives: &str) -> bool {
    directives.split(',').map(str::trim).all(|directive| {
        let module = directive.split("::").next().unwrap_or_default();
        directive.contains(['=', '['])
            || (!directive.is_empty() && directive.parse::<LevelFilter>().is_ok())
            || ["embassy", CONNECTION].contains(&module)
    })
}

/// The filter for these directives. The connection log is not affected: only `--connection-log` decides which connections
/// are logged.
fn parse(directives: &str) -> Result<EnvFilter, LevelError> {
    let unreadable = || LevelError::Unreadable(directives.to_owned());
    let filter = EnvFilter::builder().with_default_directive(LevelFilter::WARN.into());
    let filter = filter.parse(directives).map_err(|_| unreadable())?;
    let connections = format!("{CONNECTION}=info").parse().map_err(|_| unreadable())?;
    Ok(filter.add_directive(connections))
}

/// A queue of lines that a separate thread writes to stderr.
fn queue() -> (NonBlocking, WorkerGuard) {
    let queue = NonBlockingBuilder::default().buffered_lines_limit(QUEUE).lossy(true);
    queue.finish(std::io::stderr())
}

/// The target of the connection log's lines.
pub const CONNECTION: &str = "connection";

/// Two queues, so that many lines of the connection log do not displace lines about problems.
#[derive(Debug)]
struct Writers {
    rest: NonBlocking,
    connections: NonBlocking,
}

impl<'a> MakeWriter<'a> for Writers {
    type Writer = NonBlocking;

    fn make_writer(&'a self) -> NonBlocking {
        self.rest.clone()
    }

    fn make_writer_for(&'a self, line: &Metadata<'_>) -> NonBlocking {
        if line.target() == CONNECTION { self.connections.clone() } else { self.rest.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_verbosity_is_a_filter_and_nonsense_is_none() {
        for verbosity in 0..=10 {
            assert!(parse(directives(verbosity)).is_ok(), "{verbosity}");
        }
        assert!(parse("embassy=debug,hyper=off").is_ok());
        assert!(parse("embassy=loud").is_err());
        for meant in ["debug", "embassy", "embassy::proxy", "warn,connection=info", "OFF"] {
            assert!(is_meant(meant), "{meant}");
        }
        for mistake in ["loud", "debg", "-1", "", "info,", "loud and clear"] {
            assert!(!is_meant(mistake), "{mistake}");
        }
    }
}
