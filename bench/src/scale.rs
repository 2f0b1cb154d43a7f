//! Simulates a host of ten thousand consumers without containers: an engine that only reports them, a real etcd with their
//! services, and the real embassy. `bench scale` prints what a start, a change, memory and a scrape cost, for hosts of
//! increasing size.

use std::{
    fmt::Write as _,
    io::{BufRead, BufReader, Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use testbed::{Embassy, FakeEngine, Host, eventually};

/// Number of bindings of each consumer, and of endpoints of each service. There are as many services as consumers.
const BINDINGS: usize = 10;
const ENDPOINTS: usize = 10;
/// Number of changes of each kind that are measured.
const CHANGES: usize = 20;
/// Timeout of anything on the largest host.
const LONG: Duration = Duration::from_secs(600);
/// The VIP, and the addresses of the endpoints that answer.
const VIP: &str = "172.17.0.1";
const SERVERS: [(&str, &str); 2] = [("10.99.0.1:7001", "a"), ("10.99.0.1:7002", "b")];
/// The service whose endpoints change, and the port on which all consumers declare it.
const PROBED: &str = "/scale/probed";
const PORT: u16 = 6000;

pub(crate) fn run() -> Result<()> {
    let sizes = std::env::var("CONSUMERS").unwrap_or_else(|_| "100 1000 10000".to_owned());
    println!("{HEADER}");
    for size in sizes.split_whitespace() {
        let consumers = size.parse().with_context(|| format!("CONSUMERS {size:?}: a number"))?;
        println!("{}", Simulation::start(consumers)?.measure()?);
    }
    Ok(())
}

const HEADER: &str = "\
| consumers | routes | endpoints | start s | CPU s | endpoint changed ms | consumer came ms | consumer went ms | table ms | rules ms | CPU ms a change | resident MiB | scrape ms | scrape MB |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|";

/// A host with a fake engine, and embassy.
struct Simulation {
    consumers: usize,
    embassy: Embassy,
    engine: FakeEngine,
    host: Host,
    /// A network namespace with the addresses of two consumers.
    place: Child,
    _servers: Vec<Child>,
    started_in: Duration,
    runtime: tokio::runtime::Runtime,
}

impl Simulation {
    fn start(consumers: usize) -> Result<Self> {
        let host = Host::builder().without_docker().start()?;
        let sh = |script: &str| host.run("sh", ["-euc", script]);
        sh(&format!(
            "ip link add docker0 type bridge; ip addr add {VIP}/12 dev docker0; ip link set docker0 up
             ip link add endpoints type bridge; ip addr add 10.99.0.1/24 dev endpoints; ip link set endpoints up; ip link set lo up"
        ))?;
        let program = std::env::current_exe().context("find the running program")?;
        let mut servers = Vec::new();
        for (address, text) in SERVERS {
            let mut command = host.command(&program);
            servers.push(command.args(["scale-serve", address, text]).spawn()?);
        }
        let mut place = host.command("unshare");
        let place = place.args(["--net", "sleep", "3600"]).spawn().context("unshare")?;
        let pid = eventually(Duration::from_secs(10), "a network namespace", || {
            let pid = host.run("pgrep", ["-f", "^sleep 3600"])?;
            Ok(pid.trim().to_owned())
        })?;
        sh(&format!(
            "ip link add outside type veth peer name inside netns {pid}; ip link set outside master docker0 up
             nsenter -t {pid} -n sh -euc 'ip link set lo up; ip link set inside up; ip addr add {}/12 dev inside; ip addr add {}/12 dev inside'",
            address(0),
            address(consumers)
        ))?;
        host.etcd()?;
        fill(&host, consumers)?;

        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let engine = runtime.block_on(async {
            let engine = FakeEngine::start();
            (0..consumers).for_each(|n| engine.insert(&id(n), container(n, consumers)));
            engine
        });
        let socket = format!("-docker=unix://{}", engine.socket().display());
        let begun = Instant::now();
        // Without the hold, because a removed consumer's connections would wait for its end.
        let etcd = "-discovery=etcd://127.0.0.1:2379";
        let flags =
            ["--dnat", "--hold=0", "--state-dir=off", "--max-services=100000", etcd, &socket];
        let embassy = host.embassy(flags)?;
        embassy.wait_ready(LONG)?;
        let started_in = begun.elapsed();
        Ok(Self { consumers, embassy, engine, host, place, _servers: servers, started_in, runtime })
    }

    /// Measures a row of the table.
    fn measure(mut self) -> Result<String> {
        let start_cpu = self.cpu()?;
        let at_start = Stages::read(&self.embassy)?;
        let before = self.cpu()?;
        let endpoint = self.endpoint_changes()?;
        let cpu = (self.cpu()? - before) / CHANGES as f64;
        let after_endpoints = Stages::read(&self.embassy)?;
        let (came, went) = self.consumers_change()?;
        let after_consumers = Stages::read(&self.embassy)?;
        let tables = [
            after_endpoints.table.mean_since(&at_start.table),
            after_consumers.table.mean_since(&after_endpoints.table),
        ];
        let rules = after_consumers.rules.mean_since(&after_endpoints.rules);
        let status = self.embassy.admin("/v1/status")?.json()?;
        let resident = self.resident()?;
        let (scrape, size) = self.scrape()?;
        let mut row = String::new();
        write!(
            row,
            "| {} | {} | {} | {:.1} | {start_cpu:.1} | {} | {} | {} | {:.1}; {:.1} | {rules:.2} | {:.1} | {resident:.0} | {scrape:.0} | {:.1} |",
            self.consumers,
            status["routes"],
            status["endpoints"],
            self.started_in.as_secs_f64(),
            spread(endpoint),
            spread(came),
            spread(went),
            tables[0],
            tables[1],
            cpu * 1e3,
            size as f64 / 1e6,
        )?;
        self.place.kill()?;
        self.place.wait()?;
        Ok(row)
    }

    /// The time from a write to etcd until a new connection reaches the other endpoint, in ms.
    fn endpoint_changes(&self) -> Result<Vec<f64>> {
        let mut follower = self.follow(0)?;
        let mut times = Vec::new();
        let program = std::env::current_exe().context("find the running program")?;
        let mut writer = self.host.command(program);
        let mut writer =
            writer.arg("scale-put").stdin(Stdio::piped()).spawn().context("etcd's client")?;
        let mut to = writer.stdin.take().context("its input")?;
        for n in 0..CHANGES {
            let (server, text) = SERVERS[(n + 1) % 2];
            let begun = now();
            writeln!(to, "{server}")?;
            times.push(follower.until(text)? - begun);
        }
        drop(to);
        writer.wait()?;
        follower.end()?;
        Ok(times)
    }

    /// The time from the engine's event until a new consumer is served, and until a removed one is not served, in ms.
    fn consumers_change(&self) -> Result<(Vec<f64>, Vec<f64>)> {
        let n = self.consumers;
        let mut follower = self.follow(n)?;
        let (mut came, mut went) = (Vec::new(), Vec::new());
        for _ in 0..CHANGES {
            let begun = now();
            self.runtime.block_on(async {
                self.engine.insert(&id(n), container(n, self.consumers));
                self.engine.tells("start", &id(n));
            });
            came.push(follower.until("a")? - begun);
            let begun = now();
            self.runtime.block_on(async {
                self.engine.has_not(&id(n));
                self.engine.tells("die", &id(n));
                self.engine.tells("destroy", &id(n));
            });
            went.push(follower.until("refused")? - begun);
        }
        follower.end()?;
        Ok((came, went))
    }

    /// A client that connects from a consumer's address, again and again.
    fn follow(&self, consumer: usize) -> Result<Follower> {
        let program = std::env::current_exe().context("find the running program")?;
        let pid = self.host.run("pgrep", ["-f", "^sleep 3600"])?;
        let mut command = self.host.command("nsenter");
        command.args(["-t", pid.trim(), "-n"]).arg(program);
        command.args(["scale-follow", &format!("{VIP}:{PORT}"), &address(consumer).to_string()]);
        let mut child = command.stdout(Stdio::piped()).spawn().context("the client")?;
        let said = BufReader::new(child.stdout.take().context("its output")?);
        Ok(Follower { child, said })
    }

    /// CPU time of embassy in seconds.
    fn cpu(&self) -> Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.embassy.pid()))?;
        let fields: Vec<_> =
            stat.rsplit_once(") ").context("stat")?.1.split(' ').skip(11).take(2).collect();
        let ticks: u64 = fields.iter().filter_map(|field| field.parse::<u64>().ok()).sum();
        Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
    }

    fn resident(&self) -> Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.embassy.pid()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
        let kib: f64 = line.split_whitespace().next().context("VmRSS")?.parse()?;
        Ok(kib / 1024.0)
    }

    /// Duration in ms and size in bytes of a scrape: the median of five.
    fn scrape(&self) -> Result<(f64, usize)> {
        let (mut times, mut size) = (Vec::new(), 0);
        for _ in 0..5 {
            let said = self.host.run("sh", [
                "-euc",
                "curl --silent --output /dev/null --write-out '%{time_total} %{size_download}' http://127.0.0.1:9990/metrics",
            ])?;
            let (time, bytes) = said.trim().split_once(' ').context("curl's figures")?;
            times.push(time.parse::<f64>()? * 1e3);
            size = bytes.parse::<f64>()? as usize;
        }
        Ok((median(&mut times), size))
    }
}

