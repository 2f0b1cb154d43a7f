//! The host's Consul agent.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::HOST_ADDRESS;
use crate::daemon::Daemon;
use crate::exec::output;
use crate::host::{Host, Response};
use crate::image::{cache_dir, which};
use crate::space::Space;

/// The only agent of its own datacentre: node `testbed`, with the host's address.
#[derive(Debug, Clone)]
pub struct Consul {
    host: Host,
}

pub(crate) fn daemon(space: &Arc<Space>, extra: &[OsString]) -> Daemon {
    let mut args: Vec<OsString> =
        ["agent", "-dev", "-node=testbed", "-bind=0.0.0.0", "-client=0.0.0.0"]
            .map(Into::into)
            .into();
    args.push(format!("-advertise={HOST_ADDRESS}").into());
    args.extend_from_slice(extra);
    Daemon::new(space.clone(), "consul", consul_program(), args, |space| {
        let url = "http://127.0.0.1:8500/v1/status/leader";
        let leader = output(space.command("curl").args(["--silent", "--fail", url]))?;
        ensure!(leader.len() > 2, "there is no leader yet: {leader:?}");
        Ok(())
    })
}

/// The Consul program: `$CONSUL_BIN`, otherwise the one on PATH, otherwise the one that the setup has downloaded.
pub fn consul_program() -> PathBuf {
    let set = std::env::var_os("CONSUL_BIN").map(PathBuf::from);
    let fetched = || cache_dir().join("consul/usr/bin/consul");
    set.unwrap_or_else(|| which("consul").unwrap_or_else(|_| fetched()))
}

impl Host {
    /// A Consul agent on port 8500 of every address of the host. It is started at first use, unless a test has started
    /// and stopped it by [`Host::consul_daemon`].
    pub fn consul(&self) -> Result<Consul> {
        self.consul_daemon().start_at_first_use()?;
        Ok(Consul { host: self.clone() })
    }
}

impl Consul {
    /// An instance of a service, to be registered with this agent.
    pub fn service(&self, id: &str, name: &str) -> Registration<'_> {
        Registration { consul: self, body: json!({ "ID": id, "Name": name }) }
    }

    /// Removes an instance.
    pub fn deregister(&self, id: &str) -> Result<()> {
        self.put(&format!("/v1/agent/service/deregister/{id}"), &Value::Null)
    }

    /// Sets the check of an instance registered with [`Registration::check`]: `passing`, `warning` or `critical`.
    pub fn set_check(&self, id: &str, status: &str) -> Result<()> {
        self.put(&format!("/v1/agent/check/update/service:{id}"), &json!({ "Status": status }))
    }

    /// Turns maintenance of an instance on or off.
    pub fn maintenance(&self, id: &str, on: bool) -> Result<()> {
        self.put(&format!("/v1/agent/service/maintenance/{id}?enable={on}"), &Value::Null)
    }

    /// Turns maintenance of the whole node on or off.
    pub fn node_maintenance(&self, on: bool) -> Result<()> {
        self.put(&format!("/v1/agent/maintenance?enable={on}"), &Value::Null)
    }

    /// Addresses of the instances that pass all their checks, as `address:port`, sorted. A service without an address has
    /// that of its node.
    pub fn passing(&self, name: &str) -> Result<Vec<String>> {
        let list = self.get(&format!("/v1/health/service/{name}?passing"))?;
        let entries = list.as_array().with_context(|| format!("Consul says {list}"))?;
        let own = |entry: &Value| {
            entry["Service"]["Address"].as_str().filter(|text| !text.is_empty()).map(String::from)
        };
        let mut addresses: Vec<_> = entries
            .iter()
            .map(|entry| {
                let address =
                    own(entry).or_else(|| entry["Node"]["Address"].as_str().map(String::from));
                format!("{}:{}", address.unwrap_or_default(), entry["Service"]["Port"])
            })
            .collect();
        addresses.sort();
        Ok(addresses)
    }

    /// `GET` of any path of the API.
    pub fn get(&self, path: &str) -> Result<Value> {
        self.ask("GET", path, "")?.json()
    }

    /// `PUT` to any path of the API; `Null` sends no body.
    pub fn put(&self, path: &str, body: &Value) -> Result<()> {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        self.ask("PUT", path, &body)?.ok().with_context(|| format!("Consul: PUT {path}")).map(drop)
    }

    fn ask(&self, method: &str, path: &str, body: &str) -> Result<Response> {
        self.host.http(method, &format!("http://127.0.0.1:8500{path}"), body)
    }
}

/// An instance to register.
#[derive(Debug, Clone)]
#[must_use = "it is registered by register()"]
pub struct Registration<'a> {
    consul: &'a Consul,
    body: Value,
}

impl Registration<'_> {
    /// Sets its own address. Without one it has the node's address.
    pub fn address(mut self, address: impl std::fmt::Display) -> Self {
        self.body["Address"] = address.to_string().into();
        self
    }

    /// Its port.
    pub fn port(mut self, port: u16) -> Self {
        self.body["Port"] = port.into();
        self
    }

    /// Its tags.
    pub fn tags<const N: usize>(mut self, tags: [&str; N]) -> Self {
        self.body["Tags"] = tags.to_vec().into();
        self
    }

    /// Adds a check that has this status until [`Consul::set_check`] changes it.
    pub fn check(mut self, status: &str) -> Self {
        self.body["Check"] = json!({ "TTL": "24h", "Status": status });
        self
    }

    /// Adds a check that the agent runs itself, in the form of the API: `{"TCP": "172.17.0.2:80", "Interval": "1s"}`.
    pub fn active_check(mut self, check: Value) -> Self {
        self.body["Check"] = check;
        self
    }

    /// Registers it. Replaces an instance with the same ID.
    pub fn register(self) -> Result<()> {
        self.consul.put("/v1/agent/service/register", &self.body)
    }
}
