//! The three ways to run embassy, with the command lines of the original's documentation. Only addresses differ.

use std::fs;

use anyhow::{Context, Result, ensure};
use testbed::{Container, HOST_ADDRESS, Host, embassy_program};

use crate::{READY, WAIT, support::reaches};

/// docker0's address in former times.
const PROXY_IP: &str = "172.17.42.1";

/// A host whose Consul has three services, each with one web server that answers with the service's name.
fn host() -> Result<Host> {
    let host = Host::builder().docker_args([format!("--bip={PROXY_IP}/16")]).start()?;
    let consul = host.consul()?;
    for service in ["frontend_http", "mysql", "redis"] {
        let web = host.web(service).start()?;
        consul.service(service, service).address(web.ip()?).port(80).register()?;
    }
    Ok(host)
}

#[test]
fn on_the_docker_host() -> Result<()> {
    let host = host()?;
    let app = host.client("app").env("BACKEND_APACHE_80", "frontend_http;80").start()?;
    let mut embassy = host.embassy_command([
        "--dnat",
        "-provider=docker",
        "-v=3",
        "-interface=eth0",
        "-discovery=consul://127.0.0.1:8500",
    ])?;
    embassy.env("PROXY_IP", PROXY_IP).env("PROXY_PORT", "9999");
    let embassy = host.embassy_from(embassy)?;
    embassy.wait_ready(READY)?;
    reaches(&app, PROXY_IP, "frontend_http")?;
    embassy.terminate()?;
    assert!(embassy.wait(WAIT)?.success());
    Ok(())
}

#[test]
fn on_the_docker_host_with_a_rule_of_ones_own() -> Result<()> {
    let host = host()?;
    let redis = host.web("redis-in-etcd").start()?;
    host.etcd()?.v2().put("/services/prod/redis.master/1", &format!("{}:80", redis.ip()?))?;
    let app = host
        .client("app")
        .env("BACKEND_REDIS_SERVICE", "/services/prod/redis.master;6379")
        .start()?;
    let iptables = |action: &str, target: &[&str]| {
        let rule = ["-t", "nat", action, "PREROUTING", "-p", "tcp", "-d", PROXY_IP];
        host.run("iptables", [&rule[..], target].concat())
    };
    let to = format!("{HOST_ADDRESS}:3232");
    let cases = [
        (&["-interface", "eth0", "-p=3232"], &["-j", "DNAT", "--to-destination", &to]),
        (&["-interface", "docker0", "-p=3232"], &["-j", "REDIRECT", "--to-ports", "3232"]),
    ];
    for (words, rule) in cases {
        iptables("-I", rule)?;
        let etcd = ["-discovery", "etcd://127.0.0.1:2379", "-v=0"];
        let embassy = host.embassy([&words[..], &etcd].concat())?;
        embassy.wait_ready(READY)?;
        reaches(&app, format!("{PROXY_IP}:6379"), "redis-in-etcd")?;
        embassy.terminate()?;
        embassy.wait(WAIT)?;
        // The rule is the user's: it is still there to be deleted.
        iptables("-D", rule)?;
    }
    Ok(())
}

#[test]
fn inside_the_container_along_with_the_service() -> Result<()> {
    let host = host()?;
    let app = host.client("app").start()?;
    let discovery = format!("-discovery=consul://{HOST_ADDRESS}:8500");
    let embassy = |name: &str, more: &[&str]| {
        let mut command = app.command(embassy_program()?)?;
        command.arg(&discovery).arg("-provider=static");
        command.arg("-services=frontend_http;80,mysql;3306,redis;6563").args(more);
        command.env("PROXY_IP", PROXY_IP);
        let process = host.spawn(name, command)?;
        ready(&app)?;
        anyhow::Ok(process)
    };
    let served = || {
        reaches(&app, PROXY_IP, "frontend_http")?;
        reaches(&app, format!("{PROXY_IP}:3306"), "mysql")?;
        reaches(&app, format!("{PROXY_IP}:6563"), "redis")
    };
    let own = embassy("redirect", &["--redirect"])?;
    served()?;
    own.signal(testbed::Signal::TERM)?;
    assert!(own.wait(WAIT)?.success());

    let mut rule = app.command("iptables")?;
    rule.args(["-t", "nat", "-I", "OUTPUT", "-p", "tcp", "-d", PROXY_IP]);
    testbed::output(rule.args(["-j", "REDIRECT", "--to-ports", "9999"]))?;
    let _theirs = embassy("own-rule", &[])?;
    served()
}

