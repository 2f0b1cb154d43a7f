//! Half an hour of everything at once: containers that come and go, endpoints that come and go, and faults of the registry,
//! the engine and the firewall, at random from a seed that repeats them. `make soak` runs it and prints the figures.

use std::{
    collections::BTreeMap,
    env,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::{Container, Daemon, Embassy, Host};

use crate::{
    READY, WAIT,
    support::{ETCD, offer, reaches},
};

/// What every consumer dials; `a` and `b` mean different services by it.
const TARGET: &str = "172.17.0.1:80";
const SERVICES: [&str; 2] = ["a", "b"];
/// Endpoints of each service.
const ENDPOINTS: usize = 3;

#[test]
#[ignore = "takes half an hour: make soak"]
fn soak() -> Result<()> {
    let number = |name: &str, default: u64| match env::var(name) {
        Ok(text) => text.parse().with_context(|| format!("{name} {text:?}: expected a number")),
        Err(_) => Ok(default),
    };
    let (minutes, seed) = (number("MINUTES", 30)?, number("SEED", 1)?);
    println!("soak: {minutes} minutes, SEED={seed}");
    let world = World::new()?;
    let before = Size::of(&world.embassy)?;

    let (ledger, over) = (Ledger::default(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let mut loads = Vec::new();
        for consumer in &world.consumers {
            loads.push(scope.spawn(|| world.load(consumer, &ledger, &over)));
        }
        let churned = world.churn(seed, Duration::from_secs(minutes * 60), &ledger);
        over.store(true, Relaxed);
        for load in loads {
            load.join().expect("a load does not panic")?;
        }
        churned
    })?;

    world.mend()?;
    for (app, service) in &world.consumers {
        let answers = app.get(TARGET).times(100).run()?;
        ensure!(answers.answered() == 100 && only(&answers.by_body, service), "{answers:?}");
    }
    let after = Size::of(&world.embassy)?;
    let totals = ledger.totals()?;
    println!("requests: {}, failed: {:?}", totals.requests, totals.failures);
    println!("while connections were not captured or an endpoint was killed: {:?}", totals.excused);
    println!("slowest: {:?}; new consumers: {}", totals.slowest, totals.newcomers);
    println!("at the start: {before:?}; at the end: {after:?}");
    ensure!(totals.failures.is_empty(), "failures that no fault explains");
    // Of a leak by connection or by event there would be thousands.
    ensure!(after.descriptors < before.descriptors + 100, "descriptors leak");
    ensure!(after.resident_kib < before.resident_kib + 64 * 1024, "memory leaks");
    Ok(())
}

struct World {
    host: Host,
    embassy: Embassy,
    /// By service.
    endpoints: BTreeMap<&'static str, Vec<Container>>,
    /// Consumers that stay, and what they ask for.
    consumers: Vec<(Container, &'static str)>,
}

/// What is done to the world.
#[derive(Debug, Clone, Copy)]
enum Deed {
    /// An endpoint leaves the registry, stops, starts again and comes back.
    Replace,
    /// The same without a word to the registry before.
    Kill,
    /// The registry forgets a service for a moment.
    Empty,
    /// A new container asks for one of the services as its first act, and goes.
    Newcomer,
    FreezeRegistry,
    RestartRegistry,
    RestartEngine,
    FlushFirewall,
}

const DEEDS: [Deed; 12] = [
    Deed::Replace,
    Deed::Replace,
    Deed::Kill,
    Deed::Empty,
    Deed::Newcomer,
    Deed::Newcomer,
    Deed::Newcomer,
    Deed::Newcomer,
    Deed::FreezeRegistry,
    Deed::RestartRegistry,
    Deed::RestartEngine,
    Deed::FlushFirewall,
];

impl World {
    fn new() -> Result<Self> {
        let host = Host::builder().docker_args(["--live-restore"]).start()?;
        let mut endpoints = BTreeMap::new();
        let mut consumers = Vec::new();
        for service in SERVICES {
            let of_service: Vec<_> = (0..ENDPOINTS)
                .map(|n| {
                    let web = host.web(&format!("{service}{n}")).start()?;
                    offer(&host, service, web.ip()?)?;
                    Ok(web)
                })
                .collect::<Result<_>>()?;
            endpoints.insert(service, of_service);
            let app = host.client(&format!("app-{service}"));
            let binding = format!("/services/{service};80");
            consumers.push((app.env("BACKEND_WEB", &binding).start()?, service));
        }
        let embassy = host.embassy(["--dnat", ETCD])?;
        embassy.wait_ready(READY)?;
        let world = Self { host, embassy, endpoints, consumers };
        for (app, service) in &world.consumers {
            testbed::eventually(WAIT, "the first answer", || {
                let answers = app.get(TARGET).run()?;
                ensure!(answers.answered() == 1 && only(&answers.by_body, service), "{answers:?}");
                Ok(())
            })?;
        }
        Ok(world)
    }

    /// Requests without a pause. The engine may be away: it is not asked.
    fn load(
        &self,
        (app, service): &(Container, &'static str),
        ledger: &Ledger,
        over: &AtomicBool,
    ) -> Result<()> {
        let target = format!("--target={}", app.pid()?);
        while !over.load(Relaxed) {
            let start = Instant::now();
            let mut get = self.host.command("nsenter");
            get.arg(&target).args(["--net", "--"]).arg(testbed::testbed_program()?);
            get.args(["peer", "get", TARGET, "-n", "200", "-c", "4"]);
            let said = testbed::output(&mut get)?;
            ledger.add(start, service, &said)?;
        }
        Ok(())
    }

    fn churn(&self, seed: u64, time: Duration, ledger: &Ledger) -> Result<()> {
        let mut random = fastrand::Rng::with_seed(seed);
        let start = Instant::now();
        while start.elapsed() < time {
            let deed = *random.choice(&DEEDS).context("there are deeds")?;
            println!("{:>7.1} s {deed:?}", start.elapsed().as_secs_f64());
            self.act(deed, &mut random, ledger).with_context(|| format!("{deed:?}"))?;
            ensure!(self.embassy.exited()?.is_none(), "embassy ended");
            std::thread::sleep(Duration::from_millis(random.u64(100..2000)));
        }
        Ok(())
    }

    fn act(&self, deed: Deed, random: &mut fastrand::Rng, ledger: &Ledger) -> Result<()> {
        let service = SERVICES[random.usize(..SERVICES.len())];
        let pause = Duration::from_millis(random.u64(500..8000));
        let endpoint = &self.endpoints[service][random.usize(..ENDPOINTS)];
        match deed {
            Deed::Replace => {
                self.host.etcd()?.v3().delete(&key(service, endpoint)?)?;
                // Until embassy has heard of it, and connections that were under way have ended.
                std::thread::sleep(Duration::from_secs(2));
                endpoint.stop()?;
                std::thread::sleep(pause);
                self.bring_back(service, endpoint)
            }
            Deed::Kill => {
                let key = key(service, endpoint)?;
                let excuse = ledger.excuse();
                endpoint.kill()?;
                std::thread::sleep(Duration::from_secs(1));
                drop(excuse);
                std::thread::sleep(pause);
                self.host.etcd()?.v3().delete(&key)?;
                self.bring_back(service, endpoint)
            }
            Deed::Empty => {
                let etcd = self.host.etcd()?;
                etcd.v3().delete_all(&format!("/services/{service}/"))?;
                std::thread::sleep(pause);
                for endpoint in &self.endpoints[service] {
                    offer(&self.host, service, endpoint.ip()?)?;
                }
                Ok(())
            }
            Deed::Newcomer => {
                let binding = format!("BACKEND_WEB=/services/{service};80");
                let mut run = self.host.docker_command(["run", "--rm", "-e", &binding, "testbed"]);
                run.args(["testbed", "peer", "get", TARGET, "-n", "5"]);
                let start = Instant::now();
                ledger.add(start, service, &testbed::output(&mut run)?)?;
                ledger.lock()?.newcomers += 1;
                Ok(())
            }
            Deed::FreezeRegistry => {
                self.host.etcd_daemon().pause()?;
                std::thread::sleep(pause);
                self.host.etcd_daemon().resume()
            }
            Deed::RestartRegistry => self.away(self.host.etcd_daemon(), pause),
            Deed::RestartEngine => self.away(self.host.docker_daemon(), pause),
            Deed::FlushFirewall => {
                let excuse = ledger.excuse();
                let before = crate::support::restored(&self.embassy)?;
                self.host.run("iptables", ["-t", "nat", "-F", "PREROUTING"])?;
                let back = testbed::eventually(WAIT, "the rules to be back", || {
                    ensure!(crate::support::restored(&self.embassy)? > before);
                    Ok(())
                });
                drop(excuse);
                back
            }
        }
    }

    fn away(&self, daemon: &Daemon, pause: Duration) -> Result<()> {
        daemon.stop()?;
        std::thread::sleep(pause);
        daemon.start()
    }

    /// With whatever address it has now.
    fn bring_back(&self, service: &str, endpoint: &Container) -> Result<()> {
        endpoint.start()?;
        let address = endpoint.ip()?;
        testbed::eventually(WAIT, "the endpoint to answer", || {
            self.host.http("GET", &format!("http://{address}/"), "")?.ok()
        })?;
        offer(&self.host, service, address)
    }

    /// Everything up, and known to be.
    fn mend(&self) -> Result<()> {
        for (app, service) in &self.consumers {
            for endpoint in &self.endpoints[service] {
                reaches(app, TARGET, endpoint.name())?;
            }
        }
        Ok(())
    }
}

fn key(service: &str, endpoint: &Container) -> Result<String> {
    Ok(format!("/services/{service}/{}:80", endpoint.ip()?))
}

/// Whether only endpoints of `service` answered: their names begin with its.
fn only(answers: &BTreeMap<String, usize>, service: &str) -> bool {
    answers.keys().all(|name| name.starts_with(service))
}

/// What became of all requests.
#[derive(Debug, Default)]
struct Ledger(Mutex<Totals>);

#[derive(Debug, Default, Clone)]
struct Totals {
    requests: u64,
    newcomers: u64,
    failures: BTreeMap<String, u64>,
    /// Failures of batches that ran while something was done that connections cannot survive.
    excused: BTreeMap<String, u64>,
    slowest: Duration,
    /// Such a thing is being done now.
    excuse: bool,
    /// The last one ended then.
    last_excuse: Option<Instant>,
}

impl Ledger {
    fn lock(&self) -> Result<std::sync::MutexGuard<'_, Totals>> {
        self.0.lock().map_err(|_| anyhow::anyhow!("a load panicked"))
    }

    fn totals(&self) -> Result<Totals> {
        Ok(self.lock()?.clone())
    }

    /// Adds what a batch since `start` says. A wrong answer is never excused.
    fn add(&self, start: Instant, service: &str, said: &str) -> Result<()> {
        let said: Value = serde_json::from_str(said).with_context(|| format!("{said:?}"))?;
        let counts = |field: &str| -> BTreeMap<String, u64> {
            let entries = said[field].as_object().into_iter().flatten();
            entries.map(|(key, n)| (key.clone(), n.as_u64().unwrap_or_default())).collect()
        };
        let (answers, failures) = (counts("answers"), counts("failures"));
        let mut totals = self.lock()?;
        totals.requests += answers.values().chain(failures.values()).sum::<u64>();
        let slowest = Duration::from_millis(said["slowest_ms"].as_u64().unwrap_or_default());
        totals.slowest = totals.slowest.max(slowest);
        for (name, n) in answers.iter().filter(|(name, _)| !name.starts_with(service)) {
            *totals.failures.entry(format!("{service} was answered by {name}")).or_default() += n;
        }
        let excused = totals.excuse || totals.last_excuse.is_some_and(|end| end >= start);
        for (reason, n) in failures {
            if !excused {
                println!("          {service}: {n} times {reason}");
            }
            let totals = &mut *totals;
            let of = if excused { &mut totals.excused } else { &mut totals.failures };
            *of.entry(reason).or_default() += n;
        }
        Ok(())
    }

    /// Until it is dropped, failures are those of the fault.
    fn excuse(&self) -> Excuse<'_> {
        if let Ok(mut totals) = self.0.lock() {
            totals.excuse = true;
        }
        Excuse(self)
    }
}

struct Excuse<'a>(&'a Ledger);

impl Drop for Excuse<'_> {
    fn drop(&mut self) {
        if let Ok(mut totals) = self.0.0.lock() {
            totals.excuse = false;
            totals.last_excuse = Some(Instant::now());
        }
    }
}

/// What embassy uses.
#[derive(Debug)]
struct Size {
    resident_kib: u64,
    descriptors: usize,
}

impl Size {
    fn of(embassy: &Embassy) -> Result<Self> {
        let pid = embassy.pid();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let resident = resident.context("VmRSS")?.trim().trim_end_matches(" kB").parse()?;
        let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd"))?.count();
        Ok(Self { resident_kib: resident, descriptors })
    }
}
