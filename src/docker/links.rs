//! What the kernel tells of the interfaces of our own network namespace: it comes before the engine's word, and also from an
//! engine that says nothing.

use std::{future::pending, io, os::fd::OwnedFd, sync::Arc};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SocketFlags, SocketType, bind, netlink::SocketAddrNetlink, recv,
        socket_with,
    },
};
use tokio::io::unix::AsyncFd;
use tracing::debug;

use super::process;

/// What changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Change {
    /// An interface has an address more or less: a network's bridge came or went.
    pub(super) addresses: bool,
    /// An interface is gone, perhaps to another network namespace: a container may have left a network.
    pub(super) gone: bool,
    /// An interface is gone for good: an address may be free for another container.
    pub(super) deleted: bool,
    /// There is a new interface of a kind that containers have: a container may have got an address.
    pub(super) came: bool,
}

/// A netlink socket (man 7 rtnetlink) on which the changes arrive.
#[derive(Debug)]
pub(super) struct Links {
    socket: Option<AsyncFd<Arc<OwnedFd>>>,
    buffer: Box<[u8]>,
}

const MESSAGE: usize = 64 << 10;
/// `RTMGRP_LINK`, `RTMGRP_IPV4_IFADDR` and `RTMGRP_IPV6_IFADDR` (linux/rtnetlink.h).
const GROUPS: u32 = 0x1 | 0x10 | 0x100;

impl Links {
    /// Without the socket there is no news of this kind, and the engine's events have to do.
    pub(super) fn open() -> Self {
        let socket = Self::socket();
        if let Err(error) = &socket {
            debug!(%error, "cannot watch the interfaces");
        }
        Self { socket: socket.ok(), buffer: vec![0; MESSAGE].into() }
    }

    fn socket() -> io::Result<AsyncFd<Arc<OwnedFd>>> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // Netlink's first protocol, NETLINK_ROUTE, is the default.
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        bind(&socket, &SocketAddrNetlink::new(0, GROUPS))?;
        process::register(Arc::new(socket))
    }

    /// Waits for the next change. Cancel-safe.
    pub(super) async fn changed(&mut self) -> Change {
        let Some(socket) = &self.socket else { return pending().await };
        let mut change = Change::default();
        loop {
            let Ok(mut ready) = socket.readable().await else { return pending().await };
            loop {
                match recv(socket.get_ref(), &mut self.buffer[..], RecvFlags::DONTWAIT) {
                    Ok((0, _)) | Err(Errno::AGAIN) => break,
                    Ok((read, _)) => change.take(self.buffer.get(..read).unwrap_or_default()),
                    Err(Errno::INTR) => {}
                    // Messages were lost: whatever they said.
                    Err(Errno::NOBUFS) => change = Change::ANY,
                    Err(error) => {
                        debug!(%error, "cannot read what changed of the interfaces");
                        return pending().await;
                    }
                }
            }
            ready.clear_ready();
            if change != Change::default() {
                return change;
            }
        }
    }
}

impl Change {
    const ANY: Self = Self { addresses: true, gone: true, deleted: true, came: true };

