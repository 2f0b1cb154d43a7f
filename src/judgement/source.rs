//! Sources: whether they answer, and which of their data is in use.

use std::time::{Duration, Instant};

use super::{
    cause::{Cause, Seconds, Used},
    states::{Reason, SourceState, Verdict},
};
use crate::{control::InUse, remedy, source::Known};

/// Whether a source answers.
pub fn source<T>(known: &Known<T>) -> SourceState {
    match (&known.error, &known.value) {
        (Some(_), _) => SourceState::Down,
        (None, Some(_)) => SourceState::Up,
        (None, None) => SourceState::Waiting,
    }
}

/// The state of a source at one moment.
#[derive(Debug, Clone)]
pub struct SourceReading {
    pub name: String,
    pub state: SourceState,
    pub error: Option<Reason>,
    /// What to do about the error.
    pub fix: String,
    pub used: Used,
    /// If it reports no endpoints, or few of many: remaining time for which the last ones stay in use.
    pub held: Option<Duration>,
    /// Entries that were skipped, each with its reason.
    pub skipped: Vec<String>,
    /// Number of further skipped entries.
    pub more_skipped: usize,
    /// Number of endpoints that are not used because there are too many.
    pub left_out: usize,
    /// Why it reports no endpoints, or no better ones.
    pub problem: Option<Reason>,
}

impl SourceReading {
    pub fn of<T>(
        name: String,
        known: &Known<T>,
        in_use: Option<&InUse>,
        skipped: Vec<String>,
        now: Instant,
    ) -> Self {
        let since = |at: Instant| now.saturating_duration_since(at);
        let fix = match (&known.fix, &known.error) {
            (Some(fix), Some(_)) => fix.to_string(),
            (None, Some(error)) => remedy::of(&name, error).to_owned(),
            (_, None) => String::new(),
        };
        Self {
            name,
            fix,
            state: source(known),
            error: known.error.as_deref().map(Reason::from),
            used: match (known.confirmed, in_use) {
                (Some(at), _) => Used::Answer(since(at)),
                (None, Some(InUse::Kept { confirmed })) => Used::Kept(Some(since(*confirmed))),
                (None, _) => Used::Nothing,
            },
            held: match in_use {
                Some(InUse::Held { until }) => Some(until.saturating_duration_since(now)),
                _ => None,
            },
            skipped,
            more_skipped: 0,
            left_out: 0,
            problem: None,
        }
    }

    /// Whether data from an earlier answer is in use.
    pub fn is_lost(&self) -> bool {
        self.state == SourceState::Down
    }

    pub fn verdict(&self) -> Verdict {
        Verdict::worst(self.causes().iter().map(Cause::verdict))
    }

    /// The causes of this source.
    pub fn causes(&self) -> Vec<Cause> {
        let name = || self.name.clone();
        let mut causes = Vec::new();
        match self.state {
            SourceState::Up => {}
            SourceState::Waiting => causes.push(Cause::SourceAwaited { source: name() }),
            SourceState::Down => {
                let error = self.error.clone().unwrap_or_else(|| "".into());
                let fix = self.fix.clone();
                causes.push(Cause::SourceDown { source: name(), error, used: self.used, fix });
            }
        }
        causes.extend(self.held.map(|left| Cause::Held { source: name(), left: Seconds(left) }));
        let problem = self.problem.clone();
        causes.extend(problem.map(|reason| Cause::Unwell { source: name(), reason }));
        let skipped = self
            .skipped
            .iter()
            .map(|entry| Cause::Skipped { source: name(), entry: entry.clone() });
        causes.extend(skipped);
        let of_many = |count: usize| (count > 0).then_some(count);
        let more = of_many(self.more_skipped);
        causes.extend(more.map(|count| Cause::MoreSkipped { source: name(), count }));
        let left_out = of_many(self.left_out);
        causes.extend(left_out.map(|count| Cause::LeftOut { source: name(), count }));
        causes
    }
}
