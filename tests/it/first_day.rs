//! Problems of the first day: a forgotten option, an outdated address, a missing registry. embassy reports them at once,
//! and all commands say the same.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use embassy::admin::api::{self, EndpointHealth, RouteState, Verdict};
use serde::de::DeserializeOwned;
use testbed::{Container, Embassy, Host, embassy_program};

use crate::{
    READY, WAIT,
    support::{ends, reaches, says, without_programs},
};

/// docker0's address in 2015.
const OLD_VIP: &str = "172.17.42.1";
const VIP: &str = "172.17.0.1";

/// A light host with a service `web` in a file, and a consumer that declares it on port 80.
struct Day {
    host: Host,
    app: Container,
    discovery: String,
}

impl Day {
    fn begins() -> Result<Self> {
        let host = Host::light()?;
        let web = host.web("web").start()?;
        let file = host.dir().join("services.toml");
        let service = |name: &str, endpoint: &str| {
            format!("[[service]]\nname = \"{name}\"\nendpoints = [\"{endpoint}\"]\n")
        };
        let ip = web.ip()?;
        // No program listens on port 81.
        let services = service("web", &format!("{ip}:80")) + &service("dead", &format!("{ip}:81"));
        fs::write(&file, services)?;
        let app = host.client("app").env("BACKEND_WEB", "web;80").env("BACKEND_DEAD", "dead;81");
        let app = app.env("BACKEND_OWN", "web;9999").start()?;
        Ok(Self { discovery: format!("-discovery=file://{}", file.display()), host, app })
    }

    fn embassy(&self, flags: &[&str], environment: &[(&str, &str)]) -> Result<Embassy> {
        let mut command = self.host.embassy_command([&[&*self.discovery], flags].concat())?;
        command.envs(environment.iter().copied());
        self.host.embassy_from(command)
    }

    /// A command of embassy in a container's network.
    fn inside(&self, container: &Container, words: &[&str]) -> Result<Command> {
        let mut command = container.command(embassy_program()?)?;
        command.args(words).env("DOCKER_HOST", self.host.docker_url()).env("PROXY_IP", OLD_VIP);
        Ok(command)
    }
}

/// The output of a command, and whether it succeeds.
fn said(mut command: Command) -> Result<(String, bool)> {
    let output = command.output()?;
    let text = String::from_utf8([output.stdout, output.stderr].concat())?;
    let code = output.status.code().context("it was killed")?;
    ensure!(code < 2, "{code}: {text}");
    Ok((text, code == 0))
}

fn read<T: DeserializeOwned>(mut command: Command) -> Result<(T, bool)> {
    command.arg("--json");
    let (text, yes) = said(command)?;
    Ok((serde_json::from_str(&text).context(text)?, yes))
}

/// Waits until the explanation of a port of `app` begins with this cause, and all other reports agree.
fn explains(
    command: impl Fn(&[&str]) -> Result<Command>,
    port: &str,
    verdict: Verdict,
    cause: &str,
) -> Result<api::Explain> {
    let mut last = None;
    testbed::eventually(WAIT, &format!("port {port} to be {verdict} by {cause}"), || {
        let (explain, yes) = read::<api::Explain>(command(&["explain", "app", port])?)?;
        let first = explain.findings.first().context("no findings")?;
        ensure!((explain.verdict, &*first.cause) == (verdict, cause), "{explain:#?}");
        ensure!(yes == (verdict != Verdict::Broken), "{explain:#?}");
        let (status, _) = read::<api::Status>(command(&["status"])?)?;
        ensure!(status.verdict >= verdict, "{status:#?}");
        last = Some(explain);
        Ok(())
    })?;
    last.context("no explanation")
}

fn not_ready(command: impl Fn(&[&str]) -> Result<Command>) -> Result<()> {
    let (status, yes) = read::<api::Status>(command(&["status"])?)?;
    ensure!(!status.ready && !yes, "{status:#?}");
    let (text, yes) = said(command(&["wait", "web", "--timeout=0"])?)?;
    ensure!(!yes, "{text}");
    Ok(())
}

