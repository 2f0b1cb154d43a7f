//! nftables: one table, `inet embassy`, which belongs to our netlink socket where the kernel can do that (Linux 5.12): nobody
//! else can change it, and the kernel removes it when we end, however we do.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use rustix::io::Errno;

use super::{
    change::Change,
    error::CaptureError,
    layout,
    netlink::{
        self, BaseChain, Generation, Listing, Messages, NetlinkError, Socket, Table, TableName,
    },
    rules::{NAME, RuleChanges, Rules, Shape},
};

/// What begins the name of a table that keeps live connections alive while they drain.
pub(super) const DRAINING: &str = "embassy_draining_";

/// The writer of our table.
#[derive(Debug)]
pub struct Nft {
    socket: Socket,
    /// Whether the table belongs to the socket.
    owned: bool,
    written: Option<Written>,
    /// The last generation that is known, ours or another's.
    seen: Generation,
    /// Somebody else changed something that was not looked at yet.
    others: bool,
}

/// What stands in the kernel.
#[derive(Debug)]
struct Written {
    shape: Shape,
    /// Right after it was written, where others can change it.
    listing: Option<Listing>,
}

impl Nft {
    /// An error where the kernel cannot do what rules of this shape need. It changes nothing. `shared`: others shall be able to
    /// change the table.
    pub(super) fn open(shape: &Shape, shared: bool) -> Result<Self, CaptureError> {
        let mut socket = Socket::open()?;
        let seen = socket.generation()?;
        let owned = !shared && lacks(&mut socket, shape, true)?.is_none();
        if !owned && let Some(what) = lacks(&mut socket, shape, false)? {
            return Err(CaptureError::Lacks(what));
        }
        Ok(Self { socket, owned, written: None, seen, others: true })
    }

    pub(super) fn is_owned(&self) -> bool {
        self.owned
    }

    fn table(&self) -> Table<'static> {
        Table { name: NAME, owned: self.owned }
    }

    fn apply(&mut self, batch: &Messages) -> Result<(), NetlinkError> {
        let generation = self.socket.apply(batch)?;
        // Ours is one; more were others'.
        self.others |= !generation.follows(self.seen);
        self.seen = generation;
        Ok(())
    }

    /// Writes everything, in place of whatever the table holds. What others have changed meanwhile; `None`: nothing.
    pub(super) async fn load(&mut self, rules: &Rules) -> Result<Option<Change>, CaptureError> {
        self.written = None;
        let old = netlink::tables(&mut self.socket)?.into_iter().find(|old| old.name == NAME);
        for batch in netlink::load(self.table(), rules, old.is_some()) {
            self.apply(&batch).map_err(|error| owned_by_another(error, old.as_ref()))?;
            // A large load takes the kernel tens of milliseconds, and this thread has other work.
            tokio::task::yield_now().await;
        }
        self.stands_as(rules)
    }

    /// Everything was written. A table that others can change is listed, and what they have changed already is said.
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
            self.written = Some(Written { shape: rules.shape, listing });
        }
        Ok(torn)
    }

    /// Whether everything was written, so that [`Self::change`] can be used.
    pub(super) fn stands(&self) -> bool {
        self.written.is_some()
    }

    /// Changes what stands. After an error nothing is known of what stands.
    pub(super) async fn change(&mut self, changes: &RuleChanges) -> Result<(), CaptureError> {
        let Some(written) = self.written.take() else { return Ok(()) };
        for batch in netlink::edit(self.table(), &layout::edits(changes, &written.shape)) {
            self.apply(&batch)?;
            tokio::task::yield_now().await;
        }
        self.written = Some(written);
        Ok(())
    }

    /// Puts our chains at another priority. What others have changed meanwhile; `None`: nothing.
    pub(super) fn move_to(&mut self, rules: &Rules) -> Result<Option<Change>, CaptureError> {
        let Some(Written { shape, .. }) = self.written.take() else { return Ok(None) };
        self.apply(&netlink::other_chains(self.table(), &shape, &rules.shape))?;
        self.stands_as(rules)
    }

    /// Whether somebody else changed something in nf_tables since this was asked last.
    pub(super) fn others_changed(&mut self) -> Result<bool, CaptureError> {
        let generation = self.socket.generation()?;
        let changed = std::mem::take(&mut self.others) || generation != self.seen;
        self.seen = generation;
        Ok(changed)
    }

    /// What others did to our table, and what is missing, for people. `None`: nothing, as always where it belongs to us.
    pub(super) fn damage(
        &mut self,
        rules: &Rules,
    ) -> Result<Option<(Change, String)>, CaptureError> {
        let Some(Written { listing: Some(before), .. }) = &self.written else { return Ok(None) };
        let now = netlink::list(&mut self.socket, Table { name: NAME, owned: false }, rules)?;
        let found = compare(before, &now);
        if found.is_some() {
            self.written = None;
        }
        Ok(found)
    }

    /// Chains that the kernel calls for IP, ours and others'.
    pub(super) fn base_chains(&mut self) -> Result<Vec<BaseChain>, CaptureError> {
        Ok(netlink::base_chains(&mut self.socket)?)
    }

    /// Captured connections on their way in, and those of them that others' rules let pass, as far as they were counted.
    pub(super) fn arrivals(&mut self) -> Result<Option<(u64, u64)>, CaptureError> {
        let mut count =
            |chain| netlink::counted(&mut self.socket, Table { name: NAME, owned: false }, chain);
        Ok(count(layout::ARRIVING)?.zip(count(layout::ARRIVED)?))
    }

    /// Captures nothing any more. What is kept until it is dropped keeps live connections translated, and leaves our table's
    /// name to the next embassy.
    pub(super) fn remove(mut self) -> Result<(bool, Draining), CaptureError> {
        let Some(Written { shape, .. }) = self.written.take() else {
            let found = netlink::tables(&mut self.socket)?.iter().any(|table| table.name == NAME);
            if found {
                self.apply(&netlink::delete(self.table()))?;
            }
            return Ok((found, Draining { nft: self, name: None }));
        };
        let name = unused_name(DRAINING);
        let draining = Table { name: &name, owned: self.owned };
        match self.apply(&netlink::replace(self.table(), draining, &layout::remains(&shape))) {
            // Somebody else took it away already.
            Err(error) if error.errno() == Some(Errno::NOENT) => {
                Ok((false, Draining { nft: self, name: None }))
            }
            Err(error) => Err(error.into()),
            Ok(()) => {
                let name = (!self.owned).then_some(name);
                Ok((true, Draining { nft: self, name }))
            }
        }
    }
}

