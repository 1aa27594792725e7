"""The console script `coterie`: each command reads one kind of artifact and writes one.

Neither `profiler` nor the rest of `placement` imports it.  Heavy libraries are imported by the commands that
need them, never here.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from placement.cli import constraints, exports, imports, insights, plans, profiles, runs
from placement.cli.app import app
from profiler.errors import CoterieError, first_line
from profiler.files import can_be_written, temporary_folder

__all__ = ["app", "constraints", "exports", "imports", "insights", "main", "plans", "profiles", "runs"]


@contextlib.contextmanager
def _place_for_compiled() -> Iterator[None]:
    """Numba refuses to work where it can keep nothing: with a read-only installation and home, say. Give it a place."""
    near = Path(__file__).parent / "__pycache__"
    of_user = Path(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "numba")
    if "NUMBA_CACHE_DIR" in os.environ or any(can_be_written(place / "any") for place in (near, of_user)):
        yield
        return
    with temporary_folder() as folder:
        os.environ["NUMBA_CACHE_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["NUMBA_CACHE_DIR"]


def _lacks_memory(error: BaseException) -> bool:
    """Whether torch, which may not be imported here, found too little on an accelerator or the CPU."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _stop(one_line: str) -> NoReturn:
    Console(stderr=True, soft_wrap=True, markup=False, highlight=False).print(f"error: {one_line}")
    sys.exit(1)


def main() -> None:
    """Run the command line; a mistake that the user can mend is one line and exit code 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names out of files, or tables, may have what it cannot encode
            stream.reconfigure(errors="backslashreplace")
    try:
        with _place_for_compiled():
            app()
    except (CoterieError, OSError, MemoryError) as error:  # what the system itself refuses is the user's to mend too
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        _stop(" ".join(message.split()) or "not enough memory")
    except RuntimeError as error:
        if not _lacks_memory(error):
            raise
        _stop(
            f"not enough memory ({first_line(error)}); where the command has them give a smaller --batch-size or "
            "--sequence-length (a run that is resumed keeps its own), else a larger device"
        )
