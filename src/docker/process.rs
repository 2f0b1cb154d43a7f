//! A container's first process. The kernel reports its end at once, before its address can be reused. The engine's event
//! comes later, or never if the engine hangs.

#![expect(clippy::disallowed_methods, reason = "reads files of the kernel, which need no disk")]

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Read},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::OwnedFd,
    sync::Arc,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, pidfd_open},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::Notify,
};

use super::container::{Attachment, Interfaces, SHOWN};
use crate::model::{ContainerId, Process, RunEnd};

/// The processes of one engine's containers.
#[derive(Debug, Default)]
pub(crate) struct Processes {
    /// Whether one of them was ever visible. Then all of them are, because they are in the same PID namespace.
    seen: bool,
    /// Whether the message about a missing control group was logged.
    said: bool,
    /// Notified when a process has ended.
    ended: Arc<Notify>,
}

impl Processes {
    /// Whether one of them was ever visible.
    pub(crate) fn are_seen(&self) -> bool {
        self.seen
    }

    /// Notified when a watched process has ended.
    pub(crate) fn ended(&self) -> Arc<Notify> {
        self.ended.clone()
    }

    /// Watches the process of a run, and reports the run's end independently of the engine. Must be called again while the
    /// process cannot be watched, because the cause may be temporary.
    ///
    /// If processes are not visible, it reports nothing: the engine is on another host, or in another PID namespace. Then
    /// only the engine's events report ends.
    pub(crate) fn watch(&mut self, id: &ContainerId, pid: i32, end: &RunEnd, bell: Arc<Notify>) {
        if end.has_ended() || end.process().is_some() {
            return;
        }
        match HeldProcess::open(id, pid) {
            Ok(process) => {
                self.seen = true;
                process.follow(end, vec![bell, self.ended.clone()]);
            }
            // It ended after the engine had looked.
            Err(Unseen::Gone) if self.seen => {
                end.mark_ended();
                bell.notify_one();
                self.ended.notify_one();
            }
            Err(error @ Unseen::Strange) if self.seen && !self.said => {
                self.said = true;
                tracing::warn!(%id, pid, %error, "cannot watch this container's process; relying on Docker events");
            }
            Err(error) => tracing::debug!(%id, pid, %error, "cannot watch the container's process"),
        }
    }
}

/// Why a container's process cannot be watched.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unseen {
    #[error("there is no such process")]
    Gone,
    #[error("the process is not in a control group with the container's ID")]
    Strange,
    #[error(transparent)]
    Failed(#[from] io::Error),
}

/// A process that is held by its pidfd. Its process ID may be reused after its end. So data read by the process ID counts
/// only if the pidfd shows afterwards that the process is still alive.
#[derive(Debug)]
pub(crate) struct HeldProcess {
    pub(crate) process: Process,
    descriptor: Arc<OwnedFd>,
    end: AsyncFd<Arc<OwnedFd>>,
}

impl HeldProcess {
    /// Opens the first process of a container, by its process ID.
    pub(crate) fn open(id: &ContainerId, pid: i32) -> Result<Self, Unseen> {
        let number =
            Pid::from_raw(pid).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let descriptor = pidfd_open(number, PidfdFlags::NONBLOCK).map_err(|error| match error {
            Errno::SRCH => Unseen::Gone,
            error => Unseen::Failed(error.into()),
        })?;
        let of = |file: &str| match fs::read_to_string(format!("/proc/{pid}/{file}")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Unseen::Gone),
            text => Ok(text?),
        };
        let (group, stat) = (of("cgroup")?, of("stat")?);
        // A process that has ended and was not waited for has already left its control groups.
        if has_ended(&descriptor)? {
            return Err(Unseen::Gone);
        }
        if !group.contains(id.as_str()) {
            return Err(Unseen::Strange);
        }
        let started = started(&stat).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
        let descriptor = Arc::new(descriptor);
        let end = register(descriptor.clone())?;
        Ok(Self { process: Process { pid, started }, descriptor, end })
    }

    /// What `look` reads by the process ID. An error if the process has ended.
    pub(crate) fn look<T>(&self, look: impl FnOnce(i32) -> T) -> Result<T, Unseen> {
        let found = look(self.process.pid);
        if has_ended(&self.descriptor)? { Err(Unseen::Gone) } else { Ok(found) }
    }

    /// Marks the run's end when the process ends, and rings the bells.
    pub(crate) fn follow(self, end: &RunEnd, bells: Vec<Arc<Notify>>) {
        end.is_held_by(self.descriptor);
        end.is_that_of(self.process);
        let end = end.clone();
        tokio::spawn(async move {
            if self.end.readable().await.is_ok() {
                end.mark_ended();
                bells.iter().for_each(|bell| bell.notify_one());
            }
        });
    }
}

