use super::*;
use crate::support::metric;

/// Opens connections to the API that say nothing, tells when they are open, and when the first of them is closed.
const IDLE: &str = "
import socket, sys, time
held = [socket.socket() for _ in range(int(sys.argv[1]))]
for one in held:
    one.setblocking(False)
    one.connect_ex(('127.0.0.1', 9990))
held[0].setblocking(True)
print('open', flush=True)
held[0].recv(1)
print('closed', flush=True)
time.sleep(1000)
";

#[test]
fn idle_callers_take_no_descriptors_from_connections_and_are_let_go() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    // With one descriptor for each caller there would be none left.
    let mut limited = host.command("sh");
    limited.args(["-c", "ulimit -n 600; exec \"$0\" \"$@\""]).arg(testbed::embassy_program()?);
    limited.args(["--dnat", ETCD]).env("DOCKER_HOST", host.docker_url());
    let embassy = host.embassy_from(limited)?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "web")?;

    let mut python = host.command("/usr/bin/python3");
    python.args(["-c", IDLE, "900"]);
    let idle = host.spawn("idle", python)?;
    let told = |word: &str| {
        testbed::eventually(WAIT * 2, &format!("the callers to be {word}"), || {
            ensure!(idle.log().contains(word), "{}", idle.log());
            Ok(())
        })
    };
    told("open")?;
    let answers = app.get("172.17.0.1:80").times(200).at_once(4).run()?;
    assert_eq!(answers.from("web"), 200, "{answers:?}");
    let open = std::fs::read_dir(format!("/proc/{}/fd", embassy.pid()))?.count();
    assert!(open < 500, "{open} descriptors are open");
    // Who says nothing is let go, and the next is served.
    told("closed")?;
    idle.kill()?;
    testbed::eventually(WAIT * 2, "the API to answer", || embassy.admin("/healthz")?.ok())?;
    assert_eq!(metric(&embassy, r#"embassy_connections_total{outcome="local_error"}"#)?, 0);
    Ok(())
}

#[test]
fn a_listener_for_everybody_is_warned_of_and_scraped_by_any_name() -> Result<()> {
    let host = Host::light()?;
    let flags = ["-provider=static", "-services=web;80"];
    let embassy = host.embassy([&flags[..], &["--admin=0.0.0.0:9990"]].concat())?;
    testbed::eventually(READY, "the API", || embassy.admin("/healthz")?.ok())?;
    says(&embassy, &["WARN", "the admin API is reachable from every network", "0.0.0.0:9990"])?;
    for (path, status) in [("/metrics", "200"), ("/v1/status", "403")] {
        let curl = ["--silent", "--output", "/dev/null", "--write-out", "%{http_code}"];
        let url = format!("http://127.0.0.1:9990{path}");
        let named = ["--header", "Host: docker-host-7.example:9990", &url];
        assert_eq!(host.run("curl", [&curl[..], &named].concat())?, status, "{path}");
    }
    embassy.kill()?;
    let embassy = host.embassy(flags)?;
    testbed::eventually(READY, "the API", || embassy.admin("/healthz")?.ok())?;
    let warned = embassy.log().matches("the admin API is reachable").count();
    assert_eq!(warned, 1, "of the first embassy: {}", embassy.log());
    Ok(())
}
