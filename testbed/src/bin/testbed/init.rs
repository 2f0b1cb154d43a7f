//! `testbed init`: the first process of a host. When it ends, the kernel ends all processes inside.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{WaitOptions, wait};
use testbed::{HOST_ADDRESS, output};

/// Makes the namespaces look like a Docker host, prints `ready`, and ends when its stdin ends.
pub(crate) fn run() -> Result<()> {
    files()?;
    links()?;
    println!("ready");
    thread::spawn(reap);
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    Ok(())
}

/// Prevents writes to the machine's own disk, except into our folder below /var/lib/testbed.
fn files() -> Result<()> {
    sh("mount -t tmpfs -o mode=755 testbed /run && mkdir -p /run/testbed/base")?;
    sh("mount --bind /var/lib/testbed /run/testbed/base")?;
    // For dockerd's keys, a folder of containerd, and embassy's state.
    for dir in ["/etc", "/opt", "/var/lib"] {
        let copy = format!("/run/testbed{dir}");
        sh(&format!(
            "mkdir -p {copy}/upper {copy}/work && mount -t overlay \
             -o lowerdir={dir},upperdir={copy}/upper,workdir={copy}/work testbed {dir}"
        ))?;
    }
    sh("mount --move /run/testbed/base /var/lib/testbed")?;
    // The machine's own DNS servers cannot be reached from inside. Without this, a lookup would wait for a timeout.
    sh("rm -f /etc/resolv.conf && echo nameserver 127.0.0.1 > /etc/resolv.conf")?;
    fs::write("/run/testbed/daemon.json", "{}\n").context("write daemon.json")
}

/// A network interface without a peer: its address is this host's, and other addresses of its network never answer.
fn links() -> Result<()> {
    // Disables duplicate detection: otherwise an IPv6 address cannot be used for its first second, and the engine does not
    // wait.
    for interfaces in ["all", "default"] {
        let path = format!("/proc/sys/net/ipv6/conf/{interfaces}/accept_dad");
        if Path::new(&path).exists() {
            fs::write(&path, "0").with_context(|| format!("write {path}"))?;
        }
    }
    sh("ip link set lo up && ip link add eth0 type veth peer name eth0-peer")?;
    sh(&format!("ip address add {HOST_ADDRESS}/24 dev eth0"))?;
    sh("ip link set eth0 up && ip link set eth0-peer up")
}

fn sh(script: &str) -> Result<()> {
    output(Command::new("sh").args(["-c", script])).map(drop)
}

/// Waits for orphaned processes, which become our children, for example containers of a killed engine.
fn reap() {
    loop {
        // An error means that there is no child now.
        if wait(WaitOptions::empty()).is_err() {
            thread::sleep(Duration::from_millis(100));
        }
    }
}
