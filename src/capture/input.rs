//! Finds rules that would stop captured connections after our rules. A captured connection goes on to this host's INPUT, so
//! a firewall that drops unknown traffic there drops it too. embassy reports such rules and does not change them: they
//! belong to others.
//!
//! The rules are not evaluated completely. A rule that accepts our port, translated connections, or everything from a
//! container bridge is taken as letting us in, whatever its other conditions are. A rule counts as dropping us only if it
//! has no condition that a captured connection may not meet. Whether connections really are dropped, `arrivals` counts.

#![expect(clippy::disallowed_methods, reason = "reads files of the kernel, which need no disk")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

use super::{
    program::{Program, ProgramError},
    rules::{COUNTS, DRAINING, NAME},
};

/// A chain that may stop captured connections.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Barrier {
    /// The chain, as its own program names it, and what it does.
    pub chain: String,
    /// A command that lets captured connections pass, and no others.
    pub remedy: String,
}

impl fmt::Display for Barrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; to let captured connections pass: {}", self.chain, self.remedy)
    }
}

impl Barrier {
    /// The most likely one of those that may drop connections to `port`.
    pub(super) fn suspected(suspects: &[Self], port: u16) -> Self {
        match suspects {
            [] => Self::unknown(port),
            [one] => one.clone(),
            [Self { chain, remedy }, more @ ..] => {
                let chain = format!("{chain}, or one of {} others that drop", more.len());
                Self { chain, remedy: remedy.clone() }
            }
        }
    }

    /// Connections to `port` are dropped, but no readable rule shows where.
    fn unknown(port: u16) -> Self {
        Self {
            chain: "a rule of this host's input that embassy cannot read".to_owned(),
            remedy: format!(
                "look for it with nft list ruleset and iptables-save; before it, let pass: tcp dport {port} ct status dnat"
            ),
        }
    }
}

/// Describes the captured connections.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CapturedTraffic {
    /// The port that they are redirected to.
    pub port: u16,
    /// The interfaces on which consumers' connections arrive.
    pub bridges: BTreeSet<String>,
}

impl CapturedTraffic {
    /// The connections that arrive at these addresses of this host.
    pub fn at(port: u16, vips: &BTreeSet<IpAddr>) -> Self {
        let all = if_addrs::get_if_addrs().unwrap_or_default();
        let bridges = all.into_iter().filter(|interface| vips.contains(&interface.ip()));
        Self { port, bridges: bridges.map(|interface| interface.name).collect() }
    }

    /// Whether an interface, or a pattern for interfaces, matches a container interface.
    fn come_by(&self, interface: &str) -> bool {
        let interface = interface.trim_matches(['"', ',']);
        match interface.strip_suffix(['*', '+']) {
            Some(start) => self.bridges.iter().any(|bridge| bridge.starts_with(start)),
            None => self.bridges.contains(interface),
        }
    }
}

/// The rules of this host's firewalls. A program that is not installed has none.
#[derive(Debug)]
pub struct FirewallListings {
    /// Without the elements of sets: other programs' large sets would take seconds.
    nft: Result<String, ProgramError>,
    /// iptables' rules for IPv4 and IPv6, if nft does not show them.
    filters: [Result<String, ProgramError>; 2],
}

impl FirewallListings {
    pub async fn read() -> Self {
        let nft = run("nft", Program("nft").run(&["-s", "-t", "list", "ruleset"], "")).await;
        let is_hidden = nft.as_ref().map_or(true, String::is_empty);
        let save = async |program, legacy, names| match legacy_tables(names) {
            tables if tables.lines().any(|name| name == "filter") => {
                match Program(legacy).saved("filter").await {
                    Err(error) if error.is_missing() => {
                        run(program, Program(program).saved("filter")).await
                    }
                    saved => saved,
                }
            }
            // This program reads the elements of all sets. nft can leave them out.
            _ if is_hidden => run(program, Program(program).saved("filter")).await,
            _ => Ok(String::new()),
        };
        let [v4, v6] = LEGACY_TABLES;
        let v4 = save("iptables-save", "iptables-legacy-save", v4).await;
        let v6 = save("ip6tables-save", "ip6tables-legacy-save", v6).await;
        Self { nft, filters: [v4, v6] }
    }

    /// Why a firewall cannot be read.
    pub fn error(&self) -> Option<&ProgramError> {
        self.filters.iter().chain([&self.nft]).find_map(|listing| listing.as_ref().err())
    }

    /// The obstacles to captured connections, as far as the rules can be read.
    pub fn barriers(&self, captured: &CapturedTraffic) -> Vec<Barrier> {
        self.tables(captured).iter().flat_map(|table| table.barriers(captured.port)).collect()
    }

