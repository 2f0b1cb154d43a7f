//! The command line as typed. Every value is still text: `Config` reads it, and the environment where a flag is absent.

use std::ffi::OsStr;

use clap::{
    Arg, Command, Error, Parser,
    builder::{PossibleValue, StringValueParser, TypedValueParser},
};

/// Connects the containers of this host to the services they ask for.
///
/// A container asks in its environment, for example BACKEND_REDIS='redis.master;6379', and dials the proxy's virtual IP
/// on that port. Flags may be written -flag v, -flag=v, --flag v or --flag=v; a flag wins over its environment variable.
/// Times are written 500ms, 10s, 2m, 1h, or as a number of seconds; up to 8760h.
#[derive(Debug, Clone, Parser)]
#[command(name = "embassy", version, args_override_self = true, max_term_width = 120)]
#[command(after_help = ENVIRONMENT)]
pub(crate) struct Args {
    /// Capture what containers send to a virtual IP: install the rules, and remove them on exit
    #[arg(long, help_heading = CAPTURE, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(super) dnat: Option<String>,

    /// The same, and capture what this host or container sends itself, and what arrives for a linked container
    #[arg(long, help_heading = CAPTURE, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(super) redirect: Option<String>,

    /// What is captured: "declared", only the ports that a consumer declared; "all", every TCP port of a virtual IP
    /// [default: declared]
    #[arg(
        long,
        help_heading = CAPTURE,
        value_name = "SCOPE",
        hide_possible_values = true,
        value_parser = Offers(&["declared", "all"])
    )]
    pub(super) capture: Option<String>,

    /// What writes the rules: "nft", "iptables", or "auto", whichever Docker itself uses here [default: auto]
    #[arg(
        long,
        help_heading = CAPTURE,
        value_name = "TOOL",
        hide_possible_values = true,
        value_parser = Offers(&["auto", "nft", "iptables"])
    )]
    pub(super) firewall: Option<String>,

    /// The virtual IPs, comma separated [default: docker0's address and the gateway of every bridge network with a
    /// consumer; of every bridge network while --hold is on and --capture=declared] [env: PROXY_IP]
    #[arg(long, help_heading = CAPTURE, value_name = "IP,...")]
    pub(super) proxy_ip: Option<String>,

    /// The one TCP port that captured connections are led to, 1 to 65535 [default: 9999] [env: PROXY_PORT]
    #[arg(long, short, help_heading = CAPTURE, value_name = "PORT")]
    pub(super) port: Option<String>,

    /// Where bindings come from: "docker", the containers of the engine; "static", --services [default: docker]
    #[arg(
        long,
        help_heading = CONSUMERS,
        value_name = "PROVIDER",
        hide_possible_values = true,
        value_parser = Offers(&["docker", "static"])
    )]
    pub(super) provider: Option<String>,

    /// What the static provider asks for: svc;port,svc[tag,tag];port
    #[arg(long, help_heading = CONSUMERS, value_name = "DESCRIPTOR,...")]
    pub(super) services: Option<String>,

    /// The engine, unix:///path or tcp://host:port; TLS by DOCKER_TLS_VERIFY and DOCKER_CERT_PATH
    /// [default: unix:///var/run/docker.sock] [env: DOCKER_HOST]
    #[arg(long, help_heading = CONSUMERS, value_name = "URI")]
    pub(super) docker: Option<String>,

    /// How the name of a variable that is a binding begins; literally, no pattern [default: BACKEND_]
    #[arg(long, help_heading = CONSUMERS, value_name = "PREFIX")]
    pub(super) prefix: Option<String>,

    /// The interface whose address is the consumer of the static provider, beside 127.0.0.1 and ::1
    /// [default: eth0] [env: INTERFACE]
    #[arg(long, help_heading = CONSUMERS, value_name = "NAME")]
    pub(super) interface: Option<String>,

    /// Where endpoints come from: consul://, consuls://, etcd://, etcd2://, etcd3://, docker://, file://path or
    /// dns://resolver; may be given more than once, then a descriptor picks one by via=<scheme> and the first is asked
    /// where it picks none [default: consul://127.0.0.1:8500] [env: DISCOVERY]
    #[arg(long, help_heading = DISCOVERY, value_name = "URI")]
    pub(super) discovery: Vec<String>,

    /// Only endpoints that pass their health checks [default: true]
    #[arg(long, help_heading = DISCOVERY, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(super) filter: Option<String>,

    /// The time between full re-reads of every source, whatever events said; at least 1s [default: 120]
    #[arg(long, help_heading = DISCOVERY, value_name = "TIME")]
    pub(super) resync: Option<String>,

    /// How long the last endpoints stay in use after discovery says, validly, that there are none; 0: not at all
    /// [default: 30s]
    #[arg(long, help_heading = DISCOVERY, value_name = "TIME")]
    pub(super) empty_hold: Option<String>,

    /// The client certificate for etcd, a PEM file; with --etcd-keycert
    #[arg(long, help_heading = DISCOVERY, value_name = "FILE")]
    pub(super) etcd_cert: Option<String>,

    /// The key of --etcd-cert, a PEM file
    #[arg(long, help_heading = DISCOVERY, value_name = "FILE")]
    pub(super) etcd_keycert: Option<String>,

    /// The authorities that etcd's certificate is checked against, a PEM file
    #[arg(long, help_heading = DISCOVERY, value_name = "FILE")]
    pub(super) etcd_cacert: Option<String>,

    /// Where the last table is kept for a start while everything is down; "off": nowhere [default: /var/lib/embassy]
    #[arg(long, help_heading = DISCOVERY, value_name = "FOLDER")]
    pub(super) state_dir: Option<String>,

    /// How old a kept table may be and still be used [default: 24h]
    #[arg(long, help_heading = DISCOVERY, value_name = "TIME")]
    pub(super) state_max_age: Option<String>,

    /// How connections are spread where a descriptor does not say: "rr", round robin; "leastconn", least connections
    /// [default: rr]
    #[arg(
        long,
        help_heading = TRAFFIC,
        value_name = "POLICY",
        hide_possible_values = true,
        value_parser = Offers(&["rr", "leastconn"])
    )]
    pub(super) lb: Option<String>,

    /// How long the first connection of a container that is not known yet may wait while it is looked up; 0: never
    /// [default: 2s]
    #[arg(long, help_heading = TRAFFIC, value_name = "TIME")]
    pub(super) hold: Option<String>,

    /// How long SIGTERM waits for live connections; 0: not at all [default: 10s]
    #[arg(long, help_heading = TRAFFIC, value_name = "TIME")]
    pub(super) drain: Option<String>,

    /// Connections at a time, from 1; beyond, they are reset and counted [default: by the limits of descriptors and memory]
    #[arg(long, help_heading = TRAFFIC, value_name = "NUMBER")]
    pub(super) max_connections: Option<String>,

    /// Connections at a time of one consumer, from 1; beyond, they are reset and counted [default: no limit]
    #[arg(long, help_heading = TRAFFIC, value_name = "NUMBER")]
    pub(super) max_connections_per_consumer: Option<String>,

    /// No connection tracking between proxy and endpoints [default: false]
    #[arg(long, help_heading = TRAFFIC, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(super) notrack: Option<String>,

    /// Where the admin API, the metrics and the dashboard listen: ip:port or unix:///path; "off": nowhere
    /// [default: 127.0.0.1:9990]
    #[arg(long, help_heading = OBSERVING, value_name = "ADDRESS")]
    pub(super) admin: Option<String>,

    /// A file with the token that calls of the admin API must bear to change something (drain an endpoint, re-sync, log
    /// level); without it they may only by a unix socket
    #[arg(long, help_heading = OBSERVING, value_name = "FILE")]
    pub admin_token_file: Option<String>,

    /// Which connections are logged as they end: "off", "errors", "all", or a fraction of them such as 0.01
    /// [default: off]
    #[arg(long, help_heading = OBSERVING, value_name = "WHICH")]
    pub(super) connection_log: Option<String>,

    /// "text" or "json" [default: text]
    #[arg(
        long,
        help_heading = OBSERVING,
        value_name = "FORMAT",
        hide_possible_values = true,
        value_parser = Offers(&["text", "json"])
    )]
    pub(super) log_format: Option<String>,

    /// How much is logged, 0 to 10; RUST_LOG, where it is set, says it finer [default: 0]
    #[arg(long, short, help_heading = OBSERVING, value_name = "LEVEL")]
    pub(super) verbosity: Option<String>,

    #[command(flatten)]
    pub(super) glog: Glog,
}

