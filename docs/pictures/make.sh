#!/bin/sh
# Makes the pictures of README.md: the dashboard, and `embassy top` in a terminal, of an embassy at work in a host of the testbed.
# Needs chromium, chromedriver and tmux.
#
#   docs/pictures/make.sh
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
cd "$here/../.."
for program in chromium chromedriver tmux python3; do
    command -v "$program" >/dev/null || { echo "pictures: $program is missing" >&2; exit 1; }
done
cargo build --workspace --bins
target/debug/testbed shell -- "$here/scene.sh" "$here"
