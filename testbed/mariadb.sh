#!/bin/bash
# A real MariaDB with max_connect_errors=10, checked by embassy with check=tcp, and again with proxy=v2: no probe is counted as an
# aborted connection, and the host is never blocked. First it shows that ordinary probes do block the host.
#
#   testbed/mariadb.sh [PROGRAM] [SECONDS]      as root; needs mariadb-server-core, mariadb-client-core, iproute2, iptables
set -euo pipefail
program=$(realpath "${1:-target/debug/embassy}")
seconds=${2:-30}
if [ -z "${INSIDE:-}" ]; then
    exec env INSIDE=1 unshare --net --mount --pid --fork --kill-child --mount-proc -- "$0" "$program" "$seconds"
fi
mount -t tmpfs none /run
printf '127.0.0.1 localhost\n172.17.0.1 gateway\n' > /run/hosts
mount --bind /run/hosts /etc/hosts
ip link set lo up
ip link add docker0 type bridge
ip addr add 172.17.0.1/16 dev docker0
ip link set docker0 up
ip netns add server
ip link add server type veth peer name eth0 netns server
ip link set server master docker0 up
ip -n server link set lo up
ip -n server addr add 172.17.0.2/16 dev eth0
ip -n server link set eth0 up

mkdir -m 777 /run/db /run/sock
as_nobody() { setpriv --reuid=65534 --regid=65534 --clear-groups "$@"; }
as_nobody mariadb-install-db --no-defaults --datadir=/run/db --auth-root-authentication-method=normal > /run/install.log 2>&1
ip netns exec server setpriv --reuid=65534 --regid=65534 --clear-groups mariadbd --no-defaults --datadir=/run/db \
    --socket=/run/sock/s --bind-address=0.0.0.0 --max-connect-errors=10 --proxy-protocol-networks=172.17.0.1 \
    --pid-file=/run/sock/pid 2> /run/sock/log &
root() { mariadb --no-defaults -u root -S /run/sock/s -N "$@"; }
for _ in $(seq 300); do root -e 'select 1' > /dev/null 2>&1 && break; sleep 0.1; done
root -e "create user app@'%'; flush status"
aborted() { root -e "show global status like 'Aborted_connects%'" | tr '\n' ' '; }
ask() { mariadb --no-defaults --ssl=0 -u app -h 172.17.0.1 -P "$1" -N -e 'select user()' 2>&1; }

echo "== twelve ordinary probes"
for _ in $(seq 12); do (exec 3<>/dev/tcp/172.17.0.2/3306) || true; sleep 0.05; done
aborted; echo
mariadb --no-defaults --ssl=0 -u app -h 172.17.0.2 -N -e 'select user()' 2>&1 || true
root -e 'flush hosts; flush status'

printf '[[service]]\nname = "db"\nendpoints = ["172.17.0.2:3306"]\n' > /run/services.toml
"$program" --redirect -provider=static -services='db;3306;check=tcp,db;3307;check=tcp;proxy=v2' -interface=docker0 \
    -discovery=file:///run/services.toml --proxy-ip=172.17.0.1 --admin=off --state-dir=off 2> /run/embassy.log &
embassy=$!
for _ in $(seq 100); do grep -q "embassy is ready" /run/embassy.log && break; sleep 0.1; done
echo "== $seconds s of embassy's probes"
probes() { nstat -asz TcpActiveOpens 2>/dev/null | awk '/TcpActiveOpens/ {print $2}'; }
before=$(probes)
sleep "$seconds"
echo "opened by this host meanwhile: $(($(probes) - before))"
aborted; echo
echo "check=tcp: $(ask 3306)"
echo "check=tcp;proxy=v2: $(ask 3307)"
aborted; echo
grep -E "WARN|ERROR|check" /run/embassy.log || true
kill "$embassy"
wait "$embassy" || true
root -e shutdown
