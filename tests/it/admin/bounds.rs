use super::*;
use crate::support::{metric, own_rules};

/// Opens connections to the API that send nothing. Reports when they are open, and when the first one is closed.
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
    // A descriptor for each client would leave none.
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
    // A client that sends nothing is disconnected, and the next one is served.
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

/// Requests a path on this many connections, this many times each, and never reads an answer. Replaces connections that
/// have ended, and reports when as many as it has were closed.
const UNREAD: &str = "
import select, socket, sys, time
count = int(sys.argv[1])
request = f'GET {sys.argv[2]} HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n'.encode() * int(sys.argv[3])
held, ended = {}, 0
poll = select.poll()
def ask():
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    one.connect(('127.0.0.1', 9990))
    one.setblocking(False)
    try:
        one.send(request)
    except OSError:
        pass
    held[one.fileno()] = (one, time.monotonic())
    poll.register(one, select.POLLRDHUP)
for _ in range(count):
    ask()
print('asked', flush=True)
while True:
    for descriptor, _ in poll.poll():
        poll.unregister(descriptor)
        one, since = held.pop(descriptor)
        one.close()
        # Others were refused at once.
        ended += time.monotonic() - since > 5
        if ended == count:
            print('let go', flush=True)
        ask()
";

/// Waits until a program has printed a word.
fn told(process: &Process, word: &str) -> Result<()> {
    testbed::eventually(WAIT * 3, &format!("the readers to be {word}"), || {
        ensure!(process.log().contains(word), "{}", process.log());
        Ok(())
    })
}

#[test]
fn readers_that_do_not_read_keep_no_health_check_out_and_are_let_go() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let _app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    let mut python = host.command("/usr/bin/python3");
    // The dashboard, so often that it fits into no buffer.
    python.args(["-c", UNREAD, "128", "/", "2000"]);
    let unread = host.spawn("unread", python)?;
    told(&unread, "asked")?;
    // They occupy all connections. Other requests are refused, and health checks are answered.
    let all_is_taken = || {
        let answer = embassy.admin("/v1/status")?;
        ensure!(answer.status == 503, "{}", answer.status);
        ensure!(answer.body.contains("too many connections"), "{}", answer.body);
        Ok(())
    };
    testbed::eventually(WAIT * 3, "health checks while all places are taken", || {
        all_is_taken()?;
        for _ in 0..5 {
            embassy.admin("/healthz")?.ok()?;
            ensure!(embassy.admin("/readyz")?.status == 200);
        }
        all_is_taken()
    })?;
    told(&unread, "let go")?;
    unread.kill()?;
    testbed::eventually(WAIT * 3, "the API to answer", || embassy.admin("/v1/status")?.ok())
        .map(drop)
}

#[test]
fn scrapes_that_are_not_read_take_their_own_places_and_free_them() -> Result<()> {
    let host = Host::light()?;
    let file = host.dir().join("services.toml");
    std::fs::write(&file, "service = []")?;
    // So many series that they fit into no buffer of the kernel (some 8 MB; tcp_wmem is 4 MiB at most).
    let services: Vec<_> = (1..=4000).map(|n| format!("service-{n};{n}")).collect();
    let services = format!("-services={}", services.join(","));
    let discovery = format!("-discovery=file://{}", file.display());
    let many = "--max-bindings-per-consumer=4000";
    own_rules(&host)?;
    let embassy = host.embassy(["-provider=static", &services, &discovery, many])?;
    embassy.wait_ready(READY)?;
    let mut python = host.command("/usr/bin/python3");
    python.args(["-c", UNREAD, "4", "/metrics", "1"]);
    let unread = host.spawn("unread", python)?;
    told(&unread, "asked")?;
    testbed::eventually(WAIT * 3, "the places to be taken", || {
        let answer = embassy.admin("/metrics")?;
        ensure!(
            answer.status == 503 && answer.body.contains("4 clients read"),
            "{}",
            answer.status
        );
        Ok(())
    })?;
    embassy.admin("/v1/status")?.ok()?;
    told(&unread, "let go")?;
    unread.kill()?;
    testbed::eventually(WAIT * 3, "a scrape", || embassy.admin("/metrics")?.ok()).map(drop)
}

#[test]
fn a_page_of_another_origin_and_a_foreign_host_get_no_more_than_a_probe() -> Result<()> {
    let host = Host::light()?;
    // A source that does not answer. Its name is revealed only to clients that name this listener.
    let embassy = host.embassy(["--dnat", "-discovery=consul://127.0.0.1:1"])?;
    testbed::eventually(READY, "the API", || embassy.admin("/healthz")?.ok())?;
    let curl = |path: &str, more: &[&str]| {
        let curl = ["--silent", "--write-out", " %{http_code}"];
        let url = format!("http://127.0.0.1:9990{path}");
        host.run("curl", [&curl[..], more, &[&url]].concat())
    };
    for header in
        ["Sec-Fetch-Site: cross-site", "Sec-Fetch-Site: same-site", "Origin: http://a.example"]
    {
        for path in ["/", "/metrics", "/v1/status", "/v1/openapi.json"] {
            let answer = curl(path, &["--header", header])?;
            ensure!(answer.ends_with(" 403") && answer.contains("web page"), "{path}: {answer}");
        }
        ensure!(curl("/healthz", &["--header", header])?.ends_with(" 200"));
        let ready = curl("/readyz", &["--header", header])?;
        ensure!(ready.ends_with(" 503") && !ready.contains("consul"), "{ready}");
    }
    let own = curl("/readyz", &[])?;
    ensure!(own.contains("\"sources\":[\"consul\"]") && own.ends_with(" 503"), "{own}");
    let foreign = curl("/readyz", &["--header", "Host: a.example"])?;
    ensure!(foreign.contains("\"sources\":[]") && foreign.contains("discovery"), "{foreign}");
    ensure!(foreign.ends_with(" 503"), "{foreign}");
    // embassy's own page, and a link to it.
    ensure!(curl("/v1/status", &["--header", "Sec-Fetch-Site: same-origin"])?.ends_with(" 200"));
    let link =
        ["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"];
    let link: Vec<_> = link.iter().flat_map(|header| ["--header", header]).collect();
    ensure!(curl("/", &link)?.ends_with(" 200"));
    ensure!(curl("/v1/status", &link)?.ends_with(" 403"));
    Ok(())
}
