//! The discoveries. Each query of a binding gets a watch, and each watch provides the current endpoints.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::SocketAddr,
    sync::Arc,
};

use futures_util::FutureExt;
use ipnet::IpNet;

use crate::{
    descriptor::Descriptor,
    docker::follow::Follower,
    model::{Endpoint, Port, ServiceName, Stay, Tags},
    source::{Publisher, ResyncRequests, follow},
    text::shortened,
    tls::Weakness,
};

mod address;
mod allowed;
pub mod consul;
pub mod dns;
pub mod docker;
pub mod etcd;
pub mod file;
pub(crate) mod missing;
mod options;

mod uri;
mod watches;

pub use crate::registry::{ConsulSettings, EtcdSettings, Secret};
pub use allowed::{Allowed, Bounds, NotAllowed};
pub use options::Options;
pub use uri::UriError;
pub use watches::Watches;

/// A discovery query. Equal queries share one watch, for all consumers.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Query {
    /// The discovery's name: the scheme of its URI.
    pub via: Arc<str>,
    pub service: ServiceName,
    pub tags: Tags,
    pub dc: Option<Arc<str>>,
    /// The descriptor's port, only if the discovery needs it: A and AAAA records in DNS contain no port.
    pub port: Option<Port>,
}

impl Query {
    /// A query that only tests whether a discovery answers.
    fn probe(via: &Arc<str>) -> Option<Self> {
        let (service, tags) = (ServiceName::new(PROBE)?, Tags::default());
        Some(Self { via: via.clone(), service, tags, dc: None, port: Port::new(1) })
    }

    /// Whether it only tests whether the discovery answers. That the service does not exist is then no problem.
    pub fn is_probe(&self) -> bool {
        self.service.as_str() == PROBE
    }
}

/// The service of [`Query::probe`]. No registry has it (RFC 6761, section 6.4).
const PROBE: &str = "embassy.invalid";

impl fmt::Display for Query {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_probe() {
            return f.write_str(&self.via);
        }
        write!(f, "{} {}{}", self.via, self.service, self.tags)?;
        if let Some(port) = self.port {
            write!(f, " port {port}")?;
        }
        match &self.dc {
            Some(dc) => write!(f, " in {dc}"),
            None => Ok(()),
        }
    }
}

/// A discovery's complete answer to a query.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Endpoints {
    /// Sorted, without duplicates. At most [`Endpoints::MOST`].
    pub list: Vec<Endpoint>,
    /// The number of further endpoints.
    pub left_out: usize,
    /// The entries that were skipped because they are invalid.
    pub rejected: Rejections,
    /// The runs of those endpoints that are containers of this host.
    pub stays: BTreeMap<Endpoint, Stay>,
    /// Instances in the source that must not be used as long as there is another: their check fails, or they are stopping.
    pub unfit: BTreeSet<Endpoint>,
    /// Why there are no endpoints, or no better ones, as one sentence without a full stop. `None` if nothing is wrong.
    pub problem: Option<Arc<str>>,
}

impl Endpoints {
    /// Maximum number of endpoints of one service. The first by address are used, so that the same answer gives the same
    /// ones.
    pub const MOST: usize = 10_000;

    pub fn new(list: impl IntoIterator<Item = Endpoint>, rejected: impl Into<Rejections>) -> Self {
        // A registry may return another order each time. That is not a change.
        let list: BTreeSet<_> = list.into_iter().collect();
        let left_out = list.len().saturating_sub(Self::MOST);
        let list = list.into_iter().take(Self::MOST).collect();
        Self { list, left_out, rejected: rejected.into(), ..Self::default() }
    }

    /// Without endpoints whose container is known to be gone: their addresses may belong to others by now.
    pub fn living(self: &Arc<Self>) -> Arc<Self> {
        if !self.stays.values().any(Stay::is_over) {
            return self.clone();
        }
        let mut living = Self::clone(self);
        living.stays.retain(|_, stay| !stay.is_over());
        living.list.retain(|one| !self.stays.contains_key(one) || living.stays.contains_key(one));
        Arc::new(living)
    }
}

/// Skipped entries: the first ones by their places, and the number of the others. A user with write access to a registry
/// can write a million of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rejections {
    /// Sorted.
    kept: Vec<Rejected>,
    more: usize,
}

impl Rejections {
    /// Maximum number of entries that are kept.
    pub const MOST: usize = 100;
    /// Maximum length of a place and of a reason, in bytes.
    const LONGEST: usize = 300;

