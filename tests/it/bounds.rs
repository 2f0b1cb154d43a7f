//! One container, or one registry, cannot affect the others, by its size or by the characters in its names.

use std::{
    collections::HashMap,
    fs::File,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    os::fd::AsFd,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use embassy::text::is_deceptive;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::{Value, json};
use testbed::{Embassy, FakeEngine, Host, eventually};
use tokio::runtime::{Builder, Runtime};

use crate::{
    READY, WAIT,
    commands::run,
    support::{ETCD, reaches, says, web},
};

/// A fake Consul with configurable answers.
struct FakeConsul {
    answers: Arc<Mutex<HashMap<String, Answer>>>,
}

#[derive(Clone)]
enum Answer {
    /// This list with this index.
    List(u64, Arc<str>),
    /// These lists alternately, immediately.
    Busy(Arc<[String; 2]>, Arc<AtomicU64>),
    Error(Arc<str>),
}

/// Until an unoptimised program has read a million entries on a busy machine.
const SLOW: Duration = Duration::from_secs(120);
/// How long a query is held.
const HELD: Duration = Duration::from_secs(5);

impl FakeConsul {
    const DISCOVERY: &str = "-discovery=consul://127.0.0.1:8500";

    /// Listens on port 8500 of the host's loopback.
    fn start(host: &Host) -> Result<Self> {
        let network = File::open(format!("/proc/{}/ns/net", host.init_pid()))?;
        let bind = move || -> Result<TcpListener> {
            // Affects only this thread, which ends here.
            move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))?;
            Ok(TcpListener::bind("127.0.0.1:8500")?)
        };
        let listener = thread::spawn(bind).join().expect("it does not panic")?;
        let answers = Arc::<Mutex<HashMap<_, _>>>::default();
        let known = answers.clone();
        // The threads end with the test's process.
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let answers = known.clone();
                thread::spawn(move || serve(stream, &answers));
            }
        });
        Ok(Self { answers })
    }

    fn says(&self, service: &str, answer: Answer) {
        self.answers.lock().expect("nobody panics with it").insert(service.to_owned(), answer);
    }
}

/// Answers requests until the client closes the connection.
fn serve(mut stream: TcpStream, answers: &Mutex<HashMap<String, Answer>>) -> Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    loop {
        let request = lines.next().context("the end")??;
        for line in &mut lines {
            if line?.is_empty() {
                break;
            }
        }
        let path = request.split(' ').nth(1).unwrap_or_default();
        let (path, query) = path.split_once('?').unwrap_or((path, ""));
        let service = path.rsplit('/').next().unwrap_or_default();
        let index = query.split('&').find_map(|pair| pair.strip_prefix("index=")?.parse().ok());
        let answer = || answers.lock().expect("nobody panics with it").get(service).cloned();
        let asked = Instant::now();
        let (status, index, body) = loop {
            match answer() {
                None => break ("200 OK", 1, "[]".to_owned()),
                Some(Answer::List(at, _)) if index == Some(at) && asked.elapsed() < HELD => {
                    thread::sleep(Duration::from_millis(5));
                }
                Some(Answer::List(at, body)) => break ("200 OK", at, body.to_string()),
                Some(Answer::Busy(bodies, count)) => {
                    let n = count.fetch_add(1, Relaxed);
                    break ("200 OK", n + 2, bodies[n as usize % 2].clone());
                }
                Some(Answer::Error(body)) => {
                    break ("500 Internal Server Error", 1, body.to_string());
                }
            }
        };
        let length = body.len();
        write!(
            stream,
            "HTTP/1.1 {status}\r\nX-Consul-Index: {index}\r\nContent-Length: {length}\r\n\r\n{body}"
        )?;
    }
}

fn instance(id: impl std::fmt::Display, address: impl std::fmt::Display, port: u16) -> String {
    format!(
        r#"{{"Node":{{"Node":"n","Address":""}},"Service":{{"ID":"{id}","Address":"{address}","Port":{port}}}}}"#
    )
}

fn list(instances: impl IntoIterator<Item = String>) -> Arc<str> {
    format!("[{}]", instances.into_iter().collect::<Vec<_>>().join(",")).into()
}

