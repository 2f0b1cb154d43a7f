//! `docker://`, with a real engine.

use std::{sync::Arc, time::Duration};

use anyhow::Result;
use embassy::{
    discovery::{Endpoints, Query, docker::Docker},
    docker::Engine,
    source::{Answers, Known, Publisher},
};
use testbed::Host;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, UnixStream},
    time::timeout,
};

/// How long anything may take that is to happen soon.
const SOON: Duration = Duration::from_secs(30);
/// Longer than any test: what is seen is seen by events.
const RESYNC: Duration = Duration::from_secs(600);

struct Followed(Answers<Endpoints>);

impl Followed {
    fn new(docker: &Docker, descriptor: &str) -> Self {
        let descriptor: embassy::descriptor::Descriptor = descriptor.parse().unwrap();
        let query = Query {
            via: "docker".into(),
            service: descriptor.service,
            tags: descriptor.tags,
            dc: None,
            port: None,
        };
        let (publish, answers) = Publisher::new(Arc::default());
        tokio::spawn(docker.clone().watch(query, publish, RESYNC));
        Self(answers)
    }

    async fn sees(&self, endpoints: &[&str]) -> Known<Endpoints> {
        let text = |known: &Known<Endpoints>| -> Option<Vec<String>> {
            Some(known.value.as_ref()?.list.iter().map(ToString::to_string).collect())
        };
        self.until(&format!("{endpoints:?}"), |known| {
            known.error.is_none() && text(known).is_some_and(|list| list == endpoints)
        })
        .await
    }

    async fn until(
        &self,
        wanted: &str,
        holds: impl Fn(&Known<Endpoints>) -> bool,
    ) -> Known<Endpoints> {
        match timeout(SOON, self.0.clone().wait_for(holds)).await {
            Ok(known) => known.expect("the watch lives").clone(),
            Err(_) => panic!("wanted {wanted}; known is {:#?}", self.0.borrow()),
        }
    }
}

fn discovery(host: &Host, healthy_only: bool) -> Docker {
    Docker::new(Engine::parse(&host.docker_url(), None).unwrap(), healthy_only, true)
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_are_followed() -> Result<()> {
    let host = Host::start()?;
    let docker = discovery(&host, true);
    let one =
        host.web("one").env("SERVICE_80_NAME", "web").label("SERVICE_TAGS", "prod").start()?;
    let web = Followed::new(&docker, "web;80");
    let prod = Followed::new(&docker, "web[prod];80");
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

    // The first network by name is the one that counts.
    host.network("a-net", ["--subnet=10.7.0.0/24"])?;
    one.connect("a-net")?;
    web.sees(&["10.7.0.2:80"]).await;
    one.disconnect("bridge")?;
    one.disconnect("a-net")?;
    let known = web.sees(&[]).await;
    let rejected = &known.value.unwrap().rejected[0];
    assert_eq!(
        (rejected.what.as_str(), rejected.reason.as_str()),
        ("container one:80", "no address: it is on no network")
    );
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
    let web = Followed::new(&discovery(&host, true), "web;80");
    let unfiltered = Followed::new(&discovery(&host, false), "web;80");
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
    let docker = discovery(&host, true);
    host.web("one").env("SERVICE_80_NAME", "web").start()?;
    let web = Followed::new(&docker, "web;80");
    web.sees(&["172.17.0.2:80"]).await;

    host.docker_daemon().kill()?;
    let known = web.until("an error", |known| known.error.is_some()).await;
    assert_eq!(known.value.unwrap().list.len(), 1);
    // Who asks only now gets what was known.
    let late = Followed::new(&docker, "web;80");
    let known = late.until("an error", |known| known.error.is_some()).await;
    assert_eq!(known.value.unwrap().list.len(), 1);

    host.docker_daemon().start()?;
    web.sees(&["172.17.0.2:80"]).await;
    host.web("two").env("SERVICE_80_NAME", "web").start()?;
    web.sees(&["172.17.0.2:80", "172.17.0.3:80"]).await;
    late.sees(&["172.17.0.2:80", "172.17.0.3:80"]).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_starts_during_the_listing_is_seen() -> Result<()> {
    let host = Host::start()?;
    host.load_image()?;
    let docker = discovery(&host, true);
    let start = |i: u8| {
        let container = host.web(&format!("web-{i}")).env("SERVICE_80_NAME", "web");
        std::thread::spawn(move || container.start())
    };
    let starting: Vec<_> = (0..6).map(start).collect();
    let mut expected = vec![];
    let mut followed = vec![];
    for thread in starting {
        followed.push(Followed::new(&discovery(&host, true), "web;80"));
        followed.push(Followed::new(&docker, "web;80"));
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
    // The engine's socket, as an address of loopback.
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("tcp://{}", listener.local_addr()?);
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

    let docker = Docker::new(Engine::parse(&url, None).unwrap(), true, false);
    let web = Followed::new(&docker, "web;80");
    web.sees(&[]).await;
    let publish = "--publish=8080:80";
    host.web("one").env("SERVICE_NAME", "web").arg(publish).arg("--expose=443").start()?;
    web.sees(&["127.0.0.1:8080"]).await;
    host.web("two").env("SERVICE_80_NAME", "web").start()?;
    web.until("the second one rejected", |known| {
        known.value.as_ref().is_some_and(|answer| answer.rejected.len() == 1)
    })
    .await;
    Ok(())
}
