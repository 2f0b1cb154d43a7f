//! The connection log: a line for each connection at its end.

use std::{net::SocketAddr, time::Duration};

use tracing::info;

use super::record::Record;
use crate::{
    config::ConnectionLog,
    log::CONNECTION,
    model::{OriginalDestination, SourceAddress},
    outcome::Outcome,
    table::Route,
};

/// Logs a connection that was refused before it had a route.
pub(super) fn refused(
    which: ConnectionLog,
    outcome: Outcome,
    source: SourceAddress,
    destination: Option<OriginalDestination>,
    route: Option<&Route>,
) {
    if !wanted(which, outcome) {
        return;
    }
    info!(
        target: CONNECTION,
        consumer = route.map(|route| &*route.consumer_name),
        consumer_id = route.map(|route| route.consumer.to_string()),
        service = route.map(|route| route.query.service.as_str()),
        %source,
        destination = destination.map(|destination| destination.to_string()),
        outcome = outcome.as_str(),
        "refused"
    );
}

/// Whether a connection is to be logged.
pub(crate) fn wanted(which: ConnectionLog, outcome: Outcome) -> bool {
    match which {
        ConnectionLog::Off => false,
        ConnectionLog::Errors => outcome.is_error(),
        ConnectionLog::All => true,
        ConnectionLog::Fraction(part) => fastrand::f64() < part,
    }
}

/// Logs an ended connection, if it is to be logged.
pub(super) fn ended(which: ConnectionLog, outcome: Outcome, record: &Record) {
    if !wanted(which, outcome) {
        return;
    }
    info!(
        target: CONNECTION,
        consumer = %record.route.consumer_name,
        consumer_id = %record.route.consumer,
        service = %record.route.query.service,
        endpoint = record.connected_to().map(|state| state.endpoint.to_string()),
        local = record.local.get().map(|local| SocketAddr::from(local).to_string()),
        source = %record.captured.source,
        destination = %record.captured.destination,
        bytes_up = record.moved.up.get(),
        bytes_down = record.moved.down.get(),
        connect_ms = record.connect.get().map(milliseconds),
        total_ms = milliseconds(record.accepted.elapsed()),
        tries = record.tries.get(),
        retries = record.tries.get().saturating_sub(1),
        outcome = outcome.as_str(),
        "connection"
    );
}

/// With a fraction: most connections within a host are opened in less than 1 ms. A number in JSON too, which a `u128` is
/// not.
fn milliseconds(time: Duration) -> f64 {
    time.as_micros() as f64 / 1e3
}
