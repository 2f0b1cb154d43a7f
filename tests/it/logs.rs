//! Log messages, for people and for programs.

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value};
use testbed::{Embassy, Host};

use crate::{
    READY, WAIT,
    support::{ETCD, ends, offer, reaches, says, web},
};

/// The log lines so far, each a JSON object.
fn lines(embassy: &Embassy) -> Result<Vec<Map<String, Value>>> {
    let log = embassy.log();
    let line = |text| serde_json::from_str(text).with_context(|| format!("{text:?}"));
    log.lines().map(line).collect()
}

/// Waits for a line with this message and, in order, these values of its fields.
fn tells(embassy: &Embassy, message: &str, fields: &[(&str, &str)]) -> Result<Map<String, Value>> {
    testbed::eventually(WAIT, &format!("{message:?} with {fields:?}"), || {
        let lines = lines(embassy)?;
        let has = |line: &Map<String, Value>, field: &str, value: &str| {
            line.get(field).and_then(Value::as_str).is_some_and(|text| text.contains(value))
        };
        let line = lines.into_iter().find(|line| {
            has(line, "message", message)
                && fields.iter().all(|(field, value)| has(line, field, value))
        });
        line.context("no such line")
    })
}

#[test]
fn machines_read_every_change_and_true_numbers() -> Result<()> {
    let host = Host::light()?;
    let web = web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80");
    let app = app.env("BACKEND_WRONG", "no port").start()?;
    let words = ["--dnat", ETCD, "--log-format=json", "-v=3", "--connection-log=all"];
    let embassy = host.embassy([&words[..], &["--empty-hold=1s", "--drain=5s"]].concat())?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "web")?;

    let service = ("service", "etcd /services/web");
    let endpoint = format!("{}:80", web.ip()?);
    let endpoints = ("endpoints", endpoint.as_str());
    let name = host.run("uname", ["-n"])?;
    let host_is = ("host", name.trim());
    let here = [host_is, ("engine", "unix://"), ("discoveries", "etcd://127.0.0.1:2379")];
    tells(&embassy, "embassy starts", &[("version", env!("CARGO_PKG_VERSION"))])?;
    let start = tells(&embassy, "embassy starts", &here)?;
    ensure!(!start.contains_key("consumer"), "{start:?}");
    let status = embassy.admin("/v1/status")?.json()?;
    assert_eq!(status["host_name"], name.trim(), "{status:#}");
    assert_eq!(status["discoveries"], serde_json::json!(["etcd://127.0.0.1:2379"]), "{status:#}");
    tells(&embassy, "binding skipped", &[("consumer", "app"), ("origin", "BACKEND_WRONG")])?;
    tells(&embassy, "new route", &[("consumer", "app"), service])?;
    tells(&embassy, "service endpoints changed", &[service, endpoints])?;
    // Discovery reports no endpoints: at first the last ones are kept, later they are not.
    host.etcd()?.v3().delete(&format!("/services/web/{endpoint}"))?;
    tells(&embassy, "the last ones stay in use", &[service, endpoints])?;
    tells(&embassy, "service has no endpoints; connections are reset", &[service])?;
    ends(&app, "172.17.0.1:80", "reset")?;
    offer(&host, "web", web.ip()?)?;
    reaches(&app, "172.17.0.1:80", "web")?;
    host.etcd_daemon().kill()?;
    tells(
        &embassy,
        "source does not answer; its last data stays in use",
        &[("source", "etcd /services/web")],
    )?;
    host.etcd_daemon().start()?;
    tells(&embassy, "source is back", &[("source", "etcd /services/web")])?;
    embassy.terminate()?;
    assert!(embassy.wait(WAIT)?.success());
    tells(&embassy, "embassy has stopped", &[])?;

    for line in lines(&embassy)? {
        for (field, value) in &line {
            let Value::String(text) = value else { continue };
            // Neither a quoted number nor a value in Rust's syntax.
            let number = text.parse::<f64>().is_ok();
            ensure!(!number && !text.contains("Some("), "{field}={value} in {line:?}");
        }
    }
    Ok(())
}

#[test]
fn a_discovery_that_was_never_there_is_not_lost() -> Result<()> {
    let host = Host::light()?;
    let _app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    says(&embassy, &["source has not answered yet; retrying", "source=\"etcd /services/web\""])?;
    assert!(!embassy.log().contains("lost"), "{}", embassy.log());
    Ok(())
}
