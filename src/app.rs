//! Starts and stops all parts, in order.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    os::fd::OwnedFd,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::{Context, Result, anyhow};
use futures_util::FutureExt;
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
    time::{Instant, sleep, sleep_until, timeout_at},
};
use tracing::{debug, info, warn};

use crate::{
    admin::{Admin, Constants, Feeds, Listening, metrics::Metrics},
    capture::{self, Backend, Capture, CaptureCounts, Lock, OwnRules, own_rules, rules},
    check,
    config::{
        self, CaptureMode, CaptureScope, Config, ConsumerLimit, Instance,
        Provider as ProviderChoice,
    },
    control::{AwaitedParts, Control, Limits, TableSettings},
    discovery,
    docker::{self, follow::Follower},
    events::Events,
    kernel::{self, KernelPath},
    limits,
    listening::{self, PortHolder},
    memory::{self, Memory},
    model::Port,
    path::Paths,
    privileges,
    provider::{
        Lookup, Provider, bindings,
        fixed::{self, InterfaceError},
    },
    proxy::{Destinations, FailedChecks, Proxy, ProxySettings},
    readiness::{Part, Readiness},
    report::{PROVIDER, Refused, Report},
    resolve,
    source::ResyncRequests,
    state::{self, Keeper, Origin},
    supervisor::{State, Supervisor},
    table::Table,
    takeover::{Alive, Door},
};

mod takeover;

use takeover::Found;
pub use takeover::TakeoverEvent;

/// A running embassy.
#[derive(Debug)]
pub struct App {
    /// The proxy's listen addresses.
    pub proxy_addresses: Vec<SocketAddr>,
    /// The admin API's listen address.
    pub admin_address: Option<String>,
    proxy: Proxy,
    capture: Option<Capture>,
    kernel: Option<KernelPath>,
    capture_counts: Option<Arc<CaptureCounts>>,
    admin: Option<Admin>,
    /// The address of the listening socket, as the operator gave it.
    admin_at: String,
    /// The published tables.
    tables: watch::Receiver<Arc<Table>>,
    /// Where another process can ask to take over.
    door: Option<Door>,
    /// Kept after the door was closed.
    alive: Option<Alive>,
    control: JoinHandle<()>,
    checks: JoinHandle<()>,
    memory: JoinHandle<()>,
    /// Logs whether embassy is ready.
    said: JoinHandle<()>,
    supervisor: Supervisor,
    /// Tell the supervisor whether embassy is ready, and that it lives.
    supervised: [JoinHandle<()>; 2],
    /// Follows the user's own rules, without `--dnat` and `--redirect`.
    own_rules: JoinHandle<()>,
    keeper: Option<Keeper>,
    resync: ResyncRequests,
    drain: Duration,
}

impl App {
    /// Starts all parts, unless `stop` completes before: then `None`. A source that is down is not an error, but embassy is
    /// not ready then.
    ///
    /// Once this process has taken over from another one, no other process serves, so it starts in any case. Also returns
    /// whether `stop` has completed.
    pub async fn start_unless(
        config: Config,
        supervisor: Supervisor,
        stop: impl Future<Output = ()>,
    ) -> Result<Option<(Self, bool)>> {
        let committed = AtomicBool::new(false);
        let mut start = pin!(Self::start(config, supervisor, &committed));
        tokio::select! {
            app = &mut start => return Ok(Some((app?, false))),
            () = stop => {}
        }
        match committed.load(Relaxed) {
            true => Ok(Some((start.await?, true))),
            false => Ok(None),
        }
    }