    /// Whether readable chains stop captured connections in each family that `addresses` has.
    pub(super) fn bar_all(&self, captured: &CapturedTraffic, addresses: &BTreeSet<IpAddr>) -> bool {
        let (mut v4, mut v6) = (false, false);
        for table in self.tables(captured) {
            if table.barriers(captured.port).next().is_some() {
                let family = table.name.split(' ').next().unwrap_or_default();
                v4 |= family != "ip6";
                v6 |= family != "ip";
            }
        }
        addresses.iter().all(|address| if address.is_ipv4() { v4 } else { v6 })
    }

    /// The rules that may drop captured connections, if these are known to be dropped although no chain has to be in their way: the most
    /// likely one first.
    pub(super) fn suspects(&self, captured: &CapturedTraffic) -> Vec<Barrier> {
        let tables = self.tables(captured);
        let mut suspects: Vec<_> =
            tables.iter().flat_map(|table| table.suspects(captured.port)).collect();
        suspects.sort_by_key(|(likelihood, _)| std::cmp::Reverse(*likelihood));
        suspects.into_iter().map(|(_, barrier)| barrier).collect()
    }

    /// A chain that accepts only what it knows. It may recognise the answers to untracked connections only by their
    /// connection state, which they do not have. `None` if there is no such chain.
    pub(super) fn closed(&self) -> Option<String> {
        let mut tables = self.tables(&CapturedTraffic::default());
        for table in &mut tables {
            for rule in table.chains.values_mut().flat_map(|chain| &mut chain.rules) {
                // Rules that accept by port, interface or state do not accept such an answer.
                let is_special =
                    rule.port.is_some() || rule.bridge.is_some() || rule.text.contains("state");
                rule.more |= is_special || rule.translated;
                (rule.port, rule.bridge, rule.translated) = (None, None, false);
            }
        }
        tables.iter().flat_map(|table| table.barriers(0)).map(|barrier| barrier.chain).next()
    }

    fn tables(&self, captured: &CapturedTraffic) -> Vec<ListedTable<'_>> {
        let mut tables = nft_tables(self.nft.as_deref().unwrap_or_default(), captured);
        for (filter, name) in self.filters.iter().zip(["ip filter", "ip6 filter"]) {
            let saved = filter.as_deref().unwrap_or_default();
            tables.extend(iptables_table(saved, name, captured));
        }
        tables
    }
}

/// The kernel's files with the names of the older iptables' tables.
pub(super) const LEGACY_TABLES: [&str; 2] =
    ["/proc/net/ip_tables_names", "/proc/net/ip6_tables_names"];

pub(super) fn legacy_tables(names: &str) -> String {
    std::fs::read_to_string(names).unwrap_or_default()
}

/// Whether rules of the older iptables are in use here. The kernel does not report their changes, and nft does not show
/// them.
pub(super) fn has_legacy_iptables() -> bool {
    LEGACY_TABLES.iter().any(|names| !legacy_tables(names).trim().is_empty())
}

/// The listing that a program prints. A program that is not installed has no rules.
async fn run(
    program: &'static str,
    listing: impl Future<Output = Result<String, ProgramError>>,
) -> Result<String, ProgramError> {
    match listing.await {
        Err(error) if error.is_missing() => Ok(String::new()),
        // A kernel without IPv6 has no rules for it.
        Err(_) if program == "ip6tables-save" => Ok(String::new()),
        answer => answer,
    }
}

/// A table, as listed.
#[derive(Debug, Default)]
struct ListedTable<'a> {
    /// Family and name.
    name: &'a str,
    chains: BTreeMap<&'a str, ListedChain<'a>>,
}

#[derive(Debug, Default)]
struct ListedChain<'a> {
    /// The kernel's input hook calls it.
    is_input: bool,
    /// Its policy, as one word.
    policy: &'a str,
    rules: Vec<Rule<'a>>,
}

/// The parts of a rule that concern captured connections.
#[derive(Debug, Default)]
struct Rule<'a> {
    text: &'a str,
    end: PacketVerdict<'a>,
    /// Whether it matches our port. `None` if it has no condition about ports or protocols.
    port: Option<bool>,
    /// Whether it matches a container bridge. `None` if it names no interfaces.
    bridge: Option<bool>,
    /// It matches translated connections.
    translated: bool,
    /// It has a condition that not every captured connection meets.
    more: bool,
}

/// What a rule does with a packet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum PacketVerdict<'a> {
    Accept,
    Drop,
    Return,
    To(&'a str),
    /// The packet goes on to the next rule.
    #[default]
    Next,
}