/// What `look` reads by the process ID of a run's first process. `None` if the process was not seen or has ended: the
/// process ID may belong to another process. Asks the kernel, because the notification of an end takes a moment.
pub(crate) fn look<T>(run: &RunEnd, look: impl FnOnce(i32) -> T) -> Option<T> {
    let (process, descriptor) = (run.process()?, run.descriptor()?);
    let found = look(process.pid);
    let lives = !run.has_ended() && has_ended(descriptor).is_ok_and(|ended| !ended);
    lives.then_some(found)
}

/// A run whose first process is this one.
#[cfg(test)]
pub(crate) fn run_of_this_process() -> RunEnd {
    run_of(std::process::id())
}

#[cfg(test)]
fn run_of(pid: u32) -> RunEnd {
    let (run, number) = (RunEnd::default(), Pid::from_raw(i32::try_from(pid).unwrap()).unwrap());
    run.is_held_by(Arc::new(pidfd_open(number, PidfdFlags::NONBLOCK).unwrap()));
    run.is_that_of(Process { pid: number.as_raw_pid(), started: 1 });
    run
}

/// A pidfd is readable once its process has ended (man 2 pidfd_open).
fn has_ended(process: &OwnedFd) -> io::Result<bool> {
    let mut wanted = [PollFd::new(process, PollFlags::IN)];
    Ok(poll(&mut wanted, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))? > 0)
}

/// The start time: field 22 of `/proc/pid/stat`. The second field is the program's name in parentheses, which may contain
/// anything.
fn started(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// The addresses of our own network namespace.
pub(crate) fn ours() -> BTreeSet<IpAddr> {
    let pid = i32::try_from(std::process::id()).ok();
    pid.and_then(|pid| addresses(pid).ok()).unwrap_or_default()
}

/// The network of a container's first process: the addresses to which others can connect, and the default gateway if it is
/// one of `own`. `None` if there is no such address, if the process is not visible, or if it uses our own network.
pub(crate) fn shown(
    id: &ContainerId,
    pid: i32,
    own: &Interfaces,
    ours: &BTreeSet<IpAddr>,
) -> Option<Attachment> {
    let addresses = (pid > 0).then(|| addresses(pid))?.ok()?;
    // Comparing the namespaces themselves would need rights that embassy does not have as another user.
    if addresses == *ours {
        return None;
    }
    let is_own = |address: &IpAddr| own.values().flatten().any(|own| own == address);
    let addresses = addresses.into_iter().filter(|address| match address {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
    });
    // A container may set any address, even one of this host: an engine inside it has its own docker0.
    let addresses: Vec<_> = addresses.filter(|address| !is_own(address)).collect();
    let routes = read(&format!("/proc/{pid}/net/route")).unwrap_or_default();
    let gateways = default_gateways(&routes).map(IpAddr::from).filter(is_own).collect();
    // Read last: it shows that the process ID did not belong to another container by then.
    let group = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let is_seen = group.contains(id.as_str()) && !addresses.is_empty();
    is_seen.then(|| Attachment { name: SHOWN.into(), addresses, gateways, mac: None })
}

/// Whether a process has a network namespace. A process that ends has none for a moment before its end is reported.
pub(crate) fn has_network(pid: i32) -> bool {
    addresses(pid).is_ok()
}

/// Whether a process's network namespace has one of these addresses. The process of a virtual machine or a sandbox may have
/// none of them.
pub(crate) fn shows(pid: i32, addresses: impl IntoIterator<Item = IpAddr>) -> bool {
    self::addresses(pid).is_ok_and(|shown| addresses.into_iter().any(|one| shown.contains(&one)))
}

/// The gateways of the default routes in a `/proc/net/route`. The second column is the destination, the third the gateway,
/// in the machine's own byte order.
fn default_gateways(routes: &str) -> impl Iterator<Item = Ipv4Addr> + '_ {
    routes.lines().skip(1).filter_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let (destination, gateway) = (fields.next()?, fields.next()?);
        let gateway = u32::from_str_radix(gateway, 16).ok().filter(|gateway| *gateway != 0)?;
        (destination == "00000000").then(|| gateway.to_ne_bytes().into())
    })
}

