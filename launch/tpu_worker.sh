#!/usr/bin/env bash
# What launch/tpu_pod.sh runs on every worker of a TPU slice:
#
#   tpu_worker.sh setup PYTHON EXTRAS   own Python and environment beside the code (the image's Python is 3.10, too old)
#   tpu_worker.sh start FLAGS...        start pretrain.py (with --program=NAME among the flags: NAME.py) in the
#                                       background; nothing where it runs already
#   tpu_worker.sh run FLAGS...          what 'start' puts in the background: runs it, keeps its log and exit status
#   tpu_worker.sh status                one line: cellplm-worker HOST absent|idle|running|finished STATUS
#   tpu_worker.sh stop                  SIGTERM: save and end
#   tpu_worker.sh kill                  SIGKILL, for a process whose peers are gone
#
# Files: ~/cellplm-run/log, pid, status; the environment is ~/cellplm-venv (CELLPLM_HOME instead of ~ for tests).
set -euo pipefail

home="${CELLPLM_HOME:-$HOME}"
code="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
directory="$home/cellplm-run"
environment="$home/cellplm-venv"

# A pid is this run's only until its status is known.
alive() {
  ! [ -e "$directory/status" ] && [ -s "$directory/pid" ] && kill -0 "$(cat "$directory/pid")" 2>/dev/null
}

setup() {
  # uv brings a Python of its own; pip of the image only has to bring uv.
  if ! [ -x "$home/.local/bin/uv" ]; then
    PYTHONUSERBASE="$home/.local" python3 -m pip install --quiet --user uv
  fi
  "$home/.local/bin/uv" venv --quiet --allow-existing --python "$1" "$environment"
  "$home/.local/bin/uv" pip install --quiet --python "$environment/bin/python" "${code}[$2]"
  # TPU start-up is slow without it (v5e and newer); not worth failing for.
  sudo -n sh -c 'echo always > /sys/kernel/mm/transparent_hugepage/enabled' 2>/dev/null || true
  touch "$environment/cellplm-ready"
  echo "cellplm-worker $(hostname) ready: $("$environment/bin/python" --version)"
}

start() {
  if alive; then
    echo "cellplm-worker $(hostname) running"
    return
  fi
  mkdir -p "$directory"
  rm -f "$directory/status" "$directory/pid"
  # A new session: it outlives the ssh connection. 'run' writes the pid, so that there is one before this returns.
  setsid nohup bash "${BASH_SOURCE[0]}" run "$@" > "$directory/runner.log" 2>&1 < /dev/null &
  for _ in $(seq 50); do
    if [ -s "$directory/pid" ]; then break; fi
    sleep 0.1
  done
  echo "cellplm-worker $(hostname) running"
}

run() {
  local workdir='' program=pretrain argument flags=()
  for argument in "$@"; do
    case "$argument" in
      --program=*) program="${argument#--program=}" ;;
      *) flags+=("$argument") ;;
    esac
    case "$argument" in --workdir=gs://*) workdir="${argument#--workdir=}" ;; esac
  done
  cd "$code"
  printf '== %s started: %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$*" >> "$directory/log"
  "$environment/bin/python" "launch/$program.py" ${flags[@]+"${flags[@]}"} >> "$directory/log" 2>&1 &
  local pid=$! code_seen=0
  echo "$pid" > "$directory/pid"
  # Python catches SIGTERM itself; this shell only has to be there to note how it ended.
  trap 'kill -TERM "$pid" 2>/dev/null' TERM INT
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
  wait "$pid" || code_seen=$?
  # The log first: who reads the status may read the log next.
  printf '== %s ended: status %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$code_seen" >> "$directory/log"
  echo "$code_seen" > "$directory/status.partial"
  mv "$directory/status.partial" "$directory/status"
  # The disk of a preempted worker is gone soon; keep its log beside the checkpoints.
  if [ -n "$workdir" ]; then
    gcloud storage cp "$directory/log" "${workdir%/}/logs/$(hostname)-$(date -u +%Y%m%dT%H%M%SZ).log" || true
  fi
}

status() {
  local state=idle
  if ! [ -e "$environment/cellplm-ready" ]; then
    state=absent # set-up has not ended
  elif alive; then
    state=running
  elif [ -e "$directory/status" ]; then
    state="finished $(cat "$directory/status")"
  elif [ -e "$directory/pid" ]; then
    state="finished 137" # it was ended together with the shell that waited for it
  fi
  echo "cellplm-worker $(hostname) $state"
}

stop() {
  if alive; then kill -TERM "$(cat "$directory/pid")"; fi
  echo "cellplm-worker $(hostname) told to save and end"
}

end_now() {
  if alive; then kill -KILL "$(cat "$directory/pid")"; fi
  echo "cellplm-worker $(hostname) ended"
}

verb="${1:-}"
case "$verb" in
  setup | start | run | status | stop)
    shift
    "$verb" "$@"
    ;;
  kill) end_now ;;
  *)
    echo "tpu_worker: unknown command '$verb'; expected setup, start, run, status, stop or kill" >&2
    exit 2
    ;;
esac
