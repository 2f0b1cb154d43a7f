//! The calls under `/v1/`.

use std::collections::BTreeSet;

use axum::{
    Json, Router,
    extract::State,
    http::{HeaderMap, StatusCode},
    routing::get,
};
use serde::Deserialize;
use utoipa::IntoParams;

use super::{
    api,
    context::{Context, Feeds},
    explain, host,
    list::{Shows, Wanted},
    refusal::{Params, Refusal},
    view,
};
use crate::{
    capture::input::Barrier,
    judgement::{
        self, Awaited, BindingState, EndpointHealth, RouteState, Situation, SourceState, Subject,
        Verdict,
    },
    model::port_of,
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
}

/// The state of embassy
#[utoipa::path(get, path = "/v1/status", responses((status = 200, body = api::Status)))]
pub(super) async fn status(
    State(context): State<Context>,
    headers: HeaderMap,
) -> Json<api::Status> {
    let feeds = &context.feeds;
    feeds.figures.refresh().await;
    let situation = feeds.situation();
    let host = host::host();
    let overview = situation.overview(&host::in_use(&host));
    let awaited = situation.awaited();
    let table = &situation.table;
    let consumers: BTreeSet<_> = table.routes().map(|route| &route.consumer).collect();
    let routes = |states: &[RouteState]| states.iter().filter_map(|s| overview.routes.get(s)).sum();
    let broken = RouteState::ALL.iter().filter(|state| state.verdict() == Verdict::Broken);
    let endpoints = |health| overview.endpoints.get(&health).copied().unwrap_or_default();
    let sources = |state| overview.sources.get(&state).copied().unwrap_or_default();
    let verdicts = overview.verdicts();
    let verdict = |subject| verdicts.get(&subject).copied().unwrap_or(Verdict::Ok);
    Json(api::Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        host_name: feeds.constants.instance.host.clone(),
        engine: feeds.constants.instance.engine.clone(),
        discoveries: feeds.constants.instance.discoveries.clone(),
        uptime_seconds: view::seconds(feeds.constants.started.elapsed()),
        ready: awaited.is_empty(),
        verdict: overview.verdict(),
        verdicts: api::Verdicts {
            process: verdict(Subject::Process),
            capture: verdict(Subject::Capture),
            sources: verdict(Subject::Sources),
            bindings: verdict(Subject::Bindings),
            routes: verdict(Subject::Routes),
            endpoints: verdict(Subject::Endpoints),
            connections: verdict(Subject::Connections),
            host: verdict(Subject::Host),
        },
        findings: overview.causes.iter().map(view::finding).collect(),
        waiting_for: awaited.into_iter().map(waiting).collect(),
        may_change: context.access.may_change(&headers).await,
        listeners: feeds.constants.listeners.iter().map(ToString::to_string).collect(),
        vips: situation.addresses().map(|address| address.to_string()).collect(),
        table_version: table.version,
        consumers: consumers.len(),
        routes: table.routes().len(),
        paths: situation.paths.counts(table.routes().map(|route| &route.key)),
        routes_without_endpoint: routes(&[RouteState::NoEndpoint, RouteState::Waiting]),
        routes_degraded: routes(&[RouteState::Degraded]),
        routes_broken: broken.filter_map(|state| overview.routes.get(state)).sum(),
        endpoints: table.endpoints().len(),
        endpoints_ejected: endpoints(EndpointHealth::Ejected),
        endpoints_drained: endpoints(EndpointHealth::Drained),
        problems: overview.problems,
        sources: overview.sources.values().sum(),
        sources_down: sources(SourceState::Down),
        sources_waiting: sources(SourceState::Waiting),
        connections: all_connections(feeds),
        capture: capture(feeds, &situation),
        host,
    })
}

fn waiting(Awaited { part, since, sources }: Awaited) -> api::Waiting {
    api::Waiting { part, seconds: since.map(view::seconds), sources }
}

fn all_connections(feeds: &Feeds) -> api::Connections {
    let figures = &feeds.figures;
    let ended = || Outcome::ALL.iter().map(|outcome| (*outcome, figures.ended(*outcome)));
    let (bytes_up, bytes_down) = figures.bytes();
    api::Connections {
        active: figures.live(),
        limit: figures.limit(),
        limit_of_consumer: figures.limit_of_consumer(),
        held: figures.held(),
        memory_short: figures.memory_short(),
        started: figures.started(),
        ended: ended().filter(|(_, count)| *count > 0).collect(),
        errors: ended().filter(|(outcome, _)| outcome.is_error()).map(|(_, count)| count).sum(),
        bytes_up,
        bytes_down,
        connect: view::latency(&figures.connect()),
    }
}

