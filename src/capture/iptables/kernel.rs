//! Reads iptables' rules from nf_tables, if the iptables programs write there. `iptables-save` shows a table as empty if
//! the `nft` program added one statement that iptables does not know. In nf_tables nothing is hidden, no program is
//! started, and other programs' sets are not read.

use std::{
    collections::HashMap,
    fmt::Write,
    os::fd::{BorrowedFd, OwnedFd},
};

use rustix::io::Errno;

use super::super::{
    layout::{self, Home},
    netlink::{self, Generation, IptablesTable, NetlinkError, SharedRule, Socket, Table},
    rules::{self, Shape},
};

/// A chain that every table has, and our chain to which it jumps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) name: &'static str,
    pub(super) chain: &'static str,
}

/// Reads and deletes rules, by the kernel's handles.
#[derive(Debug)]
pub(super) struct NumberedRules {
    socket: Socket,
    seen: Generation,
    /// The rules that we wrote, as `iptables-save` shows them, by family (whether it is IPv6) and handle.
    written: HashMap<(bool, u64), String>,
}

/// The table that counts and refuses. It is created only if the kernel can make it belong to this process: otherwise it
/// would be left behind.
const COUNTS: Table<'_> = Table { name: rules::COUNTS, owned: true };

/// How often a listing is repeated if other programs change something meanwhile.
const TRIES: usize = 5;

impl NumberedRules {
    pub(super) fn open() -> Result<Self, NetlinkError> {
        let mut socket = Socket::open()?;
        let seen = socket.generation()?;
        Ok(Self { socket, seen, written: HashMap::new() })
    }

