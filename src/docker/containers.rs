//! The known state of an engine's running containers. Pure: lists, events and inspections go in, an inventory comes out.
//!
//! An answer takes time, and may be outdated by what happens meanwhile. So each inspection has a ticket, and every event
//! about the container makes the ticket void: a container that died during its inspection stays dead. In the same way, a
//! list is ignored for a container that had an event while the list was requested.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    mem,
    net::IpAddr,
    sync::Arc,
};

use super::{
    container::{
        Attachment, BridgePorts, Bridges, Container, Interfaces, Inventory, Network, NetworkId,
        OtherNetworks, SHOWN, bridge_of,
    },
    inspections::{InspectionTicket, Inspections, Urgency},
    read::{InspectionResult, Listed, Notice},
};
use crate::{model::ContainerId, wiring::Plug};

/// Whether a list was requested and is awaited.
#[derive(Debug, Default)]
enum AwaitedList {
    #[default]
    None,
    /// The first one of a session: events since the request override the list, but not older knowledge.
    First(Vec<Notice>),
    /// A later one: newer facts about these containers arrived since the request.
    Again(BTreeSet<ContainerId>),
}

#[derive(Debug, Default)]
pub(super) struct Containers {
    running: BTreeMap<ContainerId, Arc<Container>>,
    /// The running containers that are known to have an address. If there are several, all but one have lost it without an
    /// event.
    claims: HashMap<IpAddr, BTreeSet<ContainerId>>,
    /// Containers that ended by an event and whose inspection is not finished: the event may be about an earlier run.
    doubtful: HashMap<ContainerId, Arc<Container>>,
    /// Containers that share the network of one that was to be inspected when they became known, and that one. They are not published
    /// before its inspection ends. One that is published is not withdrawn because its owner is inspected (again).
    awaiting: HashMap<ContainerId, ContainerId>,
    inspections: Inspections,
    /// Containers of the last list that were not inspected since.
    listed: HashSet<ContainerId>,
    /// Whether `listed` was ever empty after a list.
    complete: bool,
    list: AwaitedList,
    /// While a look is awaited: containers about which newer facts arrived since it was requested.
    newer_than_look: Option<BTreeSet<ContainerId>>,
    /// The number of doubts about addresses that a list has resolved.
    confirmed: u64,
    bridges: Arc<Bridges>,
    others: Arc<OtherNetworks>,
    here: Arc<Interfaces>,
    ports: Arc<BridgePorts>,
    /// Whether an event reported a new or removed network.
    networks_changed: bool,
    host: Option<IpAddr>,
    ended: u64,
    /// Whether anything changed since this was last asked.
    changed: bool,
}

impl Containers {
    /// Starts a session. It begins with a list. Answers to requests of the previous session are ignored.
    pub(super) fn begin(&mut self) {
        self.inspections = self.inspections.restarted();
        self.newer_than_look = None;
        self.list = AwaitedList::First(Vec::new());
    }

    /// Notes that a list is requested within a session.
    pub(super) fn list_again(&mut self) {
        self.list = AwaitedList::Again(BTreeSet::new());
    }

    /// Takes the list of all running containers. Each one is inspected now, unknown ones first. Until then its last known
    /// state stays, except addresses that the list does not have: without an event about it, they may belong to another
    /// container now.
    pub(super) fn relist(&mut self, list: Vec<Listed>) {
        let (meanwhile, newer) = match mem::take(&mut self.list) {
            AwaitedList::None => Default::default(),
            AwaitedList::First(notices) => (notices, BTreeSet::new()),
            AwaitedList::Again(newer) => (Vec::new(), newer),
        };
        self.listed = list.iter().map(|one| one.id.clone()).collect();
        self.complete |= list.is_empty();
        let is_gone = |id: &&ContainerId| !self.listed.contains(*id) && !newer.contains(*id);
        for id in self.running.keys().filter(is_gone).cloned().collect::<Vec<_>>() {
            self.remove(&id);
        }
        self.doubtful.retain(|id, _| self.listed.contains(id));
        for Listed { id, addresses } in list {
            let urgency = match self.running.contains_key(&id) {
                true => Urgency::Known,
                false => Urgency::New,
            };
            if let Some(given) = addresses.filter(|_| !newer.contains(&id)) {
                self.keep_given(&id, &given);
            }
            self.inspections.want(id, urgency);
        }
        for id in newer.into_iter().filter(|id| self.running.contains_key(id)) {
            self.inspections.want(id, Urgency::Event);
        }
        for notice in meanwhile {
            self.hear(notice);
        }
        // Those whose owner was to be inspected in the session before, and that the list does not have.
        let inspections = &self.inspections;
        self.changed |=
            self.awaiting.extract_if(|_, owner| !inspections.is_to_come(owner)).count() > 0;
    }

    pub(super) fn networks(&mut self, bridges: Bridges, others: OtherNetworks) {
        if *self.bridges != bridges {
            (self.bridges, self.changed) = (Arc::new(bridges), true);
        }
        if *self.others != others {
            (self.others, self.changed) = (Arc::new(others), true);
        }
        // If the engine reports the addresses, the process is no longer looked at, and what it showed would stay forever.
        let told =
            self.running.values().filter(|one| one.shown().is_some() && !self.is_hidden(one));
        for container in told.map(|one| one.at(None)).collect::<Vec<_>>() {
            self.put(container);
        }
    }

    /// Sets the interfaces of our own network namespace.
    pub(super) fn here(&mut self, here: Interfaces) {
        if *self.here != here {
            (self.here, self.changed) = (Arc::new(here), true);
        }
    }

    /// Notes that the networks must be listed.
    pub(super) fn list_networks(&mut self) {
        self.networks_changed = true;
    }

