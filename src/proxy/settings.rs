//! How the data path behaves.

use std::{sync::Arc, time::Duration};

use super::captured::Destinations;
use crate::{config::ConnectionLog, events::Events, memory, model::Port, provider::Lookup};

#[derive(Debug, Clone)]
pub struct ProxySettings {
    /// The one TCP port. `None`: the kernel chooses.
    pub port: Option<Port>,
    /// Threads.
    pub workers: usize,
    pub destinations: Destinations,
    /// Connections at a time; one more is reset.
    pub max_connections: usize,
    /// Whether memory is nearly used up: then there are only a few ([`FEW`](crate::limits::FEW)), and one more is reset.
    pub memory_short: Arc<memory::Short>,
    /// Connections at a time of one consumer; `None`: as many as there may be.
    pub max_connections_per_consumer: Option<usize>,
    /// The mark of our own connections to endpoints, where rules must tell them apart (man 7 socket, SO_MARK).
    pub mark: Option<u32>,
    /// Whether bulk moves by splice.
    pub splice: bool,
    /// How long a connection of a container that is not known yet may wait; 0: not at all.
    pub hold: Duration,
    /// Whom to ask about such a container.
    pub lookup: Lookup,
    /// Which connections are logged as they end.
    pub log: ConnectionLog,
    /// Where ejections are reported.
    pub events: Events,
}
