//! Reads the changes of interfaces in our own network namespace from the kernel. They arrive before the engine's events,
//! and also if the engine is silent. Also finds this host's ends of the containers' veth pairs, which cannot be forged from
//! inside a container.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::pending,
    io,
    os::fd::OwnedFd,
    sync::Arc,
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind,
        netlink::SocketAddrNetlink, recv, send, socket_with,
    },
};
use tokio::io::unix::AsyncFd;
use tracing::debug;

use super::{container::BridgePorts, process};
use crate::wiring::{Interface, Plug};

/// Describes what changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct LinkChange {
    /// An interface got or lost an address: a network's bridge may have come or gone.
    pub(super) addresses: bool,
    /// An interface disappeared, perhaps into another network namespace: a container may have left a network.
    pub(super) gone: bool,
    /// An interface was deleted: an address may be free for another container.
    pub(super) deleted: bool,
    /// A new interface of a kind that containers have: a container may have got an address.
    pub(super) came: bool,
    /// The network namespaces for which an interface with its other end there was added, removed or moved. By their number
    /// in our namespace.
    pub(super) namespaces: BTreeSet<i32>,
    /// A bridge has other ports or another name.
    pub(super) bridges: bool,
}

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Link {
    name: Option<Interface>,
    /// The number of the bridge of which it is a port.
    master: Option<u32>,
    /// The number of the namespace with its other end, if that is not ours.
    namespace: Option<i32>,
}

/// All interfaces of this namespace.
#[derive(Debug, Default)]
struct Cables {
    /// By their number.
    links: BTreeMap<u32, Link>,
    /// For each other namespace: the numbers of the interfaces whose other end is there.
    leading_to: BTreeMap<i32, BTreeSet<u32>>,
}

/// A netlink socket (man 7 rtnetlink) that receives the changes, and one for requests.
#[derive(Debug, Default)]
pub(super) struct Links {
    socket: Option<AsyncFd<Arc<OwnedFd>>>,
    asking: Option<OwnedFd>,
    buffer: Box<[u8]>,
    cables: Cables,
}

const MESSAGE: usize = 64 << 10;
/// `RTMGRP_LINK`, `RTMGRP_IPV4_IFADDR` and `RTMGRP_IPV6_IFADDR` (linux/rtnetlink.h).
const GROUPS: u32 = 0x1 | 0x10 | 0x100;

/// Types of messages (linux/rtnetlink.h, linux/netlink.h).
mod kind {
    pub(super) const ERROR: u16 = 2;
    pub(super) const DONE: u16 = 3;
    pub(super) const NEW_LINK: u16 = 16;
    pub(super) const DELETED_LINK: u16 = 17;
    pub(super) const GET_LINK: u16 = 18;
    pub(super) const NEW_ADDRESS: u16 = 20;
    pub(super) const DELETED_ADDRESS: u16 = 21;
    pub(super) const NEW_NAMESPACE: u16 = 88;
    pub(super) const GET_NAMESPACE: u16 = 90;
}

/// Length of a message's header: length, type, flags, sequence number, port.
const HEADER: usize = 16;

impl Links {
    /// Opens the sockets. Without them no changes arrive, and only the engine's events are used.
    pub(super) fn open() -> Self {
        let socket = socket(SocketFlags::NONBLOCK).and_then(|socket| {
            bind(&socket, &SocketAddrNetlink::new(0, GROUPS))?;
            process::register(Arc::new(socket))
        });
        if let Err(error) = &socket {
            debug!(%error, "cannot watch the interfaces");
        }
        let asking = socket.is_ok().then(|| self::socket(SocketFlags::empty()).ok()).flatten();
        let (buffer, cables) = (vec![0; MESSAGE].into(), Cables::default());
        let mut links = Self { socket: socket.ok(), asking, buffer, cables };
        // After the subscription, so that no change is missed.
        links.list();
        links
    }

    /// Whether changes arrive.
    pub(super) fn are_watched(&self) -> bool {
        self.socket.is_some()
    }

    /// Lists all interfaces.
    fn list(&mut self) {
        const DUMP: u16 = 0x300;
        // An ifinfomsg, and IFLA_EXT_MASK with RTEXT_FILTER_SKIP_STATS: counters would be half of the answer.
        let mut body = vec![0; 16];
        body.extend([8u16, 29].map(u16::to_ne_bytes).concat());
        body.extend((1u32 << 3).to_ne_bytes());
        let mut cables = Cables::default();
        let listed = self.ask(kind::GET_LINK, DUMP, &body, |kind, message| {
            cables.take(kind, message, &mut LinkChange::default());
        });
        match listed {
            Ok(()) => self.cables = cables,
            Err(error) => debug!(%error, "cannot list the interfaces"),
        }
    }

