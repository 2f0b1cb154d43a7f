//! The settings of the discoveries besides their URIs.

use crate::{
    docker::Engine,
    registry::{ConsulSettings, EtcdSettings},
};

/// What the discoveries need besides their URIs: flags and the environment, already parsed.
#[derive(Debug, Clone)]
pub struct Options {
    /// `-filter`: only endpoints that pass their health checks.
    pub healthy_only: bool,
    /// `-docker`: the engine of a bare `docker://`.
    pub docker: Engine,
    pub consul: ConsulSettings,
    pub etcd: EtcdSettings,
}
