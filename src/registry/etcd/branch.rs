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

    /// The keys, without a slash at the end, at and below which the v3 store is read; at least one. There a key need not
    /// begin with a slash: a branch that was written without one is looked for in both forms.
    pub(super) fn roots(&self) -> Vec<String> {
        let trimmed = self.trimmed();
        if trimmed.is_empty() {
            return vec![String::new()];
        }
        let absolute = format!("/{trimmed}");
        if self.0.starts_with('/') { vec![absolute] } else { vec![absolute, trimmed.to_owned()] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slashes_around_a_branch_mean_nothing() {
        for text in ["/services/app1", "/services/app1/", "services/app1", "services/app1//"] {
            let branch = Branch::new(text);
            assert_eq!(branch.segments().unwrap(), ["services", "app1"], "{text}");
            assert_eq!(branch.roots()[0], "/services/app1", "{text}");
        }
        assert_eq!(Branch::new("/a").roots(), ["/a"]);
        assert_eq!(Branch::new("a").roots(), ["/a", "a"]);
        assert_eq!(Branch::new("/").roots(), [""]);
        assert_eq!(Branch::new("/").segments().unwrap(), [""; 0]);
    }

    #[test]
    fn a_branch_cannot_climb() {
        for text in ["/services/../secret", "..", "/a/./b"] {
            assert!(Branch::new(text).segments().is_err(), "{text}");
        }
    }
}