    /// The interfaces of our own network namespace.
    pub(super) fn interfaces(&self) -> Arc<Interfaces> {
        self.here.clone()
    }

    /// Whether the networks must be listed. Resets this.
    pub(super) fn take_networks_change(&mut self) -> bool {
        mem::take(&mut self.networks_changed)
    }

    /// Sets the address of the engine's host.
    pub(super) fn host(&mut self, host: Option<IpAddr>) {
        self.changed |= self.host != host;
        self.host = host;
    }

    /// Whether too many events came before the first list to keep them.
    pub(super) fn is_flooded(&self) -> bool {
        const MOST: usize = 65_536;
        matches!(&self.list, AwaitedList::First(meanwhile) if meanwhile.len() > MOST)
    }

    /// Applies an event. A removal takes effect immediately. Everything else needs an inspection.
    pub(super) fn hear(&mut self, notice: Notice) {
        if let AwaitedList::First(meanwhile) = &mut self.list {
            meanwhile.push(notice);
            return;
        }
        let named = |id| self.running.contains_key(id) || self.doubtful.contains_key(id);
        if let Notice::Changed(id) = &notice
            && self.inspections.is_full()
            && !named(id)
        {
            // If the container exists, the next list has it.
            return;
        }
        let id = match notice {
            Notice::Changed(id) => id,
            // The inspection will find nothing, unless the stream replayed the end of an earlier run.
            Notice::Ended(id) => {
                if let Some(container) = self.remove(&id) {
                    self.await_owner(&id);
                    // If this run continues, an earlier signal was for the previous run.
                    let unasked = Container { is_stopping: false, ..Container::clone(&container) };
                    self.doubtful.insert(id.clone(), unasked.into());
                }
                self.seen(&id);
                id
            }
            Notice::Destroyed(id) => {
                self.remove(&id);
                self.doubtful.remove(&id);
                self.inspections.forget(&id);
                self.seen(&id);
                self.no_longer_awaited(&id);
                return;
            }
            Notice::Left(id, network) => {
                self.detach(&id, |attached, end| *attached != network && end.name != network);
                id
            }
            Notice::Networks => {
                self.networks_changed = true;
                return;
            }
            Notice::Signalled(id, signal) => {
                self.signalled(&id, signal);
                return;
            }
        };
        self.is_newer(&id);
        self.inspections.want(id, Urgency::Event);
    }

    /// Notes that a look is requested.
    pub(super) fn begin_look(&mut self) {
        self.newer_than_look = Some(BTreeSet::new());
    }

    /// Takes a list of the running containers that was requested because an unknown address connected, or because addresses
    /// are in doubt. Requests inspections of unknown containers, and of those that are known with other addresses: an event
    /// may have been lost. Resolves `doubts` doubts: a container loses the addresses that the list does not give it.
    pub(super) fn look_at(&mut self, list: Vec<Listed>, doubts: u64) {
        let newer = self.newer_than_look.take().unwrap_or_default();
        let takes_away = doubts > self.confirmed;
        let given: BTreeMap<_, _> = list.into_iter().map(|one| (one.id, one.addresses)).collect();
        let new = given.keys().filter(|id| !self.running.contains_key(*id));
        let mut others: Vec<_> = new.cloned().collect();
        for (id, known) in &self.running {
            let is_as_known = match given.get(id) {
                Some(Some(given)) => known.given().all(|known| given.contains(&known)),
                Some(None) => true,
                None => false,
            };
            if !is_as_known {
                others.push(id.clone());
            }
        }
        if takes_away {
            for id in others.iter().filter(|id| !newer.contains(*id)) {
                let given = given.get(id).cloned().flatten().unwrap_or_default();
                self.keep_given(id, &given);
            }
            (self.confirmed, self.changed) = (doubts, true);
        }
        for id in others {
            if !self.inspections.is_under_way(&id) {
                self.inspections.want(id, Urgency::Event);
            }
        }
    }

    /// Whether all listed or reported containers are known: no inspection is wanted or running.
    pub(super) fn knows_all(&self) -> bool {
        self.inspections.are_done(|id| self.running.contains_key(id))
    }

    /// Whether a container is known to have this address.
    pub(super) fn has_address(&self, address: &IpAddr) -> bool {
        self.claims.contains_key(address)
    }

    /// Requests a new inspection of those whose inspection failed.
    pub(super) fn retry(&mut self) {
        self.inspections.retry();
    }

    /// The next inspection to make now, if there is one.
    pub(super) fn next(&mut self) -> Option<InspectionTicket> {
        self.inspections.next()
    }

    /// Takes the result of an inspection. It is ignored if the ticket is void. Returns the container if its run was not
    /// known before.
    pub(super) fn inspected(
        &mut self,
        ticket: InspectionTicket,
        found: InspectionResult,
    ) -> Option<&Arc<Container>> {
        let id = self.inspections.answered(ticket)?;
        self.seen(&id);
        match found {
            InspectionResult::Running(mut container) => {
                let before = self.doubtful.remove(&id).or_else(|| self.running.get(&id).cloned());
                let before = before.filter(|before| before.started_at == container.started_at);
                let is_new = before.is_none();
                if let Some(before) = before {
                    container.run = before.run.clone();
                    // Docker's inspections do not report these.
                    container.is_stopping |= before.is_stopping;
                    container.plugs.clone_from(&before.plugs);
                    if self.is_hidden(&container) && self.is_hidden(&before) {
                        *container = container.at(before.shown().cloned());
                    }
                }
                self.is_newer(&id);
                self.no_longer_awaited(&id);
                if !self.running.contains_key(&id)
                    && let Network::Of(owner) = &container.network
                {
                    let owner = ContainerId::new(owner);
                    if !self.running.contains_key(&owner) && self.inspections.is_to_come(&owner) {
                        self.awaiting.insert(id.clone(), owner);
                    }
                }
                self.put(*container);
                self.running.get(&id).filter(|_| is_new)
            }
            InspectionResult::NotRunning => {
                self.doubtful.remove(&id);
                self.remove(&id);
                self.no_longer_awaited(&id);
                None
            }
            InspectionResult::Unknown => {
                self.no_longer_awaited(&id);
                self.inspections.failed(id);
                None
            }
        }
    }

