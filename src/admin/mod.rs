//! The admin API, for people and programs. Most calls only read; the few that change something need access rights.

use std::{io, path::PathBuf, sync::Arc};

use axum::{Router, routing::get};
use tokio::{net::TcpListener, sync::Semaphore, task::JoinHandle};

use crate::config;
use access::Access;
use context::Context;
pub use context::{Constants, Feeds};
use history::History;

mod access;
pub mod api;
mod changes;
mod context;
mod dashboard;
mod events;
mod explain;
mod history;
mod host;
mod list;
pub mod metrics;
mod openapi;
mod probes;
mod ready;
mod refusal;
mod serve;
mod socket;
mod v1;
mod view;

/// The running API.
#[derive(Debug)]
pub struct Admin {
    /// The listen address, for messages.
    pub address: String,
    tasks: [JoinHandle<()>; 2],
    /// The socket's file, if it is a Unix socket.
    _file: Option<socket::File>,
}

impl Admin {
    /// Starts to listen. `token_file` has the token that changes over TCP need.
    pub async fn start(
        at: &config::Admin,
        token_file: Option<PathBuf>,
        feeds: Feeds,
    ) -> io::Result<Self> {
        let (history, sampling) = History::start(feeds.figures.clone());
        let context = |access: Access| Context {
            feeds,
            history,
            access: Arc::new(access),
            listeners: Arc::new(Semaphore::new(events::LISTENERS)),
            scrapes: Arc::new(Semaphore::new(1)),
            readers: Arc::new(Semaphore::new(probes::READERS)),
        };
        match at {
            config::Admin::Tcp(address) => {
                let listener = TcpListener::bind(address).await?;
                let bound = listener.local_addr()?;
                if bound.ip().is_unspecified() {
                    tracing::warn!(address = %bound, "the admin API is reachable from every network; bind it to 127.0.0.1 or to an address in a trusted network");
                }
                let tasks = [serving(listener, context(Access::tcp(bound, token_file))), sampling];
                Ok(Self { address: format!("http://{bound}"), tasks, _file: None })
            }
            config::Admin::Unix(path) => {
                let (listener, file) = socket::listen(path)?;
                let tasks = [serving(listener, context(Access::unix())), sampling];
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

/// Serves all calls, and beyond the limit of connections those for health checks.
fn serving(
    listener: impl serve::Listener + Send + Sync + 'static,
    context: Context,
) -> JoinHandle<()> {
    let health = probes::health().fallback(probes::full);
    tokio::spawn(serve::serve(listener, router(context.clone()), guarded(health, context)))
}

fn router(context: Context) -> Router {
    let calls = Router::new()
        .route("/", get(dashboard::dashboard))
        .route("/v1/openapi.json", get(openapi::description))
        .merge(probes::router())
        .merge(v1::router())
        .merge(events::router())
        .merge(changes::router())
        .fallback(v1::unknown)
        .method_not_allowed_fallback(v1::wrong_method);
    guarded(calls, context)
}

/// Calls behind the access control.
fn guarded(calls: Router<Context>, context: Context) -> Router {
    calls
        .layer(axum::middleware::from_fn_with_state(context.access.clone(), access::check))
        .layer(axum::middleware::map_response(refusal::visible))
        .with_state(context)
}