fn capture(feeds: &Feeds, situation: &Situation) -> api::Capture {
    let counts = feeds.capture.as_ref();
    let standing = &situation.capture.standing;
    let restored = api::Change::ALL
        .iter()
        .map(|change| (*change, counts.map_or(0, |counts| counts.restored(*change))));
    api::Capture {
        mode: situation.capture.mode,
        scope: situation.capture.scope,
        firewall: standing.firewall.map(|firewall| firewall.to_string()),
        in_place: standing.in_place,
        restored: restored.collect(),
        last_restored: standing.restored.as_ref().map(|(at, missing)| api::Problem {
            text: missing.clone(),
            age_seconds: view::seconds(at.elapsed()),
        }),
        failures: counts
            .map_or(0, |counts| counts.failed.load(std::sync::atomic::Ordering::Relaxed)),
        error: standing.error.clone(),
        barriers: standing
            .barriers
            .iter()
            .chain(&standing.behind)
            .map(Barrier::to_string)
            .collect(),
    }
}

/// The routes of all consumers
#[utoipa::path(get, path = "/v1/routes", params(Wanted), responses(
    (status = 200, body = api::Page<api::Route>), (status = 400, body = api::Error)))]
pub(super) async fn routes(
    State(context): State<Context>,
    Params(wanted): Params<Wanted>,
) -> Result<Json<api::Page<api::Route>>, Refusal> {
    let wanted_state = wanted.state::<RouteState>("routes", "")?;
    context.feeds.figures.refresh().await;
    let situation = context.feeds.situation();
    let mut all: Vec<_> = situation.table.routes().collect();
    all.sort_by(|a, b| {
        let key =
            |route: &crate::table::Route| (route.key.port, route.key.protocol, route.key.source);
        (&a.consumer_name, &a.consumer, key(a)).cmp(&(&b.consumer_name, &b.consumer, key(b)))
    });
    let searches = wanted.q.is_some();
    let page = wanted.page(
        all,
        |route| {
            let texts = if searches {
                vec![
                    route.key.source.to_string(),
                    port_of(route.key.port, route.key.protocol),
                    route.written_query().to_string(),
                    route.binding.origin.to_string(),
                ]
            } else {
                Vec::new()
            };
            wanted.fits(&Shows {
                consumer: Some((&route.consumer_name, route.consumer.full())),
                service: Some(route.query.service.as_str()),
                texts: &texts.iter().map(String::as_str).collect::<Vec<_>>(),
            }) && wanted_state.is_none_or(|state| situation.route(route).state == state)
        },
        |route| view::route(route, &situation),
    );
    Ok(Json(page))
}

/// The endpoints of all services
#[utoipa::path(get, path = "/v1/endpoints", params(Wanted), responses(
    (status = 200, body = api::Page<api::Endpoint>), (status = 400, body = api::Error)))]
pub(super) async fn endpoints(
    State(context): State<Context>,
    Params(wanted): Params<Wanted>,
) -> Result<Json<api::Page<api::Endpoint>>, Refusal> {
    wanted.of_nobody("endpoints")?;
    let wanted_state = wanted.state::<EndpointHealth>("endpoints", "")?;
    let feeds = &context.feeds;
    feeds.figures.refresh().await;
    let table = feeds.tables.borrow().clone();
    let now = feeds.figures.now();
    let mut all: Vec<_> = table.endpoints().collect();
    all.sort_by_key(|(service, state)| (*service, state.endpoint));
    let page = wanted.page(
        all,
        |((discovery, _, service), state)| {
            let endpoint = state.endpoint.to_string();
            wanted.fits(&Shows {
                consumer: None,
                service: Some(service.as_str()),
                texts: &[&endpoint, discovery],
            }) && wanted_state.is_none_or(|wanted| judgement::endpoint(state, now) == wanted)
        },
        |(service, state)| view::endpoint(service, state, now),
    );
    Ok(Json(page))
}

/// The declared bindings and their states
#[utoipa::path(get, path = "/v1/bindings", params(Wanted), responses(
    (status = 200, body = api::Page<api::Binding>), (status = 400, body = api::Error)))]
