use std::{
    net::{IpAddr, Ipv4Addr},
    process::{Command, Stdio},
    sync::Arc,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::*;
use crate::{
    capture::{
        rules::{
            Declared, PRIORITY,
            tests::{declared, example, interface, with_guard, with_unknown, with_untracked},
        },
        text,
    },
    config::{CaptureScope, Guard},
    model::Port,
    table::RouteKey,
    wiring::{Arrival, Owner, Wiring},
};

/// Moves this thread into its own network namespace.
pub(in crate::capture) fn enter_a_namespace_of_its_own() {
    let mut other = Command::new("unshare")
        .args(["--net", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("util-linux");
    let path = format!("/proc/{}/ns/net", other.id());
    let own = std::fs::read_link("/proc/self/ns/net").unwrap();
    while std::fs::read_link(&path).unwrap() == own {
        std::thread::yield_now();
    }
    let namespace = std::fs::File::open(path).unwrap();
    move_into_link_name_space(
        std::os::fd::AsFd::as_fd(&namespace),
        Some(LinkNameSpaceType::Network),
    )
    .expect("root");
    other.kill().unwrap();
    other.wait().unwrap();
}

pub(in crate::capture) fn nft(words: &str) -> Result<String, String> {
    let output = Command::new("nft").args(words.split(' ')).output().expect("nftables");
    match output.status.success() {
        true => Ok(String::from_utf8(output.stdout).unwrap()),
        false => Err(String::from_utf8(output.stderr).unwrap()),
    }
}

/// Removes what different versions of the `nft` program write differently.
fn plain(listing: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let all = listing.lines().map(str::trim);
    for line in all.filter(|line| !line.is_empty() && !line.starts_with('#')) {
        match lines.last_mut() {
            // Elements continue on the next line.
            Some(last) if last.ends_with(',') => {
                last.push(' ');
                last.push_str(line);
            }
            _ => lines.push(line.to_owned()),
        }
    }
    for line in &mut lines {
        if let Some((_, list)) = line.split_once("elements = {") {
            let mut all: Vec<_> = list.trim_matches([' ', '}']).split(", ").collect();
            all.sort();
            *line = all.join(", ");
        }
        *line = line
            .replace("tcp flags syn / syn,ack", "tcp flags & (syn | ack) == syn")
            .replace("counter packets 0 bytes 0", "counter")
            .replace("priority filter;", "priority 0;");
    }
    // Older versions print undefined flags of a table, and newer ones print the owner.
    let known = ["flags interval", "flags dynamic,timeout"];
    lines.retain(|line| !line.starts_with("flags ") || known.contains(&line.as_str()));
    for line in lines.iter_mut().filter(|line| line.starts_with("table ")) {
        let end = line.find('{').unwrap();
        line.truncate(end + 1);
    }
    lines
}

/// Both tables as the program lists them.
fn told() -> String {
    // Tables of another test may vanish meanwhile. Ours are in this namespace.
    nft("-y -s list ruleset").unwrap()
}

fn shapes() -> Vec<Rules> {
    let mut all = Vec::new();
    for redirect in [false, true] {
        for scope in [CaptureScope::Declared, CaptureScope::All] {
            let rules = example(redirect, scope);
            all.extend([with_unknown(rules.clone()), with_untracked(rules.clone())]);
            all.extend([Guard::Vip, Guard::Full].map(|guard| with_guard(rules.clone(), guard)));
            all.push(rules);
        }
    }
    all
}

/// Waits until a closed socket is really closed: a program that another test is starting may still have a copy of it.
fn closed(left: &str) {
    let end = Instant::now() + Duration::from_secs(30);
    while nft("list ruleset").unwrap().contains(left) {
        assert!(Instant::now() < end, "{}", nft("list ruleset").unwrap());
    }
}

fn listed() -> String {
    nft("-n list table inet embassy").unwrap()
}

#[tokio::test]
async fn what_is_written_is_what_its_text_says() {
    enter_a_namespace_of_its_own();
    for rules in shapes() {
        let mut own = Nft::open(&rules.shape, false).unwrap();
        assert!(own.is_owned());
        own.load(&rules).await.unwrap();
        assert_eq!(plain(&told()), plain(&text::of(&rules, true)));
        // The kernel removes the table with its socket.
        drop(own);
        closed("table");
    }
    // The program accepts the text. Exception: a rule of the full guard, which older versions can only show.
    let rules = with_guard(with_unknown(example(true, CaptureScope::Declared)), Guard::Vip);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text::of(&rules, false)).unwrap();
    nft(&format!("-f {}", file.path().display())).unwrap();
    let table = Table { name: NAME, owned: false };
    let listing = netlink::list(&mut Socket::open().unwrap(), table, &rules).unwrap();
    // The set also has a mark that no range is there, at the lowest address.
    assert_eq!((listing.missing, listing.added), (0, 2));
}

#[tokio::test]
async fn a_table_of_ours_is_nobody_elses() {
    enter_a_namespace_of_its_own();
    let rules = with_unknown(example(false, CaptureScope::Declared));
    let rules = with_guard(rules, Guard::Vip);
    let mut own = Nft::open(&rules.shape, false).unwrap();
    own.load(&rules).await.unwrap();
    let before = listed();
    own.others_changed().unwrap();
    assert!(!own.others_changed().unwrap());
    nft("add table inet other").unwrap();
    assert!(own.others_changed().unwrap());
    nft("flush ruleset").unwrap();
    for words in [
        "delete table inet embassy",
        "flush table inet embassy",
        "flush set inet embassy declared4",
        "add chain inet embassy another",
        "delete table bridge embassy",
        "flush chain bridge embassy prerouting",
        "add element bridge embassy ports4 { 1 . 172.17.0.2 }",
    ] {
        let error = nft(words).unwrap_err();
        assert!(error.contains("Operation not permitted"), "{words}: {error}");
    }
    assert_eq!(listed(), before);
    assert_eq!(own.damage(&rules).unwrap(), None);
    // A second embassy reports the owner.
    let mut second = Nft::open(&rules.shape, false).unwrap();
    let error = second.load(&rules).await.unwrap_err();
    assert!(matches!(error, CaptureError::Owned { .. }), "{error}");
    let error = remove_leftovers().await.unwrap_err();
    assert!(matches!(error, CaptureError::Owned { .. }), "{error}");
    drop(own);
    closed("table inet embassy");
    second.load(&rules).await.unwrap();
    assert_eq!(listed(), before);
}

#[tokio::test]
async fn what_others_do_to_a_shared_table_is_found_and_put_right() {
    enter_a_namespace_of_its_own();
    let rules = with_guard(with_unknown(example(true, CaptureScope::All)), Guard::Full);
    let mut shared = Nft::open(&rules.shape, true).unwrap();
    shared.load(&rules).await.unwrap();
    assert!(!shared.is_owned());
    let before = listed();
    for (words, change) in [
        ("flush ruleset", Change::Vanished),
        ("delete table inet embassy", Change::Vanished),
        ("delete table bridge embassy", Change::Incomplete),
        ("flush chain bridge embassy prerouting", Change::Incomplete),
        ("delete element bridge embassy ports4 { 1007 . 172.17.0.2 }", Change::Incomplete),
        ("add element bridge embassy ports4 { 9 . 172.17.0.2 }", Change::Added),
        ("flush chain inet embassy declared", Change::Incomplete),
        ("delete element inet embassy declared4 { docker0 . 172.17.0.2 . 80 }", Change::Incomplete),
        ("flush set inet embassy bridges", Change::Incomplete),
        ("flush set inet embassy segments6", Change::Incomplete),
        ("flush set inet embassy networks6", Change::Incomplete),
        ("add element inet embassy known4 { 10.9.9.9 }", Change::Added),
        ("insert rule inet embassy prerouting accept", Change::Added),
    ] {
        assert_eq!(shared.damage(&rules).unwrap(), None);
        nft(words).unwrap();
        assert!(shared.others_changed().unwrap(), "{words}");
        let (found, what) = shared.damage(&rules).unwrap().unwrap();
        assert_eq!(found, change, "{words}: {what}");
        assert!(!shared.stands());
        shared.load(&rules).await.unwrap();
        assert_eq!(listed(), before);
    }
    // A killed embassy leaves its table, and the next embassy removes it.
    drop(shared);
    assert!(remove_leftovers().await.unwrap());
    assert!(!remove_leftovers().await.unwrap());
    assert_eq!(nft("list ruleset").unwrap(), "");
}

#[tokio::test]
async fn changes_make_the_rules_that_loading_makes() {
    enter_a_namespace_of_its_own();
    let rules = with_unknown(with_untracked(example(true, CaptureScope::All)));
    let mut rules = with_guard(rules, Guard::Full);
    let mut shared = Nft::open(&rules.shape, true).unwrap();
    shared.load(&rules).await.unwrap();
    for round in 0..200 {
        let mut random = fastrand::Rng::with_seed(round);
        let mut address = |v6: bool| -> IpAddr {
            let low = random.u16(0..6);
            match v6 {
                false => Ipv4Addr::new(172, 17, 0, low as u8).into(),
                true => format!("fd00::{low}").parse().unwrap(),
            }
        };
        let mut next = rules.clone();
        for _ in 0..3 {
            let (source, net) = (address(round % 2 == 0), address(round % 3 == 0));
            let port = Port::new(80 + round as u16 % 3).unwrap();
            let by = [Arrival::Anywhere, Arrival::Outside, Arrival::By(interface("br-x"))];
            let key = Declared {
                key: RouteKey::tcp(source, port),
                arrival: by[usize::from(round % 3 == 1) + usize::from(round % 5 == 1)],
            };
            // A route has one arrival interface at a time.
            let others: Vec<_> =
                next.declared.iter().filter(|one| one.key == key.key).copied().collect();
            next.declared.retain(|one| one.key != key.key);
            if !others.contains(&key) {
                next.declared.insert(key);
            }
            if !next.known.remove(&source) {
                next.known.insert(source);
            }
            if !next.places.vips.remove(&net) {
                next.places.vips.insert(net);
            }
            // Addresses and networks that touch or overlap.
            let length = if net.is_ipv6() { 126 } else { 30 } + u8::from(round % 5 == 0);
            let net = ipnet::IpNet::new(net, length).unwrap().trunc();
            for nets in [&mut next.places.networks, &mut next.places.untracked] {
                if !nets.remove(&net) {
                    nets.insert(net);
                }
            }
            let name = interface(if round % 2 == 0 { "br-x" } else { "docker0" });
            for segments in [(name, net)] {
                if !next.places.segments.remove(&segments) {
                    next.places.segments.insert(segments);
                }
            }
            if !next.places.bridges.remove(&name) {
                next.places.bridges.insert(name);
            }
            if !next.places.everywhere.remove(&source) {
                next.places.everywhere.insert(source);
            }
            let mut wiring = Wiring::clone(&next.wiring);
            let port = 1000 + u32::from(port.get() % 4);
            let ports = Arc::make_mut(&mut wiring.ports);
            if !ports.remove(&port) {
                ports.insert(port);
            }
            if wiring.owners.remove(&source).is_none() {
                let mac = (round % 3 == 0).then_some(crate::wiring::Mac([2, 0, 0, 0, 0, 1]));
                let owner = Owner { name: "x".into(), ports: vec![port, port + 4], mac };
                wiring.owners.insert(source, Arc::new(owner));
            }
            next.wiring = Arc::new(wiring);
        }
        let changes = RuleChanges {
            declared_added: next.declared.difference(&rules.declared).copied().collect(),
            declared_removed: rules.declared.difference(&next.declared).copied().collect(),
            known_added: next.known.difference(&rules.known).copied().collect(),
            known_removed: rules.known.difference(&next.known).copied().collect(),
            places: None,
            wiring: Some((rules.wiring.clone(), next.wiring.clone())),
        }
        .with_places(&rules.places, &next.places);
        shared.change(&changes).await.unwrap_or_else(|error| panic!("{round}: {error}"));
        assert_eq!(shared.damage(&next).unwrap(), None, "round {round}");
        rules = next;
    }
    let changed = plain(&told());
    shared.load(&rules).await.unwrap();
    assert_eq!(plain(&told()), changed);
    // A change that is impossible is an error, and the rules are loaded again.
    nft("flush set inet embassy declared4").unwrap();
    let gone = RuleChanges {
        declared_removed: rules.declared.iter().copied().collect(),
        ..RuleChanges::default()
    };
    assert!(!gone.declared_removed.is_empty());
    assert!(shared.change(&gone).await.is_err());
    assert!(!shared.stands());
}

/// Rules of this many consumers.
fn many(consumers: u32) -> Rules {
    let mut rules = with_unknown(example(false, CaptureScope::Declared));
    let source = |n| Ipv4Addr::from_bits(0x0a00_0000 + n).into();
    let key = |n| Declared {
        key: RouteKey::tcp(source(n), Port::new(80).unwrap()),
        arrival: Arrival::By(interface("docker0")),
    };
    rules.declared.extend((0..consumers).map(key));
    rules
}

#[tokio::test]
async fn a_large_table_takes_the_place_of_another_without_a_gap() {
    enter_a_namespace_of_its_own();
    let rules = many(12_000);
    let mut nft_of = Nft::open(&rules.shape, false).unwrap();
    nft_of.load(&rules).await.unwrap();
    // All of it is more than the socket takes at first.
    nft_of.socket.shrink();
    // Other tasks of this thread have a turn between any two batches.
    let (done, mut is_done) = tokio::sync::oneshot::channel();
    let watch = async {
        let mut looks = 0;
        while is_done.try_recv().is_err() {
            let chains = base_chains().unwrap();
            assert!(chains.iter().any(|chain| chain.kind == "nat"), "nothing is captured");
            looks += 1;
            tokio::task::yield_now().await;
        }
        looks
    };
    let load = async {
        nft_of.load(&rules).await.unwrap();
        done.send(()).unwrap();
    };
    let (looks, ()) = tokio::join!(watch, load);
    assert!(looks > 0 && nft_of.stands());
}

#[tokio::test]
async fn a_table_that_is_too_large_for_one_batch_is_written_in_several() {
    enter_a_namespace_of_its_own();
    let rules = many(12_000);
    // The table is shared, so that all of it is read; and the buffer cannot be enlarged, as in a user namespace.
    let mut shared = Nft::open(&rules.shape, true).unwrap();
    shared.socket.narrow();
    for _ in 0..2 {
        assert_eq!(shared.load(&rules).await.unwrap(), None);
        assert_eq!(shared.damage(&rules).unwrap(), None);
    }
}

#[tokio::test]
async fn chains_move_and_make_place() {
    enter_a_namespace_of_its_own();
    for shared in [false, true] {
        let mut rules = with_guard(with_unknown(example(true, CaptureScope::All)), Guard::Vip);
        let mut nft_of = Nft::open(&rules.shape, shared).unwrap();
        nft_of.load(&rules).await.unwrap();
        let ours = |nft: &mut Nft| {
            let chains = nft.base_chains().unwrap().into_iter();
            let mut nat: Vec<_> = chains
                .filter(|chain| chain.kind == "nat")
                .map(|chain| (chain.name, chain.priority))
                .collect();
            nat.sort();
            nat
        };
        let both = |priority| {
            let names = ["inet embassy output", "inet embassy prerouting"];
            names.map(|name| (name.to_owned(), priority)).to_vec()
        };
        assert_eq!(ours(&mut nft_of), both(PRIORITY));
        rules.shape.priority = -150;
        nft_of.move_to(&rules).unwrap();
        assert_eq!(ours(&mut nft_of), both(-150));
        assert_eq!(nft_of.damage(&rules).unwrap(), None);
        assert_eq!(nft_of.arrivals().unwrap(), Some((0, 0)));
        let moved = plain(&listed());
        nft_of.load(&rules).await.unwrap();
        assert_eq!(plain(&listed()), moved);

        // While live connections drain, translation stays on, and the next embassy can use the name.
        let (found, draining) = nft_of.remove().unwrap();
        assert!(found);
        let left = nft("list ruleset").unwrap();
        assert!(left.contains("type nat hook prerouting") && left.contains("ct status dnat"));
        assert!(!left.contains("redirect") && !left.contains("inet embassy {"), "{left}");
        let mut next = Nft::open(&rules.shape, shared).unwrap();
        // A table that still drains is not a leftover.
        assert!(!remove_leftovers().await.unwrap());
        assert_eq!(nft("list ruleset").unwrap(), left);
        next.load(&rules).await.unwrap();
        drop(draining);
        assert_eq!(plain(&listed()), moved);
        // Removing an object that is already gone is not an error.
        if shared {
            nft("flush ruleset").unwrap();
            assert!(!next.remove().unwrap().0);
            continue;
        }
        let (_, draining) = next.remove().unwrap();
        drop(draining);
        closed("table");
    }
}

#[tokio::test]
async fn a_kernel_that_lacks_something_is_asked_and_nothing_stands() {
    enter_a_namespace_of_its_own();
    let mut socket = Socket::open().unwrap();
    for rules in shapes() {
        assert_eq!(refused(&mut socket, &rules.shape, true).unwrap(), Some(Vec::new()));
        assert_eq!(Nft::open(&rules.shape, false).unwrap().lacks(), []);
    }
    // No kernel allows a chain to translate before connection tracking.
    let mut shape = example(false, CaptureScope::Declared).shape;
    shape.priority = -300;
    let error = Nft::open(&shape, false).unwrap_err();
    let CaptureError::Lacks(what) = error else { panic!("{error}") };
    assert_eq!(what, "the chain prerouting");
    assert_eq!(nft("list ruleset").unwrap(), "");
}

/// What rules of this shape need, restricted to entries with one of these words.
fn with_words(shape: &Shape, words: &[&str]) -> Vec<String> {
    let question = netlink::question(Table { name: NAME, owned: false }, shape);
    let needs = question.needs.into_iter().map(|(_, what)| what);
    needs.filter(|what| words.iter().any(|word| what.contains(word))).collect()
}

#[test]
fn each_optional_part_falls_away_alone() {
    use RulePart::{Count, Hold, Ipv6, Notrack, Refusal};
    let rules = with_untracked(with_unknown(example(true, CaptureScope::Declared)));
    let rules = with_guard(rules, Guard::Full);
    for (words, expected) in [
        (&[][..], &[][..]),
        // Linux before 5.10, and without nft_socket.
        (&["socket wildcard"], &[Hold]),
        (&["socket "], &[Notrack, Hold]),
        (&["notrack"], &[Notrack]),
        (&["counter"], &[Count, Refusal, RulePart::Guard]),
        (&["reject"], &[Refusal]),
        // No bridge tables, and no sets that packets fill.
        (&["tables for bridges", "of the guard", "@guarded", "meta protocol"], &[RulePart::Guard]),
        (&["update @"], &[RulePart::Guard]),
        (&["ip6 "], &[Ipv6]),
        (&["ip6 ", "socket wildcard", "notrack"], &[Notrack, Hold, Ipv6]),
        // Sets of ranges.
        (&["the set networks", "the set near", "@networks", "@near"], &[Notrack, Hold]),
        (&["the set segments", "@segments"], &[Hold]),
        (&["the set networks6", "the set near6", "@networks6", "@near6"], &[Ipv6]),
    ] {
        let refused = with_words(&rules.shape, words);
        let lacking = lacking(&rules.shape, &refused).unwrap();
        assert_eq!(
            lacking.iter().map(|(part, _)| *part).collect::<Vec<_>>(),
            expected,
            "{words:?}"
        );
        for (part, why) in &lacking {
            assert!(refused.contains(why), "{part:?}: {why}");
        }
        // The remaining rules do not need it.
        let lacks = lacking.iter().fold(Optional::default(), |lacks, (part, _)| lacks.with(*part));
        assert_eq!(with_words(&rules.shape.without(lacks), words), [""; 0], "{words:?}");
    }
    // These are required.
    for word in ["the set declared4", "redirect", "the chain prerouting"] {
        let refused = with_words(&rules.shape, &[word, "socket"]);
        let what = lacking(&rules.shape, &refused).unwrap_err();
        assert!(what.contains(word), "{what}");
    }
}

#[test]
fn what_the_kernel_notes_is_read() {
    let of = |key: &[&[u8]]| Offender::of(&key.concat());
    let port = 1007u32.to_ne_bytes();
    let with = |address: &str| Offender { port: 1007, address: Some(address.parse().unwrap()) };
    assert_eq!(of(&[&port, &[172, 17, 0, 2]]), Some(with("172.17.0.2")));
    let six: std::net::Ipv6Addr = "fd00::2".parse().unwrap();
    assert_eq!(of(&[&port, &six.octets()]), Some(with("fd00::2")));
    assert_eq!(of(&[&port]), Some(Offender { port: 1007, address: None }));
    for wrong in [&[][..], &[&port[..3]], &[&port, &[1]], &[&port, &six.octets(), &[0]]] {
        assert_eq!(of(wrong), None, "{wrong:?}");
    }
}

#[tokio::test]
async fn rules_without_each_optional_part_are_written_as_their_text_says() {
    enter_a_namespace_of_its_own();
    let rules = with_untracked(with_unknown(example(true, CaptureScope::All)));
    let rules = with_guard(rules, Guard::Full);
    for lacks in Optional::choices() {
        let mut rules = rules.clone();
        rules.shape = rules.shape.without(lacks);
        let mut own = Nft::open(&rules.shape, false).unwrap();
        own.load(&rules).await.unwrap();
        assert_eq!(plain(&told()), plain(&text::of(&rules, true)));
        let expected = (!lacks.has(RulePart::Count)).then_some((0, 0));
        assert_eq!(own.arrivals().unwrap(), expected);
        // Elements of sets that do not exist change nothing.
        let counts = (own.refused().unwrap(), own.dropped().unwrap());
        let zero = |part| (!lacks.has(part)).then_some(0);
        assert_eq!(counts, (zero(RulePart::Refusal), zero(RulePart::Guard)));
        assert_eq!(own.offenders().unwrap(), []);
        let added = declared("fd00::9", 80, Arrival::Anywhere);
        let changes = RuleChanges { declared_added: vec![added], ..RuleChanges::default() };
        own.change(&changes).await.unwrap();
        let (_, draining) = own.remove().unwrap();
        drop(draining);
        closed("table");
    }
}

/// `cargo test --release -p embassy --lib figures_of_nf_tables -- --ignored --nocapture`
#[tokio::test]
#[ignore = "it measures"]
async fn figures_of_nf_tables() {
    enter_a_namespace_of_its_own();
    let mut rules = with_unknown(example(false, CaptureScope::Declared));
    for consumer in 0..10_000u32 {
        let source = Ipv4Addr::from_bits(0x0a00_0000 + consumer).into();
        let keys = (1..=10).map(|port| RouteKey::tcp(source, Port::new(port).unwrap()));
        let arrival = Arrival::By(interface("docker0"));
        rules.declared.extend(keys.map(|key| Declared { key, arrival }));
        rules.known.insert(source);
    }
    let time = |what: &str, start: Instant, times: u32| {
        eprintln!("{what}: {:.1} us", start.elapsed().as_secs_f64() * 1e6 / f64::from(times));
    };
    for shared in [false, true] {
        eprintln!("\n{}", if shared { "a table of everybody's" } else { "a table of ours" });
        let start = Instant::now();
        let mut nft_of = Nft::open(&rules.shape, shared).unwrap();
        time("what the kernel can do", start, 1);
        let start = Instant::now();
        nft_of.load(&rules).await.unwrap();
        time(&format!("{} routes and 10,000 addresses", rules.declared.len()), start, 1);
        let one = declared("172.17.9.9", 80, Arrival::By(interface("docker0")));
        let add = RuleChanges { declared_added: vec![one], ..RuleChanges::default() };
        let remove = RuleChanges { declared_removed: vec![one], ..RuleChanges::default() };
        const TIMES: u32 = 1000;
        let start = Instant::now();
        for _ in 0..TIMES {
            nft_of.change(&add).await.unwrap();
            nft_of.change(&remove).await.unwrap();
        }
        time("one route more or less", start, 2 * TIMES);
        let start = Instant::now();
        for _ in 0..TIMES {
            nft_of.others_changed().unwrap();
        }
        time("whether others changed anything", start, TIMES);
        let start = Instant::now();
        assert_eq!(nft_of.damage(&rules).unwrap(), None);
        time("what others did, after a change of theirs", start, 1);
        let start = Instant::now();
        let (_, draining) = nft_of.remove().unwrap();
        time("nothing captured any more", start, 1);
        drop(draining);
    }
}
