//! `dns://`, with a real server (dnsmasq), and with broken ones.

use std::{
    net::Ipv4Addr,
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::Result;
use embassy::{discovery::Endpoints, source::Known};
use hickory_resolver::proto::{
    op::{Message, OpCode, Query, ResponseCode},
    rr::{
        Name, RData, Record, RecordType,
        rdata::{A, AAAA, SRV},
    },
};
use tempfile::TempDir;
use tokio::net::UdpSocket;

use crate::{
    followed::{Followed, list, rejected},
    process::{Process, free_ports},
};

/// dnsmasq with the zone `test` and no upstream server.
struct Dnsmasq {
    port: u16,
    folder: TempDir,
    process: Option<Process>,
}

impl Dnsmasq {
    fn start(records: &[&str]) -> Result<Self> {
        let [port] = free_ports();
        let mut dnsmasq = Self { port, folder: tempfile::tempdir()?, process: None };
        dnsmasq.restart(records);
        Ok(dnsmasq)
    }

    /// Restarts it with other records, at the same address.
    fn restart(&mut self, records: &[&str]) {
        self.stop();
        let mut command = Command::new("/usr/sbin/dnsmasq");
        command
            .args(["--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts"])
            .args(["--pid-file=", "--user=root", "--log-facility=-"])
            .args(["--listen-address=127.0.0.1", "--bind-interfaces"])
            // Short times to live, so that a change is seen after a second; and at most 512 bytes via UDP.
            .args(["--local=/test/", "--local-ttl=1", "--edns-packet-max=512"])
            .arg(format!("--port={}", self.port))
            .args(records);
        self.process = Some(Process::start(&mut command, &self.folder.path().join("log")));
    }

    fn stop(&mut self) {
        self.process = None;
    }

    /// Without a hold: only the server's last answer counts.
    fn follow(&self, descriptor: &str) -> Followed {
        Followed::new(&format!("dns://127.0.0.1:{}?hold=0", self.port), descriptor)
    }
}

#[tokio::test]
async fn services_and_their_targets_are_followed() -> Result<()> {
    let mut dns = Dnsmasq::start(&[
        "--srv-host=_web._tcp.test,a.test,8080,1,1",
        "--srv-host=_web._tcp.test,b.test,8081,1,1",
        "--srv-host=_web._tcp.test,c.test,8082,2,1",
        "--host-record=a.test,10.0.0.1",
        "--host-record=b.test,10.0.0.2,fd00::2",
        "--host-record=c.test,10.0.0.3",
    ])?;
    let web = dns.follow("_web._tcp.test;80");
    web.sees(&["10.0.0.1:8080", "10.0.0.2:8081", "[fd00::2]:8081"]).await;

    // The best priority has no address left: the next one is used.
    dns.restart(&[
        "--srv-host=_web._tcp.test,a.test,8080,1,1",
        "--srv-host=_web._tcp.test,c.test,8082,2,1",
        "--host-record=c.test,10.0.0.3",
    ]);
    let known = web.sees(&["10.0.0.3:8082"]).await;
    assert_eq!(rejected(&known), ["host a.test.: it has no address"]);

    dns.restart(&[]);
    let known = web.sees(&[]).await;
    assert_eq!(problem(&known), "the name does not exist in DNS (NXDOMAIN)");
    // The name exists, but has no records with addresses.
    dns.restart(&["--txt-record=_web._tcp.test,hello"]);
    web.until("another reason", |known| problem(known) == "the name has no SRV, A or AAAA records")
        .await;
    dns.restart(&["--srv-host=_web._tcp.test,nowhere.test,80,1,1"]);
    let skipped = "its one target was skipped (host nowhere.test.: it has no address)";
    web.until("another reason", |known| problem(known) == skipped).await;
    Ok(())
}

/// Why there is no endpoint.
fn problem(known: &Known<Endpoints>) -> &str {
    known.value.as_ref().and_then(|answer| answer.problem.as_deref()).unwrap_or_default()
}

#[tokio::test]
async fn a_host_is_an_endpoint_on_the_port_of_the_descriptor() -> Result<()> {
    let mut dns =
        Dnsmasq::start(&["--host-record=db.test,10.0.0.1,fd00::1", "--cname=alias.test,db.test"])?;
    let db = dns.follow("db.test;5432");
    let alias = dns.follow("alias.test;80");
    db.sees(&["10.0.0.1:5432", "[fd00::1]:5432"]).await;
    alias.sees(&["10.0.0.1:80", "[fd00::1]:80"]).await;

    dns.restart(&["--host-record=db.test,10.0.0.7"]);
    db.sees(&["10.0.0.7:5432"]).await;
    alias.sees(&[]).await;
    Ok(())
}

#[tokio::test]
async fn an_answer_too_long_for_udp_comes_by_tcp() -> Result<()> {
    let records: Vec<_> = (1..=200).map(|i| format!("--host-record=big.test,10.0.0.{i}")).collect();
    let dns = Dnsmasq::start(&records.iter().map(String::as_str).collect::<Vec<_>>())?;
    let big = dns.follow("big.test;80");
    let known = big.until("an answer", |known| known.value.is_some()).await;
    assert_eq!(list(&known).unwrap().len(), 200);
    Ok(())
}

#[tokio::test]
async fn a_server_that_does_not_answer_takes_nothing_away() -> Result<()> {
    let records = ["--host-record=db.test,10.0.0.1"];
    let mut dns = Dnsmasq::start(&records)?;
    let db = dns.follow("db.test;80");
    db.sees(&["10.0.0.1:80"]).await;
    dns.stop();
    let known = db.fails(&format!("SRV of db.test. from 127.0.0.1:{}: ", dns.port)).await;
    assert_eq!(list(&known).unwrap(), ["10.0.0.1:80"]);
    dns.restart(&records);
    db.sees(&["10.0.0.1:80"]).await;
    Ok(())
}

#[tokio::test]
async fn what_a_server_refuses_and_what_is_no_name_are_errors() -> Result<()> {
    let dns = Dnsmasq::start(&["--host-record=db.test,10.0.0.1"])?;
    dns.follow("elsewhere.example;80").fails("SRV of elsewhere.example. from 127.0.0.1:").await;
    dns.follow("a..b;80").fails("\"a..b\" is not a name of DNS").await;
    Ok(())
}

#[tokio::test]
async fn silence_and_garbage_are_errors() -> Result<()> {
    for garbage in [None, Some(&[0xff; 40][..]), Some(&[])] {
        let socket = UdpSocket::bind("127.0.0.1:0").await?;
        let uri = format!("dns://{}", socket.local_addr()?);
        tokio::spawn(async move {
            let mut question = [0; 512];
            while let Ok((_, client)) = socket.recv_from(&mut question).await {
                if let Some(garbage) = garbage {
                    // The question's ID, so that it looks like an answer.
                    let answer = [&question[..2], garbage].concat();
                    let _ = socket.send_to(&answer, client).await;
                }
            }
        });
        let known = Followed::new(&uri, "db.test;80").fails("SRV of db.test. from").await;
        assert!(known.value.is_none());
    }
    Ok(())
}

/// A server's answer to one question.
#[derive(Clone)]
enum Reply {
    Records(Vec<RData>),
    Code(ResponseCode),
    /// A response code, without repeating the question.
    BareCode(ResponseCode),
    Silence,
}

use Reply::{BareCode, Code, Records, Silence};

/// A server that answers via UDP as configured for each name, type, and whether EDNS is used. Records live for a second.
struct Fake {
    port: u16,
    rules: Arc<Mutex<Rules>>,
}

type Rules = Box<dyn FnMut(&str, RecordType, bool) -> Reply + Send>;

impl Fake {
    async fn start(
        rules: impl FnMut(&str, RecordType, bool) -> Reply + Send + 'static,
    ) -> Result<Self> {
        let socket = UdpSocket::bind("127.0.0.1:0").await?;
        let port = socket.local_addr()?.port();
        let rules: Arc<Mutex<Rules>> = Arc::new(Mutex::new(Box::new(rules)));
        let told = rules.clone();
        tokio::spawn(async move {
            let mut packet = [0; 2048];
            while let Ok((length, client)) = socket.recv_from(&mut packet).await {
                let question = Message::from_vec(&packet[..length]).expect("a question");
                let query = question.queries[0].clone();
                let (name, kind, edns) =
                    (query.name().to_string(), query.query_type(), question.edns.is_some());
                let reply = told.lock().unwrap()(&name, kind, edns);
                if let Some(answer) = message(question.metadata.id, query, reply) {
                    let _ = socket.send_to(&answer.to_vec().unwrap(), client).await;
                }
            }
        });
        Ok(Self { port, rules })
    }

    /// Changes the answers.
    fn answers(&self, rules: impl FnMut(&str, RecordType, bool) -> Reply + Send + 'static) {
        *self.rules.lock().unwrap() = Box::new(rules);
    }

    fn follow(&self, descriptor: &str, hold: u32) -> Followed {
        Followed::new(&format!("dns://127.0.0.1:{}?hold={hold}", self.port), descriptor)
    }
}

fn message(id: u16, query: Query, reply: Reply) -> Option<Message> {
    let mut message = Message::response(id, OpCode::Query);
    let name = query.name().clone();
    match reply {
        Silence => return None,
        BareCode(code) => message.metadata.response_code = code,
        Code(code) => {
            message.metadata.response_code = code;
            message.add_query(query);
        }
        Records(records) => {
            message.add_query(query);
            message
                .add_answers(records.into_iter().map(|r| Record::from_rdata(name.clone(), 1, r)));
        }
    }
    Some(message)
}

fn a(host: u8) -> RData {
    RData::A(A(Ipv4Addr::new(10, 0, 0, host)))
}

fn aaaa(host: u8) -> RData {
    RData::AAAA(AAAA(format!("fd00::{host}").parse().unwrap()))
}

fn srv(priority: u16, port: u16, host: &str) -> RData {
    RData::SRV(SRV::new(priority, 1, port, Name::from_ascii(host).unwrap()))
}

/// Many home routers and load balancers know only A records.
#[tokio::test]
async fn an_error_for_one_type_of_records_does_not_spoil_the_others() -> Result<()> {
    futures_util::future::try_join_all([
        one_type_is_enough(Code(ResponseCode::ServFail)),
        one_type_is_enough(Code(ResponseCode::NotImp)),
        one_type_is_enough(Code(ResponseCode::Refused)),
        one_type_is_enough(Silence),
    ])
    .await?;
    Ok(())
}

/// All other questions are answered by `error`.
async fn one_type_is_enough(error: Reply) -> Result<()> {
    let failing = error.clone();
    let fake = Fake::start(move |name, kind, _| match kind {
        RecordType::A if name == "db.test." => Records(vec![a(1)]),
        _ => failing.clone(),
    })
    .await?;
    let known = fake.follow("db.test;80", 0).sees(&["10.0.0.1:80"]).await;
    assert_eq!(known.failures, 0);
    let rejected = known.value.iter().flat_map(|value| &value.rejected);
    let what: Vec<_> = rejected.map(|rejected| rejected.what.clone()).collect();
    assert_eq!(what, ["AAAA of db.test.", "SRV of db.test."], "what failed is told");
    // If no type gives records, it is unknown whether there are any.
    let known = fake.follow("other.test;80", 0).fails("SRV of other.test. from").await;
    assert_eq!(list(&known), None);
    // A server that reports an error works. One that does not answer may be down.
    assert_eq!(known.refused, !matches!(error, Silence));

    // Only A fails.
    fake.answers(move |_, kind, _| match kind {
        RecordType::AAAA => Records(vec![aaaa(1)]),
        RecordType::A => error.clone(),
        _ => Records(vec![]),
    });
    fake.follow("six.test;80", 0).sees(&["[fd00::1]:80"]).await;
    Ok(())
}

/// The descriptor's port may be another service's port.
#[tokio::test]
async fn a_name_is_taken_for_a_host_only_if_srv_fails_again_and_again() -> Result<()> {
    let asked = std::sync::atomic::AtomicUsize::new(0);
    let fake = Fake::start(move |name, kind, _| match (name, kind) {
        ("web.test.", RecordType::SRV) => {
            // Each time with EDNS and without.
            match asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed) {
                0..3 => Code(ResponseCode::ServFail),
                _ => Records(vec![srv(1, 8080, "one.")]),
            }
        }
        ("web.test." | "one.", RecordType::A) => Records(vec![a(1)]),
        _ => Records(vec![]),
    })
    .await?;
    let known = fake.follow("web.test;80", 0).sees(&["10.0.0.1:8080"]).await;
    assert_eq!((known.failures, known.changes), (0, 1), "nothing else was ever said");
    Ok(())
}

