//! The v3 store: the branch is read at a revision, and watched from the next one on.

use std::{error::Error as _, time::Duration};

use etcd_client::{
    Certificate, Client, ConnectOptions, Error, GetOptions, Identity, KeyValue, TlsOptions,
    WatchOptions, WatchResponse, WatchStream,
};
use tokio::time::{Instant, sleep_until, timeout};
use url::Url;

use super::{
    Branch, Etcd, Step,
    value::{Tree, is_at_or_below},
};
use crate::{
    discovery::http::{ANSWER, CONNECT},
    source::SourceError,
    tls,
};

/// After this long without a word the member is asked whether it is still there, with a leader: a watch whose server
/// hangs looks like a watch on which nothing happens.
const QUIET: Duration = Duration::from_secs(10);
/// How long it may take to say so.
const PROBE: Duration = Duration::from_secs(5);
/// The largest message that is read.
const LARGEST: usize = 16 << 20;

/// One branch in the v3 store of one member.
pub(super) struct V3 {
    client: Client,
    member: String,
    roots: Vec<String>,
    tree: Tree,
    state: State,
    /// When the member last said anything.
    heard: Instant,
}

enum State {
    Unread,
    /// The tree is that of this revision.
    Read(i64),
    Watching(Box<WatchStream>),
}

