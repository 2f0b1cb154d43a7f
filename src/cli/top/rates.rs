//! The figures at one moment, and the rates between two moments. Pure.

use std::{collections::HashMap, time::Instant};

use serde::Serialize;

use crate::admin::api::{Connections, Endpoint, Figures, Route, Status};

/// All figures at one moment.
#[derive(Debug, Clone)]
pub(super) struct Look {
    pub(super) at: Instant,
    pub(super) status: Status,
    pub(super) routes: Vec<Route>,
    pub(super) endpoints: Vec<Endpoint>,
}

/// The figures, and the rates since the previous ones.
#[derive(Debug, Clone, Serialize)]
pub(super) struct RatedFigures {
    pub(super) status: Status,
    /// The rates of all entries together.
    pub(super) all: Rates,
    pub(super) routes: Vec<WithRates<Route>>,
    pub(super) endpoints: Vec<WithRates<Endpoint>>,
}

/// An entry and its rates.
#[derive(Debug, Clone, Serialize)]
pub(super) struct WithRates<T> {
    #[serde(flatten)]
    pub(super) entry: T,
    #[serde(flatten)]
    pub(super) rates: Rates,
}

/// Rates per second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(super) struct Rates {
    pub(super) started_per_second: f64,
    pub(super) errors_per_second: f64,
    pub(super) bytes_up_per_second: f64,
    pub(super) bytes_down_per_second: f64,
}

/// Totals since the start of an entry.
#[derive(Debug, Clone, Copy)]
struct Totals {
    started: u64,
    errors: u64,
    up: u64,
    down: u64,
}

impl From<&Figures> for Totals {
    fn from(figures: &Figures) -> Self {
        Self {
            started: figures.started,
            errors: figures.errors,
            up: figures.bytes_up,
            down: figures.bytes_down,
        }
    }
}

impl From<&Connections> for Totals {
    fn from(all: &Connections) -> Self {
        Self { started: all.started, errors: all.errors, up: all.bytes_up, down: all.bytes_down }
    }
}

impl Rates {
    /// A new entry has no rate yet: its counts may come from more than `seconds`.
    fn between(before: Option<Totals>, now: Totals, seconds: f64) -> Self {
        let Some(before) = before.filter(|_| seconds > 0.0) else { return Self::default() };
        // An entry whose counts went down was replaced.
        let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 / seconds;
        Self {
            started_per_second: rate(now.started, before.started),
            errors_per_second: rate(now.errors, before.errors),
            bytes_up_per_second: rate(now.up, before.up),
            bytes_down_per_second: rate(now.down, before.down),
        }
    }
}

impl Look {
    /// These figures with the rates since `before`.
    pub(super) fn since(&self, before: Option<&Look>) -> RatedFigures {
        let seconds =
            before.map_or(0.0, |before| self.at.saturating_duration_since(before.at).as_secs_f64());
        let route = |route: &Route| {
            (route.consumer_id.clone(), route.address.clone(), route.port, route.protocol)
        };
        let endpoint = |endpoint: &Endpoint| {
            let of = (endpoint.discovery.clone(), endpoint.datacentre.clone());
            (of, endpoint.service.clone(), endpoint.endpoint.clone())
        };
        let routes = before.map(|before| &before.routes[..]).unwrap_or_default();
        let routes: HashMap<_, _> =
            routes.iter().map(|entry| (route(entry), Totals::from(&entry.figures))).collect();
        let endpoints = before.map(|before| &before.endpoints[..]).unwrap_or_default();
        let endpoints: HashMap<_, _> =
            endpoints.iter().map(|entry| (endpoint(entry), Totals::from(&entry.figures))).collect();
        let rates = |before: Option<&Totals>, figures: &Figures| {
            Rates::between(before.copied(), Totals::from(figures), seconds)
        };
        RatedFigures {
            status: self.status.clone(),
            all: Rates::between(
                before.map(|before| Totals::from(&before.status.connections)),
                Totals::from(&self.status.connections),
                seconds,
            ),
            routes: {
                let with = |entry: &Route| WithRates {
                    rates: rates(routes.get(&route(entry)), &entry.figures),
                    entry: entry.clone(),
                };
                self.routes.iter().map(with).collect()
            },
            endpoints: {
                let with = |entry: &Endpoint| WithRates {
                    rates: rates(endpoints.get(&endpoint(entry)), &entry.figures),
                    entry: entry.clone(),
                };
                self.endpoints.iter().map(with).collect()
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn totals(n: u64) -> Totals {
        Totals { started: n, errors: 0, up: 10 * n, down: 100 * n }
    }

    #[test]
    fn rates_are_of_each_second_and_never_negative() {
        let rates = Rates::between(Some(totals(10)), totals(14), 2.0);
        assert_eq!((rates.started_per_second, rates.bytes_down_per_second), (2.0, 200.0));
        assert_eq!(Rates::between(Some(totals(10)), totals(3), 2.0), Rates::default());
        assert_eq!(Rates::between(None, totals(3), 2.0), Rates::default());
        assert_eq!(Rates::between(Some(totals(1)), totals(3), 0.0), Rates::default());
    }
}
