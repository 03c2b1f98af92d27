# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Images of every form become what they stand for, and what can't be an image is refused by name."""

from __future__ import annotations

import base64
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from casa_hf.media_casa import MediaPolicy, fetch, image_size, images_of, is_image, rgb_image
from casa_hf.samples import PHOTOGRAPHS
from tests.clips import every_kind, picture
from tests.forms import forms_of, transparent_drawing, turned_photograph

CAT = PHOTOGRAPHS / "cat.jpg"


def test_every_kind_of_frame_is_the_same_image(tmp_path: Path) -> None:
    for name, frame in every_kind(77, tmp_path / "77.png").items():
        found = rgb_image(frame)
        assert found.mode == "RGB" and np.array_equal(np.asarray(found), picture(77)), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_frame_on_an_accelerator() -> None:
    frame = torch.tensor(picture(77), device="cuda").permute(2, 0, 1)
    assert np.array_equal(np.asarray(rgb_image(frame)), picture(77))
    assert np.array_equal(np.asarray(rgb_image(frame.bfloat16() / 255)), picture(77))


def test_floating_values_are_the_nearest_levels() -> None:
    levels = np.random.RandomState(0).randint(0, 256, (20, 30, 3))
    beside = levels + np.random.RandomState(1).uniform(-0.49, 0.49, levels.shape)
    for frame in (beside / 255, torch.tensor(beside / 255).permute(2, 0, 1)):
        assert np.array_equal(np.asarray(rgb_image(frame)), levels)


def test_what_is_not_opaque_is_laid_on_white() -> None:
    """As recent image processors do: PIL alone would show the colour that is hidden."""
    colours = np.random.RandomState(0).randint(0, 256, (20, 30, 4), np.uint8)
    opacity = colours[..., 3:] / 255
    expected = colours[..., :3] * opacity + 255 * (1 - opacity)
    for frame in (Image.fromarray(colours), colours, torch.tensor(colours).permute(2, 0, 1) / 255):
        assert np.abs(np.asarray(rgb_image(frame)) - expected).max() <= 1
    rich = Image.fromarray(colours)
    for mode, straight in (("RGBa", rich), ("La", rich.convert("LA"))):
        seen = np.asarray(rgb_image(straight.convert(mode))).astype(int)
        assert np.abs(seen - np.asarray(rgb_image(straight))).max() <= 2, mode
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([9, 8, 7, 0, 0, 0])
    palette.info["transparency"] = 1
    assert np.asarray(rgb_image(palette)).tolist() == [[[9, 8, 7], [255, 255, 255]]]


def test_grey_frames() -> None:
    grey = np.random.RandomState(0).randint(0, 256, (20, 30), np.uint8)
    for frame in (Image.fromarray(grey), grey[..., None], torch.tensor(grey)[None] / 255):
        assert np.array_equal(np.asarray(rgb_image(frame)), np.repeat(grey[..., None], 3, axis=2))


def test_the_frame_stays_as_it_is() -> None:
    frame = Image.fromarray(picture(77))
    rgb_image(frame).thumbnail((8, 8))
    assert np.array_equal(np.asarray(frame), picture(77))


# -------------------------------------------------------------------- one image in all forms


@pytest.mark.parametrize("make", [turned_photograph, transparent_drawing])
def test_a_file_is_the_same_image_in_all_its_forms(make: Any, tmp_path: Path, serve: Any) -> None:
    file, expected = make(tmp_path)
    for name, form in forms_of(file, serve(tmp_path)).items():
        found = rgb_image(form)
        assert found.mode == "RGB" and np.array_equal(np.asarray(found), expected), name
        assert np.array_equal(np.asarray(rgb_image(found)), expected), f"{name}, once more"
        assert sorted(image_size(form)) == sorted(found.size), name
        assert is_image(form) and images_of(form) == [form]


