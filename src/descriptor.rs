//! The text with which a consumer asks for a service: `<service>[<tag>,<tag>...];<port>[;<key>=<value>...]`. Pure.

use std::{fmt, str::FromStr, sync::Arc, time::Duration};

use crate::{
    model::{NotAPort, Port, Protocol, ServiceName, Tags, port_of},
    word::{Word, worded},
};

/// A parsed descriptor: one service on one port, and how to treat its connections.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Descriptor {
    pub service: ServiceName,
    /// Every one must be present on an endpoint.
    pub tags: Tags,
    /// The port that the consumer dials.
    pub port: Port,
    /// What follows the port: `/udp`, or `/tcp` or nothing, which mean the same.
    pub protocol: Protocol,
    /// `lb=`; if absent, the command line's `--lb`.
    pub balance: Option<Balance>,
    /// `drain=`: what happens to the live connections of an endpoint that goes away.
    pub drain: EndpointDrain,
    /// `dc=`: the Consul datacentre to ask.
    pub dc: Option<Arc<str>>,
    /// `via=`: the discovery to ask, by its scheme; if absent, the first one.
    pub via: Option<Arc<str>>,
    /// `check=tcp`: probe the endpoints actively.
    pub check: Option<Check>,
    /// `proxy=`: announce the consumer to the endpoint with the PROXY protocol.
    pub proxy: Option<ProxyProtocol>,
    /// `user-timeout=`: how long data sent to the endpoint may stay unacknowledged. 0: as long as the kernel retransmits.
    /// If absent, the command line's `--user-timeout`.
    pub user_timeout: Option<Duration>,
    /// `path=`: the path of its connections. If absent, the command line's `--path`.
    pub path: Option<PathChoice>,
}

/// Checks a time for `user-timeout=` and `--user-timeout`: 0, or 5 s to a day. `None` for others. A shorter time may be
/// over while a connection is opened (TCP_USER_TIMEOUT counts from the first SYN), and leaves no room for keepalive.
pub fn user_timeout(time: Duration) -> Option<Duration> {
    const LEAST: Duration = Duration::from_secs(5);
    const MOST: Duration = Duration::from_secs(24 * 60 * 60);
    (time.is_zero() || (LEAST..=MOST).contains(&time)).then_some(time)
}

worded! {
    /// How connections are spread over endpoints.
    pub enum Balance {
        /// each endpoint in turn
        RoundRobin = "rr",
        /// the endpoint with the fewest open connections, over all routes
        LeastConnections = "leastconn",
    }
}

worded! {
    /// Which path a binding's connections are to take.
    pub enum PathChoice {
        /// through embassy
        Proxy = "proxy",
        /// from the consumer to the endpoint, if the kernel can choose the endpoint
        Kernel = "kernel",
        /// the same, while every endpoint is proved and can be reached from the consumer's own network
        Auto = "auto",
    }
}

#[expect(clippy::derivable_impls, reason = "the macro that declares it derives none")]
impl Default for Balance {
    fn default() -> Self {
        Self::RoundRobin
    }
}

/// What happens to the open connections of an endpoint that is removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum EndpointDrain {
    /// They stay open until one side ends them.
    #[default]
    Keep,
    /// They are reset at once.
    Kill,
    /// They are reset after this time: whole seconds, at least one.
    After(Duration),
}

/// How endpoints are probed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Check {
    /// A TCP connection that opens.
    Tcp,
}

/// The version of the PROXY protocol (haproxy.org/download/3.0/doc/proxy-protocol.txt).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProxyProtocol {
    V1,
    V2,
}

