//! The vocabulary, as newtypes, so that an address cannot be passed in the wrong role.

use std::{
    cmp::Ordering,
    collections::BTreeSet,
    fmt,
    hash::{Hash, Hasher},
    io,
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
    os::fd::OwnedFd,
    str::FromStr,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use crate::word::worded;

/// A port that something can listen on: 1 to 65535.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Port(NonZeroU16);

impl Port {
    /// `None` for 0, which is not a port.
    pub const fn new(port: u16) -> Option<Self> {
        match NonZeroU16::new(port) {
            Some(port) => Some(Self(port)),
            None => None,
        }
    }

    pub const fn get(self) -> u16 {
        self.0.get()
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Port {
    type Err = NotAPort;

    /// Accepts decimal digits only, no sign and no space, as in the port of a URI (RFC 3986, 3.2.3).
    fn from_str(text: &str) -> Result<Self, NotAPort> {
        if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
            return Err(NotAPort(text.to_owned()));
        }
        text.parse().ok().and_then(Port::new).ok_or_else(|| NotAPort(text.to_owned()))
    }
}

worded! {
    /// The transport protocol of a binding.
    pub enum Protocol {
        /// connections, on the proxy path or on the kernel path
        Tcp = "tcp",
        /// datagrams, on the kernel path only
        Udp = "udp",
    }
}

/// A port as users write it: `53/udp`; of TCP the number alone.
pub fn port_of(port: impl fmt::Display, protocol: Protocol) -> String {
    match protocol {
        Protocol::Tcp => port.to_string(),
        Protocol::Udp => format!("{port}/udp"),
    }
}

/// A time of a process's monotonic clock, in milliseconds since its start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Millis(pub u64);

impl Millis {
    /// This time plus `time`.
    pub fn after(self, time: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(time.as_millis()).unwrap_or(u64::MAX)))
    }
}

/// Text that is not a port.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("port {0:?} is not a number from 1 to 65535")]
pub struct NotAPort(pub String);

/// The full ID that the engine gave a container. Unlike the container's address and name, it is never reused.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContainerId(Arc<str>);

impl ContainerId {
    pub fn new(id: &str) -> Self {
        Self(id.into())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ContainerId {
    /// The first 12 characters, as `docker ps` shows it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.get(..12).unwrap_or(&self.0))
    }
}

impl fmt::Debug for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The identity of a consumer. Two runs of one container are two consumers: the routes of the first run ended with it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ConsumerId {
    /// A container, and the start of its current run as the engine wrote it (`State.StartedAt`).
    Container { id: ContainerId, started_at: Arc<str> },
    /// This host or network namespace itself: the static provider.
    Local,
}

impl ConsumerId {
    /// The container's full ID, or `local`.
    pub fn full(&self) -> &str {
        match self {
            Self::Container { id, .. } => id.as_str(),
            Self::Local => "local",
        }
    }
}

impl fmt::Display for ConsumerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Container { id, .. } => id.fmt(f),
            Self::Local => f.write_str("local"),
        }
    }
}

/// Allows to wait for the end of a container's run. Clones share their state. All values are equal, because the end is not
/// part of a container's identity.
#[derive(Debug, Clone, Default)]
pub struct RunEnd(Arc<Run>);

#[derive(Debug, Default)]
struct Run {
    ended: AtomicBool,
    process: OnceLock<Process>,
    descriptor: OnceLock<Arc<OwnedFd>>,
    network_shown: AtomicBool,
    addresses: Mutex<Option<ReadAddresses>>,
}

/// The addresses in the network of a run.
#[derive(Debug)]
struct ReadAddresses {
    all: BTreeSet<IpAddr>,
    /// How many interfaces had disappeared from this host when the addresses were read.
    moves: u64,
    at: Instant,
}

impl RunEnd {
    pub fn mark_ended(&self) {
        self.0.ended.store(true, Relaxed);
    }

    pub fn has_ended(&self) -> bool {
        self.0.ended.load(Relaxed)
    }

    /// Whether both belong to the same run.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Records the run's first process. Later calls change nothing.
    pub fn is_that_of(&self, process: Process) {
        self.0.process.get_or_init(|| process);
    }

    /// The run's first process, if it was seen.
    pub fn process(&self) -> Option<Process> {
        self.0.process.get().copied()
    }

