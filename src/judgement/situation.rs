//! The facts that are judged, at one moment.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use super::source::SourceReading;
use crate::{
    capture::Standing,
    config::{CaptureMode, CaptureScope},
    consumer::Consumer,
    discovery::Query,
    limits::FEW,
    model::{ConsumerId, Millis},
    provider::Listing,
    readiness::Part,
    table::Table,
};

/// All facts, and the time.
#[derive(Debug, Clone)]
pub struct Situation {
    pub table: Arc<Table>,
    /// The consumers and their bindings.
    pub listing: Arc<Listing>,
    pub provider: SourceReading,
    pub queries: HashMap<Query, SourceReading>,
    pub capture: CaptureReading,
    /// The parts that are not ready, and the time since embassy waits for them.
    pub pending: Vec<(Part, Duration)>,
    pub load: Load,
    /// The current time, by the clock of the endpoints' states.
    pub now: Millis,
    /// embassy's own port.
    pub own_port: u16,
    /// Consumers whose networks reach no VIP; computed on first use.
    pub cut_off: OnceLock<HashSet<ConsumerId>>,
}

/// The capture mode, and the state of the rules.
#[derive(Debug, Clone)]
pub struct CaptureReading {
    pub mode: CaptureMode,
    pub scope: CaptureScope,
    pub standing: Standing,
}

/// Open connections, and their limits.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    pub live: usize,
    pub limit: usize,
    pub limit_of_consumer: Option<usize>,
    pub memory_short: bool,
}

impl Load {
    /// Whether new connections are refused because memory is nearly used up.
    pub fn is_short_of_memory(self) -> bool {
        self.memory_short && self.live >= FEW
    }

    pub fn is_full(self) -> bool {
        self.live >= self.limit
    }
}

impl Situation {
    pub(super) fn is_cut_off(&self, consumer: &ConsumerId) -> bool {
        let cut_off = self.cut_off.get_or_init(|| {
            if self.table.vips().is_empty() {
                return HashSet::new();
            }
            let consumers = self.listing.consumers.iter();
            let cut_off = consumers.filter(|consumer| !self.reaches_a_vip(consumer));
            cut_off.map(|consumer| consumer.id.clone()).collect()
        });
        cut_off.contains(consumer)
    }

    /// Whether embassy itself captures.
    pub fn captures(&self) -> bool {
        self.capture.mode != CaptureMode::None
    }

    pub(super) fn is_draining(&self) -> bool {
        self.pending.iter().any(|(part, _)| *part == Part::Draining)
    }

    /// The VIPs that a consumer can connect to: those in its own networks first. If one of its networks has a gateway on this
    /// host, all other VIPs too.
    pub fn dials(&self, consumer: &Consumer) -> Vec<IpAddr> {
        let all = self.table.vips().iter().map(|vip| vip.0).filter(|vip| speaks(consumer, vip));
        let (own, others): (Vec<_>, Vec<_>) = all.partition(|vip| self.is_own(consumer, vip));
        if has_a_gateway(consumer) { [own, others].concat() } else { own }
    }

    fn reaches_a_vip(&self, consumer: &Consumer) -> bool {
        let mut vips =
            self.table.vips().iter().map(|vip| vip.0).filter(|vip| speaks(consumer, vip));
        vips.any(|vip| has_a_gateway(consumer) || self.is_own(consumer, &vip))
    }

    /// Whether a VIP is in one of the consumer's networks.
    fn is_own(&self, consumer: &Consumer, vip: &IpAddr) -> bool {
        let shared = |net: &ipnet::IpNet| {
            net.contains(vip) && consumer.sources.iter().any(|own| net.contains(own))
        };
        consumer.gateways.contains(vip) || self.listing.networks.iter().any(shared)
    }

    /// Whether a connection of `consumer` to a VIP is captured, to a declared port or to another one. `None`: the user's own
    /// rules decide.
    pub fn captured(&self, consumer: &ConsumerId, declared: bool) -> Option<bool> {
        if !self.captures() {
            return None;
        }
        let from_here = *consumer == ConsumerId::Local;
        let reaches_a_hook = !from_here || self.capture.mode == CaptureMode::Redirect;
        let scope = declared || (self.capture.scope == CaptureScope::All && !from_here);
        let stands = self.capture.standing.in_place && !self.table.vips().is_empty();
        Some(stands && scope && reaches_a_hook)
    }
}

fn has_a_gateway(consumer: &Consumer) -> bool {
    consumer.id == ConsumerId::Local || !consumer.gateways.is_empty()
}

/// Whether the consumer has an address of the VIP's family.
fn speaks(consumer: &Consumer, vip: &IpAddr) -> bool {
    consumer.sources.iter().any(|own| own.is_ipv4() == vip.is_ipv4())
}
