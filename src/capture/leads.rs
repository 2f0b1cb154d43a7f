//! Rules of other programs that lead connections to a port of this host: rules of the user's own, or what is left of them.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
};

use ipnet::IpNet;

use super::{
    input::{self, LEGACY_TABLES, words},
    nft,
    program::{Program, ProgramError},
    rules::{CHAINS, Hook},
};

/// A rule that leads connections to a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lead {
    /// The rule, as its own program shows it.
    pub rule: String,
    /// How to delete it.
    pub removal: String,
    /// `None`: this host.
    pub address: Option<IpAddr>,
    /// The ports that it may lead to: one, if that can be read.
    pub to: Ports,
    /// The ports of the connections that it may take. Conditions other than these and `destination` are not read.
    pub from: Ports,
    /// Where they are made to. `None`: anywhere, or it cannot be read.
    pub destination: Option<IpNet>,
    /// Where the kernel looks at it. `None`: that cannot be read.
    pub hook: Option<Hook>,
}

impl Lead {
    /// The port that it leads to, if that is one.
    pub fn port(&self) -> Option<u16> {
        self.to.only()
    }

    /// Whether it may lead to a port of a host with these addresses.
    pub fn may_lead_to(&self, port: u16, local: &BTreeSet<IpAddr>) -> bool {
        self.to.contains(port) && self.address.is_none_or(|address| local.contains(&address))
    }

    /// Whether it takes embassy's own connections to this server, as far as can be read: unless it spares some user's.
    pub fn takes_own(&self, server: SocketAddr) -> bool {
        let spares = ["owner", "skuid", "skgid", "mark", "cgroup", "! "];
        self.may_take(server.port(), Hook::Output)
            && self.destination.is_none_or(|net| net.contains(&server.ip()))
            && !spares.iter().any(|word| self.rule.contains(word))
    }

    /// Whether it may take connections to a port, which pass this hook.
    pub fn may_take(&self, port: u16, hook: Hook) -> bool {
        self.from.contains(port) && self.hook.is_none_or(|of| of == hook)
    }
}

/// Ports, as a rule names them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ports(Vec<RangeInclusive<u16>>);

impl Ports {
    /// Each port: there is no condition, or it cannot be read.
    pub fn all() -> Self {
        Self(vec![0..=u16::MAX])
    }

    pub fn one(port: u16) -> Self {
        Self(vec![port..=port])
    }

    pub fn contains(&self, port: u16) -> bool {
        self.0.iter().any(|range| range.contains(&port))
    }

    /// The port, if there is one only.
    fn only(&self) -> Option<u16> {
        match self.0.as_slice() {
            [range] if range.start() == range.end() => Some(*range.start()),
            _ => None,
        }
    }

    /// `80`, `80:90` or `80-90`, several of them with commas; all if it is anything else.
    fn read(text: &str) -> Self {
        let range = |text: &str| {
            let text = text.trim();
            let (first, last) = text.split_once([':', '-']).unwrap_or((text, text));
            Some(first.parse().ok()?..=last.parse().ok()?)
        };
        text.split(',').map(range).collect::<Option<_>>().map_or_else(Self::all, Self)
    }
}

