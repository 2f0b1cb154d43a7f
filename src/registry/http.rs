//! HTTP requests to a registry, with limits for time and size, without redirects, and with a fixed maximum number of
//! connections for any number of requests.

use std::{
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use futures_util::{FutureExt, future::BoxFuture};
use reqwest::{
    Client, Response, StatusCode,
    dns::{Addrs, Name, Resolve, Resolving},
    header::{HOST, HeaderMap, HeaderValue},
    redirect::Policy,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep_until, timeout, timeout_at},
};
use tracing::warn;
use url::Url;

use super::{Secret, excerpt, reuse::Reused};
use crate::{
    body::{AnswerPlaces, Body},
    resolve::{Resolver, addresses},
    source::SourceError,
    tls::{self, ClientTls},
};

/// Timeout of an answer that is not a long poll.
pub(super) const ANSWER: Duration = Duration::from_secs(10);
/// Connect timeout.
pub(super) const CONNECT: Duration = Duration::from_secs(3);
/// Maximum size of a body in bytes: enough for ten thousand instances with their checks.
const LARGEST: usize = 32 << 20;

/// The client of one registry.
///
/// HTTP/1.1 allows one request at a time on a connection, so a request that the server holds until a change (a long poll)
/// needs its own connection. By default Consul allows 200 connections per address (`limits.http_max_conns_per_client`),
/// including all its other clients on this host, and refuses further ones. So at most [`Http::LONG_POLLS`] are held at a
/// time, and all other requests share [`Http::READS`] connections.
#[derive(Debug)]
pub(super) struct Http {
    /// The registry's name in the log.
    name: &'static str,
    tls: ClientTls,
    verify: bool,
    /// Name and password.
    user: Option<(String, Option<Secret>)>,
    /// The server's name in its certificate, if it is not the host of the URL.
    server_name: Option<ServerName>,
    client: Reused<Made>,
    long_polls: Arc<Semaphore>,
    reads: Semaphore,
    /// Limits answers of more than a few bytes: all long polls together could take gigabytes.
    places: AnswerPlaces,
    /// The number of answered requests.
    answered: AtomicU64,
    /// Whether it was logged that there are more queries than long polls.
    crowded: AtomicBool,
}

#[derive(Debug)]
struct Made {
    client: Client,
    at: Instant,
}

/// A server whose certificate has another name than its address.
#[derive(Debug, Clone)]
struct ServerName {
    name: String,
    /// Its address.
    host: String,
    /// Its address with the port, for the HTTP header.
    header: HeaderValue,
}

/// Resolves only the server's name.
impl Resolve for ServerName {
    fn resolve(&self, _: Name) -> Resolving {
        let host = self.host.clone();
        Box::pin(async move {
            let found = addresses(&host).await?;
            Ok(Box::new(found.into_iter().map(|address| SocketAddr::new(address, 0))) as Addrs)
        })
    }
}

/// The permission for one long poll.
#[derive(Debug)]
pub(super) struct LongPoll {
    _permit: OwnedSemaphorePermit,
    answered: Arc<AtomicBool>,
}

impl LongPoll {
    /// Notes that the answer has begun.
    pub(super) fn answered(&self) {
        self.answered.store(true, Relaxed);
    }
}

impl Http {
    const LONG_POLLS: usize = 100;
    const READS: usize = 4;
    /// How long an idle connection is kept: at the default `-resync`, from one re-read to the next.
    const IDLE: Duration = Duration::from_secs(300);
    /// Keepalive, to distinguish an idle connection from a dead one.
    const KEEPALIVE: Duration = Duration::from_secs(15);
    /// If a connection fails, the certificates may be the cause, so they are read again. This is the minimum interval.
    const RENEWAL: Duration = Duration::from_secs(1);

    pub(super) fn new(
        name: &'static str,
        tls: ClientTls,
        verify: bool,
        user: Option<(String, Option<Secret>)>,
    ) -> Self {
        Self {
            name,
            tls,
            verify,
            user,
            server_name: None,
            client: Reused::default(),
            long_polls: Arc::new(Semaphore::new(Self::LONG_POLLS)),
            reads: Semaphore::new(Self::READS),
            places: AnswerPlaces::default(),
            answered: AtomicU64::new(0),
            crowded: AtomicBool::new(false),
        }
    }

