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

/// How long one DNS server has for an answer, twice.
const ANSWER: Duration = Duration::from_secs(1);

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
            error => format!(
                "cannot resolve {host:?} with the DNS servers of this host ({servers}): {error}"
            ),
        })
    };
    options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
    options.timeout = ANSWER;
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

    #[tokio::test]
    async fn an_error_names_the_server() {
        for wrong in ["no-port", "host:70000", "host:"] {
            assert_eq!(server(wrong).await.unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
        let error = addresses("no such name").await.unwrap_err().to_string();
        assert!(error.contains("\"no such name\""), "{error}");
    }
}
