//! The iptables backend. It has a chain in the `nat` table for each hook, with one jump to it, and replaces it in one
//! transaction per family. The iptables programs write the rules. If they write to nf_tables, the rules are read from there
//! (`kernel`).

use std::{
    fmt::{self, Write},
    net::IpAddr,
    os::fd::{BorrowedFd, OwnedFd},
};

use ipnet::IpNet;

use super::{
    CaptureError, Script,
    change::Change,
    netlink::BaseChain,
    nft,
    place::{self, RulesPlace},
    program::{Program, ProgramError},
    rules::{Declared, Hook, MARK, RulePart, Rules, Shape},
};
use crate::{
    config::{CaptureScope, Guard},
    wiring::Arrival,
};

mod kernel;

use kernel::{Entry, NumberedRules};

/// The hook for arriving packets.
const PREROUTING: Entry = Entry { name: "PREROUTING", chain: super::rules::CHAINS[0] };
/// The hook for the host's own connections.
const OUTPUT: Entry = Entry { name: "OUTPUT", chain: super::rules::CHAINS[1] };

const ENTRIES: [Entry; 2] = [PREROUTING, OUTPUT];

/// The comment with which the original program's start script marked its rules.
const ANCESTOR: &str = "embassy_redirection";

/// Adds to the existing rules, in one transaction.
const RESTORE: [&str; 2] = ["--wait=5", "--noflush"];

/// The programs of one address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FamilyPrograms {
    v6: bool,
    save: Program,
    restore: Program,
}

const FAMILIES: [FamilyPrograms; 2] = [
    FamilyPrograms {
        v6: false,
        save: Program("iptables-save"),
        restore: Program("iptables-restore"),
    },
    FamilyPrograms {
        v6: true,
        save: Program("ip6tables-save"),
        restore: Program("ip6tables-restore"),
    },
];

/// The writer of our chains.
#[derive(Debug)]
pub struct Iptables {
    /// Reads the rules, if the programs write to nf_tables. Rules of the older `legacy` programs are shown only by these
    /// programs.
    kernel: Option<NumberedRules>,
    /// nf_tables, if the kernel has it and the programs do not write there: used only to count and to refuse connections.
    beside: Option<NumberedRules>,
    /// Our rules as listed right after they were written.
    listed: Option<String>,
    /// The port for which connections are counted and refused.
    counted: Option<u16>,
    lacks: Vec<(RulePart, String)>,
}

impl Iptables {
    /// An error if the programs do not work.
    pub(super) async fn open(shape: &Shape) -> Result<Self, CaptureError> {
        let [v4, _] = FAMILIES;
        let (kernel, beside) = match is_nf_tables(v4.save.run(&["--version"], "").await?) {
            true => {
                v4.restore.run(&["--version"], "").await?;
                (Some(NumberedRules::open()?), None)
            }
            false => {
                v4.nat().await?;
                (None, NumberedRules::open().ok())
            }
        };
        let guards = shape.guard != Guard::Off;
        let guard =
            guards.then(|| (RulePart::Guard, "iptables has no rules for bridges".to_owned()));
        let refusal = nft::lack_of_refusal(shape).filter(|_| shape.refusing);
        let refusal = refusal.map(|reason| (RulePart::Refusal, reason));
        let lacks = guard.into_iter().chain(refusal).collect();
        Ok(Self { kernel, beside, listed: None, counted: None, lacks })
    }

    /// The optional parts that it cannot do, each with what is missing.
    pub(super) fn lacks(&self) -> &[(RulePart, String)] {
        &self.lacks
    }

    /// The nf_tables connection that counts and refuses, if there is one.
    fn counting(&mut self) -> Option<&mut NumberedRules> {
        self.kernel.as_mut().or(self.beside.as_mut())
    }

