//! A page stays open while things change. It shows each change without a reload.

use super::*;

/// The visible text of the row that contains `words`. Empty if there is no such row.
fn row_of(words: &str) -> String {
    format!(
        "([...document.querySelectorAll('#rows tr')].find(row => row.innerText.includes({words:?})) || {{}}).innerText || ''"
    )
}

/// Waits until the row with `of` contains `words`.
fn says_row(browser: &Browser<'_>, of: &str, words: &str) -> Result<()> {
    browser.until(&format!("({}).includes({words:?})", row_of(of)), true)
}

/// Waits until a tile contains `words`.
fn says_tile(browser: &Browser<'_>, tile: &str, words: &str) -> Result<()> {
    let text = format!("document.querySelector('#tiles [data-key={tile}]').innerText");
    browser.until(&format!("({text}).includes({words:?})"), true)
}

#[test]
fn an_open_page_shows_what_happens() -> Result<()> {
    let host = Host::start()?;
    let blue = web(&host, "blue")?;
    let dead = format!("{}:81", blue.ip()?);
    offer_at(&host, "blue", &dead)?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    let browser = Browser::start(&host)?;
    browser.screen(1280, 900, "light")?;
    browser.open("")?;
    browser.shows("No running container has a binding yet.")?;
    says_tile(&browser, "Capture", "in place")?;
    says_tile(&browser, "Sources", "all answer")?;
    // It would be gone after a reload.
    browser.value("window.opened = true")?;
    // There was no connection, so there is no connect time, and none is drawn.
    let line = |name: &str| {
        format!("document.querySelector('[data-name={name}] .line').getAttribute('d')")
    };
    browser.until(&format!("{}.startsWith('M')", line("started_per_second")), true)?;
    assert_eq!(browser.value(&line("connect_p99_seconds"))?, "");

    // A new container. Its names may contain anything: they are shown, and have no effect. Values are not shown.
    let app = host.client("new-app").env("BACKEND_BLUE", "/services/blue;80");
    let app = app.env("BACKEND_EVIL<img>", "S3CRET").start()?;
    says_row(&browser, "new-app", "/services/blue")?;
    says_tile(&browser, "Problems", "1")?;
    browser.click("#tab-bindings")?;
    says_row(&browser, "BACKEND_EVIL", "invalid")?;
    says_row(&browser, "BACKEND_EVIL", "<img>")?;
    assert_eq!(browser.value("document.images.length")?, 0);
    assert_eq!(browser.value("document.body.innerText.includes('S3CRET')")?, false);

    // An endpoint that fails.
    browser.click("#tab-endpoints")?;
    says_row(&browser, &dead, "active")?;
    let answers = app.get("172.17.0.1:80").times(4).run()?;
    ensure!(answers.answered() == 4, "{answers:?}");
    // Each failed probe doubles the ejection time.
    let get = ["testbed", "peer", "get", "172.17.0.1:80", "--until", "/never", "--pause-ms", "50"];
    let _traffic = app.spawn("traffic", get)?;
    says_row(&browser, &dead, "ejected")?;
    says_row(&browser, &dead, "Connection refused")?;
    says_tile(&browser, "Endpoints", "1 ejected")?;
    browser.until(&format!("{}.startsWith('M')", line("connect_p99_seconds")), true)?;

    // The details of a route, which stay up to date.
    browser.click("#tab-routes")?;
    says_row(&browser, "new-app", "degraded")?;
    browser.click("#rows tr[tabindex]")?;
    browser.until(TITLE, "new-app port 80")?;
    let explained = "document.getElementById('explain').innerText";
    for words in [
        "degraded",
        "is skipped for",
        "The next connection of new-app",
        "BACKEND_BLUE",
        "Captured\nyes",
        "Service etcd /services/blue",
        "Confirmed\n",
        &format!("Next pick\n{}:80", blue.ip()?),
        "ejected",
        "in a row",
        "Connection refused",
        "Retries",
        &app.id()[..12],
    ] {
        browser.until(&format!("{explained}.includes({words:?})"), true)?;
    }
    host.etcd()?.v3().delete(&format!("/services/blue/{dead}"))?;
    browser.until(&format!("{explained}.includes('is skipped for')"), false)?;
    browser.until("document.getElementById('explain-verdict').innerText", "ok")?;
    browser.press(ESCAPE)?;

    // A source goes down and comes back.
    browser.click("#tab-sources")?;
    says_row(&browser, "etcd /services/blue", "up")?;
    host.etcd_daemon().kill()?;
    says_row(&browser, "etcd /services/blue", "down")?;
    says_tile(&browser, "Sources", "1 of 2 up")?;
    says_tile(&browser, "Sources", "1 down")?;
    host.etcd_daemon().start()?;
    says_row(&browser, "etcd /services/blue", "up")?;
    says_tile(&browser, "Sources", "all answer")?;

    // embassy itself.
    assert_eq!(browser.value(NOTICE)?, true);
    embassy.terminate()?;
    embassy.wait(WAIT)?;
    browser.shows("embassy does not answer. The data shown is from ")?;
    browser.until("document.getElementById('live').textContent", "no answer")?;
    let again = host.embassy(["--dnat", ETCD])?;
    again.wait_ready(READY)?;
    browser.until(NOTICE, true)?;
    browser.until("document.getElementById('live').textContent", "live")?;
    assert_eq!(browser.value("window.opened")?, true);
    Ok(())
}

/// Delays every answer.
fn delay(browser: &Browser<'_>, millis: u32) -> Result<()> {
    let late = format!(
        "(window.given = window.given || fetch, window.fetch = async (...asked) => {{ \
         const answer = await given(...asked); \
         await new Promise(resolve => setTimeout(resolve, {millis})); \
         return answer; }}, 0)"
    );
    browser.value(&late).map(drop)
}

#[test]
fn answers_that_are_late_are_shown_all_the_same() -> Result<()> {
    let host = Host::start()?;
    web(&host, "blue")?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    let browser = Browser::start(&host)?;
    browser.open("")?;
    browser.shows("No running container has a binding yet.")?;

    // Later than the next request would be sent if the page did not wait for answers.
    delay(&browser, 2_600)?;
    let _app = host.client("app").env("BACKEND_BLUE", "/services/blue;80").start()?;
    browser.until(ROWS, 1)?;
    // So late that the page reports it.
    delay(&browser, 4_000)?;
    browser.shows("embassy answers slowly. The data shown is from ")?;
    let _two = host.client("two").env("BACKEND_BLUE", "/services/blue;80").start()?;
    browser.until(ROWS, 2)?;
    delay(&browser, 0)?;
    browser.until(NOTICE, true)?;

    // A source that has not answered yet does not count as answering.
    let waits = "(window.given = window.given || fetch, window.fetch = async (...asked) => { \
         const answer = await given(...asked); \
         if (asked[0] !== '/v1/status') return answer; \
         return new Response(JSON.stringify({...await answer.json(), sources_waiting: 1})); }, 0)";
    browser.value(waits)?;
    says_tile(&browser, "Sources", "1 of 2 up")?;
    says_tile(&browser, "Sources", "1 not answered yet")
}
