//! Collects the facts about this host. Neither changes nor judges anything.

#![expect(clippy::disallowed_methods, reason = "a command, which serves nobody")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use ipnet::{IpNet, Ipv4Net};
use rustix::process::{Resource, getrlimit};
use tokio::{sync::Notify, time::timeout};

use super::super::{
    client::{Client, Silent},
    running,
};
use crate::{
    admin::api,
    app,
    capture::{
        self, Backend, Firewall, Lock,
        input::{Barrier, CapturedTraffic, FirewallListings},
        leads::{self, Lead},
        place,
        rules::{Hook, RulePart},
    },
    config::{Admin, CaptureMode, Config, FORGOT_STATIC, Provider},
    descriptor::PathChoice,
    discovery::{Discoveries, Watches},
    docker::{
        self,
        obstacle::{self, Obstacle},
    },
    kernel,
    listening::{self, PortHolder},
    memory::{Memory, Use},
    privileges,
    provider::fixed,
    remedy, resolve,
    source::ResyncRequests,
    tls::Weakness,
};

/// All facts for the checks.
#[derive(Debug)]
pub(super) struct HostFacts {
    pub(super) capture: CaptureMode,
    /// `None`: no configured source uses it.
    pub(super) engine: Option<Result<EngineFacts, String>>,
    /// The fix if the engine does not answer, if known.
    pub(super) engine_fix: Option<String>,
    /// Each discovery, with its error if it does not answer.
    pub(super) discoveries: Vec<(Arc<str>, Result<(), SilentDiscovery>)>,
    /// The addresses of the servers of each discovery.
    pub(super) servers: Vec<(Arc<str>, SocketAddr)>,
    /// The backend that a start would use.
    pub(super) firewall: Result<Firewall, String>,
    /// The optional parts of the rules that the backend does not support, and why.
    pub(super) lacks: Vec<(RulePart, String)>,
    /// The position of our rules, by backend.
    pub(super) places: Vec<(Firewall, place::RulesPlace)>,
    /// The position for the host's own connections, with `--redirect`.
    pub(super) places_of_output: Vec<(Firewall, place::RulesPlace)>,
    /// Chains of other programs that drop captured connections, as far as they can be read. `None`: an embassy captures
    /// here and reports what it counted.
    pub(super) barriers: Option<Result<Vec<Barrier>, String>>,
    /// Rules of other programs that redirect connections to a port of this host.
    pub(super) leads: Result<Vec<Lead>, String>,
    /// The ports of this host on which a program listens.
    pub(super) listening: BTreeSet<u16>,
    /// The visible processes of proxies in this network namespace.
    pub(super) running: Vec<u32>,
    /// Whether an embassy captures here, even if its process is not visible.
    pub(super) capturing: bool,
    /// Those of them that are stopped, as by SIGSTOP.
    pub(super) stopped: Vec<u32>,
    pub(super) port: u16,
    pub(super) listener: PortHolder,
    /// `None`: there is to be no API.
    pub(super) admin: Option<AdminFacts>,
    /// Addresses of this host.
    pub(super) local: BTreeSet<IpAddr>,
    /// The VIPs of --proxy-ip.
    pub(super) vips: Option<Vec<IpAddr>>,
    pub(super) networks: Vec<Network>,
    /// Connection tracking entries.
    pub(super) conntrack: Option<Use>,
    /// The descriptor limit of the running proxy, otherwise of this process. `None`: no limit.
    pub(super) descriptors: Option<u64>,
    /// Memory of the control group of the running proxy, otherwise of this process. `None`: no limit.
    pub(super) memory: Option<Use>,
    /// The capabilities of the running proxy, otherwise of this process, as bits (man 7 capabilities).
    pub(super) capabilities: u64,
    /// Whether the kernel path works for this process. `None`: `--path` does not ask for it.
    pub(super) kernel_path: Option<Result<(), String>>,
    /// The connections that the settings leave without protection.
    pub(super) weaknesses: Vec<Weakness>,
    /// The findings of the embassy at --admin.
    pub(super) told: Vec<api::Finding>,
}