/// All such rules, except those of embassy. Only reads. The error says why they cannot be read, or not all of them.
pub async fn read() -> Result<Vec<Lead>, String> {
    let mut leads = Vec::new();
    let mut shown = Vec::new();
    let mut missing = 0;
    for (Names { program, save, legacy, legacy_save, table }, names) in
        NAMES.into_iter().zip(LEGACY_TABLES)
    {
        let nat = ["-t", "nat"];
        let saved = Program(save).run(&nat, "").await;
        // Afterwards, because the older iptables makes its table if it is asked for it.
        let is_old = input::legacy_tables(names).lines().any(|name| name == "nat");
        let old = match is_old {
            true => Some(Program(legacy_save).run(&nat, "").await),
            false => None,
        };
        missing += usize::from(saved.as_ref().is_err_and(ProgramError::is_missing));
        let saved = match saved {
            Err(error) if error.is_missing() => None,
            // A kernel without IPv6 has no rules for it.
            Err(_) if table == "ip6 nat" && !is_old => None,
            saved => Some(saved.map_err(|error| error.to_string())?),
        };
        let old = match old {
            // There is one program only, which is the older one.
            Some(Err(error)) if error.is_missing() => match &saved {
                Some(_) if !is_of_nft(save).await => saved.clone(),
                _ => {
                    let what = "the older iptables has a table nat here";
                    return Err(format!("{what}, and {legacy_save} is not installed"));
                }
            },
            Some(old) => Some(old.map_err(|error| error.to_string())?),
            None => None,
        };
        let (found, is_shown) = both(saved.as_deref(), old.as_deref(), program, legacy);
        leads.extend(found);
        // A table that iptables cannot show is read from nft.
        shown.extend(is_shown.then_some(table));
    }
    match Program("nft").run(&["-s", "-t", "list", "ruleset"], "").await {
        Ok(ruleset) => leads.extend(in_nft(&ruleset, &shown)),
        Err(error) if error.is_missing() && missing == NAMES.len() => {
            return Err("neither nft nor iptables is installed".to_owned());
        }
        Err(error) if error.is_missing() => {
            let chains = match nft::base_chains() {
                // A kernel without nf_tables has no rules of it.
                Err(error) if error.is_missing() => Vec::new(),
                chains => chains.map_err(|error| format!("nft is not installed, and {error}"))?,
            };
            let names = chains.iter().filter(|chain| chain.kind == "nat");
            if let Some(chain) = unseen(names.map(|chain| &*chain.name), &shown) {
                return Err(format!(
                    "nft is not installed, which shows the rules of chain {chain}"
                ));
            }
        }
        Err(error) => return Err(error.to_string()),
    }
    Ok(leads)
}

/// The programs of iptables for a family of addresses, and the table of nft that the newer one writes.
struct Names {
    program: &'static str,
    save: &'static str,
    legacy: &'static str,
    legacy_save: &'static str,
    table: &'static str,
}

const NAMES: [Names; 2] = [
    Names {
        program: "iptables",
        save: "iptables-save",
        legacy: "iptables-legacy",
        legacy_save: "iptables-legacy-save",
        table: "ip nat",
    },
    Names {
        program: "ip6tables",
        save: "ip6tables-save",
        legacy: "ip6tables-legacy",
        legacy_save: "ip6tables-legacy-save",
        table: "ip6 nat",
    },
];

/// Whether a program of iptables writes rules of nf_tables; one that does not say so is the older one.
async fn is_of_nft(save: &'static str) -> bool {
    Program(save).run(&["-V"], "").await.is_ok_and(|version| version.contains("nf_tables"))
}

/// The rules that iptables shows, and those that the older one does, by the programs of these names; and whether those of its
/// table in nft are among them. Often both programs are the same one.
fn both(saved: Option<&str>, old: Option<&str>, program: &str, legacy: &str) -> (Vec<Lead>, bool) {
    let of = |text: Option<&str>, program| in_iptables(text.unwrap_or_default(), program);
    let mut leads = of(saved, program);
    if old.is_some() && (saved.is_none() || of(old, program) != leads) {
        leads.extend(of(old, legacy));
    } else if old.is_some() {
        return (leads, false);
    }
    (leads, saved.is_some_and(|saved| saved.contains("*nat")))
}

/// The first of these chains, by family, table and name, that no program showed.
fn unseen<'a>(mut chains: impl Iterator<Item = &'a str>, shown: &[&str]) -> Option<&'a str> {
    let is_shown = |chain: &str| {
        shown
            .iter()
            .any(|table| chain.strip_prefix(table).is_some_and(|name| name.starts_with(' ')))
    };
    chains.find(|chain| !input::is_ours(chain) && !is_shown(chain))
}

