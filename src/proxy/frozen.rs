//! A worker stands still for a takeover: it accepts nothing, moves nothing and ends nothing, so that another process can have its
//! sockets.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    os::fd::OwnedFd,
    rc::Rc,
    time::Instant,
};

use tokio::sync::Notify;

use super::{
    captured::Captured, connections::Live, lists::Place, relay::Suspended, socket::Socket,
};

#[derive(Debug, Default)]
pub(super) struct Frozen {
    since: Cell<Option<Instant>>,
    changed: Notify,
    /// The sockets of consumers whose connections were being opened.
    laid_out: RefCell<HashMap<Place, OwnedFd>>,
    /// What the connections held whose relays were suspended.
    pub(super) suspended: RefCell<HashMap<Place, Box<[Suspended; 2]>>>,
    /// Connections of another process that get their task when the worker goes on.
    pub(super) adopted: RefCell<Vec<Adopted>>,
}

/// A connection of another process that is not open. Its socket is the consumer's.
#[derive(Debug)]
pub(super) enum Adopted {
    Connecting(Place, Rc<Live>, OwnedFd),
    Held(Captured, OwnedFd),
}

impl Frozen {
    pub(super) fn is(&self) -> bool {
        self.since.get().is_some()
    }

    pub(super) fn begin(&self) {
        if !self.is() {
            self.since.set(Some(Instant::now()));
            self.changed.notify_waiters();
        }
    }

    /// Since when it stood still.
    pub(super) fn end(&self) -> Option<Instant> {
        let since = self.since.take();
        self.laid_out.borrow_mut().clear();
        self.changed.notify_waiters();
        since
    }

    /// Waits until the worker stands still. Cancel-safe.
    pub(super) async fn begun(&self) {
        // Of one thread: nothing happens between the look and the wait.
        while !self.is() {
            self.changed.notified().await;
        }
    }

    /// Waits until the worker does not stand still. Cancel-safe.
    pub(super) async fn over(&self) {
        while self.is() {
            self.changed.notified().await;
        }
    }

    /// Shows the socket of a consumer whose connection was being opened.
    pub(super) fn lay_out(&self, place: Place, consumer: &Socket) {
        // Without a descriptor it stays here.
        if let Ok(socket) = consumer.duplicate() {
            self.laid_out.borrow_mut().insert(place, socket);
        }
    }

    pub(super) fn is_laid_out(&self, place: Place) -> bool {
        self.laid_out.borrow().contains_key(&place)
    }

    /// A duplicate of the socket that was laid out at a place.
    pub(super) fn laid_out(&self, place: Place) -> Option<OwnedFd> {
        self.laid_out.borrow().get(&place)?.try_clone().ok()
    }
}
