//! The data of one connection of a route: for the counts, the log and the API, however it ends.

use std::{
    cell::{Cell, RefCell},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{captured::Captured, relay::Moved};
use crate::{balance::EndpointState, table::Route};

/// An address and port without the rest of a `SocketAddr`, which would make every idle connection larger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Local(IpAddr, u16);

impl From<SocketAddr> for Local {
    fn from(address: SocketAddr) -> Self {
        Self(address.ip(), address.port())
    }
}

impl From<Local> for SocketAddr {
    fn from(Local(ip, port): Local) -> Self {
        Self::new(ip, port)
    }
}

#[derive(Debug, Clone)]
pub(super) struct Record {
    pub route: Arc<Route>,
    pub captured: Captured,
    pub accepted: Instant,
    /// The endpoint that it uses or tries. `None` before the first attempt.
    pub endpoint: RefCell<Option<Arc<EndpointState>>>,
    /// The time from accepting it until its endpoint connection was open. `None` before.
    pub connect: Cell<Option<Duration>>,
    /// Our own address and port of the connection to the endpoint. The endpoint sees only these.
    pub local: Cell<Option<Local>>,
    pub tries: Cell<u8>,
    pub moved: Moved,
    /// The part of `moved` that was added to the counters.
    pub counted: Moved,
}

impl Record {
    pub(super) fn new(route: Arc<Route>, captured: Captured, accepted: Instant) -> Self {
        Self {
            route,
            captured,
            accepted,
            endpoint: RefCell::default(),
            connect: Cell::default(),
            local: Cell::default(),
            tries: Cell::default(),
            moved: Moved::default(),
            counted: Moved::default(),
        }
    }

    /// The endpoint that accepted the connection.
    pub(super) fn connected_to(&self) -> Option<Arc<EndpointState>> {
        self.connect.get().and_then(|_| self.endpoint.borrow().clone())
    }

    /// The bytes that it moved up and down since the last call.
    pub(super) fn moved_since(&self) -> (u64, u64) {
        let since = |moved: &Cell<u64>, counted: &Cell<u64>| {
            // Queued bytes count as moved until it turns out that they cannot be sent. Counts never decrease, so they wait
            // for that.
            let now = moved.get().max(counted.get());
            now - counted.replace(now)
        };
        (since(&self.moved.up, &self.counted.up), since(&self.moved.down, &self.counted.down))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::testing::{captured, table};

    #[test]
    fn what_was_counted_is_not_taken_back_when_it_could_not_be_sent() {
        let (route, peer) = (table().routes().next().unwrap().clone(), ([127, 0, 0, 1], 1).into());
        let record = Record::new(route, captured(peer, peer), Instant::now());
        let counts = [10, 4, 9, 12].map(|moved| {
            record.moved.up.set(moved);
            record.moved_since()
        });
        assert_eq!(counts, [(10, 0), (0, 0), (0, 0), (2, 0)]);
    }
}
