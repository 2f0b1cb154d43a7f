//! The admin API, for people and programs. Most calls only read; the few that change something need access rights.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    sync::Arc,
};

use axum::{Router, routing::get};
use tokio::{
    net::{TcpListener, UnixListener},
    sync::Semaphore,
    task::JoinHandle,
};

use crate::{config, unix_socket};
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
mod v1;
mod view;

/// The running API.
#[derive(Debug)]
pub struct Admin {
    /// The listen address, for messages.
    pub address: String,
    tasks: [JoinHandle<()>; 2],
    /// The socket's file, if it is a Unix socket.
    file: Option<unix_socket::File>,
    /// A duplicate of the listening socket.
    socket: OwnedFd,
}

/// A listening socket that is not served yet.
#[derive(Debug)]
pub struct Listening {
    socket: OwnedFd,
    listener: Listener,
}

#[derive(Debug)]
enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf, unix_socket::File),
}

impl Listening {
    /// Listens. `inherited`: the socket of another process that listens at the same address.
    pub fn open(at: &config::Admin, inherited: Option<OwnedFd>) -> io::Result<Self> {
        match at {
            config::Admin::Tcp(address) => {
                let listener = match inherited {
                    Some(socket) => std::net::TcpListener::from(socket),
                    None => std::net::TcpListener::bind(address)?,
                };
                listener.set_nonblocking(true)?;
                let listener = TcpListener::from_std(listener)?;
                let socket = listener.as_fd().try_clone_to_owned()?;
                Ok(Self { socket, listener: Listener::Tcp(listener) })
            }
            config::Admin::Unix(path) => {
                let (listener, file) = match inherited {
                    Some(socket) => {
                        let listener = std::os::unix::net::UnixListener::from(socket);
                        listener.set_nonblocking(true)?;
                        let file = unix_socket::File::inherited(path);
                        (UnixListener::from_std(listener)?, file)
                    }
                    None => unix_socket::listen(path)?,
                };
                let socket = listener.as_fd().try_clone_to_owned()?;
                Ok(Self { socket, listener: Listener::Unix(listener, path.clone(), file) })
            }
        }
    }
}

impl Listening {
    /// Makes the address this process's own, if another process handed the socket over.
    pub fn claim(&mut self) {
        if let Listener::Unix(_, _, file) = &mut self.listener {
            file.claim();
        }
    }
}

impl Admin {
    /// Starts to serve. `token_file` contains the token that changes via TCP need.
    pub fn start(
        listening: Listening,
        token_file: Option<PathBuf>,
        feeds: Feeds,
    ) -> io::Result<Self> {
        let Listening { socket, listener } = listening;
        let (history, sampling) = History::start(feeds.figures.clone());
        let context = |access: Access| Context {
            feeds,
            history,
            access: Arc::new(access),
            listeners: Arc::new(Semaphore::new(events::LISTENERS)),
            scrapes: Arc::new(Semaphore::new(1)),
            readers: Arc::new(Semaphore::new(probes::READERS)),
        };
        match listener {
            Listener::Tcp(listener) => {
                let bound = listener.local_addr()?;
                if bound.ip().is_unspecified() {
                    tracing::warn!(address = %bound, "the admin API is reachable from every network; bind it to 127.0.0.1 or to an address in a trusted network");
                }
                let tasks = [serving(listener, context(Access::tcp(bound, token_file))), sampling];
                Ok(Self { address: format!("http://{bound}"), tasks, file: None, socket })
            }
            Listener::Unix(listener, path, file) => {
                let tasks = [serving(listener, context(Access::unix())), sampling];
                let address = format!("unix://{}", path.display());
                Ok(Self { address, tasks, file: Some(file), socket })
            }
        }
    }

    /// The listening socket, to hand over to another process.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Ends this API. Its listening socket now belongs to another process.
    pub fn leave(mut self) {
        if let Some(file) = &mut self.file {
            file.leave();
        }
    }
}

impl Drop for Admin {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Serves all calls. Beyond the connection limit, serves only those for health checks.
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