    /// The same client, for a server whose certificate is for `name` instead of the host of `base`.
    pub(super) fn under_the_name(self, base: &Url, name: &str) -> Result<Self, String> {
        let host = base.host_str().unwrap_or_default();
        let mut renamed = base.clone();
        renamed.set_host(Some(name)).map_err(|error| format!("{name:?}: {error}"))?;
        let header = match base.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        };
        let header = HeaderValue::try_from(header).map_err(|error| error.to_string())?;
        let host = host.trim_matches(['[', ']']).to_owned();
        let server_name = Some(ServerName { name: name.to_owned(), host, header });
        Ok(Self { server_name, ..self })
    }

    /// Sends a request and reads the complete answer. Only a hanging server reaches the timeout.
    pub(super) async fn get(
        &self,
        url: &Url,
        headers: HeaderMap,
    ) -> Result<HttpAnswer, SourceError> {
        self.in_turn(url, self.read(url, headers, ANSWER, None)).await
    }

    /// Runs a request when it is its turn, with its own timeout. The wait for its turn is not limited as long as other
    /// requests are answered: the server is not to blame for their number.
    async fn in_turn<T>(
        &self,
        url: &Url,
        asking: impl Future<Output = Result<T, SourceError>>,
    ) -> Result<T, SourceError> {
        let mut turn = pin!(self.reads.acquire());
        let _turn = loop {
            let answered = self.answered.load(Relaxed);
            match within(url, ANSWER, turn.as_mut().map(Ok)).await {
                Ok(turn) => break turn,
                Err(error) if self.answered.load(Relaxed) == answered => return Err(error),
                Err(_) => {}
            }
        };
        let answer = asking.await?;
        self.answered.fetch_add(1, Relaxed);
        Ok(answer)
    }

    /// Like `get`, for a request that the server may hold for up to `held`.
    pub(super) async fn get_held(
        &self,
        url: &Url,
        headers: HeaderMap,
        held: Duration,
        turn: &LongPoll,
    ) -> Result<HttpAnswer, SourceError> {
        self.read(url, headers, held + ANSWER, Some(turn)).await
    }

    async fn read(
        &self,
        url: &Url,
        headers: HeaderMap,
        limit: Duration,
        turn: Option<&LongPoll>,
    ) -> Result<HttpAnswer, SourceError> {
        let start = Instant::now();
        let mut response = within(url, limit, self.open(url, headers)).await?;
        if let Some(turn) = turn {
            turn.answered();
        }
        let mut body = Body::default();
        self.rest(url, &mut response, &mut body, limit, start).await?;
        Ok(self.answer(url, &response, body))
    }

    pub(super) fn answer(&self, url: &Url, response: &Response, body: Body) -> HttpAnswer {
        let (status, headers) = (response.status(), response.headers().clone());
        let (url, places) = (url.clone(), self.places.clone());
        HttpAnswer { url, status, headers, body, places }
    }

    /// The places for work on answers.
    pub(super) fn places(&self) -> &AnswerPlaces {
        &self.places
    }

    /// Reads a body to its end, which must arrive within `limit` after `start`. Waiting for a place does not count, because
    /// other tasks cause it.
    pub(super) async fn rest(
        &self,
        url: &Url,
        response: &mut Response,
        body: &mut Body,
        limit: Duration,
        start: Instant,
    ) -> Result<(), SourceError> {
        let mut end = start + limit;
        loop {
            let piece = timeout_at(end, response.chunk()).await.map_err(|_| late(url, limit))?;
            let Some(piece) = piece.map_err(|e| broken(url, e))? else { return Ok(()) };
            end += self.add(url, &piece, body).await?;
        }
    }

    /// Adds a piece to a body. Returns how long it waited for a place.
    pub(super) async fn add(
        &self,
        url: &Url,
        piece: &[u8],
        body: &mut Body,
    ) -> Result<Duration, SourceError> {
        body.add(piece, LARGEST, &self.places).await.map_err(|error| fault(url, error))
    }

    /// Sends a request, and waits for the head of the answer without a timeout.
    pub(super) async fn open(
        &self,
        url: &Url,
        mut headers: HeaderMap,
    ) -> Result<Response, SourceError> {
        let secure = url.scheme() == "https";
        let made = self.client.get(self.make(secure)).await?;
        let mut asked = url.clone();
        if let Some(server) = self.server_name.as_ref().filter(|_| secure) {
            // `under_the_name` has checked that this URL accepts the name.
            let _ = asked.set_host(Some(&server.name));
            headers.insert(HOST, server.header.clone());
        }
        let mut request = made.client.get(asked).headers(headers);
        if let Some((name, password)) = &self.user {
            request = request.basic_auth(name, password.as_ref().map(Secret::reveal));
        }
        match request.send().await {
            Ok(response) => Ok(response),
            Err(error) => {
                if secure && made.at.elapsed() > Self::RENEWAL {
                    self.client.lost(&made).await;
                }
                Err(broken(url, error))
            }
        }
    }

    /// Redirects are not followed, because they would carry the token to any server. Proxies of the environment are not
    /// used: a registry is part of the same network.
    async fn make(&self, secure: bool) -> Result<Made, SourceError> {
        tls::install_provider();
        let builder = Client::builder()
            .connect_timeout(CONNECT)
            .redirect(Policy::none())
            .no_proxy()
            .http1_only()
            .pool_max_idle_per_host(Self::LONG_POLLS + Self::READS)
            .pool_idle_timeout(Self::IDLE)
            .tcp_keepalive(Self::KEEPALIVE);
        let builder = match self.server_name.as_ref().filter(|_| secure) {
            Some(server) => builder.dns_resolver(Arc::new(server.clone())),
            None => builder.dns_resolver(Arc::new(Resolver)),
        };
        let builder = if secure {
            self.tls.prepare(builder, self.verify)?
        } else {
            // Without TLS no CA certificates are needed, and the system may have none.
            builder.tls_certs_only([])
        };
        let client =
            builder.build().map_err(|e| SourceError::caused("cannot create an HTTP client", &e))?;
        Ok(Made { client, at: Instant::now() })
    }

    /// Logs once that there are more services than long polls.
    fn is_crowded(&self, every: Duration) {
        if !self.crowded.swap(true, Relaxed) {
            warn!(
                registry = self.name,
                long_polls = Self::LONG_POLLS,
                every_s = every.as_secs(),
                "too many services for long polls; polling the rest"
            );
        }
    }
}

