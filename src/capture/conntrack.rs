//! The settings of connection tracking that the original's start script took from the environment.

#![expect(clippy::disallowed_methods, reason = "only at the start, and files of the kernel")]

use std::{fs, path::Path};

use tracing::{info, warn};

use crate::config::Conntrack;

/// Applies the requested settings. A failure is logged, and embassy continues without it.
pub fn apply(settings: &Conntrack) {
    for (path, value) in asked(settings) {
        match fs::write(Path::new(path), value.to_string()) {
            Ok(()) => info!(path, value, "conntrack setting written"),
            Err(error) => warn!(path, value, %error, "cannot write conntrack setting"),
        }
    }
}

/// The kernel files to write, with their values.
pub fn asked(settings: &Conntrack) -> impl Iterator<Item = (&'static str, u32)> {
    [
        ("/proc/sys/net/netfilter/nf_conntrack_max", settings.max_connections),
        ("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_time_wait", settings.timeout),
        ("/sys/module/nf_conntrack/parameters/hashsize", settings.hashsize),
    ]
    .into_iter()
    .filter_map(|(path, value)| Some((path, value?)))
}
