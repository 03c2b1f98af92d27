# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Make PyPI's torchvision work beside PyTorch for the CPU: `python -m tools.torchvision_operators`.

Run by the environment's own Python. PyPI's torchvision is built for CUDA: its operators aren't there without it, and
it fails where it says what they return. So they are declared before torchvision is imported.
"""

import sysconfig
from pathlib import Path

_DECLARE = '''"""Declares torchvision's operators before it is imported; written by tools/torchvision_operators.py."""

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


def declare_operators() -> None:
    """Change the environment that this Python belongs to."""
    packages = Path(sysconfig.get_path("purelib"))
    (packages / "_torchvision_operators.py").write_text(_DECLARE)
    (packages / "_torchvision_operators.pth").write_text("import _torchvision_operators\n")


if __name__ == "__main__":
    declare_operators()
