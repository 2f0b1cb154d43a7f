//! nftables: the table `inet embassy`, and `bridge embassy` for the guard. They belong to our netlink socket if the kernel
//! supports that (Linux 5.12): no other program can change them, and the kernel removes them when this process ends, for
//! whatever reason.

use std::{
    collections::HashSet,
    net::IpAddr,
    os::fd::{BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use rustix::io::Errno;

use super::{
    change::Change,
    error::CaptureError,
    layout::{self, Family, Home, Set, SetUse},
    lock::Lock,
    netlink::{
        self, BaseChain, Generation, Listing, Messages, NetlinkError, Socket, Table, TableName,
    },
    rules::{DRAINING, NAME, Optional, RuleChanges, RulePart, Rules, Shape},
};

/// The writer of our tables.
#[derive(Debug)]
pub struct Nft {
    socket: Socket,
    /// Whether the tables belong to the socket.
    owned: bool,
    lacks: Vec<(RulePart, String)>,
    written: Option<RulesInKernel>,
    /// The last known generation, whether we or another program caused it.
    seen: Generation,
    /// Another program changed something, which was not checked yet.
    others: bool,
}

/// A bridge port from which the guard dropped frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Offender {
    /// The number of the interface.
    pub(super) port: u32,
    /// The address that was used, which belongs to another container. `None`: a frame that no container sends.
    pub(super) address: Option<IpAddr>,
}

impl Offender {
    /// From a key of the kernel's notes.
    fn of(key: &[u8]) -> Option<Self> {
        let (port, address) = key.split_first_chunk()?;
        let address = match address.len() {
            0 => None,
            4 => Some(<[u8; 4]>::try_from(address).ok()?.into()),
            16 => Some(<[u8; 16]>::try_from(address).ok()?.into()),
            _ => return None,
        };
        Some(Self { port: u32::from_ne_bytes(*port), address })
    }
}

/// The rules in the kernel.
#[derive(Debug)]
struct RulesInKernel {
    shape: Shape,
    /// The listing right after the rules were written, if other programs can change them.
    listing: Option<Listing>,
}

impl Nft {
    /// Opens the socket. An error if the kernel does not support what rules of this shape need, not counting their optional
    /// parts. Changes nothing. `shared`: other programs can change the tables.
    pub(super) fn open(shape: &Shape, shared: bool) -> Result<Self, CaptureError> {
        let mut socket = Socket::open()?;
        let seen = socket.generation()?;
        let refused = if shared { None } else { refused(&mut socket, shape, true)? };
        let owned = refused.is_some();
        let refused = match refused {
            Some(refused) => refused,
            None => self::refused(&mut socket, shape, false)?.unwrap_or_default(),
        };
        let lacks = lacking(shape, &refused).map_err(CaptureError::Lacks)?;
        Ok(Self { socket, owned, lacks, written: None, seen, others: true })
    }

    /// The optional parts that this kernel does not support, each with what is missing.
    pub(super) fn lacks(&self) -> &[(RulePart, String)] {
        &self.lacks
    }

    pub(super) fn is_owned(&self) -> bool {
        self.owned
    }

    /// The descriptor to hand over to the next process, so that the kernel keeps the tables.
    pub(super) fn owner(&self) -> Option<BorrowedFd<'_>> {
        self.owned.then(|| self.socket.descriptor())
    }

    /// Continues with the tables of the previous process. The rules in them are replaced in one transaction.
    pub(super) fn adopt(&mut self, owner: OwnedFd) -> Result<(), CaptureError> {
        self.socket.adopt(owner);
        self.seen = self.socket.generation()?;
        self.others = true;
        Ok(())
    }

    fn table(&self) -> Table<'static> {
        Table { name: NAME, owned: self.owned }
    }

    fn apply(&mut self, batch: &Messages) -> Result<(), NetlinkError> {
        let generation = self.socket.apply(batch)?;
        // Our batch is one generation. Any further generation comes from another program.
        self.others |= !generation.follows(self.seen);
        self.seen = generation;
        Ok(())
    }

    /// Replaces the tables' content. Returns what other programs changed meanwhile; `None`: nothing.
    pub(super) async fn load(&mut self, rules: &Rules) -> Result<Option<Change>, CaptureError> {
        self.written = None;
        let old = netlink::tables(&mut self.socket)?;
        let old: Vec<_> = old.into_iter().filter(|old| old.name == NAME).collect();
        let there: Vec<_> = old.iter().map(|old| old.home).collect();
        if !there.is_empty() {
            let replaced = netlink::load(self.table(), rules, &there);
            match replaced.iter().try_for_each(|batch| self.apply(batch)) {
                Ok(()) => return self.stands_as(rules),
                // More than the socket takes at once, without the right to a larger buffer (in a user namespace). In several batches
                // there is a moment in which nothing is captured.
                Err(error) if error.errno() == Some(Errno::MSGSIZE) => self
                    .apply(&netlink::delete(self.table(), &there))
                    .map_err(|error| owned_by_another(error, &old))?,
                Err(error) => return Err(owned_by_another(error, &old)),
            }
        }
        for batch in netlink::load(self.table(), rules, &[]) {
            self.apply(&batch)?;
            // A large batch takes the kernel tens of milliseconds, and this thread has other work.
            tokio::task::yield_now().await;
        }
        self.stands_as(rules)
    }

    /// Called after everything was written. Lists tables that other programs can change, and returns what they have already
    /// changed.
    fn stands_as(&mut self, rules: &Rules) -> Result<Option<Change>, CaptureError> {
        let table = self.table();
        let mut torn = None;
        let mut listing = None;
        if !self.owned {
            let now = netlink::list(&mut self.socket, table, rules)?;
            let chains = layout::chains(&rules.shape);
            let written: usize = chains.iter().map(|chain| chain.rules.len()).sum();
            torn = match now.rules.len() {
                0 => Some(Change::Vanished),
                found if found != written || now.missing + now.added > 0 => {
                    Some(Change::Incomplete)
                }
                _ => None,
            };
            listing = Some(now);
        }
        if torn.is_none() {
            self.written = Some(RulesInKernel { shape: rules.shape, listing });
        }
        Ok(torn)
    }

    /// Whether the rules were written completely, so that [`Self::change`] can be used.
    pub(super) fn stands(&self) -> bool {
        self.written.is_some()
    }

    /// Changes the current rules. After an error the current rules are unknown.
    pub(super) async fn change(&mut self, changes: &RuleChanges) -> Result<(), CaptureError> {
        let Some(written) = self.written.take() else { return Ok(()) };
        for batch in netlink::edit(self.table(), &layout::edits(changes, &written.shape)) {
            self.apply(&batch)?;
            tokio::task::yield_now().await;
        }
        self.written = Some(written);
        Ok(())
    }

    /// Changes the priority of our chains. Returns what other programs changed meanwhile; `None`: nothing.
    pub(super) fn move_to(&mut self, rules: &Rules) -> Result<Option<Change>, CaptureError> {
        let Some(RulesInKernel { shape, .. }) = self.written.take() else { return Ok(None) };
        self.apply(&netlink::other_chains(self.table(), &shape, &rules.shape))?;
        self.stands_as(rules)
    }

    /// Whether another program changed nf_tables since the last call.
    pub(super) fn others_changed(&mut self) -> Result<bool, CaptureError> {
        let generation = self.socket.generation()?;
        let changed = std::mem::take(&mut self.others) || generation != self.seen;
        self.seen = generation;
        Ok(changed)
    }

    /// What other programs changed in our tables, and what is missing, as text. `None`: nothing, always if the tables
    /// belong to us.
    pub(super) fn damage(
        &mut self,
        rules: &Rules,
    ) -> Result<Option<(Change, String)>, CaptureError> {
        let Some(RulesInKernel { listing: Some(before), .. }) = &self.written else {
            return Ok(None);
        };
        let now = netlink::list(&mut self.socket, Table { name: NAME, owned: false }, rules)?;
        let found = compare(before, &now);
        if found.is_some() {
            self.written = None;
        }
        Ok(found)
    }

    /// The base chains for IP, ours and other programs'.
    pub(super) fn base_chains(&mut self) -> Result<Vec<BaseChain>, CaptureError> {
        Ok(netlink::base_chains(&mut self.socket)?)
    }

    /// The numbers of captured connections that arrived, and of those that passed other programs' rules.
    pub(super) fn arrivals(&mut self) -> Result<Option<(u64, u64)>, CaptureError> {
        let mut count = |chain| self.counted(Home::Inet, chain);
        Ok(count(layout::ARRIVING)?.zip(count(layout::ARRIVED)?))
    }

    /// The number of connections to our port that were refused because nothing captured them.
    pub(super) fn refused(&mut self) -> Result<Option<u64>, CaptureError> {
        self.counted(Home::Inet, layout::DIRECT)
    }

    /// The number of frames that the guard dropped.
    pub(super) fn dropped(&mut self) -> Result<Option<u64>, CaptureError> {
        let mut sum = None;
        for chain in layout::DROPPING {
            if let Some(count) = self.counted(Home::Bridge, chain)? {
                sum = Some(sum.unwrap_or_default() + count);
            }
        }
        Ok(sum)
    }

    /// The senders of these frames, as far as the kernel noted them.
    pub(super) fn offenders(&mut self) -> Result<Vec<Offender>, CaptureError> {
        let table = Table { name: NAME, owned: false };
        let mut found = Vec::new();
        for family in Family::ALL {
            let set = Set::of(SetUse::Forgers, family);
            let keys = netlink::noted(&mut self.socket, table, set)?;
            found.extend(keys.iter().filter_map(|key| Offender::of(key)));
        }
        let set = Set::without_family(SetUse::Offenders);
        let keys = netlink::noted(&mut self.socket, table, set)?;
        found.extend(keys.iter().filter_map(|key| Offender::of(key)));
        Ok(found)
    }

    fn counted(&mut self, home: Home, chain: &str) -> Result<Option<u64>, CaptureError> {
        let table = Table { name: NAME, owned: false };
        Ok(netlink::counted(&mut self.socket, table, home, chain)?)
    }

    /// Ends the capture. The returned value keeps live connections translated until it is dropped. The name of our table is
    /// free for the next embassy.
    pub(super) fn remove(mut self) -> Result<(bool, Draining), CaptureError> {
        let Some(RulesInKernel { shape, .. }) = self.written.take() else {
            let found = self.delete_what_is_there()?;
            return Ok((found, Draining { nft: self, name: None }));
        };
        let name = unused_name(DRAINING);
        let draining = Table { name: &name, owned: self.owned };
        // Without the lock, the next embassy would remove the table as a leftover.
        let kept = (!self.owned).then(|| (Lock::of_table(&name).ok().flatten(), name.clone()));
        let remains = layout::remains(&shape);
        let homes = layout::homes(&shape);
        match self.apply(&netlink::replace(self.table(), homes, draining, &remains)) {
            // Another program has already removed one of the tables, perhaps not both.
            Err(error) if error.errno() == Some(Errno::NOENT) => {
                let found = self.delete_what_is_there()?;
                Ok((found, Draining { nft: self, name: None }))
            }
            Err(error) => Err(error.into()),
            Ok(()) => Ok((true, Draining { nft: self, name: kept })),
        }
    }
}

