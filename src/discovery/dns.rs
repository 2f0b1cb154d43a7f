//! `dns://resolver[:port]`: a service is a name, its endpoints are what its records say.
//!
//! SRV records are asked for first: their targets and ports are the endpoints. Of several priorities the lowest number
//! that has an address counts, as RFC 2782 has it; weights do not. A name without SRV records is taken for a host: its A
//! and AAAA records are the endpoints, on the port that the descriptor names.
//!
//! Names are always whole: no search list, no hosts file. DNS tells nothing of changes, so a name is asked for again when
//! its records' time to live is over. It has no tags either: a descriptor that wants some is refused.
//!
//! A name that does not exist, or has no such records, is a valid empty answer. A server that does not answer, or answers
//! that it failed, is an error; so is a failure to look up one target of many.

use std::{net::SocketAddr, time::Duration};

use futures_util::{StreamExt, TryStreamExt, stream};
use hickory_resolver::{
    Resolver, TokioResolver,
    config::{NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts},
    net::{DnsError, NetError, runtime::TokioRuntimeProvider},
    proto::{
        op::ResponseCode,
        rr::{Name, RecordType},
    },
};
use tokio::time::{sleep, timeout};

use self::records::{Answer, Target};
use crate::{
    discovery::{Endpoints, Query, Rejected, address},
    model::Endpoint,
    source::{Publisher, Resync, Source, SourceError},
};

mod records;

/// A DNS server.
#[derive(Debug, Clone)]
pub struct Dns {
    pub(super) resolver: SocketAddr,
}

impl Dns {
    /// `resolver`: the only server that is asked, by UDP, and by TCP if an answer is truncated.
    pub fn new(resolver: SocketAddr) -> Self {
        Self { resolver }
    }

    /// Follows `query`.
    pub fn source(self, query: Query) -> DnsSource {
        DnsSource { server: self.resolver, query }
    }
}

/// One followed name.
#[derive(Debug)]
pub struct DnsSource {
    server: SocketAddr,
    query: Query,
}

impl Source for DnsSource {
    type Item = Endpoints;

    async fn session(
        &mut self,
        publish: &Publisher<Endpoints>,
        resync: &mut Resync,
    ) -> Result<(), SourceError> {
        let session = Session::new(self)?;
        loop {
            let (endpoints, ttl) = match timeout(Session::WHOLE, session.resolve()).await {
                Ok(found) => found?,
                Err(_) => {
                    let seconds = Session::WHOLE.as_secs();
                    let reason = format!("no full answer within {seconds} s");
                    return Err(session.failed("records", &session.name, reason));
                }
            };
            publish.publish(endpoints);
            tokio::select! {
                () = sleep(ttl) => {}
                () = resync.due() => {}
            }
        }
    }
}

struct Session<'a> {
    source: &'a DnsSource,
    resolver: TokioResolver,
    name: Name,
}

impl<'a> Session<'a> {
    /// One question to the server, asked twice.
    const QUESTION: Duration = Duration::from_secs(2);
    /// Everything that one answer takes: two questions one after the other, and one for each target.
    const WHOLE: Duration = Duration::from_secs(20);
    /// Targets that are looked up at a time.
    const AT_A_TIME: usize = 8;

    fn new(source: &'a DnsSource) -> Result<Self, SourceError> {
        let service = source.query.service.as_str();
        let mut name = Name::from_ascii(service).map_err(|error| {
            SourceError::caused(format_args!("{service:?} is not a name of DNS"), &error)
        })?;
        name.set_fqdn(true);

        let mut server = NameServerConfig::udp_and_tcp(source.server.ip());
        for connection in &mut server.connections {
            connection.port = source.server.port();
        }
        let mut options = ResolverOpts::default();
        options.timeout = Self::QUESTION;
        options.attempts = 1; // more than the first
        options.cache_size = 0; // we ask when the time to live is over
        options.use_hosts_file = ResolveHosts::Never;
        options.edns0 = true; // larger answers by UDP
        let config = ResolverConfig::from_name_servers(vec![server]);
        let resolver = Resolver::builder_with_config(config, TokioRuntimeProvider::default())
            .with_options(options)
            .build()
            .map_err(|error| SourceError::caused("cannot create a DNS client", &error))?;
        Ok(Self { source, resolver, name })
    }

