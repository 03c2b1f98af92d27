# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Model cards: where a checkpoint comes from, what is untrained, how to use it, whose licence it has, whom to cite."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load

from ..checkpoint_files.names import LICENSE_FILES
from ..configuration_casa import CasaConfig, variant_overrides
from ..design_space import DESIGN_FIELDS, VARIANTS
from .card_parts import FIELD_GROUPS, Card, fields, union

UNTRAINED, MADE_BY = "What is untrained", "How it was made"
TRAINED_ON, PROCEDURE = "Training data", "Training procedure"

# What Transformers' Trainer says of every model whose source is no repository.
_FROM_SCRATCH = re.compile(r"^This model was trained from scratch on ", re.MULTILINE)
_RESULTS = re.compile(r"^It achieves the following results on the evaluation set:\n(?:- .*(?:\n|\Z))+", re.MULTILINE)
_PROCEDURE = re.compile(rf"^## {PROCEDURE}\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)

# What Transformers' `push_to_hub` describes a model by that has no card.
_TEMPLATE_DESCRIPTION = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated."
)

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

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


@dataclass(frozen=True)
class Origin:
    """Where a source checkpoint comes from.

    Attributes:
        name: Hub id, or the name of a local folder.
        on_hub: whether `name` is a Hub id.
        commit: the Hub's commit hash, where known.
    """

    name: str
    on_hub: bool
    commit: str | None = None

    @classmethod
    def of(cls, folder: Path) -> Origin:
        """The origin of a folder; one in the Hub's download cache tells repository and commit by its path."""
        repository, snapshots = folder.parent.parent.name, folder.parent.name
        if repository.startswith("models--") and snapshots == "snapshots":
            return cls(repository.removeprefix("models--").replace("--", "/"), on_hub=True, commit=folder.name)
        return cls(folder.name, on_hub=False)


# An origin, and what its files state about its licence, see `read_license`.
Licensed = tuple[Origin, dict[str, Any]]


def origin_records(origins: Sequence[Licensed]) -> list[dict[str, Any]]:
    """Origins with their licences in the form of `CasaConfig.source_origins`."""
    return [
        {"name": origin.name, "on_hub": origin.on_hub, "commit": origin.commit, "license": stated}
        for origin, stated in origins
    ]


def recorded_origins(config: CasaConfig) -> list[Licensed]:
    """The origins that `CasaConfig.source_origins` holds; empty if it holds none that can be read."""
    try:
        return [
            (Origin(str(entry["name"]), bool(entry["on_hub"]), entry.get("commit")), dict(entry["license"]))
            for entry in config.source_origins or ()
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        return []


def read_license(folder: Path) -> dict[str, Any]:
    """The licence that a checkpoint states, as model card metadata.

    Args:
        folder: of the checkpoint; the front matter of its README.md is read, and whether it holds a licence file.

    Returns:
        Those of "license", "license_name" and "license_link" that are stated; empty if none is.
    """
    try:
        stated = metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):
        stated = {}
    if stated.get("license"):
        return {key: stated[key] for key in ("license", "license_name", "license_link") if stated.get(key)}
    files = license_files(folder)
    return {"license": "other", "license_link": files[0].name} if files else {}


def license_files(folder: Path) -> list[Path]:
    """The licence texts and notices in a folder."""
    return sorted(file for pattern in LICENSE_FILES for file in folder.glob(pattern) if file.is_file())


