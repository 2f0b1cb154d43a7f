//! Servers on loopback, outside of the testbed's hosts.

use std::{
    fs,
    net::{Ipv4Addr, TcpListener},
    path::Path,
    process::{Child, Command, Stdio},
};

use rustix::process::{Pid, Signal, kill_process};

/// A server's process. Killed on drop.
pub(crate) struct Process(Child);

impl Process {
    /// Starts it, with its output in the file `log`.
    pub(crate) fn start(command: &mut Command, log: &Path) -> Self {
        let file = fs::File::options().create(true).append(true).open(log).expect("a log file");
        let stderr = file.try_clone().expect("a second handle of the log file");
        let child = command.stdin(Stdio::null()).stdout(file).stderr(stderr).spawn();
        Self(child.unwrap_or_else(|e| panic!("{command:?} cannot be started: {e}")))
    }

    pub(crate) fn id(&self) -> u32 {
        self.0.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).expect("a process of ours takes a signal");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Ports on which no program listens now.
pub(crate) fn free_ports<const N: usize>() -> [u16; N] {
    let listeners = [(); N]
        .map(|()| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port on loopback"));
    listeners.map(|listener| listener.local_addr().expect("a bound socket has an address").port())
}
