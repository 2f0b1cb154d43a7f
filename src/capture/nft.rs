//! nftables: one table, `inet embassy`, replaced as a whole in one transaction.

use std::{
    collections::BTreeSet,
    fmt::{self, Display, Write},
    net::IpAddr,
};

use ipnet::IpNet;

use super::{
    Script,
    program::{Program, ProgramError},
    rules::{MARK, NAME, Rules},
};
use crate::config::CaptureScope;

/// Before connection tracking, which is at -200.
const RAW: i32 = -300;

const NFT: Program = Program("nft");

/// What begins an expression of a family, and what ends the names of its sets.
const FAMILIES: [(&str, u8); 2] = [("ip", 4), ("ip6", 6)];

/// Puts `rules` in place of whatever the table held. How many of them [`count`].
pub(super) async fn apply(rules: &Rules) -> Result<usize, ProgramError> {
    let script = script(rules);
    NFT.run(&["-f", "-"], &script).await?;
    Ok(count(&script))
}

/// The rules that capture, in a script or a listing.
pub(super) fn count(text: &str) -> usize {
    text.matches("redirect to :").count()
}

/// What [`apply`] would do.
pub(super) fn plan(rules: &Rules) -> Script {
    Script { command: "nft -f -".to_owned(), text: script(rules) }
}

