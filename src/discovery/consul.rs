//! Consul: the instances of a service, by its health (developer.hashicorp.com/consul/api-docs/health).

use std::{collections::BTreeSet, path::PathBuf, sync::Arc, time::Duration};

use serde::Deserialize;
use tokio::time::{Instant, timeout};
use url::Url;

use super::{
    Endpoints, Options, Query, Rejected, Rejections,
    address::{self, excerpt},
    missing,
};
use crate::{
    json::{self, Most},
    model::{Endpoint, Tags},
    registry::{
        HttpAnswer,
        consul::{ConsulClient, Services},
    },
    source::{Publisher, Resync, Source, SourceError},
};

/// A Consul agent or server.
#[derive(Debug, Clone)]
pub struct Consul {
    pub(super) client: Arc<ConsulClient>,
    pub(super) asked: ConsulParameters,
    healthy_only: bool,
}

/// The parameters of a `consul://` URI.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ConsulParameters {
    /// `dc=`: the datacentre, if a descriptor names none.
    pub(super) dc: Option<String>,
    /// `token-file=`
    pub(super) token_file: Option<PathBuf>,
    /// `near=`: passed on to Consul, which sorts its answer by it. Connections are spread evenly nevertheless.
    pub(super) near: Option<String>,
    /// `ns=`, otherwise `CONSUL_NAMESPACE`
    pub(super) namespace: Option<String>,
    /// `partition=`, otherwise `CONSUL_PARTITION`
    pub(super) partition: Option<String>,
    /// `tag=`: tags that every endpoint must have, besides the descriptor's tags.
    pub(super) tags: Vec<String>,
}

impl Consul {
    /// The agent at `base`. The scheme decides whether TLS is used.
    pub(super) fn new(
        base: Url,
        asked: ConsulParameters,
        settings: &Options,
    ) -> Result<Self, String> {
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
    /// The tags of the URI and of the descriptor.
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
                    let answer = answer?;
                    let (mut endpoints, took) = self.read(answer).await?;
                    query.took(took);
                    if endpoints.list.is_empty() && endpoints.problem.is_none() {
                        endpoints.problem = self.why_none().await;
                    }
                    publish.publish(endpoints);
                }
                () = resync.due() => query.read_again(),
            }
        }
    }
}

impl ConsulSource {
    /// How long an empty list waits for its reason.
    const REASON: Duration = Duration::from_secs(2);

