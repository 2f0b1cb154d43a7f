//! A relay that is suspended again and again: the next one goes on with what it held.

use super::*;

/// Suspends a relay as often as it can be, until it has ended.
async fn suspend(requests: Rc<Requests>, times: Rc<std::cell::Cell<usize>>) {
    loop {
        requests.ask(RelayRequest::Suspend);
        times.set(times.get() + 1);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Bulk both ways, with readers that are slower than the writers: there is always something in a pipe, or kept.
#[test]
fn not_a_byte_is_lost_or_doubled_however_often_a_relay_is_suspended() {
    in_all_modes(|buffers| async move {
        const BYTES: usize = 12 << 20;
        let Relayed { consumer, endpoint, moved, requests, end } =
            Relayed::with_buffers_of(Some(64 << 10), &buffers).await;
        let times = Rc::<std::cell::Cell<usize>>::default();
        let suspending = spawn_local(suspend(requests, times.clone()));
        let (up, down) = (Noise::new(1), Noise::new(2));
        let (mut from_consumer, mut to_consumer) = consumer.into_split();
        let (mut from_endpoint, mut to_endpoint) = endpoint.into_split();
        let (up_read, down_read) = (up.clone(), down.clone());
        let (_, _, at_endpoint, at_consumer) = tokio::join!(
            async {
                write_noise(&mut to_consumer, up, BYTES).await;
                to_consumer.shutdown().await.unwrap();
            },
            async {
                write_noise(&mut to_endpoint, down, BYTES).await;
                to_endpoint.shutdown().await.unwrap();
            },
            read_noise(&mut from_endpoint, up_read, true),
            read_noise(&mut from_consumer, down_read, true),
        );
        suspending.abort();
        assert_eq!((at_endpoint, at_consumer), (BYTES, BYTES));
        assert_eq!(end.await.unwrap().unwrap(), Ended::Finished);
        assert_eq!((moved.up.get(), moved.down.get()), (BYTES as u64, BYTES as u64));
        assert!(times.get() > 10, "{} times", times.get());
    });
}

/// One side has finished, and the other speaks on.
#[test]
fn a_half_closed_connection_is_suspended_as_it_is() {
    in_all_modes(|buffers| async move {
        for turned in [false, true] {
            let relayed = Relayed::new(&buffers).await;
            let relayed = if turned { relayed.turned() } else { relayed };
            let Relayed { mut consumer, mut endpoint, requests, end, .. } = relayed;
            consumer.write_all(b"last").await.unwrap();
            consumer.shutdown().await.unwrap();
            let mut heard = String::new();
            endpoint.read_to_string(&mut heard).await.unwrap();
            assert_eq!(heard, "last");
            for _ in 0..3 {
                requests.ask(RelayRequest::Suspend);
                endpoint.write_all(b"x").await.unwrap();
                consumer.read_exact(&mut [0]).await.unwrap();
            }
            drop(endpoint);
            assert_eq!(consumer.read(&mut [0]).await.unwrap(), 0);
            assert_eq!(end.await.unwrap().unwrap(), Ended::Finished);
        }
    });
}
