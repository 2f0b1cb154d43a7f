//! The documents are correct: every command in them runs, and they are complete.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use embassy::{admin::api, outcome::Outcome, word::Word};
use testbed::{Embassy, Host, embassy_program};

use crate::{
    READY,
    memory::Group,
    support::{reaches, says},
};

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs")
}

/// The host that the documents describe: `app` uses redis, which has two instances.
fn host() -> Result<(Host, Embassy)> {
    let host = Host::start()?;
    for name in ["redis-1", "redis-2"] {
        let server = ["http", "--name", name, "--port", "6379"];
        let server = host.server(name, server).env("SERVICE_6379_NAME", "redis");
        server.start()?;
    }
    let app = host.client("app").env("BACKEND_REDIS", "redis;6379");
    // There are metrics of UDP only where a binding asks for it.
    let app = app.env("BACKEND_UDP", "redis;6379/udp").start()?;
    host.run("sh", ["-c", "mkdir -p /etc/embassy && echo secret > /etc/embassy/token"])?;
    // Metrics about a limit exist only if there is a limit.
    let group = Group::new(&host, 1 << 30)?;
    let embassy = group.embassy(
        &host,
        &["--dnat", "-discovery=docker://", "--admin-token-file=/etc/embassy/token"],
    )?;
    embassy.wait_ready(READY)?;
    reaches_one(&app)?;
    says(&embassy, &["embassy captures connections"])?;
    Ok((host, embassy))
}

fn reaches_one(app: &testbed::Container) -> Result<()> {
    reaches(app, "172.17.0.1:6379", "redis-1")
        .or_else(|_| reaches(app, "172.17.0.1:6379", "redis-2"))
}

/// The blocks that are marked to be run, and whether each must fail.
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
    ensure!(ran >= 14, "only {ran} blocks were found");
    Ok(())
}

/// The indented commands of README.md and of the reference. A backslash at the end of a line continues it.
fn readme() -> Result<Vec<String>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let texts = ["README.md", "docs/reference.md"].map(|file| fs::read_to_string(root.join(file)));
    let text = texts.into_iter().collect::<Result<String, _>>()?.replace("\\\n", " ");
    let lines = text.lines().filter_map(|line| line.strip_prefix("    "));
    // Tests already run as root.
    let lines = lines.map(|line| line.strip_prefix("sudo ").unwrap_or(line));
    let programs = ["make", "docker", "embassy", "iptables", "curl"];
    let is_command = |line: &&str| programs.contains(&line.split(' ').next().unwrap_or_default());
    Ok(lines.filter(is_command).map(str::to_owned).collect())
}

/// The image nginx is not available: an image that also serves port 80 and has curl replaces it.
fn with_image_of_testbed(line: String) -> String {
    if let Some(run) = line.strip_suffix(" nginx") {
        return format!("{run} --expose=80 testbed testbed peer http --name web --port 80");
    }
    line.replace(" nginx curl ", " testbed curl --fail --max-time 10 ")
}

