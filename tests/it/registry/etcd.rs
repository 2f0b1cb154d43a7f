//! etcd, in both of its stores.

use std::time::Duration;

use embassy::{
    discovery::{Discoveries, EtcdSettings, Options},
    source::ResyncRequests,
};
use etcd_client::{DeleteOptions, Permission, PutOptions};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
};

use super::{
    Followed, SOON,
    gate::Gate,
    healthy::{as_web, root, with_users},
    list, rejected,
    servers::Etcd,
    settings,
};

const DOCUMENT: &str = r#"{ "ipaddress": "10.0.0.2", "host_port": "81", "tags": ["prod"] }"#;

#[tokio::test]
async fn v3_follows_what_is_added_changed_and_removed() {
    let etcd = Etcd::with("http", &[]).await;
    let mut v3 = etcd.v3().await;
    let web = Followed::new(&format!("etcd3://{}", etcd.address()), "/services/web;80");
    web.sees(&[]).await;
    v3.put("/services/web/a", "10.0.0.1:80", None).await.unwrap();
    web.sees(&["10.0.0.1:80"]).await;
    v3.put("/services/web/b/c", DOCUMENT, None).await.unwrap();
    web.sees(&["10.0.0.1:80", "10.0.0.2:81"]).await;
    v3.put("/services/web/a", "10.0.0.3:80", None).await.unwrap();
    web.sees(&["10.0.0.2:81", "10.0.0.3:80"]).await;
    // Keys that are not below the branch, although their names begin like it.
    v3.put("/services/web10/x", "10.0.0.9:80", None).await.unwrap();
    v3.put("/services/web-x", "10.0.0.9:80", None).await.unwrap();
    v3.put("/services/web", "[fd00::4]:80", None).await.unwrap();
    web.sees(&["10.0.0.2:81", "10.0.0.3:80", "[fd00::4]:80"]).await;
    v3.delete("/services/", Some(DeleteOptions::new().with_prefix())).await.unwrap();
    web.sees(&[]).await;
}

/// Sets keys of `/services/web`, each to another address.
async fn fill(v3: &mut etcd_client::Client, numbers: std::ops::Range<u32>) {
    let put = |n: u32| {
        let value = format!("{}:80", std::net::Ipv4Addr::from(0x0a00_0000 + n));
        etcd_client::TxnOp::put(format!("/services/web/{n:06}"), value, None)
    };
    let numbers: Vec<_> = numbers.collect();
    // As many as a server accepts at a time.
    for some in numbers.chunks(128) {
        let puts: Vec<_> = some.iter().map(|n| put(*n)).collect();
        v3.txn(etcd_client::Txn::new().and_then(puts)).await.unwrap();
    }
}

#[tokio::test]
async fn v3_reads_a_large_branch_page_by_page_and_as_much_of_it_as_there_is_room_for() {
    let etcd = Etcd::with("http", &[]).await;
    let mut v3 = etcd.v3().await;
    fill(&mut v3, 0..2500).await;
    let uri = format!("etcd3://{}", etcd.address());
    let web = Followed::new(&uri, "/services/web;80");
    let sees = |count: usize| {
        let wanted = format!("{count} endpoints");
        let web = &web;
        async move {
            let is_all = |known: &embassy::source::Known<embassy::discovery::Endpoints>| {
                known.value.as_ref().is_some_and(|value| value.list.len() == count)
            };
            web.until(&wanted, is_all).await
        }
    };
    let known = sees(2500).await;
    assert_eq!(list(&known).unwrap()[2499], "10.0.9.195:80");
    // The next page is read too, and changes in earlier pages are seen.
    v3.delete("/services/web/001500", None).await.unwrap();
    sees(2499).await;
    v3.put("/services/web/large", "x".repeat(100 << 10), None).await.unwrap();
    let known = web.until("one is skipped", |known| !rejected(known).is_empty()).await;
    let reason = "/services/web/large: longer than 65536 bytes: expected JSON or address:port";
    assert_eq!(rejected(&known), [reason]);

    fill(&mut v3, 2500..20_200).await;
    let anew = Followed::new(&uri, "/services/web;80");
    let known = anew.until("a cut branch", |known| list(known).is_some()).await;
    let value = known.value.unwrap();
    assert_eq!((value.list.len(), value.left_out), (10_000, 10_000));
    let problem = "the branch has more than 20000 keys, or too many bytes";
    assert_eq!(value.problem.as_deref(), Some(problem));
}