/// The rules in the text of `iptables-save -t nat`.
pub fn in_iptables(saved: &str, program: &str) -> Vec<Lead> {
    let lead = |line: &str| {
        let rule = line.strip_prefix("-A ")?;
        let words = words(rule);
        let (chain, words) = words.split_first()?;
        if CHAINS.contains(chain) {
            return None;
        }
        // The word after that of this name, and whether the condition is negated.
        let said = |name: &str| {
            let at = words.iter().position(|word| *word == name)?;
            let is_negated = at.checked_sub(1).and_then(|at| words.get(at)) == Some(&"!");
            Some((*words.get(at + 1)?, is_negated))
        };
        let after =
            |name: &str| said(name).filter(|(_, is_negated)| !is_negated).map(|(word, _)| word);
        match said("-p") {
            Some(("tcp", true)) => return None,
            Some((protocol, false)) if !matches!(protocol, "tcp" | "6" | "all") => return None,
            _ => {}
        }
        let (address, to) = match after("-j")? {
            "REDIRECT" => (None, Ports::read(after("--to-ports")?)),
            "DNAT" => target(after("--to-destination")?)?,
            _ => return None,
        };
        Some(Lead {
            rule: format!("{program} -t nat -A {rule}"),
            removal: format!("{program} -t nat -D {rule}"),
            address,
            to,
            from: after("--dport")
                .or_else(|| after("--dports"))
                .map_or_else(Ports::all, Ports::read),
            destination: after("-d").and_then(network),
            hook: match *chain {
                "PREROUTING" => Some(Hook::Prerouting),
                "OUTPUT" => Some(Hook::Output),
                _ => None,
            },
        })
    };
    saved.lines().filter_map(lead).collect()
}

/// The rules in the text of `nft list ruleset`, except in tables that `shown` names.
pub fn in_nft(ruleset: &str, shown: &[&str]) -> Vec<Lead> {
    let (mut table, mut chain, mut hook) = ("", "", None);
    let mut leads = Vec::new();
    for line in ruleset.lines().map(str::trim) {
        let named =
            |name: &str| line.strip_prefix(name).map(|rest| rest.trim_end_matches(['{', ' ']));
        if let Some(name) = named("table ") {
            table = name;
        } else if let Some(name) = named("chain ") {
            (chain, hook) = (name, None);
        } else if line.starts_with("type nat ") {
            hook = [Hook::Prerouting, Hook::Output]
                .into_iter()
                .find(|hook| line.contains(&format!(" hook {} ", hook.nft())));
        }
        let is_udp = line.contains("udp") && !line.contains("tcp");
        if input::is_ours(table) || shown.contains(&table) || is_udp {
            continue;
        }
        let Some((asks, (address, to))) = translation(line) else { continue };
        leads.push(Lead {
            rule: format!("nft add rule {table} {chain} {line}"),
            removal: format!("nft -a list chain {table} {chain}, then nft delete rule {table} {chain} handle <number>"),
            address,
            to,
            from: asks.split_once("dport ").map_or_else(Ports::all, |(_, ports)| asked(ports)),
            destination: ["ip daddr ", "ip6 daddr "]
                .iter()
                .find_map(|word| asks.split_once(word))
                .and_then(|(_, rest)| network(rest.split(' ').next()?)),
            hook,
        });
    }
    leads
}

/// What a rule of nft asks for, and where it leads. `None` if it translates no destination, or leaves the port as it was. What
/// cannot be read may lead to any port of this host.
fn translation(line: &str) -> Option<(&str, (Option<IpAddr>, Ports))> {
    let unknown = (None, Ports::all());
    // As rules are shown that iptables wrote and nft does not know.
    for target in ["xt target \"REDIRECT\"", "xt target \"DNAT\"", "# xt_REDIRECT", "# xt_DNAT"] {
        if let Some((asks, _)) = line.split_once(target) {
            return Some((asks, unknown));
        }
    }
    let words = words(line);
    let at = words.iter().position(|word| matches!(*word, "dnat" | "redirect"))?;
    let (asks, _) = line.split_once(words.get(at)?)?;
    let rest = words.get(at + 1..).unwrap_or_default();
    let to = rest.iter().position(|word| *word == "to");
    let (how, to) = match to {
        Some(to) => (rest.get(..to).unwrap_or_default(), rest.get(to + 1..).unwrap_or_default()),
        // To the same port of this host.
        None => return None,
    };
    let target = match (how, to) {
        // An address and a port, together.
        (_, [address, ".", port, more @ ..]) if !more.contains(&"map") => {
            match address.parse::<IpAddr>() {
                Ok(address) => (Some(address), Ports::read(port)),
                Err(_) => unknown,
            }
        }
        ([] | ["ip" | "ip6"], [first, ..]) => target(first)?,
        _ => unknown,
    };
    Some((asks, target))
}

