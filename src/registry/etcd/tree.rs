//! The keys at and below a branch. Pure; shared by both stores.

use std::{collections::BTreeMap, ops::Bound};

/// The keys at and below a branch, with their values, up to a limit. A key in the tree is not displaced by another one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Tree {
    keys: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Size of all keys and values, in bytes.
    bytes: usize,
    /// Whether keys were left out because of the limit.
    is_cut: bool,
}

impl Tree {
    /// Maximum number of keys of one branch.
    pub(crate) const MOST: usize = 20_000;
    /// Maximum length of a registration's value, in bytes. Only the start of a longer value is kept, so that it can be
    /// reported.
    pub(crate) const LONGEST: usize = 64 << 10;
    /// Maximum size of all keys and values of one branch, in bytes.
    const LARGEST: usize = 32 << 20;

    pub(crate) fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Whether it may be incomplete, because keys were left out at some time.
    pub(crate) fn is_cut(&self) -> bool {
        self.is_cut
    }

    /// Size of all keys and values, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether there is no room for another key.
    pub(super) fn is_full(&self) -> bool {
        self.keys.len() >= Self::MOST || self.bytes >= Self::LARGEST
    }

    /// Notes that keys were left out.
    pub(super) fn cut(&mut self) {
        self.is_cut = true;
    }

    /// Sets a key. Returns whether that changed anything. A key without room is left out.
    pub(crate) fn set(&mut self, key: Vec<u8>, mut value: Vec<u8>) -> bool {
        if value.len() > Self::LONGEST {
            value.truncate(Self::LONGEST + 1);
            value.shrink_to_fit();
        }
        let before = self.keys.get(&key);
        if before == Some(&value) {
            return false;
        }
        let freed = before.map_or(0, |before| key.len() + before.len());
        let bytes = self.bytes - freed + key.len() + value.len();
        if bytes > Self::LARGEST || (before.is_none() && self.is_full()) {
            let news = !self.is_cut || before.is_some();
            self.remove(&key);
            self.cut();
            return news;
        }
        self.bytes = bytes;
        self.keys.insert(key, value);
        true
    }

    /// Removes a key. Returns whether it was there.
    pub(crate) fn remove(&mut self, key: &[u8]) -> bool {
        let removed = self.keys.remove(key);
        self.bytes -= removed.as_ref().map_or(0, |value| key.len() + value.len());
        removed.is_some()
    }

    /// Removes a key and all keys below it. Returns whether there were any.
    pub(crate) fn remove_all(&mut self, key: &[u8]) -> bool {
        let before = self.keys.len();
        let bytes = &mut self.bytes;
        self.keys.retain(|other, value| {
            let stays = !is_at_or_below(other, key);
            *bytes -= if stays { 0 } else { other.len() + value.len() };
            stays
        });
        self.keys.len() < before
    }

    /// Every key with its value, sorted.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.keys.iter().map(|(key, value)| (key.as_slice(), value.as_slice()))
    }

    /// Whether the key ends with a slash or has keys below it: this marks directories in a store without them.
    pub(crate) fn is_directory(&self, key: &[u8]) -> bool {
        let mut below = key.to_vec();
        if !below.ends_with(b"/") {
            below.push(b'/');
        }
        key.ends_with(b"/")
            || self
                .keys
                .range::<[u8], _>((Bound::Excluded(below.as_slice()), Bound::Unbounded))
                .next()
                .is_some_and(|(next, _)| next.starts_with(&below))
    }
}

/// Whether `key` is `branch` (without a trailing slash) or below it. `/app10` is not below `/app1`.
pub(super) fn is_at_or_below(key: &[u8], branch: &[u8]) -> bool {
    key.strip_prefix(branch).is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn below_a_branch_is_below_a_slash() {
        assert!(is_at_or_below(b"/app1", b"/app1"));
        assert!(is_at_or_below(b"/app1/x", b"/app1"));
        assert!(!is_at_or_below(b"/app10", b"/app1"));
        assert!(!is_at_or_below(b"/app", b"/app1"));
        assert!(is_at_or_below(b"/app", b""));
    }

    #[test]
    fn a_branch_has_room_for_so_many_keys_and_bytes() {
        let mut tree = Tree::default();
        let key = |n: usize| format!("/s/{n}").into_bytes();
        for n in 0..Tree::MOST {
            assert!(tree.set(key(n), b"x".to_vec()));
        }
        assert!(!tree.is_cut() && tree.is_full());
        assert!(tree.set(key(Tree::MOST), b"x".to_vec()), "that it is cut is news, once");
        assert!(!tree.set(key(Tree::MOST + 1), b"x".to_vec()));
        assert!(tree.is_cut());
        // Keys in the tree stay, and may change.
        assert!(tree.set(key(7), b"y".to_vec()));
        assert_eq!(tree.iter().count(), Tree::MOST);
        assert!(tree.remove(&key(7)));
        assert!(tree.set(key(Tree::MOST + 1), b"x".to_vec()));

        let mut tree = Tree::default();
        for n in 0..2000 {
            tree.set(key(n), vec![0; 1 << 20]);
        }
        let bytes = |tree: &Tree| tree.iter().map(|(key, value)| key.len() + value.len()).sum();
        assert!(tree.is_cut() && tree.bytes <= Tree::LARGEST, "{}", tree.bytes);
        assert_eq!(tree.bytes, bytes(&tree));
        assert!(tree.iter().all(|(_, value)| value.len() == Tree::LONGEST + 1));
        tree.remove_all(b"/s");
        assert_eq!((tree.bytes, bytes(&tree)), (0, 0));
    }

    #[test]
    fn changes_that_change_nothing_are_known() {
        let mut tree = Tree::default();
        for (key, value) in [("/s/a", "1"), ("/s/a/b", "2"), ("/s/ab", "3")] {
            tree.set(key.into(), value.into());
        }
        assert!(!tree.set(b"/s/a".to_vec(), b"1".to_vec()));
        assert!(tree.set(b"/s/a".to_vec(), b"2".to_vec()));
        assert!(!tree.remove(b"/s/c"));
        assert!(tree.remove_all(b"/s/a"));
        assert!(!tree.remove_all(b"/s/a"));
        assert!(tree.remove(b"/s/ab"));
        assert!(tree.is_empty());
    }
}
