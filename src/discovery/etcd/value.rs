//! Reads the values below a branch as endpoints. Pure. Shared by both stores.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::Value;

use crate::{
    discovery::{Endpoints, Rejected, Rejections, address, missing},
    model::{Endpoint, Tags},
    registry::etcd::Tree,
};

/// The endpoints with `tags`. Each value is checked independently.
///
/// An empty value is neither an endpoint nor an error if its key is a directory.
pub(super) fn endpoints(tree: &Tree, tags: &Tags) -> Endpoints {
    let mut list = Vec::new();
    let mut rejected = Rejections::default();
    let mut others = Vec::new();
    for (key, value) in tree.iter() {
        if value.is_empty() && tree.is_directory(key) {
            continue;
        }
        match parse(value) {
            Ok(instance) if tags.all_in(&instance.tags) => list.push(instance.endpoint),
            Ok(instance) => others.push(instance.tags),
            Err(reason) => {
                rejected.push(Rejected { what: key.escape_ascii().to_string(), reason });
            }
        }
    }
    let problem = match (list.is_empty(), others.is_empty()) {
        (false, _) => None,
        (true, false) => {
            Some(missing::no_such_tags(missing::ENTRY, tags, others.iter().map(Vec::as_slice)))
        }
        (true, true) => Some(
            missing::all_skipped(missing::ENTRY, &rejected).unwrap_or_else(|| NO_ENTRY.to_owned()),
        ),
    };
    let cut = || format!("the branch has more than {} keys, or too many bytes", Tree::MOST);
    let problem = problem.or_else(|| tree.is_cut().then(cut));
    Endpoints { problem: problem.map(Into::into), ..Endpoints::new(list, rejected) }
}

/// Whether a value is an endpoint.
pub(super) fn is_entry(value: &[u8]) -> bool {
    parse(value).is_ok()
}

/// The problem of a branch without any entry.
pub(super) const NO_ENTRY: &str = "there is no entry at or below this branch";

/// One registration.
#[derive(Debug, PartialEq, Eq)]
struct Registration {
    endpoint: Endpoint,
    tags: Vec<String>,
}

/// Reads a JSON document (the original's, or one of SkyDNS 2, which has `host` and `port`) or `address:port`. The error
/// never repeats a document: it may contain a container's whole environment.
fn parse(value: &[u8]) -> Result<Registration, String> {
    if value.len() > Tree::LONGEST {
        return Err(format!("longer than {} bytes: expected JSON or address:port", Tree::LONGEST));
    }
    let text = str::from_utf8(value).map_err(|_| "not UTF-8: expected JSON or address:port")?;
    let mut text = text.trim();
    // The address, or the document, may be encoded as a JSON string.
    let unquoted = serde_json::from_str::<String>(text);
    if let Ok(unquoted) = &unquoted {
        text = unquoted.trim();
    }
    if !text.starts_with('{') {
        let endpoint = address::host_and_port(text)?;
        return Ok(Registration { endpoint, tags: Vec::new() });
    }
    let document: Document =
        serde_json::from_str(text).map_err(|e| format!("not the expected JSON: {e}"))?;
    let address = match document.ipaddress.text("ipaddress")? {
        Some(address) => address,
        None => document.host.text("host")?.ok_or("neither \"ipaddress\" nor \"host\"")?,
    };
    let host_port = document.host_port.text("host_port")?;
    // 0 means that the port is not published.
    let published = host_port.clone().filter(|port| port != "0");
    let port = match published {
        Some(port) => port,
        None => {
            document.port.text("port")?.or(host_port).ok_or("neither \"host_port\" nor \"port\"")?
        }
    };
    let endpoint = address::endpoint(&address, &port)?;
    Ok(Registration { endpoint, tags: document.tags.list()? })
}

/// The document of a registration. Other fields are ignored.
#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    ipaddress: Field,
    /// In SkyDNS 2 the address, in the original the host's name.
    #[serde(default)]
    host: Field,
    #[serde(default)]
    host_port: Field,
    #[serde(default)]
    port: Field,
    #[serde(default)]
    tags: Field,
}

#[derive(Default, Deserialize)]
#[serde(transparent)]
struct Field(Value);

impl Field {
    /// The text of a string or number. `None` if it is absent, null or empty.
    fn text(&self, name: &str) -> Result<Option<Cow<'_, str>>, String> {
        match &self.0 {
            Value::Null => Ok(None),
            Value::String(text) if text.is_empty() => Ok(None),
            Value::String(text) => Ok(Some(text.into())),
            Value::Number(number) => Ok(Some(number.to_string().into())),
            _ => Err(format!("{name:?} is neither a string nor a number")),
        }
    }

    /// A list of strings and numbers. A single string is a comma-separated list.
    fn list(self) -> Result<Vec<String>, String> {
        match self.0 {
            Value::Null => Ok(Vec::new()),
            Value::String(text) => {
                Ok(text.split(',').filter(|tag| !tag.is_empty()).map(str::to_owned).collect())
            }
            Value::Array(tags) => {
                tags.into_iter()
                    .map(|tag| match tag {
                        Value::String(tag) => Ok(tag),
                        Value::Number(tag) => Ok(tag.to_string()),
                        _ => Err("\"tags\" has an element that is neither a string nor a number"
                            .to_owned()),
                    })
                    .collect()
            }
            _ => Err("\"tags\" is not a list".to_owned()),
        }
    }
}

