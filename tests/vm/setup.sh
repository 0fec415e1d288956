#!/bin/bash
# setup.sh KERNEL... - makes guest images for run.sh and prints the folder of each.
#
# A guest is a stock Debian release with its own kernel, nvme-cli and fio, unpacked from the
# packages into one uncompressed initramfs:
#   6.1    Debian 12
#   6.12   Debian 13
#   latest Debian 13 with the newest kernel of its backports
# Images are kept in ${XDG_CACHE_HOME:-~/.cache}/kvof/vm, one folder for each kernel and version
# of this file; a folder that exists is complete. Needs root, and the machine's own apt sources.
set -euo pipefail

packages=bash,busybox-static,coreutils,diffutils,e2fsprogs,fio,grep,jq,kmod,mawk,mount,nvme-cli,sed,tcpdump,util-linux
modules=(virtio_pci virtio_blk virtio_rng ext4 crc32c_generic crc32c_intel crc32_generic nvme_tcp)

cache=${XDG_CACHE_HOME:-$HOME/.cache}/kvof/vm
recipe=$(sha256sum "$0" | cut -c1-12)

install_tools() {
	type -P qemu-system-x86_64 mmdebstrap cpio depmod > /dev/null && return
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
		qemu-system-x86 mmdebstrap cpio kmod
}

# mirror prints the address this machine takes Debian from.
mirror() {
	. /etc/os-release
	apt-get indextargets --format '$(REPO_URI)' \
		'Created-By: Packages' 'Origin: Debian' "Codename: $VERSION_CODENAME" | head -1 | grep .
}

# unpack ROOT SUITE KERNEL_PACKAGE [SUITE...]: packages are only unpacked, nothing of them is run.
unpack() {
	local root=$1 suite=$2 kernel=$3 from sources=() s
	from=$(mirror)
	shift 3
	for s in "$suite" "$@"; do sources+=("deb $from $s main"); done
	apt-config dump | grep -i '^Acquire::.*proxy' > "$root.apt" || true
	mmdebstrap --quiet --variant=extract --aptopt="$root.apt" \
		--include="$packages,$kernel" "$suite" "$root" "${sources[@]}"
}

# keep_modules ROOT VERSION: drops every module the tests do not need.
keep_modules() {
	local root=$1 version=$2 m
	depmod -b "$root" "$version"
	for m in "${modules[@]}"; do
		modprobe -d "$root" -S "$version" --show-depends "$m" 2>/dev/null || true
	done | sed -n 's#^insmod .*\(/[^/ ]*\) *$#\1#p' > "$root.keep"
	find "$root/lib/modules/" -name '*.ko*' | grep -vFf "$root.keep" | xargs rm
	depmod -b "$root" "$version"
}

build() {
	local kernel=$1 image=$cache/$1-$recipe work root version
	[ -d "$image" ] && return
	install_tools >&2
	work=$cache/build
	rm -rf "$work"
	mkdir "$work"
	root=$work/root
	case $kernel in
	6.1) unpack "$root" bookworm linux-image-amd64 ;;
	6.12) unpack "$root" trixie linux-image-amd64 ;;
	latest) unpack "$root" trixie linux-image-amd64/trixie-backports trixie-backports ;;
	*) echo "setup.sh: unknown kernel $kernel: 6.1, 6.12 or latest" >&2; return 2 ;;
	esac
	version=$(basename "$root"/lib/modules/*)
	mkdir "$work/image"
	cp "$root"/boot/vmlinuz-* "$work/image/vmlinuz" 2>/dev/null ||
		cp "$root/lib/modules/$version/vmlinuz" "$work/image/vmlinuz"
	keep_modules "$root" "$version"
	rm -rf "$root"/boot/* "$root"/usr/share/{doc,man,locale,zoneinfo,perl*,bash-completion,info,lintian} \
		"$root"/usr/lib/{python3*,systemd} "$root"/var/{cache,lib/apt,lib/dpkg} "$root"/lib/modules/*/{vmlinuz,System.map}
	ln -sf mawk "$root/usr/bin/awk"
	(cd "$root" && find . | cpio --quiet -o -H newc) > "$work/image/initrd"
	mv "$work/image" "$image"
	rm -rf "$work"
}

mkdir -p "$cache"
exec 9> "$cache/lock"
for kernel; do
	flock 9
	build "$kernel"
	echo "$cache/$kernel-$recipe"
done
