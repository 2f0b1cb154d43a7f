//! Whatever is sent to the admin API, it lives, and gives nothing away to a browser's other pages.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use testbed::{Embassy, Host};

use crate::{READY, WAIT, support::ETCD};

/// What is asked in earnest, to start from.
const REQUESTS: [&str; 6] = [
    "GET /metrics HTTP/1.1\r\nConnection: close\r\nHost: localhost\r\n\r\n",
    "GET /readyz HTTP/1.1\r\nConnection: close\r\nHost: 127.0.0.1:9990\r\nAccept: */*\r\n\r\n",
    "GET /v1/explain?from=172.17.0.2&port=80 HTTP/1.1\r\nConnection: close\r\nHost: localhost:9990\r\n\r\n",
    "GET /v1/routes?consumer=app&limit=10&after=%2Fx HTTP/1.1\r\nConnection: close\r\nHost: [::1]:9990\r\nOrigin: http://localhost\r\n\r\n",
    "POST /v1/log HTTP/1.1\r\nConnection: close\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 11\r\n\r\n{\"level\":9}",
    "GET / HTTP/1.1\r\nConnection: close\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
];

/// How long mutations of them are sent.
const TIME: Duration = Duration::from_secs(5);

fn start(host: &Host) -> Result<(Embassy, PathBuf)> {
    let path = host.dir().join("admin.sock");
    let embassy = host.embassy(["--dnat", ETCD, &format!("--admin=unix://{}", path.display())])?;
    testbed::eventually(READY, "the admin API", || {
        let answer = ask(&path, REQUESTS[1].as_bytes())?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        Ok(())
    })?;
    Ok((embassy, path))
}

#[test]
fn no_bytes_end_it() -> Result<()> {
    let host = Host::start()?;
    let (embassy, path) = start(&host)?;
    let (start, mut sent) = (Instant::now(), 0);
    while start.elapsed() < TIME {
        let number = fastrand::u64(..);
        let request = mutated(number);
        let answer = ask(&path, &request)
            .with_context(|| format!("mutation {number}: {}", request.escape_ascii()))?;
        // A server's error is a fault of ours, whatever was sent.
        let wrong = answer.starts_with("HTTP/1.1 5") && !answer.starts_with("HTTP/1.1 503");
        ensure!(!wrong, "mutation {number}: {}: {answer}", request.escape_ascii());
        sent += 1;
    }
    ensure!(sent > 10, "{sent} requests");
    ensure!(embassy.exited()?.is_none());
    ensure!(!embassy.log().contains("panicked"), "{}", embassy.log());
    let answer = ask(&path, REQUESTS[0].as_bytes())?;
    ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    Ok(())
}

#[test]
fn what_is_too_large_is_refused() -> Result<()> {
    let host = Host::start()?;
    let (embassy, path) = start(&host)?;
    let before = resident(&embassy)?;
    let large = "x".repeat(8 << 20);
    let head = "HTTP/1.1\r\nConnection: close\r\nHost: localhost\r\n";
    for request in [
        format!("GET /{large} {head}\r\n"),
        format!("GET /metrics {head}X-Large: {large}\r\n\r\n"),
        format!("GET /metrics {head}{}\r\n", "X-Many: x\r\n".repeat(100_000)),
        format!("POST /metrics {head}Content-Length: {}\r\n\r\n{large}", large.len()),
    ] {
        let answer = ask(&path, request.as_bytes()).unwrap_or_default();
        let shown = &answer[..answer.len().min(60)];
        ensure!(!answer.starts_with("HTTP/1.1 2"), "{}: {shown}", &request[..20]);
    }
    // Of what was sent, 32 MiB, nothing is kept.
    let grown = resident(&embassy)?.saturating_sub(before);
    ensure!(grown < 16 * 1024, "{grown} KiB more than before");
    ensure!(ask(&path, REQUESTS[1].as_bytes())?.starts_with("HTTP/1.1 200"));
    Ok(())
}

#[test]
fn a_page_of_elsewhere_may_not_read_it() -> Result<()> {
    let host = Host::start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    let curl = |more: &[&str]| {
        let args = ["--silent", "--include", "--max-time", "10"];
        host.run("curl", [&args[..], more].concat()).map(|answer| answer.to_lowercase())
    };
    let url = "http://127.0.0.1:9990/metrics";
    // Without this header a browser lets no page of another origin read the answer, nor send more than a simple request.
    for method in ["GET", "OPTIONS", "POST", "PUT", "DELETE"] {
        let asks = ["-H", "Origin: http://evil.example", "-X", method, url];
        let answer = curl(&[&asks[..], &["-H", "Access-Control-Request-Method: PUT"]].concat())?;
        ensure!(!answer.contains("access-control-allow"), "{method}: {answer}");
        ensure!(method == "GET" || !answer.starts_with("http/1.1 2"), "{method}: {answer}");
    }
    // A name that its owner makes lead here would make that page one of ours: only our own names are answered.
    let answer = curl(&["-H", "Host: evil.example", "http://127.0.0.1:9990/v1/status"])?;
    ensure!(!answer.starts_with("http/1.1 2"), "{answer}");
    ensure!(embassy.exited()?.is_none());
    Ok(())
}

/// A request with a few changes; the same for the same number.
fn mutated(number: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(number);
    let mut request = random.choice(REQUESTS).unwrap_or_default().as_bytes().to_vec();
    for _ in 0..random.usize(1..6) {
        let at = random.usize(..=request.len());
        let end = random.usize(at..=request.len().min(at + 8));
        let piece = random.choice(REQUESTS).unwrap_or_default().as_bytes();
        let from = random.usize(..piece.len());
        let piece = &piece[from..random.usize(from..=piece.len().min(from + 16))];
        match random.u8(..3) {
            0 => drop(request.splice(at..end, [random.u8(..)])),
            1 => drop(request.splice(at..end, piece.iter().copied())),
            _ => drop(request.drain(at..end)),
        }
    }
    request
}

/// What comes back until the connection ends, or for a moment; it may be nothing.
fn ask(path: &Path, request: &[u8]) -> Result<String> {
    let mut connection = UnixStream::connect(path)?;
    connection.set_read_timeout(Some(Duration::from_millis(300)))?;
    connection.set_write_timeout(Some(WAIT))?;
    // It may hang up before it has read everything.
    let _ = connection.write_all(request);
    let mut answer = Vec::new();
    // The end, a reset, or silence.
    let _ = connection.read_to_end(&mut answer);
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// KiB.
fn resident(embassy: &Embassy) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", embassy.pid()))?;
    let value = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    Ok(value.trim().trim_end_matches(" kB").parse()?)
}
