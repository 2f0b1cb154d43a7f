//! `-discovery` URIs.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use url::{Url, form_urlencoded};

use super::{
    ConsulSettings, Discovery, Options,
    consul::{self, Consul},
    dns::Dns,
    docker::Docker,
    etcd::{Api, Etcd},
    file::File,
    missing,
};
use crate::{
    docker::{Address, Engine},
    text::without_secrets,
};

/// A `-discovery` that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{uri:?}: {reason}")]
pub struct UriError {
    uri: String,
    reason: String,
}

impl UriError {
    pub(super) fn new(uri: &str, reason: impl fmt::Display) -> Self {
        Self { uri: without_secrets(uri), reason: reason.to_string() }
    }
}

const USER: &str = "no user may stand in the address: credentials come from the environment";

/// The content of a URI.
pub(super) struct Parsed {
    /// The name for `via=`.
    pub name: Arc<str>,
    pub discovery: Discovery,
    /// Whether its endpoints may have loopback addresses.
    pub loopback: bool,
}

/// Completes a `consul://` URI from the environment. The result names the server that is asked, even if the environment is
/// different later.
pub(super) fn complete(text: &str, consul: &ConsulSettings) -> Result<String, UriError> {
    let Some((scheme @ ("consul" | "consuls"), rest)) = text.split_once("://") else {
        return Ok(text.to_owned());
    };
    let (authority, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (scheme, authority) = match authority {
        "" | "/" => consul_address(scheme, consul).map_err(|reason| UriError::new(text, reason))?,
        given => (scheme, given.to_owned()),
    };
    let mut pairs: Vec<_> = query.split('&').filter(|pair| !pair.is_empty()).collect();
    let said: Vec<_> = [("ns", &consul.namespace), ("partition", &consul.partition)]
        .into_iter()
        .filter(|(name, _)| {
            !form_urlencoded::parse(query.as_bytes()).any(|(said, _)| said == *name)
        })
        .filter_map(|(name, value)| {
            let value: String =
                form_urlencoded::byte_serialize(value.as_ref()?.as_bytes()).collect();
            Some(format!("{name}={value}"))
        })
        .collect();
    pairs.extend(said.iter().map(String::as_str));
    let mark = if pairs.is_empty() { "" } else { "?" };
    Ok(format!("{scheme}://{authority}{mark}{}", pairs.join("&")))
}

/// The address for a `consul://` URI without one, from the environment, and its scheme.
fn consul_address<'a>(
    scheme: &'a str,
    consul: &ConsulSettings,
) -> Result<(&'a str, String), String> {
    let Some(address) = &consul.address else { return Ok((scheme, "127.0.0.1:8500".to_owned())) };
    let (scheme, authority) = match address.split_once("://") {
        Some(("https", authority)) => ("consuls", authority),
        Some(("http", authority)) => (scheme, authority),
        None => (scheme, address.as_str()),
        Some(_) => ("", ""),
    };
    // The default port is the protocol's, as in all Consul tools.
    let port = if consul.tls || scheme == "consuls" { 443 } else { 80 };
    let read = Authority::parse(authority.trim_end_matches('/')).map_err(|_| {
        format!(
            "CONSUL_HTTP_ADDR {:?}: expected host:port, http://host:port or https://host:port",
            without_secrets(address)
        )
    })?;
    Ok((scheme, format!("{}:{}", read.host, read.port.unwrap_or(port))))
}

