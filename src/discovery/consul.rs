//! Consul: the instances of a service, by its health (developer.hashicorp.com/consul/api-docs/health).

use std::{path::PathBuf, sync::Arc};

use serde::Deserialize;
use serde_json::Value;
use url::Url;

use super::{Endpoints, Options, Query, Rejected, address};
use crate::{
    model::Tags,
    registry::{HttpAnswer, consul::ConsulClient},
    source::{Publisher, Resync, Source, SourceError},
};

/// A Consul agent or server.
#[derive(Debug, Clone)]
pub struct Consul {
    pub(super) client: Arc<ConsulClient>,
    pub(super) asked: Asked,
    healthy_only: bool,
}

/// The parameters of a `consul://` URI.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Asked {
    /// `dc=`: the datacentre, if a descriptor names none.
    pub(super) dc: Option<String>,
    /// `token-file=`
    pub(super) token_file: Option<PathBuf>,
    /// `near=`: passed on. Consul sorts its answer by it; connections are spread evenly all the same.
    pub(super) near: Option<String>,
    /// `tag=`: what every endpoint must carry, beside the descriptor's tags.
    pub(super) tags: Vec<String>,
}

impl Consul {
    /// The agent at `base`, whose scheme says whether TLS is used.
    pub(super) fn new(base: Url, asked: Asked, settings: &Options) -> Result<Self, String> {
        let token_file = asked.token_file.clone();
        let client = ConsulClient::new(base, token_file, &settings.consul)?;
        Ok(Self { client: Arc::new(client), asked, healthy_only: settings.healthy_only })
    }

    pub fn source(self, query: Query) -> ConsulSource {
        let tags = Tags::new(self.asked.tags.iter().map(String::as_str).chain(query.tags.iter()));
        ConsulSource { consul: self, query, tags }
    }
}

/// One service in Consul.
#[derive(Debug)]
pub struct ConsulSource {
    consul: Consul,
    query: Query,
    /// The URI's and the descriptor's.
    tags: Tags,
}

impl Source for ConsulSource {
    type Item = Endpoints;

    async fn session(
        &mut self,
        publish: &Publisher<Endpoints>,
        resync: &mut Resync,
    ) -> Result<(), SourceError> {
        let mut query = self.consul.client.clone().query(self.url());
        loop {
            tokio::select! {
                answer = query.next() => {
                    publish.publish(self.read(&answer?)?);
                }
                () = resync.due() => query.read_again(),
            }
        }
    }
}

impl ConsulSource {
    fn url(&self) -> Url {
        let mut url = self.consul.client.url(["health", "service", self.query.service.as_str()]);
        {
            let mut pairs = url.query_pairs_mut();
            if self.consul.healthy_only {
                pairs.append_pair("passing", "true");
            }
            if let Some(dc) = self.query.dc.as_deref().or(self.consul.asked.dc.as_deref()) {
                pairs.append_pair("dc", dc);
            }
            if let Some(near) = &self.consul.asked.near {
                pairs.append_pair("near", near);
            }
            for tag in self.tags.iter() {
                pairs.append_pair("tag", tag);
            }
        }
        if url.query() == Some("") {
            url.set_query(None);
        }
        url
    }

    fn read(&self, answer: &HttpAnswer) -> Result<Endpoints, SourceError> {
        let mut endpoints = endpoints(answer.json()?, &self.tags);
        // What a token may not read is left out without an error: that is no answer to what there is.
        let hidden = answer.headers.get("X-Consul-Results-Filtered-By-ACLs");
        if hidden.is_some_and(|value| value == "true") {
            if endpoints.list.is_empty() {
                return Err(answer.fault("the token may not read the service or its nodes"));
            }
            endpoints.rejected.push(Rejected {
                what: self.query.service.to_string(),
                reason: "the token may not read all instances".to_owned(),
            });
        }
        Ok(endpoints)
    }
}