/// The checks of `doctor` that fail or warn.
fn doctor(command: Command) -> Result<Vec<String>> {
    let (findings, _) = read::<Vec<serde_json::Value>>(command)?;
    let text = |finding: &serde_json::Value, name: &str| {
        finding[name].as_str().unwrap_or_default().to_owned()
    };
    let bad = findings.iter().filter(|finding| finding["level"] != "ok");
    Ok(bad.map(|one| format!("{} {}", text(one, "check"), text(one, "what"))).collect())
}

#[test]
fn a_container_without_the_hosts_network_says_that_nothing_arrives() -> Result<()> {
    let day = Day::begins()?;
    let proxy = day.host.client("proxy").start()?;
    let inside = |words: &[&str]| {
        let mut command = day.inside(&proxy, words)?;
        command.env_remove("PROXY_IP");
        Ok(command)
    };
    let process = day.host.spawn("proxy", inside(&["--dnat", &day.discovery])?)?;
    let explain = explains(inside, "80", Verdict::Broken, "elsewhere")?;
    assert!(explain.findings[0].fix.as_ref().is_some_and(|fix| fix.contains("--net=host")));
    assert_eq!((explain.captured, explain.dial), (Some(false), Vec::new()));
    not_ready(inside)?;
    let log = process.log();
    assert!(log.contains("connections do not arrive here"), "{log}");
    // The same as /readyz, although every part of the start is ready.
    testbed::eventually(WAIT, "the log to say that it is not ready", || {
        let log = process.log();
        ensure!(
            log.contains("embassy is not ready") && log.contains("do not arrive here"),
            "{log}"
        );
        Ok(())
    })?;
    assert!(!process.log().contains("embassy is ready"), "{}", process.log());
    let found = doctor(inside(&["doctor", "--dnat", &day.discovery])?)?;
    assert!(found.iter().any(|one| one.starts_with("vip ")), "{found:#?}");
    // This is true.
    ends(&day.app, format!("{VIP}:80"), "refused")?;
    ends(&day.app, format!("{}:80", proxy.ip()?), "refused")
}

#[test]
fn an_address_that_docker0_had_once_is_no_address() -> Result<()> {
    let day = Day::begins()?;
    let embassy = day.embassy(&["--dnat"], &[("PROXY_IP", OLD_VIP)])?;
    let command = |words: &[&str]| day.host.embassy_command(words);
    explains(command, "80", Verdict::Broken, "elsewhere")?;
    not_ready(command)?;
    says(&embassy, &["connections do not arrive here", OLD_VIP, "--proxy-ip"])?;
    // With an additional address of this host, connections arrive.
    embassy.kill()?;
    let both = format!("{OLD_VIP},{VIP}");
    let embassy = day.embassy(&["--dnat"], &[("PROXY_IP", &both)])?;
    embassy.wait_ready(READY)?;
    let explain = explains(command, "80", Verdict::Ok, "goes_to")?;
    assert_eq!(explain.dial, [format!("{VIP}:80")]);
    reaches(&day.app, format!("{VIP}:80"), "web")?;
    // All runs write to the same log.
    let said = embassy.log().matches("connections do not arrive here").count();
    assert_eq!(said, 1, "{}", embassy.log());
    // An address outside of the container's networks is reached via its gateway.
    embassy.kill()?;
    let embassy = day.embassy(&["--dnat", "--proxy-ip=10.9.9.9"], &[])?;
    embassy.wait_ready(READY)?;
    let explain = explains(command, "80", Verdict::Ok, "goes_to")?;
    assert_eq!(explain.dial, ["10.9.9.9:80"]);
    reaches(&day.app, "10.9.9.9:80", "web")
}

