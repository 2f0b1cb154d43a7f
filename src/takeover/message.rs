//! The messages of a takeover as bytes. Pure.
//!
//! A message is its length, the length of its JSON, the JSON, and bytes to which the JSON refers; both lengths are four bytes, the
//! most significant first. Either process may be the older one: fields that are not known are ignored, and those that are missing
//! have their default. Processes of different [`VERSION`]s use only the messages that never change: `hello`, `freeze`, `handle`, `end`
//! and `commit`.

use std::{collections::BTreeMap, net::SocketAddr};

use serde::{Deserialize, Serialize};

/// Of the messages that may change.
pub const VERSION: u32 = 1;

/// Bytes of a message, at most. A connection may hold some megabytes.
const LONGEST: usize = 32 << 20;
/// Descriptors of a message, at most: the kernel takes no more at once (SCM_MAX_FD is 253).
pub const MOST_DESCRIPTORS: usize = 250;

/// Both lengths.
const HEAD: usize = 8;

/// What the two processes say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case")]
pub enum Message {
    /// Each begins with this. The old process's has a descriptor: see [`Life`](super::Life).
    Hello(Hello),
    /// The new process asks the old one to stand still and to hand everything over.
    Freeze,
    /// A descriptor, or some.
    Handle(Handle),
    Figures(Box<Figures>),
    /// Connections with their sockets: in the order of the list, the consumer's before the endpoint's.
    Connections {
        list: Vec<Connection>,
    },
    /// Which of the connections the new process takes.
    Taken {
        taken: Vec<bool>,
    },
    /// Nothing is left to hand over.
    End,
    /// The new process serves.
    Commit,
}

/// Who speaks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Hello {
    /// See [`VERSION`].
    pub version: u32,
    /// The program's own version.
    pub program: String,
    /// The network namespace: device and inode.
    pub namespace: (u64, u64),
    pub port: u16,
    /// Who writes the rules; empty: nobody.
    pub firewall: String,
    /// The root file system: see [`succession`](super::succession).
    pub root: String,
    /// Those of the processes that were taken over from, before this one.
    pub before: Vec<String>,
    pub descriptors: u32,
}

/// What descriptors are of.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Handle {
    /// One of the words of [`Handle`]; others are closed.
    pub of: String,
    /// The address of the admin listener as the operator gave it.
    pub address: String,
    pub descriptors: u32,
}

impl Handle {
    /// The listeners of one worker.
    pub const PROXY: &str = "proxy";
    /// The socket to which our nf_tables tables belong.
    pub const RULES: &str = "rules";
    /// The right to capture in this network namespace.
    pub const LOCK: &str = "lock";
    pub const ADMIN: &str = "admin";
    /// Where the next takeover is asked for.
    pub const DOOR: &str = "door";
}

/// Counters and states. They may come in several messages.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Figures {
    pub process: Option<ProcessFigures>,
    pub routes: Vec<RouteFigures>,
    pub endpoints: Vec<EndpointFigures>,
    pub turns: Vec<Turn>,
}

/// The counters of the whole process, by their names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessFigures {
    /// How all connections ended, refused ones too.
    pub outcomes: BTreeMap<String, u64>,
    pub counts: Counts,
    pub takeovers: u64,
    /// Each with the kernel's count as it was read last.
    pub turned_away: Vec<(u64, u64)>,
    pub restored: Vec<u64>,
    pub write_failures: u64,
}

/// The counters of connections.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counts {
    pub started: u64,
    pub ended: BTreeMap<String, u64>,
    pub bytes: [u64; 2],
    pub datagrams: [u64; 2],
    pub connect: Vec<u64>,
    pub connect_micros: u64,
    pub retries: u64,
}

