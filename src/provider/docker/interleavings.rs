//! Random interleavings of what an engine does, what it tells, and when its answers arrive: at no moment may a connection
//! reach a service that its container did not ask for, and in the end everybody reaches theirs.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    net::{IpAddr, Ipv4Addr},
};

use bollard::models::{EventActor, EventMessage, EventMessageTypeEnum};
use proptest::prelude::*;

use super::{
    apply,
    containers::{Attachment, Containers, Found, Network, NetworkId, Running, Ticket},
};
use crate::{
    descriptor::Balance,
    discovery::Query,
    docker::client::Listed,
    model::{Binding, ConsumerId, ContainerId, Port, RunEnd},
    table::{Inputs, Route, RouteKey, Table},
};

/// Containers 0 to 3 have networks of their own; 4 lives in the network of 0, and 5 in that of 4.
const OWN: usize = 4;
const ALL: usize = 6;
const NETWORKS: usize = 3;

#[derive(Debug, Clone)]
enum Step {
    Start(usize),
    Die(usize),
    /// Removed, and made anew with another ID.
    Destroy(usize),
    Rename(usize),
    Connect(usize, usize),
    Disconnect(usize, usize),
    /// The engine reads what is so now, for one of the inspections under way,
    Read(usize),
    /// and an answer that it read earlier arrives.
    Arrive(usize),
    /// The stream of events breaks.
    Lose,
    /// A new session: subscribed, listed, and so many events of before the list replayed behind it.
    Relist(usize),
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
        1 => Just(Step::Lose),
        1 => (0..6_usize).prop_map(Step::Relist),
    ]
}

/// A container as it is.
#[derive(Debug, Default)]
struct Real {
    generation: u32,
    /// When its run started; `None` where it does not run.
    started: Option<u64>,
    end: RunEnd,
    /// The run whose network it joined, by whom and when that started.
    joined: Option<(usize, u64)>,
    /// Its addresses, by network.
    addresses: BTreeMap<usize, IpAddr>,
}

#[derive(Debug, Default)]
struct Engine {
    clock: u64,
    containers: [Real; ALL],
    events: Vec<EventMessage>,
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

    /// Whose network a container lives in: its own, or that of the run which it joined.
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
        self.tell(EventMessageTypeEnum::CONTAINER, "start", self.id(who).as_str(), None);
    }

    fn die(&mut self, who: usize) {
        if self.containers[who].started.take().is_some() {
            self.containers[who].end.mark_ended();
            self.tell(EventMessageTypeEnum::CONTAINER, "die", self.id(who).as_str(), None);
            for network in 0..NETWORKS {
                self.disconnect(who, network);
            }
        }
    }

    fn destroy(&mut self, who: usize) {
        if self.containers[who].started.is_none() {
            self.tell(EventMessageTypeEnum::CONTAINER, "destroy", self.id(who).as_str(), None);
            self.containers[who].generation += 1;
        }
    }

    /// It gets the lowest free address, so that addresses change hands as often as can be.
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
        self.tell(EventMessageTypeEnum::NETWORK, "connect", &name(network), Some(&id));
    }

    /// Whether it was on that network.
    fn disconnect(&mut self, who: usize, network: usize) -> bool {
        let was = self.containers[who].addresses.remove(&network).is_some();
        if was {
            let id = self.id(who);
            self.tell(EventMessageTypeEnum::NETWORK, "disconnect", &name(network), Some(&id));
        }
        was
    }

    fn tell(
        &mut self,
        typ: EventMessageTypeEnum,
        action: &str,
        subject: &str,
        container: Option<&ContainerId>,
    ) {
        let attributes =
            container.map(|id| HashMap::from([("container".to_owned(), id.as_str().to_owned())]));
        let actor = Some(EventActor { id: Some(subject.to_owned()), attributes });
        let action = Some(action.to_owned());
        self.events.push(EventMessage { typ: Some(typ), action, actor, ..EventMessage::default() });
    }

    fn inspect(&self, id: &ContainerId) -> Found {
        let Some(who) = self.find(id) else { return Found::NotRunning };
        let real = &self.containers[who];
        let Some(started) = real.started else { return Found::NotRunning };
        let own = real.addresses.iter().map(|(network, &address)| {
            let attachment = Attachment { addresses: vec![address], gateways: vec![] };
            (NetworkId::from(name(*network)), attachment)
        });
        let network = match target(who) {
            Some(target) => Network::Of(self.id(target).as_str().to_owned()),
            None => Network::Own(own.collect()),
        };
        let binding = |port: u16| Binding {
            origin: format!("BACKEND_{port}").into(),
            descriptor: format!("{};{port}", id.as_str()).parse().unwrap(),
        };
        Found::Running(Running {
            name: format!("c{who}").into(),
            started_at: format!("2026-01-01T00:00:00.{started:09}Z").into(),
            pid: 0,
            end: real.end.clone(),
            network,
            bindings: ports(who).map(binding).into(),
            problems: vec![],
        })
    }
}