#[test]
fn a_linked_container_is_dialled_at_its_own_address() -> Result<()> {
    let day = Day::begins()?;
    let proxy = day.host.client("proxy").start()?;
    let inside = |words: &[&str]| day.inside(&proxy, words);
    let process = day.host.spawn("proxy", inside(&["--redirect", &day.discovery])?)?;
    let explain = explains(inside, "80", Verdict::Ok, "goes_to")?;
    let own = format!("{}:80", proxy.ip()?);
    assert_eq!(explain.dial, [&*own]);
    reaches(&day.app, &own, "web")?;
    let (plan, _) = said(inside(&["plan", "--redirect", &day.discovery])?)?;
    assert!(plan.contains(&proxy.ip()?.to_string()), "{plan}");
    let found = doctor(inside(&["doctor", "--redirect", &day.discovery])?)?;
    assert!(!found.iter().any(|one| one.starts_with("vip ")), "{found:#?}");
    assert!(!process.log().contains("do not arrive"), "{}", process.log());
    Ok(())
}

#[test]
fn that_nothing_captures_is_said_until_something_does() -> Result<()> {
    let day = Day::begins()?;
    let command = |words: &[&str]| day.host.embassy_command([words, &[&day.discovery]].concat());
    let plain = |words: &[&str]| day.host.embassy_command(words);
    let embassy = day.embassy(&[], &[])?;
    says(&embassy, &["no rule leads to embassy's port"])?;
    let told = explains(plain, "80", Verdict::Broken, "no_own_rule")?;
    assert!(told.findings[0].fix.as_ref().is_some_and(|fix| fix.contains("--dnat")), "{told:#?}");
    assert_eq!((told.captured, told.routes[0].state), (Some(false), RouteState::NotCaptured));
    not_ready(plain)?;
    says(&embassy, &["embassy is not ready", "no rule of this host leads to embassy's port 9999"])?;
    assert!(!embassy.log().contains("embassy is ready"), "{}", embassy.log());
    assert_eq!(embassy.admin("/readyz")?.status, 503);
    let (plan, _) = said(command(&["plan"])?)?;
    assert!(plan.contains("No rule leads to embassy's port"), "{plan}");
    let found = doctor(command(&["doctor"])?)?;
    assert!(found.iter().any(|one| one.starts_with("firewall ")), "{found:#?}");

    // A user's own rule, for an address that is not a VIP of embassy.
    let rule = format!("-t nat -I PREROUTING -p tcp -d {OLD_VIP} -j REDIRECT --to-ports 9999");
    day.host.run("iptables", rule.split(' '))?;
    day.host.run("ip", ["addr", "add", &format!("{OLD_VIP}/32"), "dev", "docker0"])?;
    let (plan, _) = said(command(&["plan"])?)?;
    assert!(plan.contains("Your own rules that lead to embassy's port"), "{plan}");
    // It is noticed before any connection.
    says(&embassy, &["your own rules lead to embassy's port", "REDIRECT --to-ports 9999"])?;
    embassy.wait_ready(READY)?;
    let told = explains(plain, "80", Verdict::Ok, "goes_to")?;
    assert_eq!(told.dial, [format!("{OLD_VIP}:80")], "the rule takes no connections to the VIP");
    reaches(&day.app, format!("{OLD_VIP}:80"), "web")?;
    explains(plain, "80", Verdict::Ok, "goes_to")?;
    let found = doctor(command(&["doctor"])?)?;
    let is_wrong = |one: &String| {
        ["firewall ", "leftover ", "capture "].iter().any(|check| one.starts_with(check))
    };
    assert!(!found.iter().any(is_wrong), "{found:#?}");

    // The rule is removed, and another one matches one of the two ports.
    day.host.run("iptables", rule.replace("-I", "-D").split(' '))?;
    explains(plain, "80", Verdict::Broken, "no_own_rule")?;
    not_ready(plain)?;
    ends(&day.app, format!("{OLD_VIP}:80"), "refused")?;
    let of_81 = rule.replace("-d", "--dport 81 -d");
    day.host.run("iptables", of_81.split(' '))?;
    explains(plain, "80", Verdict::Broken, "passed_by")?;
    let (routes, _) = read::<Vec<api::Route>>(plain(&["ps"])?)?;
    let states: Vec<_> = routes.iter().map(|route| (route.port, route.state)).collect();
    assert_eq!(states, [(80, RouteState::NotCaptured), (81, RouteState::Ok)]);
    embassy.wait_ready(READY)?;
    says(&embassy, &["your own rules do not take connections to these ports", "[80]"])?;
    let (text, yes) = said(plain(&["wait", "web", "--timeout=0"])?)?;
    assert!(!yes && text.contains("do not take connections to 80"), "{text}");
    day.host.run("iptables", of_81.replace("-I", "-D").split(' '))?;
    day.host.run("iptables", rule.split(' '))?;
    explains(plain, "80", Verdict::Ok, "goes_to")?;
    embassy.kill()?;

    let embassy = day.embassy(&[], &[])?;
    says(&embassy, &["your own rules lead to embassy's port", "REDIRECT --to-ports 9999"])?;
    assert!(!embassy.log().contains("no VIP"), "{}", embassy.log());
    embassy.kill()?;
    // Leftover rules are found, and reported with the command that deletes them.
    let found = doctor(command(&["doctor", "--dnat"])?)?;
    assert!(found.len() == 1 && found[0].starts_with("leftover "), "{found:#?}");
    let (text, _) = said(command(&["doctor", "--dnat"])?)?;
    assert!(text.contains("iptables -t nat -D PREROUTING -d 172.17.42.1/32"), "{text}");
    Ok(())
}

