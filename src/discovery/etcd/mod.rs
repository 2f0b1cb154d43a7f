//! etcd: the instances of a service are the keys at and below a branch, in either of etcd's two stores.
//!
//! `etcd2://` and `etcd3://` select the store. `etcd://` looks into both: if anything is at or below the branch in the v3
//! store, the branch is followed there. Otherwise it is followed in the v2 store, while the v3 store is watched for the
//! branch to appear. An empty result is reported only after all stores of this server were empty. The server is asked which
//! stores it has: etcd 2 has no v3 store; since 3.4 the v2 store is off by default, and since 3.6 it does not exist. A port
//! that only speaks gRPC has only the v3 store.

use std::{future::pending, pin::pin, sync::Arc, time::Duration};

use futures_util::{FutureExt, future::BoxFuture};
use tokio::time::{Instant, sleep_until, timeout};
use url::Url;

use super::{Endpoints, EtcdSettings, Query, missing};
use crate::{
    body,
    model::{ServiceName, Tags},
    registry::etcd::{self, Branch, EtcdClient, Step, Tree, v2, v3},
    source::{Publisher, Resync, Source, SourceError},
};

pub(crate) mod value;

/// An etcd cluster.
#[derive(Debug, Clone)]
pub struct Etcd {
    pub(super) client: Arc<EtcdClient>,
    pub(super) api: Api,
}

/// The store: v2 or v3.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Api {
    /// v3 if the branch exists there, otherwise v2.
    Any,
    V2,
    V3,
}

impl Etcd {
    pub(super) fn new(members: Vec<Url>, api: Api, flags: &EtcdSettings) -> Result<Self, String> {
        Ok(Self { client: Arc::new(EtcdClient::new(members, flags)?), api })
    }

    pub fn source(self, query: Query) -> EtcdSource {
        let branch = Branch::new(query.service.as_str());
        EtcdSource { etcd: self, branch, tags: query.tags }
    }
}

/// The branch of one service in etcd.
#[derive(Debug)]
pub struct EtcdSource {
    etcd: Etcd,
    branch: Branch,
    tags: Tags,
}

/// The pause before the next read, as a multiple of the time that reading the branch takes.
const SHARE: u32 = 10;

impl Source for EtcdSource {
    type Item = Endpoints;

    async fn session(
        &mut self,
        publish: &Publisher<Endpoints>,
        resync: &mut Resync,
    ) -> Result<(), SourceError> {
        let this = &*self;
        let mut stores = this.stores().boxed().await?;
        let (mut is_new, mut next) = (false, Instant::now());
        // An empty answer whose reason is still being looked for. An answer with entries does not wait for that.
        let mut reasonless: Option<(Endpoints, BoxFuture<'_, Option<String>>)> = None;
        loop {
            if is_new && Instant::now() >= next {
                let (endpoints, took) = this.read(stores.tree()).boxed().await;
                is_new = false;
                // A branch that changes all the time uses a tenth of the time, so that others have the rest.
                next = Instant::now() + SHARE * took;
                if stores.tree().is_empty() && matches!(stores, FollowedStores::V3 { .. }) {
                    let looking = reasonless.take().map(|(_, looking)| looking);
                    let looking = looking.unwrap_or_else(|| this.near().boxed());
                    reasonless = Some((endpoints, looking));
                } else {
                    reasonless = None;
                    publish.publish(endpoints);
                }
            }
            let reason = async {
                match &mut reasonless {
                    Some((_, looking)) => looking.await,
                    None => pending().await,
                }
            };
            tokio::select! {
                read = stores.next(this) => match read? {
                    true => is_new = true,
                    false if !is_new && reasonless.is_none() => publish.confirm(),
                    false => {}
                },
                reason = reason => {
                    if let Some((mut endpoints, _)) = reasonless.take() {
                        endpoints.problem = reason.map(Into::into).or(endpoints.problem);
                        publish.publish(endpoints);
                    }
                }
                () = sleep_until(next), if is_new => {}
                () = resync.due() => stores.read_again(),
            }
        }
    }
}

impl EtcdSource {
    /// The endpoints of a branch, and the time it took to read them, without waiting for a thread.
    async fn read(&self, tree: &Tree) -> (Endpoints, Duration) {
        let timed = |tree: &Tree, tags: &Tags| {
            let start = Instant::now();
            (value::endpoints(tree, tags), start.elapsed())
        };
        if !body::is_large(tree.bytes()) {
            return timed(tree, &self.tags);
        }
        let (tree, tags) = (tree.clone(), self.tags.clone());
        self.etcd.client.places().aside(tree.bytes(), move || timed(&tree, &tags)).await
    }

    /// How long an empty branch waits for similar names.
    const NEAR: Duration = Duration::from_secs(2);
    /// Number of levels above the branch that are searched for similar names.
    const LEVELS: usize = 4;

