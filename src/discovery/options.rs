//! The settings of the discoveries besides their URIs.

use crate::{
    docker::Engine,
    registry::{ConsulSettings, EtcdSettings},
};

/// What the URIs do not say and the discoveries need: flags and the environment, already read.
#[derive(Debug, Clone)]
pub struct Options {
    /// `-filter`: only endpoints that pass their health checks.
    pub healthy_only: bool,
    /// `-docker`: the engine that a bare `docker://` means.
    pub docker: Engine,
    pub consul: ConsulSettings,
    pub etcd: EtcdSettings,
}