/// The rules of nf_tables are read from the kernel, those of the newer iptables among them. With TPROXY connections do not reach embassy.
#[test]
fn rules_of_ones_own_are_read_where_no_program_is_installed() -> Result<()> {
    let day = Day::begins()?;
    let plain = |words: &[&str]| day.host.embassy_command(words);
    let rule =
        format!("-t nat -I PREROUTING -p tcp -d {VIP} --dport 80 -j REDIRECT --to-ports 9999");
    day.host.run("iptables", rule.split(' '))?;
    let mut command = without_programs(&day.host)?;
    command.args([&*day.discovery, "--state-dir=off"]);
    let embassy = day.host.embassy_from(command)?;
    says(&embassy, &["your own rules lead to embassy's port", "--dport 80 -j REDIRECT"])?;
    embassy.wait_ready(READY)?;
    explains(plain, "80", Verdict::Ok, "goes_to")?;
    explains(plain, "81", Verdict::Broken, "passed_by")?;
    let (text, yes) = said(plain(&["wait", "web", "--consumer=app", "--timeout=0"])?)?;
    assert!(yes && !text.contains("not known"), "{text}");
    day.host.run("iptables", rule.replace("-I", "-D").split(' '))?;
    explains(plain, "80", Verdict::Broken, "no_own_rule")?;
    day.host.run("iptables", rule.split(' '))?;
    explains(plain, "80", Verdict::Ok, "goes_to")?;
    let tproxy = "-t mangle -A PREROUTING -p tcp --dport 80 -j TPROXY --on-port 9999";
    day.host.run("iptables", tproxy.split(' '))?;
    says(&embassy, &["a TPROXY rule leads to embassy's port"])?;
    explains(plain, "80", Verdict::Broken, "tproxy")?;
    Ok(())
}

