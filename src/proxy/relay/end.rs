//! The socket of one side, and how it fails.

use std::io;

use futures_util::FutureExt;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use tokio::{io::Interest, net::TcpStream};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::proxy) enum Side {
    Consumer,
    Endpoint,
}

/// The failure of one side: it sent a reset, or did not answer.
#[derive(Debug)]
pub(in crate::proxy) struct Broken {
    pub side: Side,
    pub error: io::Error,
    /// The failure was a reset, and one side had sent its end before.
    pub after_end: bool,
}

impl Broken {
    /// Whether the failure was a reset after an end: an end that was seen, or one of this side, for which the kernel returns EPIPE.
    pub(super) fn follows_end(&self, end_was_seen: bool) -> bool {
        match Errno::from_io_error(&self.error) {
            Some(Errno::PIPE) => true,
            Some(Errno::CONNRESET) => end_was_seen,
            _ => false,
        }
    }
}

/// A socket and its side.
#[derive(Debug, Clone, Copy)]
pub(super) struct End<'a> {
    pub side: Side,
    pub socket: &'a TcpStream,
}

impl End<'_> {
    pub(super) fn broke(&self, error: io::Error) -> Broken {
        Broken { side: self.side, error, after_end: false }
    }
}

/// Whether the peer has sent its end, or is gone.
pub(super) fn has_finished(stream: &TcpStream) -> bool {
    let ready = stream.ready(Interest::READABLE).now_or_never();
    ready.is_some_and(|ready| ready.is_ok_and(|ready| ready.is_read_closed()))
}

/// Whether the peer's end has arrived without an error. Asks the kernel, because the runtime may not have noticed yet.
pub(super) fn has_sent_end(stream: &TcpStream) -> bool {
    let mut sockets = [PollFd::new(stream, PollFlags::RDHUP)];
    // Does not wait. Fails only if memory is short.
    let asked = poll(&mut sockets, Some(&Timespec::default()));
    asked.is_ok()
        && sockets.iter().all(|socket| {
            let found = socket.revents();
            found.contains(PollFlags::RDHUP) && !found.contains(PollFlags::ERR)
        })
}

/// Waits until a socket has an error, for example from a reset.
pub(super) async fn broken(end: End<'_>) -> Broken {
    let error = match end.socket.ready(Interest::ERROR).await {
        Ok(_) => match end.socket.take_error() {
            Ok(Some(error)) | Err(error) => error,
            Ok(None) => Errno::CONNRESET.into(),
        },
        Err(error) => error,
    };
    end.broke(error)
}