#[tokio::test]
async fn what_fails_for_a_while_keeps_its_last_records() -> Result<()> {
    let both = |_: &str, kind, _| match kind {
        RecordType::A => Records(vec![a(1)]),
        RecordType::AAAA => Records(vec![aaaa(1)]),
        _ => Records(vec![]),
    };
    let fake = Fake::start(both).await?;
    let db = fake.follow("db.test;80", 0);
    db.sees(&["10.0.0.1:80", "[fd00::1]:80"]).await;
    fake.answers(|_, kind, _| match kind {
        RecordType::A => Records(vec![a(2)]),
        RecordType::AAAA => Code(ResponseCode::ServFail),
        _ => Records(vec![]),
    });
    db.sees(&["10.0.0.2:80", "[fd00::1]:80"]).await;
    // A name that does not exist has no records of any type.
    fake.answers(|_, kind, _| match kind {
        RecordType::A => Code(ResponseCode::NXDomain),
        RecordType::AAAA => Code(ResponseCode::ServFail),
        _ => Records(vec![]),
    });
    db.sees(&[]).await;
    Ok(())
}

/// Its ports would be wrong: if SRV records were known once, an error does not turn the name into a host.
#[tokio::test]
async fn a_service_whose_srv_records_fail_is_no_host() -> Result<()> {
    let good = |name: &str, kind, _| match (name, kind) {
        ("web.test.", RecordType::SRV) => Records(vec![srv(1, 8080, "one."), srv(1, 8081, "two.")]),
        ("one.", RecordType::A) => Records(vec![a(1)]),
        ("two.", RecordType::A) => Records(vec![a(2)]),
        ("web.test.", RecordType::A) => Records(vec![a(9)]),
        _ => Records(vec![]),
    };
    let fake = Fake::start(good).await?;
    let web = fake.follow("web.test;80", 0);
    web.sees(&["10.0.0.1:8080", "10.0.0.2:8081"]).await;
    // One of the targets fails too, and keeps its last address.
    fake.answers(move |name, kind, edns| match (name, kind) {
        ("web.test.", RecordType::SRV) | ("two.", _) => Code(ResponseCode::ServFail),
        ("one.", RecordType::A) => Records(vec![a(3)]),
        _ => good(name, kind, edns),
    });
    let known = web.sees(&["10.0.0.2:8081", "10.0.0.3:8080"]).await;
    assert_eq!(known.failures, 0);
    // Of two targets, one that was never known is missing, and this is reported.
    fake.answers(move |name, kind, edns| match (name, kind) {
        ("two.", _) => Code(ResponseCode::ServFail),
        _ => good(name, kind, edns),
    });
    let known = fake.follow("web.test;80", 0).sees(&["10.0.0.1:8080"]).await;
    assert!(rejected(&known)[0].starts_with("A of two.: "), "{:?}", rejected(&known));
    Ok(())
}

