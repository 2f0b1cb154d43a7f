//! Finds out whether this host drops captured connections after our rules, by two counters: one at the start of the INPUT
//! hook, one at its end. Pure.

/// The counters as last read, and what they show.
#[derive(Debug, Default)]
pub(super) struct Arrivals {
    before: Option<(u64, u64)>,
    /// Of the connections counted in `before`, the number that never passed.
    lost: u64,
    dropped: bool,
    /// Since the last change of other programs' rules: whether connections passed, and whether any were lost.
    passed_since: bool,
    lost_since: bool,
    /// Connections passed and none was lost since the last doubt.
    passing: bool,
}

impl Arrivals {
    /// Whether others' rules drop captured connections, by what `counts` says now: how many came, and how many passed. What came
    /// a moment ago may just be on its way: it is lost once it is missing twice. One that is lost is a proof. The opposite is proved
    /// once some pass, and none more is missing than before.
    pub(super) fn are_dropped(&mut self, counts: Option<(u64, u64)>) -> bool {
        let missing = |(came, passed): (u64, u64)| came.saturating_sub(passed);
        // Smaller counts are those of chains that were made again.
        let before = self.before.filter(|before| counts.is_some_and(|now| now.1 >= before.1));
        match (before, counts) {
            (Some(before), Some(now)) => {
                let passes = now.1 > before.1;
                self.passed_since |= passes;
                let lost = missing(before).min(missing(now));
                if self.dropped && passes && missing(now) <= missing(before) {
                    // Those that were missing at the last look came before those that pass.
                    (self.dropped, self.passing) = (false, true);
                    self.lost = missing(now);
                } else {
                    if lost > self.lost {
                        (self.dropped, self.passing, self.lost_since) = (true, false, true);
                    } else if passes && missing(now) <= self.lost {
                        (self.dropped, self.passing) = (false, true);
                    }
                    self.lost = lost;
                }
            }
            // Without two counts to compare, nothing is known about other programs' rules.
            _ => {
                let Self { passed_since, lost_since, .. } = *self;
                let dropped = self.dropped && counts.is_some();
                *self = Self { dropped, passed_since, lost_since, ..Self::default() };
            }
        }
        self.before = counts;
        self.dropped
    }

    /// A rule that dropped connections was removed: the connections that are missing now were dropped by it. `counts`: what they are
    /// now. Those of the last look would not do: what was dropped since would look like a drop by the rules that are left.
    pub(super) fn forgive(&mut self, counts: Option<(u64, u64)>) {
        self.before = counts.or(self.before);
        self.lost = self.before.map_or(0, |(came, passed)| came.saturating_sub(passed));
        self.dropped = false;
    }

    /// Other programs changed their rules, so that earlier counts prove nothing about them. `counts`: the current counts.
    pub(super) fn doubt(&mut self, counts: Option<(u64, u64)>) {
        self.are_dropped(counts);
        (self.passing, self.passed_since, self.lost_since) = (false, false, false);
    }

    /// Whether it is known that captured connections pass.
    pub(super) fn pass(&self) -> bool {
        self.passing
    }

    /// The last result of [`Self::are_dropped`].
    pub(super) fn dropped(&self) -> bool {
        self.dropped
    }

