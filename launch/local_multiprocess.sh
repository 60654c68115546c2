#!/usr/bin/env bash
# Runs launch/pretrain.py, or another program of launch/, as several processes on this machine:
#
#   bash launch/local_multiprocess.sh N --config=... --corpus=... --workdir=... [any other flag of pretrain.py]
#   bash launch/local_multiprocess.sh N --program=embed --corpus=... --model=... --out=...
#
# Options of this script, anywhere among the flags:
#   --program=NAME launch/NAME.py instead of launch/pretrain.py
#   --dry-run      print the commands and run nothing
#   --devices=K    K devices a process, simulated on the CPU
#   --logs=DIR     where process-0.log, process-1.log, ... go (default: a new directory under ${TMPDIR:-/tmp})
#
# Process 0 also writes to the terminal. When a process fails the others are ended and its status is passed on; SIGINT
# and SIGTERM make all of them save and end with status 143; a second one kills them.
#
# Environment: PYTHON (default: .venv/bin/python, else python3), JAX_PLATFORMS (default: cpu; with cuda, process K takes
# GPU K), GRACE (seconds that the others get after one has failed, default 5).
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

usage() {
  sed -n '2,/^set /p' "${BASH_SOURCE[0]}" | sed -e '$d' -e 's/^# \{0,1\}//' >&2
  echo "local_multiprocess: $1" >&2
  exit 2
}

number="${1:-}"
case "$number" in
  '' | *[!0-9]* | 0) usage "the first argument is '${number}'; expected the number of processes" ;;
esac
shift

dry_run=
program=pretrain
devices=
logs=
flags=()
for argument in "$@"; do
  case "$argument" in
    --dry-run) dry_run=1 ;;
    --program=*) program="${argument#*=}" ;;
    --devices=*) devices="${argument#*=}" ;;
    --logs=*) logs="${argument#*=}" ;;
    --coordinator_address* | --num_processes* | --process_id*) usage "$argument is set by this script" ;;
    *) flags+=("$argument") ;;
  esac
done
[ -e "$root/launch/$program.py" ] || usage "there is no launch/$program.py; expected --program=pretrain or embed"
[ "${#flags[@]}" -gt 0 ] || usage "no flags for launch/$program.py; expected at least --corpus=..."
case "$devices" in *[!0-9]* | 0) usage "--devices=$devices; expected a number" ;; esac

python="${PYTHON:-}"
if [ -z "$python" ]; then
  python=python3
  if [ -x "$root/.venv/bin/python" ]; then python="$root/.venv/bin/python"; fi
fi
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
if [ -n "$devices" ]; then
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
fi

port=PORT
if [ -z "$dry_run" ]; then
  port="$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
  if [ -z "$logs" ]; then logs="$(mktemp -d "${TMPDIR:-/tmp}/cellplm-logs.XXXXXX")"; fi
  mkdir -p "$logs"
fi

pids=()
for ((k = 0; k < number; k++)); do
  command=("$python" "$root/launch/$program.py" "${flags[@]}"
    "--coordinator_address=127.0.0.1:$port" "--num_processes=$number" "--process_id=$k")
  gpu=()
  case "$JAX_PLATFORMS" in *cuda* | *gpu*) gpu=("JAX_LOCAL_DEVICE_IDS=$k") ;; esac
  if [ -n "$dry_run" ]; then
    settings=("JAX_PLATFORMS=$JAX_PLATFORMS" ${gpu[@]+"${gpu[@]}"})
    if [ -n "$devices" ]; then settings+=("XLA_FLAGS=${XLA_FLAGS# }"); fi
    printf '%q ' env "${settings[@]}" "${command[@]}"
    echo "> ${logs:-LOGS}/process-$k.log 2>&1 &"
    continue
  fi
  if [ "$k" = 0 ]; then
    env ${gpu[@]+"${gpu[@]}"} "${command[@]}" > >(tee "$logs/process-0.log") 2>&1 &
  else
    env ${gpu[@]+"${gpu[@]}"} "${command[@]}" > "$logs/process-$k.log" 2>&1 &
  fi
  pids+=("$!")
done
if [ -n "$dry_run" ]; then exit 0; fi
echo "local_multiprocess: $number processes, pids ${pids[*]}; logs in $logs" >&2

running=("${pids[@]}")
signals=0
# shellcheck disable=SC2329  # called by the trap
forward() {
  signals=$((signals + 1))
  local signal=TERM
  if [ "$signals" -gt 1 ]; then signal=KILL; fi
  kill "-$signal" ${running[@]+"${running[@]}"} 2>/dev/null || true
}
trap forward INT TERM

# Every process is looked at a few times a second: 'wait -n' would do it too, but not in the bash of macOS.
status=0
failed_at=
while [ "${#running[@]}" -gt 0 ]; do
  left=()
  for pid in "${running[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      left+=("$pid")
      continue
    fi
    code=0
    wait "$pid" || code=$?
    # 134 is how jax ends a process whose peers are gone: a consequence, where there is another status to report.
    if [ "$code" != 0 ] && { [ "$status" = 0 ] || { [ "$status" = 134 ] && [ -z "$failed_at" ]; }; }; then
      status=$code
    fi
  done
  running=(${left[@]+"${left[@]}"})
  [ "${#running[@]}" -gt 0 ] || break
  if [ "$status" != 0 ]; then
    failed_at="${failed_at:-$SECONDS}"
    grace="${GRACE:-5}"
    # Preempted processes save together; leave them the time to finish that.
    if [ "$status" = 143 ] && [ "$grace" -lt 60 ]; then grace=60; fi
    if [ $((SECONDS - failed_at)) -ge "$grace" ]; then
      echo "local_multiprocess: one process ended with status $status; ending ${running[*]}" >&2
      kill -KILL "${running[@]}" 2>/dev/null || true
    fi
  fi
  sleep 0.2 || true
done
if [ "$status" != 0 ]; then
  echo "local_multiprocess: status $status; logs in $logs" >&2
fi
exit "$status"