/// Whose connections: of one run of a container, or of the host. The address and port that it dials are the connection's own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ConnectionOwner {
    /// The container's ID and the start of its run; `None`: the host.
    pub container: Option<(String, String)>,
    /// The descriptor.
    pub binding: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteFigures {
    /// Source address and port.
    pub key: SocketAddr,
    pub owner: ConnectionOwner,
    pub counts: Counts,
    /// Milliseconds since the owner got it; `None`: it had it when the first of these processes started.
    #[serde(default)]
    pub age: Option<u64>,
}

/// An endpoint of a service. Times are in milliseconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointFigures {
    pub service: Service,
    pub endpoint: SocketAddr,
    pub counts: Counts,
    #[serde(default)]
    pub state: EndpointState,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EndpointState {
    pub failures: u32,
    pub silent: bool,
    pub drained: bool,
    pub failed_checks: u32,
    pub check_fails: bool,
    pub check_passes: bool,
    /// Since when it is known; `None`: no pick has seen it.
    pub seen_for: Option<u64>,
    pub ejected_for: u64,
    pub probed_for: u64,
    /// `None`: this host's last attempt did not fail because of this host.
    pub aside_for: Option<u64>,
    pub ejections: u64,
    pub failed: u64,
}

/// Discovery, datacentre and service.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default)]
pub struct Service {
    pub via: String,
    pub dc: Option<String>,
    pub service: String,
}

/// The endpoint whose turn it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    pub service: Service,
    #[serde(default)]
    pub tags: Vec<String>,
    #[serde(default)]
    pub port: Option<u16>,
    pub endpoint: SocketAddr,
}

/// How far a connection has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// It waits until its consumer is known.
    Held,
    /// It has a route and no endpoint yet.
    Connecting,
    Open,
}

/// A connection. Times are in microseconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    pub stage: Stage,
    pub source: SocketAddr,
    pub destination: SocketAddr,
    /// Since it was accepted.
    pub age: u64,
    #[serde(default)]
    pub owner: ConnectionOwner,
    #[serde(default)]
    pub endpoint: Option<SocketAddr>,
    #[serde(default)]
    pub local: Option<SocketAddr>,
    #[serde(default)]
    pub connect: Option<u64>,
    #[serde(default)]
    pub tries: u8,
    /// Bytes up and down.
    #[serde(default)]
    pub moved: [u64; 2],
    /// Of those, the ones that were added to the counters.
    #[serde(default)]
    pub counted: [u64; 2],
    /// Up and down. `None`: both sides are open, and nothing is held.
    #[serde(default)]
    pub directions: Option<[Direction; 2]>,
}

impl Connection {
    /// Its sockets.
    pub fn sockets(&self) -> usize {
        if self.stage == Stage::Open { 2 } else { 1 }
    }

    /// Bytes behind the message that it holds.
    fn bytes(&self) -> usize {
        let directions = self.directions.iter().flatten();
        directions.fold(0, |sum, one| sum.saturating_add(one.bytes as usize))
    }
}

/// One direction of a connection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Direction {
    /// Bytes that were read and not written yet. They are behind the message.
    pub bytes: u32,
    /// The end was read.
    pub finished: bool,
    /// The end was passed on.
    pub told: bool,
    /// The last bytes may be the goodbye of TLS.
    pub goodbye: bool,
}

impl Message {
    /// The descriptors that come with it.
    pub fn descriptors(&self) -> usize {
        match self {
            Self::Hello(Hello { descriptors, .. }) | Self::Handle(Handle { descriptors, .. }) => {
                *descriptors as usize
            }
            Self::Connections { list } => list.iter().map(Connection::sockets).sum(),
            Self::Freeze | Self::Figures(_) | Self::Taken { .. } | Self::End | Self::Commit => 0,
        }
    }

    /// The bytes that come behind it.
    fn bytes(&self) -> usize {
        match self {
            Self::Connections { list } => {
                list.iter().fold(0, |sum, one| sum.saturating_add(one.bytes()))
            }
            _ => 0,
        }
    }
}

