#!/usr/bin/env bash
# The whole life of a TPU slice that pretrains:
#
#   bash launch/tpu_pod.sh COMMAND --project=ID --zone=ZONE --name=NAME --accelerator=TYPE [options] -- FLAGS
#
# FLAGS are those of launch/pretrain.py: --config=... --corpus=gs://... --workdir=gs://..., or with --program=embed those
# of launch/embed.py: --corpus=gs://... --model=... --out=gs://...
#
# Commands:
#   up       all of it: create, wait, set up, run, watch (recreate and resume when preempted), fetch logs, delete.
#            Safe to run again at any time: it takes up whatever it finds.
#   create   ask for the slice, as a queued resource
#   watch    'up' for a slice that was asked for already
#   setup    copy the code and install it on all workers
#   run      start pretrain.py on all workers
#   status   state of the slice and of every worker
#   logs     fetch the log of every worker
#   stop     have the run save and end; 'watch' then ends with 143 and keeps the slice
#   delete   delete the slice; a 'watch' that runs elsewhere ends
#
# Options:
#   --accelerator=v5litepod-16 | v5p-32 | v6e-16 | ...    the runtime version follows from it, or: --runtime=VERSION
#   --spot                     may be preempted, cheaper; or --reserved
#   --network=, --subnetwork=, --service-account=, --internal-ips      passed to gcloud
#   --python=3.12              Python that uv installs on the workers
#   --extras=tpu,train,gcp     extras of cellplm-jax to install
#   --attempts=20              failures in a row (without ten minutes of running between) before giving up
#   --program=embed            run launch/embed.py instead of launch/pretrain.py
#   --keep                     do not delete the slice at the end
#   --state=DIR                what this script keeps here: the code as first sent, logs (default runs/tpu/NAME)
#   --dry-run                  print every command, run none
#
# Environment: POLL (seconds between looks, default 60), BACKOFF (first delay after a failure, default 30; doubled up to
# 900). Exit status: 0 done; 2 bad usage, or the run refused its input; 143 stopped and saved; 1 gave up.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
  echo "tpu_pod: $1" >&2
  exit 2
}

say() {
  printf '%s tpu_pod: %s\n' "$(date -u +%H:%M:%S)" "$1"
}

command="${1:-}"
case "$command" in
  up | create | watch | setup | run | status | logs | stop | delete) shift ;;
  *)
    sed -n '2,/^set /p' "${BASH_SOURCE[0]}" | sed -e '$d' -e 's/^# \{0,1\}//' >&2
    fail "unknown command '$command'; expected up, create, watch, setup, run, status, logs, stop or delete"
    ;;
esac

project="${PROJECT:-}" zone="${ZONE:-}" name="${NAME:-}" accelerator="${ACCELERATOR:-}"
runtime='' python=3.12 extras=tpu,train,gcp attempts=20 state_directory='' dry_run='' keep='' program=pretrain
create_options=()
flags=()
while [ "$#" -gt 0 ]; do
  case "$1" in
    --project=*) project="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --name=*) name="${1#*=}" ;;
    --accelerator=*) accelerator="${1#*=}" ;;
    --runtime=*) runtime="${1#*=}" ;;
    --python=*) python="${1#*=}" ;;
    --extras=*) extras="${1#*=}" ;;
    --attempts=*) attempts="${1#*=}" ;;
    --state=*) state_directory="${1#*=}" ;;
    --program=*) program="${1#*=}" ;;
    --spot | --reserved | --internal-ips) create_options+=("$1") ;;
    --network=* | --subnetwork=* | --service-account=*) create_options+=("$1") ;;
    --keep) keep=1 ;;
    --dry-run) dry_run=1 ;;
    --)
      shift
      flags=("$@")
      break
      ;;
    *) fail "unknown option '$1'; flags of $program.py go after --" ;;
  esac
  shift
done

