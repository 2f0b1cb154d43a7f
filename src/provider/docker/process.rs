//! A container's first process: the kernel tells of its end at once, and before its address can be given to another.
//! The engine's event comes later, and not at all from an engine that hangs.

use std::{
    collections::BTreeSet,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::OwnedFd,
    sync::Arc,
};

use rustix::{
    io::Errno,
    process::{Pid, PidfdFlags, pidfd_open},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::Notify,
};

use crate::{
    model::{Consumer, ConsumerId, ContainerId, Process, RunEnd},
    state::KeptConsumer,
};

/// The processes of one engine's containers.
#[derive(Debug, Default)]
pub(super) struct Processes {
    /// Whether one of them was ever seen. Then all of them can be: they are numbered alike.
    seen: bool,
    /// Rung when one has ended.
    ended: Arc<Notify>,
}

impl Processes {
    /// Rung when one that is watched has ended.
    pub(super) fn ended(&self) -> Arc<Notify> {
        self.ended.clone()
    }

    /// Says so when the run ends whose process this is, whatever the engine does meanwhile.
    ///
    /// Nothing is ever said where processes cannot be seen: the engine is on another host, or this is another PID
    /// namespace. Then the engine's events have to do.
    pub(super) fn watch(&mut self, id: &ContainerId, pid: i32, end: &RunEnd, bell: Arc<Notify>) {
        match open(id, pid) {
            Ok(process) => {
                self.seen = true;
                process.follow(end, vec![bell, self.ended.clone()]);
            }
            // It ended after the engine had looked.
            Err(error) if self.seen && is_gone(&error) => {
                end.come();
                bell.notify_one();
            }
            Err(error) => tracing::debug!(%id, pid, %error, "cannot watch the container's process"),
        }
    }
}

/// The consumer that an earlier embassy knew, if it is still the same run, with those of its addresses that its network
/// still has. Else why not.
pub fn resume(kept: KeptConsumer, bell: &Arc<Notify>) -> Result<Consumer, String> {
    let open = |id: &ContainerId, was: Process| {
        let process = open(id, was.pid)
            .map_err(|error| format!("process {} of container {id}: {error}", was.pid))?;
        match process.process == was {
            true => Ok(process),
            false => Err(format!("process {} of container {id} is of another run", was.pid)),
        }
    };
    let own = open(&kept.id, kept.process)?;
    let namespace = open(&kept.namespace, kept.namespace_process)?;
    // While nobody looked it may have left a network, and another may have its address.
    let has = addresses(kept.process.pid).map_err(|error| format!("its addresses: {error}"))?;
    let sources: Vec<_> = kept.sources.into_iter().filter(|source| has.contains(source)).collect();
    if sources.is_empty() {
        return Err("it has other addresses".to_owned());
    }
    let ends = [own, namespace].map(|process| {
        let end = RunEnd::default();
        process.follow(&end, vec![bell.clone()]);
        end
    });
    Ok(Consumer {
        id: ConsumerId::Container { id: kept.id, started_at: kept.started_at },
        name: kept.name,
        namespace: kept.namespace.as_str().into(),
        sources,
        gateways: kept.gateways,
        bindings: kept.bindings,
        ends: ends.into(),
    })
}

/// A process that is held: its number cannot become another's.
struct Held {
    process: Process,
    descriptor: AsyncFd<OwnedFd>,
}

impl Held {
    fn follow(self, end: &RunEnd, bells: Vec<Arc<Notify>>) {
        end.is_that_of(self.process);
        let end = end.clone();
        tokio::spawn(async move {
            // A pidfd is readable once its process has ended (man 2 pidfd_open).
            if self.descriptor.readable().await.is_ok() {
                end.come();
                bells.iter().for_each(|bell| bell.notify_one());
            }
        });
    }
}

fn open(id: &ContainerId, pid: i32) -> io::Result<Held> {
    let process = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
    let descriptor = pidfd_open(process, PidfdFlags::NONBLOCK)?;
    // Checked after it was opened: by now the number is held, whoever it belonged to when the engine answered.
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    if !cgroups.contains(id.as_str()) {
        return Err(io::ErrorKind::NotFound.into());
    }
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let started = started(&stat).ok_or(io::ErrorKind::InvalidData)?;
    Ok(Held { process: Process { pid, started }, descriptor: register(descriptor)? })
}

/// Whether there is no such process any more, or its number is another's.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || Errno::from_io_error(error) == Some(Errno::SRCH)
}

/// Field 22 of `/proc/pid/stat`. The second is the program's name in parentheses, which may hold anything.
fn started(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// The addresses that a process's network namespace has.
fn addresses(pid: i32) -> io::Result<BTreeSet<IpAddr>> {
    let v4 = fs::read_to_string(format!("/proc/{pid}/net/fib_trie"))?;
    // It is not there where the kernel has no IPv6.
    let v6 = fs::read_to_string(format!("/proc/{pid}/net/if_inet6")).unwrap_or_default();
    Ok(local_v4(&v4).map(IpAddr::from).chain(local_v6(&v6).map(IpAddr::from)).collect())
}

/// The local addresses in a `fib_trie`: each stands on the line before one that says `host LOCAL`.
fn local_v4(trie: &str) -> impl Iterator<Item = Ipv4Addr> + '_ {
    trie.lines().zip(trie.lines().skip(1)).filter_map(|(line, next)| {
        let address = line.trim_start().strip_prefix("|-- ")?;
        next.trim_end().ends_with("/32 host LOCAL").then(|| address.trim().parse().ok())?
    })
}

/// The addresses in an `if_inet6`: the first word of each line, in 32 hexadecimal digits.
fn local_v6(table: &str) -> impl Iterator<Item = Ipv6Addr> + '_ {
    let first = |line: &str| u128::from_str_radix(line.split_whitespace().next()?, 16).ok();
    table.lines().filter_map(first).map(Ipv6Addr::from)
}

#[expect(
    unsafe_code,
    reason = "tokio cannot know that a type keeps its descriptor open and the same"
)]
fn register(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is one descriptor, and keeps it open, until it is dropped; AsyncFd drops it after it has been
    // taken from epoll.
    Ok(unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }?)
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn our_own_network_has_loopback() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(addresses(own).unwrap().contains(&Ipv4Addr::LOCALHOST.into()));
        let stat = fs::read_to_string("/proc/self/stat").unwrap();
        assert!(started(&stat).is_some());
    }
}
