//! The v2 store: the branch is read once, and followed event by event: each poll waits for the one after the last
//! (etcd.io/docs/v2.3/api, "Waiting for a change"). The server keeps 1,000 events; where it has forgotten the one that
//! is asked for, the branch is read again. A branch that has no long poll is read every few seconds, from the member's own
//! memory: a read that the cluster must agree upon costs as much as a write.

use std::{fmt, sync::Arc, time::Duration};

use futures_util::{FutureExt, future::BoxFuture};
use reqwest::{StatusCode, header::HeaderMap};
use serde::Deserialize;
use tokio::time::{Instant, sleep_until, timeout};

use super::{Branch, EtcdClient, Step, Tree};
use crate::{
    registry::http::{self, ANSWER, Http, HttpAnswer, LongPoll, Pace},
    source::SourceError,
};

/// How often a branch without news is confirmed. A poll itself may wait for days, and one whose server hangs would go
/// unnoticed.
const CONFIRMED: Duration = Duration::from_secs(10);
/// How long a poll's headers may take: they come at once, and the event later.
const HEAD: Duration = Duration::from_secs(5);
/// How old an answer about the leader, or about the server's version, may be.
const RECENT: Duration = Duration::from_secs(5);

/// Error codes of the store.
const KEY_NOT_FOUND: u64 = 100;
const EVENT_FORGOTTEN: u64 = 401;

/// One branch in the v2 store.
pub(crate) struct Follower {
    etcd: Arc<EtcdClient>,
    /// Of the key's URL.
    path: String,
    tree: Tree,
    state: State,
    read_again: bool,
    pace: Pace,
}

enum State {
    Unread,
    /// The tree is that before the event `wait`.
    Read {
        wait: u64,
        poll_at: Instant,
    },
    /// The server is to tell of that event, or of the next one after it that is about the branch.
    Polling {
        wait: u64,
        poll: BoxFuture<'static, Polled>,
        confirm_at: Instant,
    },
}

/// `None` where the poll cannot tell, and the branch is to be read.
type Polled = Result<Option<HttpAnswer>, SourceError>;

impl Follower {
    pub(super) fn new(etcd: Arc<EtcdClient>, branch: &Branch) -> Result<Self, SourceError> {
        let path = ["/v2/keys"].into_iter().chain(branch.segments()?).collect::<Vec<_>>().join("/");
        Ok(Self {
            etcd,
            path,
            tree: Tree::default(),
            state: State::Unread,
            read_again: false,
            pace: Pace::new(),
        })
    }

    pub(crate) fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Has the next step be a full read.
    pub(crate) fn read_again(&mut self) {
        self.read_again = true;
    }

    /// Reads the branch; from then on, waits for the next change or confirmation. May be dropped while it waits.
    pub(crate) async fn next(&mut self) -> Result<Step, SourceError> {
        loop {
            if self.read_again {
                return self.read(true).await;
            }
            match &mut self.state {
                State::Unread => {
                    self.pace.keep().await;
                    return self.read(true).await;
                }
                State::Read { wait, poll_at } => {
                    let (wait, poll_at) = (*wait, *poll_at);
                    let (_, url) = self.etcd.url(&self.path, None);
                    let Some(turn) = self.etcd.http.long_poll(&url, poll_at).await else {
                        self.etcd.has_leader().await?;
                        let step = self.read(false).await?;
                        if matches!(self.state, State::Unread) {
                            continue;
                        }
                        return Ok(step);
                    };
                    self.pace.keep().await;
                    let poll = poll(self.etcd.clone(), self.path.clone(), wait, turn).boxed();
                    self.state =
                        State::Polling { wait, poll, confirm_at: Instant::now() + CONFIRMED };
                }
                State::Polling { wait, poll, confirm_at } => {
                    let wait = *wait;
                    let polled = tokio::select! {
                        polled = poll => polled?,
                        () = sleep_until(*confirm_at) => {
                            self.etcd.has_leader().await?;
                            *confirm_at = Instant::now() + CONFIRMED;
                            return Ok(Step::Confirmed);
                        }
                    };
                    self.pace.answered(false);
                    self.state = State::Unread;
                    if let Some(answer) = polled
                        && let Some(step) = self.take(&answer, wait)?
                    {
                        return Ok(step);
                    }
                }
            }
        }
    }

