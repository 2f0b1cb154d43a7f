//! The two forms of a scrape. The library writes OpenMetrics; whoever does not ask for that gets Prometheus' own text form
//! (prometheus.io/docs/instrumenting/exposition_formats), which differs in how families are announced.

use std::{
    fmt::{self, Write},
    io,
    sync::Arc,
    thread,
};

use prometheus_client::{encoding::text::encode, registry::Registry};
use tokio::sync::oneshot;

/// What a scrape is written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    OpenMetrics,
    Prometheus,
}

impl Format {
    /// What a scraper that accepts this wants.
    pub(crate) fn accepted(accept: &str) -> Self {
        if accept.contains("application/openmetrics-text") {
            Self::OpenMetrics
        } else {
            Self::Prometheus
        }
    }

    pub(crate) fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// How much a thread that writes metrics yields to others, from 0 to 19.
const NICE: i32 = 10;

/// Writes all metrics in a thread of its own, to which the kernel prefers the data path where processors are short.
/// `place` is kept until it is written, whether or not anybody still waits for it.
pub(crate) async fn render_aside(
    registry: Arc<Registry>,
    format: Format,
    place: impl Send + 'static,
) -> io::Result<String> {
    let (answer, answered) = oneshot::channel();
    let write = move || {
        // Of this thread alone, as Linux has it. Where it is refused, the scrape is only less polite.
        let _ = rustix::process::nice(NICE);
        // Whoever asked may have given up.
        let _ = answer.send(render(&registry, format));
        drop(place);
    };
    thread::Builder::new().name("scrape".into()).spawn(write)?;
    answered.await.map_err(io::Error::other)?.map_err(io::Error::other)
}

/// Writes all metrics.
fn render(registry: &Registry, format: Format) -> Result<String, fmt::Error> {
    let mut text = String::new();
    encode(&mut text, registry)?;
    match format {
        Format::OpenMetrics => Ok(text),
        Format::Prometheus => prometheus(&text),
    }
}

/// The same in Prometheus' own form: a counter's family is named with its `_total`, an info is a gauge, and there are no
/// units and no end.
fn prometheus(text: &str) -> Result<String, fmt::Error> {
    let mut out = String::with_capacity(text.len());
    let mut help = ("", "");
    for line in text.split_inclusive('\n') {
        let Some(comment) = line.strip_prefix("# ") else {
            out.push_str(line);
            continue;
        };
        let mut words = comment.trim_end().splitn(3, ' ');
        match (words.next(), words.next(), words.next()) {
            (Some("HELP"), Some(name), Some(text)) => help = (name, text),
            (Some("TYPE"), Some(name), Some(kind)) => {
                let (suffix, kind) = match kind {
                    "counter" => ("_total", kind),
                    "info" => ("_info", "gauge"),
                    _ => ("", kind),
                };
                if help.0 == name {
                    // The library ends a help with a full stop of its own.
                    writeln!(out, "# HELP {name}{suffix} {}", help.1)?;
                }
                writeln!(out, "# TYPE {name}{suffix} {kind}")?;
            }
            _ => {}
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scraper_gets_what_it_accepts() {
        let asks =
            "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2";
        assert_eq!(Format::accepted(asks), Format::OpenMetrics);
        for plain in ["", "*/*", "text/plain"] {
            assert_eq!(Format::accepted(plain), Format::Prometheus);
        }
    }

    #[test]
    fn families_are_announced_as_prometheus_has_them() {
        let open = "# HELP a Seen.\n# TYPE a counter\na_total 1\n# HELP t_seconds Took.\n# TYPE t_seconds gauge\n\
            # UNIT t_seconds seconds\nt_seconds 0.5\n# HELP b Built.\n# TYPE b info\nb_info{v=\"1\"} 1\n# EOF\n";
        let expected = "# HELP a_total Seen.\n# TYPE a_total counter\na_total 1\n# HELP t_seconds Took.\n\
            # TYPE t_seconds gauge\nt_seconds 0.5\n# HELP b_info Built.\n# TYPE b_info gauge\nb_info{v=\"1\"} 1\n";
        assert_eq!(prometheus(open).unwrap(), expected);
    }
}