/// Why a descriptor is invalid. Each error names the part, its value and what was expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DescriptorError {
    #[error("longer than {LONGEST} bytes")]
    TooLong,
    #[error("no port: expected <service>;<port>")]
    NoPort,
    #[error(transparent)]
    Mistake(#[from] Mistake),
    #[error("no service name before the {0:?}")]
    NoService(char),
    #[error(
        "service {service:?} has the character {character:?}: expected only A-Z a-z 0-9 / . _ * @ -"
    )]
    Service { service: String, character: char },
    #[error("the tag list is not closed: expected ']'")]
    TagsNotClosed,
    #[error("{0:?} after the tag list: expected ';' and a port")]
    AfterTags(String),
    #[error("an empty tag in [{0}]: expected [tag,tag]")]
    EmptyTag(String),
    #[error("tag {tag:?} has the character {character:?}: expected none of white space , ; [ ]")]
    Tag { tag: String, character: char },
    #[error(transparent)]
    Port(#[from] NotAPort),
    #[error("protocol {0:?}: expected tcp or udp")]
    Protocol(String),
    #[error("option {0:?}: expected <key>=<value>")]
    OptionForm(String),
    #[error("unknown option {0:?}: {OPTIONS}")]
    UnknownOption(String),
    #[error("option {0} is given twice")]
    RepeatedOption(String),
    #[error("{key}={value:?}: expected {expected}")]
    OptionValue { key: &'static str, value: String, expected: &'static str },
    #[error("{option}: cannot be used with /udp: {why}")]
    NotWithUdp { option: &'static str, why: &'static str },
}

/// A common mistake, with a sentence of its own, which repeats nothing of the value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Mistake {
    #[error("no port: expected <service>;<port>, with a semicolon in place of the {0}")]
    Separator(&'static str),
    #[error("no port after the semicolon: expected <service>;<port>")]
    PortMissing,
    #[error("white space before or after the port: expected <service>;<port> without it")]
    WhiteSpace,
    #[error("service and port are in the wrong order: expected <service>;<port>")]
    Order,
    #[error("more than one port: expected one; declare each port in a variable of its own")]
    SeveralPorts,
    #[error("the port is above 65535: expected a number from 1 to 65535")]
    PortTooHigh,
}

impl Mistake {
    /// What may have been meant by a port that is none.
    fn in_port(service: &str, port: &str) -> Option<Self> {
        let is_port = |text: &str| text.parse::<Port>().is_ok();
        let bare = port.trim();
        let first = bare.split('/').next().unwrap_or_default();
        let mut parts = bare.split([',', '-', ' ']).map(str::trim).filter(|part| !part.is_empty());
        Some(match () {
            () if bare.is_empty() => Self::PortMissing,
            () if bare != port && is_port(first) => Self::WhiteSpace,
            () if is_port(service) && ServiceName::new(bare).is_some() && !is_port(first) => {
                Self::Order
            }
            () if parts.clone().count() > 1 && parts.all(is_port) => Self::SeveralPorts,
            () if !first.is_empty() && first.bytes().all(|byte| byte.is_ascii_digit()) => {
                // 0 and 007 are no such mistake.
                return (first.trim_start_matches('0').len() > 4).then_some(Self::PortTooHigh);
            }
            () => return None,
        })
    }

    /// What stands in place of the semicolon, in a text without one.
    fn in_separator(text: &str) -> Option<Self> {
        let separators = [(':', "colon"), (' ', "space"), (',', "comma"), ('=', "equals sign")];
        separators.into_iter().find_map(|(separator, name)| {
            let (service, port) = text.rsplit_once(separator)?;
            let is_one =
                ServiceName::new(service.trim_end()).is_some() && port_and_protocol(port).is_ok();
            is_one.then_some(Self::Separator(name))
        })
    }
}

