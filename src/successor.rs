//! A new process of the program that this one was started from, which takes over: so `systemctl reload` brings an installed upgrade
//! into use.
//!
//! systemd waits for the end of a main process only if that is its own child at the moment when it is told of it; another one it would
//! kill at once where it should stop. So a process in between starts the new one and ends: then the new one's parent is the supervisor.

use std::{
    env,
    ffi::{OsStr, OsString},
    future::pending,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
};

use rustix::{
    pipe::{PipeFlags, pipe_with},
    process::{Pid, Signal, getpid, kill_process},
};
use tokio::{io::AsyncReadExt, net::unix::pipe, process::Command};

use crate::{docker, privileges, supervisor::Supervisor, takeover::succession};

/// The first word of the process in between. Its other words are the program and what the program is given.
const WORD: &str = "start-successor";
/// This program, also if its file was replaced.
const SELF: &str = "/proc/self/exe";

/// Why no new process is started.
#[derive(Debug, thiserror::Error)]
pub enum NoSuccessor {
    #[error("one is about to take over already")]
    Already,
    #[error(
        "this is the main process of a container, which ends with it: start a second container with --takeover instead"
    )]
    Container,
    #[error(
        "no supervisor can be told of the new process (NOTIFY_SOCKET is not set): start a second embassy with --takeover instead"
    )]
    Unsupervised,
    #[error("cannot start {program}: {error}")]
    Start { program: PathBuf, error: io::Error },
}

/// The program, and the process that was started of it.
#[derive(Debug)]
pub struct Successor {
    program: PathBuf,
    words: Vec<OsString>,
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    process: u32,
    /// Nothing more comes from it: its end is that of the process.
    life: pipe::Receiver,
}

impl Successor {
    /// `program`: the name that this process was started by; `words`: its arguments. To be called before its file can be replaced.
    pub fn new(program: Option<OsString>, words: impl IntoIterator<Item = OsString>) -> Self {
        // What was typed, because a link may lead to another file by then.
        let typed = program.map(PathBuf::from).filter(|path| path.is_absolute());
        let program = typed.or_else(|| env::current_exe().ok()).unwrap_or_default();
        // The last of two wins.
        let words = words.into_iter().chain(["--takeover".into()]).collect();
        Self { program, words, running: None }
    }

    /// Starts it. The supervisor must be told if it ends without having taken over.
    pub async fn start(&mut self, supervisor: &Supervisor) -> Result<(), NoSuccessor> {
        if self.running.is_some() {
            return Err(NoSuccessor::Already);
        }
        if is_main_of_container() {
            return Err(NoSuccessor::Container);
        }
        if !supervisor.listens() {
            return Err(NoSuccessor::Unsupervised);
        }
        let failed = |error| NoSuccessor::Start { program: self.program.clone(), error };
        self.running = Some(self.run().await.map_err(failed)?);
        Ok(())
    }

    async fn run(&self) -> io::Result<Running> {
        let (ours, theirs): (OwnedFd, OwnedFd) = pipe_with(PipeFlags::CLOEXEC)?;
        let mut life = pipe::Receiver::from_owned_fd(ours)?;
        let mut command = Command::new(SELF);
        command.arg(WORD).arg(&self.program).args(&self.words);
        // Both processes have it, and nobody else.
        command.stdin(theirs);
        // The watchdog's process is this one. The supervisor is the same.
        command.env_remove("WATCHDOG_PID");
        let mut between = privileges::hand_down(|| command.spawn())?;
        drop(command);
        let ended = between.wait().await?;
        if !ended.success() {
            return Err(io::Error::other(format!("{ended}; the lines before this one say why")));
        }
        // It has written the number of the new process.
        Ok(Running { process: life.read_u32().await?, life })
    }

    /// The program's file.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Whether it is this process.
    pub fn is(&self, process: Option<u32>) -> bool {
        let own = self.running.as_ref().map(|running| running.process);
        own.is_some() && own == process
    }

    /// Waits until it has ended. Cancel-safe.
    pub async fn ended(&mut self) {
        match &mut self.running {
            // Nothing more is written: this returns at the end.
            Some(running) => drop(running.life.read(&mut [0]).await),
            None => pending().await,
        }
        self.running = None;
    }

    /// Ends it, if it has not taken over: else it would start as usual once this process has stopped.
    pub fn end(&mut self) {
        let process = self.running.take().and_then(|one| Pid::from_raw(one.process.cast_signed()));
        if let Some(process) = process {
            // It may have ended just now.
            let _ = kill_process(process, Signal::TERM);
        }
    }
}

/// Whether a container ends with this process. In the host's process namespace (`--pid=host`) it is not process 1: that has the host's
/// root. Where systemd runs in the container, embassy has the root of that.
fn is_main_of_container() -> bool {
    let is_apart = || succession::is_apart_from_init() == Some(true);
    getpid().is_init() || (docker::obstacle::is_in_container() && is_apart())
}

