//! The commands besides the proxy, on a host.

use std::{io::Write, process::Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::Host;

use crate::{
    READY, WAIT,
    capture::{IPTABLES, NFT, NFT_SHARED, ours, rules, strangers_rules},
    support::{ETCD, reaches, web},
};

/// The output of a command, and its exit code.
pub(crate) fn run(host: &Host, words: &[&str]) -> Result<(String, Option<i32>)> {
    let output = host.embassy_command(words)?.output().context("run embassy")?;
    let both = [output.stdout, output.stderr].concat();
    Ok((String::from_utf8(both)?, output.status.code()))
}

/// The JSON output of a command that succeeds.
pub(crate) fn json(host: &Host, words: &[&str]) -> Result<Value> {
    let (text, code) = run(host, &[words, &["--json"]].concat())?;
    ensure!(code == Some(0), "{code:?}: {text}");
    serde_json::from_str(&text).context(text)
}

#[test]
fn cleanup_leaves_nothing_of_ours_and_all_that_is_others() -> Result<()> {
    let host = Host::start()?;
    web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80").start()?;
    strangers_rules(&host)?;
    let before = rules(&host)?;
    for (firewall, name) in [(NFT, ""), (NFT_SHARED, "nft"), (IPTABLES, "iptables")] {
        let embassy = host.embassy(["--dnat", ETCD, firewall])?;
        embassy.wait_ready(READY)?;
        let running = rules(&host)?;
        assert_ne!(running, before);
        // The rules of a running embassy are not removed by mistake.
        let (text, code) = run(&host, &["cleanup"])?;
        assert_eq!(code, Some(1), "{text}");
        assert!(
            text.contains("an embassy captures here (process ") && text.contains("--force"),
            "{text}"
        );
        assert_eq!(rules(&host)?, running);

        embassy.kill()?;
        let (text, code) = run(&host, &["cleanup"])?;
        let removed = match name {
            // The kernel has already removed them.
            "" => "no embassy rules found\n".to_owned(),
            name => format!("removed our rules of {name}\n"),
        };
        assert_eq!((text, code), (removed, Some(0)));
        assert_eq!(rules(&host)?, before);
        assert_eq!(json(&host, &["cleanup"])?["removed"], serde_json::json!([]));
        assert_eq!(rules(&host)?, before);
    }
    // Rules that belong to a process are only removed by its end. The others are restored.
    for (firewall, told, code) in [
        (NFT, "cannot remove our rules: nft: table inet embassy belongs to another process", 1),
        (NFT_SHARED, "removed our rules of nft\n", 0),
        (IPTABLES, "removed our rules of iptables\n", 0),
    ] {
        let embassy = host.embassy(["--dnat", ETCD, firewall])?;
        embassy.wait_ready(READY)?;
        reaches(&app, "172.17.0.1:80", "web")?;
        let (text, ended) = run(&host, &["cleanup", "--force"])?;
        assert!(text.starts_with(told) && ended == Some(code), "{text}");
        reaches(&app, "172.17.0.1:80", "web")?;
        embassy.terminate()?;
        assert!(embassy.wait(WAIT)?.success());
    }
    Ok(())
}

#[test]
fn the_plan_touches_nothing_and_is_what_a_start_installs() -> Result<()> {
    let host = Host::builder().ipv6(true).start()?;
    strangers_rules(&host)?;
    let web = web(&host, "web")?;
    let app = host.client("app").env("BACKEND_WEB", "/services/web;80");
    let app =
        app.env("BACKEND_NONE", "/services/none;81").env("BACKEND_WRONG", "no port").start()?;
    for (mode, firewall) in
        [("--dnat", NFT), ("--dnat", IPTABLES), ("--redirect", NFT), ("--redirect", IPTABLES)]
    {
        let flags = [mode, ETCD, firewall];
        let before = rules(&host)?;
        let plan = json(&host, &[&["plan"], &flags[..]].concat())?;
        let (text, code) = run(&host, &[&["plan"], &flags[..]].concat())?;
        assert_eq!(code, Some(0), "{text}");
        assert_eq!(rules(&host)?, before);

        let route = &plan["routes"][0];
        assert_eq!(route["consumer"], "app", "{plan:#}");
        assert_eq!(route["source"], app.ip()?.to_string(), "{plan:#}");
        assert_eq!(route["endpoints"], serde_json::json!([format!("{}:80", web.ip()?)]));
        assert_eq!(plan["skipped"][0]["origin"], "BACKEND_WRONG", "{plan:#}");
        for part in ["VIPs: 172.17.0.1", "etcd /services/web", "none", "BACKEND_WRONG"] {
            assert!(text.contains(part), "{part:?} in {text}");
        }

        let embassy = host.embassy(flags)?;
        embassy.wait_ready(READY)?;
        let installed = ours(&host, firewall)?;
        embassy.terminate()?;
        assert!(embassy.wait(WAIT)?.success());
        assert_eq!(rules(&host)?, before);
        for script in plan["scripts"].as_array().context("no scripts")? {
            assert!(text.contains(script["text"].as_str().context("no text")?), "{text}");
            give(&host, script)?;
        }
        assert_eq!(ours(&host, firewall)?, installed);
        assert_eq!(run(&host, &["cleanup"])?.1, Some(0));
        assert_eq!(rules(&host)?, before);
    }
    // Without the engine there is nothing to plan.
    host.docker_daemon().kill()?;
    let (text, code) = run(&host, &["plan", "--dnat", ETCD])?;
    assert_eq!(code, Some(1), "{text}");
    assert!(text.starts_with("embassy: the bindings are not known"), "{text}");
    Ok(())
}

/// Passes the text of a planned script to its program.
fn give(host: &Host, script: &Value) -> Result<()> {
    let words = script["command"].as_str().context("no command")?;
    let mut command = host.command("sh");
    let mut child = command.args(["-c", words]).stdin(Stdio::piped()).spawn()?;
    let text = script["text"].as_str().context("no text")?;
    child.stdin.take().context("no input")?.write_all(text.as_bytes())?;
    let status = child.wait()?;
    ensure!(status.success(), "{words}: {status}");
    Ok(())
}
