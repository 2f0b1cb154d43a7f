//! One direction of a connection.
//!
//! An idle direction owns no buffer. It waits until its socket is readable, then reads into the worker's one buffer. From there a
//! message is sent together with those of other connections, and larger data is sent at once. Only what the other side cannot take
//! yet is kept. Bulk moves through a pipe with `splice`, without a copy. If the end follows directly after the last bytes, both are
//! sent in one packet.

use std::{
    cell::Cell,
    future::poll_fn,
    io,
    os::fd::AsFd,
    pin::pin,
    task::{Context, Poll, ready},
};

use rustix::{
    io::Errno,
    net::{SendFlags, Shutdown, send, shutdown},
    pipe::{SpliceFlags, splice},
};
use tokio::{io::Interest, net::TcpStream, task::yield_now};

use super::{
    batch::Unsent,
    buffers::RelayBuffers,
    end::{Broken, End, ends_in_alert, has_finished},
    pipe::Pipe,
    turns::Turns,
};

pub(super) struct Direction<'a> {
    from: End<'a>,
    to: End<'a>,
    moved: &'a Cell<u64>,
    buffers: &'a RelayBuffers,
    unwritten: Unwritten,
    reads: Reads,
    /// Bytes that may be moved before other connections get their turn.
    turn: u32,
    /// `from` has sent its end.
    finished_reading: bool,
    /// The end was passed on to `to`.
    told: bool,
    /// Whether bytes may be delayed: the last ones, to be sent together with the end, and messages, to be sent with those of others.
    may_wait: bool,
}

const SPLICE: SpliceFlags = SpliceFlags::NONBLOCK.union(SpliceFlags::MOVE);

/// Bytes that were read and could not be written yet.
enum Unwritten {
    Nothing,
    /// A queued message. It already counts as moved.
    Queued(u64),
    Bytes {
        bytes: Box<[u8]>,
        written: usize,
    },
    Piped {
        pipe: Pipe,
        bytes: usize,
    },
}

/// A direction that stands still: what another one needs to go on with it, in this process or in the one that takes over.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::proxy) struct Suspended {
    /// Bytes that were read and not written yet.
    pub bytes: Vec<u8>,
    /// The end was read.
    pub finished: bool,
    /// The end was passed on.
    pub told: bool,
    /// The last bytes may be the goodbye of a program that speaks TLS.
    pub goodbye: bool,
}

/// What was read last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reads {
    Small,
    /// It ended as a program that speaks TLS ends what it sends.
    Goodbye,
    Large,
    /// Two large reads in a row, or more.
    Bulk,
}

impl<'a> Direction<'a> {
    /// Size from which a read is large, in bytes. Below it, a copy costs less than the two calls of a splice.
    const LARGE: usize = 16 * 1024;
    pub(super) fn new(
        from: End<'a>,
        to: End<'a>,
        moved: &'a Cell<u64>,
        buffers: &'a RelayBuffers,
    ) -> Self {
        Self {
            from,
            to,
            moved,
            buffers,
            unwritten: Unwritten::Nothing,
            reads: Reads::Small,
            turn: Turns::SHORT,
            finished_reading: false,
            told: false,
            may_wait: true,
        }
    }

    /// Goes on where another direction was suspended.
    pub(super) fn resume(&mut self, suspended: Suspended) {
        let Suspended { bytes, finished, told, goodbye } = suspended;
        if !bytes.is_empty() {
            self.unwritten = Unwritten::Bytes { bytes: bytes.into(), written: 0 };
        }
        (self.finished_reading, self.told) = (finished, told);
        if goodbye {
            self.reads = Reads::Goodbye;
        }
    }

