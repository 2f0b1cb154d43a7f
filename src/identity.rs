//! What came and what went between two lists, by identity: what did not change is the very same in both.

use std::{collections::HashSet, sync::Arc};

/// Those of `before` that are not in `now`, and those of `now` that were not in `before`. Neither has anything twice.
pub fn gone_and_new<T>(before: &[Arc<T>], now: &[&Arc<T>]) -> (Vec<Arc<T>>, Vec<Arc<T>>) {
    // Most often all are the same, in the same order, or but for one.
    let same = |pairs: &mut dyn Iterator<Item = (&Arc<T>, &&Arc<T>)>| {
        pairs.take_while(|(one, other)| Arc::ptr_eq(one, other)).count()
    };
    let first = same(&mut before.iter().zip(now));
    let before = before.get(first..).unwrap_or_default();
    let now = now.get(first..).unwrap_or_default();
    let last = same(&mut before.iter().rev().zip(now.iter().rev()));
    let before = before.get(..before.len() - last).unwrap_or_default();
    let now = now.get(..now.len() - last).unwrap_or_default();
    let old: HashSet<_> = before.iter().map(Arc::as_ptr).collect();
    let current: HashSet<_> = now.iter().map(|one| Arc::as_ptr(one)).collect();
    let gone = before.iter().filter(|one| !current.contains(&Arc::as_ptr(one))).cloned();
    let new = now.iter().filter(|one| !old.contains(&Arc::as_ptr(one)));
    (gone.collect(), new.map(|&one| one.clone()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_in_another_place_neither_came_nor_went() {
        let [a, b, c, d] = ["a", "b", "c", "d"].map(Arc::new);
        let before = [a.clone(), b.clone(), c.clone()];
        assert_eq!(gone_and_new(&before, &[&a, &b, &c]), (vec![], vec![]));
        assert_eq!(gone_and_new(&before, &[&a, &d, &c, &b]), (vec![], vec![d.clone()]));
        assert_eq!(gone_and_new(&before, &[&a, &d, &c]), (vec![b.clone()], vec![d.clone()]));
        assert_eq!(gone_and_new(&before, &[&a, &c]), (vec![b.clone()], vec![]));
        assert_eq!(gone_and_new(&before, &[&c]), (vec![a, b], vec![]));
        // Equal, and yet another.
        let other = Arc::new("c");
        assert_eq!(gone_and_new(std::slice::from_ref(&c), &[&other]), (vec![c], vec![other]));
    }
}
