//! The programs and maps in the kernel. They end with this: nothing is pinned, so nothing stays when embassy is killed.

#![expect(
    clippy::disallowed_methods,
    reason = "opens one folder of the kernel's, on a thread that serves nothing else"
)]

use std::{
    fmt,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, MapError, RingBuf},
    programs::{
        CgroupAttachMode, CgroupSock, CgroupSockAddr, ProgramError, ProgramType, SockOps,
        cgroup_sock::CgroupSockLink, cgroup_sock_addr::CgroupSockAddrLink,
    },
    sys::{BpfHelper, is_helper_supported},
};

use super::{
    UdpNote,
    cgroup::Hierarchy,
    layout::{
        CountsBytes, EndpointBytes, KeyBytes, LiveBytes, MarkBytes, NOTES, RouteBytes, SetBytes,
    },
};

/// How many there is room for. The kernel takes the memory of all at once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub(super) routes: u32,
    pub(super) services: u32,
    pub(super) endpoints: u32,
}

impl Sizes {
    /// A set that is replaced is not used again at once.
    fn sets(self) -> u32 {
        self.services * 2
    }

    /// For twice as many entries and endpoints as there are, and for all services that there may be. Each of the two trials (of TCP and of
    /// UDP) keeps the place of a service.
    pub(super) fn fitting(entries: usize, most_services: usize, endpoints: usize) -> Self {
        const MOST: u32 = 1 << 20;
        let room = |n: usize, least: u32, most: u32| {
            let n = u32::try_from(n).unwrap_or(most).min(most);
            n.next_power_of_two().clamp(least, most)
        };
        Self {
            routes: room(entries.saturating_mul(2), 32_768, MOST),
            services: room(most_services, 64, MOST / 16) + 2,
            endpoints: room(endpoints.saturating_mul(2), 16_384, MOST / 4),
        }
    }
}

/// Connections that are ended at a time: each leaves the map when it has ended.
const DOOMED: u32 = 65_536;

/// Why the kernel path cannot be used on this host.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unavailable {
    #[error(
        "the root of the host's control groups (cgroup2) is not visible: in a container, add -v /sys/fs/cgroup:/host/cgroup:ro"
    )]
    NoHierarchy,
    #[error(
        "bpf(2) is not permitted: embassy needs the capabilities BPF and NET_ADMIN (Docker before 23: SYS_ADMIN and NET_ADMIN)"
    )]
    NotPermitted,
    #[error(
        "another program holds the root of the control groups alone: bpftool cgroup tree names it"
    )]
    Held,
    #[error("the kernel does not load {program} (Linux 5.12 and later do, on arm64 5.18): {error}")]
    Load { program: &'static str, error: String },
    #[error("the kernel has no maps for it: {0}")]
    Maps(String),
    #[error("cannot attach {program}: {error}")]
    Attach { program: &'static str, error: String },
    #[error("a connection to a VIP of its own was not redirected: {0}")]
    Test(String),
}

/// An error with what caused it.
fn whole(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        // The verifier's whole log is no use to a reader of one line.
        let cause_text = cause.to_string();
        let line = cause_text.lines().next().unwrap_or_default();
        if !text.contains(line) {
            text = format!("{text}: {line}");
        }
        next = cause.source();
    }
    text.lines().next().unwrap_or_default().to_owned()
}

/// The number of the first system error among the causes.
fn errno(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
    let mut next = Some(error);
    while let Some(cause) = next {
        if let Some(error) = cause.downcast_ref::<io::Error>() {
            return error.raw_os_error();
        }
        next = cause.source();
    }
    None
}

fn is_refused(error: &(dyn std::error::Error + 'static)) -> bool {
    matches!(errno(error), Some(libc::EPERM | libc::EACCES))
}

/// The maps that user space reads and writes, and the programs.
pub(super) struct Programs {
    pub(super) routes: HashMap<MapData, KeyBytes, u32>,
    pub(super) route_table: Array<MapData, RouteBytes>,
    pub(super) route_counts: Array<MapData, CountsBytes>,
    pub(super) services: Array<MapData, u64>,
    pub(super) turns: Array<MapData, u64>,
    pub(super) doubts: Array<MapData, u64>,
    pub(super) sets: Array<MapData, SetBytes>,
    pub(super) endpoints: Array<MapData, EndpointBytes>,
    pub(super) marks: Array<MapData, MarkBytes>,
    pub(super) lives: Array<MapData, LiveBytes>,
    pub(super) failures: Array<MapData, u64>,
    pub(super) endpoint_counts: Array<MapData, CountsBytes>,
    pub(super) levels: Array<MapData, u32>,
    pub(super) notes: Array<MapData, u64>,
    udp_notes: Array<MapData, u64>,
    pub(super) doomed: HashMap<MapData, u64, u32>,
    /// What is stored for sockets.
    peers: MapData,
    pub(super) records: RingBuf<MapData>,
    udp: Option<UdpLinks>,
    /// Attached as long as this is held, those for UDP excepted.
    programs: Ebpf,
}

/// The programs for UDP are attached as long as this is held. What redirects is detached first: while it does, an answer must not show
/// another address than the VIP.
#[derive(Debug)]
#[expect(dead_code, reason = "held, and dropped in this order")]
struct UdpLinks {
    redirecting: Vec<CgroupSockAddrLink>,
    showing: Vec<CgroupSockAddrLink>,
    ends: CgroupSockLink,
}

impl fmt::Debug for Programs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Programs").finish_non_exhaustive()
    }
}

