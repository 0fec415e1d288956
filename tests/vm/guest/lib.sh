# lib.sh: what every script in the guest begins with. A script is a row of steps:
#
#	it 'does what its name says'
#	COMMANDS...
#
# A step passes when none of its commands fails; a step that fails ends its script, after what its
# commands, the target and the kernel said. Scripts start their own target, with nothing in it.
# The variable transport, tcp or rdma, says by which way everything goes; no script has two ways. The variable soft,
# rxe or siw, is the kind of RDMA device: soft-RoCE or soft-iWARP.
set -eEuo pipefail
shopt -s inherit_errexit

transport=${transport:-tcp} soft=${soft:-rxe}
script=$(basename "$0" .sh) script=$transport/${script#*-} step=setup
mkdir -p "/data/$script"
cd "/data/$script"
dmesg --clear
exec 3>&1 > output 2>&1

it() { pass; step=$*; began=$SECONDS; }
pass() { [ "$step" = setup ] || echo "PASS $script: $step ($((SECONDS - began)) s)" >&3; }
fails() { ! "$@"; }
die() { echo "$*" >&2; return 1; }

# wait_for SECONDS COMMAND...: until the command succeeds; prints what it then says.
wait_for() {
	local out end=$((SECONDS + $1 + 1))
	shift
	until out=$("$@" 2> /dev/null); do
		[ $SECONDS -lt $end ] || die "still not so: $*"
		sleep 0.1
	done
	[ -z "$out" ] || echo "$out"
}

finish() {
	local status=$?
	trap - ERR EXIT
	set +e +o pipefail
	nvme disconnect-all
	for job in $(jobs -p); do kill $job; done
	complain() { [ $status != 0 ] || failed=$1 status=1; }
	[ -z "${target:-}" ] || wait $target || complain "the target ended with status $?"
	dmesg | grep -E 'WARNING:|BUG:|Oops|Call Trace|blocked for more' && complain 'the kernel complains'
	if [ $status = 0 ]; then
		pass
	else
		echo "FAIL $script: $step ($failed)" >&3
		dmesg > kernel.log
		tail -n 40 output kvof.log kernel.log >&3
		[ ! -e /dev/peer ] || peer 'dmesg > kernel.log; tail -n 40 output kvof.log kernel.log >&3'
	fi
	exit $status
}

# at names the line of the script that came to LINENO in some function, or is there itself.
at() { local line=${BASH_LINENO[-2]}; echo "line $line: $(sed -n "${line}p" "$0")"; }
trap 'failed=$(at)' ERR
trap 'failed="its time is over"; exit 1' TERM
trap finish EXIT

# ---- the network

# ethernet DEVICE ADDRESS: sets the device up, and on it an RDMA device where the transport needs it. A guest's own
# traffic stays inside of that: for a link that can be lost it takes two guests.
ethernet() {
	ip link set $1 mtu 9000 up
	ip addr replace $2/24 dev $1
	[ $transport = rdma ] && [ ! -e /sys/class/infiniband/soft0 ] || return 0
	modprobe -a ${soft/rxe/rdma_rxe} rdma_ucm ib_uverbs nvme_rdma
	rdma link add soft0 type $soft netdev $1
}

# peer COMMAND...: done by the other guest, in its own copy of this shell.
peer() {
	local status
	echo "$*" > /dev/peer
	read -r status < /dev/peer
	[ "$status" = 0 ] || die "the peer: $*"
}

# lose_link: from now on nothing that one of two guests sends reaches the other, until return_link.
# (An interface that is set down leaves soft-RoCE's connection manager stuck.)
lose_link() {
	peer 'tc qdisc add dev eth0 root netem loss 100%'
	tc qdisc add dev eth0 root netem loss 100%
}
return_link() {
	peer 'tc qdisc del dev eth0 root'
	tc qdisc del dev eth0 root
}

# ---- drives: those that run.sh was told of

# drive SERIAL: the name (nvme0) of its controller.
drive() {
	modprobe nvme poll_queues=1
	wait_for 10 find_drive "$1"
}
find_drive() {
	local file
	file=$(grep -lx "$1 *" /sys/class/nvme/*/serial) || return
	basename "${file%/serial}"
}

# remove_drive SERIAL takes it out of its slot, and insert_drive SERIAL puts it back.
remove_drive() { echo "device_del $1" > /dev/monitor; }
insert_drive() { echo "device_add $(grep ",serial=$1," /vm/drives)" > /dev/monitor; }

# ---- the target

ip=127.0.0.1 io=4420 discovery=8009
# largest is the largest payload of one command: the kernel's host has no limit over TCP, and 1 MiB over RDMA, less a
# page over soft-iWARP.
largest=$((16 << 20))
# Where there are two guests, the target is in the peer.
if [ -e /dev/peer ]; then
	ip=10.0.0.2
	ethernet eth0 10.0.0.$(grep -qw peer /proc/cmdline && echo 2 || echo 1)
elif [ $transport = rdma ]; then
	ip=10.0.0.1
	[ -e /sys/class/net/veth0 ] || ip link add veth0 type veth peer name veth1
	ip link set veth1 mtu 9000 up
	ethernet veth0 $ip
fi
case $transport$soft in
rdmarxe) discovery=$io largest=$((1 << 20)) ;;
rdmasiw) discovery=$io largest=$((1020 << 10)) ;;
esac
disks=nqn.2026-11.dev.kvof:disks   # namespace 1: KV; 2 and 3: block, with LBAs of 512 and 4096 bytes
memory=nqn.2026-11.dev.kvof:memory # namespace 1: KV, values up to 512 KiB; 2: block

# configure [NSID] prints the configuration all scripts use, with one more disk on request.
configure() {
	cat <<-END
		[memory]
		arena = "256MiB"

		[[listener]]
		transport = "$transport"
		address = "$ip:$io"

		[discovery]
		address = ["$ip:8009"]

		[[subsystem]]
		nqn = "$disks"
		allow_any_host = true
	END
	namespace 1 kv file kv.img 3GiB
	namespace 2 block file block512.img 512MiB 512
	namespace 3 block file block4096.img 512MiB 4096
	[ $# = 0 ] || namespace "$1" block file "block$1.img" 64MiB 4096
	cat <<-END

		[[subsystem]]
		nqn = "$memory"
		allow_any_host = true
	END
	namespace 1 kv memory '' 8MiB
	echo 'max_value = "512KiB"'
	echo 'eviction = "never"'
	namespace 2 block memory '' 256MiB 4096
}

# namespace NSID TYPE DEVICE PATH [SIZE [LBA_SIZE]]
namespace() {
	printf '\n[[subsystem.namespace]]\nnsid = %s\ntype = "%s"\ndevice = "%s"\n' "$1" "$2" "$3"
	[ -z "$4" ] || echo "path = \"$4\""
	[ -z "${5:-}" ] || echo "size = \"$5\""
	[ -z "${6:-}" ] || echo "lba_size = $6"
}

# sized DISK BYTES: a disk appears a moment before its size does.
sized() { [ "$(blockdev --getsize64 "$1")" = "$2" ]; }

listens() {
	case $transport in
	tcp) (: < "/dev/tcp/$ip/$1") 2> /dev/null ;;
	rdma) rdma resource show cm_id | grep -q "LISTEN .*src-addr $ip:$1 " ;;
	esac
}
start_target() {
	local before
	before=$(starts)
	/vm/kvof serve --config kvof.toml >> kvof.log 2>&1 &
	target=$!
	wait_for 60 started $before
}
starts() { cat kvof.log 2> /dev/null | grep -c 'INFO  serving ' || true; } # times that a target of this script was ready
started() { kill -0 $target && [ "$(starts)" -gt "$1" ]; }
kill_target() { kill "-$1" $target; wait $target || true; }
status() { /vm/kvof status --json "$@"; }
has_controllers() { [ "$(status | jq '.controllers | length')" = "$1" ]; } # COUNT

# ---- the host

connect() { nvme connect -t $transport -a $ip -s $io -n "$@"; }

# attach NQN PORT HOST [OPTION]: connects as the host with that number, beside other connections, which Debian 12's nvme-cli cannot.
attach() {
	local id=00000000-0000-0000-0000-00000000000$3
	echo "nqn=$1,transport=$transport,traddr=$ip,trsvcid=$2,hostnqn=nqn.2014-08.org.nvmexpress:uuid:$id,hostid=$id,keep_alive_tmo=30,duplicate_connect${4:+,$4}" \
		> /dev/nvme-fabrics
}

# controllers NQN: the names (nvme0) of the connected controllers.
controllers() {
	local c
	for c in /sys/class/nvme/nvme*; do
		[ "$(cat "$c/subsysnqn" 2>/dev/null)" != "$1" ] || basename "$c"
	done
}
live() { [ "$(cat "/sys/class/nvme/$1/state")" = live ]; }

# generic NQN NSID and block NQN NSID: the namespace's device, as soon as there is one.
generic() { wait_for 10 find_device "$@"; }
block() {
	local device
	device=$(generic "$@")
	wait_for 10 test -b "${device/ng/nvme}"
	echo "${device/ng/nvme}"
}
find_device() {
	local g nqn
	for g in /sys/class/nvme-generic/ng*; do
		read -r nqn < "$g/device/subsysnqn" || continue
		if [[ $nqn = "$1" && $(nvme get-ns-id "/dev/${g##*/}") = *"namespace-id:$2" ]]; then
			echo "/dev/${g##*/}"
			return
		fi
	done
	return 1
}

# ---- Key Value commands, to namespace 1 of the generic device $kv, by the way of $via
# Each leaves the command's status (type and code, hexadecimal) in $sc and DW0 (decimal) in $dw0.

via=ioctl

ioctl() { # DEVICE NSID OPCODE CDW2 CDW3 CDW10 ... CDW15 LENGTH FILE, as helper uring-cmd
	local data=() out=/dev/null text
	if [ "${12}" != 0 ]; then
		data=(--data-len="${12}")
		if [ $(($3 & 3)) = 2 ]; then data+=(--read --raw-binary) out=${13}; else data+=(--write --input-file="${13}"); fi
	fi
	text=$(nvme io-passthru "$1" --namespace-id="$2" --opcode="$3" --cdw2="$4" --cdw3="$5" --cdw10="$6" --cdw11="$7" \
		--cdw12="$8" --cdw13="$9" --cdw14="${10}" --cdw15="${11}" "${data[@]}" 2>&1 > "$out") || true
	case $text in
	*Success*result:*) echo "0 ${text##*result: 0x}" ;;
	*"NVMe status"*) text=${text##*(0x} && echo "${text%%)*} 0" ;;
	*) die "nvme io-passthru: $text" ;;
	esac
}

