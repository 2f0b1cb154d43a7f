//! What would stop captured connections behind our rules: they go on to this host's INPUT, and a firewall that drops there
//! what it does not know drops them too. It is recognised, not repaired: those rules are others'.
//!
//! Rules of others are not worked out to their end. A chain that drops or rejects at its end counts as open where some rule
//! of it, or of a chain that it leads to, accepts our port, or translated connections, or everything from a Docker
//! bridge.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use super::program::{Program, ProgramError};

/// A chain that may stop captured connections.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Barrier {
    /// The chain, as its own program names it, and how it ends.
    pub chain: String,
    /// A command that lets captured connections, and nothing else, pass.
    pub remedy: String,
}

impl fmt::Display for Barrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; to let captured connections pass: {}", self.chain, self.remedy)
    }
}

impl Barrier {
    /// Connections to `port` are dropped, but no readable rule shows where.
    pub(super) fn unknown(port: u16) -> Self {
        Self {
            chain: "a rule of this host's input that embassy cannot read".to_owned(),
            remedy: format!(
                "look for it with nft list ruleset and iptables-save; before it, let pass: tcp dport {port} ct status dnat"
            ),
        }
    }
}

/// How much of the rules of others is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detail {
    /// Everything. Large sets of others may take seconds.
    Everything,
    /// Not what sets hold. A rule that lets in what is in a set is believed to let us in.
    Chains,
}

/// The rules of this host's firewalls. A program that is not installed has none.
#[derive(Debug)]
pub struct Listings {
    nft: Result<String, ProgramError>,
    /// Of iptables, for IPv4 and IPv6.
    filters: [Result<String, ProgramError>; 2],
}

impl Listings {
    pub async fn read(detail: Detail) -> Self {
        let nft: &[_] = match detail {
            Detail::Everything => &["-s", "list", "ruleset"],
            Detail::Chains => &["-s", "-t", "list", "ruleset"],
        };
        let save = |program| run(program, &["-t", "filter"]);
        Self {
            nft: run("nft", nft).await,
            filters: [save("iptables-save").await, save("ip6tables-save").await],
        }
    }

    /// Why a firewall cannot be read.
    pub fn error(&self) -> Option<&ProgramError> {
        self.filters.iter().chain([&self.nft]).find_map(|listing| listing.as_ref().err())
    }

    /// The obstacles for connections captured to `port`, as far as they can be read.
    pub fn barriers(&self, port: u16) -> Vec<Barrier> {
        let mut found = self.nft.as_ref().map_or_else(|_| Vec::new(), |text| in_nft(text, port));
        found.extend(self.filters().filter_map(|(v6, saved)| in_iptables(saved, v6, port)));
        found
    }

    /// A chain that lets in only what it knows: answers to untracked connections it may know by their state alone, which they
    /// have not. `None` if there is no such chain.
    pub(super) fn closed(&self) -> Option<String> {
        let listing = self.nft.as_deref().unwrap_or_default();
        for table in tables(listing) {
            for (chain, lines) in &table.chains {
                if let Some(end) = end(lines) {
                    return Some(format!("chain {} {chain} of nft {end}", table.name));
                }
            }
        }
        self.filters().find_map(|(v6, saved)| {
            let program = if v6 { "ip6tables" } else { "iptables" };
            end_of_input(saved).map(|end| format!("chain INPUT of {program} {end}"))
        })
    }

    fn filters(&self) -> impl Iterator<Item = (bool, &str)> {
        let listings = self.filters.iter().map(|saved| saved.as_deref().unwrap_or_default());
        [false, true].into_iter().zip(listings)
    }
}

/// Whether rules of the older iptables are in use here. The kernel does not tell when those change.
pub(super) fn has_legacy_iptables() -> bool {
    let names = std::fs::read_to_string("/proc/net/ip_tables_names");
    names.is_ok_and(|names| !names.trim().is_empty())
}

/// What a program lists. One that is not installed has no rules.
async fn run(program: &'static str, args: &[&str]) -> Result<String, ProgramError> {
    match Program(program).run(args, "").await {
        Err(error) if error.is_missing() => Ok(String::new()),
        // A kernel without IPv6 has no rules for it.
        Err(_) if program == "ip6tables-save" => Ok(String::new()),
        answer => answer,
    }
}

