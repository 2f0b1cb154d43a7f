//! The life of a connection that has a route: connect, relay, end.

use std::os::fd::OwnedFd;

use tokio::net::TcpStream;

use super::{
    connect::connect,
    relay::{Broken, Ended, Side, relay},
    socket::Socket,
    worker::Ticket,
};
use crate::{balance::Lease, outcome::Outcome};

/// Serves a connection until it ends or is parked.
pub(super) async fn serve(ticket: Ticket, mut consumer: Socket) {
    // In a box that is given back before the relay begins: a future keeps the room of all that it ever awaits.
    let connected = Box::pin(connect_or_stand_still(&ticket, &consumer)).await;
    match connected {
        Ok((stream, lease)) => {
            let mut endpoint = Socket::new(stream);
            let end = pass_on(&ticket, &mut consumer, &mut endpoint).await;
            end.take_effect(ticket, lease);
        }
        Err(outcome) => ticket.end(outcome),
    }
}

/// Connects, from the start again after the worker stood still: another process may have got the consumer's socket meanwhile, and if
/// not, nothing of the consumer was read.
async fn connect_or_stand_still(
    ticket: &Ticket,
    consumer: &Socket,
) -> Result<(TcpStream, Lease), Outcome> {
    let frozen = &ticket.worker().frozen;
    loop {
        tokio::select! {
            biased;
            () = frozen.begun() => {}
            connected = connect(ticket, &consumer.stream) => return connected,
        }
        frozen.lay_out(ticket.place(), consumer);
        frozen.over().await;
    }
}

/// Serves a connection that was parked, until it ends or is parked again.
pub(super) async fn carry_on(
    ticket: Ticket,
    mut consumer: Socket,
    mut endpoint: Socket,
    lease: Lease,
) {
    let end = pass_on(&ticket, &mut consumer, &mut endpoint).await;
    end.take_effect(ticket, lease);
}

/// How a task has done with its connection.
enum TaskEnd {
    /// It goes on without a task, by these sockets.
    Parked(OwnedFd, OwnedFd),
    Ended(Outcome),
}

impl TaskEnd {
    fn take_effect(self, ticket: Ticket, lease: Lease) {
        match self {
            Self::Parked(consumer, endpoint) => ticket.park((consumer, endpoint), lease),
            Self::Ended(outcome) => {
                // The consumer may dial again at once: by then this connection is not counted any more.
                drop(lease);
                ticket.end(outcome);
            }
        }
    }
}

/// Relays a connection until it ends or can be parked. Its sockets are borrowed, and by all that serve one: a future keeps
/// the room of what has been moved out of it.
async fn pass_on(ticket: &Ticket, consumer: &mut Socket, endpoint: &mut Socket) -> TaskEnd {
    let (buffers, record) = (&ticket.worker().buffers, ticket.record());
    loop {
        let (moved, requests) = (&record.moved, ticket.requests());
        match relay(&consumer.stream, &endpoint.stream, buffers, moved, requests).await {
            Ok(Ended::Idle) => match ticket.watch(consumer, endpoint) {
                Ok((to_consumer, to_endpoint)) => {
                    consumer.leave_to_duplicate();
                    endpoint.leave_to_duplicate();
                    return TaskEnd::Parked(to_consumer, to_endpoint);
                }
                // It keeps its task.
                Err(error) => tracing::debug!(%error, "cannot park connection"),
            },
            Ok(Ended::Suspended) => match (consumer.duplicate(), endpoint.duplicate()) {
                (Ok(to_consumer), Ok(to_endpoint)) => {
                    consumer.leave_to_duplicate();
                    endpoint.leave_to_duplicate();
                    return TaskEnd::Parked(to_consumer, to_endpoint);
                }
                // It keeps its task, and goes on here.
                (Err(error), _) | (_, Err(error)) => {
                    tracing::debug!(%error, "cannot suspend connection");
                }
            },
            Ok(Ended::Finished) => {
                consumer.finished = true;
                endpoint.finished = true;
                return TaskEnd::Ended(Outcome::Closed);
            }
            Err(Broken { side, error, after_end }) => {
                tracing::debug!(?side, %error, after_end, route = %record.route.key, "connection broken");
                return TaskEnd::Ended(match side {
                    _ if after_end => Outcome::ResetAfterClose,
                    Side::Consumer => Outcome::ConsumerReset,
                    Side::Endpoint => Outcome::EndpointReset,
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a running connection costs in our own memory, besides its two sockets, its record and its place: 976 bytes when
    /// this was written. Thousands of bytes would be a buffer that found its way into the future.
    #[test]
    fn a_connections_task_is_small() {
        fn of_served<A, B, F>(_: impl Fn(A, B) -> F) -> usize {
            size_of::<F>()
        }
        fn of_resumed<A, B, C, D, F>(_: impl Fn(A, B, C, D) -> F) -> usize {
            size_of::<F>()
        }
        let sizes = (of_served(serve), of_resumed(carry_on));
        assert!(sizes.0 <= 1_024 && sizes.1 <= 1_024, "{sizes:?} bytes");
    }
}