    /// Sets this host's ends of a container's veth pairs.
    pub(super) fn plugged(&mut self, id: &ContainerId, plugs: Vec<Plug>) {
        if let Some(before) = self.running.get(id).filter(|one| one.plugs != plugs) {
            let container = Container { plugs, ..Container::clone(before) };
            self.put(container);
        }
    }

    /// Sets the ports of the bridges of our own network namespace.
    pub(super) fn ports(&mut self, ports: BridgePorts) {
        if *self.ports != ports {
            (self.ports, self.changed) = (Arc::new(ports), true);
        }
    }

    /// Containers with their own network namespace whose process is visible.
    pub(super) fn with_cables(&self) -> impl Iterator<Item = &Arc<Container>> {
        let has_cables =
            |one: &&Arc<Container>| matches!(one.network, Network::Own(_)) && !one.run.has_ended();
        self.running.values().filter(has_cables).filter(|one| one.run.process().is_some())
    }

    /// Sets the addresses that a container's process shows.
    pub(super) fn shown(&mut self, id: &ContainerId, shown: Option<Attachment>) {
        if let Some(container) = self.running.get(id).filter(|one| self.is_hidden(one)) {
            let shown = shown.and_then(|mut shown| {
                shown.addresses.retain(|address| container.given().all(|given| given != *address));
                (!shown.addresses.is_empty()).then_some(shown)
            });
            let container = container.at(shown);
            self.put(container);
        }
    }

    /// Containers that may have addresses that the engine does not report.
    pub(super) fn hidden(&self) -> impl Iterator<Item = &Arc<Container>> {
        self.running.values().filter(|container| self.is_hidden(container))
    }

    /// Whether a container may have addresses that the engine does not report: it has none from the engine, or none on a
    /// network that leads to this host. From an overlay network, Docker connects containers to the host by another network,
    /// which no inspection names.
    pub(super) fn is_hidden(&self, container: &Container) -> bool {
        if container.is_unaddressed() {
            return true;
        }
        let leads_here = |(network, end): (&NetworkId, &Attachment)| {
            let other = self.others.get(network).map(|other| &*other.driver);
            bridge_of(&self.bridges, network, end).is_some()
                || matches!(other, Some("macvlan" | "ipvlan"))
        };
        // As long as no bridge is known, the networks are unknown.
        let mut given = container.attachments().filter(|(network, _)| ***network != *SHOWN);
        matches!(container.network, Network::Own(_))
            && !self.bridges.is_empty()
            && !given.any(leads_here)
    }

    /// The container with this ID or name. The lookup by ID is cheap, however many containers there are.
    pub(super) fn named(&self, target: &str) -> Option<&Arc<Container>> {
        let by_id = self.running.get(&ContainerId::new(target));
        by_id.or_else(|| self.running.values().find(|one| *one.name == *target))
    }

    /// The container with this ID.
    pub(super) fn running(&self, id: &ContainerId) -> Option<&Arc<Container>> {
        self.running.get(id)
    }

    /// Counts the end of a run's process.
    pub(super) fn run_has_ended(&mut self) {
        self.ended += 1;
        self.changed = true;
    }

    /// Whether any container has an address from the engine that its process does not show, because the process is not
    /// visible or is a sandbox.
    pub(super) fn are_any_unshown(&self) -> bool {
        let is_unshown =
            |one: &Arc<Container>| !one.run.has_shown_network() && one.given().next().is_some();
        self.running.values().any(is_unshown)
    }

    /// Containers whose process is not watched.
    pub(super) fn unwatched(&self) -> impl Iterator<Item = &Container> {
        let running = self.running.values().map(Arc::as_ref);
        running.filter(|container| container.pid > 0 && container.run.process().is_none())
    }

    /// Whether everything is known: all containers of the first list have been inspected or have ended, and the current
    /// session has a list.
    pub(super) fn is_complete(&self) -> bool {
        self.complete && self.is_listed()
    }

    /// Whether the first list of the session has arrived.
    fn is_listed(&self) -> bool {
        !matches!(self.list, AwaitedList::First(_))
    }

    /// Whether anything changed since the last call.
    pub(super) fn take_change(&mut self) -> bool {
        mem::take(&mut self.changed)
    }

    pub(super) fn inventory(&self) -> Inventory {
        let published = self.running.values().filter(|one| !self.awaiting.contains_key(&one.id));
        Inventory {
            containers: published.cloned().collect(),
            bridges: self.bridges.clone(),
            others: self.others.clone(),
            here: self.here.clone(),
            ports: self.ports.clone(),
            host: self.host,
            ended: self.ended,
            confirmed: self.confirmed,
        }
    }

    /// The end of this container's run was reported, and its inspection will show whether that was an earlier run. Those that share its
    /// network have no addresses until then. That the owner does not run is not known yet.
    fn await_owner(&mut self, owner: &ContainerId) {
        let shares = |one: &&Arc<Container>| matches!(&one.network, Network::Of(of) if *of == owner.as_str());
        let members = self.running.values().filter(shares);
        self.awaiting.extend(members.map(|one| (one.id.clone(), owner.clone())));
    }

