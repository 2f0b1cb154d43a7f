//! The command line and the environment. Here the typed text (`Args`) is converted once into typed values (`Config`).

use std::{error::Error, fmt, net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

use clap::{
    Arg, ArgAction, Command, CommandFactory, FromArgMatches, ValueEnum,
    error::{ContextKind, ContextValue, ErrorKind},
};

use crate::{
    descriptor::{Balance, Descriptor, PathChoice},
    discovery::Discoveries,
    docker::Engine,
    model::{NotAPort, Port, Vip},
    provider::fixed::LOCAL,
    text::without_secrets,
    tls::Weakness,
    word::worded,
};
pub(crate) use args::Args;
pub(crate) use values::typed_duration as duration;
pub(crate) use words::words;

mod args;
mod read;
mod values;
mod words;

#[cfg(test)]
mod tests;

/// The settings of one run of embassy.
#[derive(Debug, Clone)]
pub struct Config {
    pub provider: Provider,
    /// The engine whose containers are the consumers.
    pub docker: Engine,
    /// Prefix of the names of the variables that declare bindings. Literal, not empty.
    pub prefix: String,
    /// The interface whose address is a consumer address of the static provider.
    pub interface: String,
    /// Where endpoints come from.
    pub discoveries: Discoveries,
    /// Interval between full re-reads of every source. At least a second.
    pub resync: Duration,
    /// How long the last endpoints stay in use after a valid empty answer. 0: not at all.
    pub empty_hold: Duration,
    /// Whether to take over from the embassy that runs here, if there is one.
    pub takeover: bool,
    /// The directory for the saved table. `None`: it is not saved.
    pub state_dir: Option<PathBuf>,
    /// A saved table that is older is not used.
    pub state_max_age: Duration,
    /// The proxy's port.
    pub port: Port,
    /// `None`: docker0's address and the gateways of the bridge networks that have a consumer. Sorted, without duplicates.
    pub vips: Option<Vec<Vip>>,
    pub capture: CaptureMode,
    pub capture_scope: CaptureScope,
    pub firewall: FirewallChoice,
    pub guard: Guard,
    /// For descriptors without `lb=`.
    pub balance: Balance,
    /// For descriptors without `path=`.
    pub path: PathChoice,
    /// How long the first connection of an unknown container may wait. 0: not at all.
    pub hold: Duration,
    /// How long data sent to an endpoint may stay unacknowledged. 0: as long as the kernel retransmits.
    pub user_timeout: Duration,
    /// How long a shutdown waits for open connections.
    pub drain: Duration,
    /// `None`: from the limits for descriptors and memory. At least 1.
    pub max_connections: Option<usize>,
    pub max_connections_per_consumer: ConsumerLimit,
    /// Maximum number of bindings of one consumer. At least 1.
    pub max_bindings_per_consumer: usize,
    /// Maximum number of different services of all consumers. At least 1.
    pub max_services: usize,
    /// No connection tracking between proxy and endpoints.
    pub notrack: bool,
    pub conntrack: Conntrack,
    /// The address of the admin API. `None`: there is no API.
    pub admin: Option<Admin>,
    /// File with the token for changes via the admin API over TCP. `None`: no changes over TCP.
    pub admin_token_file: Option<PathBuf>,
    pub connection_log: ConnectionLog,
    pub log_format: LogFormat,
    /// 0 to 10.
    pub verbosity: u8,
    /// `RUST_LOG`
    pub log_filter: Option<String>,
    /// Flags that were given but have no effect in this run. They are named in one warning.
    pub ignored: Vec<&'static str>,
}

/// Maximum number of open connections of one consumer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConsumerLimit {
    /// Three times as many as are still free, so that there is room for others. The fewer consumers use their share, the
    /// larger it is.
    Share,
    /// At least 1.
    Most(usize),
}

impl ConsumerLimit {
    pub const NONE: Self = Self::Most(usize::MAX);

    /// A consumer with fewer connections than this is always allowed another one, if any is free.
    const FEW: usize = 16;
    /// One connection in this many is kept for those consumers.
    const RESERVED_SHARE: usize = 16;

    /// The limit if `free` of `all` possible connections are not open.
    pub fn with(self, free: usize, all: usize) -> usize {
        match self {
            Self::Share => {
                let free = free.saturating_sub(all / Self::RESERVED_SHARE);
                free.saturating_mul(3).max(Self::FEW)
            }
            Self::Most(most) => most,
        }
    }
}

impl Config {
    /// Whether `-services` is given without `-provider=static`.
    pub fn forgot_static(&self) -> bool {
        self.ignored.iter().any(|flag| flag.starts_with("--services "))
    }
}

