//! A repeated warning is written once and then counted: a log full of repetitions hides everything else.

use std::{
    collections::HashMap,
    fmt::{self, Write},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use super::CONNECTION;
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
    warn,
};
use tracing_subscriber::{
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    registry::LookupSpan,
};

/// How long a repeated warning is only counted before the count is logged.
const WINDOW: Duration = Duration::from_secs(60);
/// How long a state has to last before it is logged, if the log last said otherwise.
const SETTLED: Duration = Duration::from_secs(2);
/// Poll interval for counts that are due.
const LOOK: Duration = Duration::from_secs(2);
/// Maximum number of different warnings that are remembered; further ones are always written.
const REMEMBERED: usize = 1024;

/// The counts. Logs the pending ones when it is dropped.
#[derive(Debug, Default)]
pub(super) struct Fold {
    seen: Arc<Mutex<Seen>>,
    /// Its end ends the thread.
    teller: Mutex<Option<Sender<()>>>,
}

impl Fold {
    /// Starts logging the counts when they are due.
    pub(super) fn tell(&self) {
        let (alive, ended) = channel::<()>();
        let seen = self.seen.clone();
        let told = thread::Builder::new().name("log".to_owned()).spawn(move || {
            use std::sync::mpsc::RecvTimeoutError::Timeout;
            while ended.recv_timeout(LOOK) == Err(Timeout) {
                let due = lock(&seen).due(Instant::now());
                tell(due);
            }
        });
        match told {
            Ok(_) => *self.teller.lock().unwrap_or_else(PoisonError::into_inner) = Some(alive),
            Err(error) => warn!(%error, "cannot count repeated log lines; dropping them"),
        }
    }
}

impl Drop for Fold {
    fn drop(&mut self) {
        let all = lock(&self.seen).all(Instant::now());
        tell(all);
    }
}

fn lock(seen: &Mutex<Seen>) -> std::sync::MutexGuard<'_, Seen> {
    // A panic elsewhere does not damage the counts.
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Messages that each end the state that another one of them began, and the fields that say whose state it is. What flaps is
/// counted, but the last line about it has to be true.
const STATES: [(&[&str], &[&str]); 9] = [
    (
        &[
            "source has not answered yet; retrying",
            "source does not answer; its last data stays in use",
            "source is back",
        ],
        &["source"],
    ),
    (&["endpoint ejected", "endpoint is back"], &["endpoint", "service"]),
    (&["endpoint check fails", "endpoint check passes"], &["endpoint", "service"]),
    (
        &[
            "memory is nearly used up; new connections are refused",
            "memory is available again; new connections are accepted",
        ],
        &[],
    ),
    (
        &["cannot write the firewall rules; retrying", "the firewall rules can be written again"],
        &[],
    ),
    (
        &[
            "--notrack is refused: connections to endpoints are tracked",
            "--notrack is in effect again",
        ],
        &[],
    ),
    (
        &[
            "captured connections may be dropped on this host",
            "chain no longer drops captured connections",
        ],
        &["chain"],
    ),
    (
        &[
            "cannot write the state file; retrying (a restart during an outage would start empty)",
            "the state file can be written again",
        ],
        &["file"],
    ),
    (
        &["cannot watch this file (inotify limit?); polling it", "watching this file again"],
        &["file"],
    ),
];

/// Messages that are always written: each comes with a change of endpoints, and the change back (`service endpoints changed`) is
/// always written too.
const NEVER_FOLDED: [&str; 2] = [
    "service has no endpoints; the last ones stay in use for --empty-hold",
    "service has no endpoints; connections are reset",
];

/// The target of lines with a count, which are not counted themselves.
const TARGET: &str = "embassy::log";

fn tell(repeated: Vec<Repeated>) {
    for Repeated { text, times, since } in repeated {
        warn!(target: TARGET, times, within_s = since.as_secs(), "again: {text}");
    }
}

/// A line format that omits lines that are only counted.
#[derive(Debug)]
pub(super) struct Folded<F> {
    seen: Arc<Mutex<Seen>>,
    lines: F,
}

impl Folded<()> {
    pub(super) fn of(fold: &Fold) -> Self {
        Self { seen: fold.seen.clone(), lines: () }
    }

    /// `lines` writes the lines that are not omitted.
    pub(super) fn then<F>(self, lines: F) -> Folded<F> {
        Folded { seen: self.seen, lines }
    }
}

impl<S, N, F> FormatEvent<S, N> for Folded<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let metadata = event.metadata();
        let (level, target) = (*metadata.level(), metadata.target());
        if level <= Level::INFO && target != TARGET && target != CONNECTION {
            let mut text = Text::default();
            event.record(&mut text);
            let state = text.state();
            let repeats = level <= Level::WARN || state.is_some();
            if repeats
                && !NEVER_FOLDED.contains(&text.message.as_str())
                && !lock(&self.seen).is_news(text, state, Instant::now())
            {
                return Ok(());
            }
        }
        self.lines.format_event(context, writer, event)
    }
}

