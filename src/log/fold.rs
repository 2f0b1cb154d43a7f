//! Limits the log. A repeated warning is written once and then counted, because a log full of repetitions hides everything
//! else. Lines are also counted if there are too many about one thing, whatever they say. Each line is limited in length,
//! and deceptive characters are shown escaped.

use std::{
    borrow::Cow,
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
use crate::{
    config::LogFormat,
    text::{shortened, visible, visible_json},
};
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
    warn,
};
use tracing_subscriber::{
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    registry::LookupSpan,
};

/// How long a repeated warning is only counted, until the count is logged.
const WINDOW: Duration = Duration::from_secs(60);
/// How long a state must last before it is logged, if the log's last line about it says otherwise.
const SETTLED: Duration = Duration::from_secs(2);
/// Poll interval for due counts.
const LOOK: Duration = Duration::from_secs(2);
/// Maximum number of different warnings that are remembered. Further ones are always written.
const REMEMBERED: usize = 1024;
/// Maximum number of lines of one kind about one thing within a [`WINDOW`]. Further ones are counted. Slightly more than
/// the maximum number of a consumer's bindings.
const OF_ONE: u32 = 300;
/// Maximum number of things and kinds whose lines are counted. Lines about further ones are always written.
const CROWDS: usize = 16 * 1024;
/// Maximum length of a line in bytes. Together with the length of the queues this limits the log's memory.
const LONGEST: usize = 4 << 10;
/// Maximum length of a field in bytes, for comparing lines and in lines that are too long.
const LONGEST_FIELD: usize = 512;

/// The counts. Logs the pending ones when it is dropped.
#[derive(Debug, Default)]
pub(super) struct Fold {
    seen: Arc<Mutex<Seen>>,
    /// Dropping it ends the thread.
    teller: Mutex<Option<Sender<()>>>,
}

impl Fold {
    /// Starts to log counts when they are due.
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

/// Groups of messages, each of which ends the state that another of its group began; and the fields that identify the
/// subject. Changes back and forth are counted, but the last line about a subject must be true.
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
            "captured connections are dropped on this host",
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

/// Messages that are always written: each comes with a change of endpoints, and the change back (`service endpoints
/// changed`) is always written too.
const NEVER_FOLDED: [&str; 2] = [
    "service has no endpoints; the last ones stay in use for --empty-hold",
    "service has no endpoints; connections are reset",
];

/// The fields that name the subject of a line. The first one that the line has is used.
const SUBJECTS: [&str; 6] = ["consumer", "service", "source", "id", "file", "endpoint"];

/// Messages of one kind. Of the counted ones the last is logged, whichever it is, so that the log's last line is true. Each
/// other message is its own kind.
const KINDS: [&[&str]; 2] = [
    &[
        "service endpoints changed",
        "service has no endpoints; the last ones stay in use for --empty-hold",
        "service has no endpoints; connections are reset",
        "service lost most of its endpoints at once; they stay in use for --empty-hold",
    ],
    &["new route", "route gone"],
];

/// The target of lines with a count. They are not counted themselves.
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
    format: LogFormat,
    lines: F,
}

impl Folded<()> {
    pub(super) fn of(fold: &Fold, format: LogFormat) -> Self {
        Self { seen: fold.seen.clone(), format, lines: () }
    }

    /// `lines` writes the lines that are not omitted, in this format.
    pub(super) fn then<F>(self, lines: F) -> Folded<F> {
        Folded { seen: self.seen, format: self.format, lines }
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
        mut writer: Writer<'_>,
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
                && !lock(&self.seen).is_news(text.clone(), state, Instant::now())
            {
                return Ok(());
            }
            if !lock(&self.seen).has_room(text, Instant::now()) {
                return Ok(());
            }
        }
        // All log lines pass here, from whatever module.
        let mut line = String::new();
        self.lines.format_event(context, Writer::new(&mut line), event)?;
        let line = line.strip_suffix('\n').unwrap_or(&line);
        let line = match self.format {
            LogFormat::Text => visible(&shortened(line, LONGEST)).into_owned(),
            LogFormat::Json => visible_json(&shortened_json(line)).into_owned(),
        };
        writeln!(writer, "{line}")
    }
}