fn target(who: usize) -> Option<usize> {
    [None, None, None, None, Some(0), Some(4)][who]
}

/// One that all ask for, and one of its own: those who share a network cannot hide each other there.
fn ports(who: usize) -> [u16; 2] {
    [80, 8000 + who as u16]
}

fn name(network: usize) -> String {
    format!("n{network}")
}

/// The provider, with its engine in hand.
#[derive(Default)]
struct World {
    engine: Engine,
    containers: Containers,
    /// Whether the kernel tells of the end of a run, as it does where the containers' processes can be seen.
    sees_processes: bool,
    /// Events that were told and applied.
    applied: usize,
    lost: bool,
    /// Whether one who runs has left a network since the stream broke: nobody can know who has the address now.
    left_unheard: bool,
    asked: Vec<Ticket>,
    read: VecDeque<(Ticket, Found)>,
}

impl World {
    fn step(&mut self, step: Step) {
        match step {
            Step::Start(who) => self.engine.start(who),
            Step::Die(who) => self.engine.die(who),
            Step::Destroy(who) => self.engine.destroy(who),
            Step::Rename(who) => {
                let id = self.engine.id(who);
                self.engine.tell(EventMessageTypeEnum::CONTAINER, "rename", id.as_str(), None);
            }
            Step::Connect(who, network) => {
                if self.engine.containers[who].started.is_some() {
                    self.engine.connect(who, network);
                }
            }
            Step::Disconnect(who, network) => {
                self.left_unheard |= self.engine.disconnect(who, network) && self.lost;
            }
            Step::Read(n) => self.read(n),
            Step::Arrive(n) => self.arrive(n),
            Step::Lose => self.lost = true,
            Step::Relist(replayed) => self.relist(replayed),
        }
        if !self.lost {
            let told = &self.engine.events[self.applied..];
            self.asked.extend(told.iter().filter_map(|event| apply(&mut self.containers, event)));
            self.applied = self.engine.events.len();
        }
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

    fn relist(&mut self, replayed: usize) {
        (self.lost, self.left_unheard) = (false, false);
        self.read.clear();
        self.asked = self.containers.relist(self.engine.list()).into();
        self.applied = self.engine.events.len().saturating_sub(replayed);
    }

    /// What each connection that could be made now would reach.
    fn check(&self) -> Result<(), TestCaseError> {
        let table = self.table();
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
        Ok(())
    }

    /// While events are lost nobody can know who left a network nor, where processes cannot be seen, who ended. From the
    /// list on, that of a container of its own network is known; of one in another's network only once both have been
    /// inspected, as a list does not tell one run of theirs from the next.
    fn is_to_be_right(&self, route: &Route) -> bool {
        let ConsumerId::Container { id, .. } = &route.consumer else { unreachable!() };
        let listing = self.containers.listing();
        let consumer = listing.consumers.iter().find(|c| c.id == route.consumer);
        let namespace = consumer.map_or("", |consumer| &consumer.namespace);
        let fresh = |id: &str| self.containers.is_fresh_about(id);
        match self.sees_processes {
            true => !self.left_unheard,
            false if self.lost => false,
            false => namespace == id.as_str() || (fresh(id.as_str()) && fresh(namespace)),
        }
    }

    fn table(&self) -> Table {
        let listing = self.containers.listing();
        let lives = |end: &bool| !(self.sees_processes && *end);
        let inputs = Inputs {
            consumers: &listing
                .consumers
                .iter()
                .filter(|consumer| lives(&consumer.has_ended()))
                .collect::<Vec<_>>(),
            contested: &listing.contested,
            known: &listing.known,
            networks: &listing.networks,
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
        Table::default().next(&inputs, query).unwrap_or_default()
    }

    /// All that is under way arrives.
    fn settle(&mut self) {
        if self.lost {
            self.step(Step::Relist(0));
        }
        while !self.asked.is_empty() {
            self.read(0);
        }
        while !self.read.is_empty() {
            self.arrive(0);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn nobody_ever_reaches_what_another_asked_for(
        steps in prop::collection::vec(step(), 0..80), sees_processes: bool,
    ) {
        let mut world = World { sees_processes, ..World::default() };
        for step in steps {
            world.step(step);
            world.check()?;
        }
        world.settle();
        prop_assert!(world.containers.is_fresh());
        world.check()?;
        let mut listed: Vec<_> = world.containers.listing().consumers.into_iter().collect();
        listed.sort_by(|a, b| a.name.cmp(&b.name));
        let listed: Vec<_> = listed.into_iter().map(|c| (c.name.to_string(), c.sources.clone())).collect();
        let real = (0..ALL).filter(|&who| world.engine.owner(who).is_some());
        let real: Vec<_> = real.map(|who| (format!("c{who}"), world.engine.addresses(who))).collect();
        prop_assert_eq!(listed, real);
    }
}
