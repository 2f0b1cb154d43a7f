//! Random interleavings of an engine's actions, its events, and the arrival of its answers. At no time may a connection
//! reach a service that its container did not ask for, nor an endpoint of another container. In the end each container
//! reaches its own services.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use proptest::prelude::*;

use super::{
    answers::{Actor, Attributes, Event},
    container::{Attachment, Container, Inventory, Network, NetworkId, samples},
    containers::Containers,
    inspections::InspectionTicket,
    read::{InspectionResult, Listed, Notice, notice},
};
use crate::{
    consumer::Binding,
    descriptor::Balance,
    discovery::{
        Endpoints, Query,
        docker::offers::{Made, Offers},
    },
    model::{ConsumerId, ContainerId, Port, RunEnd, ServiceName},
    provider::{Listing, docker::Listings},
    table::{Inputs, Route, RouteKey, Table},
};

/// Containers 0 to 3 have their own networks. 4 uses the network of 0, and 5 the network of 4.
const OWN: usize = 4;
const ALL: usize = 6;
const NETWORKS: usize = 3;

#[derive(Debug, Clone)]
enum Step {
    Start(usize),
    Die(usize),
    /// Removed, and created again with another ID.
    Destroy(usize),
    Rename(usize),
    /// Pauses it, or unpauses it.
    Pause(usize),
    Connect(usize, usize),
    Disconnect(usize, usize),
    /// The engine reads the current state for one of the running inspections.
    Read(usize),
    /// An answer that the engine has read arrives.
    Arrive(usize),
    /// The stream of events breaks.
    Lose,
    /// A new session: the stream is open, this number of earlier events is replayed, and a list is requested.
    Subscribe(usize),
    /// The stream breaks, a new session starts as with `Subscribe`, and its list arrives immediately.
    Relist(usize),
    /// A list is requested within a session.
    ListAgain,
    /// The engine reads the list.
    ReadList,
    /// The list arrives.
    ArriveList,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..ALL).prop_map(Step::Start),
        4 => (0..ALL).prop_map(Step::Die),
        1 => (0..ALL).prop_map(Step::Destroy),
        1 => (0..ALL).prop_map(Step::Rename),
        3 => (0..OWN, 0..NETWORKS).prop_map(|(who, network)| Step::Connect(who, network)),
        3 => (0..OWN, 0..NETWORKS).prop_map(|(who, network)| Step::Disconnect(who, network)),
        8 => any::<usize>().prop_map(Step::Read),
        8 => any::<usize>().prop_map(Step::Arrive),
        1 => (0..ALL).prop_map(Step::Pause),
        1 => Just(Step::Lose),
        3 => (0..6_usize).prop_map(Step::Subscribe),
        1 => (0..6_usize).prop_map(Step::Relist),
        2 => Just(Step::ListAgain),
        4 => Just(Step::ReadList),
        4 => Just(Step::ArriveList),
    ]
}

/// The real state of a container.
#[derive(Debug, Default)]
struct Real {
    generation: u32,
    /// When its run started; `None` if it does not run.
    started: Option<u64>,
    end: RunEnd,
    is_paused: bool,
    /// The run whose network it joined: its container and start.
    joined: Option<(usize, u64)>,
    /// Its addresses, by network.
    addresses: BTreeMap<usize, IpAddr>,
}

#[derive(Debug, Default)]
struct Engine {
    /// Whether the kernel reports the end of a run, as if the containers' processes were visible.
    sees_processes: bool,
    clock: u64,
    containers: [Real; ALL],
    events: Vec<Event>,
}

impl Engine {
    fn id(&self, who: usize) -> ContainerId {
        ContainerId::new(&format!("c{who}-{}", self.containers[who].generation))
    }

    fn find(&self, id: &ContainerId) -> Option<usize> {
        (0..ALL).find(|&who| self.id(who) == *id)
    }

