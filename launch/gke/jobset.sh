#!/usr/bin/env bash
# Pretraining on GKE as a JobSet:
#
#   bash launch/gke/jobset.sh COMMAND --name=NAME [options] -- FLAGS
#
# FLAGS are those of launch/pretrain.py: --config=... --corpus=gs://... --workdir=gs://...
#
# Commands:
#   render   print the filled-in YAML
#   apply    send it to the cluster that kubectl points at
#   watch    wait for the end: status 0 completed, 1 failed
#   logs     follow the log of the first pod
#   delete   delete it; the pods get SIGTERM, save and end
#
# Options of render and apply:
#   --image=IMAGE                  built from launch/gke/Dockerfile
#   --accelerator=TYPE             tpu-v5-lite-podslice | tpu-v5p-slice | tpu-v6e-slice | nvidia-h100-80gb | ...
#   --topology=4x4                 of a TPU node pool
#   --chips-per-host=4             TPU chips or GPUs a node (default 4 for TPUs, 8 for GPUs)
#   --hosts=N                      nodes; for TPUs it follows from the topology
#   --spot                         on Spot nodes
#   --service-account=NAME         Kubernetes service account that may read and write the bucket (default cellplm)
#   --restarts=200                 times that the JobSet starts again before it counts as failed
#   --dry-run                      with any command: print what would be run, run nothing
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

fail() {
  echo "jobset: $1" >&2
  exit 2
}

verb="${1:-}"
case "$verb" in
  render | apply | watch | logs | delete) shift ;;
  *)
    sed -n '2,/^set /p' "${BASH_SOURCE[0]}" | sed -e '$d' -e 's/^# \{0,1\}//' >&2
    fail "unknown command '$verb'; expected render, apply, watch, logs or delete"
    ;;
esac

name='' image='' accelerator='' topology='' chips='' hosts='' spot='' account=cellplm restarts=200 dry_run=''
flags=()
while [ "$#" -gt 0 ]; do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --image=*) image="${1#*=}" ;;
    --accelerator=*) accelerator="${1#*=}" ;;
    --topology=*) topology="${1#*=}" ;;
    --chips-per-host=*) chips="${1#*=}" ;;
    --hosts=*) hosts="${1#*=}" ;;
    --service-account=*) account="${1#*=}" ;;
    --restarts=*) restarts="${1#*=}" ;;
    --spot) spot=1 ;;
    --dry-run) dry_run=1 ;;
    --)
      shift
      flags=("$@")
      break
      ;;
    *) fail "unknown option '$1'; flags of pretrain.py go after --" ;;
  esac
  shift
done
case "$name" in
  '' | *[!a-z0-9-]*) fail "--name=$name; expected lower-case letters, digits and hyphens" ;;
esac

run_command() {
  if [ -n "$dry_run" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# A JSON list of strings, which is YAML too.
json_list() {
  local text='' item
  for item in "$@"; do
    item="${item//\\/\\\\}"
    item="${item//\"/\\\"}"
    text="$text, \"$item\""
  done
  echo "[${text#, }]"
}

render() {
  [ -n "$image" ] || fail "no image; give --image=IMAGE, built from launch/gke/Dockerfile"
  [ -n "$accelerator" ] || fail "no accelerator; give --accelerator=TYPE, such as tpu-v5-lite-podslice"
  [ "${#flags[@]}" -gt 0 ] || fail "no flags for pretrain.py; give them after --"
  local file="$here/jobset-gpu.yaml"
  case "$accelerator" in
    tpu-*)
      file="$here/jobset.yaml"
      chips="${chips:-4}"
      local product=1 side
      [ -n "$topology" ] || fail "no topology; give --topology, such as 4x4"
      for side in ${topology//x/ }; do
        case "$side" in *[!0-9]*) fail "--topology=$topology; expected numbers with x between them" ;; esac
        product=$((product * side))
      done
      if [ $((product % chips)) != 0 ]; then
        fail "topology $topology has $product chips, which $chips a host do not divide"
      fi
      hosts="${hosts:-$((product / chips))}"
      if [ $((hosts * chips)) != "$product" ]; then
        fail "$hosts hosts of $chips chips are not the $product chips of $topology"
      fi
      ;;
    *)
      chips="${chips:-8}"
      [ -n "$hosts" ] || fail "no number of nodes; give --hosts=N"
      ;;
  esac
  local text list
  text="$(cat "$file")"
  list="$(json_list "${flags[@]}")"
  if [ -z "$spot" ]; then
    text="$(grep -v -e 'cloud.google.com/gke-spot: "true"' -e '# Spot nodes; jobset.sh' <<< "$text")"
  fi
  # The replacements are quoted: an & in an unquoted one means the text that was matched.
  text="${text//\$\{NAME\}/"$name"}"
  text="${text//\$\{RESTARTS\}/"$restarts"}"
  text="${text//\$\{HOSTS\}/"$hosts"}"
  text="${text//\$\{SERVICE_ACCOUNT\}/"$account"}"
  text="${text//\$\{ACCELERATOR\}/"$accelerator"}"
  text="${text//\$\{TOPOLOGY\}/"$topology"}"
  text="${text//\$\{IMAGE\}/"$image"}"
  text="${text//\$\{CHIPS\}/"$chips"}"
  echo "${text//\$\{FLAGS\}/"$list"}"
}

case "$verb" in
  render) render ;;
  apply)
    yaml="$(render)"
    if [ -n "$dry_run" ]; then
      echo "kubectl apply --filename=- <<'END'"
      echo "$yaml"
      echo END
    else
      kubectl apply --filename=- <<< "$yaml"
    fi
    ;;
  watch)
    if [ -n "$dry_run" ]; then
      run_command kubectl get "jobset/$name" "--output=jsonpath={.status.conditions[?(@.status==\"True\")].type}"
      exit 0
    fi
    before=
    while true; do
      conditions="$(kubectl get "jobset/$name" "--output=jsonpath={.status.conditions[?(@.status==\"True\")].type}")"
      if [ "$conditions" != "$before" ]; then echo "jobset: $name: ${conditions:-waiting}"; fi
      before="$conditions"
      case " $conditions " in
        *' Completed '*) exit 0 ;;
        *' Failed '*) exit 1 ;;
      esac
      sleep "${POLL:-30}"
    done
    ;;
  logs)
    run_command kubectl logs --follow --tail=100 \
      "--selector=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
    ;;
  delete) run_command kubectl delete "jobset/$name" ;;
esac
