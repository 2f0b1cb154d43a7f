//! A consumer and its bindings.

use std::{net::IpAddr, sync::Arc};

use crate::{
    descriptor::Descriptor,
    model::{ConsumerId, RunEnd},
};

/// A consumer: its addresses and its bindings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Consumer {
    pub id: ConsumerId,
    /// The container's name, for messages.
    pub name: Arc<str>,
    /// The network namespace it lives in: the container that made it, or `local`. Consumers that share one share its
    /// addresses.
    pub namespace: Arc<str>,
    /// All its source addresses. Sorted, without repeats.
    pub sources: Vec<IpAddr>,
    /// The gateways of its bridge networks: VIPs, unless the user set some.
    pub gateways: Vec<IpAddr>,
    pub bindings: Vec<Binding>,
    /// The end of its run, and of the run that its network namespace belongs to.
    pub ends: Vec<RunEnd>,
}

impl Consumer {
    /// Whether it, or its network, is known to be gone, even if the listing still has it.
    pub fn has_ended(&self) -> bool {
        self.ends.iter().any(RunEnd::has_ended)
    }

    /// Whether the other is equal, and ends by the same ends.
    pub fn is_same_as(&self, other: &Self) -> bool {
        // Equal consumers have as many ends.
        self == other && self.ends.iter().zip(&other.ends).all(|(one, other)| one.is(other))
    }
}

/// A binding: a consumer asks for a service on a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// The variable or label that declared it, for messages.
    pub origin: Arc<str>,
    pub descriptor: Descriptor,
}
