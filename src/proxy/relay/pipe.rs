//! Pipes for `splice`: made once, kept, and lent to a direction only while it moves bulk.

use std::{io, os::fd::OwnedFd};

use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};

/// Pipes of all workers together. They take 64 descriptors of those that `limits` keeps back, and half of a user's
/// default share of 16,384 pages: 256 each.
pub(in crate::proxy) const PIPES: usize = 32;

/// A pipe that is empty whenever it lies in the pool.
#[derive(Debug)]
pub(super) struct Pipe {
    pub read: OwnedFd,
    pub write: OwnedFd,
}

impl Pipe {
    /// Bytes that one call may move. The most that the kernel allows by default (man 7 pipe, pipe-max-size), and worth
    /// it: with a quarter of this, a gigabyte takes a third more of the processor's time.
    pub(super) const SIZE: usize = 1024 * 1024;

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
#[derive(Debug)]
pub(super) struct Pipes {
    pub(super) idle: Vec<Pipe>,
    pub(super) made: usize,
    most: usize,
}

impl Pipes {
    pub(super) fn new(most: usize) -> Self {
        Self { idle: Vec::new(), made: 0, most }
    }

    /// A pipe, or `None` if no good one can be had: then the bytes are copied.
    pub(super) fn take(&mut self) -> Option<Pipe> {
        if let Some(pipe) = self.idle.pop() {
            return Some(pipe);
        }
        if self.made >= self.most {
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
