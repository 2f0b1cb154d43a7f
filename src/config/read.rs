//! Parses the settings. Each comes from its flag, otherwise its variable, otherwise its default, and is parsed once.

use std::{fmt, path::PathBuf, time::Duration};

use clap::ValueEnum;

use super::{
    Admin, CaptureMode, Config, Conntrack, NotAnAdmin, Provider, UsageError, args::Args, next_word,
    values::*,
};
use crate::{
    descriptor::{Descriptor, split_list, user_timeout},
    discovery::{ConsulSettings, Discoveries, EtcdSettings, Options, Secret},
    docker::Engine,
    text::{bare, is_of_link, without_secrets},
};

/// The address of the admin API, for the proxy and for the commands.
pub(super) const ADMIN_VARIABLE: &str = "EMBASSY_ADMIN";
const ADMIN_DEFAULT: &str = "127.0.0.1:9990";

/// The API's address for a command without an own flag for it.
pub(super) fn admin_of_command(env: &Environment<'_>) -> Result<Admin, UsageError> {
    env.setting(ADMIN_VARIABLE).or(ADMIN_DEFAULT).read(admin, NotAnAdmin)
}

pub(super) fn config(args: Args, env: &Environment<'_>) -> Result<Config, UsageError> {
    let verbosity_given = args.verbosity.is_some();
    let mut ignored: Vec<_> = args.glog.given().collect();
    let docker = engine(args.docker, env)?;
    let settings = Options {
        healthy_only: switch("--filter", args.filter, "true")?,
        docker: docker.clone(),
        consul: consul(env)?,
        etcd: etcd(args.etcd_cert, args.etcd_keycert, args.etcd_cacert, env)?,
    };
    let discoveries = discoveries(args.discovery, env, &settings)?;
    let networks = flag("--endpoints", args.endpoints).read(networks, NETWORKS)?;
    let discoveries = match &networks {
        Some(networks) => discoveries.within(networks),
        None => discoveries,
    };
    let (provider, unused) = provider(args.provider, args.services, &discoveries)?;
    ignored.extend(unused);
    let capture = capture(args.dnat, args.redirect)?;
    if capture == CaptureMode::None {
        ignored.extend(args.capture.as_ref().map(|_| "--capture (needs --dnat or --redirect)"));
        ignored.extend(args.firewall.as_ref().map(|_| "--firewall (needs --dnat or --redirect)"));
        ignored.extend(args.guard.as_ref().map(|_| "--guard (needs --dnat or --redirect)"));
        ignored.extend(args.path.as_ref().map(|_| "--path (needs --dnat or --redirect)"));
    }
    Ok(Config {
        provider,
        docker,
        prefix: flag("--prefix", args.prefix).or("BACKEND_").read(prefix, PREFIX)?,
        interface: flag("--interface", args.interface)
            .or_env(env, "INTERFACE")
            .or("eth0")
            .read(interface, INTERFACE)?,
        discoveries,
        resync: flag("--resync", args.resync).or("120").read(
            |text| duration(text).filter(|time| *time >= Duration::from_secs(1)),
            format_args!("{DURATION}, and at least 1s"),
        )?,
        empty_hold: flag("--empty-hold", args.empty_hold).or("30s").read(duration, DURATION)?,
        takeover: switch("--takeover", args.takeover, "false")?,
        state_dir: flag("--state-dir", args.state_dir)
            .or("/var/lib/embassy")
            .read(unless_off(path), "the path of a folder, or off")?,
        state_max_age: flag("--state-max-age", args.state_max_age)
            .or("24h")
            .read(duration, DURATION)?,
        port: flag("--port", args.port)
            .or_env(env, "PROXY_PORT")
            .or("9999")
            .read(|text| text.parse().ok(), "a port from 1 to 65535")?,
        vips: flag("--proxy-ip", args.proxy_ip).or_env(env, "PROXY_IP").read(vips, VIPS)?,
        capture,
        capture_scope: flag("--capture", args.capture).or("declared").one_of()?,
        guard: flag("--guard", args.guard).or("vip").one_of()?,
        firewall: flag("--firewall", args.firewall).or("auto").one_of()?,
        balance: flag("--lb", args.lb).or("rr").one_of()?,
        path: flag("--path", args.path).or("proxy").one_of()?,
        hold: flag("--hold", args.hold).or("2s").read(duration, DURATION)?,
        user_timeout: flag("--user-timeout", args.user_timeout).or("30s").read(
            |text| duration(text).and_then(user_timeout),
            format_args!("{DURATION}, and 0 or from 5s to 24h"),
        )?,
        drain: flag("--drain", args.drain).or("8s").read(duration, DURATION)?,
        max_connections: flag("--max-connections", args.max_connections).read(count, COUNT)?,
        max_connections_per_consumer: flag(
            "--max-connections-per-consumer",
            args.max_connections_per_consumer,
        )
        .or("share")
        .read(consumer_limit, format_args!("{COUNT}, or share"))?,
        max_bindings_per_consumer: flag(
            "--max-bindings-per-consumer",
            args.max_bindings_per_consumer,
        )
        .or("256")
        .read(count, COUNT)?,
        max_services: flag("--max-services", args.max_services).or("4096").read(count, COUNT)?,
        notrack: switch("--notrack", args.notrack, "false")?,
        conntrack: Conntrack {
            max_connections: env.setting("IPTABLES_TRACK_MAX_CONNECTIONS").read(count, COUNT)?,
            timeout: env.setting("IPTABLES_TRACK_TIMEOUT").read(count, COUNT)?,
            hashsize: env.setting("IPTABLES_TRACK_HASHSIZE").read(count, COUNT)?,
        },
        admin: flag("--admin", args.admin)
            .or_env(env, ADMIN_VARIABLE)
            .or(ADMIN_DEFAULT)
            .read(unless_off(admin), ADMIN)?,
        admin_token_file: flag("--admin-token-file", args.admin_token_file).read(path, FILE)?,
        connection_log: flag("--connection-log", args.connection_log)
            .or("off")
            .read(connection_log, CONNECTION_LOG)?,
        log_format: flag("--log-format", args.log_format).or("text").one_of()?,
        verbosity: flag("--verbosity", args.verbosity).or("0").read(
            |text| number(text).filter(|level| *level <= 10),
            "a whole number from 0 to 10",
        )?,
        log_filter: if verbosity_given { None } else { env.text("RUST_LOG") },
        ignored,
    })
}