async fn within<T>(
    url: &Url,
    limit: Duration,
    asking: impl Future<Output = Result<T, SourceError>>,
) -> Result<T, SourceError> {
    timeout(limit, asking).await.map_err(|_| late(url, limit))?
}

fn late(url: &Url, limit: Duration) -> SourceError {
    fault(url, format_args!("no complete answer within {} s", limit.as_secs_f32()))
}

/// The error for a failed connection.
pub(super) fn broken(url: &Url, error: reqwest::Error) -> SourceError {
    SourceError::caused(format_args!("GET {url}"), &error.without_url())
}

/// An error about the answer to a request.
pub(super) fn fault(url: &Url, reason: impl std::fmt::Display) -> SourceError {
    SourceError::new(format_args!("GET {url}: {reason}"))
}

/// Maximum length of the part of a body that is put into an error, in bytes.
const EXCERPT: usize = 1 << 10;

/// A complete answer.
#[derive(Debug)]
pub(crate) struct HttpAnswer {
    pub(crate) url: Url,
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    body: Body,
    places: AnswerPlaces,
}

impl HttpAnswer {
    pub(crate) fn fault(&self, reason: impl std::fmt::Display) -> SourceError {
        fault(&self.url, reason)
    }

    /// The error for a bad status, with the start of the body.
    pub(super) fn refusal(&self) -> SourceError {
        let text = self.body();
        let text = String::from_utf8_lossy(text.get(..EXCERPT).unwrap_or(text));
        let fault = self.fault(format_args!("{} {:?}", self.status, excerpt(text.trim())));
        // The header may also be a date (RFC 9110, 10.2.3). Then our own pauses are used.
        match self.number("Retry-After") {
            Some(seconds) => fault.after(Duration::from_secs(seconds)),
            None => fault,
        }
    }

    pub(crate) fn body(&self) -> &[u8] {
        self.body.bytes()
    }

