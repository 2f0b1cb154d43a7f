//! Rules of other programs that lead connections to a port of this host: rules of the user's own, or what is left of them.

use std::net::IpAddr;

use super::program::{Program, ProgramError};

/// A rule that leads connections to a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lead {
    /// The rule, as its own program shows it.
    pub rule: String,
    /// How to delete it.
    pub removal: String,
    /// `None`: this host.
    pub address: Option<IpAddr>,
    pub port: u16,
}

/// All such rules, except those of embassy. Only reads. The error says why they cannot be read.
pub async fn read() -> Result<Vec<Lead>, String> {
    let mut leads = Vec::new();
    let mut shown = Vec::new();
    let (mut missing, mut denied) = (0, None);
    let programs = [("iptables", "iptables-save"), ("ip6tables", "ip6tables-save")];
    for (program, save) in programs {
        match Program(save).run(&["-t", "nat"], "").await {
            Ok(saved) => {
                leads.extend(in_iptables(&saved, program));
                // A table that iptables cannot show is read from nft.
                if saved.contains("*nat") {
                    shown.push(if program == "iptables" { "ip nat" } else { "ip6 nat" });
                }
            }
            Err(error) if error.is_missing() => missing += 1,
            // A kernel without IPv6 has no rules for it.
            Err(_) if program == "ip6tables" => {}
            Err(error) => denied = Some(error),
        }
    }
    match Program("nft").run(&["-s", "-t", "list", "ruleset"], "").await {
        Ok(ruleset) => leads.extend(in_nft(&ruleset, &shown)),
        Err(error) if error.is_missing() => missing += 1,
        Err(error) => denied = Some(error),
    }
    match denied.as_ref().map(ProgramError::to_string) {
        Some(error) => Err(error),
        None if missing > programs.len() => Err("neither nft nor iptables is installed".to_owned()),
        None => Ok(leads),
    }
}

/// The rules in the text of `iptables-save -t nat`.
pub fn in_iptables(saved: &str, program: &str) -> Vec<Lead> {
    let lead = |line: &str| {
        let rule = line.strip_prefix("-A ").filter(|rule| !rule.starts_with("EMBASSY"))?;
        let after = |name: &str| rule.split_once(&format!(" {name} "))?.1.split(' ').next();
        if after("-p").is_some_and(|protocol| protocol != "tcp") {
            return None;
        }
        let (address, port) = match after("-j")? {
            "REDIRECT" => (None, after("--to-ports")?.parse().ok()?),
            "DNAT" => target(after("--to-destination")?)?,
            _ => return None,
        };
        Some(Lead {
            rule: format!("{program} -t nat -A {rule}"),
            removal: format!("{program} -t nat -D {rule}"),
            address,
            port,
        })
    };
    saved.lines().filter_map(lead).collect()
}

/// The rules in the text of `nft list ruleset`, except in tables that `shown` names.
pub fn in_nft(ruleset: &str, shown: &[&str]) -> Vec<Lead> {
    let (mut table, mut chain) = ("", "");
    let mut leads = Vec::new();
    for line in ruleset.lines().map(str::trim) {
        let named =
            |name: &str| line.strip_prefix(name).map(|rest| rest.trim_end_matches(['{', ' ']));
        if let Some(name) = named("table ") {
            table = name;
        } else if let Some(name) = named("chain ") {
            chain = name;
        }
        let is_ours =
            table.split(' ').nth(1).is_some_and(|name| name.starts_with(super::rules::NAME));
        if is_ours || shown.contains(&table) || line.contains("udp") {
            continue;
        }
        let translation = ["redirect to ", "dnat to ", "dnat ip to ", "dnat ip6 to "];
        let to = translation.iter().find_map(|word| line.split_once(word)).map(|(_, to)| to);
        let Some((address, port)) = to.and_then(|to| target(to.split(' ').next()?)) else {
            continue;
        };
        leads.push(Lead {
            rule: format!("nft add rule {table} {chain} {line}"),
            removal: format!("nft -a list chain {table} {chain}, then nft delete rule {table} {chain} handle <number>"),
            address,
            port,
        });
    }
    leads
}