impl DescriptorError {
    /// The error text without any part of the value: a variable such as `BACKEND_URL` may contain a password.
    pub fn without_value(&self) -> String {
        match self {
            // These contain nothing of the value, except one character.
            Self::TooLong
            | Self::NoPort
            | Self::Mistake(_)
            | Self::NoService(_)
            | Self::TagsNotClosed => self.to_string(),
            Self::Service { character, .. } => format!(
                "the service name has the character {character:?}: expected only A-Z a-z 0-9 / . _ * @ -"
            ),
            Self::AfterTags(_) => "text after the tag list: expected ';' and a port".to_owned(),
            Self::EmptyTag(_) => "an empty tag: expected [tag,tag]".to_owned(),
            Self::Tag { character, .. } => format!(
                "a tag has the character {character:?}: expected none of white space , ; [ ]"
            ),
            Self::Port(_) => "the port is not a number from 1 to 65535".to_owned(),
            Self::Protocol(_) => "the protocol after the port: expected tcp or udp".to_owned(),
            Self::OptionForm(_) => "text after the port: expected <key>=<value>".to_owned(),
            Self::UnknownOption(_) => format!("an unknown option: {OPTIONS}"),
            Self::RepeatedOption(key) => format!("option {key} is given twice"),
            Self::OptionValue { key, expected, .. } => format!("{key}: expected {expected}"),
            // Nothing of the value but the names of our own options.
            Self::NotWithUdp { .. } => self.to_string(),
        }
    }
}

/// Maximum length of a descriptor in bytes. Real ones are far shorter.
pub const LONGEST: usize = 1024;

const OPTIONS: &str = "expected one of lb, drain, dc, via, check, proxy, user-timeout, path";

impl FromStr for Descriptor {
    type Err = DescriptorError;

    /// The whole text must match. Nothing is trimmed.
    fn from_str(text: &str) -> Result<Self, DescriptorError> {
        if text.len() > LONGEST {
            return Err(DescriptorError::TooLong);
        }
        let (service, tags, rest) = service_and_tags(text)?;
        let mut fields = rest.split(';');
        let port = fields.next().unwrap_or_default();
        let (port, protocol) = port_and_protocol(port).map_err(|error| {
            let mistake = Mistake::in_port(&service.to_string(), port);
            match error {
                DescriptorError::Port(_) => mistake.map_or(error, DescriptorError::Mistake),
                error => error,
            }
        })?;
        let mut descriptor = Self {
            service,
            tags,
            port,
            protocol,
            balance: None,
            drain: EndpointDrain::Keep,
            dc: None,
            via: None,
            check: None,
            proxy: None,
            user_timeout: None,
            path: None,
        };
        let mut seen = Vec::new();
        for field in fields {
            let (key, value) =
                field.split_once('=').ok_or_else(|| match field.parse::<Port>() {
                    Ok(_) => Mistake::SeveralPorts.into(),
                    Err(_) => DescriptorError::OptionForm(field.to_owned()),
                })?;
            if seen.contains(&key) {
                return Err(DescriptorError::RepeatedOption(key.to_owned()));
            }
            descriptor.set(key, value)?;
            seen.push(key);
        }
        match protocol {
            Protocol::Tcp => Ok(descriptor),
            Protocol::Udp => descriptor.without_connections(),
        }
    }
}

