#!/usr/bin/env bash
# A real Slurm cluster on this machine's loopback, for tests: see README.md beside this file.
#
#   eval "$(tests/sandbox/slurm.sh start)"    installs what is missing, starts what does not run, prints the export
#   tests/sandbox/slurm.sh stop               cancels all jobs and ends what start has started
#   tests/sandbox/slurm.sh purge              stops, and removes the folder
set -euo pipefail

usage="usage: $0 start|stop|purge"
folder="${SLURM_SANDBOX:-/tmp/fiddlehead-slurm}"
port="${SLURM_SANDBOX_PORT:-26800}" # +0 controller, +1 accounting, +2 database, +10... nodes
nodes="${SLURM_SANDBOX_NODES:-2}"
cpus="${SLURM_SANDBOX_CPUS:-4}"
accounting="${SLURM_SANDBOX_ACCOUNTING:-1}"

host="$(hostname -s)"
export SLURM_CONF="$folder/etc/slurm.conf"
munge_socket="$folder/run/munge.sock"
database_socket="$folder/database/socket"

say() { echo "slurm sandbox: $*" >&2; }
fail() { say "$*"; exit 1; }

# What a start does, in order.
start() {
    [ "$(id -u)" = 0 ] || fail "root is needed, to run a cluster's daemons and to install them"
    ours || [ -z "$(ls -A "$folder" 2>/dev/null)" ] || fail "$folder is something else's; name another in SLURM_SANDBOX"
    install_packages
    mkdir -p "$folder"/{etc,log,run,state}
    chmod 755 "$folder"
    write_settings
    # Slurm's programs look each other up by the host's name, and all of them listen on loopback only.
    getent hosts "$host" | grep -q '^127\.' || echo "127.0.0.1 $host" >>/etc/hosts
    start_munge
    [ "$accounting" = 0 ] || start_accounting
    running slurmctld || slurmctld
    wait_for 20 scontrol ping
    local node
    for node in $(node_names); do
        running slurmd "$node" || { mkdir -p "$folder/spool.$node" && slurmd -N "$node"; }
    done
    wait_for 30 all_nodes_up
    say "$nodes nodes are up, after $SECONDS s"
    echo "export SLURM_CONF=$SLURM_CONF"
}

