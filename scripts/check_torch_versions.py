"""Loads the one built extension under several torch releases and runs every registered CPU op's smoke test.

    python scripts/check_torch_versions.py --folder DIR 2.10.0 2.11.0 2.13.0 2.15.0

Each release gets a virtual environment in DIR (kept: a second run starts at once; a CUDA build of torch takes
about 4 GB). The extension is the one in this checkout: it is built once and not rebuilt. With --wheel it is a
wheel's, installed where no compiler can be found.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

SMOKE = """
import hashlib, torch
import any2point.numpy
from any2point import ops
points = torch.rand(2, 257, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
index = ops.farthest_point_sample(points, 64)
near = ops.knn(points[:, :64], points, 9)
near.distance.sum().backward()
grouped = ops.group(points, near.index)
cluster = ops.voxel_cluster(points, 0.2)
pooled = ops.segment_pool(points, cluster.cluster, points.shape[0] * points.shape[1], "max")
compiled = torch.compile(lambda p: ops.farthest_point_sample(p, 64), fullgraph=True, backend="aot_eager")
assert torch.equal(compiled(points), index)
bits = hashlib.sha256()
for tensor in (index, near.index, near.distance, grouped, cluster.cluster, pooled):
    bits.update(tensor.detach().numpy().tobytes())
print(torch.__version__, bits.hexdigest()[:16])
"""


def pip(python: Path) -> list[str]:
    return [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-cache-dir"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("versions", nargs="+", help="torch releases, such as 2.10.0")
    parser.add_argument("--folder", type=Path, required=True, help="where the environments live")
    parser.add_argument("--wheel", type=Path, help="install this instead of using the checkout")
    parser.add_argument(
        "--index-url", help="where pip gets torch, such as https://download.pytorch.org/whl/cpu"
    )
    parser.add_argument("--install-only", action="store_true", help="only make the environments")
    arguments = parser.parse_args()
    digests = set()
    for version in arguments.versions:
        home = arguments.folder / version
        python = home.resolve() / "bin" / "python"
        if not (home / ".ready").exists():
            venv.create(home, with_pip=True, clear=True)
            index = ["--index-url", arguments.index_url] if arguments.index_url else []
            subprocess.run([*pip(python), *index, f"torch=={version}"], check=True)
            subprocess.run([*pip(python), "numpy"], check=True)
            (home / ".ready").touch()
        if arguments.install_only:
            continue
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        if arguments.wheel:
            environment |= {"PYTHONPATH": "", "PATH": str(home / "bin")}
            install = [*pip(python), "--no-deps", "--force-reinstall", str(arguments.wheel.resolve())]
            subprocess.run(install, check=True, env=environment)
        command = [python, "-c", SMOKE]
        run = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
        if run.returncode:
            print(f"torch {version}: FAILED\n{run.stderr}", file=sys.stderr)
            return 1
        print(run.stdout.strip(), flush=True)
        digests.add(run.stdout.split()[1])
    if len(digests) > 1:
        print("the results differ between releases", file=sys.stderr)
    return len(digests) > 1


if __name__ == "__main__":
    raise SystemExit(main())
