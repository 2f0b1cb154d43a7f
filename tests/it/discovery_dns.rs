//! `dns://`, with a real server (dnsmasq), and with broken ones.

use std::process::Command;

use anyhow::Result;
use tempfile::TempDir;
use tokio::net::UdpSocket;

use crate::{
    followed::{Followed, list, rejected},
    process::{Process, free_ports},
};

/// dnsmasq with the zone `test` and nothing above it.
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

    /// With other records, at the same address.
    fn restart(&mut self, records: &[&str]) {
        self.stop();
        let mut command = Command::new("/usr/sbin/dnsmasq");
        command
            .args(["--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts"])
            .args(["--pid-file=", "--user=root", "--log-facility=-"])
            .args(["--listen-address=127.0.0.1", "--bind-interfaces"])
            // So that a change is due after a second, and 512 bytes are the most that UDP takes.
            .args(["--local=/test/", "--local-ttl=1", "--edns-packet-max=512"])
            .arg(format!("--port={}", self.port))
            .args(records);
        self.process = Some(Process::start(&mut command, &self.folder.path().join("log")));
    }

    fn stop(&mut self) {
        self.process = None;
    }

    fn follow(&self, descriptor: &str) -> Followed {
        Followed::new(&format!("dns://127.0.0.1:{}", self.port), descriptor)
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

    // The best priority has no address left: the next one counts.
    dns.restart(&[
        "--srv-host=_web._tcp.test,a.test,8080,1,1",
        "--srv-host=_web._tcp.test,c.test,8082,2,1",
        "--host-record=c.test,10.0.0.3",
    ]);
    let known = web.sees(&["10.0.0.3:8082"]).await;
    assert_eq!(rejected(&known), ["host a.test.: it has no address"]);

    dns.restart(&[]);
    web.sees(&[]).await;
    Ok(())
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
                    // The question's ID, so that it passes for an answer.
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
