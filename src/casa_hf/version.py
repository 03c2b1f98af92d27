# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The version of the package: the one place where it is stated, for the code, the build and the command line."""

__version__ = "0.1.0"
