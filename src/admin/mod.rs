//! The admin API: what is, for people and machines. It reads; the few calls that change something are guarded.

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, time::Instant};

use axum::{
    Json, Router,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use prometheus_client::registry::Registry;
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
    task::JoinHandle,
};

use crate::{
    capture,
    config::{self, CaptureMode, CaptureScope},
    control::Sources,
    events::Events,
    proxy::Figures,
    readiness::Readiness,
    source::ResyncRequests,
    table::Table,
};
use guard::Guard;
use history::History;

pub mod api;
mod changes;
mod dashboard;
mod events;
mod explain;
mod guard;
mod history;
mod host;
mod list;
pub mod metrics;
mod openapi;
mod serve;
mod socket;
mod v1;
mod view;

/// What the API shows.
#[derive(Debug, Clone)]
pub struct Shown {
    pub readiness: Readiness,
    pub metrics: Arc<Registry>,
    pub tables: watch::Receiver<Arc<Table>>,
    pub sources: watch::Receiver<Sources>,
    pub figures: Figures,
    /// `None` where the user's own rules capture.
    pub capture: Option<Arc<capture::CaptureCounts>>,
    pub events: Events,
    /// Asks every source to read everything again.
    pub resync: ResyncRequests,
    pub facts: Arc<Facts>,
}

/// What does not change while embassy runs.
#[derive(Debug)]
pub struct Facts {
    pub started: Instant,
    /// Where captured connections arrive.
    pub listeners: Vec<SocketAddr>,
    pub mode: CaptureMode,
    pub scope: CaptureScope,
}

/// What a handler has.
#[derive(Debug, Clone)]
struct Context {
    shown: Shown,
    history: History,
    guard: Arc<Guard>,
    /// Places for those who listen to events.
    listeners: Arc<Semaphore>,
    /// One scrape at a time: many would only take each other's processor.
    scrapes: Arc<Semaphore>,
}

/// The running API.
#[derive(Debug)]
pub struct Admin {
    /// Where it listens, for people.
    pub address: String,
    tasks: [JoinHandle<()>; 2],
    /// Where it is a unix socket.
    _file: Option<socket::File>,
}

impl Admin {
    /// Listens. `token_file` holds the token that changing calls must bear where they do not come by a unix socket.
    pub async fn start(
        at: &config::Admin,
        token_file: Option<PathBuf>,
        shown: Shown,
    ) -> io::Result<Self> {
        let (history, sampling) = History::start(shown.figures.clone());
        let router = |guard: Guard| {
            router(Context {
                shown,
                history,
                guard: Arc::new(guard),
                listeners: Arc::new(Semaphore::new(events::LISTENERS)),
                scrapes: Arc::new(Semaphore::new(1)),
            })
        };
        match at {
            config::Admin::Tcp(address) => {
                let listener = TcpListener::bind(address).await?;
                let bound = listener.local_addr()?;
                if bound.ip().is_unspecified() {
                    tracing::warn!(address = %bound, "the admin API answers whoever reaches this host; 127.0.0.1, or an address of a network that is trusted, keeps it among us");
                }
                let serve = serve::serve(listener, router(Guard::tcp(bound, token_file)));
                let tasks = [tokio::spawn(serve), sampling];
                Ok(Self { address: format!("http://{bound}"), tasks, _file: None })
            }
            config::Admin::Unix(path) => {
                let (listener, file) = socket::listen(path)?;
                let serve = serve::serve(listener, router(Guard::unix()));
                let tasks = [tokio::spawn(serve), sampling];
                let address = format!("unix://{}", path.display());
                Ok(Self { address, tasks, _file: Some(file) })
            }
        }
    }
}

impl Drop for Admin {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

fn router(context: Context) -> Router {
    Router::new()
        .route("/", get(dashboard::dashboard))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .merge(v1::router())
        .merge(changes::router())
        .fallback(v1::unknown)
        .method_not_allowed_fallback(v1::wrong_method)
        .layer(axum::middleware::from_fn_with_state(context.clone(), guard::check))
        .with_state(context)
}

/// 200 while the process lives
#[utoipa::path(get, path = "/healthz", responses((status = 200, body = String, content_type = "text/plain")))]
async fn healthz() -> &'static str {
    "ok\n"
}

/// 200 once everything has been read for the first time and traffic is captured; else 503 and what is missing
#[utoipa::path(get, path = "/readyz", responses(
    (status = 200, body = api::Ready), (status = 503, body = api::Ready)))]
async fn readyz(State(context): State<Context>) -> impl IntoResponse {
    let waiting = v1::waiting(&context.shown);
    let ready = waiting.is_empty();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let answer = api::Ready {
        ready,
        sources: waiting.iter().flat_map(|part| part.sources.clone()).collect(),
        waiting_for: waiting.into_iter().map(|part| part.part).collect(),
    };
    (status, Json(answer))
}

/// All metrics, in Prometheus' text form, or as OpenMetrics where that is accepted
#[utoipa::path(get, path = "/metrics", responses((status = 200, body = String, content_type = "text/plain")))]
async fn metrics(State(context): State<Context>, headers: HeaderMap) -> impl IntoResponse {
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok());
    let format = metrics::Format::accepted(accept.unwrap_or_default());
    // The semaphore is never closed.
    let place = context.scrapes.acquire_owned().await;
    context.shown.figures.refresh().await;
    match metrics::write_aside(context.shown.metrics.clone(), format, place) {
        Ok(body) => Ok(([(header::CONTENT_TYPE, format.content_type())], body)),
        Err(error) => Err((StatusCode::INTERNAL_SERVER_ERROR, error.to_string())),
    }
}