/// The instances with `tags`, each entry judged by itself.
fn endpoints(entries: Vec<Value>, tags: &Tags) -> Endpoints {
    let mut list = Vec::new();
    let mut rejected = Vec::new();
    for entry in entries {
        match Entry::deserialize(&entry) {
            // Older servers heed one tag only.
            Ok(entry) if !tags.all_in(entry.service.tags.as_deref().unwrap_or_default()) => {}
            Ok(Entry { node, service: Service { id, address, port, .. } }) => {
                let address = Some(address).filter(|a| !a.is_empty()).unwrap_or(node.address);
                match address::endpoint(&address, &port.to_string()) {
                    Ok(endpoint) => list.push(endpoint),
                    Err(reason) => {
                        rejected.push(Rejected { what: format!("{id} on {}", node.node), reason });
                    }
                }
            }
            Err(e) => rejected.push(Rejected {
                what: entry
                    .pointer("/Service/ID")
                    .and_then(|id| id.as_str())
                    .unwrap_or("an entry")
                    .to_owned(),
                reason: e.to_string(),
            }),
        }
    }
    Endpoints::new(list, rejected)
}

/// What is read of an entry of the answer.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase", expecting = "an object with Node and Service")]
struct Entry {
    node: Node,
    service: Service,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase", expecting = "an object with Node and Address")]
struct Node {
    node: String,
    address: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase", expecting = "an object with ID and Port")]
struct Service {
    #[serde(rename = "ID")]
    id: String,
    /// Empty if it is the node's.
    #[serde(default)]
    address: String,
    port: i64,
    tags: Option<Vec<String>>,
}

/// Reads `input` as the body of an answer.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(input: &[u8]) {
    if let Ok(entries) = serde_json::from_slice(input) {
        endpoints(entries, &Tags::new(["prod"]));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn list(endpoints: &Endpoints) -> Vec<String> {
        endpoints.list.iter().map(ToString::to_string).collect()
    }

    /// Two instances as Consul 1.8.7 answers, without what is not read.
    fn two() -> Vec<Value> {
        vec![
            json!({
                "Node": { "Node": "fury", "Address": "127.0.0.1", "Datacenter": "dc1", "Meta": {} },
                "Service": {
                    "ID": "web-1", "Service": "web", "Tags": ["prod"], "Address": "10.0.0.1",
                    "Meta": null, "Port": 80, "Weights": { "Passing": 1, "Warning": 1 },
                },
                "Checks": [{ "CheckID": "serfHealth", "Status": "passing" }],
            }),
            json!({
                "Node": { "Node": "fury", "Address": "fd00::1" },
                "Service": { "ID": "web-2", "Tags": [], "Address": "", "Port": 81 },
            }),
        ]
    }

    #[test]
    fn an_instance_is_at_its_own_address_or_its_nodes() {
        let endpoints = endpoints(two(), &Tags::default());
        assert_eq!(list(&endpoints), ["10.0.0.1:80", "[fd00::1]:81"]);
        assert_eq!(endpoints.rejected, []);
    }

    #[test]
    fn a_server_that_heeds_no_tags_is_of_no_harm() {
        assert_eq!(list(&endpoints(two(), &Tags::new(["prod"]))), ["10.0.0.1:80"]);
    }

    #[test]
    fn each_wrong_entry_is_rejected_for_itself() {
        let mut entries = two();
        let with =
            |service: Value| json!({ "Node": { "Node": "n", "Address": "" }, "Service": service });
        entries.extend([
            with(json!({ "ID": "a", "Port": 80 })),
            with(json!({ "ID": "b", "Address": "10.0.0.9", "Port": -1 })),
            with(json!({ "ID": "c", "Address": "10.0.0.9", "Port": "80" })),
            json!({ "Node": null }),
            json!(7),
        ]);
        let endpoints = endpoints(entries, &Tags::default());
        assert_eq!(list(&endpoints), ["10.0.0.1:80", "[fd00::1]:81"]);
        let rejected: Vec<_> =
            endpoints.rejected.iter().map(|r| format!("{}: {}", r.what, r.reason)).collect();
        assert_eq!(
            rejected,
            [
                "a on n: address \"\": expected an IP address",
                "an entry: invalid type: integer `7`, expected an object with Node and Service",
                "an entry: invalid type: null, expected an object with Node and Address",
                "b on n: port \"-1\": expected 1 to 65535",
                "c: invalid type: string \"80\", expected i64",
            ]
        );
    }

    proptest! {
        #[test]
        fn no_entry_panics(address in "\\PC{0,20}", id in "\\PC{0,9}", port: i64, tag in "\\PC{0,9}") {
            let service = json!({ "ID": id, "Address": address, "Port": port, "Tags": [tag] });
            let entry = json!({ "Node": { "Node": id, "Address": address }, "Service": service });
            endpoints(vec![entry], &Tags::default());
        }
    }
}