#[tokio::test]
async fn v3_leases_that_expire_are_followed() {
    let etcd = Etcd::with("http", &[]).await;
    let mut v3 = etcd.v3().await;
    let web = Followed::new(&format!("etcd3://{}", etcd.address()), "/services/web;80");
    let lease = v3.lease_grant(1, None).await.unwrap().id();
    v3.put("/services/web/a", "10.0.0.1:80", None).await.unwrap();
    let options = PutOptions::new().with_lease(lease);
    v3.put("/services/web/b", "10.0.0.2:80", Some(options)).await.unwrap();
    web.sees(&["10.0.0.1:80", "10.0.0.2:80"]).await;
    web.sees(&["10.0.0.1:80"]).await;
}

#[tokio::test]
async fn v3_keys_may_begin_without_a_slash() {
    let etcd = Etcd::with("http", &[]).await;
    let mut v3 = etcd.v3().await;
    let web = Followed::new(&format!("etcd3://{}", etcd.address()), "services/web/;80");
    v3.put("services/web/a", "10.0.0.1:80", None).await.unwrap();
    web.sees(&["10.0.0.1:80"]).await;
    v3.put("/services/web/a", "10.0.0.2:80", None).await.unwrap();
    web.sees(&["10.0.0.1:80", "10.0.0.2:80"]).await;
    v3.delete("services/web/a", None).await.unwrap();
    web.sees(&["10.0.0.2:80"]).await;
}

#[tokio::test]
async fn v2_follows_what_is_added_changed_and_removed() {
    let etcd = Etcd::both().await;
    let web = Followed::new(&format!("etcd2://{}", etcd.address()), "/services/web;80");
    // An empty branch is a valid answer, and the first registration is seen.
    web.sees(&[]).await;
    etcd.v2_set("/services/web/a", "10.0.0.1:80").await;
    web.sees(&["10.0.0.1:80"]).await;
    etcd.v2_set("/services/web/b/c", DOCUMENT).await;
    web.sees(&["10.0.0.1:80", "10.0.0.2:81"]).await;
    etcd.v2_set("/services/web10/x", "10.0.0.9:80").await;
    // update, compareAndSwap, create, compareAndDelete
    etcd.v2("PUT", "/services/web/a", &[("value", "10.0.0.3:80"), ("prevExist", "true")]).await;
    web.sees(&["10.0.0.2:81", "10.0.0.3:80"]).await;
    let swap = [("value", "10.0.0.4:80"), ("prevValue", "10.0.0.3:80")];
    etcd.v2("PUT", "/services/web/a", &swap).await;
    web.sees(&["10.0.0.2:81", "10.0.0.4:80"]).await;
    etcd.v2("POST", "/services/web/d", &[("value", "10.0.0.5:80")]).await;
    web.sees(&["10.0.0.2:81", "10.0.0.4:80", "10.0.0.5:80"]).await;
    etcd.v2("DELETE", "/services/web/a", &[("prevValue", "10.0.0.4:80")]).await;
    web.sees(&["10.0.0.2:81", "10.0.0.5:80"]).await;
    etcd.v2("DELETE", "/services/web/b/c", &[]).await;
    web.sees(&["10.0.0.5:80"]).await;
    // Deleting a directory above the branch deletes everything in it.
    etcd.v2("DELETE", "/services", &[("recursive", "true")]).await;
    web.sees(&[]).await;
    etcd.v2_set("/services/web/a", "10.0.0.1:80").await;
    web.sees(&["10.0.0.1:80"]).await;
}

