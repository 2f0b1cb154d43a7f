//! Whether all is well with a route, a source, the capture, this host and the process. It is decided here and nowhere else:
//! the API carries the decision, the commands and the dashboard show it. Pure: what is known comes in as a [`Situation`],
//! with the time that it is seen at.

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
mod tests;

pub use binding::{BindingFate, Reasons};
pub use cause::{Cause, Finding, Used};
pub use host::{CONNECTIONS_FEW, HostUse, conntrack, memory};
pub use overview::{Awaited, Overview};
pub use route::{RouteHealth, endpoint};
pub use situation::{CaptureReading, Load, Situation};
pub use source::{SourceReading, source};
pub use states::{BindingState, EndpointHealth, Reason, RouteState, SourceState, Subject, Verdict};
