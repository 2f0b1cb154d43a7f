//! The commands of the binary, for operators: each inspects the running embassy or the host.
//!
//! A command is recognised only as the first word, so that existing command lines of the proxy keep their meaning.

use std::{fmt, io::Write, process::ExitCode};

use anyhow::Context;
use clap::{
    Command as Clap, FromArgMatches, Subcommand,
    error::{ContextKind, ContextValue},
};

use crate::{
    config::{self, Config, NoConfig, UsageError},
    text::{visible, visible_json, visible_lines, without_secrets},
};

mod cleanup;
mod client;
mod completions;
mod doctor;
mod explain;
mod findings;
mod plan;
mod ps;
mod running;
mod status;
mod table;
mod top;
mod wait;

/// The result of a command.
#[derive(Debug)]
struct Answer {
    /// To stdout.
    text: String,
    /// Whether the answer is yes; otherwise exit 1.
    yes: bool,
}

impl Answer {
    fn yes(text: String) -> Self {
        Self { text, yes: true }
    }

    fn new(text: String, yes: bool) -> Self {
        Self { text, yes }
    }

    /// The same as JSON.
    fn json(value: &impl serde::Serialize, yes: bool) -> anyhow::Result<Self> {
        let text = serde_json::to_string_pretty(value).context("as JSON")?;
        Ok(Self { text: visible_json(&text).into_owned() + "\n", yes })
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    Status(status::Status),
    Ps(ps::Ps),
    Explain(explain::Explain),
    Top(top::Top),
    Wait(wait::Wait),
    Doctor(Box<doctor::Doctor>),
    Plan(Box<plan::Plan>),
    Cleanup(cleanup::Cleanup),
    Completions(completions::Completions),
    Man(completions::Man),
}

/// The commands that take the flags of the proxy. Their help does not list these flags again.
const WITH_FLAGS: [&str; 2] = ["doctor", "plan"];

/// Runs the command at the start of `words`, the arguments after the program's name. `None` if there is no command: then
/// the words are flags of the proxy.
pub fn run(words: &[String], env: &dyn Fn(&str) -> Option<String>) -> Option<ExitCode> {
    let (name, rest) = words.split_first()?;
    let command = match (name.as_str(), commands().find_subcommand(name)) {
        ("help", _) => Err(NoConfig::Print(help_of(rest.first().map(String::as_str)))),
        (name, Some(command)) => parse(name, command, rest, env),
        (name, None) if name.starts_with('-') || name.is_empty() => return None,
        (name, None) => Err(no_command(name).into()),
    };
    let stop = match command {
        Ok(command) => return Some(finish(command.run(env))),
        Err(stop) => stop,
    };
    Some(told(&stop))
}

/// Prints help to stdout, or an error to stderr, instead of running a command.
pub fn told(stop: &NoConfig) -> ExitCode {
    match stop {
        NoConfig::Help => print(&help()),
        NoConfig::Print(text) => print(text),
        NoConfig::Usage(error) => {
            // One line, whatever the user typed.
            complain(visible(&error.to_string()));
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}

/// The help of the proxy, which lists the commands too.
pub fn help() -> String {
    command().render_long_help().to_string()
}

/// All flags and commands, for the help, the completions and the manual.
fn command() -> Clap {
    let mut command = Command::augment_subcommands(Config::flags()).disable_help_subcommand(true);
    command.build();
    command
}

/// Only the commands, for parsing.
fn commands() -> Clap {
    let flags: Vec<_> = Config::flags().get_arguments().map(|arg| arg.get_id().clone()).collect();
    let mut commands = Command::augment_subcommands(Clap::new("embassy").bin_name("embassy"))
        .disable_help_subcommand(true)
        .no_binary_name(true);
    for name in WITH_FLAGS {
        commands = commands.mut_subcommand(name, |command| {
            command
                .mut_args(|arg| if flags.contains(arg.get_id()) { arg.hide(true) } else { arg })
                .override_usage(format!("embassy {name} [OPTIONS] [FLAGS OF THE PROXY]"))
                .after_help("`embassy --help` lists the flags of the proxy.")
        });
    }
    commands.build();
    commands
}

fn help_of(name: Option<&str>) -> String {
    let mut commands = commands();
    match name.and_then(|name| commands.find_subcommand_mut(name)) {
        Some(command) => command.render_long_help().to_string(),
        None => help(),
    }
}

/// A first word that is neither a flag nor a command.
fn no_command(word: &str) -> UsageError {
    let flags = Config::flags();
    let is_flag = ["help", "version"].contains(&word)
        || flags.get_arguments().any(|arg| arg.get_long() == Some(word));
    let nearest = match commands().try_get_matches_from([word]) {
        Err(error) => match error.get(ContextKind::SuggestedSubcommand) {
            Some(ContextValue::Strings(all)) => all.first().cloned(),
            _ => None,
        },
        Ok(_) => None,
    };
    let nearest = if is_flag { Some(format!("--{word}")) } else { nearest };
    let nearest = nearest.map_or(String::new(), |nearest| format!("did you mean {nearest}? "));
    let word = without_secrets(word);
    UsageError::new(format_args!(
        "{word:?}: expected a flag or a command; {nearest}--help lists them all"
    ))
}

fn parse(
    name: &str,
    command: &Clap,
    rest: &[String],
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<Command, NoConfig> {
    let mut rest = config::words(rest.iter().cloned(), command);
    let takes_admin = command.get_arguments().any(|arg| arg.get_long() == Some("admin"));
    // The flags of the proxy read the variable themselves.
    let reads_itself = WITH_FLAGS.contains(&name);
    if takes_admin && !reads_itself && !rest.iter().any(|word| word.starts_with("--admin=")) {
        rest.insert(0, format!("--admin={}", Config::admin_of_command(env)?));
    }
    let words = std::iter::once(name.to_owned()).chain(rest);
    commands()
        .try_get_matches_from(words)
        .and_then(|matches| Command::from_arg_matches(&matches))
        .map_err(config::stop)
}

impl Command {
    fn run(self, env: &dyn Fn(&str) -> Option<String>) -> Result<anyhow::Result<Answer>, NoConfig> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = match runtime.context("a runtime") {
            Ok(runtime) => runtime,
            Err(error) => return Ok(Err(error)),
        };
        Ok(match self {
            Self::Doctor(doctor) => {
                let config = doctor.config(env)?;
                runtime.block_on(doctor.run(config))
            }
            Self::Plan(plan) => {
                let config = plan.config(env)?;
                runtime.block_on(plan.run(config))
            }
            Self::Status(status) => runtime.block_on(status.run()),
            Self::Ps(ps) => {
                ps.check()?;
                runtime.block_on(ps.run())
            }
            Self::Explain(explain) => runtime.block_on(explain.run()),
            Self::Top(top) => runtime.block_on(top.run()),
            Self::Wait(wait) => runtime.block_on(wait.run()),
            Self::Cleanup(cleanup) => runtime.block_on(cleanup.run()),
            Self::Completions(completions) => completions.run(),
            Self::Man(man) => {
                man.check()?;
                man.run()
            }
        })
    }
}

fn finish(answer: Result<anyhow::Result<Answer>, NoConfig>) -> ExitCode {
    match answer {
        Err(stop) => told(&stop),
        Ok(Ok(Answer { text, yes })) => {
            print(&text);
            if yes { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Ok(Err(error)) => {
            complain(format_args!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn print(text: &str) {
    // The reader closed the pipe: it needs no more output.
    let _ = write!(std::io::stdout(), "{}", visible_lines(text));
}

/// Prints an error to stderr. Unlike `eprintln!` it does not panic if nobody reads it.
pub fn complain(error: impl fmt::Display) {
    let _ = writeln!(std::io::stderr(), "embassy: {}", visible_lines(&error.to_string()));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Command, String> {
        parsed_with(line, &|_| None)
    }

    fn parsed_with(line: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Command, String> {
        let words: Vec<_> = line.split(' ').map(str::to_owned).collect();
        let commands = commands();
        let command = commands.find_subcommand(&words[0]).unwrap();
        parse(&words[0], command, &words[1..], env).map_err(|stop| match stop {
            NoConfig::Usage(error) => error.to_string(),
            other => panic!("{other:?}"),
        })
    }

    #[test]
    fn help_lists_every_command_and_every_flag() {
        let help = help();
        for part in ["-p, --port <PORT>", "--filter[=<BOOL>]", "Capture:", "CONSUL_HTTP_TOKEN"] {
            assert!(help.contains(part), "{part} is not in:\n{help}");
        }
        for command in commands().get_subcommands() {
            assert!(help.contains(&format!("  {} ", command.get_name())), "{help}");
        }
        assert!(!help.contains("logtostderr"), "{help}");
    }

    #[test]
    fn a_command_has_a_help_of_its_own_without_the_flags_of_the_proxy() {
        let help = help_of(Some("plan"));
        assert!(help.contains("--json") && !help.contains("--empty-hold"), "{help}");
    }

    #[test]
    fn the_flags_of_the_proxy_mean_the_same_behind_a_command() {
        for line in ["plan --json -port 1 --dnat", "plan -json -p=1 -dnat=true"] {
            let Ok(Command::Plan(plan)) = parsed(line) else { panic!("{line}") };
            let config = plan.config(&|_| None).unwrap();
            assert_eq!(config.port.get(), 1, "{line}");
            assert_eq!(config.capture, config::CaptureMode::Dnat, "{line}");
        }
    }

    #[test]
    fn what_a_command_does_not_take_is_one_line() {
        for (line, expected) in [
            ("cleanup --port=1", "--port: unknown flag; --help lists them all"),
            ("plan words", "\"words\": expected a flag; --help lists them all"),
            (
                "status --admin=x",
                "--admin \"x\": expected <ip>:<port> such as 127.0.0.1:9990, or unix:///path",
            ),
            (
                "wait web --timeout 1y",
                "--timeout \"1y\": expected a time such as 500ms, 10s, 2m or 1h, or a number of seconds, up to 8760h",
            ),
            ("explain app", "<PORT>: missing; see --help"),
            ("explain app 99999", "<PORT> \"99999\": expected a port from 1 to 65535"),
            ("completions", "<SHELL>: missing; see --help"),
            ("completions tcsh", "<SHELL> \"tcsh\": expected bash, zsh or fish"),
        ] {
            assert_eq!(parsed(line).unwrap_err(), expected, "{line}");
        }
    }

    #[test]
    fn the_proxys_words_are_no_command() {
        for line in ["", "--dnat", "--dnat plan", "-plan", "-h"] {
            let words: Vec<_> = line.split(' ').map(str::to_owned).collect();
            assert!(run(&words, &|_| None).is_none(), "{line}");
        }
    }

    #[test]
    fn a_word_that_is_nearly_a_command_or_a_flag_is_helped() {
        for (word, hint) in [
            ("statu", "did you mean status? "),
            ("plans", "did you mean plan? "),
            ("version", "did you mean --version? "),
            ("dnat", "did you mean --dnat? "),
            ("zzz", ""),
        ] {
            assert_eq!(
                no_command(word).to_string(),
                format!("{word:?}: expected a flag or a command; {hint}--help lists them all")
            );
        }
        assert!(!no_command("consul://joe:S3CRET@h").to_string().contains("S3CRET"));
    }

    #[test]
    fn a_command_finds_the_api_by_its_flag_then_by_the_environment() {
        let at = |line: &str, value: &'static str| match parsed_with(line, &|name| {
            (name == "EMBASSY_ADMIN").then(|| value.to_owned())
        }) {
            Ok(command) => format!("{command:?}"),
            Err(error) => error,
        };
        assert!(at("status", "").contains("127.0.0.1:9990"));
        assert!(at("status", "'unix:///run/e.sock'").contains("/run/e.sock"));
        assert!(at("explain app 80", "10.0.0.1:1").contains("10.0.0.1:1"));
        let both = at("wait web --admin 10.0.0.2:2", "10.0.0.1:1");
        assert!(both.contains("10.0.0.2:2") && !both.contains("10.0.0.1:1"), "{both}");
        assert_eq!(
            at("status", "x"),
            "EMBASSY_ADMIN \"x\": expected <ip>:<port> such as 127.0.0.1:9990, or unix:///path"
        );
        // This command does not use it.
        assert!(at("cleanup", "x").contains("Cleanup"));
        let Ok(Command::Plan(plan)) = parsed("plan") else { panic!() };
        let config = plan.config(&|name| (name == "EMBASSY_ADMIN").then(|| "off".to_owned()));
        assert_eq!(config.unwrap().admin, None);
    }
}
