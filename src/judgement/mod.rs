//! Decides the state of each route, source, the capture, this host and the process. Only this module decides it: the API
//! returns the decision, the commands and the dashboard show it. Pure: the facts and the time are given as a [`Situation`].

mod binding;
mod cause;
mod host;
mod overview;
mod port;
mod route;
mod situation;
mod source;
mod states;
#[cfg(test)]
pub(crate) mod tests;

pub use binding::{BindingFate, Reasons};
pub use cause::{Cause, Finding, Used};
pub use host::{CONNECTIONS_FEW, HostUse, conntrack, memory};
pub use overview::{Awaited, Overview};
pub use route::{RouteHealth, endpoint};
pub use situation::{CaptureReading, Load, Situation};
pub use source::{SourceReading, source};
pub use states::{BindingState, EndpointHealth, Reason, RouteState, SourceState, Subject, Verdict};
