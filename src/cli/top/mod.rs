//! `embassy top`: the live screen.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use ratatui::{
    DefaultTerminal,
    crossterm::event::{self, Event, KeyEventKind},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch as watched},
    time::{MissedTickBehavior, interval, sleep},
};

use super::{
    Answer,
    client::{ApiTarget, Client},
};
use crate::{admin::api, config};
use rates::Look;
use screen::{Next, Screen, View};

mod rates;
mod screen;

/// Show live routes and endpoints: connections, errors and bytes per second
#[derive(Debug, clap::Args)]
pub(super) struct Top {
    #[command(flatten)]
    asked: ApiTarget,

    /// Refresh interval, for example 500ms or 2s; at least 100ms
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = config::duration)]
    interval: Duration,
}

impl Top {
    pub(super) async fn run(self) -> Result<Answer> {
        let client = self.asked.client()?;
        // An interval of 0 would show no changes.
        let pause = self.interval.max(Duration::from_millis(100));
        if self.asked.json {
            let before = look(&client, None).await?;
            sleep(pause).await;
            let now = look(&client, None).await?;
            return Answer::json(&now.since(Some(&before)), true);
        }
        if !std::io::stdout().is_terminal() {
            bail!("top needs a terminal; `embassy ps` prints the same once");
        }
        // If embassy does not answer, the error is the same as of other commands.
        let first = look(&client, Some(View::Routes)).await?;
        // From here on top controls the terminal, until `_restore` is dropped. A panic restores the terminal too (ratatui's
        // hook).
        let terminal = ratatui::try_init().context("the terminal")?;
        let _restore = Restore;
        watch(terminal, client, Screen::new(first), pause).await?;
        Ok(Answer::yes(String::new()))
    }
}

/// Restores the terminal on drop.
struct Restore;

impl Drop for Restore {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

async fn watch(
    mut terminal: DefaultTerminal,
    client: Client,
    mut screen: Screen,
    pause: Duration,
) -> Result<()> {
    let mut keys = keys();
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
    let mut hangup = signal(SignalKind::hangup()).context("SIGHUP")?;
    let (seen, mut looks) = mpsc::channel(1);
    // A separate task, so that keys work while embassy hangs.
    let (view, mut wanted) = watched::channel(screen.view());
    let looking = tokio::spawn(async move {
        let mut clock = interval(pause);
        clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            // Immediately if another list is to be shown.
            tokio::select! {
                _ = clock.tick() => {}
                changed = wanted.changed() => if changed.is_err() { return },
            }
            let shown = *wanted.borrow_and_update();
            if seen.send(look(&client, Some(shown)).await).await.is_err() {
                return;
            }
        }
    });
    loop {
        terminal.draw(|frame| screen.draw(frame)).context("the terminal")?;
        tokio::select! {
            Some(look) = looks.recv() => screen.seen(look),
            key = keys.recv() => match key {
                Some(Event::Key(key)) if key.kind == KeyEventKind::Press => {
                    if screen.press(key) == Next::Quit { break }
                    view.send_if_modified(|shown| {
                        std::mem::replace(shown, screen.view()) != screen.view()
                    });
                }
                // The size changed: the next drawing uses it.
                Some(_) => {}
                None => break,
            },
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => break,
        }
    }
    looking.abort();
    Ok(())
}

/// The pressed keys. Reading a terminal blocks, so a separate thread does it. It ends with the process.
fn keys() -> mpsc::Receiver<Event> {
    let (typed, keys) = mpsc::channel(16);
    std::thread::spawn(move || {
        while let Ok(event) = event::read() {
            if typed.blocking_send(event).is_err() {
                return;
            }
        }
    });
    keys
}

/// Reads the shown list, or both. With thousands of routes a list has many pages.
async fn look(client: &Client, view: Option<View>) -> Result<Look> {
    let status: api::Status = client.get("/v1/status", &[]).await?;
    let routes = match view {
        Some(View::Endpoints) => Vec::new(),
        _ => client.all("/v1/routes", &[]).await?,
    };
    let endpoints = match view {
        Some(View::Routes) => Vec::new(),
        _ => client.all("/v1/endpoints", &[]).await?,
    };
    Ok(Look { at: Instant::now(), status, routes, endpoints })
}
