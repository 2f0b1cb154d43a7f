//! Connects containers to the services they ask for. ARCHITECTURE.md is the map.

pub mod config;
pub mod descriptor;
pub mod discovery;
pub mod docker;
pub mod model;
pub mod source;
pub mod tls;
