//! The v2 store. The branch is read once, and then followed event by event: each poll waits for the event after the last
//! one (etcd.io/docs/v2.3/api, "Waiting for a change"). The server keeps 1,000 events. If the requested one is gone, the
//! branch is read again. A branch without a long poll is read every few seconds from the member's own memory, because a
//! quorum read costs as much as a write.

use std::{fmt, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use futures_util::FutureExt;
use reqwest::{StatusCode, header::HeaderMap};
use rustls::pki_types::ServerName;
use tokio::{
    io::AsyncReadExt,
    net::TcpStream,
    time::{Instant, sleep_until, timeout},
};
use tokio_rustls::TlsConnector;
use url::Url;

use super::{Branch, EtcdClient, Step, Stores, Tree};
use crate::{
    body::Body,
    registry::http::{self, ANSWER, HttpAnswer, LongPoll, Poller},
    resolve,
    source::SourceError,
    tls::ClientTls,
};

pub(crate) mod answers;

use answers::{ErrorBody, Version};

/// Interval for confirming a branch without changes. A poll may wait for days, and a hanging server would not be noticed.
const CONFIRMED: Duration = Duration::from_secs(10);
/// Timeout for a poll's headers. They arrive at once, and the event later.
const HEAD: Duration = Duration::from_secs(5);
/// Maximum age of an answer about the leader or the server's version.
const RECENT: Duration = Duration::from_secs(5);

/// Timeout for a member's greeting.
const GREETING: Duration = Duration::from_secs(1);

/// The header with the store's current index.
const INDEX: &str = "X-Etcd-Index";

/// Error codes of the store.
const KEY_NOT_FOUND: u64 = 100;
const EVENT_FORGOTTEN: u64 = 401;

/// One branch in the v2 store.
pub(crate) struct BranchFollower {
    etcd: Arc<EtcdClient>,
    /// The path of the key's URL.
    path: String,
    tree: Tree,
    /// The index of the event to wait for. `None` if the branch must be read with a quorum.
    wait: Option<u64>,
    read_again: bool,
    asking: Poller<Polled>,
    confirm_at: Instant,
}

/// `None` if the poll cannot give the events, and the branch must be read.
type Polled = Result<Option<HttpAnswer>, SourceError>;

impl BranchFollower {
    pub(super) fn new(etcd: Arc<EtcdClient>, branch: &Branch) -> Result<Self, SourceError> {
        let path = ["/v2/keys"].into_iter().chain(branch.segments()?).collect::<Vec<_>>().join("/");
        Ok(Self {
            etcd,
            path,
            tree: Tree::default(),
            wait: None,
            read_again: false,
            asking: Poller::new(),
            confirm_at: Instant::now(),
        })
    }

    pub(crate) fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Makes the next step a full read.
    pub(crate) fn read_again(&mut self) {
        self.read_again = true;
    }

    /// Reads the branch; from then on, waits for the next change or confirmation. Cancel-safe.
    ///
    /// There may be ten thousand that wait. What is done now and then is in a box, which is given back.
    pub(crate) async fn next(&mut self) -> Result<Step, SourceError> {
        loop {
            let Some(wait) = self.wait.filter(|_| !self.read_again) else {
                self.asking.leave_answered();
                self.asking.pace().await;
                return self.read(true).boxed().await;
            };
            let (etcd, path) = (self.etcd.clone(), self.path.clone());
            let ask = |turn| poll(etcd, path, wait, turn).boxed();
            let polled = tokio::select! {
                polled = self.asking.held(&self.etcd.http, ask) => polled,
                () = sleep_until(self.confirm_at) => {
                    self.etcd.has_leader().boxed().await?;
                    self.confirm_at = Instant::now() + CONFIRMED;
                    return Ok(Step::Confirmed);
                }
            };
            let step = match polled {
                None => {
                    self.etcd.has_leader().boxed().await?;
                    Some(self.read(false).boxed().await?)
                }
                Some(answer) => {
                    self.asking.answered(false);
                    self.wait = None;
                    answer?.map_or(Ok(None), |answer| self.take(&answer, wait))?
                }
            };
            if self.wait.is_some()
                && let Some(step) = step
            {
                return Ok(step);
            }
        }
    }

    /// Reads the whole branch. `agreed`: with a quorum, instead of the member's own state.
    async fn read(&mut self, agreed: bool) -> Result<Step, SourceError> {
        let quorum = if agreed { "&quorum=true" } else { "" };
        let query = format!("recursive=true&sorted=true{quorum}");
        let answer = self.etcd.get(&self.path, Some(&query)).await?;
        let url = answer.url.clone();
        let (tree, index) = match answer.status {
            StatusCode::OK => {
                let index = answer.number(INDEX);
                (answer.parsed(answers::tree).await?, index)
            }
            StatusCode::NOT_FOUND => match serde_json::from_slice::<ErrorBody>(answer.body()) {
                Ok(fault) if fault.error_code == KEY_NOT_FOUND => {
                    (Tree::default(), answer.number(INDEX).or(Some(fault.index)))
                }
                Ok(_) => return Err(answer.refusal()),
                Err(_) => return Ok(Step::NoSuchStore),
            },
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                return Err(answer.refusal().refused());
            }
            _ => return Err(answer.refusal()),
        };
        let index = index
            .ok_or_else(|| http::fault(&url, "the answer has no X-Etcd-Index: is this etcd?"))?;
        let next = index.saturating_add(1);
        let goes_back = self.wait.is_some_and(|wait| next < wait);
        if goes_back && !agreed {
            // The member lags, or it is another store: a quorum read decides.
            self.wait = None;
            return Ok(Step::Confirmed);
        }
        // A running poll continues if it waits for the right index.
        if goes_back || tree != self.tree || !self.asking.is_held() {
            self.asking.give_up();
            self.wait = Some(next);
        }
        self.read_again = false;
        self.tree = tree;
        self.asking.answered(true);
        self.confirm_at = Instant::now() + CONFIRMED;
        Ok(Step::Read)
    }

    /// Takes the answer to a poll. `None` if it contains no event.
    fn take(&mut self, answer: &HttpAnswer, wait: u64) -> Result<Option<Step>, SourceError> {
        if answer.status != StatusCode::OK {
            let fault = serde_json::from_slice::<ErrorBody>(answer.body());
            if fault.is_ok_and(|fault| fault.error_code == EVENT_FORGOTTEN) {
                return Ok(None);
            }
            return Err(answer.refusal());
        }
        let mut next = wait;
        let mut step = None;
        // If the server has waited long enough, the answer is empty. Then the request is repeated.
        if !answer.body().is_empty() {
            let wrong = |e| answer.fault(format_args!("cannot parse the answer: {e}"));
            let event = answers::event(answer.body()).map_err(wrong)?;
            let index = event.node.modified_index;
            if index < wait {
                let what = format_args!("received event {index}, expected {wait}");
                return Err(answer.fault(what));
            }
            let Some(changed) = event.apply(&mut self.tree) else { return Ok(None) };
            next = index.saturating_add(1);
            step = Some(if changed { Step::Read } else { Step::Confirmed });
            self.asking.answered(true);
        }
        self.wait = Some(next);
        self.confirm_at = Instant::now() + CONFIRMED;
        Ok(step)
    }
}

