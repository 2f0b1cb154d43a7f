//! The docker provider: a container's environment and labels say what it asks for.

use std::{collections::HashMap, time::Duration};

use bollard::{
    Docker,
    errors::Error,
    models::{EventMessage, EventMessageTypeEnum},
    query_parameters::{EventsOptions, ListContainersOptions},
};
use futures_util::{StreamExt, stream, stream::FuturesUnordered};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::time::{MissedTickBehavior, interval, timeout};

use self::containers::{Containers, Running, Ticket};
use super::Listing;
use crate::{
    docker::Engine,
    model::ContainerId,
    source::{Publisher, Source, SourceError},
};

mod containers;
mod inspect;

/// Follows the containers of an engine. It asks, and never changes anything: GET calls only.
#[derive(Debug)]
pub struct DockerProvider {
    engine: Engine,
    /// `-prefix`: what the names of the variables start with.
    prefix: String,
}

/// How often a quiet engine is asked whether it still lives.
const PING: Duration = Duration::from_secs(5);
/// Inspections under way at once, while many containers are listed.
const INSPECTIONS: usize = 8;

impl DockerProvider {
    pub fn new(engine: Engine, prefix: String) -> Self {
        Self { engine, prefix }
    }

    fn error(&self, what: &str, error: &Error) -> SourceError {
        SourceError::caused(format_args!("{what} of {}", self.engine), error)
    }

    async fn inspect(
        &self,
        docker: &Docker,
        ticket: Ticket,
    ) -> Result<(Ticket, Option<Running>), SourceError> {
        match docker.inspect_container(ticket.id.as_str(), None).await {
            Ok(answer) => Ok((ticket, inspect::running(&answer, &self.prefix))),
            Err(Error::DockerResponseServerError { status_code: 404, .. }) => Ok((ticket, None)),
            Err(error) => Err(self.error(&format!("inspecting container {}", ticket.id), &error)),
        }
    }

    /// The engine's own clock, in the form in which it takes the start of an event stream: seconds of Unix time.
    async fn engine_time(&self, docker: &Docker) -> Result<Option<String>, SourceError> {
        let info = docker.info().await.map_err(|e| self.error("asking the time", &e))?;
        let time = info.system_time.as_deref().map(|text| OffsetDateTime::parse(text, &Rfc3339));
        Ok(time
            .and_then(Result::ok)
            .map(|time| format!("{}.{:09}", time.unix_timestamp(), time.nanosecond())))
    }

    async fn list(&self, docker: &Docker) -> Result<Containers, SourceError> {
        let mut containers = Containers::default();
        let networks =
            docker.list_networks(None).await.map_err(|e| self.error("listing the networks", &e))?;
        for network in networks.iter().filter(|network| network.driver.as_deref() == Some("bridge"))
        {
            containers.bridge(network.id.as_deref().unwrap_or_default().into());
        }
        let running = docker.list_containers(None::<ListContainersOptions>).await;
        let running = running.map_err(|e| self.error("listing the containers", &e))?;
        let ids = running.iter().filter_map(|container| container.id.as_deref());
        let tickets: Vec<_> = ids.map(|id| containers.inspect(ContainerId::new(id))).collect();
        let asked = tickets.into_iter().map(|ticket| self.inspect(docker, ticket));
        let mut answers = stream::iter(asked).buffer_unordered(INSPECTIONS);
        while let Some(answer) = answers.next().await {
            let (ticket, found) = answer?;
            containers.inspected(ticket, found);
        }
        Ok(containers)
    }
}

impl Source for DockerProvider {
    type Item = Listing;

    async fn session(&mut self, publish: &Publisher<Listing>) -> Result<(), SourceError> {
        let docker = self.engine.connect().await.map_err(|e| self.error("the version", &e))?;
        // The stream opens when it is first read, which is after the list; it replays what happened since this moment.
        let since = self.engine_time(&docker).await?;
        let filters = HashMap::from([(
            "type".to_owned(),
            vec!["container".to_owned(), "network".to_owned()],
        )]);
        let events =
            docker.events(Some(EventsOptions { since, until: None, filters: Some(filters) }));
        let mut events = std::pin::pin!(events);
        let mut containers = self.list(&docker).await?;
        publish.publish(containers.listing());

        let mut inspections = FuturesUnordered::new();
        let mut ping = interval(PING);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                event = events.next() => {
                    let event = event.ok_or_else(|| SourceError::new(format_args!("the events of {} ended", self.engine)))?;
                    let event = event.map_err(|e| self.error("the events", &e))?;
                    if let Some(ticket) = apply(&mut containers, &event) {
                        inspections.push(self.inspect(&docker, ticket));
                    }
                }
                Some(answer) = inspections.next() => {
                    let (ticket, found) = answer?;
                    containers.inspected(ticket, found);
                }
                _ = ping.tick() => {
                    let alive = timeout(PING, docker.ping()).await;
                    let alive = alive.map_err(|_| SourceError::new(format_args!("{} does not answer a ping", self.engine)))?;
                    alive.map_err(|e| self.error("a ping", &e))?;
                    publish.confirm();
                    continue;
                }
            }
            publish.publish(containers.listing());
        }
    }
}

/// Applies an event. The container to inspect, where the event does not say everything.
fn apply(containers: &mut Containers, event: &EventMessage) -> Option<Ticket> {
    let actor = event.actor.as_ref()?;
    let subject = actor.id.as_deref()?;
    let attribute = |name: &str| actor.attributes.as_ref()?.get(name).map(String::as_str);
    match (event.typ?, event.action.as_deref()?) {
        // An end is always told before the start that follows it, so what is known here at a start is of this very run.
        (EventMessageTypeEnum::CONTAINER, "start" | "rename") => {
            Some(containers.inspect(ContainerId::new(subject)))
        }
        (EventMessageTypeEnum::CONTAINER, "die") => {
            Some(containers.ended(ContainerId::new(subject)))
        }
        (EventMessageTypeEnum::CONTAINER, "destroy") => {
            containers.destroyed(&ContainerId::new(subject));
            None
        }
        (EventMessageTypeEnum::NETWORK, "create") => {
            if attribute("type") == Some("bridge") {
                containers.bridge(subject.into());
            }
            None
        }
        (EventMessageTypeEnum::NETWORK, "connect") => {
            Some(containers.inspect(ContainerId::new(attribute("container")?)))
        }
        (EventMessageTypeEnum::NETWORK, "disconnect") => {
            Some(containers.disconnected(ContainerId::new(attribute("container")?), subject))
        }
        _ => None,
    }
}
