# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""CASA models in vLLM, as a plugin: `pip install casa_hf[vllm]`, then `vllm serve CHECKPOINT`.

The sequence that vLLM schedules is text alone. What fusion layers attend to, the images of the current window and with
`casa_keys="window"` its text, lies in a group of vLLM's key/value cache of its own: blocks that belong to the request,
which the scheduler counts, takes back from a preempted request and frees with it.

| module | what it does | where it runs |
|---|---|---|
| `windows` | which images and text a window holds, and how much memory a step of a request takes | scheduler |
| `memory` | the group of the cache: its blocks per request | scheduler |
| `scheduler` | steps end where windows ask for it; encoder budgets count image tokens | scheduler |
| `processing` | prompts, pixels and videos | front end |
| `steps` | where in the cache each token of a step finds its window | worker |
| `fusion` | the attention of fusion layers, by the kernel of vLLM's own attention | worker |
| `model`, `families` | the model, of vLLM's blocks and vision towers | worker |
| `adapters` | LoRA adapters of image tokens | worker |
| `support` | what is served, and what is refused by name | everywhere |
"""


def register() -> None:
    """Make vLLM know CASA models: the entry point of the group `vllm.general_plugins`, called in all its processes."""
    import casa_hf  # noqa: F401  (its configuration and processor are registered with the Auto classes)

    from .support import register_model

    register_model()


__all__ = ["register"]
