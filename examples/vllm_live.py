# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Live captions by vLLM: many streams on one engine, each a session that is given a frame at a time.

    pip install "casa_hf[vllm,video]"
    python examples/vllm_live.py MODEL VIDEO [VIDEO ...]

Each video is captioned as it would be while it runs: the model reads a frame, says something or nothing, and reads the
next one. A session's sequence is what a `CasaStream` has in its cache, and without repetition control its tokens are
those of a `CasaStream`. vLLM takes back the last token that it has sampled when a session continues, so that token
comes again with the next frame.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import StreamingInput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from casa_hf import CasaProcessor, StreamSettings
from casa_hf.streaming.turns import StreamTurns


async def captions(
    engine: AsyncLLM,
    processor: CasaProcessor,
    frames: Iterable[tuple[float, Any]],
    settings: StreamSettings,
    stops: Iterable[int],
    name: str,
) -> AsyncIterator[tuple[float, list[int]]]:
    """The times of frames, and the tokens that are said to each, the stop token included.

    Args:
        engine: vLLM with a CASA model.
        processor: processor of the model.
        frames: times in seconds and frames, ascending; waited for in a thread.
        settings: prompt, and the number of tokens per frame.
        stops: ids of tokens that end what is said to a frame.
        name: name of the session.
    """
    turns, stops = StreamTurns(processor, settings), list(stops)
    sampling = SamplingParams(
        temperature=0,
        max_tokens=settings.max_new_tokens_per_frame,
        stop_token_ids=stops,
        output_kind=RequestOutputKind.DELTA,
        detokenize=False,
    )
    said: list[int] = []
    is_said = asyncio.Event()
    shown: list[float] = []

    async def updates() -> AsyncIterator[StreamingInput]:
        given = iter(frames)
        while (pair := await asyncio.to_thread(next, given, None)) is not None:
            time, frame = pair
            before = said[-1:] if shown else turns.opening
            ids, _ = turns.image([time])
            said.clear()
            shown.append(time)
            is_said.clear()
            prompt = {"prompt_token_ids": [*before, *ids], "multi_modal_data": {"image": frame}}
            yield StreamingInput(prompt=prompt, sampling_params=sampling)
            await is_said.wait()

    async for output in engine.generate(updates(), sampling, request_id=name):
        said.extend(output.outputs[0].token_ids)
        if said and not is_said.is_set() and (said[-1] in stops or len(said) == settings.max_new_tokens_per_frame):
            yield shown[-1], list(said)
            is_said.set()


async def caption_videos(model: str, videos: list[str], prompt: str, fps: float) -> None:
    """Caption videos at the same time, and print what is said."""
    from casa_hf.video import open_video

    opened = {video: open_video(video, fps=fps) for video in videos}
    processor = CasaProcessor.from_pretrained(model)
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model))
    settings = StreamSettings(prompt=prompt, fps=fps)
    stops = [processor.tokenizer.eos_token_id]

    async def one(video: str) -> None:
        async for time, ids in captions(engine, processor, opened[video], settings, stops, video):
            if text := processor.tokenizer.decode(ids, skip_special_tokens=True).strip():
                print(f"{video} {time:7.2f} s  {text}", flush=True)

    try:
        await asyncio.gather(*(one(video) for video in videos))
    finally:
        engine.shutdown()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Caption videos with vLLM, a frame at a time.")
    parser.add_argument("model", help="folder or Hub id of a CASA model")
    parser.add_argument("videos", nargs="+", help="video files, cameras, folders of images")
    parser.add_argument("--prompt", default="Describe what happens in the video.")
    parser.add_argument("--fps", type=float, default=2.0, help="frames per second")
    options = parser.parse_args()
    asyncio.run(caption_videos(options.model, options.videos, options.prompt, options.fps))


if __name__ == "__main__":
    main()
