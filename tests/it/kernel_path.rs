//! Connections that bypass embassy: inside `connect()`, the VIP is replaced by an endpoint.

use std::thread;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::{Container, Embassy, Host, embassy_program};

use crate::{
    READY, WAIT,
    support::{ETCD, counts, ends, metric, offer, offer_at, reaches, says, web},
};

/// Tries in which each endpoint must once get exactly its share: on a busy host an answer to a SYN may be late, which costs an
/// endpoint its turn, but not each time.
const TRIES: u64 = 4;

/// Dials until each of the three got exactly its share of `each`. Returns how many connections that took.
pub(crate) fn evenly(app: &Container, each: usize, at_once: usize) -> Result<u64> {
    let mut seen = Vec::new();
    for n in 1..=TRIES {
        let answers = app.get("172.17.0.1:80").times(3 * each).at_once(at_once).run()?;
        assert_eq!(answers.failed(), 0, "{answers:?}");
        if ["web-1", "web-2", "web-3"].iter().all(|name| answers.from(name) == each) {
            return Ok(n * 3 * each as u64);
        }
        seen.push(answers);
    }
    anyhow::bail!("never {each} each: {seen:?}")
}

/// Waits until a consumer's connections to a port take a path.
pub(crate) fn takes(
    embassy: &Embassy,
    consumer: &str,
    port: u16,
    path: &str,
    reason: &str,
) -> Result<()> {
    testbed::eventually(WAIT, &format!("{consumer} to take the path {path} to {port}"), || {
        let routes = embassy.admin(&format!("/v1/routes?consumer={consumer}"))?.json()?;
        let all = routes["items"].as_array().context("no list")?;
        let route = all.iter().find(|route| route["port"] == port).context("no such route")?;
        ensure!(route["path"] == path && route["path_reason"] == reason, "{route}");
        Ok(())
    })
}

/// A program in Python, run in a container; what it prints is JSON.
pub(crate) fn python(app: &Container, program: &str) -> Result<Value> {
    let said = app.exec(["python3", "-c", program])?;
    serde_json::from_str(&said).with_context(|| format!("not JSON: {said:?}"))
}

/// A host with three endpoints of one service, and a consumer of it.
pub(crate) fn three() -> Result<(Host, Vec<Container>, Container)> {
    let host = Host::light()?;
    let mut webs = Vec::new();
    for name in ["web-1", "web-2", "web-3"] {
        let web = host.web(name).start()?;
        offer(&host, "web", web.ip()?)?;
        webs.push(web);
    }
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    Ok((host, webs, app))
}

/// How long a failing connect takes, or what getpeername returns after a successful one.
const DIAL: &str = r#"
import errno, json, socket, sys
def dial(family, address):
    s = socket.socket(family, socket.SOCK_STREAM)
    s.settimeout(10)
    try:
        s.connect(address)
    except OSError as e:
        return [errno.errorcode.get(e.errno, str(e)), None]
    peer = s.getpeername()[:2]
    s.sendall(b"GET / HTTP/1.0\r\n\r\n")
    said = b""
    while True:
        more = s.recv(4096)
        if not more:
            break
        said += more
    return [said.split(b"\r\n\r\n")[-1].decode().strip(), list(peer)]
"#;

