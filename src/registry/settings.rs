//! The settings of the registries besides their addresses: flags and the environment, already parsed.

use std::{fmt, path::PathBuf};

/// `CONSUL_HTTP_*`, as every Consul tool reads them (developer.hashicorp.com/consul/commands#environment-variables).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsulSettings {
    /// `CONSUL_HTTP_ADDR`, as given: the address for a URI without one.
    pub address: Option<String>,
    /// `CONSUL_NAMESPACE`
    pub namespace: Option<String>,
    /// `CONSUL_PARTITION`
    pub partition: Option<String>,
    /// `CONSUL_HTTP_TOKEN`
    pub token: Option<Secret>,
    /// `CONSUL_HTTP_TOKEN_FILE`
    pub token_file: Option<PathBuf>,
    /// `CONSUL_HTTP_SSL`
    pub tls: bool,
    /// `CONSUL_HTTP_SSL_VERIFY`
    pub tls_verify: bool,
    /// `CONSUL_TLS_SERVER_NAME`: the name in the server's certificate, if it is not the address.
    pub server_name: Option<String>,
    /// `CONSUL_CACERT`
    pub ca: Option<PathBuf>,
    /// `CONSUL_CAPATH`: a folder of CA certificates, used if `ca` is not set.
    pub ca_path: Option<PathBuf>,
    /// `CONSUL_CLIENT_CERT`
    pub certificate: Option<PathBuf>,
    /// `CONSUL_CLIENT_KEY`
    pub key: Option<PathBuf>,
    /// `CONSUL_HTTP_AUTH`: `user` or `user:password`
    pub auth: Option<Secret>,
}

impl Default for ConsulSettings {
    /// The settings of an empty environment.
    fn default() -> Self {
        Self {
            address: None,
            namespace: None,
            partition: None,
            token: None,
            token_file: None,
            tls: false,
            tls_verify: true,
            server_name: None,
            ca: None,
            ca_path: None,
            certificate: None,
            key: None,
            auth: None,
        }
    }
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
    pub user: Option<(String, Secret)>,
}

/// Text that must not appear in a log.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub(super) fn reveal(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        text.to_owned().into()
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(hidden)")
    }
}
