//! What is known of an engine's running containers. Pure: events and inspections go in, consumers come out.
//!
//! An inspection takes time, and what happens meanwhile makes its answer stale. So each carries a ticket, and every event
//! about the container makes the tickets before it void: a container that died while it was being inspected stays dead.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;

use crate::{
    docker::client::Listed,
    model::{Binding, Consumer, ConsumerId, ContainerId, RunEnd},
    provider::{Listing, Problem},
};

/// A network's ID.
pub(super) type NetworkId = Arc<str>;

/// A running container, as its inspection showed it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Running {
    pub name: Arc<str>,
    /// `State.StartedAt`
    pub started_at: Arc<str>,
    /// Of its first process, as the engine numbers it; 0 where it does not say.
    pub pid: i32,
    /// The end of this run, where its process can be seen.
    pub end: RunEnd,
    pub network: Network,
    pub bindings: Vec<Binding>,
    pub problems: Vec<Problem>,
}

/// Where a container's addresses come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Network {
    /// Its own namespace, attached to these networks.
    Own(BTreeMap<NetworkId, Attachment>),
    /// The namespace of another container, by ID or name: `net=container:X`.
    Of(String),
    /// The host's: `net=host`.
    Host,
}

/// A container's end of a network.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Attachment {
    pub addresses: Vec<IpAddr>,
    pub gateways: Vec<IpAddr>,
}

/// A network whose gateway is on the engine's host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Bridge {
    pub ranges: Vec<IpNet>,
    /// The gateway's interface.
    pub interface: Arc<str>,
}

/// What an inspection found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    Running(Running),
    NotRunning,
    /// The engine could not say.
    Unknown,
}

/// Permission to say what an inspection found, unless something happened since it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ticket {
    pub id: ContainerId,
    number: u64,
}

#[derive(Debug, Default)]
pub(super) struct Containers {
    running: BTreeMap<ContainerId, Running>,
    /// The ticket of each inspection that is still wanted.
    awaited: HashMap<ContainerId, u64>,
    last_ticket: u64,
    /// What the last list named and no inspection has found yet.
    listed: HashSet<ContainerId>,
    /// Whether that was ever nothing.
    complete: bool,
    bridges: HashMap<NetworkId, Bridge>,
}

impl Containers {
    /// The networks that the `bridge` driver made.
    pub(super) fn bridges(&mut self, bridges: HashMap<NetworkId, Bridge>) {
        self.bridges = bridges;
    }

    /// All containers that run, as an engine lists them; each should be inspected now, those that are not known yet first.
    /// Until then it is as it was known, but for addresses that the list does not give it: while nobody told us, they may
    /// have become another's.
    pub(super) fn relist(&mut self, list: Vec<Listed>) -> VecDeque<Ticket> {
        self.awaited.clear();
        self.listed = list.iter().map(|one| one.id.clone()).collect();
        self.complete |= list.is_empty();
        self.running.retain(|id, _| self.listed.contains(id));
        for Listed { id, addresses } in &list {
            if let Some(Running { network: Network::Own(attachments), .. }) =
                self.running.get_mut(id)
                && let Some(addresses) = addresses
            {
                for attachment in attachments.values_mut() {
                    attachment.addresses.retain(|address| addresses.contains(address));
                }
            }
        }
        let (known, new): (Vec<_>, Vec<_>) =
            list.into_iter().map(|one| one.id).partition(|id| self.running.contains_key(id));
        new.into_iter().chain(known).map(|id| self.inspect(id)).collect()
    }

    /// Whether the listing tells of every container: once all of the first list have been inspected, or have ended.
    pub(super) fn is_complete(&self) -> bool {
        self.complete
    }

    /// Whether all of the last list have been inspected, so that nothing is left of what was known before it.
    #[cfg(test)]
    pub(super) fn is_fresh(&self) -> bool {
        self.listed.is_empty()
    }

    /// Whether what is known of a container is of a time since the last list.
    #[cfg(test)]
    pub(super) fn is_fresh_about(&self, id: &str) -> bool {
        !self.listed.iter().any(|listed| listed.as_str() == id)
    }

    fn seen(&mut self, id: &ContainerId) {
        self.listed.remove(id);
        self.complete |= self.listed.is_empty();
    }

