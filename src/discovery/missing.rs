//! Why a query has no endpoints, in one sentence without its full stop: there is no such service, or none of its entries has the
//! tags, is healthy, or can be used. The same words for every source. Pure.

use super::{Rejected, Rejections, address::excerpt};
use crate::model::Tags;

/// What a source calls its entries: one, and several.
#[derive(Debug, Clone, Copy)]
pub(super) struct Noun(pub(super) &'static str, pub(super) &'static str);

pub(super) const ENTRY: Noun = Noun("entry", "entries");
pub(super) const CONTAINER: Noun = Noun("container", "containers");
pub(super) const ENDPOINT: Noun = Noun("endpoint", "endpoints");
pub(super) const TARGET: Noun = Noun("target", "targets");

/// Names, or lists of tags, that are given.
const NAMED: usize = 3;
/// Longer names are not compared.
const LONGEST: usize = 128;

/// No entry has this name. `fact` says so in the words of the source, `names` are those that it has.
pub(super) fn no_such_service<'a>(
    fact: &str,
    name: &str,
    names: impl Iterator<Item = &'a String>,
) -> String {
    let near: Vec<_> = nearest(name, names).into_iter().map(excerpt).collect();
    match near.is_empty() {
        true => fact.to_owned(),
        false => format!("{fact}; near: {}", near.join(", ")),
    }
}

/// Entries have the name, and none of them has all tags. `carried` are the tags of each.
pub(super) fn no_such_tags<'a>(
    Noun(one, many): Noun,
    tags: &Tags,
    carried: impl Iterator<Item = &'a [String]>,
) -> String {
    let wanted = excerpts(tags.iter());
    let mut count = 0;
    let mut some: Vec<String> = Vec::new();
    for tags in carried {
        count += 1;
        let shown = match tags {
            [] => "no tags".to_owned(),
            tags => excerpts(tags.iter().map(String::as_str)),
        };
        if some.len() <= NAMED && !some.contains(&shown) {
            some.push(shown);
        }
    }
    if some.len() > NAMED {
        some.truncate(NAMED);
        some.push("...".to_owned());
    }
    let some = some.join(", ");
    match count {
        1 => format!("its one {one} does not carry {wanted}; it carries {some}"),
        _ => format!("0 of {count} {many} carry {wanted}; they carry {some}"),
    }
}

/// Entries have the name and the tags, and none of them is healthy. `test` is what they do not pass.
pub(super) fn none_healthy(Noun(one, many): Noun, count: usize, test: &str) -> String {
    match count {
        1 => format!("its one {one} does not pass its {test}"),
        _ => format!("0 of {count} {many} pass their {test}"),
    }
}

/// Entries have the name and the tags, and each was skipped; `None` if none was.
pub(super) fn all_skipped(Noun(one, many): Noun, skipped: &Rejections) -> Option<String> {
    let Rejected { what, reason } = skipped.iter().next()?;
    Some(match skipped.count() {
        1 => format!("its one {one} was skipped ({what}: {reason})"),
        count => format!("all {count} {many} were skipped (the first: {what}: {reason})"),
    })
}

/// `[tag,tag]`, each shortened.
fn excerpts<'a>(tags: impl Iterator<Item = &'a str>) -> String {
    format!("[{}]", tags.map(excerpt).collect::<Vec<_>>().join(","))
}

/// The names that may have been meant.
fn nearest<'a>(name: &str, names: impl Iterator<Item = &'a String>) -> Vec<&'a str> {
    let wanted = name.to_lowercase();
    let few = (wanted.chars().count() / 3).clamp(1, 3);
    let mut near: Vec<_> = names
        .filter(|other| other.len() <= LONGEST && name.len() <= LONGEST)
        .filter_map(|other| {
            let lower = other.to_lowercase();
            let within = lower.contains(&wanted) || lower.len() > 2 && wanted.contains(&lower);
            let distance = distance(&wanted, &lower);
            (within || distance <= few).then_some((distance, other.as_str()))
        })
        .collect();
    near.sort_unstable();
    near.into_iter().take(NAMED).map(|(_, other)| other).collect()
}