    /// The problem that there is no entry, with similar names in the v3 store, if there are any.
    async fn near(&self) -> Option<String> {
        let looking = async {
            for (name, above) in self.branch.levels().into_iter().take(Self::LEVELS) {
                let names = self.etcd.client.names_below(&above).await?;
                let near = missing::near(&name, names.iter().map(String::as_str));
                // Keys without entries of services are not suggested.
                let mut meant = Vec::new();
                for name in near {
                    let values = self.etcd.client.some_values(&Branch::new(name)).await?;
                    if values.iter().any(|value| value::is_entry(value)) {
                        meant.push(name);
                    }
                }
                if !meant.is_empty() {
                    return Some(missing::with_near(value::NO_ENTRY, &meant));
                }
                if !names.is_empty() {
                    break;
                }
            }
            None
        };
        timeout(Self::NEAR, looking).await.ok()?
    }

    async fn stores(&self) -> Result<FollowedStores, SourceError> {
        let Etcd { client, api } = &self.etcd;
        let v3 = |looks_into_v2| FollowedStores::V3 {
            v3: client.v3(&self.branch),
            v2: None,
            looks_into_v2,
        };
        match api {
            Api::V3 => Ok(v3(false)),
            Api::V2 => Ok(FollowedStores::V2(client.v2(&self.branch)?)),
            Api::Any => match client.stores().await? {
                etcd::Stores::V2 => Ok(FollowedStores::V2(client.v2(&self.branch)?)),
                etcd::Stores::V3 => Ok(v3(false)),
                etcd::Stores::Both => Ok(v3(true)),
            },
        }
    }
}

/// The stores in which the branch is currently followed.
enum FollowedStores {
    V2(v2::BranchFollower),
    /// With `v2`: the branch is empty in v3.
    V3 {
        v3: v3::BranchFollower,
        v2: Option<v2::BranchFollower>,
        looks_into_v2: bool,
    },
}

impl FollowedStores {
    /// The keys in the store that is used.
    fn tree(&self) -> &Tree {
        match self {
            Self::V2(v2) | Self::V3 { v2: Some(v2), .. } => v2.tree(),
            Self::V3 { v3, .. } => v3.tree(),
        }
    }

    /// Waits until the branch was read or has changed (true), or was confirmed as unchanged. Cancel-safe.
    async fn next(&mut self, of: &EtcdSource) -> Result<bool, SourceError> {
        let client = &of.etcd.client;
        loop {
            match self {
                Self::V2(v2) => match v2.next().await? {
                    Step::NoSuchStore => return Err(client.no_v2()),
                    step => return Ok(step == Step::Read),
                },
                Self::V3 { v3, v2: v2 @ None, looks_into_v2 } => {
                    let read = v3.next().await? == Step::Read;
                    if read && *looks_into_v2 && v3.tree().is_empty() {
                        *v2 = Some(client.v2(&of.branch)?);
                        continue;
                    }
                    return Ok(read);
                }
                Self::V3 { v3, v2: slot, looks_into_v2 } => {
                    if let Some(v2) = slot {
                        // A question to v2 continues while v3 keeps confirming that it is empty.
                        let mut v2_next = pin!(v2.next());
                        loop {
                            tokio::select! {
                                step = v3.next() => {
                                    step?;
                                    if !v3.tree().is_empty() {
                                        break;
                                    }
                                }
                                step = &mut v2_next => match step? {
                                    Step::NoSuchStore => {
                                        *looks_into_v2 = false;
                                        break;
                                    }
                                    step => return Ok(step == Step::Read),
                                },
                            }
                        }
                    }
                    *slot = None;
                    return Ok(true);
                }
            }
        }
    }

    /// Makes the next step a full read.
    fn read_again(&mut self) {
        match self {
            Self::V2(v2) => v2.read_again(),
            Self::V3 { v3, v2, .. } => {
                v3.read_again();
                if let Some(v2) = v2 {
                    v2.read_again();
                }
            }
        }
    }
}

/// The normalised name of a branch: slashes at the end do not matter, so both forms share one watch. A slash at the start
/// matters in the v3 store.
pub(super) fn branch(service: &ServiceName) -> ServiceName {
    ServiceName::new(service.as_str().trim_end_matches('/')).unwrap_or_else(|| service.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        discovery::{Discoveries, Discovery, Options},
        docker::Engine,
        source::{ResyncRequests, follow},
    };

    /// There may be ten thousand of them, and each waits nearly all the time.
    #[test]
    fn a_branch_is_followed_by_a_small_future() {
        let settings = Options {
            healthy_only: true,
            docker: Engine::parse("unix:///nonexistent", None).unwrap(),
            consul: Default::default(),
            etcd: Default::default(),
        };
        let uri = "etcd://127.0.0.1:1".to_owned();
        let discoveries = Discoveries::parse(&[uri], &settings).unwrap();
        let query = discoveries.query(&"/a;80".parse().unwrap()).unwrap();
        let Some(Discovery::Etcd(etcd)) = discoveries.by_name.get(&query.via).cloned() else {
            panic!("it is etcd")
        };
        let (publish, _answers) = Publisher::new(Default::default());
        let resync = ResyncRequests::new(Duration::from_secs(60)).subscribe();
        let size = size_of_val(&follow("a", etcd.source(query), publish, resync));
        assert!(size <= 4_096, "{size} bytes");
    }

    #[test]
    fn a_branch_with_slashes_at_its_end_is_no_other() {
        for (text, expected) in [("/a/b/", "/a/b"), ("/a//", "/a"), ("a", "a"), ("/", "/")] {
            let service = ServiceName::new(text).unwrap();
            assert_eq!(branch(&service).as_str(), expected);
        }
    }
}
