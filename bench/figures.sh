#!/usr/bin/env bash
# The figures of a release build, measured in a Docker host of its own: `make figures` runs this by `testbed shell`.
# Each is the median of ROUNDS, with the least and the most. They are figures of the machine they ran on.
set -euo pipefail

EMBASSY=${EMBASSY:-target/release/embassy}
ROUNDS=${ROUNDS:-11}
LOG=$(mktemp)
VIP=172.17.0.1
etcd3() { ETCDCTL_API=3 etcdctl --endpoints="$ETCD" "$@" >/dev/null; }
now_us() { echo $(($(date +%s%N) / 1000)); }

# Reads numbers, says median, least and most.
summary() { sort -n | awk '{ a[NR] = $1 } END { printf "%s (%s to %s)\n", a[int((NR + 1) / 2)], a[1], a[NR] }'; }

start() {
  "$EMBASSY" --dnat "$@" >>"$LOG" 2>&1 &
  PID=$!
  until curl -sf -o /dev/null http://127.0.0.1:9990/readyz; do sleep 0.02; done
}
stop() { kill -TERM "$PID" && wait "$PID"; }
rss() { awk '/VmRSS/ { print $2 }' "/proc/$PID/status"; }

address() { docker inspect -f '{{.NetworkSettings.IPAddress}}' "$1"; }
web() { docker run -d --name "$1" testbed testbed peer http --name "$1" --port 80 >/dev/null; }

echo "binary: $(stat -c %s "$EMBASSY") bytes"

web web-1
web web-2
IP1=$(address web-1) IP2=$(address web-2)

start -discovery=etcd://127.0.0.1:2379
echo "resident at start, no route: $(rss) kB"
etcd3 put /services/web/1 "$IP1:80"

# A client that is up before, so that starting it is not measured.
docker run -d --name client -e BACKEND_ETCD='/services/change;80' -e BACKEND_CONSUL='change;81;via=consul' testbed \
  sleep 3600 >/dev/null
client=$(docker inspect -f '{{.State.Pid}}' client)
stop

echo "docker run to the first byte served, against the same request sent to the endpoint itself (ms):"
start -discovery=etcd://127.0.0.1:2379
first_byte() {
  for _ in $(seq "$ROUNDS"); do
    local begin
    # The kernel's own clock, in hundredths: it is the same inside, where there is no finer one.
    read -r begin _ </proc/uptime
    docker run --rm -e BACKEND_WEB='/services/web;8080' testbed sh -c "until curl -sf -m 1 -o /dev/null $1; do :; done; cat /proc/uptime" |
      awk -v begin="$begin" '{ printf "%.0f\n", ($1 - begin) * 1000 }'
  done | summary
}
echo "  through embassy  $(first_byte "$VIP:8080")"
echo "  direct           $(first_byte "$IP1:80")"
stop

# $1: the port the client dials; $2: a command that moves the service to the other endpoint.
follow() {
  local target=web-1
  for _ in $(seq "$ROUNDS"); do
    target=$([ "$target" = web-1 ] && echo web-2 || echo web-1)
    nsenter --net="/proc/$client/ns/net" bash -c "until [ \"\$(curl -s -m 1 $VIP:$1)\" = $target ]; do :; done; date +%s%N" >"$LOG.client" &
    local asking=$!
    sleep 0.3
    local begin
    begin=$(now_us)
    "$2" "$([ "$target" = web-1 ] && echo "$IP1" || echo "$IP2")"
    wait "$asking"
    awk -v begin="$begin" '{ printf "%.0f\n", ($1 / 1000 - begin) / 1000 }' "$LOG.client"
  done | summary
}
by_v3() { etcd3 put /services/change/1 "$1:80"; }
by_v2() { curl -sf -o /dev/null -X PUT "$ETCD/v2/keys/services/change/1" -d value="$1:80"; }
by_consul() {
  curl -sf -o /dev/null -X PUT "$CONSUL/v1/agent/service/register" \
    -d "{\"ID\":\"change-1\",\"Name\":\"change\",\"Address\":\"$1\",\"Port\":80}"
}
echo "a change to the first connection that follows it, the writing included (ms):"
by_v3 "$IP1"
start -discovery=etcd3://127.0.0.1:2379
echo "  etcd v3  $(follow 80 by_v3)"
stop
by_v2 "$IP1"
start -discovery=etcd2://127.0.0.1:2379
echo "  etcd v2  $(follow 80 by_v2)"
stop
by_consul "$IP1"
start -discovery=etcd://127.0.0.1:2379 -discovery=consul://127.0.0.1:8500
echo "  Consul   $(follow 81 by_consul)"
stop

# 20 consumers with 50 bindings each.
{ for s in $(seq 50); do printf '[[service]]\nname = "svc-%d"\nendpoints = ["%s:80", "%s:80"]\n' "$s" "$IP1" "$IP2"; done; } >"$LOG.toml"
for c in $(seq 20); do
  args=()
  for s in $(seq 50); do args+=(-e "BACKEND_$s=svc-$s;$((8000 + s))"); done
  docker run -d --name "many-$c" "${args[@]}" testbed sleep 3600 >/dev/null
done
start -discovery="file://$LOG.toml"
echo "resident with $(curl -s http://127.0.0.1:9990/metrics | awk '/^embassy_routes / { print $2 }') routes: $(rss) kB"
stop
rm -f "$LOG" "$LOG".*