/// README's second way, and one flag less: an engine is asked, which is not there.
#[test]
fn services_that_nobody_reads_are_named_as_the_reason_that_an_engine_is_asked() -> Result<()> {
    let host = Host::light()?;
    let flags = ["--redirect", "-services=web;80", "-discovery=etcd://127.0.0.1:2379"];
    let more = ["--proxy-ip=172.17.0.1", "--state-dir=off", "-docker=unix:///no/such.sock"];
    let _embassy = host.embassy([&flags[..], &more].concat())?;
    testbed::eventually(WAIT, "the forgotten flag to be named", || {
        let (status, _) = read::<api::Status>(host.embassy_command(["status"])?)?;
        let fixes = status.findings.iter().filter_map(|finding| finding.fix.as_deref());
        let named = fixes.filter(|fix| fix.contains("-provider=static")).count();
        ensure!(named == 1, "{status:#?}");
        Ok(())
    })?;
    let (text, _) = said(host.embassy_command(["doctor"])?)?;
    ensure!(text.contains("fix: start embassy with -provider=static"), "{text}");
    Ok(())
}

#[test]
fn a_dead_registry_is_missed_before_anybody_needs_it() -> Result<()> {
    let host = Host::light()?;
    let file = host.dir().join("late.toml");
    let late = format!("-discovery=file://{}", file.display());
    let embassy = host.embassy(["--dnat", "--hold=0", "-discovery=consul://127.0.0.1:1", &late])?;
    let waits_for = |names: &[&str]| {
        let names: Vec<_> = names.iter().map(ToString::to_string).collect();
        testbed::eventually(WAIT, &format!("embassy to wait for {names:?}"), || {
            let answer = embassy.admin("/readyz")?;
            let ready: api::Ready = serde_json::from_str(&answer.body)?;
            ensure!((answer.status, &*ready.sources) == (503, &*names), "{ready:?}");
            let status: api::Status = serde_json::from_str(&embassy.admin("/v1/status")?.ok()?)?;
            ensure!(
                (status.sources_down, status.verdict) == (names.len(), Verdict::Broken),
                "{status:#?}"
            );
            Ok(())
        })
    };
    waits_for(&["consul", "file"])?;
    says(&embassy, &["source has not answered yet", "source=\"consul\""])?;
    // A discovery that has answered is not waited for any more, whatever the others do.
    fs::write(&file, "service = []")?;
    waits_for(&["consul"])?;
    let app = host.client("app").env("BACKEND_WEB", "web;80;via=consul").start()?;
    ends(&app, format!("{VIP}:80"), "reset")?;
    waits_for(&["consul web"])?;
    app.remove()?;
    waits_for(&["consul"])?;
    embassy.kill()?;

    // A discovery that has answered is not queried any more.
    let embassy = host.embassy(["--dnat", &late])?;
    embassy.wait_ready(READY)?;
    testbed::eventually(WAIT, "no source but the provider", || {
        let sources = embassy.admin("/v1/sources")?.json()?;
        ensure!(sources["total"] == 1, "{sources:#}");
        Ok(())
    })
}

#[test]
fn a_binding_on_embassys_own_port_has_no_route() -> Result<()> {
    let day = Day::begins()?;
    let embassy = day.embassy(&["--dnat"], &[])?;
    embassy.wait_ready(READY)?;
    says(&embassy, &["binding has no route", "BACKEND_OWN", "port 9999 is embassy's own"])?;
    let command = |words: &[&str]| day.host.embassy_command(words);
    explains(command, "9999", Verdict::Broken, "unrouted")?;
    ends(&day.app, format!("{VIP}:9999"), "refused")?;
    // The others are served.
    reaches(&day.app, format!("{VIP}:80"), "web")?;
    embassy.kill()?;
    let embassy = day.embassy(&["--dnat", "-p=9998"], &[])?;
    embassy.wait_ready(READY)?;
    reaches(&day.app, format!("{VIP}:9999"), "web")
}

