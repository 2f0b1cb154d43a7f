//! Ensures that only one embassy captures in a network namespace: two would replace each other's rules forever.
//!
//! The lock is a group of the kernel's packet log (NFLOG), to which no packet is sent. Each network namespace has its own
//! groups. The kernel gives a group to one socket at a time, only if the socket has NET_ADMIN there, and takes it back when
//! the process ends, for whatever reason. So the lock needs no file system, and a program that could not remove our rules
//! cannot take it.

use std::{
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixDatagram},
    },
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send,
        socket_with,
    },
};

/// Held as long as this embassy captures.
#[derive(Debug)]
pub struct Lock {
    /// `None`: this kernel has no packet log.
    held: Option<OwnedFd>,
}

/// The group. No program is known to use this number.
const GROUP: u16 = 0xE3BA;
/// A second group, which shows whether the first one is refused because it is taken.
const OTHER: u16 = 0xE3BB;

impl Lock {
    /// A lock without a group, for tests that write no rules.
    #[cfg(test)]
    pub(super) fn of_nobody() -> Self {
        Self { held: None }
    }

    /// Whether an embassy captures here, even if its process is not visible. Changes nothing. False without NET_ADMIN,
    /// which is needed to find out.
    pub fn is_held() -> bool {
        let is_held = || Ok::<_, io::Error>(LogGroup::is_taken(&open()?, GROUP)?);
        is_held().unwrap_or_default()
    }