/// How INPUT ends in the text of `iptables-save`, if it drops everything at its end.
fn end_of_input(saved: &str) -> Option<String> {
    let last = saved.lines().rfind(|line| line.starts_with("-A INPUT "));
    if let Some(last) =
        last.filter(|last| *last == "-A INPUT -j DROP" || last.starts_with("-A INPUT -j REJECT"))
    {
        return Some(format!("ends with {:?}", last.trim_start_matches("-A INPUT ")));
    }
    let drops = saved.lines().any(|line| line.starts_with(":INPUT DROP"));
    drops.then(|| "has the policy DROP".to_owned())
}

/// The obstacles in the text of `iptables-save`.
pub fn in_iptables(saved: &str, v6: bool, port: u16) -> Option<Barrier> {
    let rules = || saved.lines().filter(|line| line.starts_with("-A "));
    let end = end_of_input(saved)?;
    let after = |rule: &str, name: &str| {
        let (_, rest) = rule.split_once(&format!(" {name} "))?;
        rest.split(' ').next().map(str::to_owned)
    };
    let of_chain = |chain: &str| {
        let start = format!("-A {chain} ");
        rules().filter(move |rule| rule.starts_with(&start))
    };
    let visited = reachable("INPUT".to_owned(), |chain| {
        of_chain(chain).filter_map(|rule| after(rule, "-j").or(after(rule, "-g"))).collect()
    });
    let is_open = visited.iter().flat_map(|chain| of_chain(chain)).any(|rule| {
        let after = |name| after(rule, name);
        let ports = after("--dport").or(after("--dports"));
        let from_docker = after("-i").is_some_and(|name| is_dockers(&name));
        after("-j").is_some_and(|target| target == "ACCEPT")
            && (rule == "-A INPUT -j ACCEPT"
                || after("--ctstate").is_some_and(|status| status.contains("DNAT"))
                || ports.as_ref().is_some_and(|ports| has_port(ports, ':', port))
                || from_docker && ports.is_none())
    });
    let program = if v6 { "ip6tables" } else { "iptables" };
    (!is_open).then(|| Barrier {
        chain: format!("chain INPUT of {program} {end}"),
        remedy: format!(
            "{program} -I INPUT -p tcp --dport {port} -m conntrack --ctstate DNAT -j ACCEPT"
        ),
    })
}

/// The obstacles in the text of `nft list ruleset`, but for the tables that iptables itself shows.
pub fn in_nft(ruleset: &str, port: u16) -> Vec<Barrier> {
    tables(ruleset)
        .iter()
        .filter(|table| !matches!(table.name, "ip filter" | "ip6 filter"))
        .flat_map(|table| {
            table.chains.iter().filter_map(move |(chain, lines)| {
                let end = end(lines)?;
                if table.rules_from(chain).any(|rule| table.lets_in(rule, port)) {
                    return None;
                }
                let name = format!("{} {chain}", table.name);
                Some(Barrier {
                    chain: format!("chain {name} of nft {end}"),
                    remedy: format!(
                        "nft insert rule {name} tcp dport {port} ct status dnat accept"
                    ),
                })
            })
        })
        .collect()
}

/// A table of nft's, as it is listed.
#[derive(Debug, Default)]
struct Table<'a> {
    /// Family and name.
    name: &'a str,
    chains: BTreeMap<&'a str, Vec<&'a str>>,
    /// The elements of its sets.
    sets: BTreeMap<&'a str, String>,
}

fn tables(ruleset: &str) -> Vec<Table<'_>> {
    let mut tables: Vec<Table<'_>> = Vec::new();
    let (mut chain, mut set) = (None, None);
    for line in ruleset.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("table ") {
            let name = name.trim_end_matches(['{', ' ']);
            tables.push(Table { name, ..Table::default() });
            (chain, set) = (None, None);
        } else if let Some(name) = line.strip_prefix("chain ") {
            (chain, set) = (Some(name.trim_end_matches(['{', ' '])), None);
        } else if let Some(name) = line.strip_prefix("set ") {
            (chain, set) = (None, Some(name.trim_end_matches(['{', ' '])));
        } else if line == "}" {
            (chain, set) = (None, None);
        } else if let Some(table) = tables.last_mut() {
            if let Some(chain) = chain {
                table.chains.entry(chain).or_default().push(line);
            } else if let Some(set) = set {
                table.sets.entry(set).or_default().push_str(line);
            }
        }
    }
    // Bridges and devices have an input of their own, which is before the connection is translated.
    tables.retain(|table| ["ip ", "ip6 ", "inet "].iter().any(|of| table.name.starts_with(of)));
    tables
}

