# kvof's engine and fio on the same drive, in turn, from one process with registered buffers: on an emulated NVMe drive
# in a guest, by NVMe commands; or on a file of this machine past the page cache, where also 2 MiB values through the
# whole target, over loopback, are compared with fio's reads of the file that they are in.
#
#	tests/vm/run.sh -t 600 -d size=1G latest rounds=5 bench/drive.sh
#	rounds=5 bash bench/drive.sh FOLDER
#
# One line for each run: size in bytes, depth, who, operations/s, MB/s, us of CPU an operation, median and 99th percentile
# of latency in us. kvof: one operation for all of it; pieces: of 1 MiB, as a store has them; each: of one goroutine for
# each operation in flight, as in a server; block: on the block device; store: values, verified; target: through it.
fio_run() { # FILE SIZE DEPTH OPTION...
	fio --name=run --filename="$1" --size=800m "${@:4}" --fixedbufs=1 --registerfiles=1 --mem=mmaphuge --rw=randread --bs="$2" --iodepth="$3" \
		--time_based --ramp_time=0.5 --runtime="${seconds:-2}" --output-format=json > fio.json
	jq -r '.jobs[0] | .read as $r | [($r.iops | round), ($r.bw_bytes / 1e5 | round / 10),
		((.usr_cpu + .sys_cpu) * $r.runtime * 100 / $r.total_ios | round / 10),
		($r.clat_ns.percentile | (.["50.000000"], .["99.000000"]) / 1000 | round)] | join(" ")' fio.json
}
engine() { "$helper" engine "$1" read "$2" "$3" "${seconds:-2}" "${@:4}"; } # DEVICE SIZE DEPTH [OPTION...]

# compare COMMAND LARGEST: runs it with each size and depth, that often.
compare() {
	local size depth round
	for sized in "4096 1" "4096 32" "131072 8" "1048576 4" "$2 4"; do
		read -r size depth <<< "$sized"
		for ((round = 0; round < ${rounds:-3}; round++)); do "$1" $size $depth; done
	done
}

in_guest() { # SIZE DEPTH
	echo "$1 $2 fio $(fio_run "$ng" $1 $2 --ioengine=io_uring_cmd --cmd_type=nvme)"
	echo "$1 $2 kvof $(engine "$ng" $1 $2 whole)"
	echo "$1 $2 each $(engine "$ng" $1 $2 whole each)"
	echo "$1 $2 block $(engine "$block" $1 $2 block whole)"
	[ $1 -le 262144 ] || echo "$1 $2 pieces $(engine "$ng" $1 $2)"
}

on_file() {
	echo "$1 $2 fio $(fio_run file $1 $2 --ioengine=io_uring --direct=1)"
	echo "$1 $2 kvof $(engine file $1 $2 block whole)"
	echo "$1 $2 each $(engine file $1 $2 block whole each)"
	[ $1 -le 262144 ] || echo "$1 $2 pieces $(engine file $1 $2 block)"
}

if [ -e /vm/lib.sh ]; then
	. /vm/lib.sh
	helper=/vm/helper controller=$(drive drive0)
	ng=/dev/${controller/nvme/ng}n1 block=/dev/${controller}n1
	echo 128 > /proc/sys/vm/nr_hugepages
	it "engine and fio, ${rounds:-3} rounds"
	compare in_guest 2097152 >&3 # what QEMU's drive takes: fio does not split
	for ((round = 0; round < ${rounds:-3}; round++)); do
		echo "2097152 4 fio $(fio_run "$ng" 2097152 4 --ioengine=io_uring_cmd --cmd_type=nvme)"
		echo "2097152 4 store $(engine "$ng" 2097152 4 store)"
	done >&3
	exit
fi

set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd) tmp=$(mktemp -d -p "$1") pages=$(cat /proc/sys/vm/nr_hugepages)
trap 'kill $(jobs -p) 2> /dev/null && wait || true; echo $pages > /proc/sys/vm/nr_hugepages; rm -rf "$tmp"' EXIT
for program in ./cmd/kvof ./tests/vm/guest/helper; do
	(cd "$here" && go build -ldflags=-checklinkname=0 -o "$tmp/" $program)
done
cd "$tmp"
helper=./helper
echo 192 > /proc/sys/vm/nr_hugepages
dd if=/dev/urandom of=file bs=4M count=256 oflag=direct status=none
compare on_file 4194304

cat > kvof.toml <<'END'
[discovery]
address = ["127.0.0.1:18009"]
[[listener]]
transport = "tcp"
address = "127.0.0.1:14420"
[management]
socket = ""
[[subsystem]]
nqn = "nqn.2026-11.dev.kvof:drive"
allow_any_host = true
[[subsystem.namespace]]
nsid = 1
type = "kv"
device = "file"
path = "store"
size = "2GiB"
END
./kvof serve --config kvof.toml 2> kvof.log &
bench() { ./kvof bench --address 127.0.0.1:18009 --op "$1" --size 2MiB --depth 4 --keys 400 --keep --json --time "${seconds:-2}s"; }
until ./kvof discover --address 127.0.0.1:18009 > /dev/null 2>&1; do sleep 0.1; done
bench store > store.json
for ((round = 0; round < ${rounds:-3}; round++)); do
	echo "2097152 4 fio $(fio_run store 2097152 4 --ioengine=io_uring --direct=1)"
	bench retrieve > bench.json
	echo "2097152 4 target $(jq -r '.total | [(.iops, .mb_per_s, .p50_us, .p99_us) | round] | "\(.[0]) \(.[1]) - \(.[2]) \(.[3])"' bench.json)"
done
