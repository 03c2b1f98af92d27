# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""`python -m casa_hf` is the command `casa-hf`, which starts faster: see casa_hf_command."""

from .cli import main

if __name__ == "__main__":
    main()
