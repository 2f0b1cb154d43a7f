//! What the documents say is so: every command in them runs, and they tell of everything there is.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use embassy::outcome::Outcome;
use testbed::{Embassy, Host, embassy_program};

use crate::{
    READY,
    memory::Group,
    support::{reaches, says},
};

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs")
}

/// The host that the documents speak of: `app` asks for redis, of which there are two.
fn host() -> Result<(Host, Embassy)> {
    let host = Host::start()?;
    for name in ["redis-1", "redis-2"] {
        let server = ["http", "--name", name, "--port", "6379"];
        let server = host.server(name, server).env("SERVICE_6379_NAME", "redis");
        server.start()?;
    }
    let app = host.client("app").env("BACKEND_REDIS", "redis;6379").start()?;
    // There are metrics of a limit only where there is one.
    let group = Group::new(&host, 1 << 30)?;
    let embassy = group.embassy(&host, &["--dnat", "-discovery=docker://"])?;
    embassy.wait_ready(READY)?;
    reaches_one(&app)?;
    says(&embassy, &["capturing"])?;
    Ok((host, embassy))
}

fn reaches_one(app: &testbed::Container) -> Result<()> {
    reaches(app, "172.17.0.1:6379", "redis-1")
        .or_else(|_| reaches(app, "172.17.0.1:6379", "redis-2"))
}

/// A block that is marked to be run, and whether it is to fail.
fn blocks(text: &str) -> Vec<(String, bool)> {
    let mut blocks = Vec::new();
    let mut rest = text;
    while let Some((_, after)) = rest.split_once("```sh run") {
        let Some((mark, after)) = after.split_once('\n') else { break };
        let Some((block, after)) = after.split_once("```") else { break };
        blocks.push((block.to_owned(), mark.trim() == "fails"));
        rest = after;
    }
    blocks
}

#[test]
fn every_command_of_the_documents_runs() -> Result<()> {
    let (host, _embassy) = host()?;
    let program = embassy_program()?;
    let folder = program.parent().context("a folder")?.display().to_string();
    let mut ran = 0;
    for name in ["operations.md", "troubleshooting.md", "migrating.md"] {
        let text = fs::read_to_string(docs().join(name)).with_context(|| name.to_owned())?;
        for (block, fails) in blocks(&text) {
            let mut command = host.command("env");
            command.arg(format!("PATH={folder}:{}", std::env::var("PATH")?));
            command.arg(format!("DOCKER_HOST={}", host.docker_url()));
            let output = command.args(["sh", "-ec", &block]).output()?;
            let said = [output.stdout, output.stderr].concat();
            let said = String::from_utf8_lossy(&said).into_owned();
            let code = output.status.code();
            ensure!(code == Some(if fails { 1 } else { 0 }), "{name}: {block}{code:?}: {said}");
            ran += 1;
        }
    }
    ensure!(ran >= 12, "only {ran} blocks were found");
    Ok(())
}

/// The indented commands of README.md: several lines where a line ends with a backslash.
fn readme() -> Result<Vec<String>> {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md"))?;
    let text = text.replace("\\\n", " ");
    let lines = text.lines().filter_map(|line| line.strip_prefix("    "));
    let programs = ["make", "docker", "embassy", "iptables", "curl"];
    let is_command = |line: &&str| programs.contains(&line.split(' ').next().unwrap_or_default());
    Ok(lines.filter(is_command).map(str::to_owned).collect())
}

