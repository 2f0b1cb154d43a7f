//! One stream of watches, shared by all watched branches of a connection: a stream for each would cost the server as much
//! as a connection, and with TLS older servers accept at most 250.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, OnceLock},
    time::Duration,
};

use etcd_client::{Client, Error, KeyValue, WatchOptions, WatchResponse, WatchStream};
use tokio::{
    sync::{Notify, mpsc, watch},
    time::{Instant, MissedTickBehavior, interval},
};

use super::{LARGEST, OneLine, probe, within};
use crate::registry::{etcd::branch::KeyRange, http::ANSWER};

/// After this time without a message, the member is asked whether it is still alive and has a leader: the stream of a
/// hanging server looks like one without events.
const QUIET: Duration = Duration::from_secs(10);
/// Interval for checking whether the stream is quiet.
const LOOK: Duration = Duration::from_secs(5);
/// Maximum number of messages that wait for one branch. A slower branch is read again instead.
const BACKLOG: usize = 64;
/// Maximum number of watches that are being created at the same time.
const MAKING: usize = 16;
/// If a watch is refused although its range could be read, the stream uses an outdated login, because it keeps the token
/// from its start. On a stream younger than this, it is a real refusal.
const FRESH: Duration = Duration::from_secs(1);

/// A handle for creating watches. Clones refer to the same stream. The stream ends with its last watch, once no handle is
/// left.
#[derive(Debug, Clone)]
pub(super) struct Stream {
    requests: mpsc::Sender<WatchRequest>,
    /// Marked as changed whenever the member has shown that it works.
    alive: watch::Receiver<()>,
    /// Why it ended.
    ended: Arc<OnceLock<OneLine>>,
}

#[derive(Debug)]
struct WatchRequest {
    range: KeyRange,
    revision: i64,
    listener: BranchListener,
}

/// The receiver of the events of a branch's ranges.
#[derive(Debug, Clone)]
struct BranchListener {
    news: mpsc::Sender<BranchEvent>,
    /// Notified when the watch of one range ends: the watches of the others do not show its events.
    lapsed: Arc<Notify>,
}

impl BranchListener {
    /// Sends the news. False if the receiver is gone or too slow.
    fn tell(&self, news: BranchEvent) -> bool {
        let told = self.news.try_send(news).is_ok();
        if !told {
            self.lapsed.notify_one();
        }
        told
    }
}

/// The watch of one branch. Dropping it ends the watch.
#[derive(Debug)]
pub(super) struct BranchWatch {
    news: mpsc::Receiver<BranchEvent>,
    lapsed: Arc<Notify>,
    alive: watch::Receiver<()>,
    ended: Arc<OnceLock<OneLine>>,
}

/// The events of a branch.
#[derive(Debug)]
pub(super) enum BranchEvent {
    /// These keys were written, or deleted.
    Changed(Vec<KeyValue>),
    /// No events are missing so far.
    Alive,
    /// Events are missing: the branch must be read and watched again.
    Again,
    /// Such a watch is not possible.
    Refused(OneLine),
    /// The connection is lost.
    Lost(OneLine),
}

impl BranchWatch {
    /// Waits for the next event. Cancel-safe.
    pub(super) async fn next(&mut self) -> BranchEvent {
        tokio::select! {
            biased;
            () = self.lapsed.notified() => BranchEvent::Again,
            news = self.news.recv() => news.unwrap_or_else(|| match self.ended.get() {
                Some(reason) => BranchEvent::Lost(reason.clone()),
                None => BranchEvent::Again,
            }),
            // The end of the stream shows as the end of the events.
            Ok(()) = self.alive.changed() => BranchEvent::Alive,
        }
    }
}

impl Stream {
    pub(super) fn start(client: Client) -> Self {
        let (requests, requested) = mpsc::channel(MAKING);
        let (alive, told) = watch::channel(());
        let ended = Arc::<OnceLock<_>>::default();
        let end = ended.clone();
        tokio::spawn(async move {
            let mut running = OpenStream {
                client,
                requests: requested,
                began: Instant::now(),
                heard: Instant::now(),
                key: String::new(),
                making: VecDeque::new(),
                watches: HashMap::new(),
            };
            if let Err(error) = running.run(&alive).await {
                // Set before the events end, because their receiver reads it then.
                let _ = end.set(error.into());
            }
        });
        Self { requests, alive: told, ended }
    }

    /// Whether new watches can be created.
    pub(super) fn is_open(&self) -> bool {
        !self.requests.is_closed()
    }

    /// Watches these ranges from `revision` on.
    pub(super) async fn watch(
        self,
        ranges: impl Iterator<Item = KeyRange>,
        revision: i64,
    ) -> BranchWatch {
        let (sender, news) = mpsc::channel(BACKLOG);
        let lapsed = Arc::<Notify>::default();
        let listener = BranchListener { news: sender, lapsed: lapsed.clone() };
        for range in ranges {
            let request = WatchRequest { range, revision, listener: listener.clone() };
            // A stream that has just ended is noticed by the end of the news. One that only accepts no more watches is not.
            if self.requests.send(request).await.is_err() && self.ended.get().is_none() {
                lapsed.notify_one();
            }
        }
        let mut alive = self.alive;
        alive.mark_unchanged();
        BranchWatch { news, lapsed, alive, ended: self.ended }
    }
}

struct OpenStream {
    client: Client,
    requests: mpsc::Receiver<WatchRequest>,
    began: Instant,
    /// When the last message of the member arrived.
    heard: Instant,
    /// A watched key, for test requests.
    key: String,
    /// The requested watches. The server answers in this order.
    making: VecDeque<WatchRequest>,
    watches: HashMap<i64, BranchListener>,
}