impl Table<'_> {
    /// The rules of a chain, and of the chains that it leads to.
    fn rules_from(&self, chain: &str) -> impl Iterator<Item = &str> {
        let rules_of = |chain: &str| self.chains.get(chain).into_iter().flatten().copied();
        let target = |rule: &str| {
            let (_, target) = rule.split_once("jump ").or(rule.split_once("goto "))?;
            target.split(' ').next().map(str::to_owned)
        };
        let visited =
            reachable(chain.to_owned(), |chain| rules_of(chain).filter_map(target).collect());
        visited
            .into_iter()
            .flat_map(move |chain| rules_of(&chain).collect::<Vec<_>>())
            .filter(|line| !line.starts_with("type "))
    }

    fn lets_in(&self, rule: &str, port: u16) -> bool {
        let words: Vec<_> = rule.split_whitespace().collect();
        let at = |word: &str| words.iter().position(|other| *other == word);
        let accepts = at("accept").is_some();
        let on_port = at("dport").map(|at| {
            let ports = words.get(at + 1..).unwrap_or_default().join(" ");
            match ports.strip_prefix('@') {
                Some(set) => {
                    let set = set.split(' ').next().unwrap_or_default();
                    let elements = self.sets.get(set).filter(|lines| lines.contains("elements"));
                    elements.is_none_or(|elements| has_port(elements, '-', port))
                }
                None => has_port(&ports, '-', port),
            }
        });
        let translated = rule.contains("ct status") && rule.contains("dnat");
        let from_docker = words.array_windows().any(|[word, interface]| {
            matches!(*word, "iifname" | "iif") && is_dockers(interface.trim_matches('"'))
        });
        // If a Docker bridge has its own chain, its owner has decided about such connections.
        let has_its_own = from_docker && (at("goto").is_some() || at("jump").is_some());
        words == ["accept"] && self.is_base(rule)
            || accepts && (translated || on_port == Some(true) || from_docker && on_port.is_none())
            || has_its_own && on_port.is_none()
    }

    /// Whether the rule stands in a chain that the kernel's input hook calls.
    fn is_base(&self, rule: &str) -> bool {
        let with_rule = self.chains.values().filter(|lines| lines.contains(&rule));
        with_rule.flatten().any(|line| line.contains(" hook input "))
    }
}

/// A chain, and those that it leads to, each once.
fn reachable(chain: String, next: impl Fn(&str) -> Vec<String>) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut open = vec![chain];
    while let Some(chain) = open.pop() {
        if !found.contains(&chain) {
            open.extend(next(&chain));
            found.insert(chain);
        }
    }
    found
}

/// How a chain of the input hook ends, if it drops everything at its end.
fn end(chain: &[&str]) -> Option<String> {
    let head = chain.iter().find(|line| line.contains(" hook input "))?;
    let last = chain.last()?;
    if *last == "drop" || last.starts_with("reject") {
        return Some(format!("ends with {last:?}"));
    }
    head.contains("policy drop").then(|| "has the policy drop".to_owned())
}

fn is_dockers(interface: &str) -> bool {
    interface.starts_with("docker") || interface.starts_with("br-")
}

/// Whether a list of ports and ranges has this one.
fn has_port(list: &str, range: char, port: u16) -> bool {
    let pieces = list.split(|c: char| !c.is_ascii_digit() && c != range);
    pieces.filter(|piece| !piece.is_empty()).any(|piece| {
        let (first, last) = piece.split_once(range).unwrap_or((piece, piece));
        matches!((first.parse::<u16>(), last.parse::<u16>()), (Ok(first), Ok(last)) if (first..=last).contains(&port))
    })
}