#[tokio::test]
async fn v2_keys_and_directories_that_expire_are_followed() {
    let etcd = Etcd::both().await;
    let web = Followed::new(&format!("etcd2://{}", etcd.address()), "services/web;80");
    etcd.v2_set("/services/web/a", "10.0.0.1:80").await;
    etcd.v2("PUT", "/services/web/b", &[("value", "10.0.0.2:80"), ("ttl", "1")]).await;
    etcd.v2("PUT", "/services/web/dir", &[("dir", "true"), ("ttl", "2")]).await;
    etcd.v2_set("/services/web/dir/c", "10.0.0.3:80").await;
    web.sees(&["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"]).await;
    // A directory whose TTL is renewed keeps its content.
    let renew = [("dir", "true"), ("ttl", "2"), ("prevExist", "true")];
    etcd.v2("PUT", "/services/web/dir", &renew).await;
    web.sees(&["10.0.0.1:80", "10.0.0.3:80"]).await;
    web.sees(&["10.0.0.1:80"]).await;
}

#[tokio::test]
async fn v2_reads_the_branch_anew_when_events_are_forgotten() {
    let etcd = Etcd::both().await;
    let gate = Gate::before(&etcd.address()).await;
    let web = Followed::new(&format!("etcd2://{}", gate.address()), "/services/web;80");
    etcd.v2_set("/services/web/a", "10.0.0.1:80").await;
    web.sees(&["10.0.0.1:80"]).await;
    gate.close_after("10.0.0.2:80");
    etcd.v2_set("/services/web/b", "10.0.0.2:80").await;
    gate.closed().await;
    // The server keeps 1,000 events.
    etcd.v2_set("/services/web/a", "10.0.0.3:80").await;
    let others = (0..11).map(|i| {
        let (etcd, key) = (&etcd, format!("/elsewhere/{i}"));
        async move {
            for _ in 0..100 {
                etcd.v2_set(&key, "x").await;
            }
        }
    });
    futures_util::future::join_all(others).await;
    gate.open();
    let after = web.sees(&["10.0.0.2:80", "10.0.0.3:80"]).await;
    assert_eq!(after.failures, 0, "it is no failure");
}

#[tokio::test]
async fn v3_reads_the_branch_anew_when_its_revision_is_compacted() {
    let etcd = Etcd::with("http", &[]).await;
    let mut v3 = etcd.v3().await;
    v3.put("/services/web/a", "10.0.0.1:80", None).await.unwrap();
    // The branch is read, and the watch does not get through.
    let gate = Gate::before(&etcd.address()).await;
    gate.close_after("10.0.0.1:80");
    let web = Followed::new(&format!("etcd3://{}", gate.address()), "/services/web;80");
    web.sees(&["10.0.0.1:80"]).await;
    gate.closed().await;
    v3.put("/services/web/b", "10.0.0.2:80", None).await.unwrap();
    v3.put("/services/web/a", "10.0.0.3:80", None).await.unwrap();
    let last = v3.put("/elsewhere", "x", None).await.unwrap().header().unwrap().revision();
    v3.compact(last, None).await.unwrap();
    gate.open();
    let after = web.sees(&["10.0.0.2:80", "10.0.0.3:80"]).await;
    assert_eq!(after.failures, 0, "it is no failure");
}

#[tokio::test]
async fn either_store_is_found_and_followed() {
    let etcd = Etcd::both().await;
    let mut v3 = etcd.v3().await;
    let uri = format!("etcd://{}", etcd.address());
    let web = Followed::new(&uri, "/services/web;80");
    web.sees(&[]).await;
    etcd.v2_set("/services/web/a", "10.0.0.2:80").await;
    web.sees(&["10.0.0.2:80"]).await;
    etcd.v2_set("/services/web/b", "10.0.0.22:80").await;
    web.sees(&["10.0.0.2:80", "10.0.0.22:80"]).await;
    // v3 is preferred to v2.
    v3.put("/services/web/a", "10.0.0.3:80", None).await.unwrap();
    web.sees(&["10.0.0.3:80"]).await;
    v3.put("/services/web/a", "10.0.0.33:80", None).await.unwrap();
    web.sees(&["10.0.0.33:80"]).await;
    Followed::new(&uri, "/services/web;80").sees(&["10.0.0.33:80"]).await;
    v3.delete("/services/web/a", None).await.unwrap();
    web.sees(&["10.0.0.2:80", "10.0.0.22:80"]).await;
    etcd.v2("DELETE", "/services/web", &[("recursive", "true")]).await;
    web.sees(&[]).await;
    v3.put("/services/web/a", "10.0.0.3:80", None).await.unwrap();
    web.sees(&["10.0.0.3:80"]).await;
    assert_eq!(web.known().failures, 0);
}

