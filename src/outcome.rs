//! How a connection ended: the log field, the metric label and the API value are all this.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use crate::word::{Word, worded};

worded! {
    /// How a connection ended. Each accepted connection has exactly one outcome.
    pub enum Outcome {
        /// Both sides closed, and all bytes were passed on.
        Closed = "closed",
        /// One side closed, and then one side reset: as TLS servers and clients do when they have said all they want to.
        ResetAfterClose = "reset_after_close",
        /// The consumer reset, or did not answer.
        ConsumerReset = "consumer_reset",
        /// The endpoint reset, or did not answer.
        EndpointReset = "endpoint_reset",
        /// One of the two reset: on the kernel path it is not known which.
        Reset = "reset",
        /// The consumer stopped, or lost this route.
        RouteGone = "route_gone",
        /// The endpoint was deregistered, and the binding has `drain=kill` or a drain time; or its active check failed, and the
        /// binding has `drain=kill`.
        EndpointGone = "endpoint_gone",
        /// This host could not continue the open connection (out of descriptors or memory).
        LocalReset = "local_reset",
        /// embassy stopped first.
        Shutdown = "shutdown",
        /// Refused: it was made to embassy's own port, not captured.
        DirectDial = "direct_dial",
        /// Refused: the kernel does not know the original destination.
        NoOriginalDestination = "no_original_destination",
        /// Refused: the original destination is not a VIP.
        NotAVip = "not_a_vip",
        /// Refused: no consumer has this source address.
        UnknownConsumer = "unknown_consumer",
        /// Refused: too many connections from this address wait until its container is known.
        TooManyHeld = "too_many_held",
        /// Refused: the consumer did not declare this port.
        NoRoute = "no_route",
        /// Refused: the service has no endpoint now.
        NoEndpoint = "no_endpoint",
        /// Refused: the only endpoint is the dialled address itself, and the user's own rules would lead back to embassy.
        Circular = "circular",
        /// Refused: `--max-connections` are open.
        TooManyConnections = "too_many_connections",
        /// Refused: the consumer has as many open as `--max-connections-per-consumer` allows.
        TooManyOfConsumer = "too_many_of_consumer",
        /// Refused: the control group's memory is nearly used up.
        MemoryShort = "memory_short",
        /// Refused: no endpoint could be reached.
        EndpointsUnreachable = "endpoints_unreachable",
        /// Refused: this host could not open a connection (out of descriptors, ports or memory).
        LocalError = "local_error",
    }
}

impl Outcome {
    /// Whether it was refused before it reached an endpoint.
    pub fn is_refusal(self) -> bool {
        !matches!(
            self,
            Self::Closed
                | Self::ResetAfterClose
                | Self::ConsumerReset
                | Self::EndpointReset
                | Self::Reset
                | Self::RouteGone
                | Self::EndpointGone
                | Self::LocalReset
                | Self::Shutdown
        )
    }

    /// Whether this is an error for the operator: refused, or broken by the endpoint or by missing resources of this host.
    /// An end by the consumer, or one that was requested, is not an error.
    pub fn is_error(self) -> bool {
        self.is_refusal() || matches!(self, Self::EndpointReset | Self::LocalReset)
    }
}

/// Number of ended connections by outcome.
#[derive(Debug, Default)]
pub struct Tally([AtomicU64; Outcome::ALL.len()]);

impl Tally {
    pub fn count(&self, outcome: Outcome) {
        self.add(outcome, 1);
    }

    /// Counts this many connections.
    pub fn add(&self, outcome: Outcome, times: u64) {
        if let Some(count) = self.0.get(outcome as usize) {
            count.fetch_add(times, Relaxed);
        }
    }

    pub fn get(&self, outcome: Outcome) -> u64 {
        self.0.get(outcome as usize).map_or(0, |count| count.load(Relaxed))
    }

    /// The sum over all outcomes.
    pub fn sum(&self) -> u64 {
        self.0.iter().map(|count| count.load(Relaxed)).sum()
    }

    /// The sum over the outcomes that are errors.
    pub fn errors(&self) -> u64 {
        self.iter().filter(|(outcome, _)| outcome.is_error()).map(|(_, count)| count).sum()
    }

    /// The number for each outcome that occurred, by its word, for the process that takes over.
    pub fn totals(&self) -> BTreeMap<String, u64> {
        self.iter().map(|(outcome, count)| (outcome.as_str().to_owned(), count)).collect()
    }

    /// Adds the counts of the previous process.
    pub fn add_all(&self, before: &BTreeMap<String, u64>) {
        for (word, more) in before {
            if let Some(outcome) = <Outcome as Word>::of(word) {
                self.add(outcome, *more);
            }
        }
    }

    /// Each outcome that occurred, with its number of connections.
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
