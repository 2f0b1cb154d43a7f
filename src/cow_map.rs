//! A map whose copies share their common parts: the cost of a copy does not depend on its size, changing a copy costs a
//! small part of its size, and the differences between two copies are found without looking at the rest.

use std::{
    borrow::Borrow,
    fmt,
    hash::{BuildHasher, Hash, RandomState},
    sync::{Arc, LazyLock},
};

use hashbrown::{HashTable, hash_table::Entry};

/// Number of parts over which the entries are spread: with 100,000 entries a change copies some 400 of them.
const PARTS: usize = 256;

/// One per process, so that a key is in the same part of every map.
static HASHER: LazyLock<RandomState> = LazyLock::new(RandomState::new);

type Part<K, V> = HashTable<(K, V)>;

/// A hash map that is copied on write, part by part.
pub struct CowMap<K, V> {
    parts: Box<[Arc<Part<K, V>>]>,
    len: usize,
}

impl<K, V> CowMap<K, V> {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All entries, not sorted.
    pub fn iter(&self) -> Iter<'_, K, V> {
        Iter { parts: self.parts.iter(), part: None, left: self.len }
    }

    pub fn keys(&self) -> impl ExactSizeIterator<Item = &K> {
        self.iter().map(|(key, _)| key)
    }

    pub fn values(&self) -> impl ExactSizeIterator<Item = &V> {
        self.iter().map(|(_, value)| value)
    }
}

impl<K: Hash + Eq, V> CowMap<K, V> {
    pub fn get<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        let hash = HASHER.hash_one(key);
        self.parts
            .get(part_of(hash))?
            .find(hash, |(other, _)| other.borrow() == key)
            .map(|(_, value)| value)
    }

    pub fn contains_key(&self, key: &K) -> bool {
        self.get(key).is_some()
    }

    /// The keys whose entries differ from those of `before`, or that only one of the maps has. `same` compares values.
    pub fn differing_keys<'a>(
        &'a self,
        before: &'a Self,
        same: impl Fn(&V, &V) -> bool,
    ) -> Vec<&'a K> {
        let mut keys = Vec::new();
        let find = |part: &'a Part<K, V>, key: &K| {
            part.find(HASHER.hash_one(key), |(other, _)| other == key)
        };
        for (now, then) in self.parts.iter().zip(&before.parts) {
            if Arc::ptr_eq(now, then) {
                continue;
            }
            let differs = |(key, value): &&'a (K, V)| {
                find(then, key).is_none_or(|(_, before)| !same(value, before))
            };
            keys.extend(now.iter().filter(differs).map(|(key, _)| key));
            keys.extend(then.iter().map(|(key, _)| key).filter(|key| find(now, key).is_none()));
        }
        keys
    }
}

impl<K: Hash + Eq + Clone, V: Clone> CowMap<K, V> {
    /// Sets an entry. Returns its previous value.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        let hash = HASHER.hash_one(&key);
        let part = self.part_mut(hash)?;
        match part.entry(hash, |(other, _)| *other == key, |(key, _)| HASHER.hash_one(key)) {
            Entry::Occupied(mut entry) => Some(std::mem::replace(&mut entry.get_mut().1, value)),
            Entry::Vacant(entry) => {
                entry.insert((key, value));
                self.len += 1;
                None
            }
        }
    }

    /// Removes an entry. Returns its value.
    pub fn remove<Q: Hash + Eq + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        // A part is copied only if the removal changes it.
        self.get(key)?;
        let hash = HASHER.hash_one(key);
        let entry =
            self.part_mut(hash)?.find_entry(hash, |(other, _)| other.borrow() == key).ok()?;
        let ((_, value), _) = entry.remove();
        self.len -= 1;
        Some(value)
    }

    /// An entry, to be changed in place.
    pub fn get_mut<Q: Hash + Eq + ?Sized>(&mut self, key: &Q) -> Option<&mut V>
    where
        K: Borrow<Q>,
    {
        self.get(key)?;
        let hash = HASHER.hash_one(key);
        self.part_mut(hash)?
            .find_mut(hash, |(other, _)| other.borrow() == key)
            .map(|(_, value)| value)
    }

    /// Always `Some`: every hash has a part.
    fn part_mut(&mut self, hash: u64) -> Option<&mut Part<K, V>> {
        self.parts.get_mut(part_of(hash)).map(Arc::make_mut)
    }
}