#[test]
fn the_kernel_spreads_connections_evenly_and_they_show_the_vip() -> Result<()> {
    let (host, _webs, app) = three()?;
    let other = host.client("other").env("BACKEND_WEB", "/services/web;80;path=proxy").start()?;
    let embassy = host.embassy(["--dnat", ETCD, "--path=kernel", "--connection-log=all"])?;
    embassy.wait_ready(READY)?;
    takes(&embassy, "app", 80, "kernel", "possible")?;
    takes(&embassy, "other", 80, "proxy", "not_asked")?;

    let all = evenly(&app, 100, 4)? + 1;
    let said = python(
        &app,
        &format!("{DIAL}\nprint(json.dumps(dial(socket.AF_INET, ('172.17.0.1', 80))))"),
    )?;
    assert_eq!(said[1], serde_json::json!(["172.17.0.1", 80]), "{said}");
    // No connection went through the proxy, and all are counted.
    let series = |name: &str| {
        format!(
            "embassy_route_{name}{{consumer=\"app\",service=\"/services/web\",port=\"80\",protocol=\"tcp\""
        )
    };
    counts(&embassy, &format!("{},outcome=\"closed\"}}", series("connections_total")), all)?;
    assert_eq!(metric(&embassy, &format!("{}}}", series("connections_started_total")))?, all);
    let active = format!("{}}} 0", series("connections_active"));
    ensure!(embassy.admin("/metrics")?.ok()?.contains(&active), "no {active}");
    let scraped = embassy.admin("/metrics")?.ok()?;
    let path = format!("{},path=\"kernel\"}} 1", series("path"));
    ensure!(scraped.contains(&path), "no {path} in {scraped}");
    let down = metric(&embassy, &format!("{},direction=\"down\"}}", series("bytes_total")))?;
    ensure!(down > all * 5, "{down} bytes");
    let shown = host.run(embassy_program()?.to_str().context("a path")?, ["ps"])?;
    ensure!(
        shown.contains("PATH") && shown.contains("kernel") && shown.contains("proxy"),
        "{shown}"
    );
    let shown =
        host.run(embassy_program()?.to_str().context("a path")?, ["explain", "app", "80"])?;
    ensure!(shown.contains("path       kernel, from 172.17.0."), "{shown}");
    let tracked = host.run("sh", ["-c", "nft list table inet embassy"])?;
    ensure!(tracked.contains("172.17.0.1"), "the proxy path stands beside it: {tracked}");
    says(&embassy, &["connection", "app", "path=\"kernel\"", "outcome=\"closed\""])?;
    reaches(&other, "172.17.0.1:80", "web-1")
        .or_else(|_| reaches(&other, "172.17.0.1:80", "web-2"))
        .or_else(|_| reaches(&other, "172.17.0.1:80", "web-3"))?;
    Ok(())
}

#[test]
fn however_a_process_of_the_container_dials_it_reaches_its_service() -> Result<()> {
    let (host, _webs, app) = three()?;
    let embassy = host.embassy(["--dnat", ETCD, "--path=kernel"])?;
    embassy.wait_ready(READY)?;
    takes(&embassy, "app", 80, "kernel", "possible")?;
    let group = app.control_group()?;
    let group = group.display();
    let said = python(
        &app,
        &format!(
            r#"{DIAL}
import os, select, subprocess, threading
VIP = ("172.17.0.1", 80)
all = {{}}
def v4(): return dial(socket.AF_INET, VIP)
all["plain"] = v4()
all["mapped"] = dial(socket.AF_INET6, ("::ffff:172.17.0.1", 80))

def forked(body):
    r, w = os.pipe()
    if os.fork() == 0:
        os.write(w, json.dumps(body()).encode())
        os._exit(0)
    os.close(w)
    return json.loads(os.fdopen(r).read())
all["fork"] = forked(v4)

def below():
    os.mkdir("{group}/inner")
    os.mkdir("{group}/inner/most")
    open("{group}/inner/most/cgroup.procs", "w").write("0")
    return v4()
all["sub-cgroup"] = forked(below)

here = []
thread = threading.Thread(target=lambda: here.append(v4()))
thread.start(); thread.join()
all["thread"] = here[0]

s = socket.socket()
s.setblocking(False)
code = s.connect_ex(VIP)
select.select([], [s], [], 10)
all["non-blocking"] = [[errno.errorcode.get(code, code), s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)], list(s.getpeername())]
again = s.connect_ex(VIP)
all["again"] = [again in (0, errno.EISCONN), list(s.getpeername())]
s.close()

s = socket.socket()
s.connect(VIP)
child = os.fork()
if child == 0:
    os._exit(0 if s.getpeername() == VIP else 1)
all["shared"] = os.waitpid(child, 0)[1]
s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
s.close()

# A socket that is used again for another address is not taken for the one that it was.
s = socket.socket()
s.connect(VIP)
endpoint = [line.split() for line in subprocess.run(["ss", "-Htn", "dport", "=", ":80"], stdout=subprocess.PIPE, text=True).stdout.splitlines()][0][4]
s.close()
host = endpoint.rsplit(":", 1)[0]
all["direct"] = dial(socket.AF_INET, (host, 80))[1] == [host, 80]
all["undeclared"] = dial(socket.AF_INET, ("172.17.0.1", 81))
print(json.dumps(all))
"#
        ),
    )?;
    let vip = serde_json::json!(["172.17.0.1", 80]);
    for way in ["plain", "fork", "sub-cgroup", "thread"] {
        ensure!(said[way][0].as_str().is_some_and(|by| by.starts_with("web-")), "{way}: {said}");
        assert_eq!(said[way][1], vip, "{way}: {said}");
    }
    assert_eq!(said["mapped"][1], serde_json::json!(["::ffff:172.17.0.1", 80]), "{said}");
    assert_eq!(said["non-blocking"], serde_json::json!([["EINPROGRESS", 0], vip]), "{said}");
    assert_eq!(said["again"], serde_json::json!([true, vip]), "{said}");
    assert_eq!((&said["shared"], &said["direct"]), (&0.into(), &true.into()), "{said}");
    assert_eq!(said["undeclared"][0], "ECONNREFUSED", "{said}");
    let series = |outcome: &str| {
        format!(
            "embassy_route_connections_total{{consumer=\"app\",service=\"/services/web\",port=\"80\",protocol=\"tcp\",outcome=\"{outcome}\"}}"
        )
    };
    counts(&embassy, &series("reset"), 1)?;
    // Those that only connected closed without sending. All bypassed the proxy.
    let ended = |embassy: &Embassy| {
        Ok::<_, anyhow::Error>(
            metric(embassy, &series("closed"))?
                + metric(embassy, &series("reset"))?
                + metric(embassy, &series("reset_after_close"))?,
        )
    };
    testbed::eventually(WAIT, "eight ends", || {
        let ended = ended(&embassy)?;
        ensure!(ended == 8, "{ended}");
        Ok(())
    })
}

