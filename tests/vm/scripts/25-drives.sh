# On emulated NVMe drives: see tests/vm/test.sh.
. /vm/lib.sh
# ng SERIAL: the generic device of the drive's namespace. Once the drive was taken out, its numbers are not the controller's.
ng() {
	local file
	drive "$1" > /dev/null
	file=$(grep -lx "$1 *" /sys/class/nvme-generic/ng*/device/serial | tail -n 1)
	echo "/dev/$(basename "${file%/device/serial}")"
}
drives=nqn.2026-11.dev.kvof:drives
config() {
	configure
	printf '\n[[subsystem]]\nnqn = "%s"\nallow_any_host = true\n' $drives
	namespace 1 kv nvme "$(ng drive0)"    # LBAs of 4096 bytes
	namespace 2 block nvme "$(ng drive1)" # 32 KiB in one command
	namespace 3 block nvme "$(ng drive2)" # flexible data placement
	echo 'placement = 2'
	namespace 4 block nvme "$(ng drive3)" # a sector that cannot be read
}
config > kvof.toml
start_target
connect $drives
kv=$(generic $drives 1)
for nsid in 2 3 4; do disk[nsid]=$(block $drives $nsid); done

it 'Key Value on a drive: values up to one command come back, also after a restart'
for size in 1 4096 $((largest / 4 + 1)) $largest; do
	head -c $size /dev/urandom > v$size
	store "a$(printf %07x $size)" v$size
	answers 0
done
values() {
	for size in 1 4096 $((largest / 4 + 1)) $largest; do
		retrieve "a$(printf %07x $size)" $size
		answers 0 $size
		same out v$size
	done
}
values

it 'block namespaces are whole drives: size, LBA format, and larger commands than the drive takes'
for nsid in 2 3 4; do
	local=/dev/$(drive drive$((nsid - 1)))n1
	wait_for 10 sized "${disk[nsid]}" "$(blockdev --getsize64 "$local")"
	[ "$(blockdev --getss "${disk[nsid]}")" = "$(blockdev --getss "$local")" ]
done
for nsid in 2 3; do
	fio --name=verify --filename="${disk[nsid]}" --direct=1 --ioengine=io_uring --iodepth=8 --rw=randwrite --bsrange=4k-1m \
		--size=64m --verify=crc32c --verify_fatal=1 --output=fio.log
done

it 'flexible data placement: what is written goes to the handle of the configuration'
available() { nvme fdp status "$(ng drive2)" -o json | jq -c '[.ruhss[].ruamw]'; }
before=$(available)
head -c 65536 /dev/urandom > data
nvme write "${disk[3]}" --start-block=0 --block-count=15 --data-size=65536 --data=data
after=$(available)
[ "$(jq -cn "[$before, $after] | transpose | map(.[0] != .[1])")" = '[false,true,false,false]' ]

it 'Verify, Compare, Copy, Write Zeroes and Deallocate of a block namespace reach the drive'
local=/dev/$(drive drive2)n1
on_drive() { dd if="$local" bs=4096 skip=$1 count=16 iflag=direct; } # BLOCK
at_64() { nvme "$1" "${disk[3]}" --start-block=64 --block-count="$2" "${@:3}"; } # COMMAND BLOCKS-1
nvme copy "${disk[3]}" --sdlba=64 --slbs=0 --blocks=15
on_drive 64 | cmp - data
at_64 verify 15
at_64 compare 15 --data-size=65536 --data=data
fails at_64 compare 14 --data-size=61440 --data=<(tail -c 61440 data)
at_64 write-zeroes 7
on_drive 64 | cmp - <(head -c 32768 /dev/zero; tail -c 32768 data)
nvme dsm "${disk[3]}" --ad --slbs=64 --blocks=16 # advice, which QEMU does not take

it 'a media error stays one, and its neighbours are read'
nvme read "${disk[4]}" --start-block=204792 --block-count=7 --data-size=4096 --data=out
fails nvme read "${disk[4]}" --start-block=204800 --block-count=7 --data-size=4096 --data=out 2> error
cat error
grep -i 'unrecovered read error\|0x281\|0x4281' error
nvme read "${disk[4]}" --start-block=204808 --block-count=7 --data-size=4096 --data=out

it 'a drive that is taken out under load is an error of its namespace only, until it is back'
fio --name=lost --filename="${disk[2]}" --direct=1 --ioengine=io_uring --iodepth=8 --rw=randwrite --bs=64k --time_based --runtime=60 \
	--output=lost.log &
lost=$!
sleep 2
remove_drive drive1
fails wait $lost
values
kill -0 $target
insert_drive drive1
back() { dd if="${disk[2]}" of=/dev/null bs=4096 count=1 iflag=direct; }
wait_for 30 back
fio --name=verify --filename="${disk[2]}" --direct=1 --ioengine=io_uring --iodepth=8 --rw=randwrite --bsrange=4k-1m \
	--size=16m --verify=crc32c --verify_fatal=1 --output=fio.log

it 'values are on the drive after a restart'
nvme disconnect-all
kill_target TERM
config > kvof.toml # the drive that was taken out may have another name now
start_target
connect $drives
kv=$(generic $drives 1)
values