    fn list(&self) -> Vec<Listed> {
        let running = (0..ALL).filter(|&who| self.containers[who].started.is_some());
        let listed = running.map(|who| Listed {
            id: self.id(who),
            addresses: Some(self.containers[who].addresses.values().copied().collect()),
        });
        listed.collect()
    }

    /// The container that owns this one's network: itself, or the run that it joined.
    fn owner(&self, who: usize) -> Option<usize> {
        let started = self.containers[who].started?;
        let Some(target) = target(who) else { return Some(who) };
        let joined = self.containers[target].started.is_some_and(|other| other < started);
        joined.then(|| self.owner(target)).flatten()
    }

    /// Whether connections of this container may come from an address.
    fn may_dial_from(&self, who: usize, source: IpAddr) -> bool {
        let container = &self.containers[who];
        let owner = match container.joined {
            _ if container.started.is_none() => None,
            None => Some(who),
            Some((owner, started)) => {
                Some(owner).filter(|&owner| self.containers[owner].started == Some(started))
            }
        };
        owner.is_some_and(|owner| self.containers[owner].addresses.values().any(|a| *a == source))
    }

    /// The address at which a container offers its service: the one on its first network, if it has any. No other container
    /// offers this service, so it does not matter whether it is paused.
    fn endpoint(&self, who: usize) -> Option<IpAddr> {
        let owner = self.owner(who)?;
        self.containers[owner].addresses.values().next().copied()
    }

    fn addresses(&self, who: usize) -> Vec<IpAddr> {
        let owner = self.owner(who).map(|owner| &self.containers[owner]);
        owner.into_iter().flat_map(|owner| owner.addresses.values().copied()).collect()
    }

    fn start(&mut self, who: usize) {
        let can = target(who).is_none_or(|target| self.containers[target].started.is_some());
        if self.containers[who].started.is_some() || !can {
            return;
        }
        if target(who).is_none() {
            self.connect(who, 0);
        }
        self.clock += 1;
        let owner = target(who).and_then(|target| {
            let running = |who: usize| Some((who, self.containers[who].started?));
            self.containers[target].joined.or_else(|| running(target))
        });
        let container = &mut self.containers[who];
        (container.started, container.joined) = (Some(self.clock), owner);
        container.end = RunEnd::default();
        self.tell("container", "start", self.id(who).as_str(), None);
    }

    fn die(&mut self, who: usize) {
        if self.containers[who].started.take().is_some() {
            if self.sees_processes {
                self.containers[who].end.mark_ended();
            }
            self.containers[who].is_paused = false;
            self.tell("container", "die", self.id(who).as_str(), None);
            for network in 0..NETWORKS {
                self.disconnect(who, network);
            }
        }
    }

    fn destroy(&mut self, who: usize) {
        if self.containers[who].started.is_none() {
            self.tell("container", "destroy", self.id(who).as_str(), None);
            self.containers[who].generation += 1;
        }
    }

    fn pause(&mut self, who: usize) {
        let container = &mut self.containers[who];
        if container.started.is_some() {
            container.is_paused = !container.is_paused;
            let action = if container.is_paused { "pause" } else { "unpause" };
            self.tell("container", action, self.id(who).as_str(), None);
        }
    }

    /// Connects a container to a network. It gets the lowest free address, so that addresses change owners as often as
    /// possible.
    fn connect(&mut self, who: usize, network: usize) {
        if self.containers[who].addresses.contains_key(&network) {
            return;
        }
        let taken = |address: &IpAddr| {
            self.containers.iter().any(|c| c.addresses.get(&network) == Some(address))
        };
        let mut all = (2..).map(|n| IpAddr::from(Ipv4Addr::new(10, network as u8, 0, n)));
        let free = all.find(|address| !taken(address)).expect("fewer containers than addresses");
        self.containers[who].addresses.insert(network, free);
        let id = self.id(who);
        self.tell("network", "connect", &name(network), Some(&id));
    }

    /// Disconnects a container from a network. Returns whether it was connected.
    fn disconnect(&mut self, who: usize, network: usize) -> bool {
        let was = self.containers[who].addresses.remove(&network).is_some();
        if was {
            let id = self.id(who);
            self.tell("network", "disconnect", &name(network), Some(&id));
        }
        was
    }

