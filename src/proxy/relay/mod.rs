//! Bytes both ways, until both sides are done: half-close is passed on as half-close, a reset as a reset.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    io,
    task::{Context, Poll, Waker},
};

use futures_util::FutureExt;
use rustix::io::Errno;
use tokio::{io::Interest, net::TcpStream, sync::Notify};

use batch::{Batch, Ring};
use direction::{Direction, End};
pub(super) use pipe::PIPES;
use pipe::Pipes;
use turns::Turns;

mod batch;
mod direction;
mod pipe;
mod turns;
#[cfg(test)]
mod tests;

/// What every relay of a worker shares.
#[derive(Debug)]
pub(super) struct RelayBuffers {
    batch: RefCell<Batch>,
    /// Rung when a message is queued.
    queued: Notify,
    pipes: RefCell<Pipes>,
    turns: Turns,
}

impl RelayBuffers {
    /// With up to so many pipes to splice bulk through; without any, all is copied. In the thread that will use it.
    pub(super) fn new(pipes: usize) -> Self {
        let ring = Ring::new().inspect_err(
            |error| tracing::debug!(%error, "no io_uring: messages are sent one by one"),
        );
        Self::with(pipes, ring.ok())
    }

    fn with(pipes: usize, ring: Option<Ring>) -> Self {
        Self {
            batch: RefCell::new(Batch::new(ring)),
            queued: Notify::new(),
            pipes: RefCell::new(Pipes::new(pipes)),
            turns: Turns::default(),
        }
    }

    /// Sends what the relays queue, for ever: each time when all that were ready have had their turn.
    pub(super) async fn send_queued(&self) {
        loop {
            // Whoever is rung is put behind those that are ready by now.
            self.queued.notified().await;
            self.send_now();
        }
    }

    fn send_now(&self) {
        let mut batch = self.batch.borrow_mut();
        if !batch.is_empty() {
            batch.send();
        }
    }

    /// Something other than bulk is going on, which bulk must not hold up.
    pub(super) fn others_are_busy(&self) {
        self.turns.shorten();
    }
}

/// Bytes passed on so far, each way.
#[derive(Debug, Clone, Default)]
pub(super) struct Moved {
    pub up: Cell<u64>,
    pub down: Cell<u64>,
}

impl Moved {
    /// Whoever compares two of these sees whether anything moved between.
    pub(super) fn both(&self) -> u64 {
        self.up.get().wrapping_add(self.down.get())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Consumer,
    Endpoint,
}

/// How a relay came to an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// Both sides have finished, and the sockets are to be closed.
    Finished,
    /// It was asked to leave, and nothing is under way: neither side has finished, and all that was read is written.
    Idle,
}

/// Asks a relay to leave its sockets alone.
#[derive(Debug, Default)]
pub(super) struct Leave {
    asked: Cell<bool>,
    task: RefCell<Option<Waker>>,
}

/// Nobody is asked by a copy.
impl Clone for Leave {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl Leave {
    /// Nothing where no relay runs, or where it is busy when it hears of this.
    pub(super) fn ask(&self) {
        if let Some(task) = self.task.take() {
            self.asked.set(true);
            task.wake();
        }
    }

    /// Remembers whom to wake, until it was asked: a task that has left must not be kept by its waker.
    fn is_asked(&self, cx: &Context<'_>) -> bool {
        if self.asked.take() {
            return true;
        }
        self.task.borrow_mut().get_or_insert_with(|| cx.waker().clone());
        false
    }
}

/// One side failed: it reset, or keepalive found nobody there.
#[derive(Debug)]
pub(super) struct Broken {
    pub side: Side,
    pub error: io::Error,
}

/// Relays until both sides have finished, or one broke, or nothing moves and it is asked to leave.
pub(super) async fn relay(
    consumer: &TcpStream,
    endpoint: &TcpStream,
    buffers: &RelayBuffers,
    moved: &Moved,
    leave: &Leave,
) -> Result<Ended, Broken> {
    let consumer = End { side: Side::Consumer, socket: consumer };
    let endpoint = End { side: Side::Endpoint, socket: endpoint };
    let mut up = Direction::new(consumer, endpoint, &moved.up, buffers);
    let mut down = Direction::new(endpoint, consumer, &moved.down, buffers);
    let end = tokio::select! {
        biased;
        end = poll_fn(|cx| {
            match (up.poll_move(cx)?.is_ready(), down.poll_move(cx)?.is_ready()) {
                // Closing the sockets is how both are told.
                (true, true) => return Poll::Ready(Ok(Ended::Finished)),
                (true, false) => up.tell_end()?,
                (false, true) => down.tell_end()?,
                (false, false) => {}
            }
            if leave.is_asked(cx) && up.is_idle() && down.is_idle() {
                Poll::Ready(Ok(Ended::Idle))
            } else {
                Poll::Pending
            }
        }) => end,
        // A direction that waits to write does not read, nor does one that has finished: the reset of the side it reads
        // from would go unseen, and the other side wait for ever.
        broken = broken(consumer) => Err(broken),
        broken = broken(endpoint) => Err(broken),
    };
    match &end {
        Ok(_) => {}
        Err(Broken { side: Side::Consumer, .. }) => up.last_words().await,
        Err(Broken { side: Side::Endpoint, .. }) => down.last_words().await,
    }
    end
}

/// Whether the other side has sent all that it will send, or is gone.
pub(super) fn has_finished(stream: &TcpStream) -> bool {
    let ready = stream.ready(Interest::READABLE).now_or_never();
    ready.is_some_and(|ready| ready.is_ok_and(|ready| ready.is_read_closed()))
}

/// Waits until a socket has an error, as a reset leaves one.
async fn broken(end: End<'_>) -> Broken {
    let error = match end.socket.ready(Interest::ERROR).await {
        Ok(_) => match end.socket.take_error() {
            Ok(Some(error)) | Err(error) => error,
            Ok(None) => Errno::CONNRESET.into(),
        },
        Err(error) => error,
    };
    Broken { side: end.side, error }
}
