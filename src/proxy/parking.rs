//! Where connections wait that have been idle for a while. A running one costs a task, and with each socket what the
//! runtime keeps of it: some 2 KB. A parked one is an entry in a list, and its two sockets are in an epoll set that all
//! share. Whatever happens to one of them brings the connection back to a task.

use std::{
    cell::RefCell,
    io,
    os::fd::{AsFd, OwnedFd},
    time::Instant,
};

use rustix::event::epoll;
use slab::Slab;
use tokio::io::{Interest, unix::AsyncFd};

use super::connection::Record;
use crate::balance::Lease;

/// A connection without a task. Nothing of it waits to be passed on, and neither side has finished. Dropping it resets
/// both sides.
#[derive(Debug)]
pub(super) struct Parked {
    /// Its number, the same as before and after.
    pub id: u64,
    pub record: Record,
    pub lease: Lease,
    /// Its endpoint went away, and it has until then.
    pub doomed: Option<Instant>,
    pub consumer: OwnedFd,
    pub endpoint: OwnedFd,
}

/// The parked connections of a worker.
#[derive(Debug)]
pub(super) struct Parking {
    set: AsyncFd<OwnedFd>,
    places: RefCell<Slab<Parked>>,
}

impl Parking {
    /// To be made inside the worker's runtime.
    pub(super) fn new() -> io::Result<Self> {
        let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        // SAFETY: `AsyncFd` needs a descriptor that stays open and is this one for as long as it has it. It owns it, and
        // nothing here hands it out but borrowed.
        #[allow(unsafe_code)]
        let set = unsafe { AsyncFd::register_with_interest(set, Interest::READABLE) }?;
        Ok(Self { set, places: RefCell::default() })
    }

    /// Takes a connection in. What has happened to it since it was looked at last is noticed too: the set tells of a
    /// socket's state, not of its changes.
    ///
    /// Gives it back where the kernel does not take one more (fs.epoll.max_user_watches).
    pub(super) fn park(&self, parked: Parked) -> Option<Parked> {
        let mut places = self.places.borrow_mut();
        let place = places.vacant_entry();
        let data = || epoll::EventData::new_u64(place.key() as u64);
        let add = |socket: &OwnedFd| {
            epoll::add(&self.set, socket, data(), epoll::EventFlags::IN | epoll::EventFlags::RDHUP)
        };
        if add(&parked.consumer).is_err() {
            return Some(parked);
        }
        if add(&parked.endpoint).is_err() {
            self.forget(&parked.consumer);
            return Some(parked);
        }
        place.insert(parked);
        None
    }

    /// Waits until something happened to some of them, and gives those out.
    pub(super) async fn woken(&self) -> io::Result<Vec<Parked>> {
        self.set
            .async_io(Interest::READABLE, |_| {
                let woken = self.take_woken()?;
                if woken.is_empty() { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(woken) }
            })
            .await
    }

    /// Takes out those that `judge` has a verdict on.
    pub(super) fn take_if<V>(
        &self,
        mut judge: impl FnMut(&mut Parked) -> Option<V>,
    ) -> Vec<(Parked, V)> {
        let mut places = self.places.borrow_mut();
        let verdicts: Vec<_> =
            places.iter_mut().filter_map(|(place, parked)| Some((place, judge(parked)?))).collect();
        verdicts
            .into_iter()
            .filter_map(|(place, verdict)| Some((places.try_remove(place)?, verdict)))
            .inspect(|(parked, _)| self.release(parked))
            .collect()
    }

    /// Looks at those in so many places from `first` on. The place to go on from; `None` where there are no more.
    pub(super) fn look_from(
        &self,
        first: usize,
        places: usize,
        look: impl FnMut(&Parked),
    ) -> Option<usize> {
        let all = self.places.borrow();
        let end = first.saturating_add(places).min(all.capacity());
        (first..end).filter_map(|place| all.get(place)).for_each(look);
        (end < all.capacity()).then_some(end)
    }

    /// The earliest moment at which one of them has to end.
    pub(super) fn next_doom(&self) -> Option<Instant> {
        self.places.borrow().iter().filter_map(|(_, parked)| parked.doomed).min()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.places.borrow().is_empty()
    }

    fn take_woken(&self) -> io::Result<Vec<Parked>> {
        const AT_A_TIME: usize = 64;
        let mut events = Vec::with_capacity(AT_A_TIME);
        epoll::wait(
            &self.set,
            rustix::buffer::spare_capacity(&mut events),
            Some(&Default::default()),
        )?;
        let mut places = self.places.borrow_mut();
        // Where both of its sockets have something to tell, the second event finds the place empty.
        let woken = events.iter().filter_map(|event| {
            let place = usize::try_from(event.data.u64()).ok()?;
            places.try_remove(place)
        });
        Ok(woken.inspect(|parked| self.release(parked)).collect())
    }

    fn release(&self, parked: &Parked) {
        self.forget(&parked.consumer);
        self.forget(&parked.endpoint);
    }

    fn forget(&self, socket: &OwnedFd) {
        // It fails only where the socket is not in the set.
        let _ = epoll::delete(self.set.as_fd(), socket);
    }
}
