# Copyright 2026 The casa_hf authors. Licensed under the Apache License, Version 2.0.
"""Tensors as byte ranges of safetensors files, and new files made from such ranges.

A safetensors file is 8 bytes of header length, a JSON header that gives each tensor's dtype, shape and byte range, and
the bytes. Renaming or duplicating a tensor therefore needs no tensor at all: `read_checkpoint` finds the ranges,
`write_checkpoint` copies them, a small chunk at a time, behind headers of its own. Only a change of dtype looks at
the values, and it too works on one chunk at a time. What no file holds, such as a gate or the embedding of a new
token, is computed when it is written; a tensor may be put together from ranges and computed rows.

Files are read, never mapped: a process that has mapped a file is killed if the file gets shorter.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from ..checks import listed, one_line
from ..folder_files import CheckpointError, own_file, parse_json, read_json
from .unchanged import FileState, changed, check_unchanged, file_state

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# The dtypes of unquantized weights, by their safetensors code.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
DTYPE_CODES: dict[torch.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}

# A size such as "5GB" or "5000", and its units.
_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d*)?)\s*(KB|MB|GB|TB|)\s*", re.ASCII | re.IGNORECASE)
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

# What fits into the cache of a core, between reading and writing: chunks of 16 MiB take twice as long to copy.
_CHUNK_BYTES = 2**18

# The largest that the format allows.
_MAX_HEADER_BYTES = 100_000_000

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored.

    Attributes:
        file: Safetensors file.
        dtype: Key of `DTYPES`.
        shape: Shape of the tensor.
        start: Offset of its first byte in the file.
        state: State of the file when its header was read.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    state: FileState

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize

    def rows(self, start: int, stop: int) -> StoredTensor:
        """The rows `start` to `stop` (exclusive) of a tensor with at least one dimension."""
        row_bytes = math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize
        return replace(self, shape=(stop - start, *self.shape[1:]), start=self.start + start * row_bytes)


@dataclass(frozen=True)
class ComputedTensor:
    """A small tensor that no file holds.

    Attributes:
        shape: Shape of the tensor.
        compute: Function that makes its values, in any dtype; called when they are written.
    """

    shape: tuple[int, ...]
    compute: Callable[[], torch.Tensor]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written.

    Attributes:
        name: Name in the new checkpoint.
        parts: Parts that are concatenated along the first dimension.
        dtype: Key of `DTYPES`; values of another dtype are cast.
        origin: Description of where its values come from.
    """

    name: str
    parts: tuple[StoredTensor | ComputedTensor, ...]
    dtype: str
    origin: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        return first if len(self.parts) == 1 else (sum(part.shape[0] for part in self.parts), *first[1:])

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize


# ---------------------------------------------------------------- reading


