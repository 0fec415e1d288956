#!/bin/bash
# run.sh [-t SECONDS] [-c CPUS] [-m MEMORY] [-v] KERNEL SCRIPT...
#
# Boots a throw-away guest with KERNEL (see setup.sh), runs each SCRIPT in it as root, streams
# their output and exits with the number of scripts that failed; 124: the time limit was hit.
# -v also shows the kernel's console. KVOF is the binary the guest gets (default bin/kvof);
# variables named VM_* reach the scripts.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
limit=600 cpus=2 memory=4G console=null
while getopts t:c:m:v option; do
	case $option in
	t) limit=$OPTARG ;;
	c) cpus=$OPTARG ;;
	m) memory=$OPTARG ;;
	v) console=file:/dev/stderr ;;
	*) exit 2 ;;
	esac
done
shift $((OPTIND - 1))
[ $# -ge 2 ] || { sed -n 's/^# //; 2p' "$0" >&2; exit 2; }
image=$("$here/setup.sh" "$1")
shift

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
mkdir -p "$tmp/job/vm"
cp "$here/guest/init" "$tmp/job/"
cp "$here/guest/lib.sh" "$tmp/job/vm/"
(cd "$here" && CGO_ENABLED=0 go build -o "$tmp/job/vm/helper" ./guest/helper)
kvof=${KVOF:-$here/../../bin/kvof}
[ ! -e "$kvof" ] || cp "$kvof" "$tmp/job/vm/kvof"
n=0
for script; do cp "$script" "$(printf '%s/job/vm/%03d-%s' "$tmp" $((n++)) "$(basename "$script")")"; done
for name in ${!VM_*}; do printf 'export %s=%q\n' "$name" "${!name}"; done > "$tmp/job/vm/env"
# The kernel unpacks archives that follow one another; ours brings /init.
{ cat "$image/initrd" && (cd "$tmp/job" && find . | cpio --quiet -o -H newc); } > "$tmp/initrd"
truncate -s 8G "$tmp/disk"

# hardened_usercopy: Linux 6.1 takes a socket's data for an overrun, and stops the reader, when it comes from
# a huge page of a host on the same machine.
append=(console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on audit=0 apparmor=0 nowatchdog
	no_timer_check tsc=reliable hardened_usercopy=off rcupdate.rcu_cpu_stall_suppress=1)

# The scripts write to the second serial port. isa-debug-exit makes QEMU exit with
# 2 * n + 1 for the n that the guest writes: one more than the number that failed, for 1 is QEMU's own.
status=0
timeout --foreground -k 5 "$limit" qemu-system-x86_64 -accel tcg,thread=multi -M q35 -cpu max -smp "$cpus" -m "$memory" \
	-nodefaults -no-user-config -display none -no-reboot -nic none \
	-kernel "$image/vmlinuz" -initrd "$tmp/initrd" -append "${append[*]}" \
	-serial "$console" -serial file:/dev/stdout \
	-drive "file=$tmp/disk,if=virtio,format=raw,cache=unsafe,discard=unmap" -device virtio-rng-pci \
	-device isa-debug-exit,iobase=0xf4 < /dev/null | cat || status=${PIPESTATUS[0]}
if [ $status = 124 ] || [ $status = 137 ]; then
	echo "run.sh: no end within $limit s" >&2
	exit 124
elif ((status < 3 || status % 2 == 0)); then
	echo "run.sh: the guest died (run with -v to see its console)" >&2
	exit 125
fi
exit $((status / 2 - 1))
