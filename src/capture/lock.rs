//! One embassy captures in a network namespace: two would each put their own rules in place of the other's, for ever.

use std::{
    io,
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixDatagram},
    },
};

use super::rules::NAME;

/// Held while this embassy is the one that captures.
#[derive(Debug)]
pub struct Lock {
    /// Bound to a name that the kernel keeps for each network namespace, and gives free when the process ends, however it
    /// does (man 7 unix, "Abstract sockets").
    _socket: UnixDatagram,
}

impl Lock {
    /// For tests that write no rules.
    #[cfg(test)]
    pub(super) fn of_nobody() -> Self {
        Self { _socket: UnixDatagram::unbound().unwrap() }
    }

    /// `None` where another embassy captures.
    pub fn take() -> io::Result<Option<Self>> {
        let name = SocketAddr::from_abstract_name(format!("{NAME}/capture"))?;
        match UnixDatagram::bind_addr(&name) {
            Ok(socket) => Ok(Some(Self { _socket: socket })),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => Ok(None),
            Err(error) => Err(error),
        }
    }
}
