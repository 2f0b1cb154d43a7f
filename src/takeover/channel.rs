//! The socket between the two processes.

use std::{
    collections::VecDeque,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    cmsg_space,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, Shutdown, recvmsg, sendmsg, shutdown,
    },
};
use tokio::{io::Interest, net::UnixStream};

use super::message::{MOST_DESCRIPTORS, Malformed, Message, decode, encode};

/// A message, the bytes behind it, and its descriptors.
pub type Received = (Message, Vec<u8>, Vec<OwnedFd>);

#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("a message of the other process lacks descriptors (descriptor limit?)")]
    Descriptors,
    #[error("the other process closed the connection")]
    Closed,
    #[error("the other process does not answer")]
    Silent,
    #[error("the other process said {0} out of turn")]
    Unexpected(&'static str),
}

impl ChannelError {
    /// Whether the other process has closed the connection, or has ended.
    pub fn is_end(&self) -> bool {
        use io::ErrorKind::{BrokenPipe, ConnectionReset};
        match self {
            Self::Closed => true,
            Self::Io(error) => matches!(error.kind(), BrokenPipe | ConnectionReset),
            _ => false,
        }
    }
}

/// A connection to the other process.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
    received: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
}

impl Channel {
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, received: Vec::new(), descriptors: VecDeque::new() }
    }

    /// The user of the other process.
    pub fn peer_user(&self) -> io::Result<u32> {
        // Its process may be in a container of its own, and have no number here.
        Ok(self.stream.peer_cred()?.uid())
    }

    /// The number of the other process, if it has one here: it may be in a container of its own.
    pub fn peer_process(&self) -> Option<u32> {
        let process = self.stream.peer_cred().ok()?.pid()?;
        u32::try_from(process).ok().filter(|process| *process > 0)
    }

    /// Sends a message, the bytes behind it, and its descriptors. Once this returns, the kernel has all of it for the other process.
    pub async fn send(
        &self,
        message: &Message,
        bytes: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        let bytes = encode(message, bytes)?;
        let mut sent = 0;
        while let Some(rest) = bytes.get(sent..).filter(|rest| !rest.is_empty()) {
            // The descriptors go with the first byte.
            let with = if sent == 0 { descriptors } else { &[] };
            sent += self
                .stream
                .async_io(Interest::WRITABLE, || {
                    let mut space =
                        [MaybeUninit::uninit(); cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
                    let mut control = SendAncillaryBuffer::new(&mut space);
                    if !with.is_empty() && !control.push(SendAncillaryMessage::ScmRights(with)) {
                        return Err(io::ErrorKind::InvalidInput.into());
                    }
                    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
                    Ok(sendmsg(self.stream.as_fd(), &[IoSlice::new(rest)], &mut control, flags)?)
                })
                .await?;
        }
        Ok(())
    }

    /// The next message; `None` at the end of the connection.
    pub async fn receive(&mut self) -> Result<Option<Received>, ChannelError> {
        loop {
            if let Some(received) = self.take()? {
                return Ok(Some(received));
            }
            if self.read().await? == 0 {
                return Ok(None);
            }
        }
    }

    /// A complete message of those that were read.
    fn take(&mut self) -> Result<Option<Received>, ChannelError> {
        let Some((message, bytes, length)) = decode(&self.received)? else { return Ok(None) };
        self.received.drain(..length);
        let count = message.descriptors();
        if self.descriptors.len() < count {
            return Err(ChannelError::Descriptors);
        }
        Ok(Some((message, bytes, self.descriptors.drain(..count).collect())))
    }

    async fn read(&mut self) -> Result<usize, ChannelError> {
        let Self { stream, received, descriptors } = self;
        let read = stream.async_io(Interest::READABLE, || {
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MOST_DESCRIPTORS + 3))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut buffer = [0; 64 << 10];
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            let read =
                recvmsg(stream.as_fd(), &mut [IoSliceMut::new(&mut buffer)], &mut control, flags)?;
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    descriptors.extend(rights);
                }
            }
            received.extend(buffer.get(..read.bytes).unwrap_or_default());
            Ok((read.bytes, read.flags.contains(ReturnFlags::CTRUNC)))
        });
        match read.await? {
            (_, true) => Err(ChannelError::Descriptors),
            // No message has so many: they would be collected without end.
            _ if descriptors.len() > 2 * MOST_DESCRIPTORS => Err(ChannelError::Descriptors),
            (read, false) => Ok(read),
        }
    }

    /// Ends the connection. Whether the other process has committed by then: what it sends from now on fails at its side, and what
    /// it has sent before is here. The kernel decides that under one lock (`unix_stream_sendmsg`).
    pub async fn end(&mut self) -> bool {
        // It fails only if the other process has gone.
        let _ = shutdown(&self.stream, Shutdown::Both);
        loop {
            match self.receive().await {
                Ok(Some((Message::Commit, ..))) => return true,
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return false,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Read, Seek, Write},
    };

    use super::*;
    use crate::takeover::message::Handle;

    fn pair() -> (Channel, Channel) {
        let (a, b) = UnixStream::pair().unwrap();
        (Channel::new(a), Channel::new(b))
    }

    #[tokio::test]
    async fn each_message_comes_with_its_own_descriptors() {
        let (old, mut new) = pair();
        let sending = async {
            for n in 0..100_u32 {
                let files: Vec<_> = (0..n % 5)
                    .map(|one| {
                        let mut file = tempfile::tempfile().unwrap();
                        write!(file, "{n} {one}").unwrap();
                        file
                    })
                    .collect();
                let all: Vec<_> = files.iter().map(AsFd::as_fd).collect();
                let of = "x".repeat(n as usize * 1_000);
                let handle = Handle { of, descriptors: n % 5, ..Handle::default() };
                old.send(&Message::Handle(handle), &[], &all).await.unwrap();
            }
            drop(old);
        };
        let receiving = async {
            for n in 0..100_u32 {
                let (message, _, descriptors) = new.receive().await.unwrap().unwrap();
                let Message::Handle(handle) = message else { panic!("{message:?}") };
                assert_eq!(handle.of.len(), n as usize * 1_000);
                assert_eq!(descriptors.len() as u32, n % 5);
                for (one, descriptor) in descriptors.into_iter().enumerate() {
                    let (mut file, mut text) = (File::from(descriptor), String::new());
                    file.rewind().unwrap();
                    file.read_to_string(&mut text).unwrap();
                    assert_eq!(text, format!("{n} {one}"));
                }
            }
            assert!(new.receive().await.unwrap().is_none());
        };
        tokio::join!(sending, receiving);
    }

    /// The one moment at which it is decided who serves.
    #[tokio::test]
    async fn a_commit_is_there_before_the_end_or_cannot_be_sent() {
        let (mut old, new) = pair();
        new.send(&Message::End, &[], &[]).await.unwrap();
        new.send(&Message::Commit, &[], &[]).await.unwrap();
        assert!(old.end().await);
        let (mut old, new) = pair();
        new.send(&Message::End, &[], &[]).await.unwrap();
        assert!(!old.end().await);
        assert!(new.send(&Message::Commit, &[], &[]).await.is_err());
    }

    #[tokio::test]
    async fn a_message_without_its_descriptors_is_an_error() {
        let (old, mut new) = pair();
        let handle = Handle { descriptors: 1, ..Handle::default() };
        old.send(&Message::Handle(handle), &[], &[]).await.unwrap();
        assert!(matches!(new.receive().await, Err(ChannelError::Descriptors)));
    }
}