/// The provider, and the flag that has no effect with it.
fn provider(
    name: Option<String>,
    services: Option<String>,
    discoveries: &Discoveries,
) -> Result<(Provider, Option<&'static str>), UsageError> {
    let name = flag("--provider", name).or("docker");
    let services = flag("--services", services);
    match name.text.as_str() {
        "docker" => {
            let unused = services.text.map(|_| "--services (needs --provider=static)");
            Ok((Provider::Docker, unused))
        }
        "static" => match services.text {
            Some(list) => {
                Ok((Provider::Static(descriptors(services.name, &list, discoveries)?), None))
            }
            None => Err(UsageError::new(
                "--provider \"static\": expected --services as well: svc;port,svc[tag,tag];port",
            )),
        },
        _ => Err(name.expected("docker or static")),
    }
}

fn descriptors(
    flag: &str,
    list: &str,
    discoveries: &Discoveries,
) -> Result<Vec<Descriptor>, UsageError> {
    let descriptor = |text: &str| {
        let wrong =
            |error: &dyn fmt::Display| UsageError::new(format_args!("{flag} {text:?}: {error}"));
        let descriptor: Descriptor = text.parse().map_err(|error| wrong(&error))?;
        discoveries.query(&descriptor).map_err(|error| wrong(&error))?;
        Ok(descriptor)
    };
    split_list(list).map(descriptor).collect()
}

fn capture(dnat: Option<String>, redirect: Option<String>) -> Result<CaptureMode, UsageError> {
    match (switch("--dnat", dnat, "false")?, switch("--redirect", redirect, "false")?) {
        (false, false) => Ok(CaptureMode::None),
        (true, false) => Ok(CaptureMode::Dnat),
        (false, true) => Ok(CaptureMode::Redirect),
        (true, true) => Err(UsageError::new("--dnat and --redirect: expected only one of them")),
    }
}

/// TLS as in the docker command: enabled by any value of `DOCKER_TLS_VERIFY`, and only with TCP.
fn engine(uri: Option<String>, env: &Environment<'_>) -> Result<Engine, UsageError> {
    let certificates = env.text("DOCKER_TLS_VERIFY").and_then(|_| {
        let folder = env.text("DOCKER_CERT_PATH").map(PathBuf::from);
        folder.or_else(|| Some(PathBuf::from(env.text("HOME")?).join(".docker")))
    });
    flag("--docker", uri)
        .or_env(env, "DOCKER_HOST")
        .or("unix:///var/run/docker.sock")
        .read(|text| Engine::parse(text, certificates).ok(), "unix:///path or tcp://host:port")
}

fn discoveries(
    uris: Vec<String>,
    env: &Environment<'_>,
    settings: &Options,
) -> Result<Discoveries, UsageError> {
    let (name, uris) = if uris.is_empty() {
        // The address comes from CONSUL_HTTP_ADDR, otherwise it is 127.0.0.1:8500.
        let one = flag("--discovery", None).or_env(env, "DISCOVERY").or("consul://");
        (one.name, vec![one.text])
    } else {
        ("--discovery", uris)
    };
    Discoveries::parse(&uris, settings)
        .map_err(|error| UsageError::new(format_args!("{name} {error}")))
}