#[test]
fn every_command_of_the_readme_runs_or_has_flags_that_embassy_takes() -> Result<()> {
    let (host, _embassy) = host()?;
    host.consul()?;
    let program = embassy_program()?;
    let folder = program.parent().context("a folder")?.display().to_string();
    let (mut ran, mut read) = (0, 0);
    for line in readme()? {
        // An embassy in a container is tested elsewhere (`least_privilege`). Its commands are the same.
        let line = line.strip_prefix("docker exec embassy ").unwrap_or(&line).to_owned();
        let line = with_image_of_testbed(line);
        let first = line.split(' ').next().unwrap_or_default();
        match first {
            // They build everything again. The demo and the tests are started by them.
            "make" => continue,
            // A user's own rule, as in the tests of `--redirect`.
            "iptables" => continue,
            // The image is the reader's application.
            "docker" if line.contains(" my-app") => continue,
            // It shows a screen until it is ended.
            "embassy" if line == "embassy top" => continue,
            _ => {}
        }
        // It would need an image of embassy, or captures inside a container. Here only its flags are checked.
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
fn the_documents_tell_of_every_state() -> Result<()> {
    fn words<T: Word>() -> impl Iterator<Item = &'static str> {
        T::ALL.iter().map(|word| word.as_str())
    }
    let operations = fs::read_to_string(docs().join("operations.md"))?;
    let (_, states) = operations.split_once("## States\n").context("no section on states")?;
    let (states, _) = states.split_once("\n## ").context("no section behind it")?;
    let all = words::<api::Verdict>()
        .chain(words::<api::RouteState>())
        .chain(words::<api::EndpointHealth>())
        .chain(words::<api::SourceState>())
        .chain(words::<api::BindingState>())
        .chain(words::<api::ConnectionState>())
        .chain(words::<api::Check>());
    for word in all {
        ensure!(states.contains(&format!("`{word}`")), "{word}");
    }
    // Each row has the verdict of the code, and no row has a state that does not exist.
    fn verdicts<T: Word + Copy>(of: &str, verdict: impl Fn(T) -> api::Verdict) -> Vec<[String; 3]> {
        let row = |word: &T| [of.to_owned(), word.as_str().to_owned(), verdict(*word).to_string()];
        T::ALL.iter().map(row).collect()
    }
    let mut expected = verdicts("route", api::RouteState::verdict);
    expected.extend(verdicts("endpoint", api::EndpointHealth::verdict));
    expected.extend(verdicts("binding", api::BindingState::verdict));
    let mut told = Vec::new();
    let mut of = "";
    for row in states.lines().filter(|line| line.starts_with("| ")) {
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        of = if cells[1].is_empty() { of } else { cells[1] };
        let words = |cell: &str| -> Vec<String> {
            cell.split(',').map(|word| word.trim().trim_matches('`').to_owned()).collect()
        };
        for state in
            words(cells[2]).into_iter().filter(|_| ["route", "endpoint", "binding"].contains(&of))
        {
            told.push([of.to_owned(), state, words(cells[3]).concat()]);
        }
    }
    told.sort();
    expected.sort();
    assert_eq!(told, expected, "left: docs/operations.md, right: the code");
    let (_, readyz) = operations.split_once("`GET /readyz`").context("no /readyz")?;
    let (readyz, _) = readyz.split_once('\n').context("no line behind it")?;
    for part in words::<api::Part>() {
        ensure!(readyz.contains(&format!("`{part}`")), "{part}");
    }
    let (_, path) = operations.split_once("## The kernel path\n").context("no section on it")?;
    let (path, _) = path.split_once("What is different").context("no differences behind it")?;
    let lines = path.lines().filter(|line| line.starts_with("- `"));
    let told: BTreeSet<&str> =
        lines.flat_map(|line| line.split(':').next().unwrap_or_default().split('`')).collect();
    let reasons: BTreeSet<&str> = words::<api::PathReason>().collect();
    let unknown: Vec<_> =
        told.difference(&reasons).filter(|one| !matches!(one.trim(), "-" | "," | "")).collect();
    ensure!(unknown.is_empty(), "no such reasons: {unknown:?}");
    let missing: Vec<_> = reasons.difference(&told).collect();
    ensure!(missing.is_empty(), "missing reasons: {missing:?}");
    Ok(())
}

#[test]
fn the_documents_tell_of_every_metric_and_every_outcome_and_of_no_other() -> Result<()> {
    let (_host, embassy) = host()?;
    let scraped = embassy.admin("/metrics")?.ok()?;
    let samples = scraped.lines().filter(|line| !line.starts_with('#'));
    let there = names(&samples.collect::<Vec<_>>().join("\n"));
    // A histogram is documented by its base name.
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

/// The outcomes in expressions, by selector.
fn outcomes(text: &str) -> Vec<BTreeSet<&str>> {
    let selectors = ["outcome=\"", "outcome=~\""].into_iter();
    let selected = selectors.flat_map(|start| text.split(start).skip(1));
    selected.map(|rest| rest.split('"').next().unwrap_or_default().split('|').collect()).collect()
}

#[test]
fn prometheus_takes_the_rules_and_the_dashboard_is_json() -> Result<()> {
    let rules = docs().join("prometheus/embassy.rules.yml");
    let output = Command::new("promtool").args(["check", "rules"]).arg(&rules).output();
    let output = output.context("run promtool, of Debian's package prometheus")?;
    assert!(output.status.success(), "{output:?}");
    // Each alert fires when it should, and none on a healthy host.
    let mut promtool = Command::new("promtool");
    promtool.args(["test", "rules", "embassy.test.yml"]).current_dir(docs().join("prometheus"));
    let output = promtool.output()?;
    assert!(output.status.success(), "{output:?}");
    let tested = fs::read_to_string(docs().join("prometheus/embassy.test.yml"))?;
    // All alerts are explained, and no others.
    let (rules, operations) =
        (fs::read_to_string(rules)?, fs::read_to_string(docs().join("operations.md"))?);
    let alerts: BTreeSet<_> =
        rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    let told: BTreeSet<_> = operations
        .lines()
        .filter_map(|line| line.strip_prefix("| `Embassy")?.split_once('`'))
        .map(|(name, _)| format!("Embassy{name}"))
        .collect();
    for alert in &alerts {
        assert!(tested.contains(&format!("alertname=\"{alert}\"")), "{alert} has no test");
    }
    assert_eq!(told, alerts.into_iter().map(str::to_owned).collect());
    // All outcomes that are errors are in the alerts and on the dashboard, and no others.
    let errors = Outcome::ALL.iter().filter(|outcome| outcome.is_error());
    let errors: BTreeSet<_> = errors.map(|outcome| outcome.as_str()).collect();
    assert_eq!(outcomes(&rules).into_iter().flatten().collect::<BTreeSet<_>>(), errors);
    let dashboard = fs::read_to_string(docs().join("grafana/embassy.json"))?;
    let dashboard: serde_json::Value = serde_json::from_str(&dashboard)?;
    let panels = dashboard["panels"].as_array().context("no panels")?;
    assert!(panels.iter().all(|panel| panel["targets"][0]["expr"].is_string()));
    let expressions = panels.iter().flat_map(|panel| panel["targets"].as_array()).flatten();
    let expressions: Vec<_> = expressions.filter_map(|target| target["expr"].as_str()).collect();
    let named = expressions.iter().flat_map(|expression| outcomes(expression));
    let lists: Vec<_> = named.filter(|list| list.len() > 1).collect();
    assert!(lists.len() >= 2 && lists.iter().all(|list| *list == errors), "{lists:?}");
    // Prometheus can parse them, with an interval instead of Grafana's variable.
    for expression in expressions {
        let expression = expression.replace("$__rate_interval", "5m").replace("$instance", ".*");
        let rule = format!("groups: [{{name: a, rules: [{{record: a, expr: '{expression}'}}]}}]");
        let file = tempfile::NamedTempFile::new()?;
        fs::write(file.path(), rule)?;
        let output = Command::new("promtool").args(["check", "rules"]).arg(file.path()).output()?;
        assert!(output.status.success(), "{expression}: {output:?}");
    }
    Ok(())
}

/// A log line in the code.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Line {
    message: String,
    fields: BTreeSet<String>,
}

/// The arguments in the parentheses after which `text` begins.
fn arguments(text: &str) -> Vec<String> {
    let (mut depth, mut quoted, mut escaped) = (0, false, false);
    let mut all = vec![String::new()];
    for c in text.chars() {
        let end = !quoted && depth == 0;
        match c {
            ')' if end => break,
            ',' if end => {
                all.push(String::new());
                continue;
            }
            '"' if !escaped => quoted = !quoted,
            '(' | '[' | '{' if !quoted => depth += 1,
            ')' | ']' | '}' if !quoted => depth -= 1,
            _ => {}
        }
        escaped = quoted && c == '\\' && !escaped;
        all.last_mut().unwrap().push(c);
    }
    let all = all.iter().map(|argument| argument.trim().to_owned());
    all.filter(|argument| !argument.is_empty()).collect()
}

/// Every line that `-v 0` may log, from the code that writes it.
fn lines() -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = fs::read_to_string(&path)?;
            let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
            for start in ["info!(", "warn!(", "error!("] {
                for (_, rest) in code.match_indices(start).map(|(at, _)| code.split_at(at)) {
                    let mut all = arguments(&rest[start.len()..]);
                    let message = all.pop().context("no message")?.replace("\\\"", "\"");
                    let fields = all.iter().filter(|field| !field.starts_with("target:"));
                    let name = |field: &String| {
                        let name = field.split('=').next().unwrap_or_default().trim();
                        let name = name.trim_start_matches(['%', '?']);
                        name.rsplit('.').next().unwrap_or_default().to_owned()
                    };
                    let fields = fields.map(name).collect();
                    lines.push(Line { message: message.trim_matches('"').to_owned(), fields });
                }
            }
        }
    }
    Ok(lines)
}

