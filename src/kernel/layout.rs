//! What is in the kernel's maps, as bytes: the structures of `bpf/connect.c`, in the order and with the sizes that they have there. Pure.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::{
    counts::Distribution,
    model::{Endpoint, Port, Protocol},
    path::MOST_ENDPOINTS,
};

pub(super) type KeyBytes = [u8; 32];
pub(super) type RouteBytes = [u8; 48];
pub(super) type SetBytes = [u8; 24 + 4 * MOST_ENDPOINTS];
pub(super) type EndpointBytes = [u8; 32];
pub(super) type MarkBytes = [u8; 8];
pub(super) type LiveBytes = [u8; 32];
pub(super) type CountsBytes = [u8; 232];
pub(super) const NO_COUNTS: CountsBytes = [0; 232];
/// `struct peer`: what is stored for a socket.
pub(super) const PEER: usize = 72;
pub(super) const RECORD: usize = 96;

/// A place in the kernel's tables, and which of its owners this one is: 1 for the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Place {
    pub(super) index: u32,
    pub(super) generation: u32,
}

/// What a route is found by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Key {
    /// The inode of the control group's folder.
    pub(super) cgroup: u64,
    pub(super) vip: IpAddr,
    pub(super) port: Port,
    pub(super) protocol: Protocol,
}

/// The protocol's number (IPPROTO_TCP, IPPROTO_UDP).
fn number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
    }
}

/// Writes fields one after the other.
struct Writer<const N: usize> {
    bytes: [u8; N],
    at: usize,
}

impl<const N: usize> Writer<N> {
    fn new() -> Self {
        Self { bytes: [0; N], at: 0 }
    }

    fn put(mut self, field: &[u8]) -> Self {
        let end = self.at + field.len();
        if let Some(place) = self.bytes.get_mut(self.at..end) {
            place.copy_from_slice(field);
        }
        self.at = end;
        self
    }
}

/// Reads fields one after the other.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (field, rest) = self.0.split_first_chunk().map_or(([0; N], &[][..]), |(f, r)| (*f, r));
        self.0 = rest;
        field
    }

    fn u16(&mut self) -> u16 {
        u16::from_ne_bytes(self.take())
    }

    fn u32(&mut self) -> u32 {
        u32::from_ne_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_ne_bytes(self.take())
    }

    fn address(&mut self) -> IpAddr {
        Ipv6Addr::from(self.take()).to_canonical()
    }
}

/// In network order, IPv4 addresses v4-mapped.
fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

impl Key {
    pub(super) fn bytes(&self) -> KeyBytes {
        Writer::new()
            .put(&self.cgroup.to_ne_bytes())
            .put(&octets(self.vip))
            .put(&self.port.get().to_be_bytes())
            .put(&[number(self.protocol)])
            .bytes
    }
}

/// `is_cautious`: while its service is in doubt, its connections are left to the proxy.
pub(super) fn route(
    key: &Key,
    service: u32,
    generation: u32,
    least_connections: bool,
    is_cautious: bool,
) -> RouteBytes {
    Writer::new()
        .put(&key.bytes())
        .put(&service.to_ne_bytes())
        .put(&generation.to_ne_bytes())
        .put(&u32::from(least_connections).to_ne_bytes())
        .put(&u32::from(is_cautious).to_ne_bytes())
        .bytes
}

/// Endpoints beyond [`MOST_ENDPOINTS`] are left out. So many of them as `stay`, the first, were in the set before.
pub(super) fn set(
    service: u32,
    generation: u32,
    base: u64,
    endpoints: &[u32],
    stay: u32,
) -> SetBytes {
    let endpoints = endpoints.get(..MOST_ENDPOINTS).unwrap_or(endpoints);
    let head = Writer::new()
        .put(&service.to_ne_bytes())
        .put(&generation.to_ne_bytes())
        .put(&base.to_ne_bytes())
        .put(&(endpoints.len() as u32).to_ne_bytes())
        .put(&stay.to_ne_bytes());
    endpoints.iter().fold(head, |set, index| set.put(&index.to_ne_bytes())).bytes
}

/// Which set a service has: in one word, so that it changes at once.
pub(super) fn current(set: Place) -> u64 {
    u64::from(set.generation) << 32 | u64::from(set.index)
}

/// `since`: when it joined others, in nanoseconds of CLOCK_MONOTONIC; 0: it did not.
pub(super) fn endpoint(endpoint: &Endpoint, generation: u32, since: u64) -> EndpointBytes {
    Writer::new()
        .put(&octets(endpoint.0.ip()))
        .put(&endpoint.0.port().to_be_bytes())
        .put(&[0; 2])
        .put(&generation.to_ne_bytes())
        .put(&since.to_ne_bytes())
        .bytes
}

/// Whether an endpoint is to be used: `IS_OUT` and `IS_DRAINED` of connect.c.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Usage {
    Used = 0,
    /// Something is held against it.
    Out = 1,
    Drained = 2,
}