/// Resident memory in MiB: now, and the peak.
fn resident(embassy: &Embassy) -> Result<(u64, u64)> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", embassy.pid()))?;
    let value = |name| -> Result<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).context(name)?;
        Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? >> 10)
    };
    Ok((value("VmRSS:")?, value("VmHWM:")?))
}

/// The value of a metric.
fn gauge(embassy: &Embassy, series: &str) -> Result<u64> {
    let text = embassy.admin("/metrics")?.ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    Ok(value.with_context(|| series.to_owned())?.parse::<f64>()? as u64)
}

/// A container of an image that anybody may have built.
#[test]
fn an_image_with_20_000_labels_costs_what_256_bindings_cost() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    let (before, _) = resident(&embassy)?;
    let mut greedy = host.client("greedy");
    for n in 0..20_000 {
        greedy =
            greedy.label(&format!("embassy.backend.{n:05}"), &format!("/services/web;{}", n + 1));
    }
    let greedy = greedy.label("embassy.backend.bad", "not a descriptor").start()?;
    says(&embassy, &["consumer declares more bindings", "greedy", "bindings=768", "most=256"])?;
    let start = Instant::now();
    let late = host.client("late").env("BACKEND_WEB", "/services/web;80").start()?;
    reaches(&late, "172.17.0.1:80", "web")?;
    let (news, (after, most)) = (start.elapsed(), resident(&embassy)?);
    println!(
        "resident {before} MiB, then {after} MiB, {most} at most; another container was served after {news:?}"
    );
    ensure!(most < before + 64, "{most} MiB, and {before} before");

    // It has the bindings within the limit, and the others are explained.
    reaches(&greedy, "172.17.0.1:256", "web")?;
    let (text, code) = run(&host, &["explain", "greedy", "257"])?;
    ensure!(text.contains("it is beyond --max-bindings-per-consumer (256)"), "{text}");
    ensure!(code == Some(1) && !text.contains("not declared"), "{text}");
    let (status, _) = run(&host, &["status"])?;
    ensure!(status.contains("768 bindings of greedy get no route"), "{status}");
    ensure!(status.contains("are not read: expected at most 1024 variables"), "{status}");
    let beyond = r#"embassy_beyond_limit{limit="bindings_per_consumer"}"#;
    ensure!(gauge(&embassy, beyond)? == 768);
    let (doctor, _) = run(&host, &["doctor", "--dnat", ETCD])?;
    ensure!(doctor.contains("768 bindings of greedy"), "{doctor}");

    // About one line for each used binding, and the lines of other consumers are there.
    let log = embassy.log();
    let of_greedy = log.lines().filter(|line| line.contains("greedy")).count();
    ensure!((257..300).contains(&of_greedy), "{of_greedy} lines: {log}");
    says(&embassy, &["new route", "consumer=late"])?;
    // Everything about it disappears with it.
    greedy.kill()?;
    eventually(WAIT, "the limit not to be reached", || {
        ensure!(gauge(&embassy, beyond)? == 0);
        Ok(())
    })
}

