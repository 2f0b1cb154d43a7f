//! Thousands of routes, with traffic.

use super::*;
use crate::support::own_rules;

/// Measures how often and for how long the page does not draw, while it is visible.
const WATCH: &str = "(window.seen = {task: 0, gap: 0, frames: 0}, \
     new PerformanceObserver(list => { for (const task of list.getEntries()) seen.task = Math.max(seen.task, task.duration); }) \
     .observe({type: 'longtask'}), \
     (function frame(last) { requestAnimationFrame(now => { \
     seen.gap = Math.max(seen.gap, now - last); seen.frames++; frame(now); }); })(performance.now()), 0)";

#[test]
fn five_thousand_routes_with_traffic_do_not_freeze_the_page() -> Result<()> {
    const CONSUMERS: usize = 5;
    const PORTS: usize = 1000;
    let host = Host::start()?;
    let blue = host.web("blue").start()?;
    let service = |n| {
        format!(
            "[[service]]\nname = \"service-{n}\"\nendpoints = [\"{}:80\"]\n",
            blue.ip().unwrap()
        )
    };
    let contents: String = (1..=PORTS).map(service).collect();
    std::fs::write(host.dir().join("services.toml"), contents)?;
    let apps = (0..CONSUMERS).map(|n| {
        let app = host.client(&format!("app-{n}"));
        (1..=PORTS)
            .fold(app, |app, n| app.env(&format!("BACKEND_{n}"), &format!("service-{n};{n}")))
            .start()
    });
    let apps = apps.collect::<Result<Vec<_>>>()?;
    let file = format!("-discovery=file://{}", host.dir().join("services.toml").display());
    let embassy = host.embassy(["--dnat", &file, "--max-bindings-per-consumer=1000"])?;
    embassy.wait_ready(READY)?;
    let status: api::Status = get(&embassy, "/v1/status")?;
    assert_eq!(status.routes, CONSUMERS * PORTS);
    reaches(&apps[0], "172.17.0.1:1", "blue")?;

    let browser = Browser::start(&host)?;
    browser.screen(1280, 900, "light")?;
    browser.open("")?;
    browser.shows("1–100 of 5,000")?;
    browser.picture("many-light")?;
    let traffic = apps
        .iter()
        .enumerate()
        .map(|(n, app)| app.traffic(&format!("traffic-{n}"), format!("172.17.0.1:{}", n + 1)));
    let traffic = traffic.collect::<Result<Vec<_>>>()?;
    browser.value(WATCH)?;
    let start = std::time::Instant::now();
    // Meanwhile it is updated and used.
    let connections = "Number(document.querySelector('#rows tr td:nth-child(8)').textContent.replaceAll(',', ''))";
    let first = browser.value(connections)?.as_f64().context("no count")?;
    browser.until(&format!("{connections} > {first}"), true)?;
    browser.press("/service-77")?;
    // 77, and 770 to 779, of each consumer.
    browser.shows("1–55 of 55")?;
    for tab in ["endpoints", "connections", "bindings", "sources", "routes"] {
        browser.click(&format!("#tab-{tab}"))?;
        browser.until("document.querySelectorAll('#rows tr').length > 0", true)?;
    }
    browser.value("(document.getElementById('q').select(), 0)")?;
    browser.press("\u{e003}")?;
    browser.shows("1–100 of 5,000")?;
    browser.click("#on")?;
    browser.shows("101–200 of 5,000")?;
    browser.click("#rows tr[tabindex]")?;
    browser.until(OPEN, true)?;
    browser.until("document.querySelectorAll('#explain-facts section').length > 1", true)?;
    testbed::eventually(WAIT, "10 s to pass", || {
        ensure!(start.elapsed().as_secs() >= 10, "not yet");
        Ok(())
    })?;
    let seen = browser.value("seen")?;
    println!(
        "longest task {} ms, longest gap {} ms, {} frames",
        seen["task"], seen["gap"], seen["frames"]
    );
    for traffic in traffic {
        let answers = traffic.stop()?;
        assert!(answers.answered() > 0 && answers.failed() == 0, "{answers:?}");
    }
    // A page never has more rows than it requests, however many there are.
    assert!(browser.value("document.querySelectorAll('#rows tr').length <= 100")? == true);
    // Several times what a busy machine needs. A page that draws all rows would exceed this.
    assert!(seen["task"].as_f64().is_some_and(|millis| millis < 1_000.0), "{seen}");
    assert!(seen["gap"].as_f64().is_some_and(|millis| millis < 3_000.0), "{seen}");
    assert!(seen["frames"].as_f64().is_some_and(|frames| frames > 20.0), "{seen}");
    Ok(())
}

#[test]
fn ten_thousand_routes_are_a_page_at_a_time() -> Result<()> {
    let host = Host::start()?;
    // From four addresses: loopback of both families, eth0, and the VIP itself.
    let services: Vec<_> = (1..=2500).map(|n| format!("service-{n};{n}")).collect();
    let services = format!("-services={}", services.join(","));
    let service =
        |n| format!("[[service]]\nname = \"service-{n}\"\nendpoints = [\"127.0.0.1:1\"]\n");
    let contents: String = (1..=2500).map(service).collect();
    std::fs::write(host.dir().join("services.toml"), contents)?;
    let file = format!("-discovery=file://{}", host.dir().join("services.toml").display());
    let many = "--max-bindings-per-consumer=2500";
    own_rules(&host)?;
    let embassy = host.embassy(["-provider=static", &services, &file, many])?;
    embassy.wait_ready(READY)?;
    let status: api::Status = get(&embassy, "/v1/status")?;
    assert_eq!(status.routes, 10_000);
    let last: api::Page<api::Route> = get(&embassy, "/v1/routes?limit=100&offset=9990")?;
    assert_eq!((last.total, last.items.len()), (10_000, 10));
    // 77, and 770 to 779, from four addresses each.
    let found: api::Page<api::Route> = get(&embassy, "/v1/routes?q=service-77&limit=10")?;
    assert_eq!((found.total, found.items.len()), (44, 10));
    Ok(())
}
