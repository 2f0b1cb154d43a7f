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
//! behind a Unix socket) are reached at their address on the first of their networks by name, and need to publish
//! nothing; those on the host's network at 127.0.0.1. The containers of any other engine are reached at the host of
//! its URI, on the ports they publish. `--network=container:<other>` is followed.
//!
//! A paused container is no endpoint; with `-filter` neither is one whose HEALTHCHECK does not pass (yet).

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    net::IpAddr,
    pin::pin,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bollard::{
    errors::Error,
    models::{EventMessage, EventMessageTypeEnum},
    query_parameters::{EventsOptions, EventsOptionsBuilder, ListContainersOptions},
};
use futures_util::{FutureExt, StreamExt, TryStreamExt, stream};
use tokio::time::timeout;
use tracing::warn;

use self::offers::{Container, Containers, Offer, Place, offers, select};
use crate::{
    discovery::{Endpoints, Query},
    docker::{Address, Engine},
    source::{Publisher, Shared, Source, SourceError},
};

mod offers;

#[cfg(test)]
mod tests;

/// The services of one engine's containers. However many queries there are, the engine is asked once.
#[derive(Debug, Clone)]
pub struct Docker {
    pub(super) engine: Engine,
    healthy_only: bool,
    /// The engine is the one whose containers are the consumers.
    own: bool,
    offers: Shared<Vec<Offer>>,
}

impl Docker {
    /// `own`: the engine is the one whose containers are the consumers, so that their addresses can be reached.
    pub fn new(engine: Engine, healthy_only: bool, own: bool) -> Self {
        Self { engine, healthy_only, own, offers: Shared::default() }
    }

    /// Follows what `query` asks for, for ever.
    pub async fn watch(self, query: Query, publish: Publisher<Endpoints>, resync: Duration) {
        let name = format!("docker discovery {}", self.engine);
        let services = || Services { engine: self.engine.clone(), own: self.own };
        let answer = |offers: &Vec<Offer>| select(offers, &query, self.healthy_only);
        self.offers.derive(&name, services, resync, &publish, answer).await;
    }
}

/// The source of what all containers offer.
struct Services {
    engine: Engine,
    own: bool,
}

impl Source for Services {
    type Item = Vec<Offer>;

    async fn session(&mut self, publish: &Publisher<Vec<Offer>>) -> Result<(), SourceError> {
        let place = self.place().await?;
        let client = self.ask("reach the engine", self.engine.connect()).await?;
        let start = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let mut events = pin!(client.events(Some(wanted_events())));
        let subject = |event: Option<Result<EventMessage, Error>>| match event {
            Some(Ok(event)) => Ok(subject(event)),
            Some(Err(error)) => Err(self.failed("follow events", &error)),
            None => Err(self.error("follow events", "the engine ended the stream")),
        };

        // The listing takes its time: what changes meanwhile is inspected again behind it.
        let mut changed = BTreeSet::new();
        let mut list = pin!(self.list(&client));
        let mut containers = loop {
            tokio::select! {
                biased; // the subscription goes out first
                event = events.next() => changed.extend(subject(event)?),
                listed = &mut list => break listed?,
            }
        };
        loop {
            for (id, container) in self.inspect(&client, std::mem::take(&mut changed)).await? {
                match container {
                    Some(container) => containers.insert(id, container),
                    None => containers.remove(&id),
                };
            }
            publish.publish(offers(&containers, place));
            let event = loop {
                match timeout(Self::QUIET, events.next()).await {
                    Ok(event) => break event,
                    // Nothing happened, or the engine hangs.
                    Err(_) => self.ask("ping", client.ping()).await.map(|_| publish.confirm())?,
                }
            };
            // What else has arrived costs one inspection per container, not per event.
            let mut next = Some(event);
            while let Some(event) = next {
                let ended =
                    event.as_ref().is_some_and(|e| e.as_ref().is_ok_and(|e| is_end(e, start)));
                let id = subject(event)?;
                if ended && let Some(id) = &id {
                    containers.remove(id);
                }
                changed.extend(id);
                next = events.next().now_or_never();
            }
            // Whoever ended is no endpoint from now on, however long it takes to look at the others.
            publish.publish(offers(&containers, place));
        }
    }
}

impl Services {
    /// One request of the engine. Event streams aside, none may take longer.
    const REQUEST: Duration = Duration::from_secs(10);
    /// An engine that says nothing for this long is asked whether it is there.
    const QUIET: Duration = Duration::from_secs(10);
    /// Inspections at a time: enough to be quick on a full host, few enough not to trouble its engine.
    const AT_A_TIME: usize = 8;

    async fn list(&self, client: &bollard::Docker) -> Result<Containers, SourceError> {
        let running = client.list_containers(None::<ListContainersOptions>);
        let running = self.ask("list containers", running).await?;
        let ids = running.into_iter().filter_map(|container| container.id);
        let inspected = self.inspect(client, ids).await?;
        Ok(inspected.into_iter().filter_map(|(id, found)| Some((id, found?))).collect())
    }

