//! The host's etcd, with both of its APIs.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::daemon::Daemon;
use crate::exec::output;
use crate::host::Host;
use crate::space::Space;

/// The key spaces of API versions 2 and 3 are separate: a key in one is not visible in the other.
#[derive(Debug, Clone)]
pub struct Etcd {
    host: Host,
}

pub(crate) fn daemon(space: &Arc<Space>, extra: &[std::ffi::OsString]) -> Daemon {
    let mut args: Vec<_> = [
        "--enable-v2",
        "--data-dir=/run/testbed/etcd",
        "--listen-client-urls=http://0.0.0.0:2379",
        "--advertise-client-urls=http://127.0.0.1:2379",
        // Without TLS and authentication, whatever clients must use.
        "--listen-metrics-urls=http://127.0.0.1:2381",
    ]
    .map(Into::into)
    .into();
    Vec::extend_from_slice(&mut args, extra);
    Daemon::new(space.clone(), "etcd", "etcd", args, |space| {
        let health = output(space.command("curl").args([
            "--silent",
            "--fail",
            "http://127.0.0.1:2381/health",
        ]))?;
        ensure!(health.contains("true"), "etcd says {health:?}");
        Ok(())
    })
}

impl Host {
    /// etcd on port 2379 of every address of the host. It is started at first use, unless a test has started and
    /// stopped it by [`Host::etcd_daemon`].
    pub fn etcd(&self) -> Result<Etcd> {
        self.etcd_daemon().start_at_first_use()?;
        Ok(Etcd { host: self.clone() })
    }
}

impl Etcd {
    /// The version 2 API.
    pub fn v2(&self) -> EtcdV2<'_> {
        EtcdV2(&self.host)
    }

    /// The version 3 API.
    pub fn v3(&self) -> EtcdV3<'_> {
        EtcdV3(&self.host)
    }
}

/// Access to keys via `/v2/keys`.
#[derive(Debug)]
pub struct EtcdV2<'a>(&'a Host);

impl EtcdV2<'_> {
    /// Sets a key. Creates folders above it.
    pub fn put(&self, key: &str, value: &str) -> Result<()> {
        self.ask("PUT", key, &[("value", value)]).map(drop)
    }

    /// Sets a key that expires after `seconds`.
    pub fn put_for(&self, key: &str, value: &str, seconds: u32) -> Result<()> {
        self.ask("PUT", key, &[("value", value), ("ttl", &seconds.to_string())]).map(drop)
    }

    /// Creates an empty folder.
    pub fn mkdir(&self, key: &str) -> Result<()> {
        self.ask("PUT", key, &[("dir", "true")]).map(drop)
    }

    /// Removes a key.
    pub fn delete(&self, key: &str) -> Result<()> {
        self.ask("DELETE", key, &[]).map(drop)
    }

    /// Removes a folder and everything below it.
    pub fn delete_all(&self, key: &str) -> Result<()> {
        self.ask("DELETE", &format!("{key}?recursive=true"), &[]).map(drop)
    }

    /// The `node` at a key, with everything below it.
    pub fn get(&self, key: &str) -> Result<Value> {
        let mut answer = self.ask("GET", &format!("{key}?recursive=true"), &[])?;
        Ok(answer["node"].take())
    }

    fn ask(&self, method: &str, key: &str, form: &[(&str, &str)]) -> Result<Value> {
        let fields: Vec<_> =
            form.iter().map(|(name, value)| format!("{name}={}", percent_encode(value))).collect();
        let url = format!("http://127.0.0.1:2379/v2/keys/{}", key.trim_start_matches('/'));
        let answer = self.0.http(method, &url, &fields.join("&"))?;
        answer.json().with_context(|| format!("etcd v2: {method} {key}"))
    }
}

/// Access to keys via `etcdctl`.
#[derive(Debug)]
pub struct EtcdV3<'a>(&'a Host);

impl EtcdV3<'_> {
    /// Sets a key.
    pub fn put(&self, key: &str, value: &str) -> Result<()> {
        self.ctl(&["put", "--", key, value]).map(drop)
    }

    /// Sets a key with a new lease of `seconds`. Returns the lease's ID.
    pub fn put_for(&self, key: &str, value: &str, seconds: u32) -> Result<String> {
        let said = self.ctl(&["lease", "grant", &seconds.to_string()])?;
        // "lease 694d5765fc71500b granted with TTL(5s)"
        let lease =
            said.split_whitespace().nth(1).with_context(|| format!("etcdctl said {said:?}"))?;
        self.ctl(&["put", "--lease", lease, "--", key, value])?;
        Ok(lease.to_owned())
    }

    /// Ends a lease, which removes its keys.
    pub fn revoke(&self, lease: &str) -> Result<()> {
        self.ctl(&["lease", "revoke", lease]).map(drop)
    }

    /// Removes a key.
    pub fn delete(&self, key: &str) -> Result<()> {
        self.ctl(&["del", "--", key]).map(drop)
    }

    /// Removes all keys with this prefix.
    pub fn delete_all(&self, prefix: &str) -> Result<()> {
        self.ctl(&["del", "--prefix", "--", prefix]).map(drop)
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Result<String> {
        self.ctl(&["get", "--print-value-only", "--", key])
    }

    /// Removes all revisions before the current one. A watch from an older one then fails.
    pub fn compact(&self) -> Result<()> {
        let status: Value =
            serde_json::from_str(&self.ctl(&["endpoint", "status", "--write-out=json"])?)?;
        let revision = status[0]["Status"]["header"]["revision"].as_u64();
        let revision = revision.with_context(|| format!("etcdctl said {status}"))?;
        self.ctl(&["compact", &revision.to_string()]).map(drop)
    }

    /// Any `etcdctl` command.
    pub fn ctl(&self, args: &[&str]) -> Result<String> {
        output(self.0.command("etcdctl").env("ETCDCTL_API", "3").args(args))
    }
}

fn percent_encode(text: &str) -> String {
    let encode = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
            char::from(byte).to_string()
        }
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(encode).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_form_field_is_encoded() {
        assert_eq!(percent_encode("{\"a\": 1}&é"), "%7B%22a%22%3A%201%7D%26%C3%A9");
    }
}
