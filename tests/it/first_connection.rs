//! A container connects as its first act, which may be before the engine reports it.

use anyhow::{Context, Result, ensure};
use testbed::Host;

use crate::{READY, support::restored};

/// The number of containers to start. Each connects once, immediately. `RUNS=200` takes minutes.
fn runs() -> Result<usize> {
    let wanted = std::env::var("RUNS").ok();
    wanted.map_or(Ok(20), |text| text.parse().context("RUNS takes a number"))
}

#[test]
fn a_container_whose_first_act_is_to_dial_is_served_by_nft() -> Result<()> {
    first_act("nft")
}

#[test]
fn a_container_whose_first_act_is_to_dial_is_served_by_iptables() -> Result<()> {
    first_act("iptables")
}

fn first_act(firewall: &str) -> Result<()> {
    let host = Host::start()?;
    host.web("web").label("SERVICE_80_NAME", "web").start()?;
    // The host's own server on the VIP: containers that did not declare its port reach it.
    let _own = host.spawn("own", {
        let mut command = host.command(testbed::testbed_program()?);
        command.args(["peer", "http", "--name", "own", "--port", "8000"]);
        command
    })?;
    host.server("sink", ["sink", "--port", "80"]).label("SERVICE_80_NAME", "sink").start()?;
    let embassy = host.embassy(["--dnat", "-discovery=docker://", "--firewall", firewall])?;
    embassy.wait_ready(READY)?;

    let run = |binding: &str, url: &str| {
        let mut docker = host.docker_command(["run", "--rm", "-e", binding, "testbed"]);
        docker.args(["curl", "-s", "-m", "10", url]);
        testbed::output(&mut docker)
    };
    for n in 0..runs()? {
        // It sends everything and ends its direction before it can be known, as `printf ... | nc -N` does.
        let mut docker = host.docker_command(["run", "--rm", "-e", "BACKEND_SINK=sink;8082"]);
        docker.args(["testbed", "testbed", "peer", "send", "172.17.0.1:8082", "--bytes", "10"]);
        let said: serde_json::Value = serde_json::from_str(&testbed::output(&mut docker)?)?;
        let answer = said["answer"].as_str().unwrap_or_default();
        ensure!(answer.starts_with("10 "), "run {n}: {said}");
        let said = run("BACKEND_WEB=web;8080", "http://172.17.0.1:8080/")?;
        ensure!(said.trim() == "web", "run {n}: {said:?}");
    }
    let said = run("BACKEND_WEB=web;8080", "http://172.17.0.1:8000/")?;
    ensure!(said.trim() == "own", "the host's own server: {said:?}");

    // The container did not declare this port: reset as soon as the container is known.
    let refused = run("BACKEND_WEB=web;8080", "http://172.17.0.1:8081/");
    ensure!(refused.is_err(), "{refused:?}");
    ensure!(restored(&embassy)? == 0, "nobody touched our rules");
    Ok(())
}

#[test]
fn the_first_container_of_a_network_is_served_when_its_first_act_is_to_dial() -> Result<()> {
    let host = Host::start()?;
    host.web("web").label("SERVICE_80_NAME", "web").start()?;
    let embassy = host.embassy(["--dnat", "-discovery=docker://"])?;
    embassy.wait_ready(READY)?;
    for n in 0..runs()?.min(60) {
        let name = format!("net-{n}");
        let net = host.network(&name, [format!("--subnet=10.90.{n}.0/24")])?;
        let run = |binding: &str| {
            let network = format!("--network={name}");
            let mut docker = host.docker_command(["run", "--rm", "-e", binding, &network]);
            let url = format!("http://{}:8080/", net.gateway()?);
            docker.args(["testbed", "curl", "-s", "-m", "10", &url]);
            testbed::output(&mut docker)
        };
        let said = run("BACKEND_WEB=web;8080")?;
        ensure!(said.trim() == "web", "run {n}: {said:?}");
        ensure!(run("NOTHING=web").is_err(), "who asks for nothing is served nothing");
        net.remove()?;
    }
    Ok(())
}

#[test]
fn a_published_port_is_reached_by_nft_whoever_holds_it() -> Result<()> {
    published("nft")
}

#[test]
fn a_published_port_is_reached_by_iptables_whoever_holds_it() -> Result<()> {
    published("iptables")
}

/// Even without its userland proxy, the engine reserves the ports that it publishes: an unknown container's connection to
/// one is Docker's.
fn published(firewall: &str) -> Result<()> {
    let host = Host::builder().docker_args(["--userland-proxy=false"]).start()?;
    host.web("published").arg("--publish=8080:80").start()?;
    let embassy = host.embassy(["--dnat", "-discovery=docker://", "--firewall", firewall])?;
    embassy.wait_ready(READY)?;
    for n in 0..runs()? {
        let mut docker = host.docker_command(["run", "--rm", "testbed"]);
        docker.args(["curl", "-s", "-m", "10", "http://172.17.0.1:8080/"]);
        let said = testbed::output(&mut docker)?;
        ensure!(said.trim() == "published", "run {n}: {said:?}");
    }
    Ok(())
}
