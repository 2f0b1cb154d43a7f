//! Sockets of both sides: their setup and closing, and the meaning of their errors.

use std::{
    cell::Cell,
    io,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use rustix::io::Errno;
use socket2::{Domain, SockRef, Socket as Socket2, TcpKeepalive, Type};
use tokio::net::{TcpSocket, TcpStream};

use crate::model::Endpoint;

/// How soon a silent peer is noticed. Zero: only by keepalive, within two minutes, and data is retransmitted as long as the
/// kernel does it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Patience(Duration);

impl Patience {
    /// The first keepalive probe is sent before this time. Each probe restarts the 60 s after which connection tracking
    /// forgets a half-closed connection (nf_conntrack_tcp_timeout_close_wait), and its address translation with it.
    const FIRST_PROBE: Duration = Duration::from_secs(45);
    const NEXT_PROBE: Duration = Duration::from_secs(15);
    const PROBES: u32 = 4;
    /// A paused consumer keeps its window closed, which the kernel treats as silence too. A pause of a minute must not end
    /// the connection.
    const OF_CONSUMERS: Duration = Duration::from_secs(120);

    pub(super) fn with_endpoints(user_timeout: Duration) -> Self {
        Self(user_timeout)
    }

    pub(super) fn with_consumers(user_timeout: Duration) -> Self {
        match user_timeout {
            Duration::ZERO => Self(Duration::ZERO),
            time => Self(time.max(Self::OF_CONSUMERS)),
        }
    }

    /// Sets a socket's timeouts.
    pub(super) fn apply(self, socket: &SockRef<'_>) -> io::Result<()> {
        socket.set_tcp_keepalive(&self.keepalive())?;
        socket.set_tcp_user_timeout(Some(self.0))
    }

    fn keepalive(self) -> TcpKeepalive {
        let (first, next) = self.probes();
        TcpKeepalive::new().with_time(first).with_interval(next).with_retries(Self::PROBES)
    }

    /// The time until the first keepalive probe, and between later ones, in whole seconds as the kernel needs it. With a
    /// user timeout the kernel ignores the number of probes, and gives up after the timeout if any probe is unanswered (man
    /// 7 tcp). So several must fit into the timeout: one lost packet must not end a connection.
    fn probes(self) -> (Duration, Duration) {
        let Self(time) = self;
        if time.is_zero() {
            return (Self::FIRST_PROBE, Self::NEXT_PROBE);
        }
        let whole = |time: Duration| Duration::from_secs(time.as_secs().max(1));
        let first = whole((time / 2).min(Self::FIRST_PROBE));
        (first, whole((time.saturating_sub(first) / Self::PROBES).min(Self::NEXT_PROBE)))
    }
}

/// A connection to an endpoint.
pub(super) async fn dial(endpoint: Endpoint, mark: Option<u32>) -> io::Result<TcpStream> {
    let socket = for_endpoint(endpoint, mark)?;
    SockRef::from(&socket).set_tcp_nodelay(true)?;
    socket.connect(endpoint.0).await
}

/// Checks whether an endpoint accepts connections, without a connection that its application sees: the last packet of the
/// handshake is replaced by a reset. Some applications count connections without data as attacks (MariaDB blocks their
/// source), or log each.
pub(crate) async fn probe(endpoint: Endpoint, mark: Option<u32>) -> io::Result<()> {
    connect_unseen(unseen_socket(endpoint, mark)?, endpoint).await
}

/// A socket for [`connect_unseen`]. It belongs to the network namespace of the thread that makes it.
pub(crate) fn unseen_socket(endpoint: Endpoint, mark: Option<u32>) -> io::Result<TcpSocket> {
    let socket = for_endpoint(endpoint, mark)?;
    let options = SockRef::from(&socket);
    // The kernel waits a moment for data to send with the last packet of the handshake (man 7 tcp: TCP_QUICKACK). Closing
    // with a linger of zero sends a reset instead.
    options.set_tcp_quickack(false)?;
    options.set_linger(Some(Duration::ZERO))?;
    Ok(socket)
}

/// The connection of [`probe`].
pub(crate) async fn connect_unseen(socket: TcpSocket, endpoint: Endpoint) -> io::Result<()> {
    socket.connect(endpoint.0).await.map(drop)
}

fn for_endpoint(endpoint: Endpoint, mark: Option<u32>) -> io::Result<TcpSocket> {
    let socket = if endpoint.0.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    if let Some(mark) = mark {
        SockRef::from(&socket).set_mark(mark)?;
    }
    Ok(socket)
}

/// What this host lacks to open a connection. It says nothing about the endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lack {
    /// Resources that other connections use, and release when they end.
    Resources,
    /// All source ports to this endpoint are in use.
    Ports,
    /// An address, a route or the permission.
    Route,
}

