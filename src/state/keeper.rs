//! Saves the table to disk soon after each change, completely or not at all.

#![expect(clippy::disallowed_methods, reason = "runs on a thread of its own")]

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError, TryLockError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustix::process::geteuid;
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, sleep_until, timeout},
};
use tracing::{info, warn};

use super::{Document, KeptAnswer, KeptConsumer, KeptEndpoint, LARGEST, Origin, document::render};
use crate::{
    cow_map::CowMap,
    discovery::{Endpoints, Query},
    provider::Listing,
};

/// The data to save.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    pub listing: Arc<Listing>,
    pub endpoints: CowMap<Query, Arc<Endpoints>>,
    /// For queries whose discovery does not answer: when their endpoints were last known to be correct.
    pub confirmed: CowMap<Query, std::time::Instant>,
}

/// Counts of writes since the start. For metrics.
#[derive(Debug, Default)]
pub struct Counts {
    pub written: AtomicU64,
    pub failed: AtomicU64,
}

/// Writes the last snapshot that it was given, once it has begun.
#[derive(Debug)]
pub struct Keeper {
    begun: watch::Sender<bool>,
    snapshots: watch::Sender<Option<Snapshot>>,
    file: Arc<File>,
    task: JoinHandle<()>,
}

impl Keeper {
    /// Changes that come within this time are one.
    const DEBOUNCE: Duration = Duration::from_secs(1);
    /// An unchanged table is written again this often: the file's age is the time since embassy was there.
    const REFRESH: Duration = Duration::from_secs(5 * 60);
    /// After a write that failed.
    const RETRY: Duration = Duration::from_secs(10);
    /// How long [`Keeper::release`] waits for a step of a write: a call that changes a folder.
    const STEP: Duration = Duration::from_millis(200);
    /// How long an end waits for the last write.
    const LAST: Duration = Duration::from_secs(2);

    /// Saves tables to the file at `path` from [`Keeper::begin`] on. Creates its folder if needed.
    pub fn new(path: PathBuf, origin: Origin, counts: Arc<Counts>) -> Self {
        let (snapshots, changes) = watch::channel(None);
        let (begun, mut begins) = watch::channel(false);
        let file = Arc::new(File { path, origin, ours: Ours::default() });
        let of_task = file.clone();
        let task = async move {
            // Before that, another process may use the file.
            if begins.wait_for(|begun| *begun).await.is_ok() {
                run(of_task, changes, counts).await;
            }
        };
        Self { begun, snapshots, file, task: tokio::spawn(task) }
    }

    /// Starts writing: the file belongs to this process from now on.
    pub fn begin(&self) {
        self.begun.send_replace(true);
    }

    /// The channel for the data to save.
    pub fn snapshots(&self) -> watch::Sender<Option<Snapshot>> {
        self.snapshots.clone()
    }

    /// Leaves the file alone from now on, because another process may have it: a write that is under way does not reach it either. That
    /// is waited for, but not for long: a disk may hang.
    pub async fn release(&self) {
        self.file.ours.released.store(true, Relaxed);
        let passed = async {
            while matches!(self.file.ours.step.try_lock(), Err(TryLockError::WouldBlock)) {
                sleep(Duration::from_millis(1)).await;
            }
        };
        let _ = timeout(Self::STEP, passed).await;
    }

    /// The file is this process's again.
    pub fn reclaim(&self) {
        self.file.ours.released.store(false, Relaxed);
        // What was not written meanwhile.
        self.snapshots.send_modify(|_| {});
    }

    /// Ends at once, because another process saves the table from now on.
    pub fn abandon(self) {
        self.task.abort();
    }

    /// Writes what was not written yet, and ends. All other senders must be gone.
    pub async fn stop(self) {
        drop((self.snapshots, self.begun));
        if timeout(Self::LAST, self.task).await.is_err() {
            warn!("the state file may be out of date: its disk is slow");
        }
    }
}

