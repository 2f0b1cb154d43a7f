//! The loop of every source: subscribe, list and follow. After a failure: log it, wait, and start again. It never gives up,
//! and a failure never removes the last data.

use std::{
    convert::Infallible,
    fmt,
    future::pending,
    panic::AssertUnwindSafe,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::FutureExt;
use tokio::sync::{Notify, watch};
use tracing::{debug, info, warn};

use crate::text::shortened;

mod resync;
mod shared;

pub use resync::{Resync, ResyncRequests};
pub use shared::Shared;

/// The state of a source: its last full answer, the answer's age, and the current error.
#[derive(Debug, Clone)]
pub struct Known<T> {
    /// The last full answer. `None` until the first.
    pub value: Option<Arc<T>>,
    /// When the source last confirmed `value`.
    pub confirmed: Option<Instant>,
    /// When `value` last changed.
    pub changed: Option<Instant>,
    /// The current error. `None` while the source answers, and before the first attempt.
    pub error: Option<Arc<str>>,
    /// The fix for the error, if the source knows it better than the error's text shows.
    pub fix: Option<Arc<str>>,
    /// Whether the source works, and refuses only this query.
    pub refused: bool,
    /// Failed sessions since the start.
    pub failures: u64,
    /// Full answers since the start, including those without a change.
    pub answers: u64,
    /// Full answers that differ from the previous one, including the first.
    pub changes: u64,
}

impl<T> Default for Known<T> {
    fn default() -> Self {
        Self {
            value: None,
            confirmed: None,
            changed: None,
            error: None,
            fix: None,
            refused: false,
            failures: 0,
            answers: 0,
            changes: 0,
        }
    }
}

/// A source that can be followed.
pub trait Source: Send {
    /// The source's **full** answer. The reader computes the differences.
    type Item: PartialEq + Send + Sync;

    /// One session: subscribe, then list and publish, then publish again after each change, and list again whenever
    /// `resync` is due. It runs until it fails, and may be dropped at any await. Returning `Ok` requests a new session.
    fn session(
        &mut self,
        publish: &Publisher<Self::Item>,
        resync: &mut Resync,
    ) -> impl Future<Output = Result<(), SourceError>> + Send;

    /// Runs between a failed session and the next one. May be dropped at any await.
    fn between(&mut self) -> impl Future<Output = Infallible> + Send {
        pending()
    }
}

/// Why a session ended: one line with the request and the answer or error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceError {
    reason: String,
    /// The pause that the source requested.
    pause: Duration,
    refused: bool,
    fix: Option<Arc<str>>,
}

impl SourceError {
    /// Longer pauses are cut to this, because only a new attempt shows that the source is back.
    const LONGEST_PAUSE: Duration = Duration::from_secs(60);
    /// Maximum length of the reason in bytes. It may repeat what a peer has sent.
    const LONGEST: usize = 2 << 10;

    pub fn new(reason: impl fmt::Display) -> Self {
        let reason = shortened(&reason.to_string(), Self::LONGEST).into_owned();
        Self { reason, pause: Duration::ZERO, refused: false, fix: None }
    }

    /// Marks the error as a refusal of only this query by a working source.
    pub fn refused(self) -> Self {
        Self { refused: true, ..self }
    }

    /// Adds a fix.
    pub fn fixed_by(self, fix: impl Into<Arc<str>>) -> Self {
        Self { fix: Some(fix.into()), ..self }
    }

    /// Adds the pause that the source requested.
    pub fn after(self, pause: Duration) -> Self {
        Self { pause: pause.min(Self::LONGEST_PAUSE), ..self }
    }

    /// An error and the errors that caused it, on one line.
    pub fn caused(what: impl fmt::Display, error: &dyn std::error::Error) -> Self {
        let mut text = format!("{what}: {error}");
        let mut cause = error.source();
        while let Some(error) = cause {
            let link = error.to_string();
            // Many libraries repeat the cause in their own text.
            if !text.contains(&link) {
                text.push_str(": ");
                text.push_str(&link);
            }
            cause = error.source();
        }
        Self::new(text)
    }
}

impl fmt::Display for SourceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

