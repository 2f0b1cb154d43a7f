# Everything is run as root on a Debian machine with cargo; `make` lists what there is.

# Errors of tests are sentences; set to 1 to see where they were made.
export RUST_LIB_BACKTRACE ?= 0

# Where the set-up puts what Debian 12 lacks; a consul of the machine comes first.
TESTBED_CACHE ?= $(CURDIR)/.testbed/cache
export TESTBED_CACHE
export PATH := $(PATH):$(TESTBED_CACHE)/consul/usr/bin

NEXTEST := $(shell command -v cargo-nextest 2>/dev/null)
# How the demo finds services: docker, consul or etcd. ONCE=1: it ends by itself.
DISCOVERY ?= docker
ONCE ?=

.PHONY: help setup build test lint fuzz soak demo figures bench bench-setup bench-soak shell dist clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

setup: ## installs from Debian what tests and demo need; says what and why
	@testbed/setup.sh

build: setup ## builds embassy and the testbed
	cargo build --workspace --bins

# A failed test shows the logs of the programs that it started.
test: export TESTBED_SHOW_LOGS ?= 1
test: build ## all unit and integration tests, on Docker hosts of their own
ifdef NEXTEST
	cargo nextest run --workspace
	cargo test --workspace --doc --quiet
else
	cargo test --workspace -- --test-threads=2
endif

lint: setup ## format, clippy, and dependencies where cargo-deny is installed
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	@if command -v cargo-deny >/dev/null; then cargo deny --log-level error check bans licenses sources; else echo 'lint: no cargo-deny here, dependencies are not checked'; fi

fuzz: setup ## whatever comes from outside, under libFuzzer; MINUTES=1 for each target; needs a C++ compiler
	fuzz/run.sh $(or $(MINUTES),1)

soak: build ## everything at once for MINUTES=30, by a SEED=1 that repeats it; prints requests, failures, memory
	MINUTES=$(or $(MINUTES),30) SEED=$(or $(SEED),1) cargo test --test it soak -- --ignored --nocapture

demo: build ## three endpoints, two consumers and embassy between them; DISCOVERY=docker|consul|etcd, ONCE=1
	target/debug/testbed demo --discovery $(DISCOVERY) $(if $(ONCE),--once)

figures: build ## figures of a release build: sizes, memory, how soon a change is followed, what a scrape costs
	cargo build --release --workspace --bins
	target/debug/testbed shell -- bench/figures.sh
	target/debug/testbed shell -- bench/scrape.sh

# What the contenders are: HAProxy, nginx and Envoy, in the cache.
bench-setup: setup
	@bench/setup.sh
	cargo build --release --workspace --bins

bench: bench-setup ## embassy side by side with other proxies; ROUNDS=5 SECONDS=2; writes docs/benchmarks.md
	target/release/bench run

bench-soak: bench-setup ## embassy alone at full rate for MINUTES=10: its memory must not grow
	target/release/bench soak

shell: build ## a shell in a Docker host of its own
	target/debug/testbed shell

DIST := target/dist
COMMANDS = $(shell target/release/embassy --help | sed -n '/^Commands:/,/^$$/s/^  \([a-z][a-z]*\) .*/\1/p')

dist: setup ## a release build with manual pages and completions, in target/dist
	cargo build --release --bin embassy
	mkdir -p $(DIST)/man $(DIST)/completions
	cp target/release/embassy $(DIST)/
	target/release/embassy man >$(DIST)/man/embassy.1
	for command in $(COMMANDS); do target/release/embassy man $$command >$(DIST)/man/embassy-$$command.1 || exit 1; done
	target/release/embassy completions bash >$(DIST)/completions/embassy.bash
	target/release/embassy completions zsh >$(DIST)/completions/_embassy
	target/release/embassy completions fish >$(DIST)/completions/embassy.fish

clean: ## removes what was built and fetched, and what killed hosts left
	@if [ -x target/debug/testbed ]; then target/debug/testbed sweep; fi
	cargo clean
	rm -rf .testbed
