//! Connects containers to the services they need. ARCHITECTURE.md is the map.

// In the order in which data flows.
pub mod word;
pub mod config;
pub mod model;
pub mod descriptor;
pub mod source;
pub mod tls;
pub mod docker;
pub mod registry;
pub mod provider;
pub mod discovery;
pub mod outcome;
pub mod counts;
pub mod balance;
pub mod cow_map;
pub mod identity;
pub mod table;
pub mod readiness;
pub mod events;
pub mod report;
pub mod state;
pub mod control;
pub mod proxy;
pub mod check;
pub mod capture;
pub mod limits;
pub mod memory;
pub mod judgement;
pub mod admin;
pub mod log;
pub mod privileges;
pub mod app;
pub mod cli;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
