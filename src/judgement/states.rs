//! The words for states, and their verdicts.

use std::{fmt, sync::Arc};

use crate::word::worded;

worded! {
    /// How bad a state is.
    pub enum Verdict {
        /// all is well
        Ok = "ok",
        /// it works, but there is a problem
        Degraded = "degraded",
        /// it does not work
        Broken = "broken",
    }

    /// What a finding is about.
    pub enum Subject {
        /// the process: its start and its end
        Process = "process",
        /// the firewall rules, and obstacles for captured connections
        Capture = "capture",
        /// the provider and the queries of the discoveries
        Sources = "sources",
        /// what consumers declare
        Bindings = "bindings",
        /// the routes
        Routes = "routes",
        /// instances of services
        Endpoints = "endpoints",
        /// the connection limits
        Connections = "connections",
        /// the host's resources
        Host = "host",
    }

    /// Whether an endpoint gets new connections.
    pub enum EndpointHealth {
        /// it gets connections
        Active = "active",
        /// it failed and is skipped
        Ejected = "ejected",
        /// it is no longer skipped, and the next connection tries it
        Probing = "probing",
        /// its active check fails
        Unhealthy = "unhealthy",
        /// it gets no new connections: it was drained via the API
        Drained = "drained",
    }

    /// The state of a route: what happens to its next connection.
    pub enum RouteState {
        /// it goes where it should
        Ok = "ok",
        /// it has an endpoint, and there is a problem: with other endpoints, with a source, or with a firewall on the way
        Degraded = "degraded",
        /// all endpoints failed lately or are unhealthy; embassy tries them all
        Ejected = "ejected",
        /// it is refused: there is no usable endpoint
        NoEndpoint = "no_endpoint",
        /// it is held for --hold and then refused: discovery has not answered yet
        Waiting = "waiting",
        /// it does not reach embassy: it is not captured, or does not arrive in embassy's network namespace
        NotCaptured = "not_captured",
        /// it is refused: a limit was reached
        Refused = "refused",
    }

    /// Whether a source answers.
    pub enum SourceState {
        /// it answers
        Up = "up",
        /// it does not answer, and its last data stays in use
        Down = "down",
        /// it has not answered yet
        Waiting = "waiting",
    }

    /// The state of a binding.
    pub enum BindingState {
        /// it has all its routes
        Routed = "routed",
        /// it has some of its routes
        Partly = "partly",
        /// it has no route
        Unrouted = "unrouted",
        /// another binding of the same consumer has its port
        Overruled = "overruled",
        /// it does not parse
        Invalid = "invalid",
    }
}

impl Verdict {
    /// The worst of `all`.
    pub fn worst(all: impl IntoIterator<Item = Self>) -> Self {
        all.into_iter().max().unwrap_or(Self::Ok)
    }
}

/// A reason, in the words of its origin, with a fix if one is known. Never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason {
    text: Arc<str>,
    fix: Option<&'static str>,
}

impl From<&str> for Reason {
    fn from(text: &str) -> Self {
        let text = match text.trim() {
            "" => "no reason was given",
            text => text,
        };
        Self { text: text.into(), fix: None }
    }
}

impl Reason {
    /// The same with a fix.
    pub(super) fn fixed_by(self, fix: &'static str) -> Self {
        Self { fix: Some(fix), ..self }
    }

    pub(super) fn fix(&self) -> Option<&'static str> {
        self.fix
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl EndpointHealth {
    pub fn verdict(self) -> Verdict {
        match self {
            // A drain is intended.
            Self::Active | Self::Drained => Verdict::Ok,
            // One failing endpoint is not yet a failing service. If all of them fail, the route reports it.
            Self::Probing | Self::Ejected | Self::Unhealthy => Verdict::Degraded,
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
            Self::Partly | Self::Overruled => Verdict::Degraded,
            Self::Unrouted | Self::Invalid => Verdict::Broken,
        }
    }
}
