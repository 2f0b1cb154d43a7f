//! The programs that are compared. Each is configured as its own documents recommend for speed, with as many threads as
//! there are cores.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use testbed::eventually;

use crate::{
    group::Group,
    load::Kind,
    serve,
    site::{Client, Lasts, Load, Site, Started},
};

/// docker0's address.
pub(crate) const VIP: Ipv4Addr = Ipv4Addr::new(172, 17, 0, 1);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Contender {
    /// Clients connect to the endpoints themselves.
    Direct,
    /// The kernel translates addresses. There is no relay.
    Dnat,
    Haproxy,
    Nginx,
    Envoy,
    Embassy,
    /// The same process, with a binding that uses the kernel path.
    EmbassyKernel,
}

impl Contender {
    pub(crate) const ALL: [Contender; 7] = [
        Contender::Direct,
        Contender::Dnat,
        Contender::Haproxy,
        Contender::Nginx,
        Contender::Envoy,
        Contender::Embassy,
        Contender::EmbassyKernel,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Dnat => "kernel DNAT",
            Self::Haproxy => "HAProxy",
            Self::Nginx => "nginx",
            Self::Envoy => "Envoy",
            Self::Embassy => "embassy",
            Self::EmbassyKernel => "embassy, kernel path",
        }
    }

    /// Whether a process relays the connections.
    pub(crate) fn is_proxy(self) -> bool {
        !matches!(self, Self::Direct | Self::Dnat | Self::EmbassyKernel)
    }

    /// Whether the benchmark writes its capture rule.
    pub(crate) fn is_captured(self) -> bool {
        !matches!(self, Self::Direct | Self::Embassy | Self::EmbassyKernel)
    }

    /// The port to which clients connect.
    pub(crate) fn port(self) -> u16 {
        match self {
            // Only the address is translated.
            Self::Direct | Self::Dnat => serve::PORT,
            _ => 8000 + self as u16,
        }
    }

    /// The port on which it listens.
    pub(crate) fn listens(self) -> u16 {
        if matches!(self, Self::Embassy | Self::EmbassyKernel) {
            9999
        } else {
            10_000 + self.port()
        }
    }

    /// Its program. `None` if it is missing, or there is none.
    pub(crate) fn program(self) -> Option<PathBuf> {
        let path = match self {
            Self::Direct | Self::Dnat => return None,
            Self::Haproxy => sid().join("usr/sbin/haproxy"),
            Self::Nginx => sid().join("usr/sbin/nginx"),
            Self::Envoy => cache().join("envoy"),
            Self::Embassy | Self::EmbassyKernel => testbed::embassy_program().ok()?,
        };
        path.is_file().then_some(path)
    }

    /// Its version, on one line.
    pub(crate) fn version(self) -> Result<String> {
        let mut command = match self {
            Self::Direct | Self::Dnat => {
                let mut command = Command::new("uname");
                command.arg("-sr");
                command
            }
            Self::Haproxy => chrooted(&["haproxy", "-v"]),
            Self::Nginx => chrooted(&["nginx", "-v"]),
            Self::Envoy | Self::Embassy | Self::EmbassyKernel => {
                let mut command = Command::new(self.program().context("it is missing")?);
                command.arg("--version");
                command
            }
        };
        let output = command.output().context("ask for a version")?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        let line =
            text.lines().find(|line| line.chars().any(|c| c.is_ascii_digit())).unwrap_or_default();
        // Envoy prints more than its version.
        let version = line.split('/').find(|part| {
            part.split('.').count() == 3 && part.split('.').all(|n| n.parse::<u32>().is_ok())
        });
        Ok(version.unwrap_or(line).trim().to_owned())
    }

    /// Starts it, and waits until it serves.
    pub(crate) fn start(self, site: &Site) -> Result<Started> {
        let targets = match self {
            Self::Direct => site.endpoints.clone(),
            _ => vec![SocketAddr::from((VIP, self.port()))],
        };
        let (mut process, mut group) = (None, None);
        // One process serves both paths. Whichever comes first starts it.
        let runs = if self == Self::EmbassyKernel { Self::Embassy } else { self };
        if runs.is_proxy() {
            let of_process = Group::new(&site.host, runs.name())?;
            if of_process.is_empty() {
                let mut command = of_process.command(&site.host);
                runs.words(site, &mut command)?;
                process = Some(site.host.spawn(runs.name(), command)?);
            }
            group = Some(of_process);
        }
        let started = Started { contender: self, process, group, targets };
        eventually(Duration::from_secs(30), &format!("{} to serve", self.name()), || {
            let once = Load { kind: Kind::Idle, connections: 1, rate: 0.0 };
            let done = site
                .start(Client::First, once, &started, Lasts::For(Duration::ZERO))?
                .measure()?
                .done;
            ensure!(done.units == 1, "it does not");
            Ok(())
        })?;
        if self == Self::EmbassyKernel {
            eventually(Duration::from_secs(30), "the kernel path", || {
                let scraped = site.host.http("GET", "http://127.0.0.1:9990/metrics", "")?.ok()?;
                ensure!(scraped.contains("path=\"kernel\""), "no route takes it");
                Ok(())
            })?;
        }
        Ok(started)
    }

    /// Builds its command line, and writes its configuration to disk.
    fn words(self, site: &Site, command: &mut Command) -> Result<()> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let listen = self.listens();
        match self {
            Self::Direct | Self::Dnat | Self::EmbassyKernel => {}
            Self::Haproxy => {
                let servers = lines(site, |n, endpoint| format!("  server s{n} {endpoint}"));
                let config = format!(
                    "global\n  maxconn 7000\n  nbthread {threads}\n\
                     defaults\n  mode tcp\n  timeout connect 1s\n  timeout client 1h\n  timeout server 1h\n  \
                     option splice-auto\n  option clitcpka\n  option srvtcpka\n\
                     listen bench\n  bind :{listen}\n  balance roundrobin\n{servers}"
                );
                let file = in_sid("haproxy.cfg", &config)?;
                command.arg("chroot").arg(sid()).args(["haproxy", "-db", "-f", &file]);
            }
            Self::Nginx => {
                let servers = lines(site, |_, endpoint| format!("  server {endpoint};"));
                let config = format!(
                    "load_module modules/ngx_stream_module.so;\ndaemon off;\nworker_processes {threads};\n\
                     worker_rlimit_nofile 20000;\nerror_log stderr error;\npid /tmp/nginx-bench.pid;\n\
                     events {{ worker_connections 18000; }}\n\
                     stream {{\n  upstream bench {{\n{servers}  }}\n  server {{\n  listen {listen} reuseport backlog=4096 so_keepalive=on;\n  \
                     proxy_pass bench;\n  proxy_timeout 1h;\n  proxy_socket_keepalive on;\n  }}\n}}\n"
                );
                let file = in_sid("nginx.conf", &config)?;
                command.arg("chroot").arg(sid()).args([
                    "nginx",
                    "-p",
                    "/usr/share/nginx",
                    "-c",
                    &file,
                ]);
            }
            Self::Envoy => {
                let endpoints: Vec<_> = site.endpoints.iter().map(|endpoint| {
                    serde_json::json!({ "endpoint": { "address": socket_address(*endpoint) } })
                }).collect();
                let config = serde_json::json!({ "static_resources": {
                    "listeners": [{
                        "address": socket_address(SocketAddr::from((Ipv4Addr::UNSPECIFIED, listen))),
                        "enable_reuse_port": true,
                        "filter_chains": [{ "filters": [{
                            "name": "envoy.filters.network.tcp_proxy",
                            "typed_config": {
                                "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
                                "stat_prefix": "bench", "cluster": "bench"
                            }
                        }] }]
                    }],
                    "clusters": [{
                        "name": "bench", "type": "STATIC", "lb_policy": "ROUND_ROBIN", "connect_timeout": "1s",
                        "circuit_breakers": { "thresholds": [{ "max_connections": 20000, "max_pending_requests": 20000 }] },
                        "load_assignment": { "cluster_name": "bench", "endpoints": [{ "lb_endpoints": endpoints }] }
                    }]
                } });
                let file = site.host.dir().join("envoy.json");
                fs::write(&file, config.to_string()).context("write Envoy's configuration")?;
                command.arg(self.program().context("Envoy is missing")?).arg("-c").arg(file);
                command.args([
                    "--concurrency",
                    &threads.to_string(),
                    "--log-level",
                    "error",
                    "--disable-hot-restart",
                ]);
            }
            Self::Embassy => {
                let endpoints: Vec<_> =
                    site.endpoints.iter().map(|e| format!("{:?}", e.to_string())).collect();
                let file = site.host.dir().join("services.toml");
                let services = format!(
                    "[[service]]\nname = \"bench\"\nendpoints = [{}]\n",
                    endpoints.join(", ")
                );
                fs::write(&file, services).context("write embassy's services")?;
                command.env("DOCKER_HOST", site.host.docker_url());
                command
                    .arg(self.program().context("embassy is not built")?)
                    .args(["--dnat", "--firewall=nft"]);
                command.arg(format!("-discovery=file://{}", file.display()));
            }
        }
        Ok(())
    }
}

fn socket_address(address: SocketAddr) -> serde_json::Value {
    serde_json::json!({ "socket_address": { "address": address.ip().to_string(), "port_value": address.port() } })
}

fn lines(site: &Site, line: impl Fn(usize, SocketAddr) -> String) -> String {
    site.endpoints.iter().enumerate().map(|(n, &endpoint)| line(n, endpoint) + "\n").collect()
}

/// The folder for what bench/setup.sh downloads.
fn cache() -> PathBuf {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../.testbed/cache");
    std::env::var_os("TESTBED_CACHE").map_or_else(default, PathBuf::from).join("bench")
}

fn sid() -> PathBuf {
    cache().join("sid")
}

/// Writes a file into that root, and returns its path inside.
fn in_sid(name: &str, text: &str) -> Result<String> {
    let file = format!("/etc/bench-{name}");
    fs::write(sid().join(&file[1..]), text).with_context(|| format!("write {file}"))?;
    Ok(file)
}

fn chrooted(words: &[&str]) -> Command {
    let mut command = Command::new("chroot");
    command.arg(sid()).args(words);
    command
}
