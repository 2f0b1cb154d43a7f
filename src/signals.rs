//! The signals of this process. All that can be caught are caught, because a signal that ends embassy at once would leave
//! the rules behind.

use std::{future::poll_fn, io, task::Poll};

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Each of them stops embassy in order. SIGXCPU (a limit of CPU time) and SIGPWR (a power failure) announce an end that cannot
/// be caught.
const STOP: [i32; 5] = [libc::SIGTERM, libc::SIGINT, libc::SIGQUIT, libc::SIGXCPU, libc::SIGPWR];

/// Each of them would end the process, and has no meaning for embassy: ignored, as are the real-time signals.
///
/// SIGPIPE is not among them because the standard library ignores it. The signals of a fault (SIGSEGV, SIGABRT and others) and
/// those of job control keep their meaning.
const IGNORED: [i32; 7] = [
    libc::SIGUSR1,
    libc::SIGALRM,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGIO,
    libc::SIGXFSZ,
    libc::SIGSTKFLT,
];

/// Catches the signals while it lives.
#[derive(Debug)]
pub struct Signals {
    pub stop: Stop,
    pub hangup: Signal,
    /// Asks for a new process that takes over.
    pub upgrade: Signal,
    /// Handlers that nobody listens to. SIG_IGN would be inherited by `nft` and `iptables`.
    _ignored: Vec<Signal>,
}

/// The signals that stop embassy.
#[derive(Debug)]
pub struct Stop(Vec<Signal>);

impl Signals {
    /// Must be called within a runtime.
    pub fn catch() -> io::Result<Self> {
        let catch = |number| signal(SignalKind::from_raw(number));
        let all =
            |numbers: &[i32]| numbers.iter().map(|one| catch(*one)).collect::<io::Result<_>>();
        let mut ignored: Vec<_> = all(&IGNORED)?;
        // The C library uses the first ones itself: they cannot be caught, and no program sends them.
        ignored.extend((32..=libc::SIGRTMAX()).filter_map(|number| catch(number).ok()));
        Ok(Self {
            stop: Stop(all(&STOP)?),
            hangup: catch(libc::SIGHUP)?,
            upgrade: catch(libc::SIGUSR2)?,
            _ignored: ignored,
        })
    }
}

impl Stop {
    /// Waits for the next of these signals. Cancel-safe.
    pub async fn recv(&mut self) {
        poll_fn(|context| {
            // All are polled: only a signal that was polled wakes this task.
            let came =
                self.0.iter_mut().filter_map(|one| one.poll_recv(context).is_ready().then_some(()));
            if came.count() > 0 { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
}