/// The writing end of a source's state.
#[derive(Debug)]
pub struct Publisher<T> {
    slot: watch::Sender<Known<T>>,
    /// The source's name in the log. `None` if it is derived from another source, which logs itself.
    name: Option<Arc<str>>,
    /// Notified after each change that matters to the reader.
    bell: Arc<Notify>,
}

/// The reading end of a source's state.
pub type Answers<T> = watch::Receiver<Known<T>>;

impl<T: PartialEq> Publisher<T> {
    /// An empty slot that rings `bell`.
    pub fn new(bell: Arc<Notify>) -> (Self, Answers<T>) {
        let (slot, answers) = watch::channel(Known::default());
        (Self { slot, name: None, bell }, answers)
    }

    /// Publishes a full answer. Returns whether it differs from the last one.
    pub fn publish(&self, value: T) -> bool {
        let now = Instant::now();
        let (mut is_back, mut changed) = (false, false);
        self.slot.send_modify(|known| {
            is_back = known.error.take().is_some();
            known.confirmed = Some(now);
            known.answers += 1;
            if known.value.as_deref() != Some(&value) {
                known.value = Some(Arc::new(value));
                known.changed = Some(now);
                known.changes += 1;
                changed = true;
            }
        });
        self.answered(is_back);
        if is_back || changed {
            self.bell.notify_one();
        }
        changed
    }

    /// The bell, for a session to notify the reader of something that is not in an answer.
    pub fn bell(&self) -> Arc<Notify> {
        self.bell.clone()
    }

    /// Confirms the last answer.
    pub fn confirm(&self) {
        let mut is_back = false;
        self.slot.send_modify(|known| {
            is_back = known.error.take().is_some();
            known.confirmed = Some(Instant::now());
            known.answers += 1;
        });
        self.answered(is_back);
        if is_back {
            self.bell.notify_one();
        }
    }

    fn answered(&self, is_back: bool) {
        if let Some(source) = self.name.as_deref().filter(|_| is_back) {
            info!(source, "source is back");
        }
    }

    /// The start and the end of a failure are logged here, however short it is and whatever happens in between.
    fn fail(&self, error: &SourceError) {
        let (mut is_lost, mut is_known) = (false, false);
        self.slot.send_modify(|known| {
            is_lost = known.error.is_none();
            is_known = known.value.is_some();
            known.error = Some(error.to_string().into());
            known.fix.clone_from(&error.fix);
            known.refused = error.refused;
            known.failures += 1;
        });
        match self.name.as_deref().filter(|_| is_lost) {
            Some(source) if is_known => {
                warn!(source, %error, fix = error.fix.as_deref(), "source does not answer; its last data stays in use");
            }
            Some(source) => {
                warn!(source, %error, fix = error.fix.as_deref(), "source has not answered yet; retrying");
            }
            None => {}
        }
        self.bell.notify_one();
    }

    fn answers(&self) -> u64 {
        self.slot.borrow().answers
    }
}

/// Follows `source`. Never returns. `name` is its name in the log.
pub async fn follow<S: Source>(
    name: &str,
    mut source: S,
    mut publish: Publisher<S::Item>,
    mut resync: Resync,
) {
    publish.name = Some(name.into());
    let mut backoff = Backoff::default();
    loop {
        let answers_before = publish.answers();
        let started = Instant::now();
        resync.restart();
        let end = session(&mut source, &publish, &mut resync).await;
        let answered = publish.answers() > answers_before;
        let error = match end {
            Ok(()) if answered => {
                backoff = Backoff::default();
                debug!(source = name, "source starts a new session");
                // A server that ends every session must not cause a busy loop.
                tokio::time::sleep(Backoff::FIRST.saturating_sub(started.elapsed())).await;
                continue;
            }
            Ok(()) => SourceError::new("the session ended without an answer"),
            Err(error) => error,
        };
        publish.fail(&error);
        if answered && started.elapsed() > Backoff::SETTLED {
            backoff = Backoff::default();
        }
        let pause = backoff.next(fastrand::f64()).max(error.pause);
        debug!(source = name, %error, attempts = backoff.attempts, next_s = pause.as_secs_f64(), "source will be asked again");
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = resync.requested() => {}
            never = source.between() => match never {},
        }
    }
}

/// Timeout of a session's first answer, if `-resync` is shorter: an engine that hangs for one container may delay its first
/// answer.
const FIRST_ANSWER: Duration = Duration::from_secs(30);