    /// The descriptor to hand over to the next process.
    pub(super) fn owner(&self) -> Option<BorrowedFd<'_>> {
        self.kernel.as_ref().or(self.beside.as_ref()).map(NumberedRules::owner)
    }

    /// Continues with the counts of the previous process, which had the same port.
    pub(super) fn adopt(&mut self, owner: OwnedFd, port: u16) -> Result<(), CaptureError> {
        if let Some(kernel) = self.counting()
            && kernel.adopt(owner)?
        {
            self.counted = Some(port);
        }
        Ok(())
    }

    pub(super) fn stands(&self) -> bool {
        self.listed.is_some()
    }

    /// Replaces the chains' rules with `rules`, and puts the jumps before all other rules. Returns what other programs
    /// changed meanwhile; `None`: nothing.
    pub(super) async fn load(&mut self, rules: &Rules) -> Result<Option<Change>, CaptureError> {
        self.listed = None;
        let written = self.apply(rules).await?;
        let port = rules.shape.port;
        let is_counted = self.counted == Some(port);
        if let Some(kernel) = self.counting().filter(|_| !is_counted) {
            // Without the counts, rules of other programs that drop connections are found only by reading them.
            match kernel.count(&rules.shape) {
                Ok(()) => self.counted = Some(port),
                Err(error) => {
                    tracing::debug!(%error, "cannot count the captured connections that arrive")
                }
            }
        }
        if let Some(kernel) = &mut self.kernel {
            kernel.has_changed()?;
        }
        let listed = self.installed().await?;
        let torn = torn(listed.as_deref(), written);
        if torn.is_none() {
            self.listed = Some(listed.unwrap_or_default());
        }
        Ok(torn)
    }

    /// Whether another program may have changed something since the last call.
    pub(super) fn others_changed(&mut self) -> Result<bool, CaptureError> {
        match &mut self.kernel {
            Some(kernel) => Ok(kernel.has_changed()?),
            None => Ok(true),
        }
    }

    /// The numbers of captured connections that arrived, and of those that passed other programs' rules.
    pub(super) fn arrivals(&mut self) -> Result<Option<(u64, u64)>, CaptureError> {
        let is_counted = self.counted.is_some();
        match self.counting().filter(|_| is_counted) {
            Some(kernel) => Ok(kernel.counts()?),
            None => Ok(None),
        }
    }

    /// The number of connections to our port that were refused because nothing captured them.
    pub(super) fn refused(&mut self) -> Result<Option<u64>, CaptureError> {
        let is_counted = self.counted.is_some();
        match self.counting().filter(|_| is_counted) {
            Some(kernel) => Ok(kernel.refused()?),
            None => Ok(None),
        }
    }

    /// What other programs changed in our rules, and what is missing, as text. `None`: nothing.
    pub(super) async fn damage(&mut self) -> Result<Option<(Change, String)>, CaptureError> {
        let Some(before) = self.listed.take() else { return Ok(None) };
        let now = self.installed().await;
        // If the rules cannot be read, nothing is known about them.
        if now.as_ref().is_ok_and(|now| now.as_deref().unwrap_or_default() != before) {
            return Ok(Some(Change::of(&before, now?.as_deref())));
        }
        self.listed = Some(before);
        now.map(|_| None)
    }

    /// Replaces the chains' rules with `rules`. Returns how many lines [`Self::installed`] has for them.
    async fn apply(&mut self, rules: &Rules) -> Result<usize, CaptureError> {
        let mut written = 0;
        for family in FAMILIES.into_iter().filter(|family| !family.v6 || rules.shape.v6) {
            let lines = match self.saved(family).await {
                Ok(lines) => lines,
                // A host without IPv6 has no NAT for it either.
                Err(_) if family.v6 && !uses_v6(rules) => continue,
                Err(error) => return Err(error),
            };
            // Writing would create the chains that every table has, even without rules.
            if family.v6 && !uses_v6(rules) && ours(&lines).is_empty() {
                continue;
            }
            let script = script(rules, family.v6, &lines);
            match &mut self.kernel {
                Some(kernel) => {
                    family.write(&without_deletions(&script)).await?;
                    kernel.settle(family.v6, &script, &ENTRIES)?;
                }
                None => family.write(&script).await?,
            }
            let jumps = if rules.shape.redirect { 2 } else { 1 };
            written += script.lines().filter(|line| line.starts_with("-A ")).count() + jumps;
        }
        Ok(written)
    }

    /// Our rules as the kernel has them, and the position of each jump. `None` if there are none.
    async fn installed(&mut self) -> Result<Option<String>, CaptureError> {
        let mut all = String::new();
        for family in FAMILIES {
            match self.saved(family).await {
                Ok(lines) => all.push_str(&ours(&lines)),
                Err(error) if family.v6 => tracing::debug!(%error, "iptables has no NAT for IPv6"),
                Err(error) => return Err(error),
            }
        }
        Ok((!all.is_empty()).then_some(all))
    }

    /// A family's `nat` table in the form of `iptables-save`.
    async fn saved(&mut self, family: FamilyPrograms) -> Result<String, CaptureError> {
        match &mut self.kernel {
            Some(kernel) => Ok(kernel.saved(family.v6, &ENTRIES)?),
            None => Ok(family.nat().await?),
        }
    }
}

