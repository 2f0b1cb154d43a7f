//! Lists: filtered, in a stable order, and in pages.

use serde::Deserialize;
use utoipa::IntoParams;

use super::{api::Page, refusal::Refusal};
use crate::word::Word;

/// Which entries of a list to return.
#[derive(Debug, Clone, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Wanted {
    /// The consumer's full name, or the start of its ID (at least 4 characters).
    pub consumer: Option<String>,
    /// The service's full name.
    pub service: Option<String>,
    /// The entry's state.
    pub state: Option<String>,
    /// A text in one of its names or addresses; case does not matter.
    pub q: Option<String>,
    /// Number of entries to skip. Default 0.
    pub offset: Option<usize>,
    /// Maximum number of entries to return, 1 to 1000. Default 100.
    pub limit: Option<usize>,
}

/// The fields of an entry that the filter compares, besides its state.
#[derive(Debug, Default)]
pub(super) struct Shows<'a> {
    pub consumer: Option<(&'a str, &'a str)>,
    pub service: Option<&'a str>,
    /// Computed only if there is a search text.
    pub texts: &'a [&'a str],
}

impl Wanted {
    const DEFAULT: usize = 100;
    pub(super) const MOST: usize = 1000;
    const SHORTEST_ID: usize = 4;

    /// The requested page of `all`; `view` is called only for entries of the page.
    pub(super) fn page<T, U>(
        &self,
        all: impl IntoIterator<Item = T>,
        fits: impl Fn(&T) -> bool,
        view: impl Fn(T) -> U,
    ) -> Page<U> {
        let limit = self.limit.unwrap_or(Self::DEFAULT).clamp(1, Self::MOST);
        let offset = self.offset.unwrap_or(0);
        let fitting: Vec<_> = all.into_iter().filter(fits).collect();
        let total = fitting.len();
        let items = fitting.into_iter().skip(offset).take(limit).map(view).collect();
        Page { total, offset, limit, items }
    }

    /// The requested state. A misspelt state is an error, not an empty list. `groups`: words for several states, which the
    /// list accepts too.
    pub(super) fn state<S: Word>(&self, list: &str, groups: &str) -> Result<Option<S>, Refusal> {
        let Some(text) = self.state.as_deref() else { return Ok(None) };
        let wrong = || {
            let states = S::expected();
            Refusal::bad(format!("state {text:?} of {list}: expected {groups}{states}"))
        };
        S::of(text).map(Some).ok_or_else(wrong)
    }

    /// Refuses the filter `consumer` for a list whose entries belong to no consumer.
    pub(super) fn of_nobody(&self, list: &str) -> Result<(), Refusal> {
        match self.consumer {
            None => Ok(()),
            Some(_) => Err(Refusal::bad(format!(
                "consumer: {list} do not belong to a consumer; expected service, state or q"
            ))),
        }
    }

    /// Whether an entry matches.
    pub(super) fn fits(&self, shows: &Shows<'_>) -> bool {
        let consumer = self.consumer.as_deref().is_none_or(|wanted| {
            shows.consumer.is_some_and(|(name, id)| is_consumer(wanted, name, id))
        });
        let service = self.service.as_deref().is_none_or(|wanted| shows.service == Some(wanted));
        consumer && service && self.q.as_deref().is_none_or(|q| contains(shows, q))
    }
}

/// Whether `wanted` names this consumer.
pub(super) fn is_consumer(wanted: &str, name: &str, id: &str) -> bool {
    name == wanted || (wanted.len() >= Wanted::SHORTEST_ID && id.starts_with(wanted))
}

fn contains(shows: &Shows<'_>, part: &str) -> bool {
    let part = part.to_lowercase();
    let has = |text: &str| text.to_lowercase().contains(&part);
    shows.consumer.is_some_and(|(name, id)| has(name) || id.starts_with(&part))
        || shows.service.is_some_and(has)
        || shows.texts.iter().any(|text| has(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(set: impl FnOnce(&mut Wanted)) -> Wanted {
        let mut wanted = Wanted::default();
        set(&mut wanted);
        wanted
    }

    const SHOWS: Shows<'_> = Shows {
        consumer: Some(("App-1", "0123456789ab")),
        service: Some("redis.master"),
        texts: &["172.17.0.2"],
    };

    #[test]
    fn every_filter_must_fit() {
        for fits in [
            wanted(|_| ()),
            wanted(|w| w.consumer = Some("App-1".into())),
            wanted(|w| w.consumer = Some("0123".into())),
            wanted(|w| w.service = Some("redis.master".into())),
            wanted(|w| w.q = Some("REDIS".into())),
            wanted(|w| w.q = Some("app-".into())),
            wanted(|w| w.q = Some("17.0".into())),
        ] {
            assert!(fits.fits(&SHOWS), "{fits:?}");
        }
        for fails in [
            wanted(|w| w.consumer = Some("App".into())),
            wanted(|w| w.consumer = Some("012".into())),
            wanted(|w| w.service = Some("redis".into())),
            wanted(|w| w.q = Some("nothing".into())),
            wanted(|w| {
                w.service = Some("redis.slave".into());
                w.q = Some("redis".into());
            }),
        ] {
            assert!(!fails.fits(&SHOWS), "{fails:?}");
        }
    }

    #[test]
    fn pages_together_are_the_whole_list() {
        let all: Vec<_> = (0..2_500).collect();
        let mut got = Vec::new();
        while got.len() < all.len() {
            let wanted = wanted(|w| (w.offset, w.limit) = (Some(got.len()), Some(700)));
            let page = wanted.page(&all, |_| true, |n| *n);
            assert_eq!(page.total, all.len());
            got.extend(page.items);
        }
        assert_eq!(got, all);
    }

    #[test]
    fn a_page_has_an_end_whatever_is_asked_for() {
        let page = |limit, offset| {
            let wanted = wanted(|w| (w.limit, w.offset) = (Some(limit), Some(offset)));
            wanted.page(0..5_000, |_| true, |n| n).items.len()
        };
        assert_eq!((page(0, 0), page(usize::MAX, 0), page(10, usize::MAX)), (1, 1_000, 0));
    }
}
