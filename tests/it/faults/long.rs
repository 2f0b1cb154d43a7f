//! Registries that hang for longer than a held query may take, so that this is noticed and reported.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use testbed::{Embassy, Host};

use super::{VIP, unharmed};
use crate::{
    READY, WAIT,
    support::{ETCD, offer, reaches, says},
};

/// One binding of one container for each, on these ports.
const SOURCES: [(&str, &str); 2] = [("etcd /services/web", "172.17.0.1:81"), ("consul web", VIP)];
/// How long a hanging registry may go unnoticed: a held query takes up to 30 s, and its answer 10 s more.
const NOTICED: Duration = Duration::from_secs(90);

#[test]
fn registries_that_are_frozen_are_shown_to_be_down_and_no_request_fails() -> Result<()> {
    hang(
        "frozen",
        |host| {
            host.consul_daemon().pause()?;
            host.etcd_daemon().pause()?;
            Ok(())
        },
        |host| {
            host.consul_daemon().resume()?;
            host.etcd_daemon().resume()
        },
    )
}

#[test]
fn registries_that_are_cut_off_are_shown_to_be_down_and_no_request_fails() -> Result<()> {
    hang(
        "cut off",
        |host| {
            let chain = "add chain inet cut out { type filter hook output priority 0; }";
            let rule = "add rule inet cut out tcp dport { 8500, 2379 } drop";
            ["add table inet cut", chain, rule]
                .iter()
                .try_for_each(|rule| host.run("nft", [rule]).map(drop))
        },
        |host| host.run("nft", ["delete table inet cut"]).map(drop),
    )
}

fn hang(
    what: &str,
    begin: impl Fn(&Host) -> Result<()>,
    end: impl Fn(&Host) -> Result<()>,
) -> Result<()> {
    let host = Host::light()?;
    let (web, extra) = (host.web("web").start()?, host.web("extra").start()?);
    let consul = host.consul()?;
    consul.service("web", "web").address(web.ip()?).port(80).register()?;
    offer(&host, "web", web.ip()?)?;
    let app = host.client("app").env("BACKEND_CONSUL", "web;80");
    let app = app.env("BACKEND_ETCD", "/services/web;81;via=etcd").start()?;
    let embassy = host.embassy(["--dnat", "-discovery=consul://127.0.0.1:8500", ETCD])?;
    embassy.wait_ready(READY)?;
    let mut running = Vec::new();
    for (source, target) in SOURCES {
        reaches(&app, target, "web")?;
        ensure!(sample(&embassy, "up", source)? == 1.0);
        let port = target.rsplit_once(':').context("a port")?.1;
        running.push((
            source,
            app.traffic(&format!("new-{port}"), target)?,
            app.live(&format!("live-{port}"), target)?,
        ));
    }

    let start = Instant::now();
    begin(&host)?;
    for (source, _) in SOURCES {
        testbed::eventually(NOTICED, &format!("{source} to be down"), || {
            ensure!(sample(&embassy, "up", source)? == 0.0);
            Ok(())
        })?;
        println!("{source} {what}: shown as down after {:.1?}", start.elapsed());
        says(&embassy, &["source does not answer; its last data stays in use", source])?;
    }
    let ages = || SOURCES.map(|(source, _)| sample(&embassy, "age_seconds", source));
    let before = ages();
    std::thread::sleep(Duration::from_secs(2));
    for ((before, now), (source, _)) in before.into_iter().zip(ages()).zip(SOURCES) {
        let (before, now) = (before?, now?);
        ensure!(now >= before + 1.5, "{source}: {before} s, then {now} s");
        println!("{source} {what}: what is used is {now:.0} s old");
    }

    let start = Instant::now();
    end(&host)?;
    consul.service("extra", "web").address(extra.ip()?).port(80).register()?;
    offer(&host, "web", extra.ip()?)?;
    for (source, target) in SOURCES {
        reaches(&app, target, "extra")?;
        println!("{source} {what}: news used {:.1?} after it", start.elapsed());
        testbed::eventually(WAIT, &format!("{source} to be up"), || {
            ensure!(sample(&embassy, "up", source)? == 1.0);
            Ok(())
        })?;
        ensure!(sample(&embassy, "age_seconds", source)? < 60.0);
        says(&embassy, &["source is back", source])?;
    }
    for (source, traffic, live) in running {
        unharmed(&format!("{source} {what}"), &traffic.stop()?, None)?;
        unharmed(&format!("{source} {what}: a connection that lives on"), &live.stop()?, None)?;
    }
    Ok(())
}

/// A metric of a source.
fn sample(embassy: &Embassy, name: &str, source: &str) -> Result<f64> {
    let series = format!("embassy_source_{name}{{source=\"{source}\"}} ");
    let metrics = embassy.admin("/metrics")?.ok()?;
    let value = metrics.lines().find_map(|line| line.strip_prefix(&series));
    Ok(value.with_context(|| format!("no {series}"))?.trim().parse()?)
}
