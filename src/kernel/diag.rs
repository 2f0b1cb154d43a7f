//! The TCP sockets of a network namespace, by the kernel's socket diagnosis (man 7 sock_diag): which of them took the kernel path, and
//! their end. It works in the namespace in which it was opened.

use std::{
    io,
    net::IpAddr,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send,
        socket_with,
    },
};

use super::layout::Peer;

/// A socket that took the kernel path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Open {
    family: u8,
    /// `struct inet_diag_sockid`: addresses, ports, and the cookie, which no other socket ever has.
    id: [u8; ID],
    pub(super) peer: Peer,
}

impl Open {
    /// The socket's own address, of either family.
    pub(super) fn local(&self) -> IpAddr {
        // idiag_sport and idiag_dport come first, then idiag_src.
        match (self.family, self.id.get(4..).and_then(|rest| rest.first_chunk::<16>())) {
            (family, Some([a, b, c, d, ..])) if family == AddressFamily::INET.as_raw() as u8 => {
                [*a, *b, *c, *d].into()
            }
            (_, address) => IpAddr::from(*address.unwrap_or(&[0; 16])).to_canonical(),
        }
    }

    pub(super) fn cookie(&self) -> u64 {
        let mut cookie = [0; 8];
        cookie.copy_from_slice(&self.id[ID - 8..]);
        u64::from_ne_bytes(cookie)
    }
}

/// A socket for questions to the kernel.
#[derive(Debug)]
pub(super) struct Diagnosis {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

// linux/netlink.h
const HEADER: usize = 16;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
const DUMP: u16 = 0x300;
// linux/sock_diag.h
const BY_FAMILY: u16 = 20;
const DESTROY: u16 = 21;
// linux/inet_diag.h
const ID: usize = 48;
const MESSAGE: usize = 72;
const REQUEST_STORAGES: u16 = 2;
const STORAGES: u16 = 20;
// linux/sock_diag.h
const MAP_FD: u16 = 1;
const STORAGE: u16 = 1;
const MAP_VALUE: u16 = 3;
/// All states but TIME_WAIT, CLOSE, LISTEN and NEW_SYN_RECV (linux/tcp_states.h): 1 to 12.
const STATES: u32 = 0x1ffe & !(1 << 6 | 1 << 7 | 1 << 10 | 1 << 12);
/// The kernel fills one buffer at a time, of 32 KiB at most.
const READ: usize = 64 << 10;

impl Diagnosis {
    /// In the network namespace of this thread.
    pub(super) fn open() -> io::Result<Self> {
        let kind = (AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC);
        let socket = socket_with(kind.0, kind.1, kind.2, Some(netlink::SOCK_DIAG))?;
        Ok(Self { socket, buffer: vec![0; READ] })
    }

    /// The sockets that have something in this map of socket storage. Needs CAP_BPF.
    pub(super) fn list(&mut self, storage: BorrowedFd<'_>) -> io::Result<Vec<Open>> {
        let mut found = Vec::new();
        for family in [AddressFamily::INET, AddressFamily::INET6] {
            let mut body = request(family.as_raw() as u8, &[0; ID]);
            let map = attribute(MAP_FD, &storage.as_raw_fd().to_ne_bytes());
            body.extend(attribute(REQUEST_STORAGES, &map));
            self.ask(BY_FAMILY, REQUEST | DUMP, &body, |message| found.extend(read(message)))?;
        }
        Ok(found)
    }