/// Reads `input` as a listing of either program.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(input: &[u8]) {
    let listing = String::from_utf8_lossy(input);
    let found = in_nft(&listing, 9999).into_iter().chain(in_iptables(&listing, false, 9999));
    found.for_each(|barrier| assert!(barrier.remedy.contains("9999")));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn iptables(rules: &str) -> bool {
        let saved = format!("*filter\n:INPUT DROP [0:0]\n:FORWARD DROP [0:0]\n{rules}\nCOMMIT\n");
        in_iptables(&saved, false, 9999).is_some()
    }

    #[test]
    fn a_policy_of_iptables_is_recognised_unless_a_rule_lets_us_in() {
        for closed in [
            "",
            "-A INPUT -i lo -j ACCEPT",
            "-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT",
            "-A INPUT -p tcp -m tcp --dport 9999 -j DROP",
            "-A INPUT -i docker0 -p tcp -m tcp --dport 53 -j ACCEPT",
            "-A FORWARD -i docker0 -j ACCEPT",
            "-A elsewhere -p tcp -m tcp --dport 9999 -j ACCEPT",
        ] {
            assert!(iptables(closed), "{closed}");
        }
        for open in [
            "-A INPUT -p tcp -m tcp --dport 9999 -j ACCEPT",
            "-A INPUT -j ufw-user-input\n-A ufw-user-input -p tcp -m multiport --dports 22,9000:10000 -j ACCEPT",
            "-A INPUT -p tcp -m conntrack --ctstate DNAT -j ACCEPT",
            "-A INPUT -i docker0 -j ACCEPT",
            "-A INPUT -j ACCEPT",
        ] {
            assert!(!iptables(open), "{open}");
        }
    }

    #[test]
    fn a_last_rule_is_as_good_as_a_policy() {
        let rejects = "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -i lo -j ACCEPT\n\
            -A INPUT -j REJECT --reject-with icmp-host-prohibited\nCOMMIT\n";
        let barrier = in_iptables(rejects, true, 9999).unwrap();
        assert_eq!(
            barrier.to_string(),
            "chain INPUT of ip6tables ends with \"-j REJECT --reject-with icmp-host-prohibited\"; to let captured \
             connections pass: ip6tables -I INPUT -p tcp --dport 9999 -m conntrack --ctstate DNAT -j ACCEPT"
        );
        assert_eq!(in_iptables("*filter\n:INPUT ACCEPT [0:0]\nCOMMIT\n", false, 9999), None);
        assert_eq!(in_iptables("", false, 9999), None);
    }

    fn nft(rules: &str) -> Vec<Barrier> {
        in_nft(
            &format!(
                "table inet strict {{\n\tset open {{\n\t\ttype inet_service\n\t\telements = {{ 22,\n\t\t\t     9999 }}\n\t}}\n\n\
                 \tchain in {{\n\t\ttype filter hook input priority filter; policy drop;\n\t\t{rules}\n\t}}\n}}\n\
                 table ip filter {{\n\tchain INPUT {{\n\t\ttype filter hook input priority filter; policy drop;\n\t}}\n}}\n\
                 table bridge b {{\n\tchain in {{\n\t\ttype filter hook input priority filter; policy drop;\n\t}}\n}}\n"
            ),
            9999,
        )
    }

    #[test]
    fn a_policy_of_nft_is_recognised_unless_a_rule_lets_us_in() {
        for closed in [
            "iif \"lo\" accept",
            "tcp dport { 22, 80 } accept",
            "tcp dport 22 accept\n\t\taccept_nothing",
            "iifname \"docker0\" udp dport 53 accept",
            "tcp dport 9999 drop",
            "iif \"lo\" accept\n\t}\n\tchain forward {\n\t\tiifname \"docker0\" accept",
        ] {
            let expected = Barrier {
                chain: "chain inet strict in of nft has the policy drop".to_owned(),
                remedy: "nft insert rule inet strict in tcp dport 9999 ct status dnat accept"
                    .to_owned(),
            };
            assert_eq!(nft(closed), [expected], "{closed}");
        }
        for open in [
            "tcp dport 9999 accept",
            "tcp dport { 22, 9000-10000 } accept",
            "tcp dport @open accept",
            "ct status dnat accept",
            "iifname \"br-1234\" accept",
            "iifname \"docker0\" goto filter_IN_docker",
            "jump more\n\t}\n\tchain more {\n\t\ttcp dport 9999 accept",
            "accept",
            // What it holds was not read.
            "tcp dport @unread accept",
        ] {
            assert_eq!(nft(open), [], "{open}");
        }
    }
}
