//! Whatever ends the owner of a host ends the host.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testbed::{Host, eventually};

const DEADLINE: Duration = Duration::from_secs(30);

/// What a host leaves if nobody clears up: its folder, its processes, its control groups.
#[derive(Debug)]
struct Traces {
    dir: PathBuf,
    namespace: PathBuf,
    group: String,
}

impl Traces {
    fn of(dir: &Path, init: u32) -> Result<Self> {
        let number =
            dir.file_name().context("a host's folder has a name")?.to_string_lossy().into_owned();
        let namespace = fs::read_link(format!("/proc/{init}/ns/pid"))?;
        Ok(Self { dir: dir.to_owned(), namespace, group: format!("testbed-{number}") })
    }

    fn processes(&self) -> Result<usize> {
        let entries = fs::read_dir("/proc")?.filter_map(|entry| Some(entry.ok()?.path()));
        Ok(entries
            .filter(|path| fs::read_link(path.join("ns/pid")).is_ok_and(|ns| ns == self.namespace))
            .count())
    }

    fn groups(&self) -> Result<Vec<PathBuf>> {
        let table = fs::read_to_string("/proc/self/mounts")?;
        let mounts = table
            .lines()
            .filter(|line| line.starts_with("cgroup"))
            .filter_map(|line| line.split(' ').nth(1));
        Ok(mounts
            .map(|mount| Path::new(mount).join(&self.group))
            .filter(|group| group.exists())
            .collect())
    }

    fn assert_gone(&self) -> Result<()> {
        ensure!(self.processes()? == 0, "{} processes are left", self.processes()?);
        ensure!(self.groups()?.is_empty(), "control groups are left: {:?}", self.groups()?);
        ensure!(!self.dir.exists(), "{} is left", self.dir.display());
        Ok(())
    }
}

#[test]
fn dropping_the_last_handle_leaves_nothing() -> Result<()> {
    let host = Host::start()?;
    let web = host.web("web").start()?;
    let traces = Traces::of(host.dir(), host.init_pid())?;
    assert!(traces.processes()? > 3, "init, dockerd, containerd and the container's own run");
    assert!(!traces.groups()?.is_empty());

    drop(host);
    assert_eq!(web.exec(["echo", "still here"])?, "still here");
    drop(web);
    traces.assert_gone()
}

#[test]
fn a_killed_owner_leaves_nothing() -> Result<()> {
    let traces = owner_killed_with("-KILL")?;
    eventually(DEADLINE, "the host to go", || traces.assert_gone())
}

#[test]
fn an_interrupted_owner_leaves_nothing() -> Result<()> {
    let traces = owner_killed_with("-INT")?;
    eventually(DEADLINE, "the host to go", || traces.assert_gone())
}

#[test]
fn a_killed_keeper_takes_the_host_along_and_is_swept_up_after() -> Result<()> {
    let host = Host::start()?;
    host.web("web").start()?;
    let traces = Traces::of(host.dir(), host.init_pid())?;
    // The keeper is the parent of unshare, which is the parent of init.
    let keeper = parent(parent(host.init_pid())?)?;
    testbed::output(Command::new("kill").args(["-KILL", &keeper.to_string()]))?;
    eventually(DEADLINE, "the processes to go", || {
        ensure!(traces.processes()? == 0, "{} processes are left", traces.processes()?);
        Ok(())
    })?;
    testbed::output(Command::new(env!("CARGO_BIN_EXE_testbed")).arg("sweep"))?;
    traces.assert_gone()
}

#[test]
fn a_sweep_spares_the_living() -> Result<()> {
    let host = Host::start()?;
    let web = host.web("web").start()?;
    testbed::output(Command::new(env!("CARGO_BIN_EXE_testbed")).arg("sweep"))?;
    assert_eq!(web.exec(["echo", "still here"])?, "still here");
    assert!(host.dir().exists());
    Ok(())
}

/// Runs `testbed up` until it is ready, and ends it with a signal.
fn owner_killed_with(signal: &str) -> Result<Traces> {
    let mut up = Command::new(env!("CARGO_BIN_EXE_testbed"));
    let mut up = up.arg("up").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let stdout = up.stdout.take().context("its stdout is piped")?;
    let words = |prefix: &str, line: &str| {
        line.trim().strip_prefix(prefix).map(|rest| rest.trim().to_owned())
    };
    let (mut dir, mut init) = (None, None);
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        dir = dir.or_else(|| words("folder", &line));
        init = init.or_else(|| words("init process", &line));
        if dir.is_some() && init.is_some() {
            break;
        }
    }
    let (dir, init) =
        (dir.context("it named no folder")?, init.context("it named no init process")?);
    let traces = Traces::of(Path::new(&dir), init.parse()?)?;
    assert!(traces.processes()? > 2);
    testbed::output(Command::new("kill").args([signal, &up.id().to_string()]))?;
    up.wait()?;
    Ok(traces)
}

fn parent(pid: u32) -> Result<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    Ok(line.context("a process has a parent")?.trim().parse()?)
}
