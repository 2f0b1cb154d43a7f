//! The keys at and below a branch. Pure; shared by both stores.

use std::{collections::BTreeMap, ops::Bound};

/// The keys at and below a branch, with their values.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Tree(BTreeMap<Vec<u8>, Vec<u8>>);

impl Tree {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Sets a key, and says whether that changed anything.
    pub(crate) fn set(&mut self, key: Vec<u8>, value: Vec<u8>) -> bool {
        match self.0.get_mut(&key) {
            Some(before) if *before == value => false,
            Some(before) => {
                *before = value;
                true
            }
            None => self.0.insert(key, value).is_none(),
        }
    }

    /// Removes a key, and says whether it was there.
    pub(crate) fn remove(&mut self, key: &[u8]) -> bool {
        self.0.remove(key).is_some()
    }

    /// Removes a key and all that is below it, and says whether anything was there.
    pub(crate) fn remove_all(&mut self, key: &[u8]) -> bool {
        let before = self.0.len();
        self.0.retain(|other, _| !is_at_or_below(other, key));
        self.0.len() < before
    }

    /// Every key with its value, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.0.iter().map(|(key, value)| (key.as_slice(), value.as_slice()))
    }

    /// Whether the key ends with a slash or has keys below it: this marks directories in a store without them.
    pub(crate) fn is_directory(&self, key: &[u8]) -> bool {
        let mut below = key.to_vec();
        if !below.ends_with(b"/") {
            below.push(b'/');
        }
        key.ends_with(b"/")
            || self
                .0
                .range::<[u8], _>((Bound::Excluded(below.as_slice()), Bound::Unbounded))
                .next()
                .is_some_and(|(next, _)| next.starts_with(&below))
    }
}

/// Whether `key` is `branch` (which has no trailing slash) or stands below it: `/app10` is not below `/app1`.
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