    /// Ends a socket: its application gets ECONNABORTED, and the endpoint a reset. Needs CAP_NET_ADMIN. Whether it was still there.
    pub(super) fn destroy(&mut self, open: &Open) -> io::Result<bool> {
        let body = request(open.family, &open.id);
        match self.ask(DESTROY, REQUEST | ACK, &body, |_| {}) {
            Ok(()) => Ok(true),
            Err(error) if Errno::from_io_error(&error) == Some(Errno::NOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn ask(
        &mut self,
        kind: u16,
        flags: u16,
        body: &[u8],
        mut each: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        let mut message = Vec::with_capacity(HEADER + body.len());
        message.extend(((HEADER + body.len()) as u32).to_ne_bytes());
        message.extend([kind, flags].map(u16::to_ne_bytes).concat());
        message.extend([0; 8]);
        message.extend(body);
        send(&self.socket, &message, SendFlags::empty())?;
        loop {
            let (_, read) = recv(&self.socket, self.buffer.as_mut_slice(), RecvFlags::TRUNC)?;
            let Some(mut rest) = self.buffer.get(..read) else {
                return Err(io::Error::from(io::ErrorKind::InvalidData));
            };
            while let Some((kind, body, more)) = next_message(rest) {
                rest = more;
                match kind {
                    DONE => return Ok(()),
                    ERROR => {
                        let code = body.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                        return match code {
                            0 => Ok(()),
                            code => Err(io::Error::from_raw_os_error(-code)),
                        };
                    }
                    _ => each(body),
                }
            }
        }
    }
}

/// `struct inet_diag_req_v2`
fn request(family: u8, id: &[u8; ID]) -> Vec<u8> {
    const TCP: u8 = 6;
    let mut body = vec![family, TCP, 0, 0];
    body.extend(STATES.to_ne_bytes());
    body.extend(id);
    body
}

fn attribute(kind: u16, content: &[u8]) -> Vec<u8> {
    let length = (4 + content.len()) as u16;
    let mut bytes = [length, kind].map(u16::to_ne_bytes).concat();
    bytes.extend(content);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// The first message: its kind, its body, and what is behind it.
fn next_message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let body = bytes.get(HEADER..length)?;
    Some((kind, body, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

/// The content of the first attribute of this kind.
fn find(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    /// Without the flags that say whether it is nested, and whose byte order it has.
    const KIND: u16 = 0x3fff;
    loop {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?) & KIND;
        let content = bytes.get(4..length)?;
        if kind == wanted {
            return Some(content);
        }
        bytes = bytes.get(length.next_multiple_of(4)..)?;
    }
}

/// A `struct inet_diag_msg` with its attributes. `None`: a socket that did not take the kernel path.
fn read(message: &[u8]) -> Option<Open> {
    let id = *message.get(4..)?.first_chunk()?;
    let storages = find(message.get(MESSAGE..)?, STORAGES)?;
    let value = find(find(storages, STORAGE)?, MAP_VALUE)?;
    Some(Open { family: *message.first()?, id, peer: Peer::read(value)? })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_socket_is_read_with_what_is_stored_for_it() {
        let peer = [7; super::super::layout::PEER];
        let value = attribute(MAP_VALUE, &peer);
        let storage = attribute(STORAGE | 0x8000, &[attribute(2, &[1; 4]), value].concat());
        let mut message = vec![2, 1, 0, 0];
        message.extend(1..=ID as u8);
        message.resize(MESSAGE, 0);
        let rest = [attribute(8, &[0]), attribute(STORAGES | 0x8000, &storage)].concat();
        let open = read(&[&message[..], &rest].concat()).unwrap();
        assert_eq!((open.family, open.id[0], open.id[47]), (2, 1, 48));
        assert_eq!(open.cookie().to_ne_bytes(), [41, 42, 43, 44, 45, 46, 47, 48]);
        assert_eq!(Some(&open.peer), Peer::read(&peer).as_ref());
        assert_eq!(open.local().to_string(), "5.6.7.8");
        let mut id = [0; ID];
        id[14..20].copy_from_slice(&[255, 255, 10, 0, 0, 1]);
        let mapped = Open { family: 10, id, ..open };
        assert_eq!(mapped.local().to_string(), "10.0.0.1");
        assert_eq!(read(&message), None, "nothing is stored for it");
    }

    proptest! {
        #[test]
        fn whatever_the_kernel_says_is_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut rest = &bytes[..];
            while let Some((_, body, more)) = next_message(rest) {
                prop_assert!(body.len() + more.len() < rest.len());
                let _ = read(body);
                rest = more;
            }
            let _ = read(&bytes);
        }
    }
}
