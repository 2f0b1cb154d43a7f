#!/bin/sh
# Installs what the testbed needs, and says what and why. Does nothing where nothing is missing.
#
#   testbed/setup.sh [build]      build: only what builds a release
set -eu
export LC_ALL=C

repository=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
cache=${TESTBED_CACHE:-$repository/.testbed/cache}
missing=
work=
only=${1-}

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }
has() { command -v "$1" >/dev/null 2>&1; }

# need PROGRAM PACKAGE REASON
need() {
    has "$1" || has "/usr/sbin/$1" && return
    say "missing: $1 ($3), of the package $2"
    missing="$missing $2"
}

# need_python MODULE REASON
need_python() {
    package=python3-$(echo "$1" | tr _ -)
    [ -x /usr/bin/python3 ] && /usr/bin/python3 -c "import $1" 2>/dev/null && return
    say "missing: $1 ($2), of the package $package"
    missing="$missing $package"
}

look() {
    look_for_build
    [ "$only" = build ] || look_for_tests
}

look_for_build() {
    need cc 'gcc libc6-dev' 'links Rust programs'
    need strip binutils 'takes what is for debuggers out of a release'
    need protoc protobuf-compiler 'builds the etcd v3 client'
    need clang clang 'compiles the programs of the kernel path'
    if ! [ -e /usr/include/bpf/bpf_helpers.h ]; then
        say 'missing: bpf/bpf_helpers.h (compiles the programs of the kernel path), of the package libbpf-dev'
        missing="$missing libbpf-dev"
    fi
    if ! [ -e /usr/include/google/protobuf/descriptor.proto ] && ! [ -e /usr/local/include/google/protobuf/descriptor.proto ]; then
        say 'missing: google/protobuf/descriptor.proto (builds the etcd v3 client), of the package libprotobuf-dev'
        missing="$missing libprotobuf-dev"
    fi
    need setcap libcap2-bin 'gives programs in an image a capability'
}

look_for_tests() {
    need dockerd docker.io 'the Docker engine of a host'
    need docker docker.io 'its command line'
    need docker-compose docker-compose 'runs the example for compose'
    need etcd etcd-server 'service discovery, v2 and v3'
    need etcdctl etcd-client 'writes to etcd v3'
    need openssl openssl 'certificates that the tests make'
    need iptables iptables 'the firewall that Docker uses'
    need nft nftables 'the firewall that we use'
    need busybox busybox-static 'what container images are made of'
    need ip iproute2 'network interfaces of a host'
    need conntrack conntrack 'connection tracking, as tests look at it'
    need curl curl 'HTTP requests inside a host'
    need promtool prometheus 'checks that the metrics are valid'
    need chromium chromium 'shows the dashboard in tests'
    need haproxy haproxy 'an endpoint that takes the PROXY protocol'
    need nginx nginx-light 'another one'
    need chromedriver chromium-driver 'clicks and types in it'
    need python3 python3 'runs the two checkers that follow'
    need_python prometheus_client 'reads a scrape as OpenMetrics'
    need_python jsonschema 'compares the answers of the API with its description'
    need dnsmasq dnsmasq-base 'service discovery by DNS'
    need dig bind9-dnsutils 'asks a DNS server by UDP'
    need faketime faketime 'shows one process a clock that jumps'
    need strace strace 'makes the disk slow for one process'
    need systemctl systemd 'runs the unit, in namespaces of its own'
    need sysctl procps 'kernel settings inside a host'
    need debootstrap debootstrap 'fetches other engines (make engines)'
    need nsenter util-linux 'enters the namespaces of a host'
    # Both are busybox, but only a static one runs in an image.
    if has busybox && ! ldd "$(command -v busybox)" 2>&1 | grep -q 'not a dynamic'; then
        say 'missing: a static busybox (what container images are made of), of the package busybox-static'
        missing="$missing busybox-static"
    fi
}

clean_up() {
    [ -z "$work" ] || rm -rf "$work"
    [ -z "${guard-}" ] || rm -f "$guard"
}
trap clean_up EXIT
trap 'exit 1' HUP INT TERM

