//! A healthy registry: re-reads and new queries cost it no connection and no login.

use std::{collections::BTreeMap, time::Duration};

use embassy::{
    discovery::{Discoveries, EtcdSettings, Options},
    source::ResyncRequests,
};
use etcd_client::{Client, Permission};
use serde_json::json;

use super::{
    Followed,
    gate::Gate,
    list,
    servers::{Consul, Etcd, retry},
    settings,
};

const SERVICES: usize = 20;

/// Creates two users. `web` may read keys below /services/, `root` everything.
pub(super) async fn with_users(etcd: &Etcd) {
    let mut v3 = etcd.v3().await;
    for user in ["root", "web"] {
        v3.user_add(user, "s3cret", None).await.unwrap();
        v3.role_add(user).await.unwrap();
        v3.user_grant_role(user, user).await.unwrap();
    }
    let services = Permission::read("/services/").with_prefix();
    v3.role_grant_permission("web", services).await.unwrap();
    v3.auth_enable().await.unwrap();
}

pub(super) async fn root(etcd: &Etcd) -> Client {
    let options = etcd_client::ConnectOptions::new().with_user("root", "s3cret");
    let options = options.with_auto_token_refresh(true);
    Client::connect([etcd.address()], Some(options)).await.unwrap()
}

pub(super) fn as_web() -> Options {
    let user = Some(("web".to_owned(), "s3cret".to_owned().into()));
    Options { etcd: EtcdSettings { user, ..EtcdSettings::default() }, ..settings() }
}

/// Re-reads all services many times, without failures or changes.
async fn read_again(uri: &str, prefix: &str, settings: &Options) {
    let discoveries = Discoveries::parse(&[uri.to_owned()], settings).unwrap();
    let resync = ResyncRequests::new(Duration::from_secs(3));
    let follow = |n| {
        let service = format!("{prefix}{n};80");
        Followed::read_again_by(&discoveries, &service, &resync)
    };
    let all: Vec<_> = (0..SERVICES).map(follow).collect();
    for followed in &all {
        followed.sees(&["10.0.0.1:80"]).await;
    }
    // First at the resync interval.
    for _ in 0..4 {
        let before: Vec<_> = all.iter().map(|followed| followed.known().answers).collect();
        for (followed, before) in all.iter().zip(before) {
            followed.until("a re-read", |known| known.answers > before).await;
        }
        resync.request();
    }
    for followed in &all {
        let known = followed.known();
        assert_eq!((known.failures, known.changes), (0, 1), "{uri}");
    }
}

/// Checks the number of connections: one per long poll, and a few for all re-reads. With one per re-read there would be
/// several times as many.
fn few_were_opened(gate: &Gate) {
    let opened = gate.opened();
    assert!((20..40).contains(&opened), "{opened} connections for {SERVICES} services");
}

#[tokio::test]
async fn a_re_read_of_etcd_v3_opens_no_connection_and_logs_in_nobody() {
    let etcd = Etcd::with("http", &[]).await;
    for n in 0..SERVICES {
        let key = format!("/services/s{n}/a");
        etcd.v3().await.put(key, "10.0.0.1:80", None).await.unwrap();
    }
    with_users(&etcd).await;
    let gate = Gate::before(&etcd.address()).await;
    let uri = format!("etcd3://{}", gate.address());
    read_again(&uri, "/services/s", &as_web()).await;
    // All of them are followed on one connection.
    assert_eq!(gate.opened(), 1);
    assert_eq!(etcd.calls("Authenticate").await, 1.0);
    assert_eq!(etcd.calls("Watch").await, 1.0);
}

#[tokio::test]
async fn a_re_read_of_etcd_v2_keeps_the_connections() {
    let etcd = Etcd::both().await;
    for n in 0..SERVICES {
        etcd.v2_set(&format!("/services/s{n}/a"), "10.0.0.1:80").await;
    }
    let gate = Gate::before(&etcd.address()).await;
    let uri = format!("etcd2://{}", gate.address());
    read_again(&uri, "/services/s", &settings()).await;
    few_were_opened(&gate);
}

#[tokio::test]
async fn a_re_read_of_consul_keeps_the_connections() {
    let consul = Consul::start().await;
    for n in 0..SERVICES {
        let service = json!({ "Name": format!("s{n}"), "Address": "10.0.0.1", "Port": 80 });
        consul.put("/v1/agent/service/register", service).await;
    }
    let gate = Gate::before(&consul.address()).await;
    let uri = format!("consul://{}", gate.address());
    read_again(&uri, "s", &settings()).await;
    few_were_opened(&gate);
}

