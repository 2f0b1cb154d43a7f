//! The content of a file of services. Pure.

use std::{collections::BTreeSet, str::FromStr};

use toml::{Table, Value};

use crate::{
    discovery::{Endpoints, Query, Rejected, Rejections, address, missing},
    model::{Endpoint, ServiceName},
};

/// A file's services, and its invalid entries.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Catalogue {
    entries: Vec<Entry>,
    /// All services, including those without endpoints.
    names: BTreeSet<String>,
    /// Invalid entries, each with its service if known.
    wrong: Vec<(Option<String>, Rejected)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    service: String,
    tags: Vec<String>,
    endpoint: Endpoint,
}

impl FromStr for Catalogue {
    /// The line, and what is wrong in it.
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut file: Table = text.parse().map_err(|error| one_line(text, &error))?;
        let services = match file.remove("service") {
            Some(Value::Array(services)) => services,
            Some(other) => return Err(expected("service", &other, "[[service]] entries")),
            None => return Err("it has no entries: expected [[service]]".to_owned()),
        };
        let mut catalogue = Self::default();
        for key in file.keys() {
            catalogue.reject(None, "file", format!("unknown key {key:?}: expected service"));
        }
        for (i, service) in services.into_iter().enumerate() {
            catalogue.add_service(i + 1, service);
        }
        Ok(catalogue)
    }
}

impl Catalogue {
    /// The complete answer to `query`.
    pub(super) fn select(&self, query: &Query) -> Endpoints {
        let service = query.service.as_str();
        let named = || self.entries.iter().filter(|entry| entry.service == service);
        let found: Vec<_> = named()
            .filter(|entry| query.tags.all_in(&entry.tags))
            .map(|entry| entry.endpoint)
            .collect();
        let wrong =
            self.wrong.iter().filter(|(of, _)| of.as_deref().is_none_or(|of| of == service));
        let wrong = Rejections::of(wrong.map(|(_, rejected)| rejected.clone()));
        let problem = found.is_empty().then(|| match named().next() {
            Some(_) => {
                let carried = named().map(|entry| entry.tags.as_slice());
                missing::no_such_tags(missing::ENDPOINT, &query.tags, carried)
            }
            None if self.names.contains(service) => {
                let own = self.wrong.iter().filter(|(of, _)| of.as_deref() == Some(service));
                let own = Rejections::of(own.map(|(_, rejected)| rejected.clone()));
                missing::all_skipped(missing::ENTRY, &own)
                    .unwrap_or_else(|| "the file lists no endpoint for it".to_owned())
            }
            None => {
                let fact = "the file has no service of this name";
                missing::no_such_service(fact, service, self.names.iter())
            }
        });
        Endpoints { problem: problem.map(Into::into), ..Endpoints::new(found, wrong) }
    }

    fn add_service(&mut self, number: usize, value: Value) {
        let what = format!("service {number}");
        let Value::Table(mut table) = value else {
            return self.reject(None, &what, expected("service", &value, "a table"));
        };
        let name = match table.remove("name") {
            Some(Value::String(name)) if ServiceName::new(&name).is_some() => name,
            Some(other) => {
                let wanted = "a name of A-Z a-z 0-9 / . _ * @ -";
                return self.reject(None, &what, expected("name", &other, wanted));
            }
            None => return self.reject(None, &what, "no name: expected name = \"...\"".to_owned()),
        };
        self.names.insert(name.clone());
        let what = format!("service {number} ({name})");
        let tags = self.tags(&name, &what, &mut table);
        let endpoints = match table.remove("endpoints") {
            Some(Value::Array(endpoints)) => endpoints,
            Some(other) => {
                let wanted = "a list such as [\"10.0.0.1:80\"]";
                self.reject(Some(&name), &what, expected("endpoints", &other, wanted));
                vec![]
            }
            None => {
                let reason = "no endpoints: expected endpoints = [\"10.0.0.1:80\"]";
                self.reject(Some(&name), &what, reason.to_owned());
                vec![]
            }
        };
        self.reject_rest(&name, &what, &table, "name, tags or endpoints");
        for (i, value) in endpoints.into_iter().enumerate() {
            let what = format!("{what}, endpoint {}", i + 1);
            self.add_endpoint(&name, &what, &tags, value);
        }
    }

    fn add_endpoint(&mut self, service: &str, what: &str, tags: &[String], value: Value) {
        let wanted = "\"address:port\" or { address = \"address:port\", tags = [...] }";
        let (text, own_tags) = match value {
            Value::String(text) => (text, vec![]),
            Value::Table(mut table) => {
                let own_tags = self.tags(service, what, &mut table);
                let address = table.remove("address");
                self.reject_rest(service, what, &table, "address or tags");
                match address {
                    Some(Value::String(text)) => (text, own_tags),
                    Some(other) => {
                        let reason = expected("address", &other, "\"address:port\"");
                        return self.reject(Some(service), what, reason);
                    }
                    None => {
                        let reason = format!("no address: expected {wanted}");
                        return self.reject(Some(service), what, reason);
                    }
                }
            }
            other => {
                return self.reject(Some(service), what, expected("endpoint", &other, wanted));
            }
        };
        match address::host_and_port(&text) {
            Ok(endpoint) => self.entries.push(Entry {
                service: service.to_owned(),
                tags: [tags, &own_tags].concat(),
                endpoint,
            }),
            Err(reason) => self.reject(Some(service), what, reason),
        }
    }

