#!/bin/bash
# run.sh [-t SECONDS] [-c CPUS] [-m MEMORY] [-d DRIVE]... [-2] [-v] KERNEL [NAME=VALUE]... SCRIPT...
#
# Boots a throw-away guest with KERNEL (see setup.sh), runs each SCRIPT in it as root, streams
# their output and exits with the number of scripts that failed; 124: the time limit was hit.
#   -d  adds an emulated NVMe drive beside the target, with the serial number drive0, drive1 and so on. DRIVE is a list,
#       with commas, of size=SIZE (default 1G), lba=BYTES (512), mdts=EXPONENT (9, 2 MiB),
#       fdp=HANDLES (reclaim unit handles; none) and bad=SECTOR (its reads are media errors; none)
#   -2  boots a second guest, the peer, on the same Ethernet segment, for scripts with `peer COMMAND`
#   -v  also shows the kernel's console
# NAME=VALUE reaches the scripts after it as a variable. KVOF is the binary the guest gets (default bin/kvof, or
# bin/kvof-arm64).
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
limit=600 cpus=2 memory=4G guests=guest console=null drives=() devices=()
while getopts t:c:m:d:2v option; do
	case $option in
	t) limit=$OPTARG ;;
	c) cpus=$OPTARG ;;
	m) memory=$OPTARG ;;
	d) drives+=("$OPTARG") ;;
	2) guests='peer guest' ;;
	v) console=file:/dev/stderr ;;
	*) exit 2 ;;
	esac
done
shift $((OPTIND - 1))
[ $# -ge 2 ] || { sed -n 's/^# //; 2p' "$0" >&2; exit 2; }
image=$("$here/setup.sh" "$1")
if [ "$1" = arm64 ]; then
	suffix=-arm64
	export GOARCH=arm64 CC=aarch64-linux-gnu-gcc CGO_CFLAGS='-O2 -idirafter /usr/include'
	machine=(qemu-system-aarch64 -M virt,gic-version=3 -cpu cortex-a72) tty=ttyAMA0
else
	suffix=
	# Without its carry-less multiplication: emulated, it makes soft-RoCE's checksum slower.
	machine=(qemu-system-x86_64 -M q35 -cpu max,-pclmulqdq) tty=ttyS0
fi
shift

tmp=$(mktemp -d)
trap 'kill $(jobs -p) 2> /dev/null || true; rm -rf "$tmp"' EXIT
mkdir -p "$tmp/job/vm"
cp "$here"/guest/{init,lib.sh,peer.sh} "$tmp/job/vm/"
(cd "$here" && CGO_ENABLED=1 go build -ldflags=-checklinkname=0 -tags=rdma -o "$tmp/job/vm/helper" ./guest/helper)
kvof=${KVOF:-$here/../../bin/kvof$suffix}
[ ! -e "$kvof" ] || cp "$kvof" "$tmp/job/vm/kvof"

# The guest's plan: in each line what env takes.
n=0 variables=
for argument; do
	case $argument in
	*.sh)
		name=$(printf '%03d-%s' $((n++)) "$(basename "$argument")")
		cp "$argument" "$tmp/job/vm/$name"
		echo "$variables bash /vm/$name" ;;
	*=*) variables+=" $(printf %q "$argument")" ;;
	esac
