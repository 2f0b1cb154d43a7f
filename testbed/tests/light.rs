//! A host without dockerd has containers all the same.

use anyhow::{Context, Result};
use serde_json::Value;
use testbed::Host;

/// What the engine answers.
fn asked(host: &Host, path: &str) -> Result<Value> {
    let socket = host.docker_url();
    let socket = socket.strip_prefix("unix://").context("a socket")?;
    let url = format!("http://docker{path}");
    let said = host.run("curl", ["--silent", "--unix-socket", socket, &url])?;
    serde_json::from_str(&said).with_context(|| format!("not JSON: {said:?}"))
}

#[test]
fn containers_reach_each_other_and_the_host() -> Result<()> {
    let host = Host::light()?;
    let web = host.web("web").start()?;
    let app = host.client("app").env("GREETING", "hello").start()?;

    let answers = app.get(format!("{}:80", web.ip()?)).times(30).at_once(4).run()?;
    assert_eq!((answers.from("web"), answers.failed()), (30, 0), "{answers:?}");
    assert_eq!(host.http("GET", &format!("http://{}/", web.ip()?), "")?.ok()?, "web");
    assert_eq!(app.exec(["sh", "-c", "echo $GREETING; readlink /proc/self/ns/net"])?, {
        let pid = format!("/proc/{}/ns/net", app.pid()?);
        format!("hello\n{}", host.run("readlink", [pid])?)
    });
    Ok(())
}

#[test]
fn the_engine_knows_what_runs() -> Result<()> {
    let host = Host::light()?;
    host.client("kept").start()?;
    let app = host.client("app").label("color", "red").start()?;
    assert_eq!(asked(&host, "/containers/json")?.as_array().map(Vec::len), Some(2));
    let inspected = asked(&host, &format!("/containers/{}/json", app.id()))?;
    assert_eq!(inspected["Config"]["Labels"]["color"], "red");
    assert_eq!(inspected["State"]["Pid"], app.pid()?);
    let group = host.run("cat", [format!("/proc/{}/cgroup", app.pid()?)])?;
    assert!(group.contains(app.id()), "{group}");

    let sleeper = app.spawn("sleeper", ["sleep", "1000"])?;
    app.kill()?;
    sleeper.wait(std::time::Duration::from_secs(10)).context("it ends with its container")?;
    assert!(app.pid().is_err() && app.exec(["true"]).is_err());
    assert_eq!(asked(&host, "/containers/json")?.as_array().map(Vec::len), Some(1));

    let next = host.client("app").start()?;
    assert_eq!(next.ip()?.to_string(), "172.17.0.3", "the lowest that is free");
    assert_ne!(next.id(), app.id());
    app.start()?;
    assert_eq!(app.ip()?.to_string(), "172.17.0.4");
    Ok(())
}

#[test]
fn it_says_what_it_cannot() -> Result<()> {
    let host = Host::light()?;
    assert!(host.client("app").network("host").start().is_err());
    assert!(host.client("app").image("debian").start().is_err());
    assert!(host.client("app").start()?.connect("back").is_err());
    Ok(())
}
