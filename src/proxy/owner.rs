//! The owner of a connection that may be older than its route. It may have waited, unaccepted, while its container ended
//! and another one got the address. Its data is not for the services of the other one.
//!
//! If that is possible, the kernel is asked: a connection belongs to the owner if its other end is a socket in the owner's
//! network namespace. That socket exists until well after a container has ended its direction, or closed. The kernel
//! searches all sockets of the machine for this, so a separate thread asks it.

#![expect(clippy::disallowed_methods, reason = "reads files of the kernel, which need no disk")]

use std::{
    cell::{Cell, RefCell},
    collections::HashSet,
    fs,
    io::{BufRead, BufReader},
    net::{IpAddr, Ipv6Addr, SocketAddr},
    rc::Rc,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::{net::TcpStream, sync::oneshot, task::spawn_local};

use super::captured::Captured;
use crate::{
    docker::process,
    model::{ConsumerId, RunEnd},
    table::Route,
};

/// How long a connection may wait in the kernel's queue without a reason known to us, such as missing descriptors: because
/// the machine is overloaded or was stopped.
pub(super) const DELAY: Duration = Duration::from_secs(5);

/// How often sockets are looked for until all are found.
const LOOKS: usize = 3;

/// A time during which no connection was accepted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pause {
    start: Instant,
    end: Instant,
}

impl Pause {
    /// The pause that began at `start` and ends now. It is joined with a pause that ended shortly before, because
    /// connections that waited in that one may still wait.
    pub(super) fn ended(before: Option<Self>, start: Instant) -> Self {
        let end = Instant::now();
        let before = before.filter(|before| before.end + DELAY >= start);
        Self { start: before.map_or(start, |before| before.start.min(start)), end }
    }
}

/// Why a connection may be older than its route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Doubt {
    /// The route appeared during a pause in accepting, or later, while connections from that time may still wait.
    Waited,
    /// The route has only just appeared.
    New,
}

/// Why a connection that is accepted now may be older than `route`. Makes no system calls.
pub(super) fn doubt(route: &Route, pause: Option<Pause>, now: Instant) -> Option<Doubt> {
    // This host's own addresses do not change owners.
    let born = route.born.filter(|_| route.consumer != ConsumerId::Local)?;
    match pause {
        Some(pause) if pause.end + DELAY > now && born + DELAY > pause.start => Some(Doubt::Waited),
        _ => (born + DELAY > now).then_some(Doubt::New),
    }
}

/// The owner of a route, if its process shows the owner's addresses: it is visible, and not a sandbox.
pub(super) fn shown(route: &Route) -> Option<&RunEnd> {
    // The last one owns the network namespace.
    route.ends.last().filter(|owner| owner.has_shown_network() && owner.process().is_some())
}

/// Whether the peer has ended its direction or is gone. Asks the kernel, because the runtime knows nothing yet about a new
/// socket.
pub(super) fn has_hung_up(stream: &TcpStream) -> bool {
    let mut sockets = [PollFd::new(stream, PollFlags::RDHUP)];
    let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    // If the kernel does not answer, the worse case is assumed.
    poll(&mut sockets, Some(&Timespec::default()))
        .map_or(true, |_| sockets[0].revents().intersects(gone))
}

/// Whether the kernel shows the sockets of a route's owner. It does not if the owner's process is not visible, or is a
/// sandbox with its own network.
pub(super) fn shows_sockets(route: &Route) -> bool {
    let owner = route.ends.last();
    owner.is_some_and(|owner| owner.has_shown_network() && owner.process().is_some())
}

/// Looks for the sockets of routes' owners, for one worker. One look at a time serves all connections that wait for the
/// same owner.
#[derive(Debug, Default)]
pub(super) struct Looks {
    waiting: RefCell<Vec<Question>>,
    is_looking: Cell<bool>,
}

/// The question whether a socket is in the network of these runs.
#[derive(Debug)]
struct Question {
    runs: Vec<RunEnd>,
    socket: Pair,
    answer: oneshot::Sender<bool>,
}

/// The addresses of a socket: its own, and the peer's.
type Pair = (SocketAddr, SocketAddr);

impl Looks {
    /// Whether the other end of a connection is certainly a socket of the route's owner, or of a container that shares its
    /// network. Always false if processes are not visible.
    pub(super) async fn are_owners(self: &Rc<Self>, route: &Route, captured: &Captured) -> bool {
        let socket = (captured.source.0, captured.destination.0);
        let (answer, answered) = oneshot::channel();
        self.waiting.borrow_mut().push(Question { runs: route.ends.clone(), socket, answer });
        if !self.is_looking.replace(true) {
            let looks = self.clone();
            // Separate from the connection that asks, because that one's task may be aborted.
            spawn_local(async move { looks.look().await });
        }
        answered.await.unwrap_or(false)
    }

