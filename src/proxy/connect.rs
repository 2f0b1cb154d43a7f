//! Connects to one of a route's endpoints.

use std::{
    io,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::net::{RecvFlags, recv};
use socket2::SockRef;
use tokio::{
    io::{AsyncWriteExt, Interest},
    net::TcpStream,
    task::yield_now,
};

use super::{
    announce,
    captured::{Captured, Destinations},
    socket::{Lack, Patience, dial},
    worker::{Ticket, Worker},
};
use crate::{
    balance::{EndpointState, Lease},
    events::Event,
    model::{Endpoint, Millis},
    outcome::Outcome,
    table::{Route, Upstream},
};

/// Maximum number of different endpoints tried.
const TRIES: usize = 3;
/// Maximum number of attempts that this host could not make, for endpoints for which this was known before. So if all
/// endpoints are like that, a connection does not go through all of them.
const VAIN: usize = 16;
/// Timeout of an attempt while there is another endpoint to try. The kernel resends a lost SYN after the same time, so one
/// lost packet makes the attempt fail.
const TRY: Duration = Duration::from_secs(1);

/// How long an endpoint is used only if no other can be: after this host had no route to it, or no free source port.
const WITHOUT_ROUTE: Duration = Duration::from_secs(60);
const WITHOUT_PORTS: Duration = Duration::from_millis(250);
/// The first and the longest pause before a free source port is looked for again. The kernel may search through all ports
/// each time.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_millis(800);

/// Endpoints that a connection must not use: perhaps one from the start, those that it has tried, and those to which this
/// host could not open a connection.
struct Excluded {
    all: Vec<Endpoint>,
    from_start: usize,
    /// The number of those that failed, or may have failed, by themselves.
    tried: usize,
    /// The number of those that this host could not reach, which was known before.
    vain: usize,
    /// Those for which all source ports were in use.
    starved: Vec<Endpoint>,
}

impl Excluded {
    fn new(from_start: Option<Endpoint>) -> Self {
        let all = Vec::from_iter(from_start);
        Self { from_start: all.len(), all, tried: 0, vain: 0, starved: Vec::new() }
    }

    fn may_try_more(&self) -> bool {
        self.tried < TRIES
    }

    fn tries(&mut self, endpoint: Endpoint) {
        self.all.push(endpoint);
        self.tried += 1;
    }

    /// The last attempt does not count: this host could not make it.
    fn was_no_try(&mut self) {
        self.tried = self.tried.saturating_sub(1);
    }

    /// Endpoints that no attempt may use.
    fn always(&self) -> &[Endpoint] {
        self.all.get(..self.from_start).unwrap_or_default()
    }

    /// Allows the endpoints again for which no source port was free. Returns whether there were any.
    fn readmit_starved(&mut self) -> bool {
        let starved = std::mem::take(&mut self.starved);
        self.vain = 0;
        self.all.retain(|one| !starved.contains(one));
        !starved.is_empty()
    }
}

/// Opens a counted connection to one of the route's endpoints. Does not read any byte of the consumer before.
pub(super) async fn connect(
    ticket: &Ticket,
    consumer: &TcpStream,
) -> Result<(TcpStream, Lease), Outcome> {
    let (worker, record) = (ticket.worker(), ticket.record());
    let (settings, route) = (worker.settings(), &record.route);
    // Not from the accept: the connection may have been held since.
    let deadline = Instant::now() + settings.connect;
    let Captured { source, destination, .. } = record.captured;
    let mut announcement = route.binding.descriptor.proxy.map(|version| Announcement {
        header: announce::header(version, route, source, destination),
        sent: 0,
    });
    let mut excluded = Excluded::new(match settings.destinations {
        // If the user's own rules also capture the host's own connections, this connection would return to embassy.
        Destinations::Any => Some(Endpoint(destination.0)),
        Destinations::VipsAnd(_) => None,
    });
    let patience = patience(route, settings.user_timeout, consumer);
    let (mut lacking, mut slow) = (None, None::<Arc<EndpointState>>);
    let mut pause = FIRST_PAUSE;
    while Instant::now() < deadline {
        // A failed attempt takes time, and the endpoints may have changed meanwhile.
        let upstream = worker.upstream(route).ok_or(Outcome::RouteGone)?;
        let start = worker.now();
        let pick = || upstream.rotation.pick(route.balance, start, &excluded.all);
        let may_pick = excluded.may_try_more() && excluded.vain < VAIN;
        let next = if may_pick { pick().cloned() } else { None };
        let is_first_try = next.is_some();
        // If the others have failed, the rest of the time is used for an endpoint that was only slow.
        let again = || slow.take().filter(|state| upstream.rotation.offers(state));
        let Some(state) = next.or_else(again) else {
            if excluded.may_try_more()
                && !upstream.answered
                && worker.another_table(deadline.min(record.accepted + settings.hold)).await
            {
                continue;
            }
            if excluded.may_try_more() && excluded.readmit_starved() {
                // Ports become free when connections end. There may also be a new endpoint.
                worker.another_table(deadline.min(Instant::now() + pause)).await;
                pause = (2 * pause).min(LONGEST_PAUSE);
                continue;
            }
            if excluded.tried == 0
                && lacking.is_none()
                && upstream.rotation.has_any_of(&excluded.all)
            {
                return Err(Outcome::Circular);
            }
            break;
        };
        let was_aside = state.is_aside(start);
        let lease = state.lease();
        ticket.connecting(&state);
        if is_first_try {
            excluded.tries(state.endpoint);
        }
        let begun = Instant::now();
        let open = async {
            let mut stream = dial(state.endpoint, settings.mark).await?;
            if let Some(announcement) = &mut announcement {
                announcement.send(consumer, &mut stream).await?;
            }
            Ok(stream)
        };
        let waits = slow.as_deref();
        let opened = in_time(worker, route, &state, (&excluded, waits), deadline, open).await;
        let lack = opened.as_ref().err().and_then(|e| Lack::of(e, state.endpoint, settings.mark));
        match (opened, lack) {
            (Ok(stream), _) => {
                let sent = announcement.map_or(0, |announcement| announcement.sent);
                record.moved.up.set(sent as u64);
                if state.succeeded(begun.elapsed()) {
                    back(worker, route, &state);
                }
                ticket.connected(stream.local_addr().ok());
                ticket.requests().watch_with(patience);
                return Ok((stream, lease));
            }
            (Err(error), Some(Lack::Resources)) => {
                lacking = Some((error, Lack::Resources));
                if is_first_try {
                    excluded.all.pop();
                    excluded.was_no_try();
                } else {
                    slow = Some(state);
                }
                worker.wait_out_shortage().await;
            }
            (Err(error), Some(lack)) => {
                if is_first_try {
                    excluded.was_no_try();
                    excluded.vain += usize::from(was_aside);
                }
                set_aside(worker, route, &state, lack, &error);
                if lack == Lack::Ports {
                    excluded.starved.push(state.endpoint);
                }
                // If others failed by themselves, the connection would have failed even with a route.
                if lack == Lack::Ports || excluded.tried == 0 {
                    lacking = Some((error, lack));
                }
                // The attempt took no time, and there may be many: other connections get their turn.
                yield_now().await;
            }
            (Err(error), None) => {
                failed(worker, route, &state, &excluded, &error, start);
                if error.kind() == io::ErrorKind::TimedOut && is_first_try {
                    slow.get_or_insert(state);
                }
                lacking = None;
            }
        }
    }
    Err(match lacking {
        Some((error, lack)) => {
            let remedy = lack.remedy();
            tracing::warn!(route = %route.key, %error, remedy, "this host cannot open a connection");
            Outcome::LocalError
        }
        None if excluded.tried == 0 => Outcome::NoEndpoint,
        None => Outcome::EndpointsUnreachable,
    })
}

/// The PROXY protocol header, if the binding uses it, and the consumer's first bytes.
struct Announcement {
    header: Vec<u8>,
    /// The number of the consumer's first bytes that were sent with it.
    sent: usize,
}

impl Announcement {
    /// Sends the header with the bytes that the consumer has already sent, so that a request arrives in the same segment.
    /// Does not wait for such bytes, because the endpoint may have to send first. Until the endpoint has accepted these
    /// bytes, they stay in the consumer's socket: for the next attempt, or for a process that takes over meanwhile.
    async fn send(&mut self, consumer: &TcpStream, endpoint: &mut TcpStream) -> io::Result<()> {
        let mut bytes = vec![0; 4096];
        let peek = || {
            let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
            Ok(recv(consumer, bytes.as_mut_slice(), flags)?.0)
        };
        // The end of the consumer's data, or an error, is left to the relay.
        let count = consumer.try_io(Interest::READABLE, peek).unwrap_or(0);
        bytes.truncate(count);
        endpoint.write_all(&[&self.header[..], &bytes].concat()).await?;
        // There is no wait between here and the relay. If the consumer has been reset meanwhile, the relay notices that
        // too.
        if count > 0 {
            let _ = consumer.try_read(&mut bytes);
        }
        self.sent = count;
        Ok(())
    }
}

/// The timeouts towards the endpoint. If the binding has its own, they are set for the consumer's socket too.
fn patience(route: &Route, default: Duration, consumer: &TcpStream) -> Patience {
    let of_binding = route.binding.descriptor.user_timeout;
    if let Some(time) = of_binding {
        // Fails only on a socket that is no longer connected, which the relay notices.
        let _ = Patience::with_consumers(time).apply(&SockRef::from(consumer));
    }
    Patience::with_endpoints(of_binding.unwrap_or(default))
}

/// Waits for an attempt until `deadline`, but only [`TRY`] as long as, or as soon as, there is another endpoint to try. For
/// an endpoint that has failed before, this may also be one that was already tried and was only slow.
async fn in_time<T>(
    worker: &Worker,
    route: &Route,
    state: &EndpointState,
    (excluded, slow): (&Excluded, Option<&EndpointState>),
    deadline: Instant,
    open: impl Future<Output = io::Result<T>>,
) -> io::Result<T> {
    let begun = Instant::now();
    let is_trusted = state.is_trusted();
    let mut open = pin!(open);
    loop {
        let upstream = worker.upstream(route);
        let has_alternative = upstream.as_ref().is_some_and(|upstream| {
            let rotation = &upstream.rotation;
            let has_untried = excluded.may_try_more()
                && rotation.has_alternative(state, worker.now(), &excluded.all);
            has_untried || !is_trusted && slow.is_some_and(|slow| rotation.offers(slow))
        });
        let end = if has_alternative { deadline.min(begun + TRY) } else { deadline };
        tokio::select! {
            biased;
            opened = &mut open => return opened,
            has_changed = worker.another_table(end) => {
                if !has_changed {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
        }
    }
}

/// Logs a failed connect attempt, and ejects the endpoint. The only endpoint is not ejected for a timeout.
fn failed(
    worker: &Worker,
    route: &Route,
    state: &EndpointState,
    excluded: &Excluded,
    error: &io::Error,
    start: Millis,
) {
    let (endpoint, service, now) = (state.endpoint, &route.query, worker.now());
    state.counts.last_error.set(now, error.to_string());
    route.counts.last_error.set(now, format!("{endpoint}: {error}"));
    let upstream = worker.upstream(route);
    let is_only = || {
        let has_others = |upstream: &Arc<Upstream>| {
            upstream.rotation.has_alternative(state, now, excluded.always())
        };
        !upstream.as_ref().is_some_and(has_others)
    };
    if error.kind() == io::ErrorKind::TimedOut && is_only() {
        if state.timed_out_alone() {
            tracing::warn!(%endpoint, %service, "the only endpoint does not answer; it stays in use");
        }
        return;
    }
    let Some(time) = state.failed(start, now) else {
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

/// Marks an endpoint to be used only if no other can be, for a while: this host could not open a connection to it. No
/// packet was sent, so another attempt costs little.
fn set_aside(worker: &Worker, route: &Route, state: &EndpointState, lack: Lack, error: &io::Error) {
    let (endpoint, service, now) = (state.endpoint, &route.query, worker.now());
    state.counts.last_error.set(now, error.to_string());
    route.counts.last_error.set(now, format!("{endpoint}: {error}"));
    let time = if lack == Lack::Ports { WITHOUT_PORTS } else { WITHOUT_ROUTE };
    let is_news = state.set_aside(now.after(time));
    if is_news && lack == Lack::Route {
        tracing::info!(%endpoint, %service, %error, "this host cannot reach the endpoint; it is used only if there is no other");
    }
}

/// Logs that an ejected endpoint accepted a connection.
fn back(worker: &Worker, route: &Route, state: &EndpointState) {
    let (endpoint, service) = (state.endpoint, &route.query);
    tracing::info!(%endpoint, %service, "endpoint is back");
    worker.settings().events.report(|| Event::EndpointBack { query: service.clone(), endpoint });
}

#[cfg(test)]
mod tests {
    use std::{net::SocketAddr, rc::Rc};

    use tokio::{
        io::AsyncReadExt,
        net::{TcpListener, TcpSocket},
        task::{JoinHandle, spawn_local},
        time::sleep,
    };

    use super::*;
    use crate::{
        proxy::{
            settings::ProxySettings,
            shared::Shared,
            testing::{captured, connection, consumer, in_own_network, run, settings, table_after},
        },
        table::Table,
    };

    fn source() -> SocketAddr {
        ([172, 17, 1, 1], 1).into()
    }

    /// A listener with a full queue: SYNs are dropped until the queue is accepted, as if a network lost them.
    struct Full {
        listener: TcpListener,
        endpoint: Endpoint,
        _waiting: Vec<TcpStream>,
    }

    impl Full {
        async fn new() -> Self {
            let socket = TcpSocket::new_v4().unwrap();
            socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
            let listener = socket.listen(1).unwrap();
            let address = listener.local_addr().unwrap();
            let mut waiting = Vec::new();
            // The queue takes one more than the backlog.
            for _ in 0..2 {
                waiting.push(TcpStream::connect(address).await.unwrap());
            }
            while queued(address.port()) < waiting.len() {
                sleep(Duration::from_millis(1)).await;
            }
            Self { listener, endpoint: Endpoint(address), _waiting: waiting }
        }

        /// From now on accepts everything.
        fn open(self) -> JoinHandle<()> {
            spawn_local(async move {
                let mut accepted = Vec::new();
                loop {
                    accepted.push(self.listener.accept().await.unwrap());
                }
            })
        }
    }

    #[test]
    fn the_consumers_bytes_stay_in_its_socket_until_an_endpoint_has_taken_them() {
        run(async {
            let (mut client, consumer) = connection().await;
            client.write_all(b"early").await.unwrap();
            consumer.readable().await.unwrap();
            let mut announcement = Announcement { header: b"header ".to_vec(), sent: 0 };
            let (mut endpoint, _server) = connection().await;
            endpoint.shutdown().await.unwrap();
            announcement.send(&consumer, &mut endpoint).await.unwrap_err();
            let (mut endpoint, mut server) = connection().await;
            announcement.send(&consumer, &mut endpoint).await.unwrap();
            assert_eq!(announcement.sent, 5);
            client.write_all(b" and late").await.unwrap();
            drop(client);
            let (mut consumer, mut rest) = (consumer, String::new());
            consumer.read_to_string(&mut rest).await.unwrap();
            assert_eq!(rest, " and late");
            drop(endpoint);
            rest.clear();
            server.read_to_string(&mut rest).await.unwrap();
            assert_eq!(rest, "header early");
        });
    }

    /// The number of connections in a listener's queue (man 5 proc, `/proc/net/tcp`).
    fn queued(port: u16) -> usize {
        const LISTENS: &str = "0A";
        let list = std::fs::read_to_string("/proc/thread-self/net/tcp").unwrap();
        let lines = list.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let its = |fields: &Vec<&str>| {
            fields[1].ends_with(&format!(":{port:04X}")) && fields[3] == LISTENS
        };
        let mut of_it = lines.filter(its);
        let queues = of_it.next().unwrap()[4];
        usize::from_str_radix(queues.split_once(':').unwrap().1, 16).unwrap()
    }

    fn table_of(before: &Table, endpoints: &[Endpoint]) -> Arc<Table> {
        let consumer = consumer("app", source().ip(), "db;80");
        Arc::new(table_after(before, &[consumer], endpoints).unwrap())
    }

    fn worker(endpoints: &[Endpoint]) -> Rc<Worker> {
        worker_with(PATIENT, endpoints)
    }

    /// Longer than a busy machine may stand still.
    const PATIENT: Duration = Duration::from_secs(3_600);

    fn worker_with(connect: Duration, endpoints: &[Endpoint]) -> Rc<Worker> {
        let table = table_of(&Table::default(), endpoints);
        let settings = ProxySettings { connect, ..settings() };
        Worker::new(Arc::new(Shared::new(settings)), 0, table).unwrap()
    }

    fn ticket(worker: &Rc<Worker>) -> Ticket {
        let route = worker.table.borrow().routes().next().unwrap().clone();
        let captured = captured(source(), "172.17.0.1:80".parse().unwrap());
        worker.start(captured, route, Instant::now()).unwrap()
    }

    /// A connection that is being opened to one of these endpoints, and its worker.
    fn opening(endpoints: &[Endpoint]) -> (Rc<Worker>, JoinHandle<Result<Endpoint, Outcome>>) {
        opening_with(PATIENT, endpoints)
    }

    fn opening_with(
        connect: Duration,
        endpoints: &[Endpoint],
    ) -> (Rc<Worker>, JoinHandle<Result<Endpoint, Outcome>>) {
        let worker = worker_with(connect, endpoints);
        let ticket = ticket(&worker);
        let task = spawn_local(async move {
            let (_client, consumer) = connection().await;
            super::connect(&ticket, &consumer).await.map(|(_, lease)| lease.state().endpoint)
        });
        (worker, task)
    }

    fn state(worker: &Worker, endpoint: Endpoint) -> Arc<EndpointState> {
        let table = worker.table.borrow();
        let mut states = table.endpoints().map(|(_, state)| state);
        states.find(|state| state.endpoint == endpoint).unwrap().clone()
    }

    /// An address at which no program listens.
    fn refusing() -> Endpoint {
        Endpoint("127.0.0.1:1".parse().unwrap())
    }

    /// Waits until one attempt of the connection was made and timed out.
    async fn a_try_is_over() {
        sleep(TRY + TRY / 2).await;
    }

    #[test]
    fn a_lost_syn_of_the_only_endpoint_is_neither_a_failure_nor_an_ejection() {
        run(async {
            let full = Full::new().await;
            let endpoint = full.endpoint;
            let (worker, connected) = opening(&[endpoint]);
            a_try_is_over().await;
            assert!(!connected.is_finished());
            let accepting = full.open();
            assert_eq!(connected.await.unwrap(), Ok(endpoint));
            let state = state(&worker, endpoint);
            assert_eq!((state.failed_tries(), state.ejections()), (0, 0));
            accepting.abort();
        });
    }

    #[test]
    fn an_only_endpoint_that_never_answers_fails_and_is_not_ejected() {
        run(async {
            let full = Full::new().await;
            let (worker, connected) = opening_with(TRY, &[full.endpoint]);
            assert_eq!(connected.await.unwrap(), Err(Outcome::EndpointsUnreachable));
            let state = state(&worker, full.endpoint);
            assert_eq!((state.failed_tries(), state.ejections()), (1, 0));
            assert!(state.is_silent() && !state.is_ejected(worker.now()));
            let error = state.counts.last_error.get().expect("it is told").1;
            assert!(error.contains("timed out"), "{error}");
        });
    }

    #[test]
    fn one_of_two_that_does_not_answer_is_left_for_the_other_and_ejected() {
        run(async {
            let full = Full::new().await;
            let other = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let other_endpoint = Endpoint(other.local_addr().unwrap());
            // Each endpoint comes first for one of the two connections.
            let (worker, connected) = opening(&[full.endpoint, other_endpoint]);
            assert_eq!(connected.await.unwrap(), Ok(other_endpoint));
            let ticket = ticket(&worker);
            let (_client, consumer) = connection().await;
            let (_, lease) = connect(&ticket, &consumer).await.unwrap();
            assert_eq!(lease.state().endpoint, other_endpoint);
            let state = state(&worker, full.endpoint);
            assert_eq!((state.failed_tries(), state.ejections()), (1, 1));
        });
    }

    #[test]
    fn one_that_was_slow_is_tried_again_when_the_others_refuse() {
        for ejected in [false, true] {
            run(async {
                let full = Full::new().await;
                let endpoint = full.endpoint;
                let (worker, connected) = opening(&[endpoint, refusing()]);
                if ejected {
                    state(&worker, refusing()).failed(Millis(0), worker.now());
                }
                a_try_is_over().await;
                let accepting = full.open();
                assert_eq!(connected.await.unwrap(), Ok(endpoint));
                accepting.abort();
            });
        }
    }

    /// It may be up again, which only an attempt can show.
    #[test]
    fn an_ejected_endpoint_is_tried_when_the_other_has_not_answered_for_a_second() {
        run(async {
            let full = Full::new().await;
            let up = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let endpoint = Endpoint(up.local_addr().unwrap());
            let (worker, connected) = opening(&[full.endpoint, endpoint]);
            let ejected = state(&worker, endpoint);
            for n in 0..6 {
                ejected.failed(Millis(n * 100_000), Millis(n * 100_000 + 1));
            }
            assert!(ejected.is_ejected(worker.now()));
            assert_eq!(connected.await.unwrap(), Ok(endpoint));
            drop(full);
        });
    }

    /// An ejected endpoint that is silent too does not use up the time of an endpoint that was only slow.
    #[test]
    fn one_that_was_slow_is_tried_again_when_an_ejected_one_does_not_answer_either() {
        run(async {
            let (slow, dead) = (Full::new().await, Full::new().await);
            let endpoint = slow.endpoint;
            let (worker, connected) = opening(&[endpoint, dead.endpoint]);
            let ejected = state(&worker, dead.endpoint);
            for n in 0..6 {
                ejected.failed(Millis(n * 100_000), Millis(n * 100_000 + 1));
            }
            a_try_is_over().await;
            let accepting = slow.open();
            assert_eq!(connected.await.unwrap(), Ok(endpoint));
            accepting.abort();
            drop(dead);
        });
    }

    /// A network with only the loopback interface has no route to this.
    fn nowhere(port: u16) -> Endpoint {
        Endpoint(SocketAddr::from(([10, 9, 9, 9], port)))
    }

    /// They are passed over, however many there are, like IPv6 endpoints on a host without IPv6.
    #[test]
    fn endpoints_that_this_host_cannot_reach_count_as_no_tries_and_are_not_ejected() {
        in_own_network(
            "proxy::connect::tests::endpoints_that_this_host_cannot_reach_count_as_no_tries_and_are_not_ejected",
            || {
                run(async {
                    let up = TcpListener::bind("127.0.0.1:0").await.unwrap();
                    let endpoint = Endpoint(up.local_addr().unwrap());
                    let all: Vec<_> = (1..=5).map(nowhere).chain([endpoint]).collect();
                    let (worker, connected) = opening(&all);
                    assert_eq!(connected.await.unwrap(), Ok(endpoint));
                    for _ in 0..10 {
                        let ticket = ticket(&worker);
                        let (_client, consumer) = connection().await;
                        let (_, lease) = connect(&ticket, &consumer).await.unwrap();
                        assert_eq!(lease.state().endpoint, endpoint);
                    }
                    for state in (1..=5).map(|port| state(&worker, nowhere(port))) {
                        assert_eq!((state.failed_tries(), state.ejections()), (0, 0));
                        assert!(
                            state.is_aside(worker.now()) && state.counts.last_error.get().is_some()
                        );
                    }
                });
            },
        );
    }

    /// A connection tries once each endpoint that is not yet known to be unreachable. Later connections try only a few.
    #[test]
    fn of_many_endpoints_that_this_host_cannot_reach_a_few_are_tried_and_others_have_their_turn() {
        in_own_network(
            "proxy::connect::tests::of_many_endpoints_that_this_host_cannot_reach_a_few_are_tried_and_others_have_their_turn",
            || {
                run(async {
                    const MANY: u16 = 200;
                    let all: Vec<_> = (1..=MANY).map(nowhere).collect();
                    let (worker, mut connected) = opening(&all);
                    let mut turns = 0;
                    while !connected.is_finished() {
                        turns += 1;
                        yield_now().await;
                    }
                    assert_eq!((&mut connected).await.unwrap(), Err(Outcome::LocalError));
                    assert!(turns >= usize::from(MANY), "{turns}");
                    let is_aside = |port| state(&worker, nowhere(port)).is_aside(worker.now());
                    assert!((1..=MANY).all(is_aside));
                    (1..=MANY).for_each(|port| {
                        state(&worker, nowhere(port)).counts.last_error.set(Millis(0), "")
                    });
                    let (_client, consumer) = connection().await;
                    let again = connect(&ticket(&worker), &consumer).await.map(|_| ());
                    assert_eq!(again, Err(Outcome::LocalError));
                    let tried = |port: &u16| {
                        let error = state(&worker, nowhere(*port)).counts.last_error.get();
                        error.is_some_and(|(_, text)| !text.is_empty())
                    };
                    assert_eq!((1..=MANY).filter(tried).count(), VAIN);
                });
            },
        );
    }

    #[test]
    fn an_only_endpoint_that_this_host_cannot_reach_is_refused_at_once() {
        in_own_network(
            "proxy::connect::tests::an_only_endpoint_that_this_host_cannot_reach_is_refused_at_once",
            || {
                run(async {
                    let (worker, connected) = opening(&[nowhere(1)]);
                    assert_eq!(connected.await.unwrap(), Err(Outcome::LocalError));
                    let state = state(&worker, nowhere(1));
                    assert!(state.is_aside(worker.now()));
                    assert_eq!((state.failed_tries(), state.ejections()), (0, 0));
                });
            },
        );
    }

    /// Ports become free when other connections end. A direct connection would have failed at once.
    #[test]
    fn source_ports_to_the_only_endpoint_are_waited_for_and_another_endpoint_is_used_at_once() {
        in_own_network(
            "proxy::connect::tests::source_ports_to_the_only_endpoint_are_waited_for_and_another_endpoint_is_used_at_once",
            || {
                run(async {
                    let full = TcpListener::bind("127.0.0.1:5000").await.unwrap();
                    let other = TcpListener::bind("127.0.0.1:5001").await.unwrap();
                    let [endpoint, other] = [full, other].map(|listener| {
                        let address = listener.local_addr().unwrap();
                        // It is never closed.
                        std::mem::forget(listener);
                        Endpoint(address)
                    });
                    let (worker, both) = (worker(&[endpoint]), worker(&[endpoint, other]));
                    let mut pairs = Vec::new();
                    for _ in 0..5 {
                        pairs.push(connection().await);
                    }
                    std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "40000 40001")
                        .unwrap();
                    let mut held = Vec::new();
                    while let Ok(one) = TcpStream::connect(endpoint.0).await {
                        held.push(one);
                        assert!(held.len() <= 2);
                    }
                    let (_client, consumer) = pairs.pop().unwrap();
                    let waiting = ticket(&worker);
                    let connected = spawn_local(async move {
                        connect(&waiting, &consumer).await.map(|(_, lease)| lease.state().endpoint)
                    });
                    let mut kept = Vec::new();
                    for (_client, consumer) in &pairs {
                        let (stream, lease) = connect(&ticket(&both), consumer).await.unwrap();
                        assert_eq!(lease.state().endpoint, other);
                        // Two ports are available for each endpoint.
                        stream.set_zero_linger().unwrap();
                        kept.push(lease);
                    }
                    sleep(TRY).await;
                    assert!(!connected.is_finished(), "it waits for a port");
                    held.pop().unwrap().set_zero_linger().unwrap();
                    assert_eq!(connected.await.unwrap(), Ok(endpoint));
                    let state = state(&worker, endpoint);
                    assert_eq!((state.failed_tries(), state.ejections()), (0, 0));
                });
            },
        );
    }

    #[test]
    fn a_new_endpoint_is_used_while_the_only_one_does_not_answer() {
        run(async {
            let full = Full::new().await;
            let (worker, connected) = opening(&[full.endpoint]);
            a_try_is_over().await;
            let new = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let endpoint = Endpoint(new.local_addr().unwrap());
            let table = table_of(&worker.table.borrow(), &[endpoint]);
            worker.take_over(table);
            assert_eq!(connected.await.unwrap(), Ok(endpoint));
        });
    }

    #[test]
    fn the_address_that_an_endpoint_sees_is_recorded() {
        run(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let worker = worker(&[Endpoint(listener.local_addr().unwrap())]);
            let ticket = ticket(&worker);
            let (_client, consumer) = connection().await;
            let (_stream, _lease) = connect(&ticket, &consumer).await.unwrap();
            let (_, peer) = listener.accept().await.unwrap();
            assert_eq!(ticket.record().local.get().map(SocketAddr::from), Some(peer));
        });
    }

    /// A binding may have other timeouts than the default, or none. They apply to both of its sides.
    #[test]
    fn a_binding_may_have_a_user_timeout_of_its_own() {
        run(async {
            for (option, endpoint, to_consumer) in [
                ("", 30, None),
                (";user-timeout=600", 600, Some(600)),
                (";user-timeout=0", 0, None),
            ] {
                let consumer = consumer("app", source().ip(), &format!("db;80{option}"));
                let table = table_after(&Table::default(), &[consumer], &[refusing()]).unwrap();
                let route = table.routes().next().unwrap();
                let (_client, consumer) = connection().await;
                let patience = patience(route, Duration::from_secs(30), &consumer);
                assert_eq!(patience, Patience::with_endpoints(Duration::from_secs(endpoint)));
                let set = SockRef::from(&consumer).tcp_user_timeout().unwrap();
                assert_eq!(set, to_consumer.map(Duration::from_secs), "{option}");
            }
        });
    }
}
