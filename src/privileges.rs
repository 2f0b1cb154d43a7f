//! The one capability that embassy needs if it does not run as root.
//!
//! The image's program has CAP_NET_ADMIN as a permitted file capability: a program that had it effective could not even start
//! in a container that is not given it. What it has ends with it, and `nft` and `iptables`, which it starts, would have
//! none. So it is in the ambient set (man 7 capabilities) of the thread that starts such a program, while that starts.

use rustix::{
    io,
    process::{DumpableBehavior, set_dumpable_behavior},
    thread::{
        CapabilitySet, CapabilitySets, capabilities, configure_capability_in_ambient_set,
        set_capabilities,
    },
};

/// Takes CAP_NET_ADMIN up, where it is permitted, for this thread and those that it makes. Where that fails, what needs it
/// fails too, and says so.
pub fn take_up_net_admin() {
    let Ok(mut sets) = capabilities(None) else { return };
    if sets.permitted.contains(CapabilitySet::NET_ADMIN) {
        sets.effective |= CapabilitySet::NET_ADMIN;
        let _ = set_capabilities(None, sets);
        // A supervisor may hand it over in the ambient set, which all threads would have.
        let _ = configure_capability_in_ambient_set(CapabilitySet::NET_ADMIN, false);
    }
    // A program with file capabilities shows its files below /proc to root alone. `embassy doctor`, which has the same user and the same
    // capability, may look at them (man 2 ptrace, PTRACE_MODE_READ), and nobody who has less.
    let _ = set_dumpable_behavior(DumpableBehavior::Dumpable);
}

/// Takes the capabilities up, where they are permitted, that bpf(2) wants: for this thread alone. CAP_SYS_ADMIN stands for CAP_BPF
/// where the container engine does not know that one.
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

/// Whether this process may take up CAP_NET_ADMIN.
pub fn is_permitted() -> bool {
    capabilities(None).is_ok_and(|sets| sets.permitted.contains(CapabilitySet::NET_ADMIN))
}

/// Starts a program, which gets CAP_NET_ADMIN if this process has it. `spawn` must not return before the program has started,
/// and start it from this thread. Where it cannot be handed down, the program is started without, and says what it lacks.
pub fn hand_down<T>(spawn: impl FnOnce() -> T) -> T {
    let _handed_down = HandedDown::new(CapabilitySet::NET_ADMIN);
    spawn()
}

/// A capability that programs get which this thread starts.
struct HandedDown {
    capability: CapabilitySet,
    /// Of this thread, before.
    sets: CapabilitySets,
}

impl HandedDown {
    fn new(capability: CapabilitySet) -> io::Result<Option<Self>> {
        let sets = capabilities(None)?;
        if !sets.permitted.contains(capability) {
            return Ok(None);
        }
        let handed_down = Self { capability, sets };
        // What is ambient has to be inheritable.
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
