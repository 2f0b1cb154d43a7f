//! Everything started and stopped, in order.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, Result, anyhow};
use futures_util::FutureExt;
use tokio::{
    net::lookup_host,
    sync::Notify,
    task::JoinHandle,
    time::{Instant, timeout_at},
};
use tracing::{info, warn};

use crate::{
    admin::{Admin, Constants, Feeds, metrics::Metrics},
    capture::{self, Backend, Capture, CaptureCounts, Lock, rules},
    check,
    config::{CaptureMode, CaptureScope, Config, Provider as ProviderChoice},
    control::{Control, Settings, Waiting},
    discovery,
    docker::follow::Follower,
    events::Events,
    limits,
    memory::{self, Memory},
    provider::{
        Lookup, Provider, bindings,
        fixed::{self, InterfaceError},
    },
    proxy::{Destinations, Proxy, ProxySettings},
    readiness::{Part, Readiness},
    report::{PROVIDER, Refused, Report},
    source::ResyncRequests,
    state::{self, Keeper, Origin},
};

/// A running embassy.
#[derive(Debug)]
pub struct App {
    /// Where the proxy listens.
    pub proxy_addresses: Vec<SocketAddr>,
    /// Where the admin API listens.
    pub admin_address: Option<String>,
    proxy: Proxy,
    capture: Option<Capture>,
    admin: Option<Admin>,
    control: JoinHandle<()>,
    checks: JoinHandle<()>,
    memory: JoinHandle<()>,
    keeper: Option<Keeper>,
    readiness: Readiness,
    resync: ResyncRequests,
    drain: Duration,
}

impl App {
    /// Starts everything. A source that is down is no error: embassy is just not ready.
    pub async fn start(config: Config) -> Result<Self> {
        let started = std::time::Instant::now();
        let readiness = Readiness::default();
        let waiting = Waiting {
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
            learn(&config, &lookup, &resync, refused.clone(), events.clone(), waiting)?;
        let kept = Arc::<state::Counts>::default();
        let keeper = remember(&config, &mut control, kept.clone());
        let (tables, sources) = (control.tables(), control.sources());

        let mark = (rules.redirect || rules.notrack).then_some(rules::MARK);
        let checks = tokio::spawn(check::run(tables.clone(), mark, events.clone()));
        let memory = memory.watch(memory_short.clone());
        // Where there is no limit it ends at once.
        let memory = tokio::spawn(async move {
            memory.await;
            std::future::pending().await
        });
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
            max_connections_per_consumer: config.max_connections_per_consumer,
            mark,
            splice: true,
            hold: config.hold,
            lookup,
            log: config.connection_log,
            events: events.clone(),
        };
        let proxy = Proxy::start(proxy, &tables)
            .with_context(|| format!("cannot listen on port {} (--port)", config.port))?;
        let addresses =
            proxy.addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        info!(addresses, "proxy listens");

        let capturing = match config.capture {
            CaptureMode::None => None,
            CaptureMode::Dnat | CaptureMode::Redirect => {
                let backend = Backend::open(config.firewall, &rules).await;
                let backend = backend.context("no firewall is available")?;
                let counts = Arc::<CaptureCounts>::default();
                Some((backend, counts, readiness.wait_for(Part::Capture)))
            }
        };
        let metrics = Metrics {
            tables: tables.clone(),
            sources: sources.clone(),
            refused,
            figures: proxy.figures(),
            capture: capturing.as_ref().map(|(_, counts, _)| counts.clone()),
            state: kept,
        };
        let feeds = Feeds {
            readiness: readiness.clone(),
            metrics: Arc::new(metrics.registry()),
            tables: tables.clone(),
            sources,
            figures: proxy.figures(),
            capture: capturing.as_ref().map(|(_, counts, _)| counts.clone()),
            events: events.clone(),
            resync: resync.clone(),
            constants: Arc::new(Constants {
                started,
                listeners: proxy.addresses.clone(),
                mode: config.capture,
                scope: config.capture_scope,
            }),
        };
        let admin = match &config.admin {
            Some(at) => {
                let admin = Admin::start(at, config.admin_token_file.clone(), feeds)
                    .await
                    .with_context(|| format!("cannot listen at {at} (--admin)"))?;
                info!(address = admin.address, "admin API listens");
                Some(admin)
            }
            None => None,
        };
        let lock = match config.capture {
            CaptureMode::None => None,
            CaptureMode::Dnat | CaptureMode::Redirect => Some(
                Lock::take()
                    .context("cannot check whether another embassy captures here")?
                    .context("another embassy captures in this network namespace: one serves all its containers")?,
            ),
        };
        // Last: from here on nothing fails, so that an embassy that cannot start takes no rules away and leaves none.
        let capture = match capturing.zip(lock) {
            Some(((backend, counts, ready), lock)) => {
                capture::cleanup().await;
                Some(Capture::start(lock, backend, rules, tables, counts, ready, events))
            }
            None => None,
        };
        Ok(Self {
            proxy_addresses: proxy.addresses.clone(),
            admin_address: admin.as_ref().map(|admin| admin.address.clone()),
            proxy,
            capture,
            admin,
            control: tokio::spawn(control.run()),
            checks,
            memory,
            keeper,
            readiness,
            resync,
            drain: config.drain,
        })
    }

    /// Has every source read everything again.
    pub fn resync(&self) {
        self.resync.request();
    }