    /// Reads the whole branch: as the cluster agrees upon it, or as the member knows it.
    async fn read(&mut self, agreed: bool) -> Result<Step, SourceError> {
        let quorum = if agreed { "&quorum=true" } else { "" };
        let query = format!("recursive=true&sorted=true{quorum}");
        let answer = self.etcd.get(&self.path, Some(&query)).await?;
        let (tree, index) = match answer.status {
            StatusCode::OK => {
                let mut tree = Tree::default();
                answer.json::<Listing>()?.node.collect(&mut tree);
                (tree, answer.number(INDEX))
            }
            StatusCode::NOT_FOUND => match serde_json::from_slice::<Fault>(&answer.body) {
                Ok(fault) if fault.error_code == KEY_NOT_FOUND => {
                    (Tree::default(), answer.number(INDEX).or(Some(fault.index)))
                }
                Ok(_) => return Err(answer.refusal()),
                Err(_) => return Ok(Step::NoSuchStore),
            },
            _ => return Err(answer.refusal()),
        };
        let index =
            index.ok_or_else(|| answer.fault("the answer has no X-Etcd-Index: is this etcd?"))?;
        let next = index.saturating_add(1);
        match &self.state {
            // A member that lags, or another store: what the cluster agrees upon decides.
            State::Read { wait, .. } if !agreed && next < *wait => {
                self.state = State::Unread;
                return Ok(Step::Confirmed);
            }
            // The poll is where it should be.
            State::Polling { wait, .. } if tree == self.tree && next >= *wait => {}
            _ => self.state = State::Read { wait: next, poll_at: Http::next_poll() },
        }
        self.read_again = false;
        self.tree = tree;
        self.pace.answered(true);
        Ok(Step::Read)
    }

    /// Takes in the answer to a poll. `None` where that says nothing.
    fn take(&mut self, answer: &HttpAnswer, wait: u64) -> Result<Option<Step>, SourceError> {
        if answer.status != StatusCode::OK {
            let fault = serde_json::from_slice::<Fault>(&answer.body);
            if fault.is_ok_and(|fault| fault.error_code == EVENT_FORGOTTEN) {
                return Ok(None);
            }
            return Err(answer.refusal());
        }
        let mut next = wait;
        let mut step = None;
        // Where the server waited long enough, the answer is empty: ask again.
        if !answer.body.is_empty() {
            let event: Event = answer.json()?;
            let index = event.node.modified_index;
            if index < wait {
                let what = format_args!("event {index} came where {wait} was awaited");
                return Err(answer.fault(what));
            }
            let Some(changed) = event.apply(&mut self.tree) else { return Ok(None) };
            next = index.saturating_add(1);
            step = Some(if changed { Step::Read } else { Step::Confirmed });
            self.pace.answered(true);
        }
        self.state = State::Read { wait: next, poll_at: Http::next_poll() };
        Ok(step)
    }
}

impl fmt::Debug for Follower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("v2::Follower").field(&self.path).finish()
    }
}

async fn poll(etcd: Arc<EtcdClient>, path: String, wait: u64, _turn: LongPoll) -> Polled {
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
    let mut body = Vec::new();
    let ended = async {
        if http::more(&url, &mut response, &mut body).await? {
            let rest = async {
                while http::more(&url, &mut response, &mut body).await? {}
                Ok(())
            };
            let late = |_| http::fault(&url, "the answer does not come to its end");
            timeout(ANSWER, rest).await.map_err(late)??;
        }
        Ok(Some(HttpAnswer::new(&url, &response, body)))
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
                // Old servers do not know the question, and others may not answer it to everybody.
                _ => Ok(()),
            }
        };
        self.leader.get(RECENT, ask).await
    }

    /// Whether this server has a v3 store.
    pub(crate) async fn has_v3(&self) -> Result<bool, SourceError> {
        let ask = async {
            let answer = self.get("/version", None).await?;
            if answer.status != StatusCode::OK {
                return Err(answer.refusal());
            }
            // The first etcds answer with a sentence.
            Ok(serde_json::from_slice(&answer.body).is_ok_and(|version: Version| version.has_v3()))
        };
        self.has_v3.get(RECENT, ask).await
    }

    /// The error that a server without a v2 store is.
    pub(crate) fn no_v2(&self) -> SourceError {
        let (_, url) = self.url("/v2/keys", None);
        http::fault(&url, "this etcd has no v2 API: expected one with --enable-v2")
    }
}