    pub fn of(entries: impl IntoIterator<Item = Rejected>) -> Self {
        let mut all = Self::default();
        entries.into_iter().for_each(|entry| all.push(entry));
        all
    }

    pub fn push(&mut self, entry: Rejected) {
        if self.kept.len() >= Self::MOST && self.kept.last().is_some_and(|last| *last <= entry) {
            self.more += 1;
            return;
        }
        let entry = Rejected {
            what: shortened(&entry.what, Self::LONGEST).into_owned(),
            reason: shortened(&entry.reason, Self::LONGEST).into_owned(),
        };
        let place = self.kept.partition_point(|other| *other <= entry);
        self.kept.insert(place, entry);
        if self.kept.len() > Self::MOST {
            self.kept.truncate(Self::MOST);
            self.more += 1;
        }
    }

    pub fn iter(&self) -> std::slice::Iter<'_, Rejected> {
        self.kept.iter()
    }

    /// The number of entries that are not kept.
    pub fn more(&self) -> usize {
        self.more
    }

    /// The number of all entries, including those that are not kept.
    pub fn count(&self) -> usize {
        self.kept.len() + self.more
    }
}

impl<'a> IntoIterator for &'a Rejections {
    type Item = &'a Rejected;
    type IntoIter = std::slice::Iter<'a, Rejected>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl From<Vec<Rejected>> for Rejections {
    fn from(entries: Vec<Rejected>) -> Self {
        Self::of(entries)
    }
}

/// A skipped entry. It does not affect the others.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rejected {
    /// Its place: a key, a service ID, a record.
    pub what: String,
    /// Its value and what was expected.
    pub reason: String,
}

/// One configured discovery.
#[derive(Debug, Clone)]
pub enum Discovery {
    Consul(consul::Consul),
    Etcd(etcd::Etcd),
    Docker(docker::Docker),
    File(file::File),
    Dns(dns::Dns),
}

impl Discovery {
    /// The addresses that its endpoints may have.
    fn allowed(&self, loopback: bool) -> Allowed {
        match self {
            Self::File(_) => Allowed::Anywhere,
            Self::Docker(docker) if docker.is_here() => Allowed::Anywhere,
            _ => Allowed::Within { networks: None, loopback },
        }
    }

    /// How connections to it are unprotected.
    fn weaknesses(&self) -> Vec<Weakness> {
        match self {
            Self::Consul(consul) => consul.client.weaknesses(),
            Self::Etcd(etcd) => etcd.client.weaknesses(),
            Self::Docker(docker) => docker.engine().weakness().into_iter().collect(),
            Self::File(_) | Self::Dns(_) => Vec::new(),
        }
    }

    /// `host:port` of every server that is asked via TCP.
    fn servers(&self) -> Vec<String> {
        let of =
            |url: &url::Url| Some(format!("{}:{}", url.host_str()?, url.port_or_known_default()?));
        match self {
            Self::Consul(consul) => of(consul.client.base()).into_iter().collect(),
            Self::Etcd(etcd) => etcd.client.members().iter().filter_map(of).collect(),
            Self::Docker(docker) => docker.engine().server().into_iter().collect(),
            Self::File(_) => Vec::new(),
            Self::Dns(dns) => vec![dns.resolver.to_string()],
        }
    }

    /// Follows `query`; never returns. Each kind has a box of its own: there may be ten thousand queries, and one future for all
    /// kinds would have the size of the largest.
    async fn watch(self, query: Query, publish: Publisher<Endpoints>, resync: &ResyncRequests) {
        let (name, schedule) = (query.to_string(), resync.subscribe());
        match self {
            Self::Consul(consul) => {
                follow(&name, consul.source(query), publish, schedule).boxed().await
            }
            Self::Etcd(etcd) => follow(&name, etcd.source(query), publish, schedule).boxed().await,
            Self::Docker(docker) => docker.watch(query, publish, resync).boxed().await,
            Self::File(file) => file.watch(query, publish, resync).boxed().await,
            Self::Dns(dns) => follow(&name, dns.source(query), publish, schedule).boxed().await,
        }
    }
}

/// Why no discovery can be queried for a descriptor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CannotAsk {
    #[error("via={via:?}: expected one of the configured discoveries: {configured}")]
    Unknown { via: Arc<str>, configured: String },
    #[error("dc={dc:?}: expected none, as {via} has no datacentres")]
    Datacentre { dc: Arc<str>, via: Arc<str> },
    #[error("tags {tags}: expected none, as {via} has no tags")]
    Tags { tags: Tags, via: Arc<str> },
    #[error(
        "port {0} is embassy's own, so its connections look like direct dials: expected another port, or another --port of embassy"
    )]
    OwnPort(Port),
}