    /// Removes `tags` from a table, and returns them.
    fn tags(&mut self, service: &str, what: &str, table: &mut Table) -> Vec<String> {
        let list = match table.remove("tags") {
            None => return vec![],
            Some(Value::Array(list)) => list,
            Some(other) => {
                let reason = expected("tags", &other, "a list such as [\"prod\"]");
                self.reject(Some(service), what, reason);
                return vec![];
            }
        };
        let mut tags = Vec::new();
        for value in list {
            match value {
                Value::String(tag) => tags.push(tag),
                other => self.reject(Some(service), what, expected("tag", &other, "text")),
            }
        }
        tags
    }

    fn reject_rest(&mut self, service: &str, what: &str, rest: &Table, wanted: &str) {
        for key in rest.keys() {
            let reason = format!("unknown key {:?}: expected {wanted}", address::excerpt(key));
            self.reject(Some(service), what, reason);
        }
    }

    fn reject(&mut self, service: Option<&str>, what: &str, reason: String) {
        let rejected = Rejected { what: what.to_owned(), reason };
        self.wrong.push((service.map(str::to_owned), rejected));
    }
}

fn expected(key: &str, value: &Value, wanted: &str) -> String {
    format!("{key} = {}: expected {wanted}", address::excerpt(&value.to_string()))
}

/// The parser's message, which has many lines, on one line.
fn one_line(text: &str, error: &toml::de::Error) -> String {
    let reason = error.message().replace('\n', " ");
    match error.span().and_then(|span| text.get(..span.start)) {
        Some(before) => format!("line {}: {reason}", before.matches('\n').count() + 1),
        None => reason,
    }
}

