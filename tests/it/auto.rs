//! `path=auto`: the kernel path while nothing is in doubt, and the proxy while anything is.

use std::{thread, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use testbed::{Container, Host, embassy_program};

use crate::{
    READY, WAIT,
    kernel_path::{evenly, python, takes, three, with_capabilities},
    support::{ETCD, offer, offer_at, reaches, says, web},
};

/// A rule in a container's own network.
fn rule(container: &Container, rule: &str) -> Result<()> {
    let pid = container.pid()?.to_string();
    let rules = format!(
        "add table inet t; add chain inet t o {{ type filter hook output priority 0; }}; \
         add chain inet t i {{ type filter hook input priority 0; }}; add rule inet t {rule}"
    );
    container.host().run("nsenter", ["-t", &pid, "-n", "nft", &rules])?;
    Ok(())
}

fn no_rule(container: &Container) -> Result<()> {
    let pid = container.pid()?.to_string();
    container.host().run("nsenter", ["-t", &pid, "-n", "nft", "delete table inet t"])?;
    Ok(())
}

#[test]
fn the_kernel_path_is_taken_once_all_is_proved_and_left_while_an_endpoint_is_in_doubt() -> Result<()>
{
    let (host, webs, app) = three()?;
    let _other = host.client("other").env("BACKEND_WEB", "/services/web;80;path=kernel").start()?;
    let embassy = host.embassy(["--dnat", ETCD, "--path=auto"])?;
    embassy.wait_ready(READY)?;
    takes(&embassy, "app", 80, "kernel", "proved")?;
    takes(&embassy, "other", 80, "kernel", "possible")?;
    evenly(&app, 10, 1)?;
    let scraped = embassy.admin("/metrics")?.ok()?;
    for reason in ["proved", "possible"] {
        let series = format!("embassy_routes_by_path{{path=\"kernel\",reason=\"{reason}\"}} 1");
        ensure!(scraped.contains(&series), "no {series}");
    }
    let program = embassy_program()?;
    let said = host.run(program.to_str().context("a path")?, ["status"])?;
    ensure!(said.contains("kernel 2 (possible 1, proved 1)"), "{said}");

    rule(&webs[2], "i tcp dport 80 reject with tcp reset")?;
    let answers = app.get("172.17.0.1:80").times(200).run()?;
    ensure!(answers.failed() <= 1 && answers.from("web-3") == 0, "{answers:?}");
    takes(&embassy, "app", 80, "proxy", "not_reached")?;
    // Another consumer of the service has lost nothing, and is as careful; one that asked for the kernel path is not.
    let late = host.client("late").env("BACKEND_WEB", "/services/web;80").start()?;
    takes(&embassy, "late", 80, "proxy", "not_reached")?;
    takes(&embassy, "other", 80, "kernel", "possible")?;
    let answers = late.get("172.17.0.1:80").times(60).run()?;
    assert_eq!((answers.failed(), answers.from("web-3")), (0, 0), "{answers:?}");

    no_rule(&webs[2])?;
    for name in ["app", "late"] {
        takes(&embassy, name, 80, "kernel", "proved")?;
    }
    evenly(&app, 10, 1)?;
    Ok(())
}

/// The failure of one is the warning of all.
#[test]
fn a_connect_of_one_consumer_that_fails_sends_those_of_all_through_the_proxy() -> Result<()> {
    let (host, webs, app) = three()?;
    let other = host.client("other").env("BACKEND_WEB", "/services/web;80").start()?;
    let embassy = host.embassy(["--dnat", ETCD, "--path=auto"])?;
    embassy.wait_ready(READY)?;
    for name in ["app", "other"] {
        takes(&embassy, name, 80, "kernel", "proved")?;
    }
    rule(&webs[0], "i tcp dport 80 reject with tcp reset")?;
    let answers = app.get("172.17.0.1:80").times(6).run()?;
    ensure!(answers.failed() <= 1 && answers.from("web-1") == 0, "{answers:?}");
    // It has not met the endpoint.
    let answers = other.get("172.17.0.1:80").times(60).run()?;
    assert_eq!((answers.failed(), answers.from("web-1")), (0, 0), "{answers:?}");
    takes(&embassy, "other", 80, "proxy", "unproved")?;
    no_rule(&webs[0])?;
    takes(&embassy, "other", 80, "kernel", "proved")
}

#[test]
fn what_a_consumers_own_network_does_not_reach_goes_through_the_proxy() -> Result<()> {
    let host = Host::light()?;
    let server = web(&host, "web")?;
    let address = server.ip()?;
    // The engine has another network, and this endpoint is in it.
    let network = json!({
        "Id": "0123456789abcdef", "Name": "other", "Driver": "bridge",
        "IPAM": {"Config": [{"Subnet": "172.30.0.0/16"}]}, "Options": {}
    });
    host.fake_engine().context("a light host")?.has_network("0123456789abcdef", network);
    offer_at(&host, "isolated", "172.30.0.5:80")?;
    // A network of the host's own, to which the consumer has a way.
    host.run("sh", ["-c", "ip link add far type bridge && ip addr add 198.51.100.1/24 dev far && ip link set far up"])?;
    offer_at(&host, "far", "198.51.100.9:80")?;
    let app = host
        .client("app")
        .env("BACKEND_A", "/services/web;80")
        .env("BACKEND_B", "/services/isolated;81")
        .env("BACKEND_C", "/services/far;82")
        .start()?;
    rule(&app, &format!("o ip daddr {address} tcp dport 80 reject with tcp reset"))?;
    let embassy = host.embassy(["--dnat", ETCD, "--path=auto"])?;
    embassy.wait_ready(READY)?;
    takes(&embassy, "app", 80, "proxy", "not_reached")?;
    takes(&embassy, "app", 81, "proxy", "isolated")?;
    takes(&embassy, "app", 82, "proxy", "not_reached")?;
    for _ in 0..20 {
        reaches(&app, "172.17.0.1:80", "web")?;
    }
    no_rule(&app)?;
    takes(&embassy, "app", 80, "kernel", "proved")?;
    // Only one that has failed is tried again.
    rule(&app, &format!("o ip daddr {address} tcp dport 80 reject with tcp reset"))?;
    let answers = app.get("172.17.0.1:80").times(20).run()?;
    ensure!(answers.failed() <= 1, "{answers:?}");
    takes(&embassy, "app", 80, "proxy", "not_reached")?;
    Ok(())
}

#[test]
fn without_the_right_to_look_from_inside_the_networks_decide() -> Result<()> {
    let host = Host::light()?;
    let server = web(&host, "web")?;
    host.run("sh", ["-c", "ip link add far type bridge && ip addr add 198.51.100.1/24 dev far && ip link set far up"])?;
    offer_at(&host, "far", "198.51.100.1:80")?;
    let app = host
        .client("app")
        .env("BACKEND_A", "/services/web;80")
        .env("BACKEND_B", "/services/far;81")
        .start()?;
    let embassy = with_capabilities(&host, "+bpf,+net_admin", &["--path=auto"])?;
    embassy.wait_ready(READY)?;
    takes(&embassy, "app", 80, "kernel", "proved")?;
    takes(&embassy, "app", 81, "proxy", "untried")?;
    reaches(&app, "172.17.0.1:80", "web")?;
    // Nobody can say why, and nobody tries it out at the consumer's cost again and again.
    rule(&app, &format!("o ip daddr {} tcp dport 80 drop", server.ip()?))?;
    let answers = app.get("172.17.0.1:80").times(30).run()?;
    ensure!(answers.failed() <= 3, "{answers:?}");
    let log = embassy.log();
    let said =
        log.lines().filter(|line| line.contains("cannot connect from a container's network"));
    assert_eq!(said.count(), 1, "{log}");
    Ok(())
}

/// An endpoint whose network is gone refuses nothing: dials wait in vain.
#[test]
fn an_endpoint_that_vanishes_costs_the_one_that_dials_it_at_that_moment() -> Result<()> {
    let (host, webs, app) = three()?;
    let embassy = host.embassy(["--dnat", ETCD, "--path=auto"])?;
    embassy.wait_ready(READY)?;
    takes(&embassy, "app", 80, "kernel", "proved")?;
    evenly(&app, 10, 1)?;
    webs[2].kill()?;
    let answers = app.get("172.17.0.1:80").times(100).timeout(Duration::from_secs(3)).run()?;
    ensure!(answers.failed() <= 1 && answers.from("web-3") == 0, "{answers:?}");
    assert_eq!(answers.answered() + answers.failed(), 100, "{answers:?}");
    drop(host);
    Ok(())
}

#[test]
fn an_endpoint_that_is_drained_is_in_nobodys_way_and_one_whose_check_fails_is() -> Result<()> {
    let (host, webs, app) = three()?;
    let checked = host.client("checked").env("BACKEND_W", "/services/web;81;check=tcp").start()?;
    let token = host.dir().join("token");
    std::fs::write(&token, "a token")?;
    let token = format!("--admin-token-file={}", token.display());
    let embassy = host.embassy(["--dnat", ETCD, "--path=auto", &token])?;
    embassy.wait_ready(READY)?;
    takes(&embassy, "app", 80, "kernel", "proved")?;
    takes(&embassy, "checked", 81, "kernel", "proved")?;
    let address = webs[1].ip()?;
    let drain = |drained: bool| {
        let body = json!({"service": "/services/web", "endpoint": format!("{address}:80"), "drained": drained});
        let call =
            ["-sf", "-X", "PUT", "-H", "Authorization: Bearer a token", "-d", &body.to_string()];
        host.run("curl", [&call[..], &["http://127.0.0.1:9990/v1/endpoints/drain"]].concat())
    };
    drain(true)?;
    testbed::eventually(WAIT, "the drained endpoint to get nothing", || {
        let answers = app.get("172.17.0.1:80").times(20).run()?;
        assert_eq!(answers.failed(), 0, "{answers:?}");
        ensure!(answers.from("web-2") == 0, "{answers:?}");
        Ok(())
    })?;
    takes(&embassy, "app", 80, "kernel", "proved")?;
    drain(false)?;
    // Nobody dials: the check alone finds out.
    rule(&webs[2], "i tcp dport 80 reject with tcp reset")?;
    for (name, port) in [("app", 80), ("checked", 81)] {
        takes(&embassy, name, port, "proxy", "unproved")?;
    }
    no_rule(&webs[2])?;
    for (name, port) in [("app", 80), ("checked", 81)] {
        takes(&embassy, name, port, "kernel", "proved")?;
    }
    drop(checked);
    Ok(())
}

/// A new endpoint is proved before anybody is sent to it by the kernel.
#[test]
fn a_new_endpoint_that_does_not_answer_yet_costs_nobody_anything() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let embassy = host.embassy(["--dnat", ETCD, "--path=auto"])?;
    embassy.wait_ready(READY)?;
    takes(&embassy, "app", 80, "kernel", "proved")?;
    let second = host.web("second").start()?;
    rule(&second, "i tcp dport 80 drop")?;
    let traffic = app.traffic("traffic", "172.17.0.1:80")?;
    offer(&host, "web", second.ip()?)?;
    takes(&embassy, "app", 80, "proxy", "not_reached")?;
    no_rule(&second)?;
    takes(&embassy, "app", 80, "kernel", "proved")?;
    let answers = traffic.stop()?;
    assert_eq!(answers.failed(), 0, "{answers:?}");
    ensure!(answers.answered() > 0, "{answers:?}");
    says(&embassy, &["the kernel path is ready"])
}

