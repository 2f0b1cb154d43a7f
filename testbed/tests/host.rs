//! A host is what it promises to be.

use std::time::Duration;

use anyhow::Result;
use testbed::Host;

#[test]
fn containers_reach_each_other() -> Result<()> {
    let host = Host::start()?;
    let web = host.web("web-1").start()?;
    let app = host.client("app").start()?;

    let answers = app.get(format!("{}:80", web.ip()?)).times(30).at_once(4).run()?;
    assert_eq!((answers.from("web-1"), answers.failed()), (30, 0), "{answers:?}");
    Ok(())
}

#[test]
fn two_hosts_do_not_see_each_other() -> Result<()> {
    let (one, two) = (Host::start()?, Host::start()?);
    let web = one.web("web").start()?;
    two.client("app").start()?;

    assert_eq!(one.docker(["ps", "--format", "{{.Names}}"])?, "web");
    assert_eq!(two.docker(["ps", "--format", "{{.Names}}"])?, "app");
    let url = format!("http://{}/", web.ip()?);
    assert_eq!(one.http("GET", &url, "")?.ok()?, "web");
    assert!(two.http("GET", &url, "").is_err(), "the second host reached a container of the first");
    Ok(())
}

#[test]
fn dockerd_can_be_killed_and_started_again() -> Result<()> {
    let host = Host::builder().docker_args(["--live-restore"]).start()?;
    let web = host.web("web").start()?;
    let url = format!("http://{}/", web.ip()?);

    host.docker_daemon().kill()?;
    assert!(host.docker(["ps"]).is_err());
    assert_eq!(host.http("GET", &url, "")?.ok()?, "web");

    host.docker_daemon().start()?;
    assert_eq!(host.docker(["ps", "--quiet", "--no-trunc"])?, web.id());

    host.docker_daemon().pause()?;
    host.docker_daemon().resume()?;
    host.docker_daemon().restart()?;
    assert_eq!(host.http("GET", &url, "")?.ok()?, "web");
    Ok(())
}

#[test]
fn a_container_has_an_address_on_each_of_its_networks() -> Result<()> {
    let host = Host::builder().ipv6(true).start()?;
    let back = host.network("back", ["--subnet=10.7.0.0/24"])?;
    let web = host.web("web").start()?;
    web.connect(back.name())?;

    assert_eq!(web.ip_on("bridge")?.to_string(), "172.17.0.2");
    assert_eq!(web.ip_on("back")?.to_string(), "10.7.0.2");
    assert_eq!(back.gateway()?.to_string(), "10.7.0.1");
    assert!(web.ip_on("front").is_err());
    for url in [format!("http://{}/", web.ip_on("back")?), format!("http://[{}]/", web.ip6()?)] {
        assert_eq!(host.http("GET", &url, "")?.ok()?, "web");
    }
    Ok(())
}

#[test]
fn a_process_has_its_own_pid_status_and_log() -> Result<()> {
    let host = Host::builder().without_docker().start()?;
    let mut command = host.command("sh");
    command.args(["-c", "trap 'echo bye; exit 7' TERM; echo ready; while :; do sleep 0.1; done"]);
    let process = host.spawn("trap", command)?;
    testbed::eventually(Duration::from_secs(10), "the shell's first word", || {
        anyhow::ensure!(process.log() == "ready\n", "the log is {:?}", process.log());
        Ok(())
    })?;
    let name = std::fs::read_to_string(format!("/proc/{}/comm", process.pid()))?;
    assert_eq!(name, "sh\n");

    process.signal(testbed::Signal::STOP)?;
    assert!(process.wait(Duration::from_millis(100)).is_err());
    process.signal(testbed::Signal::CONT)?;
    process.signal(testbed::Signal::TERM)?;
    assert_eq!(process.wait(Duration::from_secs(10))?.code(), Some(7));
    assert_eq!(process.log(), "ready\nbye\n");
    Ok(())
}
