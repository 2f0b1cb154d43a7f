//! A netlink socket to nf_tables. It owns the tables that were created through it with the owner flag: the kernel removes
//! them when the socket's last descriptor is closed, for whatever reason the process ends.
//!
//! The kernel works during the send call, so the answer is there when the call returns. No call waits for long.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send,
        socket_with, sockopt,
    },
};

use super::wire::{Answer, Attributes, Kind, Messages, REQUEST, answers, family, flags};

/// Counts all changes of the nf_tables of a network namespace. It wraps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::capture) struct Generation(u32);

impl Generation {
    /// Whether this generation directly follows `before`, without a change by another program.
    pub(in crate::capture) fn follows(self, before: Self) -> bool {
        self.0 == before.0.wrapping_add(1)
    }
}

/// Why the kernel's nf_tables did not do what was requested.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    #[error("nf_tables {doing}: {error}")]
    Io { doing: &'static str, error: io::Error },
    /// The kernel refused a batch, and applied no part of it.
    #[error("nf_tables refused {}", refusals(.0))]
    Refused(Vec<RefusedMessage>),
}

/// A message of a batch that the kernel refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RefusedMessage {
    /// The position of the message in its batch, from 1. 0 is the batch itself.
    pub(in crate::capture) message: u32,
    pub(in crate::capture) error: Errno,
}

fn refusals(all: &[RefusedMessage]) -> String {
    let Some(first) = all.first() else { return "a batch".to_owned() };
    let more = match all.len() - 1 {
        0 => String::new(),
        more => format!(", and {more} more"),
    };
    let error = io::Error::from(first.error);
    format!("message {} of a batch: {error}{more}", first.message)
}

impl NetlinkError {
    fn of(doing: &'static str) -> impl FnOnce(Errno) -> Self {
        move |error| Self::Io { doing, error: error.into() }
    }

    /// Whether this kernel has no nf_tables.
    pub(in crate::capture) fn is_missing(&self) -> bool {
        let missing = [Errno::PROTONOSUPPORT, Errno::AFNOSUPPORT, Errno::OPNOTSUPP, Errno::INVAL];
        matches!(self, Self::Io { .. })
            && self.errno().is_some_and(|errno| missing.contains(&errno))
    }

    /// The first error's number.
    pub(in crate::capture) fn errno(&self) -> Option<Errno> {
        match self {
            Self::Io { error, .. } => Errno::from_io_error(error),
            Self::Refused(all) => all.first().map(|refusal| refusal.error),
        }
    }
}

#[derive(Debug)]
pub(in crate::capture) struct Socket {
    socket: OwnedFd,
    buffer: Box<[u8]>,
    #[cfg(test)]
    is_narrow: bool,
}

/// Size of the read buffer. An error repeats the message that caused it, which may be this long.
const READ: usize = 128 << 10;
/// Size of the kernel's socket buffers. A batch must fit, and so must its errors.
const KERNEL_BUFFER: usize = 4 << 20;

