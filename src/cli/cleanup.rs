//! `embassy cleanup`: removes the firewall rules that a killed embassy left.

use std::fmt::Write;

use anyhow::{Context, Result, bail};
use serde::Serialize;

use super::{Answer, running, table::printable};
use crate::capture::{self, Lock};

/// Remove the firewall rules that a killed embassy left
#[derive(Debug, clap::Args)]
pub(super) struct Cleanup {
    /// Remove the rules even if an embassy is running here; it restores them within seconds. Fails if the rules belong to that
    /// process (nft on Linux 5.12 and later): stop it instead
    #[arg(long)]
    force: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Default, Serialize)]
struct Done {
    /// The backends whose rules were removed.
    removed: Vec<String>,
    errors: Vec<String>,
}

impl Cleanup {
    pub(super) async fn run(self) -> Result<Answer> {
        // Held while the rules are removed, so that no embassy starts to capture.
        let lock = Lock::take().context("cannot check whether an embassy captures here")?;
        if lock.is_none() && !self.force {
            let pids: Vec<_> =
                running::proxies().iter().map(|proxy| proxy.pid.to_string()).collect();
            let who = match pids.as_slice() {
                [] => String::new(),
                pids => format!(" (process {})", pids.join(", ")),
            };
            bail!(
                "an embassy captures here{who} and removes its rules when it stops: stop it, or use --force"
            );
        }
        let mut done = Done::default();
        for (firewall, removed) in capture::remove_leftovers().await {
            match removed {
                Ok(true) => done.removed.push(firewall.to_string()),
                Ok(false) => {}
                Err(error) => done.errors.push(format!("{firewall}: {error}")),
            }
        }
        let clean = done.errors.is_empty();
        if self.json {
            return Answer::json(&done, clean);
        }
        let mut text = String::new();
        for firewall in &done.removed {
            let _ = writeln!(text, "removed our rules of {firewall}");
        }
        for error in &done.errors {
            let error = printable(error);
            let _ = writeln!(text, "cannot remove our rules: {error}");
        }
        if text.is_empty() {
            text.push_str("no embassy rules found\n");
        }
        Ok(Answer::new(text, clean))
    }
}