    /// The inspection of a container has ended, or there will be none. Those that share its network are published now: they start
    /// together, and their inspections end in any order.
    fn no_longer_awaited(&mut self, id: &ContainerId) {
        self.changed |= self.awaiting.extract_if(|_, owner| owner == id).count() > 0;
    }

    /// Whether all containers of the last list have been inspected, so that no older knowledge is left.
    #[cfg(test)]
    pub(super) fn is_fresh(&self) -> bool {
        self.is_listed() && self.listed.is_empty()
    }

    /// Whether the knowledge about a container is newer than the last list.
    #[cfg(test)]
    pub(super) fn is_fresh_about(&self, id: &ContainerId) -> bool {
        self.is_listed() && !self.listed.contains(id)
    }

    /// Notes that a signal was sent to a container.
    fn signalled(&mut self, id: &ContainerId, signal: i32) {
        if let Some(before) = self.running.get(id)
            && before.stop_signal == signal
            && !before.is_stopping
        {
            let stopping = Container { is_stopping: true, ..Container::clone(before) };
            self.put(stopping);
        }
    }

    fn seen(&mut self, id: &ContainerId) {
        if self.listed.remove(id) {
            self.complete |= self.listed.is_empty();
        }
    }

    /// Sets the state of a container. Ends its earlier `left`, unless it can still be reached as before.
    fn put(&mut self, mut container: Container) {
        match self.running.get(&container.id) {
            Some(before) if **before == container => return,
            Some(before) if container.is_reached_as(before) => {
                container.left = before.left.clone();
            }
            Some(before) => before.left.mark_ended(),
            None => {}
        }
        let id = container.id.clone();
        self.drop_claims(&id);
        for address in container.addresses() {
            let claimants = self.claims.entry(address).or_default();
            // All but one of them have lost the address, without an event. Only inspections show which one has it.
            for other in claimants.iter().filter(|other| **other != id) {
                self.inspections.want(other.clone(), Urgency::Event);
            }
            claimants.insert(id.clone());
        }
        self.running.insert(id, Arc::new(container));
        self.changed = true;
    }

    /// Removes a container's claims on its addresses.
    fn drop_claims(&mut self, id: &ContainerId) {
        let Some(container) = self.running.get(id) else { return };
        for address in container.addresses() {
            if let Some(claimants) = self.claims.get_mut(&address) {
                claimants.remove(id);
                if claimants.is_empty() {
                    self.claims.remove(&address);
                }
            }
        }
    }

    /// Notes that the engine reported something about a container that may be newer than a requested list. Not to be called
    /// for what the kernel shows, which says nothing about the addresses that a list removes.
    fn is_newer(&mut self, id: &ContainerId) {
        if let AwaitedList::Again(newer) = &mut self.list {
            newer.insert(id.clone());
        }
        if let Some(newer) = &mut self.newer_than_look {
            newer.insert(id.clone());
        }
    }

    fn remove(&mut self, id: &ContainerId) -> Option<Arc<Container>> {
        self.drop_claims(id);
        let container = self.running.remove(id)?;
        self.awaiting.remove(id);
        container.left.mark_ended();
        self.changed = true;
        Some(container)
    }

    /// Removes the addresses that the engine gave to a container and that are not in `given`.
    fn keep_given(&mut self, id: &ContainerId, given: &BTreeSet<IpAddr>) {
        self.detach(id, |network, attachment| {
            if **network != *SHOWN {
                attachment.addresses.retain(|address| given.contains(address));
            }
            true
        });
    }

    /// Removes the attachments, or parts of them, that `keep` does not leave.
    fn detach(&mut self, id: &ContainerId, keep: impl FnMut(&NetworkId, &mut Attachment) -> bool) {
        let Some(before) = self.running.get(id) else { return };
        let Network::Own(attachments) = &before.network else { return };
        let mut attachments = attachments.clone();
        attachments.retain(keep);
        let container = Container {
            network: Network::Own(attachments),
            left: Default::default(),
            ..Container::clone(before)
        };
        self.put(container);
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::container::{Bridge, samples::*},
        *,
    };
    use crate::model::Process;

    fn listed(names: &[&str]) -> Vec<Listed> {
        names.iter().map(|name| Listed { id: id(name), addresses: None }).collect()
    }

    fn with(all: &[Container]) -> Containers {
        let mut containers = Containers::default();
        for container in all {
            let ticket = look(&mut containers, container.id.as_str());
            found(&mut containers, ticket, container);
        }
        containers
    }

    /// An inspection of a container that has changed.
    fn look(containers: &mut Containers, name: &str) -> InspectionTicket {
        containers.hear(Notice::Changed(id(name)));
        next(containers, name)
    }

    fn next(containers: &mut Containers, name: &str) -> InspectionTicket {
        let ticket = containers.next().expect("an inspection");
        assert_eq!(ticket.id, id(name));
        ticket
    }

    fn found(containers: &mut Containers, ticket: InspectionTicket, container: &Container) {
        containers.inspected(ticket, running(container));
    }

    /// An inspection's result contains no ends.
    fn running(container: &Container) -> InspectionResult {
        let (run, left) = Default::default();
        InspectionResult::Running(Box::new(Container { run, left, ..container.clone() }))
    }

    /// The known containers with their addresses.
    fn known(containers: &Containers) -> Vec<(String, Vec<String>)> {
        let of = |container: &Arc<Container>| {
            let addresses = container.addresses().map(|address| address.to_string());
            (container.name.to_string(), addresses.collect())
        };
        containers.inventory().containers.iter().map(of).collect()
    }

