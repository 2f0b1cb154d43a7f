//! Consul: blocking queries on a service's health (developer.hashicorp.com/consul/api-docs/health).
//!
//! Reads are of the default consistency, never `stale`: a server that lags may answer with an older index and an older
//! list, and what `stale` would buy, an answer without a leader, is what keeping the last answer gives us anyway.

use std::{
    fs,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use reqwest::{Client, header::HeaderValue};
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::warn;
use url::Url;

use super::{
    Endpoints, Query, Rejected, Secret, Settings, address,
    http::{self, ANSWER, Answer, Pace},
};
use crate::{
    model::Tags,
    source::{Publisher, Resync, Source, SourceError},
    tls::ClientTls,
};

/// How long the server may hold a query while nothing changes. It bounds how long a server that hangs goes unnoticed.
const WAIT: Duration = Duration::from_secs(30);

/// A Consul agent or server.
#[derive(Debug, Clone)]
pub struct Consul {
    pub(super) base: Url,
    tls: ClientTls,
    tls_verify: bool,
    token: Token,
    auth: Option<Secret>,
    pub(super) asked: Asked,
    healthy_only: bool,
    wait: Duration,
    seats: Arc<Seats>,
}

/// Who may keep a connection to the agent. By default it lets one address have 200 (`limits.http_max_conns_per_client`), all
/// of its other clients on this host included, and turns the next away.
#[derive(Debug)]
struct Seats {
    /// Queries that the server holds until something changes.
    held: Arc<Semaphore>,
    /// Of the queries beyond, which are asked again and again.
    polls: Semaphore,
    /// Whether it was told that there are such.
    told: AtomicBool,
}

impl Seats {
    const HELD: usize = 100;
    const POLLS: usize = 4;
    /// How often a query is asked that has no seat.
    const EVERY: Duration = Duration::from_secs(5);

    fn new() -> Self {
        Self {
            held: Arc::new(Semaphore::new(Self::HELD)),
            polls: Semaphore::new(Self::POLLS),
            told: AtomicBool::default(),
        }
    }

    /// A seat for a query that is held, if there is one left.
    fn take(&self) -> Option<OwnedSemaphorePermit> {
        let seat = self.held.clone().try_acquire_owned().ok();
        if seat.is_none() && !self.told.swap(true, Relaxed) {
            warn!(
                watched = Self::HELD,
                every_s = Self::EVERY.as_secs(),
                "more services than may keep a connection to Consul; the others are asked again and again"
            );
        }
        seat
    }
}

/// The parameters of a `consul://` URI.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Asked {
    /// `dc=`: the datacentre, where a descriptor names none.
    pub(super) dc: Option<String>,
    /// `token-file=`
    pub(super) token_file: Option<PathBuf>,
    /// `near=`: passed on. Consul sorts its answer by it; connections are spread evenly all the same.
    pub(super) near: Option<String>,
    /// `tag=`: what every endpoint must carry, beside the descriptor's tags.
    pub(super) tags: Vec<String>,
}

#[derive(Debug, Clone)]
enum Token {
    None,
    Text(Secret),
    File(PathBuf),
}

impl Consul {
    /// The agent at `base`, whose scheme says whether TLS is used.
    pub(super) fn new(base: Url, asked: Asked, settings: &Settings) -> Result<Self, String> {
        let consul = &settings.consul;
        let tls = ClientTls::new(
            consul.ca.clone(),
            consul.certificate.clone(),
            consul.key.clone(),
            ["CONSUL_CACERT", "CONSUL_CLIENT_CERT", "CONSUL_CLIENT_KEY"],
        )?;
        // A file wins over a token, as in Consul's own tools.
        let token = match (asked.token_file.as_ref().or(consul.token_file.as_ref()), &consul.token)
        {
            (Some(file), _) => Token::File(file.clone()),
            (None, Some(token)) => Token::Text(token.clone()),
            (None, None) => Token::None,
        };
        Ok(Self {
            base,
            tls,
            tls_verify: consul.tls_verify,
            token,
            auth: consul.auth.clone(),
            asked,
            healthy_only: settings.healthy_only,
            wait: WAIT,
            seats: Arc::new(Seats::new()),
        })
    }

    pub fn source(self, query: Query) -> ConsulSource {
        let tags = Tags::new(self.asked.tags.iter().map(String::as_str).chain(query.tags.iter()));
        ConsulSource { consul: self, query, tags }
    }

    /// One that keeps its connection, or one that does not.
    fn client(&self, keeps: bool) -> Result<Client, SourceError> {
        let tls = (self.base.scheme() == "https").then_some(&self.tls);
        let builder = http::builder(tls)?.tls_danger_accept_invalid_certs(!self.tls_verify);
        http::build(if keeps { builder } else { builder.pool_max_idle_per_host(0) })
    }