/// Why a discovery does not answer, and what to do about it.
#[derive(Debug)]
pub(super) struct SilentDiscovery {
    pub(super) error: String,
    pub(super) fix: String,
}

impl SilentDiscovery {
    /// `fix`: the fix that the source itself gives.
    pub(super) fn of(name: &str, error: &str, fix: Option<&str>) -> Self {
        let fix = fix.unwrap_or_else(|| remedy::of(name, error)).to_owned();
        Self { error: error.to_owned(), fix }
    }
}

/// The engine's address and versions.
#[derive(Debug)]
pub(super) struct EngineFacts {
    pub(super) address: String,
    pub(super) version: String,
    pub(super) api: String,
}

/// The admin API's address.
#[derive(Debug)]
pub(super) struct AdminFacts {
    pub(super) at: String,
    pub(super) answer: ApiAnswer,
    pub(super) listener: PortHolder,
    /// Why nobody can listen there.
    pub(super) error: Option<String>,
}

/// What comes of a question to the admin API.
#[derive(Debug)]
pub(super) enum ApiAnswer {
    Answers,
    /// Somebody listens there, and says nothing.
    Silent(Silent),
    /// The error.
    Fails(String),
}

/// A bridge network of the engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Network {
    pub(super) name: String,
    /// Internal: its containers reach only addresses in their own network.
    pub(super) internal: bool,
    pub(super) ranges: Vec<IpNet>,
    /// The address in this network on which embassy can capture, with its interface: the gateway, or with `--redirect`
    /// embassy's own address.
    pub(super) own: Option<(IpAddr, String)>,
    /// `rp_filter` of this interface. 1 is strict.
    pub(super) rp_filter: u8,
    /// Another interface to which answers to some of the containers are routed.
    pub(super) way_back: Option<String>,
}

/// Timeout of each request over the network.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

pub(super) async fn facts(config: &Config) -> HostFacts {
    let interfaces = if_addrs::get_if_addrs().unwrap_or_default();
    let interfaces: BTreeMap<_, _> = interfaces.into_iter().map(|i| (i.ip(), i.name)).collect();
    let asks_engine =
        config.provider == Provider::Docker || config.discoveries.names().any(|n| &**n == "docker");
    let (engine, networks) = if asks_engine {
        match timeout(PATIENCE, engine(config, &interfaces)).await {
            Ok(Ok((engine, networks))) => (Some(Ok(engine)), networks),
            Ok(Err(error)) => (Some(Err(error)), Vec::new()),
            Err(_) => (Some(Err(format!("{}: no answer", config.docker))), Vec::new()),
        }
    } else {
        (None, Vec::new())
    };
    let obstacle = match &engine {
        Some(Err(_)) => obstacle::of(&config.docker),
        Some(Ok(_)) | None => None,
    };
    let (engine, engine_fix) = match obstacle {
        Some(Obstacle { what, fix }) => {
            (Some(Err(format!("{}: {what}", config.docker))), Some(fix))
        }
        None => (engine, None),
    };
    let engine_fix = match &engine {
        Some(Err(_)) if config.forgot_static() => Some(FORGOT_STATIC.to_owned()),
        _ => engine_fix,
    };
    let (mut places, mut places_of_output) = (Vec::new(), Vec::new());
    for firewall in [Firewall::Nft, Firewall::Iptables] {
        // A backend that is not installed has no rules of embassy.
        places.push((
            firewall,
            capture::place_of(firewall, Hook::Prerouting)
                .await
                .unwrap_or(place::RulesPlace::Absent),
        ));
        if config.capture == CaptureMode::Redirect {
            let place = capture::place_of(firewall, Hook::Output)
                .await
                .unwrap_or(place::RulesPlace::Absent);
            places_of_output.push((firewall, place));
        }
    }
    let running: Vec<_> = running::proxies().iter().map(|proxy| proxy.pid).collect();
    let (admin, told) = admin(config).await;
    let capturing = Lock::is_held();
    let barriers = match told {
        Some(_) if capturing => None,
        _ => Some(barriers(config, &networks, &interfaces).await),
    };
    let (firewall, lacks) = match firewall(config).await {
        Ok((firewall, lacks)) => (Ok(firewall), lacks),
        Err(error) => (Err(error), Vec::new()),
    };
    let leads = leads::read().await;
    let memory =
        running.first().map_or_else(Memory::of_this_process, |pid| Memory::of_process(*pid));
    HostFacts {
        capture: config.capture,
        engine,
        engine_fix,
        discoveries: discoveries(&config.discoveries, PATIENCE).await,
        servers: servers(&config.discoveries).await,
        firewall,
        lacks,
        places,
        places_of_output,
        capturing,
        barriers,
        leads,
        listening: listening::ports(),
        port: config.port.get(),
        listener: listening::at((Ipv4Addr::UNSPECIFIED, config.port.get()).into()),
        stopped: running.iter().copied().filter(|pid| listening::is_stopped(*pid)).collect(),
        admin,
        running: running.clone(),
        local: interfaces.keys().copied().collect(),
        vips: config.vips.as_ref().map(|vips| vips.iter().map(|vip| vip.0).collect()),
        networks,
        conntrack: number("/proc/sys/net/netfilter/nf_conntrack_count")
            .zip(number("/proc/sys/net/netfilter/nf_conntrack_max"))
            .map(|(used, limit)| Use { used, limit }),
        descriptors: match running.first().map(|pid| descriptors(*pid)) {
            Some(Some(limit)) => limit,
            _ => getrlimit(Resource::Nofile).maximum,
        },
        memory: memory.tightest(),
        capabilities: running
            .first()
            .and_then(|pid| capabilities(&pid.to_string()))
            .or_else(|| capabilities("self"))
            .unwrap_or_default(),
        kernel_path: kernel_path(config).await,
        weaknesses: config.weaknesses(),
        told: told.unwrap_or_default(),
    }
}

