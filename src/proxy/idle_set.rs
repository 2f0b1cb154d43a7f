//! Watches the sockets of parked connections, with one epoll set for all of them. A running connection costs a task, and
//! what the runtime keeps for each socket: some 2 KB. In the set a socket costs embassy no memory.

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
    /// Must be called inside the worker's runtime.
    pub(super) fn new() -> io::Result<Self> {
        let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        // SAFETY: `AsyncFd` needs a descriptor that stays open and does not change as long as `AsyncFd` has it. It owns
        // this one, and nothing here gives it out except borrowed.
        #[allow(unsafe_code)]
        let set = unsafe { AsyncFd::register_with_interest(set, Interest::READABLE) }?;
        Ok(Self(set))
    }

    /// Watches both sockets of a connection. Events since the last look are noticed too, because the set is
    /// level-triggered.
    ///
    /// An error if the kernel accepts no more (fs.epoll.max_user_watches). Then neither socket is watched.
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

    /// Waits until something happens to some connections. Returns their places. If something happened to both sockets of a
    /// connection, it is returned twice.
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
        // Fails only if the socket is not in the set.
        let _ = epoll::delete(self.0.as_fd(), socket);
    }
}
