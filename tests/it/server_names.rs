//! Registries are found by name: by the hosts file and by DNS.

use std::time::Duration;

use anyhow::{Result, ensure};
use testbed::{Host, eventually};

use crate::{READY, support::own_rules};

const WAIT: Duration = Duration::from_secs(60);

#[test]
fn registries_are_found_by_their_names() -> Result<()> {
    let host = Host::builder().without_docker().start()?;
    host.consul()?.service("web-1", "web").address("10.9.0.1").port(80).register()?;
    host.etcd()?.v3().put("/services/db/one", "10.9.0.2:81")?;
    host.run("sh", ["-euc", "echo 127.0.0.1 registry-by-file.test >> /etc/hosts"])?;
    // For the other family there is only an error, as from many routers.
    let mut dns = host.command("/usr/sbin/dnsmasq");
    dns.args(["--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts"])
        .args(["--pid-file=", "--user=root", "--log-facility=-", "--log-queries"])
        .args(["--listen-address=127.0.0.1", "--bind-interfaces"])
        .arg("--address=/registry-by-dns.test/127.0.0.1");
    dns.arg("--local=/unknown.test/");
    let dns = host.spawn("dns", dns)?;
    own_rules(&host)?;
    let embassy = host.embassy([
        "-provider=static",
        "-services=web;80;via=consul,/services/db;81;via=etcd",
        "-discovery=consul://registry-by-dns.test:8500",
        "-discovery=etcd://registry-by-file.test:2379",
        "--state-dir=off",
    ])?;
    embassy.wait_ready(READY)?;
    eventually(WAIT, "the endpoints of both", || {
        let status = embassy.admin("/v1/status")?.json()?;
        ensure!(status["endpoints"] == 2, "{status}");
        Ok(())
    })?;
    ensure!(dns.log().contains("registry-by-dns.test"), "{}", dns.log());

    let lost = host.embassy([
        "-provider=static",
        "-services=web;80",
        "-discovery=consul://unknown.test:8500",
        "--state-dir=off",
        "-port=9998",
        "--admin=127.0.0.1:9991",
    ])?;
    eventually(WAIT, "the name that is not found", || {
        let log = lost.log();
        ensure!(log.contains("\"unknown.test\" has no address in DNS"), "{log}");
        Ok(())
    })
}
