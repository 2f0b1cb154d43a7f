//! Containers without an engine: network and process namespaces on a bridge of the host, and a [`FakeEngine`] that reports
//! them as running. A light host starts in a fraction of the time that dockerd takes, and so do its containers. The
//! behaviour of a real engine can only be tested with one.

use std::{
    collections::{BTreeMap, BTreeSet, hash_map::DefaultHasher},
    ffi::{OsStr, OsString},
    fs,
    hash::{Hash, Hasher},
    net::Ipv4Addr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::runtime::{Builder, Runtime};

use crate::{
    fake_engine::{FakeEngine, Mood},
    host::Host,
    poll::eventually,
    process::Process,
    space::testbed_program,
};

/// Timeout for creating or removing a namespace.
const DEADLINE: Duration = Duration::from_secs(30);

/// Replaces dockerd on a light host.
#[derive(Debug)]
pub(crate) struct LightEngine {
    engine: FakeEngine,
    /// All containers that ever ran: a container outlives its handles.
    containers: Mutex<Vec<Arc<LightContainer>>>,
    /// The last byte of each address in use.
    addresses: Mutex<BTreeSet<u8>>,
    /// The runtime of the engine. Last, because fields are dropped in this order.
    _runtime: Runtime,
}

impl LightEngine {
    /// Starts it, with its socket at this path.
    pub(crate) fn start(socket: PathBuf) -> Result<Self> {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let engine = runtime.block_on(async { FakeEngine::start_at(socket) })?;
        let (containers, addresses) = Default::default();
        Ok(Self { engine, containers, addresses, _runtime: runtime })
    }

    pub(crate) fn engine(&self) -> &FakeEngine {
        &self.engine
    }

    /// Takes the lowest free address, as an engine does.
    fn take_address(&self) -> Result<u8> {
        let mut taken = self.addresses();
        let free = (2..u8::MAX).find(|part| !taken.contains(part)).context("no address is free")?;
        taken.insert(free);
        Ok(free)
    }

    fn containers(&self) -> MutexGuard<'_, Vec<Arc<LightContainer>>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn addresses(&self) -> MutexGuard<'_, BTreeSet<u8>> {
        self.addresses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Creates the bridge that an engine would create. Its Ethernet address is fixed, so it does not change with the
/// containers.
pub(crate) const BRIDGE: &str = "ip link add docker0 address 02:42:00:00:00:01 type bridge
    ip addr add 172.17.0.1/16 dev docker0
    ip link set docker0 up";

/// A container without an engine.
#[derive(Debug)]
pub(crate) struct LightContainer {
    name: String,
    id: String,
    command: Vec<OsString>,
    variables: BTreeMap<String, String>,
    labels: BTreeMap<String, String>,
    exposed: Vec<String>,
    /// The engine reports no address for it, as with `--network=none`. It has one nevertheless, as if another program had
    /// set it.
    is_unaddressed: bool,
    run: Mutex<Option<Run>>,
}

/// The run of a container.
#[derive(Debug)]
struct Run {
    process: Process,
    /// The first process, as seen from outside the host.
    init: Pid,
    /// The first process, as seen inside the host.
    pid: u32,
    /// The last byte of its address.
    part: u8,
}

impl LightContainer {
    /// Creates and starts it. `args` are those of `docker run`.
    pub(crate) fn run_on(
        host: &Host,
        name: &str,
        args: &[OsString],
        command: Vec<OsString>,
    ) -> Result<Arc<Self>> {
        let mut containers = engine(host)?.containers();
        // Two containers with the same name have different IDs.
        let mut hash = DefaultHasher::new();
        (name, containers.len()).hash(&mut hash);
        let id = format!("{:016x}", hash.finish()).repeat(4);
        let (variables, labels, exposed, is_unaddressed, run) = Default::default();
        let name = name.to_owned();
        let mut container =
            Self { name, id, command, variables, labels, exposed, is_unaddressed, run };
        args.iter().try_for_each(|arg| container.take(arg))?;
        let container = Arc::new(container);
        containers.push(container.clone());
        drop(containers);
        container.start(host)?;
        Ok(container)
    }

    fn take(&mut self, arg: &OsStr) -> Result<()> {
        let pair = |text: &str| {
            let (name, value) = text.split_once('=').unwrap_or((text, ""));
            (name.to_owned(), value.to_owned())
        };
        match arg.to_string_lossy().split_once('=') {
            Some(("--env", text)) => self.variables.extend([pair(text)]),
            Some(("--label", text)) => self.labels.extend([pair(text)]),
            Some(("--network", "none")) => self.is_unaddressed = true,
            Some(("--expose", port)) => self.exposed.push(format!("{port}/tcp")),
            _ => bail!("a light container cannot be made with {arg:?}; a host with dockerd can"),
        }
        Ok(())
    }

    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// Starts its network first, then its first process, then reports it.
    pub(crate) fn start(&self, host: &Host) -> Result<()> {
        let mut run = self.running();
        ensure!(run.is_none(), "{} runs already", self.name);
        let engine = engine(host)?;
        let part = engine.take_address()?;
        // Like Docker, which delays the answer to a container's inspection until it has started.
        let inspection = format!("/containers/{}/json", self.id);
        engine.engine.answers(&inspection, crate::fake_engine::Mood::Starts);
        engine.engine.connects(&self.id);
        host.run(
            "sh",
            [
                "-euc",
                &format!(
                    "ip netns add light-{part}
             ip link add light-{part} type veth peer name eth0 netns light-{part} address {}
             ip link set light-{part} master docker0 up
             ip -n light-{part} -batch - <<END
             link set lo up
             addr add {}/16 dev eth0
             link set eth0 up
             route add default via 172.17.0.1
END",
                    mac(part),
                    address(part)
                ),
            ],
        )?;
        let mut command = host.command("nsenter");
        command.arg(format!("--net=/run/netns/light-{part}")).args(["--", "unshare"]);
        command.args(["--pid", "--fork", "--kill-child", "--mount-proc", "--"]);
        command.args(&self.command);
        self.surround(&mut command)?;
        let process = host.spawn(&self.log_name(), command)?;
        let (init, pid) = eventually(DEADLINE, "the first process of a container", || {
            let unshare = process.pid();
            let children = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children"))?;
            let init: i32 = children.trim_end().parse().context("no child yet")?;
            let status = fs::read_to_string(format!("/proc/{init}/status"))?;
            let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
            // The process IDs here, in the host, and in the container.
            let pid = numbers.and_then(|numbers| numbers.split_whitespace().nth(1)?.parse().ok());
            Ok((Pid::from_raw(init).context("no number")?, pid.context("no number in the host")?))
        })?;
        let group = self.control_group(host)?;
        fs::create_dir_all(&group).with_context(|| format!("make {}", group.display()))?;
        // It may have ended already. Then the engine reports the end.
        let _ = fs::write(group.join("cgroup.procs"), init.as_raw_pid().to_string());
        *run = Some(Run { process, init, pid, part });
        engine.engine.insert(&self.id, self.inspection(pid, part)?);
        engine.engine.answers(&inspection, None);
        engine.engine.tells("start", &self.id);
        Ok(())
    }

    /// Ends everything that runs in it. The engine reports it afterwards, like a real one.
    pub(crate) fn kill(&self, host: &Host) -> Result<()> {
        let run = self.running().take().with_context(|| format!("{} does not run", self.name))?;
        // It may have ended by itself.
        let _ = kill_process(run.init, Signal::KILL);
        run.process.wait(DEADLINE)?;
        let part = run.part;
        host.run("sh", ["-euc", &format!("ip link del light-{part}; ip netns del light-{part}")])?;
        let engine = engine(host)?;
        engine.engine.has_not(&self.id);
        engine.engine.tells("die", &self.id);
        engine.addresses().remove(&part);
        Ok(())
    }

    /// Ends it, if it runs, and removes it.
    pub(crate) fn remove(&self, host: &Host) -> Result<()> {
        if self.running().is_some() {
            self.kill(host)?;
        }
        engine(host)?.engine.tells("destroy", &self.id);
        Ok(())
    }

    /// The ID of its first process, as seen inside the host.
    pub(crate) fn pid(&self) -> Result<u32> {
        let run = self.running();
        Ok(run.as_ref().with_context(|| format!("{} does not run", self.name))?.pid)
    }

    pub(crate) fn ip(&self) -> Result<Ipv4Addr> {
        let run = self.running();
        Ok(address(run.as_ref().with_context(|| format!("{} does not run", self.name))?.part))
    }

    /// A command that runs in its namespaces and in its control group, as with `docker exec`.
    pub(crate) fn exec_command(&self, host: &Host) -> Result<Command> {
        let mut command = host.command("nsenter");
        command.arg(format!("--target={}", self.pid()?)).args(["--net", "--mount", "--pid", "--"]);
        let group = self.control_group(host)?.join("cgroup.procs");
        // 0 is the writing process.
        let enter = format!("echo 0 > {}; exec \"$@\"", group.display());
        command.args(["sh", "-ec", &enter, "sh"]);
        self.surround(&mut command)?;
        Ok(command)
    }

    /// Its folder in the machine's control groups of version 2.
    pub(crate) fn control_group(&self, host: &Host) -> Result<PathBuf> {
        Ok(control_groups()?.join(host.cgroup()).join(&self.id))
    }

    /// Everything that its first process has written, in all runs.
    pub(crate) fn log(&self, host: &Host) -> String {
        let path = host.dir().join(format!("{}.log", self.log_name()));
        fs::read_to_string(path).unwrap_or_default()
    }

    fn log_name(&self) -> String {
        format!("container-{}", self.name)
    }

    /// Sets its variables, and puts `testbed` on the PATH.
    fn surround(&self, command: &mut Command) -> Result<()> {
        let program = testbed_program()?;
        let mut path = program.parent().unwrap_or(Path::new("/")).as_os_str().as_bytes().to_vec();
        path.extend(b":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        command.env("PATH", OsStr::from_bytes(&path)).envs(&self.variables);
        Ok(())
    }

    /// The engine's inspection of it.
    fn inspection(&self, pid: u32, part: u8) -> Result<Value> {
        let env: Vec<_> = self.variables.iter().map(|(k, v)| format!("{k}={v}")).collect();
        let exposed: BTreeMap<_, _> = self.exposed.iter().map(|port| (port, json!({}))).collect();
        let (mode, given) = match self.is_unaddressed {
            false => ("default", address(part).to_string()),
            true => ("none", String::new()),
        };
        let now = Command::new("date").args(["--utc", "+%Y-%m-%dT%H:%M:%S.%NZ"]).output()?;
        Ok(json!({
            "Id": self.id,
            "Name": format!("/{}", self.name),
            "State": {"Running": true, "Pid": pid, "StartedAt": String::from_utf8(now.stdout)?.trim()},
            "HostConfig": {"NetworkMode": mode},
            "Config": {"Env": env, "Labels": self.labels, "ExposedPorts": exposed},
            "NetworkSettings": {"Networks": {if self.is_unaddressed { "none" } else { "bridge" }: {
                "NetworkID": if self.is_unaddressed { "none" } else { "n" },
                "IPAddress": given,
                "GlobalIPv6Address": "",
                "MacAddress": if self.is_unaddressed { String::new() } else { mac(part) },
                "Gateway": if self.is_unaddressed { "" } else { "172.17.0.1" },
            }}},
        }))
    }

    fn running(&self) -> MutexGuard<'_, Option<Run>> {
        self.run.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Host {
    /// Sets whether the events of a light host's engine are lost.
    pub fn loses_events(&self, mute: bool) -> Result<()> {
        engine(self)?.engine.loses_events(mute);
        Ok(())
    }

    /// Sets whether the engine of a light host delays its lists: they have the state at the request, and are sent when this
    /// ends.
    pub fn delays_lists(&self, delays: bool) -> Result<()> {
        let mood = delays.then_some(Mood::Waits);
        engine(self)?.engine.answers("/containers/json", mood);
        Ok(())
    }
}

fn engine(host: &Host) -> Result<&LightEngine> {
    host.light_engine().context("the host has a real engine")
}

/// The Ethernet address of a container.
fn mac(part: u8) -> String {
    format!("02:42:ac:11:00:{part:02x}")
}

fn address(part: u8) -> Ipv4Addr {
    Ipv4Addr::new(172, 17, 0, part)
}

/// The folder of the machine's control groups of version 2. One hierarchy is enough to identify a container's process.
fn control_groups() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
    let mut mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let found = mounts.find(|fields| fields.get(2) == Some(&"cgroup2"));
    found.and_then(|fields| fields.get(1).map(PathBuf::from)).context("no cgroup2 is mounted")
}