/// An address, or a network.
fn network(text: &str) -> Option<IpNet> {
    text.parse().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

/// The ports after `dport`, in the words of nft.
fn asked(text: &str) -> Ports {
    let text = text.trim_start();
    match text.strip_prefix('{').and_then(|set| set.split_once('}')) {
        Some((set, _)) => Ports::read(set),
        None => Ports::read(text.split(' ').next().unwrap_or_default()),
    }
}

/// `:port`, `address:port` or `[address]:port`, or with a range of ports. `None` for an address without a port, which leaves
/// the port as it was. What cannot be read, such as a map, may be anything.
fn target(text: &str) -> Option<(Option<IpAddr>, Ports)> {
    let bare = |text: &str| text.trim_matches(['[', ']']).parse::<IpAddr>();
    if bare(text).is_ok() || text.contains('-') && !text.contains(':') {
        return None;
    }
    let unknown = || Some((None, Ports::all()));
    let Some((address, port)) = text.rsplit_once(':') else { return unknown() };
    match (address, bare(address)) {
        ("", _) => Some((None, Ports::read(port))),
        (_, Ok(address)) => Some((Some(address), Ports::read(port))),
        (_, Err(_)) => unknown(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(leads: &[Lead]) -> Vec<(String, u16)> {
        let address = |lead: &Lead| lead.address.map_or(String::new(), |a| a.to_string());
        leads.iter().map(|lead| (address(lead), lead.port().unwrap_or(0))).collect()
    }

    const HERE: &str = "172.17.0.1";

    /// Of these ports, those that it may take for port 9999 of this host, from containers and from this host itself.
    fn taken(leads: &[Lead]) -> Vec<String> {
        let local = [HERE.parse().unwrap()].into();
        let of = |lead: &Lead| {
            let takes =
                |port: u16, hook| lead.may_lead_to(9999, &local) && lead.may_take(port, hook);
            [79, 80, 81, 92, 443]
                .into_iter()
                .map(|port| match (takes(port, Hook::Prerouting), takes(port, Hook::Output)) {
                    (true, true) => format!("{port} "),
                    (true, false) => format!("{port}c "),
                    (false, true) => format!("{port}h "),
                    (false, false) => String::new(),
                })
                .collect::<String>()
        };
        leads.iter().map(|lead| of(lead).trim_end().to_owned()).collect()
    }

    #[test]
    fn which_connections_a_rule_of_iptables_takes_is_read_and_what_cannot_be_read_may_be_any() {
        for (rule, expected) in [
            ("PREROUTING -p tcp -j REDIRECT --to-ports 9999", "79c 80c 81c 92c 443c"),
            ("PREROUTING -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 9999", "80c"),
            ("OUTPUT -p tcp -m tcp --dport 80:92 -j REDIRECT --to-ports 9999", "80h 81h 92h"),
            (
                "PREROUTING -p tcp -m multiport --dports 79,90:95 -j REDIRECT --to-ports 9999",
                "79c 92c",
            ),
            (
                "PREROUTING -p tcp -m tcp ! --dport 80 -j REDIRECT --to-ports 9999",
                "79c 80c 81c 92c 443c",
            ),
            ("MINE -p tcp -m tcp --dport 443 -j REDIRECT --to-ports 9000-9999", "443"),
            ("PREROUTING -p tcp -j DNAT --to-destination 172.17.0.1:9999", "79c 80c 81c 92c 443c"),
            // To a container that publishes this port, or to another port.
            (
                "DOCKER ! -i docker0 -p tcp -m tcp --dport 9999 -j DNAT --to-destination 172.17.0.2:9999",
                "",
            ),
            ("PREROUTING -p tcp -j REDIRECT --to-ports 9998", ""),
        ] {
            let leads = in_iptables(&format!("-A {rule}\n"), "iptables");
            assert_eq!(taken(&leads), [expected], "{rule}");
        }
        // A negated protocol, and a comment that looks like a target.
        for (rule, expected) in [
            ("OUTPUT ! -p udp -j DNAT --to-destination 172.17.0.1:9999", "79h 80h 81h 92h 443h"),
            (
                "OUTPUT -p tcp -m comment --comment \"a -j b\" -m tcp --dport 80 -j REDIRECT --to-ports 9999",
                "80h",
            ),
            ("EMBASSY_MINE -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 9999", "80"),
        ] {
            let leads = in_iptables(&format!("-A {rule}\n"), "iptables");
            assert_eq!(taken(&leads), [expected], "{rule}");
        }
        // The port stays as it was.
        assert!(
            in_iptables("-A PREROUTING -p tcp -j DNAT --to-destination 1.2.3.4\n", "iptables")
                .is_empty()
        );
    }

    #[test]
    fn whether_a_rule_takes_embassys_own_connections_is_known_by_where_they_go() {
        let takes = |rule: &str, server: &str| {
            in_iptables(&format!("-A {rule} -j REDIRECT --to-ports 9999\n"), "iptables")[0]
                .takes_own(server.parse().unwrap())
        };
        let consul = "172.17.0.1:8500";
        assert!(takes("OUTPUT -d 172.17.0.1/32 -p tcp", consul));
        assert!(takes("OUTPUT -d 172.17.0.0/16 -p tcp -m tcp --dport 8500", consul));
        assert!(takes("OUTPUT -p tcp", "[fd00::1]:2379"));
        for other in [
            "PREROUTING -d 172.17.0.1/32 -p tcp",
            "OUTPUT -d 172.17.0.2/32 -p tcp",
            "OUTPUT -d 172.17.0.1/32 -p tcp -m tcp --dport 80",
            "OUTPUT -d 172.17.0.1/32 -p tcp -m owner ! --uid-owner 65532",
        ] {
            assert!(!takes(other, consul), "{other}");
        }
        let nft = |asks: &str| {
            let chain = "table ip mine {\nchain out {\ntype nat hook output priority -100; policy accept;\n";
            in_nft(&format!("{chain}{asks} redirect to :9999\n}}\n}}\n"), &[])[0]
                .takes_own(consul.parse().unwrap())
        };
        assert!(nft("ip daddr 172.17.0.1 tcp dport 8500") && nft("meta l4proto tcp"));
        assert!(
            !nft("ip daddr 172.17.0.2 tcp dport 8500") && !nft("meta skuid != 7 meta l4proto tcp")
        );
    }

    #[test]
    fn which_connections_a_rule_of_nft_takes_is_read_and_what_cannot_be_read_may_be_any() {
        let chain = "table ip mine {\n\tchain pre {\n\t\ttype nat hook prerouting priority dstnat; policy accept;\n";
        let all = "79c 80c 81c 92c 443c";
        for (rule, expected) in [
            ("meta l4proto tcp redirect to :9999", all),
            (
                "ip daddr 1.2.3.4 tcp dport { 80, 81, 90-95 } counter redirect to :9999",
                "80c 81c 92c",
            ),
            ("tcp dport 80 redirect to :9999", "80c"),
            ("meta l4proto { tcp, udp } th dport 80-81 redirect to :9999", "80c 81c"),
            ("tcp dport @ports redirect to :9999", all),
            ("tcp dport != 80 redirect to :9999", all),
            ("meta l4proto tcp redirect to :tcp dport map @m", all),
            ("ip protocol tcp dnat to tcp dport map { 80 : 1.2.3.4 . 9999 }", all),
            ("tcp dport 443 dnat to 172.17.0.1:9000-9999", "443c"),
            ("tcp dport 443 dnat ip to 172.17.0.2:9999", ""),
            ("dnat ip addr . port to ip daddr . tcp dport map @m", all),
            ("tcp dport 80 dnat ip addr . port to 172.17.0.1 . 9999", "80c"),
            ("tcp dport 80 dnat ip addr . port to 172.17.0.2 . 9999", ""),
            ("tcp dport 80 dnat ip to tcp dport map { 80 : 172.17.0.1 . 9999 }", "80c"),
            ("tcp dport 80 dnat ip prefix to ip daddr map @m", "80c"),
            ("tcp dport 80 xt target \"DNAT\"", "80c"),
            ("tcp dport 80 counter packets 0 bytes 0 # xt_REDIRECT", "80c"),
            ("tcp dport 80 dnat to 172.17.0.1:9999 comment \"my dnat to it\"", "80c"),
        ] {
            let leads = in_nft(&format!("{chain}\t\t{rule}\n\t}}\n}}\n"), &[]);
            assert_eq!(taken(&leads), [expected], "{rule}");
        }
        // Of a chain that another one jumps to, it is not known where it is looked at.
        let jumped = "table ip mine {\n\tchain x {\n\t\ttcp dport 80 redirect to :9999\n\t}\n}\n";
        assert_eq!(taken(&in_nft(jumped, &[])), ["80"]);
        let output =
            chain.replace("prerouting", "output") + "\t\ttcp dport 80 redirect to :9999\n\t}\n}\n";
        assert_eq!(taken(&in_nft(&output, &[])), ["80h"]);
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
        let expected = [("", 3232), ("10.0.0.5", 3232), ("", 9999), ("", 0), ("172.17.0.2", 80)];
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
    fn rules_of_both_iptables_are_found_each_once() {
        let rule = |port: u16| {
            format!("*nat\n-A PREROUTING -p tcp -j REDIRECT --to-ports {port}\nCOMMIT\n")
        };
        let (one, two, none) = (rule(1), rule(2), "*nat\nCOMMIT\n".to_owned());
        let of = |saved: Option<&String>, old: Option<&String>| {
            let (saved, old) = (saved.map(|text| &**text), old.map(|text| &**text));
            let (leads, is_shown) = both(saved, old, "iptables", "iptables-legacy");
            let told = leads.iter().map(|lead| {
                format!("{} {}", lead.rule.split(' ').next().unwrap(), lead.port().unwrap())
            });
            (told.collect::<Vec<_>>().join(", "), is_shown)
        };
        let told = |text: &str, is_shown| (text.to_owned(), is_shown);
        assert_eq!(of(Some(&one), None), told("iptables 1", true));
        assert_eq!(of(None, None), told("", false));
        assert_eq!(of(Some(&one), Some(&two)), told("iptables 1, iptables-legacy 2", true));
        assert_eq!(of(Some(&none), Some(&two)), told("iptables-legacy 2", true));
        assert_eq!(of(None, Some(&two)), told("iptables-legacy 2", false));
        // The older program is the only one: a table of the same name in nft is another one.
        assert_eq!(of(Some(&one), Some(&one)), told("iptables 1", false));
    }

    #[test]
    fn a_chain_that_no_program_shows_is_known() {
        let unseen = |chains: &[&'static str]| unseen(chains.iter().copied(), &["ip nat"]);
        let known = ["ip nat PREROUTING", "inet embassy prerouting", "inet embassy_draining_7 out"];
        assert_eq!(unseen(&known), None);
        for other in ["inet mine pre", "ip nat2 PREROUTING", "ip embassy pre", "inet embassy_x pre"]
        {
            assert_eq!(unseen(&[known[0], other, known[1]]), Some(other));
        }
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
            table ip embassy_redirect {\n\tchain pre {\n\t\ttcp dport 80 redirect to :3234\n\t}\n}\n\
            table inet embassy {\n\tchain declared {\n\t\tredirect to :9999\n\t}\n}\n";
        let others = [("172.17.0.1", 3232), ("fd00::2", 3233), ("", 3234)]
            .map(|(address, port)| (address.to_owned(), port));
        assert_eq!(found(&in_nft(ruleset, &["ip nat"])), others);
        let all = in_nft(ruleset, &[]);
        assert_eq!(found(&all), [&[(String::new(), 9999)], &others[..]].concat());
        assert!(all[0].rule.starts_with("nft add rule ip nat PREROUTING ip daddr 172.17.42.1"));
    }
}