/// 200 connections, 50 a second, each in a thread of its own, and what became of them.
const DIALS: &str = r#"
import json, socket, threading, time
failed = []
def dial():
    start = time.monotonic()
    try:
        with socket.create_connection(("172.17.0.1", 80), 10) as s:
            s.settimeout(10)
            s.sendall(b"GET / HTTP/1.0\r\n\r\n")
            if not s.recv(4096):
                failed.append("closed")
    except OSError as e:
        failed.append(type(e).__name__)
threads = []
begin = time.monotonic()
for n in range(200):
    time.sleep(max(0, begin + n * 0.02 - time.monotonic()))
    threads.append(threading.Thread(target=dial))
    threads[-1].start()
for thread in threads:
    thread.join()
print(json.dumps({"failed": len(failed), "how": sorted(set(failed))}))
"#;

/// What an endpoint that dies costs on each path:
/// `cargo test --test it figures_of_an_endpoint_that_dies -- --ignored --nocapture`.
#[test]
#[ignore = "it measures"]
fn figures_of_an_endpoint_that_dies() -> Result<()> {
    for how in ["killed", "process killed", "silent"] {
        for path in ["proxy", "kernel", "auto"] {
            let host = Host::light()?;
            let mut webs = Vec::new();
            for name in ["web-1", "web-2", "web-3"] {
                let serve = format!("testbed peer http --name {name} --port 80 & wait; sleep 1000");
                let web = host.container(name).cmd(["sh", "-c", &serve]).start()?;
                offer(&host, "web", web.ip()?)?;
                webs.push(web);
            }
            let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
            let embassy = host.embassy(["--dnat", ETCD, &format!("--path={path}")])?;
            embassy.wait_ready(READY)?;
            let (taken, reason) = match path {
                "proxy" => ("proxy", "not_asked"),
                "kernel" => ("kernel", "possible"),
                _ => ("kernel", "proved"),
            };
            takes(&embassy, "app", 80, taken, reason)?;
            evenly(&app, 3, 1)?;
            let said = thread::scope(|scope| {
                let dials = scope.spawn(|| python(&app, DIALS));
                thread::sleep(Duration::from_secs(1));
                match how {
                    "killed" => webs[2].kill()?,
                    "process killed" => drop(webs[2].exec(["pkill", "-9", "-x", "testbed"])?),
                    _ => rule(&webs[2], "i drop")?,
                }
                dials.join().expect("it does not panic")
            })?;
            println!("{how:16} {path:8} {said}");
        }
    }
    Ok(())
}
