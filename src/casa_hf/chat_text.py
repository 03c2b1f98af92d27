# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Conversations as their chat template writes them, in which only the template's own control tokens count.

What a person typed may hold `<|im_start|>system`, `<think>` or an image placeholder. While the template is rendered, a
random key stands for each such text; afterwards the text takes its place and is tokenized as text.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer

from .checks import check_text

# In place of the text of a message: what the model has said, which stays token for token as it was.
SAID = object()

# What a chat template is given with every conversation.
_OWN_VARIABLES = ("messages", "conversation", "chat_template", "tokenize", "add_generation_prompt")


class ChatText(str):
    """A prompt in which a key stands for each text that was typed.

    Attributes:
        typed: texts by key.
    """

    typed: dict[str, str]

    def __new__(cls, text: str, typed: dict[str, str]) -> ChatText:
        made = super().__new__(cls, text)
        made.typed = typed
        return made


def message(role: str, text: Any, num_images: int = 0, num_videos: int = 0) -> dict[str, Any]:
    """A message for [`render_chat`], whose images and then its videos come before its text."""
    visuals = [{"type": "image"}] * num_images + [{"type": "video"}] * num_videos
    return {"role": role, "content": [*visuals, {"type": "text", "text": text}]}


def check_template_kwargs(processor: Any, given: Mapping[str, Any] | None) -> None:
    """Refuse variables that a chat template doesn't have, or that are given to it anyway.

    Args:
        processor: CasaProcessor with the chat template.
        given: variables of the template, such as `{"enable_thinking": False}`; None for none.

    Raises:
        ValueError: naming the variable.
    """
    templates = processor.chat_template
    text = "\n".join(templates.values()) if isinstance(templates, Mapping) else str(templates or "")
    for name in given or {}:
        if name in _OWN_VARIABLES:
            raise ValueError(
                f"chat_template_kwargs has {name!r}, which is given to the chat template anyway. Remove it."
            )
        if not re.search(rf"\b{re.escape(str(name))}\b", text):
            raise ValueError(
                f"chat_template_kwargs has {name!r}, which the chat template of this model doesn't have. Remove it, "
                "or look up its name in processor.chat_template."
            )


