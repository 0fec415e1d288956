# The target is in the peer. While a link is lost, nothing that either side sends arrives.
. /vm/lib.sh
peer 'configure > kvof.toml'
peer start_target
connect $disks --reconnect-delay=1 --keep-alive-tmo=5
ctrl=$(controllers $disks) disk=$(block $disks 3) kv=$(generic $disks 1)
head -c $largest /dev/urandom > value
store 01 value
answers 0

# verify SECONDS: writes for as long, then reads everything back.
verify() {
	fio --name=verify --filename="$disk" --direct=1 --ioengine=io_uring --iodepth=8 --rw=randwrite --bsrange=4k-128k --size=32m \
		--rate=$((32 / $1))m --verify=crc32c --verify_fatal=1 --output=fio.log
}
right() {
	retrieve 01 $largest
	answers 0 $largest
	same out value
}
not_live() { fails live "$ctrl"; }

it 'the link is lost for 5 s under I/O, which goes on, with right data'
verify 8 &
fio=$!
sleep 2
lose_link
sleep 5
return_link
wait $fio
wait_for 30 live "$ctrl"
right

it 'the link is lost for longer than the keep-alive time-out: the host connects anew, and one controller is left'
verify 8 &
fio=$!
sleep 2
lose_link
sleep 12
not_live
return_link
wait_for 60 live "$ctrl"
wait $fio
right
peer 'wait_for 30 has_controllers 1'

it 'the host vanishes under I/O: nothing of it is left on the target'
verify 8 &
fio=$!
sleep 2
lose_link
peer 'wait_for 30 has_controllers 0'
return_link
wait_for 60 live "$ctrl"
wait $fio
right

it 'the target is killed under I/O and started again: the I/O goes on, with right data'
verify 8 &
fio=$!
sleep 2
peer 'kill_target KILL'
sleep 3
peer start_target
wait_for 30 live "$ctrl"
wait $fio
right

it 'the target ends well'
nvme disconnect-all
peer 'kill $target; wait $target'
