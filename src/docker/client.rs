//! A client of an engine for one session. It sends only GET requests; each has a timeout for the complete answer.

use std::{collections::HashMap, fmt, net::IpAddr, time::Duration};

use bollard::{
    Docker,
    errors::Error,
    models::EventMessage,
    query_parameters::{EventsOptions, ListContainersOptions},
};
use futures_util::{Stream, TryFutureExt};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::time::timeout;
use tracing::warn;

use super::{
    Address, Engine,
    container::Bridges,
    inspections::Ticket,
    read::{self, Found, Listed},
};
use crate::source::SourceError;

#[derive(Debug)]
pub(super) struct Client<'a> {
    docker: Docker,
    engine: &'a Engine,
}

/// Interval and timeout of pings to a quiet engine.
pub(super) const PING: Duration = Duration::from_secs(5);

impl<'a> Client<'a> {
    pub(super) async fn connect(engine: &'a Engine) -> Result<Self, SourceError> {
        let docker = ask(engine, "the version", engine.connect()).await?;
        Ok(Self { docker, engine })
    }

    /// The answer to a request, with [`Engine::TIMEOUT`]: the client's own timeout covers only the head of the answer.
    async fn ask<T>(
        &self,
        what: &str,
        request: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, SourceError> {
        ask(self.engine, what, request).await
    }

    /// The engine's own clock, as [`Client::events`] takes it.
    pub(super) async fn time(&self) -> Result<String, SourceError> {
        let info = self.ask("the time", self.docker.info()).await?;
        let text = info.system_time.unwrap_or_default();
        let wrong = || self.error("the time", format_args!("{text:?}: expected RFC 3339"));
        since(&text).ok_or_else(wrong)
    }

    /// The events of containers and networks from `since` on. An engine replays only a few of the events before the
    /// subscription.
    pub(super) fn events(
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
    pub(super) async fn list(&self) -> Result<Vec<Listed>, SourceError> {
        let running = self.docker.list_containers(None::<ListContainersOptions>);
        Ok(read::listed(self.ask("the containers", running).await?))
    }

    /// The data that needs no inspection: the networks, the running containers, and the host.
    pub(super) async fn overview(
        &self,
    ) -> Result<(Bridges, Vec<Listed>, Option<IpAddr>), SourceError> {
        tokio::try_join!(self.bridges(), self.list(), self.host())
    }

    pub(super) async fn bridges(&self) -> Result<Bridges, SourceError> {
        let networks = self.docker.list_networks(None);
        Ok(read::bridges(self.ask("the networks", networks).await?))
    }

    /// The address of the engine's host, if it is not reached via a Unix socket.
    async fn host(&self) -> Result<Option<IpAddr>, SourceError> {
        let Address::Tcp(host) = &self.engine.address else { return Ok(None) };
        let name = host.rsplit_once(':').map_or(host.as_str(), |(name, _port)| name);
        if let Ok(address) = name.trim_matches(['[', ']']).parse() {
            return Ok(Some(address));
        }
        let lookup = tokio::net::lookup_host((name, 0)).map_err(Error::from);
        let found: Vec<_> = self.ask("the host", lookup).await?.collect();
        // IPv4 if there is a choice: every published port is published there.
        let address = found.iter().find(|found| found.is_ipv4()).or(found.first());
        let address = address.ok_or_else(|| self.error("the host", "it has no address"))?;
        Ok(Some(address.ip()))
    }

    /// The current state of a container. Only variables and labels whose names start with one of `prefixes` are kept.
    pub(super) async fn inspect(
        &self,
        ticket: Ticket,
        prefixes: &[String],
    ) -> Result<(Ticket, Found), SourceError> {
        let id = &ticket.id;
        let answer =
            timeout(Engine::TIMEOUT, self.docker.inspect_container(id.as_str(), None)).await;
        // An engine may hang on one container and serve all others.
        let found = match answer.unwrap_or(Err(Error::RequestTimeoutError)) {
            Ok(answer) => read::found(id, answer, prefixes),
            Err(Error::DockerResponseServerError { status_code: 404, .. }) => Found::NotRunning,
            Err(
                error @ (Error::DockerResponseServerError { .. }
                | Error::JsonDataError { .. }
                | Error::JsonSerdeError { .. }
                | Error::RequestTimeoutError),
            ) => {
                let id = id.as_str();
                warn!(id, %error, "docker inspect failed; keeping the container's last known state");
                Found::Unknown
            }
            Err(error) => return Err(self.failed(&format!("container {}", id.as_str()), &error)),
        };
        Ok((ticket, found))
    }

    /// The next events of the stream. It never ends by itself.
    pub(super) fn event(
        &self,
        next: Option<Result<EventMessage, Error>>,
    ) -> Result<EventMessage, SourceError> {
        let event = next.ok_or_else(|| self.error("the events", "ended"))?;
        event.map_err(|error| self.failed("the events", &error))
    }

    pub(super) async fn ping(&self) -> Result<(), SourceError> {
        let answer = timeout(PING, self.docker.ping()).await;
        let answer = answer.map_err(|_| self.error("a ping", "no answer"))?;
        answer.map(drop).map_err(|error| self.failed("a ping", &error))
    }

    fn failed(&self, what: &str, error: &Error) -> SourceError {
        SourceError::caused(format_args!("{what} of {}", self.engine), error)
    }

    fn error(&self, what: &str, reason: impl fmt::Display) -> SourceError {
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

/// A time in the format of the events' `since`.
pub(super) fn since(rfc3339: &str) -> Option<String> {
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