impl Lack {
    /// What was missing, if a connect failed because of this host.
    pub(crate) fn of(error: &io::Error, endpoint: Endpoint, mark: Option<u32>) -> Option<Self> {
        if is_shortage(error) {
            return Some(Self::Resources);
        }
        match Errno::from_io_error(error)? {
            Errno::AFNOSUPPORT | Errno::PERM | Errno::ACCESS | Errno::INVAL => Some(Self::Route),
            // A router may report this too, for a network behind it.
            Errno::NETUNREACH | Errno::HOSTUNREACH | Errno::NETDOWN => {
                (!has_route(endpoint, mark)).then_some(Self::Route)
            }
            Errno::ADDRNOTAVAIL if has_route(endpoint, mark) => Some(Self::Ports),
            Errno::ADDRNOTAVAIL => Some(Self::Route),
            _ => None,
        }
    }

    /// The fix, if known.
    pub(super) fn remedy(self) -> Option<&'static str> {
        (self == Self::Ports).then_some(
            "if all source ports to this endpoint are in use: widen net.ipv4.ip_local_port_range, set \
             net.ipv4.tcp_tw_reuse=1, or add endpoints",
        )
    }
}

/// Whether this host has a route to an endpoint, and an address for it. Uses UDP, whose connect sends nothing.
fn has_route(endpoint: Endpoint, mark: Option<u32>) -> bool {
    let look = || {
        let socket = Socket2::new(Domain::for_address(endpoint.0), Type::DGRAM, None)?;
        mark.map_or(Ok(()), |mark| socket.set_mark(mark))?;
        socket.connect(&endpoint.0.into())
    };
    // Without a free descriptor this is unknown.
    look().map_or_else(|error| is_shortage(&error), |()| true)
}

/// Whether a call failed because of missing resources that other connections use, and release when they end.
fn is_shortage(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)
    )
}

/// A socket that is reset on drop, unless its relay finished: the peer of a broken connection must not take its end for a
/// regular one.
#[derive(Debug)]
pub(super) struct Socket {
    pub(super) stream: TcpStream,
    pub(super) finished: bool,
}

impl Socket {
    pub(super) fn new(stream: TcpStream) -> Self {
        Self { stream, finished: false }
    }

    /// A duplicate of the socket that the runtime does not know.
    pub(super) fn duplicate(&self) -> io::Result<OwnedFd> {
        self.stream.as_fd().try_clone_to_owned()
    }

    /// Leaves the connection to its duplicate: closing the duplicate resets the connection from now on, and dropping this
    /// value does nothing.
    pub(super) fn leave_to_duplicate(&mut self) {
        reset_on_close(&self.stream);
        self.finished = true;
    }

    /// Returns a socket to the runtime after [`Socket::leave_to_duplicate`], which may have happened in another process.
    pub(super) fn resumed(socket: OwnedFd) -> io::Result<Self> {
        let stream = TcpStream::from_std(socket.into())?;
        SockRef::from(&stream).set_linger(None)?;
        Ok(Self::new(stream))
    }
}

thread_local! {
    /// Whether dropped sockets belong to another process.
    static HANDED_OVER: Cell<bool> = const { Cell::new(false) };
}

/// As long as it exists, sockets that this thread drops are left unchanged: another process has them, and socket options
/// are shared.
#[derive(Debug)]
pub(super) struct SocketsLeftOpen(());

