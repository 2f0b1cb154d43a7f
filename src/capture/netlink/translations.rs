//! Rules of others that give connections another destination, as far as they can be read: what they ask for, and where they lead.
//! No program is needed for that. What cannot be read of a rule is said, and never guessed.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::RangeInclusive,
};

use ipnet::IpNet;

#[cfg(any(test, fuzzing))]
use super::wire::answers;
use super::{
    super::rules::Hook,
    dump::{
        CHAIN, EXPRESSION, EXPRESSION_DATA, EXPRESSIONS, HANDLE, base_chains, elements_of,
        none_if_missing,
    },
    encode::Bound,
    socket::{NetlinkError, Socket},
    wire::{Kind, Parsed, VALUE, family},
};

/// A rule that gives TCP connections another destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::capture) struct Translation {
    /// Family and table, as the `nft` program names them.
    pub(in crate::capture) table: String,
    pub(in crate::capture) chain: String,
    /// The kernel's number of it, unique in its table.
    pub(in crate::capture) handle: u64,
    /// Where the kernel calls its chain. `None`: another chain leads to it.
    pub(in crate::capture) hook: Option<Hook>,
    pub(in crate::capture) by: By,
    /// Whether iptables wrote it.
    pub(in crate::capture) of_iptables: bool,
    /// `None`: this host, or it cannot be read.
    pub(in crate::capture) address: Option<IpAddr>,
    /// The ports that it leads to. All, if that cannot be read.
    pub(in crate::capture) to: PortRanges,
    pub(in crate::capture) conditions: Conditions,
}

/// How a rule leads connections to another destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    Redirect,
    Dnat,
    /// To a socket that is transparent. The destination stays as it was.
    Tproxy,
}

/// What a rule asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::capture) struct Conditions {
    /// The ports that connections are made to.
    pub(in crate::capture) ports: PortRanges,
    /// The addresses that they are made to. `None`: any, or it cannot be read.
    pub(in crate::capture) destination: Option<IpNet>,
    /// Whether it asks for more than that.
    pub(in crate::capture) more: bool,
    /// Whether it may spare connections of some users: it asks for an owner, a mark or a control group, or for the opposite of
    /// something.
    pub(in crate::capture) spares: bool,
}

/// Sorted, and apart from one another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::capture) struct PortRanges(pub(in crate::capture) Vec<RangeInclusive<u16>>);

impl PortRanges {
    fn all() -> Self {
        Self(vec![0..=u16::MAX])
    }

    fn and(&self, others: &Self) -> Self {
        let each = |range: &RangeInclusive<u16>| {
            let (first, last) = (*range.start(), *range.end());
            let cut = others
                .0
                .iter()
                .map(move |other| first.max(*other.start())..=last.min(*other.end()));
            cut.filter(|cut| !cut.is_empty()).collect::<Vec<_>>()
        };
        Self(self.0.iter().flat_map(each).collect())
    }

    fn complement(&self) -> Self {
        let mut free = Vec::new();
        let mut next = Some(0);
        for range in &self.0 {
            let before = range.start().checked_sub(1);
            free.extend(next.zip(before).map(|(next, before)| next..=before));
            next = range.end().checked_add(1);
        }
        free.extend(next.map(|next| next..=u16::MAX));
        free.retain(|range| !range.is_empty());
        Self(free)
    }
}

/// The rules for TCP of all tables for IP that translate destinations. Those of chains that `skips` names, by table and chain, are left
/// out.
pub(in crate::capture) fn translations(
    socket: &mut Socket,
    skips: impl Fn(&str, &str) -> bool,
) -> Result<Vec<Translation>, NetlinkError> {
    const TABLE: u16 = 1;
    let hooks: HashMap<_, _> =
        base_chains(socket)?.into_iter().map(|chain| (chain.name, chain.hook)).collect();
    let mut found = Vec::new();
    for (family, name) in [(family::INET, "inet"), (family::IPV4, "ip"), (family::IPV6, "ip6")] {
        let dumped = socket.dump(
            Kind::GET_RULE,
            family,
            |_| {},
            |rule| {
                let rule = rule.attributes();
                let named = || Some((format!("{name} {}", rule.text(TABLE)?), rule.text(CHAIN)?));
                let Some((table, chain)) = named().filter(|(table, chain)| !skips(table, chain))
                else {
                    return;
                };
                let read = read_rule(rule, family == family::IPV6);
                if let (Some((end, reading)), Some(handle)) = (read, rule.long(HANDLE)) {
                    let hook = hooks.get(&format!("{table} {chain}")).copied();
                    found.push((family, table, chain.to_owned(), handle, hook, end, reading));
                }
            },
        );
        none_if_missing(dumped)?;
    }
    // Sets are asked for afterwards: the socket is in use before.
    let mut all = Vec::new();
    for (family, table, chain, handle, hook, end, reading) in found {
        let mut conditions = reading.conditions;
        for Lookup { set, is_inverted } in reading.lookups {
            let name = table.split_once(' ').map_or("", |(_, name)| name);
            let ports = ports_of(socket, family, name, &set)?;
            conditions.ports =
                conditions.ports.and(&if is_inverted { ports.complement() } else { ports });
        }
        let End { by, of_iptables, address, to } = end;
        all.push(Translation {
            table,
            chain,
            handle,
            hook,
            by,
            of_iptables,
            address,
            to,
            conditions,
        });
    }
    Ok(all)
}

