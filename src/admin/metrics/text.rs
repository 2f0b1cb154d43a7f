//! The two formats of a scrape. The library writes OpenMetrics. A client that does not accept it gets the Prometheus text
//! format (prometheus.io/docs/instrumenting/exposition_formats), which differs in the header lines of families.

use std::{
    fmt::{self, Write},
    io, mem,
    sync::Arc,
    thread,
    time::Duration,
};

use axum::body::{Body, Bytes};
use futures_util::stream;
use prometheus_client::{encoding::text::encode, registry::Registry};
use tokio::{sync::mpsc, time::Instant};

use crate::text::visible_label;

/// The format of a scrape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    OpenMetrics,
    Prometheus,
}

impl Format {
    /// The format for a client with this Accept header.
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

/// The niceness of the thread that writes metrics, 0 to 19.
const NICE: i32 = 10;

/// Size of a piece of output, in bytes. A scrape of many routes has tens of megabytes: pieces are sent while the next one is
/// written, so that little of it is in memory if the client reads fast.
const PIECE: usize = 128 * 1024;

/// Maximum time for reading a scrape: until then all of it may be in memory.
const READ: Duration = Duration::from_secs(60);

/// Writes all metrics in a low-priority thread, so that the kernel prefers the data path if CPU time is short. Holds `place`
/// until everything is written, even if the client has gone, whatever the speed of the client. Holds `reader` until the
/// client has read everything, has gone, or its time is over.
pub(crate) fn write_aside(
    registry: Arc<Registry>,
    format: Format,
    place: impl Send + 'static,
    reader: impl Send + 'static,
) -> io::Result<Body> {
    let (pieces, answer) = mpsc::unbounded_channel();
    let write = move || {
        // On Linux this applies only to this thread. If the kernel refuses it, the scrape only has a higher priority.
        let _ = rustix::process::nice(NICE);
        let send = |piece| {
            // The client may have given up; then the rest is not needed.
            pieces.send(Some(piece)).map_err(|_| fmt::Error)
        };
        if write(&registry, format, send).is_ok() {
            let _ = pieces.send(None);
        }
        drop(place);
    };
    thread::Builder::new().name("scrape".into()).spawn(write)?;
    let reading = (answer, reader, Instant::now() + READ);
    Ok(Body::from_stream(stream::unfold(reading, async |(mut answer, reader, end)| {
        // An incomplete scrape must not look complete.
        let piece = match answer.recv().await {
            _ if Instant::now() > end => Err(io::ErrorKind::TimedOut.into()),
            Some(Some(piece)) => Ok(piece),
            Some(None) => return None,
            None => Err(io::Error::other("the metrics could not be written")),
        };
        Some((piece, (answer, reader, end)))
    })))
}

/// Writes all metrics, and passes each piece to `send`.
fn write(
    registry: &Registry,
    format: Format,
    send: impl FnMut(Bytes) -> fmt::Result,
) -> fmt::Result {
    let mut pieces = Pieces { text: String::new(), format, help: Help::default(), send };
    encode(&mut pieces, registry)?;
    pieces.pass()
}

/// Receives the library's output, and passes it on in whole lines.
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
        // Yield, so that other threads do not wait for the end of this thread's time slice.
        thread::yield_now();
        (self.send)(piece.into())
    }
}

impl<S: FnMut(Bytes) -> fmt::Result> Write for Pieces<S> {
    fn write_str(&mut self, written: &str) -> fmt::Result {
        if self.text.capacity() == 0 {
            self.text.reserve(PIECE + PIECE / 16);
        }
        // Names come from containers and registries.
        self.text.push_str(&visible_label(written));
        if self.text.len() >= PIECE && written.ends_with('\n') { self.pass() } else { Ok(()) }
    }
}

/// The name and the help text of the last family.
#[derive(Debug, Default)]
struct Help {
    name: String,
    text: String,
}

/// The same lines in the Prometheus text format: a counter's family name ends in `_total`, an info is a gauge, and there are
/// no units and no end marker.
fn prometheus(text: &str, help: &mut Help) -> Result<String, fmt::Error> {
    let mut out = String::with_capacity(text.len());
    // Comment lines are few: the lines between them are copied as one piece.
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
                    // The library adds a full stop to a help text.
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

/// The position of the next comment line.
fn comment(text: &str) -> Option<usize> {
    if text.starts_with("# ") { Some(0) } else { text.find("\n# ").map(|at| at + 1) }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;
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
            let body = write_aside(many(fails).into(), Format::Prometheus, (), ()).unwrap();
            let read = axum::body::to_bytes(body, usize::MAX).await;
            assert_eq!(read.is_err(), fails);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_reads_too_slowly_gets_no_more_and_frees_its_place() {
        let (reader, place) = tokio::sync::oneshot::channel::<()>();
        let body = write_aside(many(false).into(), Format::Prometheus, (), reader).unwrap();
        let mut pieces = body.into_data_stream();
        assert!(pieces.next().await.unwrap().is_ok());
        tokio::time::advance(READ * 2).await;
        assert!(pieces.next().await.unwrap().is_err());
        drop(pieces);
        assert!(place.await.is_err(), "its place is free");
    }
}
