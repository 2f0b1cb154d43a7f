//! A program that runs inside a host.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::exec::describe;

/// A running program whose output goes to a file. It is killed on drop.
#[derive(Debug)]
pub struct Process {
    name: String,
    log: PathBuf,
    /// The program. If `child` is nsenter, the program is its child: entering a process namespace needs a fork.
    pid: Pid,
    child: Mutex<Child>,
    shown: bool,
}

/// Number of lines of a program's log that a failed test shows.
const SHOWN_LINES: usize = 60;

impl Process {
    pub(crate) fn spawn(name: &str, dir: &Path, mut command: Command) -> Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log);
        let file = file.with_context(|| format!("open {}", log.display()))?;
        let mut child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone().context("share the log")?)
            .stderr(file)
            // Ctrl-C in the terminal is for the program that started the host.
            .process_group(0)
            .spawn()
            .with_context(|| format!("start {}", describe(&command)))?;
        let pid = match command.get_program() == "nsenter" {
            true => {
                forked_by(&mut child).with_context(|| format!("start {}", describe(&command)))?
            }
            false => Pid::from_child(&child),
        };
        Ok(Self { name: name.to_owned(), log, pid, child: Mutex::new(child), shown: false })
    }

    /// A failed test shows this log. The logs of a host's daemons are too long for that.
    pub(crate) fn shown(mut self) -> Self {
        self.shown = true;
        self
    }

    /// The ID of the program's process, as seen from outside the host.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_pid().unsigned_abs()
    }

    /// Sends a signal; an error if the program has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let mut child = self.child();
        if let Some(status) = child.try_wait()? {
            bail!(
                "{} has ended with {status}: it cannot be sent signal {}",
                self.name,
                signal.as_raw()
            );
        }
        kill_process(self.pid, signal).with_context(|| format!("signal {}", self.name))
    }

    /// Waits for the end. An error if it does not end within `deadline`.
    pub fn wait(&self, deadline: Duration) -> Result<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.exited()? {
                return Ok(status);
            }
            if start.elapsed() >= deadline {
                bail!(
                    "{} still runs after {deadline:?}; its log ends with\n{}",
                    self.name,
                    self.log_tail()
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The exit status, if it has ended.
    pub fn exited(&self) -> Result<Option<ExitStatus>> {
        let mut child = self.child();
        // nsenter stops itself when its child is stopped, and would then never see the end.
        if Pid::from_child(&child) != self.pid && is_stopped(&child) {
            let _ = kill_process(Pid::from_child(&child), Signal::CONT);
        }
        child.try_wait().with_context(|| format!("wait for {}", self.name))
    }

    /// Kills it and waits until it is gone. Does nothing if it has already ended.
    pub fn kill(&self) -> Result<()> {
        if self.exited()?.is_none() {
            // It may just have ended, which `wait` shows.
            let _ = kill_process(self.pid, Signal::KILL);
        }
        self.wait(Duration::from_secs(10)).map(drop)
    }

    /// Everything that it has written to stdout and stderr so far.
    pub fn log(&self) -> String {
        fs::read(&self.log)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    pub(crate) fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n")
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // A test that returns an error does not panic. With the variable all logs are shown, and the test runner keeps them
        // for failed tests.
        let wanted = std::thread::panicking() || std::env::var_os("TESTBED_SHOW_LOGS").is_some();
        if self.shown && wanted {
            eprintln!("--- end of the log of {}\n{}\n---", self.name, self.log_tail());
        }
        // If it cannot be killed, the end of the host's namespaces kills it.
        let _ = self.kill();
    }
}

/// The child of nsenter, which appears a moment after nsenter itself.
fn forked_by(nsenter: &mut Child) -> Result<Pid> {
    let children = format!("/proc/{0}/task/{0}/children", nsenter.id());
    let start = Instant::now();
    loop {
        let list = fs::read_to_string(&children).unwrap_or_default();
        if let Some(pid) =
            list.split_whitespace().next().and_then(|pid| Pid::from_raw(pid.parse().ok()?))
        {
            return Ok(pid);
        }
        if nsenter.try_wait()?.is_some() || start.elapsed() > Duration::from_secs(10) {
            // It has ended before it could be seen. Its status and log show why.
            return Ok(Pid::from_child(nsenter));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn is_stopped(child: &Child) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap_or_default();
    // The state follows the name, which is in parentheses and may itself contain some.
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
}