    /// Records the pidfd of the run's first process. Later calls change nothing.
    pub fn is_held_by(&self, descriptor: Arc<OwnedFd>) {
        self.0.descriptor.get_or_init(|| descriptor);
    }

    /// The pidfd of the run's first process, if it was seen.
    pub fn descriptor(&self) -> Option<&Arc<OwnedFd>> {
        self.0.descriptor.get()
    }

    /// Records that the kernel shows the container's address in its process's network. For a sandbox with its own network
    /// it does not.
    pub fn shows_network(&self) {
        self.0.network_shown.store(true, Relaxed);
    }

    /// Whether the kernel's view of the container's network can be relied on.
    pub fn has_shown_network(&self) -> bool {
        self.0.network_shown.load(Relaxed)
    }

    /// An address that was missing in the network is not looked up again for this long.
    pub const WITHOUT_ADDRESS: Duration = Duration::from_millis(100);

    /// Whether its network has an address, when `moves` interfaces have disappeared from this host. `read` reads the
    /// addresses. For an address that is there it is called once per disappeared interface, for all callers. An interface
    /// gets its address after it appears, so a missing address is looked up again, at most once in
    /// [`Self::WITHOUT_ADDRESS`]. `None` if the addresses cannot be read.
    pub fn has_address(
        &self,
        address: IpAddr,
        moves: u64,
        now: Instant,
        read: impl FnOnce() -> io::Result<BTreeSet<IpAddr>>,
    ) -> Option<bool> {
        let mut known = self.0.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ReadAddresses { all, moves: at_moves, at }) = &*known
            && *at_moves == moves
        {
            let has = all.contains(&address);
            if has || now < *at + Self::WITHOUT_ADDRESS {
                return Some(has);
            }
        }
        let all = read().ok()?;
        let has = all.contains(&address);
        *known = Some(ReadAddresses { all, moves, at: now });
        Some(has)
    }
}

/// The container runs on which an endpoint on this host depends. When one of them ends, the endpoint's address may
/// immediately belong to another container. Equal values have the same runs.
#[derive(Debug, Clone, Default)]
pub struct Stay {
    /// The run of the container, and the run of the container that owns its network, if that is another one.
    pub runs: Vec<(ContainerId, RunEnd)>,
    /// Ends when one of these containers leaves its address, or when another source than its process reports its end.
    pub left: Vec<RunEnd>,
}

impl Stay {
    /// Whether the endpoint is known to be gone, even if the answer still has it.
    pub fn is_over(&self) -> bool {
        self.ends().any(RunEnd::has_ended)
    }

    fn ends(&self) -> impl Iterator<Item = &RunEnd> {
        self.runs.iter().map(|(_, end)| end).chain(&self.left)
    }
}

impl PartialEq for Stay {
    fn eq(&self, other: &Self) -> bool {
        self.ends().map(|end| Arc::as_ptr(&end.0)).eq(other.ends().map(|end| Arc::as_ptr(&end.0)))
    }
}

impl Eq for Stay {}

/// A process, identified by its ID and its start time in clock ticks since boot (man 5 proc, `/proc/pid/stat`). The pair is
/// unique until the next boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    pub pid: i32,
    pub started: u64,
}

