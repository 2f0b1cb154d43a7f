//! One connection's life, top to bottom: accepted, recognised, connected, relayed, ended.

use std::{
    cell::{Cell, OnceCell},
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::io::Errno;
use socket2::SockRef;
use tokio::{
    io::AsyncWriteExt,
    net::{TcpSocket, TcpStream},
    time::timeout,
};

use super::{
    announce,
    listener::{KEEPALIVE, original_destination},
    relay::{Broken, Ended, Leave, Moved, Side, relay},
    worker::{Ticket, Worker},
};
use crate::{
    balance::{EndpointState, Lease, Millis},
    events::Event,
    model::{Endpoint, Port},
    outcome::Outcome,
    table::{Route, RouteKey, Table},
};

/// Which original destinations count as VIPs, besides those in the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destinations {
    /// Any: the user's own rules decide what is captured.
    Any,
    /// The VIPs, and these addresses of ours.
    VipsAnd(Vec<IpAddr>),
}

/// What a captured connection shows of itself.
#[derive(Debug, Clone, Copy)]
pub(super) struct Meaning {
    /// Who dialled.
    pub peer: SocketAddr,
    /// The original destination.
    pub meant: SocketAddr,
    /// Whether that is where it arrived: nothing captured it.
    pub direct: bool,
}

impl Meaning {
    /// Of a connection that was accepted on `port`.
    pub(super) fn of(stream: &TcpStream, peer: SocketAddr, port: u16) -> Result<Self, Outcome> {
        let meant =
            original_destination(stream, peer).map_err(|_| Outcome::NoOriginalDestination)?;
        // Connection tracking knows uncaptured connections too: those were meant for the listener itself. With any other
        // port it need not be asked for.
        let direct = meant.port() == port
            && stream.local_addr().map_err(|_| Outcome::ConsumerReset)? == meant;
        Ok(Self { peer, meant, direct })
    }

    /// The route that is meant, or why there is none.
    pub(super) fn route(
        &self,
        table: &Table,
        destinations: &Destinations,
    ) -> Result<Arc<Route>, Outcome> {
        if self.direct {
            return Err(Outcome::DirectDial);
        }
        route(table, destinations, self.peer.ip(), self.meant)
    }
}

fn route(
    table: &Table,
    destinations: &Destinations,
    source: IpAddr,
    meant: SocketAddr,
) -> Result<Arc<Route>, Outcome> {
    let captured = match destinations {
        Destinations::Any => true,
        Destinations::VipsAnd(own) => {
            table.vips().contains(&crate::model::Vip(meant.ip())) || own.contains(&meant.ip())
        }
    };
    if !captured {
        return Err(Outcome::NotAVip);
    }
    let port = Port::new(meant.port()).ok_or(Outcome::NoRoute)?;
    match table.route(&RouteKey::tcp(source, port)) {
        Some(route) => Ok(route.clone()),
        None if table.known().contains(&source) => Err(Outcome::NoRoute),
        None => Err(Outcome::UnknownConsumer),
    }
}

/// What one connection did, for the log, whatever way it ends.
#[derive(Debug, Clone)]
pub(super) struct Record {
    pub route: Arc<Route>,
    pub meaning: Meaning,
    pub accepted: Instant,
    pub connected: OnceCell<Connected>,
    pub tries: Cell<u8>,
    pub moved: Moved,
    /// What of `moved` has been counted.
    pub counted: Moved,
    /// Asks its relay to let it be parked.
    pub leave: Leave,
}

/// What became of trying endpoints.
#[derive(Debug, Clone)]
pub(super) struct Connected {
    /// Since the connection was accepted.
    pub after: Duration,
    pub endpoint: Arc<EndpointState>,
}

/// Serves a recognised connection until it ends.
pub(super) async fn serve(ticket: Ticket, consumer: Socket) {
    match connect(&ticket, &consumer.stream).await {
        Ok((stream, lease)) => carry_on(ticket, consumer, Socket::new(stream), lease).await,
        Err(outcome) => ticket.end(outcome),
    }
}