/// Whether the programs write to nf_tables.
fn is_nf_tables(version: String) -> bool {
    version.contains("nf_tables")
}

/// Removes the deletions from a script. [`NumberedRules::settle`] deletes by handle instead.
fn without_deletions(script: &str) -> String {
    script.split_inclusive('\n').filter(|line| !line.starts_with("-D ")).collect()
}

/// What other programs changed since `written` lines were written, by the current listing. `None`: nothing.
fn torn(listed: Option<&str>, written: usize) -> Option<Change> {
    let lines = || listed.unwrap_or_default().lines();
    // Each jump was written at the first position.
    let is_first = |line: &str| line.starts_with("-A ") || line.starts_with("0 ");
    match lines().count() {
        0 if written > 0 => Some(Change::Vanished),
        count if count != written => Some(Change::Incomplete),
        _ if !lines().all(is_first) => Some(Change::Displaced),
        _ => None,
    }
}

/// The position of our rules at `hook`. nft chains may come before iptables. Only reads.
pub(super) async fn place(chains: &[BaseChain], hook: Hook) -> Result<RulesPlace, CaptureError> {
    let entry = match hook {
        Hook::Prerouting => PREROUTING,
        Hook::Output => OUTPUT,
        Hook::Input => return Ok(RulesPlace::Absent),
    };
    let earlier = place::before_iptables(chains, hook);
    let [v4, _] = FAMILIES;
    if !is_nf_tables(v4.save.run(&["--version"], "").await?) {
        return Ok(place_in(&v4.nat().await?, entry, earlier));
    }
    let place = place_in(&NumberedRules::open()?.saved(false, &ENTRIES)?, entry, earlier.clone());
    // The program shows the first rule in a form that people know, if it can show the table.
    match v4.nat().await.map(|saved| place_in(&saved, entry, earlier)) {
        Ok(RulesPlace::Behind(what)) if matches!(place, RulesPlace::Behind(_)) => {
            Ok(RulesPlace::Behind(what))
        }
        _ => Ok(place),
    }
}

/// The position in the text of `iptables-save`. `earlier` is a chain that comes before iptables.
fn place_in(saved: &str, entry: Entry, earlier: Option<String>) -> RulesPlace {
    let Some(first) = rules_of(saved, entry).next() else { return RulesPlace::Absent };
    if !rules_of(saved, entry).any(is_jump) {
        return RulesPlace::Absent;
    }
    match earlier {
        Some(earlier) => RulesPlace::Behind(earlier),
        None if is_jump(first) => RulesPlace::First,
        None => {
            let rule = first.strip_prefix(&format!("-A {} ", entry.name)).unwrap_or(first);
            RulesPlace::Behind(format!("rule {rule:?}"))
        }
    }
}

/// What [`Iptables::load`] would do on a host without rules of embassy.
pub(super) fn plan(rules: &Rules) -> Vec<Script> {
    let mut scripts = Vec::new();
    for family in FAMILIES.into_iter().filter(|family| !family.v6 || uses_v6(rules)) {
        scripts.push(Script {
            command: format!("{} {}", family.restore.0, RESTORE.join(" ")),
            text: script(rules, family.v6, ""),
        });
    }
    scripts
}

