//! A client of an engine for one session. It sends only GET requests. Each request has a timeout for the complete answer,
//! and a limit for its size. A filtering proxy in front of the engine must allow `/_ping`, `/events`, `/containers/json`,
//! `/containers/<id>/json` and `/networks`, and nothing else. Podman is first asked for `/libpod/networks/json`.

use std::{
    fmt,
    net::IpAddr,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use futures_util::{Stream, stream::try_unfold};
use reqwest::{Response, StatusCode, header::DATE, redirect::Policy};
use serde::de::DeserializeOwned;
use time::{OffsetDateTime, format_description::well_known::Rfc2822};
use tokio::time::{Instant, timeout, timeout_at};
use tracing::warn;

use super::{
    Address, Engine, answers,
    inspections::InspectionTicket,
    read::{self, InspectionResult, Listed},
};
use crate::{
    body::{AnswerPlaces, Body, TooLong},
    resolve::{Resolver, addresses},
    source::SourceError,
    tls::{self, ClientTls},
};

/// Interval and timeout of pings to a quiet engine.
pub(super) const PING: Duration = Duration::from_secs(5);
/// Timeout of a request if others wait for its answer.
const ANSWER: Duration = Duration::from_secs(10);
/// Timeout of the list of networks: a swarm manager without quorum takes 20 s, and nothing else waits for it.
const SLOW_ANSWER: Duration = Duration::from_secs(60);
const CONNECT: Duration = Duration::from_secs(3);
/// Maximum size of a list of containers, in bytes. It contains all their labels: enough for ten thousand containers with
/// long labels.
const LARGEST_LIST: usize = 128 << 20;
/// Maximum size of any other answer, in bytes, and of an event, which contains all labels of its container.
const LARGEST: usize = 16 << 20;
/// The newest API version whose answers were checked.
const NEWEST: (u32, u32) = (1, 52);

#[derive(Debug)]
pub(crate) struct Client {
    engine: Engine,
    http: reqwest::Client,
    /// `http://host/v1.41`
    base: String,
    /// The base URL of podman's own API.
    podman: String,
    is_podman: bool,
    places: AnswerPlaces,
}

/// Why a request has no usable answer.
#[derive(Debug, thiserror::Error)]
enum Unanswered {
    #[error("{}{}", .0, said(.1))]
    Refused(StatusCode, String),
    #[error("cannot parse the answer: {0}")]
    Unreadable(#[from] serde_json::Error),
    #[error(transparent)]
    TooLong(#[from] TooLong),
    #[error("an event is longer than {LARGEST} bytes")]
    LongEvent,
    #[error("no answer within {} s", .0.as_secs())]
    Late(Duration),
    #[error(transparent)]
    Broken(reqwest::Error),
}

impl From<reqwest::Error> for Unanswered {
    fn from(error: reqwest::Error) -> Self {
        Self::Broken(error.without_url())
    }
}

impl Unanswered {
    /// Whether the engine says that the object does not exist. Podman answers this with status 500.
    fn is_absence(&self) -> bool {
        match self {
            Self::Refused(StatusCode::NOT_FOUND, _) => true,
            Self::Refused(_, message) => message.contains("no such container"),
            _ => false,
        }
    }
}

/// A message in an error's text.
fn said(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(": {message}") }
}

impl Client {
    /// Connects. Also returns the time by the engine's clock, in the form that [`Client::events`] needs.
    ///
    /// The client uses the newest version that both sides know: no single version works with all engines from 20.10 to 29.
    pub(crate) async fn connect(engine: &Engine) -> Result<(Self, String), SourceError> {
        let (http, base) = engine.http()?;
        let mut client = Self {
            engine: engine.clone(),
            http,
            podman: format!("{base}/v4.0.0/libpod"),
            base,
            is_podman: false,
            places: AnswerPlaces::default(),
        };
        let asking = async {
            let response = client.open("/_ping").await?;
            let header = |name: &str| response.headers().get(name)?.to_str().ok();
            let since = header(DATE.as_str()).and_then(since).unwrap_or_else(now);
            let is_podman = header("Libpod-API-Version").is_some();
            Ok((header("Api-Version").and_then(version), since, is_podman))
        };
        let answer = within(ANSWER, asking).await;
        let (version, since, is_podman) =
            answer.map_err(|error| client.failed("a ping", &error))?;
        client.is_podman = is_podman;
        // If the engine does not report its version, requests name none, and the engine chooses one.
        if let Some((major, minor)) = version.map(|version| version.min(NEWEST)) {
            client.base.push_str(&format!("/v{major}.{minor}"));
        }
        Ok((client, since))
    }

    /// Whether the engine is podman.
    pub(super) fn is_podman(&self) -> bool {
        self.is_podman
    }

    /// The events of containers and networks since `since`. An engine replays only a few of the events from before the
    /// subscription. The stream ends only with an error.
    pub(super) fn events(
        &self,
        since: &str,
        actions: &[&str],
    ) -> impl Stream<Item = Result<answers::Event, SourceError>> + use<'_> {
        let filters = serde_json::json!({"type": ["container", "network"], "event": actions});
        let query: String = url::form_urlencoded::Serializer::new(String::new())
            .append_pair("since", since)
            .append_pair("filters", &filters.to_string())
            .finish();
        let path = format!("/events?{query}");
        try_unfold((None, Lines::default()), move |(response, rest)| {
            let path = path.clone();
            async move {
                let next = self.next_event(&path, response, rest).await;
                next.map(Some).map_err(|error| self.failed("the events", &error))
            }
        })
    }

    /// The next event of a stream, with the stream and the unread rest of its last piece. Opens the stream if it is not
    /// open.
    async fn next_event(
        &self,
        path: &str,
        response: Option<Response>,
        mut rest: Lines,
    ) -> Result<(answers::Event, (Option<Response>, Lines)), Unanswered> {
        let mut response = match response {
            Some(response) => response,
            None => self.open(path).await?,
        };
        loop {
            while let Some(line) = rest.next() {
                if !line.trim_ascii().is_empty() {
                    return Ok((serde_json::from_slice(&line)?, (Some(response), rest)));
                }
            }
            let Some(piece) = response.chunk().await? else {
                return Err(Unanswered::Refused(response.status(), "the stream ended".to_owned()));
            };
            rest.add(&piece)?;
        }
    }

    /// The running containers. Podman has no filter for those that are being stopped, so all containers are listed.
    pub(super) async fn list(&self) -> Result<Vec<Listed>, SourceError> {
        let filters = serde_json::json!({"status": ["running", "paused"]}).to_string();
        let (key, value) = match self.is_podman {
            true => ("all", "true"),
            false => ("filters", &*filters),
        };
        let query: String =
            url::form_urlencoded::Serializer::new(String::new()).append_pair(key, value).finish();
        let path = format!("/containers/json?{query}");
        let running = self.ask(&path, ANSWER, LARGEST_LIST, read::list).await;
        running.map_err(|error| self.failed("the containers", &error))
    }

    pub(crate) async fn networks(&self) -> Result<Vec<answers::Network>, SourceError> {
        // Podman's list in Docker's form waits for containers that are about to start, and these may connect immediately. A
        // proxy in front of the engine may refuse the other form.
        if self.is_podman {
            let url = format!("{}/networks/json", self.podman);
            let parse = |json: &[u8]| serde_json::from_slice::<Vec<answers::PodmanNetwork>>(json);
            if let Ok(own) = self.ask_at(url, SLOW_ANSWER, LARGEST, parse).await {
                return Ok(own.into_iter().map(Into::into).collect());
            }
        }
        let networks = self.get("/networks", SLOW_ANSWER).await;
        networks.map_err(|error| self.failed("the networks", &error))
    }

    pub(crate) async fn version(&self) -> Result<answers::Version, SourceError> {
        let version = self.get("/version", ANSWER).await;
        version.map_err(|error| self.failed("the version", &error))
    }

    /// The address of the engine's host, if it is not reached via a Unix socket.
    pub(super) async fn host(&self) -> Result<Option<IpAddr>, SourceError> {
        let Address::Tcp(host) = &self.engine.address else { return Ok(None) };
        let name = host.rsplit_once(':').map_or(host.as_str(), |(name, _port)| name);
        let found = timeout(ANSWER, addresses(name)).await;
        let found = found.map_err(|_| self.error("the host", Unanswered::Late(ANSWER)))?;
        let found = found.map_err(|error| self.error("the host", error))?;
        // The first address is IPv4 if there is a choice: every published port is published on IPv4.
        let address = found.first().ok_or_else(|| self.error("the host", "it has no address"))?;
        Ok(Some(*address))
    }

    /// The current state of a container. Only variables and labels whose names start with one of `prefixes` are kept.
    pub(super) async fn inspect(
        &self,
        ticket: InspectionTicket,
        prefixes: &[String],
    ) -> Result<(InspectionTicket, InspectionResult), SourceError> {
        let id = ticket.id.as_str();
        // The engine may hang for one container and answer for all others.
        let found = match self.get(&format!("/containers/{id}/json"), ANSWER).await {
            Ok(answer) => read::found(&ticket.id, answer, prefixes),
            Err(error) if error.is_absence() => InspectionResult::NotRunning,
            Err(error @ Unanswered::Broken(_)) => {
                return Err(self.failed(&format!("container {id}"), &error));
            }
            Err(error) => {
                warn!(id, %error, "docker inspect failed; keeping the container's last known state");
                InspectionResult::Unknown
            }
        };
        Ok((ticket, found))
    }

    /// The process ID of a running container's first process, in the engine's PID namespace.
    pub(crate) async fn process(&self, id: &str) -> Option<i32> {
        let answer: answers::Inspection =
            self.get(&format!("/containers/{id}/json"), ANSWER).await.ok()?;
        answer.state?.pid?.try_into().ok().filter(|pid| *pid > 0)
    }

    pub(super) async fn ping(&self) -> Result<(), SourceError> {
        let answer = within(PING, self.open("/_ping")).await;
        answer.map(drop).map_err(|error| self.failed("a ping", &error))
    }

    async fn get<T: DeserializeOwned + Send + 'static>(
        &self,
        path: &str,
        limit: Duration,
    ) -> Result<T, Unanswered> {
        self.ask(path, limit, LARGEST, |json| serde_json::from_slice(json)).await
    }

    /// The result of `parse` for an answer of at most `largest` bytes.
    async fn ask<T: Send + 'static>(
        &self,
        path: &str,
        limit: Duration,
        largest: usize,
        parse: impl FnOnce(&[u8]) -> Result<T, serde_json::Error> + Send + 'static,
    ) -> Result<T, Unanswered> {
        self.ask_at(format!("{}{path}", self.base), limit, largest, parse).await
    }

    async fn ask_at<T: Send + 'static>(
        &self,
        url: String,
        limit: Duration,
        largest: usize,
        parse: impl FnOnce(&[u8]) -> Result<T, serde_json::Error> + Send + 'static,
    ) -> Result<T, Unanswered> {
        let mut end = Instant::now() + limit;
        let mut response = within(limit, self.open_at(url)).await?;
        let mut body = Body::default();
        loop {
            let piece = timeout_at(end, response.chunk()).await;
            let Some(piece) = piece.map_err(|_| Unanswered::Late(limit))?? else { break };
            // Waiting for a place here, and for a thread below, does not count against the engine's timeout.
            end += body.add(&piece, largest, &self.places).await?;
        }
        Ok(body.parsed(&self.places, parse).await?)
    }

    /// Sends a request, and waits for the head of an answer. An error status is an error.
    async fn open(&self, path: &str) -> Result<Response, Unanswered> {
        self.open_at(format!("{}{path}", self.base)).await
    }

    async fn open_at(&self, url: String) -> Result<Response, Unanswered> {
        let mut response = self.http.get(url).send().await?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let mut body = Vec::new();
        while body.len() < LONGEST_MESSAGE
            && let Some(piece) = response.chunk().await?
        {
            body.extend(piece.iter().take(LONGEST_MESSAGE));
        }
        Err(Unanswered::Refused(status, message(&body)))
    }

    fn failed(&self, what: &str, error: &Unanswered) -> SourceError {
        let is_filtered = matches!(error, Unanswered::Refused(StatusCode::FORBIDDEN, _));
        let what = format!("{what} of {}", self.engine);
        match is_filtered {
            false => SourceError::caused(what, error),
            true => SourceError::new(format_args!(
                "{what}: {error} (a proxy of the engine has to allow GET of /_ping, /events, /containers and /networks)"
            )),
        }
    }

    fn error(&self, what: &str, reason: impl fmt::Display) -> SourceError {
        SourceError::new(format_args!("{what} of {}: {reason}", self.engine))
    }
}

