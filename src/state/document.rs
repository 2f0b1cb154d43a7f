//! The format of a state file. Pure.

use std::{net::SocketAddr, sync::Arc};

use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

use super::{Document, KeptAnswer, KeptConsumer, KeptEndpoint, Origin};
use crate::{
    consumer::Binding,
    discovery::Query,
    model::{ContainerId, Endpoint, Port, Process, ServiceName, Tags},
};

/// The first word of every state file, and the format that this program writes and reads.
const MAGIC: &str = "embassy state";
const FORMAT: u32 = 1;

/// Why bytes are not a usable state file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    #[error("not a state file: expected \"{MAGIC} {FORMAT} <checksum>\" on its first line")]
    NotOurs,
    #[error("it has format {0:?}: expected {FORMAT}")]
    Format(String),
    #[error("it is damaged: its checksum does not match")]
    Checksum,
    #[error("its content does not parse: {0}")]
    Content(String),
}

/// Parses a state file. Any bytes may be given.
pub fn parse(bytes: &[u8]) -> Result<Document, Damage> {
    let end = bytes.iter().position(|&byte| byte == b'\n').ok_or(Damage::NotOurs)?;
    let (head, body) = bytes.split_at(end);
    let body = body.get(1..).unwrap_or_default();
    let head = str::from_utf8(head).map_err(|_| Damage::NotOurs)?;
    let head = head.strip_prefix(MAGIC).and_then(|rest| rest.strip_prefix(' '));
    let (format, sum) = head.and_then(|head| head.split_once(' ')).ok_or(Damage::NotOurs)?;
    if format != FORMAT.to_string() {
        return Err(Damage::Format(format.chars().take(20).collect()));
    }
    if sum != checksum(body) {
        return Err(Damage::Checksum);
    }
    let written: WrittenDocument =
        serde_json::from_slice(body).map_err(|error| Damage::Content(error.to_string()))?;
    written.read().map_err(Damage::Content)
}

/// The bytes that [`parse`] reads.
pub(super) fn render(document: &Document) -> Result<Vec<u8>, serde_json::Error> {
    let body = serde_json::to_vec(&WrittenDocument::of(document))?;
    let head = format!("{MAGIC} {FORMAT} {}\n", checksum(&body));
    Ok([head.as_bytes(), &body].concat())
}