/// A table's name that nobody has. The number of a process is no such name: every container may have its own process 1.
fn unused_name(start: &str) -> String {
    format!("{start}{:08x}", fastrand::u32(..))
}

/// Keeps translation and connection tracking on until it is dropped.
#[derive(Debug)]
pub(super) struct Draining {
    nft: Nft,
    /// Of its table, where that does not go with the socket.
    name: Option<String>,
}

impl Drop for Draining {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            // Chains without rules that translate: left behind, they do no harm.
            let _ = self.nft.socket.apply(&netlink::delete(Table { name, owned: false }));
        }
    }
}

/// What a table that was not of our making lacks in this kernel; `None`: nothing.
fn lacks(socket: &mut Socket, shape: &Shape, owned: bool) -> Result<Option<String>, CaptureError> {
    let name = unused_name("embassy_asks_");
    let question = netlink::question(Table { name: &name, owned }, shape);
    let (_, refused) = socket.attempt(&question.messages)?;
    let refused: HashSet<_> = refused.iter().map(|refusal| refusal.message).collect();
    let lacking = question.needs.into_iter().find(|(message, _)| refused.contains(message));
    Ok(lacking.map(|(_, what)| what))
}

fn owned_by_another(error: NetlinkError, old: Option<&TableName>) -> CaptureError {
    match old.and_then(|old| old.owner.map(|owner| (old.name.clone(), owner))) {
        Some((name, owner)) if error.errno() == Some(Errno::PERM) => {
            CaptureError::Owned { name, owner }
        }
        _ => error.into(),
    }
}