async fn run(file: Arc<File>, mut changes: watch::Receiver<Option<Snapshot>>, counts: Arc<Counts>) {
    let mut kept: Option<Written> = None;
    let mut failing = false;
    let mut next = Instant::now() + Keeper::REFRESH;
    loop {
        let ended = tokio::select! {
            changed = changes.changed() => changed.is_err(),
            () = sleep_until(next) => false,
        };
        if !ended {
            // Changes often come together. None is missed during the pause, because the latest state is read below.
            let pause = if failing { Keeper::RETRY } else { Keeper::DEBOUNCE };
            tokio::select! {
                () = sleep_until(Instant::now() + pause) => {}
                () = closed(&mut changes) => {}
            }
        }
        next = Instant::now() + Keeper::REFRESH;
        let snapshot = changes.borrow_and_update().clone();
        if let Some(snapshot) = snapshot {
            // On a large host this takes a while, and no task waits for it.
            let (writer, before) = (file.clone(), kept.take());
            let write = move || writer.keep(&snapshot, before);
            let end = tokio::task::spawn_blocking(write).await;
            let (now, end) = end.unwrap_or_else(|error| (None, Err(io::Error::other(error))));
            kept = now;
            let path = file.path.display();
            match end {
                Ok(false) => {}
                Ok(true) => {
                    counts.written.fetch_add(1, Relaxed);
                    if failing {
                        info!(file = %path, "the state file can be written again");
                    }
                    failing = false;
                }
                Err(error) => {
                    counts.failed.fetch_add(1, Relaxed);
                    if !failing {
                        warn!(file = %path, %error, "cannot write the state file; retrying (a restart during an outage would start empty)");
                    }
                    failing = true;
                    next = Instant::now();
                }
            }
        }
        if ended {
            return;
        }
    }
}

/// Waits until all senders are gone. Pending changes stay.
async fn closed(changes: &mut watch::Receiver<Option<Snapshot>>) {
    let mut copy = changes.clone();
    while copy.changed().await.is_ok() {}
}

/// Renders a document. An error if it is larger than what is read.
fn rendered(document: &Document) -> io::Result<Vec<u8>> {
    let bytes = render(document)?;
    match bytes.len() as u64 > LARGEST {
        false => Ok(bytes),
        true => Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("the table has {} bytes: expected at most {LARGEST}", bytes.len()),
        )),
    }
}

/// The content of the file, and when it was written.
type Written = (Document, Instant);

#[derive(Debug)]
struct File {
    path: PathBuf,
    origin: Origin,
    ours: Ours,
}

/// Whether the file is this process's.
#[derive(Debug, Default)]
struct Ours {
    released: AtomicBool,
    /// Held by each step that others see.
    step: Mutex<()>,
}

