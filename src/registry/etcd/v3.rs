//! The v3 store. A branch is read at a revision, and watched from the next revision. All followed branches share one
//! connection, one login, and one stream of watches.

use std::{
    error::Error as _,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use etcd_client::{
    Channel, Client, ConnectOptions, Error, GetOptions, Identity, KeyValue, TlsOptions,
};
use futures_util::FutureExt;
use tokio::time::{Instant, sleep_until, timeout};
use tonic::transport::Endpoint;
use url::Url;

use super::{Branch, EtcdClient, Step, branch::KeyRange, tree::Tree};
use crate::{
    registry::{
        Secret,
        http::{ANSWER, CONNECT},
    },
    resolve,
    source::SourceError,
    tls::{self, ClientTls},
};

mod stream;

use stream::{BranchEvent, BranchWatch, Stream};

/// Timeout for a member's first answer.
const PROBE: Duration = Duration::from_secs(5);
/// Pause before a branch is read again after its watch lost events.
const AGAIN: Duration = Duration::from_millis(100);
/// Maximum number of keys that are read to find similar names.
const SOME_KEYS: i64 = 1000;
/// Maximum size of a message in bytes.
const LARGEST: usize = 16 << 20;
/// Number of keys that are read at a time.
const PAGE: i64 = 1000;

/// A connection to one member.
pub(crate) struct MemberConnection {
    client: Client,
    /// The member's number.
    number: usize,
    pub(super) member: Arc<str>,
    /// Whether authentication is off at this etcd, so that the user was not logged in.
    pub(super) login_is_off: bool,
    /// The stream for the next watch. Earlier streams live as long as their watches.
    stream: Mutex<Option<Stream>>,
}

impl MemberConnection {
    /// Connects, logs in, and tests with `key` whether the member works.
    pub(super) async fn open(
        number: usize,
        member: &Url,
        tls: &ClientTls,
        user: Option<&(String, Secret)>,
        key: &str,
    ) -> Result<Self, SourceError> {
        // Without a leader, a member must not answer from its memory, and its watches must end.
        let options = ConnectOptions::new().with_require_leader(true);
        let member: Arc<str> = member.as_str().trim_end_matches('/').into();
        // One login for all tasks that find the token invalid.
        let login = user.map(|(name, password)| {
            options.clone().with_user(name, password.reveal()).with_auto_token_refresh(true)
        });
        let endpoint = endpoint(&member, tls)?;
        // Boxed, because the client's futures are large.
        let connect = |options| {
            let channel =
                Channel::Tonic(endpoint.connect_with_connector_lazy(resolve::connector()));
            Client::from_channel(channel, Some(options)).boxed()
        };
        let connecting = async {
            let (client, login_is_off) = match login {
                Some(login) => match connect(login).await {
                    // A user may be set before authentication is enabled, or after it was disabled.
                    Err(error) if says(&error, LOGIN_IS_OFF) => (connect(options).await?, true),
                    client => (client?, false),
                },
                None => (connect(options).await?, false),
            };
            probe(&client, key).await?;
            Ok((client, login_is_off))
        };
        let (client, login_is_off) =
            within(ANSWER, connecting).await.map_err(|e| fault(&member, "connect", e))?;
        Ok(Self { client, number, member, login_is_off, stream: Mutex::default() })
    }

    /// The number of the member.
    pub(super) fn number(&self) -> usize {
        self.number
    }

    /// Reads the ranges at one revision. Ranges that may not be read are left out, as long as the others are enough.
    async fn read(&self, ranges: &[KeyRange]) -> Result<Reading, Fault> {
        let mut kv = self.client.kv_client().max_decoding_message_size(LARGEST);
        let mut reading = Reading::default();
        let mut denied = None;
        'ranges: for range in ranges {
            let KeyRange { start, end } = range;
            let mut from = start.clone().into_bytes();
            // Page by page: no message is large, and others are served in between.
            loop {
                let options = GetOptions::new()
                    .with_range(end.as_str())
                    .with_limit(PAGE)
                    .with_revision(reading.revision);
                let mut answer = match within(ANSWER, kv.get(from.clone(), Some(options))).await {
                    Ok(answer) => answer,
                    Err(error) if is_denied(&error) => {
                        let error = fault(&self.member, format_args!("range {start:?}"), error);
                        denied.get_or_insert(error);
                        continue 'ranges;
                    }
                    Err(error) => {
                        // If only this range takes too long, all others can continue.
                        let lost = match error {
                            Error::Internal(_) => probe(&self.client, start).await.is_err(),
                            _ => !is_refusal(&error),
                        };
                        let error = fault(&self.member, format_args!("range {start:?}"), error);
                        return Err(Fault { error, lost });
                    }
                };
                if reading.revision == 0 {
                    reading.revision = answer.header().map_or(0, |header| header.revision());
                }
                let more = answer.more();
                let mut last = Vec::new();
                for pair in answer.take_kvs() {
                    let (key, value) = pair.into_key_value();
                    last.clone_from(&key);
                    reading.tree.set(key, value);
                }
                if !more {
                    break;
                }
                if reading.tree.is_full() {
                    reading.tree.cut();
                    break;
                }
                if last < from {
                    let reason = Error::Internal("the next page has no new keys".to_owned());
                    let error = fault(&self.member, format_args!("range {start:?}"), reason);
                    return Err(Fault { error, lost: true });
                }
                // The next possible key.
                last.push(0);
                from = last;
            }
            reading.ranges.push(range.clone());
        }
        match denied {
            // The branch's own key cannot show that there is nothing below it.
            Some(error)
                if reading.tree.is_empty() && !reading.ranges.iter().any(KeyRange::is_below) =>
            {
                Err(Fault { error, lost: false })
            }
            _ => Ok(reading),
        }
    }

    /// Some of the keys in a range, sorted.
    pub(super) async fn keys(&self, KeyRange { start, end }: &KeyRange) -> Option<Vec<String>> {
        let options =
            GetOptions::new().with_range(end.as_str()).with_keys_only().with_limit(SOME_KEYS);
        let mut kv = self.client.kv_client().max_decoding_message_size(LARGEST);
        let mut answer = within(ANSWER, kv.get(start.as_str(), Some(options))).await.ok()?;
        let keys = answer.take_kvs().into_iter().map(|pair| pair.into_key_value().0);
        Some(keys.filter_map(|key| String::from_utf8(key).ok()).collect())
    }

    /// The values of the first keys in a range.
    pub(super) async fn values(&self, KeyRange { start, end }: &KeyRange) -> Option<Vec<Vec<u8>>> {
        const SOME: i64 = 20;
        let options = GetOptions::new().with_range(end.as_str()).with_limit(SOME);
        let mut kv = self.client.kv_client().max_decoding_message_size(LARGEST);
        let mut answer = within(ANSWER, kv.get(start.as_str(), Some(options))).await.ok()?;
        Some(answer.take_kvs().into_iter().map(|pair| pair.into_key_value().1).collect())
    }

    /// Watches the ranges from `revision` on.
    async fn watch(&self, ranges: &[KeyRange], revision: i64) -> BranchWatch {
        let stream = {
            let mut slot = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
            let open = slot.take().filter(Stream::is_open);
            slot.insert(open.unwrap_or_else(|| Stream::start(self.client.clone()))).clone()
        };
        stream.watch(ranges.iter().cloned(), revision).await
    }
}

