//! The supervisor that started this process, as systemd does: embassy tells it how far it is, in datagrams to the socket that the
//! variable NOTIFY_SOCKET names (man 3 sd_notify). Without this variable nobody is told.

use std::{
    io,
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixDatagram},
    },
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use rustix::{
    process::getpid,
    time::{ClockId, clock_gettime},
};
use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval, timeout},
};
use tracing::{debug, warn};

/// How long a start waits until embassy is ready, before the supervisor is told that it runs: a source that is down must not make it
/// end embassy.
const START: Duration = Duration::from_secs(10);
/// How long a supervisor may take for a message. It usually takes it at once.
const PATIENCE: Duration = Duration::from_secs(1);

/// Who is told. Clones tell the same one.
#[derive(Debug, Clone, Default)]
pub struct Supervisor {
    socket: Option<SocketAddr>,
    /// The supervisor ends this process if it hears nothing for so long.
    watchdog: Option<Duration>,
    /// Whether a failure was logged.
    failed: Arc<AtomicBool>,
}

/// A message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// This process serves.
    Ready,
    /// It is ready as `/readyz` says, or not ready any more.
    IsReady(bool),
    /// This process is the main one from now on, and serves: it has taken over.
    Main,
    /// This other process has taken over.
    MainIs(u32),
    /// Another process starts, which is to take over.
    Reloading,
    /// It could not take over; this one continues.
    ReloadFailed,
    /// Another process serves, and has taken over from this one: this one waits until it is needed.
    StandsBy,
    Stopping,
    /// All parts that must not stand still do their work.
    Alive,
}

impl State {
    /// `process`: the number of this process; `micros`: the monotonic clock's.
    fn text(self, process: u32, micros: u64) -> String {
        match self {
            Self::Ready => "READY=1".to_owned(),
            Self::IsReady(true) => "STATUS=ready".to_owned(),
            Self::IsReady(false) => {
                "STATUS=not ready: \"embassy status\" says what is missing".to_owned()
            }
            Self::Main => format!("MAINPID={process}\nREADY=1\nSTATUS=has taken over"),
            Self::MainIs(process) => format!("MAINPID={process}"),
            Self::Reloading => {
                format!("RELOADING=1\nMONOTONIC_USEC={micros}\nSTATUS=a new process takes over")
            }
            Self::ReloadFailed => {
                "READY=1\nSTATUS=the new process could not take over (see the log); this one continues"
                    .to_owned()
            }
            Self::StandsBy => "READY=1\nSTATUS=another embassy has taken over; waiting until it ends".to_owned(),
            Self::Stopping => "STOPPING=1\nSTATUS=waiting for open connections to end".to_owned(),
            Self::Alive => "WATCHDOG=1".to_owned(),
        }
    }
}

impl Supervisor {
    /// Who started this process, by its environment. A variable that cannot be read is logged.
    pub fn of(env: &dyn Fn(&str) -> Option<String>) -> Self {
        let socket = env("NOTIFY_SOCKET").filter(|name| !name.is_empty()).and_then(|name| {
            let address = match name.split_at_checked(1) {
                Some(("@", name)) if !name.is_empty() => SocketAddr::from_abstract_name(name),
                Some(("/", _)) => SocketAddr::from_pathname(&name),
                _ => Err(io::Error::from(io::ErrorKind::Unsupported)),
            };
            address
                .inspect_err(|_| {
                    warn!("NOTIFY_SOCKET is neither a path nor an abstract name: the supervisor is told nothing");
                })
                .ok()
        });
        let number = |name| env(name).and_then(|text| text.parse::<u64>().ok());
        // Of another process, which has handed its environment down.
        let is_other = number("WATCHDOG_PID").is_some_and(|of| of != u64::from(own_number()));
        let watchdog = number("WATCHDOG_USEC").filter(|micros| *micros > 0 && !is_other);
        let watchdog = watchdog.filter(|_| socket.is_some()).map(Duration::from_micros);
        Self { socket, watchdog, failed: Arc::default() }
    }

    /// Whether there is one that can be told.
    pub fn listens(&self) -> bool {
        self.socket.is_some()
    }