    /// The number of a process's network namespace, if an interface has its other end there.
    pub(super) fn namespace_of(&mut self, pid: i32) -> Option<i32> {
        // The sizes and attributes of an rtgenmsg, and of the answer (linux/net_namespace.h).
        const BODY: usize = 4;
        const NUMBER: u16 = 1;
        const PID: u16 = 2;
        let mut body = vec![0; BODY];
        body.extend([8u16, PID].map(u16::to_ne_bytes).concat());
        body.extend(pid.to_ne_bytes());
        let mut found = None;
        let asked = self.ask(kind::GET_NAMESPACE, 0, &body, |kind, message| {
            if kind == kind::NEW_NAMESPACE {
                let number = attribute(message, HEADER + BODY, NUMBER);
                found = number.and_then(number_in).map(i32::from_ne_bytes);
            }
        });
        // A namespace without a number has a negative value.
        asked.ok().and(found).filter(|number| *number >= 0)
    }

    /// Sends a request and passes its answers on. The kernel answers during the send call, so nothing waits.
    fn ask(
        &mut self,
        request: u16,
        flags: u16,
        body: &[u8],
        mut each: impl FnMut(u16, &[u8]),
    ) -> io::Result<()> {
        const REQUEST: u16 = 1;
        let Some(socket) = &self.asking else { return Err(io::ErrorKind::NotConnected.into()) };
        let length = u32::try_from(HEADER + body.len()).map_err(io::Error::other)?;
        let mut message = length.to_ne_bytes().to_vec();
        message.extend([request, REQUEST | flags].map(u16::to_ne_bytes).concat());
        message.extend([0; 8]);
        message.extend(body);
        // Discards what an earlier request has left.
        while recv(socket, &mut self.buffer[..], RecvFlags::DONTWAIT).is_ok() {}
        send(socket, &message, SendFlags::empty())?;
        loop {
            let (read, _) = recv(socket, &mut self.buffer[..], RecvFlags::DONTWAIT)?;
            for (kind, message) in messages(self.buffer.get(..read).unwrap_or_default()) {
                match kind {
                    kind::DONE => return Ok(()),
                    kind::ERROR => return Err(io::ErrorKind::NotFound.into()),
                    _ => each(kind, message),
                }
                if flags == 0 {
                    return Ok(());
                }
            }
        }
    }

    /// This host's ends of a namespace's veth pairs.
    pub(super) fn plugs(&self, namespace: i32) -> Vec<Plug> {
        self.cables.plugs(namespace)
    }

    /// The ports of all bridges.
    pub(super) fn ports(&self) -> BridgePorts {
        self.cables.ports()
    }

    /// Waits for the next change. Cancel-safe.
    pub(super) async fn changed(&mut self) -> LinkChange {
        let Some(socket) = &self.socket else { return pending().await };
        let (mut change, mut lost) = (LinkChange::default(), false);
        loop {
            let Ok(mut ready) = socket.readable().await else { return pending().await };
            loop {
                match recv(socket.get_ref(), &mut self.buffer[..], RecvFlags::DONTWAIT) {
                    Ok((0, _)) | Err(Errno::AGAIN) => break,
                    Ok((read, _)) => {
                        let read = self.buffer.get(..read).unwrap_or_default();
                        for (kind, message) in messages(read) {
                            change.take(kind, message);
                            self.cables.take(kind, message, &mut change);
                        }
                    }
                    Err(Errno::INTR) => {}
                    // Messages were lost. Their content is unknown.
                    Err(Errno::NOBUFS) => lost = true,
                    Err(error) => {
                        debug!(%error, "cannot read what changed of the interfaces");
                        drop(ready);
                        self.socket = None;
                        return pending().await;
                    }
                }
            }
            ready.clear_ready();
            if lost {
                let before = self.cables.namespaces();
                self.list();
                let namespaces = before.union(&self.cables.namespaces()).copied().collect();
                return LinkChange {
                    addresses: true,
                    gone: true,
                    deleted: true,
                    came: true,
                    bridges: true,
                    namespaces,
                };
            }
            if change != LinkChange::default() {
                return change;
            }
        }
    }
}

fn socket(flags: SocketFlags) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | flags;
    // Protocol 0 of netlink, NETLINK_ROUTE, is the default.
    Ok(socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?)
}

