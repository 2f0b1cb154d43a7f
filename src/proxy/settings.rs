//! The settings of the data path.

use std::{sync::Arc, time::Duration};

use super::{captured::Destinations, failed_checks::FailedChecks};
use crate::{
    config::{ConnectionLog, ConsumerLimit},
    events::Events,
    memory,
    model::Port,
    provider::Lookup,
};

#[derive(Debug, Clone)]
pub struct ProxySettings {
    /// The one TCP port. `None`: the kernel chooses.
    pub port: Option<Port>,
    /// Number of threads.
    pub workers: usize,
    pub destinations: Destinations,
    /// Maximum number of open connections. Further ones are reset.
    pub max_connections: usize,
    /// Whether memory is nearly used up. Then only [`FEW`](crate::limits::FEW) connections may be open, and further ones
    /// are reset.
    pub memory_short: Arc<memory::Short>,
    /// Maximum number of open connections of one consumer.
    pub max_connections_per_consumer: ConsumerLimit,
    /// The mark of our own connections to endpoints, if rules must recognise them (man 7 socket, SO_MARK).
    pub mark: Option<u32>,
    /// How long data sent to an endpoint may stay unacknowledged. 0: as long as the kernel retransmits.
    pub user_timeout: Duration,
    /// Notifies of failed active checks.
    pub failed_checks: FailedChecks,
    /// Whether bulk data is moved by splice.
    pub splice: bool,
    /// Timeout of all attempts to reach an endpoint together.
    pub connect: Duration,
    /// How long a connection of an unknown container may wait. 0: not at all.
    pub hold: Duration,
    /// The follower that looks for such a container.
    pub lookup: Lookup,
    /// Which connections are logged when they end.
    pub log: ConnectionLog,
    /// The receiver of ejections.
    pub events: Events,
}

impl ProxySettings {
    /// See [`Self::connect`].
    pub const CONNECT: Duration = Duration::from_secs(5);
}
