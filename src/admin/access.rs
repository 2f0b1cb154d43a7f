//! Access control of the API: reading and changing.
//!
//! Every client that reaches the listener may read, except web pages in a browser. A page can make its own host name
//! resolve to this listener (DNS rebinding), so the request's Host header must name this listener. A page of another origin
//! cannot read an answer, but it can cause work and measure times, so requests that a browser marks as coming from such a
//! page are refused. Changes need the Unix socket, whose file mode grants access, or the token.

#![expect(clippy::disallowed_methods, reason = "a thread of its own reads the token file")]

use std::{
    fs,
    io::Read,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, header},
    middleware::Next,
    response::{IntoResponse, Response},
};

use tokio::{sync::Semaphore, time::timeout};

use super::refusal::Refusal;

/// What a listener requires of a request.
#[derive(Debug)]
pub(super) enum Access {
    /// The mode of the socket's file grants access.
    Unix,
    Tcp {
        bound: SocketAddr,
        token_file: Option<PathBuf>,
        /// This machine's name, for a listener on every address.
        name: String,
    },
}

impl Access {
    pub(super) fn unix() -> Self {
        Self::Unix
    }

    pub(super) fn tcp(bound: SocketAddr, token_file: Option<PathBuf>) -> Self {
        let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
        Self::Tcp { bound, token_file, name }
    }

    /// Whether a request with this Host header is for this listener.
    fn is_named(&self, host: &str) -> bool {
        let Self::Tcp { bound, name, .. } = self else { return true };
        let host = without_port(host);
        match host.parse::<IpAddr>() {
            // Unlike a name, an address cannot be made to resolve to something else.
            Ok(address) => {
                address.is_loopback() || address == bound.ip() || bound.ip().is_unspecified()
            }
            Err(_) => {
                host.eq_ignore_ascii_case("localhost")
                    || (bound.ip().is_unspecified() && host.eq_ignore_ascii_case(name))
            }
        }
    }

    /// Whether a request is for this listener, and does not come from a web page of another origin.
    pub(super) fn is_own(&self, headers: &HeaderMap) -> bool {
        self.is_named(text(headers, header::HOST.as_str())) && self.foreign(headers).is_none()
    }

    /// The header by which a browser says that a page of another origin makes this request. `None` for requests of other
    /// programs and of embassy's own page.
    fn foreign(&self, headers: &HeaderMap) -> Option<String> {
        // Browsers cannot connect to a Unix socket.
        let Self::Tcp { .. } = self else { return None };
        let site = text(headers, SITE);
        if !["", "same-origin", "none"].contains(&site) {
            return Some(format!("Sec-Fetch-Site: {site}"));
        }
        let (origin, host) =
            (text(headers, header::ORIGIN.as_str()), text(headers, header::HOST.as_str()));
        let own = origin.strip_prefix("http://").is_some_and(|own| own.eq_ignore_ascii_case(host));
        (!origin.is_empty() && !own).then(|| format!("Origin: {origin}"))
    }

    /// Whether a request for this path may have any Host header. Probes send arbitrary names, and these paths reveal nothing.
    /// Prometheus sends the target name of its configuration: a listener that is open to the network serves metrics under any
    /// name.
    fn answers_any_host(&self, path: &str) -> bool {
        match (self, path) {
            (_, path) if is_probe(path) => true,
            (Self::Tcp { bound, .. }, "/metrics") => !bound.ip().is_loopback(),
            _ => false,
        }
    }

    /// Whether a request may change something. The token is read again each time, so that it can be replaced.
    pub(super) async fn may_change(&self, headers: &HeaderMap) -> bool {
        match self {
            Self::Unix => true,
            Self::Tcp { token_file: None, .. } => false,
            Self::Tcp { token_file: Some(file), .. } => {
                let borne = headers
                    .get(header::AUTHORIZATION)
                    .and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
                let Some(borne) = borne else { return false };
                let token = read_token(file.clone()).await.unwrap_or_default();
                let token = token.trim();
                !token.is_empty() && same(borne, token)
            }
        }
    }