/// Where a rule leads, and what it asks for. `None`: it leads nowhere else, or is not for TCP.
fn read_rule(rule: Parsed<'_>, v6: bool) -> Option<(End, Reading)> {
    let mut reading = Reading::new(v6);
    rule.list(EXPRESSIONS).try_for_each(|expression| reading.read(expression)).ok()?;
    reading.end.take().map(|end| (end, reading))
}

/// Reads `input` as answers with rules, of each family.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(input: &[u8]) {
    for answer in answers(input) {
        for v6 in [false, true] {
            let _ = read_rule(answer.attributes(), v6);
        }
    }
    // As what extensions of iptables were given, which is not parsed as attributes.
    let _ = (tcp_match(input), multiport(input), network(input, Some(input), false));
    for (v6, revision) in [(false, Some(0)), (true, Some(1))] {
        let _ = (nat_range(input, v6), tproxy(input, revision, v6));
    }
}

/// The ports in an anonymous set.
fn ports_of(
    socket: &mut Socket,
    family: u8,
    table: &str,
    set: &str,
) -> Result<PortRanges, NetlinkError> {
    let mut bounds = Vec::new();
    elements_of(socket, family, table, set, |bound| bounds.push(bound))?;
    Ok(ranges(&bounds))
}

/// The ranges between bounds: the end of each is the first that is not in it. A set without ends has single ports.
fn ranges(bounds: &[Bound]) -> PortRanges {
    let mut bounds: Vec<_> =
        bounds.iter().filter_map(|bound| Some((port(&bound.key)?, !bound.is_end))).collect();
    bounds.sort_unstable();
    if bounds.iter().all(|(_, is_start)| *is_start) {
        return PortRanges(bounds.into_iter().map(|(port, _)| port..=port).collect());
    }
    let mut ranges = Vec::new();
    let mut open = None;
    for (port, is_start) in bounds {
        match (is_start, open) {
            (true, None) => open = Some(port),
            (false, Some(first)) => {
                ranges.extend(port.checked_sub(1).map(|last| first..=last));
                open = None;
            }
            _ => {}
        }
    }
    ranges.extend(open.map(|first| first..=u16::MAX));
    PortRanges(ranges)
}

fn port(bytes: &[u8]) -> Option<u16> {
    // Values are padded to four bytes.
    bytes.first_chunk().map(|bytes| u16::from_be_bytes(*bytes))
}

fn address(bytes: &[u8], v6: bool) -> Option<IpAddr> {
    match v6 {
        true => bytes.first_chunk::<16>().map(|bytes| Ipv6Addr::from(*bytes).into()),
        false => bytes.first_chunk::<4>().map(|bytes| Ipv4Addr::from(*bytes).into()),
    }
}

/// Where a rule leads.
#[derive(Debug)]
struct End {
    by: By,
    of_iptables: bool,
    address: Option<IpAddr>,
    to: PortRanges,
}

/// A condition on the destination port by an anonymous set.
#[derive(Debug)]
struct Lookup {
    set: String,
    is_inverted: bool,
}

/// What a register holds.
#[derive(Debug, Clone)]
enum Value {
    Constant(Vec<u8>),
    Port,
    /// The destination, or its first bytes, and whether it is of IPv6.
    Destination {
        v6: bool,
        mask: Option<Vec<u8>>,
    },
    Protocol,
    /// What embassy's own connections may have: an owner, a mark, a control group.
    Owner,
    /// A part of the packet that every TCP connection for this rule has, such as its family.
    Family,
    Other,
}

