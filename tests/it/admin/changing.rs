use super::*;
use crate::{capture::NFT_SHARED, support::own_rules};

/// A request via the socket: its status and body.
fn call(host: &Host, words: &[&str]) -> Result<(String, String)> {
    let curl = ["--silent", "--unix-socket", "/run/embassy.sock", "--write-out", "\n%{http_code}"];
    let said = host.run("curl", [&curl[..], words].concat())?;
    let (body, status) = said.rsplit_once('\n').unwrap_or_default();
    Ok((status.to_owned(), body.to_owned()))
}

#[test]
fn the_socket_may_change_what_tcp_may_not_without_the_token() -> Result<()> {
    let host = Host::light()?;
    let (one, two) = (web(&host, "one")?, host.web("two").start()?);
    offer_at(&host, "one", &format!("{}:80", two.ip()?))?;
    let app = host.client("app").env("BACKEND_ONE", "/services/one;80").start()?;
    let flags = ["--dnat", ETCD, NFT_SHARED, "--admin=unix:///run/embassy.sock"];
    let embassy = host.embassy(flags)?;
    testbed::eventually(READY, "readiness by the socket", || {
        let (status, body) = call(&host, &["http://embassy/readyz"])?;
        ensure!(status == "200", "{body}");
        Ok(())
    })?;
    let events = host.dir().join("events");
    let listen = format!(
        "exec curl --silent --no-buffer --unix-socket /run/embassy.sock http://embassy/v1/events > {}",
        events.display()
    );
    let mut listener = host.command("sh");
    listener.args(["-c", &listen]);
    let _listener = host.spawn("listener", listener)?;

    let drain = |drained: bool| {
        let body = format!(
            r#"{{"service":"/services/one","endpoint":"{}:80","drained":{drained}}}"#,
            one.ip().unwrap()
        );
        call(&host, &["-X", "PUT", "--data", &body, "http://embassy/v1/endpoints/drain"])
    };
    // Events are sent only while a client listens.
    let told = |words: &str| {
        testbed::eventually(WAIT, &format!("an event with {words}"), || {
            let text = std::fs::read_to_string(&events)?;
            ensure!(text.contains(words), "{text:?}");
            Ok(())
        })
    };
    testbed::eventually(WAIT, "a drain to be told", || {
        let (status, body) = drain(true)?;
        ensure!(status == "200", "{body}");
        ensure!(std::fs::read_to_string(&events)?.contains("endpoint_drained"), "not yet");
        Ok(())
    })?;
    let answers = app.get("172.17.0.1:80").times(6).run()?;
    assert_eq!((answers.from("one"), answers.from("two")), (0, 6), "{answers:?}");
    assert_eq!(drain(false)?.0, "200");
    let answers = app.get("172.17.0.1:80").times(6).run()?;
    assert_eq!((answers.from("one"), answers.from("two")), (3, 3), "{answers:?}");

    let late = host.client("late").env("BACKEND_ONE", "/services/one;81").start()?;
    told(r#""event":"route_added","consumer":"late""#)?;
    late.remove()?;
    told(r#""event":"route_removed","consumer":"late""#)?;
    testbed::eventually(WAIT, "the rules of late to go", || {
        let rules = host.run("nft", ["list", "set", "inet", "embassy", "declared4"])?;
        ensure!(!rules.contains(". 81"), "{rules}");
        Ok(())
    })?;
    host.run("nft", ["flush", "chain", "inet", "embassy", "declared"])?;
    told(r#""event":"capture_restored""#)?;
    host.etcd_daemon().kill()?;
    told(r#""event":"source_lost""#)?;

    assert_eq!(call(&host, &["-X", "POST", "http://embassy/v1/resync"])?.0, "200");
    says(&embassy, &["resync requested via API"])?;
    let level = |level: &str| {
        let body = format!(r#"{{"level":"{level}"}}"#);
        call(&host, &["-X", "PUT", "--data", &body, "http://embassy/v1/log-level"])
    };
    assert_eq!(level("4")?.0, "200");
    assert!(call(&host, &["http://embassy/v1/log-level"])?.1.contains("\"4\""));
    assert_eq!(level("=nonsense=")?.0, "400");
    let long = format!(r#"{{"level":"{}"}}"#, "x".repeat(5000));
    let (status, _) = call(&host, &["-X", "PUT", "--data", &long, "http://embassy/v1/log-level"])?;
    assert_eq!(status, "413");
    embassy.kill()?;

    std::fs::write(host.dir().join("token"), "secret\n")?;
    let file = format!("--admin-token-file={}", host.dir().join("token").display());
    let embassy = host.embassy(["-provider=static", "-services=web;80", &file])?;
    testbed::eventually(READY, "the API", || embassy.admin("/healthz")?.ok())?;
    let resync = |header: &str| {
        let curl = ["--silent", "--output", "/dev/null", "--write-out", "%{http_code}"];
        let rest = ["-X", "POST", "--header", header, "http://127.0.0.1:9990/v1/resync"];
        host.run("curl", [&curl[..], &rest].concat())
    };
    assert_eq!(resync("Authorization: Bearer secret")?, "200");
    assert_eq!(resync("Authorization: Bearer wrong")?, "403");
    assert_eq!(resync("X-Nothing: 1")?, "403");
    let description = embassy.admin("/v1/openapi.json")?.json()?;
    assert!(description["paths"]["/v1/explain"]["get"].is_object());
    Ok(())
}

/// The log since the level was last changed, as soon as it contains this line.
fn since_the_level(embassy: &Embassy, level: &str, words: &str) -> Result<String> {
    let changed = format!("log level changed via API level=\"{level}\"");
    testbed::eventually(WAIT, &format!("{words:?} after {changed:?}"), || {
        let log = embassy.log();
        let (_, since) = log.rsplit_once(&changed).context("the level is as it was")?;
        ensure!(since.contains(words), "{since}");
        Ok(since.to_owned())
    })
}

#[test]
fn the_log_level_changes_while_it_runs_and_back() -> Result<()> {
    const INFO: &str = "resync requested via API";
    const DEBUG: &str = "source re-reads everything";
    let host = Host::light()?;
    host.etcd()?;
    std::fs::write(host.dir().join("token"), "secret\n")?;
    let token = format!("--admin-token-file={}", host.dir().join("token").display());
    own_rules(&host)?;
    for by_socket in [true, false] {
        let admin = if by_socket { "--admin=unix:///run/embassy.sock" } else { &token };
        let embassy =
            host.embassy(["-provider=static", "-services=/services/web;80", ETCD, admin])?;
        let call = |method: &str, path: &str, body: &str| -> Result<(String, String)> {
            let url = format!("http://127.0.0.1:9990{path}");
            let way = ["--header", "Authorization: Bearer secret"];
            let socket = ["--unix-socket", "/run/embassy.sock"];
            let mut curl = vec!["--silent", "--write-out", "\n%{http_code}", "--request", method];
            curl.extend(if by_socket { socket } else { way });
            curl.extend(["--data", body, &url]);
            let said = host.run("curl", curl)?;
            let (body, status) = said.rsplit_once('\n').unwrap_or_default();
            Ok((status.to_owned(), body.to_owned()))
        };
        let set = |level: &str| {
            call("PUT", "/v1/log-level", &serde_json::json!({ "level": level }).to_string())
        };
        testbed::eventually(READY, "the API", || {
            let (status, body) = call("GET", "/readyz", "")?;
            ensure!(status == "200", "{body}");
            Ok(())
        })?;
        // Debug lines appear with the levels that include them, and disappear with others.
        for (level, debug) in [("0", false), ("3", true), ("embassy=info", false)] {
            assert_eq!(set(level)?.0, "200", "{level}");
            assert!(call("GET", "/v1/log-level", "")?.1.contains(level), "{level}");
            assert_eq!(call("POST", "/v1/resync", "")?.0, "200");
            let since = since_the_level(&embassy, level, if debug { DEBUG } else { INFO })?;
            assert!(debug || !since.contains(DEBUG), "{level}: {since}");
        }
        for level in ["11", "-1", "debg", "=nonsense=", "embassy=loud"] {
            let (status, body) = set(level)?;
            assert_eq!(status, "400", "{level}: {body}");
            let error: api::Error = serde_json::from_str(&body)?;
            let expected =
                format!("{level:?}: expected a number from 0 to 10, or the syntax of RUST_LOG");
            assert_eq!(error.error, expected);
        }
        assert!(call("GET", "/v1/log-level", "")?.1.contains("embassy=info"), "it stays as it was");
        if !by_socket {
            let body = r#"{"level":"10"}"#;
            let answer = host.http("PUT", "http://127.0.0.1:9990/v1/log-level", body)?;
            assert_eq!(answer.status, 403, "{answer:?}");
        }
        let log = embassy.log();
        let (_, since) = log.rsplit_once("level=\"embassy=info\"").context("no change")?;
        assert!(!since.contains(DEBUG), "{since}");
        embassy.kill()?;
    }
    Ok(())
}