[ -n "$project" ] || fail "no project; give --project=ID"
[ -n "$zone" ] || fail "no zone; give --zone=ZONE, see launch/README.md for which has which TPU"
[ -n "$name" ] || fail "no name; give --name=NAME"
case "$attempts" in '' | *[!0-9]*) fail "--attempts=$attempts; expected a number" ;; esac
case "$command" in
  up | create | watch)
    [ -n "$accelerator" ] || fail "no accelerator; give --accelerator=TYPE, such as v5litepod-16"
    if [ -z "$runtime" ]; then
      case "$accelerator" in
        v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
        v5p-*) runtime=v2-alpha-tpuv5 ;;
        v6e-*) runtime=v2-alpha-tpuv6e ;;
        v4-* | v3-* | v2-*) runtime=tpu-ubuntu2204-base ;;
        *) fail "no runtime version is known for '$accelerator'; give --runtime=VERSION" ;;
      esac
    fi
    ;;
esac
case "$command" in
  up | watch | run)
    case "$program" in
      pretrain) written=--workdir= ;;
      embed) written=--out= ;;
      *) fail "unknown program '$program'; expected pretrain or embed" ;;
    esac
    [ "${#flags[@]}" -gt 0 ] || fail "no flags for $program.py; give them after --"
    for needed in --corpus= "$written"; do
      found=
      for flag in "${flags[@]}"; do case "$flag" in "$needed"*) found="$flag" ;; esac; done
      [ -n "$found" ] || fail "$program.py needs $needed...; give it after --"
      case "$found" in
        "$needed"gs://*) ;;
        *) fail "'$found' is on this machine's disk, or on a worker's, which goes with it; give a gs:// address" ;;
      esac
    done
    ;;
esac
state_directory="${state_directory:-$root/runs/tpu/$name}"
poll="${POLL:-60}" backoff="${BACKOFF:-30}"

# --- gcloud ------------------------------------------------------------------------------------------------------