/// What happens to captured connections in a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Fate<'a> {
    /// A rule lets in at least some of them.
    LetIn,
    /// All connections are accepted.
    Accepted,
    /// They are dropped in this chain, by this rule.
    Dropped(&'a str, &'a str),
    /// They reach the chain's end.
    Through,
}

/// How deeply the kernel nests jumps (NFT_JUMP_STACK_SIZE).
const DEPTH: usize = 16;

impl Rule<'_> {
    /// Whether it matches every captured connection.
    fn takes_all(&self) -> bool {
        !self.more && self.bridge.is_none() && self.port != Some(false)
    }

    /// Whether it names what captured connections have: a translated destination, our port, or a bridge they arrive on.
    fn is_for_us(&self) -> bool {
        self.translated
            || self.port == Some(true)
            || self.bridge == Some(true) && self.port.is_none()
    }
}

impl<'a> ListedTable<'a> {
    fn barriers(&self, port: u16) -> impl Iterator<Item = Barrier> {
        let mut fates = BTreeMap::new();
        self.chains.iter().filter(|(_, chain)| chain.is_input).filter_map(move |(name, chain)| {
            let what = match self.fate(name, DEPTH, &mut fates) {
                Fate::LetIn | Fate::Accepted => return None,
                Fate::Dropped(chain, rule) if self.is_last(chain, rule) => {
                    format!("{} ends with {rule:?}", self.named(chain))
                }
                Fate::Dropped(chain, rule) => {
                    format!("{} has the rule {rule:?}", self.named(chain))
                }
                Fate::Through if chain.policy.eq_ignore_ascii_case("drop") => {
                    format!("{} has the policy {}", self.named(name), chain.policy)
                }
                Fate::Through => return None,
            };
            Some(Barrier { chain: what, remedy: self.remedy(name, port) })
        })
    }

    fn is_last(&self, chain: &str, rule: &str) -> bool {
        let last = self.chains.get(chain).and_then(|chain| chain.rules.last());
        last.is_some_and(|last| last.text == rule)
    }

    /// Rules that drop some of the connections at the input hook, each with a rank: how likely it drops captured ones.
    fn suspects(&self, port: u16) -> Vec<(u8, Barrier)> {
        let mut all = Vec::new();
        for (input, _) in self.chains.iter().filter(|(_, chain)| chain.is_input) {
            for name in self.reachable(input) {
                let rules = self.chains.get(name).into_iter().flat_map(|chain| &chain.rules);
                let dropping = rules.filter(|rule| rule.end == PacketVerdict::Drop);
                all.extend(dropping.filter(|rule| rule.port != Some(false)).map(|rule| {
                    let likelihood = u8::from(rule.is_for_us()) * 2 + u8::from(rule.takes_all());
                    let chain = format!("{} has the rule {:?}", self.named(name), rule.text);
                    (likelihood, Barrier { chain, remedy: self.remedy(input, port) })
                }));
            }
        }
        all
    }

    /// A chain, and all chains that it leads to, each once.
    fn reachable(&self, chain: &'a str) -> BTreeSet<&'a str> {
        let mut found = BTreeSet::new();
        let mut open = vec![chain];
        while let Some(name) = open.pop() {
            if found.insert(name) {
                let rules = self.chains.get(name).into_iter().flat_map(|chain| &chain.rules);
                open.extend(rules.filter_map(|rule| match rule.end {
                    PacketVerdict::To(next) => Some(next),
                    _ => None,
                }));
            }
        }
        found
    }

    /// `known`: the results for chains that were already visited.
    fn fate(&self, name: &str, depth: usize, known: &mut BTreeMap<&'a str, Fate<'a>>) -> Fate<'a> {
        let found = self.chains.get_key_value(name).filter(|_| depth > 0);
        let Some((name, chain)) = found else { return Fate::Through };
        if let Some(fate) = known.get(name) {
            return fate.clone();
        }
        // The kernel has no loops, but a text may have some.
        known.insert(name, Fate::Through);
        let fate = self.fate_of(name, chain, depth, known);
        known.insert(name, fate.clone());
        fate
    }

