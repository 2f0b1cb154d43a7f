//! A real browser in which a test clicks and types: Chromium, controlled by WebDriver (w3.org/TR/webdriver2).

use anyhow::{Context, Result};
use serde_json::{Value, json};
use testbed::{Host, Process};

use crate::{READY, WAIT};

const DRIVER: &str = "http://127.0.0.1:9515";

/// A browser with one page of the dashboard. It ends with the host.
pub(super) struct Browser<'a> {
    host: &'a Host,
    session: String,
    _driver: Process,
}

/// Keys, as WebDriver encodes them.
pub(super) const TAB: &str = "\u{e004}";
pub(super) const ENTER: &str = "\u{e007}";
pub(super) const ESCAPE: &str = "\u{e00c}";
pub(super) const DOWN: &str = "\u{e015}";
pub(super) const RIGHT: &str = "\u{e014}";
pub(super) const END: &str = "\u{e010}";

impl<'a> Browser<'a> {
    pub(super) fn start(host: &'a Host) -> Result<Self> {
        let mut driver = host.command("chromedriver");
        driver.arg("--port=9515");
        let driver = host.spawn("chromedriver", driver)?;
        testbed::eventually(READY, "the driver of Chromium", || {
            host.http("GET", &format!("{DRIVER}/status"), "")?.ok()
        })?;
        let profile = format!("--user-data-dir={}", host.dir().join("profile").display());
        let args = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"];
        let args = [&args[..], &["--window-size=1280,900", &profile]].concat();
        let wanted =
            json!({"capabilities": {"alwaysMatch": {"goog:chromeOptions": {"args": args}}}});
        // Chromium may take longer to start than the timeout of a request.
        let session = testbed::eventually(READY, "a session of Chromium", || {
            let answer = host.http("POST", &format!("{DRIVER}/session"), &wanted.to_string())?;
            let session = answer.json()?["value"]["sessionId"].as_str().map(str::to_owned);
            session.context("no session")
        })?;
        Ok(Self { host, session, _driver: driver })
    }

    fn call(&self, what: &str, body: &Value) -> Result<Value> {
        let url = format!("{DRIVER}/session/{}/{what}", self.session);
        let mut answer = self.host.http("POST", &url, &body.to_string())?.json()?;
        Ok(answer["value"].take())
    }

    /// Opens the dashboard at a fragment such as `#routes?q=web`.
    pub(super) fn open(&self, part: &str) -> Result<()> {
        self.call("url", &json!({"url": format!("http://127.0.0.1:9990/{part}")})).map(drop)
    }

    pub(super) fn reload(&self) -> Result<()> {
        self.call("refresh", &json!({})).map(drop)
    }

    /// The value of a JavaScript expression on the page.
    pub(super) fn value(&self, expression: &str) -> Result<Value> {
        let script = format!("return ({expression});");
        self.call("execute/sync", &json!({"script": script, "args": []}))
    }

    /// Waits until an expression has this value.
    pub(super) fn until(&self, expression: &str, wanted: impl Into<Value>) -> Result<()> {
        let wanted = wanted.into();
        testbed::eventually(WAIT, &format!("{expression} to be {wanted}"), || {
            let value = self.value(expression)?;
            anyhow::ensure!(value == wanted, "it is {value}");
            Ok(())
        })
    }

    /// Waits until the page visibly contains these words.
    pub(super) fn shows(&self, words: &str) -> Result<()> {
        testbed::eventually(WAIT, &format!("{words:?} on the page"), || {
            let text = self.value("document.body.innerText")?;
            let shown = text.as_str().is_some_and(|text| text.contains(words));
            anyhow::ensure!(shown, "it shows {text}");
            Ok(())
        })
    }

    /// A call of Chromium's own protocol (chromedevtools.github.io/devtools-protocol).
    fn devtools(&self, cmd: &str, params: &Value) -> Result<Value> {
        self.call("goog/cdp/execute", &json!({"cmd": cmd, "params": params}))
    }

    /// Sets the size of the screen, and the preferred colour scheme: `light` or `dark`.
    pub(super) fn screen(&self, width: u32, height: u32, scheme: &str) -> Result<()> {
        let size = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600});
        self.devtools("Emulation.setDeviceMetricsOverride", &size)?;
        let prefers = json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]});
        self.devtools("Emulation.setEmulatedMedia", &prefers).map(drop)
    }

    /// Writes a screenshot as a PNG file to the folder `$SCREENSHOTS`, if that is set.
    pub(super) fn picture(&self, name: &str) -> Result<()> {
        let Ok(folder) = std::env::var("SCREENSHOTS") else { return Ok(()) };
        let picture = self.devtools("Page.captureScreenshot", &json!({"format": "png"}))?;
        let encoded = format!("{folder}/{name}.base64");
        std::fs::write(&encoded, picture["data"].as_str().context("no picture")?)?;
        let png = std::process::Command::new("base64").arg("-d").arg(&encoded).output()?;
        std::fs::write(format!("{folder}/{name}.png"), png.stdout)?;
        Ok(std::fs::remove_file(encoded)?)
    }

    /// Clicks into the middle of the element that a CSS selector finds.
    pub(super) fn click(&self, selector: &str) -> Result<()> {
        let found = json!({"using": "css selector", "value": selector});
        let element = self.call("element", &found)?;
        let id = element.as_object().and_then(|fields| fields.values().next()?.as_str());
        let id = id.with_context(|| format!("no {selector}: {element}"))?;
        self.call(&format!("element/{id}/click"), &json!({})).map(drop)
    }

    /// Presses keys one after the other, at the current focus.
    pub(super) fn press(&self, keys: &str) -> Result<()> {
        let press = |key: char| {
            [json!({"type": "keyDown", "value": key}), json!({"type": "keyUp", "value": key})]
        };
        let actions: Vec<_> = keys.chars().flat_map(press).collect();
        let keyboard = json!({"type": "key", "id": "keyboard", "actions": actions});
        self.call("actions", &json!({"actions": [keyboard]})).map(drop)
    }
}
