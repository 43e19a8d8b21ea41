# criu-netlock. On a fresh Debian machine, as root: `make demo` shows the program at
# its work, `make test` runs every test. Both install what they need.

SHELL   := /bin/bash
GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
PREFIX  ?= /usr/local
LINT    := github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.12.2
VULN    := golang.org/x/vuln/cmd/govulncheck@v1.9.0
# What is slow to make is kept here, outside the checkout, and made anew when missing.
CACHE   ?= /var/cache/criu-netlock

# Where Debian keeps nft, ip and the others, which root does not always have.
export PATH := $(PATH):/usr/sbin:/sbin

# Start-up time is spent while a container is frozen: no cgo, no symbol tables, and on amd64
# and arm64 an entry that comes before Go's runtime (package early).
export CGO_ENABLED := 0
ENTRY = $(if $(filter amd64 arm64,$(shell $(GO) env GOARCH)),-E github.com/criu-netlock/criu-netlock/cmd/criu-netlock/early.entry)
GOFLAGS_BUILD = -trimpath -ldflags "-s -w -X main.version=$(VERSION) $(ENTRY)"
# Runs, not seconds: at the end of a time Go's own fuzzer can fail (go.dev/issue/75804).
FUZZTIME ?= 400000x
# For targets that talk over sockets.
FUZZTIME_SOCKETS ?= 30000x

# The C library is the one thing that needs a C compiler. Its Go threads must not send
# signals to each other: asyncpreemptoff.
LIBFLAGS := -tags clibrary -trimpath -ldflags "-s -w -X runtime.godebugDefault=asyncpreemptoff=1 \
  -extld $(CURDIR)/cmd/libcriunetlock/link.sh -extldflags '-Wl,-soname,libcriunetlock.so -Wl,-z,defs -Wl,--version-script=$(CURDIR)/cmd/libcriunetlock/exports.map'"
LIBDIR   ?= bin

# A module of its own, for its requirements.
PLOT := e2e/bench/plot

.PHONY: help build install lib install-lib test lint bench faults demo deps fuzz clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

build: deps-go ## build bin/criu-netlock
	$(GO) build $(GOFLAGS_BUILD) -o bin/criu-netlock ./cmd/criu-netlock

install: build ## install the program to PREFIX/sbin (/usr/local/sbin)
	install -D -m 0755 bin/criu-netlock $(DESTDIR)$(PREFIX)/sbin/criu-netlock

lib: deps-go deps-c ## build the C library, bin/libcriunetlock.so and its header
	CGO_ENABLED=1 $(GO) build -buildmode=c-shared $(LIBFLAGS) -o $(LIBDIR)/libcriunetlock.so ./cmd/libcriunetlock
	@rm -f $(LIBDIR)/libcriunetlock.h
	install -m 0644 cmd/libcriunetlock/criu_netlock.h $(LIBDIR)/

install-lib: lib ## install the C library to PREFIX/lib and PREFIX/include
	install -D -m 0755 $(LIBDIR)/libcriunetlock.so $(DESTDIR)$(PREFIX)/lib/libcriunetlock.so
	install -D -m 0644 $(LIBDIR)/criu_netlock.h $(DESTDIR)$(PREFIX)/include/criu_netlock.h

# A test that cannot run here for want of root or a tool fails.
test: export CI = true
test: deps ## all tests: units, fuzzing, the kernel, real CRIU and runc
	$(GO) vet ./...
	$(GO) test -p 1 -count=1 -timeout 60m ./...
	cd $(PLOT) && $(GO) test -count=1 ./...
	$(MAKE) --no-print-directory fuzz