#[tokio::test]
async fn what_nobody_follows_is_watched_no_more_and_the_rest_is() {
    let etcd = Etcd::with("http", &[]).await;
    let uri = format!("etcd3://{}", etcd.address());
    let discoveries = Discoveries::parse(&[uri], &settings()).unwrap();
    let follow = |n| Followed::of(&discoveries, &format!("/services/s{n};80"));
    let mut all: Vec<_> = (0..3 * SERVICES).map(follow).collect();
    // A branch has two watches: one for its own key, and one for the keys below it.
    let watches = async |branches: usize| {
        let expected = 2 * branches;
        let are = async || (etcd.watches().await == expected as f64).then_some(());
        retry("etcd", are).await;
    };
    watches(3 * SERVICES).await;
    all.truncate(1);
    watches(1).await;
    etcd.v3().await.put("/services/s0/a", "10.0.0.1:80", None).await.unwrap();
    assert_eq!(all[0].sees(&["10.0.0.1:80"]).await.failures, 0);
    assert_eq!(etcd.calls("Watch").await, 1.0);
}

/// A range that a user may not read only affects its own query.
#[tokio::test]
async fn what_may_not_be_read_disturbs_nothing_else() {
    let etcd = Etcd::with("http", &[]).await;
    etcd.v3().await.put("/services/web/a", "10.0.0.1:80", None).await.unwrap();
    with_users(&etcd).await;
    let gate = Gate::before(&etcd.address()).await;
    let uri = format!("etcd3://{}", gate.address());
    let discoveries = Discoveries::parse(&[uri], &as_web()).unwrap();
    let web = Followed::of(&discoveries, "/services/web;80");
    web.sees(&["10.0.0.1:80"]).await;
    let secret = Followed::of(&discoveries, "/secret;80");
    secret.until("three refusals", |known| known.failures > 2).await;
    assert_eq!(list(&secret.fails("permission denied").await), None);
    root(&etcd).await.put("/services/web/a", "10.0.0.2:80", None).await.unwrap();
    assert_eq!(web.sees(&["10.0.0.2:80"]).await.failures, 0);
    assert_eq!((gate.opened(), etcd.calls("Watch").await), (1, 1.0));
}

/// Such a token expires at a fixed time, even if it is used, and a stream keeps the token with which it was opened.
#[tokio::test]
async fn an_expired_token_is_renewed_once_for_all() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name).display().to_string();
    for arguments in [
        format!("genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -out {}", file("key.pem")),
        format!("pkey -in {} -pubout -out {}", file("key.pem"), file("pub.pem")),
    ] {
        let output = std::process::Command::new("openssl").args(arguments.split(' ')).output();
        assert!(output.unwrap().status.success(), "openssl {arguments}");
    }
    let (public, private) = (file("pub.pem"), file("key.pem"));
    let tokens = format!("jwt,pub-key={public},priv-key={private},sign-method=RS256,ttl=4s");
    let etcd = Etcd::with("http", &["--auth-token", &tokens]).await;
    let write = async |service: usize, endpoint: &str| {
        let key = format!("/services/s{service}/a");
        root(&etcd).await.put(key, endpoint, None).await.unwrap();
    };
    with_users(&etcd).await;
    let gate = Gate::before(&etcd.address()).await;
    let uri = format!("etcd3://{}", gate.address());
    let discoveries = Discoveries::parse(&[uri], &as_web()).unwrap();
    let follow = |n| (n, Followed::of(&discoveries, &format!("/services/s{n};80")));
    let mut all = BTreeMap::from([follow(0), follow(1)]);
    for followed in all.values() {
        followed.sees(&[]).await;
    }
    tokio::time::sleep(Duration::from_secs(5)).await;
    let before = etcd.calls("Authenticate").await;
    all.extend([2, 3, 4, 5].map(follow));
    for followed in all.values() {
        followed.sees(&[]).await;
    }
    assert_eq!(etcd.calls("Authenticate").await - before, 1.0);
    // Earlier watches continue, and later ones work too.
    for (n, followed) in &all {
        write(*n, "10.0.0.1:80").await;
        assert_eq!(followed.sees(&["10.0.0.1:80"]).await.failures, 0, "service {n}");
    }
    assert_eq!((gate.opened(), etcd.calls("Watch").await), (1, 2.0));
}

/// Therefore an etcd is known to answer even if its login may read only some services, before any of those is queried.
#[tokio::test]
async fn a_refusal_of_one_query_is_told_from_a_registry_that_does_not_answer() {
    let etcd = Etcd::with("http", &[]).await;
    with_users(&etcd).await;
    let uri = format!("etcd://{}", etcd.address());
    let refused = Followed::with(&uri, &as_web(), "elsewhere;80").fails("permission denied").await;
    assert!(refused.refused && refused.value.is_none(), "{refused:?}");
    let nobody = Followed::new("etcd://127.0.0.1:1", "elsewhere;80").fails("127.0.0.1:1").await;
    assert!(!nobody.refused, "{nobody:?}");
}
