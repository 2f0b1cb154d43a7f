// The lists. A column has a name, a CSS class, and a function for its value.

// Long names wrap at the ends of their parts.
const broken = text => make("span", {}, ...text.split(/(?<=[\/.,])(?=.)/).flatMap((part, n) => n ? [make("wbr", {}), part] : [part]));
const service = q => q.service + (q.tags.length ? " [" + q.tags.join(", ") + "]" : "");
// Why it is the proxy, where the other path was asked for.
const pathOf = r => r.path + (r.path_reason === "not_asked" || r.path === "kernel" ? "" : " (" + r.path_reason.replaceAll("_", " ") + ")");
// 53/udp; of TCP the number alone.
const portOf = of => of.protocol === "udp" ? of.port + "/udp" : of.port;
// Of UDP datagrams are counted, and no bytes.
const carried = (r, way) => r.protocol === "udp" ? count(r["datagrams_" + way]) + " dg" : bytes(r["bytes_" + way]);
const lists = {
  routes: {
    title: "Routes", states: ["ok", "degraded", "ejected", "no_endpoint", "waiting", "not_captured", "refused"],
    none: "No running container has a binding yet.",
    key: r => [r.consumer_id, r.address, r.port, r.protocol],
    columns: [["Consumer", "name", r => r.consumer], ["Address", "", r => r.address], ["Port", "number", r => portOf(r)],
      ["Service", "name", r => service(r.query)], ["State", "", r => state(r.state, r.verdict)], ["Path", "", pathOf],
      ["Endpoints", "number", r => r.usable + " of " + r.endpoints],
      ["Active", "number", r => count(r.active)], ["Connections", "number", r => count(r.started)], ["Errors", "number", r => count(r.errors)],
      ["p99", "number", r => time(r.connect.p99_seconds)], ["Up", "number", r => carried(r, "up")], ["Down", "number", r => carried(r, "down")],
      ["Last error", "long", r => problem(r.last_error)]],
    explains: r => [r.address, r.port, r.consumer],
  },
  endpoints: {
    title: "Endpoints", states: ["active", "ejected", "probing", "unhealthy", "drained"],
    none: "No service that has a route has an endpoint.",
    key: e => [e.discovery, e.datacentre, e.service, e.endpoint],
    columns: [["Endpoint", "", e => e.endpoint], ["Service", "name", e => e.service], ["Discovery", "", e => e.discovery + (e.datacentre ? " " + e.datacentre : "")],
      ["State", "", e => state(e.state, e.verdict)], ["Active", "number", e => count(e.active)], ["Opened", "number", e => count(e.started)],
      ["Failed", "number", e => count(e.failed_tries)], ["Ejections", "number", e => count(e.ejections)], ["p99", "number", e => time(e.connect.p99_seconds)],
      ["Up", "number", e => bytes(e.bytes_up)], ["Down", "number", e => bytes(e.bytes_down)], ["Last error", "long", e => problem(e.last_error)]],
  },
  connections: {
    title: "Connections", states: ["held", "connecting", "running", "parked"],
    none: "There are no open connections.",
    key: c => [c.id],
    columns: [["Consumer", "name", c => c.consumer || "–"], ["Service", "name", c => c.service || "–"], ["Source", "address", c => c.source], ["Destination", "address", c => c.destination],
      ["Endpoint", "address", c => c.endpoint || "–"], ["State", "", c => state(c.state)], ["Age", "number", c => time(c.age_seconds)],
      ["Tries", "number", c => count(c.tries)], ["Up", "number", c => bytes(c.bytes_up)], ["Down", "number", c => bytes(c.bytes_down)]],
    explains: c => c.consumer && [c.source.replace(/:\d+$/, "").replace(/^\[|\]$/g, ""), /\d+$/.exec(c.destination)[0], c.consumer],
  },
  bindings: {
    title: "Bindings", states: ["problem", "routed", "partly", "unrouted", "overruled", "invalid"],
    none: "No running container has a binding.",
    key: b => [b.consumer_id, b.consumer, b.origin, b.port, b.protocol],
    columns: [["Consumer", "name", b => b.consumer], ["Declared by", "name", b => b.origin || "–"], ["Port", "number", b => b.port ? portOf(b) : "–"],
      ["Service", "name", b => b.query ? service(b.query) : "–"], ["State", "", b => state(b.state, b.verdict)], ["Addresses", "name", b => b.addresses.join(", ") || "–"],
      ["Why", "long", b => b.reasons.join("; ")]],
    explains: b => b.port && b.consumer_id && [b.consumer_id, b.port, b.consumer],
  },
  sources: {
    title: "Sources", states: ["up", "down", "waiting"],
    none: "No source was queried yet.",
    key: s => [s.name],
    columns: [["Source", "name", s => s.name], ["State", "", s => state(s.state, s.verdict)], ["Confirmed", "number", s => confirmed(s) || "–"], ["Changed", "number", s => ago(s.changed_seconds) || "–"],
      ["Items", "number", s => count(s.items)], ["Answers", "number", s => count(s.answers)], ["Failures", "number", s => count(s.failures)],
      ["Error, entries skipped", "long", s => [s.error, ...s.skipped].filter(Boolean).join("; ")]],
  },
};

// Rows of any list, here and in the explanation.
const head = columns => make("tr", {}, ...columns.map(([name, set]) => make("th", {scope: "col", class: set || null}, name)));
const row = (columns, item, attributes) => make("tr", attributes, ...columns.map(([name, set, of]) => {
  const value = of(item);
  return make("td", {class: [set, value === "" && "empty"].filter(Boolean).join(" ") || null, "data-name": name}, value instanceof Node ? value : set === "name" ? broken(String(value)) : String(value));
}));
const message = (columns, text) => make("tr", {class: "message"}, make("td", {colspan: columns.length}, text));
const table = (columns, items, key) => make("div", {class: "table"}, make("table", {},
  make("thead", {}, head(columns)), make("tbody", {}, ...items.map(item => row(columns, item, {"data-key": String(key(item))})))));
