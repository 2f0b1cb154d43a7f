//! `embassy status`: the state and the problems of the running embassy.

use std::{collections::BTreeMap, fmt::Write};

use anyhow::Result;

use super::{
    Answer,
    client::ApiTarget,
    findings,
    table::{self, age, bytes, printable},
};
use crate::{
    admin::api::{self, Path, PathReason, Verdict},
    counts::numbered,
    path::PathCounts,
};

/// Show the state and the problems of the running embassy; exit 1 if it is not ready
#[derive(Debug, clap::Args)]
pub(super) struct Status {
    #[command(flatten)]
    asked: ApiTarget,
}

impl Status {
    pub(super) async fn run(self) -> Result<Answer> {
        let client = self.asked.client()?;
        let status: api::Status = client.get("/v1/status", &[]).await?;
        if self.asked.json {
            return Answer::json(&status, status.ready);
        }
        Ok(Answer::new(text(&status), status.ready))
    }
}

fn text(status: &api::Status) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write(&mut out, status);
    out
}

fn write(out: &mut String, status: &api::Status) -> std::fmt::Result {
    let api::Status { version, pid, uptime_seconds, .. } = status;
    let ready = if status.ready { "ready" } else { "NOT READY" };
    let verdict = match status.verdict {
        Verdict::Ok => String::new(),
        verdict => format!(", {}", findings::word(verdict)),
    };
    let (up, version) = (age(*uptime_seconds), printable(version));
    writeln!(out, "{ready}{verdict}: embassy {version}, process {pid}, up {up}")?;
    for api::Waiting { part, seconds, sources } in &status.waiting_for {
        let whom = sources.join(", ");
        let whom = if whom.is_empty() { whom } else { format!(" from {whom}") };
        let since = seconds.map_or(String::new(), |seconds| format!(" since {}", age(seconds)));
        writeln!(out, "  waits for {part}{}{since}", printable(&whom))?;
    }
    findings::write(out, &status.findings)?;

    let engine = status.engine.as_deref().map_or(String::new(), |engine| format!(", {engine}"));
    let asked = format!("{}{engine}, {}", status.host_name, status.discoveries.join(", "));
    writeln!(out, "host         {}", printable(&asked))?;
    let capture = &status.capture;
    let by =
        capture.firewall.as_deref().map_or(String::new(), |one| format!(" by {}", printable(one)));
    match (capture.mode, capture.in_place) {
        (api::CaptureMode::None, _) => writeln!(
            out,
            "capture      {}",
            match status.verdicts.capture {
                Verdict::Ok => "by your own rules",
                Verdict::Degraded => "by your own rules, as far as they go (see above)",
                Verdict::Broken => "nothing is captured by your own rules (see above)",
            }
        )?,
        (mode, true) => writeln!(out, "capture      {mode}{by}, in place")?,
        (mode, false) => writeln!(out, "capture      {mode}{by}, not in place")?,
    }
    if let Some(last) = &capture.last_restored {
        let missing = printable(&last.text);
        let times = numbered(capture.restored.values().sum::<u64>(), "time", "times");
        writeln!(out, "  rules restored {times}, last {} ago: {missing}", age(last.age_seconds))?;
    }
    writeln!(out, "listens      {}", printable(&status.listeners.join(" ")))?;
    match status.vips.as_slice() {
        [] => writeln!(out, "VIPs         none")?,
        vips => writeln!(out, "VIPs         {}", printable(&vips.join(" ")))?,
    }

    write!(
        out,
        "routes       {} of {}",
        status.routes,
        numbered(status.consumers, "consumer", "consumers")
    )?;
    match status.routes_without_endpoint {
        0 => writeln!(out)?,
        without => writeln!(out, ", {without} without endpoint")?,
    }
    if status.paths.values().flat_map(BTreeMap::keys).any(|reason| *reason != PathReason::NotAsked)
    {
        writeln!(out, "paths        {}", paths(&status.paths))?;
    }
    write!(out, "endpoints    {}", status.endpoints)?;
    if status.endpoints_ejected > 0 {
        write!(out, ", {} ejected", status.endpoints_ejected)?;
    }
    if status.endpoints_drained > 0 {
        write!(out, ", {} drained", status.endpoints_drained)?;
    }
    writeln!(out)?;
    write!(out, "sources      {}, {} down", status.sources, status.sources_down)?;
    match status.sources_waiting {
        0 => writeln!(out)?,
        waiting => writeln!(out, ", {} not answered yet", numbered(waiting, "has", "have"))?,
    }
    let api::Connections { active, limit, held, started, bytes_up, bytes_down, .. } =
        &status.connections;
    write!(out, "connections  {active} open of {limit}")?;
    if *held > 0 {
        write!(out, ", {held} held")?;
    }
    writeln!(
        out,
        "; {started} since the start, {} up, {} down",
        bytes(*bytes_up),
        bytes(*bytes_down)
    )?;
    let ended = status.connections.ended.iter();
    let ended: Vec<_> = ended.map(|(outcome, count)| format!("{outcome} {count}")).collect();
    if !ended.is_empty() {
        writeln!(out, "  ended: {}", ended.join(", "))?;
    }
    let connect = &status.connections.connect;
    if let (Some(half), Some(most)) = (connect.p50_seconds, connect.p99_seconds) {
        let (half, most) = (table::connect(half), table::connect(most));
        writeln!(out, "  to connect: half within {half}, 99 of 100 within {most}")?;
    }
    let api::Host { memory_used_bytes, memory_limit_bytes, .. } = &status.host;
    if let (Some(used), Some(limit)) = (memory_used_bytes, memory_limit_bytes) {
        writeln!(out, "memory       {} of {}", bytes(*used), bytes(*limit))?;
    }
    Ok(())
}