/// Removes our chain and its jumps, and the rules of the original program. Returns whether there was anything.
pub(super) async fn remove() -> Result<bool, CaptureError> {
    let in_kernel = NumberedRules::open().and_then(|mut kernel| kernel.remove(&ENTRIES, ANCESTOR));
    let (mut found, mut first_error) = match in_kernel {
        Ok(found) => (found, None),
        Err(error) if error.is_missing() => (false, None),
        Err(error) => (false, Some(CaptureError::from(error))),
    };
    // The rules of the older programs are not in nf_tables.
    let [v4, _] = FAMILIES;
    let is_legacy = match v4.save.run(&["--version"], "").await {
        Ok(version) => !is_nf_tables(version),
        Err(error) => {
            // Without the program there are no rules that only the program shows.
            first_error = first_error.or((!found).then_some(error.into()));
            false
        }
    };
    for family in FAMILIES.into_iter().filter(|_| is_legacy) {
        let removed = match family.nat().await {
            Ok(lines) => match removal(&lines) {
                Some(script) => family.write(&script).await.map(|()| true),
                None => Ok(false),
            },
            Err(_) if family.v6 => Ok(false),
            Err(error) => Err(error),
        };
        match removed {
            Ok(removed) => found |= removed,
            Err(error) => first_error = first_error.or(Some(error.into())),
        }
    }
    first_error.map_or(Ok(found), Err)
}

impl FamilyPrograms {
    async fn nat(self) -> Result<String, ProgramError> {
        self.save.saved("nat").await
    }

    async fn write(self, script: &str) -> Result<(), ProgramError> {
        self.restore.run(&RESTORE, script).await.map(drop)
    }
}

fn uses_v6(rules: &Rules) -> bool {
    let Rules { shape, places, declared, .. } = rules;
    shape.v6
        && places.vips.union(&places.own).any(IpAddr::is_ipv6)
        && (shape.scope == CaptureScope::All
            || declared.iter().any(|one| one.key.source.is_ipv6())
            // Even the first container with an IPv6 address may connect before it is known.
            || shape.unknown && strangers(rules).any(|(_, network)| network.addr().is_ipv6()))
}

/// One transaction: the chains with all their rules, and the jumps if they are not first already. `now` is the text of
/// `iptables-save`.
fn script(rules: &Rules, v6: bool, now: &str) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = render(rules, v6, now, &mut out);
    out
}

fn render(rules: &Rules, v6: bool, now: &str, out: &mut String) -> fmt::Result {
    writeln!(out, "*nat")?;
    let chain = PREROUTING.chain;
    start(out, PREROUTING)?;
    declared(out, rules, v6, PREROUTING)?;
    let to = format!("-j REDIRECT --to-ports {}", rules.shape.port);
    let of_family = |address: &&IpAddr| address.is_ipv6() == v6;
    if rules.shape.scope == CaptureScope::All {
        for vip in rules.places.vips.iter().filter(of_family) {
            for bridge in &rules.places.bridges {
                writeln!(out, "-A {chain} -d {vip} -i {bridge} -p tcp {to}")?;
            }
        }
        for vip in rules.places.everywhere.iter().filter(of_family) {
            writeln!(out, "-A {chain} -d {vip} -p tcp {to}")?;
        }
    }
    if rules.shape.unknown {
        for known in rules.known.iter().filter(of_family) {
            writeln!(out, "-A {chain} -s {known} -j RETURN")?;
        }
        for (by, network) in strangers(rules).filter(|(_, net)| net.addr().is_ipv6() == v6) {
            for vip in rules.places.vips.iter().filter(of_family) {
                let stranger = format!("-A {chain} -s {network} -d {vip} {by}-p tcp");
                // Services of this host stay reachable for unknown containers, which may turn out to be no consumers.
                writeln!(out, "{stranger} -m socket --nowildcard -j RETURN")?;
                writeln!(out, "{stranger} {to}")?;
            }
        }
    }
    jump(out, now, PREROUTING, "")?;
    if rules.shape.redirect {
        start(out, OUTPUT)?;
        for server in rules.places.spared.iter().filter(|server| server.is_ipv6() == v6) {
            writeln!(
                out,
                "-A {} -d {} -p tcp -m tcp --dport {} -j RETURN",
                OUTPUT.chain,
                server.ip(),
                server.port()
            )?;
        }
        declared(out, rules, v6, OUTPUT)?;
        jump(out, now, OUTPUT, &format!("-m mark ! --mark {MARK:#x} "))?;
    } else if rules_of(now, OUTPUT).any(is_jump) {
        // The jump was written by a process with --redirect, from which this process took over.
        start(out, OUTPUT)?;
        rules_of(now, OUTPUT)
            .filter(|line| is_jump(line))
            .try_for_each(|line| delete(out, line))?;
    }
    writeln!(out, "COMMIT")
}

