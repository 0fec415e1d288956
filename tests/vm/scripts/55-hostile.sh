# What the kernel's host never does: over RDMA alone.
. /vm/lib.sh
[ $transport = rdma ] || exit 0
configure > kvof.toml
start_target
connect $disks
kv=$(generic $disks 1) disk=$(block $disks 3)
head -c $largest /dev/urandom > value
store 01 value
answers 0

# asks RECFMT QID HRQSIZE HSQSIZE: for a connection, and prints the target's answer.
asks() {
	local n private=
	for n; do private+=$(printf '%02x%02x' $((n & 255)) $((n >> 8))); done
	/vm/helper rdma-connect $ip:$io "$private$(printf '%048d' 0)" ${reads:-1}
}

it 'a connection is accepted with the queue that it asks for, or refused with the status that says why'
[ "$(asks 0 0 32 31)" = 'accepted 32' ]
[ "$(asks 1 0 32 31)" = 'refused 2' ]     # record format
[ "$(asks 0 65535 32 31)" = 'refused 3' ] # queue identifier
[ "$(asks 0 1 128 1023)" = 'refused 4' ]  # deeper than what is offered
[ "$(asks 0 0 128 4095)" = 'refused 4' ]  # an admin queue
[ "$(asks 0 1 128 0)" = 'refused 4' ]
[ "$(asks 0 0 0 31)" = 'refused 5' ]
if [ $soft = siw ]; then
	[ "$(/vm/helper rdma-connect $ip:$io 0000 1)" = 'refused 1' ] # too short; InfiniBand pads it
else
	[ "$(reads=0 asks 0 0 32 31)" = 'refused 7' ] # nothing can be fetched; iWARP does not always tell
fi

it 'a wrong key ends the connection it came by, and no other'
fio --name=verify --filename="$disk" --direct=1 --ioengine=io_uring --iodepth=8 --rw=randwrite --bs=16k --size=24m --rate=1m \
	--verify=crc32c --verify_fatal=1 --output=fio.log &
fio=$!
cntlid=$(cat "/sys/class/nvme/$(controllers $disks)/cntlid")
/vm/helper rdma-wrong-key $ip:$io 20
kill -0 $fio
wait $fio
[ "$(cat "/sys/class/nvme/$(controllers $disks)/cntlid")" = "$cntlid" ]
wait_for 10 has_controllers 1
retrieve 01 $largest
answers 0 $largest
same out value
[ -z "$(dmesg | grep -i 'nvme.*\(reset\|reconnect\|error\)')" ]
