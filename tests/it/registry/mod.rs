//! Real Consul and etcd servers on loopback, and broken ones.

mod broken;
mod consul;
mod etcd;
mod figures;
mod gate;
mod healthy;
mod servers;
mod tls;

use crate::followed::{Followed, SOON, list, rejected, settings};