/// The texts between backticks.
fn quoted(cell: &str) -> BTreeSet<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// The text with `...` instead of inserted values.
fn without_values(message: &str) -> String {
    let mut out = String::new();
    let mut rest = message;
    while let Some((before, value)) = rest.split_once('{') {
        out += before;
        out += "...";
        rest = value.split_once('}').map_or("", |(_, after)| after);
    }
    out + rest
}

#[test]
fn the_documents_tell_of_every_line_of_the_log_with_its_fields() -> Result<()> {
    let operations = fs::read_to_string(docs().join("operations.md"))?;
    let section = |title: &str| {
        let (_, rest) = operations.split_once(title).context(title.to_owned())?;
        let rows = rest.lines().skip_while(|line| !line.starts_with("|---")).skip(1);
        anyhow::Ok(rows.take_while(|line| line.starts_with('|')).collect::<Vec<_>>())
    };
    let (mut of_connections, mut written) = (BTreeSet::new(), BTreeMap::new());
    for Line { message, fields } in lines()? {
        match message.as_str() {
            "connection" | "refused" => of_connections.extend(fields),
            // Why embassy ends: any error.
            "{error:#}" => {}
            _ => {
                let all: &mut BTreeSet<_> = written.entry(without_values(&message)).or_default();
                all.extend(fields);
            }
        }
    }
    assert!(written.len() > 60, "{written:#?}");
    let mut told = BTreeSet::new();
    for row in section("| message | fields |")? {
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        let (messages, fields) = (quoted(cells[1]), quoted(cells[2]));
        let known = messages.iter().filter_map(|message| written.get(message)).flatten();
        let known: BTreeSet<_> = known.cloned().collect();
        assert_eq!(fields, known, "left: docs/operations.md, right: src, of {messages:?}");
        told.extend(messages);
    }
    let written: BTreeSet<_> = written.into_keys().collect();
    assert_eq!(told, written, "left: docs/operations.md, right: src");
    let rows = section("### The connection log")?;
    let told: BTreeSet<_> =
        rows.iter().flat_map(|row| quoted(row.split('|').nth(1).unwrap_or_default())).collect();
    assert_eq!(told, of_connections, "left: docs/operations.md, right: the connection log");
    Ok(())
}