/// How many characters have to be put in, taken away, replaced, or swapped with the next one, to make one text the other.
fn distance(one: &str, other: &str) -> usize {
    let (one, other): (Vec<_>, Vec<_>) = (one.chars().collect(), other.chars().collect());
    let at = |row: &[usize], i: usize| row.get(i).copied().unwrap_or_default();
    let (mut above, mut row): (Vec<usize>, Vec<_>) = (Vec::new(), (0..=other.len()).collect());
    let mut before = None;
    for (i, a) in one.iter().enumerate() {
        let mut next = vec![i + 1];
        let mut left = None;
        for (j, b) in other.iter().enumerate() {
            let mut least =
                (at(&row, j) + usize::from(a != b)).min(at(&row, j + 1) + 1).min(at(&next, j) + 1);
            if (before, left) == (Some(b), Some(a)) {
                least = least.min(at(&above, j.saturating_sub(1)) + 1);
            }
            next.push(least);
            left = Some(b);
        }
        before = Some(a);
        above = std::mem::replace(&mut row, next);
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_name_that_is_nearly_right_is_given() {
        let names = ["consul", "frontend_http", "frontend_https", "mysql"].map(str::to_owned);
        let of = |name: &str| no_such_service("no service has this name", name, names.iter());
        for (name, near) in [
            ("frontend-http", "; near: frontend_http, frontend_https"),
            ("MySQL", "; near: mysql"),
            ("myqsl", "; near: mysql"),
            ("redis", ""),
        ] {
            assert_eq!(of(name), format!("no service has this name{near}"));
        }
    }

    #[test]
    fn the_tags_that_there_are_are_given() {
        let of = |wanted: &[&str], carried: &[&[&str]]| {
            let carried: Vec<Vec<String>> = carried
                .iter()
                .map(|tags| tags.iter().map(|&tag| tag.to_owned()).collect())
                .collect();
            let wanted = Tags::new(wanted.iter().copied());
            no_such_tags(ENTRY, &wanted, carried.iter().map(Vec::as_slice))
        };
        for (wanted, carried, expected) in [
            (
                &["canary"][..],
                &[&["prod"][..]][..],
                "its one entry does not carry [canary]; it carries [prod]",
            ),
            (&["canary"], &[&[]], "its one entry does not carry [canary]; it carries no tags"),
            (
                &["canary"],
                &[&["prod"], &["prod"], &["prod", "app1"], &[]],
                "0 of 4 entries carry [canary]; they carry [prod], [prod,app1], no tags",
            ),
            (
                &["y", "x"],
                &[&["a"], &["b"], &["c"], &["d"], &["e"]],
                "0 of 5 entries carry [y,x]; they carry [a], [b], [c], ...",
            ),
        ] {
            assert_eq!(of(wanted, carried), expected);
        }
    }

    #[test]
    fn one_is_one_and_many_are_many() {
        assert_eq!(
            none_healthy(CONTAINER, 1, "HEALTHCHECK"),
            "its one container does not pass its HEALTHCHECK"
        );
        assert_eq!(
            none_healthy(CONTAINER, 3, "HEALTHCHECK"),
            "0 of 3 containers pass their HEALTHCHECK"
        );
        let skipped = Rejected { what: "/s/a".into(), reason: "no port".into() };
        assert_eq!(all_skipped(ENTRY, &Rejections::default()), None);
        assert_eq!(
            all_skipped(ENTRY, &vec![skipped.clone()].into()).as_deref(),
            Some("its one entry was skipped (/s/a: no port)")
        );
        assert_eq!(
            all_skipped(ENTRY, &vec![skipped.clone(), skipped].into()).as_deref(),
            Some("all 2 entries were skipped (the first: /s/a: no port)")
        );
    }

    proptest! {
        #[test]
        fn a_distance_is_one(one in "\\PC{0,12}", other in "\\PC{0,12}", at in 0..13usize) {
            prop_assert_eq!(distance(&one, &other), distance(&other, &one));
            prop_assert_eq!(distance(&one, &other) == 0, one == other);
            let mut swapped: Vec<_> = one.chars().collect();
            if at + 1 < swapped.len() {
                swapped.swap(at, at + 1);
                prop_assert!(distance(&one, &swapped.into_iter().collect::<String>()) <= 1);
            }
            let mut longer: Vec<_> = one.chars().collect();
            longer.insert(at.min(longer.len()), 'x');
            prop_assert_eq!(distance(&one, &longer.into_iter().collect::<String>()), 1);
        }
    }
}
