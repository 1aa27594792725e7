"""Reading and writing one-file artifacts: JSON and text, whole or not at all. Knows nothing of what they mean."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from profiler.errors import CoterieError, first_line

TEMPORARY = "coterie-temporary-"
"""What the names of temporary folders begin with."""


def require_writable(path: Path, *inputs: Path | None) -> None:
    """Check before long work that its result can be written, and not over one of the files that are read for it.

    Raises:
        CoterieError: `path` is a folder or an input, or the nearest place above it that exists is not a writable
            folder.
    """
    if path.is_dir() or not path.name:
        raise CoterieError(f"{path}: is a folder; give the name of a file to -o")
    if path.exists() and any(given is not None and given.exists() and path.samefile(given) for given in inputs):
        raise CoterieError(f"{path}: is read, and would be written over; give another name to -o")
    require_writable_parent(path)


def require_writable_parent(path: Path) -> None:
    """Check that a file or folder of that name can be made.

    Raises:
        CoterieError: the nearest place above `path` that exists is not a writable folder.
    """
    if not can_be_written(path):
        parent = _nearest(path)
        raise CoterieError(f"{path}: cannot be written, {parent} is no writable folder; give another name to -o")


def can_be_written(path: Path) -> bool:
    """Whether a file or folder of that name can be made, its parents included."""
    parent = _nearest(path)
    return parent.is_dir() and os.access(parent, os.W_OK)


def _nearest(path: Path) -> Path:
    """The nearest place above that exists."""
    return next(folder for folder in path.absolute().parents if folder.exists())


def behind_link(folder: Path) -> Path:
    """Where a symlink leads, so that what it leads to is replaced and not the link; else the folder as it is given."""
    return Path(os.path.realpath(folder)) if folder.is_symlink() else folder


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
        raise CoterieError(f"{path}: cannot be written ({error.strerror}); {_remedy(error)}") from error
    finally:
        for temporary in temporaries.values():
            with contextlib.suppress(OSError):
                temporary.unlink()


def _remedy(error: OSError) -> str:
    return "free some space" if error.errno == errno.ENOSPC else "give a writable path to -o"


def put_in_place(complete: Path, folder: Path) -> None:
    """Rename a complete folder to the name that it shall have; a folder of that name goes only when that is done.

    Raises:
        CoterieError: the name cannot be given; what had it before has it still.
    """
    replaced = _replaced(folder)
    try:
        if os.path.lexists(folder):
            _remove(replaced)  # else it is what a killed run took away and never replaced
            folder.replace(replaced)
        complete.replace(folder)
    except OSError as error:
        if os.path.lexists(replaced) and not os.path.lexists(folder):
            replaced.replace(folder)
        raise CoterieError(f"{folder}: cannot be written ({error.strerror}); give a writable folder to -o") from error
    _remove(replaced)


def remove_replaced(folder: Path) -> None:
    """Remove what `put_in_place` leaves that is killed when a new folder has got its name."""
    _remove(_replaced(folder))


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def _remove(folder: Path) -> None:
    """A folder, or a symlink to one, which `rmtree` would leave."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def temporary_folder() -> Iterator[str]:
    """A new folder for temporary files, removed at the end; those of processes that were killed are removed now.

    It is locked as long as this process lives, so that another one sees whether it is still in use.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):  # if it is another user's, or in use
            if time.time() - left.stat().st_mtime > 60:  # else it may be about to be locked
                with locked(left):
                    shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder, locked(Path(folder)):
        yield folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep others that do the same out of a folder.

    Raises:
        BlockingIOError: another one has locked it.
        OSError: the folder cannot be opened, or its file system locks no folders.
    """
    descriptor = os.open(folder, os.O_RDONLY)  # closed in processes that this one starts
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


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
            raise CoterieError(f"{path}: cannot be written ({error.strerror}); {_remedy(error)}") from error


def parse_json(text: str) -> Any:
    """What `json.loads` gives, if all text in it is text: JSON can spell half a character, which nothing can write.

    Raises:
        ValueError: it is no JSON, or holds half a character.
        RecursionError: it is too deep.
    """
    value = json.loads(text)
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


def require_text(names: object) -> None:
    """Check that `parse_json` can read what is written: names of files can hold bytes that are no text.

    Args:
        names: what JSON takes.

    Raises:
        CoterieError: some of it cannot; the message shows it.
    """
    text = json.dumps(names, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        name = text[text.rfind('"', 0, error.start) + 1 : text.find('"', error.end)]
        raise CoterieError(
            f"{name!r} is no UTF-8 text, which names of models, domains and files must be; rename it"
        ) from error


def read_json(path: Path, what: str, remedy: str) -> dict[str, Any]:
    """Read one JSON artifact.

    Args:
        what: the artifact's name, for messages.
        remedy: what to do when it is not there.

    Raises:
        CoterieError: it is missing, unreadable or not a JSON object.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
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
