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
/// The option of an overlay with its own folder.
const UPPER: &str = "upperdir=";

/// A name of the root file system of this process. Empty: it is not known, and is equal to no other.
pub fn root() -> String {
    name_in(&mounts_of("self")).unwrap_or_default()
}

/// Whether process 1, as this process sees it, has another root file system. `None`: that is not known.
pub fn is_apart_from_init() -> Option<bool> {
    Some(root_in(&mounts_of("self"))? != root_in(&mounts_of("1"))?)
}

fn mounts_of(process: &str) -> String {
    fs::read_to_string(format!("/proc/{process}/mountinfo")).unwrap_or_default()
}

/// The root's name; if not every container has its own, then with its engine's folder, which has the container's ID.
fn name_in(mounts: &str) -> Option<String> {
    let root = root_in(mounts)?;
    let of_engine = || {
        let folder = |of| mounted_at(of, mounts)?.split(' ').nth(3);
        folder("/etc/hostname").or_else(|| folder("/etc/resolv.conf"))
    };
    let engine = if root.starts_with(UPPER) { None } else { of_engine() };
    Some(engine.map_or_else(|| root.clone(), |engine| format!("{root} {engine}")))
}

/// The line of a mount. What was mounted last covers the others.
fn mounted_at<'a>(at: &str, mounts: &'a str) -> Option<&'a str> {
    mounts.lines().rfind(|line| line.split(' ').nth(4) == Some(at))
}

/// By the text of `/proc/self/mountinfo` (man 5 proc_pid_mountinfo).
fn root_in(mounts: &str) -> Option<String> {
    let (mount, system) = mounted_at("/", mounts)?.split_once(" - ")?;
    let folder = mount.split(' ').nth(3)?;
    let mut system = system.split(' ');
    let (kind, source, options) = (system.next()?, system.next()?, system.next()?);
    // An overlay has its folder for what is written; most other drivers have a folder or a device for each container.
    let upper = options.split(',').find(|option| option.starts_with(UPPER));
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
        assert_eq!(name_in(docker), root_in(docker));
        assert_eq!(name_in(vfs), root_in(vfs));
    }

    #[test]
    fn where_all_have_the_same_root_the_engine_tells_them_apart() {
        let fuse = "9 8 0:52 / / rw - fuse.fuse-overlayfs fuse-overlayfs rw,user_id=0\n";
        let mount =
            |at: &str, folder: &str| format!("{fuse}10 9 0:23 {folder} {at} rw - tmpfs tmpfs rw\n");
        let name = "fuse.fuse-overlayfs fuse-overlayfs /";
        assert_eq!(name_in(fuse).unwrap(), name);
        for at in ["/etc/hostname", "/etc/resolv.conf"] {
            let (one, other) = (mount(at, "/containers/a/x"), mount(at, "/containers/b/x"));
            assert_eq!(name_in(&one).unwrap(), format!("{name} /containers/a/x"));
            assert_ne!(name_in(&one), name_in(&other));
            assert_eq!(root_in(&one), root_in(&other));
        }
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
