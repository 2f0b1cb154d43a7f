//! embassy with minimal rights: no root, one capability if it writes rules, none if it does not, and only GET requests to
//! the engine.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::{UnixListener, UnixStream},
    sync::{Arc, Mutex},
    thread,
};

use anyhow::{Context, Result, ensure};
use testbed::{Container, ContainerBuilder, Host, embassy_program, output};

use crate::{
    READY, WAIT,
    support::{ETCD, reaches, says, web},
};

#[test]
fn an_image_needs_one_capability_and_no_root_by_nft() -> Result<()> {
    one_capability("--firewall=nft")
}

#[test]
fn an_image_needs_one_capability_and_no_root_by_iptables() -> Result<()> {
    one_capability("--firewall=iptables")
}

fn one_capability(firewall: &str) -> Result<()> {
    let (host, app) = host()?;
    image(&host)?;
    let embassy = bare(&host, "embassy")?
        .arg("--cap-add=NET_ADMIN")
        .cmd(["--dnat", ETCD, firewall])
        .start()?;
    reaches(&app, "172.17.0.1:80", "web").with_context(|| embassy.log().unwrap_or_default())?;
    // Its commands are in the container too.
    let said = embassy.exec(["embassy", "status"])?;
    ensure!(said.contains("ready: embassy") && said.contains(", in place"), "{said}");
    let said = embassy.exec(["embassy", "explain", "app", "80"])?;
    ensure!(said.starts_with("ok: ") && said.contains("dials      172.17.0.1:80"), "{said}");
    // Without flags doctor uses those of the process, which it can see.
    let said = embassy.exec(["embassy", "doctor"])?;
    ensure!(said.contains("checked with the flags") && said.contains(firewall), "{said}");
    // It runs as another user, with one capability, and with no way to gain more.
    let status = host.run("cat", [format!("/proc/{}/status", embassy.pid()?)])?;
    let field = |name: &str| {
        let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        anyhow::Ok(value.with_context(|| format!("{name} in {status}"))?.trim().to_owned())
    };
    assert_eq!(field("Uid")?, "59990\t59990\t59990\t59990");
    let net_admin = format!("{:016x}", 1 << 12);
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(field(set)?, net_admin, "{set}");
    }
    // Programs get it only from the thread that starts them, while it starts them. A look may happen in that moment, but
    // the next one does not.
    testbed::eventually(WAIT, "no thread to pass the capability on", || {
        for task in host.run("ls", [format!("/proc/{}/task", embassy.pid()?)])?.split_whitespace() {
            let status =
                host.run("cat", [format!("/proc/{}/task/{task}/status", embassy.pid()?)])?;
            ensure!(status.contains("CapAmb:\t0000000000000000\n"), "{status}");
            ensure!(status.contains("CapInh:\t0000000000000000\n"), "{status}");
        }
        Ok(())
    })?;
    embassy.stop()?;
    assert_eq!(embassy.inspect("{{.State.ExitCode}}")?, "0", "{}", embassy.log()?);
    let rules = host.run("sh", ["-c", "nft list ruleset; iptables-save"])?;
    ensure!(!rules.to_lowercase().contains("embassy"), "{rules}");
    Ok(())
}

#[test]
fn with_a_rule_of_ones_own_it_needs_no_capability() -> Result<()> {
    let (host, app) = host()?;
    image(&host)?;
    let rule = ["-t", "nat", "-I", "PREROUTING", "-p", "tcp", "-d", "172.17.0.1", "--dport", "80"];
    host.run("iptables", [&rule[..], &["-j", "REDIRECT", "--to-ports", "9999"]].concat())?;
    let embassy = bare(&host, "embassy")?.cmd([ETCD]).start()?;
    reaches(&app, "172.17.0.1:80", "web").with_context(|| embassy.log().unwrap_or_default())?;
    embassy.stop()?;

    // If it needs the capability, it reports that and ends.
    let embassy = bare(&host, "no-capability")?.cmd(["--dnat", ETCD]).start()?;
    testbed::eventually(WAIT, "embassy to end", || {
        let code = embassy.inspect("{{.State.ExitCode}} {{.State.Running}}")?;
        ensure!(code == "1 false", "{code}");
        Ok(())
    })?;
    let log = embassy.log()?;
    ensure!(log.contains("start its container with --cap-add NET_ADMIN"), "{log}");
    ensure!(log.contains("ermi"), "permission, or operation not permitted: {log}");
    Ok(())
}

