//! Reads from the kernel the nf_tables objects that we need.

use rustix::io::Errno;

use super::{
    super::{
        layout::{self, Home, Set},
        rules::{Hook, Rules},
    },
    encode::{
        Bound, ELEMENT_FLAGS, ELEMENT_KEY, ELEMENT_LAST, INTERVAL_END, IptablesTable, Table,
        bounds, family_of, hook_number,
    },
    socket::{NetlinkError, Socket},
    wire::{Kind, Parsed, VALUE, family},
};

/// A table, in a family that our tables may have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::capture) struct TableName {
    pub(in crate::capture) home: Home,
    pub(in crate::capture) name: String,
    /// The netlink port of the socket that owns it, usually a process ID. `None`: it has no owner.
    pub(in crate::capture) owner: Option<u32>,
}

/// The tables of the families that our tables have.
pub(in crate::capture) fn tables(socket: &mut Socket) -> Result<Vec<TableName>, NetlinkError> {
    const NAME: u16 = 1;
    const OWNER: u16 = 7;
    let mut found = Vec::new();
    socket.dump(
        Kind::GET_TABLE,
        family::ALL,
        |_| {},
        |table| {
            let home = Home::ALL.into_iter().find(|home| family_of(*home) == table.family);
            let table = table.attributes();
            let name = table.text(NAME).map(str::to_owned).zip(home);
            let owner = table.number(OWNER);
            found.extend(name.map(|(name, home)| TableName { home, name, owner }));
        },
    )?;
    Ok(found)
}

/// A chain that the kernel calls (a base chain).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::capture) struct BaseChain {
    /// Family, table and chain, as the `nft` program names them.
    pub(in crate::capture) name: String,
    /// `nat`, `filter` or `route`.
    pub(in crate::capture) kind: String,
    pub(in crate::capture) hook: Hook,
    pub(in crate::capture) priority: i32,
}

/// Every base chain for IP at a hook that concerns us.
pub(in crate::capture) fn base_chains(socket: &mut Socket) -> Result<Vec<BaseChain>, NetlinkError> {
    const TABLE: u16 = 1;
    const NAME: u16 = 3;
    const HOOK: u16 = 4;
    const KIND: u16 = 7;
    let mut found = Vec::new();
    socket.dump(
        Kind::GET_CHAIN,
        family::ALL,
        |_| {},
        |chain| {
            let family = match chain.family {
                family::INET => "inet",
                family::IPV4 => "ip",
                family::IPV6 => "ip6",
                _ => return,
            };
            let chain = chain.attributes();
            let base = || {
                let number = chain.nested(HOOK).number(1)?;
                let hooks = [Hook::Prerouting, Hook::Input, Hook::Output];
                Some(BaseChain {
                    name: format!("{family} {} {}", chain.text(TABLE)?, chain.text(NAME)?),
                    kind: chain.text(KIND)?.to_owned(),
                    hook: hooks.into_iter().find(|hook| hook_number(*hook) == number)?,
                    priority: chain.nested(HOOK).number(2)?.cast_signed(),
                })
            };
            found.extend(base());
        },
    )?;
    Ok(found)
}

/// The packet count of the rule in one of our counting chains. `None` if there is no such rule.
pub(in crate::capture) fn counted(
    socket: &mut Socket,
    table: Table<'_>,
    home: Home,
    chain: &str,
) -> Result<Option<u64>, NetlinkError> {
    const PACKETS: u16 = 2;
    let mut found = None;
    rules(socket, family_of(home), table.name, Some(chain), |rule| {
        let is_counter = |expression: &Parsed<'_>| expression.text(EXPRESSION) == Some("counter");
        let counter = rule.list(EXPRESSIONS).find(is_counter);
        let packets = counter.and_then(|counter| counter.nested(EXPRESSION_DATA).long(PACKETS));
        found = found.or(packets);
    })?;
    Ok(found)
}

/// A rule's attributes.
pub(super) const CHAIN: u16 = 2;
pub(super) const HANDLE: u16 = 3;
pub(super) const EXPRESSIONS: u16 = 4;

fn rules(
    socket: &mut Socket,
    family: u8,
    table: &str,
    chain: Option<&str>,
    mut each: impl FnMut(Parsed<'_>),
) -> Result<(), NetlinkError> {
    let select = |to: &mut super::wire::Attributes<'_>| {
        to.text(1, table);
        if let Some(chain) = chain {
            to.text(CHAIN, chain);
        }
    };
    let dumped = socket.dump(Kind::GET_RULE, family, select, |rule| {
        each(rule.attributes());
    });
    none_if_missing(dumped)
}

/// A rule of a table that iptables writes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::capture) struct SharedRule {
    pub(in crate::capture) chain: String,
    /// The kernel's number of the rule, unique in its table. A rule never changes.
    pub(in crate::capture) handle: u64,
    /// The chain that the rule jumps or goes to.
    pub(in crate::capture) target: Option<String>,
    /// The rule's comment, as iptables writes it.
    pub(in crate::capture) comment: Option<String>,
}

