"""Build of any2point: one stable-ABI extension (CPU, and CUDA when a toolkit is found) and a NumPy module.

The build is a ninja file: parallel, incremental, and independent of torch's own build helpers, which cannot
compile CUDA with a CPU-only torch. Environment:

    ANY2POINT_CUDA=auto|0|1   auto (default): with CUDA if nvcc is found; 0: never; 1: fail if it cannot be
    ANY2POINT_NUMPY=1|0       0 leaves out the NumPy module; the wheel then fits every Python 3
    TORCH_CUDA_ARCH_LIST      e.g. "9.0" or "8.0;9.0+PTX"; default 7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX
    CUDA_HOME, CXX, MAX_JOBS  as usual
    DEBUG=1                   -O0 -g, device line information
"""

from __future__ import annotations

import filecmp
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent.resolve()
TORCH_FLOOR = "0x020a000000000000"  # torch 2.10: symbols newer than this are compile errors
DEFAULT_ARCHS = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"
# One object per instruction set; csrc/common/isa.h picks among them at run time.
SIMD_FLAGS = {"scalar": ""}
BF16_FLAGS: dict[str, str] = {}  # the same for *.bf16.cpp, where the compiler knows these sets
if platform.machine().lower() in ("x86_64", "amd64"):
    avx2 = "-mavx2 -mfma -mbmi -mbmi2 -mlzcnt -mpopcnt"
    # GCC warns about undefined values inside of its own AVX-512 header.
    avx512 = f"{avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -Wno-maybe-uninitialized"
    SIMD_FLAGS |= {"avx2": avx2, "avx512": avx512}
    BF16_FLAGS |= {"avx512bf16": f"{avx512} -mavx512bf16"}
    BF16_FLAGS |= {"amx": f"{avx512} -mavx512bf16 -mamx-tile -mamx-bf16"}