    /// How to get access.
    pub(super) fn how_to_change(&self) -> &'static str {
        match self {
            Self::Unix => "changes are allowed here",
            Self::Tcp { token_file: None, .. } => {
                "changes need --admin=unix:///path, or --admin-token-file and its token"
            }
            Self::Tcp { .. } => {
                "changes need the header \"Authorization: Bearer <token>\" with the token of --admin-token-file"
            }
        }
    }
}

/// Refuses requests with another Host header, and changes without access. Sets the headers that restrict browsers.
pub(super) async fn check(
    State(access): State<Arc<Access>>,
    request: Request,
    next: Next,
) -> Response {
    // Not the request itself: its body cannot be shared between threads.
    let (method, headers) = (request.method().clone(), request.headers().clone());
    let mut response =
        match refusal(&access, request.uri().path().to_owned(), method, headers).await {
            Some(refusal) => refusal.into_response(),
            None => next.run(request).await,
        };
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    // A page of another origin can neither embed an answer nor keep a reference to the dashboard's window.
    for (name, value) in [
        ("cross-origin-resource-policy", "same-origin"),
        ("cross-origin-opener-policy", "same-origin"),
    ] {
        headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
    }
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

async fn refusal(
    access: &Access,
    path: String,
    method: Method,
    headers: HeaderMap,
) -> Option<Refusal> {
    let host = text(&headers, header::HOST.as_str());
    if !access.answers_any_host(&path) && !access.is_named(host) {
        return Some(Refusal::forbidden(format!(
            "host {host:?}: expected localhost or the address of --admin"
        )));
    }
    if !is_probe(&path)
        && !is_link(&path, &method, &headers)
        && let Some(header) = access.foreign(&headers)
    {
        return Some(Refusal::forbidden(format!(
            "{header:?}: expected no request of a web page, except of embassy's own dashboard"
        )));
    }
    let reads = matches!(method, Method::GET | Method::HEAD);
    if !reads && !access.may_change(&headers).await {
        return Some(Refusal::forbidden(access.how_to_change()));
    }
    None
}

/// Headers in which a browser names the site whose page makes a request, its mode and its destination
/// (w3.org/TR/fetch-metadata).
const SITE: &str = "sec-fetch-site";
const MODE: &str = "sec-fetch-mode";
const DESTINATION: &str = "sec-fetch-dest";

/// The calls for health checks. They reveal nothing.
fn is_probe(path: &str) -> bool {
    matches!(path, "/healthz" | "/readyz")
}

/// Whether a link on another page opens the dashboard. That page cannot read it.
fn is_link(path: &str, method: &Method, headers: &HeaderMap) -> bool {
    let opens = text(headers, MODE) == "navigate" && text(headers, DESTINATION) == "document";
    path == "/" && *method == Method::GET && opens
}

/// A header as text. Empty if it is missing.
fn text<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

/// Limits concurrent reads of the token file: a hanging file system keeps one thread for each.
static READS: Semaphore = Semaphore::const_new(2);
/// Timeout of a read.
const READ: Duration = Duration::from_secs(1);
/// Maximum length of a token in bytes.
const LONGEST: u64 = 4096;

/// The contents of the token file, read by a separate thread: a network file system that is down must not stop the API.
async fn read_token(file: PathBuf) -> Option<String> {
    let reading = async {
        let turn = READS.acquire().await.ok()?;
        let read = move || {
            let _turn = turn;
            // Opening a pipe would wait for its writer.
            fs::metadata(&file).ok().filter(|file| file.is_file())?;
            let mut token = String::new();
            fs::File::open(&file).ok()?.take(LONGEST).read_to_string(&mut token).ok()?;
            Some(token)
        };
        tokio::task::spawn_blocking(read).await.ok()?
    };
    timeout(READ, reading).await.ok()?
}

/// The host of `host:port` or `[v6]:port`.
fn without_port(host: &str) -> &str {
    if let Some(rest) = host.strip_prefix('[') {
        return rest.split(']').next().unwrap_or_default();
    }
    host.split(':').next().unwrap_or_default()
}

/// Compares in constant time.
fn same(a: &str, b: &str) -> bool {
    let differences = a.bytes().zip(b.bytes()).fold(0, |all, (a, b)| all | (a ^ b));
    a.len() == b.len() && differences == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(bound: &str) -> Access {
        Access::Tcp { bound: bound.parse().unwrap(), token_file: None, name: "box".to_owned() }
    }

    #[test]
    fn only_a_host_that_means_us_is_taken() {
        let loopback = access("127.0.0.1:9990");
        for host in ["127.0.0.1:9990", "localhost", "LocalHost:1", "[::1]:9990", "127.0.0.2"] {
            assert!(loopback.is_named(host), "{host}");
        }
        for host in ["", "evil.example", "evil.example:9990", "10.0.0.1", "localhost.evil.example"]
        {
            assert!(!loopback.is_named(host), "{host}");
        }
        assert!(access("10.0.0.1:9990").is_named("10.0.0.1:9990"));
        let everywhere = access("0.0.0.0:9990");
        assert!(everywhere.is_named("10.9.8.7:9990") && everywhere.is_named("box:9990"));
        assert!(!everywhere.is_named("evil.example"));
        assert!(Access::Unix.is_named("whatever"));
        assert!(everywhere.answers_any_host("/metrics") && loopback.answers_any_host("/readyz"));
        assert!(
            !everywhere.answers_any_host("/v1/status") && !loopback.answers_any_host("/metrics")
        );
    }

    #[tokio::test]
    async fn a_page_of_another_origin_gets_nothing_but_probes() {
        let tcp = access("127.0.0.1:9990");
        let refused = async |access: &Access, path: &str, more: &[(&'static str, &str)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in [("host", "127.0.0.1:9990")].iter().chain(more) {
                headers.insert(*name, value.parse().unwrap());
            }
            refusal(access, path.to_owned(), Method::GET, headers).await.is_some()
        };
        let link = [
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-mode", "navigate"),
            ("sec-fetch-dest", "document"),
        ];
        for foreign in [
            &[("sec-fetch-site", "cross-site")][..],
            &[("sec-fetch-site", "same-site")],
            &[("origin", "http://evil.example")],
            &[("origin", "http://127.0.0.1:3000")],
            &[("origin", "https://127.0.0.1:9990")],
            &[("origin", "null")],
            &link[..2],
        ] {
            for path in ["/", "/metrics", "/v1/status", "/v1/events", "/nothing"] {
                assert!(refused(&tcp, path, foreign).await, "{path} {foreign:?}");
            }
            for probe in ["/healthz", "/readyz"] {
                assert!(!refused(&tcp, probe, foreign).await, "{probe} {foreign:?}");
            }
            assert!(!refused(&Access::Unix, "/v1/status", foreign).await);
        }
        for own in [
            &[][..],
            &[("sec-fetch-site", "same-origin")],
            &[("sec-fetch-site", "none"), ("sec-fetch-mode", "navigate")],
            &[("origin", "http://127.0.0.1:9990")],
        ] {
            assert!(!refused(&tcp, "/v1/status", own).await, "{own:?}");
        }
        // A link on another page can open the dashboard, and no other path.
        assert!(!refused(&tcp, "/", &link).await);
        assert!(refused(&tcp, "/v1/status", &link).await);
    }

    #[test]
    fn the_token_must_be_the_token() {
        assert!(same("secret", "secret"));
        for wrong in ["", "secre", "secrets", "Secret"] {
            assert!(!same(wrong, "secret"));
        }
    }

    #[tokio::test]
    async fn changing_takes_the_token_in_the_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let access = Access::tcp("127.0.0.1:1".parse().unwrap(), Some(file.path().to_owned()));
        let bearing = |token: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, format!("Bearer {token}").parse().unwrap());
            headers
        };
        assert!(!access.may_change(&bearing("")).await, "an empty file is no token");
        std::fs::write(file.path(), "secret\n").unwrap();
        assert!(access.may_change(&bearing("secret")).await);
        assert!(!access.may_change(&bearing("wrong")).await);
        assert!(!access.may_change(&HeaderMap::new()).await);
    }

    /// A pipe without a writer, which blocks the reader forever.
    #[tokio::test]
    async fn a_token_file_that_hangs_is_no_token() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("token");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
        assert!(made.success());
        let access = Access::tcp("127.0.0.1:1".parse().unwrap(), Some(pipe));
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, HeaderValue::from_static("Bearer x"));
        for _ in 0..10 {
            assert!(!access.may_change(&headers).await);
        }
    }
}
