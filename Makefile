# RDMA is built in when a C compiler and rdma-core's headers are there; its libraries are needed only to use it.
RDMA := $(shell printf '\043include <rdma/rdma_cma.h>' | gcc -E -x c - > /dev/null 2>&1 && echo rdma)
# giouring reaches into the syscall package by linkname, which Go links only when told so.
export GOFLAGS := -ldflags=-checklinkname=0$(if $(RDMA), -tags=rdma)

KERNELS := 6.1 6.12 latest arm64
# For each fuzz target, in executions.
FUZZTIME := 10000x

.PHONY: build build-arm64 shim nixl-plugin wheel shim-test run test lint unit fuzz vuln systemd vm bench fmt clean
.NOTPARALLEL: # the tests measure time: one kind at a time

build:
	@command -v go > /dev/null || { echo 'kvof is built with Go 1.26 or later: https://go.dev/dl'; exit 1; }
	@$(if $(RDMA),:,echo 'Building without RDMA: for that install gcc, libibverbs-dev and librdmacm-dev (rdma-core-devel).')
	CGO_ENABLED=$(if $(RDMA),1,0) go build -o bin/kvof ./cmd/kvof

# For the BlueField, and the arm64 guest of tests/vm. rdma-core's headers are the same for all architectures.
build-arm64:
	@command -v aarch64-linux-gnu-gcc > /dev/null || { echo 'Needed: gcc-aarch64-linux-gnu, libc6-dev-arm64-cross (or your distribution'"'"'s names for them).'; exit 1; }
	GOARCH=arm64 CGO_ENABLED=1 CC=aarch64-linux-gnu-gcc CGO_CFLAGS='-O2 -idirafter /usr/include' go build -o bin/kvof-arm64 ./cmd/kvof

# The C interface, shim/c/kvof.h: docs/shim.md.
shim:
	CGO_ENABLED=1 go build -buildmode=c-shared -ldflags='-checklinkname=0 -s -w -extldflags=-Wl,-soname,libkvof.so' -o bin/libkvof.so ./shim/c
	@rm -f bin/libkvof.h # Go writes one: kvof.h is the interface
	@cp shim/c/kvof.h bin/

# NIXL's plugin, in a folder that NIXL_PLUGIN_DIR can name, under its name and as the OBJ backend: docs/nixl.md.
nixl-plugin: shim
	@mkdir -p bin/nixl
	$(CXX) -std=c++17 -O2 -fPIC -shared -fvisibility=hidden -Wall -Wextra -Werror -Wno-unused-parameter -Ishim/c shim/nixl/plugin.cpp \
		-o bin/nixl/libplugin_KVOF.so -Lbin -lkvof -Wl,--no-undefined '-Wl,-rpath,$$ORIGIN:$$ORIGIN/..'
	@ln -sf libplugin_KVOF.so bin/nixl/libplugin_OBJ.so

# The Python package with the library in it: docs/python.md. bin/kvof-*.whl.
wheel: shim
	@rm -f bin/kvof-*.whl && cp bin/libkvof.so shim/python/kvof/
	python3 -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir bin --config-settings=--build-option=--plat-name=linux_$$(uname -m) shim/python; status=$$?; \
		rm -rf shim/python/kvof/libkvof.so shim/python/build shim/python/*.egg-info; exit $$status

# The engines' adapters and the NIXL plugin with the real engines: LMCache, SGLang, vLLM, NIXL. Installs them the first time, 7 GB.
shim-test: build nixl-plugin wheel
	@python=$$(shim/python/tests/venv.sh) && timeout -k 10 1200 $$python -m pytest -q shim/python/tests

run: build
	@echo 'Serving in this terminal until Ctrl-C. In a second one, in this folder:'
	@echo
	@echo '    bin/kvof put hello README.md     # store a context block'
	@echo '    bin/kvof get hello -             # and retrieve it'
	@echo '    bin/kvof status'
	@echo
	@exec bin/kvof serve --config configs/embedded.toml

test: lint unit fuzz vuln shim-test systemd vm

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

# In emulated machines: see tests/vm/test.sh.
vm:
	@tests/vm/setup.sh $(KERNELS) > /dev/null
	@$(MAKE) build build-arm64
	@tests/vm/test.sh

# SPDK_DIR, the folder of an SPDK build, adds the comparisons with it. Installs redis and memcached when they are missing.
bench: build
	go run ./bench

fmt:
	gofmt -w .

clean:
	rm -rf bin
