#!/bin/sh
# The first minute of a user who has only the Debian package: installs it in a fresh root of Debian, starts embassy without systemd, asks
# doctor, and serves a request. Prints how long that took, for each release in RELEASES. The package is that of `make dist`.
#
#   RELEASES="bullseye bookworm trixie sid musl" dist/try.sh
#
# musl is no Debian: a root with busybox and musl's C library alone, as Alpine has them, in which the plain binary runs.
set -eu
cd "$(dirname "$0")/.."
export LC_ALL=C

cache=${TESTBED_CACHE:-$PWD/.testbed/cache}/roots
package=$(find target/dist -name 'embassy_*.deb' | head -n 1)

say() { echo "try: $*"; }
fail() { echo "try: $*" >&2; exit 1; }

[ "$(id -u)" = 0 ] || fail 'run this as root: it makes namespaces'
[ -n "$package" ] || fail 'no package in target/dist: make dist'
command -v debootstrap >/dev/null || fail 'debootstrap is missing, of the package debootstrap (makes the roots)'

work=
clean_up() {
    [ -z "$work" ] || { umount "$work/root" "$work/upper" 2>/dev/null || true; rm -rf "$work"; }
}
trap clean_up EXIT
trap 'exit 1' HUP INT TERM

# The mirror that this machine's apt uses for Debian itself.
mirror() {
    apt-get indextargets --format '$(SITE) $(LABEL)' 'Created-By: Packages' 'Component: main' |
        awk '$2 == "Debian" { print $1; exit }'
}

# fresh RELEASE: its root, once for all tries
fresh() {
    [ -d "$cache/$1" ] && return
    mkdir -p "$cache"
    say "fetching $1 into $cache"
    debootstrap --variant=minbase "$1" "$cache/$1.new" "$(mirror)" >"$cache/$1.log" 2>&1 || fail "debootstrap $1: see $cache/$1.log"
    mv -T "$cache/$1.new" "$cache/$1"
}

