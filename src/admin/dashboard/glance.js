// The tiles and the plots.

// The first problem of a part, from the findings.
const wrong = (s, part) => (s.findings.find(f => f.about === part && f.verdict !== "ok") || {}).text;

// `to` is the list with the details.
function tile(s, part, title, value, more, to) {
  return make("a", {class: "card tile " + TONES[s.verdicts[part]], href: to, "data-key": title, title: wrong(s, part)},
    make("h2", {}, title), make("span", {class: "value"}, String(value)), make("span", {class: "more"}, more));
}

const said = (...parts) => parts.filter(Boolean).join(", ");

function tiles(s) {
  const c = s.connections, cap = s.capture, h = s.host;
  const restored = Object.values(cap.restored).reduce((a, b) => a + b, 0);
  const up = s.sources - s.sources_down - s.sources_waiting;
  fill($("tiles"), [
    tile(s, "process", "Ready", s.ready ? "yes" : "no",
      wrong(s, "process") || (s.waiting_for.length ? "waits for " + s.waiting_for.map(w => w.part).join(", ") : "up for " + time(s.uptime_seconds))),
    tile(s, "capture", "Capture", cap.mode === "none" ? (s.verdicts.capture === "broken" ? "nothing captured" : "your rules") : cap.in_place ? "in place" : "not in place",
      wrong(s, "capture") || (cap.mode === "none" ? "no rules of embassy" : said(cap.firewall, cap.mode, cap.scope, restored && "restored " + numbered(restored, "time")))),
    tile(s, "sources", "Sources", count(up) + " of " + count(s.sources) + " up",
      said(s.sources_down && count(s.sources_down) + " down", s.sources_waiting && count(s.sources_waiting) + " not answered yet") || wrong(s, "sources") || "all answer",
      "#sources" + (s.sources_down ? "?state=down" : s.sources_waiting ? "?state=waiting" : "")),
    tile(s, "bindings", "Problems", count(s.problems), s.problems ? "bindings without all their routes" : "every binding has its routes",
      "#bindings" + (s.problems ? "?state=problem" : "")),
    tile(s, "routes", "Routes", count(s.routes), said(numbered(s.consumers, "consumer"), s.routes_broken && count(s.routes_broken) + " broken", s.routes_degraded && count(s.routes_degraded) + " degraded"), "#routes"),
    tile(s, "endpoints", "Endpoints", count(s.endpoints), said(s.endpoints_ejected && count(s.endpoints_ejected) + " ejected", s.endpoints_drained && count(s.endpoints_drained) + " drained") || "none ejected",
      "#endpoints" + (s.endpoints_ejected ? "?state=ejected" : "")),
    tile(s, "connections", "Connections", count(c.active), said(count(c.started) + " since the start", numbered(c.errors, "error"), c.held && count(c.held) + " held"), "#connections"),
    tile(s, "host", "Host", bytes(h.resident_bytes), numbered(h.descriptors, "descriptor") + (h.conntrack_limit ? ", conntrack " + count(h.conntrack_entries) + " of " + count(h.conntrack_limit) : "")),
  ]);
  $("about").textContent = visible([s.host_name, s.version, s.vips.join(", ") || "no VIP", "pid " + s.pid].join(" · "));
}

// Number of samples that embassy keeps, and the width of the plots.
const SPAN = 150;
const PLOTS = [["Connections", "started_per_second", rate], ["Active", "active", count], ["Errors", "errors_per_second", rate], ["Connect p99", "connect_p99_seconds", time]];
let past = null, pointed = null;

// The end of the axis: the smallest of 1, 2, 5, 10, ... that is not below.
function ceiling(most) {
  if (!(most > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(most));
  return [1, 2, 5, 10].map(n => n * power).find(n => n >= most * .9999);
}

// An interval without a value (no connects) is a gap, not a zero.
function plot([title, name, show]) {
  const {samples, interval_seconds: interval} = past, span = Math.max(SPAN, samples.length);
  const values = samples.map(sample => sample[name]), top = ceiling(Math.max(...values.map(v => v || 0)));
  const x = n => 100 - (values.length - 1 - n) * 100 / (span - 1), y = v => 40 - v * 38 / top;
  const at = (n, v) => x(n).toFixed(2) + " " + y(v).toFixed(2);
  const runs = [];
  values.forEach((v, n) => v == null || (n && values[n - 1] != null ? runs.at(-1).push(n) : runs.push([n])));
  const line = runs.map(run => "M" + run.map(n => at(n, values[n])).join("L") + (run.length > 1 ? "" : "h0")).join("");
  const area = runs.map(run => "M" + x(run[0]).toFixed(2) + " 40L" + run.map(n => at(n, values[n])).join("L") + "L" + x(run.at(-1)).toFixed(2) + " 40Z").join("");
  const last = values.length - 1, looked = pointed && pointed.name === name ? last - pointed.back : last, most = values.length ? Math.max(...values.map(v => v || 0)) : null;
  return make("div", {class: "card plot", "data-key": name, "data-name": name},
    make("h2", {}, title), make("span", {class: "value"}, show(values[looked])),
    make("span", {class: "top"}, show(top)),
    svg("svg", {viewBox: "0 0 100 40", preserveAspectRatio: "none", role: "img", "aria-label": title + ": now " + show(values[last]) + ", maximum " + show(most)},
      svg("path", {class: "grid", d: "M0 2H100M0 21H100M0 40H100"}), svg("path", {class: "area", d: area}), svg("path", {class: "line", d: line}),
      looked < last ? svg("path", {class: "grid", d: "M" + x(looked).toFixed(2) + " 0V40"}) : null),
    make("span", {class: "ends"}, make("span", {}, time((span - 1) * interval + interval) + " ago"), make("span", {}, looked < last ? ago((last - looked) * interval) : "now")));
}

function plots(history) {
  past = history;
  fill($("plots"), PLOTS.map(plot));
}

function point(e) {
  const card = e.type === "pointermove" && past && e.target.closest(".plot"), box = card && card.querySelector("svg").getBoundingClientRect();
  const span = past && Math.max(SPAN, past.samples.length);
  const back = box && Math.round((box.right - e.clientX) / box.width * (span - 1));
  pointed = card && back >= 0 && back < past.samples.length ? {name: card.dataset.name, back} : null;
  if (past) plots(past);
}