/// The total time of each stage of all changes so far, from embassy's own metrics.
struct Stages {
    table: Total,
    rules: Total,
}

impl Stages {
    fn read(embassy: &Embassy) -> Result<Self> {
        let metrics = embassy.admin("/metrics")?.body;
        let value = |name: &str| -> Result<f64> {
            let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            Ok(value.with_context(|| format!("{name} in /metrics"))?.parse()?)
        };
        let total = |name: &str| {
            Ok::<_, anyhow::Error>(Total {
                seconds: value(&format!("{name}_seconds_sum"))?,
                count: value(&format!("{name}_seconds_count"))?,
            })
        };
        Ok(Self { table: total("embassy_table_build")?, rules: total("embassy_capture_write")? })
    }
}

struct Total {
    seconds: f64,
    count: f64,
}

impl Total {
    /// Mean duration in ms since `before`.
    fn mean_since(&self, before: &Self) -> f64 {
        (self.seconds - before.seconds) * 1e3 / (self.count - before.count).max(1.0)
    }
}

/// The client in the consumers' namespace.
struct Follower {
    child: Child,
    said: BufReader<std::process::ChildStdout>,
}

impl Follower {
    /// Waits until the client meets this. Returns the time in ms.
    fn until(&mut self, met: &str) -> Result<f64> {
        loop {
            let mut line = String::new();
            ensure!(self.said.read_line(&mut line)? > 0, "the client ended before it met {met}");
            let (at, what) = line.trim().split_once(' ').context("a line of the client")?;
            if what == met {
                return Ok(at.parse()?);
            }
        }
    }