#[test]
fn an_address_that_is_anothers_now_leads_nowhere_by_the_kernel() -> Result<()> {
    let host = Host::light()?;
    for name in ["red", "blue"] {
        web(&host, name)?;
    }
    let embassy = host.embassy(["--dnat", ETCD, "--path=kernel"])?;
    embassy.wait_ready(READY)?;
    let mut addresses = Vec::new();
    for (n, service) in ["red", "blue", "red", "blue"].iter().enumerate() {
        let name = format!("app-{n}");
        let app =
            host.client(&name).env("BACKEND_W", &format!("/services/{service};80")).start()?;
        takes(&embassy, &name, 80, "kernel", "possible")?;
        addresses.push(app.ip()?);
        let answers = app.get("172.17.0.1:80").times(50).at_once(4).run()?;
        assert_eq!((answers.from(service), answers.failed()), (50, 0), "{answers:?}");
        app.remove()?;
        let stranger = host.client(&format!("stranger-{n}")).start()?;
        assert_eq!(stranger.ip()?, addresses[n]);
        ends(&stranger, "172.17.0.1:80", "refused")?;
        stranger.remove()?;
    }
    assert!(addresses.iter().all(|one| *one == addresses[0]), "{addresses:?}");
    Ok(())
}

/// Its entry must be removed with its route, and not only because its control group ends with its process.
#[test]
fn a_process_that_lives_on_after_its_container_is_gone_reaches_nothing() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let embassy = host.embassy(["--dnat", ETCD, "--path=kernel"])?;
    embassy.wait_ready(READY)?;
    takes(&embassy, "app", 80, "kernel", "possible")?;
    reaches(&app, "172.17.0.1:80", "web")?;
    let engine = host.fake_engine().context("a light host")?;
    engine.has_not(app.id());
    engine.tells("die", app.id());
    // Captured as an unknown container's, and no longer redirected.
    ends(&app, "172.17.0.1:80", "reset")
}