pub(super) fn parse(text: &str, settings: &Options) -> Result<Parsed, UriError> {
    let (scheme, rest) = text.split_once("://").unwrap_or((text, ""));
    let (rest, loopback) = match scheme {
        // The path of a file may contain any characters.
        "file" => (rest.to_owned(), false),
        _ => without_loopback(rest).map_err(|reason| UriError::new(text, reason))?,
    };
    let rest = rest.as_str();
    let (name, discovery) = match scheme {
        "consul" => ("consul", consul(rest, settings.consul.tls, settings).map(Discovery::Consul)),
        "consuls" => ("consul", consul(rest, true, settings).map(Discovery::Consul)),
        "etcd" => ("etcd", etcd(scheme, rest, Api::Any, settings).map(Discovery::Etcd)),
        "etcd2" => ("etcd", etcd(scheme, rest, Api::V2, settings).map(Discovery::Etcd)),
        "etcd3" => ("etcd", etcd(scheme, rest, Api::V3, settings).map(Discovery::Etcd)),
        "docker" => ("docker", docker(rest, settings).map(Discovery::Docker)),
        "file" => ("file", file(rest).map(Discovery::File)),
        "dns" => ("dns", dns(rest).map(Discovery::Dns)),
        "marathon" => return Err(UriError::new(text, "marathon is not supported")),
        _ => {
            let expected = "expected consul://, consuls://, etcd://, etcd2://, etcd3://, docker://, file:// or dns://";
            let reason = match meant(text) {
                Some(meant) => format!("{expected}; did you mean {meant}?"),
                None => expected.to_owned(),
            };
            return Err(UriError::new(text, reason));
        }
    };
    match discovery {
        Ok(discovery) => Ok(Parsed { name: name.into(), discovery, loopback }),
        // The reason repeats parts of the text, which may be parts of a password.
        Err(_) if rest.contains('@') => Err(UriError::new(text, USER)),
        Err(reason) => Err(UriError::new(text, reason)),
    }
}

/// A suggestion for a text without a known scheme. `None` if there is no clear one, or if the text may contain a password.
fn meant(text: &str) -> Option<String> {
    const SCHEMES: [&str; 8] =
        ["consul", "consuls", "etcd", "etcd2", "etcd3", "docker", "file", "dns"];
    if text.contains(['@', '?']) || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return None;
    }
    let is_port = |address: &str, port: &str| address.trim_end_matches('/').ends_with(port);
    // Only an address: the port suggests the registry.
    let by_port = |address: &str| match address {
        _ if is_port(address, ":2379") || is_port(address, ":4001") => Some("etcd"),
        _ if is_port(address, ":8500") => Some("consul"),
        _ if is_port(address, ":8501") => Some("consuls"),
        _ if is_port(address, ":2375") || is_port(address, ":2376") => Some("docker"),
        _ => None,
    };
    let (scheme, rest) = match text.split_once("://") {
        Some((scheme, rest)) => (scheme.to_ascii_lowercase(), rest),
        None => match text.split_once([':', '/']) {
            Some((scheme, rest)) if SCHEMES.contains(&&*scheme.to_ascii_lowercase()) => {
                (scheme.to_ascii_lowercase(), rest)
            }
            Some(("unix", rest)) => ("unix".to_owned(), rest),
            _ if text.starts_with('/') => ("file".to_owned(), text),
            _ => (String::new(), text),
        },
    };
    let address = rest.trim_matches('/');
    match &*scheme {
        "file" | "unix" => {
            let scheme = if scheme == "file" { "file" } else { "docker" };
            Some(format!("{scheme}:///{address}"))
        }
        known if SCHEMES.contains(&known) => Some(format!("{known}://{address}")),
        "https" if by_port(address) == Some("consul") => Some(format!("consuls://{address}")),
        "" | "http" | "https" | "tcp" => Some(format!("{}://{address}", by_port(address)?)),
        // A misspelled scheme.
        other => {
            let near = missing::near(other, SCHEMES.into_iter()).into_iter().next()?;
            Some(format!("{near}://{rest}"))
        }
    }
}

/// Removes the parameter that is common to all registries from the part after `scheme://`. Also returns whether it was
/// there.
fn without_loopback(rest: &str) -> Result<(String, bool), String> {
    let Some((authority, query)) = rest.split_once('?') else {
        return Ok((rest.to_owned(), false));
    };
    let (given, others): (Vec<_>, Vec<_>) =
        query.split('&').partition(|part| part.split('=').next() == Some("loopback"));
    match given[..] {
        [] => Ok((rest.to_owned(), false)),
        ["loopback=allow"] if others.is_empty() => Ok((authority.to_owned(), true)),
        ["loopback=allow"] => Ok((format!("{authority}?{}", others.join("&")), true)),
        [_] => Err("loopback= has another value: expected loopback=allow".to_owned()),
        [..] => Err("loopback= is given twice".to_owned()),
    }
}
const PARAMETERS: &str = "expected dc, loopback, near, ns, partition, tag or token-file";

