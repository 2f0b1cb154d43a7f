//! A container cannot use the identity of another one. Each attack is really made, and is shown to work if nothing stops
//! it.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
};

use anyhow::{Context, Result, ensure};
use testbed::{Container, HOST_ADDRESS, Host, embassy_program, output};

use crate::{
    READY, WAIT,
    capture::{IPTABLES, NFT},
    support::{ETCD, counts, ends, metric, reaches, says, web},
};

const VIP: &str = "172.17.0.1";
const OFF: &str = "--guard=off";
const GUARD: &str = "--guard=vip";
const FULL: &str = "--guard=full";

/// The Ethernet address in the output of `ip link`.
fn mac(link: &str) -> Result<String> {
    let mut words = link.split_whitespace().skip_while(|word| *word != "link/ether");
    Ok(words.nth(1).context("no Ethernet address")?.to_owned())
}

/// The addresses of a container that is attacked.
struct Victim {
    address: IpAddr,
    mac: String,
    vip: IpAddr,
    gateway: String,
}

impl Victim {
    fn of(container: &Container, address: impl Into<IpAddr>, vip: &str) -> Result<Self> {
        let link = output(container.command("ip")?.args(["-o", "link", "show", "eth0"]))?;
        let docker0 = container.host().run("ip", ["-o", "link", "show", "docker0"])?;
        let (address, vip) = (address.into(), vip.parse()?);
        Ok(Self { address, mac: mac(&link)?, vip, gateway: mac(&docker0)? })
    }

    /// Sends forged frames from a container's network, which is possible with Docker's default rights. Returns which server
    /// answered.
    fn forged(&self, thief: &Container, tags: &str) -> Result<String> {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/guard/forge.py");
        let mut python = thief.command("/usr/bin/python3")?;
        python.args([script, "eth0", &self.address.to_string(), &self.mac]);
        python.args([&self.vip.to_string(), &self.gateway, "80", tags]);
        Ok(output(&mut python)?.trim().to_owned())
    }

    /// With the right to change its own network, a thief takes the address itself. Returns which server answered.
    fn taken(&self, thief: &Container) -> Result<String> {
        let (address, net) =
            (self.address.to_string(), if self.address.is_ipv6() { 64 } else { 16 });
        let change = |words: &str| -> Result<()> {
            let words = format!("address {words} {address}/{net} dev eth0");
            let words = if words.contains(" add ") { words + " nodad" } else { words };
            output(thief.command("ip")?.args(words.split(' '))).map(drop)
        };
        change("add")?;
        let url = match self.vip {
            IpAddr::V4(vip) => format!("http://{vip}/"),
            IpAddr::V6(vip) => format!("http://[{vip}]/"),
        };
        let mut curl = thief.command("curl")?;
        curl.args(["--silent", "--globoff", "--max-time", "2", "--interface", &address, &url]);
        let answer = curl.output()?;
        change("del")?;
        let text = String::from_utf8_lossy(&answer.stdout).trim().to_owned();
        Ok(if text.is_empty() { "nothing".to_owned() } else { text })
    }
}