#[test]
fn an_endpoint_that_dies_costs_one_connection_and_comes_back_when_it_is_proved() -> Result<()> {
    let (host, webs, app) = three()?;
    let other = host.client("other").env("BACKEND_WEB", "/services/web;80;path=proxy").start()?;
    let embassy = host.embassy(["--dnat", ETCD, "--path=kernel"])?;
    embassy.wait_ready(READY)?;
    takes(&embassy, "app", 80, "kernel", "possible")?;
    let answers = app.get("172.17.0.1:80").times(30).run()?;
    assert_eq!(answers.failed(), 0, "{answers:?}");
    // Only its process stops: the container's network stays, and refuses.
    let address = webs[2].ip()?.to_string();
    host.run("kill", ["-STOP", &webs[2].pid()?.to_string()])?;
    host.run("nsenter", ["-t", &webs[2].pid()?.to_string(), "-n", "nft", "add table inet t; add chain inet t i { type filter hook input priority 0; }; add rule inet t i tcp dport 80 reject with tcp reset"])?;
    let answers = app.get("172.17.0.1:80").times(200).run()?;
    ensure!(answers.failed() <= 1 && answers.answered() >= 199, "{answers:?}");
    assert_eq!(answers.from("web-3"), 0, "{answers:?}");
    let series = format!(
        "embassy_endpoint_ejections_total{{discovery=\"etcd\",service=\"/services/web\",endpoint=\"{address}:80\"}}"
    );
    counts(&embassy, &series, 1)?;
    // The proxy path knows the failure too: it does not need to retry.
    let answers = other.get("172.17.0.1:80").times(20).run()?;
    assert_eq!((answers.failed(), answers.from("web-3")), (0, 0), "{answers:?}");
    host.run("nsenter", ["-t", &webs[2].pid()?.to_string(), "-n", "nft", "delete table inet t"])?;
    host.run("kill", ["-CONT", &webs[2].pid()?.to_string()])?;
    says(&embassy, &["endpoint is back", &address])?;
    testbed::eventually(WAIT, "the endpoint to serve again", || {
        let answers = app.get("172.17.0.1:80").times(9).run()?;
        ensure!(answers.failed() == 0 && answers.from("web-3") == 3, "{answers:?}");
        Ok(())
    })
}

#[test]
fn a_service_without_an_endpoint_is_refused_and_a_removed_endpoint_gets_nothing_new() -> Result<()>
{
    let (host, webs, app) = three()?;
    let embassy = host.embassy(["--dnat", ETCD, "--path=kernel", "--empty-hold=0"])?;
    embassy.wait_ready(READY)?;
    takes(&embassy, "app", 80, "kernel", "possible")?;
    let etcd = host.etcd()?;
    let key = |web: &Container| Ok::<_, anyhow::Error>(format!("/services/web/{}:80", web.ip()?));
    etcd.v3().delete(&key(&webs[0])?)?;
    testbed::eventually(WAIT, "the removed endpoint to get nothing", || {
        let answers = app.get("172.17.0.1:80").times(20).run()?;
        assert_eq!(answers.failed(), 0, "{answers:?}");
        ensure!(answers.from("web-1") == 0, "{answers:?}");
        Ok(())
    })?;
    etcd.v3().delete(&key(&webs[1])?)?;
    etcd.v3().delete(&key(&webs[2])?)?;
    takes(&embassy, "app", 80, "proxy", "no_endpoint")?;
    ends(&app, "172.17.0.1:80", "reset")?;
    counts(&embassy, r#"embassy_connections_total{outcome="no_endpoint"}"#, 1)?;
    offer(&host, "web", webs[1].ip()?)?;
    reaches(&app, "172.17.0.1:80", "web-2")
}

#[test]
fn what_the_kernel_cannot_do_goes_through_the_proxy_and_says_why() -> Result<()> {
    let host = Host::light()?;
    let server = web(&host, "web")?;
    offer_at(&host, "mixed", &format!("{}:80", server.ip()?))?;
    offer_at(&host, "mixed", "[fd00::9]:80")?;
    let app = host
        .client("app")
        .env("BACKEND_A", "/services/web;80")
        .env("BACKEND_B", "/services/web;81;path=proxy")
        .env("BACKEND_C", "/services/web;82;drain=kill")
        .env("BACKEND_D", "/services/web;83;user-timeout=60")
        .env("BACKEND_E", "/services/mixed;84")
        .env("BACKEND_F", "/services/none;85")
        .env("BACKEND_G", "/services/web;86;proxy=v1")
        .start()?;
    let embassy = host.embassy(["--dnat", ETCD, "--path=kernel"])?;
    embassy.wait_ready(READY)?;
    // embassy may reset connections here, so a drain does not need the proxy.
    for port in [80, 82] {
        takes(&embassy, "app", port, "kernel", "possible")?;
    }
    for (port, reason) in [
        (81, "not_asked"),
        (83, "user_timeout"),
        (84, "family"),
        (85, "no_endpoint"),
        (86, "header"),
    ] {
        takes(&embassy, "app", port, "proxy", reason)?;
    }
    for port in 80..=84 {
        reaches(&app, format!("172.17.0.1:{port}"), "web")?;
    }
    Ok(())
}

/// embassy as another user, with these capabilities alone.
pub(crate) fn with_capabilities(
    host: &Host,
    capabilities: &str,
    flags: &[&str],
) -> Result<Embassy> {
    let sets = format!("-all,{capabilities}");
    let mut command = host.command("setpriv");
    command.args(["--reuid=59990", "--regid=59990", "--clear-groups"]);
    command.arg(format!("--bounding-set={sets}"));
    command.arg(format!("--inh-caps={sets}")).arg(format!("--ambient-caps={sets}"));
    command.arg(embassy_program()?).args(["--dnat", ETCD, "--state-dir=off"]).args(flags);
    command.env("DOCKER_HOST", host.docker_url());
    let socket = host.docker_url();
    host.run("chmod", ["0666", socket.strip_prefix("unix://").context("no socket")?])?;
    host.embassy_from(command)
}

#[test]
fn two_capabilities_are_enough_and_without_one_of_them_the_proxy_serves() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let embassy = with_capabilities(&host, "+bpf,+net_admin", &["--path=kernel"])?;
    embassy.wait_ready(READY)?;
    takes(&embassy, "app", 80, "kernel", "possible")?;
    reaches(&app, "172.17.0.1:80", "web")?;
    embassy.terminate()?;
    assert!(embassy.wait(WAIT)?.success());
    drop(embassy);

    let embassy = with_capabilities(&host, "+net_admin", &["--path=kernel"])?;
    embassy.wait_ready(READY)?;
    takes(&embassy, "app", 80, "proxy", "unavailable")?;
    reaches(&app, "172.17.0.1:80", "web")?;
    let second = host.client("second").env("BACKEND_WEB", "/services/web;80").start()?;
    takes(&embassy, "second", 80, "proxy", "unavailable")?;
    reaches(&second, "172.17.0.1:80", "web")?;
    let log = embassy.log();
    let said = log.lines().filter(|line| line.contains("the kernel path is not available"));
    assert_eq!(said.count(), 1, "{log}");
    ensure!(log.contains("bpf(2) is not permitted"), "{log}");
    Ok(())
}

