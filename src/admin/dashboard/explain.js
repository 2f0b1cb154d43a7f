// The explanation of one port of a consumer: the answer of `/v1/explain`.

// Pairs of name and value; empty values are omitted.
const facts = pairs => make("dl", {}, ...pairs.filter(([, value]) => value != null && value !== "")
  .map(([name, value, set]) => make("div", {class: set}, make("dt", {}, name), make("dd", {}, value instanceof Node ? value : String(value)))));
const part = (title, ...children) => make("section", {"data-key": title}, make("h3", {}, title), ...children);
// 80, 8001–8050
const ranges = ports => ports.reduce((all, port) => {
  const last = all.at(-1);
  if (last && port === last[1] + 1) last[1] = port;
  else all.push([port, port]);
  return all;
}, []).map(([from, to]) => from === to ? from : from + "–" + to).join(", ");
const outcomes = ended => Object.entries(ended).map(([name, n]) => count(n) + " " + name.replaceAll("_", " ")).join(", ");

const BINDINGS = [["Consumer", "name", b => b.consumer], ["Declared by", "name", b => b.origin || "–"], ["Asks for", "name", b => b.query ? b.query.name : "–"], ["State", "", b => state(b.state, b.verdict)],
  ["Addresses", "name", b => b.addresses.join(", ") || "–"], ["Why", "long", b => b.reasons.join("; ")]];
const ROUTES = [["Address", "", r => r.address], ["Protocol", "", r => r.protocol], ["Path", "", pathOf], ["Active", "number", r => count(r.active)], ["Connections", "number", r => count(r.started)], ["Retries", "number", r => count(r.retries)],
  ["p50", "number", r => time(r.connect.p50_seconds)], ["p99", "number", r => time(r.connect.p99_seconds)], ["Up", "number", r => carried(r, "up")], ["Down", "number", r => carried(r, "down")],
  ["Ended", "long", r => outcomes(r.ended)], ["Last error", "long", r => problem(r.last_error)]];
const endpoints = next => [["Endpoint", "", e => e.endpoint === next ? make("span", {}, e.endpoint, " ", make("span", {class: "next"}, "next")) : e.endpoint],
  ["State", "", e => e.ejected_for_seconds ? make("span", {}, state(e.state, e.verdict), " " + Math.ceil(e.ejected_for_seconds) + " s more") : state(e.state, e.verdict)],
  ["Check", "", e => e.check || ""], ["Active", "number", e => count(e.active)], ["Opened", "number", e => count(e.started)],
  ["Failed", "number", e => count(e.failed_tries) + (e.failures ? ", " + count(e.failures) + " in a row" : "")], ["Ejections", "number", e => count(e.ejections)],
  ["p99", "number", e => time(e.connect.p99_seconds)], ["Last error", "long", e => problem(e.last_error)]];

function explanation(e) {
  const captured = e.captured == null ? "your own rules decide" : e.captured ? make("span", {class: "state good"}, "yes") : make("span", {class: "state bad"}, "no");
  const retries = e.routes.reduce((sum, r) => sum + r.retries, 0);
  return [
    part("Consumer",
      facts([["Captured", captured], ["Dials", e.dial.join(" or "), "roomy"], ["Retries", e.routes.length ? count(retries) : null], ...e.consumers.flatMap(c => [["Name", c.name, "roomy"], ["ID", c.id.slice(0, 12)], ["Addresses", c.addresses.join(", "), "roomy"], ["Declared ports", ranges(c.ports) || "none", "wide"]])]),
      e.bindings.length ? table(BINDINGS, e.bindings, lists.bindings.key) : make("p", {class: "soft"}, "This port is not declared.")),
    ...e.services.map(s => part("Service " + s.query.name,
      facts([["Next pick", s.next || "none", "roomy"], ["State", state(s.state, s.verdict)], ["Balance", s.balance], ["Tags", s.query.tags.join(", ")], ["Datacentre", s.query.datacentre], ...source(s.source)]),
      s.endpoints.length ? table(endpoints(s.next), s.endpoints, lists.endpoints.key) : make("p", {class: "soft"}, "The service has no endpoint."))),
    e.routes.length ? part("Routes", table(ROUTES, e.routes, lists.routes.key)) : null,
  ].filter(Boolean);
}

const finding = f => make("li", {}, f.text, f.fix && f.verdict !== "ok" ? make("span", {class: "soft"}, " Fix: " + f.fix) : "");
const source = s => s == null ? [["Source", "not queried yet"]] : [["Source", state(s.state, s.verdict)], ["Confirmed", confirmed(s)], ["Changed", ago(s.changed_seconds)],
  ["Answers", count(s.answers)], ["Failures", count(s.failures)], ["Error", s.error, "wide"], ["Skipped", s.skipped.join("; "), "wide"]];

function explains(e) {
  $("explain-title").textContent = visible((e.consumers.map(c => c.name).join(", ") || e.consumer) + " port " + e.port);
  fill($("explain-verdict"), [state(e.verdict, e.verdict)]);
  fill($("explain-findings"), e.findings.map(finding));
  fill($("explain-facts"), explanation(e));
}

function explainsNothing(consumer, port, why) {
  $("explain-title").textContent = visible(consumer + " port " + port);
  fill($("explain-verdict"), []);
  fill($("explain-findings"), [make("li", {}, why)]);
  fill($("explain-facts"), []);
}
