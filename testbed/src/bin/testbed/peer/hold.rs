//! A client that holds many connections.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use super::args::Args;
use super::client::{reason, resolve};

/// Stack size of a connection's thread, which does very little.
const STACK: usize = 64 * 1024;

/// Opens connections, several in parallel, each after the previous one was greeted. Prints a summary of the greetings, and
/// then when and how each connection ends.
pub(crate) fn hold(args: &Args) -> Result<()> {
    let address = resolve(args.target()?)?;
    let count: usize = args.number("-n", 1)?;
    let at_once: usize = args.number("-c", 1)?;
    let timeout = args.milliseconds("--timeout-ms", 10_000)?;
    let fill: usize = args.number("--fill", 0)?;

    let greet = || {
        let connection = TcpStream::connect_timeout(&address, timeout)?;
        connection.set_read_timeout(Some(timeout))?;
        let mut reader = BufReader::new(connection);
        let mut greeting = String::new();
        match reader.read_line(&mut greeting)? {
            0 => Err(std::io::ErrorKind::UnexpectedEof.into()),
            _ => {
                send(reader.get_ref(), fill)?;
                Ok((reader, greeting.trim_end().to_owned()))
            }
        }
    };
    let (mut held, mut greetings, mut failures) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
    let next = AtomicUsize::new(0);
    let some = || {
        let own = std::iter::from_fn(|| (next.fetch_add(1, Relaxed) < count).then(greet));
        own.collect::<Vec<_>>()
    };
    let all = thread::scope(|scope| {
        let threads: Vec<_> = (0..at_once).map(|_| scope.spawn(some)).collect();
        let parts = threads.into_iter().map(|t| t.join().expect("a client does not panic"));
        parts.flatten().collect::<Vec<_>>()
    });
    for greeted in all {
        match greeted {
            Ok(connection) => {
                *greetings.entry(connection.1.clone()).or_insert(0) += 1;
                held.push(connection);
            }
            Err(error) => *failures.entry(reason(&error)).or_insert(0) += 1,
        }
    }
    println!("{}", json!({ "greetings": greetings, "failures": failures }));
    if fill > 0 {
        // Sent bytes stay in flight only as long as the answers are not read.
        loop {
            thread::park();
        }
    }

    let mut watchers = Vec::new();
    for (reader, greeting) in held {
        let watch = move || {
            let end = end_of(reader).unwrap_or_else(|error| reason(&error));
            println!("{}", json!({ "ended": end, "greeting": greeting }));
        };
        let watcher = thread::Builder::new().stack_size(STACK).spawn(watch);
        watchers.push(watcher.context("start a thread")?);
    }
    for watcher in watchers {
        watcher.join().expect("a watcher does not panic");
    }
    Ok(())
}

/// Sends this many bytes, or as many as are accepted immediately.
fn send(mut connection: &TcpStream, count: usize) -> std::io::Result<()> {
    connection.set_nonblocking(true)?;
    let bytes = [0; 16 * 1024];
    let mut left = count;
    while left > 0 {
        match connection.write(&bytes[..left.min(bytes.len())]) {
            Ok(sent) => left -= sent,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    connection.set_nonblocking(false)
}

/// Reads to the end of a connection, without a timeout.
fn end_of(mut reader: BufReader<TcpStream>) -> std::io::Result<String> {
    reader.get_ref().set_read_timeout(None::<Duration>)?;
    std::io::copy(&mut reader.by_ref(), &mut std::io::sink())?;
    Ok("closed".to_owned())
}
