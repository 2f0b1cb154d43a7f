//! `dns://resolver[:port]`: a service is a name, and its endpoints come from the name's records.
//!
//! SRV records are asked for first: their targets and ports are the endpoints. Only the lowest priority number with an
//! address is used (RFC 2782). Weights are ignored. A name without SRV records is a host: its A and AAAA records are the
//! endpoints, with the port of the descriptor.
//!
//! Names are always absolute: no search list and no hosts file is used. DNS does not announce changes, so a name is asked
//! for again when the TTL of its records is over. DNS has no tags: a descriptor with tags is refused.
//!
//! A name that does not exist, or has no such records, is a valid empty answer. A server that does not answer, or reports a
//! failure, is an error. But many servers fail only for one type of records, such as AAAA or SRV: as long as another type
//! gives endpoints, the failure is reported beside them. If a question fails, the last answer to it stays in use. If the
//! question for SRV records fails at the start, it is repeated some times before the name is taken as a host, because the
//! port of the descriptor may belong to another service.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use futures_util::{StreamExt, stream};
use hickory_resolver::proto::rr::{Name, RecordType};
use tokio::time::{sleep, timeout};

use self::{
    client::{Client, Unanswered},
    hold::Hold,
    records::{Answer, Target, Ttl},
};
use crate::{
    discovery::{Endpoints, Query, Rejected, address, missing},
    model::Endpoint,
    source::{Publisher, Resync, Source, SourceError},
};

mod client;
mod hold;
mod records;

/// A DNS server.
#[derive(Debug, Clone)]
pub struct Dns {
    pub(super) resolver: SocketAddr,
    /// `hold=`: how long an endpoint stays in use after answers do not contain it any more.
    pub(super) hold: Duration,
}

impl Dns {
    /// The default of `hold=`.
    pub(super) const HOLD: Duration = Duration::from_secs(30);

    /// `resolver`: the only server that is asked, via UDP, and via TCP if an answer is truncated.
    pub fn new(resolver: SocketAddr, hold: Duration) -> Self {
        Self { resolver, hold }
    }

    /// Follows `query`.
    pub fn source(self, query: Query) -> DnsSource {
        let (used, answers) = (Hold::default(), LastAnswers::default());
        DnsSource { server: self.resolver, hold: self.hold, query, used, answers, unsure: 0 }
    }
}

/// One followed name.
#[derive(Debug)]
pub struct DnsSource {
    server: SocketAddr,
    hold: Duration,
    query: Query,
    used: Hold,
    answers: LastAnswers,
    /// How often it was unknown so far whether the name has SRV records. From [`SURE`] times on, the name is then taken as a
    /// host.
    unsure: u8,
}

/// How often a question for SRV records may fail before the name is taken as a host.
const SURE: u8 = 3;

impl Source for DnsSource {
    type Item = Endpoints;

    async fn session(
        &mut self,
        publish: &Publisher<Endpoints>,
        resync: &mut Resync,
    ) -> Result<(), SourceError> {
        let Self { server, hold, query, used, answers, unsure } = self;
        let session = Session::new(*server, query, answers)?;
        loop {
            let found = match timeout(Session::WHOLE, session.resolve()).await {
                Ok(found) => found.map_err(|failure| failure.of(*server))?,
                Err(_) => {
                    let reason = format!("no full answer within {} s", Session::WHOLE.as_secs());
                    let what = format!("records of {}", session.name);
                    let (responded, for_good) = (false, false);
                    return Err(Failure { what, reason, responded, for_good }.of(*server));
                }
            };
            answers.forget_unasked();
            if found.may_have_services && *unsure < SURE {
                *unsure += 1;
                sleep(LEAST).await;
                continue;
            }
            *unsure = SURE;
            let now = Instant::now();
            let (list, goes) = used.settle(found.priority, found.list, *hold, now);
            let problem = found.problem.map(Into::into);
            publish.publish(Endpoints { problem, ..Endpoints::new(list, found.rejected) });
            // Not sooner than a second, even if endpoints are due to be removed.
            let goes = goes.map(|at| at.saturating_duration_since(now).max(LEAST));
            let pause = goes.into_iter().fold(found.ttl.bounded(), Duration::min);
            tokio::select! {
                () = sleep(pause) => {}
                () = resync.due() => {}
            }
        }
    }
}

/// Minimum interval between two questions.
const LEAST: Duration = Duration::from_secs(1);

/// The last useful answer to each question.
#[derive(Debug, Default)]
struct LastAnswers(Mutex<HashMap<(Name, RecordType), Remembered>>);

#[derive(Debug)]
struct Remembered {
    answer: Answer,
    /// Whether the question was asked since [`LastAnswers::forget_unasked`].
    asked: bool,
}

impl LastAnswers {
    /// Keeps an answer.
    fn keep(&self, name: &Name, kind: RecordType, answer: &Answer) {
        let mut memory = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let question = (name.clone(), kind);
        if answer.is_of_use() {
            memory.insert(question, Remembered { answer: answer.clone(), asked: true });
        } else {
            memory.remove(&question);
        }
    }