#[tokio::test]
async fn without_a_v2_store_v3_is_followed() {
    let etcd = Etcd::with("http", &[]).await;
    let web = Followed::new(&format!("etcd://{}", etcd.address()), "/services/web;80");
    web.sees(&[]).await;
    etcd.v3().await.put("/services/web/a", "10.0.0.3:80", None).await.unwrap();
    web.sees(&["10.0.0.3:80"]).await;
    let v2 = Followed::new(&format!("etcd2://{}", etcd.address()), "/services/web;80");
    assert_eq!(list(&v2.fails("no v2 API").await), None);
}

#[tokio::test]
async fn what_was_known_outlives_the_server_and_what_comes_after_is_followed() {
    let mut etcd = Etcd::both().await;
    etcd.v2_set("/services/web/a", "10.0.0.2:80").await;
    etcd.v3().await.put("/services/web/a", "10.0.0.3:80", None).await.unwrap();
    let v2 = Followed::new(&format!("etcd2://{}", etcd.address()), "/services/web;80");
    let v3 = Followed::new(&format!("etcd3://{}", etcd.address()), "/services/web;80");
    v2.sees(&["10.0.0.2:80"]).await;
    v3.sees(&["10.0.0.3:80"]).await;
    etcd.stop();
    let address = etcd.address();
    assert_eq!(list(&v2.fails(&address).await), Some(vec!["10.0.0.2:80".to_owned()]));
    assert_eq!(list(&v3.fails(&address).await), Some(vec!["10.0.0.3:80".to_owned()]));
    etcd.start();
    etcd.ready().await;
    etcd.v2_set("/services/web/b", "10.0.0.22:80").await;
    v2.sees(&["10.0.0.2:80", "10.0.0.22:80"]).await;
    etcd.v3().await.put("/services/web/a", "10.0.0.33:80", None).await.unwrap();
    v3.sees(&["10.0.0.33:80"]).await;
}

#[tokio::test]
async fn another_member_is_asked_where_one_is_down() {
    let etcd = Etcd::both().await;
    etcd.v2_set("/services/web/a", "10.0.0.2:80").await;
    etcd.v3().await.put("/services/web/a", "10.0.0.3:80", None).await.unwrap();
    // Loopback ports on which no program listens.
    let members = format!("127.0.0.2:1,{},127.0.0.3:1", etcd.address());
    for (scheme, endpoint) in
        [("etcd2", "10.0.0.2:80"), ("etcd3", "10.0.0.3:80"), ("etcd", "10.0.0.3:80")]
    {
        Followed::new(&format!("{scheme}://{members}"), "/services/web;80").sees(&[endpoint]).await;
    }
}

