//! What other programs did to our rules. Pure.

use std::collections::HashSet;

pub use crate::events::Change;

impl Change {
    /// The change from `before` to `now`, which differ, and what is missing, as text.
    pub(super) fn of(before: &str, now: Option<&str>) -> (Self, String) {
        let Some(now) = now else { return (Self::Vanished, "all of them".to_owned()) };
        let present: HashSet<_> = now.lines().collect();
        let mut lost = before.lines().filter(|line| !present.contains(line));
        let Some(first) = lost.next() else { return (Self::Added, "nothing".to_owned()) };
        let all = std::iter::once(first).chain(lost);
        // A line that begins with a number is a jump to our chain. The number is its position.
        let elsewhere: HashSet<_> = now.lines().filter_map(placed).collect();
        let (moved, gone): (Vec<_>, Vec<_>) =
            all.partition(|line| placed(line).is_some_and(|rule| elsewhere.contains(rule)));
        match gone[..] {
            [] => {
                let moved = moved.first().copied().unwrap_or_default();
                (Self::Displaced, format!("the place of {moved}"))
            }
            [only] => (Self::Incomplete, only.trim().to_owned()),
            [first, ..] => {
                (Self::Incomplete, format!("{} and {} more", first.trim(), gone.len() - 1))
            }
        }
    }
}

/// The rule in a line that begins with its position.
fn placed(line: &str) -> Option<&str> {
    let (place, rule) = line.split_once(' ')?;
    (!place.is_empty() && place.bytes().all(|byte| byte.is_ascii_digit())).then_some(rule)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happened_and_what_is_missing_is_named() {
        let of = |before, now| {
            let (change, missing) = Change::of(before, now);
            (change.as_str(), missing)
        };
        let said = |change, missing: &str| (change, missing.to_owned());
        assert_eq!(of("a\n", None), said("vanished", "all of them"));
        assert_eq!(of("a\n\tb\n", Some("a\n")), said("incomplete", "b"));
        assert_eq!(of("a\nb\nc\nd\n", Some("a\n")), said("incomplete", "b and 2 more"));
        assert_eq!(of("a\n", Some("a\nx\n")), said("added", "nothing"));
        let (first, second) = ("0 -A PREROUTING -j EMBASSY\n", "1 -A PREROUTING -j EMBASSY\n");
        let place = "the place of 0 -A PREROUTING -j EMBASSY";
        assert_eq!(of(first, Some(second)), said("displaced", place));
        assert_eq!(of(first, Some("-A EMBASSY -j RETURN\n")).0, "incomplete");
    }
}