done > "$tmp/job/vm/plan"
# drive I LIST adds the QEMU options of drive I to $devices, and its controller to /vm/drives.
drive() {
	local size=1G lba=512 mdts=9 fdp= bad= property file=$tmp/drive$1 subsystem=nvme-subsys,id=subsystem$1 placement= controller
	for property in ${2//,/ }; do declare "$property"; done
	truncate -s "$size" "$file"
	file="{\"driver\":\"file\",\"filename\":\"$file\",\"discard\":\"unmap\",\"cache\":{\"no-flush\":true}}"
	[ -z "$bad" ] || file="{\"driver\":\"blkdebug\",\"image\":$file,\"inject-error\":[{\"event\":\"none\",\"iotype\":\"read\",\"sector\":$bad,\"errno\":5}]}"
	if [ -n "$fdp" ]; then
		subsystem+=",fdp=on,fdp.runs=16M,fdp.nrg=1,fdp.nruh=$fdp"
		placement=",fdp.ruhs=$(seq -s ';' 0 $((fdp - 1)))"
	fi
	controller="nvme,id=drive$1,serial=drive$1,bus=slot$1,subsys=subsystem$1,mdts=$mdts,max_ioqpairs=16,msix_qsize=17"
	devices+=(-blockdev "{\"driver\":\"raw\",\"node-name\":\"media$1\",\"file\":$file}" -device "$subsystem"
		-device "pcie-root-port,id=slot$1,chassis=$1" -device "$controller"
		-device "nvme-ns,drive=media$1,bus=drive$1,nsid=1,logical_block_size=$lba,physical_block_size=$lba$placement")
	echo "$controller" >> "$tmp/job/vm/drives"
}

for i in "${!drives[@]}"; do drive "$i" "${drives[i]}"; done

# The kernel unpacks archives that follow one another; ours brings /vm.
{ cat "$image/initrd" && (cd "$tmp/job" && find . | cpio --quiet -o -H newc); } > "$tmp/initrd"

# hardened_usercopy: Linux 6.1 takes a socket's data for an overrun, and stops the reader, when it comes from
# a huge page of a host on the same machine.
append=(console=$tty quiet panic=-1 mitigations=off random.trust_cpu=on audit=0 apparmor=0 nowatchdog
	no_timer_check tsc=reliable hardened_usercopy=off rcupdate.rcu_cpu_stall_suppress=1)

# boot NAME QEMU_OPTION... The guest's ports: its output, the number of scripts that failed, QEMU's monitor, and the
# other guest.
boot() {
	local name=$1
	shift
	[ "$name" = guest ] || append+=("$name")
	cp --sparse=always "$image/disk" "$tmp/$name.disk"
	timeout --foreground -k 5 "$limit" "$image/qemu/usr/lib64/ld-linux-x86-64.so.2" --library-path "$image/qemu/usr/lib/x86_64-linux-gnu" \
		"$image/qemu/usr/bin/${machine[0]}" "${machine[@]:1}" -L "$image/qemu/usr/share/qemu" -L "$image/qemu/usr/share/seabios" \
		-accel tcg,thread=multi -smp "$cpus" -m "$memory" \
		-nodefaults -no-user-config -display none -no-reboot -nic none -serial "$console" \
		-kernel "$image/kernel" -initrd "$tmp/initrd" -append "${append[*]}" \
		-drive "file=$tmp/$name.disk,if=virtio,format=raw,cache=unsafe,discard=unmap" -device virtio-rng-pci \
		-device virtio-serial-pci \
		-chardev file,id=status,path="$tmp/$name.status" \
		-chardev socket,id=monitor,path="$tmp/$name.monitor",server=on,wait=off -mon monitor \
		-chardev socket,id=line,path="$tmp/$name.monitor" \
		-device virtserialport,name=failed,chardev=status -device virtserialport,name=monitor,chardev=line \
		"$@" < /dev/null
}

status=0
if [ "$guests" = guest ]; then
	boot guest "${devices[@]}" -chardev file,id=out,path=/dev/stdout -device virtserialport,name=output,chardev=out | cat || status=${PIPESTATUS[0]}
else
	boot peer "${devices[@]}" -device virtio-net-pci,netdev=lan,mac=52:54:00:00:00:02,romfile= -netdev "stream,id=lan,server=on,addr.type=unix,addr.path=$tmp/lan" \
		-chardev "socket,id=peer,path=$tmp/peer,server=on,wait=off" -device virtserialport,name=peer,chardev=peer \
		-chardev file,id=out,path=/dev/stderr -device virtserialport,name=output,chardev=out &
	until [ -S "$tmp/lan" ] && [ -S "$tmp/peer" ]; do sleep 0.1; done
	boot guest -device virtio-net-pci,netdev=lan,mac=52:54:00:00:00:01,romfile= -netdev "stream,id=lan,server=off,addr.type=unix,addr.path=$tmp/lan" \
		-chardev "socket,id=peer,path=$tmp/peer" -device virtserialport,name=peer,chardev=peer \
		-chardev file,id=out,path=/dev/stdout -device virtserialport,name=output,chardev=out | cat || status=${PIPESTATUS[0]}
fi
if [ $status = 124 ] || [ $status = 137 ]; then
	echo "run.sh: no end within $limit s" >&2
	exit 124
elif [ ! -s "$tmp/guest.status" ]; then
	echo "run.sh: the guest died (run with -v to see its console)" >&2
	exit 125
fi
exit "$(cat "$tmp/guest.status")"
