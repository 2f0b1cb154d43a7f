// The state of the page, its requests, and the reader's input.

const LIMIT = 100;
// Time from an answer to the next request, in ms.
const PAUSE = 2000;
// An answer that takes longer is reported as late.
const LATE = 3000;
// Timeout of a request, in ms.
const PATIENCE = 15000;
const SLOW = "embassy answers slowly.";

let list = "routes", offset = 0, current = "", explained = null;
let asking = null, next = 0, answered = null, shownItems = new Map();

async function get(path, signal) {
  const answer = await fetch(path, {signal});
  if (answer.ok) return answer.json();
  const error = await answer.json().then(body => body.error, () => "");
  throw Object.assign(new Error(error || answer.status + " " + answer.statusText), {refused: true});
}

// Requests everything that is shown. The next requests come after the answers, so that no answer is thrown away. Only the
// reader's input sends new requests at once.
async function refresh() {
  clearTimeout(next);
  if (asking) asking.abort();
  const mine = asking = new AbortController(), started = performance.now();
  const signal = AbortSignal.any([mine.signal, AbortSignal.timeout(PATIENCE)]);
  const late = setTimeout(() => tell(SLOW), LATE);
  const read = (path, show) => get(path, signal).then(answer => { if (asking === mine) show(answer); });
  const wanted = new URLSearchParams({limit: LIMIT, offset});
  if ($("q").value) wanted.set("q", $("q").value);
  if ($("state").value) wanted.set("state", $("state").value);
  const reads = [read("/v1/status", tiles), read("/v1/history", plots), read("/v1/" + list + "?" + wanted, show)];
  if (explained) {
    const {consumer, port} = explained;
    const told = read("/v1/explain?" + new URLSearchParams({consumer, port}), explains);
    reads.push(told.catch(error => {
      if (!error.refused || asking !== mine) throw error;
      explainsNothing(consumer, port, error.message);
    }));
  }
  const ends = await Promise.allSettled(reads);
  clearTimeout(late);
  if (asking !== mine) return;
  const failed = ends.find(end => end.status === "rejected");
  const took = performance.now() - started;
  if (failed) tell(failed.reason.refused ? "embassy refused the request: " + failed.reason.message : "embassy does not answer.");
  else {
    answered = new Date();
    if (took > LATE) tell(SLOW);
    else calm();
  }
  next = setTimeout(() => document.hidden || refresh(), PAUSE);
}

// The text is set only if it changes, because screen readers read each change aloud.
function tell(text) {
  const notice = answered ? text + " The data shown is from " + answered.toLocaleTimeString() + "." : text;
  if ($("notice").textContent !== notice) $("notice").textContent = notice;
  $("notice").hidden = false;
  Object.assign($("live"), text === SLOW ? {textContent: "late", className: "state warn"} : {textContent: "no answer", className: "state bad"});
}

function calm() {
  $("notice").hidden = true;
  Object.assign($("live"), {textContent: "live", className: "state good"});
}

function show(page) {
  const {columns, key, explains, none} = lists[list];
  if (page.offset && !page.items.length) {
    // The list became shorter than the current page's offset.
    offset = page.total ? Math.floor((page.total - 1) / LIMIT) * LIMIT : 0;
    return refresh();
  }
  shownItems = new Map(page.items.map(item => [String(key(item)), item]));
  // Tab reaches one row, arrow keys the others.
  if (!shownItems.has(current)) current = shownItems.keys().next().value;
  const focused = document.activeElement.closest("#rows tr");
  fill($("head"), [head(columns)]);
  fill($("rows"), page.items.length ? [...shownItems].map(([id, item]) => {
    const to = explains && explains(item);
    return row(columns, item, to
      ? {"data-key": id, tabindex: id === current ? 0 : -1, "aria-label": "Explain " + to[2] + " port " + to[1]} : {"data-key": id});
  }) : [message(columns, $("q").value || $("state").value ? "No entry matches the filter." : none)]);
  // If the focused row is gone, no other row gets the focus, because a key would then act on it.
  if (focused) (focused.isConnected ? focused : $("panel")).focus({preventScroll: true});
  const end = page.offset + page.items.length;
  $("range").textContent = page.total ? count(page.offset + 1) + "–" + count(end) + " of " + count(page.total) : "none";
  $("back").disabled = page.offset === 0;
  $("on").disabled = end >= page.total;
}

