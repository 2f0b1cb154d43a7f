//! A new embassy takes over from the running one: both sides. docs/decisions/0008 says who asks whom, and what each failure leaves.

use std::{
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::DirBuilderExt,
    },
    path::{Path, PathBuf},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use futures_util::FutureExt;
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, sleep_until, timeout},
};
use tracing::{debug, info, warn};

use super::{App, capture_failed, kernel_failed};
use crate::{
    capture::{self, Backend, CaptureCounts, Lock},
    config::{self, Config},
    proxy::{HandedOver, Proxy, ProxySettings, TakeoverError},
    state::Keeper,
    supervisor::{State, Supervisor},
    table::Table,
    takeover::{
        self, Asker, Channel, ChannelError, Door, Life, is_answered, knock,
        message::{Figures, Handle, Hello, Message},
        succession,
    },
};

/// How long the new process may take to learn what it needs for its first table. The running one serves meanwhile.
const LEARN: Duration = Duration::from_secs(60);
/// How often a process is asked again that has closed the connection without a greeting, and the pause before that.
const CLOSED: u32 = 5;
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// How long connections may stand still, at most. Then the running process continues.
const STANDSTILL: Duration = Duration::from_secs(5);

/// What happens to a running embassy, besides signals.
#[derive(Debug)]
pub enum TakeoverEvent {
    /// A part has ended that never should.
    Failed(anyhow::Error),
    /// Another process asks to take over.
    Takeover(Box<Asker>),
}

/// What ran when this process started.
#[derive(Debug)]
pub(super) enum Found {
    Nobody,
    /// One that has just ended, or is about to: one that had taken over from the container of this process, or closed its door.
    Ended,
    Running(Box<Predecessor>),
}

/// The embassy that runs before this one.
#[derive(Debug)]
pub(super) struct Predecessor {
    channel: Channel,
    hello: Hello,
    life: Life,
}

/// What the process before this one handed over, besides its connections.
#[derive(Debug)]
pub(super) struct Taken {
    predecessor: Predecessor,
    /// Whether it has died: then nobody is asked.
    died: bool,
    since: Instant,
    connections: usize,
    lock: Option<OwnedFd>,
    admin: Option<(String, OwnedFd)>,
    door: Option<OwnedFd>,
}

/// The path of the socket by which another process takes over. Host namespaces have their own, and so has each port.
fn door_path(config: &Config) -> Option<PathBuf> {
    let (_, namespace) = takeover::namespace();
    Some(config.state_dir.as_ref()?.join(format!("takeover-{}-{namespace}", config.port)))
}

/// The file with those that were taken over from.
fn succession_path(config: &Config) -> Option<PathBuf> {
    Some(config.state_dir.as_ref()?.join(format!("superseded-{}", config.port)))
}

/// Those that were taken over from, once this process has. `last`: the one that it takes over from.
fn before(config: &Config, last: Option<&str>) -> Vec<String> {
    let known = succession_path(config).map(|path| succession::read(&path));
    succession::before(known.unwrap_or_default(), &succession::root(), last)
}

fn hello(config: &Config, firewall: String, before: Vec<String>) -> Hello {
    Hello {
        version: takeover::version(),
        program: env!("CARGO_PKG_VERSION").to_owned(),
        namespace: takeover::namespace(),
        port: config.port.get(),
        firewall,
        root: succession::root(),
        before,
        descriptors: 0,
    }
}

/// The address of the admin API in one form, whatever the version.
pub(super) fn admin_address(admin: Option<&config::Admin>) -> String {
    match admin {
        Some(config::Admin::Tcp(address)) => address.to_string(),
        Some(config::Admin::Unix(path)) => format!("unix://{}", path.display()),
        None => String::new(),
    }
}

/// Listens for the process after this one. Without it embassy works, and cannot be taken over.
pub(super) fn open_door(
    config: &Config,
    firewall: String,
    taken: Option<&mut Taken>,
) -> Option<Door> {
    let path = door_path(config)?;
    let last = taken.as_ref().map(|taken| taken.predecessor.hello.root.as_str());
    let hello = hello(config, firewall, before(config, last));
    let inherited = taken.and_then(|taken| taken.door.take());
    let folder = || match path.parent() {
        Some(folder) => std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder),
        None => Ok(()),
    };
    let door = match inherited {
        Some(listener) => Door::inherited(listener, &path, hello),
        None => folder().and_then(|()| Door::open(&path, hello)),
    };
    door.inspect_err(|error| {
        warn!(path = %path.display(), %error, "cannot listen for a takeover; a new embassy cannot take over from this one");
    })
    .ok()
}

