//! The metrics of routes and endpoints. A route's series have its consumer as a label, an endpoint's do not: the product of
//! both would be too many series to store.

use std::{
    collections::BTreeMap,
    fmt::{self, Write},
    sync::atomic::Ordering::Relaxed,
};

use prometheus_client::encoding::{EncodeLabelSet, LabelSetEncoder, MetricEncoder, NoLabelSet};

use super::families::{Families, Family};
use crate::{
    balance::EndpointState,
    counts::{BOUNDS, ConnectionCounts, Distribution},
    judgement::{self, Verdict},
    model::{Millis, Protocol},
    outcome::Outcome,
    path::{Path, Paths},
    table::{Route, Table},
};

/// The routes of one consumer's port, over all its addresses.
struct Port<'a> {
    consumer: &'a str,
    service: &'a str,
    port: u16,
    protocol: Protocol,
    routes: Vec<&'a Route>,
}

impl Port<'_> {
    fn labels(&self) -> Labels {
        let port = self.port.to_string();
        Labels::new([
            ("consumer", self.consumer),
            ("service", self.service),
            ("port", &port),
            ("protocol", self.protocol.as_str()),
        ])
    }

    fn sum(&self, of: impl Fn(&ConnectionCounts) -> u64) -> u64 {
        self.routes.iter().map(|route| of(&route.counts)).sum()
    }
}

pub(super) fn routes(out: &mut Families<'_, '_>, table: &Table, paths: &Paths) -> fmt::Result {
    let counts = paths.counts(table.routes().map(|route| &route.key));
    let mut by_reason =
        out.gauges("routes_by_path", "Routes by the path of their connections, and why", None)?;
    for (path, counts) in counts {
        for (reason, count) in counts {
            let labels = Labels::new([("path", path.as_str()), ("reason", reason.as_str())]);
            by_reason.gauge(&labels, count as f64)?;
        }
    }
    let mut ports: BTreeMap<_, Port<'_>> = BTreeMap::new();
    for route in table.routes() {
        let (consumer, port) = (&*route.consumer_name, route.key.port.get());
        let (service, protocol) = (route.query.service.as_str(), route.key.protocol);
        let of_port = || Port { consumer, service, port, protocol, routes: Vec::new() };
        let key = (consumer, service, port, protocol);
        ports.entry(key).or_insert_with(of_port).routes.push(route);
    }
    let ports: Vec<_> = ports.into_values().map(|port| (port.labels(), port)).collect();

    let mut by_path = out.gauges(
        "route_path",
        "Always 1; the path that the connections of a consumer's port take",
        None,
    )?;
    for (labels, port) in &ports {
        let mut taken = port.routes.iter().map(|route| paths.path(&route.key));
        let is_kernel = taken.clone().any(|path| path == Path::Kernel);
        let path = if is_kernel { Path::Kernel } else { taken.next().unwrap_or(Path::Proxy) };
        by_path.gauge(&WithLabel(labels, ("path", path.as_str())), 1.0)?;
    }
    let mut started =
        out.counters("route_connections_started", "Connections accepted for a consumer's port")?;
    for (labels, port) in &ports {
        started.counter(labels, port.sum(|counts| counts.started.load(Relaxed)))?;
    }
    let mut active = out.gauges(
        "route_connections_active",
        "Connections of a consumer's port that are open or being opened",
        None,
    )?;
    for (labels, port) in &ports {
        active.gauge(labels, port.sum(ConnectionCounts::active) as f64)?;
    }
    let mut ended = out.counters("route_connections", "Connections of a consumer's port that ended, by outcome; no series for an outcome that never occurred")?;
    for (labels, port) in &ports {
        for outcome in Outcome::ALL {
            outcomes(&mut ended, labels, *outcome, port.sum(|counts| counts.ended.get(*outcome)))?;
        }
    }
    let mut bytes = out.counters(
        "route_bytes",
        "Bytes transferred for a consumer's port, by direction: up is from the consumer",
    )?;
    for (labels, port) in &ports {
        directions(
            &mut bytes,
            labels,
            port.sum(|c| c.bytes_up.load(Relaxed)),
            port.sum(|c| c.bytes_down.load(Relaxed)),
        )?;
    }
    let mut datagrams = out.counters(
        "route_datagrams",
        "Datagrams of a consumer's UDP port that the kernel's programs saw, by direction: up is from the consumer",
    )?;
    for (labels, port) in ports.iter().filter(|(_, port)| port.protocol == Protocol::Udp) {
        directions(
            &mut datagrams,
            labels,
            port.sum(|c| c.datagrams_up.load(Relaxed)),
            port.sum(|c| c.datagrams_down.load(Relaxed)),
        )?;
    }
    let mut retries = out.counters(
        "route_retries",
        "Further attempts for a consumer's port after an endpoint failed",
    )?;
    for (labels, port) in &ports {
        retries.counter(labels, port.sum(|counts| counts.retries.load(Relaxed)))?;
    }
    let mut connect = out.histograms(
        "route_connect",
        "Time from accepting a connection of a consumer's port until its endpoint connection was open; no series for a port without such a connection",
    )?;
    for (labels, port) in &ports {
        let mut sum = Distribution::default();
        port.routes.iter().for_each(|route| sum.add(&route.counts.connect.read()));
        connect_times(&mut connect, labels, &sum)?;
    }
    Ok(())
}