install_packages() {
    [ "$(id -u)" = 0 ] || fail "to install$missing, run this as root"
    # A package's own service would start a dockerd and an etcd on the machine itself: what tests use are private ones.
    if [ ! -e /usr/sbin/policy-rc.d ]; then
        guard=/usr/sbin/policy-rc.d
        printf '#!/bin/sh\nexit 101\n' >"$guard"
        chmod 755 "$guard"
    else
        say 'this machine has a policy-rc.d of its own, which decides whether installed services start'
    fi
    # Word splitting is meant: a list of packages.
    # shellcheck disable=SC2086
    set -- $missing
    say "installing from Debian: $*"
    [ "$only" = build ] ||
        say 'their services are not started now; if they should not start at boot either: systemctl disable docker etcd haproxy nginx'
    apt-get update -q
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$@"
    [ -z "${guard-}" ] || rm -f "$guard"
    guard=
}

# The address of the mirror that this machine's apt uses for Debian itself, of either format of its sources.
mirror() {
    {
        cat /etc/apt/sources.list.d/*.sources 2>/dev/null | awk '
            function done() { if (main && uri != "" && !off) print uri; uri = ""; main = 0; off = 0 }
            /^[ \t]*$/ { done() }
            tolower($1) == "uris:" { uri = $2 }
            tolower($1) == "enabled:" && tolower($2) == "no" { off = 1 }
            tolower($1) == "components:" { for (i = 2; i <= NF; i++) if ($i == "main") main = 1 }
            END { done() }'
        cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null | awk '
            $1 == "deb" { at = 2; if ($2 ~ /^\[/) { while ($at !~ /\]$/ && at < NF) at++; at++ }
                for (i = at + 2; i <= NF; i++) if ($i == "main") { print $at; next } }'
    } | grep '/debian/*$' | head -n 1 | sed 's|/*$||'
}

# Debian 12 has no Consul; Debian 11 has 1.8.7. Only this one package is fetched, and unpacked into the cache: apt's own
# configuration stays as it is.
fetch_consul() {
    if has consul || [ -n "${CONSUL_BIN-}" ]; then
        return
    fi
    if [ -x "$cache/consul/usr/bin/consul" ]; then
        return
    fi
    from=$(mirror)
    [ -n "$from" ] || fail "no Debian mirror in apt's sources, to fetch Consul from; or put a consul on PATH"
    architecture=$(dpkg --print-architecture)
    say "missing: consul (service discovery): fetching Debian 11's package from $from into $cache/consul"
    mkdir -p "$cache"
    work=$(mktemp -d "$cache/consul-XXXXXX")
    index=$from/dists/bullseye/main/binary-$architecture/Packages.gz
    curl -fsSL --retry 3 -o "$work/Packages.gz" "$index" || fail "cannot fetch $index"
    # The fields of one package: file and checksum.
    entry=$(gzip -dc "$work/Packages.gz" | awk '
        /^Package: / { ours = $2 == "consul" }
        ours && /^Filename: / { file = $2 }
        ours && /^SHA256: / { sum = $2 }
        END { print file, sum }')
    file=${entry% *}
    sum=${entry#* }
    [ -n "$file" ] && [ -n "$sum" ] || fail "$index has no package consul"
    curl -fsSL --retry 3 -o "$work/consul.deb" "$from/$file" || fail "cannot fetch $from/$file"
    echo "$sum  $work/consul.deb" | sha256sum --check --quiet || fail "$from/$file is not what the index promises"
    dpkg-deb -x "$work/consul.deb" "$work/root"
    # One rename: an interrupted run leaves no half of it, and a second run at the same time does no harm.
    mv -T "$work/root" "$cache/consul" 2>/dev/null || [ -x "$cache/consul/usr/bin/consul" ] || fail "cannot make $cache/consul"
    rm -rf "$work"
    work=
    say "consul: $("$cache/consul/usr/bin/consul" version | head -n 1)"
}

case $only in
    '' | build) ;;
    *) fail "$only: expected nothing, or build" ;;
esac
look
if [ -n "$missing" ]; then
    has apt-get || fail "this is no Debian: install what is missing with your own tools, and run this again"
    install_packages
    missing=
    look
    [ -z "$missing" ] || fail "still missing:$missing"
fi
if [ "$only" != build ]; then
    has dpkg-deb || has consul || fail 'missing: consul (service discovery); put it on PATH'
    fetch_consul
    has cargo-nextest || say 'cargo-nextest is not here: tests run by plain cargo test'
fi
say 'all is there'
