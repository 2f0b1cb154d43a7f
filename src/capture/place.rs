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

/// The priority of iptables' own chains (man 8 nft, "dstnat").
const DSTNAT: i32 = -100;

/// In what `nft -y list chains` says.
fn in_nft(chains: &str) -> Place {
    let ours = format!("inet {NAME} prerouting");
    let all = prerouting(chains);
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
    let earlier = prerouting(chains).into_iter().min_by_key(|(_, priority)| *priority);
    match (earlier, first) {
        (Some((name, priority)), _) if priority < DSTNAT => Place::Behind(chain(&name, priority)),
        (_, Some(first)) if !is_ours(first) => Place::Behind(format!("rule {first:?}")),
        _ => Place::First,
    }
}

fn chain(name: &str, priority: i32) -> String {
    format!("nft's chain {name}, priority {priority}")
}

/// Every chain that translates what arrives: its table and name, and its priority.
fn prerouting(chains: &str) -> Vec<(String, i32)> {
    let (mut table, mut chain) = ("", "");
    let mut found = Vec::new();
    for line in chains.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("table ") {
            table = name.trim_end_matches(" {");
        } else if let Some(name) = line.strip_prefix("chain ") {
            chain = name.trim_end_matches(" {");
        } else if let Some(rest) = line.strip_prefix("type nat hook prerouting priority ") {
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
