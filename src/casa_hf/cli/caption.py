# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `casa-hf caption`: a video in, captions out while it plays.

Captions and answers go to standard output, one line each; on a terminal, a view below them shows how it is going.
"""

from __future__ import annotations

import re
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import fields, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ..checks import counted
from .loading import load_model
from .options import (
    AttnOption,
    ControlTokensOption,
    DeviceOption,
    DtypeOption,
    casa_checkpoint,
    valid_text,
    video_name,
    wrong_value,
)

if TYPE_CHECKING:
    from ..captions.overlay import Overlay
    from ..captions.subtitles import CaptionWriter
    from ..streaming import CaptionEvent, CasaStream, LiveCaptions, StreamSettings
    from ..video import VideoInput
    from ..web import CaptionServer

# As shells report a program that Ctrl-C has ended.
INTERRUPTED = 130
# How many of the last frames the view's mean latency is taken over.
_LATEST = 20


class Late(StrEnum):
    """What happens to frames that wait while the model is busy."""

    DROP = "drop"
    MERGE = "merge"
    WAIT = "wait"


class Question(NamedTuple):
    """A question, and the time in the video when it is asked; None for the end."""

    moment: float | None
    text: str


def _seconds(text: str | float) -> float:
    """Seconds from "90", "1:30" or "0:01:30.5"."""
    parts = str(text).split(":")
    if len(parts) > 3 or not all(re.fullmatch(r"\d+(\.\d*)?", part) for part in parts):
        raise typer.BadParameter(f"{text!r} is not a time; write seconds, or 1:30, or 0:01:30.5.")
    return sum(float(part) * 60**power for power, part in enumerate(reversed(parts)))


def _question(text: str) -> Question:
    """A question from "What is it?" or "@1:30 What is it?"."""
    moment, _, question = text.strip().partition(" ")
    if not text.strip():
        raise typer.BadParameter("A question is empty; write QUESTION or @SECONDS QUESTION.")
    if not moment.startswith("@"):
        return Question(None, text.strip())
    if not question.strip():
        raise typer.BadParameter(f"{text!r} has a time and no question; write @SECONDS QUESTION.")
    try:
        return Question(_seconds(moment[1:]), question.strip())
    except typer.BadParameter as error:
        raise typer.BadParameter(
            f"{text!r} begins with {moment!r}; expected @ and a time in seconds, or as 1:30 or 0:01:30.5. Correct the "
            "time.",
            param_hint="--ask",
        ) from error


def _ffmpeg_options(texts: list[str]) -> dict[str, str]:
    """Options of FFmpeg from several "KEY=VALUE"."""
    options: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise typer.BadParameter(
                f"{text!r} is not an option; write KEY=VALUE, such as video_size=640x480.",
                param_hint="--option",
            )
        if key in options:
            raise typer.BadParameter(
                f"{key} is given twice: {options[key]} and {value}. Give it once.", param_hint="--option"
            )
        options[key] = value
    return options


# Of `caption`, the options that are named like fields of StreamSettings are its values, see `_settings`.
def caption(
    context: typer.Context,
    video: Annotated[
        str,
        typer.Argument(
            parser=video_name,
            metavar="VIDEO",
            help="Video file, URL, folder of images, or camera: camera, camera:1, /dev/video0, or FORMAT:DEVICE of "
            "FFmpeg.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str, typer.Option(parser=casa_checkpoint, help="Folder or Hub id of a CASA checkpoint.", show_default=False)
    ],
    prompt: Annotated[
        str | None,
        typer.Option(
            help="What to say about the video. Default: what happens.", show_default=False, callback=valid_text
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(help="System message. Default: the chat template's.", show_default=False, callback=valid_text),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(
            help='Words that the captions begin with, such as "In this video".',
            show_default=False,
            callback=valid_text,
        ),
    ] = None,
    fps: Annotated[float, typer.Option(help="Frames per second that the model sees.")] = 2.0,
    frames_per_image: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Frames that the model sees as one image: 1 or 2. Default: the checkpoint's.",
            show_default=False,
        ),
    ] = None,
    start: Annotated[float, typer.Option(parser=_seconds, metavar="TIME", help="Such as 90 or 1:30.")] = 0.0,
    end: Annotated[
        float | None, typer.Option(parser=_seconds, metavar="TIME", help="Default: the video's.", show_default=False)
    ] = None,
    live_input: Annotated[
        bool | None,
        typer.Option(
            "--live-input/--recorded-input",
            help="Whether the video shows what happens now, and a frame that isn't taken in time is gone. Default: "
            "live are cameras, rtsp:// and the like, and HTTP cameras.",
            show_default=False,
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Images per second of a folder. Of a camera: frames per second to ask of it.", show_default=False
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="For FFmpeg, such as video_size=640x480 of a camera; repeat for several.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        list[Path] | None,
        typer.Option(help="File to write, .srt, .vtt or .jsonl; repeat for several.", show_default=False),
    ] = None,
    words: Annotated[bool, typer.Option("--words", help="Subtitles word by word.")] = False,
    overlay: Annotated[
        Path | None, typer.Option(help="Video to write with the captions in the image, .mp4, .mov or .mkv.")
    ] = None,
    font: Annotated[
        Path | None,
        typer.Option(
            help="TrueType or OpenType file for --overlay. Default: an installed one that has the captions' letters.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    live: Annotated[bool, typer.Option("--live", help="Play a file at its own speed; cameras always do.")] = False,
    late: Annotated[
        Late | None,
        typer.Option(
            help="Frames that wait while the model is busy: drop old ones, show them merged in one forward, or let "
            "them wait. Default: drop when live, else wait.",
            show_default=False,
        ),
    ] = None,
    frame_budget: Annotated[
        float | None,
        typer.Option(
            "--frame-budget",
            metavar="SECONDS",
            help="After so long the text of a frame resumes with the next one. Default: one frame's time when live, "
            "unless late frames wait.",
            show_default=False,
        ),
    ] = None,
    ask: Annotated[
        list[str] | None,
        typer.Option(
            help='Question for the end of the video, or "@1:30 QUESTION" for that moment; repeat for several.',
            show_default=False,
            callback=valid_text,
        ),
    ] = None,
    max_new_tokens_per_frame: Annotated[
        int, typer.Option("--max-new-tokens", help="Tokens of text per frame at most.")
    ] = 20,
    max_text_tokens: Annotated[
        int | None, typer.Option(help="Text tokens to remember; older ones are forgotten. Default: all.")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Draw words at random, the more daring the higher; 0.4 is cautious. Default: the likeliest words.",
            show_default=False,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="Draw from so many likeliest tokens, 0 for all. Default: 256.", show_default=False),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Draw the same words each time.", show_default=False)] = None,
    allow_repeats: Annotated[
        bool, typer.Option("--allow-repeats", help="Let captions repeat what was said, unhindered.")
    ] = False,
    web: Annotated[
        bool,
        typer.Option("--web", help="Show it on a page in the browser until Ctrl-C. A file plays at its own speed."),
    ] = False,
    host: Annotated[
        str | None,
        typer.Option(help="Address of the page. Default: 127.0.0.1, this machine alone.", show_default=False),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Of the page; 0 takes a free one. Default: 8000.")
    ] = None,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile the step of single tokens, which takes a while at first and is faster then. Default: on "
            "accelerators.",
            show_default=False,
        ),
    ] = None,
    sanitize_control_tokens: ControlTokensOption = True,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    attn: AttnOption = None,
) -> None:
    """Caption a video while it plays: a file, a stream from the network, or a camera."""
    questions = [_question(text) for text in ask or []]
    ffmpeg_options = _ffmpeg_options(option or [])
    _check_company(context.params)
    from ..captions.overlay import Overlay
    from ..streaming import CasaStream, LiveCaptions
    from ..video import open_video

    settings = _settings(context)
    with wrong_value("VIDEO", **{name: f"--{name}" for name in ("start", "end", "rate")}):
        opened = open_video(video, fps=fps, start=start, end=end, rate=rate, live=live_input, options=ffmpeg_options)
    real_time = live or opened.live
    late = _late(late, real_time)
    if frame_budget is None and late is not Late.WAIT:
        settings = replace(settings, frame_budget=1 / fps)
    files = _Files(out or [], words, overwrite, opened)
    with wrong_value("--overlay", overwrite="--overwrite"):
        drawn = None if overlay is None else Overlay(opened, overlay, font=font, overwrite=overwrite)
    with ExitStack() as resources:
        resources.enter_context(opened)
        resources.enter_context(files)
        streams: list[CasaStream] = []
        server = None
        if web:  # takes its port before the model is loaded
            server = _page(streams.pop, opened, host, port, late, live, files)
            resources.callback(server.close)
        stream = resources.enter_context(CasaStream(*load_model(model, device, dtype, attn), settings))
        for question in questions:
            with wrong_value("--ask"):
                stream.turns.question(question.text)  # or says what is wrong with it, hours before it is asked
        if server is not None:
            streams.append(stream)
            _serve(server)
            return
        on_frame = None if drawn is None else drawn.show
        captions = LiveCaptions(stream, opened, late=late.value, real_time=real_time, on_frame=on_frame)
        view = resources.enter_context(_View(stream, opened, captions))
        interrupted = _play(captions, questions, files, drawn, view)
        made = [*files.made, *([overlay] if overlay and drawn and drawn.written else [])]
        view.finish(interrupted, made, drawn.note if drawn else "")
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _check_company(given: Mapping[str, Any]) -> None:
    """Refuse options that go with others only."""
    if given["web"] and (given["ask"] or given["overlay"] is not None):
        raise typer.BadParameter(
            "--web can't be combined with --ask and --overlay. Leave them out; the page takes questions.",
            param_hint="--web",
        )
    if not given["web"] and (given["host"] is not None or given["port"] is not None):
        raise typer.BadParameter(
            "--host and --port are for the page. Add --web, or leave them out.", param_hint="--host"
        )
    if given["font"] is not None and given["overlay"] is None:
        raise typer.BadParameter("--font is for --overlay. Add it, or leave --font out.", param_hint="--font")
    if given["temperature"] is None and (given["top_k"] is not None or given["seed"] is not None):
        name, value = next((name, given[name]) for name in ("top_k", "seed") if given[name] is not None)
        option = f"--{name.replace('_', '-')}"
        raise typer.BadParameter(
            f"{option} {value} needs --temperature, with which words are drawn at random. Add --temperature 0.4, or "
            f"leave {option} out.",
            param_hint=option,
        )


def _settings(context: typer.Context) -> StreamSettings:
    """What the options say that are named like fields of the settings; None leaves a field as it is."""
    from ..streaming import StreamSettings

    names = {field.name for field in fields(StreamSettings)}
    options = {str(option.name): option.opts[0] for option in context.command.params if option.name in names}
    given = {name: context.params[name] for name in options if context.params[name] is not None}
    if context.params["allow_repeats"]:
        given |= {"repetition_penalty": None, "no_repeat_ngram_size": None}
    with wrong_value(**options):
        return StreamSettings(do_sample="temperature" in given, **given)


def _late(late: Late | None, real_time: bool) -> Late:
    """What happens to late frames."""
    if late not in (None, Late.WAIT) and not real_time:
        raise typer.BadParameter(
            f"{late} needs --live or --live-input: without a clock no frame is late. Add one, or leave --late out.",
            param_hint="--late",
        )
    return late or (Late.DROP if real_time else Late.WAIT)


def _page(
    stream: Callable[[], CasaStream],
    video: VideoInput,
    host: str | None,
    port: int | None,
    late: Late,
    live: bool,
    files: _Files,
) -> CaptionServer:
    """The server of the page, which has its address and doesn't run yet."""
    from ..web import DEFAULT_HOST, DEFAULT_PORT, CaptionServer

    return CaptionServer(
        stream,
        video,
        host=host or DEFAULT_HOST,
        port=DEFAULT_PORT if port is None else port,
        real_time=True if live else None,
        late=late.value,
        on_event=files.write,
    )