    fn at(name: &str, addresses: &[&str]) -> (String, Vec<String>) {
        (name.to_owned(), addresses.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn a_container_that_died_while_it_was_inspected_stays_dead() {
        let a = container("a", bridge("172.17.0.2"));
        let mut containers = Containers::default();
        let ticket = look(&mut containers, "a");
        containers.hear(Notice::Ended(id("a")));
        assert_eq!(containers.next(), None, "one at a time");
        found(&mut containers, ticket, &a);
        assert_eq!(known(&containers), []);
        let ticket = next(&mut containers, "a");
        containers.inspected(ticket, InspectionResult::NotRunning);
        let ticket = look(&mut containers, "a");
        containers.hear(Notice::Destroyed(id("a")));
        found(&mut containers, ticket, &a);
        assert_eq!(known(&containers), []);
        assert_eq!(containers.next(), None);
    }

    #[test]
    fn who_shares_the_network_of_one_that_is_to_be_inspected_is_known_after_it() {
        let infra = container("infra", bridge("172.17.0.2"));
        let member = container("member", Network::Of("infra".into()));
        let started = || {
            let mut containers = Containers::default();
            containers.hear(Notice::Changed(id("infra")));
            containers.hear(Notice::Changed(id("member")));
            let of_infra = next(&mut containers, "infra");
            let of_member = next(&mut containers, "member");
            found(&mut containers, of_member, &member);
            assert_eq!(known(&containers), [], "nothing is wrong with it");
            containers.take_change();
            (containers, of_infra)
        };
        let (mut containers, ticket) = started();
        found(&mut containers, ticket, &infra);
        assert!(containers.take_change());
        assert_eq!(known(&containers), [at("infra", &["172.17.0.2"]), at("member", &[])]);

        // If it is not there, that is wrong with the other one.
        for found in [InspectionResult::NotRunning, InspectionResult::Unknown] {
            let (mut containers, ticket) = started();
            containers.inspected(ticket, found);
            assert!(containers.take_change());
            assert_eq!(known(&containers), [at("member", &[])]);
        }
        let (mut containers, _) = started();
        containers.hear(Notice::Destroyed(id("infra")));
        assert!(containers.take_change());
        assert_eq!(known(&containers), [at("member", &[])]);
    }

    #[test]
    fn a_member_that_is_published_is_not_withdrawn_when_its_owner_is_to_be_inspected() {
        let infra = container("infra", bridge("172.17.0.2"));
        let member = container("member", Network::Of("infra".into()));
        let mut containers = with(&[infra.clone(), member.clone()]);
        containers.hear(Notice::Ended(id("infra")));
        let ticket = next(&mut containers, "infra");
        assert_eq!(known(&containers), [], "whether the owner goes on is not known");
        containers.take_change();
        containers.inspected(ticket, InspectionResult::NotRunning);
        assert!(containers.take_change());
        assert_eq!(known(&containers), [at("member", &[])]);
        // A list that the engine read before, and an event.
        containers.relist(listed(&["infra", "member"]));
        assert_eq!(known(&containers), [at("member", &[])]);
        containers.hear(Notice::Changed(id("infra")));
        let ticket = next(&mut containers, "infra");
        assert_eq!(known(&containers), [at("member", &[])]);
        found(&mut containers, ticket, &infra);
        assert_eq!(known(&containers), [at("infra", &["172.17.0.2"]), at("member", &[])]);

        // The session in which the owner was to be inspected has ended, and the list does not have it.
        let mut containers = Containers::default();
        containers.hear(Notice::Changed(id("infra")));
        containers.hear(Notice::Changed(id("member")));
        let _of_infra = next(&mut containers, "infra");
        let ticket = next(&mut containers, "member");
        found(&mut containers, ticket, &member);
        assert_eq!(known(&containers), []);
        containers.begin();
        containers.take_change();
        containers.relist(listed(&["member"]));
        assert!(containers.take_change());
        assert_eq!(known(&containers), [at("member", &[])]);
    }

    #[test]
    fn a_container_is_gone_the_moment_it_ends() {
        let mut containers = with(&[container("a", bridge("172.17.0.2"))]);
        let before = containers.inventory();
        containers.hear(Notice::Ended(id("a")));
        assert_eq!(known(&containers), []);
        assert!(before.containers[0].left.has_ended());
        let ticket = next(&mut containers, "a");
        found(&mut containers, ticket, &container("a", bridge("172.17.0.3")));
        assert_eq!(known(&containers), [at("a", &["172.17.0.3"])]);
    }

    #[test]
    fn a_run_has_one_end_though_the_stream_replays_that_of_the_run_before() {
        let a = container("a", bridge("172.17.0.2"));
        let mut containers = with(std::slice::from_ref(&a));
        let before = containers.inventory().containers.remove(0);
        containers.hear(Notice::Ended(id("a")));
        let ticket = next(&mut containers, "a");
        containers.inspected(ticket, InspectionResult::Unknown);
        containers.retry();
        let ticket = next(&mut containers, "a");
        assert!(containers.inspected(ticket, running(&a)).is_none());
        let now = containers.inventory().containers.remove(0);
        before.run.mark_ended();
        assert!(now.run.has_ended() && before.left.has_ended() && !now.left.has_ended());
        // Another run has another end.
        let again = Container { started_at: "2026-01-01T00:00:01Z".into(), ..a };
        let ticket = look(&mut containers, "a");
        assert!(containers.inspected(ticket, running(&again)).is_some());
        assert!(!containers.inventory().containers[0].run.has_ended());
    }

    #[test]
    fn what_did_not_change_is_the_same() {
        let a = container("a", bridge("172.17.0.2"));
        let mut containers = with(&[a.clone(), container("b", bridge("172.17.0.3"))]);
        assert!(containers.take_change());
        let before = containers.inventory();
        containers.list_again();
        containers.relist(listed(&["a", "b"]));
        for _ in 0..2 {
            let ticket = containers.next().unwrap();
            let again =
                Container { id: ticket.id.clone(), ..before.containers[0].as_ref().clone() };
            let again =
                if ticket.id == a.id { again } else { before.containers[1].as_ref().clone() };
            found(&mut containers, ticket, &again);
        }
        containers.networks(Bridges::default(), OtherNetworks::default());
        containers.host(None);
        assert!(!containers.take_change());
        assert_eq!(containers.inventory(), before);
        let ticket = look(&mut containers, "a");
        found(&mut containers, ticket, &Container { is_healthy: false, ..a });
        assert!(containers.take_change());
        let now = containers.inventory();
        assert_ne!(now, before);
        assert!(Arc::ptr_eq(&now.containers[1], &before.containers[1]));
        containers.run_has_ended();
        assert_ne!(containers.inventory(), now);
    }

    #[test]
    fn what_hangs_on_an_address_ends_with_it_and_not_before() {
        let network = |networks: &[(&str, &str)]| {
            on(&networks.iter().map(|(name, a)| (*name, *a, "10.0.0.1")).collect::<Vec<_>>())
        };
        let first = container("a", network(&[("n1", "10.0.1.2"), ("n2", "10.0.2.2")]));
        let next = |change: &dyn Fn(&mut Container)| {
            let mut containers = with(std::slice::from_ref(&first));
            let before = containers.inventory().containers.remove(0);
            let mut now = first.clone();
            change(&mut now);
            let ticket = look(&mut containers, "a");
            found(&mut containers, ticket, &now);
            assert!(!containers.inventory().containers[0].left.has_ended());
            before.left.has_ended()
        };
        assert!(!next(&|a| a.is_healthy = false));
        assert!(!next(&|a| a.name = "other".into()));
        assert!(next(&|a| a.network = network(&[("n1", "10.0.1.2")])));
        assert!(next(&|a| a.network = network(&[("n1", "10.0.1.2"), ("n3", "10.0.3.2")])));
        let three = [("n0", "10.0.0.2"), ("n1", "10.0.1.2"), ("n2", "10.0.2.2")];
        assert!(!next(&|a| a.network = network(&three)));
        assert!(!next(&|a| a.is_paused = true));
        assert!(!next(&|a| a.is_stopping = true));
        assert!(next(&|a| a.network = network(&[("n2", "10.0.2.2")])));
        assert!(next(&|a| a.network = Network::Host));
        assert!(next(&|a| a.is_restarting = true));
        assert!(next(&|a| a.started_at = "2026-01-01T00:00:01Z".into()));
    }

    #[test]
    fn the_first_list_is_complete_when_each_of_it_was_inspected_or_ended() {
        let mut containers = Containers::default();
        assert!(!containers.is_complete());
        containers.relist(listed(&["a", "b", "c"]));
        containers.hear(Notice::Ended(id("a")));
        containers.hear(Notice::Destroyed(id("b")));
        assert!(!containers.is_complete());
        let _a = next(&mut containers, "a");
        let c = next(&mut containers, "c");
        containers.inspected(c, InspectionResult::Unknown);
        assert!(containers.is_complete());
        // A later list changes the known state step by step.
        containers.relist(listed(&["d"]));
        assert!(containers.is_complete());

        let mut containers = Containers::default();
        containers.relist(vec![]);
        assert!(containers.is_complete(), "nothing runs");
    }

    #[test]
    fn a_new_list_replaces_what_was_known() {
        let mut containers = with(&[
            container("a", bridge("172.17.0.2")),
            container("b", bridge("172.17.0.3")),
            container("gone", bridge("172.17.0.4")),
        ]);
        let old = look(&mut containers, "a");
        containers.begin();
        containers.relist(listed(&["a", "b", "c"]));
        found(&mut containers, old, &container("a", bridge("172.17.0.9")));
        let c = next(&mut containers, "c");
        assert!(containers.is_fresh_about(&id("gone")), "who is not known yet is looked at first");
        // Connected to a network meanwhile: the inspection from the list is void, and a later one counts.
        let a = next(&mut containers, "a");
        containers.hear(Notice::Changed(id("a")));
        containers.inspected(a, InspectionResult::NotRunning);
        let again = next(&mut containers, "a");
        let b = next(&mut containers, "b");
        containers.inspected(b, InspectionResult::Unknown);
        containers.hear(Notice::Ended(id("c")));
        found(&mut containers, c, &container("c", bridge("172.17.0.6")));
        assert!(!containers.is_fresh());
        found(&mut containers, again, &container("a", bridge("172.17.0.5")));
        assert!(containers.is_fresh());
        // If the inspection fails, the container stays as it was.
        assert_eq!(known(&containers), [at("a", &["172.17.0.5"]), at("b", &["172.17.0.3"])]);
    }

    #[test]
    fn a_list_says_nothing_of_those_whom_an_event_told_of_meanwhile() {
        let [a, b, c] = [("a", 2), ("b", 3), ("c", 4)]
            .map(|(name, part)| container(name, bridge(&format!("172.17.0.{part}"))));
        let mut containers = with(&[a.clone(), b]);
        containers.list_again();
        // The engine has read its list: a and b run.
        containers.hear(Notice::Ended(id("b")));
        let ticket = next(&mut containers, "b");
        containers.inspected(ticket, InspectionResult::NotRunning);
        let ticket = look(&mut containers, "c");
        found(&mut containers, ticket, &c);
        let ticket = look(&mut containers, "a");
        found(&mut containers, ticket, &container("a", bridge("172.17.0.7")));
        let old = |name, address: &str| Listed {
            id: id(name),
            addresses: Some([address.parse().unwrap()].into()),
        };
        containers.relist(vec![old("a", "172.17.0.2"), old("b", "172.17.0.3")]);
        assert_eq!(known(&containers), [at("a", &["172.17.0.7"]), at("c", &["172.17.0.4"])]);
        let looked_at: BTreeSet<_> =
            std::iter::from_fn(|| containers.next()).map(|ticket| ticket.id).collect();
        assert_eq!(looked_at, [id("a"), id("b"), id("c")].into());
    }

    #[test]
    fn an_address_that_a_list_does_not_give_is_withdrawn_before_any_inspection() {
        let network =
            on(&[("bridge", "172.17.0.2", "172.17.0.1"), ("other", "172.18.0.2", "172.18.0.1")]);
        let mut containers = with(&[container("a", network)]);
        let says = |address: &str| Listed {
            id: id("a"),
            addresses: Some([address.parse().unwrap()].into()),
        };
        containers.relist(listed(&["a"]));
        let before = containers.inventory();
        assert_eq!(known(&containers)[0].1.len(), 2, "a list that does not say changes nothing");
        containers.relist(vec![says("172.18.0.2")]);
        assert_eq!(known(&containers), [at("a", &["172.18.0.2"])]);
        assert!(before.containers[0].left.has_ended());
        // A new address in a list only counts after an inspection.
        containers.relist(vec![says("172.17.0.9")]);
        assert_eq!(known(&containers), [at("a", &[])]);
    }

    #[test]
    fn an_address_is_gone_with_its_network_before_any_inspection() {
        let network =
            on(&[("bridge", "172.17.0.2", "172.17.0.1"), ("other", "172.18.0.2", "172.18.0.1")]);
        let a = container("a", network);
        let mut containers = with(std::slice::from_ref(&a));
        let stale = look(&mut containers, "a");
        containers.hear(Notice::Left(id("a"), "other".into()));
        assert_eq!(known(&containers), [at("a", &["172.17.0.2"])]);
        found(&mut containers, stale, &a);
        assert_eq!(known(&containers), [at("a", &["172.17.0.2"])]);
    }

    #[test]
    fn a_network_that_is_left_is_known_by_its_name_too() {
        let mut containers = with(&[container("a", bridge("172.17.0.2"))]);
        let Network::Own(mut networks) = bridge("172.18.0.2") else { unreachable!() };
        let other = networks.remove("bridge").unwrap();
        networks.insert("0123".into(), Attachment { name: "other".into(), ..other });
        let ticket = look(&mut containers, "b");
        found(&mut containers, ticket, &container("b", Network::Own(networks)));
        containers.hear(Notice::Left(id("b"), "other".into()));
        assert_eq!(known(&containers), [at("a", &["172.17.0.2"]), at("b", &[])]);
    }

    #[test]
    fn a_late_destroy_takes_only_its_own_container() {
        let mut containers = with(&[container("a", bridge("172.17.0.2"))]);
        containers.hear(Notice::Ended(id("a")));
        let ticket = next(&mut containers, "a");
        containers.inspected(ticket, InspectionResult::NotRunning);
        let ticket = look(&mut containers, "b");
        found(&mut containers, ticket, &container("b", bridge("172.17.0.2")));
        containers.hear(Notice::Destroyed(id("a")));
        assert_eq!(known(&containers), [at("b", &["172.17.0.2"])]);
    }

    #[test]
    fn a_look_for_the_unknown_asks_for_them_alone_and_before_a_list() {
        let mut containers = with(&[container("a", bridge("172.17.0.2"))]);
        containers.relist(listed(&["a", "b", "c"]));
        let _b = next(&mut containers, "b");
        containers.begin_look();
        containers.look_at(listed(&["a", "b", "c", "d"]), 0);
        let order: Vec<_> = std::iter::from_fn(|| containers.next()).map(|t| t.id).collect();
        assert_eq!(order, ["c", "d", "a"].map(id));
    }

    #[test]
    fn a_run_that_was_sent_its_stop_signal_is_stopping_whatever_an_inspection_says() {
        let a = Container { stop_signal: 3, ..container("a", bridge("172.17.0.2")) };
        let mut containers = with(std::slice::from_ref(&a));
        let is_stopping =
            |containers: &Containers| containers.inventory().containers[0].is_stopping;
        containers.hear(Notice::Signalled(id("a"), 1));
        containers.hear(Notice::Signalled(id("a"), 15));
        containers.hear(Notice::Signalled(id("b"), 3));
        assert!(!is_stopping(&containers));
        let before = containers.inventory();
        containers.hear(Notice::Signalled(id("a"), 3));
        assert!(is_stopping(&containers));
        assert!(!before.containers[0].left.has_ended(), "it still answers");
        let ticket = look(&mut containers, "a");
        found(&mut containers, ticket, &a);
        assert!(is_stopping(&containers));
        // The stream replayed the signal and the end of the previous run.
        containers.hear(Notice::Ended(id("a")));
        let ticket = next(&mut containers, "a");
        found(&mut containers, ticket, &a);
        assert!(!is_stopping(&containers));
        // The next run has received no signal.
        containers.hear(Notice::Signalled(id("a"), 3));
        let again = Container { started_at: "2026-01-01T00:00:01Z".into(), ..a };
        let ticket = look(&mut containers, "a");
        found(&mut containers, ticket, &again);
        assert!(!is_stopping(&containers));
    }

    #[test]
    fn what_a_process_shows_counts_only_where_the_engine_gave_no_address() {
        let at_address = |address: &str| Attachment {
            name: SHOWN.into(),
            addresses: vec![address.parse().unwrap()],
            gateways: vec![],
            mac: None,
        };
        let none = container("a", Network::Own(BTreeMap::new()));
        let mut containers = with(&[none.clone(), container("b", bridge("172.17.0.3"))]);
        let unaddressed: Vec<_> = containers.hidden().map(|one| one.id.clone()).collect();
        assert_eq!(unaddressed, [id("a")]);
        for name in ["a", "b"] {
            containers.shown(&id(name), Some(at_address("10.1.0.2")));
        }
        assert_eq!(known(&containers), [at("a", &["10.1.0.2"]), at("b", &["172.17.0.3"])]);
        // Neither an inspection nor a list contains it.
        let before = containers.inventory();
        let ticket = look(&mut containers, "a");
        found(&mut containers, ticket, &none);
        containers.relist(vec![Listed { id: id("a"), addresses: Some(BTreeSet::new()) }]);
        assert_eq!(known(&containers), [at("a", &["10.1.0.2"])]);
        assert!(!before.containers[0].left.has_ended());
        containers.shown(&id("a"), Some(at_address("10.1.0.3")));
        assert!(before.containers[0].left.has_ended());
        assert_eq!(known(&containers), [at("a", &["10.1.0.3"])]);
        // Now the engine reports an address.
        let ticket = next(&mut containers, "a");
        found(&mut containers, ticket, &container("a", bridge("172.17.0.2")));
        assert_eq!(known(&containers), [at("a", &["172.17.0.2"])]);
        let ticket = look(&mut containers, "a");
        found(&mut containers, ticket, &none);
        containers.shown(&id("a"), None);
        assert_eq!(known(&containers), [at("a", &[])]);
    }

    #[test]
    fn what_a_process_showed_goes_when_the_network_list_says_that_the_engine_told_enough() {
        let shown = Attachment {
            name: SHOWN.into(),
            addresses: vec!["10.1.0.2".parse().unwrap()],
            gateways: vec![],
            mac: None,
        };
        let bridges = |ids: &[&str]| {
            ids.iter().map(|id| (NetworkId::from(*id), Bridge::default())).collect::<Bridges>()
        };
        let mut containers = with(&[container("a", on(&[("n", "10.2.0.2", "10.2.0.1")]))]);
        containers.networks(bridges(&["other"]), OtherNetworks::default());
        containers.shown(&id("a"), Some(shown));
        assert_eq!(known(&containers), [at("a", &["10.1.0.2", "10.2.0.2"])]);
        let before = containers.inventory();
        containers.networks(bridges(&["other", "another"]), OtherNetworks::default());
        assert_eq!(known(&containers), [at("a", &["10.1.0.2", "10.2.0.2"])]);
        // Its network is listed now.
        containers.networks(bridges(&["other", "n"]), OtherNetworks::default());
        assert_eq!(known(&containers), [at("a", &["10.2.0.2"])]);
        assert!(before.containers[0].left.has_ended() && containers.take_change());
    }

    /// Otherwise it would keep an address that belongs to another container by now, and the doubt about it would count as
    /// resolved.
    #[test]
    fn what_the_kernel_shows_of_a_container_does_not_outdate_a_list_that_is_on_its_way() {
        let list = || vec![Listed { id: id("a"), addresses: Some(BTreeSet::new()) }];
        let plug = Plug { index: 7, interface: None, is_port: true };
        let a = Container { stop_signal: 15, ..container("a", bridge("172.17.0.2")) };
        let plugged = |all: &mut Containers| all.plugged(&id("a"), vec![plug]);
        let signalled = |all: &mut Containers| all.hear(Notice::Signalled(id("a"), 15));
        let all: [&dyn Fn(&mut Containers); 2] = [&plugged, &signalled];
        for happens in all {
            let mut containers = with(std::slice::from_ref(&a));
            containers.begin_look();
            happens(&mut containers);
            containers.look_at(list(), 1);
            assert_eq!(known(&containers), [at("a", &[])]);

            let mut containers = with(std::slice::from_ref(&a));
            containers.list_again();
            happens(&mut containers);
            containers.relist(list());
            assert_eq!(known(&containers), [at("a", &[])]);
        }
        // An answer of the engine does.
        let mut containers = with(std::slice::from_ref(&a));
        let ticket = look(&mut containers, "a");
        containers.begin_look();
        found(&mut containers, ticket, &a);
        containers.look_at(list(), 1);
        assert_eq!(known(&containers), [at("a", &["172.17.0.2"])]);
    }

    #[test]
    fn a_newer_claim_on_an_address_has_the_older_looked_at_once() {
        let [a, b] = ["a", "b"].map(|name| container(name, bridge("172.17.0.2")));
        let mut containers = with(std::slice::from_ref(&a));
        let ticket = look(&mut containers, "b");
        found(&mut containers, ticket, &b);
        let ticket = next(&mut containers, "a");
        // Both have the address: this must not lead to endless inspections.
        found(&mut containers, ticket, &a);
        assert_eq!(containers.next(), None);
        containers.hear(Notice::Ended(id("b")));
        let ticket = next(&mut containers, "b");
        containers.inspected(ticket, InspectionResult::NotRunning);
        let ticket = look(&mut containers, "a");
        found(&mut containers, ticket, &Container { name: "other".into(), ..a });
        assert_eq!(containers.next(), None, "the other claim ended");
    }

    #[test]
    fn a_run_whose_process_is_not_watched_stays_to_be_watched() {
        let a = Container { pid: 7, ..container("a", bridge("172.17.0.2")) };
        let containers = with(&[a, container("b", bridge("172.17.0.3"))]);
        let unwatched = || containers.unwatched().map(|one| one.id.clone()).collect::<Vec<_>>();
        assert_eq!(unwatched(), [id("a")]);
        containers.running[&id("a")].run.is_that_of(Process { pid: 7, started: 1 });
        assert!(unwatched().is_empty());
    }
}