/// The addresses of a process's network namespace. If there are tens of thousands, only some: an omitted address counts as
/// missing.
pub(crate) fn addresses(pid: i32) -> io::Result<BTreeSet<IpAddr>> {
    let v4 = read(&format!("/proc/{pid}/net/fib_trie"))?;
    // The file does not exist if the kernel has no IPv6.
    let v6 = read(&format!("/proc/{pid}/net/if_inet6")).unwrap_or_default();
    Ok(local_v4(&v4).map(IpAddr::from).chain(local_v6(&v6).map(IpAddr::from)).collect())
}

/// The start of a file about a network namespace. A container may make such a file as long as it likes.
fn read(path: &str) -> io::Result<String> {
    const LONGEST: u64 = 2 << 20;
    let mut text = String::new();
    fs::File::open(path)?.take(LONGEST).read_to_string(&mut text)?;
    Ok(text)
}

/// The local addresses in a `fib_trie`: each is on the line before one that says `host LOCAL`.
fn local_v4(trie: &str) -> impl Iterator<Item = Ipv4Addr> + '_ {
    trie.lines().zip(trie.lines().skip(1)).filter_map(|(line, next)| {
        let address = line.trim_start().strip_prefix("|-- ")?;
        next.trim_end().ends_with("/32 host LOCAL").then(|| address.trim().parse().ok())?
    })
}

/// The addresses in an `if_inet6`: the first word of each line, 32 hexadecimal digits.
fn local_v6(table: &str) -> impl Iterator<Item = Ipv6Addr> + '_ {
    let first = |line: &str| u128::from_str_radix(line.split_whitespace().next()?, 16).ok();
    table.lines().filter_map(first).map(Ipv6Addr::from)
}

