//! The relay over real sockets, with pipes to splice through and without.

use std::{io, net::Ipv4Addr, pin::pin, rc::Rc, time::Duration};

use proptest::prelude::*;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    task::{JoinHandle, LocalSet, spawn_local, yield_now},
    time::timeout,
};

use super::*;
use crate::proxy::connection::{Socket, serve};

/// Far more than any of this takes, on a machine that is busy.
const DEADLINE: Duration = Duration::from_secs(10);

/// Runs a test with pipes, and with none.
fn in_both_modes<F: Future<Output = ()>>(test: impl Fn(Rc<RelayBuffers>) -> F) {
    for pipes in [8, 0] {
        run(pipes, &test);
    }
}

fn run<F: Future<Output = ()>>(pipes: usize, test: impl FnOnce(Rc<RelayBuffers>) -> F) {
    let buffers = Rc::new(RelayBuffers::new(pipes));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let end = LocalSet::new()
        .block_on(&runtime, async { timeout(DEADLINE, test(buffers.clone())).await });
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
    end: JoinHandle<Result<(), Broken>>,
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
        let end = spawn_local(async move {
            let (mut consumer, mut endpoint) = (Socket::new(to_consumer), Socket::new(to_endpoint));
            let end =
                in_turns(relay(&consumer.stream, &endpoint.stream, &buffers, &counted), &counted)
                    .await;
            consumer.finished = end.is_ok();
            endpoint.finished = end.is_ok();
            end
        });
        Self { consumer, endpoint, moved, end }
    }

    /// The same seen from the other side, so that a test can be run both ways.
    fn turned(self) -> Self {
        Self { consumer: self.endpoint, endpoint: self.consumer, ..self }
    }
}