/// Why bytes are no message.
#[derive(Debug, thiserror::Error)]
pub enum Malformed {
    #[error("a message of {0} bytes: expected {LONGEST} at the most")]
    TooLong(usize),
    #[error("a message of {whole} bytes whose first part has {json}")]
    Lengths { whole: usize, json: usize },
    #[error("a message that is not understood: {0}")]
    Content(#[from] serde_json::Error),
    #[error("a message with {found} bytes behind it: expected {expected}")]
    Bytes { found: usize, expected: usize },
    #[error("a message with {0} descriptors: expected {MOST_DESCRIPTORS} at the most")]
    Descriptors(usize),
}

/// A message and the bytes behind it, as they are sent.
pub fn encode(message: &Message, bytes: &[u8]) -> Result<Vec<u8>, Malformed> {
    let json = serde_json::to_vec(message)?;
    let whole = 4 + json.len() + bytes.len();
    let length = |length: usize| {
        u32::try_from(length).ok().filter(|_| length <= LONGEST).map(u32::to_be_bytes)
    };
    let lengths = length(whole).zip(length(json.len())).ok_or(Malformed::TooLong(whole))?;
    Ok([&lengths.0[..], &lengths.1, &json, bytes].concat())
}

/// The first message of what was received: it, the bytes behind it, and how many bytes all of that is. `None`: it is not complete.
pub fn decode(received: &[u8]) -> Result<Option<(Message, Vec<u8>, usize)>, Malformed> {
    let number = |at: usize| {
        let four = received.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_be_bytes(four)).ok()
    };
    let Some(whole) = number(0) else { return Ok(None) };
    if whole > LONGEST {
        return Err(Malformed::TooLong(whole));
    }
    let Some(rest) = received.get(4..4 + whole) else { return Ok(None) };
    let json = number(4).unwrap_or_default();
    let (json, bytes) = rest
        .get(4..)
        .and_then(|rest| rest.split_at_checked(json))
        .ok_or(Malformed::Lengths { whole, json })?;
    let message: Message = serde_json::from_slice(json)?;
    let expected = message.bytes();
    if bytes.len() != expected {
        return Err(Malformed::Bytes { found: bytes.len(), expected });
    }
    if message.descriptors() > MOST_DESCRIPTORS {
        return Err(Malformed::Descriptors(message.descriptors()));
    }
    Ok(Some((message, bytes.to_vec(), HEAD - 4 + whole)))
}