/// getpeername before connect: an application must not see another address than the one that it dialled.
const SOCK_ADDR: [&str; 4] = ["getpeername4", "getpeername6", "connect4", "connect6"];
const SOCK_OPS: &str = "sock_ops";
/// Of UDP: what shows the VIP, and what redirects.
const UDP_SHOWING: [&str; 4] =
    ["udp_recvmsg4", "udp_recvmsg6", "udp_getpeername4", "udp_getpeername6"];
const UDP_REDIRECTING: [&str; 4] = ["udp_sendmsg4", "udp_sendmsg6", "udp_connect4", "udp_connect6"];
const UDP_RELEASE: &str = "udp_release";

/// Links take no other mode, and are ones of many all the same.
const MODE: CgroupAttachMode = CgroupAttachMode::Single;

impl Programs {
    /// Loads the programs and attaches them at the root of the control groups: so a container that starts is covered before its
    /// first connection. Sockets of other programs find no entry.
    pub(super) fn load(sizes: Sizes, hierarchy: &Hierarchy) -> Result<Self, Unavailable> {
        // Without it (Linux before 5.18) an application gets EPERM where there is no endpoint for UDP.
        let helper = BpfHelper::BPF_FUNC_set_retval;
        let has_set_retval = is_helper_supported(ProgramType::CgroupSockAddr, helper);
        Self::load_for(sizes, hierarchy, has_set_retval.unwrap_or(false))
    }

    fn load_for(
        sizes: Sizes,
        hierarchy: &Hierarchy,
        has_set_retval: bool,
    ) -> Result<Self, Unavailable> {
        static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/programs.o"));
        let mut loader = EbpfLoader::new();
        let has_set_retval = u32::from(has_set_retval);
        loader.override_global("has_set_retval", &has_set_retval, true);
        for (map, entries) in [
            ("routes", sizes.routes),
            ("route_table", sizes.routes),
            ("route_counts", sizes.routes),
            ("services", sizes.services),
            ("turns", sizes.services),
            ("doubts", sizes.services),
            ("sets", sizes.sets()),
            ("endpoints", sizes.endpoints),
            ("marks", sizes.endpoints),
            ("lives", sizes.endpoints),
            ("failures", sizes.endpoints),
            ("endpoint_counts", sizes.endpoints),
        ] {
            loader.map_max_entries(map, entries);
        }
        loader.map_max_entries("doomed", DOOMED);
        let mut programs =
            loader.load(OBJECT).map_err(|error: EbpfError| match is_refused(&error) {
                true => Unavailable::NotPermitted,
                false => Unavailable::Maps(whole(&error)),
            })?;
        for program in SOCK_ADDR {
            load(program, sock_addr(&mut programs, program)?.load())?;
        }
        load(SOCK_OPS, sock_ops(&mut programs)?.load())?;
        let root = File::open(hierarchy.root()).map_err(|_| Unavailable::NoHierarchy)?;
        // What counts comes first, then what redirects.
        attach(SOCK_OPS, sock_ops(&mut programs)?.attach(&root, MODE))?;
        for program in SOCK_ADDR {
            attach(program, sock_addr(&mut programs, program)?.attach(&root, MODE))?;
        }
        Self::with(programs).map_err(|error| Unavailable::Maps(whole(&error)))
    }

    fn with(mut programs: Ebpf) -> Result<Self, MapError> {
        let mut take = |name: &str| {
            let missing = || MapError::InvalidName { name: name.to_owned() };
            programs.take_map(name).ok_or_else(missing)
        };
        Ok(Self {
            routes: take("routes")?.try_into()?,
            route_table: take("route_table")?.try_into()?,
            route_counts: take("route_counts")?.try_into()?,
            services: take("services")?.try_into()?,
            turns: take("turns")?.try_into()?,
            doubts: take("doubts")?.try_into()?,
            sets: take("sets")?.try_into()?,
            endpoints: take("endpoints")?.try_into()?,
            marks: take("marks")?.try_into()?,
            lives: take("lives")?.try_into()?,
            failures: take("failures")?.try_into()?,
            endpoint_counts: take("endpoint_counts")?.try_into()?,
            levels: take("levels")?.try_into()?,
            notes: take("notes")?.try_into()?,
            udp_notes: take("udp_notes")?.try_into()?,
            doomed: take("doomed")?.try_into()?,
            peers: match take("peers")? {
                Map::SkStorage(peers) => peers,
                _ => return Err(MapError::InvalidName { name: "peers".to_owned() }),
            },
            records: take("records")?.try_into()?,
            udp: None,
            programs,
        })
    }

