//! `--notrack`: connections between proxy and endpoints are not tracked, all others are.

use anyhow::{Result, ensure};
use testbed::{Container, Embassy, Host};

use crate::{
    READY, WAIT,
    support::{ETCD, offer_at, reaches, says, web},
};

const VIP: &str = "172.17.0.1:80";

struct Site {
    host: Host,
    web: Container,
    app: Container,
}

fn site() -> Result<Site> {
    let host = Host::light()?;
    let web = web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    Ok(Site { host, web, app })
}

impl Site {
    fn embassy(&self) -> Result<Embassy> {
        let embassy = self.host.embassy(["--dnat", "--firewall=nft", "--notrack", ETCD])?;
        embassy.wait_ready(READY)?;
        reaches(&self.app, VIP, "web")?;
        Ok(embassy)
    }

    /// Number of connection tracking entries for connections from the host itself to the endpoint.
    fn tracked(&self) -> Result<usize> {
        let entry = format!("src=172.17.0.1 dst={} ", self.web.ip()?);
        let table = self.host.run("conntrack", ["-L"])?;
        Ok(table.lines().filter(|line| line.contains(&entry) && line.contains("dport=80")).count())
    }
}

#[test]
fn our_connections_to_endpoints_are_not_tracked_and_those_of_others_are() -> Result<()> {
    let site = site()?;
    let embassy = site.embassy()?;
    let before = site.tracked()?;
    let answers = site.app.get(VIP).times(50).at_once(5).run()?;
    assert_eq!((answers.from("web"), site.tracked()?), (50, before));
    // Another program on the host connects to the same endpoint.
    site.host.run("curl", ["-s", "-m", "10", &format!("http://{}/", site.web.ip()?)])?;
    assert_eq!(site.tracked()?, before + 1);
    embassy.terminate()?;
    ensure!(embassy.wait(WAIT)?.success());
    let ruleset = site.host.run("nft", ["list", "ruleset"])?;
    ensure!(!ruleset.contains("notrack"), "{ruleset}");
    Ok(())
}

#[test]
fn where_input_lets_in_only_what_it_knows_connections_are_tracked() -> Result<()> {
    let site = site()?;
    for rule in [
        "add table inet strict",
        "add chain inet strict in { type filter hook input priority 0; policy drop; }",
        "add rule inet strict in iif lo accept",
        "add rule inet strict in ct state established,related accept",
        "add rule inet strict in ct status dnat accept",
        "add rule inet strict in tcp dport 2379 accept",
    ] {
        site.host.run("nft", [rule])?;
    }
    let embassy = site.embassy()?;
    says(&embassy, &["--notrack is refused", "inet strict in"])?;
    let answers = site.app.get(VIP).times(10).run()?;
    assert_eq!(answers.from("web"), 10);
    // The firewall is opened: `--notrack` takes effect without a restart.
    site.host.run("nft", ["delete", "table", "inet", "strict"])?;
    says(&embassy, &["--notrack is in effect again"])?;
    testbed::eventually(WAIT, "a request that is not tracked", || {
        let before = site.tracked()?;
        ensure!(site.app.get(VIP).run()?.from("web") == 1);
        ensure!(site.tracked()? == before, "it is tracked");
        Ok(())
    })
}

/// Without its own proxy, dockerd translates connections to a published port, and reserves the port with a socket on which
/// nothing accepts. An untracked connection would reach this socket and hang.
#[test]
fn a_published_port_that_dockerd_translates_is_reached_at_the_gateway() -> Result<()> {
    let host = Host::builder().docker_args(["--userland-proxy=false"]).start()?;
    host.web("web").arg("--publish=8080:80").start()?;
    offer_at(&host, "web", "172.17.0.1:8080")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let holds = host.run("ss", ["-Hltn", "sport", "=", ":8080"])?;
    ensure!(holds.contains("LISTEN"), "dockerd holds the port: {holds}");
    let embassy =
        host.embassy(["--dnat", "--firewall=nft", "--notrack", "--endpoints=172.17.0.1/32", ETCD])?;
    embassy.wait_ready(READY)?;
    reaches(&app, VIP, "web")?;
    let answers = app.get(VIP).times(30).at_once(3).run()?;
    ensure!(answers.from("web") == 30, "{answers:?}");
    Ok(())
}
