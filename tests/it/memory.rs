//! The memory limit of embassy's control group is reached.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, ensure};
use testbed::{Container, Embassy, Host, embassy_program};

use crate::{
    READY, WAIT,
    support::{ETCD, counts, metric, offer, says},
};

const VIP: &str = "172.17.0.1:80";

/// A control group with a memory limit. The host removes it at its end.
pub(crate) struct Group(PathBuf);

impl Group {
    pub(crate) fn new(host: &Host, limit: u64) -> Result<Self> {
        let v1 = PathBuf::from("/sys/fs/cgroup/memory");
        let (hierarchy, file) = match v1.join("memory.limit_in_bytes").exists() {
            true => (v1, "memory.limit_in_bytes"),
            false => (PathBuf::from("/sys/fs/cgroup"), "memory.max"),
        };
        let group = hierarchy.join(host.cgroup()).join("embassy");
        fs::create_dir_all(&group).with_context(|| format!("make {}", group.display()))?;
        let limit = limit.to_string();
        fs::write(group.join(file), limit).with_context(|| format!("set {file}"))?;
        Ok(Self(group))
    }

    /// The words before a command that is to run in the group.
    fn enter(&self) -> [String; 3] {
        let words = format!("echo $$ >{}/cgroup.procs && exec \"$@\"", self.0.display());
        ["-c".to_owned(), words, "sh".to_owned()]
    }

    /// embassy in this group.
    pub(crate) fn embassy(&self, host: &Host, args: &[&str]) -> Result<Embassy> {
        let mut limited = host.command("sh");
        limited.env("DOCKER_HOST", host.docker_url());
        limited.args(self.enter()).arg(embassy_program()?).args(args);
        host.embassy_from(limited)
    }

    /// How often the kernel killed a process of the group.
    fn kills(&self) -> Result<u64> {
        let text = ["memory.oom_control", "memory.events"]
            .iter()
            .find_map(|file| fs::read_to_string(self.0.join(file)).ok())
            .context("no count of kills")?;
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        Ok(count.context("no line oom_kill")?.parse()?)
    }
}

struct Place {
    app: Container,
    group: Group,
    embassy: Embassy,
    host: Host,
}

impl Place {
    /// `limit`: bytes for embassy.
    fn new(limit: u64) -> Result<Self> {
        let host = Host::light()?;
        let server = host.server("greet", ["greet", "--name", "joe"]).start()?;
        offer(&host, "greet", server.ip()?)?;
        let app = host.client("app").env("BACKEND_GREET", "/services/greet;80").start()?;
        let group = Group::new(&host, limit)?;
        // One consumer may use all connections that memory allows.
        let flags = ["--dnat", ETCD, "--max-connections-per-consumer=100000"];
        let embassy = group.embassy(&host, &flags)?;
        embassy.wait_ready(READY)?;
        Ok(Self { app, group, embassy, host })
    }

    /// Opens connections with this many bytes in flight on each. Returns how many were greeted, and how many were reset.
    fn hold(&self, app: &Container, count: usize, bytes: usize) -> Result<(u64, u64)> {
        let (count, bytes) = (count.to_string(), bytes.to_string());
        let words = ["testbed", "peer", "hold", VIP, "-n", &count, "--fill", &bytes];
        let held = app.spawn("held", words)?;
        let said = testbed::eventually(3 * WAIT, "the greetings", || {
            let log = held.log();
            let whole = log.lines().next().filter(|_| log.contains('\n')).context("none yet")?;
            Ok(serde_json::from_str::<serde_json::Value>(whole)?)
        })?;
        let count = |value: &serde_json::Value| value.as_u64().unwrap_or_default();
        // This process ends, but the one that it started in the container does not.
        Ok((count(&said["greetings"]["hello from joe"]), count(&said["failures"]["reset"])))
    }

    fn refused(&self, outcome: &str) -> Result<u64> {
        metric(&self.embassy, &format!("embassy_connections_total{{outcome=\"{outcome}\"}}"))
    }

    fn becomes(&self, outcome: &str) -> Result<()> {
        testbed::eventually(WAIT, outcome, || {
            let now = self.app.probe(VIP)?.outcome;
            ensure!(now == outcome, "{now}");
            Ok(())
        })
    }
}

#[test]
fn more_connections_than_memory_can_hold_are_refused_and_nobody_is_killed() -> Result<()> {
    const MOST: usize = 2_500;
    let place = Place::new(40 << 20)?;
    says(&place.embassy, &["maximum number of open connections", "bound=\"memory\""])?;
    let limit = metric(&place.embassy, "embassy_connections_limit")?;
    ensure!((64..MOST as u64).contains(&limit), "{limit}");
    let rush = place.host.client("rush").env("BACKEND_GREET", "/services/greet;80").start()?;
    counts(&place.embassy, "embassy_routes", 2)?;

    let (greeted, reset) = place.hold(&rush, MOST, 128 << 10)?;
    println!("{greeted} of {MOST} were served, {reset} refused");
    ensure!((64..=limit).contains(&greeted), "{greeted} of {limit}");
    assert_eq!(greeted + reset, MOST as u64);
    let refused = place.refused("too_many_connections")? + place.refused("memory_short")?;
    assert_eq!(refused, reset);
    assert_eq!(place.app.probe(VIP)?.outcome, "reset");
    assert_eq!(metric(&place.embassy, "embassy_connections_active")?, greeted);

    rush.kill()?;
    place.becomes("data")?;
    assert_eq!(place.group.kills()?, 0);
    Ok(())
}

/// Another process in the group uses the memory. For embassy only the rest counts.
#[test]
fn near_the_limit_new_connections_are_refused_until_there_is_memory_again() -> Result<()> {
    const LIMIT: u64 = 64 << 20;
    let place = Place::new(LIMIT)?;
    let (greeted, _) = place.hold(&place.app, 100, 1)?;
    assert_eq!(greeted, 100);
    assert_eq!(metric(&place.embassy, "embassy_memory_limit_bytes")?, LIMIT);
    assert_eq!(metric(&place.embassy, "embassy_memory_short")?, 0);

    // A file in memory belongs to the group of the process that wrote it.
    let rest = LIMIT * 95 / 100 - metric(&place.embassy, "embassy_memory_used_bytes")?;
    let write = format!("head -c {rest} /dev/zero >/run/rest");
    place
        .host
        .run("sh", place.group.enter().into_iter().chain(["sh", "-c", &write].map(Into::into)))?;
    counts(&place.embassy, "embassy_memory_short", 1)?;
    assert_eq!(place.app.probe(VIP)?.outcome, "reset");
    ensure!(place.refused("memory_short")? > 0);
    assert_eq!(metric(&place.embassy, "embassy_connections_active")?, 100);
    says(&place.embassy, &["memory is nearly used up; new connections are refused"])?;
    let embassy = embassy_program()?;
    let status = place.host.run(&embassy.to_string_lossy(), ["status"])?;
    ensure!(status.contains("(memory_short)"), "{status}");
    let doctor = place.host.command(&embassy).args(["doctor", "--dnat", ETCD]).output()?;
    let doctor = String::from_utf8_lossy(&doctor.stdout);
    ensure!(doctor.lines().any(|line| line.starts_with("FAIL  memory")), "{doctor}");

    place.host.run("rm", ["/run/rest"])?;
    place.becomes("data")?;
    says(&place.embassy, &["memory is available again; new connections are accepted"])?;
    assert_eq!(metric(&place.embassy, "embassy_memory_short")?, 0);
    assert_eq!(metric(&place.embassy, "embassy_connections_active")?, 100);
    assert_eq!(place.group.kills()?, 0);
    Ok(())
}