#[test]
fn in_a_container_that_others_are_linked_to() -> Result<()> {
    let host = host()?;
    // The image contains no firewall program, and needs none.
    host.image_with("embassy", &[embassy_program()?], &[])?;
    let discovery = format!("-discovery=consul://{HOST_ADDRESS}:8500");
    let embassy = host
        .container("embassy")
        .image("embassy")
        .args(["--cap-add=NET_ADMIN", "--stop-signal=TERM"])
        .env("PROXY_IP", PROXY_IP)
        .env("PROXY_PORT", "9999")
        .arg("--volume=/var/run/docker.sock:/var/run/docker.sock")
        .cmd(["--redirect", "-provider=docker", "-v=3", "-interface=eth0", &discovery])
        .start()?;
    let app = host
        .client("app")
        .arg("--link=embassy:proxy")
        .env("BACKEND_FRONTEND", "frontend_http;80")
        .start()?;
    let served = reaches(&app, "proxy:80", "frontend_http");
    served.with_context(|| embassy.log().unwrap_or_default())?;
    reaches(&app, embassy.ip()?, "frontend_http")?;
    // On a second network it is reached at its address there, whichever of the two is eth0.
    let back = host.network("back", ["--subnet=10.84.0.0/24"])?;
    embassy.connect(back.name())?;
    host.docker(["restart", "embassy"])?;
    let far = host.client("far").network(back.name());
    let far = far.env("BACKEND_FRONTEND", "frontend_http;80").start()?;
    reaches(&far, embassy.ip_on(back.name())?, "frontend_http")?;
    reaches(&app, embassy.ip_on("bridge")?, "frontend_http")?;
    embassy.stop()?;
    assert_eq!(embassy.inspect("{{.State.ExitCode}}")?, "0", "{}", embassy.log()?);
    Ok(())
}

/// A network namespace whose interfaces, including loopback, have only IPv6 addresses.
#[test]
fn on_a_host_without_ipv4() -> Result<()> {
    const VIP: &str = "fd00:99::1";
    let host = Host::builder().without_docker().start()?;
    let addresses = format!(
        "ip link set lo up; ip -4 addr flush dev lo
         ip link add six type bridge; ip link set six up
         ip addr add {VIP}/64 dev six nodad; ip addr add fd00:99::2/64 dev six nodad"
    );
    host.run("sh", ["-euc", &addresses])?;
    let file = host.dir().join("services.toml");
    fs::write(&file, "[[service]]\nname = \"web\"\nendpoints = [\"[fd00:99::2]:8080\"]\n")?;
    let mut web = host.command(testbed::testbed_program()?);
    web.args(["peer", "http", "--name", "web", "--port", "8080"]);
    let _web = host.spawn("web", web)?;
    let embassy = host.embassy_command([
        "--redirect",
        "-provider=static",
        "-services=web;80",
        "-interface=six",
        "--admin=[::1]:9990",
        &format!("--proxy-ip={VIP}"),
        &format!("-discovery=file://{}", file.display()),
    ])?;
    let embassy = host.embassy_from(embassy)?;
    let get = |url: &str| host.run("curl", ["--silent", "--fail", "--globoff", url]);
    testbed::eventually(READY, "embassy to be ready", || get("http://[::1]:9990/readyz"))?;
    testbed::eventually(WAIT, "an answer", || {
        let answer = get(&format!("http://[{VIP}]/"))?;
        ensure!(answer.trim() == "web", "{answer}");
        Ok(())
    })?;
    let connections = get("http://[::1]:9990/v1/routes")?;
    ensure!(connections.contains(VIP), "{connections}");
    embassy.terminate()?;
    assert_eq!(embassy.wait(WAIT)?.code(), Some(0), "{}", embassy.log());
    Ok(())
}

/// Waits until the embassy in a container's network is ready.
fn ready(container: &Container) -> Result<()> {
    testbed::eventually(READY, "embassy to be ready", || {
        container.exec(["curl", "--silent", "--fail", "http://127.0.0.1:9990/readyz"]).map(drop)
    })
}
