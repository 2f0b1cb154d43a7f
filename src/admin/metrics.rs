//! The metrics, read at each scrape from where they are counted: a series is there as long as what it tells of.

use std::{
    fmt,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Instant,
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::{Registry, Unit},
};
use tokio::sync::watch;

use crate::{
    capture, control::Sources, outcome::Outcome, proxy::Figures, report::Refused, source::Known,
    state, table::Table,
};

/// OpenMetrics, which every Prometheus since 2.5 asks for.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Where the figures are.
#[derive(Debug)]
pub struct Metrics {
    pub tables: watch::Receiver<Arc<Table>>,
    pub sources: watch::Receiver<Sources>,
    pub refused: Arc<Refused>,
    pub figures: Figures,
    pub capture: Option<Arc<capture::Counts>>,
    pub state: Arc<state::Counts>,
}

impl Metrics {
    pub fn registry(self) -> Registry {
        let mut registry = Registry::with_prefix("embassy");
        registry.register_collector(Box::new(self));
        registry
    }
}

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let table = self.tables.borrow().clone();
        gauge(&mut encoder, "routes", "Routes in the table", table.routes().len())?;
        gauge(&mut encoder, "table_version", "Tables published since the start", table.version)?;
        gauge(
            &mut encoder,
            "connections_active",
            "Connections open or being opened",
            self.figures.live(),
        )?;
        let mut family = encoder.encode_descriptor(
            "connections",
            "Connections that ended, by how",
            None,
            MetricType::Counter,
        )?;
        for outcome in Outcome::ALL {
            let labels = [("outcome", outcome.as_str())];
            ConstCounter::new(self.figures.ended(*outcome))
                .encode(family.encode_family(&labels)?)?;
        }
        let mut family = encoder.encode_descriptor(
            "skipped",
            "What could not be understood or done, and was skipped",
            None,
            MetricType::Counter,
        )?;
        for (what, count) in [
            ("binding", &self.refused.bindings),
            ("route", &self.refused.routes),
            ("endpoint", &self.refused.endpoints),
        ] {
            ConstCounter::new(count.load(Relaxed))
                .encode(family.encode_family(&[("what", what)])?)?;
        }
        self.sources(&mut encoder)?;
        counter(
            &mut encoder,
            "state_written",
            "Times the table was kept on disk",
            &self.state.written,
        )?;
        counter(
            &mut encoder,
            "state_failures",
            "Times the table could not be kept on disk",
            &self.state.failed,
        )?;
        if let Some(counts) = &self.capture {
            let mut family = encoder.encode_descriptor(
                "capture_restored",
                "Rules put back after others changed them, by how",
                None,
                MetricType::Counter,
            )?;
            for change in capture::Change::ALL {
                let labels = [("change", change.as_str())];
                ConstCounter::new(counts.restored(change))
                    .encode(family.encode_family(&labels)?)?;
            }
            gauge(
                &mut encoder,
                "capture_barriers",
                "Chains of others that may drop what is captured",
                counts.barriers.load(Relaxed),
            )?;
            counter(
                &mut encoder,
                "capture_failures",
                "Attempts to write the rules that failed",
                &counts.failed,
            )?;
        }
        Ok(())
    }
}

impl Metrics {
    fn sources(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let sources = self.sources.borrow().clone();
        let mut all = vec![("provider".to_owned(), Figure::of(&sources.provider.borrow()))];
        all.extend(
            sources
                .queries
                .iter()
                .map(|(query, known)| (query.to_string(), Figure::of(&known.borrow()))),
        );

        let mut family = encoder.encode_descriptor(
            "source_up",
            "Whether the source answers",
            None,
            MetricType::Gauge,
        )?;
        for (name, figure) in &all {
            ConstGauge::new(i64::from(figure.up))
                .encode(family.encode_family(&[("source", name.as_str())])?)?;
        }
        let mut family = encoder.encode_descriptor(
            "source_age",
            "Time since the source last confirmed what is used of it",
            Some(&Unit::Seconds),
            MetricType::Gauge,
        )?;
        for (name, figure) in &all {
            if let Some(age) = figure.age {
                ConstGauge::new(age).encode(family.encode_family(&[("source", name.as_str())])?)?;
            }
        }
        let mut family = encoder.encode_descriptor(
            "source_failures",
            "Sessions with the source that failed",
            None,
            MetricType::Counter,
        )?;
        for (name, figure) in &all {
            ConstCounter::new(figure.failures)
                .encode(family.encode_family(&[("source", name.as_str())])?)?;
        }
        Ok(())
    }
}

struct Figure {
    up: bool,
    age: Option<f64>,
    failures: u64,
}

impl Figure {
    fn of<T>(known: &Known<T>) -> Self {
        Self {
            up: known.error.is_none() && known.value.is_some(),
            age: known
                .confirmed
                .map(|at| Instant::now().saturating_duration_since(at).as_secs_f64()),
            failures: known.failures,
        }
    }
}

fn gauge(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    value: impl TryInto<i64>,
) -> Result<(), fmt::Error> {
    let value = value.try_into().unwrap_or(i64::MAX);
    let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    ConstGauge::new(value).encode(metric)
}

fn counter(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    value: &std::sync::atomic::AtomicU64,
) -> Result<(), fmt::Error> {
    let metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    ConstCounter::new(value.load(Relaxed)).encode(metric)
}
