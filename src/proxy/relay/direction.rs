//! One way of a connection.
//!
//! While idle it owns nothing. It waits for readiness first, then reads into the worker's one buffer. A message is sent from
//! there together with those of other connections; more than a message is sent at once; only what the other side cannot take
//! yet is kept. Bulk moves through a pipe by `splice`, without a copy. Where the end comes right behind the last bytes, it
//! goes out in one packet with them.

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
    /// Bytes that may be moved before the neighbours get their turn.
    turn: u32,
    /// `from` has no more to say.
    finished_reading: bool,
    /// The end was passed on to `to`.
    told: bool,
    /// Whether bytes may wait: the last ones in the kernel for the end to go with them, others for those of others.
    may_wait: bool,
}

const SPLICE: SpliceFlags = SpliceFlags::NONBLOCK.union(SpliceFlags::MOVE);

/// What was read and could not be written yet.
enum Unwritten {
    Nothing,
    /// It is counted as moved already, and mostly is by the time that anybody asks.
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
    /// A read of this many bytes is a large one. Below it, a copy costs less than the two calls of a splice.
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

    /// Tells `to` that `from` has finished, once all was passed on.
    pub(super) fn tell_end(&mut self) -> Result<(), Broken> {
        if !self.told {
            let told = shutdown(self.to.socket, Shutdown::Write);
            told.map_err(|error| self.to.broke(error.into()))?;
            self.told = true;
        }
        Ok(())
    }

    /// Whether the end of what `from` sends was read.
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

    /// After `from` broke: passes on what it had sent before, as far as `to` takes it now. The answer of a server that answers
    /// early and closes still arrives.
    pub(super) async fn last_words(&mut self) {
        // No end follows but a reset, which discards what waits.
        self.may_wait = false;
        self.buffers.send_now();
        loop {
            // The error may be seen before tokio is notified of the bytes ahead of it.
            yield_now().await;
            let before = self.moved.get();
            let end = poll_fn(|cx| Poll::Ready(self.poll_move(cx))).await;
            if end.is_ready() || self.moved.get() == before {
                return;
            }
        }
    }

    /// Moves what can be moved. Ready when `from` has finished and all of it was written: then the caller must pass the
    /// end on to `to` at once, by [`Direction::tell_end`] or by closing its socket.
    pub(super) fn poll_move(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        let start = self.moved.get();
        self.turn = Turns::SHORT;
        if self.is_bulk() {
            self.turn = self.buffers.turns.next();
            // Messages do not wait for bulk that is ready, too.
            self.buffers.send_now();
        }
        loop {
            // It may have become less: what could not be sent is counted again.
            if self.moved.get().saturating_sub(start) >= u64::from(self.turn) {
                // Unlike a plain wake, this comes back only after the sockets of all others were looked at.
                ready!(pin!(yield_now()).poll(cx));
            }
            if !matches!(self.unwritten, Unwritten::Nothing) {
                ready!(self.poll_write_unwritten(cx))?;
                // That may have been a whole turn.
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
                // What comes next is waited for, and not that it is sent: if it cannot be, that wakes this task.
                let ready = ready!(self.from.socket.poll_read_ready(cx));
                ready.map_err(|error| self.from.broke(error))?;
            }
        }
    }

    fn is_bulk(&self) -> bool {
        self.reads == Reads::Bulk
    }

    /// Reads into the worker's buffer and queues a message; of anything else it writes what can be written, and keeps the
    /// rest.
    fn copy(&mut self, cx: &Context<'_>) -> Result<(), Broken> {
        let mut batch = self.buffers.batch.borrow_mut();
        let buffer = batch.room(self.turn as usize);
        let (from, size) = (self.from.socket, buffer.len());
        // Asked before the read: all that was sent is here then, and right behind it comes the end, or an error.
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
                // The kernel reports the error once. Bytes ahead of it go first.
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

    /// Moves from the socket into `pipe`, which is kept while anything is in it.
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

    /// Writes of what was read as much as one turn may. Ready when nothing is, or more may be written.
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
                // The readiness was cleared: the next round waits for it.
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
            // Its socket is closed next.
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

    /// Writes `most` bytes of it, if the socket takes so many.
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

/// Reads or writes, if tokio believes that the socket is ready. With less than `whole` moved it is not any more: said
/// at once, it costs no further call to find that out.
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
