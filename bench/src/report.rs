//! The figures as a document: a table, ratios, plots, and the conditions of the measurement.

use std::{fmt::Write, fs, path::Path, time::Duration};

use anyhow::{Context, Result};

use crate::{
    contender::Contender,
    plot::{bars, number},
    run::{Figure, IDLE, Samples},
    summary::Summary,
};

/// The conditions of the measurement.
#[derive(Debug)]
pub(crate) struct Setting {
    pub(crate) rounds: usize,
    pub(crate) time: Duration,
    /// Requests per second of the paced load.
    pub(crate) rate: f64,
    pub(crate) missing: Vec<Contender>,
}

pub(crate) struct Report {
    text: String,
    plots: Vec<(&'static str, String)>,
}

/// Rows of the table: the figure, its name and its unit.
const ROWS: [(Figure, &str); 20] = [
    (Figure::Connections, "new connections per second"),
    (Figure::CpuPerConnection, "CPU of the proxy per connection, µs"),
    (Figure::WholePerConnection, "total CPU per connection, µs"),
    (Figure::Requests, "keep-alive requests per second"),
    (Figure::CpuPerRequest, "CPU of the proxy per request, µs"),
    (Figure::WholePerRequest, "total CPU per request, µs"),
    (Figure::Bulk, "bulk, Gbit/s"),
    (Figure::CpuPerGigabyte, "CPU of the proxy per GB, ms"),
    (Figure::WholePerGigabyte, "total CPU per GB, ms"),
    (Figure::P50, "p50 at one connection, µs"),
    (Figure::P99, "p99 at one connection, µs"),
    (Figure::P99Paced, "p99 at the fixed rate, µs"),
    (Figure::P99BesideBulk, "p99 beside 4 bulk streams, µs"),
    (Figure::BulkBeside, "– throughput of these streams, Gbit/s"),
    (Figure::P99BesideFlood, "p99 beside another consumer's flood, µs"),
    (Figure::FloodBeside, "– new connections per second of the flood"),
    (Figure::ResidentAtStart, "resident at start, MiB"),
    (Figure::ResidentPerIdle, "resident per idle connection, KiB"),
    (Figure::KernelPerIdle, "kernel memory per idle connection, KiB"),
    (Figure::Binary, "binary, MiB"),
];

/// The figures that are drawn.
const PLOTS: [(Figure, &str, &str, &str); 7] = [
    (
        Figure::CpuPerConnection,
        "connection",
        "CPU of the proxy per new connection",
        "µs, less is better",
    ),
    (
        Figure::CpuPerRequest,
        "request",
        "CPU of the proxy per keep-alive request",
        "µs, less is better",
    ),
    (Figure::CpuPerGigabyte, "bulk-cpu", "CPU of the proxy per GB", "ms, less is better"),
    (Figure::Bulk, "bulk", "Bulk", "Gbit/s, more is better"),
    (Figure::P50, "p50", "Latency of one connection, p50", "µs, less is better"),
    (Figure::P99Paced, "p99", "Latency at a fixed rate, p99", "µs, less is better"),
    (Figure::ResidentPerIdle, "idle", "Resident memory per idle connection", "KiB, less is better"),
];

/// The targets of the kernel path: its figure divided by the other contender's.
const KERNEL_TARGETS: [(Figure, Contender, Goal); 5] = [
    (Figure::Connections, Contender::Direct, Goal::AtLeast(0.95)),
    (Figure::WholePerConnection, Contender::Direct, Goal::AtMost(1.0 / 0.95)),
    (Figure::Requests, Contender::Direct, Goal::AtLeast(0.97)),
    (Figure::WholePerRequest, Contender::Direct, Goal::AtMost(1.0 / 0.97)),
    (Figure::Bulk, Contender::Direct, Goal::AtLeast(0.97)),
];

/// The targets of the proxy.
const TARGETS: [(Figure, Contender, Goal); 12] = [
    (Figure::CpuPerConnection, Contender::Haproxy, Goal::AtMost(0.90)),
    (Figure::CpuPerConnection, Contender::Nginx, Goal::AtMost(1.0)),
    (Figure::WholePerConnection, Contender::Direct, Goal::AtMost(1.0 / 0.50)),
    (Figure::CpuPerRequest, Contender::Haproxy, Goal::AtMost(0.80)),
    (Figure::WholePerRequest, Contender::Direct, Goal::AtMost(1.0 / 0.52)),
    (Figure::CpuPerGigabyte, Contender::Haproxy, Goal::AtMost(0.50)),
    (Figure::Bulk, Contender::Haproxy, Goal::AtLeast(1.35)),
    (Figure::Bulk, Contender::Direct, Goal::AtLeast(0.80)),
    (Figure::P50, Contender::Haproxy, Goal::AtMost(0.92)),
    (Figure::P99Paced, Contender::Haproxy, Goal::AtMost(1.0)),
    (Figure::P99BesideBulk, Contender::Haproxy, Goal::AtMost(1.0)),
    (Figure::ResidentPerIdle, Contender::Haproxy, Goal::AtMost(1.0 / 7.0)),
];

#[derive(Debug, Clone, Copy)]
enum Goal {
    AtMost(f64),
    AtLeast(f64),
}

impl Report {
    pub(crate) fn new(
        setting: &Setting,
        contenders: &[Contender],
        samples: &Samples,
    ) -> Result<Self> {
        let summary = |figure, contender| {
            Summary::of(samples.get(&(figure, contender)).into_iter().flatten().copied())
        };
        let mut out = String::new();
        heading(&mut out, setting, contenders)?;

        let names: Vec<_> = contenders.iter().map(|c| c.name()).collect();
        let _ = writeln!(
            out,
            "## Figures\n\n| | {} |\n|---|{}",
            names.join(" | "),
            "---|".repeat(names.len())
        );
        for (figure, what) in ROWS {
            let cells = contenders.iter().map(|&contender| match summary(figure, contender) {
                Some(s) if of_kernel(figure, contender) || s.most.is_nan() => "–".to_owned(),
                Some(s) if s.least == s.most => number(s.median),
                Some(s) => {
                    format!("{} ({} to {})", number(s.median), number(s.least), number(s.most))
                }
                None => "–".to_owned(),
            });
            let _ = writeln!(out, "| {what} | {} |", cells.collect::<Vec<_>>().join(" | "));
        }
        let failed: Vec<_> = contenders
            .iter()
            .filter_map(|&contender| {
                let failed: f64 =
                    samples.get(&(Figure::Failures, contender)).into_iter().flatten().sum();
                (failed > 0.0).then(|| format!("{} {failed}", contender.name()))
            })
            .collect();
        let failed = if failed.is_empty() { "none".to_owned() } else { failed.join(", ") };
        let _ = writeln!(out, "\nFailed requests and connections in all rounds: {failed}.\n");

        let _ = writeln!(
            out,
            "## embassy compared with the others\n\nRatios of the medians.\n\n| | of | against | ratio | target | |\n|---|---|---|---|---|---|"
        );
        let proxy = TARGETS.map(|target| (Contender::Embassy, target));
        let kernel = KERNEL_TARGETS.map(|target| (Contender::EmbassyKernel, target));
        for (own, (figure, other, goal)) in proxy.into_iter().chain(kernel) {
            let (Some(ours), Some(theirs)) = (summary(figure, own), summary(figure, other)) else {
                continue;
            };
            let what = ROWS.iter().find(|(row, _)| *row == figure).map_or("", |(_, what)| what);
            let what = what.rsplit_once(',').map_or(what, |(what, _)| what);
            let ratio = ours.median / theirs.median;
            let (target, reached) = match goal {
                Goal::AtMost(most) => (format!("≤ {most:.2}"), ratio <= most),
                Goal::AtLeast(least) => (format!("≥ {least:.2}"), ratio >= least),
            };
            let _ = writeln!(
                out,
                "| {what} | {} | {} | {ratio:.2} | {target} | {} |",
                own.name(),
                other.name(),
                if reached { "reached" } else { "not reached" }
            );
        }

        let plots = PLOTS.iter().map(|&(figure, name, title, unit)| {
            let rows: Vec<_> = contenders
                .iter()
                .filter(|&&c| !of_kernel(figure, c))
                .filter_map(|&c| Some((c.name(), summary(figure, c)?)))
                .collect();
            (name, bars(title, unit, &rows, Contender::Embassy.name()))
        });
        let plots: Vec<_> = plots.collect();
        let _ = writeln!(out, "\n## Plots\n");
        for ((name, _), (_, _, title, _)) in plots.iter().zip(PLOTS) {
            let _ = writeln!(out, "![{title}](benchmarks/{name}.svg)\n");
        }
        Ok(Self { text: out.trim_end().to_owned() + "\n", plots })
    }

