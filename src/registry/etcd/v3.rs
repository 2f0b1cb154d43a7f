//! The v3 store: a branch is read at a revision, and watched from the next one on. However many branches are followed, they
//! share one connection, one login, and one stream of watches.

use std::{
    error::Error as _,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use etcd_client::{
    Certificate, Client, ConnectOptions, Error, GetOptions, Identity, KeyValue, TlsOptions,
};
use tokio::time::{Instant, sleep_until, timeout};
use url::Url;

use super::{
    Branch, EtcdClient, Step,
    tree::{Tree, is_at_or_below},
};
use crate::{
    registry::{
        Secret,
        http::{ANSWER, CONNECT},
    },
    source::SourceError,
    tls::{self, ClientTls},
};

mod stream;

use stream::{BranchWatch, News, Stream};

/// Timeout for a member's first answer.
const PROBE: Duration = Duration::from_secs(5);
/// Pause before a branch is read again after its watch lost events.
const AGAIN: Duration = Duration::from_millis(100);
/// Maximum size of a message.
const LARGEST: usize = 16 << 20;

/// A connection to one member.
pub(crate) struct Connection {
    client: Client,
    /// Counted round.
    number: usize,
    member: Arc<str>,
    /// The one on which the next watch is made. Those before it live as long as their watches.
    stream: Mutex<Option<Stream>>,
}

impl Connection {
    /// Connects and logs in, and asks about `key` whether the member works.
    pub(super) async fn open(
        number: usize,
        member: &Url,
        tls: &ClientTls,
        user: Option<&(String, Secret)>,
        key: &str,
    ) -> Result<Self, SourceError> {
        // Without a leader a member is not to answer from what it remembers, and a watch on it is to end.
        let mut options = ConnectOptions::new()
            .with_require_leader(true)
            .with_connect_timeout(CONNECT)
            .with_timeout(ANSWER);
        if let Some((name, password)) = user {
            // One login for all who find that the token is not valid any more.
            options = options.with_user(name, password.reveal()).with_auto_token_refresh(true);
        }
        if member.scheme() == "https" {
            tls::install_provider();
            let pem = tls.load()?;
            let mut tls = TlsOptions::new().timeout(CONNECT);
            tls = match pem.ca {
                Some(ca) => tls.ca_certificate(Certificate::from_pem(ca)),
                None => tls.with_native_roots(),
            };
            if let Some((certificate, key)) = pem.identity {
                tls = tls.identity(Identity::from_pem(certificate, key));
            }
            options = options.with_tls(tls);
        }
        let member: Arc<str> = member.as_str().trim_end_matches('/').into();
        let connecting = async {
            let client = Client::connect([&*member], Some(options)).await?;
            probe(&client, key).await?;
            Ok(client)
        };
        let client = within(ANSWER, connecting).await.map_err(|e| fault(&member, "connect", e))?;
        Ok(Self { client, number, member, stream: Mutex::default() })
    }

    /// The number of the member.
    pub(super) fn number(&self) -> usize {
        self.number
    }

    /// Reads all roots at one revision, which is returned with what is there.
    async fn read(&self, roots: &[String]) -> Result<(Tree, i64), Fault> {
        let mut kv = self.client.kv_client().max_decoding_message_size(LARGEST);
        let mut tree = Tree::default();
        let mut revision = 0;
        for root in roots {
            let (start, end) = range(root);
            let options = GetOptions::new().with_range(end).with_revision(revision);
            let reading = within(ANSWER, kv.get(start.as_str(), Some(options))).await;
            let mut answer = match reading {
                Ok(answer) => answer,
                Err(error) => {
                    // Where only this range takes too long, all others can go on.
                    let lost = match error {
                        Error::Internal(_) => probe(&self.client, &start).await.is_err(),
                        _ => !is_refusal(&error),
                    };
                    let error = fault(&self.member, format_args!("range {start:?}"), error);
                    return Err(Fault { error, lost });
                }
            };
            if revision == 0 {
                revision = answer.header().map_or(0, |header| header.revision());
            }
            for pair in answer.take_kvs() {
                let (key, value) = pair.into_key_value();
                if is_at_or_below(&key, root.as_bytes()) {
                    tree.set(key, value);
                }
            }
        }
        Ok((tree, revision))
    }

    /// Watches all roots from `revision` on.
    async fn watch(&self, roots: &[String], revision: i64) -> BranchWatch {
        let stream = {
            let mut slot = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
            let open = slot.take().filter(Stream::is_open);
            slot.insert(open.unwrap_or_else(|| Stream::start(self.client.clone()))).clone()
        };
        stream.watch(roots.iter().map(|root| range(root)), revision).await
    }
}

/// What went wrong, and whether the connection is lost with it.
struct Fault {
    error: SourceError,
    lost: bool,
}

/// One branch in the v3 store.
pub(crate) struct Follower {
    etcd: Arc<EtcdClient>,
    roots: Vec<String>,
    tree: Tree,
    /// The tree is that of this revision, or of a later one.
    revision: i64,
    state: State,
    read_again: bool,
    /// When it may be read next: a server that always forces a read must not cause a busy loop.
    read_at: Instant,
}

enum State {
    Unread,
    Read(Arc<Connection>),
    Watching(Arc<Connection>, BranchWatch),
}

impl Follower {
    pub(super) fn new(etcd: Arc<EtcdClient>, branch: &Branch) -> Self {
        Self {
            etcd,
            roots: branch.roots(),
            tree: Tree::default(),
            revision: 0,
            state: State::Unread,
            read_again: false,
            read_at: Instant::now(),
        }
    }

    pub(crate) fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Makes the next step a full read.
    pub(crate) fn read_again(&mut self) {
        self.read_again = true;
    }

    /// Reads the branch; from then on, waits for the next change or confirmation. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Result<Step, SourceError> {
        loop {
            match &mut self.state {
                State::Unread => {
                    sleep_until(self.read_at).await;
                    let (key, _) = range(self.roots.first().map_or("", String::as_str));
                    let connection = self.etcd.connection(&key).await?;
                    self.read(&connection).await?;
                    self.state = State::Read(connection);
                    return Ok(Step::Read);
                }
                State::Read(connection) => {
                    let watch =
                        connection.watch(&self.roots, self.revision.saturating_add(1)).await;
                    self.state = State::Watching(connection.clone(), watch);
                }
                State::Watching(connection, _) if self.read_again => {
                    let connection = connection.clone();
                    self.read(&connection).await?;
                    return Ok(Step::Read);
                }
                State::Watching(connection, watch) => match watch.next().await {
                    News::Changed(pairs) => {
                        if let Some(step) = self.apply(pairs) {
                            return Ok(step);
                        }
                    }
                    News::Alive => return Ok(Step::Confirmed),
                    News::Again => {
                        self.read_at = Instant::now() + AGAIN;
                        self.state = State::Unread;
                    }
                    News::Refused(reason) => {
                        return Err(fault(&connection.member, "watch", reason));
                    }
                    News::Lost(reason) => {
                        self.etcd.lost(connection).await;
                        return Err(fault(&connection.member, "watch", reason));
                    }
                },
            }
        }
    }

    async fn read(&mut self, connection: &Arc<Connection>) -> Result<(), SourceError> {
        match connection.read(&self.roots).await {
            Ok((tree, revision)) => {
                (self.tree, self.revision, self.read_again) = (tree, revision, false);
                Ok(())
            }
            Err(Fault { error, lost: true }) => {
                self.etcd.lost(connection).await;
                Err(error)
            }
            Err(Fault { error, lost: false }) => Err(error.refused()),
        }
    }

    /// Takes in what the watch said; `None` if that is nothing about the branch.
    fn apply(&mut self, pairs: Vec<KeyValue>) -> Option<Step> {
        let (mut changed, mut named) = (false, false);
        for pair in pairs {
            // What was read since is newer.
            if pair.mod_revision() <= self.revision
                || !self.roots.iter().any(|root| is_at_or_below(pair.key(), root.as_bytes()))
            {
                continue;
            }
            named = true;
            changed |= if is_deleted(&pair) {
                self.tree.remove(pair.key())
            } else {
                let (key, value) = pair.into_key_value();
                self.tree.set(key, value)
            };
        }
        match (changed, named) {
            (true, _) => Some(Step::Read),
            (false, true) => Some(Step::Confirmed),
            (false, false) => None,
        }
    }
}

