# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The server of `transformers serve` for a CASA model, with the protocol of OpenAI.

Routes, streaming, parsing of answers and the queue of requests are Transformers' own. Left to itself it doesn't know
CASA's classes, reads any path and URL that a request names, and waits for the latter while everybody else waits too.
So the model and its processor are given to it here; images and videos of a request come in through `media_casa`, by
the policy of the processor and in a thread of their own; and what is refused is answered with its reason.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import socket
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from transformers.utils.import_utils import is_serve_available

from ..chat_text import check_template_kwargs
from ..configuration_casa import SOURCE_MODEL_TYPE
from ..media_casa import MediaPolicy, contents_of, name_of, reason_of, rgb_image

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.responses import JSONResponse, Response

    from ..modeling_casa import CasaForConditionalGeneration
    from ..processing_casa import CasaProcessor

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000
# Room for JSON around the largest file in base64.
_BASE64_BYTES = 4 / 3
_JSON_BYTES = 2**20
# The field of a request with variables of the chat template.
_VARIABLES = "chat_template_kwargs"
# How chat completions and responses call the parts of a message.
_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image_url", "input_image")
_VIDEO_PARTS = ("video_url",)
_PARTS = (*_TEXT_PARTS, *_IMAGE_PARTS, *_VIDEO_PARTS)


def require_serving() -> None:
    """Check that what the server needs is installed.

    Raises:
        ImportError: if it isn't.
    """
    if not is_serve_available():
        raise ImportError(
            "The server needs FastAPI, Uvicorn, Pydantic and the client of OpenAI: pip install casa_hf[serving]"
        )


def create_app(
    model: CasaForConditionalGeneration,
    processor: CasaProcessor,
    name: str,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> FastAPI:
    """The server as a FastAPI application.

    It answers chat completions, responses and completions, one request at a time. Requests may name images and videos
    as URLs, data URLs or base64, as far as `processor.media_policy` allows.

    Args:
        model: model that answers.
        processor: processor of the model. A server gives it a policy without local files.
        name: name of the model, which requests give as `model`.
        chat_template_kwargs: variables of the chat template, where a request gives no others as
            `chat_template_kwargs`.

    Raises:
        ImportError: without the packages that the server needs.
        ValueError: for variables that the chat template doesn't have, or that requests have a field for.
    """
    require_serving()
    from jinja2 import TemplateError
    from starlette.exceptions import HTTPException
    from starlette.middleware.body_limit import RequestBodyLimitMiddleware
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import GenerationState, get_response_template

    if get_response_template(processor, model) is None:
        # How answers have thoughts and calls of tools in them is known by the source's type.
        source = SimpleNamespace(config=SimpleNamespace(model_type=_source_type(model)))
        processor.tokenizer.response_template = get_response_template(processor, source)

    _check_variables(dict(chat_template_kwargs or {}), processor)
    manager = _manager_of_one(model, processor, name)
    state = GenerationState()
    known = inspect.signature(build_server).parameters
    handlers = _handlers(manager, state, processor, dict(chat_template_kwargs or {}))
    app = build_server(
        manager,
        generation_state=state,
        **{argument: handler for argument, handler in handlers.items() if argument in known},
    )

    for kind in (HTTPException, ValueError, NotImplementedError, TemplateError):
        app.add_exception_handler(kind, _refuse)
    limit = int(processor.media_policy.max_bytes * _BASE64_BYTES) + _JSON_BYTES
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=limit)
    return app