    /// The URL of a path, with the parameters that say where the service is.
    fn at<'a>(&self, path: impl IntoIterator<Item = &'a str>) -> Url {
        let mut url = self.consul.client.url(path);
        let asked = &self.consul.asked;
        for (name, value) in [
            ("dc", self.query.dc.as_deref().or(asked.dc.as_deref())),
            ("ns", asked.namespace.as_deref()),
            ("partition", asked.partition.as_deref()),
        ] {
            if let Some(value) = value {
                url.query_pairs_mut().append_pair(name, value);
            }
        }
        url
    }

    /// Why there is no instance, if Consul shows it: a wrong name, or a wrong tag.
    async fn why_none(&self) -> Option<Arc<str>> {
        let asking = self.consul.client.services(self.at(["catalog", "services"]));
        let services = timeout(Self::REASON, asking).await.ok()?.ok()?;
        why_none(self.query.service.as_str(), &self.tags, &services).map(Into::into)
    }

    fn url(&self) -> Url {
        let mut url = self.at(["health", "service", self.query.service.as_str()]);
        {
            let mut pairs = url.query_pairs_mut();
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

    /// The endpoints, and the time it took to read them, without waiting for a thread.
    async fn read(&self, answer: HttpAnswer) -> Result<(Endpoints, Duration), SourceError> {
        // Consul silently leaves out what a token may not read. Such a list is incomplete, and not a valid answer.
        let hidden = answer.headers.get("X-Consul-Results-Filtered-By-ACLs");
        let is_hidden = hidden.is_some_and(|value| value == "true");
        let refused = answer.fault("the token may not read the service or its nodes");
        let (tags, healthy_only) = (self.tags.clone(), self.consul.healthy_only);
        let parse = move |body: &[u8]| {
            let start = Instant::now();
            endpoints(body, &tags, healthy_only).map(|endpoints| (endpoints, start.elapsed()))
        };
        let (mut endpoints, took) = answer.parsed(parse).await?;
        if is_hidden {
            if endpoints.list.is_empty() {
                return Err(refused);
            }
            endpoints.rejected.push(Rejected {
                what: self.query.service.to_string(),
                reason: "the token may not read all instances".to_owned(),
            });
        }
        Ok((endpoints, took))
    }
}

/// The instances with `tags`. Each entry is checked independently. With `healthy_only`: those that pass all their checks,
/// or if there are none, those with a warning, because an instance with a warning still works.
fn endpoints(body: &[u8], tags: &Tags, healthy_only: bool) -> Result<Endpoints, serde_json::Error> {
    let mut instances = Instances::default();
    json::each(body, |entry| {
        instances.add(entry.get(), tags, healthy_only);
        Ok(())
    })?;
    Ok(instances.endpoints())
}

#[derive(Default)]
struct Instances {
    passing: Vec<Endpoint>,
    warning: Vec<Endpoint>,
    critical: Vec<Endpoint>,
    rejected: Rejections,
    unhealthy: Unhealthy,
}

impl Instances {
    fn add(&mut self, entry: &str, tags: &Tags, healthy_only: bool) {
        match serde_json::from_str::<Entry>(entry) {
            // Older servers filter by one tag only.
            Ok(entry) if !tags.all_in(entry.service.tags.as_deref().unwrap_or_default()) => {}
            Ok(entry) => {
                let checks = entry.checks.as_deref().unwrap_or_default();
                let worst = checks.iter().max_by_key(|check| check.health());
                let health = worst.filter(|_| healthy_only).map_or(Health::Passing, Check::health);
                if let Some(check) = worst.filter(|_| health > Health::Passing) {
                    self.unhealthy.add(check);
                }
                let Entry { node, service: Service { id, address, port, .. }, .. } = entry;
                let address = Some(address).filter(|a| !a.is_empty()).unwrap_or(node.address);
                match address::endpoint(&address, &port.to_string()) {
                    Ok(endpoint) if health == Health::Critical => self.critical.push(endpoint),
                    // Critical instances are not used, so they are not reported as invalid.
                    Err(_) if health == Health::Critical => {}
                    Ok(endpoint) if health == Health::Warning => self.warning.push(endpoint),
                    Ok(endpoint) => self.passing.push(endpoint),
                    Err(reason) => {
                        let what = format!("{id} on {}", node.node);
                        self.rejected.push(Rejected { what, reason });
                    }
                }
            }
            Err(error) => {
                let named = serde_json::from_str::<Named>(entry).ok();
                let id = named.and_then(|named| named.service?.id);
                let what = id.unwrap_or_else(|| "an entry".to_owned());
                self.rejected.push(Rejected { what, reason: json::reason(&error) });
            }
        }
    }

    fn endpoints(self) -> Endpoints {
        let Self { passing: mut list, mut warning, critical, rejected, unhealthy } = self;
        let mut problem = None;
        if list.is_empty() && unhealthy.count == 0 {
            problem = missing::all_skipped(missing::ENTRY, &rejected).map(Into::into);
        }
        if list.is_empty() && unhealthy.count > 0 {
            problem = Some(unhealthy.problem(warning.len()));
            list = std::mem::take(&mut warning);
        }
        let endpoints = Endpoints::new(list, rejected);
        // Two instances may have the same address.
        let is_used = |one: &Endpoint| endpoints.list.binary_search(one).is_ok();
        let unfit = critical.into_iter().chain(warning).filter(|one| !is_used(one)).collect();
        Endpoints { problem, unfit, ..endpoints }
    }
}

/// The parts of an invalid entry that identify it.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Named {
    service: Option<NamedService>,
}

#[derive(Deserialize)]
struct NamedService {
    #[serde(rename = "ID")]
    id: Option<String>,
}

/// Why a service has no instance. `None` if these names and tags do not show it.
fn why_none(name: &str, tags: &Tags, services: &Services) -> Option<String> {
    // Consul itself is always listed as a service.
    if services.is_empty() {
        let fact = "Consul shows no service at all: the token may not read any (it needs service:read and node:read)";
        return Some(fact.to_owned());
    }
    let Some(carried) = services.get(name) else {
        let fact = "no service has this name, or the token may not read it";
        return Some(missing::no_such_service(fact, name, services.keys()));
    };
    if tags.is_empty() {
        return None;
    }
    // Maximum number of tags that are listed.
    const NAMED: usize = 3;
    let wanted: Vec<_> = tags.iter().map(excerpt).collect();
    let some: Vec<_> = carried.iter().take(NAMED).map(|tag| excerpt(tag)).collect();
    let more = if carried.len() > NAMED { ", ..." } else { "" };
    let some = if some.is_empty() { "none".to_owned() } else { some.join(", ") };
    Some(format!(
        "it is registered, and no instance carries [{}]; tags there: {some}{more}",
        wanted.join(",")
    ))
}

/// The health of an instance: the state of its worst check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Health {
    Passing,
    Warning,
    /// Also in maintenance, which is a critical check.
    Critical,
}