impl Ours {
    /// Does such a step, unless the file is another process's.
    fn step<T>(&self, step: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let _held = self.step.lock().unwrap_or_else(PoisonError::into_inner);
        match self.released.load(Relaxed) {
            false => step(),
            true => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}

impl File {
    fn document(&self, snapshot: &Snapshot) -> Document {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let answered = snapshot.endpoints.iter().filter(|(_, answer)| !answer.list.is_empty());
        let kept = |query: &Query, answer: &Endpoints| {
            let age = snapshot.confirmed.get(query).map_or(Duration::ZERO, |at| at.elapsed());
            let endpoints = answer.list.iter().filter_map(|&one| KeptEndpoint::of(one, answer));
            KeptAnswer {
                confirmed: now.saturating_sub(age.as_secs()),
                endpoints: endpoints.collect(),
            }
        };
        Document {
            written: now,
            origin: self.origin.clone(),
            consumers: snapshot
                .listing
                .consumers
                .iter()
                .filter_map(|one| KeptConsumer::of(one))
                .collect(),
            answers: answered.map(|(query, answer)| (query.clone(), kept(query, answer))).collect(),
        }
    }

    /// Writes the data to save, unless the file already has it. Returns the file's content, and whether it was written.
    fn keep(
        &self,
        snapshot: &Snapshot,
        before: Option<Written>,
    ) -> (Option<Written>, io::Result<bool>) {
        let document = self.document(snapshot);
        let is_kept = |(kept, at): &Written| {
            let endpoints = |document: &Document| {
                let answers = document.answers.iter();
                answers.map(|(q, a)| (q.clone(), a.endpoints.clone())).collect::<Vec<_>>()
            };
            kept.consumers == document.consumers
                && endpoints(kept) == endpoints(&document)
                && at.elapsed() < Keeper::REFRESH
        };
        if before.as_ref().is_some_and(is_kept) {
            return (before, Ok(false));
        }
        match self.write(&document) {
            Ok(()) => (Some((document, Instant::now())), Ok(true)),
            Err(_) if self.ours.released.load(Relaxed) => (before, Ok(false)),
            Err(error) => (before, Err(self.explained(error))),
        }
    }

    /// Adds to an error of a denied write who may write there, and as which user embassy runs. Without capabilities, even
    /// root may not.
    fn explained(&self, error: io::Error) -> io::Error {
        let folder =
            self.path.ancestors().skip(1).find_map(|at| Some((at, fs::metadata(at).ok()?)));
        match folder {
            Some((folder, folder_is)) if error.kind() == io::ErrorKind::PermissionDenied => {
                let (owner, mode) = (folder_is.uid(), folder_is.mode() & 0o7777);
                let own = geteuid().as_raw();
                let why = format!(
                    "{error}: {} belongs to user {owner} and has mode {mode:o}, and embassy runs as user {own}; change its owner, or run embassy as that user",
                    folder.display()
                );
                io::Error::new(error.kind(), why)
            }
            _ => error,
        }
    }

    /// A reader finds either the old or the new file, even if this is interrupted.
    fn write(&self, document: &Document) -> io::Result<()> {
        let folder = self.path.parent().unwrap_or(Path::new("."));
        DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let mut new = self.path.as_os_str().to_owned();
        new.push(".new");
        let new = PathBuf::from(new);
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        let mut file = self.ours.step(|| {
            // What lies there is of a write that was cut off, or another's: nothing is written through it.
            let _ = fs::remove_file(&new);
            options.open(&new)
        })?;
        let written = rendered(document).and_then(|bytes| {
            file.write_all(&bytes)?;
            file.sync_all()
        });
        if let Err(error) = written {
            // Half a file would only take room on a full disk.
            let _ = self.ours.step(|| fs::remove_file(&new));
            return Err(error);
        }
        self.ours.step(|| fs::rename(&new, &self.path))?;
        fs::File::open(folder)?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::Endpoint, state::parse};

    fn snapshot(endpoint: &str) -> Snapshot {
        let query = super::super::tests::document().answers.into_keys().next().unwrap();
        let answer = Endpoints::new([Endpoint(endpoint.parse().unwrap())], vec![]);
        Snapshot {
            endpoints: [(query, Arc::new(answer))].into_iter().collect(),
            ..Snapshot::default()
        }
    }

    fn file(path: PathBuf) -> File {
        File { path, origin: Origin::default(), ours: Ours::default() }
    }

    /// Unlike `Keeper::stop`, it waits for a slow disk.
    async fn ended(keeper: Keeper) {
        drop(keeper.snapshots);
        keeper.begun.send_replace(true);
        keeper.task.await.unwrap();
    }

    fn endpoints(path: &Path) -> Vec<String> {
        let document = parse(&fs::read(path).unwrap()).unwrap();
        let endpoints = document.answers.values().flat_map(|answer| &answer.endpoints);
        endpoints.map(|kept| kept.endpoint.to_string()).collect()
    }

    #[tokio::test]
    async fn the_last_snapshot_is_there_at_the_end_and_nothing_is_written_twice() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b/table");
        let counts = Arc::<Counts>::default();
        let keeper = Keeper::new(path.clone(), Origin::default(), counts.clone());
        let snapshots = keeper.snapshots();
        snapshots.send_replace(Some(snapshot("10.0.0.1:1")));
        snapshots.send_replace(Some(snapshot("10.0.0.2:1")));
        drop(snapshots);
        ended(keeper).await;
        assert_eq!(endpoints(&path), ["10.0.0.2:1"]);
        assert_eq!(counts.written.load(Relaxed), 1);
        let names = fs::read_dir(path.parent().unwrap()).unwrap().count();
        assert_eq!(names, 1, "nothing lies beside it");
    }

    #[tokio::test]
    async fn nothing_is_written_before_the_file_is_ours() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table");
        let keeper = Keeper::new(path.clone(), Origin::default(), Arc::default());
        keeper.snapshots().send_replace(Some(snapshot("10.0.0.1:1")));
        keeper.stop().await;
        assert!(!path.exists());
    }