/// The process in between: starts the new one, and says which it is. `None`: this process is another.
pub fn start_for_another(words: &[OsString]) -> Option<ExitCode> {
    let (word, rest) = words.split_first()?;
    let (program, words) = rest.split_first().filter(|_| word == WORD)?;
    Some(match launch(program, words).and_then(say) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(program, &error);
            ExitCode::FAILURE
        }
    })
}

/// Starts a program that lives on. Its number.
fn launch(program: &OsStr, words: &[OsString]) -> io::Result<u32> {
    let mut command = std::process::Command::new(program);
    // What it has as its input shows the one before that it lives.
    command.args(words).stdin(Stdio::inherit());
    let started = match has_file_capabilities(Path::new(SELF)) {
        // Otherwise every user who may run this file could give them to any program. The new program's file has its own.
        true => command.spawn(),
        false => privileges::hand_down(|| command.spawn()),
    };
    Ok(started?.id())
}

/// Whether a user who runs the file gets its capabilities (man 7 capabilities).
fn has_file_capabilities(file: &Path) -> bool {
    // Its value takes 24 bytes at most.
    let mut value = [0; 64];
    rustix::fs::getxattr(file, "security.capability", &mut value).is_ok()
}

/// Writes the number where the one before reads it: to what this process has as its input.
fn say(process: u32) -> io::Result<()> {
    rustix::io::write(io::stdin(), &process.to_be_bytes())?;
    Ok(())
}

/// This process has no log of its own.
fn complain(program: &OsStr, error: &io::Error) {
    use std::io::Write;
    let _ =
        writeln!(io::stderr(), "embassy: cannot start {}: {error}", Path::new(program).display());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supervised() -> Supervisor {
        Supervisor::of(&|name| (name == "NOTIFY_SOCKET").then(|| "@nobody".to_owned()))
    }

    #[tokio::test]
    async fn without_a_supervisor_none_is_started() {
        let mut one = Successor::new(Some("/bin/true".into()), []);
        assert!(matches!(one.start(&Supervisor::default()).await, Err(NoSuccessor::Unsupervised)));
        assert!(!one.is(None) && !one.is(Some(1)));
        assert_eq!(one.program(), Path::new("/bin/true"));
        // One that was typed without a folder is the one that runs.
        let own = Successor::new(Some("embassy".into()), []);
        assert_eq!(own.program(), env::current_exe().unwrap());
        assert_eq!(own.words, ["--takeover"]);
    }

    /// Here the process in between is this test's program, which does not know the word.
    #[tokio::test]
    async fn one_that_cannot_be_started_is_an_error() {
        let mut one = Successor::new(Some("/no/such/program".into()), []);
        let error = one.start(&supervised()).await.unwrap_err().to_string();
        assert!(error.starts_with("cannot start /no/such/program: exit status"), "{error}");
        assert!(one.running.is_none());
    }

    #[tokio::test]
    async fn its_end_is_noticed_and_only_one_runs() {
        let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let mut one = Successor::new(Some("/bin/true".into()), []);
        let life = pipe::Receiver::from_owned_fd(ours).unwrap();
        one.running = Some(Running { process: 7, life });
        assert!(one.is(Some(7)) && !one.is(Some(8)) && !one.is(None));
        assert!(matches!(one.start(&supervised()).await, Err(NoSuccessor::Already)));
        let soon = std::time::Duration::from_millis(50);
        assert!(tokio::time::timeout(soon, one.ended()).await.is_err());
        drop(theirs);
        tokio::time::timeout(std::time::Duration::from_secs(60), one.ended()).await.unwrap();
        assert!(!one.is(Some(7)));
    }

    #[test]
    fn a_program_that_gives_its_users_capabilities_is_known() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(!has_file_capabilities(file.path()));
        assert!(!has_file_capabilities(Path::new("/no/such/file")));
        // CAP_NET_ADMIN, permitted (linux/capability.h: VFS_CAP_REVISION_2).
        let mut value = [0; 20];
        (value[3], value[5]) = (2, 1 << 4);
        let name = "security.capability";
        let set = rustix::fs::setxattr(file.path(), name, &value, rustix::fs::XattrFlags::empty());
        // Not everybody may, and not everywhere.
        assert_eq!(has_file_capabilities(file.path()), set.is_ok());
    }

    #[test]
    fn only_its_own_word_makes_a_process_one_in_between() {
        let words = |all: &[&str]| all.iter().map(OsString::from).collect::<Vec<_>>();
        for other in [&[][..], &["--dnat"], &["status"], &[WORD]] {
            assert!(start_for_another(&words(other)).is_none(), "{other:?}");
        }
        assert!(launch(OsStr::new("/no/such/program"), &[]).is_err());
        assert!(launch(OsStr::new("/bin/true"), &[]).unwrap() > 1);
    }
}
