//! Half an hour of everything at once: containers that come and go or are killed, endpoints that come and go, connections
//! that stay, and faults of both registries, the engine and the firewall. They are random, from a seed that repeats them.
//! `make soak` runs it and prints the figures.

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
use testbed::{Container, Daemon, Embassy, Host, Process, Traffic};

use crate::{
    READY, WAIT,
    support::{ETCD, counts, metric, offer, reaches},
};

/// The address that every consumer uses. `a` and `b` declare different services for it.
const TARGET: &str = "172.17.0.1:80";
const SERVICES: [&str; 2] = ["a", "b"];
/// The service with endpoints in Consul is `b`. Every other service is in etcd.
const IN_CONSUL: &str = "b";
/// Number of connections that are always idle.
const IDLE: u64 = 50;
/// Number of endpoints of each service.
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
        let live = world.hold_connections()?;
        let churned = world.churn(seed, Duration::from_secs(minutes * 60), &ledger);
        over.store(true, Relaxed);
        for load in loads {
            load.join().expect("a load does not panic")?;
        }
        let (live, idle) = live;
        {
            let answers = live.stop()?;
            let (answered, failed, slowest) =
                (answers.answered(), answers.failed(), answers.slowest);
            println!(
                "one connection all the time: {answered} answers, {failed} failed, slowest {slowest:?}"
            );
            let log = idle.log();
            let ended = log.lines().filter(|line| line.contains("\"ended\"")).count();
            println!("{IDLE} idle connections all the time: {ended} ended");
            ensure!(idle.exited()?.is_none() && ended == 0, "{log}");
            idle.kill()?;
            ensure!(answered > 0 && failed == 0 && only(&answers.by_body, "steady"), "{answers:?}");
        }
        churned
    })?;

    world.mend()?;
    for (app, service) in &world.consumers {
        let answers = app.get(TARGET).times(100).run()?;
        ensure!(answers.answered() == 100 && only(&answers.by_body, service), "{answers:?}");
    }
    world.settle()?;
    let after = Size::of(&world.embassy)?;
    let totals = ledger.totals()?;
    println!("requests: {}, failed: {:?}", totals.requests, totals.failures);
    let excused: u64 = totals.excused.values().sum();
    println!(
        "while connections were not captured or an endpoint was killed ({} times, {:.1?} in all, longest {:.1?}): {:?}",
        totals.excuses, totals.excuse_time, totals.longest_excuse, totals.excused
    );
    println!(
        "slowest: {:?}; new consumers: {}, killed: {}",
        totals.slowest, totals.newcomers, totals.killed
    );
    println!("at the start: {before:?}; at the end: {after:?}");
    ensure!(totals.failures.is_empty(), "failures that no fault explains");
    // Rules are restored within 5 s. A killed endpoint is noticed by failing connections. Within that time connections fail
    // at once, as fast as the load allows.
    ensure!(
        totals.longest_excuse < Duration::from_secs(10),
        "a fault lasted {:?}",
        totals.longest_excuse
    );
    ensure!(
        excused as f64 <= 5_000.0 * totals.excuse_time.as_secs_f64(),
        "{excused} failures in {:?}",
        totals.excuse_time
    );
    ensure!(after.descriptors <= before.descriptors + 16, "descriptors leak");
    ensure!(after.resident_kib <= before.resident_kib + 8 * 1024, "memory leaks");
    Ok(())
}

