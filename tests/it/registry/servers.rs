//! Real registries, each with its own ports and its own folder. They end with the test, however it ends.

use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::SOON;
use crate::process::{Process, free_ports};

/// `etcd` with the given flags.
pub(super) struct Etcd {
    process: Option<Process>,
    flags: Vec<String>,
    pub(super) port: u16,
    name: String,
    peer_port: u16,
    /// `name=peer` of every member.
    cluster: String,
    scheme: &'static str,
    dir: TempDir,
    http: reqwest::Client,
}

impl Etcd {
    /// With both stores.
    pub(super) async fn both() -> Self {
        Self::with("http", &["--enable-v2"]).await
    }

    pub(super) async fn with(scheme: &'static str, flags: &[&str]) -> Self {
        let [peer] = free_ports();
        let mut etcd = Self::member(0, &[peer], scheme, flags);
        etcd.start();
        etcd.ready().await;
        etcd
    }

    /// Two members with both stores. If one ends, the other has no leader.
    pub(super) async fn pair() -> [Self; 2] {
        let peers = free_ports::<2>();
        let mut pair = [0, 1].map(|i| Self::member(i, &peers, "http", &["--enable-v2"]));
        for etcd in &mut pair {
            etcd.start();
        }
        for etcd in &pair {
            etcd.ready().await;
        }
        pair
    }

    fn member(i: usize, peers: &[u16], scheme: &'static str, flags: &[&str]) -> Self {
        let member = |(i, port)| format!("m{i}=http://127.0.0.1:{port}");
        let cluster: Vec<_> = peers.iter().enumerate().map(member).collect();
        let [port] = free_ports();
        Self {
            process: None,
            flags: flags.iter().map(|&flag| flag.to_owned()).collect(),
            port,
            name: format!("m{i}"),
            peer_port: peers[i],
            cluster: cluster.join(","),
            scheme,
            dir: tempfile::tempdir().expect("a folder"),
            http: http_client(),
        }
    }

    /// Starts it, with its stored data.
    pub(super) fn start(&mut self) {
        let client = format!("{}://127.0.0.1:{}", self.scheme, self.port);
        let peer = format!("http://127.0.0.1:{}", self.peer_port);
        let mut command = Command::new("etcd");
        command.args(["--name", &self.name, "--logger", "zap", "--log-level", "warn"]);
        command.args(["--unsafe-no-fsync", "--data-dir"]).arg(self.dir.path().join("data"));
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &self.cluster]).args(&self.flags);
        self.process = Some(Process::start(&mut command, &self.dir.path().join("log")));
    }

    /// Waits until it is the leader.
    pub(super) async fn ready(&self) {
        if self.scheme == "https" {
            // With TLS, each test decides which clients may connect.
            return;
        }
        let url = format!("http://{}/health", self.address());
        eventually("etcd", &self.dir.path().join("log"), async || {
            let answer = self.http.get(&url).send().await.ok()?;
            (answer.json::<Value>().await.ok()?["health"] == "true").then_some(())
        })
        .await;
    }

    pub(super) fn stop(&mut self) {
        self.process = None;
    }

    /// Freezes it: it keeps its connections, but does nothing.
    pub(super) fn freeze(&self) {
        self.process.as_ref().expect("a running server").signal(Signal::STOP);
    }

    pub(super) fn thaw(&self) {
        self.process.as_ref().expect("a running server").signal(Signal::CONT);
    }

    pub(super) fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub(super) fn pid(&self) -> u32 {
        self.process.as_ref().expect("a running server").id()
    }

    pub(super) async fn v3(&self) -> etcd_client::Client {
        etcd_client::Client::connect([self.address()], None).await.expect("a client of etcd")
    }

    /// The number of gRPC calls since its start, of one method or (with an empty name) of all.
    pub(super) async fn calls(&self, method: &str) -> f64 {
        self.metric("grpc_server_started_total{", &format!("grpc_method=\"{method}")).await
    }

    /// The number of watches in the v3 store.
    pub(super) async fn watches(&self) -> f64 {
        self.metric("etcd_debugging_mvcc_watcher_total ", "").await
    }

    /// The sum of its metrics whose line begins with `start` and contains `words`.
    async fn metric(&self, start: &str, words: &str) -> f64 {
        let url = format!("http://{}/metrics", self.address());
        let answer = self.http.get(url).send().await.expect("an answer of etcd");
        let text = answer.text().await.expect("metrics of etcd");
        let lines = text.lines().filter(|line| line.starts_with(start) && line.contains(words));
        lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
    }

    pub(super) async fn v2_set(&self, key: &str, value: &str) {
        self.v2("PUT", key, &[("value", value)]).await;
    }

    /// A request to the v2 store, which must succeed.
    pub(super) async fn v2(&self, method: &str, key: &str, form: &[(&str, &str)]) -> Value {
        let method = method.parse().expect("a method");
        let url = format!("http://{}/v2/keys{key}", self.address());
        let request = self.http.request(method, url).query(form);
        let answer = request.send().await.expect("an answer of etcd");
        let status = answer.status();
        let body = answer.text().await.expect("a body of etcd");
        assert!(status.is_success(), "{key}: {status}: {body}");
        serde_json::from_str(&body).expect("JSON of etcd")
    }
}

