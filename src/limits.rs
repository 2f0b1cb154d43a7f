//! The limits that the kernel sets on this process.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::{info, warn};

/// Descriptors for everything but connections, at least: sources, listeners, the log, pipes to splice through.
const RESERVE: u64 = 512;
/// And at least one in so many: each container has one (its process is watched), and each service that is asked for.
const RESERVED_SHARE: u64 = 16;
/// Descriptors of a connection: one to each side.
const PER_CONNECTION: u64 = 2;

/// Raises the limit of descriptors as far as it goes. How many connections may be open: what was asked for, as far as the
/// descriptors reach.
pub fn raise_descriptors(asked: Option<usize>) -> usize {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })
    {
        warn!(%error, "cannot raise the limit of descriptors");
    }
    let descriptors = getrlimit(Resource::Nofile).current;
    let room = descriptors.map_or(usize::MAX, connections);
    let connections = asked.unwrap_or(room).min(room);
    info!(descriptors, connections, "connections that may be open at a time");
    if asked.is_some_and(|asked| asked > room) {
        warn!(asked, room, "--max-connections is more than the descriptors allow");
    }
    connections
}

/// How many connections this many descriptors allow for at a time.
pub(crate) fn connections(descriptors: u64) -> usize {
    let reserve = RESERVE.max(descriptors / RESERVED_SHARE);
    usize::try_from(descriptors.saturating_sub(reserve) / PER_CONNECTION)
        .unwrap_or(usize::MAX)
        .max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_connection_needs_two_and_some_are_kept_back() {
        assert_eq!(connections(1_024), 256);
        assert_eq!(connections(20_000), 9_375);
        assert_eq!(connections(1 << 20), 491_520);
        assert_eq!(connections(0), 1);
    }
}
