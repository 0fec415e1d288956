. /vm/lib.sh
configure > kvof.toml
start_target
connect $disks

for nsid in 2 3; do
	disk=$(block $disks $nsid) lba=$(blockdev --getss "$(block $disks $nsid)")
	name="LBA of $lba bytes:"

	it "$name fio reads back what it wrote"
	fio --name=random --filename="$disk" --direct=1 --ioengine=io_uring --iodepth=16 --rw=randwrite --bsrange=$lba-256k \
		--size=24m --verify=crc32c --verify_fatal=1 --output=fio.log
	fio --name=large --filename="$disk" --direct=1 --ioengine=io_uring --iodepth=4 --rw=write --bs=4m --size=48m \
		--verify=sha256 --verify_fatal=1 --output=fio.log

	it "$name fio reads back through the generic device"
	fio --name=passthrough --filename="${disk/nvme/ng}" --ioengine=io_uring_cmd --cmd_type=nvme --iodepth=16 \
		--rw=randwrite --bs=16k --size=8m --verify=crc32c --verify_fatal=1 --output=fio.log

	it "$name a file system is made, mounted, written, trimmed and checked"
	mkfs.ext4 -q "$disk"
	mount -o discard "$disk" /mnt
	head -c 24M /dev/urandom > /mnt/file
	want=$(sha256sum < /mnt/file)
	cp /mnt/file /mnt/copy
	rm /mnt/file
	fstrim /mnt
	umount /mnt
	mount "$disk" /mnt
	[ "$(sha256sum < /mnt/copy)" = "$want" ]
	umount /mnt
	e2fsck -fp "$disk"

	it "$name Write Zeroes, Deallocate, Flush, Compare and Verify"
	head -c $((16 * lba)) /dev/urandom > data
	nvme write "$disk" --start-block=100 --block-count=15 --data-size=$((16 * lba)) --data=data
	nvme flush "$disk"
	nvme verify "$disk" --start-block=100 --block-count=15
	nvme compare "$disk" --start-block=100 --block-count=15 --data-size=$((16 * lba)) --data=data
	fails nvme compare "$disk" --start-block=101 --block-count=14 --data-size=$((15 * lba)) --data=data
	nvme write-zeroes "$disk" --start-block=100 --block-count=7
	nvme read "$disk" --start-block=100 --block-count=15 --data-size=$((16 * lba)) --data=out
	same out <(head -c $((8 * lba)) /dev/zero; tail -c $((8 * lba)) data)
	nvme dsm "$disk" --ad --slbs=0 --blocks=64
	blkdiscard "$disk"
done