    /// The token as it is now: a file is read anew, as agents renew it.
    fn token(&self) -> Result<Option<HeaderValue>, SourceError> {
        let (text, from) = match &self.token {
            Token::None => return Ok(None),
            Token::Text(token) => (token.reveal().to_owned(), "CONSUL_HTTP_TOKEN".to_owned()),
            Token::File(path) => {
                let from = format!("token file {}", path.display());
                (fs::read_to_string(path).map_err(|e| SourceError::caused(&from, &e))?, from)
            }
        };
        let text = text.trim();
        let wrong = |what| SourceError::new(format_args!("{from} {what}"));
        if text.is_empty() {
            return Err(wrong("is empty"));
        }
        let mut header = HeaderValue::from_str(text)
            .map_err(|_| wrong("holds a character that no token has"))?;
        header.set_sensitive(true);
        Ok(Some(header))
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
        tokio::select! {
            end = self.session_until_failure(publish) => end,
            () = resync.due() => Ok(()),
        }
    }
}

impl ConsulSource {
    async fn session_until_failure(
        &mut self,
        publish: &Publisher<Endpoints>,
    ) -> Result<(), SourceError> {
        let seat = self.consul.seats.take();
        let client = self.consul.client(seat.is_some())?;
        let token = self.consul.token()?;
        if seat.is_none() {
            return self.poll(&client, token.as_ref(), publish).await;
        }
        let mut index = 0;
        let mut pace = Pace::new();
        let mut distance = Pace::NEWS;
        loop {
            pace.keep(distance).await;
            let answer = self.ask(&client, token.as_ref(), index).await?;
            let (endpoints, next) = self.read(&answer)?;
            distance = if publish.publish(endpoints) { Pace::NEWS } else { Pace::IDLE };
            index = next_index(index, next);
        }
    }
}

impl ConsulSource {
    /// Asks for what there is, again and again, until there is a seat: then the next session takes it.
    async fn poll(
        &self,
        client: &Client,
        token: Option<&HeaderValue>,
        publish: &Publisher<Endpoints>,
    ) -> Result<(), SourceError> {
        let Seats { held, polls, .. } = &*self.consul.seats;
        loop {
            let turn = polls.acquire().await;
            let answer = self.ask(client, token, 0).await?;
            drop(turn);
            publish.publish(self.read(&answer)?.0);
            // Those that began together do not go on so.
            tokio::time::sleep(Seats::EVERY.mul_f64(0.8 + 0.4 * fastrand::f64())).await;
            if held.available_permits() > 0 {
                return Ok(());
            }
        }
    }

    /// Asks for what there is; with an `index`, once it is past that or the wait is over.
    async fn ask(
        &self,
        client: &Client,
        token: Option<&HeaderValue>,
        index: u64,
    ) -> Result<Answer, SourceError> {
        let wait = self.consul.wait;
        let url = self.url(index);
        let mut request = client.get(url.clone());
        if let Some(token) = token {
            request = request.header("X-Consul-Token", token.clone());
        }
        if let Some(auth) = &self.consul.auth {
            let (user, password) = match auth.reveal().split_once(':') {
                Some((user, password)) => (user, Some(password)),
                None => (auth.reveal(), None),
            };
            request = request.basic_auth(user, password);
        }
        // The server adds up to a sixteenth of the wait, lest many clients come back at once.
        let held = if index > 0 { wait + wait / 16 } else { Duration::ZERO };
        http::get(&url, request, held + ANSWER).await
    }

    fn url(&self, index: u64) -> Url {
        let mut url = self.consul.base.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(["v1", "health", "service", self.query.service.as_str()]);
        }
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
            if index > 0 {
                pairs.append_pair("index", &index.to_string());
                pairs.append_pair("wait", &format!("{}ms", self.consul.wait.as_millis()));
            }
        }
        if url.query() == Some("") {
            url.set_query(None);
        }
        url
    }

    fn read(&self, answer: &Answer) -> Result<(Endpoints, u64), SourceError> {
        if answer.status != 200 {
            return Err(answer.refusal());
        }
        let index = answer
            .number("X-Consul-Index")
            .ok_or_else(|| answer.fault("the answer has no X-Consul-Index: is this Consul?"))?;
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
        Ok((endpoints, index))
    }
}

/// The index to wait on after `last` was asked for and `next` came back: from 1, and from the start where it went
/// backwards, as a restored server's does.
fn next_index(last: u64, next: u64) -> u64 {
    if next < last { 0 } else { next.max(1) }
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
                what: entry["Service"]["ID"].as_str().unwrap_or("an entry").to_owned(),
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
    /// Empty where it is the node's.
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

    #[test]
    fn an_index_is_waited_on_from_one_and_never_backwards() {
        assert_eq!(next_index(0, 0), 1);
        assert_eq!(next_index(0, 7), 7);
        assert_eq!(next_index(7, 7), 7);
        assert_eq!(next_index(7, 8), 8);
        assert_eq!(next_index(7, 6), 0);
        assert_eq!(next_index(1, 0), 0);
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
