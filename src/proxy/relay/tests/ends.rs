//! How one side ends is how the other sees it end.

use tokio::task::yield_now;

use super::*;

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
            in_all_modes(async |buffers| {
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
                assert_eq!(broken.after_end, ended != Ended::None, "{broken:?}, {ended:?}");
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

/// As TLS does: one side says that it has finished and closes, and the other's last words meet a socket that is closed.
#[test]
fn an_end_that_arrives_together_with_the_reset_was_an_end() {
    for turned in [false, true] {
        for resets_itself in [false, true] {
            in_all_modes(async |buffers| {
                let mut relayed = Relayed::new(&buffers).await;
                if turned {
                    relayed = relayed.turned();
                }
                let Relayed { mut consumer, mut endpoint, end, .. } = relayed;
                consumer.write_all(b"x").await.unwrap();
                endpoint.read_exact(&mut [0]).await.unwrap();
                // Nothing is awaited between the two: the relay finds both at once.
                rustix::net::shutdown(&consumer, rustix::net::Shutdown::Write).unwrap();
                reset(if resets_itself { consumer } else { endpoint });
                let broken = end.await.unwrap().unwrap_err();
                assert!(broken.after_end, "{broken:?}");
            });
        }
    }
}

/// Its program closes before it has read the other's goodbye, and the kernel then sends no end, but a reset.
#[test]
fn a_reset_after_both_sides_said_goodbye_in_tls_was_an_end() {
    let goodbye = [&[23, 3, 3, 0, 19][..], &[9; 19]].concat();
    for turned in [false, true] {
        for (both, is_end) in [(true, true), (false, false)] {
            in_all_modes(async |buffers| {
                let mut relayed = Relayed::new(&buffers).await;
                if turned {
                    relayed = relayed.turned();
                }
                let Relayed { mut consumer, mut endpoint, end, .. } = relayed;
                consumer.write_all(&goodbye).await.unwrap();
                endpoint.read_exact(&mut vec![0; goodbye.len()]).await.unwrap();
                let answer = if both { &goodbye[..] } else { b"in the middle of it" };
                endpoint.write_all(answer).await.unwrap();
                consumer.readable().await.unwrap();
                reset(consumer);
                let broken = end.await.unwrap().unwrap_err();
                assert_eq!(broken.after_end, is_end, "{broken:?}");
            });
        }
    }
}

/// Nobody said that it had finished: what the other side waits for is lost.
#[test]
fn a_peer_that_does_not_answer_is_no_end() {
    in_all_modes(async |buffers| {
        let Relayed { mut consumer, mut endpoint, end, .. } = Relayed::new(&buffers).await;
        consumer.write_all(b"x").await.unwrap();
        endpoint.read_exact(&mut [0]).await.unwrap();
        reset(endpoint);
        reset(consumer);
        let broken = end.await.unwrap().unwrap_err();
        assert!(!broken.after_end, "{broken:?}");
        for (error, follows) in [(Errno::TIMEDOUT, false), (Errno::CONNRESET, true)] {
            let broken = Broken { error: error.into(), ..broken };
            assert_eq!(broken.follows_end(true), follows, "{error}");
        }
    });
}

#[test]
fn a_reset_is_noticed_while_the_other_side_takes_nothing() {
    for turned in [false, true] {
        in_all_modes(async |buffers| {
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
        in_all_modes(async |buffers| {
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
    in_all_modes(async |buffers| {
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