/// A member with its connection settings. The scheme decides whether TLS is used.
fn endpoint(member: &str, tls: &ClientTls) -> Result<Endpoint, SourceError> {
    let wrong = |e| SourceError::caused(format_args!("etcd v3 at {member}"), &e);
    let endpoint = Endpoint::from_shared(member.to_owned()).map_err(wrong)?;
    let endpoint = endpoint.connect_timeout(CONNECT).timeout(ANSWER);
    if !member.starts_with("https:") {
        return Ok(endpoint);
    }
    tls::install_provider();
    let pem = tls.load()?;
    let verifier = pem.verifier()?;
    let mut options = TlsOptions::new().timeout(CONNECT);
    if let Some((certificate, key)) = pem.identity {
        options = options.identity(Identity::from_pem(certificate, key));
    }
    match verifier {
        Some(verifier) => endpoint.tls_config_with_verifier(options, verifier),
        None => endpoint.tls_config(options.with_native_roots()),
    }
    .map_err(wrong)
}

/// The content of a branch as read.
#[derive(Default)]
struct Reading {
    tree: Tree,
    revision: i64,
    /// The ranges that may be read.
    ranges: Vec<KeyRange>,
}

/// An error, and whether the connection is lost with it.
struct Fault {
    error: SourceError,
    lost: bool,
}

/// One branch in the v3 store.
pub(crate) struct BranchFollower {
    etcd: Arc<EtcdClient>,
    /// The ranges of the branch.
    ranges: Vec<KeyRange>,
    /// The last read, with later changes applied to its tree.
    reading: Reading,
    state: State,
    read_again: bool,
    /// The earliest time of the next read: a server that always forces a read must not cause a busy loop.
    read_at: Instant,
}

enum State {
    Unread,
    Read(Arc<MemberConnection>),
    Watching(Arc<MemberConnection>, BranchWatch),
}

impl BranchFollower {
    pub(super) fn new(etcd: Arc<EtcdClient>, branch: &Branch) -> Self {
        Self {
            etcd,
            ranges: branch.ranges(),
            reading: Reading::default(),
            state: State::Unread,
            read_again: false,
            read_at: Instant::now(),
        }
    }

