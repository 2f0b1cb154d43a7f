//! The address of a Docker engine, and how to connect to it. Shared by the provider and by the discovery of the same name.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    time::Duration,
};

use bollard::{API_DEFAULT_VERSION, BollardRequest, Docker, errors::Error};
use hyper_rustls::HttpsConnector;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};

use crate::tls::ClientTls;

pub(crate) mod client;
pub mod container;
mod containers;
pub mod follow;
mod inspections;
#[cfg(test)]
mod interleavings;
pub(crate) mod obstacle;
pub(crate) mod per_container;
pub(crate) mod process;
pub(crate) mod read;
#[cfg(test)]
mod sessions;

/// Where an engine listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// `unix:///path`
    Unix(PathBuf),
    /// `tcp://host:port`
    Tcp(String),
}

/// An engine, and the client certificate for TLS, if TLS is enabled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Engine {
    pub address: Address,
    /// The folder of `key.pem`, `cert.pem` and `ca.pem`: `DOCKER_CERT_PATH`, if `DOCKER_TLS_VERIFY` is set.
    pub certificates: Option<PathBuf>,
}

/// Text that is not the address of an engine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not unix:///path or tcp://host:port")]
pub struct NotAnEngine(pub String);

impl Engine {
    /// What one request may take; the event stream is not bound by it.
    pub(crate) const TIMEOUT: Duration = Duration::from_secs(10);

    pub fn parse(text: &str, certificates: Option<PathBuf>) -> Result<Self, NotAnEngine> {
        let wrong = || NotAnEngine(text.to_owned());
        let (scheme, rest) = text.split_once("://").ok_or_else(wrong)?;
        let address = match scheme {
            "unix" if rest.starts_with('/') => Address::Unix(rest.into()),
            // No user: the address is shown in many places.
            "tcp" | "http" | "https"
                if !rest.contains('@') && !rest.trim_end_matches('/').is_empty() =>
            {
                Address::Tcp(rest.trim_end_matches('/').to_owned())
            }
            _ => return Err(wrong()),
        };
        Ok(Self { address, certificates })
    }

    /// `host:port` of an engine that is reached over TCP.
    pub fn server(&self) -> Option<String> {
        match &self.address {
            Address::Unix(_) => None,
            Address::Tcp(host) => Some(host.clone()),
        }
    }

    /// A client that speaks the newest version that both sides know: no fixed version fits the engines from 20.10 to 29.
    pub async fn connect(&self) -> Result<Docker, Error> {
        let seconds = Self::TIMEOUT.as_secs();
        let client = match (&self.address, &self.certificates) {
            (Address::Unix(path), _) => {
                Docker::connect_with_unix(&path.to_string_lossy(), seconds, API_DEFAULT_VERSION)
            }
            (Address::Tcp(host), None) => {
                Docker::connect_with_http(host, seconds, API_DEFAULT_VERSION)
            }
            (Address::Tcp(host), Some(folder)) => {
                let tls = https(folder)?;
                // As the library's own: no connection is used twice.
                let client =
                    Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(tls);
                let transport = move |request: BollardRequest| {
                    let answer = client.request(request);
                    async move { answer.await.map_err(Error::from) }
                };
                let address = Some(format!("https://{host}"));
                Docker::connect_with_custom_transport(
                    transport,
                    address,
                    seconds,
                    API_DEFAULT_VERSION,
                )
            }
        }?;
        client.negotiate_version().await
    }
}

/// TLS by the files of the docker command. (The library's own TLS refuses a certificate that is its own CA.)
fn https(folder: &Path) -> Result<HttpsConnector<HttpConnector>, Error> {
    let file = |name: &str| Some(folder.join(name));
    let files = (file("ca.pem"), file("cert.pem"), file("key.pem"));
    let wrong = |error: String| Error::from(io::Error::other(error));
    let tls = ClientTls::new(files.0, files.1, files.2, ["DOCKER_CERT_PATH"; 3]).map_err(wrong)?;
    let pem = tls.load().map_err(|error| wrong(error.to_string()))?;
    let config = pem.config().map_err(|error| wrong(error.to_string()))?;
    let config = config.ok_or_else(|| wrong("no ca.pem".to_owned()))?;
    let mut http = HttpConnector::new();
    http.enforce_http(false);
    Ok(HttpsConnector::from((http, config)))
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.address {
            Address::Unix(path) => write!(f, "unix://{}", path.display()),
            Address::Tcp(host) => write!(f, "tcp://{host}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_docker_reads_them() {
        let unix = Engine::parse("unix:///var/run/docker.sock", None).unwrap();
        assert_eq!(unix.address, Address::Unix("/var/run/docker.sock".into()));
        let tcp = Engine::parse("tcp://10.0.0.1:2375", None).unwrap();
        assert_eq!(tcp.address, Address::Tcp("10.0.0.1:2375".into()));
        for wrong in [
            "",
            "/var/run/docker.sock",
            "unix://docker.sock",
            "tcp://",
            "ssh://host",
            "tcp://u:p@h:1",
        ] {
            assert_eq!(Engine::parse(wrong, None), Err(NotAnEngine(wrong.to_owned())));
        }
    }
}
