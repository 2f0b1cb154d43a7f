//! Bytes both ways, until both sides are done: half-close is passed on as half-close, a reset as a reset.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    task::{Context, Poll, Waker},
};

use socket2::SockRef;
use tokio::net::TcpStream;

mod batch;
mod buffers;
mod direction;
mod end;
mod pipe;
mod turns;
#[cfg(test)]
mod tests;

pub(super) use buffers::RelayBuffers;
use direction::Direction;
pub(super) use end::{Broken, Side};
use end::{End, broken, has_sent_end};
pub(super) use pipe::PIPES;

use super::socket::Patience;

/// Bytes passed on so far, each way.
#[derive(Debug, Clone, Default)]
pub(super) struct Moved {
    pub up: Cell<u64>,
    pub down: Cell<u64>,
}

impl Moved {
    /// Both ways together: two equal ones mean that nothing moved between.
    pub(super) fn both(&self) -> u64 {
        self.up.get().wrapping_add(self.down.get())
    }
}

/// How a relay came to an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// Both sides have finished, and the sockets are to be closed.
    Finished,
    /// It was asked to stop, and nothing is under way: neither side has finished, and all that was read is written.
    Idle,
}

/// What is asked of a relay that has run for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// To notice from now on if the endpoint is gone. Most connections end before that, and are spared some calls.
    Watch,
    /// To stop if nothing is under way, so that the connection can be parked.
    Park,
}

/// Takes requests to a running relay.
#[derive(Debug, Default)]
pub(super) struct Requests {
    asked: Cell<Option<Request>>,
    task: RefCell<Option<Waker>>,
    /// The timeouts that the endpoint's socket is to have and does not have yet.
    patience: Cell<Option<Patience>>,
}

impl Requests {
    /// Does nothing if no relay runs, or if it is busy.
    pub(super) fn ask(&self, request: Request) {
        if let Some(task) = self.task.take() {
            self.asked.set(Some(request));
            task.wake();
        }
    }

    /// The endpoint's socket is to have these timeouts once it has lasted.
    pub(super) fn watch_with(&self, patience: Patience) {
        self.patience.set(Some(patience));
    }

    fn watch(&self, endpoint: &TcpStream) {
        if let Some(patience) = self.patience.take() {
            // It fails only on a socket that has no connection any more, which is noticed anyway.
            let _ = patience.apply(&SockRef::from(endpoint));
        }
    }

    /// Remembers whom to wake, unless it may stop now: a task that has stopped must not be kept by its waker.
    fn next(&self, cx: &Context<'_>) -> Option<Request> {
        let asked = self.asked.take();
        if asked != Some(Request::Park) {
            self.task.borrow_mut().get_or_insert_with(|| cx.waker().clone());
        }
        asked
    }
}

/// Relays until both sides have finished, or one broke, or nothing moves and it is asked to stop.
pub(super) async fn relay(
    consumer: &TcpStream,
    endpoint: &TcpStream,
    buffers: &RelayBuffers,
    moved: &Moved,
    requests: &Requests,
) -> Result<Ended, Broken> {
    let consumer = End { side: Side::Consumer, socket: consumer };
    let endpoint = End { side: Side::Endpoint, socket: endpoint };
    let mut up = Direction::new(consumer, endpoint, &moved.up, buffers);
    let mut down = Direction::new(endpoint, consumer, &moved.down, buffers);
    let mut end = tokio::select! {
        biased;
        end = poll_fn(|cx| {
            match (up.poll_move(cx)?.is_ready(), down.poll_move(cx)?.is_ready()) {
                // Closing the sockets passes the end on to both sides.
                (true, true) => return Poll::Ready(Ok(Ended::Finished)),
                (true, false) => up.tell_end()?,
                (false, true) => down.tell_end()?,
                (false, false) => {}
            }
            let asked = requests.next(cx);
            if asked.is_some() {
                requests.watch(endpoint.socket);
            }
            if asked == Some(Request::Park) && up.is_idle() && down.is_idle() {
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
    if let Err(broken) = &mut end {
        // A reset discards nothing that was acknowledged before it: the other side's end may lie here unread.
        let other = if broken.side == Side::Consumer { endpoint } else { consumer };
        let end_was_seen = up.has_read_end() || down.has_read_end() || has_sent_end(other.socket);
        broken.after_end = broken.follows_end(end_was_seen);
    }
    match &end {
        Ok(_) => {}
        Err(Broken { side: Side::Consumer, .. }) => up.last_words().await,
        Err(Broken { side: Side::Endpoint, .. }) => down.last_words().await,
    }
    end
}
