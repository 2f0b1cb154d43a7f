//! Why a query has no endpoints, as one sentence without a full stop: there is no such service, or none of its entries has
//! the tags, is healthy, or can be used. All sources use the same words. Pure.

use super::{Rejected, Rejections, address::excerpt};
use crate::model::Tags;

/// A source's word for its entries: singular and plural.
#[derive(Debug, Clone, Copy)]
pub(super) struct Noun(pub(super) &'static str, pub(super) &'static str);

pub(super) const ENTRY: Noun = Noun("entry", "entries");
pub(super) const CONTAINER: Noun = Noun("container", "containers");
pub(super) const ENDPOINT: Noun = Noun("endpoint", "endpoints");
pub(super) const TARGET: Noun = Noun("target", "targets");

/// Maximum number of names, or lists of tags, that are listed.
const NAMED: usize = 3;
/// Maximum number of tags of one list that are listed.
const TAGS: usize = 10;
/// Maximum length of names that are compared.
const LONGEST: usize = 128;
/// Maximum number of comparisons of characters for one missing name. This is enough for some thousand names. The change of
/// one container may cause this for each binding of the host, and everything else waits.
const WORK: usize = 200_000;

/// No entry has this name. `fact` says so in the source's words. `names` are the existing names, in a stable order: if
/// there are very many, only the first ones are compared.
pub(super) fn no_such_service<'a>(
    fact: &str,
    name: &str,
    names: impl Iterator<Item = &'a String>,
) -> String {
    with_near(fact, &near(name, names.map(String::as_str)))
}

/// Similar names, the most similar ones first. `names` are in a stable order: if there are very many, only the first ones
/// are compared.
pub(crate) fn near<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    nearest(name, names, &mut { WORK })
}

/// The fact, followed by the similar names.
pub(super) fn with_near(fact: &str, near: &[&str]) -> String {
    let near: Vec<_> = near.iter().map(|name| excerpt(name)).collect();
    match near.is_empty() {
        true => fact.to_owned(),
        false => format!("{fact}; near: {}", near.join(", ")),
    }
}

/// Some entries have the name, but none of them has all tags. `carried`: the tags of each.
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
        if some.len() > NAMED {
            continue;
        }
        let shown = match tags {
            [] => "no tags".to_owned(),
            tags => excerpts(tags.iter().map(String::as_str)),
        };
        if !some.contains(&shown) {
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

/// Some entries have the name and the tags, but none of them is healthy. `test`: what they do not pass.
pub(super) fn none_healthy(Noun(one, many): Noun, count: usize, test: &str) -> String {
    match count {
        1 => format!("its one {one} does not pass its {test}"),
        _ => format!("0 of {count} {many} pass their {test}"),
    }
}

/// Some entries have the name and the tags, but each was skipped. `None` if none was.
pub(super) fn all_skipped(Noun(one, many): Noun, skipped: &Rejections) -> Option<String> {
    let Rejected { what, reason } = skipped.iter().next()?;
    Some(match skipped.count() {
        1 => format!("its one {one} was skipped ({what}: {reason})"),
        count => format!("all {count} {many} were skipped (the first: {what}: {reason})"),
    })
}

/// `[tag,tag]`, with each tag shortened, and only the first tags of many.
fn excerpts<'a>(mut tags: impl Iterator<Item = &'a str>) -> String {
    let mut some: Vec<_> = tags.by_ref().take(TAGS).map(excerpt).collect();
    if tags.next().is_some() {
        some.push("...".to_owned());
    }
    format!("[{}]", some.join(","))
}

/// Similar names, as far as `work` is enough. `work` is reduced.
fn nearest<'a>(name: &str, names: impl Iterator<Item = &'a str>, work: &mut usize) -> Vec<&'a str> {
    if name.len() > LONGEST {
        return Vec::new();
    }
    let wanted = name.to_ascii_lowercase();
    let few = (wanted.len() / 3).clamp(1, 3);
    let (mut near, mut lower) = (Vec::new(), String::new());
    for other in names {
        *work = work.saturating_sub(1 + other.len().min(LONGEST));
        if *work == 0 {
            break;
        }
        if other.len() > LONGEST {
            continue;
        }
        lower.clear();
        lower.push_str(other);
        lower.make_ascii_lowercase();
        let longer = lower.len().abs_diff(wanted.len());
        let distance =
            if lower.contains(&wanted) || lower.len() > 2 && wanted.contains(lower.as_str()) {
                Some(longer)
            } else {
                distance(wanted.as_bytes(), lower.as_bytes(), few, work)
            };
        near.extend(distance.map(|distance| (distance, other)));
    }
    near.sort_unstable();
    near.into_iter().take(NAMED).map(|(_, other)| other).collect()
}