/// How our table differs from what was listed right after it was written.
fn compare(before: &Listing, now: &Listing) -> Option<(Change, String)> {
    let (then, rules): (HashSet<_>, HashSet<_>) =
        (before.rules.iter().collect(), now.rules.iter().collect());
    let lost: Vec<_> = before.rules.iter().filter(|rule| !rules.contains(rule)).collect();
    let found = now.rules.iter().filter(|rule| !then.contains(rule)).count() + now.added;
    match (lost.as_slice(), now.missing) {
        _ if now.rules.is_empty() => Some((Change::Vanished, "all of them".to_owned())),
        ([], 0) if found == 0 && before.rules == now.rules => None,
        ([], 0) if found == 0 => Some((Change::Displaced, "the order of rules".to_owned())),
        ([], 0) => Some((Change::Added, "nothing".to_owned())),
        ([], elements) => Some((Change::Incomplete, format!("{elements} elements of sets"))),
        ([(chain, _), more @ ..], elements) => {
            let more = more.len() + elements;
            Some((Change::Incomplete, format!("a rule of chain {chain}, and {more} more")))
        }
    }
}

/// How long one that is ending may take: its table goes a moment after everything else of it.
const ENDING: Duration = Duration::from_secs(1);

/// Takes away what an embassy has left that ended without its rules going with it: one before tables had owners, or on a
/// kernel without. Whether there was anything.
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
    for TableName { name, owner } in netlink::tables(socket)? {
        match owner {
            _ if name != NAME && !name.starts_with(DRAINING) => {}
            Some(owner) if name == NAME => return Err(CaptureError::Owned { name, owner }),
            // It goes with the embassy that drains.
            Some(_) => {}
            None => match socket.apply(&netlink::delete(Table { name: &name, owned: false })) {
                // Somebody else was quicker.
                Err(error) if error.errno() == Some(Errno::NOENT) => {}
                removed => {
                    removed?;
                    found = true;
                }
            },
        }
    }
    Ok(found)
}

/// The chains that the kernel calls, for whoever keeps no rules.
pub(super) fn base_chains() -> Result<Vec<BaseChain>, CaptureError> {
    Ok(netlink::base_chains(&mut Socket::open()?)?)
}

#[cfg(test)]
mod tests {
    use std::{
        net::{IpAddr, Ipv4Addr},
        process::{Command, Stdio},
    };

    use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

    use super::*;
    use crate::{
        capture::rules::{
            PRIORITY,
            tests::{example, with_unknown, with_untracked},
        },
        config::CaptureScope,
        model::Port,
        table::RouteKey,
    };

    /// Moves this thread into a network namespace of its own.
    fn enter_a_namespace_of_its_own() {
        let mut other = Command::new("unshare")
            .args(["--net", "cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("util-linux");
        let path = format!("/proc/{}/ns/net", other.id());
        let own = std::fs::read_link("/proc/self/ns/net").unwrap();
        while std::fs::read_link(&path).unwrap() == own {
            std::thread::yield_now();
        }
        let namespace = std::fs::File::open(path).unwrap();
        move_into_link_name_space(
            std::os::fd::AsFd::as_fd(&namespace),
            Some(LinkNameSpaceType::Network),
        )
        .expect("root");
        other.kill().unwrap();
        other.wait().unwrap();
    }

    fn nft(words: &str) -> Result<String, String> {
        let output = Command::new("nft").args(words.split(' ')).output().expect("nftables");
        match output.status.success() {
            true => Ok(String::from_utf8(output.stdout).unwrap()),
            false => Err(String::from_utf8(output.stderr).unwrap()),
        }
    }

    /// Without what versions of the program write in different ways.
    fn plain(listing: &str) -> Vec<String> {
        let mut lines: Vec<String> = Vec::new();
        let all = listing.lines().map(str::trim);
        for line in all.filter(|line| !line.is_empty() && !line.starts_with('#')) {
            match lines.last_mut() {
                // Elements go on in the next line.
                Some(last) if last.ends_with(',') => {
                    last.push(' ');
                    last.push_str(line);
                }
                _ => lines.push(line.to_owned()),
            }
        }
        for line in &mut lines {
            if let Some((_, list)) = line.split_once("elements = {") {
                let mut all: Vec<_> = list.trim_matches([' ', '}']).split(", ").collect();
                all.sort();
                *line = all.join(", ");
            }
            *line = line
                .replace("tcp flags syn / syn,ack", "tcp flags & (syn | ack) == syn")
                .replace("counter packets 0 bytes 0", "counter")
                .replace("priority filter;", "priority 0;");
        }
        // Older ones print whatever they find for the flags of a table, and newer ones who owns it.
        lines.retain(|line| !line.starts_with("flags ") || line == "flags interval");
        lines[0].truncate("table inet embassy {".len());
        lines
    }

    fn shapes() -> Vec<Rules> {
        let mut all = Vec::new();
        for redirect in [false, true] {
            for scope in [CaptureScope::Declared, CaptureScope::All] {
                let rules = example(redirect, scope);
                all.extend([with_unknown(rules.clone()), with_untracked(rules.clone()), rules]);
            }
        }
        all
    }

    /// Waits until a socket that was closed is: a program that another test is just starting may have a copy of it.
    fn closed(left: &str) {
        let end = Instant::now() + Duration::from_secs(30);
        while nft("list ruleset").unwrap().contains(left) {
            assert!(Instant::now() < end, "{}", nft("list ruleset").unwrap());
        }
    }

    fn listed() -> String {
        nft("-n list table inet embassy").unwrap()
    }

    #[tokio::test]
    async fn what_is_written_is_what_its_text_says() {
        enter_a_namespace_of_its_own();
        for rules in shapes() {
            let mut own = Nft::open(&rules.shape, false).unwrap();
            assert!(own.is_owned());
            own.load(&rules).await.unwrap();
            let told = nft("-y -s list table inet embassy").unwrap();
            assert_eq!(plain(&told), plain(&layout::text(&rules, true)));
            // It goes with its socket.
            drop(own);
            closed("table");
        }
        // The text is one that the program takes.
        let rules = with_unknown(example(true, CaptureScope::Declared));
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), layout::text(&rules, false)).unwrap();
        nft(&format!("-f {}", file.path().display())).unwrap();
        let table = Table { name: NAME, owned: false };
        let listing = netlink::list(&mut Socket::open().unwrap(), table, &rules).unwrap();
        // It marks where no range is as well, at the lowest address.
        assert_eq!((listing.missing, listing.added), (0, 2));
    }