def read_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint folder, from headers alone.

    Args:
        folder: Folder with `model.safetensors`, or with shards and `model.safetensors.index.json`. As in Transformers
            the single file is read if it has both.

    Returns:
        The place of every tensor by name.

    Raises:
        CheckpointError: if there are no safetensors weights, if a file is missing, broken or outside the folder, if
            shards and index disagree, or if a tensor is quantized.
    """
    if (folder / SINGLE_FILE).is_file():
        return read_tensors(own_file(folder, SINGLE_FILE))
    if not (folder / INDEX_FILE).is_file():
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in {".bin", ".pt", ".pth"})
        found = f" It has pickled ones ({listed(pickles)}), which are never loaded." if pickles else ""
        raise CheckpointError(
            f"{folder} has no safetensors weights, neither {SINGLE_FILE} nor shards with {INDEX_FILE}.{found} Get the "
            "safetensors files, or load the model with Transformers and write them with save_pretrained."
        )
    return _read_shards(folder)


def _read_shards(folder: Path) -> dict[str, StoredTensor]:
    index = own_file(folder, INDEX_FILE)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no weight_map, or one that isn't a JSON object. Download the file again.")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file:
            raise CheckpointError(
                f"{index} must map {name} to a file name, but maps it to {file!r}. Download it again."
            )
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not own_file(folder, shard).is_file()]
    if missing:
        raise CheckpointError(f"{index} names files that don't exist: {listed(missing)}. Download them.")
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        stored = read_tensors(folder / shard)
        promised = {name for name, file in weight_map.items() if file == shard}
        if stored.keys() != promised:
            raise CheckpointError(
                f"{folder / shard} doesn't hold the tensors that {INDEX_FILE} lists for it: they differ in "
                f"{listed(sorted(stored.keys() ^ promised))}. Download the shards and the index of the same version."
            )
        tensors.update(stored)
    return tensors


def read_tensors(file: Path) -> dict[str, StoredTensor]:
    """The place of every tensor of a safetensors file by name, from its header.

    Raises:
        CheckpointError: if the file is broken, or if a tensor is quantized.
    """
    try:
        with open(file, "rb", buffering=0) as stream:
            state = file_state(stream.fileno())
            header, start = _read_header(stream, size=state[2])
    except (CheckpointError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a complete safetensors file ({one_line(error)}). Download it again."
        ) from error
    quantized = [f"{name} ({entry['dtype']})" for name, entry in header.items() if entry["dtype"] not in DTYPES]
    if quantized:
        raise CheckpointError(
            f"{file} holds quantized or non-float weights: {listed(quantized)}. Use the original checkpoint, with "
            f"weights in {', '.join(DTYPES)}."
        )
    return {
        name: StoredTensor(file, entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0], state)
        for name, entry in header.items()
    }


def _read_header(stream: BinaryIO, size: int) -> tuple[dict[str, dict[str, Any]], int]:
    """The entries of a safetensors file's tensors by name, and where their bytes begin.

    Args:
        stream: File, at its beginning.
        size: Size of the file in bytes.

    Raises:
        CheckpointError: unless the ranges of all tensors fill the file, without gaps, to its last byte.
    """
    length = int.from_bytes(stream.read(8), "little")
    if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
        raise CheckpointError(f"{size} bytes can't have a header of {length}")
    content = b""
    while len(content) < length and (more := stream.read(length - len(content))):
        content += more
    header = parse_json(content, "its header")
    header.pop("__metadata__", None)
    end = 0
    for name, entry in sorted(header.items(), key=_first_byte):
        start, stop = entry["data_offsets"]
        if start != end:
            raise CheckpointError(f"{name} begins at byte {start} instead of {end}")
        if entry["dtype"] in DTYPES and stop - start != math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize:
            raise CheckpointError(f"{name} has {stop - start} bytes for {entry['dtype']} {entry['shape']}")
        end = stop
    if 8 + length + end != size:
        raise CheckpointError(f"it should have {8 + length + end} bytes, but has {size}")
    return header, 8 + length


def _first_byte(named: tuple[str, Any]) -> tuple[int, int]:
    """Of a tensor's entry in a header, which is checked for its types, and where it ends."""
    name, entry = named
    match entry:
        case {"dtype": str(), "shape": [*shape], "data_offsets": [int(start), int(stop)]} if start <= stop:
            if all(isinstance(length, int) and length >= 0 for length in shape):
                return start, stop
    raise CheckpointError(f"its header says of {name}: {str(entry)[:80]}")


def _buffer(num_bytes: int | None = None) -> memoryview:
    return memoryview(bytearray(num_bytes or _CHUNK_BYTES))


def _chunks(tensor: StoredTensor, buffer: memoryview) -> Iterator[memoryview]:
    """The bytes of a tensor, a buffer full at a time; a chunk is valid until the next one.

    Raises:
        CheckpointError: if the file isn't the one whose header was read, or can't be read.
    """
    try:
        with open(tensor.file, "rb", buffering=0) as stream:
            if file_state(stream.fileno()) != tensor.state:
                raise changed(tensor.file)
            stream.seek(tensor.start)
            for left in range(tensor.nbytes, 0, -len(buffer)):
                chunk = buffer[: min(left, len(buffer))]
                filled = 0
                while filled < len(chunk):
                    num_bytes = stream.readinto(chunk[filled:])
                    if not num_bytes:
                        raise changed(tensor.file)
                    filled += num_bytes
                yield chunk
    except OSError as error:
        raise CheckpointError(f"{tensor.file} can't be read ({one_line(error)}). Get the file again.") from error


