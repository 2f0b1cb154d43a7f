//! The registries. Each has one client, shared by everything that asks it. The client manages connections, logins and the
//! choice of a member. Nothing here is specific to discovery: what is followed are answers of Consul and keys of etcd.
//!
//! All followers have the same interface: `next` waits for the next answer or step and is cancel-safe. `read_again` makes
//! the next step a full read, on the existing connections.

pub mod consul;
pub mod etcd;
mod http;
mod reuse;
mod settings;

pub(crate) use http::HttpAnswer;
pub use settings::{ConsulSettings, EtcdSettings, Secret};

/// Shortens an invalid value for a log line.
pub(crate) fn excerpt(text: &str) -> String {
    const LONGEST: usize = 60;
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}