/// The rule is not for TCP, or leads nowhere else.
struct NotOurs;

/// A rule that is read, expression by expression.
#[derive(Debug)]
struct Reading {
    v6: bool,
    /// By their first four bytes, counted in words.
    registers: HashMap<u32, Value>,
    conditions: Conditions,
    lookups: Vec<Lookup>,
    end: Option<End>,
}

/// What a comparison asks for (enum nft_cmp_ops).
mod compare {
    pub(super) const EQUAL: u32 = 0;
    pub(super) const OTHER: u32 = 1;
    pub(super) const LESS: u32 = 2;
    pub(super) const AT_MOST: u32 = 3;
    pub(super) const MORE: u32 = 4;
    pub(super) const AT_LEAST: u32 = 5;
}

const TCP: u8 = 6;

impl Reading {
    fn new(v6: bool) -> Self {
        let conditions =
            Conditions { ports: PortRanges::all(), destination: None, more: false, spares: false };
        Self { v6, registers: HashMap::new(), conditions, lookups: Vec::new(), end: None }
    }

    fn value(&self, register: Option<u32>) -> Value {
        let value = register.and_then(|register| self.registers.get(&word(register)));
        value.cloned().unwrap_or(Value::Other)
    }

    fn set(&mut self, register: Option<u32>, value: Value) {
        if let Some(register) = register {
            self.registers.insert(word(register), value);
        }
    }

    fn read(&mut self, expression: Parsed<'_>) -> Result<(), NotOurs> {
        let data = expression.nested(EXPRESSION_DATA);
        match expression.text(EXPRESSION).unwrap_or_default() {
            "payload" => self.set(data.number(1), self.payload(data)),
            "meta" => self.set(data.number(1), meta(data.number(2))),
            "immediate" => {
                let value = data.nested(2).get(VALUE);
                self.set(
                    data.number(1),
                    value.map_or(Value::Other, |v| Value::Constant(v.to_vec())),
                );
            }
            "bitwise" => self.mask(data),
            "cmp" => self.compare(data)?,
            "range" => self.range(data),
            "lookup" => self.look_up(data),
            "match" => self.extension(data),
            "counter" | "log" => {}
            "ct" => self.set(data.number(1), connection(data.number(2))),
            // A mark or a control group of the socket.
            "socket" => self.set(data.number(2), Value::Owner),
            "nat" => self.translate(data)?,
            "redir" => {
                let to = self.ports(data.number(1), data.number(2)).ok_or(NotOurs)?;
                self.ends(By::Redirect, false, None, to);
            }
            "tproxy" => {
                let to = self.ports(data.number(3), None).ok_or(NotOurs)?;
                let address = self.address(data.number(2), data.number(1));
                self.ends(By::Tproxy, false, address.filter(|one| !one.is_unspecified()), to);
            }
            "target" => self.target(data)?,
            // Into which register such an expression loads something is not known. What they held before does not count anymore.
            _ => {
                self.registers.clear();
                self.conditions.more = true;
            }
        }
        Ok(())
    }

    fn ends(&mut self, by: By, of_iptables: bool, address: Option<IpAddr>, to: PortRanges) {
        self.end = self.end.take().or(Some(End { by, of_iptables, address, to }));
    }

    /// NFTA_PAYLOAD_*: what is loaded, by where it is counted from (enum nft_payload_bases), offset and length.
    fn payload(&self, data: Parsed<'_>) -> Value {
        const NETWORK: u32 = 1;
        const TRANSPORT: u32 = 2;
        let (base, offset) = (data.number(2), data.number(3));
        match (base, offset, data.number(4)) {
            (Some(TRANSPORT), Some(2), Some(2)) => Value::Port,
            (Some(NETWORK), Some(9), Some(1)) => Value::Protocol,
            // A network of whole bytes is compared by its first bytes.
            (Some(NETWORK), Some(16), Some(1..=4)) => Value::Destination { v6: false, mask: None },
            (Some(NETWORK), Some(24), Some(1..=16)) => Value::Destination { v6: true, mask: None },
            _ => Value::Other,
        }
    }

    /// NFTA_BITWISE_*
    fn mask(&mut self, data: Parsed<'_>) {
        let mask = data.nested(4).get(VALUE).map(<[u8]>::to_vec);
        let value = match self.value(data.number(1)) {
            Value::Destination { v6, mask: None } => Value::Destination { v6, mask },
            Value::Owner => Value::Owner,
            _ => Value::Other,
        };
        self.set(data.number(2), value);
    }

