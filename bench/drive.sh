# kvof's engine and fio on the same emulated NVMe drive, in turn, in a guest:
#
#	tests/vm/run.sh -t 600 -d size=1G latest rounds=5 bench/drive.sh
#
# One line for each run: size in bytes, depth, who, operations/s, MB/s, us of CPU an operation, median and 99th percentile
# of latency in us. fio: ioengine io_uring_cmd with registered buffers and files. kvof: the engine by passthrough, large
# operations in pieces of 256 KiB as a store has them; whole: in one piece of memory; block: on the block device.
. /vm/lib.sh
controller=$(drive drive0)
ng=/dev/${controller/nvme/ng}n1 block=/dev/${controller}n1
echo 128 > /proc/sys/vm/nr_hugepages
fio_run() { # SIZE DEPTH
	fio --name=run --filename="$ng" --ioengine=io_uring_cmd --cmd_type=nvme --fixedbufs=1 --registerfiles=1 --mem=mmaphuge \
		--rw=randread --bs="$1" --iodepth="$2" --size=900m --time_based --ramp_time=0.5 --runtime="${seconds:-2}" --output-format=json > fio.json
	jq -r '.jobs[0] | .read as $r | [($r.iops | round), ($r.bw_bytes / 1e5 | round / 10),
		((.usr_cpu + .sys_cpu) * $r.runtime * 100 / $r.total_ios | round / 10),
		($r.clat_ns.percentile | (.["50.000000"], .["99.000000"]) / 1000 | round)] | join(" ")' fio.json
}
engine() { /vm/helper engine "$1" read "$2" "$3" "${seconds:-2}" "${@:4}"; } # DEVICE SIZE DEPTH [OPTION...]

it "engine and fio, ${rounds:-3} rounds"
for sized in "4096 1" "4096 32" "131072 8" "1048576 4" "2097152 4"; do
	read -r size depth <<< "$sized"
	for ((round = 0; round < ${rounds:-3}; round++)); do
		echo "$size $depth fio $(fio_run $size $depth)"
		echo "$size $depth kvof $(engine "$ng" $size $depth)"
		[ $size -le 262144 ] || echo "$size $depth whole $(engine "$ng" $size $depth whole)"
		echo "$size $depth block $(engine "$block" $size $depth block)"
	done
done >&3
