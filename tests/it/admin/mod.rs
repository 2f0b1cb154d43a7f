//! The answers of the admin API, and who gets them.

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

/// The answer to a request, parsed as its type.
fn get<T: DeserializeOwned>(embassy: &Embassy, path: &str) -> Result<T> {
    Ok(serde_json::from_value(embassy.admin(path)?.json()?)?)
}

/// Waits until the answer to a request is as wanted.
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

/// The output of a Python program, with Debian's modules, for this input.
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

/// Opens a connection that stays open.
fn hold(app: &Container, name: &str, target: &str) -> Result<Process> {
    app.spawn(name, ["testbed", "peer", "hold", target])
}
