#!/bin/bash
# setup.sh KERNEL... - makes the guests for run.sh and prints the folder of each.
#
# A guest is a stock Debian release with its own kernel, nvme-cli, rdma-core and fio:
#   6.1    Debian 12
#   6.12   Debian 13, with soft-iWARP built from Debian's source of that kernel, which leaves it out
#   latest Debian 13 with the newest kernel of its backports
#   arm64  Debian 13 for that architecture
# Its folder holds the kernel, an initrd that does no more than mount the disk, the disk, and the
# QEMU that runs it, which is Debian 13's own whatever this machine is.
# Folders are kept in ${XDG_CACHE_HOME:-~/.cache}/kvof/vm, one for each kernel and version of this
# file; a folder that exists is complete. Needs root, and the machine's own apt sources.
set -euo pipefail

packages=bash,busybox-static,coreutils,diffutils,e2fsprogs,fio,grep,ibverbs-providers,ibverbs-utils,iproute2,jq,kmod,mawk,mount,nvme-cli,procps,rdmacm-utils,sed,tcpdump,util-linux
boot_modules=(virtio_pci virtio_blk crc32c_generic crc32c_intel crc32_generic ext4)
modules=(virtio_rng virtio_console virtio_net veth sch_netem
	nvme nvme_tcp nvme_rdma nvmet nvmet_tcp nvmet_rdma rdma_rxe siw rdma_ucm ib_uverbs)

cache=${XDG_CACHE_HOME:-$HOME/.cache}/kvof/vm
recipe=$(sha256sum "$0" | cut -c1-12)

# What makes guests, and builds what runs in them.
install_tools() {
	type -P mmdebstrap cpio depmod mke2fs xz zstd gcc aarch64-linux-gnu-gcc > /dev/null && [ -e /usr/include/rdma/rdma_cma.h ] && return
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends mmdebstrap cpio kmod e2fsprogs xz-utils zstd \
		gcc libc6-dev gcc-aarch64-linux-gnu libc6-dev-arm64-cross libibverbs-dev librdmacm-dev
}

# mirror prints the address this machine takes Debian from.
mirror() {
	. /etc/os-release
	apt-get indextargets --format '$(REPO_URI)' \
		'Created-By: Packages' 'Origin: Debian' "Codename: $VERSION_CODENAME" | head -1 | grep .
}

# unpack ROOT ARCHITECTURE PACKAGES SUITE...: packages are only unpacked, nothing of them is run.
unpack() {
	local root=$1 architecture=$2 packages=$3 from sources=() s
	from=$(mirror)
	shift 3
	for s; do sources+=("deb $from $s main"); done
	apt-config dump | grep -i '^Acquire::.*proxy' > "$root.apt" || true
	mmdebstrap --quiet --variant=extract --architectures="$architecture" --aptopt="$root.apt" --include="$packages" "$1" "$root" "${sources[@]}"
	rm -rf "$root"/usr/share/{doc,man,locale,zoneinfo,perl*,bash-completion,info,lintian} \
		"$root"/usr/lib/{python3*,systemd} "$root"/var/{cache,lib/apt,lib/dpkg}
}

# build_siw ROOT VERSION: in Debian 13 itself, with its compiler.
build_siw() {
	local tree=$work/siw source=drivers/infiniband/sw/siw
	unpack "$tree" amd64 "gcc,libc6-dev,make,xz-utils,tar,bash,coreutils,sed,grep,mawk,findutils,linux-source-6.12,linux-headers-$2" trixie
	ln -sf mawk "$tree/usr/bin/awk"
	ln -sf bash "$tree/usr/bin/sh"
	tar -xJf "$tree"/usr/src/linux-source-6.12.tar.xz -C "$tree" --strip-components=1 "linux-source-6.12/$source"
	echo "obj-m := siw.o
siw-y := siw_cm.o siw_cq.o siw_main.o siw_mem.o siw_qp.o siw_qp_tx.o siw_qp_rx.o siw_verbs.o" > "$tree/$source/Makefile"
	chroot "$tree" make -s -C "/usr/src/linux-headers-$2" M="/$source" CONFIG_DEBUG_INFO_BTF_MODULES= modules
	mkdir "$1/lib/modules/$2/updates"
	cp "$tree/$source/siw.ko" "$1/lib/modules/$2/updates/"
}

# needed ROOT VERSION MODULE...: the files of the modules and of all they need, in the order to load them.
needed() {
	local root=$1 version=$2 m
	shift 2
	for m; do
		modprobe -d "$root" -S "$version" --show-depends "$m" 2> /dev/null || true
	done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }'
}

