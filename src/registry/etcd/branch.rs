//! The name of a branch, and the keys that it means in each store.

use crate::source::SourceError;

/// A branch as it was written. Slashes at its end mean nothing, and none at its start means what one does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Branch(String);

impl Branch {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    fn trimmed(&self) -> &str {
        self.0.trim_matches('/')
    }

    /// This branch and those above it, from the lowest on, each with the one that contains it: `/a/b` in `/a`, `/a` in nothing.
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
        // They would climb out of the branch.
        if segments.iter().any(|&part| part == "." || part == "..") {
            return Err(SourceError::new(format_args!(
                "branch {:?}: expected no part to be . or ..",
                self.0
            )));
        }
        Ok(segments)
    }

    /// The ranges of the v3 store that together are the branch; at least one. There a key need not begin with a slash: a
    /// branch that was written without one is looked for in both forms.
    ///
    /// The key of the branch and the keys below it are two ranges: one range over both would contain keys of others, such
    /// as `/app1-x` of the branch `/app1`, and a role with the prefix `/app1/` could not read it.
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

/// Keys of the v3 store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct KeyRange {
    pub(super) start: String,
    /// The first key after the range; empty if `start` is the only key in it.
    pub(super) end: String,
}

impl KeyRange {
    fn key(key: &str) -> Self {
        Self { start: key.to_owned(), end: String::new() }
    }

    pub(super) fn below(root: &str) -> Self {
        // The character 0 follows the slash.
        Self { start: format!("{root}/"), end: format!("{root}0") }
    }

    /// Whether it contains every key below a root, not only the key of the root.
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
