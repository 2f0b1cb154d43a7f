//! One who asks for services, and what it asks for.

use std::{net::IpAddr, sync::Arc};

use crate::{
    descriptor::Descriptor,
    model::{ConsumerId, RunEnd},
};

/// One who asks for services: its addresses, and what it asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Consumer {
    pub id: ConsumerId,
    /// For people: the container's name.
    pub name: Arc<str>,
    /// The network namespace it lives in: the container that made it, or `local`. Consumers that share one share its
    /// addresses.
    pub namespace: Arc<str>,
    /// Every address its connections may come from. Sorted, without repeats.
    pub sources: Vec<IpAddr>,
    /// The gateways of the bridge networks it is on: VIPs, unless the user named theirs.
    pub gateways: Vec<IpAddr>,
    pub bindings: Vec<Binding>,
    /// The end of its run, and of the run that its network namespace belongs to.
    pub ends: Vec<RunEnd>,
}

impl Consumer {
    /// Whether it, or its network, is known to be gone, whatever the listing that it stands in says.
    pub fn has_ended(&self) -> bool {
        self.ends.iter().any(RunEnd::has_ended)
    }

    /// Whether the other is equal, and ends by the same ends.
    pub fn is_same_as(&self, other: &Self) -> bool {
        // Equal consumers have as many ends.
        self == other && self.ends.iter().zip(&other.ends).all(|(one, other)| one.is(other))
    }
}

/// One consumer asks for one service on one port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// The variable or label that declared it, for people.
    pub origin: Arc<str>,
    pub descriptor: Descriptor,
}
