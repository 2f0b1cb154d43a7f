//! One embassy captures in a network namespace: two would each put their own rules in place of the other's, for ever.

#![expect(clippy::disallowed_methods, reason = "reads files of the kernel, which need no disk")]

use std::{
    io,
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixDatagram},
    },
};

/// Held while this embassy is the one that captures.
#[derive(Debug)]
pub struct Lock {
    /// Bound to a name that the kernel keeps for each network namespace, and gives free when the process ends, however it
    /// does (man 7 unix, "Abstract sockets").
    _socket: UnixDatagram,
}

/// The lock's name in the kernel.
const LOCK: &str = "embassy/capture";

impl Lock {
    /// For tests that write no rules.
    #[cfg(test)]
    pub(super) fn of_nobody() -> Self {
        Self { _socket: UnixDatagram::unbound().unwrap() }
    }

    /// Whether an embassy captures here, one whose process cannot be seen included. It only reads (man 5 proc, "net/unix").
    pub fn is_held() -> bool {
        let sockets = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
        sockets.lines().any(|line| line.rsplit(' ').next() == Some(&format!("@{LOCK}")))
    }

    /// `None` if another embassy captures.
    pub fn take() -> io::Result<Option<Self>> {
        Self::of(LOCK)
    }

    /// Held by an embassy that needs a table of this name to the end of its connections. `None` where another holds it.
    pub(super) fn of_table(name: &str) -> io::Result<Option<Self>> {
        Self::of(&format!("embassy/{name}"))
    }

    fn of(name: &str) -> io::Result<Option<Self>> {
        let name = SocketAddr::from_abstract_name(name)?;
        match UnixDatagram::bind_addr(&name) {
            Ok(socket) => Ok(Some(Self { _socket: socket })),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => Ok(None),
            Err(error) => Err(error),
        }
    }
}
