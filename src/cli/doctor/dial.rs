//! Whether connections from a container arrive: one is begun in the container's own network. On a quiet host nothing else shows
//! it. Applications see nothing of it: the handshake is not finished.

#![expect(clippy::disallowed_methods, reason = "a command, which serves nobody")]

use std::{
    fs::File,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
    time::Duration,
};

use futures_util::future::join_all;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::{sync::oneshot, time::timeout};

use super::{
    super::client::Client,
    collect::{Network, PATIENCE},
};
use crate::{admin::api, config::Config, docker, model::Endpoint, proxy::probe};

/// A connection that was begun in a container's network.
#[derive(Debug)]
pub(super) struct Dial {
    pub(super) consumer: String,
    pub(super) to: SocketAddr,
    pub(super) result: Result<(), Failed>,
}

/// Why it was not accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Failed {
    Refused,
    /// Nothing came back.
    Silence,
    Other(String),
}

/// How long a connection is waited for. The kernel sends a lost packet again after a second.
const LIMIT: Duration = Duration::from_secs(3);

/// One connection for each network that has a consumer. None, if that is not allowed: it needs the capability SYS_ADMIN, and visible
/// processes.
pub(super) async fn dials(config: &Config, networks: &[Network]) -> Vec<Dial> {
    let asking = async {
        let client = config.admin.clone().and_then(|at| Client::new(at).ok())?;
        let status: api::Status = client.get("/v1/status", &[]).await.ok()?;
        let routes = client.all::<api::Route>("/v1/routes", &[]).await.ok()?;
        let (engine, _) = docker::client::Client::connect(&config.docker).await.ok()?;
        let mut found = Vec::new();
        for network in networks {
            let address = |route: &api::Route| route.address.parse::<IpAddr>().ok();
            let is_in = |route: &&api::Route| {
                address(route).is_some_and(|one| network.ranges.iter().any(|r| r.contains(&one)))
            };
            let Some((vip, _)) = &network.own else { continue };
            let is_vip = status.vips.iter().any(|one| one.parse() == Ok(*vip));
            let same_family = |route: &&api::Route| {
                address(route).is_some_and(|one| one.is_ipv4() == vip.is_ipv4())
            };
            let route = routes.iter().filter(is_in).find(same_family).filter(|_| is_vip);
            if let Some(route) = route
                && let Some(pid) = engine.process(&route.consumer_id).await
            {
                let to = SocketAddr::new(*vip, route.port);
                found.push((route.consumer.clone(), to, pid));
            }
        }
        Some(found)
    };
    let found = timeout(PATIENCE, asking).await.ok().flatten().unwrap_or_default();
    // All at once: each may take its whole time.
    let dials = found.into_iter().map(|(consumer, to, pid)| async move {
        let result = dial(pid, to).await?;
        Some(Dial { consumer, to, result })
    });
    join_all(dials).await.into_iter().flatten().collect()
}

/// Begins a connection in a process's network. `None` if that network may not be entered.
async fn dial(pid: i32, to: SocketAddr) -> Option<Result<(), Failed>> {
    let (send, answer) = oneshot::channel();
    // A thread of its own, which ends in the other network.
    let work = move || drop(send.send(begin_in(pid, to)));
    std::thread::Builder::new().name("dial".to_owned()).spawn(work).ok()?;
    answer.await.ok()?
}

fn begin_in(pid: i32, to: SocketAddr) -> Option<Result<(), Failed>> {
    let network = File::open(format!("/proc/{pid}/ns/net")).ok()?;
    move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network)).ok()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
    let result = runtime.block_on(async { timeout(LIMIT, probe(Endpoint(to), None)).await });
    Some(match result {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => Err(Failed::Refused),
        Ok(Err(error)) => Err(Failed::Other(error.to_string())),
        Err(_) => Err(Failed::Silence),
    })
}