    /// Those of `ids` that nothing is known of and that are not being inspected: to be inspected now.
    pub(super) fn unknown(&mut self, ids: impl IntoIterator<Item = ContainerId>) -> Vec<Ticket> {
        let known =
            |id: &ContainerId| self.running.contains_key(id) || self.awaited.contains_key(id);
        let unknown: Vec<_> = ids.into_iter().filter(|id| !known(id)).collect();
        unknown.into_iter().map(|id| self.inspect(id)).collect()
    }

    /// Those of `ids` that are not being inspected: to be inspected again.
    pub(super) fn again(&mut self, ids: impl IntoIterator<Item = ContainerId>) -> Vec<Ticket> {
        let ids: Vec<_> = ids.into_iter().filter(|id| !self.awaited.contains_key(id)).collect();
        ids.into_iter().map(|id| self.inspect(id)).collect()
    }

    /// A container that should be inspected now.
    pub(super) fn inspect(&mut self, id: ContainerId) -> Ticket {
        self.last_ticket += 1;
        self.awaited.insert(id.clone(), self.last_ticket);
        Ticket { id, number: self.last_ticket }
    }

    /// A run ended. The inspection that this asks for finds nothing, except where the stream replayed the end of a run
    /// before the one that was listed.
    pub(super) fn ended(&mut self, id: ContainerId) -> Ticket {
        self.running.remove(&id);
        self.seen(&id);
        self.inspect(id)
    }

    /// A container is no more.
    pub(super) fn destroyed(&mut self, id: &ContainerId) {
        self.running.remove(id);
        self.awaited.remove(id);
        self.seen(id);
    }

    /// A container left a network: from now on its address there may be another's.
    pub(super) fn disconnected(&mut self, id: ContainerId, network: &str) -> Ticket {
        if let Some(Running { network: Network::Own(attachments), .. }) = self.running.get_mut(&id)
        {
            attachments.remove(network);
        }
        self.inspect(id)
    }

    /// What an inspection found; it means nothing where the ticket is void. The run, if it is one that was not known.
    pub(super) fn inspected(&mut self, ticket: Ticket, found: Found) -> Option<&Running> {
        if self.awaited.get(&ticket.id) != Some(&ticket.number) {
            return None;
        }
        self.awaited.remove(&ticket.id);
        self.seen(&ticket.id);
        match found {
            Found::Running(mut running) => {
                let before = self.running.get(&ticket.id);
                let before = before.filter(|before| before.started_at == running.started_at);
                let is_new = before.is_none();
                if let Some(before) = before {
                    running.end = before.end.clone();
                }
                let now = self.running.entry(ticket.id).insert_entry(running);
                is_new.then_some(now.into_mut())
            }
            Found::NotRunning => {
                self.running.remove(&ticket.id);
                None
            }
            Found::Unknown => None,
        }
    }

    /// Those whose process is not watched.
    pub(super) fn unwatched(&self) -> impl Iterator<Item = (&ContainerId, &Running)> {
        self.running.iter().filter(|(_, run)| run.pid > 0 && run.end.process().is_none())
    }

    /// Everybody who asks for something.
    pub(super) fn listing(&self) -> Listing {
        let networks = self.bridges.values().flat_map(|bridge| &bridge.ranges).copied().collect();
        let bridges = self.bridges.values().map(|bridge| bridge.interface.clone());
        let bridges = bridges.filter(|interface| !interface.is_empty()).collect();
        let mut listing = Listing { networks, bridges, ..Listing::default() };
        let mut known = BTreeSet::new();
        // The kernel's word on an end comes before the engine's, and its address may be another's by now.
        for (id, container) in self.running.iter().filter(|(_, c)| !c.end.has_ended()) {
            if let Network::Own(attachments) = &container.network {
                for &address in attachments.values().flat_map(|a| &a.addresses) {
                    if !known.insert(address) {
                        listing.contested.insert(address);
                    }
                }
            }
            listing.problems.extend(container.problems.iter().cloned());
            if container.bindings.is_empty() {
                continue;
            }
            match self.namespace(id, container) {
                Ok((namespace, attachments)) => {
                    let consumer = self.consumer(id, container, namespace, attachments);
                    listing.consumers.push(Arc::new(consumer));
                }
                Err(reason) => listing.problems.push(Problem {
                    consumer: container.name.clone(),
                    origin: "network".into(),
                    reason,
                }),
            }
        }
        listing.problems.sort();
        listing.known = Arc::new(known);
        listing
    }

