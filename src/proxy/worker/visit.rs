//! Looking at all connections, without holding up what is relayed.

use std::collections::HashSet;

use tokio::task::yield_now;

use super::{Id, Worker};
use crate::{model::Endpoint, proxy::connection::Record};

impl Worker {
    /// Adds what all live connections moved since the last time.
    pub(in crate::proxy) async fn count_all_bytes(&self) {
        self.visit(|_, record, _| self.count_bytes(record)).await;
    }

    /// Shows every live connection: its number, what it did, and where it goes or is about to. Some at a time, so that what is
    /// relayed does not wait for thousands; one that is parked or woken meanwhile is shown once.
    pub(in crate::proxy) async fn visit(
        &self,
        mut look: impl FnMut(Id, &Record, Option<Endpoint>),
    ) {
        let mut seen = HashSet::new();
        self.visit_running(&mut seen, &mut look).await;
        let mut next = Some(0);
        while let Some(place) = next {
            let mut any = false;
            next = self.parking.look_from(place, Self::TURN, |parked| {
                any = true;
                if seen.insert(parked.id) {
                    look(parked.id, &parked.record, Some(parked.lease.state().endpoint));
                }
            });
            // There may be thousands of places that are empty.
            if any {
                yield_now().await;
            }
        }
        // Those that were woken before they were come to.
        self.visit_running(&mut seen, &mut look).await;
    }

    /// Connections that are looked at before others get their turn.
    const TURN: usize = 256;

    async fn visit_running(
        &self,
        seen: &mut HashSet<Id>,
        look: &mut impl FnMut(Id, &Record, Option<Endpoint>),
    ) {
        let all: Vec<Id> = self.live.borrow().keys().copied().collect();
        for turn in all.chunks(Self::TURN) {
            {
                let running = self.live.borrow();
                for (id, live) in turn.iter().filter_map(|id| running.get_key_value(id)) {
                    if seen.insert(*id) {
                        look(*id, &live.record, live.endpoint);
                    }
                }
            }
            yield_now().await;
        }
    }
}
