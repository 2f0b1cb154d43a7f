//! Where a takeover is asked for.

use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::Path,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    pipe::{PipeFlags, pipe_with},
    process::geteuid,
};
use tokio::{
    net::{UnixListener, UnixStream, unix::pipe},
    task::JoinSet,
    time::{sleep, timeout},
};
use tracing::warn;

use super::{
    channel::{Channel, ChannelError},
    message::{Handle, Hello, Message},
};
use crate::unix_socket;

/// How long the other process may take for an answer that it has at once.
const ANSWER: Duration = Duration::from_secs(10);
/// How long a new process may take to learn what it needs, before it asks the old one to stand still.
const LEARN: Duration = Duration::from_secs(120);
/// New processes that learn at a time: more are of no use to anybody.
const LEARNERS: usize = 4;

/// A process that has asked this one to stand still, and what it said of itself.
pub type Asker = (Channel, Hello);

/// Listens for a process that wants to take over. Dropping it removes the socket's file.
#[derive(Debug)]
pub struct Door {
    listener: UnixListener,
    file: unix_socket::File,
    hello: Hello,
    alive: Alive,
    learners: JoinSet<Option<Asker>>,
}

/// Both ends of a pipe to which nothing is ever written: as long as it lives, this process does for those that were greeted.
#[derive(Debug)]
pub struct Alive((OwnedFd, OwnedFd));

impl Door {
    /// Listens at `path`. Must be called within a runtime.
    pub fn open(path: &Path, hello: Hello) -> io::Result<Self> {
        let (listener, file) = unix_socket::listen(path)?;
        Self::with(listener, file, hello)
    }

    /// Goes on with the listener of the process before this one. Its file is that process's until [`Door::claim`].
    pub fn inherited(listener: OwnedFd, path: &Path, hello: Hello) -> io::Result<Self> {
        let listener = std::os::unix::net::UnixListener::from(listener);
        listener.set_nonblocking(true)?;
        let listener = UnixListener::from_std(listener)?;
        Self::with(listener, unix_socket::File::inherited(path), hello)
    }

    fn with(listener: UnixListener, file: unix_socket::File, hello: Hello) -> io::Result<Self> {
        let alive = Alive(pipe_with(PipeFlags::CLOEXEC)?);
        Ok(Self { listener, file, hello, alive, learners: JoinSet::new() })
    }

    /// Waits for a process that asks this one to stand still. Cancel-safe.
    pub async fn asked(&mut self) -> Asker {
        loop {
            tokio::select! {
                accepted = self.listener.accept(), if self.learners.len() < LEARNERS => {
                    match accepted {
                        Ok((stream, _)) => self.greet(Channel::new(stream)),
                        Err(error) => {
                            tracing::debug!(%error, "cannot accept a takeover");
                            sleep(Duration::from_millis(500)).await;
                        }
                    }
                }
                Some(learner) = self.learners.join_next() => {
                    if let Ok(Some(asker)) = learner {
                        return asker;
                    }
                }
            }
        }
    }

    fn greet(&mut self, mut channel: Channel) {
        let hello = Hello { descriptors: 1, ..self.hello.clone() };
        let Ok(life) = self.alive.0.0.try_clone() else { return };
        self.learners.spawn(async move {
            if !is_trusted(&channel) {
                warn!(
                    user = channel.peer_user().ok(),
                    "takeover refused: only root and the user of embassy may ask for one"
                );
                return None;
            }
            let heard = timeout(ANSWER, channel.receive()).await;
            let Ok(Ok(Some((Message::Hello(its), ..)))) = heard else { return None };
            channel.send(&Message::Hello(hello), &[], &[life.as_fd()]).await.ok()?;
            match timeout(LEARN, channel.receive()).await {
                Ok(Ok(Some((Message::Freeze, ..)))) => Some((channel, its)),
                // It was not fit, or has ended.
                _ => None,
            }
        });
    }

    /// Hands the listener over.
    pub async fn hand_over(&self, channel: &Channel) -> Result<(), ChannelError> {
        let handle = Handle { of: Handle::DOOR.to_owned(), descriptors: 1, ..Handle::default() };
        channel.send(&Message::Handle(handle), &[], &[self.listener.as_fd()]).await
    }

    /// The listener is this process's now, if another one handed it over.
    pub fn claim(&mut self) {
        self.file.claim();
    }

    /// It is another process's from now on. To be dropped when this process ends.
    pub fn leave(mut self) -> Alive {
        self.file.leave();
        self.close()
    }

    /// Nobody is answered any more. To be dropped when this process ends.
    pub fn close(self) -> Alive {
        self.alive
    }
}

/// Whether the other process has the rights of this one.
fn is_trusted(channel: &Channel) -> bool {
    channel.peer_user().is_ok_and(|user| user == 0 || user == geteuid().as_raw())
}

/// Shows whether the other process lives.
#[derive(Debug)]
pub struct Life(OwnedFd);