    #[tokio::test(start_paused = true)]
    async fn a_write_does_not_reach_a_file_that_was_released() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table");
        let counts = Arc::<Counts>::default();
        let keeper = Keeper::new(path.clone(), Origin::default(), counts.clone());
        keeper.begin();
        keeper.release().await;
        // As of a write that is under way, and of one that begins.
        let document = keeper.file.document(&snapshot("10.0.0.1:1"));
        assert!(keeper.file.write(&document).is_err());
        keeper.snapshots().send_replace(Some(snapshot("10.0.0.2:1")));
        sleep(Keeper::DEBOUNCE * 3).await;
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        assert_eq!(counts.failed.load(Relaxed), 0, "it is no failure");
        // What was left out is written once the other process has failed.
        keeper.reclaim();
        while counts.written.load(Relaxed) == 0 {
            sleep(Duration::from_secs(1)).await;
        }
        assert_eq!(endpoints(&path), ["10.0.0.2:1"]);
    }

    #[tokio::test]
    async fn a_step_that_has_begun_is_waited_for() {
        let keeper = Keeper::new("table".into(), Origin::default(), Arc::default());
        let file = keeper.file.clone();
        let (begun, begins) = std::sync::mpsc::channel();
        let done = Arc::<AtomicBool>::default();
        let is_done = done.clone();
        let step = std::thread::spawn(move || {
            file.ours.step(|| {
                begun.send(()).unwrap();
                std::thread::sleep(Duration::from_millis(20));
                is_done.store(true, Relaxed);
                Ok(())
            })
        });
        begins.recv().unwrap();
        keeper.release().await;
        assert!(done.load(Relaxed));
        step.join().unwrap().unwrap();
        // A disk that hangs does not hold it up.
        let file = keeper.file.clone();
        let (begun, begins) = std::sync::mpsc::channel();
        let (end, ends) = std::sync::mpsc::channel();
        let hangs = std::thread::spawn(move || {
            file.ours.released.store(false, Relaxed);
            file.ours.step(|| {
                begun.send(()).unwrap();
                ends.recv().map_err(io::Error::other)
            })
        });
        begins.recv().unwrap();
        keeper.release().await;
        end.send(()).unwrap();
        hangs.join().unwrap().unwrap();
    }

    #[tokio::test]
    async fn nothing_is_written_through_what_lies_there() {
        let folder = tempfile::tempdir().unwrap();
        let (path, elsewhere) = (folder.path().join("table"), folder.path().join("elsewhere"));
        fs::write(&elsewhere, "mine").unwrap();
        std::os::unix::fs::symlink(&elsewhere, folder.path().join("table.new")).unwrap();
        let keeper = Keeper::new(path.clone(), Origin::default(), Arc::default());
        keeper.snapshots().send_replace(Some(snapshot("10.0.0.1:1")));
        ended(keeper).await;
        assert_eq!(fs::read_to_string(&elsewhere).unwrap(), "mine");
        assert_eq!(endpoints(&path), ["10.0.0.1:1"]);
        let mode =
            std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&path).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn who_may_write_is_said_if_embassy_may_not() {
        let folder = tempfile::tempdir().unwrap();
        let file = file(folder.path().join("new/table"));
        let denied = file.explained(io::ErrorKind::PermissionDenied.into()).to_string();
        let (own, place) = (geteuid().as_raw(), folder.path().display());
        let expected = format!("{place} belongs to user {own} and has mode 7");
        assert!(denied.contains(&expected), "{denied}");
        let full = file.explained(io::ErrorKind::StorageFull.into()).to_string();
        assert!(!full.contains("belongs"), "{full}");
    }

    #[tokio::test]
    async fn what_a_discovery_does_not_confirm_keeps_its_age() {
        let mut snapshot = snapshot("10.0.0.1:1");
        let file = file("table".into());
        let age = |snapshot: &Snapshot| {
            let document = file.document(snapshot);
            document.written - document.answers.values().next().unwrap().confirmed
        };
        assert_eq!(age(&snapshot), 0);
        let query = snapshot.endpoints.keys().next().unwrap().clone();
        let hour = Duration::from_secs(3600);
        snapshot.confirmed.insert(query, std::time::Instant::now().checked_sub(hour).unwrap());
        assert!(age(&snapshot) >= 3600);
    }

    #[tokio::test(start_paused = true)]
    async fn what_cannot_be_written_is_tried_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table");
        fs::create_dir(&path).unwrap(); // a rename over it fails
        let counts = Arc::<Counts>::default();
        let keeper = Keeper::new(path.clone(), Origin::default(), counts.clone());
        keeper.begin();
        keeper.snapshots().send_replace(Some(snapshot("10.0.0.1:1")));
        while counts.failed.load(Relaxed) < 2 {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        fs::remove_dir(&path).unwrap();
        while counts.written.load(Relaxed) == 0 {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        assert_eq!(endpoints(&path), ["10.0.0.1:1"]);
    }
}