def _play(
    captions: LiveCaptions, questions: list[Question], files: _Files, drawn: Overlay | None, view: _View
) -> bool:
    """Write and show what happens, to the end; whether Ctrl-C was it."""
    completed = False
    try:
        for event in _events(captions, questions):
            files.write(event)
            if drawn is not None:
                drawn.write(event)
            view.show(event)
        completed = True
    except KeyboardInterrupt:
        return True
    finally:
        if drawn is not None:
            drawn.close(interrupted=not completed)
    return False


class _Files(AbstractContextManager["_Files"]):
    """Caption files; they are made when there is something to write.

    Attributes:
        made: those that have been made.

    Raises:
        BadParameter: if one can't be written, is given twice, or is the video itself.
    """

    def __init__(self, paths: list[Path], words: bool, overwrite: bool, video: VideoInput):
        from ..captions.subtitles import WRITERS, check_output

        with wrong_value("--out", overwrite="--overwrite"):
            for path in paths:
                check_output(path, WRITERS, overwrite, video.files)
        places = Counter(path.resolve() for path in paths)
        for path in paths:
            if (times := places[path.resolve()]) > 1:
                raise typer.BadParameter(
                    f"{str(path)!r} is given {times} times; name each file once.", param_hint="--out"
                )
        self._paths, self._words, self._overwrite = paths, words, overwrite
        self._opened = ExitStack()
        self._writers: list[CaptionWriter] = []
        self.made: list[Path] = []

    def __exit__(self, *exception: Any) -> None:
        self._opened.close()

    def write(self, event: CaptionEvent) -> None:
        if not self._writers:
            from ..captions.subtitles import caption_writer

            for path in self._paths:
                writer = caption_writer(path, words=self._words, overwrite=self._overwrite)
                self._writers.append(self._opened.enter_context(writer))
                self.made.append(path)
        for writer in self._writers:
            writer.write(event)


