//! Sends the messages of many connections with one system call.
//!
//! A message wakes its receiver. If each message is sent by its own system call, the kernel usually runs the receiver first, so the
//! worker loses the CPU and its caches after every message. Therefore the worker queues messages while it reads all ready sockets, and
//! then sends them together with io_uring (man 7 io_uring). If the kernel or the container's seccomp profile does not allow io_uring,
//! each message is sent with its own call.

use std::{
    collections::HashMap,
    fmt, io,
    ops::Range,
    os::fd::{AsRawFd, BorrowedFd, RawFd},
    task::Waker,
};

use io_uring::{IoUring, Probe, opcode, types};
use rustix::net::{SendFlags, send};

/// A worker's queued messages, and the one buffer into which the worker reads.
#[derive(Debug)]
pub(super) struct Batch {
    /// The queued bytes, one message after the other, followed by room for the next read.
    buffer: Box<[u8]>,
    used: usize,
    queue: Vec<Queued>,
    /// The number of the first queued message. Earlier messages are sent, or in `unsent`.
    first: u64,
    unsent: HashMap<u64, Unsent>,
    ring: Option<Ring>,
    /// The result of each queued message, while the queue is sent.
    results: Vec<Option<io::Result<usize>>>,
}

#[derive(Debug)]
struct Queued {
    /// `None` if the message was withdrawn.
    to: Option<RawFd>,
    bytes: Range<usize>,
    /// The task that waits for this message, if any. It is woken if some of the message is left.
    task: Waker,
    is_awaited: bool,
}

/// The rest of a message that could not be sent completely.
#[derive(Debug)]
pub(super) struct Unsent {
    pub bytes: Box<[u8]>,
    /// `None` if the socket takes no more for now.
    pub error: Option<io::Error>,
}

impl Batch {
    /// Large enough that a bulk stream needs few calls, small enough to stay in a core's second-level cache.
    const BUFFER: usize = 256 * 1024;

    /// In the thread that will use it.
    pub(super) fn new(ring: Option<Ring>) -> Self {
        Self {
            buffer: vec![0; Self::BUFFER].into(),
            used: 0,
            queue: Vec::new(),
            first: 0,
            unsent: HashMap::new(),
            ring,
            results: Vec::new(),
        }
    }

    /// Room to read `size` bytes into, or the maximum if that is less. May send the queue to make room.
    #[expect(
        clippy::indexing_slicing,
        reason = "what is used and asked for fits, or was just sent"
    )]
    pub(super) fn room(&mut self, size: usize) -> &mut [u8] {
        let size = size.min(self.buffer.len());
        if self.buffer.len() - self.used < size || self.queue.len() == Ring::ENTRIES {
            self.send();
        }
        &mut self.buffer[self.used..][..size]
    }

    /// Queues the first `count` bytes of the room for a socket. The socket must stay open while they are queued. Returns the message's
    /// number.
    pub(super) fn queue(&mut self, to: BorrowedFd<'_>, count: usize, task: &Waker) -> u64 {
        let bytes = self.used..self.used + count;
        self.used = bytes.end;
        let (to, task) = (Some(to.as_raw_fd()), task.clone());
        self.queue.push(Queued { to, bytes, task, is_awaited: false });
        self.first + self.queue.len() as u64 - 1
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    pub(super) fn is_queued(&self, number: u64) -> bool {
        number >= self.first
    }

    pub(super) fn is_sent(&self, number: u64) -> bool {
        !self.is_queued(number) && !self.unsent.contains_key(&number)
    }

    /// Wakes a task as soon as a message has left the queue.
    pub(super) fn awaits(&mut self, number: u64, task: &Waker) {
        if let Some(queued) = self.queued(number) {
            queued.task.clone_from(task);
            queued.is_awaited = true;
        }
    }

    /// The rest of a queued message, if it was not sent completely.
    pub(super) fn take_unsent(&mut self, number: u64) -> Option<Unsent> {
        self.unsent.remove(&number)
    }

    /// Withdraws a message, so that its socket may be closed and its descriptor reused. Returns the number of bytes that were not
    /// sent.
    pub(super) fn forget(&mut self, number: u64) -> usize {
        match self.queued(number) {
            Some(queued) => {
                queued.to = None;
                queued.bytes.len()
            }
            None => self.unsent.remove(&number).map_or(0, |unsent| unsent.bytes.len()),
        }
    }

    fn queued(&mut self, number: u64) -> Option<&mut Queued> {
        let at = usize::try_from(number.checked_sub(self.first)?).ok()?;
        self.queue.get_mut(at)
    }

    /// Sends the queue, as far as the sockets have room.
    pub(super) fn send(&mut self) {
        self.results.clear();
        self.results.resize_with(self.queue.len(), || None);
        // For a single message a plain call is faster.
        if self.queue.iter().filter(|queued| queued.to.is_some()).count() > 1
            && let Some(ring) = &mut self.ring
            && let Err(error) = ring.send(&self.queue, &self.buffer, &mut self.results)
        {
            tracing::warn!(%error, "io_uring failed; falling back to one write per message");
            // An entry without a result by now was not taken, and never will be.
            self.ring = None;
        }
        for (queued, result) in self.queue.drain(..).zip(self.results.drain(..)) {
            let number = self.first;
            self.first += 1;
            let Some(to) = queued.to else { continue };
            let bytes = self.buffer.get(queued.bytes).unwrap_or_default();
            let (sent, error) = match result.unwrap_or_else(|| send_one(to, bytes)) {
                Ok(sent) => (sent, None),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => (0, None),
                Err(error) => (0, Some(error)),
            };
            let rest = bytes.get(sent..).unwrap_or_default();
            if !rest.is_empty() {
                self.unsent.insert(number, Unsent { bytes: rest.into(), error });
            }
            if queued.is_awaited || !rest.is_empty() {
                queued.task.wake();
            }
        }
        self.used = 0;
    }
}