    /// NFTA_CMP_*
    fn compare(&mut self, data: Parsed<'_>) -> Result<(), NotOurs> {
        let (operation, with) = (data.number(2), data.nested(3).get(VALUE).unwrap_or_default());
        let is_equal = operation == Some(compare::EQUAL);
        match self.value(data.number(1)) {
            Value::Port => match port(with).and_then(|port| compared(operation?, port)) {
                Some(ports) => self.conditions.ports = self.conditions.ports.and(&ports),
                None => self.conditions.more = true,
            },
            Value::Protocol if is_equal != (with.first() == Some(&TCP)) => return Err(NotOurs),
            Value::Protocol | Value::Family => {}
            Value::Destination { v6, mask }
                if is_equal && self.conditions.destination.is_none() =>
            {
                self.conditions.destination = network(with, mask.as_deref(), v6);
                self.conditions.more |= self.conditions.destination.is_none();
            }
            Value::Owner => (self.conditions.more, self.conditions.spares) = (true, true),
            Value::Destination { .. } | Value::Constant(_) | Value::Other => {
                self.conditions.more = true;
                self.conditions.spares |= !is_equal;
            }
        }
        Ok(())
    }

    /// NFTA_RANGE_*
    fn range(&mut self, data: Parsed<'_>) {
        let bound = |kind| port(data.nested(kind).get(VALUE)?);
        match (self.value(data.number(1)), bound(3).zip(bound(4))) {
            (Value::Port, Some((first, last))) => {
                let ports = PortRanges(vec![first..=last]);
                let is_inverted = data.number(2) != Some(0);
                let ports = if is_inverted { ports.complement() } else { ports };
                self.conditions.ports = self.conditions.ports.and(&ports);
            }
            _ => self.conditions.more = true,
        }
    }

    /// NFTA_LOOKUP_*. The members of a set with a name may be others at any time.
    fn look_up(&mut self, data: Parsed<'_>) {
        const INVERTED: u32 = 1;
        let (set, flags) = (data.text(1).unwrap_or_default(), data.number(5).unwrap_or_default());
        let is_inverted = flags & INVERTED != 0;
        let register = data.number(2);
        // More than one register: of an address and a port together.
        let is_alone = register.is_some_and(|one| !self.registers.contains_key(&(word(one) + 1)));
        match self.value(register) {
            Value::Port if is_alone && data.number(3).is_none() && set.starts_with("__set") => {
                self.lookups.push(Lookup { set: set.to_owned(), is_inverted });
            }
            // One of several protocols, or of families.
            Value::Protocol | Value::Family if data.number(3).is_none() && !is_inverted => {}
            of => {
                // A map gives a value, which is no condition that can be read.
                self.conditions.more = true;
                self.conditions.spares |= is_inverted || matches!(of, Value::Owner);
            }
        }
        self.set(data.number(3), Value::Other);
    }

    /// A match of iptables, by its name and what it was given (include/uapi/linux/netfilter/xt_*.h).
    fn extension(&mut self, data: Parsed<'_>) {
        let info = data.get(3).unwrap_or_default();
        let ports = match data.text(1).unwrap_or_default() {
            "comment" => return,
            "tcp" => tcp_match(info),
            "multiport" => multiport(info),
            name => {
                let of_owner = ["owner", "mark", "connmark", "cgroup", "socket"].contains(&name);
                self.conditions.spares |= of_owner;
                None
            }
        };
        match ports {
            Some(ports) => self.conditions.ports = self.conditions.ports.and(&ports),
            None => self.conditions.more = true,
        }
    }

    /// NFTA_NAT_*
    fn translate(&mut self, data: Parsed<'_>) -> Result<(), NotOurs> {
        const DESTINATION: u32 = 1;
        if data.number(1) != Some(DESTINATION) {
            return Err(NotOurs);
        }
        // Without a port it stays as it was.
        let to = self.ports(data.number(5), data.number(6)).ok_or(NotOurs)?;
        let address = self.address(data.number(3), data.number(2));
        self.ends(By::Dnat, false, address, to);
        Ok(())
    }

    /// The ports in these registers. `None` if there is no first one. All if they are no constants.
    fn ports(&self, first: Option<u32>, last: Option<u32>) -> Option<PortRanges> {
        let constant = |register| match self.value(register) {
            Value::Constant(bytes) => port(&bytes),
            _ => None,
        };
        first?;
        Some(match (constant(first), constant(last.or(first))) {
            (Some(first), Some(last)) => PortRanges(vec![first..=last]),
            _ => PortRanges::all(),
        })
    }