def same_values(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two stored tensors have the same dtype, shape and bytes."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return all(a == b for a, b in zip(_chunks(first, _buffer()), _chunks(second, _buffer()), strict=True))


def values_of(tensor: StoredTensor) -> torch.Tensor:
    """The values of a small stored tensor, in a copy of their own."""
    values = [_values(chunk, tensor.dtype).clone() for chunk in _chunks(tensor, _buffer())]
    return torch.cat(values).view(tensor.shape)


def row_statistics(tensor: StoredTensor) -> tuple[torch.Tensor, float]:
    """The mean of the rows of a stored matrix, float64, and the standard deviation of its numbers from that."""
    row_bytes = tensor.nbytes // tensor.shape[0]
    rows = max(_CHUNK_BYTES // row_bytes, 1)
    total, squares = torch.zeros(2, tensor.shape[1], dtype=torch.float64)
    for chunk in _chunks(tensor, _buffer(rows * row_bytes)):
        values = _values(chunk, tensor.dtype).view(-1, tensor.shape[1]).double()
        total += values.sum(0)
        squares += values.square().sum(0)
    mean = total / tensor.shape[0]
    variance = (squares / tensor.shape[0] - mean.square()).clamp(min=0)
    return mean, math.sqrt(variance.mean())


# ---------------------------------------------------------------- writing


def shard_bytes(max_shard_size: int | str) -> int:
    """The largest size of a weight file in bytes, from a number or a string such as "5GB".

    Raises:
        CheckpointError: if it isn't a size, or isn't positive.
    """
    number = max_shard_size if type(max_shard_size) is int else 0
    if isinstance(max_shard_size, str) and (match := _SIZE.fullmatch(max_shard_size)):
        number = int(float(match[1]) * _UNITS[match[2].upper()])
    if number <= 0:
        raise CheckpointError(
            f"max_shard_size={max_shard_size!r} is not a size; expected a positive number of bytes, or one with KB, "
            "MB, GB or TB. Use such as '5GB'."
        )
    return number


def split_files(tensors: Sequence[PlannedTensor], max_shard_size: int | str) -> dict[str, list[PlannedTensor]]:
    """Distribute tensors over files, in order: `model.safetensors`, or shards if they exceed `max_shard_size`.

    Args:
        tensors: Tensors to be written.
        max_shard_size: Largest size of a file's tensors, see `shard_bytes`; a larger tensor gets a file of its own.

    Returns:
        The tensors of each file, by file name.

    Raises:
        CheckpointError: if `max_shard_size` isn't a size.
    """
    planned = {tensor.name: tensor for tensor in tensors}
    split = split_state_dict_into_shards_factory(
        planned,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes(max_shard_size),
    )
    return {file: [planned[name] for name in names] for file, names in split.filename_to_tensors.items()}


def write_checkpoint(folder: Path, files: dict[str, list[PlannedTensor]], progress: Progress | None = None) -> None:
    """Write safetensors files, and an index if there are several.

    Nothing is flushed to the disk; that is left to the caller, once, while the kernel is already at it.

    Args:
        folder: Existing folder.
        files: Tensors of each file, see `split_files`.
        progress: Function that is called with (bytes written so far, bytes in all).

    Raises:
        CheckpointError: if a value is too large for the dtype that it is cast to, or if a file has changed since its
            header was read.
    """
    tensors = [tensor for group in files.values() for tensor in group]
    total = sum(tensor.nbytes for tensor in tensors)
    done = 0

    def report(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress(done, total)

    buffer = _buffer()
    for file_name, group in files.items():
        _write_file(folder / file_name, group, buffer, report)
    parts = [part for tensor in tensors for part in tensor.parts if isinstance(part, StoredTensor)]
    check_unchanged({part.file: part.state for part in parts})
    if len(files) > 1:
        parameters = sum(tensor.numel for tensor in tensors)
        index = {
            "metadata": {"total_parameters": parameters, "total_size": total},
            "weight_map": {tensor.name: file_name for file_name, group in files.items() for tensor in group},
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_file(
    path: Path, tensors: Sequence[PlannedTensor], buffer: memoryview, report: Callable[[int], None]
) -> None:
    # Widest dtype first, so that every tensor starts at a multiple of its item size.
    tensors = sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype].itemsize)
    with open(path, "wb") as output:
        output.write(_header(tensors))
        for tensor in tensors:
            for part in tensor.parts:
                if isinstance(part, ComputedTensor):
                    report(output.write(_cast(part.compute(), tensor)))
                    continue
                for chunk in _chunks(part, buffer):
                    same = tensor.dtype == part.dtype
                    report(output.write(chunk if same else _cast(_values(chunk, part.dtype), tensor)))


def _header(tensors: Sequence[PlannedTensor]) -> bytes:
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _values(chunk: memoryview, dtype: str) -> torch.Tensor:
    return torch.frombuffer(chunk, dtype=DTYPES[dtype])


def _cast(values: torch.Tensor, tensor: PlannedTensor) -> memoryview:
    cast = values.to(DTYPES[tensor.dtype]).contiguous()
    if bool((cast.isinf() & values.isfinite()).any()):
        raise CheckpointError(
            f"{tensor.name} holds {values.abs().max().item():g}, which is beyond the range of {cast.dtype}. Use "
            "dtype='bfloat16', or no dtype to keep the source's."
        )
    return cast.view(-1).view(torch.uint8).numpy().data