    /// The result of `parse` for the body. A large body is parsed on another thread.
    pub(crate) async fn parsed<T: Send + 'static>(
        self,
        parse: impl FnOnce(&[u8]) -> Result<T, serde_json::Error> + Send + 'static,
    ) -> Result<T, SourceError> {
        let wrong = |e| fault(&self.url, format_args!("cannot parse the answer: {e}"));
        self.body.parsed(&self.places, parse).await.map_err(wrong)
    }

    /// A header's value, if it is a number.
    pub(super) fn number(&self, header: &str) -> Option<u64> {
        number(&self.headers, header)
    }
}

pub(super) fn number(headers: &HeaderMap, header: &str) -> Option<u64> {
    headers.get(header)?.to_str().ok()?.parse().ok()
}

/// A header with this name that no log shows.
pub(super) fn secret_header(name: &'static str, mut value: HeaderValue) -> HeaderMap {
    value.set_sensitive(true);
    HeaderMap::from_iter([(reqwest::header::HeaderName::from_static(name), value)])
}

/// A query that is asked again and again: as a long poll if one is free, otherwise every few seconds.
pub(super) struct Poller<T> {
    held: Option<BoxFuture<'static, T>>,
    /// The answer to the long poll has begun.
    answered: Arc<AtomicBool>,
    last: Option<Instant>,
    distance: Duration,
    poll_at: Instant,
}

impl<T> Poller<T> {
    /// Poll interval without a long poll.
    const POLL: Duration = Duration::from_secs(5);
    /// Minimum interval between requests: a server that always answers at once must not cause a busy loop.
    const IDLE: Duration = Duration::from_millis(100);
    /// The pause before the next request, as a multiple of the time that reading the answer takes.
    const SHARE: u32 = 10;
    /// The pause after a change: too short to be noticed.
    const NEWS: Duration = Duration::from_millis(5);

    pub(super) fn new() -> Self {
        let poll_at = Instant::now();
        let answered = Arc::default();
        Self { held: None, answered, last: None, distance: Self::NEWS, poll_at }
    }

    /// Notes how long reading the last answer took. The next request waits long enough for other work.
    pub(super) fn took(&mut self, time: Duration) {
        self.distance = self.distance.max(Self::SHARE * time).min(Self::POLL);
    }

    /// Waits until the next request is due.
    pub(super) async fn pace(&mut self) {
        if let Some(last) = self.last {
            sleep_until(last + self.distance).await;
        }
        self.last = Some(Instant::now());
    }

    /// Notes an answer, and whether it was a change.
    pub(super) fn answered(&mut self, news: bool) {
        self.distance = if news { Self::NEWS } else { Self::IDLE };
        // Random, so that queries that started together do not stay synchronous.
        self.poll_at = Instant::now() + Self::POLL.mul_f64(0.8 + 0.4 * fastrand::f64());
    }

    /// The answer to the current long poll. If there is none, sends `ask` as soon as a long poll is free; the longest
    /// waiting query comes first. `None` if none is free in time: the current state should be read instead. Cancel-safe:
    /// the long poll stays held.
    pub(super) async fn held(
        &mut self,
        http: &Http,
        ask: impl FnOnce(LongPoll) -> BoxFuture<'static, T>,
    ) -> Option<T> {
        let held = match &mut self.held {
            Some(held) => held,
            None => {
                let turn = tokio::select! {
                    biased;
                    turn = http.long_polls.clone().acquire_owned() => turn.ok()?,
                    () = sleep_until(self.poll_at) => {
                        http.is_crowded(Self::POLL);
                        return None;
                    }
                };
                self.pace().await;
                self.answered = Arc::default();
                let turn = LongPoll { _permit: turn, answered: self.answered.clone() };
                self.held.insert(ask(turn))
            }
        };
        let answer = held.await;
        self.held = None;
        Some(answer)
    }

    pub(super) fn is_held(&self) -> bool {
        self.held.is_some()
    }

    /// Cancels the long poll if its answer has begun. Must be called before another request: nobody reads the answer
    /// meanwhile, and it may occupy a place for which the other answer waits.
    pub(super) fn leave_answered(&mut self) {
        if self.answered.load(Relaxed) {
            self.give_up();
        }
    }

