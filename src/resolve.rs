//! The addresses of servers to which embassy itself connects: from the hosts file and the DNS servers of resolv.conf.
//!
//! The C library is not used. Its name service modules are files of the host, which a static program cannot load, and an
//! image without a system has none. So `nsswitch.conf` has no effect here: names that only mDNS, LDAP or libvirt knows are
//! not found.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::FutureExt;
use hickory_resolver::{
    TokioResolver,
    config::{LookupIpStrategy, ResolverConfig, ResolverOpts},
    net::{DnsError, NetError},
    system_conf::read_system_conf,
};
use hyper_util::client::legacy::connect::{HttpConnector, dns::Name};
use reqwest::dns::{Addrs, Resolve, Resolving};
use tokio::time::timeout;
use tower_service::Service;

/// How long the DNS servers have for an answer to one question, which is asked twice. Both together are less than `ALL`: a server that
/// does not answer questions for AAAA delays the answer for A, and does not hide it.
const ANSWER: Duration = Duration::from_secs(1);
/// How often a question is asked again.
const AGAIN: usize = 1;

/// How long all of them have together, whatever their number and that of the search domains. It is less than clients of registries and
/// engines wait for a connection (3 s), names included: else a silent DNS server would look like a silent registry.
const ALL: Duration = Duration::from_millis(2500);

type Configured = Result<(ResolverConfig, ResolverOpts), NetError>;

/// The addresses of a server by its name, or the address that the name is; at least one. IPv4 comes first: an address of the
/// other family may exist in DNS only.
pub async fn addresses(host: &str) -> io::Result<Vec<IpAddr>> {
    // Read again each time: servers are connected to rarely, and a laptop's DNS servers change.
    addresses_by(host, read_system_conf()).await
}

/// The same as `configured` by resolv.conf, or why it cannot be read.
async fn addresses_by(host: &str, configured: Configured) -> io::Result<Vec<IpAddr>> {
    if let Ok(address) = host.trim_matches(['[', ']']).parse() {
        return Ok(vec![address]);
    }
    let (config, mut options, without) = match configured {
        Ok((config, options)) => (config, options, None),
        // The hosts file does not need it.
        Err(error) => {
            let nowhere = ResolverConfig::from_parts(None, vec![], vec![]);
            (nowhere, ResolverOpts::default(), Some(error))
        }
    };
    let servers: Vec<_> =
        config.name_servers().iter().map(|server| server.ip.to_string()).collect();
    let servers = servers.join(", ");
    let fail = |error: NetError| {
        io::Error::other(match error {
            NetError::Dns(DnsError::NoRecordsFound(_)) => format!("{host:?} has no address in DNS"),
            NetError::Timeout => format!(
                "cannot resolve {host:?}: no answer from the DNS servers of this host ({servers})"
            ),
            NetError::Dns(error) => format!(
                "cannot resolve {host:?}: the DNS servers of this host answered with an error ({servers}): {error}"
            ),
            error => format!(
                "cannot resolve {host:?} with the DNS servers of this host ({servers}): {error}"
            ),
        })
    };
    options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
    options.timeout = ANSWER;
    options.attempts = AGAIN;
    let mut builder = TokioResolver::builder_with_config(config, Default::default());
    *builder.options_mut() = options;
    let resolver = builder.build().map_err(fail)?;
    let found = match timeout(ALL, resolver.lookup_ip(host)).await {
        Ok(found) => found,
        Err(_) => Err(NetError::Timeout),
    };
    let found = found.map_err(|error| match &without {
        None => fail(error),
        Some(reason) => io::Error::other(format!(
            "cannot resolve {host:?}: it is not in the hosts file, and /etc/resolv.conf cannot be used: {reason}"
        )),
    })?;
    let mut found: Vec<_> = found.iter().collect();
    found.sort_by_key(IpAddr::is_ipv6);
    Ok(found)
}

/// The addresses of a server given as `host:port`.
pub async fn server(server: &str) -> io::Result<Vec<SocketAddr>> {
    let parts = server.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse().ok()?)));
    let Some((host, port)) = parts else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "expected host:port"));
    };
    let found = addresses(host).await?;
    Ok(found.into_iter().map(|address| SocketAddr::new(address, port)).collect())
}

/// Resolves the names of the servers that an HTTP client connects to.
#[derive(Debug, Clone, Copy, Default)]
pub struct Resolver;

/// The addresses with port 0, which an HTTP client replaces.
async fn of_any_port(name: String) -> io::Result<std::vec::IntoIter<SocketAddr>> {
    let found = addresses(&name).await?;
    Ok(found.into_iter().map(|address| SocketAddr::new(address, 0)).collect::<Vec<_>>().into_iter())
}

impl Resolve for Resolver {
    fn resolve(&self, name: reqwest::dns::Name) -> Resolving {
        let found = of_any_port(name.as_str().to_owned());
        Box::pin(async { Ok(Box::new(found.await?) as Addrs) })
    }
}

impl Service<Name> for Resolver {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        of_any_port(name.as_str().to_owned()).boxed()
    }
}

/// Opens the connections of an HTTP/2 channel, which may use TLS on top.
pub fn connector() -> HttpConnector<Resolver> {
    let mut connector = HttpConnector::new_with_resolver(Resolver);
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector
}