    /// Writes the report into docs/, and to the terminal.
    pub(crate) fn write(&self) -> Result<()> {
        let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
        let folder = docs.join("benchmarks");
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        for (name, svg) in &self.plots {
            fs::write(folder.join(format!("{name}.svg")), svg)
                .with_context(|| format!("write {name}.svg"))?;
        }
        fs::write(docs.join("benchmarks.md"), &self.text).context("write docs/benchmarks.md")?;
        println!("{}", self.text);
        Ok(())
    }
}

/// Whether a figure is meaningless for a contender because the kernel does its work: without a process there is no CPU time
/// of its own.
fn of_kernel(figure: Figure, contender: Contender) -> bool {
    !contender.is_proxy()
        && contender != Contender::EmbassyKernel
        && matches!(
            figure,
            Figure::CpuPerConnection | Figure::CpuPerRequest | Figure::CpuPerGigabyte
        )
}

fn heading(out: &mut String, setting: &Setting, contenders: &[Contender]) -> Result<()> {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpus
        .lines()
        .find_map(|l| l.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown processor", |(_, m)| m);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let kernel = Contender::Direct.version()?;
    let _ = writeln!(
        out,
        "# Benchmarks\n\nWritten by `make bench`. bench/README.md explains what is measured and how. The figures are medians of {} rounds of {} s\n\
         each, with minimum and maximum in parentheses. Clients, endpoints and the proxy shared one machine: {cores} cores ({model}),\n\
         {kernel}. Compare columns, not runs.\n\n\
         - The fixed rate is {} requests per second: 70 % of HAProxy's maximum.\n\
         - Idle connections: {}.",
        setting.rounds,
        setting.time.as_secs_f64(),
        number(setting.rate),
        number(IDLE as f64),
    );
    for contender in contenders.iter().filter(|c| c.is_proxy()) {
        let _ = writeln!(out, "- {}: {}", contender.name(), contender.version()?);
    }
    for contender in &setting.missing {
        let _ = writeln!(out, "- {}: left out: it could not be downloaded", contender.name());
    }
    let _ = writeln!(out);
    Ok(())
}