impl Found {
    /// Greets the running embassy, if this one is to take over. If that one has taken over from the container of this process, waits until
    /// there is none.
    pub(super) async fn find(config: &Config, supervisor: &Supervisor) -> Result<Self> {
        let Some(path) = door_path(config).filter(|_| config.takeover) else {
            return Ok(Self::Nobody);
        };
        let mut stands_by = false;
        let mut closed = 0;
        loop {
            let found = knock(&path, hello(config, String::new(), Vec::new())).await;
            // It has just closed its door, as it ends or as another one has taken over.
            if found.as_ref().is_err_and(ChannelError::is_end) && closed < CLOSED {
                closed += 1;
                sleep(LOOK_AGAIN).await;
                continue;
            }
            let found = found.with_context(|| {
                format!("cannot ask the running embassy for a takeover at {}", path.display())
            })?;
            let Some((channel, hello, life)) = found else {
                return Ok(if stands_by || closed > 0 { Self::Ended } else { Self::Nobody });
            };
            if !succession::is_succeeded(&succession::root(), &hello) {
                let found = Predecessor { channel, hello, life };
                found.fits(config, &path)?;
                return Ok(Self::Running(Box::new(found)));
            }
            // Few can ask at a time.
            drop(channel);
            if !std::mem::replace(&mut stands_by, true) {
                let version = hello.program;
                info!(
                    version,
                    "another embassy has taken over from this container; waiting until it ends"
                );
                supervisor.tell(State::StandsBy).await;
            }
            tokio::select! {
                over = life.over() => over.context("cannot wait for the running embassy")?,
                // A supervisor that has a watchdog ends what does not say that it lives.
                () = supervisor.clone().watch(async || ()) => {}
            }
        }
    }
}

impl Predecessor {
    /// An error if this process cannot take over from it.
    fn fits(&self, config: &Config, path: &Path) -> Result<()> {
        let hello = &self.hello;
        if hello.namespace != takeover::namespace() {
            bail!("the embassy at {} runs in another network namespace", path.display());
        }
        if hello.port != config.port.get() {
            bail!("the running embassy has port {}: expected {} (--port)", hello.port, config.port);
        }
        takeover::step("greeted");
        Ok(())
    }

    /// Learns what is needed, and then gets everything: this process may commit. `None`: the other one died before it handed anything
    /// over. On an error it continues.
    pub(super) async fn take_over(
        mut self,
        config: &Config,
        settings: ProxySettings,
        mut tables: watch::Receiver<Arc<Table>>,
        mut capturing: Option<(&mut Backend, &CaptureCounts)>,
    ) -> Result<Option<(Proxy, Taken)>> {
        let firewall = firewall(capturing.as_ref().map(|(backend, _)| &**backend));
        if firewall != self.hello.firewall {
            let word = |word: &str| if word.is_empty() { "nothing" } else { word }.to_owned();
            bail!(
                "the running embassy writes its rules by {}, and this one by {}: restart embassy to change that",
                word(&self.hello.firewall),
                word(&firewall)
            );
        }
        let learned = async { tables.wait_for(|table| table.version > 0).await.map(drop) };
        tokio::select! {
            learned = timeout(LEARN, learned) => learned
                .with_context(|| format!("no source has answered within {LEARN:?}, and there is no saved table"))??,
            received = self.channel.receive() => {
                if matches!(received, Ok(Some(_))) {
                    bail!(ChannelError::Unexpected("something"));
                }
                return match self.has_ended(config).await {
                    true => Ok(None),
                    false => Err(ChannelError::Closed.into()),
                };
            }
        }
        takeover::step("learned");
        let since = Instant::now();
        match self.channel.send(&Message::Freeze, &[], &[]).await {
            Err(error) if error.is_end() && self.has_ended(config).await => return Ok(None),
            sent => sent?,
        }
        takeover::step("freeze sent");
        let (mut listeners, mut rules) = (Vec::new(), None);
        let mut taken = Taken {
            predecessor: self,
            died: false,
            since,
            connections: 0,
            lock: None,
            admin: None,
            door: None,
        };
        let mut settings = Some(settings);
        let mut proxy = None::<Proxy>;
        loop {
            let received = match taken.receive().await {
                // It was stopping, and has ended before it handed anything over.
                Err(error)
                    if listeners.is_empty()
                        && proxy.is_none()
                        && error.is_end()
                        && taken.predecessor.has_ended(config).await =>
                {
                    return Ok(None);
                }
                received => received?,
            };
            // Handles come first: whatever comes then, or if nothing does, the data path is made of them.
            if !matches!(received, Some((Message::Handle(_), ..)))
                && let Some(settings) = settings.take()
            {
                if listeners.is_empty() && received.is_none() {
                    return Ok(None);
                }
                if let (Some(owner), Some((backend, _))) = (rules.take(), &mut capturing) {
                    backend.adopt(owner, config.port.get())?;
                }
                let listeners = std::mem::take(&mut listeners);
                proxy = Some(Proxy::continuing(settings, &tables, listeners)?);
                takeover::step("handles taken");
            }
            let Some(proxy) = &proxy else {
                if let Some((Message::Handle(handle), _, descriptors)) = received {
                    taken.keep(handle, descriptors, &mut listeners, &mut rules);
                }
                continue;
            };
            match received {
                Some((Message::Figures(figures), ..)) => {
                    let counts = capturing.as_ref().map(|(_, counts)| *counts);
                    inherit(&figures, proxy, &tables, counts);
                }
                Some((Message::Connections { list }, bytes, sockets)) => {
                    let answer = proxy.adopt(list, bytes, sockets).await?;
                    taken.connections += answer.iter().filter(|taken| **taken).count();
                    let answer = Message::Taken { taken: answer };
                    // Where it fails, the other process has ended, which is seen next.
                    let _ = taken.predecessor.channel.send(&answer, &[], &[]).await;
                    takeover::step("connections taken");
                }
                Some((Message::End, ..)) | None => break,
                Some(_) => bail!(ChannelError::Unexpected("something")),
            }
        }
        match proxy {
            Some(proxy) => Ok(Some((proxy, taken))),
            None => Err(ChannelError::Closed.into()),
        }
    }
}

