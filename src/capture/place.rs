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

/// The place of our rules that `firewall` keeps. It only reads.
pub async fn of(firewall: Firewall) -> Result<Place, ProgramError> {
    let chains = Program("nft").run(&["-y", "list", "chains"], "").await;
    match firewall {
        Firewall::Nft => Ok(in_nft(&chains?)),
        Firewall::Iptables => {
            let saved = Program("iptables-save").run(&["-t", "nat"], "").await?;
            // Where there is no nft, there are no chains of its.
            Ok(in_iptables(&saved, &chains.unwrap_or_default()))
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
        let hooks: &[_] = if redirect { &["prerouting", "output"] } else { &["prerouting"] };
        let ours = format!("inet {NAME} ");
        let all = hooks.iter().flat_map(|hook| translating(chains, hook));
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
fn in_nft(chains: &str) -> Place {
    let ours = format!("inet {NAME} prerouting");
    let all = translating(chains, "prerouting");
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
fn in_iptables(saved: &str, chains: &str) -> Place {
    let mut rules = saved.lines().filter_map(|line| line.strip_prefix("-A PREROUTING "));
    let is_ours = |rule: &str| rule.ends_with("-j EMBASSY");
    let first = rules.next();
    if first.is_none_or(|first| !is_ours(first) && !rules.any(is_ours)) {
        return Place::Absent;
    }
    let earlier =
        translating(chains, "prerouting").into_iter().min_by_key(|(_, priority)| *priority);
    match (earlier, first) {
        (Some((name, priority)), _) if priority < DSTNAT => Place::Behind(chain(&name, priority)),
        (_, Some(first)) if !is_ours(first) => Place::Behind(format!("rule {first:?}")),
        _ => Place::First,
    }
}

fn chain(name: &str, priority: i32) -> String {
    format!("nft's chain {name}, priority {priority}")
}

/// Every chain that translates at a hook: its table and name, and its priority.
fn translating(chains: &str, hook: &str) -> Vec<(String, i32)> {
    let start = format!("type nat hook {hook} priority ");
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
        assert_eq!(in_nft(&chains(&[dockers])), Place::Absent);
        assert_eq!(in_nft(&chains(&[dockers, ours])), Place::First);
        let behind = Place::Behind("nft's chain inet other pre, priority -150".to_owned());
        assert_eq!(in_nft(&chains(&[ours, ("inet other pre", -150)])), behind);
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
        assert_eq!(in_iptables(dockers, ""), Place::Absent);
        assert_eq!(in_iptables("", ""), Place::Absent);
        assert_eq!(in_iptables(&[jump, dockers].concat(), ""), Place::First);
        let behind = Place::Behind("rule \"-j DOCKER\"".to_owned());
        assert_eq!(in_iptables(&[dockers, jump].concat(), ""), behind);
        let earlier = chains(&[("ip nat PREROUTING", -100), ("inet other pre", -101)]);
        let behind = Place::Behind("nft's chain inet other pre, priority -101".to_owned());
        assert_eq!(in_iptables(&[jump, dockers].concat(), &earlier), behind);
    }
}