impl Descriptor {
    /// Refuses what only a connection can have.
    fn without_connections(self) -> Result<Self, DescriptorError> {
        let refused = [
            (self.proxy.is_some(), "proxy=", "a datagram has no PROXY protocol header"),
            (self.user_timeout.is_some(), "user-timeout=", "UDP acknowledges nothing"),
            (
                self.drain != EndpointDrain::Keep,
                "drain= other than keep",
                "UDP has no connections to reset",
            ),
            (
                self.path == Some(PathChoice::Proxy),
                "path=proxy",
                "UDP takes the kernel path only; remove the option",
            ),
        ];
        match refused.into_iter().find(|(is_there, ..)| *is_there) {
            Some((_, option, why)) => Err(DescriptorError::NotWithUdp { option, why }),
            None => Ok(self),
        }
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), DescriptorError> {
        let wrong =
            |key, expected| DescriptorError::OptionValue { key, value: value.to_owned(), expected };
        match key {
            "lb" => {
                self.balance = Some(match value {
                    "rr" => Balance::RoundRobin,
                    "leastconn" => Balance::LeastConnections,
                    _ => return Err(wrong("lb", "rr or leastconn")),
                });
            }
            "drain" => {
                self.drain = match value {
                    "keep" => EndpointDrain::Keep,
                    "kill" => EndpointDrain::Kill,
                    seconds => match whole_number(seconds) {
                        Some(seconds) if seconds > 0 => {
                            EndpointDrain::After(Duration::from_secs(seconds.into()))
                        }
                        _ => {
                            return Err(wrong(
                                "drain",
                                "keep, kill or a whole number of seconds from 1",
                            ));
                        }
                    },
                };
            }
            "dc" => {
                self.dc = Some(
                    label(value)
                        .ok_or_else(|| wrong("dc", "a datacentre name of A-Z a-z 0-9 _ -"))?,
                )
            }
            "via" => {
                self.via =
                    Some(label(value).ok_or_else(|| wrong("via", "the scheme of a -discovery"))?)
            }
            "check" => {
                self.check = Some(match value {
                    "tcp" => Check::Tcp,
                    _ => return Err(wrong("check", "tcp")),
                });
            }
            "proxy" => {
                self.proxy = Some(match value {
                    "v1" => ProxyProtocol::V1,
                    "v2" => ProxyProtocol::V2,
                    _ => return Err(wrong("proxy", "v1 or v2")),
                });
            }
            "user-timeout" => {
                let time = whole_number(value).map(|seconds| Duration::from_secs(seconds.into()));
                self.user_timeout = Some(time.and_then(user_timeout).ok_or_else(|| {
                    wrong("user-timeout", "0 or a whole number of seconds from 5 to 86400")
                })?);
            }
            "path" => {
                self.path = Some(
                    PathChoice::of(value).ok_or_else(|| wrong("path", "proxy, kernel or auto"))?,
                );
            }
            _ => return Err(DescriptorError::UnknownOption(key.to_owned())),
        }
        Ok(())
    }
}

impl fmt::Display for Descriptor {
    /// The canonical text. It parses to the same descriptor.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{};{}", self.service, self.tags, port_of(self.port, self.protocol))?;
        match self.balance {
            None => {}
            Some(Balance::RoundRobin) => f.write_str(";lb=rr")?,
            Some(Balance::LeastConnections) => f.write_str(";lb=leastconn")?,
        }
        match self.drain {
            EndpointDrain::Keep => {}
            EndpointDrain::Kill => f.write_str(";drain=kill")?,
            EndpointDrain::After(time) => write!(f, ";drain={}", time.as_secs())?,
        }
        if let Some(dc) = &self.dc {
            write!(f, ";dc={dc}")?;
        }
        if let Some(via) = &self.via {
            write!(f, ";via={via}")?;
        }
        match self.check {
            None => {}
            Some(Check::Tcp) => f.write_str(";check=tcp")?,
        }
        match self.proxy {
            None => {}
            Some(ProxyProtocol::V1) => f.write_str(";proxy=v1")?,
            Some(ProxyProtocol::V2) => f.write_str(";proxy=v2")?,
        }
        match self.user_timeout {
            None => {}
            Some(time) => write!(f, ";user-timeout={}", time.as_secs())?,
        }
        match self.path {
            None => Ok(()),
            Some(path) => write!(f, ";path={path}"),
        }
    }
}

/// Splits a list of descriptors at its commas, except those inside brackets, which belong to a list of tags.
///
/// ```
/// let parts: Vec<_> = embassy::descriptor::split_list("web;80,db[prod,eu];5432").collect();
/// assert_eq!(parts, ["web;80", "db[prod,eu];5432"]);
/// ```
pub fn split_list(list: &str) -> impl Iterator<Item = &str> {
    let mut in_tags = false;
    list.split(move |c| {
        match c {
            '[' => in_tags = true,
            ']' => in_tags = false,
            _ => {}
        }
        c == ',' && !in_tags
    })
}