#[test]
fn a_service_whose_only_endpoint_refuses_is_broken_also_between_two_tries() -> Result<()> {
    let day = Day::begins()?;
    let embassy = day.embassy(&["--dnat"], &[])?;
    embassy.wait_ready(READY)?;
    ends(&day.app, format!("{VIP}:81"), "reset")?;
    let command = |words: &[&str]| day.host.embassy_command(words);
    testbed::eventually(WAIT, "the ejection to end", || {
        let (all, _) =
            read::<Vec<api::Endpoint>>(command(&["ps", "--endpoints", "--service=dead"])?)?;
        let state = all.first().context("no endpoint")?.health.state;
        ensure!(state == EndpointHealth::Probing, "{state}");
        Ok(())
    })?;
    let explain = explains(command, "81", Verdict::Broken, "all_ejected")?;
    assert_eq!(explain.routes[0].state, RouteState::Ejected);
    let (status, _) = read::<api::Status>(command(&["status"])?)?;
    let told = status.findings.iter().any(|one| one.cause == "routes" && one.text.contains("dead"));
    assert!(told && status.routes_broken == 1, "{status:#?}");
    let (text, yes) = said(command(&["wait", "dead", "--timeout=0"])?)?;
    assert!(!yes, "{text}");
    explains(command, "80", Verdict::Ok, "goes_to")?;
    Ok(())
}

/// embassy as root with only these capabilities.
fn as_root_with(host: &Host, capabilities: &str, flags: &[&str]) -> Result<Embassy> {
    let mut command = host.command("setpriv");
    command.args([&format!("--bounding-set=-all,{capabilities}"), "--inh-caps=-all"]);
    command.arg("--no-new-privs").arg(embassy_program()?).args(flags);
    command.env("DOCKER_HOST", host.docker_url());
    host.embassy_from(command)
}

/// The user ID in embassy's image and package.
const USER: u32 = 59990;
const GROUP: u32 = 4242;

#[test]
fn the_unit_of_systemd_has_flags_that_embassy_takes_and_rights_that_it_needs() -> Result<()> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("dist/embassy.service");
    let unit = fs::read_to_string(file)?;
    let setting = |name: &str| {
        let found = unit.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        found.with_context(|| format!("no {name}"))
    };
    let words = setting("ExecStart")?.strip_prefix("/usr/bin/embassy ").context("a program")?;
    let words: Vec<_> = words.split(' ').filter(|word| *word != "$EMBASSY_FLAGS").collect();
    let capabilities = |name| -> Result<String> {
        let names = setting(name)?.to_lowercase();
        let names: Vec<_> = names.split(' ').map(|name| name.replace("cap_", "+")).collect();
        Ok(names.join(","))
    };
    assert_ne!(setting("User")?, "root");
    let day = Day::begins()?;
    // As Docker's socket: owned by root and a group.
    let socket = day.host.docker_url().trim_start_matches("unix://").to_owned();
    day.host.run("chgrp", [&GROUP.to_string(), &socket])?;
    day.host.run("chmod", ["660", &socket])?;
    let state = day.host.dir().join("of-embassy");
    fs::create_dir(&state)?;
    std::os::unix::fs::chown(&state, Some(USER), Some(USER))?;
    let state = format!("--state-dir={}", state.display());
    for firewall in ["--firewall=nft", "--firewall=iptables"] {
        let mut command = day.host.command("setpriv");
        command.args([
            format!("--bounding-set=-all,{}", capabilities("CapabilityBoundingSet")?),
            format!("--inh-caps=-all,{}", capabilities("AmbientCapabilities")?),
            format!("--ambient-caps=-all,{}", capabilities("AmbientCapabilities")?),
            format!("--reuid={USER}"),
            format!("--regid={USER}"),
            format!("--groups={GROUP}"),
        ]);
        command.arg("--no-new-privs").arg(embassy_program()?).args(&words);
        command.args([&*day.discovery, firewall, &state]);
        command.env("DOCKER_HOST", day.host.docker_url());
        let embassy = day.host.embassy_from(command)?;
        embassy.wait_ready(READY)?;
        reaches(&day.app, format!("{VIP}:80"), "web")?;
        let log = embassy.log();
        assert!(!log.contains("cannot see") && !log.contains("cannot write"), "{log}");
        embassy.terminate()?;
        assert!(embassy.wait(WAIT)?.success());
    }
    Ok(())
}

