//! Finds out why an engine's socket cannot be used, and which option is missing: an error of `connect` names only the
//! symptom.

#![expect(
    clippy::disallowed_methods,
    reason = "files of the kernel, and the mount of a socket; only after the engine could not be reached"
)]

use std::{
    fmt, fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use rustix::process::{getegid, geteuid, getgroups};
use socket2::{Domain, SockAddr, Socket, Type};

use super::{Address, Engine};

/// What is wrong, and how to fix it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Obstacle {
    pub what: String,
    pub fix: String,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.fix)
    }
}

/// What is at the socket's path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum There {
    Nothing,
    Folder,
    Socket { owner: u32, group: u32, mode: u32 },
    Other,
}

/// Whether the path is a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mounted {
    /// It is not a mount.
    No,
    /// It is a mounted file, which still exists at its source.
    File,
    /// It is a mounted file that was removed at its source. A new file there becomes visible only by a new mount.
    RemovedFile,
}

/// The inputs of [`judge`].
#[derive(Debug)]
struct SocketFacts<'a> {
    path: &'a Path,
    error: io::ErrorKind,
    there: There,
    mounted: Mounted,
    user: u32,
    groups: &'a [u32],
    in_container: bool,
    names: &'a UserAndGroup,
    /// SELinux confines this process.
    is_confined: bool,
}

/// The names of this process's user and of the socket's group. Their numbers if they have no names.
#[derive(Debug, Default)]
struct UserAndGroup {
    user: String,
    group: String,
}

/// Whether this process is in a container. Docker and podman show it by a file, other engines by the control group.
pub(crate) fn is_in_container() -> bool {
    let by_file = ["/.dockerenv", "/run/.containerenv"].iter().any(|at| Path::new(at).exists());
    by_file || is_of_container(&fs::read_to_string("/proc/self/cgroup").unwrap_or_default())
}

/// Decides by the text of `/proc/self/cgroup`.
fn is_of_container(groups: &str) -> bool {
    let engines = ["docker", "libpod", "kubepods", "containerd", "cri-o", "lxc"];
    let paths = groups.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    // The engine's own group is `docker.service`.
    let mut parts =
        paths.flat_map(|path| path.split('/')).filter(|part| !part.ends_with(".service"));
    parts.any(|part| engines.iter().any(|engine| part.starts_with(engine)))
}

/// The name with this number in a file like `/etc/passwd`. The number if there is none.
fn name_of(file: &str, number: u32) -> String {
    let text = fs::read_to_string(file).unwrap_or_default();
    let is_it = |line: &&str| line.split(':').nth(2) == Some(&*number.to_string());
    let name = text.lines().find(is_it).and_then(|line| line.split(':').next());
    name.map_or_else(|| number.to_string(), str::to_owned)
}

/// Why this engine's socket cannot be connected to. `None` if it can, or if the cause is unknown. Does not block.
pub(crate) fn of(engine: &Engine) -> Option<Obstacle> {
    let Address::Unix(path) = &engine.address else { return None };
    let error = connect(path).err()?.kind();
    let there = match fs::metadata(path) {
        Ok(found) if found.is_dir() => There::Folder,
        Ok(found) if found.file_type().is_socket() => {
            There::Socket { owner: found.uid(), group: found.gid(), mode: found.mode() }
        }
        Ok(_) => There::Other,
        Err(_) => There::Nothing,
    };
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut groups: Vec<_> = getgroups().unwrap_or_default();
    groups.push(getegid());
    let groups: Vec<_> = groups.into_iter().map(|group| group.as_raw()).collect();
    let label = fs::read_to_string("/proc/self/attr/current").unwrap_or_default();
    judge(&SocketFacts {
        path,
        error,
        there,
        mounted: mounted(&mounts, &without_links(path)),
        user: geteuid().as_raw(),
        groups: &groups,
        in_container: is_in_container(),
        names: &UserAndGroup {
            user: name_of("/etc/passwd", geteuid().as_raw()),
            group: match there {
                There::Socket { group, .. } => name_of("/etc/group", group),
                There::Nothing | There::Folder | There::Other => String::new(),
            },
        },
        is_confined: label.contains(":container_t:"),
    })
}

/// An engine that hangs does not accept the connection. This is not an obstacle.
fn connect(path: &Path) -> io::Result<()> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.connect(&SockAddr::unix(path)?)
}

/// The path without symbolic links: `/var/run` is one on most systems. The socket itself may be gone.
fn without_links(path: &Path) -> PathBuf {
    let whole = || Some(fs::canonicalize(path.parent()?).ok()?.join(path.file_name()?));
    whole().unwrap_or_else(|| path.to_owned())
}

