//! Connects containers to the services they need. ARCHITECTURE.md is the map.

// Nothing from outside may panic the process, and no lock is held across an await.
#![cfg_attr(
    not(test),
    warn(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::disallowed_methods,
        clippy::await_holding_lock,
        clippy::await_holding_refcell_ref
    )
)]

// In the order in which data flows: a module uses only those before it (tests/architecture.rs).
pub mod word;
pub mod cow_map;
pub mod identity;
pub mod text;
mod remedy;
mod json;
mod body;
pub mod model;
pub mod descriptor;
pub mod wiring;
pub mod consumer;
pub mod source;
pub mod tls;
pub mod resolve;
pub mod docker;
pub mod registry;
pub mod provider;
pub mod discovery;
pub mod config;
pub mod log;
pub mod limits;
pub mod memory;
pub mod privileges;
pub mod signals;
pub mod supervisor;
mod unix_socket;
pub mod listening;
pub mod takeover;
pub mod successor;
pub mod outcome;
pub mod counts;
pub mod balance;
pub mod table;
pub mod path;
pub mod readiness;
pub mod events;
pub mod report;
pub mod state;
pub mod control;
pub mod proxy;
pub mod check;
pub mod capture;
pub mod kernel;
pub mod judgement;
pub mod admin;
pub mod app;
pub mod cli;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
