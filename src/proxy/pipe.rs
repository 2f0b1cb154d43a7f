//! Pipes for `splice`: made once, kept, and lent to a direction only while it moves bulk.

use std::{io, os::fd::OwnedFd};

use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};

/// A pipe that is empty whenever it lies in the pool.
#[derive(Debug)]
pub(super) struct Pipe {
    pub read: OwnedFd,
    pub write: OwnedFd,
}

impl Pipe {
    /// Bytes that one call may move. Larger pipes do not move more per call: a socket's receive queue is about this.
    pub(super) const SIZE: usize = 256 * 1024;

    fn new() -> io::Result<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        // Past a user's share of pipe memory the kernel refuses to grow a pipe (man 7 pipe, pipe-user-pages-soft), and
        // makes new ones of a page or two. Such a pipe moves less per call than a plain copy.
        if fcntl_setpipe_size(&write, Self::SIZE)? < Self::SIZE {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        Ok(Self { read, write })
    }
}

/// A worker's pipes.
#[derive(Debug, Default)]
pub(super) struct Pipes {
    idle: Vec<Pipe>,
    made: usize,
}

impl Pipes {
    /// Of a user's default share of 16,384 pages, 64 pages a pipe, this leaves most to others.
    const MOST: usize = 64;

    /// A pipe, or `None` where no good one can be had: then the bytes are copied.
    pub(super) fn take(&mut self) -> Option<Pipe> {
        if let Some(pipe) = self.idle.pop() {
            return Some(pipe);
        }
        if self.made == Self::MOST {
            return None;
        }
        let pipe = Pipe::new()
            .inspect_err(|error| tracing::debug!(%error, "no pipe to splice through"))
            .ok()?;
        self.made += 1;
        Some(pipe)
    }

    /// Takes back a pipe that is empty.
    pub(super) fn give_back(&mut self, pipe: Pipe) {
        self.idle.push(pipe);
    }

    /// Forgets a pipe that still held bytes when its connection ended.
    pub(super) fn lost(&mut self) {
        self.made -= 1;
    }
}
