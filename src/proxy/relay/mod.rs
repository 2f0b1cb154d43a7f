//! Bytes both ways, until both sides are done: half-close is passed on as half-close, a reset as a reset.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    io,
    task::Poll,
};

use rustix::io::Errno;
use tokio::{io::Interest, net::TcpStream};

use direction::{Direction, End};
pub(super) use pipe::PIPES;
use pipe::Pipes;

mod direction;
mod pipe;
#[cfg(test)]
mod tests;

/// What every relay of a worker shares.
#[derive(Debug)]
pub(super) struct RelayBuffers {
    buffer: RefCell<Box<[u8]>>,
    pipes: RefCell<Pipes>,
}

impl RelayBuffers {
    /// Large enough that a bulk stream needs few calls, small enough to stay in a core's second-level cache.
    const SIZE: usize = 256 * 1024;

    /// With up to so many pipes to splice bulk through; without any, all is copied.
    pub(super) fn new(pipes: usize) -> Self {
        Self {
            buffer: RefCell::new(vec![0; Self::SIZE].into()),
            pipes: RefCell::new(Pipes::new(pipes)),
        }
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

/// Relays until both sides have finished, or one broke.
pub(super) async fn relay(
    consumer: &TcpStream,
    endpoint: &TcpStream,
    buffers: &RelayBuffers,
    moved: &Moved,
) -> Result<(), Broken> {
    let consumer = End { side: Side::Consumer, socket: consumer };
    let endpoint = End { side: Side::Endpoint, socket: endpoint };
    let mut up = Direction::new(consumer, endpoint, &moved.up, buffers);
    let mut down = Direction::new(endpoint, consumer, &moved.down, buffers);
    let end = tokio::select! {
        biased;
        end = poll_fn(|cx| {
            let up = up.poll(cx)?;
            let down = down.poll(cx)?;
            if up.is_ready() && down.is_ready() { Poll::Ready(Ok(())) } else { Poll::Pending }
        }) => end,
        // A direction that waits to write does not read, nor does one that has finished: the reset of the side it reads
        // from would go unseen, and the other side wait for ever.
        broken = broken(consumer) => Err(broken),
        broken = broken(endpoint) => Err(broken),
    };
    match &end {
        Ok(()) => {}
        Err(Broken { side: Side::Consumer, .. }) => up.last_words().await,
        Err(Broken { side: Side::Endpoint, .. }) => down.last_words().await,
    }
    end
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
