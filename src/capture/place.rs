//! Where our rules stand among those of others: who translates a connection's destination first wins it.

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
