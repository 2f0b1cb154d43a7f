//! Containers.

use std::ffi::{OsStr, OsString};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};

use crate::exec::output;
use crate::host::Host;
use crate::image;
use crate::light::LightContainer;
use crate::process::Process;

/// A container to start.
#[derive(Debug, Clone)]
#[must_use = "it is made by start()"]
pub struct ContainerBuilder {
    host: Host,
    name: String,
    image: String,
    args: Vec<OsString>,
    cmd: Vec<OsString>,
}

impl ContainerBuilder {
    pub(crate) fn new(host: &Host, name: &str) -> Self {
        Self {
            host: host.clone(),
            name: name.to_owned(),
            image: image::BASE.to_owned(),
            args: Vec::new(),
            cmd: ["testbed", "peer", "idle"].map(Into::into).into(),
        }
    }

    /// Sets another image, with the image's own command.
    pub fn image(mut self, image: &str) -> Self {
        self.image = image.to_owned();
        self.cmd.clear();
        self
    }

    /// Sets its command.
    pub fn cmd<I: IntoIterator<Item: Into<OsString>>>(mut self, cmd: I) -> Self {
        self.cmd = cmd.into_iter().map(Into::into).collect();
        self
    }

    /// An environment variable.
    pub fn env(self, name: &str, value: &str) -> Self {
        self.arg(format!("--env={name}={value}"))
    }

    /// A label.
    pub fn label(self, name: &str, value: &str) -> Self {
        self.arg(format!("--label={name}={value}"))
    }

    /// Sets its network: a name, or `host`, or `container:<other>`.
    pub fn network(self, name: &str) -> Self {
        self.arg(format!("--network={name}"))
    }

    /// Adds any other argument of `docker run`.
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Several words for `docker run`.
    pub fn args<I: IntoIterator<Item: Into<OsString>>>(mut self, args: I) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Starts it. It stays until it is removed or the host ends. Dropping the handle does nothing.
    pub fn start(self) -> Result<Container> {
        if self.host.light_engine().is_some() {
            ensure!(self.image == image::BASE, "a light host has no images: {}", self.image);
            let light = LightContainer::run_on(&self.host, &self.name, &self.args, self.cmd)?;
            let (host, name, id) = (self.host, self.name, light.id().to_owned());
            return Ok(Container { host, name, id, light: Some(light) });
        }
        if self.image == image::BASE {
            self.host.load_image()?;
        }
        let mut run = self.host.docker_command(["run", "--detach", "--name", &self.name]);
        // The first process of a container ignores SIGTERM unless it handles it, and `docker stop` would take 10 s.
        run.arg("--stop-signal=KILL").args(&self.args).arg(&self.image).args(&self.cmd);
        let id = output(&mut run)?;
        Ok(Container { host: self.host, name: self.name, id, light: None })
    }
}

/// A container of a host.
#[derive(Debug, Clone)]
pub struct Container {
    host: Host,
    name: String,
    id: String,
    /// Set on a light host.
    light: Option<Arc<LightContainer>>,
}

impl Container {
    /// Its ID, 64 hexadecimal digits.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its host.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Its name, without a slash.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The ID of its first process, as seen inside the host.
    pub fn pid(&self) -> Result<u32> {
        if let Some(light) = &self.light {
            return light.pid();
        }
        let pid = self.inspect("{{.State.Pid}}")?;
        pid.parse()
            .ok()
            .filter(|&pid| pid != 0)
            .with_context(|| format!("{} does not run: pid {pid}", self.name))
    }

    /// Its IPv4 address on the first of its networks that has one.
    pub fn ip(&self) -> Result<Ipv4Addr> {
        if let Some(light) = &self.light {
            return light.ip();
        }
        self.address("{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}")
    }

    /// Its IPv4 address on one network.
    pub fn ip_on(&self, network: &str) -> Result<Ipv4Addr> {
        self.address(&format!(
            "{{{{with index .NetworkSettings.Networks {network:?}}}}}{{{{.IPAddress}}}}{{{{end}}}}"
        ))
    }

