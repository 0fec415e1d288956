#!/bin/bash
# run.sh - installs kvof as docs/operations.md says and runs steps.sh under systemd, as PID 1 of
# namespaces of its own: a copy of this machine's root that is thrown away. Needs root and the
# package systemd. KVOF is the binary to install (default bin/kvof).
set -euo pipefail

if [ "${1:-}" != inside ]; then
	[ "$(id -u)" = 0 ] || { echo 'run.sh needs to be root: it makes namespaces and mounts' >&2; exit 2; }
	type -P systemd-sysusers > /dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends systemd; } >&2
	tmp=$(mktemp -d)
	trap 'rm -rf "$tmp"' EXIT
	status=0
	timeout -k 5 180 unshare --mount --pid --fork --uts --ipc --net --mount-proc "$0" inside "$tmp" > "$tmp/systemd.log" 2>&1 || status=$?
	cat "$tmp/results" || status=1
	grep -q '^FAIL' "$tmp/results" || ! grep -q '^PASS' "$tmp/results" || [ "$status" != 0 ] || exit 0
	tail -n 50 "$tmp/systemd.log" "$tmp/output"
	exit 1
fi

here=$(cd "$(dirname "$0")" && pwd) tmp=$2
kvof=${KVOF:-$here/../../bin/kvof} units=$here/../../systemd configs=$here/../../configs
mount --make-rprivate /
ip link set lo up
mount -t tmpfs tmpfs /mnt
mkdir /mnt/{root,upper,work}
root=/mnt/root
mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work $root
mount -t proc proc $root/proc
mount -t sysfs sysfs $root/sys
mount -t cgroup2 cgroup2 $root/sys/fs/cgroup
mount --rbind /dev $root/dev
mount -t tmpfs tmpfs $root/run
mount -t tmpfs tmpfs $root/tmp
mkdir $root/run/test
mount --bind "$tmp" $root/run/test
touch "$tmp/console"
mount --bind "$tmp/console" $root/dev/console
cp "$here/steps.sh" "$tmp/"

# What this machine runs is not started, only kvof and what it needs.
rm -rf $root/etc/systemd/system/* $root/usr/bin/kvof
install -m 755 "$kvof" $root/usr/bin/kvof
install -m 644 "$units/kvof.service" "$units/kvof.socket" $root/etc/systemd/system/
install -m 644 -D "$units/kvof.sysusers" $root/usr/lib/sysusers.d/kvof.conf
install -m 644 -D "$configs/embedded.toml" $root/etc/kvof/kvof.toml
chroot $root systemd-sysusers kvof.conf
cat > $root/etc/systemd/system/steps.service <<-'END'
	[Unit]
	DefaultDependencies=no
	[Service]
	ExecStart=/run/test/steps.sh
	StandardOutput=file:/run/test/results
	StandardError=file:/run/test/output
	ExecStopPost=/bin/systemctl exit --force
END
exec chroot $root env -i container=other PATH="$PATH" LANG=C.UTF-8 /lib/systemd/systemd --system --unit=steps.service --show-status=0
