//! The calls under `/v1/`.

use std::{collections::BTreeSet, sync::atomic::Ordering::Relaxed};

use axum::{
    Json, Router,
    extract::{FromRequestParts, Query, State},
    http::{HeaderMap, StatusCode, request::Parts},
    response::{IntoResponse, Response},
    routing::get,
};
use serde::{Deserialize, de::DeserializeOwned};
use utoipa::IntoParams;

use super::{
    Context, Shown, api, events, explain, host,
    list::{Filters, Shows, Wanted},
    openapi, view,
};
use crate::{
    capture::{Change, input::Barrier},
    config::{CaptureMode, CaptureScope},
    outcome::Outcome,
};

pub(super) fn router() -> Router<Context> {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/routes", get(routes))
        .route("/v1/endpoints", get(endpoints))
        .route("/v1/bindings", get(bindings))
        .route("/v1/sources", get(sources))
        .route("/v1/connections", get(connections))
        .route("/v1/explain", get(explain))
        .route("/v1/history", get(history))
        .route("/v1/events", get(events::events))
        .route("/v1/openapi.json", get(openapi::description))
}

/// Everything at a glance
#[utoipa::path(get, path = "/v1/status", responses((status = 200, body = api::Status)))]
pub(super) async fn status(
    State(context): State<Context>,
    headers: HeaderMap,
) -> Json<api::Status> {
    let shown = &context.shown;
    shown.figures.refresh().await;
    let table = shown.tables.borrow().clone();
    let all = shown.sources.borrow().clone();
    let provider = view::source_state(&all.provider.borrow());
    let listing = all.listing.clone().unwrap_or_default();
    let now = shown.figures.now();
    let of_state = |wanted: &str| {
        let states = table.endpoints().map(|(_, state)| view::endpoint_state(state, now));
        states.filter(|state| *state == wanted).count()
    };
    let consumers: BTreeSet<_> = table.routes().map(|route| &route.consumer).collect();
    let lost = view::Lost::of(&all);
    let without_endpoint = table.routes().filter(|route| {
        matches!(view::RouteHealth::of(route, &lost, now).state(), "no_endpoint" | "waiting")
    });
    let queries = all.queries.iter().map(|(_, known)| view::source_state(&known.borrow()));
    let states: Vec<_> = queries.chain([provider]).collect();
    let sources_of = |wanted: &str| states.iter().filter(|state| **state == wanted).count();
    Json(api::Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        uptime_seconds: view::seconds(shown.facts.started.elapsed()),
        ready: shown.readiness.pending().is_empty(),
        waiting_for: waiting(shown),
        may_change: context.guard.may_change(&headers),
        listeners: shown.facts.listeners.iter().map(ToString::to_string).collect(),
        vips: table.vips().iter().map(ToString::to_string).collect(),
        table_version: table.version,
        consumers: consumers.len(),
        routes: table.routes().len(),
        routes_without_endpoint: without_endpoint.count(),
        endpoints: table.endpoints().len(),
        endpoints_ejected: of_state("ejected"),
        endpoints_drained: of_state("drained"),
        problems: view::problems(&table, &listing),
        sources: states.len(),
        sources_down: sources_of("down"),
        sources_waiting: sources_of("waiting"),
        connections: all_connections(shown),
        capture: capture(shown),
        host: host::host(),
    })
}

fn all_connections(shown: &Shown) -> api::Connections {
    let figures = &shown.figures;
    let ended = Outcome::ALL.iter().map(|o| (o.as_str().to_owned(), figures.ended(*o)));
    let (bytes_up, bytes_down) = figures.bytes();
    api::Connections {
        active: figures.live(),
        limit: figures.limit(),
        limit_of_consumer: figures.limit_of_consumer(),
        held: figures.held(),
        memory_short: figures.memory_short(),
        started: figures.started(),
        ended: ended.filter(|(_, count)| *count > 0).collect(),
        bytes_up,
        bytes_down,
        connect: view::latency(&figures.connect()),
    }
}

