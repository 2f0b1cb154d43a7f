//! `embassy ps`: the routes, or the endpoints, with live figures.

use std::cmp::Reverse;

use anyhow::Result;
use clap::ValueEnum;

use super::{
    Answer,
    client::{Asked, given},
    table::{Table, age, bytes},
};
use crate::admin::api::{Endpoint, Figures, Route};

/// List the routes, or with --endpoints the endpoints, with live figures
#[derive(Debug, clap::Args)]
pub(super) struct Ps {
    #[command(flatten)]
    asked: Asked,

    /// The endpoints of the services instead of the routes to them
    #[arg(long, short)]
    endpoints: bool,

    /// What comes first: most of this
    #[arg(long, short, value_name = "FIGURE", default_value = "name")]
    sort: Sort,

    /// Only those of this consumer: its name, or the start of its ID
    #[arg(long, value_name = "CONSUMER")]
    consumer: Option<String>,

    /// Only those of this service, by its whole name
    #[arg(long, value_name = "SERVICE")]
    service: Option<String>,

    /// Only those in this state, such as no_endpoint, or ejected with --endpoints
    #[arg(long, value_name = "STATE")]
    state: Option<String>,

    /// Only those with this text in any name or address
    #[arg(value_name = "TEXT")]
    text: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Sort {
    /// By consumer and port, or by service and address
    Name,
    /// Connections that are open
    Active,
    /// Connections since the start
    Started,
    /// Connections that ended by a failure
    Errors,
    /// Bytes in both directions
    Bytes,
    /// How long connecting takes
    Connect,
}

impl Sort {
    /// The more, the earlier.
    fn key(self, figures: &Figures, failed_tries: u64) -> u64 {
        match self {
            Self::Name => 0,
            Self::Active => figures.active,
            Self::Started => figures.started,
            Self::Errors => errors(figures) + failed_tries,
            Self::Bytes => figures.bytes_up.saturating_add(figures.bytes_down),
            // To the microsecond, and at most some days.
            Self::Connect => (figures.connect.p99_seconds.unwrap_or_default() * 1e6) as u64,
        }
    }
}

/// Connections that did not end as both sides wanted.
pub(super) fn errors(figures: &Figures) -> u64 {
    use crate::outcome::Outcome;
    let errors = Outcome::ALL.iter().filter(|outcome| outcome.is_error());
    errors.filter_map(|outcome| figures.ended.get(outcome.as_str())).sum()
}

impl Ps {
    pub(super) async fn run(self) -> Result<Answer> {
        let client = self.asked.client()?;
        // Sorting is stable: those with as much stay in the API's order.
        let query = given(&[
            ("consumer", self.consumer.as_deref()),
            ("service", self.service.as_deref()),
            ("state", self.state.as_deref()),
            ("q", self.text.as_deref()),
        ]);
        if self.endpoints {
            let mut all: Vec<Endpoint> = client.all("/v1/endpoints", &query).await?;
            all.sort_by_key(|endpoint| {
                Reverse(self.sort.key(&endpoint.figures, endpoint.health.failed_tries))
            });
            return if self.asked.json {
                Answer::json(&all, true)
            } else {
                Ok(Answer::yes(endpoints(&all).to_string()))
            };
        }
        let mut all: Vec<Route> = client.all("/v1/routes", &query).await?;
        all.sort_by_key(|route| Reverse(self.sort.key(&route.figures, 0)));
        if self.asked.json {
            Answer::json(&all, true)
        } else {
            Ok(Answer::yes(routes(&all).to_string()))
        }
    }
}

/// How many of a route's endpoints take connections, of how many.
pub(super) fn usable(route: &Route) -> String {
    let not = route.ejected + route.probing + route.drained;
    format!("{}/{}", route.endpoints.saturating_sub(not), route.endpoints)
}

fn routes(all: &[Route]) -> Table {
    let mut table = Table::new(&[
        "CONSUMER",
        "ADDRESS",
        "PORT>",
        "SERVICE",
        "STATE",
        "ENDPOINTS>",
        "ACTIVE>",
        "STARTED>",
        "ERRORS>",
        "UP>",
        "DOWN>",
        "CONNECT>",
    ]);
    for route in all {
        let named = [
            route.consumer.clone(),
            route.address.clone(),
            route.port.to_string(),
            route.query.name.clone(),
            route.state.clone(),
            usable(route),
        ];
        let errors = errors(&route.figures);
        table.row(named.into_iter().chain(figures(&route.figures, errors)));
    }
    table
}

pub(super) fn endpoints(all: &[Endpoint]) -> Table {
    let mut table = Table::new(&[
        "SERVICE",
        "ENDPOINT",
        "STATE",
        "ACTIVE>",
        "STARTED>",
        "ERRORS>",
        "UP>",
        "DOWN>",
        "CONNECT>",
        "LAST ERROR",
    ]);
    for endpoint in all {
        let state = match endpoint.health.ejected_for_seconds {
            Some(seconds) => format!("{} {}", endpoint.health.state, age(seconds)),
            None => endpoint.health.state.clone(),
        };
        let named = [
            format!("{} {}", endpoint.discovery, endpoint.service),
            endpoint.endpoint.clone(),
            state,
        ];
        let error = endpoint.figures.last_error.as_ref();
        let error = error.map(|e| format!("{} ({} ago)", e.text, age(e.age_seconds)));
        // A try that failed is no connection to the endpoint that could end, and just what is looked for.
        let failed = errors(&endpoint.figures) + endpoint.health.failed_tries;
        let counted = figures(&endpoint.figures, failed);
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
        figures.connect.p99_seconds.map_or(String::new(), age),
    ]
}
