//! `-discovery` URIs.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
};

use url::{Url, form_urlencoded};

use super::{
    Discovery,
    consul::{self, Consul},
    dns::Dns,
    docker::Docker,
    etcd::{Api, Etcd},
    file::File,
};
use crate::docker::{Address, Engine};

/// What the URIs do not say and the discoveries need: flags and the environment, already read.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `-filter`: only endpoints that pass their health checks.
    pub healthy_only: bool,
    /// `-docker`: the engine that a bare `docker://` means.
    pub docker: Engine,
    pub consul: ConsulSettings,
    pub etcd: EtcdSettings,
}

/// `CONSUL_HTTP_*`, as every Consul tool reads them (developer.hashicorp.com/consul/commands#environment-variables).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsulSettings {
    /// `CONSUL_HTTP_TOKEN`
    pub token: Option<Secret>,
    /// `CONSUL_HTTP_TOKEN_FILE`
    pub token_file: Option<PathBuf>,
    /// `CONSUL_HTTP_SSL`
    pub tls: bool,
    /// `CONSUL_HTTP_SSL_VERIFY`
    pub tls_verify: bool,
    /// `CONSUL_CACERT`
    pub ca: Option<PathBuf>,
    /// `CONSUL_CLIENT_CERT`
    pub certificate: Option<PathBuf>,
    /// `CONSUL_CLIENT_KEY`
    pub key: Option<PathBuf>,
    /// `CONSUL_HTTP_AUTH`: `user` or `user:password`
    pub auth: Option<Secret>,
}

impl Default for ConsulSettings {
    /// What an empty environment means.
    fn default() -> Self {
        Self {
            token: None,
            token_file: None,
            tls: false,
            tls_verify: true,
            ca: None,
            certificate: None,
            key: None,
            auth: None,
        }
    }
}

/// `-etcd-*` and `ETCD_*`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EtcdSettings {
    /// `-etcd-cert`
    pub certificate: Option<PathBuf>,
    /// `-etcd-keycert`
    pub key: Option<PathBuf>,
    /// `-etcd-cacert`
    pub ca: Option<PathBuf>,
    /// `ETCD_USERNAME`, `ETCD_PASSWORD`
    pub user: Option<(String, Secret)>,
}

/// Text that must not show in a log.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub(super) fn reveal(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        text.to_owned().into()
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(hidden)")
    }
}

/// A `-discovery` that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{uri:?}: {reason}")]
pub struct UriError {
    uri: String,
    reason: String,
}

impl UriError {
    pub(super) fn new(uri: &str, reason: impl fmt::Display) -> Self {
        // What stands before an @ may well be a password.
        let shown = match (uri.split_once("://"), uri.rsplit_once('@')) {
            (Some((scheme, _)), Some((_, rest))) => format!("{scheme}://(hidden)@{rest}"),
            _ => uri.to_owned(),
        };
        Self { uri: shown, reason: reason.to_string() }
    }
}

/// The discovery's name, which is what `via=` calls it, and the discovery.
pub(super) fn parse(text: &str, settings: &Settings) -> Result<(Arc<str>, Discovery), UriError> {
    let (scheme, rest) = text.split_once("://").unwrap_or((text, ""));
    let (name, discovery) = match scheme {
        "consul" => ("consul", consul(rest, settings.consul.tls, settings).map(Discovery::Consul)),
        "consuls" => ("consul", consul(rest, true, settings).map(Discovery::Consul)),
        "etcd" => ("etcd", etcd(rest, Api::Any, settings).map(Discovery::Etcd)),
        "etcd2" => ("etcd", etcd(rest, Api::V2, settings).map(Discovery::Etcd)),
        "etcd3" => ("etcd", etcd(rest, Api::V3, settings).map(Discovery::Etcd)),
        "docker" => ("docker", docker(rest, settings).map(Discovery::Docker)),
        "file" => ("file", file(rest).map(Discovery::File)),
        "dns" => ("dns", dns(rest).map(Discovery::Dns)),
        "marathon" => return Err(UriError::new(text, "marathon is not supported")),
        _ => {
            return Err(UriError::new(
                text,
                "expected consul://, consuls://, etcd://, etcd2://, etcd3://, docker://, file:// or dns://",
            ));
        }
    };
    match discovery {
        Ok(discovery) => Ok((name.into(), discovery)),
        Err(reason) => Err(UriError::new(text, reason)),
    }
}