    fn fate_of(
        &self,
        name: &'a str,
        chain: &ListedChain<'a>,
        depth: usize,
        known: &mut BTreeMap<&'a str, Fate<'a>>,
    ) -> Fate<'a> {
        for rule in &chain.rules {
            let fate = match rule.end {
                PacketVerdict::Next => continue,
                PacketVerdict::Accept => Fate::Accepted,
                PacketVerdict::Drop => Fate::Dropped(name, rule.text),
                // The rules of the calling chain follow.
                PacketVerdict::Return if rule.takes_all() => return Fate::Through,
                PacketVerdict::Return => continue,
                PacketVerdict::To(next) => self.fate(next, depth - 1, known),
            };
            match fate {
                Fate::LetIn => return Fate::LetIn,
                Fate::Accepted if rule.is_for_us() => return Fate::LetIn,
                // A chain for a container bridge: its owner has decided about such connections.
                Fate::Through if rule.bridge == Some(true) && rule.port.is_none() => {
                    return Fate::LetIn;
                }
                Fate::Accepted | Fate::Dropped(..) if rule.takes_all() => return fate,
                _ => {}
            }
        }
        Fate::Through
    }

    /// The program that owns the table, if it is one of iptables': only that program may write there.
    fn program(&self) -> Option<&'static str> {
        match self.name {
            "ip filter" if self.chains.contains_key("INPUT") => Some("iptables"),
            "ip6 filter" if self.chains.contains_key("INPUT") => Some("ip6tables"),
            _ => None,
        }
    }

    fn named(&self, chain: &str) -> String {
        match self.program() {
            Some(program) => format!("chain {chain} of {program}"),
            None => format!("chain {} {chain} of nft", self.name),
        }
    }

    fn remedy(&self, input: &str, port: u16) -> String {
        match self.program() {
            Some(program) => {
                format!(
                    "{program} -I {input} -p tcp --dport {port} -m conntrack --ctstate DNAT -j ACCEPT"
                )
            }
            None => format!(
                "nft insert rule {} {input} tcp dport {port} ct status dnat accept",
                self.name
            ),
        }
    }
}

/// The tables in the text of `nft list ruleset`.
fn nft_tables<'a>(ruleset: &'a str, captured: &CapturedTraffic) -> Vec<ListedTable<'a>> {
    let mut tables: Vec<ListedTable<'_>> = Vec::new();
    let mut chain = None;
    for line in ruleset.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("table ") {
            let name = name.trim_end_matches(['{', ' ']);
            tables.push(ListedTable { name, ..ListedTable::default() });
            chain = None;
        } else if let Some(name) = line.strip_prefix("chain ") {
            chain = Some(name.trim_end_matches(['{', ' ']));
        } else if line == "}" {
            chain = None;
        } else if let (Some(table), Some(name)) = (tables.last_mut(), chain) {
            let chain = table.chains.entry(name).or_default();
            match line.strip_prefix("type ") {
                Some(base) => {
                    chain.is_input = base.contains(" hook input ");
                    let policy = base.split_once("policy ").map(|(_, policy)| policy);
                    chain.policy = policy.unwrap_or_default().trim_end_matches(';');
                }
                None => chain.rules.push(nft_rule(line, captured)),
            }
        }
    }
    // Bridges and devices have input hooks of their own, which packets pass before they are translated.
    tables.retain(|table| ["ip ", "ip6 ", "inet "].iter().any(|of| table.name.starts_with(of)));
    // Our tables refuse only what was not captured. The program may show the owner behind the name.
    tables.retain(|table| !is_ours(table.name));
    for table in tables.iter_mut().filter(|table| table.program().is_some()) {
        // iptables itself writes it in capitals.
        for chain in table.chains.values_mut().filter(|chain| chain.policy == "drop") {
            chain.policy = "DROP";
        }
    }
    tables
}

/// Whether a table is one of embassy's, by its family and name. Text may follow the name.
pub(super) fn is_ours(table: &str) -> bool {
    let mut words = table.split(' ');
    let (family, name) = (words.next(), words.next().unwrap_or_default());
    let is_ours = name == NAME || name == COUNTS || name.starts_with(DRAINING);
    family == Some("inet") && is_ours
}

/// The words of a rule. A quoted text is one word, and so is a list in braces.
pub(super) fn words(rule: &str) -> Vec<&str> {
    let mut words = Vec::new();
    let mut rest = rule.trim_start();
    while let Some(first) = rest.chars().next() {
        let end = match first {
            '"' => rest.get(1..).and_then(|text| text.find('"')).map(|at| at + 2),
            '{' => rest.find('}').map(|at| at + 1),
            _ => rest.find(char::is_whitespace),
        };
        let (word, more) = rest.split_at_checked(end.unwrap_or(rest.len())).unwrap_or((rest, ""));
        words.push(word);
        rest = more.trim_start();
    }
    words
}