/// Instances that do not pass all their checks.
#[derive(Debug, Default)]
struct Unhealthy {
    count: usize,
    /// Names and states of their worst checks.
    checks: BTreeSet<String>,
}

impl Unhealthy {
    /// Maximum number of checks that are listed.
    const NAMED: usize = 3;

    fn add(&mut self, check: &Check) {
        self.count += 1;
        if self.checks.len() < Self::NAMED {
            let name = if check.name.is_empty() { &check.check_id } else { &check.name };
            self.checks.insert(format!("{:?} is {}", excerpt(name), excerpt(&check.status)));
        }
    }

    /// The problem if no instance passes, and `used` instances with a warning are used.
    fn problem(&self, used: usize) -> Arc<str> {
        let checks: Vec<_> = self.checks.iter().map(String::as_str).collect();
        let consequence =
            if used > 0 { format!("; {used} in warning used instead") } else { String::new() };
        format!(
            "0 of {} registered instances pass their checks ({}){consequence}",
            self.count,
            checks.join(", ")
        )
        .into()
    }
}

/// The parts of an entry that are read.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase", expecting = "an object with Node and Service")]
struct Entry {
    node: Node,
    service: Service,
    checks: Option<Most<Check, MOST>>,
}

/// Maximum number of checks or tags of an instance. An instance with more is skipped.
const MOST: usize = 1000;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase", expecting = "a check")]
struct Check {
    #[serde(rename = "CheckID", default)]
    check_id: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    status: String,
}

impl Check {
    fn health(&self) -> Health {
        match self.status.as_str() {
            "passing" => Health::Passing,
            "warning" => Health::Warning,
            _ => Health::Critical,
        }
    }
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
    /// Empty if it equals the node's address.
    #[serde(default)]
    address: String,
    port: i64,
    tags: Option<Most<String, MOST>>,
}