/// Flags of the logging library of the original, which its users' scripts may still give.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub(crate) struct Glog {
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    logtostderr: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    alsologtostderr: Option<String>,
    #[arg(long, hide = true)]
    stderrthreshold: Option<String>,
    #[arg(long, hide = true)]
    vmodule: Option<String>,
    #[arg(long = "log_dir", hide = true)]
    log_dir: Option<String>,
    #[arg(long = "log_backtrace_at", hide = true)]
    log_backtrace_at: Option<String>,
}

/// Takes any text, which `Config` reads as it reads the environment, and has shells offer these words.
#[derive(Debug, Clone)]
struct Offers(&'static [&'static str]);

impl TypedValueParser for Offers {
    type Value = String;

    fn parse_ref(
        &self,
        command: &Command,
        arg: Option<&Arg>,
        word: &OsStr,
    ) -> Result<String, Error> {
        StringValueParser::new().parse_ref(command, arg, word)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(self.0.iter().map(PossibleValue::new)))
    }
}

impl Glog {
    /// Those that were given.
    pub(super) fn given(&self) -> impl Iterator<Item = &'static str> {
        [
            ("--logtostderr", &self.logtostderr),
            ("--alsologtostderr", &self.alsologtostderr),
            ("--stderrthreshold", &self.stderrthreshold),
            ("--vmodule", &self.vmodule),
            ("--log_dir", &self.log_dir),
            ("--log_backtrace_at", &self.log_backtrace_at),
        ]
        .into_iter()
        .filter_map(|(flag, value)| value.is_some().then_some(flag))
    }
}

const CAPTURE: &str = "Capture";
const CONSUMERS: &str = "Consumers: who asks for what";
const DISCOVERY: &str = "Discovery: where services are";
const TRAFFIC: &str = "Traffic";
const OBSERVING: &str = "Observing";

const ENVIRONMENT: &str = "\
Environment without a flag:
  CONSUL_HTTP_TOKEN, CONSUL_HTTP_TOKEN_FILE, CONSUL_HTTP_AUTH, CONSUL_HTTP_SSL,
  CONSUL_HTTP_SSL_VERIFY, CONSUL_CACERT, CONSUL_CLIENT_CERT, CONSUL_CLIENT_KEY
          As every Consul tool reads them
  ETCD_USERNAME, ETCD_PASSWORD
          Authentication to etcd
  DOCKER_TLS_VERIFY, DOCKER_CERT_PATH
          TLS to the engine: key.pem, cert.pem and ca.pem in that folder [default: ~/.docker]
  IPTABLES_TRACK_MAX_CONNECTIONS, IPTABLES_TRACK_TIMEOUT, IPTABLES_TRACK_HASHSIZE
          Set nf_conntrack_max, nf_conntrack_tcp_timeout_time_wait (seconds) and the hash size at start; unset: left alone";
