#!/usr/bin/env python3
"""Saves what a browser shows of a page once a text is on it: page_to_png.py URL TEXT FILE. Needs chromium and chromedriver."""

import base64
import json
import subprocess
import sys
import time
import urllib.request

url, text, file = sys.argv[1:]
driver = subprocess.Popen(["chromedriver", "--port=9515", "--silent"])


def call(method, path, body=None):
    data = json.dumps(body or {}).encode() if method == "POST" else None
    request = urllib.request.Request(f"http://127.0.0.1:9515{path}", data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["value"]


def wait(what):
    end = time.monotonic() + 60
    while True:
        try:
            found = what()
            if found:
                return found
        except OSError:
            pass
        if time.monotonic() > end:
            sys.exit(f"{url} does not show {text!r}")
        time.sleep(0.2)


try:
    words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1280,810"]
    wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": {"args": words}}}}
    session = "/session/" + wait(lambda: call("POST", "/session", wanted))["sessionId"]
    call("POST", f"{session}/url", {"url": url})
    script = {"script": "return document.body.innerText", "args": []}
    wait(lambda: text in call("POST", f"{session}/execute/sync", script))
    # Rates are there with the second reading.
    time.sleep(4)
    with open(file, "wb") as out:
        out.write(base64.b64decode(call("GET", f"{session}/screenshot")))
    call("DELETE", session)
finally:
    driver.terminate()
