//! A separate Docker host: for integration tests, for the demo and the benchmark, and for manual experiments.
//!
//! [`Host::start`] starts a separate Docker engine inside new network, mount and process namespaces, within about a second.
//! Its containers, bridges, firewall rules and files exist only there. Several hosts can run at the same time, and neither
//! the machine's own Docker nor its firewall is changed. A host ends when its last handle is dropped, and also when the
//! process that started it panics, is interrupted or is killed.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use testbed::Host;
//!
//! let host = Host::start()?;
//! let web = host.web("web-1").start()?;
//! let app = host.client("app").start()?;
//!
//! let answers = app.get(format!("{}:80", web.ip()?)).times(30).run()?;
//! assert_eq!(answers.from("web-1"), 30);
//! # Ok(())
//! # }
//! ```
//!
//! It needs root, and what `testbed/setup.sh` installs. All calls block. Each is intended to be followed by `?`.

mod consul;
mod container;
mod daemon;
mod docker;
mod embassy;
mod engine;
mod etcd;
mod exec;
mod fake_engine;
mod host;
mod image;
mod light;
mod peer;
mod poll;
mod process;
mod space;

pub use consul::{Consul, Registration, consul_program};
pub use container::{Container, ContainerBuilder};
pub use daemon::Daemon;
pub use docker::Network;
pub use embassy::{Embassy, embassy_program};
pub use etcd::{Etcd, EtcdV2, EtcdV3};
pub use exec::output;
pub use fake_engine::{FakeEngine, Mood};
pub use host::{Host, HostBuilder, Response};
pub use peer::{Answers, Get, Probe, Traffic};
pub use poll::eventually;
pub use process::Process;
pub use rustix::process::Signal;
pub use space::testbed_program;

/// Address of the host's `eth0`, which a registry would contain for ports published on this Docker host.
pub const HOST_ADDRESS: &str = "192.168.13.90";
