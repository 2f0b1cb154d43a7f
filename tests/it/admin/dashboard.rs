use super::*;

/// What the page has become in a real browser after its first reading, at one of its lists.
fn page(host: &Host, list: &str) -> Result<String> {
    let mut chromium = host.command("chromium");
    chromium.args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]);
    chromium.arg(format!("--user-data-dir={}", host.dir().join("chromium").display()));
    // A second of the page's own time, which stands still while it waits for an answer.
    chromium.args(["--virtual-time-budget=1000", "--dump-dom"]);
    chromium.arg(format!("http://127.0.0.1:9990/#{list}"));
    testbed::output(&mut chromium)
}

/// Waits until the page shows all of these.
fn shows(host: &Host, list: &str, words: &[&str]) -> Result<String> {
    testbed::eventually(WAIT * 2, &format!("{words:?} among the {list}"), || {
        let page = page(host, list)?;
        let missing = words.iter().find(|words| !page.contains(**words));
        ensure!(missing.is_none(), "no {missing:?} in {page}");
        Ok(page)
    })
}

#[test]
fn the_dashboard_shows_what_happens() -> Result<()> {
    let host = Host::start()?;
    let blue = web(&host, "blue")?;
    let dead = format!("{}:81", blue.ip()?);
    offer_at(&host, "blue", &dead)?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    shows(&host, "routes", &["nothing to show", "in place", "all answer"])?;

    // A value is whatever somebody wrote: it is shown, and does nothing.
    let app = host.client("new-app").env("BACKEND_BLUE", "/services/blue;80");
    let app = app.env("BACKEND_EVIL", "<img src=x onerror=alert(1)>;81").start()?;
    reaches(&app, "172.17.0.1:80", "blue")?;
    shows(&host, "routes", &[">new-app<", ">/services/blue<", ">ok<"])?;
    let evil = shows(&host, "bindings", &["BACKEND_EVIL", ">invalid<"])?;
    assert!(!evil.contains("<img"), "{evil}");

    let answers = app.get("172.17.0.1:80").times(4).run()?;
    ensure!(answers.answered() == 4, "{answers:?}");
    shows(&host, "endpoints", &[&dead, "Connection refused"])?;

    host.etcd_daemon().kill()?;
    shows(&host, "sources", &[">down<", "1 of 2 up", "what was known stays in use"])?;
    Ok(())
}

#[test]
fn five_thousand_routes_are_a_page_at_a_time() -> Result<()> {
    let host = Host::start()?;
    // From four addresses: loopback of both families, eth0, and the VIP itself.
    let services: Vec<_> = (1..=1250).map(|n| format!("service-{n};{n}")).collect();
    let services = format!("-services={}", services.join(","));
    let service =
        |n| format!("[[service]]\nname = \"service-{n}\"\nendpoints = [\"127.0.0.1:1\"]\n");
    let contents: String = (1..=1250).map(service).collect();
    std::fs::write(host.dir().join("services.toml"), contents)?;
    let file = format!("-discovery=file://{}", host.dir().join("services.toml").display());
    let embassy = host.embassy(["-provider=static", &services, &file])?;
    embassy.wait_ready(READY)?;
    let status: api::Status = get(&embassy, "/v1/status")?;
    assert_eq!(status.routes, 5_000);
    let page = shows(&host, "routes", &["1–100 of 5,000", ">service-1<"])?;
    assert_eq!(page.matches("<tr tabindex").count(), 100);
    Ok(())
}