fn capture(shown: &Shown) -> api::Capture {
    let counts = shown.capture.as_ref();
    let standing = counts.map(|counts| counts.standing()).unwrap_or_default();
    let restored = Change::ALL.map(|change| {
        (change.as_str().to_owned(), counts.map_or(0, |counts| counts.restored(change)))
    });
    api::Capture {
        mode: match shown.facts.mode {
            CaptureMode::None => "none",
            CaptureMode::Dnat => "dnat",
            CaptureMode::Redirect => "redirect",
        }
        .to_owned(),
        scope: match shown.facts.scope {
            CaptureScope::Declared => "declared",
            CaptureScope::All => "all",
        }
        .to_owned(),
        firewall: standing.firewall.map(|firewall| firewall.to_string()),
        in_place: standing.in_place,
        restored: restored.into(),
        last_restored: standing.restored.map(|(at, missing)| api::Problem {
            text: missing,
            age_seconds: view::seconds(at.elapsed()),
        }),
        failures: counts.map_or(0, |counts| counts.failed.load(Relaxed)),
        error: standing.error,
        barriers: standing.barriers.iter().map(Barrier::to_string).collect(),
    }
}

/// The parts that are not ready, and which sources each waits for.
pub(super) fn waiting(shown: &Shown) -> Vec<api::Waiting> {
    let parts = shown.readiness.waiting();
    let part = |(part, time): (&str, std::time::Duration)| api::Waiting {
        part: part.to_owned(),
        seconds: view::seconds(time),
        sources: match part {
            "listing" => vec!["provider".to_owned()],
            "discovery" => unanswered(shown),
            _ => Vec::new(),
        },
    };
    parts.into_iter().map(part).collect()
}

/// Sources that are named where many are awaited.
const NAMED: usize = 20;

/// The queries that keep embassy from being ready: of a discovery that has not answered anything, or not asked yet.
fn unanswered(shown: &Shown) -> Vec<String> {
    let sources = shown.sources.borrow().clone();
    let known = sources.queries.iter().map(|(query, answers)| {
        let known = answers.borrow();
        (query, known.value.is_some(), known.error.is_some())
    });
    let known: Vec<_> = known.collect();
    let answering: BTreeSet<_> =
        known.iter().filter(|(_, answered, _)| *answered).map(|(query, ..)| &query.via).collect();
    let awaited = known.iter().filter(|(query, answered, failed)| {
        !answered && (!failed || !answering.contains(&query.via))
    });
    let mut names: Vec<_> = awaited.map(|(query, ..)| query.to_string()).collect();
    names.sort();
    names.truncate(NAMED);
    names
}

/// Where the connections of each consumer go
#[utoipa::path(get, path = "/v1/routes", params(Wanted), responses(
    (status = 200, body = api::Page<api::Route>), (status = 400, body = api::Error)))]
pub(super) async fn routes(
    State(context): State<Context>,
    Params(wanted): Params<Wanted>,
) -> Response {
    let filters = Filters { list: "routes", states: &api::ROUTE_STATES, of_consumers: true };
    if let Err(refusal) = wanted.check(&filters) {
        return refusal.into_response();
    }
    let shown = &context.shown;
    shown.figures.refresh().await;
    let table = shown.tables.borrow().clone();
    let now = shown.figures.now();
    let lost = view::Lost::of(&shown.sources.borrow());
    let mut all: Vec<_> = table.routes().collect();
    all.sort_by(|a, b| {
        let key = |route: &crate::table::Route| (route.key.port, route.key.source);
        (&a.consumer_name, &a.consumer, key(a)).cmp(&(&b.consumer_name, &b.consumer, key(b)))
    });
    let searches = wanted.q.is_some();
    let page = wanted.page(
        all,
        |route| {
            let texts = if searches {
                vec![
                    route.key.source.to_string(),
                    route.key.port.to_string(),
                    route.upstream.query.to_string(),
                    route.binding.origin.to_string(),
                ]
            } else {
                Vec::new()
            };
            wanted.fits(&Shows {
                consumer: Some((&route.consumer_name, route.consumer.full())),
                service: Some(route.upstream.query.service.as_str()),
                state: view::RouteHealth::of(route, &lost, now).state(),
                texts: &texts.iter().map(String::as_str).collect::<Vec<_>>(),
            })
        },
        |route| view::route(route, &lost, now),
    );
    Json(page).into_response()
}