/// `:port`, `address:port` or `[address]:port`. `None` without a port, or with a range of ports.
fn target(text: &str) -> Option<(Option<IpAddr>, u16)> {
    let (address, port) = text.rsplit_once(':')?;
    let address = address.trim_matches(['[', ']']);
    let address = if address.is_empty() { None } else { Some(address.parse().ok()?) };
    Some((address, port.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(leads: &[Lead]) -> Vec<(String, u16)> {
        let address = |lead: &Lead| lead.address.map_or(String::new(), |a| a.to_string());
        leads.iter().map(|lead| (address(lead), lead.port)).collect()
    }

    #[test]
    fn rules_of_iptables_are_found_and_can_be_deleted() {
        let saved = "*nat\n:PREROUTING ACCEPT [0:0]\n:DOCKER - [0:0]\n:EMBASSY - [0:0]\n\
            -A PREROUTING -j EMBASSY\n\
            -A PREROUTING -d 172.17.42.1/32 -p tcp -j REDIRECT --to-ports 3232\n\
            -A PREROUTING -d 172.17.42.1/32 -p tcp -j DNAT --to-destination 10.0.0.5:3232\n\
            -A OUTPUT -p tcp -m comment --comment \"a b\" -j REDIRECT --to-ports 9999\n\
            -A OUTPUT -p tcp -j REDIRECT --to-ports 9000-9100\n\
            -A PREROUTING -p udp -j REDIRECT --to-ports 53\n\
            -A DOCKER ! -i docker0 -p tcp --dport 80 -j DNAT --to-destination 172.17.0.2:80\n\
            -A POSTROUTING -s 172.17.0.0/16 -j MASQUERADE\n\
            -A EMBASSY -p tcp -j REDIRECT --to-ports 9999\nCOMMIT\n";
        let leads = in_iptables(saved, "iptables");
        let expected = [("", 3232), ("10.0.0.5", 3232), ("", 9999), ("172.17.0.2", 80)];
        let expected: Vec<_> = expected.iter().map(|(a, p)| ((*a).to_owned(), *p)).collect();
        assert_eq!(found(&leads), expected);
        assert_eq!(
            leads[2].removal,
            "iptables -t nat -D OUTPUT -p tcp -m comment --comment \"a b\" -j REDIRECT --to-ports 9999"
        );
        assert!(
            in_iptables("# table `nat' is incompatible, use 'nft' tool.\n", "iptables").is_empty()
        );
    }

    #[test]
    fn rules_of_nft_are_found_once() {
        let ruleset = "table ip nat {\n\tchain PREROUTING {\n\
            \t\ttype nat hook prerouting priority dstnat; policy accept;\n\
            \t\tip daddr 172.17.42.1 tcp dport 80 counter redirect to :9999\n\t}\n}\n\
            table inet mine {\n\tchain pre {\n\
            \t\tip daddr 172.17.42.1 dnat ip to 172.17.0.1:3232\n\
            \t\tip6 daddr fd00::1 dnat ip6 to [fd00::2]:3233 comment \"x\"\n\
            \t\tudp dport 53 redirect to :53\n\
            \t\ttcp dport 80 accept\n\t}\n}\n\
            table inet embassy {\n\tchain declared {\n\t\tredirect to :9999\n\t}\n}\n";
        let others = [("172.17.0.1".to_owned(), 3232), ("fd00::2".to_owned(), 3233)];
        assert_eq!(found(&in_nft(ruleset, &["ip nat"])), others);
        let all = in_nft(ruleset, &[]);
        assert_eq!(found(&all), [&[(String::new(), 9999)], &others[..]].concat());
        assert!(all[0].rule.starts_with("nft add rule ip nat PREROUTING ip daddr 172.17.42.1"));
    }
}
