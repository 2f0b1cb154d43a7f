//! The last table, saved to disk for a start while the sources are down: the consumers, their bindings, and the endpoints.
//!
//! The file is one line, `embassy state <format> <SHA-256 of the rest, in hex>`, followed by a JSON document. Its content
//! is not trusted: consumers are served only if the kernel shows that they are still the same runs at the same addresses.
//! Endpoints are used until their discovery answers.

#![expect(clippy::disallowed_methods, reason = "reads files of the kernel, which need no disk")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use crate::{
    consumer::{Binding, Consumer},
    discovery::{Discoveries, Endpoints, Query},
    model::{ConsumerId, ContainerId, Endpoint, Process},
};

pub(crate) mod document;
mod keeper;
mod restore;
mod resume;

pub use document::{Damage, parse};
pub use keeper::{Counts, Keeper, Snapshot};
pub use restore::{Kept, Restored, restore};

/// Maximum size in bytes of a file that is written or read.
const LARGEST: u64 = 64 << 20;

/// The content of a state file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// When it was written, in seconds of Unix time.
    pub written: u64,
    pub origin: Origin,
    pub consumers: Vec<KeptConsumer>,
    pub answers: BTreeMap<Query, KeptAnswer>,
}

/// The answer of a discovery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptAnswer {
    /// When it was last confirmed, in seconds of Unix time.
    pub confirmed: u64,
    pub endpoints: Vec<KeptEndpoint>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptEndpoint {
    pub endpoint: Endpoint,
    /// If it is a container of this host: the container, and the one that owns its network, with their first processes.
    pub runs: Vec<(ContainerId, Process)>,
}

/// The origin of a table. A table of another origin is not used.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Origin {
    /// `/etc/machine-id`. Empty if there is none.
    pub machine: String,
    /// `/proc/sys/kernel/random/boot_id`: a boot ends all runs of containers.
    pub boot: String,
    /// The engine's address and the prefix of the variables. Empty with the static provider.
    pub provider: String,
    /// The URI of each discovery, by its name.
    pub discoveries: BTreeMap<Arc<str>, String>,
    /// The discoveries whose endpoints are containers of this host. Not saved.
    pub of_containers: BTreeSet<Arc<str>>,
}

/// A container, with the data to recognise it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptConsumer {
    pub id: ContainerId,
    /// The start of its run as the engine wrote it.
    pub started_at: Arc<str>,
    pub name: Arc<str>,
    /// Its first process.
    pub process: Process,
    /// The container that owns its network namespace, often itself, and that container's first process.
    pub namespace: ContainerId,
    pub namespace_process: Process,
    pub sources: Vec<IpAddr>,
    pub gateways: Vec<IpAddr>,
    pub bindings: Vec<Binding>,
}

impl Origin {
    /// This machine, and these sources.
    pub fn here(provider: String, discoveries: &Discoveries) -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let (machine, boot) = (read("/etc/machine-id"), read("/proc/sys/kernel/random/boot_id"));
        let of_containers =
            discoveries.names().filter(|via| discoveries.is_of_containers_here(via));
        Self {
            machine,
            boot,
            provider,
            discoveries: discoveries.uris().clone(),
            of_containers: of_containers.cloned().collect(),
        }
    }
}

impl KeptEndpoint {
    /// `None` if its container has ended. Without runs if it cannot be recognised by its process.
    fn of(endpoint: Endpoint, answer: &Endpoints) -> Option<Self> {
        let Some(stay) = answer.stays.get(&endpoint) else {
            return Some(Self { endpoint, runs: Vec::new() });
        };
        let runs: Option<_> =
            stay.runs.iter().map(|(id, end)| Some((id.clone(), end.process()?))).collect();
        (!stay.is_over()).then(|| Self { endpoint, runs: runs.unwrap_or_default() })
    }
}

impl KeptConsumer {
    /// `None` if saving it is useless: it has ended, its process is not visible, or it is not a container.
    fn of(consumer: &Consumer) -> Option<Self> {
        let ConsumerId::Container { id, started_at } = &consumer.id else { return None };
        if consumer.has_ended() {
            return None;
        }
        Some(Self {
            id: id.clone(),
            started_at: started_at.clone(),
            name: consumer.name.clone(),
            process: consumer.ends.first()?.process()?,
            namespace: ContainerId::new(&consumer.namespace),
            namespace_process: consumer.ends.last()?.process()?,
            sources: consumer.sources.clone(),
            gateways: consumer.gateways.clone(),
            bindings: consumer.bindings.clone(),
        })
    }
}

/// Why a document cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    #[error("it was written on another machine")]
    Foreign,
    #[error("it is {0:?} old: --state-max-age is {1:?}")]
    TooOld(Duration, Duration),
}

/// The usable part of a document.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fit {
    pub consumers: Vec<KeptConsumer>,
    /// Endpoints that are containers of this host must still be recognised by their runs.
    pub answers: BTreeMap<Query, KeptAnswer>,
}

