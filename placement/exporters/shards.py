"""safetensors files rewritten tensor by tensor in bounded memory: renamed, rows in another order, ids renumbered.

Works on bytes, so any type of weight passes unchanged. Knows nothing of models.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from profiler.errors import CoterieError, first_line

CHUNK = 16 * 2**20
"""Bytes that are in memory at a time."""
MAX_HEADER = 100 * 2**20
"""Largest header that safetensors itself reads, in bytes."""
INTEGERS = {"I64": np.int64, "I32": np.int32, "I16": np.int16, "U8": np.uint8}
"""Types in which a tensor can hold ids."""


@dataclass(frozen=True)
class Tensor:
    """One entry of a file's header; `start` and `end` are offsets behind the header, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Edit:
    """What becomes of one tensor.

    Attributes:
        name: its new name.
        axis: the dimension whose rows change their order; None if none does.
        order: the old row of each new one, by which that dimension is divided: it may have several entries a row.
        new_id: what an id that the tensor holds becomes; None if it holds none.
    """

    name: str
    axis: int | None = None
    order: tuple[int, ...] = ()
    new_id: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself; tensors in the order of their bytes."""

    tensors: tuple[Tensor, ...]
    metadata: dict[str, str] | None
    data_start: int


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        CoterieError: it is no such file, or truncated.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= MAX_HEADER:
                raise CoterieError(
                    f"{path}: header of {size} bytes, must be 2 to {MAX_HEADER}; give a safetensors file"
                )
            entries = json.loads(file.read(size))
        metadata = entries.pop("__metadata__", None)
        tensors = [_tensor(name, entry) for name, entry in entries.items()]
        tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
        ends = [0, *(tensor.end for tensor in tensors)]
        if any(tensor.start != end or tensor.end < end for tensor, end in zip(tensors, ends, strict=False)):
            raise CoterieError(f"{path}: tensors overlap or leave gaps; download it again")
        expected, found = 8 + size + ends[-1], path.stat().st_size
        if expected != found:
            raise CoterieError(f"{path}: truncated, {found:,} bytes of {expected:,}; download it again")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CoterieError(f"{path}: not a safetensors file ({first_line(error)}); give one") from error
    except OSError as error:
        raise CoterieError(f"{path}: cannot be read ({error.strerror}); download it again") from error
    return Header(tuple(tensors), metadata, 8 + size)


def _tensor(name: str, entry: dict[str, Any]) -> Tensor:
    """One entry of a header; a ValueError where numbers are no numbers."""
    shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
    if any(type(number) is not int or number < 0 for number in (*shape, start, end)) or end < start:
        raise ValueError(f"{name}: shape {shape} and bytes {start} to {end}")
    bits = re.search(r"\d+", entry["dtype"])  # BOOL, C64, F8_E4M3 and so on
    expected = math.prod(shape) * (int(bits[0]) if bits else 8)
    if expected != 8 * (end - start):
        raise ValueError(f"{name}: {end - start} bytes of {entry['dtype']} {shape}")
    return Tensor(name, entry["dtype"], shape, start, end)


def rewrite(source: Path, target: Path, edits: Sequence[Edit], on_bytes: Callable[[int], None]) -> None:
    """Write an edited copy of a safetensors file.

    Args:
        edits: one for each tensor of `read_header`.
        on_bytes: called with the bytes written, again and again.

    Raises:
        CoterieError: the source is no safetensors file.
        OSError: the target cannot be written.
    """
    header = read_header(source)
    entries: dict[str, object] = {} if header.metadata is None else {"__metadata__": header.metadata}
    for tensor, edit in zip(header.tensors, edits, strict=True):
        offsets = [tensor.start, tensor.end]
        entries[edit.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    assert len(entries) == len(edits) + (header.metadata is not None), "two tensors of one name"
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with source.open("rb") as file, target.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor, edit in zip(header.tensors, edits, strict=True):
            for piece in edited(file, header.data_start + tensor.start, tensor, edit):
                out.write(piece)
                on_bytes(len(piece))


def edited(file: IO[bytes], start: int, tensor: Tensor, edit: Edit) -> Iterator[bytes]:
    """The bytes of one tensor after its edit, at most `CHUNK` of them at a time, or else one whole table of ids."""
    size = tensor.end - tensor.start
    if edit.new_id is not None:
        file.seek(start)
        ids = np.frombuffer(file.read(size), dtype=INTEGERS[tensor.dtype])
        if size and not 0 <= ids.min() <= ids.max() < len(edit.new_id):
            raise CoterieError(
                f"{tensor.name}: expert {ids.min() if ids.min() < 0 else ids.max()}, must be below {len(edit.new_id)}"
            )
        yield np.asarray(edit.new_id, dtype=ids.dtype)[ids].tobytes()
    elif edit.axis is None or size == 0:
        yield from _copied(file, start, size)
    else:
        outer = int(np.prod(tensor.shape[: edit.axis], dtype=np.int64))
        row, rest = divmod(size, outer * len(edit.order))
        if rest:  # of types narrower than a byte
            raise CoterieError(f"{tensor.name}: rows of {tensor.dtype} {list(tensor.shape)} are no whole bytes")
        if size <= CHUNK:
            file.seek(start)
            rows = np.frombuffer(file.read(size), dtype=np.uint8).reshape(outer, len(edit.order), row)
            yield rows[:, list(edit.order)].tobytes()
            return
        for block in range(outer):
            for old in edit.order:
                yield from _copied(file, start + (block * len(edit.order) + old) * row, row)


def _copied(file: IO[bytes], start: int, size: int) -> Iterator[bytes]:
    file.seek(start)
    while size > 0:
        piece = file.read(min(size, CHUNK))
        if not piece:
            raise CoterieError(f"{file.name}: ended early while it was read; is something writing to it?")
        size -= len(piece)
        yield piece
