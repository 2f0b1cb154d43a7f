//! The position of our rules among those of other programs: the first rule that translates a connection's destination wins.

use std::fmt;

use super::{
    Firewall,
    netlink::BaseChain,
    rules::{DRAINING, Hook, NAME},
};

/// The position of our rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RulesPlace {
    /// There are no rules of ours.
    Absent,
    /// No other rules come before ours.
    First,
    /// This rule or chain comes before ours.
    Behind(String),
}

/// The first chain of other programs that translates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct First {
    name: String,
    priority: i32,
}

/// The lowest priority that a translating chain can have: connection tracking is at -200.
const LOWEST: i32 = -199;

impl First {
    /// The first chain. `None` if no other program translates arriving connections or, with `redirect`, sent ones.
    pub(super) fn among(chains: &[BaseChain], redirect: bool) -> Option<Self> {
        let hooks: &[_] =
            if redirect { &[Hook::Prerouting, Hook::Output] } else { &[Hook::Prerouting] };
        let ours = format!("inet {NAME} ");
        let all = hooks.iter().flat_map(|&hook| translating(chains, hook));
        let others = all.filter(|chain| !chain.name.starts_with(&ours));
        let first = others.min_by_key(|chain| chain.priority)?;
        Some(Self { name: first.name.clone(), priority: first.priority })
    }

    /// The priority that puts our chains, now at `ours`, before it. `None` if they already are, or if that is impossible.
    pub(super) fn place_before(&self, ours: i32) -> Option<i32> {
        // The kernel calls the later one of two chains with the same priority first. The order is unknown, so equal is not
        // enough.
        (self.priority <= ours && ours > LOWEST).then(|| (self.priority - 1).max(LOWEST))
    }

    /// Whether it stays before our chains even at their lowest priority.
    pub(super) fn stays_before(&self, firewall: Firewall, ours: i32) -> bool {
        match firewall {
            Firewall::Nft => self.priority <= ours && ours == LOWEST,
            // iptables' chains have fixed priorities.
            Firewall::Iptables => self.priority < DSTNAT,
        }
    }
}

impl fmt::Display for First {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&named(&self.name, self.priority))
    }
}

/// The priority of iptables' own chains (man 8 nft, "dstnat").
const DSTNAT: i32 = -100;

pub(super) fn in_nft(chains: &[BaseChain], hook: Hook) -> RulesPlace {
    let ours = format!("inet {NAME} {}", hook.nft());
    let Some(own) = translating(chains, hook).find(|chain| chain.name == ours) else {
        return RulesPlace::Absent;
    };
    let others = translating(chains, hook).filter(|chain| chain.name != ours);
    match others.min_by_key(|chain| chain.priority) {
        Some(first) if first.priority <= own.priority => RulesPlace::Behind(described(first)),
        _ => RulesPlace::First,
    }
}

/// An nft chain that translates before iptables does.
pub(super) fn before_iptables(chains: &[BaseChain], hook: Hook) -> Option<String> {
    let first = translating(chains, hook).min_by_key(|chain| chain.priority)?;
    (first.priority < DSTNAT).then(|| described(first))
}

fn described(chain: &BaseChain) -> String {
    named(&chain.name, chain.priority)
}

fn named(name: &str, priority: i32) -> String {
    format!("nft's chain {name}, priority {priority}")
}

/// Every chain that translates at `hook`, except those of an embassy that has ended its capture.
fn translating(chains: &[BaseChain], hook: Hook) -> impl Iterator<Item = &BaseChain> {
    let draining = format!("inet {}", DRAINING);
    chains.iter().filter(move |chain| {
        chain.kind == "nat" && chain.hook == hook && !chain.name.starts_with(&draining)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chains(all: &[(&str, i32)]) -> Vec<BaseChain> {
        at(Hook::Prerouting, all)
    }

    fn at(hook: Hook, all: &[(&str, i32)]) -> Vec<BaseChain> {
        let chain = |&(name, priority): &(&str, i32)| BaseChain {
            name: name.to_owned(),
            kind: "nat".to_owned(),
            hook,
            priority,
        };
        all.iter().map(chain).collect()
    }

    #[test]
    fn of_nfts_chains_the_lowest_priority_comes_first() {
        let (ours, dockers) = (("inet embassy prerouting", -110), ("ip nat PREROUTING", -100));
        assert_eq!(in_nft(&chains(&[dockers]), Hook::Prerouting), RulesPlace::Absent);
        assert_eq!(in_nft(&chains(&[dockers, ours]), Hook::Prerouting), RulesPlace::First);
        let behind = RulesPlace::Behind("nft's chain inet other pre, priority -150".to_owned());
        assert_eq!(in_nft(&chains(&[ours, ("inet other pre", -150)]), Hook::Prerouting), behind);
        // A filter chain translates nothing, and the chains of an embassy that drains are empty.
        let mut others =
            chains(&[ours, ("inet x a", -150), ("inet embassy_draining_7 prerouting", -150)]);
        others[1].kind = "filter".to_owned();
        assert_eq!(in_nft(&others, Hook::Prerouting), RulesPlace::First);
    }

    #[test]
    fn with_nft_there_is_a_place_before_the_first() {
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
        // The kernel calls the later one of two chains with the same priority first.
        let same = first(&[ours, ("ip x a", -110)], false).unwrap();
        assert_eq!(same.place_before(-110), Some(-111));
        let lowest = first(&[("ip x a", -199)], false).unwrap();
        assert_eq!((lowest.place_before(-110), lowest.place_before(-199)), (Some(-199), None));
        assert!(lowest.stays_before(Firewall::Nft, -199));
        // Connections from this host are translated at another hook.
        let out = at(Hook::Output, &all);
        assert_eq!(First::among(&out, false), None);
        assert_eq!(First::among(&out, true), Some(other));
    }

    #[test]
    fn only_an_earlier_chain_comes_before_iptables() {
        let all = chains(&[("ip nat PREROUTING", -100), ("inet other pre", -101)]);
        assert_eq!(before_iptables(&all[..1], Hook::Prerouting), None);
        assert_eq!(before_iptables(&all, Hook::Output), None);
        let what = "nft's chain inet other pre, priority -101";
        assert_eq!(before_iptables(&all, Hook::Prerouting).as_deref(), Some(what));
    }

    #[test]
    fn what_is_sent_from_here_has_a_place_of_its_own() {
        let all = at(Hook::Output, &[("inet embassy output", -110), ("ip early out", -150)]);
        let behind = RulesPlace::Behind("nft's chain ip early out, priority -150".to_owned());
        assert_eq!(in_nft(&all, Hook::Output), behind);
        assert_eq!(in_nft(&all, Hook::Prerouting), RulesPlace::Absent);
    }
}