#[test]
fn a_state_directory_of_another_user_is_named_with_its_owner() -> Result<()> {
    let day = Day::begins()?;
    let folder = day.host.dir().join("state");
    fs::create_dir(&folder)?;
    std::os::unix::fs::chown(&folder, Some(65534), Some(65534))?;
    let state = format!("--state-dir={}", folder.display());
    let embassy = as_root_with(&day.host, "+net_admin", &["--dnat", &day.discovery, &state])?;
    let named = format!("{} belongs to user 65534", folder.display());
    says(&embassy, &["cannot write the state file", &named, "embassy runs as user 0"])?;
    // It serves nevertheless.
    reaches(&day.app, format!("{VIP}:80"), "web")
}

#[test]
fn tags_are_shown_as_their_user_wrote_them() -> Result<()> {
    let host = Host::light()?;
    let web = host.web("web").start()?;
    let file = host.dir().join("services.toml");
    let service = format!("tags = [\"eu\", \"prod\"]\nendpoints = [\"{}:80\"]\n", web.ip()?);
    fs::write(&file, format!("[[service]]\nname = \"web\"\n{service}"))?;
    let one = host.client("one").env("BACKEND_WEB", "web[prod,eu];80").start()?;
    let two = host.client("two").env("BACKEND_WEB", "web[eu,prod];80").start()?;
    let embassy = host.embassy(["--dnat", &format!("-discovery=file://{}", file.display())])?;
    embassy.wait_ready(READY)?;
    for (app, name, asked) in [(&one, "one", "web[prod,eu]"), (&two, "two", "web[eu,prod]")] {
        reaches(app, format!("{VIP}:80"), "web")?;
        let of = |words: &[&str]| said(host.embassy_command(words)?);
        for words in [&["ps", "--consumer", name][..], &["explain", name, "80"]] {
            let (text, yes) = of(words)?;
            ensure!(yes && text.contains(asked), "{words:?}: {text}");
            let other = if name == "one" { "web[eu,prod]" } else { "web[prod,eu]" };
            ensure!(!text.contains(other), "{words:?}: {text}");
        }
        says(&embassy, &["new route", &format!("consumer={name} "), asked])?;
        // They are a set: the order does not matter.
        for wanted in ["web[prod,eu]", "web[eu,prod]"] {
            let (text, yes) = of(&["wait", wanted, "--consumer", name, "--timeout=10s"])?;
            ensure!(yes, "{text}");
        }
    }
    let sources = embassy.admin("/v1/sources")?.json()?;
    ensure!(sources["total"] == 2, "the provider, and one query: {sources:#}");
    Ok(())
}

/// Every command that takes a consumer says the same sentence.
#[test]
fn a_consumer_that_is_not_known_is_called_so_with_names_that_are_near() -> Result<()> {
    let day = Day::begins()?;
    let embassy = day.embassy(&["--dnat"], &[])?;
    embassy.wait_ready(READY)?;
    for (name, near) in [("apq", "; near: app."), ("nosuch", "\"nosuch\". If")] {
        for words in [
            &["ps", "--consumer", name][..],
            &["explain", name, "80"],
            &["wait", "web", "--consumer", name, "--timeout=0"],
        ] {
            let (text, yes) = said(day.host.embassy_command(words)?)?;
            let known = "No running container with a binding has the name, ID or address";
            ensure!(!yes && text.contains(known) && text.contains(near), "{words:?}: {text}");
        }
    }
    // A known consumer without matching entries is reported differently.
    let (text, yes) =
        said(day.host.embassy_command(["ps", "--consumer=app", "--state=waiting"])?)?;
    ensure!(yes && text.contains("no entry matches"), "{text}");
    let wait = ["wait", "nosuch", "--consumer=app", "--timeout=0"];
    let (text, yes) = said(day.host.embassy_command(wait)?)?;
    ensure!(!yes && text.contains("app does not ask for nosuch; it asks for dead, web"), "{text}");
    Ok(())
}

