//! etcd: the instances of a service are the keys at and below a branch, in either of etcd's two stores.
//!
//! `etcd2://` and `etcd3://` name the store. `etcd://` looks into both: the branch is followed in the v3 store where
//! there is anything at or below it, and otherwise in the v2 store, while the v3 store is watched for the branch to
//! appear there. "There is nothing" is said only once every store that this etcd has said so. Where a branch that was
//! found in v3 becomes empty, both are read anew. Which stores there are is asked of the server: etcd 2 has no v3
//! store; from 3.4 on the v2 store is off unless asked for, and from 3.6 on it is gone.
//!
//! A session speaks to one member; after a failure the next session goes to the next member.

use url::Url;

use super::{Endpoints, EtcdSettings, Query, Secret};
use crate::{
    model::{ServiceName, Tags},
    source::{Publisher, Resync, Source, SourceError},
    tls::ClientTls,
};

pub(crate) mod v2;
mod v3;
pub(crate) mod value;

use v2::V2;
use v3::V3;
use value::Tree;

/// An etcd cluster.
#[derive(Debug, Clone)]
pub struct Etcd {
    /// At least one; `https` where TLS is used.
    pub(super) members: Vec<Url>,
    pub(super) api: Api,
    tls: ClientTls,
    user: Option<(String, Secret)>,
}

/// Which of the two stores is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Api {
    /// v3 where the branch is found there, else v2.
    Any,
    V2,
    V3,
}

impl Etcd {
    pub(super) fn new(members: Vec<Url>, api: Api, flags: &EtcdSettings) -> Result<Self, String> {
        let tls = ClientTls::new(
            flags.ca.clone(),
            flags.certificate.clone(),
            flags.key.clone(),
            ["-etcd-cacert", "-etcd-cert", "-etcd-keycert"],
        )?;
        Ok(Self { members, api, tls, user: flags.user.clone() })
    }

    pub fn source(self, query: Query) -> EtcdSource {
        // Many hosts do not all begin with the same member.
        let member = fastrand::usize(..self.members.len().max(1));
        let branch = Branch(query.service.as_str().to_owned());
        EtcdSource { etcd: self, branch, tags: query.tags, member }
    }
}

/// The branch of one service in etcd.
#[derive(Debug)]
pub struct EtcdSource {
    etcd: Etcd,
    branch: Branch,
    tags: Tags,
    /// The member that the next session asks, counted round.
    member: usize,
}

impl Source for EtcdSource {
    type Item = Endpoints;

    async fn session(
        &mut self,
        publish: &Publisher<Endpoints>,
        resync: &mut Resync,
    ) -> Result<(), SourceError> {
        tokio::select! {
            end = self.session_until_failure(publish) => end,
            () = resync.due() => Ok(()),
        }
    }
}

impl EtcdSource {
    async fn session_until_failure(
        &mut self,
        publish: &Publisher<Endpoints>,
    ) -> Result<(), SourceError> {
        let end = match self.etcd.api {
            Api::V2 => self.follow_v2(publish).await,
            Api::V3 => self.follow_v3(publish).await,
            Api::Any => self.follow_any(publish).await,
        };
        if end.is_err() {
            self.member = self.member.wrapping_add(1);
        }
        end
    }
}

impl EtcdSource {
    async fn follow_v2(&self, publish: &Publisher<Endpoints>) -> Result<(), SourceError> {
        let mut v2 = self.v2()?;
        loop {
            match v2.next().await? {
                Step::Changed => self.publish(publish, v2.tree()),
                Step::Unchanged => publish.confirm(),
                Step::Over => return Ok(()),
                Step::NoSuchStore => return Err(v2.no_such_store()),
            }
        }
    }

    async fn follow_v3(&self, publish: &Publisher<Endpoints>) -> Result<(), SourceError> {
        let mut v3 = self.v3().await?;
        loop {
            match v3.next().await? {
                Step::Changed => self.publish(publish, v3.tree()),
                Step::Unchanged => publish.confirm(),
                Step::Over | Step::NoSuchStore => return Ok(()),
            }
        }
    }

    async fn follow_any(&self, publish: &Publisher<Endpoints>) -> Result<(), SourceError> {
        let mut v2 = self.v2()?;
        if !v2.server_has_v3().await? {
            return self.follow_v2(publish).await;
        }
        let mut v3 = self.v3().await?;
        let mut step = v3.next().await?;
        if v3.tree().is_empty() {
            step = self.follow_both(&mut v2, &mut v3, publish).await?;
        }
        // The branch is in v3, until it is not.
        loop {
            match step {
                Step::Changed if !v3.tree().is_empty() => self.publish(publish, v3.tree()),
                Step::Unchanged => publish.confirm(),
                Step::Changed | Step::Over | Step::NoSuchStore => return Ok(()),
            }
            step = v3.next().await?;
        }
    }

