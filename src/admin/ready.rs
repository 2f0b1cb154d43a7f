//! Logs when embassy becomes ready, and when it is no longer ready, by the same decision as `/readyz` and `embassy status`.

use std::{collections::BTreeSet, time::Duration};

use tokio::{
    sync::watch::{self, error::RecvError},
    time::sleep,
};
use tracing::{info, warn};

use super::context::Feeds;
use crate::judgement::{Situation, Verdict};

/// Maximum time between two checks: an address of this host may disappear without any other change.
const LOOK: Duration = Duration::from_secs(5);
/// Pause between a change and the next check: while embassy is ready, and while it is not. A loss of less than a second is
/// logged by the part that restores it.
const PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_millis(50)];

/// A change to log.
#[derive(Debug, PartialEq, Eq)]
enum LogLine {
    Ready,
    NotReady { waiting_for: String, reason: String },
}

/// The change to log, if readiness differs from what was logged last. At the start, each part is logged when it becomes
/// ready.
fn news(was_ready: Option<bool>, situation: &Situation) -> Option<LogLine> {
    let awaited = situation.awaited();
    match (awaited.is_empty(), was_ready) {
        (true, Some(true)) | (false, Some(false)) => None,
        (true, _) => Some(LogLine::Ready),
        (false, None) if !situation.pending.is_empty() => None,
        (false, _) => {
            let parts: Vec<_> = awaited.iter().map(|awaited| awaited.part.as_str()).collect();
            let causes = situation.why_not_ready();
            let texts = causes.iter().filter(|cause| cause.verdict() == Verdict::Broken);
            let texts: Vec<_> = texts.map(|cause| cause.finding().text).collect();
            Some(LogLine::NotReady { waiting_for: parts.join(", "), reason: texts.join(" ") })
        }
    }
}

impl Feeds {
    /// Logs whether embassy is ready, and sends it, whenever that changes.
    pub async fn log_readiness(self, ready: watch::Sender<bool>) {
        let (mut tables, mut parts) = (self.tables.clone(), self.readiness.changes());
        let mut rules = self.capture.as_ref().map(|counts| counts.changes());
        let mut own_rules = self.own_rules.clone();
        let mut was_ready = None;
        let mut passed_by = BTreeSet::new();
        loop {
            let situation = self.readiness();
            match news(was_ready, &situation) {
                Some(LogLine::Ready) => {
                    was_ready = Some(true);
                    let took_ms = (self.constants.started.elapsed().as_secs_f64() * 1e3).round();
                    info!(took_ms, "embassy is ready");
                }
                Some(LogLine::NotReady { waiting_for, reason }) => {
                    was_ready = Some(false);
                    warn!(waiting_for, reason, "embassy is not ready");
                }
                None => {}
            }
            let is_ready = situation.awaited().is_empty();
            ready.send_if_modified(|was| std::mem::replace(was, is_ready) != is_ready);
            // If nothing is captured, that is why embassy is not ready.
            let passed_by_now = match is_ready {
                true => situation.passed_by_ports(),
                false => BTreeSet::new(),
            };
            let new: Vec<_> = passed_by_now.difference(&passed_by).copied().collect();
            if !new.is_empty() {
                warn!(ports = ?new, "your own rules do not take connections to these ports: they are not captured");
            }
            passed_by = passed_by_now;
            let changed = tokio::select! {
                changed = tables.changed() => changed,
                changed = parts.changed() => changed,
                changed = any(&mut rules) => changed,
                Ok(()) = own_rules.changed() => Ok(()),
                () = sleep(LOOK) => Ok(()),
            };
            if changed.is_err() {
                // The other side has ended, and embassy ends with it.
                return;
            }
            let [ready, not_ready] = PAUSES;
            sleep(if was_ready == Some(true) { ready } else { not_ready }).await;
        }
    }
}

/// Waits for a change, if there is anything that changes.
async fn any<T>(changes: &mut Option<watch::Receiver<T>>) -> Result<(), RecvError> {
    match changes {
        Some(changes) => changes.changed().await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        judgement::tests::{Setting, well},
        readiness::Part,
    };

    #[test]
    fn ready_is_logged_only_if_readyz_says_so() {
        let ready = well().situation();
        assert_eq!(news(None, &ready), Some(LogLine::Ready));
        assert_eq!(news(Some(false), &ready), Some(LogLine::Ready));
        assert_eq!(news(Some(true), &ready), None);
        // The start: each part that becomes ready is logged separately.
        let starts = Setting::of(|s| s.pending = vec![Part::Capture]).situation();
        assert_eq!(news(None, &starts), None);
        // All parts are ready, and no connection arrives.
        let elsewhere = Setting::of(|s| s.vip_is_here = false).situation();
        for was_ready in [None, Some(true)] {
            let Some(LogLine::NotReady { waiting_for, reason }) = news(was_ready, &elsewhere)
            else {
                panic!("{was_ready:?}");
            };
            assert_eq!(waiting_for, "capture");
            assert!(reason.contains("do not arrive here"), "{reason}");
        }
        assert_eq!(news(Some(false), &elsewhere), None);
        let lost = Setting::of(|s| s.in_place = false).situation();
        assert!(matches!(news(Some(true), &lost), Some(LogLine::NotReady { .. })));
    }
}
