//! A proxy to a server that counts connections and requests, and can be closed at a chosen moment.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
};

/// Passes everything both ways, until the server has sent certain words. Then the clients' data waits.
pub(super) struct Gate {
    address: SocketAddr,
    state: Arc<watch::Sender<State>>,
    passed: Arc<Passed>,
}

#[derive(Default)]
struct Passed {
    opened: AtomicU64,
    closed: AtomicU64,
    requests: AtomicU64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Open,
    ClosesAfter(&'static str),
    Closed,
}

impl Gate {
    pub(super) async fn before(server: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port on loopback");
        let address = listener.local_addr().expect("a bound socket has an address");
        let state = Arc::new(watch::Sender::new(State::Open));
        let passed = Arc::<Passed>::default();
        let (server, gate, counted) = (server.to_owned(), state.clone(), passed.clone());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                counted.opened.fetch_add(1, Relaxed);
                let (server, gate, counted) = (server.clone(), gate.clone(), counted.clone());
                tokio::spawn(async move {
                    if let Ok(server) = TcpStream::connect(&server).await {
                        pass(client, server, gate, &counted).await;
                    }
                    counted.closed.fetch_add(1, Relaxed);
                });
            }
        });
        Self { address, state, passed }
    }

    /// The number of connections that clients have opened.
    pub(super) fn opened(&self) -> u64 {
        self.passed.opened.load(Relaxed)
    }

    /// The number of connections that are open now.
    pub(super) fn open_now(&self) -> u64 {
        self.opened() - self.passed.closed.load(Relaxed)
    }

    /// The number of HTTP/1.1 requests.
    pub(super) fn requests(&self) -> u64 {
        self.passed.requests.load(Relaxed)
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Closes as soon as the server sends `words`, before the client receives them.
    pub(super) fn close_after(&self, words: &'static str) {
        self.state.send_replace(State::ClosesAfter(words));
    }

    pub(super) async fn closed(&self) {
        let mut state = self.state.subscribe();
        let closed = state.wait_for(|state| *state == State::Closed);
        tokio::time::timeout(super::SOON, closed).await.expect("the server to say it").ok();
    }

    pub(super) fn open(&self) {
        self.state.send_replace(State::Open);
    }
}

/// Passes the bytes of one connection, until one side ends it.
async fn pass(
    client: TcpStream,
    server: TcpStream,
    state: Arc<watch::Sender<State>>,
    passed: &Passed,
) {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let mut gate = state.subscribe();
    let requests = async {
        let mut buffer = vec![0; 1 << 16];
        while let Ok(n @ 1..) = from_client.read(&mut buffer).await {
            // Each request is written at once, and only after the previous answer.
            if buffer.starts_with(b"GET ") {
                passed.requests.fetch_add(1, Relaxed);
            }
            let open = gate.wait_for(|state| *state != State::Closed).await.is_ok();
            if !open || to_server.write_all(&buffer[..n]).await.is_err() {
                return;
            }
        }
    };
    let answers = async {
        let mut buffer = vec![0; 1 << 16];
        while let Ok(n @ 1..) = from_server.read(&mut buffer).await {
            state.send_if_modified(|state| match state {
                State::ClosesAfter(words)
                    if buffer[..n].windows(words.len()).any(|part| part == words.as_bytes()) =>
                {
                    *state = State::Closed;
                    true
                }
                _ => false,
            });
            if to_client.write_all(&buffer[..n]).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = requests => {}
        () = answers => {}
    }
}
