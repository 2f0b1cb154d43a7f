//! Errors of the firewall.

use rustix::io::Errno;

use super::{netlink::NetlinkError, program::ProgramError};

/// Why rules cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    #[error(transparent)]
    Program(#[from] ProgramError),
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The kernel has nf_tables, but is too old or was built without a part that we need.
    #[error("this kernel's nf_tables has no {0}")]
    Lacks(String),
    /// Another program's socket owns a table of our name.
    #[error(
        "table inet {name} belongs to another process (netlink port {owner}), and goes when that process ends"
    )]
    Owned { name: String, owner: u32 },
    #[error("no nf_tables ({nft}) and no iptables ({iptables})")]
    Nothing { nft: Box<CaptureError>, iptables: Box<CaptureError> },
}

impl CaptureError {
    /// Whether a change failed because the object to change does not exist.
    pub(super) fn is_of_what_is_gone(&self) -> bool {
        matches!(self, Self::Netlink(error) if error.errno() == Some(Errno::NOENT))
    }

    /// Whether the program is not installed, or the kernel has no nf_tables. Then there are no rules either.
    pub(super) fn is_missing(&self) -> bool {
        match self {
            Self::Program(error) => error.is_missing(),
            Self::Netlink(error) => error.is_missing(),
            _ => false,
        }
    }
}
