//! Reads rules of other programs that redirect connections to a port of this host: the user's own rules, or leftovers.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
};

use ipnet::IpNet;

use super::{
    input::{self, LEGACY_TABLES, words},
    netlink::{self, Conditions, NetlinkError, PortRanges, Socket, Translation},
    program::Program,
    rules::{CHAINS, Hook},
};

pub use super::netlink::By;

/// A rule that leads connections to a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lead {
    /// The rule, as its own program shows it; with `...` for conditions that cannot be read.
    pub rule: String,
    /// How to delete it.
    pub removal: String,
    pub by: By,
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
    /// Whether it has conditions that are not read.
    pub more: bool,
    /// Whether it may spare connections of some users.
    pub spares: bool,
}

impl Lead {
    /// The port to which it redirects. `None`: several are possible.
    pub fn port(&self) -> Option<u16> {
        self.to.only()
    }

    /// Whether it may redirect to this port of a host with these addresses.
    pub fn may_lead_to(&self, port: u16, local: &BTreeSet<IpAddr>) -> bool {
        self.to.contains(port) && self.address.is_none_or(|address| local.contains(&address))
    }

    /// Whether it matches embassy's own connections to this server, as far as its conditions can be read. A rule that
    /// excepts a user, a mark or a control group is taken as not matching.
    pub fn takes_own(&self, server: SocketAddr) -> bool {
        self.may_take(server.port(), Hook::Output)
            && self.destination.is_none_or(|net| net.contains(&server.ip()))
            && !self.spares
    }

    /// Whether it may match connections to a port that pass this hook.
    pub fn may_take(&self, port: u16, hook: Hook) -> bool {
        self.from.contains(port) && self.hook.is_none_or(|of| of == hook)
    }
}

/// Ports in a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ports(Vec<RangeInclusive<u16>>);

impl Ports {
    /// All ports: there is no condition, or it cannot be read.
    pub fn all() -> Self {
        Self(vec![0..=u16::MAX])
    }

    pub fn one(port: u16) -> Self {
        Self(vec![port..=port])
    }

    pub fn contains(&self, port: u16) -> bool {
        self.0.iter().any(|range| range.contains(&port))
    }

    /// The port, if there is only one.
    fn only(&self) -> Option<u16> {
        match self.0.as_slice() {
            [range] if range.start() == range.end() => Some(*range.start()),
            _ => None,
        }
    }

    /// Reads `80`, `80:90` or `80-90`, or several of them separated by commas. Anything else counts as all ports.
    fn read(text: &str) -> Self {
        let range = |text: &str| {
            let text = text.trim();
            let (first, last) = text.split_once([':', '-']).unwrap_or((text, text));
            Some(first.parse().ok()?..=last.parse().ok()?)
        };
        text.split(',').map(range).collect::<Option<_>>().map_or_else(Self::all, Self)
    }

    /// The first and last port of each range with this between them, and commas. `None` for all ports.
    fn written(&self, between: char) -> Option<String> {
        let range = |range: &RangeInclusive<u16>| match (range.start(), range.end()) {
            (first, last) if first == last => first.to_string(),
            (first, last) => format!("{first}{between}{last}"),
        };
        let is_all = self.contains(0) && self.contains(u16::MAX);
        (!is_all).then(|| self.0.iter().map(range).collect::<Vec<_>>().join(","))
    }
}

impl From<PortRanges> for Ports {
    fn from(PortRanges(ranges): PortRanges) -> Self {
        Self(ranges)
    }
}

/// All such rules, except those of embassy. Only reads. Those of nf_tables are read from the kernel; only the older iptables needs its
/// program. The error says why they cannot be read, or not all of them.
pub async fn read() -> Result<Vec<Lead>, String> {
    let mut leads = match in_kernel() {
        Ok(leads) => leads,
        // A kernel without nf_tables has no rules of it.
        Err(error) if error.is_missing() => Vec::new(),
        Err(error) => return Err(error.to_string()),
    };
    for (programs, names) in OLDER.into_iter().zip(LEGACY_TABLES) {
        let tables = input::legacy_tables(names);
        for table in ["nat", "mangle"] {
            if tables.lines().any(|name| name == table) {
                leads.extend(older(programs, table).await?);
            }
        }
    }
    Ok(leads)
}

