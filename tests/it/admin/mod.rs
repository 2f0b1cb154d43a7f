//! What the admin API says, and to whom.

use std::{
    io::Write,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use embassy::admin::api;
use serde::de::DeserializeOwned;
use testbed::{Container, Embassy, Host, Process};

use crate::{
    READY, WAIT,
    support::{ETCD, offer_at, reaches, says, web},
};

mod bounds;
mod browser;
mod changing;
mod dashboard;
mod described;
mod scrapes;
mod told;
mod views;

/// What a call answers, read as its type.
fn get<T: DeserializeOwned>(embassy: &Embassy, path: &str) -> Result<T> {
    Ok(serde_json::from_value(embassy.admin(path)?.json()?)?)
}

/// Waits until what a call answers is as it should be.
fn becomes<T: DeserializeOwned + std::fmt::Debug>(
    embassy: &Embassy,
    path: &str,
    what: &str,
    is: impl Fn(&T) -> bool,
) -> Result<T> {
    testbed::eventually(WAIT, what, || {
        let answer = get::<T>(embassy, path)?;
        ensure!(is(&answer), "{answer:#?}");
        Ok(answer)
    })
}

/// What a program in Python, with Debian's modules, prints of this input.
fn python(program: &str, input: &str) -> Result<String> {
    let mut python = Command::new("/usr/bin/python3");
    python.args(["-c", program]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = python.stderr(Stdio::piped()).spawn().context("start python3")?;
    child.stdin.take().context("its input")?.write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{stderr}\n{input}");
    Ok(String::from_utf8(output.stdout)?)
}

/// Opens a connection that stays.
fn hold(app: &Container, name: &str, target: &str) -> Result<Process> {
    app.spawn(name, ["testbed", "peer", "hold", target])
}
