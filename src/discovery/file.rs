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
//! A service may appear more than once. An invalid entry does not affect the others. A file that cannot be read, or is
//! empty, changes nothing. `service = []` means that there are no services.

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

/// A file of services. It is watched and read once, however many queries there are.
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

    /// Follows `query`. Never returns.
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
    /// Whether the last log message was that it is polled.
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
    /// Poll interval of a file that cannot be watched.
    const POLL: Duration = Duration::from_secs(2);

    /// Watches the paths that exist now. If an inotify limit is reached, nothing is watched.
    fn watch(&self, watch: &mut Option<FileWatch>) -> Result<(), Unwatched> {
        let mut running = watch.take().map_or_else(FileWatch::new, Ok)?;
        running.add(&self.path)?;
        *watch = Some(running);
        Ok(())
    }

    /// Logs when polling begins.
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

    /// Maximum size of the file in bytes: far more than any list of services. The parsed form takes many times as much.
    const LARGEST: usize = 4 << 20;
    /// Timeout for reading. Only a hanging file system takes so long.
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

/// Waits for changes of a file, however it changes: in place, by a rename over it (or over a folder to which its links
/// lead, as Kubernetes replaces a ConfigMap), or by removal.
struct FileWatch {
    watcher: RecommendedWatcher,
    changed: Arc<Notify>,
}

impl FileWatch {
    /// A file is read when it has not changed for this long: many programs write a file in several steps.
    const QUIET: Duration = Duration::from_millis(50);
    /// Maximum wait if something in the folder changes all the time.
    const PATIENCE: Duration = Duration::from_secs(1);

    fn new() -> Result<Self, Unwatched> {
        let changed = Arc::new(Notify::new());
        let notify = changed.clone();
        let watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            // Events may have been lost, so an error counts as a change.
            if event.is_ok_and(|event| is_only_a_look(&event.kind)) {
                return;
            }
            notify.notify_one();
        });
        let watcher = watcher.map_err(|error| Unwatched::by("watch files", &error))?;
        Ok(Self { watcher, changed })
    }

    /// Watches the file, its folder, and the folder to which its links lead. Must be called again after each change,
    /// because they may have changed.
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
            // If it is missing, the folder's watch reports when it appears.
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
    /// A limit for watches is reached (man 7 inotify, "/proc interfaces"), or our limit for descriptors.
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

/// Whether an event does not change the file. Our own reads are such events, and would cause an endless loop.
fn is_only_a_look(kind: &EventKind) -> bool {
    matches!(kind, EventKind::Access(access) if *access != AccessKind::Close(AccessMode::Write))
}
