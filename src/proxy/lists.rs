//! Linked lists through the places of a slab: membership costs no allocation, and removal needs no search. Pure.

/// A place in a worker's slab of connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Place(u32);

impl Place {
    /// A slab has fewer than 2^32 places: each connection needs descriptors, and a process has fewer than that.
    pub(super) fn new(place: usize) -> Self {
        Self(u32::try_from(place).unwrap_or(u32::MAX))
    }

    pub(super) fn get(self) -> usize {
        self.0 as usize
    }
}

/// The first and the last place of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct List {
    pub first: Place,
    last: Place,
}

#[derive(Debug, Clone, Copy, Default)]
struct Neighbours {
    before: Option<Place>,
    after: Option<Place>,
}

/// The neighbours of each place, in lists of one kind. A place is in one list at a time.
#[derive(Debug, Default)]
pub(super) struct Lists(Vec<Neighbours>);

impl Lists {
    /// Appends a place that is in no list.
    pub(super) fn push_back(&mut self, list: &mut Option<List>, place: Place) {
        if self.0.len() <= place.get() {
            self.0.resize_with(place.get() + 1, Neighbours::default);
        }
        let before = list.map(|list| list.last);
        *self.at(place) = Neighbours { before, after: None };
        if let Some(before) = before {
            self.at(before).after = Some(place);
        }
        let first = list.map_or(place, |list| list.first);
        *list = Some(List { first, last: place });
    }

    /// Removes a place from its list.
    pub(super) fn remove(&mut self, list: &mut Option<List>, place: Place) {
        let Some(List { first, last }) = *list else { return };
        let Neighbours { before, after } = std::mem::take(self.at(place));
        if let Some(before) = before {
            self.at(before).after = after;
        }
        if let Some(after) = after {
            self.at(after).before = before;
        }
        let first = if first == place { after } else { Some(first) };
        let last = if last == place { before } else { Some(last) };
        *list = first.zip(last).map(|(first, last)| List { first, last });
    }

    /// The places of a list, starting with the first.
    pub(super) fn iter(&self, list: Option<List>) -> impl Iterator<Item = Place> + '_ {
        let after = |place: &Place| self.0.get(place.get()).and_then(|neighbours| neighbours.after);
        std::iter::successors(list.map(|list| list.first), after)
    }

    #[allow(
        clippy::indexing_slicing,
        reason = "each place of a list was pushed, which makes room for it"
    )]
    fn at(&mut self, place: Place) -> &mut Neighbours {
        &mut self.0[place.get()]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn lists_are_what_queues_of_their_own_would_be(
            steps in proptest::collection::vec((0..4_usize, 0..20_usize), 0..200),
        ) {
            let (mut lists, mut ends) = (Lists::default(), [None; 4]);
            let mut expected: [Vec<usize>; 4] = Default::default();
            for (list, place) in steps {
                match expected.iter().position(|queue| queue.contains(&place)) {
                    Some(of) => {
                        expected[of].retain(|other| *other != place);
                        lists.remove(&mut ends[of], Place::new(place));
                    }
                    None => {
                        expected[list].push(place);
                        lists.push_back(&mut ends[list], Place::new(place));
                    }
                }
                for (queue, ends) in expected.iter().zip(ends) {
                    let places: Vec<_> = lists.iter(ends).map(Place::get).collect();
                    prop_assert_eq!(&places, queue);
                    prop_assert_eq!(ends.map(|list| list.last.get()), queue.last().copied());
                }
            }
        }
    }
}
