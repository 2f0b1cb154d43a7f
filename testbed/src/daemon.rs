//! A program of the host that a test can stop, kill and start again.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::Signal;

use crate::poll::eventually;
use crate::process::Process;
use crate::space::Space;

/// dockerd, etcd or the Consul agent of a host.
#[derive(Debug)]
pub struct Daemon {
    space: Arc<Space>,
    name: &'static str,
    program: PathBuf,
    args: Vec<OsString>,
    /// Succeeds once the program answers requests.
    probe: fn(&Space) -> Result<()>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    process: Option<Process>,
    used: bool,
}

const START_DEADLINE: Duration = Duration::from_secs(60);
const STOP_DEADLINE: Duration = Duration::from_secs(30);

impl Daemon {
    pub(crate) fn new(
        space: Arc<Space>,
        name: &'static str,
        program: impl Into<PathBuf>,
        args: Vec<OsString>,
        probe: fn(&Space) -> Result<()>,
    ) -> Self {
        Self { space, name, program: program.into(), args, probe, state: Mutex::default() }
    }

    /// Starts it and waits until it answers. Does nothing if it already runs.
    pub fn start(&self) -> Result<()> {
        let mut state = self.state();
        state.used = true;
        if let Some(process) = &state.process
            && process.exited()?.is_none()
        {
            return Ok(());
        }
        let mut command = self.space.command(&self.program);
        command.args(&self.args);
        let process = Process::spawn(self.name, self.space.dir(), command)?;
        let what = format!("{} to answer", self.name);
        let answers = eventually(START_DEADLINE, &what, || match process.exited()? {
            // The program has ended, so waiting is useless.
            Some(status) => Ok(Err(anyhow::anyhow!("{} ended with {status}", self.name))),
            None => (self.probe)(&self.space).map(Ok),
        });
        answers
            .and_then(|ended| ended)
            .with_context(|| format!("its log ends with\n{}", process.log_tail()))?;
        state.process = Some(process);
        Ok(())
    }

    /// Starts it, unless it was started before: if a test has stopped it, it stays stopped.
    pub(crate) fn start_at_first_use(&self) -> Result<()> {
        let used = self.state().used;
        if used { Ok(()) } else { self.start() }
    }

    /// Stops it with SIGTERM, and waits for its end. Does nothing if it does not run.
    pub fn stop(&self) -> Result<()> {
        if let Some(process) = self.state().process.take()
            && process.exited()?.is_none()
        {
            process.signal(Signal::TERM)?;
            process.wait(STOP_DEADLINE)?;
        }
        Ok(())
    }

    /// Kills it (SIGKILL). Does nothing if it does not run.
    pub fn kill(&self) -> Result<()> {
        self.state().process.take().map_or(Ok(()), |process| process.kill())
    }

    /// [`stop`](Self::stop), then [`start`](Self::start).
    pub fn restart(&self) -> Result<()> {
        self.stop()?;
        self.start()
    }

    /// Freezes it (SIGSTOP): its sockets stay open, but do not answer.
    pub fn pause(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    /// Continues it (SIGCONT) after [`pause`](Self::pause).
    pub fn resume(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    /// Everything that it has ever written to stdout and stderr.
    pub fn log(&self) -> String {
        let path = self.space.dir().join(format!("{}.log", self.name));
        std::fs::read_to_string(path).unwrap_or_default()
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let state = self.state();
        state
            .process
            .as_ref()
            .with_context(|| format!("{} does not run", self.name))?
            .signal(signal)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
