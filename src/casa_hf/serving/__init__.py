# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Engines that run CASA models: the server of Transformers, vLLM, the benchmarks of lmms-eval."""
