//! Where our rules stand among those of others: who translates a connection's destination first wins it.

use std::fmt;

use super::{
    Firewall,
    program::{Program, ProgramError},
    rules::NAME,
};

/// Where our rules stand now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// There are none.
    Absent,
    /// Nobody's come before them.
    First,
    /// This comes before them.
    Behind(String),
}

/// Where a connection's destination is translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// What arrives.
    Prerouting,
    /// What this host sends itself: `--redirect`.
    Output,
}

impl Hook {
    /// nft's word for it, and the name of our chain there.
    fn nft(self) -> &'static str {
        match self {
            Self::Prerouting => "prerouting",
            Self::Output => "output",
        }
    }

    /// How iptables begins a rule of its chain, and ends the one that leads to ours.
    fn iptables(self) -> (&'static str, &'static str) {
        match self {
            Self::Prerouting => ("-A PREROUTING ", "-j EMBASSY"),
            Self::Output => ("-A OUTPUT ", "-j EMBASSY_OUTPUT"),
        }
    }
}

/// The place of our rules at `hook` that `firewall` keeps. It only reads.
pub async fn of(firewall: Firewall, hook: Hook) -> Result<Place, ProgramError> {
    let chains = Program("nft").run(&["-y", "list", "chains"], "").await;
    match firewall {
        Firewall::Nft => Ok(in_nft(&chains?, hook)),
        Firewall::Iptables => {
            let saved = Program("iptables-save").run(&["-t", "nat"], "").await?;
            // Where there is no nft, there are no chains of its.
            Ok(in_iptables(&saved, &chains.unwrap_or_default(), hook))
        }
    }
}

/// The chain of others that translates first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct First {
    name: String,
    priority: i32,
}

/// The lowest priority that a chain which translates can have: connection tracking is at -200.
const LOWEST: i32 = -199;

impl First {
    /// `None` where nobody else translates what arrives or, with `redirect`, what is sent.
    pub(super) async fn of_others(redirect: bool) -> Result<Option<Self>, ProgramError> {
        let chains = Program("nft").run(&["-y", "list", "chains"], "").await?;
        Ok(Self::among(&chains, redirect))
    }

    fn among(chains: &str, redirect: bool) -> Option<Self> {
        let hooks: &[_] =
            if redirect { &[Hook::Prerouting, Hook::Output] } else { &[Hook::Prerouting] };
        let ours = format!("inet {NAME} ");
        let all = hooks.iter().flat_map(|&hook| translating(chains, hook));
        let others = all.filter(|(name, _)| !name.starts_with(&ours));
        let (name, priority) = others.min_by_key(|(_, priority)| *priority)?;
        Some(Self { name, priority })
    }

    /// The priority that brings chains of ours, which have `ours` now, before it. `None` where they are, or cannot be.
    pub(super) fn place_before(&self, ours: i32) -> Option<i32> {
        // Of two with the same priority the later one is called first, whichever that is.
        (self.priority <= ours && ours > LOWEST).then(|| (self.priority - 1).max(LOWEST))
    }

    /// Whether it stays before chains of ours that went as far as they can.
    pub(super) fn stays_before(&self, firewall: Firewall, ours: i32) -> bool {
        match firewall {
            Firewall::Nft => self.priority <= ours && ours == LOWEST,
            // They are where they are.
            Firewall::Iptables => self.priority < DSTNAT,
        }
    }
}

impl fmt::Display for First {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&chain(&self.name, self.priority))
    }
}

/// The priority of iptables' own chains (man 8 nft, "dstnat").
const DSTNAT: i32 = -100;

/// In what `nft -y list chains` says.
fn in_nft(chains: &str, hook: Hook) -> Place {
    let ours = format!("inet {NAME} {}", hook.nft());
    let all = translating(chains, hook);
    let Some((_, priority)) = all.iter().find(|(name, _)| *name == ours) else {
        return Place::Absent;
    };
    let first = all.iter().filter(|(name, _)| *name != ours).min_by_key(|(_, priority)| *priority);
    match first {
        Some((name, before)) if before <= priority => Place::Behind(chain(name, *before)),
        _ => Place::First,
    }
}

/// In what `iptables-save` says, and before it what `nft -y list chains` does.
fn in_iptables(saved: &str, chains: &str, hook: Hook) -> Place {
    let (start, jump) = hook.iptables();
    let mut rules = saved.lines().filter_map(|line| line.strip_prefix(start));
    let is_ours = |rule: &str| rule.ends_with(jump);
    let first = rules.next();
    if first.is_none_or(|first| !is_ours(first) && !rules.any(is_ours)) {
        return Place::Absent;
    }
    let earlier = translating(chains, hook).into_iter().min_by_key(|(_, priority)| *priority);
    match (earlier, first) {
        (Some((name, priority)), _) if priority < DSTNAT => Place::Behind(chain(&name, priority)),
        (_, Some(first)) if !is_ours(first) => Place::Behind(format!("rule {first:?}")),
        _ => Place::First,
    }
}

fn chain(name: &str, priority: i32) -> String {
    format!("nft's chain {name}, priority {priority}")
}

