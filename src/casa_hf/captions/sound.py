# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Sound of one file copied into another, packet by packet."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from ..frames_casa import reading_errors
from ..video import MediaInput


class Sound:
    """Packets of the first audio stream of a file, copied into another."""

    def __init__(self, container: Any, output: Any, target: Any, start: float):
        self._container, self._output, self._target = container, output, target
        self._stream = container.streams.audio[0]
        first = container.streams.video[0].start_time
        base = container.streams.video[0].time_base
        # Time 0 is the first frame.
        self._zero = (Fraction(first * base) if first is not None else Fraction(0)) + Fraction(start)
        self._packets = container.demux(self._stream)
        self._next: Any = None

    @classmethod
    def open(cls, audio: str | MediaInput, output: Any, start: float) -> tuple[Sound | None, str]:
        """The sound of a file or input, or why it can't be copied (nothing if there is none)."""
        try:
            if isinstance(audio, MediaInput):
                container = audio.open_container()
            else:
                with MediaInput(audio, live=False) as video:
                    container = video.open_container()
        except ValueError as error:
            return None, f"the sound can't be read: {error}; the video is without sound"
        if not container.streams.audio:
            container.close()
            return None, ""
        stream = container.streams.audio[0]
        codec = stream.codec_context.codec.canonical_name  # decoders of one format have several names
        if codec not in output.supported_codecs:
            container.close()
            return None, f"the sound is {codec}, which {output.format.name} can't hold; the video is without sound"
        try:
            target = output.add_stream_from_template(stream)
        except reading_errors() as error:
            container.close()
            return None, f"the sound ({codec}) can't be copied: {error}; the video is without sound"
        return cls(container, output, target, start), ""

    def copy_until(self, moment: Fraction | float) -> None:
        """Copy the packets before a moment, in seconds of the output; infinity for all that are left."""
        while True:
            if self._next is None:
                try:
                    self._next = next(self._packets, None)
                except reading_errors():
                    return  # the end is missing, as is that of the video
            packet = self._next
            if packet is None or packet.dts is None:
                return
            base = Fraction(packet.time_base)
            if packet.pts * base - self._zero >= moment:
                return
            self._next = None
            if packet.pts * base < self._zero:
                continue
            shift = int(self._zero / base)
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            packet.stream = self._target
            self._output.mux(packet)

    def close(self) -> None:
        self._container.close()
