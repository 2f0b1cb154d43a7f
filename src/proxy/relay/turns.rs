//! How much a bulk transfer moves at a time: as much as one call can if no other task waits, and little otherwise.

use std::cell::Cell;

/// Whether the relays of a worker move anything except bulk.
#[derive(Debug, Default)]
pub(super) struct Turns {
    /// Bulk turns since anything else was moved.
    alone: Cell<u32>,
}

impl Turns {
    /// Bytes of a turn if no other task waits. A call costs nearly the same for many bytes as for few.
    pub(super) const LONG: u32 = 1024 * 1024;
    /// Bytes of a turn if others wait: a few microseconds of CPU time.
    pub(super) const SHORT: u32 = 64 * 1024;
    /// Number of short turns after which bulk counts as alone. A thousand requests a second are never that far apart.
    const UNTIL_ALONE: u32 = 256;

    /// Maximum number of bytes of the next bulk turn.
    pub(super) fn next(&self) -> u32 {
        let most = self.most();
        self.alone.set(self.alone.get().saturating_add(1));
        most
    }

    pub(super) fn most(&self) -> u32 {
        if self.alone.get() < Self::UNTIL_ALONE { Self::SHORT } else { Self::LONG }
    }

    /// Maximum number of bytes of any of the next `turns` turns.
    #[cfg(test)]
    pub(super) fn most_of_next(&self, turns: u32) -> u32 {
        if self.alone.get() + turns > Self::UNTIL_ALONE { Self::LONG } else { Self::SHORT }
    }

    /// Notes that something except bulk was moved.
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
