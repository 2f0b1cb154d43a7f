//! Shell completions and manual pages, generated from the definition of the command line.

use anyhow::{Context, Result};
use clap::ValueEnum;

use super::{Answer, command, commands};
use crate::config::UsageError;

/// Print shell completions
#[derive(Debug, clap::Args)]
pub(super) struct Completions {
    /// Shell
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

impl Completions {
    pub(super) fn run(self) -> Result<Answer> {
        let shell = match self.shell {
            Shell::Bash => clap_complete::Shell::Bash,
            Shell::Zsh => clap_complete::Shell::Zsh,
            Shell::Fish => clap_complete::Shell::Fish,
        };
        let mut out = Vec::new();
        clap_complete::generate(shell, &mut command(), "embassy", &mut out);
        Ok(Answer::yes(String::from_utf8(out).context("completions")?))
    }
}

/// Print the manual page of embassy or of a command
#[derive(Debug, clap::Args)]
pub(super) struct Man {
    /// Command; without it, the manual page of the proxy
    #[arg(value_name = "COMMAND")]
    command: Option<String>,
}

impl Man {
    /// Refuses a page that does not exist.
    pub(super) fn check(&self) -> Result<(), UsageError> {
        let commands = commands();
        match &self.command {
            Some(name) if commands.find_subcommand(name).is_none() => {
                let pages: Vec<_> =
                    commands.get_subcommands().map(clap::Command::get_name).collect();
                Err(UsageError::new(format_args!(
                    "<COMMAND> {name:?}: expected nothing, for the page of the proxy, or one of {}",
                    pages.join(", ")
                )))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn run(self) -> Result<Answer> {
        let page = match &self.command {
            None => command(),
            Some(name) => commands().find_subcommand(name).cloned().unwrap_or_else(command),
        };
        let mut out = Vec::new();
        clap_mangen::Man::new(page).render(&mut out).context("the manual page")?;
        Ok(Answer::yes(String::from_utf8(out).context("the manual page")?))
    }
}
