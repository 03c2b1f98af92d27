# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The Python of the guides runs as it stands: here that of the guides with a line or two, after README's."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StaticCache

from casa_hf import CasaForConditionalGeneration, CasaProcessor
from casa_hf.backbones import VISION_TOWERS, Backbone
from casa_hf.samples import CAT

ROOT = Path(__file__).parents[1]
GUIDES = {
    guide.name: re.findall(r"^```python\n(.*?)^```", guide.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for guide in (ROOT / "docs").glob("*.md")
}
# Those that have a test of their own: streaming/test_docs.py, training/test_programs.py, hub/test_docs.py,
# serving/test_transformers_serve.py.
LONG = {"streaming.md", "training.md", "publishing.md", "serving.md"}


def run(guide: str, names: dict[str, Any]) -> Any:
    """Run its blocks of code; what the last line gives, if that isn't a statement."""
    *earlier, block = GUIDES[guide]
    for other in earlier:
        exec(compile(other, guide, "exec"), names)
    mode = "exec" if re.search(r"^\w+ = ", block, re.MULTILINE) else "eval"
    return eval(compile(block, guide, mode), names)


def test_all_guides_with_code_are_run() -> None:
    assert {name for name, blocks in GUIDES.items() if blocks} == {
        *LONG,
        "architecture.md",
        "clients.md",
        "new-backbone.md",
        "images.md",
    }


def test_architecture_and_pictures(casa_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(casa_folder, tmp_path / "my-casa-model")
    monkeypatch.chdir(tmp_path)
    readme = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (quickstart,) = [block for block in readme if "inputs = processor.apply_chat_template" in block]
    names: dict[str, Any] = {}
    exec(compile(quickstart, "README.md", "exec"), names)

    run("architecture.md", names)
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]
    assert names["cache"].get_seq_length() == names["output"].shape[1] - 1

    run("images.md", names)
    said = names["processor"].decode(names["inputs"]["input_ids"][0])
    assert said.startswith("[0.0 seconds]<|vision_start|><|vision_end|>[0.5 seconds]<|vision_start|>")
    with pytest.raises(ValueError, match=r"cat\.jpg"):
        names["processor"](text="<|vision_start|><|vision_end|>", images=names["CAT"], return_tensors="pt")


def test_clients(casa_folder: Path) -> None:
    model = CasaForConditionalGeneration.from_pretrained(casa_folder).eval()
    processor = CasaProcessor.from_pretrained(casa_folder)
    text = f"{processor.image_placeholder}What is it?"
    inputs = processor(text=[text], images=[CAT], return_tensors="pt")
    names: dict[str, Any] = {"model": model, "inputs": inputs, "token": torch.tensor([[5]])}
    names |= {name: inputs[name] for name in ("input_ids", "pixel_values")}
    caches = [StaticCache(config=model.config.get_text_config(), max_cache_len=32) for _ in range(2)]
    with torch.no_grad():
        expected, _ = [model(**inputs, past_key_values=cache).logits for cache in caches]
        run("clients.md", names := {**names, "cache": caches[0]})
        step = model(input_ids=names["token"], past_key_values=caches[1]).logits
    torch.testing.assert_close(names["logits"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(names["output"].logits, step, rtol=1e-5, atol=1e-5)


def test_new_backbone() -> None:
    (tower, *_) = VISION_TOWERS.values()
    row = run("new-backbone.md", {"Backbone": Backbone, "VISION_TOWERS": {"new_vl_vision": tower}})
    assert isinstance(row, Backbone) and row.text_model_type == "new_vl_text"