impl fmt::Debug for Follower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("v3::Follower").field(&self.roots).finish()
    }
}

/// A deletion resets a key's version to 0, and everything else counts it up from there. (The type of the event says the
/// same, but the client panics on a type that it does not know.)
fn is_deleted(pair: &KeyValue) -> bool {
    pair.version() == 0
}

/// The keys from `root` itself to the last one below it. One range takes in a few others, such as `/app1-x` of the
/// root `/app1`: they are left out later.
fn range(root: &str) -> (String, String) {
    let start = if root.is_empty() { "/" } else { root };
    // The character 0 follows the slash.
    (start.to_owned(), format!("{root}0"))
}

/// Asks for next to nothing: only a member that works, with a leader, answers.
async fn probe(client: &Client, key: &str) -> Result<(), Error> {
    let options = GetOptions::new().with_count_only();
    match within(PROBE, client.kv_client().get(key, Some(options))).await {
        Ok(_) => Ok(()),
        Err(error) if is_refusal(&error) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Whether the member works and only refused this request. A refused or outdated login affects the whole connection.
fn is_refusal(error: &Error) -> bool {
    let Error::GRpcStatus(status) = error else { return false };
    let of_the_login = ["authentication failed", "revision of auth store is old"];
    // Invalid argument, not found, permission denied, resource exhausted, failed precondition, out of range.
    matches!(status.code() as i32, 3 | 5 | 7 | 8 | 9 | 11)
        && !of_the_login.iter().any(|text| status.message().contains(text))
}

async fn within<T>(
    limit: Duration,
    call: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let late = |_| Error::Internal(format!("no answer within {} s", limit.as_secs_f32()));
    timeout(limit, call).await.map_err(late)?
}

fn fault(member: &str, what: impl fmt::Display, reason: impl Into<Reason>) -> SourceError {
    SourceError::new(format_args!("etcd v3 at {member}: {what}: {}", reason.into().0))
}

/// A reason on one line, without a status's metadata.
#[derive(Debug, Clone)]
struct Reason(Arc<str>);

impl From<Error> for Reason {
    fn from(error: Error) -> Self {
        let status = match error {
            Error::GRpcStatus(status) => status,
            Error::Internal(text) => return Self(text.into()),
            other => return Self(other.to_string().into()),
        };
        let mut text = status.message().to_owned();
        let mut cause = status.source();
        while let Some(error) = cause {
            let link = error.to_string();
            if !text.contains(&link) {
                text = format!("{text}: {link}");
            }
            cause = error.source();
        }
        Self(text.into())
    }
}
