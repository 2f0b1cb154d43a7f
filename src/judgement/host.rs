//! The host's resources, and whether they are sufficient.

use super::{cause::Cause, states::Verdict};
use crate::memory::{NEAR, Use};

/// A lower connection limit than this is reported.
pub const CONNECTIONS_FEW: usize = 1000;

/// Use and limit of a resource.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostUse {
    /// Connection tracking entries.
    pub conntrack: Option<Use>,
    pub descriptors: Option<Use>,
    pub memory: Option<Use>,
}

/// Whether connection tracking is nearly full.
pub fn conntrack(Use { used, limit }: Use) -> Verdict {
    match used as f64 / limit as f64 {
        full if full >= 0.95 => Verdict::Broken,
        full if full >= 0.75 => Verdict::Degraded,
        // Also if there is no limit.
        _ => Verdict::Ok,
    }
}

/// Whether the memory of the control group is nearly used up.
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