function choose(name) {
  list = name;
  offset = 0;
  for (const tab of $("tabs").children) {
    tab.setAttribute("aria-selected", tab.dataset.list === name);
    tab.tabIndex = tab.dataset.list === name ? 0 : -1;
  }
  $("panel").setAttribute("aria-labelledby", "tab-" + name);
  fill($("state"), [make("option", {value: ""}, "any state"), ...lists[name].states.map(s => make("option", {value: s}, s.replace("_", " ")))]);
  $("state").value = "";
  // Remove the previous list's rows at once.
  fill($("head"), [head(lists[name].columns)]);
  fill($("rows"), [message(lists[name].columns, "…")]);
  $("range").textContent = "";
  $("back").disabled = $("on").disabled = true;
}

function turnTo(name) {
  choose(name);
  remember();
  refresh();
}

function explain(consumer, port) {
  explained = {consumer, port};
  explainsNothing(consumer, port, "…");
  if (!$("explain").open) $("explain").showModal();
  remember();
  refresh();
}

// The address contains the state of the page, so that it can be shared: #routes?q=web&state=ejected&explain=172.17.0.2:80
function remember() {
  const where = explained && explained.consumer + ":" + explained.port;
  const shown = new URLSearchParams(Object.entries({q: $("q").value, state: $("state").value, explain: where}).filter(([, value]) => value));
  history.replaceState(null, "", "#" + list + (shown.size ? "?" + shown : ""));
}

function restore() {
  const [name, rest] = location.hash.slice(1).split("?", 2), wanted = new URLSearchParams(rest);
  choose(Object.hasOwn(lists, name) ? name : "routes");
  $("q").value = wanted.get("q") || "";
  $("state").value = wanted.get("state") || "";
  if ($("state").selectedIndex < 0) $("state").value = "";
  const [, consumer, port] = /^(.+):(\d+)$/.exec(wanted.get("explain")) || [];
  if (port) return explain(consumer, port);
  explained = null;
  $("explain").close();
  refresh();
}

function open(row) {
  const item = row && shownItems.get(row.dataset.key), to = item && lists[list].explains && lists[list].explains(item);
  if (to) explain(String(to[0]), String(to[1]));
}

for (const name in lists) {
  $("tabs").append(make("button", {type: "button", role: "tab", id: "tab-" + name, "data-list": name, "aria-controls": "panel"}, lists[name].title));
}
$("tabs").onclick = e => e.target.dataset.list && turnTo(e.target.dataset.list);
$("q").oninput = $("state").onchange = () => { offset = 0; remember(); refresh(); };
$("rows").onclick = e => getSelection().isCollapsed && open(e.target.closest("tr[tabindex]"));
$("rows").addEventListener("focusin", e => {
  const row = e.target.closest("tr[tabindex]");
  if (!row) return;
  for (const other of $("rows").children) if (other.tabIndex === 0) other.tabIndex = -1;
  row.tabIndex = 0;
  current = row.dataset.key;
});
$("explain").onclose = () => { explained = null; remember(); };
$("explain").onclick = e => e.target === $("explain") && $("explain").close();
$("explain-close").onclick = () => $("explain").close();
$("back").onclick = () => { offset = Math.max(0, offset - LIMIT); refresh(); };
$("on").onclick = () => { offset += LIMIT; refresh(); };
$("plots").addEventListener("pointermove", point);
$("plots").addEventListener("pointerleave", point);

// The element to which an arrow key moves.
const step = (node, key, [back, on]) => ({[back]: node.previousElementSibling, [on]: node.nextElementSibling,
  Home: node.parentNode.firstElementChild, End: node.parentNode.lastElementChild})[key];
addEventListener("keydown", e => {
  if (e.ctrlKey || e.altKey || e.metaKey || $("explain").open) return;
  const row = e.target.closest("#rows tr"), tab = e.target.closest("[role=tab]");
  const to = row ? step(row, e.key, ["ArrowUp", "ArrowDown"]) : tab && step(tab, e.key, ["ArrowLeft", "ArrowRight"]);
  if (e.key === "/" && !e.target.matches("input, select")) $("q").select();
  else if (to) {
    to.focus();
    if (tab) turnTo(to.dataset.list);
  } else if (row && (e.key === "Enter" || e.key === " ")) open(row);
  else if (e.target === $("panel") && e.key === "ArrowDown") $("rows").firstElementChild.focus();
  else return;
  e.preventDefault();
});
document.addEventListener("visibilitychange", () => document.hidden || refresh());
addEventListener("hashchange", restore);
restore();
