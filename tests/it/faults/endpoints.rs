//! Some endpoints fail while others work.

use std::time::Instant;

use anyhow::{Result, ensure};
use testbed::{Container, Embassy, Host};

use super::{VIP, meets, unharmed};
use crate::{
    READY, WAIT,
    support::{ETCD, metric, offer, on_each_path, says, sum},
};

const REQUESTS: usize = 10_000;

/// Two web servers and a third endpoint of `/services/web`, and a consumer with these options.
struct Scene {
    webs: [Container; 2],
    third: Container,
    app: Container,
    embassy: Embassy,
}

fn scene(options: &str, path: &str) -> Result<Scene> {
    let host = Host::light()?;
    let webs = [host.web("web-1").start()?, host.web("web-2").start()?];
    webs.iter().try_for_each(|web| offer(&host, "web", web.ip()?))?;
    let third = host.container("third").cmd(["sh", "-c", "while sleep 1; do :; done"]).start()?;
    offer(&host, "web", third.ip()?)?;
    let app = host.client("app").env("BACKEND_WEB", &format!("/services/web;80{options}"));
    let app = app.start()?;
    let embassy = host.embassy(["--dnat", ETCD, &format!("--path={path}")])?;
    Ok(Scene { webs, third, app, embassy })
}

/// Drops all packets to a container silently, or stops doing so.
fn black_hole(container: &Container, on: bool) -> Result<()> {
    let change: &[&str] = if on {
        &[
            "add table inet silent",
            "add chain inet silent in { type filter hook input priority 0; policy drop; }",
        ]
    } else {
        &["delete table inet silent"]
    };
    for rule in change {
        testbed::output(container.command("nft")?.arg(rule))?;
    }
    Ok(())
}

/// Checks that few attempts failed, however long the fault lasted: those that were running when it was noticed, and one
/// probe at a time since.
fn few_met_it(embassy: &Embassy) -> Result<()> {
    let failures = sum(embassy, "embassy_endpoint_connect_failures_total")?;
    ensure!((1..50).contains(&failures), "{failures} tries failed");
    Ok(())
}

on_each_path! {
    fn no_request_of_ten_thousand_fails_while_one_endpoint_of_three_refuses(path: proxy | auto) {
        let Scene { app, embassy, .. } = scene("", path)?;
        embassy.wait_ready(READY)?;
        meets(&app, "web-1")?;
        let answers = app.get(VIP).times(REQUESTS).at_once(8).run()?;
        unharmed("1 of 3 endpoints refuses", &answers, None)?;
        few_met_it(&embassy)
    }

    fn no_request_of_ten_thousand_fails_and_few_meet_the_one_endpoint_of_three_that_is_silent(path: proxy | auto) {
        let Scene { third, app, embassy, .. } = scene("", path)?;
        black_hole(&third, true)?;
        embassy.wait_ready(READY)?;
        meets(&app, "web-1")?;
        let answers = app.get(VIP).times(REQUESTS).at_once(8).run()?;
        unharmed("1 of 3 endpoints is silent", &answers, None)?;
        few_met_it(&embassy)
    }

    /// One that fails at once has always the fewest connections, and so has one that never answers.
    fn least_connections_do_not_lead_to_an_endpoint_that_refuses_or_is_silent(path: proxy | auto) {
        const FEWER: usize = 3_000;
        for silent in [false, true] {
            let Scene { third, app, embassy, .. } = scene(";lb=leastconn", path)?;
            if silent {
                black_hole(&third, true)?;
            }
            embassy.wait_ready(READY)?;
            meets(&app, "web-1")?;
            let answers = app.get(VIP).times(FEWER).at_once(8).run()?;
            let what = if silent { "is silent" } else { "refuses" };
            unharmed(&format!("1 of 3 endpoints {what}, lb=leastconn"), &answers, None)?;
            few_met_it(&embassy)?;
            for name in ["web-1", "web-2"] {
                ensure!(answers.from(name) > FEWER / 10, "{answers:?}");
            }
        }
        Ok(())
    }

    fn with_a_check_no_connection_has_to_find_out(path: proxy | auto) {
        let Scene { webs, third, app, embassy } = scene(";check=tcp", path)?;
        let endpoint = format!("endpoint={}:80", third.ip()?);
        // Nobody has dialled yet.
        says(&embassy, &["endpoint check fails", &endpoint])?;
        let passes = |name: &str| says(&embassy, &["endpoint check passes", name]);
        passes("etcd /services/web")?;
        embassy.wait_ready(READY)?;
        let answers = app.get(VIP).times(300).run()?;
        unharmed("1 of 3 endpoints refuses, check=tcp", &answers, None)?;
        ensure!(!embassy.log().contains("cannot connect to endpoint"), "{}", embassy.log());

        // It comes, and is used.
        third.exec(["sh", "-c", "testbed peer http --name third >/dev/null 2>&1 &"])?;
        passes(&endpoint)?;
        meets(&app, "third")?;
        black_hole(&third, true)?;
        testbed::eventually(WAIT, "a second failure", || {
            let log = embassy.log();
            let fails =
                log.lines().filter(|l| l.contains("endpoint check fails") && l.contains(&endpoint));
            ensure!(fails.count() == 2, "{log}");
            Ok(())
        })?;
        let answers = app.get(VIP).times(300).run()?;
        unharmed("1 of 3 endpoints is silent, check=tcp", &answers, None)?;
        assert_eq!(answers.from("third"), 0);

        // Where all fail, all are tried.
        webs.iter().try_for_each(Container::kill)?;
        black_hole(&third, false)?;
        let start = Instant::now();
        meets(&app, "third")?;
        println!("the only endpoint left was used after {:?}", start.elapsed());
        Ok(())
    }
}