pub(super) async fn bindings(
    State(context): State<Context>,
    Params(mut wanted): Params<Wanted>,
) -> Result<Json<api::Page<api::Binding>>, Refusal> {
    let problems_only = wanted.state.take_if(|state| state == "problem").is_some();
    let wanted_state = wanted.state::<BindingState>("bindings", "problem, ")?;
    let situation = context.feeds.situation();
    let all = situation.bindings(|_| true);
    let all = all.iter().map(view::binding);
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
                texts: &texts,
            };
            (!problems_only || binding.state != BindingState::Routed)
                && wanted_state.is_none_or(|state| binding.state == state)
                && wanted.fits(&shows)
        },
        |binding| binding,
    );
    Ok(Json(page))
}

/// The provider and all discovery queries
#[utoipa::path(get, path = "/v1/sources", params(Wanted), responses(
    (status = 200, body = api::Page<api::Source>), (status = 400, body = api::Error)))]
pub(super) async fn sources(
    State(context): State<Context>,
    Params(wanted): Params<Wanted>,
) -> Result<Json<api::Page<api::Source>>, Refusal> {
    wanted.of_nobody("sources")?;
    let wanted_state = wanted.state::<SourceState>("sources", "")?;
    let situation = context.feeds.situation();
    let sources = context.feeds.sources.borrow().clone();
    let provider = view::provider(&sources.provider.borrow(), &situation.provider);
    let mut all = vec![(None, provider)];
    let mut queries: Vec<_> = sources
        .queries
        .iter()
        .filter_map(|(query, known)| {
            let reading = situation.queries.get(query)?;
            let source = view::discovery(query, &known.borrow(), reading);
            Some((Some(query.service.as_str()), source))
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
                texts: &[&source.name, source.error.as_deref().unwrap_or_default()],
            }) && wanted_state.is_none_or(|state| source.state == state)
        },
        |(_, source)| source,
    );
    Ok(Json(page))
}

/// The open connections
#[utoipa::path(get, path = "/v1/connections", params(Wanted), responses(
    (status = 200, body = api::Page<api::Connection>), (status = 400, body = api::Error)))]
pub(super) async fn connections(
    State(context): State<Context>,
    Params(wanted): Params<Wanted>,
) -> Result<Json<api::Page<api::Connection>>, Refusal> {
    let wanted_state = wanted.state::<api::ConnectionState>("connections", "")?;
    let mut all = context.feeds.figures.connections().await;
    all.sort_by(|a, b| b.age.cmp(&a.age).then(a.id.cmp(&b.id)));
    let searches = wanted.q.is_some();
    let page = wanted.page(
        all,
        |live| {
            let route = live.route.as_deref();
            let texts = if searches {
                let endpoint = live.endpoint.map(|e| e.to_string()).unwrap_or_default();
                let local = live.local.map(|local| local.to_string()).unwrap_or_default();
                vec![live.source.to_string(), live.destination.to_string(), endpoint, local]
            } else {
                Vec::new()
            };
            wanted.fits(&Shows {
                consumer: route.map(|route| (&*route.consumer_name, route.consumer.full())),
                service: route.map(|route| route.query.service.as_str()),
                texts: &texts.iter().map(String::as_str).collect::<Vec<_>>(),
            }) && wanted_state.is_none_or(|state| live.state == state)
        },
        |live| view::connection(&live),
    );
    Ok(Json(page))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Asked {
    /// The consumer: its full name, the start of its ID (at least 4 characters), or one of its addresses.
    consumer: String,
    /// The declared port, 1 to 65535.
    port: u16,
}

/// Where a consumer's connections to a port go, and why
#[utoipa::path(get, path = "/v1/explain", params(Asked), responses(
    (status = 200, body = api::Explain), (status = 400, body = api::Error)))]
pub(super) async fn explain(
    State(context): State<Context>,
    Params(asked): Params<Asked>,
) -> Result<Json<api::Explain>, Refusal> {
    if asked.port == 0 {
        return Err(Refusal::bad("port 0: expected 1 to 65535"));
    }
    context.feeds.figures.refresh().await;
    Ok(Json(explain::explain(&context.feeds, &asked.consumer, asked.port)))
}

/// The last five minutes
#[utoipa::path(get, path = "/v1/history", responses((status = 200, body = api::History)))]
pub(super) async fn history(State(context): State<Context>) -> Json<api::History> {
    Json(context.history.read())
}

pub(super) async fn unknown(uri: axum::http::Uri) -> Refusal {
    Refusal::new(StatusCode::NOT_FOUND, format!("{}: no such call", uri.path()))
}

pub(super) async fn wrong_method(method: axum::http::Method, uri: axum::http::Uri) -> Refusal {
    let text = format!("{method} {}: this call does not allow this method", uri.path());
    Refusal::new(StatusCode::METHOD_NOT_ALLOWED, text)
}
