# Run everything as root on a Debian machine with cargo. `make` lists the targets.

# Set to 1 to see backtraces of test errors.
export RUST_LIB_BACKTRACE ?= 0

# Where the set-up puts programs that Debian 12 lacks. A consul on PATH is preferred.
TESTBED_CACHE ?= $(CURDIR)/.testbed/cache
export TESTBED_CACHE
export PATH := $(PATH):$(TESTBED_CACHE)/consul/usr/bin

NEXTEST := $(shell command -v cargo-nextest 2>/dev/null)
# Discovery of the demo: docker, consul or etcd. ONCE=1: the demo exits by itself.
DISCOVERY ?= docker
ONCE ?=

.PHONY: help setup build-setup build test engines registry-figures lint fuzz soak demo figures scale bench bench-setup bench-soak shell dist dist-try clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

setup: ## install the Debian packages that tests and demo need; prints them with the reason
	@testbed/setup.sh

build-setup: ## install only the Debian packages that build a release
	@testbed/setup.sh build

build: setup ## build embassy and the testbed
	cargo build --workspace --bins

# A failed test prints the logs of the programs it started.
test: export TESTBED_SHOW_LOGS ?= 1
test: build ## run all unit and integration tests, in separate Docker hosts
ifdef NEXTEST
	cargo nextest run --workspace
	cargo test --workspace --doc --quiet
else
	cargo test --workspace -- --test-threads=2
endif

engines: build ## run the tests that every engine has to pass with Docker 26 and 28 and podman 5; ENGINES="podman4"
	testbed/test-engines.sh $(ENGINES)

registry-figures: setup ## what 300 services cost a real etcd (v3 and v2) and Consul; MINUTES=4
	cargo test --test it what_many_services_cost_a_registry -- --ignored --nocapture

lint: setup ## check format, clippy, and dependencies if cargo-deny is installed
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	@if command -v cargo-deny >/dev/null; then cargo deny --log-level error check bans licenses sources; else echo 'lint: cargo-deny is not installed; dependencies were not checked'; fi
	@if ! command -v cargo-deny >/dev/null; then :; \
	elif timeout 120 cargo deny --log-level error fetch db >/dev/null 2>&1; then cargo deny --log-level error check --disable-fetch advisories; \
	else echo 'lint: the advisory database cannot be fetched; advisories were not checked'; fi

fuzz: setup ## fuzz all parsers of outside input with libFuzzer, MINUTES=1 per target; needs a C++ compiler
	fuzz/run.sh $(or $(MINUTES),1)

soak: build ## random load and failures for MINUTES=30; SEED=1 repeats a run; prints requests, failures, memory
	MINUTES=$(or $(MINUTES),30) SEED=$(or $(SEED),1) cargo test --test it soak -- --ignored --nocapture

demo: build ## start three endpoints, three consumers and embassy; DISCOVERY=docker|consul|etcd, ONCE=1 to exit by itself
	target/debug/testbed demo --discovery $(DISCOVERY) $(if $(ONCE),--once)

figures: build ## print figures of a release build: sizes, memory, delay of a change, cost of a scrape
	cargo build --release --workspace --bins
	target/debug/testbed shell -- bench/figures.sh
	target/debug/testbed shell -- bench/scrape.sh

scale: build ## what a start, a change, memory and a scrape cost with up to 10,000 consumers; CONSUMERS="100 1000 10000"
	cargo build --release --workspace --bins
	target/release/bench scale

# Downloads HAProxy, nginx and Envoy into the cache.
bench-setup: setup
	@bench/setup.sh
	cargo build --release --workspace --bins

bench: bench-setup ## compare embassy with other proxies; ROUNDS=5 SECONDS=2; writes docs/benchmarks.md
	target/release/bench run
	EMBASSY_BIN=$(CURDIR)/target/release/embassy cargo test --quiet --test it figures_of_the_guard -- --ignored --nocapture

bench-soak: bench-setup ## run embassy alone at full rate for MINUTES=10; fails if its memory grows
	target/release/bench soak

shell: build ## open a shell in a separate Docker host
	target/debug/testbed shell

dist: build-setup ## make a release in target/dist: static binary, manual pages, completions, tarball, Debian package, root of the image
	dist/package.sh

dist-try: build dist ## install the Debian package in fresh roots of Debian, and serve a first request; try the image with three engines
	dist/try.sh
	target/debug/testbed shell -- dist/try-image.sh
	testbed/engines.sh docker26 podman5
	ENGINE=docker26 target/debug/testbed shell -- dist/try-image.sh
	ENGINE=podman5 target/debug/testbed shell -- dist/try-image.sh

clean: ## remove build output and downloads, and what killed hosts left
	@if [ -x target/debug/testbed ]; then target/debug/testbed sweep; fi
	cargo clean
	rm -rf .testbed
