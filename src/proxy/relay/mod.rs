//! Bytes both ways, until both sides are done: half-close is passed on as half-close, a reset as a reset.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    task::{Context, Poll, Waker},
};

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

/// Asks a relay to stop while nothing is under way, so that its connection can be parked.
#[derive(Debug, Default)]
pub(super) struct ParkRequest {
    asked: Cell<bool>,
    task: RefCell<Option<Waker>>,
}

impl ParkRequest {
    /// Does nothing if no relay runs, or if it is busy.
    pub(super) fn ask(&self) {
        if let Some(task) = self.task.take() {
            self.asked.set(true);
            task.wake();
        }
    }

    /// Remembers whom to wake, until it was asked: a task that has stopped must not be kept by its waker.
    fn is_asked(&self, cx: &Context<'_>) -> bool {
        if self.asked.take() {
            return true;
        }
        self.task.borrow_mut().get_or_insert_with(|| cx.waker().clone());
        false
    }
}

/// Relays until both sides have finished, or one broke, or nothing moves and it is asked to stop.
pub(super) async fn relay(
    consumer: &TcpStream,
    endpoint: &TcpStream,
    buffers: &RelayBuffers,
    moved: &Moved,
    park: &ParkRequest,
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
            if park.is_asked(cx) && up.is_idle() && down.is_idle() {
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
        match broken.side {
            Side::Consumer => up.last_words().await,
            Side::Endpoint => down.last_words().await,
        }
        // A program that speaks TLS may close with the other's goodbye unread, which is a reset without an end before it.
        let is_goodbye = up.has_said_goodbye() && down.has_said_goodbye();
        broken.after_end = broken.follows_end(end_was_seen || is_goodbye);
    }
    end
}