/// The table as the kernel has it; `None` where there is none.
pub(super) async fn installed() -> Result<Option<String>, ProgramError> {
    match NFT.run(&["-s", "list", "table", "inet", NAME], "").await {
        Ok(text) => Ok(Some(text)),
        Err(ProgramError::Failed { stderr, .. })
            if stderr.contains("No such file or directory") =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Takes the table away, if there is one. Whether there was.
pub(super) async fn remove() -> Result<bool, ProgramError> {
    match installed().await {
        Ok(None) => return Ok(false),
        Err(error) if error.is_missing() => return Err(error),
        // A listing that failed does not say that there is nothing.
        Ok(Some(_)) | Err(_) => {}
    }
    // Declared first, so that deleting it cannot fail where somebody else was quicker.
    NFT.run(&["-f", "-"], &format!("table inet {NAME}\ndelete table inet {NAME}\n"))
        .await
        .map(|_| true)
}

/// The names of all tables.
pub(super) async fn tables() -> Result<String, ProgramError> {
    NFT.run(&["list", "tables"], "").await
}

/// One transaction that replaces the table.
fn script(rules: &Rules) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = render(rules, &mut out);
    out
}

fn render(rules: &Rules, out: &mut String) -> fmt::Result {
    writeln!(out, "table inet {NAME}\ndelete table inet {NAME}\ntable inet {NAME} {{")?;
    for v6 in [false, true] {
        let (n, kind) = if v6 { (6, "ipv6_addr") } else { (4, "ipv4_addr") };
        let of_family = |address: &&IpAddr| address.is_ipv6() == v6;
        set(out, &format!("vips{n}"), kind, rules.vips.iter().filter(of_family))?;
        set(out, &format!("own{n}"), kind, rules.own.iter().filter(of_family))?;
        let declared = rules.declared.iter().filter(|(source, _)| source.is_ipv6() == v6);
        let declared = declared.map(|(source, port)| format!("{source} . {port}"));
        set(out, &format!("declared{n}"), &format!("{kind} . inet_service"), declared)?;
    }
    if rules.redirect {
        for v6 in [false, true] {
            let (n, kind) = if v6 { (6, "ipv6_addr") } else { (4, "ipv4_addr") };
            let spared = rules.spared.iter().filter(|server| server.is_ipv6() == v6);
            let spared = spared.map(|server| format!("{} . {}", server.ip(), server.port()));
            set(out, &format!("spared{n}"), &format!("{kind} . inet_service"), spared)?;
        }
    }
    if let Some(unknown) = &rules.unknown {
        for v6 in [false, true] {
            let (n, kind) = if v6 { (6, "ipv6_addr") } else { (4, "ipv4_addr") };
            let known = unknown.known.iter().filter(|address| address.is_ipv6() == v6);
            set(out, &format!("known{n}"), kind, known)?;
            let networks = unknown.networks.iter().filter(|net| net.addr().is_ipv6() == v6);
            set(
                out,
                &format!("networks{n}"),
                &format!("{kind}; flags interval; auto-merge"),
                networks,
            )?;
        }
        // What listens on this host stays reachable for those who may turn out to be no consumers.
        writeln!(
            out,
            "\tchain unknown {{\n\t\tmeta l4proto tcp socket wildcard {{ 0, 1 }} accept"
        )?;
        writeln!(out, "\t\tmeta l4proto tcp redirect to :{}\n\t}}", rules.port)?;
    }
    writeln!(out, "\tchain declared {{")?;
    let declared =
        |ip, n| format!("{ip} saddr . tcp dport @declared{n} redirect to :{}", rules.port);
    for (ip, n) in FAMILIES {
        writeln!(out, "\t\t{ip} daddr @vips{n} {}", declared(ip, n))?;
    }
    writeln!(out, "\t}}")?;
    hook(out, "prerouting", rules.priority)?;
    writeln!(out, "\t\tjump declared")?;
    for (ip, n) in FAMILIES {
        if rules.redirect {
            writeln!(out, "\t\t{ip} daddr @own{n} {}", declared(ip, n))?;
        }
        if rules.scope == CaptureScope::All {
            writeln!(out, "\t\t{ip} daddr @vips{n} meta l4proto tcp redirect to :{}", rules.port)?;
        }
        if rules.unknown.is_some() {
            let stranger = format!("{ip} saddr @networks{n} {ip} saddr != @known{n}");
            writeln!(out, "\t\t{ip} daddr @vips{n} {stranger} jump unknown")?;
        }
    }
    writeln!(out, "\t}}")?;
    if rules.redirect {
        hook(out, "output", rules.priority)?;
        writeln!(out, "\t\tmeta mark {MARK:#x} return")?;
        for (ip, n) in FAMILIES {
            writeln!(out, "\t\t{ip} daddr . tcp dport @spared{n} return")?;
        }
        writeln!(out, "\t\tjump declared\n\t}}")?;
    }
    if !rules.untracked.is_empty() {
        untracked(out, &rules.untracked)?;
    }
    writeln!(out, "}}")
}

/// Our own connections pass connection tracking by. What comes back is known by the socket that it belongs to: others on
/// this host may have connections to the same endpoints, translated ones even.
fn untracked(out: &mut String, networks: &BTreeSet<IpNet>) -> fmt::Result {
    for v6 in [false, true] {
        let (n, kind) = if v6 { (6, "ipv6_addr") } else { (4, "ipv4_addr") };
        let networks = networks.iter().filter(|net| net.addr().is_ipv6() == v6);
        set(out, &format!("near{n}"), &format!("{kind}; flags interval; auto-merge"), networks)?;
    }
    for (name, hook, address, mark) in [
        ("untracked_out", "output", "daddr", "meta"),
        ("untracked_in", "prerouting", "saddr", "socket"),
    ] {
        writeln!(out, "\tchain {name} {{")?;
        writeln!(out, "\t\ttype filter hook {hook} priority {RAW}; policy accept;")?;
        for (ip, n) in FAMILIES {
            let ours = format!("meta l4proto tcp {mark} mark {MARK:#x}");
            writeln!(out, "\t\t{ip} {address} @near{n} {ours} notrack")?;
        }
        writeln!(out, "\t}}")?;
    }
    Ok(())
}

/// The start of a chain that the kernel's hook of this name calls.
fn hook(out: &mut String, name: &str, priority: i32) -> fmt::Result {
    writeln!(out, "\tchain {name} {{")?;
    writeln!(out, "\t\ttype nat hook {name} priority {priority}; policy accept;")
}

fn set(
    out: &mut String,
    name: &str,
    kind: &str,
    elements: impl Iterator<Item = impl Display>,
) -> fmt::Result {
    writeln!(out, "\tset {name} {{\n\t\ttype {kind}")?;
    let mut elements = elements.peekable();
    if elements.peek().is_some() {
        write!(out, "\t\telements = {{")?;
        for (n, element) in elements.enumerate() {
            write!(out, "{} {element}", if n == 0 { "" } else { "," })?;
        }
        writeln!(out, " }}")?;
    }
    writeln!(out, "\t}}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::rules::tests::{example, with_unknown};

    #[test]
    fn dnat_of_declared_ports() {
        let expected = "\
table inet embassy
delete table inet embassy
table inet embassy {
\tset vips4 {
\t\ttype ipv4_addr
\t\telements = { 172.17.0.1 }
\t}
\tset own4 {
\t\ttype ipv4_addr
\t}
\tset declared4 {
\t\ttype ipv4_addr . inet_service
\t\telements = { 172.17.0.2 . 80, 172.17.0.2 . 6379, 172.18.0.5 . 6379 }
\t}
\tset vips6 {
\t\ttype ipv6_addr
\t\telements = { fd00::1 }
\t}
\tset own6 {
\t\ttype ipv6_addr
\t}
\tset declared6 {
\t\ttype ipv6_addr . inet_service
\t\telements = { fd00::2 . 80 }
\t}
\tchain declared {
\t\tip daddr @vips4 ip saddr . tcp dport @declared4 redirect to :9999
\t\tip6 daddr @vips6 ip6 saddr . tcp dport @declared6 redirect to :9999
\t}
\tchain prerouting {
\t\ttype nat hook prerouting priority -110; policy accept;
\t\tjump declared
\t}
}
";
        assert_eq!(script(&example(false, CaptureScope::Declared)), expected);
    }

    #[test]
    fn our_own_connections_to_near_endpoints_are_not_tracked() {
        let mut rules = example(false, CaptureScope::Declared);
        assert!(!script(&rules).contains("notrack"));
        rules.untracked = ["172.17.0.0/16".parse().unwrap()].into();
        let script = script(&rules);
        for lines in [
            "\tset near4 {\n\t\ttype ipv4_addr; flags interval; auto-merge\n\t\telements = { 172.17.0.0/16 }\n",
            "\t\ttype filter hook output priority -300; policy accept;\n\
             \t\tip daddr @near4 meta l4proto tcp meta mark 0x656d0000 notrack\n",
            "\t\ttype filter hook prerouting priority -300; policy accept;\n\
             \t\tip saddr @near4 meta l4proto tcp socket mark 0x656d0000 notrack\n",
        ] {
            assert!(script.contains(lines), "{lines:?} in {script}");
        }
    }

    #[test]
    fn strangers_are_captured_where_nothing_listens() {
        let script = script(&with_unknown(example(false, CaptureScope::Declared)));
        for line in [
            "\tset known4 {\n\t\ttype ipv4_addr\n\t\telements = { 172.17.0.2 }\n",
            "\t\ttype ipv6_addr; flags interval; auto-merge\n\t\telements = { fd00::/64 }\n",
            "\tchain unknown {\n\t\tmeta l4proto tcp socket wildcard { 0, 1 } accept\n\t\tmeta l4proto tcp redirect to :9999\n",
            "\t\tip daddr @vips4 ip saddr @networks4 ip saddr != @known4 jump unknown\n",
        ] {
            assert!(script.contains(line), "{line:?} in {script}");
        }
    }

    #[test]
    fn redirect_captures_what_is_sent_from_here_but_not_our_own_connections() {
        let script = script(&example(true, CaptureScope::All));
        for line in [
            "\t\tip daddr @vips4 meta l4proto tcp redirect to :9999\n",
            // Whatever the scope, the host's own services on its own addresses stay reachable.
            "\t\tip daddr @own4 ip saddr . tcp dport @declared4 redirect to :9999\n",
            "\t\ttype nat hook output priority -110; policy accept;\n\t\tmeta mark 0x656d0000 return\n\
             \t\tip daddr . tcp dport @spared4 return\n\t\tip6 daddr . tcp dport @spared6 return\n\
             \t\tjump declared\n\t}\n}\n",
            "\tset spared4 {\n\t\ttype ipv4_addr . inet_service\n\t\telements = { 172.17.0.1 . 8500 }\n",
        ] {
            assert!(script.contains(line), "{line:?} in {script}");
        }
        // What is sent from here to an own address is the application's own talk with itself.
        let (_, declared) = script.split_once("\tchain declared {").unwrap();
        let (declared, _) = declared.split_once("\t}").unwrap();
        assert!(!declared.contains("@own"), "{declared}");
    }
}
