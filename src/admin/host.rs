//! The host's resources that the process uses, from `/proc`. A value that cannot be read is `None`.

#![expect(clippy::disallowed_methods, reason = "reads files of the kernel, which need no disk")]

use std::{fs, path::Path};

use rustix::{
    param::{clock_ticks_per_second, page_size},
    process::{Resource, getrlimit},
};

use super::{api, view};
use crate::{
    judgement::HostUse,
    memory::{Memory, Use},
};

pub(super) fn host() -> api::Host {
    let conntrack = |name: &str| number(&Path::new("/proc/sys/net/netfilter").join(name));
    let memory = Memory::of_this_process().tightest();
    let stat = fs::read_to_string("/proc/self/stat").ok();
    let boot = fs::read_to_string("/proc/stat").ok();
    api::Host {
        conntrack_entries: conntrack("nf_conntrack_count"),
        conntrack_limit: conntrack("nf_conntrack_max"),
        descriptors: descriptors(),
        descriptors_limit: getrlimit(Resource::Nofile).current,
        resident_bytes: fs::read_to_string("/proc/self/statm")
            .ok()
            .and_then(|text| resident(&text)),
        memory_used_bytes: memory.map(|memory| memory.used),
        memory_limit_bytes: memory.map(|memory| memory.limit),
        cpu_seconds: stat.as_deref().and_then(cpu),
        started_seconds: stat
            .as_deref()
            .zip(boot.as_deref())
            .and_then(|(stat, boot)| started(stat, boot)),
    }
}

/// The use and limits of the resources that are judged.
pub(super) fn in_use(host: &api::Host) -> HostUse {
    let of = |used: Option<u64>, limit: Option<u64>| {
        used.zip(limit).map(|(used, limit)| Use { used, limit })
    };
    HostUse {
        conntrack: of(host.conntrack_entries, host.conntrack_limit),
        descriptors: of(host.descriptors, host.descriptors_limit),
        memory: of(host.memory_used_bytes, host.memory_limit_bytes),
    }
}

/// The number of open descriptors. Since Linux 6.2 it is the size of the directory (Documentation/filesystems/proc.rst,
/// 3.1). Before, the size is 0, and the entries are counted.
fn descriptors() -> Option<u64> {
    const ALL: &str = "/proc/self/fd";
    match fs::metadata(ALL).ok()?.len() {
        // One of them is for reading the directory itself.
        0 => Some((fs::read_dir(ALL).ok()?.count() as u64).saturating_sub(1)),
        number => Some(number),
    }
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The resident memory: the second field of `statm`, in pages (man 5 proc).
fn resident(statm: &str) -> Option<u64> {
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * page_size() as u64)
}

/// The CPU time: fields 14 and 15 of `stat`, in ticks. Field 2, the name, may contain spaces and parentheses.
fn cpu(stat: &str) -> Option<f64> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split_whitespace().skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    let time = std::time::Duration::from_secs_f64(
        (user + system) as f64 / clock_ticks_per_second() as f64,
    );
    Some(view::seconds(time))
}

/// The start time: field 22 of `stat`, in ticks since the `btime` of `/proc/stat`.
fn started(stat: &str, boot: &str) -> Option<f64> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let ticks: u64 = rest.split_whitespace().nth(19)?.parse().ok()?;
    let boot = boot.lines().find_map(|line| line.strip_prefix("btime "))?;
    let boot: u64 = boot.trim().parse().ok()?;
    Some(boot as f64 + ticks as f64 / clock_ticks_per_second() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_sees_itself() {
        let host = host();
        assert!(host.resident_bytes > Some(1_000_000), "{host:?}");
        assert!(host.descriptors > Some(2) && host.descriptors < host.descriptors_limit);
        assert!(host.cpu_seconds.is_some());
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let age = now.as_secs_f64() - host.started_seconds.unwrap();
        assert!((-5.0..3_600.0).contains(&age), "{age}");
    }

    #[test]
    fn each_open_descriptor_is_counted() {
        let many = [(); 300].map(|()| fs::File::open("/dev/null").unwrap());
        assert!(descriptors() > Some(300));
        drop(many);
    }

    #[test]
    fn a_name_may_hold_anything() {
        let stat = "7 (a) b (c) S 1 1 1 0 -1 4194560 1 0 0 0 150 50 0 0 20 0 1 0 100 0 0";
        assert_eq!(cpu(stat), Some(200.0 / clock_ticks_per_second() as f64));
        assert_eq!((cpu(""), resident("")), (None, None));
    }
}