/// The service, its tags, and the text after the first `;` behind them.
fn service_and_tags(text: &str) -> Result<(ServiceName, Tags, &str), DescriptorError> {
    let end = text.find(['[', ';']).ok_or_else(|| no_port(text))?;
    let (name, rest) = text.split_at(end);
    let service = ServiceName::new(name).ok_or_else(|| {
        let character =
            name.chars().find(|c| ServiceName::new(c.encode_utf8(&mut [0; 4])).is_none());
        match character {
            None => DescriptorError::NoService(if rest.starts_with('[') { '[' } else { ';' }),
            Some(character) => DescriptorError::Service { service: name.to_owned(), character },
        }
    })?;
    if let Some(rest) = rest.strip_prefix(';') {
        return Ok((service, Tags::default(), rest));
    }
    let (list, rest) = rest
        .strip_prefix('[')
        .unwrap_or(rest)
        .split_once(']')
        .ok_or(DescriptorError::TagsNotClosed)?;
    let tags = tags(list)?;
    match rest.strip_prefix(';') {
        Some(rest) => Ok((service, tags, rest)),
        None if rest.is_empty() => Err(DescriptorError::NoPort),
        None if rest.starts_with(':') => Err(Mistake::Separator("colon").into()),
        None => Err(DescriptorError::AfterTags(rest.to_owned())),
    }
}

/// Why there is no port. `web:80` is the form of other programs.
fn no_port(text: &str) -> DescriptorError {
    Mistake::in_separator(text).map_or(DescriptorError::NoPort, DescriptorError::Mistake)
}

/// A port, and the protocol that may follow it: `6379`, `6379/tcp`, `53/udp`.
fn port_and_protocol(text: &str) -> Result<(Port, Protocol), DescriptorError> {
    match text.split_once('/') {
        None => Ok((text.parse()?, Protocol::Tcp)),
        Some((port, protocol)) => match Protocol::of(protocol) {
            Some(protocol) => Ok((port.parse()?, protocol)),
            None => Err(DescriptorError::Protocol(protocol.to_owned())),
        },
    }
}

fn tags(list: &str) -> Result<Tags, DescriptorError> {
    for tag in list.split(',') {
        if tag.is_empty() {
            return Err(DescriptorError::EmptyTag(list.to_owned()));
        }
        if let Some(character) =
            tag.chars().find(|&c| c.is_whitespace() || c.is_control() || ";[]".contains(c))
        {
            return Err(DescriptorError::Tag { tag: tag.to_owned(), character });
        }
    }
    Ok(Tags::new(list.split(',')))
}

fn whole_number(text: &str) -> Option<u32> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok())?
}

