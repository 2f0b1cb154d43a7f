//! etcd: follows the keys at and below a branch, in either of its two stores, with one client for the whole cluster.
//!
//! All requests go to one member until it fails. Then all go to the next one.

use std::{
    collections::BTreeSet,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
};

use futures_util::FutureExt;
use reqwest::header::HeaderMap;
use tracing::{info, warn};
use url::Url;

use super::{
    EtcdSettings, Secret,
    http::{Http, HttpAnswer},
    reuse::{Recent, Reused},
};
use crate::{
    body::AnswerPlaces,
    source::SourceError,
    tls::{ClientTls, Weakness, is_loopback},
};

mod branch;
mod tree;
pub(crate) mod v2;
pub(crate) mod v3;

use branch::KeyRange;

pub(crate) use branch::Branch;
pub(crate) use tree::Tree;

/// The result of a step of a followed branch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// The branch was read, or has changed.
    Read,
    /// The branch was confirmed as unchanged.
    Confirmed,
    /// This server has no such store.
    NoSuchStore,
}

/// The stores that a server may have. Since etcd 3.4 the v2 store may be off, which only a request to it shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stores {
    V2,
    V3,
    Both,
}

/// The client of one etcd cluster.
pub(crate) struct EtcdClient {
    members: Members,
    tls: ClientTls,
    user: Option<(String, Secret)>,
    /// For the v2 store.
    http: Http,
    leader: Recent<()>,
    stores: Recent<Stores>,
    /// For the v3 store.
    connection: Reused<v3::MemberConnection>,
    /// Whether the user was not logged in last time, because authentication is off.
    login_is_off: AtomicBool,
}

impl EtcdClient {
    /// The cluster with these members, at least one. The scheme `https` means TLS.
    pub(crate) fn new(members: Vec<Url>, settings: &EtcdSettings) -> Result<Self, String> {
        let tls = ClientTls::new(
            settings.ca.clone(),
            settings.certificate.clone(),
            settings.key.clone(),
            ["-etcd-cacert", "-etcd-cert", "-etcd-keycert"],
        )?;
        let basic = settings.user.clone().map(|(name, password)| (name, Some(password)));
        Ok(Self {
            members: Members::new(members),
            http: Http::new("etcd", tls.clone(), true, basic),
            tls,
            user: settings.user.clone(),
            leader: Recent::default(),
            stores: Recent::default(),
            connection: Reused::default(),
            login_is_off: AtomicBool::new(false),
        })
    }

    /// The places for work on answers.
    pub(crate) fn places(&self) -> &AnswerPlaces {
        self.http.places()
    }

    pub(crate) fn members(&self) -> &[Url] {
        &self.members.urls
    }

    /// How connections to its members are unprotected.
    pub(crate) fn weaknesses(&self) -> Vec<Weakness> {
        let hosts = self.members.urls.iter().filter(|url| url.scheme() != "https");
        let hosts = hosts.filter_map(Url::host_str).filter(|host| !is_loopback(host));
        let hosts: Vec<_> = hosts.filter(|_| self.user.is_some()).collect();
        let what = format!(
            "ETCD_PASSWORD is sent to {} without TLS: everybody on the way can read it",
            hosts.join(", ")
        );
        let fix = "set -etcd-cacert (or the other TLS flags of etcd), so that TLS is used";
        if hosts.is_empty() { Vec::new() } else { vec![Weakness { what, fix }] }
    }

    /// Follows a branch in the v2 store.
    pub(crate) fn v2(self: &Arc<Self>, branch: &Branch) -> Result<v2::BranchFollower, SourceError> {
        v2::BranchFollower::new(self.clone(), branch)
    }

    /// Follows a branch in the v3 store.
    pub(crate) fn v3(self: &Arc<Self>, branch: &Branch) -> v3::BranchFollower {
        v3::BranchFollower::new(self.clone(), branch)
    }

