//! The control group of a container: its identity on the kernel path.

#![expect(
    clippy::disallowed_methods,
    reason = "reads files of the kernel on a thread that serves nothing else"
)]

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
};

use crate::{docker::process, model::RunEnd};

/// A control group of version 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cgroup {
    /// What the kernel calls it by: the inode of its folder. Never another's later.
    pub(super) id: u64,
    /// Its depth below the root, which is 0.
    pub(super) level: u32,
}

/// Where the host's hierarchy of version 2 is mounted.
#[derive(Debug, Clone)]
pub(super) struct Hierarchy(PathBuf);

impl Hierarchy {
    /// `None` if its root is not visible.
    pub(super) fn find() -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
        // Only the root has no type: what a container in a control group namespace of its own sees at /sys/fs/cgroup is no root.
        let is_root = |mount: &PathBuf| {
            mount.join("cgroup.controllers").is_file() && !mount.join("cgroup.type").exists()
        };
        of_version_2(&mounts).into_iter().find(is_root).map(Self)
    }

    pub(super) fn root(&self) -> &Path {
        &self.0
    }

    /// The inode of the root.
    pub(super) fn root_id(&self) -> Option<u64> {
        fs::metadata(&self.0).ok().map(|root| root.ino())
    }

    /// The control group of a container's run. Its first process shows it; if that is not visible, its name has the container's ID.
    /// `everywhere`: if it is not at a usual place, all control groups are read. That is slow on a large host.
    pub(super) fn of_container(
        &self,
        id: &str,
        run: Option<&RunEnd>,
        everywhere: bool,
    ) -> Option<Cgroup> {
        let shown = run.and_then(|run| {
            let group = process::look(run, |pid| {
                let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
                self.read(&of_process(&text, id)?)
            });
            group.flatten()
        });
        let found = shown.or_else(|| self.by_usual_name(id));
        if everywhere { found.or_else(|| self.search(id)) } else { found }
    }

    /// Where engines usually put containers.
    fn by_usual_name(&self, id: &str) -> Option<Cgroup> {
        let usual = [
            format!("docker/{id}"),
            format!("system.slice/docker-{id}.scope"),
            format!("machine.slice/libpod-{id}.scope"),
            format!("libpod_parent/libpod-{id}"),
        ];
        usual.iter().find_map(|path| self.read(Path::new(path)))
    }

    /// Wherever a folder has the ID in its name. Looks level by level, and into no container: it could name a folder as it likes.
    fn search(&self, id: &str) -> Option<Cgroup> {
        const DEEPEST: usize = 6;
        const MOST: usize = 20_000;
        let (mut level, mut seen) = (vec![PathBuf::new()], 0);
        for _ in 0..DEEPEST {
            let mut next = Vec::new();
            for folder in level {
                for entry in fs::read_dir(self.0.join(&folder)).into_iter().flatten().flatten() {
                    if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                        continue;
                    }
                    let name = entry.file_name();
                    let path = folder.join(&name);
                    let name = name.to_string_lossy();
                    if name.contains(id) {
                        return self.read(&path);
                    }
                    seen += 1;
                    if !is_of_container(&name) && seen < MOST {
                        next.push(path);
                    }
                }
            }
            level = next;
        }
        None
    }

    fn read(&self, path: &Path) -> Option<Cgroup> {
        let id = fs::metadata(self.0.join(path)).ok()?.ino();
        let level = u32::try_from(path.components().count()).ok()?;
        (level > 0).then_some(Cgroup { id, level })
    }
}

/// Where a hierarchy of version 2 is mounted (man 5 proc_pid_mountinfo).
fn of_version_2(mountinfo: &str) -> Vec<PathBuf> {
    let mounts = mountinfo.lines().filter_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        (kind.split(' ').next() == Some("cgroup2")).then(|| mount.split(' ').nth(4))?
    });
    mounts.map(PathBuf::from).collect()
}

/// The folder of a container among the control groups of its first process, which may be in one below it: relative to the root. `None`
/// if none of them has the container's ID in its name: then others may be in it.
fn of_process(text: &str, id: &str) -> Option<PathBuf> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    let mut folder = PathBuf::new();
    for component in Path::new(path).components() {
        match component {
            Component::RootDir => {}
            Component::Normal(name) => {
                folder.push(name);
                if name.to_string_lossy().contains(id) {
                    return Some(folder);
                }
            }
            // Seen from a control group namespace: what it is relative to is not known.
            Component::Prefix(_) | Component::CurDir | Component::ParentDir => return None,
        }
    }
    None
}

/// Whether a name has an ID as engines give them: 64 hexadecimal digits.
fn is_of_container(name: &str) -> bool {
    let digits = name.split(|c: char| !c.is_ascii_hexdigit());
    digits.into_iter().any(|part| part.len() >= 64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[test]
    fn a_container_is_where_its_id_is_and_not_below() {
        let of = |path: &str| of_process(&format!("4:memory:/x\n0::{path}\n"), ID);
        for (path, folder) in [
            (format!("/docker/{ID}"), format!("docker/{ID}")),
            (format!("/system.slice/docker-{ID}.scope"), format!("system.slice/docker-{ID}.scope")),
            (
                format!("/machine.slice/libpod-{ID}.scope/container"),
                format!("machine.slice/libpod-{ID}.scope"),
            ),
            (format!("/a/b/c/{ID}/init/x"), format!("a/b/c/{ID}")),
        ] {
            assert_eq!(of(&path), Some(PathBuf::from(folder)), "{path}");
        }
        for foreign in
            ["/".to_owned(), "/docker".to_owned(), format!("/../{ID}"), "/user.slice".to_owned()]
        {
            assert_eq!(of(&foreign), None, "{foreign}: others may be there");
        }
        assert_eq!(of_process("4:memory:/docker/0123\n", ID), None, "no version 2");
    }

    #[test]
    fn a_hierarchy_of_version_2_is_found_beside_those_of_version_1() {
        let text = "30 24 0:26 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n\
                    31 24 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                    32 24 0:26 /docker/x /hcg ro - cgroup2 cgroup2 rw\n";
        assert_eq!(of_version_2(text), ["/sys/fs/cgroup/unified", "/hcg"].map(PathBuf::from));
    }

    #[test]
    fn a_folder_below_a_container_is_nobodys_though_it_bears_a_name() {
        let folder = tempfile::tempdir().unwrap();
        let (other, hierarchy) = ("f".repeat(64), Hierarchy(folder.path().to_owned()));
        fs::create_dir_all(folder.path().join(format!("a/docker-{other}.scope/{ID}"))).unwrap();
        let by_name = |everywhere| hierarchy.of_container(ID, None, everywhere);
        assert_eq!(by_name(true), None);
        fs::create_dir_all(folder.path().join(format!("a/b/docker-{ID}.scope"))).unwrap();
        assert_eq!(by_name(false), None, "no usual place");
        let found = by_name(true).unwrap();
        let inode =
            fs::metadata(folder.path().join(format!("a/b/docker-{ID}.scope"))).unwrap().ino();
        assert_eq!(found, Cgroup { id: inode, level: 3 });
    }
}
