# retrieve.sh compares, over soft-RoCE in a guest of tests/vm, the Retrieve of a 16 MiB value by kvof's own host with 16 reads
# of 1 MiB together by the kernel's host: from the same target, off drives of the same kind, by as many I/O queues, in turns.
#
#	tests/vm/run.sh -t 230 -d size=1G,lba=4096 -d size=1G,lba=4096 latest transport=rdma [queues=1] [rounds=3] [seconds=6] bench/retrieve.sh
. /vm/lib.sh
queues=${queues:-1} rounds=${rounds:-3} seconds=${seconds:-6}
nqn=nqn.2026-11.dev.kvof:bench

it 'a target with a Key Value and a block namespace'
{
	configure
	printf '\n[[subsystem]]\nnqn = "%s"\nallow_any_host = true\n' $nqn
	namespace 1 kv block "/dev/$(drive drive0)n1"
	echo 'max_value = "16MiB"'
	namespace 2 block block "/dev/$(drive drive1)n1" 512MiB 4096
} > kvof.toml
start_target
connect $nqn --nr-io-queues=$queues
disk=$(block $nqn 2)
fio --name=fill --filename="$disk" --direct=1 --rw=write --bs=1m --size=128m
ours() { /vm/kvof bench -t rdma -a $ip:$io -n $nqn --namespace 1 --size 16MiB --keys 4 --keep --json "$@" > json; }
ours --op store --count 4

# The measurements print MiB/s.
retrieve() { # DEPTH of each queue
	ours --op retrieve --time "${seconds}s" --queues $queues --depth "$1"
	jq '.total.mb_per_s * 1000000 / 1048576' json
}
read16() {
	fio --name=read --filename="$disk" --direct=1 --ioengine=io_uring --rw=read --bs=1m --iodepth=16 --size=128m \
		--time_based --runtime="$seconds" --output-format=json > json
	jq '.jobs[0].read.bw_bytes / 1048576' json
}

it 'throughput'
echo "Linux $(uname -r), $(nproc) CPUs, $queues I/O queues, $rounds rounds of $seconds s" >&3
echo '| | MiB/s | ratio to the kernel | min-max |
|---|---|---|---|' >&3
for ((i = 0; i < rounds; i++)); do
	read16 >> kernel
	retrieve 1 >> one
	retrieve 2 >> two
done
row() { # NAME FILE
	local middle low high
	read -r middle low high < <(paste "$2" kernel | awk '{ print $1 / $2 }' | median)
	echo "| $1 | $(median < "$2" | cut -d ' ' -f 1) | **$middle** | $low-$high |" >&3
}
row 'kernel, 16 reads of 1 MiB' kernel
row 'kvof, one Retrieve of 16 MiB on each queue' one
row 'kvof, two' two
nvme disconnect-all
