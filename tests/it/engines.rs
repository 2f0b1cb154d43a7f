//! What works with every engine. `ENGINE=podman5` (and others, see testbed/README.md) runs these tests with another engine
//! than this machine's. `make engines` runs them with each.

use std::thread;

use anyhow::{Result, ensure};
use testbed::{Container, Embassy, Host, Network};

use crate::{
    READY, WAIT,
    support::{ends, metric, reaches},
};

const VIP: &str = "172.17.0.1:80";

/// A host with two services, `red` and `blue`, which its containers offer, and a ready embassy.
fn host_and_embassy() -> Result<(Host, Embassy)> {
    let host = Host::start()?;
    for name in ["red", "blue"] {
        host.web(name).label("SERVICE_80_NAME", name).start()?;
    }
    // Engines are slow on a busy machine, and no connection must be refused because of that.
    let flags = ["--dnat", "-discovery=docker://", "--hold=8s", "--log-format=json"];
    let embassy = host.embassy(flags)?;
    embassy.wait_ready(READY)?;
    Ok((host, embassy))
}

fn routes(embassy: &Embassy, expected: u64) -> Result<()> {
    testbed::eventually(WAIT, &format!("{expected} routes"), || {
        let routes = metric(embassy, "embassy_routes")?;
        ensure!(routes == expected, "there are {routes}");
        Ok(())
    })
}

/// Fails if embassy logs a warning or an error about the engine or its answers. Messages about a slow machine are allowed.
fn complains_not(embassy: &Embassy) -> Result<()> {
    let log = embassy.log();
    let complaints: Vec<_> = log.lines().filter(|line| is_complaint(line)).collect();
    ensure!(complaints.is_empty(), "{complaints:#?}");
    Ok(())
}

/// Whether a log line (JSON) is a warning or an error: from the modules that read the engine, about a source (the engine is
/// the only one), or about what a container declares or offers.
fn is_complaint(line: &str) -> bool {
    // A panic is not JSON.
    let Ok(line) = serde_json::from_str::<serde_json::Value>(line) else { return true };
    let of_engine = ["embassy::docker", "embassy::provider", "embassy::discovery"];
    let of_containers = ["binding ", "discovery entry "];
    let text = |name: &str| line[name].as_str().unwrap_or_default();
    let starts = |name: &str, all: &[&str]| all.iter().any(|start| text(name).starts_with(start));
    ["WARN", "ERROR"].contains(&text("level"))
        && (starts("target", &of_engine)
            || !text("source").is_empty()
            || starts("message", &of_containers))
}