pub(super) fn mark(usage: Usage, active: u32) -> MarkBytes {
    Writer::new().put(&(usage as u32).to_ne_bytes()).put(&active.to_ne_bytes()).bytes
}

/// What the kernel knows of an endpoint.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Live {
    /// Connections that are being opened or are open.
    pub(super) active: u64,
    /// Those of them that wait for the answer to their SYN.
    pub(super) waiting: u64,
    /// Since when at the longest, in nanoseconds of CLOCK_MONOTONIC.
    waiting_since: u64,
    /// How long a connect usually takes, in nanoseconds.
    usual: u64,
}

impl Live {
    pub(super) fn read(bytes: &LiveBytes) -> Self {
        let mut reader = Reader(bytes);
        Self {
            active: reader.u64(),
            waiting: reader.u64(),
            waiting_since: reader.u64(),
            usual: reader.u64(),
        }
    }

    /// Whether an answer is late, as the kernel's program judges it: `load_of` in connect.c.
    pub(super) fn is_late(&self, now: u64) -> bool {
        const PATIENCE: u64 = 20_000_000;
        let patience = self.usual.saturating_mul(4).max(PATIENCE);
        self.waiting > 0 && now > self.waiting_since.saturating_add(patience)
    }
}

/// `BUCKETS` of connect.c.
const BUCKETS: usize = 16;

/// What the kernel counted of a route or an endpoint since its place was given to it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counted {
    pub(super) started: u64,
    pub(super) opened: u64,
    pub(super) failed: u64,
    pub(super) closed: u64,
    pub(super) reset: u64,
    pub(super) reset_after_close: u64,
    pub(super) route_gone: u64,
    pub(super) endpoint_gone: u64,
    pub(super) bytes_up: u64,
    pub(super) bytes_down: u64,
    pub(super) connect: Distribution,
    pub(super) datagrams_up: u64,
    pub(super) datagrams_down: u64,
}

impl Counted {
    pub(super) fn read(bytes: &CountsBytes) -> Self {
        let mut reader = Reader(bytes);
        Self {
            started: reader.u64(),
            opened: reader.u64(),
            failed: reader.u64(),
            closed: reader.u64(),
            reset: reader.u64(),
            reset_after_close: reader.u64(),
            route_gone: reader.u64(),
            endpoint_gone: reader.u64(),
            bytes_up: reader.u64(),
            bytes_down: reader.u64(),
            connect: Distribution {
                micros: reader.u64(),
                // There is room for more of them than there are.
                buckets: {
                    let all: [u64; BUCKETS] = std::array::from_fn(|_| reader.u64());
                    std::array::from_fn(|n| all.get(n).copied().unwrap_or_default())
                },
            },
            datagrams_up: reader.u64(),
            datagrams_down: reader.u64(),
        }
    }

    /// Connections that have not ended.
    pub(super) fn active(&self) -> u64 {
        let gone = self.route_gone + self.endpoint_gone;
        let ended = self.failed + self.closed + self.reset + self.reset_after_close + gone;
        self.started.saturating_sub(ended)
    }

    /// What was counted since `earlier`.
    pub(super) fn since(&self, earlier: &Self) -> Self {
        let less = |now: u64, then: u64| now.saturating_sub(then);
        Self {
            started: less(self.started, earlier.started),
            opened: less(self.opened, earlier.opened),
            failed: less(self.failed, earlier.failed),
            closed: less(self.closed, earlier.closed),
            reset: less(self.reset, earlier.reset),
            reset_after_close: less(self.reset_after_close, earlier.reset_after_close),
            route_gone: less(self.route_gone, earlier.route_gone),
            endpoint_gone: less(self.endpoint_gone, earlier.endpoint_gone),
            bytes_up: less(self.bytes_up, earlier.bytes_up),
            bytes_down: less(self.bytes_down, earlier.bytes_down),
            connect: self.connect.since(&earlier.connect),
            datagrams_up: less(self.datagrams_up, earlier.datagrams_up),
            datagrams_down: less(self.datagrams_down, earlier.datagrams_down),
        }
    }
}

/// How a connection ended: `enum outcome` of connect.c.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Closed,
    Reset,
    ResetAfterClose,
    Failed,
    /// It has not ended: its SYN was not answered for a second.
    Unanswered,
    /// embassy ended it.
    Gone(Gone),
}

/// Why embassy ends a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Gone {
    Route = 5,
    Endpoint = 6,
}

/// A connection, or a flow of UDP, that has ended. Times are in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct EndedConnection {
    pub(super) route: Place,
    pub(super) endpoint: Place,
    pub(super) lasted: u64,
    /// `None`: it was never open.
    pub(super) connect: Option<u64>,
    /// Of UDP: datagrams.
    pub(super) bytes_up: u64,
    pub(super) bytes_down: u64,
    pub(super) vip: SocketAddr,
    /// Of UDP without an address.
    pub(super) local: SocketAddr,
    pub(super) end: End,
}