    #[tokio::test]
    async fn a_table_of_ours_is_nobody_elses() {
        enter_a_namespace_of_its_own();
        let rules = with_unknown(example(false, CaptureScope::Declared));
        let mut own = Nft::open(&rules.shape, false).unwrap();
        own.load(&rules).await.unwrap();
        let before = listed();
        own.others_changed().unwrap();
        assert!(!own.others_changed().unwrap());
        nft("add table inet other").unwrap();
        assert!(own.others_changed().unwrap());
        nft("flush ruleset").unwrap();
        for words in [
            "delete table inet embassy",
            "flush table inet embassy",
            "flush set inet embassy declared4",
            "add chain inet embassy another",
        ] {
            let error = nft(words).unwrap_err();
            assert!(error.contains("Operation not permitted"), "{words}: {error}");
        }
        assert_eq!(listed(), before);
        assert_eq!(own.damage(&rules).unwrap(), None);
        // A second of us says whose it is.
        let mut second = Nft::open(&rules.shape, false).unwrap();
        let error = second.load(&rules).await.unwrap_err();
        assert!(matches!(error, CaptureError::Owned { .. }), "{error}");
        let error = remove_leftovers().await.unwrap_err();
        assert!(matches!(error, CaptureError::Owned { .. }), "{error}");
        drop(own);
        closed("table inet embassy");
        second.load(&rules).await.unwrap();
        assert_eq!(listed(), before);
    }

    #[tokio::test]
    async fn what_others_do_to_a_shared_table_is_found_and_put_right() {
        enter_a_namespace_of_its_own();
        let rules = with_unknown(example(true, CaptureScope::All));
        let mut shared = Nft::open(&rules.shape, true).unwrap();
        shared.load(&rules).await.unwrap();
        assert!(!shared.is_owned());
        let before = listed();
        for (words, change) in [
            ("flush ruleset", Change::Vanished),
            ("delete table inet embassy", Change::Vanished),
            ("flush chain inet embassy declared", Change::Incomplete),
            ("delete element inet embassy declared4 { 172.17.0.2 . 80 }", Change::Incomplete),
            ("flush set inet embassy networks6", Change::Incomplete),
            ("add element inet embassy known4 { 10.9.9.9 }", Change::Added),
            ("insert rule inet embassy prerouting accept", Change::Added),
        ] {
            assert_eq!(shared.damage(&rules).unwrap(), None);
            nft(words).unwrap();
            assert!(shared.others_changed().unwrap(), "{words}");
            let (found, what) = shared.damage(&rules).unwrap().unwrap();
            assert_eq!(found, change, "{words}: {what}");
            assert!(!shared.stands());
            shared.load(&rules).await.unwrap();
            assert_eq!(listed(), before);
        }
        // One that was killed leaves it, and the next takes it away.
        drop(shared);
        assert!(remove_leftovers().await.unwrap());
        assert!(!remove_leftovers().await.unwrap());
        assert_eq!(nft("list ruleset").unwrap(), "");
    }