/// Relays a connection until it ends or is parked.
pub(super) async fn carry_on(
    ticket: Ticket,
    mut consumer: Socket,
    mut endpoint: Socket,
    lease: Lease,
) {
    let (buffers, record) = (&ticket.worker.buffers, &ticket.record);
    let end = loop {
        let (moved, leave) = (&record.moved, &record.leave);
        match relay(&consumer.stream, &endpoint.stream, buffers, moved, leave).await {
            Ok(Ended::Finished) => break Ok(()),
            Err(broken) => break Err(broken),
            Ok(Ended::Idle) => {}
        }
        match (consumer.duplicate(), endpoint.duplicate()) {
            (Ok(to_consumer), Ok(to_endpoint)) => {
                consumer.leave_to_duplicate();
                endpoint.leave_to_duplicate();
                return ticket.park((to_consumer, to_endpoint), lease);
            }
            // It keeps its task.
            (Err(error), _) | (_, Err(error)) => tracing::debug!(%error, "cannot park"),
        }
    };
    let outcome = match end {
        Ok(()) => {
            consumer.finished = true;
            endpoint.finished = true;
            Outcome::Closed
        }
        Err(Broken { side, error }) => {
            tracing::debug!(?side, %error, route = %ticket.record.route.key, "broken");
            match side {
                Side::Consumer => Outcome::ConsumerReset,
                Side::Endpoint => Outcome::EndpointReset,
            }
        }
    };
    // The consumer may dial again at once: by then this connection is not counted any more.
    drop(lease);
    ticket.end(outcome);
}

/// Distinct endpoints that are tried.
const TRIES: usize = 3;
/// The time for each try.
const TRY: Duration = Duration::from_secs(1);
/// The time for all of them.
const CONNECT: Duration = Duration::from_secs(5);

/// A connection to one of the route's endpoints, counted. No byte of the consumer's is consumed before.
async fn connect(ticket: &Ticket, consumer: &TcpStream) -> Result<(TcpStream, Lease), Outcome> {
    let (worker, record) = (&ticket.worker, &ticket.record);
    let route = &record.route;
    // Not from the accept: it may have been held back since.
    let deadline = Instant::now() + CONNECT;
    let Meaning { peer, meant, .. } = record.meaning;
    let mut announcement = route.binding.descriptor.proxy.map(|version| Announcement {
        header: announce::header(version, route, peer, meant),
        bytes: Vec::new(),
    });
    // Where the user's own rules capture what this host sends too, a connection there would come back to us.
    let mut tried = match worker.destinations() {
        Destinations::Any => vec![Endpoint(meant)],
        Destinations::VipsAnd(_) => Vec::new(),
    };
    let tries = tried.len()..tried.len() + TRIES;
    let mut lacking = None;
    while tries.contains(&tried.len()) && Instant::now() < deadline {
        // A failed try takes time: there may be other endpoints by now.
        let upstream = worker.upstream(route);
        let start = worker.now();
        let Some(state) = upstream.rotation.pick(route.balance, start, &tried) else {
            if !upstream.answered
                && worker.another_table(deadline.min(record.accepted + worker.hold())).await
            {
                continue;
            }
            let circular = |state: &Arc<EndpointState>| tried.first() == Some(&state.endpoint);
            if tried.len() == tries.start && upstream.rotation.endpoints().iter().any(circular) {
                return Err(Outcome::Circular);
            }
            break;
        };
        let lease = state.lease();
        ticket.connecting(state.endpoint);
        tried.push(state.endpoint);
        if record.tries.get() > 0 {
            route.counts.retry();
        }
        record.tries.set(record.tries.get().saturating_add(1));
        let begun = Instant::now();
        let time = TRY.min(deadline.saturating_duration_since(Instant::now()));
        let open = async {
            let mut stream = dial(state.endpoint, worker.mark).await?;
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
                let after = record.accepted.elapsed();
                ticket.connected(Connected { after, endpoint: state.clone() });
                return Ok((stream, lease));
            }
            Err(error) if is_shortage(&error) => {
                lacking = Some(error);
                tried.pop();
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
        None if tried.len() == tries.start => Outcome::NoEndpoint,
        None => Outcome::EndpointsUnreachable,
    })
}