fn consul(rest: &str, tls: bool, settings: &Options) -> Result<Consul, String> {
    let (authority, query) = split(rest)?;
    let mut asked = consul::ConsulParameters::default();
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        let is_empty = value.is_empty();
        let value = value.into_owned();
        let before = match &*name {
            "dc" => asked.dc.replace(value).is_some(),
            "near" => asked.near.replace(value).is_some(),
            "ns" => asked.namespace.replace(value).is_some(),
            "partition" => asked.partition.replace(value).is_some(),
            "token-file" => asked.token_file.replace(value.into()).is_some(),
            "tag" => {
                asked.tags.push(value);
                false
            }
            // The name may be a token, so it is not repeated.
            _ if is_empty => return Err(format!("a parameter without a value: {PARAMETERS}")),
            _ => return Err(format!("unknown parameter {name:?}: {PARAMETERS}")),
        };
        if is_empty {
            return Err(format!("{name}= is empty"));
        }
        if before {
            return Err(format!("{name}= is given twice"));
        }
    }
    Consul::new(base(tls, authority, 8500)?, asked, settings)
}

/// Each member may have the scheme again, as the original allowed.
fn etcd(scheme: &str, rest: &str, api: Api, settings: &Options) -> Result<Etcd, String> {
    let (members, query) = rest.split_once('?').unwrap_or((rest, ""));
    no_parameters(query)?;
    let flags = &settings.etcd;
    let tls = flags.certificate.is_some() || flags.key.is_some() || flags.ca.is_some();
    let member = |text: &str| {
        let text = text.trim();
        let repeated = text.strip_prefix(scheme).and_then(|rest| rest.strip_prefix("://"));
        let text = repeated.unwrap_or(text);
        if text.contains("://") {
            return Err(format!("{text:?}: expected {scheme}:// or no scheme before each member"));
        }
        let (authority, _) = split(text)?;
        base(tls, authority, 2379)
    };
    let members = members.split(',').map(member).collect::<Result<_, _>>()?;
    Etcd::new(members, api, flags)
}

fn docker(rest: &str, settings: &Options) -> Result<Docker, String> {
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

/// The whole rest is the path: absolute, a plain name, or relative with a dot at its start.
fn file(rest: &str) -> Result<File, String> {
    match rest {
        "" => Err("no path: expected file:///absolute/path or file://name".to_owned()),
        // A path after two slashes without a dot is ambiguous: the user probably means an absolute path.
        path if path.contains('/') && !path.starts_with(['/', '.']) => {
            let absolute = path.strip_prefix("localhost/").unwrap_or(path);
            Err(format!(
                "the path {path:?} is relative: expected file:///{absolute}, or file://./{path} for one below the folder in which embassy was started"
            ))
        }
        path => Ok(File::new(path.into())),
    }
}

fn dns(rest: &str) -> Result<Dns, String> {
    let (authority, query) = split(rest)?;
    let mut hold = None;
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        if name != "hold" {
            return Err(format!("unknown parameter {name:?}: expected hold or loopback"));
        }
        // At most a day: a longer time would be of no use with DNS.
        let seconds = value.strip_suffix('s').unwrap_or(&value).parse().ok();
        let seconds = seconds.filter(|seconds| *seconds <= 24 * 60 * 60);
        let wrong = || format!("hold={value}: expected seconds from 0 to 86400");
        if hold.replace(Duration::from_secs(seconds.ok_or_else(wrong)?)).is_some() {
            return Err("hold= is given twice".to_owned());
        }
    }
    let Authority { host, port } = Authority::parse(authority)?;
    let ip = match host {
        Host::V6(ip) => IpAddr::V6(ip),
        Host::Name(name) => {
            name.parse().map_err(|_| format!("resolver {name:?}: expected an IP address"))?
        }
    };
    Ok(Dns::new(SocketAddr::new(ip, port.unwrap_or(53)), hold.unwrap_or(Dns::HOLD)))
}

/// Splits the part after `scheme://` into authority and query.
fn split(rest: &str) -> Result<(&str, &str), String> {
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    match path {
        "" => Ok((authority, query)),
        path => Err(format!(
            "unexpected path {path:?} after the address {authority:?}: expected none; a service or a branch stands in the descriptor"
        )),
    }
}