    fn tell(&mut self, kind: &str, action: &str, subject: &str, container: Option<&ContainerId>) {
        let attributes = container.map(|id| Attributes {
            container: Some(id.as_str().to_owned()),
            ..Attributes::default()
        });
        let actor = Some(Actor { id: Some(subject.to_owned()), attributes });
        let action = Some(action.to_owned());
        self.events.push(Event { kind: Some(kind.to_owned()), action, actor });
    }

    fn inspect(&self, id: &ContainerId) -> InspectionResult {
        let Some(who) = self.find(id) else { return InspectionResult::NotRunning };
        let real = &self.containers[who];
        let Some(started) = real.started else { return InspectionResult::NotRunning };
        let own = real.addresses.iter().map(|(network, &address)| {
            let name = name(*network).into();
            let attachment =
                Attachment { name, addresses: vec![address], gateways: vec![], mac: None };
            (NetworkId::clone(&attachment.name), attachment)
        });
        let network = match target(who) {
            Some(target) => Network::Of(self.id(target).as_str().to_owned()),
            None => Network::Own(own.collect()),
        };
        let bindings = ports(who).map(|port| format!("BACKEND_{port}={};{port}", id.as_str()));
        let offer = format!("SERVICE_80_NAME={}", id.as_str());
        let container = Container {
            id: id.clone(),
            name: format!("c{who}").into(),
            started_at: format!("2026-01-01T00:00:00.{started:09}Z").into(),
            pid: 0,
            run: real.end.clone(),
            left: RunEnd::default(),
            plugs: Vec::new(),
            network,
            variables: bindings.into_iter().chain([offer]).collect(),
            labels: BTreeMap::new(),
            unread: 0,
            exposed: BTreeSet::new(),
            published: BTreeMap::new(),
            stop_signal: 15,
            is_stopping: false,
            is_paused: real.is_paused,
            is_restarting: false,
            is_healthy: true,
        };
        InspectionResult::Running(container.into())
    }
}

fn target(who: usize) -> Option<usize> {
    [None, None, None, None, Some(0), Some(4)][who]
}

/// One port that all containers ask for, and one of its own: containers that share a network cannot hide each other there.
fn ports(who: usize) -> [u16; 2] {
    [80, 8000 + who as u16]
}

fn query(service: &ContainerId) -> Query {
    let service = ServiceName::new(service.as_str()).unwrap();
    Query { via: "docker".into(), service, tags: Default::default(), dc: None, port: None }
}

fn name(network: usize) -> String {
    format!("n{network}")
}

/// The follower with its engine, and what is derived from its inventory.
#[derive(Default)]
struct World {
    engine: Engine,
    containers: Containers,
    published: Inventory,
    listing: Listing,
    listings: Option<Listings>,
    /// The last table, from which the next one is built.
    last: Table,
    made: Made,
    /// Every answer that was given, as long as one of its endpoints lives: its reader may still use it.
    answers: Vec<(ContainerId, Arc<Endpoints>)>,
    /// Events that were sent and applied.
    applied: usize,
    /// The stream is broken.
    lost: bool,
    /// No list has arrived since the stream broke.
    unlisted: bool,
    /// Whether a running container has left a network since the stream broke: nobody can know who has the address now.
    left_unheard: bool,
    read: VecDeque<(InspectionTicket, InspectionResult)>,
    asked: Vec<InspectionTicket>,
    list: List,
}

#[derive(Default)]
enum List {
    #[default]
    None,
    Asked,
    Read(Vec<Listed>),
}

