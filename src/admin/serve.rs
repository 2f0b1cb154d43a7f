//! Serves HTTP within limits: clients of this listener must not use up the descriptors that consumers' connections need.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::Router;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, UnixListener},
    sync::Semaphore,
    task::JoinSet,
    time::{Sleep, sleep, timeout},
};

/// Maximum number of connections, besides the reserved ones.
const CONNECTIONS: usize = 128;
/// Number of further connections, for one health check each. All others wait in the kernel's queue.
const RESERVED: usize = 32;
/// Timeout for reading the head of a request.
const HEADER: Duration = Duration::from_secs(10);
/// Timeout for a write to a client that does not read. It frees the memory of the answer, and the connection's slot.
const READER: Duration = Duration::from_secs(15);
/// Total time of a reserved connection.
const PROBE: Duration = Duration::from_secs(2);
/// Pause after a failed accept, for example without free descriptors.
const PAUSE: Duration = Duration::from_millis(500);

/// A listening socket.
pub(super) trait Listener {
    type Stream: AsyncRead + AsyncWrite + Abort + Unpin + Send + 'static;

    fn accept(&self) -> impl Future<Output = io::Result<Self::Stream>> + Send;
}

/// A connection that can be aborted.
pub(super) trait Abort {
    /// Discards the data that the peer has not read.
    fn abort(&self) {}
}

impl Abort for tokio::net::TcpStream {
    fn abort(&self) {
        // Otherwise the kernel keeps megabytes for a peer that does not read. An error means that it is already closed.
        let _ = SockRef::from(self).set_linger(Some(Duration::ZERO));
    }
}

/// The kernel keeps unread data with the peer's socket.
impl Abort for tokio::net::UnixStream {}

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

/// Serves until it is dropped, which closes all connections. While [`CONNECTIONS`] are open, only `probes` answers, so that
/// clients cannot block health checks by holding connections.
pub(super) async fn serve(listener: impl Listener, router: Router, probes: Router) {
    let mut http = Builder::new(hyper_util::rt::TokioExecutor::new()).http1_only();
    http.http1().timer(TokioTimer::new()).header_read_timeout(HEADER);
    let mut once = http.clone();
    once.http1().keep_alive(false);
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let reserved = Arc::new(Semaphore::new(RESERVED));
    let mut running = JoinSet::new();
    loop {
        // The semaphores are never closed. A reserved slot becomes free within [`PROBE`].
        let Ok(spare) = reserved.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok(stream) => stream,
            Err(error) => {
                tracing::debug!(%error, "the admin API cannot accept");
                sleep(PAUSE).await;
                continue;
            }
        };
        while running.try_join_next().is_some() {}
        let stream = TokioIo::new(Impatient::new(stream));
        // An error of a client ends only its own connection, and is not logged.
        match places.clone().try_acquire_owned() {
            Ok(place) => {
                drop(spare);
                let (http, service) = (http.clone(), TowerToHyperService::new(router.clone()));
                running.spawn(async move {
                    let _ = http.serve_connection(stream, service).await;
                    drop(place);
                });
            }
            Err(_) => {
                let (http, service) = (once.clone(), TowerToHyperService::new(probes.clone()));
                running.spawn(async move {
                    let _ = timeout(PROBE, http.serve_connection(stream, service)).await;
                    drop(spare);
                });
            }
        }
    }
}

/// A stream that fails if its peer does not read for too long.
struct Impatient<S> {
    stream: S,
    /// Runs while a write is pending.
    patience: Option<Pin<Box<Sleep>>>,
}

