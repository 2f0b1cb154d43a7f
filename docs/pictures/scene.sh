#!/bin/sh
# What the pictures show, inside a host of the testbed: three services, four consumers, an endpoint that fails.
set -eu
out=$1
work=$(mktemp -d)

web() { docker run -d --name "$1" --stop-signal=KILL -e "SERVICE_80_NAME=$2" testbed testbed peer http --name "$1" --port 80 >/dev/null; }
consumer() {
    name=$1
    shift
    docker run -d --name "$name" --stop-signal=KILL "$@" testbed testbed peer idle >/dev/null
}
# calls CONSUMER PORT PATH PAUSE
calls() {
    docker exec -d "$1" sh -c "while :; do curl -s -o /dev/null -m 5 http://172.17.0.1:$2/$3; sleep $4; done"
}

for n in 1 2 3; do web "catalog-$n" catalog; done
for n in 1 2; do web "orders-$n" orders; done
web media-1 media
consumer shop -e 'BACKEND_CATALOG=catalog;80' -e 'BACKEND_ORDERS=orders;8080'
consumer admin -e 'BACKEND_ORDERS=orders;80;lb=leastconn'
consumer mobile-api -e 'BACKEND_CATALOG=catalog;80' -e 'BACKEND_MEDIA=media;8081'
consumer reports -e 'BACKEND_ORDERS=orders;5432' -e 'BACKEND_STATS=statistics;9000'

embassy --dnat -discovery=docker:// --empty-hold=0 >"$work/embassy.log" 2>&1 &
embassy=$!
embassy wait catalog orders media --timeout=30s >/dev/null || true
calls shop 80 '' 0.02
calls shop 8080 '' 0.1
calls admin 80 '' 0.2
calls mobile-api 80 '' 0.05
calls mobile-api 8081 bytes/400000 0.05
calls reports 5432 bytes/20000 0.3
calls reports 9000 '' 2
# One that the registry still has, and that answers nobody.
docker pause catalog-3 >/dev/null
sleep 12

tmux -L pictures new-session -d -x 120 -y 15 -s top 'embassy top'
python3 "$out/page_to_png.py" http://127.0.0.1:9990/ mobile-api "$out/dashboard.png"
tmux -L pictures capture-pane -e -p -t top >"$work/top.txt"
tmux -L pictures kill-server
python3 "$out/terminal_to_svg.py" 'embassy top' <"$work/top.txt" >"$out/top.svg"
# The end of a host does not end what is frozen.
docker unpause catalog-3 >/dev/null
kill "$embassy"
wait "$embassy" || true
rm -rf "$work"
ls -l "$out/dashboard.png" "$out/top.svg"