/// Whether the kernel path works, if these flags ask for it.
async fn kernel_path(config: &Config) -> Option<Result<(), String>> {
    if config.path == PathChoice::Proxy || config.capture == CaptureMode::None {
        return None;
    }
    let tried = tokio::task::spawn_blocking(|| {
        privileges::take_up_bpf();
        kernel::try_out()
    });
    Some(tried.await.unwrap_or_else(|error| Err(error.to_string())))
}

/// The obstacles to captured connections, as far as other programs' rules can be read.
async fn barriers(
    config: &Config,
    networks: &[Network],
    interfaces: &BTreeMap<IpAddr, String>,
) -> Result<Vec<Barrier>, String> {
    let listings = FirewallListings::read().await;
    let own = networks.iter().filter_map(|network| network.own.as_ref());
    let vips = config.vips.iter().flatten().filter_map(|vip| interfaces.get(&vip.0));
    let bridges = own.map(|(_, interface)| interface).chain(vips).cloned().collect();
    match listings.error() {
        Some(error) => Err(error.to_string()),
        None => Ok(listings.barriers(&CapturedTraffic { port: config.port.get(), bridges })),
    }
}

/// The backend that a start with these flags would use.
async fn firewall(config: &Config) -> Result<(Firewall, Vec<(RulePart, String)>), String> {
    let rules = app::rules(config).await.map_err(|error| error.to_string())?;
    let backend =
        Backend::open(config.firewall, &rules).await.map_err(|error| error.to_string())?;
    Ok((backend.firewall(), backend.lacks().to_vec()))
}

