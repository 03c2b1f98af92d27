# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The model of lmms-eval: CASA checkpoints and token-insertion checkpoints by the Auto classes, in batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

import casa_hf  # noqa: F401  (registers its classes with the Auto classes)

from ...answers import answer_prompts
from ...chat_text import render_chat
from ...checks import check_count
from ...frames_casa import check_sampling, measure_frames, read_frames
from ...media_casa import rgb_image
from ...processing_casa import CasaProcessor
from .generation import Generation, read_generation

logger = logging.get_logger(__name__)

# The processor of Qwen2-VL's and Qwen2.5-VL's videos, whose `size` is that of a frame.
_LIMITS_FRAMES = "Qwen2VLVideoProcessor"


class _Question(NamedTuple):
    """A request of lmms-eval.

    Attributes:
        messages: messages as a chat template reads them, without what is shown.
        images: images of all messages, in reading order.
        videos: paths of videos, likewise.
        sampling: how frames are taken from its videos, `fps` or `num_frames`.
    """

    messages: list[dict[str, Any]]
    images: list[Any]
    videos: list[str]
    sampling: tuple[tuple[str, Any], ...]


class CasaLmms(lmms):
    """Model `casa_hf` of lmms-eval, which answers by `generate`.

    Args:
        pretrained: folder or Hub id of a CASA checkpoint, or of a token-insertion checkpoint that
            `AutoModelForImageTextToText` and `AutoProcessor` load.
        batch_size: number of requests that are answered together.
        max_batch_size: ignored; lmms-eval passes it.
        device: device to run on; None for an accelerator if there is one. Under `accelerate launch` each process has
            its own.
        device_map: map of one model over several devices, instead of `device`.
        dtype: number format to run in; "auto" for the checkpoint's.
        attn_implementation: attention backend; None for the one that Transformers chooses.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: whether code of the checkpoint may be run.
        min_pixels, max_pixels: smallest and largest number of pixels of an image; None for the checkpoint's. The
            processors of Qwen2-VL and Qwen2.5-VL take them for video frames too.
        frame_max_pixels: largest number of pixels of a video frame; None for the checkpoint's. Not for sources of
            families whose processors limit a whole video, such as Qwen3-VL.
        fps: frames per second that are taken from a video; None for 2, or 20 frames of a clip below 10 seconds.
        max_frames: largest number of frames of a video: from a video that would have more, so many are taken, evenly
            spaced. None for no limit.
        system_prompt: system message before each request, or a file that holds it; None for what the chat template
            writes.

    Raises:
        ValueError: if an argument isn't valid.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        *,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        frame_max_pixels: int | None = None,
        fps: float | None = None,
        max_frames: int | None = None,
        system_prompt: str | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size!r} must be a positive integer.")
        check_sampling(fps, None)
        if max_frames is not None:
            check_count("max_frames", max_frames)
        self.batch_size, self.fps, self.max_frames = int(batch_size), fps, max_frames
        self.system_prompt = self._resolve_system_prompt(system_prompt or "")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1 and (device or device_map):
            raise ValueError(
                f"device={device!r} and device_map={device_map!r} can't be combined with several processes "
                f"({self._world_size}), each of which has its own device; remove them, or start one process."
            )
        self.device = torch.device(device) if device else self.accelerator.device
        where = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.processor = _load_processor(pretrained, where, min_pixels, max_pixels, frame_max_pixels)
        self._model = AutoModelForImageTextToText.from_pretrained(
            pretrained, dtype=dtype, attn_implementation=attn_implementation, device_map=device_map, **where
        ).eval()
        if device_map is None:
            self._model.to(self.device)
        self._told: set[str] = set()

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What the model answers to each request, in the order of the requests.

        Requests that are generated alike are answered together, whatever their images, videos and texts.

        Raises:
            ValueError: if a request has sound or a part of a video, or an image or a video can't be used.
        """
        answers = [""] * len(requests)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Answering") as progress:
            for generation, numbers in self._alike(requests):
                for batch in self._batches(requests, numbers):
                    said = self._answered([question for _, question in batch], generation)
                    for (number, _), answer in zip(batch, said, strict=True):
                        answers[number] = answer
                    progress.update(len(batch))
        return answers

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("The model casa_hf has no multi-round generation; choose tasks of one round.")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("The model casa_hf answers by generation; choose tasks of type generate_until.")

    def _alike(self, requests: list[Instance]) -> Iterator[tuple[Generation, list[int]]]:
        """How requests are generated, and the numbers of those that are generated so."""
        numbers: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            numbers[repr(sorted(request.args[2].items()))].append(number)
        for alike in numbers.values():
            generation = read_generation(requests[alike[0]].args[2])
            if new := set(generation.unknown) - self._told:
                logger.warning(f"`generate` knows no {', '.join(sorted(new))}, which a task gives; ignored.")
                self._told |= new
            yield generation, alike

    def _batches(self, requests: list[Instance], numbers: list[int]) -> Iterator[list[tuple[int, _Question]]]:
        """Questions that can be one batch; frames are taken from all videos of a batch in the same way."""
        waiting: dict[Any, list[tuple[int, _Question]]] = defaultdict(list)
        for number in numbers:
            question = self._question(requests[number])
            batch = waiting[question.sampling]
            batch.append((number, question))
            if len(batch) == self.batch_size:
                yield waiting.pop(question.sampling)
        yield from waiting.values()

    def _question(self, request: Instance) -> _Question:
        _, doc_to_messages, _, doc_id, task, split = request.args
        chat = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
        images, videos, sounds = chat.extract_media()
        if sounds:
            raise ValueError(f"A request of {task} has sound, which CASA models don't take; choose another task.")
        messages = [
            {"role": each.role, "content": [_part(part, task) for part in each.content]} for each in chat.messages
        ]
        messages = self._apply_system_prompt(messages, self.system_prompt)
        return _Question(messages, images, videos, self._sampling(videos))

    def _sampling(self, videos: Sequence[str]) -> tuple[tuple[str, Any], ...]:
        if not videos:
            return ()  # as good as any
        as_given = (("fps", self.fps),)
        if self.max_frames is None:
            return as_given
        if all(len(measure_frames(video, fps=self.fps).images) <= self.max_frames for video in videos):
            return as_given
        fewest = min(len(measure_frames(video, sample=False).images) for video in videos)
        return (("num_frames", min(self.max_frames, fewest)),)

    def _answered(self, questions: Sequence[_Question], generation: Generation) -> list[str]:
        images = [image for question in questions for image in question.images]
        videos: list[Any] = [video for question in questions for video in question.videos]
        options = dict(generation.options)
        if generation.stops:
            options |= {"stop_strings": list(generation.stops), "tokenizer": self.processor.tokenizer}
        metadata: list[Any] = []
        if isinstance(self.processor, CasaProcessor):
            prompts: list[str] = [render_chat(self.processor, question.messages) for question in questions]
            options |= dict(questions[0].sampling)
        else:
            prompts = [
                self.processor.apply_chat_template(question.messages, tokenize=False, add_generation_prompt=True)
                for question in questions
            ]
            images = [rgb_image(image) for image in images]
            if videos:
                decoded = [_decoded(video, dict(questions[0].sampling)) for video in videos]
                videos, metadata = [frames for frames, _ in decoded], [known for _, known in decoded]
                options["do_sample_frames"] = False
        said = answer_prompts(self._model, self.processor, prompts, images, videos, metadata, **options)
        return [generation.ended(answer) for answer in said]


