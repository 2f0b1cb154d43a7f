//! Connections of the kernel path that embassy ends, as the proxy ends its own.

use anyhow::{Context, Result, ensure};
use testbed::{Container, Host, Process};

use crate::{
    READY, WAIT,
    kernel_path::{takes, with_capabilities},
    support::{ETCD, counts, metric, offer, reaches, says, web},
};

/// A connection that is open, and says when and how it ends.
fn open(app: &Container, name: &str, port: u16) -> Result<Process> {
    let program = format!(
        r#"
import socket
s = socket.create_connection(("172.17.0.1", {port}))
s.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
print("open", s.recv(4096).split(b"\r\n\r\n")[-1].decode(), flush=True)
try:
    print("end", s.recv(1), flush=True)
except OSError as e:
    print("end", type(e).__name__, flush=True)
"#
    );
    let process = app.spawn(name, ["python3", "-uc", &program])?;
    testbed::eventually(WAIT, "an open connection", || {
        ensure!(process.log().contains("open "), "{}", process.log());
        Ok(())
    })?;
    Ok(process)
}

fn is_aborted(process: &Process) -> Result<()> {
    testbed::eventually(WAIT, "the connection to be aborted", || {
        ensure!(process.log().contains("end ConnectionAbortedError"), "{}", process.log());
        Ok(())
    })
}

fn series(port: u16, outcome: &str) -> String {
    format!(
        "embassy_route_connections_total{{consumer=\"app\",service=\"/services/web\",port=\"{port}\",protocol=\"tcp\",outcome=\"{outcome}\"}}"
    )
}

#[test]
fn with_a_drain_connections_to_an_endpoint_that_is_gone_are_ended_and_no_others() -> Result<()> {
    let host = Host::light()?;
    let first = web(&host, "web")?;
    let app = host
        .client("app")
        .env("BACKEND_KILL", "/services/web;80;drain=kill")
        .env("BACKEND_KEEP", "/services/web;81")
        .env("BACKEND_LATER", "/services/web;82;drain=1")
        .start()?;
    let flags = ["--dnat", ETCD, "--path=kernel", "--connection-log=all", "--empty-hold=0"];
    let embassy = host.embassy(flags)?;
    embassy.wait_ready(READY)?;
    for port in [80, 81, 82] {
        takes(&embassy, "app", port, "kernel", "possible")?;
    }
    let killed = open(&app, "killed", 80)?;
    let kept = open(&app, "kept", 81)?;
    let drained = open(&app, "drained", 82)?;
    // A connection to the same endpoint that nobody redirected.
    let direct = app.spawn(
        "direct",
        ["python3", "-uc", &format!("import socket; s = socket.create_connection(('{}', 80)); print('open', flush=True); print('end', s.recv(1))", first.ip()?)],
    )?;
    testbed::eventually(WAIT, "a direct connection", || {
        ensure!(direct.log().contains("open"), "{}", direct.log());
        Ok(())
    })?;
    let second = host.web("second").start()?;
    offer(&host, "web", second.ip()?)?;
    reaches(&app, "172.17.0.1:80", "second")?;
    // In turn: one of two gets there.
    let others = [open(&app, "other-1", 80)?, open(&app, "other-2", 80)?];
    let to_second = others.iter().find(|one| one.log().contains("open second"));
    let to_second = to_second.context("no connection to the second")?;
    host.etcd()?.v3().delete(&format!("/services/web/{}:80", first.ip()?))?;
    is_aborted(&killed)?;
    is_aborted(&drained)?;
    counts(&embassy, &series(80, "endpoint_gone"), 2)?;
    counts(&embassy, &series(82, "endpoint_gone"), 1)?;
    says(&embassy, &["connection", "path=\"kernel\"", "outcome=\"endpoint_gone\""])?;
    for live in [&kept, &direct, to_second] {
        ensure!(!live.log().contains("end"), "{}", live.log());
    }
    assert_eq!(metric(&embassy, &series(81, "endpoint_gone"))?, 0);
    assert_eq!(metric(&embassy, &series(80, "reset"))?, 0, "it was embassy that ended it");
    // An end by embassy says nothing of the endpoint.
    ensure!(!embassy.log().contains("endpoint ejected"), "{}", embassy.log());
    Ok(())
}

#[test]
fn connections_of_a_route_that_is_gone_are_ended_while_its_container_lives() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let embassy = host.embassy(["--dnat", ETCD, "--path=auto", "--connection-log=all"])?;
    embassy.wait_ready(READY)?;
    takes(&embassy, "app", 80, "kernel", "proved")?;
    let live = open(&app, "live", 80)?;
    // The engine gives another container the same address: nobody is served until it is clear whose it is.
    let engine = host.fake_engine().context("a light host")?;
    engine.has("thief", &app.ip()?.to_string());
    engine.tells("start", "thief");
    is_aborted(&live)?;
    says(&embassy, &["connection", "path=\"kernel\"", "outcome=\"route_gone\""])
}

#[test]
fn without_the_right_to_end_connections_a_drain_goes_through_the_proxy() -> Result<()> {
    let host = Host::light()?;
    let server = web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80;drain=kill").start()?;
    let embassy =
        with_capabilities(&host, "+bpf,+net_admin", &["--path=kernel", "--empty-hold=0"])?;
    embassy.wait_ready(READY)?;
    takes(&embassy, "app", 80, "proxy", "drain")?;
    let live = open(&app, "live", 80)?;
    host.etcd()?.v3().delete(&format!("/services/web/{}:80", server.ip()?))?;
    testbed::eventually(WAIT, "the connection to be reset", || {
        ensure!(live.log().contains("end ConnectionResetError"), "{}", live.log());
        Ok(())
    })
}

/// What a container that has more than the two capabilities can do.
#[test]
fn four_capabilities_are_enough_to_end_connections() -> Result<()> {
    let host = Host::light()?;
    let server = web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80;drain=kill").start()?;
    let rights = "+bpf,+net_admin,+sys_admin,+sys_ptrace";
    let embassy = with_capabilities(&host, rights, &["--path=auto", "--empty-hold=0"])?;
    embassy.wait_ready(READY)?;
    takes(&embassy, "app", 80, "kernel", "proved")?;
    let live = open(&app, "live", 80)?;
    host.etcd()?.v3().delete(&format!("/services/web/{}:80", server.ip()?))?;
    is_aborted(&live)
}
