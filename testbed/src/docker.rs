//! The host's Docker engine.

use std::ffi::{OsStr, OsString};
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::daemon::Daemon;
use crate::engine::Engine;
use crate::exec::output;
use crate::host::Host;
use crate::space::{Space, plain};

/// The folder of the containers' control groups. Each host has its own.
pub(crate) fn cgroup(space: &Space) -> String {
    format!("testbed-{}", space.number())
}

pub(crate) fn socket(space: &Space) -> PathBuf {
    space.dir().join("docker.sock")
}

/// dockerd with everything at its usual places: /run belongs to the host. Only images and containers are moved there from
/// /var/lib, and an additional socket can be reached from outside. Or podman's service, which takes no further arguments.
pub(crate) fn daemon(
    space: &Arc<Space>,
    engine: Option<&Engine>,
    extra: &[OsString],
) -> Result<Daemon> {
    if let Some(engine) = engine.filter(|engine| engine.is_podman()) {
        ensure!(
            extra.is_empty(),
            "ENGINE={} takes no arguments of dockerd: {extra:?}",
            engine.name()
        );
        let args = engine.podman(space, &cgroup(space), &socket(space))?;
        return Ok(Daemon::new(space.clone(), "podman", "sh", args, ping));
    }
    let mut args: Vec<OsString> = [
        "--data-root=/run/testbed/docker",
        "--config-file=/run/testbed/daemon.json",
        "--host=unix:///run/docker.sock",
        "--exec-opt=native.cgroupdriver=cgroupfs",
    ]
    .map(OsString::from)
    .into();
    args.push(format!("--host=unix://{}", socket(space).display()).into());
    args.push(format!("--cgroup-parent=/{}", cgroup(space)).into());
    args.extend_from_slice(extra);
    Ok(match engine {
        None => Daemon::new(space.clone(), "dockerd", "dockerd", args, ping),
        Some(engine) => {
            Daemon::new(space.clone(), "dockerd", "sh", engine.dockerd(space, args), ping)
        }
    })
}

fn ping(space: &Space) -> Result<()> {
    let path = socket(space);
    let mut stream =
        UnixStream::connect(&path).with_context(|| format!("connect to {}", path.display()))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.ends_with("OK"), "dockerd answers {answer:?}");
    Ok(())
}

/// A bridge network.
#[derive(Debug, Clone)]
pub struct Network {
    host: Host,
    name: String,
}

impl Network {
    /// Its name, as `docker run --network` takes it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The bridge's interface on the host.
    pub fn interface(&self) -> Result<String> {
        let id = self.host.docker(["network", "inspect", "--format", "{{.Id}}", &self.name])?;
        Ok(format!(
            "br-{}",
            id.get(..12).with_context(|| format!("network {} has ID {id:?}", self.name))?
        ))
    }

    /// The host's IPv4 address on it. Read from the interface if the engine does not report it: Docker does not report a
    /// gateway that no user chose. podman creates the interface with the first container.
    pub fn gateway(&self) -> Result<Ipv4Addr> {
        let format = "{{range .IPAM.Config}}{{.Gateway}} {{end}}";
        let said = self.host.docker(["network", "inspect", "--format", format, &self.name])?;
        if let Some(address) = said.split_whitespace().find_map(|word| word.parse().ok()) {
            return Ok(address);
        }
        let shown =
            self.host.run("ip", ["-4", "-brief", "address", "show", "dev", &self.interface()?])?;
        let address =
            shown.split_whitespace().find_map(|word| word.split_once('/')?.0.parse().ok());
        address.with_context(|| format!("network {} has no IPv4 address: {shown:?}", self.name))
    }

    /// Removes it. No container may be connected to it.
    pub fn remove(&self) -> Result<()> {
        self.host.docker(["network", "rm", &self.name]).map(drop)
    }
}

impl Host {
    /// A `docker` command that talks to the host's engine.
    pub fn docker_command<I: IntoIterator<Item: AsRef<OsStr>>>(&self, args: I) -> Command {
        let mut command = plain("docker");
        // Without the user's logins, contexts and proxies.
        command.env("DOCKER_CONFIG", self.dir().join("docker-config"));
        command.arg("--host").arg(self.docker_url()).args(args);
        command
    }

    /// Runs `docker`. Returns its stdout.
    pub fn docker<I: IntoIterator<Item: AsRef<OsStr>>>(&self, args: I) -> Result<String> {
        output(&mut self.docker_command(args))
    }

    /// The engine's address, the same inside and outside of the host. Inside, `/var/run/docker.sock` works too.
    pub fn docker_url(&self) -> String {
        format!("unix://{}", socket(self.space()).display())
    }

    /// The control group with the host's containers, each under its ID, in every hierarchy of the machine.
    pub fn cgroup(&self) -> String {
        cgroup(self.space())
    }

    /// Creates a user-defined bridge network. `args` are passed to `docker network create`.
    pub fn network<I: IntoIterator<Item: AsRef<OsStr>>>(
        &self,
        name: &str,
        args: I,
    ) -> Result<Network> {
        output(self.docker_command(["network", "create"]).args(args).arg(name))?;
        Ok(Network { host: self.clone(), name: name.to_owned() })
    }
}