impl LinkChange {
    /// Reads an `ifaddrmsg` or an `ifinfomsg`.
    fn take(&mut self, kind: u16, message: &[u8]) {
        // RT_SCOPE_LINK. The scope is the fourth byte of an ifaddrmsg.
        const SCOPE_LINK: u8 = 253;
        const SCOPE: usize = HEADER + 3;
        // Attributes follow the 16 bytes of an ifinfomsg. Its last four bytes are the changed flags: all are set for a new
        // interface.
        const INFO: usize = HEADER + 16;
        const CHANGED_FLAGS: usize = HEADER + 12;
        // IFLA_LINKINFO, IFLA_NEW_NETNSID and IFLA_INFO_KIND (linux/if_link.h).
        const LINK_INFO: u16 = 18;
        const NEW_NAMESPACE: u16 = 45;
        const KIND: u16 = 1;
        match kind {
            kind::DELETED_LINK => {
                self.gone = true;
                self.deleted |= attribute(message, INFO, NEW_NAMESPACE).is_none();
            }
            kind::NEW_LINK if number(message, CHANGED_FLAGS) == Some(u32::MAX.to_ne_bytes()) => {
                let info = attribute(message, INFO, LINK_INFO).unwrap_or_default();
                let kind = attribute(info, 0, KIND).unwrap_or_default();
                let kind = kind.strip_suffix(b"\0").unwrap_or(kind);
                self.came |= OF_CONTAINERS.contains(&kind);
            }
            _ => {}
        }
        // Each new interface gets a link-local address, which says nothing about networks.
        self.addresses |= [kind::NEW_ADDRESS, kind::DELETED_ADDRESS].contains(&kind)
            && message.get(SCOPE) != Some(&SCOPE_LINK);
    }
}

/// The kinds of interfaces that engines create for containers.
const OF_CONTAINERS: [&[u8]; 3] = [b"veth", b"macvlan", b"ipvlan"];

impl Cables {
    /// Reads a message about an interface, and notes the affected namespaces.
    fn take(&mut self, kind: u16, message: &[u8], change: &mut LinkChange) {
        // The length of an ifinfomsg, and attributes of an interface (linux/if_link.h).
        const BODY: usize = 16;
        const NAME: u16 = 3;
        const MASTER: u16 = 10;
        const NAMESPACE: u16 = 37;
        // Bridges send messages about their ports too, in their own family and with fewer attributes.
        if ![kind::NEW_LINK, kind::DELETED_LINK].contains(&kind) || message.get(HEADER) != Some(&0)
        {
            return;
        }
        let Some(index) = number(message, HEADER + 4).map(u32::from_ne_bytes) else { return };
        let attribute = |kind| attribute(message, HEADER + BODY, kind);
        let now = (kind == kind::NEW_LINK).then(|| Link {
            name: attribute(NAME)
                .and_then(|name| str::from_utf8(name).ok())
                .and_then(|name| Interface::new(name.trim_end_matches('\0'))),
            master: attribute(MASTER).and_then(number_in).map(u32::from_ne_bytes),
            namespace: attribute(NAMESPACE).and_then(number_in).map(i32::from_ne_bytes),
        });
        let before = match now.clone() {
            Some(now) => self.links.insert(index, now),
            None => self.links.remove(&index),
        };
        if before == now {
            return;
        }
        if let Some(namespace) = before.as_ref().and_then(|link| link.namespace)
            && let Some(leading) = self.leading_to.get_mut(&namespace)
        {
            leading.remove(&index);
            if leading.is_empty() {
                self.leading_to.remove(&namespace);
            }
        }
        if let Some(namespace) = now.as_ref().and_then(|link| link.namespace) {
            self.leading_to.entry(namespace).or_default().insert(index);
        }
        let both = || before.iter().chain(&now);
        change.namespaces.extend(both().filter_map(|link| link.namespace));
        change.bridges |= both().any(|link| link.master.is_some());
        // All ports of a bridge are identified by the bridge's name.
        if before.map(|link| link.name) != now.map(|link| link.name) {
            let ports = self.links.values().filter(|port| port.master == Some(index));
            let before = change.namespaces.len();
            change.namespaces.extend(ports.filter_map(|port| port.namespace));
            change.bridges |= change.namespaces.len() > before;
        }
    }

