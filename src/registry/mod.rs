//! The registries: one client for each, shared by everything that asks it. Connections, logins and the choice of a member are
//! the client's. Nothing of discovery stands here: what is followed are the answers of Consul and the keys of etcd.
//!
//! Everything that can be followed has the same shape: `next` waits for the next answer or step and may be dropped while it
//! waits; `read_again` has the next one be a full read, on the connections that there are.

pub mod consul;
pub mod etcd;
mod http;
mod reuse;
mod settings;

pub(crate) use http::HttpAnswer;
pub use settings::{ConsulSettings, EtcdSettings, Secret};

/// As much of a wrong value as a log line should hold.
pub(crate) fn excerpt(text: &str) -> String {
    const LONGEST: usize = 60;
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}