/// What an endpoint hears first where it wants to know who dialled.
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
            self.bytes.extend(&bytes[..count]);
        }
        endpoint.write_all(&[&self.header[..], &self.bytes].concat()).await
    }
}

/// Tells of an endpoint that did not take a connection, and was ejected for that, or already is.
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
        return tracing::debug!(%endpoint, %service, %error, "cannot connect");
    };
    let seconds = time.as_secs_f64();
    if state.failures() == 1 {
        tracing::info!(%endpoint, %service, %error, seconds, "endpoint ejected");
    } else {
        tracing::debug!(%endpoint, %service, %error, seconds, "endpoint ejected again");
    }
    worker.report(|| Event::EndpointEjected {
        query: service.clone(),
        endpoint,
        error: error.to_string(),
        time,
    });
}

/// Tells of an ejected endpoint that took a connection.
fn back(worker: &Worker, route: &Route, state: &EndpointState) {
    let (endpoint, service) = (state.endpoint, &route.upstream.query);
    tracing::info!(%endpoint, %service, "endpoint back");
    worker.report(|| Event::EndpointBack { query: service.clone(), endpoint });
}

/// A connection to an endpoint, set up as both sides of a connection are.
pub(crate) async fn dial(endpoint: Endpoint, mark: Option<u32>) -> io::Result<TcpStream> {
    let socket = if endpoint.0.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    let options = SockRef::from(&socket);
    options.set_tcp_nodelay(true)?;
    options.set_tcp_keepalive(&KEEPALIVE)?;
    if let Some(mark) = mark {
        options.set_mark(mark)?;
    }
    socket.connect(endpoint.0).await
}

/// Whether a connect failed for want of anything here, which tells nothing of the endpoint.
pub(crate) fn is_for_want_of_ours(error: &io::Error) -> bool {
    is_local(error) || is_shortage(error)
}

/// Whether a connect failed for want of something here, which is no fault of the endpoint's.
fn is_local(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::ADDRNOTAVAIL | Errno::AFNOSUPPORT | Errno::PERM | Errno::ACCESS)
    )
}

/// Whether a call failed for want of something that other connections have, and give back when they end.
pub(super) fn is_shortage(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)
    )
}

/// A socket that is reset when dropped, unless its relay finished: the peer of a broken connection must not take its end
/// for a whole one.
pub(super) struct Socket {
    pub(super) stream: TcpStream,
    pub(super) finished: bool,
}

impl Socket {
    pub(super) fn new(stream: TcpStream) -> Self {
        Self { stream, finished: false }
    }

    /// The same socket, unknown to the runtime.
    fn duplicate(&self) -> io::Result<OwnedFd> {
        self.stream.as_fd().try_clone_to_owned()
    }

    /// Closing the duplicate is a reset from now on, and dropping this is nothing.
    fn leave_to_duplicate(&mut self) {
        reset_on_close(&self.stream);
        self.finished = true;
    }

    /// Back in the runtime, after [`Socket::leave_to_duplicate`].
    pub(super) fn resumed(socket: OwnedFd) -> io::Result<Self> {
        let stream = TcpStream::from_std(socket.into())?;
        SockRef::from(&stream).set_linger(None)?;
        Ok(Self::new(stream))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if !self.finished {
            reset_on_close(&self.stream);
        }
    }
}

/// Makes closing the socket a reset.
pub(super) fn reset_on_close(stream: &TcpStream) {
    // It fails only on a socket that has no connection any more.
    let _ = stream.set_zero_linger();
}

#[cfg(test)]
pub(super) mod tests {

    use super::*;
    use crate::{
        descriptor::Balance,
        discovery::Query,
        model::{Binding, Consumer, ConsumerId, Vip},
        proxy::listener,
        table::Inputs,
    };

    /// One consumer with one route.
    pub(in crate::proxy) fn table() -> Table {
        table_of(ConsumerId::Local)
    }