# kv_command OPCODE KEY SIZE LENGTH FILE [OPTION]
kv_command() {
	local opcode=$1 key=$2 size=$3 length=$4 file=$5 option=${6:-0} k i dwords=() send=(ioctl)
	[ $via = ioctl ] || send=(/vm/helper uring-cmd)
	k=${key}00000000000000000000000000000000
	for i in 0 8 16 24; do dwords+=("0x${k:i+6:2}${k:i+4:2}${k:i+2:2}${k:i:2}"); done
	# Clients leave what they like in CDW12 and CDW13.
	read -r sc dw0 < <("${send[@]}" "$kv" 1 "$opcode" "${dwords[@]:0:2}" "$size" $((${#key} / 2 | option << 8)) \
		0x77 0x88 "${dwords[@]:2}" "$length" "$file") || return
	printf -v sc %x $((0x$sc & 0x7ff))
	dw0=$((0x$dw0))
}
store() { # KEY FILE [OPTION]
	local size
	size=$(stat -c %s "$2")
	kv_command 0x01 "$1" "$size" "$size" "$2" "${3:-0}"
}
retrieve() { kv_command 0x02 "$1" "$2" "$2" out; } # KEY SIZE, to the file out
exist() { kv_command 0x14 "$1" 0 0 -; }
delete() { kv_command 0x10 "$1" 0 0 -; }
list() { kv_command 0x06 "$1" "$2" "$2" out; } # FROM SIZE, to the file out
answers() { [ "$sc $dw0" = "$1 ${2:-$dw0}" ] || die "status $sc, DW0 $dw0; expected $*"; }
same() { [ "$(sha256sum < "$1")" = "$(sha256sum < "$2")" ] || die "$1 and $2 differ"; }

# median prints the median, the lowest and the highest of the numbers it reads.
median() { sort -n | awk '{ v[NR] = $1 } END { printf "%.2f %.2f %.2f\n", v[int((NR + 1) / 2)], v[1], v[NR] }'; }
