//! Consul: its HTTP API and blocking queries (developer.hashicorp.com/consul/api-docs/features/blocking).
//!
//! Reads use the default consistency, never `stale`: a server that lags may return an older index and an older list. The
//! advantage of `stale`, an answer without a leader, is not needed, because we keep the last answer anyway.

use std::{
    collections::BTreeMap,
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use futures_util::FutureExt;
use reqwest::header::{HeaderMap, HeaderValue};
use url::Url;

use super::{
    ConsulSettings, Secret,
    http::{Http, HttpAnswer, LongPoll, Poller, secret_header},
    reuse::Recent,
};
use crate::{
    body,
    source::SourceError,
    tls::{ClientTls, Weakness, is_loopback},
};

/// How long the server may hold a query while nothing changes. This limits how long a hanging server goes unnoticed.
const WAIT: Duration = Duration::from_secs(30);

/// Maximum age of an answer that several tasks share.
const RECENT: Duration = Duration::from_secs(60);
/// Maximum size of such an answer that is kept, in bytes.
const LARGEST_KEPT: usize = 1 << 20;
/// Maximum size of a token file, in bytes.
const LARGEST_TOKEN: usize = 16 << 10;

/// The client of one Consul agent or server.
#[derive(Debug)]
pub(crate) struct ConsulClient {
    base: Url,
    http: Http,
    token: Token,
    /// Whether a user and a password are sent.
    logs_in: bool,
    /// Whether the server's certificate is verified.
    verifies: bool,
    /// For tasks that ask the same.
    services: Recent<(Url, Arc<Services>)>,
}

/// The names of all services, each with the tags that any of its instances has.
pub(crate) type Services = BTreeMap<String, Vec<String>>;

#[derive(Debug)]
enum Token {
    None,
    Text(Secret),
    File(PathBuf),
}

impl ConsulClient {
    /// The agent at `base`. The scheme decides whether TLS is used. `token_file` is preferred to the one in the settings.
    pub(crate) fn new(
        base: Url,
        token_file: Option<PathBuf>,
        settings: &ConsulSettings,
    ) -> Result<Self, String> {
        let (ca, ca_name) = match &settings.ca {
            Some(file) => (Some(file), "CONSUL_CACERT"),
            None => (settings.ca_path.as_ref(), "CONSUL_CAPATH"),
        };
        let tls = ClientTls::new(
            ca.cloned(),
            settings.certificate.clone(),
            settings.key.clone(),
            [ca_name, "CONSUL_CLIENT_CERT", "CONSUL_CLIENT_KEY"],
        )?;
        // A file is preferred to a token, as in Consul's own tools.
        let token = match (token_file.or_else(|| settings.token_file.clone()), &settings.token) {
            (Some(file), _) => Token::File(file),
            (None, Some(token)) => Token::Text(token.clone()),
            (None, None) => Token::None,
        };
        let user = settings.auth.as_ref().map(|auth| match auth.reveal().split_once(':') {
            Some((user, password)) => (user.to_owned(), Some(password.into())),
            None => (auth.reveal().to_owned(), None),
        });
        let mut http = Http::new("consul", tls, settings.tls_verify, user);
        if let Some(name) = &settings.server_name {
            http = http.under_the_name(&base, name)?;
        }
        let (logs_in, verifies) = (settings.auth.is_some(), settings.tls_verify);
        Ok(Self { base, http, token, logs_in, verifies, services: Recent::default() })
    }

    /// How connections to it are unprotected.
    pub(crate) fn weaknesses(&self) -> Vec<Weakness> {
        let (host, encrypts) =
            (self.base.host_str().unwrap_or_default(), self.base.scheme() == "https");
        let mut all = Vec::new();
        if encrypts && !self.verifies {
            all.push(Weakness {
                what: format!(
                    "the certificate of Consul at {host} is not verified (CONSUL_HTTP_SSL_VERIFY): another server can answer in its place, and read the token"
                ),
                fix: "set CONSUL_CACERT to its authority, and leave CONSUL_HTTP_SSL_VERIFY out",
            });
        }
        let secret = match (&self.token, self.logs_in) {
            (Token::Text(_) | Token::File(_), _) => Some("token"),
            (Token::None, true) => Some("password"),
            (Token::None, false) => None,
        };
        if let Some(secret) = secret.filter(|_| !encrypts && !is_loopback(host)) {
            all.push(Weakness {
                what: format!(
                    "the Consul {secret} is sent to {host} without TLS: everybody on the way can read it"
                ),
                fix: "use consuls://, or an agent on this host",
            });
        }
        all
    }

    pub(crate) fn base(&self) -> &Url {
        &self.base
    }

    /// The URL of a path below `/v1/`.
    pub(crate) fn url<'a>(&self, path: impl IntoIterator<Item = &'a str>) -> Url {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().push("v1").extend(path);
        }
        url
    }

    /// All services, as `url` lists them. At most [`RECENT`] old if it is the last requested URL. The list is parsed once
    /// for all callers.
    pub(crate) async fn services(&self, url: Url) -> Result<Arc<Services>, SourceError> {
        let ask = async || {
            let answer = self.ask(&url, None).await?;
            if answer.body().len() > LARGEST_KEPT {
                return Err(answer.fault(format_args!("longer than {LARGEST_KEPT} bytes")));
            }
            answer.parsed(|body| serde_json::from_slice(body)).await.map(Arc::new)
        };
        let first = async { Ok((url.clone(), ask().await?)) };
        let (of, answer) = self.services.get(RECENT, first).await?;
        if of == url { Ok(answer) } else { ask().await }
    }

    /// Follows the answers to `url`.
    pub(crate) fn query(self: Arc<Self>, url: Url) -> BlockingQuery {
        BlockingQuery { consul: self, url, index: 0, asking: Poller::new(), body: 0 }
    }

    /// Asks for the current state. With a turn and an index: waits until the state is newer than the index, or the wait is
    /// over.
    async fn ask(
        &self,
        url: &Url,
        held: Option<(LongPoll, u64)>,
    ) -> Result<HttpAnswer, SourceError> {
        let headers = self.headers().await?;
        let answer = match held {
            None => self.http.get(url, headers).await?,
            Some((turn, index)) => {
                let mut url = url.clone();
                url.query_pairs_mut()
                    .append_pair("index", &index.to_string())
                    .append_pair("wait", &format!("{}ms", WAIT.as_millis()));
                // The server adds up to a sixteenth of the wait, so that many clients do not return at the same time.
                self.http.get_held(&url, headers, WAIT + WAIT / 16, &turn).await?
            }
        };
        if answer.status != 200 {
            return Err(answer.refusal());
        }
        // During an election a server may answer from an incomplete state.
        if answer.headers.get("X-Consul-KnownLeader").is_some_and(|known| known == "false") {
            return Err(answer.fault("Consul has no leader, so the list may not be complete"));
        }
        Ok(answer)
    }

    /// The current token: a file is read for each request, because agents renew it.
    async fn headers(&self) -> Result<HeaderMap, SourceError> {
        let (text, from) = match &self.token {
            Token::None => return Ok(HeaderMap::new()),
            Token::Text(token) => (token.reveal().to_owned(), "CONSUL_HTTP_TOKEN".to_owned()),
            Token::File(path) => {
                let (from, path) = (format!("token file {}", path.display()), path.clone());
                let read = move || body::file(&path, LARGEST_TOKEN);
                let read = tokio::task::spawn_blocking(read).await;
                let read = read.unwrap_or_else(|error| Err(error.into()));
                (read.map_err(|e| SourceError::caused(&from, &e))?, from)
            }
        };
        let text = text.trim();
        let wrong = |what| SourceError::new(format_args!("{from} {what}"));
        if text.is_empty() {
            return Err(wrong("is empty"));
        }
        let value = HeaderValue::from_str(text)
            .map_err(|_| wrong("has a character that tokens cannot have"))?;
        Ok(secret_header("x-consul-token", value))
    }
}