impl Predecessor {
    /// Whether the other process, which answers no more, has ended. One that is stopping drains its connections before.
    async fn has_ended(&self, config: &Config) -> bool {
        let end = Instant::now() + LEARN;
        let path = door_path(config).unwrap_or_default();
        loop {
            if self.life.is_over().await {
                return true;
            }
            // One that listens there is not stopping, or is another one that has taken over.
            if Instant::now() >= end || is_answered(&path).await {
                return false;
            }
        }
    }
}

impl Taken {
    /// The next message; `None` if the other process has died.
    async fn receive(&mut self) -> Result<Option<takeover::Received>, ChannelError> {
        let Self { predecessor: Predecessor { channel, life, .. }, died, .. } = self;
        let received = timeout(STANDSTILL, channel.receive());
        match received.await.map_err(|_| ChannelError::Silent)? {
            Ok(Some(received)) => Ok(Some(received)),
            Ok(None) | Err(ChannelError::Io(_)) if life.is_over().await => {
                *died = true;
                Ok(None)
            }
            Ok(None) => Err(ChannelError::Closed),
            Err(error) => Err(error),
        }
    }

    /// Keeps what a newer process does not hand over in vain; what is not known is closed.
    fn keep(
        &mut self,
        handle: Handle,
        descriptors: Vec<OwnedFd>,
        listeners: &mut Vec<Vec<OwnedFd>>,
        rules: &mut Option<OwnedFd>,
    ) {
        if handle.of == Handle::PROXY {
            return listeners.push(descriptors);
        }
        let Some(descriptor) = descriptors.into_iter().next() else { return };
        match handle.of.as_str() {
            Handle::RULES => *rules = Some(descriptor),
            Handle::LOCK => self.lock = Some(descriptor),
            Handle::ADMIN => self.admin = Some((handle.address, descriptor)),
            Handle::DOOR => self.door = Some(descriptor),
            _ => {}
        }
    }

    /// The admin listener, if this process is to listen at the same address.
    pub(super) fn admin(&mut self, config: &Config) -> Option<OwnedFd> {
        let (address, listener) = self.admin.take()?;
        (address == admin_address(config.admin.as_ref())).then_some(listener)
    }

    /// The right to capture.
    pub(super) async fn lock(&mut self) -> Result<Lock> {
        if let Some(socket) = self.lock.take() {
            return Ok(Lock::inherited(socket));
        }
        // The other process had none, or has died before it handed it over. The kernel takes a moment to end it.
        let end = Instant::now() + Duration::from_secs(2);
        loop {
            match Lock::take()? {
                Some(lock) => return Ok(lock),
                None if Instant::now() < end => sleep(Duration::from_millis(20)).await,
                None => bail!("another embassy captures in this network namespace"),
            }
        }
    }