type Attack = (&'static str, fn(&Victim, &Container) -> Result<String>);

const ATTACKS: [Attack; 5] = [
    ("takes the address", |victim, thief| victim.taken(thief)),
    ("forges address and MAC", |victim, thief| victim.forged(thief, "0")),
    ("in fragments", |victim, thief| victim.forged(thief, "fragments")),
    ("with a VLAN tag of ID 0", |victim, thief| victim.forged(thief, "1")),
    ("with two VLAN tags of ID 0", |victim, thief| victim.forged(thief, "2")),
];

/// Checks that each attack works, or that none does.
fn attacks(victims: &[Victim], thief: &Container, works: bool) -> Result<()> {
    for victim in victims {
        for (name, attack) in ATTACKS {
            let what = format!("a thief that {name} of {}", victim.address);
            if works {
                testbed::eventually(WAIT, &format!("{what} to be served"), || {
                    let answer = attack(victim, thief)?;
                    ensure!(answer == "red", "it is answered: {answer}");
                    Ok(())
                })?;
                continue;
            }
            assert_eq!(attack(victim, thief)?, "nothing", "{what}");
        }
    }
    Ok(())
}

/// Two containers: one is attacked, the other is the thief. The thief has its own binding.
fn stage(host: &Host) -> Result<(Container, Container)> {
    web(host, "red")?;
    web(host, "blue")?;
    let owner = host.client("owner").env("BACKEND_RED", "/services/red;80").start()?;
    let thief = host.client("thief").env("BACKEND_BLUE", "/services/blue;81").start()?;
    Ok((owner, thief))
}

/// Removes what a thief has put into the host's neighbour table.
fn forget_neighbours(host: &Host) -> Result<()> {
    host.run("ip", ["neigh", "flush", "dev", "docker0"]).map(drop)
}

#[test]
fn a_neighbour_that_takes_an_address_is_served_only_without_the_guard() -> Result<()> {
    let host = Host::light()?;
    let (owner, thief) = stage(&host)?;
    let victims = [Victim::of(&owner, owner.ip()?, VIP)?];
    // Without the guard each attack works. Otherwise these tests prove nothing.
    let embassy = host.embassy(["--dnat", ETCD, NFT, OFF])?;
    embassy.wait_ready(READY)?;
    reaches(&owner, "172.17.0.1:80", "red")?;
    attacks(&victims, &thief, true)?;
    ensure!(!host.run("nft", ["list", "tables"])?.contains("bridge"), "off is off");
    assert_eq!(metric(&embassy, "embassy_spoofed_total")?, 0);
    embassy.terminate()?;
    assert!(embassy.wait(WAIT)?.success());
    forget_neighbours(&host)?;

    let embassy = host.embassy(["--dnat", ETCD, NFT, GUARD])?;
    embassy.wait_ready(READY)?;
    reaches(&owner, "172.17.0.1:80", "red")?;
    attacks(&victims, &thief, false)?;
    counts(&embassy, "embassy_spoofed_total", 1)?;
    let address = format!("address={}", owner.ip()?);
    let told = "a bridge port used an address of another container";
    let words = ["container=\"thief\"", &address, "owner=\"owner\""];
    says(&embassy, &[&[told][..], &words].concat())?;
    says(&embassy, &["a bridge port sent frames that the guard drops", "container=\"thief\""])?;
    // Logged once for each, however often it tries.
    attacks(&victims, &thief, false)?;
    let before = metric(&embassy, "embassy_spoofed_total")?;
    let _ = victims[0].forged(&thief, "0")?;
    counts(&embassy, "embassy_spoofed_total", before + 1)?;
    assert_eq!(embassy.log().matches(told).count(), 1, "{}", embassy.log());
    // Both containers are served as themselves.
    forget_neighbours(&host)?;
    reaches(&owner, "172.17.0.1:80", "red")?;
    reaches(&thief, "172.17.0.1:81", "blue")?;
    assert_eq!(metric(&embassy, "embassy_unguarded_addresses")?, 0);
    // The table disappears with embassy.
    embassy.kill()?;
    testbed::eventually(WAIT, "the guard's table to be gone", || {
        ensure!(!host.run("nft", ["list", "tables"])?.contains("bridge"), "it is there");
        Ok(())
    })
}

#[test]
fn nor_does_the_engines_own_network_let_one_speak_as_another_by_either_family() -> Result<()> {
    let host = Host::builder().ipv6(true).start()?;
    let (owner, thief) = stage(&host)?;
    let victims =
        [Victim::of(&owner, owner.ip()?, VIP)?, Victim::of(&owner, owner.ip6()?, "fd00:d0c::1")?];
    for (guard, works) in [(OFF, true), (GUARD, false), (FULL, false)] {
        forget_neighbours(&host)?;
        let embassy = host.embassy(["--dnat", ETCD, NFT, guard])?;
        embassy.wait_ready(READY)?;
        reaches(&owner, "172.17.0.1:80", "red")?;
        reaches(&owner, "[fd00:d0c::1]:80", "red")?;
        attacks(&victims, &thief, works)?;
        forget_neighbours(&host)?;
        reaches(&owner, "172.17.0.1:80", "red")?;
        reaches(&owner, "[fd00:d0c::1]:80", "red")?;
        if !works {
            counts(&embassy, "embassy_spoofed_total", 1)?;
        }
        embassy.terminate()?;
        assert!(embassy.wait(WAIT)?.success());
    }
    Ok(())
}

/// The purpose of `full`: a neighbour that claims the address by ARP would get the owner's answers.
#[test]
fn with_the_full_guard_an_owner_is_served_while_it_is_robbed() -> Result<()> {
    let host = Host::light()?;
    let (owner, thief) = stage(&host)?;
    let victim = Victim::of(&owner, owner.ip()?, VIP)?;
    let embassy = host.embassy(["--dnat", ETCD, NFT, FULL])?;
    embassy.wait_ready(READY)?;
    reaches(&owner, "172.17.0.1:80", "red")?;
    let neighbour = || host.run("ip", ["neigh", "show", &owner.ip()?.to_string()]);
    let is_over = AtomicBool::new(false);
    let served = thread::scope(|scope| {
        let owner = scope.spawn(|| {
            let mut served = 0;
            while !is_over.load(Relaxed) {
                let answers = owner.get("172.17.0.1:80").times(10).run()?;
                ensure!(answers.from("red") == 10, "{answers:?}");
                served += 10;
            }
            anyhow::Ok(served)
        });
        let robbed = (0..3).try_for_each(|_| {
            ATTACKS.iter().try_for_each(|(name, attack)| {
                let answer = attack(&victim, &thief)?;
                ensure!(answer == "nothing", "{name}: {answer}");
                let entry = neighbour()?;
                ensure!(
                    !entry.contains("lladdr") || entry.contains(&victim.mac),
                    "{name}: {entry}"
                );
                Ok(())
            })
        });
        is_over.store(true, Relaxed);
        let served = owner.join().expect("it does not panic");
        robbed.and(served)
    })?;
    assert!(served > 0);
    counts(&embassy, "embassy_spoofed_total", 1)
}

/// All changes that move an address or a port, with the guard: none of them is an attack.
#[test]
fn a_rightful_owner_is_never_shut_out() -> Result<()> {
    let host = Host::start()?;
    web(&host, "red")?;
    let net = host.network("net", ["--subnet=10.84.0.0/24"])?;
    let embassy = host.embassy(["--dnat", ETCD, NFT, FULL])?;
    embassy.wait_ready(READY)?;
    let app = host.client("app").env("BACKEND_RED", "/services/red;80").start()?;
    reaches(&app, "172.17.0.1:80", "red")?;
    let bound = |expected: u64| {
        testbed::eventually(WAIT, &format!("{expected} bound addresses"), || {
            let bound = metric(&embassy, "embassy_guarded_addresses")?;
            ensure!(bound == expected, "{bound}");
            Ok(())
        })
    };
    // The addresses of the container and of the web server.
    bound(2)?;
    // Another run has another port.
    app.stop()?;
    app.start()?;
    let answers = app.get("172.17.0.1:80").times(20).run()?;
    assert_eq!(answers.from("red"), 20, "{answers:?}");
    // It is connected to a second network, and leaves the first one.
    app.connect(net.name())?;
    bound(3)?;
    reaches(&app, "10.84.0.1:80", "red")?;
    reaches(&app, "172.17.0.1:80", "red")?;
    app.disconnect("bridge")?;
    reaches(&app, "10.84.0.1:80", "red")?;
    app.connect("bridge")?;
    reaches(&app, "172.17.0.1:80", "red")?;
    bound(3)?;
    // A container that uses its network.
    let sidecar = host
        .client("sidecar")
        .network("container:app")
        .env("BACKEND_RED", "/services/red;82")
        .start()?;
    reaches(&sidecar, "172.17.0.1:82", "red")?;
    // A port is renamed and moved to another bridge by hand. Its address is then in doubt, and works again afterwards.
    let port = "ip -o link show master docker0 | cut -d: -f2 | cut -d@ -f1 | tail -n 1";
    let port = host.run("sh", ["-ec", port])?.trim().to_owned();
    host.run("ip", ["link", "set", &port, "down"])?;
    host.run("ip", ["link", "set", &port, "name", "renamed0", "up"])?;
    reaches(&app, "172.17.0.1:80", "red")?;
    let move_all = "mac=$(ip -o link show docker0 | sed 's/.*ether \\([^ ]*\\) .*/\\1/')
        ip addr flush dev docker0; ip link set docker0 down
        ip link add other0 address $mac type bridge; ip link set other0 up
        ip addr add 172.17.0.1/16 dev other0
        ip -o link show master docker0 | cut -d: -f2 | cut -d@ -f1 | while read port; do
            ip link set $port master other0; done";
    host.run("sh", ["-ec", move_all])?;
    reaches(&app, "172.17.0.1:80", "red")?;
    // An address that changes owners works for the new owner at once.
    let address = app.ip_on(net.name())?;
    app.remove()?;
    sidecar.remove()?;
    let next = host
        .client("next")
        .network(net.name())
        .arg(format!("--ip={address}"))
        .env("BACKEND_RED", "/services/red;80")
        .cmd(["testbed", "peer", "get", "10.84.0.1:80", "-n", "20"])
        .start()?;
    testbed::eventually(WAIT, "the answers to its first act", || {
        let log = next.log()?;
        ensure!(log.contains("red"), "{log}");
        ensure!(!log.contains("refused") && !log.contains("timeout"), "{log}");
        Ok(())
    })?;
    assert_eq!(metric(&embassy, "embassy_spoofed_total")?, 0, "{}", embassy.log());
    Ok(())
}

#[test]
fn where_processes_cannot_be_seen_addresses_are_not_bound_and_that_is_told() -> Result<()> {
    let host = Host::light()?;
    let (owner, thief) = stage(&host)?;
    let victim = Victim::of(&owner, owner.ip()?, VIP)?;
    let mut command = host.command("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]);
    command.arg(embassy_program()?).args(["--dnat", ETCD, NFT]);
    command.env("DOCKER_HOST", host.docker_url());
    let embassy = host.embassy_from(command)?;
    embassy.wait_ready(READY)?;
    reaches(&owner, "172.17.0.1:80", "red")?;
    says(&embassy, &["cannot see the processes of containers", "guarding no addresses"])?;
    says(&embassy, &["addresses of containers are not bound to a bridge port"])?;
    ensure!(metric(&embassy, "embassy_unguarded_addresses")? > 0, "it is counted");
    let status = embassy.admin("/v1/status")?.ok()?;
    ensure!(status.contains("\"cause\":\"unguarded\""), "{status}");
    testbed::eventually(WAIT, "what is not stopped", || {
        let answer = victim.forged(&thief, "0")?;
        ensure!(answer == "red", "{answer}");
        Ok(())
    })
}

/// A network next to the host, like its LAN. `lan0` is the host's end.
fn lan(host: &Host) -> Result<()> {
    let make = "ip netns add lan
        ip link add lan0 type veth peer name eth0 netns lan
        ip addr add 192.168.77.1/24 dev lan0
        ip link set lan0 up
        ip -n lan link set lo up
        ip -n lan addr add 192.168.77.2/24 dev eth0
        ip -n lan link set eth0 up
        ip -n lan route add default via 192.168.77.1
        for name in all lan0; do echo 0 > /proc/sys/net/ipv4/conf/$name/rp_filter; done";
    host.run("sh", ["-ec", make]).map(drop)
}

/// A request from an address on the LAN. Returns the answer.
fn from_lan(host: &Host, source: &str, url: &str) -> Result<String> {
    let mut curl = host.command("nsenter");
    curl.args(["--net=/run/netns/lan", "curl", "--silent", "--max-time", "2"]);
    curl.args(["--interface", source, url]);
    let answer = curl.output()?;
    let text = String::from_utf8_lossy(&answer.stdout).trim().to_owned();
    Ok(if text.is_empty() { "nothing".to_owned() } else { text })
}

#[test]
fn a_host_of_the_lan_speaks_as_no_container_by_nft() -> Result<()> {
    lan_speaks(NFT)
}

#[test]
fn a_host_of_the_lan_speaks_as_no_container_by_iptables() -> Result<()> {
    lan_speaks(IPTABLES)
}

/// A host on the LAN can forge an address of a macvlan network, and receives the answers.
fn lan_speaks(firewall: &str) -> Result<()> {
    let host = Host::start()?;
    lan(&host)?;
    web(&host, "red")?;
    let far = ["--driver=macvlan", "--opt=parent=lan0", "--subnet=192.168.77.0/24"];
    let far = host.network("far", far)?;
    let app = host
        .client("app")
        .network(far.name())
        .arg("--ip=192.168.77.5")
        .env("BACKEND_RED", "/services/red;80")
        .start()?;
    let near = host.client("near").env("BACKEND_RED", "/services/red;80").start()?;
    // It can reach the host's bridge via the LAN.
    host.run("ip", ["-n", "lan", "addr", "add", "192.168.77.5/24", "dev", "eth0"])?;
    let embassy = host.embassy(["--dnat", ETCD, firewall])?;
    embassy.wait_ready(READY)?;
    reaches(&near, "172.17.0.1:80", "red")?;
    let routes = metric(&embassy, "embassy_routes")?;
    assert_eq!(routes, 2, "the address is a route's, and only its rules stop the others");
    for _ in 0..3 {
        assert_eq!(from_lan(&host, "192.168.77.5", "http://172.17.0.1/")?, "nothing");
    }
    assert_eq!(metric(&embassy, r#"embassy_connections_total{outcome="closed"}"#)?, 1);
    // It cannot use an address on a bridge either: answers would go elsewhere, but even the connection must not be
    // accepted.
    host.run("ip", ["-n", "lan", "addr", "add", &format!("{}/32", near.ip()?), "dev", "lo"])?;
    let _ = from_lan(&host, &near.ip()?.to_string(), "http://172.17.0.1/")?;
    let started = metric(&embassy, "embassy_connections_started_total")?;
    assert_eq!(started, 1, "{}", embassy.log());
    // With --proxy-ip on an address that is not a bridge's, such a network is served. It cannot be guarded.
    embassy.terminate()?;
    assert!(embassy.wait(WAIT)?.success());
    let embassy = host.embassy(["--dnat", ETCD, firewall, "--proxy-ip=192.168.77.1"])?;
    embassy.wait_ready(READY)?;
    testbed::eventually(WAIT, "an answer", || {
        let answer = from_lan(&host, "192.168.77.5", "http://192.168.77.1/")?;
        ensure!(answer == "red", "{answer}");
        Ok(())
    })?;
    drop(app);
    Ok(())
}

#[test]
fn with_all_ports_captured_the_hosts_own_services_answer_the_lan_by_nft() -> Result<()> {
    lan_is_served(NFT)
}

#[test]
fn with_all_ports_captured_the_hosts_own_services_answer_the_lan_by_iptables() -> Result<()> {
    lan_is_served(IPTABLES)
}

/// The VIP is the host's own address: only containers' connections are captured. Port 9999 answers nobody else.
fn lan_is_served(firewall: &str) -> Result<()> {
    let host = Host::light()?;
    lan(&host)?;
    web(&host, "red")?;
    let _own = host.spawn("own", {
        let mut command = host.command(testbed::testbed_program()?);
        command.args(["peer", "http", "--name", "own", "--port", "22"]);
        command
    })?;
    let app = host.client("app").env("BACKEND_RED", "/services/red;80").start()?;
    let vip = "--proxy-ip=192.168.77.1";
    let embassy = host.embassy(["--dnat", ETCD, firewall, "--capture=all", vip])?;
    embassy.wait_ready(READY)?;
    reaches(&app, "192.168.77.1:80", "red")?;
    ends(&app, "192.168.77.1:22", "reset")?;
    assert_eq!(from_lan(&host, "192.168.77.2", "http://192.168.77.1:22/")?, "own");
    assert_eq!(from_lan(&host, "192.168.77.2", "http://192.168.77.1/")?, "nothing");

    let refused = || metric(&embassy, "embassy_direct_dials_refused_total");
    let mut before = refused()?;
    let local = |address: &str| -> Result<bool> {
        let url = format!("http://{address}:9999/");
        let error = host.run("curl", ["--silent", "--show-error", "--max-time", "5", &url]);
        // 7: curl could not connect (man curl). If embassy accepts and resets, it is 56.
        Ok(format!("{:#}", error.unwrap_err()).contains("exit status: 7"))
    };
    for address in ["127.0.0.1", "192.168.77.1", HOST_ADDRESS] {
        assert!(local(address)?, "{address}");
        counts(&embassy, "embassy_direct_dials_refused_total", before + 1)?;
        before = refused()?;
    }
    assert_eq!(from_lan(&host, "192.168.77.2", "http://192.168.77.1:9999/")?, "nothing");
    counts(&embassy, "embassy_direct_dials_refused_total", before + 1)?;
    ends(&app, "172.17.0.1:9999", "refused")?;
    // None of them was accepted.
    assert_eq!(metric(&embassy, r#"embassy_connections_total{outcome="direct_dial"}"#)?, 0);
    assert_eq!(app.get("192.168.77.1:80").run()?.from("red"), 1);
    Ok(())
}

/// `cargo test --release --test it figures_of_the_guard -- --ignored --nocapture`. `ROUNDS` (10) of `CONNECTIONS` (2000)
/// each.
#[test]
#[ignore = "it measures"]
fn figures_of_the_guard() -> Result<()> {
    let number = |name: &str, default: usize| {
        std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
    };
    let (rounds, times) = (number("ROUNDS", 10), number("CONNECTIONS", 2000));
    let host = Host::light()?;
    let (owner, _thief) = stage(&host)?;
    let guards = [OFF, GUARD, FULL];
    let mut figures = [const { Vec::new() }; 3];
    // Each round measures all of them, starting with a different one.
    for round in 0..rounds {
        for n in (0..guards.len()).map(|n| (n + round) % guards.len()) {
            let embassy = host.embassy(["--dnat", ETCD, NFT, guards[n]])?;
            embassy.wait_ready(READY)?;
            reaches(&owner, "172.17.0.1:80", "red")?;
            let start = std::time::Instant::now();
            let answers = owner.get("172.17.0.1:80").times(times).run()?;
            ensure!(answers.from("red") == times, "{answers:?}");
            figures[n].push(start.elapsed().as_secs_f64() * 1e6 / times as f64);
            embassy.kill()?;
        }
    }
    for (guard, figures) in guards.iter().zip(&mut figures) {
        figures.sort_by(f64::total_cmp);
        let (first, median, last) = (figures[0], figures[rounds / 2], figures[rounds - 1]);
        println!(
            "{guard}: {median:.1} us per connection with one request ({first:.1} to {last:.1})"
        );
    }
    Ok(())
}

/// An address of one bridge is not accepted on another, with or without the guard.
#[test]
fn an_address_counts_on_its_own_bridge_alone() -> Result<()> {
    for firewall in [NFT, IPTABLES] {
        let host = Host::start()?;
        web(&host, "red")?;
        let net = host.network("net", ["--subnet=10.85.0.0/24"])?;
        let owner = host.client("owner").env("BACKEND_RED", "/services/red;80").start()?;
        let thief = host.client("thief").network(net.name()).start()?;
        let embassy = host.embassy(["--dnat", ETCD, firewall, OFF])?;
        embassy.wait_ready(READY)?;
        reaches(&owner, "172.17.0.1:80", "red")?;
        let address: Ipv4Addr = owner.ip()?;
        output(thief.command("ip")?.args(["addr", "add", &format!("{address}/32"), "dev", "lo"]))?;
        let mut curl = thief.command("curl")?;
        curl.args(["--silent", "--max-time", "2", "--interface", &address.to_string()]);
        let answer = curl.arg("http://172.17.0.1/").output()?;
        assert!(answer.stdout.is_empty(), "{answer:?}");
        assert_eq!(metric(&embassy, "embassy_connections_started_total")?, 1);
        let said = embassy.admin("/v1/explain?consumer=owner&port=80")?.json()?;
        assert_eq!(said["consumers"][0]["arrivals"][0], format!("{address} by docker0"), "{said}");
    }
    Ok(())
}
