//! The metrics, read from the counters at each scrape. A series exists as long as its route, endpoint or source.

use std::{
    fmt,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Instant,
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, NoLabelSet},
    metrics::MetricType,
    registry::{Registry, Unit},
};
use tokio::sync::watch;

use super::host;
use crate::{
    capture,
    control::SourceStates,
    counts::Histogram,
    judgement::{self, SourceState},
    kernel::{UdpCounts, UdpNote},
    log,
    outcome::Outcome,
    path::Paths,
    provider::Limit,
    proxy::Figures,
    report::Refused,
    source::Known,
    state,
    table::Table,
};

mod families;
mod text;
mod traffic;

use families::Families;
pub(super) use text::{Format, write_aside};

/// The sources of the figures.
#[derive(Debug)]
pub struct Metrics {
    pub tables: watch::Receiver<Arc<Table>>,
    pub paths: watch::Receiver<Paths>,
    pub build_times: Arc<Histogram>,
    pub sources: watch::Receiver<SourceStates>,
    pub refused: Arc<Refused>,
    pub figures: Figures,
    pub udp: Arc<UdpCounts>,
    pub state: Arc<state::Counts>,
    pub capture: Option<Arc<capture::CaptureCounts>>,
}

impl Metrics {
    pub fn registry(self) -> Registry {
        let mut registry = Registry::default();
        registry.sub_registry_with_prefix("embassy").register_collector(Box::new(self));
        // These metrics have the same names in every program.
        registry.sub_registry_with_prefix("process").register_collector(Box::new(Process));
        registry
    }
}

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut out = Families(&mut encoder);
        out.info(
            "build",
            "Always 1; the version that runs",
            &[("version", env!("CARGO_PKG_VERSION"))],
        )?;
        self.table(&mut out)?;
        self.connections(&mut out)?;
        let table = self.tables.borrow().clone();
        traffic::routes(&mut out, &table, &self.paths.borrow().clone())?;
        traffic::endpoints(&mut out, &table, self.figures.now())?;
        let mut udp = out.counters("udp_events", "What happened to flows of UDP, by event")?;
        for event in UdpNote::ALL {
            udp.counter(&[("event", event.as_str())], self.udp.get(*event))?;
        }
        self.sources(&mut out)?;
        out.counter(
            "takeovers",
            "Times a new embassy took over from the running one without losing connections; counters continue",
            self.figures.takeovers(),
        )?;
        out.counter(
            "state_written",
            "Times the table was saved to disk",
            self.state.written.load(Relaxed),
        )?;
        out.counter(
            "state_failures",
            "Times saving the table failed",
            self.state.failed.load(Relaxed),
        )?;
        if let Some(counts) = &self.capture {
            captured(&mut out, counts)?;
        }
        let host = host::host();
        out.gauge(
            "conntrack_entries",
            "Connection tracking entries of the whole host",
            host.conntrack_entries,
        )?;
        out.gauge("conntrack_limit", "Limit of connection tracking entries; at the limit the kernel drops all new connections of the host", host.conntrack_limit)?;
        out.gauge(
            "memory_used_bytes",
            "Memory use of the control group nearest to its limit, without reclaimable memory",
            host.memory_used_bytes,
        )?;
        out.gauge(
            "memory_limit_bytes",
            "Memory limit of this control group",
            host.memory_limit_bytes,
        )?;
        out.gauge(
            "memory_short",
            "1 while new connections are refused because memory is nearly used up",
            Some(u64::from(self.figures.memory_short())),
        )
    }
}

