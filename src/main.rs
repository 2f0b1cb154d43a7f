//! embassy: words become a command, or a Config and an App. No logic here.

use std::{env, process::ExitCode, time::Duration};

use anyhow::{Context, Result};
use embassy::{app::App, cli, config::Config, log, privileges};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, info, warn};

fn main() -> ExitCode {
    privileges::take_up_net_admin();
    let words = env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned());
    let words: Vec<_> = words.collect();
    let variable = |name: &str| env::var(name).ok();
    if let Some(code) = cli::run(&words, &variable) {
        return code;
    }
    let config = match Config::parse(words, &variable) {
        Ok(config) => config,
        Err(stop) => return cli::told(&stop),
    };
    let _log = match log::start(config.log_format, config.verbosity, config.log_filter.as_deref()) {
        Ok(guard) => guard,
        Err(error) => {
            eprintln!("embassy: RUST_LOG {error}");
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
    let end = runtime.block_on(serve(config));
    // A thread that waits for a disk that hangs is not waited for.
    runtime.shutdown_timeout(Duration::from_secs(1));
    end
}

async fn serve(config: Config) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
    let mut hangup = signal(SignalKind::hangup()).context("SIGHUP")?;
    info!(version = env!("CARGO_PKG_VERSION"), "embassy starts");
    if !config.ignored.is_empty() {
        warn!(flags = config.ignored.join(" "), "ignoring flags that have no effect");
    }
    let mut app = App::start(config).await?;
    let failure = loop {
        tokio::select! {
            _ = terminate.recv() => break None,
            _ = interrupt.recv() => break None,
            _ = hangup.recv() => {
                info!("resync requested via SIGHUP");
                app.resync();
            }
            error = app.failed() => break Some(error),
        }
    };
    info!("embassy is shutting down; a second signal stops it at once");
    app.stop(async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
    .await?;
    info!("embassy has stopped");
    failure.map_or(Ok(()), Err)
}
