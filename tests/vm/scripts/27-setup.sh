# kvof drive list and kvof setup, on emulated NVMe drives: see tests/vm/test.sh.
. /vm/lib.sh
for i in 0 1 2; do
	name[i]=$(drive drive$i)
	ng[i]=/dev/${name[i]/nvme/ng}n1 disk[i]=/dev/${name[i]}n1
	blkdiscard -f "${disk[i]}"
	dd if=/dev/zero of="${disk[i]}" bs=1M count=2 oflag=direct
done
setup() { /vm/kvof setup --listen $ip "$@" > kvof.toml 2> story; }
tells() { grep -q -- "$1" story || { cat story; die "setup does not tell: $1"; }; }
listed() { /vm/kvof drive list --json | jq -e ".[] | select(.serial == \"$1\") | $2"; } # SERIAL CONDITION

it 'drive list tells what the drives are and what is on them'
/vm/kvof drive list
listed drive0 '.lba_size == 4096 and .contents == "empty" and .unfit == null and .used == null'
listed drive1 '.lba_size == 512 and .max_transfer == 32768'
listed drive2 '.placements == 4 and .reclaim_unit == 16777216'
mkfs.ext4 -q "${disk[1]}"
listed drive1 '.contents | test("ext4")'
mount "${disk[1]}" /mnt
listed drive1 '.used[0] | test("mounted at /mnt")'

it 'setup refuses a drive that is mounted, also when it may erase it, and changes none'
fails setup --drives "${ng[0]},${ng[1]}" --wipe "${ng[1]}"
tells 'mounted at /mnt'
[ ! -s kvof.toml ]
listed drive0 '.contents == "empty"'
umount /mnt

it 'setup refuses a file system, partitions and data it does not know'
fails setup --drives "${disk[1]}"
tells 'ext4 file system: to erase it'
{ # an MBR with one partition
	head -c 446 /dev/zero
	printf '\0\0\0\0\x83\0\0\0\0\x08\0\0\0\x40\0\0'
	head -c 48 /dev/zero
	printf '\x55\xaa'
	head -c 3584 /dev/zero
} | dd of="${disk[0]}" bs=4096 iflag=fullblock oflag=direct
blockdev --rereadpt "${disk[0]}"
fails setup --drives "${ng[0]}"
tells '1 partition'
head -c 64K /dev/urandom | dd of="${disk[2]}" bs=64K seek=3 oflag=direct
fails setup --drives "${ng[2]}"
tells 'data of a kind'

it 'setup erases what it is told to, and what it prints is served'
all=${ng[0]},${ng[1]},${ng[2]}
rdma=()
[ $transport = tcp ] || rdma=(--rdma all)
setup --drives $all --wipe $all "${rdma[@]}" --nqn nqn.2026-11.dev.kvof:setup
cat story kvof.toml
[ ! -e "${disk[0]}p1" ]
/vm/kvof check kvof.toml
start_target
head -c $((largest / 2)) /dev/urandom > value
/vm/kvof put --address $ip:8009 key value
/vm/kvof get --address $ip:8009 key - | cmp - value

it 'setup refuses drives that a server uses, and keeps the stores of others'
fails setup --drives "${ng[0]}"
tells 'in use' || cat story
kill_target TERM
/vm/kvof drive inspect --verify "${ng[0]}"
setup --drives $all "${rdma[@]}" --nqn nqn.2026-11.dev.kvof:setup
tells 'a pool of 3 drives'
start_target
/vm/kvof get --address $ip:8009 key - | cmp - value

it 'drives become disks with their own LBAs'
kill_target TERM
setup --drives $all --wipe $all --type block "${rdma[@]}" --nqn nqn.2026-11.dev.kvof:setup
start_target
connect nqn.2026-11.dev.kvof:setup
[ "$(blockdev --getss "$(block nqn.2026-11.dev.kvof:setup 1)")" = 4096 ]
[ "$(blockdev --getss "$(block nqn.2026-11.dev.kvof:setup 2)")" = 512 ]

it 'drives are polled where that is configured and works'
nvme disconnect-all
kill_target TERM
sed -i 's/device = "nvme"/&\npoll = true/' kvof.toml
if [[ $(uname -r) = 6.1.* ]]; then # where it does not work
	fails /vm/kvof serve --config kvof.toml > refused 2>&1
	grep -q 'polling .* needs Linux 6.12' refused || { cat refused; false; }
	target=
	exit 0
fi
start_target
status | jq -e '[.subsystems[0].namespaces[].device.features | contains(["iopoll"])] | all'
connect nqn.2026-11.dev.kvof:setup
disk=$(block nqn.2026-11.dev.kvof:setup 2)
wait_for 10 test -b "$disk"
fio --name=verify --filename="$disk" --direct=1 --ioengine=io_uring --iodepth=8 --rw=randwrite --bsrange=4k-512k \
	--size=16m --verify=crc32c --verify_fatal=1 --output=fio.log