/// Writes the connect times of a route or an endpoint. One without a connection has none: on a host with many routes most are idle, and
/// their histograms would be the larger part of a scrape.
fn connect_times(
    family: &mut MetricEncoder<'_>,
    labels: &Labels,
    read: &Distribution,
) -> fmt::Result {
    match read.count() {
        0 => Ok(()),
        _ => histogram(&mut family.encode_family(labels)?, read),
    }
}

pub(super) fn endpoints(out: &mut Families<'_, '_>, table: &Table, now: Millis) -> fmt::Result {
    let mut all: Vec<_> = table.endpoints().collect();
    all.sort_by_key(|(service, state)| (*service, state.endpoint));
    let all: Vec<(_, &EndpointState)> = all
        .into_iter()
        .map(|((discovery, datacentre, service), state)| {
            let discovery = match datacentre {
                Some(datacentre) => format!("{discovery} in {datacentre}"),
                None => discovery.to_string(),
            };
            let endpoint = state.endpoint.to_string();
            let service = service.as_str();
            let labels =
                [("discovery", &*discovery), ("service", service), ("endpoint", &endpoint)];
            (Labels::new(labels), &**state)
        })
        .collect();

    let mut opened =
        out.counters("endpoint_connections_opened", "Connections opened to an endpoint")?;
    for (labels, state) in &all {
        opened.counter(labels, state.counts.started.load(Relaxed))?;
    }
    let mut active = out.gauges(
        "endpoint_connections_active",
        "Connections to an endpoint that are open or being opened",
        None,
    )?;
    for (labels, state) in &all {
        active.gauge(labels, f64::from(state.active()))?;
    }
    let mut ended = out.counters("endpoint_connections", "Opened connections to an endpoint that ended, by outcome; no series for an outcome that never occurred")?;
    for (labels, state) in &all {
        for outcome in Outcome::ALL {
            outcomes(&mut ended, labels, *outcome, state.counts.ended.get(*outcome))?;
        }
    }
    let mut bytes = out.counters(
        "endpoint_bytes",
        "Bytes transferred to and from an endpoint, by direction: up is to the endpoint",
    )?;
    for (labels, state) in &all {
        directions(
            &mut bytes,
            labels,
            state.counts.bytes_up.load(Relaxed),
            state.counts.bytes_down.load(Relaxed),
        )?;
    }
    let mut failures =
        out.counters("endpoint_connect_failures", "Failed connect attempts to an endpoint")?;
    for (labels, state) in &all {
        failures.counter(labels, state.failed_tries())?;
    }
    let mut ejections =
        out.counters("endpoint_ejections", "Times an endpoint was ejected after a failure")?;
    for (labels, state) in &all {
        ejections.counter(labels, state.ejections())?;
    }
    let mut ejected =
        out.gauges("endpoint_ejected", "1 while an endpoint is skipped after a failure", None)?;
    for (labels, state) in &all {
        let skipped = judgement::endpoint(state, now).verdict() == Verdict::Broken;
        ejected.gauge(labels, f64::from(u8::from(skipped)))?;
    }
    let mut connect = out.histograms(
        "endpoint_connect",
        "Connect time to an endpoint; no series for an endpoint without a connection",
    )?;
    for (labels, state) in &all {
        connect_times(&mut connect, labels, &state.counts.connect.read())?;
    }
    Ok(())
}

fn outcomes(
    family: &mut Family<'_>,
    labels: &impl EncodeLabelSet,
    outcome: Outcome,
    count: u64,
) -> fmt::Result {
    match count {
        0 => Ok(()),
        count => family.counter(&WithLabel(labels, ("outcome", outcome.as_str())), count),
    }
}

fn directions(
    family: &mut Family<'_>,
    labels: &impl EncodeLabelSet,
    up: u64,
    down: u64,
) -> fmt::Result {
    family.counter(&WithLabel(labels, ("direction", "up")), up)?;
    family.counter(&WithLabel(labels, ("direction", "down")), down)
}

