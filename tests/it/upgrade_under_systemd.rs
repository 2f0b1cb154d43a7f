//! The unit under a real systemd, in namespaces of its own: it starts, takes an upgrade by `systemctl reload`, and ends.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use testbed::{Host, Process, embassy_program, output};

use crate::{
    READY, WAIT,
    support::{offer, reaches, web},
};

/// Makes a root over this machine's, and starts systemd there with no unit of the machine's. $1: an empty folder; $2: the unit; $3: the
/// engine's socket; $4: the program.
const START: &str = r#"
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" overlay "$1/root"
cd "$1/root"
mount -t proc proc proc
mount --rbind /sys sys
mount --rbind /dev dev
umount -R sys/fs/cgroup || umount -R -l sys/fs/cgroup
# As the machine has its control groups: of both versions, or of version 2 alone. They begin at a group of this test's.
if grep -q '^[0-9]*:name=systemd:' /proc/self/cgroup; then
    mount -t tmpfs tmpfs sys/fs/cgroup
    mkdir sys/fs/cgroup/systemd sys/fs/cgroup/unified
    mount -t cgroup -o none,name=systemd cgroup sys/fs/cgroup/systemd
    mount -t cgroup2 cgroup2 sys/fs/cgroup/unified
else
    mount -t cgroup2 cgroup2 sys/fs/cgroup
