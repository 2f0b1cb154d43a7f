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

/// Whether bytes end in what is probably an alert of TLS: `close_notify`, by which each side says that it has finished. From TLS 1.3
/// on its kind is encrypted, and only its size shows: a record of two bytes, the type, and a tag of 16 (RFC 8446, section 5.2).
pub(super) fn ends_in_alert(bytes: &[u8]) -> bool {
    const ALERT: u8 = 21;
    const APPLICATION_DATA: u8 = 23;
    // In TLS 1.2 plain, with a tag, and with a tag and a nonce.
    let kinds = [(APPLICATION_DATA, 19), (ALERT, 2), (ALERT, 18), (ALERT, 26)];
    kinds.iter().any(|(kind, length)| {
        let start = bytes.len().checked_sub(5 + usize::from(*length));
        let header = start.and_then(|start| bytes.get(start..start + 5));
        matches!(header, Some([found, 3, _, 0, len]) if found == kind && len == length)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alert_of_tls_is_recognised_at_the_end_of_what_was_sent() {
        let record =
            |kind: u8, length: u8| [&[kind, 3, 3, 0, length][..], &vec![9; length.into()]].concat();
        let data = record(23, 22);
        for (kind, length, is_alert) in [
            (23, 19, true),
            (21, 2, true),
            (21, 18, true),
            (21, 26, true),
            (23, 18, false),
            (22, 19, false),
        ] {
            let alert = record(kind, length);
            assert_eq!(ends_in_alert(&alert), is_alert, "{kind} {length}");
            assert_eq!(ends_in_alert(&[&data[..], &alert].concat()), is_alert, "{kind} {length}");
            assert!(!ends_in_alert(&[&alert[..], &data].concat()));
            assert!(!ends_in_alert(&alert[1..]) && !ends_in_alert(&alert[..alert.len() - 1]));
        }
        assert!(!ends_in_alert(b"") && !ends_in_alert(b"+OK"));
    }
}
