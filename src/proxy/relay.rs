//! Bytes both ways, until both sides are done: half-close is passed on as half-close, a reset as a reset.
//!
//! An idle direction owns nothing. It waits for readiness first, then reads into the worker's one buffer and writes at
//! once; only what the other side cannot take yet is kept. Bulk moves through a pipe by `splice`, without a copy.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use rustix::pipe::{SpliceFlags, splice};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
};

use super::pipe::{Pipe, Pipes};

/// What every relay of a worker shares.
#[derive(Debug)]
pub(super) struct RelayBuffers {
    buffer: RefCell<Box<[u8]>>,
    pipes: RefCell<Pipes>,
    splice: bool,
}

impl RelayBuffers {
    /// Large enough that a bulk stream needs few calls, small enough to stay in a core's second-level cache.
    const SIZE: usize = 256 * 1024;

    pub(super) fn new(splice: bool) -> Self {
        Self { buffer: RefCell::new(vec![0; Self::SIZE].into()), pipes: RefCell::default(), splice }
    }
}

/// Bytes passed on so far, each way.
#[derive(Debug, Default)]
pub(super) struct Moved {
    pub up: Cell<u64>,
    pub down: Cell<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Consumer,
    Endpoint,
}

/// One side failed: it reset, or keepalive found nobody there.
#[derive(Debug)]
pub(super) struct Broken {
    pub side: Side,
    pub error: io::Error,
}

/// Relays until both sides have finished.
pub(super) async fn relay(
    consumer: &mut TcpStream,
    endpoint: &mut TcpStream,
    buffers: &RelayBuffers,
    moved: &Moved,
) -> Result<(), Broken> {
    let (from_consumer, to_consumer) = consumer.split();
    let (from_endpoint, to_endpoint) = endpoint.split();
    let mut up = Direction::new(
        Side::Consumer,
        from_consumer,
        Side::Endpoint,
        to_endpoint,
        &moved.up,
        buffers,
    );
    let mut down = Direction::new(
        Side::Endpoint,
        from_endpoint,
        Side::Consumer,
        to_consumer,
        &moved.down,
        buffers,
    );

    let up_is_done = poll_fn(|cx| {
        if up.poll(cx)?.is_ready() {
            return Poll::Ready(Ok(true));
        }
        if down.poll(cx)?.is_ready() {
            return Poll::Ready(Ok(false));
        }
        Poll::Pending
    })
    .await?;
    let (done, rest) = if up_is_done { (up, &mut down) } else { (down, &mut up) };
    // Nobody reads from the side that finished, so its reset would go unseen, and the other side wait for ever.
    tokio::select! {
        biased;
        end = poll_fn(|cx| rest.poll(cx)) => end,
        error = reset(&done.from) => Err(Broken { side: done.from_side, error }),
    }
}

/// Waits until the socket has an error, as a reset leaves one.
async fn reset(socket: &ReadHalf<'_>) -> io::Error {
    if let Err(error) = socket.ready(Interest::ERROR).await {
        return error;
    }
    match socket.as_ref().take_error() {
        Ok(Some(error)) | Err(error) => error,
        // Asking for an error clears it: a writer to this socket was first.
        Ok(None) => io::ErrorKind::ConnectionReset.into(),
    }
}

/// One way of a connection.
struct Direction<'a> {
    from_side: Side,
    from: ReadHalf<'a>,
    to_side: Side,
    to: WriteHalf<'a>,
    moved: &'a Cell<u64>,
    buffers: &'a RelayBuffers,
    held: Held,
    /// Large reads in a row: two of them, and it is bulk.
    large_reads: u8,
    finished_reading: bool,
}

/// What was read and could not be written yet.
enum Held {
    Nothing,
    Bytes { bytes: Box<[u8]>, written: usize },
    Piped { pipe: Pipe, bytes: usize },
}

impl<'a> Direction<'a> {
    /// A read of this many bytes is a large one. Below it, a copy costs less than the two calls of a splice.
    const LARGE: usize = 16 * 1024;
    /// After this many bytes the neighbours get their turn.
    const TURN: u64 = 1024 * 1024;

    fn new(
        from_side: Side,
        from: ReadHalf<'a>,
        to_side: Side,
        to: WriteHalf<'a>,
        moved: &'a Cell<u64>,
        buffers: &'a RelayBuffers,
    ) -> Self {
        Self {
            from_side,
            from,
            to_side,
            to,
            moved,
            buffers,
            held: Held::Nothing,
            large_reads: 0,
            finished_reading: false,
        }
    }

