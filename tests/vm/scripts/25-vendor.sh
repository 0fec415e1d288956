. /vm/lib.sh
configure > kvof.toml
start_target
connect $disks
ctrl=/dev/$(controllers $disks) kv=$(generic $disks 1) odd=$(block $disks 2)
echo value > value

# exist_many LENGTH: asks for the keys in the file keys, and prints what nvme says.
exist_many() { nvme io-passthru "$kv" --opcode=0xa1 --namespace-id=1 --cdw10=$1 --data-len=$1 --input-file=keys --write 2>&1; }

it 'the vendor log page says who made it, and names Exist Many'
nvme get-log "$ctrl" --log-id=0xe1 --log-len=512 --raw-binary > page
[ "$(od -An -v -tx1 -N16 page | tr -d ' \n')" = 3d1c5e0a6b524f2b9a716b766f660001 ]
[ "$(od -An -v -tx1 -j32 -N8 page | tr -d ' \n')" = a101010040000000 ]

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

it 'a block namespace does not know it'
fails nvme io-passthru "$odd" --opcode=0xa1 --namespace-id=2 --cdw10=12 --data-len=12 --input-file=keys --write > log 2>&1
grep -qi 'opcode' log
