#!/bin/bash
# Connections to a server that still has embassy's ports in TIME_WAIT, from masqueraded connections: a direct run, and right after
# it one through embassy. Prints wrk's figures of both; "Socket errors" is what failed.
#
#   bench/time_wait.sh [PROGRAM] [SECONDS]      as root; needs nginx, wrk, iproute2, iptables. All of it is in namespaces of its own.
set -euo pipefail
program=$(realpath "${1:-target/release/embassy}")
seconds=${2:-5}
if [ -z "${INSIDE:-}" ]; then
    exec env INSIDE=1 unshare --net --mount --pid --fork --kill-child --mount-proc -- "$0" "$program" "$seconds"
fi
mount -t tmpfs none /run
mkdir /run/nginx
ip link set lo up
ip link add docker0 type bridge
ip link add clients type bridge
ip addr add 172.17.0.1/16 dev docker0
ip addr add 10.50.0.1/24 dev clients
ip link set docker0 up
ip link set clients up
container() { # name, bridge, address, gateway
    ip netns add "$1"
    ip link add "$1" type veth peer name eth0 netns "$1"
    ip link set "$1" master "$2" up
    ip -n "$1" link set lo up
    ip -n "$1" addr add "$3" dev eth0
    ip -n "$1" link set eth0 up
    ip -n "$1" route add default via "$4"
}
container server docker0 172.17.0.2/16 172.17.0.1
container client clients 10.50.0.2/24 10.50.0.1
sysctl -qw net.ipv4.ip_forward=1
# Few source ports, the same for both: most of embassy's are in TIME_WAIT at the server.
sysctl -qw net.ipv4.ip_local_port_range="40000 43999"
ip netns exec client sysctl -qw net.ipv4.ip_local_port_range="40000 43999"
iptables -t nat -A POSTROUTING -s 10.50.0.0/24 -o docker0 -j MASQUERADE

cat > /run/nginx/conf <<END
daemon off; pid /run/nginx/pid; error_log /run/nginx/log;
events { worker_connections 8192; }
http {
    access_log off; client_body_temp_path /run/nginx/a; proxy_temp_path /run/nginx/b; fastcgi_temp_path /run/nginx/c;
    uwsgi_temp_path /run/nginx/d; scgi_temp_path /run/nginx/e;
    server { listen 80 backlog=4096; location / { return 200 "ok\n"; } }
}
END
ip netns exec server nginx -c /run/nginx/conf &
printf '[[service]]\nname = "web"\nendpoints = ["172.17.0.2:80"]\n' > /run/services.toml
"$program" --redirect -provider=static -services='web;80' -interface=docker0 -discovery=file:///run/services.toml \
    --proxy-ip=172.17.0.1 --admin=unix:///run/admin --state-dir=off --drain=1s 2> /run/embassy.log &
embassy=$!
for _ in $(seq 100); do grep -q "embassy is ready" /run/embassy.log && break; sleep 0.1; done
load() { wrk -t1 -c50 -d"${seconds}s" --timeout 10s -H 'Connection: close' "$@"; }
echo "== direct, masqueraded"
ip netns exec client wrk -t1 -c50 -d"${seconds}s" --timeout 10s -H 'Connection: close' http://172.17.0.2/ | grep -E "requests in|Socket|Non-2xx" || true
echo "== in TIME_WAIT at the server: $(ip netns exec server ss -Htan state time-wait | wc -l)"
echo "== through embassy"
load http://172.17.0.1/ | grep -E "requests in|Socket|Non-2xx" || true
curl -s --unix-socket /run/admin http://localhost/metrics | grep -E '^embassy_(connections_total\{.*\} [1-9]|connect_failures|endpoint_ejections_total|connection_retries)' || true
grep -vE " INFO " /run/embassy.log || true
kill "$embassy"
wait "$embassy" || true