    /// The last useful answer to a question that failed now.
    fn last(&self, name: &Name, kind: RecordType) -> Option<Answer> {
        let mut memory = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let remembered = memory.get_mut(&(name.clone(), kind))?;
        remembered.asked = true;
        Some(remembered.answer.clone())
    }

    /// Forgets the answers to questions that are no longer asked: SRV targets change.
    fn forget_unasked(&self) {
        let mut memory = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        memory.retain(|_, remembered| std::mem::take(&mut remembered.asked));
    }
}

/// A question without an answer.
#[derive(Debug, Clone)]
struct Failure {
    what: String,
    reason: String,
    /// The server works: it answered that it will not answer this question.
    responded: bool,
    for_good: bool,
}

impl Failure {
    fn of(self, server: SocketAddr) -> SourceError {
        let error = SourceError::new(format_args!("{} from {server}: {}", self.what, self.reason));
        if self.responded { error.refused() } else { error }
    }
}

impl From<Failure> for Rejected {
    fn from(Failure { what, reason, .. }: Failure) -> Self {
        Self { what, reason }
    }
}

/// The answers to one or several questions, and the questions that failed.
struct Found {
    answer: Answer,
    failures: Vec<Failure>,
    /// Whether any question was answered now, not from memory.
    answered: bool,
}

impl Found {
    fn answered(answer: Answer) -> Self {
        Self { answer, failures: Vec::new(), answered: true }
    }

    fn and(mut self, other: Self) -> Self {
        self.failures.extend(other.failures);
        Self {
            answer: self.answer.and(other.answer),
            failures: self.failures,
            answered: self.answered || other.answered,
        }
    }

    /// Whether it has a host's addresses, or shows that there is no such host.
    fn is_known(&self) -> bool {
        self.answer.is_of_use() || self.answer.no_such_name
    }
}

/// The result of a resolution.
#[derive(Default)]
struct Resolved {
    /// The priority of the SRV records that are used.
    priority: Option<u16>,
    list: Vec<Endpoint>,
    rejected: Vec<Rejected>,
    /// Why the list is empty.
    problem: Option<String>,
    ttl: Ttl,
    /// The name is taken as a host only because the question for SRV records failed, which may be temporary.
    may_have_services: bool,
}

struct Session<'a> {
    client: Client,
    answers: &'a LastAnswers,
    name: Name,
    /// The port to use for a host without SRV records.
    port: String,
}

impl<'a> Session<'a> {
    /// Timeout of a whole resolution: two questions one after the other, and one for each target.
    const WHOLE: Duration = Duration::from_secs(20);
    /// Maximum number of targets of one priority that are looked up.
    const MOST_TARGETS: usize = 256;
    /// Maximum number of targets that are looked up at the same time.
    const AT_A_TIME: usize = 8;

    fn new(
        server: SocketAddr,
        query: &Query,
        answers: &'a LastAnswers,
    ) -> Result<Self, SourceError> {
        // The client itself answers questions for the domain `invalid`, whether there is a server or not. DNS servers also
        // know `test` (RFC 6761, section 6.2).
        let service = match query.is_probe() {
            true => "embassy.test",
            false => query.service.as_str(),
        };
        let mut name = Name::from_ascii(service).map_err(|error| {
            SourceError::caused(format_args!("{service:?} is not a name of DNS"), &error)
        })?;
        name.set_fqdn(true);
        let port = query.port.map_or_else(String::new, |port| port.to_string());
        Ok(Self { client: Client::new(server)?, answers, name, port })
    }

    async fn resolve(&self) -> Result<Resolved, Failure> {
        let services = self.lookup(&self.name, RecordType::SRV).await;
        let targets = services.answer.targets();
        if targets.is_empty() {
            let may_have_services = services.failures.iter().any(|failure| !failure.for_good);
            let addresses = self.addresses(&self.name).await;
            let known = addresses.is_known();
            let host = services.and(addresses);
            // A server that answers nothing is down, whatever it answered before.
            if let Some(failure) = host.failures.first().filter(|_| !known || !host.answered) {
                return Err(failure.clone());
            }
            let (list, mut rejected) = endpoints(&host.answer, &self.name, &self.port);
            let problem = list.is_empty().then(|| {
                let unusable = missing::all_skipped(
                    missing::Noun("address", "addresses"),
                    &rejected.clone().into(),
                );
                unusable.unwrap_or_else(|| match host.answer.no_such_name {
                    true => "the name does not exist in DNS (NXDOMAIN)".to_owned(),
                    false => "the name has no SRV, A or AAAA records".to_owned(),
                })
            });
            rejected.extend(host.failures.into_iter().map(Rejected::from));
            let ttl = host.answer.ttl;
            return Ok(Resolved {
                priority: None,
                list,
                rejected,
                problem,
                ttl,
                may_have_services,
            });
        }
        self.targets(services, &targets).await
    }

