#!/usr/bin/env bash
# A real Docker engine of its own, for tests: its socket, containers and images are in one folder.
#
#   eval "$(tests/sandbox/docker.sh start)"    installs what is missing, starts the engine, prints the export
#   tests/sandbox/docker.sh stop               removes all its containers and ends it
#   tests/sandbox/docker.sh purge              stops, and removes the folder
#
# The folder is $DOCKER_SANDBOX, or /tmp/fiddlehead-docker. No systemd and no firewall rules are needed, root is; the
# containers reach each other and this machine, and nothing beyond.
set -euo pipefail

usage="usage: $0 start|stop|purge"
folder="${DOCKER_SANDBOX:-/tmp/fiddlehead-docker}"
socket="$folder/docker.sock"
pid_file="$folder/docker.pid"

say() { echo "docker sandbox: $*" >&2; }
fail() { say "$*"; exit 1; }

start() {
    [ "$(id -u)" = 0 ] || fail "root is needed, to run an engine and to install it"
    install_packages
    mkdir -p "$folder"
    if ! answers; then
        rm -f "$pid_file"
        # The default bridge and its rules would change this machine's network; other bridges work without.
        nohup setsid dockerd --host "unix://$socket" --pidfile "$pid_file" \
            --data-root "$folder/data" --exec-root "$folder/exec" \
            --bridge none --iptables=false --ip6tables=false --ip-forward=false \
            >"$folder/log" 2>&1 </dev/null &
        local waited
        for waited in $(seq 150); do
            ! answers || break
            sleep 0.2
        done
        answers || { tail -n 20 "$folder/log" >&2; fail "the engine has not started in $((waited / 5)) s"; }
    fi
    say "the engine answers, after $SECONDS s"
    echo "export DOCKER_HOST=unix://$socket"
}

stop() {
    [ -s "$pid_file" ] || return 0
    local pid containers
    pid="$(cat "$pid_file")"
    if answers; then
        containers="$(docker --host "unix://$socket" ps --all --quiet)"
        # shellcheck disable=SC2086 # one word for each
        [ -z "$containers" ] || docker --host "unix://$socket" rm --force $containers >/dev/null
        docker --host "unix://$socket" network prune --force >/dev/null # their bridges are interfaces of this machine
    fi
    [ "$(cat "/proc/$pid/comm" 2>/dev/null)" != dockerd ] || kill "$pid"
    for _ in $(seq 100); do
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    ! kill -0 "$pid" 2>/dev/null || fail "process $pid has not ended in 10 s"
    umount "$folder"/exec/netns/* 2>/dev/null || true
    rm -f "$pid_file"
}

purge() {
    stop
    rm -rf "$folder"
}

answers() { curl --fail --silent --max-time 2 --unix-socket "$socket" http://docker/_ping >/dev/null 2>&1; }

install_packages() {
    if command -v dockerd >/dev/null && command -v docker >/dev/null && command -v curl >/dev/null; then return; fi
    command -v apt-get >/dev/null || fail "there is no Docker engine, and it can only be installed here with apt-get"
    say "installing docker.io"
    # The package's own service must not start: this engine is the only one that is wanted.
    local policy=/usr/sbin/policy-rc.d
    [ -e "$policy" ] || { printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy" && trap "rm -f $policy" EXIT; }
    # Lists that are missing or more than a day old name packages that the mirror may no longer have.
    [ -n "$(find /var/lib/apt/lists -name '*Packages*' -mtime -1 -print -quit 2>/dev/null)" ] || apt-get update -qq >&2
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends docker.io curl >&2 ||
        fail "apt-get could not install docker.io"
}

case "${1:-}" in
    start | stop | purge) "$1" ;;
    *) echo "$usage" >&2; exit 2 ;;
esac