# musl: its root. Both come from Debian.
fresh_musl() {
    [ -d "$cache/musl" ] && return
    mkdir -p "$cache/musl.packages"
    say "fetching musl into $cache"
    (cd "$cache/musl.packages" && apt-get download musl busybox-static >"$cache/musl.log" 2>&1) || fail "apt-get download: see $cache/musl.log"
    rm -rf "$cache/musl.new"
    for file in "$cache/musl.packages"/*.deb; do dpkg-deb --extract "$file" "$cache/musl.new"; done
    rm -r "$cache/musl.packages"
    mkdir -p "$cache/musl.new/proc" "$cache/musl.new/tmp" "$cache/musl.new/etc" "$cache/musl.new/usr/bin" "$cache/musl.new/dev"
    mknod -m 666 "$cache/musl.new/dev/null" c 1 3
    for program in sh cat httpd mount wget; do ln -s busybox "$cache/musl.new/bin/$program"; done
    mv -T "$cache/musl.new" "$cache/musl"
}

# What runs inside where there is no dpkg: the plain binary.
plain_binary=$(cat <<'SCRIPT'
set -eu
mount -t proc proc /proc
for place in /lib/*-linux-gnu /usr/lib/*-linux-gnu /lib64; do
    [ ! -e "$place" ] || { echo "there is another C library: $place"; exit 1; }
done
busybox mkdir /www
echo hello >/www/index.html
httpd -p 127.0.0.1:8080 -h /www
printf '[[service]]\nname = "web"\nendpoints = ["127.0.0.1:8080"]\n' >/etc/embassy.toml
embassy --redirect -provider=static -services="web;80" -discovery=file:///etc/embassy.toml --proxy-ip=172.17.0.1 >/embassy.log 2>&1 &
embassy=$!
embassy wait web --timeout=30s >/dev/null || { cat /embassy.log; exit 1; }
[ "$(wget -qO- http://172.17.0.1/)" = hello ] || { cat /embassy.log; exit 1; }
kill "$embassy"
wait "$embassy" || { echo "embassy did not end well: $?"; exit 1; }
echo "served by the plain binary, without glibc"
SCRIPT
)

# What runs inside: as root of a root of its own, in namespaces of its own. Time is counted from the first command of the user.
first_minute=$(cat <<'SCRIPT'
set -eu
mount -t proc proc /proc
# What the root has, except what dpkg and the programs that make users write for themselves.
files() {
    find / -xdev \( -path /proc -o -path /sys -o -path /tmp \) -prune -o -print |
        grep -vE '^/(package.deb|embassy.log|purged.log|etc/(passwd|group|shadow|gshadow|subuid|subgid)-)$|^/var/(lib/dpkg|log|cache)/' | sort
}
before=$(files)
begun=$(date +%s%N)
dpkg --install /package.deb >/dev/null
printf '[[service]]\nname = "web"\nendpoints = ["127.0.0.1:8080"]\n' >/etc/embassy.toml
perl -MIO::Socket::INET -e '
    $listener = IO::Socket::INET->new(LocalAddr => "127.0.0.1:8080", Listen => 5, ReuseAddr => 1) or die;
    while ($client = $listener->accept) { print $client "hello\n"; close $client }' &
served=$!
embassy --redirect -provider=static -services="web;80" -discovery=file:///etc/embassy.toml --proxy-ip=172.17.0.1 >/embassy.log 2>&1 &
embassy=$!
embassy wait web --timeout=30s >/dev/null || { cat /embassy.log; exit 1; }
answer=$(perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new("172.17.0.1:80") or die "$@"; print <$s>')
ended=$(date +%s%N)
[ "$answer" = hello ] || { echo "the answer was: $answer"; cat /embassy.log; exit 1; }
embassy doctor --redirect -provider=static -services="web;80" -discovery=file:///etc/embassy.toml --proxy-ip=172.17.0.1 || {
    echo 'doctor finds something wrong'; exit 1; }
kill "$embassy" "$served"
wait "$embassy" || { echo "embassy did not end well: $?"; exit 1; }
getent passwd embassy >/dev/null || { echo 'no user'; exit 1; }
[ -e /var/lib/embassy ] || { echo 'it kept no state'; exit 1; }
dpkg --purge embassy >/purged.log 2>&1 || { cat /purged.log; exit 1; }
# The file with the services is the one that the user wrote.
after=$(files | grep -v '^/etc/embassy.toml$')
[ "$before" = "$after" ] || {
    echo 'purge left, or took away:'
    echo "$before" >/tmp/before
    echo "$after" | diff /tmp/before - || true
    exit 1
}
! getent passwd embassy >/dev/null || { echo 'purge left the user'; exit 1; }
echo "installed and served in $(( (ended - begun) / 1000000 )) ms"
SCRIPT
)

# try RELEASE
try() {
    inside=$first_minute
    case $1 in
        musl) inside=$plain_binary; fresh_musl ;;
        *) fresh "$1" ;;
    esac
    work=$(mktemp -d)
    mkdir "$work/upper" "$work/root"
    mount -t tmpfs tmpfs "$work/upper"
    mkdir "$work/upper/u" "$work/upper/w"
    mount -t overlay -o "lowerdir=$cache/$1,upperdir=$work/upper/u,workdir=$work/upper/w" overlay "$work/root"
    case $1 in
        musl) install -m755 target/dist/embassy "$work/root/usr/bin/embassy" ;;
        *) cp "$package" "$work/root/package.deb" ;;
    esac
    # Such a root has no program that makes interfaces: this machine's makes them, before the root is entered.
    said=$(unshare --net --mount --pid --fork --kill-child sh -c '
        root=$1; script=$2
        ip link set lo up
        ip link add docker0 type bridge
        ip addr add 172.17.0.1/16 dev docker0
        ip link set docker0 up
        ip link add eth0 type veth peer name eth0-peer
        ip addr add 192.0.2.2/24 dev eth0
        ip link set eth0 up
        exec chroot "$root" sh -c "$script"' sh "$work/root" "$inside" 2>&1) || {
        echo "$said"
        fail "$1: see above"
    }
    say "$1: $(echo "$said" | tail -n 1)"
    umount "$work/root" "$work/upper"
    rm -rf "$work"
    work=
}

for release in ${RELEASES:-bullseye bookworm trixie sid musl}; do try "$release"; done