/// Reads `input` as a file.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(input: &[u8]) {
    let Ok(catalogue) = str::from_utf8(input).unwrap_or_default().parse::<Catalogue>() else {
        return;
    };
    for service in catalogue.entries.iter().filter_map(|entry| ServiceName::new(&entry.service)) {
        let (via, tags) = ("file".into(), Default::default());
        let found = catalogue.select(&Query { via, service, tags, dc: None, port: None });
        assert!(!found.list.is_empty(), "what is listed is found");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::Tags;

    fn answer(text: &str, query: &str) -> (Vec<String>, Vec<String>) {
        let descriptor: crate::descriptor::Descriptor = format!("{query};1").parse().unwrap();
        let query = Query {
            via: "file".into(),
            service: descriptor.service,
            tags: descriptor.tags,
            dc: None,
            port: None,
        };
        let answer = text.parse::<Catalogue>().unwrap().select(&query);
        let rejected = answer.rejected.iter().map(|r| format!("{}: {}", r.what, r.reason));
        (answer.list.iter().map(ToString::to_string).collect(), rejected.collect())
    }

    const GOOD: &str = r#"
        [[service]]
        name = "redis.master"
        endpoints = ["10.0.0.1:6379"]

        [[service]]
        name = "web"
        tags = ["prod"]
        endpoints = [
            "10.0.0.2:80",
            { address = "[fd00::3]:80", tags = ["canary"] },
        ]

        [[service]]
        name = "web"
        endpoints = ["10.0.0.4:80", "10.0.0.2:80"]
    "#;

    #[test]
    fn services_by_name_and_tags() {
        for (query, endpoints) in [
            ("redis.master", vec!["10.0.0.1:6379"]),
            ("web", vec!["10.0.0.2:80", "10.0.0.4:80", "[fd00::3]:80"]),
            ("web[prod]", vec!["10.0.0.2:80", "[fd00::3]:80"]),
            ("web[prod,canary]", vec!["[fd00::3]:80"]),
            ("web[test]", vec![]),
            ("other", vec![]),
        ] {
            let (found, rejected) = answer(GOOD, query);
            assert_eq!(found, endpoints, "{query}");
            assert_eq!(rejected, [""; 0], "{query}");
        }
        assert_eq!(answer("service = []", "web"), (vec![], vec![]));
    }

    #[test]
    fn a_query_without_endpoints_says_why() {
        let file = format!(
            "{GOOD}[[service]]\nname = \"none\"\nendpoints = []\n[[service]]\nname = \"bad\"\nendpoints = [\"h:80\"]\n"
        );
        let problem = |service: &str, tags: &[&str]| {
            let query = Query {
                via: "file".into(),
                service: ServiceName::new(service).unwrap(),
                tags: Tags::new(tags.iter().copied()),
                dc: None,
                port: None,
            };
            let answer = file.parse::<Catalogue>().unwrap().select(&query);
            answer.problem.as_deref().unwrap_or_default().to_owned()
        };
        for (service, tags, expected) in [
            ("web", &[][..], ""),
            ("web", &["prod"], ""),
            (
                "web",
                &["test"],
                "0 of 4 endpoints carry [test]; they carry [prod], [prod,canary], no tags",
            ),
            ("redis-master", &[], "the file has no service of this name; near: redis.master"),
            ("zzzzzz", &[], "the file has no service of this name"),
            ("none", &[], "the file lists no endpoint for it"),
            (
                "bad",
                &[],
                "its one entry was skipped (service 5 (bad), endpoint 1: address \"h\": expected an IP address)",
            ),
        ] {
            assert_eq!(problem(service, tags), expected, "{service} {tags:?}");
        }
    }

    #[test]
    fn what_is_wrong_stands_beside_what_is_right() {
        let good = "name = \"web\"\nendpoints = [\"10.0.0.1:80\"]\n";
        for (text, reason) in [
            (
                format!("extra = 1\n[[service]]\n{good}"),
                "file: unknown key \"extra\": expected service",
            ),
            (
                format!("[[service]]\n{good}port = 80\n"),
                "service 1 (web): unknown key \"port\": expected name, tags or endpoints",
            ),
            (
                format!("[[service]]\n{good}tags = \"prod\"\n"),
                "service 1 (web): tags = \"prod\": expected a list such as [\"prod\"]",
            ),
            (format!("[[service]]\n{good}tags = [1]\n"), "service 1 (web): tag = 1: expected text"),
            (
                format!("[[service]]\n{good}[[service]]\nendpoints = []\n"),
                "service 2: no name: expected name = \"...\"",
            ),
            (
                format!("[[service]]\n{good}[[service]]\nname = \"a b\"\n"),
                "service 2: name = \"a b\": expected a name of A-Z a-z 0-9 / . _ * @ -",
            ),
            (
                format!("[[service]]\n{good}[[service]]\nname = \"web\"\n"),
                "service 2 (web): no endpoints: expected endpoints = [\"10.0.0.1:80\"]",
            ),
            (
                format!("[[service]]\n{good}[[service]]\nname = \"web\"\nendpoints = \"h:80\"\n"),
                "service 2 (web): endpoints = \"h:80\": expected a list such as [\"10.0.0.1:80\"]",
            ),
            (
                "service = [1, { name = \"web\", endpoints = [\"10.0.0.1:80\"] }]".to_owned(),
                "service 1: service = 1: expected a table",
            ),
        ] {
            let (found, rejected) = answer(&text, "web");
            assert_eq!(found, ["10.0.0.1:80"], "{text}");
            assert_eq!(rejected, [reason], "{text}");
        }
        for (endpoint, reason) in [
            ("\"h:80\"", "address \"h\": expected an IP address"),
            ("\"10.0.0.1\"", "\"10.0.0.1\": expected address:port, IPv6 in brackets"),
            (
                "80",
                "endpoint = 80: expected \"address:port\" or { address = \"address:port\", tags = [...] }",
            ),
            (
                "{ tags = [] }",
                "no address: expected \"address:port\" or { address = \"address:port\", tags = [...] }",
            ),
            ("{ address = 1 }", "address = 1: expected \"address:port\""),
        ] {
            let text =
                format!("[[service]]\nname = \"web\"\nendpoints = [\"10.0.0.1:80\", {endpoint}]");
            let (found, rejected) = answer(&text, "web");
            assert_eq!(found, ["10.0.0.1:80"], "{text}");
            assert_eq!(rejected, [format!("service 1 (web), endpoint 2: {reason}")], "{text}");
            assert_eq!(answer(&text, "other").1, [""; 0], "{text}");
        }
        let extra =
            "[[service]]\nname = \"web\"\nendpoints = [{ address = \"10.0.0.1:80\", w = 1 }]";
        assert_eq!(
            answer(extra, "web"),
            (
                vec!["10.0.0.1:80".to_owned()],
                vec![
                    "service 1 (web), endpoint 1: unknown key \"w\": expected address or tags"
                        .to_owned()
                ]
            )
        );
    }

    #[test]
    fn a_file_that_says_nothing_is_an_error() {
        for (text, reason) in [
            ("", "it has no entries: expected [[service]]"),
            ("# all gone\n", "it has no entries: expected [[service]]"),
            ("service = 1", "service = 1: expected [[service]] entries"),
        ] {
            assert_eq!(text.parse::<Catalogue>(), Err(reason.to_owned()));
        }
        let reason = "[[service]]\nname = \"web\nendpoints = []".parse::<Catalogue>().unwrap_err();
        assert!(reason.starts_with("line 2: ") && !reason.contains('\n'), "{reason}");
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "(\\PC|\n|\\[\\[service\\]\\]\n|name = |endpoints = |\"|\\[|\\]){0,40}") {
            let _ = text.parse::<Catalogue>();
        }
    }
}
