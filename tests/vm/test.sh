#!/bin/bash
# test.sh - all tests in emulated machines, two machines at a time. bin/vm-NAME.log keeps what each of them says.
set -euo pipefail
cd "$(dirname "$0")/../.."

drives=(-d size=2G,lba=4096 -d size=2G,mdts=3 -d lba=4096,fdp=4 -d bad=204800)
all=(tests/vm/scripts/*.sh)
pair=(tests/vm/pair/*.sh)

# scripts NUMBER...: those of them.
scripts() { for number; do echo tests/vm/scripts/"$number"-*.sh; done; }

# guest NAME ARGUMENT...: one run of run.sh.
guest() {
	local name=$1
	shift
	{ tests/vm/run.sh "$@" || echo "FAIL the guest: run.sh returned $?"; } < /dev/null 2>&1 |
		tee "bin/vm-$name.log" | sed -u "s/^/$name: /"
}

rm -f bin/vm-*.log
{
	guest linux-6.1 -t 1500 "${drives[@]}" 6.1 "${all[@]}" transport=rdma $(scripts 10 25 30 55 60 70 90)
	guest soft-iwarp -t 600 6.12 transport=rdma soft=siw $(scripts 10 30 50 55 60)
	guest arm64 -t 600 "${drives[@]}" arm64 transport=rdma $(scripts 25)
	guest two -t 450 -2 latest "${pair[@]}"
} &
{
	guest linux-latest -t 1500 "${drives[@]}" latest "${all[@]}" transport=rdma "${all[@]}"
	guest two-rdma -t 450 -2 latest transport=rdma "${pair[@]}" # the second guest has one transport
} &
wait

passed=$(cat bin/vm-*.log | grep -c '^PASS ') failed=$(cat bin/vm-*.log | grep -c '^FAIL ') || true
echo "$passed passed, $failed failed"
grep '^FAIL ' bin/vm-*.log | sed 's|^bin/vm-\(.*\).log:FAIL|\1: FAIL|' || true # once more, where they are seen
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