impl PartialEq for RunEnd {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for RunEnd {}

/// A service's name in discovery: `[A-Za-z0-9/._*@-]+`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceName(Arc<str>);

impl ServiceName {
    /// `None` if the text is empty or contains another character.
    pub fn new(name: &str) -> Option<Self> {
        let valid = |b: u8| b.is_ascii_alphanumeric() || b"/._*@-".contains(&b);
        (!name.is_empty() && name.bytes().all(valid)).then(|| Self(name.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The tags that an endpoint must have, all of them. They are shown in the order in which the user wrote them. The order
/// does not matter for equality.
#[derive(Debug, Clone, Default)]
pub struct Tags {
    /// Without duplicates.
    written: Vec<Arc<str>>,
    sorted: Vec<Arc<str>>,
}

impl Tags {
    pub fn new<'a>(tags: impl IntoIterator<Item = &'a str>) -> Self {
        let mut written: Vec<Arc<str>> = Vec::new();
        for tag in tags {
            if !written.iter().any(|one| **one == *tag) {
                written.push(tag.into());
            }
        }
        let mut sorted = written.clone();
        sorted.sort();
        Self { written, sorted }
    }

    pub fn is_empty(&self) -> bool {
        self.written.is_empty()
    }

    /// In the order in which they were written.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.written.iter().map(AsRef::as_ref)
    }

    /// Whether the tags `carried` by an endpoint include all of these.
    pub fn all_in<S: AsRef<str>>(&self, carried: &[S]) -> bool {
        self.iter().all(|wanted| carried.iter().any(|tag| tag.as_ref() == wanted))
    }
}

impl fmt::Display for Tags {
    /// `[tag,tag]`, or nothing if there are no tags.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, tag) in self.iter().enumerate() {
            write!(f, "{}{tag}", if i == 0 { "[" } else { "," })?;
        }
        f.write_str(if self.is_empty() { "" } else { "]" })
    }
}

impl PartialEq for Tags {
    fn eq(&self, other: &Self) -> bool {
        self.sorted == other.sorted
    }
}

impl Eq for Tags {}

impl PartialOrd for Tags {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Tags {
    fn cmp(&self, other: &Self) -> Ordering {
        self.sorted.cmp(&other.sorted)
    }
}

impl Hash for Tags {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.sorted.hash(state);
    }
}

/// The source of a captured connection: the consumer's address and port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SourceAddress(pub SocketAddr);

impl fmt::Display for SourceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The original destination of a captured connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OriginalDestination(pub SocketAddr);

impl fmt::Display for OriginalDestination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The address and port of one instance of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint(pub SocketAddr);

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A virtual IP: an address on which traffic is captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vip(pub IpAddr);

impl fmt::Display for Vip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_port_is_digits_from_1_to_65535() {
        assert_eq!("1".parse::<Port>().map(Port::get), Ok(1));
        assert_eq!("65535".parse::<Port>().map(Port::get), Ok(65535));
        for wrong in ["", "0", "65536", "99999", "+80", " 80", "80 ", "8e1", "-1", "٨٠"] {
            assert_eq!(wrong.parse::<Port>(), Err(NotAPort(wrong.to_owned())));
        }
    }

    /// An interface first moves into a container, and then gets its address.
    #[test]
    fn an_address_that_a_network_does_not_have_yet_is_looked_for_again_and_not_too_often() {
        let (run, start) = (RunEnd::default(), Instant::now());
        let [old, new, never] = [2, 3, 4].map(|last| IpAddr::from([172, 17, 0, last]));
        let (mut there, mut reads) = (BTreeSet::from([old]), 0);
        let mut has = |address, moves, at, there: &BTreeSet<IpAddr>| {
            let now = start + RunEnd::WITHOUT_ADDRESS * at;
            let read = || {
                reads += 1;
                Ok(there.clone())
            };
            (run.has_address(address, moves, now, read), reads)
        };
        assert_eq!(has(old, 6, 0, &there), (Some(true), 1));
        assert_eq!(has(new, 6, 0, &there), (Some(false), 1), "it was read just now");
        there.insert(new);
        assert_eq!(has(old, 6, 9, &there), (Some(true), 1), "what is there is not read again");
        assert_eq!(has(new, 6, 9, &there), (Some(true), 2));
        assert_eq!(has(never, 6, 9, &there), (Some(false), 2));
        assert_eq!(has(never, 6, 10, &there), (Some(false), 3));
        there.remove(&old);
        assert_eq!(has(old, 7, 10, &there), (Some(false), 4), "an interface went");
        let fails = || Err(io::ErrorKind::Other.into());
        assert_eq!(run.has_address(old, 8, start, fails), None);
    }

    #[test]
    fn tags_are_a_set_and_all_must_be_carried() {
        let tags = Tags::new(["prod", "app1", "prod"]);
        let sorted = Tags::new(["app1", "prod"]);
        assert_eq!((&tags, tags.cmp(&sorted)), (&sorted, Ordering::Equal));
        assert!(HashSet::from([sorted.clone()]).contains(&tags));
        assert_eq!(
            [tags.to_string(), sorted.to_string(), Tags::default().to_string()],
            ["[prod,app1]", "[app1,prod]", ""],
            "they are shown as they were written"
        );
        assert!(tags.all_in(&["app1", "x", "prod"]));
        assert!(!tags.all_in(&["app1"]));
        assert!(Tags::default().all_in::<&str>(&[]));
    }
}