def _manager_of_one(model: CasaForConditionalGeneration, processor: CasaProcessor, name: str) -> Any:
    """What gives handlers their model: this one, and no other."""
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.utils import Modality

    class OneModel(ModelManager):
        """Holds the model, which is never unloaded, and no other."""

        def __init__(self) -> None:
            super().__init__(model_timeout=-1)
            self.force_model = name

        @staticmethod
        def process_model_name(model_id: str) -> str:
            return model_id

        def load_model_and_processor(
            self, model_id_and_revision: str, progress_callback: Callable[..., None] | None = None, **kwargs: Any
        ) -> Any:
            if model_id_and_revision != name:
                raise ValueError(f"This server has the model {name!r} alone; requested {model_id_and_revision!r}.")
            if progress_callback is not None:
                progress_callback({"status": "ready", "model": name, "cached": True})
            return model, processor

        @staticmethod
        def get_model_modality(*args: Any, **kwargs: Any) -> Modality:
            return Modality.VLM

        def list_models(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
            known = {"id": name, "object": "model", "created": 0, "owned_by": ""}
            return [{**known, "status": {"value": "loaded"}}]

        get_gen_models = list_models  # its name before Transformers 5.18

    return OneModel()


def _handlers(
    manager: Any, state: Any, processor: CasaProcessor, chat_template_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The handlers of requests, by the name of `build_server`'s argument."""
    from starlette.exceptions import HTTPException
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.response import ResponseHandler

    class ReadsMedia:
        """A handler that first reads the images and videos of a request, in a thread: other requests don't wait."""

        async def handle_request(self, body: dict[str, Any], request_id: str) -> Response:
            if _VARIABLES in body:
                _check_variables(body[_VARIABLES], processor)
            body = await asyncio.to_thread(_with_contents, body, processor.media_policy)
            return await super().handle_request(body, request_id)  # type: ignore[misc]

    class Chat(ReadsMedia, ChatCompletionHandler):
        pass

    class Responses(ReadsMedia, ResponseHandler):
        pass

    class Unavailable:
        async def handle_request(self, *args: Any) -> Response:
            raise HTTPException(status_code=404, detail="CASA models don't answer requests of this kind.")

    return {
        "chat_handler": Chat(manager, state, chat_template_kwargs=chat_template_kwargs),
        "completion_handler": CompletionHandler(manager, state),
        "response_handler": Responses(manager, state, chat_template_kwargs=chat_template_kwargs),
        "transcription_handler": Unavailable(),
        "systemone_handler": Unavailable(),
    }


def _check_variables(given: Any, processor: CasaProcessor) -> None:
    """Refuse what a request may not set of a chat template: Transformers would hand the processor what the template
    doesn't have, such as the sizes of images.

    Raises:
        ValueError: naming it.
    """
    if not isinstance(given, dict):
        raise ValueError(f"{_VARIABLES} is {json.dumps(given):.100}; expected an object.")
    if "tools" in given:
        raise ValueError(f"{_VARIABLES} has 'tools'. Give them as `tools` of the request.")
    check_template_kwargs(processor, given)


async def _refuse(request: Any, error: Exception) -> JSONResponse:
    """An error in the form in which the client of OpenAI shows it."""
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse

    status, reason = (error.status_code, error.detail) if isinstance(error, HTTPException) else (400, str(error))
    message = " ".join(reason.split()) if isinstance(reason, str) else json.dumps(reason)
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status_code=status)


def run(app: FastAPI, listener: socket.socket) -> None:
    """Serve an application until Ctrl-C or another signal that ends the process.

    Args:
        app: application made by `create_app`.
        listener: socket to serve it on, which is closed at the end.
    """
    import uvicorn
    from uvicorn.config import LOGGING_CONFIG

    logs = copy.deepcopy(LOGGING_CONFIG)
    logs["handlers"]["access"]["stream"] = "ext://sys.stderr"  # standard output is for answers
    with listener:
        uvicorn.Server(uvicorn.Config(app, log_config=logs, log_level="info")).run(sockets=[listener])


def _source_type(model: CasaForConditionalGeneration) -> str | None:
    """The `model_type` of the checkpoint that a model was converted from."""
    return (model.config.source_config or {}).get(SOURCE_MODEL_TYPE)


# -------------------------------------------------------------------- images and videos of a request


def _with_contents(body: dict[str, Any], policy: MediaPolicy) -> dict[str, Any]:
    """A request with its images and the files of its videos in the place of their addresses.

    Raises:
        ValueError: if one isn't allowed or can't be read; or if a part isn't written as the protocol has it.
    """
    body = {**body}
    for name in ("messages", "input"):
        if name in body:
            body[name] = copy.deepcopy(body[name])
            for part in _parts(body[name]):
                _read(part, policy)
    return body


def _parts(messages: Any) -> Iterator[dict[str, Any]]:
    """The parts of messages; a list that begins with a part is a message of its own."""
    if not isinstance(messages, list):
        return
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError(f"A message is {json.dumps(message):.100}; expected an object with a role and a content.")
    one = bool(messages) and "role" not in messages[0]
    for content in [messages] if one else [message.get("content") for message in messages if "role" in message]:
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, dict) or part.get("type") not in _PARTS:
                raise ValueError(
                    f"A part of a message is {json.dumps(part):.100}; expected text, an image or a video, as an "
                    f"object whose type is one of {', '.join(_PARTS)}."
                )
            yield part


def _read(part: dict[str, Any], policy: MediaPolicy) -> None:
    kind = part["type"]
    if kind in _IMAGE_PARTS:
        part["image_url"] = {"url": rgb_image(_address(part, "image_url"), policy)}
    elif kind in _VIDEO_PARTS:
        address = _address(part, "video_url")
        try:
            part["video_url"] = {"url": contents_of(address, policy)}
        except ValueError as error:
            raise ValueError(f"The video {name_of(address)} can't be used: {reason_of(error)}.") from error


def _address(part: dict[str, Any], field: str) -> str:
    """The URL, data URL or base64 of an image or video."""
    given = part.get(field)
    address = given.get("url") if isinstance(given, dict) else given
    if not isinstance(address, str):
        raise ValueError(
            f"A part of type {part['type']!r} has {field} {json.dumps(given):.100}; expected a URL, or an object with "
            "a url."
        )
    return address