def test_arrays_of_every_type_in_every_layout() -> None:
    levels = np.random.RandomState(0).randint(0, 256, (20, 30, 3), np.uint8)
    for dtype in ("int8", "int16", "int32", "int64", "uint32", "uint64", ">i4", ">f4", "float16", "float64"):
        scaled = levels // 2 if dtype == "int8" else levels
        given = (scaled / 255 if "f" in dtype else scaled).astype(dtype)
        assert np.array_equal(np.asarray(rgb_image(given)), scaled), dtype
    for torch_dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e5m2):
        coarse = torch.tensor(levels // 128 * 255)
        given = (coarse / 255).to(torch_dtype)
        for layout in (given, given.permute(2, 0, 1)):
            assert np.array_equal(np.asarray(rgb_image(layout)), coarse), torch_dtype


def test_booleans_are_black_and_white() -> None:
    mask = np.random.RandomState(0).rand(20, 30) < 0.5
    expected = np.repeat(mask[..., None] * 255, 3, axis=2)
    for form in (mask, mask[..., None], torch.tensor(mask)[None], torch.tensor(mask), Image.fromarray(mask)):
        assert np.array_equal(np.asarray(rgb_image(form)), expected)


def test_channels_are_found_where_transformers_finds_them_or_where_one_says() -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (4, 10, 3), np.uint8)  # not 4 channels of 10 x 3
    assert np.array_equal(np.asarray(rgb_image(pixels)), pixels)
    narrow = np.random.RandomState(0).randint(0, 256, (3, 10, 3), np.uint8)
    assert np.array_equal(np.asarray(rgb_image(narrow, layout="channels_last")), narrow)
    assert np.array_equal(np.asarray(rgb_image(narrow, layout="channels_first")), narrow.transpose(1, 2, 0))
    assert image_size(pixels) == (10, 4) and image_size(pixels[..., 0]) == (10, 4)
    grey = Image.fromarray(pixels[..., :2].copy())
    assert grey.mode == "LA" and rgb_image(np.asarray(grey)) == rgb_image(grey)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")  # as Pillow says