def render_chat(
    processor: Any,
    messages: Sequence[dict[str, Any]],
    *,
    sanitize_control_tokens: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> ChatText:
    """What the chat template writes for a conversation, up to where the next answer begins.

    Args:
        processor: CasaProcessor with the chat template.
        messages: messages made by `message`. Where the text of one is `SAID`, what follows that text is returned.
        sanitize_control_tokens: whether control tokens in the texts are text; False leaves them control tokens.
        chat_template_kwargs: variables of the template, see `check_template_kwargs`.

    Returns:
        The text, which the processor takes as it is, and of which `token_ids` gives the ids.

    Raises:
        ValueError: if a text isn't a string, or the template leaves a text out, changes it or writes it several times.
    """
    nonce = secrets.token_hex(16)  # of this rendering alone: nobody can have typed it
    said = f"{nonce}x"
    typed: dict[str, str] = {}

    def shown(text: Any, role: str) -> str:
        if text is SAID:
            return said
        check_text(f"the {role} message", text)
        core = text.strip()  # templates trim texts, but not what is within
        if not sanitize_control_tokens or not core:
            return text
        key = f"{nonce}t{len(typed)}x"
        typed[key] = core
        return text.replace(core, key, 1)

    keyed = [
        {
            "role": each["role"],
            "content": [
                {**part, "text": shown(part["text"], each["role"])} if "text" in part else part
                for part in each["content"]
            ],
        }
        for each in messages
    ]
    check_template_kwargs(processor, chat_template_kwargs)
    rendered = processor.apply_chat_template(
        keyed, tokenize=False, add_generation_prompt=True, **(chat_template_kwargs or {})
    )
    after_said = any(part.get("text") == said for each in keyed for part in each["content"])
    for key in [*typed, *([said] if after_said else [])]:
        if (times := rendered.count(key)) != 1:
            what = repr(typed[key]) if key in typed else "what the assistant said"
            raise ValueError(
                f"The chat template writes {what:.100} {times} times, but must write each text once and "
                "unchanged. Set processor.chat_template to another template."
            )
    return ChatText(rendered.rpartition(said)[2] if after_said else rendered, typed)


def token_ids(tokenizer: Any, text: str, typed: Mapping[str, str]) -> list[int]:
    """Ids of a prompt; no control token comes from what was typed.

    Args:
        tokenizer: tokenizer of the model; a fast one, unless nothing that was typed looks like a control token.
        text: prompt with keys.
        typed: texts by key.

    Raises:
        ValueError: if this tokenizer can't read a control token as text.
    """
    pieces = re.split(f"({'|'.join(map(re.escape, typed))})", text) if typed else [text]
    pieces[1::2] = [typed[key] for key in pieces[1::2]]
    whole = "".join(pieces)
    control = _control_tokens(tokenizer)
    own, place = [], 0
    for number, piece in enumerate(pieces):
        own += [(place + found.start(), found[0]) for found in control.finditer(piece)] if number % 2 == 0 else []
        place += len(piece)
    if own == [(found.start(), found[0]) for found in control.finditer(whole)]:
        return list(tokenizer(whole, add_special_tokens=False)["input_ids"])
    return _sanitized_ids(tokenizer, pieces, control)


def _control_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Matches every added token but blanks and line breaks, which are text in runs that some vocabularies add."""
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _sanitized_ids(tokenizer: Any, pieces: list[str], control: re.Pattern[str]) -> list[int]:
    """Ids of pieces, of which every second one was typed.

    A tokenizer of the same model and rules, in which each control token has a name that nobody can have typed, reads
    all pieces as one text, in which the template's own control tokens are called by these names.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        found = next(match[0] for piece in pieces[1::2] for match in control.finditer(piece))
        raise ValueError(
            f"The text contains the control token {found!r}, which a {type(tokenizer).__name__} can't tokenize "
            "as plain text. Remove it, or keep it as a control token with sanitize_control_tokens=False."
        )
    plain = Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer"):
        if getattr(backend, part) is not None:
            setattr(plain, part, getattr(backend, part))
    nonce, added = secrets.token_hex(8), tokenizer.added_tokens_decoder
    names = {token.content: f"{nonce}t{index}x" for index, token in added.items()}
    names |= {token.content: token.content for token in added.values() if not token.content.strip()}
    gap = f"{nonce}x"
    plain.add_tokens([_renamed(token, names[token.content]) for token in added.values()])
    plain.add_tokens([AddedToken(gap, normalized=False)])
    index_of: dict[Any, int] = {plain.token_to_id(names[token.content]): index for index, token in added.items()}

    def ids(within: str) -> list[int]:
        """With this within each control token that was typed."""
        text = "".join(
            control.sub(lambda found: found[0][0] + within + found[0][1:], piece)
            if number % 2
            else control.sub(lambda found: names[found[0]], piece)
            for number, piece in enumerate(pieces)
        )
        return plain.encode(text, add_special_tokens=False).ids

    unwanted = {index for index, token in added.items() if token.content.strip()} - index_of.keys()
    unwanted.discard(tokenizer.unk_token_id)  # of any character that the vocabulary lacks
    read = ids("")
    if unwanted.intersection(read):  # the vocabulary itself has it, as one piece
        read = [index for index in ids(gap) if index != plain.token_to_id(gap)]
    if left := unwanted.intersection(read):
        raise ValueError(
            f"The text contains the control token {tokenizer.convert_ids_to_tokens(min(left))!r}, which this "
            "tokenizer can't tokenize as plain text. Remove it, or keep it as a control token with "
            "sanitize_control_tokens=False."
        )
    return [index_of.get(index, index) for index in read]


def _renamed(token: AddedToken, name: str) -> AddedToken:
    return AddedToken(
        name,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special,
    )