fn send_one(to: RawFd, bytes: &[u8]) -> io::Result<usize> {
    // SAFETY: the caller that queued a message withdraws it before closing the socket, see `Batch::queue`.
    #[allow(unsafe_code)]
    let to = unsafe { BorrowedFd::borrow_raw(to) };
    Ok(send(to, bytes, SendFlags::NOSIGNAL)?)
}

/// An io_uring, which takes many messages at once.
pub(super) struct Ring(IoUring);

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Ring").finish_non_exhaustive()
    }
}

impl Ring {
    /// Maximum number of messages at once.
    const ENTRIES: usize = 256;

    /// In the thread that will use it.
    pub(super) fn new() -> io::Result<Self> {
        let entries = Self::ENTRIES as u32;
        let ring = IoUring::builder().setup_single_issuer().setup_coop_taskrun().build(entries);
        // Linux before 6.0 has none of these flags. They only save work.
        let ring = ring.or_else(|_| IoUring::new(entries))?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if !probe.is_supported(opcode::Send::CODE) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Self(ring))
    }

    /// Sends each message that was not withdrawn. Returns an error if some have no result; those were not sent.
    fn send(
        &mut self,
        queue: &[Queued],
        buffer: &[u8],
        results: &mut [Option<io::Result<usize>>],
    ) -> io::Result<()> {
        // Never waits: the relay keeps what a socket cannot take now.
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let mut handed = 0;
        for (at, queued) in queue.iter().enumerate() {
            let Some(to) = queued.to else { continue };
            let bytes = buffer.get(queued.bytes.clone()).unwrap_or_default();
            let entry = opcode::Send::new(types::Fd(to), bytes.as_ptr(), bytes.len() as u32)
                .flags(flags)
                .build()
                .user_data(at as u64);
            // SAFETY: the bytes and the socket exist until this function returns. By then the kernel has answered each entry
            // that it took, because it waits for none of them. An entry that it did not take goes away with the ring, which is
            // dropped on any error.
            #[allow(unsafe_code)]
            let pushed = unsafe { self.0.submission().push(&entry) };
            pushed.map_err(|_| io::ErrorKind::QuotaExceeded)?;
            handed += 1;
        }
        let mut answered = 0;
        while answered < handed {
            let submitted = self.0.submit_and_wait(handed - answered);
            for answer in self.0.completion() {
                let result = usize::try_from(answer.result())
                    .map_err(|_| io::Error::from_raw_os_error(-answer.result()));
                if let Some(slot) = results.get_mut(answer.user_data() as usize) {
                    *slot = Some(result);
                }
                answered += 1;
            }
            match submitted {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{Ipv4Addr, TcpListener, TcpStream},
        os::{fd::AsFd, unix::net::UnixStream},
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering::Relaxed},
        },
        task::Wake,
    };

    use super::*;

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Relaxed);
        }
    }

    fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let dialled = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let accepted = listener.accept().unwrap().0;
        accepted.set_nonblocking(true).unwrap();
        (dialled, accepted)
    }

    fn queue(batch: &mut Batch, to: &impl AsFd, message: &[u8], woken: &Arc<Woken>) -> u64 {
        batch.room(message.len()).copy_from_slice(message);
        batch.queue(to.as_fd(), message.len(), &woken.clone().into())
    }

    fn in_both_ways(test: impl Fn(Batch)) {
        test(Batch::new(Some(Ring::new().expect("this kernel has io_uring"))));
        test(Batch::new(None));
    }

    #[test]
    fn each_message_goes_to_its_own_socket_and_what_was_taken_back_to_none() {
        in_both_ways(|mut batch| {
            let woken = Arc::<Woken>::default();
            let mut all: Vec<_> = (0..600).map(|_| connection()).collect();
            for round in 0..3_u32 {
                let mut last = None;
                for (n, (_, to)) in all.iter().enumerate() {
                    let number = queue(&mut batch, to, &(n as u32).to_be_bytes(), &woken);
                    queue(&mut batch, to, &round.to_be_bytes(), &woken);
                    let dropped = queue(&mut batch, to, b"never", &woken);
                    assert_eq!(batch.forget(dropped), 5);
                    last = Some(number);
                }
                assert!(!batch.is_empty() && batch.is_queued(last.unwrap()));
                batch.send();
                assert!(batch.is_empty() && batch.is_sent(last.unwrap()));
                for (n, (from, _)) in all.iter_mut().enumerate() {
                    let mut got = [0; 8];
                    from.read_exact(&mut got).unwrap();
                    assert_eq!(got[..4], (n as u32).to_be_bytes());
                    assert_eq!(got[4..], round.to_be_bytes());
                    from.set_nonblocking(true).unwrap();
                    assert_eq!(from.read(&mut got).unwrap_err().kind(), io::ErrorKind::WouldBlock);
                    from.set_nonblocking(false).unwrap();
                }
            }
            assert_eq!(woken.0.load(Relaxed), 0, "nobody waited");
        });
    }

    /// A socket that takes nothing any more, and its other end. One of TCP could: the kernel goes on moving bytes to the other end.
    fn full() -> (UnixStream, UnixStream) {
        let (end, mut full) = UnixStream::pair().unwrap();
        full.set_nonblocking(true).unwrap();
        for size in [64 * 1024, 1] {
            while full.write(&[0; 64 * 1024][..size]).is_ok() {}
        }
        (end, full)
    }

    #[test]
    fn what_cannot_be_sent_comes_back_and_holds_up_nobody() {
        in_both_ways(|mut batch| {
            let woken = Arc::<Woken>::default();
            let ((_full_end, full), (gone_end, gone), (mut well_end, well)) =
                (full(), connection(), connection());
            drop(gone_end);
            // The first one is answered by a reset.
            while (&gone).write(&[0]).is_ok() {
                std::thread::yield_now();
            }
            let to_full = queue(&mut batch, &full, b"full", &woken);
            let to_gone = queue(&mut batch, &gone, b"gone", &woken);
            let to_well = queue(&mut batch, &well, b"well", &woken);
            let waker = woken.clone().into();
            batch.awaits(to_well, &waker);
            batch.send();
            assert_eq!(woken.0.load(Relaxed), 3);
            let unsent = batch.take_unsent(to_full).unwrap();
            assert_eq!((&*unsent.bytes, unsent.error.is_none()), (&b"full"[..], true));
            assert!(!batch.is_sent(to_gone));
            assert!(batch.take_unsent(to_gone).unwrap().error.is_some());
            assert!(batch.is_sent(to_well) && batch.take_unsent(to_well).is_none());
            let mut got = [0; 4];
            well_end.read_exact(&mut got).unwrap();
            assert_eq!(&got, b"well");
            // Messages that are no longer needed are not kept.
            let to_full = queue(&mut batch, &full, b"full", &woken);
            batch.send();
            assert_eq!((batch.forget(to_full), batch.forget(to_well)), (4, 0));
            assert!(batch.unsent.is_empty());
        });
    }

    #[test]
    #[allow(unsafe_code)]
    fn a_ring_that_fails_midway_loses_and_doubles_nothing() {
        let ring = Ring::new().expect("this kernel has io_uring");
        let descriptor = ring.0.as_raw_fd();
        let (mut batch, woken) = (Batch::new(Some(ring)), Arc::<Woken>::default());
        let mut all: Vec<_> = (0..10).map(|_| connection()).collect();
        let null = std::fs::File::open("/dev/null").unwrap();
        for round in 0..4_u8 {
            if round == 1 {
                // From now on the kernel knows no ring by this descriptor.
                // SAFETY: both are open; the ring's owner closes the one that takes its place.
                assert_eq!(unsafe { libc::dup2(null.as_raw_fd(), descriptor) }, descriptor);
            }
            for (_, to) in &all {
                queue(&mut batch, to, &[round], &woken);
            }
            batch.send();
            assert_eq!(batch.ring.is_some(), round == 0);
        }
        for (from, _) in &mut all {
            let mut got = [0; 4];
            from.read_exact(&mut got).unwrap();
            assert_eq!(got, [0, 1, 2, 3]);
            from.set_nonblocking(true).unwrap();
            assert_eq!(from.read(&mut got).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        }
        assert_eq!(woken.0.load(Relaxed), 0, "nobody waited");
    }
}
