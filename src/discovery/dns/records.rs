//! The content of DNS records. Pure.

use std::{net::IpAddr, time::Duration};

use hickory_resolver::proto::rr::{Name, RData, Record};

/// The records of an answer.
#[derive(Debug, Clone, Default)]
pub(super) struct Answer {
    answers: Vec<Record>,
    additionals: Vec<Record>,
    pub(super) ttl: Ttl,
    /// The name does not exist, for any type of records.
    pub(super) no_such_name: bool,
}

/// How long an answer is valid, in seconds: the shortest TTL of its parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ttl(u32);

impl Default for Ttl {
    /// Longer than any real TTL.
    fn default() -> Self {
        Self(u32::MAX)
    }
}

impl Ttl {
    /// The time until the next question: short enough to notice changes, long enough for any server.
    pub(super) fn bounded(self) -> Duration {
        Duration::from_secs(self.0.clamp(1, 60).into())
    }
}

/// The target of an SRV record.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Target {
    pub(super) priority: u16,
    pub(super) host: Name,
    pub(super) port: u16,
}

/// Seconds until the next question after a failure, and for a name without records if the server gives no TTL.
const UNSAID: u32 = 5;

impl Answer {
    /// Maximum number of records of one kind that are kept. An answer may have up to 4,000.
    const MOST: usize = 1000;

    pub(super) fn new(answers: &[Record], additionals: &[Record]) -> Self {
        let ttl = answers.iter().map(|record| Ttl(record.ttl)).min().unwrap_or(Ttl(UNSAID));
        let some = |records: &[Record]| records.iter().take(Self::MOST).cloned().collect();
        Self { answers: some(answers), additionals: some(additionals), ttl, no_such_name: false }
    }

    /// The same answer, but it is asked for again soon.
    pub(super) fn soon(self) -> Self {
        Self { ttl: self.ttl.min(Ttl(UNSAID)), ..self }
    }

    /// Whether it contains addresses or targets.
    pub(super) fn is_of_use(&self) -> bool {
        !self.targets().is_empty() || !self.addresses().is_empty()
    }

    /// An answer without records. `ttl`: for how many seconds this is valid.
    pub(super) fn none(ttl: Option<u32>) -> Self {
        Self { ttl: Ttl(ttl.unwrap_or(UNSAID)), ..Self::default() }
    }

    /// Combines both answers.
    pub(super) fn and(mut self, other: Self) -> Self {
        // An empty answer of one family does not shorten the TTL of the other one.
        self.ttl = match (self.answers.is_empty(), other.answers.is_empty()) {
            (false, true) => self.ttl,
            (true, false) => other.ttl,
            _ => self.ttl.min(other.ttl),
        };
        self.no_such_name |= other.no_such_name;
        self.answers.extend(other.answers);
        self.additionals.extend(other.additionals);
        self
    }

    pub(super) fn addresses(&self) -> Vec<IpAddr> {
        self.answers.iter().filter_map(address).collect()
    }

    /// Sorted by priority.
    pub(super) fn targets(&self) -> Vec<Target> {
        let mut targets: Vec<_> = self
            .answers
            .iter()
            .filter_map(|record| match &record.data {
                RData::SRV(srv) => Some(Target {
                    priority: srv.priority,
                    host: srv.target.clone(),
                    port: srv.port,
                }),
                _ => None,
            })
            .collect();
        targets.sort();
        targets.dedup();
        targets
    }

    /// The addresses of a target that came with the same answer.
    pub(super) fn glue(&self, host: &Name) -> Self {
        let of_host = |record: &&Record| record.name == *host && address(record).is_some();
        let answers: Vec<_> = self.additionals.iter().filter(of_host).cloned().collect();
        Self::new(&answers, &[])
    }
}

fn address(record: &Record) -> Option<IpAddr> {
    match &record.data {
        RData::A(ip) => Some(IpAddr::V4(**ip)),
        RData::AAAA(ip) => Some(IpAddr::V6(**ip)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use hickory_resolver::proto::rr::rdata::{A, AAAA, SRV};

    use super::*;

    fn name(text: &str) -> Name {
        Name::from_ascii(text).unwrap()
    }

    fn a(host: &str, ttl: u32, ip: &str) -> Record {
        Record::from_rdata(name(host), ttl, RData::A(A(ip.parse().unwrap())))
    }

    fn aaaa(host: &str, ttl: u32, ip: &str) -> Record {
        Record::from_rdata(name(host), ttl, RData::AAAA(AAAA(ip.parse().unwrap())))
    }

    fn srv(priority: u16, port: u16, host: &str) -> Record {
        Record::from_rdata(name("s."), 30, RData::SRV(SRV::new(priority, 1, port, name(host))))
    }

    fn texts(answer: &Answer) -> Vec<String> {
        answer.addresses().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_shortest_time_to_live_counts() {
        for (answer, seconds) in [
            (Answer::new(&[a("h.", 30, "10.0.0.1"), a("h.", 20, "10.0.0.2")], &[]), 20),
            (Answer::new(&[a("h.", 0, "10.0.0.1")], &[]), 1),
            (Answer::new(&[a("h.", 86_400, "10.0.0.1")], &[]), 60),
            (Answer::none(Some(40)), 40),
            (Answer::none(None), 5),
            (Answer::none(None).and(Answer::new(&[a("h.", 50, "10.0.0.1")], &[])), 50),
            (Answer::new(&[a("h.", 50, "10.0.0.1")], &[]).and(Answer::none(None)), 50),
            (Answer::none(Some(9)).and(Answer::none(Some(8))), 8),
        ] {
            assert_eq!(answer.ttl.bounded(), Duration::from_secs(seconds), "{answer:?}");
        }
    }

    #[test]
    fn of_endless_records_the_first_are_kept() {
        let many: Vec<_> =
            (0..4000).map(|n| a("h.", 1, &format!("10.0.{}.{}", n / 256, n % 256))).collect();
        let answer = Answer::new(&many, &many);
        assert_eq!(answer.addresses().len(), Answer::MOST);
        assert_eq!(answer.glue(&name("h.")).addresses().len(), Answer::MOST);
    }

    #[test]
    fn both_families_are_addresses() {
        let v4 = Answer::new(&[a("h.", 1, "10.0.0.1"), srv(1, 1, "t.")], &[]);
        let v6 = Answer::new(&[aaaa("h.", 1, "fd00::1")], &[]);
        assert_eq!(texts(&v4.and(v6)), ["10.0.0.1", "fd00::1"]);
    }

    #[test]
    fn targets_come_by_priority_and_their_addresses_from_beside_them() {
        let additionals =
            [a("B.", 1, "10.0.0.2"), aaaa("b.", 1, "fd00::2"), a("c.", 1, "10.0.0.3")];
        let answer =
            Answer::new(&[srv(2, 80, "a."), srv(1, 81, "b."), srv(1, 81, "b.")], &additionals);
        let targets = answer.targets();
        let shown: Vec<_> =
            targets.iter().map(|t| format!("{} {}:{}", t.priority, t.host, t.port)).collect();
        assert_eq!(shown, ["1 b.:81", "2 a.:80"]);
        assert_eq!(texts(&answer.glue(&name("b."))), ["10.0.0.2", "fd00::2"]);
        assert_eq!(texts(&answer.glue(&name("a."))), [""; 0]);
    }
}