#[test]
fn every_command_of_the_readme_runs_or_has_flags_that_embassy_takes() -> Result<()> {
    let (host, _embassy) = host()?;
    host.consul()?;
    let program = embassy_program()?;
    let folder = program.parent().context("a folder")?.display().to_string();
    let (mut ran, mut read) = (0, 0);
    for line in readme()? {
        let first = line.split(' ').next().unwrap_or_default();
        match first {
            // They build all of this anew; the demo and the tests are what they start.
            "make" => continue,
            // A rule of the user's own, as the tests of `--redirect` have it.
            "iptables" => continue,
            // The application's image is the reader's.
            "docker" if line.contains(" my-app") => continue,
            _ => {}
        }
        // It would need an image of embassy, or captures from inside a container: that its flags are right is seen here.
        let proxy = match first {
            "docker" => line.rsplit_once(" embassy --").map(|(_, flags)| flags),
            "embassy" => line.strip_prefix("embassy --"),
            _ => None,
        };
        if let Some(flags) = proxy {
            let flags = format!("--{flags}").replace('\'', "");
            let words = flags.split_whitespace().map(str::to_owned);
            let config = embassy::config::Config::parse(words.collect::<Vec<_>>(), &|_| None);
            ensure!(config.is_ok(), "{line}: {config:?}");
            read += 1;
            continue;
        }
        let mut command = host.command("env");
        command.arg(format!("PATH={folder}:{}", std::env::var("PATH")?));
        command.arg(format!("DOCKER_HOST={}", host.docker_url()));
        let output = command.args(["sh", "-ec", &line]).output()?;
        let said = [output.stdout, output.stderr].concat();
        ensure!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&said));
        ran += 1;
    }
    ensure!(ran >= 5 && read >= 3, "{ran} were run, and the flags of {read} read");
    Ok(())
}

/// The names of metrics in a text.
fn names(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words.filter(|word| word.starts_with("embassy_")).map(str::to_owned).collect()
}

#[test]
fn the_documents_tell_of_every_metric_and_every_outcome_and_of_no_other() -> Result<()> {
    let (_host, embassy) = host()?;
    let scraped = embassy.admin("/metrics")?.ok()?;
    let samples = scraped.lines().filter(|line| !line.starts_with('#'));
    let there = names(&samples.collect::<Vec<_>>().join("\n"));
    // A histogram is told by its own name.
    let base = |name: &String| {
        let parts = ["_bucket", "_sum", "_count"];
        parts.iter().find_map(|part| name.strip_suffix(part)).unwrap_or(name).to_owned()
    };
    let operations = fs::read_to_string(docs().join("operations.md"))?;
    let told: BTreeSet<_> = names(&operations).iter().map(base).collect();
    let metrics: BTreeSet<_> = there.iter().map(base).collect();
    assert_eq!(told, metrics, "left: docs/operations.md, right: /metrics");
    for file in ["prometheus/embassy.rules.yml", "grafana/embassy.json"] {
        let used = names(&fs::read_to_string(docs().join(file))?);
        assert!(
            !used.is_empty() && used.is_subset(&there),
            "{file}: {:?}",
            used.difference(&there)
        );
    }
    for outcome in Outcome::ALL {
        let row = format!("| `{}` |", outcome.as_str());
        let row = operations.lines().find(|line| line.starts_with(&row));
        let row = row.with_context(|| format!("{outcome:?} is not in operations.md"))?;
        assert_eq!(row.ends_with("| yes |"), outcome.is_error(), "{row}");
    }
    Ok(())
}

#[test]
fn prometheus_takes_the_rules_and_the_dashboard_is_json() -> Result<()> {
    let rules = docs().join("prometheus/embassy.rules.yml");
    let output = Command::new("promtool").args(["check", "rules"]).arg(&rules).output();
    let output = output.context("run promtool, of Debian's package prometheus")?;
    assert!(output.status.success(), "{output:?}");
    // Every alert is explained, and nothing is explained that there is not.
    let (rules, operations) =
        (fs::read_to_string(rules)?, fs::read_to_string(docs().join("operations.md"))?);
    let alerts: BTreeSet<_> =
        rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    let told: BTreeSet<_> = operations
        .lines()
        .filter_map(|line| line.strip_prefix("| `Embassy")?.split_once('`'))
        .map(|(name, _)| format!("Embassy{name}"))
        .collect();
    assert_eq!(told, alerts.into_iter().map(str::to_owned).collect());
    let dashboard = fs::read_to_string(docs().join("grafana/embassy.json"))?;
    let dashboard: serde_json::Value = serde_json::from_str(&dashboard)?;
    let panels = dashboard["panels"].as_array().context("no panels")?;
    assert!(panels.iter().all(|panel| panel["targets"][0]["expr"].is_string()));
    Ok(())
}