/// A name as Consul allows it for datacentres, and as the names of discoveries are written.
fn label(text: &str) -> Option<Arc<str>> {
    let valid = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    (!text.is_empty() && text.bytes().all(valid)).then(|| text.into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<Descriptor, DescriptorError> {
        text.parse()
    }

    #[test]
    fn the_forms_users_have_written_for_years() {
        for (text, service, port) in [
            ("redis.master;6379", "redis.master", 6379),
            ("/services/prod/app1/80;80", "/services/prod/app1/80", 80),
            ("/services/prod/app1/80[prod,app1];80", "/services/prod/app1/80", 80),
            ("name[prod,app1];80", "name", 80),
            ("a*b@c_d-e;65535", "a*b@c_d-e", 65535),
            ("redis.master;6379/tcp", "redis.master", 6379),
            ("dns[eu];53/udp", "dns", 53),
        ] {
            let descriptor = parse(text).expect(text);
            assert_eq!(descriptor.service.as_str(), service);
            assert_eq!(descriptor.port.get(), port);
        }
    }

    #[test]
    fn every_option_is_read() {
        let text = "db[eu];5432;lb=leastconn;drain=30;dc=dc-2;via=consul;check=tcp;proxy=v2;user-timeout=60;path=kernel";
        let descriptor = parse(text).expect(text);
        assert_eq!(descriptor.user_timeout, Some(Duration::from_secs(60)));
        assert_eq!(descriptor.path, Some(PathChoice::Kernel));
        assert_eq!(descriptor.balance, Some(Balance::LeastConnections));
        assert_eq!(descriptor.drain, EndpointDrain::After(Duration::from_secs(30)));
        assert_eq!(descriptor.dc.as_deref(), Some("dc-2"));
        assert_eq!(descriptor.via.as_deref(), Some("consul"));
        assert_eq!(descriptor.check, Some(Check::Tcp));
        assert_eq!(descriptor.proxy, Some(ProxyProtocol::V2));
        assert_eq!(descriptor.to_string(), text);
    }

    #[test]
    fn udp_is_another_protocol_on_the_same_port_and_takes_no_option_of_connections() {
        let protocol = |text: &str| parse(text).expect(text).protocol;
        assert_eq!(protocol("dns;53"), Protocol::Tcp);
        assert_eq!(protocol("dns;53/tcp"), Protocol::Tcp);
        assert_eq!(protocol("dns;53/udp"), Protocol::Udp);
        for good in
            ["dns[a];53/udp;lb=leastconn;dc=d;via=consul;check=tcp;path=kernel", "dns;53/udp"]
        {
            assert_eq!(parse(good).expect(good).to_string(), good);
        }
        assert_eq!(parse("dns;53/udp;drain=keep").expect("keep").to_string(), "dns;53/udp");
        for (option, said) in [
            (
                "proxy=v2",
                "proxy=: cannot be used with /udp: a datagram has no PROXY protocol header",
            ),
            ("user-timeout=9", "user-timeout=: cannot be used with /udp: UDP acknowledges nothing"),
            (
                "drain=kill",
                "drain= other than keep: cannot be used with /udp: UDP has no connections to reset",
            ),
            (
                "drain=9",
                "drain= other than keep: cannot be used with /udp: UDP has no connections to reset",
            ),
            (
                "path=proxy",
                "path=proxy: cannot be used with /udp: UDP takes the kernel path only; remove the option",
            ),
        ] {
            let error = parse(&format!("dns;53/udp;{option}")).expect_err(option);
            assert_eq!((error.to_string(), error.without_value()), (said.into(), said.into()));
            assert!(parse(&format!("dns;53/tcp;{option}")).is_ok(), "{option}");
        }
        for text in ["dns;53/sctp", "dns;53/UDP", "dns;53/", "dns;53/udp/tcp", "dns;/udp"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    /// Whole messages are compared: they are what a user reads in the log.
    #[test]
    fn each_malformed_form_has_its_own_reason() {
        for (text, reason) in [
            ("", "no port: expected <service>;<port>"),
            ("redis", "no port: expected <service>;<port>"),
            ("redis[a]", "no port: expected <service>;<port>"),
            (
                "redis:6379",
                "no port: expected <service>;<port>, with a semicolon in place of the colon",
            ),
            (
                "redis[a]:6379",
                "no port: expected <service>;<port>, with a semicolon in place of the colon",
            ),
            ("tcp://10.0.0.1:80", "no port: expected <service>;<port>"),
            (";80", "no service name before the ';'"),
            ("[a];80", "no service name before the '['"),
            (
                "foo bar;80",
                "service \"foo bar\" has the character ' ': expected only A-Z a-z 0-9 / . _ * @ -",
            ),
            (
                " foo;80",
                "service \" foo\" has the character ' ': expected only A-Z a-z 0-9 / . _ * @ -",
            ),
            ("foo[a;80", "the tag list is not closed: expected ']'"),
            ("foo[a]x;80", "\"x;80\" after the tag list: expected ';' and a port"),
            ("foo[];80", "an empty tag in []: expected [tag,tag]"),
            ("foo[a,,b];80", "an empty tag in [a,,b]: expected [tag,tag]"),
            (
                "foo[a b];80",
                "tag \"a b\" has the character ' ': expected none of white space , ; [ ]",
            ),
            (
                "foo[[a];80",
                "tag \"[a\" has the character '[': expected none of white space , ; [ ]",
            ),
            ("foo;0", "port \"0\" is not a number from 1 to 65535"),
            ("foo;00", "port \"00\" is not a number from 1 to 65535"),
            ("foo;80a", "port \"80a\" is not a number from 1 to 65535"),
            ("foo;http", "port \"http\" is not a number from 1 to 65535"),
            ("foo;80;", "option \"\": expected <key>=<value>"),
            (
                "foo;80;user-timeout=4",
                "user-timeout=\"4\": expected 0 or a whole number of seconds from 5 to 86400",
            ),
            (
                "foo;80;user-timeout=30s",
                "user-timeout=\"30s\": expected 0 or a whole number of seconds from 5 to 86400",
            ),
            ("foo;80;lb", "option \"lb\": expected <key>=<value>"),
            (
                "foo;80;weight=1",
                "unknown option \"weight\": expected one of lb, drain, dc, via, check, proxy, user-timeout, path",
            ),
            ("foo;80;lb=rr;lb=rr", "option lb is given twice"),
            ("foo;80;lb=random", "lb=\"random\": expected rr or leastconn"),
            (
                "foo;80;drain=0",
                "drain=\"0\": expected keep, kill or a whole number of seconds from 1",
            ),
            (
                "foo;80;drain=+5",
                "drain=\"+5\": expected keep, kill or a whole number of seconds from 1",
            ),
            (
                "foo;80;drain=",
                "drain=\"\": expected keep, kill or a whole number of seconds from 1",
            ),
            ("foo;80;dc=", "dc=\"\": expected a datacentre name of A-Z a-z 0-9 _ -"),
            ("foo;80;via=a/b", "via=\"a/b\": expected the scheme of a -discovery"),
            ("foo;80;check=http", "check=\"http\": expected tcp"),
            ("foo;80;proxy=v3", "proxy=\"v3\": expected v1 or v2"),
        ] {
            assert_eq!(parse(text).expect_err(text).to_string(), reason, "{text}");
        }
    }

    #[test]
    fn each_common_mistake_has_a_sentence_that_repeats_nothing_of_the_value() {
        use Mistake::{Order, PortMissing, PortTooHigh, Separator, SeveralPorts, WhiteSpace};
        for (text, expected) in [
            ("web; 8080", WhiteSpace),
            ("web;8080 ", WhiteSpace),
            ("web[a]; 8080/tcp", WhiteSpace),
            ("web; 8080;lb=rr", WhiteSpace),
            ("8080;web", Order),
            ("8080;redis.master", Order),
            ("web;8080,8081", SeveralPorts),
            ("web;8080, 8081", SeveralPorts),
            ("web;8080-8090", SeveralPorts),
            ("web;8080;8081", SeveralPorts),
            ("web;80800", PortTooHigh),
            ("web;65536", PortTooHigh),
            ("web;99999999999999999999/tcp", PortTooHigh),
            ("web;", PortMissing),
            ("web; ", PortMissing),
            ("web[a];;lb=rr", PortMissing),
            ("web:8080", Separator("colon")),
            ("web[a]:8080", Separator("colon")),
            ("web 8080", Separator("space")),
            ("web,8080", Separator("comma")),
            ("web=8080", Separator("equals sign")),
        ] {
            let error = parse(text).expect_err(text);
            assert_eq!(error, DescriptorError::Mistake(expected), "{text}");
            assert_eq!(error.without_value(), error.to_string());
        }
        // What is no such mistake keeps its own reason.
        for other in ["web;http", "hunter2", "web;80,b", "web 80 90", "0;web;"] {
            let error = parse(other).expect_err(other);
            assert!(!matches!(error, DescriptorError::Mistake(_)), "{other}: {error}");
        }
    }

    #[test]
    fn a_reason_without_the_value_has_no_part_of_it() {
        for text in [
            "postgres://joe:hunter2@h/db",
            "8080;hunter2",
            "hunter2:80",
            "hunter2;80,81",
            "hunter2",
            "hunter2;",
            "a;hunter2",
            "a;80/hunter2",
            "a;80;hunter2",
            "a;80;hunter2=1",
            "a;80;lb=hunter2",
            "a;80;via=hunter2;hunter2=",
            "a[hunter2;80",
            "a[hunter 2,hunter2];80",
            "a[];hunter2",
            "a[x]hunter2;80",
        ] {
            let reason = parse(text).expect_err(text).without_value();
            assert!(!reason.contains("hunter"), "{text}: {reason}");
        }
    }

    #[test]
    fn a_list_is_split_outside_brackets_only() {
        let split = |list| split_list(list).collect::<Vec<_>>();
        assert_eq!(split("frontend_http;80,mysql;3306"), ["frontend_http;80", "mysql;3306"]);
        assert_eq!(split("a[x,y];1,b;2"), ["a[x,y];1", "b;2"]);
        assert_eq!(split(""), [""]);
    }

    fn any_descriptor() -> impl Strategy<Value = Descriptor> {
        let balance = prop::option::of(prop_oneof![
            Just(Balance::RoundRobin),
            Just(Balance::LeastConnections)
        ]);
        let drain = prop_oneof![
            Just(EndpointDrain::Keep),
            Just(EndpointDrain::Kill),
            (1..=u32::MAX).prop_map(|s| EndpointDrain::After(Duration::from_secs(s.into()))),
        ];
        let label = || prop::option::of("[A-Za-z0-9_-]{1,12}".prop_map(|s| s.as_str().into()));
        (
            "[A-Za-z0-9/._*@-]{1,40}",
            prop::collection::vec("[^\\s\\p{Cc},;\\[\\]]{1,10}", 0..4),
            1..=u16::MAX,
            balance,
            drain,
            (label(), label()),
            prop::option::of(Just(Check::Tcp)),
            prop::option::of(prop_oneof![Just(ProxyProtocol::V1), Just(ProxyProtocol::V2)]),
            (
                prop::option::of(
                    prop_oneof![Just(0_u64), 5..=86_400_u64].prop_map(Duration::from_secs),
                ),
                prop::option::of(prop::sample::select(PathChoice::ALL)),
                prop::sample::select(Protocol::ALL),
            ),
        )
            .prop_map(
                |(
                    service,
                    tags,
                    port,
                    balance,
                    drain,
                    (dc, via),
                    check,
                    proxy,
                    (user_timeout, path, protocol),
                )| {
                    let descriptor = Descriptor {
                        service: ServiceName::new(&service)
                            .expect("the strategy makes valid names"),
                        tags: Tags::new(tags.iter().map(String::as_str)),
                        port: Port::new(port).expect("the strategy starts at 1"),
                        protocol,
                        balance,
                        drain,
                        dc,
                        via,
                        check,
                        proxy,
                        user_timeout,
                        path,
                    };
                    match protocol {
                        Protocol::Tcp => descriptor,
                        Protocol::Udp => Descriptor {
                            drain: EndpointDrain::Keep,
                            proxy: None,
                            user_timeout: None,
                            path: descriptor.path.filter(|path| *path != PathChoice::Proxy),
                            ..descriptor
                        },
                    }
                },
            )
    }

    proptest! {
        #[test]
        fn printed_then_parsed_is_the_same(descriptor in any_descriptor()) {
            let text = descriptor.to_string();
            let parsed = parse(&text);
            prop_assert_eq!(parsed.as_ref().map(ToString::to_string), Ok(text));
            prop_assert_eq!(parsed, Ok(descriptor));
        }

        #[test]
        fn no_text_panics_and_what_parses_prints_back(text in "(\\PC|[a;=\\[\\],0-9]){0,60}") {
            if let Ok(descriptor) = parse(&text) {
                prop_assert_eq!(parse(&descriptor.to_string()), Ok(descriptor));
            }
        }

        #[test]
        fn nothing_may_stand_around_a_descriptor(descriptor in any_descriptor(), extra in "[ \t\n;,\\[]") {
            let whole = descriptor.to_string();
            prop_assert!(parse(&[&extra, whole.as_str()].concat()).is_err());
            prop_assert!(parse(&[&whole, extra.as_str()].concat()).is_err());
        }
    }
}
