//! Control groups: they count the CPU time and the kernel memory of the processes in them.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use testbed::{Container, Host};

/// A group in every hierarchy of the machine (v1, v2 or both).
#[derive(Debug)]
pub(crate) struct Group {
    folders: Vec<PathBuf>,
}

impl Group {
    /// Creates a group next to those of the host's containers. It is removed with the host.
    pub(crate) fn new(host: &Host, name: &str) -> Result<Self> {
        let group = Self::at(&host.cgroup(), name)?;
        for folder in &group.folders {
            fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        }
        Ok(group)
    }

    /// The group of a container.
    pub(crate) fn of(host: &Host, container: &Container) -> Result<Self> {
        Self::at(&host.cgroup(), container.id())
    }

    /// Its name, for [`Group::named`].
    pub(crate) fn name(&self) -> String {
        self.folders.iter().map(|f| f.display().to_string()).collect::<Vec<_>>().join(" ")
    }

    /// A group that exists, by its name.
    pub(crate) fn named(name: &str) -> Self {
        Self { folders: name.split(' ').map(PathBuf::from).collect() }
    }

    fn at(parent: &str, name: &str) -> Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
        let folder = |line: &str| {
            let mut words = line.split(' ').skip(1);
            let (path, kind, options) = (words.next()?, words.next()?, words.next()?);
            let is_ours = options.split(',').any(|o| matches!(o, "cpu" | "cpuacct" | "memory"));
            (kind == "cgroup2" || kind == "cgroup" && is_ours)
                .then(|| Path::new(path).join(parent).join(name))
        };
        let folders: BTreeSet<_> = mounts.lines().filter_map(folder).collect();
        ensure!(!folders.is_empty(), "no control groups are mounted");
        Ok(Self { folders: folders.into_iter().collect() })
    }

    /// A command that runs in this group, inside the host, with the maximum number of descriptors.
    pub(crate) fn command(&self, host: &Host) -> Command {
        const ENTER: &str = "ulimit -n \"$(ulimit -H -n)\"; \
            for group in $CONTROL_GROUPS; do echo 0 >\"$group/cgroup.procs\"; done; exec \"$@\"";
        let mut command = host.command("sh");
        command.args(["-c", ENTER, "sh"]).env("CONTROL_GROUPS", self.name());
        command
    }

    /// Whether no process is in it.
    pub(crate) fn is_empty(&self) -> bool {
        self.read("cgroup.procs").is_none_or(|processes| processes.trim().is_empty())
    }

    /// CPU time used so far.
    pub(crate) fn cpu(&self) -> Result<Duration> {
        if let Some(text) = self.read("cpuacct.usage") {
            return Ok(Duration::from_nanos(text.trim().parse()?));
        }
        let text = self.read("cpu.stat").context("the control group counts no processor time")?;
        let used = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
        Ok(Duration::from_micros(used.context("no usage_usec in cpu.stat")?.parse()?))
    }

    /// Resident memory of its processes, in bytes.
    pub(crate) fn resident(&self) -> Result<u64> {
        let mut kib = 0;
        for pid in self.read("cgroup.procs").unwrap_or_default().split_whitespace() {
            // A process that has ended uses none.
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let of_process = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
            kib += of_process
                .map_or(Ok(0), |text| text.trim().trim_end_matches(" kB").parse::<u64>())?;
        }
        Ok(kib * 1024)
    }

    /// Kernel memory of its processes, in bytes: sockets, descriptors, unread and unsent data.
    pub(crate) fn kernel(&self) -> Result<u64> {
        if let Some(text) = self.read("memory.kmem.usage_in_bytes") {
            return Ok(text.trim().parse()?);
        }
        let text = self.read("memory.stat").context("the control group counts no memory")?;
        let used = text.lines().find_map(|line| line.strip_prefix("kernel "));
        Ok(used.context("no kernel in memory.stat")?.parse()?)
    }

    fn read(&self, file: &str) -> Option<String> {
        self.folders.iter().find_map(|folder| fs::read_to_string(folder.join(file)).ok())
    }
}