    async fn look(&self) {
        while let Some(questions) = self.next() {
            let runs = questions.first().map(|one| one.runs.clone()).unwrap_or_default();
            let sockets: HashSet<_> = questions.iter().map(|one| one.socket).collect();
            // This takes the kernel up to a microsecond per socket, and this thread has other work.
            let look = move || owned(&runs, sockets);
            let owned = tokio::task::spawn_blocking(look).await.unwrap_or_default();
            for Question { socket, answer, .. } in questions {
                // A connection that has ended meanwhile does not wait any more.
                let _ = answer.send(owned.contains(&socket));
            }
        }
        self.is_looking.set(false);
    }

    /// All questions about the owner of the oldest question.
    fn next(&self) -> Option<Vec<Question>> {
        let mut waiting = self.waiting.borrow_mut();
        waiting.retain(|one| !one.answer.is_closed());
        let first = waiting.first()?.runs.clone();
        let are_same = |runs: &[RunEnd]| {
            runs.len() == first.len() && runs.iter().zip(&first).all(|(one, other)| one.is(other))
        };
        Some(waiting.extract_if(.., |one| are_same(&one.runs)).collect())
    }
}

/// The sockets that are in the network of these runs. Empty unless all of the runs continue.
fn owned(runs: &[RunEnd], mut sockets: HashSet<Pair>) -> HashSet<Pair> {
    let mut seen = runs.iter().rev().filter(|run| run.process().is_some());
    // All of them share one network. The last one owns it.
    let found = seen.next().and_then(|owner| {
        process::look(owner, |pid| {
            // The kernel lists sockets page by page, and skips some if their neighbours change meanwhile.
            let mut found = HashSet::new();
            for _ in 0..LOOKS {
                found.extend(sockets_of(pid, &mut sockets));
                if sockets.is_empty() {
                    break;
                }
            }
            // The others are checked before the owner is checked again.
            seen.all(|run| process::look(run, |_| ()).is_some()).then_some(found)
        })?
    });
    found.filter(|_| !runs.iter().any(RunEnd::has_ended)).unwrap_or_default()
}

/// The `wanted` sockets that are in a process's network.
fn sockets_of(pid: i32, wanted: &mut HashSet<Pair>) -> HashSet<Pair> {
    // Maximum number of lines per list (30 MB of text), so that a namespace with more does not make a look longer.
    const MOST: usize = 200_000;
    let mut found = HashSet::new();
    for list in ["tcp", "tcp6"] {
        let Ok(list) = fs::File::open(format!("/proc/{pid}/net/{list}")) else { continue };
        let mut list = BufReader::new(list);
        let mut line = String::new();
        for _ in 0..MOST {
            line.clear();
            if wanted.is_empty() || !matches!(list.read_line(&mut line), Ok(1..)) {
                break;
            }
            if let Some(one) = socket(&line).filter(|one| wanted.remove(one)) {
                found.insert(one);
            }
        }
    }
    found
}

/// The addresses of a socket in a line of `/proc/net/tcp` or `tcp6`. `None` if it is still connecting.
fn socket(line: &str) -> Option<(SocketAddr, SocketAddr)> {
    // TCP_SYN_SENT (include/net/tcp_states.h).
    const DIALLING: &str = "02";
    let mut fields = line.split_whitespace().skip(1);
    let (local, remote, state) = (fields.next()?, fields.next()?, fields.next()?);
    (state != DIALLING).then_some(())?;
    Some((address(local)?, address(remote)?))
}

/// Parses an address as the kernel writes it: words of 32 bits in hexadecimal digits, each in the machine's byte order.
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
            // An IPv6 socket may have an IPv4 connection.
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
        let has_socket =
            |pid, local, remote| !sockets_of(pid, &mut [(local, remote)].into()).is_empty();
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

    /// `unshare --net sh -c 'ip link set lo up; cargo test --lib figures_of_a_look -- --ignored --nocapture'`
    #[test]
    #[ignore = "prints figures"]
    fn figures_of_a_look() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let listeners: Vec<_> = (0..8).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let target = listeners[0].local_addr().unwrap();
        let client = std::net::TcpStream::connect(target).unwrap();
        let there = (client.local_addr().unwrap(), target);
        let absent = ("127.0.0.9:9".parse().unwrap(), target);
        let mut made = 0;
        for wanted in [0, 1_000, 10_000, 50_000] {
            while made < wanted {
                let listener = &listeners[made % listeners.len()];
                let one = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
                let (other, _) = listener.accept().unwrap();
                // Its end stays in the list for a minute.
                drop(one);
                drop(other);
                made += 1;
            }
            for (what, socket) in [("there", there), ("absent", absent)] {
                let mut times: Vec<_> = (0..11)
                    .map(|_| {
                        let start = Instant::now();
                        sockets_of(pid, &mut [socket].into());
                        start.elapsed()
                    })
                    .collect();
                times.sort();
                println!(
                    "{wanted} sockets, {what}: {:?} ({:?} to {:?})",
                    times[5], times[0], times[10]
                );
            }
        }
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