impl CannotAsk {
    /// What to do about it.
    pub fn fix(&self) -> &'static str {
        match self {
            Self::Unknown { .. } => {
                "name one of the configured discoveries in via=, or add the one that it names with -discovery"
            }
            Self::Datacentre { .. } => {
                "remove dc= from the descriptor, or ask Consul: via=consul in the descriptor, and -discovery=consul://..."
            }
            Self::Tags { .. } => {
                "remove the tags from the descriptor, or ask a discovery that has tags: via= in the descriptor"
            }
            Self::OwnPort(_) => {
                "declare another port in the descriptor, or start embassy with another --port"
            }
        }
    }
}

/// Every configured discovery, by name.
#[derive(Debug, Clone)]
pub struct Discoveries {
    by_name: BTreeMap<Arc<str>, Discovery>,
    /// The URIs as given, completed from the environment. They contain no secrets.
    uris: BTreeMap<Arc<str>, String>,
    /// The addresses that the endpoints of each may have.
    allowed: BTreeMap<Arc<str>, Allowed>,
    /// Used if a descriptor does not name a discovery.
    default: Arc<str>,
}

impl Discoveries {
    /// Reads every `-discovery`; the first one is the default.
    pub fn parse(uris: &[String], settings: &Options) -> Result<Self, UriError> {
        let (mut by_name, mut uris_by_name) = (BTreeMap::new(), BTreeMap::new());
        let mut allowed = BTreeMap::new();
        let mut default = None;
        for text in uris {
            let text = &uri::complete(text, &settings.consul)?;
            let uri::Parsed { name, discovery, loopback } = uri::parse(text, settings)?;
            default.get_or_insert_with(|| name.clone());
            allowed.insert(name.clone(), discovery.allowed(loopback));
            uris_by_name.insert(name.clone(), text.clone());
            if by_name.insert(name.clone(), discovery).is_some() {
                return Err(UriError::new(
                    text,
                    format_args!("a second {name}: a descriptor could not tell them apart"),
                ));
            }
        }
        let default = default.ok_or_else(|| UriError::new("", "at least one discovery"))?;
        Ok(Self { by_name, uris: uris_by_name, allowed, default })
    }

    /// Uses `follower` for a discovery of the same engine.
    pub fn share(&mut self, follower: &Follower) {
        for discovery in self.by_name.values_mut() {
            if let Discovery::Docker(docker) = discovery {
                docker.share(follower);
            }
        }
    }

    /// Whether the endpoints of this discovery are containers of this host, at their own addresses.
    pub fn is_of_containers_here(&self, via: &str) -> bool {
        matches!(self.by_name.get(via), Some(Discovery::Docker(docker)) if docker.is_here())
    }

    /// Restricts the endpoints of registries to these networks (`--endpoints`).
    pub fn within(mut self, only: &Arc<[IpNet]>) -> Self {
        for allowed in self.allowed.values_mut() {
            if let Allowed::Within { networks, .. } = allowed {
                *networks = Some(only.clone());
            }
        }
        self
    }

    /// The addresses that the endpoints of each discovery may have. `own`: the addresses on which embassy listens.
    pub fn bounds(&self, own: Vec<SocketAddr>) -> Bounds {
        Bounds { allowed: self.allowed.clone(), own }
    }

    /// The URIs, by the discoveries' names.
    pub fn uris(&self) -> &BTreeMap<Arc<str>, String> {
        &self.uris
    }

    /// How connections to any of them are unprotected.
    pub fn weaknesses(&self) -> Vec<Weakness> {
        self.by_name.values().flat_map(Discovery::weaknesses).collect()
    }

    /// `host:port` of every server that any discovery asks via TCP.
    pub fn servers(&self) -> Vec<String> {
        self.by_name.values().flat_map(Discovery::servers).collect()
    }

    /// The servers of one discovery, as `host:port`.
    pub fn servers_of(&self, name: &str) -> Vec<String> {
        self.by_name.get(name).map(Discovery::servers).unwrap_or_default()
    }

    /// The names by which descriptors refer to them.
    pub fn names(&self) -> impl Iterator<Item = &Arc<str>> {
        self.by_name.keys()
    }

    /// A probe for each discovery.
    pub fn probes(&self) -> impl Iterator<Item = Query> {
        self.by_name.keys().filter_map(Query::probe)
    }

