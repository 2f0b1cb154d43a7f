//! The answers of the v2 store. Pure.

use serde::{Deserialize, de::Error};

use super::Tree;

/// Maximum number of objects in an answer. Each may become a key in memory, and takes only three bytes in the answer.
const MOST_OBJECTS: usize = 200_000;

/// The keys in the answer to a read of a branch.
pub(super) fn tree(body: &[u8]) -> Result<Tree, serde_json::Error> {
    let mut tree = Tree::default();
    read::<ReadBranch>(body)?.node.collect(&mut tree);
    Ok(tree)
}

/// The event in the answer to a poll.
pub(super) fn event(body: &[u8]) -> Result<Event, serde_json::Error> {
    read(body)
}

fn read<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, serde_json::Error> {
    if objects(body) > MOST_OBJECTS {
        let reason = format_args!("it has more than {MOST_OBJECTS} objects");
        return Err(serde_json::Error::custom(reason));
    }
    serde_json::from_slice(body)
}

/// The number of objects that begin outside of strings. A value is a text, often JSON itself.
fn objects(json: &[u8]) -> usize {
    let (mut count, mut in_string, mut is_escaped) = (0, false, false);
    for byte in json {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' if in_string => is_escaped = true,
            b'"' => in_string = !in_string,
            b'{' if !in_string => count += 1,
            _ => {}
        }
    }
    count
}

#[derive(Deserialize)]
pub(super) struct Version {
    etcdserver: String,
}

impl Version {
    pub(super) fn has_v3(&self) -> bool {
        let major = self.etcdserver.split('.').next().and_then(|major| major.parse().ok());
        major.is_some_and(|major: u32| major >= 3)
    }
}

/// The answer to a read of a branch.
#[derive(Deserialize)]
#[serde(expecting = "an object with a node")]
pub(super) struct ReadBranch {
    pub(super) node: Node,
}

/// The answer to a poll.
#[derive(Deserialize)]
#[serde(expecting = "an object with an action and a node")]
pub(super) struct Event {
    action: String,
    pub(super) node: Node,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "a node")]
pub(super) struct Node {
    /// Missing for the root.
    #[serde(default)]
    key: String,
    #[serde(default)]
    dir: bool,
    #[serde(default)]
    value: String,
    #[serde(default)]
    nodes: Vec<Node>,
    #[serde(default)]
    pub(super) modified_index: u64,
}

/// An error answer.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ErrorBody {
    pub(super) error_code: u64,
    #[serde(default)]
    pub(super) index: u64,
}

impl Node {
    pub(super) fn collect(self, tree: &mut Tree) {
        if !self.dir {
            tree.set(self.key.into_bytes(), self.value.into_bytes());
        }
        for node in self.nodes {
            node.collect(tree);
        }
    }
}

impl Event {
    /// Applies the event. Returns whether it changed anything. `None` if its kind is unknown.
    pub(super) fn apply(self, tree: &mut Tree) -> Option<bool> {
        let Node { key, dir, value, .. } = self.node;
        let key = key.into_bytes();
        match self.action.as_str() {
            // The removed key may be a directory, or one above the branch: everything below is removed too.
            "delete" | "expire" | "compareAndDelete" => Some(tree.remove_all(&key)),
            // A directory has no value, and may replace a key.
            "set" | "create" | "update" | "compareAndSwap" if dir => Some(tree.remove(&key)),
            "set" | "create" | "update" | "compareAndSwap" => {
                Some(tree.set(key, value.into_bytes()))
            }
            _ => None,
        }
    }
}

/// Reads `input`, and each of its lines, as an answer of any kind.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(input: &[u8]) {
    let mut tree = Tree::default();
    for text in std::iter::once(input).chain(input.split(|byte| *byte == b'\n')) {
        if let Ok(listing) = read::<ReadBranch>(text) {
            listing.node.collect(&mut tree);
        }
        if let Ok(event) = event(text) {
            event.apply(&mut tree);
        }
        let _ = serde_json::from_slice::<ErrorBody>(text);
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
        serde_json::from_str::<ReadBranch>(LISTING).unwrap().node.collect(&mut tree);
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
    fn a_list_of_millions_of_empty_objects_is_refused_before_it_is_in_memory() {
        let of = |count: usize| {
            let nodes = vec!["{}"; count].join(",");
            tree_of(&format!(r#"{{"action":"get","node":{{"dir":true,"nodes":[{nodes}]}}}}"#))
        };
        assert!(of(1000).is_ok());
        let error = of(5_000_000).unwrap_err();
        assert!(error.contains("more than 200000 objects"), "{error}");
    }

    #[test]
    fn what_is_in_values_is_no_object() {
        let value = r#"{\"a\":\"}{\\\"{\"}"#.repeat(20);
        let node = |i| format!(r#"{{"key":"/services/{i}","value":"{value}"}}"#);
        let nodes = (0..10_000).map(node).collect::<Vec<_>>().join(",");
        let tree = tree_of(&format!(r#"{{"node":{{"dir":true,"nodes":[{nodes}]}}}}"#));
        assert!(tree.is_ok(), "{:?}", tree.err());
        assert_eq!(objects(br#"{"{\"{":{},"\\":{}}"#), 3);
    }

    fn tree_of(text: &str) -> Result<Tree, String> {
        super::tree(text.as_bytes()).map_err(|error| error.to_string())
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
        /// In whatever order events arrive, the tree equals a plain map.
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
