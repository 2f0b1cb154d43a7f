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
    counts::numbered,
    text::without_secrets,
};

mod collect;
mod dial;
mod judge;

use dial::Dials;

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
    /// It could not be checked.
    Skipped,
    /// It works, but perhaps not for long or not for all containers.
    Warn,
    /// It does not work.
    Fail,
}

/// The result of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Diagnosis {
    check: &'static str,
    level: Level,
    /// The fact, and its consequence.
    what: String,
    /// How to fix it, or how to have it checked. `None` if there is no problem.
    fix: Option<String>,
}

/// The flags for which doctor checks.
pub(super) struct CheckedFlags {
    config: Config,
    /// The one running proxy whose flags are known.
    running: Option<RunningFlags>,
}

/// The flags of a running proxy, compared with doctor's.
struct RunningFlags {
    pid: u32,
    /// Its arguments, without secrets.
    words: String,
    /// Whether doctor uses them. Otherwise: doctor's own flags that have another meaning.
    relation: Relation,
}

enum Relation {
    Taken,
    Differs(Vec<&'static str>),
}

impl RunningFlags {
    /// The finding about the flags. None if doctor's own flags mean the same.
    fn finding(self) -> Option<Diagnosis> {
        let Self { pid, words, relation } = self;
        let check = "flags";
        Some(match relation {
            Relation::Taken => {
                let what = match words.is_empty() {
                    false => {
                        format!("checked with the flags and variables of process {pid}: {words}")
                    }
                    true => {
                        format!("checked with the variables of process {pid}, which has no flags")
                    }
                };
                Diagnosis { check, level: Level::Ok, what, fix: None }
            }
            Relation::Differs(flags) if flags.is_empty() => return None,
            Relation::Differs(flags) => {
                let flags = flags.join(", ");
                let words = if words.is_empty() { "no flags".to_owned() } else { words };
                let what = format!(
                    "checked with other flags or variables than those of process {pid}, which runs here. Different: {flags}. Process {pid} has {words}"
                );
                let fix = "run embassy doctor without flags to check with those of the process";
                Diagnosis { check, level: Level::Warn, what, fix: Some(fix.to_owned()) }
            }
        })
    }
}

impl Doctor {
    pub(super) fn config(
        &self,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<CheckedFlags, UsageError> {
        let own = Config::of(self.flags.clone(), env)?;
        let running = running::proxies();
        // With several proxies it is unclear which one is meant.
        let [proxy] = &running[..] else { return Ok(CheckedFlags { config: own, running: None }) };
        let theirs = Start::of(proxy).and_then(|start| {
            let config = Config::parse(start.words.clone(), &|name| start.variable(name)).ok()?;
            let words: Vec<_> = start.words.iter().map(|word| without_secrets(word)).collect();
            Some((config, words.join(" ")))
        });
        let Some((theirs, words)) = theirs else {
            return Ok(CheckedFlags { config: own, running: None });
        };
        let (config, relation) = match self.flags.is_given() {
            true => {
                let differences = own.differences(&theirs);
                (own, Relation::Differs(differences))
            }
            false => (theirs, Relation::Taken),
        };
        Ok(CheckedFlags { config, running: Some(RunningFlags { pid: proxy.pid, words, relation }) })
    }

    pub(super) async fn run(
        self: Box<Self>,
        CheckedFlags { config, running }: CheckedFlags,
    ) -> Result<Answer> {
        let facts = collect::facts(&config).await;
        let dials = match facts.capturing {
            true => dial::dials(&config, &facts).await,
            false => Dials::default(),
        };
        let mut findings = judge::findings(&facts, &dials);
        if let Some(finding) = running.and_then(RunningFlags::finding) {
            findings.insert(0, finding);
        }
        let well = findings.iter().all(|finding| finding.level != Level::Fail);
        if self.json {
            Answer::json(&findings, well)
        } else {
            Ok(Answer::new(text(&findings), well))
        }
    }
}

fn text(findings: &[Diagnosis]) -> String {
    let mut out = String::new();
    for Diagnosis { check, level, what, fix } in findings {
        let level = match level {
            Level::Ok => "ok  ",
            Level::Skipped => "skip",
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
    let skipped = match count(Level::Skipped) {
        0 => String::new(),
        skipped => format!(" {} skipped.", numbered(skipped, "check was", "checks were")),
    };
    let _ = match (warnings, failures) {
        (0, 0) if skipped.is_empty() => writeln!(out, "\nAll is well."),
        (0, 0) => writeln!(out, "\nNo problem was found.{skipped}"),
        _ => writeln!(
            out,
            "\n{} failed, {}.{skipped}",
            numbered(failures, "check", "checks"),
            numbered(warnings, "warning", "warnings")
        ),
    };
    out
}