fn no_parameters(query: &str) -> Result<(), String> {
    match form_urlencoded::parse(query.as_bytes()).next() {
        None => Ok(()),
        Some((_, value)) if value.is_empty() => {
            Err("a parameter: expected loopback=allow".to_owned())
        }
        Some((name, _)) => Err(format!("unknown parameter {name:?}: expected loopback")),
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
            return Err(USER.to_owned());
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

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;

    use super::*;
    use crate::discovery::EtcdSettings;

    fn settings() -> Options {
        Options {
            healthy_only: true,
            docker: Engine { address: Address::Unix("/run/own.sock".into()), certificates: None },
            consul: ConsulSettings::default(),
            etcd: EtcdSettings::default(),
        }
    }

    fn name(text: &str) -> String {
        parse(text, &settings()).map(|parsed| parsed.name.to_string()).unwrap()
    }

    fn consul(text: &str, settings: &Options) -> Consul {
        match parse(text, settings) {
            Ok(Parsed { discovery: Discovery::Consul(consul), .. }) => consul,
            _ => panic!("{text} is no consul"),
        }
    }

    fn etcd(text: &str, settings: &Options) -> Etcd {
        match parse(text, settings) {
            Ok(Parsed { discovery: Discovery::Etcd(etcd), .. }) => etcd,
            _ => panic!("{text} is no etcd"),
        }
    }

    #[test]
    fn a_discovery_is_named_by_its_scheme_without_version_and_tls() {
        for (text, expected) in [
            ("consul://h", "consul"),
            ("consuls://h", "consul"),
            ("etcd://h", "etcd"),
            ("etcd2://h", "etcd"),
            ("etcd3://h", "etcd"),
            ("docker://", "docker"),
            ("docker://10.0.0.1:2375", "docker"),
            ("docker:///run/other.sock", "docker"),
            ("file:///etc/services.toml", "file"),
            ("file://services.toml", "file"),
            ("file://./folder/services.toml", "file"),
            ("file://../services.toml", "file"),
            ("dns://10.0.0.1", "dns"),
            ("dns://[fd00::1]:5353", "dns"),
        ] {
            assert_eq!(name(text), expected);
        }
    }

    #[test]
    fn consul_is_where_the_uri_says() {
        for (text, base) in [
            ("consul://127.0.0.1:8500", "http://127.0.0.1:8500/"),
            ("consul://consul.example", "http://consul.example:8500/"),
            ("consul://consul.example/", "http://consul.example:8500/"),
            ("consul://[::1]", "http://[::1]:8500/"),
            ("consul://[::1]:80", "http://[::1]/"),
            ("consuls://h:8501", "https://h:8501/"),
        ] {
            assert_eq!(consul(text, &settings()).client.base().as_str(), base);
        }
        let mut tls = settings();
        tls.consul.tls = true;
        assert_eq!(consul("consul://h:8501", &tls).client.base().as_str(), "https://h:8501/");
    }

    #[test]
    fn every_parameter_of_consul_is_read() {
        let text =
            "consul://h?dc=dc-2&token-file=/run/a%20token&near=_agent&tag=a&tag=b&ns=n&partition=p";
        assert_eq!(
            consul(text, &settings()).asked,
            consul::ConsulParameters {
                dc: Some("dc-2".to_owned()),
                token_file: Some("/run/a token".into()),
                near: Some("_agent".to_owned()),
                namespace: Some("n".to_owned()),
                partition: Some("p".to_owned()),
                tags: vec!["a".to_owned(), "b".to_owned()],
            }
        );
    }

    #[test]
    fn every_registry_may_be_allowed_to_name_loopback() {
        let loopback =
            |text: &str| parse(text, &settings()).unwrap_or_else(|e| panic!("{e}")).loopback;
        for uri in ["consul://h", "etcd://a,b", "docker://h:2375", "dns://10.0.0.1"] {
            assert!(!loopback(uri), "{uri}");
            assert!(loopback(&format!("{uri}?loopback=allow")), "{uri}");
        }
        let asked = consul("consul://h?dc=a&loopback=allow&near=b", &settings()).asked;
        assert_eq!((asked.dc.as_deref(), asked.near.as_deref()), (Some("a"), Some("b")));
        // This is a part of the file's name.
        assert!(!loopback("file://a?loopback=allow"));
    }

    #[test]
    fn the_hold_of_dns_is_read() {
        for (text, seconds) in [
            ("dns://10.0.0.1", 30),
            ("dns://10.0.0.1?hold=0", 0),
            ("dns://10.0.0.1:5353?hold=90s", 90),
        ] {
            match parse(text, &settings()) {
                Ok(Parsed { discovery: Discovery::Dns(dns), .. }) => {
                    assert_eq!(dns.hold.as_secs(), seconds, "{text}");
                }
                _ => panic!("{text} is no dns"),
            }
        }
    }

    #[test]
    fn the_environment_says_what_a_uri_of_consul_leaves_out() {
        let with = |address: Option<&str>, namespace: Option<&str>| ConsulSettings {
            address: address.map(str::to_owned),
            namespace: namespace.map(str::to_owned),
            partition: namespace.map(|_| "p&q".to_owned()),
            ..ConsulSettings::default()
        };
        let (none, addr) = (with(None, None), with(Some("h:1"), Some("n")));
        for (text, settings, expected) in [
            ("consul://", &none, "consul://127.0.0.1:8500"),
            ("consuls://", &none, "consuls://127.0.0.1:8500"),
            ("consul://a:1?dc=b", &none, "consul://a:1?dc=b"),
            ("consul://", &addr, "consul://h:1?ns=n&partition=p%26q"),
            ("consul:///?dc=b", &addr, "consul://h:1?dc=b&ns=n&partition=p%26q"),
            ("consul://a?ns=m", &addr, "consul://a?ns=m&partition=p%26q"),
            ("consul://a?partition=m&tag=x", &addr, "consul://a?partition=m&tag=x&ns=n"),
            ("etcd://a", &addr, "etcd://a"),
            ("consul://", &with(Some("http://h:1/"), None), "consul://h:1"),
            ("consul://", &with(Some("https://h"), None), "consuls://h:443"),
            ("consul://", &with(Some("h"), None), "consul://h:80"),
            ("consuls://", &with(Some("[::1]:8501"), None), "consuls://[::1]:8501"),
            ("consuls://", &with(Some("h"), None), "consuls://h:443"),
            // CONSUL_HTTP_SSL
            ("consul://", &ConsulSettings { tls: true, ..with(Some("h"), None) }, "consul://h:443"),
        ] {
            assert_eq!(complete(text, settings).as_deref(), Ok(expected), "{text}");
        }
        for wrong in ["unix:///run/consul.sock", "https://", "h:0", "https://h/path", "a@h"] {
            let error = complete("consul://", &with(Some(wrong), None)).unwrap_err().to_string();
            let shown = without_secrets(wrong);
            assert!(
                error.contains(&format!("CONSUL_HTTP_ADDR {shown:?}: expected host")),
                "{error}"
            );
        }
        let secret = with(Some("http://user:s3cret@h:8500"), None);
        let error = complete("consul://", &secret).unwrap_err().to_string();
        assert!(!error.contains("s3cret"), "{error}");
        // The environment is not used if the URI has an address.
        let unused = with(Some("unix:///run/consul.sock"), None);
        assert_eq!(complete("consul://a", &unused).as_deref(), Ok("consul://a"));
    }

    #[test]
    fn etcd_may_have_many_members_and_a_flag_of_tls_is_enough_for_tls() {
        let members =
            |etcd: Etcd| etcd.client.members().iter().map(Url::to_string).collect::<Vec<_>>();
        let text = "etcd://a:4001,10.0.0.1,[::1]:2380";
        let plain = etcd(text, &settings());
        assert_eq!(plain.api, Api::Any);
        let addresses = ["a:4001", "10.0.0.1:2379", "[::1]:2380"];
        assert_eq!(members(plain), addresses.map(|a| format!("http://{a}/")));
        assert_eq!(etcd("etcd2://h", &settings()).api, Api::V2);
        assert_eq!(etcd("etcd3://h", &settings()).api, Api::V3);
        for text in [
            "etcd://a:4001,etcd://10.0.0.1,etcd://[::1]:2380",
            "etcd://a:4001/, etcd://10.0.0.1/,[::1]:2380/",
        ] {
            assert_eq!(members(etcd(text, &settings())), addresses.map(|a| format!("http://{a}/")));
        }
        let path = || Some(PathBuf::from("file.pem"));
        for (certificate, key, ca) in
            [(None, None, path()), (path(), path(), None), (path(), path(), path())]
        {
            let etcd_flags = EtcdSettings { certificate, key, ca, user: None };
            let tls = Options { etcd: etcd_flags, ..settings() };
            assert_eq!(members(etcd(text, &tls)), addresses.map(|a| format!("https://{a}/")));
        }
    }

    #[test]
    fn half_a_client_certificate_is_refused_by_the_names_that_the_user_knows() {
        let path = || Some(PathBuf::from("file.pem"));
        let mut half = settings();
        half.etcd.certificate = path();
        half.consul.key = path();
        let refusal = |text: &str| parse(text, &half).err().unwrap().to_string();
        assert_eq!(
            refusal("etcd://h"),
            "\"etcd://h\": -etcd-cert is given without -etcd-keycert: expected both or neither"
        );
        assert_eq!(
            refusal("consuls://h"),
            "\"consuls://h\": CONSUL_CLIENT_KEY is given without CONSUL_CLIENT_CERT: expected both or neither"
        );
    }

    /// Whole messages are compared: they are what a user reads on the terminal.
    #[test]
    fn each_wrong_uri_has_its_reason() {
        const SCHEMES: &str = "expected consul://, consuls://, etcd://, etcd2://, etcd3://, docker://, file:// or dns://";
        let meant = |uri: &str| format!("{SCHEMES}; did you mean {uri}?");
        const HOST: &str = "expected host, host:port or [ipv6]:port";
        const LOOPBACK: &str = "loopback= has another value: expected loopback=allow";
        for (text, reason) in [
            ("", SCHEMES.to_owned()),
            ("127.0.0.1:8500", meant("consul://127.0.0.1:8500")),
            ("127.0.0.1:2379", meant("etcd://127.0.0.1:2379")),
            ("127.0.0.1", SCHEMES.to_owned()),
            ("zk://h", SCHEMES.to_owned()),
            ("Consul://h", meant("consul://h")),
            ("consul:127.0.0.1:8500", meant("consul://127.0.0.1:8500")),
            ("consul//127.0.0.1:8500", meant("consul://127.0.0.1:8500")),
            ("consul:/127.0.0.1:8500", meant("consul://127.0.0.1:8500")),
            ("etcd:127.0.0.1:2379", meant("etcd://127.0.0.1:2379")),
            ("http://127.0.0.1:8500", meant("consul://127.0.0.1:8500")),
            ("http://127.0.0.1:8500/", meant("consul://127.0.0.1:8500")),
            ("https://c.example:8501", meant("consuls://c.example:8501")),
            ("http://e.example:2379", meant("etcd://e.example:2379")),
            ("http://h", SCHEMES.to_owned()),
            ("consol://h:8500", meant("consul://h:8500")),
            ("unix:///var/run/docker.sock", meant("docker:///var/run/docker.sock")),
            ("unix:/var/run/docker.sock", meant("docker:///var/run/docker.sock")),
            ("tcp://10.0.0.1:2375", meant("docker://10.0.0.1:2375")),
            ("/etc/services.toml", meant("file:///etc/services.toml")),
            ("file:/etc/services.toml", meant("file:///etc/services.toml")),
            (
                "file://tmp/x",
                "the path \"tmp/x\" is relative: expected file:///tmp/x, or file://./tmp/x for one below the folder in which embassy was started"
                    .to_owned(),
            ),
            (
                "file://localhost/etc/x",
                "the path \"localhost/etc/x\" is relative: expected file:///etc/x, or file://./localhost/etc/x for one below the folder in which embassy was started"
                    .to_owned(),
            ),
            ("marathon://h:8080", "marathon is not supported".to_owned()),
            ("consul", format!("\"\": {HOST}")),
            ("consul://h:0", format!("\"h:0\": {HOST}")),
            ("consul://h:http", format!("\"h:http\": {HOST}")),
            ("consul://::1:8500", format!("\"::1:8500\": {HOST}")),
            ("consul://[::1", format!("\"[::1\": {HOST}")),
            ("consul://[::g]", format!("\"[::g]\": {HOST}")),
            ("consul://a b", format!("\"a b\": {HOST}")),
            ("consul://1.2.3.4.5", "\"1.2.3.4.5\": invalid IPv4 address".to_owned()),
            (
                "consul://h:8500/v1",
                "unexpected path \"v1\" after the address \"h:8500\": expected none; a service or a branch stands in the descriptor"
                    .to_owned(),
            ),
            (
                "consul://h?token=x",
                "unknown parameter \"token\": expected dc, loopback, near, ns, partition, tag or token-file"
                    .to_owned(),
            ),
            ("consul://h?dc=", "dc= is empty".to_owned()),
            ("consul://h?dc=a&dc=b", "dc= is given twice".to_owned()),
            ("consul://h?loopback=yes", LOOPBACK.to_owned()),
            ("etcd://h?loopback", LOOPBACK.to_owned()),
            ("dns://10.0.0.1?loopback=allow&loopback=allow", "loopback= is given twice".to_owned()),
            ("etcd://a,,b", format!("\"\": {HOST}")),
            ("etcd://a?dc=b", "unknown parameter \"dc\": expected loopback".to_owned()),
            (
                "etcd://a,etcd2://b",
                "\"etcd2://b\": expected etcd:// or no scheme before each member".to_owned(),
            ),
            (
                "etcd://a/b,c",
                "unexpected path \"b\" after the address \"a\": expected none; a service or a branch stands in the descriptor"
                    .to_owned(),
            ),
            ("etcd://a?dc=b", "unknown parameter \"dc\": expected loopback".to_owned()),
            ("docker://h", "\"h\" has no port: expected host:port or /path/of.sock".to_owned()),
            (
                "file://",
                "no path: expected file:///absolute/path or file://name".to_owned(),
            ),
            ("dns://ns.example", "resolver \"ns.example\": expected an IP address".to_owned()),
            ("dns://", format!("\"\": {HOST}")),
            ("dns://10.0.0.1?ttl=1", "unknown parameter \"ttl\": expected hold or loopback".to_owned()),
            ("dns://10.0.0.1?hold=1&hold=2", "hold= is given twice".to_owned()),
            ("dns://10.0.0.1?hold=-1", "hold=-1: expected seconds from 0 to 86400".to_owned()),
            (
                "dns://10.0.0.1?hold=86401s",
                "hold=86401s: expected seconds from 0 to 86400".to_owned(),
            ),
        ] {
            let error = parse(text, &settings()).map(|parsed| parsed.name).expect_err(text);
            assert_eq!(error.to_string(), format!("{:?}: {reason}", without_secrets(text)));
        }
    }

    #[test]
    fn a_password_in_a_uri_is_refused_and_not_repeated() {
        let error = parse("consul://joe:hunter2@h:8500", &settings()).err().unwrap().to_string();
        assert_eq!(
            error,
            "\"consul://(hidden)@h:8500\": no user may stand in the address: credentials come from the environment"
        );
        for text in [
            "consul://h?token=hunter2",
            "consul://h?hunter2",
            "etcd://h?hunter2",
            "etcd://h?token=hunter2",
            "consul://joe:hun/hunter2@h",
            "etcd://joe:hun?hunter2@h",
            "etcd://joe:hunter2?hun@h",
            "zk://:hunter2@h",
            "joe:hunter2@h:8500",
            "dns://joe:hunter2@127.0.0.1",
            "docker://joe:hunter2@h:2375",
            "marathon://joe:hunter2@h",
        ] {
            let error = parse(text, &settings()).map(|parsed| parsed.name).expect_err(text);
            assert!(!error.to_string().contains("hunter2"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_uri_panics(text in "(consuls?|etcd[23]?|docker|file|dns|\\PC{0,6})://(\\PC|[0-9a-z:/?&=,@\\[\\]]){0,30}") {
            let _ = parse(&text, &settings());
        }
    }
}
