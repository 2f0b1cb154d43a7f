//! Sockets of both sides: how they are set up and closed, and what it says when a call on one fails.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use rustix::io::Errno;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpSocket, TcpStream};

use crate::model::Endpoint;

/// Probes of a silent peer. The first comes well before 60 s, when connection tracking forgets a half-closed
/// connection (nf_conntrack_tcp_timeout_close_wait) and its address translation with it: each probe restarts that time.
pub(super) const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(45))
    .with_interval(Duration::from_secs(15))
    .with_retries(4);

/// A connection to an endpoint, set up as both sides of a connection are.
pub(crate) async fn dial(endpoint: Endpoint, mark: Option<u32>) -> io::Result<TcpStream> {
    let socket = if endpoint.0.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    let options = SockRef::from(&socket);
    options.set_tcp_nodelay(true)?;
    options.set_tcp_keepalive(&KEEPALIVE)?;
    if let Some(mark) = mark {
        options.set_mark(mark)?;
    }
    socket.connect(endpoint.0).await
}

/// Whether a connect failed because of this host, which says nothing about the endpoint.
pub(crate) fn is_fault_of_this_host(error: &io::Error) -> bool {
    is_local(error) || is_shortage(error)
}

/// Whether a connect failed because this host has no address, no route or no permission for it.
pub(super) fn is_local(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::ADDRNOTAVAIL | Errno::AFNOSUPPORT | Errno::PERM | Errno::ACCESS)
    )
}

/// Whether a call failed because something ran out that other connections have, and give back when they end.
pub(super) fn is_shortage(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)
    )
}

/// A socket that is reset when dropped, unless its relay finished: the peer of a broken connection must not take its end
/// for a whole one.
#[derive(Debug)]
pub(super) struct Socket {
    pub(super) stream: TcpStream,
    pub(super) finished: bool,
}

impl Socket {
    pub(super) fn new(stream: TcpStream) -> Self {
        Self { stream, finished: false }
    }

    /// The same socket, unknown to the runtime.
    pub(super) fn duplicate(&self) -> io::Result<OwnedFd> {
        self.stream.as_fd().try_clone_to_owned()
    }

    /// Leaves the connection to its duplicate: closing that one resets it from now on, and dropping this does nothing.
    pub(super) fn leave_to_duplicate(&mut self) {
        reset_on_close(&self.stream);
        self.finished = true;
    }

    /// Back in the runtime, after [`Socket::leave_to_duplicate`].
    pub(super) fn resumed(socket: OwnedFd) -> io::Result<Self> {
        let stream = TcpStream::from_std(socket.into())?;
        SockRef::from(&stream).set_linger(None)?;
        Ok(Self::new(stream))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if !self.finished {
            reset_on_close(&self.stream);
        }
    }
}

/// Makes closing the socket a reset.
fn reset_on_close(stream: &TcpStream) {
    // It fails only on a socket that has no connection any more.
    let _ = stream.set_zero_linger();
}

#[cfg(test)]
pub(super) mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn the_endpoints_side_sends_at_once_and_notices_a_peer_that_is_gone() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = Endpoint(listener.local_addr().unwrap());
        let dialled = dial(endpoint, None).await.unwrap();
        assert_is_set_up(&dialled);
    }

    #[test]
    fn what_this_host_lacks_is_not_held_against_an_endpoint() {
        assert!(is_shortage(&Errno::MFILE.into()));
        assert!(!is_shortage(&Errno::CONNREFUSED.into()));
        assert!(is_local(&Errno::ADDRNOTAVAIL.into()));
        assert!(!is_local(&Errno::CONNREFUSED.into()));
        assert!(!is_local(&io::ErrorKind::TimedOut.into()));
    }

    pub(in crate::proxy) fn assert_is_set_up(stream: &TcpStream) {
        let options = SockRef::from(stream);
        assert!(options.tcp_nodelay().unwrap());
        assert!(options.keepalive().unwrap());
        // Before connection tracking forgets a half-closed connection.
        assert!(options.tcp_keepalive_time().unwrap() < Duration::from_secs(60));
    }
}
