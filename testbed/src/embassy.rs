//! The program under test.

use std::ffi::OsStr;
use std::ops::Deref;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::Signal;

use crate::host::{Host, Response};
use crate::poll::eventually;
use crate::process::Process;
use crate::space::program_near;

/// An embassy that runs on the host. It is a [`Process`], and is killed on drop.
#[derive(Debug)]
pub struct Embassy {
    host: Host,
    process: Process,
}

/// The program: `$EMBASSY_BIN`, otherwise the one that Cargo built next to the running one.
pub fn embassy_program() -> Result<PathBuf> {
    program_near("embassy", "EMBASSY_BIN")
}

impl Host {
    /// Starts embassy with these arguments, and with `DOCKER_HOST` for the host's engine.
    pub fn embassy<I: IntoIterator<Item: AsRef<OsStr>>>(&self, args: I) -> Result<Embassy> {
        self.embassy_from(self.embassy_command(args)?)
    }

    /// The command of [`Host::embassy`], to which further variables can be added.
    pub fn embassy_command<I: IntoIterator<Item: AsRef<OsStr>>>(&self, args: I) -> Result<Command> {
        let mut command = self.command(embassy_program()?);
        command.env("DOCKER_HOST", self.docker_url()).args(args);
        Ok(command)
    }

    /// Starts embassy with a command of [`Host::embassy_command`].
    pub fn embassy_from(&self, command: Command) -> Result<Embassy> {
        Ok(Embassy { host: self.clone(), process: self.spawn("embassy", command)? })
    }
}

impl Embassy {
    /// Waits until `/readyz` of the admin API, at its default address, answers 200.
    pub fn wait_ready(&self, deadline: Duration) -> Result<()> {
        let ready = eventually(deadline, "embassy to be ready", || {
            if let Some(status) = self.process.exited()? {
                // The program has ended, so waiting is useless.
                return Ok(Err(anyhow::anyhow!("embassy ended with {status}")));
            }
            self.admin("/readyz")?.ok().map(|_| Ok(()))
        });
        ready
            .and_then(|ended| ended)
            .with_context(|| format!("its log ends with\n{}", self.process.log_tail()))
    }

    /// `GET` of a path of the admin API at its default address, from inside the host.
    pub fn admin(&self, path: &str) -> Result<Response> {
        self.host.http("GET", &format!("http://127.0.0.1:9990{path}"), "")
    }

    /// Asks it to end (SIGTERM). [`Process::wait`] waits for the end.
    pub fn terminate(&self) -> Result<()> {
        self.process.signal(Signal::TERM)
    }
}

impl Deref for Embassy {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.process
    }
}
