//! `embassy doctor`: problems of this host, and how to fix them.

use std::fmt::Write;

use anyhow::Result;
use serde::Serialize;

use super::{
    Answer,
    running::{self, Start},
    table::printable,
};
use crate::{
    config::{Args, Config, UsageError},
    text::without_secrets,
};

mod collect;
mod dial;
mod judge;

/// Check this host for problems and say how to fix them (takes the proxy's flags; without any, those of the embassy that runs)
#[derive(Debug, clap::Args)]
pub(super) struct Doctor {
    /// Print JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    flags: Args,
}

/// Severity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Ok,
    /// It works, but perhaps not for long or not for all containers.
    Warn,
    /// It does not work.
    Fail,
}

/// The result of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Finding {
    check: &'static str,
    level: Level,
    /// The fact, and its consequence.
    what: String,
    /// How to fix it. `None` if there is no problem.
    fix: Option<String>,
}

/// The flags that doctor goes by.
pub(super) struct Checked {
    config: Config,
    /// The running proxy that has them, and its words, if they are not doctor's own.
    of: Option<(u32, String)>,
}

impl Doctor {
    pub(super) fn config(
        &self,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Checked, UsageError> {
        let own = Config::of(self.flags.clone(), env)?;
        let running = running::proxies();
        // With several there is no telling which is meant.
        let [proxy] = &running[..] else { return Ok(Checked { config: own, of: None }) };
        if self.flags.is_given() {
            return Ok(Checked { config: own, of: None });
        }
        let theirs = Start::of(proxy).and_then(|start| {
            let config = Config::parse(start.words.clone(), &|name| start.variable(name)).ok()?;
            let words: Vec<_> = start.words.iter().map(|word| without_secrets(word)).collect();
            Some(Checked { config, of: Some((proxy.pid, words.join(" "))) })
        });
        Ok(theirs.unwrap_or(Checked { config: own, of: None }))
    }

    pub(super) async fn run(self: Box<Self>, Checked { config, of }: Checked) -> Result<Answer> {
        let facts = collect::facts(&config).await;
        let dials = match facts.capturing {
            true => dial::dials(&config, &facts.networks).await,
            false => Vec::new(),
        };
        let mut findings = judge::findings(&facts, &dials);
        if let Some((pid, words)) = of {
            let what = match words.is_empty() {
                false => format!("checked with the flags and variables of process {pid}: {words}"),
                true => format!("checked with the variables of process {pid}, which has no flags"),
            };
            findings.insert(0, Finding { check: "flags", level: Level::Ok, what, fix: None });
        }
        let well = findings.iter().all(|finding| finding.level != Level::Fail);
        if self.json {
            Answer::json(&findings, well)
        } else {
            Ok(Answer::new(text(&findings), well))
        }
    }
}

fn text(findings: &[Finding]) -> String {
    let mut out = String::new();
    for Finding { check, level, what, fix } in findings {
        let level = match level {
            Level::Ok => "ok  ",
            Level::Warn => "warn",
            Level::Fail => "FAIL",
        };
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{level}  {check:<12}  {}", printable(what));
        if let Some(fix) = fix {
            let _ = writeln!(out, "      {:<12}  fix: {}", "", printable(fix));
        }
    }
    let count = |level| findings.iter().filter(|finding| finding.level == level).count();
    let (warnings, failures) = (count(Level::Warn), count(Level::Fail));
    let _ = match (warnings, failures) {
        (0, 0) => writeln!(out, "\nAll is well."),
        _ => writeln!(out, "\n{failures} failed, {warnings} warnings."),
    };
    out
}
