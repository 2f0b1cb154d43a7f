//! The servers.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::args::Args;
use super::stream::{read_sum, write_noise};

/// What the server does with a connection.
#[derive(Debug, Clone)]
pub(crate) enum Server {
    Http { name: String },
    Echo { greeting: String },
    Sink { rate: u64, delay: Duration },
    Source { bytes: u64, seed: u64, rate: u64 },
    FirstToClose,
    Duplex { bytes: u64, seed: u64, rate: u64 },
    Reset { after: u64 },
    Hang,
    Answer { text: String, rate: u64 },
}

/// Stack size of a connection's thread. Thousands of connections may idle at the same time.
const STACK: usize = 256 * 1024;

impl Server {
    pub(crate) fn parse(role: &str, args: &Args) -> Result<Option<Self>> {
        let bytes = args.number("--bytes", 0)?;
        let seed = args.number("--seed", 0)?;
        let rate = args.rate()?;
        Ok(Some(match role {
            "http" => Self::Http { name: args.text("--name", "http").to_owned() },
            "echo" => Self::Echo { greeting: String::new() },
            "greet" => {
                Self::Echo { greeting: format!("hello from {}\n", args.text("--name", "greet")) }
            }
            "sink" => Self::Sink { rate, delay: args.milliseconds("--delay-ms", 0)? },
            "source" => Self::Source { bytes, seed, rate },
            "first-to-close" => Self::FirstToClose,
            "duplex" => Self::Duplex { bytes, seed, rate },
            "reset" => Self::Reset { after: args.number("--after", 0)? },
            "hang" => Self::Hang,
            "answer" => Self::Answer {
                text: args.text("--text", "").replace("\\r", "\r").replace("\\n", "\n"),
                rate,
            },
            _ => return Ok(None),
        }))
    }

    /// Serves up to `most` connections at a time. The kernel queues as few further ones as possible.
    pub(crate) fn run(&self, port: u16, most: usize) -> Result<()> {
        // An IPv6 listener accepts IPv4 too. If a container has no IPv6, this may be refused.
        let listener =
            TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)));
        let listener = listener.with_context(|| format!("listen on port {port}"))?;
        if most < usize::MAX {
            rustix::net::listen(&listener, 1).context("keep few connections waiting")?;
        }
        let serving = Arc::new(AtomicUsize::new(0));
        loop {
            while serving.load(Relaxed) >= most {
                thread::sleep(Duration::from_millis(5));
            }
            let (connection, from) = match listener.accept() {
                Ok(accepted) => accepted,
                Err(error) => {
                    eprintln!("accept: {error}");
                    thread::sleep(Duration::from_millis(100));
                    continue;
                }
            };
            let (server, served) = (self.clone(), serving.clone());
            serving.fetch_add(1, Relaxed);
            let serve = move || {
                if let Err(error) = server.serve(connection) {
                    eprintln!("{from}: {error:#}");
                }
                served.fetch_sub(1, Relaxed);
            };
            if let Err(error) = thread::Builder::new().stack_size(STACK).spawn(serve) {
                eprintln!("{from}: start a thread: {error}");
            }
        }
    }

    fn serve(&self, mut connection: TcpStream) -> Result<()> {
        connection.set_nodelay(true)?;
        match *self {
            Self::Http { ref name } => http(connection, name),
            Self::Echo { ref greeting } => {
                connection.write_all(greeting.as_bytes())?;
                std::io::copy(&mut connection.try_clone()?, &mut connection)?;
                Ok(connection.shutdown(Shutdown::Write)?)
            }
            Self::Sink { rate, delay } => {
                let sum = read_sum(&connection, u64::MAX, rate)?;
                thread::sleep(delay);
                Ok(writeln!(connection, "{sum}")?)
            }
            Self::Source { bytes, seed, rate } => {
                write_noise(&connection, bytes, seed, rate)?;
                connection.shutdown(Shutdown::Write)?;
                read_sum(&connection, u64::MAX, 0).map(drop)
            }
            Self::FirstToClose => {
                connection.write_all(b"bye\n")?;
                connection.shutdown(Shutdown::Write)?;
                println!("{}", read_sum(&connection, u64::MAX, 0)?);
                Ok(())
            }
            Self::Duplex { bytes, seed, rate } => {
                let from = connection.try_clone()?;
                let reader = thread::spawn(move || read_sum(from, bytes, rate));
                write_noise(&connection, bytes, seed, 0)?;
                let read = reader.join().expect("the reader does not panic")?;
                Ok(writeln!(connection, "{read}")?)
            }
            Self::Reset { after } => {
                read_sum(&connection, after, 0)?;
                Ok(rustix::net::sockopt::set_socket_linger(&connection, Some(Duration::ZERO))?)
            }
            Self::Hang => loop {
                thread::park();
            },
            Self::Answer { ref text, rate } => {
                let reader = BufReader::new(connection.try_clone()?);
                reader.lines().find(|line| line.as_ref().map_or(true, String::is_empty));
                println!("asked");
                for byte in text.as_bytes().chunks(if rate == 0 { text.len().max(1) } else { 1 }) {
                    connection.write_all(byte)?;
                    thread::sleep(
                        Duration::from_secs(1) / u32::try_from(rate).unwrap_or(1).max(1)
                            * u32::from(rate > 0),
                    );
                }
                Ok(())
            }
        }
    }
}

fn http(connection: TcpStream, name: &str) -> Result<()> {
    let mut reader = BufReader::new(connection.try_clone()?);
    let mut writer = connection;
    loop {
        let Some((path, keep)) = request(&mut reader)? else { return Ok(()) };
        let body = match path.strip_prefix("/bytes/") {
            Some(count) => vec![b'x'; count.parse().with_context(|| format!("path {path:?}"))?],
            None => name.as_bytes().to_vec(),
        };
        let connection = if keep { "keep-alive" } else { "close" };
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: {connection}\r\n\r\n",
            body.len()
        );
        writer.write_all(&[head.as_bytes(), &body].concat())?;
        if !keep {
            return Ok(());
        }
    }
}

/// The path, and whether the connection is to be kept. `None` at the end of the connection.
fn request(reader: &mut impl BufRead) -> Result<Option<(String, bool)>> {
    let mut line = String::new();
    // A head of more than 64 KiB is cut off, and then does not parse.
    let mut head = reader.by_ref().take(64 * 1024);
    if head.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let words: Vec<_> = line.split_whitespace().collect();
    ensure!(words.len() == 3 && words[2].starts_with("HTTP/1."), "no HTTP request: {line:?}");
    let path = words[1].to_owned();
    let mut keep = words[2] == "HTTP/1.1";
    let mut length = 0;
    loop {
        let mut line = String::new();
        ensure!(head.read_line(&mut line)? > 0, "the connection ended within a head");
        let line = line.trim_end().to_ascii_lowercase();
        match line.split_once(':') {
            None if line.is_empty() => break,
            Some(("connection", value)) => {
                keep = value.trim() != "close" && (keep || value.trim() == "keep-alive")
            }
            Some(("content-length", value)) => {
                length = value.trim().parse().context("Content-Length")?
            }
            _ => {}
        }
    }
    std::io::copy(&mut reader.take(length), &mut std::io::sink())?;
    Ok(Some((path, keep)))
}
