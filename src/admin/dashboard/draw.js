// Creates and updates elements, and formats texts and numbers.

const $ = id => document.getElementById(id);

// Everything is inserted as text, because names come from containers, which are not trusted.
// What would change the direction of a text, or cannot be seen, is written out, as in the log.
const DECEPTIVE = /[\p{Cc}\u2028\u2029\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\u{e0000}-\u{e0fff}]/gu;
const visible = text => String(text).replace(DECEPTIVE, c => "\\u{" + c.codePointAt(0).toString(16) + "}");
function set(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) if (value != null && value !== false) node.setAttribute(name, value);
  node.append(...children.filter(child => child != null && child !== "").map(child => child instanceof Node ? child : visible(child)));
  return node;
}
const make = (tag, attributes, ...children) => set(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => set(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

// Changes the children of a node to `wanted`, and does not touch unchanged ones, so that focus, selection and scrolling
// stay. Children with a `data-key` are matched by key, all others by position.
function fill(parent, wanted) {
  const key = node => node.dataset && node.dataset.key;
  const keys = new Set(wanted.map(key)), known = new Map();
  for (const child of [...parent.children]) {
    if (key(child) && !keys.has(key(child))) child.remove();
    else if (key(child)) known.set(key(child), child);
  }
  let at = parent.firstChild;
  for (const child of wanted) {
    const same = key(child) ? known.get(key(child)) : at && !key(at) && at.nodeName === child.nodeName ? at : null;
    if (!same) {
      parent.insertBefore(child, at);
      continue;
    }
    known.delete(key(child));
    if (same === at) at = at.nextSibling;
    else parent.insertBefore(same, at);
    if (same.isEqualNode(child)) continue;
    if (same.nodeType === Node.TEXT_NODE) same.data = child.data;
    else become(same, child);
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

function become(node, wanted) {
  for (const {name} of [...node.attributes]) if (!wanted.hasAttribute(name)) node.removeAttribute(name);
  for (const {name, value} of wanted.attributes) if (node.getAttribute(name) !== value) node.setAttribute(name, value);
  fill(node, [...wanted.childNodes]);
}

const count = n => n == null ? "–" : n.toLocaleString("en");
const numbered = (n, thing) => count(n) + " " + thing + (n === 1 ? "" : "s");
const rate = v => v == null ? "–" : (Number.isInteger(v) || v >= 10 ? v.toFixed(0) : v.toFixed(1)) + "/s";
const bytes = n => {
  if (n == null) return "–";
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let unit = 0;
  while (n >= 999.95 && unit < 5) { n /= 1000; unit++; }
  return (unit ? n.toFixed(1) : n) + " " + units[unit];
};
const time = s => s == null ? "–" : s === 0 ? "0 s" : s < 1e-3 ? (s * 1e6).toFixed(0) + " µs" : s < 1 ? (s * 1e3).toFixed(s < .01 ? 1 : 0) + " ms"
  : s < 120 ? s.toFixed(s < 10 ? 1 : 0) + " s" : s < 7200 ? (s / 60).toFixed(0) + " min" : s < 172800 ? (s / 3600).toFixed(0) + " h" : (s / 86400).toFixed(0) + " d";
const ago = s => s == null ? "" : s < 1 ? "just now" : (s < 10 ? s.toFixed(0) + " s" : time(s)) + " ago";
// Of a source: its last answer, or the data that an earlier run saved.
const confirmed = s => s.kept_seconds == null ? ago(s.age_seconds) : "in an earlier run, " + ago(s.kept_seconds);
const problem = p => p ? p.text + ", " + ago(p.age_seconds) : "";

// CSS classes of the verdicts.
const TONES = {ok: "good", degraded: "warn", broken: "bad"};
const state = (word, verdict) => make("span", {class: "state " + (TONES[verdict] || "")}, word.replace("_", " "));
