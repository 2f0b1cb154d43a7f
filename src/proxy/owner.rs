//! The owner of a connection that may be older than its route. It may have waited, unaccepted, while its container ended and
//! another got the address: what it sends is not for that one's services.
//!
//! Where that can be, the kernel is asked: a connection is the owner's if the other end of it is a socket in the owner's
//! network namespace. It is there until well after a container has ended its direction, or closed.

#![expect(clippy::disallowed_methods, reason = "reads files of the kernel, which need no disk")]

use std::{
    fs,
    io::{BufRead, BufReader},
    net::{IpAddr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::net::TcpStream;

use super::captured::Captured;
use crate::{
    model::{ConsumerId, Process, RunEnd},
    table::Route,
};

/// How long a connection may lie in the kernel's queue without that a lack of something, known to us, kept it there: an
/// overloaded or halted machine.
const DELAY: Duration = Duration::from_secs(5);

/// A time in which no connection was accepted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pause {
    start: Instant,
    end: Instant,
}

impl Pause {
    /// The pause that has just ended and began at `start`, joined to one that was over shortly before: what waited in that
    /// may wait still.
    pub(super) fn ended(before: Option<Self>, start: Instant) -> Self {
        let end = Instant::now();
        let before = before.filter(|before| before.end + DELAY >= start);
        Self { start: before.map_or(start, |before| before.start.min(start)), end }
    }
}

/// Why a connection may be older than its route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Doubt {
    /// The route appeared while no connection was accepted, or after that.
    Waited,
    /// The route has only just come.
    New,
}

/// Why a connection that is accepted now may be older than `route`. No call of the system's is made for most.
pub(super) fn doubt(route: &Route, pause: Option<Pause>, now: Instant) -> Option<Doubt> {
    // This host's own addresses do not change hands.
    let born = route.born.filter(|_| route.consumer != ConsumerId::Local)?;
    match pause {
        Some(pause) if pause.end + DELAY > now && born + DELAY > pause.start => Some(Doubt::Waited),
        _ => (born + DELAY > now).then_some(Doubt::New),
    }
}

/// The owner of a route, and its process, if that shows the owner's addresses: it is visible, and no sandbox.
pub(super) fn shown(route: &Route) -> Option<(&RunEnd, Process)> {
    // The last is the one whose network namespace it is.
    let owner = route.ends.last().filter(|owner| owner.has_shown_network())?;
    Some((owner, owner.process()?))
}

/// Whether the peer has ended its direction or is gone, as the kernel knows it: the runtime knows nothing yet of a socket
/// that it has only just got.
pub(super) fn has_hung_up(stream: &TcpStream) -> bool {
    let mut sockets = [PollFd::new(stream, PollFlags::RDHUP)];
    let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    // If the kernel does not answer, the worse case is assumed.
    poll(&mut sockets, Some(&Timespec::default()))
        .map_or(true, |_| sockets[0].revents().intersects(gone))
}

/// Whether the other end of a connection is certainly a socket of the route's owner, or of one that shares its network.
/// Never if processes are not visible.
pub(super) async fn is_owners(route: &Route, captured: &Captured) -> bool {
    let (ends, captured) = (route.ends.clone(), *captured);
    let look = move || {
        let mut processes = ends.iter().filter_map(RunEnd::process);
        let has = processes
            .any(|process| has_socket(process.pid, captured.source.0, captured.destination.0));
        // Looked at last: until then the process's number was not another's.
        has && !ends.iter().any(RunEnd::has_ended)
    };
    // The kernel goes through all sockets of the machine for it, which may take milliseconds.
    tokio::task::spawn_blocking(look).await.unwrap_or(false)
}

/// Whether there is a socket with these addresses in a process's network.
fn has_socket(pid: i32, local: SocketAddr, remote: SocketAddr) -> bool {
    ["tcp", "tcp6"].iter().any(|list| {
        // By lines: there may be tens of thousands of them.
        let list = fs::File::open(format!("/proc/{pid}/net/{list}")).map(BufReader::new);
        let mut lines = list.into_iter().flat_map(|list| list.lines().map_while(Result::ok));
        lines.any(|line| socket(&line) == Some((local, remote)))
    })
}

/// The addresses of a socket in a line of `/proc/net/tcp` or `tcp6`, unless it is still dialling.
fn socket(line: &str) -> Option<(SocketAddr, SocketAddr)> {
    // TCP_SYN_SENT (include/net/tcp_states.h).
    const DIALLING: &str = "02";
    let mut fields = line.split_whitespace().skip(1);
    let (local, remote, state) = (fields.next()?, fields.next()?, fields.next()?);
    (state != DIALLING).then_some(())?;
    Some((address(local)?, address(remote)?))
}

/// An address as the kernel writes it: words of 32 bits in hexadecimal digits, each in the machine's own order of bytes.
fn address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |n: usize| {
        let word = u32::from_str_radix(address.get(8 * n..8 * n + 8)?, 16).ok()?;
        Some(word.to_ne_bytes())
    };
    let ip = match address.len() {
        8 => IpAddr::from(word(0)?),
        32 => {
            let mut bytes = [0; 16];
            for (n, part) in bytes.chunks_exact_mut(4).enumerate() {
                part.copy_from_slice(&word(n)?);
            }
            // A socket of IPv6 may have a connection of IPv4.
            Ipv6Addr::from(bytes).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_socket_is_found_in_a_network_by_both_its_addresses() {
        let pid = i32::try_from(std::process::id()).unwrap();
        for at in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(at) else { continue };
            let remote = listener.local_addr().unwrap();
            let client = std::net::TcpStream::connect(remote).unwrap();
            let local = client.local_addr().unwrap();
            assert!(has_socket(pid, local, remote));
            client.shutdown(std::net::Shutdown::Write).unwrap();
            assert!(has_socket(pid, local, remote), "half-closed");
            let other = SocketAddr::new(remote.ip(), remote.port() ^ 1);
            assert!(!has_socket(pid, local, other));
        }
        assert!(!has_socket(0, "127.0.0.1:1".parse().unwrap(), "127.0.0.1:2".parse().unwrap()));
    }

    #[test]
    fn a_line_of_the_kernels_is_understood() {
        let hex = |text: &str| {
            let ip: std::net::Ipv4Addr = text.parse().unwrap();
            format!("{:08X}", u32::from_ne_bytes(ip.octets()))
        };
        let (a, b) = (hex("172.17.0.2"), hex("172.17.0.1"));
        let pair = ("172.17.0.2:40000".parse().unwrap(), "172.17.0.1:80".parse().unwrap());
        let line = |state: &str| format!("   1: {a}:9C40 {b}:0050 {state} 00000000:00000000 00:0");
        assert_eq!(socket(&line("05")), Some(pair));
        assert_eq!(socket(&line("02")), None, "who only dials has no connection");
        let mapped = hex("0.0.255.255");
        let zeros = "0".repeat(16);
        let line = format!("   1: {zeros}{mapped}{a}:9C40 {zeros}{mapped}{b}:0050 01 0");
        assert_eq!(socket(&line), Some(pair));
        for wrong in
            ["", "sl local_address rem_address st", "1: 0:1 0:1 01", "1: é0000000:1 x:y 01"]
        {
            assert_eq!(socket(wrong), None);
        }
    }
}