    fn consumer(
        &self,
        id: &ContainerId,
        container: &Running,
        namespace: &ContainerId,
        attachments: &BTreeMap<NetworkId, Attachment>,
    ) -> Consumer {
        let mut sources: Vec<_> =
            attachments.values().flat_map(|a| &a.addresses).copied().collect();
        sources.sort();
        sources.dedup();
        let on_bridges =
            attachments.iter().filter(|(network, _)| self.bridges.contains_key(*network));
        let mut gateways: Vec<_> = on_bridges.flat_map(|(_, a)| &a.gateways).copied().collect();
        gateways.sort();
        gateways.dedup();
        Consumer {
            id: ConsumerId::Container { id: id.clone(), started_at: container.started_at.clone() },
            name: container.name.clone(),
            namespace: namespace.as_str().into(),
            sources,
            gateways,
            bindings: container.bindings.clone(),
            ends: [Some(container), self.running.get(namespace)]
                .into_iter()
                .flatten()
                .map(|container| container.end.clone())
                .collect(),
        }
    }

    /// The container whose network namespace this one lives in, and what that is attached to.
    fn namespace<'a>(
        &'a self,
        id: &'a ContainerId,
        container: &'a Running,
    ) -> Result<(&'a ContainerId, &'a BTreeMap<NetworkId, Attachment>), String> {
        let (mut id, mut container) = (id, container);
        // A namespace made of itself cannot be had from an engine; a bound costs nothing.
        for _ in 0..=self.running.len() {
            let target = match &container.network {
                Network::Own(attachments) => return Ok((id, attachments)),
                Network::Host => {
                    return Err(
                        "net=host: cannot be told from other host processes by its address; \
                                run embassy with -provider=static for the host itself"
                            .to_owned(),
                    );
                }
                Network::Of(target) => target,
            };
            let found =
                self.running.iter().find(|(id, c)| id.as_str() == target || *c.name == **target);
            let Some((owner_id, owner)) = found else {
                return Err(format!("net=container:{target}: that container does not run"));
            };
            if owner.is_later_than(container) {
                return Err(format!(
                    "net=container:{target}: it restarted since, and took its network along"
                ));
            }
            (id, container) = (owner_id, owner);
        }
        Err("net=container: goes round in a circle".to_owned())
    }
}

impl Running {
    /// Whether this run started after another. The kernel's word on their processes goes before the wall clock's.
    fn is_later_than(&self, other: &Self) -> bool {
        match (self.end.process(), other.end.process()) {
            (Some(this), Some(other)) => this.started > other.started,
            _ => later(&self.started_at, &other.started_at),
        }
    }
}