impl V3 {
    pub(super) async fn connect(
        member: &Url,
        branch: &Branch,
        etcd: &Etcd,
    ) -> Result<Self, SourceError> {
        // Without a leader a member is not to answer from what it remembers, and a watch on it is to end.
        let mut options = ConnectOptions::new()
            .with_require_leader(true)
            .with_connect_timeout(CONNECT)
            .with_timeout(ANSWER);
        if let Some((name, password)) = &etcd.user {
            options = options.with_user(name, password.reveal());
        }
        if member.scheme() == "https" {
            tls::install_provider();
            let pem = etcd.tls.load()?;
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
        let member = member.as_str().trim_end_matches('/').to_owned();
        let connecting = Client::connect([&member], Some(options));
        let client = within(ANSWER, connecting).await.map_err(|e| fault(&member, "connect", e))?;
        Ok(Self {
            client,
            member,
            roots: branch.roots(),
            tree: Tree::default(),
            state: State::Unread,
            heard: Instant::now(),
        })
    }

    pub(super) fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Reads the branch; from then on, waits for the next change or confirmation. May be dropped while it waits.
    pub(super) async fn next(&mut self) -> Result<Step, SourceError> {
        loop {
            match &mut self.state {
                State::Unread => {
                    self.state = State::Read(self.read().await?);
                    self.heard = Instant::now();
                    return Ok(Step::Changed);
                }
                State::Read(revision) => {
                    let from = revision.saturating_add(1);
                    let stream = self.watch(from).await?;
                    self.state = State::Watching(Box::new(stream));
                }
                State::Watching(stream) => {
                    let message = tokio::select! {
                        message = stream.message() => message,
                        () = sleep_until(self.heard + QUIET) => {
                            self.probe().await?;
                            self.heard = Instant::now();
                            return Ok(Step::Unchanged);
                        }
                    };
                    let message = message
                        .and_then(|message| message.ok_or_else(ended))
                        .map_err(|e| fault(&self.member, "watch", e))?;
                    self.heard = Instant::now();
                    if let Some(step) = self.apply(&message)? {
                        return Ok(step);
                    }
                }
            }
        }
    }

    /// Reads all roots at one revision, which is returned.
    async fn read(&mut self) -> Result<i64, SourceError> {
        let mut kv = self.client.kv_client().max_decoding_message_size(LARGEST);
        let mut revision = 0;
        for root in &self.roots {
            let (start, end) = range(root);
            let what = || format!("range {start:?}");
            let options = GetOptions::new().with_range(end).with_revision(revision);
            let mut answer = within(ANSWER, kv.get(start.as_str(), Some(options)))
                .await
                .map_err(|e| fault(&self.member, what(), e))?;
            let header = answer
                .header()
                .ok_or_else(|| fault(&self.member, what(), "the answer has no header"))?;
            if revision == 0 {
                revision = header.revision();
            }
            for pair in answer.take_kvs() {
                let (key, value) = pair.into_key_value();
                if is_at_or_below(&key, root.as_bytes()) {
                    self.tree.set(key, value);
                }
            }
        }
        Ok(revision)
    }

    /// Watches all roots from `revision` on.
    async fn watch(&mut self, revision: i64) -> Result<WatchStream, SourceError> {
        let mut watches = self.client.watch_client().max_decoding_message_size(LARGEST);
        let mut stream: Option<WatchStream> = None;
        for root in &self.roots {
            let (start, end) = range(root);
            let options = WatchOptions::new().with_range(end).with_start_revision(revision);
            let what = || format!("watch {start:?}");
            let watching = async {
                match &mut stream {
                    None => stream = Some(watches.watch(start.as_str(), Some(options)).await?),
                    Some(stream) => stream.watch(start.as_str(), Some(options)).await?,
                }
                Ok(())
            };
            within(ANSWER, watching).await.map_err(|e| fault(&self.member, what(), e))?;
        }
        stream.ok_or_else(|| fault(&self.member, "watch", "nothing to watch"))
    }

    /// Asks for next to nothing: only a member that works, with a leader, answers.
    async fn probe(&mut self) -> Result<(), SourceError> {
        let (start, _) = range(self.roots.first().map_or("", String::as_str));
        let options = GetOptions::new().with_count_only();
        within(PROBE, self.client.get(start.as_str(), Some(options)))
            .await
            .map(|_| ())
            .map_err(|e| fault(&self.member, format_args!("range {start:?}"), e))
    }

    /// Takes in what the watch said; `None` if that is nothing about the branch.
    fn apply(&mut self, message: &WatchResponse) -> Result<Option<Step>, SourceError> {
        if message.compact_revision() > 0 {
            // What happened since the tree was read is forgotten.
            return Ok(Some(Step::Over));
        }
        if message.canceled() {
            let reason = format!("cancelled: {:?}", message.cancel_reason());
            return Err(fault(&self.member, "watch", reason));
        }
        let mut changed = false;
        let mut named = false;
        for pair in message.events().iter().filter_map(|event| event.kv()) {
            if !self.roots.iter().any(|root| is_at_or_below(pair.key(), root.as_bytes())) {
                continue;
            }
            named = true;
            changed |= if is_deleted(pair) {
                self.tree.remove(pair.key())
            } else {
                self.tree.set(pair.key().to_vec(), pair.value().to_vec())
            };
        }
        Ok(match (changed, named) {
            (true, _) => Some(Step::Changed),
            (false, true) => Some(Step::Unchanged),
            (false, false) => None,
        })
    }
}

/// A deletion resets a key's version to 0, and everything else counts it up from there. (The type of the event says the
/// same, but the client panics where it is one that it does not know.)
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

async fn within<T>(
    limit: Duration,
    call: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let late = |_| Error::Internal(format!("no answer within {} s", limit.as_secs_f32()));
    timeout(limit, call).await.map_err(late)?
}

fn ended() -> Error {
    Error::Internal("the server ended it".to_owned())
}

fn fault(member: &str, what: impl std::fmt::Display, reason: impl Into<Reason>) -> SourceError {
    SourceError::new(format_args!("etcd v3 at {member}: {what}: {}", reason.into().0))
}

/// A reason on one line, without a status's metadata.
struct Reason(String);

impl From<Error> for Reason {
    fn from(error: Error) -> Self {
        let status = match error {
            Error::GRpcStatus(status) => status,
            Error::Internal(text) => return Self(text),
            other => return Self(other.to_string()),
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
        Self(text)
    }
}

impl From<&str> for Reason {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl From<String> for Reason {
    fn from(text: String) -> Self {
        Self(text)
    }
}