impl<S: AsyncWrite + Abort + Unpin> Impatient<S> {
    fn new(stream: S) -> Self {
        Self { stream, patience: None }
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut S>, &mut Context<'_>) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if let Poll::Ready(written) = write(Pin::new(&mut self.stream), cx) {
            self.patience = None;
            return Poll::Ready(written);
        }
        let patience = self.patience.get_or_insert_with(|| Box::pin(sleep(READER)));
        ready!(patience.as_mut().poll(cx));
        self.stream.abort();
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncWrite + Abort + Unpin> AsyncWrite for Impatient<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll(cx, |stream, cx| stream.poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll(cx, |stream, cx| stream.poll_write_vectored(cx, bytes))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Impatient<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

#[cfg(test)]
mod tests {
    use axum::{body::Body, http::StatusCode, routing::get};
    use futures_util::stream::repeat_with;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
        sync::{Mutex, mpsc},
    };

    use super::*;

    impl Abort for DuplexStream {}

    struct Offered(Mutex<mpsc::UnboundedReceiver<DuplexStream>>);

    impl Listener for Offered {
        type Stream = DuplexStream;

        async fn accept(&self) -> io::Result<DuplexStream> {
            self.0.lock().await.recv().await.ok_or(io::ErrorKind::NotConnected.into())
        }
    }

    /// Both answers are as long as the client reads: a scrape of a large table, and the stream of events.
    #[tokio::test(start_paused = true)]
    async fn readers_that_never_read_keep_nobody_out_for_good() {
        let endless = || async {
            Body::from_stream(repeat_with(|| Ok::<_, io::Error>(vec![b'x'; 16 * 1024])))
        };
        let healthz = || Router::new().route("/healthz", get(|| async { "ok" }));
        let router =
            healthz().route("/endless", get(endless)).route("/other", get(|| async { "other" }));
        let probes = healthz().fallback(|| async { (StatusCode::SERVICE_UNAVAILABLE, "full") });
        let (offer, offered) = mpsc::unbounded_channel();
        let serving = tokio::spawn(serve(Offered(Mutex::new(offered)), router, probes));
        let request = |path: &'static str| {
            let (mut client, server) = duplex(64 * 1024);
            offer.send(server).unwrap();
            async move {
                let head = format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
                client.write_all(head.as_bytes()).await.unwrap();
                client
            }
        };
        let mut all = Vec::new();
        for _ in 0..CONNECTIONS {
            all.push(request("/endless").await);
        }
        // The clock of this test advances only while all tasks wait.
        let start = tokio::time::Instant::now();
        let answer = async |path| {
            let mut said = String::new();
            request(path).await.read_to_string(&mut said).await.unwrap();
            said.lines().next().unwrap_or_default().to_owned()
        };
        // More often than there are slots for health checks.
        for _ in 0..RESERVED * 2 {
            assert_eq!(answer("/healthz").await, "HTTP/1.1 200 OK");
        }
        assert_eq!(answer("/other").await, "HTTP/1.1 503 Service Unavailable");
        assert!(start.elapsed() < Duration::from_secs(1), "nobody was let go yet");
        // A client that sends nothing does not hold a slot for long.
        let silent: Vec<_> = (0..RESERVED)
            .map(|_| {
                let (client, server) = duplex(1024);
                offer.send(server).unwrap();
                client
            })
            .collect();
        assert_eq!(answer("/healthz").await, "HTTP/1.1 200 OK");
        assert!(start.elapsed() < PROBE * 2, "{:?}", start.elapsed());
        drop(silent);
        sleep(READER).await;
        assert_eq!(answer("/other").await, "HTTP/1.1 200 OK");
        for mut one in all {
            let mut got = Vec::new();
            one.read_to_end(&mut got).await.unwrap();
            assert!(got.len() <= 64 * 1024, "{} bytes", got.len());
        }
        serving.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_reader_is_waited_for_as_long_as_it_reads() {
        let (mut reader, stream) = duplex(1024);
        let mut stream = Impatient::new(stream);
        let writing = tokio::spawn(async move { stream.write_all(&[7; 8 * 1024]).await });
        let mut got = [0; 1024];
        for _ in 0..8 {
            sleep(READER * 2 / 3).await;
            reader.read_exact(&mut got).await.unwrap();
        }
        writing.await.unwrap().unwrap();
    }
}
