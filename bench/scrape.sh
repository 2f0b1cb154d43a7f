#!/usr/bin/env bash
# What a scrape of 1,000 routes with 10 endpoints each costs, and what the data path notices of it: `make figures` runs this by
# `testbed shell`. Every endpoint has been dialled, so that each has all its series, and HELD connections idle meanwhile.
# Requests come at a fixed rate over connections that stay, with a scrape every second and without, in turn.
set -euo pipefail

EMBASSY=${EMBASSY:-target/release/embassy}
BENCH=${BENCH:-target/release/bench}
SCRAPES=${SCRAPES:-11}
ROUNDS=${ROUNDS:-5}
SECONDS_EACH=${SECONDS_EACH:-5}
RATE=${RATE:-2000}
HELD=${HELD:-4000}
METRICS=http://127.0.0.1:9990/metrics
DIR=$(mktemp -d)

# Reads numbers, says median, least and most.
summary() { sort -n | awk '{ a[NR] = $1 } END { printf "%s (%s to %s)\n", a[int((NR + 1) / 2)], a[1], a[NR] }'; }
netns() { echo "/proc/$(docker inspect -f '{{.State.Pid}}' "$1")/ns/net"; }

docker run -d --name web testbed sleep 3600 >/dev/null
nsenter --net="$(netns web)" "$BENCH" serve &
SERVER=$!
WEB=$(docker inspect -f '{{.NetworkSettings.IPAddress}}' web)
# The container answers at ten addresses more, which are the endpoints of every service: each is an endpoint of its own there.
for e in $(seq 10); do nsenter --net="$(netns web)" ip address add "172.17.200.$e/16" dev eth0; done

# 20 consumers with 50 services each. One consumer more does the work that is measured.
{
  printf '[[service]]\nname = "web"\nendpoints = ["%s:7000"]\n' "$WEB"
  for s in $(seq 1000); do
    printf '[[service]]\nname = "svc-%d"\nendpoints = [' "$s"
    for e in $(seq 10); do printf '"172.17.200.%d:7000", ' "$e"; done
    echo ']'
  done
} >"$DIR/services.toml"
docker run -d --name client -e 'BACKEND_WEB=web;7000' testbed sleep 3600 >/dev/null
for c in $(seq 20); do
  args=()
  for s in $(seq 50); do args+=(-e "BACKEND_$s=svc-$(((c - 1) * 50 + s));$((8000 + s))"); done
  docker run -d --name "many-$c" "${args[@]}" testbed sleep 3600 >/dev/null
done

"$EMBASSY" --dnat -discovery="file://$DIR/services.toml" >"$DIR/log" 2>&1 &
PID=$!
until curl -sf -o /dev/null http://127.0.0.1:9990/readyz; do sleep 0.1; done

value() { curl -s "$METRICS" | awk -v name="$1" '$1 == name { print $2 }'; }

# Becomes a client in one of the 20 consumers, which opens so many connections to its services in turn, and holds them for so
# many seconds.
hold() {
  exec nsenter --net="$(netns "many-$1")" "$BENCH" load idle "$(seq -f '172.17.0.1:%g' -s, 8001 8050)" "$2" "$3" >"$DIR/hold-$1"
}
# Ten for each route: each of its endpoints has its turn.
for c in $(seq 20); do
  (hold "$c" 500 0)
  grep -q '"failures":0,' "$DIR/hold-$c" || { echo "connections failed: $(cat "$DIR/hold-$c")"; exit 1; }
done
until [ "$(value embassy_connections_active)" = 0 ]; do sleep 0.1; done
rm "$DIR"/hold-*
HOLDING=()
for c in $(seq 20); do
  hold "$c" $((HELD / 20)) 86400 &
  HOLDING+=($!)
done
until [ "$(cat "$DIR"/hold-* 2>/dev/null | grep -c '^begin')" = 20 ]; do sleep 0.1; done
[ "$(value embassy_connections_active)" = "$HELD" ] || { echo "expected $HELD connections to be held"; exit 1; }

# Microseconds that 99 of 100 requests took at the most.
p99() {
  nsenter --net="$(netns client)" "$BENCH" load paced 172.17.0.1:7000 16 "$SECONDS_EACH" "$RATE" |
    sed -n 's/.*"failures":0,.*"p99":\([0-9]*\).*/\1/p'
}
p99 >/dev/null

dialled=$(curl -s "$METRICS" | awk '/^embassy_endpoint_connections_opened_total[{]/ && $NF > 0' | wc -l)
echo "routes: $(value embassy_routes), endpoints that were dialled: $dialled, connections held: $HELD"
echo "series: $(curl -s "$METRICS" | grep -vc '^#'), bytes: $(curl -s "$METRICS" | wc -c)"
echo "a scrape (ms): $(for _ in $(seq "$SCRAPES"); do
  curl -s -o /dev/null -w '%{time_total}\n' "$METRICS" | awk '{ printf "%.1f\n", $1 * 1000 }'
done | summary)"

for _ in $(seq "$ROUNDS"); do
  p99 >>"$DIR/without"
  while curl -s -o /dev/null "$METRICS"; do sleep 1; done &
  scraping=$!
  p99 >>"$DIR/with"
  kill "$scraping"
  wait "$scraping" || true
done
echo "99 of 100 requests, $RATE a second, took at the most (µs):"
echo "  without a scrape      $(summary <"$DIR/without")"
echo "  a scrape each second  $(summary <"$DIR/with")"

kill "${HOLDING[@]}"
kill -TERM "$PID" "$SERVER"
wait "$PID"
rm -rf "$DIR"