impl Metrics {
    fn table(&self, out: &mut Families<'_, '_>) -> fmt::Result {
        let table = self.tables.borrow().clone();
        out.gauge(
            "routes",
            "Routes in the table: one for each consumer address and declared port",
            Some(table.routes().len() as u64),
        )?;
        out.gauge(
            "endpoints",
            "Endpoints of all services that have a route",
            Some(table.endpoints().len() as u64),
        )?;
        out.gauge(
            "bindings_unrouted",
            "Bindings without a route, or with only some of their routes",
            Some(table.unrouted().len() as u64),
        )?;
        let sources = self.sources.borrow().clone();
        let invalid = sources.listing.as_ref().map_or(0, |listing| listing.problems.len());
        out.gauge(
            "bindings_invalid",
            "Descriptors that do not parse, and consumers that cannot be identified",
            Some(invalid as u64),
        )?;
        let entries = sources.queries.iter().map(|(_, known)| {
            known.borrow().value.as_ref().map_or(0, |endpoints| endpoints.rejected.count() as u64)
        });
        out.gauge("entries_skipped", "Discovery entries that do not parse", Some(entries.sum()))?;
        let refused = table.upstreams().map(|upstream| upstream.refused.len() as u64);
        out.gauge(
            "endpoints_refused",
            "Endpoints that are not used because of their address (see --endpoints)",
            Some(refused.sum()),
        )?;
        let left_out = sources.queries.iter().map(|(_, known)| {
            known.borrow().value.as_ref().map_or(0, |endpoints| endpoints.left_out)
        });
        let left_out = left_out.sum::<usize>();
        let listing = sources.listing.clone().unwrap_or_default();
        let bindings = |limit| {
            let of_limit = listing.beyond.iter().filter(|one| one.limit == limit);
            of_limit.map(|one| one.consumer.bindings.len()).sum::<usize>()
        };
        let mut beyond = out.gauges(
            "beyond_limit",
            "Bindings and endpoints that are not used because of a limit",
            None,
        )?;
        for limit in Limit::ALL {
            beyond.gauge(&[("limit", limit.as_str())], bindings(*limit) as f64)?;
        }
        beyond.gauge(&[("limit", "endpoints_per_service")], left_out as f64)?;
        out.gauge("table_version", "Tables published since the start", Some(table.version))?;
        let mut build = out.histograms(
            "table_build",
            "Time from a source's change until the new table was published",
        )?;
        traffic::histogram(&mut build, &self.build_times.read())?;
        let mut skipped = out.counters("skipped", "Skipped items, by kind")?;
        for (what, count) in [
            ("binding", &self.refused.bindings),
            ("route", &self.refused.routes),
            ("endpoint", &self.refused.endpoints),
        ] {
            skipped.counter(&[("what", what)], count.load(Relaxed))?;
        }
        out.counter("log_lines_dropped", "Log lines, including the connection log, dropped because the reader of stderr is too slow", log::dropped())
    }

    fn connections(&self, out: &mut Families<'_, '_>) -> fmt::Result {
        let figures = &self.figures;
        out.gauge(
            "connections_active",
            "Connections that are open or being opened",
            Some(figures.live() as u64),
        )?;
        out.gauge(
            "connections_held",
            "Connections that wait until their container is known",
            Some(figures.held() as u64),
        )?;
        out.gauge(
            "connections_limit",
            "Maximum number of open connections; further ones are reset",
            Some(figures.limit() as u64),
        )?;
        out.counter("connections_started", "Connections accepted for a route", figures.started())?;
        let mut ended =
            out.counters("connections", "Connections that ended or were refused, by outcome")?;
        for outcome in Outcome::ALL {
            ended.counter(&[("outcome", outcome.as_str())], figures.ended(*outcome))?;
        }
        let (up, down) = figures.bytes();
        let mut bytes = out.counters(
            "bytes",
            "Bytes transferred, by direction: up is from consumers to endpoints",
        )?;
        bytes.counter(&[("direction", "up")], up)?;
        bytes.counter(&[("direction", "down")], down)?;
        let mut connect = out.histograms(
            "connect",
            "Time from accepting a connection until its endpoint connection was open",
        )?;
        traffic::histogram(&mut connect, &figures.connect())
    }

