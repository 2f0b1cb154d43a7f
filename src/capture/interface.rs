//! Names of interfaces, for messages.

use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};

/// The name of an interface of this network namespace by its number; the number if it is gone.
pub fn named(number: u32) -> String {
    let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None);
    let name = socket.and_then(|socket| netdevice::index_to_name(&socket, number));
    name.unwrap_or_else(|_| format!("interface {number}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_has_a_name_as_long_as_it_is_there() {
        assert_eq!(named(1), "lo");
        assert_eq!(named(u32::MAX >> 1), "interface 2147483647");
    }
}
