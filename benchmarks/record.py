"""Writes a benchmark's figures beside the hardware, versions and commit that they came from."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("numba", "numpy", "torch", "transformers")


def circumstances() -> dict[str, Any]:
    """Date, commit, processor and versions."""
    commit = _git("rev-parse", "--short", "HEAD")
    changed = _git(
        "status",
        "--porcelain",
        "--",
        ".",
        ":!benchmarks/results",
        ":!docs/images",
        ":!benchmarks/runtime/*.md",
        ":!benchmarks/runtime/*.json",
    )
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": f"{commit} with changes" if changed else commit or "unknown",
        "processor": names[0].partition(":")[2].strip() if names else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=RESULTS.parents[1])
    return done.stdout.strip()


def write(
    name: str, title: str, text: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], command: str = ""
) -> None:
    """Write `results/<name>.md` and `.json`, and print the Markdown."""
    where = circumstances()
    lines = [f"# {title}", "", text, "", "| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    lines += [
        "",
        f"`python -m benchmarks.{command or name}`; " + ", ".join(f"{key} {value}" for key, value in where.items()),
        "",
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text("\n".join(lines))
    value = {"circumstances": where, "columns": list(columns), "rows": [list(row) for row in rows]}
    (RESULTS / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n")
    print("\n".join(lines))


def peak_memory() -> int:
    """Bytes, of this process alone since it started or the mark was reset; getrusage begins with what the parent had.

    Linux only.
    """
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def spread(values: Sequence[float] | np.ndarray) -> str:
    """Median (least to most)."""
    return f"{np.median(values):.3g} ({np.min(values):.3g} to {np.max(values):.3g})"


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
