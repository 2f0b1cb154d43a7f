//! Watches the sockets of parked connections: one epoll set for all of them. A running connection costs a task, and
//! with each socket what the runtime keeps of it: some 2 KB. In the set a socket costs embassy no memory.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::event::epoll;
use tokio::io::{Interest, unix::AsyncFd};

use super::lists::Place;

#[derive(Debug)]
pub(super) struct IdleSet(AsyncFd<OwnedFd>);

impl IdleSet {
    /// To be made inside the worker's runtime.
    pub(super) fn new() -> io::Result<Self> {
        let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        // SAFETY: `AsyncFd` needs a descriptor that stays open and is this one for as long as it has it. It owns it, and
        // nothing here hands it out but borrowed.
        #[allow(unsafe_code)]
        let set = unsafe { AsyncFd::register_with_interest(set, Interest::READABLE) }?;
        Ok(Self(set))
    }

    /// Watches both sockets of a connection. What has happened to them since they were looked at last is noticed too: the
    /// set tells of a socket's state, not of its changes.
    ///
    /// An error if the kernel does not take more (fs.epoll.max_user_watches); then neither is watched.
    pub(super) fn add(&self, place: Place, sockets: [&OwnedFd; 2]) -> io::Result<()> {
        let [first, second] = sockets;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP;
        let add = |socket: &OwnedFd| {
            epoll::add(&self.0, socket, epoll::EventData::new_u64(place.get() as u64), flags)
        };
        add(first)?;
        add(second).inspect_err(|_| self.forget(first))?;
        Ok(())
    }

    pub(super) fn remove(&self, sockets: [&OwnedFd; 2]) {
        sockets.into_iter().for_each(|socket| self.forget(socket));
    }

    /// Waits until something happened to some connections: their places. One with two sockets that have something to tell
    /// is there twice.
    pub(super) async fn woken(&self) -> io::Result<Vec<Place>> {
        self.0
            .async_io(Interest::READABLE, |set| {
                const AT_A_TIME: usize = 64;
                let mut events = Vec::with_capacity(AT_A_TIME);
                let room = rustix::buffer::spare_capacity(&mut events);
                epoll::wait(set, room, Some(&Default::default()))?;
                if events.is_empty() {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                let place = |event: &epoll::Event| usize::try_from(event.data.u64()).ok();
                Ok(events.iter().filter_map(place).map(Place::new).collect())
            })
            .await
    }

    fn forget(&self, socket: &OwnedFd) {
        // It fails only if the socket is not in the set.
        let _ = epoll::delete(self.0.as_fd(), socket);
    }
}
