//! The one capability that embassy needs if it does not run as root.
//!
//! The image's program has CAP_NET_ADMIN as a permitted file capability: a program that had it effective could not even start
//! in a container that is not given it. What it has ends with it, and `nft` and `iptables`, which it starts, would have
//! none; in the ambient set it is handed down to them (man 7 capabilities).

use rustix::{
    io,
    thread::{CapabilitySet, capabilities, configure_capability_in_ambient_set, set_capabilities},
};

/// Takes CAP_NET_ADMIN up, where it is permitted, for this thread, those that it makes, and the programs that it starts. Where
/// that fails, what needs it fails too, and says so.
pub fn take_up_net_admin() {
    let _ = take_up(CapabilitySet::NET_ADMIN);
}

/// Whether this process may write rules.
pub fn has_net_admin() -> bool {
    capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::NET_ADMIN))
}

fn take_up(capability: CapabilitySet) -> io::Result<()> {
    let mut sets = capabilities(None)?;
    if !sets.permitted.contains(capability) {
        return Ok(());
    }
    sets.effective |= capability;
    // What is ambient has to be inheritable.
    sets.inheritable |= capability;
    set_capabilities(None, sets)?;
    configure_capability_in_ambient_set(capability, true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_permitted_is_handed_down() {
        take_up(CapabilitySet::NET_ADMIN).unwrap();
        let sets = capabilities(None).unwrap();
        let has = sets.permitted.contains(CapabilitySet::NET_ADMIN);
        let ambient = rustix::thread::capability_is_in_ambient_set(CapabilitySet::NET_ADMIN);
        assert_eq!(ambient.unwrap(), has);
    }
}