    /// The endpoints, and for how long they are known.
    async fn resolve(&self) -> Result<(Endpoints, Duration), SourceError> {
        let services = self.lookup(&self.name, RecordType::SRV).await?;
        let targets = services.targets();
        if targets.is_empty() {
            let host = services.and(self.addresses(&self.name).await?);
            let port = self.source.query.port.map_or_else(String::new, |port| port.to_string());
            let (list, rejected) = endpoints(&host, &self.name, &port);
            return Ok((Endpoints::new(list, rejected), host.ttl.bounded()));
        }
        let mut ttl = services.ttl;
        let (mut list, mut rejected) = (Vec::new(), Vec::new());
        for group in targets.chunk_by(|a, b| a.priority == b.priority) {
            // The root as a host says that the service is decidedly not there.
            let mut hosts = group.to_vec();
            hosts.retain(|target| !target.host.is_root());
            let found: Vec<_> = stream::iter(hosts)
                .map(|target| self.target(&services, target))
                .buffered(Self::AT_A_TIME)
                .try_collect()
                .await?;
            for (target, answer) in found {
                ttl = ttl.min(answer.ttl);
                let (good, wrong) = endpoints(&answer, &target.host, &target.port.to_string());
                if good.is_empty() && wrong.is_empty() {
                    let reason = "it has no address".to_owned();
                    rejected.push(Rejected { what: format!("host {}", target.host), reason });
                }
                list.extend(good);
                rejected.extend(wrong);
            }
            if !list.is_empty() {
                break;
            }
        }
        Ok((Endpoints::new(list, rejected), ttl.bounded()))
    }

    /// The addresses of a target: those that came with the answer that names it, else those that it has.
    async fn target(
        &self,
        services: &Answer,
        target: Target,
    ) -> Result<(Target, Answer), SourceError> {
        let glue = services.glue(&target.host);
        let came = !glue.addresses().is_empty();
        let answer = if came { glue } else { self.addresses(&target.host).await? };
        Ok((target, answer))
    }

    async fn addresses(&self, name: &Name) -> Result<Answer, SourceError> {
        let (v4, v6) = futures_util::try_join!(
            self.lookup(name, RecordType::A),
            self.lookup(name, RecordType::AAAA)
        )?;
        Ok(v4.and(v6))
    }

    /// An answer without records if there are none.
    async fn lookup(&self, name: &Name, kind: RecordType) -> Result<Answer, SourceError> {
        match self.resolver.lookup(name.clone(), kind).await {
            Ok(found) => match found.message().metadata.response_code {
                ResponseCode::NoError | ResponseCode::NXDomain => {
                    Ok(Answer::new(found.answers(), found.additionals()))
                }
                code => Err(self.failed(&kind.to_string(), name, code.to_string())),
            },
            // Without an SOA, name servers in place of an answer say "ask elsewhere".
            Err(NetError::Dns(DnsError::NoRecordsFound(none)))
                if none.soa.is_some() || none.ns.is_none() =>
            {
                Ok(Answer::none(none.negative_ttl))
            }
            Err(NetError::Dns(DnsError::NoRecordsFound(_))) => {
                let reason = "a referral to other servers: expected a server that resolves";
                Err(self.failed(&kind.to_string(), name, reason.to_owned()))
            }
            Err(error) => Err(self.failed(&kind.to_string(), name, error.to_string())),
        }
    }

    fn failed(&self, kind: &str, name: &Name, reason: String) -> SourceError {
        SourceError::new(format_args!("{kind} of {name} from {}: {reason}", self.source.server))
    }
}

/// Reads `input` as a server's message.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(input: &[u8]) {
    let Ok(message) = hickory_resolver::proto::op::Message::from_vec(input) else { return };
    let answer = Answer::new(&message.answers, &message.additionals);
    for target in answer.targets() {
        let _ = endpoints(&answer.glue(&target.host), &target.host, &target.port.to_string());
    }
    let _ = endpoints(&answer, &Name::root(), "80");
    let _ = Answer::none(None).and(answer).ttl.bounded();
}

/// A host's endpoints, and those of its addresses that can be none.
fn endpoints(answer: &Answer, host: &Name, port: &str) -> (Vec<Endpoint>, Vec<Rejected>) {
    let mut list = Vec::new();
    let mut rejected = Vec::new();
    for ip in answer.addresses() {
        match address::endpoint(&ip.to_string(), port) {
            Ok(endpoint) => list.push(endpoint),
            Err(reason) => rejected.push(Rejected { what: format!("host {host}"), reason }),
        }
    }
    (list, rejected)
}