    /// Whether connections were dropped since the last change of other programs' rules, and none has passed since. If only
    /// one consumer's connections are dropped, those of others still pass.
    pub(super) fn none_passes(&self) -> bool {
        self.dropped && self.lost_since && !self.passed_since
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_twice_is_dropped_until_others_pass() {
        let mut arrivals = Arrivals::default();
        let mut told = |counts| arrivals.are_dropped(Some(counts));
        assert!(!told((0, 0)));
        // One is on its way, and has passed at the next read.
        assert!(!told((5, 4)));
        assert!(!told((5, 5)));
        // Two are lost.
        assert!(!told((7, 5)));
        assert!(told((7, 5)));
        assert!(told((7, 5)), "nothing has shown that it is better");
        assert!(told((9, 5)));
        assert!(told((9, 5)));
        // Other connections pass.
        assert!(!told((12, 8)));
        assert!(!told((12, 8)));
    }

    #[test]
    fn what_a_rule_dropped_that_is_gone_is_dropped_no_more() {
        let mut arrivals = Arrivals::default();
        let told = |arrivals: &mut Arrivals, counts| arrivals.are_dropped(Some(counts));
        assert!(!told(&mut arrivals, (0, 0)));
        assert!(!told(&mut arrivals, (7, 5)));
        // Before it was noticed that they are missing twice.
        arrivals.forgive(Some((7, 5)));
        assert!(!told(&mut arrivals, (7, 5)));
        assert!(!told(&mut arrivals, (9, 7)));
        // Another rule drops other connections.
        assert!(!told(&mut arrivals, (10, 7)));
        assert!(told(&mut arrivals, (10, 7)));
        // Two more were dropped since the last look, before that rule was removed too.
        arrivals.forgive(Some((12, 7)));
        assert!(!told(&mut arrivals, (12, 7)));
        assert!(!told(&mut arrivals, (12, 7)));
        assert!(!told(&mut arrivals, (13, 8)));
    }

    #[test]
    fn the_first_that_is_lost_is_believed_and_so_is_the_first_that_passes() {
        let mut arrivals = Arrivals::default();
        let mut told = |counts| arrivals.are_dropped(Some(counts));
        assert!(!told((4, 4)));
        assert!(!told((5, 4)), "it may be on its way");
        assert!(told((5, 4)));
        // Sent again by the same consumer, and then the firewall is opened.
        assert!(told((8, 4)));
        assert!(!told((9, 5)), "it passed after all that are missing");
        assert!(!told((9, 5)));
        assert!(!told((10, 6)));
        // Of two consumers one is turned away: each loss is said.
        assert!(!told((12, 7)));
        assert!(told((14, 9)));
    }

    #[test]
    fn what_passes_is_known_until_others_have_new_rules() {
        let mut arrivals = Arrivals::default();
        let passes = |arrivals: &mut Arrivals, counts| {
            arrivals.are_dropped(Some(counts));
            arrivals.pass()
        };
        assert!(!passes(&mut arrivals, (3, 3)), "before it was looked");
        assert!(passes(&mut arrivals, (4, 4)));
        assert!(passes(&mut arrivals, (4, 4)), "nothing has come since");
        arrivals.doubt(Some((6, 6)));
        assert!(!arrivals.pass());
        assert!(!passes(&mut arrivals, (6, 6)));
        assert!(!passes(&mut arrivals, (8, 7)), "one is on its way, or lost");
        assert!(!passes(&mut arrivals, (8, 7)) && arrivals.dropped());
        assert!(passes(&mut arrivals, (9, 8)));
        arrivals.doubt(None);
        assert!(!arrivals.pass() && !arrivals.dropped());
    }

    #[test]
    fn all_are_dropped_only_if_none_passed_since_others_changed_their_rules() {
        let mut arrivals = Arrivals::default();
        let told = |arrivals: &mut Arrivals, counts| {
            arrivals.are_dropped(Some(counts));
            (arrivals.dropped(), arrivals.none_passes())
        };
        assert_eq!(told(&mut arrivals, (4, 4)), (false, false));
        assert_eq!(told(&mut arrivals, (5, 5)), (false, false));
        // One consumer's connections are dropped, and no other consumer connects.
        assert_eq!(told(&mut arrivals, (7, 5)), (false, false), "they may be on their way");
        assert_eq!(told(&mut arrivals, (8, 5)), (true, false));
        assert_eq!(told(&mut arrivals, (9, 5)), (true, false));
        assert_eq!(told(&mut arrivals, (9, 5)), (true, false));
        assert_eq!(told(&mut arrivals, (13, 9)), (false, false), "others pass");
        // Connections lost before the change prove nothing about the new rules.
        assert_eq!(told(&mut arrivals, (14, 9)), (false, false));
        assert_eq!(told(&mut arrivals, (14, 9)), (true, false));
        arrivals.doubt(Some((14, 9)));
        assert_eq!(told(&mut arrivals, (14, 9)), (true, false));
        assert_eq!(told(&mut arrivals, (16, 9)), (true, false), "they may be on their way");
        assert_eq!(told(&mut arrivals, (16, 9)), (true, true));
        assert_eq!(told(&mut arrivals, (18, 10)), (true, false), "one has passed");
        assert_eq!(told(&mut arrivals, (19, 10)), (true, false));
        assert_eq!(told(&mut arrivals, (19, 10)), (true, false), "it did, since the rules are so");
        // The counters start from zero, and the rules are the same.
        assert_eq!(told(&mut arrivals, (2, 0)), (true, false));
        assert_eq!(told(&mut arrivals, (2, 0)), (true, false));
    }

    #[test]
    fn counts_that_begin_again_say_nothing() {
        let mut arrivals = Arrivals::default();
        assert!(!arrivals.are_dropped(Some((100, 50))));
        assert!(arrivals.are_dropped(Some((100, 50))));
        assert!(arrivals.are_dropped(Some((3, 1))));
        assert!(!arrivals.are_dropped(Some((3, 3))), "two that were on their way");
        assert!(!arrivals.are_dropped(None));
    }
}