/// Identifies this embassy for people.
#[derive(Debug, Clone)]
pub struct Instance {
    /// The host's name.
    pub host: String,
    /// The engine whose containers are the consumers, if they are.
    pub engine: Option<String>,
    /// The URIs of the discoveries. They contain no secrets.
    pub discoveries: Vec<String>,
    /// The only consumer of the static provider.
    pub consumer: Option<&'static str>,
    /// Whether `-services` is given, which the engine's provider does not read.
    pub forgot_static: bool,
}

/// What to do if the engine does not answer, and `-services` is given.
pub const FORGOT_STATIC: &str = "start embassy with -provider=static: -services is given, and without it embassy asks a Docker engine for containers and does not read -services";

impl Instance {
    pub fn of(config: &Config) -> Self {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let (engine, consumer) = match config.provider {
            Provider::Docker => (Some(config.docker.to_string()), None),
            Provider::Static(_) => (None, Some(LOCAL)),
        };
        let discoveries = config.discoveries.uris().values().cloned().collect();
        Self { host, engine, discoveries, consumer, forgot_static: config.forgot_static() }
    }
}

/// The source of bindings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Provider {
    /// The environment and labels of the engine's containers.
    Docker,
    /// `-services`, at least one.
    Static(Vec<Descriptor>),
}

worded! {
    /// Which rules are installed.
    pub enum CaptureMode {
        /// none: the user keeps their own
        None = "none",
        /// `--dnat`: what arrives for a VIP
        Dnat = "dnat",
        /// `--redirect`: what is sent from here as well, and what arrives for a linked container
        Redirect = "redirect",
    }

    /// What the rules match of a VIP's traffic.
    pub enum CaptureScope {
        /// the ports that consumers declared
        Declared = "declared",
        /// all TCP that arrives; of what is sent from here, which may be our own requests to a discovery, the declared ports
        All = "all",
    }
}

/// How the addresses of containers are bound to the ports of their bridges.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Guard {
    /// Not at all.
    Off,
    /// For what goes to a VIP.
    Vip,
    /// ARP, neighbour discovery and Ethernet addresses too.
    Full,
}

/// What holds the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FirewallChoice {
    /// nf_tables if the kernel has it, otherwise iptables.
    Auto,
    /// A table of nf_tables that belongs to this process, if the kernel supports that.
    Nft,
    /// One that others can change.
    NftShared,
    /// iptables, by its programs.
    Iptables,
}

/// The address of the admin API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admin {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// Text that is not an API address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("<ip>:<port> such as 127.0.0.1:9990, or unix:///path")]
pub struct NotAnAdmin;

impl FromStr for Admin {
    type Err = NotAnAdmin;

    fn from_str(text: &str) -> Result<Self, NotAnAdmin> {
        values::admin(text).ok_or(NotAnAdmin)
    }
}

impl fmt::Display for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

/// The connections that are logged at their end.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ConnectionLog {
    Off,
    /// Those with an error.
    Errors,
    All,
    /// A random fraction of them, between 0 and 1 exclusively.
    Fraction(f64),
}

/// The format of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

/// Settings of the kernel's connection tracking to apply at start: `IPTABLES_TRACK_*`. `None`: not changed. At least 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Conntrack {
    /// `nf_conntrack_max`
    pub max_connections: Option<u32>,
    /// `nf_conntrack_tcp_timeout_time_wait`, in seconds
    pub timeout: Option<u32>,
    /// Number of hash buckets.
    pub hashsize: Option<u32>,
}

/// Why there is no `Config`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoConfig {
    /// The proxy's `--help`, which lists the commands too.
    Help,
    /// The requested text, for stdout, with exit code 0.
    Print(String),
    /// An error, for stderr, with exit code 2.
    Usage(UsageError),
}

/// One line that names the flag or variable, its value, and what is expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(String);

impl UsageError {
    pub(crate) fn new(line: impl fmt::Display) -> Self {
        Self(line.to_string())
    }
}

impl From<UsageError> for NoConfig {
    fn from(error: UsageError) -> Self {
        Self::Usage(error)
    }
}

