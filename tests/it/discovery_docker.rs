//! `docker://`, with a real engine.

use anyhow::Result;
use embassy::{
    discovery::{Discoveries, Options},
    docker::Engine,
};
use testbed::Host;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, UnixStream},
};

use crate::{
    READY, WAIT,
    followed::{Followed, list, rejected, settings},
    support::{ends, reaches},
};

/// A bare `docker://` for a host's engine.
fn discoveries(host: &Host, healthy_only: bool) -> Discoveries {
    let docker = Engine::parse(&host.docker_url(), None).expect("the URL of an engine");
    let settings = Options { healthy_only, docker, ..settings() };
    Discoveries::parse(&["docker://".to_owned()], &settings).expect("a URI that is right")
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_are_followed() -> Result<()> {
    let host = Host::start()?;
    let docker = discoveries(&host, true);
    let one =
        host.web("one").env("SERVICE_80_NAME", "web").label("SERVICE_TAGS", "prod").start()?;
    let web = Followed::of(&docker, "web;80");
    let prod = Followed::of(&docker, "web[prod];80");
    web.sees(&["172.17.0.2:80"]).await;
    prod.sees(&["172.17.0.2:80"]).await;

    let two = host.web("two").label("SERVICE_80_NAME", "web").start()?;
    web.sees(&["172.17.0.2:80", "172.17.0.3:80"]).await;
    host.docker(["pause", "one"])?;
    web.sees(&["172.17.0.3:80"]).await;
    host.docker(["unpause", "one"])?;
    web.sees(&["172.17.0.2:80", "172.17.0.3:80"]).await;

    one.kill()?;
    web.sees(&["172.17.0.3:80"]).await;
    prod.sees(&[]).await;
    one.start()?;
    web.sees(&["172.17.0.2:80", "172.17.0.3:80"]).await;
    prod.sees(&["172.17.0.2:80"]).await;
    two.remove()?;
    web.sees(&["172.17.0.2:80"]).await;

    // The first network by name is used.
    host.network("a-net", ["--subnet=10.7.0.0/24"])?;
    one.connect("a-net")?;
    web.sees(&["10.7.0.2:80"]).await;
    one.disconnect("bridge")?;
    one.disconnect("a-net")?;
    // It is removed at once. The reason is known after the inspection.
    web.sees(&[]).await;
    let known = web.until("the reason", |known| !rejected(known).is_empty()).await;
    assert_eq!(rejected(&known), ["container one:80: no address: it is on no network"]);
    one.connect("bridge")?;
    web.sees(&["172.17.0.2:80"]).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_is_used_as_soon_and_as_long_as_it_is_healthy() -> Result<()> {
    let host = Host::start()?;
    let one = host
        .web("one")
        .env("SERVICE_NAME", "web")
        .args(["--expose=80", "--health-cmd=test -e /healthy", "--health-interval=100ms"])
        .args(["--health-retries=1"])
        .start()?;
    let web = Followed::of(&discoveries(&host, true), "web;80");
    let unfiltered = Followed::of(&discoveries(&host, false), "web;80");
    unfiltered.sees(&["172.17.0.2:80"]).await;
    web.sees(&[]).await;
    one.exec(["touch", "/healthy"])?;
    web.sees(&["172.17.0.2:80"]).await;
    one.exec(["rm", "/healthy"])?;
    web.sees(&[]).await;
    unfiltered.sees(&["172.17.0.2:80"]).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn losing_the_engine_takes_nothing_away() -> Result<()> {
    let host = Host::builder().docker_args(["--live-restore"]).start()?;
    let docker = discoveries(&host, true);
    host.web("one").env("SERVICE_80_NAME", "web").start()?;
    let web = Followed::of(&docker, "web;80");
    web.sees(&["172.17.0.2:80"]).await;

    host.docker_daemon().kill()?;
    let known = web.fails(&host.docker_url()).await;
    assert_eq!(list(&known).unwrap(), ["172.17.0.2:80"]);
    // A later query gets what was already known.
    let late = Followed::of(&docker, "web;80");
    let known = late.fails(&host.docker_url()).await;
    assert_eq!(list(&known).unwrap(), ["172.17.0.2:80"]);

    host.docker_daemon().start()?;
    web.sees(&["172.17.0.2:80"]).await;
    host.web("two").env("SERVICE_80_NAME", "web").start()?;
    web.sees(&["172.17.0.2:80", "172.17.0.3:80"]).await;
    late.sees(&["172.17.0.2:80", "172.17.0.3:80"]).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_hangs_is_noticed() -> Result<()> {
    let host = Host::start()?;
    let web = Followed::of(&discoveries(&host, true), "web;80");
    web.sees(&[]).await;
    host.docker_daemon().pause()?;
    // Noticed by the ping, or by another request that was running.
    web.fails("of unix://").await;
    host.docker_daemon().resume()?;
    host.web("one").env("SERVICE_80_NAME", "web").start()?;
    web.sees(&["172.17.0.2:80"]).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_starts_during_the_listing_is_seen() -> Result<()> {
    let host = Host::start()?;
    host.load_image()?;
    let docker = discoveries(&host, true);
    let start = |i: u8| {
        let container = host.web(&format!("web-{i}")).env("SERVICE_80_NAME", "web");
        std::thread::spawn(move || container.start())
    };
    let starting: Vec<_> = (0..6).map(start).collect();
    let mut expected = vec![];
    let mut followed = vec![];
    for thread in starting {
        followed.push(Followed::of(&discoveries(&host, true), "web;80"));
        followed.push(Followed::of(&docker, "web;80"));
        expected.push(format!("{}:80", thread.join().unwrap()?.ip()?));
    }
    expected.sort();
    let expected: Vec<_> = expected.iter().map(String::as_str).collect();
    for web in followed {
        web.sees(&expected).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn another_engine_is_used_by_its_published_ports() -> Result<()> {
    let host = Host::start()?;
    // The engine's socket, made available at a loopback address.
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let uri = format!("docker://{}", listener.local_addr()?);
    let socket = host.docker_url().trim_start_matches("unix://").to_owned();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let socket = socket.clone();
            tokio::spawn(async move {
                let mut engine = UnixStream::connect(socket).await?;
                copy_bidirectional(&mut client, &mut engine).await
            });
        }
    });

    let web = Followed::new(&uri, "web;80");
    web.sees(&[]).await;
    let publish = "--publish=8080:80";
    host.web("one").env("SERVICE_NAME", "web").arg(publish).arg("--expose=443").start()?;
    web.sees(&["127.0.0.1:8080"]).await;
    host.web("two").env("SERVICE_80_NAME", "web").start()?;
    let known = web.until("the second one rejected", |known| !rejected(known).is_empty()).await;
    assert_eq!(rejected(&known), ["container two:80: the port is not published"]);
    assert_eq!(list(&known).unwrap(), ["127.0.0.1:8080"]);
    Ok(())
}

#[test]
fn a_single_host_needs_no_registry() -> Result<()> {
    let host = Host::start()?;
    for name in ["web-1", "web-2"] {
        host.web(name).env("SERVICE_80_NAME", "web").start()?;
    }
    // On the host's own network, on a port that it declares itself.
    let words = ["http", "--name", "web-3", "--port", "8081"];
    let third = host.server("web-3", words).network("host").env("SERVICE_8081_NAME", "web");
    third.start()?;
    let embassy = host.embassy(["--dnat", "-provider=docker", "-discovery=docker://"])?;
    embassy.wait_ready(READY)?;
    let app = host.client("app").env("BACKEND_WEB", "web;80").start()?;
    testbed::eventually(WAIT, "all three to answer", || {
        let answers = app.get("172.17.0.1:80").times(6).run()?;
        anyhow::ensure!(
            ["web-1", "web-2", "web-3"].iter().all(|name| answers.from(name) == 2),
            "{answers:?}"
        );
        Ok(())
    })?;
    // Provider and discovery share one follower of the engine.
    let listeners = host.docker(["info", "--format={{.NEventsListener}}"])?;
    assert_eq!(listeners.trim(), "1");
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", embassy.pid()))?;
    let targets = descriptors.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok());
    let watched = targets.filter(|target| target.to_string_lossy().contains("pidfd")).count();
    assert_eq!(watched, 4, "each container's process, once");
    Ok(())
}

/// The first network by name is a macvlan: the kernel isolates it from the host, so embassy reaches no container there, and
/// connections from there do not arrive.
#[test]
fn a_container_on_a_macvlan_and_on_a_bridge_is_used_and_served_on_the_bridge() -> Result<()> {
    let host = Host::start()?;
    let lan = ["network", "create", "--driver=macvlan", "--opt=parent=eth0"];
    host.docker(lan.into_iter().chain(["--subnet=192.168.77.0/24", "a-lan"]))?;
    let web = host.web("web").env("SERVICE_80_NAME", "web").network("a-lan").start()?;
    let lone = host.web("lone").env("SERVICE_80_NAME", "lone").network("a-lan").start()?;
    let app = host.client("app").env("BACKEND_WEB", "web;80").env("BACKEND_LONE", "lone;81");
    let app = app.network("a-lan").start()?;
    let embassy = host.embassy(["--dnat", "-provider=docker", "-discovery=docker://"])?;
    embassy.wait_ready(READY)?;
    for one in [&web, &app] {
        one.connect("bridge")?;
    }
    reaches(&app, "172.17.0.1:80", "web")?;
    let answers = app.get("172.17.0.1:80").times(10).run()?;
    anyhow::ensure!(answers.from("web") == 10, "{answers:?}");
    // It cannot be reached, and the reason is reported.
    let explained = embassy.admin("/v1/explain?consumer=app&port=81")?.ok()?;
    anyhow::ensure!(
        explained.contains("not reachable from this host on its networks (a-lan)"),
        "{explained}"
    );
    ends(&app, "172.17.0.1:81", "reset")?;
    drop(lone);
    Ok(())
}