/// An event in words: its message, and its fields behind it.
#[derive(Debug, Clone, Default)]
struct Text {
    message: String,
    fields: Vec<(&'static str, String)>,
}

impl Text {
    fn line(&self) -> String {
        let fields = self.fields.iter().map(|(name, value)| format!(" {name}={value}"));
        fields.fold(self.message.clone(), |line, field| line + &field)
    }

    /// Whose state it is about, if it is about one: the same for all messages about it.
    fn state(&self) -> Option<String> {
        let message = self.message.as_str();
        let (messages, subject) = STATES.iter().find(|(all, _)| all.contains(&message))?;
        let of_subject = self.fields.iter().filter(|(name, _)| subject.contains(name));
        let key = of_subject.map(|(name, value)| format!(" {name}={value}")).collect::<String>();
        Some(messages.concat() + &key)
    }
}

impl Visit for Text {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a String cannot fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => {
                self.fields.push((name, format!("{value:?}")));
                Ok(())
            }
        };
    }
}

/// Warnings and states that were written, with the number of repetitions.
#[derive(Debug, Default)]
struct Seen(HashMap<String, Count>);

#[derive(Debug)]
struct Count {
    /// When it was written, or its count was logged.
    since: Instant,
    times: u64,
    /// The last of them, and when it came.
    last: Text,
    came: Instant,
    /// The messages of a state that were written. The last one is what the log says now.
    written: Vec<String>,
}

/// A count to log.
#[derive(Debug, PartialEq, Eq)]
struct Repeated {
    text: String,
    times: u64,
    since: Duration,
}

impl Seen {
    /// Whether to write it; otherwise it is counted.
    fn is_news(&mut self, text: Text, state: Option<String>, now: Instant) -> bool {
        let key = state.unwrap_or_else(|| text.line());
        if let Some(count) = self.0.get_mut(&key) {
            (count.last, count.came) = (text, now);
            let is_new = !count.written.contains(&count.last.message);
            if is_new {
                count.written.push(count.last.message.clone());
            } else {
                count.times += 1;
            }
            return is_new;
        }
        if self.0.len() < REMEMBERED {
            let written = vec![text.message.clone()];
            self.0.insert(key, Count { since: now, times: 0, last: text, came: now, written });
        }
        true
    }

    /// The lines that were repeated within their time, which starts again, and states that the log does not show. Others are
    /// forgotten, and the next one is written.
    fn due(&mut self, now: Instant) -> Vec<Repeated> {
        let over = |count: &Count| now.saturating_duration_since(count.since) >= WINDOW;
        let is_hidden = |count: &Count| {
            count.times > 0
                && count.written.last() != Some(&count.last.message)
                && now.saturating_duration_since(count.came) >= SETTLED
        };
        self.0.retain(|_, count| count.times > 0 || !over(count));
        take(self.0.values_mut().filter(|count| over(count) || is_hidden(count)), now)
    }

    /// The repetitions that were not logged yet.
    fn all(&mut self, now: Instant) -> Vec<Repeated> {
        take(self.0.values_mut().filter(|count| count.times > 0), now)
    }
}

