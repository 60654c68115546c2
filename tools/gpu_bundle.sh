#!/usr/bin/env bash
# Gather what a machine with a GPU and no network needs for benchmarks/gpu/run.py, in one folder below 60 MB:
#
#     tools/gpu_bundle.sh [--out DIR] [--present FILE] [IN.h5ad...]
#
# The folder (.gpu-bundle, which git ignores) holds this package as a wheel, the wheels that the machine lacks, the
# original CellPLM, the programs, the stored arrays of the parity check, and a corpus made of the .h5ad files (without
# any: of the bundled PBMC3k). FILE lists what the machine has, a distribution a line (tools/gpu_machine_packages.txt).
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
out="$root/.gpu-bundle"
present="$root/tools/gpu_machine_packages.txt"
python="${PYTHON:-python3}"
limit_mb=60
inputs=()

fail() {
  echo "gpu_bundle: $*" >&2
  exit 2
}

while [ $# -gt 0 ]; do
  case "$1" in
    --out | --present)
      [ $# -ge 2 ] || fail "$1 needs a value"
      if [ "$1" = --out ]; then out="$2"; else present="$2"; fi
      shift 2
      ;;
    -h | --help)
      sed -n '2,9s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
    -*) fail "there is no option $1; expected --out or --present" ;;
    *)
      [ -f "$1" ] || fail "there is no file '$1'; expected .h5ad files"
      inputs+=("$1")
      shift
      ;;
  esac
done
[ -f "$present" ] || fail "there is no file '$present'; expected a list of distributions"
[ ${#inputs[@]} -gt 0 ] || inputs=("$root/cellplm_jax/resources/pbmc3k.h5ad")
"$python" -c 'import cellplm_jax' 2>/dev/null ||
  fail "$python has no cellplm_jax, which prepares the corpus; set PYTHON to one that has (make .venv/.installed)"

rm -rf "$out"
mkdir -p "$out/wheels" "$out/source"

echo "gpu_bundle: the package" >&2
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$out/wheels" "$root"

echo "gpu_bundle: wheels the machine lacks" >&2
machine=(--python-version 3.12 --implementation cp --only-binary=:all:)
for version in 2_34 2_31 2_28 2_27 2_24 2_17 2_12 2_5 1; do
  case "$version" in
    1) machine+=(--platform manylinux1_x86_64 --platform manylinux2014_x86_64 --platform linux_x86_64) ;;
    *) machine+=(--platform "manylinux_${version}_x86_64") ;;
  esac
done
report="$(mktemp)"
trap 'rm -f "$report"' EXIT
"$python" -m pip install --quiet --dry-run --ignore-installed --target "$out/none" "${machine[@]}" \
  --report "$report" "$out"/wheels/*.whl 'grain>=0.2.15'
"$python" - "$report" "$present" >"$out/requirements.txt" <<'PY'
import json
import re
import sys


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


report, present = sys.argv[1:]
with open(present, encoding="utf-8") as file:
    there = {plain(line.split("==")[0].strip()) for line in file if line.strip() and line[0] != "#"}
with open(report, encoding="utf-8") as file:
    wanted = [entry["metadata"] for entry in json.load(file)["install"]]
for entry in wanted:
    if plain(entry["name"]) not in there | {"cellplm-jax"}:
        print(f"{entry['name']}=={entry['version']}")
PY
rm -rf "$out/none"
"$python" -m pip download --quiet --no-deps "${machine[@]}" --dest "$out/wheels" \
  --requirement "$out/requirements.txt" 'cellplm==0.1.0.post2'

echo "gpu_bundle: programs and stored arrays" >&2
for path in benchmarks/machine.py benchmarks/gpu benchmarks/speed tools/original_cellplm.py tests/__init__.py tests/parity; do
  mkdir -p "$out/source/$(dirname "$path")"
  cp -R "$root/$path" "$out/source/$(dirname "$path")/"
done
find "$out/source" -name __pycache__ -prune -exec rm -rf {} +
find "$out/source/benchmarks/speed" -type f ! -name '*.py' -delete

echo "gpu_bundle: the corpus of ${#inputs[@]} file(s)" >&2
JAX_PLATFORMS=cpu "$python" -m cellplm_jax.cli prepare "${inputs[@]}" --out "$out/corpus" --workers 0 --quiet >&2

cat >"$out/run.sh" <<'RUN'
#!/usr/bin/env bash
# Run the benchmark from this folder alone; options as of benchmarks/gpu/run.py.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
python="${PYTHON:-python3}"
site="$(mktemp -d)"
trap 'rm -rf "$site"' EXIT
"$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$here"/wheels/*.whl
PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" "$python" "$here/source/benchmarks/gpu/run.py" --corpus "$here/corpus" "$@"
RUN

size_mb=$(($(du -s --apparent-size -k "$out" | cut -f1) / 1024))
[ "$size_mb" -lt "$limit_mb" ] || fail "the bundle has $size_mb MB; expected less than $limit_mb. Give fewer .h5ad files"
echo "gpu_bundle: $size_mb MB, $(find "$out/wheels" -name '*.whl' | wc -l) wheels" >&2
echo "bash $(realpath --relative-to="$PWD" "$out")/run.sh --minutes 10 --out gpu-results"