/// Runs one session of `source`, until it ends, panics, or has given no answer for as long as `-resync`.
async fn session<S: Source>(
    source: &mut S,
    publish: &Publisher<S::Item>,
    resync: &mut Resync,
) -> Result<(), SourceError> {
    let (answers_before, limit) = (publish.answers(), resync.every().max(FIRST_ANSWER));
    // A bug in one source must neither stop the others nor this one forever. A session that panicked leaves the same state
    // as one that was dropped.
    let session = AssertUnwindSafe(source.session(publish, resync)).catch_unwind();
    let mut session = std::pin::pin!(session.map(|end| end.unwrap_or_else(panicked)));
    match tokio::time::timeout(limit, &mut session).await {
        Ok(end) => end,
        Err(_) if publish.answers() > answers_before => session.await,
        Err(_) => Err(SourceError::new(format_args!("no answer within {} s", limit.as_secs_f32()))),
    }
}

/// Converts a panic to an error. The panic hook has logged its location.
fn panicked<T>(panic: Box<dyn std::any::Any + Send>) -> Result<T, SourceError> {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
    Err(SourceError::new(format_args!("a fault of embassy's own: {text}")))
}

/// Exponential backoff with jitter: many hosts that lost one registry must not reconnect at the same time.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    attempts: u32,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(100);
    const LONGEST: Duration = Duration::from_secs(5);
    /// A session that lasted this long counts as a successful start.
    const SETTLED: Duration = Duration::from_secs(10);

    /// The next pause. `random` in `0..1` selects a value between half of its length and the full length.
    pub(crate) fn next(&mut self, random: f64) -> Duration {
        let doubled = Self::FIRST.saturating_mul(1 << self.attempts.min(16));
        self.attempts = self.attempts.saturating_add(1);
        doubled.min(Self::LONGEST).mul_f64(0.5 + random / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    #[test]
    fn backoff_doubles_up_to_its_longest_and_is_jittered() {
        let mut backoff = Backoff::default();
        assert_eq!(backoff.next(0.0), Duration::from_millis(50));
        assert_eq!(backoff.next(1.0), Duration::from_millis(200));
        for _ in 0..100 {
            assert!(backoff.next(0.999) <= Backoff::LONGEST);
        }
        assert!(backoff.next(0.0) >= Backoff::LONGEST / 2);
    }

    #[test]
    fn a_reason_has_an_end() {
        assert_eq!(SourceError::new("down").to_string(), "down");
        assert!(SourceError::new("x".repeat(1 << 20)).to_string().len() < 3000);
    }

    fn resync(seconds: u64) -> Resync {
        ResyncRequests::new(Duration::from_secs(seconds)).subscribe()
    }

    /// Plays a script: each session publishes its values and ends as listed.
    struct Script(VecDeque<(Vec<u32>, Result<(), SourceError>)>);

    impl Source for Script {
        type Item = u32;

        async fn session(
            &mut self,
            publish: &Publisher<u32>,
            _: &mut Resync,
        ) -> Result<(), SourceError> {
            let Some((values, end)) = self.0.pop_front() else {
                return std::future::pending().await;
            };
            for value in values {
                publish.publish(value);
            }
            end
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_keeps_what_was_known_and_the_next_answer_clears_it() {
        let (publish, mut answers) = Publisher::new(Arc::default());
        let script = Script(VecDeque::from([
            (vec![1], Err(SourceError::new("gone"))),
            (vec![], Err(SourceError::new("still gone"))),
            (vec![2], Ok(())),
        ]));
        tokio::spawn(follow("script", script, publish, resync(120)));

        let known = answers.wait_for(|known| known.failures == 1).await.unwrap().clone();
        assert_eq!((known.value.as_deref(), known.error.as_deref()), (Some(&1), Some("gone")));
        let known = answers.wait_for(|known| known.failures == 2).await.unwrap().clone();
        assert_eq!(
            (known.value.as_deref(), known.error.as_deref()),
            (Some(&1), Some("still gone"))
        );
        let known = answers.wait_for(|known| known.answers == 2).await.unwrap().clone();
        assert_eq!((known.value.as_deref(), known.error), (Some(&2), None));
    }

    #[tokio::test(start_paused = true)]
    async fn each_loss_and_each_return_is_logged_however_soon_it_comes() {
        let lines = Arc::new(std::sync::Mutex::new(Vec::new()));
        let writer = lines.clone();
        let log =
            tracing_subscriber::fmt().with_ansi(false).without_time().with_writer(move || {
                // One write per line.
                std::io::LineWriter::new(Lines(writer.clone()))
            });
        let _log = tracing::subscriber::set_default(log.finish());
        let (publish, mut answers) = Publisher::new(Arc::default());
        let gone = || Err(SourceError::new("gone"));
        let script = Script(VecDeque::from([
            (vec![], gone()),
            (vec![], gone()),
            (vec![1], gone()),
            (vec![1], gone()),
            (vec![], gone()),
            (vec![2, 3], Ok(())),
        ]));
        tokio::spawn(follow("script", script, publish, resync(120)));
        answers.wait_for(|known| known.value.as_deref() == Some(&3)).await.unwrap();
        let lines = lines.lock().unwrap().concat();
        let said: Vec<_> = lines
            .lines()
            .filter_map(|line| {
                let words = ["has not answered yet", "does not answer", "is back"];
                words.into_iter().find(|words| line.contains(words))
            })
            .collect();
        let (lost, back) = ("does not answer", "is back");
        assert_eq!(said, ["has not answered yet", back, lost, back, lost, back], "{lines}");
    }

    struct Lines(Arc<std::sync::Mutex<Vec<String>>>);

    impl std::io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().push(String::from_utf8_lossy(bytes).into_owned());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// Its first session panics after it has published.
    struct Faulty(bool);

    impl Source for Faulty {
        type Item = u32;

        async fn session(
            &mut self,
            publish: &Publisher<u32>,
            _: &mut Resync,
        ) -> Result<(), SourceError> {
            publish.publish(if self.0 { 2 } else { 1 });
            if !std::mem::replace(&mut self.0, true) {
                panic!("thrown on purpose");
            }
            std::future::pending().await
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_panic_is_a_failure_like_any_other() {
        let (publish, mut answers) = Publisher::new(Arc::default());
        let task = tokio::spawn(follow("faulty", Faulty(false), publish, resync(120)));
        let known = answers.wait_for(|known| known.failures == 1).await.unwrap().clone();
        assert_eq!(known.value.as_deref(), Some(&1));
        assert_eq!(known.error.as_deref(), Some("a fault of embassy's own: thrown on purpose"));
        let known = answers.wait_for(|known| known.answers == 2).await.unwrap().clone();
        assert_eq!((known.value.as_deref(), known.error), (Some(&2), None));
        assert!(!task.is_finished());
    }

    #[tokio::test(start_paused = true)]
    async fn a_source_that_says_nothing_is_a_failure() {
        let (publish, mut answers) = Publisher::new(Arc::default());
        tokio::spawn(follow("silent", Script(VecDeque::new()), publish, resync(50)));
        let known = answers.wait_for(|known| known.failures == 1).await.unwrap().clone();
        assert_eq!(known.error.as_deref(), Some("no answer within 50 s"));
    }

    /// Its first answer takes a while.
    struct Slow;

    impl Source for Slow {
        type Item = u32;

        async fn session(
            &mut self,
            publish: &Publisher<u32>,
            _: &mut Resync,
        ) -> Result<(), SourceError> {
            tokio::time::sleep(Duration::from_secs(20)).await;
            publish.publish(1);
            std::future::pending().await
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_first_answer_may_take_longer_than_a_short_resync() {
        let (publish, mut answers) = Publisher::new(Arc::default());
        tokio::spawn(follow("slow", Slow, publish, resync(1)));
        let answers = answers.wait_for(|known| known.answers == 1 || known.failures > 0);
        assert_eq!(answers.await.unwrap().failures, 0);
    }

    #[test]
    fn the_bell_rings_for_news_only() {
        let bell = Arc::new(Notify::new());
        let (publish, _answers) = Publisher::new(bell.clone());
        let rang = || {
            let mut wait = std::pin::pin!(bell.notified());
            wait.as_mut().enable()
        };
        publish.publish(1);
        assert!(rang());
        publish.publish(1);
        assert!(!rang());
        publish.publish(2);
        assert!(rang());
    }
}
