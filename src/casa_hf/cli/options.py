# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Options that commands share, and how a value becomes what is meant or is refused before the library is loaded."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..checkpoint_files.names import is_hub_id
from ..checks import check_positive, check_text
from ..design_space import unknown_value

# Number formats of weights, by every name that people write.
DTYPES = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
}


def one_of(choices: Sequence[str], help: str, metavar: str | None = None) -> Any:
    """An option that takes one of some names; what is none of them is answered by the nearest."""

    def parse(text: str) -> str:
        if text not in choices:
            raise typer.BadParameter(f"{text!r} is unknown; {unknown_value(text, choices)}")
        return text

    return typer.Option(
        parser=parse,
        metavar=metavar or "|".join(choices),
        help=help,
        autocompletion=lambda incomplete: [name for name in choices if name.startswith(incomplete)],
        show_default=False,
    )


def dtype_name(text: str) -> str:
    """The name that PyTorch has for a number format.

    Raises:
        BadParameter: if it isn't one of `DTYPES`.
    """
    name = text.lower().removeprefix("torch.")
    if name not in DTYPES:
        raise typer.BadParameter(f"{text!r} is unknown; {unknown_value(name, DTYPES)}")
    return DTYPES[name]


def dtype_option(help: str) -> Any:
    """An option that takes a number format by any of its names."""
    return typer.Option(
        parser=dtype_name,
        metavar="bf16|fp16|fp32",
        help=help,
        autocompletion=lambda incomplete: [name for name in DTYPES if name.startswith(incomplete)],
        show_default=False,
    )


def checkpoint(text: str) -> str:
    """The folder or the Hub id of a checkpoint.

    Raises:
        BadParameter: if it is neither.
    """
    if not Path(text).is_dir() and not is_hub_id(text):
        raise typer.BadParameter(
            f"{text!r} is not a folder or a valid Hub id. Give the folder of a checkpoint, or a Hub id such "
            "as Qwen/Qwen2.5-VL-3B-Instruct."
        )
    return text


def casa_checkpoint(text: str) -> str:
    """The folder or the Hub id of a CASA checkpoint.

    Raises:
        BadParameter: if it is neither, or the folder holds another kind of checkpoint.
    """
    if Path(checkpoint(text)).is_dir():
        check_is_casa(Path(text), text)
    return text