    async fn start(config: Config, supervisor: Supervisor, committed: &AtomicBool) -> Result<Self> {
        let started = std::time::Instant::now();
        let before = match Found::find(&config, &supervisor).await? {
            Found::Nobody => None,
            Found::Ended => return Self::start_after(config, supervisor, committed).await,
            Found::Running(before) => Some(before),
        };
        // Who is found is asked for everything once this process has learned what it needs.
        let lock = match config.capture {
            CaptureMode::Dnat | CaptureMode::Redirect if before.is_none() => {
                remove_leftovers(config.port).await?
            }
            CaptureMode::None | CaptureMode::Dnat | CaptureMode::Redirect => None,
        };
        let readiness = Readiness::default();
        let waiting = AwaitedParts {
            listing: readiness.wait_for(Part::Listing),
            answers: readiness.wait_for(Part::Discovery),
        };
        let rules = rules(&config).await?;
        let memory = Memory::of_this_process();
        let max_connections = limits::connections(config.max_connections, memory.room());
        let memory_short = Arc::<memory::Short>::default();
        capture::conntrack::apply(&config.conntrack);

        let lookup = Lookup::default();
        let events = Events::default();
        let refused = Arc::<Refused>::default();
        let resync = ResyncRequests::new(config.resync);
        let mut control =
            learn(&config, &rules, &lookup, &resync, refused.clone(), events.clone(), waiting)?;
        let kept = Arc::<state::Counts>::default();
        let keeper = remember(&config, &mut control, kept.clone());
        if before.is_some() {
            control.takes_over();
        }
        let (tables, sources) = (control.tables(), control.sources());
        let build_times = control.build_times();

        let mark = (rules.redirect || rules.notrack).then_some(rules::MARK);
        let failed_checks = FailedChecks::default();
        let checks = check::run(tables.clone(), mark, events.clone(), failed_checks.clone());
        let checks = tokio::spawn(checks);
        let memory = memory.watch(memory_short.clone());
        // Without a memory limit the task ends at once.
        let memory = tokio::spawn(async move {
            memory.await;
            std::future::pending().await
        });
        let mut capturing = match config.capture {
            CaptureMode::None => None,
            CaptureMode::Dnat | CaptureMode::Redirect => {
                let backend = Backend::open(config.firewall, &rules).await;
                let backend = backend.context(match privileges::has_net_admin() {
                    true => "no firewall is available",
                    false if docker::obstacle::is_in_container() => {
                        "embassy lacks the capability NET_ADMIN: start its container with --cap-add NET_ADMIN \
                         (Compose: cap_add: [NET_ADMIN])"
                    }
                    false => {
                        "embassy lacks the capability NET_ADMIN: run it as root, or give it the capability \
                         (systemd: AmbientCapabilities=CAP_NET_ADMIN in the unit)"
                    }
                })?;
                let counts = Arc::<CaptureCounts>::default();
                Some((backend, counts, readiness.wait_for(Part::Capture)))
            }
        };
        let firewall = takeover::firewall(capturing.as_ref().map(|(backend, ..)| backend));
        let proxy = ProxySettings {
            port: Some(config.port),
            workers: std::thread::available_parallelism().map_or(1, usize::from),
            destinations: match config.capture {
                CaptureMode::None => Destinations::Any,
                CaptureMode::Dnat | CaptureMode::Redirect => {
                    Destinations::VipsAnd(rules.own.clone())
                }
            },
            max_connections,
            memory_short,
            max_connections_per_consumer: match (
                &config.provider,
                config.max_connections_per_consumer,
            ) {
                // The static provider has only one consumer.
                (ProviderChoice::Static(_), ConsumerLimit::Share) => ConsumerLimit::NONE,
                (_, limit) => limit,
            },
            mark,
            user_timeout: config.user_timeout,
            failed_checks,
            splice: true,
            connect: ProxySettings::CONNECT,
            hold: config.hold,
            lookup,
            log: config.connection_log,
            events: events.clone(),
        };
        // If the address is in use, nothing was started that would have to end.
        let early = match (&config.admin, &before) {
            (Some(at), None) => Some(open_admin(at, None)?),
            _ => None,
        };
        let (proxy, control, mut taken) = match before {
            None => {
                let proxy = Proxy::start(proxy, &tables).map_err(|error| {
                    let any = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), config.port.get());
                    let what = format!("cannot listen on port {} (--port)", config.port);
                    in_use(error, &what, || listening::at(any))
                })?;
                (proxy, Err(control), None)
            }
            Some(before) => {
                // The other process serves meanwhile.
                let control = tokio::spawn(control.run());
                let capturing = capturing.as_mut().map(|(backend, counts, _)| (backend, &**counts));
                let taking = before.take_over(&config, proxy, tables.clone(), capturing);
                match taking.await {
                    Ok(Some((proxy, taken))) => (proxy, Ok(control), Some(taken)),
                    Ok(None) => {
                        // The other process has died before it handed anything over.
                        [control, checks, memory].iter().for_each(JoinHandle::abort);
                        let config = Config { takeover: false, ..config };
                        return Self::start_after(config, supervisor, committed).await;
                    }
                    Err(error) => {
                        return Err(error.context("takeover failed; the running embassy continues"));
                    }
                }
            }
        };
        let addresses =
            proxy.addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        info!(addresses, "proxy listens");

        let (looked, own_rules) = watch::channel(OwnRules::default());
        let own_rules_followed = match config.capture {
            CaptureMode::None => {
                let (figures, ready) = (proxy.figures(), readiness.wait_for(Part::Capture));
                let captured = move || figures.captured();
                tokio::spawn(own_rules::follow(
                    config.port.get(),
                    captured,
                    looked,
                    resync.subscribe(),
                    ready,
                ))
            }
            CaptureMode::Dnat | CaptureMode::Redirect => tokio::spawn(async {}),
        };
        let udp = Arc::new(kernel::UdpCounts::default());
        // Without a capture nobody would serve what the kernel leaves to the proxy.
        let kernel = match config.capture {
            CaptureMode::None => None,
            CaptureMode::Dnat | CaptureMode::Redirect => {
                let settings = kernel::Settings {
                    default: config.path,
                    is_limited: matches!(
                        config.max_connections_per_consumer,
                        ConsumerLimit::Most(_)
                    ),
                    max_services: config.max_services,
                    log: config.connection_log,
                    mark,
                    events: events.clone(),
                    udp: udp.clone(),
                    figures: proxy.figures(),
                };
                let started = KernelPath::start(settings, tables.clone());
                Some(started.context("cannot start the thread of the kernel path")?)
            }
        };
        let paths = match &kernel {
            Some(kernel) => kernel.paths(),
            None => watch::channel(Paths::without_capture()).1,
        };
        let metrics = Metrics {
            tables: tables.clone(),
            paths: paths.clone(),
            build_times,
            sources: sources.clone(),
            refused,
            figures: proxy.figures(),
            udp,
            capture: capturing.as_ref().map(|(_, counts, _)| counts.clone()),
            state: kept,
        };
        let feeds = Feeds {
            readiness: readiness.clone(),
            metrics: Arc::new(metrics.registry()),
            tables: tables.clone(),
            paths,
            sources,
            figures: proxy.figures(),
            capture: capturing.as_ref().map(|(_, counts, _)| counts.clone()),
            own_rules,
            events: events.clone(),
            resync: resync.clone(),
            constants: Arc::new(Constants {
                started,
                listeners: proxy.addresses.clone(),
                mode: config.capture,
                scope: config.capture_scope,
                hold: config.hold,
                instance: Instance::of(&config),
                own: rules.own.clone(),
                servers: {
                    let all = config.discoveries.names().flat_map(|name| {
                        let servers = config.discoveries.servers_of(name);
                        servers.into_iter().map(|server| (name.clone(), server))
                    });
                    all.filter_map(|(name, server)| Some((name, server.parse().ok()?))).collect()
                },
            }),
        };
        let (ready, is_ready) = watch::channel(false);
        let said = tokio::spawn(feeds.clone().log_readiness(ready));
        let inherited = taken.as_mut().and_then(|taken| taken.admin(&config));
        let mut listening = match (early, &config.admin) {
            (None, Some(at)) => Some(open_admin(at, inherited)?),
            (early, _) => early,
        };
        let lock = match (&capturing, &mut taken) {
            (None, _) => None,
            (Some(_), None) => {
                Some(lock.context("cannot check whether another embassy captures here")?)
            }
            (Some(_), Some(taken)) => Some(taken.lock().await?),
        };
        let mut door = takeover::open_door(&config, firewall, taken.as_mut());
        if let Some(taken) = &taken {
            taken.commit(committed).await?;
            listening.iter_mut().for_each(Listening::claim);
            door.iter_mut().for_each(Door::claim);
            proxy.go_on().await;
            taken.tell();
            taken.note(&config);
            supervisor.tell(State::Main).await;
        }
        let figures = proxy.figures();
        let supervised = [
            tokio::spawn(supervisor.clone().follow(is_ready, taken.is_some())),
            tokio::spawn(supervisor.clone().watch(async move || figures.turns().await)),
        ];
        keeper.iter().for_each(Keeper::begin);
        let admin = match listening {
            Some(listening) => {
                let admin = Admin::start(listening, config.admin_token_file.clone(), feeds)?;
                info!(address = admin.address, "admin API listens");
                Some(admin)
            }
            None => None,
        };
        let capture_counts = capturing.as_ref().map(|(_, counts, _)| counts.clone());
        // The capture comes last: nothing after it can fail, so an embassy that cannot start leaves no rules.
        let capture = capturing.zip(lock).map(|((backend, counts, ready), lock)| {
            Capture::start(lock, backend, rules, tables.clone(), counts, ready, events)
        });
        Ok(Self {
            proxy_addresses: proxy.addresses.clone(),
            admin_address: admin.as_ref().map(|admin| admin.address.clone()),
            proxy,
            capture,
            kernel,
            admin,
            admin_at: takeover::admin_address(config.admin.as_ref()),
            tables,
            door,
            alive: None,
            capture_counts,
            control: control.unwrap_or_else(|control| tokio::spawn(control.run())),
            checks,
            memory,
            said,
            supervisor,
            supervised,
            own_rules: own_rules_followed,
            keeper,
            resync,
            drain: config.drain,
        })
    }

    /// Starts after another process that has just died: the kernel takes a moment to give back what it had.
    async fn start_after(
        config: Config,
        supervisor: Supervisor,
        committed: &AtomicBool,
    ) -> Result<Self> {
        let end = Instant::now() + 2 * MOMENT;
        loop {
            match Box::pin(Self::start(config.clone(), supervisor.clone(), committed)).await {
                Err(error) if Instant::now() < end => {
                    debug!(error = format!("{error:#}"), "cannot start yet");
                    sleep(MOMENT / 50).await;
                }
                started => return started,
            }
        }
    }

    /// Requests a re-read of every source.
    pub fn resync(&self) {
        self.resync.request();
    }

    /// Stops everything. The connections that are open get `--drain` to end, and new ones are served until then: nobody else
    /// would serve them. Then the rules go, and the connections that are younger get a moment to end.
    ///
    /// Each of the three has a limit. When `hurry` completes, it ends within a moment.
    pub async fn stop(mut self, mut why: Stopping, hurry: impl Future<Output = ()>) -> Result<()> {
        let hurry = hurry.shared();
        self.said.abort();
        // After STOPPING=1 nothing else is said.
        let [follows, _] = &self.supervised;
        follows.abort();
        self.own_rules.abort();
        // A load balancer that asks /readyz sends new connections elsewhere, and the address is free for the next process.
        drop(self.admin.take());
        if why != Stopping::HandedOver {
            self.supervisor.tell(State::Stopping).await;
        }
        let live = self.proxy.live();
        if live > 0 {
            info!(live, drain_s = self.drain.as_secs_f64(), "waiting for connections to end");
        }
        if why == Stopping::Asked && self.drain_or_hand_over(hurry.clone()).await {
            why = Stopping::HandedOver;
        }
        // Until here its programs serve, UDP too, which nothing else would. Another process that has taken over has its own.
        if let Some(kernel) = self.kernel.take() {
            let late = "programs of the kernel path are still attached; they end with the process";
            in_time(kernel.stop(), late, Instant::now() + STEP, hurry.clone()).await;
        }
        // Nobody is answered there any more. Who was greeted sees this process live until all of this has ended.
        let _alive = self.door.take().map(Door::close).or(self.alive.take());
        let rest = match why {
            Stopping::Asked => MOMENT.min(self.drain),
            // It is not known whether new connections are still served, or another process serves them.
            Stopping::Failed | Stopping::HandedOver => self.drain,
        };
        // Kept until the end: live connections need it.
        let _remains = match self.capture {
            Some(capture) => {
                let late = "rules may be left; embassy cleanup removes them";
                // A separate time limit, so that a drain cannot use it up: rules that stay redirect to a port without a
                // listener.
                in_time(capture.stop(), late, Instant::now() + STEP, hurry.clone()).await
            }
            None => None,
        };
        self.proxy.drain();
        let rest_ends = Instant::now() + rest;
        tokio::select! {
            ended = timeout_at(rest_ends, self.proxy.ended()) => {
                if ended.is_err() {
                    warn!(live = self.proxy.live(), "drain time is over; resetting the open connections");
                }
            }
            () = hurry.clone() => warn!(live = self.proxy.live(), "second signal; resetting the open connections at once"),
        }
        self.checks.abort();
        self.memory.abort();
        self.control.abort();
        self.supervised.iter().for_each(JoinHandle::abort);
        let last = Instant::now() + STEP;
        let keep = async {
            // Until the task has ended, it may send more tables to the keeper. It was cancelled above, so its error is
            // ignored.
            if !self.control.is_finished() {
                let _ = self.control.await;
            }
            if let Some(keeper) = self.keeper {
                keeper.stop().await;
            }
        };
        let (_, ended) = tokio::join!(
            in_time(keep, "the state file may be out of date", last, hurry.clone()),
            in_time(self.proxy.end(), "connections may be left", last, hurry),
        );
        // It is not an error that something was not waited for.
        ended.unwrap_or(Ok(())).context("the data path")
    }
}

