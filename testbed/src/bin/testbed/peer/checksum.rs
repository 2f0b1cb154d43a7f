//! SHA-256 of a stream, computed by the `sha256sum` program, which is fast even if this is a debug build.

use std::io::{self, Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};

use anyhow::{Context, Result};

#[derive(Debug)]
pub(crate) struct Checksum {
    program: Child,
    stdin: ChildStdin,
    bytes: u64,
}

impl Checksum {
    pub(crate) fn new() -> Result<Self> {
        let mut command = Command::new("sha256sum");
        let mut program = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start sha256sum")?;
        let stdin = program.stdin.take().context("sha256sum has a stdin")?;
        Ok(Self { program, stdin, bytes: 0 })
    }

    pub(crate) fn update(&mut self, data: &[u8]) -> io::Result<()> {
        self.bytes += data.len() as u64;
        self.stdin.write_all(data)
    }

    pub(crate) fn finish(mut self) -> Result<Sum> {
        drop(self.stdin);
        let mut line = String::new();
        if let Some(stdout) = &mut self.program.stdout {
            stdout.read_to_string(&mut line).context("read from sha256sum")?;
        }
        self.program.wait().context("wait for sha256sum")?;
        let hex = line.split_whitespace().next().context("sha256sum wrote nothing")?;
        Ok(Sum { bytes: self.bytes, sha256: hex.to_owned() })
    }
}

/// The number of bytes, and their checksum.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sum {
    pub(crate) bytes: u64,
    pub(crate) sha256: String,
}

impl Sum {
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::json!({ "bytes": self.bytes, "sha256": self.sha256 })
    }
}

impl std::fmt::Display for Sum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.bytes, self.sha256)
    }
}
