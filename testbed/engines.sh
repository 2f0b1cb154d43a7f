#!/bin/sh
# Fetches engines into the cache, for tests with ENGINE=<name>. Each comes as Debian packages from the mirror of this machine's apt, checked
# as debootstrap and apt check them, into a folder of its own: nothing is installed on the machine. Does nothing for what is there.
#
#   testbed/engines.sh [docker20|docker26|docker28|podman4|podman5]...
#
# An engine that cannot be fetched is said, and is no failure, except if none of those that were asked for is there (exit code 3). A name
# that is no engine's is said first, and is exit code 2 after the others are fetched.
set -eu
export LC_ALL=C

repository=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
cache=${TESTBED_CACHE:-$repository/.testbed/cache}/engines
all='docker20 docker26 docker28 podman4 podman5'

say() { echo "engines: $*"; }
fail() { echo "engines: $*" >&2; exit 1; }

# suite ENGINE: the release of Debian that has it; fails if there is no such engine
suite() {
    case $1 in
        docker20 | podman4) echo bookworm ;;
        docker26) echo trixie ;;
        docker28 | podman5) echo sid ;;
        *) return 1 ;;
    esac
}

# The mirror that this machine's apt uses for Debian itself.
mirror() {
    apt-get indextargets --format '$(SITE) $(LABEL)' 'Created-By: Packages' 'Component: main' |
        awk '$2 == "Debian" { print $1; exit }'
}

# Unpacked into a folder that becomes the right one by one rename: an interrupted run leaves no half of it.
fetch() {
    from=$(mirror)
    [ -n "$from" ] || { say "no Debian mirror in apt's sources"; return 1; }
    say "fetching Debian packages of $1 from $from into $cache/$1"
    packages=docker.io,podman,netavark,aardvark-dns,runc,catatonit,nftables,iptables,ca-certificates,iproute2,procps,kmod
    rm -rf "$cache/$1.new"
    timeout 300 debootstrap --variant=minbase --include="$packages" "$1" "$cache/$1.new" "$from" >"$cache/$1.log" 2>&1 || {
        say "$1 cannot be fetched: see $cache/$1.log"
        return 1
    }
    rm -rf "$cache/$1.new"/var/cache/apt/archives/*.deb
    mv -T "$cache/$1.new" "$cache/$1"
}

version() {
    case $1 in
        docker*) chroot "$cache/$1" dpkg-query --show docker.io ;;
        podman*) chroot "$cache/$1" dpkg-query --show podman netavark ;;
    esac
}

# fits ENGINE: whether it is the version that its name says. An unstable release has whatever is new that day.
fits() {
    case $1 in
        docker*) package=docker.io ;;
        podman*) package=podman ;;
    esac
    found=$(chroot "$cache/$(suite "$1")" dpkg-query --show --showformat '${source:Upstream-Version}' "$package")
    [ "${found%%.*}" = "${1#"${1%%[0-9]*}"}" ]
}

wrong=
for engine in ${*:-$all}; do
    suite "$engine" >/dev/null || wrong="$wrong $engine"
done
[ -z "$wrong" ] || say "no such engine:$wrong; expected some of: $all" >&2
[ "$(id -u)" = 0 ] || fail 'run this as root: it makes roots of Debian'
mkdir -p "$cache"
# Two runs at the same time: one fetches, the other waits.
exec 9>"$cache/gate"
flock 9
there=0
for engine in ${*:-$all}; do
    suite=$(suite "$engine") || continue
    if [ ! -d "$cache/$suite" ] && { ! command -v debootstrap >/dev/null || ! fetch "$suite"; }; then
        say "$engine: NOT THERE (package debootstrap and a Debian mirror are needed)"
        continue
    fi
    if ! fits "$engine"; then
        say "$engine: NOT THERE ($suite has ${found:-no such package})"
        rm -f "$cache/$engine"
        continue
    fi
    ln -sfnT "$suite" "$cache/$engine"
    say "$engine: $(version "$engine")"
    there=$((there + 1))
done
[ -z "$wrong" ] || exit 2
[ "$there" -gt 0 ] || { say 'no engine is there' >&2; exit 3; }