/// Used services stay in use, and waiting ones are served when there is room.
#[test]
fn more_services_than_a_host_may_use_are_reported_once() -> Result<()> {
    let host = Host::light()?;
    web(&host, "web")?;
    let first = host.client("first").env("BACKEND_WEB", "/services/web;80").start()?;
    let embassy = host.embassy(["--dnat", ETCD, "--max-services=1"])?;
    embassy.wait_ready(READY)?;
    reaches(&first, "172.17.0.1:80", "web")?;
    let other = web(&host, "other")?;
    let second = host
        .client("second")
        .env("BACKEND_OTHER", "/services/other;80")
        .env("BACKEND_MORE", "/services/more;81")
        .env("BACKEND_WEB", "/services/web;82")
        .start()?;
    says(&embassy, &["consumers ask for more services than --max-services", "most=1"])?;
    reaches(&second, "172.17.0.1:82", "web")?;
    reaches(&first, "172.17.0.1:80", "web")?;
    let (text, _) = run(&host, &["explain", "second", "80"])?;
    ensure!(text.contains("it is beyond --max-services (1)"), "{text}");
    let (status, _) = run(&host, &["status"])?;
    ensure!(status.contains("2 bindings get no route"), "{status}");
    ensure!(gauge(&embassy, r#"embassy_beyond_limit{limit="services"}"#)? == 2);
    let log = embassy.log();
    ensure!(log.matches("more services than").count() == 1, "{log}");
    drop(other);
    Ok(())
}

/// A service with 200,000 instances, one with a million empty objects, and one that changes with each query.
#[test]
fn a_registry_of_any_size_holds_nobody_up() -> Result<()> {
    let host = Host::light()?;
    let consul = FakeConsul::start(&host)?;
    let [one, two] = ["one", "two"].map(|name| host.web(name).start());
    let (one, two) = (one?, two?);
    let web = |n, at: std::net::Ipv4Addr| Answer::List(n, list([instance("web", at, 80)]));
    consul.says("web", web(1, one.ip()?));
    let app = host.client("app").env("BACKEND_WEB", "web;80").start()?;
    let embassy = host.embassy(["--dnat", FakeConsul::DISCOVERY, "--empty-hold=0"])?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "one")?;
    let (before, _) = resident(&embassy)?;

    let at = |n: u32| std::net::Ipv4Addr::from(0x0a00_0000 + n);
    let huge = list((0..200_000).map(|n| instance(n, at(n), 80)));
    let empty: Arc<str> = format!("[{}{{}}]", "{},".repeat(999_999)).into();
    let sizes = [huge.len() >> 20, empty.len() >> 20];
    let busy = |from: u32| list((from..from + 1000).map(|n| instance(n, at(n), 80))).to_string();
    consul.says("huge", Answer::List(1, huge));
    consul.says("empty", Answer::List(1, empty));
    let asked = Arc::<AtomicU64>::default();
    consul.says("busy", Answer::Busy(Arc::new([busy(0), busy(500)]), asked.clone()));
    let greedy = host
        .client("greedy")
        .env("BACKEND_HUGE", "huge;80")
        .env("BACKEND_EMPTY", "empty;81")
        .env("BACKEND_BUSY", "busy;82");
    greedy.start()?;
    for words in [
        ["service has more endpoints than are used", "consul huge", "left_out=190000"],
        ["further discovery entries skipped without a line each", "consul empty", "more="],
    ] {
        eventually(SLOW, &format!("the log to say {words:?}"), || {
            let log = embassy.log();
            ensure!(log.lines().any(|line| words.iter().all(|word| line.contains(word))));
            Ok(())
        })?;
    }

    // Changes of another service, again and again.
    let mut slowest = Duration::ZERO;
    for n in 0..10 {
        let (target, name) = if n % 2 == 0 { (&two, "two") } else { (&one, "one") };
        let start = Instant::now();
        consul.says("web", web(n + 2, target.ip()?));
        reaches(&app, "172.17.0.1:80", name)?;
        slowest = slowest.max(start.elapsed());
    }
    let (after, most) = resident(&embassy)?;
    println!(
        "resident {before} MiB, then {after} MiB, {most} at most (answers of {sizes:?} MiB); the busy one was asked {} times; \
         news of others took at most {slowest:?}",
        asked.load(Relaxed)
    );
    ensure!(most < before + 256, "{most} MiB, and {before} before");
    // Usually far less. The documented limit is 5 s, but a machine that is fully used by tests may need longer.
    ensure!(slowest < Duration::from_secs(15), "news of others took {slowest:?}");
    // The lines of others are there, and those of the busy service are limited.
    let log = embassy.log();
    let of = |service: &str| {
        log.lines()
            .filter(|line| {
                line.contains(&format!("service=consul {service} "))
                    || line.contains(&format!("service=consul {service}"))
            })
            .count()
    };
    ensure!(of("web") >= 10, "{} lines", of("web"));
    ensure!(of("busy") < 700 && of("empty") < 200, "{} and {}", of("busy"), of("empty"));
    let longest = log.lines().map(str::len).max().unwrap_or_default();
    ensure!(longest < 8192, "a line of {longest} bytes");
    let (status, _) = run(&host, &["status"])?;
    ensure!(status.contains("190000 endpoints of consul huge are not used"), "{status}");
    let left_out = r#"embassy_beyond_limit{limit="endpoints_per_service"}"#;
    ensure!(gauge(&embassy, left_out)? == 190_000);
    ensure!(gauge(&embassy, "embassy_entries_skipped")? == 1_000_000);
    Ok(())
}

/// An engine's list of more than 128 MiB, an endless event, and invalid answers: the last data stays in use.
#[test]
fn what_is_longer_than_it_may_be_is_an_error_of_its_source_alone() -> Result<()> {
    let host = Host::light()?;
    let consul = FakeConsul::start(&host)?;
    let server = host.web("web").start()?;
    consul.says("web", Answer::List(1, list([instance("web", server.ip()?, 80)])));
    let app = host.client("app").env("BACKEND_WEB", "web;80").env("BACKEND_LONG", "long;81");
    let app = app.start()?;
    consul.says("long", Answer::List(1, format!("[{}]", " ".repeat(40 << 20)).into()));
    let embassy = host.embassy(["--dnat", FakeConsul::DISCOVERY])?;
    says(&embassy, &["source has not answered yet", "consul long", "longer than 33554432 bytes"])?;
    reaches(&app, "172.17.0.1:80", "web")?;
    // The length of a descriptor is limited too.
    let long = format!("{};80", "x".repeat(2000));
    let _odd = host.client("odd").env("BACKEND_LONG", &long).start()?;
    says(&embassy, &["binding skipped", "consumer=odd", "longer than 1024 bytes"])?;
    Ok(())
}

/// Characters that forge a line, a colour or a text direction where they are shown unescaped.
const EVIL: &str = "x\n2026-01-01T00:00:00Z  WARN forged\r\u{1b}[2J\u{9b}31m\u{85}\u{202e}\u{2066}\u{200f}\u{61c}\u{200b}\u{2028}\u{2029}\u{feff}\u{7f}";

/// Fails if a text contains any of these.
fn is_clean(what: &str, text: &str) -> Result<()> {
    let found = text.chars().find(|c| !"\n\t".contains(*c) && is_deceptive(*c));
    ensure!(found.is_none(), "{what}: {found:?} in {text:?}");
    let forged = text.lines().find(|line| line.trim_start().starts_with("2026-01-01T00:00:00Z"));
    ensure!(forged.is_none(), "{what}: {text}");
    Ok(())
}

/// Containers and a registry whose texts all contain these characters.
pub(crate) fn evil(host: &Host, embassy_args: &[&str]) -> Result<(Embassy, FakeEngine, Runtime)> {
    let consul = FakeConsul::start(host)?;
    let quoted = Value::from(EVIL).to_string();
    let inner = &quoted[1..quoted.len() - 1];
    let entry = |address: &str, status: &str| {
        json!({
            "Node": { "Node": EVIL, "Address": "" },
            "Service": { "ID": EVIL, "Address": address, "Port": 80, "Tags": [EVIL] },
            "Checks": [{ "CheckID": EVIL, "Name": EVIL, "Status": status }],
        })
        .to_string()
    };
    consul.says("good", Answer::List(1, list([entry("10.255.255.1", "passing")])));
    consul.says("bad", Answer::List(1, list([entry(EVIL, "passing")])));
    consul.says("ill", Answer::List(1, list([entry("10.255.255.2", EVIL)])));
    consul.says("down", Answer::Error(EVIL.into()));
    consul.says(
        "odd",
        Answer::List(1, list([format!(r#"{{"Service":{{"ID":"{inner}","Port":"{inner}"}}}}"#)])),
    );
    consul.says(
        "services",
        Answer::List(1, json!({ EVIL: [EVIL], "gone": [EVIL] }).to_string().into()),
    );
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let socket = host.dir().join("evil.sock");
    let engine = runtime.block_on(async { FakeEngine::start_at(socket.clone()) })?;
    let services = [
        "good;80",
        "bad;81",
        "ill;82",
        "down;83",
        "odd;84",
        "gone;85",
        "gone[t];86",
        "good;87;via=no",
    ];
    let labels = services.map(|text| (format!("embassy.backend.{EVIL}{text}"), text));
    let labels: HashMap<_, _> = labels.into_iter().collect();
    let container = |id: &str, address: &str, name: &str| {
        json!({
            "Id": id,
            "Name": name,
            "State": { "Running": true, "StartedAt": EVIL, "Pid": 0 },
            "HostConfig": { "NetworkMode": "default" },
            "Config": {
                "Env": [format!("BACKEND_{EVIL}={EVIL}"), format!("BACKEND_B{EVIL}=good;80"), format!("BACKEND_C=x{EVIL};90")],
                "Labels": labels,
            },
            "NetworkSettings": { "Networks": { EVIL: {
                "NetworkID": EVIL, "IPAddress": address, "Gateway": "172.17.0.1",
            }}},
        })
    };
    engine.insert("c1", container("c1", "172.17.0.77", EVIL));
    engine.insert("c2", container("c2", "172.17.0.78", "plain"));
    let mut joined = container("c3", "", "zjoined");
    joined["HostConfig"]["NetworkMode"] = format!("container:{EVIL}").into();
    engine.insert("c3", joined);
    engine.answers("/networks", testbed::Mood::Forbids);
    let mut command = host.embassy_command(embassy_args)?;
    command.env("DOCKER_HOST", format!("unix://{}", socket.display()));
    let embassy = host.embassy_from(command)?;
    Ok((embassy, engine, runtime))
}

#[test]
fn no_name_and_no_error_of_others_forges_a_line_anywhere() -> Result<()> {
    for format in ["text", "json"] {
        let host = Host::light()?;
        let flags =
            ["--dnat", FakeConsul::DISCOVERY, "--proxy-ip=172.17.0.1", "--empty-hold=0", "-v=6"];
        let log_format = format!("--log-format={format}");
        let (embassy, _engine, _runtime) = evil(&host, &[&flags[..], &[&log_format]].concat())?;
        says(&embassy, &["new route", "forged"]).with_context(|| embassy.log())?;
        says(&embassy, &["binding skipped"])?;
        says(&embassy, &["discovery entry skipped"])?;
        says(&embassy, &["service has a problem in its registry"])?;
        says(&embassy, &["source has not answered yet"])?;
        for path in [
            "/metrics",
            "/readyz",
            "/v1/status",
            "/v1/routes",
            "/v1/endpoints",
            "/v1/bindings",
            "/v1/sources",
            "/v1/explain?consumer=plain&port=81",
            "/v1/explain?consumer=%1B%5B2J&port=1",
            "/v1/routes?state=%0A%1B%E2%80%AE",
        ] {
            let answer = embassy.admin(path)?.body;
            is_clean(path, &answer)?;
            ensure!(path != "/metrics" || answer.contains("forged"), "{answer}");
        }
        let sources = embassy.admin("/v1/bindings?limit=1000")?.json()?;
        let all = sources["items"].as_array().context("a list")?;
        let names = all.iter().filter(|one| one["consumer"] == EVIL).count();
        ensure!(names > 0, "the API has the very name: {sources}");
        let named = EVIL.to_owned();
        for words in [
            &["status"][..],
            &["ps"],
            &["ps", "--endpoints"],
            &["ps", &named],
            &["ps", "--service", &named],
            &["ps", "--state", &named],
            &["explain", &named, "80"],
            &["explain", "plain", "83"],
            &["explain", "plain", "87"],
            &["explain", "plain", &named],
            &["wait", "good", "--timeout=0"],
            &["wait", &named, "--timeout=0"],
            &["wait", "--timeout", &named],
            &["status", "--json"],
            &["ps", "--json"],
            &["explain", &named, "80", "--json"],
            &["top", "--json", "--interval=100ms"],
            &["doctor"],
            &["doctor", "--json"],
            &["status", "--admin", &named],
            &[&named],
            &["--", &named],
            &["ps", &format!("--{named}")],
            &["plan", &named],
        ] {
            let (text, _) = run(&host, words)?;
            is_clean(&format!("{words:?}"), &text)?;
        }
        for words in [
            &["plan"][..],
            &["plan", "--json"],
            &["--discovery", &named],
            &["--lb", &named],
            &[&format!("--x{named}")],
        ] {
            let mut command = host.embassy_command([words, &flags[..]].concat())?;
            command
                .env("DOCKER_HOST", format!("unix://{}", host.dir().join("evil.sock").display()));
            let output = command.output()?;
            let text = String::from_utf8([output.stdout, output.stderr].concat())?;
            is_clean(&format!("{words:?}"), &text)?;
            ensure!(!text.is_empty());
        }
        embassy.terminate()?;
        ensure!(embassy.wait(WAIT)?.success());
        let log = embassy.log();
        is_clean("the log", &log)?;
        if format == "json" {
            for line in log.lines() {
                serde_json::from_str::<Value>(line).with_context(|| line.to_owned())?;
            }
        }
    }
    Ok(())
}
