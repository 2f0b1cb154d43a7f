#!/bin/sh
# Tries the image of `make dist` in a host of its own: builds it, starts it as README.md does, and serves a request, with each kind of state
# folder and user, and on the kernel path. Prints the image's size. `make dist-try` runs it with this machine's Docker, Docker 26 and podman 5.
#
#   [ENGINE=docker26] target/debug/testbed shell -- dist/try-image.sh
set -eu
cd "$(dirname "$0")/.."

say() { echo "image: $*"; }
fail() {
    echo "image: $*" >&2
    docker logs embassy >&2 || true
    exit 1
}

# No configuration of the user's.
DOCKER_CONFIG=$(mktemp -d)
export DOCKER_CONFIG
trap 'rm -rf "$DOCKER_CONFIG"' EXIT
trap 'exit 1' HUP INT TERM

# For up to 20 s.
until_true() {
    for _ in $(seq 100); do
        if "$@" >/dev/null 2>&1; then return; fi
        sleep 0.2
    done
    return 1
}

served() { [ "$(docker exec app curl -s -m 5 http://172.17.0.1/)" = web ]; }
kept() { docker exec embassy embassy status | grep -q 'ready: embassy' && docker run --rm -v "$1:/state" testbed test -e /state/table-9999; }
route_takes_it() { docker exec embassy embassy explain app 80 | grep -qE '^path +kernel'; }
logged() { docker logs embassy 2>&1 | grep -qE 'path="?kernel'; }

# try WHAT FOLDER FLAGS [ARGUMENT OF docker run]...; no flags: the image's own command
try() {
    what=$1 folder=$2 flags=$3
    shift 3
    # shellcheck disable=SC2086
    docker run -d --name embassy --net=host --pid=host --cap-drop ALL --cap-add NET_ADMIN -e DISCOVERY=docker:// \
        --group-add "$(stat -c %g /var/run/docker.sock)" -v /var/run/docker.sock:/var/run/docker.sock \
        -v "$folder:/var/lib/embassy" --stop-timeout 15 "$@" embassy $flags >/dev/null
    until_true served || fail "$what: the consumer is not served"
    until_true kept "$folder" || fail "$what: no table is kept in $folder"
    case $flags in *--path=kernel*)
        until_true route_takes_it || fail "$what: the route does not take the kernel path: $(docker exec embassy embassy explain app 80)"
        served || fail "$what: not served on the kernel path"
        until_true logged || fail "$what: no connection of the kernel path is in the log"
        [ "$(docker exec app curl -s -o /dev/null -w '%{remote_ip}' http://172.17.0.1/)" = 172.17.0.1 ] || fail "$what: not the VIP"
        ;;
    esac
    docker stop embassy >/dev/null
    [ "$(docker inspect -f '{{.State.ExitCode}}' embassy)" = 0 ] || fail "$what: exit code $(docker inspect -f '{{.State.ExitCode}}' embassy)"
    rules=$( { nft list ruleset; iptables-save; } 2>/dev/null | grep -i embassy || true)
    [ -z "$rules" ] || fail "$what: rules are left: $rules"
    docker rm embassy >/dev/null
    say "$what: served"
}

engine=$(docker version --format '{{(index .Server.Components 0).Name}} {{.Server.Version}}')
docker build --quiet --tag embassy --file Dockerfile target/dist >/dev/null
say "$engine: $(docker image inspect -f '{{.Size}}' embassy) bytes"
docker run -d --name web -e SERVICE_80_NAME=web testbed testbed peer http --name web --port 80 >/dev/null
docker run -d --name app -e 'BACKEND_WEB=web;80' testbed testbed peer idle >/dev/null

case $engine in
    # Its socket belongs to root alone.
    Podman*) ;;
    *)
        try 'its own user and command, a named volume' state-1 ''
        mkdir -p /run/embassy-state
        chown 59990:59990 /run/embassy-state
        try 'its own user, a folder of the host' /run/embassy-state ''
        ;;
esac
try 'root without capabilities but NET_ADMIN, a named volume' state-2 '' --user 0:0
case $engine in
    *' 20.'*) say 'the kernel path: not tried, this Docker does not know CAP_BPF' ;;
    Podman*) say 'the kernel path: not tried, podman has a control group namespace of its own in such a host' ;;
    *) try 'the kernel path' state-3 '--dnat --path=kernel --connection-log=all' --cap-add BPF -v /sys/fs/cgroup:/host/cgroup:ro ;;
esac
