//! The calls that change something. Access was checked before.

use axum::{
    Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, State},
    http::StatusCode,
    routing::{get, post, put},
};
use serde::de::DeserializeOwned;

use super::{api, context::Context, refusal::Refusal};
use crate::{events::Event, log};

/// Maximum size of a request body.
const LARGEST: usize = 4096;

pub(super) fn router() -> Router<Context> {
    Router::new()
        .route("/v1/endpoints/drain", put(drain))
        .route("/v1/resync", post(resync))
        .route("/v1/log-level", get(level).put(set_level))
        .layer(DefaultBodyLimit::max(LARGEST))
}

/// Drains an endpoint (no new connections; open ones stay), or ends its drain
///
/// A drain lasts until embassy stops, or the endpoint is deregistered.
#[utoipa::path(put, path = "/v1/endpoints/drain", request_body = api::Drain, responses(
    (status = 200, body = api::Done), (status = 400, body = api::Error),
    (status = 403, body = api::Error), (status = 404, body = api::Error)))]
pub(super) async fn drain(
    State(context): State<Context>,
    body: Bytes,
) -> Result<Json<api::Done>, Refusal> {
    let api::Drain { service, endpoint, drained } = read(&body)?;
    let table = context.feeds.tables.borrow().clone();
    let meant: Vec<_> = table
        .endpoints()
        .filter(|((_, _, name), state)| {
            name.as_str() == service && state.endpoint.to_string() == endpoint
        })
        .collect();
    if meant.is_empty() {
        let text = format!("{service} has no endpoint {endpoint}: expected one of /v1/endpoints");
        return Err(Refusal::new(StatusCode::NOT_FOUND, text));
    }
    tracing::info!(service, endpoint, drained, "endpoint drain set via API");
    for ((_, _, service), state) in meant {
        state.drain(drained);
        context.feeds.events.report(|| Event::EndpointDrained {
            service: service.clone(),
            endpoint: state.endpoint,
            drained,
        });
    }
    let gets = if drained { "gets no new connections" } else { "gets new connections again" };
    Ok(Json(api::Done { done: format!("{endpoint} of {service} {gets}") }))
}

/// Re-reads every source now
#[utoipa::path(post, path = "/v1/resync", responses(
    (status = 200, body = api::Done), (status = 403, body = api::Error)))]
pub(super) async fn resync(State(context): State<Context>) -> Json<api::Done> {
    tracing::info!("resync requested via API");
    context.feeds.resync.request();
    Json(api::Done { done: "resync of every source requested".to_owned() })
}

/// The log level
#[utoipa::path(get, path = "/v1/log-level", responses((status = 200, body = api::LogLevel)))]
pub(super) async fn level() -> Json<api::LogLevel> {
    Json(api::LogLevel { level: log::level().unwrap_or_default() })
}

/// Changes the log level
#[utoipa::path(put, path = "/v1/log-level", request_body = api::LogLevel, responses(
    (status = 200, body = api::Done), (status = 400, body = api::Error), (status = 403, body = api::Error)))]
pub(super) async fn set_level(body: Bytes) -> Result<Json<api::Done>, Refusal> {
    let api::LogLevel { level } = read(&body)?;
    let wrong = |error: log::LevelError| Refusal::new(StatusCode::BAD_REQUEST, error.to_string());
    log::set_level(&level).map_err(wrong)?;
    tracing::info!(level, "log level changed via API");
    Ok(Json(api::Done { done: format!("the log level is {level}") }))
}

fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body)
        .map_err(|error| Refusal::new(StatusCode::BAD_REQUEST, format!("body: {error}")))
}
