//! `testbed peer`: the servers and clients that run in containers. They use plain threads, one per connection.

mod args;
mod checksum;
mod client;
mod get;
mod hold;
mod server;
mod stream;

use anyhow::{Result, bail};
use args::Args;

const USAGE: &str = "\
servers, on --port P (default 80), with up to --most N connections at a time (default: any number):
  http --name X              answers X, and N bytes to /bytes/N; HTTP/1.1 with keep-alive, or `Connection: close`
  echo                       sends back what it reads
  greet [--name X]           speaks first: `hello from X`, a line; then as echo
  sink [--rate R] [--delay-ms D]
                             reads to the end, waits D, answers `<bytes> <sha256>`, a line
  source --bytes N [--seed S] [--rate R]
                             sends N bytes, ends its direction, reads to the end
  first-to-close             says `bye`, a line, ends its direction, and prints `<bytes> <sha256>` of all it still reads
  duplex --bytes N [--seed S] [--rate R]
                             reads N bytes while it sends N, then sends the sha256 of what it read
  reset [--after N]          reads N bytes (default 0), then resets
  hang                       accepts, and never reads nor writes
  answer --text T [--rate R] reads up to an empty line, sends T (`\\r`, `\\n` as in C), closes; prints a line for each
  idle                       no server: waits for ever
clients, each prints one JSON object:
  get URL|HOST:PORT [-n N | --until FILE] [-c CONCURRENCY] [--keep-alive] [--timeout-ms T] [--pause-ms P] [--slow-ms S]
                             answers by body, failures by reason, the slowest, and how many took longer than S (500);
                             with --until as many as there is time for until FILE exists, with a pause after each
  send HOST:PORT --bytes N [--seed S] [--rate R] [--delay-ms D]
                             waits D, sends, ends its direction, reads the answer to the end
  recv HOST:PORT [--rate R]  reads to the end
  echoes HOST:PORT [-n N] [--bytes B] [--delay-ms D]  N connections to an echo: half of B bytes, a pause, the rest
  duplex HOST:PORT --bytes N [--seed S] [--rate R]
                             the other side of the server of that name; --rate slows the reading
  reset HOST:PORT [--bytes N]
                             sends N bytes (default 0), or fewer if nothing more is taken for half a second; then resets
  hold HOST:PORT [-n N] [-c CONCURRENCY] [--timeout-ms T] [--fill B]
                             opens N connections, reads a line from each and holds them; a further line for each
                             connection that ends; with --fill it sends B bytes on each, and reads nothing more
  probe HOST:PORT [--timeout-ms T] [--wait-ms W]
                             refused, unreachable, timeout; or reset, closed, data, open within W (default 1000)
rates are bytes per second; seeds are numbers, and a seed names one endless sequence of bytes
";

/// Runs a role. A server never returns.
pub(crate) fn run(words: &[&str]) -> Result<()> {
    let Some((&role, rest)) = words.split_first() else {
        print!("{USAGE}");
        return Ok(());
    };
    let args = Args::parse(rest)?;
    match role {
        "get" => get::run(&args),
        "send" => client::send(&args),
        "recv" => client::recv(&args),
        "echoes" => client::echoes(&args),
        "probe" => client::probe(&args),
        "hold" => hold::hold(&args),
        "reset" if args.target().is_ok() => client::reset(&args),
        "duplex" if args.target().is_ok() => client::duplex(&args),
        "idle" => loop {
            std::thread::park();
        },
        _ => match server::Server::parse(role, &args)? {
            Some(server) => {
                server.run(args.number("--port", 80)?, args.number("--most", usize::MAX)?)
            }
            None => bail!("no such peer: {role:?}\n{USAGE}"),
        },
    }
}
