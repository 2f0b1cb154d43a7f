//! The page at `/` in a real browser.

use super::{
    browser::{Browser, DOWN, END, ENTER, ESCAPE, RIGHT, TAB},
    *,
};

mod live;
mod looks;
mod many;

const ROWS: &str = "document.querySelectorAll('#rows tr[tabindex]').length";
const OPEN: &str = "document.getElementById('explain').open";
const TITLE: &str = "document.getElementById('explain-title').textContent";
const FOCUS: &str = "(document.activeElement.id || document.activeElement.tagName)";
const NOTICE: &str = "document.getElementById('notice').hidden";

#[test]
fn a_search_narrows_and_an_address_brings_back_what_was_shown() -> Result<()> {
    let host = Host::light()?;
    web(&host, "blue")?;
    let app = host.client("app").env("BACKEND_BLUE", "/services/blue;80").start()?;
    let _other = host.client("other").env("BACKEND_NONE", "/services/none;81").start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "blue")?;
    let browser = Browser::start(&host)?;
    browser.screen(1280, 900, "light")?;
    let consumers = "[...document.querySelectorAll('#rows td:first-child')].map(cell => cell.textContent).join()";

    browser.open("")?;
    browser.until(consumers, "app,other")?;
    browser.open("#routes?q=blue")?;
    browser.until(consumers, "app")?;
    browser.shows("1–1 of 1")?;
    browser.open("#routes?state=no_endpoint")?;
    browser.until(consumers, "other")?;
    browser.open("#routes?q=nobody")?;
    browser.shows("No entry matches the filter.")?;
    // A tile leads to the list with details.
    browser.click("#tiles [data-key=Routes]")?;
    browser.until(consumers, "app,other")?;

    browser.open(&format!("#routes?explain={}:80", app.ip()?))?;
    browser.until(OPEN, true)?;
    browser.until(TITLE, "app port 80")?;
    browser.shows("The next connection of app")?;
    // A reloaded page shows the same.
    browser.reload()?;
    browser.until(TITLE, "app port 80")?;
    browser.click("#explain-close")?;
    browser.until(OPEN, false)?;
    browser.until("location.hash", "#routes")?;

    browser.press("/blue")?;
    browser.until(ROWS, 1)?;
    browser.until("location.hash", "#routes?q=blue")?;
    browser.reload()?;
    browser.until("document.getElementById('q').value", "blue")?;
    browser.until(ROWS, 1)?;
    browser.click("#rows tr")?;
    browser.until(TITLE, "app port 80")
}

/// Characters that would reverse, hide or end the text beside them are shown escaped.
#[test]
fn no_name_turns_or_hides_what_is_shown() -> Result<()> {
    let host = Host::light()?;
    let flags = ["--dnat", "-discovery=consul://127.0.0.1:8500", "--proxy-ip=172.17.0.1"];
    let (embassy, _engine, _runtime) = crate::bounds::evil(&host, &flags)?;
    says(&embassy, &["discovery entry skipped"])?;
    says(&embassy, &["new route", "forged"])?;
    let browser = Browser::start(&host)?;
    browser.screen(1280, 900, "light")?;
    for (part, words) in [
        ("#routes", "forged"),
        ("#bindings", "forged"),
        ("#sources", "forged"),
        ("#routes?explain=plain:81", "plain port 81"),
    ] {
        browser.open(part)?;
        browser.shows(words)?;
        let text = browser.value("document.body.innerText")?;
        let text = text.as_str().context("a text")?;
        // Except the separators between cells and lines of the page.
        let found = text.chars().find(|c| !"\t\n".contains(*c) && embassy::text::is_deceptive(*c));
        ensure!(found.is_none(), "{part}: {found:?} in {text:?}");
        ensure!(text.contains("\\u{202e}"), "{part}: {text}");
    }
    Ok(())
}

#[test]
fn only_the_pages_own_style_and_script_are_used() -> Result<()> {
    let host = Host::light()?;
    web(&host, "blue")?;
    let _app = host.client("app").env("BACKEND_BLUE", "/services/blue;80").start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    let browser = Browser::start(&host)?;
    browser.open("")?;
    browser.until(ROWS, 1)?;
    browser.until(
        "document.styleSheets.length + ' ' + (getComputedStyle(document.body).margin === '8px')",
        "1 false",
    )?;
    // As if a text from outside had become part of the page.
    let put = "(window.violated = [], addEventListener('securitypolicyviolation', e => violated.push(e.effectiveDirective)), \
        [['script', 'window.foreign = true'], ['style', 'body { margin: 77px }']].forEach(([name, text]) => { \
        const node = document.createElement(name); node.textContent = text; document.body.append(node); }), \
        document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.foreign = true\">'), true)";
    browser.until(put, true)?;
    let all = "['script-src-elem', 'style-src-elem', 'script-src-attr'].every(one => violated.includes(one))";
    browser.until(all, true)?;
    browser.until(
        "[window.foreign === undefined, getComputedStyle(document.body).margin !== '77px'].join()",
        "true,true",
    )
}

#[test]
fn it_is_used_by_the_keyboard_alone() -> Result<()> {
    let host = Host::light()?;
    web(&host, "blue")?;
    let app = host.client("app").env("BACKEND_BLUE", "/services/blue;80").start()?;
    let other = host.client("other").env("BACKEND_NONE", "/services/none;81").start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "blue")?;
    let browser = Browser::start(&host)?;
    browser.open("")?;
    browser.until(ROWS, 2)?;

    // From the search field to the second row, without a mouse.
    browser.press("/")?;
    browser.until(FOCUS, "q")?;
    for _ in 0..3 {
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
    // The focus stays with its row, even when other rows appear before it.
    browser.until(FOCUS, "TR")?;
    let _first = host.client("a-first").env("BACKEND_BLUE", "/services/blue;80").start()?;
    let _second = host.client("b-second").env("BACKEND_BLUE", "/services/blue;80").start()?;
    browser.until(ROWS, 4)?;
    browser.press(ENTER)?;
    browser.until(TITLE, "other port 81")?;
    browser.press(ESCAPE)?;
    browser.until(OPEN, false)?;
    // If the focused row disappears, the focus does not move to another row.
    other.remove()?;
    browser.until(ROWS, 3)?;
    browser.until(FOCUS, "panel")?;
    browser.press(ENTER)?;
    assert_eq!(browser.value(OPEN)?, false);
    browser.press(DOWN)?;
    browser.press(ENTER)?;
    browser.until(TITLE, "a-first port 80")?;
    browser.press(ESCAPE)?;
    browser.until(OPEN, false)?;

    // Lists are tabs: one tab stop, and arrow keys from there.
    browser.value("document.getElementById('tab-routes').focus()")?;
    let chosen = "document.querySelector('[role=tab][aria-selected=true]').id + ' ' + \
         document.getElementById('panel').getAttribute('aria-labelledby') + ' ' + document.activeElement.id";
    browser.press(RIGHT)?;
    browser.until(chosen, "tab-endpoints tab-endpoints tab-endpoints")?;
    browser.press(END)?;
    browser.until(chosen, "tab-sources tab-sources tab-sources")?;
    browser.until("document.querySelector('#head th').textContent", "Source")?;
    browser.until("document.querySelectorAll('[role=tab][tabindex=\"0\"]').length", 1)?;
    browser.press(TAB)?;
    browser.until(FOCUS, "q")
}