/// The networks of unknown containers, each with the match for its interface.
fn strangers(rules: &Rules) -> impl Iterator<Item = (String, IpNet)> {
    let segments = rules.places.segments.iter();
    let segments = segments.map(|(interface, network)| (format!("-i {interface} "), *network));
    let loose = rules.places.networks.iter().map(|network| (String::new(), *network));
    segments.chain(loose)
}

/// Creates the chain, or empties it: declaring a user-defined chain does both (man 8 iptables-restore, --noflush).
fn start(out: &mut String, entry: Entry) -> fmt::Result {
    writeln!(out, ":{} - [0:0]", entry.chain)
}

fn declared(out: &mut String, rules: &Rules, v6: bool, entry: Entry) -> fmt::Result {
    // Own addresses and the interface matter only for arriving packets.
    let arrives = entry == PREROUTING;
    let own = arrives.then_some(&rules.places.own).into_iter().flatten();
    for destination in rules.places.vips.iter().chain(own).filter(|address| address.is_ipv6() == v6)
    {
        for Declared { key, arrival } in
            rules.declared.iter().filter(|one| one.key.source.is_ipv6() == v6)
        {
            let by = match arrival {
                Arrival::By(interface) if arrives => format!("-i {interface} "),
                Arrival::Outside if arrives && !rules.places.outer.contains(destination) => {
                    continue;
                }
                _ => String::new(),
            };
            writeln!(
                out,
                "-A {} -s {} -d {destination} {by}-p tcp -m tcp --dport {} -j REDIRECT --to-ports {}",
                entry.chain, key.source, key.port, rules.shape.port
            )?;
        }
    }
    Ok(())
}

/// Makes the jump to our chain the only one, before all other rules.
fn jump(out: &mut String, now: &str, entry: Entry, matched: &str) -> fmt::Result {
    let present: Vec<_> = rules_of(now, entry).filter(|line| is_jump(line)).collect();
    let wanted = format!("{matched}-j {}", entry.chain);
    if let [only] = present[..]
        && rules_of(now, entry).next() == Some(only)
        && only.strip_prefix(&format!("-A {} ", entry.name)) == Some(wanted.as_str())
    {
        return Ok(());
    }
    present.iter().try_for_each(|line| delete(out, line))?;
    writeln!(out, "-I {} 1 {wanted}", entry.name)
}

/// One transaction that removes all our rules. `None` if there are none.
fn removal(now: &str) -> Option<String> {
    let mut out = String::from("*nat\n");
    for line in rules_in(now).filter(|line| is_jump(line) || is_ancestors(line)) {
        let _ = delete(&mut out, line);
    }
    for Entry { chain, .. } in ENTRIES {
        if now.lines().any(|line| line.starts_with(&format!(":{chain} "))) {
            let _ = writeln!(out, "-F {chain}\n-X {chain}");
        }
    }
    if out.lines().count() == 1 {
        return None;
    }
    out.push_str("COMMIT\n");
    Some(out)
}

/// Our rules in the text of `iptables-save`, with the position of each jump.
fn ours(now: &str) -> String {
    let mut out = String::new();
    for entry in ENTRIES {
        let chain = format!("-A {} ", entry.chain);
        for line in rules_in(now).filter(|line| line.starts_with(&chain)) {
            let _ = writeln!(out, "{line}");
        }
        for (place, line) in rules_of(now, entry).enumerate().filter(|(_, line)| is_jump(line)) {
            let _ = writeln!(out, "{place} {line}");
        }
    }
    out
}

fn rules_in(now: &str) -> impl Iterator<Item = &str> {
    now.lines().filter(|line| line.starts_with("-A "))
}

fn rules_of<'a>(now: &'a str, entry: Entry) -> impl Iterator<Item = &'a str> + use<'a> {
    let start = format!("-A {} ", entry.name);
    rules_in(now).filter(move |line| line.starts_with(&start))
}

fn is_jump(line: &str) -> bool {
    ENTRIES.iter().any(|entry| line.ends_with(&format!(" -j {}", entry.chain)))
}