    fn sources(&self, out: &mut Families<'_, '_>) -> fmt::Result {
        let sources = self.sources.borrow().clone();
        let mut all = vec![("provider".to_owned(), Figure::of(&sources.provider.borrow()))];
        all.extend(
            sources
                .queries
                .iter()
                .map(|(query, known)| (query.to_string(), Figure::of(&known.borrow()))),
        );
        let mut up = out.gauges("source_up", "1 while the source answers", None)?;
        for (name, figure) in &all {
            up.gauge(&[("source", name.as_str())], f64::from(u8::from(figure.up)))?;
        }
        let mut age = out.gauges(
            "source_age",
            "Time since the source last confirmed the data in use",
            Some(&Unit::Seconds),
        )?;
        for (name, figure) in &all {
            if let Some(seconds) = figure.age {
                age.gauge(&[("source", name.as_str())], seconds)?;
            }
        }
        let mut answers = out.counters(
            "source_answers",
            "Full answers of the source, including those without a change",
        )?;
        for (name, figure) in &all {
            answers.counter(&[("source", name.as_str())], figure.answers)?;
        }
        let mut changes = out.counters(
            "source_changes",
            "Full answers that differ from the previous one, including the first",
        )?;
        for (name, figure) in &all {
            changes.counter(&[("source", name.as_str())], figure.changes)?;
        }
        let mut failures = out.counters("source_failures", "Failed sessions with the source")?;
        for (name, figure) in &all {
            failures.counter(&[("source", name.as_str())], figure.failures)?;
        }
        Ok(())
    }
}

fn captured(out: &mut Families<'_, '_>, counts: &capture::CaptureCounts) -> fmt::Result {
    let in_place = u64::from(counts.standing().in_place);
    out.gauge("capture_in_place", "1 while the capture rules are complete", Some(in_place))?;
    let mut restored = out.counters(
        "capture_restored",
        "Times the rules were restored after another program changed them, by the kind of change",
    )?;
    for change in capture::Change::ALL {
        restored.counter(&[("change", change.as_str())], counts.restored(*change))?;
    }
    out.gauge(
        "capture_barriers",
        "Chains of other programs that may drop captured connections",
        Some(counts.barriers.load(Relaxed)),
    )?;
    let mut written = out.histograms(
        "capture_write",
        "Time to write the rules, or the changes of a new table to them",
    )?;
    traffic::histogram(&mut written, &counts.write_times.read())?;
    out.counter(
        "direct_dials_refused",
        "Connections to embassy's own port that the firewall refused because they were not captured",
        counts.turned_away.get(capture::TurnedAway::Direct),
    )?;
    out.counter(
        "spoofed",
        "Frames that the guard dropped: their sender used an address of another container",
        counts.turned_away.get(capture::TurnedAway::Spoofed),
    )?;
    out.gauge(
        "guarded_addresses",
        "Addresses of containers that the guard binds to a bridge port",
        Some(counts.bound.load(Relaxed)),
    )?;
    out.gauge(
        "unguarded_addresses",
        "Addresses of containers on bridges of which the guard does not know the port",
        Some(counts.unbound.load(Relaxed)),
    )?;
    out.counter(
        "capture_failures",
        "Failed attempts to write the rules",
        counts.failed.load(Relaxed),
    )
}

struct Figure {
    up: bool,
    age: Option<f64>,
    answers: u64,
    changes: u64,
    failures: u64,
}

impl Figure {
    fn of<T>(known: &Known<T>) -> Self {
        Self {
            up: judgement::source(known) == SourceState::Up,
            age: known
                .confirmed
                .map(|at| Instant::now().saturating_duration_since(at).as_secs_f64()),
            answers: known.answers,
            changes: known.changes,
            failures: known.failures,
        }
    }
}

/// The usual metrics of a process, under their usual names.
#[derive(Debug)]
struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut out = Families(&mut encoder);
        let host = host::host();
        out.gauge("open_fds", "Open descriptors", host.descriptors)?;
        out.gauge("max_fds", "Maximum number of open descriptors", host.descriptors_limit)?;
        out.gauge("resident_memory_bytes", "Resident memory", host.resident_bytes)?;
        let mut start =
            out.gauges("start_time", "Start time, in seconds since 1970", Some(&Unit::Seconds))?;
        if let Some(seconds) = host.started_seconds {
            start.0.encode_gauge(&seconds)?;
        }
        let mut cpu = out.0.encode_descriptor(
            "cpu",
            "CPU time of all threads",
            Some(&Unit::Seconds),
            MetricType::Counter,
        )?;
        cpu.encode_counter::<NoLabelSet, _, f64>(&host.cpu_seconds.unwrap_or_default(), None)
    }
}