#[test]
fn nothing_is_loaded_while_nobody_asks_for_it() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    ensure!(!embassy.log().contains("kernel path"), "{}", embassy.log());
    // One binding asks for the kernel path: only this binding uses it.
    let asks = host.client("asks").env("BACKEND_WEB", "/services/web;80;path=kernel").start()?;
    takes(&embassy, "asks", 80, "kernel", "possible")?;
    takes(&embassy, "app", 80, "proxy", "not_asked")?;
    reaches(&asks, "172.17.0.1:80", "web")
}

#[test]
fn after_a_kill_and_after_a_stop_nothing_redirects_and_open_connections_go_on() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    for is_killed in [true, false] {
        let embassy = host.embassy(["--dnat", ETCD, "--path=kernel", "--drain=0"])?;
        embassy.wait_ready(READY)?;
        takes(&embassy, "app", 80, "kernel", "possible")?;
        let live = app.spawn(
            &format!("live-{is_killed}"),
            [
                "python3",
                "-uc",
                r#"
import socket, time
s = socket.create_connection(("172.17.0.1", 80))
print("open", s.getpeername(), flush=True)
def ask():
    s.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    return s.recv(4096)
assert ask()
while True:
    time.sleep(0.05)
    try:
        socket.create_connection(("172.17.0.1", 80), 5).close()
    except ConnectionRefusedError:
        break
# Nobody redirects, and nobody captures.
print("alive" if ask() else "dead", flush=True)
"#,
            ],
        )?;
        testbed::eventually(WAIT, "an open connection", || {
            ensure!(live.log().contains("open ('172.17.0.1', 80)"), "{}", live.log());
            Ok(())
        })?;
        match is_killed {
            true => embassy.kill()?,
            false => {
                embassy.terminate()?;
                assert!(embassy.wait(WAIT)?.success());
            }
        }
        testbed::eventually(WAIT, "the connection to be used once nothing redirects", || {
            ensure!(live.log().contains("alive"), "{}", live.log());
            Ok(())
        })?;
        drop(embassy);
    }
    Ok(())
}