/// Writes a distribution in seconds.
pub(super) fn histogram(metric: &mut MetricEncoder<'_>, read: &Distribution) -> fmt::Result {
    let bounds = BOUNDS.iter().map(|bound| *bound as f64 / 1e6).chain([f64::INFINITY]);
    let buckets: Vec<_> = bounds.zip(read.buckets).collect();
    metric.encode_histogram::<NoLabelSet>(read.sum_seconds(), read.count(), &buckets, None)
}

/// Labels that many series share. They are rendered once and written as one piece.
struct Labels {
    /// `a="x",b="y",c`: without the quotes of the last value, which the library adds.
    head: String,
    last: String,
}

impl Labels {
    fn new<const N: usize>(labels: [(&str, &str); N]) -> Self {
        let mut head = String::new();
        let mut last = String::new();
        for (n, (name, value)) in labels.into_iter().enumerate() {
            if n > 0 {
                head += "=\"";
                escape(&mut head, &last);
                head += "\",";
            }
            head += name;
            value.clone_into(&mut last);
        }
        Self { head, last }
    }
}

impl EncodeLabelSet for Labels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        let mut label = encoder.encode_label();
        let mut key = label.encode_label_key()?;
        key.write_str(&self.head)?;
        let mut value = key.encode_label_value()?;
        value.write_str(&self.last)?;
        value.finish()
    }
}

/// A label's value, escaped for both formats.
fn escape(out: &mut String, value: &str) {
    for c in value.chars() {
        match c {
            '\\' => *out += "\\\\",
            '"' => *out += "\\\"",
            '\n' => *out += "\\n",
            c => out.push(c),
        }
    }
}

/// Labels with an additional one.
struct WithLabel<'a, L>(&'a L, (&'a str, &'a str));

impl<L: EncodeLabelSet> EncodeLabelSet for WithLabel<'_, L> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        self.0.encode(encoder)?;
        [self.1].encode(encoder)
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::{
        encoding::text::encode,
        metrics::{counter::Counter, family::Family},
        registry::Registry,
    };

    use super::*;

    /// Writes the metrics of a table's routes.
    #[derive(Debug)]
    struct Routes(std::sync::Arc<Table>);

    impl prometheus_client::collector::Collector for Routes {
        fn encode(
            &self,
            mut encoder: prometheus_client::encoding::DescriptorEncoder<'_>,
        ) -> fmt::Result {
            let paths = Paths::new(crate::descriptor::PathChoice::Proxy);
            routes(&mut Families(&mut encoder), &self.0, &paths)
        }
    }

    #[test]
    fn a_port_has_connect_times_once_a_connection_has_opened() {
        let table = std::sync::Arc::new(crate::proxy::testing::table());
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Routes(table.clone())));
        let written = || {
            let mut text = String::new();
            encode(&mut text, &registry).unwrap();
            let lines = |name: &str| text.lines().filter(|line| line.starts_with(name)).count();
            (lines("route_connect_seconds"), lines("route_connections_started_total{"))
        };
        assert_eq!(written(), (0, 1));
        let route = table.routes().next().unwrap();
        route.counts.connect.observe(std::time::Duration::from_millis(1));
        assert_eq!(written(), (BOUNDS.len() + 3, 1), "buckets, sum and count");
    }

    /// Labels as the library itself would write them.
    #[derive(Debug, Clone, PartialEq, Eq, Hash)]
    struct Plain([(&'static str, &'static str); 3]);

    impl EncodeLabelSet for Plain {
        fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
            self.0.encode(encoder)
        }
    }

    #[derive(Debug, Clone, PartialEq, Eq, Hash)]
    struct AsOne(Plain);

    impl EncodeLabelSet for AsOne {
        fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
            Labels::new(self.0.0).encode(encoder)
        }
    }

    fn written<
        L: EncodeLabelSet + Clone + Eq + std::hash::Hash + fmt::Debug + Send + Sync + 'static,
    >(
        labels: &L,
    ) -> String {
        let family = Family::<L, Counter>::default();
        family.get_or_create(labels).inc();
        let mut registry = Registry::default();
        registry.register("seen", "Seen", family);
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        text
    }

    #[test]
    fn labels_in_one_piece_are_those_of_the_library() {
        for values in [["app", "web", "80"], ["a\"b", "c\\d\n", "e\"\\"], ["", "ü", ""]] {
            let [consumer, service, port] = values;
            let plain = Plain([("consumer", consumer), ("service", service), ("port", port)]);
            assert_eq!(written(&AsOne(plain.clone())), written(&plain));
        }
    }
}