fn take<'a>(counts: impl Iterator<Item = &'a mut Count>, now: Instant) -> Vec<Repeated> {
    counts
        .map(|count| {
            let since = now.saturating_duration_since(count.since);
            count.since = now;
            count.written.retain(|message| *message != count.last.message);
            count.written.push(count.last.message.clone());
            Repeated { text: count.last.line(), times: std::mem::take(&mut count.times), since }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    /// What was written.
    #[derive(Debug, Clone, Default)]
    struct Out(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Out {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn an_endpoint_that_comes_and_goes_is_told_once_and_what_is_no_repeat_always() {
        let (out, fold) = (Out::default(), Fold::default());
        let writer = out.clone();
        let layer = tracing_subscriber::fmt::layer().with_ansi(false);
        let layer = layer.with_writer(move || writer.clone());
        let layer = layer.map_event_format(|lines| Folded::of(&fold).then(lines));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            for _ in 0..5 {
                tracing::info!(endpoint = "10.0.0.1:80", "endpoint ejected");
                tracing::info!(endpoint = "10.0.0.1:80", "endpoint is back");
                tracing::info!(endpoint = "10.0.0.1:80", "new route");
                tracing::info!(target: CONNECTION, "connection");
            }
            tracing::info!(endpoint = "10.0.0.2:80", "endpoint ejected");
            drop(fold);
        });
        let text = String::from_utf8(out.0.lock().unwrap().clone()).unwrap();
        let times = |words: &str| text.matches(words).count();
        assert_eq!(times(r#" endpoint ejected endpoint="10.0.0.1"#), 1, "{text}");
        // The last line is true.
        assert_eq!((times("again: endpoint is back"), times("again: ")), (1, 1), "{text}");
        assert_eq!(times("times=8"), 1, "{text}");
        assert_eq!((times("new route"), times(" connection: connection")), (5, 5), "{text}");
        assert_eq!(times("10.0.0.2"), 1, "{text}");
    }

    fn text(message: &str) -> Text {
        Text { message: message.into(), fields: vec![] }
    }

    fn is_news(seen: &mut Seen, message: &str, now: Instant) -> bool {
        seen.is_news(text(message), None, now)
    }

    /// A line about the state of source `n`.
    fn state(message: &str, n: &str) -> (Text, Option<String>) {
        let fields = vec![("source", n.to_owned()), ("error", message.len().to_string())];
        let text = Text { message: message.into(), fields };
        let state = text.state();
        assert!(state.is_some());
        (text, state)
    }

    #[test]
    fn of_a_state_that_flaps_the_last_line_is_true() {
        const LOST: &str = "source does not answer; its last data stays in use";
        const BACK: &str = "source is back";
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut seen = Seen::default();
        let mut news = |message, n, seconds| {
            let (text, state) = state(message, n);
            seen.is_news(text, state, after(seconds))
        };
        assert!(news(LOST, "a", 0) && news(BACK, "a", 1) && news(LOST, "b", 1));
        // Lost again: the log says that it is back.
        assert!(!news(LOST, "a", 3));
        assert_eq!(seen.due(after(4)), []);
        let told = seen.due(after(5));
        let [Repeated { text, times: 1, .. }] = &told[..] else { panic!("{told:?}") };
        assert!(text.starts_with(LOST) && text.contains("source=a"), "{text}");
        // Nothing new: nothing is said.
        assert_eq!(seen.due(after(50)), []);
        // It flaps, and ends as the log has it: that may wait.
        let mut news = |message, seconds| {
            let (text, state) = state(message, "a");
            seen.is_news(text, state, after(seconds))
        };
        assert!(!news(BACK, 51) && !news(LOST, 52));
        assert_eq!(seen.due(after(60)), []);
        let told = seen.due(after(66));
        let [Repeated { text, times: 2, .. }] = &told[..] else { panic!("{told:?}") };
        assert!(text.starts_with(LOST), "{text}");
        // After a while it is another story.
        assert_eq!(seen.due(after(200)), []);
        let (text, state) = state(BACK, "a");
        assert!(seen.is_news(text, state, after(201)));
    }

    proptest::proptest! {
        /// Whatever comes and whenever it is looked, once a state has lasted the log ends with it.
        #[test]
        fn the_log_ends_with_the_state_that_lasts(steps in proptest::collection::vec((0..3usize, 0..40_000u64), 1..40)) {
            let messages = STATES[0].0;
            let (mut seen, mut now) = (Seen::default(), Instant::now());
            let mut log = Vec::new();
            let mut last = "";
            for (message, pause) in steps {
                let (text, key) = state(messages[message], "a");
                if seen.is_news(text, key, now) {
                    log.push(messages[message].to_owned());
                }
                last = messages[message];
                now += Duration::from_millis(pause);
                log.extend(seen.due(now).into_iter().map(|told| told.text));
            }
            log.extend(seen.due(now + SETTLED).into_iter().map(|told| told.text));
            proptest::prop_assert!(log.last().is_some_and(|line| line.starts_with(last)), "{:?}", log);
        }
    }

    #[test]
    fn every_message_of_a_state_is_one_that_embassy_logs() {
        let operations = include_str!("../../docs/operations.md");
        let messages = STATES.iter().flat_map(|(messages, _)| *messages).chain(&NEVER_FOLDED);
        for message in messages {
            assert!(operations.contains(&format!("`{message}`")), "{message}");
        }
    }

    #[test]
    fn what_repeats_is_written_once_then_counted_then_forgotten() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut all = Seen::default();
        let seen = &mut all;
        assert!(is_news(seen, "a", start));
        assert!(is_news(seen, "b", start));
        assert!(!is_news(seen, "a", after(1)));
        assert!(!is_news(seen, "a", after(2)));
        assert_eq!(seen.due(after(59)), []);
        let told = Repeated { text: "a".into(), times: 2, since: Duration::from_secs(60) };
        assert_eq!(seen.due(after(60)), [told]);
        // `b` did not come again: the next one is news. `a` did, and is still the same story.
        assert!(is_news(seen, "b", after(61)));
        assert!(!is_news(seen, "a", after(61)));
        assert_eq!(seen.all(after(62)).len(), 1);
        assert_eq!(seen.all(after(62)), []);
        assert_eq!(seen.due(after(200)), []);
        assert!(is_news(seen, "a", after(201)));
    }

    #[test]
    fn what_cannot_be_remembered_is_written() {
        let start = Instant::now();
        let mut seen = Seen::default();
        for n in 0..REMEMBERED {
            assert!(is_news(&mut seen, &n.to_string(), start));
        }
        assert!(is_news(&mut seen, "one more", start));
        assert!(is_news(&mut seen, "one more", start));
    }
}
