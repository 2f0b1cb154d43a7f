//! Shell completions and manual pages, generated from the definition of the command line.

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use super::{Answer, command, commands};

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
    pub(super) fn run(self) -> Result<Answer> {
        let page = match &self.command {
            None => command(),
            Some(name) => match commands().find_subcommand(name) {
                Some(found) => found.clone(),
                None => bail!("no such command: {name:?}; `embassy --help` lists them"),
            },
        };
        let mut out = Vec::new();
        clap_mangen::Man::new(page).render(&mut out).context("the manual page")?;
        Ok(Answer::yes(String::from_utf8(out).context("the manual page")?))
    }
}