#[tokio::test]
async fn a_server_without_edns_is_asked_again_without() -> Result<()> {
    for refusal in [
        Code(ResponseCode::FormErr),
        BareCode(ResponseCode::FormErr),
        Code(ResponseCode::NotImp),
        Silence,
    ] {
        let plain = Arc::new(AtomicUsize::new(0));
        let counted = plain.clone();
        let fake = Fake::start(move |_, kind, edns| match kind {
            _ if edns => refusal.clone(),
            RecordType::A => {
                counted.fetch_add(1, Relaxed);
                Records(vec![a(1)])
            }
            _ => Records(vec![]),
        })
        .await?;
        let known = fake.follow("db.test;80", 0).sees(&["10.0.0.1:80"]).await;
        assert_eq!((known.failures, rejected(&known)), (0, vec![]));
        assert!(plain.load(Relaxed) > 0);
    }
    Ok(())
}

/// Three of ten in each answer, as Consul's DNS and Route 53 do.
#[tokio::test]
async fn a_list_of_which_a_part_is_shown_each_time_does_not_flap() -> Result<()> {
    let turn = Arc::new(AtomicUsize::new(0));
    let turns = turn.clone();
    let fake = Fake::start(move |_, kind, _| match kind {
        RecordType::A => {
            let first = turns.fetch_add(1, Relaxed) * 3;
            Records((0..3).map(|i| a(((first + i) % 10) as u8)).collect())
        }
        _ => Records(vec![]),
    })
    .await?;
    let web = fake.follow("web.test;80", 20);
    let all: Vec<_> = (0..10).map(|host| format!("10.0.0.{host}:80")).collect();
    let all: Vec<_> = all.iter().map(String::as_str).collect();
    let changes = web.sees(&all).await.changes;
    let seen = turn.load(Relaxed);
    web.until("five more answers", |_| turn.load(Relaxed) > seen + 5).await;
    assert_eq!(web.sees(&all).await.changes, changes, "it is the same list");

    // An endpoint that stays away is removed after its time, the others are not.
    let web = fake.follow("web.test;80", 2);
    fake.answers(|_, kind, _| match kind {
        RecordType::A => Records(vec![a(1), a(2)]),
        _ => Records(vec![]),
    });
    web.sees(&all[1..3]).await;
    fake.answers(|_, kind, _| match kind {
        RecordType::A => Records(vec![a(2)]),
        _ => Records(vec![]),
    });
    let answers = web.known().answers;
    let held = web.until("the next answer", |known| known.answers > answers).await;
    if held.confirmed.unwrap().elapsed() < Duration::from_secs(1) {
        assert_eq!(list(&held).unwrap(), all[1..3]);
    }
    web.sees(&all[2..3]).await;
    Ok(())
}
