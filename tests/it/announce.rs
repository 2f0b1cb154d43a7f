//! The PROXY protocol towards endpoints: an echo server shows what it received, HAProxy and nginx what they understood.

use std::{fs, process::Command};

use anyhow::{Context, Result, ensure};
use testbed::{Host, Process};

use crate::{
    READY,
    support::{ETCD, offer_at},
};

#[test]
fn the_endpoint_hears_who_dialled_before_anything_else() -> Result<()> {
    let host = Host::light()?;
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
        app.exec(["sh", "-c", &format!("printf hello | busybox nc -w 10 172.17.0.1 {port} {to}")])
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

#[test]
fn haproxy_and_nginx_understand_it() -> Result<()> {
    let host = Host::builder().ipv6(true).start()?;
    let receivers = [Receiver::haproxy(&host)?, Receiver::nginx(&host)?];
    let mut app = host.client("app");
    let mut bound = Vec::new();
    let mut port = 7000;
    for receiver in &receivers {
        // An endpoint of the other address family gets the consumer's address too.
        for address in ["172.17.0.1", "[fd00:d0c::1]"] {
            for version in ["v1", "v2"] {
                port += 1;
                let service = format!("{}-{port}", receiver.name);
                offer_at(&host, &service, &format!("{address}:{}", receiver.port))?;
                let descriptor = format!("/services/{service};{port};proxy={version}");
                app = app.env(&format!("BACKEND_{port}"), &descriptor);
                bound.push((receiver, port, service, version));
            }
        }
    }
    let app = app.start()?;
    let embassy = host.embassy(["--dnat", ETCD, "--endpoints=172.17.0.1,fd00:d0c::1"])?;
    embassy.wait_ready(READY)?;

    let (v4, v6) = (app.ip()?.to_string(), app.ip6()?.to_string());
    let mut from = 40_000;
    for (receiver, port, service, version) in bound {
        for (source, vip, url) in
            [(&v4, "172.17.0.1", "172.17.0.1"), (&v6, "fd00:d0c::1", "[fd00:d0c::1]")]
        {
            from += 1;
            let (local, url) = (from.to_string(), format!("http://{url}:{port}/"));
            let said = app.exec(["curl", "-sS", "-m", "10", "--local-port", &local, &url])?;
            let mut expected = format!("{source} {from} {vip} {port}");
            if receiver.tells_values {
                expected += &match version {
                    "v2" => format!("|app|{}|/services/{service}|", app.id()),
                    _ => "||||".to_owned(),
                };
            }
            ensure!(said.trim_end() == expected, "{service}: {said:?} is not {expected:?}");
        }
    }
    Ok(())
}

/// A web server that expects the header, and answers with what it understood.
struct Receiver {
    name: &'static str,
    port: u16,
    /// Whether its version can show the type-length-values too.
    tells_values: bool,
    /// It runs until this is dropped.
    _process: Process,
}

impl Receiver {
    fn haproxy(host: &Host) -> Result<Self> {
        let tells_values = version("haproxy")? >= [2, 9];
        let values = ["0xE0", "0xE1", "0xE2"].map(|kind| format!("%[fc_pp_tlv({kind})]|"));
        let values = if tells_values { format!("|{}", values.concat()) } else { String::new() };
        let config = format!(
            "defaults\n mode http\n timeout client 10s\n timeout server 10s\n timeout connect 10s\n\
             frontend web\n bind 0.0.0.0:7101 accept-proxy\n bind [::]:7101 v6only accept-proxy\n \
             http-request return status 200 content-type text/plain \
             lf-string \"%[src] %[src_port] %[dst] %[dst_port]{values}\"\n"
        );
        Self::start(host, "haproxy", 7101, tells_values, &config, &["-db", "-f"])
    }

    fn nginx(host: &Host) -> Result<Self> {
        let tells_values = version("nginx")? >= [1, 23];
        let values =
            ["0xE0", "0xE1", "0xE2"].map(|kind| format!("${{proxy_protocol_tlv_{kind}}}|"));
        let values = if tells_values { format!("|{}", values.concat()) } else { String::new() };
        let config = format!(
            "daemon off;\nmaster_process off;\nerror_log stderr;\npid /run/nginx.pid;\nevents {{ }}\n\
             http {{ access_log off; server {{ listen 7102 proxy_protocol; listen [::]:7102 proxy_protocol;\n\
             location / {{ return 200 \"$proxy_protocol_addr $proxy_protocol_port \
             $proxy_protocol_server_addr $proxy_protocol_server_port{values}\"; }} }} }}\n"
        );
        Self::start(host, "nginx", 7102, tells_values, &config, &["-c"])
    }

    fn start(
        host: &Host,
        name: &'static str,
        port: u16,
        tells_values: bool,
        config: &str,
        words: &[&str],
    ) -> Result<Self> {
        let file = host.dir().join(format!("{name}.conf"));
        fs::write(&file, config).with_context(|| format!("write {}", file.display()))?;
        let mut command = host.command(name);
        command.args(words).arg(&file);
        let process = host.spawn(name, command)?;
        testbed::eventually(READY, &format!("{name} to listen"), || {
            let listening = host.run("ss", ["-Htln", &format!("sport = :{port}")])?;
            ensure!(listening.lines().count() == 2, "{listening:?}, {}", process.log());
            Ok(())
        })?;
        Ok(Self { name, port, tells_values, _process: process })
    }
}

/// The first two numbers of a program's version.
fn version(program: &str) -> Result<[u32; 2]> {
    let output = Command::new(program).arg("-v").output().with_context(|| program.to_owned())?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    let numbers = said.split(|c: char| !c.is_ascii_digit()).filter(|part| !part.is_empty());
    let mut numbers = numbers.map(|number| number.parse().unwrap_or_default());
    let first = numbers.next().with_context(|| format!("no version in {said:?}"))?;
    Ok([first, numbers.next().unwrap_or_default()])
}
