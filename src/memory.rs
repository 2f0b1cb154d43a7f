//! The memory limit of the control group that a process is in, and the use. At the limit the kernel kills processes. And how memory is
//! given back.

#![expect(clippy::disallowed_methods, reason = "reads files of the kernel, which need no disk")]

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use tracing::{info, warn};

/// The control groups that limit a process: its own and those above it, as far as they are visible.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Memory(Vec<ControlGroup>);

/// Used bytes, and the limit in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Use {
    /// Without reclaimable memory, which is the page cache.
    pub used: u64,
    pub limit: u64,
}

impl Use {
    /// Whether at least this percentage is used.
    pub fn reaches(self, percent: u64) -> bool {
        self.used / percent >= self.limit / 100
    }
}

/// Percentage from which new connections are refused: at 100 the kernel kills, and other processes of the group need memory
/// too.
pub const NEAR: u64 = 90;
/// Percentage below which they are accepted again.
const FAR: u64 = 85;
/// Poll interval. Many new connections may use a tenth of a small limit in less than a second.
const LOOK: Duration = Duration::from_millis(200);

impl Memory {
    /// The control groups of this process.
    pub fn of_this_process() -> Self {
        Self::of("self")
    }

    /// The control groups of another process, by its ID in this `/proc`.
    pub fn of_process(pid: u32) -> Self {
        Self::of(&pid.to_string())
    }

    fn of(process: &str) -> Self {
        // If they cannot be read, no limit is known.
        let groups = fs::read_to_string(format!("/proc/{process}/cgroup")).unwrap_or_default();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        Self(
            mounts
                .lines()
                .filter_map(Mount::read)
                .flat_map(|mount| mount.groups(&groups))
                .collect(),
        )
    }

    /// The use of the group that is nearest to its limit. `None`: there is no limit.
    pub fn tightest(&self) -> Option<Use> {
        let share = |r#use: &Use| (u128::from(r#use.used) << 64) / u128::from(r#use.limit.max(1));
        self.uses().max_by_key(share)
    }

    /// The number of bytes that may still be used before connections are refused. `None`: there is no limit.
    pub fn room(&self) -> Option<u64> {
        self.uses().map(|Use { used, limit }| (limit / 100 * NEAR).saturating_sub(used)).min()
    }

