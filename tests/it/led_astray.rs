//! A registry that contains addresses which only this host can reach.

use anyhow::{Result, ensure};
use testbed::{Embassy, Host};

use crate::{
    READY, WAIT,
    commands::run,
    support::{ETCD, ends, metric, offer_at, reaches, says, web},
};

const VIP: &str = "172.17.0.1:80";

/// Endpoints that must not be used: only the host could reach them.
const FORBIDDEN: [&str; 7] = [
    "127.0.0.1:7070",
    "[::ffff:127.0.0.1]:7070",
    "0.0.0.0:7070",
    "169.254.169.254:80",
    "[fe80::1]:80",
    "172.17.0.1:7070",
    "172.17.0.1:9999",
];
/// 127.0.0.1 is listed in two forms, and 0.0.0.0 is not accepted as an endpoint at all.
const REFUSED: u64 = FORBIDDEN.len() as u64 - 2;

/// Waits until embassy has a route, and refuses this many endpoints.
fn refuses(embassy: &Embassy, count: u64) -> Result<()> {
    testbed::eventually(WAIT, &format!("{count} endpoints to be refused"), || {
        let refused = metric(embassy, "embassy_endpoints_refused")?;
        ensure!(refused == count && metric(embassy, "embassy_routes")? > 0, "{refused} are");
        Ok(())
    })
}

#[test]
fn a_registry_cannot_lead_consumers_to_what_only_the_host_reaches() -> Result<()> {
    let host = Host::light()?;
    // On all addresses of the host, including refused ones.
    let mut secret = host.command(testbed::embassy_program()?.with_file_name("testbed"));
    secret.args(["peer", "http", "--port", "7070", "--name", "secret"]);
    let _secret = host.spawn("secret", secret)?;
    FORBIDDEN.iter().try_for_each(|endpoint| offer_at(&host, "bad", endpoint))?;
    FORBIDDEN.iter().try_for_each(|endpoint| offer_at(&host, "mixed", endpoint))?;
    let good = web(&host, "good")?;
    offer_at(&host, "mixed", &format!("{}:80", good.ip()?))?;
    let app = host.client("app").env("BACKEND_BAD", "/services/bad;81");
    let app = app.env("BACKEND_MIXED", "/services/mixed;80").start()?;

    let flags = ["--dnat", "--state-dir=state", ETCD];
    let embassy = host.embassy(flags)?;
    embassy.wait_ready(READY)?;
    refuses(&embassy, 2 * REFUSED)?;
    for _ in 0..2 * FORBIDDEN.len() {
        reaches(&app, VIP, "good")?;
    }
    ends(&app, "172.17.0.1:81", "reset")?;
    says(&embassy, &["endpoint refused", "/services/bad", "127.0.0.1:7070", "loopback"])?;
    let (text, code) = run(&host, &["explain", "app", "81"])?;
    assert_eq!(code, Some(1), "{text}");
    for part in
        ["No endpoint of etcd /services/bad may be used", "metadata service", "?loopback=allow"]
    {
        assert!(text.contains(part), "{part:?} in {text}");
    }
    let (text, code) = run(&host, &["explain", "app", "80"])?;
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("169.254.169.254:80"), "{text}");
    let (text, _) = run(&host, &["status"])?;
    assert!(text.contains("172.17.0.1:9999"), "{text}");
    Ok(())
}

#[test]
fn what_is_refused_can_be_allowed_and_the_rest_narrowed() -> Result<()> {
    let host = Host::light()?;
    let mut local = host.command(testbed::embassy_program()?.with_file_name("testbed"));
    local.args(["peer", "http", "--port", "7070", "--name", "local"]);
    let _local = host.spawn("local", local)?;
    offer_at(&host, "local", "127.0.0.1:7070")?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_LOCAL", "/services/local;81");
    let app = app.env("BACKEND_WEB", "/services/web;80").start()?;
    {
        let allowed = format!("{ETCD}?loopback=allow");
        let embassy = host.embassy(["--dnat", &allowed])?;
        embassy.wait_ready(READY)?;
        reaches(&app, "172.17.0.1:81", "local")?;
        reaches(&app, VIP, "web")?;
        assert_eq!(metric(&embassy, "embassy_endpoints_refused")?, 0);
    }
    let embassy = host.embassy(["--dnat", "--endpoints=10.0.0.0/8,127.0.0.1", ETCD])?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:81", "local")?;
    ends(&app, VIP, "reset")?;
    says(&embassy, &["endpoint refused", "/services/web", "--endpoints"])
}

/// Two services whose endpoints are each other's VIP and port, and one whose endpoint is its own.
#[test]
fn services_that_lead_to_each_others_vip_do_not_loop() -> Result<()> {
    let host = Host::light()?;
    offer_at(&host, "a", "172.17.0.1:82")?;
    offer_at(&host, "b", "172.17.0.1:81")?;
    let app = host.client("app").env("BACKEND_A", "/services/a;81");
    let app = app.env("BACKEND_B", "/services/b;82").start()?;
    // The first refuses VIPs. The others allow this one, and capture the host's own connections too.
    for flags in [
        &["--dnat"][..],
        &["--dnat", "--endpoints=172.17.0.1"],
        &["--redirect", "--interface=docker0", "--endpoints=172.17.0.1"],
    ] {
        let flags = flags.iter().chain(&[ETCD, "--state-dir=off"]);
        let embassy = host.embassy(flags)?;
        embassy.wait_ready(READY)?;
        for _ in 0..5 {
            for port in [81, 82] {
                let probe = app.probe(format_args!("172.17.0.1:{port}"))?;
                assert_eq!(probe.outcome, "reset", "{probe:?}");
            }
        }
        // Each of the ten was one connection, and caused no further one.
        let started = metric(&embassy, "embassy_connections_started_total")?;
        assert_eq!(started, 10, "{}", embassy.log());
    }
    Ok(())
}