struct World {
    host: Host,
    embassy: Embassy,
    /// By service.
    endpoints: BTreeMap<&'static str, Vec<Container>>,
    /// Consumers that stay, and their services.
    consumers: Vec<(Container, &'static str)>,
    /// A consumer whose endpoints are never touched, and whose connections stay open.
    steady: Container,
}

/// An action of the test.
#[derive(Debug, Clone, Copy)]
enum Deed {
    /// An endpoint is deregistered, stops, starts again and is registered again.
    Replace,
    /// The same without deregistering it before.
    Kill,
    /// The registry loses a service for a moment.
    Empty,
    /// A new container connects to one of the services as its first act, and ends.
    Newcomer,
    /// A container is killed while it has connections.
    KillConsumer,
    FreezeRegistry,
    RestartRegistry,
    RestartEngine,
    FreezeEngine,
    FlushFirewall,
}

const DEEDS: [Deed; 16] = [
    Deed::Replace,
    Deed::Replace,
    Deed::Kill,
    Deed::Empty,
    Deed::Newcomer,
    Deed::Newcomer,
    Deed::Newcomer,
    Deed::Newcomer,
    Deed::KillConsumer,
    Deed::KillConsumer,
    Deed::FreezeRegistry,
    Deed::RestartRegistry,
    Deed::RestartEngine,
    Deed::FreezeEngine,
    Deed::FreezeEngine,
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
                    register(&host, service, &web)?;
                    Ok(web)
                })
                .collect::<Result<_>>()?;
            endpoints.insert(service, of_service);
            let app = host.client(&format!("app-{service}"));
            consumers.push((app.env("BACKEND_WEB", &binding(service)).start()?, service));
        }
        offer(&host, "steady", host.web("steady").start()?.ip()?)?;
        offer(&host, "idle", host.server("idle", ["greet", "--port", "80"]).start()?.ip()?)?;
        let steady = host.client("app-steady").env("BACKEND_STEADY", "/services/steady;80");
        let steady = steady.env("BACKEND_IDLE", "/services/idle;81").start()?;
        let embassy = host.embassy(["--dnat", ETCD, "-discovery=consul://127.0.0.1:8500"])?;
        embassy.wait_ready(READY)?;
        let world = Self { host, embassy, endpoints, consumers, steady };
        reaches(&world.steady, TARGET, "steady")?;
        for (app, service) in &world.consumers {
            testbed::eventually(WAIT, "the first answer", || {
                let answers = app.get(TARGET).run()?;
                ensure!(answers.answered() == 1 && only(&answers.by_body, service), "{answers:?}");
                Ok(())
            })?;
            // What the very first connections use once is not a leak.
            app.get(TARGET).times(2_000).at_once(16).run()?;
        }
        world.settle()?;
        Ok(world)
    }

    /// One connection in constant use, and the idle ones.
    fn hold_connections(&self) -> Result<(Traffic, Process)> {
        let live = self.steady.live("live", TARGET)?;
        let mut hold = self.steady.command(testbed::testbed_program()?)?;
        hold.args(["peer", "hold", "172.17.0.1:81", "-n", &IDLE.to_string()]);
        let idle = self.host.spawn("idle-connections", hold)?;
        counts(&self.embassy, "embassy_connections_active", IDLE)?;
        Ok((live, idle))
    }

    /// Waits until no connection is left.
    fn settle(&self) -> Result<()> {
        testbed::eventually(WAIT, "the last connection to end", || {
            let live = metric(&self.embassy, "embassy_connections_active")?;
            ensure!(live == 0, "{live}");
            Ok(())
        })
    }

    /// Requests without a pause. The engine is not asked, because it may be down.
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
            // Few at a time: a fault excuses a whole batch.
            get.args(["peer", "get", TARGET, "-n", "40", "-c", "4"]);
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
                let address = endpoint.ip()?.to_string();
                deregister(&self.host, service, endpoint.name(), &address)?;
                // Until embassy has noticed it, and connections that were being made have ended.
                std::thread::sleep(Duration::from_secs(2));
                endpoint.stop()?;
                std::thread::sleep(pause);
                self.bring_back(service, endpoint)
            }
            Deed::Kill => {
                let address = endpoint.ip()?.to_string();
                let excuse = ledger.excuse();
                endpoint.kill()?;
                std::thread::sleep(Duration::from_secs(1));
                drop(excuse);
                std::thread::sleep(pause);
                deregister(&self.host, service, endpoint.name(), &address)?;
                self.bring_back(service, endpoint)
            }
            Deed::Empty => {
                for endpoint in &self.endpoints[service] {
                    let address = endpoint.ip()?.to_string();
                    deregister(&self.host, service, endpoint.name(), &address)?;
                }
                std::thread::sleep(pause);
                self.fill(service)
            }
            Deed::Newcomer => {
                let binding = format!("BACKEND_WEB={}", binding(service));
                let mut run = self.host.docker_command(["run", "--rm", "-e", &binding, "testbed"]);
                run.args(["testbed", "peer", "get", TARGET, "-n", "5"]);
                let start = Instant::now();
                ledger.add(start, service, &testbed::output(&mut run)?)?;
                ledger.lock()?.newcomers += 1;
                Ok(())
            }
            Deed::KillConsumer => {
                let number = ledger.lock()?.killed;
                let app = self.host.container(&format!("killed-{number}"));
                let words = ["testbed", "peer", "get", TARGET, "--until", "/never", "-c", "8"];
                let app = app.env("BACKEND_WEB", &binding(service)).cmd(words).start()?;
                std::thread::sleep(pause.min(Duration::from_secs(2)));
                let pid = app.pid()?.to_string();
                self.host.run("kill", ["-KILL", &pid])?;
                app.remove()?;
                ledger.lock()?.killed += 1;
                Ok(())
            }
            Deed::FreezeRegistry => self.freeze(self.registry(service), pause),
            Deed::RestartRegistry => {
                self.away(self.registry(service), pause)?;
                // Consul has lost its registrations.
                if service == IN_CONSUL { self.fill(service) } else { Ok(()) }
            }
            Deed::RestartEngine => self.away(self.host.docker_daemon(), pause),
            Deed::FreezeEngine => self.freeze(self.host.docker_daemon(), pause),
            // It does not change our table, so failures are not excused.
            Deed::FlushFirewall => {
                self.host.run("iptables", ["-t", "nat", "-F", "PREROUTING"]).map(drop)
            }
        }
    }

    fn away(&self, daemon: &Daemon, pause: Duration) -> Result<()> {
        daemon.stop()?;
        std::thread::sleep(pause);
        daemon.start()
    }

    fn freeze(&self, daemon: &Daemon, pause: Duration) -> Result<()> {
        daemon.pause()?;
        std::thread::sleep(pause);
        daemon.resume()
    }

    fn registry(&self, service: &str) -> &Daemon {
        if service == IN_CONSUL { self.host.consul_daemon() } else { self.host.etcd_daemon() }
    }

    /// Registers all endpoints of a service.
    fn fill(&self, service: &str) -> Result<()> {
        self.endpoints[service].iter().try_for_each(|each| register(&self.host, service, each))
    }

    /// Registers it with its current address.
    fn bring_back(&self, service: &str, endpoint: &Container) -> Result<()> {
        endpoint.start()?;
        let address = endpoint.ip()?;
        testbed::eventually(WAIT, "the endpoint to answer", || {
            self.host.http("GET", &format!("http://{address}/"), "")?.ok()
        })?;
        register(&self.host, service, endpoint)
    }

    /// Checks that everything works, and waits until it is known to.
    fn mend(&self) -> Result<()> {
        for (app, service) in &self.consumers {
            for endpoint in &self.endpoints[service] {
                reaches(app, TARGET, endpoint.name())?;
            }
        }
        Ok(())
    }
}

