# The RDMA device goes away under I/O, and comes back.
. /vm/lib.sh
[ $transport = rdma ] || exit 0
configure > kvof.toml
start_target
connect $disks
kv=$(generic $disks 1) disk=$(block $disks 3)
head -c $largest /dev/urandom > value
store 01 value
answers 0

it 'the device is removed under I/O: the target ends its connections and goes on'
fio --name=load --filename="$disk" --direct=1 --ioengine=io_uring --iodepth=8 --rw=randwrite --bs=16k --size=64m --time_based --runtime=60 --output=fio.log &
fio=$!
sleep 2
timeout 30 rdma link delete soft0
wait_for 30 has_controllers 0
wait $fio || true
kill -0 $target
[ "$(status | jq '.fabrics | length')" = 0 ]

it 'the device is back: the target listens again, and everything is there'
rdma link add soft0 type $soft netdev veth0
wait_for 30 listens $io
wait_for 30 connect $disks
kv=$(generic $disks 1)
retrieve 01 $largest
answers 0 $largest
same out value