    /// From here on this process serves, and the other one does not. `committed` is set before.
    pub(super) async fn commit(&self, committed: &AtomicBool) -> Result<()> {
        committed.store(true, Relaxed);
        if self.died {
            return Ok(());
        }
        takeover::step("before commit");
        let Predecessor { channel, life, .. } = &self.predecessor;
        match channel.send(&Message::Commit, &[], &[]).await {
            Ok(()) => Ok(()),
            Err(_) if life.is_over().await => Ok(()),
            Err(error) => Err(anyhow::Error::from(error)
                .context("takeover failed; the running embassy continues")),
        }
    }

    /// Writes down who was taken over from, so that it does not take over in turn after this host was restarted.
    pub(super) fn note(&self, config: &Config) {
        let Some(path) = succession_path(config) else { return };
        let before = before(config, Some(&self.predecessor.hello.root));
        tokio::task::spawn_blocking(move || {
            // What cannot be written there is logged with the saved table.
            if let Err(error) = succession::write(path, &before) {
                debug!(%error, "cannot write down who was taken over from");
            }
        });
    }

    /// Logs what was taken over, once connections go on.
    pub(super) fn tell(&self) {
        let Self { predecessor, died, since, connections, .. } = self;
        let pause_ms = (since.elapsed().as_secs_f64() * 1e3).round();
        let from = &predecessor.hello.program;
        info!(from, connections, pause_ms, died, "took over from the running embassy");
    }
}

/// Who writes the rules; empty: nobody.
pub(super) fn firewall(backend: Option<&Backend>) -> String {
    backend.map(|backend| backend.firewall().to_string()).unwrap_or_default()
}

fn inherit(
    figures: &Figures,
    proxy: &Proxy,
    tables: &watch::Receiver<Arc<Table>>,
    capture: Option<&CaptureCounts>,
) {
    if let Some(process) = &figures.process {
        proxy.inherit(process);
        if let Some(capture) = capture {
            capture.inherit(process);
        }
    }
    let table = tables.borrow().clone();
    table.inherit(figures, proxy.figures().now());
    proxy.inherit_routes(figures, &table);
}