/// The rules of nf_tables, those of the newer iptables among them.
fn in_kernel() -> Result<Vec<Lead>, NetlinkError> {
    let is_ours = |table: &str, chain: &str| {
        input::is_ours(table) || is_of_iptables(table) && CHAINS.contains(&chain)
    };
    let all = netlink::translations(&mut Socket::open()?, is_ours)?;
    Ok(all.into_iter().map(in_nf_tables).collect())
}

/// The programs of the older iptables, each with the name that it has where it is the only one.
const OLDER: [[(&str, &str); 2]; 2] = [
    [("iptables-legacy-save", "iptables-legacy"), ("iptables-save", "iptables")],
    [("ip6tables-legacy-save", "ip6tables-legacy"), ("ip6tables-save", "ip6tables")],
];

/// The rules in a table of the older iptables.
async fn older(
    programs: [(&'static str, &str); 2],
    table: &'static str,
) -> Result<Vec<Lead>, String> {
    for (save, program) in programs {
        let is_older = save.contains("legacy") || !is_of_nft(save).await;
        match Program(save).run(&["-t", table], "").await {
            Ok(saved) if is_older => return Ok(in_iptables(&saved, table, program)),
            Err(error) if is_older && !error.is_missing() => return Err(error.to_string()),
            Ok(_) | Err(_) => {}
        }
    }
    let [(save, _), _] = programs;
    Err(format!("the older iptables has a table {table} here, and {save} is not installed"))
}

/// Whether an iptables program writes to nf_tables. If its version does not say so, it is the older one.
async fn is_of_nft(save: &'static str) -> bool {
    Program(save).run(&["-V"], "").await.is_ok_and(|version| version.contains("nf_tables"))
}

/// Whether a table of nf_tables, by family and name, is one that iptables writes.
fn is_of_iptables(table: &str) -> bool {
    let names = table.split_once(' ');
    names.is_some_and(|(family, name)| {
        ["ip", "ip6"].contains(&family) && ["nat", "mangle"].contains(&name)
    })
}

/// A rule of nf_tables, in the words of the program that wrote it.
fn in_nf_tables(rule: Translation) -> Lead {
    let Translation { table, chain, handle, hook, by, of_iptables, address, to, conditions } = rule;
    let Conditions { ports, destination, more, spares } = conditions;
    let (to, from) = (Ports::from(to), Ports::from(ports));
    let place = format!("{table} {chain}");
    let by_handle = format!("nft delete rule {place} handle {handle}");
    let (rule, removal) = match table.split_once(' ') {
        Some((family, name)) if of_iptables => {
            let program = if family == "ip6" { "ip6tables" } else { "iptables" };
            let text = as_iptables(by, address, &to, &from, destination, more);
            let is_whole = !more && to.only().is_some();
            let rule = format!("{program} -t {name} -A {chain} {text}");
            let removal = format!("{program} -t {name} -D {chain} {text}");
            (rule, if is_whole { removal } else { by_handle })
        }
        _ => {
            let text = as_nft(by, address, &to, &from, destination, more);
            (format!("nft rule {place} {text} (handle {handle})"), by_handle)
        }
    };
    Lead { rule, removal, by, address, to, from, destination, hook, more, spares }
}

fn as_iptables(
    by: By,
    address: Option<IpAddr>,
    to: &Ports,
    from: &Ports,
    destination: Option<IpNet>,
    more: bool,
) -> String {
    let mut words = Vec::new();
    words.extend(destination.map(|net| format!("-d {net}")));
    words.push("-p tcp".to_owned());
    words.extend(from.written(':').map(|ports| match ports.contains(',') {
        true => format!("-m multiport --dports {ports}"),
        false => format!("-m tcp --dport {ports}"),
    }));
    words.extend(more.then(|| "...".to_owned()));
    let ports = to.written('-').unwrap_or_else(|| "...".to_owned());
    words.push(match (by, address) {
        (By::Redirect, _) => format!("-j REDIRECT --to-ports {ports}"),
        (By::Dnat, Some(address)) => format!("-j DNAT --to-destination {}:{ports}", host(address)),
        (By::Dnat, None) => format!("-j DNAT --to-destination :{ports}"),
        (By::Tproxy, Some(address)) => format!("-j TPROXY --on-port {ports} --on-ip {address}"),
        (By::Tproxy, None) => format!("-j TPROXY --on-port {ports}"),
    });
    words.join(" ")
}

fn as_nft(
    by: By,
    address: Option<IpAddr>,
    to: &Ports,
    from: &Ports,
    destination: Option<IpNet>,
    more: bool,
) -> String {
    let mut words = Vec::new();
    words.extend(destination.map(|net| {
        let family = if net.addr().is_ipv6() { "ip6" } else { "ip" };
        match net.prefix_len() == net.max_prefix_len() {
            true => format!("{family} daddr {}", net.addr()),
            false => format!("{family} daddr {net}"),
        }
    }));
    words.extend(from.written('-').map(|ports| match ports.contains(',') {
        true => format!("tcp dport {{ {} }}", ports.replace(',', ", ")),
        false => format!("tcp dport {ports}"),
    }));
    words.extend(more.then(|| "...".to_owned()));
    let ports = to.written('-').unwrap_or_else(|| "...".to_owned());
    let address = address.map(host).unwrap_or_default();
    words.push(match by {
        By::Redirect => format!("redirect to :{ports}"),
        By::Dnat => format!("dnat to {address}:{ports}"),
        By::Tproxy => format!("tproxy to {address}:{ports}"),
    });
    words.join(" ")
}

/// An address before a port.
fn host(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    }
}

/// The rules in the text of `iptables-save -t <table>`.
pub fn in_iptables(saved: &str, table: &str, program: &str) -> Vec<Lead> {
    let lead = |line: &str| {
        let rule = line.strip_prefix("-A ")?;
        let words = words(rule);
        let (chain, words) = words.split_first()?;
        if CHAINS.contains(chain) {
            return None;
        }
        // The word after the one named `name`, and whether the condition is negated.
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
        let (by, (address, to)) = match after("-j")? {
            "REDIRECT" => (By::Redirect, (None, Ports::read(after("--to-ports")?))),
            "DNAT" => (By::Dnat, target(after("--to-destination")?)?),
            "TPROXY" => {
                let address = after("--on-ip").and_then(|address| address.parse::<IpAddr>().ok());
                let address = address.filter(|address| !address.is_unspecified());
                (By::Tproxy, (address, Ports::read(after("--on-port")?)))
            }
            _ => return None,
        };
        const READ: [&str; 8] = ["-p", "-d", "--dport", "--dports", "-m", "-j", "--comment", "!"];
        let conditions = words.iter().take_while(|word| **word != "-j");
        let conditions: Vec<_> = conditions.filter(|word| word.starts_with(['-', '!'])).collect();
        Some(Lead {
            rule: format!("{program} -t {table} -A {rule}"),
            removal: format!("{program} -t {table} -D {rule}"),
            by,
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
            more: conditions.iter().any(|word| !READ.contains(*word) || **word == "!"),
            spares: ["owner", "mark", "cgroup", "!"].iter().any(|word| words.contains(word)),
        })
    };
    saved.lines().filter_map(lead).collect()
}

/// An address, or a network.
fn network(text: &str) -> Option<IpNet> {
    text.parse().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

/// Reads `:port`, `address:port` or `[address]:port`, also with a range of ports. `None` for an address without a port: the
/// port stays the same. What cannot be read, such as a map, counts as any port.
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
    use crate::capture::nft::tests::{enter_a_namespace_of_its_own, nft};

    fn found(leads: &[Lead]) -> Vec<(String, u16)> {
        let address = |lead: &Lead| lead.address.map_or(String::new(), |a| a.to_string());
        leads.iter().map(|lead| (address(lead), lead.port().unwrap_or(0))).collect()
    }

    const HERE: &str = "172.17.0.1";

    /// Which of some ports the rules may redirect to port 9999 of this host: from containers (c) and from this host (h).
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
            // Redirects to a container that publishes this port, and to another port.
            (
                "DOCKER ! -i docker0 -p tcp -m tcp --dport 9999 -j DNAT --to-destination 172.17.0.2:9999",
                "",
            ),
            ("PREROUTING -p tcp -j REDIRECT --to-ports 9998", ""),
        ] {
            let leads = in_iptables(&format!("-A {rule}\n"), "nat", "iptables");
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
            let leads = in_iptables(&format!("-A {rule}\n"), "nat", "iptables");
            assert_eq!(taken(&leads), [expected], "{rule}");
        }
        // The port stays the same.
        assert!(
            in_iptables(
                "-A PREROUTING -p tcp -j DNAT --to-destination 1.2.3.4\n",
                "nat",
                "iptables"
            )
            .is_empty()
        );
    }

    #[test]
    fn whether_a_rule_takes_embassys_own_connections_is_known_by_where_they_go() {
        enter_a_namespace_of_its_own();
        let takes = |lead: &Lead, server: &str| lead.takes_own(server.parse().unwrap());
        let old = |rule: &str, server: &str| {
            let text = format!("-A {rule} -j REDIRECT --to-ports 9999\n");
            takes(&in_iptables(&text, "nat", "iptables")[0], server)
        };
        let new = |rule: &str, server: &str| {
            iptables(&format!("-t nat -A {rule} -j REDIRECT --to-ports 9999"));
            let leads = in_kernel().unwrap();
            iptables("-t nat -F");
            takes(&leads[0], server)
        };
        let consul = "172.17.0.1:8500";
        for takes in [&old as &dyn Fn(&str, &str) -> bool, &new] {
            assert!(takes("OUTPUT -d 172.17.0.1/32 -p tcp", consul));
            assert!(takes("OUTPUT -d 172.17.0.0/16 -p tcp -m tcp --dport 8500", consul));
            assert!(takes("OUTPUT -d 172.16.0.0/12 -p tcp -m tcp --dport 8500", consul));
            for other in [
                "PREROUTING -d 172.17.0.1/32 -p tcp",
                "OUTPUT -d 172.17.0.2/32 -p tcp",
                "OUTPUT -d 172.18.0.0/16 -p tcp",
                "OUTPUT -d 172.17.0.1/32 -p tcp -m tcp --dport 80",
                "OUTPUT -d 172.17.0.1/32 -p tcp -m owner ! --uid-owner 65532",
            ] {
                assert!(!takes(other, consul), "{other}");
            }
        }
        let nft =
            |asks: &str| takes(&of_nft("output", &format!("{asks} redirect to :9999"))[0], consul);
        assert!(nft("ip daddr 172.17.0.1 tcp dport 8500") && nft("meta l4proto tcp"));
        assert!(!nft("ip daddr 172.17.0.2 tcp dport 8500"));
        assert!(!nft("meta skuid != 7 meta l4proto tcp"));
        assert!(old("OUTPUT -p tcp", "[fd00::1]:2379"));
    }

    fn iptables(words: &str) {
        let output = std::process::Command::new("iptables-nft").args(words.split(' ')).output();
        let output = output.expect("iptables");
        assert!(output.status.success(), "{words}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// The leads of one rule in a chain at this hook, as the kernel has it.
    fn of_nft(hook: &str, rule: &str) -> Vec<Lead> {
        of_chain(&format!("type nat hook {hook} priority -100; policy accept;"), rule)
    }

    fn of_chain(chain: &str, rule: &str) -> Vec<Lead> {
        let text = format!(
            "table ip mine {{\nset ports {{ type inet_service; elements = {{ 80 }}; }}\n\
             map m {{ type inet_service : inet_service; elements = {{ 80 : 9999 }}; }}\n\
             chain x {{\n{chain}\n{rule}\n}}\n}}\n"
        );
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        nft(&format!("-f {}", file.path().display())).unwrap();
        let leads = in_kernel().unwrap();
        nft("delete table ip mine").unwrap();
        leads
    }

    #[test]
    fn which_connections_a_rule_of_nft_takes_is_read_and_what_cannot_be_read_may_be_any() {
        enter_a_namespace_of_its_own();
        let all = "79c 80c 81c 92c 443c";
        for (rule, expected) in [
            ("meta l4proto tcp redirect to :9999", all),
            (
                "ip daddr 1.2.3.4 tcp dport { 80, 81, 90-95 } counter redirect to :9999",
                "80c 81c 92c",
            ),
            ("tcp dport { 80, 443 } redirect to :9999", "80c 443c"),
            ("tcp dport != { 80, 443 } redirect to :9999", "79c 81c 92c"),
            ("tcp dport 80 redirect to :9999", "80c"),
            ("tcp dport > 80 redirect to :9999", "81c 92c 443c"),
            ("meta l4proto { tcp, udp } th dport 80-81 redirect to :9999", "80c 81c"),
            ("tcp dport @ports redirect to :9999", all),
            ("ip daddr . tcp dport { 1.2.3.4 . 80 } redirect to :9999", all),
            ("tcp dport != 80 redirect to :9999", "79c 81c 92c 443c"),
            ("tcp dport != 80-81 redirect to :9999", "79c 92c 443c"),
            ("meta l4proto tcp redirect to :tcp dport map @m", all),
            ("tcp dport 443 dnat to 172.17.0.1:9000-9999", "443c"),
            ("tcp dport 443 dnat to 172.17.0.2:9999", ""),
            ("tcp dport 80 dnat to 172.17.0.1:9999", "80c"),
            (
                "meta l4proto tcp dnat ip addr . port to ip daddr . tcp dport map { 1.2.3.4 . 80 : 172.17.0.1 . 9999 }",
                all,
            ),
            ("tcp dport 80 redirect to :9999 comment \"my dnat to it\"", "80c"),
            // Conditions that are not read, into the register of one that is.
            ("tcp dport 80 fib daddr type local redirect to :9999", "80c"),
            ("meta l4proto tcp fib daddr type local redirect to :9999", all),
            ("tcp dport 80 ct mark 5 redirect to :9999", "80c"),
            ("tcp dport 80 ct direction original redirect to :9999", "80c"),
            ("ct direction original tcp dport 80 redirect to :9999", "80c"),
            ("tcp dport . ct mark { 80 . 5 } redirect to :9999", all),
            ("tcp dport 80 numgen random mod 2 0 redirect to :9999", "80c"),
        ] {
            assert_eq!(taken(&of_nft("prerouting", rule)), [expected], "{rule}");
        }
        // For another protocol, and where the port stays as it was.
        for rule in [
            "udp dport 80 redirect to :9999",
            "tcp dport 80 dnat to 172.17.0.1",
            "tcp dport 80 redirect",
        ] {
            assert!(of_nft("prerouting", rule).is_empty(), "{rule}");
        }
        // Of a chain that another one jumps to, it is not known where it is looked at.
        assert_eq!(taken(&of_chain("", "tcp dport 80 redirect to :9999")), ["80"]);
        assert_eq!(taken(&of_nft("output", "tcp dport 80 redirect to :9999")), ["80h"]);
        // A transparent proxy.
        let tproxy = "tcp dport 80 tproxy to :9999 meta mark set 1";
        let leads = of_chain("type filter hook prerouting priority -150; policy accept;", tproxy);
        assert_eq!((taken(&leads), leads[0].by), (vec!["80c".to_owned()], By::Tproxy));
        assert!(!leads[0].more);
    }

    /// The same rules as the text of the older iptables has them, but for what only one of the two shows.
    #[test]
    fn rules_of_the_newer_iptables_are_read_from_the_kernel_and_can_be_deleted() {
        enter_a_namespace_of_its_own();
        for rule in [
            "PREROUTING -d 172.17.42.1/32 -p tcp -j REDIRECT --to-ports 3232",
            "PREROUTING -d 172.17.0.0/16 -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 9999",
            "OUTPUT -p tcp -m tcp --dport 80:92 -j REDIRECT --to-ports 9999",
            "PREROUTING -p tcp -m multiport --dports 79,90:95 -j REDIRECT --to-ports 9999",
            "PREROUTING -p tcp -m tcp --dport 443 -j DNAT --to-destination 172.17.0.1:9999",
        ] {
            iptables(&format!("-t nat -A {rule}"));
            let read = in_kernel().unwrap();
            let text = in_iptables(&format!("-A {rule}\n"), "nat", "iptables");
            assert_eq!(read, text, "{rule}");
            // The command deletes it.
            iptables(read[0].removal.strip_prefix("iptables ").unwrap());
            assert_eq!(in_kernel().unwrap(), [], "{rule}");
        }
        for (rule, expected) in [
            (
                "PREROUTING -p tcp -m tcp ! --dport 80 -j REDIRECT --to-ports 9999",
                "79c 81c 92c 443c",
            ),
            (
                "OUTPUT -p tcp -m comment --comment a-j-b -m tcp --dport 80 -j REDIRECT --to-ports 9999",
                "80h",
            ),
            ("PREROUTING -i docker0 -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 9999", "80c"),
        ] {
            iptables(&format!("-t nat -A {rule}"));
            assert_eq!(taken(&in_kernel().unwrap()), [expected], "{rule}");
            iptables("-t nat -F");
        }
        // A condition that is not read: it is said, and the rule is deleted by its number.
        iptables(
            "-t nat -A PREROUTING -i docker0 -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 9999",
        );
        let read = in_kernel().unwrap();
        assert_eq!(
            read[0].rule,
            "iptables -t nat -A PREROUTING -p tcp -m tcp --dport 80 ... -j REDIRECT --to-ports 9999"
        );
        nft(read[0].removal.strip_prefix("nft ").unwrap()).unwrap();
        for of_others in [
            "-t nat -A PREROUTING -p udp -j REDIRECT --to-ports 53",
            "-t nat -A POSTROUTING -s 172.17.0.0/16 -j MASQUERADE",
            "-t nat -N EMBASSY",
            "-t nat -A EMBASSY -p tcp -j REDIRECT --to-ports 9999",
            "-t nat -A PREROUTING -p tcp -j DNAT --to-destination 1.2.3.4",
        ] {
            iptables(of_others);
        }
        assert_eq!(in_kernel().unwrap(), []);
        iptables("-t mangle -A PREROUTING -p tcp --dport 80 -j TPROXY --on-port 9999");
        let read = in_kernel().unwrap();
        assert_eq!((taken(&read), read[0].by), (vec!["80c".to_owned()], By::Tproxy), "{read:?}");
    }

    #[test]
    fn rules_of_the_older_iptables_are_found_and_can_be_deleted() {
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
        let leads = in_iptables(saved, "nat", "iptables");
        let expected = [("", 3232), ("10.0.0.5", 3232), ("", 9999), ("", 0), ("172.17.0.2", 80)];
        let expected: Vec<_> = expected.iter().map(|(a, p)| ((*a).to_owned(), *p)).collect();
        assert_eq!(found(&leads), expected);
        assert_eq!(
            leads[2].removal,
            "iptables -t nat -D OUTPUT -p tcp -m comment --comment \"a b\" -j REDIRECT --to-ports 9999"
        );
        let mangle = "*mangle\n-A PREROUTING -p tcp -m tcp --dport 80 -j TPROXY --on-port 9999 --on-ip 0.0.0.0 --tproxy-mark 0x0/0x0\nCOMMIT\n";
        let tproxy = &in_iptables(mangle, "mangle", "iptables-legacy")[0];
        assert_eq!((tproxy.by, tproxy.address, tproxy.port()), (By::Tproxy, None, Some(9999)));
        assert!(tproxy.rule.starts_with("iptables-legacy -t mangle -A PREROUTING"), "{tproxy:?}");
    }
}
