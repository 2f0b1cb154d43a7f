//! How much a bulk transfer moves at a time: as much as a call can if no other task waits, and little otherwise.

use std::cell::Cell;

/// What the relays of a worker know of each other: whether anything but bulk is going on.
#[derive(Debug, Default)]
pub(super) struct Turns {
    /// Turns of bulk since anything else was moved.
    alone: Cell<u32>,
}

impl Turns {
    /// Bytes of a turn if no other task waits: a call costs nearly the same for many bytes as for few.
    pub(super) const LONG: u32 = 1024 * 1024;
    /// Bytes of a turn beside others: some microseconds of the processor's time.
    pub(super) const SHORT: u32 = 64 * 1024;
    /// Short turns until bulk takes itself for alone: requests that come a thousand times a second are never further apart.
    const UNTIL_ALONE: u32 = 256;

    /// Bytes that the next turn of bulk may move.
    pub(super) fn next(&self) -> u32 {
        let most = self.most();
        self.alone.set(self.alone.get().saturating_add(1));
        most
    }

    pub(super) fn most(&self) -> u32 {
        if self.alone.get() < Self::UNTIL_ALONE { Self::SHORT } else { Self::LONG }
    }

    /// The most that any of the next `turns` turns may move.
    #[cfg(test)]
    pub(super) fn most_of_next(&self, turns: u32) -> u32 {
        if self.alone.get() + turns > Self::UNTIL_ALONE { Self::LONG } else { Self::SHORT }
    }

    /// Something else was moved.
    pub(super) fn shorten(&self) {
        self.alone.set(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bulk_moves_little_at_a_time_until_it_has_been_alone_for_a_while() {
        let turns = Turns::default();
        let short = std::iter::repeat_with(|| turns.next()).take_while(|&t| t == Turns::SHORT);
        assert_eq!(short.count(), Turns::UNTIL_ALONE as usize);
        assert_eq!(turns.next(), Turns::LONG);
        turns.shorten();
        assert_eq!(turns.next(), Turns::SHORT);
    }
}