    /// `None` beside an ID: gone, or no endpoint can be in it. An ID is missing where the engine cannot say.
    async fn inspect(
        &self,
        client: &bollard::Docker,
        ids: impl IntoIterator<Item = String>,
    ) -> Result<Vec<(String, Option<Container>)>, SourceError> {
        let found: Vec<_> = stream::iter(ids)
            .map(|id| async move {
                let answer = client.inspect_container(&id, None).map(|answer| match answer {
                    Err(Error::DockerResponseServerError { status_code: 404, .. }) => {
                        Ok(Some(None))
                    }
                    // An engine can be stuck with one container, and serve all others.
                    Err(
                        error @ (Error::DockerResponseServerError { .. }
                        | Error::JsonDataError { .. }
                        | Error::RequestTimeoutError),
                    ) => {
                        warn!(id, %error, "the engine cannot say how this container is");
                        Ok(None)
                    }
                    answer => answer.map(|answer| Some(Container::new(answer))),
                });
                let container = self.ask(&format!("inspect container {id}"), answer).await?;
                Ok(container.map(|container| (id, container)))
            })
            .buffer_unordered(Self::AT_A_TIME)
            .try_collect()
            .await?;
        Ok(found.into_iter().flatten().collect())
    }

    /// How the containers are reached from here.
    async fn place(&self) -> Result<Place, SourceError> {
        let host = match &self.engine.address {
            Address::Tcp(host) if !self.own => host,
            Address::Tcp(_) | Address::Unix(_) => return Ok(Place::Here),
        };
        let name = host.rsplit_once(':').map_or(host.as_str(), |(name, _port)| name);
        if let Ok(address) = name.trim_matches(['[', ']']).parse::<IpAddr>() {
            return Ok(Place::There(address));
        }
        let found: Vec<_> =
            self.ask("look up the host", tokio::net::lookup_host((name, 0))).await?.collect();
        // IPv4 where there is a choice: what is published at all is published there.
        let address = found.iter().find(|found| found.is_ipv4()).or(found.first());
        let address = address.ok_or_else(|| self.error("look up the host", "it has no address"))?;
        Ok(Place::There(address.ip()))
    }

    async fn ask<T, E: std::error::Error + 'static>(
        &self,
        what: &str,
        request: impl Future<Output = Result<T, E>>,
    ) -> Result<T, SourceError> {
        match timeout(Self::REQUEST, request).await {
            Ok(answer) => answer.map_err(|error| self.failed(what, &error)),
            Err(_) => {
                let seconds = Self::REQUEST.as_secs();
                Err(self.error(what, format_args!("no answer within {seconds} s")))
            }
        }
    }

    fn failed(&self, what: &str, error: &dyn std::error::Error) -> SourceError {
        SourceError::caused(format_args!("{what} at {}", self.engine), error)
    }

    fn error(&self, what: &str, reason: impl fmt::Display) -> SourceError {
        SourceError::new(format_args!("{what} at {}: {reason}", self.engine))
    }
}

/// Events that may change what a container offers. An engine replays those that it remembers, the last few hundred at
/// most: nothing can fall between the subscription and the listing, however late the engine takes up the former.
fn wanted_events() -> EventsOptions {
    let types = vec!["container", "network"];
    let actions = vec![
        "start",
        "die",
        "destroy",
        "pause",
        "unpause",
        "rename",
        "health_status",
        "connect",
        "disconnect",
    ];
    let filters = HashMap::from([("type", types), ("event", actions)]);
    EventsOptionsBuilder::new().since("1").filters(&filters).build()
}

/// Whether the event tells of a container's end since `start`, in seconds of Unix time. An earlier one is a replay, and
/// may be of a run before the present one: looking at the container will tell.
fn is_end(event: &EventMessage, start: u64) -> bool {
    event.typ == Some(EventMessageTypeEnum::CONTAINER)
        && event.time.and_then(|time| u64::try_from(time).ok()).is_some_and(|time| time >= start)
        && matches!(event.action.as_deref(), Some("die" | "destroy"))
}

/// The ID of the container that an event is about.
fn subject(event: EventMessage) -> Option<String> {
    let actor = event.actor?;
    match event.typ? {
        EventMessageTypeEnum::CONTAINER => actor.id,
        EventMessageTypeEnum::NETWORK => actor.attributes?.remove("container"),
        _ => None,
    }
}

/// Reads each line of `input` as an event, and as the inspection of a container.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(input: &[u8]) {
    let mut containers = Containers::default();
    for (n, line) in input.split(|byte| *byte == b'\n').enumerate() {
        if let Ok(event) = serde_json::from_slice::<EventMessage>(line) {
            is_end(&event, 1);
            subject(event);
        }
        if let Some(container) = serde_json::from_slice(line).ok().and_then(Container::new) {
            containers.insert(n.to_string(), container);
        }
    }
    let addresses = ["10.0.0.1", "fd00::1"].map(|text| text.parse().map(Place::There));
    for place in addresses.into_iter().flatten().chain([Place::Here]) {
        offers(&containers, place);
    }
}
