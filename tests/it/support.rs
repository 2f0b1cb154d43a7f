//! Helpers for tests of a whole host.

use std::{fmt::Display, net::IpAddr, process::Command, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use testbed::{Container, Embassy, Host, embassy_program};

use crate::WAIT;

/// The same test once for each of these paths (`--path`).
macro_rules! on_each_path {
    ($($(#[doc = $about:literal])* fn $name:ident($path:ident: $($on:ident)|+) $body:block)*) => {$(
        $(#[doc = $about])*
        mod $name {
            use super::*;

            fn run($path: &str) -> Result<()> $body

            $(#[test]
            fn $on() -> Result<()> {
                run(stringify!($on))
            })+
        }
    )*};
}

pub(crate) use on_each_path;

/// The discovery in which [`offer`] registers services.
pub(crate) const ETCD: &str = "-discovery=etcd://127.0.0.1:2379";

/// Registers one endpoint of `/services/<service>` in etcd.
pub(crate) fn offer(host: &Host, service: &str, address: impl Into<IpAddr>) -> Result<()> {
    offer_at(host, service, &std::net::SocketAddr::new(address.into(), 80).to_string())
}

/// The same with any port.
pub(crate) fn offer_at(host: &Host, service: &str, endpoint: &str) -> Result<()> {
    host.etcd()?.v3().put(&format!("/services/{service}/{endpoint}"), endpoint)
}

/// Starts a web server, and registers it under its own name.
pub(crate) fn web(host: &Host, name: &str) -> Result<Container> {
    let web = host.web(name).start()?;
    offer(host, name, web.ip()?)?;
    Ok(web)
}

/// User rules that lead to embassy's port: without `--dnat` and `--redirect` it is only ready with some. They match no
/// connection of a test.
pub(crate) fn own_rules(host: &Host) -> Result<()> {
    for chain in ["PREROUTING", "OUTPUT"] {
        let rule = format!("-t nat -A {chain} -p tcp -d 192.0.2.1 -j REDIRECT --to-ports 9999");
        host.run("iptables", rule.split(' '))?;
    }
    Ok(())
}

/// Waits until requests from `consumer` to `target` are answered by `name`.
pub(crate) fn reaches(consumer: &Container, target: impl Display, name: &str) -> Result<()> {
    let what = format!("{} to reach {name} at {target}", consumer.name());
    testbed::eventually(WAIT, &what, || {
        let answers = consumer.get(&target).run()?;
        ensure!(answers.from(name) == 1, "{answers:?}");
        Ok(())
    })
}

/// Waits until connections from `consumer` to `target` have this outcome (see [`testbed::Probe`]).
pub(crate) fn ends(consumer: &Container, target: impl Display, outcome: &str) -> Result<()> {
    let what = format!("{} at {target} to be {outcome}", consumer.name());
    testbed::eventually(WAIT, &what, || {
        let probe = consumer.probe(&target)?;
        ensure!(probe.outcome == outcome, "{probe:?}");
        Ok(())
    })
}

/// The directory in which an embassy of [`with_programs`] finds the programs of `/usr/sbin`.
pub(crate) const SBIN: &str = "/run/sbin.real";

/// embassy with the programs of a directory instead of those in `/usr/sbin`, the only place where it looks for programs.
/// Other processes do not see them.
pub(crate) fn with_programs(host: &Host, programs: impl Display) -> Result<Command> {
    let mounts = format!(
        "mkdir -p {SBIN} /run/sbin; mount --bind /usr/sbin {SBIN}; ln -sf {SBIN}/* /run/sbin; \
         cp -Pf --remove-destination {programs}/* /run/sbin; mount --bind /run/sbin /usr/sbin"
    );
    with_mounts(host, &mounts)
}

/// embassy without any program of `/usr/sbin`.
pub(crate) fn without_programs(host: &Host) -> Result<Command> {
    with_mounts(host, "mount -t tmpfs none /usr/sbin")
}

/// embassy in its own mount namespace, after this script.
pub(crate) fn with_mounts(host: &Host, script: &str) -> Result<Command> {
    let mut command = host.command("unshare");
    command.args(["--mount", "sh", "-ec", &format!("{script}; exec \"$@\""), "sh"]);
    command.env("DOCKER_HOST", host.docker_url()).arg(embassy_program()?);
    Ok(command)
}

/// A metric of embassy, by its name and labels as written. 0 if it does not exist.
pub(crate) fn metric(embassy: &Embassy, series: &str) -> Result<u64> {
    let text = embassy.admin("/metrics")?.ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    Ok(value.map_or(Ok(0), str::parse)?)
}

/// How often embassy restored its rules, for any reason.
pub(crate) fn restored(embassy: &Embassy) -> Result<u64> {
    sum(embassy, "embassy_capture_restored_total")
}

/// The sum of a counter over all its labels.
pub(crate) fn sum(embassy: &Embassy, name: &str) -> Result<u64> {
    let text = embassy.admin("/metrics")?.ok()?;
    let samples = text.lines().filter_map(|line| {
        let (series, value) = line.rsplit_once(' ')?;
        series.strip_prefix(name)?.starts_with('{').then_some(value)
    });
    Ok(samples.map(str::parse::<u64>).sum::<Result<u64, _>>()?)
}

/// Waits until a metric has at least this value.
pub(crate) fn counts(embassy: &Embassy, series: &str, at_least: u64) -> Result<()> {
    testbed::eventually(WAIT, &format!("{series} to be {at_least}"), || {
        let value = metric(embassy, series)?;
        ensure!(value >= at_least, "it is {value}");
        Ok(())
    })
}

/// Waits until embassy's log contains these words on one line.
pub(crate) fn says(embassy: &Embassy, words: &[&str]) -> Result<()> {
    testbed::eventually(WAIT, &format!("the log to say {words:?}"), || {
        let log = embassy.log();
        let said = log.lines().any(|line| words.iter().all(|word| line.contains(word)));
        ensure!(said, "it does not");
        Ok(())
    })
}

/// Checks that embassy waits instead of looping. On a busy machine processes get less CPU time, so it is compared with a
/// busy loop at the same time.
pub(crate) fn spins_not(embassy: &Embassy) -> Result<()> {
    let mut spinner = Command::new("sh").args(["-c", "while :; do :; done"]).spawn()?;
    let before = cpu_seconds(embassy.pid())?;
    // This does not wait for something: CPU time is measured this long.
    thread::sleep(Duration::from_secs(2));
    let used = cpu_seconds(embassy.pid()).map(|now| now - before);
    let spun = cpu_seconds(spinner.id());
    spinner.kill()?;
    spinner.wait()?;
    let (used, spun) = (used?, spun?);
    ensure!(used < spun / 2.0, "{used} s of processor time; who spins has {spun} s");
    Ok(())
}

/// User and system CPU time so far.
fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, in parentheses, may contain spaces. utime and stime are the 14th and 15th field (man 5 proc_pid_stat).
    let (_, rest) = stat.rsplit_once(") ").context("a name")?;
    let fields: Vec<f64> =
        rest.split(' ').skip(11).take(2).map(str::parse).collect::<Result<_, _>>()?;
    // USER_HZ is 100 on all machines on which Linux runs today.
    Ok(fields.iter().sum::<f64>() / 100.0)
}
