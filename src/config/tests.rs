//! Whole command lines, and the resulting settings.

use std::collections::HashMap;

use super::*;
use crate::discovery::{ConsulSettings, EtcdSettings, Secret};

/// Splits like a shell, with single quotes as the only special characters.
fn shell(line: &str) -> Vec<String> {
    let mut words = vec![];
    let mut word = None::<String>;
    let mut quoted = false;
    for c in line.chars() {
        match c {
            '\'' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            ' ' if !quoted => words.extend(word.take()),
            _ => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

fn parse_with(line: &str, env: &[(&str, &str)]) -> Result<Config, NoConfig> {
    let env: HashMap<_, _> = env.iter().copied().collect();
    Config::parse(shell(line), &|name| env.get(name).map(|&value| value.to_owned()))
}

fn parse(line: &str) -> Config {
    parse_with(line, &[]).unwrap_or_else(|stop| panic!("{line}: {stop:?}"))
}

fn usage(line: &str, env: &[(&str, &str)]) -> String {
    match parse_with(line, env) {
        Err(NoConfig::Usage(error)) => error.to_string(),
        other => panic!("{line} {env:?}: {other:?}"),
    }
}

fn services(config: &Config) -> Vec<String> {
    match &config.provider {
        Provider::Docker => vec![],
        Provider::Static(list) => list.iter().map(ToString::to_string).collect(),
    }
}

/// The configured discoveries, as listed by the error for an unknown one.
fn names(config: &Config) -> String {
    let descriptor = "web;80;via=-".parse().unwrap();
    let refusal = config.discoveries.query(&descriptor).unwrap_err().to_string();
    refusal.split_once("discoveries: ").unwrap().1.to_owned()
}

fn vips(config: &Config) -> Option<Vec<String>> {
    config.vips.as_ref().map(|vips| vips.iter().map(ToString::to_string).collect())
}

/// Equal texts mean equal settings: every field is in the debug output.
fn shown(config: &Config) -> String {
    format!("{config:#?}")
}

#[test]
fn nothing_given() {
    let config = parse("");
    assert_eq!(config.provider, Provider::Docker);
    assert_eq!(config.docker.to_string(), "unix:///var/run/docker.sock");
    assert_eq!(config.prefix, "BACKEND_");
    assert_eq!(config.interface, "eth0");
    assert_eq!(shown(&config), shown(&parse("-discovery=consul://127.0.0.1:8500 -filter=true")));
    assert_eq!(config.resync, Duration::from_secs(120));
    assert_eq!(config.empty_hold, Duration::from_secs(30));
    assert_eq!(config.state_dir, Some("/var/lib/embassy".into()));
    assert_eq!(config.state_max_age, Duration::from_secs(24 * 3600));
    assert_eq!(config.port.get(), 9999);
    assert_eq!(config.vips, None);
    assert_eq!(config.capture, CaptureMode::None);
    assert_eq!(config.capture_scope, CaptureScope::Declared);
    assert_eq!(config.firewall, FirewallChoice::Auto);
    assert_eq!(config.guard, Guard::Vip);
    assert_eq!(config.balance, Balance::RoundRobin);
    assert_eq!(config.hold, Duration::from_secs(2));
    assert_eq!(config.user_timeout, Duration::from_secs(30));
    assert_eq!(config.drain, Duration::from_secs(8));
    assert_eq!(config.max_connections, None);
    assert_eq!(config.max_connections_per_consumer, ConsumerLimit::Share);
    assert_eq!((config.max_bindings_per_consumer, config.max_services), (256, 4096));
    assert!(!config.notrack);
    assert_eq!(config.conntrack, Conntrack::default());
    assert_eq!(config.admin, Some(Admin::Tcp("127.0.0.1:9990".parse().unwrap())));
    assert_eq!(config.connection_log, ConnectionLog::Off);
    assert_eq!(config.log_format, LogFormat::Text);
    assert_eq!((config.verbosity, config.log_filter), (0, None));
    assert_eq!(config.ignored, [""; 0]);
}

#[test]
fn on_the_host_with_dnat_as_the_original_was_run() {
    let config = parse_with(
        "--dnat -provider=docker -v=3 -interface=eth0 -discovery=consul://HOST:8500",
        &[("PROXY_IP", "172.17.42.1"), ("PROXY_PORT", "9998")],
    )
    .unwrap();
    assert_eq!(config.capture, CaptureMode::Dnat);
    assert_eq!(config.provider, Provider::Docker);
    assert_eq!(config.verbosity, 3);
    assert_eq!(config.interface, "eth0");
    assert_eq!(names(&config), "consul");
    assert_eq!(vips(&config).unwrap(), ["172.17.42.1"]);
    assert_eq!(config.port.get(), 9998);
}

#[test]
fn inside_the_container_as_the_original_was_run() {
    let config = parse(
        "-discovery=consul://IP:8500 -provider=static -services='frontend_http;80,mysql;3306,redis;6563'",
    );
    assert_eq!(services(&config), ["frontend_http;80", "mysql;3306", "redis;6563"]);
    assert_eq!(names(&config), "consul");
}

#[test]
fn as_a_linked_container_as_the_original_was_run() {
    let config = parse_with(
        "--redirect -provider=docker -v=3 -interface=eth0 -discovery=consul://HOST:8500",
        &[("PROXY_IP", "172.17.42.1"), ("PROXY_PORT", "9999")],
    )
    .unwrap();
    assert_eq!(config.capture, CaptureMode::Redirect);
}

#[test]
fn by_the_environment_alone_as_the_original_was_run() {
    let env = [("INTERFACE", "ens3"), ("DISCOVERY", "etcd://HOST:4001")];
    let config = parse_with("", &env).unwrap();
    assert_eq!(config.interface, "ens3");
    assert_eq!(names(&config), "etcd");
}

#[test]
fn with_the_users_own_rules_as_the_original_was_run() {
    for (line, interface, port) in [
        ("-interface eth0 -discovery 'etcd://HOST:4001' -v=0 -p=9999", "eth0", 9999),
        ("-interface docker0 -discovery 'etcd://HOST:4001' -v=0 -p=3232", "docker0", 3232),
        ("-interface eth0 -discovery 'consul://HOST:8500' -v=3 -p=9999", "eth0", 9999),
    ] {
        let config = parse(line);
        assert_eq!((config.interface.as_str(), config.port.get()), (interface, port), "{line}");
        assert_eq!(config.capture, CaptureMode::None);
    }
}

/// Every flag and alias: all of these lines have the same meaning.
#[test]
fn every_flag_in_every_style() {
    for (names, value) in [
        ("provider", "static"),
        ("services", "web;80,db[prod,eu];5432"),
        ("docker", "tcp://10.0.0.1:2375"),
        ("prefix", "SERVICE_"),
        ("discovery", "etcd://h:2379"),
        ("interface", "docker0"),
        ("port p", "80"),
        ("proxy-ip", "10.0.0.1,fd00::1"),
        ("resync", "60"),
        ("etcd-cert", "/cert.pem"),
        ("etcd-keycert", "/key.pem"),
        ("etcd-cacert", "/ca.pem"),
        ("lb", "leastconn"),
        ("capture", "all"),
        ("firewall", "nft"),
        ("guard", "full"),
        ("admin", "off"),
        ("user-timeout", "1m"),
        ("drain", "1m"),
        ("empty-hold", "0"),
        ("hold", "500ms"),
        ("state-dir", "off"),
        ("state-max-age", "1h"),
        ("max-connections", "10"),
        ("max-connections-per-consumer", "5"),
        ("max-bindings-per-consumer", "7"),
        ("max-services", "8"),
        ("connection-log", "0.01"),
        ("log-format", "json"),
        ("verbosity v", "10"),
    ] {
        let mut meant = None;
        for name in names.split(' ') {
            let written = ["-N=V", "-N V", "--N=V", "--N V"];
            for line in written.map(|style| style.replace('N', name).replace('V', value)) {
                // What some flags need in addition. If a flag is given twice, its last value counts.
                let beside = match name {
                    "provider" => "-services web;80",
                    "services" => "-provider static",
                    "etcd-cert" => "-discovery etcd://h -etcd-keycert /key.pem",
                    "etcd-keycert" => "-discovery etcd://h -etcd-cert /cert.pem",
                    "etcd-cacert" => "-discovery etcd://h",
                    _ => "",
                };
                let config = shown(&parse(&format!("{line} {beside}")));
                assert_ne!(config, shown(&parse("")), "{line}");
                assert_eq!(config, *meant.get_or_insert_with(|| config.clone()), "{line}");
            }
        }
    }
}

#[test]
fn switches() {
    let capture = |line| parse(line).capture;
    for (line, expected) in [
        ("-dnat", CaptureMode::Dnat),
        ("--dnat=true", CaptureMode::Dnat),
        ("-dnat=1", CaptureMode::Dnat),
        ("-redirect=T", CaptureMode::Redirect),
        ("-dnat=false", CaptureMode::None),
        ("-dnat -dnat=0", CaptureMode::None),
        ("-dnat=false --redirect", CaptureMode::Redirect),
    ] {
        assert_eq!(capture(line), expected, "{line}");
    }
    assert_ne!(shown(&parse("-filter=false")), shown(&parse("")));
    assert_eq!(shown(&parse("-filter=false -filter")), shown(&parse("")));
    assert!(parse("--notrack").notrack);
}

#[test]
fn the_last_one_wins_but_discoveries_add_up() {
    let config = parse("-p 1 -port=2 -discovery docker:// -discovery=dns://127.0.0.1");
    assert_eq!(config.port.get(), 2);
    assert_eq!(names(&config), "dns, docker");
}

#[test]
fn flag_then_environment_then_default() {
    let env = [
        ("PROXY_PORT", "1"),
        ("PROXY_IP", "10.0.0.1"),
        ("INTERFACE", "a"),
        ("DISCOVERY", "docker://"),
        ("DOCKER_HOST", "tcp://a:1"),
    ];
    let config = parse_with("", &env).unwrap();
    assert_eq!((config.port.get(), config.interface.as_str()), (1, "a"));
    assert_eq!(names(&config), "docker");
    assert_eq!(vips(&config).unwrap(), ["10.0.0.1"]);
    assert_eq!(config.docker.to_string(), "tcp://a:1");

    let flags = "-p 2 -proxy-ip 10.0.0.2 -interface b -discovery file://f -docker unix:///d";
    let config = parse_with(flags, &env).unwrap();
    assert_eq!((config.port.get(), config.interface.as_str()), (2, "b"));
    assert_eq!(names(&config), "file");
    assert_eq!(vips(&config).unwrap(), ["10.0.0.2"]);
    assert_eq!(config.docker.to_string(), "unix:///d");

    let unset = env.map(|(name, _)| (name, ""));
    assert_eq!(shown(&parse_with("", &unset).unwrap()), shown(&parse("")));
}

/// As for every Consul tool. embassy's own settings have priority.
#[test]
fn consul_is_where_its_own_variable_says() {
    let addr = ("CONSUL_HTTP_ADDR", "https://consul.example:8501");
    let discovery = |line: &str, env: &[(&str, &str)]| {
        let config = parse_with(line, env).unwrap();
        config.discoveries.uris().values().cloned().collect::<Vec<_>>()
    };
    assert_eq!(discovery("", &[]), ["consul://127.0.0.1:8500"]);
    assert_eq!(discovery("", &[addr]), ["consuls://consul.example:8501"]);
    assert_eq!(discovery("-discovery=consul://", &[addr]), ["consuls://consul.example:8501"]);
    assert_eq!(discovery("-discovery=consul://a:1", &[addr]), ["consul://a:1"]);
    assert_eq!(discovery("", &[addr, ("DISCOVERY", "etcd://a")]), ["etcd://a"]);
    assert_eq!(
        discovery("", &[("CONSUL_NAMESPACE", "team"), ("CONSUL_PARTITION", "part")]),
        ["consul://127.0.0.1:8500?ns=team&partition=part"]
    );
}

#[test]
fn secrets_and_files_from_the_environment() {
    let secret = |text: &str| Secret::from(text.to_owned());
    let variables = HashMap::from([
        ("CONSUL_HTTP_ADDR", "https://consul.example"),
        ("CONSUL_NAMESPACE", "team"),
        ("CONSUL_PARTITION", "part"),
        ("CONSUL_TLS_SERVER_NAME", "server.dc1.consul"),
        ("CONSUL_CAPATH", "/cas"),
        ("CONSUL_HTTP_TOKEN", "t"),
        ("CONSUL_HTTP_TOKEN_FILE", "/t"),
        ("CONSUL_HTTP_SSL", "1"),
        ("CONSUL_HTTP_SSL_VERIFY", "False"),
        ("CONSUL_CACERT", "/ca"),
        ("CONSUL_CLIENT_CERT", "/cert"),
        ("CONSUL_CLIENT_KEY", "/key"),
        ("CONSUL_HTTP_AUTH", "user:password"),
        ("ETCD_USERNAME", "u"),
        ("ETCD_PASSWORD", "p"),
    ]);
    let env = |name: &str| variables.get(name).map(|&value| value.to_owned());
    assert_eq!(
        read::consul(&read::Environment(&env)),
        Ok(ConsulSettings {
            address: Some("https://consul.example".into()),
            namespace: Some("team".into()),
            partition: Some("part".into()),
            server_name: Some("server.dc1.consul".into()),
            ca_path: Some("/cas".into()),
            token: Some(secret("t")),
            token_file: Some("/t".into()),
            tls: true,
            tls_verify: false,
            ca: Some("/ca".into()),
            certificate: Some("/cert".into()),
            key: Some("/key".into()),
            auth: Some(secret("user:password")),
        })
    );
    let flag = |text: &str| Some(text.to_owned());
    assert_eq!(
        read::etcd(flag("/cert"), flag("/key"), flag("/ca"), &read::Environment(&env)),
        Ok(EtcdSettings {
            certificate: Some("/cert".into()),
            key: Some("/key".into()),
            ca: Some("/ca".into()),
            user: Some(("u".into(), secret("p"))),
        })
    );
    let nothing = read::Environment(&|_| None);
    assert_eq!(read::consul(&nothing), Ok(ConsulSettings::default()));
    assert_eq!(read::etcd(None, None, None, &nothing), Ok(EtcdSettings::default()));
}

#[test]
fn certificates_of_the_engine() {
    let certificates = |env: &[_]| parse_with("", env).unwrap().docker.certificates;
    let path = ("DOCKER_CERT_PATH", "/certs");
    assert_eq!(certificates(&[path]), None);
    assert_eq!(certificates(&[path, ("DOCKER_TLS_VERIFY", "")]), None);
    assert_eq!(certificates(&[path, ("DOCKER_TLS_VERIFY", "1")]), Some("/certs".into()));
    assert_eq!(
        certificates(&[("HOME", "/root"), ("DOCKER_TLS_VERIFY", "1")]),
        Some("/root/.docker".into())
    );
}

#[test]
fn connection_tracking() {
    let env = [
        ("IPTABLES_TRACK_MAX_CONNECTIONS", "262144"),
        ("IPTABLES_TRACK_TIMEOUT", "30"),
        ("IPTABLES_TRACK_HASHSIZE", "65536"),
    ];
    assert_eq!(
        parse_with("", &env).unwrap().conntrack,
        Conntrack { max_connections: Some(262_144), timeout: Some(30), hashsize: Some(65_536) }
    );
}

#[test]
fn flags_of_rules_mean_nothing_without_rules() {
    let words = "-capture=all -firewall=iptables";
    assert_eq!(
        parse(words).ignored,
        ["--capture (needs --dnat or --redirect)", "--firewall (needs --dnat or --redirect)"]
    );
    for mode in ["--dnat", "--redirect"] {
        assert_eq!(parse(&format!("{mode} {words}")).ignored, [""; 0]);
    }
}

#[test]
fn flags_without_meaning_are_named() {
    let config = parse(
        "-logtostderr -alsologtostderr=true -stderrthreshold INFO -vmodule=a=1 -log_dir /tmp \
         -log_backtrace_at=f.go:1 -services web;80 -v 2",
    );
    assert_eq!(
        config.ignored,
        [
            "--logtostderr",
            "--alsologtostderr",
            "--stderrthreshold",
            "--vmodule",
            "--log_dir",
            "--log_backtrace_at",
            "--services (needs --provider=static)"
        ]
    );
    assert_eq!(config.verbosity, 2);
}

#[test]
fn every_complaint() {
    let time = "expected a time such as 500ms, 10s, 2m or 1h, or a number of seconds, up to 8760h";
    for (line, expected) in [
        ("-prot 1", "--prot: unknown flag; did you mean --port? --help lists them all"),
        ("-dnta", "--dnta: unknown flag; did you mean --dnat? --help lists them all"),
        ("-qqq", "--qqq: unknown flag; --help lists them all"),
        ("-p80", "--p80: unknown flag; --help lists them all"),
        ("run", "\"run\": expected a flag; --help lists them all"),
        ("-filter false", "\"false\": expected a flag; --help lists them all"),
        ("-- port", "\"port\": expected a flag; --help lists them all"),
        ("-", "-: unknown flag; --help lists them all"),
        (
            "'-a
b'",
            "--a\\nb: unknown flag; --help lists them all",
        ),
        ("--help=1", "--help: expected no value"),
        ("-dnat --redirect", "--dnat and --redirect: expected only one of them"),
        ("-dnat=yes", "--dnat \"yes\": expected true or false"),
        ("-filter=", "--filter \"\": expected true or false"),
        ("-redirect=2", "--redirect \"2\": expected true or false"),
        ("-notrack=2", "--notrack \"2\": expected true or false"),
        ("-capture none", "--capture \"none\": expected declared or all"),
        ("-guard maybe", "--guard \"maybe\": expected off, vip or full"),
        ("-firewall ufw", "--firewall \"ufw\": expected auto, nft, nft-shared or iptables"),
        ("-proxy-ip h", "--proxy-ip \"h\": expected addresses such as 172.17.0.1, comma separated"),
        ("-port", "--port \"\": expected a port from 1 to 65535"),
        ("-p 0", "--port \"0\": expected a port from 1 to 65535"),
        ("-p 99999", "--port \"99999\": expected a port from 1 to 65535"),
        ("-p -v", "--port \"-v\": expected a port from 1 to 65535"),
        ("-provider k8s", "--provider \"k8s\": expected docker or static"),
        (
            "-provider static",
            "--provider \"static\": expected --services as well: svc;port,svc[tag,tag];port",
        ),
        (
            "-provider static -services 'web;80,redis'",
            "--services \"redis\": no port: expected <service>;<port>",
        ),
        ("-provider static -services ''", "--services \"\": no port: expected <service>;<port>"),
        (
            "-provider static -services 'web;99999'",
            "--services \"web;99999\": the port is above 65535: expected a number from 1 to 65535",
        ),
        (
            "-provider static -services 'web;80;via=etcd'",
            "--services \"web;80;via=etcd\": via=\"etcd\": expected one of the configured discoveries: consul",
        ),
        (
            "-discovery marathon://h:8080",
            "--discovery \"marathon://h:8080\": marathon is not supported",
        ),
        (
            "-discovery zookeeper://h",
            "--discovery \"zookeeper://h\": expected consul://, consuls://, etcd://, etcd2://, etcd3://, docker://, \
             file:// or dns://",
        ),
        (
            "-discovery etcd2://h -discovery etcd3://h",
            "--discovery \"etcd3://h\": a second etcd: a descriptor could not tell them apart",
        ),
        ("-docker /d.sock", "--docker \"/d.sock\": expected unix:///path or tcp://host:port"),
        ("-prefix ''", "--prefix \"\": expected the beginning of a variable's name, without '='"),
        (
            "-interface eth0/1",
            "--interface \"eth0/1\": expected the name of a network interface, up to 15 characters",
        ),
        ("-resync 0", &format!("--resync \"0\": {time}, and at least 1s")),
        ("-resync 999ms", &format!("--resync \"999ms\": {time}, and at least 1s")),
        ("-drain soon", &format!("--drain \"soon\": {time}")),
        ("-user-timeout 4s", &format!("--user-timeout \"4s\": {time}, and 0 or from 5s to 24h")),
        ("-hold 1.5s", &format!("--hold \"1.5s\": {time}")),
        ("-empty-hold -1", &format!("--empty-hold \"-1\": {time}")),
        ("-state-max-age 1d", &format!("--state-max-age \"1d\": {time}")),
        ("-state-dir ''", "--state-dir \"\": expected the path of a folder, or off"),
        ("-etcd-cert ''", "--etcd-cert \"\": expected the path of a file"),
        ("-etcd-cert /c", "--etcd-cert: expected --etcd-keycert as well"),
        ("-etcd-keycert /k", "--etcd-keycert: expected --etcd-cert as well"),
        ("-etcd-cacert", "--etcd-cacert \"\": expected the path of a file"),
        ("-lb random", "--lb \"random\": expected rr or leastconn"),
        ("-max-connections 0", "--max-connections \"0\": expected a whole number from 1"),
        (
            "-max-connections-per-consumer -1",
            "--max-connections-per-consumer \"-1\": expected a whole number from 1, or share",
        ),
        ("-max-services 0", "--max-services \"0\": expected a whole number from 1"),
        (
            "-max-bindings-per-consumer many",
            "--max-bindings-per-consumer \"many\": expected a whole number from 1",
        ),
        (
            "-admin 9990",
            "--admin \"9990\": expected <ip>:<port> such as 127.0.0.1:9990, unix:///path, or off",
        ),
        (
            "-connection-log 2",
            "--connection-log \"2\": expected off, errors, all, or a fraction from 0 to 1 such as 0.01",
        ),
        ("-log-format xml", "--log-format \"xml\": expected text or json"),
        ("-v 11", "--verbosity \"11\": expected a whole number from 0 to 10"),
        ("-v", "--verbosity \"\": expected a whole number from 0 to 10"),
        (
            "-v --state-dir off",
            "--verbosity \"--state-dir\": expected a value; \"--state-dir\" is the next word, which --verbosity takes as its \
             value",
        ),
        (
            "-v --dnat",
            "--verbosity \"--dnat\": expected a whole number from 0 to 10; \"--dnat\" is the next word, which --verbosity \
             takes as its value",
        ),
        ("consul://joe:pw@h", "\"consul://(hidden)@h\": expected a flag; --help lists them all"),
        (
            "-docker tcp://joe:pw@h:2375",
            "--docker \"tcp://(hidden)@h:2375\": expected unix:///path or tcp://host:port",
        ),
        ("-interface 'a\nb'", {
            "--interface \"a\\nb\": expected the name of a network interface, up to 15 characters"
        }),
    ] {
        assert_eq!(usage(line, &[]), expected);
    }
    for (variable, value, expected) in [
        ("PROXY_PORT", "x", "PROXY_PORT \"x\": expected a port from 1 to 65535"),
        ("PROXY_IP", "x", "PROXY_IP \"x\": expected addresses such as 172.17.0.1, comma separated"),
        ("DOCKER_HOST", "ssh://h", {
            "DOCKER_HOST \"ssh://h\": expected unix:///path or tcp://host:port"
        }),
        ("DISCOVERY", "marathon://h", "DISCOVERY \"marathon://h\": marathon is not supported"),
        ("INTERFACE", "a/b", {
            "INTERFACE \"a/b\": expected the name of a network interface, up to 15 characters"
        }),
        ("CONSUL_HTTP_SSL", "yes", "CONSUL_HTTP_SSL \"yes\": expected true or false"),
        ("CONSUL_HTTP_SSL_VERIFY", "on", "CONSUL_HTTP_SSL_VERIFY \"on\": expected true or false"),
        (
            "CONSUL_TLS_SERVER_NAME",
            "10.0.0.1",
            "CONSUL_TLS_SERVER_NAME \"10.0.0.1\": expected a DNS name, as in the server's certificate",
        ),
        (
            "CONSUL_HTTP_ADDR",
            "unix:///run/consul.sock",
            "--discovery \"consul://\": CONSUL_HTTP_ADDR \"unix:///run/consul.sock\": expected host:port, http://host:port or https://host:port",
        ),
        ("CONSUL_CLIENT_KEY", "/k", "CONSUL_CLIENT_KEY: expected CONSUL_CLIENT_CERT as well"),
        ("ETCD_USERNAME", "u", "ETCD_USERNAME: expected ETCD_PASSWORD as well"),
        ("ETCD_PASSWORD", "secret", "ETCD_PASSWORD: expected ETCD_USERNAME as well"),
        ("IPTABLES_TRACK_TIMEOUT", "30s", {
            "IPTABLES_TRACK_TIMEOUT \"30s\": expected a whole number from 1"
        }),
        ("IPTABLES_TRACK_MAX_CONNECTIONS", "0", {
            "IPTABLES_TRACK_MAX_CONNECTIONS \"0\": expected a whole number from 1"
        }),
        ("IPTABLES_TRACK_HASHSIZE", "4294967296", {
            "IPTABLES_TRACK_HASHSIZE \"4294967296\": expected a whole number from 1"
        }),
    ] {
        assert_eq!(usage("", &[(variable, value)]), expected);
    }
}

#[test]
fn a_secret_in_a_wrong_value_is_not_repeated() {
    let words = ["consul://h?token=S3CRET", "etcd://joe:S3CRET@h", "zk://:S3CRET@h?x=S3CRET"];
    let flags = [
        "-discovery",
        "-docker",
        "-admin",
        "-port",
        "-proxy-ip",
        "-provider",
        "-interface",
        "-resync",
        "-lb",
        "-dicovery",
        "-services",
        "-dnat",
        "-v",
        "-firewall",
        "-guard",
        "-state-max-age",
        "--",
    ];
    for (word, flag) in words.iter().flat_map(|word| flags.map(|flag| (word, flag))) {
        for line in [format!("{flag} {word}"), format!("{flag}={word}")] {
            match parse_with(&line, &[]) {
                Err(NoConfig::Usage(error)) => {
                    assert!(!error.to_string().contains("S3CRET"), "{line}: {error}");
                }
                // Without the static provider it has no effect.
                Ok(_) => assert_eq!(flag, "-services"),
                other => panic!("{line}: {other:?}"),
            }
        }
    }
    for variable in ["DISCOVERY", "DOCKER_HOST", "PROXY_PORT", "PROXY_IP", "EMBASSY_ADMIN"] {
        for word in words {
            let said = usage("", &[(variable, word)]);
            assert!(said.starts_with(variable) && !said.contains("S3CRET"), "{said}");
        }
    }
}

#[test]
fn what_an_env_file_leaves_around_a_value_is_taken_off() {
    let config = parse_with(
        "",
        &[
            ("PROXY_IP", "\"10.0.0.1\"\r"),
            ("PROXY_PORT", "'9000'"),
            ("DISCOVERY", " etcd://h \r"),
            ("INTERFACE", "'eth1'"),
            ("DOCKER_HOST", "\"tcp://h:2375\""),
            ("EMBASSY_ADMIN", "'off'"),
            ("IPTABLES_TRACK_TIMEOUT", "''"),
        ],
    )
    .unwrap();
    let expected = "-proxy-ip 10.0.0.1 -p 9000 -discovery etcd://h -interface eth1 -docker tcp://h:2375 -admin off";
    assert_eq!(shown(&config), shown(&parse(expected)));
}

#[test]
fn a_links_variable_is_not_ours() {
    for value in ["tcp://10.0.0.5:80", "tcp://[fd00::5]:80\r"] {
        assert_eq!(parse_with("", &[("PROXY_PORT", value)]).unwrap().port, parse("").port);
    }
    // A value that is meant for embassy has the same form here.
    let docker = parse_with("", &[("DOCKER_HOST", "tcp://10.0.0.5:2375")]).unwrap().docker;
    assert_eq!(docker.to_string(), "tcp://10.0.0.5:2375");
    assert_eq!(
        usage("", &[("PROXY_PORT", "tcp://proxy:80")]),
        "PROXY_PORT \"tcp://proxy:80\": expected a port from 1 to 65535"
    );
}

#[test]
fn help_and_version_are_printed() {
    for line in ["--help", "-help", "-h", "-p 1 -h"] {
        assert_eq!(parse_with(line, &[]).unwrap_err(), NoConfig::Help, "{line}");
    }
    for line in ["--version", "-version", "-V"] {
        let version = format!("embassy {}\n", env!("CARGO_PKG_VERSION"));
        assert_eq!(parse_with(line, &[]).unwrap_err(), NoConfig::Print(version));
    }
}

/// The defaults in `--help` are correct: giving them changes nothing.
#[test]
fn the_defaults_that_help_tells_are_true() {
    let mut told = 0;
    for arg in Args::command().get_arguments() {
        let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        let Some((_, default)) = help.split_once("[default: ") else { continue };
        let (default, _) = default.split_once(']').unwrap();
        if default.contains(' ') {
            continue; // in words: no value means it
        }
        let flag = arg.get_long().unwrap();
        // Without --dnat, flags about its rules are reported as flags without effect.
        let given = parse(&format!("--dnat --{flag}={default}"));
        assert_eq!(shown(&given), shown(&parse("--dnat")), "--{flag}");
        told += 1;
    }
    assert!(told >= 18, "{told}");
}

proptest::proptest! {
    #[test]
    fn no_command_line_panics_and_every_complaint_is_one_line(
        words: Vec<String>,
        flag in "-{0,2}(p|v|dnat|services|discovery|hold|admin|x)=?",
        value in "(.|\n){0,8}",
    ) {
        let lines = [words.clone(), [words, vec![flag.clone(), value.clone()]].concat(), vec![flag + &value]];
        for line in lines {
            if let Err(NoConfig::Usage(error)) = Config::parse(line, &|_| None) {
                assert!(!error.to_string().contains('\n'), "{error}");
            }
        }
    }
}

#[test]
fn each_connection_without_protection_is_named_and_no_secret_is() {
    let of = |words: &str, variables: &[(&str, &str)]| {
        let words = words.split(' ').filter(|word| !word.is_empty()).map(str::to_owned);
        let env = |name: &str| {
            let found = variables.iter().find(|(one, _)| *one == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        let config = Config::parse(words, &env).unwrap();
        let all = config.weaknesses().into_iter().map(|weakness| weakness.what).collect::<Vec<_>>();
        assert!(!all.concat().contains("S3CRET"), "{all:?}");
        all.iter().map(|what| what.split(':').next().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let token = ("CONSUL_HTTP_TOKEN", "S3CRET");
    let user = [("ETCD_USERNAME", "joe"), ("ETCD_PASSWORD", "S3CRET")];
    let plain = "the Consul token is sent to 10.0.0.5 without TLS";
    let unverified =
        "the certificate of Consul at 10.0.0.5 is not verified (CONSUL_HTTP_SSL_VERIFY)";
    for (words, variables, expected) in [
        ("-discovery=consul://10.0.0.5:8500", &[token][..], &[plain][..]),
        ("", &[token, ("CONSUL_HTTP_ADDR", "10.0.0.5:8500")], &[plain]),
        ("-discovery=consul://10.0.0.5?token-file=/t", &[], &[plain]),
        (
            "-discovery=consul://10.0.0.5",
            &[("CONSUL_HTTP_AUTH", "joe:S3CRET")],
            &["the Consul password is sent to 10.0.0.5 without TLS"],
        ),
        ("-discovery=consuls://10.0.0.5", &[("CONSUL_HTTP_SSL_VERIFY", "false")], &[unverified]),
        (
            "-discovery=etcd://10.0.0.5,10.0.0.6,127.0.0.1",
            &user,
            &["ETCD_PASSWORD is sent to 10.0.0.5, 10.0.0.6 without TLS"],
        ),
        // The discovery is the provider's engine, and is named once.
        ("-docker=tcp://10.0.0.5:2375 -discovery=docker://", &[], &["the Docker engine at tcp"]),
        ("-docker=tcp://10.0.0.5:2375 -provider=static -services=a;1", &[], &[]),
        ("-discovery=docker://10.0.0.5:2375", &[], &["the Docker engine at tcp"]),
        ("-discovery=consul://10.0.0.5:8500", &[], &[]),
        ("-discovery=consuls://10.0.0.5:8500", &[token], &[]),
        ("-discovery=consul://127.0.0.1:8500", &[token], &[]),
        ("-discovery=consul://localhost", &[token], &[]),
        ("-discovery=etcd://127.0.0.1:2379", &user, &[]),
        ("-discovery=consul://10.0.0.5", &[("CONSUL_HTTP_SSL_VERIFY", "false")], &[]),
    ] {
        assert_eq!(of(words, variables), expected, "{words} {variables:?}");
    }
}
