# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The start of the command `casa-hf`, which is read before the package is loaded.

Importing casa_hf imports Transformers and registers classes with it, which takes seconds. So the package stands here
at first without its content: its command line can be imported, and ends at once where it is asked for help, or given a
wrong option or a missing file. A command that runs loads the rest first (`casa_hf.cli.app`).
"""

import sys
from importlib.util import find_spec, module_from_spec


def main() -> None:
    """Run the command line of the process, and exit."""
    if "casa_hf" not in sys.modules:
        spec = find_spec("casa_hf")
        assert spec is not None
        sys.modules["casa_hf"] = module_from_spec(spec)
    from casa_hf.cli import main as run

    run()