#[expect(
    unsafe_code,
    reason = "tokio cannot know that a type keeps its descriptor open and the same"
)]
pub(super) fn register(descriptor: Arc<OwnedFd>) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    // SAFETY: an OwnedFd is one descriptor and keeps it open until it is dropped, which does not happen before the last Arc
    // is dropped. AsyncFd drops its Arc after it has removed the descriptor from epoll.
    Ok(unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> i32 {
        i32::try_from(std::process::id()).unwrap()
    }

    /// The process ID of a process that has ended.
    fn former() -> i32 {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        i32::try_from(child.id()).unwrap()
    }

    #[tokio::test]
    async fn who_is_in_no_control_group_of_its_id_is_not_taken_for_ended() {
        let (id, bell) = (ContainerId::new("0123456789abcdef"), Arc::<Notify>::default());
        let mut processes = Processes::default();
        let watch = |processes: &mut Processes, pid| {
            let end = RunEnd::default();
            processes.watch(&id, pid, &end, bell.clone());
            end
        };
        // If no process was ever visible, a missing one means nothing.
        assert!(!watch(&mut processes, former()).has_ended());
        processes.seen = true;
        assert!(watch(&mut processes, former()).has_ended());
        let end = watch(&mut processes, own());
        assert!(!end.has_ended() && end.process().is_none());
        assert!(processes.said);
        assert!(matches!(HeldProcess::open(&id, own()), Err(Unseen::Strange)));
    }

    #[tokio::test]
    async fn who_has_ended_and_was_not_waited_for_is_gone() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let id = ContainerId::new("0123456789abcdef");
        testbed::eventually(std::time::Duration::from_secs(20), "its end", || {
            let is_gone = matches!(HeldProcess::open(&id, pid), Err(Unseen::Gone));
            anyhow::ensure!(is_gone, "it lives");
            Ok(())
        })
        .unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn what_a_number_shows_counts_only_while_its_process_lives() {
        let mut child =
            std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let run = run_of(child.id());
        assert_eq!(look(&run, |pid| pid), i32::try_from(child.id()).ok());
        // It ends while it is looked at, and another process may get its ID.
        let found = look(&run, |_| {
            child.kill().unwrap();
            child.wait().unwrap();
            "another's"
        });
        assert_eq!(found, None);
        assert!(!run.has_ended(), "nobody has heard of that yet");
        run.mark_ended();
        assert_eq!(look(&run, |_| ()), None);
        assert_eq!(look(&RunEnd::default(), |_| ()), None, "it was never seen");
    }

    #[test]
    fn a_programs_name_does_not_confuse_its_start() {
        let stat = "7 (a) b 1 (c) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4711 1 1 1";
        assert_eq!(started(stat), Some(4711));
        assert_eq!(started(""), None);
        assert_eq!(started("7 (a) S 1"), None);
    }

    #[test]
    fn the_addresses_of_a_network_are_read() {
        let trie = "\
Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
     +-- 172.17.0.0/16 2 0 2
        +-- 172.17.0.0/30 2 0 2
           |-- 172.17.0.0
              /16 link UNICAST
           |-- 172.17.0.2
              /32 host LOCAL
        |-- 172.17.255.255
           /32 link BROADCAST
";
        assert_eq!(local_v4(trie).collect::<Vec<_>>(), [Ipv4Addr::new(172, 17, 0, 2)]);
        let table = "\
00000000000000000000000000000001 01 80 10 80       lo
fd000d0c000000000000000000000002 05 40 00 80     eth0
";
        let expected: [Ipv6Addr; 2] = ["::1".parse().unwrap(), "fd00:d0c::2".parse().unwrap()];
        assert_eq!(local_v6(table).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn a_network_with_more_than_anybody_needs_is_read_in_part() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let line = "fd000d0c000000000000000000000002 05 40 00 80     eth0\n";
        fs::write(file.path(), line.repeat(100_000)).unwrap();
        let text = read(file.path().to_str().unwrap()).unwrap();
        assert!(text.len() < 3 << 20, "{} bytes", text.len());
        assert!(local_v6(&text).count() > 10_000);
    }

    #[test]
    fn a_default_gateway_is_read() {
        let hex = |text: &str| {
            format!("{:08X}", u32::from_ne_bytes(text.parse::<Ipv4Addr>().unwrap().octets()))
        };
        let routes = format!(
            "Iface\tDestination\tGateway \tFlags\n\
             eth0\t00000000\t{}\t0003\n\
             eth0\t{}\t00000000\t0001\n\
             eth1\t00000000\t00000000\t0001\nx\n",
            hex("172.26.64.1"),
            hex("172.26.64.0")
        );
        let expected = [Ipv4Addr::new(172, 26, 64, 1)];
        assert_eq!(default_gateways(&routes).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn our_own_network_is_no_containers() {
        let id = ContainerId::new("");
        assert_eq!(shown(&id, own(), &Interfaces::new(), &ours()), None);
        assert_eq!(shown(&id, 0, &Interfaces::new(), &ours()), None);
        assert_eq!(shown(&id, former(), &Interfaces::new(), &ours()), None);
        assert!(has_network(own()) && !has_network(former()));
    }

    #[test]
    fn our_own_network_has_loopback() {
        assert!(addresses(own()).unwrap().contains(&Ipv4Addr::LOCALHOST.into()));
        let stat = fs::read_to_string("/proc/self/stat").unwrap();
        assert!(started(&stat).is_some());
    }
}
