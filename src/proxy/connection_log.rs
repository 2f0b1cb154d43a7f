//! The connection log: a line for each connection when it ends.

use std::{net::SocketAddr, rc::Rc, time::Duration};

use tracing::info;

use super::connection::Record;
use crate::{config::ConnectionLog, log::CONNECTION, outcome::Outcome, table::Route};

/// Logs an ended connection, if it is one of those that are logged.
pub(super) fn record(which: ConnectionLog, outcome: Outcome, entry: impl FnOnce() -> Entry) {
    if wanted(which, outcome) {
        entry().write();
    }
}

/// Logs a connection that was refused before it was one of a route's.
pub(super) fn refused(
    which: ConnectionLog,
    outcome: Outcome,
    source: SocketAddr,
    destination: Option<SocketAddr>,
    route: Option<&Route>,
) {
    if !wanted(which, outcome) {
        return;
    }
    info!(
        target: CONNECTION,
        consumer = route.map(|route| &*route.consumer_name),
        consumer_id = route.map(|route| route.consumer.to_string()),
        service = route.map(|route| route.upstream.query.service.as_str()),
        %source,
        destination = destination.map(|destination| destination.to_string()),
        outcome = outcome.as_str(),
        "refused"
    );
}

fn wanted(which: ConnectionLog, outcome: Outcome) -> bool {
    match which {
        ConnectionLog::Off => false,
        ConnectionLog::Errors => outcome.is_error(),
        ConnectionLog::All => true,
        ConnectionLog::Fraction(part) => fastrand::f64() < part,
    }
}

/// What is said of a connection.
#[derive(Debug)]
pub(super) struct Entry {
    record: Rc<Record>,
    outcome: Outcome,
    total: Duration,
}

impl Entry {
    pub(super) fn new(record: &Rc<Record>, outcome: Outcome) -> Self {
        Self { record: record.clone(), outcome, total: record.accepted.elapsed() }
    }

    fn write(self) {
        let record = &self.record;
        let connected = record.connected.get();
        info!(
            target: CONNECTION,
            consumer = %record.route.consumer_name,
            consumer_id = %record.route.consumer,
            service = %record.route.upstream.query.service,
            endpoint = connected.map(|connected| connected.endpoint.endpoint.to_string()),
            source = %record.meaning.peer,
            destination = %record.meaning.meant,
            bytes_up = record.moved.up.get(),
            bytes_down = record.moved.down.get(),
            connect_ms = connected.map(|connected| milliseconds(connected.after)),
            total_ms = milliseconds(self.total),
            tries = record.tries.get(),
            retries = record.tries.get().saturating_sub(1),
            outcome = self.outcome.as_str(),
            "connection"
        );
    }
}

/// With its fraction: most connections within a host are opened in less than one. A number in JSON too, which a `u128` is not.
fn milliseconds(time: Duration) -> f64 {
    time.as_micros() as f64 / 1e3
}