fn nft_rule<'a>(text: &'a str, captured: &CapturedTraffic) -> Rule<'a> {
    let mut rule = Rule { text, ..Rule::default() };
    let words = words(text);
    let mut rest = words.as_slice();
    loop {
        rest = match rest {
            [] => return rule,
            ["counter", "packets", _, "bytes", _, rest @ ..]
            | ["meta", "l4proto", "tcp", rest @ ..]
            | ["ip", "protocol", "tcp", rest @ ..]
            | ["comment" | "prefix" | "level" | "group", _, rest @ ..]
            | ["counter" | "log", rest @ ..] => rest,
            [
                "udp" | "udplite" | "sctp" | "dccp" | "icmp" | "icmpv6" | "ipv6-icmp" | "igmp",
                rest @ ..,
            ] => {
                rule.port = Some(false);
                rest
            }
            ["tcp" | "th", "dport", ports, rest @ ..] if *ports != "!=" => {
                // The content of a named set was not read. It is assumed to contain our port.
                let is_ours = ports.starts_with('@') || has_port(ports, '-', captured.port);
                rule.port = Some(is_ours);
                rule.more |= ports.starts_with('@');
                rest
            }
            ["iif" | "iifname", names, rest @ ..] if *names != "!=" => {
                let mut names = names.trim_matches(['{', '}']).split(',').map(str::trim);
                rule.bridge = Some(names.any(|name| captured.come_by(name)));
                rest
            }
            ["ct", "state", states, rest @ ..] if *states != "!=" => {
                let mut states = states.split(|c: char| !c.is_ascii_alphabetic());
                rule.more |= !states.any(|state| state == "new");
                rest
            }
            ["ct", "status", status, rest @ ..] if *status != "!=" => {
                rule.translated = status.contains("dnat");
                rule.more |= !rule.translated;
                rest
            }
            ["accept", ..] => {
                rule.end = PacketVerdict::Accept;
                return rule;
            }
            ["drop" | "reject", ..] => {
                rule.end = PacketVerdict::Drop;
                return rule;
            }
            ["return", ..] => {
                rule.end = PacketVerdict::Return;
                return rule;
            }
            ["jump" | "goto", target, ..] => {
                rule.end = PacketVerdict::To(target);
                return rule;
            }
            [_, rest @ ..] => {
                rule.more = true;
                rest
            }
        };
    }
}

/// The table in the text of `iptables-save`, if it has one.
fn iptables_table<'a>(
    saved: &'a str,
    name: &'a str,
    captured: &CapturedTraffic,
) -> Option<ListedTable<'a>> {
    let mut table = ListedTable { name, ..ListedTable::default() };
    for line in saved.lines() {
        if let Some(head) = line.strip_prefix(':') {
            let mut head = head.split(' ');
            let (chain, policy) = (head.next()?, head.next()?);
            let is_input = chain == "INPUT";
            table.chains.insert(chain, ListedChain { is_input, policy, rules: Vec::new() });
        } else if let Some((chain, rule)) = line.strip_prefix("-A ").and_then(|l| l.split_once(' '))
        {
            table.chains.entry(chain).or_default().rules.push(iptables_rule(rule, captured));
        }
    }
    let chains: BTreeSet<_> = table.chains.keys().copied().collect();
    for rule in table.chains.values_mut().flat_map(|chain| &mut chain.rules) {
        // If no chain has the target's name, the target is an extension, such as LOG.
        if matches!(rule.end, PacketVerdict::To(target) if !chains.contains(target)) {
            rule.end = PacketVerdict::Next;
        }
    }
    (!table.chains.is_empty()).then_some(table)
}

fn iptables_rule<'a>(text: &'a str, captured: &CapturedTraffic) -> Rule<'a> {
    let mut rule = Rule { text, ..Rule::default() };
    let words = words(text);
    let mut rest = words.as_slice();
    loop {
        rest = match rest {
            [] => return rule,
            ["-p", "tcp", rest @ ..]
            | ["-m", "tcp" | "multiport" | "conntrack" | "state" | "comment", rest @ ..]
            | ["--comment", _, rest @ ..] => rest,
            ["-p", _, rest @ ..] => {
                rule.port = Some(false);
                rest
            }
            ["--dport" | "--dports", ports, rest @ ..] => {
                rule.port = Some(has_port(ports, ':', captured.port));
                rest
            }
            ["-i", name, rest @ ..] => {
                rule.bridge = Some(captured.come_by(name));
                rest
            }
            ["--ctstate" | "--state", states, rest @ ..] => {
                rule.translated = states.split(',').any(|state| state == "DNAT");
                rule.more |= !rule.translated && !states.split(',').any(|state| state == "NEW");
                rest
            }
            ["-j" | "-g", target, ..] => {
                rule.end = match *target {
                    "ACCEPT" => PacketVerdict::Accept,
                    "DROP" | "REJECT" => PacketVerdict::Drop,
                    "RETURN" => PacketVerdict::Return,
                    chain => PacketVerdict::To(chain),
                };
                return rule;
            }
            // A negated condition, whatever it is.
            ["!", _, _, rest @ ..] | [_, rest @ ..] => {
                rule.more = true;
                rest
            }
        };
    }
}