    /// Its IPv6 address on the first of its networks that has one.
    pub fn ip6(&self) -> Result<Ipv6Addr> {
        self.address("{{range .NetworkSettings.Networks}}{{.GlobalIPv6Address}} {{end}}")
    }

    /// Runs a command in the container (`docker exec`). Returns its stdout.
    pub fn exec<I: IntoIterator<Item: AsRef<OsStr>>>(&self, cmd: I) -> Result<String> {
        output(&mut self.exec_command(cmd)?)
    }

    /// Starts a command in the container, with its log as `<container>-<name>`. Killing the process only ends `docker
    /// exec`: what it started in the container continues.
    pub fn spawn<I: IntoIterator<Item: AsRef<OsStr>>>(
        &self,
        name: &str,
        cmd: I,
    ) -> Result<Process> {
        self.host.spawn(&format!("{}-{name}", self.name), self.exec_command(cmd)?)
    }

    /// A command that runs a program of the machine only in the container's network: for tools that are not in the image.
    /// It is not in the container's control group.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let mut command = self.host.command("nsenter");
        command.arg(format!("--target={}", self.pid()?)).args(["--net", "--"]).arg(program);
        Ok(command)
    }

    /// The folder of a light container in the control groups of version 2.
    pub fn control_group(&self) -> Result<std::path::PathBuf> {
        self.light.as_ref().context("it is no light container")?.control_group(&self.host)
    }

    /// Everything that it wrote to stdout and stderr.
    pub fn log(&self) -> Result<String> {
        if let Some(light) = &self.light {
            return Ok(light.log(&self.host));
        }
        let mut logs = self.host.docker_command(["logs", &self.id]);
        let output = logs.output().context("run docker logs")?;
        let both = [output.stdout, output.stderr].concat();
        Ok(String::from_utf8_lossy(&both).into_owned())
    }

    /// `docker stop`.
    pub fn stop(&self) -> Result<()> {
        match &self.light {
            Some(light) => light.kill(&self.host),
            None => self.docker(["stop"]),
        }
    }

    /// `docker start`, after a stop.
    pub fn start(&self) -> Result<()> {
        match &self.light {
            Some(light) => light.start(&self.host),
            None => self.docker(["start"]),
        }
    }

    /// `docker kill`.
    pub fn kill(&self) -> Result<()> {
        match &self.light {
            Some(light) => light.kill(&self.host),
            None => self.docker(["kill"]),
        }
    }

    /// `docker rm --force`.
    pub fn remove(&self) -> Result<()> {
        match &self.light {
            Some(light) => light.remove(&self.host),
            None => self.docker(["rm", "--force", "--volumes"]),
        }
    }

    /// `docker network connect`.
    pub fn connect(&self, network: &str) -> Result<()> {
        self.docker(["network", "connect", network])
    }

    /// `docker network disconnect`.
    pub fn disconnect(&self, network: &str) -> Result<()> {
        self.docker(["network", "disconnect", network])
    }

    /// `docker inspect` with a Go template.
    pub fn inspect(&self, format: &str) -> Result<String> {
        self.host.docker(["inspect", "--format", format, &self.id])
    }

    fn docker<const N: usize>(&self, args: [&str; N]) -> Result<()> {
        if self.light.is_some() {
            bail!("a light container cannot: docker {}", args.join(" "));
        }
        output(self.host.docker_command(args).arg(&self.id)).map(drop)
    }

    fn exec_command<I: IntoIterator<Item: AsRef<OsStr>>>(&self, cmd: I) -> Result<Command> {
        let mut command = match &self.light {
            Some(light) => light.exec_command(&self.host)?,
            None => self.host.docker_command(["exec", &self.id]),
        };
        command.args(cmd);
        Ok(command)
    }

    fn address<T: std::str::FromStr + Into<IpAddr>>(&self, format: &str) -> Result<T> {
        let list = self.inspect(format)?;
        let first = list.split_whitespace().find_map(|word| word.parse().ok());
        first.with_context(|| format!("container {} has no such address: {list:?}", self.name))
    }
}