/// Shortens a line in JSON so that it stays valid: each of its texts is cut.
fn shortened_json(line: &str) -> Cow<'_, str> {
    if line.len() <= LONGEST {
        return line.into();
    }
    let Ok(mut object) = serde_json::from_str::<serde_json::Map<_, _>>(line) else {
        return line.into();
    };
    for value in object.values_mut() {
        if let serde_json::Value::String(text) = value {
            *text = shortened(text, LONGEST_FIELD).into_owned();
        }
    }
    serde_json::Value::from(object).to_string().into()
}

/// An event as text: its message, followed by its fields.
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

    /// The line's kind and its subject. `None` if it has no subject.
    fn crowd(&self) -> Option<String> {
        let named = |subject| self.fields.iter().find(|(name, _)| *name == subject);
        let (name, value) = SUBJECTS.into_iter().find_map(named)?;
        let message = self.message.as_str();
        let kind = KINDS.iter().find(|kind| kind.contains(&message)).and_then(|kind| kind.first());
        Some(format!("{} {name}={value}", kind.unwrap_or(&message)))
    }

    /// A key for the subject whose state it reports: the same for all messages about this state. `None` if it reports no
    /// state.
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
        let mut text = String::new();
        // The only possible error is that the text was cut.
        let _ = write!(Cut(&mut text), "{value:?}");
        match field.name() {
            "message" => self.message = text,
            name => self.fields.push((name, text)),
        }
    }
}

/// Takes the start of what is written.
struct Cut<'a>(&'a mut String);

impl Write for Cut<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = text.floor_char_boundary(LONGEST_FIELD.saturating_sub(self.0.len()));
        self.0.push_str(text.get(..end).unwrap_or_default());
        if end < text.len() { Err(fmt::Error) } else { Ok(()) }
    }
}

#[derive(Debug, Default)]
struct Seen {
    /// Warnings and states that were written, with the number of repetitions.
    repeats: HashMap<String, Count>,
    /// What was written about each subject, by kind and subject.
    crowds: HashMap<String, Crowd>,
}

/// Lines of one kind about one subject.
#[derive(Debug)]
struct Crowd {
    /// When the first line of this window was written.
    since: Instant,
    written: u32,
    /// The number of lines that were not written since, the last of them, and its time.
    more: u64,
    last: Text,
    came: Instant,
}

#[derive(Debug)]
struct Count {
    /// When it was written, or its count was last logged.
    since: Instant,
    times: u64,
    /// The last repetition, and its time.
    last: Text,
    came: Instant,
    /// The messages of a state that were written. The last one is what the log currently says.
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
    /// Whether to write it. Otherwise it is counted.
    fn is_news(&mut self, text: Text, state: Option<String>, now: Instant) -> bool {
        let key = state.unwrap_or_else(|| text.line());
        if let Some(count) = self.repeats.get_mut(&key) {
            (count.last, count.came) = (text, now);
            let is_new = !count.written.contains(&count.last.message);
            if is_new {
                count.written.push(count.last.message.clone());
            } else {
                count.times += 1;
            }
            return is_new;
        }
        if self.repeats.len() < REMEMBERED {
            let written = vec![text.message.clone()];
            self.repeats
                .insert(key, Count { since: now, times: 0, last: text, came: now, written });
        }
        true
    }

