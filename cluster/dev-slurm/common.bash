# What `up` and `down` share: settings, messages, the lock, and how a daemon is found and stopped. Sourced, not run.
# shellcheck shell=bash
set -eEuo pipefail
trap 'say "unexpected failure in line $LINENO of ${BASH_SOURCE[0]##*/}: $BASH_COMMAND"' ERR
umask 022
PATH=$PATH:/usr/sbin:/sbin # `su` leaves them out
export LC_ALL=C            # the output of sinfo and friends is read below

# ---------------------------------------------------------------------------------------------------- messages

readonly begun_us=${EPOCHREALTIME/./}

say() {
  local us=$((${EPOCHREALTIME/./} - begun_us))
  printf 'dev-slurm %s [%3d.%02d s] %s\n' "${0##*/}" $((us / 1000000)) $((us % 1000000 / 10000)) "$*" >&2
}

die() {
  say "error: $*"
  exit 1
}

die_of_usage() {
  say "error: $*"
  exit 2
}

# show_help_and_exit [-h|--help]: print the comment at the top of the script
show_help_and_exit() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2
  case ${1-} in -h | --help) exit 0 ;; *) exit 2 ;; esac
}

# ---------------------------------------------------------------------------------------------------- settings

read_settings() {
  dir=$(realpath -m -- "${HPTOOL_SLURM_DIR:-/tmp/hptool-slurm}")
  nodes=${HPTOOL_SLURM_NODES:-4}
  port=${HPTOOL_SLURM_PORT:-16817}
  accounting=${HPTOOL_SLURM_ACCOUNTING:-dbd}

  # The path goes into configuration files unquoted, and Unix sockets below it must stay within 107 bytes.
  [[ $dir =~ ^/[A-Za-z0-9/._-]+$ && ${#dir} -le 64 ]] ||
    die_of_usage "HPTOOL_SLURM_DIR=$dir: a path of at most 64 letters, digits, '.', '_' and '-' is needed"
  [[ $nodes =~ ^[1-9][0-9]?$ ]] ||
    die_of_usage "HPTOOL_SLURM_NODES=$nodes: a number from 1 to 99 is needed"
  if [[ ! $port =~ ^[1-9][0-9]{3,4}$ ]] || ((port < 1024 || port + 10 + nodes > 65535)); then
    die_of_usage "HPTOOL_SLURM_PORT=$port: a number from 1024 to $((65535 - 10 - nodes)) is needed"
  fi
  [[ $accounting == dbd || $accounting == none ]] ||
    die_of_usage "HPTOOL_SLURM_ACCOUNTING=$accounting: 'dbd' or 'none' is needed"
  ((EUID == 0)) ||
    die_of_usage "this must run as root: it starts daemons that run jobs for other users (sudo, or a container)"

  readonly dir nodes port accounting
  export SLURM_CONF=$dir/etc/slurm.conf # every Slurm daemon and command obeys it; /etc/slurm is never read
}

# One lock for the whole machine, because instances share apt, ports and /etc/hosts. It is not in the state directory:
# a lock that `down --purge` deletes would let two waiting callers in at once.
take_lock() {
  exec 9>/run/hptool-dev-slurm.lock # what outlives the caller is started with 9>&-
  flock -n 9 && return
  say "another up or down is at work: waiting for it"
  flock 9
}

# `up` writes the marker into a state directory before anything else; no other directory is used, let alone deleted. In
# /tmp others can make directories too, so it must be root's.
marker() { echo "$dir/.hptool-dev-slurm"; }
is_state_directory() { [[ -O $dir && -e $(marker) ]]; }

# ----------------------------------------------------------------------------------------------------- daemons

# A daemon's NAME is its program, or slurmd-NODE; its process is in run/NAME.pid. Pid files outlive reboots, and pids
# come round again, so a process counts only if its program and its SLURM_CONF are right.
is_daemon() {
  local name=$1 pid=$2 argv
  { mapfile -d '' -t argv <"/proc/$pid/cmdline"; } 2>/dev/null || return 1
  [[ ${argv[0]-} && ${argv[0]##*/} == "${name%%-*}" ]] || return 1 # a zombie has no argv
  grep -qzxF "SLURM_CONF=$SLURM_CONF" "/proc/$pid/environ" 2>/dev/null
}

pid_of() {
  local pid
  { read -r pid <"$dir/run/$1.pid"; } 2>/dev/null || return 1
  [[ $pid =~ ^[1-9][0-9]*$ ]] && is_daemon "$1" "$pid" && echo "$pid"
}

alive() { pid_of "$1" >/dev/null; }

# wait_until SECONDS COMMAND...
wait_until() {
  local deadline=$((SECONDS + $1))
  shift
  until "$@"; do
    ((SECONDS < deadline)) || return 1
    sleep 0.05
  done
}

# stop_daemons SECONDS NAME...: ask all of them to end, wait for them, and kill what has not ended by then. It waits for
# the processes, because slurmctld removes its pid file when it begins to end and not when it has ended.
stop_daemons() {
  local seconds=$1 name pid
  local -A pids=()
  shift
  for name in "$@"; do
    if pid=$(pid_of "$name"); then pids[$name]=$pid; fi
  done
  for pid in "${pids[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
  wait_until "$seconds" all_gone || true
  for name in "${!pids[@]}"; do
    if is_daemon "$name" "${pids[$name]}"; then
      say "$name (process ${pids[$name]}) did not end in $seconds s: killing it"
      kill -KILL "${pids[$name]}" 2>/dev/null || true
    fi
  done
  for name in "$@"; do rm -f "$dir/run/$name.pid"; done
}

# For stop_daemons, whose `pids` it reads.
all_gone() {
  local name
  for name in "${!pids[@]}"; do
    if is_daemon "$name" "${pids[$name]}"; then return 1; fi
  done
}

# The slurmd that have a pid file, also those of nodes that the settings no longer name.
slurmd_names() {
  local file
  for file in "$dir"/run/slurmd-*.pid; do
    if [[ -e $file ]]; then basename "$file" .pid; fi
  done
}

# -------------------------------------------------------------------------------------------------- /etc/hosts

# The line that makes this instance's host names resolve; its tag lets several instances come and go.
hosts_tag() { echo "# hptool-dev-slurm $dir"; }

# Rewritten in place, because in a container the file is a mount and cannot be replaced.
remove_hosts() {
  local others
  others=$(awk -v tag="$(hosts_tag)" 'substr($0, length($0) - length(tag) + 1) != tag' /etc/hosts)
  [[ $others == "$(</etc/hosts)" ]] || printf '%s\n' "$others" >/etc/hosts
}
