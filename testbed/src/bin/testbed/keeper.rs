//! `testbed keep`: starts a host's namespaces, and cleans up when their owner is gone.
//!
//! It is a separate process so that nothing can prevent this: it waits for the end of its stdin, which comes when the host
//! is dropped and also when its owner is killed. If the keeper itself is killed, the init process sees the end of *its*
//! stdin and ends the namespaces. The next keeper removes the rest.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::cgroup;

/// One folder per running host. Not below /run, which each host replaces, nor /tmp, where others may write.
const BASE: &str = "/var/lib/testbed";

/// Prints `ready <pid of init> <folder>` to stdout when the namespaces exist, or why they cannot be created.
pub(crate) fn keep() -> Result<()> {
    let result = claim().and_then(|claim| {
        let kept = hold(&claim.dir);
        let removed = remove(&claim.dir);
        kept.and(removed)
    });
    if let Err(error) = &result {
        println!("{error:#}");
    }
    result
}

/// Removes what is left of hosts whose keeper was killed.
pub(crate) fn sweep() -> Result<()> {
    let _gate = gate()?;
    for dir in hosts()? {
        if !is_kept(&dir) {
            remove(&dir)?;
        }
    }
    Ok(())
}

struct Claim {
    dir: PathBuf,
    /// Locked as long as the host lives.
    _owner: File,
}

fn claim() -> Result<Claim> {
    sweep()?;
    let _gate = gate()?;
    let number = (1..).find(|number| !Path::new(BASE).join(format!("{number}")).exists());
    let dir = Path::new(BASE).join(number.context("no number is free")?.to_string());
    fs::create_dir(&dir).with_context(|| format!("make {}", dir.display()))?;
    let owner = File::create(dir.join("owner")).context("make the owner file")?;
    owner.lock().context("lock the owner file")?;
    Ok(Claim { dir, _owner: owner })
}

/// Starts init. Waits until our stdin ends or init ends.
fn hold(dir: &Path) -> Result<()> {
    let own = std::env::current_exe().context("find the running program")?;
    let mut unshare = Command::new("unshare");
    unshare.args(["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    let stderr = File::create(dir.join("init.log")).context("make init.log")?;
    let mut unshare = unshare
        .arg(own)
        .arg("init")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(stderr)
        .spawn()
        .context("start unshare")?;

    let mut line = String::new();
    if let Some(stdout) = unshare.stdout.take() {
        BufReader::new(stdout).read_line(&mut line).context("read init's answer")?;
    }
    if line.trim_end() != "ready" {
        let _ = unshare.wait();
        let log = fs::read_to_string(dir.join("init.log")).unwrap_or_default();
        bail!("the init process of a host failed: {}", log.trim_end());
    }
    println!("ready {} {}", child_of(&unshare)?, dir.display());

    // Nothing is written to our stdin: this returns when its other end is closed.
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    drop(unshare.stdin.take());
    unshare.wait().context("wait for init")?;
    Ok(())
}

fn child_of(unshare: &Child) -> Result<u32> {
    let path = format!("/proc/{0}/task/{0}/children", unshare.id());
    let list = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    list.trim_end().parse().with_context(|| format!("{path} holds {list:?} instead of one process"))
}

/// Held while hosts are created and removed, so that a host being created is not taken for a leftover.
fn gate() -> Result<File> {
    fs::create_dir_all(BASE).with_context(|| format!("make {BASE}"))?;
    let path = Path::new(BASE).join("gate");
    let gate = File::create(&path).with_context(|| format!("open {}", path.display()))?;
    gate.lock().with_context(|| format!("lock {}", path.display()))?;
    Ok(gate)
}

fn hosts() -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(BASE).with_context(|| format!("list {BASE}"))?;
    let paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    Ok(paths.into_iter().filter(|path| path.is_dir()).collect())
}

fn is_kept(dir: &Path) -> bool {
    File::open(dir.join("owner")).is_ok_and(|owner| owner.try_lock().is_err())
}

fn remove(dir: &Path) -> Result<()> {
    let number = dir.file_name().context("a host's folder has a name")?.to_string_lossy();
    cgroup::remove(&format!("testbed-{number}"))?;
    loop {
        match fs::remove_dir_all(dir) {
            // Its own keeper may be removing it too. A missing folder is fine.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                if !dir.exists() {
                    return Ok(());
                }
            }
            removed => return removed.with_context(|| format!("remove {}", dir.display())),
        }
    }
}