    /// Whether another line about its subject may be written. Otherwise it is counted.
    fn has_room(&mut self, text: Text, now: Instant) -> bool {
        let Some(key) = text.crowd() else { return true };
        if self.crowds.len() >= CROWDS && !self.crowds.contains_key(&key) {
            return true;
        }
        let new = || Crowd { since: now, written: 0, more: 0, last: Text::default(), came: now };
        let crowd = self.crowds.entry(key).or_insert_with(new);
        // Counted lines are logged first.
        if crowd.more == 0 && crowd.is_over(now) {
            (crowd.since, crowd.written) = (now, 0);
        }
        if crowd.more == 0 && crowd.written < OF_ONE {
            crowd.written += 1;
            return true;
        }
        crowd.more += 1;
        (crowd.last, crowd.came) = (text, now);
        false
    }

    /// Lines that were repeated within their window, which starts again, and states that the log does not show. Others are
    /// forgotten, so that their next line is written.
    fn due(&mut self, now: Instant) -> Vec<Repeated> {
        let over = |count: &Count| now.saturating_duration_since(count.since) >= WINDOW;
        let is_hidden = |count: &Count| {
            count.times > 0
                && count.written.last() != Some(&count.last.message)
                && now.saturating_duration_since(count.came) >= SETTLED
        };
        self.repeats.retain(|_, count| count.times > 0 || !over(count));
        let mut due =
            take(self.repeats.values_mut().filter(|count| over(count) || is_hidden(count)), now);
        self.crowds.retain(|_, crowd| crowd.more > 0 || !crowd.is_over(now));
        let is_due = |crowd: &&mut Crowd| crowd.more > 0 && crowd.may_be_told(now);
        due.extend(self.crowds.values_mut().filter(is_due).map(|crowd| crowd.take(now)));
        due
    }

    /// The repetitions that were not logged yet.
    fn all(&mut self, now: Instant) -> Vec<Repeated> {
        let mut all = take(self.repeats.values_mut().filter(|count| count.times > 0), now);
        let counted = self.crowds.values_mut().filter(|crowd| crowd.more > 0);
        all.extend(counted.map(|crowd| crowd.take(now)));
        all
    }
}

