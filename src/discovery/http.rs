//! Asking a registry over HTTP, so that no answer can hold us up, fill the memory, or send us elsewhere.

use std::time::Duration;

use reqwest::{
    Certificate, Client, ClientBuilder, Identity, RequestBuilder, Response, StatusCode,
    header::HeaderMap, redirect::Policy,
};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep_until, timeout};
use url::Url;

use super::address::excerpt;
use crate::{
    source::SourceError,
    tls::{self, ClientTls},
};

/// How long a whole answer may take that the server does not hold back on purpose.
pub(super) const ANSWER: Duration = Duration::from_secs(10);
/// How long a connection may take to open.
pub(super) const CONNECT: Duration = Duration::from_secs(3);
/// The longest body that is read.
const LARGEST: usize = 16 << 20;

/// A client for one session. Redirects are not followed, as they would carry the token to wherever they point, and
/// proxies of the environment are not asked: a registry is part of the same network.
pub(super) fn builder(tls: Option<&ClientTls>) -> Result<ClientBuilder, SourceError> {
    tls::install_provider();
    let builder =
        Client::builder().connect_timeout(CONNECT).redirect(Policy::none()).no_proxy().http1_only();
    let Some(tls) = tls else {
        // Without TLS there is nobody to trust: the system's authorities need not even exist.
        return Ok(builder.tls_certs_only([]));
    };
    let pem = tls.load()?;
    let wrong = |what: &str, e: reqwest::Error| SourceError::caused(what, &e);
    let builder = match &pem.ca {
        Some(ca) => {
            let authorities =
                Certificate::from_pem_bundle(ca).map_err(|e| wrong("the CA file", e))?;
            if authorities.is_empty() {
                return Err(SourceError::new("the CA file holds no certificate in PEM"));
            }
            builder.tls_certs_only(authorities)
        }
        None => builder,
    };
    Ok(match pem.identity {
        Some((certificate, key)) => {
            let identity = Identity::from_pem(&[certificate, b"\n".to_vec(), key].concat())
                .map_err(|e| wrong("the client certificate and key", e))?;
            builder.identity(identity)
        }
        None => builder,
    })
}

pub(super) fn build(builder: ClientBuilder) -> Result<Client, SourceError> {
    builder.build().map_err(|e| SourceError::caused("an HTTP client cannot be made", &e))
}

/// A whole answer.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) url: Url,
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Vec<u8>,
}

/// Asks, and reads the whole answer, all within `limit`.
pub(super) async fn get(
    url: &Url,
    request: RequestBuilder,
    limit: Duration,
) -> Result<Answer, SourceError> {
    let late = |_| fault(url, format_args!("no whole answer within {} s", limit.as_secs_f32()));
    timeout(limit, async { read(url, open(url, request).await?).await }).await.map_err(late)?
}

/// Asks, and waits for the head of the answer, however long it takes.
pub(super) async fn open(url: &Url, request: RequestBuilder) -> Result<Response, SourceError> {
    request
        .send()
        .await
        .map_err(|e| SourceError::caused(format_args!("GET {url}"), &e.without_url()))
}

/// Reads a whole answer, however long it takes.
pub(super) async fn read(url: &Url, mut response: Response) -> Result<Answer, SourceError> {
    let mut body = Vec::new();
    while more(url, &mut response, &mut body).await? {}
    Ok(Answer::new(url, &response, body))
}

/// Reads the next piece of a body; false at its end.
pub(super) async fn more(
    url: &Url,
    response: &mut Response,
    body: &mut Vec<u8>,
) -> Result<bool, SourceError> {
    let piece = response
        .chunk()
        .await
        .map_err(|e| SourceError::caused(format_args!("GET {url}"), &e.without_url()))?;
    let Some(piece) = piece else { return Ok(false) };
    if body.len() + piece.len() > LARGEST {
        return Err(fault(url, format_args!("the answer is longer than {LARGEST} bytes")));
    }
    body.extend_from_slice(&piece);
    Ok(true)
}

/// What is wrong with the answer to a request.
pub(super) fn fault(url: &Url, reason: impl std::fmt::Display) -> SourceError {
    SourceError::new(format_args!("GET {url}: {reason}"))
}

impl Answer {
    pub(super) fn new(url: &Url, response: &Response, body: Vec<u8>) -> Self {
        let (status, headers) = (response.status(), response.headers().clone());
        Self { url: url.clone(), status, headers, body }
    }

    pub(super) fn fault(&self, reason: impl std::fmt::Display) -> SourceError {
        fault(&self.url, reason)
    }

    /// The error that the status and the body's first words are.
    pub(super) fn refusal(&self) -> SourceError {
        let text = String::from_utf8_lossy(&self.body);
        let fault = self.fault(format_args!("{} {:?}", self.status, excerpt(text.trim())));
        // A date may stand there as well (RFC 9110, 10.2.3), which our own pauses have to do for.
        match self.number("Retry-After") {
            Some(seconds) => fault.after(Duration::from_secs(seconds)),
            None => fault,
        }
    }

    pub(super) fn json<T: DeserializeOwned>(&self) -> Result<T, SourceError> {
        serde_json::from_slice(&self.body)
            .map_err(|e| self.fault(format_args!("the answer is not what was expected: {e}")))
    }

    /// A header that is a number.
    pub(super) fn number(&self, header: &str) -> Option<u64> {
        number(&self.headers, header)
    }
}

pub(super) fn number(headers: &HeaderMap, header: &str) -> Option<u64> {
    headers.get(header)?.to_str().ok()?.parse().ok()
}

/// Keeps a distance between polls: a server that answers at once, for ever, must not make us spin.
#[derive(Debug)]
pub(super) struct Pace {
    last: Option<Instant>,
}

impl Pace {
    /// After an answer that brought nothing new.
    pub(super) const IDLE: Duration = Duration::from_millis(100);
    /// After news: short enough to be nobody's delay.
    pub(super) const NEWS: Duration = Duration::from_millis(5);

    pub(super) fn new() -> Self {
        Self { last: None }
    }

    /// Waits until `distance` after its last return.
    pub(super) async fn keep(&mut self, distance: Duration) {
        if let Some(last) = self.last {
            sleep_until(last + distance).await;
        }
        self.last = Some(Instant::now());
    }
}
