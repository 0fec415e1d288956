. /vm/lib.sh
configure > kvof.toml
start_target
head -c $largest /dev/urandom > value

# works OPTIONS...: connects with them, and moves verified data over every queue.
works() {
	connect $disks "$@"
	moves
}
moves() {
	kv=$(generic $disks 1) disk=$(block $disks 3)
	fio --name=verify --filename="$disk" --direct=1 --ioengine=io_uring --iodepth=8 --numjobs=4 --size=8m --offset_increment=8m \
		--rw=randwrite --bsrange=4k-1m --verify=crc32c --verify_fatal=1 --output=fio.log
	for via in ioctl uring; do
		store 5555 value
		answers 0
		retrieve 5555 $largest
		answers 0 $largest
		same out value
	done
}

it 'no option'
works
nvme disconnect -n $disks

if [ $transport = tcp ]; then
	for digests in --hdr-digest --data-digest '--hdr-digest --data-digest'; do
		it "$digests"
		works $digests
		nvme disconnect -n $disks
	done
fi

it 'several I/O queues, some for writes only'
works --nr-io-queues=4 --nr-write-queues=4
[ "$(cat "/sys/class/nvme/$(controllers $disks)/queue_count")" = $((1 + 2 * $(nproc))) ]
nvme disconnect -n $disks

it 'several connections of one host to one subsystem'
attach $disks $io 1
attach $disks $io 1
[ "$(controllers $disks | wc -l)" = 2 ]
[ "$(for c in $(controllers $disks); do cat "/sys/class/nvme/$c/cntlid"; done | sort -u | wc -l)" = 2 ]
moves

[ $transport = rdma ] || exit 0
it 'counters: the target copies no payload, and registers no memory for commands'
counters() { status | jq -c '[.copied, .fabrics[].registrations]'; }
before=$(counters)
fio --name=large --filename="$disk" --direct=1 --ioengine=io_uring --iodepth=8 --rw=randwrite --bsrange=8k-1m --size=16m \
	--verify=crc32c --verify_fatal=1 --output=fio.log # smaller ones come in the capsule
store 5555 value
answers 0
retrieve 5555 $largest
answers 0 $largest
same out value
echo "copied, registrations: $before"
[ "$(counters)" = "$before" ]