async fn engine(
    config: &Config,
    interfaces: &BTreeMap<IpAddr, String>,
) -> Result<(EngineFacts, Vec<Network>), String> {
    let engine = &config.docker;
    let failed = |error: crate::source::SourceError| error.to_string();
    let (client, _) = docker::client::Client::connect(engine).await.map_err(failed)?;
    // The proxy does not use this request, so a filtering proxy in front of the engine may refuse it.
    let version = client.version().await.unwrap_or_default();
    let networks = client.networks().await.map_err(failed)?;
    let bridges = networks.into_iter().filter(|net| net.driver.as_deref() == Some("bridge"));
    let routes = fs::read_to_string("/proc/net/route").unwrap_or_default();
    let network = |network: docker::answers::Network| {
        let ranges = network.ranges();
        let gateways: Vec<IpAddr> = network.gateways();
        let bridge = network
            .options
            .and_then(|mut options| options.remove("com.docker.network.bridge.name"))
            .or_else(|| Some(format!("br-{}", network.id?.get(..12)?)));
        let captures = |ip: &IpAddr, interface: &str| {
            // Not every engine reports the gateway. With --redirect all own addresses capture.
            gateways.contains(ip)
                || bridge.as_deref() == Some(interface)
                || config.capture == CaptureMode::Redirect
        };
        let own = interfaces.iter().find(|(ip, interface)| {
            ranges.iter().any(|range| range.contains(*ip)) && captures(ip, interface)
        });
        let own = own.map(|(address, interface)| (*address, interface.clone()));
        let interface = own.as_ref().map(|(_, interface)| interface.as_str());
        let (rp_filter, way_back) = (
            interface.map_or(0, rp_filter),
            interface.and_then(|own| way_back(&routes, &ranges, own)),
        );
        Network {
            name: network.name.unwrap_or_default(),
            internal: network.internal.unwrap_or(false),
            ranges,
            own,
            rp_filter,
            way_back,
        }
    };
    let facts = EngineFacts {
        address: engine.to_string(),
        version: version.version.unwrap_or_default(),
        api: version.api_version.unwrap_or_default(),
    };
    Ok((facts, bridges.map(network).collect()))
}

/// The stricter of the interface's setting and the one for `all` (Documentation/networking/ip-sysctl).
fn rp_filter(interface: &str) -> u8 {
    let of = |name: &str| {
        number(&format!("/proc/sys/net/ipv4/conf/{name}/rp_filter")).unwrap_or_default()
    };
    // 0, 1 or 2.
    of("all").max(of(interface)).try_into().unwrap_or(u8::MAX)
}

/// An interface other than `own` to which some of `ranges` are routed, by the text of `/proc/net/route`.
fn way_back(routes: &str, ranges: &[IpNet], own: &str) -> Option<String> {
    let address = |hex: &str| {
        // The kernel prints the number in this machine's byte order.
        u32::from_str_radix(hex, 16).ok().map(|raw| Ipv4Addr::from(raw.to_ne_bytes()))
    };
    routes.lines().skip(1).find_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let (interface, mask) = (*fields.first()?, address(fields.get(7)?)?);
        let route = Ipv4Net::with_netmask(address(fields.get(1)?)?, mask).ok()?;
        let within = |range: &IpNet| matches!(range, IpNet::V4(range) if range.contains(&route));
        (interface != own && ranges.iter().any(within)).then(|| interface.to_owned())
    })
}

/// Sends each discovery a query for a service that does not exist: an empty result is an answer.
async fn discoveries(
    discoveries: &Discoveries,
    patience: Duration,
) -> Vec<(Arc<str>, Result<(), SilentDiscovery>)> {
    let bell = Arc::<Notify>::default();
    let resync = ResyncRequests::new(Duration::from_secs(120));
    let mut watches = Watches::new(discoveries.clone(), resync, bell.clone());
    let names: Vec<_> = discoveries.names().cloned().collect();
    for probe in discoveries.probes() {
        watches.ask(&probe);
    }
    let answered = async {
        let open = |watches: &Watches| {
            watches.known().values().any(|known| known.value.is_none() && known.error.is_none())
        };
        while open(&watches) {
            bell.notified().await;
        }
    };
    // Discoveries that did not answer by then are reported as such.
    let _ = timeout(patience, answered).await;
    let known = watches.known();
    let answer = |name: Arc<str>| {
        let known = known.iter().find(|(query, _)| query.via == name).map(|(_, known)| known);
        let answer = match known {
            // The login may only have the right to read some services.
            Some(known) if known.value.is_some() || known.refused => Ok(()),
            Some(known) => {
                let error = known.error.as_deref().unwrap_or("no answer");
                Err(SilentDiscovery::of(&name, error, known.fix.as_deref()))
            }
            None => Err(SilentDiscovery::of(&name, "no answer", None)),
        };
        (name, answer)
    };
    names.into_iter().map(answer).collect()
}