/// What is understood means the same when it is sent on.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(input: &[u8]) {
    if let Ok(Some((message, bytes, length))) = decode(input) {
        assert!(length <= input.len());
        #[expect(clippy::unwrap_used, reason = "a bug is to be found")]
        let again = decode(&encode(&message, &bytes).unwrap()).unwrap().unwrap();
        assert_eq!((&message, &bytes), (&again.0, &again.1));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn address() -> impl Strategy<Value = SocketAddr> {
        prop_oneof![
            any::<([u8; 4], u16)>().prop_map(SocketAddr::from),
            any::<([u8; 16], u16)>().prop_map(SocketAddr::from),
        ]
    }

    fn direction() -> impl Strategy<Value = Direction> {
        (0..200_u32, any::<(bool, bool, bool)>()).prop_map(|(bytes, (finished, told, goodbye))| {
            Direction { bytes, finished, told, goodbye }
        })
    }

    fn connection() -> impl Strategy<Value = Connection> {
        let stage = prop_oneof![Just(Stage::Held), Just(Stage::Connecting), Just(Stage::Open)];
        let directions = prop::option::of((direction(), direction()).prop_map(|(a, b)| [a, b]));
        let numbers = any::<(u64, Option<u64>, u8, [u64; 2], [u64; 2])>();
        let owner = any::<(Option<(String, String)>, String)>();
        let addresses = (address(), address(), prop::option::of(address()));
        (stage, addresses, numbers, owner, directions).prop_map(
            |(stage, (source, destination, endpoint), numbers, owner, directions)| {
                let (age, connect, tries, moved, counted) = numbers;
                let owner = ConnectionOwner { container: owner.0, binding: owner.1 };
                let local = endpoint;
                Connection {
                    stage,
                    source,
                    destination,
                    age,
                    owner,
                    endpoint,
                    local,
                    connect,
                    tries,
                    moved,
                    counted,
                    directions,
                }
            },
        )
    }

    fn message() -> impl Strategy<Value = Message> {
        let hello = any::<(u32, String, (u64, u64), u16, String)>();
        prop_oneof![
            hello.prop_map(|(version, program, namespace, port, firewall)| {
                let descriptors = u32::from(port % 2);
                let (root, before) =
                    (program.clone(), vec![firewall.clone(); descriptors as usize]);
                Message::Hello(Hello {
                    version,
                    program,
                    namespace,
                    port,
                    firewall,
                    root,
                    before,
                    descriptors,
                })
            }),
            any::<(String, String)>().prop_map(|(of, address)| {
                Message::Handle(Handle { of, address, descriptors: 2 })
            }),
            prop::collection::vec(connection(), 0..20)
                .prop_map(|list| Message::Connections { list }),
            prop::collection::vec(any::<bool>(), 0..20).prop_map(|taken| Message::Taken { taken }),
            Just(Message::Freeze),
            Just(Message::Figures(Box::default())),
            Just(Message::End),
            Just(Message::Commit),
        ]
    }

    proptest! {
        /// However many messages come at once, and wherever what was received ends.
        #[test]
        fn what_was_sent_is_received(
            messages in prop::collection::vec(message(), 1..5),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut stream = Vec::new();
            for message in &messages {
                stream.extend(encode(message, &vec![7; message.bytes()]).unwrap());
            }
            let mut rest = &stream[..];
            for message in &messages {
                let (found, bytes, length) = decode(rest).unwrap().unwrap();
                prop_assert_eq!(&found, message);
                prop_assert_eq!(bytes, vec![7; message.bytes()]);
                let part = &rest[..cut.index(length)];
                prop_assert!(decode(part).unwrap().is_none());
                rest = &rest[length..];
            }
            prop_assert!(rest.is_empty());
        }

        #[test]
        fn no_bytes_are_too_strange(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            fuzz(&bytes);
        }
    }

    #[test]
    fn what_is_no_message_is_refused_before_it_is_waited_for() {
        let long = u32::MAX.to_be_bytes();
        assert!(matches!(decode(&long), Err(Malformed::TooLong(_))));
        let wrong = [&9_u32.to_be_bytes()[..], &200_u32.to_be_bytes(), b"hello"].concat();
        assert!(matches!(decode(&wrong), Err(Malformed::Lengths { whole: 9, json: 200 })));
        let unknown = br#"{"message":"dance"}"#;
        let length = |n: usize| (n as u32).to_be_bytes();
        let sent = [&length(unknown.len() + 4)[..], &length(unknown.len()), unknown].concat();
        assert!(matches!(decode(&sent), Err(Malformed::Content(_))));
        let mut bytes = encode(&Message::End, &[]).unwrap();
        bytes[3] += 1;
        bytes.push(0);
        assert!(matches!(decode(&bytes), Err(Malformed::Bytes { found: 1, expected: 0 })));
    }

    #[test]
    fn a_newer_process_may_say_more_and_an_older_one_less() {
        let json = br#"{"message":"hello","version":2,"program":"9.9","mood":"good"}"#;
        let length = |n: usize| (n as u32).to_be_bytes();
        let sent = [&length(json.len() + 4)[..], &length(json.len()), json].concat();
        let (message, _, _) = decode(&sent).unwrap().unwrap();
        let expected = Hello { version: 2, program: "9.9".into(), ..Hello::default() };
        assert_eq!(message, Message::Hello(expected));
    }
}
