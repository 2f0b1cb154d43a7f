//! When something that did not work is tried again. Pure.

use std::time::{Duration, Instant};

/// The time between two attempts: twice as long after each one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Again {
    next: Instant,
    gap: Duration,
}

impl Again {
    const SHORTEST: Duration = Duration::from_secs(1);
    const LONGEST: Duration = Duration::from_secs(60);

    /// The first attempt was made now.
    pub(super) fn new(now: Instant) -> Self {
        Self { next: now + Self::SHORTEST, gap: Self::SHORTEST }
    }

    /// Whether the next attempt is due; if so, it counts as made.
    pub(super) fn is_due(&mut self, now: Instant) -> bool {
        let is_due = now >= self.next;
        if is_due {
            self.gap = (self.gap * 2).min(Self::LONGEST);
            self.next = now + self.gap;
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_become_rare_and_never_end() {
        let start = Instant::now();
        let mut again = Again::new(start);
        let due = (0..600).filter(|n| again.is_due(start + Duration::from_secs(*n)));
        let due: Vec<_> = due.collect();
        assert_eq!(due[..7], [1, 3, 7, 15, 31, 63, 123]);
        assert!(due.windows(2).all(|pair| pair[1] - pair[0] <= 60));
    }
}