/// How the connections of 20 parallel clients are spread over the three endpoints, while a key in etcd is added and removed
/// 100 times.
fn spread_during_changes(
    embassy: &Embassy,
    app: &Container,
    key: &str,
    value: &str,
) -> Result<Vec<usize>> {
    const CLIENTS: usize = 20;
    let etcd = app.host().etcd()?;
    let before = metric(embassy, "embassy_table_version")?;
    let answers = thread::scope(|scope| {
        let dials =
            scope.spawn(|| app.get("172.17.0.1:80").times(CLIENTS * 90).at_once(CLIENTS).run());
        for _ in 0..50 {
            etcd.v3().put(key, value)?;
            etcd.v3().delete(key)?;
        }
        dials.join().expect("it does not panic")
    })?;
    assert_eq!(answers.failed(), 0, "{answers:?}");
    ensure!(metric(embassy, "embassy_table_version")? > before, "nothing has changed");
    Ok(["web-1", "web-2", "web-3"].iter().map(|name| answers.from(name)).collect())
}

#[test]
fn clients_that_dial_at_once_during_a_hundred_changes_are_spread_evenly() -> Result<()> {
    let (host, _webs, app) = three()?;
    let embassy = host.embassy(["--dnat", ETCD, "--path=kernel"])?;
    embassy.wait_ready(READY)?;
    takes(&embassy, "app", 80, "kernel", "possible")?;
    // An endpoint that embassy refuses changes the answer, so the set is written again with the same endpoints.
    let off =
        |got: &[usize]| got.iter().max().zip(got.iter().min()).map(|(most, least)| most - least);
    let mut seen = Vec::new();
    for _ in 0..TRIES {
        let got = spread_during_changes(&embassy, &app, "/services/web/refused", "127.0.0.1:80")?;
        ensure!(got.iter().sum::<usize>() == 1_800, "{got:?}");
        seen.push(got);
        if off(seen.last().context("one")?) <= Some(1) {
            break;
        }
    }
    ensure!(seen.iter().any(|got| off(got) <= Some(1)), "{seen:?}");
    // With changed endpoints, a connection at that moment may use a turn of the old or of the new order.
    let fourth = format!("{}:80", host.web("web-4").start()?.ip()?);
    let got = spread_during_changes(&embassy, &app, "/services/web/fourth", &fourth)?;
    ensure!(off(&got) <= Some(20), "{got:?}");
    Ok(())
}

#[test]
fn least_connections_counts_those_of_both_paths() -> Result<()> {
    let host = Host::light()?;
    for name in ["one", "two"] {
        let server = host.server(name, ["greet", "--name", name]).start()?;
        offer(&host, "greet", server.ip()?)?;
    }
    let consumer = |name: &str, path: &str| {
        let asks = format!("/services/greet;80;lb=leastconn;path={path}");
        host.client(name).env("BACKEND_G", &asks).start()
    };
    let (kernel, proxy) = (consumer("kernel", "kernel")?, consumer("proxy", "proxy")?);
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    takes(&embassy, "kernel", 80, "kernel", "possible")?;
    let hold = |app: &Container, name: &str, n: &str| {
        app.spawn(name, ["testbed", "peer", "hold", "172.17.0.1:80", "-n", n])
    };
    let active = |embassy: &Embassy| -> Result<Vec<u64>> {
        let endpoints = embassy.admin("/v1/endpoints")?.json()?;
        let all = endpoints["items"].as_array().context("no list")?;
        Ok(all.iter().map(|one| one["active"].as_u64().unwrap_or_default()).collect())
    };
    let are = |expected: [u64; 2]| {
        testbed::eventually(WAIT, &format!("{expected:?} connections"), || {
            let active = active(&embassy)?;
            ensure!(active == expected, "{active:?}");
            Ok(())
        })
    };
    let _first = hold(&kernel, "first", "10")?;
    are([5, 5])?;
    let _second = hold(&proxy, "second", "10")?;
    are([10, 10])?;
    let _third = hold(&kernel, "third", "7")?;
    testbed::eventually(WAIT, "27 connections", || {
        let active = active(&embassy)?;
        ensure!(active == [13, 14] || active == [14, 13], "{active:?}");
        Ok(())
    })?;
    // Its routes are removed first, and open connections end later.
    kernel.remove()?;
    testbed::eventually(WAIT, "10 connections", || {
        let active = active(&embassy)?;
        ensure!(active.iter().sum::<u64>() == 10, "{active:?}");
        Ok(())
    })
}

