//! The words for how things are, and how bad each of them is.

use std::{fmt, sync::Arc};

use crate::word::worded;

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

    /// Whether an endpoint takes new connections.
    pub enum EndpointHealth {
        /// it takes its turn
        Active = "active",
        /// it failed and is skipped
        Ejected = "ejected",
        /// it is not skipped any more, and the next connection tries it
        Probing = "probing",
        /// its active check fails
        Unhealthy = "unhealthy",
        /// it gets no new connections, as was asked for
        Drained = "drained",
    }

    /// What becomes of a route's next connection.
    pub enum RouteState {
        /// it goes where it should
        Ok = "ok",
        /// it has an endpoint to go to, and something is wrong: with other endpoints, with the source of either side, or on the way
        Degraded = "degraded",
        /// every endpoint failed or fails its check; all are tried
        Ejected = "ejected",
        /// it is refused: there is no endpoint, or none that may be used
        NoEndpoint = "no_endpoint",
        /// it is refused: discovery has not answered yet
        Waiting = "waiting",
        /// it does not reach embassy: it is not captured
        NotCaptured = "not_captured",
        /// it is refused: a limit is reached, or embassy is shutting down
        Refused = "refused",
    }

    /// Whether a source answers.
    pub enum SourceState {
        /// it answers
        Up = "up",
        /// it does not answer, and what was known stays in use
        Down = "down",
        /// it has not answered yet
        Waiting = "waiting",
    }

    /// What became of a binding.
    pub enum BindingState {
        /// it has its routes
        Routed = "routed",
        /// it has some routes, and others are refused
        Partly = "partly",
        /// it has no route
        Unrouted = "unrouted",
        /// it could not be read
        Invalid = "invalid",
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

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl EndpointHealth {
    pub fn verdict(self) -> Verdict {
        match self {
            Self::Active => Verdict::Ok,
            Self::Probing | Self::Drained => Verdict::Degraded,
            Self::Ejected | Self::Unhealthy => Verdict::Broken,
        }
    }
}

impl RouteState {
    pub fn verdict(self) -> Verdict {
        match self {
            Self::Ok => Verdict::Ok,
            Self::Degraded => Verdict::Degraded,
            Self::Ejected
            | Self::NoEndpoint
            | Self::Waiting
            | Self::NotCaptured
            | Self::Refused => Verdict::Broken,
        }
    }
}

impl BindingState {
    pub fn verdict(self) -> Verdict {
        match self {
            Self::Routed => Verdict::Ok,
            Self::Partly => Verdict::Degraded,
            Self::Unrouted | Self::Invalid => Verdict::Broken,
        }
    }
}
