//! A registry that does not answer, or not correctly.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use testbed::{Container, Daemon, Embassy, Host, Process, testbed_program};

use super::{VIP, last, meets, meets_no_more, unharmed};
use crate::{
    READY, WAIT,
    support::{ETCD, metric, offer, says},
};

#[derive(Clone, Copy, PartialEq)]
enum Registry {
    Consul,
    Etcd,
}

/// A temporary fault.
enum Fault {
    /// Killed and started again. Consul is then empty, with a lower index.
    Killed,
    /// Its process is stopped.
    Frozen,
    /// No packet reaches it.
    CutOff,
    /// Another server in its place sends this answer, with this many bytes per second (0: all at once).
    Answers(&'static str, &'static str),
}

const FAULTS: [(&str, Fault); 8] = [
    ("killed", Fault::Killed),
    ("frozen", Fault::Frozen),
    ("cut off", Fault::CutOff),
    ("answers 500", Fault::Answers("HTTP/1.1 500 No\\r\\nContent-Length: 2\\r\\n\\r\\nno", "0")),
    ("answers 429", Fault::Answers("HTTP/1.1 429 Slow\\r\\nContent-Length: 0\\r\\n\\r\\n", "0")),
    ("answers garbage", Fault::Answers("\\n\\n SSH-2.0 \\n", "0")),
    (
        "answers half a body",
        Fault::Answers(
            "HTTP/1.1 200 OK\\r\\nX-Consul-Index: 7\\r\\nContent-Length: 99\\r\\n\\r\\n[",
            "0",
        ),
    ),
    (
        "answers a byte a second",
        Fault::Answers(
            "HTTP/1.1 200 OK\\r\\nX-Consul-Index: 7\\r\\nContent-Length: 2\\r\\n\\r\\n[]",
            "1",
        ),
    ),
];

#[test]
fn no_request_fails_whatever_happens_to_consul() -> Result<()> {
    none_fails(Registry::Consul, "-discovery=consul://127.0.0.1:8500", "web;80")
}

#[test]
fn no_request_fails_whatever_happens_to_etcd() -> Result<()> {
    none_fails(Registry::Etcd, ETCD, "/services/web;80")
}

fn none_fails(registry: Registry, discovery: &str, binding: &str) -> Result<()> {
    let host = Host::light()?;
    let webs = ["web-1", "web-2"].map(|name| host.web(name).start());
    let [one, two] = webs;
    let (webs, extra) = ([one?, two?], host.web("extra").start()?);
    let app = host.client("app").env("BACKEND_WEB", binding).start()?;
    webs.iter().try_for_each(|web| registry.register(&host, web))?;
    // A killed Consul loses everything for the duration of the fault.
    let embassy = host.embassy(["--dnat", discovery, "--empty-hold=1h"])?;
    embassy.wait_ready(READY)?;
    meets(&app, "web-1")?;
    // One connection through all faults.
    let live = app.live("live", VIP)?;

    let name = registry.name();
    for (n, (what, fault)) in FAULTS.iter().enumerate() {
        let traffic = app.traffic(&format!("traffic-{n}"), VIP)?;
        registry.suffer(&host, &embassy, fault)?;
        if matches!(fault, Fault::Killed | Fault::Answers(..)) && registry == Registry::Consul {
            // It has lost everything, which is a valid answer. This answer takes effect only after a while.
            last()?;
            webs.iter().try_for_each(|web| registry.register(&host, web))?;
        }
        // It is back.
        let recovery = if n % 2 == 0 {
            registry.register(&host, &extra)?;
            meets(&app, "extra")?
        } else {
            registry.deregister(&host, &extra)?;
            meets_no_more(&app, "extra")?
        };
        unharmed(&format!("{name} {what}"), &traffic.stop()?, Some(recovery))?;
    }
    unharmed(&format!("{name}: one connection through all of this"), &live.stop()?, None)
}

#[test]
fn a_consul_that_lost_all_its_data_is_believed_after_the_hold() -> Result<()> {
    all_lost(Registry::Consul, "-discovery=consul://127.0.0.1:8500", "web;80")
}

#[test]
fn an_etcd_that_lost_all_its_data_is_believed_after_the_hold() -> Result<()> {
    all_lost(Registry::Etcd, ETCD, "/services/web;80")
}

