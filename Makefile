# RDMA is built in when a C compiler and rdma-core's headers are there; its libraries are needed only to use it.
RDMA := $(shell printf '\043include <rdma/rdma_cma.h>' | gcc -E -x c - > /dev/null 2>&1 && echo rdma)
# giouring reaches into the syscall package by linkname, which Go links only when told so.
export GOFLAGS := -ldflags=-checklinkname=0$(if $(RDMA), -tags=rdma)

# The guests of tests/vm: Debian 12's kernel, and the newest that Debian 13 has.
KERNELS := 6.1 latest
# For one guest with all its scripts, in seconds.
VM_LIMIT := 1500
# For each fuzz target, in executions.
FUZZTIME := 10000x

.PHONY: build run test lint unit fuzz vuln systemd vm bench fmt clean
.NOTPARALLEL: # the tests measure time: one kind at a time

build:
	@command -v go > /dev/null || { echo 'kvof is built with Go 1.26 or later: https://go.dev/dl'; exit 1; }
	@$(if $(RDMA),:,echo 'Building without RDMA: for that install gcc, libibverbs-dev and librdmacm-dev (rdma-core-devel).')
	CGO_ENABLED=$(if $(RDMA),1,0) go build -o bin/kvof ./cmd/kvof

run: build
	@echo 'Serving in this terminal until Ctrl-C. In a second one, in this folder:'
	@echo
	@echo '    bin/kvof put hello README.md     # store a context block'
	@echo '    bin/kvof get hello -             # and retrieve it'
	@echo '    bin/kvof status'
	@echo
	@exec bin/kvof serve --config configs/embedded.toml

test: lint unit fuzz vuln systemd vm

lint:
	@files=$$(gofmt -l .) && if [ -n "$$files" ]; then echo "make fmt would change: $$files"; exit 1; fi
	go vet ./...
	go tool staticcheck ./...

# The race detector needs a C compiler.
unit:
	go test $(if $(shell command -v gcc),-race) ./...

fuzz:
	@grep -r '^func Fuzz' --include='*_test.go' --exclude-dir='[_.]?*' . | sed 's|/[^/]*:func \(Fuzz[A-Za-z0-9_]*\).*| \1|' | \
	while read -r package name; do \
		echo "go test -fuzz $$name $$package"; \
		go test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZTIME) "$$package" || exit 1; \
	done

# Its exit status is 3 when it finds something.
vuln:
	@out=$$(go tool govulncheck ./... 2>&1) && status=0 || status=$$?; \
	case $$status in \
	0) echo 'govulncheck: nothing found' ;; \
	3) echo "$$out"; exit 3 ;; \
	*) echo "$$out" | grep -q 'vuln\.go\.dev' || { echo "$$out"; exit 1; }; echo 'govulncheck: left out, https://vuln.go.dev cannot be reached' ;; \
	esac

# The units under a real systemd, in namespaces of their own.
systemd: build
	@tests/systemd/run.sh

# One guest for each kernel, side by side. bin/vm-KERNEL.log keeps what they say.
vm: build
	@tests/vm/setup.sh $(KERNELS) > /dev/null
	@for kernel in $(KERNELS); do \
		{ tests/vm/run.sh -t $(VM_LIMIT) $$kernel tests/vm/scripts/*.sh || echo "FAIL the guest: run.sh returned $$?"; } < /dev/null 2>&1 | \
			tee bin/vm-$$kernel.log | sed -u "s/^/Linux $$kernel: /" & \
	done; wait; \
	passed=$$(cat $(KERNELS:%=bin/vm-%.log) | grep -c '^PASS '); \
	failed=$$(cat $(KERNELS:%=bin/vm-%.log) | grep -c '^FAIL '); \
	echo "$$passed passed, $$failed failed"; \
	[ "$$failed" = 0 ] && [ "$$passed" -gt 0 ]

# SPDK_DIR, the folder of an SPDK build, adds the comparisons with it. Installs redis and memcached when they are missing.
bench: build
	go run ./bench

fmt:
	gofmt -w .

clean:
	rm -rf bin
