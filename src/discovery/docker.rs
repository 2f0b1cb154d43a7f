//! `docker://`: uses the containers of an engine as the registry.
//!
//! Variables and labels of running containers are read as
//! [registrator](https://gliderlabs.github.io/registrator/latest/user/services/) reads them (a label wins):
//!
//! | name | meaning |
//! |---|---|
//! | `SERVICE_NAME` | the service on its one exposed port; with several ports, `<name>-<port>` on each |
//! | `SERVICE_<port>_NAME` | the service on that port of the container, exposed or not |
//! | `SERVICE_TAGS`, `SERVICE_<port>_TAGS` | tags, comma separated; `\,` is a comma |
//! | `SERVICE_IGNORE`, `SERVICE_<port>_IGNORE` | with any value: not a service |
//!
//! Unlike with registrator, a container without such a name is not a service: its image's name is not used.
//!
//! The address of the endpoint depends on the engine. The containers of an engine on this host (the consumers' own engine,
//! or one behind a Unix socket) need not publish ports. They are reached at their address on one of their networks: of
//! those that can be reached from here, the first by name. These are the bridge networks or, if embassy itself runs in a
//! container, the networks of that container. Containers on the host's network are reached at 127.0.0.1, and from inside a
//! container at its gateway. The containers of any other engine are reached at the host of its URI, on the ports they
//! publish. `--network=container:<other>` is followed.
//!
//! A container that is paused, or was sent its stop signal, is used only if there is no other. With `-filter`, one whose
//! HEALTHCHECK does not pass, or not yet, is not used.

use self::offers::Offers;
use crate::{
    discovery::{Endpoints, Query},
    docker::{Address, Engine, container::Inventory, follow::Follower},
    source::{Publisher, ResyncRequests, Shared},
};

mod metadata;
pub(crate) mod offers;
mod reach;

#[cfg(test)]
mod tests;

pub use metadata::PREFIX;

/// The services of one engine's containers. The engine is asked once, however many queries there are.
#[derive(Debug, Clone)]
pub struct Docker {
    follower: Follower,
    healthy_only: bool,
    /// Whether the containers of this engine are the consumers.
    own: bool,
    offers: Shared<Offers>,
}

impl Docker {
    /// `own`: the containers of this engine are the consumers, so their addresses can be reached.
    pub fn new(engine: Engine, healthy_only: bool, own: bool) -> Self {
        let (name, prefixes) = (format!("docker discovery {engine}"), vec![PREFIX.to_owned()]);
        let follower = Follower::new(&name, engine, prefixes, Default::default());
        Self { follower, healthy_only, own, offers: Shared::default() }
    }

    pub(super) fn engine(&self) -> &Engine {
        self.follower.engine()
    }

    /// Uses `follower` if it follows the same engine. It must read the names that begin with [`PREFIX`].
    pub(super) fn share(&mut self, follower: &Follower) {
        if self.engine() == follower.engine() {
            self.follower = follower.clone();
        }
    }

    /// Whether its containers are on this host, reachable at their own addresses.
    pub fn is_here(&self) -> bool {
        self.own || matches!(self.engine().address, Address::Unix(_))
    }

    /// Follows `query`. Never returns.
    pub async fn watch(self, query: Query, publish: Publisher<Endpoints>, resync: &ResyncRequests) {
        let (follower, is_here) = (self.follower.clone(), self.is_here());
        let (resync, bell) = (resync.clone(), publish.bell());
        let start = |publish| async move {
            let mut made = offers::Made::default();
            let offers = |inventory: &Inventory| Offers::of(inventory, is_here, &mut made);
            follower.derive(&resync, bell, &publish, offers).await;
        };
        let answer = |offers: &Offers| offers.select(&query, self.healthy_only);
        self.offers.derive(start, &publish, answer).await;
    }
}