    #[tokio::test]
    async fn changes_make_the_rules_that_loading_makes() {
        enter_a_namespace_of_its_own();
        let mut rules = with_unknown(with_untracked(example(true, CaptureScope::Declared)));
        let mut shared = Nft::open(&rules.shape, true).unwrap();
        shared.load(&rules).await.unwrap();
        for round in 0..200 {
            let mut random = fastrand::Rng::with_seed(round);
            let mut address = |v6: bool| -> IpAddr {
                let low = random.u16(0..6);
                match v6 {
                    false => Ipv4Addr::new(172, 17, 0, low as u8).into(),
                    true => format!("fd00::{low}").parse().unwrap(),
                }
            };
            let mut next = rules.clone();
            for _ in 0..3 {
                let (source, net) = (address(round % 2 == 0), address(round % 3 == 0));
                let port = Port::new(80 + round as u16 % 3).unwrap();
                let key = RouteKey::tcp(source, port);
                if !next.declared.remove(&key) {
                    next.declared.insert(key);
                }
                if !next.known.remove(&source) {
                    next.known.insert(source);
                }
                if !next.places.vips.remove(&net) {
                    next.places.vips.insert(net);
                }
                // Addresses and networks that touch one another and overlap.
                let length = if net.is_ipv6() { 126 } else { 30 } + u8::from(round % 5 == 0);
                let net = ipnet::IpNet::new(net, length).unwrap().trunc();
                for nets in [&mut next.places.networks, &mut next.places.untracked] {
                    if !nets.remove(&net) {
                        nets.insert(net);
                    }
                }
            }
            let changes = RuleChanges {
                declared_added: next.declared.difference(&rules.declared).copied().collect(),
                declared_removed: rules.declared.difference(&next.declared).copied().collect(),
                known_added: next.known.difference(&rules.known).copied().collect(),
                known_removed: rules.known.difference(&next.known).copied().collect(),
                places: None,
            }
            .with_places(&rules.places, &next.places);
            shared.change(&changes).await.unwrap_or_else(|error| panic!("{round}: {error}"));
            assert_eq!(shared.damage(&next).unwrap(), None, "round {round}");
            rules = next;
        }
        let changed = plain(&listed());
        shared.load(&rules).await.unwrap();
        assert_eq!(plain(&listed()), changed);
        // What cannot be changed says so, and is loaded again.
        nft("flush set inet embassy declared4").unwrap();
        let gone = RuleChanges {
            declared_removed: rules.declared.iter().copied().collect(),
            ..RuleChanges::default()
        };
        assert!(!gone.declared_removed.is_empty());
        assert!(shared.change(&gone).await.is_err());
        assert!(!shared.stands());
    }

