//! The limits that the kernel sets for this process, and how many connections they allow.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::{info, warn};

/// Minimum number of descriptors for everything except connections: listeners, the log, pipes for splice, and the sources,
/// whose clients use a fixed number for any number of services.
const RESERVE: u64 = 512;
/// And at least one descriptor in this many: each container uses one (its process is watched).
const RESERVED_SHARE: u64 = 32;
/// Descriptors per connection: one for each side.
const PER_CONNECTION: u64 = 2;

/// Memory of an idle connection, ours and the kernel's, in bytes. A busy one uses more, so the memory in use is watched as
/// well ([`Memory::watch`](crate::memory::Memory::watch)).
const BYTES_PER_CONNECTION: u64 = 16 << 10;

/// This many connections are accepted even if memory is nearly used up: they cannot be the cause.
pub const FEW: usize = 64;

/// Raises the descriptor limit to its maximum. Returns the maximum number of connections: the requested number, limited by
/// descriptors and by `memory`, the available bytes.
pub fn connections(asked: Option<usize>, memory: Option<u64>) -> usize {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })
    {
        warn!(%error, "cannot raise the descriptor limit");
    }
    let descriptors = getrlimit(Resource::Nofile).current;
    let (room, bound) =
        [(descriptors.map(by_descriptors), "descriptors"), (memory.map(by_memory), "memory")]
            .into_iter()
            .filter_map(|(room, bound)| Some((room?, bound)))
            .min()
            .unwrap_or((usize::MAX, "nothing"));
    if let Some(asked) = asked.filter(|asked| *asked > room) {
        warn!(asked, room, bound, "--max-connections is higher than this host's limits allow");
    }
    let (connections, bound) = match asked {
        Some(asked) if asked <= room => (asked, "--max-connections"),
        _ => (room, bound),
    };
    info!(descriptors, memory, connections, bound, "maximum number of open connections");
    connections
}

/// The number of connections that this many descriptors allow at a time.
pub(crate) fn by_descriptors(descriptors: u64) -> usize {
    let reserve = RESERVE.max(descriptors / RESERVED_SHARE);
    usize::try_from(descriptors.saturating_sub(reserve) / PER_CONNECTION)
        .unwrap_or(usize::MAX)
        .max(1)
}

/// The number of connections that this many available bytes allow.
pub(crate) fn by_memory(bytes: u64) -> usize {
    usize::try_from(bytes / BYTES_PER_CONNECTION).unwrap_or(usize::MAX).max(FEW)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_connection_needs_two_and_some_are_kept_back() {
        assert_eq!(by_descriptors(1_024), 256);
        assert_eq!(by_descriptors(20_000), 9_687);
        assert_eq!(by_descriptors(1 << 20), 507_904);
        assert_eq!(by_descriptors(0), 1);
    }

    #[test]
    fn memory_bounds_them_and_leaves_a_few() {
        assert_eq!(by_memory(32 << 20), 2_048);
        assert_eq!(by_memory(0), FEW);
    }

    #[test]
    fn what_is_scarcest_bounds_them() {
        let descriptors = getrlimit(Resource::Nofile).maximum.map_or(usize::MAX, by_descriptors);
        assert_eq!(connections(None, None), descriptors);
        assert_eq!(connections(None, Some(2 << 20)), 128);
        assert_eq!(connections(Some(7), Some(2 << 20)), 7);
        assert_eq!(connections(Some(usize::MAX), Some(2 << 20)), 128);
    }
}