/// Whether a list of ports and ranges contains this port.
fn has_port(list: &str, range: char, port: u16) -> bool {
    let pieces = list.split(|c: char| !c.is_ascii_digit() && c != range);
    pieces.filter(|piece| !piece.is_empty()).any(|piece| {
        let (first, last) = piece.split_once(range).unwrap_or((piece, piece));
        matches!((first.parse::<u16>(), last.parse::<u16>()), (Ok(first), Ok(last)) if (first..=last).contains(&port))
    })
}

/// Reads `input` as a listing of either program.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(input: &[u8]) {
    let listing = String::from_utf8_lossy(input);
    let captured = CapturedTraffic { port: 9999, bridges: ["docker0".to_owned()].into() };
    let mut tables = nft_tables(&listing, &captured);
    tables.extend(iptables_table(&listing, "ip filter", &captured));
    for table in tables {
        let suspects = table.suspects(9999).into_iter().map(|(_, barrier)| barrier);
        for barrier in table.barriers(9999).chain(suspects) {
            assert!(barrier.remedy.contains("9999"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn captured() -> CapturedTraffic {
        CapturedTraffic {
            port: 9999,
            bridges: ["docker0", "br-1234", "podman0"].map(Into::into).into(),
        }
    }

    fn in_iptables(saved: &str, name: &str) -> Vec<Barrier> {
        let captured = captured();
        let table = iptables_table(saved, name, &captured);
        table.iter().flat_map(|table| table.barriers(9999)).collect()
    }

    fn iptables(rules: &str) -> bool {
        let chains =
            ":ufw-user-input - [0:0]\n:accept - [0:0]\n:elsewhere - [0:0]\n:refuse - [0:0]";
        let saved = format!(
            "*filter\n:INPUT DROP [0:0]\n:FORWARD DROP [0:0]\n{chains}\n-A accept -j ACCEPT\n\
             -A refuse -m comment --comment \"-j ACCEPT\" -j DROP\n{rules}\nCOMMIT\n"
        );
        !in_iptables(&saved, "ip filter").is_empty()
    }

    #[test]
    fn a_policy_of_iptables_is_recognised_unless_a_rule_lets_us_in() {
        for closed in [
            "",
            "-A INPUT -i lo -j ACCEPT",
            "-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT",
            "-A INPUT -p tcp -m tcp --dport 22 -j accept",
            "-A INPUT -p tcp -m tcp --dport 9999 -j DROP",
            "-A INPUT -i docker0 -p tcp -m tcp --dport 53 -j ACCEPT",
            "-A INPUT ! -i docker0 -j ACCEPT",
            "-A INPUT -i docker0 -p icmp -j ACCEPT",
            "-A INPUT -i docker0 -j LOG --log-prefix \"a -j ACCEPT\"",
            "-A INPUT -i eth0 -j ACCEPT",
            "-A FORWARD -i docker0 -j ACCEPT",
            "-A elsewhere -p tcp -m tcp --dport 9999 -j ACCEPT",
            "-A INPUT -j refuse\n-A INPUT -p tcp -m tcp --dport 9999 -j ACCEPT",
            // Chains in a loop.
            "-A INPUT -j elsewhere\n-A elsewhere -j INPUT",
        ] {
            assert!(iptables(closed), "{closed}");
        }
        for open in [
            "-A INPUT -p tcp -m tcp --dport 9999 -j ACCEPT",
            "-A INPUT -p tcp -m tcp --dport 9999 -j accept",
            "-A INPUT -j ufw-user-input\n-A ufw-user-input -p tcp -m multiport --dports 22,9000:10000 -j ACCEPT",
            "-A INPUT -p tcp -m conntrack --ctstate DNAT -j ACCEPT",
            "-A INPUT -i docker0 -j ACCEPT",
            "-A INPUT -i podman0 -j ACCEPT\n-A INPUT -j refuse",
            "-A INPUT -i br+ -j ACCEPT",
            "-A INPUT -j ACCEPT",
            "-A INPUT -p tcp -m state --state NEW -j ACCEPT",
        ] {
            assert!(!iptables(open), "{open}");
        }
    }

    #[test]
    fn a_last_rule_is_as_good_as_a_policy() {
        let rejects = "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -i lo -j ACCEPT\n\
            -A INPUT -j REJECT --reject-with icmp-host-prohibited\nCOMMIT\n";
        assert_eq!(
            in_iptables(rejects, "ip6 filter")[0].to_string(),
            "chain INPUT of ip6tables ends with \"-j REJECT --reject-with icmp-host-prohibited\"; to let captured \
             connections pass: ip6tables -I INPUT -p tcp --dport 9999 -m conntrack --ctstate DNAT -j ACCEPT"
        );
        assert_eq!(in_iptables("*filter\n:INPUT ACCEPT [0:0]\nCOMMIT\n", "ip filter"), []);
        assert_eq!(in_iptables("", "ip filter"), []);
    }

    #[test]
    fn a_chain_that_input_leads_to_may_drop_as_well() {
        // As NixOS has it.
        let chains = "*filter\n:INPUT ACCEPT [0:0]\n:host-fw - [0:0]\n:host-fw-refuse - [0:0]\n:host-fw-log - [0:0]\n";
        let rules = "-A INPUT -j host-fw\n\
            -A host-fw -i lo -j ACCEPT\n-A host-fw -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
            -A host-fw -j host-fw-log\n\
            -A host-fw-log -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -j LOG --log-prefix \"refused: \"\n\
            -A host-fw-log -m pkttype ! --pkt-type unicast -j host-fw-refuse\n-A host-fw-log -j host-fw-refuse\n\
            -A host-fw-refuse -j DROP\nCOMMIT\n";
        let saved = format!("{chains}{rules}");
        let expected = Barrier {
            chain: "chain host-fw-refuse of iptables ends with \"-j DROP\"".to_owned(),
            remedy: "iptables -I INPUT -p tcp --dport 9999 -m conntrack --ctstate DNAT -j ACCEPT"
                .to_owned(),
        };
        assert_eq!(in_iptables(&saved, "ip filter"), [expected]);
        let open = "-A INPUT -i podman0 -j ACCEPT\n";
        assert_eq!(in_iptables(&format!("{chains}{open}{rules}"), "ip filter"), []);
    }

    fn nft(rules: &str) -> Vec<Barrier> {
        let ruleset = format!(
            "table inet strict {{\n\tset open {{\n\t\ttype inet_service\n\t}}\n\n\
             \tchain in {{\n\t\ttype filter hook input priority filter; policy drop;\n\t\t{rules}\n\t}}\n}}\n\
             table ip filter {{\n\tchain INPUT {{\n\t\ttype filter hook input priority filter; policy accept;\n\t}}\n}}\n\
             table bridge b {{\n\tchain in {{\n\t\ttype filter hook input priority filter; policy drop;\n\t}}\n}}\n"
        );
        let tables = nft_tables(&ruleset, &captured());
        tables.iter().flat_map(|table| table.barriers(9999)).collect()
    }

    #[test]
    fn a_policy_of_nft_is_recognised_unless_a_rule_lets_us_in() {
        for closed in [
            "iif \"lo\" accept",
            "tcp dport { 22, 80 } accept",
            "tcp dport 22 accept\n\t\taccept_nothing",
            "iifname \"docker0\" udp dport 53 accept",
            "tcp dport 9999 drop",
            "ct state established,related accept",
            "ct state vmap { established : accept, related : accept, invalid : drop }",
            "iifname != \"docker0\" accept",
            "iifname \"docker0\" meta l4proto udp accept",
            "tcp dport != 9999 accept",
            "iif \"lo\" accept\n\t}\n\tchain forward {\n\t\tiifname \"docker0\" accept",
        ] {
            let found = nft(closed);
            assert_eq!(found.len(), 1, "{closed}");
            let remedy = "nft insert rule inet strict in tcp dport 9999 ct status dnat accept";
            assert_eq!(found[0].remedy, remedy, "{closed}");
            assert!(
                found[0].chain.starts_with("chain inet strict in of nft "),
                "{}",
                found[0].chain
            );
        }
        for open in [
            "tcp dport 9999 accept",
            "tcp dport { 22, 9000-10000 } accept",
            "ct status dnat accept",
            "iifname \"br-1234\" accept",
            "iifname { \"eth0\", \"podman0\" } counter accept",
            "iifname \"br-*\" accept",
            "iifname \"docker0\" goto filter_IN_docker",
            "jump more\n\t}\n\tchain more {\n\t\ttcp dport 9999 accept",
            "accept",
            "ct state new log prefix \"drop all \" accept",
            // The content of the set was not read.
            "tcp dport @open accept",
        ] {
            assert_eq!(nft(open), [], "{open}");
        }
    }

    #[test]
    fn our_own_rule_is_nobodys_obstacle() {
        for name in ["embassy { # progname embassy", "embassy_counts {", "embassy_draining_1 {"] {
            let ruleset = format!(
                "table inet {name}\n\tchain direct {{\n\t\ttype filter hook input priority -2000000000; policy accept;\n\
                 \t\ttcp dport 9999 ct status ! dnat counter packets 0 bytes 0 reject with tcp reset\n\t}}\n}}\n"
            );
            let filters = [Ok(String::new()), Ok(String::new())];
            let listings = FirewallListings { nft: Ok(ruleset), filters };
            assert_eq!(listings.barriers(&captured()), []);
            let suspects = listings.suspects(&captured());
            assert_eq!(Barrier::suspected(&suspects, 9999), Barrier::unknown(9999));
        }
    }

    #[test]
    fn what_drops_in_nft_is_named() {
        for (rules, expected) in [
            ("", "has the policy drop"),
            ("counter drop", "ends with \"counter drop\""),
            (
                "meta l4proto tcp reject with tcp reset\n\t\tcounter",
                "has the rule \"meta l4proto tcp reject with tcp reset\"",
            ),
            ("tcp dport 1024-65535 drop", "ends with \"tcp dport 1024-65535 drop\""),
        ] {
            assert_eq!(nft(rules)[0].chain, format!("chain inet strict in of nft {expected}"));
        }
        let ruleset = "table ip filter {\n\tchain host-fw {\n\t\t counter drop\n\t}\n\
            \tchain INPUT {\n\t\ttype filter hook input priority filter; policy drop;\n\t\tcounter jump host-fw\n\t}\n}\n";
        let tables = nft_tables(ruleset, &captured());
        let found: Vec<_> = tables.iter().flat_map(|table| table.barriers(9999)).collect();
        assert_eq!(found[0].chain, "chain host-fw of iptables ends with \"counter drop\"");
        assert!(found[0].remedy.starts_with("iptables -I INPUT "), "{}", found[0].remedy);
    }

    #[test]
    fn a_chain_that_knows_connections_by_their_state_is_closed_to_untracked_answers() {
        let closed = |rules: &str, policy: &str| {
            let head = format!("type filter hook input priority filter; policy {policy};");
            let ruleset =
                format!("table inet strict {{\n\tchain in {{\n\t\t{head}\n\t\t{rules}\n\t}}\n}}\n");
            let filters = [Ok(String::new()), Ok(String::new())];
            FirewallListings { nft: Ok(ruleset), filters }.closed()
        };
        for rules in [
            "ct status dnat accept",
            "ct state new,established accept",
            "tcp dport 9999 accept",
            "iif \"docker0\" accept",
        ] {
            let expected = "chain inet strict in of nft has the policy drop";
            assert_eq!(closed(rules, "drop").as_deref(), Some(expected), "{rules}");
            assert_eq!(closed(rules, "accept"), None);
        }
        assert_eq!(closed("accept", "drop"), None);
        assert!(closed("counter drop", "accept").is_some());
    }

    #[test]
    fn the_likeliest_of_the_rules_that_drop_some_connections_is_named() {
        let of = |rules: &str| {
            let ruleset = format!(
                "table inet strict {{\n\tchain in {{\n\t\ttype filter hook input priority filter; policy accept;\n\
                 \t\tjump more\n\t}}\n\tchain more {{\n\t\t{rules}\n\t}}\n\
                 \tchain elsewhere {{\n\t\tdrop\n\t}}\n}}\n"
            );
            let filters = [Ok(String::new()), Ok(String::new())];
            let listings = FirewallListings { nft: Ok(ruleset), filters };
            Barrier::suspected(&listings.suspects(&captured()), 9999)
        };
        let one = of("ip saddr 10.0.0.0/8 tcp dport 22 drop\n\t\tip saddr 172.16.0.0/12 drop");
        assert_eq!(
            one.chain,
            "chain inet strict more of nft has the rule \"ip saddr 172.16.0.0/12 drop\""
        );
        assert_eq!(
            one.remedy,
            "nft insert rule inet strict in tcp dport 9999 ct status dnat accept"
        );
        let best = of("ct state invalid drop\n\t\tiifname \"docker0\" tcp dport 1024-65535 drop");
        let rule = "has the rule \"iifname \\\"docker0\\\" tcp dport 1024-65535 drop\", or one of 1 others that drop";
        assert_eq!(best.chain, format!("chain inet strict more of nft {rule}"));
        assert_eq!(of("accept"), Barrier::unknown(9999));
    }
}
