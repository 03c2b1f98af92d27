# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""What model cards say about a CASA checkpoint: what it is, how to use it, its licence, whom to cite."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from huggingface_hub import ModelCardData

from ..configuration_casa import CasaConfig, variant_overrides
from ..design_space import DESIGN_FIELDS, VARIANTS
from ..timestamps_casa import timestamp_text
from .origins import Licensed, Origin

CITATION = """\
```bibtex
@misc{boehle2025casa,
  title = {{CASA}: Cross-Attention over Self-Attention for Efficient Vision-Language Fusion},
  author = {Moritz B{\\"o}hle and Am{\\'e}lie Royer and Juliette Marrie and Edouard Grave and Patrick P{\\'e}rez},
  year = {2025},
  eprint = {2512.19535},
  archivePrefix = {arXiv}
}
```"""

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

_QUESTION = """\
image = Image.new("RGB", (448, 448), "red")
question = {"type": "text", "text": "Which colour is this?"}
messages = [{"role": "user", "content": [{"type": "image", "image": image}, question]}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, max_new_tokens=32)
print(processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])"""


def metadata(licenses: Sequence[Licensed], task: str, tags: list[str]) -> ModelCardData:
    """The front matter of the card of a checkpoint with these origins."""
    on_hub = [origin.name for origin, _ in licenses if origin.on_hub]
    first = licenses[0][1] if licenses else {}
    # One field can't state two licences; the card's section on licences does.
    license = first if all(stated == first for _, stated in licenses) else {"license": "other"}
    return ModelCardData(
        base_model=on_hub[0] if len(on_hub) == 1 else on_hub or None,
        base_model_relation="finetune" if len(on_hub) == 1 else "merge" if on_hub else None,
        library_name="transformers",
        pipeline_tag=task,
        tags=tags or None,
        **license,
    )


def intro_text(config: CasaConfig, origins: Sequence[Licensed], variant: str = "casa") -> str:
    """What the model is; `variant` is the named one that a design without a name is compared with."""
    subject = origins[0][0].described() if origins else "A checkpoint"
    towers = "".join(f", with the vision tower of `{origin.name}`," for origin, _ in origins[1:])
    return f"""\
{subject} ({config.backbone.display_name}){towers} as a CASA model: images stay out of the
token sequence and out of the KV cache; fusion layers let text attend to the current image.
{_design_text(config, config.variant or variant)}{_timestamps_text(config)}"""


def _timestamps_text(config: CasaConfig) -> str:
    if config.video_timestamps is None:
        return ""
    kind = config.video_timestamps
    example = timestamp_text(kind, 0.5)
    return f" The time of each video\nframe stands before it, as `{example}` (`video_timestamps={kind!r}`)."


def _design_text(config: CasaConfig, variant: str) -> str:
    if config.variant:
        # `exact` is described as equal to its source, which a text-only source has no images for.
        fits = config.variant != "exact" or not config.backbone.text_only
        description = f":\n{VARIANTS[config.variant].description}" if fits else ""
        return f"Variant `{config.variant}`{description}."
    named = {name: getattr(CasaConfig, name) for name in DESIGN_FIELDS}
    named |= variant_overrides(variant, config.backbone.fusable_blocks(config.text_config))
    named |= {"num_gist_tokens": 0}
    changed = [name for name, value in named.items() if getattr(config, name) != value]
    return f"Variant `{variant}` with\n{', '.join(f'`{name}={getattr(config, name)!r}`' for name in changed)}."


def usage_text(arguments: str, with_code: bool) -> str:
    """How to load and ask a model; `arguments` are those of `from_pretrained`, as Python code."""
    plain = f"""\
After `pip install casa_hf`:

```python
from PIL import Image
from casa_hf import CasaForConditionalGeneration, CasaProcessor

model = CasaForConditionalGeneration.from_pretrained({arguments})
processor = CasaProcessor.from_pretrained({arguments})

{_QUESTION}
```"""
    if not with_code:
        return plain
    return f"""\
{plain}

Without `casa_hf`, the code that comes with the weights loads the model. Read it first: it runs on your machine.

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained({arguments}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({arguments}, trust_remote_code=True)

{_QUESTION}
```"""


def datasets_text(datasets: Sequence[str]) -> str:
    """A list of datasets; Hub ids become links."""
    return "\n".join(
        f"- [{name}](https://huggingface.co/datasets/{name})" if HUB_NAME.fullmatch(name) else f"- {name}"
        for name in datasets
    )


def license_text(licenses: Sequence[Licensed]) -> str:
    """Under which licence each origin is."""
    return "\n\n".join(_one_license(origin, stated) for origin, stated in licenses)


def _one_license(origin: Origin, license: dict[str, Any]) -> str:
    if not license:
        return (
            f"The files of `{origin.name}` state no licence. Its terms apply to this checkpoint too: look them up "
            "before use."
        )
    name, link = license.get("license_name", license["license"]), license.get("license_link")
    return f"Inherited from `{origin.name}`: {name}" + (f", see [{link}]({link})." if link else ".")