    /// Loads and attaches the programs for UDP as well.
    pub(super) fn load_udp(&mut self, hierarchy: &Hierarchy) -> Result<(), Unavailable> {
        let programs = &mut self.programs;
        for program in UDP_SHOWING.iter().chain(&UDP_REDIRECTING) {
            load(program, sock_addr(programs, program)?.load())?;
        }
        load(UDP_RELEASE, sock(programs, UDP_RELEASE)?.load())?;
        let root = File::open(hierarchy.root()).map_err(|_| Unavailable::NoHierarchy)?;
        let release = sock(programs, UDP_RELEASE)?;
        let link = release.attach(&root, MODE).and_then(|link| release.take_link(link));
        let ends = attached(UDP_RELEASE, link)?;
        let mut attach_all = |names: &[&'static str]| {
            let one = |name: &&'static str| {
                let program = sock_addr(programs, name)?;
                let link = program.attach(&root, MODE).and_then(|link| program.take_link(link));
                attached(name, link)
            };
            names.iter().map(one).collect::<Result<Vec<_>, _>>()
        };
        let showing = attach_all(&UDP_SHOWING)?;
        let redirecting = attach_all(&UDP_REDIRECTING)?;
        self.udp = Some(UdpLinks { redirecting, showing, ends });
        Ok(())
    }

    pub(super) fn detach_udp(&mut self) {
        self.udp = None;
    }

    /// How often each thing happened to flows of UDP.
    pub(super) fn udp_notes(&self) -> [u64; UdpNote::ALL.len()] {
        std::array::from_fn(|n| self.udp_notes.get(&(n as u32), 0).unwrap_or_default())
    }

    /// The map of what is stored for sockets, to ask for it.
    pub(super) fn peers(&self) -> BorrowedFd<'_> {
        self.peers.fd().as_fd()
    }

    /// How often each kind of doubt or loss came up.
    pub(super) fn notes(&self) -> [u64; NOTES] {
        std::array::from_fn(|n| self.notes.get(&(n as u32), 0).unwrap_or_default())
    }
}

fn sock_addr<'a>(
    programs: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut CgroupSockAddr, Unavailable> {
    let missing = || Unavailable::Load { program: name, error: "it is not there".to_owned() };
    let program = programs.program_mut(name).ok_or_else(missing)?;
    program.try_into().map_err(|_: ProgramError| missing())
}

fn sock<'a>(programs: &'a mut Ebpf, name: &'static str) -> Result<&'a mut CgroupSock, Unavailable> {
    let missing = || Unavailable::Load { program: name, error: "it is not there".to_owned() };
    let program = programs.program_mut(name).ok_or_else(missing)?;
    program.try_into().map_err(|_: ProgramError| missing())
}

fn sock_ops(programs: &mut Ebpf) -> Result<&mut SockOps, Unavailable> {
    let missing = || Unavailable::Load { program: SOCK_OPS, error: "it is not there".to_owned() };
    let program = programs.program_mut(SOCK_OPS).ok_or_else(missing)?;
    program.try_into().map_err(|_: ProgramError| missing())
}

fn load(program: &'static str, done: Result<(), ProgramError>) -> Result<(), Unavailable> {
    done.map_err(|error| match errno(&error) {
        Some(libc::EPERM) => Unavailable::NotPermitted,
        _ => Unavailable::Load { program, error: whole(&error) },
    })
}

fn attach<T>(program: &'static str, done: Result<T, ProgramError>) -> Result<(), Unavailable> {
    attached(program, done).map(drop)
}

fn attached<T>(program: &'static str, done: Result<T, ProgramError>) -> Result<T, Unavailable> {
    done.map_err(|error| match errno(&error) {
        // Who may load may attach: somebody else's program stands there, and wants no other beside it.
        Some(libc::EPERM) => Unavailable::Held,
        _ => Unavailable::Attach { program, error: whole(&error) },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Linux before 5.18 has no bpf_set_retval: there the verifier must not meet it. Needs root.
    #[test]
    fn the_programs_load_with_and_without_the_helper_that_sets_an_error() {
        let few = Sizes { routes: 8, services: 8, endpoints: 8 };
        let Some(hierarchy) = Hierarchy::find() else { return };
        for has_set_retval in [false, true] {
            let mut programs = Programs::load_for(few, &hierarchy, has_set_retval).unwrap();
            programs.load_udp(&hierarchy).unwrap();
        }
    }

    #[test]
    fn there_is_room_for_twice_what_there_is_and_not_without_end() {
        let of = |entries, services, endpoints| {
            let Sizes { routes, services, endpoints } =
                Sizes::fitting(entries, services, endpoints);
            [routes, services, endpoints]
        };
        assert_eq!(of(0, 4_096, 0), [32_768, 4_098, 16_384]);
        assert_eq!(of(100_000, 5_000, 20_000), [262_144, 8_194, 65_536]);
        assert_eq!(of(1, 1, 1), [32_768, 66, 16_384]);
        assert_eq!(of(usize::MAX, usize::MAX, usize::MAX), [1 << 20, (1 << 16) + 2, 1 << 18]);
    }
}
