//! Which of two embassies came later. A container engine starts a container again after it was taken over from, and with `--takeover`
//! the two would take over from one another in turn, for ever. So each knows which containers were taken over from before it, by their
//! root file systems: a container keeps its own over a restart, and no other has it.

#![expect(clippy::disallowed_methods, reason = "at the start, or on a thread of its own")]

use std::{
    fs,
    io::Read,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use super::message::Hello;

/// Those that are remembered.
const MOST: usize = 16;
/// Bytes of the file that are read, at most.
const LONGEST: u64 = 256 << 10;

/// A name of the root file system of this process. Empty: it is not known.
pub fn root() -> String {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    root_in(&mounts).unwrap_or_default()
}

/// By the text of `/proc/self/mountinfo` (man 5 proc_pid_mountinfo).
fn root_in(mounts: &str) -> Option<String> {
    // What was mounted last covers the others.
    let is_root = |line: &&str| line.split(' ').nth(4) == Some("/");
    let line = mounts.lines().rfind(is_root)?;
    let (mount, system) = line.split_once(" - ")?;
    let folder = mount.split(' ').nth(3)?;
    let mut system = system.split(' ');
    let (kind, source, options) = (system.next()?, system.next()?, system.next()?);
    // An overlay has its folder for what is written; other drivers have a folder or a device for each container.
    let upper = options.split(',').find(|option| option.starts_with("upperdir="));
    Some(upper.map_or_else(|| format!("{kind} {source} {folder}"), str::to_owned))
}

/// Whether the running embassy has taken over from the container of this process, or from one that had taken over from it.
pub fn is_succeeded(own: &str, running: &Hello) -> bool {
    // On one root file system, as without containers, who starts last is the later one.
    !own.is_empty() && own != running.root && running.before.iter().any(|one| one == own)
}

/// Those that were taken over from, once `own` has taken over from `last`. `None`: it has started without a takeover.
pub fn before(mut known: Vec<String>, own: &str, last: Option<&str>) -> Vec<String> {
    known.retain(|one| one != own && Some(one.as_str()) != last);
    known.extend(last.filter(|last| !last.is_empty() && *last != own).map(str::to_owned));
    known.split_off(known.len().saturating_sub(MOST))
}

/// Those that an earlier process has written down. None if there is no such file.
pub fn read(path: &Path) -> Vec<String> {
    let mut text = String::new();
    let read = fs::File::open(path).and_then(|file| file.take(LONGEST).read_to_string(&mut text));
    match read {
        Ok(_) => text.lines().map(str::to_owned).collect(),
        Err(_) => Vec::new(),
    }
}

/// Writes them down: the engine may start both containers at once, after the host was.
pub fn write(path: PathBuf, before: &[String]) -> std::io::Result<()> {
    let new = path.with_extension("new");
    let _ = fs::remove_file(&new);
    let mut options = fs::OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o600).open(&new)?;
    let lines: String = before.iter().map(|one| format!("{one}\n")).collect();
    std::io::Write::write_all(&mut file, lines.as_bytes())?;
    fs::rename(new, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_has_its_own_root() {
        let docker = "555 466 0:52 / / rw,relatime master:1 - overlay overlay rw,lowerdir=/var/lib/docker/overlay2/l/A:/b,upperdir=/var/lib/docker/overlay2/f00/diff,workdir=/var/lib/docker/overlay2/f00/work\n\
                      556 555 0:54 / /proc rw,nosuid - proc proc rw\n";
        assert_eq!(root_in(docker).unwrap(), "upperdir=/var/lib/docker/overlay2/f00/diff");
        let vfs = "9 8 254:1 /var/lib/docker/vfs/dir/f00 / rw - ext4 /dev/vda1 rw,discard\n";
        assert_eq!(root_in(vfs).unwrap(), "ext4 /dev/vda1 /var/lib/docker/vfs/dir/f00");
        let covered = format!("1 0 0:1 / / rw - rootfs rootfs rw\n{vfs}");
        assert_eq!(root_in(&covered), root_in(vfs));
        for strange in ["", "a", "1 0 0:1 / / rw", "1 0 0:1 / / rw - ext4"] {
            assert_eq!(root_in(strange), None, "{strange:?}");
        }
        assert!(!root().is_empty());
    }

    #[test]
    fn who_was_taken_over_from_waits_and_nobody_else() {
        let running = |root: &str, before: &[&str]| Hello {
            root: root.to_owned(),
            before: before.iter().map(|one| (*one).to_owned()).collect(),
            ..Hello::default()
        };
        assert!(is_succeeded("a", &running("b", &["a"])));
        assert!(is_succeeded("a", &running("c", &["a", "b"])));
        assert!(!is_succeeded("c", &running("b", &["a"])));
        // The same host, or the same container: a new process there is a newer one.
        assert!(!is_succeeded("a", &running("a", &["a"])));
        // An older version says nothing of it.
        assert!(!is_succeeded("a", &running("", &[])));
        assert!(!is_succeeded("", &running("b", &[""])));
    }

    #[test]
    fn each_is_known_once_and_the_last_ones_only() {
        let known = |all: &[&str]| all.iter().map(|one| (*one).to_owned()).collect::<Vec<_>>();
        assert_eq!(before(known(&[]), "b", Some("a")), ["a"]);
        assert_eq!(before(known(&["a"]), "c", Some("b")), ["a", "b"]);
        // It came back where there was nobody, and the other one came again.
        assert_eq!(before(known(&["a", "b"]), "a", None), ["b"]);
        assert_eq!(before(known(&["b"]), "b", Some("a")), ["a"]);
        assert_eq!(before(known(&["a", "b"]), "c", Some("a")), ["b", "a"]);
        assert_eq!(before(known(&[]), "a", Some("a")), [""; 0]);
        assert_eq!(before(known(&[]), "a", Some("")), [""; 0]);
        let many = (0..100).fold(Vec::new(), |all, n| before(all, "x", Some(&n.to_string())));
        assert_eq!((many.len(), many.last().unwrap().as_str()), (MOST, "99"));
    }

    #[test]
    fn they_are_written_down_for_the_next_start() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("superseded-9999");
        assert_eq!(read(&path), [""; 0]);
        for all in [vec!["a".to_owned(), "b c".to_owned()], vec!["d".to_owned()], vec![]] {
            write(path.clone(), &all).unwrap();
            assert_eq!(read(&path), all);
        }
        fs::write(&path, [0xff, 0xfe]).unwrap();
        assert_eq!(read(&path), [""; 0]);
    }
}
