# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `casa-hf serve`."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated

import typer

from .loading import load_model
from .options import AttnOption, DeviceOption, DtypeOption, ModelArgument, TemplateKwargsOption, wrong_value
from .talking import check_template_option


def serve(
    model: ModelArgument,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on. Any but this machine's own lets others in: there is no password."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    network: Annotated[
        bool, typer.Option(help="Whether images and videos that a request names by a URL are fetched.")
    ] = True,
    timeout: Annotated[float, typer.Option(help="Seconds that fetching one may take.")] = 60.0,
    max_bytes: Annotated[int, typer.Option(help="Largest file of an image or a video, in bytes.")] = 2**28,
    max_decoded_pixels: Annotated[
        int, typer.Option(help="Largest image or frame, in pixels (width x height).")
    ] = 89_478_485,
    chat_template_kwargs: TemplateKwargsOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    attn: AttnOption = None,
) -> None:
    """Serve a model by the protocol of OpenAI, as `transformers serve` does, until Ctrl-C."""
    from ..listening import listen, shown_host
    from ..media_casa import MediaPolicy
    from ..serving.transformers_serve import create_app, require_serving, run

    require_serving()
    with wrong_value(timeout="--timeout", max_bytes="--max-bytes", max_decoded_pixels="--max-decoded-pixels"):
        policy = MediaPolicy(
            network=network,
            local_files=False,
            timeout=timeout,
            max_bytes=max_bytes,
            max_decoded_pixels=max_decoded_pixels,
        )
    with closing(listen(host, port, "The model")) as listener:
        loaded, processor = load_model(model, device, dtype, attn)
        check_template_option(processor, chat_template_kwargs)
        processor.media_policy = policy
        app = create_app(loaded, processor, model, chat_template_kwargs)
        url = f"http://{shown_host(host)}:{listener.getsockname()[1]}"
        typer.echo(f"Serving {model} at {url}/v1 until Ctrl-C.", err=True)
        try:
            run(app, listener)
        except KeyboardInterrupt:
            return