#[test]
fn the_engine_is_asked_by_get_alone() -> Result<()> {
    let host = Host::start()?;
    host.web("web").label("SERVICE_80_NAME", "web").start()?;
    let app = host.client("app").env("BACKEND_WEB", "web;80").start()?;
    let gate = Gate::start(&host)?;
    let mut command = host.embassy_command(["--dnat", "-discovery=docker://", "-resync=2"])?;
    command.env("DOCKER_HOST", format!("unix://{}", gate.path));
    let embassy = host.embassy_from(command)?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    // Containers and networks are added and removed, a container connects as its first act, and the sources are read again.
    let net = host.network("net", [""; 0])?;
    let second = host.client("second").network(net.name()).env("BACKEND_WEB", "web;80").start()?;
    reaches(&second, "172.17.0.1:80", "web")?;
    second.connect("bridge")?;
    second.remove()?;
    net.remove()?;
    let first_act = ["run", "--rm", "-e", "BACKEND_WEB=web;80", "testbed"];
    let curl = ["curl", "-s", "-m", "10", "http://172.17.0.1/"];
    assert_eq!(host.docker([&first_act[..], &curl].concat())?, "web");
    let asked = |path: &str| gate.asked().iter().filter(|line| line.contains(path)).count();
    testbed::eventually(WAIT, "a resync", || {
        ensure!(asked("/containers/json") > 4, "{:?}", gate.asked());
        Ok(())
    })?;
    assert_eq!(asked("/events"), 1, "a re-read is no new session: {:?}", gate.asked());
    let others: Vec<_> = gate.asked().into_iter().filter(|l| !l.starts_with("GET ")).collect();
    ensure!(others.is_empty(), "{others:?}");
    ensure!(!embassy.log().contains("lost"), "{}", embassy.log());
    says(&embassy, &["new route"])
}

/// Docker gives a new volume the owner and mode of the folder in the image. Root without DAC_OVERRIDE may write only files
/// that belong to it or its group.
#[test]
fn the_state_is_kept_in_a_named_volume_by_the_images_user_and_by_root_without_capabilities()
-> Result<()> {
    let (host, app) = host()?;
    image(&host)?;
    for (name, user) in [("own", None), ("root", Some("--user=0:0"))] {
        let volume = format!("--volume=state-{name}:/var/lib/embassy");
        let start = |n: usize| {
            let embassy = bare(&host, &format!("{name}-{n}"))?.args(user).arg(&volume);
            embassy.arg("--cap-add=NET_ADMIN").cmd(["--dnat", ETCD, "--firewall=nft"]).start()
        };
        let first = start(1)?;
        reaches(&app, "172.17.0.1:80", "web").with_context(|| first.log().unwrap_or_default())?;
        let kept = || host.docker(["run", "--rm", &volume, "testbed", "ls", "/var/lib/embassy"]);
        testbed::eventually(WAIT, "the table in the volume", || {
            let kept = kept()?;
            ensure!(kept.lines().any(|file| file == "table-9999"), "{kept:?}");
            Ok(())
        })?;
        first.remove()?;
        // Another container with the same volume continues with it, even while nothing answers.
        host.etcd_daemon().stop()?;
        let second = start(2)?;
        reaches(&app, "172.17.0.1:80", "web").with_context(|| second.log().unwrap_or_default())?;
        let log = second.log()?;
        ensure!(!log.contains("state file"), "{log}");
        second.remove()?;
        host.etcd_daemon().start()?;
    }
    Ok(())
}

