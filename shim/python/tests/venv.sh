#!/bin/sh
# The Python environment of the tests: the real engines, at the versions in requirements.txt. Made once, in the user's cache.
# Prints the path of its interpreter. Takes about 7 GB: the torch of the package index comes with CUDA, which the tests do not use.
set -e
cd "$(dirname "$0")"
sum=$(sha256sum requirements.txt | cut -c1-12)
dir=${XDG_CACHE_HOME:-$HOME/.cache}/kvof/python-$sum
if [ ! -e "$dir/complete" ]; then
	echo "Installing LMCache, SGLang, vLLM and NIXL into $dir" >&2
	rm -rf "${dir%-*}"-*
	${PYTHON:-python3} -m venv "$dir"
	# Every version is fixed: nothing to resolve, and no dependency of an engine that these tests do not import.
	"$dir/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --no-cache-dir --only-binary :all: -r requirements.txt >&2
	touch "$dir/complete"
fi
echo "$dir/bin/python"