# Every fuzz target, some seconds each; a target that is not found is an error.
fuzz: deps-go ## run every fuzz target for FUZZTIME
	@set -e; n=0; for f in $$(grep -rlE '^func Fuzz' --include='*_test.go' .); do \
	  for t in $$(sed -nE 's/^func (Fuzz[A-Za-z0-9_]+)\(.*/\1/p' $$f); do \
	    echo "fuzz $$t in $$(dirname $$f)"; \
	    case $$f in */criurpc/*) runs=$(FUZZTIME_SOCKETS);; *) runs=$(FUZZTIME);; esac; \
	    $(GO) test -run '^$$' -fuzz "^$$t\$$" -fuzztime $$runs -fuzzminimizetime 10x $$(dirname $$f); n=$$((n+1)); \
	  done; done; [ $$n -gt 0 ]

# A program made with go install is kept in CACHE under its version.
tool = @mkdir -p $(CACHE); [ -x $(CACHE)/$(notdir $(subst @,-,$(1))) ] || { GOBIN=$(CACHE)/lint.tmp $(GO) install $(1) && \
  mv $(CACHE)/lint.tmp/$(notdir $(firstword $(subst @, ,$(1)))) $(CACHE)/$(notdir $(subst @,-,$(1))); }

lint: deps-go deps-c ## gofmt, vet, golangci-lint, govulncheck, go mod tidy and verify
	@out=$$(gofmt -l .); [ -z "$$out" ] || { echo "gofmt: $$out"; exit 1; }
	$(GO) vet ./...
	CGO_ENABLED=1 $(GO) vet -tags clibrary ./cmd/libcriunetlock
	$(GO) vet -tags older ./e2e
	$(GO) mod verify
	$(GO) mod tidy -diff
	cd $(PLOT) && $(GO) vet ./... && $(GO) mod verify && $(GO) mod tidy -diff
	$(call tool,$(LINT))
	for d in . $(PLOT); do (cd $$d && GOLANGCI_LINT_CACHE=$(CACHE)/lint$(subst /,-,$(CURDIR)) $(CACHE)/$(notdir $(subst @,-,$(LINT))) run) || exit 1; done
	$(call tool,$(VULN))
	@echo govulncheck ./...; out=$$($(CACHE)/$(notdir $(subst @,-,$(VULN))) ./... 2>&1) || { code=$$?; echo "$$out"; \
	  case "$$out" in *"fetching vulnerabilities"*) echo "NOT CHECKED for known holes: the database is out of reach";; *) exit $$code;; esac; }

bench: deps ## measure beside what a user would use instead, as ratios (5 minutes); draws docs/hold.svg
	$(GO) run ./e2e/bench -data docs/hold.csv
	cd $(PLOT) && $(GO) run . $(CURDIR)/docs/hold.csv $(CURDIR)/docs/hold.svg

# Killed, refused and robbed at every point there is, instead of the few of `make test`.
faults: export CI = true
faults: deps ## try every fault that can be counted, and print how many there were
	$(GO) test -v -count=1 -parallel 4 -timeout 60m ./e2e/faults -faults.all
	$(GO) test -v -count=1 -timeout 20m -run 'TestKilled|TestEnginesKilled|TestEngineKilled|TestRuncKilled|TestDiskFull|TestPaused|TestCapabilities|TestManyCheckpoints' ./e2e -every-hook

demo: deps ## checkpoint and restore a container with a live connection
	$(GO) run ./e2e/demo

deps: deps-go deps-c ## install Debian's packages that the tests need, if they are missing
	@need=; have() { command -v $$1 >/dev/null; }; \
	have nft || need="$$need nftables"; \
	have iptables-legacy-restore || need="$$need iptables"; \
	have ip || need="$$need iproute2"; \
	have debootstrap || need="$$need debootstrap"; \
	[ "$$(uname -m)" != x86_64 ] || have qemu-system-x86_64 || need="$$need qemu-system-x86"; \
	have mkfs.ext4 || need="$$need e2fsprogs"; \
	have strace || need="$$need strace"; \
	have patch || need="$$need patch"; \
	have capsh || need="$$need libcap2-bin"; \
	have systemd-analyze || need="$$need systemd"; \
	have unshare && have setpriv || need="$$need util-linux"; \
	[ -z "$$need" ] || { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $$need; }

.PHONY: deps-go deps-c
deps-c:
	@command -v gcc >/dev/null && echo '#include <stdio.h>' | gcc -E - >/dev/null 2>&1 || \
	  { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends gcc libc6-dev; }

deps-go:
	@command -v $(GO) >/dev/null || { apt-get update -q; \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends -t bookworm-backports golang-go ca-certificates 2>/dev/null || \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends golang-go ca-certificates; }
	@case $$($(GO) env GOVERSION) in go1.[0-9]|go1.[0-9].*|go1.1[0-9]*|go1.20*|"") \
	  echo "criu-netlock needs Go 1.25, or a Go from 1.21 on, which fetches it; this is $$($(GO) version)" >&2; exit 1;; esac

clean: ## remove what was built here; CACHE stays
	rm -rf bin
