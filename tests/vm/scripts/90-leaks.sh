. /vm/lib.sh
configure > kvof.toml
start_target

# cycle N: connects and disconnects N times; every tenth connection carries data.
cycle() {
	local i
	for ((i = 0; i < $1; i++)); do
		connect $disks --nr-io-queues=1
		if ((i % 10 == 0)); then
			kv=$(generic $disks 1)
			store 01 /etc/hosts
			answers 0
		fi
		nvme disconnect -n $disks
	done
}
resident() { awk '/^VmRSS/ {print $2}' /proc/$target/status; } # KiB
descriptors() { ls /proc/$target/fd | wc -l; }
idle() { [ "$(status | jq '.controllers | length')" = 0 ]; }

it '200 connects and disconnects leak no memory, descriptor or controller'
cycle 20
wait_for 10 idle
fds=$(descriptors) memory=$(resident)
cycle 180
wait_for 10 idle
wait_for 10 test "$(descriptors)" -le "$fds"
echo "resident memory: $memory KiB before, $(resident) KiB after"
[ "$(resident)" -le $((memory + 8192)) ]