    /// Tells it.
    pub async fn tell(&self, state: State) {
        let Some(address) = &self.socket else { return };
        let now = clock_gettime(ClockId::Monotonic);
        let micros = now.tv_sec.unsigned_abs() * 1_000_000 + now.tv_nsec.unsigned_abs() / 1_000;
        let text = state.text(own_number(), micros);
        let sent = match timeout(PATIENCE, send(address, text.as_bytes())).await {
            Ok(sent) => sent,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        };
        match sent {
            Ok(()) => debug!(?state, "told the supervisor"),
            Err(error) if !self.failed.swap(true, Relaxed) => {
                warn!(%error, "cannot tell the supervisor how far embassy is (NOTIFY_SOCKET)");
            }
            Err(_) => {}
        }
    }

    /// Says that this process has started: once it is ready, or after a while if it is not. Then says whether it is. Ends with the
    /// sender of `ready`. `is_main`: it was said with [`State::Main`] already; said twice, it would end a reload that has begun since.
    pub async fn follow(self, mut ready: watch::Receiver<bool>, is_main: bool) {
        if !self.listens() {
            return;
        }
        // Without a sender this process ends.
        if let Ok(Err(_)) = timeout(START, ready.wait_for(|ready| *ready)).await {
            return;
        }
        if !is_main {
            self.tell(State::Ready).await;
        }
        loop {
            let is_ready = *ready.borrow_and_update();
            self.tell(State::IsReady(is_ready)).await;
            if ready.changed().await.is_err() {
                return;
            }
        }
    }

    /// Says again and again that this process lives, if the supervisor wants to hear it: each time only after `turns` has completed.
    /// Never returns.
    pub async fn watch(self, turns: impl AsyncFn()) {
        let Some(watchdog) = self.watchdog else { return std::future::pending().await };
        let mut each = interval((watchdog / 3).max(Duration::from_millis(1)));
        each.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            each.tick().await;
            turns().await;
            self.tell(State::Alive).await;
        }
    }
}

fn own_number() -> u32 {
    getpid().as_raw_pid().unsigned_abs()
}