impl World {
    fn step(&mut self, step: Step) -> Result<(), TestCaseError> {
        match step {
            Step::Start(who) => self.engine.start(who),
            Step::Die(who) => {
                self.engine.die(who);
                if self.engine.sees_processes {
                    self.containers.run_has_ended();
                }
            }
            Step::Destroy(who) => self.engine.destroy(who),
            Step::Rename(who) => {
                let id = self.engine.id(who);
                self.engine.tell("container", "rename", id.as_str(), None);
            }
            Step::Pause(who) => self.engine.pause(who),
            Step::Connect(who, network) => {
                if self.engine.containers[who].started.is_some() {
                    self.engine.connect(who, network);
                }
            }
            Step::Disconnect(who, network) => {
                self.left_unheard |= self.engine.disconnect(who, network) && self.unlisted;
            }
            Step::Read(n) => self.read(n),
            Step::Arrive(n) => self.arrive(n),
            Step::Lose => (self.lost, self.unlisted) = (true, true),
            Step::Subscribe(_) if !self.lost => {}
            Step::Subscribe(replayed) => {
                (self.lost, self.unlisted) = (false, true);
                self.asked.clear();
                self.containers.begin();
                self.list = List::Asked;
                self.applied = self.engine.events.len().saturating_sub(replayed);
            }
            Step::Relist(replayed) => {
                for step in
                    [Step::Lose, Step::Subscribe(replayed), Step::ReadList, Step::ArriveList]
                {
                    self.step(step)?;
                }
            }
            Step::ListAgain => {
                if !self.unlisted && matches!(self.list, List::None) {
                    self.containers.list_again();
                    self.list = List::Asked;
                }
            }
            Step::ReadList => {
                if matches!(self.list, List::Asked) {
                    self.list = List::Read(self.engine.list());
                }
            }
            Step::ArriveList => self.arrive_list()?,
        }
        if !self.lost {
            let told = self.engine.events[self.applied..].iter();
            told.filter_map(notice).for_each(|notice| self.containers.hear(notice));
            self.applied = self.engine.events.len();
            self.asked.extend(std::iter::from_fn(|| self.containers.next()));
        }
        let knows_all = !self.lost && !self.unlisted && self.containers.is_complete();
        if knows_all && self.containers.take_change() {
            self.publish()?;
        }
        Ok(())
    }

    fn arrive_list(&mut self) -> Result<(), TestCaseError> {
        if self.lost || !matches!(self.list, List::Read(_)) {
            return Ok(());
        }
        if let List::Read(list) = std::mem::take(&mut self.list) {
            let truly_known = self.truly_known();
            self.containers.relist(list);
            if !self.unlisted {
                prop_assert!(truly_known.is_subset(&self.truly_known()), "it is taken away");
            }
            (self.unlisted, self.left_unheard) = (false, false);
        }
        Ok(())
    }

    /// The containers whose known state equals their real state.
    fn truly_known(&self) -> BTreeSet<usize> {
        let known = self.containers.inventory().containers;
        let is_so = |who: usize| {
            let InspectionResult::Running(real) = self.engine.inspect(&self.engine.id(who)) else {
                return false;
            };
            known.iter().any(|known| **known == *real)
        };
        (0..ALL).filter(|&who| is_so(who)).collect()
    }

    fn publish(&mut self) -> Result<(), TestCaseError> {
        self.published = self.containers.inventory();
        let new = || Listings::new("BACKEND_".to_owned());
        self.listing = self.listings.get_or_insert_with(new).of(&self.published);
        prop_assert_eq!(&self.listing, &new().of(&self.published), "as if made at once");
        let offers = Offers::of(&self.published, true, &mut self.made);
        prop_assert_eq!(&offers, &Offers::of(&self.published, true, &mut Made::default()));
        self.answers.retain(|(_, answer)| !answer.living().list.is_empty());
        for who in 0..ALL {
            let id = self.engine.id(who);
            let answer = (id.clone(), Arc::new(offers.select(&query(&id), true)));
            if !answer.1.list.is_empty() && !self.answers.contains(&answer) {
                self.answers.push(answer);
            }
        }
        Ok(())
    }