    /// Stands still. What was read and not written yet goes along; what was queued is sent before, as far as the other side takes it.
    pub(super) fn suspend(&mut self) -> Suspended {
        self.buffers.send_now();
        let bytes = match std::mem::replace(&mut self.unwritten, Unwritten::Nothing) {
            Unwritten::Nothing => Vec::new(),
            Unwritten::Queued(number) => {
                // That it could not be sent shows again when it is tried again.
                let unsent = self.buffers.batch.borrow_mut().take_unsent(number);
                let bytes = unsent.map(|unsent| unsent.bytes.into_vec()).unwrap_or_default();
                self.moved.set(self.moved.get().saturating_sub(bytes.len() as u64));
                bytes
            }
            Unwritten::Bytes { bytes, written } => bytes.get(written..).unwrap_or_default().into(),
            Unwritten::Piped { pipe, bytes } => {
                let content = pipe.drain(bytes);
                self.buffers.pipes.borrow_mut().give_back(pipe);
                content
            }
        };
        Suspended {
            bytes,
            finished: self.finished_reading,
            told: self.told,
            goodbye: self.has_said_goodbye(),
        }
    }

    /// Passes the end of `from` on to `to`, after all bytes.
    pub(super) fn tell_end(&mut self) -> Result<(), Broken> {
        if !self.told {
            let told = shutdown(self.to.socket, Shutdown::Write);
            told.map_err(|error| self.to.broke(error.into()))?;
            self.told = true;
        }
        Ok(())
    }

    /// Whether the end of `from` was read.
    pub(super) fn has_read_end(&self) -> bool {
        self.finished_reading
    }

    /// Whether the last that was read may be the goodbye of a program that speaks TLS.
    pub(super) fn has_said_goodbye(&self) -> bool {
        self.reads == Reads::Goodbye
    }

    /// Whether nothing is under way and both ends are open.
    pub(super) fn is_idle(&self) -> bool {
        let holds_nothing = match self.unwritten {
            Unwritten::Nothing => true,
            Unwritten::Queued(number) => self.buffers.batch.borrow().is_sent(number),
            Unwritten::Bytes { .. } | Unwritten::Piped { .. } => false,
        };
        holds_nothing && !self.finished_reading
    }

    /// After `from` broke: passes on what it had sent before, as far as `to` has room now. So the answer of a server that answers
    /// early and closes still arrives.
    pub(super) async fn last_words(&mut self) {
        // The next thing is a reset, which discards delayed bytes.
        self.may_wait = false;
        self.buffers.send_now();
        loop {
            // The error may be seen before tokio is notified of the bytes that precede it.
            yield_now().await;
            let before = self.moved.get();
            let end = poll_fn(|cx| Poll::Ready(self.poll_move(cx))).await;
            if end.is_ready() || self.moved.get() == before {
                return;
            }
        }
    }

    /// Moves what can be moved. Ready when `from` has finished and everything is written. Then the caller must immediately pass the
    /// end on to `to`, with [`Direction::tell_end`] or by closing its socket.
    pub(super) fn poll_move(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        let start = self.moved.get();
        self.turn = Turns::SHORT;
        if self.is_bulk() {
            self.turn = self.buffers.turns.next();
            // Messages must not wait for bulk that is ready too.
            self.buffers.send_now();
        }
        loop {
            // The count may have decreased: bytes that could not be sent are subtracted.
            if self.moved.get().saturating_sub(start) >= u64::from(self.turn) {
                // Unlike a plain wake, this resumes only after the runtime has polled all sockets.
                ready!(pin!(yield_now()).poll(cx));
            }
            if !matches!(self.unwritten, Unwritten::Nothing) {
                ready!(self.poll_write_unwritten(cx))?;
                // That may have used up the turn.
                continue;
            }
            if self.finished_reading {
                return Poll::Ready(Ok(()));
            }
            ready!(self.from.socket.poll_read_ready(cx)).map_err(|error| self.from.broke(error))?;
            let pipe = if self.is_bulk() { self.buffers.pipes.borrow_mut().take() } else { None };
            match pipe {
                Some(pipe) => self.fill(pipe)?,
                None => self.copy(cx)?,
            }
            if let Unwritten::Queued(_) = self.unwritten {
                // Wait for the next bytes, not for the sending: a failed send wakes this task.
                let ready = ready!(self.from.socket.poll_read_ready(cx));
                ready.map_err(|error| self.from.broke(error))?;
            }
        }
    }

