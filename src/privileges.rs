//! The one capability that embassy needs if it does not run as root.
//!
//! The image's program has CAP_NET_ADMIN as a permitted file capability: if it were effective, the program could not even
//! start in a container without it. This capability is not passed on to `nft` and `iptables`, which embassy starts. So it
//! is put into the ambient set (man 7 capabilities) of the thread that starts such a program, while it starts it.

use rustix::{
    io,
    process::{DumpableBehavior, set_dumpable_behavior},
    thread::{
        CapabilitySet, CapabilitySets, capabilities, configure_capability_in_ambient_set,
        set_capabilities,
    },
};

/// Makes CAP_NET_ADMIN effective, if it is permitted, for this thread and the threads that it starts. If that fails, the
/// code that needs it fails too, and reports it.
pub fn take_up_net_admin() {
    let Ok(mut sets) = capabilities(None) else { return };
    if sets.permitted.contains(CapabilitySet::NET_ADMIN) {
        sets.effective |= CapabilitySet::NET_ADMIN;
        let _ = set_capabilities(None, sets);
        // A supervisor may pass it in the ambient set, which all threads would inherit.
        let _ = configure_capability_in_ambient_set(CapabilitySet::NET_ADMIN, false);
    }
    // The files below /proc of a program with file capabilities belong to root. With this, `embassy doctor`, which has the
    // same user and the same capability, may read them (man 2 ptrace, PTRACE_MODE_READ), but no process with fewer rights.
    let _ = set_dumpable_behavior(DumpableBehavior::Dumpable);
}

/// Makes the capabilities for bpf(2) effective, if they are permitted, for this thread only. CAP_SYS_ADMIN replaces CAP_BPF
/// for container engines that do not know that one.
pub fn take_up_bpf() {
    let Ok(mut sets) = capabilities(None) else { return };
    let wanted = CapabilitySet::BPF | CapabilitySet::NET_ADMIN | CapabilitySet::SYS_ADMIN;
    sets.effective |= sets.permitted & wanted;
    let _ = set_capabilities(None, sets);
}

/// Takes the capabilities up, where they are permitted, that it takes to enter a container's network and to end sockets there: for this
/// thread alone. The
/// process's files below /proc are its own (CAP_SYS_PTRACE), and a namespace is entered by an administrator (CAP_SYS_ADMIN).
pub fn take_up_entering() {
    let Ok(mut sets) = capabilities(None) else { return };
    let enter = CapabilitySet::SYS_ADMIN | CapabilitySet::SYS_PTRACE;
    // Ending a socket, and asking what the programs of the kernel path stored for it.
    let wanted = enter | CapabilitySet::NET_ADMIN | CapabilitySet::BPF;
    sets.effective |= sets.permitted & wanted;
    let _ = set_capabilities(None, sets);
}

/// Whether this process may write rules.
pub fn has_net_admin() -> bool {
    capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::NET_ADMIN))
}

/// Whether CAP_NET_ADMIN is permitted for this process.
pub fn is_permitted() -> bool {
    capabilities(None).is_ok_and(|sets| sets.permitted.contains(CapabilitySet::NET_ADMIN))
}

/// Starts a program, which gets CAP_NET_ADMIN if this process has it. `spawn` must start it from this thread, and must not
/// return before it has started. If the capability cannot be passed on, the program is started without it, and reports what
/// is missing.
pub fn hand_down<T>(spawn: impl FnOnce() -> T) -> T {
    let _handed_down = HandedDown::new(CapabilitySet::NET_ADMIN);
    spawn()
}

/// A capability that is passed on to programs that this thread starts.
struct HandedDown {
    capability: CapabilitySet,
    /// The previous capability sets of this thread.
    sets: CapabilitySets,
}

impl HandedDown {
    fn new(capability: CapabilitySet) -> io::Result<Option<Self>> {
        let sets = capabilities(None)?;
        if !sets.permitted.contains(capability) {
            return Ok(None);
        }
        let handed_down = Self { capability, sets };
        // An ambient capability must be inheritable.
        let inheritable = sets.inheritable | capability;
        set_capabilities(None, CapabilitySets { inheritable, ..sets })?;
        configure_capability_in_ambient_set(capability, true)?;
        Ok(Some(handed_down))
    }
}

impl Drop for HandedDown {
    fn drop(&mut self) {
        let _ = configure_capability_in_ambient_set(self.capability, false);
        let _ = set_capabilities(None, self.sets);
    }
}

#[cfg(test)]
mod tests {
    use rustix::thread::capability_is_in_ambient_set;

    use super::*;

    #[test]
    fn what_is_permitted_is_handed_down_and_only_meanwhile() {
        let is_ambient = || capability_is_in_ambient_set(CapabilitySet::NET_ADMIN).unwrap();
        take_up_net_admin();
        let before = capabilities(None).unwrap();
        assert_eq!(has_net_admin(), is_permitted());
        assert!(!is_ambient());
        assert_eq!(hand_down(is_ambient), is_permitted());
        assert!(!is_ambient());
        let after = capabilities(None).unwrap();
        assert_eq!((after.inheritable, after.effective), (before.inheritable, before.effective));
    }
}