/// The endpoints of all services
#[utoipa::path(get, path = "/v1/endpoints", params(Wanted), responses(
    (status = 200, body = api::Page<api::Endpoint>), (status = 400, body = api::Error)))]
pub(super) async fn endpoints(
    State(context): State<Context>,
    Params(wanted): Params<Wanted>,
) -> Response {
    let filters = Filters { list: "endpoints", states: &api::ENDPOINT_STATES, of_consumers: false };
    if let Err(refusal) = wanted.check(&filters) {
        return refusal.into_response();
    }
    let shown = &context.shown;
    shown.figures.refresh().await;
    let table = shown.tables.borrow().clone();
    let now = shown.figures.now();
    let mut all: Vec<_> = table.endpoints().collect();
    all.sort_by_key(|(service, state)| (*service, state.endpoint));
    let page = wanted.page(
        all,
        |((discovery, _, service), state)| {
            let endpoint = state.endpoint.to_string();
            wanted.fits(&Shows {
                consumer: None,
                service: Some(service.as_str()),
                state: view::endpoint_state(state, now),
                texts: &[&endpoint, discovery],
            })
        },
        |(service, state)| view::endpoint(service, state, now),
    );
    Json(page).into_response()
}

/// What consumers declared, and what became of it
#[utoipa::path(get, path = "/v1/bindings", params(Wanted), responses(
    (status = 200, body = api::Page<api::Binding>), (status = 400, body = api::Error)))]
pub(super) async fn bindings(
    State(context): State<Context>,
    Params(mut wanted): Params<Wanted>,
) -> Response {
    let filters = Filters { list: "bindings", states: &api::BINDING_STATES, of_consumers: true };
    if let Err(refusal) = wanted.check(&filters) {
        return refusal.into_response();
    }
    let shown = &context.shown;
    let table = shown.tables.borrow().clone();
    let listing = shown.sources.borrow().listing.clone().unwrap_or_default();
    let all = view::bindings(&table, &listing);
    let problems_only = wanted.state.as_deref() == Some("problem");
    if problems_only {
        wanted.state = None;
    }
    let page = wanted.page(
        all,
        |binding| {
            let query = binding.query.as_ref();
            let name = query.map_or("", |query| &query.name);
            let mut texts = vec![binding.origin.as_str(), name];
            texts.extend(binding.reasons.iter().map(String::as_str));
            texts.extend(binding.addresses.iter().map(String::as_str));
            let shows = Shows {
                consumer: Some((&binding.consumer, &binding.consumer_id)),
                service: query.map(|query| query.service.as_str()),
                state: &binding.state,
                texts: &texts,
            };
            (!problems_only || binding.state != "routed") && wanted.fits(&shows)
        },
        |binding| binding,
    );
    Json(page).into_response()
}

/// The provider, and everything that is asked of a discovery
#[utoipa::path(get, path = "/v1/sources", params(Wanted), responses(
    (status = 200, body = api::Page<api::Source>), (status = 400, body = api::Error)))]
pub(super) async fn sources(
    State(context): State<Context>,
    Params(wanted): Params<Wanted>,
) -> Response {
    let filters = Filters { list: "sources", states: &api::SOURCE_STATES, of_consumers: false };
    if let Err(refusal) = wanted.check(&filters) {
        return refusal.into_response();
    }
    let sources = context.shown.sources.borrow().clone();
    let mut all = vec![(None, view::provider(&sources.provider.borrow()))];
    let mut queries: Vec<_> = sources
        .queries
        .iter()
        .map(|(query, known)| {
            (Some(query.service.as_str()), view::discovery(query, &known.borrow()))
        })
        .collect();
    queries.sort_by(|a, b| a.1.name.cmp(&b.1.name));
    all.extend(queries);
    let page = wanted.page(
        all,
        |(service, source)| {
            wanted.fits(&Shows {
                consumer: None,
                service: *service,
                state: &source.state,
                texts: &[&source.name, source.error.as_deref().unwrap_or_default()],
            })
        },
        |(_, source)| source,
    );
    Json(page).into_response()
}