fn is_ancestors(line: &str) -> bool {
    let comments = line.split(' ').skip_while(|word| *word != "--comment");
    comments
        .skip(1)
        .take(1)
        .any(|comment| comment == ANCESTOR || comment == format!("\"{ANCESTOR}\""))
}

fn delete(out: &mut String, line: &str) -> fmt::Result {
    match line.strip_prefix("-A ") {
        Some(rule) => writeln!(out, "-D {rule}"),
        None => Ok(()),
    }
}

/// Reads `input` as a listing.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(input: &[u8]) {
    let listing = String::from_utf8_lossy(input);
    let _ = ours(&listing);
    let Some(script) = removal(&listing) else { return };
    // It removes only our own rules and those of the original program.
    for line in script.lines().filter(|line| line.starts_with('-')) {
        let own = ENTRIES.iter().any(|entry| line.ends_with(&format!(" {}", entry.chain)));
        assert!(own || line.contains(ANCESTOR), "{line}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::rules::tests::{example, with_unknown};

    const DOCKERS: &str = "*nat\n:PREROUTING ACCEPT [0:0]\n:DOCKER - [0:0]\n\
        -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\nCOMMIT\n";

    #[test]
    fn what_others_do_while_we_write_is_noticed() {
        let rule = "-A EMBASSY -s 10.0.0.1 -j REDIRECT\n";
        let jump = |place: usize| format!("{rule}{place} -A PREROUTING -j EMBASSY\n");
        assert_eq!(torn(Some(&jump(0)), 2), None);
        assert_eq!(torn(None, 0), None, "nothing was to be written");
        assert_eq!(torn(None, 2), Some(Change::Vanished));
        assert_eq!(torn(Some(rule), 2), Some(Change::Incomplete));
        assert_eq!(torn(Some(&jump(1)), 2), Some(Change::Displaced), "another's rule comes first");
    }

    #[test]
    fn a_first_start_puts_the_chain_and_its_jump_before_dockers() {
        let expected = "\
*nat
:EMBASSY - [0:0]
-A EMBASSY -s 172.17.0.2 -d 172.17.0.1 -i docker0 -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 9999
-A EMBASSY -s 172.17.0.2 -d 172.17.0.1 -i docker0 -p tcp -m tcp --dport 6379 -j REDIRECT --to-ports 9999
-A EMBASSY -s 172.18.0.5 -d 172.17.0.1 -p tcp -m tcp --dport 6379 -j REDIRECT --to-ports 9999
-I PREROUTING 1 -j EMBASSY
COMMIT
";
        assert_eq!(script(&example(false, CaptureScope::Declared), false, DOCKERS), expected);
    }

    #[test]
    fn a_jump_that_is_first_is_left_alone_and_any_other_is_put_first() {
        let rules = example(false, CaptureScope::Declared);
        let first = "*nat\n-A PREROUTING -j EMBASSY\n-A PREROUTING -j DOCKER\nCOMMIT\n";
        assert!(!script(&rules, false, first).contains("PREROUTING"));
        let second = "*nat\n-A PREROUTING -j DOCKER\n-A PREROUTING -j EMBASSY\n-A PREROUTING -j EMBASSY\nCOMMIT\n";
        let moved = script(&rules, false, second);
        assert_eq!(moved.matches("-D PREROUTING -j EMBASSY\n").count(), 2);
        assert_eq!(moved.matches("-I PREROUTING 1 -j EMBASSY\n").count(), 1);
    }

    #[test]
    fn without_redirect_nothing_of_it_stays() {
        let rules = example(false, CaptureScope::Declared);
        let before = script(&example(true, CaptureScope::Declared), false, DOCKERS);
        let (chain, name) = (OUTPUT.chain, OUTPUT.name);
        let jump = before.lines().find_map(|line| line.strip_prefix(&format!("-I {name} 1 ")));
        let jump = jump.unwrap();
        let now = format!("*nat\n-A {chain} -j RETURN\n-A {name} {jump}\nCOMMIT\n");
        let script = script(&rules, false, &now);
        assert!(script.contains(&format!(":{chain} - [0:0]\n")), "{script}");
        assert!(script.contains(&format!("-D {name} {jump}\n")), "{script}");
        assert!(!script.contains(&format!("-A {chain}")), "{script}");
        assert!(!super::script(&rules, false, DOCKERS).contains(name));
    }

    #[test]
    fn all_means_all_that_arrives_for_a_vip() {
        let script = script(&example(true, CaptureScope::All), false, DOCKERS);
        for all in [
            "-A EMBASSY -d 172.17.0.1 -i docker0 -p tcp -j REDIRECT --to-ports 9999\n",
            "-A EMBASSY -d 172.17.0.1 -i br-x -p tcp -j REDIRECT --to-ports 9999\n",
            "-A EMBASSY -s 172.17.0.2 -d 10.1.2.3 -i docker0 -p tcp -m tcp --dport 80 -j",
            // An address on another kind of network is captured only at VIPs that are on no bridge.
            "-A EMBASSY -s 192.168.1.5 -d 10.1.2.3 -p tcp -m tcp --dport 80 -j",
        ] {
            assert!(script.contains(all), "{script}");
        }
        assert!(!script.contains("-A EMBASSY -s 192.168.1.5 -d 172."), "{script}");
        assert!(!script.contains("-d 10.1.2.3 -i docker0 -p tcp -j"), "{script}");
        assert!(!script.contains("-d 10.1.2.3 -p tcp -j"), "{script}");
        // Connections of others to this host's own address are the host's, unless no bridge is known.
        assert!(!script.contains("-d 172.17.0.1 -p tcp -j"), "{script}");
        let mut rules = example(true, CaptureScope::All);
        rules.places.everywhere = ["172.17.0.1".parse().unwrap()].into();
        let script = super::script(&rules, false, DOCKERS);
        assert!(script.contains("-A EMBASSY -d 172.17.0.1 -p tcp -j REDIRECT"), "{script}");
    }

    #[test]
    fn what_is_sent_from_here_is_captured_on_declared_ports_only() {
        // The match for listening sockets works only for arriving packets: the kernel refuses it in a chain of OUTPUT.
        let script = script(&with_unknown(example(true, CaptureScope::All)), false, DOCKERS);
        let (_, output) = script.split_once(":EMBASSY_OUTPUT - [0:0]\n").unwrap();
        let expected = "\
-A EMBASSY_OUTPUT -d 172.17.0.1 -p tcp -m tcp --dport 8500 -j RETURN
-A EMBASSY_OUTPUT -s 172.17.0.2 -d 172.17.0.1 -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 9999
-A EMBASSY_OUTPUT -s 172.17.0.2 -d 172.17.0.1 -p tcp -m tcp --dport 6379 -j REDIRECT --to-ports 9999
-A EMBASSY_OUTPUT -s 172.18.0.5 -d 172.17.0.1 -p tcp -m tcp --dport 6379 -j REDIRECT --to-ports 9999
-A EMBASSY_OUTPUT -s 192.168.1.5 -d 172.17.0.1 -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 9999
-I OUTPUT 1 -m mark ! --mark 0x656d0000 -j EMBASSY_OUTPUT
COMMIT
";
        assert_eq!(output, expected);
    }

    #[test]
    fn strangers_are_captured_where_nothing_listens() {
        let script = script(&with_unknown(example(false, CaptureScope::Declared)), false, DOCKERS);
        let expected = "\
-A EMBASSY -s 172.17.0.2 -j RETURN
-A EMBASSY -s 172.18.0.0/16 -d 172.17.0.1 -i br-x -p tcp -m socket --nowildcard -j RETURN
-A EMBASSY -s 172.18.0.0/16 -d 172.17.0.1 -i br-x -p tcp -j REDIRECT --to-ports 9999
-A EMBASSY -s 172.17.0.0/16 -d 172.17.0.1 -p tcp -m socket --nowildcard -j RETURN
-A EMBASSY -s 172.17.0.0/16 -d 172.17.0.1 -p tcp -j REDIRECT --to-ports 9999
-I PREROUTING 1 -j EMBASSY
";
        assert!(script.contains(expected), "{script}");
    }

    #[test]
    fn each_family_has_its_own() {
        let v6 = script(&example(false, CaptureScope::Declared), true, "*nat\nCOMMIT\n");
        assert!(v6.contains("-s fd00::2 -d fd00::1 -i docker0 -p tcp -m tcp --dport 80"), "{v6}");
        assert!(!v6.contains("172."), "{v6}");
    }

    #[test]
    fn strangers_of_ipv6_need_rules_before_any_consumer_of_ipv6() {
        let mut rules = with_unknown(example(false, CaptureScope::Declared));
        rules.declared.retain(|one| one.key.source.is_ipv4());
        assert!(uses_v6(&rules));
        let v6 = script(&rules, true, "");
        assert!(v6.contains("-s fd00::/64 -d fd00::1 -p tcp -j REDIRECT"), "{v6}");
        for change in [
            |rules: &mut Rules| rules.shape.unknown = false,
            |rules: &mut Rules| rules.shape.v6 = false,
            |rules: &mut Rules| {
                rules.places.networks.retain(|network| network.addr().is_ipv4());
                rules.places.segments.retain(|(_, network)| network.addr().is_ipv4());
            },
            |rules: &mut Rules| rules.places.vips.retain(IpAddr::is_ipv4),
        ] {
            let mut without = rules.clone();
            change(&mut without);
            assert!(!uses_v6(&without), "{without:?}");
        }
    }

    #[test]
    fn our_jump_is_to_be_the_first_rule() {
        let (jump, dockers) = ("-A PREROUTING -j EMBASSY\n", "-A PREROUTING -j DOCKER\n");
        let of = |saved: &[&str]| place_in(&saved.concat(), PREROUTING, None);
        assert_eq!(of(&[dockers]), RulesPlace::Absent);
        assert_eq!(of(&[]), RulesPlace::Absent);
        assert_eq!(of(&[jump, dockers]), RulesPlace::First);
        assert_eq!(of(&[dockers, jump]), RulesPlace::Behind("rule \"-j DOCKER\"".to_owned()));
        let earlier = place_in(jump, PREROUTING, Some("another".to_owned()));
        assert_eq!(earlier, RulesPlace::Behind("another".to_owned()));
        // The host's own connections have their own position.
        let sent = "-A OUTPUT -p tcp -j DOCKER\n-A OUTPUT -j EMBASSY_OUTPUT\n";
        assert_eq!(place_in(jump, OUTPUT, None), RulesPlace::Absent);
        let behind = RulesPlace::Behind("rule \"-p tcp -j DOCKER\"".to_owned());
        assert_eq!(place_in(sent, OUTPUT, None), behind);
    }

    #[test]
    fn removal_takes_what_is_ours_and_the_ancestors_and_nothing_else() {
        let now = "*nat\n:PREROUTING ACCEPT [0:0]\n\
            -A PREROUTING -m comment --comment embassy_redirection_of_another -j ACCEPT\n\
            -A PREROUTING -m comment --comment \"embassy_redirection by hand\" -j ACCEPT\n\
            :EMBASSY - [0:0]\n:EMBASSY_OF_ANOTHER - [0:0]\n\
            :EMBASSY_OUTPUT - [0:0]\n-A OUTPUT -m mark ! --mark 0x656d0000 -j EMBASSY_OUTPUT\n\
            -A PREROUTING -j EMBASSY\n\
            -A PREROUTING -d 172.17.42.1/32 -p tcp -m comment --comment embassy_redirection -j REDIRECT --to-ports 9999\n\
            -A PREROUTING -j DOCKER\n-A PREROUTING -j EMBASSY_OF_ANOTHER\n\
            -A EMBASSY -d 172.17.0.1/32 -p tcp -j REDIRECT --to-ports 9999\nCOMMIT\n";
        let expected = "\
*nat
-D OUTPUT -m mark ! --mark 0x656d0000 -j EMBASSY_OUTPUT
-D PREROUTING -j EMBASSY
-D PREROUTING -d 172.17.42.1/32 -p tcp -m comment --comment embassy_redirection -j REDIRECT --to-ports 9999
-F EMBASSY
-X EMBASSY
-F EMBASSY_OUTPUT
-X EMBASSY_OUTPUT
COMMIT
";
        assert_eq!(removal(now).as_deref(), Some(expected));
        assert_eq!(removal(DOCKERS), None);
    }
}