impl Engine {
    /// An HTTP client for it, and the base of its URLs. Proxies set in the environment are not used.
    fn http(&self) -> Result<(reqwest::Client, String), SourceError> {
        tls::install_provider();
        let builder = reqwest::Client::builder()
            .connect_timeout(CONNECT)
            .redirect(Policy::none())
            .no_proxy()
            .http1_only()
            .dns_resolver(Arc::new(Resolver));
        let (builder, base) = match (&self.address, &self.certificates) {
            (Address::Unix(path), _) => (
                builder.tls_certs_only([]).unix_socket(path.as_path()),
                "http://localhost".to_owned(),
            ),
            (Address::Tcp(host), None) => (builder.tls_certs_only([]), format!("http://{host}")),
            (Address::Tcp(host), Some(folder)) => {
                let [ca, certificate, key] =
                    ["ca.pem", "cert.pem", "key.pem"].map(|name| Some(folder.join(name)));
                let tls = ClientTls::new(ca, certificate, key, ["ca.pem", "cert.pem", "key.pem"])
                    .map_err(SourceError::new)?;
                (tls.prepare(builder, true)?, format!("https://{host}"))
            }
        };
        let client =
            builder.build().map_err(|e| SourceError::caused("cannot create an HTTP client", &e))?;
        Ok((client, base))
    }
}

