//! The variables and labels that make a container a service, as registrator reads them. Pure.

use crate::{docker::container::Container, model::Port, text::bare};

/// How the names of those variables and labels begin.
pub const PREFIX: &str = "SERVICE_";

/// The variables and then the labels of these names, without the prefix, in lower case.
#[derive(Debug)]
pub(super) struct Metadata(Vec<(String, String)>);

impl Metadata {
    pub(super) fn of(container: &Container) -> Self {
        let variables = container.variables.iter().filter_map(|text| text.split_once('='));
        let labels = container.labels.iter().map(|(name, text)| (name.as_str(), text.as_str()));
        let named = variables.chain(labels).filter_map(|(name, text)| {
            Some((name.strip_prefix(PREFIX)?.to_ascii_lowercase(), bare(text).to_owned()))
        });
        Self(named.collect())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// `SERVICE_<port>_<key>`
    pub(super) fn own(&self, port: Port, key: &str) -> Option<&str> {
        self.last(&format!("{port}_{key}"))
    }

    /// `SERVICE_<port>_<key>`, else `SERVICE_<key>`; none if it is empty.
    pub(super) fn get(&self, port: Option<Port>, key: &str) -> Option<&str> {
        port.and_then(|port| self.own(port, key))
            .or_else(|| self.last(key))
            .filter(|value| !value.is_empty())
    }

    /// The tags on a port. Commas separate; one behind a backslash belongs to the tag.
    pub(super) fn tags(&self, port: Option<Port>) -> Vec<String> {
        let mut tags = vec![String::new()];
        let mut rest = self.get(port, "tags").unwrap_or_default().chars().peekable();
        while let Some(c) = rest.next() {
            match (c, tags.last_mut()) {
                (',', _) => tags.push(String::new()),
                ('\\', Some(tag)) if rest.peek() == Some(&',') => tag.extend(rest.next()),
                (c, Some(tag)) => tag.push(c),
                (_, None) => {}
            }
        }
        tags.retain(|tag| !tag.is_empty());
        tags
    }

    /// Those with a `SERVICE_<port>_NAME`.
    pub(super) fn named_ports(&self) -> impl Iterator<Item = Port> {
        self.0.iter().filter_map(|(key, _)| key.strip_suffix("_name")?.parse().ok())
    }

    /// Labels come after variables, and win.
    fn last(&self, key: &str) -> Option<&str> {
        let found = self.0.iter().rev().find(|(name, _)| name == key);
        found.map(|(_, value)| value.as_str())
    }
}