    pub(crate) fn tree(&self) -> &Tree {
        &self.reading.tree
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
            match &mut self.state {
                State::Unread => {
                    sleep_until(self.read_at).await;
                    let key = self.ranges.first().map_or("", |range| &range.start);
                    let connection = self.etcd.connection(key).boxed().await?;
                    self.read(&connection).await?;
                    self.state = State::Read(connection);
                    return Ok(Step::Read);
                }
                State::Read(connection) => {
                    let Reading { ranges, revision, .. } = &self.reading;
                    let watch = connection.watch(ranges, revision.saturating_add(1)).boxed().await;
                    self.state = State::Watching(connection.clone(), watch);
                }
                State::Watching(connection, _) if self.read_again => {
                    let connection = connection.clone();
                    let watched = std::mem::take(&mut self.reading.ranges);
                    self.read(&connection).await?;
                    if self.reading.ranges != watched {
                        // The permissions have changed.
                        self.state = State::Read(connection);
                    }
                    return Ok(Step::Read);
                }
                State::Watching(connection, watch) => match watch.next().await {
                    BranchEvent::Changed(pairs) => {
                        if let Some(step) = self.apply(pairs) {
                            return Ok(step);
                        }
                    }
                    BranchEvent::Alive => return Ok(Step::Confirmed),
                    BranchEvent::Again => {
                        self.read_at = Instant::now() + AGAIN;
                        self.state = State::Unread;
                    }
                    BranchEvent::Refused(reason) => {
                        return Err(fault(&connection.member, "watch", reason));
                    }
                    BranchEvent::Lost(reason) => {
                        self.etcd.lost(connection).boxed().await;
                        return Err(fault(&connection.member, "watch", reason));
                    }
                },
            }
        }
    }

    async fn read(&mut self, connection: &Arc<MemberConnection>) -> Result<(), SourceError> {
        match connection.read(&self.ranges).boxed().await {
            Ok(reading) => {
                (self.reading, self.read_again) = (reading, false);
                Ok(())
            }
            Err(Fault { error, lost: true }) => {
                self.etcd.lost(connection).boxed().await;
                Err(error)
            }
            Err(Fault { error, lost: false }) => Err(error.refused()),
        }
    }

    /// Applies a watch's events. `None` if they contain nothing about the branch.
    fn apply(&mut self, pairs: Vec<KeyValue>) -> Option<Step> {
        let (mut changed, mut named) = (false, false);
        for pair in pairs {
            // The read since then is newer.
            if pair.mod_revision() <= self.reading.revision {
                continue;
            }
            named = true;
            changed |= if is_deleted(&pair) {
                self.reading.tree.remove(pair.key())
            } else {
                let (key, value) = pair.into_key_value();
                self.reading.tree.set(key, value)
            };
        }
        match (changed, named) {
            (true, _) => Some(Step::Read),
            (false, true) => Some(Step::Confirmed),
            (false, false) => None,
        }
    }
}

impl fmt::Debug for BranchFollower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("v3::Follower").field(&self.ranges).finish()
    }
}

/// A deletion sets a key's version to 0, and every write increases it. (The type of the event shows the same, but the
/// client panics on a type that it does not know.)
fn is_deleted(pair: &KeyValue) -> bool {
    pair.version() == 0
}

/// Sends a minimal request. Only a working member with a leader answers it.
async fn probe(client: &Client, key: &str) -> Result<(), Error> {
    let options = GetOptions::new().with_count_only();
    match within(PROBE, client.kv_client().get(key, Some(options))).await {
        Ok(_) => Ok(()),
        Err(error) if is_refusal(&error) => Ok(()),
        Err(error) => Err(error),
    }
}

/// etcd's message for a login while authentication is off.
const LOGIN_IS_OFF: &str = "authentication is not enabled";

/// Whether the member works and only refused this request. A refused, missing or outdated login affects the whole
/// connection, so it is no such refusal.
fn is_refusal(error: &Error) -> bool {
    let of_the_login = [
        "authentication failed",
        "revision of auth store is old",
        // Authentication was enabled or disabled after the connection was opened.
        "user name is empty",
        LOGIN_IS_OFF,
    ];
    // Invalid argument, not found, permission denied, resource exhausted, failed precondition, out of range.
    matches!(error, Error::GRpcStatus(status) if matches!(status.code() as i32, 3 | 5 | 7 | 8 | 9 | 11))
        && !of_the_login.iter().any(|text| says(error, text))
}

/// Whether the user has no permission for this.
fn is_denied(error: &Error) -> bool {
    matches!(error, Error::GRpcStatus(status) if status.code() as i32 == 7)
}

fn says(error: &Error, text: &str) -> bool {
    matches!(error, Error::GRpcStatus(status) if status.message().contains(text))
}

async fn within<T>(
    limit: Duration,
    call: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let late = |_| Error::Internal(format!("no answer within {} s", limit.as_secs_f32()));
    timeout(limit, call).await.map_err(late)?
}

fn fault(member: &str, what: impl fmt::Display, reason: impl Into<OneLine>) -> SourceError {
    SourceError::new(format_args!("etcd v3 at {member}: {what}: {}", reason.into().0))
}

/// A reason on one line, without a status's metadata.
#[derive(Debug, Clone)]
struct OneLine(Arc<str>);

impl From<Error> for OneLine {
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
