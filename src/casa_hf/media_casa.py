# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""The one door through which pictures and frames come in.

Whatever a picture is given as, it becomes the same RGB image of 8 bits per channel: turned as its EXIF data says, what
isn't opaque laid on white, values read as the type of the pixels says. Whatever can't be a picture is refused by name.

CASA knows no videos, only images in sequence: a clip is sampled, and each frame stands in the prompt as an image of
its own. A file is read twice: first its packets, for the time of every frame, which costs little and trusts no header;
then the frames, of which only the chosen ones are kept. Frames have square pixels and are turned as the file says.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import math
import os
import re
import struct
import time
import urllib.error
import urllib.request
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO, IOBase
from itertools import chain
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, BinaryIO
from urllib.parse import quote, unquote, unquote_to_bytes

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format, is_valid_image

from .checks import check_count, check_positive

DEFAULT_FPS = 2.0
SHORT_CLIP_SECONDS = 10.0
SHORT_CLIP_FRAMES = 20
# Containers round times to their time base; a frame that starts this much late still counts as on time.
_TOLERANCE_SECONDS = 1e-3
# A device that is silent for so long has ended.
_SILENCE_SECONDS = 10.0
_BUSY_SECONDS = 0.005
# How much of the end may be missing before that is worth a word; headers aren't exact.
_MISSING_SECONDS = 0.5
_RAW_STREAM_FPS = 25  # which FFmpeg takes for what states none

_URL_SCHEMES = ("http://", "https://")
_CHUNK_BYTES = 1 << 16
# Some servers refuse a client that doesn't name itself.
_USER_AGENT = "casa_hf (https://pypi.org/project/casa_hf/)"

# The smallest pictures there are take some 40 bytes.
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{48,}={0,2}\s*")
_MAX_NAME = 200
_MAX_REASON = 400
# How pictures are turned upright, by what their EXIF data say about their orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# A film, and a document that Pillow gives to another program.
UNREAD_FORMATS = ("MPEG", "EPS")
# FFmpeg would follow the names in a playlist, to files and over the network.
_ALONE = {"protocol_whitelist": "none"}
_LOCAL = {"protocol_whitelist": "file,crypto,data"}


