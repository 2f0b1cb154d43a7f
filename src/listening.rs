//! Who listens at an address of this host, as far as it can be seen: for an error that says that the address is in use, and for commands
//! that get no answer.

#![expect(clippy::disallowed_methods, reason = "reads files of the kernel, which need no disk")]

use std::{
    collections::BTreeSet,
    fmt, fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
};

/// A process that listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    pub pid: u32,
    /// The name of its program.
    pub name: String,
    /// Whether it was stopped, as by SIGSTOP.
    pub is_stopped: bool,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (process {})", self.name, self.pid)
    }
}

/// The program that listens at an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortHolder {
    Nobody,
    Process(Holder),
    /// A program that is not visible from here.
    Hidden,
}

impl PortHolder {
    /// What an error that an address is in use says besides that: who has it, and what to do about it. Begins with a colon, if it is not
    /// empty.
    pub fn already(&self) -> String {
        match self {
            Self::Nobody => String::new(),
            Self::Process(holder) => {
                format!(": {holder} listens there; stop it, or give this embassy another address")
            }
            Self::Hidden => {
                ": a program that is not visible from here listens there (ss -ltnp on the host names it); stop it, or give this embassy another address".to_owned()
            }
        }
    }
}

/// Who listens where `address` is listened at, or at its port on all addresses.
pub fn at(address: SocketAddr) -> PortHolder {
    holder(|socket| {
        let Socket { at, .. } = socket;
        at.port() == address.port()
            && (at.ip() == address.ip()
                || at.ip().is_unspecified()
                || address.ip().is_unspecified())
    })
}

/// Who listens at a Unix socket of this path.
pub fn at_path(path: &Path) -> PortHolder {
    let list = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    of_inodes(&list.lines().filter_map(|line| unix_inode(line, path)).collect())
}

/// The ports on which a program listens for TCP.
pub fn ports() -> BTreeSet<u16> {
    sockets().into_iter().map(|socket| socket.at.port()).collect()
}

fn holder(is_one: impl Fn(&Socket) -> bool) -> PortHolder {
    of_inodes(&sockets().into_iter().filter(is_one).map(|socket| socket.inode).collect())
}

/// A socket that listens for TCP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Socket {
    at: SocketAddr,
    inode: u64,
}

fn sockets() -> Vec<Socket> {
    let lists = ["/proc/net/tcp", "/proc/net/tcp6"].map(fs::read_to_string);
    let lists = lists.into_iter().flatten();
    lists.flat_map(|list| list.lines().skip(1).filter_map(socket).collect::<Vec<_>>()).collect()
}

/// A line of `/proc/net/tcp` or `/proc/net/tcp6`, if it is about a socket that listens.
fn socket(line: &str) -> Option<Socket> {
    let fields: Vec<_> = line.split_whitespace().collect();
    let (ip, port) = fields.get(1)?.rsplit_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    // The kernel prints each four bytes as a number, in this machine's byte order.
    let word = |at: usize| {
        let word = u32::from_str_radix(ip.get(at..at + 8)?, 16).ok()?;
        Some(word.to_ne_bytes())
    };
    let ip: IpAddr = match ip.len() {
        8 => Ipv4Addr::from(word(0)?).into(),
        32 => {
            let words = [word(0)?, word(8)?, word(16)?, word(24)?];
            let mut bytes = [0; 16];
            bytes.iter_mut().zip(words.iter().flatten()).for_each(|(to, from)| *to = *from);
            Ipv6Addr::from(bytes).to_canonical()
        }
        _ => return None,
    };
    // 0A is TCP_LISTEN (include/net/tcp_states.h).
    let inode = fields.get(9)?.parse().ok()?;
    (*fields.get(3)? == "0A").then_some(Socket { at: SocketAddr::new(ip, port), inode })
}

/// The inode in a line of `/proc/net/unix`, if it is about a socket that listens at this path.
fn unix_inode(line: &str, path: &Path) -> Option<u64> {
    let mut fields = line.split_whitespace();
    // __SO_ACCEPTCON (include/linux/net.h).
    const LISTENS: u32 = 1 << 16;
    let flags = u32::from_str_radix(fields.nth(3)?, 16).ok()?;
    let inode = fields.nth(2)?.parse().ok()?;
    let at = line.split_once(" /").map(|(_, rest)| format!("/{rest}"))?;
    (flags & LISTENS != 0 && Path::new(&at) == path).then_some(inode)
}

/// The first visible process that has one of these sockets.
fn of_inodes(inodes: &BTreeSet<u64>) -> PortHolder {
    if inodes.is_empty() {
        return PortHolder::Nobody;
    }
    let names: BTreeSet<_> = inodes.iter().map(|inode| format!("socket:[{inode}]")).collect();
    let has = |pid: &u32| {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        descriptors
            .filter_map(|fd| fs::read_link(fd.path()).ok())
            .any(|to| to.to_str().is_some_and(|to| names.contains(to)))
    };
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.find(has).map_or(PortHolder::Hidden, |pid| PortHolder::Process(process(pid)))
}

fn process(pid: u32) -> Holder {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Holder { pid, name: name.trim().to_owned(), is_stopped: is_stopped(pid) }
}

/// Whether a process was stopped, as by SIGSTOP (man 5 proc_pid_status).
pub fn is_stopped(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let state = status.lines().find_map(|line| line.strip_prefix("State:")).map(str::trim_start);
    state.is_some_and(|state| state.starts_with(['T', 't']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_is_known_by_its_address() {
        let line = |local: &str, state: &str| {
            format!(
                "   0: {local} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000     0        0 4711 1"
            )
        };
        let found = |local: &str| socket(&line(local, "0A")).map(|socket| socket.at.to_string());
        let (v4, any, v6) = match cfg!(target_endian = "little") {
            true => ("0100007F:2706", "00000000:270F", "000080FE000000000000000001000000:0050"),
            false => ("7F000001:2706", "00000000:270F", "FE800000000000000000000000000001:0050"),
        };
        assert_eq!(found(v4).as_deref(), Some("127.0.0.1:9990"));
        assert_eq!(found(any).as_deref(), Some("0.0.0.0:9999"));
        assert_eq!(found(v6).as_deref(), Some("[fe80::1]:80"));
        assert_eq!(found("0100007F"), None);
        // A connected socket does not listen.
        assert_eq!(socket(&line(v4, "01")), None);
        assert_eq!(socket(""), None);
    }

    #[test]
    fn this_process_is_found_where_it_listens() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let PortHolder::Process(holder) = at(address) else { panic!("{:?}", at(address)) };
        assert_eq!((holder.pid, holder.is_stopped), (std::process::id(), false));
        assert!(ports().contains(&address.port()));
        let other = SocketAddr::new([127, 0, 0, 2].into(), address.port());
        assert_eq!(at(other), PortHolder::Nobody);
        let any = SocketAddr::new([0, 0, 0, 0].into(), address.port());
        assert!(matches!(at(any), PortHolder::Process(_)));
        drop(listener);
        assert_eq!(at(address), PortHolder::Nobody);

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a socket");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(
            matches!(at_path(&path), PortHolder::Process(one) if one.pid == std::process::id())
        );
        assert_eq!(at_path(&folder.path().join("other")), PortHolder::Nobody);
    }
}