    /// The endpoints of the first priority that has any.
    async fn targets(&self, services: Found, targets: &[Target]) -> Result<Resolved, Failure> {
        let mut resolved = Resolved { ttl: services.answer.ttl, ..Resolved::default() };
        let (mut open, mut answered) = (None, services.answered);
        for group in targets.chunk_by(|a, b| a.priority == b.priority) {
            resolved.priority = group.first().map(|target| target.priority);
            // A root target says that the service is decidedly not available (RFC 2782).
            let mut hosts = group.to_vec();
            hosts.retain(|target| !target.host.is_root());
            if hosts.len() > Self::MOST_TARGETS {
                let what = format!("SRV of {}", self.name);
                let reason = format!(
                    "it has {} targets: the first {} are used",
                    hosts.len(),
                    Self::MOST_TARGETS
                );
                resolved.rejected.push(Rejected { what, reason });
                hosts.truncate(Self::MOST_TARGETS);
            }
            let found: Vec<_> = stream::iter(hosts)
                .map(|target| self.target(&services.answer, target))
                .buffered(Self::AT_A_TIME)
                .collect()
                .await;
            for (target, found) in found {
                if !found.is_known() {
                    open = open.or_else(|| found.failures.first().cloned());
                }
                answered |= found.answered;
                resolved.ttl = resolved.ttl.min(found.answer.ttl);
                let (good, wrong) =
                    endpoints(&found.answer, &target.host, &target.port.to_string());
                if good.is_empty() && wrong.is_empty() && found.failures.is_empty() {
                    let reason = "it has no address".to_owned();
                    let what = format!("host {}", target.host);
                    resolved.rejected.push(Rejected { what, reason });
                }
                let room = Endpoints::MOST.saturating_sub(resolved.list.len());
                resolved.list.extend(good.into_iter().take(room));
                resolved.rejected.extend(wrong);
                resolved.rejected.extend(found.failures.into_iter().map(Rejected::from));
            }
            if !resolved.list.is_empty() {
                break;
            }
        }
        if let Some(failure) = services.failures.first().filter(|_| !answered) {
            return Err(failure.clone());
        }
        let unusable = missing::all_skipped(missing::TARGET, &resolved.rejected.clone().into());
        resolved.rejected.extend(services.failures.into_iter().map(Rejected::from));
        if resolved.list.is_empty() {
            resolved.problem = Some(unusable.unwrap_or_else(|| {
                "its SRV records say that the service is not available".to_owned()
            }));
        }
        match open {
            Some(failure) if resolved.list.is_empty() => Err(failure),
            _ => Ok(resolved),
        }
    }

    /// The addresses of a target: those that came with the SRV answer, otherwise those that are looked up.
    async fn target(&self, services: &Answer, target: Target) -> (Target, Found) {
        let glue = services.glue(&target.host);
        let found = if glue.addresses().is_empty() {
            self.addresses(&target.host).await
        } else {
            Found { answered: false, ..Found::answered(glue) }
        };
        (target, found)
    }

    async fn addresses(&self, name: &Name) -> Found {
        let (mut v4, mut v6) = futures_util::join!(
            self.lookup(name, RecordType::A),
            self.lookup(name, RecordType::AAAA)
        );
        // A name that does not exist has no addresses of the other family either, whatever was remembered.
        if v4.answer.no_such_name && !v6.answered {
            v6.answer = Answer::none(None);
        }
        if v6.answer.no_such_name && !v4.answered {
            v4.answer = Answer::none(None);
        }
        v4.and(v6)
    }

    /// The answer to a question. If the question fails, the last useful answer.
    async fn lookup(&self, name: &Name, kind: RecordType) -> Found {
        match self.client.ask(name, kind).await {
            Ok(answer) => {
                self.answers.keep(name, kind, &answer);
                Found::answered(answer)
            }
            Err(Unanswered { reason, responded, for_good }) => {
                let last = self.answers.last(name, kind);
                let answer = last.unwrap_or_else(|| Answer::none(None)).soon();
                let what = format!("{kind} of {name}");
                let failure = Failure { what, reason, responded, for_good };
                Found { answer, failures: vec![failure], answered: false }
            }
        }
    }
}

/// Reads `input` as a server's message.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(input: &[u8]) {
    let Ok(message) = hickory_resolver::proto::op::Message::from_vec(input) else { return };
    let answer = Answer::new(&message.answers, &message.additionals);
    for target in answer.targets() {
        let _ = endpoints(&answer.glue(&target.host), &target.host, &target.port.to_string());
    }
    let _ = endpoints(&answer, &Name::root(), "80");
    let _ = Answer::none(None).and(answer).ttl.bounded();
}

/// A host's endpoints, and its addresses that are not usable.
fn endpoints(answer: &Answer, host: &Name, port: &str) -> (Vec<Endpoint>, Vec<Rejected>) {
    let mut list = Vec::new();
    let mut rejected = Vec::new();
    for ip in answer.addresses() {
        match address::endpoint(&ip.to_string(), port) {
            Ok(endpoint) => list.push(endpoint),
            Err(reason) => rejected.push(Rejected { what: format!("host {host}"), reason }),
        }
    }
    (list, rejected)
}
