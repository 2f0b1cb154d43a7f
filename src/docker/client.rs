//! An engine for one session, by GET calls alone. Each has a bounded time, however much of its answer has come by then.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    net::IpAddr,
    time::Duration,
};

use bollard::{
    Docker,
    errors::Error,
    models::{ContainerInspectResponse, ContainerSummary, EndpointSettings, EventMessage},
    query_parameters::{EventsOptions, ListContainersOptions},
};
use futures_util::Stream;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::time::timeout;
use tracing::warn;

use super::Engine;
use crate::{model::ContainerId, source::SourceError};

#[derive(Debug)]
pub(crate) struct Client<'a> {
    pub(crate) docker: Docker,
    engine: &'a Engine,
}

/// A running container, as a list has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listed {
    pub(crate) id: ContainerId,
    /// All its addresses; `None` where the list does not say.
    pub(crate) addresses: Option<BTreeSet<IpAddr>>,
}

/// What an engine says of one container.
#[derive(Debug)]
pub(crate) enum Inspected {
    Found(Box<ContainerInspectResponse>),
    Gone,
    /// It could not say.
    Unknown,
}

/// How often a quiet engine is asked whether it still lives, and how long that may take.
pub(crate) const PING: Duration = Duration::from_secs(5);

impl<'a> Client<'a> {
    pub(crate) async fn connect(engine: &'a Engine) -> Result<Self, SourceError> {
        let docker = ask(engine, "the version", engine.connect()).await?;
        Ok(Self { docker, engine })
    }

    /// The answer to a request, which has [`Engine::TIMEOUT`]: the client's own limit is one of the answer's head.
    pub(crate) async fn ask<T>(
        &self,
        what: &str,
        request: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, SourceError> {
        ask(self.engine, what, request).await
    }

    /// The engine's own clock, as [`Client::events`] takes it.
    pub(crate) async fn time(&self) -> Result<String, SourceError> {
        let info = self.ask("the time", self.docker.info()).await?;
        let text = info.system_time.unwrap_or_default();
        let wrong = || self.error("the time", format_args!("{text:?}: expected RFC 3339"));
        since(&text).ok_or_else(wrong)
    }

    /// What happens to containers and networks from `since` on. An engine replays a few of the events before the moment in
    /// which it takes up the subscription, and no more.
    pub(crate) fn events(
        &self,
        since: String,
        actions: &[&str],
    ) -> impl Stream<Item = Result<EventMessage, Error>> + use<> {
        let words = |words: &[&str]| words.iter().map(ToString::to_string).collect();
        let filters = HashMap::from([
            ("type".to_owned(), words(&["container", "network"])),
            ("event".to_owned(), words(actions)),
        ]);
        let since = Some(since);
        self.docker.events(Some(EventsOptions { since, until: None, filters: Some(filters) }))
    }

    /// The running containers.
    pub(crate) async fn list(&self) -> Result<Vec<Listed>, SourceError> {
        let running = self.docker.list_containers(None::<ListContainersOptions>);
        Ok(listed(self.ask("the containers", running).await?))
    }

    pub(crate) async fn inspect(&self, id: &str) -> Result<Inspected, SourceError> {
        let answer = timeout(Engine::TIMEOUT, self.docker.inspect_container(id, None)).await;
        // An engine can be stuck with one container, and serve all others.
        let error = match answer.unwrap_or(Err(Error::RequestTimeoutError)) {
            Ok(found) => return Ok(Inspected::Found(Box::new(found))),
            Err(Error::DockerResponseServerError { status_code: 404, .. }) => {
                return Ok(Inspected::Gone);
            }
            Err(
                error @ (Error::DockerResponseServerError { .. }
                | Error::JsonDataError { .. }
                | Error::JsonSerdeError { .. }
                | Error::RequestTimeoutError),
            ) => error,
            Err(error) => return Err(self.failed(&format!("container {id}"), &error)),
        };
        warn!(id, %error, "the engine cannot say how this container is");
        Ok(Inspected::Unknown)
    }

    /// What the stream of events brought. It never ends by itself.
    pub(crate) fn event(
        &self,
        next: Option<Result<EventMessage, Error>>,
    ) -> Result<EventMessage, SourceError> {
        let event = next.ok_or_else(|| self.error("the events", "ended"))?;
        event.map_err(|error| self.failed("the events", &error))
    }

    pub(crate) async fn ping(&self) -> Result<(), SourceError> {
        let answer = timeout(PING, self.docker.ping()).await;
        let answer = answer.map_err(|_| self.error("a ping", "no answer"))?;
        answer.map(drop).map_err(|error| self.failed("a ping", &error))
    }

    pub(crate) fn failed(&self, what: &str, error: &Error) -> SourceError {
        SourceError::caused(format_args!("{what} of {}", self.engine), error)
    }

    pub(crate) fn error(&self, what: &str, reason: impl fmt::Display) -> SourceError {
        SourceError::new(format_args!("{what} of {}: {reason}", self.engine))
    }
}

async fn ask<T>(
    engine: &Engine,
    what: &str,
    request: impl Future<Output = Result<T, Error>>,
) -> Result<T, SourceError> {
    let what = format!("{what} of {engine}");
    match timeout(Engine::TIMEOUT, request).await {
        Ok(answer) => answer.map_err(|error| SourceError::caused(what, &error)),
        Err(_) => {
            let seconds = Engine::TIMEOUT.as_secs();
            Err(SourceError::new(format_args!("{what}: no answer within {seconds} s")))
        }
    }
}

/// What a list says of the containers in it.
pub(crate) fn listed(containers: Vec<ContainerSummary>) -> Vec<Listed> {
    let listed = containers.into_iter().filter_map(|container| {
        let networks = container.network_settings.and_then(|settings| settings.networks);
        let addresses = networks.map(|networks| networks.values().flat_map(addresses).collect());
        Some(Listed { id: ContainerId::new(container.id.as_deref()?), addresses })
    });
    listed.collect()
}

/// The addresses of a container's end of a network. An engine leaves one that does not exist empty.
pub(crate) fn addresses(end: &EndpointSettings) -> impl Iterator<Item = IpAddr> {
    let both = [&end.ip_address, &end.global_ipv6_address];
    both.into_iter().filter_map(|text| text.as_deref()?.parse().ok())
}

/// A moment in the form in which the events' `since` takes it.
pub(crate) fn since(rfc3339: &str) -> Option<String> {
    let time = OffsetDateTime::parse(rfc3339, &Rfc3339).ok()?;
    Some(format!("{}.{:09}", time.unix_timestamp(), time.nanosecond()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engines_time_is_said_in_seconds_whatever_its_zone() {
        let utc = since("2026-01-02T03:04:05.000000678Z");
        assert_eq!(utc.as_deref(), Some("1767323045.000000678"));
        assert_eq!(since("2026-01-02T05:04:05.000000678+02:00"), utc);
        assert_eq!(since("yesterday"), None);
    }
}
