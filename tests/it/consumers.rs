//! Consumers and bindings as a real engine reports them: containers come and go, change their networks, share them, and
//! have invalid declarations.

use std::{fs, path::Path, process::Command, thread};

use anyhow::{Context, Result, ensure};
use testbed::{Container, Embassy, Host, Network};

use crate::{
    READY, WAIT,
    support::{ETCD, counts, ends, metric, reaches, says, web},
};

const VIP: &str = "172.17.0.1:80";

/// A host with two services, `red` and `blue`, and a ready embassy.
fn host_and_embassy() -> Result<(Host, Embassy)> {
    let host = Host::builder().ipv6(true).start()?;
    web(&host, "red")?;
    web(&host, "blue")?;
    let embassy = host.embassy(["--dnat", ETCD])?;
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

#[test]
fn a_container_is_served_while_it_runs_wherever_it_is() -> Result<()> {
    let host = Host::builder().ipv6(true).start()?;
    web(&host, "red")?;
    let net = host.network("net", ["--subnet=10.82.0.0/24"])?;
    let more =
        host.network("more", ["--ipv6", "--subnet=10.83.0.0/24", "--subnet=fd00:83::/64"])?;
    let early = host.client("early").env("BACKEND_RED", "/services/red;80").start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    // It ran before embassy. Both of its addresses work.
    reaches(&early, VIP, "red")?;
    reaches(&early, "[fd00:d0c::1]:80", "red")?;
    routes(&embassy, 2)?;
    early.remove()?;
    routes(&embassy, 0)?;

    let on_net = |name: &str| host.client(name).network(net.name());
    let app = on_net("app").env("BACKEND_RED", "/services/red;80").start()?;
    reaches(&app, VIP, "red")?;
    let first = app.ip()?;
    app.stop()?;
    routes(&embassy, 0)?;
    on_net("thief").arg(format!("--ip={first}")).start()?;
    app.start()?;
    assert_ne!(app.ip()?, first);
    reaches(&app, VIP, "red")?;
    app.kill()?;
    routes(&embassy, 0)?;
    app.start()?;
    routes(&embassy, 1)?;
    host.docker(["restart", "app"])?;
    reaches(&app, VIP, "red")?;
    routes(&embassy, 1)?;

    let gone = r#"embassy_connections_total{outcome="route_gone"}"#;
    let before = metric(&embassy, gone)?;
    let held = app.spawn("held", ["testbed", "peer", "recv", VIP])?;
    counts(&embassy, "embassy_connections_active", 1)?;
    host.docker(["rename", "app", "renamed"])?;
    app.connect(more.name())?;
    routes(&embassy, 3)?;
    reaches(&app, "10.83.0.1:80", "red")?;
    reaches(&app, "[fd00:83::1]:80", "red")?;
    app.disconnect(more.name())?;
    routes(&embassy, 1)?;
    // None of this affected the connection's own route.
    assert_eq!((metric(&embassy, gone)?, held.exited()?), (before, None));
    app.connect(more.name())?;
    app.disconnect(net.name())?;
    routes(&embassy, 2)?;
    counts(&embassy, gone, before + 1)?;
    reaches(&app, VIP, "red")
}

#[test]
fn a_shared_network_belongs_to_all_who_share_it() -> Result<()> {
    let (host, embassy) = host_and_embassy()?;
    let owner = host.client("owner").start()?;
    let side =
        host.client("side").network("container:owner").env("BACKEND_RED", "/services/red;80");
    let side = side.start()?;
    let third =
        host.client("third").network("container:side").env("BACKEND_BLUE", "/services/blue;81");
    let third = third.start()?;
    for each in [&owner, &side, &third] {
        reaches(each, VIP, "red")?;
        reaches(each, "172.17.0.1:81", "blue")?;
    }
    host.docker(["rename", "owner", "other-name"])?;
    reaches(&third, "172.17.0.1:81", "blue")?;

    // Its network ended with its run. Containers that shared it have none until they are restarted.
    host.docker(["restart", "other-name"])?;
    says(&embassy, &["binding skipped", "consumer=side", "restarted since"])?;
    says(&embassy, &["binding skipped", "consumer=third", "restarted since"])?;
    routes(&embassy, 0)?;
    host.docker(["restart", "side"])?;
    reaches(&side, VIP, "red")?;
    host.docker(["restart", "third"])?;
    reaches(&third, "172.17.0.1:81", "blue")?;

    owner.stop()?;
    says(&embassy, &["binding skipped", "consumer=side", "does not run"])?;
    routes(&embassy, 0)?;

    let skipped = metric(&embassy, r#"embassy_skipped_total{what="binding"}"#)?;
    host.client("hosty").network("host").env("BACKEND_RED", "/services/red;80").start()?;
    says(&embassy, &["binding skipped", "consumer=hosty", "net=host"])?;
    counts(&embassy, r#"embassy_skipped_total{what="binding"}"#, skipped + 1)
}

#[test]
fn what_cannot_be_read_is_reported_and_hides_nothing() -> Result<()> {
    let (host, embassy) = host_and_embassy()?;
    let app = host
        .client("app")
        .env("BACKEND_A", "/services/red;80")
        .env("BACKEND_B", "/services/blue;80")
        .env("BACKEND_WRONG", "foo bar;82")
        .env("BACKEND_PORT", "/services/blue;99999")
        .env("ASK_BLUE", "/services/blue;84")
        .label("embassy.backend.blue", "/services/blue;81")
        .label("embassy.backend.hidden", "/services/blue;80")
        .label("embassy.backend.wrong", "nothing")
        .start()?;
    reaches(&app, VIP, "red")?;
    reaches(&app, "172.17.0.1:81", "blue")?;
    ends(&app, "172.17.0.1:84", "refused")?;
    says(
        &embassy,
        &["binding skipped", "consumer=app", "BACKEND_B", "BACKEND_A already declares it"],
    )?;
    says(&embassy, &["binding skipped", "consumer=app", "BACKEND_WRONG", "the character ' '"])?;
    says(&embassy, &["binding skipped", "consumer=app", "BACKEND_PORT", "1 to 65535"])?;
    says(&embassy, &["binding skipped", "consumer=app", "embassy.backend.wrong", "no port"])?;
    // An invalid value may be a password.
    for value in ["foo bar", "99999", "nothing"] {
        assert!(!embassy.log().contains(value), "{value}");
    }
    // A label that a variable overrides is not counted, because this is intended.
    counts(&embassy, r#"embassy_skipped_total{what="binding"}"#, 4)?;
    assert_eq!(metric(&embassy, r#"embassy_skipped_total{what="binding"}"#)?, 4);

    embassy.terminate()?;
    embassy.wait(WAIT)?;
    let embassy = host.embassy(["--dnat", ETCD, "-prefix=ASK_"])?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:84", "blue")?;
    // Now no variable overrides this label.
    reaches(&app, VIP, "blue")
}

#[test]
fn a_recycled_address_never_reaches_its_former_owners_service() -> Result<()> {
    let (host, embassy) = host_and_embassy()?;
    let (host, net) = (&host, &host.network("net", ["--subnet=10.82.0.0/24"])?);
    // Twenty times: five for each of four addresses, so that the engine and embassy are busy at the same time.
    thread::scope(|scope| {
        let lanes: Vec<_> = (2..6)
            .map(|n| scope.spawn(move || (0..5).try_for_each(|_| recycle(host, net, n))))
            .collect();
        let join = |lane: thread::ScopedJoinHandle<'_, Result<()>>| {
            lane.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        lanes.into_iter().try_for_each(join)
    })?;
    routes(&embassy, 0)
}

/// One container takes over the address of another that has just ended.
fn recycle(host: &Host, net: &Network, n: u8) -> Result<()> {
    let same = |role: &str| {
        let container = host.client(&format!("{role}-{n}")).network(net.name());
        container.arg(format!("--ip=10.82.0.{n}"))
    };
    let a = same("former").env("BACKEND_RED", "/services/red;80").start()?;
    reaches(&a, VIP, "red")?;
    a.kill()?;
    // It connects from the start, before it can have been inspected.
    let words = format!("testbed peer get {VIP} -n 100; exec testbed peer idle");
    let b = same("latter")
        .env("BACKEND_BLUE", "/services/blue;80")
        .cmd(["sh", "-c", &words])
        .start()?;
    reaches(&b, VIP, "blue")?;
    a.remove()?;
    let answers = b.get(VIP).times(10).run()?;
    assert_eq!(answers.from("blue"), 10, "{answers:?}");
    let first = testbed::eventually(WAIT, "the first answers", || {
        let log = b.log()?;
        ensure!(log.contains("slowest_ms"), "{log:?}");
        Ok(log)
    })?;
    assert!(!first.contains("red"), "{first}");
    b.remove()
}

#[test]
fn an_engine_that_is_killed_takes_nobody_along() -> Result<()> {
    let host = Host::builder().docker_args(["--live-restore"]).start()?;
    web(&host, "red")?;
    let app = host.client("app").env("BACKEND_RED", "/services/red;80").start()?;
    let again = host
        .client("again")
        .env("BACKEND_RED", "/services/red;81")
        .arg("--restart=always")
        .start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    reaches(&app, VIP, "red")?;
    reaches(&again, "172.17.0.1:81", "red")?;
    let first_run = again.pid()?;
    let mut curl = app.command("curl")?;
    curl.args(["--silent", "--fail", "--max-time", "5", "http://172.17.0.1/"]);

    host.docker_daemon().kill()?;
    says(
        &embassy,
        &["source does not answer; its last data stays in use", "source=\"provider\"", "docker"],
    )?;
    counts(&embassy, "embassy_source_failures_total{source=\"provider\"}", 2)?;
    assert_eq!(testbed::output(&mut curl)?, "red");
    // This container ends while the engine is down, and has another run after the engine is back.
    host.run("kill", ["-KILL", &first_run.to_string()])?;
    host.docker_daemon().start()?;
    let late = host.client("late").env("BACKEND_RED", "/services/red;80").start()?;
    reaches(&late, VIP, "red")?;
    assert_eq!(testbed::output(&mut curl)?, "red");
    testbed::eventually(WAIT, "another run", || {
        let run = again.pid()?;
        ensure!(run != first_run, "it is the first one");
        Ok(())
    })?;
    reaches(&again, "172.17.0.1:81", "red")?;
    says(&embassy, &["source is back", "provider"])?;

    // A hanging engine still accepts connections, and is noticed nevertheless.
    let lost = metric(&embassy, r#"embassy_source_failures_total{source="provider"}"#)?;
    host.docker_daemon().pause()?;
    counts(&embassy, r#"embassy_source_failures_total{source="provider"}"#, lost + 1)?;
    assert_eq!(testbed::output(&mut curl)?, "red");
    host.docker_daemon().resume()?;
    let later = host.client("later").env("BACKEND_RED", "/services/red;80").start()?;
    reaches(&later, VIP, "red")
}

#[test]
fn an_engine_is_reached_by_tcp() -> Result<()> {
    let host = Host::builder().docker_args(["--host=tcp://127.0.0.1:2375"]).start()?;
    host.etcd()?;
    followed(&host, host.embassy(["--dnat", ETCD, "-docker=tcp://127.0.0.1:2375"])?)
}

#[test]
fn an_engine_is_reached_by_tls() -> Result<()> {
    let folder = tempfile::tempdir()?;
    certificates(folder.path())?;
    let file = |name: &str| folder.path().join(name).display().to_string();
    let host = Host::builder()
        .docker_args([
            "--host=tcp://127.0.0.1:2376".to_owned(),
            "--tlsverify".to_owned(),
            format!("--tlscacert={}", file("ca.pem")),
            format!("--tlscert={}", file("server-cert.pem")),
            format!("--tlskey={}", file("server-key.pem")),
        ])
        .start()?;
    host.etcd()?;
    let mut embassy = host.embassy_command(["--dnat", ETCD])?;
    embassy.env("DOCKER_HOST", "tcp://127.0.0.1:2376");
    embassy.env("DOCKER_TLS_VERIFY", "1").env("DOCKER_CERT_PATH", folder.path());
    followed(&host, host.embassy_from(embassy)?)?;

    // Without our certificate the engine refuses, which is logged.
    let embassy = host.embassy(["-docker=tcp://127.0.0.1:2376", ETCD])?;
    says(&embassy, &["source has not answered yet", "tcp://127.0.0.1:2376"])
}

fn followed(host: &Host, embassy: Embassy) -> Result<()> {
    embassy.wait_ready(READY)?;
    web(host, "red")?;
    let app: Container = host.client("app").env("BACKEND_RED", "/services/red;80").start()?;
    reaches(&app, VIP, "red")
}

/// A CA, a client certificate signed by it, and a self-signed certificate for an engine on 127.0.0.1, as OpenSSL creates it
/// by default. The files are named as the docker command expects them.
fn certificates(folder: &Path) -> Result<()> {
    fs::write(folder.join("client.ext"), "extendedKeyUsage=clientAuth\n")?;
    let script = "
        exec 2>&1
        key='-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes'
        openssl req -x509 $key -days 2 -subj /CN=ca -keyout ca-key.pem -out ca.pem
        sign() {
            openssl req $key -subj /CN=$1 -keyout $2 -out $1.csr
            openssl x509 -req -days 2 -in $1.csr -CA ca.pem -CAkey ca-key.pem -CAcreateserial -extfile $1.ext -out $3
        }
        sign client key.pem cert.pem
        openssl req -x509 $key -days 2 -subj /CN=server -addext subjectAltName=IP:127.0.0.1 \\
            -keyout server-key.pem -out server-cert.pem
        cat server-cert.pem >> ca.pem";
    let mut openssl = Command::new("sh");
    openssl.args(["-ec", script]).current_dir(folder);
    testbed::output(&mut openssl).context("openssl").map(drop)
}

#[test]
fn the_end_of_a_container_needs_no_news_from_the_engine() -> Result<()> {
    let (host, embassy) = host_and_embassy()?;
    let app = host.client("app").env("BACKEND_RED", "/services/red;80").start()?;
    reaches(&app, VIP, "red")?;
    routes(&embassy, 2)?;

    // A hanging engine sends no event, but the kernel reports the end.
    let pid = app.inspect("{{.State.Pid}}")?;
    host.docker_daemon().pause()?;
    // Longer than a ping's timeout, so that no session with the engine is left.
    counts(&embassy, "embassy_source_failures_total{source=\"provider\"}", 1)?;
    host.run("kill", ["-KILL", &pid])?;
    routes(&embassy, 0)?;
    ensure!(embassy.log().contains("route gone"), "{}", embassy.log());
    host.docker_daemon().resume()
}
