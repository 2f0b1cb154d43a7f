use super::*;
use crate::support::{counts, metric};

/// Reads an OpenMetrics scrape as strictly as Prometheus' own Python client does, and prints its families.
const OPENMETRICS: &str = "
import sys
from prometheus_client.openmetrics.parser import text_string_to_metric_families
for family in text_string_to_metric_families(sys.stdin.read() + '\\n'):
    print(family.name, family.type)
";

/// The complaints of `promtool check metrics`.
fn complaints(text: &str) -> Result<String> {
    let mut promtool = std::process::Command::new("promtool");
    promtool.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = promtool.stderr(Stdio::piped()).spawn().context("start promtool")?;
    child.stdin.take().context("its input")?.write_all(text.as_bytes())?;
    let output = child.wait_with_output()?;
    let said = [output.stdout, output.stderr].concat();
    Ok(String::from_utf8_lossy(&said).into_owned())
}

#[test]
fn a_scrape_is_valid_in_both_forms_and_ends_with_what_it_tells_of() -> Result<()> {
    let host = Host::light()?;
    let blue = web(&host, "blue")?;
    let dead = format!("{}:81", blue.ip()?);
    offer_at(&host, "blue", &dead)?;
    let app = host.client("app").env("BACKEND_BLUE", "/services/blue;80").start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "blue")?;
    let answers = app.get("172.17.0.1:80").times(10).run()?;
    ensure!(answers.answered() == 10, "{answers:?}");

    let route = r#"consumer="app",service="/services/blue",port="80",protocol="tcp""#;
    let closed = format!("embassy_route_connections_total{{{route},outcome=\"closed\"}}");
    counts(&embassy, &closed, 11)?;
    let started = metric(&embassy, &format!("embassy_route_connections_started_total{{{route}}}"))?;
    assert_eq!(
        metric(&embassy, &format!("embassy_route_connect_seconds_count{{{route}}}"))?,
        started
    );
    let of_dead = format!(r#"discovery="etcd",service="/services/blue",endpoint="{dead}""#);
    assert!(metric(&embassy, &format!("embassy_endpoint_ejections_total{{{of_dead}}}"))? >= 1);
    assert!(metric(&embassy, &format!("embassy_route_retries_total{{{route}}}"))? >= 1);

    let plain = embassy.admin("/metrics")?.ok()?;
    assert_eq!(complaints(&plain)?, "", "{plain}");
    let mut curl = vec!["--silent", "--header", "Accept: application/openmetrics-text"];
    curl.push("http://127.0.0.1:9990/metrics");
    let open = host.run("curl", curl)?;
    assert!(open.ends_with("# EOF") && open.contains("# UNIT embassy_connect_seconds seconds"));
    let families = python(OPENMETRICS, &open)?;
    for family in ["embassy_route_connections counter", "embassy_connect_seconds histogram"] {
        assert!(families.lines().any(|line| line == family), "no {family} in {families}");
    }

    // Removed routes and endpoints have no series any more.
    host.etcd()?.v3().delete(&format!("/services/blue/{dead}"))?;
    app.remove()?;
    testbed::eventually(WAIT, "the series to go", || {
        let text = embassy.admin("/metrics")?.ok()?;
        ensure!(!text.contains(&dead) && !text.contains("consumer=\"app\""), "{text}");
        Ok(())
    })
}

#[test]
fn prometheus_itself_scrapes_and_evaluates_the_rules() -> Result<()> {
    let host = Host::light()?;
    web(&host, "blue")?;
    let app = host.client("app").env("BACKEND_BLUE", "/services/blue;80");
    let _app = app.env("BACKEND_WRONG", "no port").start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    let rules = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/prometheus/embassy.rules.yml");
    let config = host.dir().join("prometheus.yml");
    std::fs::write(
        &config,
        format!(
            "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\n\
             rule_files: ['{rules}']\n\
             scrape_configs:\n- job_name: embassy\n  static_configs:\n  - targets: ['127.0.0.1:9990']\n"
        ),
    )?;
    let mut prometheus = host.command("prometheus");
    prometheus.arg(format!("--config.file={}", config.display()));
    prometheus.arg(format!("--storage.tsdb.path={}", host.dir().join("prometheus").display()));
    prometheus.arg("--web.listen-address=127.0.0.1:9090");
    let _prometheus = host.spawn("prometheus", prometheus)?;
    let ask = |path: &str| host.http("GET", &format!("http://127.0.0.1:9090/api/v1/{path}"), "");
    testbed::eventually(READY, "Prometheus to have scraped", || {
        let query = "query?query=embassy_route_connections_started_total";
        let found = &ask(query)?.json()?["data"]["result"][0]["metric"];
        ensure!(found["consumer"] == "app" && found["port"] == "80", "{found}");
        let up = &ask("query?query=up")?.json()?["data"]["result"][0]["value"][1];
        ensure!(*up == "1", "up is {up}");
        let rules = ask("rules")?.json()?;
        let groups = rules["data"]["groups"].as_array().context("no groups")?;
        let rules: Vec<_> = groups.iter().filter_map(|g| g["rules"].as_array()).flatten().collect();
        ensure!(!rules.is_empty(), "no rules");
        ensure!(rules.iter().all(|rule| rule["health"] == "ok"), "{rules:?}");
        Ok(())
    })
}