impl fmt::Debug for BranchFollower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("v2::Follower").field(&self.path).finish()
    }
}

/// Returns when it is certain that a member's port only speaks gRPC (`--listen-client-http-urls` of etcd 3.5), and so has
/// no v2 store. Never returns otherwise.
///
/// Such a port sends an HTTP/2 greeting before any request, while a port for both waits for a request. With TLS it does so
/// for clients that offer HTTP/2, and closes the connection of all others.
async fn answers_only_grpc(member: &Url, tls: &ClientTls) {
    let plain = greets_in_http2(member, tls, &[]).await;
    let certain = match plain {
        Some(greets) if greets || member.scheme() == "http" => greets,
        Some(_) => greets_in_http2(member, tls, &[b"h2"]).await == Some(true),
        None => false,
    };
    if !certain {
        std::future::pending().await
    }
}

/// Whether a member sends an HTTP/2 greeting, or closes the connection, without a request. Waits until either happens.
/// `None` if there is no connection. With TLS, `protocols` are offered.
async fn greets_in_http2(member: &Url, tls: &ClientTls, protocols: &[&[u8]]) -> Option<bool> {
    let host = member.host_str()?.trim_matches(['[', ']']).to_owned();
    let port = member.port_or_known_default()?;
    let addresses = resolve::addresses(&host).await.ok()?;
    let addresses: Vec<_> = addresses.into_iter().map(|ip| SocketAddr::new(ip, port)).collect();
    let mut stream = TcpStream::connect(addresses.as_slice()).await.ok()?;
    let mut head = [0; 9];
    let read = if member.scheme() == "https" {
        let mut config = tls.load().ok()?.config().ok()??;
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        let tls = TlsConnector::from(Arc::new(config));
        let mut stream = tls.connect(ServerName::try_from(host).ok()?, stream).await.ok()?;
        stream.read_exact(&mut head).await
    } else {
        stream.read_exact(&mut head).await
    };
    // The head of a SETTINGS frame: three bytes of length, the type, no flags, stream 0 (RFC 9113, 4.1 and 3.4).
    Some(read.is_ok() && matches!(head, [_, _, _, 4, 0, 0, 0, 0, 0]))
}