/// All chains and rules of a table that iptables writes to, the rules in their order, including those that iptables itself
/// cannot show. `None` if there is no such table.
pub(in crate::capture) fn shared_table(
    socket: &mut Socket,
    table: IptablesTable,
) -> Result<(Vec<String>, Vec<SharedRule>), NetlinkError> {
    const TABLE: u16 = 1;
    const NAME: u16 = 3;
    let mut chains = Vec::new();
    socket.dump(
        Kind::GET_CHAIN,
        table.family(),
        |_| {},
        |chain| {
            let chain = chain.attributes();
            if chain.text(TABLE) == Some(table.name) {
                chains.extend(chain.text(NAME).map(str::to_owned));
            }
        },
    )?;
    let mut found = Vec::new();
    rules(socket, table.family(), table.name, None, |rule| {
        let chain = rule.text(CHAIN).unwrap_or_default().to_owned();
        found.extend(rule.long(HANDLE).map(|handle| SharedRule {
            chain,
            handle,
            target: rule.list(EXPRESSIONS).find_map(target),
            comment: rule.list(EXPRESSIONS).find_map(comment),
        }));
    })?;
    Ok((chains, found))
}

/// The attributes of an expression.
pub(super) const EXPRESSION: u16 = 1;
pub(super) const EXPRESSION_DATA: u16 = 2;

/// The chain that an expression jumps or goes to.
fn target(expression: Parsed<'_>) -> Option<String> {
    const DATA: u16 = 2;
    const VERDICT: u16 = 2;
    const CHAIN: u16 = 2;
    if expression.text(EXPRESSION) != Some("immediate") {
        return None;
    }
    let verdict = expression.nested(EXPRESSION_DATA).nested(DATA).nested(VERDICT);
    verdict.text(CHAIN).map(str::to_owned)
}

/// The text of iptables' match `comment` (include/uapi/linux/netfilter/xt_comment.h).
fn comment(expression: Parsed<'_>) -> Option<String> {
    const NAME: u16 = 1;
    const INFO: u16 = 3;
    let data = expression.nested(EXPRESSION_DATA);
    if expression.text(EXPRESSION) != Some("match") || data.text(NAME) != Some("comment") {
        return None;
    }
    let text = data.get(INFO)?.split(|byte| *byte == 0).next()?;
    std::str::from_utf8(text).ok().map(str::to_owned)
}

/// A table that is not there has nothing.
pub(super) fn none_if_missing(dumped: Result<(), NetlinkError>) -> Result<(), NetlinkError> {
    match dumped {
        Err(error) if error.errno() == Some(Errno::NOENT) => Ok(()),
        dumped => dumped,
    }
}

/// The content of our tables at one time, to be compared with the content at another time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::capture) struct Listing {
    /// The table and chain of each rule, and the kernel's number of the rule. A rule never changes.
    pub(in crate::capture) rules: Vec<(Home, String, u64)>,
    /// The numbers of elements that should be there and are not, and of elements that should not be there.
    pub(in crate::capture) missing: usize,
    pub(in crate::capture) added: usize,
}

/// The keys that the kernel has noted in a set.
pub(in crate::capture) fn noted(
    socket: &mut Socket,
    table: Table<'_>,
    set: Set,
) -> Result<Vec<Vec<u8>>, NetlinkError> {
    let mut found = Vec::new();
    elements(socket, table, set, |bound| found.push(bound.key))?;
    Ok(found)
}

fn elements(
    socket: &mut Socket,
    table: Table<'_>,
    set: Set,
    each: impl FnMut(Bound),
) -> Result<(), NetlinkError> {
    elements_of(socket, family_of(set.home()), table.name, &set.to_string(), each)
}

/// The elements of any set. A set that is not there has none.
pub(super) fn elements_of(
    socket: &mut Socket,
    family: u8,
    table: &str,
    set: &str,
    mut each: impl FnMut(Bound),
) -> Result<(), NetlinkError> {
    let select = |to: &mut super::wire::Attributes<'_>| {
        to.text(1, table).text(2, set);
    };
    let dumped = socket.dump(Kind::GET_ELEMENTS, family, select, |elements| {
        for element in elements.attributes().list(3) {
            let key = element.nested(ELEMENT_KEY).get(VALUE).unwrap_or_default().to_vec();
            let last = element.nested(ELEMENT_LAST).get(VALUE).map(<[u8]>::to_vec);
            let flags = element.number(ELEMENT_FLAGS).unwrap_or_default();
            each(Bound { key, last, is_end: flags & INTERVAL_END != 0 });
        }
    });
    none_if_missing(dumped)
}

/// Compares the tables with `rules`. Needed only if other programs can change the tables. Reads every element.
pub(in crate::capture) fn list(
    socket: &mut Socket,
    table: Table<'_>,
    expected: &Rules,
) -> Result<Listing, NetlinkError> {
    let mut listing = Listing::default();
    for home in layout::homes(&expected.shape) {
        self::rules(socket, family_of(*home), table.name, None, |rule| {
            let chain = rule.text(CHAIN).unwrap_or_default().to_owned();
            listing.rules.extend(rule.long(HANDLE).map(|handle| (*home, chain, handle)));
        })?;
    }
    for set in layout::sets(&expected.shape).filter(|set| !set.is_noted()) {
        let mut wanted: Vec<_> = layout::elements(set, expected).iter().flat_map(bounds).collect();
        let mut present = Vec::new();
        elements(socket, table, set, |bound| present.push(bound))?;
        wanted.sort();
        present.sort();
        listing.missing +=
            wanted.iter().filter(|bound| present.binary_search(bound).is_err()).count();
        listing.added +=
            present.iter().filter(|bound| wanted.binary_search(bound).is_err()).count();
    }
    Ok(listing)
}
