//! `file://path`: a TOML file of services and their endpoints, read again whenever it changes.
//!
//! ```toml
//! [[service]]
//! name = "redis.master"
//! endpoints = ["10.0.0.1:6379"]
//!
//! [[service]]
//! name = "web"
//! tags = ["prod"]                                        # every endpoint of this service carries them
//! endpoints = [
//!     "10.0.0.2:80",
//!     { address = "[fd00::3]:80", tags = ["canary"] },   # and this one carries its own as well
//! ]
//! ```
//!
//! A service may stand more than once. What is wrong with one entry leaves the others as they are; a file that cannot be
//! read at all, or says nothing, leaves everything as it was. `service = []` says that there are none.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use notify::{
    Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher,
    event::{AccessKind, AccessMode},
};
use rustix::io::Errno;
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};
use tracing::{info, warn};

use self::catalogue::Catalogue;
use crate::{
    body,
    discovery::{Endpoints, Query},
    source::{Publisher, Resync, ResyncRequests, Shared, Source, SourceError, follow},
};

pub(crate) mod catalogue;

/// A file of services. However many queries there are, it is watched and read once.
#[derive(Debug, Clone)]
pub struct File {
    path: PathBuf,
    catalogue: Shared<Catalogue>,
}

impl File {
    /// A relative path is relative to the working directory.
    pub fn new(path: PathBuf) -> Self {
        Self { path, catalogue: Shared::default() }
    }

    /// Follows `query`; never returns.
    pub async fn watch(self, query: Query, publish: Publisher<Endpoints>, resync: &ResyncRequests) {
        let (path, resync) = (self.path, resync.subscribe());
        let start = |publish| async move {
            let name = format!("file {}", path.display());
            follow(&name, Contents { path, is_polled: false }, publish, resync).await;
        };
        let answer = |catalogue: &Catalogue| catalogue.select(&query);
        self.catalogue.derive(start, &publish, answer).await;
    }
}

/// The source behind a `File`.
struct Contents {
    path: PathBuf,
    /// Whether the last log message was that it cannot be watched.
    is_polled: bool,
}

impl Source for Contents {
    type Item = Catalogue;

    async fn session(
        &mut self,
        publish: &Publisher<Catalogue>,
        resync: &mut Resync,
    ) -> Result<(), SourceError> {
        let mut watch = None;
        loop {
            let added = self.watch(&mut watch);
            self.tell(added.as_ref().err());
            if let Err(Unwatched::Other(error)) = added {
                return Err(error);
            }
            publish.publish(self.read().await?);
            tokio::select! {
                () = async {
                    match &watch {
                        Some(watch) => watch.changed().await,
                        None => sleep(Self::POLL).await,
                    }
                } => {}
                () = resync.due() => {}
            }
        }
    }
}

impl Contents {
    /// How often a file is read that cannot be watched.
    const POLL: Duration = Duration::from_secs(2);

    /// Watches what there is to watch now. If an inotify limit is reached, nothing is watched.
    fn watch(&self, watch: &mut Option<Watch>) -> Result<(), Unwatched> {
        let mut running = watch.take().map_or_else(Watch::new, Ok)?;
        running.add(&self.path)?;
        *watch = Some(running);
        Ok(())
    }

    /// Says that it is polled, when that becomes otherwise.
    fn tell(&mut self, error: Option<&Unwatched>) {
        let file = self.path.display();
        match error {
            Some(Unwatched::NoRoom(error)) if !self.is_polled => {
                self.is_polled = true;
                warn!(%file, %error, every_s = Self::POLL.as_secs(), "cannot watch this file (inotify limit?); polling it");
            }
            None if self.is_polled => {
                self.is_polled = false;
                info!(%file, "watching this file again");
            }
            _ => {}
        }
    }

    /// Bytes of the largest file that is read: far more than any list of services. Parsed it takes many times as much.
    const LARGEST: usize = 4 << 20;
    /// Only a file system that hangs takes this long.
    const READ: Duration = Duration::from_secs(10);