#[test]
fn a_complaint_is_a_warning_of_the_engine_or_its_containers() {
    let line = |level: &str, target: &str, rest: &str| {
        format!(r#"{{"level":"{level}","target":"{target}",{rest}}}"#)
    };
    let said = r#""message":"docker inspect failed; keeping the container's last known state""#;
    assert!(is_complaint(&line("WARN", "embassy::docker::client", said)));
    assert!(!is_complaint(&line("INFO", "embassy::docker::client", said)));
    let lost =
        r#""message":"source does not answer; its last data stays in use","source":"provider""#;
    assert!(is_complaint(&line("WARN", "embassy::source", lost)));
    let skipped = r#""message":"binding has no route","consumer":"app""#;
    assert!(is_complaint(&line("WARN", "embassy::report", skipped)));
    let empty = r#""message":"service has no endpoints; connections are reset","service":"web""#;
    assert!(!is_complaint(&line("WARN", "embassy::report", empty)));
    assert!(is_complaint("thread 'main' panicked at src/main.rs:1:1:"));
}

#[test]
fn thirty_requests_over_three_endpoints_are_ten_each_on_every_network() -> Result<()> {
    let (host, embassy) = host_and_embassy()?;
    let names = ["web-1", "web-2", "web-3"];
    for name in names {
        host.web(name).label("SERVICE_80_NAME", "web").start()?;
    }
    let user = host.network("user", ["--subnet=10.91.0.0/24"])?;
    let inner = host.network("inner", ["--internal", "--subnet=10.92.0.0/24"])?;
    let asks_on =
        |port: u16, name: &str| host.client(name).env("BACKEND_WEB", &format!("web;{port}"));
    let asks = |name: &str| asks_on(8080, name);
    let (on_user, on_inner) = (user.gateway()?.to_string(), inner.gateway()?.to_string());
    for (consumer, vip, port) in [
        (asks("app").start()?, "172.17.0.1", 8080),
        (asks("on-user").network("user").start()?, &*on_user, 8080),
        (asks("on-inner").network("inner").start()?, &*on_inner, 8080),
        (asks_on(8082, "shares").network("container:app").start()?, "172.17.0.1", 8082),
    ] {
        let target = format!("{vip}:{port}");
        let what = format!("an answer of each endpoint to {}", consumer.name());
        testbed::eventually(WAIT, &what, || {
            let answers = consumer.get(&target).times(3).run()?;
            ensure!(names.iter().all(|name| answers.from(name) == 1), "{answers:?}");
            Ok(())
        })?;
        let answers = consumer.get(&target).times(30).run()?;
        ensure!(answers.failed() == 0, "{}: {answers:?}", consumer.name());
        for name in names {
            ensure!(answers.from(name) == 10, "{}: {answers:?}", consumer.name());
        }
        // A container that did not declare it cannot reach it.
        ends(&consumer, format!("{vip}:8081"), "refused")?;
    }
    complains_not(&embassy)
}

#[test]
fn a_containers_first_act_is_served_also_on_a_network_that_was_made_just_before() -> Result<()> {
    let (host, embassy) = host_and_embassy()?;
    let run = |network: &str, binding: &str, vip: &str| {
        let mut docker = host.docker_command(["run", "--rm", "-e", binding, network, "testbed"]);
        docker.args(["curl", "-s", "-m", "10", &format!("http://{vip}:8080/")]);
        testbed::output(&mut docker)
    };
    for n in 0..5 {
        let said = run("--network=bridge", "BACKEND_RED=red;8080", "172.17.0.1")?;
        ensure!(said.trim() == "red", "run {n}: {said:?}");
        let name = format!("net-{n}");
        let net = host.network(&name, [format!("--subnet=10.90.{n}.0/24")])?;
        let (network, vip) = (format!("--network={name}"), net.gateway()?.to_string());
        let said = run(&network, "BACKEND_RED=red;8080", &vip)?;
        ensure!(said.trim() == "red", "run {n} on its own network: {said:?}");
        // podman 4 may lose the exit code of a container that is removed at its end.
        let said = run(&network, "NOTHING=red", &vip).unwrap_or_default();
        ensure!(said.is_empty(), "who asks for nothing is served {said:?}");
        net.remove()?;
    }
    complains_not(&embassy)
}

#[test]
fn an_address_that_is_given_again_never_reaches_its_former_owners_service() -> Result<()> {
    let (host, embassy) = host_and_embassy()?;
    let net = host.network("net", ["--subnet=10.82.0.0/24"])?;
    let (host, net) = (&host, &net);
    thread::scope(|scope| {
        let lanes: Vec<_> = (2..4)
            .map(|n| scope.spawn(move || (0..3).try_for_each(|_| recycle(host, net, n))))
            .collect();
        let join = |lane: thread::ScopedJoinHandle<'_, Result<()>>| {
            lane.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        lanes.into_iter().try_for_each(join)
    })?;
    routes(&embassy, 0)?;
    complains_not(&embassy)
}

/// One container takes over the address of another that has just ended.
fn recycle(host: &Host, net: &Network, n: u8) -> Result<()> {
    let vip = format!("{}:80", net.gateway()?);
    let same = |role: &str| {
        let container = host.client(&format!("{role}-{n}")).network(net.name());
        container.arg(format!("--ip=10.82.0.{n}"))
    };
    let a = same("former").env("BACKEND_RED", "red;80").start()?;
    reaches(&a, &vip, "red")?;
    a.kill()?;
    a.remove()?;
    // It connects from the start, before it can have been inspected.
    let words = format!("testbed peer get {vip} -n 100; exec testbed peer idle");
    let b = same("latter").env("BACKEND_BLUE", "blue;80").cmd(["sh", "-c", &words]).start()?;
    reaches(&b, &vip, "blue")?;
    let first = testbed::eventually(WAIT, "the first answers", || {
        let log = b.log()?;
        ensure!(log.contains("slowest_ms"), "{log:?}");
        Ok(log)
    })?;
    ensure!(!first.contains("red"), "{first}");
    b.remove()
}

#[test]
fn a_container_is_served_while_it_runs_and_where_it_is() -> Result<()> {
    let (host, embassy) = host_and_embassy()?;
    let (net, more) = (
        host.network("net", ["--subnet=10.82.0.0/24"])?,
        host.network("more", ["--subnet=10.83.0.0/24"])?,
    );
    let app: Container =
        host.client("app").network(net.name()).env("BACKEND_RED", "red;80").start()?;
    reaches(&app, "10.82.0.1:80", "red")?;
    app.connect(more.name())?;
    routes(&embassy, 2)?;
    reaches(&app, "10.83.0.1:80", "red")?;
    app.disconnect(more.name())?;
    routes(&embassy, 1)?;
    host.docker(["pause", "app"])?;
    routes(&embassy, 1)?;
    host.docker(["unpause", "app"])?;
    app.kill()?;
    routes(&embassy, 0)?;
    app.start()?;
    routes(&embassy, 1)?;
    reaches(&app, "10.82.0.1:80", "red")?;
    app.remove()?;
    routes(&embassy, 0)?;
    // Containers that are gone before they can be inspected.
    for n in 0..5 {
        host.docker(["run", "--rm", "--name", &format!("short-{n}"), "testbed", "true"])?;
    }
    complains_not(&embassy)
}

#[test]
fn an_endpoint_that_is_asked_to_stop_gets_no_new_connections() -> Result<()> {
    let (host, embassy) = host_and_embassy()?;
    host.web("stays").label("SERVICE_80_NAME", "web").start()?;
    let app = host.client("app").env("BACKEND_WEB", "web;80").start()?;
    reaches(&app, VIP, "stays")?;
    // It keeps answering until it is killed.
    let words = "trap '' TERM; testbed peer http --name stops & wait";
    let stops = host
        .container("stops")
        .label("SERVICE_80_NAME", "web")
        .args(["--stop-signal=TERM", "--stop-timeout=30"])
        .cmd(["sh", "-c", words])
        .start()?;
    reaches(&app, VIP, "stops")?;
    let mut stop = host.docker_command(["stop", "--timeout=30", stops.name()]);
    let mut stop = stop.spawn()?;
    if host.is_podman() {
        // No event reports it, but a list does.
        testbed::eventually(WAIT, "the stop signal", || {
            let state = stops.inspect("{{.State.Running}} {{.State.Pid}}")?;
            ensure!(state.starts_with("false ") && !state.ends_with(" 0"), "{state}");
            Ok(())
        })?;
        embassy.signal(testbed::Signal::HUP)?;
    }
    let asked = testbed::eventually(WAIT, "the endpoint to be left out", || {
        let answers = app.get(VIP).times(4).run()?;
        ensure!(answers.from("stays") == 4, "{answers:?}");
        Ok(())
    });
    let ended = stop.try_wait()?;
    stops.kill()?;
    stop.wait()?;
    asked?;
    ensure!(ended.is_none(), "it had ended by then");
    complains_not(&embassy)
}

#[test]
fn a_consumer_that_is_asked_to_stop_is_served_until_it_has_ended() -> Result<()> {
    let (host, embassy) = host_and_embassy()?;
    let app = host
        .client("app")
        .env("BACKEND_RED", "red;80")
        .args(["--stop-signal=TERM", "--stop-timeout=30"])
        .cmd(["sh", "-c", "trap '' TERM; testbed peer idle & wait; wait"])
        .start()?;
    reaches(&app, VIP, "red")?;
    let mut curl = app.command("curl")?;
    curl.args(["--silent", "--fail", "--max-time", "5", "http://172.17.0.1/"]);
    let mut stop = host.docker_command(["stop", "--timeout=30", app.name()]).spawn()?;
    testbed::eventually(WAIT, "the stop signal", || {
        let pending = host.run("cat", [format!("/proc/{}/comm", app.pid()?)]);
        ensure!(pending.is_ok() && stop.try_wait()?.is_none(), "{pending:?}");
        Ok(())
    })?;
    // Every list, and every look after an unknown address connects, finds it there.
    for _ in 0..2 {
        embassy.signal(testbed::Signal::HUP)?;
        let late = host.client("late").env("BACKEND_RED", "red;80").start()?;
        reaches(&late, VIP, "red")?;
        late.remove()?;
        ensure!(testbed::output(&mut curl)? == "red");
    }
    ensure!(stop.try_wait()?.is_none(), "it had ended by then");
    app.kill()?;
    stop.wait()?;
    routes(&embassy, 0)?;
    complains_not(&embassy)
}

/// podman gives each container one of 2,048 locks in shared memory. If hosts shared them with each other and with this machine, none would
/// give its own back at its end.
#[test]
fn an_engine_of_a_host_takes_no_locks_of_this_machine() -> Result<()> {
    let locks = || std::fs::read("/dev/shm/libpod_lock").ok();
    let before = locks();
    let host = Host::start()?;
    host.client("app").start()?;
    ensure!(locks() == before, "/dev/shm/libpod_lock has changed");
    Ok(())
}

/// The containers of a pod share the network of an additional container, which no user created.
#[test]
fn a_pods_containers_are_served() -> Result<()> {
    let (host, embassy) = host_and_embassy()?;
    if !host.is_podman() {
        println!("not run: this engine has no pods");
        return Ok(());
    }
    host.load_image()?;
    let post = |path: &str, body: &str| {
        let socket = host.docker_url().replacen("unix://", "", 1);
        let url = format!("http://podman/v4.0.0/libpod{path}");
        let json = "Content-Type: application/json";
        let words = ["--silent", "--show-error", "--fail-with-body", "--unix-socket", &socket];
        host.run("curl", words.into_iter().chain(["--header", json, "--data", body, &url]))
    };
    post("/pods/create", r#"{"name": "pod"}"#)?;
    let inside = |name: &str, service: &str, port: u16| {
        let body = serde_json::json!({
            "name": name, "pod": "pod", "image": "testbed", "command": ["testbed", "peer", "idle"],
            "env": {"BACKEND_IT": format!("{service};{port}")}
        });
        post("/containers/create", &body.to_string())
    };
    inside("one", "red", 80)?;
    inside("two", "blue", 81)?;
    post("/pods/pod/start", "")?;
    for (name, port, service) in [("one", 80, "red"), ("two", 81, "blue"), ("two", 80, "red")] {
        let url = format!("http://172.17.0.1:{port}/");
        testbed::eventually(WAIT, &format!("{name} in its pod to reach {service}"), || {
            let said = host.docker(["exec", name, "curl", "-s", "-m", "5", &url])?;
            ensure!(said == service, "{said:?}");
            Ok(())
        })?;
    }
    complains_not(&embassy)
}

/// A container on an overlay network reaches its host via another network, which no inspection names.
#[test]
fn a_container_on_a_swarms_overlay_network_is_served_also_at_its_first_act() -> Result<()> {
    let (host, embassy) = host_and_embassy()?;
    if host.is_podman() {
        println!("not run: this engine has no swarm");
        return Ok(());
    }
    // An overlay network needs it.
    let vxlan = ["link", "add", "vx", "type", "vxlan", "id", "1", "dstport", "4789"];
    if let Err(error) = host.run("ip", vxlan) {
        println!("not run: this kernel has no vxlan: {error:#}");
        return Ok(());
    }
    host.run("ip", ["link", "delete", "vx"])?;
    host.docker(["swarm", "init", "--advertise-addr", testbed::HOST_ADDRESS])?;
    host.network("over", ["--driver=overlay", "--attachable", "--subnet=10.94.0.0/24"])?;
    let app = host.client("app").network("over").env("BACKEND_RED", "red;80").start()?;
    let gateway = "{{range .IPAM.Config}}{{.Gateway}}{{end}}";
    let gateway = host.docker(["network", "inspect", "--format", gateway, "docker_gwbridge"])?;
    reaches(&app, VIP, "red")?;
    reaches(&app, format!("{gateway}:80"), "red")?;
    ends(&app, format!("{gateway}:81"), "refused")?;
    for n in 0..3 {
        let mut docker = host.docker_command(["run", "--rm", "-e", "BACKEND_BLUE=blue;80"]);
        docker.args(["--network=over", "testbed", "curl", "-s", "-m", "10", "http://172.17.0.1/"]);
        let said = testbed::output(&mut docker)?;
        ensure!(said == "blue", "run {n}: {said:?}");
    }
    app.remove()?;
    routes(&embassy, 0)?;
    complains_not(&embassy)
}
