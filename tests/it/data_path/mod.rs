//! The data path, from a consumer in a container to an endpoint in another one.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::{Container, Embassy, Host, Process};

use crate::{
    READY, WAIT,
    support::{ETCD, metric},
};

mod balance;
mod drain;
mod ends;
mod limits;
mod load;
mod refusals;
mod routes;
mod takeover;
mod transfer;
mod workers;

/// A host with one consumer, `app`, and one container of endpoints. Each role is a server on its own port, registered as a
/// service, and bound to the same port.
struct Path {
    app: Container,
    endpoints: Container,
    embassy: Embassy,
    host: Host,
}

impl Path {
    fn new(roles: &[(u16, &str)]) -> Result<Self> {
        Self::with(&[], roles)
    }

    /// With further flags of embassy.
    fn with(flags: &[&str], roles: &[(u16, &str)]) -> Result<Self> {
        Self::on(Host::light()?, flags, roles)
    }

    fn on(host: Host, flags: &[&str], roles: &[(u16, &str)]) -> Result<Self> {
        let etcd = host.etcd()?;
        let serve = |(port, role): &(u16, &str)| format!("testbed peer {role} --port {port} &");
        let script: String = roles.iter().map(serve).chain(["wait".to_owned()]).collect();
        let endpoints = host.container("endpoints").cmd(["sh", "-c", &script]).start()?;
        let mut app = host.client("app");
        for (port, _) in roles {
            let service = service(*port);
            etcd.v3().put(&format!("{service}/one"), &format!("{}:{port}", endpoints.ip()?))?;
            app = app.env(&format!("BACKEND_{port}"), &format!("{service};{port}"));
        }
        let app = app.start()?;
        for (port, role) in roles {
            listens(&app, &format!("{}:{port}", endpoints.ip()?)).context((*role).to_owned())?;
        }
        let embassy = host.embassy(["--dnat", ETCD].iter().chain(flags))?;
        embassy.wait_ready(READY)?;
        Ok(Self { app, endpoints, embassy, host })
    }

    /// Runs a peer in `app`, with `HOST:PORT` as its second word.
    fn peer<const N: usize>(&self, role: &str, port: u16, rest: [&str; N]) -> Result<Value> {
        let target = vip(port);
        let words = ["testbed", "peer", role, &target].into_iter().chain(rest);
        let said = self.app.exec(words)?;
        serde_json::from_str(&said).with_context(|| format!("not JSON: {said:?}"))
    }
}

/// The service name of a role of [`Path`].
fn service(port: u16) -> String {
    format!("/services/{port}")
}

/// The address to which a consumer connects.
fn vip(port: u16) -> String {
    format!("172.17.0.1:{port}")
}

/// Waits until a program listens at an address.
fn listens(from: &Container, address: &str) -> Result<()> {
    testbed::eventually(WAIT, &format!("a server at {address}"), || {
        let probe = from.peer(["probe", address, "--wait-ms", "1"])?;
        ensure!(probe["outcome"] != "refused", "{probe}");
        Ok(())
    })
}

/// The number of connections with this outcome.
fn ended(embassy: &Embassy, outcome: &str) -> Result<u64> {
    metric(embassy, &format!("embassy_connections_total{{outcome=\"{outcome}\"}}"))
}

/// Waits until this many connections have this outcome.
fn wait_ended(embassy: &Embassy, outcome: &str, count: u64) -> Result<()> {
    testbed::eventually(WAIT, &format!("{count} times the outcome {outcome}"), || {
        let now = ended(embassy, outcome)?;
        ensure!(now == count, "{now} times");
        Ok(())
    })
}

/// Open connections of a consumer.
struct OpenConnections(Process);

impl OpenConnections {
    /// Opens `count` of them to a server that sends a greeting.
    fn open(app: &Container, name: &str, target: &str, count: usize) -> Result<Self> {
        let count = count.to_string();
        Ok(Self(app.spawn(name, ["testbed", "peer", "hold", target, "-n", &count])?))
    }

    /// The number of greetings from each server, once all connections were tried.
    fn greetings(&self) -> Result<Value> {
        testbed::eventually(WAIT, "the greetings", || {
            let all = self.said("greetings")?;
            Ok(all.first().context("none yet")?["greetings"].clone())
        })
    }

    /// How connections ended, with their greetings.
    fn ended(&self) -> Result<Vec<(String, String)>> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let all = self.said("ended")?;
        Ok(all.iter().map(|said| (text(&said["ended"]), text(&said["greeting"]))).collect())
    }

    fn said(&self, key: &str) -> Result<Vec<Value>> {
        let log = self.0.log();
        // The last line may be incomplete.
        let whole = log.rfind('\n').map_or("", |end| &log[..end]);
        let lines = whole
            .lines()
            .map(|line| serde_json::from_str(line).with_context(|| format!("not JSON: {line:?}")));
        let all = lines.collect::<Result<Vec<Value>>>()?;
        Ok(all.into_iter().filter(|said| said.get(key).is_some()).collect())
    }
}

/// A peer's line about a transfer.
fn line(sum: &Value) -> String {
    format!("{} {}\n", sum["bytes"], sum["sha256"].as_str().unwrap_or_default())
}
