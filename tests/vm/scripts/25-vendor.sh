. /vm/lib.sh
configure > kvof.toml
start_target
connect $disks
ctrl=/dev/$(controllers $disks) kv=$(generic $disks 1) odd=$(block $disks 2)
echo value > value

# exist_many LENGTH: asks for the keys in the file keys, and prints what nvme says.
exist_many() { nvme io-passthru "$kv" --opcode=0xa1 --namespace-id=1 --cdw10=$1 --data-len=$1 --input-file=keys --write 2>&1; }

it 'the vendor log page says who made it, and names Exist Many and Retrieve Range'
nvme get-log "$ctrl" --log-id=0xe1 --log-len=512 --raw-binary > page
[ "$(od -An -v -tx1 -N16 page | tr -d ' \n')" = 3d1c5e0a6b524f2b9a716b766f660001 ]
[ "$(od -An -v -tx1 -j32 -N8 page | tr -d ' \n')" = a101010040000000 ]
[ "$(od -An -v -tx1 -j48 -N8 page | tr -d ' \n')" = a201010000000200 ]

it "Exist Many goes through the kernel's passthrough, as the documentation types it"
printf '\2\0\0\0\2\0k1\2\0k2' > keys
exist_many 12 > log
grep -q 'Success and result: 0x00000000' log
store 6b31 value
answers 0
exist_many 12 > log
grep -q 'Success and result: 0x00000001' log
store 6b32 value
answers 0
exist_many 12 > log
grep -q 'Success and result: 0x00000003' log

it 'data that is no list of keys is refused, and the connection goes on'
printf '\2\0\0\0\2\0k1\2\0k' > keys
fails exist_many 11 > log
grep -qi 'invalid field' log
exist 6b31
answers 0

# retrieve_range OFFSET TAG SIZE FILE: of the key range; leaves the result, DW1 and DW0, in the file log.
retrieve_range() {
	nvme io-passthru "$kv" --opcode=0xa2 --namespace-id=1 --cdw2=0x676e6172 --cdw3=0x65 --cdw10=$3 --cdw11=5 --cdw12=$1 --cdw13=$2 \
		--data-len=$3 --read --raw-binary 2> log > "$4"
}

it "Retrieve Range goes through the kernel's passthrough, and tells when the value is another"
head -c 300000 /dev/urandom > large
store 72616e6765 large # range
answers 0
retrieve_range 0 0 65536 out
cmp -n 65536 large out
result=$(sed -n 's/.*result: 0x//p' log) tag=0x
case $result in
????????) tag=0 ;; # this nvme-cli shows DW0 alone
*) tag=0x${result%????????} ;;
esac
[ $((0x${result: -8})) = 300000 ]
retrieve_range 131076 $tag 65536 out
cmp <(tail -c +131077 large | head -c 65536) out
store 72616e6765 large
answers 0
if [ $tag != 0 ]; then
	fails retrieve_range 131076 $tag 65536 out
	grep -qi '0x[24]*1c0' log
fi
fails retrieve_range 2 0 65536 out
grep -qi 'invalid field' log

# counted NAME: how many commands of that name have come to namespace 1.
counted() { status | jq ".subsystems[] | select(.nqn == \"$disks\") | .namespaces[0].commands[] | select(.name == \"$1\") | .latency.count"; }

it 'kvof asks for many keys at once through the kernel'
/vm/kvof exist --device "$kv" k1 k2 > log
fails /vm/kvof exist --device "$kv" k1 k2 k3 >> log
[ "$(cut -d ' ' -f 2 log | tr '\n' ' ')" = 'exists exists exists exists absent ' ]
before=$(counted exist-many)
/vm/kvof exist --device "$kv" $(printf 'k1 k2 %.0s' {1..50})
[ "$(counted exist-many)" = $((before + 2)) ]

it 'who is not root does without vendor specific commands' # Linux before 6.2 lets nobody else pass commands on
before=$(counted exist-many)
if [ "$(printf '6.2\n%s\n' "$(uname -r)" | sort -V | head -1)" = 6.2 ]; then
	chmod 666 "$kv"
	setpriv --reuid=65534 --regid=65534 --clear-groups /vm/kvof exist --device "$kv" k1 k2
	chmod 600 "$kv"
fi
[ "$(counted exist-many)" = $before ]

it 'a block namespace does not know it'
fails nvme io-passthru "$odd" --opcode=0xa1 --namespace-id=2 --cdw10=12 --data-len=12 --input-file=keys --write > log 2>&1
grep -qi 'opcode' log
