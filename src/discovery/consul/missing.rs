//! Why Consul has no instance of a service, by the names and tags of all services. Pure.

use std::{collections::BTreeMap, sync::Arc};

use crate::{discovery::address::excerpt, model::Tags};

/// The names of all services, each with the tags that any of its instances carries.
pub(super) type Services = BTreeMap<String, Vec<String>>;

/// Names, or tags, that are given.
const NAMED: usize = 3;
/// Longer names are not compared.
const LONGEST: usize = 128;

/// The reason in one sentence without its full stop; `None` if it cannot be told.
pub(super) fn problem(name: &str, tags: &Tags, services: &Services) -> Option<Arc<str>> {
    // Consul itself is a service: who sees none may not see any.
    if services.is_empty() {
        return None;
    }
    let Some(carried) = services.get(name) else {
        let near: Vec<_> = nearest(name, services.keys()).into_iter().map(excerpt).collect();
        let near =
            if near.is_empty() { near.join("") } else { format!("; near: {}", near.join(", ")) };
        return Some(
            format!("no service has this name, or the token may not read it{near}").into(),
        );
    };
    let wanted: Vec<_> = tags.iter().map(excerpt).collect();
    if wanted.is_empty() {
        return None;
    }
    let some: Vec<_> = carried.iter().take(NAMED).map(|tag| excerpt(tag)).collect();
    let more = if carried.len() > NAMED { ", ..." } else { "" };
    let some = if some.is_empty() { "none".to_owned() } else { some.join(", ") };
    Some(
        format!(
            "it is registered, and no instance carries [{}]; tags there: {some}{more}",
            wanted.join(",")
        )
        .into(),
    )
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

/// How many characters have to be put in, taken away or replaced to make one text the other.
fn distance(one: &str, other: &str) -> usize {
    let other: Vec<_> = other.chars().collect();
    let mut row: Vec<_> = (0..=other.len()).collect();
    for (i, a) in one.chars().enumerate() {
        let mut left = i + 1;
        let mut next = vec![left];
        for ((b, diagonal), above) in other.iter().zip(&row).zip(row.iter().skip(1)) {
            left = (diagonal + usize::from(a != *b)).min(above + 1).min(left + 1);
            next.push(left);
        }
        row = next;
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn services() -> Services {
        let tags = |tags: &[&str]| tags.iter().map(|&tag| tag.to_owned()).collect();
        [
            ("consul", tags(&[])),
            ("frontend_http", tags(&["prod", "eu"])),
            ("frontend_https", tags(&["a", "b", "c", "d"])),
            ("mysql", tags(&[])),
        ]
        .map(|(name, tags)| (name.to_owned(), tags))
        .into()
    }

    #[test]
    fn a_wrong_name_and_a_wrong_tag_are_told_apart() {
        let of = |name: &str, tags: &[&str]| {
            problem(name, &Tags::new(tags.iter().copied()), &services())
        };
        for (name, tags, expected) in [
            (
                "frontend-http",
                &[][..],
                "no service has this name, or the token may not read it; near: frontend_http, frontend_https",
            ),
            ("MySQL", &[], "no service has this name, or the token may not read it; near: mysql"),
            ("redis", &["x"], "no service has this name, or the token may not read it"),
            (
                "frontend_http",
                &["canary"],
                "it is registered, and no instance carries [canary]; tags there: prod, eu",
            ),
            (
                "frontend_https",
                &["x", "y"],
                "it is registered, and no instance carries [x,y]; tags there: a, b, c, ...",
            ),
            ("mysql", &["x"], "it is registered, and no instance carries [x]; tags there: none"),
        ] {
            assert_eq!(of(name, tags).as_deref(), Some(expected), "{name}");
        }
        // Its last instance went meanwhile; and a token that sees nothing.
        assert_eq!(of("mysql", &[]), None);
        assert_eq!(problem("mysql", &Tags::default(), &Services::new()), None);
    }

    proptest! {
        #[test]
        fn a_distance_is_one(one in "\\PC{0,12}", other in "\\PC{0,12}", at in 0..13usize) {
            prop_assert_eq!(distance(&one, &other), distance(&other, &one));
            prop_assert_eq!(distance(&one, &other) == 0, one == other);
            let mut longer: Vec<_> = one.chars().collect();
            longer.insert(at.min(longer.len()), 'x');
            prop_assert_eq!(distance(&one, &longer.into_iter().collect::<String>()), 1);
        }
    }
}