/// A consumer's declaration of a service.
fn binding(service: &str) -> String {
    if service == IN_CONSUL {
        format!("{service};80;via=consul")
    } else {
        format!("/services/{service};80")
    }
}

fn register(host: &Host, service: &str, endpoint: &Container) -> Result<()> {
    let address = endpoint.ip()?;
    if service == IN_CONSUL {
        host.consul()?.service(endpoint.name(), service).address(address).port(80).register()
    } else {
        offer(host, service, address)
    }
}

fn deregister(host: &Host, service: &str, name: &str, address: &str) -> Result<()> {
    if service == IN_CONSUL {
        host.consul()?.deregister(name)
    } else {
        host.etcd()?.v3().delete(&format!("/services/{service}/{address}:80"))
    }
}

/// Whether only endpoints of `service` answered. Their names begin with its name.
fn only(answers: &BTreeMap<String, usize>, service: &str) -> bool {
    answers.keys().all(|name| name.starts_with(service))
}

/// The results of all requests.
#[derive(Debug, Default)]
struct Ledger(Mutex<Totals>);

#[derive(Debug, Default, Clone)]
struct Totals {
    requests: u64,
    newcomers: u64,
    killed: u64,
    failures: BTreeMap<String, u64>,
    /// Failures of batches during an action that connections cannot survive.
    excused: BTreeMap<String, u64>,
    slowest: Duration,
    /// The start of the current action of this kind.
    excuse: Option<Instant>,
    excuses: u64,
    excuse_time: Duration,
    longest_excuse: Duration,
    /// The end of the last such action.
    last_excuse: Option<Instant>,
}

impl Ledger {
    fn lock(&self) -> Result<std::sync::MutexGuard<'_, Totals>> {
        self.0.lock().map_err(|_| anyhow::anyhow!("a load panicked"))
    }

    fn totals(&self) -> Result<Totals> {
        Ok(self.lock()?.clone())
    }

    /// Adds the result of a batch that began at `start`. A wrong answer is never excused.
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
        let excused = totals.excuse.is_some() || totals.last_excuse.is_some_and(|end| end >= start);
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

    /// Until it is dropped, failures count as caused by the fault.
    fn excuse(&self) -> Excuse<'_> {
        if let Ok(mut totals) = self.0.lock() {
            totals.excuse = Some(Instant::now());
        }
        Excuse(self)
    }
}

struct Excuse<'a>(&'a Ledger);

impl Drop for Excuse<'_> {
    fn drop(&mut self) {
        if let Ok(mut totals) = self.0.0.lock() {
            let time = totals.excuse.take().map_or(Duration::ZERO, |start| start.elapsed());
            totals.excuses += 1;
            totals.excuse_time += time;
            totals.longest_excuse = totals.longest_excuse.max(time);
            totals.last_excuse = Some(Instant::now());
        }
    }
}

/// The resources that embassy uses.
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
