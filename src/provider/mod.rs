//! WHO asks for what: consumers and their bindings, from Docker or from the command line.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc, time::Duration};

use ipnet::IpNet;

use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

use crate::source::{Answers, Publisher, ResyncRequests, follow};

pub mod bindings;
pub mod docker;
pub mod fixed;

use crate::model::Consumer;

/// Everybody who asks, and what was wrong with what they wrote.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listing {
    pub consumers: Vec<Arc<Consumer>>,
    /// Every address that is known to be a container's, of those that ask for nothing too.
    pub known: Arc<BTreeSet<IpAddr>>,
    /// Addresses that more than one container claims: all but one of them have gone, and we have not heard which.
    pub contested: BTreeSet<IpAddr>,
    /// The networks in which a container that is not known yet may have its address.
    pub networks: BTreeSet<IpNet>,
    /// The interfaces that those networks' gateways are on.
    pub bridges: BTreeSet<Arc<str>>,
    pub problems: Vec<Problem>,
}

/// Something that a consumer wrote and that cannot be done. Its other bindings work.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Problem {
    /// The container's name.
    pub consumer: Arc<str>,
    /// The variable or label, where one is to blame.
    pub origin: Arc<str>,
    pub reason: String,
}

/// Asks the provider to look for containers that it has not heard of: somebody unknown is dialling. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Lookup(Arc<Notify>);

impl Lookup {
    /// Between two looks, so that a stranger who keeps dialling does not keep the engine busy.
    const PAUSE: Duration = Duration::from_millis(50);

    /// Asks. Many askers before the look are one.
    pub fn ask(&self) {
        self.0.notify_one();
    }

    /// Waits until somebody asks, and not before `next_look`.
    async fn asked(&self, next_look: Instant) {
        sleep_until(next_look).await;
        self.0.notified().await;
    }
}

/// The configured provider.
#[derive(Debug)]
pub enum Provider {
    Docker(Box<docker::DockerProvider>),
    Static(Listing),
}

impl Provider {
    /// Starts following it; `bell` rings at every change.
    pub fn start(self, resync: &ResyncRequests, bell: Arc<Notify>) -> Answers<Listing> {
        let (publish, answers) = Publisher::new(bell);
        match self {
            Self::Docker(docker) => {
                let resync = resync.subscribe();
                tokio::spawn(async move { follow("provider", *docker, publish, resync).await });
            }
            Self::Static(listing) => {
                publish.publish(listing);
            }
        }
        answers
    }
}