    /// Moves what can be moved. Ready when `from` has finished and `to` has been told so.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        let start = self.moved.get();
        loop {
            ready!(self.poll_write_held(cx))?;
            if self.finished_reading {
                return Pin::new(&mut self.to)
                    .poll_shutdown(cx)
                    .map_err(|error| self.at_writer(error));
            }
            if self.moved.get() - start >= Self::TURN {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let bulk = self.buffers.splice && self.large_reads >= 2;
            if bulk {
                // Only with something to move is a pipe taken.
                ready!(self.from.as_ref().poll_read_ready(cx))
                    .map_err(|error| self.at_reader(error))?;
            }
            match bulk.then(|| self.buffers.pipes.borrow_mut().take()).flatten() {
                Some(pipe) => self.fill(pipe)?,
                None => ready!(self.poll_copy(cx))?,
            }
        }
    }

    /// Reads into the worker's buffer and writes what can be written; the rest is held.
    fn poll_copy(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        let mut buffer = self.buffers.buffer.borrow_mut();
        let mut read = ReadBuf::new(&mut buffer);
        // A short read tells tokio that the socket is drained: no second call finds that out.
        ready!(Pin::new(&mut self.from).poll_read(cx, &mut read))
            .map_err(|error| self.at_reader(error))?;
        let bytes = read.filled();
        if bytes.is_empty() {
            self.finished_reading = true;
            return Poll::Ready(Ok(()));
        }
        self.large_reads =
            if bytes.len() >= Self::LARGE { self.large_reads.saturating_add(1) } else { 0 };
        let written = match Pin::new(&mut self.to).poll_write(cx, bytes) {
            Poll::Ready(Ok(written)) => written,
            Poll::Ready(Err(error)) => return Poll::Ready(Err(self.at_writer(error))),
            Poll::Pending => 0,
        };
        self.moved.set(self.moved.get() + written as u64);
        if let Some(rest) = bytes.get(written..).filter(|rest| !rest.is_empty()) {
            self.held = Held::Bytes { bytes: rest.into(), written: 0 };
        }
        Poll::Ready(Ok(()))
    }

    /// Moves from the socket into `pipe`, which is held while anything is in it.
    fn fill(&mut self, pipe: Pipe) -> Result<(), Broken> {
        let from = self.from.as_ref();
        let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
        let filled = from.try_io(Interest::READABLE, || {
            Ok(splice(from, None, &pipe.write, None, Pipe::SIZE, flags)?)
        });
        match filled {
            Ok(bytes) if bytes > 0 => {
                if bytes < Self::LARGE {
                    self.large_reads = 0;
                }
                self.held = Held::Piped { pipe, bytes };
                return Ok(());
            }
            Ok(_) => self.finished_reading = true,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                self.buffers.pipes.borrow_mut().give_back(pipe);
                return Err(self.at_reader(error));
            }
        }
        self.buffers.pipes.borrow_mut().give_back(pipe);
        Ok(())
    }

    /// Writes what is held. Ready when nothing is.
    fn poll_write_held(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        loop {
            let moved = match &mut self.held {
                Held::Nothing => return Poll::Ready(Ok(())),
                Held::Bytes { bytes, written } => {
                    let Some(rest) = bytes.get(*written..).filter(|rest| !rest.is_empty()) else {
                        self.held = Held::Nothing;
                        continue;
                    };
                    let moved = ready!(Pin::new(&mut self.to).poll_write(cx, rest));
                    moved.inspect(|moved| *written += moved)
                }
                Held::Piped { bytes: 0, .. } => {
                    if let Held::Piped { pipe, .. } =
                        std::mem::replace(&mut self.held, Held::Nothing)
                    {
                        self.buffers.pipes.borrow_mut().give_back(pipe);
                    }
                    continue;
                }
                Held::Piped { pipe, bytes } => {
                    let to = self.to.as_ref();
                    let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
                    let moved = match ready!(to.poll_write_ready(cx)) {
                        Ok(()) => to.try_io(Interest::WRITABLE, || {
                            Ok(splice(&pipe.read, None, to, None, *bytes, flags)?)
                        }),
                        Err(error) => Err(error),
                    };
                    moved.inspect(|moved| *bytes = bytes.saturating_sub(*moved))
                }
            };
            match moved {
                Ok(0) => return Poll::Ready(Err(self.at_writer(io::ErrorKind::WriteZero.into()))),
                Ok(moved) => self.moved.set(self.moved.get() + moved as u64),
                // The readiness was cleared: the next round waits for it.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(self.at_writer(error))),
            }
        }
    }

    fn at_reader(&self, error: io::Error) -> Broken {
        Broken { side: self.from_side, error }
    }

    fn at_writer(&self, error: io::Error) -> Broken {
        Broken { side: self.to_side, error }
    }
}

impl Drop for Direction<'_> {
    fn drop(&mut self) {
        match std::mem::replace(&mut self.held, Held::Nothing) {
            Held::Piped { pipe, bytes: 0 } => self.buffers.pipes.borrow_mut().give_back(pipe),
            Held::Piped { .. } => self.buffers.pipes.borrow_mut().lost(),
            Held::Nothing | Held::Bytes { .. } => {}
        }
    }
}