@pytest.mark.parametrize("ending", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("data", [b"Exif\0\0 no such data", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"])
def test_damaged_data_about_an_image_is_no_damage_to_it(ending: str, data: bytes) -> None:
    file = BytesIO()
    Image.fromarray(picture(77)).save(file, ending, exif=data)
    assert rgb_image(file.getvalue()).size == rgb_image(Image.open(file)).size == (64, 48)


@pytest.mark.parametrize("orientation", range(10))
def test_an_image_is_turned_whatever_its_other_data_say(orientation: int) -> None:
    """`ImageOps.exif_transpose` writes all of them anew, which fails for what some cameras write."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    file, strange = BytesIO(), BytesIO()
    Image.fromarray(picture(77)).save(file, "png", exif=exif)
    exif[0x011A] = 72.0  # the resolution, a fraction,
    data = exif.tobytes().replace(struct.pack(">HH", 0x011A, 5), struct.pack(">HH", 0x011A, 7))  # said to be bytes
    assert data != exif.tobytes()
    Image.fromarray(picture(77)).save(strange, "png", exif=data)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(file)))
    for found in (rgb_image(file.getvalue()), rgb_image(strange.getvalue())):
        assert np.array_equal(np.asarray(found), expected)
        assert found.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize("form", [bytes, Image.open])
def test_a_png_that_is_damaged_within_is_refused(form: Any) -> None:
    """Once Pillow was asked for its EXIF data, it counts as loaded, damaged or not."""
    file = BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (200, 300, 3), np.uint8)).save(file, "png")
    damaged = bytearray(file.getvalue())
    damaged[len(damaged) // 2 :] = bytes(len(damaged) - len(damaged) // 2)
    with pytest.raises(ValueError, match="can't be used: "):
        rgb_image(bytes(damaged) if form is bytes else form(BytesIO(damaged)))


def test_one_image_or_several() -> None:
    several = [np.zeros((4, 4, 3), np.uint8)] * 2
    assert images_of(None) == [] and images_of(()) == [] and images_of(several) == several
    assert images_of("cat.jpg") == ["cat.jpg"] and images_of(["cat.jpg", b""]) == ["cat.jpg", b""]
    for wrong in (3, BytesIO(b"a\nb\n"), {"url": "cat.jpg"}, bytearray(b"ab")):  # for the processor to refuse
        assert images_of(wrong) == [wrong]
    assert len(images_of(np.stack(several))) == 2 and len(images_of(several[0])) == 1


# -------------------------------------------------------------------- what is no image


def png_header(width: int, height: int) -> bytes:
    """The first bytes of a PNG of this size, without any pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"")
    )


def truncated(folder: Path) -> Path:
    file = folder / "half.jpg"
    file.write_bytes(CAT.read_bytes()[:1500])
    return file


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (np.zeros(4), r"image \(ndarray of shape \(4,\)\) .*two or three dimensions"),
        (np.zeros((0, 5, 3), np.uint8), r"of shape \(0, 5, 3\)"),
        (None, r"image \(NoneType\) can't be used: it is a NoneType; expected a PIL image"),
        (
            torch.full((3, 4, 4), 256),
            "its values are int64 from 256 to 256; expected integers from 0 to 255, .* Scale them",
        ),
        (np.full((4, 4, 3), -1), "its values are int64 from -1 to -1; expected integers from 0 to 255"),
        (
            np.full((4, 4, 3), 255.0, np.float32),
            "float32 from 255 to 255; expected .* floating-point values from 0 to 1",
        ),
        (np.full((4, 4, 3), np.nan), "float64 from nan to nan; expected .* floating-point values from 0 to 1"),
        (torch.full((3, 4, 4), torch.inf, dtype=torch.bfloat16), "float32 from inf to inf; expected .* from 0 to 1"),
        (
            np.zeros((4, 4, 3), np.uint16),
            "its values are uint16, which has no known range; expected .* Scale them to uint8",
        ),
        (
            torch.zeros((3, 4, 4), dtype=torch.uint16),
            "its values are uint16, which has no known range; expected .* Scale them to uint8",
        ),
        (np.zeros((4, 4, 3), complex), "its values are complex128"),
        (np.full((4, 4, 3), "x"), "its values are <U1"),
        (np.zeros((5, 5, 5), np.uint8), r"its shape is \(5, 5, 5\); expected 1 to 4 channels"),
        (torch.zeros((3, 4, 4), device="meta"), "image .Tensor of shape"),
        (Image.new("RGB", (0, 4)), "0 x 4 pixels"),
        (Image.new("I", (4, 4)), "mode is 'I', with more than 8 bits"),
        (Image.new("F", (4, 4)), "mode is 'F', with more than 8 bits"),
        (b"", "image of 0 bytes can't be used: it has 0 bytes; expected a file such as JPEG"),
        (b"\0\0\0 ftypisom\0\0\2\0", "it is a video; expected an image. Pass it as a video"),
        (b"\x1aE\xdf\xa3 matroska", "it is a video"),
        (b"\0\0\1\xb3 mpeg", "it is a video"),
        (b"\0\0\0 ftypheic\0\0\2\0", "its format isn't known"),
        ("ftp://127.0.0.1/cat.jpg", "neither an http:// or https:// URL nor base64"),
        (b"no picture", "image of 10 bytes can't be used: its format isn't known"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "its format isn't known"),
        ("data:image/png;base64", "a comma"),
        ("data:image/png;base64,abcde", "base64 is damaged"),
        ("file:///nowhere/cat.jpg", "file:///nowhere/cat.jpg' can't be used: there is no such file"),
        ("\0", "no such file"),
        ("x" * 5000, "its format isn't known"),
        (png_header(13_000, 13_000), "13000 x 13000 pixels, more than max_decoded_pixels=89478485"),
        (png_header(30_000, 30_000), "30000 x 30000 pixels, more than max_decoded_pixels"),
        (np.broadcast_to(np.uint8(0), (13_000, 13_000, 3)), "13000 x 13000 pixels, more than max_decoded_pixels"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_image_is_refused_by_name(form: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        rgb_image(form)
    assert str(caught.value).startswith("The image ") and len(str(caught.value)) < 700


def test_files_are_named(tmp_path: Path) -> None:
    half, text = truncated(tmp_path), tmp_path / "text.png"
    text.write_text("hello")
    opened = Image.open(half)
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "depth.png")
    for form, message in (
        (tmp_path / "nowhere.png", "nowhere.png' can't be used: there is no such file"),
        (tmp_path, "it is a folder; expected a file"),
        (half, "half.jpg' can't be used: its file is truncated"),
        (opened, "half.jpg' can't be used: its file is truncated"),
        (text, "text.png' can't be used: its format isn't known"),
        (tmp_path / "depth.png", "depth.png' can't be used: its mode is 'I;16'"),
    ):
        with pytest.raises(ValueError, match=message):
            rgb_image(form)
    for form in (tmp_path / "nowhere.png", text, tmp_path / "depth.png", Image.open(tmp_path / "depth.png")):
        with pytest.raises(ValueError, match=r"\.png' can't be used: "):  # without a look at the pixels
            image_size(form)


@pytest.mark.parametrize("name", ["12:30.png", "a%20b.png", "http:x.png", "data:x,.png", "ü ?.png"])
def test_a_path_is_no_url(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    Image.fromarray(picture(77)).save(file)
    with chdir(tmp_path):
        for form in (file, Path(name), file.as_uri(), str(file), *([] if name.startswith("data:") else [name])):
            assert rgb_image(form).size == (64, 48)


def test_the_largest_size_can_be_set(tmp_path: Path) -> None:
    form = np.zeros((20, 30, 3), np.uint8)
    Image.fromarray(form).save(tmp_path / "small.png")
    for given in (form, Image.fromarray(form), tmp_path / "small.png"):
        assert rgb_image(given, MediaPolicy(max_decoded_pixels=600)).size == (30, 20)
        for read in (rgb_image, image_size):
            with pytest.raises(ValueError, match=r"30 x 20 pixels, more than max_decoded_pixels=599; .*MediaPolicy"):
                read(given, MediaPolicy(max_decoded_pixels=599))
    # Pillow's own limit, for the whole process, stands in the way of no higher one.
    with pytest.raises(ValueError, match=r"truncated|broken|No more"):
        rgb_image(png_header(20_000, 10_000), MediaPolicy(max_decoded_pixels=10**9))


def test_a_policy_is_checked() -> None:
    assert MediaPolicy.of(None) == MediaPolicy() and MediaPolicy.of({"network": False}).local_files
    for wrong, message in (
        ({"timeout": 0}, "timeout=0 must be a positive number of seconds"),
        ({"max_bytes": 0.5}, "max_bytes=0.5 must be a positive integer"),
        ({"network": "no"}, "network='no' must be True or False"),
        ({"web": False}, "has an unknown field .*'web'.*; the fields of MediaPolicy are network, local_files"),
        (3, "media_policy=3 must be a MediaPolicy"),
    ):
        with pytest.raises(ValueError, match=message):
            MediaPolicy.of(wrong)  # type: ignore[arg-type]


# -------------------------------------------------------------------- what may be read


def test_neither_network_nor_files(tmp_path: Path, serve: Any) -> None:
    file, expected = turned_photograph(tmp_path)
    alone = MediaPolicy(network=False, local_files=False)
    for form in (file, str(file), tmp_path / "nowhere.png", "nowhere.png"):  # nor whether there is one is told
        with pytest.raises(
            ValueError, match=r"paths aren't read \(MediaPolicy.local_files=False\); pass the contents"
        ):
            rgb_image(form, alone)
    url = f"{serve(tmp_path)}/{file.name}"
    with pytest.raises(ValueError, match=r"URLs aren't fetched \(MediaPolicy.network=False\); pass the contents"):
        rgb_image(url, alone)
    for form in (file.read_bytes(), base64.b64encode(file.read_bytes()).decode(), Image.open(file), expected):
        assert np.array_equal(np.asarray(rgb_image(form, alone)), expected)
    assert rgb_image(url, MediaPolicy(local_files=False)).size == (20, 30)
    assert rgb_image(file, MediaPolicy(network=False)).size == (20, 30)


@contextmanager
def server(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """A server that answers GET in this way; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with suppress(OSError):  # the client has gone
                answer(self)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{running.server_port}"
        finally:
            running.shutdown()


def send(request: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name.replace("_", "-"), value)
    request.end_headers()
    request.wfile.write(body)


def test_what_a_server_does_is_told() -> None:
    cat = CAT.read_bytes()

    def answer(request: BaseHTTPRequestHandler) -> None:
        match request.path.partition("?")[0]:
            case "/cat.jpg" | "/%C3%BC%20cat.jpg":
                assert request.headers["User-Agent"].startswith("casa_hf")
                send(request, 200, cat, Content_Length=str(len(cat)))
            case "/moved":
                send(request, 302, Location="/cat.jpg")
            case "/away":
                assert request.headers["Authorization"].startswith("Basic")
                send(request, 302, Location="/other")
            case "/other":  # which may be anybody's
                send(request, 200 if request.headers["Authorization"] is None else 400, cat)
            case "/loop":
                send(request, 302, Location=f"/loop?{time.monotonic()}")
            case "/file":
                send(request, 302, Location=f"file://{CAT}")
            case "/ftp":
                send(request, 302, Location="ftp://127.0.0.1/cat.jpg")
            case "/broken":
                send(request, 500, b"sorry")
            case "/half":
                send(request, 200, cat[:5000], Content_Length=str(len(cat)))
            case "/large":
                send(request, 200, cat, Content_Length=str(len(cat)))
            case "/large-unsaid":
                send(request, 200, cat)
            case "/page":
                send(request, 200, b"<html>not here</html>")
            case "/secret":
                allowed = request.headers["Authorization"] == f"Basic {base64.b64encode(b'me:pass word').decode()}"
                send(request, 200 if allowed else 401, cat)
            case _:
                send(request, 404)

    with server(answer) as address:
        secret = address.replace("//", "//me:pass%20word@")
        for path in ("/cat.jpg", "/ü cat.jpg", "/%C3%BC%20cat.jpg", "/moved", "/cat.jpg?key=1"):
            assert fetch(address + path) == cat, path
        assert fetch(f"{secret}/secret") == fetch(f"{secret}/away") == cat
        odd = address.replace("//", "//me:p@ss@")
        with pytest.raises(ValueError, match="status 401"):  # from this server, not one called ss
            fetch(f"{odd}/secret")
        small = MediaPolicy(max_bytes=10_000)
        for path, policy, message in (
            ("/nowhere.jpg", MediaPolicy(), "/nowhere.jpg' can't be used: the server answers with status 404"),
            ("/secret?key=123", MediaPolicy(), "/secret' can't be used: .*status 401"),
            ("/broken", MediaPolicy(), "status 500"),
            ("/loop", MediaPolicy(), "status 302 .*redirect"),
            ("/file", MediaPolicy(), "status 302"),
            ("/ftp", MediaPolicy(), "unknown url type|status 302"),
            ("/half", MediaPolicy(), f"it ended after 5000 of {len(cat)} bytes; expected all"),
            ("/large", small, f"it has {len(cat)} bytes, more than max_bytes=10000"),
            ("/large-unsaid", small, "it has more than max_bytes=10000 .*raise max_bytes"),
            ("/page", MediaPolicy(), "its format isn't known"),
        ):
            with pytest.raises(ValueError, match=message):
                rgb_image(address + path, policy)
        with pytest.raises(ValueError, match=r"^(?!.*pass)"):
            rgb_image(f"{secret}/broken")


def test_the_proxy_of_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    cat = CAT.read_bytes()
    with server(lambda request: send(request, 200, cat if request.path == "http://far.invalid/a" else b"")) as address:
        monkeypatch.setenv("http_proxy", address)
        assert fetch("http://far.invalid/a") == cat


def test_a_server_that_is_not_there_or_says_nothing() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(ValueError, match="can't be fetched: Connection refused"):
            rgb_image(f"http://127.0.0.1:{unused.getsockname()[1]}/cat.jpg")
    with pytest.raises(ValueError, match="can't be fetched: "):
        rgb_image("http://nowhere.invalid/cat.jpg")

    def answer(request: BaseHTTPRequestHandler) -> None:
        if request.path == "/silent":
            time.sleep(5)
        request.send_response(200)
        request.end_headers()
        for _ in range(50):  # always something, never all of it
            request.wfile.write(b"x")
            time.sleep(0.1)

    def drip(request: BaseHTTPRequestHandler) -> None:
        for _ in range(50):
            request.wfile.write(b"H")
            time.sleep(0.1)

    with server(answer) as address, server(drip) as dripping:
        for path in (f"{address}/slow", f"{address}/silent", dripping):
            begin = time.monotonic()
            with pytest.raises(ValueError, match=r"it didn't arrive within 0\.3 s, the timeout of the MediaPolicy"):
                rgb_image(path, MediaPolicy(timeout=0.3))
            assert time.monotonic() - begin < 4
            if path.endswith("/slow"):  # nor does anything go on receiving
                while any(thread.name == "casa-fetch" for thread in threading.enumerate()):
                    assert time.monotonic() - begin < 4
                    time.sleep(0.01)