def check_is_casa(folder: Path, name: str) -> None:
    """Refuse a folder whose config.json describes another kind of model, or isn't there, before its weights are read;
    a source that can be converted before the library is loaded.

    Args:
        folder: folder of the checkpoint.
        name: name by which the user calls it.

    Raises:
        BadParameter: with the way to a CASA checkpoint.
    """
    from ..backbones import SOURCE_BACKBONES, convert_first

    try:
        model_type = json.loads((folder / "config.json").read_bytes())["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        model_type = None
    if model_type == "casa":
        return
    if isinstance(model_type, str) and model_type in SOURCE_BACKBONES:
        raise typer.BadParameter(
            f"{name!r} is not a CASA checkpoint: its model_type is {model_type!r}. {convert_first(name, model_type)}"
        )
    from ..checkpoint_files.config import read_casa_config
    from ..folder_files import WrongKindError

    try:
        read_casa_config(folder, name)
    except WrongKindError as error:
        raise typer.BadParameter(str(error)) from error
    except ValueError:
        return  # a damaged file, of which the command that reads it tells


def is_url(text: str) -> bool:
    """Whether this is the URL of an image or a video rather than a path."""
    return text.startswith(("http://", "https://", "data:", "file:///"))


def image_name(text: str) -> str:
    """The file or the URL of an image.

    Raises:
        BadParameter: if it is a folder, or a file that isn't there.
    """
    return _file_or_url(text, "image", "an image")


def clip_name(text: str) -> str:
    """The file or the URL of a video that is shown as a whole.

    Raises:
        BadParameter: if it is a folder, or a file that isn't there.
    """
    return _file_or_url(text, "video", "a video")


def _file_or_url(text: str, kind: str, with_article: str) -> str:
    path = os.path.expanduser(text)
    if not is_url(text) and not os.path.isfile(path):
        fault = "is a folder; expected a file" if os.path.isdir(path) else "doesn't exist; expected a file or a URL"
        raise typer.BadParameter(f"The {kind} {text!r:.200} {fault}. Give the path or URL of {with_article}.")
    return text


def video_name(text: str) -> str:
    """A video, as `open_video` takes it.

    Raises:
        BadParameter: if it is a file or folder that isn't there.
    """
    is_place = ":" not in text and text != "camera"  # rather than a URL, a camera, or FORMAT:DEVICE
    if is_place and not Path(text).expanduser().exists():
        raise typer.BadParameter(f"{text!r} doesn't exist; give the path or URL of a video, or a camera.")
    return text


def sampling(fps: float | None, num_frames: int | None) -> dict[str, Any]:
    """How videos are sampled, as the processor takes it.

    Raises:
        BadParameter: if `fps` isn't positive, or both are given.
    """
    if fps is not None and num_frames is not None:
        raise typer.BadParameter("it can't be combined with --num-frames; give one of them.", param_hint="--fps")
    if fps is not None:
        with wrong_value(fps="--fps"):
            check_positive("fps", fps)
    given = {"fps": fps, "num_frames": num_frames}
    return {name: value for name, value in given.items() if value is not None}


def valid_text(given: str | list[str] | None) -> str | list[str] | None:
    """A text option, or several, as it was given; bytes that aren't UTF-8 come as half characters.

    Raises:
        BadParameter: for those.
    """
    for text in [given] if isinstance(given, str) else given or []:
        try:
            check_text("it", text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    return given


def json_object(text: str) -> dict[str, Any]:
    """The JSON object that an option is given.

    Raises:
        BadParameter: if it is anything else.
    """
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"{text!r:.200} is not JSON ({error}).") from error
    if not isinstance(given, dict):
        raise typer.BadParameter(f"{text!r:.200} is not a JSON object. Write one, such as '{{\"name\": false}}'.")
    return given


@contextmanager
def wrong_value(option: str | None = None, kind: type[ValueError] = ValueError, /, **options: str) -> Iterator[None]:
    """What the library refuses within is a wrong value, which ends in exit code 2 and names options as they are typed.

    Args:
        option: Option whose value is wrong; None lets a message that names none of the others pass as it is.
        kind: Type of the errors.
        **options: Name that the library has for an option -> its name here. One that is also a plain word counts only
            with a value, as in `revision='v2'`.
    """
    value = r"=(?:'[^']*'|\[[\d, -]*\]|-?\w+(?:[.+-]\w+)*)"
    fields = (rf"\b{name}\b(?:{value}){'?' if '_' in name else ''}" for name in options)
    names = re.compile("|".join(fields)) if options else None
    try:
        yield
    except kind as error:
        message = str(error)
        if names and (found := names.search(message)):
            option = option or options[found[0].partition("=")[0]]
            message = names.sub(lambda field: _as_typed(field[0], options), message)
        if option is None:
            raise
        raise typer.BadParameter(message, param_hint=option) from error


def _as_typed(field: str, options: Mapping[str, str]) -> str:
    """`casa_gate='tanh'` as `--gate tanh`, `casa_layers=[1, 7]` as `--layers 1,7`, `casa_share_projections=False` as
    `--no-share-projections`."""
    name, _, value = field.partition("=")
    option, value = options[name], value.strip("'[]").replace(", ", ",")
    if value in ("True", "False"):
        return option if value == "True" else f"--no-{option.removeprefix('--')}"
    return f"{option} {'none' if value == 'None' else value}".strip()


def existing_file(help: str) -> Any:
    """An option that names a file which has to be there."""
    return typer.Option(exists=True, dir_okay=False, metavar="FILE", help=help, show_default=False)


def existing(kind: str, **options: Any) -> Callable[..., Any]:
    """An argument that names a file or a folder which has to be there.

    Args:
        kind: "file" or "folder".
        **options: options of the argument.
    """
    return typer.Argument(exists=True, file_okay=kind == "file", dir_okay=kind == "folder", **options)


ModelArgument = Annotated[
    str, typer.Argument(parser=casa_checkpoint, help="Folder or Hub id of a CASA checkpoint.", show_default=False)
]
MaxNewTokensOption = Annotated[int, typer.Option(min=1, help="Length of an answer at most, in tokens.")]
FpsOption = Annotated[
    float | None,
    typer.Option(
        help="Frames per second of videos. Default: 2, of videos of less than 10 seconds 20 frames.",
        show_default=False,
    ),
]
NumFramesOption = Annotated[
    int | None, typer.Option(min=1, help="Frames of each video, evenly spaced.", show_default=False)
]
DeviceOption = Annotated[
    str | None, typer.Option(help="Where to run, such as cpu or cuda:0. Default: a GPU if there is one.")
]
DtypeOption = Annotated[str | None, dtype_option("Number format to run in. Default: the checkpoint's.")]
ControlTokensOption = Annotated[
    bool,
    typer.Option(
        "--sanitize-control-tokens/--no-sanitize-control-tokens",
        help="Whether control tokens such as <|im_start|> are text where they are typed, or count.",
    ),
]
TemplateKwargsOption = Annotated[
    dict[str, Any] | None,
    typer.Option(
        "--chat-template-kwargs",
        parser=json_object,
        metavar="JSON",
        help="Variables of the chat template as a JSON object, such as '{\"enable_thinking\": false}'.",
        show_default=False,
    ),
]
AttnOption = Annotated[
    str | None, typer.Option(help="Attention backend, such as sdpa or eager. Default: chosen by Transformers.")
]
