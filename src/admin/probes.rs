//! The calls for monitoring: liveness, readiness and metrics.

use std::time::Duration;

use axum::{
    Json, Router,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::time::timeout;

use super::{api, context::Context, metrics, refusal::Refusal};
use crate::judgement::Awaited;

pub(super) fn router() -> Router<Context> {
    health().route("/metrics", get(metrics))
}

/// The calls for health checks.
pub(super) fn health() -> Router<Context> {
    Router::new().route("/healthz", get(healthz)).route("/readyz", get(readyz))
}

/// The answer to all other calls while too many connections are open.
pub(super) async fn full() -> Refusal {
    let text = "too many connections to the admin API are open: only /healthz and /readyz are answered; try again";
    Refusal::new(StatusCode::SERVICE_UNAVAILABLE, text)
}

/// Maximum number of clients that read a scrape at a time.
pub(super) const READERS: usize = 4;
/// How long a scrape waits for one of them.
const WAIT: Duration = Duration::from_secs(5);

/// 200 while the process lives
#[utoipa::path(get, path = "/healthz", responses((status = 200, body = String, content_type = "text/plain")))]
pub(super) async fn healthz() -> &'static str {
    "ok\n"
}

/// 200 once every source was read and traffic is captured; otherwise 503 with the missing parts. Names sources only if the Host
/// header names the listener
#[utoipa::path(get, path = "/readyz", responses(
    (status = 200, body = api::Ready), (status = 503, body = api::Ready)))]
pub(super) async fn readyz(
    State(context): State<Context>,
    headers: HeaderMap,
) -> impl IntoResponse {
    // Every client may know whether embassy is ready, but not every client for which sources it waits.
    let names = |awaited: &Awaited| match context.access.is_own(&headers) {
        true => awaited.sources.clone(),
        false => Vec::new(),
    };
    let awaited = context.feeds.readiness().awaited();
    let ready = awaited.is_empty();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let answer = api::Ready {
        ready,
        sources: awaited.iter().flat_map(names).collect(),
        waiting_for: awaited.iter().map(|awaited| awaited.part).collect(),
    };
    (status, Json(answer))
}

/// All metrics, in the Prometheus text format, or as OpenMetrics if the client accepts it
#[utoipa::path(get, path = "/metrics", responses(
    (status = 200, body = String, content_type = "text/plain"), (status = 503, body = api::Error)))]
pub(super) async fn metrics(State(context): State<Context>, headers: HeaderMap) -> Response {
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok());
    let format = metrics::Format::accepted(accept.unwrap_or_default());
    let Ok(reader) = timeout(WAIT, context.readers.acquire_owned()).await else {
        let text = format!("{READERS} clients read metrics already, which is the limit");
        return Refusal::new(StatusCode::SERVICE_UNAVAILABLE, text).into_response();
    };
    // The semaphores are never closed.
    let place = context.scrapes.acquire_owned().await;
    context.feeds.figures.refresh().await;
    match metrics::write_aside(context.feeds.metrics.clone(), format, place, reader) {
        Ok(body) => ([(header::CONTENT_TYPE, format.content_type())], body).into_response(),
        Err(error) => {
            Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response()
        }
    }
}