impl Document {
    /// The part of it that may be used `here`, at `now` in seconds of Unix time. If the clock was set back, nothing counts
    /// as too old.
    pub fn fit(self, here: &Origin, now: u64, max_age: Duration) -> Result<Fit, Unfit> {
        let Origin { machine, boot, provider, discoveries, of_containers: _ } = self.origin;
        let same_boot = boot == here.boot && !boot.is_empty();
        let known = !machine.is_empty() && !here.machine.is_empty();
        if if known { machine != here.machine } else { !same_boot } {
            return Err(Unfit::Foreign);
        }
        let age = |of: u64| Duration::from_secs(now.saturating_sub(of));
        if age(self.written) > max_age {
            return Err(Unfit::TooOld(age(self.written), max_age));
        }
        let same_provider = provider == here.provider && !provider.is_empty();
        let consumers = if same_boot && same_provider { self.consumers } else { Vec::new() };
        let same: BTreeSet<_> = discoveries
            .into_iter()
            .filter(|(name, uri)| here.discoveries.get(name) == Some(uri))
            .map(|(name, _)| name)
            .collect();
        let mut answers = self.answers;
        // A reboot ends every container, and addresses are assigned again.
        answers.retain(|query, answer| {
            same.contains(&query.via)
                && (same_boot || !here.of_containers.contains(&query.via))
                && age(answer.confirmed) <= max_age
        });
        Ok(Fit { consumers, answers })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::model::ServiceName;

    const DAY: Duration = Duration::from_secs(24 * 3600);

    pub(crate) fn document() -> Document {
        let query = Query {
            via: "consul".into(),
            service: ServiceName::new("redis").unwrap(),
            tags: crate::model::Tags::new(["eu", "prod"]),
            dc: Some("dc1".into()),
            port: crate::model::Port::new(53),
        };
        let endpoints = ["10.0.0.1:6379", "[fd00::1]:6379"];
        let id = ContainerId::new("0123456789abcdef");
        Document {
            written: 1_000_000,
            origin: Origin {
                machine: "m".into(),
                boot: "b".into(),
                provider: "unix:///var/run/docker.sock BACKEND_".into(),
                discoveries: [("consul".into(), "consul://127.0.0.1:8500".into())].into(),
                of_containers: BTreeSet::new(),
            },
            consumers: vec![KeptConsumer {
                id: id.clone(),
                started_at: "2026-01-01T00:00:00Z".into(),
                name: "app".into(),
                process: Process { pid: 7, started: 11 },
                namespace: id,
                namespace_process: Process { pid: 7, started: 11 },
                sources: vec!["172.17.0.2".parse().unwrap(), "fd00::2".parse().unwrap()],
                gateways: vec!["172.17.0.1".parse().unwrap()],
                bindings: vec![Binding {
                    origin: "BACKEND_REDIS".into(),
                    descriptor: "redis[eu,prod];6379;drain=kill".parse().unwrap(),
                }],
            }],
            answers: [(
                query,
                KeptAnswer {
                    confirmed: 999_000,
                    endpoints: endpoints
                        .map(|e| KeptEndpoint {
                            endpoint: Endpoint(e.parse().unwrap()),
                            runs: vec![(
                                ContainerId::new("0123456789ab"),
                                Process { pid: 8, started: 12 },
                            )],
                        })
                        .to_vec(),
                },
            )]
            .into(),
        }
    }

    fn fit(change: impl FnOnce(&mut Origin), later: u64) -> Result<(usize, usize), Unfit> {
        let document = document();
        let mut here = document.origin.clone();
        change(&mut here);
        let now = document.written + later;
        document.fit(&here, now, DAY).map(|fit| (fit.consumers.len(), fit.answers.len()))
    }

    #[test]
    fn what_was_written_here_is_used_until_it_is_too_old() {
        assert_eq!(fit(|_| (), 0), Ok((1, 1)));
        assert_eq!(fit(|_| (), 23 * 3600), Ok((1, 1)));
        assert_eq!(fit(|_| (), 24 * 3600), Ok((1, 0)), "what it says of a service is older");
        let age = DAY + Duration::from_secs(1);
        assert_eq!(fit(|_| (), 24 * 3600 + 1), Err(Unfit::TooOld(age, DAY)));
        let (document, here) = (document(), document().origin);
        assert!(document.fit(&here, 0, DAY).is_ok(), "the clock was set back");
    }

    #[test]
    fn after_a_boot_no_consumer_is_the_same_and_on_another_machine_nothing_is() {
        assert_eq!(fit(|here| here.boot = "other".into(), 0), Ok((0, 1)));
        assert_eq!(fit(|here| here.machine = "other".into(), 0), Err(Unfit::Foreign));
        // If the machine has no ID, the boot ID is used.
        assert_eq!(fit(|here| here.machine.clear(), 0), Ok((1, 1)));
        let other_boot = |here: &mut Origin| {
            here.machine.clear();
            here.boot = "other".into();
        };
        assert_eq!(fit(other_boot, 0), Err(Unfit::Foreign));
    }

    #[test]
    fn after_a_boot_no_container_is_an_endpoint() {
        let of_containers = |here: &mut Origin| here.of_containers = ["consul".into()].into();
        assert_eq!(fit(of_containers, 0), Ok((1, 1)));
        let other_boot = |here: &mut Origin| {
            of_containers(here);
            here.boot = "other".into();
        };
        assert_eq!(fit(other_boot, 0), Ok((0, 0)));
    }

    #[test]
    fn what_is_asked_now_of_others_is_not_taken_from_it() {
        assert_eq!(fit(|here| here.provider = "unix:///other BACKEND_".into(), 0), Ok((0, 1)));
        assert_eq!(fit(|here| here.provider.clear(), 0), Ok((0, 1)));
        assert_eq!(fit(|here| here.discoveries.clear(), 0), Ok((1, 0)));
        let other = |here: &mut Origin| {
            here.discoveries.insert("consul".into(), "consul://10.0.0.1:8500".into());
        };
        assert_eq!(fit(other, 0), Ok((1, 0)));
    }
}
