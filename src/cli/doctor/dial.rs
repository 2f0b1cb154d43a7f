//! Tests whether connections from a container arrive, by starting one in the container's own network. On a host without
//! traffic, only this shows it. Applications do not notice it: the handshake is not completed.

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
    collect::{AdminFacts, ApiAnswer, HostFacts, PATIENCE},
};
use crate::{
    admin::api,
    config::Config,
    docker,
    model::{Endpoint, Protocol},
    path::Path,
    proxy::probe,
};

/// A connection that was started in a container's network.
#[derive(Debug)]
pub(super) struct Dial {
    pub(super) consumer: String,
    pub(super) to: SocketAddr,
    pub(super) result: Result<(), Failed>,
}

/// Why the connection was not accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Failed {
    Refused,
    /// There was no answer.
    Silence,
    Other(String),
}

/// How long a connection is waited for. The kernel sends a lost packet again after a second.
const LIMIT: Duration = Duration::from_secs(3);

/// What was tried.
#[derive(Debug, Default)]
pub(super) struct Dials {
    pub(super) tried: Vec<Dial>,
    /// Why some of it was not, or all.
    pub(super) not_tried: Option<NotTried>,
}

/// Why a connection was not begun, and what to do about it.
#[derive(Debug)]
pub(super) struct NotTried {
    pub(super) why: String,
    pub(super) fix: &'static str,
}

impl NotTried {
    fn new(why: impl Into<String>, fix: &'static str) -> Self {
        Self { why: why.into(), fix }
    }
}

/// A consumer's name, where it connects to, and its process.
type Wanted = (String, SocketAddr, i32);

/// One connection for each network that has a consumer. It needs the capability SYS_ADMIN, and visible processes.
pub(super) async fn dials(config: &Config, facts: &HostFacts) -> Dials {
    const AS_ROOT: &str =
        "run doctor as root on the host, or in embassy's container with docker exec --privileged";
    let wanted = match timeout(PATIENCE, wanted(config, facts)).await {
        Ok(Ok(wanted)) => wanted,
        Ok(Err(not_tried)) => return Dials { tried: Vec::new(), not_tried: Some(not_tried) },
        Err(_) => {
            let why =
                format!("embassy and the engine did not answer within {} s", PATIENCE.as_secs());
            let fix = "run doctor again when this host is less busy";
            return Dials { tried: Vec::new(), not_tried: Some(NotTried::new(why, fix)) };
        }
    };
    // All at once: each may take its whole time.
    let dials = wanted.into_iter().map(|(consumer, to, pid)| async move {
        let result = dial(pid, to).await;
        (consumer, to, result)
    });
    let (mut tried, mut not_tried) = (Vec::new(), None);
    for (consumer, to, result) in join_all(dials).await {
        match result {
            Some(result) => tried.push(Dial { consumer, to, result }),
            None => {
                let why = format!(
                    "the network of {consumer} cannot be entered from here, which needs SYS_ADMIN and visible processes"
                );
                not_tried = Some(NotTried::new(why, AS_ROOT));
            }
        }
    }
    Dials { tried, not_tried }
}

/// One consumer of each network that has any.
async fn wanted(config: &Config, facts: &HostFacts) -> Result<Vec<Wanted>, NotTried> {
    let unknown = "so it is not known which containers connect where";
    let no_api = |why: String| {
        NotTried::new(
            why,
            "give doctor the --admin of the embassy that captures here, and see to it that it answers",
        )
    };
    let client = match &facts.admin {
        None => return Err(no_api(format!("there is no admin API (--admin=off), {unknown}"))),
        Some(AdminFacts { answer: ApiAnswer::Answers, .. }) => {
            config.admin.clone().and_then(|at| Client::new(at).ok())
        }
        Some(AdminFacts { at, .. }) => {
            return Err(no_api(format!("no embassy answers at {at}, {unknown}")));
        }
    };
    let client = client.ok_or_else(|| no_api(format!("there is no admin API, {unknown}")))?;
    let failed = |error: anyhow::Error| no_api(format!("{error:#}, {unknown}"));
    let status: api::Status = client.get("/v1/status", &[]).await.map_err(failed)?;
    let routes = client.all::<api::Route>("/v1/routes", &[]).await.map_err(failed)?;
    let mut found = Vec::new();
    let mut consumers = Vec::new();
    for network in &facts.networks {
        let address = |route: &api::Route| route.address.parse::<IpAddr>().ok();
        let is_in = |route: &&api::Route| {
            address(route).is_some_and(|one| network.ranges.iter().any(|r| r.contains(&one)))
        };
        let Some((vip, _)) = &network.own else { continue };
        let is_vip = status.vips.iter().any(|one| one.parse() == Ok(*vip));
        let same_family =
            |route: &&api::Route| address(route).is_some_and(|one| one.is_ipv4() == vip.is_ipv4());
        let route = routes.iter().filter(is_in).filter(same_family).filter(|_| is_vip);
        let route = to_dial(route);
        consumers.extend(route.map(|route| (route, SocketAddr::new(*vip, route.port))));
    }
    if consumers.is_empty() {
        return Ok(found);
    }
    let engine = docker::client::Client::connect(&config.docker).await;
    let Ok((engine, _)) = engine else {
        let fix = "see the failure of the engine";
        return Err(NotTried::new("the engine does not answer, which knows their processes", fix));
    };
    for (route, to) in consumers {
        if let Some(pid) = engine.process(&route.consumer_id).await {
            found.push((route.consumer.clone(), to, pid));
        }
    }
    Ok(found)
}

/// The route to try: one of TCP, and if there is any, one whose connections the proxy takes.
fn to_dial<'a>(routes: impl Iterator<Item = &'a api::Route>) -> Option<&'a api::Route> {
    let tcp = routes.filter(|route| route.protocol == Protocol::Tcp);
    tcp.min_by_key(|route| route.path != Path::Proxy)
}

/// Starts a connection in a process's network. `None` if entering that network is not allowed.
async fn dial(pid: i32, to: SocketAddr) -> Option<Result<(), Failed>> {
    let (send, answer) = oneshot::channel();
    // A separate thread, because it stays in the other network.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::wait::tests::route;

    #[test]
    fn connections_of_tcp_are_tried_and_those_of_the_proxy_path_first() {
        let [udp, kernel, proxy] = [
            route("a", Protocol::Udp, Path::Kernel),
            route("b", Protocol::Tcp, Path::Kernel),
            route("c", Protocol::Tcp, Path::Proxy),
        ];
        let of = |routes: &[&api::Route]| {
            to_dial(routes.iter().copied()).map(|route| route.query.name.clone())
        };
        assert_eq!(of(&[&udp, &kernel, &proxy]).as_deref(), Some("c"));
        assert_eq!(of(&[&udp, &kernel]).as_deref(), Some("b"));
        assert_eq!(of(&[&udp]), None);
    }
}
