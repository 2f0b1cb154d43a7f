//! Dark and light colours, on large and small screens: everything fits and is readable.

use super::*;
use crate::support::offer;

/// Texts with a contrast of less than 4.5 to 1 against their background (WCAG 2.2, 1.4.3), with their contrast.
const FAINT: &str = "(() => { \
     const rgb = colour => (colour.match(/[\\d.]+/g) || []).map(Number); \
     const light = ([r, g, b]) => { const [x, y, z] = [r, g, b].map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); \
       return .2126 * x + .7152 * y + .0722 * z; }; \
     const behind = node => { for (; node; node = node.parentElement) { const c = rgb(getComputedStyle(node).backgroundColor); \
       if (c.length === 3 || c[3] === 1) return c; } return [255, 255, 255]; }; \
     const texts = document.createTreeWalker(document.querySelector('dialog[open]') || document.body, NodeFilter.SHOW_TEXT), faint = []; \
     while (texts.nextNode()) { const node = texts.currentNode.parentElement; \
       if (!texts.currentNode.data.trim() || !node.checkVisibility() || node.closest('script, option, :disabled')) continue; \
       const [a, b] = [light(rgb(getComputedStyle(node).color)), light(behind(node))]; \
       const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05); \
       if (contrast < 4.5) faint.push(contrast.toFixed(1) + ' ' + texts.currentNode.data); } \
     return faint.join('; '); })()";

/// Elements that are wider than their place: cut off, or over others.
const CUT: &str = "[...document.querySelectorAll('h1, h2, h3, .tile, .plot, .value, .more, td, dd, li, #notice, .top')] \
     .filter(node => node.checkVisibility() && node.clientWidth > 0 && node.scrollWidth > node.clientWidth + 1) \
     .map(node => node.tagName + ' ' + node.textContent).join('; ')";

/// Checks the visible page for such problems.
fn is_well_made(browser: &Browser<'_>, width: u32, what: &str) -> Result<()> {
    browser.picture(what)?;
    // A phone widens its screen if something does not fit, so the width itself is compared.
    let fits = format!(
        "innerWidth === {width} && visualViewport.scale === 1 && document.documentElement.scrollWidth <= {width} && \
         document.getElementById('explain').getBoundingClientRect().right <= {width}"
    );
    assert_eq!(browser.value(&fits)?, true, "{what} does not fit");
    assert_eq!(browser.value(CUT)?, "", "{what}: something is cut off");
    assert_eq!(browser.value(FAINT)?, "", "{what}: something is faint");
    Ok(())
}

#[test]
fn it_fits_and_can_be_read_dark_and_light_on_a_desk_and_on_a_phone() -> Result<()> {
    let host = Host::start()?;
    let blue = web(&host, "blue")?;
    let dead = format!("{}:81", blue.ip()?);
    let long = "a-service/with/a/rather-long-name/as-they-are/written-by/those-who-name-things";
    offer_at(&host, "blue", &dead)?;
    let greeter = host.server("greeter", ["greet"]).start()?;
    offer(&host, long, greeter.ip()?)?;
    let app = host.client("app").env("BACKEND_BLUE", "/services/blue;80");
    let app = app.env("BACKEND_LONG", &format!("/services/{long};81"));
    let app = (0..16).fold(app, |app, n| {
        app.env(&format!("BACKEND_{n}"), &format!("/services/service-{n};{}", 8000 + n))
    });
    let app = app.env("BACKEND_WRONG", "no port at all").start()?;
    let name =
        "a-consumer-with-a-name-that-somebody-made-of-a-project-an-environment-and-a-number-1";
    let _other = host.client(name).env("BACKEND_BLUE", "/services/blue;80").start()?;
    let embassy = host.embassy(["--dnat", ETCD])?;
    embassy.wait_ready(READY)?;
    reaches(&app, "172.17.0.1:80", "blue")?;
    let get = ["testbed", "peer", "get", "172.17.0.1:80", "--until", "/never", "--pause-ms", "50"];
    let _traffic = app.spawn("traffic", get)?;
    let _held = hold(&app, "held", "172.17.0.1:81")?;
    let browser = Browser::start(&host)?;
    let dark = "getComputedStyle(document.body).backgroundColor";
    let explained = format!("#routes?explain={}:80", app.ip()?);

    for (width, height, scheme) in
        [(1280, 900, "light"), (1280, 900, "dark"), (390, 844, "light"), (390, 844, "dark")]
    {
        let of = |what: &str| format!("{width}-{scheme}-{what}");
        browser.screen(width, height, scheme)?;
        for tab in ["routes", "endpoints", "connections", "bindings", "sources"] {
            browser.open(&format!("#{tab}"))?;
            browser
                .until("document.querySelectorAll('#rows tr:not(.message)').length > 0", true)?;
            browser.until("document.querySelectorAll('.plot').length", 4)?;
            is_well_made(&browser, width, &of(tab))?;
            if width < 600 {
                browser.value("(document.getElementById('tabs').scrollIntoView(), 0)")?;
                is_well_made(&browser, width, &of(&format!("{tab}-rows")))?;
            }
        }
        browser.open("#routes?q=nobody")?;
        browser.shows("No entry matches the filter.")?;
        is_well_made(&browser, width, &of("nothing"))?;
        browser.open(&explained)?;
        browser.until("document.querySelectorAll('#explain-facts section').length > 1", true)?;
        is_well_made(&browser, width, &of("explain"))?;
        browser.press(ESCAPE)?;
        let colour = browser.value(dark)?;
        let channel = colour.as_str().and_then(|rgb| rgb.split(['(', ',']).nth(1)?.parse().ok());
        let channel: u8 = channel.with_context(|| format!("{colour}"))?;
        assert_eq!(channel < 64, scheme == "dark", "{colour}");
    }

    // Also when there are problems.
    host.etcd_daemon().kill()?;
    browser.open("#sources")?;
    browser.shows("Connection refused")?;
    is_well_made(&browser, 390, "390-dark-down")?;
    embassy.kill()?;
    browser.shows("embassy does not answer")?;
    is_well_made(&browser, 390, "390-dark-gone")?;
    browser.screen(1280, 900, "light")?;
    is_well_made(&browser, 1280, "1280-light-gone")
}
