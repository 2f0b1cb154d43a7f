//! What one connection of a route did: for the counts, the log and the API, however it ends.

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
    /// Where it goes, or is about to; `None` before the first try.
    pub endpoint: RefCell<Option<Arc<EndpointState>>>,
    /// From accepting it until its endpoint's was open; `None` before that.
    pub connect: Cell<Option<Duration>>,
    /// Our own address and port of the connection to the endpoint, which are all that the endpoint sees of it.
    pub local: Cell<Option<Local>>,
    pub tries: Cell<u8>,
    pub moved: Moved,
    /// Of those, the bytes that were added to the counters.
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

    /// The endpoint that took the connection.
    pub(super) fn connected_to(&self) -> Option<Arc<EndpointState>> {
        self.connect.get().and_then(|_| self.endpoint.borrow().clone())
    }

    /// Bytes that it moved up and down since this was called last.
    pub(super) fn moved_since(&self) -> (u64, u64) {
        let since = |moved: &Cell<u64>, counted: &Cell<u64>| {
            // What is queued counts as moved until it turns out that it cannot be: no count goes down for that, it waits.
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
