//! embassy: the arguments become a command, or a Config and an App. No logic here.

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    env,
    future::pending,
    panic,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, Result};
use embassy::{
    app::{App, Stopping, TakeoverEvent},
    cli,
    config::{Config, Instance},
    log, privileges,
    signals::Signals,
    successor::{self, Successor},
    supervisor::{State, Supervisor},
    tls::Weakness,
};
use tracing::{error, info, warn};

fn main() -> ExitCode {
    // The text of a panic may contain text from outside: it is put on one line, like every other message.
    panic::set_hook(Box::new(|panic| {
        cli::complain(panic.to_string().replace('\n', " "));
        let trace = Backtrace::capture();
        if trace.status() == BacktraceStatus::Captured {
            cli::complain(trace);
        }
    }));
    privileges::take_up_net_admin();
    let mut typed = env::args_os();
    let (program, typed) = (typed.next(), typed.collect::<Vec<_>>());
    if let Some(code) = successor::start_for_another(&typed) {
        return code;
    }
    let successor = Successor::new(program, typed);
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
            cli::complain(format_args!("RUST_LOG {error}"));
            return ExitCode::from(2);
        }
    };
    match run(config, successor, Supervisor::of(&variable)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The control plane has this thread; the data path makes its own.
fn run(config: Config, successor: Successor, supervisor: Supervisor) -> Result<()> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("a runtime")?;
    let end = runtime.block_on(serve(config, successor, supervisor));
    // A thread that waits for a disk that hangs is not waited for.
    runtime.shutdown_timeout(Duration::from_secs(1));
    end
}

async fn serve(config: Config, mut successor: Successor, supervisor: Supervisor) -> Result<()> {
    let mut signals = Signals::catch().context("cannot catch signals")?;
    let Instance { host, engine, discoveries, consumer, .. } = Instance::of(&config);
    let discoveries = discoveries.join(" ");
    info!(
        version = env!("CARGO_PKG_VERSION"),
        host, engine, discoveries, consumer, "embassy starts"
    );
    if !config.ignored.is_empty() {
        warn!(flags = config.ignored.join(" "), "ignoring flags that have no effect");
    }
    for Weakness { what, fix } in config.weaknesses() {
        warn!(what, fix, "a connection is not protected");
    }
    let started = App::start_unless(config, supervisor.clone(), signals.stop.recv()).await?;
    let Some((mut app, is_asked_to_stop)) = started else {
        // No rules were written, because they are the last step of a start.
        info!("embassy was stopped during its start");
        return Ok(());
    };
    let (stopping, failure) = loop {
        if is_asked_to_stop {
            break (Stopping::Asked, None);
        }
        tokio::select! {
            () = signals.stop.recv() => break (Stopping::Asked, None),
            _ = signals.hangup.recv() => {
                info!("resync requested via SIGHUP");
                app.resync();
            }
            _ = signals.upgrade.recv() => {
                let program = successor.program().display().to_string();
                info!(program, "upgrade requested via SIGUSR2: a new process is to take over");
                supervisor.tell(State::Reloading).await;
                if let Err(error) = successor.start(&supervisor).await {
                    warn!(%error, "no new process is started; this one continues");
                    supervisor.tell(State::ReloadFailed).await;
                }
            }
            () = successor.ended() => {
                warn!("the new process has not taken over; this one continues");
                supervisor.tell(State::ReloadFailed).await;
            }
            event = app.event() => match event {
                TakeoverEvent::Failed(error) => break (Stopping::Failed, Some(error)),
                TakeoverEvent::Takeover(asker) => {
                    let process = asker.0.peer_process();
                    match app.hand_over(*asker, None, pending()).await {
                        Ok(true) => {
                            // Before this one ends: the supervisor would take that for the end of embassy.
                            if let Some(process) = process.filter(|one| successor.is(Some(*one))) {
                                supervisor.tell(State::MainIs(process)).await;
                            }
                            break (Stopping::HandedOver, None);
                        }
                        Ok(false) => {}
                        Err(error) => break (Stopping::Failed, Some(error)),
                    }
                }
            },
        }
    };
    if stopping != Stopping::HandedOver {
        successor.end();
    }
    info!("embassy is shutting down; a second signal stops it at once");
    app.stop(stopping, signals.stop.recv()).await?;
    info!("embassy has stopped");
    failure.map_or(Ok(()), Err)
}
