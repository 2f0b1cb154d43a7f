//! Whatever is sent to the admin API, it stays alive, and reveals nothing to other pages in a browser.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use testbed::{Container, Embassy, Host};

use crate::{
    READY, WAIT,
    support::{ETCD, reaches, web},
};

/// Valid requests, from which mutations are made.
const REQUESTS: [&str; 12] = [
    "GET /metrics HTTP/1.1\r\nConnection: close\r\nHost: localhost\r\n\r\n",
    "GET /readyz HTTP/1.1\r\nConnection: close\r\nHost: 127.0.0.1:9990\r\nAccept: */*\r\n\r\n",
    "GET /v1/explain?consumer=app&port=80 HTTP/1.1\r\nConnection: close\r\nHost: localhost:9990\r\n\r\n",
    "GET /v1/routes?consumer=app&limit=10&offset=1&q=web HTTP/1.1\r\nConnection: close\r\nHost: [::1]:9990\r\nOrigin: http://localhost\r\n\r\n",
    "GET /v1/endpoints?service=%2Fservices%2Fweb&state=active HTTP/1.1\r\nConnection: close\r\nHost: localhost\r\n\r\n",
    "GET /v1/connections?consumer=app&limit=1 HTTP/1.1\r\nConnection: close\r\nHost: localhost\r\n\r\n",
    "GET /v1/events HTTP/1.1\r\nConnection: close\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n",
    "PUT /v1/log-level HTTP/1.1\r\nConnection: close\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 16\r\n\r\n{\"level\":\"info\"}",
    "PUT /v1/endpoints/drain HTTP/1.1\r\nConnection: close\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 69\r\n\r\n{\"service\":\"/services/web\",\"endpoint\":\"172.17.0.2:80\",\"drained\":true}",
    "POST /v1/resync HTTP/1.1\r\nConnection: close\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n",
    "GET /v1/status HTTP/1.1\r\nConnection: close\r\nHost: localhost\r\n\r\n",
    "GET / HTTP/1.1\r\nConnection: close\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
];

/// How long mutations are sent: `FUZZ_SECONDS`, 5 s by default.
fn time() -> Result<Duration> {
    let wanted = std::env::var("FUZZ_SECONDS").ok();
    let seconds = wanted.map_or(Ok(5), |text| text.parse().context("FUZZ_SECONDS takes a number"));
    seconds.map(Duration::from_secs)
}

fn start(host: &Host) -> Result<(Embassy, PathBuf)> {
    let path = host.dir().join("admin.sock");
    host.etcd()?;
    let embassy = host.embassy(["--dnat", ETCD, &format!("--admin=unix://{}", path.display())])?;
    testbed::eventually(READY, "the admin API", || {
        let answer = ask(&path, REQUESTS[1].as_bytes())?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        Ok(())
    })?;
    Ok((embassy, path))
}

/// An endpoint, at the address that the requests drain, and its consumer.
fn web_and_app(host: &Host) -> Result<Container> {
    let web = web(host, "web")?;
    ensure!(web.ip()?.octets() == [172, 17, 0, 2], "the first container has the first address");
    host.client("app").env("BACKEND_WEB", "/services/web;80").start()
}

#[test]
fn no_bytes_end_it() -> Result<()> {
    let host = Host::light()?;
    let app = web_and_app(&host)?;
    let (embassy, path) = start(&host)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    // All of these requests succeed: mutations of a request that fails would test little.
    for request in REQUESTS {
        let answer = ask(&path, request.as_bytes())?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "{request}: {answer}");
    }
    let (time, start) = (time()?, Instant::now());
    // Most of the time is spent waiting for answers that do not come.
    let send = || -> Result<usize> {
        let mut sent = 0;
        while start.elapsed() < time {
            let number = fastrand::u64(..);
            let request = mutated(number);
            let answer = ask(&path, &request)
                .with_context(|| format!("mutation {number}: {}", request.escape_ascii()))?;
            // A server error is a bug of ours, whatever was sent.
            let wrong = answer.starts_with("HTTP/1.1 5") && !answer.starts_with("HTTP/1.1 503");
            ensure!(!wrong, "mutation {number}: {}: {answer}", request.escape_ascii());
            sent += 1;
        }
        Ok(sent)
    };
    let sent = std::thread::scope(|scope| -> Result<usize> {
        let senders: Vec<_> = (0..16).map(|_| scope.spawn(send)).collect();
        senders.into_iter().map(|sender| sender.join().expect("it does not panic")).sum()
    })?;
    println!("{sent} mutated requests in {time:?}");
    ensure!(sent > 10, "{sent} requests");
    ensure!(embassy.exited()?.is_none());
    ensure!(!embassy.log().contains("panicked"), "{}", embassy.log());
    let answer = ask(&path, REQUESTS[0].as_bytes())?;
    ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    Ok(())
}

#[test]
fn what_is_too_large_is_refused() -> Result<()> {
    let host = Host::light()?;
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
    // Nothing is kept of the 32 MiB that were sent.
    let grown = resident(&embassy)?.saturating_sub(before);
    ensure!(grown < 16 * 1024, "{grown} KiB more than before");
    ensure!(ask(&path, REQUESTS[1].as_bytes())?.starts_with("HTTP/1.1 200"));
    Ok(())
}

#[test]
fn a_page_of_elsewhere_may_not_read_it() -> Result<()> {
    let host = Host::light()?;
    host.etcd()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    let curl = |more: &[&str]| {
        let args = ["--silent", "--include", "--max-time", "10"];
        host.run("curl", [&args[..], more].concat()).map(|answer| answer.to_lowercase())
    };
    let url = "http://127.0.0.1:9990/metrics";
    // Without this header, a browser neither lets a page of another origin read the answer, nor lets it send more than a
    // simple request.
    for method in ["GET", "OPTIONS", "POST", "PUT", "DELETE"] {
        let asks = ["-H", "Origin: http://evil.example", "-X", method, url];
        let answer = curl(&[&asks[..], &["-H", "Access-Control-Request-Method: PUT"]].concat())?;
        ensure!(!answer.contains("access-control-allow"), "{method}: {answer}");
        ensure!(method == "GET" || !answer.starts_with("http/1.1 2"), "{method}: {answer}");
    }
    // The owner of a name can let it resolve to this host, which would make the page one of ours. So only our own names are
    // answered.
    let answer = curl(&["-H", "Host: evil.example", "http://127.0.0.1:9990/v1/status"])?;
    ensure!(!answer.starts_with("http/1.1 2"), "{answer}");
    ensure!(embassy.exited()?.is_none());
    Ok(())
}

/// A request with a few changes. The same number gives the same changes.
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

/// What is received until the connection ends, or for a moment. It may be empty.
fn ask(path: &Path, request: &[u8]) -> Result<String> {
    let mut connection = UnixStream::connect(path)?;
    connection.set_read_timeout(Some(Duration::from_millis(300)))?;
    connection.set_write_timeout(Some(WAIT))?;
    // The server may close the connection before it has read everything.
    let _ = connection.write_all(request);
    let mut answer = Vec::new();
    // The end, a reset, or a timeout.
    let _ = connection.read_to_end(&mut answer);
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// Resident memory in KiB.
fn resident(embassy: &Embassy) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", embassy.pid()))?;
    let value = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    Ok(value.trim().trim_end_matches(" kB").parse()?)
}
