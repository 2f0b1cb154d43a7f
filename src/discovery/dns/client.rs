//! One DNS server, asked with EDNS and, where it does not like that, without.

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
    /// With EDNS, for larger answers by UDP.
    edns: TokioResolver,
    plain: TokioResolver,
    /// Whether the server has answered without EDNS what it refused with it.
    plain_only: AtomicBool,
    /// Questions with EDNS in a row that it did not answer at all, and without EDNS did.
    silences: AtomicU8,
}

impl Client {
    /// One question, asked once.
    const QUESTION: Duration = Duration::from_secs(2);
    /// One lost packet says nothing of the server. So many in a row do.
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
    /// Any failure may be the server's way to say that it does not know EDNS (RFC 6891, 7): it is asked again without, which is
    /// also the second try if a packet was lost.
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
        // Answers without EDNS are short, or come by TCP: so not for good because of one lost packet.
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
    /// The server works: it has answered that it does not answer this.
    pub(super) responded: bool,
    /// It will not answer it the next time either.
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

/// An answer without records if there are none.
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
        // Without an SOA, name servers in place of an answer say "ask elsewhere".
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
