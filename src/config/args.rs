//! The command line as typed. Every value is still text: `Config` reads it, and the environment if a flag is absent.

use std::ffi::OsStr;

use clap::{
    Arg, Command, Error, Parser,
    builder::{PossibleValue, StringValueParser, TypedValueParser},
};

/// Connects the containers of this host to the services they need.
///
/// A container declares a service in its environment, for example BACKEND_REDIS='redis.master;6379', and connects to the
/// proxy's virtual IP (VIP) on that port. Write a flag as -flag v, -flag=v, --flag v or --flag=v. A flag overrides its
/// environment variable. Write a time as 500ms, 10s, 2m, 1h or a number of seconds; at most 8760h.
#[derive(Debug, Clone, Parser)]
#[command(name = "embassy", version, args_override_self = true, max_term_width = 120)]
#[command(after_help = ENVIRONMENT)]
pub(crate) struct Args {
    /// Capture connections that arrive for a VIP: install the firewall rules, and remove them on exit
    #[arg(long, help_heading = CAPTURE, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(super) dnat: Option<String>,

    /// Like --dnat, and also capture connections that this host or container opens itself, and connections of linked
    /// containers to any address of its own
    #[arg(long, help_heading = CAPTURE, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(super) redirect: Option<String>,

    /// Ports to capture: "declared", only ports that a consumer declared; "all", every TCP port of a VIP that arrives
    /// by a Docker bridge. With "all", services of the host that listen on a VIP cannot be reached from containers [default: declared]
    #[arg(
        long,
        help_heading = CAPTURE,
        value_name = "SCOPE",
        hide_possible_values = true,
        value_parser = Suggestions(&["declared", "all"])
    )]
    pub(super) capture: Option<String>,

    /// Firewall to use: "nft", a table that only this process can change; "nft-shared", a table that every program can change;
    /// "iptables"; or "auto", nft if the kernel has it, else iptables [default: auto]
    #[arg(
        long,
        help_heading = CAPTURE,
        value_name = "TOOL",
        hide_possible_values = true,
        value_parser = Suggestions(&["auto", "nft", "nft-shared", "iptables"])
    )]
    pub(super) firewall: Option<String>,

    /// Bind each container's address to the container's own port of its bridge, so that no other container can use it. "vip":
    /// for packets to a VIP; "full": ARP, neighbour discovery and Ethernet addresses too, which also stops virtual machines and
    /// nested bridges inside containers; "off". Needs nft, and in a container --pid=host [default: vip]
    #[arg(
        long,
        help_heading = CAPTURE,
        value_name = "GUARD",
        hide_possible_values = true,
        value_parser = Suggestions(&["vip", "full", "off"])
    )]
    pub(super) guard: Option<String>,

    /// VIPs, comma separated [default: docker0's address and the gateway of each bridge network with a consumer; of every
    /// bridge network while --hold is above 0 and --capture=declared] [env: PROXY_IP]
    #[arg(long, help_heading = CAPTURE, value_name = "IP,...")]
    pub(super) proxy_ip: Option<String>,

    /// TCP port that captured connections are redirected to, 1 to 65535 [default: 9999] [env: PROXY_PORT]
    #[arg(long, short, help_heading = CAPTURE, value_name = "PORT")]
    pub(super) port: Option<String>,

    /// Where bindings come from: "docker", the containers of the engine; "static", the flag --services [default: docker]
    #[arg(
        long,
        help_heading = CONSUMERS,
        value_name = "PROVIDER",
        hide_possible_values = true,
        value_parser = Suggestions(&["docker", "static"])
    )]
    pub(super) provider: Option<String>,

    /// Bindings of the static provider: svc;port,svc[tag,tag];port. The only consumer is this host or container; its name is "local"
    #[arg(long, help_heading = CONSUMERS, value_name = "DESCRIPTOR,...")]
    pub(super) services: Option<String>,

    /// Docker engine: unix:///path or tcp://host:port. DOCKER_TLS_VERIFY and DOCKER_CERT_PATH enable TLS
    /// [default: unix:///var/run/docker.sock] [env: DOCKER_HOST]
    #[arg(long, help_heading = CONSUMERS, value_name = "URI")]
    pub(super) docker: Option<String>,

    /// Prefix of the environment variables that declare bindings (literal, not a pattern) [default: BACKEND_]
    #[arg(long, help_heading = CONSUMERS, value_name = "PREFIX")]
    pub(super) prefix: Option<String>,

    /// Maximum number of bindings of one consumer, at least 1. Further ones are reported and get no route: of a container those
    /// with the highest ports. At most 1024 variables and 1024 labels of a container are read, whatever this is. A low number
    /// breaks containers that need more [default: 256]
    #[arg(long, help_heading = CONSUMERS, value_name = "NUMBER")]
    pub(super) max_bindings_per_consumer: Option<String>,

    /// Maximum number of services that all consumers together may use, at least 1; a service with other tags or another datacentre
    /// counts as another service. Bindings of further services are reported and get no route; services in use stay. Each service is
    /// a query to its registry [default: 4096]
    #[arg(long, help_heading = CONSUMERS, value_name = "NUMBER")]
    pub(super) max_services: Option<String>,

    /// Interface whose address is the source address of the static provider's consumer; 127.0.0.1 and ::1 always count
    /// too [default: eth0] [env: INTERFACE]
    #[arg(long, help_heading = CONSUMERS, value_name = "NAME")]
    pub(super) interface: Option<String>,

    /// Where endpoints come from: consul://, consuls://, etcd://, etcd2://, etcd3://, docker://, file:///path or
    /// dns://resolver. May be repeated: then a descriptor selects one with via=<scheme>, and the first is used by
    /// default [default: consul:// with CONSUL_HTTP_ADDR, else consul://127.0.0.1:8500] [env: DISCOVERY]
    #[arg(long, help_heading = DISCOVERY, value_name = "URI")]
    pub(super) discovery: Vec<String>,

    /// Networks that the endpoints of registries may be in, comma separated; endpoints of file:// and of containers of this
    /// host are not limited. Loopback, link-local and metadata addresses and VIPs are only allowed by a network that
    /// consists of such addresses (a VIP only by its own address) [default: any address except those]
    #[arg(long, help_heading = DISCOVERY, value_name = "CIDR,...")]
    pub(super) endpoints: Option<String>,

    /// Use only endpoints that pass their health checks [default: true]
    #[arg(long, help_heading = DISCOVERY, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(super) filter: Option<String>,

    /// Interval between full re-reads of each source (varies by 10 %), at least 1s. A short interval loads the registries; a long one
    /// delays the repair of a missed event [default: 120]
    #[arg(long, help_heading = DISCOVERY, value_name = "TIME")]
    pub(super) resync: Option<String>,

    /// How long the last endpoints stay in use after a valid answer from discovery that has none, or, of five or more,
    /// fewer than half. 0: connections are reset at once, also when a registry has lost its data [default: 30s]
    #[arg(long, help_heading = DISCOVERY, value_name = "TIME")]
    pub(super) empty_hold: Option<String>,

    /// Client certificate for etcd (PEM file); needs --etcd-keycert
    #[arg(long, help_heading = DISCOVERY, value_name = "FILE")]
    pub(super) etcd_cert: Option<String>,

    /// Private key of --etcd-cert (PEM file)
    #[arg(long, help_heading = DISCOVERY, value_name = "FILE")]
    pub(super) etcd_keycert: Option<String>,

    /// CA certificates that etcd's certificate is verified with (PEM file)
    #[arg(long, help_heading = DISCOVERY, value_name = "FILE")]
    pub(super) etcd_cacert: Option<String>,

    /// Directory where the last table is saved, for a start while Docker or a registry is down; "off": do not save
    /// [default: /var/lib/embassy]
    #[arg(long, help_heading = DISCOVERY, value_name = "DIRECTORY")]
    pub(super) state_dir: Option<String>,

    /// Ignore saved data that its source confirmed longer ago than this [default: 24h]
    #[arg(long, help_heading = DISCOVERY, value_name = "TIME")]
    pub(super) state_max_age: Option<String>,

    /// Balancing policy of descriptors without lb=: "rr", round robin; "leastconn", least connections [default: rr]
    #[arg(
        long,
        help_heading = TRAFFIC,
        value_name = "POLICY",
        hide_possible_values = true,
        value_parser = Suggestions(&["rr", "leastconn"])
    )]
    pub(super) lb: Option<String>,

    /// Path of the connections of descriptors without path=: "proxy", through embassy; "kernel", from the container to the endpoint,
    /// which the kernel chooses inside connect(). That costs nothing per byte, but a connect that fails is not tried again.
    /// "auto": as kernel while all endpoints of the service are proved, else through embassy. What the kernel cannot do goes
    /// through embassy. Needs the capability BPF; auto also uses SYS_ADMIN and SYS_PTRACE [default: proxy]
    #[arg(
        long,
        help_heading = TRAFFIC,
        value_name = "PATH",
        hide_possible_values = true,
        value_parser = Suggestions(&["proxy", "kernel", "auto"])
    )]
    pub(super) path: Option<String>,

    /// How long a connection from an unknown container may wait while embassy asks Docker. 0: do not wait; a container that
    /// connects immediately after its start is then refused [default: 2s]
    #[arg(long, help_heading = TRAFFIC, value_name = "TIME")]
    pub(super) hold: Option<String>,

    /// How long an endpoint may leave sent data unacknowledged, or its receive window closed, before both sides of the
    /// connection are reset (TCP_USER_TIMEOUT), 5s to 24h; per binding with user-timeout=. The consumer's side has this time
    /// too, but at least 2m. A short time ends connections of a paused process; 0: only keepalive finds a silent endpoint,
    /// and sent data is retransmitted for 15 minutes and longer [default: 30s]
    #[arg(long, help_heading = TRAFFIC, value_name = "TIME")]
    pub(super) user_timeout: Option<String>,

    /// How long SIGTERM waits for open connections; new ones are served until then. 0: reset them at once [default: 8s]
    #[arg(long, help_heading = TRAFFIC, value_name = "TIME")]
    pub(super) drain: Option<String>,

    /// Take over from the embassy that runs in this network namespace with the same --port and --state-dir: listeners, rules,
    /// counters and open connections; the old process then ends. If none runs, this is a normal start [default: false]
    #[arg(long, help_heading = TRAFFIC, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(super) takeover: Option<String>,

    /// Maximum number of open connections, at least 1. Further ones are reset and counted [default: from the descriptor and
    /// memory limits]
    #[arg(long, help_heading = TRAFFIC, value_name = "NUMBER")]
    pub(super) max_connections: Option<String>,

    /// Maximum number of open connections of one consumer, at least 1, or "share". Further ones are reset and counted.
    /// "share" leaves room for others: beyond 16, a consumer may have three times as many open as are still free of
    /// --max-connections, a sixteenth of which is kept for consumers with fewer than 16. So one consumer alone gets 70 %.
    /// With -provider=static there is one consumer, and no limit [default: share]
    #[arg(long, help_heading = TRAFFIC, value_name = "NUMBER")]
    pub(super) max_connections_per_consumer: Option<String>,

    /// No connection tracking between embassy and endpoints on this host's Docker networks; needs nft [default: false]
    #[arg(long, help_heading = TRAFFIC, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(super) notrack: Option<String>,

    /// Address of the admin API, the metrics and the dashboard: ip:port or unix:///path; "off": none. Everyone who can
    /// reach an ip:port can read them [default: 127.0.0.1:9990] [env: EMBASSY_ADMIN]
    #[arg(long, help_heading = OBSERVING, value_name = "ADDRESS")]
    pub(super) admin: Option<String>,

    /// File with the bearer token for changes over TCP (drain an endpoint, resync, log level). Without it, changes are
    /// accepted only over a Unix socket
    #[arg(long, help_heading = OBSERVING, value_name = "FILE")]
    pub admin_token_file: Option<String>,

    /// Connections to log when they end: "off", "errors", "all", or a random fraction such as 0.01 [default: off]
    #[arg(long, help_heading = OBSERVING, value_name = "WHICH")]
    pub(super) connection_log: Option<String>,

    /// Log format: "text" or "json" [default: text]
    #[arg(
        long,
        help_heading = OBSERVING,
        value_name = "FORMAT",
        hide_possible_values = true,
        value_parser = Suggestions(&["text", "json"])
    )]
    pub(super) log_format: Option<String>,

    /// Log verbosity: 0 changes and problems, 1 to 3 actions and reasons, 4 to 6 all messages of embassy, 7 to 10 also those of its libraries.
    /// Without this flag RUST_LOG sets the level per module [default: 0]
    #[arg(long, short, help_heading = OBSERVING, value_name = "LEVEL")]
    pub(super) verbosity: Option<String>,

    #[command(flatten)]
    pub(super) glog: Glog,
}

