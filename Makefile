# One place for what people and CI run. `make help` lists the targets.

CARGO ?= cargo
# `make demo DATASET_MB=1024` moves a redis that holds a gigabyte.
DATASET_MB ?= 0
TARGET_DIR := $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)
MIGD := $(TARGET_DIR)/release/migd

# What is needed from Debian, and what for:
#   redis-server                      the server of the demonstration (only its program; Debian's own instance is not started)
#   redis-tools memcached nginx-light iperf3 curl python3   unmodified servers and clients that the whole-system tests move
#   dnsmasq-base                      a server that speaks UDP, moved by the tests
#   golang-go                         a statically linked Go server, built and moved by the tests
#   etcd-server                       the directory's other engine, for its tests and `migd demo --directory etcd`
#   protobuf-compiler libprotobuf-dev for building the client of etcd: it is generated from etcd's own definitions
#   wrk librsvg2-bin fonts-dejavu-core   more for the benchmarks: a load generator, and what draws their charts
# `make criu` names what CRIU is built from (Debian 12's own CRIU does not work on new kernels).
BUILD_PACKAGES := protobuf-compiler libprotobuf-dev
DEMO_PACKAGES := redis-server
BENCH_PACKAGES := redis-server redis-tools nginx-light wrk fonts-dejavu-core librsvg2-bin
# About how long `make results` may measure; single rounds are dropped to stay within it.
MINUTES ?= 20
# The CRIU that `make criu` builds; without it the one on the path is tried.
CRIU := $(TARGET_DIR)/criu/criu
export MIGD_CRIU := $(or $(MIGD_CRIU),$(wildcard $(CRIU)))
ifeq ($(MIGD_CRIU),)
unexport MIGD_CRIU
endif
TEST_PACKAGES := redis-server redis-tools memcached nginx-light iperf3 curl python3 golang-go dnsmasq-base etcd-server

.PHONY: all build demo test compliance unit system soak-addresses measure-allocation bench bench-flood bench-idle bench-loss soak differential fuzz compare criu results fmt lint help build-packages demo-packages test-packages bench-packages

all: build ## Build the release binary

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

build: build-packages ## Build the release binary
	$(CARGO) build --release --bin migd

demo: build demo-packages ## Show a redis moving between two nodes under load (needs root)
	$(MIGD) demo --dataset-mb $(DATASET_MB)

soak-addresses: build-packages ## Simulate 200 nodes taking 60,000 addresses with crashes, partitions and restarts, 1,000 seeds (SEEDS=N, FIRST=N)
	SIM_SEEDS=$(or $(SEEDS),1000) SIM_FIRST=$(or $(FIRST),1) SIM_NODES=200 SIM_TAKES=60000 \
		$(CARGO) test --release --package cluster-addr --test simulation -- --nocapture no_address_is_given_out_twice

measure-allocation: build-packages test-packages ## Time allocations: from an own block, and with etcd when a new block is needed
	$(CARGO) test --release --package cluster-addr --lib -- --nocapture allocation_takes_no_time
	$(CARGO) test --release --package cluster-addr --test conformance -- --ignored --nocapture how_long

bench: build bench-packages ## Measure throughput, latency and connections against the kernel's TCP (needs root)
	$(MIGD) bench throughput
	$(MIGD) bench rr

bench-flood: build ## Measure what SYN, ACK, RST and data floods leave of running streams, against the kernel (needs root, three minutes)
	$(MIGD) bench flood

bench-idle: ## Measure what 100,000 idle connections cost in the stack: memory, ticks, one more served
	$(CARGO) bench --package netstack --bench idle

bench-loss: build ## Measure goodput over links with loss against the kernel's CUBIC (needs root, five minutes)
	$(MIGD) bench loss

compare: build bench-packages ## Measure everything against everything: kernel TCP, migd, home-routed, smoltcp, CRIU (needs root)
	$(MIGD) bench compare --minutes $(MINUTES)

criu: ## Build CRIU from Debian's source, to be compared with (needs root; the results do without it)
	.ci/criu $(CRIU)

results: build bench-packages ## Measure all and rewrite docs/results.md with its pictures (needs root; MINUTES=10 for less)
	@[ -n "$$MIGD_CRIU" ] || [ -x $(CRIU) ] || .ci/criu $(CRIU) || echo "CRIU can't be had here: the results will say so"
	[ ! -x $(CRIU) ] || export MIGD_CRIU=$${MIGD_CRIU:-$(CRIU)}; $(MIGD) bench results --out docs --minutes $(MINUTES)

fmt: ## Format the source
	$(CARGO) fmt --all

lint: build-packages ## Check format and lints, warnings as errors
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings

# The demonstration comes before the tests, so that the last line is the tests' own count.
test: lint build test-packages ## Format, lints, the demonstration, unit, property and whole-system tests (needs root)
	$(MIGD) demo
	$(MAKE) unit
	$(MAKE) system

compliance: ## Show which requirement of which RFC is met where, and by which test it is shown
	$(CARGO) test --quiet --package netstack --test compliance -- --nocapture --test-threads=1

unit: build-packages test-packages ## Unit and property tests
	$(CARGO) test --workspace --exclude tests

# How many simulated worlds (of three or four connections each) a soak runs.
SOAK_WORLDS ?= 30000
# And how many pairs of trace and cut.
SOAK_CUTS ?= 100000

soak: ## Simulate a hundred thousand connections over bad links, and every cut of many traces
	SIMULATOR_WORLDS=$(SOAK_WORLDS) $(CARGO) test --profile lab --package netstack --test simulator -- --nocapture
	CUTS=$(SOAK_CUTS) $(CARGO) test --profile lab --package netstack --test cuts -- --nocapture

differential: build-packages ## Send the same raw packets to Linux's TCP and to the stack, and compare the answers (needs root, two minutes)
	$(CARGO) build --package migd --example netplane
	$(CARGO) test --package migd --test differential -- --ignored

# How long each target is fuzzed, in seconds, and which.
FUZZ_SECONDS ?= 300
FUZZ_TARGETS ?=
FUZZ_PACKAGES := g++

fuzz: build-packages ## Feed packets, options, fragments, images and frames to a fuzzer, 5 minutes each (FUZZ_SECONDS=N, FUZZ_TARGETS=...)
	@.ci/packages $(FUZZ_PACKAGES)
	FUZZ_SECONDS=$(FUZZ_SECONDS) FUZZ_WORK=$(TARGET_DIR)/fuzz .ci/fuzz $(FUZZ_TARGETS)

# Each test makes a lab of its own; two at a time are as many as a small machine carries without the load of one
# disturbing the other's timing. Without the (empty) documentation tests, so that the last line counts tests.
system: build test-packages ## Whole-system tests in labs (needs root)
	MIGD_BINARY=$(MIGD) $(CARGO) test --package tests --tests -- --test-threads=2

build-packages:
	@.ci/packages $(BUILD_PACKAGES)

demo-packages:
	@.ci/packages $(DEMO_PACKAGES)

bench-packages:
	@.ci/packages $(BENCH_PACKAGES)

test-packages:
	@.ci/packages $(TEST_PACKAGES)