#[tokio::test]
async fn wrong_values_stand_beside_the_good_ones() {
    let etcd = Etcd::both().await;
    let mut v3 = etcd.v3().await;
    for (key, value) in
        [("a", "10.0.0.1:80"), ("b", "oops"), ("c", r#"{"ipaddress":"fury","port":1}"#)]
    {
        etcd.v2_set(&format!("/services/web/{key}"), value).await;
        v3.put(format!("/services/web/{key}"), value, None).await.unwrap();
    }
    for scheme in ["etcd2", "etcd3"] {
        let web = Followed::new(&format!("{scheme}://{}", etcd.address()), "/services/web;80");
        let known = web.sees(&["10.0.0.1:80"]).await;
        let rejected = &known.value.unwrap().rejected;
        let rejected: Vec<_> =
            rejected.iter().map(|r| format!("{}: {}", r.what, r.reason)).collect();
        assert_eq!(
            rejected,
            [
                "/services/web/b: \"oops\": expected address:port, IPv6 in brackets",
                "/services/web/c: address \"fury\": expected an IP address",
            ]
        );
    }
}

#[tokio::test]
async fn only_endpoints_with_all_tags_are_used() {
    let etcd = Etcd::with("http", &[]).await;
    let mut v3 = etcd.v3().await;
    v3.put("/services/web/a", "10.0.0.1:80", None).await.unwrap();
    v3.put("/services/web/b", DOCUMENT, None).await.unwrap();
    let uri = format!("etcd://{}", etcd.address());
    Followed::new(&uri, "/services/web[prod];80").sees(&["10.0.0.2:81"]).await;
}

/// A frozen server keeps its connections: only the missing answers show it.
#[tokio::test]
async fn a_server_that_hangs_is_noticed() {
    let etcd = Etcd::both().await;
    etcd.v2_set("/services/web/a", "10.0.0.2:80").await;
    etcd.v3().await.put("/services/web/a", "10.0.0.3:80", None).await.unwrap();
    let v2 = Followed::new(&format!("etcd2://{}", etcd.address()), "/services/web;80");
    let v3 = Followed::new(&format!("etcd3://{}", etcd.address()), "/services/web;80");
    v2.sees(&["10.0.0.2:80"]).await;
    v3.sees(&["10.0.0.3:80"]).await;
    etcd.freeze();
    let known = v3.fails("no answer within").await;
    assert_eq!(list(&known), Some(vec!["10.0.0.3:80".to_owned()]));
    let known = v2.fails("no complete answer within").await;
    assert_eq!(list(&known), Some(vec!["10.0.0.2:80".to_owned()]));
    etcd.thaw();
    v2.sees(&["10.0.0.2:80"]).await;
    v3.sees(&["10.0.0.3:80"]).await;
}

/// A member without a leader answers, but sends no events from other members.
#[tokio::test]
async fn a_member_that_has_lost_its_leader_is_noticed() {
    let [mut one, two] = Etcd::pair().await;
    two.v2_set("/services/web/a", "10.0.0.2:80").await;
    two.v3().await.put("/services/web/a", "10.0.0.3:80", None).await.unwrap();
    let v2 = Followed::new(&format!("etcd2://{}", two.address()), "/services/web;80");
    let v3 = Followed::new(&format!("etcd3://{}", two.address()), "/services/web;80");
    v2.sees(&["10.0.0.2:80"]).await;
    v3.sees(&["10.0.0.3:80"]).await;
    one.stop();
    assert_eq!(list(&v3.fails("no leader").await), Some(vec!["10.0.0.3:80".to_owned()]));
    assert_eq!(list(&v2.fails("election").await), Some(vec!["10.0.0.2:80".to_owned()]));
    one.start();
    one.ready().await;
    v2.sees(&["10.0.0.2:80"]).await;
    v3.sees(&["10.0.0.3:80"]).await;
}

#[tokio::test]
async fn v3_logs_in() {
    let etcd = Etcd::with("http", &[]).await;
    let mut v3 = etcd.v3().await;
    v3.put("/services/web/a", "10.0.0.1:80", None).await.unwrap();
    v3.user_add("root", "s3cret", None).await.unwrap();
    v3.user_grant_role("root", "root").await.unwrap();
    v3.auth_enable().await.unwrap();
    let uri = format!("etcd3://{}", etcd.address());
    Followed::new(&uri, "/services/web;80").fails("user name is empty").await;
    let log_in = |password: &str| Options {
        etcd: EtcdSettings {
            user: Some(("root".to_owned(), password.to_owned().into())),
            ..EtcdSettings::default()
        },
        ..settings()
    };
    let refused = Followed::with(&uri, &log_in("wrong"), "/services/web;80");
    refused.fails("authentication failed").await;
    let web = Followed::with(&uri, &log_in("s3cret"), "/services/web;80");
    web.sees(&["10.0.0.1:80"]).await;
}

/// `etcdctl role grant-permission web read --prefix /services/web/`, with different spellings of the branch.
#[tokio::test]
async fn v3_a_role_with_the_prefix_of_a_branch_may_follow_it() {
    let etcd = Etcd::with("http", &[]).await;
    let mut v3 = etcd.v3().await;
    for (key, value) in [
        ("/services/web/a", "10.0.0.1:80"),
        // Not below the branch: its own key, a neighbour, and the form that the role may not read.
        ("/services/web", "10.0.0.8:80"),
        ("/services/web-x/a", "10.0.0.9:80"),
        ("services/web/a", "10.0.0.7:80"),
    ] {
        v3.put(key, value, None).await.unwrap();
    }
    v3.user_add("root", "s3cret", None).await.unwrap();
    v3.user_add("web", "s3cret", None).await.unwrap();
    v3.user_grant_role("root", "root").await.unwrap();
    v3.role_add("web").await.unwrap();
    v3.user_grant_role("web", "web").await.unwrap();
    let read = |key: &str| Permission::read(key);
    v3.role_grant_permission("web", read("/services/web/").with_prefix()).await.unwrap();
    v3.auth_enable().await.unwrap();
    let mut v3 = root(&etcd).await;

    let uri = format!("etcd3://{}", etcd.address());
    let discoveries = Discoveries::parse(&[uri], &as_web()).unwrap();
    let resync = ResyncRequests::new(10 * SOON);
    let follow =
        |branch: &str| Followed::read_again_by(&discoveries, &format!("{branch};80"), &resync);
    let all = ["/services/web", "/services/web/", "services/web", "services/web/"].map(follow);
    for web in &all {
        web.sees(&["10.0.0.1:80"]).await;
    }
    v3.put("/services/web/b", "10.0.0.2:80", None).await.unwrap();
    for web in &all {
        assert_eq!(web.sees(&["10.0.0.1:80", "10.0.0.2:80"]).await.failures, 0);
    }
    // A branch of which nothing may be read is an error, and not an empty branch.
    for branch in ["/services/web-x", "services/app", "/services"] {
        let known = follow(branch).fails("permission denied").await;
        assert_eq!(list(&known), None, "{branch}");
    }
    // The last key is deleted: the empty branch is a valid answer, although the branch's own key may not be read.
    v3.delete("/services/web/", Some(DeleteOptions::new().with_prefix())).await.unwrap();
    for web in &all {
        web.sees(&[]).await;
    }
    resync.request();
    for web in &all {
        let answers = web.known().answers;
        web.until("a re-read", |known| known.answers > answers).await;
        assert_eq!(web.sees(&[]).await.failures, 0);
    }
    // Permissions granted later take effect at the next re-read, and the keys are followed from then on.
    v3.role_grant_permission("web", read("/services/web")).await.unwrap();
    resync.request();
    for web in &all {
        web.sees(&["10.0.0.8:80"]).await;
    }
    v3.put("/services/web", "10.0.0.6:80", None).await.unwrap();
    for web in &all {
        web.sees(&["10.0.0.6:80"]).await;
    }
}

#[tokio::test]
async fn a_branch_without_endpoints_says_why_and_what_may_have_been_meant() {
    let etcd = Etcd::both().await;
    let mut v3 = etcd.v3().await;
    let tagged = r#"{"ipaddress":"10.0.0.1","port":80,"tags":["prod"]}"#;
    v3.put("/services/frontend_http/a", tagged, None).await.unwrap();
    // Folders with other data, although their names are as similar.
    v3.put("/services/frontend_http-settings/timeout", "30s", None).await.unwrap();
    v3.put("/services/redis-backup/last/time", "2015-01-01", None).await.unwrap();
    for (descriptor, expected) in [
        ("/services/frontend_http;80", ""),
        (
            "/services/frontend_http[canary];80",
            "its one entry does not carry [canary]; it carries [prod]",
        ),
        (
            "/services/frontend-http;80",
            "there is no entry at or below this branch; near: /services/frontend_http",
        ),
        ("/service/frontend_http;80", "there is no entry at or below this branch; near: /services"),
        ("/services/redis;80", "there is no entry at or below this branch"),
    ] {
        for scheme in ["etcd", "etcd3"] {
            let followed = Followed::new(&format!("{scheme}://{}", etcd.address()), descriptor);
            let known = followed.until("an answer", |known| known.value.is_some()).await;
            let problem = known.value.unwrap().problem.clone();
            assert_eq!(problem.as_deref().unwrap_or_default(), expected, "{scheme} {descriptor}");
        }
    }
}

/// The usual order of a rollout: clients have their user before authentication is enabled.
#[tokio::test]
async fn a_user_is_of_no_harm_while_authentication_is_off() {
    let etcd = Etcd::both().await;
    let mut v3 = etcd.v3().await;
    v3.put("/services/web/a", "10.0.0.1:80", None).await.unwrap();
    etcd.v2_set("/services/web/a", "10.0.0.2:80").await;
    let resync = ResyncRequests::new(10 * SOON);
    let follow = |scheme: &str, settings: &Options| {
        let uri = format!("{scheme}://{}", etcd.address());
        let discoveries = Discoveries::parse(&[uri], settings).unwrap();
        Followed::read_again_by(&discoveries, "/services/web;80", &resync)
    };
    let web = follow("etcd3", &as_web());
    let either = follow("etcd", &as_web());
    let anonymous = follow("etcd3", &settings());
    follow("etcd2", &as_web()).sees(&["10.0.0.2:80"]).await;
    for one in [&web, &either, &anonymous] {
        assert_eq!(one.sees(&["10.0.0.1:80"]).await.failures, 0);
    }

    // Authentication is enabled while the branch is followed: the user logs in, and following continues.
    with_users(&etcd).await;
    resync.request();
    assert_eq!(list(&anonymous.fails("user name is empty").await).unwrap(), ["10.0.0.1:80"]);
    let mut v3 = root(&etcd).await;
    v3.put("/services/web/a", "10.0.0.3:80", None).await.unwrap();
    web.sees(&["10.0.0.3:80"]).await;
    either.sees(&["10.0.0.3:80"]).await;
    assert_eq!(list(&anonymous.known()).unwrap(), ["10.0.0.1:80"], "it may read no more");

    // Then it is disabled: the token is no longer valid.
    v3.auth_disable().await.unwrap();
    resync.request();
    etcd.v3().await.put("/services/web/a", "10.0.0.4:80", None).await.unwrap();
    for one in [&web, &either, &anonymous] {
        one.sees(&["10.0.0.4:80"]).await;
    }
    // A new client connects without a login.
    follow("etcd3", &as_web()).sees(&["10.0.0.4:80"]).await;
}

/// A port of etcd 3.5 with `--listen-client-http-urls`: it sends an HTTP/2 greeting and accepts nothing else.
async fn only_grpc(etcd: &Etcd) -> String {
    const GREETING: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];
    // The HTTP error may be seen before the greeting.
    const LATE: Duration = Duration::from_millis(100);
    let (listener, server) = (TcpListener::bind("127.0.0.1:0").await.unwrap(), etcd.address());
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let server = server.clone();
            tokio::spawn(async move {
                let mut first = [0; 3];
                tokio::select! {
                    read = client.read_exact(&mut first) => drop(read?),
                    () = tokio::time::sleep(LATE) => return client.write_all(GREETING).await,
                }
                if first == *b"PRI" {
                    client.write_all(GREETING).await?;
                    let mut server = TcpStream::connect(server).await?;
                    server.write_all(&first).await?;
                    copy_bidirectional(&mut client, &mut server).await?;
                }
                std::io::Result::Ok(())
            });
        }
    });
    address
}

#[tokio::test]
async fn a_port_that_answers_only_grpc_has_the_v3_store() {
    let etcd = Etcd::both().await;
    let port = only_grpc(&etcd).await;
    // In the v2 store, which is not available at this port.
    etcd.v2_set("/services/web/a", "10.0.0.2:80").await;
    let web = Followed::new(&format!("etcd://{port}"), "/services/web;80");
    assert_eq!(web.sees(&[]).await.failures, 0);
    etcd.v3().await.put("/services/web/a", "10.0.0.3:80", None).await.unwrap();
    assert_eq!(web.sees(&["10.0.0.3:80"]).await.failures, 0);
    let forced = Followed::new(&format!("etcd2://{port}"), "/services/web;80");
    assert_eq!(list(&forced.fails(&port).await), None);
}