    pub(in crate::proxy) fn table_of(id: ConsumerId) -> Table {
        let consumer = Consumer {
            id,
            name: "a".into(),
            namespace: "a".into(),
            sources: vec!["172.17.0.2".parse().unwrap()],
            gateways: vec![],
            bindings: vec![Binding {
                origin: "B".into(),
                descriptor: "redis;6379".parse().unwrap(),
            }],
            ends: vec![],
        };
        let inputs = Inputs {
            consumers: &[&Arc::new(consumer)],
            contested: &Default::default(),
            known: &Arc::new(["172.17.0.4".parse().unwrap()].into()),
            networks: &["172.17.0.0/16".parse().unwrap()].into(),
            endpoints: &Default::default(),
            vips: &[Vip("172.17.0.1".parse().unwrap())],
            gateways_are_vips: false,
            balance: Balance::RoundRobin,
            now: std::time::Instant::now(),
        };
        let query = |binding: &Binding| {
            let service = binding.descriptor.service.clone();
            Ok(Query {
                via: "consul".into(),
                service,
                tags: Default::default(),
                dc: None,
                port: None,
            })
        };
        Table::default().next(&inputs, query).unwrap()
    }

    fn recognised(destinations: &Destinations, source: &str, meant: &str) -> Result<(), Outcome> {
        let (peer, meant) = (SocketAddr::new(source.parse().unwrap(), 1), meant.parse().unwrap());
        Meaning { peer, meant, direct: false }.route(&table(), destinations).map(drop)
    }

    #[test]
    fn only_what_a_consumer_declared_and_the_capture_meant_is_served() {
        let vips = Destinations::VipsAnd(vec!["172.17.0.9".parse().unwrap()]);
        for (source, meant, expected) in [
            ("172.17.0.2", "172.17.0.1:6379", Ok(())),
            ("172.17.0.2", "172.17.0.9:6379", Ok(())),
            ("172.17.0.2", "10.0.0.1:6379", Err(Outcome::NotAVip)),
            ("172.17.0.2", "172.17.0.1:6380", Err(Outcome::NoRoute)),
            ("172.17.0.3", "172.17.0.1:6379", Err(Outcome::UnknownConsumer)),
            ("172.17.0.4", "172.17.0.1:6379", Err(Outcome::NoRoute)),
        ] {
            assert_eq!(recognised(&vips, source, meant), expected, "{source} to {meant}");
        }
    }

    #[test]
    fn under_the_users_own_rules_any_destination_counts_but_our_own_listener() {
        assert_eq!(recognised(&Destinations::Any, "172.17.0.2", "10.0.0.1:6379"), Ok(()));
        let (peer, meant) = (([172, 17, 0, 2], 1).into(), ([10, 0, 0, 1], 6379).into());
        let direct = Meaning { peer, meant, direct: true };
        let refused = direct.route(&table(), &Destinations::Any);
        assert_eq!(refused.map(drop), Err(Outcome::DirectDial));
    }

    #[tokio::test]
    async fn both_sides_of_a_connection_send_at_once_and_notice_a_peer_that_is_gone() {
        let sets = listener::open(0, 1).unwrap();
        let port = sets[0][0].local_addr().unwrap().port();
        let accepting = listener::adopt(sets[0][0].try_clone().unwrap()).unwrap();
        let endpoint = Endpoint((std::net::Ipv4Addr::LOCALHOST, port).into());
        let (dialled, accepted) = tokio::join!(dial(endpoint, None), accepting.accept());
        for stream in [dialled.unwrap(), accepted.unwrap().0] {
            let options = SockRef::from(&stream);
            assert!(options.tcp_nodelay().unwrap());
            assert!(options.keepalive().unwrap());
            // Before connection tracking forgets a half-closed connection.
            assert!(options.tcp_keepalive_time().unwrap() < Duration::from_secs(60));
        }
    }

    #[test]
    fn what_this_host_lacks_is_not_held_against_an_endpoint() {
        assert!(is_shortage(&Errno::MFILE.into()));
        assert!(!is_shortage(&Errno::CONNREFUSED.into()));
        assert!(is_local(&Errno::ADDRNOTAVAIL.into()));
        assert!(!is_local(&Errno::CONNREFUSED.into()));
        assert!(!is_local(&io::ErrorKind::TimedOut.into()));
    }
}
