//! A container's first process: the kernel tells of its end at once, and before its address can be given to another.
//! The engine's event comes later, and not at all from an engine that hangs.

use std::{fs, io, os::fd::OwnedFd, sync::Arc};

use rustix::{
    io::Errno,
    process::{Pid, PidfdFlags, pidfd_open},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::Notify,
};

use crate::model::{ContainerId, RunEnd};

/// The processes of one engine's containers.
#[derive(Debug, Default)]
pub(super) struct Processes {
    /// Whether one of them was ever seen. Then all of them can be: they are numbered alike.
    seen: bool,
}

impl Processes {
    /// Says so when the run ends whose process this is, whatever the engine does meanwhile.
    ///
    /// Nothing is ever said where processes cannot be seen: the engine is on another host, or this is another PID
    /// namespace. Then the engine's events have to do.
    pub(super) fn watch(&mut self, id: &ContainerId, pid: i32, end: &RunEnd, bell: Arc<Notify>) {
        match open(id, pid) {
            Ok(process) => {
                self.seen = true;
                let end = end.clone();
                tokio::spawn(async move {
                    // A pidfd is readable once its process has ended (man 2 pidfd_open).
                    if process.readable().await.is_ok() {
                        end.come();
                        bell.notify_one();
                    }
                });
            }
            // It ended after the engine had looked.
            Err(error) if self.seen && is_gone(&error) => {
                end.come();
                bell.notify_one();
            }
            Err(error) => tracing::debug!(%id, pid, %error, "cannot watch the container's process"),
        }
    }
}

fn open(id: &ContainerId, pid: i32) -> io::Result<AsyncFd<OwnedFd>> {
    let process = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
    let descriptor = pidfd_open(process, PidfdFlags::NONBLOCK)?;
    // Checked after it was opened: by now the number is held, whoever it belonged to when the engine answered.
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    if !cgroups.contains(id.as_str()) {
        return Err(io::ErrorKind::NotFound.into());
    }
    register(descriptor)
}

/// Whether there is no such process any more, or its number is another's.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || Errno::from_io_error(error) == Some(Errno::SRCH)
}

#[expect(
    unsafe_code,
    reason = "tokio cannot know that a type keeps its descriptor open and the same"
)]
fn register(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is one descriptor, and keeps it open, until it is dropped; AsyncFd drops it after it has been
    // taken from epoll.
    Ok(unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }?)
}
