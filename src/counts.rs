//! The counters of connections: plain atomics, cheap enough for every connection.

use std::{
    borrow::Cow,
    fmt::Display,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use crate::{model::Millis, outcome::Tally, takeover::message};

/// The counters of one route, one endpoint or one worker.
#[derive(Debug, Default)]
pub struct ConnectionCounts {
    /// Connections started: for a route, the accepted ones.
    pub started: AtomicU64,
    /// Outcomes. For an endpoint, only those of opened connections.
    pub ended: Tally,
    /// Bytes from consumers to endpoints. Those of an open connection are added when the figures are read, and at its end.
    pub bytes_up: AtomicU64,
    /// Bytes from endpoints to consumers.
    pub bytes_down: AtomicU64,
    /// Datagrams of UDP, as far as the kernel's programs see them.
    pub datagrams_up: AtomicU64,
    pub datagrams_down: AtomicU64,
    /// Connect times. Their count is the number of opened connections.
    pub connect: Histogram,
    /// Further attempts after an endpoint failed.
    pub retries: AtomicU64,
    pub last_error: LastError,
    /// Connections that the previous process counted as started, and that this process does not have: it does not see their
    /// end.
    elsewhere: AtomicU64,
}

impl ConnectionCounts {
    pub fn start(&self) {
        self.started.fetch_add(1, Relaxed);
    }

    pub fn retry(&self) {
        self.retries.fetch_add(1, Relaxed);
    }

    pub fn bytes(&self, up: u64, down: u64) {
        if up != 0 {
            self.bytes_up.fetch_add(up, Relaxed);
        }
        if down != 0 {
            self.bytes_down.fetch_add(down, Relaxed);
        }
    }

    pub fn datagrams(&self, up: u64, down: u64) {
        if up != 0 {
            self.datagrams_up.fetch_add(up, Relaxed);
        }
        if down != 0 {
            self.datagrams_down.fetch_add(down, Relaxed);
        }
    }

    /// Everything except the last error, for the process that takes over.
    pub fn totals(&self) -> message::Counts {
        let connect = self.connect.read();
        message::Counts {
            started: self.started.load(Relaxed),
            ended: self.ended.totals(),
            bytes: [self.bytes_up.load(Relaxed), self.bytes_down.load(Relaxed)],
            datagrams: [self.datagrams_up.load(Relaxed), self.datagrams_down.load(Relaxed)],
            connect: connect.buckets.to_vec(),
            connect_micros: connect.micros,
            retries: self.retries.load(Relaxed),
        }
    }

    /// Adds the counts of the previous process.
    pub fn add(&self, before: &message::Counts) {
        self.started.fetch_add(before.started, Relaxed);
        self.ended.add_all(&before.ended);
        self.bytes(before.bytes[0], before.bytes[1]);
        self.datagrams(before.datagrams[0], before.datagrams[1]);
        self.connect.add_all(&before.connect, before.connect_micros);
        self.retries.fetch_add(before.retries, Relaxed);
    }

    /// Adds the counts of the previous process. For each of its open connections that this process takes over,
    /// [`ConnectionCounts::adopt`] must be called.
    pub fn inherit(&self, before: &message::Counts) {
        let ended = before.ended.values().fold(0_u64, |sum, count| sum.saturating_add(*count));
        self.elsewhere.fetch_add(before.started.saturating_sub(ended), Relaxed);
        self.add(before);
    }

    /// Counts that this process has taken over one of the previous process's connections.
    pub fn adopt(&self) {
        let one_less = |count: u64| count.checked_sub(1);
        let _ = self.elsewhere.fetch_update(Relaxed, Relaxed, one_less);
    }

    /// Connections of this process that started and have not ended.
    pub fn active(&self) -> u64 {
        // Read first, because a connection that ends meanwhile has started before.
        let ended = self.ended.sum();
        let ended = ended.saturating_add(self.elsewhere.load(Relaxed));
        self.started.load(Relaxed).saturating_sub(ended)
    }
}

/// The last error. It is written only on errors, so a lock is cheap enough.
#[derive(Debug, Default)]
pub struct LastError(Mutex<Option<(Millis, Cow<'static, str>)>>);

impl LastError {
    pub fn set(&self, now: Millis, text: impl Into<Cow<'static, str>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((now, text.into()));
    }

    /// The time and the text.
    pub fn get(&self) -> Option<(Millis, Cow<'static, str>)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Durations, counted in buckets.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    micros: AtomicU64,
}

/// The upper bounds of all buckets except the last, which has none, in microseconds. They range from a neighbour on the
/// same bridge to the timeouts of one attempt (1 s) and of all attempts (5 s).
pub const BOUNDS: [u64; BUCKETS - 1] =
    [250, 500, 1_000, 2_500, 10_000, 50_000, 250_000, 1_000_000, 2_500_000, 5_000_000];
const BUCKETS: usize = 11;

/// The highest bucket bound in seconds. A quantile with this value may in fact be higher.
pub const LONGEST: f64 = 5.0;

impl Histogram {
    pub fn observe(&self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let bucket = BOUNDS.iter().position(|bound| micros <= *bound).unwrap_or(BOUNDS.len());
        if let Some(bucket) = self.buckets.get(bucket) {
            bucket.fetch_add(1, Relaxed);
        }
        self.micros.fetch_add(micros, Relaxed);
    }

    /// Adds the counts of another histogram.
    pub fn add(&self, counted: &Distribution) {
        self.add_all(&counted.buckets, counted.micros);
    }

    /// Adds the counts of another process.
    fn add_all(&self, buckets: &[u64], micros: u64) {
        // Another number of buckets means other bounds.
        if buckets.len() == BUCKETS {
            for (mine, more) in self.buckets.iter().zip(buckets).filter(|(_, more)| **more > 0) {
                mine.fetch_add(*more, Relaxed);
            }
            self.micros.fetch_add(micros, Relaxed);
        }
    }

    pub fn read(&self) -> Distribution {
        Distribution {
            buckets: std::array::from_fn(|n| self.buckets.get(n).map_or(0, |b| b.load(Relaxed))),
            micros: self.micros.load(Relaxed),
        }
    }
}

/// The values of a histogram when it was read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Distribution {
    /// The number of durations in each bucket, not cumulative.
    pub buckets: [u64; BUCKETS],
    /// The sum of all durations, in microseconds.
    pub micros: u64,
}

impl Distribution {
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    pub fn sum_seconds(&self) -> f64 {
        self.micros as f64 / 1e6
    }

    /// Adds the counts of another distribution.
    pub fn add(&mut self, other: &Self) {
        self.buckets.iter_mut().zip(other.buckets).for_each(|(mine, theirs)| *mine += theirs);
        self.micros += other.micros;
    }

    /// The counts since `earlier`.
    pub fn since(&self, earlier: &Self) -> Self {
        let mut since = *self;
        since
            .buckets
            .iter_mut()
            .zip(earlier.buckets)
            .for_each(|(now, then)| *now = now.saturating_sub(then));
        since.micros = since.micros.saturating_sub(earlier.micros);
        since
    }

    /// A quantile in seconds, `part` between 0 and 1. Interpolated within its bucket, as in Prometheus. The largest bound
    /// if it is above that. `None` if nothing was counted.
    pub fn quantile(&self, part: f64) -> Option<f64> {
        let count = self.count();
        if count == 0 {
            return None;
        }
        let rank = part * count as f64;
        let (mut below, mut lower) = (0.0, 0.0);
        for (bound, inside) in BOUNDS.iter().zip(self.buckets) {
            let (bound, inside) = (*bound as f64 / 1e6, inside as f64);
            if inside > 0.0 && below + inside >= rank {
                return Some(lower + (bound - lower) * ((rank - below) / inside).clamp(0.0, 1.0));
            }
            below += inside;
            lower = bound;
        }
        Some(lower)
    }
}

/// `1 thing`, `2 things`.
pub fn numbered(n: impl Display, one: &str, many: &str) -> String {
    let n = n.to_string();
    let word = if n == "1" { one } else { many };
    format!("{n} {word}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::Outcome;

    fn of(millis: &[u64]) -> Distribution {
        let histogram = Histogram::default();
        millis.iter().for_each(|ms| histogram.observe(Duration::from_millis(*ms)));
        histogram.read()
    }

    #[test]
    fn a_duration_falls_into_the_first_bucket_that_holds_it() {
        let histogram = Histogram::default();
        for bound in BOUNDS {
            histogram.observe(Duration::from_micros(bound));
        }
        histogram.observe(Duration::from_secs(3_600));
        let read = histogram.read();
        assert_eq!(read.buckets, [1; BUCKETS]);
        assert_eq!(read.micros, BOUNDS.iter().sum::<u64>() + 3_600_000_000);
    }

    #[test]
    fn a_quantile_lies_in_the_bucket_of_its_rank() {
        assert_eq!(of(&[]).quantile(0.5), None);
        let read = of(&[2, 2, 2, 40]);
        assert!((0.001..=0.0025).contains(&read.quantile(0.5).unwrap()));
        assert!((0.01..=0.05).contains(&read.quantile(0.99).unwrap()));
        assert!((1.0..=2.5).contains(&of(&[2_100]).quantile(0.99).unwrap()), "a try or two failed");
        assert_eq!(of(&[7_000]).quantile(0.99), Some(LONGEST), "beyond all bounds");
    }

    #[test]
    fn what_came_since_is_the_difference() {
        let (earlier, mut sum) = (of(&[2]), of(&[2]));
        sum.add(&of(&[40, 40]));
        assert_eq!(sum.since(&earlier), of(&[40, 40]));
        assert_eq!(earlier.since(&sum), Distribution::default(), "never below nothing");
    }

    #[test]
    fn a_connection_that_stays_elsewhere_is_not_active_here() {
        let (before, after) = (ConnectionCounts::default(), ConnectionCounts::default());
        (0..5).for_each(|_| before.start());
        before.ended.count(Outcome::Closed);
        assert_eq!(before.active(), 4);
        after.inherit(&before.totals());
        (0..3).for_each(|_| after.adopt());
        after.start();
        assert_eq!((after.active(), after.started.load(Relaxed)), (4, 6));
        (0..4).for_each(|_| after.ended.count(Outcome::Closed));
        assert_eq!(after.active(), 0);
        after.adopt();
        after.adopt();
        assert_eq!(after.active(), 1, "never below nothing");
    }

    #[test]
    fn what_another_process_counted_is_added() {
        let (before, after) = (ConnectionCounts::default(), ConnectionCounts::default());
        for (n, counts) in [&before, &after].into_iter().enumerate() {
            counts.start();
            counts.ended.count(Outcome::ALL[n]);
            counts.bytes(3, 4);
            counts.connect.observe(Duration::from_millis(2));
            counts.retry();
        }
        after.add(&before.totals());
        let sum = after.totals();
        assert_eq!((sum.started, sum.bytes, sum.retries), (2, [6, 8], 2));
        assert_eq!((after.ended.sum(), after.connect.read().count()), (2, 2));
        assert_eq!(sum.connect_micros, 4_000);
        let unknown = [("vanished".to_owned(), 7)].into();
        after.add(&message::Counts { ended: unknown, connect: vec![1], ..Default::default() });
        assert_eq!(after.totals(), sum, "what this version does not know it does not count");
    }

    #[test]
    fn active_is_what_began_and_did_not_end() {
        let counts = ConnectionCounts::default();
        (0..3).for_each(|_| counts.start());
        counts.ended.count(Outcome::Closed);
        assert_eq!(counts.active(), 2);
    }
}