async fn within<T>(
    limit: Duration,
    asking: impl Future<Output = Result<T, Unanswered>>,
) -> Result<T, Unanswered> {
    timeout(limit, asking).await.unwrap_or(Err(Unanswered::Late(limit)))
}

/// The bytes read from a stream of lines.
#[derive(Debug, Default)]
struct Lines {
    bytes: Vec<u8>,
    /// The number of bytes that were searched and contain no end of line.
    seen: usize,
}

impl Lines {
    fn add(&mut self, piece: &[u8]) -> Result<(), Unanswered> {
        if self.bytes.len() + piece.len() > LARGEST {
            return Err(Unanswered::LongEvent);
        }
        self.bytes.extend_from_slice(piece);
        Ok(())
    }

    /// The next whole line.
    fn next(&mut self) -> Option<Vec<u8>> {
        let unseen = self.bytes.get(self.seen..).unwrap_or_default();
        let Some(end) = unseen.iter().position(|byte| *byte == b'\n') else {
            self.seen = self.bytes.len();
            return None;
        };
        let line = self.bytes.drain(..=self.seen + end).collect();
        self.seen = 0;
        Some(line)
    }
}

/// Maximum length of an error's body that is read, and of its part in a log line, in bytes.
const LONGEST_MESSAGE: usize = 16 << 10;
const LONGEST_IN_LOG: usize = 300;