def model_card(
    config: CasaConfig,
    *,
    variant: str,
    origin: Origin,
    folder: Path,
    vision_origin: Origin | None = None,
    vision_folder: Path | None = None,
    from_casa: bool = False,
    note: str,
    command: str,
    model: str,
    source_parameters: int,
    added_parameters: int,
    initialised: Mapping[str, str],
    new_tokens: Sequence[str] = (),
    cast_to: str | None,
    with_code: bool = False,
) -> str:
    """The README.md of a converted checkpoint.

    Args:
        config: of the converted model.
        variant: name of the variant that was asked for.
        origin: of the source.
        folder: of the source; what it states about its licence is taken over.
        vision_origin, vision_folder: the same of the checkpoint that gave the vision tower, if it was another.
        from_casa: whether the source was a CASA checkpoint.
        note: see `untrained_effect`.
        command: that makes this checkpoint.
        model: folder or Hub id under which the checkpoint can be loaded.
        source_parameters: number of parameters taken over.
        added_parameters: number of new parameters.
        initialised: names of new tensors, or with new rows, that copy nothing -> how these start.
        new_tokens: tokens that the source's tokenizer hasn't.
        cast_to: dtype that the weights were cast to, if they were.
        with_code: whether the checkpoint carries its code.

    Returns:
        Markdown with front matter.
    """
    licenses = [(origin, read_license(folder))]
    if vision_origin is not None and vision_folder is not None:
        licenses.append((vision_origin, read_license(vision_folder)))
    training = _training_text(
        config, source_parameters, added_parameters, initialised, new_tokens, cast_to, note, from_casa
    )
    card = Card(_metadata(licenses, "image-text-to-text", ["casa"]), f"# {Path(model).name}", [])
    card.set_sections(
        {
            None: _intro_text(config, licenses, variant),
            UNTRAINED: training,
            MADE_BY: f"```bash\n{command}\n```",
            "Usage": _usage_text(json.dumps(model), with_code),
            "Licence": _license_text(licenses),
            "Citation": CITATION,
        }
    )
    return card.write()


@dataclass(frozen=True)
class PresentCard:
    """The card that a repository has before something is published there.

    Attributes:
        readme: its README.md.
        config: of the checkpoint that lies beside it; None if there is none.
    """

    readme: str
    config: CasaConfig | None = None


def published_card(
    readme: str | None,
    config: CasaConfig,
    repository: str,
    *,
    revision: str | None = None,
    datasets: Sequence[str] = (),
    with_code: bool = False,
    present: PresentCard | None = None,
    prefer_folder: bool = False,
    procedure: str | None = None,
    needs_origin: bool = True,
) -> str:
    """The README.md under which a checkpoint is published.

    The part between two comments is written anew: where the checkpoint comes from, what is untrained, on what and how
    it was trained, how it was made, how to use it, its licence, whom to cite. The text around it is that of the
    repository's card, else of the folder's. So is the front matter, to which is added what it lacks, from the folder's
    and from the configuration; what was generated for the checkpoint that lies there follows the new one.

    Args:
        readme: the folder's README.md; None if it has none. Its part says what is untrained and how it was made.
        config: of the checkpoint.
        repository: Hub id.
        revision: branch that it is published on; None for the default one.
        datasets: Hub ids, or names in words, of what it was trained on, beside those that the part names already.
        with_code: whether the repository carries the code to load it with `trust_remote_code=True`.
        present: the card that the repository has there; None if it has none.
        prefer_folder: whether the repository's card gives way to the folder's altogether.
        procedure: how it was trained, as Markdown, by a run whose results `readme` states in its front matter; None
            for what the part says of that already.
        needs_origin: whether a card that tells neither base model nor licence is an error.

    Returns:
        Markdown with front matter.

    Raises:
        ValueError: if the front matter of a card is unusable, or if neither card nor configuration tells what the
            checkpoint was made from or its licence.
    """
    origins = recorded_origins(config)
    own = None if readme is None else _read_card(readme, "README.md")
    there = None
    if present is not None and not prefer_folder:
        there = _read_card(present.readme, f"the README.md of {repository}")
    before = config if present is None or present.config is None else present.config
    if there is not None and own is not None:
        _add_fields(there, own, renewed=() if procedure is None else ("model-index",))
    card = there or own or Card(ModelCardData(), "", [])
    if needs_origin and not origins and not card.data.get("license") and not card.data.get("base_model"):
        raise ValueError(
            "Neither README.md nor config.json tells what the checkpoint was made from and under which licence. State "
            "`base_model` and `license` in the front matter of README.md."
        )
    of_folder = {} if own is None else own.sections()
    known = (there.sections() if there else {}) | of_folder
    trained_on, procedure = _trained_on(known.get(TRAINED_ON), datasets), procedure or known.get(PROCEDURE)
    arguments = json.dumps(repository) + ("" if revision is None else f", revision={json.dumps(revision)}")
    sections: dict[str | None, str | None] = {
        None: _intro_text(config, origins),
        # Nobody knows that of a checkpoint but its conversion, and it ends with training.
        UNTRAINED: None if trained_on or procedure else of_folder.get(UNTRAINED),
        TRAINED_ON: trained_on,
        PROCEDURE: procedure,
        MADE_BY: known.get(MADE_BY),
        "Usage": _usage_text(arguments, with_code),
        "Licence": _license_text(origins),
        "Citation": CITATION,
    }
    card.text = _FROM_SCRATCH.sub("This model was trained on ", card.text) or f"# {repository.rpartition('/')[2]}"
    card.set_sections({title: text for title, text in sections.items() if text})
    _complete_metadata(card, config, before, datasets, with_code)
    return card.write()