    fn read(&mut self, n: usize) {
        if !self.asked.is_empty() {
            let ticket = self.asked.swap_remove(n % self.asked.len());
            let found = self.engine.inspect(&ticket.id);
            self.read.push_back((ticket, found));
        }
    }

    fn arrive(&mut self, n: usize) {
        if !self.read.is_empty() {
            let last = self.read.len() - 1;
            self.read.swap(n % (last + 1), last);
            if let Some((ticket, found)) = self.read.pop_back() {
                self.containers.inspected(ticket, found);
            }
        }
    }

    /// Checks, for each connection that could be made now, which endpoint it would reach.
    fn check(&mut self) -> Result<(), TestCaseError> {
        if let Some(table) = self.next_table() {
            self.last = table;
        }
        let table = &self.last;
        let everybodys = self.engine.containers.iter().flat_map(|real| real.addresses.values());
        for &source in everybodys.collect::<BTreeSet<_>>() {
            for port in (0..ALL).flat_map(ports) {
                let key = RouteKey::tcp(source, Port::new(port).unwrap());
                let Some(route) = table.route(&key).filter(|route| self.is_to_be_right(route))
                else {
                    continue;
                };
                let asks = |&who: &usize| {
                    self.engine.may_dial_from(who, source)
                        && route.binding.descriptor.service.as_str() == self.engine.id(who).as_str()
                };
                prop_assert!((0..ALL).any(|who| asks(&who)), "{key} is {}", route.consumer);
            }
        }
        for (service, answer) in &self.answers {
            let answer = answer.living();
            for (endpoint, stay) in &answer.stays {
                let runs: Vec<_> = stay.runs.iter().map(|(id, _)| id.as_str()).collect();
                let who = self.engine.find(service);
                let is_its = |who| self.engine.may_dial_from(who, endpoint.0.ip());
                if self.are_right(&runs) {
                    prop_assert!(who.is_some_and(is_its), "{service} is at {endpoint}");
                }
            }
        }
        Ok(())
    }

    fn is_to_be_right(&self, route: &Route) -> bool {
        let ConsumerId::Container { id, .. } = &route.consumer else { unreachable!() };
        let consumer = self.listing.consumers.iter().find(|c| c.id == route.consumer);
        let namespace = consumer.map_or("", |consumer| &consumer.namespace);
        self.are_right(&[id.as_str(), namespace])
    }

    /// Whether the known state of a container, and of the one that owns its network, must be correct. While events are
    /// lost, it is unknown which containers left a network and, if processes are not visible, which ones ended. After a
    /// list, containers with their own network are known. A container in another one's network is known only once both were
    /// inspected, because a list does not distinguish their runs.
    fn are_right(&self, runs: &[&str]) -> bool {
        let is_fresh = |id: &&str| self.containers.is_fresh_about(&ContainerId::new(id));
        match self.engine.sees_processes {
            true => !self.left_unheard,
            false if self.unlisted => false,
            false => runs.iter().all(|id| *id == runs[0]) || runs.iter().all(is_fresh),
        }
    }

    fn next_table(&self) -> Option<Table> {
        let listing = &self.listing;
        let alive = listing.consumers.iter().filter(|consumer| !consumer.has_ended());
        let inputs = Inputs {
            bounds: &crate::discovery::Bounds::default(),
            consumers: &alive.collect::<Vec<_>>(),
            contested: &listing.contested,
            known: &listing.known,
            confirmed: 0,
            networks: &listing.networks,
            wiring: &Default::default(),
            endpoints: &Default::default(),
            vips: &[],
            gateways_are_vips: true,
            balance: Balance::RoundRobin,
            now: std::time::Instant::now(),
        };
        let query = |binding: &Binding| {
            let service = binding.descriptor.service.clone();
            let (via, tags) = ("consul".into(), Default::default());
            Ok(Query { via, service, tags, dc: None, port: None })
        };
        self.last.next(&inputs, query)
    }