    fn address(&self, register: Option<u32>, of: Option<u32>) -> Option<IpAddr> {
        let v6 = of.map_or(self.v6, |of| of == u32::from(family::IPV6));
        match self.value(register) {
            Value::Constant(bytes) => address(&bytes, v6),
            _ => None,
        }
    }

    /// A target of iptables (include/uapi/linux/netfilter/nf_nat.h, xt_TPROXY.h).
    fn target(&mut self, data: Parsed<'_>) -> Result<(), NotOurs> {
        let info = data.get(3).unwrap_or_default();
        let (by, read) = match data.text(1).unwrap_or_default() {
            "REDIRECT" => (By::Redirect, nat_range(info, self.v6).map(|(_, to)| (None, to))),
            "DNAT" => (By::Dnat, nat_range(info, self.v6)),
            "TPROXY" => (By::Tproxy, tproxy(info, data.number(2), self.v6)),
            _ => return Err(NotOurs),
        };
        let (address, to) = read.ok_or(NotOurs)?;
        self.ends(by, true, address, to);
        Ok(())
    }
}

/// The first word of a register: those of 16 bytes are 1 to 4, those of four bytes begin with 8.
fn word(register: u32) -> u32 {
    match register {
        1..=4 => (register - 1) * 4,
        _ => register.saturating_sub(8),
    }
}

/// What a meta expression loads (enum nft_meta_keys).
fn meta(key: Option<u32>) -> Value {
    match key {
        Some(16) => Value::Protocol,
        // The protocol of the frame, and the family.
        Some(1 | 15) => Value::Family,
        // A mark, and the user, the group and the control group of who sends it.
        Some(3 | 10 | 11 | 23) => Value::Owner,
        _ => Value::Other,
    }
}

/// What an expression about the tracked connection loads (enum nft_ct_keys).
fn connection(key: Option<u32>) -> Value {
    match key {
        // Its mark.
        Some(3) => Value::Owner,
        _ => Value::Other,
    }
}

fn compared(operation: u32, port: u16) -> Option<PortRanges> {
    let one = PortRanges(vec![port..=port]);
    let ranges = |first: Option<u16>, last: Option<u16>| {
        PortRanges(first.zip(last).map(|(first, last)| first..=last).into_iter().collect())
    };
    Some(match operation {
        compare::EQUAL => one,
        compare::OTHER => one.complement(),
        compare::LESS => ranges(Some(0), port.checked_sub(1)),
        compare::AT_MOST => ranges(Some(0), Some(port)),
        compare::MORE => ranges(port.checked_add(1), Some(u16::MAX)),
        compare::AT_LEAST => ranges(Some(port), Some(u16::MAX)),
        _ => return None,
    })
}

/// A network by its address, or by the first bytes of it.
fn network(bytes: &[u8], mask: Option<&[u8]>, v6: bool) -> Option<IpNet> {
    let length = if v6 { 16 } else { 4 };
    let mut whole = bytes.get(..bytes.len().min(length))?.to_vec();
    let prefix = match mask {
        Some(mask) => {
            let ones: u32 = mask.iter().map(|byte| byte.leading_ones()).sum();
            let set: u32 = mask.iter().map(|byte| byte.count_ones()).sum();
            // One with holes is no network.
            u8::try_from(ones).ok().filter(|_| ones == set)?
        }
        None => u8::try_from(whole.len() * 8).ok()?,
    };
    whole.resize(length, 0);
    IpNet::new(address(&whole, v6)?, prefix).ok()
}

/// The destination ports of `struct xt_tcp`, in this machine's byte order. `None` if it asks for something else.
fn tcp_match(info: &[u8]) -> Option<PortRanges> {
    const INVERTED_PORT: u8 = 2;
    let [a, b, c, d, e, f, g, h, option, mask, _, inverted] = *info.first_chunk()?;
    let half = |bytes| u16::from_ne_bytes(bytes);
    let sources = half([a, b])..=half([c, d]);
    let is_only_ports =
        sources == (0..=u16::MAX) && (option, mask, inverted & !INVERTED_PORT) == (0, 0, 0);
    let ports = PortRanges(vec![half([e, f])..=half([g, h])]);
    let ports = if inverted & INVERTED_PORT != 0 { ports.complement() } else { ports };
    is_only_ports.then_some(ports)
}

