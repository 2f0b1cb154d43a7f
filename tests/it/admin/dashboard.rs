use super::{
    browser::{Browser, DOWN, ENTER, ESCAPE, TAB},
    *,
};

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
    // Each failed probe doubles the time that it is skipped.
    let get = ["testbed", "peer", "get", "172.17.0.1:80", "--until", "/never", "--pause-ms", "50"];
    let _traffic = app.spawn("traffic", get)?;
    shows(
        &host,
        "endpoints?state=ejected",
        &["1–1 of 1", &dead, "Connection refused", ">ejected<"],
    )?;

    host.etcd_daemon().kill()?;
    shows(&host, "sources", &[">down<", "1 of 2 up", "what was known stays in use"])?;
    Ok(())
}

#[test]
fn a_search_narrows_and_an_address_brings_back_what_was_shown() -> Result<()> {
    let host = Host::start()?;
    web(&host, "blue")?;
    let app = host.client("app").env("BACKEND_BLUE", "/services/blue;80").start()?;
    let _other = host.client("other").env("BACKEND_NONE", "/services/none;81").start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "blue")?;
    shows(&host, "routes", &["1–2 of 2", ">app<", ">other<"])?;
    let found = shows(&host, "routes?q=blue", &["1–1 of 1", ">app<"])?;
    assert!(!found.contains(">other<"), "{found}");
    let found = shows(&host, "routes?state=no_endpoint", &["1–1 of 1", ">other<"])?;
    assert!(!found.contains(">app<"), "{found}");
    shows(&host, "routes?q=nobody", &["nothing to show"])?;

    let blue = format!("explain={}:80", app.ip()?);
    let explained =
        shows(&host, &format!("routes?{blue}"), &["app port 80", "The next connection of app"])?;
    assert!(explained.contains("open=\"\""), "{explained}");
    Ok(())
}

#[test]
fn it_is_used_by_mouse_and_by_keyboard() -> Result<()> {
    let host = Host::start()?;
    web(&host, "blue")?;
    let app = host.client("app").env("BACKEND_BLUE", "/services/blue;80").start()?;
    let _other = host.client("other").env("BACKEND_NONE", "/services/none;81").start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "blue")?;
    let browser = Browser::start(&host)?;
    browser.open("")?;
    const ROWS: &str = "document.querySelectorAll('#rows tr[tabindex]').length";
    const OPEN: &str = "document.getElementById('explain').open";
    const TITLE: &str = "document.getElementById('explain-title').textContent";
    const FOCUS: &str = "(document.activeElement.id || document.activeElement.tagName)";
    browser.until(ROWS, 2)?;

    browser.click("#rows tr")?;
    browser.until(OPEN, true)?;
    browser.until(TITLE, "app port 80")?;
    let findings = browser.value("document.getElementById('explain-findings').textContent")?;
    assert!(findings.as_str().is_some_and(|text| text.contains("The next connection of app")));
    // A page that is read anew shows the same.
    browser.reload()?;
    browser.until(TITLE, "app port 80")?;
    browser.press(ESCAPE)?;
    browser.until(OPEN, false)?;
    browser.until("location.hash", "#routes")?;

    // From the search field to the second row, without a mouse.
    browser.press("/")?;
    browser.until(FOCUS, "q")?;
    for _ in 0..5 {
        browser.press(TAB)?;
        if browser.value(FOCUS)? == "TR" {
            break;
        }
    }
    browser.until(FOCUS, "TR")?;
    browser.press(DOWN)?;
    browser.press(ENTER)?;
    browser.until(TITLE, "other port 81")?;
    browser.press(ESCAPE)?;
    browser.until(OPEN, false)?;

    browser.press("/blue")?;
    browser.until(ROWS, 1)?;
    browser.until("location.hash", "#routes?q=blue")?;
    browser.reload()?;
    browser.until("document.getElementById('q').value", "blue")?;
    browser.until(ROWS, 1)?;
    browser.click("#tabs [data-list=sources]")?;
    browser.until("document.querySelector('#head th').textContent", "Source")?;
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
    let embassy = host.embassy(["-provider=static", &services, &file])?;
    embassy.wait_ready(READY)?;
    let status: api::Status = get(&embassy, "/v1/status")?;
    assert_eq!(status.routes, 10_000);
    let last: api::Page<api::Route> = get(&embassy, "/v1/routes?limit=100&offset=9990")?;
    assert_eq!((last.total, last.items.len()), (10_000, 10));
    // 77 and 770 to 779, from four addresses each.
    let found: api::Page<api::Route> = get(&embassy, "/v1/routes?q=service-77&limit=10")?;
    assert_eq!((found.total, found.items.len()), (44, 10));
    let page = shows(&host, "routes", &["1–100 of 10,000", ">service-1<"])?;
    assert_eq!(page.matches("<tr tabindex").count(), 100);

    // Keys are answered while the page is kept up to date: no task of the page's own is long.
    let browser = Browser::start(&host)?;
    browser.open("")?;
    browser.until("document.querySelectorAll('#rows tr').length", 100)?;
    browser.value(
        "window.longest = 0, new PerformanceObserver(list => { for (const task of list.getEntries()) \
         longest = Math.max(longest, task.duration); }).observe({type: 'longtask', buffered: true})",
    )?;
    browser.press("/service-77")?;
    browser.until("document.getElementById('range').textContent", "1–44 of 44")?;
    let longest = browser.value("longest")?;
    // Many times what it takes: what this would notice is a page that draws all of them.
    assert!(longest.as_f64().is_some_and(|millis| millis < 2_000.0), "{longest} ms");
    Ok(())
}