impl Nft {
    /// Deletes our tables. Returns whether there were any.
    fn delete_what_is_there(&mut self) -> Result<bool, CaptureError> {
        let there = netlink::tables(&mut self.socket)?.into_iter();
        let there: Vec<_> =
            there.filter(|table| table.name == NAME).map(|table| table.home).collect();
        if !there.is_empty() {
            self.apply(&netlink::delete(self.table(), &there))?;
        }
        Ok(!there.is_empty())
    }
}

/// A unique table name. A process ID would not be unique: each container may have its own process 1.
fn unused_name(start: &str) -> String {
    format!("{start}{:08x}", fastrand::u32(..))
}

/// Keeps translation and connection tracking on until it is dropped.
#[derive(Debug)]
pub(super) struct Draining {
    nft: Nft,
    /// The name of its table, if the kernel does not remove it with the socket; and the lock that shows that the table is
    /// in use.
    name: Option<(Option<Lock>, String)>,
}

impl Drop for Draining {
    fn drop(&mut self) {
        if let Some((_, name)) = &self.name {
            // If this fails, the chains that stay do no harm: they have no rules that translate.
            let table = Table { name, owned: false };
            let _ = self.nft.socket.apply(&netlink::delete(table, &[Home::Inet]));
        }
    }
}

/// What this kernel refuses of our rules, found out by a batch that applies nothing. `None`: `owned` is set, and the kernel
/// does not support tables with an owner.
fn refused(
    socket: &mut Socket,
    shape: &Shape,
    owned: bool,
) -> Result<Option<Vec<String>>, CaptureError> {
    let name = unused_name("embassy_asks_");
    let question = netlink::question(Table { name: &name, owned }, shape);
    let (_, refused) = socket.attempt(&question.messages)?;
    let refused: HashSet<_> = refused.iter().map(|refusal| refusal.message).collect();
    // The first message creates the table of IP.
    let first = question.needs.first().map(|(message, _)| *message);
    if owned && first.is_some_and(|table| refused.contains(&table)) {
        return Ok(None);
    }
    let is_refused = |(message, _): &(u32, String)| refused.contains(message);
    let all = question.needs.into_iter().filter(is_refused).map(|(_, what)| what);
    Ok(Some(all.collect()))
}