/// A query that Consul answers again when its answer may have changed.
pub(crate) struct BlockingQuery {
    consul: Arc<ConsulClient>,
    url: Url,
    /// The index to wait for. 0: read the current state.
    index: u64,
    asking: Poller<Result<HttpAnswer, SourceError>>,
    /// Hash of the last answer, to detect a change.
    body: u64,
}

impl BlockingQuery {
    /// The next answer, whether it differs from the last or not. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Result<HttpAnswer, SourceError> {
        loop {
            if self.index == 0 {
                self.asking.leave_answered();
                self.asking.pace().await;
                let answer = self.consul.ask(&self.url, None).await?;
                self.take(&answer)?;
                return Ok(answer);
            }
            let (consul, url, index) = (self.consul.clone(), self.url.clone(), self.index);
            let ask = |turn| async move { consul.ask(&url, Some((turn, index))).await }.boxed();
            match self.asking.held(&self.consul.http, ask).await {
                None => self.index = 0,
                Some(answer) => {
                    let answer = answer?;
                    self.take(&answer)?;
                    // An index that decreased: the answer is older than what was read meanwhile, or the server was
                    // restored.
                    if self.index > 0 {
                        return Ok(answer);
                    }
                }
            }
        }
    }

    /// Leaves time for other tasks: the next request waits for the acceptable delay of a change, or longer if reading the
    /// last answer took long.
    pub(crate) fn took(&mut self, time: Duration) {
        self.asking.took(time);
    }

    /// Makes the next answer the current state. A held query continues, unless its answer has begun.
    pub(crate) fn read_again(&mut self) {
        self.index = 0;
    }

    fn take(&mut self, answer: &HttpAnswer) -> Result<(), SourceError> {
        let index = answer
            .number("X-Consul-Index")
            .ok_or_else(|| answer.fault("the answer has no X-Consul-Index: is this Consul?"))?;
        self.index = next_index(self.index, index);
        let mut hasher = DefaultHasher::new();
        answer.body().hash(&mut hasher);
        let body = hasher.finish();
        self.asking.answered(body != self.body);
        self.body = body;
        Ok(())
    }
}

impl fmt::Debug for BlockingQuery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("BlockingQuery").field(&self.url.as_str()).finish()
    }
}

/// The index to wait for, after a request with `last` returned `next`. At least 1; 0 if the index decreased, as after a
/// restore of the server.
fn next_index(last: u64, next: u64) -> u64 {
    if next < last { 0 } else { next.max(1) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_is_waited_on_from_one_and_never_backwards() {
        assert_eq!(next_index(0, 0), 1);
        assert_eq!(next_index(0, 7), 7);
        assert_eq!(next_index(7, 7), 7);
        assert_eq!(next_index(7, 8), 8);
        assert_eq!(next_index(7, 6), 0);
        assert_eq!(next_index(1, 0), 0);
    }
}