    /// Follows v2, until something appears in v3: returns the step of v3 that brought it.
    async fn follow_both(
        &self,
        v2: &mut V2,
        v3: &mut V3,
        publish: &Publisher<Endpoints>,
    ) -> Result<Step, SourceError> {
        let has_v2 = v2.next().await? != Step::NoSuchStore;
        self.publish(publish, v2.tree());
        loop {
            tokio::select! {
                step = v3.next() => match step? {
                    Step::Unchanged if has_v2 => {}
                    Step::Unchanged => publish.confirm(),
                    step => return Ok(step),
                },
                step = v2.next(), if has_v2 => match step? {
                    Step::Changed => self.publish(publish, v2.tree()),
                    Step::Unchanged => publish.confirm(),
                    step => return Ok(step),
                },
            }
        }
    }

    fn publish(&self, publish: &Publisher<Endpoints>, tree: &Tree) {
        publish.publish(tree.endpoints(&self.tags));
    }

    fn v2(&self) -> Result<V2, SourceError> {
        V2::new(self.member(), &self.branch, &self.etcd)
    }

    async fn v3(&self) -> Result<V3, SourceError> {
        V3::connect(self.member(), &self.branch, &self.etcd).await
    }

    fn member(&self) -> &Url {
        &self.etcd.members[self.member % self.etcd.members.len()]
    }
}

/// A branch as it is asked for: with and without slashes at its end it is the same, and has one watch. One at its start
/// means something in the v3 store.
pub(super) fn branch(service: &ServiceName) -> ServiceName {
    ServiceName::new(service.as_str().trim_end_matches('/')).unwrap_or_else(|| service.clone())
}

/// How a store's tree came on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// It was read for the first time, or is another than before.
    Changed,
    /// It was confirmed as it is.
    Unchanged,
    /// It cannot be followed from here any more, and is to be read anew by a new session.
    Over,
    /// This server has no such store.
    NoSuchStore,
}

/// A branch as a descriptor writes it. Slashes at its end mean nothing, and none at its start means what one does.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Branch(String);

impl Branch {
    fn trimmed(&self) -> &str {
        self.0.trim_matches('/')
    }

    /// The parts of the key in the v2 store, where each key begins with a slash.
    fn segments(&self) -> Result<Vec<&str>, SourceError> {
        let segments: Vec<_> = self.trimmed().split('/').filter(|part| !part.is_empty()).collect();
        // They would climb out of the branch.
        if segments.iter().any(|&part| part == "." || part == "..") {
            return Err(SourceError::new(format_args!(
                "branch {:?}: expected no part to be . or ..",
                self.0
            )));
        }
        Ok(segments)
    }

    /// The keys, without a slash at the end, at and below which the v3 store is read. There a key need not begin with
    /// a slash: a branch that was written without one is looked for in both forms.
    fn roots(&self) -> Vec<String> {
        let trimmed = self.trimmed();
        if trimmed.is_empty() {
            return vec![String::new()];
        }
        let absolute = format!("/{trimmed}");
        if self.0.starts_with('/') { vec![absolute] } else { vec![absolute, trimmed.to_owned()] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slashes_around_a_branch_mean_nothing() {
        for text in ["/services/app1", "/services/app1/", "services/app1", "services/app1//"] {
            let branch = Branch(text.to_owned());
            assert_eq!(branch.segments().unwrap(), ["services", "app1"], "{text}");
            assert_eq!(branch.roots()[0], "/services/app1", "{text}");
        }
        assert_eq!(Branch("/a".into()).roots(), ["/a"]);
        assert_eq!(Branch("a".into()).roots(), ["/a", "a"]);
        assert_eq!(Branch("/".into()).roots(), [""]);
        assert_eq!(Branch("/".into()).segments().unwrap(), [""; 0]);
    }

    #[test]
    fn a_branch_with_slashes_at_its_end_is_no_other() {
        for (text, expected) in [("/a/b/", "/a/b"), ("/a//", "/a"), ("a", "a"), ("/", "/")] {
            let service = ServiceName::new(text).unwrap();
            assert_eq!(branch(&service).as_str(), expected);
        }
    }

    #[test]
    fn a_branch_cannot_climb() {
        for text in ["/services/../secret", "..", "/a/./b"] {
            assert!(Branch(text.to_owned()).segments().is_err(), "{text}");
        }
    }
}
