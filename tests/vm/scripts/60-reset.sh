. /vm/lib.sh
configure > kvof.toml
start_target
connect $disks --keep-alive-tmo=5
ctrl=$(controllers $disks) disk=$(block $disks 3) kv=$(generic $disks 1)
store 01 /etc/hosts
answers 0

it 'nvme reset under I/O: the I/O goes on, and its data is right'
fio --name=reset --filename="$disk" --direct=1 --ioengine=io_uring --iodepth=8 --rw=randwrite --bs=16k --size=64m \
	--rate=8m --verify=crc32c --verify_fatal=1 --output=fio.log &
fio=$!
for i in 1 2 3; do
	sleep 2
	kill -0 $fio
	nvme reset "/dev/$ctrl"
	wait_for 10 live "$ctrl"
done
wait $fio
retrieve 01 "$(stat -c %s /etc/hosts)"
answers 0
same out /etc/hosts

it 'an idle connection outlives twice its keep-alive time-out'
dmesg --clear
cntlid=$(cat "/sys/class/nvme/$ctrl/cntlid")
sleep 11
live "$ctrl"
[ "$(cat "/sys/class/nvme/$ctrl/cntlid")" = "$cntlid" ]
[ -z "$(dmesg | grep nvme)" ]
