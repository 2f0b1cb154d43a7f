//! etcd and Consul of a host.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use testbed::{Host, eventually};

const DEADLINE: Duration = Duration::from_secs(20);

#[test]
fn etcd_answers_by_both_apis() -> Result<()> {
    let host = Host::builder().without_docker().start()?;
    let etcd = host.etcd()?;

    etcd.v2().mkdir("/services/empty")?;
    etcd.v2().put("/services/web/1", "{\"port\": \"80\"}&x=1")?;
    etcd.v2().put_for("/services/web/2", "short", 1)?;
    let values = || -> Result<Vec<String>> {
        let node = etcd.v2().get("/services/web")?;
        let nodes = node["nodes"].as_array().cloned().unwrap_or_default();
        Ok(nodes.iter().filter_map(|node| node["value"].as_str().map(str::to_owned)).collect())
    };
    assert!(values()?.contains(&"{\"port\": \"80\"}&x=1".to_owned()), "{:?}", values()?);
    eventually(DEADLINE, "the short-lived key to expire", || {
        ensure!(values()?.len() == 1, "{:?}", values()?);
        Ok(())
    })?;
    etcd.v2().delete("/services/web/1")?;
    etcd.v2().delete_all("/services")?;
    assert!(etcd.v2().get("/services").is_err());

    etcd.v3().put("/services/web/1", "-x")?;
    let lease = etcd.v3().put_for("/services/web/2", "short", 60)?;
    assert_eq!(etcd.v3().get("/services/web/1")?, "-x");
    assert_eq!(etcd.v3().get("/services/web/2")?, "short");
    etcd.v3().revoke(&lease)?;
    assert_eq!(etcd.v3().get("/services/web/2")?, "");
    etcd.v3().compact()?;
    etcd.v3().delete_all("/services")?;
    assert_eq!(etcd.v3().get("/services/web/1")?, "");
    Ok(())
}

#[test]
fn etcd_keeps_its_keys_when_it_is_killed() -> Result<()> {
    let host = Host::builder().without_docker().start()?;
    let etcd = host.etcd()?;
    etcd.v3().put("key", "value")?;
    host.etcd_daemon().kill()?;
    assert!(host.etcd()?.v2().get("/").is_err(), "what a test has killed stays down");
    host.etcd_daemon().start()?;
    assert_eq!(etcd.v3().get("key")?, "value");
    Ok(())
}

#[test]
fn consul_has_services_with_checks() -> Result<()> {
    let host = Host::builder().without_docker().start()?;
    let consul = host.consul()?;
    consul
        .service("web-1", "web")
        .address("10.0.0.1")
        .port(80)
        .tags(["prod"])
        .check("passing")
        .register()?;
    consul.service("web-2", "web").port(8080).check("critical").register()?;
    let passing = |expected: &[&str]| {
        eventually(DEADLINE, "the passing instances", || {
            let found = consul.passing("web")?;
            ensure!(found == expected, "they are {found:?}");
            Ok(())
        })
    };
    passing(&["10.0.0.1:80"])?;
    consul.set_check("web-2", "passing")?;
    passing(&["10.0.0.1:80", &format!("{}:8080", testbed::HOST_ADDRESS)])?;
    consul.maintenance("web-2", true)?;
    passing(&["10.0.0.1:80"])?;
    consul.node_maintenance(true)?;
    passing(&[])?;
    consul.node_maintenance(false)?;
    consul.maintenance("web-2", false)?;
    consul.deregister("web-1")?;
    passing(&[&format!("{}:8080", testbed::HOST_ADDRESS)])?;

    let tcp = json!({ "TCP": "127.0.0.1:8500", "Interval": "1s" });
    consul.service("self", "web").address("127.0.0.1").port(8500).active_check(tcp).register()?;
    passing(&["127.0.0.1:8500", &format!("{}:8080", testbed::HOST_ADDRESS)])
}

#[test]
fn a_paused_registry_does_not_answer() -> Result<()> {
    let host = Host::builder().without_docker().start()?;
    host.consul()?;
    host.consul_daemon().pause()?;
    let silent =
        host.run("curl", ["--silent", "--max-time", "1", "http://127.0.0.1:8500/v1/status/leader"]);
    assert!(silent.is_err(), "{silent:?}");
    host.consul_daemon().resume()?;
    host.consul()?.get("/v1/catalog/services")?;
    Ok(())
}