/// `kernel 3 (proved 3), proxy 2 (header 1, unproved 1), none 1 (family 1)`
pub(super) fn paths(counts: &PathCounts) -> String {
    let of = |path: &Path| {
        let here = counts.get(path)?;
        let why: Vec<_> = here.iter().map(|(reason, n)| format!("{reason} {n}")).collect();
        let sum: u64 = here.values().sum();
        (sum > 0).then(|| format!("{path} {sum} ({})", why.join(", ")))
    };
    let all: Vec<_> = [Path::Kernel, Path::Proxy, Path::None].iter().filter_map(of).collect();
    all.join(", ")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A status as the API gives it.
    pub(in crate::cli) fn status() -> api::Status {
        let latency = api::Latency {
            count: 9,
            sum_seconds: 0.1,
            p50_seconds: Some(0.002),
            p99_seconds: Some(0.05),
        };
        api::Status {
            version: "1.2.3".into(),
            pid: 7,
            host_name: "web-1".into(),
            engine: Some("unix:///var/run/docker.sock".into()),
            discoveries: vec!["consul://10.0.0.1:8500".into()],
            uptime_seconds: 600.0,
            ready: true,
            verdict: Verdict::Ok,
            verdicts: api::Verdicts {
                process: Verdict::Ok,
                capture: Verdict::Ok,
                sources: Verdict::Ok,
                bindings: Verdict::Ok,
                routes: Verdict::Ok,
                endpoints: Verdict::Ok,
                connections: Verdict::Ok,
                host: Verdict::Ok,
            },
            findings: vec![],
            waiting_for: vec![],
            may_change: false,
            listeners: vec!["0.0.0.0:9999".into()],
            vips: vec!["172.17.0.1".into()],
            table_version: 3,
            consumers: 1,
            routes: 2,
            paths: [(Path::Proxy, [(PathReason::NotAsked, 2)].into())].into(),
            routes_without_endpoint: 0,
            routes_degraded: 0,
            routes_broken: 0,
            endpoints: 4,
            endpoints_ejected: 1,
            endpoints_drained: 0,
            problems: 0,
            sources: 2,
            sources_down: 0,
            sources_waiting: 0,
            connections: api::Connections {
                active: 5,
                limit: 9744,
                limit_of_consumer: None,
                held: 0,
                memory_short: false,
                started: 100,
                ended: [(api::Outcome::Closed, 95)].into(),
                errors: 0,
                bytes_up: 1000,
                bytes_down: 2_500_000,
                connect: latency,
            },
            capture: api::Capture {
                mode: api::CaptureMode::Dnat,
                scope: api::CaptureScope::Declared,
                firewall: Some("nft".into()),
                in_place: true,
                restored: Default::default(),
                last_restored: None,
                failures: 0,
                error: None,
                barriers: vec![],
            },
            host: api::Host {
                conntrack_entries: None,
                conntrack_limit: None,
                descriptors: None,
                descriptors_limit: None,
                resident_bytes: None,
                memory_used_bytes: None,
                memory_limit_bytes: None,
                cpu_seconds: None,
                started_seconds: None,
            },
        }
    }

    #[test]
    fn paths_are_listed_where_one_was_asked_for() {
        assert!(!text(&status()).contains("paths "));
        let paths = [
            (Path::Kernel, [(PathReason::Possible, 1), (PathReason::Proved, 2)].into()),
            (Path::Proxy, [(PathReason::Header, 1), (PathReason::Unproved, 3)].into()),
            (Path::None, [(PathReason::Family, 1)].into()),
        ];
        let said = text(&api::Status { paths: paths.into(), ..status() });
        let line = "paths        kernel 3 (possible 1, proved 2), proxy 4 (header 1, unproved 3), none 1 (family 1)\n";
        assert!(said.contains(line), "{said}");
    }

    #[test]
    fn all_is_well() {
        let expected = "\
ready: embassy 1.2.3, process 7, up 10 min
host         web-1, unix:///var/run/docker.sock, consul://10.0.0.1:8500
capture      dnat by nft, in place
listens      0.0.0.0:9999
VIPs         172.17.0.1
routes       2 of 1 consumer
endpoints    4, 1 ejected
sources      2, 0 down
connections  5 open of 9744; 100 since the start, 1.0 kB up, 2.5 MB down
  ended: closed 95
  to connect: half within 2 ms, 99 of 100 within 50 ms
";
        assert_eq!(text(&status()), expected);
    }

    #[test]
    fn what_is_wrong_stands_out() {
        let mut status = status();
        status.ready = false;
        status.waiting_for = vec![api::Waiting {
            part: api::Part::Discovery,
            seconds: Some(3.0),
            sources: vec!["consul web".into()],
        }];
        status.verdict = Verdict::Broken;
        status.findings = vec![api::Finding {
            about: api::Subject::Capture,
            verdict: Verdict::Broken,
            cause: "no_vip".into(),
            text: "There is no VIP: nothing is captured.".into(),
            fix: Some("set one with --proxy-ip".into()),
        }];
        status.capture.in_place = false;
        status.vips.clear();
        status.routes_without_endpoint = 2;
        status.sources_waiting = 1;
        status.host.memory_used_bytes = Some(61_000_000);
        status.host.memory_limit_bytes = Some(64_000_000);
        let text = text(&status);
        for line in [
            "NOT READY, BROKEN: embassy 1.2.3, process 7, up 10 min\n  waits for discovery from consul web since 3 s\n",
            "  BROKEN    There is no VIP: nothing is captured.\n            fix: set one with --proxy-ip\n",
            "capture      dnat by nft, not in place\n",
            "VIPs         none\n",
            "routes       2 of 1 consumer, 2 without endpoint\n",
            "sources      2, 0 down, 1 has not answered yet\n",
            "memory       61.0 MB of 64.0 MB\n",
        ] {
            assert!(text.contains(line), "{line:?} in {text}");
        }
    }
}
