//! Writes families of metrics, one after another.

use std::fmt;

use prometheus_client::{
    encoding::{DescriptorEncoder, EncodeLabelSet, MetricEncoder, NoLabelSet},
    metrics::MetricType,
    registry::Unit,
};

/// The families of metrics, as they are written.
pub(super) struct Families<'a, 'b>(pub(super) &'a mut DescriptorEncoder<'b>);

impl Families<'_, '_> {
    /// A single gauge. Not written if there is no value.
    pub(super) fn gauge(&mut self, name: &str, help: &str, value: Option<u64>) -> fmt::Result {
        match value {
            Some(value) => {
                self.0.encode_descriptor(name, help, None, MetricType::Gauge)?.encode_gauge(&value)
            }
            None => Ok(()),
        }
    }

    pub(super) fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let mut metric = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        metric.encode_counter::<NoLabelSet, _, u64>(&value, None)
    }

    pub(super) fn info(&mut self, name: &str, help: &str, labels: &[(&str, &str)]) -> fmt::Result {
        self.0.encode_descriptor(name, help, None, MetricType::Info)?.encode_info(&labels)
    }

    pub(super) fn gauges<'s>(
        &'s mut self,
        name: &'s str,
        help: &str,
        unit: Option<&'s Unit>,
    ) -> Result<Family<'s>, fmt::Error> {
        Ok(Family(self.0.encode_descriptor(name, help, unit, MetricType::Gauge)?))
    }

    pub(super) fn counters<'s>(
        &'s mut self,
        name: &'s str,
        help: &str,
    ) -> Result<Family<'s>, fmt::Error> {
        Ok(Family(self.0.encode_descriptor(name, help, None, MetricType::Counter)?))
    }

    /// Histograms of seconds.
    pub(super) fn histograms<'s>(
        &'s mut self,
        name: &'s str,
        help: &str,
    ) -> Result<MetricEncoder<'s>, fmt::Error> {
        self.0.encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Histogram)
    }
}

/// One metric with labels.
pub(super) struct Family<'a>(pub(super) MetricEncoder<'a>);

impl Family<'_> {
    pub(super) fn gauge(&mut self, labels: &impl EncodeLabelSet, value: f64) -> fmt::Result {
        self.0.encode_family(labels)?.encode_gauge(&value)
    }

    pub(super) fn counter(&mut self, labels: &impl EncodeLabelSet, value: u64) -> fmt::Result {
        self.0.encode_family(labels)?.encode_counter::<NoLabelSet, _, u64>(&value, None)
    }
}
