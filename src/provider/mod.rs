//! Consumers and their bindings, from Docker or from the command line.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use tokio::sync::Notify;

pub use crate::docker::lookup::Lookup;
use crate::{
    consumer::Consumer,
    docker::follow::Follower,
    model::{ContainerId, Port},
    source::{Answers, Publisher, ResyncRequests},
    wiring::Wiring,
    word::worded,
};

pub mod bindings;
pub mod docker;
pub mod fixed;

/// All consumers, and the problems in their declarations.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listing {
    pub consumers: Vec<Arc<Consumer>>,
    /// All known addresses of containers, including containers without bindings.
    pub known: Arc<BTreeSet<IpAddr>>,
    /// Addresses that more than one container claims: all but one of them have lost it, and it is not known yet which one
    /// has it.
    pub contested: BTreeSet<IpAddr>,
    /// The networks in which an unknown container may have its address.
    pub networks: BTreeSet<IpNet>,
    /// The addresses of this host in those networks.
    pub gateways: BTreeSet<IpAddr>,
    /// How those networks and the known addresses are connected to this host.
    pub wiring: Arc<Wiring>,
    /// The interfaces with these networks' gateways.
    pub bridges: BTreeSet<Arc<str>>,
    /// The number of doubts about the owner of an address that are resolved ([`Lookup::is_in_doubt`]).
    pub confirmed: u64,
    pub problems: Vec<Problem>,
    /// Containers that declare bindings, none of which is valid.
    pub invalid: Vec<Invalid>,
    /// Bindings that are not used because of a limit.
    pub beyond: Vec<Beyond>,
}

/// Bindings of a consumer that are not used because of a limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Beyond {
    pub limit: Limit,
    /// The limit's value.
    pub most: usize,
    /// The consumer with only these bindings.
    pub consumer: Arc<Consumer>,
}

worded! {
    /// The limits for consumers' bindings.
    pub enum Limit {
        /// `--max-bindings-per-consumer`
        Bindings = "bindings_per_consumer",
        /// `--max-services`
        Services = "services",
    }
}

impl Limit {
    pub fn flag(self) -> &'static str {
        match self {
            Self::Bindings => "--max-bindings-per-consumer",
            Self::Services => "--max-services",
        }
    }
}

/// A container that would be a consumer if its declarations were valid. Users may ask about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invalid {
    /// The same name as in its problems.
    pub name: Arc<str>,
    pub id: ContainerId,
    pub addresses: Vec<IpAddr>,
}

impl Invalid {
    /// Whether `wanted` is the start of its ID or one of its addresses.
    pub fn is_called(&self, wanted: &str) -> bool {
        // A shorter text is more likely a name.
        (wanted.len() >= 4 && self.id.as_str().starts_with(wanted))
            || wanted.parse().is_ok_and(|address| self.addresses.contains(&address))
    }
}

/// The origin of the problem that a container has no address by which it can be identified.
pub const NETWORK: &str = "network";

/// A declaration of a consumer that is invalid. Its other bindings work.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Problem {
    /// The container's name.
    pub consumer: Arc<str>,
    /// The variable or label, if the problem is in one.
    pub origin: Arc<str>,
    /// The port that it declares, if known.
    pub port: Option<Port>,
    pub reason: String,
    /// Nothing is wrong with it, but another binding of the consumer has its port.
    pub overruled: bool,
}

/// The configured provider.
#[derive(Debug)]
pub enum Provider {
    /// The containers of an engine, and the prefix of the names of their variables. The follower must read these variables,
    /// and the labels that begin with [`bindings::LABEL`].
    Docker {
        follower: Follower,
        prefix: String,
    },
    Static(Listing),
}

impl Provider {
    /// Starts to follow it. `bell` rings at every change.
    pub fn start(self, resync: &ResyncRequests, bell: Arc<Notify>) -> Answers<Listing> {
        let (publish, answers) = Publisher::new(bell);
        match self {
            Self::Docker { follower, prefix } => {
                let (resync, mut listings) = (resync.clone(), docker::Listings::new(prefix));
                tokio::spawn(async move {
                    let listing = |inventory: &_| listings.of(inventory);
                    follower.derive(&resync, publish.bell(), &publish, listing).await;
                });
            }
            Self::Static(listing) => {
                publish.publish(listing);
            }
        }
        answers
    }
}
