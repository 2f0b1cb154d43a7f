//! What is done in a container's own network namespace, on a thread that ends there. A socket that was made there stays there.

#![expect(
    clippy::disallowed_methods,
    reason = "opens a file of the kernel's, on a thread that serves nothing else"
)]

use std::{fs::File, os::fd::AsFd, thread};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::{docker::process, model::RunEnd, privileges};

/// `None` if the run's process cannot be seen or has ended, or its network may not be entered: that needs the capabilities SYS_ADMIN and
/// SYS_PTRACE.
pub(super) fn within<T: Send>(run: &RunEnd, work: impl FnOnce() -> T + Send) -> Option<T> {
    let enter = || {
        privileges::take_up_entering();
        let network = process::look(run, |pid| File::open(format!("/proc/{pid}/ns/net")))?.ok()?;
        move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network)).ok()?;
        Some(work())
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("in-container".to_owned());
        thread.spawn_scoped(scope, enter).ok()?.join().ok()?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_without_a_process_has_no_network_to_enter() {
        assert_eq!(within(&RunEnd::default(), || 1), None);
        let ended = process::run_of_this_process();
        ended.mark_ended();
        assert_eq!(within(&ended, || 1), None);
    }
}