/// All that rules of this shape need.
fn needs(shape: &Shape) -> HashSet<String> {
    let question = netlink::question(Table { name: NAME, owned: false }, shape);
    question.needs.into_iter().map(|(_, what)| what).collect()
}

/// What this kernel lacks to refuse direct connections if iptables captures. `None`: nothing. Changes nothing.
pub(super) fn lack_of_refusal(shape: &Shape) -> Option<String> {
    let asked = Socket::open().map_err(CaptureError::from).and_then(|mut socket| {
        // Asks for a table with an owner: a table that outlives this process would refuse other programs' connections.
        refused(&mut socket, shape, true)
    });
    match asked {
        Err(error) => Some(error.to_string()),
        Ok(None) => Some("tables with an owner".to_owned()),
        Ok(Some(refused)) => {
            let rest = needs(&shape.without(Optional::default().with(RulePart::Refusal)));
            let needs = needs(shape);
            refused.into_iter().find(|what| needs.contains(what) && !rest.contains(what))
        }
    }
}

/// The smallest set of parts without which nothing in `refused` is needed. Each part comes with the first thing refused
/// because of it. An error that names what is refused if that is not enough even without all optional parts. Pure.
fn lacking(shape: &Shape, refused: &[String]) -> Result<Vec<(RulePart, String)>, String> {
    let needs = |lacks: Optional| needs(&shape.without(lacks));
    let first_of = |needs: &HashSet<String>| refused.iter().find(|what| needs.contains(*what));
    if refused.is_empty() {
        return Ok(Vec::new());
    }
    let choices = Optional::choices();
    let fewest = choices.iter().copied().find(|lacks| first_of(&needs(*lacks)).is_none());
    let Some(fewest) = fewest else {
        let least = needs(choices.last().copied().unwrap_or_default());
        return Err(first_of(&least).cloned().unwrap_or_default());
    };
    // What is refused because of a part: what the part needs and the rest does not.
    let because = |part| {
        let others = fewest.parts().filter(|other| *other != part);
        let with_it = needs(others.fold(Optional::default(), Optional::with));
        first_of(&with_it).cloned().unwrap_or_default()
    };
    Ok(fewest.parts().map(|part| (part, because(part))).collect())
}