def environment_flag(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, default).strip().lower()
    if value not in allowed:
        raise SystemExit(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    return value


def cuda_home() -> Path | None:
    """The toolkit's folder, or None for a CPU-only build. Never depends on a visible GPU."""
    mode = environment_flag("ANY2POINT_CUDA", "auto", ("auto", "0", "1"))
    if mode == "0":
        return None
    if os.environ.get("CUDA_HOME"):
        home = Path(os.environ["CUDA_HOME"])
        if not (home / "bin" / "nvcc").exists():
            raise SystemExit(f"CUDA_HOME: expected a CUDA toolkit, got {home} (no bin/nvcc in it)")
        return home
    if nvcc := shutil.which("nvcc"):
        # nvcc may be a wrapper script, so the folder above it is not always the toolkit: ask it.
        dry = [nvcc, "--dryrun", "-x", "cu", os.devnull, "-c", "-o", os.devnull]
        top = re.search(r"TOP=(.+)", subprocess.run(dry, capture_output=True, text=True).stderr)
        if top:
            return Path(top[1].strip()).resolve()
    if mode == "1":
        raise SystemExit("ANY2POINT_CUDA=1: expected nvcc on PATH or CUDA_HOME to be set, found neither")
    return None


def arch_flags(archs: str) -> tuple[list[str], list[str]]:
    """nvcc's -gencode flags and the names recorded for `any2point info`."""
    flags, names = [], []
    for arch in re.split(r"[;,\s]+", archs.strip()):
        match = re.fullmatch(r"(\d+)\.?(\d[af]?)(\+PTX)?", arch)
        if not match:
            raise SystemExit(f'TORCH_CUDA_ARCH_LIST: expected entries like "9.0" or "12.0+PTX", got {arch!r}')
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        names.append(f"sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
            names.append(f"compute_{number}")
    return flags, names


def max_jobs() -> int:
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    if not jobs.isdigit() or int(jobs) < 1:
        raise SystemExit(f"MAX_JOBS: expected a positive integer, got {jobs!r}")
    return int(jobs)


def escape(path: object) -> str:
    return str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


class NinjaFile:
    """Just enough of ninja: rules, edges with header dependencies, and the run itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = ["ninja_required_version = 1.5"]

    def rule(self, name: str, command: str, *, depfile: bool) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def edge(self, rule: str, out: Path, inputs: list[Path], **variables: str) -> Path:
        self.lines.append(f"build {escape(out)}: {rule} {' '.join(map(escape, inputs))}")
        self.lines += [f"  {key} = {value}" for key, value in variables.items()]
        return out

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        text, file = "\n".join(self.lines) + "\n", self.folder / "build.ninja"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        # This Python's ninja before the one on PATH: another version would not trust the log and rebuild.
        ours = importlib.util.find_spec("ninja") is not None
        command = [sys.executable, "-m", "ninja"] if ours else ["ninja"]
        if not ours and not shutil.which("ninja"):
            raise SystemExit("any2point: expected ninja, found none: pip install ninja")
        if subprocess.run([*command, "-C", str(self.folder), "-j", str(max_jobs())]).returncode:
            raise SystemExit("any2point: the compiler stopped with an error (above)")


class Build(build_ext):
    """Both extensions come out of one ninja run, so that they share their torch-free objects."""

    def run(self) -> None:
        import torch

        torch_dir, cuda = Path(torch.__file__).parent, cuda_home()
        debug = os.environ.get("DEBUG", "0") not in ("", "0")
        # Not setuptools' temporary folder: pip, editable installs and build_ext share these objects.
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-{'cuda' if cuda else 'cpu'}"
        cxx = os.environ.get("CXX", "g++")
        # -ffp-contract=off: the order of a squared distance's roundings is part of the contract.
        optimise = "-O0 -g" if debug else "-O3 -DNDEBUG"
        flags = (
            f"{optimise} -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno "
            f"-Wall -Wextra -I{ROOT / 'csrc'} -ffile-prefix-map={ROOT}/= "
            f"-ffile-prefix-map={torch_dir / 'include'}/="
        )
        bf16 = BF16_FLAGS if self.knows_bf16(cxx) else {}
        flags += " -DA2P_WITH_BF16" if bf16 else ""
        stable = f"-DTORCH_TARGET_VERSION={TORCH_FLOOR} -isystem {torch_dir / 'include'}"
        stable += " -DUSE_CUDA -DANY2POINT_WITH_CUDA" if cuda else ""

        hopper = False  # whether *.sm90a.*, which need instructions of that architecture alone, are built
        ninja = NinjaFile(build)
        ninja.rule("cxx", f"{cxx} {flags} $extra -MMD -MF $out.d -c $in -o $out", depfile=True)
        ninja.rule("link", f"{cxx} -shared -o $out $in $libs", depfile=False)
        archs: list[str] = []
        if cuda:
            gencode, archs = arch_flags(os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS)
            hopper = not {"sm_90", "sm_90a"}.isdisjoint(archs)
            device = "-O0 -g -lineinfo" if debug else "-O3 -lineinfo -DNDEBUG"
            if not os.environ.get("TORCH_CUDA_ARCH_LIST"):  # for all cards: 17 MB instead of 250
                device = device.replace("-lineinfo", "--compress-mode=size")
            ninja.rule(
                "nvcc",
                f"{cuda / 'bin' / 'nvcc'} {device} -std=c++17 -fmad=false --threads 2 -I{ROOT / 'csrc'} "
                "-Xcompiler -fPIC,-fvisibility=hidden,-ffp-contract=off $gencode "
                "-MD -MF $out.d -c $in -o $out",
                depfile=True,
            )

        kernels: list[Path] = []  # torch-free: they serve torch and NumPy
        glue: list[Path] = []
        for source in sorted((ROOT / "csrc").rglob("*.cpp")):
            name = source.relative_to(ROOT / "csrc").with_suffix("")
            if source.name == "numpy.cpp" or (source.name.endswith(".sm90a.cpp") and not hopper):
                continue
            if source.name.endswith((".simd.cpp", ".bf16.cpp")):
                levels = SIMD_FLAGS if source.name.endswith(".simd.cpp") else bf16
                for isa, isa_flags in levels.items():
                    out = build / f"{name}.{isa}.o"
                    kernels.append(ninja.edge("cxx", out, [source], extra=f"-DA2P_ISA={isa} {isa_flags}"))
            elif source.name in ("cpu.cpp", "isa.cpp"):
                kernels.append(ninja.edge("cxx", build / f"{name}.o", [source], extra=""))
            else:
                glue.append(ninja.edge("cxx", build / f"{name}.o", [source], extra=stable))
        if cuda:
            for source in sorted((ROOT / "csrc").rglob("*.cu")):
                name = source.relative_to(ROOT / "csrc").with_suffix("")
                out, targets = build / f"{name}.cu.o", " ".join(gencode)
                if source.name.endswith(".sm90a.cu"):
                    if not hopper:
                        continue
                    targets = "-gencode=arch=compute_90a,code=sm_90a"
                glue.append(ninja.edge("nvcc", out, [source], gencode=targets))

        runtime = "" if debug else "-Wl,-s"
        runtime += self.shared_runtime(cxx)
        # libtorch must stay in NEEDED (torch is loaded RTLD_LOCAL); no RPATH: torch is imported first.
        libs = f"-L{torch_dir / 'lib'} -Wl,--no-as-needed -ltorch -Wl,--as-needed -ltorch_cpu -lc10 {runtime}"
        if cuda:
            libs += f" -L{cuda / 'lib64'} -lcudart_static -ldl -lrt -lpthread"
        outputs = {"any2point._C": ninja.edge("link", build / "_C.so", [*glue, *kernels], libs=libs)}

        if any(ext.name == "any2point._numpy" for ext in self.extensions):
            import pybind11

            extra = f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_paths()['include']}"
            module = ninja.edge("cxx", build / "numpy.o", [ROOT / "csrc" / "numpy.cpp"], extra=extra)
            outputs["any2point._numpy"] = ninja.edge(
                "link", build / "_numpy.so", [module, *kernels], libs=runtime
            )
        ninja.run()

        for name, built in outputs.items():
            target = Path(self.get_ext_fullpath(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists() or not filecmp.cmp(built, target, shallow=False):
                # Replaced, not overwritten: a running process keeps the file that it has mapped.
                temporary = target.with_name(target.name + ".new")
                shutil.copy2(built, temporary)
                os.replace(temporary, target)
        record = {"cuda": bool(cuda), "archs": archs, "torch": torch.__version__, "debug": debug}
        record |= {"simd": [*SIMD_FLAGS, *bf16], "compiler": self.version_of(cxx)}
        record["nvcc"] = self.version_of(str(cuda / "bin" / "nvcc")) if cuda else None
        target = Path(self.get_ext_fullpath("any2point._C")).parent / "_build.json"
        target.write_text(json.dumps(record, indent=1) + "\n")

    @staticmethod
    def shared_runtime(compiler: str) -> str:
        """Where the compiler has no libstdc++.so to link to it quietly takes the static one, and an exception
        that leaves the extension meets torch's copy of the C++ runtime and crashes: name the shared one."""
        ask = [*compiler.split(), "-print-file-name=libstdc++.so"]
        answer = subprocess.run(ask, capture_output=True, text=True).stdout.strip()
        return "" if os.path.isabs(answer) or not answer else " -l:libstdc++.so.6"

    @staticmethod
    def knows_bf16(compiler: str) -> bool:
        """Whether compiler and assembler know the last of BF16_FLAGS: GCC 11, Clang 12 and newer."""
        if not BF16_FLAGS:
            return False
        program = "#include <immintrin.h>\nvoid release() { _tile_release(); }\n"
        with tempfile.TemporaryDirectory() as folder:
            command = [*compiler.split(), *BF16_FLAGS["amx"].split(), "-x", "c++", "-c", "-"]
            command += ["-o", str(Path(folder) / "release.o")]
            return not subprocess.run(command, input=program, capture_output=True, text=True).returncode

    @staticmethod
    def version_of(compiler: str) -> str:
        text = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True).stdout
        lines = [line for line in text.splitlines() if line.strip()]
        release = [line for line in lines if "release" in line]
        return (release or lines or ["unknown"])[0].strip()

    def get_outputs(self) -> list[str]:
        folder = Path(self.get_ext_fullpath("any2point._C")).parent
        return [*super().get_outputs(), str(folder / "_build.json")]


class Wheel(bdist_wheel):
    """Without the NumPy module nothing in the wheel knows which Python it runs on."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return tag if with_numpy else ("py3", "none", tag[2])


with_numpy = environment_flag("ANY2POINT_NUMPY", "1", ("0", "1")) == "1"

if __name__ == "__main__":
    extensions = [Extension("any2point._C", sources=[], py_limited_api=True)]
    if with_numpy:
        extensions.append(Extension("any2point._numpy", sources=[]))
    setup(ext_modules=extensions, cmdclass={"build_ext": Build, "bdist_wheel": Wheel})
