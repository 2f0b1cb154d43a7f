//! TLS to the registries, with certificates created here by `openssl`.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use embassy::discovery::{ConsulSettings, EtcdSettings, Options};
use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};
use rustls::{
    ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use serde_json::json;
use tokio::{
    io::{AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::TlsAcceptor;

use super::{
    Followed, list,
    servers::{Consul, Etcd},
    settings,
};

/// A CA, and its certificates for a server on 127.0.0.1 and for a client.
struct Authority(tempfile::TempDir);

impl Authority {
    fn new() -> Self {
        let authority = Self(tempfile::tempdir().unwrap());
        authority.openssl(&format!("req -x509 {KEY} -subj /CN=ca -keyout ca.key -out ca.pem"));
        authority.sign("server", "IP:127.0.0.1", "serverAuth,clientAuth");
        authority.sign("client", "DNS:client", "clientAuth");
        authority
    }

    /// A self-signed certificate for a server at `address`, as OpenSSL creates it by default.
    fn self_signed(address: &str) -> Self {
        let server = Self(tempfile::tempdir().unwrap());
        server.openssl(&format!(
            "req -x509 {KEY} -subj /CN=server -addext subjectAltName=IP:{address} -keyout server.key -out server.pem"
        ));
        fs::copy(server.file("server.pem"), server.file("ca.pem")).unwrap();
        server
    }

    /// Signs a certificate for a name and a use.
    fn sign(&self, name: &str, alternative: &str, uses: &str) {
        let extensions = format!("subjectAltName={alternative}\nextendedKeyUsage={uses}\n");
        fs::write(self.file("extensions"), extensions).unwrap();
        self.openssl(&format!("req {KEY} -subj /CN={name} -keyout {name}.key -out {name}.csr"));
        self.openssl(&format!(
            "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile extensions -out {name}.pem"
        ));
    }

    /// A Consul agent with the certificate of this name, and its TLS address.
    async fn consul(&self, name: &str) -> (Consul, String) {
        let [https] = crate::process::free_ports();
        let config = json!({
            "ports": { "https": https },
            "cert_file": self.file(&format!("{name}.pem")),
            "key_file": self.file(&format!("{name}.key")),
        });
        let consul = Consul::with(&config.to_string(), None).await;
        consul.register("one", "10.0.0.1", 80, &[]).await;
        (consul, format!("consuls://127.0.0.1:{https}"))
    }

    fn openssl(&self, arguments: &str) {
        let mut openssl = Command::new("openssl");
        let output = openssl.current_dir(self.0.path()).args(arguments.split(' ')).output();
        let output = output.expect("openssl can be started");
        assert!(output.status.success(), "openssl {arguments}: {output:?}");
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.file(name).display().to_string()
    }

    fn pem(&self, name: &str) -> Vec<u8> {
        fs::read(self.file(name)).unwrap()
    }

    /// An etcd with a certificate, which requires a client certificate if `mutual`. Both of its stores contain the service.
    async fn etcd(&self, mutual: bool) -> Etcd {
        let (certificate, key, ca) =
            (self.text("server.pem"), self.text("server.key"), self.text("ca.pem"));
        let mut flags = vec!["--enable-v2", "--cert-file", &certificate, "--key-file", &key];
        if mutual {
            flags.extend(["--client-cert-auth", "--trusted-ca-file", &ca]);
        }
        let etcd = Etcd::with("https", &flags).await;
        let tls = TlsOptions::new()
            .ca_certificate(Certificate::from_pem(self.pem("ca.pem")))
            .identity(Identity::from_pem(self.pem("client.pem"), self.pem("client.key")));
        let options = ConnectOptions::new().with_tls(tls);
        let mut v3 = Client::connect([etcd.address()], Some(options)).await.unwrap();
        super::servers::retry("etcd", async || {
            v3.put("/services/v3", "10.0.0.3:80", None).await.ok()
        })
        .await;
        let identity = [self.pem("client.pem"), self.pem("client.key")].concat();
        let http = reqwest::Client::builder()
            .no_proxy()
            .tls_certs_only([reqwest::Certificate::from_pem(&self.pem("ca.pem")).unwrap()])
            .identity(reqwest::Identity::from_pem(&identity).unwrap())
            .build()
            .unwrap();
        let url = format!("https://{}/v2/keys/services/v2?value=10.0.0.2:80", etcd.address());
        assert!(http.put(url).send().await.unwrap().status().is_success());
        etcd
    }
}

const KEY: &str = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2";

/// The settings of the three flags, set or not.
fn flags(ca: Option<PathBuf>, identity: Option<(PathBuf, PathBuf)>) -> Options {
    let (certificate, key) = identity.unzip();
    Options { etcd: EtcdSettings { certificate, key, ca, user: None }, ..settings() }
}

async fn both_stores_are_followed(etcd: &str, settings: &Options) {
    for (service, endpoint) in [("/services/v2", "10.0.0.2:80"), ("/services/v3", "10.0.0.3:80")] {
        let service = Followed::with(&format!("etcd://{etcd}"), settings, &format!("{service};80"));
        service.sees(&[endpoint]).await;
    }
}

#[tokio::test]
async fn etcd_is_trusted_by_its_authority_and_sees_our_certificate() {
    let authority = Authority::new();
    let etcd = authority.etcd(true).await;
    let ca = || Some(authority.file("ca.pem"));
    let identity = || Some((authority.file("client.pem"), authority.file("client.key")));
    both_stores_are_followed(&etcd.address(), &flags(ca(), identity())).await;

    let uri = format!("etcd://{}", etcd.address());
    let anonymous = Followed::with(&uri, &flags(ca(), None), "/services/v3;80");
    assert_eq!(list(&anonymous.fails(&etcd.address()).await), None);
    let plain = Followed::new(&uri, "/services/v3;80");
    assert_eq!(list(&plain.fails(&etcd.address()).await), None);
    let missing = Followed::with(&uri, &flags(Some("/nonexistent.pem".into()), None), "/v3;80");
    assert_eq!(list(&missing.fails("/nonexistent.pem: No such file").await), None);
}

#[tokio::test]
async fn etcd_is_trusted_by_its_authority_alone() {
    let authority = Authority::new();
    let etcd = authority.etcd(false).await;
    both_stores_are_followed(&etcd.address(), &flags(Some(authority.file("ca.pem")), None)).await;

    // Another CA of the same name.
    let stranger = Authority::new();
    let uri = format!("etcd3://{}", etcd.address());
    let flags = flags(Some(stranger.file("ca.pem")), None);
    let refused = Followed::with(&uri, &flags, "/services/v3;80");
    assert_eq!(list(&refused.fails("certificate").await), None);
}

/// A connection may fail because certificates are being renewed.
#[tokio::test]
async fn certificates_are_read_again_after_a_failure() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let etcd = authority.etcd(false).await;
    let ca = stranger.file("renewed.pem");
    fs::copy(stranger.file("ca.pem"), &ca).unwrap();
    let flags = flags(Some(ca.clone()), None);
    let uri = |scheme| format!("{scheme}://{}", etcd.address());
    let v2 = Followed::with(&uri("etcd2"), &flags, "/services/v2;80");
    let v3 = Followed::with(&uri("etcd3"), &flags, "/services/v3;80");
    v2.fails("certificate").await;
    v3.fails("certificate").await;
    fs::copy(authority.file("ca.pem"), &ca).unwrap();
    v2.sees(&["10.0.0.2:80"]).await;
    v3.sees(&["10.0.0.3:80"]).await;
}

/// If only a client certificate is set, the system's CAs are trusted. They are per process, so another process is started
/// with ours.
#[tokio::test]
async fn etcd_is_trusted_by_the_systems_authorities() {
    let authority = Authority::new();
    let etcd = authority.etcd(true).await;
    let inner = "registry::tls::inner_test_with_the_systems_authorities";
    let output = tokio::process::Command::new(env::current_exe().unwrap())
        .args(["--exact", inner, "--ignored"])
        .env("SSL_CERT_FILE", authority.file("ca.pem"))
        .env("IT_ETCD", etcd.address())
        .env("IT_FOLDER", authority.0.path())
        .kill_on_drop(true)
        .output()
        .await
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

#[tokio::test]
#[ignore = "run by the test before it, in an environment of its own"]
async fn inner_test_with_the_systems_authorities() {
    let (etcd, folder) = (env::var("IT_ETCD").unwrap(), env::var("IT_FOLDER").unwrap());
    let file = |name| Path::new(&folder).join(name);
    let identity = Some((file("client.pem"), file("client.key")));
    both_stores_are_followed(&etcd, &flags(None, identity)).await;
}

#[tokio::test]
async fn consul_is_spoken_to_by_tls() {
    let authority = Authority::new();
    let [https] = crate::process::free_ports();
    let config = json!({
        "ports": { "https": https },
        "cert_file": authority.file("server.pem"), "key_file": authority.file("server.key"),
        "ca_file": authority.file("ca.pem"), "verify_incoming_https": true,
    });
    let consul = Consul::with(&config.to_string(), None).await;
    consul.register("one", "10.0.0.1", 80, &[]).await;
    let with = |ca: &str, tls_verify| Options {
        consul: ConsulSettings {
            ca: Some(ca.into()),
            certificate: Some(authority.file("client.pem")),
            key: Some(authority.file("client.key")),
            tls: true,
            tls_verify,
            ..ConsulSettings::default()
        },
        ..settings()
    };
    let (ca, stranger) = (authority.text("ca.pem"), Authority::new());
    // CONSUL_HTTP_SSL says the same as the scheme.
    for scheme in ["consuls", "consul"] {
        let uri = format!("{scheme}://127.0.0.1:{https}");
        Followed::with(&uri, &with(&ca, true), "web;80").sees(&["10.0.0.1:80"]).await;
    }
    let uri = format!("consuls://127.0.0.1:{https}");
    let stranger = stranger.text("ca.pem");
    let refused = Followed::with(&uri, &with(&stranger, true), "web;80");
    assert_eq!(list(&refused.fails("certificate").await), None);
    Followed::with(&uri, &with(&stranger, false), "web;80").sees(&["10.0.0.1:80"]).await;
    let anonymous = Followed::new(&uri, "web;80");
    assert_eq!(list(&anonymous.fails(&format!("127.0.0.1:{https}")).await), None);
}

/// The settings for a Consul whose server has this CA and name.
fn with_consul(consul: ConsulSettings) -> Options {
    Options { consul, ..settings() }
}

#[tokio::test]
async fn a_certificate_that_is_its_own_authority_is_accepted_where_it_is_the_configured_one() {
    let (server, other) =
        (Authority::self_signed("127.0.0.1"), Authority::self_signed("127.0.0.1"));
    let elsewhere = Authority::self_signed("127.0.0.9");
    let (_consul, uri) = server.consul("server").await;
    let by = |authority: &Authority| {
        with_consul(ConsulSettings {
            ca: Some(authority.file("ca.pem")),
            ..ConsulSettings::default()
        })
    };
    Followed::with(&uri, &by(&server), "web;80").sees(&["10.0.0.1:80"]).await;
    // Another certificate of the same name.
    let refused = Followed::with(&uri, &by(&other), "web;80");
    assert_eq!(list(&refused.fails("certificate").await), None);
    // The configured certificate, but for another address.
    let (_consul, uri) = elsewhere.consul("server").await;
    let refused = Followed::with(&uri, &by(&elsewhere), "web;80");
    assert_eq!(list(&refused.fails("certificate").await), None);

    let (certificate, key) = (server.text("server.pem"), server.text("server.key"));
    let etcd =
        Etcd::with("https", &["--enable-v2", "--cert-file", &certificate, "--key-file", &key])
            .await;
    let ca = |authority: &Authority| flags(Some(authority.file("ca.pem")), None);
    for scheme in ["etcd2", "etcd3", "etcd"] {
        let uri = format!("{scheme}://{}", etcd.address());
        Followed::with(&uri, &ca(&server), "/services/web;80").sees(&[]).await;
        let refused = Followed::with(&uri, &ca(&other), "/services/web;80");
        assert_eq!(list(&refused.fails("certificate").await), None);
    }
}

#[tokio::test]
async fn a_server_of_consul_is_verified_by_the_name_that_is_configured() {
    let authority = Authority::new();
    authority.sign("named", "DNS:server.dc1.consul", "serverAuth,clientAuth");
    let (_consul, uri) = authority.consul("named").await;
    let folder = tempfile::tempdir().unwrap();
    fs::copy(authority.file("ca.pem"), folder.path().join("one.crt")).unwrap();
    let named = |name: Option<&str>| {
        with_consul(ConsulSettings {
            server_name: name.map(str::to_owned),
            // CONSUL_CAPATH
            ca_path: Some(folder.path().into()),
            ..ConsulSettings::default()
        })
    };
    Followed::with(&uri, &named(Some("server.dc1.consul")), "web;80").sees(&["10.0.0.1:80"]).await;
    for wrong in [None, Some("server.dc2.consul")] {
        let refused = Followed::with(&uri, &named(wrong), "web;80");
        let known = refused.fails("certificate").await;
        assert_eq!(list(&known), None);
        // The error names the address of the request.
        assert!(known.error.unwrap().contains(&uri["consuls://".len()..]), "{wrong:?}");
    }
}

/// Like the one in `registry::etcd`, with TLS: it closes connections that do not offer HTTP/2.
async fn only_grpc(server: &Authority, etcd: &Etcd) -> String {
    let chain = CertificateDer::pem_file_iter(server.file("server.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_file(server.file("server.key")).unwrap();
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain.map(Result::unwrap).collect(), key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let (listener, etcd) = (TcpListener::bind("127.0.0.1:0").await.unwrap(), etcd.address());
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let (acceptor, etcd) = (acceptor.clone(), etcd.clone());
            tokio::spawn(async move {
                let mut client = acceptor.accept(client).await?;
                if client.get_ref().1.alpn_protocol().is_some() {
                    client.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await?;
                    let mut etcd = TcpStream::connect(etcd).await?;
                    copy_bidirectional(&mut client, &mut etcd).await?;
                }
                client.shutdown().await
            });
        }
    });
    address
}

#[tokio::test]
async fn a_port_with_tls_that_answers_only_grpc_has_the_v3_store() {
    let (server, etcd) = (Authority::self_signed("127.0.0.1"), Etcd::both().await);
    let port = only_grpc(&server, &etcd).await;
    etcd.v2_set("/services/web/a", "10.0.0.2:80").await;
    let flags = flags(Some(server.file("ca.pem")), None);
    let web = Followed::with(&format!("etcd://{port}"), &flags, "/services/web;80");
    assert_eq!(web.sees(&[]).await.failures, 0);
    etcd.v3().await.put("/services/web/a", "10.0.0.3:80", None).await.unwrap();
    assert_eq!(web.sees(&["10.0.0.3:80"]).await.failures, 0);
}
