//! Consul and etcd, as they are: real servers on loopback, and broken ones.

mod broken;
mod consul;
mod etcd;
mod gate;
mod servers;
mod tls;

use crate::followed::{Followed, SOON, list, settings};
