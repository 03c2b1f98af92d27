# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""CASA models in other libraries, one short program for each; docs/clients.md says what to know."""
