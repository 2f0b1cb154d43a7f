//! `docker://`: the containers of an engine are the registry.
//!
//! Read as [registrator](https://gliderlabs.github.io/registrator/latest/user/services/) reads them, from the
//! environment and the labels of a running container (a label wins):
//!
//! | name | meaning |
//! |---|---|
//! | `SERVICE_NAME` | the service on its one exposed port; with several ports, `<name>-<port>` on each |
//! | `SERVICE_<port>_NAME` | the service on that port of the container, exposed or not |
//! | `SERVICE_TAGS`, `SERVICE_<port>_TAGS` | tags, comma separated; `\,` is a comma |
//! | `SERVICE_IGNORE`, `SERVICE_<port>_IGNORE` | with any value: not a service |
//!
//! Unlike with registrator, a container without a name of these is not a service: its image's name makes it none.
//!
//! Where the endpoint is, depends on the engine. The containers of an engine on this host (the consumers' own, or one
//! behind a Unix socket) need to publish nothing. They are reached at their address on the first by name of those of
//! their networks that lead there: the bridge networks, or, if embassy runs in a container itself, the networks of that
//! container. Those on the host's network are reached at 127.0.0.1, and from inside a container at its gateway. The
//! containers of any other engine are reached at the host of its URI, on the ports they publish.
//! `--network=container:<other>` is followed.
//!
//! A container that is paused, or that was sent its stop signal, is an endpoint only if there is no other; with `-filter`
//! one whose HEALTHCHECK does not pass (yet) is none.

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

/// The services of one engine's containers. However many queries there are, the engine is asked once.
#[derive(Debug, Clone)]
pub struct Docker {
    follower: Follower,
    healthy_only: bool,
    /// The engine is the one whose containers are the consumers.
    own: bool,
    offers: Shared<Offers>,
}

impl Docker {
    /// `own`: the engine is the one whose containers are the consumers, so that their addresses can be reached.
    pub fn new(engine: Engine, healthy_only: bool, own: bool) -> Self {
        let (name, prefixes) = (format!("docker discovery {engine}"), vec![PREFIX.to_owned()]);
        let follower = Follower::new(&name, engine, prefixes, Default::default());
        Self { follower, healthy_only, own, offers: Shared::default() }
    }

    pub(super) fn engine(&self) -> &Engine {
        self.follower.engine()
    }

    /// Has the engine followed by `follower`, if that follows the same one. It has to read what begins with [`PREFIX`].
    pub(super) fn share(&mut self, follower: &Follower) {
        if self.engine() == follower.engine() {
            self.follower = follower.clone();
        }
    }

    /// Whether its containers are on this host, at their own addresses.
    pub fn is_here(&self) -> bool {
        self.own || matches!(self.engine().address, Address::Unix(_))
    }

    /// Follows `query`; never returns.
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
