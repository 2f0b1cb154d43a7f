//! What the admin API says, and to whom.

use anyhow::{Result, ensure};
use embassy::admin::api;
use serde::de::DeserializeOwned;
use testbed::{Container, Embassy, Host, Process};

use crate::{
    READY, WAIT,
    support::{ETCD, offer_at, reaches, says, web},
};

mod changing;
mod dashboard;
mod scrapes;
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

/// Opens a connection that stays.
fn hold(app: &Container, name: &str, target: &str) -> Result<Process> {
    app.spawn(name, ["testbed", "peer", "hold", target])
}