/// The destination ports of `struct xt_multiport_v1`.
fn multiport(info: &[u8]) -> Option<PortRanges> {
    const DESTINATION: u8 = 1;
    let [flags, count] = *info.first_chunk()?;
    let port = |n: usize| {
        let bytes = info.get(2 + n * 2..)?.first_chunk()?;
        Some(u16::from_ne_bytes(*bytes))
    };
    let begins_range = |n: usize| info.get(32 + n).is_some_and(|flag| *flag != 0);
    let mut ranges = Vec::new();
    let mut n = 0;
    while n < usize::from(count) {
        let first = port(n)?;
        n += usize::from(begins_range(n));
        ranges.push(first..=port(n)?);
        n += 1;
    }
    ranges.sort_by_key(|range| *range.start());
    // Those that overlap would be no ranges apart.
    let is_apart = ranges.windows(2).all(|pair| match pair {
        [one, next] => one.end() < next.start(),
        _ => true,
    });
    let ports = PortRanges(ranges);
    let ports =
        if info.get(47).is_some_and(|flag| *flag != 0) { ports.complement() } else { ports };
    (flags == DESTINATION && is_apart).then_some(ports)
}

/// The address and the ports of a translation, in the older form of IPv4 or in that of both families. `None` if the port stays.
fn nat_range(info: &[u8], v6: bool) -> Option<(Option<IpAddr>, PortRanges)> {
    const ADDRESS: u32 = 1;
    const PORT: u32 = 2;
    const OLDER: usize = 24;
    let info = if info.len() <= OLDER { info.get(4..)? } else { info };
    let flags = u32::from_ne_bytes(*info.first_chunk()?);
    let (addresses, length) = if info.len() <= OLDER { (4, 4) } else { (4, 16) };
    let ports = info.get(addresses + 2 * length..)?;
    let (first, last) = (port(ports)?, port(ports.get(2..)?)?);
    let of = address(info.get(addresses..)?, v6).filter(|_| flags & ADDRESS != 0);
    (flags & PORT != 0).then(|| (of, PortRanges(vec![first..=last])))
}

/// The address and the port of `struct xt_tproxy_target_info` and of `xt_tproxy_target_info_v1`.
fn tproxy(info: &[u8], revision: Option<u32>, v6: bool) -> Option<(Option<IpAddr>, PortRanges)> {
    let length = if revision == Some(0) { 4 } else { 16 };
    let to = port(info.get(8 + length..)?)?;
    let of = address(info.get(8..)?, v6).filter(|one| !one.is_unspecified());
    Some((of, PortRanges(vec![to..=to])))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(list: &[(u16, u16)]) -> PortRanges {
        PortRanges(list.iter().map(|(first, last)| *first..=*last).collect())
    }

    #[test]
    fn ports_are_cut_and_inverted() {
        let all = PortRanges::all();
        assert_eq!(of(&[(80, 90)]).and(&of(&[(1, 80), (85, 100)])), of(&[(80, 80), (85, 90)]));
        assert_eq!(of(&[(80, 90)]).and(&of(&[(91, 100)])), of(&[]));
        assert_eq!(all.complement(), of(&[]));
        assert_eq!(of(&[]).complement(), all);
        assert_eq!(of(&[(80, 80)]).complement(), of(&[(0, 79), (81, u16::MAX)]));
        assert_eq!(of(&[(0, 9), (20, u16::MAX)]).complement(), of(&[(10, 19)]));
        for (operation, expected) in [
            (compare::LESS, of(&[(0, 79)])),
            (compare::AT_MOST, of(&[(0, 80)])),
            (compare::MORE, of(&[(81, u16::MAX)])),
            (compare::AT_LEAST, of(&[(80, u16::MAX)])),
        ] {
            assert_eq!(compared(operation, 80), Some(expected));
        }
        assert_eq!(compared(compare::LESS, 0), Some(of(&[])));
        assert_eq!(compared(compare::MORE, u16::MAX), Some(of(&[])));
    }

    #[test]
    fn what_is_cut_short_is_not_read_and_does_no_harm() {
        for length in 0..64 {
            let info = vec![0xff; length];
            let _ = (tcp_match(&info), multiport(&info), network(&info, None, length % 2 == 0));
            for v6 in [false, true] {
                let _ = (nat_range(&info, v6), tproxy(&info, Some(0), v6), tproxy(&info, None, v6));
            }
        }
    }
}