    /// Reads messages: a header of 16 bytes with the length and the kind, then an `ifinfomsg` or an `ifaddrmsg`.
    fn take(&mut self, mut messages: &[u8]) {
        const HEADER: usize = 16;
        // RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR, RTM_DELADDR; RT_SCOPE_LINK (linux/rtnetlink.h).
        const NEW_LINK: u16 = 16;
        const DELETED_LINK: u16 = 17;
        const ADDRESSES: [u16; 2] = [20, 21];
        const SCOPE_LINK: u8 = 253;
        // Attributes come after the 16 bytes of an ifinfomsg, whose last four say which flags changed: all, if it is new.
        const INFO: usize = HEADER + 16;
        const CHANGED_FLAGS: usize = HEADER + 12;
        // IFLA_LINKINFO, IFLA_NEW_NETNSID and IFLA_INFO_KIND (linux/if_link.h).
        const LINK_INFO: u16 = 18;
        const NEW_NAMESPACE: u16 = 45;
        const KIND: u16 = 1;
        // The scope is the fourth byte of an ifaddrmsg.
        const SCOPE: usize = HEADER + 3;
        while let Some(length) = number::<4>(messages, 0).map(u32::from_ne_bytes)
            && let Some(message) = messages.get(..length as usize).filter(|m| m.len() >= HEADER)
        {
            let kind = number::<2>(message, 4).map(u16::from_ne_bytes).unwrap_or_default();
            let attributes = message.get(INFO..).unwrap_or_default();
            match kind {
                DELETED_LINK => {
                    self.gone = true;
                    self.deleted |= attribute(attributes, NEW_NAMESPACE).is_none();
                }
                NEW_LINK if number(message, CHANGED_FLAGS) == Some(u32::MAX.to_ne_bytes()) => {
                    let info = attribute(attributes, LINK_INFO).unwrap_or_default();
                    let kind = attribute(info, KIND).unwrap_or_default();
                    let kind = kind.strip_suffix(b"\0").unwrap_or(kind);
                    self.came |= OF_CONTAINERS.contains(&kind);
                }
                _ => {}
            }
            // Each new interface gets an address of its link's, which says nothing of networks.
            self.addresses |= ADDRESSES.contains(&kind) && message.get(SCOPE) != Some(&SCOPE_LINK);
            messages = messages.get(message.len().next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

/// The kinds of interfaces that engines give to containers.
const OF_CONTAINERS: [&[u8]; 3] = [b"veth", b"macvlan", b"ipvlan"];

/// The value of the first attribute of a kind. Each begins with its length and its kind, two bytes each.
fn attribute(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    const HEADER: usize = 4;
    // NLA_F_NESTED and NLA_F_NET_BYTEORDER (linux/netlink.h).
    const FLAGS: u16 = 0xc000;
    loop {
        let length = usize::from(number::<2>(attributes, 0).map(u16::from_ne_bytes)?);
        let kind = number::<2>(attributes, 2).map(u16::from_ne_bytes)?;
        let value = attributes.get(HEADER..length)?;
        if kind & !FLAGS == wanted {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(16 + body.len()).unwrap();
        let mut message = length.to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.extend([0; 10]);
        message.extend(body);
        message.resize(message.len().next_multiple_of(4), 0);
        message
    }

    fn read(messages: &[Vec<u8>]) -> Change {
        let mut change = Change::default();
        change.take(&messages.concat());
        change
    }

    #[test]
    fn messages_are_understood() {
        let (new_link, gone) = (message(16, &[0; 16]), message(17, &[0; 17]));
        let deleted = Change { gone: true, deleted: true, ..Change::default() };
        let global = message(20, &[2, 16, 0, 0, 1, 0, 0, 0]);
        let of_the_link = message(20, &[10, 64, 0, 253, 1, 0, 0, 0]);
        assert_eq!(read(&[new_link.clone(), of_the_link.clone()]), Change::default());
        assert_eq!(read(&[new_link, gone.clone()]), deleted);
        let both = Change { addresses: true, ..deleted };
        assert_eq!(read(&[of_the_link, gone, global]), both);
    }

    #[test]
    fn an_interface_of_a_container_comes_goes_and_moves() {
        let attribute = |kind: u16, value: &[u8]| {
            let mut bytes = u16::try_from(4 + value.len()).unwrap().to_ne_bytes().to_vec();
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(value);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes
        };
        let link = |number: u16, changed: u32, kind: &[u8], moved: bool| {
            let mut body = vec![0; 12];
            body.extend(changed.to_ne_bytes());
            body.extend(attribute(3, b"veth0\0"));
            body.extend(attribute(18, &attribute(1, kind)));
            body.extend(moved.then(|| attribute(45, &[1, 0, 0, 0])).into_iter().flatten());
            message(number, &body)
        };
        let came = Change { came: true, ..Change::default() };
        assert_eq!(read(&[link(16, u32::MAX, b"veth\0", false)]), came);
        assert_eq!(read(&[link(16, u32::MAX, b"macvlan", false)]), came);
        assert_eq!(read(&[link(16, 1, b"veth\0", false)]), Change::default(), "it is known");
        assert_eq!(read(&[link(16, u32::MAX, b"tun\0", false)]), Change::default());
        let gone = Change { gone: true, ..Change::default() };
        assert_eq!(read(&[link(17, u32::MAX, b"veth\0", true)]), gone, "into a container");
        let deleted = Change { deleted: true, ..gone };
        assert_eq!(read(&[link(17, u32::MAX, b"veth\0", false)]), deleted);
    }

    proptest! {
        #[test]
        fn no_message_panics(bytes: Vec<u8>, length in 0..40_u32) {
            let mut change = Change::default();
            change.take(&bytes);
            change.take(&[length.to_ne_bytes().to_vec(), bytes].concat());
        }
    }
}