/// A container of a real engine with both families, and its next run, which has another control group.
#[test]
fn a_container_of_docker_keeps_to_its_families_and_its_next_run_is_known_again() -> Result<()> {
    let host = Host::builder().ipv6(true).start()?;
    let four = web(&host, "four")?;
    let six = host.web("six").start()?;
    offer_at(&host, "six", &format!("[{}]:80", six.ip6()?))?;
    let app = host
        .client("app")
        .env("BACKEND_FOUR", "/services/four;80")
        .env("BACKEND_SIX", "/services/six;81")
        .start()?;
    let embassy = host.embassy(["--dnat", ETCD, "--path=kernel"])?;
    embassy.wait_ready(READY)?;
    // For each port, the route of the endpoint's family uses the kernel path, and the other one does not.
    let are = |what: &str| {
        testbed::eventually(WAIT, what, || {
            let routes = embassy.admin("/v1/routes?consumer=app")?.json()?;
            let all = routes["items"].as_array().context("no list")?;
            let mut paths: Vec<_> = all
                .iter()
                .map(|route| {
                    let is_six = route["address"].as_str().is_some_and(|it| it.contains(':'));
                    let reason = route["path_reason"].as_str().unwrap_or_default().to_owned();
                    (route["port"].as_u64().unwrap_or_default(), is_six, reason)
                })
                .collect();
            paths.sort();
            let expected = [
                (80, false, "possible"),
                (80, true, "family"),
                (81, false, "family"),
                (81, true, "possible"),
            ];
            let expected = expected.map(|(port, is_six, reason)| (port, is_six, reason.to_owned()));
            ensure!(paths == expected, "{paths:?}");
            Ok(())
        })
    };
    let peer = |url: &str| {
        app.exec(["curl", "-sf", "-o", "/dev/null", "-w", "%{remote_ip}", "--max-time", "10", url])
    };
    for run in ["the paths of the first run", "those of the next one"] {
        are(run)?;
        for (vip, port, name) in [("172.17.0.1", 80, "four"), ("[fd00:d0c::1]", 81, "six")] {
            let answers = app.get(format!("{vip}:{port}")).times(20).run()?;
            assert_eq!((answers.from(name), answers.failed()), (20, 0), "{answers:?}");
            let url = format!("http://{vip}:{port}/");
            assert_eq!(
                format!("[{}]", peer(&url)?.trim()).replace("[172.17.0.1]", "172.17.0.1"),
                vip
            );
        }
        // The other family goes through the proxy.
        reaches(&app, "[fd00:d0c::1]:80", "four")?;
        reaches(&app, "172.17.0.1:81", "six")?;
        host.docker(["restart", "--time=1", "app"])?;
    }
    // What the kernel counted for a run is not lost with the run.
    counts(&embassy, "embassy_connections_started_total", 88)?;
    drop(four);
    Ok(())
}

/// Nothing answers, not even a refusal: connections that are being made then fail, but later ones must not.
#[test]
fn an_endpoint_whose_network_is_gone_costs_those_that_dialled_it_at_that_moment() -> Result<()> {
    const AT_ONCE: usize = 4;
    for (path, most) in [("kernel", AT_ONCE), ("proxy", 0)] {
        let (_host, webs, app) = three()?;
        let embassy = app.host().embassy(["--dnat", ETCD, &format!("--path={path}")])?;
        embassy.wait_ready(READY)?;
        reaches(&app, "172.17.0.1:80", "web-1")
            .or_else(|_| reaches(&app, "172.17.0.1:80", "web-2"))
            .or_else(|_| reaches(&app, "172.17.0.1:80", "web-3"))?;
        let reason = if path == "kernel" { "possible" } else { "not_asked" };
        takes(&embassy, "app", 80, path, reason)?;
        evenly(&app, 10, 1)?;
        // The registry still contains it.
        webs[2].kill()?;
        let answers = app.get("172.17.0.1:80").times(400).at_once(AT_ONCE).run()?;
        ensure!(answers.failed() <= most, "{path}: {answers:?}");
        assert_eq!(answers.answered() + answers.failed(), 400, "{answers:?}");
        assert_eq!(answers.from("web-3"), 0, "{answers:?}");
    }
    Ok(())
}
