//! The differences between two lists, by identity: unchanged elements are the same `Arc` in both.

use std::{collections::HashSet, sync::Arc};

/// Those of `before` that are not in `now`, and those of `now` that were not in `before`. Neither has anything twice.
pub fn gone_and_new<T>(before: &[Arc<T>], now: &[&Arc<T>]) -> (Vec<Arc<T>>, Vec<Arc<T>>) {
    let (first, last) = same_at_the_ends(before, now);
    let before = before.get(first..before.len() - last).unwrap_or_default();
    let now = now.get(first..now.len() - last).unwrap_or_default();
    let old: HashSet<_> = before.iter().map(Arc::as_ptr).collect();
    let current: HashSet<_> = now.iter().map(|one| Arc::as_ptr(one)).collect();
    let gone = before.iter().filter(|one| !current.contains(&Arc::as_ptr(one))).cloned();
    let new = now.iter().filter(|one| !old.contains(&Arc::as_ptr(one)));
    (gone.collect(), new.map(|&one| one.clone()).collect())
}

/// The same, and makes `list` the list of now. What is the same at both ends is left alone: each entry lies somewhere else in memory, and
/// there may be ten thousand.
pub fn follow<T>(list: &mut Vec<Arc<T>>, now: &[&Arc<T>]) -> (Vec<Arc<T>>, Vec<Arc<T>>) {
    let found = gone_and_new(list, now);
    let (first, last) = same_at_the_ends(list, now);
    let others = now.get(first..now.len() - last).unwrap_or_default();
    list.splice(first..list.len() - last, others.iter().map(|&one| one.clone()));
    found
}

/// How many are the same from the first on, and of the rest from the last on: most often all, or all but one.
fn same_at_the_ends<T>(before: &[Arc<T>], now: &[&Arc<T>]) -> (usize, usize) {
    let is_same = |(one, other): &(&Arc<T>, &&Arc<T>)| Arc::ptr_eq(one, other);
    let first = before.iter().zip(now).take_while(is_same).count();
    let left = before.len().min(now.len()) - first;
    let last = before.iter().rev().zip(now.iter().rev()).take(left).take_while(is_same).count();
    (first, last)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What came and went, which does not depend on how it is asked.
    fn gone_and_new<T: PartialEq + std::fmt::Debug>(
        before: &[Arc<T>],
        now: &[&Arc<T>],
    ) -> (Vec<Arc<T>>, Vec<Arc<T>>) {
        let mut list = before.to_vec();
        let found = super::gone_and_new(before, now);
        assert_eq!(follow(&mut list, now), found);
        assert!(list.len() == now.len() && list.iter().zip(now).all(|(a, b)| Arc::ptr_eq(a, b)));
        found
    }

    #[test]
    fn the_same_in_another_place_neither_came_nor_went() {
        let [a, b, c, d] = ["a", "b", "c", "d"].map(Arc::new);
        let before = [a.clone(), b.clone(), c.clone()];
        assert_eq!(gone_and_new(&before, &[&a, &b, &c, &d]), (vec![], vec![d.clone()]));
        assert_eq!(gone_and_new(&before, &[]), (before.to_vec(), vec![]));
        assert_eq!(gone_and_new(&[], &[&a, &b, &c]), (vec![], before.to_vec()));
        assert_eq!(gone_and_new(&before, &[&a, &b, &c]), (vec![], vec![]));
        assert_eq!(gone_and_new(&before, &[&a, &d, &c, &b]), (vec![], vec![d.clone()]));
        assert_eq!(gone_and_new(&before, &[&a, &d, &c]), (vec![b.clone()], vec![d.clone()]));
        assert_eq!(gone_and_new(&before, &[&a, &c]), (vec![b.clone()], vec![]));
        assert_eq!(gone_and_new(&before, &[&c]), (vec![a, b], vec![]));
        // Equal, but not the same.
        let other = Arc::new("c");
        assert_eq!(gone_and_new(std::slice::from_ref(&c), &[&other]), (vec![c], vec![other]));
    }
}