/// Flags of the original's logging library, which its users' scripts may still use.
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

/// Accepts any text, which `Config` parses later; shells offer these words.
#[derive(Debug, Clone)]
struct Suggestions(&'static [&'static str]);

impl TypedValueParser for Suggestions {
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

impl Args {
    /// Whether any flag was given.
    pub(crate) fn is_given(&self) -> bool {
        let none = Self::try_parse_from(["embassy"]);
        // All values are text, so they are equal if their debug output is.
        none.is_ok_and(|none| format!("{none:?}") != format!("{self:?}"))
    }
}

impl Glog {
    /// The flags that were given.
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
const CONSUMERS: &str = "Consumers: who needs which service";
const DISCOVERY: &str = "Discovery: where services are";
const TRAFFIC: &str = "Traffic";
const OBSERVING: &str = "Observing";

const ENVIRONMENT: &str = "\
Environment without a flag:
  CONSUL_HTTP_ADDR
          The address for a consul:// URI without an address
  CONSUL_NAMESPACE, CONSUL_PARTITION
          The namespace and the partition of a consul:// URI without ns= and partition=
  CONSUL_HTTP_TOKEN, CONSUL_HTTP_TOKEN_FILE, CONSUL_HTTP_AUTH, CONSUL_HTTP_SSL,
  CONSUL_HTTP_SSL_VERIFY, CONSUL_TLS_SERVER_NAME, CONSUL_CACERT, CONSUL_CAPATH,
  CONSUL_CLIENT_CERT, CONSUL_CLIENT_KEY
          As in every Consul tool
  ETCD_USERNAME, ETCD_PASSWORD
          etcd authentication
  DOCKER_TLS_VERIFY, DOCKER_CERT_PATH
          TLS to the engine: key.pem, cert.pem and ca.pem in this directory [default: ~/.docker]
  IPTABLES_TRACK_MAX_CONNECTIONS, IPTABLES_TRACK_TIMEOUT, IPTABLES_TRACK_HASHSIZE
          Set nf_conntrack_max, nf_conntrack_tcp_timeout_time_wait (seconds) and the hash size at start; unset: no change";