    fn plugs(&self, namespace: i32) -> Vec<Plug> {
        let numbers = self.leading_to.get(&namespace).into_iter().flatten();
        let of_it = numbers.filter_map(|index| Some((index, self.links.get(index)?)));
        let plug = |(index, link): (&u32, &Link)| Plug {
            index: *index,
            interface: match link.master {
                Some(master) => self.links.get(&master).and_then(|master| master.name),
                None => link.name,
            },
            is_port: link.master.is_some(),
        };
        of_it.map(plug).collect()
    }

    fn ports(&self) -> BridgePorts {
        let bridge = |link: &Link| self.links.get(&link.master?)?.name;
        self.links.iter().filter_map(|(index, link)| Some((*index, bridge(link)?))).collect()
    }

    fn namespaces(&self) -> BTreeSet<i32> {
        self.leading_to.keys().copied().collect()
    }
}

/// The type and the bytes of each message. Ends at the first one that is cut short.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = number(bytes, 0).map(u32::from_ne_bytes)?;
        let message = bytes.get(..length as usize).filter(|message| message.len() >= HEADER)?;
        bytes = bytes.get(message.len().next_multiple_of(4)..).unwrap_or_default();
        Some((number(message, 4).map(u16::from_ne_bytes)?, message))
    })
}

