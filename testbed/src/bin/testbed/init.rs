//! `testbed init`: the first process of a host. Its end is the end of all that runs in there.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{WaitOptions, wait};
use testbed::{HOST_ADDRESS, output};

/// Makes the namespaces look like a Docker host, says `ready`, and ends with its stdin.
pub(crate) fn run() -> Result<()> {
    files()?;
    links()?;
    println!("ready");
    thread::spawn(reap);
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    Ok(())
}

/// Everything that an engine writes goes to a memory file system that nobody else sees and that goes with us.
fn files() -> Result<()> {
    sh("mount -t tmpfs -o mode=755 testbed /run")?;
    fs::create_dir_all("/run/testbed").context("make /run/testbed")?;
    fs::write("/run/testbed/daemon.json", "{}\n").context("write daemon.json")?;
    // dockerd keeps a key in the one, containerd makes a folder in the other.
    for dir in ["/etc/docker", "/opt"] {
        if Path::new(dir).is_dir() {
            let copy = format!("/run/testbed{dir}");
            sh(&format!(
                "mkdir -p {copy}/upper {copy}/work && mount -t overlay \
                 -o lowerdir={dir},upperdir={copy}/upper,workdir={copy}/work testbed {dir}"
            ))?;
        }
    }
    Ok(())
}

/// A network card whose cable leads nowhere: its address is this host's, and others of its network never answer.
fn links() -> Result<()> {
    sh("ip link set lo up && ip link add eth0 type veth peer name eth0-peer")?;
    sh(&format!("ip address add {HOST_ADDRESS}/24 dev eth0"))?;
    sh("ip link set eth0 up && ip link set eth0-peer up")
}

fn sh(script: &str) -> Result<()> {
    output(Command::new("sh").args(["-c", script])).map(drop)
}

/// Whoever loses its parent becomes our child: containers of a killed engine, for one.
fn reap() {
    loop {
        // An error means that there is no child now.
        if wait(WaitOptions::empty()).is_err() {
            thread::sleep(Duration::from_millis(100));
        }
    }
}
