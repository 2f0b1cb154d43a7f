//! What connections have in common: pipes, memory and time.

use tokio::task::yield_now;

use super::*;

#[test]
fn a_pipe_with_the_bytes_of_a_dead_connection_is_never_used_again() {
    run(1, true, async |buffers| {
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
    run(1, true, async |buffers| {
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
    run(8, true, async |buffers| {
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
    in_all_modes(async |buffers| {
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

#[test]
fn a_relay_stops_when_it_is_asked_and_only_while_nothing_is_under_way() {
    in_all_modes(async |buffers| {
        let mut relayed = Relayed::new(&buffers).await;
        let asked = async |relayed: &Relayed| {
            for _ in 0..10 {
                relayed.requests.ask(RelayRequest::Park);
                yield_now().await;
            }
            relayed.end.is_finished()
        };
        // Bytes that nobody takes yet, and then an end that the other side has not answered.
        stuff(&mut relayed.consumer).await;
        assert!(!asked(&relayed).await);
        relayed.consumer.shutdown().await.unwrap();
        relayed.endpoint.set_zero_linger().unwrap();
        assert!(!asked(&relayed).await);
        drop(relayed.endpoint);
        relayed.end.await.unwrap().unwrap_err();

        let relayed = Relayed::new(&buffers).await;
        while !asked(&relayed).await {}
        assert_eq!(relayed.end.await.unwrap().unwrap(), Ended::Idle);
    });
}

#[test]
fn a_relay_watches_its_endpoint_once_it_is_asked_to() {
    in_all_modes(async |buffers| {
        let (_client, consumer) = connection(None).await;
        let (endpoint, _server) = connection(None).await;
        let (moved, requests) = (Moved::default(), Requests::default());
        requests.watch_with(Patience::with_endpoints(Duration::from_secs(7)));
        let user_timeout = || SockRef::from(&endpoint).tcp_user_timeout().unwrap();
        let keepalive = || SockRef::from(&endpoint).keepalive().unwrap();
        let mut relay = pin!(relay(&consumer, &endpoint, &buffers, &moved, &requests));
        let mut turn = async || {
            let end = poll_fn(|cx| Poll::Ready(relay.as_mut().poll(cx))).await;
            assert!(end.is_pending());
        };
        turn().await;
        assert_eq!((keepalive(), user_timeout()), (false, None));
        requests.ask(RelayRequest::Watch);
        turn().await;
        assert_eq!((keepalive(), user_timeout()), (true, Some(Duration::from_secs(7))));
        // It can be asked again.
        requests.ask(RelayRequest::Park);
        let end = poll_fn(|cx| Poll::Ready(relay.as_mut().poll(cx))).await;
        assert!(matches!(end, Poll::Ready(Ok(Ended::Idle))));
    });
}
