//! The v2 store: the branch is read once, and followed event by event: each poll waits for the one after the last
//! (etcd.io/docs/v2.3/api, "Waiting for a change"). The server keeps 1,000 events; where it has forgotten the one that
//! is asked for, the branch is read again.

use std::time::Duration;

use reqwest::{Client, RequestBuilder, StatusCode};
use serde::Deserialize;
use tokio::time::timeout;
use url::Url;

use super::{Branch, Etcd, Step, value::Tree};
use crate::{
    discovery::{
        Secret,
        http::{self, ANSWER, Answer, Pace},
    },
    source::SourceError,
};

/// How long one poll waits for an event. The server itself would wait for minutes, in which one that hangs would go
/// unnoticed.
const WAIT: Duration = Duration::from_secs(10);
/// How long a poll's headers may take: they come at once, and the event later.
const HEAD: Duration = Duration::from_secs(5);

/// Error codes of the store.
const KEY_NOT_FOUND: u64 = 100;
const EVENT_FORGOTTEN: u64 = 401;

/// One branch in the v2 store of one member.
pub(super) struct V2 {
    client: Client,
    member: Url,
    key: Url,
    user: Option<(String, Secret)>,
    tree: Tree,
    /// The event to wait for; `None` until the branch is read, and where it must be read again.
    wait: Option<u64>,
    pace: Pace,
    distance: Duration,
}

impl V2 {
    pub(super) fn new(member: &Url, branch: &Branch, etcd: &Etcd) -> Result<Self, SourceError> {
        let tls = (member.scheme() == "https").then_some(&etcd.tls);
        let mut key = member.clone();
        if let Ok(mut path) = key.path_segments_mut() {
            path.pop_if_empty().extend(["v2", "keys"]).extend(branch.segments()?);
        }
        Ok(Self {
            client: http::build(http::builder(tls)?)?,
            member: member.clone(),
            key,
            user: etcd.user.clone(),
            tree: Tree::default(),
            wait: None,
            pace: Pace::new(),
            distance: Pace::NEWS,
        })
    }

    pub(super) fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Reads the branch; from then on, waits for the next change or confirmation. May be dropped while it waits.
    pub(super) async fn next(&mut self) -> Result<Step, SourceError> {
        loop {
            self.pace.keep(self.distance).await;
            match self.wait {
                None => return self.read().await,
                Some(wait) => {
                    if let Some(step) = self.poll(wait).await? {
                        return Ok(step);
                    }
                }
            }
        }
    }

    /// Whether this server has a v3 store as well.
    pub(super) async fn server_has_v3(&self) -> Result<bool, SourceError> {
        let mut url = self.member.clone();
        url.set_path("/version");
        let answer = http::get(&url, self.request(&url), ANSWER).await?;
        if answer.status != StatusCode::OK {
            return Err(answer.refusal());
        }
        // The first etcds answer with a sentence.
        Ok(serde_json::from_slice(&answer.body).is_ok_and(|version: Version| version.has_v3()))
    }

    pub(super) fn no_such_store(&self) -> SourceError {
        http::fault(&self.key, "this etcd has no v2 API: expected one with --enable-v2")
    }

    fn request(&self, url: &Url) -> RequestBuilder {
        let request = self.client.get(url.clone());
        match &self.user {
            Some((name, password)) => request.basic_auth(name, Some(password.reveal())),
            None => request,
        }
    }

    /// Reads the whole branch, agreed upon by the cluster.
    async fn read(&mut self) -> Result<Step, SourceError> {
        let mut url = self.key.clone();
        url.set_query(Some("recursive=true&sorted=true&quorum=true"));
        let answer = http::get(&url, self.request(&url), ANSWER).await?;
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
        self.tree = tree;
        self.wait = Some(index.saturating_add(1));
        self.distance = Pace::NEWS;
        Ok(Step::Changed)
    }

    /// Waits for the event `wait` or the next one after it that is about the branch. `None` where that says nothing.
    async fn poll(&mut self, wait: u64) -> Result<Option<Step>, SourceError> {
        let mut url = self.key.clone();
        url.set_query(Some(&format!("wait=true&recursive=true&waitIndex={wait}")));
        self.distance = Pace::IDLE;
        let Ok(response) = timeout(HEAD, http::open(&url, self.request(&url))).await else {
            // It hangs, or something between us holds the headers back: reading the branch anew tells.
            self.wait = None;
            return Ok(None);
        };
        let mut response = response?;
        let index = http::number(response.headers(), INDEX);
        if index.is_some_and(|index| index.saturating_add(1) < wait) {
            // Another store than the one that was read: restored, behind an address that stayed. Its next events are not
            // those that are waited for.
            self.wait = None;
            return Ok(None);
        }
        let index = index.unwrap_or_default();
        let mut body = Vec::new();
        match timeout(WAIT, http::more(&url, &mut response, &mut body)).await {
            Ok(more) => more?,
            Err(_) => {
                self.has_leader().await?;
                // Nothing up to where the store was when it began to wait.
                self.wait = Some(wait.max(index.saturating_add(1)));
                return Ok(Some(Step::Unchanged));
            }
        };
        let rest = async {
            while http::more(&url, &mut response, &mut body).await? {}
            Ok(())
        };
        timeout(ANSWER, rest)
            .await
            .map_err(|_| http::fault(&url, "the answer does not come to its end"))??;
        self.take(&Answer::new(&url, &response, body), wait)
    }

    /// A member that has lost its leader still waits for events with us, which do not come. It is cheaper to ask for
    /// the leader than to read: a read that the cluster must agree upon costs as much as a write.
    async fn has_leader(&self) -> Result<(), SourceError> {
        let mut url = self.member.clone();
        url.set_path("/v2/members/leader");
        let answer = http::get(&url, self.request(&url), ANSWER).await?;
        match answer.status {
            StatusCode::SERVICE_UNAVAILABLE => Err(answer.refusal()),
            // Old servers do not know the question, and others may not answer it to everybody.
            _ => Ok(()),
        }
    }

    /// Takes in the answer to a poll.
    fn take(&mut self, answer: &Answer, wait: u64) -> Result<Option<Step>, SourceError> {
        if answer.status != StatusCode::OK {
            let fault = serde_json::from_slice::<Fault>(&answer.body);
            if fault.is_ok_and(|fault| fault.error_code == EVENT_FORGOTTEN) {
                self.wait = None;
                return Ok(None);
            }
            return Err(answer.refusal());
        }
        if answer.body.is_empty() {
            // The server waited long enough: ask again.
            return Ok(None);
        }
        let event: Event = answer.json()?;
        let index = event.node.modified_index;
        if index < wait {
            return Err(answer.fault(format_args!("event {index} came where {wait} was awaited")));
        }
        self.wait = Some(index.saturating_add(1));
        self.distance = Pace::NEWS;
        Ok(Some(match event.apply(&mut self.tree) {
            Some(true) => Step::Changed,
            Some(false) => Step::Unchanged,
            None => Step::Over,
        }))
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
    tree.endpoints(&crate::model::Tags::default());
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