fn consul(rest: &str, tls: bool, settings: &Settings) -> Result<Consul, String> {
    let (authority, query) = split(rest)?;
    let mut asked = consul::Asked::default();
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        if value.is_empty() {
            return Err(format!("{name}= is empty"));
        }
        let value = value.into_owned();
        let before = match &*name {
            "dc" => asked.dc.replace(value).is_some(),
            "near" => asked.near.replace(value).is_some(),
            "token-file" => asked.token_file.replace(value.into()).is_some(),
            "tag" => {
                asked.tags.push(value);
                false
            }
            _ => {
                return Err(format!(
                    "unknown parameter {name:?}: expected dc, near, tag or token-file"
                ));
            }
        };
        if before {
            return Err(format!("{name}= is given twice"));
        }
    }
    Consul::new(base(tls, authority, 8500)?, asked, settings)
}

fn etcd(rest: &str, api: Api, settings: &Settings) -> Result<Etcd, String> {
    let (authorities, query) = split(rest)?;
    no_parameters(query)?;
    let flags = &settings.etcd;
    let tls = flags.certificate.is_some() || flags.key.is_some() || flags.ca.is_some();
    let members =
        authorities.split(',').map(|member| base(tls, member, 2379)).collect::<Result<_, _>>()?;
    Etcd::new(members, api, flags)
}

fn docker(rest: &str, settings: &Settings) -> Result<Docker, String> {
    let new = |address| {
        let certificates = settings.docker.certificates.clone();
        Docker::new(Engine { address, certificates }, settings.healthy_only, false)
    };
    if rest.is_empty() {
        return Ok(Docker::new(settings.docker.clone(), settings.healthy_only, true));
    }
    if rest.starts_with('/') {
        return Ok(new(Address::Unix(rest.into())));
    }
    let (authority, query) = split(rest)?;
    no_parameters(query)?;
    match Authority::parse(authority)? {
        Authority { host, port: Some(port) } => Ok(new(Address::Tcp(format!("{host}:{port}")))),
        _ => Err(format!("{authority:?} has no port: expected host:port or /path/of.sock")),
    }
}

/// The whole rest is the path, absolute or relative.
fn file(rest: &str) -> Result<File, String> {
    match rest {
        "" => Err("no path: expected file:///absolute/path or file://relative/path".to_owned()),
        path => Ok(File::new(path.into())),
    }
}

fn dns(rest: &str) -> Result<Dns, String> {
    let (authority, query) = split(rest)?;
    no_parameters(query)?;
    let Authority { host, port } = Authority::parse(authority)?;
    let ip = match host {
        Host::V6(ip) => IpAddr::V6(ip),
        Host::Name(name) => {
            name.parse().map_err(|_| format!("resolver {name:?}: expected an IP address"))?
        }
    };
    Ok(Dns::new(SocketAddr::new(ip, port.unwrap_or(53))))
}

/// The authority and the query of what follows `scheme://`.
fn split(rest: &str) -> Result<(&str, &str), String> {
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    match path {
        "" => Ok((authority, query)),
        path => Err(format!("unexpected path {path:?} after the address")),
    }
}

fn no_parameters(query: &str) -> Result<(), String> {
    match form_urlencoded::parse(query.as_bytes()).next() {
        None => Ok(()),
        Some((name, _)) => Err(format!("unknown parameter {name:?}: expected none")),
    }
}

fn base(tls: bool, authority: &str, default_port: u16) -> Result<Url, String> {
    let Authority { host, port } = Authority::parse(authority)?;
    let (scheme, port) = (if tls { "https" } else { "http" }, port.unwrap_or(default_port));
    Url::parse(&format!("{scheme}://{host}:{port}/")).map_err(|e| format!("{authority:?}: {e}"))
}

/// `host[:port]`
struct Authority {
    host: Host,
    port: Option<u16>,
}

enum Host {
    /// A name, or an IPv4 address.
    Name(String),
    V6(Ipv6Addr),
}

impl Authority {
    fn parse(text: &str) -> Result<Self, String> {
        if text.contains('@') {
            return Err("no user may stand in the address: credentials come from the environment"
                .to_owned());
        }
        let wrong = || format!("{text:?}: expected host, host:port or [ipv6]:port");
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (host, port) = rest.split_once(']').ok_or_else(wrong)?;
                (Host::V6(host.parse().map_err(|_| wrong())?), port)
            }
            None => {
                let (host, port) = text.split_at(text.find(':').unwrap_or(text.len()));
                let valid = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
                if host.is_empty() || !host.bytes().all(valid) {
                    return Err(wrong());
                }
                (Host::Name(host.to_owned()), port)
            }
        };
        let port = match port {
            "" => None,
            port => {
                let port = port.strip_prefix(':').ok_or_else(wrong)?;
                let port: crate::model::Port = port.parse().map_err(|_| wrong())?;
                Some(port.get())
            }
        };
        Ok(Self { host, port })
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::V6(ip) => write!(f, "[{ip}]"),
        }
    }
}
