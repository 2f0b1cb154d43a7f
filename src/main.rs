//! embassy: words become a Config, a Config an App. No logic here.

use std::{env, io::Write, process::ExitCode};

use anyhow::{Context, Result};
use embassy::{
    app::App,
    config::{Config, Stop},
    log,
};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, info, warn};

fn main() -> ExitCode {
    let words = env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned());
    let config = match Config::parse(words, &|name| env::var(name).ok()) {
        Ok(config) => config,
        Err(Stop::Print(text)) => {
            // Whoever closed the pipe has seen enough.
            let _ = write!(std::io::stdout(), "{text}");
            return ExitCode::SUCCESS;
        }
        Err(Stop::Usage(error)) => {
            eprintln!("embassy: {error}");
            return ExitCode::from(2);
        }
    };
    let _log = match log::start(config.log_format, config.verbosity, config.log_filter.as_deref()) {
        Ok(guard) => guard,
        Err(error) => {
            eprintln!("embassy: RUST_LOG: {error}");
            return ExitCode::from(2);
        }
    };
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The control plane has this thread; the data path makes its own.
fn run(config: Config) -> Result<()> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("a runtime")?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
        info!(version = env!("CARGO_PKG_VERSION"), "embassy starts");
        if !config.ignored.is_empty() {
            warn!(flags = config.ignored.join(" "), "ignored");
        }
        let mut app = App::start(config).await?;
        let failure = tokio::select! {
            _ = terminate.recv() => None,
            _ = interrupt.recv() => None,
            error = app.failed() => Some(error),
        };
        info!("embassy stops; a second signal ends it at once");
        app.stop(async {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        })
        .await?;
        info!("embassy has stopped");
        failure.map_or(Ok(()), Err)
    })
}
