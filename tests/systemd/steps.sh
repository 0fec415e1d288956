#!/bin/bash
# steps.sh: what systemd and kvof.service do together. run.sh runs it; results go to standard output.
set -eEuo pipefail
shopt -s inherit_errexit

exec 3>&1 1>&2
step=setup
it() { pass; step=$*; began=$SECONDS; }
pass() { [ "$step" = setup ] || echo "PASS systemd: $step ($((SECONDS - began)) s)" >&3; }
finish() {
	if [ $? = 0 ]; then pass; else
		echo "FAIL systemd: $step (line $at)" >&3
		systemctl status --no-pager --full kvof.service || true
		cat /var/lib/kvof/kvof.log || true
	fi
}
trap 'at=$LINENO' ERR
trap finish EXIT

property() { systemctl show --property="$1" --value kvof.service; }
wait_for() {
	local end=$((SECONDS + $1))
	shift
	until "$@"; do [ $SECONDS -lt $end ] || { echo "still not so: $*"; return 1; }; sleep 0.1; done
}
is() { [ "$(property "$1")" = "$2" ]; }
restarted() { [ "$(property MainPID)" != "$1" ] && is ActiveState active && is SubState running; }

same() { kvof get --nqn nqn.2026-11.dev.kvof:embedded block - | cmp - /run/test/block; }

# The journal does not run here.
mkdir -p /etc/systemd/system/kvof.service.d
cat > /etc/systemd/system/kvof.service.d/test.conf <<-'END'
	[Service]
	StandardError=append:/var/lib/kvof/kvof.log
	WatchdogSec=5s
END
mkdir -p /var/lib/kvof
sed -i 's/4GiB/64MiB/; s/16GiB/256MiB/' /etc/kvof/kvof.toml
head -c 3000000 /dev/urandom > /run/test/block
systemctl daemon-reload

it 'start returns when kvof is ready, and its status line says what it serves'
systemctl start kvof.service
is ActiveState active
property StatusText | grep -i 'subsystem'

it 'it runs as the user kvof, hardened, and io_uring works there'
[ "$(stat -c %U "/proc/$(property MainPID)")" = kvof ]
kvof status > /run/test/status
cat /run/test/status
grep -q 'io_uring' /run/test/status
[ "$(awk '/^CapEff/ { print $2 }' "/proc/$(property MainPID)/status")" = 0000000000000000 ]
[ "$(awk '/^Seccomp:/ { print $2 }' "/proc/$(property MainPID)/status")" = 2 ]

it 'a context block is stored and retrieved'
kvof put block /run/test/block
same

it 'reload changes what can change live, and ends as active'
pid=$(property MainPID)
sed -i 's/^log_level = .*/log_level = "debug"/; s/max_value = .*//' /etc/kvof/kvof.toml
printf '\n[[subsystem]]\nnqn = "nqn.2026-11.dev.kvof:second"\nallow_any_host = true\n' >> /etc/kvof/kvof.toml
systemctl reload kvof.service
is ActiveState active
[ "$(property MainPID)" = "$pid" ]
kvof discover | grep 'kvof:second'

it 'a wrong configuration is refused on reload, and kvof goes on as it was'
cp /etc/kvof/kvof.toml /run/test/good.toml
echo 'log_levle = 1' >> /etc/kvof/kvof.toml
systemctl reload kvof.service || true
is ActiveState active
[ "$(property MainPID)" = "$pid" ]
same
cp /run/test/good.toml /etc/kvof/kvof.toml

it 'the watchdog restarts a server that hangs, and what was stored is there'
kill -STOP "$pid"
wait_for 60 restarted "$pid"
same

it 'a killed server is restarted'
pid=$(property MainPID)
kill -KILL "$pid"
wait_for 30 restarted "$pid"
same

it 'stop drains and ends with success'
systemctl stop kvof.service
is ActiveState inactive
is Result success

it 'socket activation: the first host starts the service, and the ports outlive it'
sed -i 's/0\.0\.0\.0/127.0.0.1/' /etc/systemd/system/kvof.socket
systemctl daemon-reload
systemctl start kvof.socket
is ActiveState inactive
same
is ActiveState active
systemctl stop kvof.service
same
is ActiveState active
systemctl stop kvof.socket kvof.service
