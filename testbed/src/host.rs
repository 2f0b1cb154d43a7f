//! The host.

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};

use crate::container::ContainerBuilder;
use crate::daemon::Daemon;
use crate::engine::Engine;
use crate::exec::{describe, output};
use crate::fake_engine::FakeEngine;
use crate::light::{self, LightEngine};
use crate::process::Process;
use crate::space::Space;
use crate::{consul, docker, etcd};

/// A separate Docker host. Handles are cheap to clone. The host, with everything in it, ends with the last handle. (A
/// [`Container`](crate::Container) contains a handle too.)
#[derive(Debug, Clone)]
pub struct Host {
    inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    docker: Daemon,
    engine: Option<Engine>,
    etcd: Daemon,
    consul: Daemon,
    light: Option<LightEngine>,
    pub(crate) base_image_loaded: Mutex<bool>,
    // Last, because fields are dropped in this order.
    space: Arc<Space>,
}

/// The configuration of a host (see [`Host::builder`]).
#[derive(Debug, Default)]
pub struct HostBuilder {
    docker_args: Vec<OsString>,
    etcd_args: Vec<OsString>,
    consul_args: Vec<OsString>,
    without_docker: bool,
    light: bool,
}

impl HostBuilder {
    /// Further arguments for dockerd, such as `--live-restore` or `--userland-proxy=false`.
    pub fn docker_args<I: IntoIterator<Item: Into<OsString>>>(mut self, args: I) -> Self {
        self.docker_args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Sets whether containers on the default bridge get an IPv6 address of `fd00:d0c::/64` too.
    pub fn ipv6(self, wanted: bool) -> Self {
        if wanted { self.docker_args(["--ipv6", "--fixed-cidr-v6=fd00:d0c::/64"]) } else { self }
    }

    /// Further arguments for etcd. They override ours.
    pub fn etcd_args<I: IntoIterator<Item: Into<OsString>>>(mut self, args: I) -> Self {
        self.etcd_args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Further arguments for the Consul agent.
    pub fn consul_args<I: IntoIterator<Item: Into<OsString>>>(mut self, args: I) -> Self {
        self.consul_args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Does not start dockerd, so that the host has no docker0, until [`Daemon::start`] of [`Host::docker_daemon`].
    pub fn without_docker(mut self) -> Self {
        self.without_docker = true;
        self
    }

    /// Without dockerd, with containers that are only namespaces (see [`Host::light`]).
    pub fn light(mut self) -> Self {
        self.light = true;
        self.without_docker()
    }

    /// Creates the host, and waits until its Docker engine answers.
    pub fn start(self) -> Result<Host> {
        let engine = if self.light { None } else { Engine::chosen()? };
        let space = Arc::new(Space::open()?);
        let host = Host {
            inner: Arc::new(Inner {
                docker: docker::daemon(&space, engine.as_ref(), &self.docker_args)?,
                engine,
                etcd: etcd::daemon(&space, &self.etcd_args),
                consul: consul::daemon(&space, &self.consul_args),
                light: self
                    .light
                    .then(|| LightEngine::start(docker::socket(&space)))
                    .transpose()?,
                base_image_loaded: Mutex::default(),
                space,
            }),
        };
        if self.light {
            host.run("sh", ["-euc", light::BRIDGE])?;
        }
        if !self.without_docker {
            host.docker_daemon().start()?;
        }
        Ok(host)
    }
}

impl Host {
    /// A host with a Docker engine with default settings.
    pub fn start() -> Result<Self> {
        Self::builder().start()
    }

    /// A host without dockerd, for tests that need containers but no engine. Its containers are network and process
    /// namespaces on a bridge `docker0`, run programs of the machine, and are reported by a
    /// [`FakeEngine`](crate::FakeEngine). Host and containers start in a fraction of the time. Images, further networks and
    /// `docker` itself are not available.
    pub fn light() -> Result<Self> {
        Self::builder().light().start()
    }

    /// A host with other settings.
    pub fn builder() -> HostBuilder {
        HostBuilder::default()
    }

    /// A command that runs inside the host: in its network, mount and process namespaces, as root, from `/`.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        self.space().command(program)
    }

    /// Runs a program inside the host. Returns its stdout. An error contains its stderr.
    pub fn run<I: IntoIterator<Item: AsRef<OsStr>>>(
        &self,
        program: &str,
        args: I,
    ) -> Result<String> {
        output(self.command(program).args(args))
    }

    /// Starts a command in the background, with its output in the file `<name>.log` of [`Host::dir`]. The command may come
    /// from [`Host::command`] or be any other.
    pub fn spawn(&self, name: &str, command: Command) -> Result<Process> {
        Ok(Process::spawn(name, self.dir(), command)?.shown())
    }

    /// An HTTP request from inside the host. Any status is `Ok`. An error means that nothing arrived for 10 s, or not
    /// everything within two minutes.
    pub fn http(&self, method: &str, url: &str, body: &str) -> Result<Response> {
        let mut command = self.command("curl");
        command.args([
            "--silent",
            "--show-error",
            "--globoff",
            "--max-time",
            "120",
            "--speed-time",
            "10",
            "--speed-limit",
            "1",
            "--request",
            method,
        ]);
        command.args(["--write-out", "\n%{http_code}", url]);
        if !body.is_empty() {
            command.args(["--data-binary", "@-"]);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("start curl")?;
        if let Some(mut stdin) = child.stdin.take() {
            // curl may end without having read it. Then its own status shows the reason.
            let _ = stdin.write_all(body.as_bytes());
        }
        let output = child.wait_with_output().context("wait for curl")?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{}: {}", describe(&command), stderr.trim_end());
        let text = String::from_utf8(output.stdout).context("the body is not UTF-8")?;
        let (body, status) = text.rsplit_once('\n').context("curl wrote no status")?;
        let status = status.parse().with_context(|| format!("curl wrote status {status:?}"))?;
        Ok(Response { status, body: body.to_owned() })
    }

    /// A container of any image. By default one that idles, from the image with the testbed program, busybox and curl.
    pub fn container(&self, name: &str) -> ContainerBuilder {
        ContainerBuilder::new(self, name)
    }

    /// dockerd.
    pub fn docker_daemon(&self) -> &Daemon {
        &self.inner.docker
    }

    /// The engine that the variable `ENGINE` names, such as `podman5`. `None`: this machine's.
    pub fn engine(&self) -> Option<&str> {
        self.inner.engine.as_ref().map(Engine::name)
    }

    /// Whether the engine is podman.
    pub fn is_podman(&self) -> bool {
        self.inner.engine.as_ref().is_some_and(Engine::is_podman)
    }

    /// etcd, started or not.
    pub fn etcd_daemon(&self) -> &Daemon {
        &self.inner.etcd
    }

    /// The Consul agent, started or not.
    pub fn consul_daemon(&self) -> &Daemon {
        &self.inner.consul
    }

    /// A folder with the same path inside and outside, for logs and files that both need. It is removed with the host.
    pub fn dir(&self) -> &Path {
        self.space().dir()
    }

    /// Process ID of the host's init, as seen from outside: its namespaces are in `/proc/<pid>/ns`.
    pub fn init_pid(&self) -> u32 {
        self.space().init()
    }

    /// The engine of a light host.
    pub fn fake_engine(&self) -> Option<&FakeEngine> {
        self.light_engine().map(LightEngine::engine)
    }

    pub(crate) fn light_engine(&self) -> Option<&LightEngine> {
        self.inner.light.as_ref()
    }

    pub(crate) fn space(&self) -> &Space {
        &self.inner.space
    }

    pub(crate) fn inner(&self) -> &Inner {
        &self.inner
    }
}

/// An answer to [`Host::http`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// The HTTP status.
    pub status: u16,
    /// The body, as text.
    pub body: String,
}

impl Response {
    /// The body of a 2xx answer; any other status is an error.
    pub fn ok(self) -> Result<String> {
        ensure!(
            (200..300).contains(&self.status),
            "HTTP status {}: {}",
            self.status,
            self.body.trim_end()
        );
        Ok(self.body)
    }

    /// The JSON of a 2xx answer.
    pub fn json(self) -> Result<serde_json::Value> {
        let body = self.ok()?;
        serde_json::from_str(&body).with_context(|| format!("not JSON: {body:?}"))
    }
}