    /// Lets all running requests finish.
    fn settle(&mut self) -> Result<(), TestCaseError> {
        self.step(Step::Subscribe(0))?;
        self.step(Step::ReadList)?;
        self.step(Step::ArriveList)?;
        while !self.asked.is_empty() || !self.read.is_empty() {
            self.step(Step::Read(0))?;
            self.step(Step::Arrive(0))?;
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn nobody_ever_reaches_what_another_asked_for(
        steps in prop::collection::vec(step(), 0..120), sees_processes: bool,
    ) {
        let engine = Engine { sees_processes, ..Engine::default() };
        let mut world = World { engine, ..World::default() };
        world.step(Step::Relist(0))?;
        for step in steps {
            world.step(step)?;
            world.check()?;
        }
        world.settle()?;
        prop_assert!(world.containers.is_fresh());
        world.check()?;
        let consumers = world.listing.consumers.iter();
        let mut listed: Vec<_> = consumers.map(|c| (c.name.to_string(), c.sources.clone())).collect();
        listed.sort();
        let real = (0..ALL).filter(|&who| world.engine.owner(who).is_some());
        let real: Vec<_> = real.map(|who| (format!("c{who}"), world.engine.addresses(who))).collect();
        prop_assert_eq!(listed, real);
        let offers = Offers::of(&world.published, true, &mut Made::default());
        for who in 0..ALL {
            let offered = offers.select(&query(&world.engine.id(who)), true).list;
            let offered: Vec<_> = offered.iter().map(|endpoint| endpoint.0.ip()).collect();
            prop_assert_eq!(offered, Vec::from_iter(world.engine.endpoint(who)));
        }
    }
}

/// The cost of the change of one container on a host with many: `cargo test --release --lib one_of_many -- --nocapture`
#[test]
fn one_of_many_changes_and_one_is_derived() {
    const MANY: u32 = 10_000;
    let of = |id: &ContainerId, n: u32| {
        let address = Ipv4Addr::from(0x0a00_0000 + n).to_string();
        let variables = (1..=10).map(|port| format!("BACKEND_{port}=service-{n};{port}"));
        Container {
            id: id.clone(),
            variables: variables.chain([format!("SERVICE_80_NAME=service-{n}")]).collect(),
            ..samples::container(&format!("c{n}"), samples::bridge(&address))
        }
    };
    let ids: Vec<_> = (0..MANY).map(|n| ContainerId::new(&format!("{n:064x}"))).collect();
    let mut containers = Containers::default();
    containers.relist(ids.iter().map(|id| Listed { id: id.clone(), addresses: None }).collect());
    let mut number = 0..;
    while let Some(ticket) = containers.next() {
        let container = of(&ticket.id, number.next().unwrap());
        containers.inspected(ticket, InspectionResult::Running(container.into()));
    }
    let (mut listings, mut made) = (Listings::new("BACKEND_".to_owned()), Made::default());
    let mut derive = |containers: &Containers, what: &str| {
        let start = std::time::Instant::now();
        let inventory = containers.inventory();
        let published = start.elapsed();
        let listing = listings.of(&inventory);
        let listed = start.elapsed();
        let offers = Offers::of(&inventory, true, &mut made);
        let (all, bindings) = (start.elapsed(), listed - published);
        println!(
            "{what} of {MANY}: inventory {published:?}, bindings {bindings:?}, offers {:?}",
            all - listed
        );
        (listing, offers)
    };
    let (before, _) = derive(&containers, "all");
    containers.hear(Notice::Changed(ids[7].clone()));
    let ticket = containers.next().unwrap();
    let other = Container { name: "other".into(), ..of(&ids[7], 7) };
    containers.inspected(ticket, InspectionResult::Running(other.into()));
    let (now, offers) = derive(&containers, "one");
    let pairs = before.consumers.iter().zip(&now.consumers);
    let changed: Vec<_> = pairs.filter(|(one, now)| !Arc::ptr_eq(one, now)).collect();
    assert_eq!((changed.len(), &*changed[0].1.name), (1, "other"));
    assert_eq!(offers.select(&query(&ContainerId::new("service-7")), true).list.len(), 1);
}