    async fn read(&self) -> Result<Catalogue, SourceError> {
        let wrong = |reason: &dyn std::fmt::Display| {
            SourceError::new(format_args!("{}: {reason}", self.path.display()))
        };
        let path = self.path.clone();
        let read = move || {
            let text = body::file(&path, Self::LARGEST).map_err(|error| error.to_string())?;
            text.parse::<Catalogue>()
        };
        let read = tokio::task::spawn_blocking(read);
        match timeout(Self::READ, read).await {
            Ok(Ok(catalogue)) => catalogue.map_err(|error| wrong(&error)),
            Ok(Err(error)) => Err(wrong(&error)),
            Err(_) => Err(wrong(&format_args!("not read within {} s", Self::READ.as_secs()))),
        }
    }
}

/// Waits for changes of a file by any way in which files change: in place, by a rename over it (itself or a folder that
/// its links lead through, as Kubernetes swaps a ConfigMap), by removal.
struct Watch {
    watcher: RecommendedWatcher,
    changed: Arc<Notify>,
}

impl Watch {
    /// A file is read when it has not changed for this long: many programs write one in several steps.
    const QUIET: Duration = Duration::from_millis(50);
    /// A folder in which something changes all the time is no reason to wait longer than this.
    const PATIENCE: Duration = Duration::from_secs(1);

    fn new() -> Result<Self, Unwatched> {
        let changed = Arc::new(Notify::new());
        let notify = changed.clone();
        let watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            // Events that got lost may have been anything.
            if event.is_ok_and(|event| is_only_a_look(&event.kind)) {
                return;
            }
            notify.notify_one();
        });
        let watcher = watcher.map_err(|error| Unwatched::by("watch files", &error))?;
        Ok(Self { watcher, changed })
    }

    /// Watches the file, the folder that holds it, and the folder that holds what its links lead to. To be called again
    /// after each change: they may be others by then.
    fn add(&mut self, path: &Path) -> Result<(), Unwatched> {
        let folder = match path.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        self.watcher
            .watch(folder, RecursiveMode::NonRecursive)
            .map_err(|error| Unwatched::by(format_args!("watch {}", folder.display()), &error))?;
        let real = path.canonicalize().ok();
        for more in [Some(path), real.as_deref().and_then(Path::parent)].into_iter().flatten() {
            // Where it is missing, the folder tells when it comes.
            let _ = self.watcher.watch(more, RecursiveMode::NonRecursive);
        }
        Ok(())
    }

    async fn changed(&self) {
        self.changed.notified().await;
        let first = Instant::now();
        while first.elapsed() < Self::PATIENCE
            && timeout(Self::QUIET, self.changed.notified()).await.is_ok()
        {}
    }
}

/// Why a file is not watched.
enum Unwatched {
    /// The kernel's room for watches is used up (man 7 inotify, "/proc interfaces"), or ours for descriptors.
    NoRoom(SourceError),
    Other(SourceError),
}

impl Unwatched {
    fn by(what: impl std::fmt::Display, error: &notify::Error) -> Self {
        let no_room = match &error.kind {
            notify::ErrorKind::MaxFilesWatch => true,
            notify::ErrorKind::Io(error) => {
                let full = [Errno::MFILE, Errno::NFILE, Errno::NOSPC, Errno::NOMEM];
                Errno::from_io_error(error).is_some_and(|error| full.contains(&error))
            }
            _ => false,
        };
        let error = SourceError::caused(what, error);
        if no_room { Self::NoRoom(error) } else { Self::Other(error) }
    }
}

/// What does not change a file: our own reading among it, which would never end otherwise.
fn is_only_a_look(kind: &EventKind) -> bool {
    matches!(kind, EventKind::Access(access) if *access != AccessKind::Close(AccessMode::Write))
}
