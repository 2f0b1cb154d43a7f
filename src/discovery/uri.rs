//! `-discovery` URIs.

use std::{fmt, path::PathBuf, sync::Arc};

use super::Discovery;
use crate::docker::Engine;

/// What the URIs do not say and the discoveries need: flags and the environment, already read.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `-filter`: only endpoints that pass their health checks.
    pub healthy_only: bool,
    /// `-docker`: the engine that a bare `docker://` means.
    pub docker: Engine,
    pub consul: ConsulSettings,
    pub etcd: EtcdSettings,
}

/// `CONSUL_HTTP_*`, as every Consul tool reads them (developer.hashicorp.com/consul/commands#environment-variables).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConsulSettings {
    /// `CONSUL_HTTP_TOKEN`
    pub token: Option<String>,
    /// `CONSUL_HTTP_TOKEN_FILE`
    pub token_file: Option<PathBuf>,
    /// `CONSUL_HTTP_SSL`
    pub tls: bool,
    /// `CONSUL_HTTP_SSL_VERIFY`
    pub tls_verify: bool,
    /// `CONSUL_CACERT`
    pub ca: Option<PathBuf>,
    /// `CONSUL_CLIENT_CERT`
    pub certificate: Option<PathBuf>,
    /// `CONSUL_CLIENT_KEY`
    pub key: Option<PathBuf>,
    /// `CONSUL_HTTP_AUTH`: `user` or `user:password`
    pub auth: Option<String>,
}

/// `-etcd-*` and `ETCD_*`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EtcdSettings {
    /// `-etcd-cert`
    pub certificate: Option<PathBuf>,
    /// `-etcd-keycert`
    pub key: Option<PathBuf>,
    /// `-etcd-cacert`
    pub ca: Option<PathBuf>,
    /// `ETCD_USERNAME`, `ETCD_PASSWORD`
    pub user: Option<(String, String)>,
}

/// A `-discovery` that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{uri:?}: {reason}")]
pub struct UriError {
    uri: String,
    reason: String,
}

impl UriError {
    pub(super) fn new(uri: &str, reason: impl fmt::Display) -> Self {
        Self { uri: uri.to_owned(), reason: reason.to_string() }
    }
}

/// The discovery's name and the discovery.
pub(super) fn parse(_text: &str, _settings: &Settings) -> Result<(Arc<str>, Discovery), UriError> {
    Err(UriError::new(_text, "not yet"))
}