# keep_modules ROOT VERSION: unpacks the modules that the tests need, and drops the others.
keep_modules() {
	local root=$1 version=$2
	depmod -b "$root" "$version"
	needed "$root" "$version" "${boot_modules[@]}" "${modules[@]}" > "$root.keep"
	find "$root/lib/modules/" -name '*.ko*' | grep -vxFf "$root.keep" | xargs rm
	find "$root/lib/modules/" -name '*.ko.xz' -exec xz -d {} +
	depmod -b "$root" "$version"
}

# extract VMLINUZ prints the kernel without its compression, which takes long to undo under emulation. The boot
# protocol's header has the number of sectors of set-up code at 1F1h, then the payload's offset and length at 248h.
extract() {
	local sectors offset length
	sectors=$(od -An -tu1 -j $((0x1f1)) -N 1 "$1")
	read -r offset length < <(od -An -tu4 -j $((0x248)) -N 8 "$1")
	# The payload's last 4 bytes are its size.
	dd if="$1" of="$1.payload" bs=1M iflag=skip_bytes,count_bytes skip=$(((sectors + 1) * 512 + offset)) count=$((length - 4)) status=none
	case $(head -c 4 "$1.payload" | od -An -tx1) in
	' fd 37 7a 58') xz -dc "$1.payload" ;;
	' 28 b5 2f fd') zstd -qdc "$1.payload" ;;
	*) echo "setup.sh: $1 is compressed in a way it does not know" >&2; return 1 ;;
	esac
}

make_initrd() { # ROOT VERSION FOLDER
	local n=10 module
	mkdir -p "$3"/{bin,dev,modules,root}
	cp "$1/bin/busybox" "$3/bin/"
	needed "$1" "$2" "${boot_modules[@]}" | while read -r module; do cp "$module" "$3/modules/$((n++)).ko"; done
	cat > "$3/init" <<-'END'
		#!/bin/busybox sh
		/bin/busybox --install -s /bin
		for module in /modules/*; do insmod $module; done
		mount -t devtmpfs dev /dev
		mount -t ext4 -o noinit_itable /dev/vda /root
		mv /vm /root/vm
		exec switch_root /root /vm/init
	END
	chmod +x "$3/init"
	(cd "$3" && find . | cpio --quiet -o -H newc)
}

build_qemu() {
	unpack "$work/qemu" amd64 qemu-system-x86,qemu-system-arm trixie
}

build_guest() {
	local root=$work/root image=$work/guest version
	mkdir "$image"
	case $1 in
	6.1) unpack "$root" amd64 "$packages,linux-image-amd64" bookworm ;;
	6.12) unpack "$root" amd64 "$packages,linux-image-amd64" trixie ;;
	latest) unpack "$root" amd64 "$packages,linux-image-amd64/trixie-backports" trixie trixie-backports ;;
	arm64) unpack "$root" arm64 "$packages,linux-image-arm64" trixie ;;
	*) echo "setup.sh: unknown kernel $1: 6.1, 6.12, latest or arm64" >&2; return 2 ;;
	esac
	version=$(basename "$root"/lib/modules/*)
	mv "$root"/boot/vmlinuz-* "$work/vmlinuz" 2> /dev/null || mv "$root/lib/modules/$version/vmlinuz" "$work/vmlinuz"
	if [ "$1" = arm64 ]; then mv "$work/vmlinuz" "$image/kernel"; else extract "$work/vmlinuz" > "$image/kernel"; fi
	rm -rf "$root"/boot/* "$root/lib/modules/$version/System.map"
	[ "$1" != 6.12 ] || build_siw "$root" "$version" >&2
	keep_modules "$root" "$version"
	make_initrd "$root" "$version" "$work/initrd" > "$image/initrd"
	ln -sf mawk "$root/usr/bin/awk"
	ln -s "../qemu-$recipe" "$image/qemu"
	truncate -s 10G "$image/disk"
	mke2fs -q -t ext4 -m 0 -E lazy_itable_init,nodiscard -d "$root" "$image/disk"
}

# make NAME COMMAND...: the folder NAME, which the command makes in $work.
make() {
	[ -d "$cache/$1-$recipe" ] && return
	work=$cache/build
	rm -rf "$work"
	mkdir "$work"
	"${@:2}"
	mv "$work/$(sed 's/build_//' <<< "$2")" "$cache/$1-$recipe"
	rm -rf "$work"
}

install_tools >&2
mkdir -p "$cache"
exec 9> "$cache/lock"
for kernel; do
	flock 9
	make qemu build_qemu
	make "$kernel" build_guest "$kernel"
	echo "$cache/$kernel-$recipe"
done