    /// Takes the lock. `None` if another embassy captures.
    pub fn take() -> io::Result<Option<Self>> {
        let socket = match open() {
            Ok(socket) => socket,
            // The kernel has no nfnetlink, of which the packet log is a part.
            Err(Errno::PROTONOSUPPORT | Errno::AFNOSUPPORT) => {
                return Ok(Some(Self { held: None }));
            }
            Err(error) => return Err(error.into()),
        };
        match LogGroup::ask(&socket, GROUP, LogGroup::BIND)? {
            Ok(()) => Ok(Some(Self { held: Some(socket) })),
            Err(Errno::PERM) if LogGroup::is_taken(&socket, GROUP)? => Ok(None),
            // No such subsystem.
            Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::PROTONOSUPPORT) => {
                tracing::debug!(
                    "this kernel has no packet log, so embassy cannot see whether another one captures"
                );
                Ok(Some(Self { held: None }))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The lock of the previous process, which handed over its socket.
    pub fn inherited(socket: OwnedFd) -> Self {
        Self { held: Some(socket) }
    }

    /// The socket to hand over to the next process.
    pub(super) fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.held.as_ref().map(AsFd::as_fd)
    }

    /// Held by an embassy that needs a table of this name until its connections have ended. `None` if another process holds
    /// it. The name cannot be guessed, so that no other program can take it first (man 7 unix, "Abstract sockets").
    pub(super) fn of_table(name: &str) -> io::Result<Option<Self>> {
        let name = SocketAddr::from_abstract_name(format!("embassy/{name}"))?;
        match UnixDatagram::bind_addr(&name) {
            Ok(socket) => Ok(Some(Self { held: Some(socket.into()) })),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn open() -> Result<OwnedFd, Errno> {
    let kind = (AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC);
    socket_with(kind.0, kind.1, kind.2, Some(netlink::NETFILTER))
}

/// Requests about a group (linux/netfilter/nfnetlink_log.h).
struct LogGroup;

impl LogGroup {
    /// `NFULA_CFG_CMD`, with `NFULNL_CFG_CMD_BIND`.
    const BIND: (u16, &[u8]) = (1, &[1]);
    /// `NFULA_CFG_TIMEOUT`: only its holder can set that.
    const TIMEOUT: (u16, &[u8]) = (4, &[0, 0, 0, 100]);

    /// Whether another socket than this one holds the group.
    fn is_taken(socket: &OwnedFd, group: u16) -> Result<bool, Errno> {
        // If nobody holds a group, it does not exist (ENODEV). Without NET_ADMIN, both groups are refused.
        let is_refused =
            |group| Ok::<_, Errno>(Self::ask(socket, group, Self::TIMEOUT)? == Err(Errno::PERM));
        Ok(is_refused(group)? && !is_refused(OTHER)?)
    }

    /// The kernel's answer to a request with one attribute.
    fn ask(
        socket: &OwnedFd,
        group: u16,
        (attribute, value): (u16, &[u8]),
    ) -> Result<Result<(), Errno>, Errno> {
        send(socket, &Self::request(group, attribute, value), SendFlags::empty())?;
        let mut answer = [0; 1024];
        let (read, _) = recv(socket, &mut answer[..], RecvFlags::empty())?;
        // NLMSG_ERROR: the header, and then the error number, 0 on success.
        let number = answer.get(..read).and_then(|answer| answer.get(16..20)?.try_into().ok());
        let number = number.map(i32::from_ne_bytes).ok_or(Errno::BADMSG)?;
        Ok(match number {
            0 => Ok(()),
            number => Err(Errno::from_raw_os_error(number.saturating_neg())),
        })
    }

    /// `nlmsghdr`, `nfgenmsg` and an attribute (linux/netlink.h, linux/netfilter/nfnetlink.h).
    fn request(group: u16, attribute: u16, value: &[u8]) -> Vec<u8> {
        // NFNL_SUBSYS_ULOG and NFULNL_MSG_CONFIG; NLM_F_REQUEST and NLM_F_ACK.
        const KIND: u16 = 4 << 8 | 1;
        const FLAGS: u16 = 1 | 4;
        let length = 4 + value.len();
        let mut body = vec![0, 0];
        body.extend(group.to_be_bytes());
        body.extend(u16::try_from(length).unwrap_or_default().to_ne_bytes());
        body.extend(attribute.to_ne_bytes());
        body.extend(value);
        body.resize(4 + length.next_multiple_of(4), 0);
        let mut message = u32::try_from(16 + body.len()).unwrap_or_default().to_ne_bytes().to_vec();
        message.extend(KIND.to_ne_bytes());
        message.extend(FLAGS.to_ne_bytes());
        message.extend([0; 8]);
        message.extend(body);
        message
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc::channel, thread::JoinHandle};

    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

    use super::{super::nft::tests::enter_a_namespace_of_its_own, *};

    /// Runs a test on a thread in its own network namespace.
    fn apart(test: impl FnOnce() + Send + 'static) -> JoinHandle<()> {
        std::thread::spawn(|| {
            enter_a_namespace_of_its_own();
            test();
        })
    }

    #[test]
    fn one_of_a_network_namespace_has_the_lock_until_it_ends() {
        let (is_taken, taken) = channel();
        let (is_done, others_done) = channel();
        let one = apart(move || {
            assert!(!Lock::is_held());
            let lock = Lock::take().unwrap().unwrap();
            assert!(lock.held.is_some(), "this kernel has a packet log");
            assert!(Lock::is_held() && Lock::take().unwrap().is_none());
            is_taken.send(()).unwrap();
            others_done.recv().unwrap();
            assert!(Lock::is_held(), "to ask changes nothing");
            drop(lock);
            assert!(!Lock::is_held());
            assert!(Lock::take().unwrap().is_some());
        });
        taken.recv().unwrap();
        let another = apart(|| {
            assert!(!Lock::is_held(), "each namespace has its own");
            assert!(Lock::take().unwrap().is_some());
        });
        another.join().unwrap();
        is_done.send(()).unwrap();
        one.join().unwrap();
    }

    #[test]
    fn who_could_not_remove_the_rules_cannot_have_the_lock() {
        apart(|| {
            // An earlier version used this name as the lock.
            let name = SocketAddr::from_abstract_name("embassy/capture").unwrap();
            let _squatter = UnixDatagram::bind_addr(&name).unwrap();
            let mut sets = capabilities(None).unwrap();
            let all = sets;
            sets.effective.remove(CapabilitySet::NET_ADMIN);
            set_capabilities(None, sets).unwrap();
            let refused = Lock::take().unwrap_err();
            assert_eq!(Errno::from_io_error(&refused), Some(Errno::PERM));
            assert!(!Lock::is_held());
            set_capabilities(None, all).unwrap();
            let _lock = Lock::take().unwrap().unwrap();
            // If the holder cannot be determined, no other embassy is assumed.
            set_capabilities(None, sets).unwrap();
            assert!(Lock::take().is_err() && !Lock::is_held());
        })
        .join()
        .unwrap();
    }
}