@dataclass(frozen=True)
class MediaPolicy:
    """Where pictures and videos may come from, and how large they may be.

    The defaults are what Transformers' processors do, which fetch any URL and read any path that stands in a prompt. A
    server that takes prompts from others gives `network=False, local_files=False`: then pictures and videos come as
    contents only (base64, bytes, PIL images, arrays).

    Attributes:
        network: whether `http://` and `https://` URLs are fetched.
        local_files: whether paths are read.
        timeout: seconds that a fetch may take as a whole.
        max_bytes: largest number of bytes that are fetched.
        max_decoded_pixels: largest number of pixels (width x height) of a picture or a frame. It is checked before
            anything is decoded: a file of 20 kB can hold a picture that takes gigabytes.

    Raises:
        ValueError: if a number isn't positive.
    """

    network: bool = True
    local_files: bool = True
    timeout: float = 60.0
    max_bytes: int = 2**28
    max_decoded_pixels: int = 89_478_485  # Pillow's own limit, from which on it warns

    def __post_init__(self) -> None:
        check_positive("timeout", self.timeout, "a positive number of seconds")
        check_count("max_bytes", self.max_bytes)
        check_count("max_decoded_pixels", self.max_decoded_pixels)
        for name in ("network", "local_files"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False.")

    @classmethod
    def of(cls, given: MediaPolicy | Mapping[str, Any] | None) -> MediaPolicy:
        """A policy as it is or as a mapping of its attributes; None for the defaults.

        Raises:
            ValueError: for anything else, or unknown attributes.
        """
        if isinstance(given, Mapping):
            try:
                return cls(**given)
            except TypeError as error:
                raise ValueError(
                    f"media_policy={dict(given)!r} must have the fields of MediaPolicy: {error}"
                ) from error
        if given is None:
            return cls()
        if not all(hasattr(given, name) for name in cls.__dataclass_fields__):
            raise ValueError(f"media_policy={given!r} must be a MediaPolicy, or a dictionary of its fields.")
        return given

    def check_size(self, width: int, height: int) -> None:
        """Refuse what has more pixels.

        Raises:
            ValueError: with the size, the limit and the way out.
        """
        if width * height > self.max_decoded_pixels:
            raise ValueError(
                f"it has {width} x {height} pixels, more than max_decoded_pixels={self.max_decoded_pixels}; make it "
                "smaller, or give a MediaPolicy with a higher limit"
            )


DEFAULT_POLICY = MediaPolicy()


class VideoWarning(UserWarning):
    """A part of a video could not be used."""


@dataclass(frozen=True)
class VideoProblem:
    """Something in a video that could not be used.

    Attributes:
        timestamp: where, in seconds; after the last frame where nothing more is known.
        message: what and why.
    """

    timestamp: float
    message: str


# -------------------------------------------------------------------- pictures


def is_image(value: Any) -> bool:
    """Whether something can stand for one picture, by its type and shape alone."""
    if isinstance(value, (str, os.PathLike, bytes)):
        return True
    return is_valid_image(value) and (not hasattr(value, "shape") or (value.ndim in (2, 3) and 0 not in value.shape))


def images_of(given: Any) -> list[Any]:
    """One picture, several or none (None), as a list."""
    if given is None:
        return []
    return [given] if is_image(given) else several(given)


def several(given: Any) -> list[Any]:
    """The elements of what can hold several pictures or videos; anything else is one thing, if a wrong one."""
    is_one = isinstance(given, (Mapping, IOBase, bytearray, memoryview)) or not isinstance(given, Iterable)
    return [given] if is_one else list(given)


def rgb_image(picture: Any, policy: MediaPolicy = DEFAULT_POLICY, layout: str | None = None) -> Image.Image:
    """A picture of any form as an RGB image.

    Args:
        picture: a PIL image; the path of a file, or its URL (file:///...); a URL; a data URL or base64; the bytes of a
            file; or an array or tensor, (height, width) in grey, (height, width, channels) or (channels, height,
            width), on any device. One channel is grey, two are grey with opacity, three RGB, four RGB with opacity.
            What values mean is said by their type: floating ones go from 0 to 1, integers from 0 to 255, booleans are
            black and white. Of 16-bit values nothing says the range (depth, scans), so they are refused; so is a PIL
            image with more than 8 bits per channel. A PIL image is turned by the EXIF data that it has;
            `PIL.ImageOps.exif_transpose` takes them away.
        policy: what may be read, and how large it may be.
        layout: "channels_first" or "channels_last", for arrays; None finds it out.

    Returns:
        An image of its own, never `picture` itself.

    Raises:
        ValueError: if it can't be read, isn't whole, or is no picture; it names the picture.
    """
    try:
        if isinstance(picture, (str, os.PathLike, bytes)):
            with _contents(picture, policy) as file:
                return _flat(_opened(file), policy)
        return _flat(picture if isinstance(picture, Image.Image) else _from_array(picture, policy, layout), policy)
    except Exception as error:  # as many kinds as there are sources: network, files, decoders
        raise ValueError(f"The image {called(picture)} can't be used: {reason_of(error)}.") from error


def image_size(picture: Any, policy: MediaPolicy = DEFAULT_POLICY, layout: str | None = None) -> tuple[int, int]:
    """Width and height of what `rgb_image` would give, not yet turned upright; nothing is decoded for them.

    Raises:
        ValueError: as `rgb_image`, but for what decoding finds.
    """
    try:
        if isinstance(picture, (str, os.PathLike, bytes)):
            with _contents(picture, policy) as file:
                return _checked(_opened(file), policy).size
        if isinstance(picture, Image.Image):
            return _checked(picture, policy).size
        height, width, _ = _channels_last(_pixels(picture), layout).shape
        policy.check_size(width, height)
        return width, height
    except Exception as error:
        raise ValueError(f"The image {called(picture)} can't be used: {reason_of(error)}.") from error


def _checked(image: Image.Image, policy: MediaPolicy) -> Image.Image:
    """The image as it is, or what is wrong with it; nothing is decoded."""
    policy.check_size(*image.size)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise ValueError(
            f"it has pixels of the mode {image.mode!r}, of more than 8 bits, whose range nothing says; scale them to "
            "0 to 255, and make 8-bit pixels of them"
        )
    if not image.width or not image.height:
        raise ValueError(f"it has {image.width} x {image.height} pixels")
    return image


def _flat(image: Image.Image, policy: MediaPolicy) -> Image.Image:
    """The image upright, without opacity, in RGB."""
    _checked(image, policy)
    image.load()  # or what is wrong with it, once: what reads EXIF data loads too, and then it counts as loaded
    turn = _TURNS.get(_orientation(image))
    if turn is not None:  # without `ImageOps.exif_transpose`, which fails if other EXIF data are damaged
        image = image.transpose(turn)
    flat = _on_white(image) if image.has_transparency_data else image.convert("RGB")
    flat.info.clear()  # which says how the file was to be turned
    return flat


def _on_white(image: Image.Image) -> Image.Image:
    straight = {"La": "LA", "RGBa": "RGBA"}
    if image.mode in straight:  # the only conversion that these have
        image = image.convert(straight[image.mode])
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _orientation(image: Image.Image) -> Any:
    """What the EXIF data of an image says about its orientation; 1, upright, where they say nothing."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged data about a picture that may be whole
        return 1


def _opened(file: BinaryIO) -> Image.Image:
    """As `PIL.Image.open`, whose limit of pixels is one for the whole process, and a mere warning at first."""
    Image.init()
    prefix = file.read(16)
    for name in Image.ID:
        factory, accept = Image.OPEN[name]
        try:
            accepted = accept is None or accept(prefix)
            if name in UNREAD_FORMATS or not accepted or isinstance(accepted, str):
                continue
            file.seek(0)
            return factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error):  # another format
            continue
    raise UnidentifiedImageError("it is in no format that is known, such as JPEG, PNG or WebP, or damaged")


def _contents(picture: str | os.PathLike[str] | bytes, policy: MediaPolicy) -> BinaryIO:
    """The file that a picture is in."""
    found = _found(picture, policy)
    return BytesIO(found) if isinstance(found, bytes) else open(found, "rb")


def _found(given: str | os.PathLike[str] | bytes, policy: MediaPolicy) -> bytes | str:
    """The contents of the file of a picture or video, or the path of one that is here."""
    if isinstance(given, bytes):
        return given
    path = os.fspath(given)
    if isinstance(given, str):
        if given.startswith(_URL_SCHEMES):
            return fetch(given, policy)
        if given.startswith("data:"):
            return _from_data_url(given)
        if given.startswith("file:///"):
            path = unquote(given.removeprefix("file://"))
    # In this order: a file may have a name that could be base64. What may not be read isn't looked for either.
    if policy.local_files and os.path.isfile(path):
        return path
    if isinstance(given, str) and _BASE64.fullmatch(given):
        return base64.b64decode(given)
    if not policy.local_files:
        raise ValueError("paths aren't read (MediaPolicy.local_files=False); give contents: base64, bytes or an image")
    raise ValueError("there is no such file, and it is no http:// or https:// URL and no base64")


def _from_data_url(url: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma:
        raise ValueError("a data URL must have a comma before its data")
    contents = unquote_to_bytes(data)
    if not head.endswith(";base64"):
        return contents
    try:
        return base64.b64decode(contents)
    except binascii.Error as error:
        raise ValueError(f"its base64 is damaged ({error})") from error


def _from_array(array: Any, policy: MediaPolicy, layout: str | None) -> Image.Image:
    """The PIL image of an array or tensor."""
    pixels = _channels_last(_pixels(array), layout)
    policy.check_size(pixels.shape[1], pixels.shape[0])
    levels = np.ascontiguousarray(_levels(pixels))
    return Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)


def _pixels(array: Any) -> np.ndarray:
    """An array or tensor as an array; of types that NumPy doesn't know, as float32."""
    if not is_image(array):
        shape = getattr(array, "shape", None)
        given = f"a {type(array).__name__}" + (f" of shape {tuple(shape)}" if shape is not None else "")
        raise ValueError(
            f"a picture must be a PIL image, an array of two or three dimensions, a path, a URL, base64 or bytes; got "
            f"{given}"
        )
    if isinstance(array, torch.Tensor):
        array = (array.detach().float() if array.is_floating_point() else array.detach()).cpu()
    return np.asarray(array)


def _channels_last(pixels: np.ndarray, layout: str | ChannelDimension | None) -> np.ndarray:
    """The pixels as (height, width, channels)."""
    if pixels.ndim == 2:
        return pixels[..., None]
    sides = pixels.shape[0], pixels.shape[-1]
    if layout is None and {1, 3}.intersection(sides):
        layout = infer_channel_dimension_format(pixels)
    elif layout is None and sides[0] in (2, 4) and sides[1] not in (2, 4):
        layout = ChannelDimension.FIRST
    first = layout is not None and ChannelDimension(layout) == ChannelDimension.FIRST
    pixels = pixels.transpose(1, 2, 0) if first else pixels
    if not 1 <= pixels.shape[-1] <= 4:
        raise ValueError(
            f"it must have 1 to 4 channels in the first or the last dimension; its shape is {pixels.shape}"
        )
    return pixels


def _levels(pixels: np.ndarray) -> np.ndarray:
    """Pixels as bytes; of floating values from 0 to 1, the nearest of 0 to 255."""
    kind, levels = pixels.dtype.kind, pixels
    if pixels.dtype == np.uint8:
        return pixels
    if kind == "b":
        return pixels.astype(np.uint8) * np.uint8(255)
    expected = "a picture must have integers from 0 to 255, floating values from 0 to 1, or booleans"
    if pixels.dtype == np.uint16 or kind not in "iuf":
        raise ValueError(f"{expected}; got {pixels.dtype}, whose range nothing says: scale it, and make uint8 of it")
    if kind == "f":
        with np.errstate(over="ignore", invalid="ignore"):
            levels = np.rint(pixels * np.float32(255))
    if not 0 <= levels.min() <= levels.max() <= 255:  # nor where they aren't finite
        found = f"{pixels.dtype} from {pixels.min():g} to {pixels.max():g}"
        raise ValueError(f"{expected}; got {found}: scale it, or make uint8 of it")
    return levels.astype(np.uint8)


# -------------------------------------------------------------------- fetching


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = 5


def fetch(url: str, policy: MediaPolicy = DEFAULT_POLICY) -> bytes:
    """What a server sends for a URL.

    Args:
        url: begins with http:// or https://, and so must all to which it redirects.
        policy: whether anything is fetched, how long that may take and how much it may be.

    Raises:
        ValueError: if it isn't allowed, the server can't be reached or doesn't answer in time, it answers with another
            status than success, or there is too much.
    """
    if not policy.network:
        raise ValueError("URLs aren't fetched (MediaPolicy.network=False); give contents: base64, bytes or an image")
    # In a thread, since neither looking up a name nor a server that sends its headers byte by byte has a time-out.
    outcome: SimpleQueue[bytes | Exception] = SimpleQueue()

    def run() -> None:
        try:
            outcome.put(_fetched(url, policy))
        except Exception as error:
            outcome.put(error)

    Thread(target=run, name="casa-fetch", daemon=True).start()
    try:
        contents = outcome.get(timeout=policy.timeout)
    except Empty:
        raise ValueError(_late(policy)) from None
    if isinstance(contents, Exception):
        raise contents
    return contents


def _fetched(url: str, policy: MediaPolicy) -> bytes:
    """As `fetch`, which waits for it."""
    until = time.monotonic() + policy.timeout
    opener = urllib.request.OpenerDirector()
    for handler in (  # without those of FTP, files and data
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    try:
        # What a browser would send for spaces and letters of other languages.
        address, authorization = _without_user(url)
        request = urllib.request.Request(
            quote(address, safe="!#$%&'()*+,/:;=?@[]~"), headers={"User-Agent": _USER_AGENT}
        )
        if authorization:
            request.add_unredirected_header("Authorization", authorization)
        with opener.open(request, timeout=policy.timeout) as response:
            return _received(response, policy, until)
    except urllib.error.HTTPError as error:
        reason = error.reason.split("\n")[0] if isinstance(error.reason, str) else error.reason
        error.close()
        raise ValueError(f"the server answers with status {error.code} ({reason})") from error
    except TimeoutError as error:
        raise ValueError(_late(policy)) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise ValueError(_late(policy)) from error
        raise ValueError(f"it can't be fetched: {reason_of(error.reason)}") from error
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"it can't be fetched: {reason_of(error)}") from error


def _received(response: Any, policy: MediaPolicy, until: float) -> bytes:
    stated = response.headers.get("Content-Length") or ""
    length = int(stated) if stated.isdigit() else None
    if length is not None and length > policy.max_bytes:
        raise ValueError(f"it has {length} bytes, more than max_bytes={policy.max_bytes} of the MediaPolicy")
    contents = bytearray()
    while chunk := response.read1(_CHUNK_BYTES):
        contents += chunk
        if len(contents) > policy.max_bytes:
            raise ValueError(f"it has more than max_bytes={policy.max_bytes} of the MediaPolicy")
        if time.monotonic() > until:
            raise ValueError(_late(policy))
    if length is not None and len(contents) < length:
        raise ValueError(f"the connection ended after {len(contents)} of {length} bytes")
    return bytes(contents)


def _without_user(url: str) -> tuple[str, str]:
    """A URL without user and password, and the header that has them; empty if there are none."""
    found = re.match(r"(https?://)([^/?#]*)@", url)
    if found is None:
        return url, ""
    return found[1] + url[found.end() :], f"Basic {base64.b64encode(unquote_to_bytes(found[2])).decode()}"


def _late(policy: MediaPolicy) -> str:
    return f"it wasn't there within {policy.timeout:g} s (timeout of the MediaPolicy)"


def shown_url(url: str) -> str:
    """A source as messages and pages name it: a URL without user and password, and without its query."""
    return re.sub(r"^([\w+.-]+://)(?:[^/?#]*@)?([^?]*).*", r"\1\2", url, flags=re.DOTALL)


def called(picture: Any) -> str:
    """What messages call a picture or a video; a size is its own."""
    if isinstance(picture, tuple) and len(picture) == 2:
        return f"of {picture[0]} x {picture[1]} pixels"
    if isinstance(picture, bytes):
        return f"of {len(picture)} bytes"
    if isinstance(picture, (str, os.PathLike)):
        return repr(_short(shown_url(str(picture))))
    file = getattr(picture, "filename", None)  # of a PIL image
    if isinstance(file, (str, os.PathLike)) and str(file):
        return repr(_short(str(file)))
    if isinstance(picture, Image.Image):
        return called(picture.size)
    shape = getattr(picture, "shape", None)
    return f"({type(picture).__name__}" + (f" of shape {tuple(shape)})" if shape is not None else ")")


def _short(words: str, limit: int = _MAX_NAME) -> str:
    words = " ".join(words.split())
    return words if len(words) <= limit else words[: limit - 3] + "..."


def reason_of(error: Any) -> str:
    """What an error says, without the name of the file or URL that those of FFmpeg and of files end with."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return _short(words, _MAX_REASON).rstrip(".")


# -------------------------------------------------------------------- clips


def check_sampling(fps: float | None, num_frames: int | None, sample: bool = True) -> None:
    """Check the sampling options of a video, which `load_frames` describes.

    Raises:
        ValueError: if options exclude each other, or `fps` or `num_frames` isn't a positive number.
    """
    given = {name: value for name, value in (("fps", fps), ("num_frames", num_frames)) if value is not None}
    for name, value in given.items():
        if not isinstance(value, int if name == "num_frames" else (int, float)) or value <= 0:
            raise ValueError(f"{name}={value!r} must be a positive {'integer' if name == 'num_frames' else 'number'}.")
    if len(given) > 1:
        raise ValueError(f"fps={fps} and num_frames={num_frames} exclude each other; give one of them.")
    if given and not sample:
        raise ValueError(f"do_sample_frames=False takes every frame of a video; leave out {next(iter(given))}.")


def load_frames(
    video: Any,
    *,
    fps: float | None = None,
    num_frames: int | None = None,
    sample: bool = True,
    policy: MediaPolicy = DEFAULT_POLICY,
) -> list[Any]:
    """The frames of a video that go into the prompt.

    Args:
        video: path or URL of a video file, or its contents as base64, a data URL or bytes; or the decoded frames, as
            an array or tensor (frames, height, width, channels) or (frames, channels, height, width), or as a list of
            pictures of any form.
        fps: frames per second of the clip; only for files, since decoded frames don't tell their rate.
        num_frames: frames in all, at even spacing.
        sample: False takes every frame; then the others must be None.
        policy: what may be read, and how large it may be.

    Without `fps` and `num_frames`, a file of 10 seconds or more gives 2 frames per second, a shorter one 20 frames at
    even spacing (all of them if it has fewer), as in training; of decoded frames all are taken.

    Returns:
        The frames in order of time: PIL images for files, the elements of `video` otherwise. Where a part of a file
        can't be decoded, a `VideoWarning` says so, and a moment has the frame that is on screen then, none twice.

    Raises:
        ValueError: if the file can't be read or none of its frames can be decoded, there are fewer than `num_frames`
            frames, `fps` is given for decoded frames, or options exclude each other.
        ImportError: for files, without PyAV.
    """
    check_sampling(fps, num_frames, sample)
    if isinstance(video, (str, os.PathLike, bytes)):
        return _read_file(video, fps, num_frames, sample, policy)
    return _choose(list(video), fps, num_frames)


def measure_frames(
    video: Any,
    *,
    fps: float | None = None,
    num_frames: int | None = None,
    sample: bool = True,
    policy: MediaPolicy = DEFAULT_POLICY,
) -> list[Any]:
    """What `load_frames` would give, without decoding anything.

    Args:
        video, fps, num_frames, sample, policy: as for `load_frames`.

    Returns:
        For files, the (width, height) of each frame, in square pixels and not yet turned upright; the elements of
        `video` otherwise. Damaged pictures count like others.

    Raises:
        ValueError, ImportError: as `load_frames`, but for frames that can't be decoded.
    """
    check_sampling(fps, num_frames, sample)
    if isinstance(video, (str, os.PathLike, bytes)):
        clip = _scan_file(video, fps, num_frames, sample, policy)
        if 0 in clip.size:  # a container that doesn't state it
            return _read_file(video, fps, num_frames, sample, policy)
        return [clip.size] * len(clip.moments)
    return _choose(list(video), fps, num_frames)


def _choose(frames: list[Any], fps: float | None, num_frames: int | None) -> list[Any]:
    """Decoded frames that go into the prompt."""
    if fps is not None:
        raise ValueError(
            f"fps={fps} can't be applied to a video of {len(frames)} decoded frames, whose rate isn't known. Give "
            "num_frames, or the path of the file."
        )
    if num_frames is None:
        return frames
    return [frames[index] for index in _evenly_spaced(len(frames), num_frames)]


def sample_indices(
    times: list[float], duration: float, *, fps: float | None = None, num_frames: int | None = None
) -> list[int]:
    """Which frames of a clip to take.

    Args:
        times: when each frame appears, in seconds from the first one, ascending.
        duration: of the clip, in seconds.
        fps: frames per second: what is on screen at 0, 1/fps, 2/fps, ... is taken.
        num_frames: frames in all, at even spacing.

    Returns:
        Ascending indices into `times`, none of them twice.

    Raises:
        ValueError: if `num_frames` is more than there are.
    """
    if fps is None and num_frames is None and duration < SHORT_CLIP_SECONDS:
        num_frames = min(SHORT_CLIP_FRAMES, len(times))
    if num_frames is not None:
        return _evenly_spaced(len(times), num_frames)
    fps = DEFAULT_FPS if fps is None else fps
    moments = [step / fps for step in range(max(1, int((duration + _TOLERANCE_SECONDS) * fps)))]
    return sorted({bisect_right(times, moment + _TOLERANCE_SECONDS) - 1 for moment in moments})


def _evenly_spaced(available: int, num_frames: int) -> list[int]:
    if num_frames > available:
        raise ValueError(f"num_frames={num_frames} is more than the {available} frames that the video has")
    return [index * available // num_frames for index in range(num_frames)]


@dataclass(frozen=True)
class _Clip:
    """What the packets of a file say.

    Attributes:
        media: what PyAV opens.
        options: for FFmpeg.
        moments: when the chosen frames appear, in seconds from the first one, ascending.
        origin: the first stamp, in ticks of the stream; None if its packets have none.
        period: seconds from frame to frame, for frames without a time.
        size: width and height of a frame in square pixels, not turned upright.
        missing: what to say of an end that is missing; empty if none is.
    """

    media: str | BytesIO
    options: dict[str, str]
    moments: list[float]
    origin: int | None
    period: float
    size: tuple[int, int]
    missing: str


def _pyav(name: str) -> Any:
    # Code that a checkpoint carries is refused by Transformers for imports outside `try` that aren't installed.
    try:
        import av
    except ImportError as error:
        raise ImportError(f"Reading the video {name} needs PyAV: pip install casa_hf[video]") from error
    return av


def _read_file(
    source: str | os.PathLike[str] | bytes,
    fps: float | None,
    num_frames: int | None,
    sample: bool,
    policy: MediaPolicy,
) -> list[Any]:
    clip = _scan_file(source, fps, num_frames, sample, policy)
    av = _pyav(called(source))
    try:
        # Threads that each decode a frame are faster, but lose good ones beside one that is damaged, even silently.
        for threads in ("AUTO", "SLICE"):
            if isinstance(clip.media, BytesIO):
                clip.media.seek(0)
            with av.open(clip.media, options=clip.options) as container:
                container.streams.video[0].thread_type = threads
                frames, problems = _decode(container, clip, policy)
            if not problems and len(frames) == len(clip.moments):
                break
        if not frames:
            raise ValueError("none of its frames can be decoded")
    except (OSError, ValueError, av.error.FFmpegError) as error:
        raise ValueError(f"The video {called(source)} can't be used: {reason_of(error)}.") from error
    messages = [problem.message for problem in problems] + ([clip.missing] if clip.missing else [])
    if messages:
        others = f" (and {len(messages) - 1} more)" if len(messages) > 1 else ""
        warnings.warn(f"The video {called(source)}: {messages[0]}{others}", VideoWarning, stacklevel=2)
    return frames


def _scan_file(
    source: str | os.PathLike[str] | bytes,
    fps: float | None,
    num_frames: int | None,
    sample: bool,
    policy: MediaPolicy,
) -> _Clip:
    """Which frames of a file to take, from its packets alone."""
    av = _pyav(called(source))
    try:
        media, options = _media(source, policy)
        with av.open(media, options=options) as container:
            stream = video_stream(container)
            packets, broken = _packets(container)
            times, duration, origin = _frame_times(stream, packets)
            period = 1 / float(stream.average_rate or _RAW_STREAM_FPS)
            stated = float(stream.duration * stream.time_base) if stream.duration else 0.0
            size = square_size(stream.codec_context.width, stream.codec_context.height, pixel_aspect(stream))
        policy.check_size(*size)
        chosen = range(len(times)) if not sample else sample_indices(times, duration, fps=fps, num_frames=num_frames)
        moments = [times[index] for index in chosen]
        missing = broken or missing_end(stated, duration, period)
        return _Clip(media, options, moments, origin, period, size, missing)
    except (OSError, ValueError, av.error.FFmpegError) as error:
        raise ValueError(f"The video {called(source)} can't be used: {reason_of(error)}.") from error


def _media(source: str | os.PathLike[str] | bytes, policy: MediaPolicy) -> tuple[str | BytesIO, dict[str, str]]:
    """What PyAV opens, and its options."""
    found = _found(source, policy)
    if isinstance(found, bytes):
        return BytesIO(found), _ALONE
    # What stands before a colon in a relative name, such as that of a time, FFmpeg would take for a protocol.
    return os.path.abspath(found), _LOCAL


def _packets(container: Any) -> tuple[list[tuple[int | None, int]], str]:
    """Stamps and durations of the packets of the first video stream, in ticks, and why there are no more of them.

    That is empty at the end of the file.
    """
    av = _pyav("")
    packets: list[tuple[int | None, int]] = []  # without what is coded in them, which may take gigabytes
    broken = ""
    try:
        for packet in container.demux(container.streams.video[0]):
            if packet.size and not packet.is_discard:
                packets.append((packet.pts, packet.duration or 0))
    except (OSError, av.error.FFmpegError) as error:
        broken = _ended_early(error)
    if not packets:
        raise ValueError("it has no frames")
    return packets, broken


def _ended_early(error: Exception) -> str:
    return f"reading ended early: {reason_of(error)}"


def _frame_times(stream: Any, packets: list[tuple[int | None, int]]) -> tuple[list[float], float, int | None]:
    """When each frame of a stream appears, how long the clip is, in seconds, and the first stamp."""
    stamps = sorted(stamp for stamp, _ in packets if stamp is not None)
    if len(stamps) < len(packets):  # raw streams carry no times
        period = 1 / (stream.average_rate or _RAW_STREAM_FPS)
        return [float(index * period) for index in range(len(packets))], float(len(packets) * period), None
    times = [float((stamp - stamps[0]) * stream.time_base) for stamp in stamps]
    _, length = max((stamp, length) for stamp, length in packets if stamp is not None)
    return times, times[-1] + float(length * stream.time_base), stamps[0]


def _decode(container: Any, clip: _Clip, policy: MediaPolicy) -> tuple[list[Image.Image], list[VideoProblem]]:
    """The frames that are on screen at the moments of a clip, none twice, and what couldn't be decoded."""
    aspect = pixel_aspect(container.streams.video[0])
    pending = list(reversed(clip.moments))
    taken: list[Image.Image] = []
    problems: list[VideoProblem] = []
    shown = None  # the frame on screen, unless it is taken
    origin, count = clip.origin, 0
    for frame in decoded(container):
        if isinstance(frame, VideoProblem):
            problems.append(frame)
            continue
        if frame.pts is None:
            moment = count * clip.period
        else:
            origin = frame.pts if origin is None else origin
            moment = float((frame.pts - origin) * frame.time_base)
        count += 1
        while pending and moment > pending[-1] + _TOLERANCE_SECONDS:
            pending.pop()
            if shown is not None:
                taken.append(frame_image(shown, aspect, policy))
                shown = None
        shown = frame
        if pending and moment >= pending[-1] - _TOLERANCE_SECONDS:
            pending.pop()
            taken.append(frame_image(frame, aspect, policy))
            shown = None
        if not pending:
            break
    return taken, problems


# -------------------------------------------------------------------- what every reader of videos does


def video_stream(container: Any) -> Any:
    """The first video stream of a container.

    Raises:
        ValueError: if there is none, or there is no decoder for it.
    """
    if not container.streams.video:
        raise ValueError("it has no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise ValueError("its pictures are coded in a way that isn't known")
    return stream


def decoded(container: Any) -> Iterator[Any]:
    """Frames of the first video stream of a container; a run of packets that can't be decoded is one problem.

    The times of problems are the container's, or NaN where that says nothing.
    """
    av = _pyav("")
    stream = container.streams.video[0]
    broken = False
    silent = 0.0
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
            silent = 0.0
        except StopIteration:
            return
        except BlockingIOError:  # a device that has nothing yet
            if silent > _SILENCE_SECONDS:
                yield VideoProblem(math.nan, f"nothing came for {_SILENCE_SECONDS:g} s")
                return
            time.sleep(_BUSY_SECONDS)
            silent += _BUSY_SECONDS
            packets = container.demux(stream)
            continue
        except (OSError, av.error.FFmpegError) as error:
            yield from chain(_flushed(stream), [VideoProblem(math.nan, _ended_early(error))])
            return
        try:
            frames = packet.decode()
        except (OSError, ValueError, av.error.FFmpegError) as error:
            if not broken:
                stamp = packet.dts if packet.pts is None else packet.pts
                place = math.nan if stamp is None else float(stamp * packet.time_base)
                yield VideoProblem(place, f"a part can't be decoded: {reason_of(error)}")
            broken = True
            continue
        broken = broken and not frames
        yield from frames


def _flushed(stream: Any) -> Iterable[Any]:
    """The frames that the decoder still holds."""
    av = _pyav("")
    try:
        frames = stream.decode(None)
    except (OSError, av.error.FFmpegError):
        return []
    for frame in frames:
        frame.time_base = stream.time_base  # which they have from the packet that they come of, and here is none
    return frames


def missing_end(stated: float, end: float, period: float) -> str:
    """What to say of a video that ends before its header says, in seconds; empty if it doesn't."""
    if stated - end <= max(_MISSING_SECONDS, 2 * period):
        return ""
    return f"the video ends after {end:.3f} s of the {stated:.3f} s that its header states; the end is missing"


def pixel_aspect(stream: Any) -> float:
    """How wide the pixels of a video stream are, in their heights; 1.0 where it doesn't say."""
    return float(stream.sample_aspect_ratio or 0) or 1.0


def square_size(width: int, height: int, aspect: float) -> tuple[int, int]:
    """The size in square pixels of a frame of pixels with this aspect; its height stays, as in players."""
    return (max(1, round(width * aspect)) if width else 0), height


def frame_image(frame: Any, aspect: float = 1.0, policy: MediaPolicy = DEFAULT_POLICY) -> Image.Image:
    """A decoded frame as it is to be seen: on white, with square pixels, turned and mirrored by its display matrix.

    Args:
        frame: of PyAV.
        aspect: of its pixels, see `pixel_aspect`.
        policy: how large it may be.

    Raises:
        ValueError: if it is larger.
    """
    size = square_size(frame.width, frame.height, aspect)
    policy.check_size(frame.width, frame.height)
    policy.check_size(*size)
    if any(component.is_alpha for component in frame.format.components):
        image = _on_white(Image.fromarray(frame.to_ndarray(format="rgba")))
    else:
        image = frame.to_image()
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    matrix = next((bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return image
    # A point (x, y) is to be seen at (a x + c y, b x + d y).
    a, b, _, c, d, *_ = struct.unpack("=9i", matrix)
    if abs(b) > abs(a):
        image = image.transpose(Image.Transpose.TRANSPOSE)
        a, d = c, b
    if a < 0:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if d < 0 else image


__all__ = ["MediaPolicy", "VideoProblem", "VideoWarning", "load_frames", "measure_frames", "rgb_image"]
