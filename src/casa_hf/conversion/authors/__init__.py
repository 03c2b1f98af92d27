# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints in the format of the method's authors, whose names of tensors aren't public: matched by candidate rules.

| module | content |
|---|---|
| `names.py` | candidate names, as data |
| `mapping_file.py` | the table of names that a user can mend |
| `tensors.py` | what each tensor is, by rules or by such a file |
| `facts.py` | what the other files say |
| `inference.py` | which design that is, and what has to be asked |
| `checkpoint.py` | the CASA checkpoint made of all this |
| `processor.py` | its processor |
| `report.py` | the table of a folder or a Hub id, from headers alone |
"""

from .checkpoint import Released, read_released
from .processor import delimiter_ids, make_processor
from .report import names_report

__all__ = ["Released", "delimiter_ids", "make_processor", "names_report", "read_released"]
