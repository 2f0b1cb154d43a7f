//! The calls for monitoring: liveness, readiness and metrics.

use axum::{
    Json, Router,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::IntoResponse,
    routing::get,
};

use super::{api, context::Context, metrics};

pub(super) fn router() -> Router<Context> {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
}

/// 200 while the process lives
#[utoipa::path(get, path = "/healthz", responses((status = 200, body = String, content_type = "text/plain")))]
pub(super) async fn healthz() -> &'static str {
    "ok\n"
}

/// 200 once every source was read and traffic is captured; otherwise 503 with the missing parts
#[utoipa::path(get, path = "/readyz", responses(
    (status = 200, body = api::Ready), (status = 503, body = api::Ready)))]
pub(super) async fn readyz(State(context): State<Context>) -> impl IntoResponse {
    let awaited = context.feeds.situation().awaited();
    let ready = awaited.is_empty();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let answer = api::Ready {
        ready,
        sources: awaited.iter().flat_map(|awaited| awaited.sources.clone()).collect(),
        waiting_for: awaited.iter().map(|awaited| awaited.part).collect(),
    };
    (status, Json(answer))
}

/// All metrics, in the Prometheus text format, or as OpenMetrics if the client accepts it
#[utoipa::path(get, path = "/metrics", responses((status = 200, body = String, content_type = "text/plain")))]
pub(super) async fn metrics(
    State(context): State<Context>,
    headers: HeaderMap,
) -> impl IntoResponse {
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok());
    let format = metrics::Format::accepted(accept.unwrap_or_default());
    // The semaphore is never closed.
    let place = context.scrapes.acquire_owned().await;
    context.feeds.figures.refresh().await;
    match metrics::write_aside(context.feeds.metrics.clone(), format, place) {
        Ok(body) => Ok(([(header::CONTENT_TYPE, format.content_type())], body)),
        Err(error) => Err((StatusCode::INTERNAL_SERVER_ERROR, error.to_string())),
    }
}
