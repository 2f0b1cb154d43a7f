//! The PROXY protocol towards endpoints: an echo server shows what it was sent.

use anyhow::{Result, ensure};
use testbed::Host;

use crate::READY;

#[test]
fn the_endpoint_hears_who_dialled_before_anything_else() -> Result<()> {
    let host = Host::start()?;
    host.server("echo", ["echo", "--port", "7"]).label("SERVICE_7_NAME", "echo").start()?;
    let app = host
        .client("app")
        .env("BACKEND_V1", "echo;7001;proxy=v1")
        .env("BACKEND_V2", "echo;7002;proxy=v2")
        .env("BACKEND_NONE", "echo;7003")
        .start()?;
    let embassy = host.embassy(["--dnat", "-discovery=docker://"])?;
    embassy.wait_ready(READY)?;
    let echoed = |port: u16, to: &str| {
        app.exec(["sh", "-c", &format!("printf hello | nc -w 10 172.17.0.1 {port} {to}")])
    };

    let line = echoed(7001, "")?;
    let words: Vec<_> = line.split(' ').collect();
    let ip = app.ip()?.to_string();
    ensure!(words[..4] == ["PROXY", "TCP4", ip.as_str(), "172.17.0.1"], "{line:?}");
    ensure!(words[5] == "7001\r\nhello", "{line:?}");

    let hex = echoed(7002, "| od -An -v -tx1")?;
    let bytes: Vec<u8> = hex
        .split_whitespace()
        .map(|byte| u8::from_str_radix(byte, 16))
        .collect::<Result<_, _>>()?;
    ensure!(bytes.starts_with(b"\r\n\r\n\0\r\nQUIT\n\x21\x11"), "{hex}");
    let length = usize::from(u16::from_be_bytes([bytes[14], bytes[15]]));
    ensure!(bytes[16..20] == app.ip()?.octets(), "{hex}");
    ensure!(bytes[26..28] == 7002u16.to_be_bytes(), "{hex}");
    let mut values = b"\xE0\x00\x03app\xE1\x00\x40".to_vec();
    values.extend(app.id().as_bytes());
    values.extend(b"\xE2\x00\x04echo");
    ensure!(bytes[28..16 + length] == values, "{hex}");
    ensure!(bytes[16 + length..] == *b"hello", "{hex}");

    ensure!(echoed(7003, "")? == "hello");
    Ok(())
}
