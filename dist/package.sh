#!/bin/sh
# Makes everything that a release consists of, in target/dist: a static binary, manual pages, completions, a tarball, a Debian package, the
# root of the image, a list of what is in it (SBOM) if cargo-cyclonedx is installed, and checksums. Needs no network if the crates are there.
#
#   TARGET=aarch64-unknown-linux-gnu dist/package.sh      for another processor; says what is missing for it
set -eu
cd "$(dirname "$0")/.."

say() { echo "dist: $*"; }
fail() { echo "dist: $*" >&2; exit 1; }
has() { command -v "$1" >/dev/null 2>&1; }

host=$(rustc -vV | sed -n 's/^host: //p')
target=${TARGET:-$host}
processor=${target%%-*}
case $target in
    x86_64-*-linux-gnu) architecture=amd64 ;;
    aarch64-*-linux-gnu) architecture=arm64 ;;
    *) fail "no Debian architecture is known for $target" ;;
esac
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
out=target/dist
name=embassy-$version-linux-$architecture
# The same sources make the same files: nothing bears the time of the build.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}
export SOURCE_DATE_EPOCH

look() {
    has clang || fail 'clang is missing, of the package clang (compiles the programs of the kernel path, with libbpf-dev)'
    has protoc || fail 'protoc is missing, of the package protobuf-compiler (builds the etcd client)'
    [ -d "$(rustc --print sysroot)/lib/rustlib/$target/lib" ] \
        || fail "this Rust has no library for $target: rustup target add $target"
    if [ "$target" != "$host" ]; then
        cross=$processor-linux-gnu-gcc
        has "$cross" || fail "$cross is missing, of the package gcc-$processor-linux-gnu (links for $target)"
        [ -e "/usr/$processor-linux-gnu/lib/libc.a" ] \
            || fail "/usr/$processor-linux-gnu/lib/libc.a is missing, of the package libc6-dev-$architecture-cross (the C library for $target)"
        for emulator in "qemu-$processor-static" "qemu-$processor" ''; do ! has "$emulator" || break; done
        [ -n "$emulator" ] || fail "qemu-$processor is missing, of the package qemu-user-static (runs the binary, which writes its manual pages)"
        variable=$(echo "$target" | tr 'a-z-' 'A-Z_')
        STRIP=$processor-linux-gnu-strip
        export "CARGO_TARGET_${variable}_LINKER=$cross" "CC_$(echo "$target" | tr - _)=$cross"
    fi
}

# The C library and all others are inside: the binary runs on any Linux of this processor, also on Alpine and in an empty image.
build() {
    RUSTFLAGS='-C target-feature=+crt-static' cargo build --release --bin embassy --target "$target"
    rm -rf "$out"
    mkdir -p "$out/man" "$out/completions"
    cp "target/$target/release/embassy" dist/embassy.service dist/embassy.default "$out/"
    if readelf -d "$out/embassy" | grep -q NEEDED; then
        fail "the binary is not static: $(readelf -d "$out/embassy" | grep NEEDED)"
    fi
    # Symbols are for those who build it; a panic names file and line without them.
    "${STRIP:-strip}" "$out/embassy"
    say "binary: $(stat -c %s "$out/embassy") bytes, static"
}

# What describes the command line is written by the binary itself.
describe() {
    embassy() { ${emulator-} "$out/embassy" "$@"; }
    embassy man >"$out/man/embassy.1"
    for command in $(embassy --help | sed -n '/^Commands:/,/^$/s/^  \([a-z][a-z]*\) .*/\1/p'); do
        embassy man "$command" >"$out/man/embassy-$command.1"
    done
    embassy completions bash >"$out/completions/embassy.bash"
    embassy completions zsh >"$out/completions/_embassy"
    embassy completions fish >"$out/completions/embassy.fish"
}

# Everything under one name, with owners and times that depend on nothing.
archive() {
    tar --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$SOURCE_DATE_EPOCH" "$@"
}

# documents FOLDER: README.md and all that it links to, at the same places, so that the links lead somewhere.
documents() {
    for file in *.md dist/embassy.service dist/compose.yaml testbed/README.md $(find docs -type f ! -name '*.sh' ! -name '*.py'); do
        install -Dm644 "$file" "$1/$file"
    done
}

tarball() {
    root=$(mktemp -d)
    mkdir "$root/$name"
    cp -r "$out/embassy" "$out/embassy.service" "$out/embassy.default" "$out/man" "$out/completions" LICENSE "$root/$name/"
    documents "$root/$name"
    archive -C "$root" -czf "$out/$name.tar.gz" "$name"
    rm -rf "$root"
    say "tarball: $out/$name.tar.gz"
}