    /// Waits for the end of a part that should never end. May be dropped and called again.
    pub async fn failed(&mut self) -> anyhow::Error {
        tokio::select! {
            end = &mut self.control => match end {
                Ok(()) => anyhow!("the control task ended"),
                Err(error) => anyhow!(error).context("the control task"),
            },
            () = self.proxy.failed() => anyhow!("a part of the data path ended"),
            end = capture_failed(&mut self.capture) => anyhow!("the keeping of the rules: {end}"),
            _ = &mut self.checks => anyhow!("the task of the checks ended"),
            _ = &mut self.memory => anyhow!("the task that looks after memory ended"),
        }
    }

    /// Ends everything: the rules first, then accepting, then what is still connected after `--drain` or when `hurry`
    /// comes true. From then on nothing is waited for that hangs.
    pub async fn stop(mut self, hurry: impl Future<Output = ()>) -> Result<()> {
        let hurry = hurry.shared();
        // Never done: from here on nobody should send anything here.
        let _draining = self.readiness.wait_for(Part::Draining);
        // Kept to the end: live connections need it.
        let _remains = match self.capture {
            Some(capture) => {
                in_time(
                    capture.stop(),
                    "rules may be left; embassy cleanup removes them",
                    hurry.clone(),
                )
                .await
            }
            None => None,
        };
        self.proxy.drain();
        let live = self.proxy.live();
        if live > 0 {
            info!(live, drain_s = self.drain.as_secs_f64(), "waiting for connections to end");
        }
        tokio::select! {
            ended = timeout_at(Instant::now() + self.drain, self.proxy.ended()) => {
                if ended.is_err() {
                    warn!(live = self.proxy.live(), "drain time is over; resetting the open connections");
                }
            }
            () = hurry.clone() => warn!(live = self.proxy.live(), "second signal; resetting the open connections at once"),
        }
        self.checks.abort();
        self.memory.abort();
        self.control.abort();
        if let Some(keeper) = self.keeper {
            let keep = async {
                // Until it is gone, it may give the keeper more. It is cancelled, which is no news.
                if !self.control.is_finished() {
                    let _ = self.control.await;
                }
                keeper.stop().await;
            };
            in_time(keep, "the state file may be out of date", hurry.clone()).await;
        }
        drop(self.admin);
        // Who is in a hurry does not wait for it, and that is no failure.
        let end = in_time(self.proxy.end(), "connections may be left", hurry).await;
        end.unwrap_or(Ok(())).context("the data path")
    }
}

/// Waits for a part of the end, but not for long once there is hurry. `otherwise` says what it means to give it up.
async fn in_time<T>(
    part: impl Future<Output = T>,
    otherwise: &str,
    hurry: impl Future<Output = ()>,
) -> Option<T> {
    const MOMENT: Duration = Duration::from_secs(1);
    let late = async {
        hurry.await;
        tokio::time::sleep(MOMENT).await;
    };
    tokio::select! {
        end = part => Some(end),
        () = late => {
            warn!("gave up waiting: {otherwise}");
            None
        }
    }
}

async fn capture_failed(capture: &mut Option<Capture>) -> String {
    match capture {
        Some(capture) => capture.failed().await,
        None => std::future::pending().await,
    }
}

/// What makes tables of what the provider and the discoveries say, not yet running: the half of embassy that touches
/// nothing. To be called within a runtime.
pub(crate) fn learn(
    config: &Config,
    lookup: &Lookup,
    resync: &ResyncRequests,
    refused: Arc<Refused>,
    events: Events,
    waiting: Waiting,
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
    let settings = Settings {
        vips: config.vips.clone(),
        // Where all is captured, to be a VIP takes what is the host's own away.
        strangers: !config.hold.is_zero() && config.capture_scope == CaptureScope::Declared,
        balance: config.balance,
        empty_hold: config.empty_hold,
        resync: resync.clone(),
    };
    Ok(Control::new(settings, discoveries, listing, bell, waiting, Report::new(refused, events)))
}

/// What the rules depend on, besides the table.
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
        own: if redirect { fixed::addresses(&config.interface)? } else { Vec::new() },
        servers: if redirect { resolve(servers).await } else { Vec::new() },
        hold: !config.hold.is_zero(),
        notrack: config.notrack && captures,
    })
}

/// Takes over what an earlier run left, and has the tables of this one kept.
fn remember(config: &Config, control: &mut Control, counts: Arc<state::Counts>) -> Option<Keeper> {
    // One for each port: two embassies of a host do not write over each other's.
    let path = config.state_dir.as_ref()?.join(format!("table-{}", config.port));
    let provider = match &config.provider {
        ProviderChoice::Docker => format!("{} {}", config.docker, config.prefix),
        ProviderChoice::Static(_) => String::new(),
    };
    let origin = Origin::here(provider, &config.discoveries);
    let restored = state::restore(&path, &origin, config.state_max_age, &control.bell());
    let keeper = Keeper::start(path, origin, counts);
    control.remember(restored, keeper.snapshots());
    Some(keeper)
}

/// The addresses of servers that are named `host:port`. One that has none now is reported, and passed over.
async fn resolve(servers: impl Iterator<Item = String>) -> Vec<SocketAddr> {
    const LIMIT: Duration = Duration::from_secs(2);
    let mut addresses = Vec::new();
    for server in servers {
        match timeout_at(Instant::now() + LIMIT, lookup_host(&server)).await {
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
