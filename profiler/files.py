"""Reading and writing one-file artifacts: JSON and text, whole or not at all. Knows nothing of what they mean."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from profiler.errors import CoterieError, first_line


def require_writable(path: Path) -> None:
    """Check before long work that its result can be written.

    Raises:
        CoterieError: `path` is a folder, or the nearest place above it that exists is not a writable folder.
    """
    if path.is_dir() or not path.name:
        raise CoterieError(f"{path}: is a folder; give the name of a file to -o")
    require_writable_parent(path)


def require_writable_parent(path: Path) -> None:
    """Check that a file or folder of that name can be made.

    Raises:
        CoterieError: the nearest place above `path` that exists is not a writable folder.
    """
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CoterieError(f"{path}: cannot be written, {parent} is no writable folder; give another name to -o")


def write_json(path: Path, value: object) -> None:
    """Write one artifact as JSON, renamed into place when complete.

    Raises:
        CoterieError: the file cannot be written.
    """
    write_bytes(path, to_json_bytes(value))


def to_json_bytes(value: object) -> bytes:
    """The content of an artifact in JSON."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode("utf-8")


def write_text(path: Path, text: str) -> None:
    """Write one artifact, renamed into place when complete.

    Raises:
        CoterieError: the file cannot be written.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, *parts: bytes, to_disk: bool = True) -> None:
    """Write one file from its parts, renamed into place when it is complete.

    Args:
        to_disk: wait until it is on the disk, so that it outlives the machine's power and not only the process.

    Raises:
        CoterieError: the file cannot be written.
    """
    write_together({path: parts}, to_disk=to_disk)


def write_together(files: Mapping[Path, Sequence[bytes]], *, to_disk: bool = True) -> None:
    """Write files that belong together, each from its parts; all are complete before the first gets its name.

    Raises:
        CoterieError: one of them cannot be written; what had their names before is still there then.
    """
    temporaries = {path: path.with_name(f".{path.name}.partial") for path in files}
    path = next(iter(files))
    try:
        for path, parts in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporaries[path].open("wb") as file:
                file.writelines(parts)
                file.flush()
                if to_disk:
                    os.fsync(file.fileno())
        for path, temporary in temporaries.items():
            temporary.replace(path)
    except OSError as error:
        remedy = "free some space" if error.errno == errno.ENOSPC else "give a writable path to -o"
        raise CoterieError(f"{path}: cannot be written ({error.strerror}); {remedy}") from error
    finally:
        for temporary in temporaries.values():
            with contextlib.suppress(OSError):
                temporary.unlink()


def sync(paths: Iterable[Path]) -> None:
    """Wait until files are on the disk.

    Raises:
        CoterieError: the disk refuses one of them.
    """
    for path in paths:
        try:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise CoterieError(f"{path}: cannot be written ({error.strerror}); free some space") from error


def read_json(path: Path, what: str, remedy: str) -> dict[str, Any]:
    """Read one JSON artifact.

    Args:
        what: the artifact's name, for messages.
        remedy: what to do when it is not there.

    Raises:
        CoterieError: it is missing, unreadable or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CoterieError(f"{path}: no such file; {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CoterieError(f"{path}: truncated, or not {what} ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise CoterieError(f"{path}: not {what} (a JSON object is expected); {remedy}")
    return value


def read_pt(path: Path) -> Any:
    """What a file of `torch.save` holds, plain containers and tensors only: nothing in it is run.

    Its tensors stay on the disk until they are read.

    Raises:
        CoterieError: it is missing, truncated, holds code, or is older than torch 1.6.
    """
    import torch  # takes seconds

    try:
        if not zipfile.is_zipfile(path):  # a bare pickle, say
            raise CoterieError(f"{path}: refused, truncated or not written by torch.save; save it again")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CoterieError(f"{path}: no such file") from None
    except CoterieError:
        raise
    except Exception as error:  # what loading a broken file raises is any library's choice
        code = "Weights only load failed" in str(error)
        reason = "it holds code, not only tensors" if code else first_line(error)
        raise CoterieError(f"{path}: refused, truncated or no file of tensors ({reason}); save it again") from error
