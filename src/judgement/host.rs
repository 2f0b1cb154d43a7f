//! What this host gives to the process, and whether that will do.

use super::{cause::Cause, states::Verdict};
use crate::memory::{NEAR, Use};

/// Fewer connections than this at a time are a surprise.
pub const CONNECTIONS_FEW: usize = 1000;

/// What is in use of what there may be.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostUse {
    /// Entries of connection tracking.
    pub conntrack: Option<Use>,
    pub descriptors: Option<Use>,
    pub memory: Option<Use>,
}

/// How full connection tracking is.
pub fn conntrack(Use { used, limit }: Use) -> Verdict {
    match used as f64 / limit as f64 {
        full if full >= 0.95 => Verdict::Broken,
        full if full >= 0.75 => Verdict::Degraded,
        // Of no limit at all as well.
        _ => Verdict::Ok,
    }
}

/// How full the memory of the control group is.
pub fn memory(memory: Use) -> Verdict {
    match memory.reaches(NEAR) {
        true => Verdict::Broken,
        false => Verdict::Ok,
    }
}

impl HostUse {
    pub(super) fn causes(&self) -> impl Iterator<Item = Cause> {
        let conntrack = self.conntrack.filter(|conntrack| conntrack.limit > 0);
        let conntrack =
            conntrack.and_then(|use_of @ Use { used, limit }| match self::conntrack(use_of) {
                Verdict::Ok => None,
                Verdict::Degraded => Some(Cause::ConntrackFills { used, limit }),
                Verdict::Broken => Some(Cause::ConntrackFull { used, limit }),
            });
        let descriptors = self.descriptors.filter(|descriptors| descriptors.reaches(NEAR));
        let descriptors = descriptors.map(|Use { used, limit }| Cause::Descriptors { used, limit });
        let memory = self.memory.filter(|use_of| memory(*use_of) > Verdict::Ok);
        let memory = memory.map(|Use { used, limit }| Cause::Memory {
            used_mib: used >> 20,
            limit_mib: limit >> 20,
        });
        conntrack.into_iter().chain(descriptors).chain(memory)
    }
}
