//! All ways to ask about a host say the same: `status`, `explain`, `ps`, `wait`, `doctor`, `/readyz` and the API.

use anyhow::{Context, Result, ensure};
use embassy::admin::api::{self, Subject, Verdict};
use serde::de::DeserializeOwned;
use testbed::{Embassy, Host};

use crate::{
    READY, WAIT,
    commands::run,
    support::{ETCD, offer, offer_at, reaches, web},
};

/// A port of a consumer, and its expected state.
struct Expected {
    consumer: &'static str,
    port: u16,
    /// The service in the form that a container and `wait` use.
    service: &'static str,
    verdict: Verdict,
    /// The cause of the explanation's first finding.
    cause: &'static str,
    /// The subject of the status's finding.
    about: Subject,
    /// Whether there is a route.
    routed: bool,
}

fn expected(port: u16, service: &'static str, verdict: Verdict, cause: &'static str) -> Expected {
    let about = Subject::Routes;
    Expected { consumer: "app", port, service, verdict, cause, about, routed: true }
}

/// A command's JSON output, and its exit code.
fn read<T: DeserializeOwned>(host: &Host, words: &[&str]) -> Result<(T, Option<i32>)> {
    let (text, code) = run(host, &[words, &["--json"]].concat())?;
    Ok((serde_json::from_str(&text).with_context(|| format!("{words:?}: {text}"))?, code))
}

/// Checks that all ways to ask about a port give the expected answer.
fn all_say(host: &Host, expected: &Expected) -> Result<()> {
    let &Expected { consumer, port, service, verdict, cause, about, routed } = expected;
    let works = verdict != Verdict::Broken;
    let code_of = |works: bool| Some(if works { 0 } else { 1 });

    let port_text = port.to_string();
    let words = ["explain", consumer, &port_text];
    let (explain, code) = read::<api::Explain>(host, &words)?;
    let first = &explain.findings[0];
    ensure!(
        (explain.verdict, first.verdict, &*first.cause, code)
            == (verdict, verdict, cause, code_of(works)),
        "{explain:#?}"
    );
    ensure!(explain.routes.iter().all(|route| route.verdict == verdict), "{explain:#?}");

    let (routes, _) = read::<Vec<api::Route>>(host, &["ps", "--consumer", consumer])?;
    let route = routes.iter().find(|route| route.port == port && route.query.service == service);
    ensure!(route.map(|route| route.verdict) == routed.then_some(verdict), "{route:#?}");

    let (status, _) = read::<api::Status>(host, &["status"])?;
    let worst = status.findings.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Ok);
    ensure!(status.verdict == worst && status.verdict >= verdict, "{status:#?}");
    let told = status.findings.iter().any(|one| one.about == about && one.verdict == verdict);
    ensure!(told || verdict == Verdict::Ok, "{status:#?}");

    let words = ["wait", service, "--consumer", consumer, "--timeout=0"];
    let (text, code) = run(host, &words)?;
    ensure!(code == code_of(works), "{code:?}: {text}");
    Ok(())
}

/// Checks that all ways to ask say that embassy is ready, or that it is not.
fn ready(host: &Host, embassy: &Embassy, ready: bool) -> Result<()> {
    let answer = embassy.admin("/readyz")?;
    let (status, code) = read::<api::Status>(host, &["status"])?;
    let told = (answer.status == 200, status.ready, code == Some(0));
    ensure!(told == (ready, ready, ready), "{told:?}: {}", answer.body);
    Ok(())
}

#[test]
fn everybody_says_the_same_of_a_port() -> Result<()> {
    let host = Host::start()?;
    let blue = web(&host, "web")?;
    // No program listens there, which a check finds out for certain.
    offer_at(&host, "dead", &format!("{}:81", blue.ip()?))?;
    offer(&host, "gone", blue.ip()?)?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80");
    let app = app.env("BACKEND_DEAD", "/services/dead;81;check=tcp");
    let app = app.env("BACKEND_GONE", "/services/gone;82").env("BACKEND_NONE", "/services/none;83");
    let app = app.env("BACKEND_VIA", "elsewhere;84;via=consul").start()?;
    let side = host.client("side").network("container:app");
    let _side = side.env("BACKEND_TAKEN", "/services/other;80").start()?;
    let arguments = ["--dnat", "--firewall=iptables", "--empty-hold=1h", ETCD];
    let embassy = host.embassy(arguments)?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    let say = |all: &[Expected], is_ready: bool| {
        for one in all {
            let what =
                format!("{} {} to be {} by {}", one.consumer, one.port, one.verdict, one.cause);
            testbed::eventually(WAIT, &what, || all_say(&host, one))?;
        }
        testbed::eventually(WAIT, "ready to be told", || ready(&host, &embassy, is_ready))
    };

    say(
        &[
            expected(80, "/services/web", Verdict::Ok, "goes_to"),
            expected(81, "/services/dead", Verdict::Broken, "all_ejected"),
            expected(82, "/services/gone", Verdict::Ok, "goes_to"),
            expected(83, "/services/none", Verdict::Broken, "no_endpoint"),
            Expected {
                about: Subject::Bindings,
                routed: false,
                ..expected(84, "elsewhere", Verdict::Broken, "unrouted")
            },
            Expected {
                consumer: "side",
                about: Subject::Bindings,
                routed: false,
                ..expected(80, "/services/other", Verdict::Broken, "unrouted")
            },
        ],
        true,
    )?;

    // The registry has lost one endpoint: the held one is used, and everything reports it.
    host.etcd()?.v3().delete(&format!("/services/gone/{}:80", blue.ip()?))?;
    say(&[expected(82, "/services/gone", Verdict::Degraded, "held")], true)?;

    // The registry is down: what was known stays in use, and embassy stays ready.
    host.etcd_daemon().kill()?;
    let lost = || expected(80, "/services/web", Verdict::Degraded, "source_down");
    say(&[lost()], true)?;
    host.etcd_daemon().start()?;
    say(&[expected(80, "/services/web", Verdict::Ok, "goes_to")], true)?;

    // The rules cannot be written any more: no consumer is served, and embassy is not ready.
    let program = host.run("sh", ["-c", "readlink -f \"$(command -v iptables)\""])?;
    host.run("mount", ["--bind", "/bin/false", program.trim()])?;
    // Nothing is written as long as nothing is missing.
    host.run("nft", ["flush", "chain", "ip", "nat", "EMBASSY"])?;
    let failing = Expected {
        about: Subject::Capture,
        ..expected(80, "/services/web", Verdict::Broken, "rules_fail")
    };
    say(&[failing], false)?;
    let (text, code) = run(&host, &["doctor", "--dnat", ETCD])?;
    let told = text.lines().any(|line| line.starts_with("FAIL  capture"));
    ensure!(code == Some(1) && told, "{text}");
    host.run("umount", [program.trim()])?;
    say(&[expected(80, "/services/web", Verdict::Ok, "goes_to")], true)
}
