//! Control groups that a killed engine leaves behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Removes the group `name`, with everything below it, from every hierarchy of the machine. Its processes must be ending: a
/// group can only be removed when it is empty.
pub(crate) fn remove(name: &str) -> Result<()> {
    let start = Instant::now();
    for mount in mounts()? {
        let group = mount.join(name);
        while group.exists() {
            match remove_tree(&group) {
                Err(error) if start.elapsed() > Duration::from_secs(10) => {
                    return Err(error).with_context(|| format!("remove {}", group.display()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
                Ok(()) => {}
            }
        }
    }
    Ok(())
}

/// Removes only folders: the files in them belong to the kernel and disappear with them.
fn remove_tree(group: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(group)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(group)
}

fn mounts() -> Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
    let fields = table.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    Ok(fields
        .filter(|f| f.len() > 2 && f[2].starts_with("cgroup"))
        .map(|f| PathBuf::from(f[1]))
        .collect())
}
