//! Bytes come out as they went in.

use proptest::prelude::*;
use tokio::task::yield_now;

use super::*;

#[test]
fn both_ways_carry_the_same_bytes_while_one_side_is_slow() {
    const BYTES: usize = 50 * 1024 * 1024;
    for (size, slow_consumer) in [(Some(64 * 1024), true), (None, true), (None, false)] {
        in_all_modes(async |buffers| {
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
        in_all_modes(async |buffers| {
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
    in_all_modes(async |buffers| {
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
        in_all_modes(async |buffers| {
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

/// What one side does: the sizes of its writes, and of its first reads.
fn side() -> impl Strategy<Value = (Vec<usize>, Vec<usize>)> {
    let size = || prop_oneof![1..64usize, 1_000..20_000usize, 60_000..600_000usize];
    (prop::collection::vec(size(), 0..12), prop::collection::vec(size(), 0..60))
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
        for size in reads.into_iter().chain(std::iter::repeat(64 * 1024)) {
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
    fn bytes_come_out_as_they_went_in(consumer in side(), endpoint in side(), pipes in 0..3usize, ring: bool) {
        run(pipes, ring, async |buffers| {
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
