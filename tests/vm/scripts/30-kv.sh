. /vm/lib.sh
configure > kvof.toml
start_target
connect $disks
connect $memory
kv=$(generic $disks 1)
odd=$((largest / 4 + 1)) # a size that is a multiple of nothing
sizes="0 1 4095 4096 $((1 << 19)) $odd $largest"
keys='00 0000 000000000000 0102030405060708090a0b0c0d0e0f 0102030405060708090a0b0c0d0e0f10'
for size in $sizes; do head -c $size /dev/urandom > v$size; done

# keys prints the keys in the answer of a List, one a line.
keys() {
	local hex at=8 n length
	hex=$(od -An -v -tx1 out | tr -d ' \n')
	for ((n = 0x${hex:6:2}${hex:4:2}${hex:2:2}${hex:0:2}; n > 0; n--)); do
		length=$((0x${hex:at+2:2}${hex:at:2}))
		echo "${hex:at+4:2*length}"
		at=$((at + (2 + length + 3) / 4 * 8))
	done
}

# every_page SIZE lists the whole namespace in answers of SIZE bytes: the next one starts at the last key.
every_page() {
	local last=
	while :; do
		list "$last" "$1"
		answers 0
		keys | grep -vx "${last:-none}" > page || return 0
		cat page
		last=$(tail -1 page)
	done
}

for via in ioctl uring; do
	it "$via: values of 0 bytes to $((largest >> 10)) KiB come back as they went, in one command"
	for value in v[0-9]*; do
		store "a0a1a2a3a4a5a6a7a8a9aaabacad$(printf %04x "${#value}")" $value
		answers 0 0
		retrieve "a0a1a2a3a4a5a6a7a8a9aaabacad$(printf %04x "${#value}")" "${value#v}"
		answers 0 "${value#v}"
		[ "$value" = v0 ] || same out $value
	done

	it "$via: a key has 1 to 16 bytes, and its length belongs to it"
	for key in $keys; do
		echo "value of $key" > value.$key
		store $key value.$key
		answers 0
	done
	for key in $keys; do
		retrieve $key "$(stat -c %s value.$key)"
		answers 0 "$(stat -c %s value.$key)"
		same out value.$key
	done

	it "$via: a key of 0 or 17 bytes is 86h"
	for key in '' 0102030405060708090a0b0c0d0e0f1011; do
		retrieve "$key" 4096
		answers 86
		exist "$key"
		answers 86
	done

	it "$via: a short buffer gets the first bytes, an empty one the size"
	store 55 v$odd
	answers 0
	retrieve 55 4096
	answers 0 $odd
	same out <(head -c 4096 v$odd)
	retrieve 55 0
	answers 0 $odd

	it "$via: an absent key is 87h, and nothing to Delete"
	retrieve 99 4096
	answers 87
	exist 99
	answers 87
	store 99 v4096 1
	answers 87
	delete 99
	answers 0

	it "$via: Store replaces, or only what exists, or is 89h and changes nothing"
	store 66 v4096
	answers 0
	store 66 v$largest 2
	answers 89
	retrieve 66 4096
	answers 0 4096
	same out v4096
	store 66 v$odd 1
	answers 0
	retrieve 66 $odd
	answers 0 $odd
	same out v$odd
	store 67 v4096 2
	answers 0
	store 67 v4096 3
	answers 2

	it "$via: what is deleted is gone"
	exist 66
	answers 0
	delete 66
	answers 0
	exist 66
	answers 87
	retrieve 66 4096
	answers 87
	delete 67
	answers 0

	it "$via: List returns every key once, page by page"
	for i in {10..29}; do
		store "c0ffee00000000000000000000000c$i" v1
		answers 0
	done
	every_page 65536 > all
	[ "$(grep -c ^c0ffee all)" = 20 ]
	[ -z "$(sort all | uniq -d)" ]
	every_page 256 > paged
	cmp all paged

	it "$via: List starts at a key that is no longer there"
	list c0ffee00000000000000000000000c15 256
	answers 0
	keys > before
	delete c0ffee00000000000000000000000c15
	list c0ffee00000000000000000000000c15 256
	answers 0
	keys > after
	[ "$(head -1 before)" = c0ffee00000000000000000000000c15 ]
	[ "$(head -1 after)" = "$(sed -n 2p before)" ]

	it "$via: the limits of a namespace are its own: over 512 KiB is 85h, a full device 81h and still readable"
	kv=$(generic $memory 1)
	store 01 v$largest
	answers 85
	for i in {10..40}; do
		store $i v524288
		[ "$sc" = 0 ] || break
	done
	answers 81
	retrieve 10 524288
	answers 0 524288
	same out v524288
	for ((; i >= 10; i--)); do delete $i; done
	store 01 v4096
	answers 0
	delete 01
	kv=$(generic $disks 1)
done

it 'feature 20h makes Delete of an absent key 87h'
nvme set-feature "$kv" -n 1 -f 0x20 --value=1
delete 99
answers 87
nvme set-feature "$kv" -n 1 -f 0x20 --value=0
delete 99
answers 0

it 'values are there after a restart'
nvme disconnect-all
kill_target TERM
start_target
connect $disks
kv=$(generic $disks 1)
every_page 65536 > after
diff after <(grep -v c0ffee00000000000000000000000c15 paged)
retrieve 55 $odd
answers 0 $odd
same out v$odd
