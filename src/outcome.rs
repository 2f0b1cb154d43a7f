//! How a connection ended: the log field, the metric label and the API value are all this.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::word::worded;

worded! {
    /// How a connection ended. Exactly one for each that was accepted.
    pub enum Outcome {
        /// Both sides finished, and every byte was passed on.
        Closed = "closed",
        /// The consumer reset, or fell silent until keepalive gave up on it.
        ConsumerReset = "consumer_reset",
        /// The endpoint did.
        EndpointReset = "endpoint_reset",
        /// The consumer stopped, or the route is not its any more.
        RouteGone = "route_gone",
        /// Its endpoint went away, and the binding says that its connections go with it.
        EndpointGone = "endpoint_gone",
        /// embassy ended before the connection did.
        Shutdown = "shutdown",
        /// Refused: it was dialled to our own port, not captured.
        DirectDial = "direct_dial",
        /// Refused: the kernel does not know where it was meant to go.
        NoOriginalDestination = "no_original_destination",
        /// Refused: it was meant for an address that is no VIP.
        NotAVip = "not_a_vip",
        /// Refused: no consumer has its source address.
        UnknownConsumer = "unknown_consumer",
        /// Refused: the consumer did not declare this port.
        NoRoute = "no_route",
        /// Refused: the service has no endpoint now.
        NoEndpoint = "no_endpoint",
        /// Refused: the service's only endpoint is the very address that was dialled, and the user's own rules would lead us back
        /// to ourselves.
        Circular = "circular",
        /// Refused: as many connections as `--max-connections` allows are open.
        TooManyConnections = "too_many_connections",
        /// Refused: the consumer has as many open as `--max-connections-per-consumer` allows.
        TooManyOfConsumer = "too_many_of_consumer",
        /// Refused: the memory that the control group allows is nearly used up.
        MemoryShort = "memory_short",
        /// Refused: no endpoint could be reached.
        EndpointsUnreachable = "endpoints_unreachable",
        /// Refused: this host could not open a connection (descriptors, ports or memory ran out).
        LocalError = "local_error",
    }
}

impl Outcome {
    /// Whether it was refused before any endpoint saw it.
    pub fn is_refusal(self) -> bool {
        !matches!(
            self,
            Self::Closed
                | Self::ConsumerReset
                | Self::EndpointReset
                | Self::RouteGone
                | Self::EndpointGone
                | Self::Shutdown
        )
    }

    /// Whether something went wrong that somebody should look at: refused, or broken by the endpoint. That the consumer
    /// or embassy itself ended it is no error.
    pub fn is_error(self) -> bool {
        self.is_refusal() || self == Self::EndpointReset
    }
}

/// How many connections ended in each way.
#[derive(Debug, Default)]
pub struct Tally([AtomicU64; Outcome::ALL.len()]);

impl Tally {
    pub fn count(&self, outcome: Outcome) {
        if let Some(count) = self.0.get(outcome as usize) {
            count.fetch_add(1, Relaxed);
        }
    }

    pub fn get(&self, outcome: Outcome) -> u64 {
        self.0.get(outcome as usize).map_or(0, |count| count.load(Relaxed))
    }

    /// All of them.
    pub fn sum(&self) -> u64 {
        self.0.iter().map(|count| count.load(Relaxed)).sum()
    }

    /// Those that ended in a way that is an error.
    pub fn errors(&self) -> u64 {
        self.iter().filter(|(outcome, _)| outcome.is_error()).map(|(_, count)| count).sum()
    }

    /// Each way in which any ended, and how many.
    pub fn iter(&self) -> impl Iterator<Item = (Outcome, u64)> {
        let all = Outcome::ALL.iter().map(|outcome| (*outcome, self.get(*outcome)));
        all.filter(|(_, count)| *count > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_is_counted_apart_under_a_name_of_its_own() {
        let tally = Tally::default();
        for (n, &outcome) in Outcome::ALL.iter().enumerate() {
            (0..=n).for_each(|_| tally.count(outcome));
        }
        let mut names: Vec<_> = Outcome::ALL.iter().map(|o| o.as_str()).collect();
        for (n, &outcome) in Outcome::ALL.iter().enumerate() {
            assert_eq!(tally.get(outcome), n as u64 + 1);
        }
        names.sort();
        names.dedup();
        assert_eq!(names.len(), Outcome::ALL.len());
    }
}
