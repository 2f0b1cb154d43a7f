//! An HTTP client that counts results.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::json;

use super::args::Args;
use super::client::{reason, resolve};

pub(crate) fn run(args: &Args) -> Result<()> {
    let target = Target::parse(args.target()?)?;
    let times: usize = args.number("-n", 1)?;
    let at_once: usize = args.number("-c", 1)?;
    ensure!(at_once > 0, "-c takes a number from 1 on");
    let keep = args.has("--keep-alive");
    let timeout = args.milliseconds("--timeout-ms", 10_000)?;
    let slow = args.milliseconds("--slow-ms", 500)?;
    let pause = args.milliseconds("--pause-ms", 0)?;
    // Requests continue until this file exists, however many there are.
    let until = args.text("--until", "");
    let more = |taken: usize| match until {
        "" => taken < times,
        file => !Path::new(file).exists(),
    };

    let taken = AtomicUsize::new(0);
    let tally = Mutex::new(Tally::default());
    thread::scope(|scope| {
        let threads = if until.is_empty() { at_once.min(times) } else { at_once };
        for _ in 0..threads {
            scope.spawn(|| {
                let mut kept = None;
                while more(taken.fetch_add(1, Ordering::Relaxed)) {
                    let start = Instant::now();
                    let answer = target.get(&mut kept, keep, timeout);
                    let took = start.elapsed();
                    tally.lock().expect("nobody panics with the lock").count(answer, took, slow);
                    thread::sleep(pause);
                }
            });
        }
    });
    let tally = tally.into_inner().expect("nobody panics with the lock");
    let slowest = u64::try_from(tally.slowest.as_millis()).unwrap_or(u64::MAX);
    println!(
        "{}",
        json!({
            "answers": tally.answers, "failures": tally.failures, "slowest_ms": slowest, "slow": tally.slow,
        })
    );
    Ok(())
}

#[derive(Debug, Default)]
struct Tally {
    answers: BTreeMap<String, usize>,
    failures: BTreeMap<String, usize>,
    slowest: Duration,
    slow: usize,
}

impl Tally {
    fn count(&mut self, answer: Result<String, String>, took: Duration, slow: Duration) {
        let (counts, key) = match answer {
            Ok(body) => (&mut self.answers, body),
            Err(reason) => (&mut self.failures, reason),
        };
        *counts.entry(key).or_default() += 1;
        self.slowest = self.slowest.max(took);
        self.slow += usize::from(took > slow);
    }
}

#[derive(Debug)]
struct Target {
    address: SocketAddr,
    host: String,
    path: String,
}

/// Bodies longer than this are named by their size.
const LONGEST_NAME: usize = 200;

impl Target {
    fn parse(url: &str) -> Result<Self> {
        let rest = url.strip_prefix("http://").unwrap_or(url);
        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
        // The last colon precedes a port, unless it is within the brackets of an IPv6 address.
        let has_port = host.rsplit_once(':').is_some_and(|(_, port)| !port.contains(']'));
        let address = if has_port { resolve(host)? } else { resolve(&format!("{host}:80"))? };
        Ok(Self { address, host: host.to_owned(), path: format!("/{path}") })
    }

    fn get(
        &self,
        kept: &mut Option<BufReader<TcpStream>>,
        keep: bool,
        timeout: Duration,
    ) -> Result<String, String> {
        let mut reader = match kept.take() {
            Some(reader) => reader,
            None => BufReader::new(
                self.connect(timeout).map_err(|error| format!("connect: {}", reason(&error)))?,
            ),
        };
        let connection = if keep { "keep-alive" } else { "close" };
        let request = format!(
            "GET {} HTTP/1.1\r\nHost: {}\r\nConnection: {connection}\r\n\r\n",
            self.path, self.host
        );
        reader
            .get_mut()
            .write_all(request.as_bytes())
            .map_err(|error| format!("write: {}", reason(&error)))?;
        let (status, body) =
            answer(&mut reader).map_err(|error| format!("read: {}", reason(&error)))?;
        if keep {
            *kept = Some(reader);
        }
        match status.as_str() {
            "200" if body.len() > LONGEST_NAME => Ok(format!("{} bytes", body.len())),
            "200" => Ok(String::from_utf8_lossy(&body).into_owned()),
            _ => Err(format!("status {status}")),
        }
    }

    fn connect(&self, timeout: Duration) -> io::Result<TcpStream> {
        let connection = TcpStream::connect_timeout(&self.address, timeout)?;
        connection.set_nodelay(true)?;
        connection.set_read_timeout(Some(timeout))?;
        connection.set_write_timeout(Some(timeout))?;
        Ok(connection)
    }
}

/// Reads status and body. A connection that ends early is an `UnexpectedEof`.
fn answer(reader: &mut impl BufRead) -> io::Result<(String, Vec<u8>)> {
    let first = line(reader)?;
    let status = first.split_whitespace().nth(1).unwrap_or_default().to_owned();
    let mut length = None;
    loop {
        let line = line(reader)?.to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse::<u64>().ok();
        }
    }
    let length = length.ok_or_else(|| io::Error::other("no Content-Length"))?;
    let mut body = Vec::new();
    reader.take(length).read_to_end(&mut body)?;
    if (body.len() as u64) < length {
        Err(io::ErrorKind::UnexpectedEof.into())
    } else {
        Ok((status, body))
    }
}

fn line(reader: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(line.trim_end().to_owned())
}