/// Whether one of the engine's moments is later than another. They are RFC 3339 in UTC with trailing zeros cut off, so
/// text order is time order once the `Z` is gone.
fn later(a: &str, b: &str) -> bool {
    a.trim_end_matches('Z') > b.trim_end_matches('Z')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Process;

    fn running(name: &str, network: Network) -> Running {
        let binding = Binding { origin: "BACKEND_A".into(), descriptor: "a;80".parse().unwrap() };
        Running {
            name: name.into(),
            started_at: "2026-01-01T00:00:00.5Z".into(),
            pid: 0,
            end: RunEnd::default(),
            network,
            bindings: vec![binding],
            problems: vec![],
        }
    }

    fn on(networks: &[(&str, &str, &str)]) -> Network {
        let attachment = |address: &str, gateway: &str| Attachment {
            addresses: vec![address.parse().unwrap()],
            gateways: vec![gateway.parse().unwrap()],
        };
        Network::Own(networks.iter().map(|(id, a, g)| ((*id).into(), attachment(a, g))).collect())
    }

    fn id(name: &str) -> ContainerId {
        ContainerId::new(name)
    }

    fn listed(names: &[&str]) -> Vec<Listed> {
        names.iter().map(|name| Listed { id: id(name), addresses: None }).collect()
    }

    fn bridges(names: &[&str]) -> HashMap<NetworkId, Bridge> {
        names.iter().map(|name| ((*name).into(), Bridge::default())).collect()
    }

    fn with(containers: &[(&str, Running)]) -> Containers {
        let mut all = Containers::default();
        all.bridges(bridges(&["bridge"]));
        for (name, running) in containers {
            let ticket = all.inspect(id(name));
            all.inspected(ticket, Found::Running(running.clone()));
        }
        all
    }

    fn sources(containers: &Containers) -> Vec<(String, Vec<String>)> {
        let listing = containers.listing();
        let texts = |list: &[IpAddr]| list.iter().map(ToString::to_string).collect();
        listing.consumers.iter().map(|c| (c.name.to_string(), texts(&c.sources))).collect()
    }

    #[test]
    fn every_address_on_every_network_is_a_source_and_the_gateways_of_bridges_are_vips() {
        let network = on(&[
            ("bridge", "172.17.0.2", "172.17.0.1"),
            ("macvlan", "192.168.1.5", "192.168.1.1"),
            ("bridge6", "fd00::2", "fd00::1"),
        ]);
        let mut containers = with(&[("a", running("a", network))]);
        containers.bridges(bridges(&["bridge", "bridge6"]));
        let listing = containers.listing();
        assert_eq!(
            sources(&containers),
            [("a".into(), vec!["172.17.0.2".into(), "192.168.1.5".into(), "fd00::2".into()])]
        );
        let gateways: Vec<_> =
            listing.consumers[0].gateways.iter().map(ToString::to_string).collect();
        assert_eq!(gateways, ["172.17.0.1", "fd00::1"]);
    }

    #[test]
    fn a_container_that_died_while_it_was_inspected_stays_dead() {
        let found = Found::Running(running("a", on(&[("bridge", "172.17.0.2", "172.17.0.1")])));
        let mut containers = Containers::default();
        let ticket = containers.inspect(id("a"));
        let after = containers.ended(id("a"));
        containers.inspected(ticket, found.clone());
        assert_eq!(containers.listing(), Listing::default());
        containers.inspected(after, Found::NotRunning);
        let ticket = containers.inspect(id("a"));
        containers.destroyed(&id("a"));
        containers.inspected(ticket, found);
        assert_eq!(containers.listing(), Listing::default());
    }

    #[test]
    fn a_container_is_gone_the_moment_it_ends() {
        let mut containers =
            with(&[("a", running("a", on(&[("bridge", "172.17.0.2", "172.17.0.1")])))]);
        let _unanswered = containers.ended(id("a"));
        assert!(sources(&containers).is_empty());
        let ticket = containers.inspect(id("a"));
        let network = on(&[("bridge", "172.17.0.3", "172.17.0.1")]);
        containers.inspected(ticket, Found::Running(running("a", network)));
        assert_eq!(sources(&containers), [("a".into(), vec!["172.17.0.3".into()])]);
    }

    #[test]
    fn the_first_list_is_complete_when_each_of_it_was_inspected_or_ended() {
        let mut containers = Containers::default();
        assert!(!containers.is_complete());
        let tickets = containers.relist(listed(&["a", "b", "c"]));
        containers.ended(id("a"));
        containers.destroyed(&id("b"));
        assert!(!containers.is_complete());
        let [_, _, c] = Vec::from(tickets).try_into().unwrap();
        containers.inspected(c, Found::Unknown);
        assert!(containers.is_complete());
        // A later one changes what is known, bit by bit.
        containers.relist(listed(&["d"]));
        assert!(containers.is_complete());

        let mut containers = Containers::default();
        containers.relist(vec![]);
        assert!(containers.is_complete(), "nothing runs");
    }

    #[test]
    fn a_new_list_replaces_what_was_known() {
        let bridge = |address| on(&[("bridge", address, "172.17.0.1")]);
        let mut containers = with(&[
            ("a", running("a", bridge("172.17.0.2"))),
            ("b", running("b", bridge("172.17.0.3"))),
            ("gone", running("gone", bridge("172.17.0.4"))),
        ]);
        let old = containers.inspect(id("a"));
        let mut tickets = containers.relist(listed(&["a", "b", "c"]));
        let first = tickets.pop_front().unwrap();
        assert_eq!(first.id, id("c"), "who is not known yet is looked at first");
        containers.inspected(old, Found::Running(running("a", bridge("172.17.0.9"))));
        // Connected to a network meanwhile: the inspection of the list is void, and a later one counts.
        let again = containers.inspect(id("a"));
        containers.inspected(tickets.pop_front().unwrap(), Found::NotRunning);
        containers.inspected(tickets.pop_front().unwrap(), Found::Unknown);
        containers.ended(id("c"));
        containers.inspected(first, Found::Running(running("c", bridge("172.17.0.6"))));
        assert!(!containers.is_fresh());
        containers.inspected(again, Found::Running(running("a", bridge("172.17.0.5"))));
        assert!(containers.is_fresh());
        // What the engine cannot say is as it was.
        let address = |text: &str| vec![text.to_owned()];
        let expected = [("a".into(), address("172.17.0.5")), ("b".into(), address("172.17.0.3"))];
        assert_eq!(sources(&containers), expected);
    }

    #[test]
    fn an_address_that_a_list_does_not_give_is_withdrawn_before_any_inspection() {
        let network =
            on(&[("bridge", "172.17.0.2", "172.17.0.1"), ("other", "172.18.0.2", "172.18.0.1")]);
        let mut containers = with(&[("a", running("a", network))]);
        let says = |address: &str| Listed {
            id: id("a"),
            addresses: Some([address.parse().unwrap()].into()),
        };
        containers.relist(listed(&["a"]));
        assert_eq!(sources(&containers)[0].1.len(), 2, "a list that does not say changes nothing");
        containers.relist(vec![says("172.18.0.2")]);
        assert_eq!(sources(&containers), [("a".into(), vec!["172.18.0.2".into()])]);
        assert!(!containers.listing().known.contains(&"172.17.0.2".parse().unwrap()));
        // What it gives besides is the inspection's to tell.
        containers.relist(vec![says("172.17.0.9")]);
        assert_eq!(sources(&containers), [("a".into(), vec![])]);
    }

    #[test]
    fn which_run_is_later_is_the_kernels_word_where_it_is_seen() {
        let at = |name: &str, moment: &str, ticks: Option<u64>, network| {
            let run = Running { started_at: moment.into(), ..running(name, network) };
            if let Some(started) = ticks {
                run.end.is_that_of(Process { pid: 7, started });
            }
            run
        };
        let (early, late) = ("2026-01-01T00:00:00Z", "2026-01-01T00:00:01Z");
        let served = |owner, sharer| {
            let own = on(&[("bridge", "172.17.0.2", "172.17.0.1")]);
            let sharer = at("b", early, sharer, Network::Of("id-a".into()));
            let both = [("id-a", at("a", late, owner, own)), ("id-b", sharer)];
            sources(&with(&both)).len() == 2
        };
        // The clock was set back between the two.
        assert!(served(Some(10), Some(20)));
        assert!(!served(Some(20), Some(10)));
        assert!(!served(Some(10), None));
    }

    #[test]
    fn a_run_whose_process_is_not_watched_stays_to_be_watched() {
        let own = on(&[("bridge", "172.17.0.2", "172.17.0.1")]);
        let containers = with(&[
            ("id-a", Running { pid: 7, ..running("a", own.clone()) }),
            ("id-b", running("b", own)),
        ]);
        let unwatched = || containers.unwatched().map(|(id, _)| id.clone()).collect::<Vec<_>>();
        assert_eq!(unwatched(), [id("id-a")]);
        containers.running[&id("id-a")].end.is_that_of(Process { pid: 7, started: 1 });
        assert!(unwatched().is_empty());
    }

    #[test]
    fn the_end_of_a_run_ends_all_who_live_in_its_network_and_no_later_run() {
        let owner = running("a", on(&[("bridge", "172.17.0.2", "172.17.0.1")]));
        let mut containers =
            with(&[("id-a", owner.clone()), ("id-b", running("b", Network::Of("id-a".into())))]);
        let ended = |containers: &Containers| {
            containers
                .listing()
                .consumers
                .iter()
                .map(|consumer| consumer.has_ended())
                .collect::<Vec<_>>()
        };
        // A second look at the same run keeps its end.
        let end = containers.running[&id("id-a")].end.clone();
        let ticket = containers.inspect(id("id-a"));
        assert!(containers.inspected(ticket, Found::Running(owner.clone())).is_none());
        assert_eq!(ended(&containers), [false, false]);
        let before = containers.listing().consumers;
        end.mark_ended();
        assert!(before.iter().all(|consumer| consumer.has_ended()));
        assert_eq!(ended(&containers), [true], "of the one who shared its network");
        let ticket = containers.inspect(id("id-a"));
        let again = Running {
            started_at: "2026-01-01T00:00:00.6Z".into(),
            end: RunEnd::default(),
            ..owner
        };
        assert!(containers.inspected(ticket, Found::Running(again)).is_some());
        assert_eq!(ended(&containers), [false]);
    }

    #[test]
    fn an_address_that_two_containers_claim_is_contested_whatever_they_ask_for() {
        let network = on(&[("bridge", "172.17.0.2", "172.17.0.1")]);
        let other = Running { bindings: vec![], ..running("b", network.clone()) };
        let contested = with(&[("a", running("a", network)), ("b", other)]).listing().contested;
        assert_eq!(contested, ["172.17.0.2".parse().unwrap()].into());
    }

    #[test]
    fn a_late_destroy_takes_only_its_own_container() {
        let network = on(&[("bridge", "172.17.0.2", "172.17.0.1")]);
        let mut containers = with(&[("a", running("a", network.clone()))]);
        let ticket = containers.ended(id("a"));
        containers.inspected(ticket, Found::NotRunning);
        let ticket = containers.inspect(id("b"));
        containers.inspected(ticket, Found::Running(running("b", network)));
        containers.destroyed(&id("a"));
        assert_eq!(sources(&containers), [("b".into(), vec!["172.17.0.2".into()])]);
    }

    #[test]
    fn an_address_is_gone_with_its_network_before_any_inspection() {
        let network =
            on(&[("bridge", "172.17.0.2", "172.17.0.1"), ("other", "172.18.0.2", "172.18.0.1")]);
        let mut containers = with(&[("a", running("a", network.clone()))]);
        let stale = containers.inspect(id("a"));
        let _fresh = containers.disconnected(id("a"), "other");
        assert_eq!(sources(&containers), [("a".into(), vec!["172.17.0.2".into()])]);
        containers.inspected(stale, Found::Running(running("a", network)));
        assert_eq!(sources(&containers), [("a".into(), vec!["172.17.0.2".into()])]);
    }

    #[test]
    fn a_shared_namespace_is_followed_to_its_owner() {
        let owner = Running {
            bindings: vec![],
            ..running("a", on(&[("bridge", "172.17.0.2", "172.17.0.1")]))
        };
        let containers = with(&[
            ("id-a", owner.clone()),
            ("id-b", running("b", Network::Of("id-a".into()))),
            ("id-c", running("c", Network::Of("b".into()))),
        ]);
        let address = vec!["172.17.0.2".to_owned()];
        assert_eq!(sources(&containers), [("b".into(), address.clone()), ("c".into(), address)]);
        assert!(containers.listing().consumers.iter().all(|c| &*c.namespace == "id-a"));
    }

    #[test]
    fn what_has_no_address_of_its_own_is_reported() {
        let later =
            Running { started_at: "2026-01-01T00:00:00.51Z".into(), ..running("late", on(&[])) };
        let containers = with(&[
            ("id-host", running("host", Network::Host)),
            ("id-orphan", running("orphan", Network::Of("gone".into()))),
            ("id-late", Running { bindings: vec![], ..later }),
            ("id-left", running("left", Network::Of("id-late".into()))),
            ("id-self", running("self", Network::Of("id-self".into()))),
        ]);
        let listing = containers.listing();
        assert!(listing.consumers.is_empty());
        let reasons: Vec<_> =
            listing.problems.iter().map(|p| (&*p.consumer, &p.reason[..22])).collect();
        assert_eq!(
            reasons,
            [
                ("host", "net=host: cannot be to"),
                ("left", "net=container:id-late:"),
                ("orphan", "net=container:gone: th"),
                ("self", "net=container: goes ro"),
            ]
        );
    }
}
