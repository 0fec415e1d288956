#!/bin/bash
# test.sh - all tests in emulated machines, two machines at a time. bin/vm-NAME.log keeps what each of them says.
set -euo pipefail
cd "$(dirname "$0")/../.."

drives=(-d size=2G,lba=4096 -d size=2G,mdts=3 -d lba=4096,fdp=4 -d bad=204800)
all=(tests/vm/scripts/*.sh)
pair=(tests/vm/pair/*.sh)

# guest NAME ARGUMENT...: one run of run.sh.
guest() {
	local name=$1
	shift
	{ tests/vm/run.sh "$@" || echo "FAIL the guest: run.sh returned $?"; } < /dev/null 2>&1 |
		tee "bin/vm-$name.log" | sed -u "s/^/$name: /"
}

rm -f bin/vm-*.log
{
	guest linux-6.1 -t 1500 "${drives[@]}" 6.1 "${all[@]}" transport=rdma "${all[@]}"
	guest arm64 -t 300 "${drives[@]}" arm64 transport=rdma tests/vm/scripts/25-drives.sh
} &
{
	guest linux-latest -t 1500 "${drives[@]}" latest "${all[@]}" transport=rdma "${all[@]}"
	guest pair -t 600 -2 latest "${pair[@]}" transport=rdma "${pair[@]}"
} &
wait

passed=$(cat bin/vm-*.log | grep -c '^PASS ') failed=$(cat bin/vm-*.log | grep -c '^FAIL ') || true
echo "$passed passed, $failed failed"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