#[cfg(test)]
mod tests {
    use hickory_resolver::config::NameServerConfig;

    use super::*;

    #[tokio::test]
    async fn an_address_is_its_own_answer() {
        let expected: [(&str, IpAddr); 3] = [
            ("10.0.0.5", [10, 0, 0, 5].into()),
            ("::1", "::1".parse().unwrap()),
            ("[::1]", "::1".parse().unwrap()),
        ];
        for (host, address) in expected {
            assert_eq!(addresses(host).await.unwrap(), [address]);
        }
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        assert_eq!(server("10.0.0.5:8500").await.unwrap(), [at("10.0.0.5:8500")]);
        assert_eq!(server("[::1]:2379").await.unwrap(), [at("[::1]:2379")]);
    }

    #[tokio::test]
    async fn localhost_needs_no_server() {
        let missing = || Err(io::Error::from(io::ErrorKind::NotFound).into());
        let found = addresses_by("localhost", missing()).await.unwrap();
        assert!(!found.is_empty() && found.iter().all(IpAddr::is_loopback), "{found:?}");
        assert!(found[0].is_ipv4(), "{found:?}");
        let error = addresses_by("consul.example", missing()).await.unwrap_err().to_string();
        let expected =
            "\"consul.example\": it is not in the hosts file, and /etc/resolv.conf cannot";
        assert!(error.contains(expected), "{error}");
    }

    #[tokio::test]
    async fn dns_servers_that_do_not_answer_are_named_before_anybody_gives_up_on_the_registry() {
        // It takes questions, and answers none.
        let silent = tokio::net::UdpSocket::bind("127.0.0.53:0").await.unwrap();
        let mut server = NameServerConfig::udp(silent.local_addr().unwrap().ip());
        server.connections[0].port = silent.local_addr().unwrap().port();
        let search = ["a.test.", "b.test.", "c.test."].map(|name| name.parse().unwrap()).to_vec();
        let config = ResolverConfig::from_parts(None, search, vec![server]);
        let error = addresses_by("consul", Ok((config, ResolverOpts::default()))).await;
        let error = error.unwrap_err().to_string();
        let expected =
            "cannot resolve \"consul\": no answer from the DNS servers of this host (127.0.0.53)";
        assert_eq!(error, expected);
        let fix = crate::remedy::of("consul", &format!("error sending request: {error}"));
        assert!(fix.contains("DNS servers that the error names"), "{fix}");
    }

    /// Asks for `consul` at a DNS server that makes its answer of the question's header and of its type, or gives none.
    async fn asked_of(
        answer: impl Fn(&[u8], u16) -> Option<Vec<u8>> + Send + 'static,
    ) -> io::Result<Vec<IpAddr>> {
        let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await?;
        let mut server = NameServerConfig::udp(socket.local_addr()?.ip());
        server.connections[0].port = socket.local_addr()?.port();
        let answers = tokio::spawn(async move {
            let mut buffer = [0; 512];
            while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
                let question = &buffer[..length];
                // The name ends with a zero, its type follows.
                let end = 12 + question[12..].iter().position(|byte| *byte == 0).unwrap();
                let kind = u16::from_be_bytes([question[end + 1], question[end + 2]]);
                // Without the additional records.
                if let Some(answer) = answer(&question[..end + 5], kind) {
                    socket.send_to(&answer, from).await.unwrap();
                }
            }
        });
        let config = ResolverConfig::from_parts(None, vec![], vec![server]);
        let found = addresses_by("consul.test.", Ok((config, ResolverOpts::default()))).await;
        answers.abort();
        found
    }

    /// The header and question of an answer, with this result and this number of records.
    fn head(question: &[u8], code: u8, records: u8) -> Vec<u8> {
        let mut answer = question.to_vec();
        answer[2..12].copy_from_slice(&[0x81, 0x80 | code, 0, 1, 0, records, 0, 0, 0, 0]);
        answer
    }

    #[tokio::test]
    async fn an_address_of_ipv4_is_used_if_the_dns_server_does_not_answer_for_ipv6() {
        const A: u16 = 1;
        let found = asked_of(|question, kind| {
            let record = [0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 7];
            (kind == A).then(|| [head(question, 0, 1), record.to_vec()].concat())
        });
        assert_eq!(found.await.unwrap(), [IpAddr::from([192, 0, 2, 7])]);
    }

    #[tokio::test]
    async fn dns_servers_that_answer_with_an_error_are_told_from_silent_ones() {
        for (code, words) in [(2, "Server Failure"), (5, "Query Refused")] {
            let error = asked_of(move |question, _| Some(head(question, code, 0))).await;
            let error = error.unwrap_err().to_string();
            assert!(error.contains("answered with an error (127.0.0.1)"), "{error}");
            assert!(error.contains(words), "{error}");
            let fix = crate::remedy::of("consul", &format!("error sending request: {error}"));
            assert!(fix.contains("dig"), "{fix}");
        }
    }

    #[tokio::test]
    async fn an_error_names_the_server() {
        for wrong in ["no-port", "host:70000", "host:"] {
            assert_eq!(server(wrong).await.unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
        let error = addresses("no such name").await.unwrap_err().to_string();
        assert!(error.contains("\"no such name\""), "{error}");
    }
}