    /// Cancels the long poll.
    pub(super) fn give_up(&mut self) {
        self.held = None;
    }
}

#[cfg(test)]
mod tests {
    use futures_util::future::join_all;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        time::sleep,
    };

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn many_questions_wait_for_each_other_and_none_for_a_server_that_hangs() {
        let (http, url) =
            (Http::new("test", ClientTls::default(), true, None), "http://a/".parse());
        let url = url.unwrap();
        let slow = || http.in_turn(&url, sleep(Duration::from_secs(1)).map(Ok));
        let all = join_all((0..100).map(|_| slow())).await;
        assert_eq!(all.iter().filter(|answer| answer.is_err()).count(), 0);

        let start = Instant::now();
        let pending = || within(&url, ANSWER, std::future::pending::<Result<(), _>>());
        let hangs = || http.in_turn(&url, pending());
        let all = join_all((0..100).map(|_| hangs())).await;
        assert!(all.iter().all(Result::is_err));
        // The requests whose turn it was time out, and then those that follow them.
        assert!(start.elapsed() < 3 * ANSWER, "{:?}", start.elapsed());
    }

    /// A server that sends the start of a body of `size` bytes to each client, and the rest after a signal.
    async fn slow(size: usize) -> (Url, tokio::sync::watch::Sender<bool>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap()).parse().unwrap();
        let (go, wait) = tokio::sync::watch::channel(false);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut wait = wait.clone();
                tokio::spawn(async move {
                    let _ = stream.read(&mut [0; 4096]).await;
                    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n");
                    let _ = stream.write_all(head.as_bytes()).await;
                    let _ = stream.write_all(&vec![b'x'; size - 1]).await;
                    let _ = wait.wait_for(|go| *go).await;
                    let _ = stream.write_all(b"x").await;
                });
            }
        });
        (url, go)
    }

    #[tokio::test]
    async fn a_poll_whose_answer_has_begun_does_not_keep_a_place_from_a_read() {
        let http = Arc::new(Http::new("test", ClientTls::default(), true, None));
        let (held, _never) = slow(1 << 20).await;
        let (at_once, go) = slow(1 << 20).await;
        go.send_replace(true);
        let ask = |turn| {
            let (http, url) = (http.clone(), held.clone());
            async move { http.get_held(&url, HeaderMap::new(), ANSWER, &turn).await }.boxed()
        };
        let mut all: Vec<_> = (0..3).map(|_| Poller::new()).collect();
        let deadline = Duration::from_secs(60);
        let begin = async {
            while http.places.free() > 0 {
                for asking in &mut all {
                    // Dropped while it waits, as if a re-read is due.
                    let _ = timeout(Duration::from_millis(5), asking.held(&http, ask)).await;
                }
            }
        };
        timeout(deadline, begin).await.expect("each has begun, and has a place");
        all.iter_mut().for_each(Poller::leave_answered);
        let answer = timeout(deadline, http.get(&at_once, HeaderMap::new())).await.unwrap();
        assert_eq!(answer.unwrap().body().len(), 1 << 20);
    }

    #[tokio::test]
    async fn a_poll_that_is_not_answered_goes_on() {
        let http = Http::new("test", ClientTls::default(), true, None);
        let mut asking: Poller<()> = Poller::new();
        let wait = asking.held(&http, |turn| {
            async move {
                let _turn = turn;
                std::future::pending().await
            }
            .boxed()
        });
        assert!(timeout(Duration::from_millis(50), wait).await.is_err());
        asking.leave_answered();
        assert!(asking.is_held());
    }

    #[tokio::test]
    async fn the_wait_for_a_place_is_no_fault_of_the_server() {
        let http = Http::new("test", ClientTls::default(), true, None);
        let (url, go) = slow(1 << 20).await;
        go.send_replace(true);
        let taken = http.places.take_all().await;
        let limit = Duration::from_secs(2);
        let mut read = pin!(http.read(&url, HeaderMap::new(), limit, None));
        let longer = timeout(2 * limit, read.as_mut()).await;
        assert!(longer.is_err(), "it waits: {longer:?}");
        drop(taken);
        assert_eq!(read.await.unwrap().body().len(), 1 << 20);
    }
}