debian() {
    has dpkg-deb || { say 'no Debian package: dpkg-deb is missing'; return; }
    root=$(mktemp -d)
    install -Dm755 "$out/embassy" "$root/usr/bin/embassy"
    install -Dm644 "$out/embassy.service" "$root/usr/lib/systemd/system/embassy.service"
    install -Dm644 "$out/embassy.default" "$root/etc/default/embassy"
    for page in "$out"/man/*.1; do
        install -Dm644 "$page" "$root/usr/share/man/man1/${page##*/}"
        gzip -9n "$root/usr/share/man/man1/${page##*/}"
    done
    install -Dm644 "$out/completions/embassy.bash" "$root/usr/share/bash-completion/completions/embassy"
    install -Dm644 "$out/completions/_embassy" "$root/usr/share/zsh/vendor-completions/_embassy"
    install -Dm644 "$out/completions/embassy.fish" "$root/usr/share/fish/vendor_completions.d/embassy.fish"
    install -Dm644 dist/debian/lintian-overrides "$root/usr/share/lintian/overrides/embassy"
    documents=$root/usr/share/doc/embassy
    install -Dm644 dist/debian/copyright "$documents/copyright"
    printf 'embassy (%s) unstable; urgency=medium\n\n  * CHANGELOG.md has what changed.\n\n -- %s  %s\n' "$version" \
        "$(sed -n 's/^Maintainer: //p' dist/debian/control)" "$(date -Rud "@$SOURCE_DATE_EPOCH")" >"$documents/changelog"
    gzip -9n "$documents/changelog"
    documents "$documents"
    mkdir "$root/DEBIAN"
    sed -e "s/@VERSION@/$version/" -e "s/@ARCHITECTURE@/$architecture/" \
        -e "s/@SIZE@/$(du -sk "$root/usr" | cut -f1)/" dist/debian/control >"$root/DEBIAN/control"
    echo /etc/default/embassy >"$root/DEBIAN/conffiles"
    for script in postinst prerm postrm; do install -m755 "dist/debian/$script" "$root/DEBIAN/"; done
    (cd "$root" && find usr etc -type f -print0 | sort -z | xargs -0 md5sum >DEBIAN/md5sums)
    chmod 644 "$root/DEBIAN/md5sums" "$root/DEBIAN/conffiles" "$root/DEBIAN/control"
    find "$root" -type d -exec chmod 755 {} +
    package=$out/embassy_${version}_$architecture.deb
    dpkg-deb --root-owner-group -Zxz --build "$root" "$package" >/dev/null
    rm -rf "$root"
    say "Debian package: $package"
}

# The whole file system of the image. Its files are packed with their capabilities, which only root may set.
image() {
    root=$(mktemp -d)
    install -Dm755 "$out/embassy" "$root/usr/bin/embassy"
    # To check registries that have a certificate of a public CA. A private CA is mounted.
    if [ -e /etc/ssl/certs/ca-certificates.crt ]; then
        install -Dm644 /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
    else
        say 'image: without public CA certificates, because this machine has none (package ca-certificates)'
    fi
    install -d "$root/etc" "$root/tmp" "$root/run" "$root/var/lib/embassy"
    echo 'embassy:x:59990:59990::/var/lib/embassy:/sbin/nologin' >"$root/etc/passwd"
    echo 'embassy:x:59990:' >"$root/etc/group"
    chmod 1777 "$root/tmp"
    if [ "$(id -u)" = 0 ] && has setcap; then
        # Root without capabilities may write what belongs to its group.
        chown 59990:0 "$root/var/lib/embassy"
        chmod 770 "$root/var/lib/embassy"
        # BPF for the kernel path: a container that is not given it starts without.
        setcap cap_net_admin,cap_bpf+p "$root/usr/bin/embassy"
        tar --sort=name --numeric-owner --mtime="@$SOURCE_DATE_EPOCH" --xattrs --xattrs-include='security.capability' \
            -C "$root" -czf "$out/image.tar.gz" .
        say "image: docker build -t embassy -f Dockerfile $out"
    else
        say 'no image: run this as root, with setcap (package libcap2-bin), to give the binary in it the capability NET_ADMIN'
    fi
    rm -rf "$root"
}

contents() {
    if cargo cyclonedx --version >/dev/null 2>&1; then
        cargo cyclonedx --format json --target "$target" --override-filename embassy.cdx >/dev/null
        mv embassy.cdx.json "$out/$name.cdx.json"
        find . -name embassy.cdx.json -not -path './target/*' -delete
        say "list of what is inside: $out/$name.cdx.json"
    else
        say 'no list of what is inside: cargo-cyclonedx is not installed (cargo install cargo-cyclonedx)'
    fi
}

look
build
describe
tarball
debian
image
contents
(cd "$out" && find . -maxdepth 1 -type f \( -name '*.tar.gz' -o -name '*.deb' -o -name '*.json' -o -name embassy \) -printf '%P\n' \
    | sort | xargs sha256sum >SHA256SUMS)
say "checksums: $out/SHA256SUMS"