/// Uses bits of the hash that are not used to place entries within a part.
fn part_of(hash: u64) -> usize {
    (hash >> 40) as usize % PARTS
}

impl<K, V> Default for CowMap<K, V> {
    fn default() -> Self {
        // All parts are the same empty one until they have entries.
        let empty = Arc::new(Part::new());
        Self { parts: (0..PARTS).map(|_| empty.clone()).collect(), len: 0 }
    }
}

impl<K, V> Clone for CowMap<K, V> {
    fn clone(&self) -> Self {
        Self { parts: self.parts.clone(), len: self.len }
    }
}

impl<K: fmt::Debug, V: fmt::Debug> fmt::Debug for CowMap<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl<K: Hash + Eq, V: PartialEq> PartialEq for CowMap<K, V> {
    fn eq(&self, other: &Self) -> bool {
        self.len == other.len && self.differing_keys(other, V::eq).is_empty()
    }
}

impl<K: Hash + Eq, V: Eq> Eq for CowMap<K, V> {}

impl<K: Hash + Eq + Clone, V: Clone> FromIterator<(K, V)> for CowMap<K, V> {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        let mut map = Self::default();
        for (key, value) in entries {
            map.insert(key, value);
        }
        map
    }
}

/// The entries of a [`CowMap`].
pub struct Iter<'a, K, V> {
    parts: std::slice::Iter<'a, Arc<Part<K, V>>>,
    part: Option<hashbrown::hash_table::Iter<'a, (K, V)>>,
    left: usize,
}

impl<'a, K, V> Iterator for Iter<'a, K, V> {
    type Item = (&'a K, &'a V);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some((key, value)) = self.part.as_mut().and_then(Iterator::next) {
                self.left -= 1;
                return Some((key, value));
            }
            self.part = Some(self.parts.next()?.iter());
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl<K, V> ExactSizeIterator for Iter<'_, K, V> {}

impl<K, V> fmt::Debug for Iter<'_, K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} more entries", self.left)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeSet, HashMap};

    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Step {
        Insert(u8, u8),
        Remove(u8),
        Change(u8),
        /// Later differences are computed against this copy.
        Copy,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => any::<(u8, u8)>().prop_map(|(key, value)| Step::Insert(key, value)),
            2 => any::<u8>().prop_map(Step::Remove),
            1 => any::<u8>().prop_map(Step::Change),
            1 => Just(Step::Copy),
        ]
    }

    proptest! {
        #[test]
        fn it_is_a_map_and_a_copy_is_not_changed(steps in prop::collection::vec(step(), 0..200)) {
            let (mut map, mut model) = (CowMap::default(), HashMap::new());
            let (mut copy, mut model_of_copy) = (map.clone(), model.clone());
            for step in steps {
                match step {
                    Step::Insert(key, value) => {
                        prop_assert_eq!(map.insert(key, value), model.insert(key, value));
                    }
                    Step::Remove(key) => prop_assert_eq!(map.remove(&key), model.remove(&key)),
                    Step::Change(key) => {
                        let (one, other) = (map.get_mut(&key), model.get_mut(&key));
                        prop_assert_eq!(one.is_some(), other.is_some());
                        one.into_iter().chain(other).for_each(|value| *value = value.wrapping_add(1));
                    }
                    Step::Copy => (copy, model_of_copy) = (map.clone(), model.clone()),
                }
                prop_assert_eq!(map.len(), model.len());
            }
            let entries = |map: &CowMap<u8, u8>| map.iter().map(|(k, v)| (*k, *v)).collect::<HashMap<_, _>>();
            prop_assert_eq!(entries(&map), model.clone());
            prop_assert_eq!(entries(&copy), model_of_copy.clone());
            let differing = |key: &&u8| model.get(*key) != model_of_copy.get(*key);
            let expected: BTreeSet<_> = model.keys().chain(model_of_copy.keys()).filter(differing).collect();
            let keys = map.differing_keys(&copy, u8::eq);
            prop_assert_eq!(keys.len(), expected.len(), "each is told once");
            prop_assert_eq!(keys.into_iter().collect::<BTreeSet<_>>(), expected);
            prop_assert_eq!(map == copy, model == model_of_copy);
        }
    }
}
