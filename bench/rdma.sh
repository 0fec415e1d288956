# rdma.sh compares kvof with the kernel's own target over soft-RoCE, in a guest of tests/vm: both serve the same
# emulated drive to the kernel's host, and take turns. Prints the tables for RESULTS.md.
#
#	tests/vm/run.sh -t 900 -m 4G -d size=2G,lba=4096 latest transport=rdma [rounds=5] [seconds=4] bench/rdma.sh
. /vm/lib.sh
rounds=${rounds:-5} seconds=${seconds:-4}
drive=/dev/$(drive drive0)n1

it 'both targets serve the drive'
{
	configure
	printf '\n[[subsystem]]\nnqn = "nqn.2026-11.dev.kvof:bench"\nallow_any_host = true\n'
	namespace 1 block "${device:-block}" "$drive" 1GiB 4096
} > kvof.toml
start_target
modprobe nvmet_rdma
mount -t configfs config /sys/kernel/config
(
	cd /sys/kernel/config/nvmet
	mkdir subsystems/nqn.nvmet subsystems/nqn.nvmet/namespaces/1 ports/1
	echo 1 > subsystems/nqn.nvmet/attr_allow_any_host
	echo "$drive" > subsystems/nqn.nvmet/namespaces/1/device_path
	echo 1 > subsystems/nqn.nvmet/namespaces/1/enable
	echo rdma > ports/1/addr_trtype
	echo ipv4 > ports/1/addr_adrfam
	echo $ip > ports/1/addr_traddr
	echo 4421 > ports/1/addr_trsvcid
	ln -s subsystems/nqn.nvmet ports/1/subsystems/
)
connect nqn.2026-11.dev.kvof:bench
io=4421 connect nqn.nvmet
kvof=$(block nqn.2026-11.dev.kvof:bench 1) nvmet=$(block nqn.nvmet 1)
fio --name=fill --filename="$kvof" --direct=1 --rw=write --bs=1m --size=1g

# measure TARGET RW SIZE DEPTH prints MiB/s, the CPUs busy in the whole guest, and p50, p99 and p99.9 in ms.
measure() {
	local before after
	before=$(busy)
	fio --name=measure --filename="$1" --direct=1 --ioengine=io_uring --rw="$2" --bs="$3" --iodepth="$4" --size=1g \
		--time_based --runtime="$seconds" --output-format=json > json
	after=$(busy)
	jq -r --argjson busy $((after - before)) '.jobs[0] | (.read, .write) | select(.io_bytes > 0) |
		"\(.bw_bytes / 1048576) \($busy / 1000 / (.runtime / 1000) * 10) " +
		(.clat_ns.percentile | [.["50.000000", "99.000000", "99.900000"] / 1000000 | tostring] | join(" "))' json
}
busy() { awk '/^cpu / { print $2 + $3 + $4 + $7 + $8 }' /proc/stat; } # hundredths of a second

it 'throughput'
echo "Linux $(uname -r), $(nproc) CPUs, $rounds rounds of $seconds s" >&3
echo '| | kvof MiB/s | nvmet-rdma MiB/s | ratio | min-max | kvof CPUs | nvmet-rdma CPUs | kvof p50 / p99 / p99.9 ms | nvmet-rdma ms |
|---|---|---|---|---|---|---|---|---|' >&3
for test in 'randread 4k 1' 'randread 4k 32' 'read 128k 4' 'write 128k 4' 'read 1m 4' 'write 1m 4'; do
	: > a
	: > b
	for ((i = 0; i < rounds; i++)); do
		measure "$kvof" $test >> a
		measure "$nvmet" $test >> b
	done
	paste a b | awk '{ print $1 / $6 }' | median > ratio
	column() { awk "{ print \$$2 }" "$1" | median | cut -d ' ' -f 1; }
	latency() { echo "$(column $1 3) / $(column $1 4) / $(column $1 5)"; }
	read -r middle low high < ratio
	echo "| $test | $(column a 1) | $(column b 1) | **$middle** | $low-$high | $(column a 2) | $(column b 2) | $(latency a) | $(latency b) |" >&3
done
nvme disconnect-all
