. /vm/lib.sh
configure > kvof.toml
start_target
/vm/helper uevents > uevents &
connect $disks
ctrl=$(controllers $disks)
added=nqn.2026-11.dev.kvof:added

# Two hosts keep a discovery controller, as the service of a Debian host does.
nvme discover -t $transport -a $ip -s $discovery --persistent
attach nqn.2014-08.org.nvmexpress.discovery $discovery 2
watchers=$(controllers nqn.2014-08.org.nvmexpress.discovery)
[ "$(wc -w <<< "$watchers")" = 2 ]
generation() { nvme discover -t $transport -a $ip -s $discovery -o json | jq .genctr; }

it 'a namespace that a reload adds appears on a connected host by itself'
before=$(generation)
{
	configure 4
	printf '\n[[subsystem]]\nnqn = "%s"\nallow_any_host = true\n' $added
	namespace 1 kv memory '' 64MiB
} > kvof.toml
kill -HUP $target
wait_for 10 find_device $disks 4
wait_for 10 sized "$(block $disks 4)" $((64 << 20))
live "$ctrl"

it 'a subsystem that a reload adds is announced to the discovery controller of every host'
for watcher in $watchers; do
	wait_for 10 grep "/$watcher .*NVME_AEN=0x70f002" uevents
done
[ "$(generation)" -gt "$before" ]

it 'nvme connect-all through the discovery controller connects it'
nvme connect-all --device="$(head -1 <<< "$watchers")" -t $transport -a $ip -s $discovery
live "$(controllers $added)"
kv=$(generic $added 1)
store 01 /etc/hosts
answers 0

it 'a namespace that a reload removes disappears'
configure > kvof.toml
kill -HUP $target
gone() { fails find_device $disks 4; }
wait_for 10 gone
live "$ctrl"