/// A connect that loses a packet is slow but works: with one endpoint, and if all other endpoints are down.
#[test]
fn a_lost_packet_of_a_connect_is_no_failure() -> Result<()> {
    const CONNECTS: usize = 100;
    for others in [0, 1] {
        let host = Host::light()?;
        let server = host.web("server").start()?;
        offer(&host, "web", server.ip()?)?;
        for n in 0..others {
            let closed = host.client(&format!("closed-{n}")).start()?;
            offer(&host, "web", closed.ip()?)?;
        }
        let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
        let embassy = host.embassy(["--dnat", ETCD])?;
        embassy.wait_ready(READY)?;
        meets(&app, "server")?;
        for rule in [
            "add table inet lossy",
            "add chain inet lossy in { type filter hook input priority 0; }",
            "add rule inet lossy in tcp flags & (syn|ack) == syn numgen inc mod 10 == 0 drop",
        ] {
            testbed::output(server.command("nft")?.arg(rule))?;
        }
        let answers = app.get(VIP).times(CONNECTS).at_once(8).run()?;
        assert_eq!((answers.from("server"), answers.failed()), (CONNECTS, 0), "{answers:?}");
        let endpoint = format!("{}:80", server.ip()?);
        let of_server =
            format!("{{discovery=\"etcd\",service=\"/services/web\",endpoint=\"{endpoint}\"}}");
        if others == 0 {
            for name in ["connect_failures", "ejections"] {
                let series = format!("embassy_endpoint_{name}_total{of_server}");
                assert_eq!(metric(&embassy, &series)?, 0, "{series}");
            }
        }
    }
    Ok(())
}