    /// Keeps `short` up to date. Returns at once if there is no limit.
    pub async fn watch(self, short: Arc<Short>) {
        if self.tightest().is_none() {
            return;
        }
        loop {
            // A limit may be changed or removed.
            if let Some(now) = self.tightest() {
                short.look(now);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    fn uses(&self) -> impl Iterator<Item = Use> {
        self.0.iter().filter_map(ControlGroup::usage)
    }
}

/// Gives what was freed back to the kernel: by itself the allocator keeps all that lies below anything still in use. It takes
/// milliseconds, in which a thread that allocates may have to wait.
pub(crate) fn give_back() {
    // SAFETY: it takes no pointers, and any thread may call it at any time (man 3 malloc_trim: MT-Safe).
    #[cfg(target_env = "gnu")]
    #[allow(unsafe_code)]
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Whether memory is nearly used up.
#[derive(Debug, Default)]
pub struct Short(AtomicBool);

impl Short {
    pub fn get(&self) -> bool {
        self.0.load(Relaxed)
    }

    pub(crate) fn look(&self, now: Use) {
        let Use { used, limit } = now;
        if !self.get() && now.reaches(NEAR) {
            self.0.store(true, Relaxed);
            warn!(used, limit, "memory is nearly used up; new connections are refused");
        } else if self.get() && !now.reaches(FAR) {
            self.0.store(false, Relaxed);
            info!(used, limit, "memory is available again; new connections are accepted");
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CgroupVersion {
    V1,
    V2,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct ControlGroup {
    dir: PathBuf,
    version: CgroupVersion,
}

impl ControlGroup {
    fn usage(&self) -> Option<Use> {
        let read = |name: &str| fs::read_to_string(self.dir.join(name)).ok();
        let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
        let stat = read("memory.stat")?;
        let (limit, used, kept) = match self.version {
            CgroupVersion::V1 => {
                // Without a limit the value is the largest possible number of pages.
                let limit = number("memory.limit_in_bytes").filter(|limit| *limit < 1 << 60);
                let kept = sum(&stat, &["total_active_file", "total_inactive_file"]);
                (limit?, number("memory.usage_in_bytes")?, kept)
            }
            CgroupVersion::V2 => {
                // Above `memory.high` the kernel slows the group down so much that it hardly runs.
                let limits = ["memory.max", "memory.high"].into_iter().filter_map(number);
                let kept = sum(&stat, &["active_file", "inactive_file", "slab_reclaimable"]);
                (limits.min()?, number("memory.current")?, kept)
            }
        };
        Some(Use { used: used.saturating_sub(kept), limit })
    }
}

/// The sum of some lines of `memory.stat`.
fn sum(stat: &str, names: &[&str]) -> u64 {
    let lines = stat.lines().filter_map(|line| line.split_once(' '));
    lines.filter(|(name, _)| names.contains(name)).filter_map(|(_, n)| n.parse::<u64>().ok()).sum()
}

/// A hierarchy of control groups that may have memory limits.
#[derive(Debug)]
struct Mount<'a> {
    /// The part of the hierarchy that is mounted here.
    root: &'a Path,
    at: &'a Path,
    version: CgroupVersion,
}

impl<'a> Mount<'a> {
    /// Parses a line of `mountinfo` (man 5 proc_pid_mountinfo).
    fn read(line: &'a str) -> Option<Self> {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(3);
        let (root, at) = (Path::new(mount.next()?), Path::new(mount.next()?));
        let mut filesystem = filesystem.split(' ');
        let version = match filesystem.next()? {
            "cgroup2" => CgroupVersion::V2,
            "cgroup" if filesystem.nth(1)?.split(',').any(|option| option == "memory") => {
                CgroupVersion::V1
            }
            _ => return None,
        };
        Some(Self { root, at, version })
    }

    /// The group in `/proc/<pid>/cgroup`, and those above it, up to the mounted one.
    fn groups(&self, cgroup: &str) -> Vec<ControlGroup> {
        let of_this = |line: &'_ str| {
            let (number, rest) = line.split_once(':')?;
            let (controllers, path) = rest.split_once(':')?;
            let is_this = match self.version {
                CgroupVersion::V1 => controllers.split(',').any(|one| one == "memory"),
                CgroupVersion::V2 => number == "0" && controllers.is_empty(),
            };
            is_this.then(|| PathBuf::from(path))
        };
        let Some(path) = cgroup.lines().find_map(of_this) else { return Vec::new() };
        // In a container, only its own group may be mounted, with another name than outside.
        let below = path.strip_prefix(self.root).unwrap_or(Path::new(""));
        let group = |below: &Path| ControlGroup { dir: self.at.join(below), version: self.version };
        below.ancestors().map(group).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn groups(cgroup: &str, mountinfo: &str) -> Vec<String> {
        let mounts = mountinfo.lines().filter_map(Mount::read);
        let groups = mounts.flat_map(|mount| mount.groups(cgroup));
        groups.map(|group| format!("{:?} {}", group.version, group.dir.display())).collect()
    }

    const V2: &str = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";

    #[test]
    fn groups_are_found_from_the_own_one_up() {
        let all = groups("0::/system.slice/embassy.service\n", V2);
        assert_eq!(
            all,
            [
                "V2 /sys/fs/cgroup/system.slice/embassy.service",
                "V2 /sys/fs/cgroup/system.slice",
                "V2 /sys/fs/cgroup/"
            ]
        );
        assert_eq!(groups("0::/\n", V2), ["V2 /sys/fs/cgroup/"]);
    }

    #[test]
    fn a_container_sees_its_own_group_under_another_name() {
        let cgroup = "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/docker/abc\n";
        let mounts = "1 2 0:1 / / rw - overlay overlay rw\n\
            40 30 0:30 /docker/abc /sys/fs/cgroup/memory ro shared:5 - cgroup cgroup rw,memory\n\
            41 30 0:31 /docker/abc /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu,cpuacct\n";
        assert_eq!(groups(cgroup, mounts), ["V1 /sys/fs/cgroup/memory/"]);
        // The name differs from the mounted one: the mounted group is used.
        assert_eq!(groups("0::/../other\n", &V2.replace(" / ", " /own ")), ["V2 /sys/fs/cgroup/"]);
        assert!(groups("", mounts).is_empty() && groups(cgroup, "nonsense\n - \n").is_empty());
    }

    fn memory(version: CgroupVersion, groups: &[&[(&str, &str)]]) -> (tempfile::TempDir, Memory) {
        let dir = tempfile::tempdir().unwrap();
        let group = |(n, files): (usize, &&[(&str, &str)])| {
            let dir = dir.path().join(n.to_string());
            fs::create_dir(&dir).unwrap();
            files.iter().for_each(|(name, text)| fs::write(dir.join(name), text).unwrap());
            ControlGroup { dir, version }
        };
        let groups = groups.iter().enumerate().map(group).collect();
        (dir, Memory(groups))
    }

    #[test]
    fn what_the_kernel_can_take_back_is_not_in_use() {
        let own = [
            ("memory.max", "1000\n"),
            ("memory.high", "max\n"),
            ("memory.current", "950\n"),
            (
                "memory.stat",
                "anon 500\ninactive_file 300\nactive_file 40\nslab_reclaimable 10\nsock 9\n",
            ),
        ];
        let (_dir, v2) = memory(CgroupVersion::V2, &[&own]);
        assert_eq!(v2.tightest(), Some(Use { used: 600, limit: 1000 }));
        let own = [
            ("memory.limit_in_bytes", "1000\n"),
            ("memory.usage_in_bytes", "950\n"),
            ("memory.stat", "active_file 1\ntotal_active_file 200\ntotal_inactive_file 100\n"),
        ];
        let (_dir, v1) = memory(CgroupVersion::V1, &[&own]);
        assert_eq!(v1.tightest(), Some(Use { used: 650, limit: 1000 }));
        assert_eq!(v1.room(), Some(250));
    }

    #[test]
    fn the_group_that_is_nearest_to_its_limit_counts() {
        let group = |high, current| {
            [
                ("memory.max", "max"),
                ("memory.high", high),
                ("memory.current", current),
                ("memory.stat", ""),
            ]
        };
        let (_dir, memory) = memory(
            CgroupVersion::V2,
            &[&group("max", "7"), &group("1000", "500"), &group("2000", "1800"), &[]],
        );
        assert_eq!(memory.tightest(), Some(Use { used: 1800, limit: 2000 }));
        assert_eq!(memory.room(), Some(0));
    }

    #[test]
    fn no_limit_is_no_limit() {
        let own = [
            ("memory.limit_in_bytes", "9223372036854771712\n"),
            ("memory.usage_in_bytes", "1\n"),
            ("memory.stat", ""),
        ];
        let (_dir, memory) = memory(CgroupVersion::V1, &[&own]);
        assert_eq!((memory.tightest(), memory.room()), (None, None));
    }

    #[test]
    fn short_begins_near_the_limit_and_ends_well_below_it() {
        let short = Short::default();
        let at = |used| {
            short.look(Use { used, limit: 1000 });
            short.get()
        };
        assert_eq!(
            [0, 899, 900, 860, 850, 849, 899].map(at),
            [false, false, true, true, true, false, false]
        );
    }
}