run_command() {
  if [ -n "$dry_run" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

where=("--zone=$zone" "--project=$project")

on_all_workers() {
  run_command gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --quiet "--command=$1" "${@:2}"
}

quoted() {
  local text=
  printf -v text ' %q' "$@"
  echo "${text# }"
}

create_slice() {
  say "asking for $accelerator in $zone"
  run_command gcloud compute tpus queued-resources create "$name" "${where[@]}" --node-id="$name" \
    --accelerator-type="$accelerator" --runtime-version="$runtime" ${create_options[@]+"${create_options[@]}"} \
    --async --quiet
}

delete_slice() {
  say "deleting $name"
  run_command gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

# Sets $state: what gcloud says, MISSING where there is no such slice, UNKNOWN where gcloud could not tell.
look_at_slice() {
  local query=(gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)')
  if [ -n "$dry_run" ]; then
    run_command "${query[@]}"
    state="${1:-ACTIVE}"
    return
  fi
  local errors
  errors="$(mktemp)"
  if state="$("${query[@]}" 2> "$errors")"; then
    state="${state:-UNKNOWN}"
  elif grep -qi 'not.found' "$errors"; then
    state=MISSING
  else
    say "gcloud cannot tell: $(tail -n 1 "$errors")"
    state=UNKNOWN
  fi
  rm -f "$errors"
}

# Sets $workers: absent, idle, running, mixed, or 'finished STATUS'; UNREACHABLE where ssh fails.
look_at_workers() {
  local script=cellplm-jax/launch/tpu_worker.sh
  local question="if [ -e $script ]; then bash $script status; else echo cellplm-worker \$(hostname) absent; fi"
  if [ -n "$dry_run" ]; then
    on_all_workers "$question"
    workers="${1:-finished 0}"
    return
  fi
  if ! report="$(on_all_workers "$question" 2> /dev/null | grep '^cellplm-worker ' | cut -d' ' -f3-)"; then
    workers=UNREACHABLE
    return
  fi
  local distinct
  # Any worker that is not set up or was never started asks for that first; both are safe to repeat on the others.
  distinct="$(sort -u <<< "$report")"
  if [ "$(wc -l <<< "$distinct")" = 1 ]; then
    workers="$distinct"
  elif grep -q '^finished 2$' <<< "$distinct"; then
    workers='finished 2'
  elif grep -q '^absent$' <<< "$distinct"; then
    workers=absent
  elif grep -q '^idle$' <<< "$distinct"; then
    workers=idle
  elif grep -q '^running$' <<< "$distinct"; then
    workers=mixed
  else
    # Ended, not all alike: whatever is not a consequence of another's end.
    workers="$(grep -v -e '^finished 134$' -e '^finished 0$' <<< "$distinct" | head -n 1)"
    workers="${workers:-finished 134}"
  fi
}

set_up() {
  # The code is sent as it was at the first set-up, so that a resumed run is the run that began.
  local archive="$state_directory/source.tar.gz"
  if [ -n "$dry_run" ] || ! [ -e "$archive" ]; then
    run_command mkdir -p "$state_directory"
    run_command tar -czf "$archive.partial" -C "$root" --exclude=__pycache__ \
      setup.py pyproject.toml README.md LICENSE cellplm_jax configs launch || return 1
    run_command mv "$archive.partial" "$archive"
  fi
  say "setting up all workers"
  run_command gcloud compute tpus tpu-vm scp "$archive" "$name:cellplm-source.tar.gz" "${where[@]}" --worker=all \
    --quiet || return 1
  on_all_workers "mkdir -p cellplm-jax && tar -xzf cellplm-source.tar.gz -C cellplm-jax && \
bash cellplm-jax/launch/tpu_worker.sh setup $(quoted "$python" "$extras")"
}

start_run() {
  say "starting $program.py on all workers"
  local start=("${flags[@]}")
  if [ "$program" != pretrain ]; then start=("--program=$program" "${flags[@]}"); fi
  on_all_workers "bash cellplm-jax/launch/tpu_worker.sh start $(quoted "${start[@]}")"
}

fetch_logs() {
  local directory
  directory="$state_directory/logs/$(date -u +%Y%m%dT%H%M%SZ)"
  run_command mkdir -p "$directory"
  # One file a worker: 0.log, 1.log, ...
  on_all_workers 'cat cellplm-run/log' "--output-directory=$directory" || true
  say "logs are in $directory"
}

# --- what happens in which order -----------------------------------------------------------------------------------

failures=0
started_at=0

# Counts a failure and waits; ends the script after too many in a row.
after_failure() {
  if [ "$started_at" -gt 0 ] && [ $((SECONDS - started_at)) -ge 600 ]; then failures=0; fi
  started_at=0
  failures=$((failures + 1))
  if [ "$failures" -gt "$attempts" ]; then
    say "gave up after $attempts failures in a row: $1"
    finish 1
  fi
  local delay=$((backoff * (1 << (failures < 6 ? failures - 1 : 5))))
  if [ "$delay" -gt 900 ]; then delay=900; fi
  say "$1; failure $failures of at most $attempts in a row, going on in $delay s"
  sleep "$delay"
}

# Fetches logs where there may be some, deletes the slice, ends.
finish() {
  if [ "${state:-}" = ACTIVE ]; then fetch_logs; fi
  if [ -z "$keep" ]; then
    delete_slice || say "the slice could not be deleted and costs money: delete it by hand"
  else
    say "the slice is kept and costs money: bash launch/tpu_pod.sh delete --project=$project --zone=$zone --name=$name"
  fi
  exit "$1"
}

recreate() {
  after_failure "the slice is $state"
  delete_slice || { say "it could not be deleted yet"; return; }
  create_slice || say "it could not be asked for yet"
}

watch_slice() {
  local before='' unreachable=0 unknown=0 mixed_since=0
  while true; do
    if [ -e "$state_directory/deleted" ]; then
      say "deleted by another command"
      exit 1
    fi
    look_at_slice
    if [ "$state" != "$before" ]; then say "the slice is $state"; fi
    before="$state"
    if [ "$state" = UNKNOWN ]; then unknown=$((unknown + 1)); else unknown=0; fi
    case "$state" in
      ACTIVE) ;;
      SUSPENDED | FAILED)
        recreate
        continue
        ;;
      MISSING)
        after_failure "the slice is gone"
        create_slice || say "it could not be asked for yet"
        continue
        ;;
      UNKNOWN)
        # Nothing is deleted on a guess; the run goes on without this script.
        if [ "$unknown" -gt 30 ]; then
          say "gcloud has not answered for too long; run this command again when it does"
          exit 1
        fi
        sleep "$poll"
        continue
        ;;
      *)
        sleep "$poll"
        continue
        ;;
    esac

    look_at_workers
    if [ "$workers" != mixed ]; then mixed_since=0; fi
    if [ "$workers" != UNREACHABLE ]; then unreachable=0; fi
    case "$workers" in
      running)
        if [ "$started_at" = 0 ]; then started_at=$SECONDS; fi
        sleep "$poll"
        ;;
      absent)
        set_up || after_failure "set-up failed"
        ;;
      idle)
        start_run || after_failure "the run could not be started"
        ;;
      mixed)
        # Some have ended: jax ends the others when it notices; if it does not, they are ended here.
        if [ "$mixed_since" = 0 ]; then mixed_since=$SECONDS; fi
        if [ $((SECONDS - mixed_since)) -ge "${MIXED:-600}" ]; then
          mixed_since=0
          on_all_workers 'bash cellplm-jax/launch/tpu_worker.sh kill' || true
        fi
        sleep "$poll"
        ;;
      'finished 0')
        say "the run is complete"
        finish 0
        ;;
      'finished 2')
        say "the run refused its configuration, data or work directory; see the logs"
        finish 2
        ;;
      'finished 143')
        if [ -e "$state_directory/stopped" ]; then
          say "stopped and saved; the slice is kept and costs money"
          fetch_logs
          exit 143
        fi
        after_failure "the run was told to stop"
        start_run || say "it could not be started yet"
        ;;
      finished*)
        fetch_logs
        after_failure "the run ended with status ${workers#finished }"
        start_run || say "it could not be started yet"
        ;;
      *)
        unreachable=$((unreachable + 1))
        if [ "$unreachable" -ge 5 ]; then
          unreachable=0
          state="ACTIVE, but its workers cannot be reached"
          recreate
        else
          sleep "$poll"
        fi
        ;;
    esac
  done
}

