//! The endpoint: answers messages, all on one thread so that it costs little compared with what is measured, or sends
//! endlessly.

use std::{io::Write, net::Ipv4Addr};

use anyhow::{Context, Result};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// The port on which endpoints listen.
pub(crate) const PORT: u16 = 7000;

/// The size of every message and every answer in bytes.
pub(crate) const MESSAGE: usize = 64;

/// The first byte of a message selects the answer. This one: one answer.
pub(crate) const ANSWER: u8 = b'a';
/// One answer, and the end of the connection.
pub(crate) const ANSWER_AND_CLOSE: u8 = b'c';
/// Bytes until the client has gone.
pub(crate) const BULK: u8 = b'b';

/// Serves forever.
pub(crate) fn run() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).await;
        let listener = listener.with_context(|| format!("listen on port {PORT}"))?;
        loop {
            // The error is of one connection: it was reset while it waited.
            if let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream));
            }
        }
    })
}

/// Serves a connection until the client ends or resets it.
async fn serve(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut message = [0; MESSAGE];
    loop {
        stream.read_exact(&mut message).await?;
        match message[0] {
            // On a separate thread: what is measured beside it must not wait for its turn here.
            BULK => return tokio::task::spawn_blocking(|| flood(stream)).await?,
            ANSWER_AND_CLOSE => return stream.write_all(&message).await,
            _ => stream.write_all(&message).await?,
        }
    }
}

/// Sends until the client has gone.
fn flood(stream: TcpStream) -> std::io::Result<()> {
    let mut stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    let bytes = vec![0; 256 * 1024];
    loop {
        stream.write_all(&bytes)?;
    }
}