stop() {
    ours || return 0
    if running slurmctld; then
        scancel --quiet --user=root || true
        wait_for 15 no_jobs || true
    fi
    local file
    for file in "$folder"/run/slurmd.*.pid; do end slurmd "$(basename "${file#*/slurmd.}" .pid)"; done
    end_job_processes
    end slurmctld
    end slurmdbd
    end mariadbd
    end munged
}

purge() {
    ours || return 0
    stop
    rm -rf "$folder"
}

# Whether the folder is one that start has made.
ours() { grep -qsx "ClusterName=fiddlehead" "$SLURM_CONF"; }

install_packages() {
    local programs="munged slurmctld slurmd sbatch scontrol" packages="munge slurmctld slurmd slurm-client" missing="" program
    if [ "$accounting" != 0 ]; then
        programs+=" slurmdbd sacct mariadbd mariadb-install-db"
        packages+=" slurmdbd mariadb-server"
    fi
    for program in $programs; do command -v "$program" >/dev/null || missing+=" $program"; done
    [ -n "$missing" ] || return 0
    command -v apt-get >/dev/null || fail "not found:$missing; they can only be installed here with Debian's apt-get"
    say "installing $packages (missing:$missing)"
    # A package's own services must not start: they would be a second database and munge, on the usual ports.
    local policy=/usr/sbin/policy-rc.d
    [ -e "$policy" ] || { printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy" && trap "rm -f $policy" EXIT; }
    # Lists that are missing or more than a day old name packages that the mirror may no longer have.
    [ -n "$(find /var/lib/apt/lists -name '*Packages*' -mtime -1 -print -quit 2>/dev/null)" ] || apt-get update -qq >&2
    # shellcheck disable=SC2086 # several words
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >&2 ||
        fail "apt-get could not install $packages"
}

# Writes slurm.conf and what belongs to it; refuses to change them under a cluster that runs.
write_settings() {
    local new
    new="$(mktemp -d)"
    slurm_conf >"$new/slurm.conf"
    echo "NodeName=node[1-$nodes] Name=gpu File=$folder/run/gpu[0-3]" >"$new/gres.conf"
    touch "$folder"/run/gpu{0..3} # a job that asks for GPUs is given files by these names
    [ "$accounting" = 0 ] || slurmdbd_conf >"$new/slurmdbd.conf"
    if running slurmctld && ! cmp -s "$new/slurm.conf" "$SLURM_CONF"; then
        rm -r "$new"
        fail "runs in $folder with other settings; first: $0 stop"
    fi
    chmod 600 "$new"/* && chmod 644 "$new/slurm.conf" "$new/gres.conf"
    mv "$new"/* "$folder/etc/"
    rmdir "$new"
}

slurm_conf() {
    local memory=$(($(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo) * 9 / 10 / nodes))
    cat <<CONF
ClusterName=fiddlehead
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its credential has expired, two minutes by default.
AuthInfo=socket=$munge_socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
# No cgroups: they may not be ours to use, in a container for example.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
# The nodes may have more processors than this machine.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=100000,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
OverTimeLimit=0
MinJobAge=600
InactiveLimit=0
SlurmdTimeout=60
SlurmctldTimeout=60
GresTypes=gpu
NodeName=node[1-$nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 10))-$((port + 9 + nodes)) CPUs=$cpus RealMemory=$memory Gres=gpu:4 State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
    if [ "$accounting" = 0 ]; then
        echo "AccountingStorageType=accounting_storage/none"
    else
        cat <<CONF
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((port + 1))
AccountingStoragePass=$munge_socket
CONF
    fi
}

slurmdbd_conf() {
    cat <<CONF
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((port + 1))
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$munge_socket
CommunicationParameters=NoInAddrAny
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((port + 2))
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
LogFile=$folder/log/slurmdbd.log
PidFile=$folder/run/slurmdbd.pid
CONF
}

# munge signs the messages between the daemons, with a key of this cluster's own.
start_munge() {
    running munged || {
        [ -s "$folder/etc/munge.key" ] || head -c 128 /dev/urandom >"$folder/etc/munge.key"
        chmod 400 "$folder/etc/munge.key"
        # --force: it would refuse a folder that others can write to, such as /tmp, on the way to its socket.
        munged --force --key-file="$folder/etc/munge.key" --socket="$munge_socket" --pid-file="$folder/run/munged.pid" \
            --log-file="$folder/log/munged.log" --seed-file="$folder/run/munge.seed" 2>/dev/null
    }
    wait_for 10 munge --no-input --socket="$munge_socket"
}

start_accounting() {
    local data="$folder/database"
    if ! running mariadbd; then
        mkdir -p "$data"
        chown -R mysql "$data"
        [ -d "$data/mysql" ] || mariadb-install-db --no-defaults --user=mysql --datadir="$data" --skip-test-db \
            >"$folder/log/mariadb-install.log" 2>&1
        # Losing the last second of accounting in a crash is no loss here; waiting for the disk would be.
        setsid mariadbd --no-defaults --user=mysql --datadir="$data" --bind-address=127.0.0.1 --port=$((port + 2)) \
            --socket="$database_socket" --pid-file="$data/pid" --innodb-buffer-pool-size=64M \
            --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=0 \
            >"$folder/log/mariadb.log" 2>&1 </dev/null &
        echo $! >"$folder/run/mariadbd.pid"
    fi
    wait_for 30 mariadb-admin --no-defaults --socket="$database_socket" --user=root ping
    mariadb --no-defaults --socket="$database_socket" --user=root <<SQL
CREATE DATABASE IF NOT EXISTS slurm_acct_db;
CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm', 'slurm'@'localhost' IDENTIFIED BY 'slurm';
GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1', 'slurm'@'localhost';
SQL
    running slurmdbd || slurmdbd
    wait_for 30 sacctmgr --noheader list cluster
    sacctmgr --immediate add cluster fiddlehead >/dev/null 2>&1 || true # it is there from an earlier start
}

node_names() { seq -f "node%.0f" "$nodes"; }
all_nodes_up() { [ "$(sinfo --noheader --Node --partition=batch --format=%T | grep -cE '^(idle|mixed|allocated)$')" = "$nodes" ]; }
no_jobs() { [ -z "$(squeue --noheader)" ]; }
pid_of() { cat "$folder/run/$1${2:+.$2}.pid" 2>/dev/null; }

# Whether PROGRAM (of node NODE) is the process in its pid file: by name, for a pid may since be another's.
running() {
    local pid
    pid="$(pid_of "$@")" && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$1" ]
}

# Ends PROGRAM (of node NODE), by force after ten seconds.
end() {
    running "$@" || return 0
    kill "$(pid_of "$@")" || true
    wait_for 10 not_running "$@" || kill -9 "$(pid_of "$@")" || true
}
not_running() { ! running "$@"; }

# A node's daemon that was killed leaves its jobs' processes behind; they carry this cluster's SLURM_CONF.
end_job_processes() {
    local process
    for process in /proc/[0-9]*; do
        { tr '\0' '\n' <"$process/environ" | grep -qxF "SLURM_CONF=$SLURM_CONF"; } 2>/dev/null || continue
        if [ "$(cat "$process/comm" 2>/dev/null)" = slurmstepd ] || grep -qsz '^SLURMD_NODENAME=' "$process/environ"; then
            kill -9 "${process#/proc/}" 2>/dev/null || true
        fi
    done
}

# wait_for SECONDS COMMAND...: until the command succeeds.
wait_for() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$deadline" ] || { say "waited in vain for: $* (see $folder/log)"; return 1; }
        sleep 0.2
    done
}

case "${1:-}" in
    start | stop | purge) "$1" ;;
    *) echo "$usage" >&2; exit 2 ;;
esac