impl EndedConnection {
    /// `None` if it is no record.
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader(bytes.get(..RECORD)?);
        let route = Place { index: reader.u32(), generation: reader.u32() };
        let endpoint = Place { index: reader.u32(), generation: reader.u32() };
        let (start, end) = (reader.u64(), reader.u64());
        let connect = Some(reader.u64()).filter(|took| *took != 0);
        let (bytes_up, bytes_down) = (reader.u64(), reader.u64());
        let (vip, local) = (reader.address(), reader.address());
        let (local_port, vip_port) = (reader.u16(), reader.u16());
        Some(Self {
            route,
            endpoint,
            lasted: end.saturating_sub(start),
            connect,
            bytes_up,
            bytes_down,
            vip: SocketAddr::new(vip, vip_port),
            local: SocketAddr::new(local, local_port),
            end: match reader.u32() {
                0 => End::Closed,
                1 => End::Reset,
                2 => End::ResetAfterClose,
                3 => End::Failed,
                4 => End::Unanswered,
                5 => End::Gone(Gone::Route),
                6 => End::Gone(Gone::Endpoint),
                _ => return None,
            },
        })
    }
}

/// What is stored for a socket that took this way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Peer {
    pub(super) endpoint: Endpoint,
    pub(super) route: Place,
    /// Whether it is being opened or is open.
    pub(super) is_live: bool,
}

impl Peer {
    /// `None` if it is not one.
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader(bytes.get(..PEER)?);
        let (_vip, address) = (reader.address(), reader.address());
        let (_vip_port, port) = (reader.u16(), u16::from_be_bytes(reader.take()));
        // `enum state`: CONNECTING and OPEN.
        let is_live = matches!(reader.u32(), 2 | 3);
        let route = Place { index: reader.u32(), generation: reader.u32() };
        Some(Self { endpoint: Endpoint(SocketAddr::new(address, port)), route, is_live })
    }
}

/// Why connections were left to the proxy, and what was lost: `enum note` of connect.c.
pub(super) const NOTES: usize = 6;
pub(super) const RECORDS_LOST: usize = 4;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_ipv4_address_is_written_as_a_mapped_one_and_ports_in_network_order() {
        let (vip, port) = ([172, 17, 0, 1].into(), Port::new(258).unwrap());
        let key = Key { cgroup: 7, vip, port, protocol: Protocol::Tcp };
        let mut expected = [0; 32];
        expected[..8].copy_from_slice(&7_u64.to_ne_bytes());
        expected[18..20].fill(0xff);
        expected[20..24].copy_from_slice(&[172, 17, 0, 1]);
        expected[24..27].copy_from_slice(&[1, 2, 6]);
        assert_eq!(key.bytes(), expected);
        let mapped = Key { vip: "::ffff:172.17.0.1".parse().unwrap(), ..key };
        assert_eq!(mapped.bytes(), expected);
        expected[26] = 17;
        assert_eq!(Key { protocol: Protocol::Udp, ..key }.bytes(), expected);
    }

    #[test]
    fn counts_are_read_where_the_kernel_writes_them() {
        let mut bytes = [0; 232];
        for (n, field) in bytes.chunks_mut(8).enumerate() {
            field.copy_from_slice(&(n as u64 + 1).to_ne_bytes());
        }
        let counted = Counted::read(&bytes);
        assert_eq!((counted.started, counted.bytes_down), (1, 10));
        assert_eq!((counted.connect.micros, counted.connect.buckets[0]), (11, 12));
        assert_eq!((counted.datagrams_up, counted.datagrams_down), (28, 29));
    }

    #[test]
    fn a_set_has_its_places_after_its_head_and_no_more_than_there_is_room_for() {
        let places: Vec<_> = (100..300).collect();
        let bytes = set(1, 2, 3, &places, 7);
        assert_eq!(bytes[..4], 1_u32.to_ne_bytes());
        assert_eq!(bytes[16..20], (MOST_ENDPOINTS as u32).to_ne_bytes());
        assert_eq!(bytes[20..24], 7_u32.to_ne_bytes());
        assert_eq!(bytes[24..28], 100_u32.to_ne_bytes());
        assert_eq!(bytes[bytes.len() - 4..], (99 + MOST_ENDPOINTS as u32).to_ne_bytes());
        assert_eq!(current(Place { index: 5, generation: 9 }), 9 << 32 | 5);
    }

    #[test]
    fn an_answer_is_late_after_four_times_the_usual_time_and_at_least_20_ms() {
        const MS: u64 = 1_000_000;
        let live = |waiting, usual| Live { active: 1, waiting, waiting_since: 100 * MS, usual };
        for (usual, patience) in [(0, 20), (1, 20), (5, 20), (6, 24), (50, 200)] {
            let last = (100 + patience) * MS;
            assert!(!live(1, usual * MS).is_late(last), "{usual}");
            assert!(live(1, usual * MS).is_late(last + 1), "{usual}");
            assert!(!live(0, usual * MS).is_late(u64::MAX), "nobody waits");
        }
    }

    proptest! {
        #[test]
        fn whatever_the_kernel_writes_is_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let record = EndedConnection::read(&bytes);
            prop_assert!(record.is_none() || bytes.len() >= RECORD);
        }
    }
}
