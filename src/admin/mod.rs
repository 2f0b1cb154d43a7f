//! The admin API: what is, for people and machines. It only reads.

use std::{io, os::unix::fs::FileTypeExt, sync::Arc};

use axum::{
    Json, Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use prometheus_client::registry::Registry;
use serde::Serialize;
use tokio::{net::TcpListener, net::UnixListener, task::JoinHandle};

use crate::{config, readiness::Readiness};

pub mod metrics;

/// What the API shows.
#[derive(Debug, Clone)]
pub struct Shown {
    pub readiness: Readiness,
    pub metrics: Arc<Registry>,
}

/// The running API.
#[derive(Debug)]
pub struct Admin {
    /// Where it listens, for people.
    pub address: String,
    task: JoinHandle<io::Result<()>>,
}

impl Admin {
    pub async fn start(at: &config::Admin, shown: Shown) -> io::Result<Self> {
        let router = Router::new()
            .route("/healthz", get(healthz))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics))
            .with_state(shown);
        match at {
            config::Admin::Tcp(address) => {
                let listener = TcpListener::bind(address).await?;
                let address = format!("http://{}", listener.local_addr()?);
                Ok(Self {
                    address,
                    task: tokio::spawn(axum::serve(listener, router).into_future()),
                })
            }
            config::Admin::Unix(path) => {
                // A socket file outlives its process; only if nobody answers there is it a leftover.
                let is_socket = std::fs::symlink_metadata(path)
                    .is_ok_and(|found| found.file_type().is_socket());
                if is_socket && std::os::unix::net::UnixStream::connect(path).is_err() {
                    let _ = std::fs::remove_file(path);
                }
                let listener = UnixListener::bind(path)?;
                let address = format!("unix://{}", path.display());
                Ok(Self {
                    address,
                    task: tokio::spawn(axum::serve(listener, router).into_future()),
                })
            }
        }
    }
}

impl Drop for Admin {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// 200 while the process lives.
async fn healthz() -> &'static str {
    "ok\n"
}

/// 200 once everything has been read for the first time and traffic is captured; else 503 and what is missing.
async fn readyz(State(shown): State<Shown>) -> impl IntoResponse {
    #[derive(Serialize)]
    struct Ready {
        ready: bool,
        waiting_for: Vec<&'static str>,
    }
    let waiting_for = shown.readiness.pending();
    let ready = waiting_for.is_empty();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(Ready { ready, waiting_for }))
}

async fn metrics(State(shown): State<Shown>) -> impl IntoResponse {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, &shown.metrics) {
        Ok(()) => Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text)),
        Err(error) => Err((StatusCode::INTERNAL_SERVER_ERROR, error.to_string())),
    }
}