    fn is_bulk(&self) -> bool {
        self.reads == Reads::Bulk
    }

    /// Reads into the worker's buffer. A message is queued; of larger data it writes what it can, and keeps the rest.
    fn copy(&mut self, cx: &Context<'_>) -> Result<(), Broken> {
        let mut batch = self.buffers.batch.borrow_mut();
        let buffer = batch.room(self.turn as usize);
        let (from, size) = (self.from.socket, buffer.len());
        // Checked before the read: then all that was sent has arrived, and the end or an error follows directly.
        let is_last = has_finished(from);
        let read =
            attempt(from, Interest::READABLE, size, || Ok(rustix::io::read(from, &mut *buffer)?));
        let mut count = match read {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(self.from.broke(error)),
        };
        if count == 0 {
            self.finished_reading = true;
            return Ok(());
        }
        let read = buffer.get(..count).unwrap_or_default();
        if count >= Self::LARGE {
            let is_second = matches!(self.reads, Reads::Large | Reads::Bulk);
            self.reads = if is_second { Reads::Bulk } else { Reads::Large };
        } else {
            self.reads = if ends_in_alert(read) { Reads::Goodbye } else { Reads::Small };
            self.buffers.turns.shorten();
            if self.may_wait && !is_last {
                if batch.is_empty() {
                    self.buffers.queued.notify_one();
                }
                self.unwritten =
                    Unwritten::Queued(batch.queue(self.to.socket.as_fd(), count, cx.waker()));
                self.moved.set(self.moved.get() + count as u64);
                return Ok(());
            }
        }
        let mut behind = Ok(());
        if let Some(rest) = buffer.get_mut(count..).filter(|rest| is_last && !rest.is_empty()) {
            match rustix::io::read(from, rest) {
                Ok(0) => self.finished_reading = true,
                Ok(more) => count += more,
                Err(Errno::AGAIN) => {}
                // The kernel reports an error once. The bytes that precede it go first.
                Err(error) => behind = Err(self.from.broke(error.into())),
            }
        }
        let more = if self.finished_reading && self.may_wait {
            SendFlags::MORE
        } else {
            SendFlags::empty()
        };
        let bytes = buffer.get(..count).unwrap_or_default();
        if ends_in_alert(bytes) {
            self.reads = Reads::Goodbye;
        }
        let written = match write(self.to.socket, bytes, more) {
            Ok(written) => written,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => return Err(self.to.broke(error)),
        };
        self.moved.set(self.moved.get() + written as u64);
        if let Some(rest) = bytes.get(written..).filter(|rest| !rest.is_empty()) {
            self.unwritten = Unwritten::Bytes { bytes: rest.into(), written: 0 };
        }
        behind
    }

    /// Moves bytes from the socket into `pipe`, which is kept until it is empty.
    fn fill(&mut self, pipe: Pipe) -> Result<(), Broken> {
        let from = self.from.socket;
        let filled = from.try_io(Interest::READABLE, || {
            Ok(splice(from, None, &pipe.write, None, Pipe::SIZE.min(self.turn as usize), SPLICE)?)
        });
        if let Ok(bytes @ 1..) = filled {
            if bytes < Self::LARGE {
                self.reads = Reads::Small;
            }
            self.unwritten = Unwritten::Piped { pipe, bytes };
            return Ok(());
        }
        self.buffers.pipes.borrow_mut().give_back(pipe);
        match filled {
            Ok(_) => self.finished_reading = true,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(self.from.broke(error)),
        }
        Ok(())
    }