    /// The names one level below a branch in the v3 store, as complete paths. `None` if they may not be read. If there are
    /// very many keys, only the first ones. `above` is empty, or begins with a slash and does not end with one.
    pub(crate) async fn names_below(&self, above: &str) -> Option<BTreeSet<String>> {
        let range = KeyRange::below(above);
        let keys = self.connection(&range.start).await.ok()?.keys(&range).await?;
        let name = |key: &String| {
            let name = key.strip_prefix(&range.start)?.split('/').next()?;
            (!name.is_empty()).then(|| format!("{}{name}", range.start))
        };
        Some(keys.iter().filter_map(name).collect())
    }

    /// Some of the values of a branch in the v3 store. `None` if they may not be read.
    pub(crate) async fn some_values(&self, branch: &Branch) -> Option<Vec<Vec<u8>>> {
        let mut values = Vec::new();
        for range in branch.ranges() {
            values.extend(self.connection(&range.start).await.ok()?.values(&range).await?);
        }
        Some(values)
    }

    /// The connection to a member's v3 store. Opened if there is none; then `key` is read as a test.
    async fn connection(&self, key: &str) -> Result<Arc<v3::MemberConnection>, SourceError> {
        self.connection
            .get(async {
                let (number, member) = self.members.current();
                let opened =
                    v3::MemberConnection::open(number, member, &self.tls, self.user.as_ref(), key);
                // Boxed, because the client's futures are large.
                let opened = opened.boxed().await.inspect_err(|_| self.members.failed(number))?;
                self.report_login(&opened);
                Ok(opened)
            })
            .await
    }

    /// Logs once that authentication is off, or on again.
    fn report_login(&self, opened: &v3::MemberConnection) {
        let (member, is_off) = (&*opened.member, opened.login_is_off);
        match (self.login_is_off.swap(is_off, Relaxed), is_off) {
            (false, true) => warn!(
                member,
                "etcd authentication is off; continuing without ETCD_USERNAME until it is enabled"
            ),
            (true, false) => info!(member, "etcd authentication is on; logged in"),
            _ => {}
        }
    }

    /// Makes the next caller open a connection to the next member.
    async fn lost(&self, connection: &Arc<v3::MemberConnection>) {
        self.connection.lost(connection).await;
        self.members.failed(connection.number());
    }

    /// Sends a request to the v2 store. If the member does not answer, or reports a server error, the next one is used from
    /// now on.
    async fn get(&self, path: &str, query: Option<&str>) -> Result<HttpAnswer, SourceError> {
        let (number, url) = self.url(path, query);
        let answer = self.http.get(&url, HeaderMap::new()).await;
        if answer.as_ref().map_or(true, |answer| answer.status.is_server_error()) {
            self.members.failed(number);
        }
        answer
    }

    /// The URL at the current member, and the member's number.
    fn url(&self, path: &str, query: Option<&str>) -> (usize, Url) {
        let (number, member) = self.members.current();
        let mut url = member.clone();
        url.set_path(path);
        url.set_query(query);
        (number, url)
    }
}

impl fmt::Debug for EtcdClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdClient").field("members", &self.members.urls).finish_non_exhaustive()
    }
}

/// The members of a cluster, and the current one.
struct Members {
    urls: Vec<Url>,
    /// Counts up. Modulo the number of members it is the index of the current one.
    current: AtomicUsize,
}

impl Members {
    fn new(urls: Vec<Url>) -> Self {
        // Random, so that not all hosts start with the same member.
        let current = AtomicUsize::new(fastrand::usize(..urls.len().max(1)));
        Self { urls, current }
    }

    /// The current member, and its number.
    #[expect(
        clippy::indexing_slicing,
        reason = "a URI without members is refused where it is read"
    )]
    fn current(&self) -> (usize, &Url) {
        let number = self.current.load(Relaxed);
        (number, &self.urls[number % self.urls.len()])
    }

    /// Switches to the next member if this number is still the current one: many tasks may report the same failure.
    fn failed(&self, number: usize) {
        let next = number.wrapping_add(1);
        let _ = self.current.compare_exchange(number, next, Relaxed, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failure_is_one_step_to_the_next_member() {
        let urls = ["http://a/", "http://b/"].map(|url| url.parse().unwrap());
        let members = Members::new(urls.to_vec());
        let (number, first) = members.current();
        members.failed(number);
        members.failed(number);
        let (number, second) = members.current();
        assert_ne!(first, second);
        members.failed(number);
        assert_eq!(members.current().1, first);
    }
}
