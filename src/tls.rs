//! TLS towards the registries: which files a client needs, and the one crypto provider.

use std::{fs, path::PathBuf};

use reqwest::{Certificate, ClientBuilder, Identity};

use crate::source::SourceError;

/// Makes ring the crypto provider of this process. To be called before any TLS client is built, as often as one likes.
pub fn install_provider() {
    // An error says that there is a provider already, which is all that is wanted.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// What a client shows and whom it trusts. The files are read again for a new connection after a failure, so that renewed ones
/// are used.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClientTls {
    /// The only trusted CA; if absent, the system's CAs are trusted.
    pub ca: Option<PathBuf>,
    /// The client's certificate chain and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// What the user calls the authorities, the certificate and the key.
    names: [&'static str; 3],
}

/// The contents of the files of a [`ClientTls`], in PEM.
#[derive(Default)]
pub(crate) struct Pem {
    pub(crate) ca: Option<Vec<u8>>,
    pub(crate) identity: Option<(Vec<u8>, Vec<u8>)>,
}

impl ClientTls {
    /// A certificate is of no use without its key, nor a key without its certificate: the error calls them by the
    /// `names` under which the user gave them.
    pub fn new(
        ca: Option<PathBuf>,
        certificate: Option<PathBuf>,
        key: Option<PathBuf>,
        names: [&'static str; 3],
    ) -> Result<Self, String> {
        let [_, certificate_name, key_name] = names;
        let alone = |given, missing| {
            Err(format!("{given} is given without {missing}: expected both or neither"))
        };
        let identity = match (certificate, key) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            (Some(_), None) => return alone(certificate_name, key_name),
            (None, Some(_)) => return alone(key_name, certificate_name),
        };
        Ok(Self { ca, identity, names })
    }

    pub fn is_empty(&self) -> bool {
        self.ca.is_none() && self.identity.is_none()
    }

    /// Sets up a client: whom it trusts, and what it shows. `verify`: whether it checks the server's certificate at all.
    pub(crate) fn prepare(
        &self,
        builder: ClientBuilder,
        verify: bool,
    ) -> Result<ClientBuilder, SourceError> {
        let pem = self.load()?;
        let wrong = |what: &str, e: reqwest::Error| SourceError::caused(what, &e);
        let mut builder = builder.tls_danger_accept_invalid_certs(!verify);
        if let Some(ca) = &pem.ca {
            let authorities =
                Certificate::from_pem_bundle(ca).map_err(|e| wrong("the CA file", e))?;
            if authorities.is_empty() {
                return Err(SourceError::new("the CA file has no certificate in PEM format"));
            }
            builder = builder.tls_certs_only(authorities);
        }
        if let Some((certificate, key)) = pem.identity {
            let identity = Identity::from_pem(&[certificate, b"\n".to_vec(), key].concat())
                .map_err(|e| wrong("the client certificate and key", e))?;
            builder = builder.identity(identity);
        }
        Ok(builder)
    }

    pub(crate) fn load(&self) -> Result<Pem, SourceError> {
        let read = |name: &str, path: &PathBuf| {
            fs::read(path)
                .map_err(|e| SourceError::caused(format_args!("{name} {}", path.display()), &e))
        };
        let [ca, certificate, key] = self.names;
        Ok(Pem {
            ca: self.ca.as_ref().map(|file| read(ca, file)).transpose()?,
            identity: match &self.identity {
                Some((certificate_file, key_file)) => {
                    Some((read(certificate, certificate_file)?, read(key, key_file)?))
                }
                None => None,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_and_its_key_come_together() {
        let new = |certificate: Option<&str>, key: Option<&str>| {
            ClientTls::new(
                None,
                certificate.map(Into::into),
                key.map(Into::into),
                ["-a", "-c", "-k"],
            )
        };
        assert_eq!(new(None, None).map(|tls| tls.is_empty()), Ok(true));
        assert_eq!(
            new(Some("c"), Some("k")).map(|tls| tls.identity),
            Ok(Some(("c".into(), "k".into())))
        );
        assert_eq!(
            new(Some("c"), None),
            Err("-c is given without -k: expected both or neither".to_owned())
        );
        assert_eq!(
            new(None, Some("k")),
            Err("-k is given without -c: expected both or neither".to_owned())
        );
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named() {
        let names = ["-etcd-cacert", "-etcd-cert", "-etcd-keycert"];
        let tls = ClientTls::new(Some("/nonexistent/ca.pem".into()), None, None, names).unwrap();
        let error = tls.load().err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.starts_with("-etcd-cacert /nonexistent/ca.pem: "), "{error}");
    }
}
