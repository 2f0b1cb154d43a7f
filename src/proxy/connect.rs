//! Connects to one of a route's endpoints.

use std::{
    io,
    time::{Duration, Instant},
};

use tokio::{io::AsyncWriteExt, net::TcpStream, time::timeout};

use super::{
    announce,
    captured::{Captured, Destinations},
    socket::{dial, is_local, is_shortage},
    worker::{Ticket, Worker},
};
use crate::{
    balance::{EndpointState, Lease},
    events::Event,
    model::{Endpoint, Millis},
    outcome::Outcome,
    table::Route,
};

/// Maximum number of distinct endpoints tried.
const TRIES: usize = 3;
/// Timeout of each attempt.
const TRY: Duration = Duration::from_secs(1);
/// Timeout of all attempts together.
const CONNECT: Duration = Duration::from_secs(5);

/// Endpoints that a connection does not go to: perhaps one from the start, and those that it has tried.
struct Excluded {
    all: Vec<Endpoint>,
    from_start: usize,
}

impl Excluded {
    fn new(from_start: Option<Endpoint>) -> Self {
        let all = Vec::from_iter(from_start);
        Self { from_start: all.len(), all }
    }

    fn tried(&self) -> usize {
        self.all.len() - self.from_start
    }
}

/// A connection to one of the route's endpoints, counted. No byte of the consumer's is consumed before.
pub(super) async fn connect(
    ticket: &Ticket,
    consumer: &TcpStream,
) -> Result<(TcpStream, Lease), Outcome> {
    let (worker, record) = (ticket.worker(), ticket.record());
    let (settings, route) = (worker.settings(), &record.route);
    // Not from the accept: it may have been held since.
    let deadline = Instant::now() + CONNECT;
    let Captured { source, destination, .. } = record.captured;
    let mut announcement = route.binding.descriptor.proxy.map(|version| Announcement {
        header: announce::header(version, route, source, destination),
        bytes: Vec::new(),
    });
    let mut excluded = Excluded::new(match settings.destinations {
        // If the user's own rules capture the host's own connections too, this connection would come back to embassy.
        Destinations::Any => Some(Endpoint(destination.0)),
        Destinations::VipsAnd(_) => None,
    });
    let mut lacking = None;
    while excluded.tried() < TRIES && Instant::now() < deadline {
        // A failed try takes time: there may be other endpoints by now.
        let upstream = worker.upstream(route);
        let start = worker.now();
        let Some(state) = upstream.rotation.pick(route.balance, start, &excluded.all) else {
            if !upstream.answered
                && worker.another_table(deadline.min(record.accepted + settings.hold)).await
            {
                continue;
            }
            if excluded.tried() == 0 && upstream.rotation.has_any_of(&excluded.all) {
                return Err(Outcome::Circular);
            }
            break;
        };
        let lease = state.lease();
        ticket.connecting(state);
        excluded.all.push(state.endpoint);
        let begun = Instant::now();
        let time = TRY.min(deadline.saturating_duration_since(Instant::now()));
        let open = async {
            let mut stream = dial(state.endpoint, settings.mark).await?;
            if let Some(announcement) = &mut announcement {
                announcement.send(consumer, &mut stream).await?;
            }
            Ok(stream)
        };
        let opened = timeout(time, open).await;
        match opened.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(stream) => {
                let sent = announcement.map_or(0, |announcement| announcement.bytes.len());
                record.moved.up.set(sent as u64);
                if state.succeeded(begun.elapsed()) {
                    back(worker, route, state);
                }
                ticket.connected();
                return Ok((stream, lease));
            }
            Err(error) if is_shortage(&error) => {
                lacking = Some(error);
                excluded.all.pop();
                worker.wait_out_shortage().await;
            }
            // Another endpoint may be of the other family, or leave the ports to it free.
            Err(error) if is_local(&error) => lacking = Some(error),
            Err(error) => {
                let now = worker.now();
                failed(worker, route, state, &error, state.failed(start, now), now);
                lacking = None;
            }
        }
    }
    Err(match lacking {
        Some(error) => {
            tracing::warn!(route = %route.key, %error, "this host cannot open a connection");
            Outcome::LocalError
        }
        None if excluded.tried() == 0 => Outcome::NoEndpoint,
        None => Outcome::EndpointsUnreachable,
    })
}

/// The PROXY protocol header, if the binding wants it, and the consumer's first bytes.
struct Announcement {
    header: Vec<u8>,
    /// The consumer's first bytes: read once, and sent to whichever endpoint takes them.
    bytes: Vec<u8>,
}

impl Announcement {
    /// The header, and what the consumer has sent by now: a request then comes in one segment with it. Nothing is waited
    /// for, because the endpoint may be the first to speak.
    async fn send(&mut self, consumer: &TcpStream, endpoint: &mut TcpStream) -> io::Result<()> {
        if self.bytes.is_empty() {
            let mut bytes = [0; 4096];
            // The end of what the consumer sends, or an error, is the relay's to meet.
            let count = consumer.try_read(&mut bytes).unwrap_or(0);
            self.bytes.extend(bytes.iter().take(count));
        }
        endpoint.write_all(&[&self.header[..], &self.bytes].concat()).await
    }
}

/// Logs a failed connect attempt, and the ejection of the endpoint.
fn failed(
    worker: &Worker,
    route: &Route,
    state: &EndpointState,
    error: &io::Error,
    ejected: Option<Duration>,
    now: Millis,
) {
    let (endpoint, service) = (state.endpoint, &route.upstream.query);
    state.counts.last_error.set(now, error.to_string());
    route.counts.last_error.set(now, format!("{endpoint}: {error}"));
    let Some(time) = ejected else {
        return tracing::debug!(%endpoint, %service, %error, "cannot connect to endpoint");
    };
    let seconds = time.as_secs_f64();
    if state.failures() == 1 {
        tracing::info!(%endpoint, %service, %error, seconds, "endpoint ejected");
    } else {
        tracing::debug!(%endpoint, %service, %error, seconds, "endpoint ejected again");
    }
    worker.settings().events.report(|| Event::EndpointEjected {
        query: service.clone(),
        endpoint,
        error: error.to_string(),
        time,
    });
}

/// Logs that an ejected endpoint accepted a connection.
fn back(worker: &Worker, route: &Route, state: &EndpointState) {
    let (endpoint, service) = (state.endpoint, &route.upstream.query);
    tracing::info!(%endpoint, %service, "endpoint is back");
    worker.settings().events.report(|| Event::EndpointBack { query: service.clone(), endpoint });
}