/// A mistake in a variable's option is reported for its port only.
#[test]
fn a_variable_with_a_wrong_option_is_explained_at_its_port() -> Result<()> {
    let day = Day::begins()?;
    let app =
        day.host.client("wrong").env("BACKEND_WEB", "web;80").env("BACKEND_B", "web;81;lb=fast");
    let _app = app.start()?;
    let embassy = day.embassy(&["--dnat"], &[])?;
    embassy.wait_ready(READY)?;
    let explained = |port: &str| said(day.host.embassy_command(["explain", "wrong", port])?);
    let (text, yes) = explained("81")?;
    ensure!(!yes && text.contains("BACKEND_B was skipped") && text.contains("fix: "), "{text}");
    ensure!(!text.contains("not declared"), "{text}");
    let (text, yes) = explained("82")?;
    ensure!(
        !yes && text.contains("Port 82 is not declared") && !text.contains("skipped"),
        "{text}"
    );
    let (text, yes) = explained("80")?;
    ensure!(yes && !text.contains("BACKEND_B"), "{text}");
    Ok(())
}

#[test]
fn a_service_without_endpoints_says_which_of_three_things_is_wrong() -> Result<()> {
    let day = Day::begins()?;
    let app = day.host.client("wrong").env("BACKEND_NAME", "wbe;80");
    let _app = app.env("BACKEND_TAGS", "web[canary];81").start()?;
    let embassy = day.embassy(&["--dnat"], &[])?;
    embassy.wait_ready(READY)?;
    for (port, reason) in [
        ("80", "file wbe: the file has no service of this name; near: web."),
        ("81", "file web[canary]: its one endpoint does not carry [canary]; it carries no tags."),
    ] {
        let (text, yes) = said(day.host.embassy_command(["explain", "wrong", port])?)?;
        ensure!(!yes && text.contains(reason), "{text}");
        // The first line contains it too, because `wait` shows only this line.
        let (_, short) = reason.trim_end_matches('.').split_once(": ").context("a reason")?;
        let first = text.lines().next().unwrap_or_default();
        ensure!(first.contains(&format!("has no endpoint ({short})")), "{text}");
    }
    let (text, yes) = said(day.host.embassy_command(["wait", "wbe", "--timeout=0"])?)?;
    ensure!(!yes && text.contains("near: web"), "{text}");
    let (status, _) = said(day.host.embassy_command(["status"])?)?;
    ensure!(status.contains("near: web."), "{status}");
    says(&embassy, &["service has a problem in its registry", "service=file wbe", "near: web"])
}

#[test]
fn what_is_not_protected_is_said_once_at_the_start_and_by_doctor() -> Result<()> {
    let day = Day::begins()?;
    // No host has this address.
    let flags = ["--dnat", "-discovery=consul://172.17.0.250:8500"];
    let secrets = [("CONSUL_HTTP_TOKEN", "S3CRET")];
    let embassy = day.embassy(&flags, &secrets)?;
    let line = "the Consul token is sent to 172.17.0.250 without TLS";
    says(&embassy, &["WARN", "a connection is not protected", line])?;
    let mut doctor = day.host.embassy_command([&["doctor"], &flags[..]].concat())?;
    let (text, _) = said({
        doctor.envs(secrets);
        doctor
    })?;
    ensure!(text.contains(&format!("warn  protection    {line}")), "{text}");
    ensure!(!text.contains("S3CRET") && !embassy.log().contains("S3CRET"), "{text}");
    assert_eq!(embassy.log().matches("is not protected").count(), 1);
    embassy.kill()?;
    let well = day.embassy(&["--dnat"], &[])?;
    well.wait_ready(READY)?;
    assert_eq!(well.log().matches("is not protected").count(), 1, "of the first embassy");
    Ok(())
}
