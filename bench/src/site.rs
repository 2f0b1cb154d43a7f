//! The Docker host for all measurements: two clients, two endpoints, and the capture rules for contenders that bring none.

use std::{
    io::{BufRead, BufReader},
    net::{Ipv4Addr, SocketAddr},
    process::{Child, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use rustix::process::{Resource, getrlimit};
use testbed::{Container, Host, Process};

use crate::{
    contender::{Contender, VIP},
    group::Group,
    load::{BEGIN, COUNTED, Done, Kind, UNTIL_TOLD},
    serve,
};

/// The image of clients and endpoints.
const IMAGE: &str = "bench";

/// The same on every machine, and one that every namespace may choose. Between containers of one host nothing is lost, and
/// it behaves as Linux' default (cubic). A machine's own choice may pace what is sent (BBR), with a timer for nearly every
/// packet: then timers would be measured.
const CONGESTION: &str = "net.ipv4.tcp_congestion_control=reno";

pub(crate) struct Site {
    pub(crate) host: Host,
    pub(crate) endpoints: Vec<SocketAddr>,
    clients: [Container; 2],
    groups: Vec<Group>,
}

/// One of the clients. The second one is the neighbour that disturbs the first one.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Client {
    First,
    Second,
}

/// The load of one client.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    pub(crate) kind: Kind,
    pub(crate) connections: usize,
    /// Requests per second, if the kind has a rate.
    pub(crate) rate: f64,
}

/// The results and the cost of a load.
#[derive(Debug, Clone, Default)]
pub(crate) struct Measured {
    pub(crate) done: Done,
    /// The contender's CPU time.
    pub(crate) own: Duration,
    /// CPU time including clients and endpoints.
    pub(crate) whole: Duration,
}

impl Site {
    pub(crate) fn open(contenders: &[Contender]) -> Result<Self> {
        let host = Host::start()?;
        let program = std::env::current_exe().context("find the running program")?;
        host.image_with(IMAGE, &[program], &[])?;
        let descriptors = getrlimit(Resource::Nofile).maximum.unwrap_or(1 << 20);
        let limit = format!("--ulimit=nofile={descriptors}:{descriptors}");
        let start = |name: &str| {
            let container = host.container(name).image(IMAGE).arg("--entrypoint=").arg(&limit);
            container
                .env("BACKEND_BENCH", &format!("bench;{}", Contender::Embassy.port()))
                .env(
                    "BACKEND_KERNEL",
                    &format!("bench;{};path=kernel", Contender::EmbassyKernel.port()),
                )
                .cmd(["sleep", "1000000"])
                .start()
        };
        let servers = [start("endpoint-1")?, start("endpoint-2")?];
        let clients = [start("client-1")?, start("client-2")?];
        let endpoints = servers
            .iter()
            .map(|s| Ok(SocketAddr::from((s.ip()?, serve::PORT))))
            .collect::<Result<Vec<_>>>()?;
        let groups =
            servers.iter().chain(&clients).map(|c| Group::of(&host, c)).collect::<Result<_>>()?;
        host.run("sysctl", ["-qw", CONGESTION])?;
        // Thousands of connections per second would fill the connection tracking table, and then no connection works.
        host.run("sysctl", ["-qw", "net.netfilter.nf_conntrack_tcp_timeout_time_wait=1"])?;
        for container in servers.iter().chain(&clients) {
            let mut command = container.command("sysctl")?;
            testbed::output(command.args([
                "-qw",
                CONGESTION,
                // Otherwise the ports of one client to one address run out within seconds.
                "net.ipv4.tcp_tw_reuse=1",
                "net.ipv4.ip_local_port_range=1024 65535",
            ]))?;
        }
        for server in &servers {
            // Only now, because a socket keeps the settings from its creation.
            host.docker(["exec", "--detach", server.id(), "bench", "serve"])?;
        }
        host.run("sysctl", ["-qw", "net.ipv4.ip_local_port_range=20000 65535"])?;
        let site = Self { host, endpoints, clients, groups };
        site.capture(contenders)?;
        Ok(site)
    }