/// `consul agent -dev`
pub(super) struct Consul {
    process: Option<Process>,
    ports: [u16; 4],
    config: String,
    dir: TempDir,
    http: reqwest::Client,
    token: Option<&'static str>,
}

impl Consul {
    pub(super) async fn start() -> Self {
        Self::with("{}", None).await
    }

    /// With additional configuration, and the token for this test's requests.
    pub(super) async fn with(config: &str, token: Option<&'static str>) -> Self {
        let mut consul = Self {
            process: None,
            ports: free_ports(),
            config: config.to_owned(),
            dir: tempfile::tempdir().expect("a folder"),
            http: http_client(),
            token,
        };
        consul.run();
        consul.ready().await;
        consul
    }

    pub(super) fn run(&mut self) {
        let [http, server, lan, wan] = self.ports;
        let file = self.dir.path().join("config.json");
        fs::write(&file, &self.config).expect("a configuration file");
        let mut command = Command::new(testbed::consul_program());
        command.args(["agent", "-dev", "-bind", "127.0.0.1", "-node", "it", "-log-level", "warn"]);
        command.args(["-dns-port", "-1", "-http-port", &http.to_string()]);
        command.args(["-server-port", &server.to_string(), "-serf-lan-port", &lan.to_string()]);
        command.args(["-serf-wan-port", &wan.to_string(), "-config-file"]).arg(&file);
        command.args(["-hcl", "ports { grpc = -1 }"]);
        self.process = Some(Process::start(&mut command, &self.dir.path().join("log")));
    }

    pub(super) async fn ready(&self) {
        let url = format!("http://{}/v1/health/service/consul?passing", self.address());
        eventually("Consul", &self.dir.path().join("log"), async || {
            let answer = self.request(reqwest::Method::GET, &url).send().await.ok()?;
            (answer.json::<Value>().await.ok()?.as_array()?.len() == 1).then_some(())
        })
        .await;
    }

    pub(super) fn stop(&mut self) {
        self.process = None;
    }

    pub(super) fn address(&self) -> String {
        format!("127.0.0.1:{}", self.ports[0])
    }

    pub(super) fn pid(&self) -> u32 {
        self.process.as_ref().expect("a running server").id()
    }

    /// Registers a service with a check that the test itself sets.
    pub(super) async fn register(&self, id: &str, address: &str, port: u16, tags: &[&str]) {
        let check = json!({ "CheckID": id, "Name": id, "TTL": "1h", "Status": "passing" });
        self.put(
            "/v1/agent/service/register",
            json!({
                "Name": "web", "ID": id, "Address": address, "Port": port, "Tags": tags,
                "Check": check,
            }),
        )
        .await;
    }

    pub(super) async fn put(&self, path: &str, body: Value) {
        let url = format!("http://{}{path}", self.address());
        let answer = self.request(reqwest::Method::PUT, &url).json(&body).send().await;
        let answer = answer.expect("an answer of Consul");
        let status = answer.status();
        let text = answer.text().await.expect("a body of Consul");
        assert!(status.is_success(), "{path}: {status}: {text}");
    }

    fn request(&self, method: reqwest::Method, url: &str) -> reqwest::RequestBuilder {
        let request = self.http.request(method, url);
        match self.token {
            Some(token) => request.header("X-Consul-Token", token),
            None => request,
        }
    }
}

fn http_client() -> reqwest::Client {
    embassy::tls::install_provider();
    let builder = reqwest::Client::builder().no_proxy().tls_certs_only([]);
    builder.timeout(Duration::from_secs(5)).build().expect("an HTTP client")
}

/// Repeats until there is a result.
pub(super) async fn retry<T>(server: &str, attempt: impl AsyncFnMut() -> Option<T>) -> T {
    eventually(server, Path::new("/dev/null"), attempt).await
}

/// Repeats until there is a result. On a timeout, fails with the log of `server`.
async fn eventually<T>(server: &str, log: &Path, mut attempt: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + SOON;
    loop {
        if let Some(result) = attempt().await {
            return result;
        }
        if Instant::now() > deadline {
            let log = fs::read_to_string(log).unwrap_or_default();
            panic!("{server} does not come up; it said:\n{log}");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