async fn poll(etcd: Arc<EtcdClient>, path: String, wait: u64, turn: LongPoll) -> Polled {
    let query = format!("wait=true&recursive=true&waitIndex={wait}");
    let (number, url) = etcd.url(&path, Some(&query));
    let Ok(opened) = timeout(HEAD, etcd.http.open(&url, HeaderMap::new())).await else {
        // The server hangs, or something between holds the headers back. A read will show it.
        return Ok(None);
    };
    let mut response = opened.inspect_err(|_| etcd.members.failed(number))?;
    if http::number(response.headers(), INDEX).is_some_and(|i| i.saturating_add(1) < wait) {
        // Another store than the one that was read, for example restored behind the same address. Its next events are not
        // the ones that are awaited.
        return Ok(None);
    }
    let mut body = Body::default();
    let ended = async {
        let piece = response.chunk().await.map_err(|error| http::broken(&url, error))?;
        if let Some(piece) = piece {
            turn.answered();
            etcd.http.add(&url, &piece, &mut body).await?;
            etcd.http.rest(&url, &mut response, &mut body, ANSWER, Instant::now()).await?;
        }
        Ok(Some(etcd.http.answer(&url, &response, body)))
    };
    ended.await.inspect_err(|_| etcd.members.failed(number))
}

impl EtcdClient {
    /// A member without a leader still accepts polls, but no events arrive. Asking for the leader is cheaper than reading.
    async fn has_leader(&self) -> Result<(), SourceError> {
        let ask = async {
            let answer = self.get("/v2/members/leader", None).await?;
            match answer.status {
                StatusCode::SERVICE_UNAVAILABLE => Err(answer.refusal()),
                // Old servers do not have this request, and others may refuse it.
                _ => Ok(()),
            }
        };
        self.leader.get(RECENT, ask).await
    }

    /// The stores that this server may have.
    pub(crate) async fn stores(&self) -> Result<Stores, SourceError> {
        let ask = async {
            let (_, url) = self.url("", None);
            let mut only_grpc = pin!(answers_only_grpc(&url, &self.tls));
            let error = tokio::select! {
                stores = self.version() => match stores {
                    Ok(stores) => return Ok(stores),
                    Err(error) => error,
                },
                () = &mut only_grpc => return Ok(Stores::V3),
            };
            // The greeting may arrive later than the failure that it explains.
            match timeout(GREETING, only_grpc).await {
                Ok(()) => Ok(Stores::V3),
                Err(_) => Err(error),
            }
        };
        self.stores.get(RECENT, ask).await
    }

    async fn version(&self) -> Result<Stores, SourceError> {
        let answer = match self.get("/version", None).await {
            // With TLS, a port for gRPC only accepts no other protocol.
            Err(error) if error.to_string().contains("NoApplicationProtocol") => {
                return Ok(Stores::V3);
            }
            answer => answer?,
        };
        if answer.status != StatusCode::OK {
            return Err(answer.refusal());
        }
        // Early versions of etcd answer with a text.
        match serde_json::from_slice::<Version>(answer.body()) {
            Ok(version) if version.has_v3() => Ok(Stores::Both),
            _ => Ok(Stores::V2),
        }
    }

    /// The error for a server without a v2 store.
    pub(crate) fn no_v2(&self) -> SourceError {
        let (_, url) = self.url("/v2/keys", None);
        http::fault(&url, "this etcd has no v2 API: expected one with --enable-v2")
    }
}