/// Reads `input` as the body of an answer.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(input: &[u8]) {
    let _ = endpoints(input, &Tags::new(["prod"]), true);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn endpoints(entries: Vec<Value>, tags: &Tags, healthy_only: bool) -> Endpoints {
        super::endpoints(&serde_json::to_vec(&entries).unwrap(), tags, healthy_only).unwrap()
    }

    fn list(endpoints: &Endpoints) -> Vec<String> {
        endpoints.list.iter().map(ToString::to_string).collect()
    }

    /// Two instances as Consul 1.8.7 answers, without fields that are not read.
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
        let endpoints = endpoints(two(), &Tags::default(), true);
        assert_eq!(list(&endpoints), ["10.0.0.1:80", "[fd00::1]:81"]);
        assert_eq!(endpoints.rejected.count(), 0);
    }

    #[test]
    fn a_server_that_heeds_no_tags_is_of_no_harm() {
        assert_eq!(list(&endpoints(two(), &Tags::new(["prod"]), true)), ["10.0.0.1:80"]);
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
        let endpoints = endpoints(entries, &Tags::default(), true);
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

    /// An instance at 10.0.0.`host` with checks in these states.
    fn checked(host: u8, statuses: &[&str]) -> Value {
        let check = |status: &&str| json!({ "CheckID": "c", "Name": format!("disk-{host}"), "Status": status });
        json!({
            "Node": { "Node": "n", "Address": "" },
            "Service": { "ID": "i", "Address": format!("10.0.0.{host}"), "Port": 80, "Tags": [] },
            "Checks": statuses.iter().map(check).collect::<Vec<_>>(),
        })
    }

    #[test]
    fn instances_in_warning_are_used_where_none_passes() {
        let of = |entries: &[Value], healthy_only| {
            let endpoints = endpoints(entries.to_vec(), &Tags::default(), healthy_only);
            (list(&endpoints), endpoints.problem.as_deref().map(str::to_owned))
        };
        let passing = checked(1, &["passing", "passing"]);
        let warning = checked(2, &["passing", "warning"]);
        let critical = checked(3, &["warning", "critical"]);
        let odd = checked(4, &["unheard-of"]);
        let texts = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();

        let all = [passing.clone(), warning.clone(), critical.clone(), odd.clone()];
        assert_eq!(of(&all, true), (texts(&["10.0.0.1:80"]), None));
        let unfit = |entries: &[Value], healthy_only| {
            let endpoints = endpoints(entries.to_vec(), &Tags::default(), healthy_only);
            endpoints.unfit.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(unfit(&all, true), ["10.0.0.2:80", "10.0.0.3:80", "10.0.0.4:80"]);
        assert_eq!(unfit(&all[1..], true), ["10.0.0.3:80", "10.0.0.4:80"]);
        assert_eq!(unfit(&all, false), [""; 0]);
        assert_eq!(unfit(&[passing.clone(), checked(1, &["critical"])], true), [""; 0]);
        assert_eq!(
            of(&all[1..], true),
            (
                texts(&["10.0.0.2:80"]),
                Some(
                    "0 of 3 registered instances pass their checks (\"disk-2\" is warning, \
                     \"disk-3\" is critical, \"disk-4\" is unheard-of); 1 in warning used instead"
                        .to_owned()
                )
            )
        );
        assert_eq!(
            of(&all[2..3], true),
            (
                vec![],
                Some(
                    "0 of 1 registered instances pass their checks (\"disk-3\" is critical)"
                        .to_owned()
                )
            )
        );
        assert_eq!(of(&[], true), (vec![], None));
        let every = ["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80", "10.0.0.4:80"];
        assert_eq!(of(&all, false), (texts(&every), None));
        // Entries that are not used are not reported.
        let nameless = json!({
            "Node": { "Node": "n", "Address": "db.example" },
            "Service": { "ID": "i", "Port": 80 }, "Checks": [{ "Status": "critical" }],
        });
        let unused = endpoints(vec![nameless], &Tags::default(), true);
        assert_eq!(unused.rejected.count(), 0);
    }

    /// Empty objects, an instance with very many tags, and a valid one.
    #[test]
    fn what_is_written_in_bulk_is_counted_and_not_kept() {
        let many = "{},".repeat(300_000);
        let tags = "\"\",".repeat(100_000);
        let good = two()[0].to_string();
        let greedy = format!(
            r#"{{"Node":{{"Node":"n","Address":"10.0.0.9"}},"Service":{{"ID":"g","Port":80,"Tags":[{tags}""]}}}}"#
        );
        let body = format!("[{many}{greedy},{good}]");
        let endpoints = super::endpoints(body.as_bytes(), &Tags::default(), true).unwrap();
        assert_eq!(list(&endpoints), ["10.0.0.1:80"]);
        assert_eq!(endpoints.rejected.count(), 300_001);
        assert_eq!(endpoints.rejected.iter().count(), Rejections::MOST);
        // An entry is identified by a text, which may be long.
        let long = format!(r#"[{{"Service":{{"ID":"{}"}}}}]"#, "x".repeat(1 << 20));
        let endpoints = super::endpoints(long.as_bytes(), &Tags::default(), true).unwrap();
        assert!(endpoints.rejected.iter().all(|entry| entry.what.len() < 1000));
    }

    #[test]
    fn a_wrong_name_and_a_wrong_tag_are_told_apart() {
        let tags = |tags: &[&str]| tags.iter().map(|&tag| tag.to_owned()).collect::<Vec<_>>();
        let services = [
            ("consul", tags(&[])),
            ("frontend_http", tags(&["prod", "eu"])),
            ("frontend_https", tags(&["a", "b", "c", "d"])),
            ("mysql", tags(&[])),
        ];
        let services: Services =
            services.into_iter().map(|(name, tags)| (name.to_owned(), tags)).collect();
        let of =
            |name: &str, tags: &[&str]| why_none(name, &Tags::new(tags.iter().copied()), &services);
        for (name, tags, expected) in [
            (
                "frontend-http",
                &[][..],
                "no service has this name, or the token may not read it; near: frontend_http, frontend_https",
            ),
            ("redis", &["x"], "no service has this name, or the token may not read it"),
            (
                "frontend_http",
                &["canary"],
                "it is registered, and no instance carries [canary]; tags there: prod, eu",
            ),
            (
                "frontend_https",
                &["y", "x"],
                "it is registered, and no instance carries [y,x]; tags there: a, b, c, ...",
            ),
            ("mysql", &["x"], "it is registered, and no instance carries [x]; tags there: none"),
        ] {
            assert_eq!(of(name, tags).as_deref(), Some(expected), "{name}");
        }
        // The last instance went away meanwhile. Then a token that may read nothing.
        assert_eq!(of("mysql", &[]), None);
        let nothing = why_none("mysql", &Tags::default(), &Services::new()).unwrap();
        assert!(nothing.contains("the token may not read any"), "{nothing}");
    }

    proptest! {
        #[test]
        fn no_entry_panics(address in "\\PC{0,20}", id in "\\PC{0,9}", port: i64, tag in "\\PC{0,9}") {
            let service = json!({ "ID": id, "Address": address, "Port": port, "Tags": [tag] });
            let entry = json!({ "Node": { "Node": id, "Address": address }, "Service": service });
            endpoints(vec![entry], &Tags::default(), true);
        }
    }
}
