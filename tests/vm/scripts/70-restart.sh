. /vm/lib.sh
configure > kvof.toml
start_target
connect $disks --reconnect-delay=1 --keep-alive-tmo=5
ctrl=$(controllers $disks) disk=$(block $disks 3) kv=$(generic $disks 1)
head -c 1000000 /dev/urandom > base

# value I prints the value with number I.
value() { echo "$1"; cat base; }

it 'killed under I/O and started again: the host reconnects, fio ends and verifies'
fio --name=restart --filename="$disk" --direct=1 --ioengine=io_uring --iodepth=8 --rw=randwrite --bs=16k --size=64m \
	--rate=6m --verify=crc32c --verify_fatal=1 --output=fio.log &
fio=$!
for round in 1 2 3; do
	end=$((SECONDS + 3))
	for ((i = 10; SECONDS < end; i++)); do
		value $round$i > v
		store 0$round$i v
		answers 0
		echo $round$i >> stored
	done
	kill -0 $fio
	kill_target KILL
	value unfinished > v
	fails store ff v
	start_target
	wait_for 30 live "$ctrl"
done
wait $fio

it 'every value that was stored is there, and right'
for i in $(cat stored); do
	value "$i" > v
	retrieve "0$i" "$(stat -c %s v)"
	answers 0 "$(stat -c %s v)"
	same out v
done
[ "$(wc -l < stored)" -ge 3 ]

it 'a Store that is under way when the target is killed leaves the old value, the new one or none'
head -c $largest /dev/urandom > old
head -c $largest /dev/urandom > new
for key in a1 a2; do
	[ $key = a2 ] || { store $key old; answers 0; }
	(store $key new) &
	sleep 0.3
	kill_target KILL
	wait $! || true
	start_target
	wait_for 30 live "$ctrl"
	retrieve $key $largest
	case $key$sc in
	a10) same out old || same out new ;;
	a20) same out new ;;
	*) answers 87; [ $key = a2 ] ;;
	esac
done