/// The addresses of the servers of each discovery, as far as their names can be looked up.
async fn servers(discoveries: &Discoveries) -> Vec<(Arc<str>, SocketAddr)> {
    let mut all = Vec::new();
    for name in discoveries.names() {
        for server in discoveries.servers_of(name) {
            let found = timeout(PATIENCE, resolve::server(&server)).await;
            let found = found.ok().and_then(Result::ok).unwrap_or_default();
            all.extend(found.into_iter().map(|server| (name.clone(), server)));
        }
    }
    all
}

/// What the admin API's address is like.
async fn admin(config: &Config) -> (Option<AdminFacts>, Option<Vec<api::Finding>>) {
    let Some(at) = config.admin.clone() else { return (None, None) };
    let (told, answer) = match Client::new(at.clone()) {
        Err(error) => (None, ApiAnswer::Fails(format!("{error:#}"))),
        Ok(client) => told(&client).await,
    };
    let (found, error) = match &at {
        Admin::Tcp(address) => {
            let is_missing =
                fixed::here([address.ip()]).is_empty() && !address.ip().is_unspecified();
            let error = is_missing.then(|| "no interface of this host has this address".to_owned());
            (listening::at(*address), error)
        }
        Admin::Unix(path) => {
            let folder = path.parent().filter(|folder| !folder.is_dir());
            let error = folder.map(|folder| format!("there is no folder {}", folder.display()));
            (listening::at_path(path), error)
        }
    };
    (Some(AdminFacts { at: at.to_string(), answer, listener: found, error }), told)
}

/// The findings of a running embassy, if one answers.
async fn told(client: &Client) -> (Option<Vec<api::Finding>>, ApiAnswer) {
    let status = client.get::<api::Status>("/v1/status", &[]);
    let findings = match timeout(PATIENCE + Duration::from_secs(1), status).await {
        Ok(Ok(status)) => status.findings,
        Ok(Err(error)) => match error.downcast::<Silent>() {
            Ok(silent) => return (None, ApiAnswer::Silent(silent)),
            Err(error) => return (None, ApiAnswer::Fails(format!("{error:#}"))),
        },
        Err(_) => return (None, ApiAnswer::Silent(client.silent(PATIENCE))),
    };
    // Who is not guarded is served, and this host may be the reason that they are not.
    let tells = |one: &api::Finding| one.verdict > api::Verdict::Ok || one.cause == "unguarded";
    (Some(findings.into_iter().filter(tells).collect()), ApiAnswer::Answers)
}

