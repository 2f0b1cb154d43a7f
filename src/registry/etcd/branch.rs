//! The name of a branch, and its keys in each store.

use crate::source::SourceError;

/// A branch as the user wrote it. Slashes at its end have no meaning. Without a slash at its start,
/// it also means the branch with one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Branch(String);

impl Branch {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    fn trimmed(&self) -> &str {
        self.0.trim_matches('/')
    }

    /// This branch and those above it, the lowest first, each with its parent: `/a/b` in `/a`, `/a` in the empty text.
    pub(crate) fn levels(&self) -> Vec<(String, String)> {
        let whole = format!("/{}", self.trimmed());
        let ends = whole.match_indices('/').map(|(at, _)| at).filter(|at| *at > 0);
        let mut ends: Vec<_> = ends.chain([whole.len()]).collect();
        ends.reverse();
        let part = |end: usize| whole.get(..end).unwrap_or_default().to_owned();
        let containers = ends.iter().skip(1).copied().chain([0]);
        ends.iter().zip(containers).map(|(&end, container)| (part(end), part(container))).collect()
    }

    /// The parts of the key in the v2 store, where each key begins with a slash.
    pub(super) fn segments(&self) -> Result<Vec<&str>, SourceError> {
        let segments: Vec<_> = self.trimmed().split('/').filter(|part| !part.is_empty()).collect();
        // They would lead out of the branch.
        if segments.iter().any(|&part| part == "." || part == "..") {
            return Err(SourceError::new(format_args!(
                "branch {:?}: expected no part to be . or ..",
                self.0
            )));
        }
        Ok(segments)
    }

    /// The ranges of the v3 store that together are the branch. At least one. In this store a key need not begin with a
    /// slash: a branch written without one is looked for in both forms.
    ///
    /// The branch's own key and the keys below it are two ranges. A single range would contain foreign keys, such as
    /// `/app1-x` for the branch `/app1`, and a role for the prefix `/app1/` could not read it.
    pub(super) fn ranges(&self) -> Vec<KeyRange> {
        let trimmed = self.trimmed();
        if trimmed.is_empty() {
            return vec![KeyRange::below("")];
        }
        let forms = |root: &str| [KeyRange::key(root), KeyRange::below(root)];
        let mut ranges = forms(&format!("/{trimmed}")).to_vec();
        if !self.0.starts_with('/') {
            ranges.extend(forms(trimmed));
        }
        ranges
    }
}

/// A range of keys of the v3 store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct KeyRange {
    pub(super) start: String,
    /// The first key after the range. Empty if the range is only the key `start`.
    pub(super) end: String,
}

impl KeyRange {
    fn key(key: &str) -> Self {
        Self { start: key.to_owned(), end: String::new() }
    }

    pub(super) fn below(root: &str) -> Self {
        // The character 0 follows the slash in ASCII.
        Self { start: format!("{root}/"), end: format!("{root}0") }
    }

    /// Whether it contains all keys below a root, instead of only the root's key.
    pub(super) fn is_below(&self) -> bool {
        !self.end.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slashes_around_a_branch_mean_nothing() {
        let ranges = |text| {
            let ranges = Branch::new(text).ranges();
            ranges.into_iter().map(|range| (range.start, range.end)).collect::<Vec<_>>()
        };
        let expected = |expected: &[(&str, &str)]| {
            expected.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect::<Vec<_>>()
        };
        for text in ["/services/app1", "/services/app1/", "services/app1", "services/app1//"] {
            let branch = Branch::new(text);
            assert_eq!(branch.segments().unwrap(), ["services", "app1"], "{text}");
            let first = [("/services/app1", ""), ("/services/app1/", "/services/app10")];
            assert_eq!(ranges(text)[..2], expected(&first), "{text}");
        }
        assert_eq!(ranges("/a/"), expected(&[("/a", ""), ("/a/", "/a0")]));
        let both = [("/a", ""), ("/a/", "/a0"), ("a", ""), ("a/", "a0")];
        assert_eq!(ranges("a"), expected(&both));
        assert_eq!(ranges("/"), expected(&[("/", "0")]));
        assert_eq!(Branch::new("/").segments().unwrap(), [""; 0]);
    }

    #[test]
    fn a_branch_is_in_those_above_it() {
        let levels = |text: &str| Branch::new(text).levels();
        let expected = |all: &[(&str, &str)]| {
            all.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect::<Vec<_>>()
        };
        assert_eq!(levels("/a/b/c/"), expected(&[("/a/b/c", "/a/b"), ("/a/b", "/a"), ("/a", "")]));
        assert_eq!(levels("a"), expected(&[("/a", "")]));
        assert_eq!(levels("/"), expected(&[("/", "")]));
    }

    #[test]
    fn a_branch_cannot_climb() {
        for text in ["/services/../secret", "..", "/a/./b"] {
            assert!(Branch::new(text).segments().is_err(), "{text}");
        }
    }
}