    /// Writes kept bytes, up to the limit of a turn. Ready when none are left, or more may be written.
    fn poll_write_unwritten(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        let to = self.to.socket;
        if let Unwritten::Queued(number) = self.unwritten {
            let mut batch = self.buffers.batch.borrow_mut();
            if batch.is_queued(number) {
                batch.awaits(number, cx.waker());
                return Poll::Pending;
            }
            self.unwritten = Unwritten::Nothing;
            if let Some(Unsent { bytes, error }) = batch.take_unsent(number) {
                self.moved.set(self.moved.get() - bytes.len() as u64);
                self.unwritten = Unwritten::Bytes { bytes, written: 0 };
                if let Some(error) = error {
                    return Poll::Ready(Err(self.to.broke(error)));
                }
            }
        }
        if self.unwritten.left() > 0 {
            ready!(to.poll_write_ready(cx)).map_err(|error| self.to.broke(error))?;
            match self.unwritten.write(to, self.turn as usize) {
                Ok(0) => return Poll::Ready(Err(self.to.broke(io::ErrorKind::WriteZero.into()))),
                Ok(moved) => self.moved.set(self.moved.get() + moved as u64),
                // The readiness is cleared; the next poll waits for it.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(self.to.broke(error))),
            }
        }
        if self.unwritten.left() > 0 {
            return Poll::Ready(Ok(()));
        }
        if let Unwritten::Piped { pipe, .. } =
            std::mem::replace(&mut self.unwritten, Unwritten::Nothing)
        {
            self.buffers.pipes.borrow_mut().give_back(pipe);
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for Direction<'_> {
    fn drop(&mut self) {
        match std::mem::replace(&mut self.unwritten, Unwritten::Nothing) {
            Unwritten::Piped { pipe, bytes: 0 } => self.buffers.pipes.borrow_mut().give_back(pipe),
            Unwritten::Piped { .. } => self.buffers.pipes.borrow_mut().lost(),
            // The socket is closed next.
            Unwritten::Queued(number) => {
                let unsent = self.buffers.batch.borrow_mut().forget(number);
                self.moved.set(self.moved.get() - unsent as u64);
            }
            Unwritten::Nothing | Unwritten::Bytes { .. } => {}
        }
    }
}

impl Unwritten {
    fn left(&self) -> usize {
        match self {
            Unwritten::Nothing | Unwritten::Queued(_) => 0,
            Unwritten::Bytes { bytes, written } => bytes.len() - written,
            Unwritten::Piped { bytes, .. } => *bytes,
        }
    }

    /// Writes up to `most` bytes of it.
    fn write(&mut self, to: &TcpStream, most: usize) -> io::Result<usize> {
        match self {
            Unwritten::Nothing | Unwritten::Queued(_) => Ok(0),
            Unwritten::Bytes { bytes, written } => {
                let rest = bytes.get(*written..).unwrap_or_default();
                write(to, rest.get(..most).unwrap_or(rest), SendFlags::empty())
                    .inspect(|moved| *written += moved)
            }
            Unwritten::Piped { pipe, bytes } => to
                .try_io(Interest::WRITABLE, || {
                    Ok(splice(&pipe.read, None, to, None, (*bytes).min(most), SPLICE)?)
                })
                .inspect(|moved| *bytes -= moved),
        }
    }
}

fn write(to: &TcpStream, bytes: &[u8], flags: SendFlags) -> io::Result<usize> {
    let flags = flags | SendFlags::NOSIGNAL;
    attempt(to, Interest::WRITABLE, bytes.len(), || Ok(send(to, bytes, flags)?))
}

/// Reads or writes if tokio considers the socket ready. If fewer than `whole` bytes moved, the socket is no longer ready; tokio is
/// told so at once, which saves the call that would find it out.
fn attempt(
    socket: &TcpStream,
    interest: Interest,
    whole: usize,
    operation: impl FnOnce() -> io::Result<usize>,
) -> io::Result<usize> {
    let mut moved = 0;
    let tried = socket.try_io(interest, || {
        moved = operation()?;
        if (1..whole).contains(&moved) { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
    });
    match tried {
        Err(_) if moved > 0 => Ok(moved),
        tried => tried.map(|()| moved),
    }
}