/// The header that says how far the store has come.
const INDEX: &str = "X-Etcd-Index";

#[derive(Deserialize)]
struct Version {
    etcdserver: String,
}

impl Version {
    fn has_v3(&self) -> bool {
        let major = self.etcdserver.split('.').next().and_then(|major| major.parse().ok());
        major.is_some_and(|major: u32| major >= 3)
    }
}

/// The answer to a read.
#[derive(Deserialize)]
#[serde(expecting = "an object with a node")]
struct Listing {
    node: Node,
}

/// The answer to a poll.
#[derive(Deserialize)]
#[serde(expecting = "an object with an action and a node")]
struct Event {
    action: String,
    node: Node,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "a node")]
struct Node {
    /// Absent from the root.
    #[serde(default)]
    key: String,
    #[serde(default)]
    dir: bool,
    #[serde(default)]
    value: String,
    #[serde(default)]
    nodes: Vec<Node>,
    #[serde(default)]
    modified_index: u64,
}

/// The answer where there is none.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Fault {
    error_code: u64,
    #[serde(default)]
    index: u64,
}

impl Node {
    fn collect(self, tree: &mut Tree) {
        if !self.dir {
            tree.set(self.key.into_bytes(), self.value.into_bytes());
        }
        for node in self.nodes {
            node.collect(tree);
        }
    }
}

impl Event {
    /// Says whether it changed anything; `None` where it is of a kind that is not known.
    fn apply(self, tree: &mut Tree) -> Option<bool> {
        let Node { key, dir, value, .. } = self.node;
        let key = key.into_bytes();
        match self.action.as_str() {
            // What goes may be a directory, or one above the branch: all below goes with it.
            "delete" | "expire" | "compareAndDelete" => Some(tree.remove_all(&key)),
            // A directory has no value, and it may stand where a key was.
            "set" | "create" | "update" | "compareAndSwap" if dir => Some(tree.remove(&key)),
            "set" | "create" | "update" | "compareAndSwap" => {
                Some(tree.set(key, value.into_bytes()))
            }
            _ => None,
        }
    }
}

