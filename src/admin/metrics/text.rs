//! The two forms of a scrape. The library writes OpenMetrics; whoever does not ask for that gets Prometheus' own text form
//! (prometheus.io/docs/instrumenting/exposition_formats), which differs in how families are announced.

use std::{
    fmt::{self, Write},
    io, mem,
    sync::Arc,
    thread,
};

use axum::body::{Body, Bytes};
use futures_util::stream;
use prometheus_client::{encoding::text::encode, registry::Registry};
use tokio::sync::mpsc;

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

/// What is written is passed on in pieces of about so many bytes: a scrape of many routes has tens of megabytes, which are
/// on their way while the next piece is written, and of which a fast reader leaves few in memory.
const PIECE: usize = 128 * 1024;

/// Writes all metrics in a thread of its own, to which the kernel prefers the data path where processors are short.
/// `place` is kept until all is written, whether or not anybody still reads it. How fast they read makes no difference.
pub(crate) fn write_aside(
    registry: Arc<Registry>,
    format: Format,
    place: impl Send + 'static,
) -> io::Result<Body> {
    let (pieces, answer) = mpsc::unbounded_channel();
    let write = move || {
        // Of this thread alone, as Linux has it. Where it is refused, the scrape is only less polite.
        let _ = rustix::process::nice(NICE);
        let send = |piece| {
            // Whoever asked may have given up; then nobody has a use for the rest.
            pieces.send(Some(piece)).map_err(|_| fmt::Error)
        };
        if write(&registry, format, send).is_ok() {
            let _ = pieces.send(None);
        }
        drop(place);
    };
    thread::Builder::new().name("scrape".into()).spawn(write)?;
    Ok(Body::from_stream(stream::unfold(answer, async |mut answer| {
        let piece = match answer.recv().await {
            Some(Some(piece)) => Ok(piece),
            Some(None) => return None,
            // Without its end, what was written must not pass for the whole.
            None => Err(io::Error::other("the metrics could not be written")),
        };
        Some((piece, answer))
    })))
}

/// Writes all metrics, and has every piece taken by `send`.
fn write(
    registry: &Registry,
    format: Format,
    send: impl FnMut(Bytes) -> fmt::Result,
) -> fmt::Result {
    let mut pieces = Pieces { text: String::new(), format, help: Help::default(), send };
    encode(&mut pieces, registry)?;
    pieces.pass()
}

/// Takes what the library writes, and passes it on in whole lines.
struct Pieces<S> {
    text: String,
    format: Format,
    help: Help,
    send: S,
}

impl<S: FnMut(Bytes) -> fmt::Result> Pieces<S> {
    fn pass(&mut self) -> fmt::Result {
        let text = mem::take(&mut self.text);
        let piece = match self.format {
            Format::OpenMetrics => text,
            Format::Prometheus => prometheus(&text, &mut self.help)?,
        };
        // Whoever woke meanwhile need not wait for this thread's time slice to end.
        thread::yield_now();
        (self.send)(piece.into())
    }
}

impl<S: FnMut(Bytes) -> fmt::Result> Write for Pieces<S> {
    fn write_str(&mut self, written: &str) -> fmt::Result {
        if self.text.capacity() == 0 {
            self.text.reserve(PIECE + PIECE / 16);
        }
        self.text.push_str(written);
        if self.text.len() >= PIECE && written.ends_with('\n') { self.pass() } else { Ok(()) }
    }
}

/// The name and the words of the last family that was announced.
#[derive(Debug, Default)]
struct Help {
    name: String,
    text: String,
}