def training_procedure(readme: str) -> str | None:
    """Results and procedure of a run, from the card that Transformers' Trainer writes; None if it tells neither."""
    results, procedure = _RESULTS.search(readme), _PROCEDURE.search(readme)
    return "\n\n".join(text.strip() for text in (results and results[0], procedure and procedure[1]) if text) or None


def without_untrained(readme: str) -> str:
    """A folder's card without what it says to be untrained, which a model that is saved there may not be any more."""
    card = Card.read(readme, "README.md")
    sections = card.sections()
    if UNTRAINED not in sections:
        return readme
    card.set_sections({title: text for title, text in sections.items() if title != UNTRAINED})
    return card.write()


def _trained_on(stated: str | None, datasets: Sequence[str]) -> str | None:
    """The section on training data, with those that are new at its end."""
    lines = (stated or "").splitlines()
    new = [line for line in _datasets_text(datasets).splitlines() if line not in lines]
    return "\n".join([*lines, *new]) or None


def _read_card(readme: str, name: str) -> Card:
    """A card; of the template that Transformers fills with "More Information Needed" only the metadata."""
    card = Card.read(readme, name)
    try:
        template = ModelCard.from_template(ModelCardData(), model_description=_TEMPLATE_DESCRIPTION)
    except ImportError:  # filling the template needs Jinja
        return card
    if card.text == template.text.strip():
        card.text = ""
    return card


def _add_fields(card: Card, other: Card, renewed: Collection[str]) -> None:
    """Add what another front matter has and this one lacks, all tags, and the renewed fields in any case."""
    stated, more = card.data.to_dict(), other.data.to_dict()
    grouped = {key: group for group in FIELD_GROUPS for key in group}
    present = fields(stated, stated.keys())
    added = {
        key: value
        for key, value in more.items()
        if key in renewed or not present.keys() & set(grouped.get(key, (key,)))
    }
    if "tags" in stated or "tags" in more:
        added["tags"] = union(stated.get("tags"), more.get("tags"))
    card.data = ModelCardData(**{key: value for key, value in stated.items() if key not in renewed} | added)


def _complete_metadata(
    card: Card, config: CasaConfig, before: CasaConfig, datasets: Sequence[str], with_code: bool
) -> None:
    """Add what a card doesn't state itself, and renew what was generated from an earlier configuration."""
    known, outdated = _known_fields(config), _known_fields(before)
    data = card.data
    for group in (*FIELD_GROUPS, ("library_name",), ("pipeline_tag",)):
        stated = fields(data.to_dict(), group)
        new, is_outdated = fields(known, group), stated == fields(outdated, group)
        if new.get(group[0]) and (is_outdated or not stated.get(group[0])):
            for key in stated.keys() - new.keys() if is_outdated else ():
                data.pop(key)
            for key, value in new.items():
                data[key] = value
    tags = [tag for tag in union(data.get("tags"), ["casa"]) if tag != "custom_code"]
    data["tags"] = [*tags, "custom_code"] if with_code else tags
    on_hub = [name for name in datasets if _HUB_NAME.fullmatch(name)]
    if on_hub:
        data["datasets"] = union(data.get("datasets"), on_hub)


def source_card(
    config: CasaConfig, origin: Origin, folder: Path, dropped: Mapping[str, str], note: str, name: str
) -> str:
    """The README.md of a checkpoint in the source's form that was made from a CASA checkpoint.

    Args:
        config: of the CASA checkpoint.
        origin: of it.
        folder: of it; what it states about its licence is taken over.
        dropped: names of its tensors that were left out.
        note: what may be wrong with it, in sentences.
        name: of the new checkpoint.

    Returns:
        Markdown with front matter.
    """
    licenses = [(origin, read_license(folder))]
    task = "text-generation" if config.backbone.text_only else "image-text-to-text"
    return f"""\
---
{_metadata(licenses, task, []).to_yaml()}
---

# {name}

{_origin_text(origin)}, a CASA model, taken back to the form of its source ({config.backbone.display_name}): language
model and vision weights as they are there, without {len(dropped)} tensors of fusion layers and new tokens. {note}

## Licence

{_license_text(licenses)}
"""


