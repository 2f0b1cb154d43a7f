//! Finds the embassies that run in this network namespace, via `/proc`.

#![expect(clippy::disallowed_methods, reason = "a command, which serves nobody")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use super::commands;

/// A running proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RunningProxy {
    pub(super) pid: u32,
}

/// The proxies whose processes are visible: in a container without `--pid=host` only those of the container.
pub(super) fn proxies() -> Vec<RunningProxy> {
    let Ok(own) = namespace(Path::new("/proc/self")) else { return Vec::new() };
    let commands = commands();
    let is_proxy = |folder: &Path| {
        let words = words(folder);
        program(folder).as_deref() == Some("embassy")
            && is_trusted(folder)
            && namespace(folder).is_ok_and(|namespace| namespace == own)
            && words
                .first()
                .is_none_or(|word| word != "help" && commands.find_subcommand(word).is_none())
    };
    let folders = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = folders.filter_map(|folder| folder.file_name().to_str()?.parse().ok());
    let others = pids.filter(|pid| *pid != std::process::id());
    others
        .filter(|pid| is_proxy(Path::new(&format!("/proc/{pid}"))))
        .map(|pid| RunningProxy { pid })
        .collect()
}

/// Whether it can be trusted: it runs as root or as this process's user, or it may write rules. Any user of the host can name
/// a program `embassy`, and doctor reads the files that its flags name.
fn is_trusted(process: &Path) -> bool {
    // The number of the capability (man 7 capabilities).
    const NET_ADMIN: u32 = 12;
    let status = fs::read_to_string(process.join("status")).unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|line| line.split_whitespace().next()).map(str::to_owned)
    };
    let own = rustix::process::geteuid().as_raw();
    let user = field("Uid").and_then(|user| user.parse::<u32>().ok());
    let permitted = field("CapPrm").and_then(|set| u64::from_str_radix(&set, 16).ok());
    user.is_some_and(|user| user == 0 || user == own)
        || permitted.is_some_and(|set| set >> NET_ADMIN & 1 == 1)
}

fn namespace(process: &Path) -> std::io::Result<PathBuf> {
    fs::read_link(process.join("ns/net"))
}

/// The words after the program's name, and the environment of a running proxy. `None` if they are not visible.
pub(super) struct Start {
    pub(super) words: Vec<String>,
    variables: BTreeMap<String, String>,
}

impl Start {
    pub(super) fn of(proxy: &RunningProxy) -> Option<Self> {
        let folder = PathBuf::from(format!("/proc/{}", proxy.pid));
        let environment = fs::read(folder.join("environ")).ok()?;
        let variables = environment.split(|byte| *byte == 0).filter_map(|variable| {
            let text = String::from_utf8_lossy(variable);
            text.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()))
        });
        Some(Self { words: words(&folder), variables: variables.collect() })
    }

    pub(super) fn variable(&self, name: &str) -> Option<String> {
        self.variables.get(name).cloned()
    }
}

/// The name of the process's program file, even if the file was replaced since.
fn program(process: &Path) -> Option<String> {
    let path = fs::read_link(process.join("exe")).ok()?;
    let name = path.file_name()?.to_str()?;
    Some(name.trim_end_matches(" (deleted)").to_owned())
}

/// The arguments after the program's name.
fn words(process: &Path) -> Vec<String> {
    let line = fs::read(process.join("cmdline")).unwrap_or_default();
    let words =
        line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
    // The last one ends with a zero too.
    let mut words: Vec<_> = words.skip(1).collect();
    words.pop();
    words
}