fn owned_by_another(error: NetlinkError, old: &[TableName]) -> CaptureError {
    let mut old = old.iter();
    match old.find_map(|old| old.owner.map(|owner| (old.name.clone(), owner))) {
        Some((name, owner)) if error.errno() == Some(Errno::PERM) => {
            CaptureError::Owned { name, owner }
        }
        _ => error.into(),
    }
}

/// How our tables differ from their listing right after they were written.
fn compare(before: &Listing, now: &Listing) -> Option<(Change, String)> {
    let (then, rules): (HashSet<_>, HashSet<_>) =
        (before.rules.iter().collect(), now.rules.iter().collect());
    let lost: Vec<_> = before.rules.iter().filter(|rule| !rules.contains(rule)).collect();
    let found = now.rules.iter().filter(|rule| !then.contains(rule)).count() + now.added;
    match (lost.as_slice(), now.missing) {
        _ if now.rules.iter().all(|(home, ..)| *home != Home::Inet) => {
            Some((Change::Vanished, "all of them".to_owned()))
        }
        ([], 0) if found == 0 && before.rules == now.rules => None,
        ([], 0) if found == 0 => Some((Change::Displaced, "the order of rules".to_owned())),
        ([], 0) => Some((Change::Added, "nothing".to_owned())),
        ([], elements) => Some((Change::Incomplete, format!("{elements} elements of sets"))),
        ([(_, chain, _), more @ ..], elements) => {
            let more = more.len() + elements;
            Some((Change::Incomplete, format!("a rule of chain {chain}, and {more} more")))
        }
    }
}

/// How long to wait for an ending embassy: the kernel removes its table a moment after the process's other resources.
const ENDING: Duration = Duration::from_secs(1);

/// Removes the tables that an earlier embassy has left: one from before tables had owners, or on a kernel without owners.
/// Returns whether there were any.
pub(super) async fn remove_leftovers() -> Result<bool, CaptureError> {
    let mut socket = Socket::open()?;
    let start = Instant::now();
    loop {
        match remove_tables(&mut socket) {
            Err(CaptureError::Owned { .. }) if start.elapsed() < ENDING => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            removed => return removed,
        }
    }
}

fn remove_tables(socket: &mut Socket) -> Result<bool, CaptureError> {
    let mut found = false;
    for TableName { home, name, owner } in netlink::tables(socket)? {
        match owner {
            _ if name != NAME && !name.starts_with(DRAINING) => {}
            Some(owner) if name == NAME => return Err(CaptureError::Owned { name, owner }),
            // The kernel removes it when the embassy that drains ends.
            Some(_) => {}
            None if name != NAME && matches!(Lock::of_table(&name), Ok(None)) => {}
            None => {
                match socket.apply(&netlink::delete(Table { name: &name, owned: false }, &[home])) {
                    // Another program has already removed it.
                    Err(error) if error.errno() == Some(Errno::NOENT) => {}
                    removed => {
                        removed?;
                        found = true;
                    }
                }
            }
        }
    }
    Ok(found)
}

/// The base chains, for a caller that has no rules.
pub(super) fn base_chains() -> Result<Vec<BaseChain>, CaptureError> {
    Ok(netlink::base_chains(&mut Socket::open()?)?)
}

#[cfg(test)]
pub(super) mod tests;