    #[tokio::test]
    async fn chains_move_and_make_place() {
        enter_a_namespace_of_its_own();
        for shared in [false, true] {
            let mut rules = with_unknown(example(true, CaptureScope::All));
            let mut nft_of = Nft::open(&rules.shape, shared).unwrap();
            nft_of.load(&rules).await.unwrap();
            let ours = |nft: &mut Nft| {
                let chains = nft.base_chains().unwrap().into_iter();
                let mut nat: Vec<_> = chains
                    .filter(|chain| chain.kind == "nat")
                    .map(|chain| (chain.name, chain.priority))
                    .collect();
                nat.sort();
                nat
            };
            let both = |priority| {
                let names = ["inet embassy output", "inet embassy prerouting"];
                names.map(|name| (name.to_owned(), priority)).to_vec()
            };
            assert_eq!(ours(&mut nft_of), both(PRIORITY));
            rules.shape.priority = -150;
            nft_of.move_to(&rules).unwrap();
            assert_eq!(ours(&mut nft_of), both(-150));
            assert_eq!(nft_of.damage(&rules).unwrap(), None);
            assert_eq!(nft_of.arrivals().unwrap(), Some((0, 0)));
            let moved = plain(&listed());
            nft_of.load(&rules).await.unwrap();
            assert_eq!(plain(&listed()), moved);

            // While live connections drain, translation stays on, and the name is the next one's.
            let (found, draining) = nft_of.remove().unwrap();
            assert!(found);
            let left = nft("list ruleset").unwrap();
            assert!(left.contains("type nat hook prerouting") && left.contains("ct status dnat"));
            assert!(!left.contains("redirect") && !left.contains("inet embassy {"), "{left}");
            let mut next = Nft::open(&rules.shape, shared).unwrap();
            next.load(&rules).await.unwrap();
            drop(draining);
            assert_eq!(plain(&listed()), moved);
            // What is not there any more cannot be removed, and that is no failure.
            if shared {
                nft("flush ruleset").unwrap();
                assert!(!next.remove().unwrap().0);
                continue;
            }
            let (_, draining) = next.remove().unwrap();
            drop(draining);
            closed("table");
        }
    }

    #[tokio::test]
    async fn a_kernel_that_lacks_something_is_asked_and_nothing_stands() {
        enter_a_namespace_of_its_own();
        let mut socket = Socket::open().unwrap();
        for rules in shapes() {
            assert_eq!(lacks(&mut socket, &rules.shape, true).unwrap(), None);
        }
        // No kernel lets a chain translate before connection tracking.
        let mut shape = example(false, CaptureScope::Declared).shape;
        shape.priority = -300;
        let lacking = lacks(&mut socket, &shape, true).unwrap();
        assert_eq!(lacking.as_deref(), Some("the chain prerouting"));
        assert_eq!(nft("list ruleset").unwrap(), "");
    }

    /// `cargo test --release -p embassy --lib figures_of_nf_tables -- --ignored --nocapture`
    #[tokio::test]
    #[ignore = "it measures"]
    async fn figures_of_nf_tables() {
        enter_a_namespace_of_its_own();
        let mut rules = with_unknown(example(false, CaptureScope::Declared));
        for consumer in 0..10_000u32 {
            let source = Ipv4Addr::from_bits(0x0a00_0000 + consumer).into();
            let keys = (1..=10).map(|port| RouteKey::tcp(source, Port::new(port).unwrap()));
            rules.declared.extend(keys);
            rules.known.insert(source);
        }
        let time = |what: &str, start: Instant, times: u32| {
            eprintln!("{what}: {:.1} us", start.elapsed().as_secs_f64() * 1e6 / f64::from(times));
        };
        for shared in [false, true] {
            eprintln!("\n{}", if shared { "a table of everybody's" } else { "a table of ours" });
            let start = Instant::now();
            let mut nft_of = Nft::open(&rules.shape, shared).unwrap();
            time("what the kernel can do", start, 1);
            let start = Instant::now();
            nft_of.load(&rules).await.unwrap();
            time(&format!("{} routes and 10,000 addresses", rules.declared.len()), start, 1);
            let one = RouteKey::tcp(Ipv4Addr::new(172, 17, 9, 9).into(), Port::new(80).unwrap());
            let add = RuleChanges { declared_added: vec![one], ..RuleChanges::default() };
            let remove = RuleChanges { declared_removed: vec![one], ..RuleChanges::default() };
            const TIMES: u32 = 1000;
            let start = Instant::now();
            for _ in 0..TIMES {
                nft_of.change(&add).await.unwrap();
                nft_of.change(&remove).await.unwrap();
            }
            time("one route more or less", start, 2 * TIMES);
            let start = Instant::now();
            for _ in 0..TIMES {
                nft_of.others_changed().unwrap();
            }
            time("whether others changed anything", start, TIMES);
            let start = Instant::now();
            assert_eq!(nft_of.damage(&rules).unwrap(), None);
            time("what others did, after a change of theirs", start, 1);
            let start = Instant::now();
            let (_, draining) = nft_of.remove().unwrap();
            time("nothing captured any more", start, 1);
            drop(draining);
        }
    }
}