    /// The query of a descriptor.
    pub fn query(&self, descriptor: &Descriptor) -> Result<Query, CannotAsk> {
        let via = descriptor.via.as_ref().unwrap_or(&self.default);
        let (via, discovery) =
            self.by_name.get_key_value(via).ok_or_else(|| CannotAsk::Unknown {
                via: via.clone(),
                configured: self.by_name.keys().map(AsRef::as_ref).collect::<Vec<_>>().join(", "),
            })?;
        // Ignoring the datacentre would be a query for something else.
        if let Some(dc) = &descriptor.dc
            && !matches!(discovery, Discovery::Consul(_))
        {
            return Err(CannotAsk::Datacentre { dc: dc.clone(), via: via.clone() });
        }
        if !descriptor.tags.is_empty() && matches!(discovery, Discovery::Dns(_)) {
            return Err(CannotAsk::Tags { tags: descriptor.tags.clone(), via: via.clone() });
        }
        let service = match discovery {
            Discovery::Etcd(_) => etcd::branch(&descriptor.service),
            _ => descriptor.service.clone(),
        };
        Ok(Query {
            via: via.clone(),
            service,
            tags: descriptor.tags.clone(),
            dc: descriptor.dc.clone(),
            port: matches!(discovery, Discovery::Dns(_)).then_some(descriptor.port),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::docker::{Address, Engine};

    fn query(text: &str) -> Result<String, String> {
        let settings = Options {
            healthy_only: true,
            docker: Engine { address: Address::Unix("/nonexistent".into()), certificates: None },
            consul: ConsulSettings::default(),
            etcd: EtcdSettings::default(),
        };
        let uris = ["consul://a", "etcd://a", "docker://", "file://a", "dns://127.0.0.1"];
        let all = Discoveries::parse(&uris.map(str::to_owned), &settings).unwrap();
        let query = all.query(&text.parse().unwrap());
        query.map(|query| query.to_string()).map_err(|error| error.to_string())
    }

    #[test]
    fn what_a_discovery_does_not_have_cannot_be_asked_of_it() {
        assert_eq!(query("web[a];80;dc=eu").unwrap(), "consul web[a] in eu");
        for via in ["etcd", "docker", "file", "dns"] {
            assert_eq!(
                query(&format!("web;80;via={via};dc=eu")).unwrap_err(),
                format!("dc=\"eu\": expected none, as {via} has no datacentres")
            );
        }
        assert_eq!(query("web[b,a];80;via=file").unwrap(), "file web[b,a]");
        assert_eq!(
            query("web[b,a];80;via=dns").unwrap_err(),
            "tags [b,a]: expected none, as dns has no tags"
        );
        assert_eq!(
            query("web;80;via=zookeeper").unwrap_err(),
            "via=\"zookeeper\": expected one of the configured discoveries: consul, dns, docker, etcd, file"
        );
    }

    #[test]
    fn of_too_many_the_same_ones_are_used_in_whatever_order_they_come() {
        let endpoint = |n: u32| Endpoint((std::net::Ipv4Addr::from(0x0a00_0000 + n), 80).into());
        let rejected = |n: u32| Rejected { what: format!("{n:06}"), reason: "x".repeat(1000) };
        let most = Endpoints::MOST as u32;
        let all = |mut numbers: Vec<u32>| {
            fastrand::shuffle(&mut numbers);
            let entries: Vec<_> = numbers.iter().copied().map(rejected).collect();
            Endpoints::new(numbers.into_iter().map(endpoint), entries)
        };
        let exact = all((0..most).collect());
        assert_eq!((exact.list.len(), exact.left_out), (Endpoints::MOST, 0));
        let (one, other) = (all((0..most + 7).collect()), all((0..most + 7).collect()));
        assert_eq!(one, other);
        assert_eq!((&one.list, one.left_out), (&exact.list, 7));
        assert_eq!(one.rejected.count(), Endpoints::MOST + 7);
        assert_eq!(one.rejected.iter().count(), Rejections::MOST);
        assert!(one.rejected.iter().all(|entry| entry.reason.len() < 400));
        assert_eq!(one.rejected.iter().next().unwrap().what, "000000");
    }

    #[test]
    fn one_branch_of_etcd_is_one_query() {
        assert_eq!(query("/a/b/;80;via=etcd"), query("/a/b;81;via=etcd"));
        assert_ne!(query("/a/b/;80;via=etcd"), query("a/b;80;via=etcd"));
    }
}