impl App {
    /// Waits until the open connections have ended or their time is over. New ones are served, and a process that asks meanwhile takes over.
    /// Whether one has.
    async fn drain_or_hand_over(&mut self, hurry: impl Future<Output = ()> + Clone) -> bool {
        let end = Instant::now() + self.drain;
        loop {
            let asked = async {
                match &mut self.door {
                    Some(door) => door.asked().await,
                    None => std::future::pending().await,
                }
            };
            let asker = tokio::select! {
                biased;
                drained = timeout_at(end, self.proxy.leave()) => {
                    if drained.is_err() {
                        let live = self.proxy.live();
                        warn!(live, "drain time is over; resetting the open connections");
                    }
                    return false;
                }
                () = hurry.clone() => return false,
                asker = asked => asker,
            };
            match self.hand_over(asker, Some(end), hurry.clone()).await {
                Ok(true) => return true,
                Ok(false) => {}
                // The rules are to be removed anyhow.
                Err(error) => {
                    warn!(error = format!("{error:#}"), "cannot hand over");
                    return false;
                }
            }
        }
    }
}

/// The admin API's socket, or that of the process before this one.
fn open_admin(at: &config::Admin, inherited: Option<OwnedFd>) -> Result<Listening> {
    Listening::open(at, inherited).map_err(|error| {
        in_use(error, &format!("cannot listen at {at} (--admin)"), || match at {
            config::Admin::Tcp(address) => listening::at(*address),
            config::Admin::Unix(path) => listening::at_path(path),
        })
    })
}

