# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Names of checkpoints."""

import re
from pathlib import Path

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_hub_id(name: str | Path) -> bool:
    """Whether this can be the id of a repository on the Hub, "namespace/name", and is no file here."""
    return _HUB_ID.fullmatch(str(name)) is not None and not Path(name).exists()