pub(super) fn consul(env: &Environment<'_>) -> Result<ConsulSettings, UsageError> {
    let file = |name| env.text(name).map(PathBuf::from);
    let certificate = file("CONSUL_CLIENT_CERT");
    let key = file("CONSUL_CLIENT_KEY");
    both(("CONSUL_CLIENT_CERT", &certificate), ("CONSUL_CLIENT_KEY", &key))?;
    Ok(ConsulSettings {
        address: env.text("CONSUL_HTTP_ADDR"),
        namespace: env.text("CONSUL_NAMESPACE"),
        partition: env.text("CONSUL_PARTITION"),
        server_name: env
            .setting("CONSUL_TLS_SERVER_NAME")
            .read(dns_name, "a DNS name, as in the server's certificate")?,
        ca_path: file("CONSUL_CAPATH"),
        token: env.text("CONSUL_HTTP_TOKEN").map(Secret::from),
        token_file: file("CONSUL_HTTP_TOKEN_FILE"),
        tls: env.setting("CONSUL_HTTP_SSL").or("false").read(boolean, BOOLEAN)?,
        tls_verify: env.setting("CONSUL_HTTP_SSL_VERIFY").or("true").read(boolean, BOOLEAN)?,
        ca: file("CONSUL_CACERT"),
        certificate,
        key,
        auth: env.text("CONSUL_HTTP_AUTH").map(Secret::from),
    })
}

pub(super) fn etcd(
    certificate: Option<String>,
    key: Option<String>,
    ca: Option<String>,
    env: &Environment<'_>,
) -> Result<EtcdSettings, UsageError> {
    let certificate = flag("--etcd-cert", certificate).read(path, FILE)?;
    let key = flag("--etcd-keycert", key).read(path, FILE)?;
    both(("--etcd-cert", &certificate), ("--etcd-keycert", &key))?;
    let (name, password) = (env.text("ETCD_USERNAME"), env.text("ETCD_PASSWORD"));
    both(("ETCD_USERNAME", &name), ("ETCD_PASSWORD", &password))?;
    Ok(EtcdSettings {
        certificate,
        key,
        ca: flag("--etcd-cacert", ca).read(path, FILE)?,
        user: name.zip(password.map(Secret::from)),
    })
}

/// Checks that two settings are given together or not at all.
fn both<T>(a: (&str, &Option<T>), b: (&str, &Option<T>)) -> Result<(), UsageError> {
    let (given, missing) = match (a.1, b.1) {
        (Some(_), None) => (a.0, b.0),
        (None, Some(_)) => (b.0, a.0),
        _ => return Ok(()),
    };
    Err(UsageError::new(format_args!("{given}: expected {missing} as well")))
}

/// The environment. An empty variable counts as unset, and so does one that a link created.
pub(super) struct Environment<'a>(pub &'a dyn Fn(&str) -> Option<String>);

impl Environment<'_> {
    fn text(&self, variable: &str) -> Option<String> {
        let text = (self.0)(variable)?;
        // `--link x:proxy`, or a service of Kubernetes called "proxy", sets PROXY_PORT.
        let is_ours = !(variable.ends_with("_PORT") && is_of_link(bare(&text)));
        Some(bare(&text)).filter(|text| is_ours && !text.is_empty()).map(str::to_owned)
    }

    fn setting(&self, variable: &'static str) -> Open {
        Open { name: variable, text: self.text(variable) }
    }
}

fn flag(name: &'static str, text: Option<String>) -> Open {
    Open { name, text }
}

fn switch(name: &'static str, text: Option<String>, default: &str) -> Result<bool, UsageError> {
    flag(name, text).or(default).read(boolean, BOOLEAN)
}

/// A setting that may not be given.
struct Open {
    name: &'static str,
    text: Option<String>,
}

impl Open {
    fn or_env(self, env: &Environment<'_>, variable: &'static str) -> Self {
        match (&self.text, env.text(variable)) {
            (None, Some(text)) => Self { name: variable, text: Some(text) },
            _ => self,
        }
    }

    fn or(self, default: &str) -> Setting {
        Setting { name: self.name, text: self.text.unwrap_or_else(|| default.to_owned()) }
    }

    fn read<T>(
        self,
        read: impl FnOnce(&str) -> Option<T>,
        expected: impl fmt::Display,
    ) -> Result<Option<T>, UsageError> {
        let name = self.name;
        self.text.map(|text| Setting { name, text }.read(read, expected)).transpose()
    }
}

/// A value as typed, and its flag or variable.
struct Setting {
    name: &'static str,
    text: String,
}

impl Setting {
    fn read<T>(
        self,
        read: impl FnOnce(&str) -> Option<T>,
        expected: impl fmt::Display,
    ) -> Result<T, UsageError> {
        read(&self.text).ok_or_else(|| self.expected(expected))
    }

    fn one_of<T: ValueEnum>(self) -> Result<T, UsageError> {
        self.read(one_of, names::<T>())
    }

    fn expected(&self, expected: impl fmt::Display) -> UsageError {
        let (name, text) = (self.name, without_secrets(&self.text));
        // For commands such as `-v --dnat`: every flag except booleans takes the next word.
        let hint = match text.starts_with("--") && name.starts_with("--") {
            true => format!("; {}", next_word(name, &text)),
            false => String::new(),
        };
        UsageError::new(format_args!("{name} {text:?}: expected {expected}{hint}"))
    }
}
