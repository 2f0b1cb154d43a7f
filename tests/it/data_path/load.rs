//! Overload of embassy, of its endpoints, and of its memory.

use std::fs;

use anyhow::{Context, Result, ensure};

use super::{OpenConnections, Path, ended, metric, service, vip};
use crate::{WAIT, support::reaches};

#[test]
fn ten_times_more_connections_than_endpoints_take_disturb_nobody_else() -> Result<()> {
    const ROOM: usize = 10;
    let full = format!("greet --name full --most {ROOM}");
    let path = Path::new(&[(1001, &full), (80, "http --name web")])?;
    let traffic = path.app.traffic("traffic", vip(80))?;
    let crowd = path.host.client("crowd").env("BACKEND_F", &format!("{};1001", service(1001)));
    let crowd = crowd.start()?;
    testbed::eventually(WAIT, "the crowd's route", || {
        ensure!(crowd.probe(vip(1001))?.outcome == "data");
        Ok(())
    })?;

    let all = (ROOM * 10).to_string();
    let target = vip(1001);
    let words = ["hold", &target, "-n", &all, "-c", &all, "--timeout-ms", "8000"];
    let held = OpenConnections(crowd.spawn("held", ["testbed", "peer"].into_iter().chain(words))?);
    let greeted = held.greetings()?["hello from full"].as_u64().unwrap_or_default();
    assert!((1..=ROOM as u64).contains(&greeted), "{greeted} greeted");
    assert!(ended(&path.embassy, "endpoints_unreachable")? > 0, "nobody was turned away");

    // There is room again, and new connections are accepted.
    crowd.kill()?;
    testbed::eventually(WAIT, "a greeting after the crowd", || {
        let outcome = path.app.probe(vip(1001))?.outcome;
        ensure!(outcome == "data", "{outcome}");
        Ok(())
    })?;
    let answers = traffic.stop()?;
    ensure!(answers.failed() == 0 && answers.from("web") > 100, "{answers:?}");
    testbed::eventually(WAIT, "every connection to end", || {
        let active = metric(&path.embassy, "embassy_connections_active")?;
        ensure!(active == 0, "{active} are left");
        Ok(())
    })
}

#[test]
fn a_consumer_with_too_many_connections_takes_none_of_the_others() -> Result<()> {
    let path = Path::with(
        &["--max-connections-per-consumer=50"],
        &[(1001, "greet --name joe"), (80, "http --name web")],
    )?;
    let greedy = path.host.client("greedy").env("BACKEND_G", &format!("{};1001", service(1001)));
    let greedy = greedy.env("BACKEND_WEB", &format!("{};80", service(80))).start()?;
    reaches(&greedy, vip(80), "web")?;
    let traffic = path.app.traffic("traffic", vip(80))?;
    let held = OpenConnections::open(&greedy, "held", &vip(1001), 500)?;
    assert_eq!(held.greetings()?, serde_json::json!({ "hello from joe": 50 }));
    let flood = greedy.get(vip(80)).times(2_000).at_once(20).run()?;
    assert_eq!((flood.from("web"), flood.failed()), (0, 2_000), "{flood:?}");
    let answers = traffic.stop()?;
    ensure!(answers.failed() == 0 && answers.from("web") > 100, "{answers:?}");
    assert_eq!(ended(&path.embassy, "too_many_of_consumer")?, 450 + 2_000);
    assert_eq!(held.ended()?, []);
    Ok(())
}

#[test]
fn what_a_slow_reader_has_not_read_is_not_kept_here() -> Result<()> {
    const BYTES: u64 = 300_000_000;
    const GROWTH: u64 = 10_000_000;
    let path = Path::new(&[(1001, &format!("source --bytes {BYTES} --seed 1"))])?;
    path.peer("recv", 1001, ["--rate", "0"])?;
    let process = format!("/proc/{}", path.embassy.pid());
    let bytes = |name: &str| -> Result<u64> {
        let status = fs::read_to_string(format!("{process}/status"))?;
        let value = status.lines().find_map(|line| line.strip_prefix(name)).context("no value")?;
        Ok(value.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
    };
    let before = bytes("VmRSS:")?;
    // Resets the peak (man 5 proc_pid_clear_refs).
    fs::write(format!("{process}/clear_refs"), "5")?;
    let received = path.peer("recv", 1001, ["--rate", "20000000"])?;
    assert_eq!(received["received"]["bytes"].to_string(), BYTES.to_string());
    let peak = bytes("VmHWM:")?;
    assert!(peak < before + GROWTH, "{before} bytes before, {peak} at most");
    Ok(())
}
