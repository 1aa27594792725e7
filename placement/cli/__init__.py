"""The console script `coterie`: each command reads one kind of artifact and writes one.

Heavy libraries are imported by the commands that need them.
"""

from __future__ import annotations

import io
import sys

from rich.console import Console

from placement.cli import constraints, exports, imports, insights, plans, profiles, runs
from placement.cli.app import app
from profiler.errors import CoterieError

__all__ = ["app", "constraints", "exports", "imports", "insights", "main", "plans", "profiles", "runs"]


def main() -> None:
    """Run the command line; a mistake that the user can mend is one line and exit code 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names out of files, or tables, may have what it cannot encode
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except (CoterieError, OSError, MemoryError) as error:  # what the system itself refuses is the user's to mend too
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        one_line = " ".join(message.split()) or "not enough memory"
        Console(stderr=True, soft_wrap=True, markup=False, highlight=False).print(f"error: {one_line}")
        sys.exit(1)
