//! The firewall, with each backend: what is captured and what is not, which rules are changed, and what is left.

use anyhow::{Result, ensure};
use testbed::{HOST_ADDRESS, Host, Signal};

use crate::{
    READY, WAIT,
    support::{ETCD, counts, ends, metric, offer_at, reaches, says, web},
};

pub(crate) const NFT: &str = "--firewall=nft";
pub(crate) const NFT_SHARED: &str = "--firewall=nft-shared";
pub(crate) const IPTABLES: &str = "--firewall=iptables";

#[test]
fn dnat_by_nft() -> Result<()> {
    dnat(NFT)
}

#[test]
fn dnat_by_iptables() -> Result<()> {
    dnat(IPTABLES)
}

/// Only the declared ports of consumers are captured, on every VIP. At the end, all other rules are unchanged.
fn dnat(firewall: &str) -> Result<()> {
    let host = Host::builder().ipv6(true).start()?;
    strangers_rules(&host)?;
    web(&host, "web")?;
    let front =
        host.network("front", ["--ipv6", "--subnet=10.81.0.0/24", "--subnet=fd00:81::/64"])?;
    let back = host.network("back", ["--internal"])?;
    let own = |port: &str| {
        let name = format!("host-{port}");
        let words = ["http", "--name", "host", "--port", port];
        host.server(&name, words).network("host").start()
    };
    own("80")?;
    own("7000")?;
    host.web("published").arg("--publish=8080:80").start()?;
    let bystander = host.client("bystander").start()?;
    let app = host
        .client("app")
        .network(front.name())
        .env("BACKEND_WEB", "/services/web;80")
        .env("BACKEND_WEB_TOO", "/services/web;8080")
        .start()?;
    app.connect(back.name())?;
    let before = rules(&host)?;

    let embassy = host.embassy(["--dnat", ETCD, firewall])?;
    embassy.wait_ready(READY)?;
    for vip in
        ["172.17.0.1", "[fd00:d0c::1]", "10.81.0.1", "[fd00:81::1]", &back.gateway()?.to_string()]
    {
        reaches(&app, format!("{vip}:80"), "web")?;
    }
    // A route wins over Docker's own rule for a published port, which still works for all others.
    reaches(&app, "172.17.0.1:8080", "web")?;
    reaches(&bystander, "172.17.0.1:8080", "published")?;
    // The host's own services: on another port, and for others on this port.
    reaches(&app, "172.17.0.1:7000", "host")?;
    reaches(&bystander, "172.17.0.1:80", "host")?;
    // Connections to other addresses than VIPs are not captured.
    let served = metric(&embassy, r#"embassy_connections_total{outcome="closed"}"#)?;
    reaches(&app, "192.168.13.90:80", "host")?;
    assert_eq!(metric(&embassy, r#"embassy_connections_total{outcome="closed"}"#)?, served);
    ends(&app, "172.17.0.1:9999", "refused")?;
    counts(&embassy, "embassy_direct_dials_refused_total", 1)?;
    assert_eq!(metric(&embassy, r#"embassy_connections_total{outcome="direct_dial"}"#)?, 0);
    assert_eq!(metric(&embassy, r#"embassy_connections_total{outcome="unknown_consumer"}"#)?, 0);
    assert_eq!(metric(&embassy, r#"embassy_connections_total{outcome="no_route"}"#)?, 0);

    assert_ne!(rules(&host)?, before);
    embassy.terminate()?;
    assert!(embassy.wait(WAIT)?.success());
    assert_eq!(rules(&host)?, before);
    reaches(&app, "172.17.0.1:80", "host")
}

#[test]
fn all_by_nft() -> Result<()> {
    all(NFT)
}

#[test]
fn all_by_iptables() -> Result<()> {
    all(IPTABLES)
}

/// With `--capture=all`, all connections to a VIP are captured. Those without a route are reset and counted.
fn all(firewall: &str) -> Result<()> {
    let host = Host::start()?;
    web(&host, "web")?;
    host.server("own", ["http", "--name", "host", "--port", "7000"]).network("host").start()?;
    let bystander = host.client("bystander").start()?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let mut embassy = host.embassy_command(["--dnat", ETCD, firewall, "--capture=all"])?;
    embassy.env("IPTABLES_TRACK_TIMEOUT", "77");
    // These two settings are machine-wide: the kernel does not let a namespace change them.
    embassy
        .env("IPTABLES_TRACK_MAX_CONNECTIONS", "1000000")
        .env("IPTABLES_TRACK_HASHSIZE", "100000");
    let embassy = host.embassy_from(embassy)?;
    embassy.wait_ready(READY)?;

    reaches(&app, "172.17.0.1:80", "web")?;
    ends(&app, "172.17.0.1:7000", "reset")?;
    counts(&embassy, r#"embassy_connections_total{outcome="no_route"}"#, 1)?;
    ends(&bystander, "172.17.0.1:80", "reset")?;
    counts(&embassy, r#"embassy_connections_total{outcome="no_route"}"#, 2)?;
    reaches(&bystander, "192.168.13.90:7000", "host")?;

    let timeout = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_time_wait";
    assert_eq!(host.run("cat", [timeout])?, "77");
    says(&embassy, &["cannot write conntrack setting", "nf_conntrack_max"])?;
    says(&embassy, &["cannot write conntrack setting", "hashsize"])
}

#[test]
fn redirect_by_nft() -> Result<()> {
    redirect(NFT)
}

#[test]
fn redirect_by_iptables() -> Result<()> {
    redirect(IPTABLES)
}

/// The host's own connections are captured. embassy's connections to an endpoint are not, even if the endpoint listens on
/// the VIP's address and the captured port.
fn redirect(firewall: &str) -> Result<()> {
    let host = Host::builder().ipv6(true).start()?;
    let web = host
        .web("web")
        .args(["--publish=172.17.0.1:80:80", "--publish=[fd00:d0c::1]:80:80"])
        .start()?;
    offer_at(&host, "web", "172.17.0.1:80")?;
    offer_at(&host, "web6", "[fd00:d0c::1]:80")?;
    strangers_rules(&host)?;
    let before = rules(&host)?;
    let services = "-services=/services/web;80,/services/web6;81,/services/none;82";
    let vips = "--endpoints=172.17.0.1,fd00:d0c::1";
    let embassy =
        host.embassy(["--redirect", "-provider=static", services, ETCD, firewall, vips])?;
    embassy.wait_ready(READY)?;

    let mut served = 0;
    for target in ["172.17.0.1:80", "[fd00:d0c::1]:80", "172.17.0.1:81", "[fd00:d0c::1]:81"] {
        let answer = testbed::eventually(WAIT, &format!("an answer at {target}"), || {
            host.http("GET", &format!("http://{target}/"), "")?.ok()
        })?;
        assert_eq!(answer, "web", "{target}");
        served += 1;
        counts(&embassy, r#"embassy_connections_total{outcome="closed"}"#, served)?;
    }
    // One connection each: none returned to embassy.
    assert_eq!(metric(&embassy, r#"embassy_connections_total{outcome="closed"}"#)?, served);
    assert!(host.http("GET", "http://172.17.0.1:82/", "").is_err());
    counts(&embassy, r#"embassy_connections_total{outcome="no_endpoint"}"#, 1)?;
    // Connections from containers are captured too, as with --dnat, but not those to other addresses.
    assert_eq!(host.http("GET", &format!("http://{}/", web.ip()?), "")?.ok()?, "web");
    assert_eq!(metric(&embassy, r#"embassy_connections_total{outcome="closed"}"#)?, served);
    // Neither are the host's connections to an own address that is not a VIP: a local program answers, or the kernel
    // refuses.
    assert!(host.http("GET", &format!("http://{HOST_ADDRESS}:82/"), "").is_err());
    assert_eq!(metric(&embassy, r#"embassy_connections_total{outcome="no_endpoint"}"#)?, 1);
    embassy.terminate()?;
    assert!(embassy.wait(WAIT)?.success());
    assert_eq!(rules(&host)?, before);

    // embassy's own requests to a registry on a VIP are not captured either, even if a binding has exactly this port.
    let services = "-services=/services/web;83,/services/web;2379";
    let etcd = "-discovery=etcd://172.17.0.1:2379";
    let embassy =
        host.embassy(["--redirect", "-provider=static", services, etcd, firewall, vips])?;
    embassy.wait_ready(READY)?;
    assert_eq!(host.http("GET", "http://172.17.0.1:83/", "")?.ok()?, "web");
    says(&embassy, &["binding not captured", "server=172.17.0.1:2379"])?;
    host.http("GET", "http://172.17.0.1:2379/version", "")?.ok()?;
    embassy.terminate()?;
    assert!(embassy.wait(WAIT)?.success());
    assert_eq!(rules(&host)?, before);

    // Containers also reach embassy's own address, as linked containers do. A discovery at a VIP's address can be asked,
    // although everything that arrives there is captured.
    let app = host.client("app").env("BACKEND_WEB", "/services/web;82").start()?;
    let _own = host.spawn("own", {
        let mut command = host.command(testbed::testbed_program()?);
        command.args(["peer", "http", "--name", "own", "--port", "7000"]);
        command
    })?;
    for scope in ["--capture=declared", "--capture=all"] {
        let etcd = "-discovery=etcd://172.17.0.1:2379";
        let embassy = host.embassy(["--redirect", etcd, scope, firewall, vips])?;
        embassy.wait_ready(READY)?;
        reaches(&app, "172.17.0.1:82", "web")?;
        reaches(&app, format!("{HOST_ADDRESS}:82"), "web")?;
        // Ports that no consumer declared stay the host's: on all its addresses, or on those that are no VIPs.
        reaches(&app, format!("{HOST_ADDRESS}:7000"), "own")?;
        if scope == "--capture=declared" {
            reaches(&app, "172.17.0.1:7000", "own")?;
        }
        embassy.terminate()?;
        assert!(embassy.wait(WAIT)?.success());
        assert_eq!(rules(&host)?, before);
    }
    Ok(())
}

#[test]
fn leftovers_go_at_the_start_and_auto_is_nft() -> Result<()> {
    let host = Host::start()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let before = rules(&host)?;
    let comment = ["-m", "comment", "--comment", "embassy_redirection"];
    let ancestors = ["-t", "nat", "-I", "PREROUTING", "-d", "172.17.42.1", "-p", "tcp"];
    let redirect = ["-j", "REDIRECT", "--to-ports", "9999"];
    host.run("iptables", [&ancestors[..], &comment, &redirect].concat())?;
    for firewall in [NFT_SHARED, IPTABLES] {
        let embassy = host.embassy(["--dnat", ETCD, firewall])?;
        embassy.wait_ready(READY)?;
        assert!(!rules(&host)?.contains("embassy_redirection"));
        embassy.kill()?;
        assert_ne!(rules(&host)?, before);
    }

    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    let now = rules(&host)?;
    assert!(now.contains("table inet embassy") && !now.contains(":EMBASSY "), "{now}");
    reaches(&app, "172.17.0.1:80", "web")?;
    // The other signal that stops it.
    embassy.signal(Signal::INT)?;
    assert!(embassy.wait(WAIT)?.success());
    assert_eq!(rules(&host)?, before);

    // A killed embassy leaves nothing: the kernel removes the rules.
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    embassy.kill()?;
    testbed::eventually(WAIT, "the rules to be gone", || {
        let now = rules(&host)?;
        ensure!(now == before, "{now}");
        Ok(())
    })?;
    ends(&app, "172.17.0.1:80", "refused")
}

#[test]
fn nothing_is_captured_before_the_first_listing() -> Result<()> {
    let host = Host::builder().without_docker().start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    says(&embassy, &["source has not answered yet", "docker"])?;
    assert!(embassy.wait_ready(std::time::Duration::ZERO).is_err());
    assert_eq!(rules(&host)?, "");
    host.docker_daemon().start()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    reaches(&app, "172.17.0.1:80", "web")?;
    says(&embassy, &["embassy captures connections", "firewall=nft", "owned=true"])
}

/// Rules and tables of other programs, in all the places where ours are.
pub(crate) fn strangers_rules(host: &Host) -> Result<()> {
    let script = "
        nft add table inet stranger
        nft add chain inet stranger pre '{ type nat hook prerouting priority -105; policy accept; }'
        nft add rule inet stranger pre ip daddr 172.17.0.1 tcp dport 1 redirect to :9999
        nft add table ip embassy_of_another
        iptables -t nat -N EMBASSY_OF_ANOTHER
        iptables -t nat -A EMBASSY_OF_ANOTHER -p tcp --dport 2 -j REDIRECT --to-ports 9999
        iptables -t nat -I PREROUTING -m comment --comment 'of a stranger' -j EMBASSY_OF_ANOTHER
        ip6tables -t nat -A PREROUTING -p tcp --dport 3 -j ACCEPT
        ip6tables -t nat -A OUTPUT -p tcp --dport 3 -j ACCEPT
        iptables -A FORWARD -m comment --comment embassy -j ACCEPT";
    host.run("sh", ["-ec", script]).map(drop)
}

/// All rules of the host, without counters and times.
pub(crate) fn rules(host: &Host) -> Result<String> {
    let list = |words: &[&str]| host.run(words[0], &words[1..]);
    let nft = list(&["nft", "-s", "list", "ruleset"])?;
    let saved = [list(&["iptables-save"])?, list(&["ip6tables-save"])?].join("\n");
    let saved = saved.lines().filter(|line| !line.starts_with('#'));
    let saved = saved.map(|line| line.split(" [").next().unwrap_or(line));
    let nft = without_flags(&nft);
    Ok([nft.as_str()].into_iter().chain(saved).collect::<Vec<_>>().join("\n").trim().to_owned())
}

/// Without the flags of tables: nft 1.0.6 prints uninitialised memory for `owner`.
fn without_flags(listing: &str) -> String {
    let kept = listing.lines().filter(|line| !line.is_empty() && !line.starts_with("\tflags "));
    let kept = kept.map(|line| line.split(" # progname").next().unwrap_or(line));
    kept.collect::<Vec<_>>().join("\n")
}

/// Only our own rules.
pub(crate) fn ours(host: &Host, firewall: &str) -> Result<String> {
    if firewall != IPTABLES {
        return Ok(without_flags(&host.run("nft", ["-s", "list", "table", "inet", "embassy"])?));
    }
    let all = host.run("iptables-save", ["-t", "nat"])?;
    let first = all.lines().find(|line| line.starts_with("-A PREROUTING")).into_iter();
    let ours = all.lines().filter(|line| line.contains("EMBASSY") && !line.starts_with(':'));
    Ok(first.chain(ours).collect::<Vec<_>>().join("\n"))
}
