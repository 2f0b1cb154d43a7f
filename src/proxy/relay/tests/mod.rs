//! The relay over real sockets, with pipes to splice through and without.

use std::{io, net::Ipv4Addr, pin::pin, rc::Rc, time::Duration};

use rustix::io::Errno;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    task::{JoinHandle, LocalSet, spawn_local},
    time::timeout,
};

use super::{batch::Ring, *};
use crate::proxy::socket::Socket;

mod bytes;
mod ends;
mod sharing;
mod suspended;

/// Far more than any of this takes, on a machine that is busy.
const DEADLINE: Duration = Duration::from_secs(120);

/// Runs a test with pipes and with none, with messages sent together and each by itself.
fn in_all_modes<F: Future<Output = ()>>(test: impl Fn(Rc<RelayBuffers>) -> F) {
    for (pipes, ring) in [(8, true), (8, false), (0, true), (0, false)] {
        run(pipes, ring, &test);
    }
}

fn run<F: Future<Output = ()>>(pipes: usize, ring: bool, test: impl FnOnce(Rc<RelayBuffers>) -> F) {
    let ring = ring.then(|| Ring::new().expect("this kernel has io_uring"));
    let buffers = Rc::new(RelayBuffers::with(pipes, ring));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let end = LocalSet::new().block_on(&runtime, async {
        let sending = buffers.clone();
        let sending = spawn_local(async move { sending.send_queued().await });
        let end = timeout(DEADLINE, test(buffers.clone())).await;
        sending.abort();
        end
    });
    end.unwrap_or_else(|_| panic!("hangs with {pipes} pipes"));
    // Whatever ended how: what lies in the pool is empty, and nothing is counted that is not there.
    let pool = buffers.pipes.borrow();
    assert_eq!(pool.made, pool.idle.len());
    for pipe in &pool.idle {
        let read = rustix::io::read(&pipe.read, &mut [0; 1]);
        assert_eq!(read, Err(Errno::AGAIN), "bytes were left in a pipe");
    }
}

/// A relayed connection: what consumer and endpoint hold of it, and how it ended.
struct Relayed {
    consumer: TcpStream,
    endpoint: TcpStream,
    moved: Rc<Moved>,
    requests: Rc<Requests>,
    end: JoinHandle<Result<Ended, Broken>>,
}

impl Relayed {
    async fn new(buffers: &Rc<RelayBuffers>) -> Self {
        Self::with_buffers_of(None, buffers).await
    }

    /// With socket buffers of this many bytes at both of the proxy's sockets and at both ends.
    async fn with_buffers_of(size: Option<u32>, buffers: &Rc<RelayBuffers>) -> Self {
        let (consumer, to_consumer) = connection(size).await;
        let (to_endpoint, endpoint) = connection(size).await;
        let (buffers, moved) = (buffers.clone(), Rc::<Moved>::default());
        let counted = moved.clone();
        let requests = Rc::<Requests>::default();
        let asked = requests.clone();
        let end = spawn_local(async move {
            let (mut consumer, mut endpoint) = (Socket::new(to_consumer), Socket::new(to_endpoint));
            let end = loop {
                let relay = relay(&consumer.stream, &endpoint.stream, &buffers, &counted, &asked);
                match in_turns(relay, &counted, &buffers).await {
                    // Another relay goes on, as in another process.
                    Ok(Ended::Suspended) => {}
                    end => break end,
                }
            };
            consumer.finished = end.is_ok();
            endpoint.finished = end.is_ok();
            end
        });
        Self { consumer, endpoint, moved, requests, end }
    }

    /// The same seen from the other side, so that a test can be run both ways.
    fn turned(self) -> Self {
        Self { consumer: self.endpoint, endpoint: self.consumer, ..self }
    }
}

/// Sees to it that a relay never takes more than its turn.
async fn in_turns<T>(relay: impl Future<Output = T>, moved: &Moved, buffers: &RelayBuffers) -> T {
    let mut relay = pin!(relay);
    poll_fn(|cx| {
        // Of both directions: the first of them may bring the long turns, and the second end them.
        let most = buffers.turns.most_of_next(2);
        let before = (moved.up.get(), moved.down.get());
        let end = relay.as_mut().poll(cx);
        // It may become less: what was queued may turn out not to be sent.
        let (up, down) = (moved.up.get(), moved.down.get());
        let turn = up.saturating_sub(before.0).max(down.saturating_sub(before.1));
        let bound = u64::from(2 * most);
        assert!(turn <= bound, "{turn} bytes at a time where {most} may be moved");
        end
    })
    .await
}

/// The two ends of one connection: who dialled, who was dialled.
async fn connection(size: Option<u32>) -> (TcpStream, TcpStream) {
    let (server, client) = (TcpSocket::new_v4().unwrap(), TcpSocket::new_v4().unwrap());
    for socket in [&server, &client] {
        if let Some(size) = size {
            socket.set_recv_buffer_size(size).unwrap();
            socket.set_send_buffer_size(size).unwrap();
        }
    }
    server.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let listener: TcpListener = server.listen(1).unwrap();
    let address = listener.local_addr().unwrap();
    let (client, accepted) = tokio::join!(client.connect(address), listener.accept());
    (client.unwrap(), accepted.unwrap().0)
}

/// An endless sequence of bytes; it repeats after so many that no lost or doubled block goes unnoticed.
#[derive(Clone)]
struct Noise {
    block: Rc<[u8]>,
    at: usize,
}

impl Noise {
    fn new(seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        Self { block: std::iter::repeat_with(|| random.u8(..)).take(65_521).collect(), at: 0 }
    }

    /// Up to `most` of the bytes that come next.
    fn next(&mut self, most: usize) -> &[u8] {
        let start = self.at;
        let end = self.block.len().min(start + most);
        self.at = end % self.block.len();
        &self.block[start..end]
    }

    /// Takes these to be the bytes that come next.
    fn expect(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let next = self.next(bytes.len()).len();
            let start = if self.at == 0 { self.block.len() - next } else { self.at - next };
            assert!(self.block[start..start + next] == bytes[..next], "other bytes than were sent");
            bytes = &bytes[next..];
        }
    }
}

async fn write_noise(to: &mut (impl AsyncWriteExt + Unpin), mut noise: Noise, bytes: usize) {
    let mut left = bytes;
    while left > 0 {
        let next = noise.next(left);
        to.write_all(next).await.unwrap();
        left -= next.len();
    }
}

/// Reads to the end. How many bytes that was.
async fn read_noise(from: &mut (impl AsyncRead + Unpin), mut noise: Noise, slow: bool) -> usize {
    let mut buffer = vec![0; if slow { 16 * 1024 } else { 256 * 1024 }];
    let (mut bytes, mut rest) = (0, 0);
    loop {
        let count = from.read(&mut buffer).await.unwrap();
        if count == 0 {
            return bytes;
        }
        noise.expect(&buffer[..count]);
        bytes += count;
        if slow && bytes / (1024 * 1024) > rest {
            rest = bytes / (1024 * 1024);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Writes until nothing more is taken.
async fn stuff(socket: &mut TcpStream) -> usize {
    let mut bytes = 0;
    while let Ok(written) = timeout(Duration::from_millis(300), socket.write(&[7; 64 * 1024])).await
    {
        bytes += written.unwrap();
    }
    bytes
}

fn reset(socket: TcpStream) {
    socket.set_zero_linger().unwrap();
}