/// What is connected now
#[utoipa::path(get, path = "/v1/connections", params(Wanted), responses(
    (status = 200, body = api::Page<api::Connection>), (status = 400, body = api::Error)))]
pub(super) async fn connections(
    State(context): State<Context>,
    Params(wanted): Params<Wanted>,
) -> Response {
    let filters =
        Filters { list: "connections", states: &api::CONNECTION_STATES, of_consumers: true };
    if let Err(refusal) = wanted.check(&filters) {
        return refusal.into_response();
    }
    let mut all = context.shown.figures.connections().await;
    all.sort_by(|a, b| b.age.cmp(&a.age).then(a.id.cmp(&b.id)));
    let searches = wanted.q.is_some();
    let page = wanted.page(
        all,
        |live| {
            let route = live.route.as_deref();
            let texts = if searches {
                let endpoint = live.endpoint.map(|e| e.to_string()).unwrap_or_default();
                vec![live.source.to_string(), live.destination.to_string(), endpoint]
            } else {
                Vec::new()
            };
            wanted.fits(&Shows {
                consumer: route.map(|route| (&*route.consumer_name, route.consumer.full())),
                service: route.map(|route| route.upstream.query.service.as_str()),
                state: view::connection_state(live).as_str(),
                texts: &texts.iter().map(String::as_str).collect::<Vec<_>>(),
            })
        },
        |live| view::connection(&live),
    );
    Json(page).into_response()
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Asked {
    /// The consumer's whole name, how its ID begins (from 4 characters on), or an address of its.
    consumer: String,
    /// The port that it dials, 1 to 65535.
    port: u16,
}

/// Why a consumer's connections on a port go where they go
#[utoipa::path(get, path = "/v1/explain", params(Asked), responses(
    (status = 200, body = api::Explain), (status = 400, body = api::Error)))]
pub(super) async fn explain(
    State(context): State<Context>,
    Params(asked): Params<Asked>,
) -> Result<Json<api::Explain>, Refusal> {
    if asked.port == 0 {
        return Err(Refusal::new(StatusCode::BAD_REQUEST, "port 0: expected 1 to 65535"));
    }
    context.shown.figures.refresh().await;
    Ok(Json(explain::explain(&context.shown, &asked.consumer, asked.port)))
}

/// The last five minutes
#[utoipa::path(get, path = "/v1/history", responses((status = 200, body = api::History)))]
pub(super) async fn history(State(context): State<Context>) -> Json<api::History> {
    Json(context.history.read())
}

pub(super) async fn unknown(uri: axum::http::Uri) -> Refusal {
    Refusal::new(StatusCode::NOT_FOUND, format!("{}: there is no such call", uri.path()))
}

pub(super) async fn wrong_method(method: axum::http::Method, uri: axum::http::Uri) -> Refusal {
    let text = format!("{method} {}: not with this method", uri.path());
    Refusal::new(StatusCode::METHOD_NOT_ALLOWED, text)
}

/// An answer that is no success.
#[derive(Debug)]
pub(super) struct Refusal {
    status: StatusCode,
    error: String,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, error: impl Into<String>) -> Self {
        Self { status, error: error.into() }
    }

    pub(super) fn forbidden(error: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, error)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.status, Json(api::Error { error: self.error })).into_response()
    }
}

/// The parameters behind the `?`; what is wrong with them is said as JSON, like every error.
pub(super) struct Params<T>(pub T);

impl<T: DeserializeOwned, S: Sync> FromRequestParts<S> for Params<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Refusal> {
        match Query::try_from_uri(&parts.uri) {
            Ok(Query(params)) => Ok(Self(params)),
            Err(error) => Err(Refusal::new(StatusCode::BAD_REQUEST, error.body_text())),
        }
    }
}
