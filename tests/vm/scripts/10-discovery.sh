. /vm/lib.sh
configure > kvof.toml
start_target

it 'nvme discover names every subsystem, on the discovery port and on the I/O port'
for port in $discovery $io; do
	nvme discover -t $transport -a $ip -s $port -o json > log
	jq -r '.records[] | select(.subtype == "nvme subsystem") | "\(.subnqn) \(.traddr) \(.trsvcid)"' log | sort > found
	diff found - <<-END
		$disks $ip $io
		$memory $ip $io
	END
done

it 'nvme connect-all connects every subsystem'
nvme connect-all -t $transport -a $ip -s $discovery
for nqn in $disks $memory; do
	[ "$(controllers $nqn | wc -l)" = 1 ]
	live "$(controllers $nqn)"
done

it 'a KV namespace is a generic character device, a block namespace is a disk too'
[ -c "$(generic $disks 1)" ]
[ -c "$(generic $memory 1)" ]
for nsid in 2 3; do [ -b "$(block $disks $nsid)" ]; done

it 'nvme list shows the disks'
nvme list > log
for nsid in 2 3; do grep "$(block $disks $nsid) " log; done
grep -q "$(block $memory 2) " log

it 'nvme list-subsys shows each subsystem with its path'
nvme list-subsys -o json > log
for nqn in $disks $memory; do
	jq -e --arg nqn $nqn --arg name "$(controllers $nqn)" --arg transport $transport '[.. | objects | select(.NQN? == $nqn) | .Paths[]] |
		length == 1 and .[0].Name == $name and .[0].Transport == $transport and .[0].State == "live"' log
done

it 'nvme disconnect removes one subsystem, disconnect-all the rest'
nvme disconnect -n $disks
[ -z "$(controllers $disks)" ]
live "$(controllers $memory)"
nvme disconnect-all
[ -z "$(controllers $memory)" ]