    fn end(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

/// `bench scale-serve ADDRESS TEXT`: sends the text on every connection.
pub(crate) fn serve(address: &str, text: &str) -> Result<()> {
    let listener = TcpListener::bind(address).with_context(|| format!("listen at {address}"))?;
    for client in listener.incoming() {
        // A client that has already gone is ignored.
        let _ = client.and_then(|mut client| client.write_all(text.as_bytes()));
    }
    Ok(())
}

/// `bench scale-put`: writes each line of its input into etcd, as the only endpoint of the probed service. Uses etcd's JSON
/// gateway (etcd.io/docs/v3.4/dev-guide/api_grpc_gateway) on one connection.
pub(crate) fn put() -> Result<()> {
    let etcd = TcpStream::connect("127.0.0.1:2379").context("etcd")?;
    etcd.set_nodelay(true)?;
    let (mut to, mut from) = (etcd.try_clone()?, BufReader::new(etcd));
    for line in std::io::stdin().lines() {
        let (key, value) = (base64(format!("{PROBED}/one").as_bytes()), base64(line?.as_bytes()));
        let body = format!("{{\"key\":\"{key}\",\"value\":\"{value}\"}}");
        let length = body.len();
        write!(
            to,
            "POST /v3/kv/put HTTP/1.1\r\nHost: etcd\r\nContent-Length: {length}\r\n\r\n{body}"
        )?;
        let (mut head, mut length) = (String::new(), 0);
        while head != "\r\n" {
            head.clear();
            ensure!(from.read_line(&mut head)? > 0, "etcd has closed the connection");
            if let Some(value) = head.to_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse()?;
            }
        }
        from.read_exact(&mut vec![0; length])?;
    }
    Ok(())
}

/// Base64 (RFC 4648, section 4).
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let bits =
            (0..3).fold(0, |bits, n| bits << 8 | u32::from(chunk.get(n).copied().unwrap_or(0)));
        for n in 0..4 {
            let six = (bits >> (18 - 6 * n)) as usize & 63;
            text.push(if n <= chunk.len() { char::from(ALPHABET[six]) } else { '=' });
        }
    }
    text
}