/// A host with a service in etcd and a consumer that asks for it.
pub(crate) fn host() -> Result<(Host, Container)> {
    let host = Host::start()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    Ok((host, app))
}

/// Builds the image with iptables on a base that was made here.
pub(crate) fn image(host: &Host) -> Result<()> {
    let programs = ["nft", "iptables", "iptables-save", "iptables-restore", "setcap"];
    let paths = programs.map(|name| output(std::process::Command::new("which").arg(name)));
    let paths = paths.into_iter().collect::<Result<Vec<_>>>()?;
    let mut base: Vec<std::path::PathBuf> = paths.into_iter().map(Into::into).collect();
    // For the libraries that it needs.
    base.push(embassy_program()?);
    host.image_with("base", &base, &["/usr/lib/x86_64-linux-gnu/xtables"])?;
    let context = host.dir().join("image");
    std::fs::create_dir_all(&context)?;
    std::fs::copy(embassy_program()?, context.join("embassy"))?;
    let dockerfile = concat!(env!("CARGO_MANIFEST_DIR"), "/dist/iptables.Dockerfile");
    let mut build = host.docker_command(["build", "--build-arg=BASE=base", "--tag=embassy", "-f"]);
    output(build.arg(dockerfile).arg(context)).map(drop)
}

/// The image's container on the host's network, with nothing that it is not given.
pub(crate) fn bare(host: &Host, name: &str) -> Result<ContainerBuilder> {
    let group = host.run("stat", ["-c", "%g", "/var/run/docker.sock"])?;
    let container = host.container(name).image("embassy").network("host").args([
        "--cap-drop=ALL",
        "--pid=host",
        "--stop-signal=TERM",
        "--volume=/var/run/docker.sock:/var/run/docker.sock",
    ]);
    Ok(container.arg(format!("--group-add={group}")))
}

/// A socket that passes GET requests on to the engine and refuses all others, as socket proxies do. It records the
/// requests.
struct Gate {
    path: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Gate {
    fn start(host: &Host) -> Result<Self> {
        let path = host.dir().join("get-only.sock");
        let listener = UnixListener::bind(&path)?;
        let engine = host.docker_url().trim_start_matches("unix://").to_owned();
        let asked = Arc::<Mutex<Vec<String>>>::default();
        let gate = Self { path: path.display().to_string(), asked: asked.clone() };
        // The threads end with the test's process.
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (engine, asked) = (engine.clone(), asked.clone());
                thread::spawn(move || pass(client, &engine, &asked));
            }
        });
        Ok(gate)
    }

    /// The first lines of all requests.
    fn asked(&self) -> Vec<String> {
        self.asked.lock().map(|asked| asked.clone()).unwrap_or_default()
    }
}

/// Passes the requests of one connection on. A GET has no body, so only heads arrive.
fn pass(mut client: UnixStream, engine: &str, asked: &Mutex<Vec<String>>) -> std::io::Result<()> {
    let mut server = UnixStream::connect(engine)?;
    let (mut answers, mut back) = (server.try_clone()?, client.try_clone()?);
    thread::spawn(move || {
        let _ = std::io::copy(&mut answers, &mut back);
        let _ = back.shutdown(std::net::Shutdown::Both);
    });
    let mut first = true;
    for line in BufReader::new(client.try_clone()?).split(b'\n') {
        let mut line = line?;
        line.push(b'\n');
        if first {
            let text = String::from_utf8_lossy(&line).trim().to_owned();
            let refused = !text.starts_with("GET ");
            if let Ok(mut asked) = asked.lock() {
                asked.push(text);
            }
            if refused {
                client.write_all(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")?;
                break;
            }
        }
        first = line == b"\r\n";
        server.write_all(&line)?;
    }
    server.shutdown(std::net::Shutdown::Both)
}