/// The edit distance: how many characters must be inserted, removed, replaced, or swapped with the next one to turn one
/// text into the other. `None` if it is more than `most`.
fn distance(one: &[u8], other: &[u8], most: usize, work: &mut usize) -> Option<usize> {
    if one.len().abs_diff(other.len()) > most {
        return None;
    }
    let far = most + 1;
    let at = |row: &[usize], i: usize| row.get(i).copied().unwrap_or(far);
    // Only the middle of each row is computed: outside of it, more than `most` characters were inserted or removed.
    let mut above: (usize, Vec<usize>) = (0, Vec::new());
    let mut row: (usize, Vec<usize>) = (0, (0..=most.min(other.len())).collect());
    let cell = |(first, row): &(usize, Vec<usize>), i: usize| {
        i.checked_sub(*first).map_or(far, |i| at(row, i))
    };
    for (i, a) in one.iter().enumerate() {
        let before = i.checked_sub(1).and_then(|i| one.get(i));
        let first = (i + 1).saturating_sub(most);
        let last = (i + 1 + most).min(other.len());
        let mut next = (first, Vec::with_capacity(2 * most + 1));
        for j in first..=last {
            let mut least = cell(&row, j) + 1;
            match j.checked_sub(1) {
                None => least = i + 1,
                Some(left) => {
                    let b = other.get(left);
                    let differs = usize::from(b != Some(a));
                    least = least.min(cell(&row, left) + differs).min(cell(&next, left) + 1);
                    let swapped = left.checked_sub(1);
                    if let Some(swapped) = swapped.filter(|at| other.get(*at) == Some(a))
                        && before == b
                    {
                        least = least.min(cell(&above, swapped) + 1);
                    }
                }
            }
            next.1.push(least.min(far));
        }
        *work = work.saturating_sub(next.1.len());
        // A swap refers to the second-last row, and nothing to earlier ones.
        let least = next.1.iter().chain(&row.1).min().copied().unwrap_or(far);
        if least > most {
            return None;
        }
        above = std::mem::replace(&mut row, next);
    }
    Some(cell(&row, other.len())).filter(|distance| *distance <= most)
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

    #[test]
    fn a_thousand_names_are_compared_and_hostile_ones_cost_no_more_than_a_bound() {
        let left = |wanted: &str, names: &[String]| {
            let mut work = WORK;
            let near = nearest(wanted, names.iter().map(String::as_str), &mut work).len();
            (near, work)
        };
        let mut names: Vec<_> = (0..2000).map(|i| format!("team-{i:04}/backend")).collect();
        names.push("zookeeper".to_owned());
        let (near, work) = left("zokeeper", &names);
        assert!(near == 1 && work > WORK / 2, "{near} {work}");
        // All are as similar and as long as possible, so that each costs the most.
        let hostile: Vec<_> = (0..100_000).map(|i| format!("{i:06}{}", "x".repeat(122))).collect();
        let seen = std::cell::Cell::new(0);
        let counted = hostile.iter().map(String::as_str).inspect(|_| seen.set(seen.get() + 1));
        let mut work = WORK;
        nearest(&format!("{}yyyyyy", "x".repeat(122)), counted, &mut work);
        assert_eq!(work, 0);
        assert!(seen.get() < 10_000, "{}", seen.get());
        // Names that are too long to be compared cost nothing either.
        let long = vec!["x".repeat(LONGEST + 1); 100_000];
        assert_eq!(left("x", &long), (0, 0));
    }

    #[test]
    fn of_many_tags_the_first_are_given() {
        let many: Vec<_> = (0..100_000).map(|i| i.to_string()).collect();
        let text = no_such_tags(ENTRY, &Tags::new(["a"]), [many.as_slice()].into_iter());
        let carried = "it carries [0,1,2,3,4,5,6,7,8,9,...]";
        assert_eq!(text, format!("its one entry does not carry [a]; {carried}"));
    }

    /// The distance, computed by its definition.
    fn full(one: &[u8], other: &[u8]) -> usize {
        let ([.., a], [.., b]) = (one, other) else { return one.len().max(other.len()) };
        let (before_one, before_other) = (&one[..one.len() - 1], &other[..other.len() - 1]);
        let mut least = (full(before_one, before_other) + usize::from(a != b))
            .min(full(before_one, other) + 1)
            .min(full(one, before_other) + 1);
        if let ([one @ .., a, b], [other @ .., c, d]) = (one, other)
            && (a, b) == (d, c)
        {
            least = least.min(full(one, other) + 1);
        }
        least
    }

    proptest! {
        #[test]
        fn a_distance_is_one(one in "[a-c]{0,6}", other in "[a-c]{0,6}", most in 1..4usize) {
            let (one, other) = (one.as_bytes(), other.as_bytes());
            let expected = Some(full(one, other)).filter(|distance| *distance <= most);
            prop_assert_eq!(distance(one, other, most, &mut { WORK }), expected);
            prop_assert_eq!(distance(other, one, most, &mut { WORK }), expected);
        }
    }
}
