//! Clients of raw connections.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::args::Args;
use super::stream::{read_sum, write_noise};

pub(crate) fn send(args: &Args) -> Result<()> {
    let mut connection = connect(args)?;
    thread::sleep(args.milliseconds("--delay-ms", 0)?);
    let sent = write_noise(
        &connection,
        args.number("--bytes", 0)?,
        args.number("--seed", 0)?,
        args.rate()?,
    )?;
    connection.shutdown(Shutdown::Write).context("end our direction")?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer).context("read the answer")?;
    println!("{}", json!({ "sent": sent.json(), "answer": answer }));
    Ok(())
}

pub(crate) fn recv(args: &Args) -> Result<()> {
    let received = read_sum(connect(args)?, u64::MAX, args.rate()?)?;
    println!("{}", json!({ "received": received.json() }));
    Ok(())
}

/// Opens many connections to an echo server, each after the previous one got its first half back. After a pause they send
/// the other half, and compare what they receive.
pub(crate) fn echoes(args: &Args) -> Result<()> {
    let (count, bytes): (usize, usize) = (args.number("-n", 1)?, args.number("--bytes", 20_000)?);
    // All connections send different bytes.
    let half = |n: usize, half: usize| -> Vec<u8> {
        (0..bytes / 2).map(|at| (n * 31 + half * 7 + at * at) as u8).collect()
    };
    let mut connections = Vec::new();
    for n in 0..count {
        let mut connection = connect(args)?;
        connection.write_all(&half(n, 0)).context("send the first half")?;
        let mut echoed = vec![0; bytes / 2];
        connection.read_exact(&mut echoed).context("read the first half")?;
        ensure!(echoed == half(n, 0), "the first half came back as another");
        connections.push(connection);
    }
    println!("{}", json!({ "connected": count }));
    thread::sleep(args.milliseconds("--delay-ms", 0)?);
    let (mut whole, mut failures) = (0, BTreeMap::new());
    for (n, mut connection) in connections.iter().enumerate() {
        let mut echoed = Vec::new();
        let talk = connection
            .write_all(&half(n, 1))
            .and_then(|()| connection.shutdown(Shutdown::Write))
            .and_then(|()| connection.read_to_end(&mut echoed));
        match talk {
            Ok(_) if echoed == half(n, 1) => whole += 1,
            Ok(_) => *failures.entry("another answer".to_owned()).or_insert(0) += 1,
            Err(error) => *failures.entry(reason(&error)).or_insert(0) += 1,
        }
    }
    println!("{}", json!({ "whole": whole, "failures": failures }));
    Ok(())
}

pub(crate) fn duplex(args: &Args) -> Result<()> {
    let mut connection = connect(args)?;
    let (bytes, seed, rate) = (args.number("--bytes", 0)?, args.number("--seed", 0)?, args.rate()?);
    let to = connection.try_clone()?;
    let writer = thread::spawn(move || write_noise(to, bytes, seed, 0));
    let received = read_sum(&connection, bytes, rate)?;
    let sent = writer.join().expect("the writer does not panic")?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer).context("read the other side's checksum")?;
    println!("{}", json!({ "sent": sent.json(), "received": received.json(), "answer": answer }));
    Ok(())
}

pub(crate) fn reset(args: &Args) -> Result<()> {
    let mut connection = connect(args)?;
    connection.set_write_timeout(Some(Duration::from_millis(500)))?;
    let bytes: usize = args.number("--bytes", 0)?;
    let mut sent = 0;
    while sent < bytes {
        match connection.write(&vec![0; (bytes - sent).min(64 * 1024)]) {
            Ok(count) => sent += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return Err(error).context("write"),
        }
    }
    rustix::net::sockopt::set_socket_linger(&connection, Some(Duration::ZERO))?;
    println!("{}", json!({ "sent": sent }));
    Ok(())
}

pub(crate) fn probe(args: &Args) -> Result<()> {
    let address = resolve(args.target()?)?;
    let timeout = args.milliseconds("--timeout-ms", 5_000)?;
    let wait = args.milliseconds("--wait-ms", 1_000)?;
    let start = Instant::now();
    let outcome = match TcpStream::connect_timeout(&address, timeout) {
        Ok(mut connection) => {
            connection.set_read_timeout(Some(wait))?;
            match connection.read(&mut [0; 1]) {
                Ok(0) => "closed".to_owned(),
                Ok(_) => "data".to_owned(),
                Err(error) if error.kind() == ErrorKind::WouldBlock => "open".to_owned(),
                Err(error) => reason(&error),
            }
        }
        Err(error) => reason(&error),
    };
    let ms = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    println!("{}", json!({ "outcome": outcome, "ms": ms }));
    Ok(())
}

/// The reason of an error, as one word if there is one.
pub(crate) fn reason(error: &std::io::Error) -> String {
    match error.kind() {
        ErrorKind::ConnectionRefused => "refused".to_owned(),
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => "reset".to_owned(),
        ErrorKind::TimedOut | ErrorKind::WouldBlock => "timeout".to_owned(),
        ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => "unreachable".to_owned(),
        ErrorKind::UnexpectedEof => "closed".to_owned(),
        _ => error.to_string(),
    }
}

pub(crate) fn resolve(target: &str) -> Result<SocketAddr> {
    let mut addresses = target.to_socket_addrs().with_context(|| format!("look up {target:?}"))?;
    addresses.next().with_context(|| format!("{target:?} has no address"))
}

fn connect(args: &Args) -> Result<TcpStream> {
    let target = args.target()?;
    let connection = TcpStream::connect_timeout(&resolve(target)?, Duration::from_secs(10));
    connection.with_context(|| format!("connect to {target}"))
}
