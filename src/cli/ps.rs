//! `embassy ps`: the routes, or the endpoints, with live figures.

use std::{cmp::Reverse, collections::BTreeSet};

use anyhow::Result;
use clap::ValueEnum;
use serde::{Serialize, de::DeserializeOwned};

use super::{
    Answer,
    client::{ApiTarget, Client, given},
    table::{Columns, age, bytes, connect, printable},
};
use crate::{
    admin::api::{Endpoint, EndpointHealth, Figures, PathReason, Route, RouteState},
    config::UsageError,
    model::{Protocol, port_of},
    word::Word,
};

/// List routes, or endpoints with --endpoints, with live figures
#[derive(Debug, clap::Args)]
pub(super) struct Ps {
    #[command(flatten)]
    asked: ApiTarget,

    /// List endpoints instead of routes
    #[arg(long, short)]
    endpoints: bool,

    /// Column to sort by: name ascending, figures descending
    #[arg(long, short, value_name = "FIGURE", default_value = "name")]
    sort: Sort,

    /// Only routes of this consumer: name or ID prefix. Exit 1 if there is no such consumer. Cannot be combined with --endpoints: endpoints do not belong to a
    /// consumer
    #[arg(long, value_name = "CONSUMER")]
    consumer: Option<String>,

    /// Only this service, by its full name; if no service has this name, services whose name contains it
    #[arg(long, value_name = "SERVICE")]
    service: Option<String>,

    /// Only this state, for example no_endpoint, or ejected with --endpoints
    #[arg(long, value_name = "STATE")]
    state: Option<String>,

    /// Only entries with this text in a name or an address
    #[arg(value_name = "TEXT")]
    text: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Sort {
    /// Consumer and port, or service and address
    Name,
    /// Open connections
    Active,
    /// Connections since the start of embassy
    Started,
    /// Connections that failed; with --endpoints, failed connect attempts too
    Errors,
    /// Bytes in both directions
    Bytes,
    /// Connect time
    Connect,
}

impl Sort {
    /// Sorts high values first.
    fn key(self, figures: &Figures, failed_tries: u64) -> u64 {
        match self {
            Self::Name => 0,
            Self::Active => figures.active,
            Self::Started => figures.started,
            Self::Errors => figures.errors + failed_tries,
            Self::Bytes => figures.bytes_up.saturating_add(figures.bytes_down),
            // In microseconds.
            Self::Connect => (figures.connect.p99_seconds.unwrap_or_default() * 1e6) as u64,
        }
    }
}

impl Ps {
    /// Refuses filters that cannot match any entry.
    pub(super) fn check(&self) -> Result<(), UsageError> {
        let (is_one, expected) = match self.endpoints {
            true => (
                self.state.as_deref().is_none_or(is_word::<EndpointHealth>),
                EndpointHealth::expected(),
            ),
            false => {
                (self.state.as_deref().is_none_or(is_word::<RouteState>), RouteState::expected())
            }
        };
        match &self.state {
            Some(state) if !is_one => {
                Err(UsageError::new(format!("--state {state:?}: expected one of {expected}")))
            }
            _ if self.endpoints && self.consumer.is_some() => Err(UsageError::new(
                "--consumer: cannot be combined with --endpoints: endpoints do not belong to a consumer; expected --service, --state or a text",
            )),
            _ => Ok(()),
        }
    }

    pub(super) async fn run(self) -> Result<Answer> {
        let client = self.asked.client()?;
        // The sort is stable: entries with equal values stay in the API's order.
        if self.endpoints {
            let of = |endpoint: &Endpoint| endpoint.service.clone();
            let (mut all, note) = self.listed(&client, "/v1/endpoints", of).await?;
            all.sort_by_key(|endpoint| {
                Reverse(self.sort.key(&endpoint.figures, endpoint.health.failed_tries))
            });
            return self.answer(&all, note, None, endpoints);
        }
        let of = |route: &Route| route.query.service.clone();
        let (mut all, note) = self.listed(&client, "/v1/routes", of).await?;
        all.sort_by_key(|route| Reverse(self.sort.key(&route.figures, 0)));
        let unknown = match &self.consumer {
            Some(consumer) if all.is_empty() => client.unknown(consumer).await?,
            _ => None,
        };
        self.answer(&all, note, unknown, routes)
    }

    /// The matching entries, and a note on how the service was found. With --json a service's name is always the full name.
    async fn listed<T: DeserializeOwned>(
        &self,
        client: &Client,
        path: &str,
        service_of: impl Fn(&T) -> String,
    ) -> Result<(Vec<T>, Option<String>)> {
        let asked = |service| {
            given(&[
                ("consumer", self.consumer.as_deref()),
                ("service", service),
                ("state", self.state.as_deref()),
                ("q", self.text.as_deref()),
            ])
        };
        let all = client.all(path, &asked(self.service.as_deref())).await?;
        let Some(service) = self.service.as_deref().filter(|_| all.is_empty() && !self.asked.json)
        else {
            return Ok((all, None));
        };
        let mut others: Vec<T> = client.all(path, &asked(None)).await?;
        let names: BTreeSet<_> = others.iter().map(&service_of).collect();
        if names.contains(service) || names.is_empty() {
            return Ok((all, None));
        }
        others.retain(|other| service_of(other).contains(service));
        let note = if others.is_empty() {
            let names: Vec<_> = names.iter().take(NAMED).map(|name| printable(name)).collect();
            format!(
                "no service has {service:?} in its name; the services are {}\n",
                names.join(", ")
            )
        } else {
            format!("no service is named {service:?}; these have it in their name:\n")
        };
        Ok((others, Some(note)))
    }