def training_free(config: CasaConfig) -> str | None:
    """For which prompts an unchanged conversion computes what its source does, in words; None if it doesn't.

    Videos are none of them: here each frame is an image, whereas sources take frames in pairs. A text-only source
    computes nothing from images that its conversion could equal.
    """
    as_inserted = (
        config.casa_keys == "context"
        and config.casa_image_updates == "full"
        and config.casa_positions == "insertion"
        and len(config.fusion_layers) == config.text_config.num_hidden_layers
        and not config.num_gist_tokens
        and not config.backbone.text_only
    )
    if not as_inserted:
        return None
    return {
        "all": "prompts of text and still images",
        "group": "prompts of text and one group of still images",
        "latest": "prompts of text and one still image",
    }[config.casa_image_history]


def untrained_effect(config: CasaConfig, made_from: CasaConfig | None = None) -> str:
    """What a conversion does before any further training, in sentences.

    Args:
        config: of the new model.
        made_from: configuration of the source if that is a CASA model too.
    """
    if made_from is not None:
        if all(getattr(config, name) == getattr(made_from, name) for name in DESIGN_FIELDS):
            return "It computes what the CASA model does that it was made from."
        return (
            "It was made from a CASA model of another design, and what that has learned was learned in that design: "
            "answers may be poor until the model is trained in this one."
        )
    prompts = training_free(config)
    if prompts is not None:
        return f"It needs no training: for {prompts} it computes what the source does."
    if config.casa_gate:
        return (
            "Its gates are closed: text-only prompts are answered as by the source, and what images show has no "
            "effect until the model is trained."
        )
    if config.casa_placement == "replace":
        return "Fusion layers replace self-attention, so answers to any prompt are poor until the model is trained."
    if config.casa_text_windows:
        return "Its fusion layers are untrained, so answers to any prompt are poor until the model is trained."
    return (
        "Its fusion layers are untrained: text-only prompts are answered as by the source, answers about images are "
        "poor until the model is trained."
    )


def _metadata(licenses: Sequence[Licensed], task: str, tags: list[str]) -> ModelCardData:
    on_hub = [origin.name for origin, _ in licenses if origin.on_hub]
    first = licenses[0][1] if licenses else {}
    # One field can't state two licences; the section below does.
    license = first if all(stated == first for _, stated in licenses) else {"license": "other"}
    return ModelCardData(
        base_model=on_hub[0] if len(on_hub) == 1 else on_hub or None,
        base_model_relation="finetune" if len(on_hub) == 1 else "merge" if on_hub else None,
        library_name="transformers",
        pipeline_tag=task,
        tags=tags or None,
        **license,
    )


def _known_fields(config: CasaConfig) -> dict[str, Any]:
    """The metadata that a configuration gives."""
    return _metadata(recorded_origins(config), "image-text-to-text", ["casa"]).to_dict()


def _usage_text(arguments: str, with_code: bool) -> str:
    """How to load and ask a model; `arguments` are those of `from_pretrained`, as Python code."""
    question = """\
image = Image.new("RGB", (448, 448), "red")
question = {"type": "text", "text": "Which colour is this?"}
messages = [{"role": "user", "content": [{"type": "image", "image": image}, question]}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, max_new_tokens=32)
print(processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])"""
    plain = f"""\
After `pip install casa_hf`:

```python
from PIL import Image
from casa_hf import CasaForConditionalGeneration, CasaProcessor

model = CasaForConditionalGeneration.from_pretrained({arguments})
processor = CasaProcessor.from_pretrained({arguments})

{question}
```"""
    if not with_code:
        return plain
    return f"""\
{plain}

Where `casa_hf` isn't installed, the code that lies beside the weights loads it (look at it first: it runs on your
machine).

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained({arguments}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({arguments}, trust_remote_code=True)

{question}
```"""