fn capabilities(process: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

/// The descriptor limit of a process: `Some(None)` without a limit (man 5 proc, "limits").
fn descriptors(pid: u32) -> Option<Option<u64>> {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    match line.split_whitespace().nth(1)? {
        "unlimited" => Some(None),
        limit => Some(Some(limit.parse().ok()?)),
    }
}

fn number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use futures_util::future::join_all;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpSocket},
    };

    use super::*;
    use crate::{
        discovery::{ConsulSettings, EtcdSettings, Options},
        docker::Engine,
    };

    /// A server that sends this answer on each connection.
    async fn answers(with: &'static str) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let _ = stream.read(&mut [0; 4096]).await;
                    let _ = stream.write_all(with.as_bytes()).await;
                });
            }
        });
        port
    }

    fn options() -> Options {
        Options {
            healthy_only: true,
            docker: Engine::parse("unix:///nowhere", None).unwrap(),
            consul: ConsulSettings::default(),
            etcd: EtcdSettings::default(),
        }
    }

    /// Uses the real errors of the clients.
    #[tokio::test]
    async fn each_way_in_which_a_registry_fails_has_its_own_remedy() {
        fn http(status: &str, body: &str) -> &'static str {
            let length = body.len();
            format!(
                "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
            )
            .leak()
        }
        const SSH: &str = "SSH-2.0-OpenSSH_9.2p1\r\n";
        let to_https =
            || http("400 Bad Request", "Client sent an HTTP request to an HTTPS server.\n");
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        fs::write(path("wrong.toml"), "[[service\n").unwrap();
        let [missing, wrong, is_folder] =
            ["missing.toml", "wrong.toml", ""].map(|name| format!("file://{}", path(name)));
        // `P` is the port; without an answer no program listens there.
        let cases = [
            ("consul://127.0.0.1:P", None, "start Consul"),
            ("consul://127.0.0.1:P", Some(SSH), "something other than Consul"),
            (
                "consul://127.0.0.1:P",
                Some(http("404 Not Found", "")),
                "something other than Consul",
            ),
            ("consul://127.0.0.1:P", Some(http("200 OK", "[]")), "something other than Consul"),
            (
                "consul://127.0.0.1:P",
                Some(http("403 Forbidden", "Permission denied")),
                "service:read",
            ),
            (
                "consul://127.0.0.1:P",
                Some(http("403 Forbidden", "ACL not found")),
                "a token that Consul knows",
            ),
            ("consul://127.0.0.1:P", Some(to_https()), "consuls:// instead"),
            ("consuls://127.0.0.1:P", Some(http("200 OK", "[]")), "consul:// instead"),
            (
                "consul://127.0.0.1:P",
                Some(http("500 Internal Server Error", "No cluster leader")),
                "quorum",
            ),
            ("etcd://127.0.0.1:P", None, "start etcd"),
            ("etcd3://127.0.0.1:P", None, "start etcd"),
            ("etcd://127.0.0.1:P", Some(SSH), "something other than etcd"),
            ("etcd3://127.0.0.1:P", Some(SSH), "something other than etcd"),
            ("etcd://127.0.0.1:P", Some(to_https()), "-etcd-cacert"),
            ("docker://127.0.0.1:P", None, "start the engine"),
            ("docker://127.0.0.1:P", Some(SSH), "something other than a Docker engine"),
            ("docker://127.0.0.1:P", Some(http("403 Forbidden", "")), "allow GET"),
            ("dns://127.0.0.1:P", None, "DNS server"),
            (missing.as_str(), None, "create the file"),
            (is_folder.as_str(), None, "name a file"),
            (wrong.as_str(), None, "at the line"),
        ];
        let told = cases.map(|(uri, answer, words)| async move {
            // Bound but not listening: no other program gets the port meanwhile, and connections are refused.
            let taken = TcpSocket::new_v4().unwrap();
            let port = match answer {
                Some(answer) => answers(answer).await,
                None => {
                    taken.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
                    taken.local_addr().unwrap().port()
                }
            };
            let uri = uri.replace(":P", &format!(":{port}"));
            let configured = Discoveries::parse(std::slice::from_ref(&uri), &options()).unwrap();
            // A busy machine may be slow. Each case ends with an error, which ends the wait.
            let patience = Duration::from_secs(60);
            let (_, answer) = discoveries(&configured, patience).await.remove(0);
            drop(taken);
            let SilentDiscovery { error, fix } = answer.expect_err(&uri);
            (!fix.contains(words)).then(|| format!("{uri}: {error}: {fix:?}, expected {words:?}"))
        });
        let wrong: Vec<_> = join_all(told).await.into_iter().flatten().collect();
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    #[test]
    fn another_way_back_is_a_route_into_the_network_by_another_interface() {
        let hex = |text: &str| {
            format!("{:08X}", u32::from_ne_bytes(text.parse::<Ipv4Addr>().unwrap().octets()))
        };
        let route = |interface: &str, to: &str, mask: &str| {
            format!("{interface}\t{}\t00000000\t0001\t0\t0\t0\t{}\t0\t0\t0\n", hex(to), hex(mask))
        };
        let own = route("docker0", "172.17.0.0", "255.255.0.0");
        let default = route("eth0", "0.0.0.0", "0.0.0.0");
        let part = route("vpn0", "172.17.4.0", "255.255.255.0");
        let ranges = ["172.17.0.0/16".parse().unwrap()];
        let find = |all: &[&str]| way_back(&["head\n", &all.concat()].concat(), &ranges, "docker0");
        assert_eq!(find(&[&default, &own]), None);
        assert_eq!(find(&[&default, &own, &part]).as_deref(), Some("vpn0"));
    }
}