impl App {
    /// Waits for the next event. Cancel-safe.
    pub async fn event(&mut self) -> TakeoverEvent {
        let asked = async {
            match &mut self.door {
                Some(door) => door.asked().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            end = &mut self.control => TakeoverEvent::Failed(match end {
                Ok(()) => anyhow!("the control task ended"),
                Err(error) => anyhow!(error).context("the control task"),
            }),
            () = self.proxy.failed() => TakeoverEvent::Failed(anyhow!("a part of the data path ended")),
            () = kernel_failed(&mut self.kernel) => {
                TakeoverEvent::Failed(anyhow!("the thread of the kernel path ended"))
            }
            end = capture_failed(&mut self.capture) => {
                TakeoverEvent::Failed(anyhow!("the capture task ended: {end}"))
            }
            _ = &mut self.checks => TakeoverEvent::Failed(anyhow!("the check task ended")),
            _ = &mut self.memory => TakeoverEvent::Failed(anyhow!("the memory watch task ended")),
            asker = asked => TakeoverEvent::Takeover(Box::new(asker)),
        }
    }

    /// Hands everything over to another process. Whether that serves now: else this one does, which gives up after [`STANDSTILL`], at `end`
    /// and when `hurry` completes.
    pub async fn hand_over(
        &mut self,
        (mut channel, hello): Asker,
        end: Option<Instant>,
        hurry: impl Future<Output = ()>,
    ) -> Result<bool> {
        // Also what the kernel path has counted since it was asked last.
        self.proxy.figures().refresh().await;
        if let Some(keeper) = &self.keeper {
            keeper.release().await;
        }
        let since = Instant::now();
        let capture = match self.capture.take() {
            Some(capture) => match capture.suspend().await {
                Ok(capture) => Some(capture),
                // Nobody keeps the rules any more. This process ends.
                Err(error) => {
                    capture::cleanup().await;
                    self.keeper.iter().for_each(Keeper::reclaim);
                    return Err(error).context("the capture task");
                }
            },
            None => None,
        };
        let end = end.into_iter().fold(since + STANDSTILL, Instant::min);
        let over = pin!(async {
            tokio::select! {
                () = sleep_until(end) => {}
                () = hurry => {}
            }
        });
        let over = over.shared();
        let offered = tokio::select! {
            offered = self.offer(&mut channel, &hello, capture.as_ref()) => Some(offered),
            () = over.clone() => None,
        };
        let (handed_over, error) = match offered {
            Some(Ok(handed_over)) => {
                let received = tokio::select! {
                    received = channel.receive() => Some(received),
                    () = over => None,
                };
                let error = match received {
                    Some(Ok(Some((Message::Commit, ..)))) => None,
                    Some(Ok(Some(_))) => Some(ChannelError::Unexpected("something").into()),
                    Some(Ok(None)) => Some(ChannelError::Closed.into()),
                    Some(Err(error)) => Some(error.into()),
                    None => Some(ChannelError::Silent.into()),
                };
                (Some(handed_over), error)
            }
            Some(Err(error)) => (None, Some(error)),
            None => (None, Some(ChannelError::Silent.into())),
        };
        let has_committed = error.is_none() || channel.end().await;
        match handed_over.filter(|_| has_committed) {
            Some(handed_over) => {
                let connections = handed_over.count();
                self.leave(handed_over).await;
                let pause_ms = (since.elapsed().as_secs_f64() * 1e3).round();
                let (to, left) = (hello.program, self.proxy.live());
                info!(to, connections, left, pause_ms, "handed over to another embassy");
                Ok(true)
            }
            None => {
                self.proxy.thaw().await;
                self.capture = capture.map(capture::Suspended::resume);
                self.keeper.iter().for_each(Keeper::reclaim);
                let error: TakeoverError = error.unwrap_or(ChannelError::Closed.into());
                warn!(%error, "another embassy failed to take over; this one continues");
                Ok(false)
            }
        }
    }

    /// Stands still, and sends everything.
    async fn offer(
        &self,
        channel: &mut Channel,
        hello: &Hello,
        capture: Option<&capture::Suspended>,
    ) -> Result<HandedOver, TakeoverError> {
        self.proxy.freeze().await?;
        takeover::step("frozen");
        self.proxy.hand_over_listeners(channel).await?;
        takeover::step("listeners sent");
        let (rules, lock) = capture.map(capture::Suspended::sockets).unwrap_or_default();
        let admin = self.admin.as_ref().map(|admin| admin.socket());
        for (of, socket) in [(Handle::RULES, rules), (Handle::LOCK, lock), (Handle::ADMIN, admin)] {
            let Some(socket) = socket else { continue };
            let address = if of == Handle::ADMIN { self.admin_at.clone() } else { String::new() };
            let handle = Handle { of: of.to_owned(), address, descriptors: 1 };
            channel.send(&Message::Handle(handle), &[], &[socket.as_fd()]).await?;
        }
        if let Some(door) = &self.door {
            door.hand_over(channel).await?;
        }
        takeover::step("handles sent");
        // One that speaks otherwise gets the handles alone, and this process drains the rest.
        let handed_over = if hello.version == takeover::version() {
            let mut process = self.proxy.totals();
            if let Some(counts) = &self.capture_counts {
                counts.totals(&mut process);
            }
            let process = Figures { process: Some(process), ..Figures::default() };
            let now = self.proxy.figures().now();
            let table = self.tables.borrow().clone();
            let of_table = table.figures(now, std::time::Instant::now());
            for mut figures in std::iter::once(process).chain(of_table) {
                self.proxy.tell_inherited(&mut figures, &table);
                channel.send(&Message::Figures(Box::new(figures)), &[], &[]).await?;
            }
            takeover::step("figures sent");
            self.proxy.hand_over_connections(channel).await?
        } else {
            HandedOver::default()
        };
        takeover::step("connections sent");
        channel.send(&Message::End, &[], &[]).await?;
        takeover::step("end sent");
        Ok(handed_over)
    }

    /// Lets go of everything that another process has now.
    async fn leave(&mut self, handed_over: HandedOver) {
        self.proxy.let_go(handed_over).await;
        self.said.abort();
        self.supervised.iter().for_each(JoinHandle::abort);
        if let Some(admin) = self.admin.take() {
            admin.leave();
        }
        if let Some(door) = self.door.take() {
            self.alive = Some(door.leave());
        }
        if let Some(keeper) = self.keeper.take() {
            keeper.abandon();
        }
    }
}