/// That embassy cannot listen, and, if another program does, which one.
fn in_use(error: io::Error, what: &str, who: impl FnOnce() -> PortHolder) -> anyhow::Error {
    let who = match error.kind() {
        io::ErrorKind::AddrInUse => who().already(),
        _ => String::new(),
    };
    anyhow::Error::from(error).context(format!("{what}{who}"))
}

/// Removes the rules that a killed embassy left, before anything else can fail: they lead containers' connections, and the
/// passwords in them, to whichever program has the port now. Returns the right to capture here; `None` if that cannot be had,
/// as without NET_ADMIN. An error if another embassy has it.
async fn remove_leftovers(port: Port) -> Result<Option<Lock>> {
    match Lock::take() {
        Ok(Some(lock)) => {
            capture::cleanup().await;
            Ok(Some(lock))
        }
        Ok(None) => {
            // As a rule it listens at the same port.
            let any = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port.get());
            let who = match listening::at(any) {
                PortHolder::Process(holder) => format!(" ({holder} listens at port {port})"),
                PortHolder::Nobody | PortHolder::Hidden => String::new(),
            };
            Err(anyhow!(
                "another embassy captures in this network namespace{who}: one serves all its containers; stop it first, or take over from it with --takeover"
            ))
        }
        Err(error) => {
            // The code that opens the firewall reports what is missing.
            debug!(%error, "cannot check whether another embassy captures here");
            Ok(None)
        }
    }
}