#[test]
fn a_log_that_nobody_reads_holds_nobody_up_and_its_losses_are_counted() -> Result<()> {
    let host = Host::light()?;
    web(&host, "blue")?;
    let app = host.client("app").env("BACKEND_BLUE", "/services/blue;80").start()?;
    // The reader of its stderr opens the pipe and never reads.
    let script = "mkfifo /run/stalled; sleep 1000 < /run/stalled & exec \"$@\" 2> /run/stalled";
    let mut stalled = host.command("sh");
    stalled.args(["-c", script, "sh"]).arg(testbed::embassy_program()?);
    stalled.args(["--dnat", ETCD, "--connection-log=all", "-v=10"]);
    stalled.env("DOCKER_HOST", host.docker_url());
    let embassy = host.embassy_from(stalled)?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "blue")?;
    testbed::eventually(WAIT * 2, "lines to be dropped", || {
        let answers = app.get("172.17.0.1:80").times(500).at_once(8).run()?;
        assert_eq!(answers.from("blue"), 500, "{answers:?}");
        let dropped = metric(&embassy, "embassy_log_lines_dropped_total")?;
        ensure!(dropped > 0, "none yet");
        Ok(())
    })
}

#[test]
fn each_connection_is_a_line_with_true_numbers_and_so_is_each_refusal() -> Result<()> {
    let host = Host::light()?;
    web(&host, "blue")?;
    let app = host.client("app").env("BACKEND_BLUE", "/services/blue;80");
    let app = app.env("BACKEND_NONE", "/services/none;81").start()?;
    let embassy = host.embassy(["--dnat", ETCD, "--connection-log=all", "--log-format=json"])?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "blue")?;
    let _ = app.get("172.17.0.1:81").run()?;
    // Another program's rule leads to embassy.
    for rule in [
        "add table ip foreign",
        "add chain ip foreign pre { type nat hook prerouting priority -90; }",
        "add rule ip foreign pre ip daddr 10.9.9.9 tcp dport 80 redirect to :9999",
    ] {
        host.run("nft", [rule])?;
    }
    let _ = app.probe("10.9.9.9:80")?;
    let line = |outcome: &str| {
        testbed::eventually(WAIT, &format!("a line of {outcome}"), || {
            let log = embassy.log();
            let all = log.lines().filter_map(|line| serde_json::from_str(line).ok());
            let mut of_connections =
                all.filter(|line: &serde_json::Value| line["target"] == "connection");
            of_connections.find(|line| line["outcome"] == outcome).context("none yet")
        })
    };
    let closed = line("closed")?;
    assert!(closed["bytes_down"].as_u64() > Some(4), "{closed}");
    assert!(closed["connect_ms"].as_f64() <= closed["total_ms"].as_f64(), "{closed}");
    assert_eq!((&closed["consumer"], &closed["retries"]), (&"app".into(), &0.into()));
    assert_eq!(
        (&closed["service"], &closed["destination"]),
        (&"/services/blue".into(), &"172.17.0.1:80".into())
    );
    let none = line("no_endpoint")?;
    assert_eq!((&none["consumer"], none.get("endpoint")), (&"app".into(), None));
    let direct = line("not_a_vip")?;
    assert!(
        direct["source"]
            .as_str()
            .is_some_and(|source| source.contains(&app.ip().unwrap().to_string()))
    );
    Ok(())
}
