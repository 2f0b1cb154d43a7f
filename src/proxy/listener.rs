//! The one TCP port: each worker has a listener for each address family.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::io::Errno;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::{TcpListener, TcpStream};

use super::socket::Patience;

/// Maximum number of connections that wait to be accepted. The kernel's somaxconn limits it too.
const BACKLOG: i32 = 4096;

/// Opens `workers` listeners of each family on one port. With port 0 the kernel chooses. A host without IPv6 gets only
/// IPv4. IPv4 connections never arrive at the IPv6 listener, because their original destination could not be read there.
///
/// An error if another process listens on the port, including another embassy.
pub(super) fn open(
    port: u16,
    workers: usize,
    user_timeout: Duration,
) -> io::Result<Vec<Vec<std::net::TcpListener>>> {
    // A second embassy could join a port that is shared between the workers (SO_REUSEPORT), and would get half of the
    // connections.
    drop(socket((Ipv4Addr::UNSPECIFIED, port).into(), false)?);
    let mut sets = Vec::with_capacity(workers);
    let mut port = port;
    for _ in 0..workers {
        let v4 = listen((Ipv4Addr::UNSPECIFIED, port).into(), user_timeout)?;
        port = v4.local_addr()?.port();
        let mut set = vec![v4];
        match listen((Ipv6Addr::UNSPECIFIED, port).into(), user_timeout) {
            Ok(v6) => set.push(v6),
            Err(error) if Errno::from_io_error(&error) == Some(Errno::AFNOSUPPORT) => {}
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {}
            Err(error) => return Err(error),
        }
        sets.push(set);
    }
    Ok(sets)
}

/// The listeners of another process, for this number of workers. That process may have had fewer or more.
pub(super) fn inherited(
    sets: Vec<Vec<OwnedFd>>,
    workers: usize,
    user_timeout: Duration,
) -> io::Result<Vec<Vec<std::net::TcpListener>>> {
    let mut mine: Vec<Vec<_>> = (0..workers).map(|_| Vec::new()).collect();
    for (n, set) in sets.into_iter().enumerate() {
        let Some(of_worker) = mine.get_mut(n % workers) else { continue };
        for listener in set {
            let listener = std::net::TcpListener::from(listener);
            Patience::with_consumers(user_timeout).apply(&SockRef::from(&listener))?;
            of_worker.push(listener);
        }
    }
    let given = mine.iter().filter(|set| !set.is_empty()).count();
    if given == 0 {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the other process has no listener"));
    }
    // A worker without any shares those of another: a new listener would have a queue of its own before this process serves, and may be
    // refused to another user.
    for n in given..workers {
        let of_another = mine.get(n % given).into_iter().flatten();
        let shared = of_another.map(std::net::TcpListener::try_clone).collect::<io::Result<_>>()?;
        if let Some(of_worker) = mine.get_mut(n) {
            *of_worker = shared;
        }
    }
    Ok(mine)
}

fn listen(address: SocketAddr, user_timeout: Duration) -> io::Result<std::net::TcpListener> {
    let socket = socket(address, true)?;
    // Accepted sockets inherit these options on Linux, which saves some calls per connection.
    socket.set_tcp_nodelay(true)?;
    Patience::with_consumers(user_timeout).apply(&SockRef::from(&socket))?;
    socket.set_nonblocking(true)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn socket(address: SocketAddr, shared: bool) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    // A restart must not wait for the last connections of the previous run.
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(shared)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// The pause of a listener after a failed accept, which avoids a busy loop.
#[derive(Debug, Default)]
pub(super) struct AcceptBackoff {
    failures: u32,
    said: Option<Instant>,
}

impl AcceptBackoff {
    /// While descriptors are short, connections end and others are accepted, so failures are frequent and mean the same.
    const SAY_AGAIN: Duration = Duration::from_secs(10);

    /// `None`: only this connection is gone, and the next can be accepted at once. Other errors may last, so trying again
    /// at once would use a whole processor.
    pub(super) fn after(&mut self, error: &io::Error) -> Option<Duration> {
        if is_of_one_connection(error) {
            return None;
        }
        self.failures = (self.failures + 1).min(8);
        let pause = Duration::from_millis(4 << self.failures);
        if self.said.is_none_or(|said| said.elapsed() >= Self::SAY_AGAIN) {
            self.said = Some(Instant::now());
            tracing::warn!(%error, pause_s = pause.as_secs_f64(), "cannot accept connections; they wait in the kernel's queue");
        }
        Some(pause)
    }

    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }
}