def _datasets_text(datasets: Sequence[str]) -> str:
    return "\n".join(
        f"- [{name}](https://huggingface.co/datasets/{name})" if _HUB_NAME.fullmatch(name) else f"- {name}"
        for name in datasets
    )


def _intro_text(config: CasaConfig, origins: Sequence[Licensed], variant: str = "casa") -> str:
    subject = _origin_text(origins[0][0]) if origins else "A checkpoint"
    towers = "".join(f", with the vision tower of {_named(origin)}," for origin, _ in origins[1:])
    return f"""\
{subject} ({config.backbone.display_name}){towers} as a CASA model: images stay out of the
token sequence and out of the KV cache; fusion layers let text attend to the current image.
{_design_text(config, config.variant or variant)}"""


def _design_text(config: CasaConfig, variant: str) -> str:
    if config.variant:
        # That one is said to equal its source, which a text-only source has no images for.
        fits = config.variant != "exact" or not config.backbone.text_only
        description = f":\n{VARIANTS[config.variant].description}" if fits else ""
        return f"Variant `{config.variant}`{description}."
    named = {name: getattr(CasaConfig, name) for name in DESIGN_FIELDS}
    named |= variant_overrides(variant, config.backbone.fusable_blocks(config.text_config))
    named |= {"num_gist_tokens": 0}
    changed = [name for name, value in named.items() if getattr(config, name) != value]
    return f"Variant `{variant}` with\n{', '.join(f'`{name}={getattr(config, name)!r}`' for name in changed)}."


def _origin_text(origin: Origin) -> str:
    if not origin.on_hub:
        return f"The checkpoint in the local folder `{origin.name}`"
    commit = f" at commit `{origin.commit}`" if origin.commit else ""
    return f"[{origin.name}](https://huggingface.co/{origin.name}){commit}"


def _named(origin: Origin) -> str:
    return f"`{origin.name}`"


def _training_text(
    config: CasaConfig,
    source_parameters: int,
    added_parameters: int,
    initialised: Mapping[str, str],
    new_tokens: Sequence[str],
    cast_to: str | None,
    note: str,
    from_casa: bool,
) -> str:
    change = "unchanged" if cast_to is None else f"and cast to {cast_to}"
    kept = f"{source_parameters:,} parameters of the source are taken over {change}"
    if from_casa:
        new = f"{added_parameters:,} are new and untrained" if added_parameters else "there are no new ones"
        return f"{kept}; {new}. {note}"
    prompts = training_free(config)
    if prompts is not None:
        return f"Nothing: {kept}, there are no new ones, and for {prompts} the model computes what the source does."
    blocks = f"The fusion layers of {len(config.fusion_layers)} blocks"
    if not config.casa_share_projections:
        new = (
            f"{blocks} have projections and norms of their own, copies of the blocks' self-attention and input norms, "
            "which have never been trained."
        )
    else:
        new = f"{blocks} use the projections of self-attention, which have never been trained for this use."
    count = f"{added_parameters:,} are new" if added_parameters else "there are no new ones"
    sentences = [f"{kept}; {count}.", new]
    if new_tokens:
        tokens = ", ".join(f"`{token}`" for token in new_tokens)
        sentences.append(
            f"New tokens: {tokens}; their rows start as the mean of all rows, with a little noise for gist tokens, "
            "also where the matrix had spare ones (which `source_rows.safetensors` then keeps)."
        )
    others = [name for name in initialised if "multi_modal_projector" in name]
    if others:
        sentences.append(
            f"The projector between vision tower and language model ({', '.join(others)}) starts at random."
        )
    if config.backbone.text_only:
        sentences.append("The vision tower has never been used with this language model.")
    return " ".join(sentences) + f"\n\n{note}"


def _license_text(licenses: Sequence[Licensed]) -> str:
    return "\n\n".join(_one_license(origin, stated) for origin, stated in licenses)


def _one_license(origin: Origin, license: dict[str, Any]) -> str:
    if not license:
        return (
            f"The files of `{origin.name}` state no licence. Its terms apply to this checkpoint too: look them up "
            "before use."
        )
    name, link = license.get("license_name", license["license"]), license.get("license_link")
    return f"Inherited from `{origin.name}`: {name}" + (f", see [{link}]({link})." if link else ".")
