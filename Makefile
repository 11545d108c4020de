# Sandgate's verbs. Each is a few lines: the work is in deploy/setup.sh, deploy/build.sh and cargo.
#
# Variables: CARGO_TARGET_DIR (default target), CARGO_FLAGS (default --locked when CI is set),
# SOAK_CYCLES (see soak), FUZZ_SECONDS and FUZZ_JOBS (see fuzz), REDTEAM_ADAPTER (see redteam), SANDGATE_TOOLCHAIN_DIR and SANDGATE_IMAGE_DIR (see deploy/setup.sh), ARGS (passed on by run, test and bench).

TARGET_DIR  := $(abspath $(or $(CARGO_TARGET_DIR),target))
BIN_DIR     := $(TARGET_DIR)/release
SOAK_CYCLES ?= 10000
FUZZ_SECONDS ?= 300
CARGO_FLAGS ?= $(if $(CI),--locked)
export CARGO_FLAGS

# netd/build.rs finds the linker in its default place by itself.
ifdef SANDGATE_TOOLCHAIN_DIR
export BPF_LINKER ?= $(SANDGATE_TOOLCHAIN_DIR)/bin/bpf-linker
endif

# netd-ebpf is for the kernel only: netd/build.rs builds it.
WORKSPACE := --workspace --exclude netd-ebpf

# One verb after the other, also under `make -j`: build needs what setup installs.
.NOTPARALLEL:
.PHONY: help setup build run test soak fuzz redteam bench lint fmt openapi clean

help: ## list these verbs
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what is missing: packages, eBPF toolchain, default image (quick when nothing is)
	@deploy/setup.sh

build: ## release programs in target/release: controller, netd, tunnel-proxy; static: sandboxd, redteam
	@deploy/build.sh

run: setup build ## set up, build and start everything; prints the API address and `ready`
	@exec $(BIN_DIR)/controller up $(ARGS)

test: ## set up, build, run every test (as root: none is skipped)
	@deploy/setup.sh --tests
	@deploy/build.sh
	REQUIRE_ROOT=1 SANDGATE_BIN_DIR=$(BIN_DIR) cargo test $(CARGO_FLAGS) $(WORKSPACE) --no-fail-fast $(ARGS)

soak: ## make, attack and end SOAK_CYCLES sandboxes (10000) while programs are killed and frozen; 0 forbidden packets
	@deploy/setup.sh --tests
	@deploy/build.sh
	SOAK_CYCLES=$(SOAK_CYCLES) REQUIRE_ROOT=1 SANDGATE_BIN_DIR=$(BIN_DIR) \
	  cargo test $(CARGO_FLAGS) -p sandgate-tests --test soak -- $(ARGS)

fuzz: ## give each parser FUZZ_SECONDS (300) of inputs, FUZZ_JOBS (cores) at a time (ARGS="hello dns": only these; "--merge": keep)
	@deploy/setup.sh --fuzz
	@FUZZ_SECONDS=$(FUZZ_SECONDS) deploy/fuzz.sh $(ARGS)
	@$(if $(filter --merge,$(ARGS)),,SANDGATE_FUZZ_SECONDS=$(FUZZ_SECONDS) REQUIRE_ROOT=1 \
	  cargo test $(CARGO_FLAGS) -p sandgate-tests --test ebpf -- fuzz:: --nocapture)

redteam: ## attack a sandbox from inside and print the scorecard (REDTEAM_ADAPTER=file: another system's, see tests/redteam)
	@deploy/setup.sh --tests
	@deploy/build.sh
	REDTEAM_OUT=$(TARGET_DIR)/redteam REDTEAM_ADAPTER=$(abspath $(REDTEAM_ADAPTER)) REQUIRE_ROOT=1 SANDGATE_BIN_DIR=$(BIN_DIR) \
	  cargo test $(CARGO_FLAGS) -p sandgate-tests --test redteam -- redteam:: $(ARGS)

bench: ## measure, beside peers, and write tests/bench/RESULTS.md (ARGS="exec splice": only these)
	@deploy/setup.sh --bench
	@deploy/build.sh
	SANDGATE_BIN_DIR=$(BIN_DIR) cargo bench $(CARGO_FLAGS) -p sandgate-tests --bench bench -- $(ARGS)

lint: ## formatting and clippy, warnings are errors; cargo-deny where it is installed
	cargo fmt --all --check
	cargo clippy $(CARGO_FLAGS) $(WORKSPACE) --all-targets -- -D warnings
	@if command -v cargo-deny >/dev/null; then cargo deny check bans licenses sources; fi

fmt: ## format the code
	cargo fmt --all

openapi: ## write controller/openapi.json anew from the handlers
	UPDATE_OPENAPI=1 cargo test $(CARGO_FLAGS) -p controller --lib the_checked_in_description_is_the_present_one

clean: ## remove what was built (not what setup installed)
	cargo clean