/// The value of an attribute. The attributes begin at `start`.
fn attribute(message: &[u8], start: usize, wanted: u16) -> Option<&[u8]> {
    const HEADER: usize = 4;
    const TYPE: u16 = 0x3fff;
    let mut rest = message.get(start..)?;
    loop {
        let length = usize::from(number(rest, 0).map(u16::from_ne_bytes)?);
        let kind = number(rest, 2).map(u16::from_ne_bytes)? & TYPE;
        let value = rest.get(HEADER..length)?;
        if kind == wanted {
            return Some(value);
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
}

fn number_in<const N: usize>(value: &[u8]) -> Option<[u8; N]> {
    value.try_into().ok()
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(16 + body.len()).unwrap();
        let mut message = length.to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.extend([0; 10]);
        message.extend(body);
        message.resize(message.len().next_multiple_of(4), 0);
        message
    }

    fn read(all: &[Vec<u8>]) -> LinkChange {
        let mut change = LinkChange::default();
        for (kind, message) in messages(&all.concat()) {
            change.take(kind, message);
        }
        change
    }

    #[test]
    fn messages_are_understood() {
        let (new_link, gone) = (message(16, &[0; 16]), message(17, &[0; 17]));
        let global = message(20, &[2, 16, 0, 0, 1, 0, 0, 0]);
        let of_the_link = message(20, &[10, 64, 0, 253, 1, 0, 0, 0]);
        assert_eq!(read(&[new_link.clone(), of_the_link.clone()]), LinkChange::default());
        let is_gone = LinkChange { gone: true, deleted: true, ..LinkChange::default() };
        assert_eq!(read(&[new_link, gone.clone()]), is_gone);
        let both = LinkChange { addresses: true, ..is_gone };
        assert_eq!(read(&[of_the_link, gone, global]), both);
    }

    #[test]
    fn an_interface_of_a_container_comes_goes_and_moves() {
        let attribute = |kind: u16, value: &[u8]| {
            let mut bytes = u16::try_from(4 + value.len()).unwrap().to_ne_bytes().to_vec();
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(value);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes
        };
        let link = |number: u16, changed: u32, kind: &[u8], moved: bool| {
            let mut body = vec![0; 12];
            body.extend(changed.to_ne_bytes());
            body.extend(attribute(3, b"veth0\0"));
            body.extend(attribute(18, &attribute(1, kind)));
            body.extend(moved.then(|| attribute(45, &[1, 0, 0, 0])).into_iter().flatten());
            message(number, &body)
        };
        let came = LinkChange { came: true, ..LinkChange::default() };
        assert_eq!(read(&[link(16, u32::MAX, b"veth\0", false)]), came);
        assert_eq!(read(&[link(16, u32::MAX, b"macvlan", false)]), came);
        assert_eq!(read(&[link(16, 1, b"veth\0", false)]), LinkChange::default(), "it is known");
        assert_eq!(read(&[link(16, u32::MAX, b"tun\0", false)]), LinkChange::default());
        let gone = LinkChange { gone: true, ..LinkChange::default() };
        assert_eq!(read(&[link(17, u32::MAX, b"veth\0", true)]), gone, "into a container");
        let deleted = LinkChange { deleted: true, ..gone };
        assert_eq!(read(&[link(17, u32::MAX, b"veth\0", false)]), deleted);
    }

    /// A message about an interface, with its number, its name, its bridge and the namespace of its other end.
    fn link(kind: u16, index: u32, name: &str, master: u32, namespace: i32) -> Vec<u8> {
        let mut body = vec![0; 4];
        body.extend(index.to_ne_bytes());
        body.extend([0; 8]);
        let mut add = |kind: u16, value: &[u8]| {
            body.extend(u16::try_from(4 + value.len()).unwrap().to_ne_bytes());
            body.extend(kind.to_ne_bytes());
            body.extend(value);
            body.resize(body.len().next_multiple_of(4), 0);
        };
        add(3, format!("{name}\0").as_bytes());
        if master > 0 {
            add(10, &master.to_ne_bytes());
        }
        if namespace >= 0 {
            add(37, &namespace.to_ne_bytes());
        }
        message(kind, &body)
    }

    #[test]
    fn cables_are_followed_to_their_bridges() {
        let mut cables = Cables::default();
        let mut take = |all: &[Vec<u8>]| {
            let mut change = LinkChange::default();
            for (kind, message) in messages(&all.concat()) {
                cables.take(kind, message, &mut change);
            }
            let plugs = |namespace: i32| {
                let plugs = cables.plugs(namespace).into_iter();
                plugs
                    .map(|plug| (plug.index, plug.interface.map(|i| i.to_string()), plug.is_port))
                    .collect::<Vec<_>>()
            };
            (change.namespaces, change.bridges, plugs(0), plugs(1))
        };
        let at = |index, name: &str, is_port| (index, Some(name.to_owned()), is_port);
        let (nothing, zero) = (BTreeSet::new(), BTreeSet::from([0]));
        // First a veth pair on a bridge, then one without a bridge.
        let bridges = [link(16, 2, "docker0", 0, -1), link(16, 3, "br-x", 0, -1)];
        assert_eq!(take(&bridges), (nothing.clone(), false, vec![], vec![]));
        let cable = link(16, 7, "veth7", 2, 0);
        let docker0 = vec![at(7, "docker0", true)];
        assert_eq!(
            take(std::slice::from_ref(&cable)),
            (zero.clone(), true, docker0.clone(), vec![])
        );
        assert_eq!(take(&[cable]), (nothing.clone(), false, docker0.clone(), vec![]));
        let other = vec![at(8, "veth8", false)];
        let (touched, bridge, first, second) = take(&[link(16, 8, "veth8", 0, 1)]);
        assert_eq!((touched, bridge), ([1].into(), false));
        assert_eq!((&first, &second), (&docker0, &other));
        // It is moved to another bridge by hand. Then that bridge is renamed. Then the interface is deleted.
        let br_x = vec![at(7, "br-x", true)];
        let moved = take(&[link(16, 7, "veth7", 3, 0)]);
        assert_eq!(moved, (zero.clone(), true, br_x, other.clone()));
        let renamed = take(&[link(16, 3, "br-y", 0, -1)]);
        assert_eq!(renamed, (zero.clone(), true, vec![at(7, "br-y", true)], other.clone()));
        let gone = take(&[link(17, 7, "veth7", 3, 0)]);
        assert_eq!(gone, (zero, true, vec![], other.clone()));
        // A bridge's message about its port lacks some attributes.
        let mut of_bridge = link(17, 8, "veth8", 0, -1);
        of_bridge[16] = 7;
        assert_eq!(take(&[of_bridge]), (nothing, false, vec![], other));
    }

    #[test]
    fn the_kernel_lists_its_interfaces() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _in = runtime.enter();
        let mut links = Links::open();
        let names = links.cables.links.values().filter_map(|link| link.name);
        assert!(names.map(|name| name.to_string()).any(|name| name == "lo"));
        // No interface has its other end in our own namespace, or in that of a process that does not exist.
        let own = i32::try_from(std::process::id()).unwrap();
        assert_eq!((links.namespace_of(own), links.namespace_of(i32::MAX)), (None, None));
    }

    proptest! {
        #[test]
        fn no_message_panics(bytes: Vec<u8>, length in 0..40_u32, kind in 15..22_u16) {
            let mut cables = Cables::default();
            let mut take = |bytes: &[u8]| for (kind, message) in messages(bytes) {
                let mut change = LinkChange::default();
                change.take(kind, message);
                cables.take(kind, message, &mut change);
            };
            take(&bytes);
            take(&[length.to_ne_bytes().to_vec(), bytes.clone()].concat());
            take(&message(kind, &bytes));
            let _ = (cables.plugs(0), cables.ports());
        }
    }
}