/// Whether an accept failed because of an error of the connection itself, which is then no longer in the queue (man 2
/// accept, "Error handling").
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(
            Errno::CONNABORTED
                | Errno::INTR
                | Errno::NETDOWN
                | Errno::PROTO
                | Errno::NOPROTOOPT
                | Errno::HOSTDOWN
                | Errno::NONET
                | Errno::HOSTUNREACH
                | Errno::OPNOTSUPP
                | Errno::NETUNREACH
        )
    )
}

/// A tokio listener of the current worker.
pub(super) fn adopt(listener: std::net::TcpListener) -> io::Result<TcpListener> {
    TcpListener::from_std(listener)
}

/// The connections in a listener's queue now. Asks the kernel, because the runtime may not have been notified yet.
pub(super) fn queued(listener: &TcpListener) -> impl Iterator<Item = (TcpStream, SocketAddr)> {
    let accept = move || -> io::Result<_> {
        let (socket, peer) = SockRef::from(listener).accept()?;
        socket.set_nonblocking(true)?;
        let peer = peer.as_socket().ok_or(io::ErrorKind::Unsupported)?;
        Ok((TcpStream::from_std(socket.into())?, peer))
    };
    // Limited, because clients may keep connecting to the port itself.
    let tries = std::iter::repeat_with(accept).take(BACKLOG as usize);
    // A connection that is already gone does not end the queue.
    tries
        .filter(|accepted| !accepted.as_ref().is_err_and(is_of_one_connection))
        .map_while(Result::ok)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::socket::tests::assert_is_set_up;

    #[tokio::test]
    async fn what_waits_in_the_queue_is_taken_before_the_runtime_hears_of_it() {
        let mut sets = open(0, 1, Duration::from_secs(30)).unwrap();
        let listener = adopt(sets.remove(0).remove(0)).unwrap();
        let address = (Ipv4Addr::LOCALHOST, listener.local_addr().unwrap().port());
        let dialled = [(); 3].map(|()| std::net::TcpStream::connect(address).unwrap());
        let accepted: Vec<_> = queued(&listener).collect();
        let peers: Vec<_> = accepted.iter().map(|(_, peer)| *peer).collect();
        assert_eq!(peers, dialled.each_ref().map(|one| one.local_addr().unwrap()));
        accepted.iter().for_each(|(stream, _)| assert_is_set_up(stream, Some(120)));
        assert_eq!(queued(&listener).count(), 0, "it does not wait");
    }

    #[tokio::test]
    async fn the_consumers_side_sends_at_once_and_notices_a_peer_that_is_gone() {
        for (seconds, expected) in [(0, None), (30, Some(120)), (600, Some(600))] {
            let mut sets = open(0, 1, Duration::from_secs(seconds)).unwrap();
            let listener = adopt(sets.remove(0).remove(0)).unwrap();
            let port = listener.local_addr().unwrap().port();
            let dialled = std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
            assert_is_set_up(&listener.accept().await.unwrap().0, expected);
            drop(dialled);
        }
    }

    #[test]
    fn every_worker_and_both_families_share_one_port() {
        let sets = open(0, 3, Duration::ZERO).unwrap();
        let ports: Vec<_> = sets.iter().flatten().map(|l| l.local_addr().unwrap().port()).collect();
        assert!(ports.len() >= 3 && ports.iter().all(|&port| port == ports[0]), "{ports:?}");
    }

    #[test]
    fn nobody_joins_a_port_that_is_in_use() {
        let sets = open(0, 2, Duration::ZERO).unwrap();
        let port = sets[0][0].local_addr().unwrap().port();
        assert_eq!(open(port, 2, Duration::ZERO).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(sets);
        open(port, 2, Duration::ZERO).unwrap();
    }

    #[test]
    fn an_error_that_may_stay_slows_accepting_down() {
        let mut backoff = AcceptBackoff::default();
        for gone in [Errno::CONNABORTED, Errno::NETUNREACH, Errno::PROTO] {
            assert_eq!(backoff.after(&gone.into()), None);
        }
        for stays in [Errno::PERM, Errno::INVAL, Errno::NOBUFS, Errno::IO] {
            assert_eq!(backoff.after(&stays.into()), Some(Duration::from_millis(8)), "{stays}");
            backoff.reset();
        }
        let pauses: Vec<_> = (0..20).filter_map(|_| backoff.after(&Errno::MFILE.into())).collect();
        assert_eq!(pauses[0], Duration::from_millis(8));
        assert_eq!(pauses[19], Duration::from_millis(1024));
        backoff.reset();
        assert_eq!(backoff.after(&Errno::NFILE.into()), Some(Duration::from_millis(8)));
    }
}