fn checksum(body: &[u8]) -> String {
    digest(&SHA256, body).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The JSON form of a document.
#[derive(Serialize, Deserialize)]
struct WrittenDocument {
    written: u64,
    machine: String,
    boot: String,
    provider: String,
    discoveries: std::collections::BTreeMap<Arc<str>, String>,
    consumers: Vec<WrittenConsumer>,
    answers: Vec<WrittenAnswer>,
}

#[derive(Serialize, Deserialize)]
struct WrittenConsumer {
    id: String,
    started_at: Arc<str>,
    name: Arc<str>,
    process: (i32, u64),
    namespace: String,
    namespace_process: (i32, u64),
    sources: Vec<std::net::IpAddr>,
    gateways: Vec<std::net::IpAddr>,
    /// The variable or label, and the descriptor.
    bindings: Vec<(Arc<str>, String)>,
}

#[derive(Serialize, Deserialize)]
struct WrittenAnswer {
    via: Arc<str>,
    service: String,
    tags: Vec<String>,
    dc: Option<Arc<str>>,
    port: Option<u16>,
    confirmed: u64,
    /// Each with the runs of its container, if it is a container of this host.
    endpoints: Vec<(SocketAddr, Vec<WrittenRun>)>,
}

/// A container, and its first process.
type WrittenRun = (String, (i32, u64));

impl WrittenDocument {
    fn of(document: &Document) -> Self {
        let Origin { machine, boot, provider, discoveries, of_containers: _ } =
            document.origin.clone();
        let run = |(id, process): &(ContainerId, Process)| {
            (id.as_str().to_owned(), (process.pid, process.started))
        };
        let endpoint = |kept: &KeptEndpoint| (kept.endpoint.0, kept.runs.iter().map(run).collect());
        let answers = document.answers.iter().map(|(query, answer)| WrittenAnswer {
            via: query.via.clone(),
            service: query.service.to_string(),
            tags: query.tags.iter().map(str::to_owned).collect(),
            dc: query.dc.clone(),
            port: query.port.map(Port::get),
            confirmed: answer.confirmed,
            endpoints: answer.endpoints.iter().map(endpoint).collect(),
        });
        Self {
            written: document.written,
            machine,
            boot,
            provider,
            discoveries,
            consumers: document.consumers.iter().map(WrittenConsumer::of).collect(),
            answers: answers.collect(),
        }
    }

    fn read(self) -> Result<Document, String> {
        let Self { written, machine, boot, provider, discoveries, consumers, answers } = self;
        Ok(Document {
            written,
            origin: Origin {
                machine,
                boot,
                provider,
                discoveries,
                of_containers: Default::default(),
            },
            consumers: consumers
                .into_iter()
                .map(WrittenConsumer::read)
                .collect::<Result<_, _>>()?,
            answers: answers.into_iter().map(WrittenAnswer::read).collect::<Result<_, _>>()?,
        })
    }
}

impl WrittenConsumer {
    fn of(consumer: &KeptConsumer) -> Self {
        let process = |process: Process| (process.pid, process.started);
        let binding = |binding: &Binding| (binding.origin.clone(), binding.descriptor.to_string());
        Self {
            id: consumer.id.as_str().to_owned(),
            started_at: consumer.started_at.clone(),
            name: consumer.name.clone(),
            process: process(consumer.process),
            namespace: consumer.namespace.as_str().to_owned(),
            namespace_process: process(consumer.namespace_process),
            sources: consumer.sources.clone(),
            gateways: consumer.gateways.clone(),
            bindings: consumer.bindings.iter().map(binding).collect(),
        }
    }

    fn read(self) -> Result<KeptConsumer, String> {
        let process = |(pid, started)| Process { pid, started };
        let binding = |(origin, text): (Arc<str>, String)| match text.parse() {
            Ok(descriptor) => Ok(Binding { origin, descriptor }),
            Err(error) => Err(format!("{origin} {text:?}: {error}")),
        };
        Ok(KeptConsumer {
            id: id(&self.id)?,
            started_at: self.started_at,
            name: self.name,
            process: process(self.process),
            namespace: id(&self.namespace)?,
            namespace_process: process(self.namespace_process),
            sources: self.sources,
            gateways: self.gateways,
            bindings: self.bindings.into_iter().map(binding).collect::<Result<_, _>>()?,
        })
    }
}

impl WrittenAnswer {
    fn read(self) -> Result<(Query, KeptAnswer), String> {
        let service =
            ServiceName::new(&self.service).ok_or_else(|| format!("service {:?}", self.service))?;
        let port = match self.port {
            Some(port) => Some(Port::new(port).ok_or("port 0")?),
            None => None,
        };
        let tags = Tags::new(self.tags.iter().map(String::as_str));
        let query = Query { via: self.via, service, tags, dc: self.dc, port };
        let run = |(text, (pid, started)): WrittenRun| {
            Ok::<_, String>((id(&text)?, Process { pid, started }))
        };
        let endpoint = |(address, runs): (SocketAddr, Vec<WrittenRun>)| match address.port() {
            0 => Err(format!("endpoint {address}")),
            _ => Ok(KeptEndpoint {
                endpoint: Endpoint(address),
                runs: runs.into_iter().map(run).collect::<Result<_, _>>()?,
            }),
        };
        let endpoints = self.endpoints.into_iter().map(endpoint).collect::<Result<_, _>>()?;
        Ok((query, KeptAnswer { confirmed: self.confirmed, endpoints }))
    }
}

/// Checks that the ID is complete: an empty one would be found in the name of any control group.
fn id(text: &str) -> Result<ContainerId, String> {
    let whole = text.len() >= 12 && text.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if whole { Ok(ContainerId::new(text)) } else { Err(format!("container ID {text:?}")) }
}

/// Reads `input` as a file, and as the content of one with the right checksum.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(input: &[u8]) {
    let _ = parse(input);
    let head = format!("{MAGIC} {FORMAT} {}\n", checksum(input));
    if let Ok(document) = parse(&[head.as_bytes(), input].concat()) {
        let again = render(&document).map(|bytes| parse(&bytes));
        assert!(matches!(again, Ok(Ok(again)) if again == document), "written as it was read");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::tests::document, *};

    fn with_checksum(body: &str) -> Vec<u8> {
        format!("embassy state 1 {}\n{body}", checksum(body.as_bytes())).into_bytes()
    }

    #[test]
    fn what_is_written_is_read() {
        let document = document();
        assert_eq!(parse(&render(&document).unwrap()), Ok(document));
    }

    #[test]
    fn each_damage_is_named() {
        let good = render(&document()).unwrap();
        for (bytes, damage) in [
            (&b""[..], Damage::NotOurs),
            (b"{}", Damage::NotOurs),
            (b"\xff\n", Damage::NotOurs),
            (b"embassy state\n", Damage::NotOurs),
            (b"embassy state 2 00\n{}", Damage::Format("2".into())),
            (b"embassy state 1 00\n{}", Damage::Checksum),
            (&good[..good.len() - 1], Damage::Checksum),
        ] {
            assert_eq!(parse(bytes), Err(damage), "{}", bytes.escape_ascii());
        }
        assert!(matches!(parse(&with_checksum("{}")), Err(Damage::Content(_))));
    }

    #[test]
    fn what_no_embassy_writes_is_refused_whatever_its_checksum() {
        let body = |from: &str, to: &str| {
            let bytes = render(&document()).unwrap();
            let text = String::from_utf8(bytes).unwrap();
            let (_, body) = text.split_once('\n').unwrap();
            assert!(body.contains(from), "{body}");
            parse(&with_checksum(&body.replace(from, to)))
        };
        for (from, to) in [
            ("0123456789abcdef", ""),
            ("0123456789abcdef", "/"),
            ("10.0.0.1:6379", "10.0.0.1:0"),
            ("\"service\":\"redis\"", "\"service\":\"red is\""),
            ("redis[eu,prod];6379;", "redis[eu,prod];0;"),
            ("172.17.0.2", "172.17.0.256"),
            ("\"port\":53", "\"port\":0"),
        ] {
            assert!(matches!(body(from, to), Err(Damage::Content(_))), "{to}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), body in "\\PC{0,200}") {
            prop_assert!(parse(&bytes).is_err());
            prop_assert!(parse(&with_checksum(&body)).is_err());
        }

        #[test]
        fn no_flipped_bit_goes_unnoticed(place in any::<prop::sample::Index>(), bit in 0..8u8) {
            let mut bytes = render(&document()).unwrap();
            let place = place.index(bytes.len());
            bytes[place] ^= 1u8 << bit;
            prop_assert!(parse(&bytes).is_err());
        }
    }
}