impl Config {
    /// Parses the arguments after the program's name. Settings without a flag come from `env`. An empty variable counts as
    /// unset.
    pub fn parse(
        words: impl IntoIterator<Item = String>,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, NoConfig> {
        let mut command = Self::flags();
        command.build();
        let words = self::words(words, &command);
        let taken = taken_for_a_value(&words, &command);
        let args = command
            .no_binary_name(true)
            .try_get_matches_from(words)
            .and_then(|matches| Args::from_arg_matches(&matches))
            .map_err(|error| match error.kind() {
                ErrorKind::DisplayHelp => NoConfig::Help,
                // The remaining word is the value of a flag that was itself taken for a value.
                ErrorKind::UnknownArgument => taken.unwrap_or_else(|| stop(error)),
                _ => stop(error),
            })?;
        Ok(Self::of(args, env)?)
    }

    /// From arguments that were already parsed.
    pub(crate) fn of(args: Args, env: &dyn Fn(&str) -> Option<String>) -> Result<Self, UsageError> {
        read::config(args, &read::Environment(env))
    }

    /// The address of the running embassy's API for a command without an own flag for it: `EMBASSY_ADMIN`, otherwise the
    /// default.
    pub(crate) fn admin_of_command(
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Admin, UsageError> {
        read::admin_of_command(&read::Environment(env))
    }

    /// The connections that these settings leave without protection, each once.
    pub fn weaknesses(&self) -> Vec<Weakness> {
        let asks_engine = self.provider == Provider::Docker;
        let engine = self.docker.weakness().filter(|_| asks_engine);
        let mut all: Vec<Weakness> = Vec::new();
        for weakness in engine.into_iter().chain(self.discoveries.weaknesses()) {
            if !all.contains(&weakness) {
                all.push(weakness);
            }
        }
        all
    }

    /// The flags about the capture and the sources that have another meaning in `other`.
    pub(crate) fn differences(&self, other: &Self) -> Vec<&'static str> {
        let firewall = [self.firewall, other.firewall];
        // "auto" may be any of the others.
        let same_firewall = firewall.contains(&FirewallChoice::Auto) || firewall[0] == firewall[1];
        let same = [
            ("--dnat or --redirect", self.capture == other.capture),
            ("--capture", self.capture_scope == other.capture_scope),
            ("--firewall", same_firewall),
            ("--guard", self.guard == other.guard),
            ("--proxy-ip", self.vips == other.vips),
            ("--port", self.port == other.port),
            ("--provider or --services", self.provider == other.provider),
            ("--docker", self.docker == other.docker),
            ("--prefix", self.prefix == other.prefix),
            ("--discovery", self.discoveries.uris() == other.discoveries.uris()),
            ("--admin", self.admin == other.admin),
            ("--notrack", self.notrack == other.notrack),
        ];
        same.into_iter().filter(|(_, same)| !same).map(|(flag, _)| flag).collect()
    }

    /// The flags of the proxy, as clap has them.
    pub(crate) fn flags() -> Command {
        let help = Arg::new("help").short('h').long("help").action(ArgAction::HelpLong);
        Args::command().disable_help_flag(true).arg(help.help("Print this help"))
    }
}

/// An error for commands such as `-v --state-dir off`: every flag except booleans takes the next word, even if it is a
/// flag.
fn taken_for_a_value(words: &[String], command: &Command) -> Option<NoConfig> {
    let is_flag = |word: &str| {
        let name = word.trim_start_matches('-');
        name != word && command.get_arguments().any(|arg| arg.get_long() == Some(name))
    };
    let mut pairs = words.iter().filter_map(|word| word.split_once('='));
    let (flag, value) = pairs.find(|(_, value)| is_flag(value))?;
    let line = format!("{flag} {value:?}: expected a value; {}", next_word(flag, value));
    Some(UsageError(line).into())
}

fn next_word(flag: &str, word: &str) -> String {
    format!("{word:?} is the next word, which {flag} takes as its value")
}

/// clap's output. An error is put on one line.
pub(crate) fn stop(error: clap::Error) -> NoConfig {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        Some(ContextValue::Strings(texts)) => texts.first().map(String::as_str),
        _ => None,
    };
    let word = context(ContextKind::InvalidArg).unwrap_or_default();
    // The flag in `--flag <VALUE>`.
    let word = word.split(' ').next().unwrap_or_default();
    let line = match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            return NoConfig::Print(error.render().to_string());
        }
        ErrorKind::UnknownArgument if word.starts_with('-') => {
            let nearest = match context(ContextKind::SuggestedArg) {
                Some(nearest) => format!("did you mean {nearest}? "),
                None => String::new(),
            };
            format!("{}: unknown flag; {nearest}--help lists them all", word.escape_debug())
        }
        ErrorKind::UnknownArgument => {
            format!("{:?}: expected a flag; --help lists them all", without_secrets(word))
        }
        ErrorKind::MissingRequiredArgument => format!("{word}: missing; see --help"),
        ErrorKind::InvalidValue | ErrorKind::ValueValidation => {
            let value = context(ContextKind::InvalidValue).unwrap_or_default();
            let expected = match error.get(ContextKind::ValidValue) {
                Some(ContextValue::Strings(values)) => values::list(values),
                _ => error.source().map(expected).unwrap_or_default(),
            };
            format!("{word} {:?}: expected {expected}", without_secrets(value))
        }
        // `--help=x` and similar.
        _ => format!("{}: expected no value", word.escape_debug()),
    };
    UsageError(line).into()
}

/// What a parser expects, in its own words.
fn expected(error: &(dyn Error + 'static)) -> String {
    match error.downcast_ref() {
        Some(NotAPort(_)) => "a port from 1 to 65535".to_owned(),
        None => error.to_string(),
    }
}
