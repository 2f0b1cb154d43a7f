//! A client for one DNS server. It uses EDNS, and if the server does not support that, no EDNS.

use std::{
    fmt,
    net::SocketAddr,
    sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed},
    time::Duration,
};

use hickory_resolver::{
    Resolver, TokioResolver,
    config::{NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts},
    net::{DnsError, NetError, runtime::TokioRuntimeProvider},
    proto::{
        op::ResponseCode,
        rr::{Name, RecordType},
    },
};

use super::records::Answer;
use crate::source::SourceError;

pub(super) struct Client {
    /// With EDNS, for larger answers via UDP.
    edns: TokioResolver,
    plain: TokioResolver,
    /// Whether the server has answered without EDNS what it refused with EDNS.
    plain_only: AtomicBool,
    /// Number of questions in a row that it answered only without EDNS, and ignored with EDNS.
    silences: AtomicU8,
}

impl Client {
    /// Timeout of one question, which is sent once.
    const QUESTION: Duration = Duration::from_secs(2);
    /// How many ignored questions in a row show that the server ignores EDNS. A single one may be a lost packet.
    const SILENCES: u8 = 3;

    pub(super) fn new(server: SocketAddr) -> Result<Self, SourceError> {
        Ok(Self {
            edns: resolver(server, true)?,
            plain: resolver(server, false)?,
            plain_only: AtomicBool::new(false),
            silences: AtomicU8::new(0),
        })
    }

    /// The records of a type, or why there is no answer.
    ///
    /// Any failure may mean that the server does not know EDNS (RFC 6891, 7). So the question is repeated without EDNS.
    /// This is also the second attempt if a packet was lost.
    pub(super) async fn ask(&self, name: &Name, kind: RecordType) -> Result<Answer, Unanswered> {
        let plain_only = self.plain_only.load(Relaxed);
        let first = if plain_only { &self.plain } else { &self.edns };
        let failure = match ask(first, name, kind).await {
            Ok(answer) => {
                self.silences.store(0, Relaxed);
                return Ok(answer);
            }
            Err(failure) => failure,
        };
        let answer = ask(&self.plain, name, kind).await?;
        // Answers without EDNS are short or arrive via TCP. So one lost packet does not disable EDNS permanently.
        if !plain_only {
            let silences = self.silences.fetch_add(1, Relaxed).saturating_add(1);
            if failure.responded || silences >= Self::SILENCES {
                self.plain_only.store(true, Relaxed);
            }
        }
        Ok(answer)
    }
}

/// Why a question has no answer.
#[derive(Debug, Clone)]
pub(super) struct Unanswered {
    pub(super) reason: String,
    /// The server works: it answered that it will not answer this question.
    pub(super) responded: bool,
    /// It will not answer the question next time either.
    pub(super) for_good: bool,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("plain_only", &self.plain_only).finish_non_exhaustive()
    }
}

fn resolver(server: SocketAddr, edns: bool) -> Result<TokioResolver, SourceError> {
    let mut of_server = NameServerConfig::udp_and_tcp(server.ip());
    for connection in &mut of_server.connections {
        connection.port = server.port();
    }
    let mut options = ResolverOpts::default();
    options.timeout = Client::QUESTION;
    options.attempts = 0; // more than the first
    options.cache_size = 0; // we ask when the time to live is over
    options.use_hosts_file = ResolveHosts::Never;
    options.edns0 = edns;
    let config = ResolverConfig::from_name_servers(vec![of_server]);
    Resolver::builder_with_config(config, TokioRuntimeProvider::default())
        .with_options(options)
        .build()
        .map_err(|error| SourceError::caused("cannot create a DNS client", &error))
}

/// If there are no records, the answer is empty.
async fn ask(
    resolver: &TokioResolver,
    name: &Name,
    kind: RecordType,
) -> Result<Answer, Unanswered> {
    let refused = |reason, for_good| Err(Unanswered { reason, responded: true, for_good });
    let is_for_good = |code: &ResponseCode| {
        matches!(code, ResponseCode::NotImp | ResponseCode::Refused | ResponseCode::FormErr)
    };
    match resolver.lookup(name.clone(), kind).await {
        Ok(found) => match found.message().metadata.response_code {
            ResponseCode::NoError | ResponseCode::NXDomain => {
                Ok(Answer::new(found.answers(), found.additionals()))
            }
            code => refused(code.to_string(), is_for_good(&code)),
        },
        // Name servers instead of an answer, without an SOA, mean "ask elsewhere".
        Err(NetError::Dns(DnsError::NoRecordsFound(none)))
            if none.soa.is_some() || none.ns.is_none() =>
        {
            let mut answer = Answer::none(none.negative_ttl);
            answer.no_such_name = none.response_code == ResponseCode::NXDomain;
            Ok(answer)
        }
        Err(NetError::Dns(DnsError::NoRecordsFound(_))) => {
            let reason = "a referral to other servers: expected a server that resolves";
            refused(reason.to_owned(), true)
        }
        Err(error) => {
            let code = match &error {
                NetError::Dns(DnsError::ResponseCode(code)) => Some(code),
                _ => None,
            };
            let (responded, for_good) = (code.is_some(), code.is_some_and(is_for_good));
            Err(Unanswered { reason: error.to_string(), responded, for_good })
        }
    }
}