/// Why embassy stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stopping {
    /// A signal requested it.
    Asked,
    /// A part has failed.
    Failed,
    /// Another process has taken over.
    HandedOver,
}

/// Time limit for connections that are younger than the shutdown, and for steps that hang after a second signal.
const MOMENT: Duration = Duration::from_secs(1);

/// Time limit of a step of the shutdown that is normally immediate: firewall programs wait for each other's lock, and a
/// disk may be slow.
const STEP: Duration = Duration::from_secs(5);

/// Waits for a step of the shutdown until `end`, but at most a moment after `hurry`. `otherwise`: the consequence of giving
/// up.
async fn in_time<T>(
    part: impl Future<Output = T>,
    otherwise: &str,
    end: Instant,
    hurry: impl Future<Output = ()>,
) -> Option<T> {
    let late = async {
        hurry.await;
        sleep(MOMENT).await;
    };
    tokio::select! {
        end = part => return Some(end),
        () = late => {}
        () = sleep_until(end) => {}
    }
    warn!("gave up waiting: {otherwise}");
    None
}

async fn kernel_failed(kernel: &mut Option<KernelPath>) {
    match kernel {
        Some(kernel) => kernel.failed().await,
        None => std::future::pending().await,
    }
}

async fn capture_failed(capture: &mut Option<Capture>) -> String {
    match capture {
        Some(capture) => capture.failed().await,
        None => std::future::pending().await,
    }
}

