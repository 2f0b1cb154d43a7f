//! Whether all is well with a route, a source, the capture, this host and the process. It is decided here and nowhere else:
//! the API carries the decision, the commands and the dashboard show it. Pure: what is known comes in as a [`Situation`],
//! with the time that it is seen at.

use std::sync::Arc;

use crate::word::worded;

mod binding;
mod cause;
mod host;
mod overview;
mod port;
mod route;
mod situation;
mod source;
#[cfg(test)]
mod tests;

pub use binding::{BindingFate, BindingState, Reasons};
pub use cause::{Cause, Finding};
pub use host::{CONNECTIONS_FEW, HostUse, conntrack, memory};
pub use overview::{Awaited, Overview};
pub use route::{EndpointHealth, RouteHealth, RouteState, endpoint};
pub use situation::{CaptureReading, Load, Situation};
pub use source::{SourceReading, SourceState, Used};

worded! {
    /// How bad it is.
    pub enum Verdict {
        /// all is well
        Ok = "ok",
        /// it works, and something is wrong
        Degraded = "degraded",
        /// it does not work
        Broken = "broken",
    }

    /// What a finding is about.
    pub enum Subject {
        /// the process: its start and its end
        Process = "process",
        /// the rules in the firewall, and what is in the way of captured connections
        Capture = "capture",
        /// the provider and the queries of the discoveries
        Sources = "sources",
        /// what consumers declare
        Bindings = "bindings",
        /// where connections go
        Routes = "routes",
        /// instances of services
        Endpoints = "endpoints",
        /// the limits of connections
        Connections = "connections",
        /// what this host gives to the process
        Host = "host",
    }
}

impl Verdict {
    /// The worst of `all`.
    pub fn worst(all: impl IntoIterator<Item = Self>) -> Self {
        all.into_iter().max().unwrap_or(Self::Ok)
    }
}

/// Why something is as it is, in the words of whoever said so. Never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason(Arc<str>);

impl From<&str> for Reason {
    fn from(text: &str) -> Self {
        match text.trim() {
            "" => Self("no reason was given".into()),
            text => Self(text.into()),
        }
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Entries of a list that are named; the rest are counted.
const NAMED: usize = 20;