fi
rm -rf etc/systemd/system/*
echo 'embassy:x:59991:59991::/:/usr/sbin/nologin' >>etc/passwd
echo 'embassy:x:59991:' >>etc/group
cp "$2" etc/systemd/system/embassy.service
printf '[Unit]\nDescription=nothing else\n' >etc/systemd/system/nothing.target
echo 'EMBASSY_FLAGS="-discovery=etcd://127.0.0.1:2379"' >etc/default/embassy
rm -f usr/bin/embassy
ln -s "$4" usr/bin/embassy
mount -t tmpfs tmpfs run
touch run/docker.sock
mount --bind "$3" run/docker.sock
mkdir -p mnt/before
pivot_root . mnt/before
exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot . /lib/systemd/systemd --system --unit=nothing.target --log-target=console --show-status=no
"#;

struct Systemd {
    process: Process,
    /// Its number outside.
    init: u32,
    /// Its control groups.
    groups: Vec<std::path::PathBuf>,
}

impl Systemd {
    fn start(host: &Host) -> Result<Self> {
        let folder = host.dir().join("systemd");
        fs::create_dir(&folder)?;
        let unit = concat!(env!("CARGO_MANIFEST_DIR"), "/dist/embassy.service");
        let unit_copy = host.dir().join("unit");
        fs::copy(unit, &unit_copy)?;
        let socket = host.docker_url().trim_start_matches("unix://").to_owned();
        host.run("chmod", ["666", &socket])?;
        // A group of its own, in each hierarchy that systemd uses.
        let name = format!("embassy-{}", host.init_pid());
        let roots = ["/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"];
        let is_used = |root: &&str| {
            Path::new(root).join("cgroup.procs").exists()
                && (*root != "/sys/fs/cgroup"
                    || Path::new(root).join("cgroup.controllers").exists())
        };
        let groups: Vec<_> =
            roots.into_iter().filter(is_used).map(|root| Path::new(root).join(&name)).collect();
        let mut enter = String::new();
        for group in &groups {
            fs::create_dir(group).with_context(|| group.display().to_string())?;
            enter += &format!("echo $$ >{}/cgroup.procs; ", group.display());
        }
        let mut command = host.command("sh");
        let unshare = "exec unshare --mount --pid --cgroup --uts --ipc --fork --kill-child sh -c \"$0\" sh \"$@\"";
        command.args(["-ec", &(enter + unshare), START]).args([&folder, &unit_copy]);
        command.arg(socket).arg(embassy_program()?);
        let process = host.spawn("systemd", command)?;
        let init = testbed::eventually(WAIT, "systemd to start", || {
            let child = output(Command::new("pgrep").args(["-P", &process.pid().to_string()]))?;
            let init: u32 = child.trim().parse()?;
            let systemd = Self::inside(init, "systemctl", &["is-system-running"]).output()?;
            let said = String::from_utf8_lossy(&systemd.stdout).trim().to_owned();
            ensure!(["running", "degraded"].contains(&said.as_str()), "{said}: {}", process.log());
            Ok(init)
        })?;
        Ok(Self { process, init, groups })
    }

    fn inside(init: u32, program: &str, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args([
            "-t",
            &init.to_string(),
            "--mount",
            "--pid",
            "--net",
            "--cgroup",
            "--root",
            "--wd",
            "--",
            program,
        ]);
        command.args(words);
        command
    }

    fn run(&self, program: &str, words: &[&str]) -> Result<String> {
        let said = output(&mut Self::inside(self.init, program, words));
        Ok(said.with_context(|| self.process.log())?.trim().to_owned())
    }

    fn systemctl(&self, words: &[&str]) -> Result<String> {
        self.run("systemctl", words)
    }

    fn property(&self, name: &str) -> Result<String> {
        self.systemctl(&["show", "embassy", "--value", "-p", name])
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        // All in its namespace end with it.
        let _ = self.process.kill();
        for group in &self.groups {
            let below = output(Command::new("find").arg(group).args(["-depth", "-type", "d"]));
            for folder in below.unwrap_or_default().lines() {
                let removed = testbed::eventually(WAIT, "the group to be empty", || {
                    Ok(fs::remove_dir(folder)?)
                });
                let _ = removed;
            }
        }
    }
}

#[test]
fn a_reload_of_the_unit_is_an_upgrade_that_ends_no_connection() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let pool = host.server("pool", ["hang"]).start()?;
    offer(&host, "pool", pool.ip()?)?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80");
    let app = app.env("BACKEND_POOL", "/services/pool;81").start()?;
    let systemd = Systemd::start(&host)?;
    systemd.systemctl(&["start", "embassy"])?;
    // `start` returns once embassy is ready.
    assert_eq!(host.http("GET", "http://127.0.0.1:9990/readyz", "")?.status, 200);
    reaches(&app, "172.17.0.1:80", "web")?;
    let idle = app.spawn("idle", ["testbed", "peer", "recv", "172.17.0.1:81"])?;
    let traffic = [app.live("live", "172.17.0.1:80")?, app.traffic("flood", "172.17.0.1:80")?];
    let first = systemd.property("MainPID")?;

    // A program that cannot start: the old one continues, and systemd has the same main process.
    let root = format!("/proc/{}/root", systemd.init);
    let install = |script: &str| {
        let new = format!("{root}/usr/bin/embassy.new");
        fs::write(&new, script)?;
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755))?;
        fs::rename(&new, format!("{root}/usr/bin/embassy"))
    };
    install("#!/bin/sh\nexit 1\n")?;
    systemd.systemctl(&["reload", "embassy"])?;
    assert_eq!(
        (systemd.property("MainPID")?, systemd.property("ActiveState")?),
        (first.clone(), "active".into())
    );
    let status = systemd.property("StatusText")?;
    ensure!(
        status.starts_with("the new process could not take over") || status == "ready",
        "{status}"
    );
    reaches(&app, "172.17.0.1:80", "web")?;

    // The program is another file now, which says so.
    install(&format!("#!/bin/sh\nUPGRADED=1 exec {} \"$@\"\n", embassy_program()?.display()))?;
    let mut main = first;
    for n in 1..=2 {
        systemd.systemctl(&["reload", "embassy"])?;
        // On a slow machine systemd says that the reload is over before embassy has said that it reloads.
        let now = testbed::eventually(WAIT, "the new main process", || {
            let now = systemd.property("MainPID")?;
            ensure!(now != main && now != "0", "{now}, and before {main}");
            Ok(now)
        })?;
        let metrics = host.http("GET", "http://127.0.0.1:9990/metrics", "")?.ok()?;
        ensure!(metrics.contains(&format!("\nembassy_takeovers_total {n}\n")));
        let variables = systemd.run("cat", &[&format!("/proc/{now}/environ")])?;
        ensure!(variables.contains("UPGRADED=1"), "it is the old program");
        testbed::eventually(READY, "the old one to have ended", || {
            ensure!(systemd.run("cat", &[&format!("/proc/{main}/stat")]).is_err());
            Ok(())
        })?;
        main = now;
    }
    assert_eq!(systemd.property("ActiveState")?, "active");
    assert_eq!(systemd.property("NRestarts")?, "0", "no end was taken for the end of embassy");
    assert_eq!(systemd.property("Result")?, "success");
    for traffic in traffic {
        let answers = traffic.stop()?;
        ensure!(answers.failed() == 0 && answers.from("web") > 0, "{answers:?}");
    }
    assert_eq!(idle.exited()?, None);
    systemd.systemctl(&["stop", "embassy"])?;
    let status = Systemd::inside(systemd.init, "systemctl", &["status", "embassy"]).output()?;
    let status = String::from_utf8_lossy(&status.stdout).into_owned();
    assert_eq!(systemd.property("Result")?, "success", "{status}");
    assert!(!idle.wait(WAIT)?.success(), "it was reset");
    Ok(())
}

/// As systemd reads it, on this machine.
#[test]
fn systemd_finds_nothing_wrong_with_the_unit() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let unit = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/dist/embassy.service"))?;
    // The program that it starts is not installed here.
    let unit = unit.replace("/usr/bin/embassy", &embassy_program()?.display().to_string());
    let file = folder.path().join("embassy.service");
    fs::write(&file, unit)?;
    let verified =
        Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&file).output()?;
    let said = String::from_utf8_lossy(&verified.stderr).into_owned();
    let about = said.lines().filter(|line| line.contains("embassy")).collect::<Vec<_>>();
    ensure!(verified.status.success() && about.is_empty(), "{said}");
    Ok(())
}