/// Reads the lines of `input` as keys, each followed by its value.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(input: &[u8]) {
    let mut tree = Tree::default();
    let lines: Vec<_> = input.split(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
    for pair in lines.windows(2) {
        tree.set(pair[0].clone(), pair[1].clone());
        let found = endpoints(&tree, &Tags::default());
        let said = found.list.len() + found.rejected.count();
        assert!(said <= tree.iter().count(), "more was said than was written");
    }
    if let Some(first) = lines.first() {
        tree.remove_all(first);
        assert!(!tree.remove_all(first));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The document of the project's first description, shortened.
    const DOCUMENT: &str = r#"{
        "id": "13532987eae2831eb7d41f38172cb82db668b3c72d10f513551026b2525e634f",
        "host": "fury",
        "ipaddress": "192.168.13.90",
        "env": { "ENVIRONMENT": "prod", "NAME": "apache" },
        "tags": [],
        "name": "/trusting_shockley",
        "host_port": "49161",
        "proto": "tcp",
        "port": "80",
        "path": "/services/prod/apache/80/49161/13532987eae2"
    }"#;

    fn read(value: &str) -> Result<(String, Vec<String>), String> {
        parse(value.as_bytes()).map(|instance| (instance.endpoint.to_string(), instance.tags))
    }

    #[test]
    fn both_forms_are_read() {
        for (value, endpoint, tags) in [
            (DOCUMENT, "192.168.13.90:49161", &[][..]),
            ("10.0.0.1:80", "10.0.0.1:80", &[]),
            ("10.0.0.1:80\n", "10.0.0.1:80", &[]),
            ("[fd00::1]:80", "[fd00::1]:80", &[]),
            (r#"{"ipaddress":"fd00::1","port":80}"#, "[fd00::1]:80", &[]),
            (r#"{"ipaddress":"10.0.0.1","host_port":8080,"port":80}"#, "10.0.0.1:8080", &[]),
            (r#"{"ipaddress":"10.0.0.1","host_port":null,"port":80}"#, "10.0.0.1:80", &[]),
            (r#"{"ipaddress":"10.0.0.1","host_port":"","port":"80"}"#, "10.0.0.1:80", &[]),
            (r#"{"ipaddress":"10.0.0.1","port":80,"tags":null}"#, "10.0.0.1:80", &[]),
            (r#"{"ipaddress":"10.0.0.1","port":80,"tags":["a",7]}"#, "10.0.0.1:80", &["a", "7"]),
            (r#"{"ipaddress":"10.0.0.1","port":80,"tags":"a,b"}"#, "10.0.0.1:80", &["a", "b"]),
            (r#"{"host":"10.0.1.5","port":27439}"#, "10.0.1.5:27439", &[]),
            (r#"{"host":"fury","ipaddress":"10.0.0.1","port":80}"#, "10.0.0.1:80", &[]),
            (r#"{"host":"10.0.0.2","ipaddress":"","port":80}"#, "10.0.0.2:80", &[]),
            (r#"{"ipaddress":"10.0.0.1","host_port":"0","port":"80"}"#, "10.0.0.1:80", &[]),
            (r#"{"ipaddress":"10.0.0.1","host_port":0,"port":80}"#, "10.0.0.1:80", &[]),
            (r#""10.0.1.5:27439""#, "10.0.1.5:27439", &[]),
            (r#""[fd00::1]:80""#, "[fd00::1]:80", &[]),
            (r#""{\"host\":\"10.0.1.5\",\"port\":80,\"tags\":[\"a\"]}""#, "10.0.1.5:80", &["a"]),
        ] {
            let tags = tags.iter().map(|&tag| tag.to_owned()).collect();
            assert_eq!(read(value), Ok((endpoint.to_owned(), tags)), "{value}");
        }
    }

    #[test]
    fn each_wrong_value_has_its_reason_and_no_document_is_repeated() {
        for (value, reason) in [
            ("", "\"\": expected address:port, IPv6 in brackets"),
            ("up", "\"up\": expected address:port, IPv6 in brackets"),
            ("db:5432", "address \"db\": expected an IP address"),
            ("{", "not the expected JSON: EOF while parsing an object at line 1 column 1"),
            ("{}", "neither \"ipaddress\" nor \"host\""),
            (r#"{"host":"fury","port":80}"#, "address \"fury\": expected an IP address"),
            (r#"{"ipaddress":"10.0.0.1","host_port":"0"}"#, "port \"0\": expected 1 to 65535"),
            (r#""up""#, "\"up\": expected address:port, IPv6 in brackets"),
            (r#""10.0.0.1:80"#, "address \"\\\"10.0.0.1\": expected an IP address"),
            (
                r#"{"ipaddress":"10.0.0.1","env":{"KEY":"s3cret"}}"#,
                "neither \"host_port\" nor \"port\"",
            ),
            (r#"{"ipaddress":["10.0.0.1"]}"#, "\"ipaddress\" is neither a string nor a number"),
            (r#"{"ipaddress":"fury","port":80}"#, "address \"fury\": expected an IP address"),
            (r#"{"ipaddress":"10.0.0.1","port":"http"}"#, "port \"http\": expected 1 to 65535"),
            (r#"{"ipaddress":"10.0.0.1","port":8.5}"#, "port \"8.5\": expected 1 to 65535"),
            (r#"{"ipaddress":"10.0.0.1","port":-1}"#, "port \"-1\": expected 1 to 65535"),
            (r#"{"ipaddress":"10.0.0.1","port":80,"tags":{}}"#, "\"tags\" is not a list"),
            (
                r#"{"ipaddress":"10.0.0.1","port":80,"tags":[null]}"#,
                "\"tags\" has an element that is neither a string nor a number",
            ),
        ] {
            assert_eq!(read(value), Err(reason.to_owned()), "{value}");
        }
        assert_eq!(
            parse(b"\xff").map(|_| ()),
            Err("not UTF-8: expected JSON or address:port".to_owned())
        );
    }

    fn tree(entries: &[(&str, &str)]) -> Tree {
        let mut tree = Tree::default();
        for (key, value) in entries {
            tree.set(key.as_bytes().to_vec(), value.as_bytes().to_vec());
        }
        tree
    }

    #[test]
    fn entries_without_the_tags_are_counted_where_none_has_them() {
        let tagged = r#"{"ipaddress":"10.0.0.1","port":80,"tags":["prod","app1"]}"#;
        let some = [("/s/a", "10.0.0.1:80"), ("/s/b", tagged), ("/s/c", "oops")];
        let problem = |entries: &[(&str, &str)], tags: &[&str]| {
            let endpoints = endpoints(&tree(entries), &Tags::new(tags.iter().copied()));
            endpoints.problem.as_deref().map(str::to_owned)
        };
        assert_eq!(
            problem(&some, &["canary", "eu"]).as_deref(),
            Some("0 of 2 entries carry [canary,eu]; they carry no tags, [prod,app1]")
        );
        assert_eq!(problem(&some, &[]), None);
        assert_eq!(problem(&some, &["app1", "prod"]), None);
        let skipped = problem(&some[2..], &[]).unwrap();
        assert!(skipped.starts_with("its one entry was skipped (/s/c: "), "{skipped}");
        let none = "there is no entry at or below this branch";
        assert_eq!(problem(&[("/s/", "")], &[]).as_deref(), Some(none));
    }

    #[test]
    fn a_wrong_value_stands_beside_the_good_ones() {
        let tree = tree(&[("/s/a", "10.0.0.2:80"), ("/s/b", "oops"), ("/s/c/d", "10.0.0.1:80")]);
        let endpoints = endpoints(&tree, &Tags::default());
        let list: Vec<_> = endpoints.list.iter().map(ToString::to_string).collect();
        assert_eq!(list, ["10.0.0.1:80", "10.0.0.2:80"]);
        let rejected: Vec<_> = endpoints.rejected.iter().map(|entry| &*entry.what).collect();
        assert_eq!(rejected, ["/s/b"]);
    }

    #[test]
    fn only_endpoints_with_all_tags_count() {
        let tree = tree(&[
            ("/s/a", r#"{"ipaddress":"10.0.0.1","port":80,"tags":["prod","app1"]}"#),
            ("/s/b", r#"{"ipaddress":"10.0.0.2","port":80,"tags":["prod"]}"#),
            ("/s/c", "10.0.0.3:80"),
        ]);
        let endpoints = endpoints(&tree, &Tags::new(["app1", "prod"]));
        assert_eq!(endpoints.list.len(), 1);
        assert_eq!(endpoints.rejected.count(), 0);
    }

    #[test]
    fn an_empty_value_that_marks_a_directory_is_passed_over() {
        let tree = tree(&[
            ("/s", ""),
            ("/s-x", "10.0.0.1:80"),
            ("/s/", ""),
            ("/s/a", ""),
            ("/s/a/b", "10.0.0.2:80"),
            ("/s/c", ""),
        ]);
        let rejected = endpoints(&tree, &Tags::default()).rejected;
        assert_eq!(rejected.iter().map(|r| r.what.as_str()).collect::<Vec<_>>(), ["/s/c"]);
    }

    proptest! {
        #[test]
        fn no_value_panics(value in prop::collection::vec(any::<u8>(), 0..60)) {
            let _ = parse(&value);
        }

        #[test]
        fn no_document_panics(
            address in "\\PC{0,20}", port in "\\PC{0,8}", tags in "\\PC{0,20}", shape in 0..4
        ) {
            let document = match shape {
                0 => serde_json::json!({ "ipaddress": address, "port": port, "tags": [tags] }),
                1 => serde_json::json!({ "ipaddress": address, "host_port": port, "tags": tags }),
                2 => serde_json::json!({ "ipaddress": { "a": address }, "port": [port] }),
                _ => serde_json::json!([address, port, tags]),
            };
            let _ = parse(document.to_string().as_bytes());
        }
    }
}
