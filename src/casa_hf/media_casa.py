# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""How images come in, and what may come in: `rgb_image` and `MediaPolicy`.

Whatever an image is given as, it becomes the same RGB image of 8 bits per channel: upright as its EXIF data says, on
white where it isn't opaque, with values that mean what their type says. Anything else is refused by name.

URLs are fetched with the standard library: which HTTP client Transformers brings depends on its version.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import os
import re
import struct
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO, IOBase
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, BinaryIO
from urllib.parse import quote, unquote, unquote_to_bytes

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format, is_valid_image

from .checks import check_count, check_positive

_URL_SCHEMES = ("http://", "https://")
# Forms that may hold an image or a video.
_FILES = (str, os.PathLike, bytes)
_CHUNK_BYTES = 1 << 16
# Some servers refuse a client that doesn't name itself.
_USER_AGENT = "casa_hf (https://pypi.org/project/casa_hf/)"
# The smallest images take some 40 bytes.
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{48,}={0,2}\s*")
_SMALLER = "Use a smaller file, or raise max_bytes"
_MAX_NAME = 200
_MAX_REASON = 400
# What turns an image upright, by the orientation in its EXIF data.
_UPRIGHT = {
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
# How MP4 and QuickTime (but not HEIF and AVIF), Matroska and WebM, AVI, MPEG and Flash videos begin.
_VIDEO = re.compile(
    rb"....ftyp(?!avi|hei|hev|mif|msf)|\x1aE\xdf\xa3|RIFF....AVI |\x00\x00\x01[\xb3\xba]|FLV\x01", re.DOTALL
)


@dataclass(frozen=True)
class MediaPolicy:
    """Where images and videos may come from, and how large they may be.

    The defaults are those of Transformers' processors, which fetch any URL and read any path in a prompt. A server
    that takes prompts from others gives `network=False, local_files=False`: then only the contents of images and
    videos are accepted (base64, bytes, PIL images, arrays).

    Attributes:
        network: whether `http://` and `https://` URLs are fetched.
        local_files: whether paths are read.
        timeout: seconds that a fetch may take as a whole.
        max_bytes: largest number of bytes that are fetched.
        max_decoded_pixels: largest number of pixels (width x height) of an image or a frame. It is checked before
            anything is decoded: a file of 20 kB can hold an image that takes gigabytes.

    Raises:
        ValueError: if a number isn't positive, or a switch isn't True or False.
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
        """The policy for a policy, a mapping of its attributes, or None (the defaults).

        Raises:
            ValueError: for anything else, or unknown attributes.
        """
        if isinstance(given, Mapping):
            try:
                return cls(**given)
            except TypeError as error:
                raise ValueError(
                    f"media_policy={dict(given)!r} has an unknown field ({error}); the fields of MediaPolicy are "
                    f"{', '.join(cls.__dataclass_fields__)}."
                ) from error
        if given is None:
            return cls()
        if not all(hasattr(given, name) for name in cls.__dataclass_fields__):
            raise ValueError(f"media_policy={given!r} must be a MediaPolicy, or a dictionary of its fields.")
        return given

    def check_size(self, width: int, height: int) -> None:
        """Refuse what has more pixels than allowed.

        Raises:
            ValueError: with the size, the limit and what to do.
        """
        if width * height > self.max_decoded_pixels:
            raise ValueError(
                f"it has {width} x {height} pixels, more than max_decoded_pixels={self.max_decoded_pixels}; make it "
                "smaller, or give a MediaPolicy with a higher limit"
            )


DEFAULT_POLICY = MediaPolicy()


# -------------------------------------------------------------------- images


def is_image(value: Any) -> bool:
    """Whether a value can stand for one image, by its type and shape alone."""
    if isinstance(value, _FILES):
        return True
    return is_valid_image(value) and (not hasattr(value, "shape") or (value.ndim in (2, 3) and 0 not in value.shape))


def images_of(given: Any) -> list[Any]:
    """One image, several or none (None), as a list."""
    if given is None:
        return []
    return [given] if is_image(given) else elements_of(given)


def is_video(value: Any) -> bool:
    """Whether a value can stand for one video, by its type and shape alone; a list of files is several."""
    if isinstance(value, _FILES):
        return True
    if isinstance(value, (list, tuple)):
        return bool(value) and all(is_image(frame) and not isinstance(frame, _FILES) for frame in value)
    return is_valid_image(value) and hasattr(value, "shape") and value.ndim == 4 and 0 not in value.shape


def is_video_or_files(value: Any) -> bool:
    """As `is_video` for an element of a list of videos, in which a list of files is one video: its frames."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(is_image(frame) for frame in value)
    return is_video(value)


def videos_of(given: Any) -> list[Any]:
    """One video, several or none (None), as a list.

    Raises:
        ValueError: for what isn't a video.
    """
    if given is None:
        return []
    videos = [given] if is_video(given) else elements_of(given)
    for video in videos:
        if not is_video_or_files(video):
            raise ValueError(
                f"The video {name_of(video)} can't be used; expected a path, a URL, base64, bytes, an array of frames "
                "with four dimensions, or a list of images. Pass one of these, or a list of them."
            )
    return videos


def elements_of(given: Any) -> list[Any]:
    """The elements of what can hold several images or videos; anything else is one element."""
    is_one = isinstance(given, (Mapping, IOBase, bytearray, memoryview)) or not isinstance(given, Iterable)
    return [given] if is_one else list(given)


def rgb_image(image: Any, policy: MediaPolicy = DEFAULT_POLICY, layout: str | None = None) -> Image.Image:
    """An image of any form as an RGB image.

    Args:
        image: a PIL image; the path of a file, or its URL (file:///...); a URL; a data URL or base64; the bytes of a
            file; or an array or tensor, (height, width) in grey, (height, width, channels) or (channels, height,
            width), on any device. One channel is grey, two are grey with opacity, three RGB, four RGB with opacity.
            The type says what values mean: floating-point values go from 0 to 1, integers from 0 to 255, booleans are
            black and white. 16-bit values (depth, scans) have no known range and are refused, and so is a PIL image
            with more than 8 bits per channel. A PIL image is turned by the EXIF data that it has;
            `PIL.ImageOps.exif_transpose` removes them.
        policy: limits of what may be read, and of its size.
        layout: "channels_first" or "channels_last", for arrays; None infers it from the shape.

    Returns:
        A new image, never `image` itself.

    Raises:
        ValueError: if it can't be read, is incomplete, or isn't an image; the message names the image.
    """
    try:
        if isinstance(image, (str, os.PathLike, bytes)):
            with _opened_contents(image, policy) as file:
                return _flat(_opened_image(file), policy)
        return _flat(image if isinstance(image, Image.Image) else _from_array(image, policy, layout), policy)
    except Exception as error:  # of many kinds: network, files, decoders
        raise _unusable(image, error) from error


def rgb_pixels(image: Any, policy: MediaPolicy = DEFAULT_POLICY, layout: str | None = None) -> np.ndarray:
    """The pixels of the image that `rgb_image` would make.

    Args:
        image, policy, layout: arguments of `rgb_image`.

    Returns:
        (height, width, 3) of dtype uint8. An array or tensor of such pixels is returned as it is, without a copy.

    Raises:
        ValueError: as `rgb_image`.
    """
    if hasattr(image, "shape"):
        try:
            pixels = _levels_of_array(image, policy, layout)
        except Exception as error:
            raise _unusable(image, error) from error
        if pixels.shape[-1] == 3:
            return pixels
    return np.array(rgb_image(image, policy, layout))


def image_size(image: Any, policy: MediaPolicy = DEFAULT_POLICY, layout: str | None = None) -> tuple[int, int]:
    """Width and height of what `rgb_image` would give, not yet turned upright; nothing is decoded for them.

    Args:
        image, policy, layout: arguments of `rgb_image`.

    Raises:
        ValueError: as `rgb_image`, but for what decoding finds.
    """
    try:
        if isinstance(image, (str, os.PathLike, bytes)):
            with _opened_contents(image, policy) as file:
                return _checked(_opened_image(file), policy).size
        if isinstance(image, Image.Image):
            return _checked(image, policy).size
        height, width, _ = _channels_last(_as_numpy(image), layout).shape
        policy.check_size(width, height)
        return width, height
    except Exception as error:
        raise _unusable(image, error) from error


def on_white(image: Image.Image) -> Image.Image:
    """The image in RGB, laid on white where it isn't opaque."""
    straight = {"La": "LA", "RGBa": "RGBA"}
    if image.mode in straight:  # the only conversion that these have
        image = image.convert(straight[image.mode])
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _unusable(image: Any, error: Exception) -> ValueError:
    return ValueError(f"The image {name_of(image)} can't be used: {reason_of(error)}.")


def _checked(image: Image.Image, policy: MediaPolicy) -> Image.Image:
    """The image itself, unless its header says that it can't be used; nothing is decoded."""
    policy.check_size(*image.size)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise ValueError(
            f"its mode is {image.mode!r}, with more than 8 bits per channel and no known range; scale its values to 0 "
            "to 255, and convert it to 8 bits"
        )
    if not image.width or not image.height:
        raise ValueError(f"it has {image.width} x {image.height} pixels")
    return image


def _flat(image: Image.Image, policy: MediaPolicy) -> Image.Image:
    """The image upright, without opacity, in RGB."""
    _checked(image, policy)
    try:
        image.load()  # before EXIF data are read, which counts as loading and hides damage
    except OSError as error:
        if "truncated" not in str(error).lower():
            raise
        raise ValueError("its file is truncated, so that the image is incomplete. Get it again") from error
    transpose = _UPRIGHT.get(_orientation(image))
    if transpose is not None:  # without `ImageOps.exif_transpose`, which fails if other EXIF data are damaged
        image = image.transpose(transpose)
    flat = on_white(image) if image.has_transparency_data else image.convert("RGB")
    flat.info.clear()  # which still tells the old orientation
    return flat


def _orientation(image: Image.Image) -> Any:
    """The orientation in the EXIF data of an image; 1, upright, without any."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged data about an image that may be whole
        return 1


def _opened_image(file: BinaryIO) -> Image.Image:
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
    if not prefix:
        raise ValueError("it has 0 bytes; expected a file such as JPEG or PNG. Get it again")
    if _VIDEO.match(prefix):
        raise ValueError("it is a video; expected an image. Pass it as a video")
    raise UnidentifiedImageError("its format isn't known, or the file is damaged; expected JPEG, PNG or the like")


def _from_array(array: Any, policy: MediaPolicy, layout: str | None) -> Image.Image:
    """The PIL image of an array or tensor."""
    levels = np.ascontiguousarray(_levels_of_array(array, policy, layout))
    return Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)


def _levels_of_array(array: Any, policy: MediaPolicy, layout: str | None) -> np.ndarray:
    """(height, width, channels) of an array or tensor, as bytes."""
    pixels = _channels_last(_as_numpy(array), layout)
    policy.check_size(pixels.shape[1], pixels.shape[0])
    return _levels(pixels)


def _as_numpy(array: Any) -> np.ndarray:
    """An array or tensor in NumPy; of types that NumPy doesn't know, as float32."""
    if not is_image(array):
        shape = getattr(array, "shape", None)
        given = f"a {type(array).__name__}" + (f" of shape {tuple(shape)}" if shape is not None else "")
        raise ValueError(
            f"it is {given}; expected a PIL image, an array with two or three dimensions, a path, a URL, base64 or "
            "bytes"
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
        raise ValueError(f"its shape is {pixels.shape}; expected 1 to 4 channels in the first or the last dimension")
    return pixels


def _levels(pixels: np.ndarray) -> np.ndarray:
    """Pixels as bytes; floating-point values from 0 to 1 become the nearest of 0 to 255."""
    kind, levels = pixels.dtype.kind, pixels
    if pixels.dtype == np.uint8:
        return pixels
    if kind == "b":
        return pixels.astype(np.uint8) * np.uint8(255)
    expected = "expected integers from 0 to 255, floating-point values from 0 to 1, or booleans"
    if pixels.dtype == np.uint16 or kind not in "iuf":
        raise ValueError(f"its values are {pixels.dtype}, which has no known range; {expected}. Scale them to uint8")
    if kind == "f":
        with np.errstate(over="ignore", invalid="ignore"):
            levels = np.rint(pixels * np.float32(255))
    if not 0 <= levels.min() <= levels.max() <= 255:  # also refuses NaN and infinity
        found = f"{pixels.dtype} from {pixels.min():g} to {pixels.max():g}"
        raise ValueError(f"its values are {found}; {expected}. Scale them, or convert them to uint8")
    return levels.astype(np.uint8)


# -------------------------------------------------------------------- files and addresses


def contents_of(given: str | os.PathLike[str] | bytes, policy: MediaPolicy) -> bytes | str:
    """The contents of an image or video, or the path of the local file that has them.

    Args:
        given: a path, a URL, a data URL, base64 or bytes.
        policy: limits of what may be read.

    Raises:
        ValueError: if it isn't allowed or can't be found.
    """
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
    if policy.local_files and os.path.isdir(path):
        raise ValueError("it is a folder; expected a file. Name a file in it")
    if isinstance(given, str) and _BASE64.fullmatch(given):
        return base64.b64decode(given)
    if not policy.local_files:
        raise ValueError(
            "paths aren't read (MediaPolicy.local_files=False); pass the contents: base64, bytes or a PIL image"
        )
    raise ValueError("there is no such file, and it is neither an http:// or https:// URL nor base64")


def _opened_contents(image: str | os.PathLike[str] | bytes, policy: MediaPolicy) -> BinaryIO:
    found = contents_of(image, policy)
    return BytesIO(found) if isinstance(found, bytes) else open(found, "rb")


def _from_data_url(url: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma:
        raise ValueError("it is a data URL without a comma; expected the form data:image/png;base64,...")
    contents = unquote_to_bytes(data)
    if not head.endswith(";base64"):
        return contents
    try:
        return base64.b64decode(contents)
    except binascii.Error as error:
        raise ValueError(f"its base64 is damaged ({error})") from error


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
        raise ValueError(
            "URLs aren't fetched (MediaPolicy.network=False); pass the contents: base64, bytes or a PIL image"
        )
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
    """As `fetch`, in the calling thread."""
    until = time.monotonic() + policy.timeout
    try:
        with _http_opener().open(_request(url), timeout=policy.timeout) as response:
            return _received(response, policy, until)
    except urllib.error.HTTPError as error:
        reason = error.reason.split("\n")[0] if isinstance(error.reason, str) else error.reason
        error.close()
        raise ValueError(f"the server answers with status {error.code} ({reason})") from error
    except (OSError, http.client.HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        late = isinstance(cause, TimeoutError)
        raise ValueError(_late(policy) if late else f"it can't be fetched: {reason_of(cause)}") from error


def _http_opener() -> urllib.request.OpenerDirector:
    """Opens http:// and https:// URLs only, not those of FTP, files and data."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
        _Redirects,
    ):
        opener.add_handler(handler())
    return opener


def _request(url: str) -> urllib.request.Request:
    """The request for a URL as a browser would send it; user and password go to its own server alone."""
    found = re.match(r"(https?://)([^/?#]*)@", url)
    address = url if found is None else found[1] + url[found.end() :]
    request = urllib.request.Request(quote(address, safe="!#$%&'()*+,/:;=?@[]~"), headers={"User-Agent": _USER_AGENT})
    if found is not None:
        user = base64.b64encode(unquote_to_bytes(found[2])).decode()
        request.add_unredirected_header("Authorization", f"Basic {user}")
    return request


def _received(response: Any, policy: MediaPolicy, until: float) -> bytes:
    stated = response.headers.get("Content-Length") or ""
    length = int(stated) if stated.isdigit() else None
    if length is not None and length > policy.max_bytes:
        raise ValueError(
            f"it has {length} bytes, more than max_bytes={policy.max_bytes} of the MediaPolicy. {_SMALLER}"
        )
    contents = bytearray()
    while chunk := response.read1(_CHUNK_BYTES):
        contents += chunk
        if len(contents) > policy.max_bytes:
            raise ValueError(f"it has more than max_bytes={policy.max_bytes} of the MediaPolicy. {_SMALLER}")
        if time.monotonic() > until:
            raise ValueError(_late(policy))
    if length is not None and len(contents) < length:
        raise ValueError(
            f"it ended after {len(contents)} of {length} bytes; expected all. Try again, or download the file first"
        )
    return bytes(contents)


def _late(policy: MediaPolicy) -> str:
    return f"it didn't arrive within {policy.timeout:g} s, the timeout of the MediaPolicy"


# -------------------------------------------------------------------- how messages name things


def shown_url(url: str) -> str:
    """A path or URL as messages and pages name it: without user, password and query."""
    return re.sub(r"^([\w+.-]+://)(?:[^/?#]*@)?([^?]*).*", r"\1\2", url, flags=re.DOTALL)


def name_of(given: Any) -> str:
    """What messages call an image or a video; (width, height) is called by its size."""
    if isinstance(given, tuple) and len(given) == 2:
        return f"of {given[0]} x {given[1]} pixels"
    if isinstance(given, bytes):
        return f"of {len(given)} bytes"
    if isinstance(given, (str, os.PathLike)):
        return repr(_short(shown_url(str(given))))
    file = getattr(given, "filename", None)  # of a PIL image
    if isinstance(file, (str, os.PathLike)) and str(file):
        return repr(_short(str(file)))
    if isinstance(given, Image.Image):
        return name_of(given.size)
    shape = getattr(given, "shape", None)
    return f"({type(given).__name__}" + (f" of shape {tuple(shape)})" if shape is not None else ")")


def reason_of(error: Any) -> str:
    """What an error says, without the name of the file or URL that those of FFmpeg and of files end with."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return _short(words, _MAX_REASON).rstrip(".")


def _short(words: str, limit: int = _MAX_NAME) -> str:
    words = " ".join(words.split())
    return words if len(words) <= limit else words[: limit - 3] + "..."


__all__ = ["MediaPolicy", "rgb_image"]
