//! Pipes for `splice`. They are created once, pooled, and used by a direction only while it moves bulk.

use std::{io, os::fd::OwnedFd};

use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};

/// Number of pipes of all workers together. They need 64 of the descriptors that `limits` reserves, and half of a user's default
/// limit of 16,384 pipe pages, at 256 pages each.
pub(in crate::proxy) const PIPES: usize = 32;

/// A pipe. It is empty while it is in the pool.
#[derive(Debug)]
pub(super) struct Pipe {
    pub read: OwnedFd,
    pub write: OwnedFd,
}

impl Pipe {
    /// Maximum number of bytes of one call: the kernel's default maximum (man 7 pipe, pipe-max-size). With a quarter of it, a
    /// gigabyte needs a third more CPU time.
    pub(super) const SIZE: usize = 1024 * 1024;

    fn new() -> io::Result<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        // Beyond a user's limit of pipe memory (man 7 pipe, pipe-user-pages-soft) the kernel refuses to grow a pipe, and new
        // pipes have one or two pages. Such a pipe moves less per call than a plain copy.
        if fcntl_setpipe_size(&write, Self::SIZE)? < Self::SIZE {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        Ok(Self { read, write })
    }

    /// Takes out the `count` bytes that are in it.
    pub(super) fn drain(&self, count: usize) -> Vec<u8> {
        let mut content = vec![0; count];
        let mut read = 0;
        while let Some(rest) = content.get_mut(read..).filter(|rest| !rest.is_empty()) {
            match rustix::io::read(&self.read, rest) {
                Err(rustix::io::Errno::INTR) => {}
                Ok(0) | Err(_) => break,
                Ok(more) => read += more,
            }
        }
        content.truncate(read);
        content
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

    /// A pipe, or `None` if no large one is available; then the bytes are copied.
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

    /// Returns an empty pipe to the pool.
    pub(super) fn give_back(&mut self, pipe: Pipe) {
        self.idle.push(pipe);
    }

    /// Drops a pipe that still contained bytes when its connection ended.
    pub(super) fn lost(&mut self) {
        self.made -= 1;
    }
}