    fn answer<T: Serialize>(
        &self,
        all: &[T],
        note: Option<String>,
        unknown: Option<String>,
        table: impl Fn(&[T]) -> Columns,
    ) -> Result<Answer> {
        if self.asked.json {
            return Answer::json(&all, unknown.is_none());
        }
        // Nothing is listed because no consumer has this name: the exit code is 1.
        if let Some(unknown) = unknown {
            return Ok(Answer::new(unknown + "\n", false));
        }
        let asked = [&self.consumer, &self.service, &self.state, &self.text];
        let text = match (all.is_empty(), note) {
            (false, note) => note.unwrap_or_default() + &table(all).to_string(),
            (true, Some(note)) => note,
            (true, None) if asked.iter().any(|asked| asked.is_some()) => "no entry matches\n".to_owned(),
            (true, None) => "no entries: no running container has a binding; `embassy status` shows what embassy waits for\n".to_owned(),
        };
        Ok(Answer::yes(text))
    }
}

/// Maximum number of services named if none matches.
const NAMED: usize = 20;

fn is_word<T: Word>(text: &str) -> bool {
    T::of(text).is_some()
}

/// The numbers of a route's usable endpoints and of all its endpoints.
pub(super) fn usable(route: &Route) -> String {
    format!("{}/{}", route.usable, route.endpoints)
}

fn routes(all: &[Route]) -> Columns {
    // If no binding uses the kernel path, all routes have the same path.
    let has_paths = all.iter().any(|route| route.path_reason != PathReason::NotAsked);
    let named = ["CONSUMER", "ADDRESS", "PORT>", "SERVICE", "STATE"].into_iter();
    let path = has_paths.then_some("PATH");
    let columns: Vec<_> = named
        .chain(path)
        .chain(["ENDPOINTS>", "ACTIVE>", "STARTED>", "ERRORS>", "UP>", "DOWN>", "CONNECT>"])
        .collect();
    let mut table = Columns::new(&columns);
    for route in all {
        let named = [
            route.consumer.clone(),
            route.address.clone(),
            port_of(route.port, route.protocol),
            route.query.name.clone(),
            route.state.to_string(),
        ];
        let path = has_paths.then(|| route.path.to_string());
        let mut counted = figures(&route.figures, route.figures.errors);
        if route.protocol == Protocol::Udp {
            // Its bytes are not counted.
            let [.., up, down, _] = &mut counted;
            *up = format!("{} dg", route.figures.datagrams_up);
            *down = format!("{} dg", route.figures.datagrams_down);
        }
        table.row(named.into_iter().chain(path).chain([usable(route)]).chain(counted));
    }
    table
}

pub(super) fn endpoints(all: &[Endpoint]) -> Columns {
    let mut table = Columns::new(&[
        "SERVICE",
        "ENDPOINT",
        "STATE",
        "ACTIVE>",
        "STARTED>",
        "ERRORS>",
        "EJECTIONS>",
        "UP>",
        "DOWN>",
        "CONNECT>",
        "LAST ERROR",
    ]);
    for endpoint in all {
        let state = match endpoint.health.ejected_for_seconds {
            Some(seconds) => format!("{} {}", endpoint.health.state, age(seconds)),
            None => endpoint.health.state.to_string(),
        };
        let named = [
            format!("{} {}", endpoint.discovery, endpoint.service),
            endpoint.endpoint.clone(),
            state,
        ];
        let error = endpoint.figures.last_error.as_ref();
        let error = error.map(|e| format!("{} ({} ago)", e.text, age(e.age_seconds)));
        // A failed attempt is not an ended connection, but it is what the reader of this column looks for.
        let failed = endpoint.figures.errors + endpoint.health.failed_tries;
        let [active, started, errors, up, down, connect] = figures(&endpoint.figures, failed);
        let ejections = endpoint.health.ejections.to_string();
        let counted = [active, started, errors, ejections, up, down, connect];
        table.row(named.into_iter().chain(counted).chain([error.unwrap_or_default()]));
    }
    table
}

fn figures(figures: &Figures, errors: u64) -> [String; 6] {
    [
        figures.active.to_string(),
        figures.started.to_string(),
        errors.to_string(),
        bytes(figures.bytes_up),
        bytes(figures.bytes_down),
        figures.connect.p99_seconds.map_or(String::new(), connect),
    ]
}