/// Creates the control task, without running it. It builds tables from the provider and the discoveries, and changes
/// nothing on the host. Must be called within a runtime.
pub(crate) fn learn(
    config: &Config,
    rules: &rules::RuleSettings,
    lookup: &Lookup,
    resync: &ResyncRequests,
    refused: Arc<Refused>,
    events: Events,
    waiting: AwaitedParts,
) -> Result<Control, InterfaceError> {
    let mut discoveries = config.discoveries.clone();
    let provider = match &config.provider {
        ProviderChoice::Docker => {
            let (engine, prefix) = (config.docker.clone(), config.prefix.clone());
            let prefixes = [&prefix, bindings::LABEL, discovery::docker::PREFIX].map(str::to_owned);
            let follower = Follower::new(PROVIDER, engine, prefixes.into(), lookup.clone());
            discoveries.share(&follower);
            Provider::Docker { follower, prefix }
        }
        ProviderChoice::Static(services) => {
            Provider::Static(fixed::listing(&config.interface, services)?)
        }
    };
    let bell = Arc::<Notify>::default();
    let listing = provider.start(resync, bell.clone());
    let settings = TableSettings {
        vips: config.vips.clone(),
        own_port: config.port,
        capture: config.capture,
        own: rules.own.clone(),
        // If all ports are captured, additional VIPs would make the host's own services unreachable.
        strangers: !config.hold.is_zero() && config.capture_scope == CaptureScope::Declared,
        balance: config.balance,
        empty_hold: config.empty_hold,
        listeners: listeners(config),
        limits: Limits {
            bindings_per_consumer: config.max_bindings_per_consumer,
            services: config.max_services,
        },
        resync: resync.clone(),
    };
    Ok(Control::new(settings, discoveries, listing, bell, waiting, Report::new(refused, events)))
}