/// Its endpoints stay in use for the hold, are then removed, and return with its data.
fn all_lost(registry: Registry, discovery: &str, binding: &str) -> Result<()> {
    const HOLD: Duration = Duration::from_secs(6);
    let host = Host::light()?;
    let web = host.web("web").start()?;
    registry.register(&host, &web)?;
    let app = host.client("app").env("BACKEND_WEB", binding).start()?;
    let embassy = host.embassy(["--dnat", discovery, "--empty-hold=6s"])?;
    embassy.wait_ready(READY)?;
    meets(&app, "web")?;
    let live = app.live("live", VIP)?;
    let start = Instant::now();
    match registry {
        Registry::Consul => {
            host.consul_daemon().kill()?;
            host.consul_daemon().start()?;
        }
        Registry::Etcd => host.etcd()?.v3().delete_all("/services/")?,
    }
    says(&embassy, &["the last ones stay in use for --empty-hold"])?;
    let mut held = 0;
    let gone = testbed::eventually(HOLD + WAIT, "the last endpoint to go", || {
        let answers = app.get(VIP).run()?;
        held += answers.answered();
        ensure!(answers.failures.contains_key("read: reset"), "{answers:?}");
        Ok(start.elapsed())
    })?;
    ensure!(gone >= HOLD && held > 0, "{held} requests, gone after {gone:?}");
    ensure!(metric(&embassy, "embassy_connections_total{outcome=\"no_endpoint\"}")? > 0);
    registry.register(&host, &web)?;
    let back = meets(&app, "web")?;
    let name = registry.name();
    println!(
        "{name} lost all: {held} requests served for {gone:.1?}; served again {back:.1?} after it was filled"
    );
    unharmed(&format!("{name} lost all: a connection that lives on"), &live.stop()?, None)
}

impl Registry {
    fn name(self) -> &'static str {
        match self {
            Self::Consul => "consul",
            Self::Etcd => "etcd",
        }
    }

    fn port(self) -> &'static str {
        match self {
            Self::Consul => "8500",
            Self::Etcd => "2379",
        }
    }

    fn daemon(self, host: &Host) -> &Daemon {
        match self {
            Self::Consul => host.consul_daemon(),
            Self::Etcd => host.etcd_daemon(),
        }
    }

    fn register(self, host: &Host, web: &Container) -> Result<()> {
        match self {
            Self::Consul => {
                host.consul()?.service(web.name(), "web").address(web.ip()?).port(80).register()
            }
            Self::Etcd => offer(host, "web", web.ip()?),
        }
    }

    fn deregister(self, host: &Host, web: &Container) -> Result<()> {
        match self {
            // A Consul that has lost everything has lost this too.
            Self::Consul => host.consul()?.deregister(web.name()).or(Ok(())),
            Self::Etcd => {
                let endpoint = format!("{}:80", web.ip()?);
                host.etcd()?.v3().delete(&format!("/services/web/{endpoint}"))
            }
        }
    }

    /// Causes a fault, and ends it.
    fn suffer(self, host: &Host, embassy: &Embassy, fault: &Fault) -> Result<()> {
        let daemon = self.daemon(host);
        match fault {
            Fault::Killed => {
                daemon.kill()?;
                last()?;
                self.is_down(embassy)?;
                daemon.start()
            }
            Fault::Frozen => {
                daemon.pause()?;
                last()?;
                daemon.resume()
            }
            Fault::CutOff => {
                host.run("nft", ["add table inet cut"])?;
                let chain = "add chain inet cut out { type filter hook output priority 0; }";
                host.run("nft", [chain])?;
                let port = self.port();
                host.run("nft", [format!("add rule inet cut out tcp dport {port} drop")])?;
                last()?;
                host.run("nft", ["delete table inet cut"]).map(drop)
            }
            Fault::Answers(text, rate) => {
                daemon.kill()?;
                let other = self.other(host, text, rate)?;
                let asked = || other.log().lines().filter(|line| *line == "asked").count();
                // After several faults in a row, the pause between two attempts may be 5 s, which is most of this test's
                // time.
                testbed::eventually(WAIT, "a request", || {
                    ensure!(asked() > 0, "{}", other.log());
                    Ok(())
                })?;
                last()?;
                self.is_down(embassy)?;
                let asked = asked();
                drop(other);
                println!("    asked {asked} times");
                ensure!(asked < 30, "asked {asked} times");
                daemon.start()
            }
        }
    }

    /// Waits until it is reported that the registry does not answer. A hanging one is reported later (see `long`).
    fn is_down(self, embassy: &Embassy) -> Result<()> {
        let source = match self {
            Self::Consul => "consul web",
            Self::Etcd => "etcd /services/web",
        };
        testbed::eventually(WAIT, &format!("{source} to be down"), || {
            let metrics = embassy.admin("/metrics")?.ok()?;
            ensure!(metrics.contains(&format!("embassy_source_up{{source=\"{source}\"}} 0")));
            Ok(())
        })?;
        says(embassy, &["source does not answer; its last data stays in use", source])
    }

    /// The server in its place.
    fn other(self, host: &Host, text: &str, rate: &str) -> Result<Process> {
        let mut command = host.command(testbed_program()?);
        command.args(["peer", "answer", "--port", self.port(), "--text", text, "--rate", rate]);
        // Each has a separate log, to count its lines.
        let digest = text.bytes().fold(0u32, |sum, byte| sum.wrapping_mul(31) + u32::from(byte));
        host.spawn(&format!("other-{digest}-{rate}"), command)
    }
}