    /// The descriptor to hand over to the next process, so that the kernel keeps the table of counts.
    pub(super) fn owner(&self) -> BorrowedFd<'_> {
        self.socket.descriptor()
    }

    /// Continues with the socket of the previous process. Returns whether that has a table of counts.
    pub(super) fn adopt(&mut self, owner: OwnedFd) -> Result<bool, NetlinkError> {
        self.socket.adopt(owner);
        self.seen = self.socket.generation()?;
        let tables = netlink::tables(&mut self.socket)?;
        Ok(tables.iter().any(|table| table.name == COUNTS.name))
    }

    /// Whether any program changed nf_tables since the last call.
    pub(super) fn has_changed(&mut self) -> Result<bool, NetlinkError> {
        let now = self.socket.generation()?;
        Ok(std::mem::replace(&mut self.seen, now) != now)
    }

    /// Creates a table that counts captured connections before and after all rules of other programs, and refuses
    /// connections to our port that were not captured. The kernel removes the table when this value is dropped.
    pub(super) fn count(&mut self, shape: &Shape) -> Result<(), NetlinkError> {
        let counting = shape.counted.then(|| layout::counting(shape.port));
        let refusing = shape.refusing.then(|| layout::refusing(shape.port));
        let chains: Vec<_> = counting.into_iter().flatten().chain(refusing).collect();
        if chains.is_empty() {
            return Ok(());
        }
        self.socket.apply(&netlink::add(COUNTS, &chains)).map(drop)
    }

    /// The number of connections that arrived, and the number that passed other programs' rules.
    pub(super) fn counts(&mut self) -> Result<Option<(u64, u64)>, NetlinkError> {
        let mut count = |chain| netlink::counted(&mut self.socket, COUNTS, Home::Inet, chain);
        Ok(count(layout::ARRIVING)?.zip(count(layout::ARRIVED)?))
    }

    /// How many connections to our port were refused.
    pub(super) fn refused(&mut self) -> Result<Option<u64>, NetlinkError> {
        netlink::counted(&mut self.socket, COUNTS, Home::Inet, layout::DIRECT)
    }

    /// The `nat` table in the form of `iptables-save`. A rule that we did not write is shown only as its handle and, if it
    /// leads to one of our chains, that chain.
    pub(super) fn saved(&mut self, v6: bool, entries: &[Entry]) -> Result<String, NetlinkError> {
        let (chains, rules) = netlink::shared_table(&mut self.socket, nat(v6))?;
        Ok(text(&chains, &rules, entries, |handle| self.written.get(&(v6, handle))))
    }

    /// Notes the rules that `script` wrote, and deletes every jump to our chains except the first one of each entry. The
    /// script cannot do this: iptables finds a rule only by its text.
    pub(super) fn settle(
        &mut self,
        v6: bool,
        script: &str,
        entries: &[Entry],
    ) -> Result<(), NetlinkError> {
        let mut tries = 0..TRIES;
        loop {
            let (_, rules) = netlink::shared_table(&mut self.socket, nat(v6))?;
            let stale = self.note(v6, script, entries, &rules);
            if stale.is_empty() {
                return Ok(());
            }
            let stale = stale.iter().map(|rule| (rule.chain.as_str(), rule.handle));
            match self.socket.apply(&nat(v6).prune(stale, &[])) {
                Err(error) if error.errno() == Some(Errno::NOENT) && tries.next().is_some() => {}
                done => return done.map(drop),
            }
        }
    }

    /// Notes which rule comes from which line of the script. Returns the jumps that are duplicates, or that the script only
    /// deletes.
    fn note<'a>(
        &mut self,
        v6: bool,
        script: &str,
        entries: &[Entry],
        rules: &'a [SharedRule],
    ) -> Vec<&'a SharedRule> {
        let before = std::mem::take(&mut self.written);
        let (mine, others): (HashMap<_, _>, HashMap<_, _>) =
            before.into_iter().partition(|((of_v6, _), _)| *of_v6 == v6);
        self.written = others;
        let mut stale = Vec::new();
        for entry in entries {
            let of = |chain: &'static str| rules.iter().filter(move |rule| rule.chain == chain);
            let start = format!("-A {} ", entry.chain);
            let lines = script.lines().filter(|line| line.starts_with(&start));
            let lines = of(entry.chain).zip(lines);
            self.written.extend(lines.map(|(rule, line)| ((v6, rule.handle), line.to_owned())));
            let mut jumps = of(entry.name).filter(|rule| rule.leads_to(entry.chain));
            let start = format!("-I {} 1 ", entry.name);
            let jump = script.lines().find_map(|line| line.strip_prefix(&start));
            let deletion = format!("-D {} ", entry.name);
            if jump.is_none() && script.lines().any(|line| line.starts_with(&deletion)) {
                stale.extend(jumps);
                continue;
            }
            let Some(first) = jumps.next() else { continue };
            let jump = jump.map(|jump| format!("-A {} {jump}", entry.name));
            let jump = jump.or_else(|| mine.get(&(v6, first.handle)).cloned());
            self.written.extend(jump.map(|jump| ((v6, first.handle), jump)));
            stale.extend(jumps);
        }
        stale
    }

    /// Deletes our chains, every jump to them, and rules with this comment. Returns whether there were any.
    pub(super) fn remove(
        &mut self,
        entries: &[Entry],
        comment: &str,
    ) -> Result<bool, NetlinkError> {
        let mut found = false;
        let mut first_error = None;
        for v6 in [false, true] {
            match self.remove_from(v6, entries, comment) {
                Ok(removed) => found |= removed,
                // A kernel without this family has no rules for it.
                Err(error) if error.is_missing() => {}
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        first_error.map_or(Ok(found), Err)
    }

    /// Repeats until nothing is found: changes by other programs may hide a rule from one listing.
    fn remove_from(
        &mut self,
        v6: bool,
        entries: &[Entry],
        comment: &str,
    ) -> Result<bool, NetlinkError> {
        let mut found = false;
        let mut missed = None;
        for _ in 0..TRIES {
            let (chains, rules) = netlink::shared_table(&mut self.socket, nat(v6))?;
            let ours = entries.iter().map(|entry| entry.chain);
            let ours: Vec<_> = ours.filter(|ours| chains.iter().any(|name| name == ours)).collect();
            let is_ours = |rule: &&SharedRule| {
                !ours.contains(&rule.chain.as_str())
                    && (rule.comment.as_deref() == Some(comment)
                        || ours.iter().any(|chain| rule.leads_to(chain)))
            };
            let rules: Vec<_> = rules.iter().filter(is_ours).collect();
            if ours.is_empty() && rules.is_empty() {
                return Ok(found);
            }
            let rules = rules.iter().map(|rule| (rule.chain.as_str(), rule.handle));
            match self.socket.apply(&nat(v6).prune(rules, &ours)) {
                Ok(_) => found = true,
                // Another program has already deleted one of them.
                Err(error) if error.errno() == Some(Errno::NOENT) => missed = Some(error),
                Err(error) => return Err(error),
            }
        }
        missed.map_or(Ok(found), Err)
    }
}

impl SharedRule {
    fn leads_to(&self, chain: &str) -> bool {
        self.target.as_deref() == Some(chain)
    }
}

fn nat(v6: bool) -> IptablesTable {
    IptablesTable { v6, name: "nat" }
}

/// A table in the form of `iptables-save`. `known`: the text of a rule by its handle.
fn text<'a>(
    chains: &[String],
    rules: &[SharedRule],
    entries: &[Entry],
    known: impl Fn(u64) -> Option<&'a String>,
) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    for chain in chains.iter().filter(|name| entries.iter().any(|entry| entry.chain == *name)) {
        let _ = writeln!(out, ":{chain} - [0:0]");
    }
    for rule in rules {
        let SharedRule { chain, handle, .. } = rule;
        let target = entries.iter().find(|entry| rule.leads_to(entry.chain));
        let _ = match (known(*handle), target) {
            (Some(text), _) => writeln!(out, "{text}"),
            (None, Some(entry)) => {
                writeln!(out, "-A {chain} (handle {handle}) -j {}", entry.chain)
            }
            (None, None) => writeln!(out, "-A {chain} (handle {handle})"),
        };
    }
    out
}