impl OpenStream {
    /// Runs until it is no longer needed, or the connection is lost.
    async fn run(&mut self, alive: &watch::Sender<()>) -> Result<(), Error> {
        let Some(first) = self.requests.recv().await else { return Ok(()) };
        let mut client = self.client.watch_client().max_decoding_message_size(LARGEST);
        let opening = client.watch(first.range.start.as_str(), Some(first.options()));
        let mut stream = within(ANSWER, opening).await?;
        (self.began, self.heard) = (Instant::now(), Instant::now());
        self.asked(first);
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut wanted = true;
        loop {
            tokio::select! {
                request = self.requests.recv(), if wanted && self.making.len() < MAKING => {
                    match request {
                        Some(request) => {
                            stream.watch(request.range.start.as_str(), Some(request.options())).await?;
                            self.asked(request);
                        }
                        None => wanted = false,
                    }
                }
                message = stream.message() => {
                    let ended = || Error::Internal("the server closed the stream".to_owned());
                    self.heard = Instant::now();
                    self.take(&message?.ok_or_else(ended)?, &mut stream).await?;
                }
                _ = look.tick() => {
                    if self.heard.elapsed() >= QUIET {
                        probe(&self.client, &self.key).await?;
                        self.heard = Instant::now();
                    }
                    alive.send_replace(());
                    self.end_unwatched(&mut stream).await?;
                }
            }
            if !wanted && self.making.is_empty() && self.watches.is_empty() {
                return Ok(());
            }
        }
    }

    fn asked(&mut self, request: WatchRequest) {
        self.key.clone_from(&request.range.start);
        self.making.push_back(request);
    }

    async fn take(
        &mut self,
        message: &WatchResponse,
        stream: &mut WatchStream,
    ) -> Result<(), Error> {
        let id = message.watch_id();
        let refusal = || OneLine(format!("cancelled: {:?}", message.cancel_reason()).into());
        if message.created() {
            let Some(request) = self.making.pop_front() else { return Ok(()) };
            if !message.canceled() {
                self.watches.insert(id, request.listener);
            } else if self.began.elapsed() < FRESH {
                request.listener.tell(BranchEvent::Refused(refusal()));
            } else {
                self.requests.close();
                request.listener.lapsed.notify_one();
            }
            return Ok(());
        }
        if message.canceled() {
            let Some(listener) = self.watches.remove(&id) else {
                // A watch that was ended here. A negative number means all watches.
                return if id < 0 { Err(Error::Internal(refusal().0.to_string())) } else { Ok(()) };
            };
            // Compacted: events since the branch was read are lost.
            if message.compact_revision() == 0 {
                listener.tell(BranchEvent::Refused(refusal()));
            } else {
                listener.lapsed.notify_one();
            }
            return Ok(());
        }
        let changed: Vec<_> =
            message.events().iter().filter_map(|event| event.kv().cloned()).collect();
        if !changed.is_empty()
            && let Some(listener) = self.watches.get(&id)
            && !listener.tell(BranchEvent::Changed(changed))
        {
            self.watches.remove(&id);
            stream.cancel(id).await?;
        }
        Ok(())
    }

    /// Ends the watches of branches that are no longer followed. If there are many, the rest are ended later.
    async fn end_unwatched(&mut self, stream: &mut WatchStream) -> Result<(), Error> {
        let ids = self
            .watches
            .iter()
            .filter(|(_, listener)| listener.news.is_closed())
            .map(|(id, _)| *id);
        for id in ids.take(MAKING).collect::<Vec<_>>() {
            self.watches.remove(&id);
            stream.cancel(id).await?;
        }
        Ok(())
    }
}

impl WatchRequest {
    fn options(&self) -> WatchOptions {
        WatchOptions::new().with_range(self.range.end.as_str()).with_start_revision(self.revision)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::etcd::Branch;

    /// The watch of a branch with two ranges, and the receiver of each.
    async fn watch_of_two(
        stream: Stream,
        requests: &mut mpsc::Receiver<WatchRequest>,
    ) -> (BranchWatch, [BranchListener; 2]) {
        let [key, below] = Branch::new("/web").ranges().try_into().unwrap();
        let watch = stream.watch([key, below].into_iter(), 1).await;
        let mut next = || requests.try_recv().unwrap().listener;
        (watch, [next(), next()])
    }

    #[tokio::test]
    async fn a_branch_is_read_again_when_one_of_its_ranges_is_watched_no_more() {
        let (requests, mut requested) = mpsc::channel(MAKING);
        let (_alive, told) = watch::channel(());
        let stream = Stream { requests, alive: told, ended: Arc::default() };
        // Compacted, or refused on a stream with an outdated login.
        let (mut watch, [one, other]) = watch_of_two(stream.clone(), &mut requested).await;
        one.lapsed.notify_one();
        drop(one);
        assert!(matches!(watch.next().await, BranchEvent::Again));
        // No task receives the news, so further news does not fit.
        let (mut slow, [one, _other]) = watch_of_two(stream.clone(), &mut requested).await;
        while one.tell(BranchEvent::Changed(Vec::new())) {}
        drop(one);
        assert!(matches!(slow.next().await, BranchEvent::Again));
        assert!(other.tell(BranchEvent::Changed(Vec::new())), "the other one goes on");
        // The stream stops accepting watches midway.
        requested.close();
        let ranges = Branch::new("/web").ranges();
        assert!(matches!(
            stream.watch(ranges.into_iter(), 1).await.next().await,
            BranchEvent::Again
        ));
    }
}
