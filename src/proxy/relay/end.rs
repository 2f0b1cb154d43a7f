//! One side's socket, and how it fails.

use std::io;

use futures_util::FutureExt;
use rustix::io::Errno;
use tokio::{io::Interest, net::TcpStream};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::proxy) enum Side {
    Consumer,
    Endpoint,
}

/// One side failed: it reset, or did not answer keepalive.
#[derive(Debug)]
pub(in crate::proxy) struct Broken {
    pub side: Side,
    pub error: io::Error,
}

/// A socket, and whose it is.
#[derive(Debug, Clone, Copy)]
pub(super) struct End<'a> {
    pub side: Side,
    pub socket: &'a TcpStream,
}

impl End<'_> {
    pub(super) fn broke(&self, error: io::Error) -> Broken {
        Broken { side: self.side, error }
    }
}

/// Whether the other side has sent all that it will send, or is gone.
pub(super) fn has_finished(stream: &TcpStream) -> bool {
    let ready = stream.ready(Interest::READABLE).now_or_never();
    ready.is_some_and(|ready| ready.is_ok_and(|ready| ready.is_read_closed()))
}

/// Waits until a socket has an error, as a reset leaves one.
pub(super) async fn broken(end: End<'_>) -> Broken {
    let error = match end.socket.ready(Interest::ERROR).await {
        Ok(_) => match end.socket.take_error() {
            Ok(Some(error)) | Err(error) => error,
            Ok(None) => Errno::CONNRESET.into(),
        },
        Err(error) => error,
    };
    Broken { side: end.side, error }
}