/// The message of an error's body, on one line. An engine sends JSON. A proxy in front of it may send a page.
fn message(body: &[u8]) -> String {
    let text = match serde_json::from_slice::<answers::ErrorBody>(body) {
        Ok(fault) => fault.message,
        Err(_) => String::from_utf8_lossy(body).into_owned(),
    };
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(LONGEST_IN_LOG) {
        Some((end, _)) => format!("{}…", line.get(..end).unwrap_or_default()),
        None => line,
    }
}

/// `1.41`
fn version(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The time in an answer's `Date`, in the format of the events' `since`. It is cut to seconds, so events of the second
/// before may be repeated.
pub(super) fn since(date: &str) -> Option<String> {
    let time = OffsetDateTime::parse(date, &Rfc2822).ok()?;
    Some(time.unix_timestamp().to_string())
}

/// This host's time in the same format, for an answer without a date.
fn now() -> String {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_date_is_said_in_seconds() {
        assert_eq!(since("Fri, 02 Jan 2026 03:04:05 GMT").as_deref(), Some("1767323045"));
        for wrong in ["", "yesterday", "Fri, 02 Jan 2026"] {
            assert_eq!(since(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn events_are_lines_in_any_pieces_and_none_is_endless() {
        let mut lines = Lines::default();
        let mut read = Vec::new();
        for piece in ["a", "b\nc\n", "", "\n", "d", "e\nf"] {
            lines.add(piece.as_bytes()).unwrap();
            while let Some(line) = lines.next() {
                read.push(String::from_utf8(line).unwrap());
            }
        }
        assert_eq!(read, ["ab\n", "c\n", "\n", "de\n"]);
        let piece = vec![b'x'; 1 << 20];
        let taken = (0..100).take_while(|_| lines.add(&piece).is_ok() && lines.next().is_none());
        assert!(taken.count() < 16);
    }

    #[test]
    fn versions_are_numbers_and_the_newest_known_one_is_a_bound() {
        let asked = |text: &str| version(text).map(|version| version.min(NEWEST));
        assert_eq!(asked("1.41"), Some((1, 41)));
        assert_eq!(asked("1.9"), Some((1, 9)));
        assert_eq!(asked("1.99"), Some(NEWEST));
        assert_eq!(asked("2.0"), Some(NEWEST));
        for wrong in ["", "1", "1.x", "v1.41", "1.41.1"] {
            assert_eq!(asked(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_an_error_says_is_one_short_line() {
        assert_eq!(message(br#"{"message": "no such\ncontainer"}"#), "no such container");
        let page = b"<html><body><h1>403 Forbidden</h1>\n\nRequest forbidden.\r\n</body></html>\n";
        assert_eq!(
            message(page),
            "<html><body><h1>403 Forbidden</h1> Request forbidden. </body></html>"
        );
        assert_eq!(message(b""), "");
        assert_eq!(message("ä".repeat(1000).as_bytes()).chars().count(), LONGEST_IN_LOG + 1);
    }
}
