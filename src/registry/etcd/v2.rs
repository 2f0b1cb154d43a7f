//! The v2 store: the branch is read once, and followed event by event: each poll waits for the one after the last
//! (etcd.io/docs/v2.3/api, "Waiting for a change"). The server keeps 1,000 events; if the requested one is gone, the
//! branch is read again. A branch that has no long poll is read every few seconds, from the member's own
//! memory: a read that the cluster must agree upon costs as much as a write.

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
    registry::http::{self, ANSWER, Asking, HttpAnswer, LongPoll},
    resolve,
    source::SourceError,
    tls::ClientTls,
};

pub(crate) mod answers;

use answers::{Fault, Version};

/// How often a branch without changes is confirmed. A poll may wait for days, and a server that hangs would not be
/// noticed.
const CONFIRMED: Duration = Duration::from_secs(10);
/// How long a poll's headers may take: they come at once, and the event later.
const HEAD: Duration = Duration::from_secs(5);
/// How old an answer about the leader, or about the server's version, may be.
const RECENT: Duration = Duration::from_secs(5);

/// How long a member's greeting may take.
const GREETING: Duration = Duration::from_secs(1);

/// The header that says how far the store has come.
const INDEX: &str = "X-Etcd-Index";

/// Error codes of the store.
const KEY_NOT_FOUND: u64 = 100;
const EVENT_FORGOTTEN: u64 = 401;

/// One branch in the v2 store.
pub(crate) struct Follower {
    etcd: Arc<EtcdClient>,
    /// Of the key's URL.
    path: String,
    tree: Tree,
    /// The event that comes after the tree. `None` if it is to be read, as the cluster agrees upon it.
    wait: Option<u64>,
    read_again: bool,
    asking: Asking<Polled>,
    confirm_at: Instant,
}

/// `None` if the poll cannot tell, and the branch is to be read.
type Polled = Result<Option<HttpAnswer>, SourceError>;

impl Follower {
    pub(super) fn new(etcd: Arc<EtcdClient>, branch: &Branch) -> Result<Self, SourceError> {
        let path = ["/v2/keys"].into_iter().chain(branch.segments()?).collect::<Vec<_>>().join("/");
        Ok(Self {
            etcd,
            path,
            tree: Tree::default(),
            wait: None,
            read_again: false,
            asking: Asking::new(),
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

    /// Reads the whole branch: as the cluster agrees upon it, or as the member knows it.
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
            StatusCode::NOT_FOUND => match serde_json::from_slice::<Fault>(answer.body()) {
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
            // A member that lags, or another store: what the cluster agrees upon decides.
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

    /// Takes in the answer to a poll. `None` if that says nothing.
    fn take(&mut self, answer: &HttpAnswer, wait: u64) -> Result<Option<Step>, SourceError> {
        if answer.status != StatusCode::OK {
            let fault = serde_json::from_slice::<Fault>(answer.body());
            if fault.is_ok_and(|fault| fault.error_code == EVENT_FORGOTTEN) {
                return Ok(None);
            }
            return Err(answer.refusal());
        }
        let mut next = wait;
        let mut step = None;
        // Where the server waited long enough, the answer is empty: ask again.
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

impl fmt::Debug for Follower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("v2::Follower").field(&self.path).finish()
    }
}

/// Waits until it is certain that a member's port is for gRPC alone (`--listen-client-http-urls` of etcd 3.5), so that the v2
/// store is not there; for ever if it is not.
///
/// Such a port speaks HTTP/2 before it was asked anything, where one for both waits for a request. Over TLS it does so with
/// those that want HTTP/2, and ends the connection of all others.
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

/// Whether a member greets in HTTP/2, or else ends the connection, without having been asked anything. Waits as long as it
/// waits. `None` if there is no connection. With TLS, `protocols` are offered.
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
        // It hangs, or something between us holds the headers back: a read tells.
        return Ok(None);
    };
    let mut response = opened.inspect_err(|_| etcd.members.failed(number))?;
    if http::number(response.headers(), INDEX).is_some_and(|i| i.saturating_add(1) < wait) {
        // Another store than the one that was read: restored, behind an address that stayed. Its next events are not
        // those that are waited for.
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
    /// A member that has lost its leader still waits for events with us, which do not come. It is cheaper to ask for
    /// the leader than to read.
    async fn has_leader(&self) -> Result<(), SourceError> {
        let ask = async {
            let answer = self.get("/v2/members/leader", None).await?;
            match answer.status {
                StatusCode::SERVICE_UNAVAILABLE => Err(answer.refusal()),
                // Old servers do not have this call, and others may refuse it.
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
            // The greeting may come later than the failure that it explains.
            match timeout(GREETING, only_grpc).await {
                Ok(()) => Ok(Stores::V3),
                Err(_) => Err(error),
            }
        };
        self.stores.get(RECENT, ask).await
    }

    async fn version(&self) -> Result<Stores, SourceError> {
        let answer = match self.get("/version", None).await {
            // Over TLS, a port for gRPC alone takes no other protocol.
            Err(error) if error.to_string().contains("NoApplicationProtocol") => {
                return Ok(Stores::V3);
            }
            answer => answer?,
        };
        if answer.status != StatusCode::OK {
            return Err(answer.refusal());
        }
        // The first etcds answer with a sentence.
        match serde_json::from_slice::<Version>(answer.body()) {
            Ok(version) if version.has_v3() => Ok(Stores::Both),
            _ => Ok(Stores::V2),
        }
    }

    /// The error that a server without a v2 store is.
    pub(crate) fn no_v2(&self) -> SourceError {
        let (_, url) = self.url("/v2/keys", None);
        http::fault(&url, "this etcd has no v2 API: expected one with --enable-v2")
    }
}
