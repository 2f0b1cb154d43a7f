//! Answers who connects, within bounds: whoever reaches the listener must not be able to use up the descriptors that
//! connections of consumers need.

use std::{io, sync::Arc, time::Duration};

use axum::Router;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::Semaphore,
    task::JoinSet,
    time::sleep,
};

/// Connections at a time; one more waits in the kernel's queue.
const CONNECTIONS: usize = 128;
/// How long a connection may take to send the head of a request, the first or another.
const HEADER: Duration = Duration::from_secs(10);
/// After an accept that failed, as it does while there are no descriptors.
const PAUSE: Duration = Duration::from_millis(500);

/// What connections come from.
pub(super) trait Listener {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    fn accept(&self) -> impl Future<Output = io::Result<Self::Stream>> + Send;
}

impl Listener for TcpListener {
    type Stream = tokio::net::TcpStream;

    async fn accept(&self) -> io::Result<Self::Stream> {
        let (stream, _) = TcpListener::accept(self).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

impl Listener for UnixListener {
    type Stream = tokio::net::UnixStream;

    async fn accept(&self) -> io::Result<Self::Stream> {
        Ok(UnixListener::accept(self).await?.0)
    }
}

/// Answers for ever. Dropped, it closes all connections.
pub(super) async fn serve(listener: impl Listener, router: Router) {
    let mut http = Builder::new(hyper_util::rt::TokioExecutor::new()).http1_only();
    http.http1().timer(TokioTimer::new()).header_read_timeout(HEADER);
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut running = JoinSet::new();
    loop {
        // The semaphore is never closed.
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok(stream) => stream,
            Err(error) => {
                tracing::debug!(%error, "the admin API cannot accept");
                sleep(PAUSE).await;
                continue;
            }
        };
        while running.try_join_next().is_some() {}
        let (http, service) = (http.clone(), TowerToHyperService::new(router.clone()));
        running.spawn(async move {
            // What a client does wrong ends its own connection, and is nobody's news.
            let _ = http.serve_connection(TokioIo::new(stream), service).await;
            drop(place);
        });
    }
}