async fn send(address: &SocketAddr, text: &[u8]) -> io::Result<()> {
    // One for each message: the supervisor may have opened its socket again.
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.connect_addr(address)?;
    tokio::net::UnixDatagram::from_std(socket)?.send(text).await.map(drop)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use tokio::{sync::Notify, task::yield_now, time::sleep};

    use super::*;

    /// A supervisor, and what it hears.
    fn supervisor(name: &str, listens_at: &SocketAddr, micros: &str) -> (Supervisor, UnixDatagram) {
        let socket = UnixDatagram::bind_addr(listens_at).unwrap();
        socket.set_nonblocking(true).unwrap();
        let of = Supervisor::of(&|variable| match variable {
            "NOTIFY_SOCKET" => Some(name.to_owned()),
            "WATCHDOG_USEC" => Some(micros.to_owned()),
            _ => None,
        });
        (of, socket)
    }

    fn heard(socket: &UnixDatagram) -> Vec<String> {
        let mut all = Vec::new();
        let mut bytes = [0; 1000];
        while let Ok(length) = socket.recv(&mut bytes) {
            all.push(String::from_utf8(bytes[..length].to_vec()).unwrap());
        }
        all
    }

    #[tokio::test]
    async fn it_is_told_at_a_path_and_by_an_abstract_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let abstract_name = format!("embassy-test-{}", own_number());
        for (name, address) in [
            (path.display().to_string(), SocketAddr::from_pathname(&path).unwrap()),
            (format!("@{abstract_name}"), SocketAddr::from_abstract_name(&abstract_name).unwrap()),
        ] {
            let (one, socket) = supervisor(&name, &address, "");
            assert!(one.listens());
            one.tell(State::Ready).await;
            one.tell(State::Main).await;
            one.tell(State::MainIs(7)).await;
            let main = format!("MAINPID={}\nREADY=1\nSTATUS=has taken over", own_number());
            assert_eq!(heard(&socket), ["READY=1", &main, "MAINPID=7"]);
            // One that has gone holds nobody up.
            drop(socket);
            one.tell(State::Stopping).await;
            assert!(one.failed.load(Relaxed));
        }
        assert!(State::Reloading.text(1, 5).contains("RELOADING=1\nMONOTONIC_USEC=5\n"));
    }

    #[test]
    fn only_what_is_meant_for_this_process_is_read() {
        let of = |socket: &'static str, watchdog: &'static str, process: String| {
            let one = Supervisor::of(&|name| match name {
                "NOTIFY_SOCKET" => Some(socket.to_owned()),
                "WATCHDOG_USEC" => Some(watchdog.to_owned()),
                "WATCHDOG_PID" => Some(process.clone()),
                _ => None,
            });
            (one.listens(), one.watchdog)
        };
        let (own, other) = (own_number().to_string(), (own_number() + 1).to_string());
        let second = Some(Duration::from_secs(1));
        assert_eq!(of("@a", "1000000", own.clone()), (true, second));
        assert_eq!(of("@a", "1000000", other), (true, None));
        assert_eq!(of("@a", "soon", own.clone()), (true, None));
        assert_eq!(of("@a", "0", own.clone()), (true, None));
        for socket in ["", "vsock:2:1", "relative", "@"] {
            assert_eq!(of(socket, "1000000", own.clone()), (false, None), "{socket}");
        }
        assert!(!Supervisor::of(&|_| None).listens());
    }

    #[tokio::test(start_paused = true)]
    async fn it_hears_of_the_start_once_embassy_is_ready_or_after_a_while() {
        let folder = tempfile::tempdir().unwrap();
        for (n, ready_after, ready_at) in [(0, 3, 3), (1, 60, 10)] {
            let path = folder.path().join(n.to_string());
            let address = SocketAddr::from_pathname(&path).unwrap();
            let (one, socket) = supervisor(&path.display().to_string(), &address, "");
            let (sender, ready) = watch::channel(false);
            let start = tokio::time::Instant::now();
            let following = tokio::spawn(one.follow(ready, false));
            let mut said = Vec::new();
            while said.is_empty() {
                sleep(Duration::from_millis(500)).await;
                if start.elapsed() >= Duration::from_secs(ready_after) {
                    let _ = sender.send(true);
                    yield_now().await;
                }
                said = heard(&socket);
            }
            assert_eq!(said[0], "READY=1");
            let passed = start.elapsed().as_secs();
            assert!((ready_at..ready_at + 2).contains(&passed), "{passed} s");
            drop(sender);
            following.await.unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_has_taken_over_or_ends_does_not_say_that_it_has_started() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let address = SocketAddr::from_pathname(&path).unwrap();
        let (one, socket) = supervisor(&path.display().to_string(), &address, "");
        let (sender, ready) = watch::channel(true);
        let following = tokio::spawn(one.clone().follow(ready, true));
        sleep(Duration::from_secs(60)).await;
        assert_eq!(heard(&socket), ["STATUS=ready"]);
        drop(sender);
        following.await.unwrap();
        let (sender, ready) = watch::channel(false);
        let following = tokio::spawn(one.follow(ready, false));
        sleep(Duration::from_secs(1)).await;
        drop(sender);
        following.await.unwrap();
        assert_eq!(heard(&socket), [""; 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_stands_still_is_not_said_to_live() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let address = SocketAddr::from_pathname(&path).unwrap();
        let (one, socket) = supervisor(&path.display().to_string(), &address, "3000000");
        let (stands, goes_on) = (Arc::new(AtomicBool::new(false)), Arc::new(Notify::new()));
        let asked = Arc::<AtomicUsize>::default();
        let turns = {
            let (stands, goes_on, asked) = (stands.clone(), goes_on.clone(), asked.clone());
            async move || {
                asked.fetch_add(1, Relaxed);
                if stands.load(Relaxed) {
                    goes_on.notified().await;
                }
            }
        };
        let watching = tokio::spawn(async move { one.watch(turns).await });
        sleep(Duration::from_millis(3_500)).await;
        assert_eq!(heard(&socket), ["WATCHDOG=1"; 4]);
        stands.store(true, Relaxed);
        sleep(Duration::from_secs(60)).await;
        assert_eq!(heard(&socket), [""; 0], "a part stands still");
        assert_eq!(asked.load(Relaxed), 5, "and is not asked again and again");
        stands.store(false, Relaxed);
        goes_on.notify_one();
        sleep(Duration::from_secs(2)).await;
        assert!(!heard(&socket).is_empty());
        watching.abort();
    }
}