/// The addresses on which embassy listens.
fn listeners(config: &Config) -> Vec<SocketAddr> {
    let proxy = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), config.port.get());
    let admin = match &config.admin {
        Some(config::Admin::Tcp(address)) => Some(*address),
        Some(config::Admin::Unix(_)) | None => None,
    };
    [proxy].into_iter().chain(admin).collect()
}

/// The settings of the rules. The rest comes from the table.
pub(crate) async fn rules(config: &Config) -> Result<rules::RuleSettings, InterfaceError> {
    let redirect = config.capture == CaptureMode::Redirect;
    let captures = config.capture != CaptureMode::None;
    if config.notrack && !captures {
        warn!("--notrack is not in effect: it writes rules, which needs --dnat or --redirect");
    }
    let servers = config.discoveries.servers().into_iter().chain(config.docker.server());
    Ok(rules::RuleSettings {
        redirect,
        scope: config.capture_scope,
        port: config.port.get(),
        own: if redirect { fixed::own_addresses()? } else { Vec::new() },
        servers: if redirect { resolved(servers).await } else { Vec::new() },
        hold: !config.hold.is_zero(),
        notrack: config.notrack && captures,
        guard: config.guard,
        lacks: rules::Optional::default(),
    })
}

/// Loads the saved table of an earlier run. This run's tables are saved once the keeper has begun.
fn remember(config: &Config, control: &mut Control, counts: Arc<state::Counts>) -> Option<Keeper> {
    // One file per port, so that two embassies on a host do not overwrite each other's file.
    let path = config.state_dir.as_ref()?.join(format!("table-{}", config.port));
    let provider = match &config.provider {
        ProviderChoice::Docker => format!("{} {}", config.docker, config.prefix),
        ProviderChoice::Static(_) => String::new(),
    };
    let origin = Origin::here(provider, &config.discoveries);
    let restored = state::restore(&path, &origin, config.state_max_age, &control.bell());
    let keeper = Keeper::new(path, origin, counts);
    control.remember(restored, keeper.snapshots());
    Some(keeper)
}

/// The addresses of servers given as `host:port`. A server that cannot be resolved is logged and skipped.
async fn resolved(servers: impl Iterator<Item = String>) -> Vec<SocketAddr> {
    const LIMIT: Duration = Duration::from_secs(2);
    let mut addresses = Vec::new();
    for server in servers {
        match timeout_at(Instant::now() + LIMIT, resolve::server(&server)).await {
            Ok(Ok(found)) => addresses.extend(found),
            Ok(Err(error)) => {
                warn!(server, %error, "cannot resolve this server; if its address is a VIP, embassy's own connections to it may be captured")
            }
            Err(_) => warn!(
                server,
                "cannot resolve this server within {LIMIT:?}; if its address is a VIP, embassy's own connections to it may be captured"
            ),
        }
    }
    addresses
}