/// Decides by the text of `/proc/self/mountinfo` (man 5 proc_pid_mountinfo). The kernel appends `//deleted` to a removed
/// root.
fn mounted(mounts: &str, path: &Path) -> Mounted {
    // The last mount hides earlier ones.
    let root = mounts.lines().rev().find_map(|line| {
        let mut fields = line.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        (Path::new(point) == path).then_some(root)
    });
    match root {
        None => Mounted::No,
        Some(root) if root.ends_with("//deleted") => Mounted::RemovedFile,
        Some(_) => Mounted::File,
    }
}

fn judge(facts: &SocketFacts<'_>) -> Option<Obstacle> {
    let SocketFacts { path, error, there, mounted, user, groups, in_container, names, is_confined } =
        *facts;
    let folder = path.parent().unwrap_or(Path::new("/")).display();
    let path = path.display();
    let (what, fix) = match (there, error) {
        (There::Folder, _) if in_container => (
            format!("{path} is a folder: Docker makes one if the socket to mount is not there"),
            "remove the folder on the host, start the engine, and create embassy's container again"
                .to_owned(),
        ),
        (There::Folder, _) => (
            format!("{path} is a folder, and not a socket"),
            "set the socket's path with -docker or DOCKER_HOST; if Docker made this folder because a container was to mount the socket \
             before the engine ran, remove it and start the engine again"
                .to_owned(),
        ),
        (There::Other, _) => {
            (format!("{path} is not a socket"), "set the engine's address with -docker".to_owned())
        }
        (There::Nothing, io::ErrorKind::NotFound) if in_container => (
            format!("{path} is not there"),
            format!("mount it into embassy's container: -v {path}:{path}"),
        ),
        (There::Nothing, io::ErrorKind::NotFound) => (
            format!("{path} is not there"),
            "start the engine, or set its address with -docker or DOCKER_HOST".to_owned(),
        ),
        (There::Socket { owner, group, mode }, io::ErrorKind::PermissionDenied) => {
            // Connecting needs the right to write (man 7 unix).
            let may = user == 0
                || match () {
                    () if user == owner => mode & 0o200 != 0,
                    () if groups.contains(&group) => mode & 0o020 != 0,
                    () => mode & 0o002 != 0,
                };
            match (may, is_confined) {
                (true, true) => (
                    format!("SELinux forbids {path} to embassy's container"),
                    "start it with --security-opt label=disable".to_owned(),
                ),
                (true, false) => return None,
                (false, _) if mode & 0o020 != 0 => {
                    let UserAndGroup { user: user_name, group: group_name } = names;
                    (
                        format!(
                            "{path} belongs to group {group}, and embassy (user {user}) is not in it"
                        ),
                        match in_container {
                            true => format!(
                                "start its container with --group-add {group} (Compose: group_add: [\"{group}\"])"
                            ),
                            false => format!(
                                "add its user to the group and start embassy again: usermod -aG {group_name} {user_name} (systemd: \
                                 SupplementaryGroups={group_name} in the unit)"
                            ),
                        },
                    )
                }
                (false, _) => (
                    format!("{path} belongs to user {owner} alone, and embassy is user {user}"),
                    match in_container {
                        true => format!("start its container with --user {owner}"),
                        false => format!("start embassy as user {owner} (systemd: User={owner} in the unit)"),
                    },
                ),
            }
        }
        (There::Socket { .. }, io::ErrorKind::ConnectionRefused) => match mounted {
            Mounted::RemovedFile => (
                format!(
                    "{path} is the socket of an engine that has ended; the new one made a new socket"
                ),
                format!(
                    "create embassy's container again, and mount the folder instead of the socket: -v {folder}:{folder}"
                ),
            ),
            Mounted::File | Mounted::No => {
                (format!("no engine listens at {path}"), "start the engine".to_owned())
            }
        },
        _ => return None,
    };
    Some(Obstacle { what, fix })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    const PATH: &str = "/var/run/docker.sock";

    fn facts(error: io::ErrorKind, there: There) -> SocketFacts<'static> {
        SocketFacts {
            path: Path::new(PATH),
            error,
            there,
            mounted: Mounted::File,
            user: 65532,
            groups: &[65532],
            in_container: true,
            names: NAMES,
            is_confined: false,
        }
    }

    static NAMES: &UserAndGroup = &UserAndGroup { user: String::new(), group: String::new() };

    fn told(facts: SocketFacts<'_>) -> String {
        judge(&facts).map_or(String::new(), |obstacle| obstacle.to_string())
    }

    #[test]
    fn the_forgotten_option_is_named() {
        use io::ErrorKind::{ConnectionRefused, NotFound, PermissionDenied};
        let socket = There::Socket { owner: 0, group: 999, mode: 0o140_660 };
        let denied = || facts(PermissionDenied, socket);
        assert_eq!(
            told(denied()),
            "/var/run/docker.sock belongs to group 999, and embassy (user 65532) is not in it: start its container with \
             --group-add 999 (Compose: group_add: [\"999\"])"
        );
        // It is in the group: something else forbids the access, or the cause is unknown.
        let member = || SocketFacts { groups: &[65532, 999], ..denied() };
        assert_eq!(told(member()), "");
        for confined in [member(), SocketFacts { user: 0, ..denied() }] {
            let told = told(SocketFacts { is_confined: true, ..confined });
            assert!(told.contains("--security-opt label=disable"), "{told}");
        }
        let private = There::Socket { owner: 1000, group: 1000, mode: 0o140_600 };
        assert!(told(facts(PermissionDenied, private)).contains("--user 1000"));

        let refused = || facts(ConnectionRefused, socket);
        assert!(told(refused()).ends_with(": start the engine"));
        let old = told(SocketFacts { mounted: Mounted::RemovedFile, ..refused() });
        assert!(old.ends_with("-v /var/run:/var/run"), "{old}");
        assert!(told(facts(ConnectionRefused, There::Folder)).contains("is a folder"));

        let missing = || facts(NotFound, There::Nothing);
        assert!(told(missing()).ends_with("-v /var/run/docker.sock:/var/run/docker.sock"));
        assert!(
            told(SocketFacts { in_container: false, ..missing() }).contains("start the engine")
        );
        assert_eq!(told(facts(io::ErrorKind::WouldBlock, socket)), "");
    }

    /// Advice for a container is useless on a plain host, and the other way round.
    #[test]
    fn the_advice_fits_where_embassy_runs() {
        use io::ErrorKind::{ConnectionRefused, NotFound, PermissionDenied};
        let socket = |mode| There::Socket { owner: 1000, group: 999, mode };
        let names = UserAndGroup { user: "embassy".to_owned(), group: "docker".to_owned() };
        let of_container = ["container", "--group-add", "--user", "mount", "-v "];
        let mut given = Vec::new();
        for (error, there) in [
            (PermissionDenied, socket(0o140_660)),
            (PermissionDenied, socket(0o140_600)),
            (NotFound, There::Nothing),
            (ConnectionRefused, socket(0o140_660)),
        ] {
            let fix = |in_container| {
                let facts = SocketFacts {
                    in_container,
                    mounted: Mounted::No,
                    names: &names,
                    ..facts(error, there)
                };
                judge(&facts).unwrap().fix
            };
            let (inside, outside) = (fix(true), fix(false));
            let is_of_container = |fix: &str| of_container.iter().any(|word| fix.contains(word));
            assert!(!is_of_container(&outside), "{outside}");
            assert!(is_of_container(&inside) || inside == outside, "{inside}");
            given.push(outside);
        }
        assert!(given[0].contains("usermod -aG docker embassy"), "{given:?}");
        assert!(given[0].contains("SupplementaryGroups=docker"), "{given:?}");
    }

    #[test]
    fn a_container_is_known_by_its_control_group() {
        for (groups, expected) in [
            ("0::/docker/0123456789ab\n", true),
            ("12:memory:/docker/0123\n0::/system.slice\n", true),
            ("0::/system.slice/docker-0123456789ab.scope\n", true),
            ("0::/machine.slice/libpod-0123.scope/container\n", true),
            ("0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-2.scope\n", true),
            ("0::/system.slice/embassy.service\n", false),
            ("0::/system.slice/docker.service\n", false),
            ("0::/user.slice/user-1000.slice/session-2.scope\n", false),
            ("0::/\n", false),
            ("", false),
        ] {
            assert_eq!(is_of_container(groups), expected, "{groups}");
        }
    }

    #[test]
    fn a_mount_that_shows_what_was_removed_is_known_by_its_root() {
        let line = |root: &str| {
            format!(
                "30 1 0:5 / /run rw - tmpfs tmpfs rw\n96 30 0:25 {root} {PATH} rw - tmpfs tmpfs rw\n"
            )
        };
        let of = |mounts: &str| mounted(mounts, Path::new(PATH));
        assert_eq!(of(&line("/docker.sock")), Mounted::File);
        assert_eq!(of(&line("/docker.sock//deleted")), Mounted::RemovedFile);
        // It was mounted again.
        assert_eq!(of(&(line("/docker.sock//deleted") + &line("/docker.sock"))), Mounted::File);
        assert_eq!((of(""), of("a b\nc")), (Mounted::No, Mounted::No));
    }

    #[test]
    fn a_socket_is_looked_at_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("docker.sock");
        let engine = Engine { address: Address::Unix(path.clone()), certificates: None };
        assert!(of(&engine).unwrap().what.ends_with("is not there"));
        let listener = UnixListener::bind(&path).unwrap();
        assert_eq!(of(&engine), None);
        drop(listener);
        assert!(of(&engine).unwrap().what.starts_with("no engine listens"));
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(of(&engine).unwrap().what.contains("is a folder"));
    }
}
