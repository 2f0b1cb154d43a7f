//! A Docker engine: its address, and the code that follows it. The docker provider and the docker discovery share it.

use std::{fmt, path::PathBuf};

use crate::tls::{Weakness, is_loopback};

pub(crate) mod answers;
pub(crate) mod client;
pub mod container;
mod containers;
pub mod follow;
mod inspections;
#[cfg(test)]
mod interleavings;
mod links;
pub mod lookup;
pub(crate) mod obstacle;
pub(crate) mod per_container;
pub(crate) mod process;
pub(crate) mod read;
#[cfg(test)]
mod sessions;

/// The address on which an engine listens.
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
    /// The folder with `key.pem`, `cert.pem` and `ca.pem`: `DOCKER_CERT_PATH`, if `DOCKER_TLS_VERIFY` is set.
    pub certificates: Option<PathBuf>,
}

/// Text that is not the address of an engine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not unix:///path or tcp://host:port")]
pub struct NotAnEngine(pub String);

impl Engine {
    pub fn parse(text: &str, certificates: Option<PathBuf>) -> Result<Self, NotAnEngine> {
        let wrong = || NotAnEngine(text.to_owned());
        let (scheme, rest) = text.split_once("://").ok_or_else(wrong)?;
        let address = match scheme {
            "unix" if rest.starts_with('/') => Address::Unix(rest.into()),
            // A user name is refused: the address is shown in many places.
            "tcp" | "http" | "https"
                if !rest.contains('@') && !rest.trim_end_matches('/').is_empty() =>
            {
                Address::Tcp(rest.trim_end_matches('/').to_owned())
            }
            _ => return Err(wrong()),
        };
        Ok(Self { address, certificates })
    }

    /// How connections to it are unprotected. `None`: they are protected.
    pub fn weakness(&self) -> Option<Weakness> {
        let Address::Tcp(address) = &self.address else { return None };
        let host = address.rsplit_once(':').map_or(&**address, |(host, _)| host);
        let is_open = self.certificates.is_none() && !is_loopback(host);
        is_open.then(|| Weakness {
            what: format!(
                "the Docker engine at tcp://{address} is used without TLS: everybody on the way can read and change what it answers, and who reaches this port controls its host"
            ),
            fix: "set DOCKER_TLS_VERIFY=1 and DOCKER_CERT_PATH, or use its Unix socket",
        })
    }

    /// `host:port`, if the engine is reached via TCP.
    pub fn server(&self) -> Option<String> {
        match &self.address {
            Address::Unix(_) => None,
            Address::Tcp(host) => Some(host.clone()),
        }
    }
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
    fn an_engine_elsewhere_needs_tls() {
        let weak = |text, certificates: Option<&str>| {
            Engine::parse(text, certificates.map(PathBuf::from)).unwrap().weakness().is_some()
        };
        assert!(weak("tcp://10.0.0.1:2375", None) && weak("tcp://engine", None));
        assert!(!weak("tcp://10.0.0.1:2376", Some("/certs")));
        for here in [
            "unix:///var/run/docker.sock",
            "tcp://127.0.0.1:2375",
            "tcp://[::1]:2375",
            "tcp://localhost:2375",
        ] {
            assert!(!weak(here, None), "{here}");
        }
    }

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
