. /vm/lib.sh
configure > kvof.toml
start_target
connect $disks
ctrl=/dev/$(controllers $disks) kv=$(generic $disks 1)

it 'nvme id-ctrl shows an I/O controller of this subsystem that takes values of any size'
nvme id-ctrl "$ctrl" -o json > log
jq -e --arg nqn $disks '.subnqn == $nqn and .cntrltype == 1 and .mdts == 0 and .kas > 0 and
	.maxcmd >= 128 and .ioccsz >= 4 and .nn >= 3 and .ver >= 131072' log

it 'nvme list-ns shows the three namespaces'
nvme list-ns "$ctrl" > log
[ "$(grep -c 0x log)" = 3 ]

it 'nvme id-ns shows size and LBA format of the block namespaces'
for case in '2 9' '3 12'; do
	read -r nsid shift <<< "$case"
	nvme id-ns "$ctrl" -n $nsid -o json > log
	jq -e --argjson shift $shift '.lbafs[.flbas % 16].ds == $shift and
		.nsze == 512 * 1048576 / pow(2; $shift) and .ncap == .nsze' log
	wait_for 10 sized "$(block $disks $nsid)" $((512 << 20))
	[ "$(blockdev --getss "$(block $disks $nsid)")" = $((1 << shift)) ]
done

it 'nvme id-ns answers for the KV namespace'
nvme id-ns "$ctrl" -n 1

it 'nvme ns-descs shows UUID, NGUID and command set of every namespace, all different'
for case in '1 1' '2 0' '3 0'; do
	read -r nsid csi <<< "$case"
	nvme ns-descs "$ctrl" -n $nsid > log
	grep -Eq "^csi +: (0x)?0*$csi\$" log
	grep -E '^(uuid|nguid) +: ' log
done > ids
[ "$(sort -u ids | wc -l)" = 6 ]

it 'nvme effects-log shows the commands of both command sets'
effects() { # CSI
	nvme effects-log "$ctrl" --csi="$1" -o json |
		jq -c '.[0].io_cmd_set | with_entries(.key |= sub("IOCS_(?<opcode>[0-9]+).*"; .opcode))'
}
[ "$(effects 1)" = '{"0":1,"1":3,"2":1,"6":1,"16":3,"20":1,"161":1,"162":1}' ]
[ "$(effects 0)" = '{"0":1,"1":3,"2":1,"5":1,"8":3,"9":3,"12":1}' ]

it 'nvme smart-log, error-log, fw-log and get-feature are answered'
nvme smart-log "$ctrl"
nvme error-log "$ctrl"
nvme fw-log "$ctrl"
for feature in 0x01 0x02 0x04 0x05 0x07 0x0b 0x0f; do nvme get-feature "$ctrl" -f $feature; done
