"""The build and the binary: arch lists, stable ABI, separate SIMD objects, lazy imports."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import any2point

ROOT = Path(__file__).resolve().parent.parent
BINARY = Path(any2point.__file__).with_name("_C.abi3.so")


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    if not (ROOT / "setup.py").exists():
        pytest.skip("not in a checkout")
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_arch_list(setup_py: ModuleType) -> None:
    flags, names = setup_py.arch_flags("8.0;9.0+PTX 10.0a")
    assert names == ["sm_80", "sm_90", "compute_90", "sm_100a"]
    assert "-gencode=arch=compute_90,code=compute_90" in flags
    default = setup_py.arch_flags(setup_py.DEFAULT_ARCHS)[1]
    assert default == ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_120"]
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST: expected .* got 'hopper'"):
        setup_py.arch_flags("hopper")


def test_environment_is_checked(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ANY2POINT_CUDA", "maybe")
    with pytest.raises(SystemExit, match="ANY2POINT_CUDA: expected one of auto, 0, 1, got 'maybe'"):
        setup_py.cuda_home()
    monkeypatch.setenv("ANY2POINT_CUDA", "0")
    assert setup_py.cuda_home() is None
    monkeypatch.setenv("ANY2POINT_CUDA", "1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match="CUDA_HOME: expected a CUDA toolkit"):
        setup_py.cuda_home()
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="expected nvcc on PATH"):
        setup_py.cuda_home()
    monkeypatch.setenv("MAX_JOBS", "0")
    with pytest.raises(SystemExit, match="MAX_JOBS: expected a positive integer, got '0'"):
        setup_py.max_jobs()


def test_stable_abi() -> None:
    """One binary for torch 2.10 and later: only symbols of the stable ABI, no Python ABI."""
    audit = shutil.which("torch-abi-audit", path=str(Path(sys.executable).parent)) or shutil.which(
        "torch-abi-audit"
    )
    if not audit:
        pytest.skip("torch-abi-audit is not installed")
    run = subprocess.run([audit, str(BINARY)], capture_output=True, text=True)
    report = run.stdout + run.stderr
    assert run.returncode == 0, report
    assert "2.10" in report, report


def test_needs_no_cuda_libraries() -> None:
    """cudart is linked statically, libtorch_cuda looked up at run time: CPU-only torch can load the file."""
    readelf = shutil.which("readelf")
    if not readelf:
        pytest.skip("readelf is not installed")
    dynamic = subprocess.run([readelf, "-d", str(BINARY)], capture_output=True, text=True, check=True).stdout
    needed = [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "NEEDED" in line]
    assert "libtorch.so" in needed
    assert "libstdc++.so.6" in needed  # a static copy of the C++ runtime cannot throw through torch's
    assert not [name for name in needed if "cuda" in name or "python" in name], needed


def test_simd_objects_share_no_inline_functions() -> None:
    """A weak symbol in an AVX-512 object could become everybody's copy, and crash a CPU without AVX-512."""
    objects = [file for isa in ("avx*", "amx") for file in (ROOT / "build").glob(f"*/**/*.{isa}.o")]
    nm = shutil.which("nm")
    if not objects or not nm:
        pytest.skip("no build folder here")
    for file in objects:
        symbols = subprocess.run([nm, "-C", str(file)], capture_output=True, text=True, check=True).stdout
        weak = [line for line in symbols.splitlines() if line[17:18] in "WVu"]
        assert not weak, f"{file.name}: {weak[:3]}"


def test_build_record() -> None:
    record = json.loads(BINARY.with_name("_build.json").read_text())
    assert {"cuda", "archs", "torch", "simd", "compiler"} <= set(record)


def test_import_is_lazy() -> None:
    code = "import any2point, sys; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        any2point.nonsense  # noqa: B018