impl SocketsLeftOpen {
    pub(super) fn begin() -> Self {
        HANDED_OVER.set(true);
        Self(())
    }
}

impl Drop for SocketsLeftOpen {
    fn drop(&mut self) {
        HANDED_OVER.set(false);
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if !self.finished && !HANDED_OVER.get() {
            reset_on_close(&self.stream);
        }
    }
}

/// Makes closing the socket send a reset.
fn reset_on_close(stream: &TcpStream) {
    // Fails only on a socket that is no longer connected.
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
        for (seconds, expected) in [(0, None), (5, Some(5)), (30, Some(30)), (600, Some(600))] {
            let time = Duration::from_secs(seconds);
            let dialled = dial(endpoint, None).await.unwrap();
            Patience::with_endpoints(time).apply(&SockRef::from(&dialled)).unwrap();
            assert_is_set_up(&dialled, expected);
        }
    }

    #[test]
    fn some_keepalive_probes_fit_into_a_user_timeout() {
        let (consumers, endpoints) = (Patience::with_consumers, Patience::with_endpoints);
        for seconds in [5, 7, 30, 60, 119, 120, 600, 86_400].map(Duration::from_secs) {
            assert_eq!(endpoints(seconds).0, seconds);
            for patience in [consumers(seconds), endpoints(seconds)] {
                let (first, next) = patience.probes();
                assert!(first + 3 * next <= patience.0, "{patience:?}");
                assert!(first < Duration::from_secs(60), "{patience:?}");
            }
        }
        // A minute without reading does not end a consumer's connection.
        assert!(consumers(Duration::from_secs(5)).0 > Duration::from_secs(60));
        assert_eq!(consumers(Duration::ZERO).0, Duration::ZERO);
    }

    /// The application's side counts the connections that it sees.
    #[tokio::test]
    async fn a_probe_finds_out_without_being_seen() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = Endpoint(listener.local_addr().unwrap());
        for _ in 0..20 {
            probe(endpoint, None).await.unwrap();
        }
        let dialled = dial(endpoint, None).await.unwrap();
        let mut seen = 0;
        // The queue is in the order of arrival.
        while listener.accept().await.unwrap().1 != dialled.local_addr().unwrap() {
            seen += 1;
        }
        // The kernel waits for 200 ms, which a busy machine may sometimes miss.
        assert!(seen < 10, "{seen} of 20");
        drop(listener);
        assert_eq!(
            probe(endpoint, None).await.unwrap_err().kind(),
            io::ErrorKind::ConnectionRefused
        );
    }

    #[test]
    fn what_this_host_lacks_is_not_held_against_an_endpoint() {
        let here = Endpoint("127.0.0.1:1".parse().unwrap());
        let lack = |error: Errno| Lack::of(&error.into(), here, None);
        assert_eq!(lack(Errno::MFILE), Some(Lack::Resources));
        assert_eq!(lack(Errno::ADDRNOTAVAIL), Some(Lack::Ports), "there is a route");
        assert_eq!(lack(Errno::AFNOSUPPORT), Some(Lack::Route));
        assert_eq!(lack(Errno::NETUNREACH), None, "a router says so");
        assert_eq!(lack(Errno::CONNREFUSED), None);
        assert_eq!(Lack::of(&io::ErrorKind::TimedOut.into(), here, None), None);
        // A broadcast address needs a special permission, also for UDP.
        let nowhere = Endpoint("255.255.255.255:1".parse().unwrap());
        assert_eq!(Lack::of(&Errno::NETUNREACH.into(), nowhere, None), Some(Lack::Route));
    }

    pub(in crate::proxy) fn assert_is_set_up(stream: &TcpStream, user_timeout: Option<u64>) {
        let options = SockRef::from(stream);
        assert!(options.tcp_nodelay().unwrap());
        assert!(options.keepalive().unwrap());
        // Before connection tracking forgets a half-closed connection.
        assert!(options.tcp_keepalive_time().unwrap() < Duration::from_secs(60));
        let user_timeout = user_timeout.map(Duration::from_secs);
        assert_eq!(options.tcp_user_timeout().unwrap(), user_timeout);
    }
}