impl Life {
    /// Waits until it has died.
    pub async fn over(&self) -> io::Result<()> {
        // Nothing is ever written: the end is all that can be read.
        pipe::Receiver::from_owned_fd(self.0.try_clone()?)?.readable().await
    }

    /// Whether it has died. A process that ends closes its descriptors one after the other, which takes a moment.
    pub async fn is_over(&self) -> bool {
        const MOMENT: Duration = Duration::from_millis(20);
        for _ in 0..50 {
            let mut polled = [PollFd::new(&self.0, PollFlags::IN)];
            let looked = poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
            if looked.is_ok() && polled.iter().any(|one| one.revents().contains(PollFlags::HUP)) {
                return true;
            }
            sleep(MOMENT).await;
        }
        false
    }
}

/// Whether a process listens at `path`.
pub async fn is_answered(path: &Path) -> bool {
    UnixStream::connect(path).await.is_ok()
}

/// Greets the running embassy. `None`: none is found. Where the socket cannot be reached, that is logged: if one runs nevertheless, this
/// process cannot have its port and its rules, and ends with an error.
pub async fn knock(
    path: &Path,
    hello: Hello,
) -> Result<Option<(Channel, Hello, Life)>, ChannelError> {
    let stream = match UnixStream::connect(path).await {
        Ok(stream) => stream,
        Err(error) => {
            return match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Ok(None),
                // Somebody listens there, and has many that ask.
                io::ErrorKind::WouldBlock => Err(error.into()),
                _ => {
                    warn!(path = %path.display(), %error, "cannot look for a running embassy; starting without a takeover");
                    Ok(None)
                }
            };
        }
    };
    let mut channel = Channel::new(stream);
    if !is_trusted(&channel) {
        let why = "the socket belongs to a process of another user";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, why).into());
    }
    channel.send(&Message::Hello(hello), &[], &[]).await?;
    match timeout(ANSWER, channel.receive()).await.map_err(|_| ChannelError::Silent)?? {
        Some((Message::Hello(hello), _, life)) => {
            let life = life.into_iter().next().ok_or(ChannelError::Descriptors)?;
            Ok(Some((channel, hello, Life(life))))
        }
        Some(_) => Err(ChannelError::Unexpected("something other than hello")),
        None => Err(ChannelError::Closed),
    }
}

/// The network namespace of this process: device and inode.
pub fn namespace() -> (u64, u64) {
    #[expect(clippy::disallowed_methods, reason = "a file of the kernel, which needs no disk")]
    let found = std::fs::metadata("/proc/self/ns/net");
    found.map(|found| (found.dev(), found.ino())).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_asks_is_greeted_and_its_death_and_ours_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("takeover");
        let hello = |program: &str| Hello { program: program.into(), ..Hello::default() };
        assert!(knock(&path, hello("new")).await.unwrap().is_none(), "there is nobody");
        let mut door = Door::open(&path, hello("old")).unwrap();
        // A process that greets and then does nothing blocks no other.
        let idle = async { knock(&path, hello("idle")).await.unwrap().unwrap() };
        let asking = async {
            let idle = idle.await;
            let (channel, hello, life) = knock(&path, hello("new")).await.unwrap().unwrap();
            assert_eq!((hello.program.as_str(), hello.descriptors), ("old", 1));
            channel.send(&Message::Freeze, &[], &[]).await.unwrap();
            (idle, channel, life)
        };
        let ((channel, its), (_idle, mut asker, life)) = tokio::join!(door.asked(), asking);
        assert_eq!(its.program, "new");
        drop(channel);
        assert!(asker.receive().await.unwrap().is_none());
        let alive = door.leave();
        assert!(path.exists(), "the file is another's now");
        assert!(!life.is_over().await, "it has only let go of the listener, and of this one");
        assert!(timeout(Duration::from_millis(50), life.over()).await.is_err());
        drop(alive);
        assert!(life.is_over().await);
        timeout(Duration::from_secs(60), life.over()).await.unwrap().unwrap();
        assert!(knock(&path, hello("new")).await.unwrap().is_none(), "nobody listens");
        assert!(!is_answered(&path).await);
        let door = Door::open(&path, hello("old")).unwrap();
        assert!(is_answered(&path).await);
        let _alive = door.close();
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn where_no_socket_can_be_reached_nobody_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let long = folder.path().join("x".repeat(200));
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        // Longer than an address may be; below a file; below one of many links to itself.
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&link, &link).unwrap();
        for path in [long, file.join("takeover"), link.join("takeover")] {
            assert!(UnixStream::connect(&path).await.is_err());
            assert!(knock(&path, Hello::default()).await.unwrap().is_none(), "{path:?}");
        }
    }

    #[tokio::test]
    async fn one_that_closes_its_door_is_told_apart_from_one_that_refuses() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("takeover");
        let door = Door::open(&path, Hello::default()).unwrap();
        let (found, ()) = tokio::join!(knock(&path, Hello::default()), async {
            sleep(Duration::from_millis(50)).await;
            drop(door.close());
        });
        assert!(found.unwrap_err().is_end());
        assert!(!ChannelError::Silent.is_end());
    }
}
