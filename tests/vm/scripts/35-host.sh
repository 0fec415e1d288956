. /vm/lib.sh
configure > kvof.toml
start_target
ours=(-t $transport -a $ip:$discovery -n $disks --namespace 1)
for size in 0 1 8193 $((5 << 20)) $((16 << 20)); do head -c $size /dev/urandom > v$size; done

it 'kvof discover names every subsystem'
/vm/kvof discover -t $transport -a $ip:$discovery > log
for nqn in $disks $memory; do grep -q "^$transport .* $nqn\$" log; done

it 'our own host carries values of 0 bytes to 16 MiB in one command'
for value in v[0-9]*; do
	/vm/kvof put "${ours[@]}" $value $value
	/vm/kvof get "${ours[@]}" $value - | cmp - $value
done
/vm/kvof list "${ours[@]}" --all > log
fails grep ^ff6b766f66 log

it 'kvof bench verifies what it reads'
/vm/kvof bench "${ours[@]}" --op mixed --size 1MiB --count 30 --keys 4 --verify --queues 2
/vm/kvof bench -t $transport -a $ip:$discovery -n $disks --namespace 2 --type block --op randrw --size 4KiB --count 500 --verify --span 1MiB

it 'through the kernel: a namespace is found by device, NQN and NGUID'
connect $disks
kv=$(generic $disks 1)
nguid=$(nvme ns-descs -n 1 "$kv" | sed -n 's/^nguid *: *//p')
for name in "$kv" $disks "$nguid"; do
	/vm/kvof get --device "$name" v8193 - | cmp - v8193
	/vm/kvof put --device "$name" "of $(basename "$name" | cut -c1-10)" v8193
	/vm/kvof get "${ours[@]}" "of $(basename "$name" | cut -c1-10)" - | cmp - v8193
done
fails /vm/kvof list --device "$(generic $disks 2)"

it 'through the kernel: one command carries its limit'
/vm/kvof bench --device "$kv" --op mixed --size 1MiB --count 20 --keys 4 --verify

it 'a value in parts is the same for our host and through the kernel'
/vm/kvof put --device "$kv" --part 1MiB kernel v$((5 << 20))
/vm/kvof get "${ours[@]}" kernel - | cmp - v$((5 << 20))
/vm/kvof put "${ours[@]}" --part 1MiB own v$((5 << 20))
/vm/kvof get --device "$kv" own - | cmp - v$((5 << 20))
/vm/kvof put "${ours[@]}" kernel v1
/vm/kvof delete --device "$kv" own
/vm/kvof list "${ours[@]}" --all > log
fails grep ^ff6b766f66 log

it 'what our host stored whole is read through the kernel, in ranges where one command does not carry it'
for value in v[0-9]*; do /vm/kvof get --device "$kv" $value - | cmp - $value; done
/vm/kvof put "${ours[@]}" --part 4MiB parts v$((5 << 20))
/vm/kvof get --device "$kv" parts - | cmp - v$((5 << 20))
/vm/kvof delete "${ours[@]}" parts
ranges=$(status | jq ".subsystems[] | select(.nqn == \"$disks\") | .namespaces[0].commands[] | select(.name == \"retrieve-range\") | .latency.count")
[ $transport = tcp ] || [ "$ranges" -ge 25 ]

it 'a value that is replaced while it is read in ranges is one of the two, whole'
head -c $((2 << 20)) /dev/urandom > one
head -c $((2 << 20)) /dev/urandom > other
(while [ ! -e stop ]; do /vm/kvof put "${ours[@]}" replaced one && /vm/kvof put "${ours[@]}" replaced other || exit; done > /dev/null) &
replacing=$!
wait_for 60 /vm/kvof exist "${ours[@]}" replaced
for i in {1..6}; do
	/vm/kvof get --device "$kv" replaced got
	cmp -s got one || cmp got other
done
touch stop
wait $replacing

it 'through the kernel: a value larger than one command carries is split'
if [ $transport = rdma ]; then
	/vm/kvof put --device "$kv" large v$((5 << 20))
	/vm/kvof list --device "$kv" --all > log
	[ "$(grep -c ^ff6b766f66 log)" = 6 ]
fi
nvme disconnect -n $disks

it 'our own host reconnects when the target is killed and comes back'
/vm/kvof bench "${ours[@]}" --op mixed --size 64KiB --keys 16 --time 8s --reconnect 60s > log &
bench=$!
wait_for 60 /vm/kvof exist "${ours[@]}" bench-0000000015 # the last before the measurement
kill_target KILL
start_target
wait $bench
