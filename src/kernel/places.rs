//! The places of one of the kernel's tables: who has which, and when one that was given back may be another's. Pure.
//!
//! A program that runs may have read a place just before it was given back. So a place that was is not given to another before every
//! program has ended that ran then: a grace period.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use super::layout::Place;

#[derive(Debug)]
pub(super) struct Places {
    generations: Vec<u32>,
    most: u32,
    free: VecDeque<u32>,
    /// Given back, and when.
    waiting: VecDeque<(Instant, u32)>,
}

impl Places {
    /// Where no grace period can be waited for, it is over for certain after this time: a program runs for some microseconds.
    const LONG_ENOUGH: Duration = Duration::from_secs(10);

    pub(super) fn new(most: u32) -> Self {
        Self { generations: Vec::new(), most, free: VecDeque::new(), waiting: VecDeque::new() }
    }

    /// A place that nobody has. `grace` waits for a grace period, and says whether it could; it is called only if there is no place
    /// otherwise. `None` if there is none.
    pub(super) fn take(&mut self, now: Instant, grace: impl FnOnce() -> bool) -> Option<Place> {
        if self.free.is_empty() && self.generations.len() < self.most as usize {
            self.free.push_back(self.generations.len() as u32);
            self.generations.push(0);
        }
        if self.free.is_empty() && !self.waiting.is_empty() {
            let is_over = grace();
            while let Some((since, index)) = self.waiting.front().copied()
                && (is_over || now >= since + Self::LONG_ENOUGH)
            {
                self.waiting.pop_front();
                self.free.push_back(index);
            }
        }
        let index = self.free.pop_front()?;
        let generation = self.generations.get_mut(index as usize)?;
        // 0 is never given: an empty table has it.
        *generation = generation.checked_add(1).unwrap_or(1);
        Some(Place { index, generation: *generation })
    }

    pub(super) fn give_back(&mut self, place: Place, now: Instant) {
        self.waiting.push_back((now, place.index));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_anothers_only_after_a_grace_period() {
        let (mut places, now) = (Places::new(2), Instant::now());
        let never = || -> bool { panic!("there was a place without it") };
        let first = places.take(now, never).unwrap();
        let second = places.take(now, never).unwrap();
        assert_eq!([first.index, second.index, first.generation], [0, 1, 1]);
        assert_eq!(places.take(now, never), None, "all are in use");
        places.give_back(first, now);
        assert_eq!(places.take(now, || false), None, "it could not be waited for");
        let again = places.take(now, || true).unwrap();
        assert_eq!(again, Place { index: 0, generation: 2 });
        places.give_back(second, now);
        let later = now + Places::LONG_ENOUGH;
        assert_eq!(places.take(later - Duration::from_millis(1), || false), None);
        assert_eq!(places.take(later, || false), Some(Place { index: 1, generation: 2 }));
    }
}