def _load_processor(
    pretrained: str,
    where: dict[str, Any],
    min_pixels: int | None,
    max_pixels: int | None,
    frame_max_pixels: int | None,
) -> Any:
    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    given = {name: value for name, value in limits.items() if value is not None}
    processor = AutoProcessor.from_pretrained(pretrained, **given, **where)
    if frame_max_pixels is None:
        return processor
    if isinstance(processor, CasaProcessor):
        processor.frame_max_pixels = frame_max_pixels
    else:
        if (kind := type(processor.video_processor).__name__) != _LIMITS_FRAMES:
            raise ValueError(
                f"frame_max_pixels={frame_max_pixels} can't be set for this checkpoint: its {kind} limits the pixels "
                "of a whole video, not those of a frame. Remove it."
            )
        size = processor.video_processor.size
        processor.video_processor.size = {"shortest_edge": size["shortest_edge"], "longest_edge": frame_max_pixels}
    return processor


def _part(part: Any, task: str) -> dict[str, Any]:
    """A part of a message, as a chat template reads it."""
    if part.type == "text":
        return {"type": "text", "text": part.text}
    if part.type == "video" and (not isinstance(part.url, str) or (part.start_time, part.end_time) != (None, None)):
        raise ValueError(
            f"A request of {task} shows a part of a video, or a video that isn't a file, which the model casa_hf "
            "doesn't take; choose another task."
        )
    return {"type": part.type}


def _decoded(video: str, sampling: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """The frames that a CASA model would be shown, and what a stock processor has to know of them."""
    frames = read_frames(video, **sampling)
    # As if the video had a frame each millisecond: so times stay as they are, and so does the mean rate.
    known = {
        "total_num_frames": round(len(frames.images) * frames.seconds_apart * 1000),
        "fps": 1000.0,
        "frames_indices": [round(time * 1000) for time in frames.times],
    }
    return np.stack([np.asarray(image) for image in frames.images]), known