/// Sees to it that a relay never takes more than its turn.
async fn in_turns<T>(relay: impl Future<Output = T>, moved: &Moved) -> T {
    let mut relay = pin!(relay);
    poll_fn(|cx| {
        let before = (moved.up.get(), moved.down.get());
        let end = relay.as_mut().poll(cx);
        let turn = (moved.up.get() - before.0).max(moved.down.get() - before.1);
        assert!(turn < Direction::TURN + RelayBuffers::SIZE as u64, "{turn} bytes at a time");
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

/// The error that a socket ends with, after whatever there is to read.
async fn error_of(socket: &mut TcpStream) -> io::ErrorKind {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match socket.read(&mut buffer).await {
            Ok(0) => panic!("a clean end instead of an error"),
            Ok(_) => {}
            Err(error) => return error.kind(),
        }
    }
}

/// The error that writing to a socket ends with.
async fn write_error_of(socket: &mut TcpStream) -> io::ErrorKind {
    loop {
        if let Err(error) = socket.write(b"x").await {
            return error.kind();
        }
        yield_now().await;
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

#[test]
fn both_ways_carry_the_same_bytes_while_one_side_is_slow() {
    const BYTES: usize = 50 * 1024 * 1024;
    for (size, slow_consumer) in [(Some(64 * 1024), true), (None, true), (None, false)] {
        in_both_modes(async |buffers| {
            let relayed = Relayed::with_buffers_of(size, &buffers).await;
            let (mut consumer, mut endpoint) = (relayed.consumer, relayed.endpoint);
            let (mut from_consumer, mut to_consumer) = consumer.split();
            let (mut from_endpoint, mut to_endpoint) = endpoint.split();
            let (up, down, _, _) = tokio::join!(
                read_noise(&mut from_endpoint, Noise::new(1), !slow_consumer),
                read_noise(&mut from_consumer, Noise::new(2), slow_consumer),
                async {
                    write_noise(&mut to_consumer, Noise::new(1), BYTES).await;
                    to_consumer.shutdown().await.unwrap();
                },
                async {
                    write_noise(&mut to_endpoint, Noise::new(2), BYTES).await;
                    to_endpoint.shutdown().await.unwrap();
                },
            );
            assert_eq!((up, down), (BYTES, BYTES));
            relayed.end.await.unwrap().unwrap();
            assert_eq!(relayed.moved.up.get(), BYTES as u64);
            assert_eq!(relayed.moved.down.get(), BYTES as u64);
        });
    }
}

#[test]
fn one_direction_may_end_long_before_the_other() {
    for turned in [false, true] {
        in_both_modes(async |buffers| {
            let mut relayed = Relayed::new(&buffers).await;
            if turned {
                relayed = relayed.turned();
            }
            let Relayed { mut consumer, mut endpoint, end, .. } = relayed;
            consumer.write_all(b"a question").await.unwrap();
            consumer.shutdown().await.unwrap();
            let mut question = String::new();
            endpoint.read_to_string(&mut question).await.unwrap();
            assert_eq!(question, "a question");
            assert!(!end.is_finished());

            for size in [1, 100, 3_000_000] {
                let (mut to, mut answer) = (&mut endpoint, vec![0; size]);
                let (_, read) = tokio::join!(
                    write_noise(&mut to, Noise::new(3), size),
                    consumer.read_exact(&mut answer)
                );
                read.unwrap();
                Noise::new(3).expect(&answer);
            }
            drop(endpoint);
            assert_eq!(consumer.read(&mut [0]).await.unwrap(), 0);
            end.await.unwrap().unwrap();
        });
    }
}

#[test]
fn the_server_may_speak_first() {
    in_both_modes(async |buffers| {
        let Relayed { mut consumer, mut endpoint, .. } = Relayed::new(&buffers).await;
        endpoint.write_all(b"hello").await.unwrap();
        let mut greeting = [0; 5];
        consumer.read_exact(&mut greeting).await.unwrap();
        assert_eq!(&greeting, b"hello");
    });
}

#[test]
fn an_end_that_comes_together_with_data_is_no_end_of_the_data() {
    for size in [1, 20_000, 256 * 1024, 1_000_000] {
        in_both_modes(async |buffers| {
            let Relayed { mut consumer, mut endpoint, end, .. } = Relayed::new(&buffers).await;
            let sender = spawn_local(async move {
                write_noise(&mut consumer, Noise::new(4), size).await;
            });
            assert_eq!(read_noise(&mut endpoint, Noise::new(4), false).await, size);
            sender.await.unwrap();
            drop(endpoint);
            end.await.unwrap().unwrap();
        });
    }
}

/// Which of the two directions have ended when the reset comes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Ended {
    None,
    /// That of the side that resets.
    Own,
    Others,
}

#[test]
fn a_reset_is_passed_on_as_a_reset() {
    for turned in [false, true] {
        for ended in [Ended::None, Ended::Own, Ended::Others] {
            in_both_modes(async |buffers| {
                let mut relayed = Relayed::new(&buffers).await;
                if turned {
                    relayed = relayed.turned();
                }
                let Relayed { mut consumer, mut endpoint, end, .. } = relayed;
                consumer.write_all(b"x").await.unwrap();
                endpoint.read_exact(&mut [0]).await.unwrap();
                match ended {
                    Ended::None => {}
                    Ended::Own => {
                        consumer.shutdown().await.unwrap();
                        assert_eq!(endpoint.read(&mut [0]).await.unwrap(), 0);
                    }
                    Ended::Others => {
                        endpoint.shutdown().await.unwrap();
                        assert_eq!(consumer.read(&mut [0]).await.unwrap(), 0);
                    }
                }
                reset(consumer);
                let broken = end.await.unwrap().unwrap_err();
                let side = if turned { Side::Endpoint } else { Side::Consumer };
                assert_eq!(broken.side, side, "{broken:?}, {ended:?}");
                // Once the end of a direction was read, reading shows no more than that.
                let error = match ended {
                    Ended::Own => write_error_of(&mut endpoint).await,
                    Ended::None | Ended::Others => error_of(&mut endpoint).await,
                };
                let expected = [io::ErrorKind::ConnectionReset, io::ErrorKind::BrokenPipe];
                assert!(expected.contains(&error), "{error:?}, {ended:?}");
            });
        }
    }
}

#[test]
fn a_reset_is_noticed_while_the_other_side_takes_nothing() {
    for turned in [false, true] {
        in_both_modes(async |buffers| {
            let mut relayed = Relayed::new(&buffers).await;
            if turned {
                relayed = relayed.turned();
            }
            let Relayed { mut consumer, mut endpoint, end, .. } = relayed;
            assert!(stuff(&mut consumer).await > 0);
            reset(consumer);
            end.await.unwrap().unwrap_err();
            assert_eq!(error_of(&mut endpoint).await, io::ErrorKind::ConnectionReset);
        });
    }
}

#[test]
fn a_side_that_closes_while_the_other_sends_ends_the_connection() {
    for turned in [false, true] {
        in_both_modes(async |buffers| {
            let mut relayed = Relayed::new(&buffers).await;
            if turned {
                relayed = relayed.turned();
            }
            let Relayed { mut consumer, endpoint, end, .. } = relayed;
            let sender = spawn_local(async move {
                loop {
                    if let Err(error) = consumer.write_all(&[7; 64 * 1024]).await {
                        return error.kind();
                    }
                }
            });
            yield_now().await;
            drop(endpoint);
            end.await.unwrap().unwrap_err();
            let error = sender.await.unwrap();
            let expected = [io::ErrorKind::ConnectionReset, io::ErrorKind::BrokenPipe];
            assert!(expected.contains(&error), "{error:?}");
        });
    }
}

/// As a web server does that refuses an upload: it says so and closes, with most of the upload unread.
#[test]
fn what_a_side_said_before_it_reset_is_heard() {
    const ANSWER: usize = 60_000;
    in_both_modes(async |buffers| {
        let Relayed { mut consumer, mut endpoint, end, .. } = Relayed::new(&buffers).await;
        stuff(&mut consumer).await;
        write_noise(&mut endpoint, Noise::new(5), ANSWER).await;
        drop(endpoint);
        end.await.unwrap().unwrap_err();
        let mut answer = vec![0; ANSWER];
        consumer.read_exact(&mut answer).await.unwrap();
        Noise::new(5).expect(&answer);
        assert_eq!(error_of(&mut consumer).await, io::ErrorKind::ConnectionReset);
    });
}

#[test]
fn a_pipe_with_the_bytes_of_a_dead_connection_is_never_used_again() {
    run(1, async |buffers| {
        for _ in 0..3 {
            // Enough for bulk, and nobody reads: bytes are left in the pipe.
            let Relayed { mut consumer, endpoint, end, .. } = Relayed::new(&buffers).await;
            let sender = spawn_local(async move {
                stuff(&mut consumer).await;
                consumer
            });
            let consumer = sender.await.unwrap();
            assert_eq!(buffers.pipes.borrow().made, 1, "the bulk was not spliced");
            assert!(buffers.pipes.borrow().idle.is_empty());
            reset(consumer);
            end.await.unwrap().unwrap_err();
            drop(endpoint);
            assert_eq!(buffers.pipes.borrow().made, 0);
        }
        // The next one gets its own bytes, and the pipe comes back.
        let Relayed { mut consumer, mut endpoint, end, .. } = Relayed::new(&buffers).await;
        let sender = spawn_local(async move {
            write_noise(&mut consumer, Noise::new(6), 10_000_000).await;
        });
        assert_eq!(read_noise(&mut endpoint, Noise::new(6), false).await, 10_000_000);
        sender.await.unwrap();
        drop(endpoint);
        end.await.unwrap().unwrap();
        assert_eq!(buffers.pipes.borrow().idle.len(), 1);
    });
}

#[test]
fn without_a_pipe_to_be_had_bulk_is_copied() {
    const BYTES: usize = 10_000_000;
    run(1, async |buffers| {
        // The only pipe is taken, and held.
        let mut holder = Relayed::new(&buffers).await;
        stuff(&mut holder.consumer).await;
        assert_eq!((buffers.pipes.borrow().made, buffers.pipes.borrow().idle.len()), (1, 0));

        let Relayed { mut consumer, mut endpoint, end, .. } = Relayed::new(&buffers).await;
        let sender = spawn_local(async move {
            write_noise(&mut consumer, Noise::new(7), BYTES).await;
        });
        assert_eq!(read_noise(&mut endpoint, Noise::new(7), false).await, BYTES);
        sender.await.unwrap();
        drop(endpoint);
        end.await.unwrap().unwrap();

        reset(holder.consumer);
        holder.end.await.unwrap().unwrap_err();
    });
}

#[test]
fn an_idle_connection_holds_nothing_after_bulk() {
    const BYTES: usize = 10_000_000;
    run(8, async |buffers| {
        let mut relayed = Relayed::new(&buffers).await;
        let mut received = vec![0; BYTES];
        let (_, read) = tokio::join!(
            write_noise(&mut relayed.consumer, Noise::new(8), BYTES),
            relayed.endpoint.read_exact(&mut received),
        );
        read.unwrap();
        Noise::new(8).expect(&received);
        // The relay sees that there is no more only when it looks again.
        while buffers.pipes.borrow().idle.len() < buffers.pipes.borrow().made {
            yield_now().await;
        }
        assert!(buffers.pipes.borrow().made > 0, "the bulk was not spliced");
        assert!(!relayed.end.is_finished());
    });
}

#[test]
fn bulk_leaves_its_neighbours_their_turn() {
    in_both_modes(async |buffers| {
        // Source and drain on threads of their own, so that the relay alone decides when to pause.
        let Relayed { consumer, endpoint, moved, .. } = Relayed::new(&buffers).await;
        let (source, drain) = (consumer.into_std().unwrap(), endpoint.into_std().unwrap());
        source.set_nonblocking(false).unwrap();
        drain.set_nonblocking(false).unwrap();
        let stop = source.try_clone().unwrap();
        let threads = [
            std::thread::spawn(move || {
                let mut source = source;
                // It ends when it is stopped.
                while io::Write::write(&mut source, &[7; 256 * 1024]).is_ok() {}
            }),
            std::thread::spawn(move || {
                let mut drain = drain;
                while io::Read::read(&mut drain, &mut [0; 256 * 1024]).is_ok_and(|n| n > 0) {}
            }),
        ];
        let mut neighbour = Relayed::new(&buffers).await;
        while moved.up.get() < 10 * 1024 * 1024 {
            yield_now().await;
        }
        for _ in 0..200 {
            neighbour.consumer.write_all(b"?").await.unwrap();
            neighbour.endpoint.read_exact(&mut [0]).await.unwrap();
            neighbour.endpoint.write_all(b"!").await.unwrap();
            neighbour.consumer.read_exact(&mut [0]).await.unwrap();
        }
        let before = moved.up.get();
        while moved.up.get() == before {
            yield_now().await;
        }
        stop.shutdown(std::net::Shutdown::Both).unwrap();
        for thread in threads {
            while !thread.is_finished() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            thread.join().unwrap();
        }
    });
}

/// What one connection costs in our own memory, besides its two sockets and its record: 848 bytes when this was written.
/// Thousands of bytes would be a buffer that found its way into the future.
#[test]
fn a_connection_is_small() {
    fn size<A, B, F>(_: impl Fn(A, B) -> F) -> usize {
        size_of::<F>()
    }
    let size = size(serve);
    assert!(size <= 1_024, "{size} bytes");
}

/// What one side does: the sizes of its writes and of its reads, in turn.
fn side() -> impl Strategy<Value = (Vec<usize>, Vec<usize>)> {
    let size = || prop_oneof![1..64usize, 1_000..20_000usize, 60_000..600_000usize];
    (prop::collection::vec(size(), 0..12), prop::collection::vec(size(), 1..6))
}

async fn play(
    mut socket: TcpStream,
    writes: Vec<usize>,
    reads: Vec<usize>,
    own: u64,
    other: u64,
) -> usize {
    let (mut from, mut to) = socket.split();
    let write = async {
        let mut noise = Noise::new(own);
        for size in writes {
            let mut left = size;
            while left > 0 {
                let next = noise.next(left);
                to.write_all(next).await.unwrap();
                left -= next.len();
            }
            yield_now().await;
        }
        to.shutdown().await.unwrap();
    };
    let read = async {
        let (mut noise, mut bytes) = (Noise::new(other), 0);
        for size in reads.into_iter().cycle() {
            let mut buffer = vec![0; size];
            let count = from.read(&mut buffer).await.unwrap();
            if count == 0 {
                break;
            }
            noise.expect(&buffer[..count]);
            bytes += count;
            yield_now().await;
        }
        bytes
    };
    tokio::join!(write, read).1
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// However bytes are cut into writes and reads, they come out as they went in.
    #[test]
    fn bytes_come_out_as_they_went_in(consumer in side(), endpoint in side(), pipes in 0..3usize) {
        run(pipes, async |buffers| {
            let relayed = Relayed::new(&buffers).await;
            let (up, down) = (consumer.0.iter().sum::<usize>(), endpoint.0.iter().sum::<usize>());
            let (received_down, received_up) = tokio::join!(
                play(relayed.consumer, consumer.0, consumer.1, 1, 2),
                play(relayed.endpoint, endpoint.0, endpoint.1, 2, 1),
            );
            assert_eq!((received_up, received_down), (up, down));
            relayed.end.await.unwrap().unwrap();
        });
    }
}