/// Reads `input` as an answer of any kind, and each of its lines too.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(input: &[u8]) {
    let mut tree = Tree::default();
    for text in std::iter::once(input).chain(input.split(|byte| *byte == b'\n')) {
        if let Ok(listing) = serde_json::from_slice::<Listing>(text) {
            listing.node.collect(&mut tree);
        }
        if let Ok(event) = serde_json::from_slice::<Event>(text) {
            event.apply(&mut tree);
        }
        let _ = serde_json::from_slice::<Fault>(text);
        let _ = serde_json::from_slice::<Version>(text).is_ok_and(|version| version.has_v3());
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// A branch as etcd 3.4 answers.
    const LISTING: &str = r#"{"action":"get","node":{"key":"/services/web","dir":true,"nodes":[
        {"key":"/services/web/a","value":"1","modifiedIndex":4,"createdIndex":4},
        {"key":"/services/web/d","dir":true,"nodes":[{"key":"/services/web/d/b","value":"2",
            "expiration":"2026-11-22T17:54:46.379469862Z","ttl":5,"modifiedIndex":5,"createdIndex":5}],
            "modifiedIndex":5,"createdIndex":5}],"modifiedIndex":4,"createdIndex":4}}"#;

    fn listing() -> Tree {
        let mut tree = Tree::default();
        serde_json::from_str::<Listing>(LISTING).unwrap().node.collect(&mut tree);
        tree
    }

    fn tree(entries: &[(&str, &str)]) -> Tree {
        let mut tree = Tree::default();
        for (key, value) in entries {
            tree.set(key.as_bytes().to_vec(), value.as_bytes().to_vec());
        }
        tree
    }

    #[test]
    fn a_listing_is_read_at_any_depth() {
        assert_eq!(listing(), tree(&[("/services/web/a", "1"), ("/services/web/d/b", "2")]));
    }

    #[test]
    fn every_action_is_applied() {
        let both = [("/services/web/a", "1"), ("/services/web/d/b", "2")];
        for (event, changed, after) in [
            (r#"{"action":"set","node":{"key":"/services/web/a","value":"1"}}"#, false, &both[..]),
            (
                r#"{"action":"create","node":{"key":"/services/web/e","value":"3"}}"#,
                true,
                &[both[0], both[1], ("/services/web/e", "3")],
            ),
            (
                r#"{"action":"update","node":{"key":"/services/web/a","value":"4"}}"#,
                true,
                &[("/services/web/a", "4"), both[1]],
            ),
            (
                r#"{"action":"compareAndSwap","node":{"key":"/services/web/a","value":"5"}}"#,
                true,
                &[("/services/web/a", "5"), both[1]],
            ),
            (r#"{"action":"update","node":{"key":"/services/web/d","dir":true}}"#, false, &both),
            (r#"{"action":"set","node":{"key":"/services/web/a","dir":true}}"#, true, &both[1..]),
            (r#"{"action":"delete","node":{"key":"/services/web/a"}}"#, true, &both[1..]),
            (r#"{"action":"compareAndDelete","node":{"key":"/services/web/a"}}"#, true, &both[1..]),
            (
                r#"{"action":"expire","node":{"key":"/services/web/d","dir":true}}"#,
                true,
                &both[..1],
            ),
            (r#"{"action":"delete","node":{"key":"/services","dir":true}}"#, true, &[]),
            (r#"{"action":"delete","node":{"key":"/services/we","dir":true}}"#, false, &both),
        ] {
            let mut now = listing();
            let event_read: Event = serde_json::from_str(event).unwrap();
            assert_eq!(event_read.apply(&mut now), Some(changed), "{event}");
            assert_eq!(now, tree(after), "{event}");
        }
    }

    #[test]
    fn an_action_that_is_not_known_asks_for_a_new_reading() {
        let event: Event =
            serde_json::from_str(r#"{"action":"rename","node":{"key":"/services/web/a"}}"#)
                .unwrap();
        assert_eq!(event.apply(&mut listing()), None);
    }

    #[test]
    fn versions_of_etcd_say_whether_there_is_v3() {
        for (version, has_v3) in
            [("3.4.23", true), ("3.6.0-rc.1", true), ("10.0", true), ("2.3.8", false), ("", false)]
        {
            assert_eq!(Version { etcdserver: version.to_owned() }.has_v3(), has_v3, "{version}");
        }
    }

    proptest! {
        /// Whatever the order of events: the tree is what a plain map would hold.
        #[test]
        fn events_add_up(events in prop::collection::vec((0..3u8, 0..4u8, 0..4u8), 0..40)) {
            let (mut tree, mut model) = (Tree::default(), BTreeMap::new());
            for (action, dir, key) in events {
                let (dir, key) = (format!("/s/{dir}"), format!("/s/{dir}/{key}"));
                let event = match action {
                    0 => {
                        model.insert(key.clone(), "x");
                        format!(r#"{{"action":"set","node":{{"key":"{key}","value":"x"}}}}"#)
                    }
                    1 => {
                        model.remove(&key);
                        format!(r#"{{"action":"expire","node":{{"key":"{key}"}}}}"#)
                    }
                    _ => {
                        model.retain(|key, _| !key.starts_with(&format!("{dir}/")));
                        format!(r#"{{"action":"delete","node":{{"key":"{dir}","dir":true}}}}"#)
                    }
                };
                let event: Event = serde_json::from_str(&event).unwrap();
                prop_assert!(event.apply(&mut tree).is_some());
            }
            let model: Vec<_> = model.iter().map(|(key, value)| (key.as_str(), *value)).collect();
            prop_assert_eq!(tree, self::tree(&model));
        }
    }
}