on_each_path! {
    fn an_endpoint_whose_check_fails_loses_its_connections_with_drain_kill(path: proxy | kernel) {
        let host = Host::light()?;
        let server = host.server("server", ["greet", "--name", "server"]).start()?;
        offer(&host, "db", server.ip()?)?;
        let app = host.client("app").env("BACKEND_A", "/services/db;81;check=tcp;drain=kill");
        let app = app.env("BACKEND_B", "/services/db;82;check=tcp");
        let app = app.env("BACKEND_C", "/services/db;83;drain=kill").start()?;
        let embassy = host.embassy(["--dnat", ETCD, &format!("--path={path}")])?;
        embassy.wait_ready(READY)?;
        let hold = |port: u16| -> Result<_> {
            let target = format!("172.17.0.1:{port}");
            let held = app.spawn(&port.to_string(), ["testbed", "peer", "hold", &target, "-n", "3"])?;
            testbed::eventually(WAIT, "the greetings", || {
                ensure!(held.log().contains("\"hello from server\":3"), "{}", held.log());
                Ok(())
            })?;
            Ok(held)
        };
        let (killed, kept, unasked) = (hold(81)?, hold(82)?, hold(83)?);
        let start = Instant::now();
        black_hole(&server, true)?;
        testbed::eventually(WAIT, "the connections to be reset", || {
            // The proxy resets them; the kernel path's are aborted on the spot.
            let log = killed.log();
            let are_cut = |line: &&str| line.contains("\"ended\":\"reset\"") || line.contains("abort");
            let reset = log.lines().filter(are_cut).count();
            ensure!(reset == 3, "{reset} of 3: {}", killed.log());
            Ok(())
        })?;
        println!("clients of a silent server were cut off after {:?}", start.elapsed());
        says(&embassy, &["endpoint check fails", &format!("{}:80", server.ip()?)])?;
        for held in [kept, unasked] {
            ensure!(!held.log().contains("ended"), "{}", held.log());
        }
        let gone = metric(&embassy, "embassy_connections_total{outcome=\"endpoint_gone\"}")?;
        assert_eq!(gone, 3);
        Ok(())
    }
}

#[test]
fn where_all_endpoints_failed_the_first_that_is_back_is_used_at_once() -> Result<()> {
    let host = Host::light()?;
    let server = host.container("server").cmd(["sh", "-c", "while sleep 1; do :; done"]).start()?;
    let other = host.client("other").start()?;
    for each in [&server, &other] {
        offer(&host, "web", each.ip()?)?;
    }
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    // Long enough for ejections of many seconds.
    testbed::eventually(WAIT, "failures", || {
        app.get(VIP).times(20).run()?;
        let outcome = r#"embassy_connections_total{outcome="endpoints_unreachable"}"#;
        let failed = metric(&embassy, outcome)?;
        ensure!(failed >= 200, "{failed}");
        Ok(())
    })?;
    let start = Instant::now();
    server.exec(["sh", "-c", "testbed peer http --name back >/dev/null 2>&1 &"])?;
    testbed::eventually(WAIT, "an answer", || {
        let answers = app.get(VIP).run()?;
        ensure!(answers.from("back") == 1, "{answers:?}");
        Ok(())
    })?;
    println!("the first endpoint of a service that was back was used after {:?}", start.elapsed());
    Ok(())
}

#[test]
fn a_database_that_fails_over_takes_its_clients_along() -> Result<()> {
    const CLIENTS: usize = 50;
    let host = Host::light()?;
    let etcd = host.etcd()?;
    let server = |name: &'static str| host.server(name, ["greet", "--name", name]).start();
    let (old, new) = (server("old")?, server("new")?);
    etcd.v3().put("/services/db/primary", &format!("{}:80", old.ip()?))?;
    let app = host.client("app").env("BACKEND_DB", "/services/db;80;drain=kill").start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    let hold = ["testbed", "peer", "hold", VIP, "-n", &CLIENTS.to_string()];
    let held = app.spawn("clients", hold)?;
    let said = |what: &str, count: usize| {
        testbed::eventually(WAIT, what, || {
            let log = held.log();
            let lines = log.lines().filter(|line| line.contains(what)).count();
            ensure!(lines == count, "{lines} of {count}: {log}");
            Ok(())
        })
    };
    said(&format!("\"hello from old\":{CLIENTS}"), 1)?;
    let start = Instant::now();
    etcd.v3().put("/services/db/primary", &format!("{}:80", new.ip()?))?;
    said("\"ended\":\"reset\"", CLIENTS)?;
    println!("{CLIENTS} clients were cut off {:?} after the failover", start.elapsed());
    let again = app.spawn("again", hold)?;
    testbed::eventually(WAIT, "the new one", || {
        let log = again.log();
        ensure!(log.contains(&format!("\"hello from new\":{CLIENTS}")), "{log}");
        Ok(())
    })
}