impl Crowd {
    fn is_over(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) >= WINDOW
    }

    /// Whether the counted lines may be logged: no more arrive, or the window is over.
    fn may_be_told(&self, now: Instant) -> bool {
        self.is_over(now) || now.saturating_duration_since(self.came) >= SETTLED
    }

    fn take(&mut self, now: Instant) -> Repeated {
        let since = now.saturating_duration_since(self.since);
        if self.is_over(now) {
            (self.since, self.written) = (now, 0);
        }
        let text = std::mem::take(&mut self.last).line();
        Repeated { text, times: std::mem::take(&mut self.more), since }
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

    /// The written output.
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
        let layer = layer.map_event_format(|lines| Folded::of(&fold, LogFormat::Text).then(lines));
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
        // No change, so nothing is logged.
        assert_eq!(seen.due(after(50)), []);
        // It changes back and forth, and ends as the log says: this may wait.
        let mut news = |message, seconds| {
            let (text, state) = state(message, "a");
            seen.is_news(text, state, after(seconds))
        };
        assert!(!news(BACK, 51) && !news(LOST, 52));
        assert_eq!(seen.due(after(60)), []);
        let told = seen.due(after(66));
        let [Repeated { text, times: 2, .. }] = &told[..] else { panic!("{told:?}") };
        assert!(text.starts_with(LOST), "{text}");
        // After a while it is written again.
        assert_eq!(seen.due(after(200)), []);
        let (text, state) = state(BACK, "a");
        assert!(seen.is_news(text, state, after(201)));
    }

    proptest::proptest! {
        /// Whatever lines arrive and whenever counts are checked: once a state has lasted, the log ends with it.
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
        // `b` was not repeated, so the next one is written. `a` was, and is still only counted.
        assert!(is_news(seen, "b", after(61)));
        assert!(!is_news(seen, "a", after(61)));
        assert_eq!(seen.all(after(62)).len(), 1);
        assert_eq!(seen.all(after(62)), []);
        assert_eq!(seen.due(after(200)), []);
        assert!(is_news(seen, "a", after(201)));
    }

    /// A service whose endpoints change a thousand times per second, next to another one.
    #[test]
    fn one_thing_does_not_fill_the_log_and_the_last_line_about_it_is_true() {
        let start = Instant::now();
        let mut seen = Seen::default();
        let line = |message: &str, service: &str, n: usize| Text {
            message: message.into(),
            fields: vec![("service", service.to_owned()), ("endpoints", n.to_string())],
        };
        let (changed, none) = (KINDS[0][0], KINDS[0][2]);
        let mut written = 0;
        for n in 0..10_000 {
            let now = start + Duration::from_millis(n);
            let message = if n % 2 == 0 { changed } else { none };
            written += usize::from(seen.has_room(line(message, "a", n as usize), now));
            if n % 100 == 0 {
                assert!(seen.has_room(line(changed, "b", n as usize), now), "{n}");
            }
            assert_eq!(seen.due(now), [], "{n}");
        }
        assert_eq!(written, OF_ONE as usize);
        // Nothing is written before the counted lines.
        let now = start + Duration::from_secs(11);
        assert!(!seen.has_room(line(changed, "a", 7), now));
        let told = seen.due(now + SETTLED);
        let [Repeated { text: said, times: 9701, .. }] = &told[..] else { panic!("{told:?}") };
        assert_eq!(*said, format!("{changed} service=a endpoints=7"));
        // After a while there is room again, and nothing about quiet subjects is kept.
        let late = start + WINDOW + WINDOW;
        assert_eq!(seen.due(late), []);
        assert!(seen.crowds.is_empty());
        assert!(seen.has_room(line(changed, "a", 1), late));
        // Lines without a subject are always written.
        for _ in 0..1000 {
            assert!(seen.has_room(text("the capture failed"), late));
        }
    }

    /// How a field with these characters is written, in both formats.
    #[test]
    fn no_line_is_forged_and_none_is_endless() {
        const NAME: &str = "app\nWARN forged\u{1b}[2J\u{202e}\u{9b}31m\u{2028}\u{200b}\r\u{85}";
        for format in [LogFormat::Text, LogFormat::Json] {
            let (out, fold) = (Out::default(), Fold::default());
            let writer = out.clone();
            let layer = tracing_subscriber::fmt::layer().with_ansi(false);
            let layer = layer.with_writer(move || writer.clone());
            let folded = Folded::of(&fold, format);
            let log = || {
                tracing::warn!(consumer = %NAME, quoted = NAME, "a name: {NAME}");
                tracing::error!(error = %"x\n".repeat(100_000), "{NAME}");
                tracing::info!(target: CONNECTION, consumer = %NAME, "connection");
                tracing::debug!(consumer = %NAME, "debug");
            };
            match format {
                LogFormat::Text => {
                    let layer = layer.map_event_format(|lines| folded.then(lines));
                    let registry = tracing_subscriber::registry().with(layer);
                    tracing::subscriber::with_default(registry, log);
                }
                LogFormat::Json => {
                    let layer = layer.json().flatten_event(true);
                    let layer = layer.map_event_format(|lines| folded.then(lines));
                    let registry = tracing_subscriber::registry().with(layer);
                    tracing::subscriber::with_default(registry, log);
                }
            }
            let text = String::from_utf8(out.0.lock().unwrap().clone()).unwrap();
            assert_eq!(text.lines().count(), 4, "{text}");
            for line in text.split('\n') {
                assert!(!line.contains(crate::text::is_deceptive), "{line:?}");
                assert!(line.len() < 2 * LONGEST, "{}", line.len());
            }
            if format == LogFormat::Json {
                let first = text.lines().next().unwrap();
                let line: serde_json::Value = serde_json::from_str(first).unwrap();
                assert_eq!(line["consumer"], NAME);
                let cut: serde_json::Value =
                    serde_json::from_str(text.lines().nth(1).unwrap()).unwrap();
                assert!(cut["error"].as_str().unwrap().ends_with("bytes more)"), "{cut}");
            }
        }
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