/// `bench scale-follow TARGET SOURCE`: connects again and again, and prints what it met, with the time, whenever this
/// changes. Ends with its reader, and after ten minutes at the latest.
pub(crate) fn follow(target: &str, source: &str) -> Result<()> {
    let target: SocketAddr = target.parse().context("TARGET: an address and a port")?;
    let source: IpAddr = source.parse().context("SOURCE: an address")?;
    let (mut before, mut out) = (String::new(), std::io::stdout());
    let end = Instant::now() + LONG;
    while Instant::now() < end {
        let met = dial(target, source);
        if met != before {
            if writeln!(out, "{:.3} {met}", now()).and_then(|()| out.flush()).is_err() {
                return Ok(());
            }
            before = met;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn dial(target: SocketAddr, source: IpAddr) -> String {
    let connect = || -> std::io::Result<String> {
        let socket = rustix::net::socket(
            rustix::net::AddressFamily::INET,
            rustix::net::SocketType::STREAM,
            None,
        )?;
        rustix::net::bind(&socket, &SocketAddr::new(source, 0))?;
        rustix::net::connect(&socket, &target)?;
        let mut stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    };
    connect().unwrap_or_else(|_| "refused".to_owned())
}

/// The machine's monotonic clock in ms, the same for all processes.
fn now() -> f64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec as f64 * 1e3 + time.tv_nsec as f64 / 1e6
}

/// Writes the services of all consumers into etcd.
fn fill(host: &Host, services: usize) -> Result<()> {
    host.etcd()?.v3().put(&format!("{PROBED}/one"), SERVERS[0].0)?;
    let keys = (0..services).flat_map(|service| (0..ENDPOINTS).map(move |n| (service, n)));
    let keys: Vec<_> = keys.collect();
    // As many operations as etcd accepts in one transaction.
    for batch in keys.chunks(128) {
        let mut script = "\n".to_owned();
        for (service, n) in batch {
            let address = Ipv4Addr::from(0x0a64_0000 + u32::try_from(*service)?);
            writeln!(script, "put /scale/s{service}/e{n} {address}:{}", 8000 + n)?;
        }
        script.push_str("\n\n");
        let mut command = host.command("etcdctl");
        command.env("ETCDCTL_API", "3").arg("txn").stdin(Stdio::piped()).stdout(Stdio::null());
        let mut child = command.spawn().context("etcdctl")?;
        child.stdin.take().context("its input")?.write_all(script.as_bytes())?;
        ensure!(child.wait()?.success(), "etcdctl txn failed");
    }
    Ok(())
}

/// The address of a consumer. The last one is that of the consumer that is added and removed.
fn address(n: usize) -> Ipv4Addr {
    Ipv4Addr::from(0xac11_0002 + u32::try_from(n).unwrap_or(0))
}

fn id(n: usize) -> String {
    format!("{n:064x}")
}

/// A container with a binding for the probed service, and for some others.
fn container(n: usize, consumers: usize) -> Value {
    let others = (1..BINDINGS).map(|b| {
        let service = (n * BINDINGS + b) % consumers;
        format!("BACKEND_{b}=/scale/s{service};{}", usize::from(PORT) + b)
    });
    let probed = format!("BACKEND_PROBED={PROBED};{PORT}");
    let network = json!({"bridge": {
        "NetworkID": "n", "IPAddress": address(n).to_string(), "GlobalIPv6Address": "", "Gateway": VIP
    }});
    json!({
        "Id": id(n),
        "Name": format!("/consumer-{n}"),
        "State": {"Running": true, "StartedAt": "2026-01-01T00:00:00Z", "Pid": 0},
        "HostConfig": {"NetworkMode": "default"},
        "Config": {"Env": std::iter::once(probed).chain(others).collect::<Vec<_>>()},
        "NetworkSettings": {"Networks": network}
    })
}

/// `median (lowest to highest)`, in ms.
fn spread(mut times: Vec<f64>) -> String {
    let middle = median(&mut times);
    let (least, most) = (times.first().copied(), times.last().copied());
    format!("{middle:.1} ({:.1} to {:.1})", least.unwrap_or_default(), most.unwrap_or_default())
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The examples of RFC 4648, section 10.
    #[test]
    fn base64_is_that_of_the_rfc() {
        for (text, expected) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")]
        {
            assert_eq!(base64(text.as_bytes()), expected);
        }
    }
}
