//! TLS to registries and engines: the files of a client, the verification of servers, and the crypto provider.

#![expect(
    clippy::disallowed_methods,
    reason = "only before a connection with TLS is made; small files"
)]

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_name,
    },
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    server::ParsedCertificate,
};

use reqwest::{ClientBuilder, Identity};

use crate::source::SourceError;

/// Makes ring the crypto provider of this process. Must be called before any TLS client is built. May be called repeatedly.
pub fn install_provider() {
    // An error means that there is already a provider, which is enough.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// A client's certificate, and the CAs that it trusts. The files are read again for a new connection after a failure, so
/// that renewed ones are used.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClientTls {
    /// The only trusted CAs, as a file or a folder of files. If absent, the system's CAs are trusted.
    pub ca: Option<PathBuf>,
    /// The client's certificate chain and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// The user's names for the CAs, the certificate and the key.
    names: [&'static str; 3],
}

/// The contents of the files of a [`ClientTls`], in PEM.
#[derive(Default)]
pub(crate) struct Pem {
    pub(crate) ca: Option<Vec<u8>>,
    pub(crate) identity: Option<(Vec<u8>, Vec<u8>)>,
}

impl ClientTls {
    /// A certificate needs its key and the other way round. The error uses the `names` by which the user sets them.
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

    /// Configures an HTTP/1.1 client: the CAs that it trusts, and its certificate. `verify`: whether it checks the server's
    /// certificate at all.
    pub(crate) fn prepare(
        &self,
        builder: ClientBuilder,
        verify: bool,
    ) -> Result<ClientBuilder, SourceError> {
        let pem = self.load()?;
        if let Some(mut config) = pem.config()?.filter(|_| verify) {
            config.alpn_protocols = vec![b"http/1.1".to_vec()];
            return Ok(builder.tls_backend_preconfigured(config));
        }
        // Trusts the system's CAs, or any certificate.
        let mut builder = builder.tls_danger_accept_invalid_certs(!verify);
        if let Some((certificate, key)) = pem.identity {
            let identity = Identity::from_pem(&[certificate, b"\n".to_vec(), key].concat());
            builder =
                builder.identity(identity.map_err(|error| {
                    SourceError::caused("the client certificate and key", &error)
                })?);
        }
        Ok(builder)
    }

    pub(crate) fn load(&self) -> Result<Pem, SourceError> {
        let read = |name: &str, path: &PathBuf| {
            read_all(path)
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

impl Pem {
    /// A client configuration that trusts only these CAs. `None` if there are none.
    pub(crate) fn config(&self) -> Result<Option<ClientConfig>, SourceError> {
        let Some(verifier) = self.verifier()? else { return Ok(None) };
        let wrong = |what: &str, error: &dyn std::error::Error| SourceError::caused(what, error);
        let config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|e| wrong("cannot create a TLS client", &e))?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let config = match &self.identity {
            Some((certificate, key)) => {
                let chain = CertificateDer::pem_slice_iter(certificate).collect::<Result<_, _>>();
                let chain: Vec<_> = chain.map_err(|e| wrong("the client certificate", &e))?;
                let key =
                    PrivateKeyDer::from_pem_slice(key).map_err(|e| wrong("the client key", &e))?;
                config
                    .with_client_auth_cert(chain, key)
                    .map_err(|e| wrong("the client certificate and key", &e))?
            }
            None => config.with_no_client_auth(),
        };
        Ok(Some(config))
    }

    /// A verifier that trusts only these CAs. `None` if there are none.
    pub(crate) fn verifier(&self) -> Result<Option<Arc<dyn ServerCertVerifier>>, SourceError> {
        let Some(ca) = &self.ca else { return Ok(None) };
        let authorities: Vec<_> = CertificateDer::pem_slice_iter(ca)
            .collect::<Result<_, _>>()
            .map_err(|e| SourceError::caused("the CA file", &e))?;
        if authorities.is_empty() {
            return Err(SourceError::new("the CA file has no certificate in PEM format"));
        }
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(authorities.iter().cloned());
        let usual = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
            .build()
            .map_err(|e| SourceError::caused("the CA file", &e))?;
        Ok(Some(Arc::new(Verifier { usual, authorities })))
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// Verifies as usual, but also accepts a server's certificate that is itself one of the trusted CAs. `openssl req -x509`
/// creates such certificates, and OpenSSL and Go accept them too.
#[derive(Debug)]
struct Verifier {
    usual: Arc<WebPkiServerVerifier>,
    authorities: Vec<CertificateDer<'static>>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified = self.usual.verify_server_cert(certificate, intermediates, name, ocsp, now);
        match &verified {
            // The validity period was checked before this error. The name is checked below.
            Err(Error::InvalidCertificate(CertificateError::Other(reason)))
                if reason.to_string() == "CaUsedAsEndEntity"
                    && self.authorities.iter().any(|authority| authority == certificate) =>
            {
                verify_server_name(&ParsedCertificate::try_from(certificate)?, name)?;
                Ok(ServerCertVerified::assertion())
            }
            _ => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.usual.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.usual.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.usual.supported_verify_schemes()
    }
}

/// The contents of a file, or of all files in a folder.
fn read_all(path: &Path) -> io::Result<Vec<u8>> {
    if !path.is_dir() {
        return fs::read(path);
    }
    let entries: io::Result<Vec<_>> = fs::read_dir(path)?.map(|entry| Ok(entry?.path())).collect();
    let mut whole = Vec::new();
    for file in entries?.iter().filter(|path| path.is_file()) {
        whole.extend(fs::read(file)?);
        whole.push(b'\n');
    }
    Ok(whole)
}

/// A connection that the settings leave without protection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Weakness {
    /// The connection, and the consequence.
    pub what: String,
    pub fix: &'static str,
}

/// Whether data sent to a host stays on this host.
pub(crate) fn is_loopback(host: &str) -> bool {
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let address = host.parse::<std::net::IpAddr>();
    address.map_or(host.eq_ignore_ascii_case("localhost"), |address| {
        address.to_canonical().is_loopback()
    })
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

    /// A self-signed certificate, as OpenSSL creates it, for the name `registry.test` and for 30 days.
    fn self_signed(folder: &Path, name: &str) -> Vec<u8> {
        let file = folder.join(format!("{name}.pem"));
        let status = std::process::Command::new("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"])
            .args(["-nodes", "-days", "30", "-subj", "/CN=registry.test"])
            .args(["-addext", "subjectAltName=DNS:registry.test", "-keyout", "/dev/null", "-out"])
            .arg(&file)
            .stderr(std::process::Stdio::null())
            .status();
        assert!(status.unwrap().success());
        fs::read(file).unwrap()
    }

    #[test]
    fn a_certificate_that_is_its_own_ca_is_accepted_where_it_is_a_trusted_one() {
        let folder = tempfile::tempdir().unwrap();
        let (one, other) = (self_signed(folder.path(), "one"), self_signed(folder.path(), "other"));
        let verify = |ca: &[u8], shown: &[u8], name: &'static str, days_from_now: i64| {
            let pem = Pem { ca: Some(ca.to_vec()), identity: None };
            let verifier = pem.verifier().unwrap().unwrap();
            let shown = CertificateDer::from_pem_slice(shown).unwrap();
            let now = UnixTime::now().as_secs().saturating_add_signed(days_from_now * 86_400);
            let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(now));
            let name = ServerName::try_from(name).unwrap();
            verifier.verify_server_cert(&shown, &[], &name, &[], now).map(drop)
        };
        assert_eq!(verify(&one, &one, "registry.test", 0), Ok(()));
        let both = [other.clone(), one.clone()].concat();
        assert_eq!(verify(&both, &one, "registry.test", 1), Ok(()));
        // Another certificate of the same name.
        assert!(verify(&other, &one, "registry.test", 0).is_err());
        // For another name, and at another time.
        assert!(matches!(
            verify(&one, &one, "other.test", 0),
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. }
            ))
        ));
        for (days, expected) in [(31, "Expired"), (-2, "NotValidYet")] {
            let error = verify(&one, &one, "registry.test", days).unwrap_err();
            assert!(format!("{error:?}").contains(expected), "{error:?}");
        }
    }

    #[test]
    fn a_folder_of_cas_is_read_file_by_file() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("below")).unwrap();
        fs::write(folder.path().join("a"), "one").unwrap();
        fs::write(folder.path().join("b"), "two").unwrap();
        let names = ["CONSUL_CAPATH", "c", "k"];
        let tls = ClientTls::new(Some(folder.path().into()), None, None, names).unwrap();
        let pem = tls.load().map_err(|e| e.to_string()).unwrap();
        let mut lines: Vec<_> = pem.ca.as_deref().unwrap().split(|byte| *byte == b'\n').collect();
        lines.sort();
        assert_eq!(lines, [&b""[..], b"one", b"two"]);
        // It contains no certificate.
        let error = pem.verifier().err().map(|e| e.to_string());
        assert_eq!(error.as_deref(), Some("the CA file has no certificate in PEM format"));
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named() {
        let names = ["-etcd-cacert", "-etcd-cert", "-etcd-keycert"];
        let tls = ClientTls::new(Some("/nonexistent/ca.pem".into()), None, None, names).unwrap();
        let error = tls.load().err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.starts_with("-etcd-cacert /nonexistent/ca.pem: "), "{error}");
    }
}
