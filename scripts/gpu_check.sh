#!/usr/bin/env bash
# What a GPU machine is for: build there, run every test there, look for races and stray accesses, measure.
#   scripts/gpu_check.sh OUT [install] [test] [sanitize] [bench] [demo]      (all parts by default)
# Needs torch with CUDA, nvcc, ninja, pybind11, pytest, hypothesis; no network. PEERS=DIR adds rival packages to
# the benchmark; WEIGHTS=DIR gives the demo its pretrained encoder.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$1
shift
parts=${*:-install test sanitize bench demo}
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} PYTHONUNBUFFERED=1 PYTHONPATH=$PWD
python=${PYTHON:-python3}
status=0

part() {
  local name=$1 start=$SECONDS
  shift
  [[ " $parts " == *" $name "* ]] || return 0
  if "$@" >"$out/$name.log" 2>&1; then summary+="$name ok $((SECONDS - start)) s"$'\n'; else
    summary+="$name FAILED $((SECONDS - start)) s: $(tail -n 3 "$out/$name.log" | tr '\n' ' ')"$'\n'
    status=1
  fi
}
sanitize() {
  for tool in memcheck racecheck initcheck synccheck; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" scripts/sanitize.py || return 1
  done
}

summary=""
"$python" setup.py --quiet build_ext --inplace >"$out/build.log" 2>&1 || { tail -n 40 "$out/build.log"; exit 1; }
install_and_import() {
  "$python" -m pip install --no-build-isolation --no-deps --no-index --target "$out/../site" . &&
    (cd / && PYTHONPATH="$out/../site" "$python" -c "import any2point.ops as o; print(o.__file__)")
}
part install install_and_import
part test "$python" -m pytest tests --maxfail=40
part sanitize sanitize
part bench "$python" benchmarks/gpu.py --output "$out/gpu.csv" ${PEERS:+--peers "$PEERS"} ${COMMIT:+--commit "$COMMIT"}
part demo "$python" -m any2point demo ${WEIGHTS:+--source "$WEIGHTS"} --output "$out/../demo"
for name in $parts; do [[ -f $out/$name.log ]] && { echo "--- $name"; tail -n "${LINES_EACH:-25}" "$out/$name.log"; }; done
printf '%s' "$summary"
exit $status
