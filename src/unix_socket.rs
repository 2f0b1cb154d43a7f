//! Unix sockets that listen at a path. The mode of the file grants access.

#![expect(clippy::disallowed_methods, reason = "only at the start, and at the end")]

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, fchmod};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::UnixListener;

/// Access to this socket gives as much as embassy's own rights, so only its user and root have it. The operator may set
/// another mode or group.
const MODE: Mode = Mode::RUSR.union(Mode::WUSR);
/// Length of the accept queue.
const BACKLOG: i32 = 128;

/// The file of a socket that we created. It is removed on drop, unless another file has replaced it.
#[derive(Debug)]
pub(crate) struct File {
    path: PathBuf,
    /// The file's identity.
    identity: Option<Identity>,
}

/// Listens at `path`. Replaces the socket that a killed embassy left.
pub(crate) fn listen(path: &Path) -> io::Result<(UnixListener, File)> {
    if is_leftover(path) {
        fs::remove_file(path)?;
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
    // Set before bind, so that the socket is never open to everyone.
    fchmod(&socket, MODE)?;
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(BACKLOG)?;
    let file = File { path: path.to_owned(), identity: identity(path) };
    Ok((UnixListener::from_std(std::os::unix::net::UnixListener::from(socket))?, file))
}

impl File {
    /// The file of a socket that another process created and hands over. It belongs to that process until [`File::claim`]:
    /// dropping this value leaves it.
    pub(crate) fn inherited(path: &Path) -> Self {
        Self { path: path.to_owned(), identity: None }
    }

    /// Makes the file this process's own.
    pub(crate) fn claim(&mut self) {
        self.identity = identity(&self.path);
    }

    /// Leaves the file, because the socket now belongs to another process.
    pub(crate) fn leave(&mut self) {
        self.identity = None;
    }
}

/// Whether this is a socket without a listener. Other connect errors do not prove that: the queue may be full, or we may
/// lack rights.
fn is_leftover(path: &Path) -> bool {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    // Nonblocking: with a full queue, connect would wait.
    let connect = || {
        let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
        socket.connect(&SockAddr::unix(path)?)
    };
    is_socket && connect().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// Device, inode and creation time, because inode numbers are reused. A change of mode or owner does not change these.
type Identity = (u64, u64, i64, i64);

fn identity(path: &Path) -> Option<Identity> {
    let found = fs::symlink_metadata(path).ok()?;
    Some((found.dev(), found.ino(), found.mtime(), found.mtime_nsec()))
}

impl Drop for File {
    fn drop(&mut self) {
        if self.identity.is_some() && identity(&self.path) == self.identity {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_a_leftover_is_replaced_and_only_our_own_file_goes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let (listener, file) = listen(&path).unwrap();
        assert_eq!(fs::symlink_metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(listen(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse, "it is in use");
        // As after a kill: the file stays, without a listener.
        drop(listener);
        let (_second, second_file) = listen(&path).unwrap();
        drop(file);
        assert!(path.exists(), "the file is the second one's");
        drop(second_file);
        assert!(!path.exists());
        fs::write(&path, "not a socket").unwrap();
        assert!(listen(&path).is_err());
        assert!(path.exists());
    }

    #[tokio::test]
    async fn a_file_of_another_process_goes_only_once_it_is_ours() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let (_listener, mut file) = listen(&path).unwrap();
        drop(File::inherited(&path));
        assert!(path.exists(), "the other process serves there");
        let mut inherited = File::inherited(&path);
        file.leave();
        drop(file);
        inherited.claim();
        drop(inherited);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_socket_whose_queue_is_full_is_no_leftover() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let busy = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        busy.bind(&SockAddr::unix(&path).unwrap()).unwrap();
        busy.listen(0).unwrap();
        let dial = || {
            let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None).unwrap();
            socket.connect(&SockAddr::unix(&path).unwrap()).map(|()| socket)
        };
        let _waiting: Vec<_> = std::iter::from_fn(|| dial().ok()).take(16).collect();
        assert!(dial().is_err(), "its queue is full");
        assert!(!is_leftover(&path));
    }
}
