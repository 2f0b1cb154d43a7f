//! The variables and labels that make a container a service, as registrator reads them. Pure.

use std::{collections::HashMap, sync::Arc};

use crate::{docker::container::Container, model::Port, text::bare};

/// Prefix of the names of these variables and labels.
pub const PREFIX: &str = "SERVICE_";

/// The variables and labels with this prefix. The names are without the prefix, in lower case. Labels win.
#[derive(Debug)]
pub(super) struct Metadata(HashMap<String, String>);

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
        self.value(&format!("{port}_{key}"))
    }

    /// `SERVICE_<port>_<key>`, otherwise `SERVICE_<key>`. `None` if it is empty.
    pub(super) fn get(&self, port: Option<Port>, key: &str) -> Option<&str> {
        port.and_then(|port| self.own(port, key))
            .or_else(|| self.value(key))
            .filter(|value| !value.is_empty())
    }

    /// `SERVICE_TAGS`
    pub(super) fn tags(&self) -> Arc<[String]> {
        tags(self.get(None, "tags").unwrap_or_default())
    }

    /// `SERVICE_<port>_TAGS`
    pub(super) fn own_tags(&self, port: Port) -> Option<Arc<[String]>> {
        self.own(port, "tags").map(tags)
    }

    /// The ports with a `SERVICE_<port>_NAME`.
    pub(super) fn named_ports(&self) -> impl Iterator<Item = Port> {
        self.0.keys().filter_map(|key| key.strip_suffix("_name")?.parse().ok())
    }

    fn value(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }
}

/// The tags in a list. Commas separate tags. A comma after a backslash is part of the tag.
fn tags(list: &str) -> Arc<[String]> {
    let mut tags = vec![String::new()];
    let mut rest = list.chars().peekable();
    while let Some(c) = rest.next() {
        match (c, tags.last_mut()) {
            (',', _) => tags.push(String::new()),
            ('\\', Some(tag)) if rest.peek() == Some(&',') => tag.extend(rest.next()),
            (c, Some(tag)) => tag.push(c),
            (_, None) => {}
        }
    }
    tags.retain(|tag| !tag.is_empty());
    tags.into()
}
