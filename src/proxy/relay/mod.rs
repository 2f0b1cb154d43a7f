//! Relays bytes in both directions until both sides have finished. A half-close is passed on as a half-close, a reset as a reset.

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
pub(super) use direction::Suspended;
pub(super) use end::{Broken, Side};
use end::{End, broken, has_sent_end};
pub(super) use pipe::PIPES;

use super::socket::Patience;

/// Bytes passed on so far, in each direction.
#[derive(Debug, Clone, Default)]
pub(super) struct Moved {
    pub up: Cell<u64>,
    pub down: Cell<u64>,
}

impl Moved {
    /// The sum of both directions. If it has not changed, nothing moved.
    pub(super) fn both(&self) -> u64 {
        self.up.get().wrapping_add(self.down.get())
    }
}

/// How a relay ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// Both sides have finished. The caller closes the sockets.
    Finished,
    /// It was asked to stop while idle: neither side has finished, and all bytes that were read are written.
    Idle,
    /// It was asked to stand still. What it held is in its [`Requests`].
    Suspended,
}

/// A request to a relay that has run for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RelayRequest {
    /// Set the endpoint's timeouts. Most connections end earlier, and save these system calls.
    Watch,
    /// Stop if idle, so that the connection can be parked.
    Park,
    /// Stop at once, so that another relay can go on.
    Suspend,
}

/// Passes requests to a running relay.
#[derive(Debug, Default)]
pub(super) struct Requests {
    asked: Cell<Option<RelayRequest>>,
    task: RefCell<Option<Waker>>,
    /// The timeouts of the endpoint's socket, until they are set.
    patience: Cell<Option<Patience>>,
    /// What a relay held that stands still, up and down.
    suspended: RefCell<Option<Box<[Suspended; 2]>>>,
}

impl Requests {
    /// Does nothing if no relay runs, or if the last request is still pending.
    pub(super) fn ask(&self, request: RelayRequest) {
        if let Some(task) = self.task.take() {
            self.asked.set(Some(request));
            task.wake();
        }
    }

    /// Has the next relay go on with what another one held.
    pub(super) fn resume(&self, suspended: Box<[Suspended; 2]>) {
        self.suspended.replace(Some(suspended));
    }

    /// What the relay held that was suspended.
    pub(super) fn take_suspended(&self) -> Option<Box<[Suspended; 2]>> {
        self.suspended.take()
    }

    /// Sets the timeouts that [`RelayRequest::Watch`] applies to the endpoint's socket.
    pub(super) fn watch_with(&self, patience: Patience) {
        self.patience.set(Some(patience));
    }

    fn watch(&self, endpoint: &TcpStream) {
        if let Some(patience) = self.patience.take() {
            // Fails only if the connection is gone already, which the relay notices.
            let _ = patience.apply(&SockRef::from(endpoint));
        }
    }

    /// The pending request. Registers the task to wake for the next one, unless the relay may stop now: a waker would keep the
    /// memory of a task that has ended.
    fn next(&self, cx: &Context<'_>) -> Option<RelayRequest> {
        let asked = self.asked.take();
        if !matches!(asked, Some(RelayRequest::Park | RelayRequest::Suspend)) {
            self.task.borrow_mut().get_or_insert_with(|| cx.waker().clone());
        }
        asked
    }
}

/// Relays until both sides have finished, one fails, or a request asks an idle relay to stop.
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
    if let Some(suspended) = requests.take_suspended() {
        let [of_up, of_down] = *suspended;
        up.resume(of_up);
        down.resume(of_down);
    }
    let mut end = tokio::select! {
        biased;
        end = poll_fn(|cx| {
            match (up.poll_move(cx)?.is_ready(), down.poll_move(cx)?.is_ready()) {
                // The caller closes the sockets, which passes the end on to both sides.
                (true, true) => return Poll::Ready(Ok(Ended::Finished)),
                (true, false) => up.tell_end()?,
                (false, true) => down.tell_end()?,
                (false, false) => {}
            }
            let asked = requests.next(cx);
            if asked.is_some() {
                requests.watch(endpoint.socket);
            }
            match asked {
                Some(RelayRequest::Park) if up.is_idle() && down.is_idle() => {
                    Poll::Ready(Ok(Ended::Idle))
                }
                Some(RelayRequest::Suspend) => {
                    let held = Box::new([up.suspend(), down.suspend()]);
                    requests.suspended.replace(Some(held));
                    Poll::Ready(Ok(Ended::Suspended))
                }
                _ => Poll::Pending,
            }
        }) => end,
        // A direction that waits to write does not read, and neither does one that has finished. Without these two, the reset of the
        // side it reads from would go unnoticed, and the other side would wait for ever.
        broken = broken(consumer) => Err(broken),
        broken = broken(endpoint) => Err(broken),
    };
    if let Err(broken) = &mut end {
        // A reset does not discard what was acknowledged before it: the other side's end may still be unread here.
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