/// The same lines in Prometheus' own form: a counter's family is named with its `_total`, an info is a gauge, and there are
/// no units and no end.
fn prometheus(text: &str, help: &mut Help) -> Result<String, fmt::Error> {
    let mut out = String::with_capacity(text.len());
    // Comments are few: what is between them is passed on whole.
    let mut rest = text;
    while let Some(at) = comment(rest) {
        out.push_str(&rest[..at]);
        let (line, after) = rest[at..].split_once('\n').unwrap_or((&rest[at..], ""));
        rest = after;
        let mut words = line.splitn(4, ' ').skip(1);
        match (words.next(), words.next(), words.next()) {
            (Some("HELP"), Some(name), Some(text)) => {
                *help = Help { name: name.to_owned(), text: text.to_owned() };
            }
            (Some("TYPE"), Some(name), Some(kind)) => {
                let (suffix, kind) = match kind {
                    "counter" => ("_total", kind),
                    "info" => ("_info", "gauge"),
                    _ => ("", kind),
                };
                if help.name == name {
                    // The library ends a help with a full stop of its own.
                    writeln!(out, "# HELP {name}{suffix} {}", help.text)?;
                }
                writeln!(out, "# TYPE {name}{suffix} {kind}")?;
            }
            _ => {}
        }
    }
    out.push_str(rest);
    Ok(out)
}

/// Where the next line that is a comment begins.
fn comment(text: &str) -> Option<usize> {
    if text.starts_with("# ") { Some(0) } else { text.find("\n# ").map(|at| at + 1) }
}

#[cfg(test)]
mod tests {
    use prometheus_client::{
        collector::Collector,
        encoding::{DescriptorEncoder, NoLabelSet},
        metrics::MetricType,
    };

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

    const OPEN: &str = "# HELP a Seen.\n# TYPE a counter\na_total 1\n# HELP t_seconds Took.\n# TYPE t_seconds gauge\n\
        # UNIT t_seconds seconds\nt_seconds{of=\"# x\"} 0.5\n# HELP b Built.\n# TYPE b info\nb_info{v=\"1\"} 1\n# EOF\n";
    const PROMETHEUS: &str = "# HELP a_total Seen.\n# TYPE a_total counter\na_total 1\n# HELP t_seconds Took.\n\
        # TYPE t_seconds gauge\nt_seconds{of=\"# x\"} 0.5\n# HELP b_info Built.\n# TYPE b_info gauge\nb_info{v=\"1\"} 1\n";

    #[test]
    fn families_are_announced_as_prometheus_has_them() {
        assert_eq!(prometheus(OPEN, &mut Help::default()).unwrap(), PROMETHEUS);
    }

    #[test]
    fn nor_does_it_matter_where_a_piece_ends() {
        for (at, _) in OPEN.match_indices('\n') {
            let (first, second) = OPEN.split_at(at + 1);
            let mut help = Help::default();
            let both =
                prometheus(first, &mut help).unwrap() + &prometheus(second, &mut help).unwrap();
            assert_eq!(both, PROMETHEUS, "{first:?}");
        }
    }

    /// Many series, and then nothing more if it is to fail.
    #[derive(Debug)]
    struct Many {
        fails: bool,
    }

    impl Collector for Many {
        fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
            for n in 0..10_000_u64 {
                let name = format!("many_{n}");
                let mut counter =
                    encoder.encode_descriptor(&name, "Of many", None, MetricType::Counter)?;
                counter.encode_counter::<NoLabelSet, _, u64>(&n, None)?;
            }
            if self.fails { Err(fmt::Error) } else { Ok(()) }
        }
    }

    fn many(fails: bool) -> Registry {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Many { fails }));
        registry
    }

    #[test]
    fn the_pieces_are_the_whole() {
        let registry = many(false);
        let mut open = String::new();
        encode(&mut open, &registry).unwrap();
        let closed = prometheus(&open, &mut Help::default()).unwrap();
        for (format, whole) in [(Format::OpenMetrics, &open), (Format::Prometheus, &closed)] {
            let (mut pieces, mut together) = (0, Vec::new());
            let send = |piece: Bytes| {
                pieces += 1;
                together.extend_from_slice(&piece);
                Ok(())
            };
            write(&registry, format, send).unwrap();
            assert!(together == whole.as_bytes(), "{format:?}");
            assert!(pieces > 3, "{pieces} of {}", whole.len());
        }
    }

    #[tokio::test]
    async fn what_could_not_be_written_whole_has_no_end() {
        for fails in [false, true] {
            let body = write_aside(many(fails).into(), Format::Prometheus, ()).unwrap();
            let read = axum::body::to_bytes(body, usize::MAX).await;
            assert_eq!(read.is_err(), fails);
        }
    }
}