def _serve(server: CaptionServer) -> None:
    typer.echo(f"Captions at {server.url} until Ctrl-C.", err=True)
    try:
        server.run()
    except KeyboardInterrupt:
        return


def _events(captions: LiveCaptions, questions: list[Question]) -> Iterator[CaptionEvent]:
    """What happens, with the questions asked in their time."""
    # Those of one moment in the order in which they were given.
    timed = deque(sorted((each for each in questions if each.moment is not None), key=lambda each: each.moment or 0.0))
    for event in captions:
        yield event
        # The end of its answer asks the next one of the same moment, so there is always room for it.
        if event.kind in ("end", "answered") and timed and event.start >= (timed[0].moment or 0.0):
            captions.ask(timed.popleft().text)
    for question in [*timed, *(question for question in questions if question.moment is None)]:
        yield from captions.answer(question.text)


class _View(AbstractContextManager["_View"]):
    """Shows events: lines on standard output, and on a terminal how it is going."""

    def __init__(self, stream: CasaStream, video: VideoInput, captions: LiveCaptions):
        self._stream, self._video, self._captions = stream, video, captions
        self._begin = time.perf_counter()
        self._counts: Counter[str] = Counter()
        self._latencies: deque[float] = deque(maxlen=_LATEST)
        self._text = self._answer = ""
        self._position = 0.0
        self._nbytes = stream.nbytes
        self._live: Any = nullcontext()
        self._watched = sys.stderr.isatty()
        if self._watched:
            from rich.console import Console
            from rich.live import Live

            # Standard output stays what it is: somebody may be reading it elsewhere.
            self._live = Live(
                console=Console(stderr=True),
                get_renderable=self._panel,
                refresh_per_second=8,
                redirect_stdout=False,
                redirect_stderr=False,
            )

    def __enter__(self) -> _View:
        self._live.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._live.__exit__(*exception)

    def show(self, event: CaptionEvent) -> None:
        self._position = event.start
        if event.kind == "text":
            self._text += event.text
        elif event.kind == "answer":
            self._answer += event.text
        elif event.kind == "answered":
            self._line(f"[{_clock(event.start)}] answer: {_one_line(event.text) or '(silence)'}")
            self._answer = ""
        elif event.kind == "end":
            self._counts["frames"] += 1
            self._latencies.append(event.latency)
            self._nbytes = self._stream.nbytes
            text, self._text = _one_line(self._text), ""  # before it is shown, or Ctrl-C would have it shown twice
            if text:
                self._line(f"[{_clock(event.start)}] {text}")
        else:
            self._counts[event.kind] += event.count
            if event.kind != "merged" or self._stream.frames_per_image == 1:  # else it is nothing special
                self._remark(f"[{_clock(event.start)}] {event.kind}: {_one_line(event.message)}")

    def finish(self, interrupted: bool, files: list[Path], note: str) -> None:
        """Say what has been done."""
        if text := _one_line(self._text):  # of the frame that was interrupted
            self._line(f"[{_clock(self._position)}] {text}")
            self._text = ""
        seconds = time.perf_counter() - self._begin
        counts = [counted(self._counts["frames"], "frame")]
        counts += [f"{self._counts[kind]} {kind}" for kind in ("dropped", "merged") if self._counts[kind]]
        counts += [counted(self._counts["error"], "error")] if self._counts["error"] else []
        written = f"; wrote {', '.join(map(str, files))}" if files else ""
        ended = "Interrupted: " if interrupted else ""
        if note:
            self._remark(note)
        self._remark(f"{ended}{', '.join(counts)} in {seconds:.1f} s{written}.")

    def _line(self, text: str) -> None:
        """A caption or an answer."""
        if self._watched and sys.stdout.isatty():
            self._remark(text)  # the view is on the same screen
        else:
            typer.echo(text)

    def _remark(self, text: str) -> None:
        if self._watched:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            typer.echo(text, err=True)

    def _panel(self) -> Any:
        from rich.console import Group
        from rich.filesize import decimal
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        bound = [each for each in (self._video.duration, self._video.end) if each is not None]
        rows = {
            "time": _clock(self._position) + (f" of {_clock(min(bound))}" if bound else ""),
            "frames": f"{self._counts['frames']}, {self._counts['dropped']} dropped, {self._counts['merged']} merged, "
            f"{counted(self._counts['error'], 'error')}",
            "latency": "",
            "memory": "".join(f"{decimal(size)} {part}, " for part, size in self._nbytes.items())
            + f"{self._stream.num_text_tokens} text tokens",
        }
        if self._latencies:
            mean = sum(self._latencies) / len(self._latencies)
            rows["latency"] = f"{self._latencies[-1]:.2f} s, mean {mean:.2f} s"
            if self._captions.real_time:
                rows["latency"] += f", {self._captions.lag:.2f} s behind"
        table = Table.grid(padding=(0, 2))
        for label, value in rows.items():
            table.add_row(label, value)
        parts: list[Any] = [table]
        if bound:
            length = min(bound) - self._video.start
            parts.append(ProgressBar(total=length, completed=self._position - self._video.start, width=60))
        speaking = self._answer or self._text
        return Group(*parts, Text(_one_line(speaking) or " ", style="bold", overflow="ellipsis", no_wrap=True))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02}:{seconds:04.1f}"


def _one_line(text: str) -> str:
    """Text of a model or of an error without what would break lines or steer a terminal."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