/// Every chain that translates at `hook`: its table and name, and its priority.
fn translating(chains: &str, hook: Hook) -> Vec<(String, i32)> {
    let start = format!("type nat hook {} priority ", hook.nft());
    let (mut table, mut chain) = ("", "");
    let mut found = Vec::new();
    for line in chains.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("table ") {
            table = name.trim_end_matches(" {");
        } else if let Some(name) = line.strip_prefix("chain ") {
            chain = name.trim_end_matches(" {");
        } else if let Some(rest) = line.strip_prefix(&start) {
            let priority = rest.split(';').next().and_then(|text| text.trim().parse().ok());
            found.extend(priority.map(|priority| (format!("{table} {chain}"), priority)));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chains(all: &[(&str, i32)]) -> String {
        let chain = |(name, priority): &(&str, i32)| {
            let (table, chain) = name.rsplit_once(' ').unwrap();
            format!(
                "table {table} {{\n\tchain {chain} {{\n\t\ttype nat hook prerouting priority {priority}; policy accept;\n\t}}\n}}\n"
            )
        };
        all.iter().map(chain).collect()
    }

    #[test]
    fn of_nfts_chains_the_lowest_priority_comes_first() {
        let (ours, dockers) = (("inet embassy prerouting", -110), ("ip nat PREROUTING", -100));
        assert_eq!(in_nft(&chains(&[dockers]), Hook::Prerouting), Place::Absent);
        assert_eq!(in_nft(&chains(&[dockers, ours]), Hook::Prerouting), Place::First);
        let behind = Place::Behind("nft's chain inet other pre, priority -150".to_owned());
        assert_eq!(in_nft(&chains(&[ours, ("inet other pre", -150)]), Hook::Prerouting), behind);
    }

    #[test]
    fn with_nft_there_is_a_place_before_whoever_comes_first() {
        let (ours, dockers) = (("inet embassy prerouting", -110), ("ip nat PREROUTING", -100));
        let first = |all: &[_], redirect| First::among(&chains(all), redirect);
        assert_eq!(first(&[ours], false), None);
        assert_eq!(first(&[ours, dockers], false).unwrap().place_before(-110), None);
        let all = [ours, dockers, ("ip x a", -150), ("inet other pre", -160)];
        let other = first(&all, false).unwrap();
        assert_eq!(other.to_string(), "nft's chain inet other pre, priority -160");
        assert_eq!((other.place_before(-110), other.place_before(-161)), (Some(-161), None));
        assert!(other.stays_before(Firewall::Iptables, -110));
        assert!(!other.stays_before(Firewall::Nft, -161));
        // Of two with one priority the later one is called first.
        let same = first(&[ours, ("ip x a", -110)], false).unwrap();
        assert_eq!(same.place_before(-110), Some(-111));
        let lowest = first(&[("ip x a", -199)], false).unwrap();
        assert_eq!((lowest.place_before(-110), lowest.place_before(-199)), (Some(-199), None));
        assert!(lowest.stays_before(Firewall::Nft, -199));
        // What is sent from here is translated elsewhere.
        let out = chains(&all).replace("hook prerouting", "hook output");
        assert_eq!(First::among(&out, false), None);
        assert_eq!(First::among(&out, true), Some(other));
    }

    #[test]
    fn in_iptables_our_jump_is_to_be_the_first_rule() {
        let (jump, dockers) = ("-A PREROUTING -j EMBASSY\n", "-A PREROUTING -j DOCKER\n");
        assert_eq!(in_iptables(dockers, "", Hook::Prerouting), Place::Absent);
        assert_eq!(in_iptables("", "", Hook::Prerouting), Place::Absent);
        assert_eq!(in_iptables(&[jump, dockers].concat(), "", Hook::Prerouting), Place::First);
        let behind = Place::Behind("rule \"-j DOCKER\"".to_owned());
        assert_eq!(in_iptables(&[dockers, jump].concat(), "", Hook::Prerouting), behind);
        let earlier = chains(&[("ip nat PREROUTING", -100), ("inet other pre", -101)]);
        let behind = Place::Behind("nft's chain inet other pre, priority -101".to_owned());
        assert_eq!(in_iptables(&[jump, dockers].concat(), &earlier, Hook::Prerouting), behind);
    }

    #[test]
    fn what_is_sent_from_here_has_a_place_of_its_own() {
        let (jump, other) = ("-A OUTPUT -j EMBASSY_OUTPUT\n", "-A OUTPUT -p tcp -j DOCKER\n");
        let arriving = "-A PREROUTING -j EMBASSY\n";
        assert_eq!(in_iptables(arriving, "", Hook::Output), Place::Absent);
        assert_eq!(in_iptables(&[jump, other].concat(), "", Hook::Output), Place::First);
        let behind = Place::Behind("rule \"-p tcp -j DOCKER\"".to_owned());
        assert_eq!(in_iptables(&[arriving, other, jump].concat(), "", Hook::Output), behind);
        let chains = "table inet embassy {\n\tchain output {\n\t\ttype nat hook output priority -110; policy accept;\n\t}\n}\n\
            table ip early {\n\tchain out {\n\t\ttype nat hook output priority -150; policy accept;\n\t}\n}\n";
        let behind = Place::Behind("nft's chain ip early out, priority -150".to_owned());
        assert_eq!(in_nft(chains, Hook::Output), behind);
        assert_eq!(in_nft(chains, Hook::Prerouting), Place::Absent);
    }
}
