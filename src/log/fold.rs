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
/// Poll interval for counts that are due.
const LOOK: Duration = Duration::from_secs(5);
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

/// Messages of a flapping endpoint: folded too, although they are not warnings.
const FLAPPING: [&str; 2] = ["endpoint ejected", "endpoint is back"];

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
            let repeats = level <= Level::WARN || FLAPPING.contains(&text.message.as_str());
            if repeats && !lock(&self.seen).is_news(text.line(), Instant::now()) {
                return Ok(());
            }
        }
        self.lines.format_event(context, writer, event)
    }
}

/// An event in words: its message, and its fields behind it.
#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Text {
    fn line(self) -> String {
        self.message + &self.fields
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
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

/// Warnings that were written, with the number of repetitions.
#[derive(Debug, Default)]
struct Seen(HashMap<String, Count>);

#[derive(Debug)]
struct Count {
    /// When it was written, or its count was logged.
    since: Instant,
    times: u64,
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
    fn is_news(&mut self, text: String, now: Instant) -> bool {
        if let Some(count) = self.0.get_mut(&text) {
            count.times += 1;
            return false;
        }
        if self.0.len() < REMEMBERED {
            self.0.insert(text, Count { since: now, times: 0 });
        }
        true
    }

    /// The warnings that were repeated within their time, which starts again. Others are forgotten, and the next one is
    /// written.
    fn due(&mut self, now: Instant) -> Vec<Repeated> {
        let over = |count: &Count| now.saturating_duration_since(count.since) >= WINDOW;
        self.0.retain(|_, count| count.times > 0 || !over(count));
        let due = self.0.iter_mut().filter(|(_, count)| over(count));
        take(due, now)
    }

    /// The repetitions that were not logged yet.
    fn all(&mut self, now: Instant) -> Vec<Repeated> {
        take(self.0.iter_mut().filter(|(_, count)| count.times > 0), now)
    }
}

fn take<'a>(
    counts: impl Iterator<Item = (&'a String, &'a mut Count)>,
    now: Instant,
) -> Vec<Repeated> {
    counts
        .map(|(text, count)| {
            let since = now.saturating_duration_since(count.since);
            count.since = now;
            Repeated { text: text.clone(), times: std::mem::take(&mut count.times), since }
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
        assert_eq!((times("again: endpoint ejected"), times("again: ")), (1, 2), "{text}");
        assert_eq!(times("times=4"), 2, "{text}");
        assert_eq!((times("new route"), times(" connection: connection")), (5, 5), "{text}");
        assert_eq!(times("10.0.0.2"), 1, "{text}");
    }

    #[test]
    fn what_repeats_is_written_once_then_counted_then_forgotten() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut seen = Seen::default();
        assert!(seen.is_news("a".into(), start));
        assert!(seen.is_news("b".into(), start));
        assert!(!seen.is_news("a".into(), after(1)));
        assert!(!seen.is_news("a".into(), after(2)));
        assert_eq!(seen.due(after(59)), []);
        let told = Repeated { text: "a".into(), times: 2, since: Duration::from_secs(60) };
        assert_eq!(seen.due(after(60)), [told]);
        // `b` did not come again: the next one is news. `a` did, and is still the same story.
        assert!(seen.is_news("b".into(), after(61)));
        assert!(!seen.is_news("a".into(), after(61)));
        assert_eq!(seen.all(after(62)).len(), 1);
        assert_eq!(seen.all(after(62)), []);
        assert_eq!(seen.due(after(200)), []);
        assert!(seen.is_news("a".into(), after(201)));
    }

    #[test]
    fn what_cannot_be_remembered_is_written() {
        let start = Instant::now();
        let mut seen = Seen::default();
        for n in 0..REMEMBERED {
            assert!(seen.is_news(n.to_string(), start));
        }
        assert!(seen.is_news("one more".into(), start));
        assert!(seen.is_news("one more".into(), start));
    }
}