impl Socket {
    pub(in crate::capture) fn open() -> Result<Self, NetlinkError> {
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            Some(netlink::NETFILTER),
        )
        .map_err(NetlinkError::of("cannot be reached"))?;
        // Needs NET_ADMIN, as all other requests here. The first request reports if it is missing.
        let _ = sockopt::set_socket_send_buffer_size_force(&socket, KERNEL_BUFFER);
        let _ = sockopt::set_socket_recv_buffer_size_force(&socket, KERNEL_BUFFER);
        Ok(Self {
            socket,
            buffer: vec![0; READ].into(),
            #[cfg(test)]
            is_narrow: false,
        })
    }

    /// The socket's descriptor. A process that has a copy of it is an owner of the tables too.
    pub(in crate::capture) fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Continues with the socket of another process, which does not use it any more.
    pub(in crate::capture) fn adopt(&mut self, socket: OwnedFd) {
        self.socket = socket;
    }

    /// As where a batch is larger than the buffer.
    #[cfg(test)]
    pub(in crate::capture) fn shrink(&self) {
        sockopt::set_socket_send_buffer_size(&self.socket, 106_496).unwrap();
    }

    /// As where the right to have large buffers is missing, too.
    #[cfg(test)]
    pub(in crate::capture) fn narrow(&mut self) {
        self.shrink();
        self.is_narrow = true;
    }

    /// The current generation, whichever program made it.
    pub(in crate::capture) fn generation(&mut self) -> Result<Generation, NetlinkError> {
        self.forget();
        self.generation_behind(|_| {})
    }

    /// Applies the whole batch or nothing. Returns the generation that this created.
    pub(in crate::capture) fn apply(
        &mut self,
        batch: &Messages,
    ) -> Result<Generation, NetlinkError> {
        match self.attempt(batch)? {
            (generation, refused) if refused.is_empty() => Ok(generation),
            (_, refused) => Err(NetlinkError::Refused(refused)),
        }
    }

    /// Like `apply`, but returns every message that was refused. The kernel answers a batch only with its errors. So a
    /// question is sent behind the batch: the errors have all arrived when its answer arrives.
    pub(in crate::capture) fn attempt(
        &mut self,
        batch: &Messages,
    ) -> Result<(Generation, Vec<RefusedMessage>), NetlinkError> {
        let mut refused = Vec::new();
        self.forget();
        self.send(batch)?;
        let generation = self.generation_behind(|answer| {
            let error = Errno::from_raw_os_error(answer.error());
            refused.push(RefusedMessage { message: answer.sequence, error });
        })?;
        Ok((generation, refused))
    }

    /// Asks for the generation. Passes answers that arrive before it to `earlier`.
    fn generation_behind(
        &mut self,
        mut earlier: impl FnMut(Answer<'_>),
    ) -> Result<Generation, NetlinkError> {
        // The generation's id (NFTA_GEN_ID).
        const ID: u16 = 1;
        let mut generation = None;
        self.send(&Messages::request(Kind::GET_GENERATION, 0, family::ALL, |_| {}))?;
        while generation.is_none() {
            for answer in answers(self.receive()?) {
                if answer.kind == Kind::NEW_GENERATION {
                    generation = answer.attributes().number(ID).map(Generation);
                } else if answer.kind == Kind::ERROR && answer.sequence == REQUEST {
                    let error = Errno::from_raw_os_error(answer.error());
                    return Err(NetlinkError::of("cannot be read")(error));
                } else if answer.kind == Kind::ERROR && answer.error() != 0 {
                    earlier(answer);
                }
            }
        }
        generation.ok_or_else(|| NetlinkError::of("gave no answer")(Errno::NOMSG))
    }

    /// Passes every object of a kind to `each`. `select` restricts them. An error if the named object does not exist.
    pub(super) fn dump(
        &mut self,
        kind: Kind,
        family: u8,
        select: impl FnOnce(&mut Attributes<'_>),
        mut each: impl FnMut(Answer<'_>),
    ) -> Result<(), NetlinkError> {
        self.forget();
        self.send(&Messages::request(kind, flags::DUMP, family, select))?;
        loop {
            for answer in answers(self.receive()?) {
                match answer.kind {
                    Kind::ERROR | Kind::DONE if answer.error() == 0 => return Ok(()),
                    Kind::ERROR | Kind::DONE => {
                        let error = Errno::from_raw_os_error(answer.error());
                        return Err(NetlinkError::of("cannot be read")(error));
                    }
                    _ => each(answer),
                }
            }
        }
    }

    /// Discards what an earlier failed request has left in the socket, so that it is not taken for the answer to the next
    /// one.
    fn forget(&mut self) {
        while recv(&self.socket, &mut self.buffer[..], RecvFlags::DONTWAIT).is_ok() {}
    }

    fn send(&mut self, messages: &Messages) -> Result<(), NetlinkError> {
        let bytes = messages.bytes();
        let mut sent = send(&self.socket, bytes, SendFlags::empty());
        // The kernel takes a batch whole or not at all. The size is only a limit: a socket takes no memory while nothing is sent.
        if sent == Err(Errno::MSGSIZE) && self.grow(bytes.len()) {
            sent = send(&self.socket, bytes, SendFlags::empty());
        }
        sent.map(drop).map_err(NetlinkError::of("cannot be asked"))
    }

    /// Makes room for a batch of this size. Whether that is allowed.
    fn grow(&self, size: usize) -> bool {
        #[cfg(test)]
        if self.is_narrow {
            return false;
        }
        sockopt::set_socket_send_buffer_size_force(&self.socket, size).is_ok()
    }

    fn receive(&mut self) -> Result<&[u8], NetlinkError> {
        let (read, _) = recv(&self.socket, &mut self.buffer[..], RecvFlags::DONTWAIT)
            .map_err(NetlinkError::of("gave no answer"))?;
        Ok(self.buffer.get(..read).unwrap_or_default())
    }
}