if [ -z "$dry_run" ]; then
  mkdir -p "$state_directory"
  case "$command" in up | create | watch | run) rm -f "$state_directory/deleted" "$state_directory/stopped" ;; esac
fi

case "$command" in
  create) create_slice ;;
  setup) set_up ;;
  run) start_run ;;
  logs) fetch_logs ;;
  stop)
    run_command touch "$state_directory/stopped"
    on_all_workers 'bash cellplm-jax/launch/tpu_worker.sh stop'
    ;;
  delete)
    run_command touch "$state_directory/deleted"
    delete_slice
    ;;
  status)
    look_at_slice
    say "the slice is $state"
    if [ "$state" = ACTIVE ]; then
      on_all_workers 'bash cellplm-jax/launch/tpu_worker.sh status; tail -n 1 cellplm-run/log'
    fi
    ;;
  up | watch)
    if [ -n "$dry_run" ]; then
      echo "# create, and look every $poll s until it is ACTIVE:"
      if [ "$command" = up ]; then create_slice; fi
      look_at_slice
      echo "# set up, start, and look every $poll s until every worker has finished:"
      set_up
      start_run
      look_at_workers
      echo "# whenever it is SUSPENDED or FAILED, or its workers cannot be reached five times:"
      delete_slice
      create_slice
      echo "# at the end:"
      fetch_logs
      if [ -z "$keep" ]; then delete_slice; fi
      exit 0
    fi
    look_at_slice
    if [ "$state" = MISSING ] && [ "$command" = up ]; then
      create_slice || exit 1
    fi
    watch_slice
    ;;
esac