    /// The rules for all contenders except embassy, which writes its own: of the same form, and at the same place.
    fn capture(&self, contenders: &[Contender]) -> Result<()> {
        let sources = self.clients.iter().map(Container::ip).collect::<Result<Vec<Ipv4Addr>>>()?;
        let mut rules = String::new();
        for contender in contenders.iter().filter(|c| c.is_captured()) {
            let port = contender.port();
            let declared: Vec<_> =
                sources.iter().map(|source| format!("{source} . {port}")).collect();
            let action = match contender {
                Contender::Dnat => {
                    let map =
                        self.endpoints.iter().enumerate().map(|(n, e)| format!("{n} : {}", e.ip()));
                    let map = map.collect::<Vec<_>>().join(", ");
                    format!("dnat ip to numgen inc mod {} map {{ {map} }}", self.endpoints.len())
                }
                _ => format!("redirect to :{}", contender.listens()),
            };
            rules += &format!(
                "ip daddr {VIP} ip saddr . tcp dport {{ {} }} {action}\n",
                declared.join(", ")
            );
        }
        let table = format!(
            "table inet bench {{\nchain prerouting {{\ntype nat hook prerouting priority -110;\n{rules}}}\n\
             chain postrouting {{\ntype nat hook postrouting priority 110;\nct status dnat ip saddr {VIP}/16 ip daddr {VIP}/16 masquerade\n}}\n}}\n"
        );
        let file = self.host.dir().join("bench.nft");
        std::fs::write(&file, table).context("write the capture rules")?;
        self.host.run("nft", ["-f", &file.display().to_string()]).map(drop)
    }

    /// Starts a load through a contender, without waiting for it.
    pub(crate) fn start(
        &self,
        client: Client,
        load: Load,
        by: &Started,
        lasts: Lasts,
    ) -> Result<Running> {
        let targets: Vec<_> = by.targets.iter().map(SocketAddr::to_string).collect();
        // In the container's network and control group, in a place from which it can read the groups' usage.
        let client = client as usize;
        let mut command = self.groups[self.endpoints.len() + client].command(&self.host);
        command.args(["nsenter", "--net", "--target", &self.clients[client].pid()?.to_string()]);
        command.arg(std::env::current_exe().context("find the running program")?);
        command.args(["load", load.kind.name(), &targets.join(","), &load.connections.to_string()]);
        let (Lasts::For(time) | Lasts::UntilTold(time)) = lasts;
        command.arg(time.as_secs_f64().to_string());
        if load.rate > 0.0 {
            command.arg(load.rate.to_string());
        }
        if matches!(lasts, Lasts::UntilTold(_)) {
            command.arg(UNTIL_TOLD);
        }
        let counted: Vec<_> = by.group().into_iter().chain(&self.groups).map(Group::name).collect();
        command.env(COUNTED, counted.join(","));
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start a client")?;
        let lines = BufReader::new(child.stdout.take().context("a client has a stdout")?);
        Ok(Running { child, lines, of_proxy: by.group().is_some() })
    }
}

/// How long a load lasts.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Lasts {
    For(Duration),
    /// Until [`Running::tell`], but at most this long.
    UntilTold(Duration),
}

/// A running client.
pub(crate) struct Running {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
    /// Whether the first counted group is a proxy's.
    of_proxy: bool,
}

impl Running {
    /// Waits for the start of the measured time.
    pub(crate) fn begun(mut self) -> Result<Self> {
        match self.line()? {
            line if line == BEGIN => Ok(self),
            line => bail!("a client says {line:?}"),
        }
    }

    /// Waits for the end. The measured time must have started.
    pub(crate) fn wait(mut self) -> Result<Done> {
        let line = self.line()?;
        let done =
            serde_json::from_str(&line).with_context(|| format!("a client says {line:?}"))?;
        self.child.wait().context("wait for a client")?;
        Ok(done)
    }

    /// Waits for the end. Returns the results and the cost.
    pub(crate) fn measure(self) -> Result<Measured> {
        let of_proxy = self.of_proxy;
        let done = self.begun()?.wait()?;
        let own = done.cpu.first().filter(|_| of_proxy).copied().unwrap_or_default();
        let whole = Duration::from_secs_f64(done.cpu.iter().sum());
        Ok(Measured { done, own: Duration::from_secs_f64(own), whole })
    }

    /// Ends a load that lasts until it is told.
    pub(crate) fn tell(self) -> Result<Done> {
        let mut running = self.begun()?;
        drop(running.child.stdin.take());
        running.wait()
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.lines.read_line(&mut line).context("read from a client")?;
        Ok(line.trim_end().to_owned())
    }
}

/// A running contender.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) contender: Contender,
    /// `None` if the kernel does the work, or another contender's process.
    pub(crate) process: Option<Process>,
    /// The group that counts the contender's own CPU time.
    pub(crate) group: Option<Group>,
    pub(crate) targets: Vec<SocketAddr>,
}

impl Started {
    pub(crate) fn group(&self) -> Option<&Group> {
        self.group.as_ref()
    }
}
