. /vm/lib.sh
configure > kvof.toml
start_target

# cycle N: connects ten at a time, N times, with data on one of them, and disconnects.
cycle() {
	local i c all
	for ((i = 0; i < $1; i++)); do
		for host in {0..9}; do attach $disks $io $host nr_io_queues=1 & done
		wait $(jobs -p | grep -vx $target)
		all=$(controllers $disks)
		[ "$(wc -w <<< "$all")" = 10 ]
		kv=$(generic $disks 1)
		store 01 /etc/hosts
		answers 0
		for c in $all; do echo 1 > "/sys/class/nvme/$c/delete_controller" & done
		wait $(jobs -p | grep -vx $target)
	done
}
resident() { awk '/^VmRSS/ {print $2}' /proc/$target/status; } # KiB
descriptors() { ls /proc/$target/fd | wc -l; }

it '200 connects and disconnects, ten at a time, leak no memory, descriptor or controller'
cycle 2
wait_for 10 has_controllers 0
fds=$(descriptors) memory=$(resident)
cycle 18
wait_for 10 has_controllers 0
wait_for 10 test "$(descriptors)" -le "$fds"
echo "resident memory: $memory KiB before, $(resident) KiB after"
[ "$(resident)" -le $((memory + 8192)) ]

[ $transport = rdma ] || exit 0
it '1000 connects in a burst, twice, leak no memory, descriptor, controller or RDMA resource'
resources() { rdma resource show | grep -o '\(cq\|qp\|cm_id\|srq\) [0-9]*' | tr '\n' ' '; } # memory regions are kept with the memory
has_no_more() { [ "$(descriptors)" -le "$fds" ] && [ "$(resources)" = "$before" ]; }
burst() {
	/vm/helper rdma-burst $ip:$io 1000
	wait_for 60 has_controllers 0
	wait_for 30 has_no_more
}
before=$(resources)
burst
memory=$(resident)
burst
echo "resident memory: $memory KiB before, $(resident) KiB after; $before"
[ "$(resident)" -le $((memory + 16384)) ]
