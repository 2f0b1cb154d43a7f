#!/bin/sh
# Fuzzes everything that comes from outside: run.sh [minutes for each target] [target...]
# Built by stable Rust: what cargo-fuzz passes, but for the sanitizer, which needs nightly and finds nothing in safe code.
# A crash is kept in target/fuzz/crashes; what was found to be of use in target/fuzz/corpus.
set -eu
cd "$(dirname "$0")/.."
minutes=${1:-1}
[ $# = 0 ] || shift

level='-Cllvm-args=-sanitizer-coverage'
RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module $level-level=4 $level-inline-8bit-counters $level-pc-table $level-trace-compares" \
    cargo build --quiet --release --manifest-path fuzz/Cargo.toml --target-dir target/fuzz --target "$(rustc -vV | sed -n 's/^host: //p')"
program=$(ls target/fuzz/*/release/embassy-fuzz)

[ $# != 0 ] || set -- $(ls fuzz/seeds)
seconds=$(awk "BEGIN { print int($minutes * 60) }")
failed=
total=0
mkdir -p target/fuzz/crashes
for target; do
    corpus=target/fuzz/corpus/$target
    log=target/fuzz/$target.log
    mkdir -p "$corpus"
    FUZZ_TARGET=$target "$program" "$corpus" "fuzz/seeds/$target" -max_total_time="$seconds" -max_len=8192 -timeout=10 \
        -artifact_prefix="target/fuzz/crashes/$target-" -print_final_stats=1 >"$log" 2>&1 || failed="$failed $target"
    inputs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    total=$((total + ${inputs:-0}))
    echo "$target: ${inputs:-0} inputs"
done
echo "all: $total inputs in $((seconds * $#)) s"
for target in $failed; do
    echo "--- $target failed"
    tail -n 30 "target/fuzz/$target.log"
done
[ -z "$failed" ]
